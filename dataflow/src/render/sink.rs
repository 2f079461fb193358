//! The dataflow of a sink: hands complete ticks to the task that writes files.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::mpsc::UnboundedSender;

use super::{Build, Inputs};
use crate::checkpoint::StageId;
use crate::delta::Delta;
use crate::operator::stage::{Logic, Moment, Out, stage};
use crate::plan::RelationId;
use crate::time::Tick;
use crate::worker::command::{Body, Progress, WriterMessage};

struct SinkLogic {
    id: RelationId,
    worker: usize,
    writer: UnboundedSender<WriterMessage>,
    skip_below: Tick,
    attach: std::rc::Rc<std::cell::Cell<Tick>>,
    queued_bytes: Arc<AtomicU64>,
    progress: Arc<Progress>,
}

impl Logic for SinkLogic {
    fn tick(&mut self, moment: &Moment, mut inputs: Vec<Vec<Delta>>, _outputs: &mut [Out]) {
        // Contents come in private ticks and belong to the tick before the attach tick.
        let tick = if moment.info.is_none() && moment.tick < self.attach.get() {
            self.attach.get().saturating_sub(1)
        } else {
            moment.tick
        };
        for delta in inputs.pop().expect("one input") {
            if tick < self.skip_below {
                continue;
            }
            // Before this tick is said to be applied: see how `committed` is shown.
            let counters = &self.progress.counters;
            counters.last_rows.fetch_max(tick + 1, Ordering::Relaxed);
            let bytes = delta.bytes();
            self.queued_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
            // The task lives until its sender is dropped with this dataflow.
            let _ = self.writer.send(WriterMessage::Write { tick, delta });
        }
        if let Some(info) = &moment.info {
            let epoch = info.marks.epochs.contains(&self.id);
            if epoch || info.marks.checkpoint.is_some() {
                let _ = self.writer.send(WriterMessage::Close {
                    upper: moment.tick + 1,
                    epoch,
                    checkpoint: info.marks.checkpoint,
                });
            }
        }
    }
    fn completed(&mut self, next: Tick) {
        self.progress.set(self.worker, 0, next);
    }
}

/// Ends the imported relation in the writers of the sink. Its state (closed files) reaches the
/// checkpoint through the sink's own task, so the stage is not counted as stateful.
pub fn render<'s>(build: &mut Build<'_, 's>, inputs: &Inputs<'s>) {
    let Body::Sink {
        from,
        writers,
        skip_below,
        queued_bytes,
        ..
    } = &build.install.body
    else {
        return;
    };
    let stream = inputs[from].0.clone();
    let logic = SinkLogic {
        id: build.install.id,
        worker: build.context.worker,
        // All processes have as many workers, numbered one process after the other.
        writer: writers[build.context.worker % writers.len()].clone(),
        skip_below: *skip_below,
        attach: std::rc::Rc::clone(&build.context.attach),
        queued_bytes: Arc::clone(queued_bytes),
        progress: Arc::clone(&build.install.progress),
    };
    let sources = build.install.inputs[from].sources.clone();
    stage(
        build.scope,
        "Sink",
        vec![(stream, None)],
        0,
        &build.context,
        StageId(0),
        sources,
        Box::new(logic),
    );
}
