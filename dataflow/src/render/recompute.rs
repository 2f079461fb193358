//! Nodes that DataFusion computes: partitions anew, and rows that become several.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{RecordBatch, UInt32Array};
use arrow::datatypes::SchemaRef;

use super::Build;
use super::nodes::Deltas;
use crate::checkpoint::StageId;
use crate::delta::exchange::Route;
use crate::delta::{Delta, Diffs};
use crate::kernel::late;
use crate::kernel::recompute::{First, RecomputeSpec, RecomputeState, Runner};
use crate::kernel::{OUTPUT_ROWS, RowErrors, nullable, row_error};
use crate::operator::map::map;
use crate::operator::stage::{Logic, Moment, Out};
use crate::plan::{Computation, NodeId, Op, Plan, RelationId};
use crate::state::{Part, Stateful};
use crate::worker::command::{Progress, StateSize};

/// The computation at `id`, for its kernel.
pub fn recompute_spec(plan: &Plan, id: NodeId) -> RecomputeSpec {
    let node = &plan.nodes[id];
    let Op::Recompute {
        inputs,
        keys,
        compute,
        close,
        emit,
        allowed_lateness_us,
        first,
    } = &node.op
    else {
        unreachable!("called for computations")
    };
    let schemas = inputs.iter().map(|i| Arc::clone(&plan.nodes[*i].schema));
    RecomputeSpec {
        inputs: schemas.collect(),
        keys: keys.clone(),
        output: Arc::clone(&node.schema),
        compute: Arc::clone(compute),
        close: *close,
        emit: *emit,
        allowed_lateness_us: *allowed_lateness_us,
        first: first.map(|rows| First {
            rows,
            growing: inputs.iter().all(|input| plan.nodes[*input].append_only),
        }),
    }
}

pub fn recompute<'s>(
    build: &mut Build<'_, 's>,
    plan: &Plan,
    id: NodeId,
    stage: StageId,
    streams: &[Deltas<'s>],
    sources: &[RelationId],
) -> Deltas<'s> {
    let Op::Recompute { inputs, .. } = &plan.nodes[id].op else {
        unreachable!("called for computations")
    };
    let spec = Arc::new(recompute_spec(plan, id));
    let mut below = Vec::with_capacity(inputs.len());
    for (at, input) in inputs.iter().enumerate() {
        let stream = punctual(build, &spec, at, streams[*input].clone(), sources);
        below.push((stream, Some(Route::Columns(spec.keys[at].clone()))));
    }
    let worker = build.context.worker;
    let mut state = RecomputeState::new(spec, worker, build.workers);
    let counters = &build.install.progress.counters;
    if let Some(restored) = build.restored_stage(stage) {
        state
            .restore(&restored.parts)
            .expect("checksums of the checkpoint were verified");
        counters.set_state(worker, stage.0, "recompute", StateSize::of(&state));
    }
    let logic = RecomputeLogic {
        state,
        worker,
        stage: stage.0,
        progress: Arc::clone(&build.install.progress),
    };
    let logic = Box::new(logic);
    let mut outs = build.stage("Recompute", below, 2, stage, sources.to_vec(), logic);
    build.errors.push(outs.pop().expect("two outputs"));
    outs.pop().expect("two outputs")
}

/// The rows whose partitions are open; the others go to the late rows.
fn punctual<'s>(
    build: &mut Build<'_, 's>,
    spec: &Arc<RecomputeSpec>,
    input: usize,
    stream: Deltas<'s>,
    sources: &[RelationId],
) -> Deltas<'s> {
    let Some(rule) = spec.close else {
        return stream;
    };
    let column = spec.keys[input][rule.key];
    let lateness = spec.allowed_lateness_us;
    let watermark = build.lateness(sources);
    let split = move |tick, delta: Delta, outs: &mut [Out]| {
        let open = late::open_from(Some(rule), lateness, watermark(tick));
        match late::late(delta.batch.column(column), open) {
            None => outs[0].push(delta),
            Some(mask) => {
                outs[1].extend(delta.filter(&mask));
                outs[0].extend(delta.filter(&late::not(&mask)));
            }
        }
    };
    let mut outs = map(build.scope, "Punctual", stream, 2, split);
    let late = outs.pop().expect("two outputs");
    let schema = &spec.inputs[input];
    if build.late_schema.is_none() {
        build.late_schema = Some(Arc::clone(schema));
    }
    if build.late_schema.as_ref() == Some(schema) {
        build.late.push(late);
    }
    outs.pop().expect("two outputs")
}

struct RecomputeLogic {
    state: RecomputeState,
    worker: usize,
    stage: u32,
    progress: Arc<Progress>,
}

impl Logic for RecomputeLogic {
    fn tick(&mut self, moment: &Moment, inputs: Vec<Vec<Delta>>, outputs: &mut [Out]) {
        let worked = inputs.iter().any(|input| !input.is_empty());
        let out = self.state.tick(&inputs, moment.watermark);
        outputs[0].extend(out.deltas);
        outputs[1].extend(out.errors);
        if worked {
            let size = StateSize::of(&self.state);
            let counters = &self.progress.counters;
            counters.set_state(self.worker, self.stage, "recompute", size);
        }
    }
    fn freeze(&mut self) -> Option<Vec<Part>> {
        Some(self.state.freeze())
    }
}

/// Rows that are computed at a time before it is known how many each becomes.
const FIRST_SLICE: usize = 64;

/// Rows that become any number of rows, each by itself.
pub fn expand<'s>(
    build: &mut Build<'_, 's>,
    compute: &Arc<Computation>,
    output: &SchemaRef,
    stream: Deltas<'s>,
) -> Deltas<'s> {
    let runner = Runner::new(Arc::clone(compute), nullable(output));
    // Rows that are computed at a time, so many that they give about as many as an output may have.
    let mut slice = FIRST_SLICE;
    let each = move |_tick, delta: Delta, outs: &mut [Out]| {
        let mut errors = RowErrors::default();
        for delta in by_diff(delta) {
            let diff = delta.diffs.get(0);
            let mut from = 0;
            while from < delta.len() {
                let count = slice.min(delta.len() - from);
                let mut given = 0;
                let mut show = |batches: Vec<RecordBatch>| {
                    given += batches.iter().map(RecordBatch::num_rows).sum::<usize>();
                    outs[0].extend(signed(batches, diff));
                };
                match runner.run(&[delta.batch.slice(from, count)]) {
                    Ok(batches) => show(batches),
                    // One of the rows fails: each by itself.
                    Err(_) => {
                        for row in from..from + count {
                            match runner.run(&[delta.batch.slice(row, 1)]) {
                                Ok(batches) => show(batches),
                                Err(e) => {
                                    let (code, message) = row_error(&e);
                                    errors.push(code, message, diff);
                                }
                            }
                        }
                    }
                }
                from += count;
                slice = (count * OUTPUT_ROWS / given.max(1)).clamp(1, OUTPUT_ROWS);
            }
        }
        outs[1].extend(errors.finish());
    };
    let mut outs = map(build.scope, "Expand", stream, 2, each);
    build.errors.push(outs.pop().expect("two outputs"));
    outs.pop().expect("two outputs")
}

/// The rows of each diff apart.
fn by_diff(delta: Delta) -> Vec<Delta> {
    if delta.diffs.is_ones() {
        return vec![delta];
    }
    let mut rows: BTreeMap<i64, Vec<u32>> = BTreeMap::new();
    for row in 0..delta.len() {
        rows.entry(delta.diffs.get(row))
            .or_default()
            .push(row as u32);
    }
    rows.into_values()
        .map(|rows| delta.take(&UInt32Array::from(rows)))
        .collect()
}

/// As deltas of a bounded number of rows.
fn signed(batches: Vec<RecordBatch>, diff: i64) -> impl Iterator<Item = Delta> {
    batches.into_iter().flat_map(move |batch| {
        let rows = batch.num_rows();
        (0..rows).step_by(OUTPUT_ROWS).map(move |from| {
            let count = OUTPUT_ROWS.min(rows - from);
            let diffs = Diffs::from_vec(vec![diff; count]);
            Delta::new(batch.slice(from, count), diffs)
        })
    })
}
