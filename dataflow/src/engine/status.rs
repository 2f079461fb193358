//! What runs, and how it is doing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::shared::{StateRow, Status};
use super::sinks::{SinkStatus, describe};
use super::{Engine, Running};
use crate::checkpoint::StageId;
use crate::error::Error;
use crate::ingest::lock;
use crate::plan::RelationId;
use crate::time::{NO_WATERMARK, Tick};
use crate::worker::command::{Counters, Progress};

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

impl Engine {
    /// All sources, views and sinks.
    pub fn status(&self) -> Vec<Status> {
        let mut statuses = self.running();
        let backfills = lock(&self.inner.backfills);
        for status in &mut statuses {
            if let Some(backfill) = backfills.get(&status.id) {
                status.backfill = Some(backfill.status());
                status.last_error = status.last_error.take().or_else(|| backfill.last_error());
            }
        }
        statuses
    }

    fn running(&self) -> Vec<Status> {
        let last = get(&self.inner.shared.last_tick);
        let held = Arc::clone(&lock(&self.inner.shared.held));
        let failed = lock(&self.inner.failed).clone();
        let default_interval = self.intervals().commit_interval;
        lock(&self.inner.items)
            .iter()
            .map(|(id, running)| match running {
                Running::Source { item } => self.source_status(*id, &item.name),
                Running::View {
                    item,
                    progress,
                    ready,
                } => {
                    let hold = held.get(id);
                    let state = match (hold, *ready.borrow()) {
                        (Some(hold), _) if hold.failed => "failed",
                        (Some(_), _) => "paused",
                        (None, true) => "running",
                        (None, false) => "hydrating",
                    };
                    Status {
                        state,
                        held_since: hold.map(|h| h.since),
                        last_error: failed.get(id).map(reason),
                        ..flow_status(*id, &item.name, "view", progress, last)
                    }
                }
                Running::Failed { name, kind, error } => Status {
                    state: "failed",
                    last_error: Some(reason(error)),
                    ..flow_status(*id, name, kind, &Progress::idle(), last)
                },
                Running::Sink {
                    item,
                    progress,
                    status,
                    confirmed,
                } => {
                    let trouble = lock(&status.trouble).clone();
                    let failure = failed.get(id).map(reason);
                    let trouble = failure.clone().or(trouble);
                    let failing = failure.is_some() || status.failed.load(Ordering::Relaxed);
                    let paused = status.paused.load(Ordering::Relaxed);
                    let interval = status.interval.borrow().unwrap_or(default_interval);
                    let state = match (&trouble, failing) {
                        (_, true) => "failed",
                        _ if paused => "paused",
                        (Some(_), false) => "retrying",
                        (None, false) if *confirmed.borrow() => "running",
                        (None, false) => "hydrating",
                    };
                    Status {
                        state,
                        held_since: held.get(id).map(|h| h.since),
                        commit_interval_ms: u64::try_from(interval.as_millis()).ok(),
                        last_error: trouble,
                        rows_out: get(&status.rows),
                        bytes_out: get(&status.bytes),
                        committed: reached(progress, status, *confirmed.borrow()),
                        ..flow_status(*id, &item.name, "sink", progress, last)
                    }
                }
            })
            .collect()
    }

    /// State of every operator on every worker of this process.
    pub fn state(&self) -> Vec<StateRow> {
        let usage = lock(&self.inner.shared.usage).clone();
        let mut rows = Vec::new();
        for (id, running) in lock(&self.inner.items).iter() {
            let (relation, kind, progress) = match running {
                Running::View { item, progress, .. } => (&item.name, "view", progress),
                Running::Sink { item, progress, .. } => (&item.name, "sink", progress),
                Running::Source { .. } | Running::Failed { .. } => continue,
            };
            for (worker, stage, operator, size, since) in progress.counters.states() {
                rows.push(StateRow {
                    relation: relation.clone(),
                    kind,
                    operator: format!("{operator}-{stage}"),
                    worker,
                    rows: size.rows,
                    bytes: size.bytes,
                    paged: size.swapped,
                    usage: usage
                        .get(&(*id, StageId(stage), worker))
                        .cloned()
                        .unwrap_or_default(),
                    since,
                });
            }
        }
        rows
    }

    fn source_status(&self, id: RelationId, name: &str) -> Status {
        let status = self.inner.shared.source_status(id);
        let state = lock(&status.state).clone();
        // Read after the state, which is updated after the tick: the frontier covers these rows.
        let last = self.inner.shared.last_tick.load(Ordering::Acquire);
        let trouble = lock(&status.trouble).clone();
        let phase = if status.failed.load(Ordering::Relaxed) {
            "failed"
        } else if state.ended {
            "finished"
        } else if trouble.is_some() {
            "retrying"
        } else if state.splits.is_empty() {
            "idle"
        } else {
            "running"
        };
        let remaining = lock(&status.remaining);
        let lag_offsets = (!remaining.is_empty()).then(|| remaining.values().sum());
        Status {
            id,
            name: name.to_string(),
            kind: "source",
            state: phase,
            held_since: None,
            commit_interval_ms: None,
            frontier: last + 1,
            watermark: (state.watermark != NO_WATERMARK).then_some(state.watermark),
            lag_ms: 0,
            lag_offsets,
            rows_in: state.rows,
            rows_out: state.rows,
            bytes_in: get(&status.bytes),
            bytes_out: 0,
            state_rows: 0,
            state_bytes: 0,
            state_swapped_bytes: 0,
            operators: Vec::new(),
            late_rows: 0,
            rejected_rows: state.rejected,
            error_rows: 0,
            last_error: trouble,
            offsets: state
                .splits
                .into_iter()
                .map(|(split, (end, _))| (split, end))
                .collect(),
            committed: None,
            backfill: None,
        }
    }
}

/// Why something does not run, and what to do about it.
fn reason(error: &Error) -> String {
    let text = describe(error);
    match &error.hint {
        Some(hint) => format!("{text}; {hint}"),
        None => text,
    }
}

/// The destination of a sink holds everything below this tick. Ticks without rows end no epoch, so when
/// all rows that were written are committed, it is as far as the sink has come.
fn reached(progress: &Progress, status: &SinkStatus, confirmed: bool) -> Option<Tick> {
    // In this order: the rows of every tick below `next` are counted.
    let next = progress.next();
    let last_rows = get(&progress.counters.last_rows);
    let committed = get(&status.committed);
    if confirmed && committed >= last_rows {
        return Some(committed.max(next));
    }
    Some(committed).filter(|tick| *tick > 0)
}

fn flow_status(
    id: RelationId,
    name: &str,
    kind: &'static str,
    progress: &Progress,
    last: Tick,
) -> Status {
    let next = progress.next();
    let counters = &progress.counters;
    let state = counters.state();
    Status {
        id,
        name: name.to_string(),
        kind,
        state: "running",
        held_since: None,
        commit_interval_ms: None,
        frontier: next,
        watermark: None,
        lag_ms: (last + 1).saturating_sub(next.min(last + 1)),
        lag_offsets: None,
        rows_in: get(&counters.rows_in),
        rows_out: get(&counters.rows_out),
        bytes_in: get(&counters.bytes_in),
        bytes_out: get(&counters.bytes_out),
        state_rows: state.rows,
        state_bytes: state.bytes,
        state_swapped_bytes: state.swapped,
        operators: counters.operators(),
        late_rows: get(&counters.late_rows),
        rejected_rows: Counters::get(&counters.rejected_rows),
        error_rows: get(&counters.error_rows),
        last_error: None,
        offsets: std::collections::BTreeMap::new(),
        committed: None,
        backfill: None,
    }
}
