//! The semi-join and the anti-join: rows of the left side that have, or lack, a row with their key on
//! the right.
//!
//! ```text
//! news of the right ──► counts by key ──► keys that turned ──► their stored left rows, shown or not
//! news of the left  ──► shown by the counts of now         ──► stored, unless the tick closes them
//! ```
//!
//! # Contract
//!
//! * [`SemiJoinState::tick`] is given all rows of a tick; its output is the change of the left rows
//!   that are shown. The same row may appear with several diffs. A key that comes and goes within the
//!   tick costs nothing on the left.
//! * A row with a null key matches nothing, unless nulls are equal: an anti-join shows it, and neither
//!   stores it.
//! * A count below one counts as none: the insertion may come in a later tick.
//! * With a close rule the rows of both sides lie in tables by time, `step` apart. They are dropped
//!   whole at the end of the tick whose watermark closes all times they may hold; what was shown of them
//!   stays as it is, and rows that come for them later are ignored.

use std::cmp::Ordering;

use arrow::array::{ArrayRef, BooleanArray, UInt32Array};
use arrow::datatypes::{DataType, SchemaRef, TimeUnit};

use super::{
    Keep, Keyed, Side, WARM_ROWS, build, coalesce, new_table, nullable, probe, strange, times,
};
use crate::delta::{Delta, Diffs};
use crate::error::{Error, Result};
use crate::kernel::TickOutput;
use crate::kernel::order::Time;
use crate::key::{Share, key_group};
use crate::plan::CloseRule;
use crate::state::{KeyedState, Part, PartData, Stateful, StoredData, StoredPart};
use crate::time::{NO_WATERMARK, Watermark};

/// What a semi-join is.
#[derive(Debug, Clone)]
pub struct SemiJoinSpec {
    pub left: SchemaRef,
    /// The keys alone.
    pub right: SchemaRef,
    /// The columns of the left side.
    pub output: SchemaRef,
    /// Columns of the left side, equal to the columns of the right in their order; of equal types.
    pub on: Vec<usize>,
    /// Rows without a match are shown, and not those with one.
    pub anti: bool,
    /// Nulls are equal to each other.
    pub null_equal: bool,
    /// When a key is final on both sides; `key` counts the columns of `on`.
    pub close: Option<CloseRule>,
    /// Neither side retracts.
    pub append_only: bool,
}

impl SemiJoinSpec {
    /// Refuses what the kernel cannot compute. It expects a spec that passed.
    pub fn validate(&self) -> Result<()> {
        let timestamp = DataType::Timestamp(TimeUnit::Microsecond, None);
        let right = self.right.fields();
        if right.len() != self.on.len() {
            return Err(Error::internal(
                "the right side of a semi-join has other columns",
            ));
        }
        for (left, right) in self.on.iter().zip(right) {
            if self.left.field(*left).data_type() != right.data_type() {
                return Err(Error::internal("a join of keys of different types"));
            }
        }
        if let Some(rule) = &self.close
            && right.get(rule.key).map(|f| f.data_type()) != Some(&timestamp)
        {
            return Err(Error::internal(
                "rows are closed by a column that is no timestamp",
            ));
        }
        let (left, right) = sides(self);
        left.and(right).map(|_| ())
    }
}

/// The state of a semi-join on one worker. See the module contract.
#[derive(Debug)]
pub struct SemiJoinState {
    share: Share,
    left: Side,
    /// Its tables hold how often each key stands there.
    right: Side,
    anti: bool,
    /// Neither side retracts: a left row with a match has it for ever.
    append_only: bool,
    output: SchemaRef,
    /// The watermark of the ticks before.
    closed: Watermark,
}

fn sides(spec: &SemiJoinSpec) -> (Result<Side>, Result<Side>) {
    let right: Vec<usize> = (0..spec.on.len()).collect();
    let keep = |key: &dyn Fn(usize) -> usize| Keep {
        close: spec.close.map(|rule| CloseRule {
            key: key(rule.key),
            ..rule
        }),
        growing: spec.append_only,
        null_equal: spec.null_equal,
    };
    (
        Side::new(&spec.left, &spec.on, &right, keep(&|key| spec.on[key])),
        Side::new(&spec.right, &right, &spec.on, keep(&|key| key)),
    )
}

impl SemiJoinState {
    pub fn new(spec: &SemiJoinSpec, worker: usize, workers: usize) -> Self {
        let (left, right) = sides(spec);
        Self {
            share: Share { worker, workers },
            left: left.expect("the plan was checked by `SemiJoinSpec::validate`"),
            right: right.expect("the plan was checked by `SemiJoinSpec::validate`"),
            anti: spec.anti,
            append_only: spec.append_only,
            output: nullable(&spec.output),
            closed: NO_WATERMARK,
        }
    }

    /// Columns of the output.
    pub fn schema(&self) -> &SchemaRef {
        &self.output
    }

    /// Applies all rows of one tick.
    pub fn tick(&mut self, left: &[Delta], right: &[Delta], watermark: Watermark) -> TickOutput {
        let mut out = TickOutput::default();
        let watermark = watermark.max(self.closed);
        let done = self.apply(left, right, watermark, &mut out);
        done.expect("rows have the types of the plan");
        self.left.close(watermark);
        self.right.close(watermark);
        self.closed = watermark;
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
        for turned in self.count(&coalesce(right)?)? {
            let keys = self.right.read(&turned)?;
            let stored = |_: Vec<ArrayRef>, stored: Vec<ArrayRef>| stored;
            let to = (&self.output, None);
            probe(&turned, &keys, &mut self.left, &stored, to, out)?;
        }
        for delta in &coalesce(left)? {
            self.news(delta, watermark, out)?;
        }
        Ok(())
    }

    /// Adds the news of the right side to the counts. Gives the keys that have a row now and had none,
    /// or the other way round, with the diff of the left rows that are stored for them.
    fn count(&mut self, news: &[Delta]) -> Result<Vec<Delta>> {
        let keyed: Vec<Keyed> = news
            .iter()
            .map(|delta| self.right.read(delta))
            .collect::<Result<_>>()?;
        let mut rows: Vec<Row> = Vec::with_capacity(news.iter().map(Delta::len).sum());
        for (number, (delta, keys)) in news.iter().zip(&keyed).enumerate() {
            let times = self.right.close.map(|rule| times(&delta.batch, rule.key));
            let table_of = |row: usize| self.right.table_of(times.as_ref()?(row));
            let open = keys.joining().map(|row| Row {
                time: table_of(row),
                hash: keys.hashes[row],
                delta: number as u32,
                row: row as u32,
            });
            rows.extend(open.filter(|at| !self.right.closes(at.time, self.closed)));
        }
        let key = |at: &Row| keyed[at.delta as usize].keys.row(at.row as usize);
        let order = |a: &Row, b: &Row| a.place().cmp(&b.place()).then_with(|| key(a).cmp(key(b)));
        rows.sort_unstable_by(order);
        let mut turned: Vec<(Vec<u32>, Vec<i64>)> = vec![Default::default(); news.len()];
        let same = |a: &Row, b: &Row| order(a, b) == Ordering::Equal;
        for (number, run) in rows.chunk_by(same).enumerate() {
            let at = &run[0];
            let diff = |at: &Row| news[at.delta as usize].diffs.get(at.row as usize);
            let change = run.iter().map(diff).fold(0i64, i64::wrapping_add);
            let tables = &mut self.right.tables;
            let table = tables.entry(at.time).or_insert_with(KeyedState::plain);
            let turn = add(table, at.hash, key(at), change);
            if turn != 0 {
                let (rows, diffs) = &mut turned[at.delta as usize];
                rows.push(at.row);
                diffs.push(if self.anti { -turn } else { turn });
            }
            if number % WARM_ROWS == 0 {
                table.relieve();
            }
        }
        let turned = news.iter().zip(turned);
        let turned = turned.filter(|(_, (rows, _))| !rows.is_empty());
        let turned = turned.map(|(delta, (rows, diffs))| Delta {
            diffs: Diffs::from_vec(diffs),
            ..delta.take(&UInt32Array::from(rows))
        });
        Ok(turned.collect())
    }

    /// Shows news of the left side by the counts, and stores them.
    fn news(&mut self, delta: &Delta, watermark: Watermark, out: &mut TickOutput) -> Result<()> {
        let rows = self.left.read(delta)?;
        let times = self.left.close.map(|rule| times(&delta.batch, rule.key));
        let table_of = |row: usize| self.left.table_of(times.as_ref()?(row));
        let late: Vec<bool> = (0..delta.len())
            .map(|row| self.left.closes(table_of(row), self.closed))
            .collect();
        let mut matched = vec![false; delta.len()];
        for (time, run) in rows.order(table_of).runs() {
            let Some(table) = self.right.tables.get_mut(&time) else {
                continue;
            };
            for block in run.chunks(WARM_ROWS) {
                rows.warm(table, block);
                for row in block.iter().map(|at| at.row as usize) {
                    let count = table.get(rows.hashes[row], rows.keys.row(row));
                    matched[row] = count.is_some_and(|count| number(count) > 0);
                }
                table.relieve();
            }
        }
        let shown = matched.iter().zip(&late);
        let shown: Vec<bool> = shown
            .map(|(matched, late)| *matched != self.anti && !late)
            .collect();
        if let Some(shown) = delta.filter(&BooleanArray::from(shown)) {
            let columns = shown.batch.columns().to_vec();
            let batch = build(&self.output, columns, shown.len());
            out.deltas.push(Delta::new(batch, shown.diffs));
        }
        if self.append_only && matched.contains(&true) {
            let open: Vec<bool> = matched.iter().map(|matched| !matched).collect();
            if let Some(open) = delta.filter(&BooleanArray::from(open)) {
                let rows = self.left.read(&open)?;
                self.left.insert(&open, &rows, Some(watermark))?;
            }
            return Ok(());
        }
        self.left.insert(delta, &rows, Some(watermark))
    }
}

/// A row of the right side.
#[derive(Debug, Clone, Copy)]
struct Row {
    time: Time,
    hash: u64,
    delta: u32,
    row: u32,
}

impl Row {
    /// By table, and by key group within it.
    fn place(&self) -> (Time, u8, u64) {
        (self.time, key_group(self.hash), self.hash)
    }
}

/// Adds to the count of a key: 1 when it is above zero now and was not, -1 the other way round.
fn add(table: &mut KeyedState, hash: u64, key: &[u8], change: i64) -> i64 {
    if change == 0 {
        return 0;
    }
    let (id, value, _) = table.entry(hash, key, &0i64.to_le_bytes());
    let before = number(value);
    let after = before.wrapping_add(change);
    value.copy_from_slice(&after.to_le_bytes());
    if after == 0 {
        table.remove_located(id, hash);
    }
    i64::from(after > 0) - i64::from(before > 0)
}

fn number(bytes: &[u8]) -> i64 {
    i64::from_le_bytes(bytes.try_into().expect("counts have eight bytes"))
}

/// The part that tells how far the watermark has come.
const CLOSED: &str = "closed";

impl Stateful for SemiJoinState {
    fn freeze(&mut self) -> Vec<Part> {
        let mut parts = self.left.freeze("left");
        parts.extend(self.right.freeze("right"));
        parts.push(Part {
            name: CLOSED.to_string(),
            data: PartData::Meta(self.closed.to_le_bytes().to_vec()),
        });
        parts
    }

    fn restore(&mut self, parts: &[StoredPart]) -> Result<()> {
        let owned = self.share.groups();
        let growing = self.left.growing;
        for part in parts {
            match (part.name.split_once(':'), &part.data) {
                (Some(("left", start)), _) => {
                    let new = || new_table(growing);
                    self.left.restore(part, start, &owned, new)?;
                }
                (Some(("right", start)), _) => {
                    self.right.restore(part, start, &owned, KeyedState::plain)?;
                }
                (None, StoredData::Meta(bytes)) if part.name == CLOSED && bytes.len() == 8 => {
                    self.closed = self.closed.max(number(bytes));
                }
                _ => return Err(strange(part)),
            }
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

#[cfg(test)]
mod tests;
