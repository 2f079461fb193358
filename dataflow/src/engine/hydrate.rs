//! Creating a view or a sink while others run: history first, then the live changes from one tick on.
//!
//! # Protocol
//!
//! 1. The relation is known, as one that reads its history. When what it reads has its own, the dataflow
//!    is installed; nothing flows.
//! 2. For each source that has already bound offsets, a private reader replays history in private
//!    ticks, up to what is bound at the moment, again and again until little is missing.
//! 3. The minter attaches the dataflow at tick A; the reader reads up to the binding of A.
//! 4. Once A is applied, a checkpoint is taken; when it is durable, the relation is shown.
//!
//! What fails on the way is taken back: by the statement that waits for it, or else it is shown as failed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use super::backfill::{Backfill, was_asked_for};
use super::install::{Wanted, wanted, wanted_of};
use super::minter::{AttachRequest, Request};
use super::{Engine, Running, SinkItem, SourceItem, ViewItem, sinks};
use crate::blame;
use crate::error::{Error, ErrorKind, Result};
use crate::ingest::{Preparer, lock, read_to_limit};
use crate::plan::RelationId;
use crate::source::{Offsets, Reader};
use crate::time::Tick;
use crate::worker::command::{AddSource, Body, Command, Install};

/// Rows of history in one private tick.
const HISTORY_ROWS: usize = 64 * 1024;
/// Private ticks in flight.
const HISTORY_TICKS: Tick = 4;
/// Rows that may still be missing when the dataflow is attached.
const NEARLY_LEVEL: u64 = 64 * 1024;

/// Between two tries to take the checkpoint that holds it.
const PAUSE: Duration = Duration::from_millis(500);

/// Ends when the item is part of a checkpoint.
pub(super) type Hydrated = oneshot::Receiver<Result<()>>;

/// What is being hydrated.
pub(super) struct Hydration {
    /// Of the relation or the sink.
    pub id: RelationId,
    pub install: Arc<Install>,
    pub backfill: Arc<Backfill>,
    pub wanted: Wanted,
    /// Of a view's plan.
    pub fingerprint: u64,
}

/// A private reader of one source.
pub(super) struct History {
    source: RelationId,
    name: String,
    /// Where its splits began when they were first read.
    starts: BTreeMap<String, u64>,
    readers: Vec<Box<dyn Reader>>,
    preparer: Preparer,
}

impl Engine {
    pub(super) fn add_source(&self, item: Arc<SourceItem>) -> Result<()> {
        self.register_source(&item);
        self.ask(Request::AddSource(Arc::clone(&item), None))?;
        let add = Arc::new(AddSource {
            id: item.id,
            rejected: item.rejected,
            restored: None,
        });
        self.broadcast(|| Command::AddSource(Arc::clone(&add)))
    }

    /// Makes a view known and begins to hydrate it.
    pub(super) fn start_view(&self, item: Arc<ViewItem>, asked: bool) -> Result<Hydrated> {
        crate::render::check::check(&item.plan)?;
        let install = self.view_install(&item, false, None)?;
        let backfill = self.backfill(&item.name, "view", false, asked, &install);
        self.register_view(&item, &install.inputs);
        let (ready_sender, ready) = watch::channel(false);
        lock(&self.inner.items).insert(
            item.id,
            Running::View {
                item: Arc::clone(&item),
                progress: Arc::clone(&install.progress),
                ready,
            },
        );
        self.note_backfill(item.id, &backfill);
        let hydration = Hydration {
            id: item.id,
            install,
            backfill,
            wanted: wanted(&item.plan),
            fingerprint: item.plan.fingerprint,
        };
        Ok(self.hydrate(hydration, move || {
            ready_sender.send_replace(true);
        }))
    }

    /// Makes a sink known and begins to hydrate it.
    pub(super) async fn start_sink(&self, item: Arc<SinkItem>, asked: bool) -> Result<Hydrated> {
        let wanted = self.sink_wanted(&item)?;
        let running = sinks::start(
            item.id,
            Arc::clone(&item.sink),
            item.commit_interval,
            None,
            self.sink_context(item.id),
        )
        .await?;
        // A new sink starts from the contents, whatever an older one has left in the table.
        let install = self.sink_install(&item, &running, 0, None)?;
        let backfill = self.backfill(&item.name, "sink", false, asked, &install);
        let confirmed = running.confirmed.clone();
        lock(&self.inner.items).insert(
            item.id,
            Running::Sink {
                item: Arc::clone(&item),
                progress: Arc::clone(&install.progress),
                status: running.status,
                confirmed: running.confirmed,
            },
        );
        self.note_backfill(item.id, &backfill);
        let hydration = Hydration {
            id: item.id,
            install,
            backfill,
            wanted,
            fingerprint: 0,
        };
        Ok(self.hydrate(hydration, move || {
            confirmed.send_replace(true);
        }))
    }

    /// A backfill of what `install` reads.
    pub(super) fn backfill(
        &self,
        name: &str,
        kind: &'static str,
        replaces: bool,
        asked: bool,
        install: &Install,
    ) -> Arc<Backfill> {
        let contents = self.contents_of(install.inputs.keys().copied());
        Arc::new(Backfill::new(
            (name.to_string(), kind),
            replaces,
            asked,
            contents,
            Arc::clone(&install.progress),
        ))
    }

    /// Step 1, once what it reads has its own history.
    pub(super) async fn begin(&self, hydration: &Hydration) -> Result<Vec<History>> {
        let Hydration {
            install,
            backfill,
            wanted,
            ..
        } = hydration;
        let called_off = async {
            while !backfill.is_cancelled() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let views = self.views_among(install);
        tokio::select! {
            ready = self.wait_ready(&views) => ready?,
            () = called_off => backfill.check()?,
        }
        // One of them may have failed meanwhile.
        self.inputs(wanted)?;
        let histories = self.open_histories(wanted).await?;
        backfill.check()?;
        self.broadcast(|| Command::Install(Arc::clone(install)))?;
        Ok(histories)
    }

    pub(super) fn sink_context(&self, id: RelationId) -> sinks::SinkContext {
        sinks::SinkContext {
            workers: self.inner.config.workers,
            local_workers: self.inner.local_workers,
            incarnation: self.inner.config.incarnation,
            shared: Arc::clone(&self.inner.shared),
            parts: self.inner.parts.clone(),
            durable: self.inner.durable.clone(),
            requests: self.inner.requests.clone(),
            signal: Arc::clone(&self.inner.signal),
            paused: self.inner.config.paused.contains(&id)
                || self.inner.config.failed.contains_key(&id),
            broken: self.inner.broken_sinks.clone(),
        }
    }

    fn views_among(&self, install: &Install) -> Vec<RelationId> {
        let items = lock(&self.inner.items);
        install
            .inputs
            .keys()
            .filter(|id| matches!(items.get(id), Some(Running::View { .. })))
            .copied()
            .collect()
    }

    /// Readers over the history of every source among the inputs.
    async fn open_histories(&self, wanted: &Wanted) -> Result<Vec<History>> {
        let mut sources = Vec::new();
        for (id, columns) in wanted {
            if let Some(Running::Source { item }) = lock(&self.inner.items).get(id) {
                sources.push((
                    Arc::clone(item),
                    columns.iter().copied().collect::<Vec<_>>(),
                ));
            }
        }
        let shared = Arc::clone(&self.inner.shared);
        let open = move || -> Result<Vec<History>> {
            let mut histories = Vec::new();
            for (item, columns) in sources {
                let status = shared.source_status(item.id);
                let starts = {
                    let state = lock(&status.state);
                    if state.splits.is_empty() {
                        // Nothing was bound: the live changes are all there is.
                        continue;
                    }
                    state.starts.clone()
                };
                let from = if item.source.begins_where_first_read() {
                    Offsets(starts.clone())
                } else {
                    Offsets::default()
                };
                let preparer = Preparer::new(item.source.as_ref(), &item.plan, &columns)?;
                let readers = item.source.open(&from, &preparer.projection)?;
                histories.push(History {
                    source: item.id,
                    name: item.name.clone(),
                    starts,
                    readers,
                    preparer,
                });
            }
            Ok(histories)
        };
        tokio::task::spawn_blocking(open)
            .await
            .map_err(|e| Error::internal(e.to_string()))?
    }

    /// Runs the protocol on a task of its own.
    fn hydrate(&self, hydration: Hydration, shown: impl FnOnce() + Send + 'static) -> Hydrated {
        let (done, hydrated) = oneshot::channel();
        let engine = self.clone();
        tokio::spawn(async move {
            let result = engine.hydrate_and_show(&hydration, shown).await;
            let relation = &hydration.install.name;
            match &result {
                Err(e) if was_asked_for(e) => tracing::info!(%relation, "{e}"),
                Err(error) => tracing::error!(%relation, %error, "could not be started"),
                Ok(()) => {}
            }
            lock(&engine.inner.backfills).remove(&hydration.id);
            if let Err(error) = &result {
                engine.give_up(&hydration, error);
            }
            // A client that went away does not undo what it asked for.
            let _ = done.send(result);
        });
        hydrated
    }

    /// Nothing of it is left in the workers, where it would hold up the others. One that no statement
    /// waits for is shown as failed, unless it was dropped.
    fn give_up(&self, hydration: &Hydration, error: &Error) {
        let Hydration {
            id,
            install,
            backfill,
            ..
        } = hydration;
        let _ = self.ask(Request::Drop([install.id].into()));
        if backfill.asked || *self.inner.stopped.borrow() {
            return;
        }
        let mut items = lock(&self.inner.items);
        let Some(running) = items.get_mut(id) else {
            return;
        };
        let mut offers = lock(&self.inner.offers);
        if let Running::View { item, .. } = running {
            for relation in [item.id, item.errors, item.late] {
                offers.remove(&relation);
            }
        }
        *running = Running::Failed {
            name: backfill.name.clone(),
            kind: backfill.kind,
            error: error.clone(),
        };
    }

    async fn hydrate_and_show(&self, hydration: &Hydration, shown: impl FnOnce()) -> Result<()> {
        let histories = self.begin(hydration).await?;
        self.level(hydration, histories).await?;
        self.confirm(&hydration.backfill).await?;
        hydration.backfill.seal()?;
        shown();
        Ok(())
    }

    /// Step 4: takes the checkpoint, again and again while there is no room for it or its place does not
    /// answer.
    async fn confirm(&self, backfill: &Backfill) -> Result<()> {
        while let Err(e) = self.checkpoint_now().await {
            // Without its workers the engine has ended, and another try gives the same.
            let ended =
                *self.inner.stopped.borrow() || self.ask(Request::Broadcast(Vec::new())).is_err();
            if e.kind != ErrorKind::Unavailable || ended {
                return Err(e);
            }
            backfill.check()?;
            tracing::error!(name = backfill.name, error = %e, "built, but no checkpoint holds it yet");
            backfill.trouble(Some(&e));
            tokio::time::sleep(PAUSE).await;
        }
        backfill.trouble(None);
        Ok(())
    }

    /// Steps 2 and 3: returns once the dataflow has all history and follows the live changes.
    pub(super) async fn level(&self, hydration: &Hydration, histories: Vec<History>) -> Result<()> {
        let result = self.level_now(hydration, histories).await;
        // Whatever gave up on the way, it was because of this.
        hydration.backfill.check()?;
        result
    }

    async fn level_now(&self, hydration: &Hydration, histories: Vec<History>) -> Result<()> {
        let Hydration {
            install, backfill, ..
        } = hydration;
        let feed = Feed {
            engine: self.clone(),
            install: Arc::clone(install),
            backfill: Arc::clone(backfill),
            tick: 1,
        };
        let (mut histories, mut feed) =
            in_background(histories, feed, |h, f| f.catch_up(h)).await?;
        let (answer, attached) = oneshot::channel();
        self.ask(Request::Attach(AttachRequest {
            dataflow: install.id,
            is_sink: matches!(install.body, Body::Sink { .. }),
            fingerprint: hydration.fingerprint,
            restored: false,
            progress: Arc::clone(&install.progress),
            wanted: hydration.wanted.clone(),
            answer,
        }))?;
        let attached = attached
            .await
            .map_err(|_| Error::unavailable("the engine has stopped"))??;
        backfill.attached();
        let at = attached.at;
        let fed: BTreeSet<RelationId> = histories.iter().map(|h| h.source).collect();
        for source in attached.offsets.keys().filter(|s| !fed.contains(s)) {
            // Bound its first rows between opening and attaching: its whole history is short.
            let wanted = BTreeMap::from([(*source, wanted_of(install, *source))]);
            histories.extend(self.open_histories(&wanted).await?);
        }
        let offsets = attached.offsets;
        (_, feed) = in_background(histories, feed, move |h, f| f.finish(h, &offsets, at)).await?;
        while install.progress.next() < at {
            feed.check()?;
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    }
}

async fn in_background(
    mut histories: Vec<History>,
    mut feed: Feed,
    work: impl FnOnce(&mut Vec<History>, &mut Feed) -> Result<()> + Send + 'static,
) -> Result<(Vec<History>, Feed)> {
    tokio::task::spawn_blocking(move || {
        let _blame = blame::enter(feed.install.relation(), 0);
        work(&mut histories, &mut feed)?;
        Ok((histories, feed))
    })
    .await
    .map_err(|e| Error::internal(e.to_string()))?
}

/// Sends history to the workers in private ticks.
struct Feed {
    engine: Engine,
    install: Arc<Install>,
    backfill: Arc<Backfill>,
    /// The private tick being filled.
    tick: Tick,
}

impl Feed {
    /// Fails once nobody wants the history any more.
    fn check(&self) -> Result<()> {
        self.backfill.check()?;
        if *self.engine.inner.stopped.borrow() {
            return Err(Error::unavailable("the engine has stopped"));
        }
        Ok(())
    }

    /// Reads up to what is bound, until little is missing.
    fn catch_up(&mut self, histories: &mut Vec<History>) -> Result<()> {
        loop {
            let mut read = 0;
            for history in histories.iter_mut() {
                let status = self.engine.inner.shared.source_status(history.source);
                let limit = Offsets(
                    lock(&status.state)
                        .splits
                        .iter()
                        .map(|(s, (end, _))| (s.clone(), *end))
                        .collect(),
                );
                read += self.read(history, &limit)?;
            }
            if read <= NEARLY_LEVEL {
                return Ok(());
            }
        }
    }

    /// Reads the rest, up to the binding of the attach tick.
    fn finish(
        &mut self,
        histories: &mut Vec<History>,
        offsets: &BTreeMap<RelationId, Offsets>,
        at: Tick,
    ) -> Result<()> {
        for history in histories.iter_mut() {
            if let Some(limit) = offsets.get(&history.source) {
                self.read(history, limit)?;
            }
        }
        for source in offsets.keys() {
            let dataflow = self.install.id;
            self.engine.broadcast(|| Command::HistoryDone {
                dataflow,
                input: *source,
                attach: at,
            })?;
        }
        Ok(())
    }

    fn read(&mut self, history: &mut History, limit: &Offsets) -> Result<u64> {
        let mut total = 0;
        let mut in_tick = 0;
        let workers = self.engine.inner.config.workers;
        let mut chunks = Vec::new();
        let backfill = Arc::clone(&self.backfill);
        let give_up = {
            let (engine, backfill) = (self.engine.clone(), Arc::clone(&backfill));
            move || *engine.inner.stopped.borrow() || backfill.is_cancelled()
        };
        backfill.expect((history.source, &history.name), &history.starts, limit);
        crate::env::failpoint("backfill.read");
        let mut trouble = |e: Option<&Error>| backfill.trouble(e);
        let (source, readers, preparer) =
            (history.source, &mut history.readers, &mut history.preparer);
        let mut failure = None;
        read_to_limit(readers, preparer, limit, &give_up, &mut trouble, |chunk| {
            backfill.read(source, &chunk);
            if let Some(delta) = chunk.delta {
                in_tick += delta.len();
                total += delta.len() as u64;
                chunks.push(delta);
            }
            if in_tick >= HISTORY_ROWS && failure.is_none() {
                failure = self
                    .send(source, std::mem::take(&mut chunks), workers)
                    .err();
                in_tick = 0;
            }
        })?;
        if let Some(e) = failure {
            return Err(e);
        }
        if !chunks.is_empty() {
            self.send(source, chunks, workers)?;
        }
        Ok(total)
    }

    /// One private tick.
    fn send(
        &mut self,
        input: RelationId,
        deltas: Vec<crate::delta::Delta>,
        workers: usize,
    ) -> Result<()> {
        let dataflow = self.install.id;
        for (index, delta) in deltas.into_iter().enumerate() {
            let mut delta = Some(delta);
            let commands = (0..workers)
                .map(
                    |worker| match delta.take_if(|_| worker == index % workers) {
                        Some(delta) => Command::History {
                            dataflow,
                            input,
                            tick: self.tick,
                            delta,
                        },
                        None => Command::HistoryUpto { dataflow, tick: 0 },
                    },
                )
                .collect();
            self.engine.ask(Request::Broadcast(commands))?;
        }
        self.tick += 1;
        let tick = self.tick;
        self.engine
            .broadcast(|| Command::HistoryUpto { dataflow, tick })?;
        while self.install.progress.next() + HISTORY_TICKS < self.tick {
            self.check()?;
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Engine {
    /// The item that is furthest behind, by name.
    pub(super) fn laggard(&self) -> Option<String> {
        let last = self.inner.shared.last_tick.load(Ordering::Relaxed);
        let items = lock(&self.inner.items);
        items
            .values()
            .filter_map(|running| match running {
                Running::View { item, progress, .. } => Some((progress.next(), &item.name)),
                Running::Sink { item, progress, .. } => Some((progress.next(), &item.name)),
                Running::Source { .. } | Running::Failed { .. } => None,
            })
            .filter(|(next, _)| *next <= last)
            .min()
            .map(|(_, name)| name.clone())
    }
}
