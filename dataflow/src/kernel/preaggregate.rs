//! The first half of an aggregation: groups within one batch, before rows change workers.
//!
//! ```text
//! delta ──► late rows aside ──► groups (keys, pane) ──► partial columns ──► panes spread over windows
//! ```
//!
//! With a window folded in, a row costs one update of its pane, however many windows it belongs to: the
//! pane is the greatest common divisor of size and slide, and only the few partial rows are spread.
//!
//! # Contract
//!
//! * Output rows are keys, in the order of the spec, then one column per accumulator. Their diffs are
//!   +1; the diffs of the input are in the accumulators.
//! * A row is late in a window, or altogether, when `value of the close key + delay + allowed
//!   lateness <= watermark`. Late rows take no part and leave by themselves, windowed, diff kept.
//! * Nothing is kept from one delta to the next.

mod grouping;
mod panes;

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, RecordBatch, TimestampMicrosecondArray, UInt32Array,
};
use arrow::compute::{is_not_null, take};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit, TimestampMicrosecondType};

use super::accumulator::Layout;
use super::accumulator::partial::{self, Grouped};
use super::aggregate::AggregateSpec;
use super::late::{self, not};
use super::map::build;
use super::window::OUT_OF_RANGE;
use super::{RowErrors, nullable};
use crate::delta::Delta;
use crate::key::{self, RowCodec};
use crate::time::Watermark;
use grouping::Grouping;
use panes::Panes;

/// What pre-aggregation gives for one delta. None of the deltas is empty.
#[derive(Debug, Default)]
pub struct PreOutput {
    /// To be exchanged by the hash of the first `keys.len()` columns.
    pub partials: Vec<Delta>,
    /// Rows of the aggregate's (windowed) input.
    pub late: Vec<Delta>,
    /// Of [`super::errors_schema`].
    pub errors: Vec<Delta>,
}

/// Where a column of the windowed input is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Column {
    /// In the batch.
    Of(usize),
    WindowStart,
    WindowEnd,
}

/// The kernel of the stateless half. See the module contract.
#[derive(Debug)]
pub struct PreAggregate {
    spec: Arc<AggregateSpec>,
    layout: Layout,
    keys: Vec<Column>,
    close: Option<Column>,
    window: Option<(usize, Panes)>,
    /// An aggregate reads a window's bounds: rows are spread before they are grouped.
    spread: bool,
    /// Columns of the late rows.
    input: SchemaRef,
    output: SchemaRef,
    codec: RowCodec,
    grouping: Grouping,
}

impl PreAggregate {
    pub fn new(spec: Arc<AggregateSpec>) -> Self {
        let layout = Layout::new(&spec).expect("the plan was checked by `AggregateSpec::validate`");
        let width = spec.input.fields().len() - if spec.window.is_some() { 2 } else { 0 };
        let panes = spec.window.map(|(time, window)| (time, Panes::new(window)));
        let reads = |c: &Option<usize>| c.is_some_and(|c| c >= width);
        let spread = panes.is_some()
            && spec
                .calls
                .iter()
                .any(|c| reads(&c.input) || reads(&c.filter));
        let place = |column: &usize| match *column {
            column if spread || column < width => Column::Of(column),
            column if column == width => Column::WindowStart,
            _ => Column::WindowEnd,
        };
        let keys: Vec<Column> = spec.keys.iter().map(place).collect();
        let close = spec.close.map(|rule| keys[rule.key]);
        let mut types: Vec<DataType> = batch_keys(&keys)
            .map(|c| spec.input.field(c).data_type().clone())
            .collect();
        if panes.is_some() && !spread {
            types.push(DataType::Timestamp(TimeUnit::Microsecond, None));
        }
        Self {
            output: partial_schema(&spec, &layout),
            input: nullable(&spec.input),
            codec: RowCodec::keys(types)
                .expect("the plan was checked by `AggregateSpec::validate`"),
            grouping: Grouping::default(),
            window: panes,
            spread,
            keys,
            close,
            layout,
            spec,
        }
    }

    /// Columns of the partials.
    pub fn schema(&self) -> &SchemaRef {
        &self.output
    }

    /// Groups one delta; `watermark` is that of the tick before.
    pub fn apply(&mut self, delta: Delta, watermark: Watermark) -> PreOutput {
        let mut out = PreOutput::default();
        if let Some((time, panes)) = self.window {
            let Some(delta) = timed(delta, time, panes, &mut out) else {
                return out;
            };
            if !self.spread {
                self.apply_panes(delta, time, panes, watermark, &mut out);
                return out;
            }
            if let Some(delta) = self.windowed(&delta, &all_windows(&delta, time, panes), panes) {
                self.apply_rows(delta, watermark, &mut out);
            }
            return out;
        }
        self.apply_rows(delta, watermark, &mut out);
        out
    }

    /// Rows as they are, without panes.
    fn apply_rows(&mut self, delta: Delta, watermark: Watermark, out: &mut PreOutput) {
        let late = match self.close {
            Some(Column::Of(column)) => self.late(delta.batch.column(column), watermark),
            _ => None,
        };
        let delta = match late {
            None => Some(delta),
            Some(late) => {
                out.late.extend(delta.filter(&late));
                delta.filter(&not(&late))
            }
        };
        let Some(delta) = delta else { return };
        let (partials, first) = self.group(&delta, None);
        let rows = first.len();
        let mut all = self.key_columns(&delta.batch, &first, None);
        all.extend(partials);
        out.partials
            .push(Delta::inserts(build(&self.output, all, rows)));
    }

    /// Rows by their panes; the partial rows are spread over the windows of the pane.
    fn apply_panes(
        &mut self,
        mut delta: Delta,
        time: usize,
        panes: Panes,
        watermark: Watermark,
        out: &mut PreOutput,
    ) {
        if let Some(Column::Of(column)) = self.close
            && let Some(late) = self.late(delta.batch.column(column), watermark)
        {
            if let Some(late) = delta.filter(&late) {
                out.late
                    .extend(self.windowed(&late, &all_windows(&late, time, panes), panes));
            }
            match delta.filter(&not(&late)) {
                Some(left) => delta = left,
                None => return,
            }
        }
        // Windows that start before this one are closed.
        let open = match self.close {
            Some(Column::WindowStart) => self.open_from(watermark),
            Some(Column::WindowEnd) => self.open_from(watermark).saturating_sub(panes.size),
            _ => i64::MIN,
        };
        let starts = panes.of(times(&delta.batch, time).values());
        if open > i64::MIN {
            let mut late = Vec::new();
            for (row, pane) in starts.iter().enumerate() {
                if panes.first_window(*pane) < open {
                    let closed = panes.windows(*pane).filter(|start| *start < open);
                    late.extend(closed.map(|start| (row as u32, start)));
                }
            }
            out.late.extend(self.windowed(&delta, &late, panes));
        }
        let (partials, first) = self.group(&delta, Some(&starts));
        let pane = |group: usize| starts[first[group] as usize];
        // By distance from the last window of the pane, so that neighbours share a window.
        let mut groups = Vec::with_capacity(first.len());
        let mut windows = Vec::with_capacity(first.len());
        for distance in 0..panes.windows_per_pane() {
            for group in 0..first.len() {
                if let Some(start) = panes.window(pane(group), distance)
                    && start >= open
                {
                    groups.push(group as u32);
                    windows.push(start);
                }
            }
        }
        if groups.is_empty() {
            return;
        }
        let rows = groups.len();
        let whole = groups
            .iter()
            .enumerate()
            .all(|(at, group)| at == *group as usize)
            && rows == first.len();
        let groups = UInt32Array::from(groups);
        let first = if whole {
            first
        } else {
            groups
                .values()
                .iter()
                .map(|group| first[*group as usize])
                .collect()
        };
        let mut all = self.key_columns(&delta.batch, &first, Some((windows, panes.size)));
        all.extend(partials.into_iter().map(|column| {
            if whole {
                column
            } else {
                pick(&column, &groups)
            }
        }));
        out.partials
            .push(Delta::inserts(build(&self.output, all, rows)));
    }

    /// Partial columns, and for each group the first of its rows.
    fn group(&mut self, delta: &Delta, panes: Option<&[i64]>) -> (Vec<ArrayRef>, Vec<u32>) {
        let rows = delta.len();
        let columns: Vec<ArrayRef> = batch_keys(&self.keys)
            .map(|c| Arc::clone(delta.batch.column(c)))
            .collect();
        self.grouping.assign(&self.codec, &columns, panes, rows);
        let grouped = Grouped {
            batch: &delta.batch,
            diffs: &delta.diffs,
            ids: self.grouping.ids(),
            groups: self.grouping.first().len(),
        };
        let partials = self.layout.accumulators.iter().map(|accumulator| {
            partial::column(accumulator, &grouped).expect("types were checked with the plan")
        });
        (partials.collect(), self.grouping.first().to_vec())
    }

    /// The key columns of partial rows: of these rows of the batch, with these windows.
    fn key_columns(
        &self,
        batch: &RecordBatch,
        rows: &[u32],
        windows: Option<(Vec<i64>, i64)>,
    ) -> Vec<ArrayRef> {
        let (starts, size) = windows.unwrap_or_default();
        let rows = UInt32Array::from(rows.to_vec());
        let column = |key: &Column| -> ArrayRef {
            match key {
                // One zero and one NaN: every worker then shows the same one.
                Column::Of(c) => key::normalise(&pick(batch.column(*c), &rows)),
                Column::WindowStart => Arc::new(TimestampMicrosecondArray::from(starts.clone())),
                Column::WindowEnd => {
                    let ends = starts.iter().map(|start| start + size);
                    Arc::new(TimestampMicrosecondArray::from_iter_values(ends))
                }
            }
        };
        self.keys.iter().map(column).collect()
    }

    /// Values of the close key below this one are closed.
    fn open_from(&self, watermark: Watermark) -> i64 {
        late::open_from(self.spec.close, self.spec.allowed_lateness_us, watermark)
    }

    /// Rows that are late by a column of the batch; `None` when none is.
    fn late(&self, column: &ArrayRef, watermark: Watermark) -> Option<BooleanArray> {
        late::late(column, self.open_from(watermark))
    }

    /// The given (row, window start) pairs as rows of the windowed input; `None` when there is none.
    fn windowed(&self, delta: &Delta, pairs: &[(u32, i64)], panes: Panes) -> Option<Delta> {
        if pairs.is_empty() {
            return None;
        }
        let rows = UInt32Array::from_iter_values(pairs.iter().map(|(row, _)| *row));
        let taken = delta.take(&rows);
        let mut columns = taken.batch.columns().to_vec();
        let starts = pairs.iter().map(|(_, start)| *start);
        let ends = pairs.iter().map(|(_, start)| start + panes.size);
        columns.push(Arc::new(TimestampMicrosecondArray::from_iter_values(
            starts,
        )));
        columns.push(Arc::new(TimestampMicrosecondArray::from_iter_values(ends)));
        let batch = build(&self.input, columns, pairs.len());
        Some(Delta::new(batch, taken.diffs))
    }
}

/// Rows with a time whose windows fit into a timestamp; the others have no window, or are errors.
fn timed(delta: Delta, time: usize, panes: Panes, out: &mut PreOutput) -> Option<Delta> {
    let mut delta = delta;
    let column = times(&delta.batch, time);
    if column.null_count() > 0 {
        let mask = is_not_null(column).expect("a mask can be made of any column");
        delta = delta.filter(&mask)?;
    }
    let values = times(&delta.batch, time).values().clone();
    let low = values.iter().copied().min()?;
    let high = values.iter().copied().max()?;
    if panes.fits(low) && panes.fits(high) {
        return Some(delta);
    }
    let mut errors = RowErrors::default();
    for (row, value) in values.iter().enumerate() {
        if !panes.fits(*value) {
            errors.push(OUT_OF_RANGE.0, OUT_OF_RANGE.1, delta.diffs.get(row));
        }
    }
    out.errors.extend(errors.finish());
    let mask: BooleanArray = values
        .iter()
        .map(|value| Some(panes.fits(*value)))
        .collect();
    delta.filter(&mask)
}

fn all_windows(delta: &Delta, time: usize, panes: Panes) -> Vec<(u32, i64)> {
    let starts = panes.of(times(&delta.batch, time).values());
    let mut pairs = Vec::with_capacity(starts.len());
    for (row, pane) in starts.into_iter().enumerate() {
        pairs.extend(panes.windows(pane).map(|start| (row as u32, start)));
    }
    pairs
}

fn times(batch: &RecordBatch, column: usize) -> &TimestampMicrosecondArray {
    batch
        .column(column)
        .as_primitive::<TimestampMicrosecondType>()
}

fn pick(column: &ArrayRef, rows: &UInt32Array) -> ArrayRef {
    take(column, rows, None).expect("the rows lie within the batch")
}

fn batch_keys(keys: &[Column]) -> impl Iterator<Item = usize> {
    keys.iter().filter_map(|key| match key {
        Column::Of(column) => Some(*column),
        Column::WindowStart | Column::WindowEnd => None,
    })
}

fn partial_schema(spec: &AggregateSpec, layout: &Layout) -> SchemaRef {
    let keys = spec.keys.iter().map(|key| {
        let field = spec.input.field(*key);
        Field::new(field.name(), field.data_type().clone(), true)
    });
    let accumulators = layout.accumulators.iter().enumerate();
    let accumulators =
        accumulators.map(|(at, a)| Field::new(format!("accumulator {at}"), a.partial_type(), true));
    Arc::new(Schema::new(keys.chain(accumulators).collect::<Vec<_>>()))
}
