//! The tasks of a sink: one writer per worker, one committer.
//!
//! # Protocol
//!
//! A writer writes the rows it is given and, at a mark, closes its files. The committer's task gathers
//! the closed files of all workers for a mark. At a checkpoint mark it hands all files that are not
//! committed to the collector; at an epoch mark it commits them, once the ticks are durable in the
//! remap log and the sink itself is part of a checkpoint.

use std::collections::BTreeMap;
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
use crate::error::{Error, ErrorKind, Result};
use crate::ingest::{Signal, lock};
use crate::plan::RelationId;
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
}

impl SinkStatus {
    fn note(&self, e: &Error) {
        self.disk_full.store(e.code == "53100", Ordering::Relaxed);
        *lock(&self.trouble) = Some(describe(e));
    }

    fn note_over(&self) {
        self.disk_full.store(false, Ordering::Relaxed);
        lock(&self.trouble).take();
    }
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
        let work = write(
            writer,
            receiver,
            context.closed.clone(),
            Arc::clone(&context.status),
            Arc::clone(&context.queued_bytes),
            Arc::clone(&context.signal),
            committed,
        );
        tokio::spawn(blame::scope(id, work));
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
    if restored.is_none() && there.is_some_and(|frontier| frontier > 0) {
        // A sink commits only once a checkpoint holds it: that checkpoint is not there any more.
        return Err(Error::new(
            ErrorKind::Corrupt,
            "the destination holds rows of this sink, but its state is gone",
        )
        .hint("drop the sink and create it anew, into another table"));
    }
    let state = restored.clone().unwrap_or_default();
    let committed = there.unwrap_or(0).max(state.committed);
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
        committer,
        committed,
        pending,
        status: Arc::clone(&status),
        confirmed: confirmed_receiver,
        context,
    };
    tokio::spawn(blame::scope(id, task.run(closed)));
    Ok(RunningSink {
        writers,
        closed: closed_sender,
        skip_below: committed,
        pending_below,
        status,
        confirmed,
    })
}

async fn write(
    mut writer: Box<dyn Writer>,
    mut messages: UnboundedReceiver<WriterMessage>,
    closed: UnboundedSender<Closed>,
    status: Arc<SinkStatus>,
    queued: Arc<AtomicU64>,
    signal: Arc<Signal>,
    mut lower: Tick,
) {
    let trouble = writer.trouble();
    while let Some(message) = messages.recv().await {
        match message {
            WriterMessage::Write { tick, delta } => {
                blame::at(tick);
                let bytes = delta.bytes() as u64;
                let mut patience = Patience::default();
                loop {
                    let written = writer.write(tick, &delta.batch, &delta.diffs);
                    let Err(e) = watched(&status, &trouble, written).await else {
                        break;
                    };
                    patience.wait(&status, &e).await;
                }
                patience.over(&status);
                status.rows.fetch_add(delta.len() as u64, Ordering::Relaxed);
                status.bytes.fetch_add(bytes, Ordering::Relaxed);
                status.fresh.store(true, Ordering::Relaxed);
                queued.fetch_sub(bytes, Ordering::Relaxed);
                signal.raise();
            }
            WriterMessage::Close {
                upper,
                epoch,
                checkpoint,
            } => {
                let mut patience = Patience::default();
                let committables = loop {
                    match watched(&status, &trouble, writer.close(lower, upper)).await {
                        Ok(committables) => break committables,
                        Err(e) => patience.wait(&status, &e).await,
                    }
                };
                patience.over(&status);
                lower = upper;
                if closed
                    .send(Closed {
                        upper,
                        epoch,
                        checkpoint,
                        committables,
                    })
                    .is_err()
                {
                    return;
                }
            }
        }
    }
}

/// Shows what a writer waits for while it waits.
async fn watched<T>(status: &SinkStatus, trouble: &Trouble, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    let mut shown = false;
    loop {
        tokio::select! {
            done = &mut work => {
                if shown {
                    status.note_over();
                }
                return done;
            }
            () = tokio::time::sleep(Duration::from_millis(500)) => {
                if let Some(e) = trouble.get() {
                    shown = true;
                    status.note(&e);
                }
            }
        }
    }
}

/// Trouble of a writer. It is tried again while the destination is unavailable; another error stops
/// the sink but not the engine: the sink is shown as failed and goes on trying slowly, so that nothing
/// is lost once it is mended.
#[derive(Default)]
struct Patience {
    tries: u32,
}

impl Patience {
    async fn wait(&mut self, status: &SinkStatus, e: &Error) {
        status
            .failed
            .store(e.kind != ErrorKind::Unavailable, Ordering::Relaxed);
        status.note(e);
        tracing::error!(error = %e, "a sink cannot write");
        let pause = Duration::from_millis(200) * 2u32.pow(self.tries.min(6));
        self.tries += 1;
        tokio::time::sleep(pause.min(Duration::from_secs(10))).await;
    }
    fn over(&self, status: &SinkStatus) {
        if self.tries > 0 {
            status.note_over();
            status.failed.store(false, Ordering::Relaxed);
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
    committer: Box<dyn Committer>,
    committed: Tick,
    /// Closed and not committed, in order.
    pending: Vec<Committable>,
    status: Arc<SinkStatus>,
    confirmed: watch::Receiver<bool>,
    context: SinkContext,
}

impl CommitTask {
    async fn run(mut self, mut closed: UnboundedReceiver<Closed>) {
        // Marks come in order from each worker, so the lowest mark completes first.
        let mut open: BTreeMap<Tick, Vec<Closed>> = BTreeMap::new();
        while let Some(part) = closed.recv().await {
            let upper = part.upper;
            let parts = open.entry(upper).or_default();
            parts.push(part);
            if parts.len() < self.context.workers {
                continue;
            }
            let parts = open.remove(&upper).unwrap_or_default();
            let (epoch, checkpoint) = (parts[0].epoch, parts[0].checkpoint);
            self.pending
                .extend(parts.into_iter().flat_map(|p| p.committables));
            if let Some(checkpoint) = checkpoint {
                let state = SinkState {
                    committed: self.committed,
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
                let held = *self.context.shared.held_from.borrow();
                let paused = self.status.paused.load(Ordering::SeqCst);
                let may = *self.confirmed.borrow() && !paused;
                if may && held.is_none_or(|from| upper <= from) {
                    self.commit(upper).await;
                } else {
                    // Paused; or the sink, or a new plan before it, is not part of a checkpoint yet: the
                    // next epoch takes these files along.
                    self.status.fresh.store(true, Ordering::Relaxed);
                }
            }
        }
    }

    async fn commit(&mut self, upper: Tick) {
        let started = Instant::now();
        // What it commits may be anything up to here.
        blame::at(self.context.shared.last_tick.load(Ordering::Relaxed) + 1);
        let stopped = self
            .context
            .durable
            .wait_for(|t| *t >= upper - 1)
            .await
            .is_err();
        if stopped {
            return;
        }
        let mut pause = Duration::from_millis(200);
        loop {
            match self
                .committer
                .commit(self.committed, upper, &self.pending)
                .await
            {
                Ok(()) => break,
                Err(e) => {
                    let failed = e.kind != ErrorKind::Unavailable;
                    self.status.note(&e);
                    self.status.failed.store(failed, Ordering::Relaxed);
                    tracing::error!(sink = %self.id, error = %e, "a commit failed");
                    if failed {
                        // The files stay in checkpoints; a restart looks again.
                        return;
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(10));
                }
            }
        }
        self.pending.clear();
        self.committed = upper;
        self.status.committed.store(upper, Ordering::Relaxed);
        self.status.failed.store(false, Ordering::Relaxed);
        self.status.note_over();
        let stats = &self.context.shared.stats;
        stats.commits.fetch_add(1, Ordering::Relaxed);
        stats
            .commit_ms
            .fetch_add(started.elapsed().as_millis() as u64, Ordering::Relaxed);
    }
}

fn describe(e: &Error) -> String {
    match &e.detail {
        Some(detail) => format!("{} ({detail})", e.message),
        None => e.message.clone(),
    }
}
