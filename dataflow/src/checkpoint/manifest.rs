//! `CheckpointManifest`: what a checkpoint consists of. JSON, versioned.

use std::collections::BTreeMap;

use crate::plan::RelationId;
use crate::sink::Committable;
use crate::tick::Hold;
use crate::time::{Tick, Watermark};

use super::StageId;

/// Version of the manifest and of the objects it names.
pub const VERSION: u32 = 1;

/// Position of a source at the checkpoint's tick.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SourceState {
    /// Next offset and watermark, by split.
    pub splits: BTreeMap<String, (u64, Watermark)>,
    /// Where reading of each split began.
    #[serde(default)]
    pub starts: BTreeMap<String, u64>,
    pub watermark: Watermark,
    pub ended: bool,
    /// Columns of the relation that were being read.
    pub wanted: Vec<usize>,
    /// Something reads it, and be it without any column, as `count(*)` does.
    #[serde(default)]
    pub read: bool,
    pub rows: u64,
    pub rejected: u64,
}

/// A sink at the checkpoint's tick.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub struct SinkState {
    /// The destination holds everything below, as far as was known.
    pub committed: Tick,
    /// What the destination itself last said it holds; it may say less than `committed` where there was
    /// nothing to commit, but never less than this. Zero in checkpoints of older servers.
    #[serde(default)]
    pub landed: Tick,
    /// Closed files of ticks at or above `committed`, up to the checkpoint.
    pub pending: Vec<Committable>,
    pub rows: u64,
}

/// Where a piece of a part lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ChunkRef {
    /// The checkpoint that wrote the object, and the worker whose it is.
    pub object: ObjectId,
    pub offset: u64,
    pub length: u64,
}

/// Names an object.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct ObjectId {
    pub checkpoint: u64,
    pub worker: usize,
}

/// One frozen part: its chunks, each on top of those before.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct PartEntry {
    pub name: String,
    pub chunks: Vec<ChunkRef>,
}

/// The parts of one stage of one worker.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct StageEntry {
    pub relation: RelationId,
    pub stage: StageId,
    pub worker: usize,
    pub parts: Vec<PartEntry>,
}

/// An object that chunks lie in; each chunk has checksums of its own.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct ObjectEntry {
    pub id: ObjectId,
    pub length: u64,
}

/// See the module.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct CheckpointManifest {
    pub version: u32,
    pub id: u64,
    pub incarnation: u64,
    pub workers: usize,
    /// F: everything up to and including this tick is in the checkpoint.
    pub tick: Tick,
    pub sources: BTreeMap<RelationId, SourceState>,
    /// Attached views and their plan fingerprints.
    pub views: BTreeMap<RelationId, u64>,
    pub sinks: BTreeMap<RelationId, SinkState>,
    /// Relations in front of which changes wait, see [`crate::tick::Hold`].
    #[serde(default)]
    pub held: BTreeMap<RelationId, Hold>,
    /// All objects that chunks lie in, of this checkpoint and of earlier ones.
    pub objects: Vec<ObjectEntry>,
    pub stages: Vec<StageEntry>,
}
