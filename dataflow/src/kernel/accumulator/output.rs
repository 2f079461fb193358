//! Output columns from groups' values.

use std::sync::Arc;

use arrow::array::{ArrayRef, Decimal128Array, Float64Array, Int64Array};
use arrow::datatypes::{DataType, MAX_DECIMAL128_FOR_EACH_PRECISION};

use super::wide::Wide;
use super::{Final, Layout, Slot, read_i64, tails, words};
use crate::error::{Error, Result};
use crate::exact::ExactSum;
use crate::key::RowCodec;

/// Columns of the aggregates, and which call of a row overflowed.
#[derive(Debug, Default)]
pub(crate) struct Output {
    pub columns: Vec<ArrayRef>,
    /// Per row the index of its first failing call; empty when none fails.
    pub failed: Vec<Option<u16>>,
}

impl Output {
    /// The first failing call of a row.
    pub(crate) fn failed(&self, row: usize) -> Option<u16> {
        self.failed.get(row).copied().flatten()
    }
}

/// The output columns of `values`; `types` are those of the columns.
pub(crate) fn columns(layout: &Layout, types: &[DataType], values: &[&[u8]]) -> Result<Output> {
    let mut out = Output {
        columns: Vec::with_capacity(types.len()),
        failed: Vec::new(),
    };
    for (call, (made, data_type)) in layout.finals.iter().zip(types).enumerate() {
        let column = one(layout, made, data_type, values, &mut |row: usize| {
            if out.failed.is_empty() {
                out.failed = vec![None; values.len()];
            }
            out.failed[row].get_or_insert(call as u16);
        })?;
        out.columns.push(column);
    }
    Ok(out)
}

fn one(
    layout: &Layout,
    made: &Final,
    data_type: &DataType,
    values: &[&[u8]],
    fail: &mut dyn FnMut(usize),
) -> Result<ArrayRef> {
    match made {
        Final::Count(count) => {
            let at = offset(layout, *count);
            let counts = values.iter().map(|value| read_i64(value, at));
            Ok(Arc::new(Int64Array::from_iter_values(counts)))
        }
        Final::Sum { sum, count, power } => {
            decimals(layout, values, (*sum, *count), data_type, fail, |s, _| {
                s.scaled(*power)
            })
        }
        Final::Average { sum, count, power } => {
            decimals(layout, values, (*sum, *count), data_type, fail, |s, n| {
                s.average(*power, n)
            })
        }
        Final::FloatSum { sum, count } => floats(layout, values, (*sum, *count), |s, _| s),
        Final::FloatAverage { sum, count } => {
            floats(layout, values, (*sum, *count), |s, n| s / n as f64)
        }
        Final::Extreme(at) => match layout.slots[*at] {
            Slot::Fixed(at) => {
                let valid: Vec<bool> = values.iter().map(|v| v[at] != 0).collect();
                let words: Vec<u64> = values.iter().map(|v| read_i64(v, at + 1) as u64).collect();
                Ok(words::restore(&words, &valid, data_type))
            }
            Slot::Tail(tail) => encoded(layout, values, *at, tail),
        },
        Final::Least(at) => encoded(layout, values, *at, tail(layout, *at)),
        Final::Greatest(at) => encoded(layout, values, *at, tail(layout, *at) + 1),
    }
}

fn offset(layout: &Layout, accumulator: usize) -> usize {
    match layout.slots[accumulator] {
        Slot::Fixed(at) => at,
        Slot::Tail(_) => unreachable!("counts and sums have fixed slots"),
    }
}

fn tail(layout: &Layout, accumulator: usize) -> usize {
    match layout.slots[accumulator] {
        Slot::Tail(at) => at,
        Slot::Fixed(_) => unreachable!("values have tails"),
    }
}

fn decimals(
    layout: &Layout,
    values: &[&[u8]],
    (sum, count): (usize, usize),
    data_type: &DataType,
    fail: &mut dyn FnMut(usize),
    compute: impl Fn(Wide, i64) -> Option<i128>,
) -> Result<ArrayRef> {
    let DataType::Decimal128(precision, scale) = data_type else {
        return Err(Error::internal(format!("a sum of type {data_type}")));
    };
    let limit = MAX_DECIMAL128_FOR_EACH_PRECISION[usize::from(*precision)];
    let (sum, count) = (offset(layout, sum), offset(layout, count));
    let mut column = Vec::with_capacity(values.len());
    for (row, value) in values.iter().enumerate() {
        let terms = read_i64(value, count);
        if terms <= 0 {
            column.push(None);
            continue;
        }
        let result = compute(Wide::from_bytes(&value[sum..]), terms);
        let result = result.filter(|r| r.unsigned_abs() <= limit.unsigned_abs());
        if result.is_none() {
            fail(row);
        }
        column.push(result);
    }
    let column = Decimal128Array::from_iter(column).with_precision_and_scale(*precision, *scale);
    Ok(Arc::new(
        column.map_err(|e| Error::internal(e.to_string()))?,
    ))
}

fn floats(
    layout: &Layout,
    values: &[&[u8]],
    (sum, count): (usize, usize),
    compute: impl Fn(f64, i64) -> f64,
) -> Result<ArrayRef> {
    let (sum, count) = (tail(layout, sum), offset(layout, count));
    let mut column = Vec::with_capacity(values.len());
    for value in values {
        let terms = read_i64(value, count);
        column.push(if terms <= 0 {
            None
        } else {
            let bytes = tails(value, layout.fixed).nth(sum).unwrap_or_default();
            Some(compute(ExactSum::from_bytes(bytes)?.value(), terms))
        });
    }
    Ok(Arc::new(Float64Array::from(column)))
}

/// Values kept as row bytes; none is null.
fn encoded(layout: &Layout, values: &[&[u8]], accumulator: usize, tail: usize) -> Result<ArrayRef> {
    let codec = layout.accumulators[accumulator].codec.as_ref();
    let codec = codec.expect("its values are kept as row bytes");
    let null = null_row(codec)?;
    let rows = values.iter().map(|value| {
        let bytes = tails(value, layout.fixed).nth(tail).unwrap_or_default();
        if bytes.is_empty() {
            null.as_slice()
        } else {
            bytes
        }
    });
    let mut columns = codec.decode(rows)?;
    Ok(columns.remove(0))
}

fn null_row(codec: &RowCodec) -> Result<Vec<u8>> {
    let null = arrow::array::new_null_array(&codec.types()[0], 1);
    Ok(codec.encode(&[null], 1)?.row(0).to_vec())
}
