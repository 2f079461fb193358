//! Joins: both sides by key to the worker that keeps it.

use std::sync::Arc;

use super::Deltas;
use crate::checkpoint::StageId;
use crate::delta::Delta;
use crate::delta::exchange::Route;
use crate::kernel::TickOutput;
use crate::kernel::join::{
    CountedSetSpec, CountedSetState, JoinSpec, JoinState, SemiJoinSpec, SemiJoinState,
};
use crate::operator::stage::{Logic, Moment, Out};
use crate::plan::{NodeId, Op, Plan, RelationId};
use crate::render::Build;
use crate::state::{Part, Stateful};
use crate::time::Watermark;
use crate::worker::command::{Progress, StateSize};

/// The join at `id`, for its kernel.
pub fn join_spec(plan: &Plan, id: NodeId) -> JoinSpec {
    let node = &plan.nodes[id];
    let Op::Join {
        left,
        right,
        on,
        null_equal,
        filter,
        left_close,
        right_close,
    } = &node.op
    else {
        unreachable!("called for joins")
    };
    JoinSpec {
        left: Arc::clone(&plan.nodes[*left].schema),
        right: Arc::clone(&plan.nodes[*right].schema),
        output: Arc::clone(&node.schema),
        on: on.clone(),
        null_equal: *null_equal,
        filter: filter.clone(),
        left_close: *left_close,
        right_close: *right_close,
        append_only: plan.nodes[*left].append_only && plan.nodes[*right].append_only,
    }
}

/// The semi-join at `id`, for its kernel.
pub fn semi_join_spec(plan: &Plan, id: NodeId) -> SemiJoinSpec {
    let node = &plan.nodes[id];
    let Op::SemiJoin {
        left,
        right,
        on,
        anti,
        null_equal,
        close,
    } = &node.op
    else {
        unreachable!("called for semi-joins")
    };
    SemiJoinSpec {
        left: Arc::clone(&plan.nodes[*left].schema),
        right: Arc::clone(&plan.nodes[*right].schema),
        output: Arc::clone(&node.schema),
        on: on.clone(),
        anti: *anti,
        null_equal: *null_equal,
        close: *close,
        append_only: plan.nodes[*left].append_only && plan.nodes[*right].append_only,
    }
}

/// The counted set operation at `id`, for its kernel.
pub fn counted_set_spec(plan: &Plan, id: NodeId) -> CountedSetSpec {
    let node = &plan.nodes[id];
    let Op::CountedSet {
        left,
        right,
        except,
        close,
    } = &node.op
    else {
        unreachable!("called for set operations")
    };
    CountedSetSpec {
        left: Arc::clone(&plan.nodes[*left].schema),
        right: Arc::clone(&plan.nodes[*right].schema),
        output: Arc::clone(&node.schema),
        except: *except,
        close: *close,
    }
}

pub(super) fn join<'s>(
    build: &mut Build<'_, 's>,
    plan: &Plan,
    id: NodeId,
    stage: StageId,
    streams: &[Deltas<'s>],
    sources: &[RelationId],
) -> Deltas<'s> {
    let Op::Join { left, right, .. } = &plan.nodes[id].op else {
        unreachable!("called for joins")
    };
    let spec = join_spec(plan, id);
    let (left_keys, right_keys) = spec.on.iter().copied().unzip();
    let state = JoinState::new(Arc::new(spec), build.context.worker, build.workers);
    let sides = Sides {
        left: (streams[*left].clone(), left_keys),
        right: (streams[*right].clone(), right_keys),
    };
    by_key(build, ("Join", "join"), stage, sides, sources, state)
}

pub(super) fn semi_join<'s>(
    build: &mut Build<'_, 's>,
    plan: &Plan,
    id: NodeId,
    stage: StageId,
    streams: &[Deltas<'s>],
    sources: &[RelationId],
) -> Deltas<'s> {
    let Op::SemiJoin { left, right, .. } = &plan.nodes[id].op else {
        unreachable!("called for semi-joins")
    };
    let spec = semi_join_spec(plan, id);
    let keys = spec.on.clone();
    let state = SemiJoinState::new(&spec, build.context.worker, build.workers);
    let sides = Sides {
        right: (streams[*right].clone(), (0..keys.len()).collect()),
        left: (streams[*left].clone(), keys),
    };
    by_key(build, ("SemiJoin", "join"), stage, sides, sources, state)
}

pub(super) fn counted_set<'s>(
    build: &mut Build<'_, 's>,
    plan: &Plan,
    id: NodeId,
    stage: StageId,
    streams: &[Deltas<'s>],
    sources: &[RelationId],
) -> Deltas<'s> {
    let Op::CountedSet { left, right, .. } = &plan.nodes[id].op else {
        unreachable!("called for set operations")
    };
    let spec = counted_set_spec(plan, id);
    let all: Vec<usize> = (0..spec.left.fields().len()).collect();
    let state = CountedSetState::new(&spec, build.context.worker, build.workers);
    let sides = Sides {
        left: (streams[*left].clone(), all.clone()),
        right: (streams[*right].clone(), all),
    };
    by_key(build, ("CountedSet", "set"), stage, sides, sources, state)
}

/// Both inputs, and the columns by which their rows meet.
struct Sides<'s> {
    left: (Deltas<'s>, Vec<usize>),
    right: (Deltas<'s>, Vec<usize>),
}

/// A kernel of two inputs.
trait Kernel: Stateful + 'static {
    fn tick(&mut self, left: &[Delta], right: &[Delta], watermark: Watermark) -> TickOutput;
}

impl Kernel for JoinState {
    fn tick(&mut self, left: &[Delta], right: &[Delta], watermark: Watermark) -> TickOutput {
        Self::tick(self, left, right, watermark)
    }
}

impl Kernel for SemiJoinState {
    fn tick(&mut self, left: &[Delta], right: &[Delta], watermark: Watermark) -> TickOutput {
        Self::tick(self, left, right, watermark)
    }
}

impl Kernel for CountedSetState {
    fn tick(&mut self, left: &[Delta], right: &[Delta], watermark: Watermark) -> TickOutput {
        Self::tick(self, left, right, watermark)
    }
}

fn by_key<'s>(
    build: &mut Build<'_, 's>,
    (name, kind): (&str, &'static str),
    stage: StageId,
    sides: Sides<'s>,
    sources: &[RelationId],
    mut state: impl Kernel,
) -> Deltas<'s> {
    let worker = build.context.worker;
    if let Some(restored) = build.restored_stage(stage) {
        state
            .restore(&restored.parts)
            .expect("checksums of the checkpoint were verified");
        let counters = &build.install.progress.counters;
        counters.set_state(worker, stage.0, kind, StateSize::of(&state));
    }
    let logic = JoinLogic {
        state,
        kind,
        worker,
        stage: stage.0,
        progress: Arc::clone(&build.install.progress),
    };
    let mut outs = build.stage(
        name,
        vec![
            (sides.left.0, Some(Route::Columns(sides.left.1))),
            (sides.right.0, Some(Route::Columns(sides.right.1))),
        ],
        2,
        stage,
        sources.to_vec(),
        Box::new(logic),
    );
    build.errors.push(outs.pop().expect("two outputs"));
    outs.pop().expect("two outputs")
}

struct JoinLogic<K> {
    state: K,
    kind: &'static str,
    worker: usize,
    stage: u32,
    progress: Arc<Progress>,
}

impl<K: Kernel> Logic for JoinLogic<K> {
    fn tick(&mut self, moment: &Moment, inputs: Vec<Vec<Delta>>, outputs: &mut [Out]) {
        let mut inputs = inputs.into_iter();
        let left = inputs.next().expect("two inputs");
        let right = inputs.next().expect("two inputs");
        let worked = !left.is_empty() || !right.is_empty();
        let out = self.state.tick(&left, &right, moment.watermark);
        outputs[0].extend(out.deltas);
        outputs[1].extend(out.errors);
        if worked {
            let size = StateSize::of(&self.state);
            let counters = &self.progress.counters;
            counters.set_state(self.worker, self.stage, self.kind, size);
        } else {
            self.state.relieve();
        }
    }
    fn freeze(&mut self) -> Option<Vec<Part>> {
        Some(self.state.freeze())
    }
}
