//! The form of output columns: types that every part of the system knows, names that differ.

use std::collections::HashSet;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, TimeUnit};
use datafusion::common::Column;
use datafusion::logical_expr::{Cast, Expr, LogicalPlan, Projection};
use millrace_dataflow::error::{Error, Result};

use crate::error::{DUPLICATE_COLUMN, planning};
use crate::types::{timestamp, timestamptz};

/// Casts output columns of types that only the executor has.
pub(crate) fn shape(plan: LogicalPlan) -> Result<LogicalPlan> {
    let schema = Arc::clone(plan.schema());
    if schema.iter().all(|(_, f)| plain(f.data_type()).is_none()) {
        return Ok(plan);
    }
    let exprs = schema
        .iter()
        .map(|(qualifier, field)| {
            let column = Expr::Column(Column::new(qualifier.cloned(), field.name()));
            match plain(field.data_type()) {
                Some(data_type) => Expr::Cast(Cast::new(Box::new(column), data_type))
                    .alias_qualified(qualifier.cloned(), field.name()),
                None => column,
            }
        })
        .collect();
    Projection::try_new(exprs, Arc::new(plan))
        .map(LogicalPlan::Projection)
        .map_err(|e| planning(e).0)
}

/// The type that stands for another one at the edge; `None` when it can stay.
fn plain(data_type: &DataType) -> Option<DataType> {
    Some(match data_type {
        DataType::Null | DataType::LargeUtf8 | DataType::Utf8View => DataType::Utf8,
        DataType::Int8 | DataType::UInt8 => DataType::Int16,
        DataType::UInt16 => DataType::Int32,
        DataType::UInt32 => DataType::Int64,
        // Sources and tables have none; functions that count give it.
        DataType::UInt64 => DataType::Int64,
        DataType::Float16 => DataType::Float32,
        DataType::LargeBinary | DataType::BinaryView | DataType::FixedSizeBinary(_) => {
            DataType::Binary
        }
        DataType::Date64 => timestamp(),
        DataType::Time32(_) | DataType::Time64(TimeUnit::Nanosecond) => {
            DataType::Time64(TimeUnit::Microsecond)
        }
        DataType::Timestamp(unit, None) if *unit != TimeUnit::Microsecond => timestamp(),
        DataType::Timestamp(unit, Some(tz)) if *unit != TimeUnit::Microsecond || &**tz != "UTC" => {
            timestamptz()
        }
        DataType::Decimal32(p, s) | DataType::Decimal64(p, s) => DataType::Decimal128(*p, *s),
        DataType::Decimal256(_, s) => DataType::Decimal128(38, *s),
        DataType::Dictionary(_, value) => plain(value).unwrap_or_else(|| value.as_ref().clone()),
        DataType::List(field) => {
            let inner = plain(field.data_type())?;
            DataType::List(Arc::new(Field::new_list_field(inner, true)))
        }
        DataType::LargeList(field) | DataType::FixedSizeList(field, _) => {
            let inner = plain(field.data_type()).unwrap_or_else(|| field.data_type().clone());
            DataType::List(Arc::new(Field::new_list_field(inner, true)))
        }
        _ => return None,
    })
}

/// A relation's columns have different names.
pub(crate) fn unique_names(plan: &LogicalPlan) -> Result<()> {
    let mut seen = HashSet::new();
    for field in plan.schema().fields() {
        if !seen.insert(field.name().as_str()) {
            return Err(Error::invalid(format!(
                "column \"{}\" is specified more than once",
                field.name()
            ))
            .code(DUPLICATE_COLUMN)
            .hint("give one of them another name with AS"));
        }
    }
    Ok(())
}

/// Types that a view can hold.
pub(crate) fn storable(plan: &LogicalPlan) -> Result<()> {
    for field in plan.schema().fields() {
        if matches!(
            field.data_type(),
            DataType::Interval(_)
                | DataType::Duration(_)
                | DataType::Struct(_)
                | DataType::Map(_, _)
                | DataType::Union(_, _)
        ) {
            return Err(Error::unsupported(format!(
                "column \"{}\" is of type {}, which a view cannot hold",
                field.name(),
                crate::types::sql_name(field.data_type())
            ))
            .hint("CAST it to another type, or take it apart"));
        }
    }
    Ok(())
}
