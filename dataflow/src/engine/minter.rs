//! The minter: the clock of a data plane. Closes ticks, binds offsets to them, and keeps what is in
//! flight bounded.
//!
//! # Contract
//!
//! * Ticks are strictly increasing milliseconds. One is minted when there are rows, a source ended, or
//!   somebody asked for one (a read, a checkpoint, a sink's epoch); none when nothing happens.
//! * Under load a tick is not minted while [`TICKS_IN_FLIGHT`] earlier ones are incomplete or
//!   the row bound is reached: ticks grow instead, and readers block when their queues are full.
//! * The binding of a tick is appended to the remap log before the tick reaches a worker.

mod holds;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use arrow::compute::concat_batches;
use tokio::sync::oneshot;

use super::shared::{Shared, SourceStatus};
use super::{SourceItem, Waiting};
use crate::checkpoint::collector::{Begin, Finished};
use crate::checkpoint::manifest::SourceState;
use crate::checkpoint::{Message, PartSender};
use crate::delta::{Delta, Diffs};
use crate::env;
use crate::error::{Error, ErrorKind, Result};
use crate::ingest::{Ingest, Prepared, Preparer, Signal, lock, read_to_limit};
use crate::plan::RelationId;
use crate::remap::log::{Rules, repeats};
use crate::remap::{Binding, RemapLog, SourceBinding};
use crate::served::rejected_rows;
use crate::source::{Offsets, Reader};
use crate::tick::{Hold, Marks, ReadMark, TickInfo};
use crate::time::{END_OF_TIME, NO_WATERMARK, Tick, Watermark};
use crate::worker::command::{Attach, Command, Install, Progress, WorkerHandle};

/// Ticks that may be incomplete before the next one with rows is minted.
const TICKS_IN_FLIGHT: usize = 4;
/// Rows of one source in one tick.
const ROWS_PER_TICK: usize = 256 * 1024;
/// Bytes of files and commits waiting in sinks before reading pauses.
const SINK_BYTES: u64 = 256 << 20;
/// Bindings that may wait for the disk before minting pauses.
const UNSYNCED_BYTES: u64 = 64 << 20;
/// Rows that may pass while a dataflow reads history; then the others wait for it.
const HYDRATION_ROWS: u64 = 4 << 20;
/// Batches smaller than this are merged before they go to a worker.
const SMALL_ROWS: usize = 4096;

/// What the rest of the engine asks of the minter.
#[derive(Debug)]
pub enum Request {
    AddSource(Arc<SourceItem>, Option<SourceState>),
    /// To all workers, between two ticks.
    Broadcast(Vec<Command>),
    Attach(AttachRequest),
    Read(ReadMark),
    Epoch(RelationId),
    Checkpoint {
        id: u64,
        done: oneshot::Sender<Result<Finished>>,
    },
    /// At the next tick, which a checkpoint marks, `new` takes the place of `old`.
    Replace {
        old: RelationId,
        new: RelationId,
        checkpoint: u64,
        done: oneshot::Sender<Result<Finished>>,
    },
    Drop(Arc<[RelationId]>),
    /// From the next tick on the changes of this relation's inputs wait in front of it, or no longer;
    /// answers that tick.
    Hold {
        relation: RelationId,
        hold: bool,
        done: oneshot::Sender<Result<Tick>>,
    },
    /// Bindings up to this tick are not needed any more.
    RollRemap {
        oldest: Tick,
    },
    Stop,
}

/// Subscribe a dataflow at the next tick.
#[derive(Debug)]
pub struct AttachRequest {
    pub dataflow: RelationId,
    pub is_sink: bool,
    pub fingerprint: u64,
    pub restored: bool,
    pub progress: Arc<Progress>,
    /// Columns it needs of each source.
    pub wanted: BTreeMap<RelationId, BTreeSet<usize>>,
    pub answer: oneshot::Sender<Result<Attached>>,
}

/// Where a dataflow was attached.
#[derive(Debug)]
pub struct Attached {
    pub at: Tick,
    /// What its sources had bound before `at`; a source that had bound nothing is absent.
    pub offsets: BTreeMap<RelationId, Offsets>,
}

#[derive(Debug)]
struct SourceRun {
    item: Arc<SourceItem>,
    ingest: Option<Ingest>,
    state: SourceState,
    wanted: BTreeSet<usize>,
    /// A dataflow reads it, and be it without any column.
    read: bool,
    last_rows: BTreeMap<String, Instant>,
    turn: usize,
    status: Arc<SourceStatus>,
}

#[derive(Debug)]
struct Attachment {
    is_sink: bool,
    fingerprint: u64,
    progress: Arc<Progress>,
    /// It reads history until it has applied everything below.
    at: Tick,
    /// Rows minted before.
    rows: u64,
}

impl Attachment {
    fn is_level(&self) -> bool {
        self.progress.next() >= self.at
    }
}

/// See the module.
#[derive(Debug)]
pub struct Minter {
    pub workers: Vec<WorkerHandle>,
    pub remap: RemapLog,
    pub signal: Arc<Signal>,
    pub shared: Arc<Shared>,
    pub parts: PartSender,
    pub incarnation: u64,
    pub tick_min: Duration,
    pub max_rows: u64,
    /// The source whose absence holds up the start.
    pub waiting: Waiting,
    last: Tick,
    last_minted: Instant,
    sources: BTreeMap<RelationId, SourceRun>,
    attached: BTreeMap<RelationId, Attachment>,
    in_flight: VecDeque<(Tick, u64, Instant)>,
    rows_in_flight: u64,
    rows_minted: u64,
    marks: Marks,
    checkpoints: Vec<(u64, oneshot::Sender<Result<Finished>>)>,
    /// Relations that are held as of the last tick.
    held: Arc<BTreeMap<RelationId, Hold>>,
    /// Relations to hold from the next tick on, or to hold no longer, and who asked.
    holding: Vec<(RelationId, bool, Option<oneshot::Sender<Result<Tick>>>)>,
    /// Relations to hold because they fail at this tick.
    pub failing: BTreeMap<RelationId, Tick>,
}

/// Rows of one source for one tick, by worker, and what to bind.
struct Bound {
    binding: SourceBinding,
    rows: Vec<Vec<Delta>>,
    rejected: Option<Delta>,
}

impl Minter {
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        workers: Vec<WorkerHandle>,
        remap: RemapLog,
        signal: Arc<Signal>,
        shared: Arc<Shared>,
        parts: PartSender,
        incarnation: u64,
        tick_min: Duration,
        max_rows: u64,
        waiting: Waiting,
        last: Tick,
    ) -> Self {
        Self {
            workers,
            remap,
            signal,
            shared,
            parts,
            incarnation,
            tick_min,
            max_rows,
            waiting,
            last,
            last_minted: Instant::now(),
            sources: BTreeMap::new(),
            attached: BTreeMap::new(),
            in_flight: VecDeque::new(),
            rows_in_flight: 0,
            rows_minted: 0,
            marks: Marks::default(),
            checkpoints: Vec::new(),
            held: Arc::default(),
            holding: Vec::new(),
            failing: BTreeMap::new(),
        }
    }

    /// Runs until `Stop` or until the engine is gone.
    pub fn run(mut self, requests: &Receiver<Request>) {
        loop {
            loop {
                match requests.try_recv() {
                    Ok(Request::Stop) | Err(std::sync::mpsc::TryRecvError::Disconnected) => {
                        for worker in &self.workers {
                            worker.send(Command::Stop);
                        }
                        return;
                    }
                    Ok(request) => self.handle(request),
                    Err(std::sync::mpsc::TryRecvError::Empty) => break,
                }
            }
            self.settle();
            // What a source in trouble has delivered goes into a checkpoint at once: a restart then
            // has nothing to read again from it.
            if self
                .sources
                .values()
                .filter(|run| run.note_trouble())
                .count()
                > 0
            {
                self.shared.checkpoint_soon.notify_one();
            }
            let asked = self.asked();
            let rows = self.has_rows();
            if !asked && !rows {
                self.signal.wait(None);
                continue;
            }
            if !asked && self.is_full() {
                // Progress of a worker, a sync or a sink raises the signal or passes within this time.
                self.signal.wait(Some(Duration::from_millis(20)));
                continue;
            }
            let since = self.last_minted.elapsed();
            if since < self.tick_min {
                std::thread::sleep(self.tick_min - since);
            }
            let with_rows = !self.is_full();
            self.mint(with_rows);
        }
    }

    fn asked(&self) -> bool {
        !self.checkpoints.is_empty()
            || !self.marks.reads.is_empty()
            || !self.marks.epochs.is_empty()
            || !self.holding.is_empty()
    }

    fn has_rows(&self) -> bool {
        self.sources.values().any(|s| {
            s.ingest
                .as_ref()
                .is_some_and(|i| i.has_data() || (i.ended() && !s.state.ended))
        })
    }

    fn is_full(&self) -> bool {
        self.in_flight.len() >= TICKS_IN_FLIGHT
            || self.rows_in_flight >= self.max_rows
            || self.remap.unsynced() >= UNSYNCED_BYTES
            || self.shared.queued_bytes.load(Ordering::Relaxed) >= SINK_BYTES
    }

    /// Forgets ticks that all attached dataflows have applied. Those that still read history hold up
    /// the others only once much waits for them.
    fn settle(&mut self) {
        let minted = self.rows_minted;
        let next = self
            .attached
            .values()
            .filter(|a| a.is_level() || minted - a.rows > HYDRATION_ROWS)
            .map(|a| a.progress.next())
            .min()
            .unwrap_or(Tick::MAX);
        while let Some((tick, rows, at)) = self.in_flight.front().copied()
            && tick < next
        {
            self.in_flight.pop_front();
            self.rows_in_flight -= rows;
            self.shared.tick_done(at.elapsed());
        }
        self.shared
            .completed
            .store(next.min(self.last + 1), Ordering::Relaxed);
    }

    fn handle(&mut self, request: Request) {
        match request {
            Request::AddSource(item, state) => self.add_source(item, state),
            Request::Broadcast(commands) => {
                for (worker, command) in self.workers.iter().zip(commands) {
                    worker.send(command);
                }
            }
            Request::Attach(request) => {
                let (result, answer) = self.attach(request);
                // The caller may have given up; the attachment stands until it is dropped.
                let _ = answer.send(result);
            }
            Request::Read(mark) => self.marks.reads.push(mark),
            Request::Epoch(sink) => self.marks.epochs.push(sink),
            Request::Checkpoint { id, done } => self.checkpoints.push((id, done)),
            Request::Replace {
                old,
                new,
                checkpoint,
                done,
            } => self.replace(old, new, (checkpoint, done)),
            Request::Drop(ids) => {
                for id in ids.iter() {
                    self.sources.remove(id);
                    self.attached.remove(id);
                    self.failing.remove(id);
                    if self.held.contains_key(id) {
                        Arc::make_mut(&mut self.held).remove(id);
                    }
                    self.marks.epochs.retain(|s| s != id);
                }
                self.parts.dropped(&ids);
                for worker in &self.workers {
                    worker.send(Command::Drop(Arc::clone(&ids)));
                }
            }
            Request::Hold {
                relation,
                hold,
                done,
            } => self.holding.push((relation, hold, Some(done))),
            Request::RollRemap { oldest } => self.remap.roll(self.last + 1, oldest),
            Request::Stop => {}
        }
    }

    /// Makes a source known; it is read once a dataflow needs it.
    pub fn add_source(&mut self, item: Arc<SourceItem>, state: Option<SourceState>) {
        let status = self.shared.source_status(item.id);
        let wanted: BTreeSet<usize> = state
            .as_ref()
            .map(|s| s.wanted.iter().copied().collect())
            .unwrap_or_default();
        let read = state.as_ref().is_some_and(|s| s.read) || !wanted.is_empty();
        let mut state = state.unwrap_or(SourceState {
            watermark: NO_WATERMARK,
            ..SourceState::default()
        });
        if state.ended {
            state.watermark = END_OF_TIME;
        }
        status.update(&state);
        let run = SourceRun {
            item: Arc::clone(&item),
            ingest: None,
            state,
            wanted,
            read,
            last_rows: BTreeMap::new(),
            turn: 0,
            status,
        };
        self.sources.insert(item.id, run);
    }

    /// Watermarks of all sources that were started, as of the last tick.
    pub fn watermarks(&self) -> BTreeMap<RelationId, Watermark> {
        self.sources
            .iter()
            .map(|(id, s)| (*id, s.state.watermark))
            .collect()
    }

    fn attach(
        &mut self,
        request: AttachRequest,
    ) -> (Result<Attached>, oneshot::Sender<Result<Attached>>) {
        let AttachRequest {
            dataflow,
            is_sink,
            fingerprint,
            restored,
            progress,
            wanted,
            answer,
        } = request;
        let at = self.last + 1;
        let mut offsets = BTreeMap::new();
        let mut fresh = BTreeSet::new();
        for (source, columns) in &wanted {
            let Some(run) = self.sources.get_mut(source) else {
                continue;
            };
            if run.state.splits.is_empty() && !run.state.ended {
                fresh.insert(*source);
            } else {
                offsets.insert(*source, run.offsets());
            }
            if let Err(e) = run.need(columns, &self.signal) {
                return (Err(e), answer);
            }
        }
        self.attached.insert(
            dataflow,
            Attachment {
                is_sink,
                fingerprint,
                progress,
                at,
                rows: self.rows_minted,
            },
        );
        let attach = Attach {
            dataflow,
            at,
            fresh: Arc::new(fresh),
            restored,
        };
        for worker in &self.workers {
            worker.send(Command::Attach(attach.clone()));
        }
        (Ok(Attached { at, offsets }), answer)
    }

    /// Attaches a restored dataflow, before anything runs.
    pub fn attach_restored(&mut self, install: &Install, is_sink: bool, fingerprint: u64) {
        let dataflow = install.id;
        let progress = Arc::clone(&install.progress);
        // Checkpoints of older servers do not say that a source is read without any column.
        for source in install.inputs.keys() {
            if let Some(run) = self.sources.get_mut(source) {
                run.read = true;
            }
        }
        self.attached.insert(
            dataflow,
            Attachment {
                is_sink,
                fingerprint,
                progress,
                // It reads no history.
                at: 0,
                rows: self.rows_minted,
            },
        );
        let attach = Attach {
            dataflow,
            at: self.last + 1,
            fresh: Arc::default(),
            restored: true,
        };
        for worker in &self.workers {
            worker.send(Command::Attach(attach.clone()));
        }
    }

    /// Mints the tick of a replacement.
    fn replace(
        &mut self,
        old: RelationId,
        new: RelationId,
        checkpoint: (u64, oneshot::Sender<Result<Finished>>),
    ) {
        if !self.attached.contains_key(&new) {
            let gone = Error::new(ErrorKind::Conflict, "the replacement was dropped");
            // The caller may have given up.
            let _ = checkpoint.1.send(Err(gone));
            return;
        }
        let at = env::now_ms().max(self.last + 1);
        // Before anything of the tick can be shown.
        self.shared.held_from.send_replace(Some(at));
        for worker in &self.workers {
            worker.send(Command::Replace { old, new, at });
        }
        self.attached.remove(&old);
        self.checkpoints.insert(0, checkpoint);
        let with_rows = !self.is_full();
        self.mint_at(at, with_rows);
        env::failpoint("replace.tick.after");
    }

    fn mint(&mut self, with_rows: bool) {
        self.mint_at(env::now_ms().max(self.last + 1), with_rows);
    }

    fn mint_at(&mut self, tick: Tick, with_rows: bool) {
        let width = self.workers.len();
        self.change_holds(tick);
        let mut binding = Binding {
            tick,
            incarnation: self.incarnation,
            sources: BTreeMap::new(),
            held: (*self.held).clone(),
        };
        let mut bound = Vec::new();
        if with_rows {
            for (id, run) in &mut self.sources {
                if let Some(b) = run.bind(width) {
                    binding.sources.insert(*id, b.binding.clone());
                    bound.push((*id, b));
                }
            }
        }
        self.remap.append(&binding);
        env::failpoint("reclock.publish.after");
        self.publish(tick, bound);
        self.last_minted = Instant::now();
    }

    /// Hands a bound tick with its marks to the workers.
    fn publish(&mut self, tick: Tick, bound: Vec<(RelationId, Bound)>) {
        let mut marks = std::mem::take(&mut self.marks);
        let mut waiting = std::mem::take(&mut self.checkpoints);
        if !waiting.is_empty() {
            let (id, done) = waiting.remove(0);
            self.checkpoints = waiting;
            marks.checkpoint = Some(id);
            let unlevel = self.attached.iter().filter(|(_, a)| !a.is_level());
            marks.unlevel = unlevel.map(|(id, _)| *id).collect();
            let level = |id: &RelationId| !marks.unlevel.contains(id);
            let begin = Begin {
                id,
                tick,
                sources: self
                    .sources
                    .iter()
                    .map(|(id, s)| (*id, s.snapshot()))
                    .collect(),
                views: self
                    .attached
                    .iter()
                    .filter(|(id, a)| !a.is_sink && level(id))
                    .map(|(id, a)| (*id, a.fingerprint))
                    .collect(),
                held: (*self.held).clone(),
                sinks: self
                    .attached
                    .iter()
                    .filter(|(id, a)| a.is_sink && level(id))
                    .map(|(id, _)| *id)
                    .collect(),
                unlevel: marks.unlevel.clone(),
                started: Instant::now(),
                done,
            };
            let _ = self.parts.0.send(Message::Begin(Box::new(begin)));
        }
        let info = Arc::new(TickInfo {
            tick,
            watermarks: self.watermarks(),
            marks,
            held: Arc::clone(&self.held),
        });
        let mut rows: Vec<Vec<(RelationId, Delta)>> = vec![Vec::new(); self.workers.len()];
        let mut rejected = Vec::new();
        let mut count = 0;
        let moved: Vec<RelationId> = bound.iter().map(|(id, _)| *id).collect();
        for (id, b) in bound {
            for (worker, deltas) in b.rows.into_iter().enumerate() {
                for delta in deltas {
                    count += delta.len() as u64;
                    rows[worker].push((id, delta));
                }
            }
            rejected.extend(b.rejected.map(|r| (id, r)));
        }
        let mut rejected = Some(rejected);
        for (worker, rows) in self.workers.iter().zip(rows) {
            worker.send(Command::Tick {
                info: Arc::clone(&info),
                rows,
                // Rejected records live on the first worker.
                rejected: rejected.take().unwrap_or_default(),
            });
        }
        self.last = tick;
        self.shared.last_tick.store(tick, Ordering::Release);
        // Only now: who sees how far a source is must see the tick that says so, and wait for it.
        for run in moved.iter().filter_map(|id| self.sources.get(id)) {
            run.status.update(&run.state);
        }
        self.in_flight.push_back((tick, count, Instant::now()));
        self.rows_in_flight += count;
        self.rows_minted += count;
    }

    /// Replays a binding: reads exactly its offsets and publishes it as it was.
    pub fn replay(
        &mut self,
        binding: &Binding,
        readers: &mut BTreeMap<RelationId, Replay>,
    ) -> Result<()> {
        let width = self.workers.len();
        let waiting = Arc::clone(&self.waiting);
        self.repeat_holds(binding);
        self.change_holds(binding.tick);
        let mut bound = Vec::new();
        for (id, source) in &binding.sources {
            // A source nobody had attached to at the checkpoint starts anew.
            let (Some(run), Some(replay)) = (self.sources.get_mut(id), readers.get_mut(id)) else {
                continue;
            };
            let limit = Offsets(
                source
                    .splits
                    .iter()
                    .map(|(s, (end, _))| (s.clone(), *end))
                    .collect(),
            );
            let mut chunks = Vec::new();
            read_to_limit(
                &mut replay.readers,
                &mut replay.preparer,
                &limit,
                &|| false,
                &mut |trouble| {
                    *lock(&waiting) = trouble.map(|e| (run.item.name.clone(), e.clone()))
                },
                |c| chunks.push(c),
            )?;
            let mut b = run.collect(chunks, width);
            if !repeats(source, &b.binding, Rules::ALL) {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!(
                        "source \"{}\" does not repeat what it delivered before",
                        run.item.name
                    ),
                )
                .detail(format!(
                    "tick {} held {} rows and {} rejected records, now {} and {}{}",
                    binding.tick,
                    source.rows,
                    source.rejected,
                    b.binding.rows,
                    b.binding.rejected,
                    if b.binding.digest == source.digest {
                        ""
                    } else {
                        ", and other ones"
                    }
                ))
                .hint("drop and create the source and what depends on it"));
            }
            b.binding = source.clone();
            run.adopt(&b.binding);
            bound.push((*id, b));
        }
        // The same record again, so that the log of this incarnation is whole by itself.
        // What is held by now because it failed belongs to it from here on.
        let again = Binding {
            held: (*self.held).clone(),
            ..binding.clone()
        };
        self.remap.append(&again);
        while self.is_full() {
            self.signal.wait(Some(Duration::from_millis(20)));
            self.settle();
        }
        self.publish(binding.tick, bound);
        Ok(())
    }

    /// Opens the readers of restored sources at the checkpoint's offsets, to replay `bindings`. A
    /// source that cannot be opened and has nothing to replay fails alone.
    pub fn open_for_replay(
        &mut self,
        bindings: &[Binding],
    ) -> Result<BTreeMap<RelationId, Replay>> {
        let mut open = BTreeMap::new();
        for (id, run) in &mut self.sources {
            if !run.read || run.state.ended {
                continue;
            }
            let moves: Vec<&SourceBinding> =
                bindings.iter().filter_map(|b| b.sources.get(id)).collect();
            let mut from = run.offsets();
            for (split, start) in moves.iter().flat_map(|b| &b.starts) {
                from.0.entry(split.clone()).or_insert(*start);
            }
            match run.open_at(&from, &run.wanted) {
                Ok(replay) => drop(open.insert(*id, replay)),
                Err(e) if moves.is_empty() => run.fail(&e),
                Err(e) => return Err(e),
            }
        }
        Ok(open)
    }

    /// Lets the restored sources run on.
    pub fn go_live(&mut self, replays: BTreeMap<RelationId, Replay>) -> Result<()> {
        self.settle_holds();
        for (id, replay) in replays {
            if let Some(run) = self.sources.get_mut(&id)
                && !run.state.ended
            {
                run.ingest = Some(run.started(replay, &run.wanted, &self.signal)?);
            }
        }
        Ok(())
    }
}

/// Readers of a source, positioned, and how their chunks become rows.
pub struct Replay {
    pub readers: Vec<Box<dyn Reader>>,
    pub preparer: Preparer,
}

impl SourceRun {
    fn offsets(&self) -> Offsets {
        Offsets(
            self.state
                .splits
                .iter()
                .map(|(s, (end, _))| (s.clone(), *end))
                .collect(),
        )
    }

    fn snapshot(&self) -> SourceState {
        SourceState {
            wanted: self.wanted.iter().copied().collect(),
            read: self.read,
            ..self.state.clone()
        }
    }

    fn preparer(&self, columns: &BTreeSet<usize>) -> Result<Preparer> {
        let wanted: Vec<usize> = columns.iter().copied().collect();
        Preparer::new(self.item.source.as_ref(), &self.item.plan, &wanted)
    }

    fn open_at(&self, from: &Offsets, columns: &BTreeSet<usize>) -> Result<Replay> {
        let preparer = self.preparer(columns)?;
        let readers = self.item.source.open(from, &preparer.projection)?;
        Ok(Replay { readers, preparer })
    }

    /// Shows that the source is not read, and why.
    fn fail(&self, error: &Error) {
        tracing::error!(source = %self.item.name, %error, "a source stopped");
        self.status.failed.store(true, Ordering::Relaxed);
        *lock(&self.status.trouble) = Some(error.message.clone());
    }

    fn started(
        &self,
        replay: Replay,
        columns: &BTreeSet<usize>,
        signal: &Arc<Signal>,
    ) -> Result<Ingest> {
        let mut first = Some(replay.preparer);
        Ingest::start(
            &self.item.name,
            replay.readers,
            || first.take().map_or_else(|| self.preparer(columns), Ok),
            Arc::clone(signal),
        )
    }

    /// Reads these columns from the next tick on. Growing means reading again from what is bound:
    /// what was read ahead lacks the new columns. If that cannot be begun, those that read the source
    /// already go on as they did.
    fn need(&mut self, columns: &BTreeSet<usize>, signal: &Arc<Signal>) -> Result<()> {
        let grown = !columns.is_subset(&self.wanted) || !self.read;
        if !grown && (self.ingest.is_some() || self.state.ended) {
            return Ok(());
        }
        let wanted = &self.wanted | columns;
        if !self.state.ended {
            let replay = self.open_at(&self.offsets(), &wanted)?;
            self.ingest = Some(self.started(replay, &wanted, signal)?);
        }
        self.wanted = wanted;
        self.read = true;
        Ok(())
    }

    /// Shows what ails the readers; whether it is new.
    fn note_trouble(&self) -> bool {
        let Some(ingest) = &self.ingest else {
            return false;
        };
        let (trouble, failed) = ingest.trouble();
        self.status
            .failed
            .store(failed.is_some(), Ordering::Relaxed);
        let trouble = failed.map(|e| e.message).or(trouble);
        let mut shown = lock(&self.status.trouble);
        let new = trouble.is_some() && shown.is_none();
        *shown = trouble;
        new
    }

    /// Takes what was read ahead; `None` when nothing moved.
    fn bind(&mut self, workers: usize) -> Option<Bound> {
        let ingest = self.ingest.as_ref()?;
        let chunks = ingest.take(ROWS_PER_TICK);
        let ended = ingest.ended() && !self.state.ended;
        if chunks.is_empty() && !ended {
            return None;
        }
        let now = Instant::now();
        for chunk in &chunks {
            self.last_rows.insert(chunk.split.to_string(), now);
        }
        let mut bound = self.collect(chunks, workers);
        for (split, moved) in &bound.binding.splits {
            self.state.splits.insert(split.clone(), *moved);
        }
        bound.binding.ended = ended || self.state.ended;
        bound.binding.watermark = if bound.binding.ended {
            END_OF_TIME
        } else if self.item.source.watermark_while_running() {
            self.watermark(now).max(self.state.watermark)
        } else {
            NO_WATERMARK
        };
        let binding = bound.binding.clone();
        self.adopt(&binding);
        Some(bound)
    }

    /// Minimum over splits; one that was silent for the idle time-out does not hold the others back.
    /// The result is what is recorded, so replay needs no clock.
    fn watermark(&self, now: Instant) -> Watermark {
        let idle = self.item.idle_timeout;
        let newest = self.last_rows.values().max().copied();
        self.state
            .splits
            .iter()
            .filter(|(split, _)| {
                self.last_rows
                    .get(*split)
                    .is_none_or(|at| now.duration_since(*at) < idle || Some(*at) == newest)
            })
            .map(|(_, (_, watermark))| *watermark)
            .min()
            .unwrap_or(NO_WATERMARK)
    }

    fn adopt(&mut self, binding: &SourceBinding) {
        for (split, moved) in &binding.splits {
            self.state.splits.insert(split.clone(), *moved);
        }
        for (split, start) in &binding.starts {
            self.state.starts.entry(split.clone()).or_insert(*start);
        }
        self.state.watermark = binding.watermark;
        self.state.ended = binding.ended;
        self.state.rows += binding.rows;
        self.state.rejected += binding.rejected;
    }

    /// Chunks to rows by worker. Batches go round the workers; equal offsets give equal rows, which
    /// worker gets them does not matter.
    fn collect(&mut self, chunks: Vec<Prepared>, workers: usize) -> Bound {
        let mut binding = SourceBinding {
            watermark: self.state.watermark,
            digest: Some(0),
            ..SourceBinding::default()
        };
        let mut by_worker: Vec<Vec<Delta>> = vec![Vec::new(); workers];
        let mut rejected = Vec::new();
        for chunk in chunks {
            let before = self.state.splits.get(&*chunk.split).map(|s| s.1);
            if before.is_none() {
                binding
                    .starts
                    .entry(chunk.split.to_string())
                    .or_insert(chunk.begin);
            }
            let before = before.unwrap_or(NO_WATERMARK);
            let entry = binding
                .splits
                .entry(chunk.split.to_string())
                .or_insert((chunk.end, before));
            entry.0 = chunk.end;
            entry.1 = entry.1.max(chunk.watermark);
            binding.digest = binding
                .digest
                .zip(chunk.digest)
                .map(|(sum, digest)| sum.wrapping_add(digest));
            self.status.bytes.fetch_add(chunk.bytes, Ordering::Relaxed);
            if let Some(remaining) = chunk.remaining {
                lock(&self.status.remaining).insert(chunk.split.to_string(), remaining);
            }
            rejected.extend(chunk.rejected);
            if let Some(delta) = chunk.delta {
                binding.rows += delta.len() as u64;
                by_worker[self.turn % workers].push(delta);
                self.turn += 1;
            }
        }
        binding.rejected = rejected.len() as u64;
        let rows = by_worker.into_iter().map(merge_small).collect();
        Bound {
            binding,
            rows,
            rejected: rejected_rows(&rejected),
        }
    }
}

/// Merges runs of small batches, so that operators see thousands of rows, not dozens.
fn merge_small(deltas: Vec<Delta>) -> Vec<Delta> {
    let mut merged = Vec::with_capacity(deltas.len());
    let mut small: Vec<Delta> = Vec::new();
    let mut rows = 0;
    for delta in deltas {
        if delta.len() >= SMALL_ROWS {
            merged.extend(merge(std::mem::take(&mut small)));
            rows = 0;
            merged.push(delta);
            continue;
        }
        rows += delta.len();
        small.push(delta);
        if rows >= SMALL_ROWS {
            merged.extend(merge(std::mem::take(&mut small)));
            rows = 0;
        }
    }
    merged.extend(merge(small));
    merged
}

fn merge(mut deltas: Vec<Delta>) -> Option<Delta> {
    if deltas.len() <= 1 {
        return deltas.pop();
    }
    let schema = deltas[0].batch.schema();
    let batch =
        concat_batches(&schema, deltas.iter().map(|d| &d.batch)).expect("batches of one source");
    let diffs = if deltas.iter().all(|d| d.diffs.is_ones()) {
        Diffs::Ones
    } else {
        Diffs::from_vec(
            deltas
                .iter()
                .flat_map(|d| (0..d.len()).map(|i| d.diffs.get(i)))
                .collect(),
        )
    };
    Some(Delta { batch, diffs })
}
