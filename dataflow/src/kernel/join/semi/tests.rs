//! Random changes on both sides in random slices, against a recomputation.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Float64Array, StringArray};
use proptest::prelude::*;

use super::*;
use crate::kernel::testing::{accumulate, batch, int, rows, stored, time};
use crate::key::{hash_columns, owner};
use crate::state::testing::{budget, enter};

const SECOND: i64 = 1_000_000;

#[derive(Debug, Clone)]
struct Row {
    key: Option<i64>,
    text: Option<u8>,
    at: Option<i64>,
    value: i64,
    diff: i64,
}

fn row() -> impl Strategy<Value = Row> {
    let text = proptest::option::weighted(0.9, 0u8..2);
    let at = proptest::option::weighted(0.9, -10i64..30);
    let diff = prop_oneof![4 => Just(1i64), 1 => Just(2), 3 => Just(-1)];
    let key = proptest::option::weighted(0.85, 0i64..3);
    (key, text, at, 0i64..3, diff).prop_map(|(key, text, at, value, diff)| Row {
        key,
        text,
        at,
        value,
        diff,
    })
}

/// Columns: key, text, at, value, zero (0.0 or -0.0).
fn delta(rows: &[Row]) -> Delta {
    let text = |row: &Row| row.text.map(|t| ["", "long text"][t as usize]);
    let texts: StringArray = rows.iter().map(text).collect();
    let zeros = rows
        .iter()
        .map(|r| if r.value % 2 == 0 { 0.0 } else { -0.0 });
    let columns = vec![
        ("key", int(rows.iter().map(|r| r.key))),
        ("text", Arc::new(texts) as ArrayRef),
        // Tables are a second wide at the least.
        ("at", time(rows.iter().map(|r| Some(r.at? * SECOND)))),
        ("value", int(rows.iter().map(|r| Some(r.value)))),
        ("zero", Arc::new(Float64Array::from_iter_values(zeros))),
    ];
    let diffs = rows.iter().map(|r| r.diff).collect();
    Delta::new(batch(columns), Diffs::from_vec(diffs))
}

#[derive(Debug, Clone)]
struct Case {
    on: Vec<usize>,
    anti: bool,
    null_equal: bool,
    append_only: bool,
    close: Option<i64>,
    ticks: Vec<([Vec<Row>; 2], i64)>,
    restart: usize,
    workers: (usize, usize),
}

fn case() -> impl Strategy<Value = Case> {
    let on = prop_oneof![
        Just(vec![0]),
        Just(vec![3, 2]),
        Just(vec![1, 4]),
        Just(vec![2]),
        Just(vec![2, 0]),
        Just(vec![0, 1, 2, 3, 4]),
        Just(vec![]),
    ];
    let slice = || prop::collection::vec(row(), 0..12);
    let tick = ((slice(), slice()).prop_map(|(l, r)| [l, r]), 0i64..12);
    let close = proptest::option::of(0i64..20);
    let run = (
        prop::collection::vec(tick, 1..8),
        0usize..8,
        1usize..4,
        1usize..4,
    );
    (on, any::<[bool; 3]>(), close, run).prop_map(|(on, flags, close, run)| {
        let ([anti, null_equal, append_only], (mut ticks, restart, before, after)) = (flags, run);
        let rows = ticks.iter_mut().flat_map(|(new, _)| new).flatten();
        rows.filter(|_| append_only)
            .for_each(|row| row.diff = row.diff.abs());
        Case {
            close: close.filter(|_| on.contains(&2)),
            on,
            anti,
            null_equal,
            append_only,
            ticks,
            restart,
            workers: (before, after),
        }
    })
}

impl Case {
    fn spec(&self) -> SemiJoinSpec {
        let left = delta(&[]).batch.schema();
        let key = self.on.iter().position(|column| *column == 2);
        SemiJoinSpec {
            right: Arc::new(left.project(&self.on).unwrap()),
            output: Arc::clone(&left),
            left,
            on: self.on.clone(),
            anti: self.anti,
            null_equal: self.null_equal,
            close: self.close.map(|delay| CloseRule {
                key: key.unwrap(),
                delay_us: delay * SECOND,
            }),
            append_only: self.append_only,
        }
    }

    fn is_closed(&self, row: &Row, watermark: i64) -> bool {
        let Some(delay) = self.close.map(|delay| delay * SECOND) else {
            return false;
        };
        let step = (delay / 8).max(SECOND);
        let last = row
            .at
            .map(|at| (at * SECOND).div_euclid(step) * step + step - 1);
        last.is_some_and(|last| watermark >= last + delay)
    }

    /// `None` when the row matches nothing.
    fn key(&self, row: &Row) -> Option<Vec<Option<i64>>> {
        let value = |column: &usize| match column {
            0 => row.key,
            1 => row.text.map(i64::from),
            2 => row.at,
            3 => Some(row.value),
            _ => Some(0),
        };
        let key: Vec<_> = self.on.iter().map(value).collect();
        (self.null_equal || !key.contains(&None)).then_some(key)
    }
}

/// The rows that are open, and what is shown of those that are not.
struct Naive {
    case: Case,
    sides: [Vec<Row>; 2],
    frozen: BTreeMap<String, i64>,
    closed: i64,
}

impl Naive {
    fn show(&self, left: &Row, into: &mut BTreeMap<String, i64>) {
        let key = self.case.key(left);
        let same = |right: &&Row| key.is_some() && self.case.key(right) == key;
        let count: i64 = self.sides[1].iter().filter(same).map(|row| row.diff).sum();
        if (count > 0) != self.case.anti {
            let text = rows(&delta(std::slice::from_ref(left)).batch).remove(0);
            *into.entry(text).or_insert(0) += left.diff;
        }
    }

    fn tick(&mut self, new: &[Vec<Row>; 2], watermark: i64) -> BTreeMap<String, i64> {
        for (side, new) in self.sides.iter_mut().zip(new) {
            let open = new.iter().filter(|r| !self.case.is_closed(r, self.closed));
            side.extend(open.cloned());
        }
        let mut shown = self.frozen.clone();
        for left in &self.sides[0] {
            self.show(left, &mut shown);
        }
        let mut frozen = std::mem::take(&mut self.frozen);
        for left in &self.sides[0] {
            if self.case.is_closed(left, watermark) {
                self.show(left, &mut frozen);
            }
        }
        self.frozen = frozen;
        for side in &mut self.sides {
            side.retain(|row| !self.case.is_closed(row, watermark));
        }
        self.closed = watermark;
        shown.retain(|_, diff| *diff != 0);
        shown
    }
}

struct Workers {
    on: Vec<usize>,
    states: Vec<SemiJoinState>,
}

impl Workers {
    fn new(spec: &SemiJoinSpec, workers: usize) -> Self {
        spec.validate().unwrap();
        let state = |worker| SemiJoinState::new(spec, worker, workers);
        Self {
            on: spec.on.clone(),
            states: (0..workers).map(state).collect(),
        }
    }

    fn tick(&mut self, new: &[Vec<Row>; 2], watermark: i64) -> TickOutput {
        let workers = self.states.len();
        let mut out = TickOutput::default();
        for (worker, state) in self.states.iter_mut().enumerate() {
            let share = |side: usize| -> Vec<Delta> {
                let slices = new[side].chunks(4).map(delta).filter_map(|mut delta| {
                    let key = |c: &usize| Arc::clone(delta.batch.column(*c));
                    let keys: Vec<ArrayRef> = self.on.iter().map(key).collect();
                    let hashes = hash_columns(&keys, delta.len()).unwrap();
                    if side == 1 {
                        delta.batch = delta.batch.project(&self.on).unwrap();
                    }
                    let mine = hashes
                        .iter()
                        .map(|h| Some(owner(key_group(*h), workers) == worker));
                    delta.filter(&mine.collect())
                });
                slices.collect()
            };
            let tick = state.tick(&share(0), &share(1), watermark);
            assert!(tick.errors.is_empty());
            out.deltas.extend(tick.deltas);
        }
        out
    }

    fn rows(&self) -> u64 {
        self.states.iter().map(Stateful::rows).sum()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]
    #[test]
    fn equals_a_recomputation_at_every_tick(case in case(), budget in budget()) {
        let _entered = enter(budget);
        let spec = case.spec();
        let mut workers = Workers::new(&spec, case.workers.0);
        let mut naive = Naive {
            case: case.clone(),
            sides: [vec![], vec![]],
            frozen: BTreeMap::new(),
            closed: NO_WATERMARK,
        };
        let mut got = BTreeMap::new();
        let mut watermark = NO_WATERMARK;
        for (number, (new, step)) in case.ticks.iter().enumerate() {
            if number == case.restart {
                let parts = workers.states.iter_mut().flat_map(|s| stored(s.freeze()));
                let parts: Vec<_> = parts.collect();
                let total = workers.rows();
                workers = Workers::new(&spec, case.workers.1);
                workers.states.iter_mut().for_each(|state| state.restore(&parts).unwrap());
                prop_assert_eq!(workers.rows(), total);
            }
            watermark = match (watermark, *step) {
                (NO_WATERMARK, 0..3) => NO_WATERMARK,
                (NO_WATERMARK, step) => (step - 10) * SECOND,
                (_, 11) => i64::MAX,
                (watermark, step) => watermark.saturating_add(step * SECOND),
            };
            let shown = naive.tick(new, watermark);
            accumulate(&mut got, &workers.tick(new, watermark).deltas);
            prop_assert_eq!(&got, &shown, "tick {}", number);
        }
        if case.close.is_none() && !case.append_only {
            let mut back = [vec![], vec![]];
            for (new, _) in &case.ticks {
                for (back, new) in back.iter_mut().zip(new) {
                    back.extend(new.iter().map(|row| Row { diff: -row.diff, ..row.clone() }));
                }
            }
            accumulate(&mut got, &workers.tick(&back, watermark).deltas);
            prop_assert!(got.is_empty());
            prop_assert_eq!(workers.rows(), 0);
        }
    }
}

#[test]
fn a_key_that_is_replaced_costs_nothing_on_the_left() {
    let case = Case {
        on: vec![0],
        anti: false,
        null_equal: false,
        append_only: false,
        close: None,
        ticks: vec![],
        restart: 0,
        workers: (1, 1),
    };
    let mut workers = Workers::new(&case.spec(), 1);
    let row = |diff| Row {
        key: Some(1),
        text: None,
        at: None,
        value: 0,
        diff,
    };
    let left: Vec<Row> = (0..10).map(|_| row(1)).collect();
    let out = workers.tick(&[left, vec![row(1)]], NO_WATERMARK);
    assert_eq!(out.deltas.iter().map(Delta::len).sum::<usize>(), 10);
    let out = workers.tick(&[vec![], vec![row(-1), row(2)]], NO_WATERMARK);
    assert!(out.deltas.is_empty());
    // Ten equal rows are one row of the state.
    let out = workers.tick(&[vec![], vec![row(-2)]], NO_WATERMARK);
    let diffs = out.deltas.iter().map(|delta| delta.diffs.get(0));
    assert_eq!(diffs.collect::<Vec<_>>(), [-10]);
}
