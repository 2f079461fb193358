//! What travels with a tick: watermarks and marks; and the worker's log of recent ticks.
//!
//! # Contract
//!
//! * The minter sends each tick to every worker once, in order, with the same [`TickInfo`].
//! * An operator decides what a tick means (lateness, closing, freezing) by its `TickInfo` alone, so
//!   replaying the same bindings decides the same.
//! * While a relation is *held* (paused, or failed), its changes wait in front of it, and the watermarks of
//!   its sources stand still for it and for what reads it: what waits is not late when it comes.
//! * *Private ticks* (small numbers, below the tick at which a dataflow is attached) carry history and
//!   have no `TickInfo`: no watermark applies to them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::mpsc::UnboundedSender;

use crate::follow::Follower;
use crate::kernel::contents::FrozenContents;
use crate::plan::RelationId;
use crate::time::{NO_WATERMARK, Tick, Watermark};

/// A tick as every worker sees it.
#[derive(Debug, Default)]
pub struct TickInfo {
    pub tick: Tick,
    /// Of all started sources, as of this tick (its own rows included).
    pub watermarks: BTreeMap<RelationId, Watermark>,
    pub marks: Marks,
    /// Relations whose changes wait in front of them in this tick.
    pub held: Arc<BTreeMap<RelationId, Hold>>,
}

/// Since when a relation is held, and why. Part of bindings and manifests.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Hold {
    /// The first tick whose changes wait.
    pub since: Tick,
    /// Watermarks of all sources as of the tick before.
    pub watermarks: BTreeMap<RelationId, Watermark>,
    /// It failed again and again; otherwise somebody has asked for a pause.
    #[serde(default)]
    pub failed: bool,
}

/// Set in the ids of [`hold_of`].
const HOLD: u64 = 1 << 63;

/// Stands for the hold of a relation among the sources whose watermarks count for an operator.
pub fn hold_of(relation: RelationId) -> RelationId {
    RelationId(relation.0 | HOLD)
}

/// The relation whose hold this stands for, if it does.
pub fn held_relation(source: RelationId) -> Option<RelationId> {
    (source.0 & HOLD != 0).then_some(RelationId(source.0 & !HOLD))
}

/// What operators do once they have applied a tick.
#[derive(Debug, Default)]
pub struct Marks {
    /// Freeze state for this checkpoint.
    pub checkpoint: Option<u64>,
    /// Dataflows that still read history: the checkpoint does not wait for them and has nothing of them.
    pub unlevel: Vec<RelationId>,
    /// Hand out frozen contents.
    pub reads: Vec<ReadMark>,
    /// Sinks whose epoch ends with this tick.
    pub epochs: Vec<RelationId>,
}

/// Asks for the contents of relations as of a tick.
#[derive(Debug, Clone)]
pub struct ReadMark {
    pub relations: Arc<[RelationId]>,
    /// One answer per relation and worker.
    pub answer: UnboundedSender<ReadAnswer>,
    /// Hears of what changes after this tick.
    pub follow: Option<Follower>,
}

/// Contents of a relation on one worker.
pub type ReadAnswer = (Tick, RelationId, FrozenContents);

impl TickInfo {
    /// Minimum over `sources`; nothing is claimed while one of them has claimed nothing.
    /// As it was before each hold that counts for them.
    pub fn watermark(&self, sources: &[RelationId]) -> Watermark {
        let least = |watermarks: &BTreeMap<RelationId, Watermark>| {
            sources
                .iter()
                .filter(|s| s.0 & HOLD == 0)
                .map(|s| watermarks.get(s).copied().unwrap_or(NO_WATERMARK))
                .min()
                .unwrap_or(crate::time::END_OF_TIME)
        };
        let now = least(&self.watermarks);
        if self.held.is_empty() {
            return now;
        }
        sources
            .iter()
            .filter_map(|s| self.held.get(&held_relation(*s)?))
            .map(|hold| least(&hold.watermarks))
            .fold(now, Watermark::min)
    }
    /// Whether changes wait in front of this relation.
    pub fn holds(&self, relation: RelationId) -> bool {
        self.held.contains_key(&relation)
    }
}

/// Recent ticks of one worker, shared by its operators.
#[derive(Debug, Default)]
pub struct TickLog {
    infos: BTreeMap<Tick, Arc<TickInfo>>,
}

pub type SharedTickLog = Rc<RefCell<TickLog>>;

impl TickLog {
    pub fn push(&mut self, info: Arc<TickInfo>) {
        self.infos.insert(info.tick, info);
    }
    pub fn get(&self, tick: Tick) -> Option<Arc<TickInfo>> {
        self.infos.get(&tick).cloned()
    }
    /// Ticks in `[from, to)`.
    pub fn range(&self, from: Tick, to: Tick) -> impl Iterator<Item = Tick> + '_ {
        let to = to.max(from);
        self.infos.range(from..to).map(|(t, _)| *t)
    }
    /// The last tick before `tick`.
    pub fn before(&self, tick: Tick) -> Option<&Arc<TickInfo>> {
        self.infos.range(..tick).next_back().map(|(_, info)| info)
    }
    /// Forgets ticks below `tick`, but keeps the last of them: lateness looks one tick back.
    pub fn prune(&mut self, tick: Tick) {
        let Some(last) = self.before(tick).map(|i| i.tick) else {
            return;
        };
        self.infos = self.infos.split_off(&last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prune_keeps_the_last_tick_below() {
        let mut log = TickLog::default();
        for tick in [3, 5, 9] {
            log.push(Arc::new(TickInfo {
                tick,
                ..TickInfo::default()
            }));
        }
        log.prune(9);
        assert_eq!(log.range(0, 100).collect::<Vec<_>>(), vec![5, 9]);
        assert_eq!(log.before(9).map(|i| i.tick), Some(5));
    }

    #[test]
    fn watermark_is_the_minimum_and_silent_sources_hold_it() {
        let (a, b) = (RelationId(1), RelationId(2));
        let mut info = TickInfo::default();
        info.watermarks.insert(a, 10);
        assert_eq!(info.watermark(&[a, b]), NO_WATERMARK);
        info.watermarks.insert(b, 4);
        assert_eq!(info.watermark(&[a, b]), 4);
        assert_eq!(info.watermark(&[]), crate::time::END_OF_TIME);
    }

    #[test]
    fn a_hold_keeps_the_watermark_of_those_behind_it() {
        let (source, view) = (RelationId(1), RelationId(2));
        let mut info = TickInfo::default();
        info.watermarks.insert(source, 10);
        let behind = [source, hold_of(view)];
        assert_eq!(info.watermark(&behind), 10, "nothing is held");
        let hold = Hold {
            since: 3,
            watermarks: BTreeMap::from([(source, 4)]),
            failed: false,
        };
        info.held = Arc::new(BTreeMap::from([(view, hold)]));
        assert_eq!(info.watermark(&behind), 4);
        assert_eq!(info.watermark(&[source]), 10, "others go on");
    }
}
