//! The remap log's decisions, without I/O: what is durable, what a takeover cuts off, what counts when
//! the log is read, what may be forgotten.
//!
//! [`Log::step`] takes an [`Event`] and returns [`Effect`]s. [`super::files`] performs them on files; the
//! simulator in `tests/src/sim` performs them on a disk that tears, loses and refuses writes, with a
//! crash possible between any two.
//!
//! ```text
//!  begin ─► Create (the fence) ─► Read ─► Write header ─► Sync ─► List ─► Ready
//!                                                                 └── a newer segment: Fenced
//!  Append… ─► Write ─► Sync ─► List ─► Durable, Write "synced" ─► next round
//!               └─────┴─ failed: CutBack ─► Sleep ─► Write again
//!  Roll ─► Create ─► Write header ─► Sync ─► List ─► Remove what is not needed
//! ```
//!
//! # Rules
//!
//! Each is switched off by a test in which the simulator then finds what goes wrong.
//!
//! 1. *Synced*: a tick is told durable only after its binding was synced.
//! 2. *Fence*: an incarnation puts up its segment before it reads those of older ones.
//! 3. *Look*: after a sync and before telling, a segment of a newer incarnation is looked for; with 2,
//!    whatever was told is what the newer one found.
//! 4. *Takeover*: what an older incarnation wrote above what a newer one found does not count.
//! 5. *Cut back*: what a failed write left behind is cut off before it is written again.
//! 6. *Holes*: whole records behind damage do not make it more than a torn tail, unless they say so.
//! 7. *Damage*: what was acknowledged and is not readable any more stops the start.
//! 8. *Keep*: bindings above the oldest checkpoint kept are not forgotten.
//! 9. *Verify*: what is replayed must have the count and the digest that were bound.
//! 10. *Destination*: a table that holds more of a sink than the log knows stops that sink.

use std::collections::{BTreeMap, VecDeque};

use super::record::{Damage, Record, VERSION, decode, encode};
use super::{Binding, SourceBinding, Takeover};
use crate::time::Tick;

/// The rules above; all hold outside tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the module's documentation lists them")]
pub struct Rules {
    pub synced: bool,
    pub fence: bool,
    pub look: bool,
    pub takeover: bool,
    pub cut_back: bool,
    pub holes: bool,
    pub damage: bool,
    pub keep: bool,
    pub verify: bool,
    pub destination: bool,
}

impl Rules {
    /// All of them.
    pub const ALL: Self = Self {
        synced: true,
        fence: true,
        look: true,
        takeover: true,
        cut_back: true,
        holes: true,
        damage: true,
        keep: true,
        verify: true,
        destination: true,
    };
}

/// Names a segment: whose it is, and the first tick it may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentId {
    pub incarnation: u64,
    pub first: Tick,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The older segments were read: the last tick that counts.
    Found(Tick),
    Append {
        tick: Tick,
        record: Vec<u8>,
    },
    /// A new segment for ticks from `first`; ticks up to `oldest` are not needed any more.
    Roll {
        first: Tick,
        oldest: Tick,
    },
    /// The last effect was performed.
    Done,
    /// The segments that are there.
    Listed(Vec<SegmentId>),
    Failed(String),
    /// The sleep is over.
    Timer,
}

/// What is to be done. All but `Durable`, `Trouble`, `Ready` and `Fenced` are answered by an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// An empty file, durable in its directory.
    Create(SegmentId),
    /// Read the older segments and answer `Found`.
    Read,
    Write {
        segment: SegmentId,
        bytes: Vec<u8>,
    },
    Sync(SegmentId),
    CutBack {
        segment: SegmentId,
        length: u64,
    },
    List,
    Remove(SegmentId),
    Sleep,
    Ready,
    Durable(Tick),
    /// What keeps the log from being written; `None` when that is over.
    Trouble(Option<String>),
    /// A newer incarnation has taken over: nothing is durable any more.
    Fenced {
        by: u64,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Work {
    Append(Tick, Vec<u8>),
    Roll { first: Tick, oldest: Tick },
}

/// Bindings written at once.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Round {
    bytes: Vec<u8>,
    last: Tick,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Fencing,
    Reading,
    /// The header of the segment, at the start or at a roll.
    Heading(Heading),
    Idle,
    Writing(Round),
    Syncing(Round),
    Looking(Round),
    CuttingBack(Option<Round>),
    Resting(Option<Round>, Rest),
    Marking(u64),
    Creating(SegmentId, Tick),
    Listing(Tick),
    Removing(VecDeque<SegmentId>),
    Fenced,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Heading {
    /// The first segment: written, synced, looked.
    First(u8),
    /// A later one: written, synced; what is not needed once it stands.
    Later(u8, SegmentId, Tick),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rest {
    CutBack,
    Write,
    Look,
}

/// The log of one incarnation.
#[derive(Debug)]
pub struct Log {
    rules: Rules,
    takeover: Takeover,
    segment: SegmentId,
    /// Segments that this incarnation has begun to write, ascending. What else of it is there was
    /// refused half-way and holds nothing.
    own: Vec<SegmentId>,
    /// Length of the part that was written whole; a failed write is cut back to it.
    good: u64,
    queue: VecDeque<Work>,
    state: State,
    trouble: bool,
}

impl Log {
    /// For ticks above `base`, the tick of the checkpoint that was restored.
    pub fn begin(incarnation: u64, base: Tick, rules: Rules) -> (Self, Vec<Effect>) {
        let segment = SegmentId {
            incarnation,
            first: base + 1,
        };
        let mut log = Self {
            rules,
            takeover: Takeover {
                incarnation,
                found: base,
                version: VERSION,
            },
            segment,
            own: vec![segment],
            good: 0,
            queue: VecDeque::new(),
            state: State::Fencing,
            trouble: false,
        };
        if rules.fence {
            return (log, vec![Effect::Create(segment)]);
        }
        log.state = State::Reading;
        (log, vec![Effect::Read])
    }

    /// The segment that is written.
    pub fn segment(&self) -> SegmentId {
        self.segment
    }

    /// Nothing is under way or waiting.
    pub fn is_idle(&self) -> bool {
        self.state == State::Idle && self.queue.is_empty()
    }

    /// One step; see the module's drawing.
    pub fn step(&mut self, event: Event) -> Vec<Effect> {
        match event {
            Event::Append { tick, record } => {
                self.queue.push_back(Work::Append(tick, record));
                return self.next_if_idle();
            }
            Event::Roll { first, oldest } => {
                self.queue.push_back(Work::Roll { first, oldest });
                return self.next_if_idle();
            }
            _ => {}
        }
        match (std::mem::replace(&mut self.state, State::Idle), event) {
            (State::Fencing, Event::Done) => self.go(State::Reading, Effect::Read),
            (State::Reading, Event::Found(found)) => {
                self.takeover.found = found;
                if self.rules.fence {
                    self.write_header()
                } else {
                    self.go(
                        State::Heading(Heading::First(0)),
                        Effect::Create(self.segment),
                    )
                }
            }
            (State::Heading(heading), event) => self.headed(heading, event),
            (State::Writing(round), Event::Done) => {
                if self.rules.synced {
                    self.go(State::Syncing(round), Effect::Sync(self.segment))
                } else {
                    self.told(&round)
                }
            }
            (State::Syncing(round), Event::Done) => {
                if self.rules.look {
                    self.go(State::Looking(round), Effect::List)
                } else {
                    self.told(&round)
                }
            }
            (State::Looking(round), Event::Listed(there)) => match self.newer(&there) {
                Some(by) => self.go(State::Fenced, Effect::Fenced { by }),
                None => self.told(&round),
            },
            (State::Writing(round) | State::Syncing(round), Event::Failed(why)) => {
                let next = if self.rules.cut_back {
                    self.cut_back(Some(round))
                } else {
                    self.go(State::Resting(Some(round), Rest::Write), Effect::Sleep)
                };
                self.in_trouble(why, next)
            }
            (State::Looking(round), Event::Failed(why)) => {
                let next = self.go(State::Resting(Some(round), Rest::Look), Effect::Sleep);
                self.in_trouble(why, next)
            }
            (State::CuttingBack(Some(round)), Event::Done) => {
                self.go(State::Resting(Some(round), Rest::Write), Effect::Sleep)
            }
            (State::CuttingBack(None), Event::Done) => self.next(),
            // Tried again until it is done: nothing may stand behind half a record.
            (State::CuttingBack(round), Event::Failed(_)) => {
                self.go(State::Resting(round, Rest::CutBack), Effect::Sleep)
            }
            (State::Resting(Some(round), Rest::Write), Event::Timer) => self.write(round),
            (State::Resting(Some(round), Rest::Look), Event::Timer) => {
                self.go(State::Looking(round), Effect::List)
            }
            (State::Resting(round, _), Event::Timer) => self.cut_back(round),
            (State::Marking(length), Event::Done) => {
                self.good += length;
                self.next()
            }
            (State::Marking(_), Event::Failed(_)) => self.cut_back(None),
            (State::Creating(segment, oldest), Event::Done) => {
                let bytes = self.header();
                self.go(
                    State::Heading(Heading::Later(0, segment, oldest)),
                    Effect::Write { segment, bytes },
                )
            }
            // It goes on in its old segment; a new one is tried at the next checkpoint. The file may be
            // there all the same: whoever lists it would take the old segment to end before it.
            (State::Creating(segment, _), Event::Failed(_)) => {
                self.remove(VecDeque::from([segment]))
            }
            (State::Listing(oldest), Event::Listed(there)) => {
                let gone = garbage(&there, &self.own, self.takeover, oldest, self.rules);
                self.own.retain(|segment| !gone.contains(segment));
                self.remove(gone.into())
            }
            (State::Listing(_), Event::Failed(_)) => self.next(),
            (State::Removing(rest), _) => self.remove(rest),
            // An answer nobody waits for.
            (state, _) => {
                self.state = state;
                vec![]
            }
        }
    }

    fn go(&mut self, state: State, effect: Effect) -> Vec<Effect> {
        self.state = state;
        vec![effect]
    }

    fn header(&self) -> Vec<u8> {
        encode(&Record::Takeover(self.takeover))
    }

    fn write_header(&mut self) -> Vec<Effect> {
        let (segment, bytes) = (self.segment, self.header());
        self.go(
            State::Heading(Heading::First(1)),
            Effect::Write { segment, bytes },
        )
    }

    fn headed(&mut self, heading: Heading, event: Event) -> Vec<Effect> {
        match (heading, event) {
            (Heading::First(0), Event::Done) => self.write_header(),
            (Heading::First(1), Event::Done) => self.go(
                State::Heading(Heading::First(2)),
                Effect::Sync(self.segment),
            ),
            (Heading::First(2), Event::Done) => {
                self.good = self.header().len() as u64;
                if self.rules.look {
                    self.go(State::Heading(Heading::First(3)), Effect::List)
                } else {
                    self.ready()
                }
            }
            (Heading::First(_), Event::Listed(there)) => match self.newer(&there) {
                Some(by) => self.go(State::Fenced, Effect::Fenced { by }),
                None => self.ready(),
            },
            (Heading::Later(0, segment, oldest), Event::Done) => self.go(
                State::Heading(Heading::Later(1, segment, oldest)),
                Effect::Sync(segment),
            ),
            (Heading::Later(_, segment, oldest), Event::Done) => {
                self.segment = segment;
                self.own.push(segment);
                self.good = self.header().len() as u64;
                self.go(State::Listing(oldest), Effect::List)
            }
            // Half a header is no segment: nothing was told of it. It is made anew the next time.
            (Heading::Later(_, segment, _), Event::Failed(_)) => {
                self.remove(VecDeque::from([segment]))
            }
            (heading, Event::Failed(why)) => {
                self.state = State::Heading(heading);
                vec![Effect::Trouble(Some(why))]
            }
            (heading, _) => {
                self.state = State::Heading(heading);
                vec![]
            }
        }
    }

    fn ready(&mut self) -> Vec<Effect> {
        let mut effects = vec![Effect::Ready];
        effects.extend(self.next());
        effects
    }

    fn newer(&self, there: &[SegmentId]) -> Option<u64> {
        let newest = there.iter().map(|s| s.incarnation).max()?;
        (newest > self.takeover.incarnation).then_some(newest)
    }

    fn next_if_idle(&mut self) -> Vec<Effect> {
        match self.state {
            State::Idle => self.next(),
            _ => vec![],
        }
    }

    /// All bindings that wait up to a roll are one round: one sync for many.
    fn next(&mut self) -> Vec<Effect> {
        let mut round: Option<Round> = None;
        while let Some(Work::Append(..)) = self.queue.front()
            && let Some(Work::Append(tick, record)) = self.queue.pop_front()
        {
            let round = round.get_or_insert(Round {
                bytes: Vec::new(),
                last: tick,
            });
            round.bytes.extend_from_slice(&record);
            round.last = tick;
        }
        if let Some(round) = round {
            return self.write(round);
        }
        match self.queue.pop_front() {
            Some(Work::Roll { first, oldest }) => {
                let segment = SegmentId {
                    first,
                    ..self.segment
                };
                if segment == self.segment {
                    return self.go(State::Listing(oldest), Effect::List);
                }
                self.go(State::Creating(segment, oldest), Effect::Create(segment))
            }
            _ => {
                self.state = State::Idle;
                vec![]
            }
        }
    }

    fn write(&mut self, round: Round) -> Vec<Effect> {
        let (segment, bytes) = (self.segment, round.bytes.clone());
        self.go(State::Writing(round), Effect::Write { segment, bytes })
    }

    fn cut_back(&mut self, round: Option<Round>) -> Vec<Effect> {
        let (segment, length) = (self.segment, self.good);
        self.go(
            State::CuttingBack(round),
            Effect::CutBack { segment, length },
        )
    }

    fn told(&mut self, round: &Round) -> Vec<Effect> {
        self.good += round.bytes.len() as u64;
        let mut effects = Vec::new();
        if std::mem::take(&mut self.trouble) {
            effects.push(Effect::Trouble(None));
        }
        effects.push(Effect::Durable(round.last));
        // Not synced: it need not be there, but if it is, what lies before it was durable.
        let bytes = encode(&Record::Synced(self.good));
        self.state = State::Marking(bytes.len() as u64);
        effects.push(Effect::Write {
            segment: self.segment,
            bytes,
        });
        effects
    }

    fn in_trouble(&mut self, why: String, next: Vec<Effect>) -> Vec<Effect> {
        self.trouble = true;
        let mut effects = vec![Effect::Trouble(Some(why))];
        effects.extend(next);
        effects
    }

    fn remove(&mut self, mut gone: VecDeque<SegmentId>) -> Vec<Effect> {
        match gone.pop_front() {
            Some(segment) => self.go(State::Removing(gone), Effect::Remove(segment)),
            None => self.next(),
        }
    }
}

/// What may go of the segments that are `there`: of `own`, those of this incarnation, all whose next
/// one starts at or below `oldest + 1`; those of older incarnations when all that counts of them lies
/// below. A newer incarnation's are not ours to judge.
///
/// Where a segment ends is not asked of the listing: a file that was created although that was refused
/// would cut the segment before it short.
pub fn garbage(
    there: &[SegmentId],
    own: &[SegmentId],
    takeover: Takeover,
    oldest: Tick,
    rules: Rules,
) -> Vec<SegmentId> {
    // Without the rule, what the newest checkpoint does not need is taken for garbage.
    let oldest = match own.last() {
        Some(current) if !rules.keep => current.first.saturating_sub(1),
        _ => oldest,
    };
    let below = |segment: &SegmentId| {
        if segment.incarnation != takeover.incarnation {
            return segment.incarnation < takeover.incarnation && takeover.found <= oldest;
        }
        match own.iter().position(|s| s == segment) {
            Some(at) => own.get(at + 1).is_some_and(|next| next.first <= oldest + 1),
            None => true,
        }
    };
    there.iter().copied().filter(below).collect()
}

/// What one incarnation wrote.
#[derive(Default)]
struct Written {
    /// Absent when it died before its first record: then it has told nothing.
    found: Option<Tick>,
    bindings: Vec<Binding>,
}

/// All bindings above `after` that count, in order.
///
/// From the newest incarnation down: each says up to where those before it count. A later one writes
/// what it replays again: the same binding.
pub fn replay(
    segments: impl IntoIterator<Item = (SegmentId, Vec<u8>)>,
    after: Tick,
    rules: Rules,
) -> Result<Vec<Binding>, (SegmentId, Damage)> {
    let mut logs = BTreeMap::<u64, Written>::new();
    let mut segments: Vec<_> = segments.into_iter().collect();
    segments.sort_by_key(|(id, _)| *id);
    for (id, bytes) in segments {
        let log = logs.entry(id.incarnation).or_default();
        for record in decode(&bytes, rules).map_err(|damage| (id, damage))? {
            match record {
                Record::Takeover(takeover) => log.found = Some(takeover.found),
                Record::Binding(binding) => log.bindings.push(binding),
                Record::Synced(_) => {}
            }
        }
    }
    let mut valid = BTreeMap::new();
    let mut upto = Tick::MAX;
    for log in logs.into_values().rev() {
        for binding in log.bindings {
            if binding.tick > after && binding.tick <= upto {
                valid.entry(binding.tick).or_insert(binding);
            }
        }
        if rules.takeover {
            upto = upto.min(log.found.unwrap_or(Tick::MAX));
        }
    }
    Ok(valid.into_values().collect())
}

/// Whether a source repeats what was bound: as many rows and rejected records, from the same bytes. A
/// digest is compared when both sides have one.
pub fn repeats(bound: &SourceBinding, again: &SourceBinding, rules: Rules) -> bool {
    let digest = match (bound.digest, again.digest) {
        (Some(bound), Some(again)) => bound == again,
        _ => true,
    };
    !rules.verify || (digest && (bound.rows, bound.rejected) == (again.rows, again.rejected))
}

/// Whether a destination that holds everything below `committed` fits a log that ends with `bound`. A
/// commit waits until its ticks are durable in the log; if they are not there, part of it is gone, and
/// what is read again would get other ticks and be written twice.
pub fn fits_destination(committed: Tick, bound: Tick, rules: Rules) -> bool {
    !rules.destination || committed <= bound + 1
}

/// Why a sink cannot go on with its destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Misfit {
    /// The destination holds rows, and no checkpoint says which.
    NoState,
    /// The destination holds less than it did: it was set back, or is another one.
    SetBack {
        /// What it held.
        landed: Tick,
        /// What it holds now.
        there: Tick,
    },
}

/// What a checkpoint knows of a sink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// Everything below is committed.
    pub committed: Tick,
    /// What the destination itself has said.
    pub landed: Tick,
}

/// The tick below which a sink has nothing to write any more, when its destination says that it is at
/// `there`. The destination may be further than the checkpoint, for commits go on after it.
pub fn goes_on_at(there: Option<Tick>, known: Option<Known>) -> Result<Tick, Misfit> {
    let at = there.unwrap_or(0);
    match known {
        None if at > 0 => Err(Misfit::NoState),
        None => Ok(0),
        Some(Known { landed, .. }) if at < landed => Err(Misfit::SetBack { landed, there: at }),
        Some(Known { committed, .. }) => Ok(at.max(committed)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sink_goes_on_where_its_destination_is() {
        let known = |committed, landed| Some(Known { committed, landed });
        assert_eq!(goes_on_at(None, None), Ok(0));
        assert_eq!(goes_on_at(Some(4), None), Err(Misfit::NoState));
        // Commits after the checkpoint; epochs without rows, which only the checkpoint knows of.
        assert_eq!(goes_on_at(Some(9), known(7, 7)), Ok(9));
        assert_eq!(goes_on_at(Some(5), known(7, 5)), Ok(7));
        assert_eq!(goes_on_at(None, known(7, 0)), Ok(7));
        for there in [None, Some(4)] {
            let misfit = Misfit::SetBack {
                landed: 5,
                there: there.unwrap_or(0),
            };
            assert_eq!(goes_on_at(there, known(7, 5)), Err(misfit));
        }
    }
}
