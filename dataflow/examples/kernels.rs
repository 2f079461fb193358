//! Prints how many rows per CPU-second the stateful kernels take, one thread, batches in memory.
//!
//! `cargo run --release --example kernels [preaggregate|state|whole|join|windowed_join]`; the numbers
//! mean something at opt-level 3 only.

use std::sync::Arc;

use arrow::array::{
    ArrayRef, AsArray, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit, TimestampMicrosecondType};
use millrace_dataflow::delta::{Delta, Diffs};
use millrace_dataflow::kernel::aggregate::{AggregateSpec, AggregateState};
use millrace_dataflow::kernel::join::{JoinSpec, JoinState};
use millrace_dataflow::kernel::preaggregate::PreAggregate;
use millrace_dataflow::plan::{AggregateCall, AggregateKind, CloseRule, Emit, TimeWindow};
use millrace_dataflow::state::Stateful;
use millrace_dataflow::time::NO_WATERMARK;

const BATCH: usize = 65_536;
const SECOND: i64 = 1_000_000;

fn main() {
    let only = std::env::args().nth(1);
    let parts: [(&str, fn()); 5] = [
        ("preaggregate", preaggregate),
        ("state", state),
        ("whole", whole),
        ("join", join),
        ("windowed_join", windowed_join),
    ];
    for (name, part) in parts {
        if only.as_deref().is_none_or(|only| only == name) {
            part();
        }
    }
}

/// CPU time of this thread, in seconds.
fn cpu() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let first = text
        .split_whitespace()
        .next()
        .and_then(|n| n.parse::<f64>().ok());
    first.expect("the kernel counts CPU time") / 1e9
}

fn report(name: &str, rows: usize, mut run: impl FnMut()) {
    let before = cpu();
    run();
    let seconds = cpu() - before;
    println!(
        "{name:<58} {:>7.2} M rows per CPU-second",
        rows as f64 / seconds / 1e6
    );
}

/// Splitmix: spreads numbers, the same ones in each run.
fn scatter(n: u64) -> u64 {
    let mut z = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

fn timestamp() -> DataType {
    DataType::Timestamp(TimeUnit::Microsecond, None)
}

fn schema(columns: &[(&str, DataType)]) -> SchemaRef {
    let fields = columns
        .iter()
        .map(|(name, t)| Field::new(*name, t.clone(), true));
    Arc::new(Schema::new(fields.collect::<Vec<_>>()))
}

fn columns_of_input() -> Vec<(&'static str, DataType)> {
    vec![
        ("key", DataType::Int64),
        ("at", timestamp()),
        ("value", DataType::Int64),
        ("name", DataType::Utf8),
    ]
}

/// Columns key, at, value, name.
fn batches(count: usize, keys: u64, rows_per_second: usize) -> Vec<Delta> {
    let schema = schema(&columns_of_input());
    let one = |batch: usize| {
        let rows = (batch * BATCH..(batch + 1) * BATCH).map(|row| row as u64);
        let key = |row: u64| scatter(row) % keys;
        let at = rows
            .clone()
            .map(|row| row as i64 * SECOND / rows_per_second as i64);
        let columns: Vec<ArrayRef> = vec![
            Arc::new(Int64Array::from_iter_values(
                rows.clone().map(|row| key(row) as i64),
            )),
            Arc::new(TimestampMicrosecondArray::from_iter_values(at)),
            Arc::new(Int64Array::from_iter_values(
                rows.clone().map(|row| (row % 1000) as i64),
            )),
            Arc::new(StringArray::from_iter_values(
                rows.map(|row| format!("name {}", key(row))),
            )),
        ];
        Delta::inserts(RecordBatch::try_new(Arc::clone(&schema), columns).expect("columns fit"))
    };
    (0..count).map(one).collect()
}

fn call(kind: AggregateKind, input: Option<usize>) -> AggregateCall {
    let output = match kind {
        AggregateKind::Sum => DataType::Decimal128(38, 0),
        AggregateKind::Avg => DataType::Decimal128(38, 6),
        AggregateKind::Count | AggregateKind::Min | AggregateKind::Max => DataType::Int64,
    };
    AggregateCall {
        kind,
        input,
        filter: None,
        output,
    }
}

fn spec(
    keys: &[usize],
    calls: Vec<AggregateCall>,
    window: Option<TimeWindow>,
) -> Arc<AggregateSpec> {
    let mut columns = columns_of_input();
    if window.is_some() {
        columns.extend([("window_start", timestamp()), ("window_end", timestamp())]);
    }
    let input = schema(&columns);
    let mut output: Vec<Field> = keys.iter().map(|key| input.field(*key).clone()).collect();
    output.extend(
        calls
            .iter()
            .map(|call| Field::new("a", call.output.clone(), true)),
    );
    let close = window.map(|_| CloseRule {
        key: 0,
        delay_us: 0,
    });
    let spec = AggregateSpec {
        input,
        output: Arc::new(Schema::new(output)),
        keys: keys.to_vec(),
        calls,
        close,
        emit: Emit::Changes,
        allowed_lateness_us: 0,
        window: window.map(|window| (1, window)),
        retracting: false,
    };
    spec.validate().expect("a sound aggregation");
    Arc::new(spec)
}

fn preaggregate() {
    use AggregateKind::{Avg, Count, Max, Sum};
    let hop = TimeWindow {
        size_us: 10 * SECOND,
        slide_us: 2 * SECOND,
    };
    let tumble = TimeWindow {
        size_us: 10 * SECOND,
        slide_us: 10 * SECOND,
    };
    let count = || vec![call(Count, None)];
    let many = vec![call(Sum, Some(2)), call(Avg, Some(2)), call(Max, Some(2))];
    let cases = [
        (
            "count(*) by i64, 1,000 keys",
            1000,
            spec(&[0], count(), None),
        ),
        (
            "count(*) by i64, 30,000 keys",
            30_000,
            spec(&[0], count(), None),
        ),
        (
            "count(*) by text, 1,000 keys",
            1000,
            spec(&[3], count(), None),
        ),
        (
            "sum, avg, max by i64, 1,000 keys",
            1000,
            spec(&[0], many, None),
        ),
        (
            "count(*) by HOP of 5 panes and i64, 1,000 keys",
            1000,
            spec(&[4, 0], count(), Some(hop)),
        ),
        (
            "max by TUMBLE",
            1000,
            spec(&[4], vec![call(Max, Some(2))], Some(tumble)),
        ),
    ];
    for (name, keys, spec) in cases {
        let deltas = batches(16, keys, 50_000);
        let mut pre = PreAggregate::new(spec);
        let rounds = 8;
        report(
            &format!("pre-aggregate: {name}"),
            rounds * deltas.len() * BATCH,
            || {
                for _ in 0..rounds {
                    for delta in &deltas {
                        let out = pre.apply(delta.clone(), NO_WATERMARK);
                        assert!(!out.partials.is_empty());
                    }
                }
            },
        );
    }
}

fn state() {
    use AggregateKind::{Count, Max, Sum};
    let tumble = TimeWindow {
        size_us: 10 * SECOND,
        slide_us: 10 * SECOND,
    };
    let calls = || vec![call(Count, None), call(Sum, Some(2)), call(Max, Some(2))];
    let cases = [
        ("count(*) by i64", spec(&[0], vec![call(Count, None)], None)),
        ("count(*), sum, max by i64", spec(&[0], calls(), None)),
        (
            "count(*) by text",
            spec(&[3], vec![call(Count, None)], None),
        ),
        (
            "count(*) by TUMBLE and i64",
            spec(&[4, 0], vec![call(Count, None)], Some(tumble)),
        ),
    ];
    for (name, spec) in cases {
        let mut pre = PreAggregate::new(Arc::clone(&spec));
        let deltas = batches(16, u64::MAX >> 1, 50_000);
        let partials: Vec<Delta> = deltas
            .into_iter()
            .flat_map(|d| pre.apply(d, NO_WATERMARK).partials)
            .collect();
        let rows = partials.iter().map(Delta::len).sum();
        let mut state = AggregateState::new(spec, 0, 1);
        for round in ["new groups", "old groups"] {
            report(&format!("state: {name}, one tick, {round}"), rows, || {
                state.apply(&partials);
                let out = state.finish(NO_WATERMARK);
                assert!(out.deltas.iter().map(Delta::len).sum::<usize>() >= rows);
            });
        }
        report(&format!("state: {name}, a tick per delta"), rows, || {
            for partial in &partials {
                state.apply(std::slice::from_ref(partial));
                state.finish(NO_WATERMARK);
            }
        });
        println!(
            "{:>58} {:>7.1} bytes per group",
            "",
            state.bytes() as f64 / state.rows() as f64
        );
    }
}

/// Columns key, at, value, name: bids as Nexmark makes them, ten thousand events a second.
fn bids(count: usize) -> Vec<Delta> {
    let one = |batch: usize| {
        let events: Vec<u64> = (batch * BATCH..(batch + 1) * BATCH)
            .map(|n| n as u64)
            .filter(|n| n % 50 > 3)
            .collect();
        let auction = |event: &u64| {
            let newest = event / 50 * 3;
            match scatter(*event) {
                random if random % 2 == 0 => newest / 100 * 100,
                random => newest.saturating_sub(100) + (random >> 8) % 110,
            }
        };
        let at = events.iter().map(|event| *event as i64 * SECOND / 10_000);
        let columns: Vec<ArrayRef> = vec![
            Arc::new(Int64Array::from_iter_values(
                events.iter().map(|e| auction(e) as i64),
            )),
            Arc::new(TimestampMicrosecondArray::from_iter_values(at)),
            Arc::new(Int64Array::from_iter_values(
                events.iter().map(|e| (e % 1000) as i64),
            )),
            Arc::new(StringArray::from_iter_values(events.iter().map(|_| ""))),
        ];
        let schema = schema(&columns_of_input());
        Delta::inserts(RecordBatch::try_new(schema, columns).expect("columns fit"))
    };
    (0..count).map(one).collect()
}

/// Both halves, with ticks of some batches and the watermark following.
fn whole() {
    use AggregateKind::{Count, Max};
    let hop = TimeWindow {
        size_us: 10 * SECOND,
        slide_us: 2 * SECOND,
    };
    let tumble = TimeWindow {
        size_us: 10 * SECOND,
        slide_us: 10 * SECOND,
    };
    let cases = [
        (
            "q5: count(*) by HOP and auction",
            spec(&[4, 0], vec![call(Count, None)], Some(hop)),
        ),
        (
            "q7: max by TUMBLE",
            spec(&[4], vec![call(Max, Some(2))], Some(tumble)),
        ),
        (
            "count(*) by auction",
            spec(&[0], vec![call(Count, None)], None),
        ),
    ];
    let deltas = bids(64);
    for (name, spec) in cases {
        for batches in [1, 8] {
            let mut pre = PreAggregate::new(Arc::clone(&spec));
            let mut state = AggregateState::new(Arc::clone(&spec), 0, 1);
            let (mut watermark, mut changes) = (NO_WATERMARK, 0);
            report(
                &format!("whole: {name}, events, {batches} batches a tick"),
                64 * BATCH,
                || {
                    for (tick, deltas) in deltas.chunks(batches).enumerate() {
                        let partials: Vec<Delta> = deltas
                            .iter()
                            .flat_map(|delta| pre.apply(delta.clone(), watermark).partials)
                            .collect();
                        state.apply(&partials);
                        watermark =
                            ((tick + 1) * batches * BATCH) as i64 * SECOND / 10_000 - 4 * SECOND;
                        changes += state
                            .finish(watermark)
                            .deltas
                            .iter()
                            .map(Delta::len)
                            .sum::<usize>();
                    }
                },
            );
            println!("{:>58} {:>7.3} M changes", "", changes as f64 / 1e6);
        }
    }
}

fn join() {
    let deltas = batches(16, u64::MAX >> 1, 50_000);
    let side = deltas[0].batch.schema();
    let both: Vec<Field> = side
        .fields()
        .iter()
        .chain(side.fields())
        .map(|f| f.as_ref().clone())
        .collect();
    let spec = JoinSpec {
        left: Arc::clone(&side),
        right: side,
        output: Arc::new(Schema::new(both)),
        on: vec![(0, 0)],
        null_equal: false,
        filter: None,
        left_close: None,
        right_close: None,
        append_only: false,
    };
    let mut state = JoinState::new(Arc::new(spec), 0, 1);
    let rows = deltas.len() * BATCH;
    report("join: left rows that find nothing", rows, || {
        for delta in &deltas {
            assert!(
                state
                    .tick(std::slice::from_ref(delta), &[], NO_WATERMARK)
                    .deltas
                    .is_empty()
            );
        }
    });
    report("join: right rows that find one", rows, || {
        for delta in &deltas {
            let out = state.tick(&[], std::slice::from_ref(delta), NO_WATERMARK);
            assert_eq!(
                out.deltas.iter().map(Delta::len).sum::<usize>(),
                delta.len()
            );
        }
    });
    println!(
        "{:>58} {:>7.1} bytes per row",
        "",
        state.bytes() as f64 / state.rows() as f64
    );
    report("join: left rows taken back", rows, || {
        for delta in &deltas {
            let back = Delta::new(delta.batch.clone(), Diffs::from_vec(vec![-1; delta.len()]));
            state.tick(&[back], &[], NO_WATERMARK);
        }
    });
}

/// Bids in their windows, kept until the window closes, as Nexmark's q7 joins them with the best price.
fn windowed_join() {
    let columns = [
        ("price", DataType::Int64),
        ("auction", DataType::Int64),
        ("at", timestamp()),
        ("window_start", timestamp()),
        ("window_end", timestamp()),
    ];
    let left = schema(&columns);
    let right = schema(&[&columns[..1], &columns[3..]].concat());
    let both: Vec<Field> = left
        .fields()
        .iter()
        .chain(right.fields())
        .map(|f| f.as_ref().clone())
        .collect();
    let spec = JoinSpec {
        left: Arc::clone(&left),
        right,
        output: Arc::new(Schema::new(both)),
        on: vec![(0, 0), (3, 1), (4, 2)],
        null_equal: false,
        filter: None,
        left_close: Some(CloseRule {
            key: 4,
            delay_us: 0,
        }),
        right_close: Some(CloseRule {
            key: 2,
            delay_us: 0,
        }),
        append_only: true,
    };
    let mut state = JoinState::new(Arc::new(spec), 0, 1);
    let windowed = |delta: Delta, number: usize| {
        let price = |row: usize| scatter((number * BATCH + row) as u64) % 10_000_000;
        let start = delta
            .batch
            .column(1)
            .as_primitive::<TimestampMicrosecondType>();
        let start: TimestampMicrosecondArray = start.unary(|at| at - at.rem_euclid(10 * SECOND));
        let end: TimestampMicrosecondArray = start.unary(|start| start + 10 * SECOND);
        let columns: Vec<ArrayRef> = vec![
            Arc::new(Int64Array::from_iter_values(
                (0..delta.len()).map(|row| price(row) as i64),
            )),
            Arc::clone(delta.batch.column(0)),
            Arc::clone(delta.batch.column(1)),
            Arc::new(start),
            Arc::new(end),
        ];
        let batch = RecordBatch::try_new(Arc::clone(&left), columns).expect("columns fit");
        Delta::inserts(batch)
    };
    let deltas = bids(64)
        .into_iter()
        .enumerate()
        .map(|(number, delta)| windowed(delta, number));
    let deltas: Vec<Delta> = deltas.collect();
    report(
        "join: q7, bids until their window closes, events",
        64 * BATCH,
        || {
            for (tick, delta) in deltas.iter().enumerate() {
                let watermark = ((tick + 1) * BATCH) as i64 * SECOND / 10_000 - 4 * SECOND;
                state.tick(std::slice::from_ref(delta), &[], watermark);
            }
        },
    );
}
