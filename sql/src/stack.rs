//! Work that recurses over statements and plans, on a thread with a stack made for it.
//!
//! Parsers, planners and the drop of a deep tree recurse once per level. Callers are often tasks on
//! two-megabyte stacks, where a statement of a few kilobytes could end the process. Each stage of
//! this crate therefore runs in [`on_big_stack`]; what leaves a stage has a bounded depth (see
//! `parse::limits`), so that it may be dropped anywhere.

use std::cell::Cell;

/// Address space, not memory: only the pages that are touched count.
const STACK_BYTES: usize = 256 << 20;

thread_local! {
    static BIG: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` on a big stack: on this thread when it has one already, else on a fresh one.
pub(crate) fn on_big_stack<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    if BIG.get() {
        return work();
    }
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("statement".into())
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, || {
                BIG.set(true);
                work()
            })
            .expect("a thread can be started, or the process is out of resources anyway");
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn depth(n: u64) -> u64 {
        let pad = std::hint::black_box([n; 64]);
        if n == 0 {
            0
        } else {
            depth(n - 1) + pad[3] / pad[5]
        }
    }

    #[test]
    fn survives_a_recursion_that_no_default_stack_holds() {
        assert_eq!(on_big_stack(|| on_big_stack(|| depth(100_000))), 100_000);
    }
}
