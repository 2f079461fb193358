//! A server: the real remap log and the real commit core, and of the engine around them just enough to
//! give both something to do, in the order in which the engine does it.

use std::collections::{BTreeMap, VecDeque};

use millrace_dataflow::remap::Binding;
use millrace_dataflow::remap::log::{Effect as Disk, Event as Happened, Log};
use millrace_dataflow::time::Tick;
use millrace_lake::commit::Core;

use super::table::Row;

pub(super) const SPLITS: usize = 2;
/// Next offset of each split.
pub(super) type Offsets = [u64; SPLITS];
/// Offsets after each tick, ascending. What the engine cannot see of it is the witness's.
pub(super) type History = BTreeMap<Tick, Offsets>;

/// A closed file that is not committed.
#[derive(Clone)]
pub(super) struct Pending {
    pub(super) upper: Tick,
    pub(super) rows: Vec<Row>,
}

/// A checkpoint as it lies in the store.
#[derive(Clone)]
pub(super) struct Checkpoint {
    pub(super) tick: Tick,
    pub(super) offsets: Offsets,
    pub(super) committed: Tick,
    pub(super) landed: Tick,
    pub(super) pending: Vec<Pending>,
    /// The manifest is there.
    pub(super) whole: bool,
    pub(super) damaged: bool,
    pub(super) history: History,
}

/// A mark that all rows before it have passed.
pub(super) struct Closed {
    pub(super) upper: Tick,
    pub(super) rows: Vec<Row>,
    pub(super) epoch: bool,
    pub(super) checkpoint: Option<u64>,
}

/// A checkpoint under way, and what is done of it.
pub(super) struct Taking {
    pub(super) id: u64,
    pub(super) tick: Tick,
    pub(super) checkpoint: Option<Checkpoint>,
    pub(super) stage: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// The log is being taken over.
    Opening,
    /// The commit core looks how far the table is.
    Recovering,
    /// Bindings are replayed.
    Replaying,
    Live,
}

pub(super) struct Process {
    pub(super) incarnation: u64,
    pub(super) phase: Phase,
    /// Not scheduled before this step.
    pub(super) asleep_until: usize,

    pub(super) log: Log,
    pub(super) effects: VecDeque<Disk>,
    pub(super) durable: Tick,
    pub(super) replay: VecDeque<Binding>,
    /// The last tick that the log held at the start.
    pub(super) bound: Tick,

    pub(super) base: Option<Tick>,
    pub(super) last: Tick,
    pub(super) offsets: Offsets,
    pub(super) history: History,
    /// Records as this process has read them.
    pub(super) read: BTreeMap<(usize, u64), u8>,

    pub(super) core: Core,
    pub(super) attempt: u64,
    pub(super) timer: Option<u64>,
    /// The epoch that the core is committing, or that it handed back.
    pub(super) committing: Option<Tick>,
    pub(super) handed_back: bool,

    /// Rows of ticks below are in the table.
    pub(super) skip_below: Tick,
    pub(super) committed: Tick,
    /// What the table itself has said.
    pub(super) landed: Tick,
    pub(super) pending: Vec<Pending>,
    pub(super) open: Vec<Row>,
    pub(super) closed: VecDeque<Closed>,
    /// An epoch that waits for the log.
    pub(super) waiting: Option<Tick>,
    /// The sink and its view are part of a checkpoint.
    pub(super) confirmed: bool,

    pub(super) taking: Option<Taking>,
    pub(super) next_checkpoint: u64,
    pub(super) latest: Option<u64>,
    pub(super) kept: Vec<(u64, Tick)>,
}

impl Process {
    pub(super) fn step_log(&mut self, event: Happened) {
        let effects = self.log.step(event);
        self.effects.extend(effects);
    }

    /// Offsets as of a tick.
    pub(super) fn as_of(&self, tick: Tick) -> Offsets {
        let before = self.history.range(..=tick).next_back();
        before.map_or([0; SPLITS], |(_, offsets)| *offsets)
    }

    /// All bindings that the log held are in its history.
    pub(super) fn is_whole(&self) -> bool {
        self.phase == Phase::Live
    }
}
