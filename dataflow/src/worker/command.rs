//! What a worker hears.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;

use arrow::datatypes::SchemaRef;
use tokio::sync::mpsc::UnboundedSender;

use crate::checkpoint::RestoredDataflow;
use crate::cluster::Definition;
use crate::cluster::link::Link;
use crate::delta::Delta;
use crate::engine::sinks::{Closed, SinkStatus};
use crate::ingest::Signal;
use crate::plan::{Plan, RelationId};
use crate::state::Stateful;
use crate::tick::TickInfo;
use crate::time::{FIRST_MINTED, Tick};

/// Commands, the same for all workers but for the rows they carry.
#[derive(Debug)]
pub enum Command {
    /// For worker processes: how they make the items that are installed next. Workers do without.
    Define(Definition),
    AddSource(Arc<AddSource>),
    /// Build a dataflow; nothing flows into it yet.
    Install(Arc<Install>),
    /// History of one input, in a private tick.
    History {
        dataflow: RelationId,
        input: RelationId,
        tick: Tick,
        delta: Delta,
    },
    /// No more history below this private tick, on any input.
    HistoryUpto {
        dataflow: RelationId,
        tick: Tick,
    },
    /// The history of this input is complete.
    HistoryDone {
        dataflow: RelationId,
        input: RelationId,
        attach: Tick,
    },
    /// Subscribe the dataflow's inputs from a tick that is not minted yet.
    Attach(Attach),
    /// The tick of the restored checkpoint, for its watermarks.
    Seed(Arc<TickInfo>),
    Tick {
        info: Arc<TickInfo>,
        rows: Vec<(RelationId, Delta)>,
        rejected: Vec<(RelationId, Delta)>,
    },
    /// From tick `at` on, the next one, `new` shows what `old` showed.
    Replace {
        old: RelationId,
        new: RelationId,
        at: Tick,
    },
    Drop(Arc<[RelationId]>),
    Stop,
}

#[derive(Debug)]
pub struct AddSource {
    pub id: RelationId,
    pub rejected: RelationId,
    pub restored: Option<Arc<RestoredDataflow>>,
}

#[derive(Debug, Clone)]
pub struct Attach {
    pub dataflow: RelationId,
    pub at: Tick,
    /// Sources that have bound nothing before `at`: they need no history.
    pub fresh: Arc<BTreeSet<RelationId>>,
    /// The dataflow's state comes from a checkpoint: no history, no contents.
    pub restored: bool,
}

/// A relation that a dataflow reads.
#[derive(Debug, Clone)]
pub struct InputInfo {
    /// All its columns.
    pub schema: SchemaRef,
    /// The sources it comes from, for watermarks.
    pub sources: Vec<RelationId>,
    pub append_only: bool,
}

#[derive(Debug)]
pub struct Install {
    /// The dataflow; that of a view has another id than its relation once the view was replaced.
    pub id: RelationId,
    pub name: String,
    pub body: Body,
    pub inputs: BTreeMap<RelationId, InputInfo>,
    pub restored: Option<Arc<RestoredDataflow>>,
    pub progress: Arc<Progress>,
}

impl Install {
    /// The relation that the dataflow keeps.
    pub fn relation(&self) -> RelationId {
        match &self.body {
            Body::View { relation, .. } => *relation,
            Body::Sink { .. } => self.id,
        }
    }
}

/// What the dataflow does.
#[derive(Debug)]
pub enum Body {
    View {
        relation: RelationId,
        plan: Plan,
        errors: RelationId,
        late: RelationId,
        /// It is to replace a running one: nothing of it is shown before that.
        hidden: bool,
    },
    Sink {
        from: RelationId,
        /// One per worker of this process.
        writers: Vec<UnboundedSender<WriterMessage>>,
        /// What the destination already has.
        skip_below: Tick,
        queued_bytes: Arc<AtomicU64>,
        /// Where writers say what they have closed, and how they are.
        closed: UnboundedSender<Closed>,
        status: Arc<SinkStatus>,
    },
}

/// From a sink's stage to the task of its writer.
#[derive(Debug)]
pub enum WriterMessage {
    Write {
        tick: Tick,
        delta: Delta,
    },
    /// All ticks below `upper` were written: close the open files.
    Close {
        upper: Tick,
        epoch: bool,
        checkpoint: Option<u64>,
    },
}

/// How far each worker is with a dataflow, and what passed through it.
#[derive(Debug)]
pub struct Progress {
    /// By worker, then by port: everything below was applied.
    next: Vec<[AtomicU64; Self::PORTS]>,
    signal: Arc<Signal>,
    pub counters: Counters,
}

/// Counters of one relation, summed over workers.
#[derive(Debug, Default)]
pub struct Counters {
    pub rows_in: AtomicU64,
    pub rows_out: AtomicU64,
    pub bytes_in: AtomicU64,
    pub bytes_out: AtomicU64,
    pub late_rows: AtomicU64,
    pub error_rows: AtomicU64,
    pub rejected_rows: AtomicU64,
    /// Of a sink: one past the last tick whose rows went to a writer.
    pub last_rows: AtomicU64,
    /// By worker and stage: the tick at which state that was empty got its first row, if it is known.
    since: std::sync::Mutex<BTreeMap<(usize, u32), Option<Tick>>>,
    /// By worker, so that each sets its own, and by stage.
    pub state: std::sync::Mutex<BTreeMap<(usize, u32), (&'static str, StateSize)>>,
}

/// How much state there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StateSize {
    pub rows: u64,
    /// In memory.
    pub bytes: u64,
    /// In the swap file.
    pub swapped: u64,
}

impl StateSize {
    pub fn of(state: &impl Stateful) -> Self {
        Self {
            rows: state.rows(),
            bytes: state.bytes(),
            swapped: state.swapped_bytes(),
        }
    }
    fn add(self, other: Self) -> Self {
        Self {
            rows: self.rows + other.rows,
            bytes: self.bytes + other.bytes,
            swapped: self.swapped + other.swapped,
        }
    }
}

impl Counters {
    pub fn add(counter: &AtomicU64, n: usize) {
        counter.fetch_add(n as u64, Ordering::Relaxed);
    }
    pub fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }
    fn note_since(&self, worker: usize, stage: u32, rows: u64) {
        let mut since = crate::ingest::lock(&self.since);
        if rows == 0 {
            since.remove(&(worker, stage));
        } else {
            let tick = || crate::blame::current().map(|b| b.tick);
            since
                .entry((worker, stage))
                .or_insert_with(|| tick().filter(|tick| *tick >= FIRST_MINTED));
        }
    }
    /// Of each worker and stage: operator, size, since when.
    #[allow(clippy::type_complexity)]
    pub fn states(&self) -> Vec<(usize, u32, &'static str, StateSize, Option<Tick>)> {
        let since = crate::ingest::lock(&self.since).clone();
        crate::ingest::lock(&self.state)
            .iter()
            .map(|((worker, stage), (operator, size))| (*worker, *stage, *operator, *size))
            .map(|(worker, stage, operator, size)| {
                let since = since.get(&(worker, stage)).copied().flatten();
                (worker, stage, operator, size, since)
            })
            .collect()
    }
    /// State of one stage of one worker.
    pub fn set_state(&self, worker: usize, stage: u32, operator: &'static str, size: StateSize) {
        self.note_since(worker, stage, size.rows);
        crate::ingest::lock(&self.state).insert((worker, stage), (operator, size));
    }
    /// Rows of the contents of a view whose plan has `nodes` nodes, over all workers.
    pub fn contents(&self, nodes: usize) -> u64 {
        let state = crate::ingest::lock(&self.state);
        let contents = state
            .iter()
            .filter(|((_, stage), _)| *stage as usize == nodes);
        contents.map(|(_, (_, size))| size.rows).sum()
    }
    /// State by operator, over all workers.
    pub fn operators(&self) -> Vec<(String, StateSize)> {
        let mut stages = BTreeMap::<u32, (&'static str, StateSize)>::new();
        for ((_, stage), (operator, size)) in crate::ingest::lock(&self.state).iter() {
            let sum = stages
                .entry(*stage)
                .or_insert((*operator, StateSize::default()));
            sum.1 = sum.1.add(*size);
        }
        let named = |(stage, (operator, size))| (format!("{operator}-{stage}"), size);
        stages.into_iter().map(named).collect()
    }
    /// State over all workers and stages.
    pub fn state(&self) -> StateSize {
        let state = crate::ingest::lock(&self.state);
        let sizes = state.values().map(|(_, size)| *size);
        sizes.fold(StateSize::default(), StateSize::add)
    }
}

impl Progress {
    /// Result, errors, late rows.
    pub const PORTS: usize = 3;

    pub fn new(workers: usize, ports: usize, signal: Arc<Signal>) -> Self {
        let unused = |port| if port < ports { 0 } else { Tick::MAX };
        let next = (0..workers)
            .map(|_| std::array::from_fn(|port| AtomicU64::new(unused(port))))
            .collect();
        Self {
            next,
            signal,
            counters: Counters::default(),
        }
    }
    /// Of something that does not run.
    pub fn idle() -> Self {
        Self::new(0, 0, Arc::default())
    }
    pub fn set(&self, worker: usize, port: usize, next: Tick) {
        self.next[worker][port].store(next, Ordering::Release);
        self.signal.raise();
    }
    /// By port: everything below was applied on this worker.
    pub fn ports(&self, worker: usize) -> [Tick; Self::PORTS] {
        std::array::from_fn(|port| self.next[worker][port].load(Ordering::Acquire))
    }
    /// Everything below was applied on this worker.
    pub fn of_worker(&self, worker: usize) -> Tick {
        self.next[worker]
            .iter()
            .map(|p| p.load(Ordering::Acquire))
            .min()
            .unwrap_or(0)
    }
    /// Everything below was applied on all workers.
    pub fn next(&self) -> Tick {
        (0..self.next.len())
            .map(|w| self.of_worker(w))
            .min()
            .unwrap_or(0)
    }
}

/// The way to a worker.
#[derive(Debug, Clone)]
pub enum WorkerHandle {
    /// A thread of this process.
    Local {
        sender: Sender<Command>,
        thread: std::thread::Thread,
    },
    /// A worker of another process, counted there.
    Remote { link: Arc<Link>, worker: usize },
}

impl WorkerHandle {
    pub fn send(&self, command: Command) {
        match self {
            Self::Local { sender, thread } => {
                // A worker that is gone has taken the process with it.
                let _ = sender.send(command);
                thread.unpark();
            }
            Self::Remote { link, worker } => link.command(*worker, command),
        }
    }
}
