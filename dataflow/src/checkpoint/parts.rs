//! The parts of the workers of one process: gathered, then written.

use std::collections::BTreeMap;
use std::ops::Range;

use super::increment::Increment;
use super::manifest::{ObjectEntry, ObjectId, StageEntry};
use super::store::{CheckpointStore, ObjectWriter};
use super::usage::Usage;
use super::{Message, StageParts};
use crate::cluster::wire::WirePart;
use crate::error::{Error, Result};
use crate::plan::RelationId;

/// Of one checkpoint, until all workers have sent theirs.
#[derive(Debug, Default)]
pub struct Gathered {
    /// Number of stages by worker.
    expected: BTreeMap<usize, usize>,
    pub parts: Vec<StageParts>,
    /// Dataflows that still read history: what they send is not waited for and not kept.
    unlevel: Vec<RelationId>,
}

/// What the store holds of each worker's state.
pub type Held = BTreeMap<usize, Increment>;

impl Gathered {
    /// Begins to gather, before any worker hears of the checkpoint's tick.
    pub fn open(open: &mut BTreeMap<u64, Self>, checkpoint: u64, unlevel: Vec<RelationId>) {
        let gathered = Self {
            unlevel,
            ..Self::default()
        };
        open.insert(checkpoint, gathered);
    }

    /// Whether the checkpoint waits for a dataflow.
    pub fn keeps(&self, dataflow: RelationId) -> bool {
        !self.unlevel.contains(&dataflow)
    }

    /// Takes what a worker sent; the checkpoint it is for. What comes for one that is not open is from
    /// a dataflow that was not waited for.
    pub fn add(open: &mut BTreeMap<u64, Self>, message: Message) -> Option<u64> {
        match message {
            Message::Expect {
                checkpoint,
                worker,
                stages,
            } => {
                let gathered = open.get_mut(&checkpoint)?;
                gathered.expected.insert(worker, stages);
                Some(checkpoint)
            }
            Message::Parts { checkpoint, parts } => {
                let gathered = open.get_mut(&checkpoint)?;
                if gathered.keeps(parts.relation) {
                    gathered.parts.push(parts);
                }
                Some(checkpoint)
            }
            Message::Open {
                checkpoint,
                unlevel,
            } => {
                Self::open(open, checkpoint, unlevel);
                Some(checkpoint)
            }
            Message::Begin(_) | Message::Sink { .. } | Message::Remote { .. } => None,
        }
    }

    /// Whether all of so many workers have sent everything.
    pub fn complete(&self, workers: usize) -> bool {
        self.expected.len() == workers && self.parts.len() == self.expected.values().sum::<usize>()
    }
}

/// Writes one object per worker with what the store lacks; gives what the manifest says of it and what
/// the store holds once the checkpoint counts.
pub async fn write_all(
    store: &CheckpointStore,
    held: &Held,
    workers: Range<usize>,
    parts: Vec<StageParts>,
    checkpoint: u64,
) -> Result<(WirePart, Held)> {
    let mut by_worker: BTreeMap<usize, Vec<StageParts>> =
        workers.map(|w| (w, Vec::new())).collect();
    let mut written = WirePart::default();
    for parts in parts {
        let usage = Usage::of(&parts.parts);
        written
            .usage
            .push((parts.relation, parts.stage, parts.worker, usage));
        by_worker.entry(parts.worker).or_default().push(parts);
    }
    let mut now = Held::new();
    for (worker, parts) in by_worker {
        let object = ObjectId { checkpoint, worker };
        let before = held.get(&worker).cloned().unwrap_or_default();
        let writer = store.writer(object);
        let write = move || write(&before, parts, object, writer);
        let (entries, after) = tokio::task::spawn_blocking(write)
            .await
            .map_err(|e| Error::internal(e.to_string()))??;
        written.bytes += after.objects().find(|o| o.0 == object).map_or(0, |o| o.1);
        written.stages.extend(entries);
        let objects = after.objects();
        written
            .objects
            .extend(objects.map(|(id, length)| ObjectEntry { id, length }));
        now.insert(worker, after);
    }
    Ok((written, now))
}

/// Blocks while the store takes the bytes.
fn write(
    held: &Increment,
    parts: Vec<StageParts>,
    object: ObjectId,
    mut writer: ObjectWriter,
) -> Result<(Vec<StageEntry>, Increment)> {
    let written = held.write(parts, object, &mut writer)?;
    writer.finish()?;
    Ok(written)
}
