//! A seeded simulation of the commit core against a hostile world.
//!
//! Processes start, crash and come back while older ones still run; requests and answers are delayed,
//! lost and doubled; strangers add snapshots, expire old ones and (if asked) set the table back. Each
//! tick is one row, some ticks are empty. A process that restarts cannot produce rows below its
//! checkpoint again, so a false acknowledgement is a lost row. A seed gives one schedule.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::token::{Link, Mark, Property, look};
use super::{Core, Effect, Event, Failure, Observed, Outcome, Rules, Token};

const TICKS: u64 = 24;
const STEPS: usize = 600;

/// Small and good enough to choose interleavings; the same sequence on every machine.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % sides as u64) as usize
    }
}

#[derive(Clone)]
struct Snapshot {
    parent: Option<i64>,
    mark: Option<Mark>,
    files: Vec<usize>,
}

#[derive(Clone)]
enum Message {
    Load {
        process: usize,
        attempt: u64,
        fence: bool,
    },
    Commit {
        process: usize,
        attempt: u64,
        base: Option<String>,
        token: Token,
        file: Option<usize>,
    },
    ToProcess {
        process: usize,
        event: Event,
    },
}

#[derive(Default)]
struct Table {
    snapshots: BTreeMap<i64, Snapshot>,
    head: Option<i64>,
    property: Option<Property>,
    version: u64,
    fence: u64,
}

#[derive(PartialEq)]
enum Engine {
    Recovering,
    /// Everything below is acknowledged.
    At(u64),
    Committing {
        lower: u64,
        upper: u64,
        file: Option<usize>,
    },
    /// The commit was handed back and may be tried again.
    Retry {
        lower: u64,
        upper: u64,
        file: Option<usize>,
    },
}

struct Process {
    incarnation: u64,
    core: Core,
    engine: Engine,
    timer: Option<u64>,
}

struct World {
    rules: Rules,
    dice: Dice,
    table: Table,
    /// Ticks in each file ever written.
    files: Vec<(u64, u64)>,
    deleted: HashSet<usize>,
    network: Vec<Message>,
    processes: HashMap<usize, Process>,
    started: usize,
    /// Durable: a restart begins at or above.
    checkpoint: u64,
    /// The newest incarnation that has seen the table.
    begun: u64,
    set_back: bool,
    check_zombies: bool,
    violation: Option<String>,
}

fn has_row(tick: u64) -> bool {
    tick % 5 < 3
}

impl World {
    fn new(seed: u64, rules: Rules, check_zombies: bool) -> Self {
        Self {
            rules,
            dice: Dice(seed),
            table: Table::default(),
            files: vec![],
            deleted: HashSet::new(),
            network: vec![],
            processes: HashMap::new(),
            started: 0,
            checkpoint: 0,
            begun: 0,
            set_back: false,
            check_zombies,
            violation: None,
        }
    }

    fn start(&mut self) {
        self.started += 1;
        let (id, incarnation) = (self.started, self.started as u64);
        let mut core = Core::with_rules("7", incarnation, self.rules);
        let effects = core.step(Event::Recover);
        let engine = Engine::Recovering;
        self.processes.insert(
            id,
            Process {
                incarnation,
                core,
                engine,
                timer: None,
            },
        );
        self.perform(id, effects);
    }

    fn step_core(&mut self, id: usize, event: Event) {
        if let Some(process) = self.processes.get_mut(&id) {
            let effects = process.core.step(event);
            self.perform(id, effects);
        }
    }

    fn perform(&mut self, id: usize, effects: Vec<Effect>) {
        for effect in effects {
            let Some(process) = self.processes.get_mut(&id) else {
                return;
            };
            let file = match process.engine {
                Engine::Committing { file, .. } => file,
                _ => None,
            };
            match effect {
                Effect::Load { attempt, fence } => {
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
                } => self.network.push(Message::Commit {
                    process: id,
                    attempt,
                    base: Some(base),
                    token,
                    file,
                }),
                Effect::CommitRebased { attempt, token } => {
                    self.network.push(Message::Commit {
                        process: id,
                        attempt,
                        base: None,
                        token,
                        file,
                    });
                }
                Effect::DeleteFiles => self.deleted.extend(file),
                Effect::Sleep { attempt, .. } => process.timer = Some(attempt),
                Effect::Done { frontier } => {
                    process.engine = match process.engine {
                        // What lies below the checkpoint cannot be produced again.
                        Engine::Recovering => {
                            Engine::At(frontier.unwrap_or(0).max(self.checkpoint))
                        }
                        Engine::Committing { upper, .. } => Engine::At(upper),
                        _ => panic!("done without a task"),
                    };
                }
                Effect::Fail(Failure::Unavailable(_)) => match process.engine {
                    Engine::Committing { lower, upper, file } => {
                        process.engine = Engine::Retry { lower, upper, file };
                    }
                    _ => {
                        self.processes.remove(&id);
                    }
                },
                Effect::Fail(_) => {
                    self.processes.remove(&id);
                }
            }
        }
    }

    /// The engine of a process does the next thing, if it waits for nothing.
    fn work(&mut self, id: usize) {
        let cut = 1 + self.dice.roll(4) as u64;
        let skip = self.dice.roll(2) == 0;
        let save = self.dice.roll(2) == 0;
        let newest = self.started;
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        let (lower, upper, file) = match process.engine {
            Engine::At(at) => {
                // The metadata store refuses the checkpoint of an older incarnation.
                if save && id == newest {
                    self.checkpoint = self.checkpoint.max(at);
                }
                if at >= TICKS {
                    return;
                }
                let upper = (at + cut).min(TICKS);
                let rows = (at..upper).any(has_row);
                if !rows && skip {
                    if process.core.skip(at, upper).is_ok() {
                        process.engine = Engine::At(upper);
                    }
                    return;
                }
                let file = rows.then(|| {
                    self.files.push((at, upper));
                    self.files.len() - 1
                });
                (at, upper, file)
            }
            Engine::Retry { lower, upper, file } => (lower, upper, file),
            _ => return,
        };
        process.engine = Engine::Committing { lower, upper, file };
        self.step_core(id, Event::Commit { lower, upper });
    }

    fn deliver(&mut self, message: Message) {
        match message {
            Message::ToProcess { process, event } => self.step_core(process, event),
            Message::Load {
                process,
                attempt,
                fence,
            } => {
                if let Some(p) = self.processes.get(&process) {
                    self.begun = self.begun.max(p.incarnation);
                    if fence {
                        self.table.fence = self.table.fence.max(p.incarnation);
                    }
                }
                let event = Event::Loaded {
                    attempt,
                    seen: self.observe(),
                };
                self.network.push(Message::ToProcess { process, event });
            }
            Message::Commit {
                process,
                attempt,
                base,
                token,
                file,
            } => {
                let current = self.table.version.to_string();
                let fenced = self.rules.fence && token.incarnation < self.table.fence;
                let outcome = if fenced || base.is_some_and(|base| base != current) {
                    Outcome::Conflict
                } else {
                    self.apply(&token, file);
                    Outcome::Committed
                };
                let event = Event::Answer { attempt, outcome };
                self.network.push(Message::ToProcess { process, event });
            }
        }
    }

    fn observe(&self) -> Observed {
        let link = |id: i64| {
            self.table.snapshots.get(&id).map(|s| Link {
                parent: s.parent,
                sequence: id,
                mark: s.mark,
            })
        };
        let property = if self.rules.property {
            self.table.property
        } else {
            None
        };
        let (progress, incarnation) = look(self.table.head, link, property);
        let version = self.table.version.to_string();
        Observed {
            version,
            progress,
            incarnation: incarnation.max(self.table.fence),
        }
    }

    fn apply(&mut self, token: &Token, file: Option<usize>) {
        if self.check_zombies && token.incarnation < self.begun {
            self.violation = Some(format!(
                "incarnation {} committed after {} had begun",
                token.incarnation, self.begun
            ));
        }
        if self.set_back {
            self.violation = Some("committed to a table that was set back".to_string());
        }
        let mark = Mark {
            frontier: token.frontier,
            incarnation: token.incarnation,
        };
        self.push_snapshot(Some(mark), file);
        self.table.property = Some(Property {
            mark,
            sequence: self.table.version as i64,
        });
    }

    fn push_snapshot(&mut self, mark: Option<Mark>, file: Option<usize>) {
        let mut files = self.live();
        files.extend(file);
        self.table.version += 1;
        let id = self.table.version as i64;
        self.table.snapshots.insert(
            id,
            Snapshot {
                parent: self.table.head,
                mark,
                files,
            },
        );
        self.table.head = Some(id);
    }

    fn live(&self) -> Vec<usize> {
        self.table
            .head
            .map_or(vec![], |id| self.table.snapshots[&id].files.clone())
    }

    fn expire(&mut self) {
        let head = self.table.head;
        self.table.snapshots.retain(|id, _| Some(*id) == head);
        self.table.version += 1;
    }

    fn set_table_back(&mut self) {
        let Some(head) = self.table.head else { return };
        let snapshot = &self.table.snapshots[&head];
        if let Some(parent) = snapshot.parent
            && self.table.snapshots.contains_key(&parent)
            && snapshot.mark.is_some()
        {
            self.table.head = Some(parent);
            self.table.version += 1;
            self.set_back = true;
        }
    }

    fn check(&mut self) {
        let mut times = HashMap::new();
        for file in self.live() {
            if self.deleted.contains(&file) {
                self.violation
                    .get_or_insert(format!("live file {file} was deleted"));
            }
            for tick in self.files[file].0..self.files[file].1 {
                *times.entry(tick).or_insert(0) += 1;
            }
        }
        if let Some((tick, n)) = times.iter().find(|(_, n)| **n > 1) {
            self.violation
                .get_or_insert(format!("tick {tick} stands {n} times"));
        }
        let acknowledged = self
            .processes
            .values()
            .filter_map(|p| match p.engine {
                Engine::At(at) => Some(at),
                _ => None,
            })
            .fold(self.checkpoint, u64::max);
        if !self.set_back
            && let Some(tick) = (0..acknowledged).find(|t| has_row(*t) && !times.contains_key(t))
        {
            self.violation
                .get_or_insert(format!("tick {tick} is lost, {acknowledged} acknowledged"));
        }
    }

    /// One random thing happens.
    fn chaos(&mut self, with_set_back: bool) {
        let mut ids: Vec<usize> = self.processes.keys().copied().collect();
        ids.sort_unstable();
        let pick = self.dice.roll(ids.len().max(1));
        let id = ids.get(pick).copied();
        match self.dice.roll(100) {
            0..45 if !self.network.is_empty() => {
                let at = self.dice.roll(self.network.len());
                let message = if self.dice.roll(12) == 0 {
                    self.network[at].clone()
                } else {
                    self.network.swap_remove(at)
                };
                self.deliver(message);
            }
            45..50 if !self.network.is_empty() => {
                let at = self.dice.roll(self.network.len());
                self.network.swap_remove(at);
            }
            50..58 => {
                if let Some(id) = id {
                    self.time_out(id);
                }
            }
            58..68 => {
                if let Some(id) = id
                    && let Some(process) = self.processes.get_mut(&id)
                    && let Some(attempt) = process.timer.take()
                {
                    self.step_core(id, Event::Timer { attempt });
                }
            }
            68..70 => {
                if let Some(id) = id {
                    self.processes.remove(&id);
                }
            }
            70..74 if self.processes.len() < 3 => self.start(),
            74..77 => self.push_snapshot(None, None),
            // Expiring what a set-back table was set back from destroys the evidence for good.
            77..79 if !self.set_back => self.expire(),
            79 if with_set_back && !self.set_back => self.set_table_back(),
            _ => {
                if let Some(id) = id {
                    self.work(id);
                }
            }
        }
    }

    /// A process stops waiting for its answer.
    fn time_out(&mut self, id: usize) {
        let Some(process) = self.processes.get(&id) else {
            return;
        };
        let attempt = process.core.attempt;
        let reason = "time-out".to_string();
        self.step_core(
            id,
            Event::LoadFailed {
                attempt,
                reason: reason.clone(),
            },
        );
        self.step_core(
            id,
            Event::Answer {
                attempt,
                outcome: Outcome::Unknown(reason),
            },
        );
    }

    /// The faults end; a last process must get everything into the table.
    fn calm_down(&mut self) {
        self.processes.clear();
        for _ in 0..20 {
            self.start();
            let id = self.started;
            for _ in 0..2_000 {
                if self.violation.is_some() {
                    return;
                }
                if self.network.is_empty() {
                    self.work(id);
                    if let Some(attempt) = self.processes.get_mut(&id).and_then(|p| p.timer.take())
                    {
                        self.step_core(id, Event::Timer { attempt });
                    }
                } else {
                    let message = self.network.remove(0);
                    self.deliver(message);
                }
                self.check();
                match self.processes.get(&id).map(|p| &p.engine) {
                    Some(Engine::At(TICKS)) => return,
                    None => break,
                    _ => {}
                }
            }
        }
        if !self.set_back {
            self.violation
                .get_or_insert("the last process did not finish".to_string());
        }
    }
}

/// Runs one schedule; what went wrong, if anything.
fn run(seed: u64, rules: Rules, with_set_back: bool, check_zombies: bool) -> Option<String> {
    let mut world = World::new(seed, rules, check_zombies);
    world.start();
    for _ in 0..STEPS {
        world.chaos(with_set_back);
        world.check();
        if world.violation.is_some() {
            return world.violation;
        }
    }
    world.calm_down();
    world.violation
}

/// Some schedule must break the protocol without the rule; the first few hundred seeds find it.
fn breaks(rules: Rules, with_set_back: bool, check_zombies: bool, how: &str) {
    let found = (0..3_000).find_map(|seed| run(seed, rules, with_set_back, check_zombies));
    let found = found.expect("a schedule that breaks the protocol without this rule");
    assert!(
        found.contains(how),
        "another violation than expected: {found}"
    );
}

#[test]
fn no_schedule_loses_or_doubles_a_row() {
    schedules(0..600);
}

/// `make sim-long`.
#[test]
#[ignore = "takes minutes"]
fn no_schedule_of_ten_thousand_loses_or_doubles_a_row() {
    schedules(0..5_000);
}

fn schedules(seeds: std::ops::Range<u64>) {
    for seed in seeds {
        for with_set_back in [false, true] {
            let violation = run(seed, Rules::ALL, with_set_back, true);
            assert_eq!(violation, None, "seed {seed}, set back {with_set_back}");
        }
    }
}

#[test]
fn the_fence_is_a_second_line_for_the_data() {
    let rules = Rules {
        fence: false,
        ..Rules::ALL
    };
    for seed in 0..300 {
        assert_eq!(run(seed, rules, false, false), None, "seed {seed}");
    }
}

#[test]
fn without_same_version_rows_double() {
    breaks(
        Rules {
            same_version: false,
            ..Rules::ALL
        },
        false,
        false,
        "times",
    );
}

#[test]
fn without_looking_again_rows_double() {
    breaks(
        Rules {
            look_again: false,
            ..Rules::ALL
        },
        false,
        false,
        "times",
    );
}

#[test]
fn without_keeping_files_live_ones_vanish() {
    breaks(
        Rules {
            keep: false,
            ..Rules::ALL
        },
        false,
        false,
        "was deleted",
    );
}

#[test]
fn without_the_property_an_expired_token_doubles_rows() {
    // The memory of the process is the second line here; a restart has none.
    breaks(
        Rules {
            property: false,
            ..Rules::ALL
        },
        false,
        false,
        "times",
    );
}

#[test]
fn without_set_back_a_damaged_table_is_written_to() {
    breaks(
        Rules {
            set_back: false,
            ..Rules::ALL
        },
        true,
        false,
        "set back",
    );
}

#[test]
fn without_overlap_another_cut_loses_rows() {
    breaks(
        Rules {
            overlap: false,
            fence: false,
            ..Rules::ALL
        },
        false,
        false,
        "lost",
    );
}

#[test]
fn without_the_fence_an_old_incarnation_commits() {
    breaks(
        Rules {
            fence: false,
            ..Rules::ALL
        },
        false,
        true,
        "committed after",
    );
}
