//! A seeded simulation of the way from a source to a table, with the real decisions in it.
//!
//! The two state machines that decide what happens exactly once run here as they run in production: the
//! remap log (`dataflow/src/remap/log.rs`) and the commit core (`lake/src/commit.rs`). Around them is a
//! world that is made to hurt: a disk that tears, loses and refuses writes, and lies about syncs; a
//! catalog whose answers come late, twice or never; strangers who commit, compact and expire; processes
//! that are killed, lose power with the machine, are paused and wake beside their successors; clocks
//! that jump; checkpoints that cannot be read, so that the one before is used; a source that does not
//! repeat itself. Between any two effects any of it may happen. A seed gives one schedule.
//!
//! # What must hold
//!
//! * The rows in the table are those below the offsets that the table's own frontier stands for: none is
//!   missing, none stands twice, none has other contents than when it was bound.
//! * What a reader was shown at a tick is what every later process has at that tick.
//! * When the faults end, a process starts, and everything gets into the table.
//! * What cannot be right any more (a flipped bit, a disk that lied, a source that changed) stops with an
//!   error instead.
//!
//! Every rule of the remap log, and the four waits around it, is taken out by a test in which some
//! schedule then breaks one of these. The rules of the commit core are taken out one by one in
//! `lake/src/commit/sim.rs`.

mod disk;
mod process;
mod table;
mod world;

use std::collections::BTreeMap;

use millrace_dataflow::remap::log::Rules;
use world::{Faults, Model, World};

use crate::rng::Rng;

const STEPS: usize = 900;

/// Runs one schedule; what went wrong, if anything, and what happened on the way.
fn run(seed: u64, faults: Faults, model: Model) -> (Option<String>, BTreeMap<&'static str, u64>) {
    let mut world = World::new(Rng::new(seed), faults, model);
    for _ in 0..STEPS {
        world.chaos();
        if world.ended() {
            return (world.violation, world.counts);
        }
    }
    world.calm_down();
    (world.violation, world.counts)
}

/// Faults that a correct system survives, and those it must stop at.
const KINDS: [Faults; 4] = [
    Faults::ALL,
    Faults {
        lies: true,
        ..Faults::ALL
    },
    Faults {
        rot: true,
        ..Faults::ALL
    },
    Faults {
        rewrite: true,
        ..Faults::ALL
    },
];

fn schedules(seeds: std::ops::Range<u64>) {
    let mut totals = BTreeMap::<&str, u64>::new();
    let mut count = 0;
    for seed in seeds {
        for (kind, faults) in KINDS.into_iter().enumerate() {
            let (violation, counts) = run(seed, faults, Model::ALL);
            assert_eq!(violation, None, "seed {seed}, faults {kind}");
            count += 1;
            for (what, n) in counts {
                *totals.entry(what).or_default() += n;
            }
        }
    }
    println!("{count} schedules of {STEPS} steps: 0 rows lost, 0 doubled, 0 shown and taken back");
    for (what, n) in totals {
        println!("{n:>12} {what}");
    }
}

#[test]
fn no_schedule_loses_doubles_or_takes_back_a_row() {
    schedules(0..100);
}

/// `make sim-long`.
#[test]
#[ignore = "takes minutes"]
fn no_schedule_of_ten_thousand_loses_doubles_or_takes_back_a_row() {
    schedules(0..3_000);
}

/// Without a rule, some schedule goes wrong in this way.
fn breaks(faults: Faults, model: Model, how: &[&str]) {
    let found = (0..6_000).find_map(|seed| run(seed, faults, model).0);
    let found = found.expect("a schedule that goes wrong without this rule");
    assert!(
        how.iter().any(|how| found.contains(how)),
        "another violation than expected: {found}"
    );
}

fn without(change: impl FnOnce(&mut Rules)) -> Model {
    let mut rules = Rules::ALL;
    change(&mut rules);
    Model {
        rules,
        ..Model::ALL
    }
}

const TAKEN_BACK: &str = "a reader saw";
const WRONG_ROWS: &str = "rows of the table";
const NO_START: &str = "cannot start";

#[test]
fn without_synced_what_was_told_is_lost_with_the_power() {
    let model = without(|r| r.synced = false);
    breaks(Faults::ALL, model, &[TAKEN_BACK, WRONG_ROWS, NO_START]);
}

#[test]
fn without_the_fence_first_an_old_process_tells_what_nobody_finds() {
    let model = without(|r| r.fence = false);
    breaks(Faults::ALL, model, &[TAKEN_BACK, WRONG_ROWS, NO_START]);
}

#[test]
fn without_a_look_an_old_process_tells_what_does_not_count() {
    breaks(
        Faults::ALL,
        without(|r| r.look = false),
        &[TAKEN_BACK, WRONG_ROWS],
    );
}

#[test]
fn without_the_takeover_ticks_of_two_processes_mix() {
    let model = without(|r| r.takeover = false);
    breaks(Faults::ALL, model, &[TAKEN_BACK, WRONG_ROWS, NO_START]);
}

#[test]
fn without_cutting_back_half_a_record_hides_what_follows() {
    let model = without(|r| r.cut_back = false);
    breaks(Faults::ALL, model, &[TAKEN_BACK, WRONG_ROWS, NO_START]);
}

#[test]
fn without_holes_a_torn_tail_stops_the_start() {
    breaks(Faults::ALL, without(|r| r.holes = false), &[NO_START]);
}

#[test]
fn without_damage_a_flipped_bit_takes_back_what_was_told() {
    let faults = Faults {
        rot: true,
        ..Faults::ALL
    };
    breaks(
        faults,
        without(|r| r.damage = false),
        &[TAKEN_BACK, WRONG_ROWS],
    );
}

#[test]
fn without_keeping_an_older_checkpoint_lacks_its_bindings() {
    let model = without(|r| r.keep = false);
    breaks(Faults::ALL, model, &[TAKEN_BACK, WRONG_ROWS, NO_START]);
}

#[test]
fn without_verifying_other_records_are_taken_for_the_same() {
    let faults = Faults {
        rewrite: true,
        ..Faults::ALL
    };
    breaks(
        faults,
        without(|r| r.verify = false),
        &[TAKEN_BACK, WRONG_ROWS],
    );
}

#[test]
fn without_a_look_at_the_destination_a_lie_of_the_disk_doubles_rows() {
    let faults = Faults {
        lies: true,
        ..Faults::ALL
    };
    breaks(faults, without(|r| r.destination = false), &[WRONG_ROWS]);
}

#[test]
fn a_read_that_does_not_wait_is_taken_back() {
    let model = Model {
        reads_wait: false,
        ..Model::ALL
    };
    breaks(Faults::ALL, model, &[TAKEN_BACK]);
}

#[test]
fn a_commit_that_does_not_wait_is_doubled_or_refused() {
    let model = Model {
        commits_wait: false,
        ..Model::ALL
    };
    breaks(Faults::ALL, model, &[WRONG_ROWS, NO_START]);
}

#[test]
fn a_checkpoint_that_does_not_wait_holds_what_does_not_count() {
    let model = Model {
        checkpoints_wait: false,
        ..Model::ALL
    };
    breaks(Faults::ALL, model, &[TAKEN_BACK, WRONG_ROWS, NO_START]);
}

#[test]
fn without_the_incarnation_an_old_process_moves_the_checkpoint() {
    let model = Model {
        latest_is_fenced: false,
        ..Model::ALL
    };
    breaks(Faults::ALL, model, &[TAKEN_BACK, WRONG_ROWS, NO_START]);
}
