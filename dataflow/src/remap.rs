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
//! A record is `length u32, crc32 u32, JSON`. A segment is named after the first tick it may hold; a
//! checkpoint starts a new one and drops those that lie wholly below the oldest checkpoint kept.

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

fn segment_path(dir: &Path, first: Tick) -> PathBuf {
    dir.join(format!("{first:020}.log"))
}

fn segments(dir: &Path) -> Result<Vec<(Tick, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let first = path
            .file_stem()
            .and_then(|s| s.to_str())
            .and_then(|s| s.parse().ok());
        if let (Some(first), Some("log")) = (first, path.extension().and_then(|e| e.to_str())) {
            found.push((first, path));
        }
    }
    found.sort();
    Ok(found)
}

/// Reads all bindings above `after`, in order. A torn record ends the log; what follows it in the same
/// segment was never acknowledged. Damage before the end of the log is `Corrupt`.
pub fn read(dir: &Path, after: Tick) -> Result<Vec<Binding>> {
    let mut bindings: Vec<Binding> = Vec::new();
    if !dir.exists() {
        return Ok(bindings);
    }
    for (_, path) in segments(dir)? {
        let mut bytes = Vec::new();
        File::open(&path)?.read_to_end(&mut bytes)?;
        let mut rest = &bytes[..];
        while rest.len() >= 8 {
            let length = u32::from_le_bytes(rest[..4].try_into().expect("four bytes")) as usize;
            let crc = u32::from_le_bytes(rest[4..8].try_into().expect("four bytes"));
            let Some(body) = rest.get(8..8 + length) else {
                break;
            };
            if crc32fast::hash(body) != crc {
                break;
            }
            let binding: Binding = serde_json::from_slice(body).map_err(|e| {
                Error::new(
                    ErrorKind::Corrupt,
                    "a binding of the remap log cannot be read",
                )
                .detail(format!("{}: {e}", path.display()))
            })?;
            rest = &rest[8 + length..];
            // A later incarnation replays what it kept; a tick written twice is the same binding.
            if binding.tick > after && bindings.last().is_none_or(|b| b.tick < binding.tick) {
                bindings.push(binding);
            }
        }
    }
    Ok(bindings)
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
    /// have been read (and are written again) by the caller.
    pub fn open(dir: &Path, last: Tick) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let (sender, receiver) = channel();
        let (durable_sender, durable) = watch::channel(last);
        let (trouble_sender, trouble) = watch::channel(None);
        let unsynced = Arc::new(AtomicU64::new(0));
        let mut file = Segment::create(dir, last + 1)?;
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
        let body = serde_json::to_vec(binding).expect("a binding is plain data");
        let mut record = Vec::with_capacity(body.len() + 8);
        record.extend_from_slice(&(body.len() as u32).to_le_bytes());
        record.extend_from_slice(&crc32fast::hash(&body).to_le_bytes());
        record.extend_from_slice(&body);
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
    pub fn trouble(&self) -> Option<String> {
        self.trouble.borrow().clone()
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
    file: File,
    /// Length of the part that was written whole; a failed write is cut back to it.
    good: u64,
}

impl Segment {
    fn create(dir: &Path, first: Tick) -> Result<Self> {
        let path = segment_path(dir, first);
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        File::open(dir)?.sync_all()?;
        let good = file.metadata()?.len();
        Ok(Self { path, file, good })
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
                Some(Write_::Roll(first)) => match Segment::create(dir, first) {
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

/// A segment may go when the next one starts at or below `oldest + 1`.
fn drop_below(dir: &Path, current: &Segment, oldest: Tick) {
    let Ok(found) = segments(dir) else { return };
    for pair in found.windows(2) {
        if pair[1].0 <= oldest + 1 && pair[0].1 != current.path {
            let _ = fs::remove_file(&pair[0].1);
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
        let log = RemapLog::open(dir.path(), 0).expect("open");
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
        let log = RemapLog::open(dir.path(), 0).expect("open");
        log.append(&binding(1));
        log.append(&binding(2));
        wait_durable(&log, 2);
        let path = segment_path(dir.path(), 1);
        let bytes = fs::read(&path).expect("read");
        fs::write(&path, &bytes[..bytes.len() - 3]).expect("write");
        assert_eq!(read(dir.path(), 0).expect("read"), vec![binding(1)]);
    }

    #[test]
    fn old_segments_go() {
        let dir = tempfile::tempdir().expect("dir");
        let log = RemapLog::open(dir.path(), 0).expect("open");
        log.append(&binding(1));
        log.roll(2, 0);
        log.append(&binding(2));
        log.roll(3, 2);
        log.append(&binding(3));
        wait_durable(&log, 3);
        let firsts: Vec<Tick> = segments(dir.path())
            .expect("list")
            .into_iter()
            .map(|s| s.0)
            .collect();
        assert_eq!(firsts, vec![3]);
    }
}
