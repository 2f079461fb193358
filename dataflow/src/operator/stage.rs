//! A stage: an operator that applies complete ticks, in order.
//!
//! # Contract
//!
//! * A tick is handed to the logic once no input can still bring rows of it; ticks come in order, and
//!   each tick that was minted comes, also without rows, because watermarks and marks travel with it.
//! * Output at a tick is given at that tick; the stage holds the capability for its next tick, so
//!   nothing downstream runs ahead of it.
//! * After the logic has applied a tick that is marked for a checkpoint, its state is frozen, before
//!   any later tick is applied.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use timely::container::NoopBuilder;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::generic::builder_rc::OperatorBuilder;
use timely::dataflow::operators::generic::{OutputBuilder, OutputBuilderSession};
use timely::dataflow::operators::{Capability, InputCapability};
use timely::dataflow::{Scope, Stream};

use crate::blame;
use crate::checkpoint::{PartSender, StageId, freeze_time};
use crate::delta::Delta;
use crate::delta::exchange::{Route, exchange};
use crate::plan::RelationId;
use crate::state::Part;
use crate::tick::{SharedTickLog, TickInfo};
use crate::time::{NO_WATERMARK, Tick, Watermark};

/// What all stages of a dataflow share on one worker.
#[derive(Clone)]
pub struct StageContext {
    pub relation: RelationId,
    pub worker: usize,
    pub ticks: SharedTickLog,
    /// The tick at which the dataflow is attached; `Tick::MAX` until that is known.
    pub attach: Rc<Cell<Tick>>,
    pub parts: PartSender,
}

/// A tick as the logic of a stage sees it.
#[derive(Debug, Clone)]
pub struct Moment {
    pub tick: Tick,
    /// Of the stage's sources as of this tick; of the tick before.
    pub watermark: Watermark,
    /// `None` for private ticks.
    pub info: Option<Arc<TickInfo>>,
}

/// One output port: deltas of the current tick.
pub type Out = Vec<Delta>;

/// The logic of a stage. See the module contract.
pub trait Logic {
    /// Applies one complete tick; `inputs` and `outputs` are by port.
    fn tick(&mut self, moment: &Moment, inputs: Vec<Vec<Delta>>, outputs: &mut [Out]);
    /// Frozen state, for a checkpoint; `None` for a stage without state.
    fn freeze(&mut self) -> Option<Vec<Part>> {
        None
    }
    /// All ticks below this one were applied.
    fn completed(&mut self, _next: Tick) {}
}

type Session<'a> = OutputBuilderSession<'a, Tick, NoopBuilder<Delta>>;
type Reader = Box<dyn FnMut(&mut dyn FnMut(Tick, Delta))>;

/// Adds a stage with one input per `(stream, route)` (`None`: rows stay on their worker).
///
/// `sources` are the sources below this stage, for its watermark. `stateful` stages are counted in a
/// checkpoint under `id`.
pub fn stage<'s>(
    scope: Scope<'s, Tick>,
    name: &str,
    inputs: Vec<(Stream<'s, Tick, Delta>, Option<Route>)>,
    outputs: usize,
    context: &StageContext,
    id: StageId,
    sources: Vec<RelationId>,
    mut logic: Box<dyn Logic>,
) -> Vec<Stream<'s, Tick, Delta>> {
    let mut builder = OperatorBuilder::new(name.to_owned(), scope);
    let mut readers: Vec<Reader> = Vec::new();
    for (stream, route) in inputs {
        match route {
            Some(route) => {
                let mut input = builder.new_input(stream, exchange(route));
                readers.push(Box::new(move |give| {
                    input.for_each(|cap: InputCapability<Tick>, data| {
                        give(*cap.time(), std::mem::take(data))
                    });
                }));
            }
            None => {
                let mut input = builder.new_input(stream, Pipeline);
                readers.push(Box::new(move |give| {
                    input.for_each(|cap: InputCapability<Tick>, data| {
                        give(*cap.time(), std::mem::take(data))
                    });
                }));
            }
        }
    }
    let mut ports: Vec<OutputBuilder<Tick, NoopBuilder<Delta>>> = Vec::new();
    let mut streams = Vec::new();
    for _ in 0..outputs {
        let (output, stream) = builder.new_output();
        ports.push(OutputBuilder::from(output));
        streams.push(stream);
    }
    let context = context.clone();
    let relation = blame::relation();
    builder.build(move |capabilities| {
        let mut capabilities: Vec<Capability<Tick>> = capabilities;
        let width = readers.len();
        let mut waiting: BTreeMap<Tick, Vec<Vec<Delta>>> = BTreeMap::new();
        let mut next: Tick = 0;
        let mut done = false;
        move |frontiers| {
            let _blame = relation.map(|r| blame::enter(r, 0));
            for (port, reader) in readers.iter_mut().enumerate() {
                reader(&mut |tick, delta| {
                    waiting
                        .entry(tick)
                        .or_insert_with(|| vec![Vec::new(); width])[port]
                        .push(delta);
                });
            }
            if done {
                return;
            }
            // An empty frontier means that this input has ended.
            let frontier = frontiers
                .iter()
                .filter_map(|f| f.frontier().first().copied())
                .min()
                .unwrap_or(Tick::MAX);
            if frontier <= next {
                return;
            }
            let attach = context.attach.get();
            let minted: Vec<Tick> = context
                .ticks
                .borrow()
                .range(next.max(attach), frontier)
                .collect();
            let mut todo: Vec<Tick> = waiting.range(..frontier).map(|(t, _)| *t).collect();
            todo.extend(minted);
            todo.sort_unstable();
            todo.dedup();
            let mut sessions: Vec<Session<'_>> =
                ports.iter_mut().map(OutputBuilder::activate).collect();
            let mut outs: Vec<Out> = vec![Vec::new(); outputs];
            for tick in todo {
                blame::at(tick);
                let rows = waiting
                    .remove(&tick)
                    .unwrap_or_else(|| vec![Vec::new(); width]);
                let info = if tick >= attach {
                    context.ticks.borrow().get(tick)
                } else {
                    None
                };
                let watermark = info
                    .as_ref()
                    .map_or(NO_WATERMARK, |i| i.watermark(&sources));
                let moment = Moment {
                    tick,
                    watermark,
                    info,
                };
                logic.tick(&moment, rows, &mut outs);
                for (port, out) in outs.iter_mut().enumerate() {
                    for mut delta in out.drain(..).filter(|d| !d.is_empty()) {
                        let capability = capabilities[port].delayed(&tick);
                        sessions[port]
                            .session_with_builder(&capability)
                            .give_container(&mut delta);
                    }
                }
                if let Some(info) = &moment.info
                    && let Some(checkpoint) = info.marks.checkpoint
                    && let (started, Some(parts)) = (Instant::now(), logic.freeze())
                {
                    freeze_time::note(checkpoint, started.elapsed());
                    context
                        .parts
                        .send(checkpoint, context.relation, id, context.worker, parts);
                }
                logic.completed(tick + 1);
            }
            drop(sessions);
            next = frontier;
            logic.completed(next);
            if frontier == Tick::MAX {
                capabilities.clear();
                done = true;
            } else {
                for capability in &mut capabilities {
                    capability.downgrade(&frontier);
                }
            }
        }
    });
    streams
}
