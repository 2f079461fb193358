//! Starting: find the last good checkpoint, restore it, replay the bindings after it, go live.
//!
//! # Protocol
//!
//! 1. Read `latest`; verify its manifest and objects. If they are damaged or gone, the checkpoint
//!    before it is used (its bindings are still in the remap log); any other trouble ends the start.
//! 2. Start the workers; make sources known; install and attach everything the manifest holds, with
//!    its state; attach sinks at what their destinations hold.
//! 3. Replay the bindings above the checkpoint's tick: equal offsets, equal ticks, equal watermarks.
//! 4. Let the sources run; attach what no checkpoint holds.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

use tokio::sync::{Mutex as AsyncMutex, mpsc, watch};

use super::install::Wanted;
use super::minter::{Minter, Request};
use super::shared::{Settings, Shared};
use super::{
    Engine, EngineConfig, Inner, Item, Meta, Running, SinkItem, SourceItem, ViewItem, sinks,
};
use crate::checkpoint::PartSender;
use crate::checkpoint::RestoredDataflow;
use crate::checkpoint::collector::{Collector, Kept};
use crate::checkpoint::manifest::CheckpointManifest;
use crate::checkpoint::parts::Held;
use crate::checkpoint::store::CheckpointStore;
use crate::cluster::Peers;
use crate::cluster::link::Link;
use crate::error::{Error, ErrorKind, Result};
use crate::ingest::{Signal, lock};
use crate::plan::RelationId;
use crate::remap::log::{Rules, fits_destination};
use crate::remap::{self, RemapLog};
use crate::tick::{TickInfo, held_relation};
use crate::time::Tick;
use crate::worker;
use crate::worker::command::{AddSource, Command, WorkerHandle};
use crate::worker::start::Mesh;

/// The shortest time between two ticks.
const TICK_MIN: std::time::Duration = std::time::Duration::from_millis(10);

/// What a checkpoint holds, by dataflow.
type State = BTreeMap<RelationId, Arc<RestoredDataflow>>;

/// The checkpoint a start begins at. See [`Engine::find`].
pub struct Found {
    manifest: Option<CheckpointManifest>,
    state: State,
    latest: Option<u64>,
    kept: Vec<Kept>,
    next_id: u64,
}

impl std::fmt::Debug for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Found({:?})", self.latest)
    }
}

impl Found {
    /// Whether the checkpoint holds a dataflow, or the position of a source.
    pub fn holds(&self, dataflow: RelationId) -> bool {
        self.manifest.as_ref().is_some_and(|m| {
            m.views.contains_key(&dataflow)
                || m.sinks.contains_key(&dataflow)
                || m.sources.contains_key(&dataflow)
        })
    }
}

/// Step 1.
async fn find(store: &CheckpointStore, meta: &dyn Meta, incarnation: u64) -> Result<Found> {
    let latest = meta.latest_checkpoint().await?;
    let ids = store.list().await?;
    let next_id = ids
        .iter()
        .copied()
        .chain(latest)
        .max()
        .map_or(1, |id| id + 1)
        // Never an id that a server which was taken over may still use.
        .max(incarnation << 32);
    if latest.is_none() && incarnation == 1 && !ids.is_empty() {
        return Err(Error::new(
            ErrorKind::Corrupt,
            "the metadata is new, but there are checkpoints of an older server",
        )
        .hint(
            "restore metadata.db (with metadata.db-wal) from a copy, or use another data directory",
        ));
    }
    let Some(newest) = latest else {
        return Ok(Found {
            manifest: None,
            state: State::new(),
            latest,
            kept: Vec::new(),
            next_id,
        });
    };
    let mut candidates: Vec<u64> = ids.into_iter().filter(|id| *id <= newest).collect();
    if !candidates.contains(&newest) {
        candidates.push(newest);
    }
    let mut damage = None;
    let mut kept = Vec::new();
    let mut found = None;
    for id in candidates.into_iter().rev().take(2) {
        let restored = match store.manifest(id).await {
            Ok(manifest) => {
                if found.is_some() {
                    kept.push(Kept::of(&manifest));
                    continue;
                }
                store
                    .restore(&manifest)
                    .await
                    .map(|state| (manifest, state))
            }
            Err(e) => Err(e),
        };
        match restored {
            Ok((manifest, state)) => {
                kept.push(Kept::of(&manifest));
                let state = state.into_iter().map(|(id, s)| (id, Arc::new(s))).collect();
                found = Some((manifest, state));
            }
            Err(e) if found.is_some() => {
                tracing::warn!(error = %e, "an older checkpoint cannot be read")
            }
            Err(e) if matches!(e.kind, ErrorKind::Corrupt | ErrorKind::NotFound) => {
                tracing::error!(error = %e, checkpoint = id, "a checkpoint cannot be used");
                damage = Some(e);
            }
            // It may well be good: a store that does not answer, or a newer format, is no reason to
            // go back behind what was shown.
            Err(e) => return Err(e),
        }
    }
    match found {
        Some((manifest, state)) => Ok(Found {
            manifest: Some(manifest),
            state,
            latest,
            kept,
            next_id,
        }),
        None if damage
            .as_ref()
            .is_none_or(|e| e.kind == ErrorKind::NotFound) =>
        {
            let error = Error::new(
                ErrorKind::Corrupt,
                format!("checkpoint {newest} is not where checkpoints are kept"),
            )
            .hint("was --checkpoints changed, or its directory moved? Say where it is now; otherwise restore the data directory, with its checkpoints, from one copy");
            Err(match damage {
                Some(e) => error.detail(e.detail.unwrap_or(e.message)),
                None => error,
            })
        }
        // Never start from nothing when there was something.
        None => Err(damage.unwrap_or_else(|| {
            Error::new(
                ErrorKind::Corrupt,
                format!("checkpoint {newest} is missing"),
            )
            .hint("restore the data directory from a backup")
        })),
    }
}

/// Begins to talk with the worker processes and tells them what there is to install.
fn connect(
    peers: Option<Peers>,
    workers: usize,
    parts: &PartSender,
    shared: &Shared,
) -> Result<(Vec<Arc<Link>>, Option<Mesh>)> {
    let Some(peers) = peers else {
        return Ok((Vec::new(), None));
    };
    let mut links = Vec::new();
    for (index, control) in peers.connections.controls.into_iter().enumerate() {
        let link = Link::start(
            control,
            index + 1,
            workers,
            peers.connections.timing,
            parts.clone(),
            Arc::clone(&shared.queued_bytes),
            peers.lost.clone(),
        )?;
        for definition in &peers.definitions {
            link.define(Arc::clone(definition));
        }
        links.push(Arc::new(link));
    }
    let mesh = Mesh {
        process: 0,
        sockets: peers.connections.mesh,
    };
    Ok((links, Some(mesh)))
}

impl Engine {
    /// Looks for the last good checkpoint: what it holds decides which plan of a view that was being
    /// replaced is the valid one.
    pub async fn find(config: &EngineConfig, meta: &dyn Meta) -> Result<Found> {
        let store = config.store()?;
        find(&store, meta, config.incarnation).await
    }

    /// Starts the engine with what the catalog lists. See [`super`].
    pub async fn start(
        config: EngineConfig,
        meta: Arc<dyn Meta>,
        items: Vec<Item>,
    ) -> Result<Self> {
        let found = Self::find(&config, meta.as_ref()).await?;
        Self::start_with(config, meta, found, items, None).await
    }

    /// As [`Engine::start`], from what [`Engine::find`] has found, with worker processes.
    pub async fn start_with(
        mut config: EngineConfig,
        meta: Arc<dyn Meta>,
        found: Found,
        items: Vec<Item>,
        peers: Option<Peers>,
    ) -> Result<Self> {
        let store = config.store()?;
        let (part_sender, part_receiver) = mpsc::unbounded_channel();
        let parts = PartSender(part_sender);
        let shared = Arc::new(Shared::default());
        shared.settings.send_replace(Settings {
            checkpoint_interval: config.checkpoint_interval,
            commit_interval: config.commit_interval,
        });
        let local_workers = config.workers;
        let (links, mesh) = connect(peers, local_workers, &parts, &shared)?;
        config.workers *= 1 + links.len();
        let remap_dir = config.dir.join("remap");
        let base = found.manifest.as_ref().map(|m| m.tick);
        let (remap, bindings) = RemapLog::take_over(&remap_dir, base, config.incarnation)?;
        let base = base.unwrap_or(0);
        crate::blame::checkpointed(base);
        let mut workers =
            worker::start::start(local_workers, parts.clone(), config.pager.clone(), mesh)?;
        for link in &links {
            if let Some(manifest) = &found.manifest {
                link.restore(manifest.id);
            }
            workers
                .handles
                .extend((0..local_workers).map(|worker| WorkerHandle::Remote {
                    link: Arc::clone(link),
                    worker,
                }));
        }
        let signal = Arc::new(Signal::default());
        let (requests, request_receiver) = channel();
        let durable = remap.durable();
        let log_trouble = remap.trouble();
        let collector = Collector {
            workers: local_workers,
            links: links.clone(),
            incarnation: config.incarnation,
            store,
            meta,
            durable: durable.clone(),
            kept: found.kept.clone(),
            shared: Arc::clone(&shared),
            latest: found.latest,
            held: Held::new(),
        };
        tokio::spawn(collector.run(part_receiver));
        let minter = Minter::new(
            workers.handles.clone(),
            remap,
            Arc::clone(&signal),
            Arc::clone(&shared),
            parts.clone(),
            config.incarnation,
            TICK_MIN,
            config.max_rows_in_flight,
            Arc::clone(&config.waiting),
            base,
        );
        let failed = config
            .failed
            .iter()
            .map(|(id, failing)| (*id, failing.error.clone()))
            .collect();
        let (broken_sinks, broken) = mpsc::unbounded_channel();
        let inner = Inner {
            config,
            local_workers,
            links,
            signal,
            shared,
            requests,
            parts,
            durable,
            log_trouble,
            items: Mutex::new(BTreeMap::new()),
            backfills: Mutex::default(),
            offers: Mutex::new(BTreeMap::new()),
            next_checkpoint: AtomicU64::new(found.next_id),
            checkpointing: AsyncMutex::new(()),
            creating: AsyncMutex::new(()),
            last_checkpoint_tick: AtomicU64::new(base),
            failed: Mutex::new(failed),
            broken_sinks,
            broken: watch::Sender::default(),
            stopped: watch::channel(false).0,
            threads: Mutex::new(vec![workers.thread]),
        };
        let engine = Self {
            inner: Arc::new(inner),
        };
        engine.watch_sinks(broken);
        let later = engine
            .restore(minter, request_receiver, &found, bindings, items)
            .await?;
        for item in later {
            // Attached anew, in the background: readiness does not wait for history.
            let engine = engine.clone();
            let (id, name, kind) = item.label();
            let hydrated = match item {
                Item::Source(item) => engine
                    .add_source(Arc::new(item))
                    .map(|()| tokio::sync::oneshot::channel().1),
                Item::View(item) => engine.start_view(Arc::new(item), false),
                Item::Sink(item) => engine.start_sink(Arc::new(item), false).await,
            };
            if let Err(e) = hydrated {
                engine.note_failed(id, name, kind, e);
            }
        }
        engine.checkpoint_regularly();
        Ok(engine)
    }

    /// Steps 2 to 4; the items that no checkpoint holds.
    async fn restore(
        &self,
        mut minter: Minter,
        requests: Receiver<Request>,
        found: &Found,
        bindings: Vec<remap::Binding>,
        items: Vec<Item>,
    ) -> Result<Vec<Item>> {
        let mut later = Vec::new();
        let base = found.manifest.as_ref().map_or(0, |m| m.tick);
        let bound = bindings.last().map_or(base, |b| b.tick);
        // What was held before, at whatever tick.
        let stored = found.manifest.iter().flat_map(|m| m.held.keys());
        let replayed = bindings.iter().flat_map(|b| b.held.keys());
        let holds: BTreeSet<RelationId> = stored.chain(replayed).copied().collect();
        for item in items {
            let (id, name, kind) = item.label();
            let stored = match &item {
                Item::View(view) => found.holds(view.dataflow),
                Item::Sink(sink) => {
                    let manifest = found.manifest.as_ref();
                    manifest.is_some_and(|m| m.sinks.contains_key(&sink.id))
                }
                Item::Source(_) => true,
            };
            if let Some(failing) = self.inner.config.failed.get(&id) {
                match failing.at {
                    Some(at) if stored => {
                        minter.failing.insert(id, at);
                    }
                    // Without a place among the ticks there is nothing that could be held.
                    _ => {
                        self.note_failed(id, name, kind, failing.error.clone());
                        continue;
                    }
                }
            }
            match (item, &found.manifest) {
                (Item::Source(source), manifest) => {
                    let source = Arc::new(source);
                    self.restore_source(&mut minter, &source, manifest.as_ref(), &found.state);
                }
                (Item::View(view), Some(manifest))
                    if manifest.views.contains_key(&view.dataflow) =>
                {
                    if manifest.views[&view.dataflow] != view.plan.fingerprint {
                        // The plan means something else now: its state does not fit, it is built again.
                        tracing::warn!(view = %view.name, "the plan has changed, the view is built again");
                        later.push(Item::View(view));
                        continue;
                    }
                    if self.inputs(&super::install::wanted(&view.plan)).is_err() {
                        // What it reads is built again, so it is too.
                        later.push(Item::View(view));
                        continue;
                    }
                    self.restore_view(&mut minter, Arc::new(view), &found.state)?;
                }
                (Item::Sink(sink), Some(manifest)) if manifest.sinks.contains_key(&sink.id) => {
                    if self.offer(sink.from).is_err() {
                        // Its table holds what the old plan gave; going on would mix the two.
                        let e = Error::unsupported("what the sink reads is built again")
                            .hint("drop the sink and create it anew, into another table");
                        self.note_failed(sink.id, sink.name, "sink", e);
                        continue;
                    }
                    let (id, name) = (sink.id, sink.name.clone());
                    if let Err(e) = self
                        .restore_sink(
                            &mut minter,
                            Arc::new(sink),
                            manifest,
                            &found.state,
                            &holds,
                            bound,
                        )
                        .await
                    {
                        if e.kind == ErrorKind::Unavailable {
                            // Without it the next checkpoint would not hold it any more.
                            let message =
                                format!("cannot start with sink \"{name}\": {}", e.message);
                            return Err(Error { message, ..e });
                        }
                        self.note_failed(id, name, "sink", e);
                    }
                }
                (other, _) => later.push(other),
            }
        }
        if let Some(manifest) = &found.manifest {
            let watermarks = manifest
                .sources
                .iter()
                .map(|(id, s)| (*id, s.watermark))
                .collect();
            let seed = Arc::new(TickInfo {
                tick: manifest.tick,
                watermarks,
                held: Arc::new(manifest.held.clone()),
                ..TickInfo::default()
            });
            minter.restore_holds(&manifest.held);
            for worker in &minter.workers {
                worker.send(Command::Seed(Arc::clone(&seed)));
            }
        }
        let run = move || -> Result<()> {
            let mut readers = minter.open_for_replay(&bindings)?;
            if !bindings.is_empty() {
                tracing::info!(
                    ticks = bindings.len(),
                    "replaying the ticks after the checkpoint"
                );
            }
            for binding in &bindings {
                minter.replay(binding, &mut readers)?;
                crate::env::failpoint("recover.mid_replay");
            }
            minter.go_live(readers)?;
            std::thread::Builder::new()
                .name("minter".into())
                .spawn(move || minter.run(&requests))
                .map_err(|e| Error::unavailable(e.to_string()))?;
            Ok(())
        };
        tokio::task::spawn_blocking(run)
            .await
            .map_err(|e| Error::internal(e.to_string()))??;
        Ok(later)
    }

    /// Shows an item that could not be started.
    fn note_failed(&self, id: RelationId, name: String, kind: &'static str, error: Error) {
        tracing::error!(%name, kind, %error, "could not be started, the others run");
        lock(&self.inner.items).insert(id, Running::Failed { name, kind, error });
    }

    fn restore_source(
        &self,
        minter: &mut Minter,
        source: &Arc<SourceItem>,
        manifest: Option<&CheckpointManifest>,
        state: &State,
    ) {
        self.register_source(source);
        let position = manifest.and_then(|m| m.sources.get(&source.id)).cloned();
        minter.add_source(Arc::clone(source), position);
        let add = Arc::new(AddSource {
            id: source.id,
            rejected: source.rejected,
            restored: state.get(&source.id).cloned(),
        });
        for worker in &minter.workers {
            worker.send(Command::AddSource(Arc::clone(&add)));
        }
    }

    fn restore_view(&self, minter: &mut Minter, item: Arc<ViewItem>, state: &State) -> Result<()> {
        let state = state.get(&item.dataflow).cloned().unwrap_or_default();
        let install = self.view_install(&item, false, Some(state))?;
        self.register_view(&item, &install.inputs);
        let progress = Arc::clone(&install.progress);
        for worker in &minter.workers {
            worker.send(Command::Install(Arc::clone(&install)));
        }
        minter.attach_restored(&install, false, item.plan.fingerprint);
        let ready = watch::channel(true).1;
        lock(&self.inner.items).insert(
            item.id,
            Running::View {
                item,
                progress,
                ready,
            },
        );
        Ok(())
    }

    async fn restore_sink(
        &self,
        minter: &mut Minter,
        item: Arc<SinkItem>,
        manifest: &CheckpointManifest,
        stored: &State,
        holds: &BTreeSet<RelationId>,
        bound: Tick,
    ) -> Result<()> {
        let state = manifest.sinks.get(&item.id).cloned();
        let running = sinks::start(
            item.id,
            Arc::clone(&item.sink),
            item.commit_interval,
            state,
            self.sink_context(item.id),
        )
        .await?;
        let failing = self.fails_from(&self.sink_wanted(&item)?, item.id, holds)?;
        if failing.is_some_and(|since| running.skip_below > since) {
            // What was committed from that tick on would come again, in other ticks.
            return Err(Error::new(
                ErrorKind::Corrupt,
                "the destination holds more of this sink than can be repeated",
            )
            .detail("a relation failed in ticks that an earlier server had applied")
            .hint("drop the sink and create it anew, into another table"));
        }
        if !fits_destination(running.skip_below, bound, Rules::ALL) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "the destination holds more of this sink than the remap log knows",
            )
            .detail(format!(
                "committed up to tick {}, the log ends with {bound}",
                running.skip_below
            ))
            .hint("restore engine/remap from a copy, or drop the sink and create it anew, into another table"));
        }
        // What waits in front of it, if anything does.
        let state = stored.get(&item.id).cloned().unwrap_or_default();
        let install = self.sink_install(&item, &running, running.skip_below, Some(state))?;
        let progress = Arc::clone(&install.progress);
        progress
            .counters
            .last_rows
            .store(running.pending_below, Ordering::Relaxed);
        for worker in &minter.workers {
            worker.send(Command::Install(Arc::clone(&install)));
        }
        minter.attach_restored(&install, true, 0);
        lock(&self.inner.items).insert(
            item.id,
            Running::Sink {
                item,
                progress,
                status: running.status,
                confirmed: running.confirmed,
            },
        );
        Ok(())
    }

    /// The first tick from which on something is held now, and was not before, that a sink gets its rows
    /// through.
    fn fails_from(
        &self,
        wanted: &Wanted,
        sink: RelationId,
        holds: &BTreeSet<RelationId>,
    ) -> Result<Option<Tick>> {
        let inputs = self.inputs(wanted)?;
        let sources = inputs.values().flat_map(|input| &input.sources);
        let through = sources.filter_map(|s| held_relation(*s)).chain([sink]);
        let since = through.filter_map(|relation| {
            let failing = self.inner.config.failed.get(&relation)?;
            failing.at.filter(|_| !holds.contains(&relation))
        });
        Ok(since.min())
    }

    /// A checkpoint per interval, if anything was minted since the last one.
    fn checkpoint_regularly(&self) {
        let engine = self.clone();
        let mut stopped = self.inner.stopped.subscribe();
        tokio::spawn(async move {
            let mut settings = engine.inner.shared.settings.subscribe();
            let mut before = tokio::time::Instant::now();
            loop {
                let interval = settings.borrow_and_update().checkpoint_interval;
                tokio::select! {
                    () = tokio::time::sleep_until(before + interval) => {}
                    Ok(()) = settings.changed() => continue,
                    () = engine.inner.shared.checkpoint_soon.notified() => {}
                    _ = stopped.wait_for(|s| *s) => return,
                }
                before = tokio::time::Instant::now();
                let last = engine.inner.shared.last_tick.load(Ordering::Relaxed);
                if last <= engine.inner.last_checkpoint_tick.load(Ordering::Relaxed) {
                    continue;
                }
                match engine.checkpoint_now().await {
                    Ok(_) => drop(lock(&engine.inner.shared.checkpoint_trouble).take()),
                    Err(e) if e.kind == ErrorKind::Conflict => {
                        // Another server owns the data now. The service sees it in its lease and ends.
                        tracing::error!(error = %e, "this server was fenced");
                        return;
                    }
                    Err(e) => {
                        tracing::error!(error = %e, "no checkpoint could be taken");
                        *lock(&engine.inner.shared.checkpoint_trouble) = Some(e);
                    }
                }
            }
        });
    }
}
