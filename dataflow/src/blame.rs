//! Whose work a thread does at the moment: what a panic is put down to.
//!
//! # Contract
//!
//! * Operators, sinks and hydration say for which relation they work and at which tick; who handles a
//!   panic asks for it on the thread that panicked.
//! * Saying so costs a write to a thread-local, so it is said for each activation and tick.

use std::cell::Cell;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use crate::plan::RelationId;
use crate::time::Tick;

thread_local! {
    static CURRENT: Cell<Option<Blame>> = const { Cell::new(None) };
}

/// Tick of the last checkpoint of this process.
static CHECKPOINT: AtomicU64 = AtomicU64::new(0);

/// A relation and the tick that is applied to it; zero while that is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blame {
    pub relation: RelationId,
    pub tick: Tick,
}

/// Until it is dropped the thread works for what was said.
#[derive(Debug)]
pub struct Entered {
    before: Option<Blame>,
    /// Stays on its thread.
    thread: PhantomData<*const ()>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.set(self.before);
    }
}

/// This thread works for a relation.
pub fn enter(relation: RelationId, tick: Tick) -> Entered {
    enter_as(Some(Blame { relation, tick }))
}

/// As on another thread, where [`current`] was asked for.
pub fn enter_as(blame: Option<Blame>) -> Entered {
    Entered {
        before: CURRENT.replace(blame),
        thread: PhantomData,
    }
}

/// The tick that is applied from now on.
pub fn at(tick: Tick) {
    if let Some(blame) = CURRENT.get() {
        CURRENT.set(Some(Blame { tick, ..blame }));
    }
}

/// For whom this thread works.
pub fn current() -> Option<Blame> {
    CURRENT.get()
}

/// The relation this thread works for.
pub fn relation() -> Option<RelationId> {
    current().map(|blame| blame.relation)
}

/// The state up to this tick is durable.
pub fn checkpointed(tick: Tick) {
    CHECKPOINT.fetch_max(tick, Ordering::Relaxed);
}

/// Tick of the last checkpoint.
pub fn last_checkpoint() -> Tick {
    CHECKPOINT.load(Ordering::Relaxed)
}

/// A task that works for a relation, on whatever thread it is polled.
pub fn scope<F: Future>(relation: RelationId, work: F) -> impl Future<Output = F::Output> {
    Scope {
        blame: Blame { relation, tick: 0 },
        work: Box::pin(work),
    }
}

struct Scope<F> {
    blame: Blame,
    work: Pin<Box<F>>,
}

impl<F: Future> Future for Scope<F> {
    type Output = F::Output;
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let _entered = enter_as(Some(self.blame));
        let polled = self.work.as_mut().poll(context);
        if let Some(blame) = current() {
            self.blame = blame;
        }
        polled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_entered_is_left_again() {
        let (one, two) = (RelationId(1), RelationId(2));
        assert_eq!(current(), None);
        let outer = enter(one, 5);
        {
            let _inner = enter(two, 0);
            at(7);
            let blame = Blame {
                relation: two,
                tick: 7,
            };
            assert_eq!(current(), Some(blame));
        }
        assert_eq!(relation(), Some(one));
        assert_eq!(current().map(|b| b.tick), Some(5));
        drop(outer);
        assert_eq!(current(), None);
    }

    #[tokio::test]
    async fn a_task_keeps_its_tick_while_it_waits() {
        let work = async {
            at(9);
            tokio::task::yield_now().await;
            current()
        };
        let blame = scope(RelationId(3), work).await.expect("it is said");
        assert_eq!((blame.relation, blame.tick), (RelationId(3), 9));
        assert_eq!(current(), None);
    }
}
