//! Following a relation: its changes, tick by tick, for one reader outside of the dataflow.
//!
//! # Contract
//!
//! * A follower is given to a relation with a read; it hears of every change after the tick of that
//!   read, and after `Upto(t)` of nothing below `t`.
//! * Workers never wait for it: one that does not keep up is cut off and told so.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::sync::mpsc::UnboundedSender;

use crate::delta::Delta;
use crate::time::Tick;

/// Bytes that may wait for a follower.
pub const FOLLOWER_BYTES: u64 = 64 << 20;

/// What a follower hears from one worker.
#[derive(Debug)]
pub enum Event {
    Changes(Tick, Vec<Delta>),
    /// Nothing below this tick follows.
    Upto(Tick),
    /// The relation was dropped.
    Closed,
}

/// The worker's end. See the module.
#[derive(Debug, Clone)]
pub struct Follower {
    sender: UnboundedSender<(usize, Event)>,
    load: Arc<Load>,
}

/// What waits for a follower.
#[derive(Debug, Default)]
pub struct Load {
    bytes: AtomicU64,
    overrun: AtomicBool,
}

impl Load {
    /// The follower was cut off.
    pub fn is_overrun(&self) -> bool {
        self.overrun.load(Ordering::Relaxed)
    }
    /// The follower has taken an event.
    pub fn took(&self, event: &Event) {
        self.bytes.fetch_sub(size(event), Ordering::Relaxed);
    }
}

fn size(event: &Event) -> u64 {
    match event {
        Event::Changes(_, deltas) => deltas.iter().map(|d| d.bytes() as u64).sum(),
        Event::Upto(_) | Event::Closed => size_of::<Event>() as u64,
    }
}

impl Follower {
    pub fn new(sender: UnboundedSender<(usize, Event)>, load: Arc<Load>) -> Self {
        Self { sender, load }
    }

    /// Cuts the follower off: what it should have heard was lost on the way.
    pub fn cut(&self) {
        self.load.overrun.store(true, Ordering::Relaxed);
        // Whoever waits wakes up.
        let _ = self.sender.send((0, Event::Closed));
    }

    /// Whether the follower is still there.
    pub fn send(&self, worker: usize, event: Event) -> bool {
        let bytes = size(&event);
        if self.load.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes > FOLLOWER_BYTES {
            self.load.overrun.store(true, Ordering::Relaxed);
        }
        !self.load.is_overrun() && self.sender.send((worker, event)).is_ok()
    }
}
