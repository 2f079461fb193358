//! Random changes in random slices on changing numbers of workers, against a recomputation.

use std::collections::BTreeMap;
use std::sync::Arc;

use std::ops::Range;

use arrow::array::{
    ArrayRef, BooleanArray, Decimal128Array, Float64Array, Int64Array, RecordBatch, StringArray,
};
use arrow::datatypes::{Field, Schema};
use proptest::prelude::*;

use super::super::preaggregate::PreAggregate;
use super::*;
use crate::kernel::testing::{accumulate, batch, int, rows, stored, time};
use crate::kernel::window::windowed_schema;
use crate::key::{hash_columns, key_group, owner};
use crate::plan::AggregateKind;
use crate::state::testing::{budget, enter};
use crate::time::NO_WATERMARK;
use arrow::datatypes::TimestampMicrosecondType;

#[derive(Debug, Clone)]
struct Row {
    key: Option<i64>,
    text: Option<u8>,
    at: Option<i64>,
    value: Option<i64>,
    quarters: Option<i64>,
    cents: Option<i64>,
    chosen: Option<bool>,
    diff: i64,
}

fn row() -> impl Strategy<Value = Row> {
    let maybe = |range: Range<i64>| proptest::option::weighted(0.85, range);
    let chosen = proptest::option::weighted(0.9, any::<bool>());
    let text = proptest::option::weighted(0.9, 0u8..3);
    let diff = prop_oneof![4 => Just(1i64), 1 => Just(2), 3 => Just(-1)];
    (
        maybe(0..4),
        text,
        maybe(-30..60),
        maybe(-9..9),
        maybe(-40..40),
        maybe(-500..500),
        chosen,
        diff,
    )
        .prop_map(
            |(key, text, at, value, quarters, cents, chosen, diff)| Row {
                key,
                text,
                at,
                value,
                quarters,
                cents,
                chosen,
                diff,
            },
        )
}

fn text(t: Option<u8>) -> Option<String> {
    t.map(|t| ["", "b", "bb"][t as usize].to_string())
}

/// Columns: key, text, at, value, float, decimal, chosen.
fn input(rows: &[Row]) -> Delta {
    let floats = rows.iter().map(|r| r.quarters.map(|q| q as f64 / 4.0));
    let cents = rows.iter().map(|r| r.cents.map(i128::from));
    let cents = cents
        .collect::<Decimal128Array>()
        .with_precision_and_scale(12, 2)
        .unwrap();
    let columns = vec![
        ("key", int(rows.iter().map(|r| r.key))),
        (
            "text",
            Arc::new(rows.iter().map(|r| text(r.text)).collect::<StringArray>()) as ArrayRef,
        ),
        ("at", time(rows.iter().map(|r| r.at))),
        ("value", int(rows.iter().map(|r| r.value))),
        ("float", Arc::new(floats.collect::<Float64Array>())),
        ("cents", Arc::new(cents)),
        (
            "chosen",
            Arc::new(rows.iter().map(|r| r.chosen).collect::<BooleanArray>()),
        ),
    ];
    Delta::new(
        batch(columns),
        Diffs::from_vec(rows.iter().map(|r| r.diff).collect()),
    )
}

const OWN: usize = 7;

fn calls() -> Vec<AggregateCall> {
    use AggregateKind::{Avg, Count, Max, Min, Sum};
    let decimal = |scale| DataType::Decimal128(38, scale);
    let call = |kind, input, filter, output| AggregateCall {
        kind,
        input,
        filter,
        output,
    };
    vec![
        call(Count, None, None, DataType::Int64),
        call(Count, Some(3), Some(6), DataType::Int64),
        call(Sum, Some(3), None, decimal(0)),
        call(Avg, Some(3), Some(6), decimal(6)),
        call(Sum, Some(4), None, DataType::Float64),
        call(Avg, Some(4), None, DataType::Float64),
        call(Sum, Some(5), None, decimal(2)),
        call(Avg, Some(5), None, decimal(6)),
        call(Min, Some(3), None, DataType::Int64),
        call(Max, Some(4), Some(6), DataType::Float64),
        call(Max, Some(1), None, DataType::Utf8),
        call(Min, Some(5), None, DataType::Decimal128(12, 2)),
    ]
}

#[derive(Debug, Clone)]
struct Case {
    window: Option<TimeWindow>,
    keys: Vec<usize>,
    close: Option<CloseRule>,
    emit: Emit,
    lateness: i64,
    append_only: bool,
    /// Bits choose among the calls.
    calls: u16,
    ticks: Vec<(Vec<Row>, i64)>,
    restart: usize,
    workers: (usize, usize),
}

fn case() -> impl Strategy<Value = Case> {
    let window = prop_oneof![
        Just(None),
        (1i64..12).prop_map(|n| Some(TimeWindow {
            size_us: n,
            slide_us: n
        })),
        (1i64..20, 1i64..9).prop_map(|(size_us, slide_us)| Some(TimeWindow { size_us, slide_us })),
    ];
    let ticks = prop::collection::vec((prop::collection::vec(row(), 0..30), 0i64..25), 1..8);
    let shape = (
        window,
        0usize..6,
        any::<bool>(),
        any::<bool>(),
        0i64..6,
        -2i64..3,
    );
    let run = (
        ticks,
        0usize..8,
        1usize..4,
        1usize..4,
        any::<bool>(),
        any::<u16>(),
    );
    (shape, run).prop_map(
        |(shape, (ticks, restart, before, after, append_only, calls))| {
            let (window, keys, closes, on_close, lateness, delay_us) = shape;
            let keys = match (keys, window.is_some()) {
                (0, _) => vec![],
                (1, _) => vec![0],
                (2, true) => vec![OWN, 0],
                (3, true) => vec![0, OWN + 1],
                (4, true) => vec![OWN, OWN + 1, 1, 0],
                (2 | 3, false) => vec![2],
                (4, false) => vec![1, 2, 0],
                _ => vec![2, 1],
            };
            let closing = keys.iter().position(|k| *k == 2 || *k >= OWN);
            let close = closing
                .filter(|_| closes)
                .map(|key| CloseRule { key, delay_us });
            let emit = if close.is_some() && on_close {
                Emit::OnClose
            } else {
                Emit::Changes
            };
            Case {
                window,
                keys,
                close,
                emit,
                lateness,
                append_only,
                calls,
                ticks,
                restart,
                workers: (before, after),
            }
        },
    )
}

impl Case {
    fn spec(&self) -> AggregateSpec {
        let input = input(&[]).batch.schema();
        let windowed = windowed_schema(&input);
        let chosen = calls()
            .into_iter()
            .enumerate()
            .filter(|(at, _)| self.calls >> at & 1 == 1);
        let calls: Vec<_> = chosen.map(|(_, call)| call).collect();
        let keys = self.keys.iter().map(|k| windowed.field(*k).clone());
        let outputs = calls
            .iter()
            .map(|c| Field::new("a", c.output.clone(), false));
        let output = Schema::new(keys.chain(outputs).collect::<Vec<_>>());
        AggregateSpec {
            input: if self.window.is_some() {
                windowed
            } else {
                input
            },
            window: self.window.map(|window| (2, window)),
            keys: self.keys.clone(),
            calls,
            close: self.close,
            emit: self.emit,
            allowed_lateness_us: self.lateness,
            retracting: !self.append_only,
            output: Arc::new(output),
        }
    }

    fn ticks(&self) -> Vec<(Vec<Row>, i64)> {
        let mut ticks = self.ticks.clone();
        if self.append_only {
            ticks
                .iter_mut()
                .flat_map(|t| &mut t.0)
                .for_each(|row| row.diff = row.diff.abs());
        }
        let mut watermark = NO_WATERMARK;
        for (number, tick) in ticks.iter_mut().enumerate() {
            watermark = match (number, tick.1) {
                (0, _) => watermark,
                (_, step) if watermark == NO_WATERMARK => step - 30,
                (_, 24) => i64::MAX,
                (_, step) => watermark.saturating_add(step),
            };
            tick.1 = watermark;
        }
        ticks
    }
}

/// A row in its window, if there is one.
type Windowed = (Row, Option<(i64, i64)>);

/// What the whole input so far gives, computed from scratch.
struct Naive {
    case: Case,
    spec: AggregateSpec,
    on_time: Vec<Windowed>,
    late: BTreeMap<String, i64>,
}

impl Naive {
    fn key_time(&self, (row, window): &Windowed) -> Option<i64> {
        let close = self.case.close?;
        match self.case.keys[close.key] {
            2 => row.at,
            OWN => window.map(|w| w.0),
            _ => window.map(|w| w.1),
        }
    }
    fn closed(&self, time: Option<i64>, watermark: i64) -> bool {
        let Some(close) = self.case.close else {
            return false;
        };
        let Some(time) = time else {
            return false;
        };
        watermark != NO_WATERMARK && time + close.delay_us + self.case.lateness <= watermark
    }

    fn take(&mut self, tick: &[Row], watermark: i64) {
        for row in tick {
            let windows: Vec<_> = match (self.case.window, row.at) {
                (None, _) => vec![None],
                (Some(_), None) => vec![],
                (Some(w), Some(at)) => {
                    let starts = (-100..100).map(|n| n * w.slide_us);
                    let starts = starts.filter(|s| *s <= at && at < s + w.size_us);
                    starts.map(|s| Some((s, s + w.size_us))).collect()
                }
            };
            for window in windows {
                let windowed = (row.clone(), window);
                let closing = self.key_time(&windowed);
                if self.closed(closing, watermark) {
                    let delta = input(std::slice::from_ref(row));
                    let mut columns = delta.batch.columns().to_vec();
                    if let Some((start, end)) = window {
                        columns.extend([time([Some(start)]), time([Some(end)])]);
                    }
                    let delta =
                        Delta::new(build(&nullable(&self.spec.input), columns, 1), delta.diffs);
                    accumulate(&mut self.late, [&delta]);
                } else {
                    self.on_time.push(windowed);
                }
            }
        }
    }

    fn shown(&self, watermark: i64) -> BTreeMap<String, i64> {
        let mut groups: BTreeMap<String, (Option<i64>, Vec<&Windowed>)> = BTreeMap::new();
        for windowed in &self.on_time {
            let (row, window) = windowed;
            let all = input(std::slice::from_ref(row));
            let window = window.unwrap_or((0, 0));
            let key = self.case.keys.iter().map(|key| match *key {
                OWN => time([Some(window.0)]),
                8 => time([Some(window.1)]),
                own => Arc::clone(all.batch.column(own)),
            });
            let key = key
                .enumerate()
                .map(|(n, c)| (["a", "b", "c", "d"][n], c))
                .collect::<Vec<_>>();
            let name = if key.is_empty() {
                String::new()
            } else {
                rows(&batch(key)).remove(0)
            };
            let time = self.key_time(windowed);
            groups
                .entry(name)
                .or_insert((time, vec![]))
                .1
                .push(windowed);
        }
        if self.case.keys.is_empty() {
            groups.entry(String::new()).or_default();
        }
        let mut shown = BTreeMap::new();
        for (key, (time, members)) in groups {
            let count: i64 = members.iter().map(|(row, _)| row.diff).sum();
            if count <= 0 && !self.case.keys.is_empty() {
                continue;
            }
            if self.case.emit == Emit::OnClose && !self.closed(time, watermark) {
                continue;
            }
            let members: Vec<_> = members.into_iter().map(|(row, _)| row).collect();
            let mut row = if self.case.keys.is_empty() {
                vec![]
            } else {
                vec![key]
            };
            let values: Vec<ArrayRef> = naive_calls(&members);
            for (at, value) in values.into_iter().enumerate() {
                if self.case.calls >> at & 1 == 1 {
                    row.push(rows(&batch(vec![("v", value)])).remove(0));
                }
            }
            *shown.entry(row.join("|")).or_insert(0) += 1;
        }
        shown
    }
}

fn naive_calls(members: &[&Row]) -> Vec<ArrayRef> {
    type Get = fn(&Row) -> Option<i64>;
    let sum = |get: Get, all: bool| {
        let used = members.iter().filter(|r| all || r.chosen == Some(true));
        let used: Vec<_> = used.filter_map(|r| Some((get(r)?, r.diff))).collect();
        let count: i64 = used.iter().map(|(_, d)| d).sum();
        (count, used.iter().map(|(v, d)| v * d).sum::<i64>())
    };
    let best = |get: Get, all: bool, max: bool| {
        let mut counts: BTreeMap<i64, i64> = BTreeMap::new();
        for row in members.iter().filter(|r| all || r.chosen == Some(true)) {
            if let Some(value) = get(row) {
                *counts.entry(value).or_default() += row.diff;
            }
        }
        let present = counts
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .map(|(value, _)| value);
        if max { present.last() } else { present.min() }
    };
    let decimal = |value: Option<i128>, scale: i8| -> ArrayRef {
        let array = Decimal128Array::from(vec![value]);
        Arc::new(array.with_precision_and_scale(38, scale).unwrap())
    };
    let float = |value: Option<f64>| -> ArrayRef { Arc::new(Float64Array::from(vec![value])) };
    let average = |(count, sum): (i64, i64), factor: i128| {
        (count > 0).then(|| {
            let exact = i128::from(sum) * factor;
            let (n, d) = (exact.abs(), i128::from(count).abs());
            let rounded = (2 * n + d) / (2 * d);
            if (exact < 0) == (count < 0) {
                rounded
            } else {
                -rounded
            }
        })
    };
    let some = |(count, sum): (i64, i64)| (count > 0).then_some(sum);
    let value: Get = |r| r.value;
    let quarters: Get = |r| r.quarters;
    let cents: Get = |r| r.cents;
    let texts: Get = |r| r.text.map(i64::from);
    vec![
        int([Some(members.iter().map(|r| r.diff).sum())]),
        int([Some(sum(value, false).0)]),
        decimal(some(sum(value, true)).map(i128::from), 0),
        decimal(average(sum(value, false), 1_000_000), 6),
        float(some(sum(quarters, true)).map(|q| q as f64 / 4.0)),
        float(some(sum(quarters, true)).map(|q| q as f64 / 4.0 / sum(quarters, true).0 as f64)),
        decimal(some(sum(cents, true)).map(i128::from), 2),
        decimal(average(sum(cents, true), 10_000), 6),
        int([best(value, true, false)]),
        float(best(quarters, false, true).map(|q| q as f64 / 4.0)),
        Arc::new(StringArray::from(vec![text(
            best(texts, true, true).map(|t| t as u8),
        )])),
        {
            let cents = best(cents, true, false).map(i128::from);
            let array = Decimal128Array::from(vec![cents]);
            Arc::new(array.with_precision_and_scale(12, 2).unwrap())
        },
    ]
}

/// The aggregate on some workers.
struct Workers {
    keys: usize,
    pre: Vec<PreAggregate>,
    states: Vec<AggregateState>,
}

impl Workers {
    fn new(spec: &AggregateSpec, workers: usize) -> Self {
        spec.validate().unwrap();
        let spec = Arc::new(spec.clone());
        let state = |worker| AggregateState::new(Arc::clone(&spec), worker, workers);
        Self {
            keys: spec.keys.len(),
            pre: (0..workers)
                .map(|_| PreAggregate::new(Arc::clone(&spec)))
                .collect(),
            states: (0..workers).map(state).collect(),
        }
    }

    fn tick(&mut self, rows: &[Row], before: i64, watermark: i64) -> (TickOutput, Vec<Delta>) {
        let workers = self.states.len();
        let (mut output, mut late) = (TickOutput::default(), Vec::new());
        for (number, slice) in rows.chunks(7).enumerate() {
            let pre = &mut self.pre[number % workers];
            let reduced = pre.apply(input(slice), before);
            late.extend(reduced.late);
            output.errors.extend(reduced.errors);
            let Some(partial) = reduced.partials.into_iter().next() else {
                continue;
            };
            let keys = &partial.batch.columns()[..self.keys];
            let hashes = hash_columns(keys, partial.len()).unwrap();
            for (worker, state) in self.states.iter_mut().enumerate() {
                let mine = hashes
                    .iter()
                    .map(|h| Some(owner(key_group(*h), workers) == worker));
                if let Some(mine) = partial.filter(&mine.collect()) {
                    state.apply(&[mine]);
                }
            }
        }
        for state in &mut self.states {
            let out = state.finish(watermark);
            output.deltas.extend(out.deltas);
            output.errors.extend(out.errors);
        }
        (output, late)
    }

    fn restart(&mut self, spec: &AggregateSpec, workers: usize) {
        let parts: Vec<_> = self
            .states
            .iter_mut()
            .flat_map(|s| stored(s.freeze()))
            .collect();
        let total: u64 = self.states.iter().map(Stateful::rows).sum();
        *self = Self::new(spec, workers);
        self.states
            .iter_mut()
            .for_each(|state| state.restore(&parts).unwrap());
        assert_eq!(self.states.iter().map(Stateful::rows).sum::<u64>(), total);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn equals_a_recomputation_at_every_tick(case in case(), budget in budget()) {
        let _entered = enter(budget);
        let spec = case.spec();
        let mut workers = Workers::new(&spec, case.workers.0);
        let (on_time, late) = (Vec::new(), BTreeMap::new());
        let mut naive = Naive { case: case.clone(), spec: spec.clone(), on_time, late };
        let (mut got, mut got_late) = (BTreeMap::new(), BTreeMap::new());
        let mut before = NO_WATERMARK;
        for (number, (rows, watermark)) in case.ticks().into_iter().enumerate() {
            if number == case.restart {
                workers.restart(&spec, case.workers.1);
            }
            naive.take(&rows, before);
            let (output, late) = workers.tick(&rows, before, watermark);
            prop_assert!(output.errors.is_empty());
            accumulate(&mut got, &output.deltas);
            accumulate(&mut got_late, &late);
            prop_assert_eq!(&got, &naive.shown(watermark), "tick {}", number);
            prop_assert_eq!(&got_late, &naive.late);
            before = watermark;
        }
        // Taking everything back leaves nothing, neither shown nor stored.
        if case.close.is_none() && !case.append_only {
            let mut back: Vec<Row> = case.ticks().into_iter().flat_map(|t| t.0).collect();
            back.iter_mut().for_each(|row| row.diff = -row.diff);
            let (output, _) = workers.tick(&back, before, before);
            accumulate(&mut got, &output.deltas);
            let groups = usize::from(case.keys.is_empty());
            prop_assert_eq!(got.len(), groups);
            prop_assert_eq!(workers.states.iter().map(Stateful::rows).sum::<u64>(), groups as u64);
        }
    }
}

fn sum_of(column: ArrayRef, output: DataType) -> (AggregateSpec, RecordBatch) {
    let input = batch(vec![("k", int(vec![Some(1); column.len()])), ("v", column)]);
    let call = AggregateCall {
        kind: AggregateKind::Sum,
        input: Some(1),
        filter: None,
        output,
    };
    let fields = vec![
        Field::new("k", DataType::Int64, true),
        Field::new("s", call.output.clone(), true),
    ];
    let spec = AggregateSpec {
        input: input.schema(),
        window: None,
        keys: vec![0],
        calls: vec![call],
        close: None,
        emit: Emit::Changes,
        allowed_lateness_us: 0,
        retracting: true,
        output: Arc::new(Schema::new(fields)),
    };
    (spec, input)
}

#[test]
fn an_overflowing_sum_is_the_error_of_its_group_until_taken_back() {
    let large = 6 * 10i128.pow(37);
    let column = Decimal128Array::from(vec![large, large])
        .with_precision_and_scale(38, 0)
        .unwrap();
    let (spec, input) = sum_of(Arc::new(column), DataType::Decimal128(38, 0));
    let mut pre = PreAggregate::new(Arc::new(spec.clone()));
    let mut state = AggregateState::new(Arc::new(spec), 0, 1);
    let mut tick = |from: usize, diff: i64| {
        let slice = input.slice(from, 1);
        let delta = Delta::new(slice, Diffs::from_vec(vec![diff]));
        state.apply(&pre.apply(delta, NO_WATERMARK).partials);
        state.finish(NO_WATERMARK)
    };
    let (mut shown, mut errors) = (BTreeMap::new(), BTreeMap::new());
    let mut step = |from, diff| {
        let out = tick(from, diff);
        accumulate(&mut shown, &out.deltas);
        accumulate(&mut errors, &out.errors);
        (shown.clone(), errors.clone())
    };
    let first = step(0, 1);
    assert_eq!(first.0, [(format!("1|{large}"), 1)].into());
    let second = step(1, 1);
    assert!(second.0.is_empty());
    assert_eq!(
        second.1,
        [("22003|\"s\" is out of range".to_string(), 1)].into()
    );
    assert_eq!(step(1, 1).1.len(), 1);
    assert_eq!(step(1, -2), first);
}

#[test]
fn an_unchanged_result_is_not_shown_again() {
    let column: ArrayRef = Arc::new(Int64Array::from(vec![5, 0]));
    let (spec, input) = sum_of(column, DataType::Decimal128(38, 0));
    let mut pre = PreAggregate::new(Arc::new(spec.clone()));
    let mut state = AggregateState::new(Arc::new(spec), 0, 1);
    for (row, shown) in [(0, 1), (1, 0)] {
        let delta = Delta::inserts(input.slice(row, 1));
        state.apply(&pre.apply(delta, NO_WATERMARK).partials);
        assert_eq!(state.finish(NO_WATERMARK).deltas.len(), shown);
    }
    assert!(state.finish(NO_WATERMARK).deltas.is_empty());
}

#[test]
fn closed_windows_leave_no_state() {
    let case = Case {
        window: Some(TimeWindow {
            size_us: 10,
            slide_us: 2,
        }),
        keys: vec![OWN, 0],
        close: Some(CloseRule {
            key: 0,
            delay_us: 10,
        }),
        emit: Emit::OnClose,
        lateness: 0,
        append_only: false,
        calls: 0xfff,
        ticks: vec![],
        restart: 0,
        workers: (1, 1),
    };
    let mut workers = Workers::new(&case.spec(), 1);
    let row = |at| Row {
        key: Some(1),
        text: Some(1),
        at: Some(at),
        value: Some(1),
        quarters: Some(1),
        cents: Some(1),
        chosen: Some(true),
        diff: 1,
    };
    let (first, _) = workers.tick(&[row(3), row(14)], NO_WATERMARK, 4);
    assert_eq!(first.deltas.iter().map(Delta::len).sum::<usize>(), 1); // the window -6..4
    let (second, late) = workers.tick(&[row(3)], 4, 16);
    assert_eq!(late.iter().map(Delta::len).sum::<usize>(), 1);
    let starts = second.deltas.iter().flat_map(|delta| {
        delta
            .batch
            .column(0)
            .as_primitive::<TimestampMicrosecondType>()
            .values()
            .to_vec()
    });
    let starts: Vec<i64> = starts.collect();
    let mut sorted = starts.clone();
    sorted.sort();
    assert_eq!(starts, sorted);
    workers.tick(&[], 16, i64::MAX);
    assert_eq!(workers.states[0].rows(), 0);
}

/// Runs one tick of an aggregation without keys; gives its rows.
fn once(
    columns: Vec<(&str, ArrayRef)>,
    calls: Vec<AggregateCall>,
    retracting: bool,
) -> Vec<String> {
    let input = batch(columns);
    let fields = calls
        .iter()
        .map(|c| Field::new("a", c.output.clone(), true));
    let spec = AggregateSpec {
        input: input.schema(),
        output: Arc::new(Schema::new(fields.collect::<Vec<_>>())),
        keys: vec![],
        calls,
        close: None,
        emit: Emit::Changes,
        allowed_lateness_us: 0,
        window: None,
        retracting,
    };
    spec.validate().unwrap();
    let spec = Arc::new(spec);
    let mut state = AggregateState::new(Arc::clone(&spec), 0, 1);
    state.apply(
        &PreAggregate::new(spec)
            .apply(Delta::inserts(input), NO_WATERMARK)
            .partials,
    );
    rows(&state.finish(NO_WATERMARK).deltas[0].batch)
}

fn on(kind: AggregateKind, input: usize, output: &DataType) -> AggregateCall {
    AggregateCall {
        kind,
        input: Some(input),
        filter: None,
        output: output.clone(),
    }
}

#[test]
fn extremes_of_every_type_follow_its_order() {
    use arrow::array::{Date32Array, Float32Array, UInt64Array};
    let columns: Vec<(ArrayRef, &str)> = vec![
        (
            Arc::new(Float64Array::from(vec![Some(f64::NAN), Some(-1.5), None])),
            "-1.5|NaN",
        ),
        (
            Arc::new(Float64Array::from(vec![-0.0, -0.0, -0.0])),
            "0.0|0.0",
        ),
        (
            Arc::new(Float32Array::from(vec![f32::INFINITY, -2.0, 1.0])),
            "-2.0|inf",
        ),
        (
            Arc::new(UInt64Array::from(vec![u64::MAX, 0, 7])),
            "0|18446744073709551615",
        ),
        (
            Arc::new(BooleanArray::from(vec![Some(true), None, Some(true)])),
            "true|true",
        ),
        (
            Arc::new(Date32Array::from(vec![-1, 0, 1])),
            "1969-12-31|1970-01-02",
        ),
        (Arc::new(StringArray::from(vec!["b", "", "bb"])), "|bb"),
        (
            Arc::new(StringArray::from(vec![None::<&str>, None, None])),
            "∅|∅",
        ),
        (Arc::new(Int64Array::from(vec![None, None, None])), "∅|∅"),
    ];
    for (column, want) in columns {
        for retracting in [false, true] {
            let of = column.data_type().clone();
            let calls = vec![
                on(AggregateKind::Min, 0, &of),
                on(AggregateKind::Max, 0, &of),
            ];
            let got = once(vec![("v", Arc::clone(&column))], calls, retracting);
            assert_eq!(got, [want], "{of}, retracting: {retracting}");
        }
    }
}

#[test]
fn sums_take_every_type_of_number() {
    use arrow::array::{Float32Array, Int8Array, UInt64Array};
    let decimal = DataType::Decimal128(38, 0);
    let columns: Vec<(ArrayRef, DataType, &str)> = vec![
        (
            Arc::new(Int8Array::from(vec![-128, -128])),
            decimal.clone(),
            "-256",
        ),
        (
            Arc::new(Int64Array::from(vec![i64::MAX, i64::MAX])),
            decimal.clone(),
            "18446744073709551614",
        ),
        (
            Arc::new(UInt64Array::from(vec![u64::MAX, 1])),
            decimal,
            "18446744073709551616",
        ),
        (
            Arc::new(Float32Array::from(vec![0.5, 1e10])),
            DataType::Float64,
            "10000000000.5",
        ),
        (
            Arc::new(Float64Array::from(vec![1e300, -1e300])),
            DataType::Float64,
            "0.0",
        ),
    ];
    for (column, output, want) in columns {
        let of = column.data_type().clone();
        let got = once(
            vec![("v", column)],
            vec![on(AggregateKind::Sum, 0, &output)],
            true,
        );
        assert_eq!(got, [want], "{of}");
    }
}

#[test]
fn equal_zeros_are_one_group() {
    let column: ArrayRef = Arc::new(Float64Array::from(vec![0.0, -0.0, f64::NAN, -f64::NAN]));
    let input = batch(vec![("k", column)]);
    let spec = Arc::new(AggregateSpec {
        input: input.schema(),
        output: Arc::new(Schema::new(vec![
            Field::new("k", DataType::Float64, true),
            Field::new("n", DataType::Int64, true),
        ])),
        keys: vec![0],
        calls: vec![AggregateCall {
            kind: AggregateKind::Count,
            input: None,
            filter: None,
            output: DataType::Int64,
        }],
        close: None,
        emit: Emit::Changes,
        allowed_lateness_us: 0,
        window: None,
        retracting: true,
    });
    let mut pre = PreAggregate::new(Arc::clone(&spec));
    let mut state = AggregateState::new(spec, 0, 1);
    let mut shown = BTreeMap::new();
    for row in 0..4 {
        let delta = Delta::inserts(input.slice(row, 1));
        state.apply(&pre.apply(delta, NO_WATERMARK).partials);
        accumulate(&mut shown, &state.finish(NO_WATERMARK).deltas);
    }
    assert_eq!(
        shown,
        [("0.0|2".to_string(), 1), ("NaN|2".to_string(), 1)].into()
    );
}

#[test]
fn an_aggregate_can_read_the_bounds_of_its_window() {
    let plain = batch(vec![("at", time([Some(3), None, Some(i64::MAX), Some(8)]))]);
    let input = windowed_schema(&plain.schema());
    let timestamp = input.field(0).data_type().clone();
    let spec = Arc::new(AggregateSpec {
        output: Arc::new(Schema::new(vec![Field::new(
            "last",
            timestamp.clone(),
            true,
        )])),
        input,
        keys: vec![],
        calls: vec![on(AggregateKind::Max, 2, &timestamp)],
        close: None,
        emit: Emit::Changes,
        allowed_lateness_us: 0,
        window: Some((
            0,
            TimeWindow {
                size_us: 10,
                slide_us: 5,
            },
        )),
        retracting: false,
    });
    let mut state = AggregateState::new(Arc::clone(&spec), 0, 1);
    let out = PreAggregate::new(spec).apply(Delta::inserts(plain), NO_WATERMARK);
    assert_eq!(out.errors.iter().map(Delta::len).sum::<usize>(), 1); // the end of time has no window
    state.apply(&out.partials);
    let shown = state.finish(NO_WATERMARK).deltas;
    let last = shown[0]
        .batch
        .column(0)
        .as_primitive::<TimestampMicrosecondType>()
        .value(0);
    assert_eq!(last, 15);
}

#[test]
fn event_times_as_keys_share_a_table() {
    let case = Case {
        window: None,
        keys: vec![2],
        close: Some(CloseRule {
            key: 0,
            delay_us: 0,
        }),
        emit: Emit::Changes,
        lateness: 0,
        append_only: true,
        calls: 1,
        ticks: vec![],
        restart: 0,
        workers: (1, 1),
    };
    let mut workers = Workers::new(&case.spec(), 1);
    let row = |at| Row {
        key: Some(1),
        text: None,
        at: Some(at),
        value: None,
        quarters: None,
        cents: None,
        chosen: None,
        diff: 1,
    };
    let rows: Vec<Row> = (0..500).map(|n| row(n * 1_999)).collect();
    workers.tick(&rows, NO_WATERMARK, NO_WATERMARK);
    assert!(workers.states[0].freeze().len() <= 2);
    assert_eq!(workers.states[0].rows(), 500);
    // As long as one of them may change, all are kept.
    workers.tick(&[], NO_WATERMARK, 998_000);
    assert_eq!(workers.states[0].rows(), 500);
    workers.tick(&[], 998_000, 999_999);
    assert_eq!(workers.states[0].rows(), 0);
}
