//! Partitions computed anew: what has no cheaper operator.
//!
//! ```text
//! rows of a tick ──► the partitions they touch: all their rows before, and after
//!                    computation(after) − computation(before) ──► changes
//! ```
//!
//! Window functions, ordered aggregates and aggregates that cannot take a value back are of this kind.
//! A change costs as much as its partition is large, and what leaves is the difference alone.
//!
//! # Contract
//!
//! * The output is the computation over all rows, partition by partition; a row with a negative
//!   multiplicity is not there yet.
//! * Without keys there is one partition, also when it has no rows.
//! * With a close rule there is a table per value of the close key, dropped when the watermark closes
//!   it; on close, its partitions are computed then, and only then.
//! * A partition whose computation fails shows nothing, and its failure is in the errors.
//! * Where only the first rows of a partition matter ([`First`]), only those are computed with: the
//!   others are kept apart (`first`), and a change among them costs nothing.

mod first;
mod run;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, UInt32Array};
use arrow::compute::{SortOptions, concat_batches, take, take_record_batch};
use arrow::datatypes::{DataType, SchemaRef, TimestampMicrosecondType};
use arrow::row::{RowConverter, Rows, SortField};

use super::late;
use super::map::build;
use super::order::Time;
use super::{OUTPUT_ROWS, RowErrors, TickOutput, coalesce, nullable, row_error};
use crate::delta::{Delta, Diffs};
use crate::error::{Error, ErrorKind, Result};
use crate::key::{Encoded, GROUPS, RowCodec, Share, hash_bytes, hash_encoded, key_group};
use crate::plan::{CloseRule, Computation, Emit, OrderColumn};
use crate::state::{KeyedState, Part, PartData, Stateful, StoredPart};
use crate::time::Watermark;

pub use run::Runner;

/// What is computed. See the module.
#[derive(Debug, Clone)]
pub struct RecomputeSpec {
    pub inputs: Vec<SchemaRef>,
    /// By input: the columns that make its partition, of the same types for all inputs.
    pub keys: Vec<Vec<usize>>,
    pub output: SchemaRef,
    pub compute: Arc<Computation>,
    /// `key` is an index among the keys.
    pub close: Option<CloseRule>,
    pub emit: Emit,
    pub allowed_lateness_us: i64,
    /// Of the single input: the computation sees no more rows of a partition than these.
    pub first: Option<First>,
}

/// The first rows of each partition, in the order of its computation and then of all columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct First {
    /// How many; not 0.
    pub rows: usize,
    /// Rows are never taken back: those behind the first ones are forgotten.
    pub growing: bool,
}

impl RecomputeSpec {
    /// Refuses what the kernel cannot compute. It expects a spec that passed.
    pub fn validate(&self) -> Result<()> {
        for (schema, keys) in self.inputs.iter().zip(&self.keys) {
            Side::new(schema, keys, &[])?;
        }
        RowCodec::rows(types(&self.output)).map(drop)
    }
}

fn types(schema: &SchemaRef) -> Vec<DataType> {
    let fields = schema.fields().iter();
    fields.map(|field| field.data_type().clone()).collect()
}

/// The state on one worker. See the module contract.
#[derive(Debug)]
pub struct RecomputeState {
    spec: Arc<RecomputeSpec>,
    share: Share,
    sides: Vec<Side>,
    runner: Runner,
    output: SchemaRef,
    codec: RowCodec,
    /// The single partition has been computed once.
    started: bool,
}

/// The rows of one input.
#[derive(Debug)]
struct Side {
    schema: SchemaRef,
    on: Vec<usize>,
    keys: RowCodec,
    rows: RowCodec,
    /// Columns by which rows are sorted before they are computed with, and how.
    sorted: Vec<usize>,
    sorter: RowConverter,
    tables: BTreeMap<Time, KeyedState>,
    /// With [`First`]: rows that come after all those of their partition in `tables`.
    rest: BTreeMap<Time, KeyedState>,
    /// Rows that were compared or moved to tell the first ones, or computed with; a measure of work.
    worked: u64,
}

/// A row of the tick: where it belongs and where it is.
struct News {
    time: Time,
    hash: u64,
    side: usize,
    delta: usize,
    row: usize,
}

/// A partition.
#[derive(Clone, Copy)]
struct Place<'a> {
    time: Time,
    hash: u64,
    key: &'a [u8],
}

impl Side {
    fn new(schema: &SchemaRef, on: &[usize], order: &[OrderColumn]) -> Result<Self> {
        let schema = nullable(schema);
        let data_type = |column: usize| schema.field(column).data_type().clone();
        let mut sorted: Vec<usize> = on.to_vec();
        let mut fields: Vec<SortField> = on.iter().map(|c| SortField::new(data_type(*c))).collect();
        for column in order {
            if !sorted.contains(&column.column) {
                sorted.push(column.column);
                fields.push(SortField::new_with_options(
                    data_type(column.column),
                    column.options,
                ));
            }
        }
        for column in 0..schema.fields().len() {
            if !sorted.contains(&column) {
                sorted.push(column);
                let last = SortOptions {
                    descending: false,
                    nulls_first: false,
                };
                fields.push(SortField::new_with_options(data_type(column), last));
            }
        }
        let sorter = RowConverter::new(fields)
            .map_err(|_| Error::unsupported("columns of this type cannot be kept in state"))?;
        Ok(Self {
            keys: RowCodec::keys(on.iter().map(|c| data_type(*c)))?,
            rows: RowCodec::rows(types(&schema))?,
            on: on.to_vec(),
            sorted,
            sorter,
            schema,
            tables: BTreeMap::new(),
            rest: BTreeMap::new(),
            worked: 0,
        })
    }

    fn keys_of(&self, delta: &Delta) -> Result<(Encoded, Vec<u64>)> {
        let columns = self.on.iter().map(|c| Arc::clone(delta.batch.column(*c)));
        let columns: Vec<ArrayRef> = columns.collect();
        let keys = self.keys.encode(&columns, delta.len())?;
        let hashes = match columns.is_empty() {
            true => vec![hash_bytes(&[]); delta.len()],
            false => hash_encoded(&columns, &keys)?,
        };
        Ok((keys, hashes))
    }

    /// Rows that are there, as often as they are, but no more than `most` times.
    fn rows_of<'a>(&'a self, place: &Place<'_>, most: usize, into: &mut Vec<&'a [u8]>) {
        let Some(table) = self.tables.get(&place.time) else {
            return;
        };
        for (row, count) in table.rows_of(place.hash, place.key) {
            let count = usize::try_from(count.max(0)).unwrap_or(usize::MAX);
            into.extend(std::iter::repeat_n(row, count.min(most)));
        }
    }

    /// Rows of partitions as a batch, sorted; of each partition `most` rows. `parts` are the places
    /// behind the last row of each.
    fn batch(&self, rows: Vec<&[u8]>, parts: &[usize], most: usize) -> Result<RecordBatch> {
        let count = rows.len();
        let columns = self.rows.decode(rows)?;
        let whole = |from: usize, to: usize| (to - from).min(most);
        if columns.is_empty() {
            let starts = std::iter::once(0).chain(parts.iter().copied());
            let kept = starts.zip(parts).map(|(from, to)| whole(from, *to)).sum();
            return Ok(build(&self.schema, columns, kept));
        }
        let keys = self.sort_keys(&columns)?;
        let mut at: Vec<u32> = (0..count as u32).collect();
        at.sort_unstable_by(|a, b| keys.row(*a as usize).cmp(&keys.row(*b as usize)));
        if most < count {
            let mut given = vec![0; parts.len()];
            at.retain(|row| {
                let part = parts.partition_point(|end| *end <= *row as usize);
                given[part] += 1;
                given[part] <= most
            });
        }
        let at = UInt32Array::from(at);
        let taken = columns.iter().map(|column| take(column, &at, None));
        let taken: Vec<ArrayRef> = taken
            .collect::<std::result::Result<_, _>>()
            .map_err(|e| Error::internal(e.to_string()))?;
        Ok(build(&self.schema, taken, at.len()))
    }

    /// What puts rows of these columns in order.
    fn sort_keys(&self, columns: &[ArrayRef]) -> Result<Rows> {
        let by = self.sorted.iter().map(|c| Arc::clone(&columns[*c]));
        let keys = self.sorter.convert_columns(&by.collect::<Vec<_>>());
        keys.map_err(|e| Error::internal(e.to_string()))
    }
}

impl RecomputeState {
    pub fn new(spec: Arc<RecomputeSpec>, worker: usize, workers: usize) -> Self {
        let output = nullable(&spec.output);
        let passed = "the plan was checked by `RecomputeSpec::validate`";
        let sides = spec.inputs.iter().zip(&spec.keys).enumerate();
        let sides = sides.map(|(at, (schema, keys))| {
            Side::new(schema, keys, &spec.compute.order[at]).expect(passed)
        });
        Self {
            share: Share { worker, workers },
            sides: sides.collect(),
            runner: Runner::new(Arc::clone(&spec.compute), Arc::clone(&output)),
            codec: RowCodec::rows(types(&output)).expect(passed),
            output,
            started: false,
            spec,
        }
    }

    /// Applies all rows of one tick, by input; rows that are late are not among them.
    pub fn tick(&mut self, news: &[Vec<Delta>], watermark: Watermark) -> TickOutput {
        let mut out = TickOutput::default();
        let mut errors = RowErrors::default();
        let done = self.apply(news, watermark, &mut out, &mut errors);
        done.expect("rows have the types of the plan");
        out.errors.extend(errors.finish());
        self.relieve();
        out
    }

    fn apply(
        &mut self,
        news: &[Vec<Delta>],
        watermark: Watermark,
        out: &mut TickOutput,
        errors: &mut RowErrors,
    ) -> Result<()> {
        let deltas = news.iter().map(|side| coalesce(side));
        let deltas = deltas.collect::<Result<Vec<_>>>()?;
        let mut encoded = Vec::with_capacity(deltas.len());
        let mut contents = Vec::with_capacity(deltas.len());
        let mut all = Vec::new();
        let emit = self.spec.emit;
        for (side, deltas) in deltas.iter().enumerate() {
            let (mut keys, mut rows) = (Vec::new(), Vec::new());
            for (number, delta) in deltas.iter().enumerate() {
                let state = &self.sides[side];
                let (key, hashes) = state.keys_of(delta)?;
                let times = self.spec.close.map(|rule| {
                    let column = delta.batch.column(self.spec.keys[side][rule.key]);
                    column.as_primitive::<TimestampMicrosecondType>()
                });
                all.extend(hashes.iter().enumerate().map(|(row, hash)| {
                    News {
                        time: late::table_of(
                            emit,
                            times
                                .filter(|times| times.is_valid(row))
                                .map(|times| times.value(row)),
                        ),
                        hash: *hash,
                        side,
                        delta: number,
                        row,
                    }
                }));
                keys.push(key);
                rows.push(state.rows.encode(delta.batch.columns(), delta.len())?);
            }
            encoded.push(keys);
            contents.push(rows);
        }
        let key_of = |news: &News| encoded[news.side][news.delta].row(news.row);
        all.sort_unstable_by(|a, b| {
            let by = |n: &News| (n.time, key_group(n.hash), n.hash);
            by(a).cmp(&by(b)).then_with(|| key_of(a).cmp(key_of(b)))
        });
        let same =
            |a: &News, b: &News| (a.time, a.hash) == (b.time, b.hash) && key_of(a) == key_of(b);
        let mut touched: Vec<&[News]> = all.chunk_by(same).collect();
        let single = self.spec.keys.iter().all(Vec::is_empty) && self.spec.emit == Emit::Changes;
        let first = single && !self.started && self.share.owns(hash_bytes(&[]));
        if first && touched.is_empty() {
            touched.push(&[]);
        }
        let mut rest = &touched[..];
        while !rest.is_empty() {
            // Whole partitions, until there is enough to work on.
            let mut rows = 0;
            let mut count = 0;
            for run in rest {
                rows += run.len();
                if let (Some(news), Emit::Changes) = (run.first(), self.spec.emit) {
                    let place = Place {
                        time: news.time,
                        hash: news.hash,
                        key: key_of(news),
                    };
                    rows += self.held(&place, OUTPUT_ROWS);
                }
                count += 1;
                if rows >= OUTPUT_ROWS {
                    break;
                }
            }
            let (now, later) = rest.split_at(count);
            rest = later;
            let places: Vec<Place<'_>> = now
                .iter()
                .map(|run| match run.first() {
                    Some(news) => Place {
                        time: news.time,
                        hash: news.hash,
                        key: key_of(news),
                    },
                    None => Place {
                        time: None,
                        hash: hash_bytes(&[]),
                        key: &[],
                    },
                })
                .collect();
            let before = match self.spec.emit {
                Emit::Changes if !first => self.compute(&places)?,
                _ => Computed::default(),
            };
            if let Some(first) = self.spec.first {
                let news = now.iter().zip(&places).flat_map(|(run, place)| {
                    run.iter().map(|news| first::News {
                        place: *place,
                        row: contents[0][news.delta].row(news.row),
                        diff: deltas[0][news.delta].diffs.get(news.row),
                    })
                });
                self.sides[0].add_first(first, &news.collect::<Vec<_>>())?;
            } else {
                self.add(now.iter().copied().flatten(), &key_of, |news| {
                    let row = contents[news.side][news.delta].row(news.row);
                    (row, deltas[news.side][news.delta].diffs.get(news.row))
                });
            }
            if self.spec.emit == Emit::Changes {
                let after = self.compute(&places)?;
                self.difference(before, after, out, errors)?;
            }
            self.relieve();
        }
        self.started = true;
        self.close(watermark, out, errors)
    }

    fn add<'a>(
        &mut self,
        news: impl Iterator<Item = &'a News>,
        key_of: impl Fn(&News) -> &'a [u8],
        row_of: impl Fn(&News) -> (&'a [u8], i64),
    ) {
        for news in news {
            let tables = &mut self.sides[news.side].tables;
            let table = tables.entry(news.time);
            let (row, diff) = row_of(news);
            let table = table.or_insert_with(KeyedState::chained);
            table.add_row(news.hash, key_of(news), row, diff);
        }
    }

    /// Rows of a partition, counted up to `most`.
    fn held(&self, place: &Place<'_>, most: usize) -> usize {
        let tables = self
            .sides
            .iter()
            .filter_map(|side| side.tables.get(&place.time));
        let counts = tables.map(|t| t.rows_of(place.hash, place.key).take(most).count());
        counts.sum()
    }

    /// What these partitions show.
    fn compute(&mut self, places: &[Place<'_>]) -> Result<Computed> {
        let keyless = self.spec.keys.iter().all(Vec::is_empty);
        let most = self.spec.first.map_or(usize::MAX, |first| first.rows);
        let mut inputs = Vec::with_capacity(self.sides.len());
        for side in &mut self.sides {
            let (mut rows, mut parts) = (Vec::new(), Vec::with_capacity(places.len()));
            for place in places {
                side.rows_of(place, most, &mut rows);
                parts.push(rows.len());
            }
            let worked = rows.len() as u64;
            inputs.push(side.batch(rows, &parts, most)?);
            side.worked += worked;
        }
        if !keyless && inputs.iter().all(|batch| batch.num_rows() == 0) {
            return Ok(Computed::default());
        }
        match self.runner.run(&inputs) {
            Ok(batches) => Ok(Computed {
                batches,
                failed: Vec::new(),
            }),
            // One of them fails; the others are shown.
            Err(_) if places.len() > 1 => {
                let mut all = Computed::default();
                for place in places {
                    let one = self.compute(std::slice::from_ref(place))?;
                    all.batches.extend(one.batches);
                    all.failed.extend(one.failed);
                }
                Ok(all)
            }
            Err(e) => Ok(Computed {
                batches: Vec::new(),
                failed: vec![row_error(&e)],
            }),
        }
    }

    fn difference(
        &self,
        before: Computed,
        after: Computed,
        out: &mut TickOutput,
        errors: &mut RowErrors,
    ) -> Result<()> {
        if before.failed != after.failed {
            let gone = before.failed.into_iter().map(|e| (e, -1));
            for ((code, message), diff) in gone.chain(after.failed.into_iter().map(|e| (e, 1))) {
                errors.push(code, message, diff);
            }
        }
        let gather = |batches: &[RecordBatch]| {
            concat_batches(&self.output, batches).map_err(|e| Error::internal(e.to_string()))
        };
        let (before, after) = (gather(&before.batches)?, gather(&after.batches)?);
        let old = self.codec.encode(before.columns(), before.num_rows())?;
        let new = self.codec.encode(after.columns(), after.num_rows())?;
        let mut counts: HashMap<&[u8], i64> = HashMap::with_capacity(new.len());
        for row in 0..old.len() {
            *counts.entry(old.row(row)).or_default() -= 1;
        }
        for row in 0..new.len() {
            *counts.entry(new.row(row)).or_default() += 1;
        }
        let mut pick = |encoded: &Encoded, sign: i64| {
            let mut rows = Vec::new();
            for row in 0..encoded.len() {
                if let Some(count) = counts.get_mut(encoded.row(row))
                    && count.signum() == sign
                {
                    *count -= sign;
                    rows.push(row as u32);
                }
            }
            rows
        };
        let gone = pick(&old, -1);
        let come = pick(&new, 1);
        for (batch, rows, diff) in [(before, gone, -1), (after, come, 1)] {
            for rows in rows.chunks(OUTPUT_ROWS) {
                let taken = take_record_batch(&batch, &UInt32Array::from(rows.to_vec()))
                    .map_err(|e| Error::internal(e.to_string()))?;
                let diffs = Diffs::from_vec(vec![diff; rows.len()]);
                out.deltas.push(Delta::new(taken, diffs));
            }
        }
        Ok(())
    }

    /// Drops what the watermark closes; on close, shows it first.
    fn close(
        &mut self,
        watermark: Watermark,
        out: &mut TickOutput,
        errors: &mut RowErrors,
    ) -> Result<()> {
        let Some(rule) = self.spec.close else {
            return Ok(());
        };
        let past = late::closes_after(rule, self.spec.allowed_lateness_us, self.spec.emit);
        loop {
            let tables = self.sides.iter().flat_map(|s| [&s.tables, &s.rest]);
            let first = tables.filter_map(|tables| {
                let (time, _) = tables.range(Some(i64::MIN)..).next()?;
                *time
            });
            let Some(first) = first.min() else { break };
            if watermark < first.saturating_add(past) {
                break;
            }
            if self.spec.emit == Emit::OnClose {
                self.show(first, out, errors)?;
            }
            for side in &mut self.sides {
                side.tables.remove(&Some(first));
                side.rest.remove(&Some(first));
            }
        }
        self.drop_empty();
        Ok(())
    }

    fn drop_empty(&mut self) {
        let tables = self.sides.iter_mut();
        for tables in tables.flat_map(|side| [&mut side.tables, &mut side.rest]) {
            tables.retain(|_, table| !table.is_empty());
        }
    }

    /// The partitions of a table, as they are for good.
    fn show(&mut self, time: i64, out: &mut TickOutput, errors: &mut RowErrors) -> Result<()> {
        for group in 0..GROUPS {
            let tables = self
                .sides
                .iter()
                .filter_map(|side| side.tables.get(&Some(time)));
            let mut keys: Vec<(u64, Vec<u8>)> = tables
                .flat_map(|table| table.rows_of_group(group as u8))
                .map(|(hash, key, _)| (hash, key.to_vec()))
                .collect();
            keys.sort_unstable();
            keys.dedup();
            if keys.is_empty() {
                continue;
            }
            let places = keys.iter().map(|(hash, key)| Place {
                time: Some(time),
                hash: *hash,
                key,
            });
            let shown = self.compute(&places.collect::<Vec<_>>())?;
            for (code, message) in shown.failed {
                errors.push(code, message, 1);
            }
            let whole = shown.batches.into_iter().map(Delta::inserts);
            out.deltas.extend(whole);
            self.relieve();
        }
        Ok(())
    }
}

/// What partitions show.
#[derive(Debug, Default)]
struct Computed {
    batches: Vec<RecordBatch>,
    failed: Vec<(&'static str, String)>,
}

/// Marks the parts of [`Side::rest`].
const REST: &str = "r";

impl Stateful for RecomputeState {
    fn freeze(&mut self) -> Vec<Part> {
        let mut parts = Vec::new();
        for (number, side) in self.sides.iter_mut().enumerate() {
            for (mark, tables) in [("", &mut side.tables), (REST, &mut side.rest)] {
                for (at, table) in tables {
                    let at = at.map_or("open".to_string(), |at| at.to_string());
                    parts.push(Part {
                        name: format!("{number}{mark}:{at}"),
                        data: PartData::Keyed(table.snapshot()),
                    });
                }
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
                    "stored state is not that of a computation over partitions",
                )
                .detail(format!("part: {}", part.name))
            };
            let (side, at) = part.name.split_once(':').ok_or_else(strange)?;
            let rest = side.strip_suffix(REST);
            let side = rest.unwrap_or(side).parse::<usize>();
            let side = side.map_err(|_| strange())?;
            let at = match at {
                "open" => None,
                at => Some(at.parse().map_err(|_| strange())?),
            };
            let at = late::table_of(self.spec.emit, at);
            let side = self.sides.get_mut(side).ok_or_else(strange)?;
            let tables = match rest {
                Some(_) => &mut side.rest,
                None => &mut side.tables,
            };
            let table = tables.entry(at).or_insert_with(KeyedState::chained);
            table.restore_part(part, &owned)?;
        }
        self.drop_empty();
        self.started = true;
        Ok(())
    }

    fn rows(&self) -> u64 {
        self.tables().map(KeyedState::len).sum()
    }
    fn bytes(&self) -> u64 {
        self.tables().map(KeyedState::bytes).sum()
    }
    fn swapped_bytes(&self) -> u64 {
        self.tables().map(KeyedState::swapped_bytes).sum()
    }
    fn relieve(&mut self) {
        let tables = self
            .sides
            .iter_mut()
            .flat_map(|side| side.tables.values_mut().chain(side.rest.values_mut()));
        tables.for_each(KeyedState::relieve);
    }
}

impl RecomputeState {
    fn tables(&self) -> impl Iterator<Item = &KeyedState> {
        let sides = self.sides.iter();
        sides.flat_map(|side| side.tables.values().chain(side.rest.values()))
    }

    /// Rows that were compared, moved or computed with until now.
    pub fn worked(&self) -> u64 {
        self.sides.iter().map(|side| side.worked).sum()
    }
}

#[cfg(test)]
mod tests;
