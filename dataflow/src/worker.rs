//! A worker: commands in, timely steps, changes and contents out.
//!
//! # Contract
//!
//! * All workers receive the same commands in the same order relative to ticks, so "attach at tick A"
//!   means the same everywhere and all build the same dataflows in the same order.
//! * A worker with nothing to do is parked; whoever sends a command unparks it.

pub mod command;
pub mod start;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};

use timely::worker::Worker as TimelyWorker;

use crate::checkpoint::{PartSender, StageId};
use crate::delta::Delta;
use crate::key::Share;
use crate::plan::RelationId;
use crate::render::{self, Installed};
use crate::served::{Served, SharedServed, succeed};
use crate::tap::{Item, SharedQueue};
use crate::tick::{SharedTickLog, TickInfo, TickLog};
use crate::time::Tick;
use command::{AddSource, Attach, Body, Command, Install};

/// Under which a source's rejected records stand in a checkpoint.
const REJECTED: StageId = StageId(0);

/// Commands handled before the dataflows get a turn.
const COMMANDS_PER_ROUND: usize = 16;

struct Worker<'a> {
    timely: &'a mut TimelyWorker,
    ticks: SharedTickLog,
    parts: PartSender,
    /// Every relation that can be read or subscribed to on this worker.
    served: BTreeMap<RelationId, SharedServed>,
    /// Of each source, its rejected relation.
    rejected: BTreeMap<RelationId, RelationId>,
    dataflows: BTreeMap<RelationId, Installed>,
}

/// Runs until `Stop` or until the other end is gone.
pub fn run(timely: &mut TimelyWorker, commands: &Receiver<Command>, parts: PartSender) {
    let mut worker = Worker {
        timely,
        ticks: Rc::new(RefCell::new(TickLog::default())),
        parts,
        served: BTreeMap::new(),
        rejected: BTreeMap::new(),
        dataflows: BTreeMap::new(),
    };
    worker
        .served
        .insert(render::CLOCK, Rc::new(RefCell::new(Served::outlet())));
    let mut pruned: Tick = 0;
    'rounds: loop {
        let mut idle = true;
        for _ in 0..COMMANDS_PER_ROUND {
            match commands.try_recv() {
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => break 'rounds,
                Ok(command) => {
                    idle = false;
                    worker.handle(command);
                }
                Err(TryRecvError::Empty) => break,
            }
        }
        if idle {
            // An unpark between the check above and here makes this return at once.
            worker.timely.step_or_park(None);
        } else {
            worker.timely.step();
        }
        let done = worker.completed();
        if done > pruned {
            worker.ticks.borrow_mut().prune(done);
            pruned = done;
        }
    }
    for installed in worker.dataflows.values() {
        installed.close();
    }
    worker.timely.step();
}

impl Worker<'_> {
    /// All dataflows of this worker have applied everything below this tick.
    fn completed(&self) -> Tick {
        let index = self.timely.index();
        self.dataflows
            .values()
            .filter(|d| d.attach.get() != Tick::MAX)
            .map(|d| d.progress.of_worker(index))
            .min()
            .unwrap_or_else(|| self.ticks.borrow().before(Tick::MAX).map_or(0, |i| i.tick))
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Define(_) => {}
            Command::AddSource(add) => self.add_source(&add),
            Command::Install(install) => self.install(&install),
            Command::Attach(attach) => self.attach(&attach),
            Command::History {
                dataflow,
                input,
                tick,
                delta,
            } => {
                self.feed(dataflow, input, Item::Data(tick, delta));
            }
            Command::HistoryUpto { dataflow, tick } => {
                if let Some(installed) = self.dataflows.get(&dataflow) {
                    for queue in installed.queues.values() {
                        push_history(queue, Item::Upto(tick));
                    }
                }
            }
            Command::HistoryDone {
                dataflow,
                input,
                attach,
            } => {
                self.feed(dataflow, input, Item::Attached(attach));
            }
            Command::Seed(info) => self.ticks.borrow_mut().push(info),
            Command::Tick {
                info,
                rows,
                rejected,
            } => self.tick(&info, rows, rejected),
            Command::Replace { old, new, at } => self.replace(old, new, at),
            Command::Drop(ids) => self.drop_relations(&ids),
            Command::Stop => {}
        }
    }

    fn feed(&self, dataflow: RelationId, input: RelationId, item: Item) {
        if let Some(queue) = self
            .dataflows
            .get(&dataflow)
            .and_then(|d| d.queues.get(&input))
        {
            push_history(queue, item);
        }
    }

    fn add_source(&mut self, add: &AddSource) {
        self.served
            .insert(add.id, Rc::new(RefCell::new(Served::outlet())));
        let share = Share {
            worker: self.timely.index(),
            workers: self.timely.peers(),
        };
        let mut rejected = Served::new(&crate::served::rejected_schema(), true, share);
        if let Some(restored) = &add.restored {
            rejected.restore(restored.stage(REJECTED));
        }
        self.served
            .insert(add.rejected, Rc::new(RefCell::new(rejected)));
        self.rejected.insert(add.id, add.rejected);
    }

    fn install(&mut self, install: &Arc<Install>) {
        let attach = Rc::new(Cell::new(Tick::MAX));
        let installed = render::install(
            self.timely,
            install,
            Rc::clone(&self.ticks),
            Rc::clone(&attach),
            self.parts.clone(),
        );
        if !matches!(install.body, Body::View { hidden: true, .. }) {
            for (relation, served) in &installed.served {
                self.served.insert(*relation, Rc::clone(served));
            }
        }
        self.dataflows.insert(install.id, installed);
    }

    fn replace(&mut self, old: RelationId, new: RelationId, at: Tick) {
        let (Some(old), Some(new)) = (self.dataflows.get(&old), self.dataflows.get(&new)) else {
            return;
        };
        // Both have the same relations in the same order.
        for ((_, old), (relation, new)) in old.served.iter().zip(&new.served) {
            succeed(old, new, at);
            self.served.insert(*relation, Rc::clone(new));
        }
    }

    fn attach(&mut self, attach: &Attach) {
        let Some(installed) = self.dataflows.get(&attach.dataflow) else {
            return;
        };
        installed.attach.set(attach.at);
        for (input, queue) in &installed.queues {
            let Some(served) = self.served.get(input) else {
                continue;
            };
            let mut served = served.borrow_mut();
            if attach.restored || !served.has_contents() {
                served.tap.subscribe(attach.at, Rc::clone(queue));
                if attach.restored || attach.fresh.contains(input) || *input == render::CLOCK {
                    push_history(queue, Item::Attached(attach.at));
                }
            } else {
                served
                    .tap
                    .subscribe_with_contents(attach.at, Rc::clone(queue));
                served.serve_waiting();
            }
        }
    }

    fn tick(
        &mut self,
        info: &Arc<TickInfo>,
        rows: Vec<(RelationId, Delta)>,
        rejected: Vec<(RelationId, Delta)>,
    ) {
        let tick = info.tick;
        self.ticks.borrow_mut().push(Arc::clone(info));
        for (source, delta) in rows {
            if let Some(served) = self.served.get(&source) {
                served.borrow_mut().tap.publish(tick, &delta);
            }
        }
        for (source, delta) in rejected {
            if let Some(served) = self.rejected.get(&source).and_then(|r| self.served.get(r)) {
                served.borrow_mut().apply(tick, vec![delta]);
            }
        }
        if let Some(clock) = self.served.get(&render::CLOCK) {
            clock.borrow_mut().complete(tick + 1);
        }
        for (source, rejected) in &self.rejected {
            if let Some(served) = self.served.get(source) {
                served.borrow_mut().complete(tick + 1);
            }
            if let Some(served) = self.served.get(rejected) {
                let mut served = served.borrow_mut();
                served.answer(*rejected, info);
                if let Some(checkpoint) = info.marks.checkpoint {
                    let parts = served.freeze_parts();
                    let index = self.timely.index();
                    self.parts.send(checkpoint, *source, REJECTED, index, parts);
                }
                served.complete(tick + 1);
            }
        }
        if let Some(checkpoint) = info.marks.checkpoint {
            let level =
                |d: &Installed, id| d.attach.get() <= tick && !info.marks.unlevel.contains(id);
            let flows = self.dataflows.iter().filter(|(id, d)| level(d, id));
            let stages = flows
                .map(|(id, d)| (*id, d.stateful))
                .chain(self.rejected.keys().map(|source| (*source, 1)))
                .collect();
            self.parts.expect(checkpoint, self.timely.index(), stages);
        }
    }

    fn drop_relations(&mut self, ids: &Arc<[RelationId]>) {
        self.parts.dropped(ids);
        for id in ids.iter() {
            if let Some(installed) = self.dataflows.remove(id) {
                installed.close();
                for (relation, served) in &installed.served {
                    served.borrow_mut().close();
                    // It may be that of a plan that has taken the place of this one.
                    let shown = self.served.get(relation);
                    if shown.is_some_and(|shown| Rc::ptr_eq(shown, served)) {
                        self.served.remove(relation);
                    }
                }
            }
            if let Some(rejected) = self.rejected.remove(id) {
                for relation in [*id, rejected] {
                    if let Some(served) = self.served.remove(&relation) {
                        served.borrow_mut().close();
                    }
                }
            }
        }
    }
}

fn push_history(queue: &SharedQueue, item: Item) {
    let mut queue = queue.borrow_mut();
    queue.history.push_back(item);
    queue.wake();
}
