//! The tasks of a sink: one writer per worker, one committer.
//!
//! # Protocol
//!
//! A writer writes the rows it is given and, at a mark, closes its files. The committer's task gathers
//! the closed files of all workers for a mark. At a checkpoint mark it hands all files that are not
//! committed to the collector; at an epoch mark it commits them, once the ticks are durable in the
//! remap log and the sink itself is part of a checkpoint. A commit that is under way, or is tried again
//! and again, holds up neither the gathering nor a checkpoint: until its outcome is known its files are
//! part of each.
//!
//! What is unavailable is tried again for as long as the sink is there. A writer that fails in any other
//! way has lost rows, which only a restart has once more: the sink is *broken* ([`BrokenSink`]), and
//! whoever runs the engine starts it again, without the sink if need be.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::watch;

use super::minter::Request;
use super::shared::Shared;
use crate::blame;
use crate::checkpoint::manifest::SinkState;
use crate::checkpoint::{Message, PartSender};
use crate::delta::Delta;
use crate::env;
use crate::error::{Error, ErrorKind, Result};
use crate::ingest::{Signal, lock};
use crate::plan::RelationId;
use crate::remap::log::{Known, Misfit, goes_on_at};
use crate::sink::{Committable, Committer, Sink, Trouble, Writer};
use crate::time::Tick;
use crate::worker::command::WriterMessage;

/// What a sink shows of itself.
#[derive(Debug, Default)]
pub struct SinkStatus {
    pub committed: AtomicU64,
    pub rows: AtomicU64,
    pub bytes: AtomicU64,
    /// Rows written since the last epoch mark was asked for.
    pub fresh: AtomicBool,
    pub trouble: Mutex<Option<String>>,
    pub failed: AtomicBool,
    /// The trouble is a full disk.
    pub disk_full: AtomicBool,
    /// Nothing is committed: see [`super::alter`].
    pub paused: AtomicBool,
    /// How often it commits; `None`: as often as the engine says.
    pub interval: watch::Sender<Option<Duration>>,
    /// The first tick of which a writer has lost rows, and why.
    pub broken: watch::Sender<Option<(Tick, Error)>>,
}

impl SinkStatus {
    /// Rows of `tick` are lost; the lowest such tick counts.
    pub fn broke(&self, tick: Tick, error: &Error) {
        self.broken.send_if_modified(|broken| {
            let new = broken.as_ref().is_none_or(|(first, _)| *first > tick);
            if new {
                *broken = Some((tick, error.clone()));
            }
            new
        });
    }

    fn note(&self, e: &Error) {
        self.disk_full.store(e.code == "53100", Ordering::Relaxed);
        *lock(&self.trouble) = Some(describe(e));
    }

    fn note_over(&self) {
        self.disk_full.store(false, Ordering::Relaxed);
        lock(&self.trouble).take();
    }
}

/// A sink that cannot go on in this run: rows from a tick on reached a writer and are in no file.
#[derive(Debug, Clone)]
pub struct BrokenSink {
    pub id: RelationId,
    pub tick: Tick,
    pub error: Error,
}

/// The ways to a running sink.
#[derive(Debug)]
pub struct RunningSink {
    pub writers: Vec<UnboundedSender<WriterMessage>>,
    /// Where writers say what they have closed.
    pub closed: UnboundedSender<Closed>,
    /// What the destination already holds.
    pub skip_below: Tick,
    /// Files of a checkpoint that wait for their commit lie below this tick.
    pub pending_below: Tick,
    pub status: Arc<SinkStatus>,
    /// Set once the sink is part of a checkpoint.
    pub confirmed: watch::Sender<bool>,
}

/// What the tasks of a sink need of the engine.
#[derive(Debug, Clone)]
pub struct SinkContext {
    /// Of all processes.
    pub workers: usize,
    /// Of this process.
    pub local_workers: usize,
    pub incarnation: u64,
    pub shared: Arc<Shared>,
    pub parts: PartSender,
    pub durable: watch::Receiver<Tick>,
    pub requests: std::sync::mpsc::Sender<Request>,
    pub signal: Arc<Signal>,
    pub paused: bool,
    pub broken: UnboundedSender<BrokenSink>,
}

/// What one writer has closed at a mark.
#[derive(Debug)]
pub struct Closed {
    pub upper: Tick,
    pub epoch: bool,
    pub checkpoint: Option<u64>,
    pub committables: Vec<Committable>,
}

/// What the writers of a sink share.
#[derive(Debug)]
pub struct WriterContext {
    pub closed: UnboundedSender<Closed>,
    pub status: Arc<SinkStatus>,
    pub queued_bytes: Arc<AtomicU64>,
    pub signal: Arc<Signal>,
}

/// Starts the writers of some workers; the ways to them.
pub async fn writers(
    id: RelationId,
    sink: &dyn Sink,
    workers: std::ops::Range<usize>,
    incarnation: u64,
    committed: Tick,
    context: &WriterContext,
) -> Result<Vec<UnboundedSender<WriterMessage>>> {
    let mut writers = Vec::new();
    for worker in workers {
        let writer = sink.writer(worker, incarnation).await?;
        let (sender, receiver) = unbounded_channel();
        writers.push(sender);
        let task = WriteTask {
            writer,
            closed: context.closed.clone(),
            status: Arc::clone(&context.status),
            queued: Arc::clone(&context.queued_bytes),
            signal: Arc::clone(&context.signal),
            lower: committed,
            first: None,
        };
        tokio::spawn(blame::scope(id, task.run(receiver)));
    }
    Ok(writers)
}

/// Starts the tasks of a sink; `restored` is its part of the checkpoint.
pub async fn start(
    id: RelationId,
    sink: Arc<dyn Sink>,
    interval: Option<Duration>,
    restored: Option<SinkState>,
    context: SinkContext,
) -> Result<RunningSink> {
    let mut committer = sink.committer(context.incarnation).await?;
    let there = committer.frontier().await?;
    let known = restored.as_ref().map(|state| Known {
        committed: state.committed,
        landed: state.landed,
    });
    let committed = goes_on_at(there, known).map_err(misfit)?;
    let state = restored.clone().unwrap_or_default();
    // Each file was closed at a mark, so it lies wholly below or wholly at and above the frontier.
    let pending: Vec<Committable> = state
        .pending
        .into_iter()
        .filter(|c| c.upper > committed)
        .collect();
    let pending_below = pending.iter().map(|c| c.upper).max().unwrap_or(0);
    let status = Arc::new(SinkStatus::default());
    status.committed.store(committed, Ordering::Relaxed);
    status.rows.store(state.rows, Ordering::Relaxed);
    status.fresh.store(!pending.is_empty(), Ordering::Relaxed);
    status.paused.store(context.paused, Ordering::Relaxed);
    status.interval.send_replace(interval);
    let (closed_sender, closed) = unbounded_channel();
    let (confirmed, confirmed_receiver) = watch::channel(restored.is_some());
    let writers = writers(
        id,
        sink.as_ref(),
        0..context.local_workers,
        context.incarnation,
        committed,
        &WriterContext {
            closed: closed_sender.clone(),
            status: Arc::clone(&status),
            queued_bytes: Arc::clone(&context.shared.queued_bytes),
            signal: Arc::clone(&context.signal),
        },
    )
    .await?;
    tokio::spawn(ask_for_epochs(
        id,
        Arc::downgrade(&status),
        status.interval.subscribe(),
        context.clone(),
    ));
    let task = CommitTask {
        id,
        committer: Some(committer),
        committed,
        landed: there.unwrap_or(0),
        pending,
        due: None,
        status: Arc::clone(&status),
        confirmed: confirmed_receiver,
        context,
        over: Arc::default(),
    };
    // Before any writer has something to say.
    let broken = status.broken.subscribe();
    tokio::spawn(blame::scope(id, task.run(closed, broken)));
    Ok(RunningSink {
        writers,
        closed: closed_sender,
        skip_below: committed,
        pending_below,
        status,
        confirmed,
    })
}

fn misfit(misfit: Misfit) -> Error {
    match misfit {
        // A sink commits only once a checkpoint holds it: that checkpoint is not there any more.
        Misfit::NoState => Error::new(
            ErrorKind::Corrupt,
            "the destination holds rows of this sink, but its state is gone",
        )
        .hint("drop the sink and create it anew, into another table"),
        Misfit::SetBack { landed, there } => Error::new(
            ErrorKind::Conflict,
            "the destination holds less of this sink than it did: it was set back or replaced",
        )
        .detail(format!("it was at tick {landed} and is at {there} now"))
        .hint("drop the sink and create it anew, into another table"),
    }
}

/// One writer.
struct WriteTask {
    writer: Box<dyn Writer>,
    closed: UnboundedSender<Closed>,
    status: Arc<SinkStatus>,
    queued: Arc<AtomicU64>,
    signal: Arc<Signal>,
    /// Where the files that are open begin.
    lower: Tick,
    /// The first tick with rows in them.
    first: Option<Tick>,
}

/// A writer writes no more.
struct Ended;

impl WriteTask {
    /// Runs until the sink's dataflow is gone.
    async fn run(mut self, mut messages: UnboundedReceiver<WriterMessage>) {
        while let Some(message) = messages.recv().await {
            let (bytes, done) = match message {
                WriterMessage::Write { tick, delta } => {
                    let bytes = delta.bytes() as u64;
                    (bytes, self.write(tick, &delta, &messages).await)
                }
                WriterMessage::Close {
                    upper,
                    epoch,
                    checkpoint,
                } => {
                    let done = self.close(upper, &messages).await;
                    let done = done.and_then(|committables| {
                        let closed = Closed {
                            upper,
                            epoch,
                            checkpoint,
                            committables,
                        };
                        self.closed.send(closed).map_err(|_| Ended)
                    });
                    (0, done)
                }
            };
            self.free(bytes);
            if done.is_err() {
                break;
            }
        }
        // What is not written any more holds up nobody.
        while let Some(message) = messages.recv().await {
            if let WriterMessage::Write { delta, .. } = message {
                self.free(delta.bytes() as u64);
            }
        }
    }

    fn free(&self, bytes: u64) {
        if bytes > 0 {
            self.queued.fetch_sub(bytes, Ordering::Relaxed);
            self.signal.raise();
        }
    }

    async fn write(
        &mut self,
        tick: Tick,
        delta: &Delta,
        messages: &UnboundedReceiver<WriterMessage>,
    ) -> Result<(), Ended> {
        blame::at(tick);
        let trouble = self.writer.trouble();
        let mut patience = Patience::default();
        loop {
            let written = self.writer.write(tick, &delta.batch, &delta.diffs);
            match watched(&self.status, &trouble, messages, written).await? {
                Ok(()) => break,
                Err(e) => patience.wait(&self.status, tick, &e).await?,
            }
        }
        patience.over(&self.status);
        self.first.get_or_insert(tick);
        let rows = delta.len() as u64;
        self.status.rows.fetch_add(rows, Ordering::Relaxed);
        let bytes = delta.bytes() as u64;
        self.status.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.status.fresh.store(true, Ordering::Relaxed);
        Ok(())
    }

    async fn close(
        &mut self,
        upper: Tick,
        messages: &UnboundedReceiver<WriterMessage>,
    ) -> Result<Vec<Committable>, Ended> {
        let trouble = self.writer.trouble();
        let mut patience = Patience::default();
        let committables = loop {
            let closed = self.writer.close(self.lower, upper);
            match watched(&self.status, &trouble, messages, closed).await? {
                Ok(committables) => break committables,
                // All that is in the files is lost with them.
                Err(e) => {
                    let tick = self.first.unwrap_or(upper);
                    patience.wait(&self.status, tick, &e).await?;
                }
            }
        };
        patience.over(&self.status);
        self.lower = upper;
        self.first = None;
        Ok(committables)
    }
}

/// Shows what a writer waits for while it waits; ends with the sink.
async fn watched<T>(
    status: &SinkStatus,
    trouble: &Trouble,
    messages: &UnboundedReceiver<WriterMessage>,
    work: impl Future<Output = T>,
) -> Result<T, Ended> {
    tokio::pin!(work);
    let mut shown = false;
    loop {
        tokio::select! {
            done = &mut work => {
                if shown {
                    status.note_over();
                }
                return Ok(done);
            }
            () = tokio::time::sleep(Duration::from_millis(500)) => {
                if messages.is_closed() {
                    return Err(Ended);
                }
                if let Some(e) = trouble.get() {
                    shown = true;
                    status.note(&e);
                }
            }
        }
    }
}

/// Trouble of a writer. It is tried again while the destination is unavailable; another error breaks the
/// sink.
#[derive(Default)]
struct Patience {
    tries: u32,
}

impl Patience {
    async fn wait(&mut self, status: &SinkStatus, tick: Tick, e: &Error) -> Result<(), Ended> {
        status.note(e);
        tracing::error!(error = %e, detail = e.detail, tick, "a sink cannot write");
        if e.kind != ErrorKind::Unavailable {
            status.failed.store(true, Ordering::Relaxed);
            status.broke(tick, e);
            return Err(Ended);
        }
        let pause = Duration::from_millis(200) * 2u32.pow(self.tries.min(6));
        self.tries += 1;
        tokio::time::sleep(pause.min(Duration::from_secs(10))).await;
        Ok(())
    }
    fn over(&self, status: &SinkStatus) {
        if self.tries > 0 {
            status.note_over();
        }
    }
}

/// Every interval, if rows were written, a tick is marked as the end of the sink's epoch.
async fn ask_for_epochs(
    id: RelationId,
    status: std::sync::Weak<SinkStatus>,
    mut interval: watch::Receiver<Option<Duration>>,
    context: SinkContext,
) {
    let mut settings = context.shared.settings.subscribe();
    let mut last = tokio::time::Instant::now();
    loop {
        let default = settings.borrow_and_update().commit_interval;
        let wait = interval.borrow_and_update().unwrap_or(default);
        tokio::select! {
            () = tokio::time::sleep_until(last + wait.max(Duration::from_millis(10))) => {}
            changed = interval.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return,
            },
            Ok(()) = settings.changed() => continue,
        }
        last = tokio::time::Instant::now();
        let Some(status) = status.upgrade() else {
            return;
        };
        // While it is paused only checkpoints close files: fewer and larger ones.
        if !status.paused.load(Ordering::SeqCst) && status.fresh.swap(false, Ordering::SeqCst) {
            if context.requests.send(Request::Epoch(id)).is_err() {
                return;
            }
            context.signal.raise();
        }
    }
}

struct CommitTask {
    id: RelationId,
    /// `None` while it commits.
    committer: Option<Box<dyn Committer>>,
    committed: Tick,
    /// What the destination itself says.
    landed: Tick,
    /// Closed and not committed, in order.
    pending: Vec<Committable>,
    /// The end of the next epoch, once all writers have reached it.
    due: Option<Tick>,
    status: Arc<SinkStatus>,
    confirmed: watch::Receiver<bool>,
    context: SinkContext,
    /// The sink is gone: a commit is not tried again.
    over: Arc<AtomicBool>,
}

/// A commit under way.
type Commit = Pin<Box<dyn Future<Output = Committed> + Send>>;

struct Committed {
    committer: Box<dyn Committer>,
    upper: Tick,
    /// What the destination says; `None`: it was not done.
    landed: Option<Tick>,
}

/// The one that is under way; waits for ever if none is.
async fn end_of(commit: &mut Option<Commit>) -> Committed {
    match commit {
        Some(commit) => commit.await,
        None => std::future::pending().await,
    }
}

impl CommitTask {
    async fn run(
        mut self,
        mut closed: UnboundedReceiver<Closed>,
        mut broken: watch::Receiver<Option<(Tick, Error)>>,
    ) {
        // Marks come in order from each worker, so the lowest mark completes first.
        let mut open: BTreeMap<Tick, Vec<Closed>> = BTreeMap::new();
        let mut commit = None;
        loop {
            tokio::select! {
                part = closed.recv() => match part {
                    Some(part) => self.gather(part, &mut open),
                    None => break,
                },
                committed = end_of(&mut commit) => {
                    commit = None;
                    self.ended(committed);
                }
                Ok(()) = broken.changed() => {
                    let why = broken.borrow_and_update().clone();
                    if let Some((tick, error)) = why {
                        // Whoever runs the engine may have given it up.
                        let _ = self.context.broken.send(BrokenSink { id: self.id, tick, error });
                    }
                }
            }
            if let Some(upper) = self.due
                && let Some(committer) = self.committer.take_if(|_| commit.is_none())
            {
                self.due = None;
                match self.may_commit(upper) {
                    true => commit = Some(Box::pin(self.commit(committer, upper))),
                    false => {
                        // Paused; or the sink, or a new plan before it, is not part of a checkpoint
                        // yet: the next epoch takes these files along.
                        self.committer = Some(committer);
                        self.status.fresh.store(true, Ordering::Relaxed);
                    }
                }
            }
        }
        self.over.store(true, Ordering::Relaxed);
        if let Some(commit) = commit {
            // To its end: what it has sent may arrive in any case.
            commit.await;
        }
    }

    fn may_commit(&self, upper: Tick) -> bool {
        let held = *self.context.shared.held_from.borrow();
        let paused = self.status.paused.load(Ordering::SeqCst);
        *self.confirmed.borrow() && !paused && held.is_none_or(|from| upper <= from)
    }

    /// Takes what one worker has closed; at the last one the mark is complete.
    fn gather(&mut self, part: Closed, open: &mut BTreeMap<Tick, Vec<Closed>>) {
        let upper = part.upper;
        let parts = open.entry(upper).or_default();
        parts.push(part);
        if parts.len() < self.context.workers {
            return;
        }
        let parts = open.remove(&upper).unwrap_or_default();
        let (epoch, checkpoint) = (parts[0].epoch, parts[0].checkpoint);
        self.pending
            .extend(parts.into_iter().flat_map(|p| p.committables));
        if let Some(checkpoint) = checkpoint {
            let state = SinkState {
                committed: self.committed,
                landed: self.landed,
                pending: self.pending.clone(),
                rows: self.status.rows.load(Ordering::Relaxed),
            };
            let message = Message::Sink {
                checkpoint,
                sink: self.id,
                state,
            };
            let _ = self.context.parts.0.send(message);
        }
        if epoch {
            self.due = Some(upper);
        }
    }

    /// Commits all that is closed below `upper`, again and again while the destination is unavailable.
    fn commit(
        &self,
        mut committer: Box<dyn Committer>,
        upper: Tick,
    ) -> impl Future<Output = Committed> + Send + use<> {
        let (id, lower) = (self.id, self.committed);
        let files = self.pending.iter().filter(|c| c.upper <= upper);
        let files: Vec<Committable> = files.cloned().collect();
        let (status, over) = (Arc::clone(&self.status), Arc::clone(&self.over));
        let shared = Arc::clone(&self.context.shared);
        let mut durable = self.context.durable.clone();
        async move {
            let started = Instant::now();
            // What it commits may be anything up to here.
            blame::at(shared.last_tick.load(Ordering::Relaxed) + 1);
            let mut landed = None;
            let mut pause = Duration::from_millis(200);
            let known = durable.wait_for(|t| *t >= upper - 1).await.is_ok();
            while known && !over.load(Ordering::Relaxed) {
                match committer.commit(lower, upper, &files).await {
                    Ok(there) => {
                        landed = Some(there);
                        break;
                    }
                    Err(e) => {
                        let failed = e.kind != ErrorKind::Unavailable;
                        status.note(&e);
                        status.failed.store(failed, Ordering::Relaxed);
                        tracing::error!(sink = %id, error = %e, "a commit failed");
                        if failed {
                            // The files stay in checkpoints; a restart looks again.
                            break;
                        }
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(Duration::from_secs(10));
                    }
                }
            }
            if landed.is_some() {
                let stats = &shared.stats;
                stats.commits.fetch_add(1, Ordering::Relaxed);
                let ms = started.elapsed().as_millis() as u64;
                stats.commit_ms.fetch_add(ms, Ordering::Relaxed);
            }
            Committed {
                committer,
                upper,
                landed,
            }
        }
    }

    fn ended(&mut self, committed: Committed) {
        let Committed {
            committer,
            upper,
            landed,
        } = committed;
        self.committer = Some(committer);
        let Some(landed) = landed else {
            return;
        };
        self.landed = landed;
        self.committed = upper;
        self.pending.retain(|c| c.upper > upper);
        env::failpoint("sink.progress.after");
        self.status.committed.store(upper, Ordering::Relaxed);
        if self.status.broken.borrow().is_none() {
            self.status.failed.store(false, Ordering::Relaxed);
            self.status.note_over();
        }
    }
}

/// An error in one line.
pub(super) fn describe(e: &Error) -> String {
    match &e.detail {
        Some(detail) => format!("{} ({detail})", e.message),
        None => e.message.clone(),
    }
}
