//! Random changes in random slices, against a recomputation of everything.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;

use arrow::array::Int64Array;
use arrow::datatypes::{Field, Int64Type, Schema};
use datafusion::error::{DataFusionError, Result as DfResult};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::EquivalenceProperties;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{DisplayAs, DisplayFormatType, ExecutionPlan, PlanProperties};
use futures::{StreamExt, TryStreamExt};
use proptest::prelude::*;

use super::*;
use crate::kernel::testing::{accumulate, batch, int, rows as rows_of, stored, time};
use crate::key::{hash_columns, owner};
use crate::plan::{OrderColumn, Slot};
use crate::state::testing::{budget, enter};
use crate::time::NO_WATERMARK;

const SECOND: i64 = 1_000_000;
/// A partition with this value fails.
const POISON: i64 = 9;

/// Key, seconds, value, diff.
type Row = (Option<i64>, Option<i64>, i64, i64);
/// Key, seconds, value.
type Stored = (Option<i64>, Option<i64>, i64);

fn delta(rows: &[Row]) -> Delta {
    let columns = vec![
        ("key", int(rows.iter().map(|r| r.0))),
        ("at", time(rows.iter().map(|r| Some(r.1? * SECOND)))),
        ("value", int(rows.iter().map(|r| Some(r.2)))),
    ];
    let diffs = rows.iter().map(|r| r.3).collect();
    Delta::new(batch(columns), Diffs::from_vec(diffs))
}

/// Numbers the rows of each partition in the order in which they come; fails on [`POISON`].
#[derive(Debug)]
struct Numbered {
    input: Arc<dyn ExecutionPlan>,
    keys: Vec<usize>,
    schema: SchemaRef,
    properties: Arc<PlanProperties>,
}

impl Numbered {
    fn new(input: Arc<dyn ExecutionPlan>, keys: Vec<usize>) -> Self {
        let mut fields = input.schema().fields().to_vec();
        fields.push(Arc::new(Field::new("number", DataType::Int64, true)));
        let schema = Arc::new(Schema::new(fields));
        let below = input.properties();
        let properties = PlanProperties::new(
            EquivalenceProperties::new(Arc::clone(&schema)),
            below.partitioning.clone(),
            below.emission_type,
            below.boundedness,
        );
        Self {
            input,
            keys,
            schema,
            properties: Arc::new(properties),
        }
    }

    fn number(&self, all: &RecordBatch) -> DfResult<RecordBatch> {
        let values = all.column(2).as_primitive::<Int64Type>();
        if values.values().contains(&POISON) {
            return Err(DataFusionError::Execution("poison".to_string()));
        }
        let mut last: Option<Vec<String>> = None;
        let mut number = 0;
        let texts = rows_of(all);
        let numbers = texts.iter().map(|text| {
            let parts: Vec<&str> = text.split('|').collect();
            let key: Vec<String> = self.keys.iter().map(|k| parts[*k].to_string()).collect();
            number = if last.as_ref() == Some(&key) {
                number + 1
            } else {
                1
            };
            last = Some(key);
            number
        });
        let numbers: Int64Array = numbers.collect();
        let mut columns = all.columns().to_vec();
        columns.push(Arc::new(numbers));
        Ok(RecordBatch::try_new(Arc::clone(&self.schema), columns)?)
    }
}

impl DisplayAs for Numbered {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Numbered")
    }
}

impl ExecutionPlan for Numbered {
    fn name(&self) -> &str {
        "Numbered"
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }
    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.input]
    }
    fn with_new_children(
        self: Arc<Self>,
        mut children: Vec<Arc<dyn ExecutionPlan>>,
    ) -> DfResult<Arc<dyn ExecutionPlan>> {
        Ok(Arc::new(Self::new(children.remove(0), self.keys.clone())))
    }
    fn execute(&self, at: usize, context: Arc<TaskContext>) -> DfResult<SendableRecordBatchStream> {
        let input = self.input.execute(at, context)?;
        let below = self.input.schema();
        let own = Self::new(Arc::clone(&self.input), self.keys.clone());
        let whole = async move {
            let batches: Vec<RecordBatch> = input.try_collect().await?;
            own.number(&concat_batches(&below, &batches)?)
        };
        let schema = Arc::clone(&self.schema);
        let stream = futures::stream::once(whole).boxed();
        Ok(Box::pin(RecordBatchStreamAdapter::new(schema, stream)))
    }
}

#[derive(Debug, Clone)]
struct Case {
    keys: Vec<usize>,
    close: Option<i64>,
    emit: Emit,
    lateness: i64,
    first: Option<usize>,
    growing: bool,
    ticks: Vec<(Vec<Row>, i64)>,
    restart: usize,
    workers: (usize, usize),
}

fn case() -> impl Strategy<Value = Case> {
    let keys = prop_oneof![
        Just(vec![]),
        Just(vec![0]),
        Just(vec![1]),
        Just(vec![1, 0]),
        Just(vec![0, 1]),
    ];
    let diff = prop_oneof![4 => Just(1i64), 1 => Just(2), 3 => Just(-1)];
    let value = prop_oneof![8 => 0i64..4, 1 => Just(POISON)];
    let row = (
        proptest::option::weighted(0.85, 0i64..3),
        proptest::option::weighted(0.9, -5i64..20),
        value,
        diff,
    );
    let tick = (prop::collection::vec(row, 0..12), 0i64..8);
    let run = (
        prop::collection::vec(tick, 1..8),
        0usize..8,
        1usize..4,
        1usize..4,
    );
    let close = (proptest::option::of(0i64..6), any::<bool>(), 0i64..3);
    let first = (proptest::option::of(1usize..4), any::<bool>());
    (keys, close, first, run).prop_map(|(keys, (delay, on_close, lateness), first, run)| {
        let (mut ticks, restart, before, after) = run;
        let (first, growing) = first;
        if growing {
            let rows = ticks.iter_mut().flat_map(|(rows, _)| rows);
            rows.for_each(|row| row.3 = row.3.abs());
        }
        let close = delay.filter(|_| keys.contains(&1));
        Case {
            emit: match on_close && close.is_some() {
                true => Emit::OnClose,
                false => Emit::Changes,
            },
            close,
            keys,
            lateness,
            first,
            growing,
            ticks,
            restart,
            workers: (before, after),
        }
    })
}

impl Case {
    fn spec(&self) -> RecomputeSpec {
        let input = delta(&[]).batch.schema();
        let options = SortOptions {
            descending: true,
            nulls_first: false,
        };
        let order = vec![OrderColumn { column: 2, options }];
        let slot: Arc<dyn ExecutionPlan> = Arc::new(Slot::new(0, nullable(&input), &[]));
        let template = Arc::new(Numbered::new(slot, self.keys.clone()));
        let key = self.keys.iter().position(|column| *column == 1);
        RecomputeSpec {
            output: template.schema(),
            inputs: vec![input],
            keys: vec![self.keys.clone()],
            compute: Arc::new(Computation {
                text: "numbered".to_string(),
                template,
                order: vec![order],
            }),
            close: self.close.zip(key).map(|(delay, key)| CloseRule {
                key,
                delay_us: delay * SECOND,
            }),
            emit: self.emit,
            allowed_lateness_us: self.lateness * SECOND,
            first: self.first.map(|rows| First {
                rows,
                growing: self.growing,
            }),
        }
    }

    /// Whether rows of this time are final.
    fn closed(&self, at: Option<i64>, watermark: i64) -> bool {
        let past = self
            .close
            .zip(at)
            .map(|(delay, at)| at + delay + self.lateness);
        past.is_some_and(|past| watermark != NO_WATERMARK && past * SECOND <= watermark)
    }

    /// What is shown of these rows, and how many partitions fail.
    fn answer(&self, rows: &BTreeMap<Stored, i64>) -> (BTreeMap<String, i64>, i64) {
        let mut parts: BTreeMap<Vec<Option<i64>>, Vec<Stored>> = BTreeMap::new();
        for (row, count) in rows {
            let key: Vec<Option<i64>> = self.keys.iter().map(|k| [row.0, row.1][*k]).collect();
            for _ in 0..(*count).max(0) {
                parts.entry(Vec::clone(&key)).or_default().push(*row);
            }
        }
        let (mut shown, mut failed) = (BTreeMap::new(), 0);
        for mut part in parts.into_values() {
            // By value from the greatest, then by all columns, nulls last.
            part.sort_by_key(|r| (-r.2, r.0.is_none(), r.0, r.1.is_none(), r.1));
            part.truncate(self.first.unwrap_or(usize::MAX));
            if part.iter().any(|row| row.2 == POISON) {
                failed += 1;
                continue;
            }
            for (at, (key, seconds, value)) in part.into_iter().enumerate() {
                let batch = delta(&[(key, seconds, value, 1)]).batch;
                let text = format!("{}|{}", rows_of(&batch)[0], at + 1);
                *shown.entry(text).or_default() += 1;
            }
        }
        (shown, failed)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn equals_a_recomputation_at_every_tick(case in case(), budget in budget()) {
        let _entered = enter(budget);
        let spec = Arc::new(case.spec());
        spec.validate().unwrap();
        let new = |workers: usize| -> Vec<RecomputeState> {
            (0..workers).map(|w| RecomputeState::new(Arc::clone(&spec), w, workers)).collect()
        };
        let mut states = new(case.workers.0);
        let mut open: BTreeMap<Stored, i64> = BTreeMap::new();
        let (mut got, mut errors, mut watermark) = (BTreeMap::new(), 0, NO_WATERMARK);
        // Of partitions that the watermark has closed: as they were then.
        let (mut kept, mut kept_errors) = (BTreeMap::<String, i64>::new(), 0);
        for (number, (news, step)) in case.ticks.iter().enumerate() {
            if number == case.restart {
                let parts = states.iter_mut().flat_map(|state| stored(state.freeze()));
                let parts: Vec<_> = parts.collect();
                states = new(case.workers.1);
                states.iter_mut().for_each(|state| state.restore(&parts).unwrap());
            }
            // Late rows are taken out before the kernel.
            let punctual: Vec<Row> = news
                .iter()
                .filter(|row| !case.closed(row.1, watermark))
                .copied()
                .collect();
            for row in &punctual {
                *open.entry((row.0, row.1, row.2)).or_default() += row.3;
            }
            watermark = watermark.max(0) + step * SECOND;
            let total = states.len();
            for (worker, state) in states.iter_mut().enumerate() {
                let mine = |delta: Delta| {
                    let columns = case.keys.iter().map(|k| Arc::clone(delta.batch.column(*k)));
                    let columns: Vec<ArrayRef> = columns.collect();
                    let hashes = match columns.is_empty() {
                        true => vec![hash_bytes(&[]); delta.len()],
                        false => hash_columns(&columns, delta.len()).unwrap(),
                    };
                    let mine = hashes.iter().map(|h| owner(key_group(*h), total) == worker);
                    delta.filter(&mine.map(Some).collect())
                };
                let share: Vec<Delta> = punctual.chunks(4).map(delta).filter_map(mine).collect();
                let out = state.tick(&[share], watermark);
                accumulate(&mut got, &out.deltas);
                for delta in &out.errors {
                    errors += (0..delta.len()).map(|row| delta.diffs.get(row)).sum::<i64>();
                }
            }
            let gone: BTreeMap<_, _> = open
                .iter()
                .filter(|(row, _)| case.closed(row.1, watermark))
                .map(|(row, count)| (*row, *count))
                .collect();
            open.retain(|row, _| !case.closed(row.1, watermark));
            let (shown, failed) = case.answer(&gone);
            for (row, count) in shown {
                *kept.entry(row).or_default() += count;
            }
            kept_errors += failed;
            let (mut wanted, mut wanted_errors) = match case.emit {
                Emit::Changes => case.answer(&open),
                Emit::OnClose => Default::default(),
            };
            for (row, count) in &kept {
                *wanted.entry(row.clone()).or_default() += count;
            }
            wanted_errors += kept_errors;
            prop_assert_eq!(&got, &wanted, "tick {}", number);
            prop_assert_eq!(errors, wanted_errors, "errors at tick {}", number);
        }
    }
}

/// A change of a large partition is worth the rows that are asked for, not the partition.
#[test]
fn the_first_rows_cost_what_they_are() {
    let mut case = Case {
        keys: vec![0],
        close: None,
        emit: Emit::Changes,
        lateness: 0,
        first: Some(3),
        growing: false,
        ticks: Vec::new(),
        restart: 0,
        workers: (1, 1),
    };
    let rows = 20_000i64;
    // Values in an order of their own, without POISON.
    let row = |i: i64, diff| (Some(0), Some(i), 10 + i * 7_919 % rows, diff);
    let all: Vec<Row> = (0..rows).map(|i| row(i, 1)).collect();
    for growing in [false, true] {
        case.growing = growing;
        let mut state = RecomputeState::new(Arc::new(case.spec()), 0, 1);
        let (mut got, mut open) = (BTreeMap::new(), BTreeMap::new());
        let mut tick = |state: &mut RecomputeState, rows: &[Row]| {
            let out = state.tick(&[vec![delta(rows)]], NO_WATERMARK);
            accumulate(&mut got, &out.deltas);
            for row in rows {
                *open.entry((row.0, row.1, row.2)).or_default() += row.3;
            }
            assert_eq!(got, case.answer(&open).0);
        };
        tick(&mut state, &all);
        let loaded = state.worked();
        assert!(loaded < 4 * rows as u64, "{loaded} rows of work for {rows}");
        let mut greatest = all.clone();
        greatest.sort_by_key(|row| -row.2);
        let changes = 300;
        for i in 0..changes {
            match greatest.get(i / 3) {
                Some(row) if !growing && i % 3 == 0 => {
                    tick(&mut state, &[(row.0, row.1, row.2, -1)])
                }
                _ => tick(&mut state, &[row(rows + i as i64 * 37, 1)]),
            }
        }
        // A hundred removals read the rest anew, but not each of them.
        let worked = state.worked() - loaded;
        let fills = if growing { 0 } else { 100 / 4 * rows as u64 };
        let most = fills + 100 * changes as u64;
        assert!(worked < most, "{worked} rows of work for {changes} changes");
        if growing {
            assert!(state.rows() < 20);
        }
    }
}
