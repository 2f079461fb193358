//! One plan node each.

mod join;

use std::collections::BTreeSet;
use std::sync::Arc;

use timely::container::NoopBuilder;
use timely::dataflow::Stream;
use timely::dataflow::operators::core::Concatenate;
use timely::dataflow::operators::generic::operator::source;

use super::{Build, Inputs, pick, recompute};
use crate::checkpoint::StageId;
use crate::delta::Delta;
use crate::delta::exchange::Route;
use crate::kernel::aggregate::{AggregateSpec, AggregateState};
use crate::kernel::map::MapKernel;
use crate::kernel::preaggregate::PreAggregate;
use crate::kernel::window::WindowKernel;
use crate::operator::map::map;
use crate::operator::stage::{Logic, Moment, Out};
use crate::plan::{NodeId, Op, Plan, RelationId, TimeWindow};
use crate::state::{Part, Stateful};
use crate::tick::hold_of;
use crate::time::Tick;
use crate::worker::command::{Progress, StateSize};

pub use join::{counted_set_spec, join_spec, semi_join_spec};

pub(super) type Deltas<'s> = Stream<'s, Tick, Delta>;

/// Sources whose watermarks hold back this node.
pub fn sources_below(build: &Build<'_, '_>, op: &Op, below: &[Vec<RelationId>]) -> Vec<RelationId> {
    let mut sources = BTreeSet::new();
    match op {
        Op::Input { relation, .. } => {
            sources.extend(&build.install.inputs[relation].sources);
            sources.insert(hold_of(build.install.relation()));
        }
        Op::Values { .. } => {}
        Op::Map { input, .. }
        | Op::Window { input, .. }
        | Op::Expand { input, .. }
        | Op::Aggregate { input, .. } => {
            sources.extend(&below[*input]);
        }
        Op::Join { left, right, .. }
        | Op::SemiJoin { left, right, .. }
        | Op::CountedSet { left, right, .. } => {
            sources.extend(&below[*left]);
            sources.extend(&below[*right]);
        }
        Op::Recompute { inputs, .. } | Op::Union { inputs } => {
            inputs.iter().for_each(|i| sources.extend(&below[*i]))
        }
    }
    sources.into_iter().collect()
}

/// Windows that only aggregates read: they are computed inside the aggregates.
pub fn folded_windows(plan: &Plan) -> BTreeSet<NodeId> {
    let is_window = |id: &NodeId| matches!(plan.nodes[*id].op, Op::Window { .. });
    let mut folded: BTreeSet<NodeId> = (0..plan.nodes.len() - 1).filter(is_window).collect();
    for node in &plan.nodes {
        match &node.op {
            Op::Map { input, .. } | Op::Window { input, .. } | Op::Expand { input, .. } => {
                folded.remove(input);
            }
            Op::Join { left, right, .. }
            | Op::SemiJoin { left, right, .. }
            | Op::CountedSet { left, right, .. } => {
                folded.remove(left);
                folded.remove(right);
            }
            Op::Recompute { inputs, .. } | Op::Union { inputs } => inputs.iter().for_each(|i| {
                folded.remove(i);
            }),
            Op::Aggregate { .. } | Op::Input { .. } | Op::Values { .. } => {}
        }
    }
    folded
}

/// The stream of a node's output.
pub fn render<'s>(
    build: &mut Build<'_, 's>,
    plan: &Plan,
    id: NodeId,
    streams: &[Deltas<'s>],
    inputs: &Inputs<'s>,
    sources: &[RelationId],
) -> Deltas<'s> {
    let node = &plan.nodes[id];
    let stage = StageId(u32::try_from(id).expect("plans are small"));
    match &node.op {
        Op::Input { relation, columns } => {
            let (stream, imported) = &inputs[relation];
            let indices: Vec<usize> = columns
                .iter()
                .map(|c| {
                    imported
                        .iter()
                        .position(|i| i == c)
                        .expect("imported above")
                })
                .collect();
            let same =
                indices.len() == imported.len() && indices.iter().enumerate().all(|(a, b)| a == *b);
            if same {
                stream.clone()
            } else {
                pick(build, stream.clone(), indices, &node.schema)
            }
        }
        Op::Values { rows } => {
            let clock = inputs[&super::CLOCK].0.clone();
            let rows = values(build, rows.clone());
            build.scope.concatenate([rows, clock])
        }
        Op::Map { input, steps } => {
            let kernel = MapKernel::new(&plan.nodes[*input].schema, steps);
            map_node(build, kernel, streams[*input].clone())
        }
        Op::Window {
            input,
            time,
            window,
        } => {
            let kernel = WindowKernel::new(&plan.nodes[*input].schema, *time, *window)
                .expect("lowering has checked the window");
            let mut outs = map(
                build.scope,
                "Window",
                streams[*input].clone(),
                2,
                move |_tick, delta, outs| {
                    let out = kernel.apply(delta).expect("the time column is a timestamp");
                    outs[0].extend(out.delta);
                    outs[1].extend(out.errors);
                },
            );
            build.errors.push(outs.pop().expect("two outputs"));
            outs.pop().expect("two outputs")
        }
        Op::Aggregate { .. } => aggregate(build, plan, id, stage, streams, sources),
        Op::Recompute { .. } => recompute::recompute(build, plan, id, stage, streams, sources),
        Op::Expand { input, compute } => {
            recompute::expand(build, compute, &node.schema, streams[*input].clone())
        }
        Op::Join { .. } => join::join(build, plan, id, stage, streams, sources),
        Op::SemiJoin { .. } => join::semi_join(build, plan, id, stage, streams, sources),
        Op::CountedSet { .. } => join::counted_set(build, plan, id, stage, streams, sources),
        Op::Union { inputs } => {
            // Inputs may differ in names and nullability; the node's schema is the one below here.
            let schema = Arc::clone(&node.schema);
            let aligned: Vec<Deltas<'s>> = inputs
                .iter()
                .map(|i| {
                    let all = (0..schema.fields().len()).collect();
                    pick(build, streams[*i].clone(), all, &schema)
                })
                .collect();
            build.scope.concatenate(aligned)
        }
    }
}

fn map_node<'s>(build: &mut Build<'_, 's>, kernel: MapKernel, input: Deltas<'s>) -> Deltas<'s> {
    let mut outs = map(build.scope, "Map", input, 2, move |_tick, delta, outs| {
        let out = kernel.apply(delta);
        outs[0].extend(out.delta);
        outs[1].extend(out.errors);
    });
    build.errors.push(outs.pop().expect("two outputs"));
    outs.pop().expect("two outputs")
}

/// Constant rows: once, at the first private tick, on the first worker, and not after a restore.
fn values<'s>(build: &mut Build<'_, 's>, rows: arrow::array::RecordBatch) -> Deltas<'s> {
    let give = build.context.worker == 0 && build.restored().is_none() && rows.num_rows() > 0;
    let mut pending = give.then(|| Delta::inserts(rows));
    source::<_, NoopBuilder<Delta>, _, _>(build.scope, "Values", move |capability, _info| {
        let mut capability = Some(capability);
        move |output| {
            if let (Some(cap), Some(mut delta)) = (capability.take(), pending.take()) {
                output.session_with_builder(&cap).give_container(&mut delta);
            }
        }
    })
}

/// What an aggregate reads. A window directly below is folded in: rows are grouped per pane before
/// they are spread over the windows they belong to.
fn windowed_input(plan: &Plan, id: NodeId) -> (NodeId, Option<(usize, TimeWindow)>) {
    let Op::Aggregate { input, .. } = &plan.nodes[id].op else {
        unreachable!("called for aggregates")
    };
    match &plan.nodes[*input].op {
        Op::Window {
            input: below,
            time,
            window,
        } => (*below, Some((*time, *window))),
        _ => (*input, None),
    }
}

/// The aggregate at `id`, for its kernels.
pub fn aggregate_spec(plan: &Plan, id: NodeId) -> AggregateSpec {
    let node = &plan.nodes[id];
    let Op::Aggregate {
        input,
        keys,
        calls,
        close,
        emit,
        allowed_lateness_us,
    } = &node.op
    else {
        unreachable!("called for aggregates")
    };
    AggregateSpec {
        input: Arc::clone(&plan.nodes[*input].schema),
        output: Arc::clone(&node.schema),
        keys: keys.clone(),
        calls: calls.clone(),
        close: *close,
        emit: *emit,
        allowed_lateness_us: *allowed_lateness_us,
        window: windowed_input(plan, id).1,
        retracting: !plan.nodes[*input].append_only,
    }
}

fn aggregate<'s>(
    build: &mut Build<'_, 's>,
    plan: &Plan,
    id: NodeId,
    stage: StageId,
    streams: &[Deltas<'s>],
    sources: &[RelationId],
) -> Deltas<'s> {
    let below = windowed_input(plan, id).0;
    let spec = Arc::new(aggregate_spec(plan, id));
    let mut pre = PreAggregate::new(Arc::clone(&spec));
    let lateness = build.lateness(sources);
    let mut outs = map(
        build.scope,
        "PreAggregate",
        streams[below].clone(),
        3,
        move |tick, delta, outs| {
            let out = pre.apply(delta, lateness(tick));
            outs[0].extend(out.partials);
            outs[1].extend(out.late);
            outs[2].extend(out.errors);
        },
    );
    build.errors.push(outs.pop().expect("three outputs"));
    let late = outs.pop().expect("three outputs");
    if spec.close.is_some() && build.late_schema.is_none() {
        build.late_schema = Some(Arc::clone(&spec.input));
    }
    if build.late_schema.as_ref() == Some(&spec.input) {
        build.late.push(late);
    }
    let partials = outs.pop().expect("three outputs");
    let worker = build.context.worker;
    let mut state = AggregateState::new(Arc::clone(&spec), worker, build.workers);
    if let Some(restored) = build.restored_stage(stage) {
        state
            .restore(&restored.parts)
            .expect("checksums of the checkpoint were verified");
        let counters = &build.install.progress.counters;
        counters.set_state(worker, stage.0, "aggregate", StateSize::of(&state));
    }
    let logic = AggregateLogic {
        state,
        worker,
        stage: stage.0,
        progress: Arc::clone(&build.install.progress),
    };
    let route = Route::Columns((0..spec.keys.len()).collect());
    let mut outs = build.stage(
        "Aggregate",
        vec![(partials, Some(route))],
        2,
        stage,
        sources.to_vec(),
        Box::new(logic),
    );
    build.errors.push(outs.pop().expect("two outputs"));
    outs.pop().expect("two outputs")
}

struct AggregateLogic {
    state: AggregateState,
    worker: usize,
    stage: u32,
    progress: Arc<Progress>,
}

impl Logic for AggregateLogic {
    fn tick(&mut self, moment: &Moment, inputs: Vec<Vec<Delta>>, outputs: &mut [Out]) {
        let partials = inputs.into_iter().next().expect("one input");
        let worked = !partials.is_empty();
        self.state.apply(&partials);
        let out = self.state.finish(moment.watermark);
        outputs[0].extend(out.deltas);
        outputs[1].extend(out.errors);
        if worked {
            let size = StateSize::of(&self.state);
            let counters = &self.progress.counters;
            counters.set_state(self.worker, self.stage, "aggregate", size);
        } else {
            self.state.relieve();
        }
    }
    fn freeze(&mut self) -> Option<Vec<Part>> {
        Some(self.state.freeze())
    }
}
