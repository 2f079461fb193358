//! What a run cost: wall time, CPU time of the whole process, peak memory; as one JSON line.

use std::time::Instant;

use serde::Serialize;

/// CPU seconds (user and system) this process has used.
pub(crate) fn cpu_seconds() -> f64 {
    let mut usage = unsafe { std::mem::zeroed::<libc::rusage>() };
    // SAFETY: `usage` is a valid place for the answer.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Peak resident memory of this process so far, in MiB.
pub(crate) fn peak_mib() -> f64 {
    let mut usage = unsafe { std::mem::zeroed::<libc::rusage>() };
    // SAFETY: `usage` is a valid place for the answer.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    usage.ru_maxrss as f64 / 1024.0
}

#[derive(Debug)]
pub(crate) struct Stopwatch {
    wall: Instant,
    cpu: f64,
}

#[derive(Debug, Serialize)]
pub(crate) struct Run {
    pub(crate) suite: &'static str,
    pub(crate) query: String,
    pub(crate) input: String,
    pub(crate) workers: usize,
    /// Events of all three kinds.
    pub(crate) events: u64,
    /// Rows of the result at the end.
    pub(crate) result_rows: u64,
    pub(crate) wall_s: f64,
    pub(crate) cpu_s: f64,
    pub(crate) events_per_s: f64,
    pub(crate) events_per_cpu_s: f64,
    pub(crate) peak_mib: f64,
}

impl Stopwatch {
    pub(crate) fn start() -> Self {
        Self {
            wall: Instant::now(),
            cpu: cpu_seconds(),
        }
    }
    /// Wall and CPU seconds since the start.
    pub(crate) fn stop(&self) -> (f64, f64) {
        (self.wall.elapsed().as_secs_f64(), cpu_seconds() - self.cpu)
    }
}

impl Run {
    pub(crate) fn print(&self) {
        println!("{}", serde_json::to_string(self).expect("plain data"));
    }
}
