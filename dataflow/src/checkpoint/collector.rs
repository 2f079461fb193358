//! Gathers the parts of a checkpoint and makes it durable. See the protocol in [`super`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::{oneshot, watch};

use super::Message;
use super::manifest::{CheckpointManifest, ObjectId, SinkState, SourceState, VERSION};
use super::parts::{Gathered, Held, write_all};
use super::store::CheckpointStore;
use crate::cluster::link::Link;
use crate::cluster::wire::WirePart;
use crate::engine::Meta;
use crate::engine::shared::Shared;
use crate::env;
use crate::error::{Error, ErrorKind, Result};
use crate::ingest::lock;
use crate::plan::RelationId;
use crate::tick::Hold;
use crate::time::Tick;

/// What the minter knows when it marks a checkpoint.
#[derive(Debug)]
pub struct Begin {
    pub id: u64,
    pub tick: Tick,
    pub sources: BTreeMap<RelationId, SourceState>,
    pub views: BTreeMap<RelationId, u64>,
    pub held: BTreeMap<RelationId, Hold>,
    /// Sinks whose state is expected.
    pub sinks: Vec<RelationId>,
    /// Dataflows that still read history: what they send is not waited for and not kept.
    pub unlevel: Vec<RelationId>,
    pub started: Instant,
    pub done: oneshot::Sender<Result<Finished>>,
}

impl Begin {
    /// What was dropped on the way is not part of the checkpoint.
    fn forget(&mut self, dropped: &BTreeSet<RelationId>) {
        self.sources.retain(|id, _| !dropped.contains(id));
        self.views.retain(|id, _| !dropped.contains(id));
        self.sinks.retain(|id| !dropped.contains(id));
    }
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

/// What has arrived beside the parts of the workers of this process.
#[derive(Default)]
struct Assembly {
    begin: Option<Box<Begin>>,
    sinks: BTreeMap<RelationId, SinkState>,
    /// By process.
    remote: BTreeMap<usize, Result<WirePart>>,
}

impl Assembly {
    fn complete(&self, processes: usize, dropped: &BTreeSet<RelationId>) -> bool {
        let arrived = |s: &RelationId| self.sinks.contains_key(s) || dropped.contains(s);
        self.remote.len() == processes
            && (self.begin.as_ref()).is_some_and(|begin| begin.sinks.iter().all(arrived))
    }
}

/// Runs until all senders are gone.
pub struct Collector {
    /// Of this process.
    pub workers: usize,
    /// The other processes, with as many workers each.
    pub links: Vec<Arc<Link>>,
    pub incarnation: u64,
    pub store: CheckpointStore,
    pub meta: Arc<dyn Meta>,
    pub durable: watch::Receiver<Tick>,
    /// The checkpoint `latest` points to, and the one before it, with their ticks.
    pub kept: Vec<Kept>,
    /// Where the usage of state is shown.
    pub shared: Arc<Shared>,
    /// What `latest` points to.
    pub latest: Option<u64>,
    pub held: Held,
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
        let mut gathered: BTreeMap<u64, Gathered> = BTreeMap::new();
        while let Some(message) = messages.recv().await {
            let touched = match message {
                Message::Begin(begin) => {
                    let id = begin.id;
                    Gathered::open(&mut gathered, id, begin.unlevel.clone());
                    open.entry(id).or_default().begin = Some(begin);
                    vec![id]
                }
                Message::Sink {
                    checkpoint,
                    sink,
                    state,
                } => {
                    if let Some(assembly) = open.get_mut(&checkpoint)
                        && gathered.get(&checkpoint).is_some_and(|g| g.keeps(sink))
                    {
                        assembly.sinks.insert(sink, state);
                    }
                    vec![checkpoint]
                }
                Message::Remote {
                    checkpoint,
                    process,
                    part,
                } => {
                    if let Some(assembly) = open.get_mut(&checkpoint) {
                        assembly.remote.insert(process, part);
                    }
                    vec![checkpoint]
                }
                other => Gathered::add(&mut gathered, other),
            };
            for id in touched {
                self.finish_if_complete(id, &mut open, &mut gathered).await;
            }
        }
    }

    async fn finish_if_complete(
        &mut self,
        id: u64,
        open: &mut BTreeMap<u64, Assembly>,
        gathered: &mut BTreeMap<u64, Gathered>,
    ) {
        let complete = |g: &Gathered| {
            let assembly = open.get(&id);
            g.complete(self.workers)
                && assembly.is_some_and(|a| a.complete(self.links.len(), g.dropped()))
        };
        if !gathered.get(&id).is_some_and(complete) {
            return;
        }
        let Some((mut assembly, gathered)) = open.remove(&id).zip(gathered.remove(&id)) else {
            return;
        };
        let Some(mut begin) = assembly.begin.take() else {
            return;
        };
        begin.forget(gathered.dropped());
        let result = self.finish(&begin, gathered, assembly).await;
        if let Err(e) = &result {
            tracing::error!(checkpoint = id, error = %e, "a checkpoint failed");
        }
        // Whoever asked may have gone away.
        let _ = begin.done.send(result);
    }

    async fn finish(
        &mut self,
        begin: &Begin,
        gathered: Gathered,
        assembly: Assembly,
    ) -> Result<Finished> {
        self.durable
            .wait_for(|t| *t >= begin.tick)
            .await
            .map_err(|_| Error::unavailable("the remap log has stopped"))?;
        env::failpoint("ckpt.begin");
        // A plan that was replaced at this very tick still froze its state; it is waited for, because its
        // last contents are part of what the new plan handed on.
        let kept = |id| {
            begin.views.contains_key(&id)
                || begin.sources.contains_key(&id)
                || begin.sinks.contains(&id)
        };
        let mut parts = gathered.into_parts();
        parts.retain(|p| kept(p.relation));
        let mut sinks = assembly.sinks;
        sinks.retain(|sink, _| begin.sinks.contains(sink));
        let workers = 0..self.workers;
        let (mut written, held) =
            write_all(&self.store, &self.held, workers, parts, begin.id).await?;
        for part in assembly.remote.into_values() {
            let part = part?;
            let stages = part.stages.into_iter();
            written.stages.extend(stages.filter(|s| kept(s.relation)));
            written.objects.extend(part.objects);
            written.bytes += part.bytes;
            written.usage.extend(part.usage);
        }
        let usage = std::mem::take(&mut written.usage);
        *lock(&self.shared.usage) = usage
            .into_iter()
            .map(|(relation, stage, worker, usage)| ((relation, stage, worker), usage))
            .collect();
        env::failpoint("ckpt.part.after_upload");
        let manifest = CheckpointManifest {
            version: VERSION,
            id: begin.id,
            incarnation: self.incarnation,
            workers: self.workers * (1 + self.links.len()),
            tick: begin.tick,
            sources: begin.sources.clone(),
            views: begin.views.clone(),
            sinks,
            held: begin.held.clone(),
            objects: written.objects,
            stages: written.stages,
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
        for link in &self.links {
            link.durable(begin.id, begin.tick);
        }
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
            bytes: written.bytes,
            ms: begin.started.elapsed().as_millis() as u64,
        })
    }
}
