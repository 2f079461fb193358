//! The server's end of the control connection to one worker process.
//!
//! One thread writes what the minter and others queue, one reads what the process answers and puts it
//! where the workers of this process put theirs: progress, counters, frozen contents, closed files.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufReader, BufWriter, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};

use tokio::sync::mpsc::UnboundedSender;

use super::frame::{read_frame, write_frame};
use super::mesh::Timing;
use super::wire::{
    Down, FlowReport, Report, Up, WireBody, WireEvent, WireInput, WireInstall, WireMark, WireTick,
    schema_to_bytes,
};
use super::{Definition, Lost};
use crate::checkpoint::{Message, PartSender};
use crate::delta::Delta;
use crate::delta::ipc;
use crate::engine::sinks::{Closed, SinkStatus};
use crate::error::{Error, Result};
use crate::follow::Event;
use crate::ingest::lock;
use crate::kernel::contents::FrozenContents;
use crate::plan::RelationId;
use crate::tick::{ReadMark, TickInfo};
use crate::time::Tick;
use crate::worker::command::{Body, Command, Counters, Install, Progress};

/// What goes to the process.
#[derive(Debug)]
enum Outgoing {
    /// To one worker, or to all: see [`Link::command`].
    Command(usize, Command),
    Restore(u64),
    Define(Definition),
    Durable(u64, Tick),
    Unfollow(u64),
}

/// A dataflow whose workers report.
#[derive(Debug)]
struct Flow {
    progress: Arc<Progress>,
    sink: Option<(UnboundedSender<Closed>, Arc<SinkStatus>)>,
    /// What ails the writers of the process, as it said last.
    trouble: (Option<String>, bool),
}

#[derive(Debug, Default)]
struct Table {
    flows: BTreeMap<RelationId, Flow>,
    marks: BTreeMap<u64, ReadMark>,
    next_mark: u64,
}

#[derive(Debug)]
struct Shared {
    process: usize,
    /// Of the process.
    workers: usize,
    table: Mutex<Table>,
    parts: PartSender,
    queued_bytes: Arc<AtomicU64>,
    resident_bytes: AtomicU64,
    /// `Stop` was sent: the end of the connection is no failure.
    stopping: AtomicBool,
    lost: Lost,
}

/// See the module.
#[derive(Debug)]
pub struct Link {
    queue: Sender<Outgoing>,
    shared: Arc<Shared>,
}

impl Link {
    /// Begins to talk with process number `process`, which has `workers` workers.
    pub fn start(
        stream: TcpStream,
        process: usize,
        workers: usize,
        timing: Timing,
        parts: PartSender,
        queued_bytes: Arc<AtomicU64>,
        lost: Lost,
    ) -> Result<Self> {
        stream.set_read_timeout(Some(timing.dead_after))?;
        let reader = stream.try_clone()?;
        let shared = Arc::new(Shared {
            process,
            workers,
            table: Mutex::default(),
            parts,
            queued_bytes,
            resident_bytes: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            lost,
        });
        let (queue, outgoing) = channel();
        let writing = Arc::clone(&shared);
        std::thread::Builder::new()
            .name(format!("link-{process}-out"))
            .spawn(move || writing.write(stream, &outgoing, timing))?;
        let (reading, back) = (Arc::clone(&shared), queue.clone());
        std::thread::Builder::new()
            .name(format!("link-{process}-in"))
            .spawn(move || reading.read(reader, &back))?;
        Ok(Self { queue, shared })
    }

    fn send(&self, outgoing: Outgoing) {
        // Once the writing thread is gone the incarnation ends.
        let _ = self.queue.send(outgoing);
    }

    /// A command for one worker of the process. Commands that are the same for all workers go over with
    /// the first of them.
    pub fn command(&self, worker: usize, command: Command) {
        let own = matches!(command, Command::Tick { .. } | Command::History { .. });
        if own || worker == 0 {
            self.send(Outgoing::Command(worker, command));
        }
    }
    /// State is taken from this checkpoint.
    pub fn restore(&self, checkpoint: u64) {
        self.send(Outgoing::Restore(checkpoint));
    }
    pub fn define(&self, definition: Definition) {
        self.send(Outgoing::Define(definition));
    }
    /// A checkpoint counts from now on.
    pub fn durable(&self, checkpoint: u64, tick: Tick) {
        self.send(Outgoing::Durable(checkpoint, tick));
    }
    /// Memory of the process, as it said last.
    pub fn resident_bytes(&self) -> u64 {
        self.shared.resident_bytes.load(Ordering::Relaxed)
    }
    /// The checkpoint's parts of this process are expected under this number.
    pub fn process(&self) -> usize {
        self.shared.process
    }
}

/// What schemas, rows and definitions become.
type Blobs = Vec<Vec<u8>>;

impl Shared {
    fn fail(&self, error: Error) {
        if !self.stopping.load(Ordering::SeqCst) {
            let process = self.process;
            let message = format!("process {process} of the data plane is lost");
            let why = match &error.detail {
                Some(detail) => format!("{}: {detail}", error.message),
                None => error.message.clone(),
            };
            (self.lost.0)(Error {
                message,
                detail: Some(why),
                ..error
            });
        }
    }

    fn write(&self, stream: TcpStream, outgoing: &Receiver<Outgoing>, timing: Timing) {
        let mut out = BufWriter::with_capacity(1 << 16, stream);
        loop {
            let next = match outgoing.try_recv() {
                Ok(next) => Some(next),
                Err(TryRecvError::Disconnected) => return,
                Err(TryRecvError::Empty) => {
                    if let Err(e) = out.flush() {
                        return self.fail(e.into());
                    }
                    match outgoing.recv_timeout(timing.beat) {
                        Ok(next) => Some(next),
                        Err(RecvTimeoutError::Timeout) => None,
                        Err(RecvTimeoutError::Disconnected) => return,
                    }
                }
            };
            let (down, blobs) = match next {
                Some(next) => self.encode(next),
                None => (Down::Beat, Blobs::new()),
            };
            if let Err(e) = write_frame(&mut out, &down, &blobs) {
                return self.fail(e.into());
            }
        }
    }

    fn encode(&self, outgoing: Outgoing) -> (Down, Blobs) {
        match outgoing {
            Outgoing::Command(worker, command) => self.encode_command(worker, command),
            Outgoing::Restore(checkpoint) => (Down::Restore { checkpoint }, Blobs::new()),
            Outgoing::Define(definition) => (Down::Define, vec![definition.to_vec()]),
            Outgoing::Durable(checkpoint, tick) => {
                (Down::Durable { checkpoint, tick }, Blobs::new())
            }
            Outgoing::Unfollow(mark) => (Down::Unfollow { mark }, Blobs::new()),
        }
    }

    fn encode_command(&self, worker: usize, command: Command) -> (Down, Blobs) {
        let none = Blobs::new;
        match command {
            Command::Define(definition) => (Down::Define, vec![definition.to_vec()]),
            Command::AddSource(add) => {
                let down = Down::AddSource {
                    id: add.id,
                    rejected: add.rejected,
                    restored: add.restored.is_some(),
                };
                (down, none())
            }
            Command::Install(install) => self.encode_install(&install),
            Command::History {
                dataflow,
                input,
                tick,
                delta,
            } => {
                let down = Down::History {
                    worker,
                    dataflow,
                    input,
                    tick,
                };
                (down, vec![ipc::encode(&delta)])
            }
            Command::HistoryUpto { dataflow, tick } => {
                (Down::HistoryUpto { dataflow, tick }, none())
            }
            Command::HistoryDone {
                dataflow,
                input,
                attach,
            } => {
                let down = Down::HistoryDone {
                    dataflow,
                    input,
                    attach,
                };
                (down, none())
            }
            Command::Attach(attach) => {
                let down = Down::Attach {
                    dataflow: attach.dataflow,
                    at: attach.at,
                    fresh: attach.fresh.iter().copied().collect(),
                    restored: attach.restored,
                };
                (down, none())
            }
            Command::Seed(info) => (Down::Seed(WireTick::of(&info)), none()),
            Command::Tick {
                info,
                rows,
                rejected,
            } => {
                let encode = |(_, delta): &(RelationId, Delta)| ipc::encode(delta);
                let blobs = rows.iter().chain(&rejected).map(encode).collect();
                let ids = |list: &[(RelationId, Delta)]| list.iter().map(|(id, _)| *id).collect();
                let down = Down::Tick {
                    worker,
                    info: (worker == 0).then(|| self.encode_tick(&info)),
                    rows: ids(&rows),
                    rejected: ids(&rejected),
                };
                (down, blobs)
            }
            Command::Replace { old, new, at } => (Down::Replace { old, new, at }, none()),
            Command::Drop(ids) => {
                lock(&self.table).flows.retain(|id, _| !ids.contains(id));
                (Down::Drop(ids.to_vec()), none())
            }
            Command::Stop => {
                self.stopping.store(true, Ordering::SeqCst);
                (Down::Stop, none())
            }
        }
    }

    fn encode_install(&self, install: &Install) -> (Down, Blobs) {
        let (body, sink) = match &install.body {
            Body::View {
                relation,
                plan,
                errors,
                late,
                hidden,
            } => {
                let body = WireBody::View {
                    relation: *relation,
                    hidden: *hidden,
                    fingerprint: plan.fingerprint,
                    errors: *errors,
                    late: *late,
                };
                (body, None)
            }
            Body::Sink {
                from,
                skip_below,
                closed,
                status,
                ..
            } => {
                let body = WireBody::Sink {
                    from: *from,
                    skip_below: *skip_below,
                };
                (body, Some((closed.clone(), Arc::clone(status))))
            }
        };
        let flow = Flow {
            progress: Arc::clone(&install.progress),
            sink,
            trouble: (None, false),
        };
        // Before the process hears of it: its answers find their place.
        lock(&self.table).flows.insert(install.id, flow);
        let inputs = install.inputs.iter().map(|(relation, info)| WireInput {
            relation: *relation,
            sources: info.sources.clone(),
            append_only: info.append_only,
        });
        let down = Down::Install(Box::new(WireInstall {
            id: install.id,
            name: install.name.clone(),
            restored: install.restored.is_some(),
            inputs: inputs.collect(),
            body,
        }));
        let schemas = install.inputs.values();
        (down, schemas.map(|i| schema_to_bytes(&i.schema)).collect())
    }

    fn encode_tick(&self, info: &TickInfo) -> WireTick {
        let mut tick = WireTick::of(info);
        let mut table = lock(&self.table);
        for read in &info.marks.reads {
            let mark = table.next_mark;
            table.next_mark += 1;
            table.marks.insert(mark, read.clone());
            tick.reads.push(WireMark {
                mark,
                relations: read.relations.to_vec(),
                follow: read.follow.is_some(),
            });
        }
        tick
    }

    fn read(&self, stream: TcpStream, back: &Sender<Outgoing>) {
        let mut input = BufReader::with_capacity(1 << 16, stream);
        loop {
            let (up, blobs) = match read_frame::<Up>(&mut input) {
                Ok(frame) => frame,
                Err(e) => return self.fail(silence(e)),
            };
            match self.take(up, blobs, back) {
                Ok(true) => {}
                Ok(false) => return,
                Err(e) => return self.fail(e),
            }
        }
    }

    /// Whether more may come.
    fn take(&self, up: Up, blobs: Blobs, back: &Sender<Outgoing>) -> Result<bool> {
        match up {
            Up::Report(report) => self.report(*report),
            Up::Answer {
                mark,
                tick,
                relation,
            } => {
                let batches = decode(&blobs)?.into_iter().map(|d| d.batch).collect();
                if let Some(read) = lock(&self.table).marks.get(&mark) {
                    // The reader may be gone; then nobody wants the answer.
                    let answer = (tick, relation, FrozenContents::of_batches(batches));
                    let _ = read.answer.send(answer);
                }
            }
            Up::Answered { mark } => {
                let mut table = lock(&self.table);
                match table.marks.get_mut(&mark) {
                    // Only the follower is left: whoever reads learns that no more answers come.
                    Some(read) if read.follow.is_some() => {
                        read.answer = tokio::sync::mpsc::unbounded_channel().0;
                    }
                    _ => drop(table.marks.remove(&mark)),
                }
            }
            Up::Event {
                mark,
                worker,
                event,
            } => {
                let event = match event {
                    WireEvent::Changes(tick) => Event::Changes(tick, decode(&blobs)?),
                    WireEvent::Upto(tick) => Event::Upto(tick),
                    WireEvent::Closed => Event::Closed,
                };
                let worker = self.global(worker)?;
                let mut table = lock(&self.table);
                let follow = table.marks.get(&mark).and_then(|m| m.follow.as_ref());
                if follow.is_some_and(|f| !f.send(worker, event)) {
                    table.marks.remove(&mark);
                    let _ = back.send(Outgoing::Unfollow(mark));
                }
            }
            Up::Unfollowed { mark, overrun } => {
                let read = lock(&self.table).marks.remove(&mark);
                if let Some(follow) = read.and_then(|r| r.follow)
                    && overrun
                {
                    follow.cut();
                }
            }
            Up::Part { checkpoint, part } => {
                let message = Message::Remote {
                    checkpoint,
                    process: self.process,
                    part: part.map_err(Error::from),
                };
                let _ = self.parts.0.send(message);
            }
            Up::Closed {
                sink,
                upper,
                epoch,
                checkpoint,
                committables,
            } => {
                let table = lock(&self.table);
                let flow = table.flows.get(&sink).and_then(|f| f.sink.as_ref());
                if let Some((closed, _)) = flow {
                    let _ = closed.send(Closed {
                        upper,
                        epoch,
                        checkpoint,
                        committables,
                    });
                }
            }
            Up::Broken { sink, tick, error } => {
                let table = lock(&self.table);
                let flow = table.flows.get(&sink).and_then(|f| f.sink.as_ref());
                if let Some((_, status)) = flow {
                    status.broke(tick, &error.into());
                }
            }
            Up::Failed(error) => return Err(error.into()),
            Up::Bye => return Ok(false),
            Up::Beat => {}
            Up::Hello { .. } => {
                return Err(Error::unavailable("it said something unexpected"));
            }
        }
        Ok(true)
    }

    fn global(&self, worker: usize) -> Result<usize> {
        if worker >= self.workers {
            return Err(Error::unavailable("it speaks of a worker it does not have"));
        }
        Ok(self.process * self.workers + worker)
    }

    fn report(&self, report: Report) {
        let mut table = lock(&self.table);
        for flow in report.flows {
            if let Some(known) = table.flows.get_mut(&flow.id) {
                self.report_flow(known, flow);
            }
        }
        drop(table);
        self.resident_bytes
            .store(report.resident_bytes, Ordering::Relaxed);
        // As a difference: several processes share the counter.
        self.queued_bytes
            .fetch_add(report.queued_bytes as u64, Ordering::Relaxed);
    }

    fn report_flow(&self, known: &mut Flow, flow: FlowReport) {
        let counters = &known.progress.counters;
        for (counter, n) in counters.sums().into_iter().zip(flow.counters) {
            counter.fetch_add(n, Ordering::Relaxed);
        }
        // Before the ticks are said to be applied: see how `committed` is shown.
        counters
            .last_rows
            .fetch_max(flow.last_rows, Ordering::Relaxed);
        for (worker, stage, operator, size) in flow.state {
            if let Ok(worker) = self.global(worker) {
                counters.set_state(worker, stage, operator_name(&operator), size);
            }
        }
        if let (Some(report), Some((_, status))) = (flow.sink, &known.sink) {
            status.rows.fetch_add(report.rows, Ordering::Relaxed);
            status.bytes.fetch_add(report.bytes, Ordering::Relaxed);
            if report.fresh {
                status.fresh.store(true, Ordering::Relaxed);
            }
            // The writers here have a say in it too.
            let trouble = (report.trouble, report.failed);
            if trouble != known.trouble {
                known.trouble.clone_from(&trouble);
                *lock(&status.trouble) = trouble.0;
                status.failed.store(trouble.1, Ordering::Relaxed);
            }
        }
        for (worker, port, next) in flow.progress {
            if let Ok(worker) = self.global(worker)
                && port < Progress::PORTS
            {
                known.progress.set(worker, port, next);
            }
        }
    }
}

impl Counters {
    /// Those that are sums over the workers.
    pub fn sums(&self) -> [&AtomicU64; 7] {
        [
            &self.rows_in,
            &self.rows_out,
            &self.bytes_in,
            &self.bytes_out,
            &self.late_rows,
            &self.error_rows,
            &self.rejected_rows,
        ]
    }
}

fn decode(blobs: &[Vec<u8>]) -> Result<Vec<Delta>> {
    blobs.iter().map(|b| ipc::decode(b)).collect()
}

/// Silence has a name of its own.
pub(super) fn silence(e: std::io::Error) -> Error {
    match e.kind() {
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => {
            Error::unavailable("it was silent for too long")
        }
        std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::ConnectionReset => {
            Error::unavailable("the connection was closed")
        }
        _ => e.into(),
    }
}

/// One of the few names that operators have.
fn operator_name(name: &str) -> &'static str {
    static NAMES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut names = lock(&NAMES);
    match names.get(name) {
        Some(known) => known,
        None => {
            let kept: &'static str = Box::leak(name.to_string().into_boxed_str());
            names.insert(kept);
            kept
        }
    }
}
