//! The log on real files.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::files::{RemapLog, read, segment_path, segments};
use super::log::SegmentId;
use super::record::{Record, VERSION, encode};
use super::{Binding, SourceBinding, Takeover};
use crate::error::{ErrorKind, Result};
use crate::plan::RelationId;
use crate::time::Tick;

fn binding(tick: Tick) -> Binding {
    let mut sources = BTreeMap::new();
    let splits = BTreeMap::from([("0".to_string(), (tick * 10, tick as i64))]);
    sources.insert(
        RelationId(7),
        SourceBinding {
            splits,
            rows: 10,
            ..SourceBinding::default()
        },
    );
    Binding {
        tick,
        incarnation: 1,
        sources,
        held: BTreeMap::new(),
    }
}

fn open(dir: &Path, base: Tick, incarnation: u64) -> RemapLog {
    RemapLog::take_over(dir, Some(base), incarnation)
        .expect("open")
        .0
}

fn read_all(dir: &Path, after: Tick) -> Result<Vec<Binding>> {
    read(dir, u64::MAX, after)
}

fn only_segment(dir: &Path) -> std::path::PathBuf {
    segment_path(
        dir,
        SegmentId {
            incarnation: 1,
            first: 1,
        },
    )
}

/// A server that wakes after another one has taken over adds nothing that counts, and says so.
#[test]
fn what_a_fenced_incarnation_adds_does_not_count() {
    let dir = tempfile::tempdir().expect("dir");
    let zombie = open(dir.path(), 0, 1);
    for tick in 1..=3 {
        zombie.append(&binding(tick));
    }
    wait_durable(&zombie, 3);
    let (log, found) = RemapLog::take_over(dir.path(), Some(1), 2).expect("open");
    assert_eq!(found, [binding(2), binding(3)]);
    log.append(&binding(2));
    zombie.append(&binding(4));
    wait_durable(&log, 2);
    let trouble = wait_for(zombie.trouble(), Option::is_some);
    assert!(trouble.is_some_and(|why| why.contains("incarnation 2")));
    assert_eq!(*zombie.durable().borrow(), 3, "it tells nobody of tick 4");
    // The second one died while it replayed: what it had found still counts, the rest does not.
    let all = read_all(dir.path(), 1).expect("read");
    assert_eq!(all, [binding(2), binding(3)]);
    log.append(&binding(3));
    log.append(&binding(5));
    wait_durable(&log, 5);
    let all = read_all(dir.path(), 1).expect("read");
    assert_eq!(all, [binding(2), binding(3), binding(5)]);
    log.roll(6, 5);
    log.append(&binding(6));
    wait_durable(&log, 6);
    assert_eq!(read_all(dir.path(), 5).expect("read"), [binding(6)]);
    let owners = segments(dir.path()).expect("list").into_iter();
    assert_eq!(owners.map(|s| s.incarnation).collect::<Vec<_>>(), [2]);
    // Whoever comes late does not begin at all.
    let late = RemapLog::take_over(dir.path(), Some(1), 1).expect_err("fenced");
    assert_eq!(late.kind, ErrorKind::Conflict);
}

fn wait_for<T: Clone>(
    mut seen: tokio::sync::watch::Receiver<T>,
    until: impl FnMut(&T) -> bool,
) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("runtime");
    let value = runtime.block_on(seen.wait_for(until));
    value.expect("the thread lives").clone()
}

fn wait_durable(log: &RemapLog, tick: Tick) {
    wait_for(log.durable(), |t| *t >= tick);
}

#[test]
fn what_is_durable_is_read_back_in_order() {
    let dir = tempfile::tempdir().expect("dir");
    let log = open(dir.path(), 0, 1);
    for tick in 1..=5 {
        log.append(&binding(tick));
    }
    wait_durable(&log, 5);
    log.roll(6, 3);
    log.append(&binding(6));
    wait_durable(&log, 6);
    assert_eq!(log.unsynced(), 0);
    assert_eq!(
        read_all(dir.path(), 2).expect("read"),
        (3..=6).map(binding).collect::<Vec<_>>()
    );
}

/// The records of a segment with a round per binding, each marked as synced but the last.
fn rounds(ticks: std::ops::RangeInclusive<Tick>) -> (Vec<u8>, Vec<usize>) {
    let takeover = Takeover {
        incarnation: 1,
        found: 0,
        version: VERSION,
    };
    let mut bytes = encode(&Record::Takeover(takeover));
    let mut ends = vec![bytes.len()];
    for tick in ticks.clone() {
        bytes.extend(encode(&Record::Binding(binding(tick))));
        ends.push(bytes.len());
        if tick < *ticks.end() {
            bytes.extend(encode(&Record::Synced(bytes.len() as u64)));
        }
    }
    (bytes, ends)
}

#[test]
fn a_torn_tail_is_cut() {
    let dir = tempfile::tempdir().expect("dir");
    let (bytes, ends) = rounds(1..=3);
    let path = only_segment(dir.path());
    for cut in ends[2]..bytes.len() {
        fs::write(&path, &bytes[..cut]).expect("write");
        let all = read_all(dir.path(), 0).expect("read");
        assert_eq!(all, [binding(1), binding(2)], "cut at {cut}");
    }
    // A disk that lost power has written the blocks of the last round in any order.
    let whole_behind = encode(&Record::Binding(binding(4)));
    for hole in ends[2] + 50..bytes.len() {
        let mut torn = bytes.clone();
        torn[hole..].fill(0);
        torn.extend(&whole_behind);
        fs::write(&path, torn).expect("write");
        let all = read_all(dir.path(), 0).expect("read");
        assert_eq!(all, [binding(1), binding(2)], "hole at {hole}");
    }
}

#[test]
fn damage_of_what_was_told_is_noticed() {
    let dir = tempfile::tempdir().expect("dir");
    let (bytes, ends) = rounds(1..=3);
    let path = only_segment(dir.path());
    for at in 0..ends[2] {
        let mut flipped = bytes.clone();
        flipped[at] ^= 4;
        fs::write(&path, flipped).expect("write");
        // What a mark itself says is needed by nobody as long as a later one says the same.
        match read_all(dir.path(), 0) {
            Err(error) => assert_eq!(error.kind, ErrorKind::Corrupt, "byte {at}"),
            Ok(_) => panic!("byte {at} was flipped and nobody noticed"),
        }
    }
}

#[test]
fn a_newer_format_is_refused() {
    let dir = tempfile::tempdir().expect("dir");
    let takeover = Takeover {
        incarnation: 1,
        found: 0,
        version: VERSION + 1,
    };
    let path = only_segment(dir.path());
    fs::write(&path, encode(&Record::Takeover(takeover))).expect("write");
    let error = read_all(dir.path(), 0).expect_err("refused");
    assert_eq!(error.kind, ErrorKind::Unsupported);
    assert!(error.message.contains("newer version"), "{error}");
}

#[test]
fn old_segments_go() {
    let dir = tempfile::tempdir().expect("dir");
    let log = open(dir.path(), 0, 1);
    log.append(&binding(1));
    log.roll(2, 0);
    log.append(&binding(2));
    log.roll(3, 2);
    log.append(&binding(3));
    wait_durable(&log, 3);
    let found = segments(dir.path()).expect("list").into_iter();
    assert_eq!(found.map(|s| s.first).collect::<Vec<_>>(), [3]);
}

/// A segment that could not be created may be there all the same. It says nothing about where the one
/// before it ends.
#[test]
fn a_segment_whose_creation_was_refused_takes_nothing_along() {
    use super::log::{Effect, Event, Log, Rules};
    let at = |first| SegmentId {
        incarnation: 1,
        first,
    };
    let (mut log, _) = Log::begin(1, 0, Rules::ALL);
    // The answers up to the first that is not `Done`.
    let mut step = |event| {
        let mut effects = log.step(event);
        loop {
            let next = effects.iter().find_map(|effect| match effect {
                Effect::Create(s) if s.first == 5 => None,
                Effect::Create(_) | Effect::Write { .. } | Effect::Sync(_) => Some(Event::Done),
                Effect::Read => Some(Event::Found(0)),
                _ => None,
            });
            match next {
                Some(next) => effects = log.step(next),
                None => return effects,
            }
        }
    };
    step(Event::Done);
    step(Event::Listed(vec![at(1)]));
    let roll = |first, oldest| Event::Roll { first, oldest };
    assert_eq!(step(roll(5, 0)), [Effect::Create(at(5))]);
    let refused = Event::Failed("no space left on device".to_string());
    assert_eq!(step(refused.clone()), [Effect::Remove(at(5))]);
    step(refused);
    // The removal was refused as well. The segment from 1 on holds what is bound up to 8.
    assert_eq!(step(roll(9, 6)), [Effect::List]);
    let listed = Event::Listed(vec![at(1), at(5), at(9)]);
    assert_eq!(step(listed), [Effect::Remove(at(5))]);
    step(Event::Done);
    assert_eq!(step(roll(12, 9)), [Effect::List]);
    let listed = Event::Listed(vec![at(1), at(9), at(12)]);
    assert_eq!(step(listed), [Effect::Remove(at(1))]);
}

/// An owner that was shut out may still forget segments that a checkpoint covers while its successor
/// reads them.
#[test]
fn a_segment_may_go_while_it_is_read() {
    let dir = tempfile::tempdir().expect("dir");
    let log = open(dir.path(), 0, 1);
    log.append(&binding(1));
    wait_durable(&log, 1);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut first = 1_000;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                first += 1;
                let incarnation = 1;
                let path = segment_path(dir.path(), SegmentId { incarnation, first });
                fs::write(&path, []).expect("write");
                fs::remove_file(&path).expect("removes");
            }
        });
        let outcomes: Vec<_> = (0..500).map(|_| read_all(dir.path(), 0)).collect();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        for outcome in outcomes {
            assert_eq!(outcome.expect("reads"), [binding(1)]);
        }
    });
}
