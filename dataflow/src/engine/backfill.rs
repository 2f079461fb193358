//! What reads history: how far it is, and how it is called off.
//!
//! # Contract
//!
//! * A backfill lives from the moment its dataflow is installed until it is part of a checkpoint (or has
//!   taken the place of what it replaces).
//! * It can be cancelled until its outcome is sealed; of the two, one wins. What was cancelled leaves
//!   nothing behind.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::Engine;
use crate::error::{Error, ErrorKind, Result};
use crate::ingest::{Prepared, lock};
use crate::plan::RelationId;
use crate::source::Offsets;
use crate::worker::command::Progress;

const READING: u8 = 0;
const FOLLOWING: u8 = 1;
const SEALED: u8 = 2;
const CANCELLED: u8 = 3;

/// See the module.
#[derive(Debug)]
pub struct Backfill {
    pub name: String,
    /// `view` or `sink`.
    pub kind: &'static str,
    /// The dataflow is to replace another one.
    pub replaces: bool,
    /// A statement waits for it; otherwise a start has begun it.
    pub asked: bool,
    started: Instant,
    phase: AtomicU8,
    /// Rows read from sources.
    rows: AtomicU64,
    sources: Mutex<BTreeMap<RelationId, Reading>>,
    /// Relations whose contents are taken: name and rows.
    contents: Vec<(String, u64)>,
    progress: Arc<Progress>,
    trouble: Mutex<Option<String>>,
    /// Why it was called off, if nobody asked for that.
    failure: Mutex<Option<Error>>,
}

/// One source: what is to be read and how far that is.
#[derive(Debug, Default)]
struct Reading {
    name: String,
    /// By split: the first offset, the one after the last record read, and where history ends for now.
    splits: BTreeMap<String, (u64, u64, u64)>,
}

/// A copy of a [`Backfill`], for people and metrics.
#[derive(Debug, Clone)]
pub struct BackfillStatus {
    /// `create`, `restore` or `replace`.
    pub what: &'static str,
    /// `reading` history, `following` the live changes, or `switching`.
    pub phase: &'static str,
    /// Rows read.
    pub rows: u64,
    pub rows_per_s: u64,
    pub elapsed_ms: u64,
    /// Offsets of sources and rows of other relations.
    pub done: u64,
    pub total: u64,
    pub percent: f64,
    pub inputs: Vec<InputStatus>,
}

/// What is read of one relation.
#[derive(Debug, Clone)]
pub struct InputStatus {
    pub name: String,
    /// `offsets` or `rows`.
    pub unit: &'static str,
    pub done: u64,
    pub total: u64,
}

/// PostgreSQL's `query_canceled`.
const CANCELLED_CODE: &str = "57014";

/// Whether somebody asked for what happened: no matter for whoever watches the log for errors.
pub(super) fn was_asked_for(e: &Error) -> bool {
    e.code == CANCELLED_CODE
}

fn cancelled() -> Error {
    Error::new(ErrorKind::Conflict, "the backfill was cancelled")
        .code(CANCELLED_CODE)
        .hint("say the statement again to begin anew")
}

impl Backfill {
    pub(super) fn new(
        (name, kind): (String, &'static str),
        replaces: bool,
        asked: bool,
        contents: Vec<(String, u64)>,
        progress: Arc<Progress>,
    ) -> Self {
        Self {
            name,
            kind,
            replaces,
            asked,
            started: Instant::now(),
            phase: AtomicU8::new(READING),
            rows: AtomicU64::new(0),
            sources: Mutex::default(),
            contents,
            progress,
            trouble: Mutex::default(),
            failure: Mutex::default(),
        }
    }

    /// Calls it off; false when its outcome is sealed already.
    pub fn cancel(&self) -> bool {
        let cancel = |phase| (phase != SEALED).then_some(CANCELLED);
        self.phase
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, cancel)
            .is_ok()
    }

    /// Calls it off because it cannot be completed; false when its outcome is sealed already.
    pub(super) fn fail(&self, error: &Error) -> bool {
        // First: whoever sees that it is over asks why.
        lock(&self.failure).get_or_insert_with(|| error.clone());
        self.cancel()
    }

    /// From here on it cannot be cancelled; fails if it was.
    pub(super) fn seal(&self) -> Result<()> {
        let seal = |phase| (phase != CANCELLED).then_some(SEALED);
        self.phase
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, seal)
            .map(|_| ())
            .map_err(|_| self.why())
    }

    fn why(&self) -> Error {
        lock(&self.failure).clone().unwrap_or_else(cancelled)
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.phase.load(Ordering::SeqCst) == CANCELLED
    }

    /// Fails once it is cancelled.
    pub(super) fn check(&self) -> Result<()> {
        if self.is_cancelled() {
            return Err(self.why());
        }
        Ok(())
    }

    /// History is read but for the rest; the dataflow follows the live changes.
    pub(super) fn attached(&self) {
        let _ = self
            .phase
            .compare_exchange(READING, FOLLOWING, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// History of a source ends at `limit`, for now; a split nothing was read of begins at `starts`.
    pub(super) fn expect(
        &self,
        source: (RelationId, &str),
        starts: &BTreeMap<String, u64>,
        limit: &Offsets,
    ) {
        let mut sources = lock(&self.sources);
        let reading = sources.entry(source.0).or_default();
        reading.name = source.1.to_string();
        for (split, end) in &limit.0 {
            let start = starts.get(split).copied().unwrap_or(0);
            let entry = reading.splits.entry(split.clone());
            entry.or_insert((start, start, *end)).2 = *end;
        }
    }

    /// A piece of history was read.
    pub(super) fn read(&self, source: RelationId, chunk: &Prepared) {
        self.rows.fetch_add(chunk.rows() as u64, Ordering::Relaxed);
        if let Some(reading) = lock(&self.sources).get_mut(&source)
            && let Some(split) = reading.splits.get_mut(&*chunk.split)
        {
            if split.0 == split.1 {
                split.0 = chunk.begin;
            }
            split.1 = chunk.end;
        }
    }

    pub(super) fn trouble(&self, trouble: Option<&Error>) {
        *lock(&self.trouble) = trouble.map(|e| e.message.clone());
    }

    /// What ails a source that is read.
    pub fn last_error(&self) -> Option<String> {
        lock(&self.trouble).clone()
    }

    pub fn status(&self) -> BackfillStatus {
        let read = self.rows.load(Ordering::Relaxed);
        let mut inputs: Vec<InputStatus> = lock(&self.sources)
            .values()
            .map(|reading| {
                let sum = |f: fn(&(u64, u64, u64)) -> u64| reading.splits.values().map(f).sum();
                InputStatus {
                    name: reading.name.clone(),
                    unit: "offsets",
                    done: sum(|(start, at, _)| at.saturating_sub(*start)),
                    total: sum(|(start, _, end)| end.saturating_sub(*start)),
                }
            })
            .collect();
        // Contents are counted as they arrive, without saying from where; they are taken in turn.
        let arrived = self.progress.counters.rows_in.load(Ordering::Relaxed);
        let mut left = arrived.saturating_sub(read);
        for (name, rows) in &self.contents {
            let done = left.min(*rows);
            left -= done;
            inputs.push(InputStatus {
                name: name.clone(),
                unit: "rows",
                done,
                total: *rows,
            });
        }
        let done = inputs.iter().map(|i| i.done.min(i.total)).sum();
        let total = inputs.iter().map(|i| i.total).sum();
        let rows = read.max(arrived);
        let elapsed = self.started.elapsed();
        BackfillStatus {
            what: match (self.replaces, self.asked) {
                (true, _) => "replace",
                (false, true) => "create",
                (false, false) => "restore",
            },
            phase: match self.phase.load(Ordering::SeqCst) {
                READING => "reading",
                FOLLOWING => "following",
                SEALED => "switching",
                _ => "cancelled",
            },
            rows,
            rows_per_s: (rows as f64 / elapsed.as_secs_f64().max(0.001)) as u64,
            elapsed_ms: elapsed.as_millis() as u64,
            done,
            total,
            percent: match total {
                0 => 100.0,
                total => (done as f64 * 1000.0 / total as f64).floor() / 10.0,
            },
            inputs,
        }
    }
}

impl Engine {
    /// Backfills under a name; a view that is published in the lake has one for its sink, too.
    pub fn backfills(&self, name: &str) -> Vec<Arc<Backfill>> {
        let backfills = lock(&self.inner.backfills);
        backfills
            .values()
            .filter(|b| b.name == name)
            .cloned()
            .collect()
    }

    /// Notes a backfill under the id of its relation.
    pub(super) fn note_backfill(&self, id: RelationId, backfill: &Arc<Backfill>) {
        lock(&self.inner.backfills).insert(id, Arc::clone(backfill));
    }

    /// Rows of the relations among `ids` that have contents, by name.
    pub(super) fn contents_of(&self, ids: impl Iterator<Item = RelationId>) -> Vec<(String, u64)> {
        let items = lock(&self.inner.items);
        ids.filter_map(|id| match items.get(&id) {
            Some(super::Running::View { item, progress, .. }) => Some((
                item.name.clone(),
                progress.counters.contents(item.plan.nodes.len()),
            )),
            _ => None,
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backfill() -> Backfill {
        let progress = Arc::new(Progress::idle());
        let contents = vec![("v".to_string(), 50)];
        Backfill::new(("w".to_string(), "view"), false, true, contents, progress)
    }

    #[test]
    fn cancelling_and_sealing_exclude_each_other() {
        let one = backfill();
        assert!(one.cancel());
        assert_eq!(one.seal().expect_err("cancelled").code, "57014");
        assert_eq!(one.check().expect_err("cancelled").code, "57014");
        let failed = backfill();
        assert!(failed.fail(&Error::invalid("no").code("23502")));
        assert_eq!(failed.check().expect_err("failed").code, "23502");
        assert_eq!(failed.seal().expect_err("failed").code, "23502");
        let other = backfill();
        other.seal().expect("not cancelled");
        assert!(!other.fail(&Error::invalid("no")));
        assert!(!other.cancel());
        other.check().expect("not cancelled");
    }

    #[test]
    fn progress_counts_offsets_and_rows() {
        let backfill = backfill();
        let limit = |end| Offsets(BTreeMap::from([("0".to_string(), end)]));
        let starts = BTreeMap::from([("0".to_string(), 100)]);
        backfill.expect((RelationId(1), "s"), &starts, &limit(150));
        let chunk = |begin, end| Prepared {
            split: "0".into(),
            begin,
            end,
            delta: None,
            rejected: Vec::new(),
            watermark: 0,
            bytes: 0,
            digest: None,
            remaining: None,
        };
        assert_eq!((backfill.status().done, backfill.status().total), (0, 100));
        backfill.read(RelationId(1), &chunk(110, 120));
        backfill.expect((RelationId(1), "s"), &starts, &limit(160));
        // What lay before the first record that is still there is not to be read.
        let status = backfill.status();
        assert_eq!((status.done, status.total), (10, 100));
        assert_eq!(status.percent, 10.0);
        backfill.read(RelationId(1), &chunk(120, 160));
        backfill
            .progress
            .counters
            .rows_in
            .store(70, Ordering::Relaxed);
        let status = backfill.status();
        assert_eq!((status.done, status.total), (100, 100));
        assert_eq!(
            (status.inputs[0].unit, status.inputs[1].unit),
            ("offsets", "rows")
        );
    }
}
