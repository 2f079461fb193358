//! Plan to operators: builds one dataflow on one worker.
//!
//! Each node becomes one or two operators; every operator that can fail or see late rows has outputs
//! for them, which meet in the relation's `$errors` and `$late`. The result, the errors and the late
//! rows end in [`Served`] stages: contents and tap.

pub mod check;
mod gate;
pub mod nodes;
pub mod recompute;
pub mod sink;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

use arrow::datatypes::{Schema, SchemaRef};
use timely::dataflow::operators::core::Concatenate;
use timely::dataflow::{Scope, Stream};
use timely::worker::Worker;

use crate::blame;
use crate::checkpoint::{PartSender, RestoredDataflow, RestoredStage, StageId};
use crate::delta::Delta;
use crate::delta::exchange::Route;
use crate::env;
use crate::kernel::{errors_schema, nullable};
use crate::key::Share;
use crate::operator::import::import;
use crate::operator::map::map;
use crate::operator::stage::{Logic, Moment, Out, StageContext, stage};
use crate::plan::{Op, Plan, RelationId};
use crate::served::{Served, SharedServed};
use crate::state::Part;
use crate::tap::{Queue, SharedQueue};
use crate::tick::SharedTickLog;
use crate::time::{NO_WATERMARK, Tick, Watermark};
use crate::worker::command::{Body, Counters, Install, Progress};

/// A relation without rows that completes every tick: what constant rows follow.
pub const CLOCK: RelationId = RelationId(0);

/// A dataflow on this worker.
pub struct Installed {
    pub attach: Rc<Cell<Tick>>,
    pub queues: BTreeMap<RelationId, SharedQueue>,
    pub served: Vec<(RelationId, SharedServed)>,
    pub progress: Arc<Progress>,
    /// Stages that report to a checkpoint.
    pub stateful: usize,
}

impl Installed {
    /// Ends the inputs, so that the dataflow runs dry and is removed.
    pub fn close(&self) {
        for queue in self.queues.values() {
            let mut queue = queue.borrow_mut();
            queue.closed = true;
            queue.live.clear();
            queue.history.clear();
            queue.wake();
        }
    }
}

/// What the nodes of one dataflow share while it is built.
pub struct Build<'a, 's> {
    pub scope: Scope<'s, Tick>,
    pub context: StageContext,
    pub install: &'a Install,
    pub workers: usize,
    pub stateful: usize,
    pub errors: Vec<Stream<'s, Tick, Delta>>,
    pub late: Vec<Stream<'s, Tick, Delta>>,
    pub late_schema: Option<SchemaRef>,
}

impl<'s> Build<'_, 's> {
    pub fn restored(&self) -> Option<&Arc<RestoredDataflow>> {
        self.install.restored.as_ref()
    }
    pub fn restored_stage(&self, id: StageId) -> Option<&RestoredStage> {
        self.restored().and_then(|r| r.stage(id))
    }
    pub fn share(&self) -> Share {
        Share {
            worker: self.context.worker,
            workers: self.workers,
        }
    }
    /// By which watermark a row of a tick is late: that of the tick before its own. Nothing is late up to
    /// the first minted tick of a new dataflow: that is history, and what its closing gives at that tick.
    pub fn lateness(&self, sources: &[RelationId]) -> impl Fn(Tick) -> Watermark + 'static {
        let ticks = Rc::clone(&self.context.ticks);
        let attach = Rc::clone(&self.context.attach);
        let restored = self.restored().is_some();
        let sources = sources.to_vec();
        move |tick| {
            if tick < attach.get() {
                return NO_WATERMARK;
            }
            let ticks = ticks.borrow();
            let before = ticks
                .before(tick)
                .filter(|info| restored || info.tick >= attach.get());
            before.map_or(NO_WATERMARK, |info| info.watermark(&sources))
        }
    }
    /// A stage whose state is part of checkpoints.
    pub fn stage(
        &mut self,
        name: &str,
        inputs: Vec<(Stream<'s, Tick, Delta>, Option<Route>)>,
        outputs: usize,
        id: StageId,
        sources: Vec<RelationId>,
        logic: Box<dyn Logic>,
    ) -> Vec<Stream<'s, Tick, Delta>> {
        self.stateful += 1;
        stage(
            self.scope,
            name,
            inputs,
            outputs,
            &self.context,
            id,
            sources,
            logic,
        )
    }
}

/// Builds the dataflow of `install` on this worker.
pub fn install(
    worker: &mut Worker,
    install: &Arc<Install>,
    ticks: SharedTickLog,
    attach: Rc<Cell<Tick>>,
    parts: PartSender,
) -> Installed {
    let (index, workers) = (worker.index(), worker.peers());
    let _blame = blame::enter(install.relation(), 0);
    worker.dataflow_named(&install.name, |scope| {
        let context = StageContext {
            relation: install.id,
            worker: index,
            ticks,
            attach: Rc::clone(&attach),
            parts,
        };
        let mut build = Build {
            scope,
            context,
            install,
            workers,
            stateful: 0,
            errors: Vec::new(),
            late: Vec::new(),
            late_schema: None,
        };
        let mut queues = BTreeMap::new();
        let mut inputs = BTreeMap::new();
        let wanted = wanted_columns(&install.body, install);
        for (number, (relation, columns)) in wanted.into_iter().enumerate() {
            let fields = columns
                .iter()
                .map(|c| install.inputs[&relation].schema.field(*c).clone());
            let schema = nullable(&Schema::new(fields.collect::<Vec<_>>()));
            let queue: SharedQueue = Rc::new(RefCell::new(Queue::default()));
            let stream = import(
                scope,
                "Import",
                Rc::clone(&queue),
                Arc::clone(&schema),
                Arc::clone(&install.progress),
            );
            let sources = install.inputs[&relation].sources.clone();
            let stream = gate::gate(&mut build, number, stream, &schema, sources);
            queues.insert(relation, queue);
            inputs.insert(relation, (stream, columns.into_iter().collect::<Vec<_>>()));
        }
        let served = match &install.body {
            Body::View {
                relation,
                plan,
                errors,
                late,
                ..
            } => view(&mut build, plan, [*relation, *errors, *late], &inputs),
            Body::Sink { .. } => {
                sink::render(&mut build, &inputs);
                Vec::new()
            }
        };
        Installed {
            attach,
            queues,
            served,
            progress: Arc::clone(&install.progress),
            stateful: build.stateful,
        }
    })
}

/// Columns imported of each relation: the union of what the plan's inputs name.
fn wanted_columns(body: &Body, install: &Install) -> BTreeMap<RelationId, BTreeSet<usize>> {
    let mut wanted = BTreeMap::<RelationId, BTreeSet<usize>>::new();
    match body {
        Body::View { plan, .. } => {
            for node in &plan.nodes {
                match &node.op {
                    Op::Input { relation, columns } => {
                        wanted.entry(*relation).or_default().extend(columns);
                    }
                    Op::Values { .. } => {
                        wanted.entry(CLOCK).or_default();
                    }
                    _ => {}
                }
            }
        }
        Body::Sink { from, .. } => {
            let all = 0..install.inputs[from].schema.fields().len();
            wanted.insert(*from, all.collect());
        }
    }
    wanted
}

/// Imported stream of a relation and which of its columns it carries.
pub type Inputs<'s> = BTreeMap<RelationId, (Stream<'s, Tick, Delta>, Vec<usize>)>;

fn view<'s>(
    build: &mut Build<'_, 's>,
    plan: &Plan,
    [relation, errors, late]: [RelationId; 3],
    inputs: &Inputs<'s>,
) -> Vec<(RelationId, SharedServed)> {
    let folded = nodes::folded_windows(plan);
    let mut streams: Vec<Stream<'s, Tick, Delta>> = Vec::new();
    let mut sources: Vec<Vec<RelationId>> = Vec::new();
    for (id, node) in plan.nodes.iter().enumerate() {
        let below = nodes::sources_below(build, &node.op, &sources);
        let stream = match &node.op {
            Op::Window { input, .. } if folded.contains(&id) => streams[*input].clone(),
            _ => nodes::render(build, plan, id, &streams, inputs, &below),
        };
        streams.push(stream);
        sources.push(below);
    }
    let all: Vec<RelationId> = sources
        .iter()
        .flatten()
        .copied()
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    let count = u32::try_from(plan.nodes.len()).expect("plans are small");
    let root = streams.pop().expect("a plan has nodes");
    let late_schema = build
        .late_schema
        .clone()
        .unwrap_or_else(|| Arc::new(Schema::empty()));
    // A stage without inputs would end at once; these follow the progress of the result, so that they
    // answer reads and checkpoints as long as the view lives.
    let silent = map(
        build.scope,
        "Silent",
        root.clone(),
        1,
        |_tick, _delta, _outs| {},
    )
    .pop();
    let silent = silent.expect("one output");
    let mut error_streams = std::mem::take(&mut build.errors);
    error_streams.push(silent.clone());
    let mut late_streams = std::mem::take(&mut build.late);
    late_streams.push(silent);
    let ends = [
        (relation, root, Arc::clone(plan.schema()), plan.append_only),
        (
            errors,
            build.scope.concatenate(error_streams),
            errors_schema(),
            false,
        ),
        (
            late,
            build.scope.concatenate(late_streams),
            late_schema,
            false,
        ),
    ];
    let mut served = Vec::new();
    for (port, (relation, stream, schema, append_only)) in ends.into_iter().enumerate() {
        let contents = serve(
            build,
            relation,
            port,
            stream,
            schema,
            append_only,
            count,
            all.clone(),
        );
        served.push((relation, contents));
    }
    served
}

#[allow(clippy::too_many_arguments)]
fn serve<'s>(
    build: &mut Build<'_, 's>,
    relation: RelationId,
    port: usize,
    stream: Stream<'s, Tick, Delta>,
    schema: SchemaRef,
    append_only: bool,
    nodes: u32,
    sources: Vec<RelationId>,
) -> SharedServed {
    let worker = build.context.worker;
    let mut served = Served::new(&schema, append_only, build.share());
    let id = StageId(nodes + u32::try_from(port).expect("three ports"));
    served.restore(build.restored_stage(id));
    if matches!(build.install.body, Body::View { hidden: true, .. }) {
        served.hide();
    }
    let size = served.size();
    let rows = size.rows;
    if rows > 0 {
        let counters = &build.install.progress.counters;
        counters.set_state(worker, id.0, "contents", size);
        // What the relations hold goes on being counted.
        match port {
            1 => Counters::add(&counters.error_rows, rows as usize),
            2 => Counters::add(&counters.late_rows, rows as usize),
            _ => {}
        }
    }
    let served = Rc::new(RefCell::new(served));
    let logic = ServeLogic {
        relation,
        port,
        worker,
        stage: id.0,
        served: Rc::clone(&served),
        progress: Arc::clone(&build.install.progress),
        failpoint: format!("view.{}", build.install.name),
    };
    let route = (!append_only).then_some(Route::Row);
    build.stage(
        "Serve",
        vec![(stream, route)],
        0,
        id,
        sources,
        Box::new(logic),
    );
    served
}

/// The end of a relation: contents, tap, progress.
struct ServeLogic {
    relation: RelationId,
    port: usize,
    worker: usize,
    stage: u32,
    served: SharedServed,
    progress: Arc<Progress>,
    /// Hit by each tick with rows.
    failpoint: String,
}

impl Logic for ServeLogic {
    fn tick(&mut self, moment: &Moment, mut inputs: Vec<Vec<Delta>>, _outputs: &mut [Out]) {
        let deltas = inputs.pop().expect("one input");
        let mut served = self.served.borrow_mut();
        if !deltas.is_empty() {
            if self.port == 0 {
                env::failpoint(&self.failpoint);
            }
            let rows = deltas.iter().map(Delta::len).sum();
            let counters = &self.progress.counters;
            match self.port {
                0 => {
                    Counters::add(&counters.rows_out, rows);
                    Counters::add(&counters.bytes_out, deltas.iter().map(Delta::bytes).sum());
                }
                1 => Counters::add(&counters.error_rows, rows),
                _ => Counters::add(&counters.late_rows, rows),
            }
            served.apply(moment.tick, deltas);
            counters.set_state(self.worker, self.stage, "contents", served.size());
        } else {
            served.relieve();
        }
        if let Some(info) = &moment.info {
            served.answer(self.relation, info);
        }
    }
    fn freeze(&mut self) -> Option<Vec<Part>> {
        Some(self.served.borrow_mut().freeze_parts())
    }
    fn completed(&mut self, next: Tick) {
        self.served.borrow_mut().complete(next);
        self.progress.set(self.worker, self.port, next);
    }
}

/// The input columns a node asks for, picked from what was imported.
pub fn pick<'s>(
    build: &Build<'_, 's>,
    stream: Stream<'s, Tick, Delta>,
    indices: Vec<usize>,
    schema: &Schema,
) -> Stream<'s, Tick, Delta> {
    let schema = nullable(schema);
    map(build.scope, "Pick", stream, 1, move |_tick, delta, outs| {
        let columns = indices
            .iter()
            .map(|i| Arc::clone(delta.batch.column(*i)))
            .collect();
        let options = arrow::array::RecordBatchOptions::new().with_row_count(Some(delta.len()));
        let batch =
            arrow::array::RecordBatch::try_new_with_options(Arc::clone(&schema), columns, &options)
                .expect("the plan has the relation's types");
        outs[0].push(Delta {
            batch,
            diffs: delta.diffs,
        });
    })
    .pop()
    .expect("one output")
}
