//! `CheckpointManifest`: what a checkpoint consists of. JSON, versioned.

use std::collections::BTreeMap;

use crate::plan::RelationId;
use crate::sink::Committable;
use crate::time::{Tick, Watermark};

use super::StageId;

/// Version of the manifest and of the objects it names.
pub const VERSION: u32 = 1;

/// Position of a source at the checkpoint's tick.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SourceState {
    /// Next offset and watermark, by split.
    pub splits: BTreeMap<String, (u64, Watermark)>,
    pub watermark: Watermark,
    pub ended: bool,
    /// Columns of the relation that were being read.
    pub wanted: Vec<usize>,
    pub rows: u64,
    pub rejected: u64,
}

/// A sink at the checkpoint's tick.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub struct SinkState {
    /// The destination holds everything below, as far as was known.
    pub committed: Tick,
    /// Closed files of ticks at or above `committed`, up to the checkpoint.
    pub pending: Vec<Committable>,
    pub rows: u64,
}

/// One frozen part within the object of a worker.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct PartEntry {
    pub offset: u64,
    pub length: u64,
}

/// The parts of one stage of one worker.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct StageEntry {
    pub relation: RelationId,
    pub stage: StageId,
    pub worker: usize,
    pub parts: Vec<PartEntry>,
}

/// The object of one worker.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct ObjectEntry {
    pub path: String,
    pub length: u64,
    pub crc32: u32,
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
    /// By worker.
    pub objects: Vec<ObjectEntry>,
    pub stages: Vec<StageEntry>,
}
