//! Gathers the parts of a checkpoint and makes it durable. See the protocol in [`super`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::{oneshot, watch};

use super::increment::Increment;
use super::manifest::{
    CheckpointManifest, ObjectEntry, ObjectId, SinkState, SourceState, StageEntry, VERSION,
};
use super::store::{CheckpointStore, ObjectWriter};
use super::{Message, StageParts};
use crate::engine::Meta;
use crate::env;
use crate::error::{Error, ErrorKind, Result};
use crate::plan::RelationId;
use crate::time::Tick;

/// What the minter knows when it marks a checkpoint.
#[derive(Debug)]
pub struct Begin {
    pub id: u64,
    pub tick: Tick,
    pub sources: BTreeMap<RelationId, SourceState>,
    pub views: BTreeMap<RelationId, u64>,
    /// Sinks whose state is expected.
    pub sinks: Vec<RelationId>,
    /// Dataflows that still read history: what they send is not waited for and not kept.
    pub unlevel: Vec<RelationId>,
    pub started: Instant,
    pub done: oneshot::Sender<Result<Finished>>,
}

/// A checkpoint that is durable.
#[derive(Debug, Clone)]
pub struct Finished {
    pub id: u64,
    pub tick: Tick,
    /// Tick of the oldest checkpoint that is kept.
    pub oldest: Tick,
    pub bytes: u64,
    pub ms: u64,
}

#[derive(Default)]
struct Assembly {
    begin: Option<Box<Begin>>,
    expected: BTreeMap<usize, usize>,
    parts: Vec<StageParts>,
    sinks: BTreeMap<RelationId, SinkState>,
}

impl Assembly {
    fn leaves_out(&self, dataflow: RelationId) -> bool {
        let begin = self.begin.as_ref();
        begin.is_some_and(|b| b.unlevel.contains(&dataflow))
    }
    fn complete(&self, workers: usize) -> bool {
        let Some(begin) = &self.begin else {
            return false;
        };
        self.expected.len() == workers
            && self.parts.len() == self.expected.values().sum::<usize>()
            && begin.sinks.iter().all(|s| self.sinks.contains_key(s))
    }
}

/// Runs until all senders are gone.
pub struct Collector {
    pub workers: usize,
    pub incarnation: u64,
    pub store: CheckpointStore,
    pub meta: Arc<dyn Meta>,
    pub durable: watch::Receiver<Tick>,
    /// The checkpoint `latest` points to, and the one before it, with their ticks.
    pub kept: Vec<Kept>,
    /// What `latest` points to.
    pub latest: Option<u64>,
    /// By worker.
    pub held: Vec<Increment>,
}

/// A checkpoint that can be restored.
#[derive(Debug, Clone)]
pub struct Kept {
    pub id: u64,
    pub tick: Tick,
    pub objects: BTreeSet<ObjectId>,
}

impl Kept {
    pub fn of(manifest: &CheckpointManifest) -> Self {
        Self {
            id: manifest.id,
            tick: manifest.tick,
            objects: manifest.objects.iter().map(|o| o.id).collect(),
        }
    }
}

impl std::fmt::Debug for Collector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Collector({} workers)", self.workers)
    }
}

impl Collector {
    pub async fn run(mut self, mut messages: UnboundedReceiver<Message>) {
        // The minter says that a checkpoint begins before any worker hears of its tick. What comes for
        // another one is from a dataflow that was not waited for.
        let mut open: BTreeMap<u64, Assembly> = BTreeMap::new();
        while let Some(message) = messages.recv().await {
            let id = match message {
                Message::Begin(begin) => {
                    let id = begin.id;
                    open.entry(id).or_default().begin = Some(begin);
                    id
                }
                Message::Expect {
                    checkpoint,
                    worker,
                    stages,
                } => {
                    if let Some(assembly) = open.get_mut(&checkpoint) {
                        assembly.expected.insert(worker, stages);
                    }
                    checkpoint
                }
                Message::Parts { checkpoint, parts } => {
                    if let Some(assembly) = open.get_mut(&checkpoint)
                        && !assembly.leaves_out(parts.relation)
                    {
                        assembly.parts.push(parts);
                    }
                    checkpoint
                }
                Message::Sink {
                    checkpoint,
                    sink,
                    state,
                } => {
                    if let Some(assembly) = open.get_mut(&checkpoint)
                        && !assembly.leaves_out(sink)
                    {
                        assembly.sinks.insert(sink, state);
                    }
                    checkpoint
                }
            };
            if open.get(&id).is_some_and(|a| a.complete(self.workers))
                && let Some(mut assembly) = open.remove(&id)
                && let Some(begin) = assembly.begin.take()
            {
                let result = self.finish(&begin, assembly).await;
                if let Err(e) = &result {
                    tracing::error!(checkpoint = id, error = %e, "a checkpoint failed");
                }
                // Whoever asked may have gone away.
                let _ = begin.done.send(result);
            }
        }
    }

    async fn finish(&mut self, begin: &Begin, assembly: Assembly) -> Result<Finished> {
        self.durable
            .wait_for(|t| *t >= begin.tick)
            .await
            .map_err(|_| Error::unavailable("the remap log has stopped"))?;
        env::failpoint("ckpt.begin");
        let mut by_worker: BTreeMap<usize, Vec<StageParts>> =
            (0..self.workers).map(|w| (w, Vec::new())).collect();
        // A plan that was replaced at this very tick still froze its state; it is waited for, because its
        // last contents are part of what the new plan handed on.
        let kept = |id| begin.views.contains_key(&id) || begin.sources.contains_key(&id);
        for parts in assembly.parts.into_iter().filter(|p| kept(p.relation)) {
            by_worker.entry(parts.worker).or_default().push(parts);
        }
        let mut stages = Vec::new();
        let mut held = Vec::new();
        let mut bytes = 0;
        for (worker, parts) in by_worker {
            let object = ObjectId {
                checkpoint: begin.id,
                worker,
            };
            let before = self.held.get(worker).cloned().unwrap_or_default();
            let writer = self.store.writer(object);
            let write = move || write(&before, parts, object, writer);
            let (entries, after) = tokio::task::spawn_blocking(write)
                .await
                .map_err(|e| Error::internal(e.to_string()))??;
            bytes += after.objects().find(|o| o.0 == object).map_or(0, |o| o.1);
            stages.extend(entries);
            held.push(after);
        }
        let objects: Vec<ObjectEntry> = held
            .iter()
            .flat_map(Increment::objects)
            .map(|(id, length)| ObjectEntry { id, length })
            .collect();
        env::failpoint("ckpt.part.after_upload");
        let manifest = CheckpointManifest {
            version: VERSION,
            id: begin.id,
            incarnation: self.incarnation,
            workers: self.workers,
            tick: begin.tick,
            sources: begin.sources.clone(),
            views: begin.views.clone(),
            sinks: assembly.sinks,
            objects,
            stages,
        };
        self.store.put_manifest(&manifest).await?;
        env::failpoint("ckpt.manifest.before_cas");
        if !self
            .meta
            .move_latest_checkpoint(self.incarnation, self.latest, begin.id)
            .await?
        {
            return Err(Error::new(
                ErrorKind::Conflict,
                "another server has taken over this data directory",
            ));
        }
        env::failpoint("ckpt.manifest.after_cas");
        self.latest = Some(begin.id);
        self.held = held;
        self.kept.insert(0, Kept::of(&manifest));
        self.kept.truncate(2);
        let ids: Vec<u64> = self.kept.iter().map(|k| k.id).collect();
        let needed = self.kept.iter().flat_map(|k| &k.objects).copied().collect();
        if let Err(e) = self.store.remove_all_but(&ids, &needed).await {
            tracing::warn!(error = %e, "old checkpoints could not be removed");
        }
        Ok(Finished {
            id: begin.id,
            tick: begin.tick,
            oldest: self.kept.iter().map(|k| k.tick).min().unwrap_or(0),
            bytes,
            ms: begin.started.elapsed().as_millis() as u64,
        })
    }
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
