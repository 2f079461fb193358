//! Checkpoints: all keyed state, source positions and prepared sink files, at one tick.
//!
//! # Protocol
//!
//! 1. The minter marks tick F. Each stage freezes its state after applying F and before any later
//!    tick: no I/O, pages are shared, later writes copy.
//! 2. The collector gathers the parts of all workers, the positions of sources at F and the
//!    committables of sinks up to F; it waits until the bindings up to F are durable.
//! 3. It writes one object per worker with what has changed (see [`increment`]; other processes write
//!    those of their workers, see [`crate::cluster`]), then the manifest (put-if-absent), then moves
//!    `latest` by compare-and-set in the metadata store, which refuses an older incarnation.
//! 4. Only then objects that neither of the last two manifests names, and remap segments below the
//!    oldest kept, are garbage.
//!
//! Ids begin with the incarnation, so that a server that was taken over and does not know it yet writes
//! elsewhere until it is refused in 3.
//!
//! A crash before 3 ends leaves objects nobody refers to; a crash after it begins at F.

pub mod collector;
pub mod freeze_time;
mod increment;
pub mod manifest;
pub mod parts;
pub mod store;
pub mod usage;

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::mpsc::UnboundedSender;

use crate::cluster::wire::WirePart;
use crate::error::Result;
use crate::plan::RelationId;
use crate::state::{Part, StoredPart};

/// Names a stage within its dataflow; stable as long as the plan's fingerprint is.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct StageId(pub u32);

/// The frozen state of one stage on one worker.
#[derive(Debug)]
pub struct StageParts {
    pub relation: RelationId,
    pub stage: StageId,
    pub worker: usize,
    pub parts: Vec<Part>,
}

/// From workers and sinks to the collector.
#[derive(Debug)]
pub enum Message {
    Begin(Box<collector::Begin>),
    /// This worker will send the parts of so many stages of these dataflows and sources.
    Expect {
        checkpoint: u64,
        worker: usize,
        stages: BTreeMap<RelationId, usize>,
    },
    Parts {
        checkpoint: u64,
        parts: StageParts,
    },
    Sink {
        checkpoint: u64,
        sink: RelationId,
        state: manifest::SinkState,
    },
    /// In a worker process: a checkpoint begins.
    Open {
        checkpoint: u64,
        unlevel: Vec<RelationId>,
    },
    /// Nothing is expected of these any more. Said by the minter before any worker hears of it, and by
    /// the workers to those who gather for them.
    Dropped(Arc<[RelationId]>),
    /// What the workers of another process have written.
    Remote {
        checkpoint: u64,
        process: usize,
        part: Result<WirePart>,
    },
}

/// The way to the collector.
#[derive(Debug, Clone)]
pub struct PartSender(pub UnboundedSender<Message>);

impl PartSender {
    pub fn send(
        &self,
        checkpoint: u64,
        relation: RelationId,
        stage: StageId,
        worker: usize,
        parts: Vec<Part>,
    ) {
        let parts = StageParts {
            relation,
            stage,
            worker,
            parts,
        };
        // The collector lives as long as the engine.
        let _ = self.0.send(Message::Parts { checkpoint, parts });
    }
    pub fn expect(&self, checkpoint: u64, worker: usize, stages: BTreeMap<RelationId, usize>) {
        let _ = self.0.send(Message::Expect {
            checkpoint,
            worker,
            stages,
        });
    }
    pub fn dropped(&self, relations: &Arc<[RelationId]>) {
        let _ = self.0.send(Message::Dropped(Arc::clone(relations)));
    }
}

/// What a checkpoint holds of one stage, of all workers that wrote it.
#[derive(Debug, Default)]
pub struct RestoredStage {
    pub parts: Vec<StoredPart>,
}

/// What a checkpoint holds of one dataflow or source.
#[derive(Debug, Default)]
pub struct RestoredDataflow {
    pub stages: BTreeMap<StageId, RestoredStage>,
}

impl RestoredDataflow {
    pub fn stage(&self, id: StageId) -> Option<&RestoredStage> {
        self.stages.get(&id)
    }
}
