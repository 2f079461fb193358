//! Creating a view or a sink while others run: history first, then the live changes from one tick on.
//!
//! # Protocol
//!
//! 1. The dataflow is installed; nothing flows.
//! 2. For each source that has already bound offsets, a private reader replays history in private
//!    ticks, up to what is bound at the moment, again and again until little is missing.
//! 3. The minter attaches the dataflow at tick A; the reader reads up to the binding of A.
//! 4. Once A is applied, a checkpoint is taken; when it is durable, the relation is shown.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use super::minter::{AttachRequest, Attached, Request};
use super::{Engine, Running, SinkItem, SourceItem, ViewItem, sinks};
use crate::error::{Error, ErrorKind, Result};
use crate::ingest::{Preparer, lock, read_to_limit};
use crate::kernel::errors_schema;
use crate::plan::{Op, Plan, RelationId};
use crate::render::CLOCK;
use crate::served::rejected_schema;
use crate::source::{Offsets, Reader};
use crate::time::Tick;
use crate::worker::command::{AddSource, Body, Command, InputInfo, Install, Progress};

/// Rows of history in one private tick.
const HISTORY_ROWS: usize = 64 * 1024;
/// Private ticks in flight.
const HISTORY_TICKS: Tick = 4;
/// Rows that may still be missing when the dataflow is attached.
const NEARLY_LEVEL: u64 = 64 * 1024;

/// Ends when the item is part of a checkpoint.
pub(super) type Hydrated = oneshot::Receiver<Result<()>>;

/// A private reader of one source.
struct History {
    source: RelationId,
    readers: Vec<Box<dyn Reader>>,
    preparer: Preparer,
}

/// Columns a plan needs, by relation.
pub(super) fn wanted(plan: &Plan) -> BTreeMap<RelationId, BTreeSet<usize>> {
    let mut wanted = BTreeMap::<RelationId, BTreeSet<usize>>::new();
    for node in &plan.nodes {
        match &node.op {
            Op::Input { relation, columns } => wanted.entry(*relation).or_default().extend(columns),
            Op::Values { .. } => {
                wanted.entry(CLOCK).or_default();
            }
            _ => {}
        }
    }
    wanted
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

    /// Makes a source known to those that come after it.
    pub(super) fn register_source(&self, item: &Arc<SourceItem>) {
        let offer = |schema, append_only| InputInfo {
            schema,
            sources: vec![item.id],
            append_only,
        };
        let mut offers = lock(&self.inner.offers);
        offers.insert(
            item.id,
            offer(Arc::clone(&item.plan.schema), item.source.append_only()),
        );
        offers.insert(item.rejected, offer(rejected_schema(), true));
        lock(&self.inner.items).insert(
            item.id,
            Running::Source {
                item: Arc::clone(item),
            },
        );
    }

    /// What a dataflow reads; fails if one of its inputs does not run.
    pub(super) fn inputs(
        &self,
        wanted: &BTreeMap<RelationId, BTreeSet<usize>>,
    ) -> Result<BTreeMap<RelationId, InputInfo>> {
        let offers = lock(&self.inner.offers);
        let mut inputs = BTreeMap::new();
        for id in wanted.keys() {
            let info = if *id == CLOCK {
                InputInfo {
                    schema: Arc::new(arrow::datatypes::Schema::empty()),
                    sources: Vec::new(),
                    append_only: true,
                }
            } else {
                offers.get(id).cloned().ok_or_else(|| {
                    Error::new(
                        ErrorKind::NotFound,
                        "a relation this one reads does not run",
                    )
                    .code("42P01")
                })?
            };
            inputs.insert(*id, info);
        }
        Ok(inputs)
    }

    /// What the view offers to those that read it.
    pub(super) fn register_view(&self, item: &ViewItem, inputs: &BTreeMap<RelationId, InputInfo>) {
        let sources: Vec<RelationId> = inputs
            .values()
            .flat_map(|i| i.sources.iter().copied())
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();
        let offer = |schema, append_only| InputInfo {
            schema,
            sources: sources.clone(),
            append_only,
        };
        let mut offers = lock(&self.inner.offers);
        offers.insert(
            item.id,
            offer(Arc::clone(item.plan.schema()), item.plan.append_only),
        );
        offers.insert(item.errors, offer(errors_schema(), false));
        let late = late_schema(&item.plan);
        offers.insert(item.late, offer(late, false));
    }

    pub(super) async fn start_view(&self, item: Arc<ViewItem>) -> Result<Hydrated> {
        crate::render::check::check(&item.plan)?;
        let wanted = wanted(&item.plan);
        let inputs = self.inputs(&wanted)?;
        let progress = Arc::new(Progress::new(
            self.inner.config.workers,
            Progress::PORTS,
            Arc::clone(&self.inner.signal),
        ));
        let install = Arc::new(Install {
            id: item.id,
            name: item.name.clone(),
            body: Body::View {
                plan: item.plan.clone(),
                errors: item.errors,
                late: item.late,
            },
            inputs: inputs.clone(),
            restored: None,
            progress: Arc::clone(&progress),
        });
        let histories = self.open_histories(&wanted).await?;
        self.wait_ready(&self.views_among(&wanted)).await?;
        self.register_view(&item, &inputs);
        let (ready_sender, ready) = watch::channel(false);
        lock(&self.inner.items).insert(
            item.id,
            Running::View {
                item: Arc::clone(&item),
                progress: Arc::clone(&progress),
                ready,
            },
        );
        self.broadcast(|| Command::Install(Arc::clone(&install)))?;
        let request = move |answer| AttachRequest {
            dataflow: item.id,
            is_sink: false,
            fingerprint: item.plan.fingerprint,
            restored: false,
            progress: Arc::clone(&progress),
            wanted: wanted.clone(),
            answer,
        };
        Ok(self.hydrate(install, histories, request, move || {
            ready_sender.send_replace(true);
        }))
    }

    pub(super) async fn start_sink(&self, item: Arc<SinkItem>) -> Result<Hydrated> {
        let columns = self.offer(item.from)?.schema.fields().len();
        let wanted = BTreeMap::from([(item.from, (0..columns).collect::<BTreeSet<usize>>())]);
        let inputs = self.inputs(&wanted)?;
        let interval = item
            .commit_interval
            .unwrap_or(self.inner.config.commit_interval);
        let running = sinks::start(
            item.id,
            Arc::clone(&item.sink),
            interval,
            None,
            self.sink_context(),
        )
        .await?;
        let progress = Arc::new(Progress::new(
            self.inner.config.workers,
            1,
            Arc::clone(&self.inner.signal),
        ));
        let install = Arc::new(Install {
            id: item.id,
            name: item.name.clone(),
            body: Body::Sink {
                from: item.from,
                writers: running.writers,
                // A new sink starts from the contents, whatever an older one has left in the table.
                skip_below: 0,
                queued_bytes: Arc::clone(&self.inner.shared.queued_bytes),
            },
            inputs,
            restored: None,
            progress: Arc::clone(&progress),
        });
        let histories = self.open_histories(&wanted).await?;
        self.wait_ready(&self.views_among(&wanted)).await?;
        let confirmed = running.confirmed.clone();
        lock(&self.inner.items).insert(
            item.id,
            Running::Sink {
                item: Arc::clone(&item),
                progress: Arc::clone(&progress),
                status: running.status,
                confirmed: running.confirmed,
            },
        );
        self.broadcast(|| Command::Install(Arc::clone(&install)))?;
        let request = move |answer| AttachRequest {
            dataflow: item.id,
            is_sink: true,
            fingerprint: 0,
            restored: false,
            progress: Arc::clone(&progress),
            wanted: wanted.clone(),
            answer,
        };
        Ok(self.hydrate(install, histories, request, move || {
            confirmed.send_replace(true);
        }))
    }

    pub(super) fn sink_context(&self) -> sinks::SinkContext {
        sinks::SinkContext {
            workers: self.inner.config.workers,
            incarnation: self.inner.config.incarnation,
            shared: Arc::clone(&self.inner.shared),
            parts: self.inner.parts.clone(),
            durable: self.inner.durable.clone(),
            requests: self.inner.requests.clone(),
            signal: Arc::clone(&self.inner.signal),
        }
    }

    pub(super) fn offer(&self, id: RelationId) -> Result<InputInfo> {
        lock(&self.inner.offers).get(&id).cloned().ok_or_else(|| {
            Error::new(ErrorKind::NotFound, "the relation does not run").code("42P01")
        })
    }

    fn views_among(&self, wanted: &BTreeMap<RelationId, BTreeSet<usize>>) -> Vec<RelationId> {
        let items = lock(&self.inner.items);
        wanted
            .keys()
            .filter(|id| matches!(items.get(id), Some(Running::View { .. })))
            .copied()
            .collect()
    }

    /// Readers over the history of every source among the inputs.
    async fn open_histories(
        &self,
        wanted: &BTreeMap<RelationId, BTreeSet<usize>>,
    ) -> Result<Vec<History>> {
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
                    Offsets(starts)
                } else {
                    Offsets::default()
                };
                let preparer = Preparer::new(item.source.as_ref(), &item.plan, &columns)?;
                let readers = item.source.open(&from, &preparer.projection)?;
                histories.push(History {
                    source: item.id,
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

    /// Runs steps 2 to 4 of the protocol on a task of their own.
    fn hydrate(
        &self,
        install: Arc<Install>,
        histories: Vec<History>,
        request: impl Fn(oneshot::Sender<Result<Attached>>) -> AttachRequest + Send + 'static,
        shown: impl FnOnce() + Send + 'static,
    ) -> Hydrated {
        let (done, hydrated) = oneshot::channel();
        let engine = self.clone();
        tokio::spawn(async move {
            let result = engine.hydrate_now(&install, histories, request).await;
            if let Err(e) = &result {
                tracing::error!(relation = %install.name, error = %e, "could not be started");
            } else {
                shown();
            }
            // A client that went away does not undo what it asked for.
            let _ = done.send(result);
        });
        hydrated
    }

    async fn hydrate_now(
        &self,
        install: &Arc<Install>,
        histories: Vec<History>,
        request: impl Fn(oneshot::Sender<Result<Attached>>) -> AttachRequest,
    ) -> Result<()> {
        let engine = self.clone();
        let feed = Feed {
            engine,
            install: Arc::clone(install),
            tick: 1,
        };
        let (mut histories, mut feed) =
            in_background(histories, feed, |h, f| f.catch_up(h)).await?;
        let (answer, attached) = oneshot::channel();
        self.ask(Request::Attach(request(answer)))?;
        let attached = attached
            .await
            .map_err(|_| Error::unavailable("the engine has stopped"))??;
        let at = attached.at;
        let fed: BTreeSet<RelationId> = histories.iter().map(|h| h.source).collect();
        for source in attached.offsets.keys().filter(|s| !fed.contains(s)) {
            // Bound its first rows between opening and attaching: its whole history is short.
            let wanted = BTreeMap::from([(*source, wanted_of(install, *source))]);
            histories.extend(self.open_histories(&wanted).await?);
        }
        let offsets = attached.offsets;
        (_, feed) = in_background(histories, feed, move |h, f| f.finish(h, &offsets, at)).await?;
        drop(feed);
        while install.progress.next() < at {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        self.checkpoint_now().await?;
        Ok(())
    }
}

fn wanted_of(install: &Install, source: RelationId) -> BTreeSet<usize> {
    match &install.body {
        Body::View { plan, .. } => wanted(plan).remove(&source).unwrap_or_default(),
        Body::Sink { .. } => (0..install.inputs[&source].schema.fields().len()).collect(),
    }
}

/// Columns of a view's late rows: the windowed input of its first closing aggregate.
pub(super) fn late_schema(plan: &Plan) -> arrow::datatypes::SchemaRef {
    plan.nodes
        .iter()
        .find_map(|node| match &node.op {
            Op::Aggregate {
                input,
                close: Some(_),
                ..
            } => Some(Arc::clone(&plan.nodes[*input].schema)),
            _ => None,
        })
        .unwrap_or_else(|| Arc::new(arrow::datatypes::Schema::empty()))
}

async fn in_background(
    mut histories: Vec<History>,
    mut feed: Feed,
    work: impl FnOnce(&mut Vec<History>, &mut Feed) -> Result<()> + Send + 'static,
) -> Result<(Vec<History>, Feed)> {
    tokio::task::spawn_blocking(move || {
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
    /// The private tick being filled.
    tick: Tick,
}

impl Feed {
    fn stopped(&self) -> bool {
        *self.engine.inner.stopped.borrow()
            || !lock(&self.engine.inner.items).contains_key(&self.install.id)
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
        let give_up = {
            let engine = self.engine.clone();
            let id = self.install.id;
            move || *engine.inner.stopped.borrow() || !lock(&engine.inner.items).contains_key(&id)
        };
        let (source, readers, preparer) =
            (history.source, &mut history.readers, &mut history.preparer);
        let mut failure = None;
        read_to_limit(readers, preparer, limit, &give_up, &mut |_| {}, |chunk| {
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
            if self.stopped() {
                return Err(Error::unavailable(
                    "the relation was dropped or the engine has stopped",
                ));
            }
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
