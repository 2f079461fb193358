//! Random changes on both sides in random slices, against a recomputation.

use std::collections::BTreeMap;

use arrow::array::{Float64Array, StringArray};
use arrow::datatypes::{Field, Schema};
use datafusion::logical_expr::Operator;
use proptest::prelude::*;

use super::*;
use crate::kernel::testing::{accumulate, batch, column, compare, int, rows, stored, time};
use crate::key::{hash_columns, key_group, owner};
use crate::state::testing::{budget, enter};
use crate::time::NO_WATERMARK;

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
    let at = proptest::option::weighted(0.9, -10i64..40);
    let diff = prop_oneof![5 => Just(1i64), 1 => Just(2), 2 => Just(-1)];
    (
        proptest::option::weighted(0.9, 0i64..3),
        text,
        at,
        0i64..4,
        diff,
    )
        .prop_map(|(key, text, at, value, diff)| Row {
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

const SECOND: i64 = 1_000_000;

#[derive(Debug, Clone)]
struct Case {
    on: Vec<(usize, usize)>,
    null_equal: bool,
    filter: bool,
    append_only: bool,
    close: [Option<i64>; 2],
    ticks: Vec<([Vec<Row>; 2], i64)>,
    restart: usize,
    workers: (usize, usize),
}

fn case() -> impl Strategy<Value = Case> {
    let on = prop_oneof![
        Just(vec![(0, 0)]),
        Just(vec![(0, 3), (2, 2)]),
        Just(vec![(1, 1), (4, 4)]),
        Just(vec![(2, 2)]),
        Just(vec![(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]),
        Just(vec![]),
    ];
    let slice = || prop::collection::vec(row(), 0..15);
    let tick = ((slice(), slice()).prop_map(|(l, r)| [l, r]), 0i64..12);
    let close = || proptest::option::of(0i64..20);
    let run = (
        prop::collection::vec(tick, 1..7),
        0usize..7,
        1usize..4,
        1usize..4,
    );
    (on, any::<[bool; 3]>(), close(), close(), run).prop_map(
        |(on, [filter, append_only, null_equal], left, right, run)| {
            let (mut ticks, restart, before, after) = run;
            Case {
                on,
                null_equal,
                filter,
                append_only,
                close: [left, right],
                ticks: {
                    let rows = ticks.iter_mut().flat_map(|(new, _)| new).flatten();
                    rows.filter(|_| append_only)
                        .for_each(|row| row.diff = row.diff.abs());
                    ticks
                },
                restart,
                workers: (before, after),
            }
        },
    )
}

impl Case {
    fn spec(&self) -> JoinSpec {
        let side = delta(&[]).batch.schema();
        let both: Vec<Field> = side
            .fields()
            .iter()
            .chain(side.fields())
            .map(|f| f.as_ref().clone())
            .collect();
        let rule = |delay: i64| CloseRule {
            key: 2,
            delay_us: delay * SECOND,
        };
        JoinSpec {
            left: Arc::clone(&side),
            right: side,
            output: Arc::new(Schema::new(both)),
            on: self.on.clone(),
            null_equal: self.null_equal,
            filter: self
                .filter
                .then(|| compare(column("value", 3), Operator::LtEq, column("value", 8))),
            left_close: self.close[0].map(rule),
            right_close: self.close[1].map(rule),
            append_only: self.append_only,
        }
    }
}

/// Stored rows as (contents, diff), those of the right side after those of the left.
struct Naive {
    case: Case,
    sides: [Vec<Row>; 2],
    shown: BTreeMap<String, i64>,
}

impl Naive {
    fn matches(&self, left: &Row, right: &Row) -> bool {
        let value = |row: &Row, column: usize| match column {
            0 => row.key,
            1 => row.text.map(i64::from),
            2 => row.at,
            3 => Some(row.value),
            _ => Some(0),
        };
        let equal = |(l, r): &(usize, usize)| match (value(left, *l), value(right, *r)) {
            (None, None) => self.case.null_equal,
            (l, r) => l == r,
        };
        self.case.on.iter().all(equal) && (!self.case.filter || left.value <= right.value)
    }

    fn show(&mut self, left: &Row, right: &Row) {
        if self.matches(left, right) {
            let one = |row: &Row| rows(&delta(std::slice::from_ref(row)).batch).remove(0);
            let text = format!("{}|{}", one(left), one(right));
            *self.shown.entry(text).or_insert(0) += left.diff * right.diff;
        }
    }

    fn tick(&mut self, new: &[Vec<Row>; 2], watermark: i64) {
        for left in &new[0] {
            for right in self.sides[1].clone() {
                self.show(left, &right);
            }
        }
        self.sides[0].extend(new[0].iter().cloned());
        for right in &new[1] {
            for left in self.sides[0].clone() {
                self.show(&left, right);
            }
        }
        self.sides[1].extend(new[1].iter().cloned());
        for (side, close) in self.sides.iter_mut().zip(self.case.close) {
            let Some(delay) = close.map(|delay| delay * SECOND) else {
                continue;
            };
            let step = (delay / 8).max(SECOND);
            side.retain(|row| {
                let last = row
                    .at
                    .map(|at| (at * SECOND).div_euclid(step) * step + step - 1);
                last.is_none_or(|last| watermark < last + delay)
            });
        }
        self.shown.retain(|_, diff| *diff != 0);
    }
}

struct Workers {
    on: Vec<(usize, usize)>,
    states: Vec<JoinState>,
}

impl Workers {
    fn new(spec: &JoinSpec, workers: usize) -> Self {
        spec.validate().unwrap();
        let spec = Arc::new(spec.clone());
        let state = |worker| JoinState::new(Arc::clone(&spec), worker, workers);
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
                let column = |pair: &(usize, usize)| if side == 0 { pair.0 } else { pair.1 };
                let slices = new[side].chunks(4).map(delta).filter_map(|delta| {
                    let keys: Vec<ArrayRef> = self
                        .on
                        .iter()
                        .map(|p| Arc::clone(delta.batch.column(column(p))))
                        .collect();
                    let hashes = hash_columns(&keys, delta.len()).unwrap();
                    let mine = hashes
                        .iter()
                        .map(|h| Some(owner(key_group(*h), workers) == worker));
                    delta.filter(&mine.collect())
                });
                slices.collect()
            };
            let tick = state.tick(&share(0), &share(1), watermark);
            out.deltas.extend(tick.deltas);
            out.errors.extend(tick.errors);
        }
        out
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn equals_a_recomputation_at_every_tick(case in case(), budget in budget()) {
        let _entered = enter(budget);
        let spec = case.spec();
        let mut workers = Workers::new(&spec, case.workers.0);
        let mut naive =
            Naive { case: case.clone(), sides: [vec![], vec![]], shown: BTreeMap::new() };
        let mut got = BTreeMap::new();
        let mut watermark = NO_WATERMARK;
        for (number, (new, step)) in case.ticks.iter().enumerate() {
            if number == case.restart {
                let parts = workers.states.iter_mut().flat_map(|s| stored(s.freeze()));
                let parts: Vec<_> = parts.collect();
                let total: u64 = workers.states.iter().map(Stateful::rows).sum();
                workers = Workers::new(&spec, case.workers.1);
                workers.states.iter_mut().for_each(|state| state.restore(&parts).unwrap());
                prop_assert_eq!(workers.states.iter().map(Stateful::rows).sum::<u64>(), total);
            }
            watermark = match (watermark, *step) {
                (NO_WATERMARK, 0..3) => NO_WATERMARK,
                (NO_WATERMARK, step) => (step - 10) * SECOND,
                (_, 11) => i64::MAX,
                (watermark, step) => watermark.saturating_add(step * SECOND),
            };
            naive.tick(new, watermark);
            let out = workers.tick(new, watermark);
            prop_assert!(out.errors.is_empty());
            accumulate(&mut got, &out.deltas);
            prop_assert_eq!(&got, &naive.shown, "tick {}", number);
        }
        if case.close == [None, None] && !case.append_only {
            let mut back = [vec![], vec![]];
            for (new, _) in &case.ticks {
                for (back, new) in back.iter_mut().zip(new) {
                    back.extend(new.iter().map(|row| Row { diff: -row.diff, ..row.clone() }));
                }
            }
            accumulate(&mut got, &workers.tick(&back, watermark).deltas);
            prop_assert!(got.is_empty());
            prop_assert_eq!(workers.states.iter().map(Stateful::rows).sum::<u64>(), 0);
        }
    }
}

#[test]
fn a_hot_key_comes_in_bounded_deltas() {
    let case = Case {
        on: vec![(0, 0)],
        null_equal: false,
        filter: false,
        append_only: false,
        close: [None, None],
        ticks: vec![],
        restart: 0,
        workers: (1, 1),
    };
    let mut workers = Workers::new(&case.spec(), 1);
    let row = |at| Row {
        key: Some(1),
        text: None,
        at: Some(at),
        value: 0,
        diff: 1,
    };
    let many: Vec<Row> = (0..400).map(row).collect();
    let out = workers.tick(&[many.clone(), many], NO_WATERMARK);
    assert_eq!(out.deltas.iter().map(Delta::len).sum::<usize>(), 160_000);
    assert!(out.deltas.iter().all(|delta| delta.len() <= OUTPUT_ROWS));
}
