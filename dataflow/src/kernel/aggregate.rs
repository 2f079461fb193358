//! The second half of an aggregation: groups in keyed state, changed by partial rows.
//!
//! ```text
//! partials of a tick ──► apply ──► groups touched, each with its value before the tick
//!                        finish ─► -old +new (EMIT CHANGES), or closed groups once (ON WINDOW CLOSE)
//! ```
//!
//! # Contract
//!
//! * What a group shows depends on the multiset of its rows alone. A group is shown while it has rows
//!   (the single group of an aggregation without keys always), or as an error where a sum overflows.
//! * All partials of a tick come in one or more [`AggregateState::apply`], then one
//!   [`AggregateState::finish`] with the tick's watermark.
//! * With a close rule there is one table per value of the close key; it is dropped whole when
//!   `watermark >= value + delay + allowed lateness`. Under EMIT CHANGES nothing is said of it, so there
//!   one table serves all values of a second and goes with the last of them.
//! * A delta of changes has retractions first; closed groups come by close time, then by key group and hash.

mod groups;

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BinaryArray, Int64Array, TimestampMicrosecondArray};
use arrow::compute::interleave;
use arrow::datatypes::{DataType, SchemaRef, TimeUnit};

use super::accumulator::{Kind, Layout, output, rows_in, words};
use super::late;
use super::map::build;
use super::order::{Order, Placed, Time};
use super::{OUTPUT_ROWS, RowErrors, TickOutput, WARM_ROWS, nullable};
use crate::delta::{Delta, Diffs};
use crate::error::{Error, ErrorKind, Result};
use crate::key::{Encoded, GROUPS, RowCodec, Share, hash_bytes, hash_encoded};
use crate::plan::{AggregateCall, CloseRule, Emit, TimeWindow};
use crate::state::{Part, PartData, Stateful, StoredPart};
use crate::time::Watermark;
use groups::Groups;

/// What an aggregation is. Keys and calls are over the columns of `input`.
#[derive(Debug, Clone)]
pub struct AggregateSpec {
    /// Columns of the input; with a window folded in, the last two are `window_start` and `window_end`.
    pub input: SchemaRef,
    /// Keys, then aggregates.
    pub output: SchemaRef,
    pub keys: Vec<usize>,
    pub calls: Vec<AggregateCall>,
    pub close: Option<CloseRule>,
    pub emit: Emit,
    pub allowed_lateness_us: i64,
    /// The window that is computed here, over this column; the deltas given lack its two columns.
    pub window: Option<(usize, TimeWindow)>,
    /// The input has diffs other than +1.
    pub retracting: bool,
}

impl AggregateSpec {
    /// Refuses what the kernels cannot compute. They expect a spec that passed.
    pub fn validate(&self) -> Result<()> {
        Layout::new(self)?;
        RowCodec::keys(self.key_types())?;
        let timestamp = DataType::Timestamp(TimeUnit::Microsecond, None);
        if let Some(rule) = &self.close
            && self.key_types().get(rule.key) != Some(&timestamp)
        {
            return Err(Error::internal(
                "groups are closed by a key that is no timestamp",
            ));
        }
        if self.emit == Emit::OnClose && self.close.is_none() {
            return Err(
                Error::invalid("emit on window close needs a key that closes").hint(
                    "group by the start or the end of a window over a column with a watermark",
                ),
            );
        }
        if let Some((time, window)) = &self.window {
            window.validate()?;
            if self.input.fields().get(*time).map(|f| f.data_type()) != Some(&timestamp) {
                return Err(Error::internal("the time of a window is not a timestamp"));
            }
        }
        Ok(())
    }

    fn key_types(&self) -> Vec<DataType> {
        let types = self
            .keys
            .iter()
            .map(|k| self.input.field(*k).data_type().clone());
        types.collect()
    }
}

/// The state of the groups of one worker. See the module contract.
#[derive(Debug)]
pub struct AggregateState {
    spec: Arc<AggregateSpec>,
    share: Share,
    layout: Layout,
    /// Types of the aggregates.
    types: Vec<DataType>,
    codec: RowCodec,
    schema: SchemaRef,
    /// By value of the close key; groups without one never close.
    buckets: BTreeMap<Time, Groups>,
    /// Groups of the table that closed last: the next ones will have about as many.
    usual: u64,
}

/// Partial columns of one delta, read by row.
#[derive(Debug)]
pub(super) enum PartialColumn<'a> {
    Count(&'a [i64]),
    /// 24 bytes a row.
    Sum(&'a [u8]),
    Blob(&'a BinaryArray),
    Words(Vec<u64>, &'a ArrayRef),
    Rows(Encoded, &'a ArrayRef),
}

impl AggregateState {
    pub fn new(spec: Arc<AggregateSpec>, worker: usize, workers: usize) -> Self {
        let layout = Layout::new(&spec).expect("the plan was checked by `AggregateSpec::validate`");
        let codec = RowCodec::keys(spec.key_types());
        Self {
            share: Share { worker, workers },
            types: spec.calls.iter().map(|call| call.output.clone()).collect(),
            codec: codec.expect("the plan was checked by `AggregateSpec::validate`"),
            schema: nullable(&spec.output),
            buckets: BTreeMap::new(),
            usual: 0,
            layout,
            spec,
        }
    }

    /// Columns of the output.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Adds partial rows of the current tick, as [`super::preaggregate::PreAggregate`] makes them.
    pub fn apply(&mut self, partials: &[Delta]) {
        // Enough rows to visit each part of the state once for many of them.
        const ROWS: usize = 4 * OUTPUT_ROWS;
        let mut rest = partials;
        while !rest.is_empty() {
            let mut rows = 0;
            let mut fits = |delta: &Delta| {
                rows += delta.len();
                rows <= ROWS
            };
            let count = rest.iter().take_while(|delta| fits(delta)).count().max(1);
            let (now, later) = rest.split_at(count);
            self.add(now).expect("partials come from the same plan");
            rest = later;
        }
    }

    fn add(&mut self, partials: &[Delta]) -> Result<()> {
        let read = |delta| Source::read(delta, &self.layout, &self.codec, self.spec.close);
        let sources = partials.iter().map(read).collect::<Result<Vec<_>>>()?;
        let emit = self.spec.emit;
        let rows = sources.iter().enumerate().flat_map(|(number, source)| {
            let rows = source.hashes.iter().enumerate();
            rows.map(move |(row, hash)| {
                let at = late::table_of(emit, source.time(row));
                (at, *hash, number as u32, row as u32)
            })
        });
        let order = Order::new(rows);
        for (time, run) in order.runs() {
            let how = (self.spec.emit, self.usual);
            let groups = bucket(&mut self.buckets, time, how, &self.layout);
            for block in run.chunks(WARM_ROWS) {
                let place = |at: &Placed| (&sources[at.source as usize], at.row as usize);
                groups.warm(
                    block
                        .iter()
                        .map(place)
                        .map(|(source, row)| source.hashes[row]),
                );
                for (source, row) in block.iter().map(place) {
                    let key = (source.hashes[row], source.encoded.row(row));
                    groups.add(&self.layout, key, &source.columns, row);
                }
                groups.relieve();
            }
        }
        Ok(())
    }

    /// Ends the tick: what changed, or closed, by it.
    pub fn finish(&mut self, watermark: Watermark) -> TickOutput {
        let mut out = TickOutput::default();
        let mut errors = RowErrors::default();
        match self.spec.emit {
            Emit::Changes => {
                self.create_single_group();
                let mut buckets = std::mem::take(&mut self.buckets);
                for groups in buckets.values_mut().filter(|groups| groups.touched() > 0) {
                    let shown = self.changes(groups, &mut out, &mut errors);
                    let gone = shown.expect("stored groups are of this plan");
                    groups.end_tick(&self.layout, &gone);
                }
                buckets.values_mut().for_each(Groups::relieve);
                buckets.retain(|_, groups| !groups.is_empty());
                self.buckets = buckets;
                while self.first_closed(watermark).is_some() {}
            }
            Emit::OnClose => {
                while let Some(mut groups) = self.first_closed(watermark) {
                    let shown = self.closed(&mut groups, &mut out, &mut errors);
                    shown.expect("stored groups are of this plan");
                }
                self.buckets.values_mut().for_each(Groups::relieve);
            }
        }
        out.errors.extend(errors.finish());
        out
    }

    /// Takes out the table that closed first, if one did.
    fn first_closed(&mut self, watermark: Watermark) -> Option<Groups> {
        let rule = self.spec.close?;
        let (value, _) = self.buckets.range(Some(i64::MIN)..).next()?;
        let value = *value;
        let past = late::closes_after(rule, self.spec.allowed_lateness_us, self.spec.emit);
        if watermark < value?.saturating_add(past) {
            return None;
        }
        let closed = self.buckets.remove(&value)?;
        self.usual = closed.count();
        Some(closed)
    }

    /// An aggregation without keys has its group from the first tick on.
    fn create_single_group(&mut self) {
        let hash = hash_bytes(&[]);
        if self.spec.keys.is_empty() && self.share.owns(hash) {
            let groups = bucket(&mut self.buckets, None, (self.spec.emit, 0), &self.layout);
            groups.create(&self.layout, (hash, &[]));
        }
    }

    /// Old and new rows of the groups touched in this tick; gives the places, among those touched, of
    /// groups without rows.
    fn changes(
        &self,
        groups: &mut Groups,
        out: &mut TickOutput,
        errors: &mut RowErrors,
    ) -> Result<Vec<usize>> {
        /// So many when each may need a page of its own that is not in memory.
        const FEW: usize = 2048;
        let mut gone = Vec::new();
        let mut from = 0;
        while from < groups.touched() {
            groups.relieve();
            let count = if groups.is_over() {
                FEW
            } else {
                OUTPUT_ROWS / 2
            };
            self.changes_of(groups, (from, count), out, errors, &mut gone)?;
            from += count;
        }
        if self.spec.keys.is_empty() {
            // The single group stays.
            gone.clear();
        }
        Ok(gone)
    }

    /// As [`Self::changes`] for `count` touched groups from `from` on.
    fn changes_of(
        &self,
        groups: &Groups,
        (from, count): (usize, usize),
        out: &mut TickOutput,
        errors: &mut RowErrors,
        gone: &mut Vec<usize>,
    ) -> Result<()> {
        let mut touched = Vec::with_capacity(groups.touched().min(count));
        groups.changed((from, count), &mut touched, gone);
        if touched.is_empty() {
            return Ok(());
        }
        let initial = self.layout.initial.as_slice();
        let some_old = touched.iter().any(|t| t.old.is_some());
        let news: Vec<&[u8]> = touched.iter().map(|t| t.new).collect();
        let new = output::columns(&self.layout, &self.types, &news)?;
        let olds: Vec<&[u8]> = touched.iter().map(|t| t.old.unwrap_or(initial)).collect();
        let old = if some_old {
            output::columns(&self.layout, &self.types, &olds)?
        } else {
            output::Output::default()
        };
        let same = if some_old {
            same_rows(&old.columns, &new.columns)?
        } else {
            None
        };
        let (mut retract, mut insert) = (Vec::new(), Vec::new());
        for (at, touch) in touched.iter().enumerate() {
            let shows = |value: &[u8]| self.spec.keys.is_empty() || rows_in(value) > 0;
            let was = touch.old.is_some_and(shows);
            let is = shows(touch.new);
            let was_failed = if was { old.failed(at) } else { None };
            let is_failed = if is { new.failed(at) } else { None };
            if was_failed != is_failed {
                self.error(was_failed, -1, errors);
                self.error(is_failed, 1, errors);
            }
            let (was, is) = (was && was_failed.is_none(), is && is_failed.is_none());
            if was && is && same.as_ref().is_none_or(|same| same[at]) {
                continue;
            }
            if was {
                retract.push(at);
            }
            if is {
                insert.push(at);
            }
        }
        let rows = retract.len() + insert.len();
        if rows == 0 {
            return Ok(());
        }
        let shown = retract.iter().chain(&insert);
        let mut columns = self.codec.decode(shown.map(|at| touched[*at].key))?;
        let from_old = retract.iter().map(|at| (0, *at));
        let from: Vec<_> = from_old.chain(insert.iter().map(|at| (1, *at))).collect();
        for (at, new) in new.columns.iter().enumerate() {
            // Where nothing was shown there are no old columns, and no index into them.
            let old = old.columns.get(at).unwrap_or(new);
            columns.push(interleave(&[old, new], &from).map_err(internal)?);
        }
        let mut diffs = vec![-1; retract.len()];
        diffs.resize(rows, 1);
        let batch = build(&self.schema, columns, rows);
        out.deltas.push(Delta::new(batch, Diffs::from_vec(diffs)));
        Ok(())
    }

    /// All rows of a closed table.
    fn closed(
        &self,
        groups: &mut Groups,
        out: &mut TickOutput,
        errors: &mut RowErrors,
    ) -> Result<()> {
        let mut next = 0;
        while next < GROUPS {
            next = self.closed_from(groups, next, out, errors)?;
            groups.relieve();
        }
        Ok(())
    }

    /// Rows of a closed table from a key group on, as many as are worth it; the group after those.
    fn closed_from(
        &self,
        groups: &Groups,
        from: usize,
        out: &mut TickOutput,
        errors: &mut RowErrors,
    ) -> Result<usize> {
        let mut rows = Vec::new();
        let mut next = from;
        while next < GROUPS && rows.len() < OUTPUT_ROWS && (next == from || !groups.is_over()) {
            let begin = rows.len();
            let of_group = groups.of_key_group(next as u8);
            rows.extend(of_group.filter(|row| rows_in(row.2) > 0));
            rows[begin..].sort_unstable_by_key(|row| (row.0, row.1));
            next += 1;
        }
        for chunk in rows.chunks(OUTPUT_ROWS) {
            let values: Vec<&[u8]> = chunk.iter().map(|row| row.2).collect();
            let made = output::columns(&self.layout, &self.types, &values)?;
            let mut columns = self.codec.decode(chunk.iter().map(|row| row.1))?;
            columns.extend(made.columns.iter().map(Arc::clone));
            let mut delta = Delta::inserts(build(&self.schema, columns, chunk.len()));
            if !made.failed.is_empty() {
                made.failed
                    .iter()
                    .for_each(|call| self.error(*call, 1, errors));
                let good = made
                    .failed
                    .iter()
                    .map(|call| Some(call.is_none()))
                    .collect();
                match delta.filter(&good) {
                    Some(left) => delta = left,
                    None => continue,
                }
            }
            out.deltas.push(delta);
        }
        Ok(next)
    }

    /// The error of a group one of whose sums does not fit.
    fn error(&self, call: Option<u16>, diff: i64, errors: &mut RowErrors) {
        if let Some(call) = call {
            let field = self.schema.field(self.spec.keys.len() + usize::from(call));
            errors.push(
                "22003",
                format!("\"{}\" is out of range", field.name()),
                diff,
            );
        }
    }
}

/// One delta of partials, read.
#[derive(Debug)]
struct Source<'a> {
    encoded: Encoded,
    hashes: Vec<u64>,
    columns: Vec<PartialColumn<'a>>,
    /// Values of the close key.
    times: Option<&'a TimestampMicrosecondArray>,
}

impl<'a> Source<'a> {
    fn read(
        delta: &'a Delta,
        layout: &Layout,
        codec: &RowCodec,
        close: Option<CloseRule>,
    ) -> Result<Self> {
        let (keys, accumulators) = delta.batch.columns().split_at(codec.types().len());
        let encoded = codec.encode(keys, delta.len())?;
        let times = close.map(|rule| keys[rule.key].as_primitive());
        Ok(Self {
            hashes: hash_encoded(keys, &encoded)?,
            columns: partial_columns(layout, accumulators, delta.len())?,
            encoded,
            times,
        })
    }

    fn time(&self, row: usize) -> Time {
        let times = self.times.filter(|times| times.is_valid(row))?;
        Some(times.value(row))
    }
}

fn bucket<'a>(
    buckets: &'a mut BTreeMap<Time, Groups>,
    at: Time,
    (emit, expected): (Emit, u64),
    layout: &Layout,
) -> &'a mut Groups {
    buckets
        .entry(at)
        .or_insert_with(|| Groups::new(layout, emit == Emit::Changes, expected))
}

fn partial_columns<'a>(
    layout: &Layout,
    columns: &'a [ArrayRef],
    rows: usize,
) -> Result<Vec<PartialColumn<'a>>> {
    let read = |(accumulator, column): (&super::accumulator::Accumulator, &'a ArrayRef)| {
        Ok(match accumulator.kind {
            Kind::Count => {
                let counts = column.as_any().downcast_ref::<Int64Array>();
                PartialColumn::Count(counts.ok_or_else(mismatch)?.values())
            }
            Kind::Sum => PartialColumn::Sum(
                column
                    .as_fixed_size_binary_opt()
                    .ok_or_else(mismatch)?
                    .value_data(),
            ),
            Kind::FloatSum | Kind::Values { .. } => {
                PartialColumn::Blob(column.as_binary_opt().ok_or_else(mismatch)?)
            }
            Kind::Extreme { .. } => match &accumulator.codec {
                Some(codec) => {
                    PartialColumn::Rows(codec.encode(std::slice::from_ref(column), rows)?, column)
                }
                None => PartialColumn::Words(words::ordered(column).ok_or_else(mismatch)?, column),
            },
        })
    };
    if columns.len() != layout.accumulators.len() {
        return Err(mismatch());
    }
    layout.accumulators.iter().zip(columns).map(read).collect()
}

fn mismatch() -> Error {
    Error::internal("a partial row does not fit the aggregation")
}

fn internal(e: arrow::error::ArrowError) -> Error {
    Error::internal(e.to_string())
}

/// Which rows are equal in all columns; `None` when all are.
fn same_rows(old: &[ArrayRef], new: &[ArrayRef]) -> Result<Option<Vec<bool>>> {
    let mut same: Option<Vec<bool>> = None;
    for (old, new) in old.iter().zip(new) {
        let equal = arrow::compute::kernels::cmp::not_distinct(old, new).map_err(internal)?;
        if equal.false_count() > 0 {
            let same = same.get_or_insert_with(|| vec![true; equal.len()]);
            for (same, equal) in same.iter_mut().zip(equal.values()) {
                *same &= equal;
            }
        }
    }
    Ok(same)
}

impl Stateful for AggregateState {
    fn freeze(&mut self) -> Vec<Part> {
        let mut parts = Vec::new();
        for (at, groups) in &mut self.buckets {
            let at = at.map_or("open".to_string(), |at| at.to_string());
            for (kind, snapshot) in groups.snapshot() {
                let name = format!("{kind}:{at}");
                parts.push(Part {
                    name,
                    data: PartData::Keyed(snapshot),
                });
            }
        }
        parts
    }

    fn restore(&mut self, parts: &[StoredPart]) -> Result<()> {
        let owned = self.share.groups();
        for part in parts {
            let strange = || {
                Error::new(
                    ErrorKind::Corrupt,
                    "stored state is not that of an aggregation",
                )
                .detail(format!("part: {}", part.name))
            };
            let (kind, at) = part.name.split_once(':').ok_or_else(strange)?;
            let at = match at {
                "open" => None,
                at => Some(at.parse().map_err(|_| strange())?),
            };
            let at = late::table_of(self.spec.emit, at);
            let groups = bucket(&mut self.buckets, at, (self.spec.emit, 0), &self.layout);
            groups
                .state_mut(kind)
                .ok_or_else(strange)?
                .restore_part(part, &owned)?;
        }
        self.buckets.retain(|_, groups| !groups.is_empty());
        Ok(())
    }

    fn rows(&self) -> u64 {
        self.buckets.values().map(Groups::len).sum()
    }

    fn bytes(&self) -> u64 {
        self.buckets.values().map(Groups::bytes).sum()
    }
    fn swapped_bytes(&self) -> u64 {
        self.buckets.values().map(Groups::swapped_bytes).sum()
    }
    fn relieve(&mut self) {
        self.buckets.values_mut().for_each(Groups::relieve);
    }
}

#[cfg(test)]
mod tests;
