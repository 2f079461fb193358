//! How long workers stand still to freeze their state for checkpoints.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

static LAST: AtomicU64 = AtomicU64::new(0);
static LONGEST: AtomicU64 = AtomicU64::new(0);
static NEWEST: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// The checkpoint that this worker froze for last, and how long it took over all stages.
    static MINE: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
}

/// A stage of the calling worker was frozen for a checkpoint.
pub fn note(checkpoint: u64, took: Duration) {
    let took = took.as_nanos() as u64;
    let (of, sum) = MINE.get();
    let sum = if of == checkpoint { sum + took } else { took };
    MINE.set((checkpoint, sum));
    if NEWEST.fetch_max(checkpoint, Ordering::Relaxed) < checkpoint {
        LAST.store(0, Ordering::Relaxed);
    }
    LAST.fetch_max(sum, Ordering::Relaxed);
    LONGEST.fetch_max(sum, Ordering::Relaxed);
}

/// The pause of the worker that paused longest: in the last checkpoint, and in any since the start.
pub fn longest() -> (Duration, Duration) {
    let get = |nanos: &AtomicU64| Duration::from_nanos(nanos.load(Ordering::Relaxed));
    (get(&LAST), get(&LONGEST))
}
