//! Taps: where a relation hands on its changes, and the queues through which others receive them.
//!
//! A tap is worker-local. Its relation publishes the deltas of a tick and then completes the tick;
//! each subscriber's queue feeds an import operator in another dataflow of the same worker
//! (see [`crate::operator::import`]).
//!
//! # Contract
//!
//! * A subscriber from tick `A` sees exactly the changes at and after `A`; before them, if it asked
//!   for contents, the relation's contents as of the tick before `A`.
//! * After `Upto(t)` nothing below `t` follows.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use timely::scheduling::Activator;

use crate::delta::Delta;
use crate::kernel::contents::FrozenContents;
use crate::time::Tick;

/// What an import operator reads.
#[derive(Debug)]
pub enum Item {
    /// Changes at a tick.
    Data(Tick, Delta),
    /// All changes of a tick: what turns the contents of an old plan into those of the new one.
    Difference(Tick, Vec<Delta>),
    /// Nothing below this tick follows.
    Upto(Tick),
    /// Contents as of the attach tick, to be fed in private ticks.
    Contents(FrozenContents),
    /// No more history: the next tick is at or after this one.
    Attached(Tick),
    /// The relation or the subscriber was dropped.
    Closed,
}

/// A queue between a tap (or a history feeder) and an import operator.
#[derive(Default)]
pub struct Queue {
    /// History: private ticks, until `Attached`.
    pub history: VecDeque<Item>,
    /// What the tap publishes from the attach tick on; read after `Attached`.
    pub live: VecDeque<Item>,
    pub activator: Option<Activator>,
    pub closed: bool,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Queue({} history, {} live)",
            self.history.len(),
            self.live.len()
        )
    }
}

pub type SharedQueue = Rc<RefCell<Queue>>;

impl Queue {
    pub fn wake(&self) {
        if let Some(activator) = &self.activator {
            activator.activate();
        }
    }
}

/// The outlet of a relation on one worker.
#[derive(Debug, Default)]
pub struct Tap {
    subscribers: Vec<(Tick, SharedQueue)>,
    /// Subscribers that wait for contents as of the tick before theirs.
    waiting: Vec<(Tick, SharedQueue)>,
}

pub type SharedTap = Rc<RefCell<Tap>>;

impl Tap {
    /// Changes from `from` on.
    pub fn subscribe(&mut self, from: Tick, queue: SharedQueue) {
        self.subscribers.push((from, queue));
    }
    /// Contents as of the tick before `from`, then changes.
    pub fn subscribe_with_contents(&mut self, from: Tick, queue: SharedQueue) {
        self.waiting.push((from, queue));
    }
    /// Serves waiting subscribers whose tick is at most `next`, the first tick not yet applied.
    pub fn serve_waiting(&mut self, next: Tick, freeze: impl Fn() -> FrozenContents) {
        let (ready, waiting) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(|(from, _)| *from <= next);
        self.waiting = waiting;
        let ready: Vec<(Tick, SharedQueue)> = ready;
        for (from, queue) in ready {
            {
                let mut q = queue.borrow_mut();
                q.history.push_back(Item::Contents(freeze()));
                q.history.push_back(Item::Attached(from));
                q.wake();
            }
            self.subscribers.push((from, queue));
        }
    }
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }
    pub fn publish(&mut self, tick: Tick, delta: &Delta) {
        if delta.is_empty() {
            return;
        }
        for (from, queue) in &self.subscribers {
            if tick >= *from {
                queue
                    .borrow_mut()
                    .live
                    .push_back(Item::Data(tick, delta.clone()));
            }
        }
    }
    /// The changes of the tick at which a new plan takes the place of the old one.
    pub fn publish_difference(&mut self, tick: Tick, changes: &[Delta]) {
        for (from, queue) in &self.subscribers {
            if tick >= *from {
                let item = Item::Difference(tick, changes.to_vec());
                queue.borrow_mut().live.push_back(item);
            }
        }
    }
    /// Takes the subscribers of another tap along.
    pub fn adopt(&mut self, other: Self) {
        self.subscribers.extend(other.subscribers);
        self.waiting.extend(other.waiting);
    }
    /// All changes below `next` were published.
    pub fn complete(&mut self, next: Tick) {
        self.subscribers.retain(|(_, queue)| !queue.borrow().closed);
        for (_, queue) in &self.subscribers {
            let mut queue = queue.borrow_mut();
            if let Some(Item::Upto(t)) = queue.live.back_mut() {
                *t = next;
            } else {
                queue.live.push_back(Item::Upto(next));
            }
            queue.wake();
        }
    }
    /// Ends all subscribers.
    pub fn close(&mut self) {
        for (_, queue) in self.subscribers.drain(..).chain(self.waiting.drain(..)) {
            let mut queue = queue.borrow_mut();
            queue.live.push_back(Item::Closed);
            queue.wake();
        }
    }
}
