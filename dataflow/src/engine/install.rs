//! What a dataflow reads, and how it is handed to the workers; the same when it is attached and when it
//! is restored.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::sinks::RunningSink;
use super::{Engine, Running, SinkItem, SourceItem, ViewItem};
use crate::checkpoint::RestoredDataflow;
use crate::error::{Error, ErrorKind, Result};
use crate::ingest::lock;
use crate::kernel::errors_schema;
use crate::plan::{Op, Plan, RelationId};
use crate::render::CLOCK;
use crate::served::rejected_schema;
use crate::tick::hold_of;
use crate::worker::command::{Body, InputInfo, Install, Progress};

/// Columns wanted, by relation.
pub(super) type Wanted = BTreeMap<RelationId, BTreeSet<usize>>;

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

/// Columns a dataflow needs of one of its inputs.
pub(super) fn wanted_of(install: &Install, source: RelationId) -> BTreeSet<usize> {
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

impl Engine {
    /// Makes a source known to those that come after it.
    pub(super) fn register_source(&self, item: &Arc<SourceItem>) {
        let offer = |schema, append_only| InputInfo {
            schema,
            sources: vec![item.id],
            append_only,
        };
        let rows = offer(Arc::clone(&item.plan.schema), item.source.append_only());
        {
            // Given back before `items` is taken: whoever needs both takes `items` first.
            let mut offers = lock(&self.inner.offers);
            offers.insert(item.id, rows);
            offers.insert(item.rejected, offer(rejected_schema(), true));
        }
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
            // What reads the view waits for it when it is held.
            .chain([hold_of(item.id)])
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

    /// What a sink reads: the columns that were there when it was created.
    pub(super) fn sink_wanted(&self, item: &SinkItem) -> Result<Wanted> {
        let columns = self.offer(item.from)?.schema.fields().len();
        let columns = item.columns.min(columns);
        Ok(BTreeMap::from([(item.from, (0..columns).collect())]))
    }

    /// The dataflow of a view; with `restored`, its state.
    pub(super) fn view_install(
        &self,
        item: &ViewItem,
        hidden: bool,
        restored: Option<Arc<RestoredDataflow>>,
    ) -> Result<Arc<Install>> {
        let inputs = self.inputs(&wanted(&item.plan))?;
        Ok(Arc::new(Install {
            id: item.dataflow,
            name: item.name.clone(),
            body: Body::View {
                relation: item.id,
                plan: item.plan.clone(),
                errors: item.errors,
                late: item.late,
                hidden,
            },
            inputs,
            restored,
            progress: Arc::new(Progress::new(
                self.inner.config.workers,
                Progress::PORTS,
                Arc::clone(&self.inner.signal),
            )),
        }))
    }

    /// The dataflow of a sink whose tasks run.
    pub(super) fn sink_install(
        &self,
        item: &SinkItem,
        running: &RunningSink,
        skip_below: crate::time::Tick,
        restored: Option<Arc<RestoredDataflow>>,
    ) -> Result<Arc<Install>> {
        let wanted = self.sink_wanted(item)?;
        let mut inputs = self.inputs(&wanted)?;
        for (id, info) in &mut inputs {
            let columns: Vec<usize> = wanted[id].iter().copied().collect();
            info.schema = Arc::new(info.schema.project(&columns).map_err(|e| {
                Error::internal(format!("the sink reads columns that are not there: {e}"))
            })?);
        }
        Ok(Arc::new(Install {
            id: item.id,
            name: item.name.clone(),
            body: Body::Sink {
                from: item.from,
                writers: running.writers.clone(),
                skip_below,
                queued_bytes: Arc::clone(&self.inner.shared.queued_bytes),
                closed: running.closed.clone(),
                status: Arc::clone(&running.status),
            },
            inputs,
            restored,
            progress: Arc::new(Progress::new(
                self.inner.config.workers,
                1,
                Arc::clone(&self.inner.signal),
            )),
        }))
    }

    pub(super) fn offer(&self, id: RelationId) -> Result<InputInfo> {
        lock(&self.inner.offers).get(&id).cloned().ok_or_else(|| {
            Error::new(ErrorKind::NotFound, "the relation does not run").code("42P01")
        })
    }
}
