//! What the server and its worker processes say to each other, as heads of frames.
//!
//! Rows, batches and schemas travel as blobs beside the head, in the order in which it names them.
//! Workers are counted within their process here.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use arrow::datatypes::{Schema, SchemaRef};
use arrow::ipc::reader::StreamReader;
use arrow::ipc::writer::StreamWriter;
use serde::{Deserialize, Serialize};

use crate::checkpoint::StageId;
use crate::checkpoint::manifest::{ObjectEntry, StageEntry};
use crate::checkpoint::usage::Usage;
use crate::error::{Error, ErrorKind, Result};
use crate::plan::RelationId;
use crate::sink::Committable;
use crate::tick::{Hold, TickInfo};
use crate::time::{Tick, Watermark};
use crate::worker::command::StateSize;

/// From the server to a worker process.
#[derive(Debug, Serialize, Deserialize)]
pub enum Down {
    /// Where the gates of all processes are.
    Start {
        workers: usize,
        addresses: Vec<SocketAddr>,
    },
    /// The checkpoint that restored dataflows take their state from.
    Restore {
        checkpoint: u64,
    },
    /// The service's own description of items to come; one blob.
    Define,
    AddSource {
        id: RelationId,
        rejected: RelationId,
        restored: bool,
    },
    /// A schema per input.
    Install(Box<WireInstall>),
    /// Rows of history, for one worker.
    History {
        worker: usize,
        dataflow: RelationId,
        input: RelationId,
        tick: Tick,
    },
    HistoryUpto {
        dataflow: RelationId,
        tick: Tick,
    },
    HistoryDone {
        dataflow: RelationId,
        input: RelationId,
        attach: Tick,
    },
    Attach {
        dataflow: RelationId,
        at: Tick,
        fresh: Vec<RelationId>,
        restored: bool,
    },
    Seed(WireTick),
    /// For one worker; what all workers are told of a tick comes with the first of them. A delta per
    /// row entry, then per rejected entry.
    Tick {
        worker: usize,
        info: Option<WireTick>,
        rows: Vec<RelationId>,
        rejected: Vec<RelationId>,
    },
    Replace {
        old: RelationId,
        new: RelationId,
        at: Tick,
    },
    Drop(Vec<RelationId>),
    /// This checkpoint counts: later ones may build on its objects.
    Durable {
        checkpoint: u64,
        tick: Tick,
    },
    /// Nobody follows this mark any more.
    Unfollow {
        mark: u64,
    },
    Stop,
    /// Breaks the silence.
    Beat,
}

/// A dataflow to build. The plan itself does not travel: the worker process makes it from the same
/// definitions, and the fingerprint tells whether it is the same.
#[derive(Debug, Serialize, Deserialize)]
pub struct WireInstall {
    pub id: RelationId,
    pub name: String,
    pub restored: bool,
    pub inputs: Vec<WireInput>,
    pub body: WireBody,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct WireInput {
    pub relation: RelationId,
    pub sources: Vec<RelationId>,
    pub append_only: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum WireBody {
    View {
        relation: RelationId,
        hidden: bool,
        fingerprint: u64,
        errors: RelationId,
        late: RelationId,
    },
    Sink {
        from: RelationId,
        skip_below: Tick,
    },
}

/// A [`TickInfo`].
#[derive(Debug, Serialize, Deserialize)]
pub struct WireTick {
    pub tick: Tick,
    pub watermarks: BTreeMap<RelationId, Watermark>,
    pub checkpoint: Option<u64>,
    pub unlevel: Vec<RelationId>,
    pub reads: Vec<WireMark>,
    pub epochs: Vec<RelationId>,
    pub held: BTreeMap<RelationId, Hold>,
}

/// A mark of a read, and what answers to it are called.
#[derive(Debug, Serialize, Deserialize)]
pub struct WireMark {
    pub mark: u64,
    pub relations: Vec<RelationId>,
    pub follow: bool,
}

impl WireTick {
    /// All but the reads.
    pub fn of(info: &TickInfo) -> Self {
        Self {
            tick: info.tick,
            watermarks: info.watermarks.clone(),
            checkpoint: info.marks.checkpoint,
            unlevel: info.marks.unlevel.clone(),
            reads: Vec::new(),
            epochs: info.marks.epochs.clone(),
            held: (*info.held).clone(),
        }
    }
}

/// From a worker process to the server.
#[derive(Debug, Serialize, Deserialize)]
pub enum Up {
    /// Where this process waits for the calls of others.
    Hello {
        gate: SocketAddr,
    },
    Report(Box<Report>),
    /// Contents of a relation on one worker; a delta per batch.
    Answer {
        mark: u64,
        tick: Tick,
        relation: RelationId,
    },
    /// No more answers to this mark.
    Answered {
        mark: u64,
    },
    /// What a follower hears; `Changes` with a delta each.
    Event {
        mark: u64,
        worker: usize,
        event: WireEvent,
    },
    /// Nothing follows; `overrun` if the follower was too slow.
    Unfollowed {
        mark: u64,
        overrun: bool,
    },
    /// What the workers of this process have written for a checkpoint.
    Part {
        checkpoint: u64,
        part: std::result::Result<WirePart, WireError>,
    },
    /// Files that a writer has closed.
    Closed {
        sink: RelationId,
        upper: Tick,
        epoch: bool,
        checkpoint: Option<u64>,
        committables: Vec<Committable>,
    },
    /// A writer has lost rows of this tick.
    Broken {
        sink: RelationId,
        tick: Tick,
        error: WireError,
    },
    /// This process cannot go on.
    Failed(WireError),
    /// The end, as it was asked for.
    Bye,
    Beat,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub enum WireEvent {
    Changes(Tick),
    Upto(Tick),
    Closed,
}

/// Objects and entries of a manifest.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct WirePart {
    pub stages: Vec<StageEntry>,
    pub objects: Vec<ObjectEntry>,
    /// Written for this checkpoint.
    pub bytes: u64,
    /// By relation, stage and worker of the data plane.
    pub usage: Vec<(RelationId, StageId, usize, Usage)>,
}

/// What has changed in a worker process since the last report.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Report {
    pub flows: Vec<FlowReport>,
    /// How many more bytes wait in the writers of sinks.
    pub queued_bytes: i64,
    /// Memory of the process.
    pub resident_bytes: u64,
}

/// Of one dataflow. Counters are what came since the last report.
#[derive(Debug, Serialize, Deserialize)]
pub struct FlowReport {
    pub id: RelationId,
    /// Worker, port, tick below which everything is applied.
    pub progress: Vec<(usize, usize, Tick)>,
    pub counters: [u64; 7],
    pub last_rows: Tick,
    /// Worker, stage, operator, size.
    pub state: Vec<(usize, u32, String, StateSize)>,
    pub sink: Option<SinkReport>,
}

/// Of the writers of one sink.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SinkReport {
    pub rows: u64,
    pub bytes: u64,
    pub fresh: bool,
    pub trouble: Option<String>,
    pub failed: bool,
}

/// An [`Error`] on its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireError {
    kind: ErrorKind,
    code: String,
    message: String,
    detail: Option<String>,
    hint: Option<String>,
}

impl From<Error> for WireError {
    fn from(e: Error) -> Self {
        Self {
            kind: e.kind,
            code: e.code.to_string(),
            message: e.message,
            detail: e.detail,
            hint: e.hint,
        }
    }
}

impl From<WireError> for Error {
    fn from(e: WireError) -> Self {
        Self {
            detail: e.detail,
            hint: e.hint,
            ..Self::new(e.kind, e.message).code_of(&e.code)
        }
    }
}

/// A schema as a blob.
pub fn schema_to_bytes(schema: &Schema) -> Vec<u8> {
    let mut out = Vec::new();
    StreamWriter::try_new(&mut out, schema)
        .and_then(|mut writer| writer.finish())
        .expect("writing into memory");
    out
}

pub fn schema_from_bytes(bytes: &[u8]) -> Result<SchemaRef> {
    let reader = StreamReader::try_new(bytes, None)
        .map_err(|e| Error::internal(format!("a schema did not arrive whole: {e}")))?;
    Ok(Arc::clone(&reader.schema()))
}
