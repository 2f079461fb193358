//! A worker process: does what the server says, with workers of its own.
//!
//! Commands come over the control connection in the order in which the workers of the server hear
//! them, and become the same commands for the workers here. What those put into shared memory (progress, counters,
//! answers, parts of checkpoints, closed files) goes back as frames.

mod gather;
mod report;
mod rows;

use std::collections::BTreeMap;
use std::io::{BufReader, BufWriter, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};

use async_trait::async_trait;
use tokio::runtime::Handle;
use tokio::sync::mpsc::unbounded_channel;

use super::Lost;
use super::frame::{read_frame, write_frame};
use super::link::silence;
use super::mesh::Joined;
use super::wire::{Down, Up, WireBody, WireInstall, WireTick, schema_from_bytes};
use crate::blame;
use crate::checkpoint::store::CheckpointStore;
use crate::checkpoint::{Message, PartSender, RestoredDataflow};
use crate::delta::{Delta, ipc};
use crate::engine::sinks::{self, Closed, SinkStatus};
use crate::engine::{Item, SinkItem, ViewItem};
use crate::error::{Error, ErrorKind, Result};
use crate::ingest::Signal;
use crate::plan::RelationId;
use crate::state::Pager;
use crate::tick::{Marks, TickInfo};
use crate::time::Tick;
use crate::worker::command::{
    AddSource, Attach, Body, Command, InputInfo, Install, Progress, WorkerHandle,
};
use crate::worker::start::{Mesh, start};
use report::Reports;
use rows::Readers;

/// Makes items again from the service's description of them.
#[async_trait]
pub trait Planner: Send {
    /// What a definition stands for, in this process.
    async fn define(&mut self, definition: &[u8]) -> Result<Vec<Item>>;
    /// These items are gone.
    fn forget(&mut self, ids: &[RelationId]);
}

/// What a worker process starts with.
pub struct Setup {
    pub joined: Joined,
    /// Holds the checkpoints, as the server's does, if they are not kept elsewhere.
    pub dir: PathBuf,
    /// Where checkpoints are kept.
    pub checkpoints: Option<CheckpointStore>,
    /// The memory that state may take in this process; `None` sets no limit.
    pub pager: Option<Arc<Pager>>,
    pub incarnation: u64,
    pub planner: Box<dyn Planner>,
    /// Memory of this process.
    pub resident_bytes: fn() -> u64,
    /// Told when the server is gone.
    pub lost: Lost,
}

impl std::fmt::Debug for Setup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Setup(process {})", self.joined.process)
    }
}

/// Frames on their way to the server.
#[derive(Debug, Clone)]
struct Outbox(Sender<(Up, Vec<Vec<u8>>)>);

impl Outbox {
    fn send(&self, up: Up) {
        self.send_with(up, Vec::new());
    }
    fn send_with(&self, up: Up, blobs: Vec<Vec<u8>>) {
        // Once the writing thread is gone the process ends.
        let _ = self.0.send((up, blobs));
    }
}

type Downs = Receiver<(Down, Vec<Vec<u8>>)>;

struct Remote {
    /// Number of the first worker here among all.
    first: usize,
    /// Of all processes.
    width: usize,
    incarnation: u64,
    handles: Vec<WorkerHandle>,
    planner: Box<dyn Planner>,
    /// By dataflow.
    items: BTreeMap<RelationId, Item>,
    /// Why the last item that could not be made was not.
    trouble: Option<Error>,
    store: CheckpointStore,
    /// Of the checkpoint, what was not installed yet.
    state: BTreeMap<RelationId, Arc<RestoredDataflow>>,
    /// The last tick, which every worker here is told.
    info: Option<Arc<TickInfo>>,
    readers: Readers,
    reports: Reports,
    signal: Arc<Signal>,
    queued_bytes: Arc<AtomicU64>,
    durable: tokio::sync::mpsc::UnboundedSender<u64>,
    parts: PartSender,
    outbox: Outbox,
    runtime: Handle,
}

/// Runs until the server says that it is over. Blocks; `runtime` runs what waits.
pub fn run(setup: Setup, runtime: Handle) -> Result<()> {
    let Joined {
        process,
        workers,
        control,
        mesh,
        timing,
    } = setup.joined;
    let width = workers * mesh.len();
    control.set_read_timeout(Some(timing.dead_after))?;
    let stopping = Arc::new(AtomicBool::new(false));
    let (outbox, outgoing) = channel();
    let outbox = Outbox(outbox);
    let writer = {
        let (stream, lost) = (control.try_clone()?, setup.lost.clone());
        std::thread::Builder::new()
            .name("control-out".into())
            .spawn(move || {
                if let Err(e) = write(stream, &outgoing) {
                    (lost.0)(gone(e.into()));
                }
            })?
    };
    let downs = {
        let (sender, downs) = channel();
        let (lost, stopping) = (setup.lost.clone(), Arc::clone(&stopping));
        std::thread::Builder::new()
            .name("control-in".into())
            .spawn(move || {
                if let Err(e) = read(control, &sender)
                    && !stopping.load(Ordering::SeqCst)
                {
                    (lost.0)(gone(e));
                }
            })?;
        downs
    };
    let (part_sender, parts) = unbounded_channel();
    let (durable, kept) = unbounded_channel();
    let own = workers * process..workers * (process + 1);
    let store = {
        // What is written is awaited on this runtime.
        let _inside = runtime.enter();
        match setup.checkpoints {
            Some(store) => store,
            None => CheckpointStore::local(setup.dir)?,
        }
    };
    runtime.spawn(gather::run(
        store.clone(),
        own.clone(),
        parts,
        kept,
        outbox.clone(),
    ));
    let mesh = Mesh {
        process,
        sockets: mesh,
    };
    let part_sender = PartSender(part_sender);
    let started = start(workers, part_sender.clone(), setup.pager, Some(mesh))?;
    let signal = Arc::new(Signal::default());
    let queued_bytes = Arc::new(AtomicU64::new(0));
    let reports = Reports::start(report::Watched {
        own: own.clone(),
        signal: Arc::clone(&signal),
        queued_bytes: Arc::clone(&queued_bytes),
        resident_bytes: setup.resident_bytes,
        outbox: outbox.clone(),
        beat: timing.beat,
    })?;
    let mut remote = Remote {
        first: own.start,
        width,
        incarnation: setup.incarnation,
        handles: started.handles,
        planner: setup.planner,
        items: BTreeMap::new(),
        trouble: None,
        store,
        state: BTreeMap::new(),
        info: None,
        readers: Readers::new(own.start, outbox.clone(), runtime.clone()),
        reports,
        signal,
        queued_bytes,
        durable,
        parts: part_sender,
        outbox: outbox.clone(),
        runtime,
    };
    let outcome = remote.follow(&downs);
    stopping.store(true, Ordering::SeqCst);
    let end = match &outcome {
        Ok(()) => {
            // The workers of all processes end together.
            let _ = started.thread.join();
            Up::Bye
        }
        Err(e) => Up::Failed(e.clone().into()),
    };
    remote.reports.end();
    outbox.send(end);
    let _ = writer.join();
    outcome
}

/// Ends with the frame after which nothing comes.
fn write(stream: TcpStream, outgoing: &Receiver<(Up, Vec<Vec<u8>>)>) -> std::io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 16, stream);
    loop {
        let next = match outgoing.try_recv() {
            Ok(next) => next,
            Err(TryRecvError::Disconnected) => return Ok(()),
            Err(TryRecvError::Empty) => {
                out.flush()?;
                match outgoing.recv() {
                    Ok(next) => next,
                    Err(_) => return Ok(()),
                }
            }
        };
        write_frame(&mut out, &next.0, &next.1)?;
        if matches!(next.0, Up::Bye | Up::Failed(_)) {
            return out.flush();
        }
    }
}

fn read(stream: TcpStream, sender: &Sender<(Down, Vec<Vec<u8>>)>) -> Result<()> {
    let mut input = BufReader::with_capacity(1 << 16, stream);
    loop {
        let frame: (Down, _) = read_frame(&mut input).map_err(silence)?;
        let last = matches!(frame.0, Down::Stop);
        if matches!(frame.0, Down::Beat) {
            continue;
        }
        if sender.send(frame).is_err() || last {
            return Ok(());
        }
    }
}

impl Remote {
    /// Does what the server says until it says `Stop`.
    fn follow(&mut self, downs: &Downs) -> Result<()> {
        while let Ok((down, blobs)) = downs.recv() {
            if matches!(down, Down::Stop) {
                self.all(|| Command::Stop);
                return Ok(());
            }
            self.take(down, blobs)?;
        }
        Err(Error::unavailable("the server is gone"))
    }

    fn all(&self, command: impl Fn() -> Command) {
        for handle in &self.handles {
            handle.send(command());
        }
    }

    fn worker(&self, worker: usize) -> Result<&WorkerHandle> {
        self.handles.get(worker).ok_or_else(unexpected)
    }

    fn take(&mut self, down: Down, blobs: Vec<Vec<u8>>) -> Result<()> {
        match down {
            Down::Restore { checkpoint } => self.restore(checkpoint)?,
            Down::Define => {
                for definition in &blobs {
                    match self.runtime.block_on(self.planner.define(definition)) {
                        Ok(items) => self
                            .items
                            .extend(items.into_iter().map(|i| (dataflow(&i), i))),
                        // Only if it is to be installed here does it matter.
                        Err(error) => self.trouble = Some(error),
                    }
                }
            }
            Down::AddSource {
                id,
                rejected,
                restored,
            } => {
                let state = self.state.remove(&id);
                let add = Arc::new(AddSource {
                    id,
                    rejected,
                    restored: restored.then(|| state.unwrap_or_default()),
                });
                self.all(|| Command::AddSource(Arc::clone(&add)));
            }
            Down::Install(install) => self.install(*install, &blobs)?,
            Down::History {
                worker,
                dataflow,
                input,
                tick,
            } => {
                let delta = deltas(&blobs)?.pop().ok_or_else(unexpected)?;
                self.worker(worker)?.send(Command::History {
                    dataflow,
                    input,
                    tick,
                    delta,
                });
            }
            Down::HistoryUpto { dataflow, tick } => {
                self.all(|| Command::HistoryUpto { dataflow, tick });
            }
            Down::HistoryDone {
                dataflow,
                input,
                attach,
            } => self.all(|| Command::HistoryDone {
                dataflow,
                input,
                attach,
            }),
            Down::Attach {
                dataflow,
                at,
                fresh,
                restored,
            } => {
                let attach = Attach {
                    dataflow,
                    at,
                    fresh: Arc::new(fresh.into_iter().collect()),
                    restored,
                };
                self.all(|| Command::Attach(attach.clone()));
            }
            Down::Seed(tick) => {
                // Everything that is restored was installed.
                self.state.clear();
                let info = Arc::new(self.info(tick));
                self.all(|| Command::Seed(Arc::clone(&info)));
            }
            Down::Tick {
                worker,
                info,
                rows,
                rejected,
            } => self.tick(worker, info, rows, rejected, &blobs)?,
            Down::Replace { old, new, at } => self.all(|| Command::Replace { old, new, at }),
            Down::Drop(ids) => {
                self.planner.forget(&ids);
                self.items.retain(|id, _| !ids.contains(id));
                self.reports.forget(&ids);
                let ids: Arc<[RelationId]> = ids.into();
                self.all(|| Command::Drop(Arc::clone(&ids)));
            }
            Down::Durable { checkpoint, tick } => {
                blame::checkpointed(tick);
                let _ = self.durable.send(checkpoint);
            }
            Down::Unfollow { mark } => self.readers.unfollow(mark),
            Down::Beat | Down::Stop => {}
            Down::Start { .. } => return Err(unexpected()),
        }
        Ok(())
    }

    /// Reads the checkpoint; what is installed takes its share of it.
    fn restore(&mut self, checkpoint: u64) -> Result<()> {
        let store = self.store.clone();
        let state = self.runtime.block_on(async move {
            let manifest = store.manifest(checkpoint).await?;
            blame::checkpointed(manifest.tick);
            store.restore(&manifest).await
        })?;
        self.state = state.into_iter().map(|(id, s)| (id, Arc::new(s))).collect();
        Ok(())
    }

    fn install(&mut self, install: WireInstall, schemas: &[Vec<u8>]) -> Result<()> {
        let WireInstall {
            id,
            name,
            restored,
            inputs,
            body,
        } = install;
        let mut known = BTreeMap::new();
        for (input, schema) in inputs.into_iter().zip(schemas) {
            let info = InputInfo {
                schema: schema_from_bytes(schema)?,
                sources: input.sources,
                append_only: input.append_only,
            };
            known.insert(input.relation, info);
        }
        let (body, ports, sink) = match (body, self.items.get(&id)) {
            (
                WireBody::View {
                    relation,
                    hidden,
                    fingerprint,
                    errors,
                    late,
                },
                Some(Item::View(view)),
            ) => {
                check(view, fingerprint)?;
                let plan = view.plan.clone();
                let body = Body::View {
                    relation,
                    plan,
                    errors,
                    late,
                    hidden,
                };
                (body, Progress::PORTS, None)
            }
            (WireBody::Sink { from, skip_below }, Some(Item::Sink(sink))) => {
                let (body, status) = self.sink(&sink.clone(), from, skip_below)?;
                (body, 1, Some(status))
            }
            _ => {
                return Err(self.trouble.take().unwrap_or_else(|| {
                    let what = format!("a worker process was not told what \"{name}\" is");
                    Error::internal(what)
                }));
            }
        };
        let progress = Arc::new(Progress::new(self.width, ports, Arc::clone(&self.signal)));
        self.reports.watch(id, Arc::clone(&progress), sink);
        let state = self.state.remove(&id);
        let install = Arc::new(Install {
            id,
            name,
            body,
            inputs: known,
            restored: restored.then(|| state.unwrap_or_default()),
            progress,
        });
        self.all(|| Command::Install(Arc::clone(&install)));
        Ok(())
    }

    /// Writers for the workers here; what they close goes to the server, which commits it.
    fn sink(
        &self,
        item: &SinkItem,
        from: RelationId,
        skip_below: Tick,
    ) -> Result<(Body, Arc<SinkStatus>)> {
        let status = Arc::new(SinkStatus::default());
        let (closed, mut closings) = unbounded_channel::<Closed>();
        let writers = self.runtime.block_on(sinks::writers(
            item.id,
            item.sink.as_ref(),
            self.first..self.first + self.handles.len(),
            self.incarnation,
            skip_below,
            &sinks::WriterContext {
                closed: closed.clone(),
                status: Arc::clone(&status),
                queued_bytes: Arc::clone(&self.queued_bytes),
                signal: Arc::clone(&self.signal),
            },
        ))?;
        let (outbox, sink) = (self.outbox.clone(), item.id);
        let mut broken = status.broken.subscribe();
        let (weak, said) = (Arc::downgrade(&status), outbox.clone());
        self.runtime.spawn(async move {
            // As long as the sink is here.
            while broken.changed().await.is_ok() && weak.strong_count() > 0 {
                let why = broken.borrow_and_update().clone();
                if let Some((tick, error)) = why {
                    let error = error.into();
                    said.send(Up::Broken { sink, tick, error });
                }
            }
        });
        self.runtime.spawn(async move {
            while let Some(closing) = closings.recv().await {
                outbox.send(Up::Closed {
                    sink,
                    upper: closing.upper,
                    epoch: closing.epoch,
                    checkpoint: closing.checkpoint,
                    committables: closing.committables,
                });
            }
        });
        let body = Body::Sink {
            from,
            writers,
            skip_below,
            queued_bytes: Arc::clone(&self.queued_bytes),
            closed,
            status: Arc::clone(&status),
        };
        Ok((body, status))
    }

    fn info(&self, tick: WireTick) -> TickInfo {
        let reads = tick
            .reads
            .into_iter()
            .map(|m| self.readers.mark(m))
            .collect();
        TickInfo {
            tick: tick.tick,
            watermarks: tick.watermarks,
            held: Arc::new(tick.held),
            marks: Marks {
                checkpoint: tick.checkpoint,
                unlevel: tick.unlevel,
                reads,
                epochs: tick.epochs,
            },
        }
    }

    fn tick(
        &mut self,
        worker: usize,
        info: Option<WireTick>,
        rows: Vec<RelationId>,
        rejected: Vec<RelationId>,
        blobs: &[Vec<u8>],
    ) -> Result<()> {
        if let Some(info) = info {
            if let Some(checkpoint) = info.checkpoint {
                // Before any worker here hears of it.
                let message = Message::Open {
                    checkpoint,
                    unlevel: info.unlevel.clone(),
                };
                let _ = self.parts.0.send(message);
            }
            self.info = Some(Arc::new(self.info(info)));
        }
        let info = Arc::clone(self.info.as_ref().ok_or_else(unexpected)?);
        if blobs.len() != rows.len() + rejected.len() {
            return Err(unexpected());
        }
        let mut deltas = deltas(blobs)?.into_iter();
        let rows = rows.into_iter().zip(deltas.by_ref()).collect();
        let rejected = rejected.into_iter().zip(deltas).collect();
        self.worker(worker)?.send(Command::Tick {
            info,
            rows,
            rejected,
        });
        Ok(())
    }
}

/// What an item is installed as.
fn dataflow(item: &Item) -> RelationId {
    match item {
        Item::View(view) => view.dataflow,
        other => other.id(),
    }
}

/// The plan made here is the server's.
fn check(view: &ViewItem, fingerprint: u64) -> Result<()> {
    if view.plan.fingerprint == fingerprint {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Internal,
        format!(
            "the processes of the data plane plan view \"{}\" differently",
            view.name
        ),
    )
    .detail(format!(
        "fingerprint {fingerprint:016x} in the server, {:016x} in the worker process",
        view.plan.fingerprint
    ))
    .hint("run all processes with the same version"))
}

fn deltas(blobs: &[Vec<u8>]) -> Result<Vec<Delta>> {
    blobs.iter().map(|b| ipc::decode(b)).collect()
}

fn gone(e: Error) -> Error {
    Error {
        message: "the server of this data plane is lost".to_string(),
        detail: Some(e.message),
        ..e
    }
}

fn unexpected() -> Error {
    Error::internal("the server said something unexpected to a worker process")
}
