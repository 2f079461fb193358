//! Exhaustive search over the commit core: every order of bounded events, not a sample of them.
//!
//! Two processes (the old one may be a zombie) with the real [`Core`], a table, a catalog whose requests
//! are applied at any later time, even after their sender died, or get lost, answers that get lost,
//! crashes, strangers' snapshots with the expiry of all older ones. Ticks hold one row each; how many go
//! into an epoch is free. States that differ only in the numbers of attempts are one.
//!
//! The search is breadth first, so that what it finds is a shortest way to it. Rules whose absence shows
//! only with a table that somebody set back are left to the simulation beside.

use std::collections::{HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

use super::token::{Link, Mark, Property, look};
use super::{Core, Effect, Event, Failure, Observed, Outcome, Rules, State, Token};

/// How often each thing may happen.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    ticks: u64,
    starts: u8,
    crashes: u8,
    /// Time-outs, lost requests and lost answers together.
    losses: u8,
    strangers: u8,
    /// Messages under way.
    network: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Message {
    Load {
        to: Option<usize>,
        current: bool,
        incarnation: u64,
        fence: bool,
    },
    Commit {
        to: Option<usize>,
        current: bool,
        base: Option<u64>,
        lower: u64,
        upper: u64,
        file: (u64, u64),
        incarnation: u64,
    },
    Loaded {
        to: usize,
        version: u64,
        frontier: Option<u64>,
        incarnation: u64,
    },
    Answer {
        to: usize,
        committed: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Engine {
    Recovering,
    At(u64),
    Committing(u64, u64),
    Retry(u64, u64),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Process {
    incarnation: u64,
    core: Core,
    engine: Engine,
    sleeping: bool,
    /// Its epochs go into files of their own each time it lives.
    written: Option<(u64, u64)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    /// What is in the table: files as ranges of ticks.
    live: Vec<(u64, u64)>,
    deleted: Vec<(u64, u64)>,
    mark: Option<(u64, u64)>,
    /// The snapshot with the newest token has expired.
    expired: bool,
    version: u64,
    fence: u64,
    network: Vec<Message>,
    processes: [Option<Process>; 2],
    checkpoint: u64,
    incarnation: u64,
    starts: u8,
    crashes: u8,
    losses: u8,
    strangers: u8,
    /// The newest incarnation that has seen the table, and whether an older one committed after it.
    begun: u64,
    zombie: bool,
}

struct Model {
    rules: Rules,
    bounds: Bounds,
    check_zombies: bool,
}

impl Model {
    fn first() -> World {
        World {
            live: vec![],
            deleted: vec![],
            mark: None,
            expired: false,
            version: 0,
            fence: 0,
            network: vec![],
            processes: [None, None],
            checkpoint: 0,
            incarnation: 0,
            starts: 0,
            crashes: 0,
            losses: 0,
            strangers: 0,
            begun: 0,
            zombie: false,
        }
    }

    fn observe(&self, world: &World) -> Observed {
        let mark = world.mark.map(|(frontier, incarnation)| Mark {
            frontier,
            incarnation,
        });
        // Snapshot 1 carries the token; a stranger's, 2, stands on it once it has expired.
        let (head, property) = match (mark, world.expired) {
            (None, _) => (None, None),
            (Some(mark), expired) => (
                Some(if expired { 2 } else { 1 }),
                Some(Property { mark, sequence: 1 }),
            ),
        };
        let link = |id: i64| match id {
            1 if !world.expired => Some(Link {
                parent: None,
                sequence: 1,
                mark,
            }),
            2 => Some(Link {
                parent: Some(1),
                sequence: 2,
                mark: None,
            }),
            _ => None,
        };
        let property = property.filter(|_| self.rules.property);
        let (progress, incarnation) = look(head, link, property);
        Observed {
            version: world.version.to_string(),
            progress,
            incarnation: incarnation.max(world.fence),
        }
    }

    fn step(&self, world: &mut World, slot: usize, event: Event) {
        let Some(process) = &mut world.processes[slot] else {
            return;
        };
        let effects = process.core.step(event);
        for effect in effects {
            let Some(process) = &mut world.processes[slot] else {
                return;
            };
            let incarnation = process.incarnation;
            let send = |base: Option<u64>, token: Token, file| Message::Commit {
                to: Some(slot),
                current: true,
                base,
                lower: token.lower,
                upper: token.frontier,
                file,
                incarnation,
            };
            let file = match process.engine {
                Engine::Committing(lower, upper) => (lower, upper),
                _ => (0, 0),
            };
            match effect {
                Effect::Load { fence, .. } => world.network.push(Message::Load {
                    to: Some(slot),
                    current: true,
                    incarnation,
                    fence,
                }),
                Effect::BuildAndCommit { base, token, .. } => {
                    let base = base.parse().ok();
                    world.network.push(send(base, token, file));
                }
                Effect::CommitRebased { token, .. } => world.network.push(send(None, token, file)),
                Effect::DeleteFiles => world.deleted.push(file),
                Effect::Sleep { .. } => process.sleeping = true,
                Effect::Done { frontier } => {
                    process.engine = match process.engine {
                        Engine::Committing(_, upper) => Engine::At(upper),
                        // What lies below the checkpoint cannot be produced again.
                        _ => Engine::At(frontier.unwrap_or(0).max(world.checkpoint)),
                    };
                }
                Effect::Fail(Failure::Unavailable(_)) => match process.engine {
                    Engine::Committing(lower, upper) => {
                        process.engine = Engine::Retry(lower, upper);
                    }
                    _ => self.end(world, slot),
                },
                Effect::Fail(_) => self.end(world, slot),
            }
        }
    }

    /// The process is gone; its requests are still under way.
    fn end(&self, world: &mut World, slot: usize) {
        world.processes[slot] = None;
        for message in &mut world.network {
            match message {
                Message::Load { to, .. } | Message::Commit { to, .. } if *to == Some(slot) => {
                    *to = None;
                }
                _ => {}
            }
        }
        world.network.retain(|m| {
            !matches!(m, Message::Loaded { to, .. } | Message::Answer { to, .. } if *to == slot)
        });
    }

    /// A message arrives. Whether a request is the current one of its sender is known by its number.
    fn deliver(&self, world: &mut World, at: usize) {
        match world.network.remove(at) {
            Message::Load {
                to,
                current,
                incarnation,
                fence,
            } => {
                if to.is_some() {
                    world.begun = world.begun.max(incarnation);
                }
                if fence {
                    world.fence = world.fence.max(incarnation);
                }
                let seen = self.observe(world);
                if let (Some(to), true) = (to, current) {
                    world.network.push(Message::Loaded {
                        to,
                        version: world.version,
                        frontier: match seen.progress {
                            super::Progress::At(tick) => Some(tick),
                            _ => None,
                        },
                        incarnation: seen.incarnation,
                    });
                }
            }
            Message::Commit {
                to,
                current,
                base,
                upper,
                file,
                incarnation,
                ..
            } => {
                let fenced = self.rules.fence && incarnation < world.fence;
                let committed = !fenced && base.is_none_or(|base| base == world.version);
                if committed {
                    world.zombie |= incarnation < world.begun;
                    world.live.push(file);
                    world.live.sort_unstable();
                    world.mark = Some((upper, incarnation));
                    world.expired = false;
                    world.version += 1;
                }
                if let (Some(to), true) = (to, current) {
                    world.network.push(Message::Answer { to, committed });
                }
            }
            Message::Loaded {
                to,
                version,
                frontier,
                incarnation,
            } => {
                let attempt = self.attempt(world, to);
                let progress = frontier.map_or(super::Progress::Nothing, super::Progress::At);
                let seen = Observed {
                    version: version.to_string(),
                    progress,
                    incarnation,
                };
                self.step(world, to, Event::Loaded { attempt, seen });
            }
            Message::Answer { to, committed } => {
                let attempt = self.attempt(world, to);
                let outcome = if committed {
                    Outcome::Committed
                } else {
                    Outcome::Conflict
                };
                self.step(world, to, Event::Answer { attempt, outcome });
            }
        }
    }

    fn attempt(&self, world: &World, slot: usize) -> u64 {
        world.processes[slot]
            .as_ref()
            .map_or(0, |process| process.core.attempt)
    }

    /// What a process waits for is late for ever.
    fn give_up(&self, world: &mut World, slot: usize) {
        for message in &mut world.network {
            match message {
                Message::Load { to, current, .. } | Message::Commit { to, current, .. }
                    if *to == Some(slot) =>
                {
                    *current = false;
                }
                _ => {}
            }
        }
        world.network.retain(|m| {
            !matches!(m, Message::Loaded { to, .. } | Message::Answer { to, .. } if *to == slot)
        });
        let attempt = self.attempt(world, slot);
        let loading = matches!(
            world.processes[slot].as_ref().map(|p| &p.core.state),
            Some(State::Loading(_))
        );
        let reason = String::new();
        let event = if loading {
            Event::LoadFailed { attempt, reason }
        } else {
            Event::Answer {
                attempt,
                outcome: Outcome::Unknown(reason),
            }
        };
        self.step(world, slot, event);
    }

    /// Everything that may happen next.
    fn next(&self, world: &World) -> Vec<(String, World)> {
        let mut next = Vec::new();
        let bounds = self.bounds;
        let mut add = |what: String, mut after: World| {
            if after.network.len() > bounds.network {
                return;
            }
            after.network.sort_unstable();
            for process in after.processes.iter_mut().flatten() {
                process.core.attempt = 1;
            }
            next.push((what, after));
        };
        for slot in 0..2 {
            let Some(process) = &world.processes[slot] else {
                if world.starts < bounds.starts {
                    let mut after = world.clone();
                    after.starts += 1;
                    after.incarnation += 1;
                    let incarnation = after.incarnation;
                    after.processes[slot] = Some(Process {
                        incarnation,
                        core: Core::with_rules("7", incarnation, self.rules),
                        engine: Engine::Recovering,
                        sleeping: false,
                        written: None,
                    });
                    self.step(&mut after, slot, Event::Recover);
                    add(format!("{slot} starts as {incarnation}"), after);
                }
                continue;
            };
            if world.crashes < bounds.crashes {
                let mut after = world.clone();
                after.crashes += 1;
                self.end(&mut after, slot);
                add(format!("{slot} crashes"), after);
            }
            if process.sleeping {
                let mut after = world.clone();
                if let Some(process) = &mut after.processes[slot] {
                    process.sleeping = false;
                }
                let attempt = self.attempt(&after, slot);
                self.step(&mut after, slot, Event::Timer { attempt });
                add(format!("{slot} wakes"), after);
            }
            let waits = matches!(
                process.core.state,
                State::Loading(_) | State::Committing(..)
            );
            if waits && world.losses < bounds.losses {
                let mut after = world.clone();
                after.losses += 1;
                self.give_up(&mut after, slot);
                add(format!("{slot} waits no longer"), after);
            }
            let epochs = match process.engine {
                Engine::At(at) => (at + 1..=bounds.ticks.min(at + 2))
                    .map(|u| (at, u))
                    .collect(),
                Engine::Retry(lower, upper) => vec![(lower, upper)],
                _ => vec![],
            };
            for (lower, upper) in epochs {
                let mut after = world.clone();
                if let Some(process) = &mut after.processes[slot] {
                    process.engine = Engine::Committing(lower, upper);
                    process.written = Some((lower, upper));
                }
                self.step(&mut after, slot, Event::Commit { lower, upper });
                add(format!("{slot} commits [{lower}, {upper})"), after);
            }
            // The metadata store refuses the checkpoint of an older incarnation.
            if let Engine::At(at) = process.engine
                && at > world.checkpoint
                && process.incarnation == world.incarnation
            {
                let mut after = world.clone();
                after.checkpoint = at;
                add(format!("{slot} takes a checkpoint at {at}"), after);
            }
        }
        for at in 0..world.network.len() {
            let what = &world.network[at];
            let mut after = world.clone();
            self.deliver(&mut after, at);
            add(format!("arrives: {what:?}"), after);
            // An answer that is lost shows when its process waits no longer.
            if matches!(what, Message::Load { .. } | Message::Commit { .. })
                && world.losses < bounds.losses
            {
                let mut after = world.clone();
                after.losses += 1;
                after.network.remove(at);
                add(format!("is lost: {what:?}"), after);
            }
        }
        if world.mark.is_some() && world.strangers < bounds.strangers {
            let mut after = world.clone();
            after.strangers += 1;
            after.version += 1;
            after.expired = true;
            add("a stranger's snapshot, and expiry".to_string(), after);
        }
        next
    }

    fn violation(&self, world: &World) -> Option<String> {
        let mut times = [0; 16];
        for file in &world.live {
            if world.deleted.contains(file) {
                return Some(format!("live file {file:?} was deleted"));
            }
            for tick in file.0..file.1 {
                times[tick as usize] += 1;
            }
        }
        if let Some(tick) = times.iter().position(|n| *n > 1) {
            return Some(format!("tick {tick} stands {} times", times[tick]));
        }
        let acknowledged = world.processes.iter().flatten().map(|p| match p.engine {
            Engine::At(at) => at,
            _ => 0,
        });
        let acknowledged = acknowledged.fold(world.checkpoint, u64::max);
        if let Some(tick) = (0..acknowledged).find(|t| times[*t as usize] == 0) {
            return Some(format!("tick {tick} is lost, {acknowledged} acknowledged"));
        }
        (self.check_zombies && world.zombie)
            .then(|| "an old incarnation committed after a newer one had begun".to_string())
    }

    /// All states; or the way to one that is wrong. Of a state that was seen only a hash is kept.
    fn search(&self, limit: usize) -> Found {
        let mut known = HashSet::from([fingerprint(&Self::first())]);
        // By state: the one before it, and which of its nexts it is.
        let mut before = vec![(0, 0)];
        let mut queue = VecDeque::from([(0, Self::first())]);
        let mut transitions = 0;
        while let Some((at, world)) = queue.pop_front() {
            if let Some(what) = self.violation(&world) {
                let way = self.way(&before, at);
                return Found {
                    states: before.len(),
                    transitions,
                    violation: Some((what, way)),
                };
            }
            for (choice, (_, after)) in self.next(&world).into_iter().enumerate() {
                transitions += 1;
                if known.insert(fingerprint(&after)) {
                    queue.push_back((before.len(), after));
                    before.push((at, choice));
                }
            }
            assert!(before.len() <= limit, "more than {limit} states");
        }
        Found {
            states: before.len(),
            transitions,
            violation: None,
        }
    }

    /// What happened on the way to a state.
    fn way(&self, before: &[(usize, usize)], mut at: usize) -> Vec<String> {
        let mut choices = Vec::new();
        while at != 0 {
            choices.push(before[at].1);
            at = before[at].0;
        }
        let mut world = Self::first();
        let mut way = Vec::new();
        for choice in choices.into_iter().rev() {
            let (what, after) = self.next(&world).swap_remove(choice);
            way.push(what);
            world = after;
        }
        way
    }
}

/// Two hashes together are long enough that no two states share them.
fn fingerprint(world: &World) -> (u64, u64) {
    let hash = |seed: u64| {
        let mut hasher = DefaultHasher::new();
        seed.hash(&mut hasher);
        world.hash(&mut hasher);
        hasher.finish()
    };
    (hash(1), hash(2))
}

struct Found {
    states: usize,
    transitions: usize,
    violation: Option<(String, Vec<String>)>,
}

const SMALL: Bounds = Bounds {
    ticks: 2,
    starts: 2,
    crashes: 1,
    losses: 2,
    strangers: 1,
    network: 2,
};

const LARGE: [Bounds; 2] = [
    Bounds { ticks: 3, ..SMALL },
    Bounds {
        starts: 3,
        losses: 1,
        ..SMALL
    },
];

fn search(bounds: Bounds, rules: Rules, check_zombies: bool) -> Found {
    let model = Model {
        rules,
        bounds,
        check_zombies,
    };
    let found = model.search(6_000_000);
    println!(
        "{} states, {} transitions, {:?}",
        found.states,
        found.transitions,
        found.violation.as_ref().map(|v| &v.0)
    );
    found
}

#[test]
fn no_order_of_events_loses_or_doubles_a_row() {
    let found = search(SMALL, Rules::ALL, true);
    assert_eq!(found.violation, None);
    assert!(found.states > 5_000, "the model moves: {}", found.states);
}

/// `make sim-long`.
#[test]
#[ignore = "takes a minute"]
fn no_order_of_more_events_loses_or_doubles_a_row() {
    for bounds in LARGE {
        let found = search(bounds, Rules::ALL, true);
        assert_eq!(found.violation, None);
    }
}

fn breaks(rules: Rules, check_zombies: bool, how: &str) {
    let found = search(SMALL, rules, check_zombies).violation;
    let (what, way) = found.expect("a way to break the protocol without this rule");
    assert!(what.contains(how), "{way:#?}");
}

#[test]
fn each_rule_is_needed() {
    let all = Rules::ALL;
    let same_version = false;
    breaks(
        Rules {
            same_version,
            ..all
        },
        false,
        "times",
    );
    let look_again = false;
    breaks(Rules { look_again, ..all }, false, "times");
    breaks(Rules { keep: false, ..all }, false, "was deleted");
    let property = false;
    breaks(Rules { property, ..all }, false, "times");
    breaks(
        Rules {
            fence: false,
            ..all
        },
        true,
        "old incarnation",
    );
}
