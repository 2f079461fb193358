//! Which files can hold a row that passes the filters, by the bounds in their manifest.
//!
//! When in doubt a file is kept: a bound that is missing, that cannot be converted, or a float column
//! that may hold NaN (which compares as the largest value, but is in no bound).

use std::collections::HashSet;
use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, UInt64Array};
use arrow::datatypes::{DataType, SchemaRef};
use datafusion::catalog::Session;
use datafusion::common::pruning::PruningStatistics;
use datafusion::common::{Column, DFSchema, ScalarValue};
use datafusion::error::Result;
use datafusion::logical_expr::Expr;
use datafusion::logical_expr::utils::conjunction;
use datafusion::physical_optimizer::pruning::PruningPredicate;
use iceberg::spec::{DataFile, Datum, PrimitiveLiteral, PrimitiveType, Schema};

use super::plan::LiveFile;

/// The files that may hold rows for which all `filters` are true.
pub(super) fn prune(
    state: &dyn Session,
    schema: &SchemaRef,
    columns: &Schema,
    files: &[LiveFile],
    filters: &[Expr],
) -> Result<Vec<LiveFile>> {
    let Some(filter) = conjunction(filters.iter().cloned()) else {
        return Ok(files.to_vec());
    };
    let df_schema = DFSchema::try_from(Arc::clone(schema))?;
    let keep = state
        .create_physical_expr(filter, &df_schema)
        .and_then(|expr| PruningPredicate::try_new(expr, Arc::clone(schema)))
        .and_then(|predicate| {
            predicate.prune(&Bounds {
                schema,
                columns,
                files,
            })
        });
    // A filter that cannot be used for pruning is still evaluated above the scan.
    let Ok(keep) = keep else {
        return Ok(files.to_vec());
    };
    Ok(files
        .iter()
        .zip(keep)
        .filter(|(_, keep)| *keep)
        .map(|(file, _)| file.clone())
        .collect())
}

/// Whether some value of some float column may be NaN. All columns count, not only those of the filters:
/// filters that come to be while the query runs (of a join, of a top-k) prune too.
pub(super) fn may_hold_nan(schema: &SchemaRef, columns: &Schema, files: &[LiveFile]) -> bool {
    let floats = schema
        .fields()
        .iter()
        .filter(|f| f.data_type().is_floating());
    let ids: Vec<i32> = floats
        .filter_map(|f| columns.field_id_by_name(f.name()))
        .collect();
    files.iter().any(|file| {
        let counts = file.file().nan_value_counts();
        ids.iter().any(|id| counts.get(id) != Some(&0))
    })
}

struct Bounds<'a> {
    schema: &'a SchemaRef,
    columns: &'a Schema,
    files: &'a [LiveFile],
}

impl Bounds<'_> {
    fn values<'f>(
        &'f self,
        column: &Column,
        bound: impl Fn(&'f DataFile, i32) -> Option<&'f Datum>,
    ) -> Option<ArrayRef> {
        let data_type = self.schema.field_with_name(&column.name).ok()?.data_type();
        let id = self.columns.field_id_by_name(&column.name)?;
        let unknown = ScalarValue::try_from(data_type).ok()?;
        let values = self.files.iter().map(|live| {
            let file = live.file();
            let may_be_nan =
                data_type.is_floating() && file.nan_value_counts().get(&id) != Some(&0);
            if may_be_nan {
                return unknown.clone();
            }
            bound(file, id)
                .and_then(|datum| scalar(datum, data_type))
                .unwrap_or_else(|| unknown.clone())
        });
        ScalarValue::iter_to_array(values).ok()
    }
}

impl PruningStatistics for Bounds<'_> {
    fn min_values(&self, column: &Column) -> Option<ArrayRef> {
        self.values(column, |file, id| file.lower_bounds().get(&id))
    }
    fn max_values(&self, column: &Column) -> Option<ArrayRef> {
        self.values(column, |file, id| file.upper_bounds().get(&id))
    }
    fn num_containers(&self) -> usize {
        self.files.len()
    }
    fn null_counts(&self, column: &Column) -> Option<ArrayRef> {
        let id = self.columns.field_id_by_name(&column.name)?;
        let counts = self
            .files
            .iter()
            .map(|f| f.file().null_value_counts().get(&id).copied());
        Some(Arc::new(counts.collect::<UInt64Array>()))
    }
    fn row_counts(&self, _column: &Column) -> Option<ArrayRef> {
        let counts = self.files.iter().map(|f| Some(f.file().record_count()));
        Some(Arc::new(counts.collect::<UInt64Array>()))
    }
    fn contained(&self, _: &Column, _: &HashSet<ScalarValue>) -> Option<BooleanArray> {
        None
    }
}

/// A bound as a value of the column's type; `None` when it has no such form.
fn scalar(datum: &Datum, data_type: &DataType) -> Option<ScalarValue> {
    use PrimitiveLiteral as L;
    use PrimitiveType as T;
    let value = match (datum.data_type(), datum.literal()) {
        (T::Boolean, L::Boolean(v)) => ScalarValue::Boolean(Some(*v)),
        (T::Int, L::Int(v)) => ScalarValue::Int32(Some(*v)),
        (T::Date, L::Int(v)) => ScalarValue::Date32(Some(*v)),
        (T::Long, L::Long(v)) => ScalarValue::Int64(Some(*v)),
        (T::Time, L::Long(v)) => ScalarValue::Time64Microsecond(Some(*v)),
        (T::Timestamp | T::Timestamptz, L::Long(v)) => {
            ScalarValue::TimestampMicrosecond(Some(*v), None)
        }
        (T::Float, L::Float(v)) => ScalarValue::Float32(Some(v.into_inner())),
        (T::Double, L::Double(v)) => ScalarValue::Float64(Some(v.into_inner())),
        (T::String, L::String(v)) => ScalarValue::Utf8(Some(v.clone())),
        (T::Binary, L::Binary(v)) => ScalarValue::Binary(Some(v.clone())),
        (T::Decimal { precision, scale }, L::Int128(v)) => {
            ScalarValue::Decimal128(Some(*v), *precision as u8, *scale as i8)
        }
        _ => return None,
    };
    // A file may be older than the column's type; and a zone is not part of the value.
    match (value, data_type) {
        (ScalarValue::TimestampMicrosecond(v, _), DataType::Timestamp(_, zone)) => {
            Some(ScalarValue::TimestampMicrosecond(v, zone.clone()))
        }
        (value, data_type) if value.data_type() == *data_type => Some(value),
        (value, data_type) => value.cast_to(data_type).ok(),
    }
}
