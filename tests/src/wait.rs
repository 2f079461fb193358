//! Waiting for conditions.

use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_millis(20);

/// Polls until `probe` gives a value.
///
/// # Panics
///
/// When the deadline passes; `what` says what was waited for, `trouble` what was seen last.
pub fn until<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Result<T, String>) -> T {
    let started = Instant::now();
    loop {
        match probe() {
            Ok(value) => return value,
            Err(seen) => assert!(
                started.elapsed() < limit,
                "waited {:.0} s for {what}; last seen: {seen}",
                started.elapsed().as_secs_f64()
            ),
        }
        std::thread::sleep(PAUSE);
    }
}
