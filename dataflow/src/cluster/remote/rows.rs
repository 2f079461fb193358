//! What readers and followers at the server are sent of the rows here.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use tokio::runtime::Handle;
use tokio::sync::mpsc::unbounded_channel;
use tokio::task::AbortHandle;

use super::super::wire::{Up, WireEvent, WireMark};
use super::Outbox;
use crate::delta::{Delta, ipc};
use crate::error::{Error, Result};
use crate::follow::{Event, Follower, Load};
use crate::ingest::lock;
use crate::kernel::contents::FrozenContents;
use crate::tick::{ReadAnswer, ReadMark};

/// See the module.
pub(super) struct Readers {
    /// Number of the first worker here among all.
    first: usize,
    outbox: Outbox,
    runtime: Handle,
    /// By mark.
    following: Arc<Mutex<BTreeMap<u64, AbortHandle>>>,
}

impl Readers {
    pub(super) fn new(first: usize, outbox: Outbox, runtime: Handle) -> Self {
        Self {
            first,
            outbox,
            runtime,
            following: Arc::default(),
        }
    }

    /// A mark for the workers here, whose answers go to the server.
    pub(super) fn mark(&self, wire: WireMark) -> ReadMark {
        let mark = wire.mark;
        let (answer, mut answers) = unbounded_channel::<ReadAnswer>();
        let outbox = self.outbox.clone();
        self.runtime.spawn(async move {
            while let Some((tick, relation, frozen)) = answers.recv().await {
                // Contents are decoded and encoded again: not a moment's work.
                let encoded = tokio::task::spawn_blocking(move || encode(&frozen)).await;
                let encoded = encoded.map_err(|e| Error::internal(e.to_string()));
                match encoded.and_then(|e| e) {
                    Ok(blobs) => {
                        let up = Up::Answer {
                            mark,
                            tick,
                            relation,
                        };
                        outbox.send_with(up, blobs);
                    }
                    // The reader learns that an answer is missing.
                    Err(error) => {
                        tracing::error!(%error, "contents could not be sent");
                        break;
                    }
                }
            }
            outbox.send(Up::Answered { mark });
        });
        ReadMark {
            relations: wire.relations.into(),
            answer,
            follow: wire.follow.then(|| self.follow(mark)),
        }
    }

    fn follow(&self, mark: u64) -> Follower {
        let (sender, mut events) = unbounded_channel();
        let load = Arc::new(Load::default());
        let follower = Follower::new(sender, Arc::clone(&load));
        let (outbox, first) = (self.outbox.clone(), self.first);
        let following = Arc::clone(&self.following);
        let task = self.runtime.spawn(async move {
            while let Some((worker, event)) = events.recv().await {
                let blobs = match &event {
                    Event::Changes(_, deltas) => deltas.iter().map(ipc::encode).collect(),
                    Event::Upto(_) | Event::Closed => Vec::new(),
                };
                load.took(&event);
                let event = match event {
                    Event::Changes(tick, _) => WireEvent::Changes(tick),
                    Event::Upto(tick) => WireEvent::Upto(tick),
                    Event::Closed => WireEvent::Closed,
                };
                let worker = worker - first;
                let up = Up::Event {
                    mark,
                    worker,
                    event,
                };
                outbox.send_with(up, blobs);
            }
            lock(&following).remove(&mark);
            let overrun = load.is_overrun();
            outbox.send(Up::Unfollowed { mark, overrun });
        });
        lock(&self.following).insert(mark, task.abort_handle());
        follower
    }

    /// The follower of this mark has gone.
    pub(super) fn unfollow(&self, mark: u64) {
        if let Some(task) = lock(&self.following).remove(&mark) {
            // The workers see it when they send the next event.
            task.abort();
        }
    }
}

fn encode(frozen: &FrozenContents) -> Result<Vec<Vec<u8>>> {
    let batches = frozen.batches(None)?;
    Ok(batches
        .into_iter()
        .map(|batch| ipc::encode(&Delta::inserts(batch)))
        .collect())
}
