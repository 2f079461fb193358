//! The journal of failures: which relation a panic came from, kept across restarts.
//!
//! # Contract
//!
//! * A panic that can be put down to a relation is written to `failures.jsonl` in the data directory
//!   before the process ends.
//! * One server (all its processes) counts once, whatever of it panics before it ends.
//! * Three failures of one relation at the same place, without a checkpoint beyond the first one in
//!   between, mean that it would fail for ever: the next start does not apply that tick to it (see
//!   [`millrace_dataflow::engine::alter`]), and the others run.
//! * A sink whose rows its table does not take is written there as well; as that comes again whatever is
//!   tried, once is enough.
//! * `ALTER … RESUME` takes its failures out of the journal; those of another version do not count.

use std::collections::BTreeMap;
use std::io::Write;
use std::panic::PanicHookInfo;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use millrace_dataflow::cluster::wire::WireError;
use millrace_dataflow::engine::Failing;
use millrace_dataflow::engine::sinks::BrokenSink;
use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_dataflow::plan::RelationId;
use millrace_dataflow::time::{FIRST_MINTED as MINTED, Tick};
use millrace_dataflow::{blame, env};

/// Failures of one cause that stop a relation.
const FAILURES: usize = 3;
const FILE: &str = "failures.jsonl";
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Of a message, in characters.
const LONGEST: usize = 1_000;

static JOURNAL: OnceLock<PathBuf> = OnceLock::new();
static INCARNATION: AtomicU64 = AtomicU64::new(0);

/// One panic, or one broken sink.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Failure {
    relation: RelationId,
    /// Applied when it happened; zero or a private one before the relation follows the live ticks.
    tick: Tick,
    /// Tick of the last checkpoint then.
    checkpoint: Tick,
    /// File and line.
    place: String,
    message: String,
    incarnation: u64,
    version: String,
    at_ms: u64,
    /// Of a broken sink.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<WireError>,
    /// It comes again whatever is tried.
    #[serde(default)]
    certain: bool,
}

fn path(data_dir: &Path) -> PathBuf {
    data_dir.join(FILE)
}

/// From here on panics of this process go into the journal.
pub fn keep(data_dir: &Path) {
    let _ = JOURNAL.set(path(data_dir));
}

/// The number of this server.
pub fn set_incarnation(incarnation: u64) {
    INCARNATION.store(incarnation, Ordering::Relaxed);
}

/// Writes down a panic, if a relation is known that it came from. Called on the thread that panicked.
pub fn note(info: &PanicHookInfo<'_>) {
    let (Some(journal), Some(blame)) = (JOURNAL.get(), blame::current()) else {
        return;
    };
    let payload = info.payload();
    let message = payload
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_default();
    let failure = Failure {
        relation: blame.relation,
        tick: blame.tick,
        checkpoint: blame::last_checkpoint(),
        place: info
            .location()
            .map_or_else(String::new, |l| format!("{}:{}", l.file(), l.line())),
        message: message.chars().take(LONGEST).collect(),
        incarnation: INCARNATION.load(Ordering::Relaxed),
        version: VERSION.to_string(),
        at_ms: env::now_ms(),
        error: None,
        certain: false,
    };
    // The process ends in any case; a failure that cannot be kept is one that is not counted.
    let _ = append(journal, &failure);
}

/// Writes down why a sink cannot go on in this run.
pub fn note_broken(data_dir: &Path, broken: &BrokenSink) -> Result<()> {
    let BrokenSink { id, tick, error } = broken;
    let failure = Failure {
        relation: *id,
        tick: *tick,
        checkpoint: blame::last_checkpoint(),
        place: format!("its table ({})", error.code),
        message: error.message.chars().take(LONGEST).collect(),
        incarnation: INCARNATION.load(Ordering::Relaxed),
        version: VERSION.to_string(),
        at_ms: env::now_ms(),
        error: Some(error.clone().into()),
        // The rows; trouble of the disk may pass.
        certain: matches!(error.kind, ErrorKind::Invalid | ErrorKind::Unsupported),
    };
    Ok(append(&path(data_dir), &failure)?)
}

fn append(journal: &Path, failure: &Failure) -> std::io::Result<()> {
    let mut file = std::fs::File::options()
        .create(true)
        .read(true)
        .append(true)
        .open(journal)?;
    let mut line = Vec::new();
    // Behind half a line, which an earlier end has left, it would be lost with it.
    if !ends_a_line(&file)? {
        line.push(b'\n');
    }
    serde_json::to_writer(&mut line, failure)?;
    line.push(b'\n');
    file.write_all(&line)?;
    file.sync_all()
}

fn ends_a_line(file: &std::fs::File) -> std::io::Result<bool> {
    use std::os::unix::fs::FileExt;
    let Some(last) = file.metadata()?.len().checked_sub(1) else {
        return Ok(true);
    };
    let mut byte = [0];
    file.read_exact_at(&mut byte, last)?;
    Ok(byte == [b'\n'])
}

/// What is in the journal. A line that was torn is none, wherever in a character that was.
fn read(journal: &Path) -> Result<Vec<Failure>> {
    match std::fs::read(journal) {
        Ok(bytes) => Ok(bytes
            .split(|byte| *byte == b'\n')
            .filter_map(|line| serde_json::from_slice(line).ok())
            .collect()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e.into()),
    }
}

fn write(journal: &Path, failures: &[Failure]) -> Result<()> {
    let new = journal.with_extension("new");
    let mut file = std::fs::File::create(&new)?;
    for failure in failures {
        serde_json::to_writer(&mut file, failure).map_err(|e| Error::internal(e.to_string()))?;
        file.write_all(b"\n")?;
    }
    file.sync_all()?;
    std::fs::rename(&new, journal)?;
    Ok(())
}

/// Relations that are not to be run as they were. Forgets failures that do not matter any more.
pub fn failing(data_dir: &Path) -> Result<BTreeMap<RelationId, Failing>> {
    let journal = path(data_dir);
    let all = read(&journal)?;
    let mut by_relation = BTreeMap::<RelationId, Vec<Failure>>::new();
    for failure in &all {
        let of = by_relation.entry(failure.relation).or_default();
        match of.last_mut() {
            // Several threads: nothing from the first of their ticks on was shown.
            Some(last) if last.incarnation == failure.incarnation => {
                last.tick = last.tick.min(failure.tick);
                continue;
            }
            _ => of.push(failure.clone()),
        }
        if of.len() > FAILURES {
            of.remove(0);
        }
    }
    let kept: Vec<Failure> = by_relation.values().flatten().cloned().collect();
    if kept.len() < all.len() {
        write(&journal, &kept)?;
    }
    let judged = by_relation
        .iter()
        .filter_map(|(id, failures)| Some((*id, judge(failures)?)));
    Ok(judged.collect())
}

/// What the last failures of a relation mean.
fn judge(failures: &[Failure]) -> Option<Failing> {
    let (first, last) = (failures.first()?, failures.last()?);
    if let Some(error) = &last.error
        && last.certain
        && last.version == VERSION
    {
        return Some(Failing {
            at: Some(last.tick).filter(|tick| *tick >= MINTED),
            error: error.clone().into(),
        });
    }
    let equal = |f: &Failure| f.place == last.place && f.version == VERSION;
    if failures.len() < FAILURES || !failures.iter().all(equal) {
        return None;
    }
    let minted = failures.iter().all(|f| f.tick >= MINTED);
    if minted && last.checkpoint >= first.tick {
        return None;
    }
    let error = Error::internal(format!(
        "it failed {FAILURES} times at {}: {}",
        last.place, last.message
    ));
    // Of the latest of these ticks nothing was shown in any of the runs.
    let at = failures.iter().map(|f| f.tick).max();
    Some(Failing {
        at: at.filter(|_| minted),
        error,
    })
}

/// Takes the failures of a relation out: it is to be tried again.
pub fn forget(data_dir: &Path, relation: RelationId) -> Result<()> {
    let journal = path(data_dir);
    let mut all = read(&journal)?;
    let before = all.len();
    all.retain(|failure| failure.relation != relation);
    match all.len() == before {
        true => Ok(()),
        false => write(&journal, &all),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: Tick = MINTED + 1_000;

    fn failure(relation: u64, tick: Tick, checkpoint: Tick, place: &str) -> Failure {
        Failure {
            relation: RelationId(relation),
            tick,
            checkpoint,
            place: place.to_string(),
            message: "boom".to_string(),
            incarnation: 1,
            version: VERSION.to_string(),
            at_ms: 0,
            error: None,
            certain: false,
        }
    }

    fn judged(failures: &[Failure]) -> BTreeMap<RelationId, Option<Tick>> {
        let dir = tempfile::tempdir().expect("a folder");
        for (number, failure) in failures.iter().enumerate() {
            let incarnation = failure.incarnation + number as u64;
            let failure = Failure {
                incarnation,
                ..failure.clone()
            };
            append(&path(dir.path()), &failure).expect("written");
        }
        let failing = failing(dir.path()).expect("read");
        failing.into_iter().map(|(id, f)| (id, f.at)).collect()
    }

    #[test]
    fn three_equal_failures_without_progress_stop_a_relation() {
        let f = |tick, checkpoint| failure(1, tick, checkpoint, "a.rs:1");
        assert_eq!(judged(&[f(T, T - 9), f(T, T - 9)]), BTreeMap::new());
        let three = [f(T, T - 9), f(T + 2, T - 9), f(T, T - 1)];
        assert_eq!(
            judged(&three),
            BTreeMap::from([(RelationId(1), Some(T + 2))]),
            "from the latest of the ticks"
        );
        let progress = [f(T, T - 9), f(T + 2, T - 9), f(T + 5, T + 1)];
        assert_eq!(judged(&progress), BTreeMap::new());
        let other = [f(T, 0), failure(1, T, 0, "b.rs:1"), f(T, 0)];
        assert_eq!(judged(&other), BTreeMap::new(), "not of one cause");
        let mixed = [f(T, 0), failure(2, T, 0, "a.rs:1"), f(T, 0), f(T, 0)];
        assert_eq!(judged(&mixed).len(), 1, "each relation by itself");
    }

    #[test]
    fn a_row_that_a_table_does_not_take_fails_its_sink_at_once() {
        let dir = tempfile::tempdir().expect("a folder");
        let broken = |kind, id| BrokenSink {
            id: RelationId(id),
            tick: T,
            error: Error::new(kind, "no").code("23502").hint("do"),
        };
        for broken in [
            broken(ErrorKind::Invalid, 7),
            broken(ErrorKind::Internal, 8),
        ] {
            note_broken(dir.path(), &broken).expect("written");
        }
        let failing = failing(dir.path()).expect("read");
        assert_eq!(failing.keys().collect::<Vec<_>>(), [&RelationId(7)]);
        let Failing { at, error } = &failing[&RelationId(7)];
        assert_eq!((*at, error.code), (Some(T), "23502"));
        assert_eq!(error.hint.as_deref(), Some("do"));
    }

    #[test]
    fn all_that_panics_in_one_server_counts_once() {
        let dir = tempfile::tempdir().expect("a folder");
        let journal = path(dir.path());
        let fail = |incarnation, tick| {
            let failure = Failure {
                incarnation,
                ..failure(1, tick, 0, "a.rs:1")
            };
            append(&journal, &failure).expect("written");
        };
        for tick in [T + 2, T, T + 1] {
            fail(1, tick);
        }
        assert!(failing(dir.path()).expect("read").is_empty());
        let kept = read(&journal).expect("read");
        assert_eq!(kept.iter().map(|f| f.tick).collect::<Vec<_>>(), [T]);
        fail(2, T);
        fail(3, T);
        let failing = failing(dir.path()).expect("read");
        assert_eq!(failing[&RelationId(1)].at, Some(T));
    }

    #[test]
    fn one_that_never_got_to_the_live_ticks_has_no_place_among_them() {
        let f = |tick| failure(4, tick, T, "a.rs:1");
        let wanted = BTreeMap::from([(RelationId(4), None)]);
        assert_eq!(judged(&[f(1), f(0), f(3)]), wanted);
    }

    #[test]
    fn a_line_that_was_torn_in_a_character_is_skipped() {
        let dir = tempfile::tempdir().expect("a folder");
        let journal = path(dir.path());
        let message = "größer als erlaubt".to_string();
        let failure = Failure {
            message,
            ..failure(1, T, 0, "a.rs:1")
        };
        append(&journal, &failure).expect("written");
        let whole = std::fs::read(&journal).expect("read");
        let torn = whole.iter().position(|b| !b.is_ascii()).expect("an ö") + 1;
        std::fs::write(&journal, &whole[..torn]).expect("written");
        assert!(failing(dir.path()).expect("the server starts").is_empty());
        append(&journal, &failure).expect("written");
        assert_eq!(
            read(&journal).expect("read"),
            [failure],
            "on a line of its own"
        );
    }

    #[test]
    fn what_is_forgotten_or_torn_does_not_count() {
        let dir = tempfile::tempdir().expect("a folder");
        let journal = path(dir.path());
        for incarnation in 0..5 {
            for relation in [1, 2] {
                let failure = Failure {
                    incarnation,
                    ..failure(relation, T, 0, "a.rs:1")
                };
                append(&journal, &failure).expect("written");
            }
        }
        let mut text = std::fs::read_to_string(&journal).expect("read");
        text.push_str("{\"relation\":1,");
        std::fs::write(&journal, text).expect("written");
        assert_eq!(failing(dir.path()).expect("read").len(), 2);
        assert_eq!(
            read(&journal).expect("read").len(),
            6,
            "three of each are kept"
        );
        forget(dir.path(), RelationId(1)).expect("forgotten");
        let left = failing(dir.path()).expect("read");
        assert_eq!(left.keys().collect::<Vec<_>>(), [&RelationId(2)]);
        let mut older = failure(2, T, 0, "a.rs:1");
        older.version = "0.0.0".to_string();
        older.incarnation = 9;
        append(&journal, &older).expect("written");
        assert!(failing(dir.path()).expect("read").is_empty());
    }
}
