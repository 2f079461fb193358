//! A relation's end on one worker: its contents, if it is served, and its tap.
//!
//! # A new plan in the place of the old one
//!
//! When a view is replaced, both plans end here, each with contents of its own. From tick R on the new
//! one is the relation ([`succeed`]): the old one applies nothing from R on; once it has applied all
//! below R and the new one has applied R, the difference of their contents goes out at R, to the old
//! one's subscribers and followers, and the new one's changes follow.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, LazyLock};

use arrow::array::{BinaryArray, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};

use crate::checkpoint::RestoredStage;
use crate::delta::Delta;
use crate::follow::{Event, Follower};
use crate::kernel::contents::{Contents, FrozenContents, difference};
use crate::key::Share;
use crate::plan::RelationId;
use crate::source::Rejected;
use crate::state::{Part, Stateful};
use crate::tap::Tap;
use crate::tick::TickInfo;
use crate::time::Tick;
use crate::worker::command::StateSize;

/// See the module.
#[derive(Debug)]
pub struct Served {
    contents: Option<Contents>,
    pub tap: Tap,
    /// Everything below was applied.
    pub next: Tick,
    worker: usize,
    followers: Vec<Follower>,
    /// Reads at earlier ticks are none of ours.
    from: Tick,
    /// Ticks from here on are the successor's.
    until: Tick,
    successor: Option<SharedServed>,
    taking_over: Option<TakingOver>,
}

/// What a new plan has gathered until it can stand in the place of the old one.
#[derive(Debug)]
struct TakingOver {
    at: Tick,
    /// Contents before `at`.
    old: Option<FrozenContents>,
    /// Contents after `at`.
    new: Option<FrozenContents>,
    /// Changes after `at`, not handed on yet.
    later: Vec<(Tick, Vec<Delta>)>,
}

/// From tick `at` on, which is minted next, `new` is what `old` was.
pub fn succeed(old: &SharedServed, new: &SharedServed, at: Tick) {
    {
        let mut new = new.borrow_mut();
        new.from = at;
        new.taking_over = Some(TakingOver {
            at,
            old: None,
            new: None,
            later: Vec::new(),
        });
    }
    let mut old = old.borrow_mut();
    old.until = at;
    old.successor = Some(Rc::clone(new));
    old.hand_over();
}

pub type SharedServed = Rc<RefCell<Served>>;

impl Served {
    /// A relation without contents of its own (a source).
    pub fn outlet() -> Self {
        Self::with(None, 0)
    }
    fn with(contents: Option<Contents>, worker: usize) -> Self {
        Self {
            contents,
            tap: Tap::default(),
            next: 0,
            worker,
            followers: Vec::new(),
            from: 0,
            until: Tick::MAX,
            successor: None,
            taking_over: None,
        }
    }
    /// A served relation. Unless it is append-only its rows must arrive by hash of the whole row.
    pub fn new(schema: &Schema, append_only: bool, share: Share) -> Self {
        let contents = Contents::new(schema, append_only, share)
            .expect("the plan's types can be kept as rows");
        Self::with(Some(contents), share.worker)
    }
    /// Of a plan that is to replace another one: nothing of it is shown before that.
    pub fn hide(&mut self) {
        self.from = Tick::MAX;
    }
    pub fn has_contents(&self) -> bool {
        self.contents.is_some()
    }
    /// Applies the changes of a tick and hands them on.
    pub fn apply(&mut self, tick: Tick, deltas: Vec<Delta>) {
        if tick >= self.until {
            return;
        }
        if let Some(contents) = &mut self.contents {
            contents
                .apply(&deltas)
                .expect("rows have the relation's types");
        }
        match &mut self.taking_over {
            // Part of the contents after `at`.
            Some(taking) if tick <= taking.at => {}
            Some(taking) => taking.later.push((tick, deltas)),
            None => self.hand_on(tick, &deltas),
        }
    }
    fn hand_on(&mut self, tick: Tick, deltas: &[Delta]) {
        for delta in deltas {
            self.tap.publish(tick, delta);
        }
        if !deltas.is_empty() {
            self.tell(|| Event::Changes(tick, deltas.to_vec()));
        }
    }
    /// Gives the successor what it needs, once everything below its first tick was applied.
    fn hand_over(&mut self) {
        if self.next < self.until {
            return;
        }
        if let (Some(successor), Some(contents)) = (self.successor.take(), &self.contents) {
            let tap = std::mem::take(&mut self.tap);
            let followers = std::mem::take(&mut self.followers);
            let mut successor = successor.borrow_mut();
            successor.take_over(contents.freeze_rows(), tap, followers);
        }
    }
    fn take_over(&mut self, old: FrozenContents, tap: Tap, followers: Vec<Follower>) {
        self.tap.adopt(tap);
        self.followers.extend(followers);
        if let Some(taking) = &mut self.taking_over {
            taking.old = Some(old);
        }
        self.take_place();
    }
    /// Shows the difference and what came after it, once both contents are there.
    fn take_place(&mut self) {
        let taking = self
            .taking_over
            .take_if(|t| t.old.is_some() && t.new.is_some());
        let Some(TakingOver {
            at,
            old: Some(old),
            new: Some(new),
            later,
        }) = taking
        else {
            return;
        };
        let changes = difference(&old, &new).expect("these rows were encoded from columns");
        if !changes.is_empty() {
            self.tap.publish_difference(at, &changes);
            self.tell(|| Event::Changes(at, changes.clone()));
        }
        for (tick, deltas) in later {
            self.hand_on(tick, &deltas);
        }
        self.hand_on_completion();
    }
    fn hand_on_completion(&mut self) {
        let next = self.next;
        self.tap.complete(next);
        self.tell(|| Event::Upto(next));
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
        if info.tick < self.from || info.tick >= self.until {
            return;
        }
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
        self.next = self.next.max(next).min(self.until);
        if let (Some(taking), Some(contents)) = (&mut self.taking_over, &self.contents)
            && taking.new.is_none()
            && next > taking.at
        {
            taking.new = Some(contents.freeze_rows());
        }
        self.serve_waiting();
        if self.taking_over.is_some() {
            self.take_place();
            return;
        }
        self.hand_on_completion();
        self.hand_over();
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
    /// What is held.
    pub fn size(&self) -> StateSize {
        let contents = self.contents.as_ref();
        contents.map(StateSize::of).unwrap_or_default()
    }
    /// Puts out what was not used lately, if more is in memory than wanted.
    pub fn relieve(&mut self) {
        if let Some(contents) = &mut self.contents {
            contents.relieve();
        }
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
