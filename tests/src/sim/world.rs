//! The world around the processes, and the witness who judges.

use std::collections::{BTreeMap, HashMap};

use millrace_dataflow::plan::RelationId;
use millrace_dataflow::remap::log::{
    Effect as DiskEffect, Event as LogEvent, Known, Log, Misfit, Rules, fits_destination,
    goes_on_at, repeats, replay,
};
use millrace_dataflow::remap::record::{Record, encode};
use millrace_dataflow::remap::{Binding, SourceBinding};
use millrace_dataflow::source::Digest;
use millrace_dataflow::time::{NO_WATERMARK, Tick};
use millrace_lake::commit::{Core, Effect, Event, Failure, Outcome, Token};

use super::disk::{Disk, Mood};
use super::process::{
    Checkpoint, Closed, History, Offsets, Pending, Phase, Process, SPLITS, Taking,
};
use super::table::{Row, Table};
use crate::rng::Rng;

const SOURCE: RelationId = RelationId(7);
/// Ticks in all lives of a schedule, about; then the source has no more.
const RECORDS: u64 = 60;

/// What may go wrong.
#[derive(Clone, Copy)]
pub(super) struct Faults {
    /// The disk says that it has synced and has not.
    pub(super) lies: bool,
    /// Bits of the log flip.
    pub(super) rot: bool,
    /// The source holds other records than before.
    pub(super) rewrite: bool,
}

impl Faults {
    /// All that a correct system survives.
    pub(super) const ALL: Self = Self {
        lies: false,
        rot: false,
        rewrite: false,
    };
}

/// What is believed to be right.
#[derive(Clone, Copy)]
pub(super) struct Model {
    pub(super) rules: Rules,
    pub(super) reads_wait: bool,
    pub(super) commits_wait: bool,
    pub(super) checkpoints_wait: bool,
    pub(super) latest_is_fenced: bool,
}

impl Model {
    pub(super) const ALL: Self = Self {
        rules: Rules::ALL,
        reads_wait: true,
        commits_wait: true,
        checkpoints_wait: true,
        latest_is_fenced: true,
    };
}

#[derive(Clone)]
enum Message {
    Load {
        process: u64,
        attempt: u64,
        fence: bool,
    },
    Commit {
        process: u64,
        attempt: u64,
        base: String,
        token: Token,
        files: Vec<Vec<Row>>,
        history: History,
    },
    Answer {
        process: u64,
        event: Event,
    },
}

pub(super) struct World {
    rng: Rng,
    faults: Faults,
    model: Model,
    step: usize,
    clock: u64,
    calm: bool,

    disk: Disk,
    table: Table,
    network: Vec<Message>,
    /// Records there are, and from which offset on they are other ones than before.
    source: Offsets,
    rewritten: [Option<u64>; SPLITS],

    incarnation: u64,
    latest: Option<u64>,
    /// All that were the latest, in order.
    moved: Vec<u64>,
    store: BTreeMap<u64, Checkpoint>,
    processes: HashMap<u64, Process>,

    /// Offsets that readers were shown.
    shown: BTreeMap<Tick, Offsets>,
    /// Contents of the records that were told durable.
    told: BTreeMap<(usize, u64), u8>,
    rotten: bool,
    /// A start was refused for a reason that excuses it.
    refused: bool,
    pub(super) violation: Option<String>,
    pub(super) counts: BTreeMap<&'static str, u64>,
}

impl World {
    pub(super) fn new(rng: Rng, faults: Faults, model: Model) -> Self {
        let mut world = Self {
            rng,
            faults,
            model,
            step: 0,
            clock: 4_000_000,
            calm: false,
            disk: Disk::default(),
            table: Table::default(),
            network: vec![],
            source: [0; SPLITS],
            rewritten: [None; SPLITS],
            incarnation: 0,
            latest: None,
            moved: vec![],
            store: BTreeMap::new(),
            processes: HashMap::new(),
            shown: BTreeMap::new(),
            told: BTreeMap::new(),
            rotten: false,
            refused: false,
            violation: None,
            counts: BTreeMap::new(),
        };
        world.start();
        world
    }

    pub(super) fn ended(&self) -> bool {
        self.violation.is_some() || self.refused
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn violate(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    // ---- the source ----

    fn row(&self, split: usize, offset: u64) -> Row {
        let other = self.rewritten[split].is_some_and(|from| offset >= from);
        (split, offset, u8::from(other))
    }

    fn rows_between(&self, from: Offsets, to: Offsets) -> Vec<Row> {
        let of = |split: usize| (from[split]..to[split]).map(move |offset| (split, offset));
        let places = (0..SPLITS).flat_map(of);
        places.map(|(s, o)| self.row(s, o)).collect()
    }

    /// What the source says of the records between two offsets.
    fn binding(&self, from: Offsets, to: Offsets) -> SourceBinding {
        let mut binding = SourceBinding {
            watermark: NO_WATERMARK,
            digest: Some(0),
            ..SourceBinding::default()
        };
        for split in 0..SPLITS {
            if to[split] == from[split] {
                continue;
            }
            let mut digest = Digest::default();
            for offset in from[split]..to[split] {
                digest.add(offset, &[self.row(split, offset).2]);
                binding.rows += 1;
            }
            let name = split.to_string();
            let sum = digest.take(&name);
            binding.digest = binding.digest.map(|d| d.wrapping_add(sum));
            binding.splits.insert(name, (to[split], NO_WATERMARK));
        }
        binding
    }

    // ---- starting ----

    fn start(&mut self) {
        self.incarnation += 1;
        let incarnation = self.incarnation;
        self.count("starts");
        let candidates: Vec<u64> = self
            .store
            .iter()
            .filter(|(id, c)| c.whole && Some(**id) <= self.latest)
            .map(|(id, _)| *id)
            .rev()
            .take(2)
            .collect();
        let good = |id: &&u64| !self.store[*id].damaged;
        let chosen = candidates.iter().find(good).copied();
        if chosen.is_none() && self.latest.is_some() {
            let there: Vec<_> = self
                .store
                .iter()
                .map(|(id, c)| (*id, c.whole, c.damaged))
                .collect();
            self.violate(format!(
                "no checkpoint can be used: {:?} of {there:?}",
                self.latest
            ));
            return;
        }
        if chosen != candidates.first().copied() {
            self.count("starts from the checkpoint before");
        }
        let checkpoint = chosen.map(|id| self.store[&id].clone());
        let base = checkpoint.as_ref().map(|c| c.tick);
        let tick = base.unwrap_or(0);
        let (log, effects) = Log::begin(incarnation, tick, self.model.rules);
        let kept = candidates.iter().filter(|id| !self.store[id].damaged);
        let kept = kept.map(|id| (*id, self.store[id].tick)).collect();
        let process = Process {
            incarnation,
            phase: Phase::Opening,
            asleep_until: 0,
            log,
            effects: effects.into(),
            durable: tick,
            replay: Default::default(),
            bound: tick,
            base,
            last: tick,
            offsets: checkpoint.as_ref().map_or([0; SPLITS], |c| c.offsets),
            history: checkpoint
                .as_ref()
                .map_or_else(History::new, |c| c.history.clone()),
            read: BTreeMap::new(),
            core: Core::new("7", incarnation),
            attempt: 0,
            timer: None,
            committing: None,
            handed_back: false,
            skip_below: 0,
            committed: checkpoint.as_ref().map_or(0, |c| c.committed),
            landed: checkpoint.as_ref().map_or(0, |c| c.landed),
            pending: checkpoint
                .as_ref()
                .map_or_else(Vec::new, |c| c.pending.clone()),
            open: vec![],
            closed: Default::default(),
            waiting: None,
            confirmed: checkpoint.is_some(),
            taking: None,
            next_checkpoint: incarnation << 32,
            latest: self.latest,
            kept,
        };
        self.processes.insert(incarnation, process);
    }

    /// A start that is refused is right only if something happened that cannot be mended.
    fn refuse(&mut self, id: u64, why: &str) {
        self.processes.remove(&id);
        let excused = self.rotten || self.disk.broke_its_word || self.rewritten != [None; SPLITS];
        if excused {
            self.count("starts refused, and rightly so");
            self.refused = true;
        } else {
            self.violate(format!("incarnation {id} cannot start: {why}"));
        }
    }

    fn read_log(&mut self, id: u64) -> Option<LogEvent> {
        let process = &self.processes[&id];
        let tick = process.base.unwrap_or(0);
        if process.base.is_none() {
            self.disk.clear(id);
        }
        let found = match replay(self.disk.read(id), tick, self.model.rules) {
            Ok(found) => found,
            Err((_, damage)) => {
                self.refuse(id, &format!("{damage:?}"));
                return None;
            }
        };
        let bound = found.last().map_or(tick, |b| b.tick);
        let process = self.processes.get_mut(&id)?;
        process.bound = bound;
        process.replay = found.into();
        Some(LogEvent::Found(bound))
    }

    /// The table is so far; replaying begins.
    fn recovered(&mut self, id: u64, frontier: Option<Tick>) {
        let rules = self.model.rules;
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        let known = process.confirmed.then_some(Known {
            committed: process.committed,
            landed: process.landed,
        });
        process.committed = match goes_on_at(frontier, known) {
            Ok(committed) => committed,
            Err(Misfit::NoState) => {
                self.refuse(id, "the table holds rows, and there is no checkpoint");
                return;
            }
            Err(Misfit::SetBack { .. }) => {
                self.refuse(id, "the table holds less than it did");
                return;
            }
        };
        process.landed = frontier.unwrap_or(0);
        process.skip_below = process.committed;
        if !fits_destination(process.committed, process.bound, rules) {
            self.refuse(id, "the table holds more than the log knows");
            return;
        }
        let committed = process.committed;
        process.pending.retain(|p| p.upper > committed);
        process.phase = Phase::Replaying;
    }

    fn replay_one(&mut self, id: u64) {
        let rules = self.model.rules;
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        let Some(binding) = process.replay.pop_front() else {
            process.phase = Phase::Live;
            if self.newest() == Some(id) {
                self.check_shown(id);
            }
            return;
        };
        let from = process.offsets;
        let source = binding.sources.get(&SOURCE).cloned().unwrap_or_default();
        let to = offsets_of(&source, from);
        if (0..SPLITS).any(|s| to[s] < from[s]) {
            self.refuse(id, "a binding goes back");
            return;
        }
        let again = self.binding(from, to);
        let bound = binding.sources.get(&SOURCE);
        if !bound.is_none_or(|bound| repeats(bound, &again, rules)) {
            self.refuse(id, "the source does not repeat itself");
            return;
        }
        self.count("ticks replayed");
        self.publish(id, &binding, to, false, None);
    }

    // ---- ticks ----

    fn mint(&mut self, id: u64, epoch: bool, checkpoint: bool) {
        let process = &self.processes[&id];
        let from = process.offsets;
        let tick = self.clock.max(process.last + 1);
        let mut to = from;
        for split in 0..SPLITS {
            let there = self.source[split].saturating_sub(from[split]);
            to[split] += self.rng.below(there.min(3) as usize + 1) as u64;
        }
        let mut binding = Binding {
            tick,
            incarnation: id,
            ..Binding::default()
        };
        if to != from {
            binding.sources.insert(SOURCE, self.binding(from, to));
        }
        let process = self.processes.get_mut(&id).expect("it lives");
        let number = checkpoint.then(|| {
            process.next_checkpoint += 1;
            process.next_checkpoint
        });
        self.publish(id, &binding, to, epoch, number);
        if self.newest() == Some(id) {
            self.check_shown(id);
        }
    }

    fn publish(&mut self, id: u64, binding: &Binding, to: Offsets, epoch: bool, mark: Option<u64>) {
        let tick = binding.tick;
        let from = self.processes[&id].offsets;
        let rows = self.rows_between(from, to);
        self.count("ticks");
        let process = self.processes.get_mut(&id).expect("it lives");
        let record = encode(&Record::Binding(binding.clone()));
        process.step_log(LogEvent::Append { tick, record });
        process.offsets = to;
        process.last = tick;
        process.history.insert(tick, to);
        let read = rows.iter().map(|(s, o, contents)| ((*s, *o), *contents));
        process.read.extend(read);
        if tick >= process.skip_below {
            process.open.extend(rows);
        }
        if let Some(checkpoint) = mark {
            process.taking = Some(Taking {
                id: checkpoint,
                tick,
                checkpoint: None,
                stage: 0,
            });
        }
        if epoch || mark.is_some() {
            let rows = std::mem::take(&mut process.open);
            process.closed.push_back(Closed {
                upper: tick + 1,
                rows,
                epoch,
                checkpoint: mark,
            });
        }
    }

    /// A reader asks for a tick that is complete.
    fn show(&mut self, id: u64) {
        let process = &self.processes[&id];
        let most = if self.model.reads_wait {
            process.durable
        } else {
            process.last
        };
        let ticks: Vec<Tick> = process.history.range(..=most).map(|(t, _)| *t).collect();
        let pick = self.rng.below(ticks.len().min(3));
        let Some(tick) = ticks.iter().rev().nth(pick).copied() else {
            return;
        };
        let offsets = process.as_of(tick);
        self.count("reads");
        let before = self.shown.insert(tick, offsets);
        if before.is_some_and(|before| before != offsets) && !self.disk.broke_its_word {
            self.violate(format!("a reader saw two answers at tick {tick}"));
        }
        if let Some(newest) = self.newest()
            && self.processes[&newest].is_whole()
        {
            self.check_shown(newest);
        }
    }

    fn newest(&self) -> Option<u64> {
        let newest = self.processes.keys().max().copied();
        newest.filter(|id| *id == self.incarnation)
    }

    fn check_shown(&mut self, id: u64) {
        if self.disk.broke_its_word {
            return;
        }
        let process = &self.processes[&id];
        let wrong = self
            .shown
            .range(..=process.last)
            .find(|(tick, offsets)| process.as_of(**tick) != **offsets);
        if let Some((tick, offsets)) = wrong {
            let now = process.as_of(*tick);
            self.violate(format!(
                "a reader saw {offsets:?} at tick {tick}, incarnation {id} has {now:?}"
            ));
        }
    }

    // ---- the sink ----

    /// The committer takes the next mark, or goes on with what it waits for.
    fn commit_task(&mut self, id: u64) {
        let waits = self.model.commits_wait;
        let process = self.processes.get_mut(&id).expect("it lives");
        if let Some(upper) = process.committing {
            if std::mem::take(&mut process.handed_back) {
                let lower = process.committed;
                self.step_core(id, Event::Commit { lower, upper });
            }
            return;
        }
        if let Some(upper) = process.waiting {
            if !waits || process.durable >= upper - 1 {
                process.waiting = None;
                process.committing = Some(upper);
                let lower = process.committed;
                self.step_core(id, Event::Commit { lower, upper });
            }
            return;
        }
        let Some(closed) = process.closed.pop_front() else {
            return;
        };
        let Closed {
            upper,
            rows,
            epoch,
            checkpoint,
        } = closed;
        if !rows.is_empty() {
            process.pending.push(Pending { upper, rows });
        }
        if let Some(taking) = &mut process.taking
            && checkpoint == Some(taking.id)
        {
            let history = process.history.range(..=taking.tick);
            let history: History = history.map(|(t, o)| (*t, *o)).collect();
            let offsets = history.values().next_back().copied();
            taking.checkpoint = Some(Checkpoint {
                tick: taking.tick,
                offsets: offsets.unwrap_or_default(),
                committed: process.committed,
                landed: process.landed,
                pending: process.pending.clone(),
                whole: false,
                damaged: false,
                history,
            });
        }
        if epoch && process.confirmed && upper > process.committed {
            process.waiting = Some(upper);
        }
    }

    fn step_core(&mut self, id: u64, event: Event) {
        if let Some(process) = self.processes.get_mut(&id) {
            let effects = process.core.step(event);
            for effect in effects {
                self.perform(id, effect);
            }
        }
    }

    fn perform(&mut self, id: u64, effect: Effect) {
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        match effect {
            Effect::Load { attempt, fence } => {
                process.attempt = attempt;
                self.network.push(Message::Load {
                    process: id,
                    attempt,
                    fence,
                });
            }
            Effect::BuildAndCommit {
                attempt,
                base,
                token,
            } => {
                process.attempt = attempt;
                let files = process.pending.iter().map(|p| p.rows.clone()).collect();
                let history = process.history.clone();
                self.network.push(Message::Commit {
                    process: id,
                    attempt,
                    base,
                    token,
                    files,
                    history,
                });
            }
            Effect::Sleep { attempt, .. } => process.timer = Some(attempt),
            Effect::Done { frontier } => match process.committing.take() {
                None => self.recovered(id, frontier),
                Some(upper) => {
                    process.pending.clear();
                    process.committed = upper;
                    process.landed = frontier.unwrap_or(0);
                    self.count("commits");
                }
            },
            Effect::Fail(Failure::Unavailable(_)) => {
                if process.committing.is_some() {
                    process.handed_back = true;
                } else {
                    self.processes.remove(&id);
                }
            }
            Effect::Fail(Failure::Fenced { .. }) => {
                self.processes.remove(&id);
            }
            Effect::Fail(other) => {
                self.processes.remove(&id);
                if self.disk.broke_its_word {
                    self.refused = true;
                } else {
                    self.violate(format!("rows of the table: incarnation {id}: {other:?}"));
                }
            }
        }
    }

    fn deliver(&mut self, message: Message) {
        match message {
            Message::Answer { process, event } => self.step_core(process, event),
            Message::Load {
                process,
                attempt,
                fence,
            } => {
                if fence {
                    self.table.put_up_fence(process);
                }
                let event = Event::Loaded {
                    attempt,
                    seen: self.table.observe(),
                };
                self.network.push(Message::Answer { process, event });
            }
            Message::Commit {
                process,
                attempt,
                base,
                token,
                files,
                history,
            } => {
                let outcome = if self.table.commit(&base, &token, &files) {
                    self.check_table(&token, &history);
                    Outcome::Committed
                } else {
                    Outcome::Conflict
                };
                let event = Event::Answer { attempt, outcome };
                self.network.push(Message::Answer { process, event });
            }
        }
    }

    /// The rows are those below the offsets that the frontier stands for.
    fn check_table(&mut self, token: &Token, history: &History) {
        let mut rows = self.table.rows();
        rows.sort_unstable();
        let below = history.range(..token.frontier).next_back();
        let upto = below.map_or([0; SPLITS], |(_, offsets)| *offsets);
        let of = |split: usize| (0..upto[split]).map(move |offset| (split, offset));
        let expected: Vec<(usize, u64)> = (0..SPLITS).flat_map(of).collect();
        let found: Vec<(usize, u64)> = rows.iter().map(|(s, o, _)| (*s, *o)).collect();
        if found != expected {
            self.violate(format!(
                "rows of the table at {} are {found:?} instead of those below {upto:?}",
                token.frontier
            ));
        }
        let other = rows
            .iter()
            .find(|(s, o, v)| self.told.get(&(*s, *o)).is_some_and(|told| told != v));
        if let Some(row) = other {
            self.violate(format!("rows of the table: {row:?} was something else"));
        }
    }

    // ---- checkpoints ----

    fn checkpoint_task(&mut self, id: u64) {
        let model = self.model;
        let process = self.processes.get_mut(&id).expect("it lives");
        let durable = process.durable;
        let Some(taking) = &mut process.taking else {
            return;
        };
        let number = taking.id;
        match (taking.stage, taking.checkpoint.clone()) {
            (0, Some(_)) if model.checkpoints_wait && durable < taking.tick => {}
            (0, Some(checkpoint)) => {
                self.store.insert(number, checkpoint);
                taking.stage = 1;
            }
            (1, _) => {
                if let Some(stored) = self.store.get_mut(&number) {
                    stored.whole = true;
                }
                taking.stage = 2;
            }
            (2, _) => {
                let fenced = model.latest_is_fenced && id != self.incarnation;
                if fenced || process.latest != self.latest {
                    // Somebody has taken over: the service ends.
                    self.processes.remove(&id);
                    return;
                }
                self.latest = Some(number);
                process.latest = Some(number);
                process.kept.insert(0, (number, taking.tick));
                process.kept.truncate(2);
                taking.stage = 3;
                self.moved.push(number);
                self.remember(id);
                self.count("checkpoints");
            }
            (3, _) => {
                let kept: Vec<u64> = process.kept.iter().map(|k| k.0).collect();
                self.store.retain(|id, _| *id > number || kept.contains(id));
                process.taking = None;
                process.confirmed = true;
                let oldest = process.kept.iter().map(|k| k.1).min().unwrap_or(0);
                let first = process.last + 1;
                process.step_log(LogEvent::Roll { first, oldest });
            }
            _ => {}
        }
    }

    // ---- the disk ----

    fn disk_task(&mut self, id: u64) {
        let process = self.processes.get_mut(&id).expect("it lives");
        let Some(effect) = process.effects.pop_front() else {
            return;
        };
        let event = match effect {
            DiskEffect::Read => self.read_log(id),
            DiskEffect::Ready => {
                process.phase = Phase::Recovering;
                self.step_core(id, Event::Recover);
                None
            }
            DiskEffect::Durable(tick) => {
                self.told_durable(id, tick);
                None
            }
            DiskEffect::Trouble(why) => {
                // At the start that is an error, later it is waited for.
                if why.is_some() && process.phase == Phase::Opening {
                    self.processes.remove(&id);
                }
                None
            }
            DiskEffect::Fenced { .. } => {
                self.processes.remove(&id);
                None
            }
            DiskEffect::Sleep => Some(LogEvent::Timer),
            other => {
                let mood = match self.rng.below(40) {
                    0 if !self.calm => Mood::Refuses,
                    1..4 if !self.calm && self.faults.lies => Mood::Lies,
                    _ => Mood::Well,
                };
                if mood == Mood::Refuses {
                    self.count("writes refused by the disk");
                }
                let event = self.disk.perform(&other, mood, &mut self.rng);
                let failed = matches!(event, LogEvent::Failed(_));
                if failed && self.processes[&id].phase == Phase::Opening {
                    self.processes.remove(&id);
                    return;
                }
                Some(event)
            }
        };
        if let Some(event) = event
            && let Some(process) = self.processes.get_mut(&id)
        {
            process.step_log(event);
        }
    }

    fn told_durable(&mut self, id: u64, tick: Tick) {
        let process = self.processes.get_mut(&id).expect("it lives");
        process.durable = tick;
        if process.confirmed {
            self.remember(id);
        }
    }

    /// What the records were that are durable. Before the first checkpoint nobody is shown anything, and
    /// a restart begins anew.
    fn remember(&mut self, id: u64) {
        let process = &self.processes[&id];
        let upto = process.as_of(process.durable);
        for ((split, offset), contents) in &process.read {
            if *offset < upto[*split] {
                self.told.entry((*split, *offset)).or_insert(*contents);
            }
        }
    }

    // ---- chaos ----

    /// One random thing happens.
    pub(super) fn chaos(&mut self) {
        self.step += 1;
        self.clock += self.rng.below(20) as u64;
        let mut ids: Vec<u64> = self.processes.keys().copied().collect();
        ids.sort_unstable();
        match self.rng.below(200) {
            0..30 if !self.network.is_empty() => {
                let at = self.rng.below(self.network.len());
                let message = if self.rng.below(10) == 0 {
                    self.count("messages delivered twice");
                    self.network[at].clone()
                } else {
                    self.network.swap_remove(at)
                };
                self.deliver(message);
            }
            30..33 if !self.network.is_empty() => {
                let at = self.rng.below(self.network.len());
                self.network.swap_remove(at);
                self.count("messages lost");
            }
            33..35 => self.time_out(&ids),
            35 => {
                let pick = self.rng.below(ids.len());
                if let Some(id) = ids.get(pick) {
                    self.processes.remove(id);
                    self.count("kills");
                }
            }
            36 => {
                self.processes.clear();
                self.disk.lose_power(&mut self.rng);
                self.count("losses of power");
                if self.disk.broke_its_word {
                    self.count("losses of power that took what was said to be durable");
                }
            }
            37..39 => {
                let pick = self.rng.below(ids.len());
                let nap = 20 + self.rng.below(150);
                if let Some(process) = ids.get(pick).and_then(|id| self.processes.get_mut(id)) {
                    process.asleep_until = self.step + nap;
                    self.count("pauses");
                }
            }
            39..41 if self.processes.len() < 3 => self.start(),
            41 => self.table.foreign_commit(),
            42 => self.table.compact(),
            43 => self.table.expire(),
            44 => {
                let jump = self.rng.below(7_200_000) as u64;
                self.clock = (self.clock + jump).saturating_sub(3_600_000).max(1);
                self.count("jumps of the clock");
            }
            45 => self.damage_latest(),
            46 if self.faults.rot && !self.rotten => {
                self.rotten = self.disk.rot(&mut self.rng);
            }
            47 if self.faults.rewrite => {
                let split = self.rng.below(SPLITS);
                let back = self.rng.below(4) as u64;
                let read = self.processes.values().map(|p| p.offsets[split]).max();
                self.rewritten[split]
                    .get_or_insert(read.unwrap_or(self.source[split]).saturating_sub(back));
            }
            48..60 => {
                let split = self.rng.below(SPLITS);
                let most = RECORDS.saturating_sub(self.source[split]);
                self.source[split] += (self.rng.below(4) as u64).min(most);
            }
            _ => {
                if ids.is_empty() {
                    self.start();
                    return;
                }
                let id = ids[self.rng.below(ids.len())];
                if self.processes[&id].asleep_until <= self.step {
                    self.work(id);
                }
            }
        }
    }

    /// A process does the next thing of one of its tasks.
    fn work(&mut self, id: u64) {
        if id != self.incarnation {
            self.count("steps of a process beside its successor");
        }
        let pick = self.rng.below(10);
        let process = self.processes.get_mut(&id).expect("it lives");
        if pick == 0
            && let Some(attempt) = process.timer.take()
        {
            self.step_core(id, Event::Timer { attempt });
            return;
        }
        match (process.phase, pick) {
            (Phase::Opening, _) | (Phase::Replaying | Phase::Live, 0..4) => self.disk_task(id),
            (Phase::Recovering, _) => {}
            (Phase::Replaying, _) => self.replay_one(id),
            (Phase::Live, 4..6) => self.commit_task(id),
            (Phase::Live, 6) => self.checkpoint_task(id),
            (Phase::Live, 7) if self.processes[&id].confirmed => self.show(id),
            (Phase::Live, _) => {
                let process = &self.processes[&id];
                let waits = process.taking.is_some() || process.closed.len() > 3;
                let (epoch, mark) = (self.rng.below(3) == 0, self.rng.below(6) == 0);
                self.mint(id, epoch, mark && !waits);
            }
        }
    }

    /// A process stops waiting for its answer.
    fn time_out(&mut self, ids: &[u64]) {
        let pick = self.rng.below(ids.len());
        let Some(process) = ids.get(pick).and_then(|id| self.processes.get(id)) else {
            return;
        };
        let (id, attempt) = (process.incarnation, process.attempt);
        let reason = "time-out".to_string();
        self.count("time-outs");
        let failed = Event::LoadFailed {
            attempt,
            reason: reason.clone(),
        };
        self.step_core(id, failed);
        let outcome = Outcome::Unknown(reason);
        self.step_core(id, Event::Answer { attempt, outcome });
    }

    /// The newest checkpoint cannot be read any more; there is one before it.
    fn damage_latest(&mut self) {
        let [.., before, newest] = self.moved[..] else {
            return;
        };
        let good = |id: &u64| self.store.get(id).is_some_and(|c| c.whole && !c.damaged);
        if good(&before)
            && good(&newest)
            && let Some(checkpoint) = self.store.get_mut(&newest)
        {
            checkpoint.damaged = true;
            self.count("checkpoints damaged");
        }
    }

    /// The faults end; a last process must get everything into the table.
    pub(super) fn calm_down(&mut self) {
        self.calm = true;
        self.processes.clear();
        self.network.clear();
        self.clock = self
            .clock
            .max(self.shown.keys().max().copied().unwrap_or(0))
            + 1;
        self.start();
        for _ in 0..20_000 {
            self.clock += 1;
            let Some(id) = self.newest() else {
                self.start();
                continue;
            };
            if self.network.is_empty() {
                self.work(id);
            } else {
                let message = self.network.remove(0);
                self.deliver(message);
            }
            if self.ended() {
                return;
            }
            let Some(process) = self.processes.get(&id) else {
                continue;
            };
            let all = process.phase == Phase::Live
                && process.offsets == self.source
                && process.committing.is_none()
                && process.confirmed;
            if all && self.table.rows().len() as u64 == self.source.iter().sum::<u64>() {
                self.count("records committed at the end");
                return;
            }
        }
        self.violate("the last process did not finish".to_string());
    }
}

fn offsets_of(binding: &SourceBinding, before: Offsets) -> Offsets {
    let mut offsets = before;
    for (split, offset) in offsets.iter_mut().enumerate() {
        if let Some((end, _)) = binding.splits.get(&split.to_string()) {
            *offset = *end;
        }
    }
    offsets
}
