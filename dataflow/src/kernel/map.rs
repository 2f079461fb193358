//! Filters and projections, fused: one pass over a batch for a whole chain.
//!
//! A step is evaluated on the whole batch. When that fails, the batch is halved until the rows that
//! fail by themselves stand alone; they become errors and the others go on.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, NullArray, RecordBatch, RecordBatchOptions,
    new_empty_array,
};
use arrow::compute::{CastOptions, cast_with_options, concat, filter_record_batch};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::error::{DataFusionError, Result as EvaluationResult};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::utils::collect_columns;

use super::{RowErrors, nullable, row_error};
use crate::delta::{Delta, Diffs};
use crate::error::Error;
use crate::plan::MapStep;

/// What a stateless kernel gives for one delta.
#[derive(Debug, Default)]
pub struct MapOutput {
    pub delta: Option<Delta>,
    /// Of [`super::errors_schema`].
    pub errors: Option<Delta>,
}

/// A chain of steps, ready to run.
#[derive(Debug)]
pub struct MapKernel {
    steps: Vec<Step>,
    schema: SchemaRef,
}

#[derive(Debug)]
enum Step {
    Filter {
        predicate: Arc<dyn PhysicalExpr>,
        /// Columns that nothing after the filter reads; not worth copying.
        drop: Vec<usize>,
    },
    Project {
        exprs: Vec<Arc<dyn PhysicalExpr>>,
        schema: SchemaRef,
    },
}

impl MapKernel {
    /// For rows of the schema `input`.
    pub fn new(input: &Schema, steps: &[MapStep]) -> Self {
        let mut schema = nullable(input);
        let mut built = Vec::with_capacity(steps.len());
        for (at, step) in steps.iter().enumerate() {
            built.push(match step {
                MapStep::Filter(predicate) => Step::Filter {
                    predicate: Arc::clone(predicate),
                    drop: unused(&steps[at + 1..], schema.fields().len()),
                },
                MapStep::Project(exprs, output) => {
                    schema = nullable(output);
                    Step::Project {
                        exprs: exprs.clone(),
                        schema: Arc::clone(&schema),
                    }
                }
            });
        }
        Self {
            steps: built,
            schema,
        }
    }

    /// Columns of the output.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Runs the chain over one delta.
    pub fn apply(&self, delta: Delta) -> MapOutput {
        let mut errors = RowErrors::default();
        let mut delta = Some(delta);
        for step in &self.steps {
            let Some(input) = delta else { break };
            delta = match step {
                Step::Filter { predicate, drop } => filter(input, predicate, drop, &mut errors),
                Step::Project { exprs, schema } => project(input, exprs, schema, &mut errors),
            };
        }
        MapOutput {
            delta,
            errors: errors.finish(),
        }
    }
}

/// Of `columns`, those that the steps up to the next projection do not read; none when there is no
/// projection, because all of them are output then.
fn unused(steps: &[MapStep], columns: usize) -> Vec<usize> {
    let mut used = vec![false; columns];
    let mut mark = |expr: &Arc<dyn PhysicalExpr>| {
        for column in collect_columns(expr) {
            if let Some(used) = used.get_mut(column.index()) {
                *used = true;
            }
        }
    };
    for step in steps {
        match step {
            MapStep::Filter(predicate) => mark(predicate),
            MapStep::Project(exprs, _) => {
                exprs.iter().for_each(mark);
                return (0..columns).filter(|column| !used[*column]).collect();
            }
        }
    }
    Vec::new()
}

/// Keeps the rows where the predicate is true; drops the values of the columns `drop`.
pub(super) fn filter(
    delta: Delta,
    predicate: &Arc<dyn PhysicalExpr>,
    drop: &[usize],
    errors: &mut RowErrors,
) -> Option<Delta> {
    let evaluate = |batch: &RecordBatch| {
        let mask = predicate.evaluate(batch)?.into_array(batch.num_rows())?;
        if mask.data_type() == &DataType::Boolean {
            return Ok(vec![mask]);
        }
        // A constant NULL has a type of its own.
        Ok(vec![cast_strict(&mask, &DataType::Boolean)?])
    };
    let (delta, columns) = evaluate_rows(delta, &[DataType::Boolean], evaluate, errors)?;
    let mask = columns[0].as_boolean();
    keep(delta, mask, drop)
}

/// Rows where the mask is true, without touching anything when it is true everywhere.
fn keep(delta: Delta, mask: &BooleanArray, drop: &[usize]) -> Option<Delta> {
    let kept = mask.true_count();
    if kept == 0 {
        return None;
    }
    if kept == mask.len() {
        return Some(delta);
    }
    let batch = if drop.is_empty() {
        delta.batch.clone()
    } else {
        without(&delta.batch, drop)
    };
    let batch = filter_record_batch(&batch, mask).expect("the mask has the length of the batch");
    let diffs = match &delta.diffs {
        Diffs::Ones => Diffs::Ones,
        Diffs::Each(each) => {
            let kept = mask
                .iter()
                .zip(each.iter())
                .filter(|(m, _)| *m == Some(true));
            Diffs::from_vec(kept.map(|(_, diff)| *diff).collect())
        }
    };
    Some(Delta::new(batch, diffs))
}

/// The batch with some columns emptied of their values; the others keep their positions.
fn without(batch: &RecordBatch, drop: &[usize]) -> RecordBatch {
    let mut fields = batch.schema_ref().fields().to_vec();
    let mut columns = batch.columns().to_vec();
    for column in drop {
        fields[*column] = Arc::new(Field::new(fields[*column].name(), DataType::Null, true));
        columns[*column] = Arc::new(NullArray::new(batch.num_rows()));
    }
    build(&Arc::new(Schema::new(fields)), columns, batch.num_rows())
}

fn project(
    delta: Delta,
    exprs: &[Arc<dyn PhysicalExpr>],
    schema: &SchemaRef,
    errors: &mut RowErrors,
) -> Option<Delta> {
    let types: Vec<_> = schema
        .fields()
        .iter()
        .map(|f| f.data_type().clone())
        .collect();
    let evaluate = |batch: &RecordBatch| {
        let columns = exprs.iter().zip(&types).map(|(expr, want)| {
            let column = expr.evaluate(batch)?.into_array(batch.num_rows())?;
            if column.data_type() == want {
                Ok(column)
            } else {
                cast_strict(&column, want)
            }
        });
        columns.collect()
    };
    let (delta, columns) = evaluate_rows(delta, &types, evaluate, errors)?;
    let batch = build(schema, columns, delta.len());
    Some(Delta::new(batch, delta.diffs))
}

fn cast_strict(column: &ArrayRef, want: &DataType) -> EvaluationResult<ArrayRef> {
    let options = CastOptions {
        safe: false,
        ..CastOptions::default()
    };
    Ok(cast_with_options(column, want, &options)?)
}

/// A batch of columns that have the types of the schema, whose fields are nullable.
pub(crate) fn build(schema: &SchemaRef, columns: Vec<ArrayRef>, rows: usize) -> RecordBatch {
    let options = RecordBatchOptions::new().with_row_count(Some(rows));
    RecordBatch::try_new_with_options(Arc::clone(schema), columns, &options)
        .expect("the columns have the types of the schema and its fields are nullable")
}

/// Evaluates over all rows; those that fail by themselves are moved to the errors. Gives the rows that
/// are left with their results, `None` when no row is left.
pub(crate) fn evaluate_rows(
    delta: Delta,
    types: &[DataType],
    evaluate: impl Fn(&RecordBatch) -> EvaluationResult<Vec<ArrayRef>>,
    errors: &mut RowErrors,
) -> Option<(Delta, Vec<ArrayRef>)> {
    match evaluate(&delta.batch) {
        Ok(columns) => return Some((delta, columns)),
        Err(error) if delta.len() == 1 => {
            let (code, message) = row_error(&error);
            errors.push(code, message, delta.diffs.get(0));
            return None;
        }
        Err(_) => {}
    }
    let mut search = Search {
        batch: &delta.batch,
        evaluate,
        good: Vec::new(),
        bytes: 0,
        bad: Vec::new(),
    };
    search.halve(0, delta.len());
    let Search { good, bad, .. } = search;
    let columns: EvaluationResult<Vec<ArrayRef>> = types
        .iter()
        .enumerate()
        .map(|(column, data_type)| {
            let pieces: Vec<&dyn Array> = good.iter().map(|p| p[column].as_ref()).collect();
            match pieces.is_empty() {
                true => Ok(new_empty_array(data_type)),
                false => Ok(concat(&pieces)?),
            }
        })
        .collect();
    let columns = match columns {
        Ok(columns) => columns,
        // Together the results are longer than one array can be.
        Err(error) => {
            let (code, message) = row_error(&error);
            for row in 0..delta.len() {
                errors.push(code, message.clone(), delta.diffs.get(row));
            }
            return None;
        }
    };
    let mut keep = vec![true; delta.len()];
    for (row, error) in bad {
        keep[row] = false;
        let (code, message) = row_error(&error);
        errors.push(code, message, delta.diffs.get(row));
    }
    let delta = delta.filter(&BooleanArray::from(keep))?;
    Some((delta, columns))
}

/// Bytes of the results for one batch; what does not fit on one array would be lost anyway.
const MAX_RESULT: usize = 1 << 30;

fn size_of(columns: &[ArrayRef]) -> usize {
    let sizes = columns
        .iter()
        .map(|c| c.to_data().get_slice_memory_size().unwrap_or(0));
    sizes.sum()
}

fn too_long() -> DataFusionError {
    let error = Error::invalid("the results of a batch are longer than 1 GiB together");
    DataFusionError::External(Box::new(error.code("54000")))
}

struct Search<'a, F> {
    batch: &'a RecordBatch,
    evaluate: F,
    /// Results of the runs of rows that succeeded, in row order.
    good: Vec<Vec<ArrayRef>>,
    /// Size of `good`.
    bytes: usize,
    bad: Vec<(usize, DataFusionError)>,
}

impl<F: Fn(&RecordBatch) -> EvaluationResult<Vec<ArrayRef>>> Search<'_, F> {
    /// The whole range is known to fail, or has one row.
    fn halve(&mut self, start: usize, len: usize) {
        let half = len / 2;
        for (start, len) in [(start, half), (start + half, len - half)] {
            if len == 0 {
                continue;
            }
            match (self.evaluate)(&self.batch.slice(start, len)) {
                Ok(columns) if self.bytes + size_of(&columns) > MAX_RESULT => {
                    for row in start..start + len {
                        self.bad.push((row, too_long()));
                    }
                }
                Ok(columns) => {
                    self.bytes += size_of(&columns);
                    self.good.push(columns);
                }
                Err(error) if len == 1 => self.bad.push((start, error)),
                Err(_) => self.halve(start, len),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::testing::{batch, checked_divide, column, compare, consolidated, int};
    use arrow::array::{Int64Array, StringArray, StringViewArray};
    use datafusion::logical_expr::Operator;
    use datafusion::physical_expr::expressions::{CastExpr, lit};
    use proptest::prelude::*;

    fn schema(types: &[DataType]) -> SchemaRef {
        let fields = types.iter().enumerate();
        let fields = fields.map(|(i, t)| Field::new(format!("o{i}"), t.clone(), false));
        Arc::new(Schema::new(fields.collect::<Vec<_>>()))
    }

    proptest! {
        /// Rows fail exactly where the divisor is zero, with their diffs.
        #[test]
        fn failing_rows_are_moved_to_the_errors(
            rows in prop::collection::vec((-3i64..4, -2i64..3, prop_oneof![Just(-1i64), Just(1), Just(2)]), 1..80)
        ) {
            let a = int(rows.iter().map(|r| Some(r.0)));
            let b = int(rows.iter().map(|r| Some(r.1)));
            let input = batch(vec![("a", a), ("b", b)]);
            let delta = Delta::new(input.clone(), Diffs::from_vec(rows.iter().map(|r| r.2).collect()));
            let steps = [
                MapStep::Filter(compare(column("a", 0), Operator::GtEq, lit(-2i64))),
                MapStep::Project(vec![checked_divide(column("a", 0), column("b", 1))], schema(&[DataType::Int64])),
                MapStep::Filter(compare(column("o0", 0), Operator::NotEq, lit(1i64))),
            ];
            let kernel = MapKernel::new(&input.schema(), &steps);
            let out = kernel.apply(delta);
            let mut want = std::collections::BTreeMap::new();
            let mut failed = 0;
            for (a, b, diff) in rows.iter().filter(|r| r.0 >= -2) {
                match a.checked_div(*b) {
                    None => failed += diff,
                    Some(1) => {}
                    Some(q) => *want.entry(q.to_string()).or_insert(0) += diff,
                }
            }
            want.retain(|_, d| *d != 0);
            prop_assert_eq!(consolidated(out.delta.iter()), want);
            let errors = consolidated(out.errors.iter());
            let got: i64 = errors.values().sum();
            prop_assert_eq!(got, failed);
            prop_assert!(errors.keys().all(|row| row == "22012|division by zero"));
        }
    }

    #[test]
    fn a_filter_that_keeps_all_copies_nothing() {
        let input = batch(vec![("a", int([Some(1), Some(2)]))]);
        let steps = [MapStep::Filter(compare(
            column("a", 0),
            Operator::Gt,
            lit(0i64),
        ))];
        let out = MapKernel::new(&input.schema(), &steps).apply(Delta::inserts(input.clone()));
        let same = out.delta.unwrap().batch;
        assert!(Arc::ptr_eq(same.column(0), input.column(0)));
        let steps = [MapStep::Filter(lit(false))];
        assert!(
            MapKernel::new(&input.schema(), &steps)
                .apply(Delta::inserts(input))
                .delta
                .is_none()
        );
    }

    #[test]
    fn nulls_and_views_fit_the_declared_schema() {
        let text = StringViewArray::from(vec![Some("x"), None, Some("12")]);
        let input = batch(vec![("t", Arc::new(text) as ArrayRef)]);
        let declared = schema(&[DataType::Utf8]);
        let steps = [MapStep::Project(vec![column("t", 0)], declared)];
        let kernel = MapKernel::new(&input.schema(), &steps);
        let out = kernel.apply(Delta::inserts(input.clone())).delta.unwrap();
        let want = StringArray::from(vec![Some("x"), None, Some("12")]);
        assert_eq!(out.batch.column(0).as_string::<i32>(), &want);
        assert_eq!(&out.batch.schema(), kernel.schema());

        // The message of a bad cast does not repeat the value.
        let options = CastOptions {
            safe: false,
            ..CastOptions::default()
        };
        let cast = CastExpr::new(column("t", 0), DataType::Int64, Some(options));
        let steps = [MapStep::Project(
            vec![Arc::new(cast)],
            schema(&[DataType::Int64]),
        )];
        let out = MapKernel::new(&input.schema(), &steps).apply(Delta::inserts(input));
        let want = Int64Array::from(vec![None, Some(12)]);
        assert_eq!(
            out.delta
                .unwrap()
                .batch
                .column(0)
                .as_primitive::<arrow::datatypes::Int64Type>(),
            &want
        );
        let errors = consolidated(out.errors.iter());
        assert_eq!(
            errors.keys().next().unwrap(),
            "22P02|cannot cast string … to value of Int64 type"
        );
    }

    #[test]
    fn columns_that_nothing_reads_are_not_filtered() {
        let input = batch(vec![
            ("a", int([Some(1), Some(2)])),
            ("b", int([Some(3), Some(4)])),
        ]);
        let steps = [
            MapStep::Filter(compare(column("a", 0), Operator::Gt, lit(1i64))),
            MapStep::Project(
                vec![column("b", 1), lit(7i64)],
                schema(&[DataType::Int64, DataType::Int64]),
            ),
        ];
        let out = MapKernel::new(&input.schema(), &steps).apply(Delta::inserts(input));
        assert_eq!(
            consolidated(out.delta.iter()),
            [("4|7".to_string(), 1)].into()
        );
        let steps = [MapStep::Project(vec![], schema(&[]))];
        let input = batch(vec![("a", int([Some(1), Some(2)]))]);
        let out = MapKernel::new(&input.schema(), &steps).apply(Delta::inserts(input));
        assert_eq!(out.delta.unwrap().len(), 2);
    }
}
