//! The parts of the workers of one process: gathered, then written.

use std::collections::{BTreeMap, BTreeSet};
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
    /// Number of stages by worker and dataflow.
    expected: BTreeMap<usize, BTreeMap<RelationId, usize>>,
    /// What has come of them.
    arrived: BTreeMap<(usize, RelationId), usize>,
    parts: Vec<StageParts>,
    /// Dataflows that still read history: what they send is not waited for and not kept.
    unlevel: Vec<RelationId>,
    /// What was dropped since the checkpoint began: neither waited for nor kept.
    dropped: BTreeSet<RelationId>,
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
        !self.unlevel.contains(&dataflow) && !self.dropped.contains(&dataflow)
    }

    /// Takes what a worker sent; the checkpoints that may be complete by it. What comes for one that is
    /// not open is from a dataflow that was not waited for.
    pub fn add(open: &mut BTreeMap<u64, Self>, message: Message) -> Vec<u64> {
        match message {
            Message::Expect {
                checkpoint,
                worker,
                stages,
            } => {
                let Some(gathered) = open.get_mut(&checkpoint) else {
                    return Vec::new();
                };
                gathered.expected.insert(worker, stages);
                vec![checkpoint]
            }
            Message::Parts { checkpoint, parts } => {
                let Some(gathered) = open.get_mut(&checkpoint) else {
                    return Vec::new();
                };
                if gathered.keeps(parts.relation) {
                    let from = (parts.worker, parts.relation);
                    *gathered.arrived.entry(from).or_default() += 1;
                    gathered.parts.push(parts);
                }
                vec![checkpoint]
            }
            Message::Open {
                checkpoint,
                unlevel,
            } => {
                Self::open(open, checkpoint, unlevel);
                vec![checkpoint]
            }
            Message::Dropped(relations) => {
                for gathered in open.values_mut() {
                    gathered.dropped.extend(relations.iter().copied());
                }
                open.keys().copied().collect()
            }
            Message::Begin(_) | Message::Sink { .. } | Message::Remote { .. } => Vec::new(),
        }
    }

    /// Whether all of so many workers have sent everything. A dataflow that was dropped just before the
    /// checkpoint began may still run dry on some workers and send more than that.
    pub fn complete(&self, workers: usize) -> bool {
        self.expected.len() == workers
            && self.expected.iter().all(|(worker, stages)| {
                stages.iter().all(|(relation, stages)| {
                    let arrived = self.arrived.get(&(*worker, *relation));
                    self.dropped.contains(relation) || arrived.copied().unwrap_or(0) >= *stages
                })
            })
    }

    /// What was dropped since the checkpoint began.
    pub fn dropped(&self) -> &BTreeSet<RelationId> {
        &self.dropped
    }

    /// What the checkpoint holds.
    pub fn into_parts(self) -> Vec<StageParts> {
        let Self {
            expected,
            dropped,
            mut parts,
            ..
        } = self;
        parts.retain(|p| {
            let expected = expected.get(&p.worker);
            expected.is_some_and(|stages| stages.contains_key(&p.relation))
                && !dropped.contains(&p.relation)
        });
        parts
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::StageId;

    const VIEW: RelationId = RelationId(1);
    const OTHER: RelationId = RelationId(2);

    fn expect(worker: usize, stages: &[(RelationId, usize)]) -> Message {
        Message::Expect {
            checkpoint: 7,
            worker,
            stages: stages.iter().copied().collect(),
        }
    }

    fn part(worker: usize, relation: RelationId, stage: u32) -> Message {
        Message::Parts {
            checkpoint: 7,
            parts: StageParts {
                relation,
                stage: StageId(stage),
                worker,
                parts: Vec::new(),
            },
        }
    }

    fn opened() -> BTreeMap<u64, Gathered> {
        let mut open = BTreeMap::new();
        Gathered::open(&mut open, 7, Vec::new());
        open
    }

    /// Whether the checkpoint is complete after each message.
    fn gather(open: &mut BTreeMap<u64, Gathered>, messages: Vec<Message>) -> Vec<bool> {
        let add = |message| {
            Gathered::add(open, message);
            open[&7].complete(2)
        };
        messages.into_iter().map(add).collect()
    }

    #[test]
    fn what_was_dropped_before_the_checkpoint_neither_hinders_nor_replaces_anything() {
        let mut open = opened();
        // The dropped one runs dry after the tick of the checkpoint, on one worker.
        let messages = vec![
            expect(0, &[(VIEW, 2)]),
            expect(1, &[(VIEW, 1)]),
            part(0, VIEW, 0),
            part(0, OTHER, 0),
            part(0, OTHER, 1),
            part(1, VIEW, 0),
            part(0, VIEW, 1),
        ];
        let complete = gather(&mut open, messages);
        assert_eq!(complete, [false, false, false, false, false, false, true]);
        let parts = open.remove(&7).unwrap().into_parts();
        assert_eq!(parts.len(), 3);
        assert!(parts.iter().all(|p| p.relation == VIEW));
    }

    #[test]
    fn what_is_dropped_during_the_checkpoint_is_not_waited_for() {
        let mut open = opened();
        let messages = vec![
            expect(0, &[(VIEW, 1), (OTHER, 2)]),
            expect(1, &[(VIEW, 1), (OTHER, 2)]),
            part(0, OTHER, 0),
            part(0, VIEW, 0),
            part(1, VIEW, 0),
        ];
        assert_eq!(gather(&mut open, messages), [false; 5]);
        assert_eq!(
            Gathered::add(&mut open, Message::Dropped([OTHER].into())),
            [7]
        );
        assert!(open[&7].complete(2));
        assert!(!open[&7].keeps(OTHER));
        assert_eq!(open.remove(&7).unwrap().into_parts().len(), 2);
    }
}
