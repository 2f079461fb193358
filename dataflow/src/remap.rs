//! The remap log: which offsets and watermarks belong to which tick.
//!
//! # Protocol
//!
//! * A [`Binding`] is appended when its tick is minted and is durable (fsync) before anything of the
//!   tick is shown: a read, a commit, a checkpoint wait for [`RemapLog::durable`].
//! * Bindings are written by a thread of their own, many per fsync (group commit), while workers
//!   already compute.
//! * After a crash the bindings above the checkpoint are replayed: same offsets, same tick, same
//!   watermarks, so the same contents. A torn tail is the part nobody was shown, and is cut off.
//!
//! A record is `length u32, crc32 u32, JSON`. A segment is named after its incarnation and the first
//! tick it may hold; a checkpoint starts a new one and drops those that lie wholly below the oldest
//! checkpoint kept.
//!
//! # Incarnations
//!
//! A server that was stopped and wakes after another one has taken over goes on appending until it
//! notices. Each incarnation has segments of its own, and each of them begins with a [`Takeover`]: the
//! last tick that this incarnation found when it started. Nothing that an older incarnation wrote
//! above it counts: it was bound after the newer one had looked.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use tokio::sync::watch;

use crate::env;
use crate::error::{Error, ErrorKind, Result};
use crate::plan::RelationId;
use crate::time::{Tick, Watermark};

/// What one source contributed to a tick.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SourceBinding {
    /// Splits that moved: next offset, and the split's own watermark.
    pub splits: BTreeMap<String, (u64, Watermark)>,
    /// Splits met for the first time: where reading of them began.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub starts: BTreeMap<String, u64>,
    /// The source's watermark as of this tick.
    pub watermark: Watermark,
    /// Rows bound, and rejected records; verified on replay.
    pub rows: u64,
    pub rejected: u64,
    /// A bounded source has ended.
    pub ended: bool,
}

/// A tick and what belongs to it.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Binding {
    pub tick: Tick,
    pub incarnation: u64,
    /// Sources that moved in this tick.
    pub sources: BTreeMap<RelationId, SourceBinding>,
}

/// The first record of a segment: an incarnation and the last tick it found of those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Takeover {
    pub incarnation: u64,
    pub found: Tick,
}

/// What a segment holds.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
enum Record {
    Takeover(Takeover),
    Binding(Binding),
}

enum Write_ {
    Append(Tick, Vec<u8>),
    Roll(Tick),
    DropBelow(Tick),
}

/// Handle of the log; the file is owned by its thread.
#[derive(Debug)]
pub struct RemapLog {
    sender: Sender<Write_>,
    durable: watch::Receiver<Tick>,
    unsynced: Arc<AtomicU64>,
    trouble: watch::Receiver<Option<String>>,
}

impl std::fmt::Debug for Write_ {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Append(tick, bytes) => write!(f, "Append({tick}, {} bytes)", bytes.len()),
            Self::Roll(tick) => write!(f, "Roll({tick})"),
            Self::DropBelow(tick) => write!(f, "DropBelow({tick})"),
        }
    }
}

fn segment_path(dir: &Path, incarnation: u64, first: Tick) -> PathBuf {
    dir.join(format!("{incarnation:010}-{first:020}.log"))
}

/// Segments by incarnation and first tick, ascending.
fn segments(dir: &Path) -> Result<Vec<((u64, Tick), PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|s| s.to_str());
        let stem = name.and_then(|s| s.strip_suffix(".log"));
        let parts = stem.and_then(|s| s.split_once('-'));
        if let Some((incarnation, first)) = parts
            && let (Ok(incarnation), Ok(first)) = (incarnation.parse(), first.parse())
        {
            found.push(((incarnation, first), path));
        }
    }
    found.sort();
    Ok(found)
}

/// Reads all bindings above `after`, in order. A torn record ends its segment; what follows it was
/// never acknowledged. Damage that a checksum covers is `Corrupt`.
pub fn read(dir: &Path, after: Tick) -> Result<Vec<Binding>> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let mut logs = BTreeMap::<u64, Log>::new();
    for ((incarnation, _), path) in segments(dir)? {
        let log = logs.entry(incarnation).or_default();
        for record in records(&path)? {
            match record {
                Record::Takeover(takeover) => log.found = Some(takeover.found),
                Record::Binding(binding) => log.bindings.push(binding),
            }
        }
    }
    // From the newest incarnation down: each says up to where those before it count.
    let mut valid = BTreeMap::new();
    let mut upto = Tick::MAX;
    for log in logs.into_values().rev() {
        for binding in log.bindings {
            // A later incarnation writes what it replays again: the same binding.
            if binding.tick > after && binding.tick <= upto {
                valid.entry(binding.tick).or_insert(binding);
            }
        }
        upto = upto.min(log.found.unwrap_or(Tick::MAX));
    }
    Ok(valid.into_values().collect())
}

/// What one incarnation wrote.
#[derive(Default)]
struct Log {
    /// Absent when it died before its first record: then it has shown nothing.
    found: Option<Tick>,
    bindings: Vec<Binding>,
}

fn records(path: &Path) -> Result<Vec<Record>> {
    let mut bytes = Vec::new();
    File::open(path)?.read_to_end(&mut bytes)?;
    let mut rest = &bytes[..];
    let mut records = Vec::new();
    let damaged = |why: String| {
        Error::new(ErrorKind::Corrupt, "the remap log is damaged")
            .detail(format!("{}: {why}", path.display()))
            .hint("restore the data directory from a copy")
    };
    while !rest.is_empty() {
        let Some((body, length)) = intact(rest) else {
            // Torn at the end by a crash: nobody was shown it. Not if whole records follow.
            let at = bytes.len() - rest.len();
            if (1..rest.len()).any(|skip| intact(&rest[skip..]).is_some()) {
                return Err(damaged(format!("at byte {at}, and records follow")));
            }
            break;
        };
        let record = serde_json::from_slice(body).map_err(|e| damaged(e.to_string()))?;
        records.push(record);
        rest = &rest[length..];
    }
    Ok(records)
}

/// The body of the record at the front and the length of the record, if it is whole.
fn intact(bytes: &[u8]) -> Option<(&[u8], usize)> {
    let length = u32::from_le_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let crc = u32::from_le_bytes(bytes.get(4..8)?.try_into().ok()?);
    let body = bytes.get(8..length.checked_add(8)?)?;
    // No record is empty; zeros must not pass for one.
    (!body.is_empty() && crc32fast::hash(body) == crc).then_some((body, length + 8))
}

fn encode(record: &Record) -> Vec<u8> {
    let body = serde_json::to_vec(record).expect("a record is plain data");
    let mut bytes = Vec::with_capacity(body.len() + 8);
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&crc32fast::hash(&body).to_le_bytes());
    bytes.extend_from_slice(&body);
    bytes
}

/// Forgets every binding: used when there is no checkpoint they could follow.
pub fn clear(dir: &Path) -> Result<()> {
    if dir.exists() {
        for (_, path) in segments(dir)? {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

impl RemapLog {
    /// Opens the log for appending after `last`. Bindings above `last` that a crash left behind must
    /// have been read (and are written again) by the caller; `takeover` says up to where.
    pub fn open(dir: &Path, last: Tick, takeover: Takeover) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let (sender, receiver) = channel();
        let (durable_sender, durable) = watch::channel(last);
        let (trouble_sender, trouble) = watch::channel(None);
        let unsynced = Arc::new(AtomicU64::new(0));
        let mut file = Segment::create(dir, takeover, last + 1)?;
        let dir = dir.to_path_buf();
        let count = Arc::clone(&unsynced);
        std::thread::Builder::new()
            .name("remap".into())
            .spawn(move || {
                run(
                    &dir,
                    &mut file,
                    &receiver,
                    &durable_sender,
                    &trouble_sender,
                    &count,
                )
            })
            .map_err(|e| Error::unavailable(e.to_string()))?;
        Ok(Self {
            sender,
            durable,
            unsynced,
            trouble,
        })
    }

    /// Queues a binding; it is durable once [`RemapLog::durable`] reaches its tick.
    pub fn append(&self, binding: &Binding) {
        let record = encode(&Record::Binding(binding.clone()));
        self.unsynced
            .fetch_add(record.len() as u64, Ordering::Relaxed);
        let _ = self.sender.send(Write_::Append(binding.tick, record));
    }

    /// Bytes appended and not yet durable.
    pub fn unsynced(&self) -> u64 {
        self.unsynced.load(Ordering::Relaxed)
    }

    /// The highest durable tick, to wait on.
    pub fn durable(&self) -> watch::Receiver<Tick> {
        self.durable.clone()
    }

    /// Why the log cannot be written at the moment, if so.
    pub fn trouble(&self) -> watch::Receiver<Option<String>> {
        self.trouble.clone()
    }

    /// Starts a new segment for ticks from `first` and forgets segments wholly below `oldest`.
    pub fn roll(&self, first: Tick, oldest: Tick) {
        let _ = self.sender.send(Write_::Roll(first));
        let _ = self.sender.send(Write_::DropBelow(oldest));
    }
}

#[derive(Debug)]
struct Segment {
    path: PathBuf,
    takeover: Takeover,
    file: File,
    /// Length of the part that was written whole; a failed write is cut back to it.
    good: u64,
}

impl Segment {
    fn create(dir: &Path, takeover: Takeover, first: Tick) -> Result<Self> {
        let path = segment_path(dir, takeover.incarnation, first);
        let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
        if file.metadata()?.len() == 0 {
            // Before anything of this incarnation is shown: what older ones add does not count.
            file.write_all(&encode(&Record::Takeover(takeover)))?;
            file.sync_all()?;
        }
        File::open(dir)?.sync_all()?;
        let good = file.metadata()?.len();
        Ok(Self {
            path,
            takeover,
            file,
            good,
        })
    }
    fn append(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        if let Err(e) = self
            .file
            .write_all(bytes)
            .and_then(|()| self.file.sync_data())
        {
            let _ = self.file.set_len(self.good);
            return Err(e);
        }
        self.good += bytes.len() as u64;
        Ok(())
    }
}

fn run(
    dir: &Path,
    segment: &mut Segment,
    receiver: &Receiver<Write_>,
    durable: &watch::Sender<Tick>,
    trouble: &watch::Sender<Option<String>>,
    unsynced: &AtomicU64,
) {
    let mut bytes = Vec::new();
    while let Ok(first) = receiver.recv() {
        let mut last = None;
        let mut after = Vec::new();
        for write in std::iter::once(first).chain(receiver.try_iter()) {
            match write {
                Write_::Append(tick, record) if after.is_empty() => {
                    bytes.extend_from_slice(&record);
                    last = Some(tick);
                }
                other => after.push(other),
            }
        }
        // Writes that came behind a roll in the same round are handled one by one, in order.
        let rounds = std::iter::once(None).chain(after.into_iter().map(Some));
        for round in rounds {
            match round {
                None => {}
                Some(Write_::Append(tick, record)) => {
                    bytes.extend_from_slice(&record);
                    last = Some(tick);
                }
                Some(Write_::Roll(first)) => match Segment::create(dir, segment.takeover, first) {
                    Ok(new) => *segment = new,
                    Err(e) => {
                        tracing::warn!(error = %e, "the remap log goes on in its old segment")
                    }
                },
                Some(Write_::DropBelow(oldest)) => drop_below(dir, segment, oldest),
            }
            if bytes.is_empty() {
                continue;
            }
            env::failpoint("reclock.bind.before_write");
            // A full disk stops what is shown, not the process: try again until there is room.
            while let Err(e) = segment.append(&bytes) {
                trouble.send_replace(Some(e.to_string()));
                tracing::error!(error = %e, path = %segment.path.display(), "the remap log cannot be written");
                std::thread::sleep(std::time::Duration::from_secs(1));
            }
            env::failpoint("reclock.bind.after_write");
            if trouble.borrow().is_some() {
                trouble.send_replace(None);
            }
            unsynced.fetch_sub(bytes.len() as u64, Ordering::Relaxed);
            bytes.clear();
            if let Some(tick) = last.take() {
                durable.send_replace(tick);
            }
        }
    }
}

/// A segment may go when the next one of its incarnation starts at or below `oldest + 1`; those of
/// older incarnations when all that counts of them lies below.
fn drop_below(dir: &Path, current: &Segment, oldest: Tick) {
    let Ok(found) = segments(dir) else { return };
    let Takeover {
        incarnation,
        found: last,
    } = current.takeover;
    for (i, ((owner, _), path)) in found.iter().enumerate() {
        let next = found.get(i + 1).filter(|next| next.0.0 == *owner);
        let below = match next {
            Some(((_, first), _)) => *first <= oldest + 1,
            None => *owner < incarnation && last <= oldest,
        };
        // A newer incarnation's segments are not ours to judge.
        if below && *owner <= incarnation && *path != current.path {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        }
    }

    const FIRST: Takeover = Takeover {
        incarnation: 1,
        found: 0,
    };

    /// A server that wakes after another one has taken over adds nothing that counts.
    #[test]
    fn what_a_fenced_incarnation_adds_does_not_count() {
        let dir = tempfile::tempdir().expect("dir");
        let zombie = RemapLog::open(dir.path(), 0, FIRST).expect("open");
        for tick in 1..=3 {
            zombie.append(&binding(tick));
        }
        wait_durable(&zombie, 3);
        let found = read(dir.path(), 1).expect("read");
        assert_eq!(found, [binding(2), binding(3)]);
        let second = Takeover {
            incarnation: 2,
            found: 3,
        };
        let log = RemapLog::open(dir.path(), 1, second).expect("open");
        log.append(&binding(2));
        zombie.append(&binding(4));
        wait_durable(&zombie, 4);
        wait_durable(&log, 2);
        // The second one died while it replayed: what it had found still counts, the rest does not.
        assert_eq!(read(dir.path(), 1).expect("read"), [binding(2), binding(3)]);
        log.append(&binding(3));
        log.append(&binding(5));
        wait_durable(&log, 5);
        let all = read(dir.path(), 1).expect("read");
        assert_eq!(all, [binding(2), binding(3), binding(5)]);
        log.roll(6, 5);
        log.append(&binding(6));
        wait_durable(&log, 6);
        assert_eq!(read(dir.path(), 5).expect("read"), [binding(6)]);
        let owners: Vec<u64> = segments(dir.path())
            .expect("list")
            .iter()
            .map(|s| s.0.0)
            .collect();
        assert_eq!(owners, [2]);
    }

    fn wait_durable(log: &RemapLog, tick: Tick) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .expect("runtime");
        runtime.block_on(async {
            log.durable()
                .wait_for(|t| *t >= tick)
                .await
                .expect("the thread lives");
        });
    }

    #[test]
    fn what_is_durable_is_read_back_in_order() {
        let dir = tempfile::tempdir().expect("dir");
        let log = RemapLog::open(dir.path(), 0, FIRST).expect("open");
        for tick in 1..=5 {
            log.append(&binding(tick));
        }
        wait_durable(&log, 5);
        log.roll(6, 3);
        log.append(&binding(6));
        wait_durable(&log, 6);
        assert_eq!(
            read(dir.path(), 2).expect("read"),
            (3..=6).map(binding).collect::<Vec<_>>()
        );
    }

    #[test]
    fn a_torn_tail_is_cut() {
        let dir = tempfile::tempdir().expect("dir");
        let log = RemapLog::open(dir.path(), 0, FIRST).expect("open");
        log.append(&binding(1));
        log.append(&binding(2));
        wait_durable(&log, 2);
        let path = segment_path(dir.path(), 1, 1);
        let bytes = fs::read(&path).expect("read");
        fs::write(&path, &bytes[..bytes.len() - 3]).expect("write");
        assert_eq!(read(dir.path(), 0).expect("read"), vec![binding(1)]);
    }

    #[test]
    fn damage_before_whole_records_is_noticed() {
        let dir = tempfile::tempdir().expect("dir");
        let log = RemapLog::open(dir.path(), 0, FIRST).expect("open");
        for tick in 1..=3 {
            log.append(&binding(tick));
        }
        wait_durable(&log, 3);
        let path = segment_path(dir.path(), 1, 1);
        let mut bytes = fs::read(&path).expect("read");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        fs::write(&path, &bytes).expect("write");
        let error = read(dir.path(), 0).expect_err("damaged");
        assert_eq!(error.kind, ErrorKind::Corrupt);
    }

    #[test]
    fn old_segments_go() {
        let dir = tempfile::tempdir().expect("dir");
        let log = RemapLog::open(dir.path(), 0, FIRST).expect("open");
        log.append(&binding(1));
        log.roll(2, 0);
        log.append(&binding(2));
        log.roll(3, 2);
        log.append(&binding(3));
        wait_durable(&log, 3);
        let firsts: Vec<Tick> = segments(dir.path())
            .expect("list")
            .into_iter()
            .map(|s| s.0.1)
            .collect();
        assert_eq!(firsts, vec![3]);
    }
}
