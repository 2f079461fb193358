//! Windows of time: which ones a row belongs to.
//!
//! A window begins at a multiple of the slide (counted from the epoch, also before it) and holds the
//! times from its start up to, and not including, its end.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, TimestampMicrosecondArray, UInt32Array};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit, TimestampMicrosecondType};

use super::map::{MapOutput, build};
use super::{RowErrors, nullable};
use crate::delta::Delta;
use crate::error::{Error, Result};
use crate::plan::TimeWindow;

pub(crate) const OUT_OF_RANGE: (&str, &str) = ("22008", "timestamp out of range of its window");

/// Rows put into windows. See [`assign`].
#[derive(Debug)]
pub struct Assigned {
    /// For each output row the input row; `None` when each input row stands once, in order.
    pub indices: Option<UInt32Array>,
    pub start: ArrayRef,
    pub end: ArrayRef,
    /// Rows whose windows do not fit into a timestamp.
    pub failed: Vec<u32>,
}

impl TimeWindow {
    /// Refuses lengths that are not positive.
    pub fn validate(&self) -> Result<()> {
        if self.size_us <= 0 || self.slide_us <= 0 {
            return Err(Error::invalid("window size and slide must be positive"));
        }
        Ok(())
    }

    /// Start of the last window that begins at or before `time`.
    #[inline]
    pub fn last_start(&self, time: i64) -> Option<i64> {
        floor(time, self.slide_us)
    }

    /// Hands the start of each window of `time` to `take`, ascending. `None` when one of them does not
    /// fit into a timestamp; then some may have been handed over.
    #[inline]
    pub fn each_start(&self, time: i64, mut take: impl FnMut(i64)) -> Option<()> {
        let last = self.last_start(time)?;
        last.checked_add(self.size_us)?;
        let past = time.checked_sub(last)?;
        if past >= self.size_us {
            return Some(()); // between two windows: slide > size
        }
        let earlier = (self.size_us - 1 - past) / self.slide_us;
        let mut start = last.checked_sub(earlier.checked_mul(self.slide_us)?)?;
        for _ in 0..=earlier {
            take(start);
            // The one after the last is not used; the others lie below `last`.
            start = start.wrapping_add(self.slide_us);
        }
        Some(())
    }
}

/// The multiple of `step` at or below `time`.
#[inline]
pub(crate) fn floor(time: i64, step: i64) -> Option<i64> {
    time.checked_sub(time.rem_euclid(step))
}

/// Puts each row into its windows. A row without a time is in none.
pub fn assign(batch: &RecordBatch, time: usize, window: TimeWindow) -> Result<Assigned> {
    window.validate()?;
    let times = batch
        .column(time)
        .as_primitive_opt::<TimestampMicrosecondType>()
        .ok_or_else(|| Error::internal("the time of a window is not a timestamp"))?;
    let rows = batch.num_rows();
    let tumbling = window.size_us == window.slide_us;
    let mut starts = Vec::with_capacity(rows);
    let mut failed = Vec::new();
    if tumbling && times.null_count() == 0 {
        let size = window.size_us;
        // Two range checks per batch instead of two per row.
        let values = times.values();
        let low = values.iter().copied().min().unwrap_or(0);
        let high = values.iter().copied().max().unwrap_or(0);
        if low.checked_sub(size).is_some() && high.checked_add(size).is_some() {
            starts.extend(values.iter().map(|time| time - time.rem_euclid(size)));
            return Ok(finish(None, starts, size, failed));
        }
    }
    let per_row = (window.size_us / window.slide_us + 1) as usize;
    let mut indices = Vec::with_capacity(rows * per_row.min(16));
    for row in 0..rows {
        if times.is_null(row) {
            continue;
        }
        let before = starts.len();
        if window
            .each_start(times.value(row), |start| starts.push(start))
            .is_none()
        {
            starts.truncate(before);
            failed.push(row as u32);
        }
        indices.resize(starts.len(), row as u32);
    }
    Ok(finish(Some(indices.into()), starts, window.size_us, failed))
}

fn finish(indices: Option<UInt32Array>, starts: Vec<i64>, size: i64, failed: Vec<u32>) -> Assigned {
    let ends: Vec<_> = starts.iter().map(|start| start + size).collect();
    Assigned {
        indices,
        start: Arc::new(TimestampMicrosecondArray::from(starts)),
        end: Arc::new(TimestampMicrosecondArray::from(ends)),
        failed,
    }
}

/// The window operator by itself, where no aggregate follows.
#[derive(Debug)]
pub struct WindowKernel {
    time: usize,
    window: TimeWindow,
    schema: SchemaRef,
}

impl WindowKernel {
    /// For rows of the schema `input`, whose column `time` is a timestamp.
    pub fn new(input: &Schema, time: usize, window: TimeWindow) -> Result<Self> {
        window.validate()?;
        let timestamp = DataType::Timestamp(TimeUnit::Microsecond, None);
        if input.fields().get(time).map(|f| f.data_type()) != Some(&timestamp) {
            return Err(Error::internal("the time of a window is not a timestamp"));
        }
        Ok(Self {
            time,
            window,
            schema: windowed_schema(input),
        })
    }

    /// Columns of the output: those of the input, `window_start` and `window_end`.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Puts each row into its windows.
    pub fn apply(&self, delta: Delta) -> Result<MapOutput> {
        let mut errors = RowErrors::default();
        let assigned = assign(&delta.batch, self.time, self.window)?;
        for row in &assigned.failed {
            let (code, message) = OUT_OF_RANGE;
            errors.push(code, message, delta.diffs.get(*row as usize));
        }
        let delta = match &assigned.indices {
            None => delta,
            Some(indices) => delta.take(indices),
        };
        let mut columns = delta.batch.columns().to_vec();
        columns.extend([assigned.start, assigned.end]);
        let rows = delta.len();
        Ok(MapOutput {
            delta: (rows > 0).then(|| Delta::new(build(&self.schema, columns, rows), delta.diffs)),
            errors: errors.finish(),
        })
    }
}

/// The schema of windowed rows of `input`.
pub fn windowed_schema(input: &Schema) -> SchemaRef {
    let timestamp = DataType::Timestamp(TimeUnit::Microsecond, None);
    let mut fields = nullable(input).fields().to_vec();
    fields.push(Arc::new(Field::new(
        "window_start",
        timestamp.clone(),
        true,
    )));
    fields.push(Arc::new(Field::new("window_end", timestamp, true)));
    Arc::new(Schema::new_with_metadata(fields, input.metadata().clone()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delta::Diffs;
    use crate::kernel::testing::{batch, consolidated, int, time};
    use arrow::array::Int64Array;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn a_row_is_in_every_window_that_covers_it(
            rows in prop::collection::vec((proptest::option::of(-50i64..50), -2i64..3), 1..60),
            size in 1i64..20, slide in 1i64..20,
        ) {
            let diffs: Vec<i64> = rows.iter().map(|r| if r.1 == 0 { 1 } else { r.1 }).collect();
            let ids = int((0..rows.len()).map(|id| Some(id as i64)));
            let input = batch(vec![("id", ids), ("at", time(rows.iter().map(|r| r.0)))]);
            let window = TimeWindow { size_us: size, slide_us: slide };
            let kernel = WindowKernel::new(&input.schema(), 1, window).unwrap();
            let out = kernel.apply(Delta::new(input, Diffs::from_vec(diffs.clone()))).unwrap();
            prop_assert!(out.errors.is_none());
            let mut got = BTreeMap::new();
            if let Some(delta) = &out.delta {
                let value = |column: usize, row: usize| match column {
                    0 => delta.batch.column(0).as_any().downcast_ref::<Int64Array>().unwrap().value(row),
                    c => delta.batch.column(c).as_primitive::<TimestampMicrosecondType>().value(row),
                };
                for row in 0..delta.len() {
                    prop_assert_eq!(value(3, row), value(2, row) + size);
                    *got.entry((value(0, row), value(2, row))).or_insert(0) += delta.diffs.get(row);
                }
            }
            let mut want = BTreeMap::new();
            for (id, (at, _)) in rows.iter().enumerate() {
                let Some(at) = at else { continue };
                for start in (-200..200).map(|n| n * slide) {
                    if start <= *at && *at < start + size {
                        *want.entry((id as i64, start)).or_insert(0) += diffs[id];
                    }
                }
            }
            prop_assert_eq!(got, want);
        }
    }

    #[test]
    fn times_at_the_ends_of_the_range_are_errors_of_their_row() {
        for window in [(10, 10), (10, 3)] {
            let window = TimeWindow {
                size_us: window.0,
                slide_us: window.1,
            };
            let input = batch(vec![(
                "at",
                time([Some(i64::MAX), Some(25), Some(i64::MIN)]),
            )]);
            let kernel = WindowKernel::new(&input.schema(), 0, window).unwrap();
            let out = kernel.apply(Delta::inserts(input)).unwrap();
            let errors = consolidated(out.errors.iter());
            assert_eq!(errors.values().sum::<i64>(), 2, "{window:?}");
            assert!(!out.delta.unwrap().is_empty());
        }
        let window = TimeWindow {
            size_us: 0,
            slide_us: 1,
        };
        assert!(WindowKernel::new(&batch(vec![("at", time([]))]).schema(), 0, window).is_err());
    }
}
