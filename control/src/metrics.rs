//! `/metrics`: what the engine counts, in Prometheus' text format.
//!
//! The numbers live in the engine; a scrape copies them into a fresh registry, so nothing is counted
//! twice and relations that are gone vanish.

use std::time::Instant;

use millrace_dataflow::checkpoint::freeze_time;
use millrace_dataflow::engine::shared::{EngineStats, StateRow, Status};
use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::state::PagerStats;
use millrace_dataflow::worker::command::StateSize;
use prometheus::core::Collector;
use prometheus::{Counter, Encoder, GaugeVec, IntCounterVec, Opts, Registry, TextEncoder};
use prometheus::{Gauge, IntGaugeVec};

use crate::coordinator::Coordinator;

fn failed(e: prometheus::Error) -> Error {
    Error::internal(format!("metrics: {e}"))
}

/// All metrics as text. Without a coordinator (still starting) only those of the process.
pub fn render(coordinator: Option<&Coordinator>, started: Instant) -> Result<String> {
    let registry = Registry::new();
    process(&registry, started)?;
    gauge(
        &registry,
        "millrace_ready",
        "1 once everything is restored",
        f64::from(u8::from(coordinator.is_some())),
    )?;
    if let Some(coordinator) = coordinator {
        relations(&registry, &coordinator.status())?;
        engine(&registry, coordinator.stats())?;
        plane(&registry, coordinator)?;
        if let Some(stats) = coordinator.pager_stats() {
            pager(&registry, stats)?;
        }
        key_groups(&registry, &coordinator.state())?;
        let world = coordinator.world();
        let failed = world
            .entries
            .values()
            .filter(|e| e.failed.is_some())
            .count();
        gauge(
            &registry,
            "millrace_objects",
            "Objects in the catalog",
            world.entries.len() as f64,
        )?;
        gauge(
            &registry,
            "millrace_objects_failed",
            "Objects that could not be started",
            failed as f64,
        )?;
    }
    let mut out = Vec::new();
    TextEncoder::new()
        .encode(&registry.gather(), &mut out)
        .map_err(failed)?;
    String::from_utf8(out).map_err(|e| Error::internal(e.to_string()))
}

type Pick<T> = fn(&Status) -> T;

const COUNTERS: &[(&str, &str, Pick<u64>)] = &[
    ("millrace_rows_in_total", "Rows that arrived", |s| s.rows_in),
    ("millrace_rows_out_total", "Rows that left", |s| s.rows_out),
    ("millrace_bytes_in_total", "Bytes that arrived", |s| {
        s.bytes_in
    }),
    ("millrace_bytes_out_total", "Bytes that left", |s| {
        s.bytes_out
    }),
    (
        "millrace_late_rows_total",
        "Rows later than the watermark allowed",
        |s| s.late_rows,
    ),
    (
        "millrace_rejected_rows_total",
        "Records that could not be decoded",
        |s| s.rejected_rows,
    ),
    (
        "millrace_error_rows_total",
        "Rows whose expressions failed",
        |s| s.error_rows,
    ),
];

const GAUGES: &[(&str, &str, Pick<Option<u64>>)] = &[
    ("millrace_lag_ms", "How far behind the newest tick", |s| {
        Some(s.lag_ms)
    }),
    ("millrace_lag_offsets", "Records known to be unread", |s| {
        s.lag_offsets
    }),
    ("millrace_state_rows", "Rows of state", |s| {
        Some(s.state_rows)
    }),
    ("millrace_state_bytes", "Bytes of state in memory", |s| {
        Some(s.state_bytes)
    }),
    (
        "millrace_state_swapped_bytes",
        "Bytes of state in the swap file",
        |s| Some(s.state_swapped_bytes),
    ),
    (
        "millrace_frontier",
        "Tick below which everything is applied",
        |s| Some(s.frontier),
    ),
    (
        "millrace_committed_tick",
        "Tick below which the destination holds everything",
        |s| s.committed,
    ),
    (
        "millrace_backfill_done",
        "Offsets and rows of history that were read",
        |s| s.backfill.as_ref().map(|b| b.done),
    ),
    (
        "millrace_backfill_total",
        "Offsets and rows of history that are to be read",
        |s| s.backfill.as_ref().map(|b| b.total),
    ),
    (
        "millrace_backfill_rows_per_second",
        "Rows of history read, by second",
        |s| s.backfill.as_ref().map(|b| b.rows_per_s),
    ),
];

fn relations(registry: &Registry, status: &[Status]) -> Result<()> {
    for (name, help, pick) in COUNTERS {
        let family =
            IntCounterVec::new(Opts::new(*name, *help), &["relation", "kind"]).map_err(failed)?;
        for s in status {
            family
                .with_label_values(&[s.name.as_str(), s.kind])
                .inc_by(pick(s));
        }
        register(registry, family)?;
    }
    for (name, help, pick) in GAUGES {
        let family =
            IntGaugeVec::new(Opts::new(*name, *help), &["relation", "kind"]).map_err(failed)?;
        for s in status {
            if let Some(value) = pick(s) {
                let value = i64::try_from(value).unwrap_or(i64::MAX);
                family
                    .with_label_values(&[s.name.as_str(), s.kind])
                    .set(value);
            }
        }
        register(registry, family)?;
    }
    type Part = fn(&StateSize) -> u64;
    let parts: [(&str, &str, Part); 3] = [
        (
            "millrace_operator_state_rows",
            "Rows of state of one operator",
            |state| state.rows,
        ),
        (
            "millrace_operator_state_bytes",
            "Bytes of state of one operator in memory",
            |state| state.bytes,
        ),
        (
            "millrace_operator_state_swapped_bytes",
            "Bytes of state of one operator in the swap file",
            |state| state.swapped,
        ),
    ];
    for (name, help, pick) in parts {
        let family =
            IntGaugeVec::new(Opts::new(name, help), &["relation", "operator"]).map_err(failed)?;
        for s in status {
            for operator in &s.operators {
                let value = i64::try_from(pick(&operator.1)).unwrap_or(i64::MAX);
                family
                    .with_label_values(&[s.name.as_str(), operator.0.as_str()])
                    .set(value);
            }
        }
        register(registry, family)?;
    }
    let watermark = GaugeVec::new(
        Opts::new(
            "millrace_watermark_seconds",
            "Event time up to which a source claims to be complete",
        ),
        &["relation", "kind"],
    )
    .map_err(failed)?;
    let state = IntGaugeVec::new(
        Opts::new(
            "millrace_relation_state",
            "1 for the state the relation is in",
        ),
        &["relation", "kind", "state"],
    )
    .map_err(failed)?;
    for s in status {
        if let Some(value) = s.watermark {
            let seconds = if value == i64::MAX {
                f64::INFINITY
            } else {
                value as f64 / 1e6
            };
            watermark
                .with_label_values(&[s.name.as_str(), s.kind])
                .set(seconds);
        }
        state
            .with_label_values(&[s.name.as_str(), s.kind, s.state])
            .set(1);
    }
    register(registry, watermark)?;
    register(registry, state)
}

/// By worker, because a key group lives on one of them.
fn key_groups(registry: &Registry, state: &[StateRow]) -> Result<()> {
    type Pick = fn(&StateRow) -> Option<u64>;
    let parts: [(&str, &str, Pick); 2] = [
        (
            "millrace_operator_key_groups",
            "Key groups of one operator that hold rows, as of the last checkpoint",
            |row| row.usage.groups.map(u64::from),
        ),
        (
            "millrace_operator_hottest_group_rows",
            "Rows of the hottest key group that were written between the last two checkpoints",
            |row| row.usage.hottest.first().map(|(_, rows)| *rows),
        ),
    ];
    for (name, help, pick) in parts {
        let labels = &["relation", "operator", "worker"];
        let family = IntGaugeVec::new(Opts::new(name, help), labels).map_err(failed)?;
        for row in state {
            if let Some(value) = pick(row) {
                let worker = row.worker.to_string();
                family
                    .with_label_values(&[
                        row.relation.as_str(),
                        row.operator.as_str(),
                        worker.as_str(),
                    ])
                    .set(i64::try_from(value).unwrap_or(i64::MAX));
            }
        }
        register(registry, family)?;
    }
    Ok(())
}

/// Workers and processes of the data plane.
fn plane(registry: &Registry, coordinator: &Coordinator) -> Result<()> {
    let config = coordinator.config();
    gauge(
        registry,
        "millrace_workers",
        "Workers of the data plane, in each process",
        config.workers as f64,
    )?;
    gauge(
        registry,
        "millrace_processes",
        "Processes of the data plane",
        config.processes as f64,
    )?;
    let resident = GaugeVec::new(
        Opts::new(
            "millrace_worker_process_resident_bytes",
            "Resident memory of a worker process",
        ),
        &["process"],
    )
    .map_err(failed)?;
    for (index, bytes) in coordinator.resident_bytes().into_iter().enumerate() {
        let process = (index + 1).to_string();
        resident
            .with_label_values(&[process.as_str()])
            .set(bytes as f64);
    }
    register(registry, resident)
}

fn engine(registry: &Registry, stats: EngineStats) -> Result<()> {
    let counters = [
        (
            "millrace_ticks_total",
            "Ticks that were completed",
            stats.ticks as f64,
        ),
        (
            "millrace_tick_seconds_total",
            "Time from minting to completion, summed",
            stats.tick_us as f64 / 1e6,
        ),
        (
            "millrace_checkpoints_total",
            "Checkpoints taken",
            stats.checkpoints as f64,
        ),
        (
            "millrace_checkpoint_seconds_total",
            "Time of checkpoints, summed",
            stats.checkpoint_ms as f64 / 1e3,
        ),
        (
            "millrace_commits_total",
            "Commits of sinks",
            stats.commits as f64,
        ),
        (
            "millrace_commit_seconds_total",
            "Time of commits, summed",
            stats.commit_ms as f64 / 1e3,
        ),
    ];
    for (name, help, value) in counters {
        counter(registry, name, help, value)?;
    }
    gauge(
        registry,
        "millrace_checkpoint_tick",
        "Tick of the last checkpoint; a restart replays what lies above",
        stats.checkpoint_tick as f64,
    )?;
    gauge(
        registry,
        "millrace_checkpoint_bytes",
        "Size of the last checkpoint",
        stats.checkpoint_bytes as f64,
    )?;
    gauge(
        registry,
        "millrace_checkpoint_pause_seconds",
        "How long the workers of this process stood still for the last checkpoint, at most",
        freeze_time::longest().0.as_secs_f64(),
    )
}

fn pager(registry: &Registry, stats: PagerStats) -> Result<()> {
    let gauges = [
        (
            "millrace_memory_state_bytes",
            "Bytes of state in memory, with what readers keep there",
            stats.resident,
        ),
        (
            "millrace_memory_state_limit_bytes",
            "Bytes of state that may be in memory",
            stats.limit,
        ),
        (
            "millrace_swap_bytes",
            "Bytes in use in the swap file",
            stats.swapped,
        ),
    ];
    for (name, help, value) in gauges {
        gauge(registry, name, help, value as f64)?;
    }
    let counters = [
        (
            "millrace_swap_pages_written_total",
            "Pages written to the swap file",
            stats.written,
        ),
        (
            "millrace_swap_pages_read_total",
            "Pages read back from the swap file",
            stats.read,
        ),
    ];
    for (name, help, value) in counters {
        counter(registry, name, help, value as f64)?;
    }
    Ok(())
}

fn process(registry: &Registry, started: Instant) -> Result<()> {
    let (cpu, resident) = usage();
    counter(
        registry,
        "millrace_process_cpu_seconds_total",
        "CPU time of the service",
        cpu,
    )?;
    gauge(
        registry,
        "millrace_process_resident_bytes",
        "Resident memory of the service",
        resident,
    )?;
    gauge(
        registry,
        "millrace_uptime_seconds",
        "Time since the service started",
        started.elapsed().as_secs_f64(),
    )
}

/// Resident bytes of this process.
pub fn resident_bytes() -> u64 {
    usage().1 as u64
}

/// CPU seconds and resident bytes of this process.
fn usage() -> (f64, f64) {
    // SAFETY: `getrusage` fills the structure it is given; zero is a valid value of all its fields.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    let cpu = seconds(usage.ru_utime) + seconds(usage.ru_stime);
    // SAFETY: plain query.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as f64;
    let resident = std::fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|text| text.split_whitespace().nth(1)?.parse::<f64>().ok())
        .map_or(usage.ru_maxrss as f64 * 1024.0, |pages| pages * page);
    (cpu, resident)
}

fn counter(registry: &Registry, name: &str, help: &str, value: f64) -> Result<()> {
    let metric = Counter::new(name, help).map_err(failed)?;
    metric.inc_by(value);
    register(registry, metric)
}

fn gauge(registry: &Registry, name: &str, help: &str, value: f64) -> Result<()> {
    let metric = Gauge::new(name, help).map_err(failed)?;
    metric.set(value);
    register(registry, metric)
}

fn register(registry: &Registry, metric: impl Collector + 'static) -> Result<()> {
    registry.register(Box::new(metric)).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_starting_service_shows_the_process() {
        let text = render(None, Instant::now()).expect("rendered");
        assert!(text.contains("millrace_ready 0"), "{text}");
        let resident = text
            .lines()
            .find_map(|l| l.strip_prefix("millrace_process_resident_bytes "));
        assert!(resident.expect("shown").parse::<f64>().expect("a number") > 1e6);
    }

    #[test]
    fn relations_are_labelled_and_an_ended_source_is_at_infinity() {
        let registry = Registry::new();
        let status = Status {
            id: millrace_dataflow::plan::RelationId(1),
            name: "bids".to_string(),
            kind: "source",
            state: "finished",
            held_since: None,
            commit_interval_ms: None,
            frontier: 5,
            watermark: Some(i64::MAX),
            lag_ms: 0,
            lag_offsets: Some(3),
            rows_in: 10,
            rows_out: 10,
            bytes_in: 100,
            bytes_out: 0,
            state_rows: 0,
            state_bytes: 0,
            state_swapped_bytes: 0,
            operators: vec![(
                "join-2".to_string(),
                StateSize {
                    rows: 3,
                    bytes: 300,
                    swapped: 0,
                },
            )],
            late_rows: 0,
            rejected_rows: 2,
            error_rows: 0,
            last_error: None,
            offsets: std::collections::BTreeMap::new(),
            committed: None,
            backfill: None,
        };
        relations(&registry, &[status]).expect("registered");
        let mut out = Vec::new();
        TextEncoder::new()
            .encode(&registry.gather(), &mut out)
            .expect("encoded");
        let text = String::from_utf8(out).expect("text");
        for line in [
            "millrace_rows_in_total{kind=\"source\",relation=\"bids\"} 10",
            "millrace_rejected_rows_total{kind=\"source\",relation=\"bids\"} 2",
            "millrace_lag_offsets{kind=\"source\",relation=\"bids\"} 3",
            "millrace_watermark_seconds{kind=\"source\",relation=\"bids\"} inf",
            "millrace_relation_state{kind=\"source\",relation=\"bids\",state=\"finished\"} 1",
        ] {
            assert!(text.contains(line), "{line} is not in:\n{text}");
        }
        assert!(!text.contains("millrace_committed_tick{"), "{text}");
    }
}
