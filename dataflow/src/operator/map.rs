//! A stateless operator: each delta on its own, as it arrives, with several outputs.

use timely::container::NoopBuilder;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::generic::OutputBuilder;
use timely::dataflow::operators::generic::builder_rc::OperatorBuilder;
use timely::dataflow::{Scope, Stream};
use timely::progress::operate::FrontierInterest;

use crate::blame;
use crate::delta::Delta;
use crate::time::Tick;

/// Applies `logic` to each delta; it pushes what leaves by port `p` into the `p`-th vector. It is not
/// woken by progress, only by data.
pub fn map<'s, L>(
    scope: Scope<'s, Tick>,
    name: &str,
    input: Stream<'s, Tick, Delta>,
    outputs: usize,
    mut logic: L,
) -> Vec<Stream<'s, Tick, Delta>>
where
    L: FnMut(Tick, Delta, &mut [Vec<Delta>]) + 'static,
{
    let mut builder = OperatorBuilder::new(name.to_owned(), scope);
    let mut input = builder.new_input(input, Pipeline);
    builder.set_notify_for(0, FrontierInterest::Never);
    let mut ports: Vec<OutputBuilder<Tick, NoopBuilder<Delta>>> = Vec::new();
    let mut streams = Vec::new();
    for _ in 0..outputs {
        let (output, stream) = builder.new_output();
        ports.push(OutputBuilder::from(output));
        streams.push(stream);
    }
    let relation = blame::relation();
    builder.build(move |_capabilities| {
        let mut outs: Vec<Vec<Delta>> = vec![Vec::new(); outputs];
        move |_frontiers| {
            input.for_each(|capability, data| {
                let _blame = relation.map(|r| blame::enter(r, *capability.time()));
                logic(*capability.time(), std::mem::take(data), &mut outs);
                for (port, out) in outs.iter_mut().enumerate() {
                    if out.is_empty() {
                        continue;
                    }
                    let capability = capability.retain(port);
                    let mut session = ports[port].activate();
                    for mut delta in out.drain(..).filter(|d| !d.is_empty()) {
                        session
                            .session_with_builder(&capability)
                            .give_container(&mut delta);
                    }
                }
            });
        }
    });
    streams
}
