//! The gate in front of a dataflow: while the relation is held, changes of its inputs wait here.
//!
//! # Contract
//!
//! * Whether a tick is held stands in its [`crate::tick::TickInfo`], which replay repeats, so after a
//!   crash the same changes wait.
//! * What waits is state: it is part of checkpoints, under an id that no plan uses. It passes, all of
//!   it, with the first tick that is not held. The watermark stood still meanwhile, so none of it is
//!   late for having waited.
//! * Behind the gate ticks go on without rows: reads and checkpoints are answered, dependants see no
//!   change.

use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use timely::dataflow::Stream;

use super::Build;
use crate::checkpoint::StageId;
use crate::delta::Delta;
use crate::kernel::backlog::Backlog;
use crate::operator::stage::{Logic, Moment, Out};
use crate::plan::RelationId;
use crate::state::{Part, Stateful};
use crate::time::Tick;
use crate::worker::command::{Progress, StateSize};

/// Stages of gates are numbered from here on, far above the nodes of any plan.
const FIRST: u32 = 1 << 20;

struct Gate {
    relation: RelationId,
    worker: usize,
    stage: u32,
    backlog: Backlog,
    progress: Arc<Progress>,
}

impl Gate {
    fn show(&self) {
        let size = match self.backlog.is_empty() {
            true => StateSize::default(),
            false => StateSize::of(&self.backlog),
        };
        let counters = &self.progress.counters;
        counters.set_state(self.worker, self.stage, "backlog", size);
    }
}

impl Logic for Gate {
    fn tick(&mut self, moment: &Moment, inputs: Vec<Vec<Delta>>, outputs: &mut [Out]) {
        let deltas = inputs.into_iter().next().expect("one input");
        if moment.info.as_ref().is_some_and(|i| i.holds(self.relation)) {
            for delta in &deltas {
                self.backlog
                    .push(delta)
                    .expect("rows have the relation's types");
            }
            if !deltas.is_empty() {
                self.show();
            }
            return;
        }
        if !self.backlog.is_empty() && moment.info.is_some() {
            let waited = self.backlog.take();
            outputs[0].extend(waited.expect("what was put out is read back"));
            self.show();
        }
        outputs[0].extend(deltas);
    }
    fn freeze(&mut self) -> Option<Vec<Part>> {
        Some(self.backlog.freeze())
    }
}

/// Puts a gate behind the `number`-th input of the dataflow.
pub(super) fn gate<'s>(
    build: &mut Build<'_, 's>,
    number: usize,
    stream: Stream<'s, Tick, Delta>,
    schema: &SchemaRef,
    sources: Vec<RelationId>,
) -> Stream<'s, Tick, Delta> {
    let id = StageId(FIRST + u32::try_from(number).expect("plans are small"));
    let mut backlog = Backlog::new(schema, build.share());
    if let Some(restored) = build.restored_stage(id) {
        backlog
            .restore(&restored.parts)
            .expect("checksums of the checkpoint were verified");
    }
    let gate = Gate {
        relation: build.install.relation(),
        worker: build.context.worker,
        stage: id.0,
        backlog,
        progress: Arc::clone(&build.install.progress),
    };
    if !gate.backlog.is_empty() {
        gate.show();
    }
    let mut outs = build.stage("Gate", vec![(stream, None)], 1, id, sources, Box::new(gate));
    outs.pop().expect("one output")
}
