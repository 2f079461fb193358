//! Performs the remap log on files: one thread, many bindings per fsync.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use tokio::sync::watch;

use super::Binding;
use super::log::{Effect, Event, Log, Rules, SegmentId, replay};
use super::record::{Damage, Record, encode};
use crate::env;
use crate::error::{Error, ErrorKind, Result};
use crate::time::Tick;

/// How long a log that cannot be written waits before it is tried again.
const PAUSE: Duration = Duration::from_secs(1);

/// Handle of the log; the files are owned by its thread.
#[derive(Debug)]
pub struct RemapLog {
    sender: Sender<Event>,
    durable: watch::Receiver<Tick>,
    unsynced: Arc<AtomicU64>,
    trouble: watch::Receiver<Option<String>>,
}

pub(super) fn segment_path(dir: &Path, segment: SegmentId) -> PathBuf {
    let SegmentId { incarnation, first } = segment;
    dir.join(format!("{incarnation:010}-{first:020}.log"))
}

/// Segments by incarnation and first tick, ascending.
pub(super) fn segments(dir: &Path) -> io::Result<Vec<SegmentId>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let stem = name.to_str().and_then(|s| s.strip_suffix(".log"));
        let parts = stem.and_then(|s| s.split_once('-'));
        if let Some((incarnation, first)) = parts
            && let (Ok(incarnation), Ok(first)) = (incarnation.parse(), first.parse())
        {
            found.push(SegmentId { incarnation, first });
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Removes a segment; one that is gone was removed by an older owner that does not know its end yet.
fn remove(dir: &Path, segment: SegmentId) -> io::Result<()> {
    match fs::remove_file(segment_path(dir, segment)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The segments of incarnations below `before` with their bytes. One that goes between the listing
/// and its reading was forgotten by an older owner that still runs, for a checkpoint covers it: the
/// listing is taken again. It ends, for that owner is shut out and begins no further segment.
fn contents(dir: &Path, before: u64) -> io::Result<Vec<(SegmentId, Vec<u8>)>> {
    'listing: loop {
        let mut found = Vec::new();
        for segment in segments(dir)? {
            if segment.incarnation < before {
                match fs::read(segment_path(dir, segment)) {
                    Ok(bytes) => found.push((segment, bytes)),
                    Err(e) if e.kind() == io::ErrorKind::NotFound => continue 'listing,
                    Err(e) => return Err(e),
                }
            }
        }
        return Ok(found);
    }
}

/// All bindings above `after` that count, in order, of incarnations below `before`.
pub(super) fn read(dir: &Path, before: u64, after: Tick) -> Result<Vec<Binding>> {
    let found = contents(dir, before)?;
    replay(found, after, Rules::ALL).map_err(|(segment, damage)| {
        let path = segment_path(dir, segment);
        match damage {
            Damage::At { why, .. } => Error::new(ErrorKind::Corrupt, "the remap log is damaged")
                .detail(format!("{}: {why}", path.display()))
                .hint("restore the data directory from a copy"),
            Damage::Newer { version } => Error::unsupported(format!(
                "the remap log was written by a newer version (format {version})"
            ))
            .detail(path.display().to_string())
            .hint("start the version that wrote it, or a later one"),
        }
    })
}

impl RemapLog {
    /// Shuts out older incarnations and reads what counts of their bindings above `base`, the tick of
    /// the checkpoint that is restored; without one, there is nothing they could follow, and they are
    /// forgotten. The caller appends again what it replays.
    pub fn take_over(
        dir: &Path,
        base: Option<Tick>,
        incarnation: u64,
    ) -> Result<(Self, Vec<Binding>)> {
        env::create_directory(dir)?;
        if segments(dir)?.iter().any(|s| s.incarnation == incarnation) {
            return Err(Error::internal(format!(
                "incarnation {incarnation} has a remap log already"
            )));
        }
        let tick = base.unwrap_or(0);
        let (log, effects) = Log::begin(incarnation, tick, Rules::ALL);
        let (durable_sender, durable) = watch::channel(tick);
        let (trouble_sender, trouble) = watch::channel(None);
        let unsynced = Arc::new(AtomicU64::new(0));
        let mut disk = Disk {
            dir: dir.to_path_buf(),
            file: None,
        };
        let mut thread = Thread {
            log,
            effects: effects.into(),
            durable: durable_sender,
            trouble: trouble_sender,
            unsynced: Arc::clone(&unsynced),
            queued: Default::default(),
        };
        let mut bindings = Vec::new();
        while let Some(effect) = thread.effects.pop_front() {
            let event = match effect {
                Effect::Ready => {
                    if env::failpoint("recover.after_fence") {
                        return Err(Error::unavailable("failpoint recover.after_fence"));
                    }
                    break;
                }
                Effect::Read => {
                    if base.is_none() {
                        clear(dir, incarnation)?;
                    }
                    bindings = read(dir, incarnation, tick)?;
                    Event::Found(bindings.last().map_or(tick, |b| b.tick))
                }
                Effect::Fenced { by } => return Err(fenced(by)),
                other => match disk.perform(&other)? {
                    Some(event) => event,
                    None => continue,
                },
            };
            thread.effects.extend(thread.log.step(event));
        }
        let (sender, receiver) = channel();
        std::thread::Builder::new()
            .name("remap".into())
            .spawn(move || thread.run(&mut disk, &receiver))
            .map_err(|e| Error::unavailable(e.to_string()))?;
        let log = Self {
            sender,
            durable,
            unsynced,
            trouble,
        };
        Ok((log, bindings))
    }

    /// Queues a binding; it is durable once [`RemapLog::durable`] reaches its tick.
    pub fn append(&self, binding: &Binding) {
        let record = encode(&Record::Binding(binding.clone()));
        self.unsynced
            .fetch_add(record.len() as u64, Ordering::Relaxed);
        let tick = binding.tick;
        let _ = self.sender.send(Event::Append { tick, record });
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
        let _ = self.sender.send(Event::Roll { first, oldest });
    }
}

fn fenced(by: u64) -> Error {
    Error::new(
        ErrorKind::Conflict,
        format!("incarnation {by} has taken over this data directory"),
    )
    .code("40001")
}

/// Forgets every binding of older incarnations.
fn clear(dir: &Path, incarnation: u64) -> Result<()> {
    for segment in segments(dir)? {
        if segment.incarnation < incarnation {
            remove(dir, segment)?;
        }
    }
    Ok(())
}

struct Thread {
    log: Log,
    effects: std::collections::VecDeque<Effect>,
    durable: watch::Sender<Tick>,
    trouble: watch::Sender<Option<String>>,
    unsynced: Arc<AtomicU64>,
    /// Ticks that wait, and their bytes.
    queued: std::collections::VecDeque<(Tick, u64)>,
}

impl Thread {
    fn run(mut self, disk: &mut Disk, receiver: &Receiver<Event>) {
        while let Ok(first) = receiver.recv() {
            for event in std::iter::once(first).chain(receiver.try_iter()) {
                self.take(event);
            }
            while let Some(effect) = self.effects.pop_front() {
                if matches!(effect, Effect::Fenced { .. }) {
                    // Whoever waits for a tick to be durable waits no longer.
                    self.perform(disk, &effect);
                    return;
                }
                if let Some(event) = self.perform(disk, &effect) {
                    self.effects.extend(self.log.step(event));
                }
                // What came while the disk was busy joins the next round.
                for event in receiver.try_iter() {
                    self.take(event);
                }
            }
        }
    }

    fn take(&mut self, event: Event) {
        if let Event::Append { tick, record } = &event {
            self.queued.push_back((*tick, record.len() as u64));
        }
        self.effects.extend(self.log.step(event));
    }

    fn perform(&mut self, disk: &mut Disk, effect: &Effect) -> Option<Event> {
        match effect {
            Effect::Durable(tick) => {
                env::failpoint("reclock.bind.after_write");
                while let Some((queued, bytes)) = self.queued.front().copied()
                    && queued <= *tick
                {
                    self.queued.pop_front();
                    self.unsynced.fetch_sub(bytes, Ordering::Relaxed);
                }
                self.durable.send_replace(*tick);
                None
            }
            Effect::Trouble(why) => {
                if let Some(why) = why {
                    let path = segment_path(&disk.dir, self.log.segment());
                    tracing::error!(error = %why, path = %path.display(), "the remap log cannot be written");
                }
                self.trouble.send_replace(why.clone());
                None
            }
            Effect::Fenced { by } => {
                let e = fenced(*by);
                tracing::error!(error = %e, "the remap log ends");
                self.trouble.send_replace(Some(e.message));
                None
            }
            // A full disk stops what is shown, not the process: try again until there is room.
            Effect::Sleep => {
                std::thread::sleep(PAUSE);
                Some(Event::Timer)
            }
            other => {
                if matches!(other, Effect::Write { .. }) {
                    env::failpoint("reclock.bind.before_write");
                }
                disk.perform(other)
                    .unwrap_or_else(|e| Some(Event::Failed(e.to_string())))
            }
        }
    }
}

/// The files; the one that is written stays open.
struct Disk {
    dir: PathBuf,
    file: Option<(SegmentId, File)>,
}

impl Disk {
    fn perform(&mut self, effect: &Effect) -> io::Result<Option<Event>> {
        match effect {
            Effect::Create(segment) => {
                // Nothing of it was told yet, should half of it be there.
                File::create(segment_path(&self.dir, *segment))?;
                File::open(&self.dir)?.sync_all()?;
            }
            Effect::Write { segment, bytes } => self.open(*segment)?.write_all(bytes)?,
            Effect::Sync(segment) => self.open(*segment)?.sync_data()?,
            Effect::CutBack { segment, length } => self.open(*segment)?.set_len(*length)?,
            Effect::List => return Ok(Some(Event::Listed(segments(&self.dir)?))),
            Effect::Remove(segment) => remove(&self.dir, *segment)?,
            // Not for a disk.
            _ => return Ok(None),
        }
        Ok(Some(Event::Done))
    }

    fn open(&mut self, segment: SegmentId) -> io::Result<&mut File> {
        if self.file.as_ref().is_none_or(|(open, _)| *open != segment) {
            let path = segment_path(&self.dir, segment);
            let file = OpenOptions::new().append(true).open(path)?;
            self.file = Some((segment, file));
        }
        match &mut self.file {
            Some((_, file)) => Ok(file),
            None => unreachable!("it was opened above"),
        }
    }
}
