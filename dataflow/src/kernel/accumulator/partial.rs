//! Accumulators of one batch, by group, as columns.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BinaryBuilder, FixedSizeBinaryArray, Int64Array, RecordBatch,
    UInt32Array,
};
use arrow::buffer::{BooleanBuffer, Buffer};
use arrow::compute::{cast, take};
use arrow::datatypes::{DataType, Decimal128Type, Float64Type, Int64Type, UInt64Type};

use super::wide::Wide;
use super::{Accumulator, Kind, words};
use crate::delta::Diffs;
use crate::error::{Error, Result};
use crate::exact::ExactSum;
use crate::key;

const NONE: u32 = u32::MAX;

/// Rows of a batch in groups.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grouped<'a> {
    pub batch: &'a RecordBatch,
    pub diffs: &'a Diffs,
    /// The group of each row.
    pub ids: &'a [u32],
    pub groups: usize,
}

impl Grouped<'_> {
    /// Rows that count for the accumulator; `None` is all.
    fn mask(&self, accumulator: &Accumulator) -> Option<BooleanBuffer> {
        let valid = accumulator
            .input
            .and_then(|c| self.batch.column(c).logical_nulls());
        let valid = valid
            .filter(|n| n.null_count() > 0)
            .map(|n| n.inner().clone());
        let wanted = accumulator.filter.map(|c| {
            let column = self.batch.column(c).as_boolean();
            match column.nulls() {
                Some(nulls) => column.values() & nulls.inner(),
                None => column.values().clone(),
            }
        });
        match (valid, wanted) {
            (Some(valid), Some(wanted)) => Some(&valid & &wanted),
            (valid, wanted) => valid.or(wanted),
        }
    }

    /// Hands row and group of each row of the mask to `take`.
    #[inline]
    fn each(&self, mask: Option<&BooleanBuffer>, mut take: impl FnMut(usize, usize)) {
        match mask {
            None => {
                for (row, group) in self.ids.iter().enumerate() {
                    take(row, *group as usize);
                }
            }
            Some(mask) => {
                for row in mask.set_indices() {
                    take(row, self.ids[row] as usize);
                }
            }
        }
    }
}

/// The accumulator's partial column, one row per group.
pub(crate) fn column(accumulator: &Accumulator, rows: &Grouped<'_>) -> Result<ArrayRef> {
    let mask = rows.mask(accumulator);
    let mask = mask.as_ref();
    match accumulator.kind {
        Kind::Count => Ok(count(rows, mask)),
        Kind::Sum => sum(rows, mask, input(accumulator, rows)),
        Kind::FloatSum => float_sum(rows, mask, input(accumulator, rows)),
        Kind::Extreme { max } => extreme(accumulator, rows, mask, max),
        Kind::Values { .. } => values(accumulator, rows, mask),
    }
}

fn input<'a>(accumulator: &Accumulator, rows: &Grouped<'a>) -> &'a ArrayRef {
    let column = accumulator.input.expect("only counts have no input");
    rows.batch.column(column)
}

fn count(rows: &Grouped<'_>, mask: Option<&BooleanBuffer>) -> ArrayRef {
    let mut counts = vec![0i64; rows.groups];
    match rows.diffs {
        Diffs::Ones => rows.each(mask, |_, group| counts[group] += 1),
        Diffs::Each(diffs) => rows.each(mask, |row, group| {
            counts[group] = counts[group].wrapping_add(diffs[row]);
        }),
    }
    Arc::new(Int64Array::from(counts))
}

fn sum(rows: &Grouped<'_>, mask: Option<&BooleanBuffer>, column: &ArrayRef) -> Result<ArrayRef> {
    let mut sums = vec![Wide::default(); rows.groups];
    let mut add_all = |value: &dyn Fn(usize) -> i128| match rows.diffs {
        Diffs::Ones => rows.each(mask, |row, group| sums[group].add(value(row))),
        Diffs::Each(diffs) => {
            rows.each(mask, |row, group| {
                sums[group].add_times(value(row), diffs[row])
            });
        }
    };
    match column.data_type() {
        DataType::Int64 => {
            let values = column.as_primitive::<Int64Type>().values();
            // The common case, without a call per row.
            match rows.diffs {
                Diffs::Ones => {
                    rows.each(mask, |row, group| sums[group].add(i128::from(values[row])));
                }
                Diffs::Each(_) => add_all(&|row| i128::from(values[row])),
            }
        }
        DataType::UInt64 => {
            let values = column.as_primitive::<UInt64Type>().values();
            add_all(&|row| i128::from(values[row]));
        }
        DataType::Decimal128(_, _) => {
            let values = column.as_primitive::<Decimal128Type>().values();
            add_all(&|row| values[row]);
        }
        DataType::Decimal32(_, s) | DataType::Decimal64(_, s) => {
            let column = converted(column, &DataType::Decimal128(38, *s))?;
            let values = column.as_primitive::<Decimal128Type>().values();
            add_all(&|row| values[row]);
        }
        _ => {
            let column = converted(column, &DataType::Int64)?;
            let values = column.as_primitive::<Int64Type>().values();
            add_all(&|row| i128::from(values[row]));
        }
    }
    let bytes: Vec<u8> = sums.into_iter().flat_map(Wide::to_bytes).collect();
    let column =
        FixedSizeBinaryArray::new(super::wide::BYTES as i32, Buffer::from_vec(bytes), None);
    Ok(Arc::new(column))
}

fn float_sum(
    rows: &Grouped<'_>,
    mask: Option<&BooleanBuffer>,
    column: &ArrayRef,
) -> Result<ArrayRef> {
    let column = converted(column, &DataType::Float64)?;
    let values = column.as_primitive::<Float64Type>().values();
    let mut sums = vec![ExactSum::new(); rows.groups];
    rows.each(mask, |row, group| {
        sums[group].add(values[row], rows.diffs.get(row))
    });
    let mut out = BinaryBuilder::with_capacity(rows.groups, rows.groups * 40);
    let mut bytes = Vec::new();
    for sum in &sums {
        bytes.clear();
        sum.write(&mut bytes);
        out.append_value(&bytes);
    }
    Ok(Arc::new(out.finish()))
}

/// The extreme of each group, as a value of the input; null where there is none.
fn extreme(
    accumulator: &Accumulator,
    rows: &Grouped<'_>,
    mask: Option<&BooleanBuffer>,
    max: bool,
) -> Result<ArrayRef> {
    let column = input(accumulator, rows);
    let mut best_rows = vec![NONE; rows.groups];
    if let Some(codec) = &accumulator.codec {
        let encoded = codec.encode(std::slice::from_ref(column), rows.batch.num_rows())?;
        rows.each(mask, |row, group| {
            let best = &mut best_rows[group];
            let better = *best == NONE || {
                let (new, old) = (encoded.row(row), encoded.row(*best as usize));
                if max { new > old } else { new < old }
            };
            if better {
                *best = row as u32;
            }
        });
    } else {
        let flip = if max { 0 } else { u64::MAX };
        let words = words::ordered(column).expect("other types have a codec");
        let mut best_words = vec![0u64; rows.groups];
        rows.each(mask, |row, group| {
            let word = words[row] ^ flip;
            if best_rows[group] == NONE || word > best_words[group] {
                best_words[group] = word;
                best_rows[group] = row as u32;
            }
        });
    }
    let indices: UInt32Array = if best_rows.contains(&NONE) {
        let index = |row: u32| (row != NONE).then_some(row);
        best_rows.into_iter().map(index).collect()
    } else {
        best_rows.into()
    };
    let best = take(column, &indices, None).map_err(|e| Error::internal(e.to_string()))?;
    Ok(key::normalise(&best))
}

/// Per group the values that occur, each once: length, row bytes, count.
fn values(
    accumulator: &Accumulator,
    rows: &Grouped<'_>,
    mask: Option<&BooleanBuffer>,
) -> Result<ArrayRef> {
    let codec = accumulator
        .codec
        .as_ref()
        .expect("values are kept as row bytes");
    let column = input(accumulator, rows);
    let encoded = codec.encode(std::slice::from_ref(column), rows.batch.num_rows())?;
    let mut entries: Vec<(u32, u32)> = Vec::new();
    rows.each(mask, |row, group| entries.push((group as u32, row as u32)));
    let bytes = |row: u32| encoded.row(row as usize);
    entries.sort_unstable_by(|a, b| a.0.cmp(&b.0).then_with(|| bytes(a.1).cmp(bytes(b.1))));
    let mut out = BinaryBuilder::with_capacity(rows.groups, entries.len() * 24);
    let mut blob = Vec::new();
    let mut entries = entries.into_iter().peekable();
    for group in 0..rows.groups as u32 {
        blob.clear();
        while let Some((_, row)) = entries.next_if(|e| e.0 == group) {
            let value = bytes(row);
            let mut count = rows.diffs.get(row as usize);
            while let Some((_, same)) = entries.next_if(|e| e.0 == group && bytes(e.1) == value) {
                count = count.wrapping_add(rows.diffs.get(same as usize));
            }
            if count != 0 {
                super::push_tail(&mut blob, value);
                blob.extend_from_slice(&count.to_le_bytes());
            }
        }
        out.append_value(&blob);
    }
    Ok(Arc::new(out.finish()))
}

/// Value and count of each entry of a blob that [`values`] made.
pub(crate) fn entries(mut blob: &[u8]) -> impl Iterator<Item = (&[u8], i64)> {
    std::iter::from_fn(move || {
        let (length, rest) = blob.split_first_chunk::<4>()?;
        let (value, rest) = rest.split_at(u32::from_le_bytes(*length) as usize);
        let (count, rest) = rest.split_first_chunk::<8>()?;
        blob = rest;
        Some((value, i64::from_le_bytes(*count)))
    })
}

fn converted(column: &ArrayRef, to: &DataType) -> Result<ArrayRef> {
    if column.data_type() == to {
        return Ok(Arc::clone(column));
    }
    cast(column, to).map_err(|e| Error::internal(format!("a term cannot be widened: {e}")))
}
