//! The engine as the service sees it: start, create, drop, read, checkpoint, stop.
//!
//! # Contract
//!
//! * [`Engine::start`] returns once everything that the last checkpoint holds runs again: same state,
//!   replayed ticks equal to what they were. Items that are in no checkpoint are attached anew.
//! * [`Engine::create`] returns once the item is attached, its history is applied and a checkpoint
//!   contains it; before that nothing of it is shown and no sink of it commits.
//! * [`Engine::read`] gives the contents of several relations at one tick, which is durable.

pub mod alter;
pub mod backfill;
mod hydrate;
mod install;
pub mod minter;
mod replace;
pub mod shared;
pub mod sinks;
pub mod start;
mod status;
pub mod subscribe;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arrow::array::RecordBatch;
use async_trait::async_trait;
use tokio::sync::{Mutex as AsyncMutex, mpsc, oneshot, watch};

use crate::checkpoint::PartSender;
use crate::checkpoint::collector::Finished;
use crate::checkpoint::store::CheckpointStore;
use crate::cluster::Definition;
use crate::cluster::link::Link;
use crate::error::{Error, ErrorKind, Result};
use crate::follow::Follower;
use crate::ingest::{Signal, lock};
use crate::kernel::contents::FrozenContents;
use crate::plan::{Plan, RelationId, SourcePlan};
use crate::sink::Sink;
use crate::source::Source;
use crate::state::{Pager, PagerStats};
use crate::time::Tick;
use crate::worker::command::{Command, InputInfo, Progress};
use backfill::Backfill;
use minter::Request;
use shared::{EngineStats, Shared};
use sinks::{BrokenSink, SinkStatus};

/// How long a read waits for its tick.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the final checkpoint may take.
const LAST_CHECKPOINT: Duration = Duration::from_secs(20);

/// How long a checkpoint may take before it is called trouble; four intervals, if those are longer.
const CHECKPOINT_PATIENCE: Duration = Duration::from_secs(120);

/// Nothing is shown whose binding is not on the disk.
fn log_error(why: Option<&str>) -> Error {
    if let Some(why) = why.filter(|why| why.starts_with("incarnation ")) {
        return Error::new(ErrorKind::Conflict, why).code("40001");
    }
    Error::unavailable("the remap log cannot be written, so nothing new can be shown")
        .code("53100")
        .detail(why.unwrap_or_default().to_string())
        .hint("free space on the disk of the data directory; the server goes on by itself")
}

/// State stays in memory, beyond its budget.
fn swap_error(why: String) -> Error {
    Error::unavailable("the swap file cannot be written, so state takes more memory than it may")
        .code("53100")
        .detail(why)
        .hint("free space on the disk of the data directory; the server goes on by itself")
}

/// See the module.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Of each process.
    pub workers: usize,
    /// Holds the remap log, and the checkpoints if they are not kept elsewhere.
    pub dir: PathBuf,
    /// Where checkpoints are kept.
    pub checkpoints: Option<CheckpointStore>,
    pub incarnation: u64,
    pub checkpoint_interval: Duration,
    /// Default of sinks.
    pub commit_interval: Duration,
    /// Rows between a source and the last stateful operator.
    pub max_rows_in_flight: u64,
    /// Written while the engine starts.
    pub waiting: Waiting,
    /// The memory that state may take; `None` sets no limit.
    pub pager: Option<Arc<Pager>>,
    /// Sinks that do not commit.
    pub paused: BTreeSet<RelationId>,
    /// What fails again and again: see [`alter`].
    pub failed: BTreeMap<RelationId, Failing>,
}

/// A relation that is not to be run as it was.
#[derive(Debug, Clone)]
pub struct Failing {
    /// Held from this tick on; `None`: it fails before it has a place among the ticks, and is not started.
    pub at: Option<Tick>,
    pub error: Error,
}

impl EngineConfig {
    /// Where checkpoints are kept.
    fn store(&self) -> Result<CheckpointStore> {
        match &self.checkpoints {
            Some(store) => Ok(store.clone()),
            None => CheckpointStore::local(self.dir.clone()),
        }
    }
}

/// The source, by name, whose absence holds up the start, and what ails it.
pub type Waiting = Arc<Mutex<Option<(String, Error)>>>;

/// The metadata the engine needs to be fenced by; the service implements it.
#[async_trait]
pub trait Meta: Send + Sync {
    async fn latest_checkpoint(&self) -> Result<Option<u64>>;
    /// Moves the pointer if it is `expected` and `incarnation` is still the newest; false = fenced.
    async fn move_latest_checkpoint(
        &self,
        incarnation: u64,
        expected: Option<u64>,
        id: u64,
    ) -> Result<bool>;
}

#[derive(Debug, Clone)]
pub struct SourceItem {
    pub id: RelationId,
    pub name: String,
    pub source: Arc<dyn Source>,
    pub plan: SourcePlan,
    pub rejected: RelationId,
    /// A split that is silent this long does not hold back the watermark.
    pub idle_timeout: Duration,
}

#[derive(Debug, Clone)]
pub struct ViewItem {
    pub id: RelationId,
    /// What computes it: an id of its own since the view was replaced, before that the same.
    pub dataflow: RelationId,
    pub name: String,
    pub plan: Plan,
    pub errors: RelationId,
    pub late: RelationId,
}

#[derive(Debug, Clone)]
pub struct SinkItem {
    pub id: RelationId,
    pub name: String,
    pub from: RelationId,
    /// The first columns of the relation; it may have got more since the sink was created.
    pub columns: usize,
    pub sink: Arc<dyn Sink>,
    pub commit_interval: Option<Duration>,
}

/// What the service asks the engine to run.
#[derive(Debug, Clone)]
pub enum Item {
    Source(SourceItem),
    View(ViewItem),
    Sink(SinkItem),
}

impl Item {
    pub fn id(&self) -> RelationId {
        match self {
            Self::Source(s) => s.id,
            Self::View(v) => v.id,
            Self::Sink(s) => s.id,
        }
    }

    /// Id, name and kind, for a status.
    fn label(&self) -> (RelationId, String, &'static str) {
        match self {
            Self::Source(s) => (s.id, s.name.clone(), "source"),
            Self::View(v) => (v.id, v.name.clone(), "view"),
            Self::Sink(s) => (s.id, s.name.clone(), "sink"),
        }
    }
}

/// Contents of relations at one tick. They are decoded, and read back from the swap file, by who wants
/// them.
#[derive(Debug)]
pub struct Read {
    pub tick: Tick,
    /// By relation, one piece per worker.
    pub relations: BTreeMap<RelationId, Vec<FrozenContents>>,
}

impl Read {
    /// Rows of a relation.
    pub fn rows(&self, id: RelationId) -> u64 {
        let pieces = self.relations.get(&id).into_iter().flatten();
        pieces.map(FrozenContents::rows).sum()
    }
    /// All rows of a relation. Takes its time: not for a thread that others wait for.
    pub fn batches(&self, id: RelationId) -> Result<Vec<RecordBatch>> {
        let mut all = Vec::new();
        for piece in self.relations.get(&id).into_iter().flatten() {
            all.extend(piece.batches(None)?);
        }
        Ok(all)
    }
}

#[derive(Debug)]
enum Running {
    Source {
        item: Arc<SourceItem>,
    },
    View {
        item: Arc<ViewItem>,
        progress: Arc<Progress>,
        ready: watch::Receiver<bool>,
    },
    Sink {
        item: Arc<SinkItem>,
        progress: Arc<Progress>,
        status: Arc<SinkStatus>,
        confirmed: watch::Sender<bool>,
    },
    /// Could not be started with the engine; nothing of it runs.
    Failed {
        name: String,
        kind: &'static str,
        error: Error,
    },
}

#[derive(Debug)]
struct Inner {
    /// Its `workers` are those of all processes.
    config: EngineConfig,
    /// Of this process.
    local_workers: usize,
    /// To the worker processes.
    links: Vec<Arc<Link>>,
    signal: Arc<Signal>,
    shared: Arc<Shared>,
    requests: std::sync::mpsc::Sender<Request>,
    parts: PartSender,
    durable: watch::Receiver<Tick>,
    /// Why the remap log cannot be written at the moment.
    log_trouble: watch::Receiver<Option<String>>,
    items: Mutex<BTreeMap<RelationId, Running>>,
    /// What reads history, by relation.
    backfills: Mutex<BTreeMap<RelationId, Arc<Backfill>>>,
    /// What a relation offers to those that read it.
    offers: Mutex<BTreeMap<RelationId, InputInfo>>,
    next_checkpoint: AtomicU64,
    checkpointing: AsyncMutex<()>,
    creating: AsyncMutex<()>,
    last_checkpoint_tick: AtomicU64,
    /// What is held because it fails, and why.
    failed: Mutex<BTreeMap<RelationId, Error>>,
    /// Where the tasks of a sink say that it is broken.
    broken_sinks: mpsc::UnboundedSender<BrokenSink>,
    /// Why this run of the engine is to end.
    broken: watch::Sender<Option<BrokenSink>>,
    stopped: watch::Sender<bool>,
    /// Joined when the engine stops.
    threads: Mutex<Vec<std::thread::JoinHandle<()>>>,
}

/// Handle of the running engine.
#[derive(Debug, Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

impl Engine {
    fn ask(&self, request: Request) -> Result<()> {
        self.inner
            .requests
            .send(request)
            .map_err(|_| Error::unavailable("the engine has stopped"))?;
        self.inner.signal.raise();
        Ok(())
    }

    /// The same command to all workers.
    fn broadcast(&self, make: impl Fn() -> Command) -> Result<()> {
        let commands = (0..self.inner.config.workers).map(|_| make()).collect();
        self.ask(Request::Broadcast(commands))
    }

    /// Tells the worker processes how to make items that are created next.
    pub fn define(&self, definition: &Definition) -> Result<()> {
        if self.inner.links.is_empty() {
            return Ok(());
        }
        self.broadcast(|| Command::Define(Arc::clone(definition)))
    }

    /// Memory of the worker processes, from the first on, as they said last.
    pub fn resident_bytes(&self) -> Vec<u64> {
        let links = self.inner.links.iter();
        links.map(|link| link.resident_bytes()).collect()
    }

    /// Creates a source, a view or a sink. See the module contract.
    pub async fn create(&self, item: Item) -> Result<()> {
        let id = item.id();
        let result = self.create_now(item).await;
        if result.is_err() {
            // Nothing half-made stays behind.
            let _ = self.drop_items(&[id]).await;
        }
        result
    }

    async fn create_now(&self, item: Item) -> Result<()> {
        let hydrated = {
            let _one = self.inner.creating.lock().await;
            match item {
                Item::Source(item) => {
                    self.add_source(Arc::new(item))?;
                    return Ok(());
                }
                Item::View(item) => self.start_view(Arc::new(item), true)?,
                Item::Sink(item) => self.start_sink(Arc::new(item), true).await?,
            }
        };
        hydrated
            .await
            .unwrap_or_else(|_| Err(Error::unavailable("the engine has stopped")))
    }

    /// Removes items; the caller has made sure that nothing else reads them.
    pub async fn drop_items(&self, ids: &[RelationId]) -> Result<()> {
        let mut dataflows = Vec::new();
        {
            let mut items = lock(&self.inner.items);
            let mut offers = lock(&self.inner.offers);
            for id in ids {
                if let Some(backfill) = lock(&self.inner.backfills).remove(id) {
                    backfill.cancel();
                }
                let mut dataflow = *id;
                match items.remove(id) {
                    Some(Running::Source { item }) => {
                        offers.remove(&item.rejected);
                        lock(&self.inner.shared.sources).remove(id);
                    }
                    Some(Running::View { item, .. }) => {
                        dataflow = item.dataflow;
                        offers.remove(&item.errors);
                        offers.remove(&item.late);
                    }
                    Some(Running::Sink { .. } | Running::Failed { .. }) | None => {}
                }
                offers.remove(id);
                dataflows.push(dataflow);
            }
        }
        self.ask(Request::Drop(dataflows.into()))
    }

    /// The contents of relations (views, `$errors`, `$late`, `$rejected`) at one tick.
    pub async fn read(&self, ids: &[RelationId]) -> Result<Read> {
        self.read_with(ids, None).await
    }

    async fn read_with(&self, ids: &[RelationId], follow: Option<Follower>) -> Result<Read> {
        tokio::time::timeout(READ_TIMEOUT, self.read_now(ids, follow))
            .await
            .unwrap_or_else(|_| {
                let mut error =
                    Error::new(ErrorKind::Unavailable, "the answer did not come in time")
                        .code("57014");
                if let Some(laggard) = self.laggard() {
                    error = error.detail(format!("\"{laggard}\" is behind"));
                }
                Err(error)
            })
    }

    async fn read_now(&self, ids: &[RelationId], follow: Option<Follower>) -> Result<Read> {
        self.wait_ready(ids).await?;
        let mut relations: BTreeMap<RelationId, Vec<FrozenContents>> =
            ids.iter().map(|id| (*id, Vec::new())).collect();
        if ids.is_empty() {
            return Ok(Read {
                tick: self.inner.shared.last_tick.load(Ordering::Relaxed),
                relations,
            });
        }
        let (answer, mut answers) = mpsc::unbounded_channel();
        self.ask(subscribe::mark(ids, answer, follow))?;
        let mut outstanding = relations.len() * self.inner.config.workers;
        let mut tick = 0;
        while outstanding > 0 {
            let Some((at, id, contents)) = answers.recv().await else {
                return Err(Error::new(
                    ErrorKind::Conflict,
                    "a relation was dropped while it was read",
                ));
            };
            outstanding -= 1;
            // The mark was minted before any answer, so the last tick is at or after it.
            tick = at.max(tick);
            relations.entry(id).or_default().push(contents);
        }
        self.wait_durable(tick).await?;
        Ok(Read { tick, relations })
    }

    /// Waits until views among `ids` have their history.
    async fn wait_ready(&self, ids: &[RelationId]) -> Result<()> {
        let mut waits = Vec::new();
        {
            let items = lock(&self.inner.items);
            let offers = lock(&self.inner.offers);
            for id in ids {
                if let Some(Running::Failed { name, error, .. }) = items.get(id) {
                    return Err(Error::unavailable(format!(
                        "\"{name}\" has failed and does not run"
                    ))
                    .code("55000")
                    .detail(error.message.clone()));
                }
                if !offers.contains_key(id) {
                    return Err(
                        Error::new(ErrorKind::NotFound, "the relation does not run").code("42P01")
                    );
                }
                for running in items.values() {
                    if let Running::View { item, ready, .. } = running
                        && (item.id == *id || item.errors == *id || item.late == *id)
                    {
                        waits.push(ready.clone());
                    }
                }
            }
        }
        for mut ready in waits {
            ready.wait_for(|r| *r).await.map_err(|_| {
                Error::new(
                    ErrorKind::Conflict,
                    "the view was dropped or could not be started",
                )
            })?;
        }
        Ok(())
    }

    async fn wait_durable(&self, tick: Tick) -> Result<()> {
        let mut durable = self.inner.durable.clone();
        let mut trouble = self.inner.log_trouble.clone();
        tokio::select! {
            biased;
            reached = durable.wait_for(|t| *t >= tick) => reached
                .map(|_| ())
                .map_err(|_| log_error(self.inner.log_trouble.borrow().as_deref()))?,
            Ok(why) = trouble.wait_for(Option::is_some) => return Err(log_error(why.as_deref())),
        }
        let mut held = self.inner.shared.held_from.subscribe();
        held.wait_for(|from| from.is_none_or(|from| tick < from))
            .await
            .map(|_| ())
            .map_err(|_| Error::unavailable("the engine has stopped"))
    }

    /// What keeps the engine from making progress, if anything does.
    pub fn trouble(&self) -> Option<Error> {
        if let Some(why) = self.inner.log_trouble.borrow().as_deref() {
            return Some(log_error(Some(why)));
        }
        if let Some(e) = lock(&self.inner.shared.checkpoint_trouble).as_ref() {
            let error =
                Error::unavailable("no checkpoint can be taken: a restart would take longer");
            let error = error.code(e.code).detail(e.message.clone());
            return Some(match &e.hint {
                Some(hint) => error.hint(hint.clone()),
                None => error,
            });
        }
        if let Some(error) = self.slow_checkpoint() {
            return Some(error);
        }
        if let Some(why) = self
            .inner
            .config
            .pager
            .as_ref()
            .and_then(|pager| pager.trouble())
        {
            return Some(swap_error(why));
        }
        lock(&self.inner.items)
            .values()
            .find_map(|item| match item {
                Running::Sink { item, status, .. } if status.disk_full.load(Ordering::Relaxed) => {
                    Some(
                        Error::unavailable(format!(
                            "the disk that sink \"{}\" writes to is full",
                            item.name
                        ))
                        .code("53100")
                        .hint("free space; the sink goes on by itself"),
                    )
                }
                _ => None,
            })
    }

    /// A checkpoint that has not ended for long.
    fn slow_checkpoint(&self) -> Option<Error> {
        let began = *lock(&self.inner.shared.checkpoint_began);
        let elapsed = began?.elapsed();
        let interval = self.intervals().checkpoint_interval;
        if elapsed < CHECKPOINT_PATIENCE.max(4 * interval) {
            return None;
        }
        let error = Error::unavailable(format!(
            "a checkpoint has been under way for {} s: a restart would take longer",
            elapsed.as_secs()
        ))
        .hint("see millrace.state for large state, and whether the store of checkpoints is slow; if it does not end, restart the server: nothing is lost");
        Some(match self.laggard() {
            Some(laggard) => error.detail(format!("\"{laggard}\" is behind")),
            None => error,
        })
    }

    /// What the memory budget of state has done; `None` without one.
    pub fn pager_stats(&self) -> Option<PagerStats> {
        self.inner.config.pager.as_ref().map(|pager| pager.stats())
    }

    /// Takes a checkpoint now; its id.
    pub async fn checkpoint(&self) -> Result<u64> {
        Ok(self.checkpoint_now().await?.id)
    }

    async fn checkpoint_now(&self) -> Result<Finished> {
        let _one = self.inner.checkpointing.lock().await;
        self.checkpoint_by(|id, done| Request::Checkpoint { id, done })
            .await
    }

    /// Takes the checkpoint that a request begins. Runs under the lock `checkpointing`.
    async fn checkpoint_by(
        &self,
        request: impl FnOnce(u64, oneshot::Sender<Result<Finished>>) -> Request,
    ) -> Result<Finished> {
        let id = self.inner.next_checkpoint.fetch_add(1, Ordering::Relaxed);
        let (done, finished) = oneshot::channel();
        *lock(&self.inner.shared.checkpoint_began) = Some(Instant::now());
        let finished = match self.ask(request(id, done)) {
            Ok(()) => finished
                .await
                .unwrap_or_else(|_| Err(Error::unavailable("the engine has stopped"))),
            Err(e) => Err(e),
        };
        lock(&self.inner.shared.checkpoint_began).take();
        let finished = finished?;
        let stats = &self.inner.shared.stats;
        stats.checkpoints.fetch_add(1, Ordering::Relaxed);
        stats
            .checkpoint_ms
            .fetch_add(finished.ms, Ordering::Relaxed);
        stats
            .checkpoint_bytes
            .store(finished.bytes, Ordering::Relaxed);
        stats
            .checkpoint_tick
            .store(finished.tick, Ordering::Relaxed);
        self.inner
            .last_checkpoint_tick
            .store(finished.tick, Ordering::Relaxed);
        crate::blame::checkpointed(finished.tick);
        // Replay needs only what lies above the checkpoint before this one.
        self.ask(Request::RollRemap {
            oldest: finished.oldest,
        })?;
        tracing::debug!(
            id = finished.id,
            tick = finished.tick,
            bytes = finished.bytes,
            ms = finished.ms,
            "checkpoint"
        );
        Ok(finished)
    }

    /// Final epoch and checkpoint, then the workers end.
    pub async fn stop(&self) -> Result<()> {
        let result = self.commit_all().await;
        let result = match result {
            // A disk that is full must not keep the server from stopping.
            Ok(()) => tokio::time::timeout(LAST_CHECKPOINT, self.checkpoint())
                .await
                .unwrap_or_else(|_| {
                    Err(Error::unavailable(
                        "the last checkpoint did not end in time",
                    ))
                })
                .map(|_| ()),
            Err(e) => Err(e),
        };
        self.inner.stopped.send_replace(true);
        let _ = self.ask(Request::Stop);
        let threads = std::mem::take(&mut *lock(&self.inner.threads));
        let _ =
            tokio::task::spawn_blocking(move || threads.into_iter().for_each(|t| drop(t.join())))
                .await;
        result
    }

    /// Ends the epoch of every sink that has uncommitted rows and waits a while for the commits.
    async fn commit_all(&self) -> Result<()> {
        let mut waits = Vec::new();
        for running in lock(&self.inner.items).values() {
            if let Running::Sink { item, status, .. } = running
                && !status.failed.load(Ordering::Relaxed)
                && !status.paused.load(Ordering::Relaxed)
            {
                waits.push((item.id, Arc::clone(status)));
            }
        }
        let from = self.inner.shared.last_tick.load(Ordering::Relaxed);
        for (id, _) in &waits {
            self.ask(Request::Epoch(*id))?;
        }
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        for (_, status) in waits {
            while status.committed.load(Ordering::Relaxed) <= from
                && tokio::time::Instant::now() < deadline
            {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        Ok(())
    }

    /// Returns when a sink is broken. No checkpoint ends any more: whoever runs the engine ends it, without
    /// [`Engine::stop`], and starts it again; with the sink among those that fail, unless another try may
    /// help.
    pub async fn broken(&self) -> BrokenSink {
        let mut broken = self.inner.broken.subscribe();
        let why = broken.wait_for(Option::is_some).await;
        match why.ok().and_then(|why| why.clone()) {
            Some(why) => why,
            // The engine is gone.
            None => std::future::pending().await,
        }
    }

    /// Hears what the tasks of sinks say. One that no checkpoint holds yet is taken back alone.
    fn watch_sinks(&self, mut said: mpsc::UnboundedReceiver<BrokenSink>) {
        let engine = self.clone();
        let mut stopped = self.inner.stopped.subscribe();
        tokio::spawn(async move {
            loop {
                let broken = tokio::select! {
                    Some(broken) = said.recv() => broken,
                    _ = stopped.wait_for(|s| *s) => return,
                };
                let backfill = lock(&engine.inner.backfills).get(&broken.id).cloned();
                match backfill.filter(|b| b.fail(&broken.error)) {
                    // Its writer answers no mark; without it checkpoints do not wait for that.
                    Some(_) => drop(engine.ask(Request::Drop([broken.id].into()))),
                    None => drop(engine.inner.broken.send_replace(Some(broken))),
                }
            }
        });
    }

    pub fn stats(&self) -> EngineStats {
        self.inner.shared.stats()
    }
}

#[cfg(test)]
mod tests;
