//! The commit core: how a sink's epochs get into a table exactly once, as a state machine without I/O.
//!
//! [`Core::step`] takes an [`Event`] and returns [`Effect`]s. The [`driver`] performs them against the
//! catalog; the simulator in the tests performs them against a world that crashes, delays, loses and
//! duplicates.
//!
//! # Protocol
//!
//! ```text
//!   Recover ─┐                       frontier at or past upper ──────────► Done
//!            ├─► Load ─► Loaded ─┬── set back, fenced, overlap ──────────► Fail, for good
//!   Commit ──┘     ▲             └── frontier at or below lower
//!                  │                   └─► BuildAndCommit on that version ─► Committed: Done
//!                  └──── Sleep ◄── Conflict, Unknown, Failed
//! ```
//!
//! # Rules
//!
//! Each is switched off by a test in which the simulator then finds lost or doubled rows.
//!
//! 1. *Same version*: a commit is compare-and-set on the very version in which the token was looked up.
//! 2. *Look again*: an unknown outcome is neither success nor failure; reload and look.
//! 3. *Keep*: files of a commit whose outcome is unknown are never deleted.
//! 4. *Property*: the token survives the expiry of its snapshot.
//! 5. *Set back*: a table that lost commits stops the sink; it is not guessed around.
//! 6. *Overlap*: another cut of the same ticks in the table is not taken for ours.
//! 7. *Fence*: once an incarnation has begun, no older one commits.
//!
//! The token is part of the data's own commit, so progress is always what the table says.

pub mod driver;
pub mod token;

#[cfg(test)]
mod model;
#[cfg(test)]
mod sim;

use millrace_dataflow::error::{Error, ErrorKind};
use millrace_dataflow::time::Tick;

pub use driver::TableCommitter;
pub use token::{Progress, Token};

/// Identifies a version of a table.
pub type Version = String;

/// Conflicts in a row before the commit is handed back to be tried later.
const CONFLICTS_MAX: u32 = 50;
/// Failures and unknown outcomes in a row before that.
const FAILURES_MAX: u32 = 5;

/// What one version of the table says about the sink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    pub version: Version,
    pub progress: Progress,
    /// The newest incarnation that committed or put up a fence.
    pub incarnation: u64,
}

/// Which answer the catalog gave to a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Committed,
    /// Certainly not committed: the version was not current any more, or we are fenced.
    Conflict,
    /// Certainly not committed: it was not sent.
    Failed(String),
    /// May be committed, may be committed later, may be lost.
    Unknown(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Begin: fence older incarnations and find out how far the table is.
    Recover,
    /// Publish `[lower, upper)`.
    Commit {
        lower: Tick,
        upper: Tick,
    },
    Loaded {
        attempt: u64,
        seen: Observed,
    },
    LoadFailed {
        attempt: u64,
        reason: String,
    },
    Answer {
        attempt: u64,
        outcome: Outcome,
    },
    Timer {
        attempt: u64,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Read the current version; with `fence`, first shut out older incarnations.
    Load {
        attempt: u64,
        fence: bool,
    },
    /// Write the snapshot on top of `base` and move the pointer from there.
    BuildAndCommit {
        attempt: u64,
        base: Version,
        token: Token,
    },
    Sleep {
        attempt: u64,
        ms: u64,
    },
    /// The table holds everything below this tick.
    Done {
        frontier: Option<Tick>,
    },
    Fail(Failure),
    /// Without rule 1: the token was looked up in one version, the commit lands on another.
    #[cfg(test)]
    CommitRebased {
        attempt: u64,
        token: Token,
    },
    /// Without rule 3.
    #[cfg(test)]
    DeleteFiles,
}

/// Why a commit ended without success.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Failure {
    /// A newer incarnation has taken over.
    Fenced { by: u64 },
    /// The table lost commits of this sink.
    SetBack { known: Tick, found: Option<Tick> },
    /// The table holds a part of the epoch already.
    Overlap {
        table: Tick,
        lower: Tick,
        upper: Tick,
    },
    /// Epochs must follow each other.
    Gap { expected: Tick, lower: Tick },
    /// The only one that may be tried again, with the same arguments.
    Unavailable(String),
}

impl Failure {
    /// The failure as the error a sink returns.
    pub fn into_error(self, table: &str) -> Error {
        let conflict = |message: String| Error::new(ErrorKind::Conflict, message).code("40001");
        match self {
            Self::Fenced { by } => {
                conflict(format!("incarnation {by} of this sink has taken over lake table \"{table}\""))
            }
            Self::SetBack { known, found } => conflict(format!(
                "lake table \"{table}\" was set back: commits of this sink are missing from its history"
            ))
            .detail(match found {
                Some(found) => format!("the table was at tick {known} and is at {found} now"),
                None => format!("the table was at tick {known} and holds nothing of this sink now"),
            })
            .hint("set the table to the snapshot it was set back from, or create the sink anew into another table"),
            Self::Overlap { table: at, lower, upper } => conflict(format!(
                "lake table \"{table}\" already holds a part of what is to be committed"
            ))
            .detail(format!("the table is at tick {at}, the epoch is [{lower}, {upper})"))
            .hint("restart the sink: it goes on from the table's progress"),
            Self::Gap { expected, lower } => Error::internal(format!(
                "an epoch for lake table \"{table}\" begins at tick {lower} instead of {expected}"
            )),
            Self::Unavailable(reason) => {
                let code = Error::outside(reason.as_str()).code;
                Error::unavailable(format!("cannot commit to lake table \"{table}\" now"))
                    .code(code)
                    .detail(reason)
            }
        }
    }
}

/// The rules above; all hold outside tests.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(test, derive(PartialEq, Eq, Hash))]
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "some are switched off by tests only")
)]
pub(crate) struct Rules {
    pub(crate) same_version: bool,
    pub(crate) look_again: bool,
    pub(crate) keep: bool,
    pub(crate) set_back: bool,
    pub(crate) overlap: bool,
    pub(crate) fence: bool,
    pub(crate) property: bool,
}

impl Rules {
    pub(crate) const ALL: Self = Self {
        same_version: true,
        look_again: true,
        keep: true,
        set_back: true,
        overlap: true,
        fence: true,
        property: true,
    };
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Task {
    Recover,
    Commit { lower: Tick, upper: Tick },
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum State {
    Idle,
    Loading(Task),
    Committing(Task, Token),
    Sleeping(Task),
    Failed(Failure),
}

/// Commits of one sink, one after the other.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
pub struct Core {
    sink: String,
    incarnation: u64,
    rules: Rules,
    state: State,
    /// Numbers loads, commits and timers, so that an answer to an earlier one is not taken for ours.
    attempt: u64,
    /// Older incarnations are shut out.
    fenced: bool,
    /// The furthest the table was ever seen at.
    known: Option<Tick>,
    /// Where the next epoch begins, once one was acknowledged.
    next: Option<Tick>,
    conflicts: u32,
    failures: u32,
}

impl Core {
    pub fn new(sink: impl Into<String>, incarnation: u64) -> Self {
        Self::with_rules(sink, incarnation, Rules::ALL)
    }

    pub(crate) fn with_rules(sink: impl Into<String>, incarnation: u64, rules: Rules) -> Self {
        Self {
            sink: sink.into(),
            incarnation,
            rules,
            state: State::Idle,
            attempt: 0,
            fenced: !rules.fence,
            known: None,
            next: None,
            conflicts: 0,
            failures: 0,
        }
    }

    /// Acknowledges ticks below `upper` that held nothing; the next commit covers them.
    pub fn skip(&mut self, lower: Tick, upper: Tick) -> Result<(), Failure> {
        if let State::Failed(failure) = &self.state {
            return Err(failure.clone());
        }
        self.follows(lower)?;
        self.next = Some(upper);
        Ok(())
    }

    /// Gives up what is under way before it was sent.
    pub fn abandon(&mut self) {
        if !matches!(self.state, State::Failed(_)) {
            self.state = State::Idle;
        }
        self.attempt += 1;
    }

    /// One step; see the module's drawing.
    pub fn step(&mut self, event: Event) -> Vec<Effect> {
        match (self.state.clone(), event) {
            (State::Failed(failure), Event::Recover | Event::Commit { .. }) => {
                vec![Effect::Fail(failure)]
            }
            (_, Event::Recover) => self.begin(Task::Recover),
            (_, Event::Commit { lower, upper }) => match self.follows(lower) {
                Ok(()) => self.begin(Task::Commit { lower, upper }),
                Err(failure) => self.fail(failure),
            },
            (State::Loading(task), Event::Loaded { attempt, seen }) if attempt == self.attempt => {
                self.loaded(task, seen)
            }
            (State::Loading(task), Event::LoadFailed { attempt, reason })
                if attempt == self.attempt =>
            {
                self.retry(task, reason)
            }
            (State::Committing(task, token), Event::Answer { attempt, outcome })
                if attempt == self.attempt =>
            {
                self.answered(task, token, outcome)
            }
            (State::Sleeping(task), Event::Timer { attempt }) if attempt == self.attempt => {
                self.load(task)
            }
            // An answer to a question we no longer ask.
            _ => vec![],
        }
    }

    fn follows(&self, lower: Tick) -> Result<(), Failure> {
        match self.next {
            Some(expected) if lower > expected => Err(Failure::Gap { expected, lower }),
            _ => Ok(()),
        }
    }

    fn begin(&mut self, task: Task) -> Vec<Effect> {
        self.conflicts = 0;
        self.failures = 0;
        self.load(task)
    }

    fn load(&mut self, task: Task) -> Vec<Effect> {
        self.attempt += 1;
        self.state = State::Loading(task);
        vec![Effect::Load {
            attempt: self.attempt,
            fence: !self.fenced,
        }]
    }

    fn loaded(&mut self, task: Task, seen: Observed) -> Vec<Effect> {
        if self.rules.fence {
            if seen.incarnation > self.incarnation {
                return self.fail(Failure::Fenced {
                    by: seen.incarnation,
                });
            }
            self.fenced = true;
        }
        let table = match seen.progress {
            Progress::Nothing => None,
            Progress::At(tick) => Some(tick),
            Progress::SetBack { known, found } if self.rules.set_back => {
                return self.fail(Failure::SetBack { known, found });
            }
            Progress::SetBack { known, .. } => Some(known),
        };
        if self.rules.set_back
            && let Some(known) = self.known
            && table < Some(known)
        {
            return self.fail(Failure::SetBack {
                known,
                found: table,
            });
        }
        self.known = self.known.max(table);
        let Task::Commit { lower, upper } = task else {
            self.next = None;
            return self.done(table);
        };
        match table {
            // Ours landed, or the same ticks by somebody before us.
            Some(table) if table >= upper => {
                self.next = Some(upper);
                self.done(Some(table))
            }
            Some(table) if table > lower && self.rules.overlap => self.fail(Failure::Overlap {
                table,
                lower,
                upper,
            }),
            Some(table) if table > lower => self.done(Some(upper)),
            _ => self.commit(task, seen.version, table.unwrap_or(lower), upper),
        }
    }

    /// Ticks between the table's frontier and the epoch held nothing; the commit covers them too, so
    /// that tokens follow each other without a gap.
    fn commit(&mut self, task: Task, base: Version, lower: Tick, upper: Tick) -> Vec<Effect> {
        let token = Token {
            sink: self.sink.clone(),
            lower,
            frontier: upper,
            incarnation: self.incarnation,
        };
        self.attempt += 1;
        self.state = State::Committing(task, token.clone());
        #[cfg(test)]
        if !self.rules.same_version {
            return vec![Effect::CommitRebased {
                attempt: self.attempt,
                token,
            }];
        }
        vec![Effect::BuildAndCommit {
            attempt: self.attempt,
            base,
            token,
        }]
    }

    fn answered(&mut self, task: Task, token: Token, outcome: Outcome) -> Vec<Effect> {
        match outcome {
            Outcome::Committed => {
                self.known = self.known.max(Some(token.frontier));
                self.next = Some(token.frontier);
                self.done(Some(token.frontier))
            }
            Outcome::Conflict => {
                self.conflicts += 1;
                if self.conflicts >= CONFLICTS_MAX {
                    return self.give_up("others kept changing the table".to_string());
                }
                // The first reload is at once; after that the others are given time.
                let ms = u64::from(self.conflicts - 1) * 20;
                self.sleep(task, ms)
            }
            Outcome::Failed(reason) => self.retry(task, reason),
            Outcome::Unknown(reason) => {
                #[cfg(test)]
                if !self.rules.keep {
                    let mut effects = vec![Effect::DeleteFiles];
                    effects.extend(self.retry(task, reason));
                    return effects;
                }
                #[cfg(test)]
                if !self.rules.look_again {
                    self.attempt += 1;
                    self.state = State::Committing(task, token.clone());
                    return vec![Effect::CommitRebased {
                        attempt: self.attempt,
                        token,
                    }];
                }
                self.retry(task, reason)
            }
        }
    }

    fn retry(&mut self, task: Task, reason: String) -> Vec<Effect> {
        self.failures += 1;
        if self.failures >= FAILURES_MAX {
            return self.give_up(reason);
        }
        self.sleep(task, 50 << self.failures)
    }

    fn sleep(&mut self, task: Task, ms: u64) -> Vec<Effect> {
        if ms == 0 {
            return self.load(task);
        }
        self.attempt += 1;
        self.state = State::Sleeping(task);
        vec![Effect::Sleep {
            attempt: self.attempt,
            ms: ms.min(1_000),
        }]
    }

    fn done(&mut self, frontier: Option<Tick>) -> Vec<Effect> {
        self.state = State::Idle;
        vec![Effect::Done { frontier }]
    }

    fn give_up(&mut self, reason: String) -> Vec<Effect> {
        self.state = State::Idle;
        vec![Effect::Fail(Failure::Unavailable(reason))]
    }

    fn fail(&mut self, failure: Failure) -> Vec<Effect> {
        self.state = State::Failed(failure.clone());
        vec![Effect::Fail(failure)]
    }
}
