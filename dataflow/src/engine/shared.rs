//! What the engine shows of itself: statuses and counters, read without disturbing the workers.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::backfill::BackfillStatus;
use crate::checkpoint::StageId;
use crate::checkpoint::manifest::SourceState;
use crate::checkpoint::usage::Usage;
use crate::error::Error;
use crate::ingest::lock;
use crate::plan::RelationId;
use crate::tick::Hold;
use crate::time::{NO_WATERMARK, Tick};
use crate::worker::command::StateSize;

/// State of one source, written by the minter.
#[derive(Debug, Default)]
pub struct SourceStatus {
    pub state: Mutex<SourceState>,
    pub trouble: Mutex<Option<String>>,
    pub failed: AtomicBool,
    pub bytes: AtomicU64,
    /// Records known to wait behind what was read, by split.
    pub remaining: Mutex<BTreeMap<String, u64>>,
}

impl SourceStatus {
    pub fn update(&self, state: &SourceState) {
        lock(&self.state).clone_from(state);
    }
}

/// Shared between minter, engine and status readers.
#[derive(Debug, Default)]
pub struct Shared {
    pub last_tick: AtomicU64,
    /// Everything below was applied by all attached dataflows.
    pub completed: AtomicU64,
    /// Bytes that wait in the writers of sinks.
    pub queued_bytes: Arc<AtomicU64>,
    pub sources: Mutex<BTreeMap<RelationId, Arc<SourceStatus>>>,
    /// Relations that are held, as of the last tick.
    pub held: Mutex<Arc<BTreeMap<RelationId, Hold>>>,
    pub stats: Stats,
    /// Nothing from this tick on may be shown: a new plan has taken the place of an old one at it, and no
    /// checkpoint holds that yet. A crash would bring the old one back.
    pub held_from: tokio::sync::watch::Sender<Option<Tick>>,
    /// Of the stages of each worker, as of the last checkpoint.
    pub usage: Mutex<BTreeMap<(RelationId, StageId, usize), Usage>>,
    /// What may change while the engine runs.
    pub settings: tokio::sync::watch::Sender<Settings>,
    /// Asks for a checkpoint before the next one is due.
    pub checkpoint_soon: tokio::sync::Notify,
    /// Why the last checkpoint failed, until one succeeds.
    pub checkpoint_trouble: Mutex<Option<Error>>,
    /// Since when a checkpoint is being taken.
    pub checkpoint_began: Mutex<Option<Instant>>,
}

/// See [`Shared::settings`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Settings {
    pub checkpoint_interval: Duration,
    /// Of sinks that do not say it themselves.
    pub commit_interval: Duration,
}

/// Totals since the start.
#[derive(Debug, Default)]
pub struct Stats {
    pub ticks: AtomicU64,
    pub tick_us: AtomicU64,
    pub checkpoints: AtomicU64,
    pub checkpoint_ms: AtomicU64,
    pub checkpoint_bytes: AtomicU64,
    pub checkpoint_tick: AtomicU64,
    pub commits: AtomicU64,
    pub commit_ms: AtomicU64,
}

/// A copy of [`Stats`].
#[derive(Debug, Clone, Copy, Default)]
pub struct EngineStats {
    pub ticks: u64,
    /// Summed time from minting to completion.
    pub tick_us: u64,
    pub checkpoints: u64,
    pub checkpoint_ms: u64,
    /// Size of the last checkpoint.
    pub checkpoint_bytes: u64,
    /// Tick of the last checkpoint: a restart replays what lies above.
    pub checkpoint_tick: u64,
    pub commits: u64,
    pub commit_ms: u64,
}

impl Shared {
    pub fn source_status(&self, id: RelationId) -> Arc<SourceStatus> {
        Arc::clone(lock(&self.sources).entry(id).or_insert_with(|| {
            let status = SourceStatus::default();
            lock(&status.state).watermark = NO_WATERMARK;
            Arc::new(status)
        }))
    }
    pub fn tick_done(&self, took: Duration) {
        self.stats.ticks.fetch_add(1, Ordering::Relaxed);
        self.stats
            .tick_us
            .fetch_add(took.as_micros() as u64, Ordering::Relaxed);
    }
    pub fn stats(&self) -> EngineStats {
        let get = |c: &AtomicU64| c.load(Ordering::Relaxed);
        let s = &self.stats;
        EngineStats {
            ticks: get(&s.ticks),
            tick_us: get(&s.tick_us),
            checkpoints: get(&s.checkpoints),
            checkpoint_ms: get(&s.checkpoint_ms),
            checkpoint_bytes: get(&s.checkpoint_bytes),
            checkpoint_tick: get(&s.checkpoint_tick),
            commits: get(&s.commits),
            commit_ms: get(&s.commit_ms),
        }
    }
}

/// State of one operator on one worker, for people.
#[derive(Debug, Clone)]
pub struct StateRow {
    pub relation: String,
    /// `view` or `sink`.
    pub kind: &'static str,
    pub operator: String,
    pub worker: usize,
    pub rows: u64,
    /// In memory, and in the swap file.
    pub bytes: u64,
    pub paged: u64,
    pub usage: Usage,
    /// No row is older than this tick; `None` where that is not known: what was restored or came as
    /// history has no tick of its own.
    pub since: Option<Tick>,
}

/// One source, view or sink, for people and metrics.
#[derive(Debug, Clone)]
pub struct Status {
    pub id: RelationId,
    pub name: String,
    /// `source`, `view` or `sink`.
    pub kind: &'static str,
    /// `idle`, `running`, `hydrating`, `paused`, `finished`, `retrying` or `failed`.
    pub state: &'static str,
    /// A view that is paused or has failed: its contents are those as of the tick before this one.
    pub held_since: Option<Tick>,
    /// Sinks: how often it commits.
    pub commit_interval_ms: Option<u64>,
    /// Everything below this tick is applied.
    pub frontier: Tick,
    /// Microseconds since the epoch; `None` while nothing is claimed.
    pub watermark: Option<i64>,
    /// How far the relation is behind the last tick.
    pub lag_ms: u64,
    /// Records known to be unread, for sources that can tell.
    pub lag_offsets: Option<u64>,
    pub rows_in: u64,
    pub rows_out: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub state_rows: u64,
    /// In memory.
    pub state_bytes: u64,
    /// In the swap file.
    pub state_swapped_bytes: u64,
    /// State by operator.
    pub operators: Vec<(String, StateSize)>,
    pub late_rows: u64,
    pub rejected_rows: u64,
    pub error_rows: u64,
    pub last_error: Option<String>,
    pub offsets: BTreeMap<String, u64>,
    /// Sinks: the destination holds everything below.
    pub committed: Option<Tick>,
    /// History that is being read, for this relation or for what is to replace it.
    pub backfill: Option<BackfillStatus>,
}
