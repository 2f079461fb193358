//! A worker process's share of a checkpoint: written here, listed by the server.
//!
//! The objects carry the number of the checkpoint and of the worker, so they collide with nobody's; they
//! count once the server's manifest names them. What was written for a checkpoint that did not come
//! about is forgotten: the next one does not build on it.

use std::collections::BTreeMap;
use std::ops::Range;

use tokio::sync::mpsc::UnboundedReceiver;

use super::super::wire::Up;
use super::Outbox;
use crate::checkpoint::Message;
use crate::checkpoint::parts::{Gathered, Held, write_all};
use crate::checkpoint::store::CheckpointStore;

/// Runs as long as the process.
pub(super) async fn run(
    store: CheckpointStore,
    workers: Range<usize>,
    mut messages: UnboundedReceiver<Message>,
    mut durable: UnboundedReceiver<u64>,
    outbox: Outbox,
) {
    let mut open: BTreeMap<u64, Gathered> = BTreeMap::new();
    let mut held = Held::default();
    let mut written: BTreeMap<u64, Held> = BTreeMap::new();
    loop {
        let message = tokio::select! {
            biased;
            // Said before the next checkpoint is marked, so it is heard before its parts are.
            Some(checkpoint) = durable.recv() => {
                if let Some(now) = written.remove(&checkpoint) {
                    held = now;
                }
                written = written.split_off(&checkpoint);
                continue;
            }
            Some(message) = messages.recv() => message,
            else => return,
        };
        for checkpoint in Gathered::add(&mut open, message) {
            let complete = |g: &Gathered| g.complete(workers.len());
            if !open.get(&checkpoint).is_some_and(complete) {
                continue;
            }
            let parts = open.remove(&checkpoint).unwrap_or_default().into_parts();
            let result = write_all(&store, &held, workers.clone(), parts, checkpoint).await;
            let part = match result {
                Ok((part, after)) => {
                    written.insert(checkpoint, after);
                    Ok(part)
                }
                Err(e) => Err(e.into()),
            };
            outbox.send(Up::Part { checkpoint, part });
        }
    }
}
