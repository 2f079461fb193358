//! What of a worker's state the store holds already, and what of a new snapshot has to be written.
//!
//! # Rules
//!
//! * A keyed part is stored as all rows of one snapshot and the changes of those after it. The changes
//!   are enough when the store has the snapshot before (same generation, number one less).
//! * It is written in full again once its changes outweigh it, there are many of them, or an object
//!   of which little is needed any more is kept for its sake.
//! * A batch is immutable: it is written once, and known again by its address.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::sync::{Arc, Weak};

use super::manifest::{ChunkRef, ObjectId, PartEntry, StageEntry};
use super::{StageId, StageParts};
use crate::error::Result;
use crate::plan::RelationId;
use crate::state::{HeldBatch, Part, PartData, Snapshot, write_batches, write_keyed, write_meta};

/// Chunks of a part before it is written in full again.
const CHUNKS: usize = 16;
/// Objects below this size are not worth a rewrite.
const SMALL_OBJECT: u64 = 1 << 20;
/// An object is mostly garbage when less than one in so many bytes is needed.
const GARBAGE: u64 = 4;

type PartKey = (RelationId, StageId, String);

/// What the store holds of one part.
#[derive(Debug, Clone)]
enum Held {
    Keyed {
        generation: u64,
        number: u64,
        chunks: Vec<ChunkRef>,
    },
    Batches(Vec<(Weak<HeldBatch>, ChunkRef)>),
    Meta(ChunkRef),
}

/// What the store holds of one worker's state. See the module.
#[derive(Debug, Default, Clone)]
pub struct Increment {
    parts: BTreeMap<PartKey, Held>,
    /// Objects by length.
    objects: BTreeMap<ObjectId, u64>,
}

/// A chunk that was written at the end of `out`.
struct Sink<'a, W> {
    out: &'a mut W,
    object: ObjectId,
    at: u64,
}

impl<W: Write> Write for Sink<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.at += written as u64;
        Ok(written)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

impl<W: Write> Sink<'_, W> {
    fn chunk(&mut self, write: impl FnOnce(&mut Self) -> Result<()>) -> Result<ChunkRef> {
        let offset = self.at;
        write(self)?;
        Ok(ChunkRef {
            object: self.object,
            offset,
            length: self.at - offset,
        })
    }
}

impl Increment {
    /// Writes to `out`, which becomes `object`, what the store lacks of `stages`. Gives the entries of
    /// the manifest and what the store holds once `out` is durable.
    pub fn write(
        &self,
        stages: Vec<StageParts>,
        object: ObjectId,
        out: &mut impl Write,
    ) -> Result<(Vec<StageEntry>, Self)> {
        let wasteful = self.wasteful();
        let mut out = Sink { out, object, at: 0 };
        let mut entries = Vec::new();
        let mut parts = BTreeMap::new();
        for stage in stages {
            let mut list = Vec::new();
            for part in stage.parts {
                let key = (stage.relation, stage.stage, part.name.clone());
                let held = self.part(&key, part, &wasteful, &mut out)?;
                list.push(PartEntry {
                    name: key.2.clone(),
                    chunks: held.chunks(),
                });
                parts.insert(key, held);
            }
            entries.push(StageEntry {
                relation: stage.relation,
                stage: stage.stage,
                worker: stage.worker,
                parts: list,
            });
        }
        let needed: BTreeSet<ObjectId> = parts
            .values()
            .flat_map(Held::chunks)
            .map(|c| c.object)
            .collect();
        let mut objects = self.objects.clone();
        if out.at > 0 {
            objects.insert(object, out.at);
        }
        objects.retain(|id, _| needed.contains(id));
        Ok((entries, Self { parts, objects }))
    }

    /// Objects that are referred to, by length.
    pub fn objects(&self) -> impl Iterator<Item = (ObjectId, u64)> {
        self.objects.iter().map(|(id, length)| (*id, *length))
    }

    /// Objects of which little is needed any more.
    fn wasteful(&self) -> BTreeSet<ObjectId> {
        let mut needed = BTreeMap::<ObjectId, u64>::new();
        for chunk in self.parts.values().flat_map(Held::chunks) {
            *needed.entry(chunk.object).or_default() += chunk.length;
        }
        let large = self.objects().filter(|(_, length)| *length >= SMALL_OBJECT);
        large
            .filter(|(id, length)| needed.get(id).copied().unwrap_or(0) < length / GARBAGE)
            .map(|(id, _)| id)
            .collect()
    }

    fn part(
        &self,
        key: &PartKey,
        part: Part,
        wasteful: &BTreeSet<ObjectId>,
        out: &mut Sink<'_, impl Write>,
    ) -> Result<Held> {
        let known = self.parts.get(key);
        let kept = |chunk: &ChunkRef| !wasteful.contains(&chunk.object);
        match part.data {
            PartData::Keyed(snapshot) => {
                let chunks = match known {
                    Some(Held::Keyed {
                        generation,
                        number,
                        chunks,
                    }) if *generation == snapshot.generation
                        && number + 1 == snapshot.number
                        && worth_adding(chunks)
                        && chunks.iter().all(kept) =>
                    {
                        let mut chunks = chunks.clone();
                        if snapshot.changes() > 0 {
                            chunks.push(keyed(&part.name, &snapshot, true, out)?);
                        }
                        chunks
                    }
                    _ => vec![keyed(&part.name, &snapshot, false, out)?],
                };
                Ok(Held::Keyed {
                    generation: snapshot.generation,
                    number: snapshot.number,
                    chunks,
                })
            }
            PartData::Batches(batches) => {
                let stored: BTreeMap<usize, &(Weak<HeldBatch>, ChunkRef)> = match known {
                    // A weak pointer keeps the address from being given to another batch.
                    Some(Held::Batches(list)) => {
                        list.iter().map(|b| (b.0.as_ptr().addr(), b)).collect()
                    }
                    _ => BTreeMap::new(),
                };
                let mut list = Vec::with_capacity(batches.len());
                for batch in &batches {
                    let found = stored.get(&Arc::as_ptr(batch).addr());
                    let chunk = match found {
                        Some((_, chunk)) if kept(chunk) => *chunk,
                        _ => out.chunk(|out| {
                            write_batches(&part.name, std::slice::from_ref(batch), out)
                        })?,
                    };
                    list.push((Arc::downgrade(batch), chunk));
                }
                if list.is_empty() {
                    // Says that there is nothing.
                    let empty = out.chunk(|out| write_batches(&part.name, &[], out))?;
                    return Ok(Held::Meta(empty));
                }
                Ok(Held::Batches(list))
            }
            PartData::Meta(bytes) => Ok(Held::Meta(
                out.chunk(|out| write_meta(&part.name, &bytes, out))?,
            )),
        }
    }
}

fn keyed(
    name: &str,
    snapshot: &Snapshot,
    changes_only: bool,
    out: &mut Sink<'_, impl Write>,
) -> Result<ChunkRef> {
    out.chunk(|out| write_keyed(name, snapshot, changes_only, out))
}

/// Another chunk of changes is cheaper, in the long run, than all rows.
fn worth_adding(chunks: &[ChunkRef]) -> bool {
    let changes: u64 = chunks.iter().skip(1).map(|c| c.length).sum();
    chunks.len() < CHUNKS && changes <= chunks[0].length
}

impl Held {
    fn chunks(&self) -> Vec<ChunkRef> {
        match self {
            Self::Keyed { chunks, .. } => chunks.clone(),
            Self::Batches(list) => list.iter().map(|(_, chunk)| *chunk).collect(),
            Self::Meta(chunk) => vec![*chunk],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::hash_bytes;
    use crate::state::KeyedState;

    fn parts(state: &mut KeyedState) -> Vec<StageParts> {
        vec![StageParts {
            relation: RelationId(1),
            stage: StageId(0),
            worker: 0,
            parts: vec![Part {
                name: "rows".to_string(),
                data: PartData::Keyed(state.snapshot()),
            }],
        }]
    }

    fn put(state: &mut KeyedState, keys: std::ops::Range<u32>, value: &[u8]) {
        for key in keys {
            let key = key.to_le_bytes();
            state.upsert(hash_bytes(&key), &key, value);
        }
    }

    fn id(checkpoint: u64) -> ObjectId {
        ObjectId {
            checkpoint,
            worker: 0,
        }
    }

    #[test]
    fn only_changes_are_written_until_they_outweigh_the_rest() {
        let mut state = KeyedState::plain();
        put(&mut state, 0..10_000, &[1; 100]);
        let mut held = Increment::default();
        let mut sizes = Vec::new();
        for checkpoint in 1..40 {
            let mut out = Vec::new();
            let (entries, next) = held
                .write(parts(&mut state), id(checkpoint), &mut out)
                .expect("memory takes everything");
            held = next;
            sizes.push(out.len());
            assert!(entries[0].parts[0].chunks.len() <= CHUNKS);
            assert!(held.objects().count() <= CHUNKS);
            put(&mut state, 0..500, &[checkpoint as u8; 100]);
        }
        let full = sizes[0];
        assert!(sizes[1] < full / 15, "{sizes:?}");
        let fulls = sizes.iter().filter(|s| **s > full / 2).count();
        assert!((2..=4).contains(&fulls), "{sizes:?}");
    }

    #[test]
    fn a_checkpoint_that_failed_is_followed_by_all_rows() {
        let mut state = KeyedState::plain();
        put(&mut state, 0..1_000, b"one");
        let write = |held: &Increment, state: &mut KeyedState, checkpoint| {
            let mut out = Vec::new();
            let written = held.write(parts(state), id(checkpoint), &mut out);
            (written.expect("memory takes everything").1, out.len())
        };
        let (held, full) = write(&Increment::default(), &mut state, 1);
        put(&mut state, 0..10, b"two");
        let _lost = write(&held, &mut state, 2);
        let (held, again) = write(&held, &mut state, 3);
        assert_eq!(again, full);
        assert_eq!(write(&held, &mut state, 4).1, 0, "nothing has changed");
        state.clear();
        put(&mut state, 0..10, b"new");
        let (held, _) = write(&held, &mut state, 5);
        assert_eq!(held.objects().map(|o| o.0).collect::<Vec<_>>(), [id(5)]);
    }
}
