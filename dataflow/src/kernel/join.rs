//! The symmetric inner equi-join: both sides in keyed state, each probed with the news of the other.
//!
//! ```text
//! few news  ──► probe the other side as it was        ──► stored
//! many news ──► probe the other side, its news included ──► stored, unless the tick closes them
//! ```
//!
//! The side with more news comes second: what its own tick closes is probed with and never stored. Where
//! windows close in the tick in which their rows come (an aggregate on close, a tick longer than a
//! window), most rows of a join are such.
//!
//! # Contract
//!
//! * [`JoinState::tick`] is given all rows of a tick; its output is the change of the joined rows, the
//!   diffs of a pair multiplied. The same row may appear with several diffs.
//! * A row with a null key joins nothing and is not stored, unless nulls are equal.
//! * With a close rule a side's rows lie in tables by time, `step` apart; a table is dropped whole at
//!   the end of the tick whose watermark closes all times it may hold.

mod counted;
mod semi;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, UInt32Array};
use arrow::buffer::NullBuffer;
use arrow::compute::take;
use arrow::datatypes::{DataType, SchemaRef, TimeUnit, TimestampMicrosecondType};
use datafusion::physical_expr::PhysicalExpr;

use super::map::{MapKernel, build};
use super::order::{Order, Placed, Time};
use super::window::floor;
use super::{OUTPUT_ROWS, TickOutput, WARM_ROWS, coalesce, nullable};
use crate::delta::{Delta, Diffs};
use crate::error::{Error, ErrorKind, Result};
use crate::key::{Encoded, RowCodec, Share, hash_encoded};
use crate::plan::{CloseRule, MapStep};
use crate::state::{KeyedState, Part, PartData, Stateful, StoredPart};
use crate::time::Watermark;

pub use counted::{CountedSetSpec, CountedSetState};
pub use semi::{SemiJoinSpec, SemiJoinState};

/// What a join is.
#[derive(Debug, Clone)]
pub struct JoinSpec {
    pub left: SchemaRef,
    pub right: SchemaRef,
    /// Left columns, then right columns.
    pub output: SchemaRef,
    /// Columns that are equal, left and right; of equal types. None: every pair of rows.
    pub on: Vec<(usize, usize)>,
    /// Nulls are equal to each other.
    pub null_equal: bool,
    /// Over the columns of the output.
    pub filter: Option<Arc<dyn PhysicalExpr>>,
    /// When rows of a side are final; `key` is a column of that side.
    pub left_close: Option<CloseRule>,
    pub right_close: Option<CloseRule>,
    /// Neither side retracts.
    pub append_only: bool,
}

impl JoinSpec {
    /// Refuses what the kernel cannot compute. It expects a spec that passed.
    pub fn validate(&self) -> Result<()> {
        let timestamp = DataType::Timestamp(TimeUnit::Microsecond, None);
        for (schema, close) in [
            (&self.left, &self.left_close),
            (&self.right, &self.right_close),
        ] {
            if let Some(rule) = close
                && schema.fields().get(rule.key).map(|f| f.data_type()) != Some(&timestamp)
            {
                return Err(Error::internal(
                    "rows are closed by a column that is no timestamp",
                ));
            }
        }
        for (left, right) in &self.on {
            let (left, right) = (self.left.field(*left), self.right.field(*right));
            if left.data_type() != right.data_type() {
                return Err(Error::internal("a join of keys of different types"));
            }
        }
        let (left, right) = sides(self);
        left.and(right).map(|_| ())
    }
}

/// The state of a join on one worker. See the module contract.
#[derive(Debug)]
pub struct JoinState {
    share: Share,
    left: Side,
    right: Side,
    output: SchemaRef,
    filter: Option<MapKernel>,
}

impl JoinState {
    pub fn new(spec: Arc<JoinSpec>, worker: usize, workers: usize) -> Self {
        let (left, right) = sides(&spec);
        let output = nullable(&spec.output);
        let filter = spec
            .filter
            .iter()
            .map(|filter| MapStep::Filter(Arc::clone(filter)));
        let filter: Vec<MapStep> = filter.collect();
        Self {
            share: Share { worker, workers },
            left: left.expect("the plan was checked by `JoinSpec::validate`"),
            right: right.expect("the plan was checked by `JoinSpec::validate`"),
            filter: (!filter.is_empty()).then(|| MapKernel::new(&output, &filter)),
            output,
        }
    }

    /// Columns of the output.
    pub fn schema(&self) -> &SchemaRef {
        &self.output
    }

    /// Applies all rows of one tick.
    pub fn tick(&mut self, left: &[Delta], right: &[Delta], watermark: Watermark) -> TickOutput {
        let mut out = TickOutput::default();
        let done = self.apply(left, right, watermark, &mut out);
        done.expect("rows have the types of the plan");
        self.left.close(watermark);
        self.right.close(watermark);
        self.relieve();
        out
    }

    fn apply(
        &mut self,
        left: &[Delta],
        right: &[Delta],
        watermark: Watermark,
        out: &mut TickOutput,
    ) -> Result<()> {
        let rows = |deltas: &[Delta]| deltas.iter().map(Delta::len).sum::<usize>();
        if rows(left) <= rows(right) {
            self.apply_left(left, None, out)?;
            self.apply_right(right, Some(watermark), out)
        } else {
            self.apply_right(right, None, out)?;
            self.apply_left(left, Some(watermark), out)
        }
    }

    /// News of the left side; `closed` is given when nothing of this tick probes them any more.
    fn apply_left(
        &mut self,
        news: &[Delta],
        closed: Option<Watermark>,
        out: &mut TickOutput,
    ) -> Result<()> {
        let to = (&self.output, self.filter.as_ref());
        let pairs = |columns: Vec<ArrayRef>, stored: Vec<ArrayRef>| [columns, stored].concat();
        for delta in &coalesce(news)? {
            let rows = self.left.read(delta)?;
            probe(delta, &rows, &mut self.right, &pairs, to, out)?;
            self.left.insert(delta, &rows, closed)?;
        }
        Ok(())
    }

    /// As [`Self::apply_left`] for the right side.
    fn apply_right(
        &mut self,
        news: &[Delta],
        closed: Option<Watermark>,
        out: &mut TickOutput,
    ) -> Result<()> {
        let to = (&self.output, self.filter.as_ref());
        let pairs = |columns: Vec<ArrayRef>, stored: Vec<ArrayRef>| [stored, columns].concat();
        for delta in &coalesce(news)? {
            let rows = self.right.read(delta)?;
            probe(delta, &rows, &mut self.left, &pairs, to, out)?;
            self.right.insert(delta, &rows, closed)?;
        }
        Ok(())
    }
}

fn sides(spec: &JoinSpec) -> (Result<Side>, Result<Side>) {
    let (left, right): (Vec<_>, Vec<_>) = spec.on.iter().copied().unzip();
    let keep = |close| Keep {
        close,
        growing: spec.append_only,
        null_equal: spec.null_equal,
    };
    (
        Side::new(&spec.left, &left, &right, keep(spec.left_close)),
        Side::new(&spec.right, &right, &left, keep(spec.right_close)),
    )
}

/// What a side keeps.
#[derive(Debug, Clone, Copy)]
struct Keep {
    close: Option<CloseRule>,
    /// Rows only come.
    growing: bool,
    /// Rows with null keys join too.
    null_equal: bool,
}

/// One side: its rows by key, and how they are read.
#[derive(Debug)]
struct Side {
    /// Its key columns, in the order of `on`.
    on: Vec<usize>,
    keys: RowCodec,
    /// Columns that are stored. The others are keys, which the other side has too.
    stored: Vec<usize>,
    rows: RowCodec,
    /// Where each column comes from.
    columns: Vec<From>,
    close: Option<CloseRule>,
    /// Rows only come.
    growing: bool,
    null_equal: bool,
    /// Width of a table, in microseconds.
    step: i64,
    /// Column of the *other* side that has the value of this side's close column, if they are joined
    /// by it: then one table is probed and not all.
    aligned: Option<usize>,
    tables: BTreeMap<Time, KeyedState>,
}

#[derive(Debug, Clone, Copy)]
enum From {
    /// The column of this number among those stored.
    Stored(usize),
    /// This column of the other side, which is equal.
    Other(usize),
}

/// Keys of the rows of one delta.
struct Keyed {
    keys: Encoded,
    hashes: Vec<u64>,
    /// Rows with a null key.
    nulls: Option<NullBuffer>,
}

impl Keyed {
    /// Brings what rows of these keys touch into the cache.
    fn warm(&self, table: &KeyedState, rows: &[Placed]) {
        table.warm(rows.iter().map(|at| self.hashes[at.row as usize]));
    }

    /// The rows that can join.
    fn joining(&self) -> impl Iterator<Item = usize> + '_ {
        let joins = |row: &usize| self.nulls.as_ref().is_none_or(|nulls| nulls.is_valid(*row));
        (0..self.hashes.len()).filter(joins)
    }

    /// The rows that can join, by table.
    fn order(&self, table: impl Fn(usize) -> Time) -> Order {
        let rows = self.joining();
        Order::new(rows.map(|row| (table(row), self.hashes[row], 0, row as u32)))
    }
}

impl Side {
    fn new(schema: &SchemaRef, on: &[usize], other: &[usize], keep: Keep) -> Result<Self> {
        let Keep {
            close,
            growing,
            null_equal,
        } = keep;
        let data_type = |column: &usize| schema.field(*column).data_type().clone();
        let mut stored = Vec::new();
        let columns = (0..schema.fields().len()).map(|column| {
            // Equal floats may have different bits: 0.0 and -0.0.
            let key = on.iter().position(|c| *c == column);
            match key.filter(|_| !data_type(&column).is_floating()) {
                Some(at) => From::Other(other[at]),
                None => {
                    stored.push(column);
                    From::Stored(stored.len() - 1)
                }
            }
        });
        let columns = columns.collect();
        let aligned = close.and_then(|rule| {
            let at = on.iter().position(|column| *column == rule.key)?;
            Some(other[at])
        });
        Ok(Self {
            keys: RowCodec::keys(on.iter().map(data_type))?,
            rows: RowCodec::rows(stored.iter().map(data_type))?,
            on: on.to_vec(),
            stored,
            columns,
            growing,
            null_equal,
            // Some eight tables live at a time, rows are kept an eighth longer.
            step: close.map_or(1, |rule| (rule.delay_us / 8).max(1_000_000)),
            close,
            aligned,
            tables: BTreeMap::new(),
        })
    }

    fn read(&self, delta: &Delta) -> Result<Keyed> {
        let columns: Vec<ArrayRef> = self
            .on
            .iter()
            .map(|c| Arc::clone(delta.batch.column(*c)))
            .collect();
        let keys = self.keys.encode(&columns, delta.len())?;
        let hashes = hash_encoded(&columns, &keys)?;
        let mut nulls: Option<NullBuffer> = None;
        for column in columns.iter().filter(|_| !self.null_equal) {
            nulls = NullBuffer::union(nulls.as_ref(), column.logical_nulls().as_ref());
        }
        Ok(Keyed {
            keys,
            hashes,
            nulls,
        })
    }

    /// The table of a time, if it fits.
    fn table_of(&self, time: Time) -> Time {
        floor(time?, self.step)
    }

    /// Stores the rows of a delta, apart from those that `closed` closes.
    fn insert(&mut self, delta: &Delta, rows: &Keyed, closed: Option<Watermark>) -> Result<()> {
        let times = self.close.map(|rule| times(&delta.batch, rule.key));
        let table_of = |row: usize| self.table_of(times.as_ref()?(row));
        let open = |row: &usize| closed.is_none_or(|at| !self.closes(table_of(*row), at));
        let open: Vec<u32> = rows.joining().filter(open).map(|row| row as u32).collect();
        if open.is_empty() {
            return Ok(());
        }
        let some = (open.len() < delta.len()).then(|| UInt32Array::from(open.clone()));
        let column = |column: &usize| {
            let column = delta.batch.column(*column);
            match &some {
                Some(rows) => take(column, rows, None).map_err(|e| Error::internal(e.to_string())),
                None => Ok(Arc::clone(column)),
            }
        };
        let columns: Vec<ArrayRef> = self.stored.iter().map(column).collect::<Result<_>>()?;
        let contents = self.rows.encode(&columns, open.len())?;
        // Source and row of what is placed: where its contents are, and where its key is.
        let placed = open.iter().enumerate().map(|(at, row)| {
            let time = table_of(*row as usize);
            (time, rows.hashes[*row as usize], at as u32, *row)
        });
        let order = Order::new(placed);
        for (time, run) in order.runs() {
            let table = self
                .tables
                .entry(time)
                .or_insert_with(|| new_table(self.growing));
            for block in run.chunks(WARM_ROWS) {
                rows.warm(table, block);
                for at in block {
                    let row = at.row as usize;
                    let contents = contents.row(at.source as usize);
                    let (hash, key) = (rows.hashes[row], rows.keys.row(row));
                    table.add_row(hash, key, contents, delta.diffs.get(row));
                }
                table.relieve();
            }
        }
        Ok(())
    }

    /// The watermark closes all that the table of this time may hold.
    fn closes(&self, table: Time, watermark: Watermark) -> bool {
        let last = table.map(|start| start.saturating_add(self.step - 1));
        self.close
            .zip(last)
            .is_some_and(|(rule, last)| watermark >= last.saturating_add(rule.delay_us))
    }

    /// Puts pages out, if more is in memory than wanted.
    fn relieve(&mut self) {
        self.tables.values_mut().for_each(KeyedState::relieve);
    }

    /// Drops what the watermark closes, and tables that retractions have emptied.
    fn close(&mut self, watermark: Watermark) {
        if self.close.is_none() {
            return;
        }
        let mut tables = std::mem::take(&mut self.tables);
        tables.retain(|start, table| !self.closes(*start, watermark) && !table.is_empty());
        self.tables = tables;
    }
}

fn new_table(growing: bool) -> KeyedState {
    if growing {
        KeyedState::growing()
    } else {
        KeyedState::chained()
    }
}

/// The time of each row of a batch.
fn times(batch: &RecordBatch, column: usize) -> impl Fn(usize) -> Option<i64> + '_ {
    let times = batch
        .column(column)
        .as_primitive::<TimestampMicrosecondType>();
    |row| times.is_valid(row).then(|| times.value(row))
}

/// Joined rows that are being collected: rows of the delta, rows of the state, diffs.
#[derive(Default)]
struct Pairs<'a> {
    probing: Vec<u32>,
    stored: Vec<&'a [u8]>,
    diffs: Vec<i64>,
}

/// Joins the rows of a delta with the stored ones of the other side.
fn probe(
    delta: &Delta,
    rows: &Keyed,
    other: &mut Side,
    arrange: &dyn Fn(Vec<ArrayRef>, Vec<ArrayRef>) -> Vec<ArrayRef>,
    to: (&SchemaRef, Option<&MapKernel>),
    out: &mut TickOutput,
) -> Result<()> {
    let aligned = other.aligned.map(|column| times(&delta.batch, column));
    let order = rows.order(|row| other.table_of(aligned.as_ref()?(row)));
    let tables: Vec<Time> = match aligned {
        Some(_) => Vec::new(),
        None => other.tables.keys().copied().collect(),
    };
    let mut work = order.runs().flat_map(|(time, run)| {
        let own = if aligned.is_some() {
            vec![time]
        } else {
            tables.clone()
        };
        let blocks = move |table| run.chunks(WARM_ROWS).map(move |block| (table, block));
        own.into_iter().flat_map(blocks)
    });
    while probe_some(delta, rows, other, &mut work, arrange, to, out)? {
        other.relieve();
    }
    Ok(())
}

/// As [`probe`] for blocks of rows and their tables; true when it stopped so that pages can be put out.
fn probe_some<'r>(
    delta: &Delta,
    rows: &Keyed,
    other: &Side,
    work: &mut impl Iterator<Item = (Time, &'r [Placed])>,
    arrange: &dyn Fn(Vec<ArrayRef>, Vec<ArrayRef>) -> Vec<ArrayRef>,
    (output, filter): (&SchemaRef, Option<&MapKernel>),
    out: &mut TickOutput,
) -> Result<bool> {
    let mut pairs = Pairs::default();
    let mut flush = |pairs: &mut Pairs<'_>| -> Result<()> {
        let pairs = std::mem::take(pairs);
        let joined = assemble(delta, pairs, other, arrange, output)?;
        match filter {
            None => out.deltas.push(joined),
            Some(filter) => {
                let kept = filter.apply(joined);
                out.deltas.extend(kept.delta);
                out.errors.extend(kept.errors);
            }
        }
        Ok(())
    };
    let mut over = false;
    for (time, block) in work {
        let Some(table) = other.tables.get(&time) else {
            continue;
        };
        rows.warm(table, block);
        for row in block.iter().map(|at| at.row as usize) {
            let diff = delta.diffs.get(row);
            for (stored, count) in table.rows_of(rows.hashes[row], rows.keys.row(row)) {
                pairs.probing.push(row as u32);
                pairs.stored.push(stored);
                pairs.diffs.push(diff.wrapping_mul(count));
                if pairs.probing.len() == OUTPUT_ROWS {
                    flush(&mut pairs)?;
                }
            }
        }
        over = table.is_over();
        if over {
            break;
        }
    }
    if !pairs.probing.is_empty() {
        flush(&mut pairs)?;
    }
    Ok(over)
}

fn assemble(
    delta: &Delta,
    pairs: Pairs<'_>,
    other: &Side,
    arrange: &dyn Fn(Vec<ArrayRef>, Vec<ArrayRef>) -> Vec<ArrayRef>,
    output: &SchemaRef,
) -> Result<Delta> {
    let rows = pairs.probing.len();
    let indices = UInt32Array::from(pairs.probing);
    let probing: Vec<ArrayRef> = delta
        .batch
        .columns()
        .iter()
        .map(|column| take(column, &indices, None))
        .collect::<Result<_, _>>()
        .map_err(|e| Error::internal(e.to_string()))?;
    let stored = other.rows.decode(pairs.stored)?;
    let columns = other.columns.iter().map(|from| match from {
        From::Stored(at) => Arc::clone(&stored[*at]),
        From::Other(column) => Arc::clone(&probing[*column]),
    });
    let columns = columns.collect();
    let batch = build(output, arrange(probing, columns), rows);
    Ok(Delta::new(batch, Diffs::from_vec(pairs.diffs)))
}

impl Stateful for JoinState {
    fn freeze(&mut self) -> Vec<Part> {
        let mut parts = self.left.freeze("left");
        parts.extend(self.right.freeze("right"));
        parts
    }

    fn restore(&mut self, parts: &[StoredPart]) -> Result<()> {
        let owned = self.share.groups();
        for part in parts {
            let (side, start) = match part.name.split_once(':') {
                Some(("left", start)) => (&mut self.left, start),
                Some(("right", start)) => (&mut self.right, start),
                _ => return Err(strange(part)),
            };
            let growing = side.growing;
            side.restore(part, start, &owned, || new_table(growing))?;
        }
        self.left.drop_empty();
        self.right.drop_empty();
        Ok(())
    }

    fn rows(&self) -> u64 {
        self.left.rows() + self.right.rows()
    }

    fn bytes(&self) -> u64 {
        self.left.bytes() + self.right.bytes()
    }

    fn swapped_bytes(&self) -> u64 {
        self.left.swapped_bytes() + self.right.swapped_bytes()
    }

    fn relieve(&mut self) {
        self.left.relieve();
        self.right.relieve();
    }
}

fn strange(part: &StoredPart) -> Error {
    Error::new(ErrorKind::Corrupt, "stored state is not that of a join")
        .detail(format!("part: {}", part.name))
}

/// Checkpoints and sizes.
impl Side {
    fn freeze(&mut self, side: &str) -> Vec<Part> {
        let tables = self.tables.iter_mut();
        let parts = tables.map(|(start, table)| {
            let start = start.map_or("open".to_string(), |start| start.to_string());
            Part {
                name: format!("{side}:{start}"),
                data: PartData::Keyed(table.snapshot()),
            }
        });
        parts.collect()
    }

    /// Adds the rows of a part to the table that begins at `start`.
    fn restore(
        &mut self,
        part: &StoredPart,
        start: &str,
        owned: &Range<u16>,
        new: impl FnOnce() -> KeyedState,
    ) -> Result<()> {
        let start = match start {
            "open" => None,
            start => Some(start.parse().map_err(|_| strange(part))?),
        };
        let table = self.tables.entry(start).or_insert_with(new);
        table.restore_part(part, owned)
    }

    fn drop_empty(&mut self) {
        self.tables.retain(|_, table| !table.is_empty());
    }

    fn rows(&self) -> u64 {
        self.tables.values().map(KeyedState::len).sum()
    }

    fn bytes(&self) -> u64 {
        self.tables.values().map(KeyedState::bytes).sum()
    }

    fn swapped_bytes(&self) -> u64 {
        self.tables.values().map(KeyedState::swapped_bytes).sum()
    }
}

#[cfg(test)]
mod tests;
