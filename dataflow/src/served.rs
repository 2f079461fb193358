//! A relation's end on one worker: its contents, if it is served, and its tap.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, LazyLock};

use arrow::array::{BinaryArray, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};

use crate::checkpoint::RestoredStage;
use crate::delta::Delta;
use crate::follow::{Event, Follower};
use crate::kernel::contents::Contents;
use crate::key::Share;
use crate::plan::RelationId;
use crate::source::Rejected;
use crate::state::{Part, Stateful};
use crate::tap::Tap;
use crate::tick::TickInfo;
use crate::time::Tick;

/// See the module.
#[derive(Debug)]
pub struct Served {
    contents: Option<Contents>,
    pub tap: Tap,
    /// Everything below was applied.
    pub next: Tick,
    worker: usize,
    followers: Vec<Follower>,
}

pub type SharedServed = Rc<RefCell<Served>>;

impl Served {
    /// A relation without contents of its own (a source).
    pub fn outlet() -> Self {
        Self {
            contents: None,
            tap: Tap::default(),
            next: 0,
            worker: 0,
            followers: Vec::new(),
        }
    }
    /// A served relation. Unless it is append-only its rows must arrive by hash of the whole row.
    pub fn new(schema: &Schema, append_only: bool, share: Share) -> Self {
        let contents = Contents::new(schema, append_only, share)
            .expect("the plan's types can be kept as rows");
        Self {
            contents: Some(contents),
            tap: Tap::default(),
            next: 0,
            worker: share.worker,
            followers: Vec::new(),
        }
    }
    pub fn has_contents(&self) -> bool {
        self.contents.is_some()
    }
    /// Applies the changes of a tick and hands them on.
    pub fn apply(&mut self, tick: Tick, deltas: Vec<Delta>) {
        for delta in &deltas {
            self.tap.publish(tick, delta);
        }
        if let Some(contents) = &mut self.contents {
            contents
                .apply(&deltas)
                .expect("rows have the relation's types");
        }
        if !deltas.is_empty() {
            self.tell(|| Event::Changes(tick, deltas.clone()));
        }
    }
    /// The relation is dropped.
    pub fn close(&mut self) {
        self.tap.close();
        self.tell(|| Event::Closed);
    }
    fn tell(&mut self, event: impl Fn() -> Event) {
        let worker = self.worker;
        self.followers.retain(|f| f.send(worker, event()));
    }
    /// Gives frozen contents to the reads that ask for this relation at this tick.
    pub fn answer(&mut self, relation: RelationId, info: &TickInfo) {
        for read in info
            .marks
            .reads
            .iter()
            .filter(|r| r.relations.contains(&relation))
        {
            if let Some(contents) = &self.contents {
                // The reader may be gone; then nobody wants the answer.
                let _ = read
                    .answer
                    .send((info.tick, relation, contents.freeze_rows()));
            }
            self.followers.extend(read.follow.clone());
        }
    }
    /// Everything below `next` was applied.
    pub fn complete(&mut self, next: Tick) {
        self.next = self.next.max(next);
        self.serve_waiting();
        self.tap.complete(self.next);
        let next = self.next;
        self.tell(|| Event::Upto(next));
    }
    /// Gives contents to subscribers whose tick has come.
    pub fn serve_waiting(&mut self) {
        if self.tap.has_waiting()
            && let Some(contents) = &self.contents
        {
            self.tap.serve_waiting(self.next, || contents.freeze_rows());
        }
    }
    pub fn freeze_parts(&mut self) -> Vec<Part> {
        self.contents
            .as_mut()
            .map(Stateful::freeze)
            .unwrap_or_default()
    }
    /// Puts back this worker's share of what a checkpoint holds.
    pub fn restore(&mut self, stage: Option<&RestoredStage>) {
        if let (Some(contents), Some(stage)) = (&mut self.contents, stage) {
            contents
                .restore(&stage.parts)
                .expect("checksums of the checkpoint were verified");
        }
    }
    /// Rows and bytes held.
    pub fn size(&self) -> (u64, u64) {
        self.contents
            .as_ref()
            .map_or((0, 0), |c| (c.rows(), c.bytes()))
    }
}

/// Columns of `<source>$rejected`.
pub fn rejected_schema() -> SchemaRef {
    static SCHEMA: LazyLock<SchemaRef> = LazyLock::new(|| {
        Arc::new(Schema::new(vec![
            Field::new("partition", DataType::Utf8, true),
            Field::new("offset", DataType::Int64, true),
            Field::new("bytes", DataType::Binary, true),
            Field::new("reason", DataType::Utf8, true),
        ]))
    });
    Arc::clone(&SCHEMA)
}

/// Rejected records as rows of `<source>$rejected`; `None` when there are none.
pub fn rejected_rows(rejected: &[Rejected]) -> Option<Delta> {
    if rejected.is_empty() {
        return None;
    }
    let split = StringArray::from_iter_values(rejected.iter().map(|r| r.split.as_str()));
    let offset = Int64Array::from_iter_values(
        rejected
            .iter()
            .map(|r| i64::try_from(r.offset).unwrap_or(i64::MAX)),
    );
    let bytes = BinaryArray::from_iter_values(rejected.iter().map(|r| r.bytes.as_slice()));
    let reason = StringArray::from_iter_values(rejected.iter().map(|r| r.reason.as_str()));
    let batch = RecordBatch::try_new(
        rejected_schema(),
        vec![
            Arc::new(split),
            Arc::new(offset),
            Arc::new(bytes),
            Arc::new(reason),
        ],
    )
    .expect("columns of one length");
    Some(Delta::inserts(batch))
}
