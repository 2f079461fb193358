//! Brings the changes of another relation into a dataflow.
//!
//! History comes first, in private ticks 1, 2, 3, … ; after `Attached(A)` the live changes follow at
//! their own ticks. Contents of a served relation are cut into bounded private ticks here, on the
//! worker, so that attaching to a large view does not build one huge batch.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use timely::container::NoopBuilder;
use timely::dataflow::operators::generic::operator::source;
use timely::dataflow::{Scope, Stream};

use crate::blame;
use crate::delta::Delta;
use crate::kernel::contents::consolidate;
use crate::tap::{Item, SharedQueue};
use crate::time::Tick;
use crate::worker::command::{Counters, Progress};

/// Items handled per activation, so that one import does not hold up its worker.
const FUEL: usize = 64;

/// Picks columns by name: the producer may carry more than this consumer wants.
struct Picker {
    names: Vec<String>,
    schema: SchemaRef,
    seen: HashMap<usize, Vec<usize>>,
    held: Vec<SchemaRef>,
    progress: Arc<Progress>,
}

impl Picker {
    fn pick(&mut self, delta: Delta) -> Delta {
        let schema = delta.batch.schema();
        let pointer = Arc::as_ptr(&schema).addr();
        let indices = self.seen.entry(pointer).or_insert_with(|| {
            // Held, so that the address cannot be reused by another schema.
            self.held.push(Arc::clone(&schema));
            self.names
                .iter()
                .map(|n| {
                    schema
                        .index_of(n)
                        .expect("the plan names columns of the relation")
                })
                .collect()
        });
        let columns = indices
            .iter()
            .map(|i| Arc::clone(delta.batch.column(*i)))
            .collect();
        let options = arrow::array::RecordBatchOptions::new().with_row_count(Some(delta.len()));
        let batch = RecordBatch::try_new_with_options(Arc::clone(&self.schema), columns, &options)
            .expect("the plan has the relation's types");
        let picked = Delta {
            batch,
            diffs: delta.diffs,
        };
        let counters = &self.progress.counters;
        Counters::add(&counters.rows_in, picked.len());
        Counters::add(&counters.bytes_in, picked.bytes());
        picked
    }

    /// The changes that are left when only some columns are looked at: rows may differ in others.
    fn pick_difference(&mut self, changes: Vec<Delta>) -> Vec<Delta> {
        let narrower = changes
            .iter()
            .any(|delta| delta.batch.num_columns() > self.schema.fields().len());
        let picked: Vec<Delta> = changes.into_iter().map(|delta| self.pick(delta)).collect();
        if !narrower {
            return picked;
        }
        consolidate(&self.schema, &picked).expect("a relation's columns can be kept as rows")
    }
}

/// The stream of a relation's columns `schema` (by name) as they arrive in `queue`; counts what comes
/// in as rows of the reading dataflow.
pub fn import<'s>(
    scope: Scope<'s, Tick>,
    name: &str,
    queue: SharedQueue,
    schema: SchemaRef,
    progress: Arc<Progress>,
) -> Stream<'s, Tick, Delta> {
    let relation = blame::relation();
    let names = schema.fields().iter().map(|f| f.name().clone()).collect();
    let mut picker = Picker {
        names,
        schema,
        seen: HashMap::new(),
        held: Vec::new(),
        progress,
    };
    source::<_, NoopBuilder<Delta>, _, _>(scope, name, move |capability, info| {
        let activator = scope.activator_for(Rc::clone(&info.address));
        queue.borrow_mut().activator = Some(scope.activator_for(info.address));
        let mut capability = Some(capability);
        let mut attached = false;
        // Frozen contents still to be cut into private ticks.
        let mut contents: Option<Box<dyn Iterator<Item = Delta>>> = None;
        move |output| {
            let _blame = relation.map(|r| blame::enter(r, 0));
            let Some(cap) = capability.as_mut() else {
                return;
            };
            for _ in 0..FUEL {
                if queue.borrow().closed {
                    capability = None;
                    return;
                }
                if let Some(deltas) = contents.as_mut() {
                    match deltas.next() {
                        Some(delta) => {
                            let tick = *cap.time() + 1;
                            let mut delta = picker.pick(delta);
                            output
                                .session_with_builder(&cap.delayed(&tick))
                                .give_container(&mut delta);
                            cap.downgrade(&tick);
                        }
                        None => contents = None,
                    }
                    continue;
                }
                let item = {
                    let mut queue = queue.borrow_mut();
                    if attached {
                        queue.live.pop_front()
                    } else {
                        queue.history.pop_front()
                    }
                };
                match item {
                    None => return,
                    Some(Item::Data(tick, delta)) => {
                        let mut delta = picker.pick(delta);
                        output
                            .session_with_builder(&cap.delayed(&tick))
                            .give_container(&mut delta);
                    }
                    Some(Item::Difference(tick, changes)) => {
                        let cap = cap.delayed(&tick);
                        for mut delta in picker.pick_difference(changes) {
                            output.session_with_builder(&cap).give_container(&mut delta);
                        }
                    }
                    Some(Item::Upto(tick)) => {
                        if tick > *cap.time() {
                            cap.downgrade(&tick);
                        }
                    }
                    Some(Item::Contents(frozen)) => {
                        contents = Some(Box::new((0..frozen.chunks()).flat_map(move |chunk| {
                            frozen
                                .chunk_deltas(chunk)
                                .expect("these rows were encoded from columns")
                        })));
                    }
                    Some(Item::Attached(tick)) => {
                        attached = true;
                        if tick > *cap.time() {
                            cap.downgrade(&tick);
                        }
                    }
                    Some(Item::Closed) => {
                        capability = None;
                        return;
                    }
                }
            }
            activator.activate();
        }
    })
}
