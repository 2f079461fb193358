//! INTERSECT ALL and EXCEPT ALL: how often each row stands on either side.
//!
//! # Contract
//!
//! * A row is shown `min(l, r)` times, or `max(l - r, 0)` times, `l` and `r` being how often it stands on
//!   the left and on the right; counts below zero are taken for zero. Nulls are equal.
//! * [`CountedSetState::tick`] is given all rows of a tick; its output has each row once at the most.
//! * With a close rule rows lie in tables by time, as those of a semi-join; rows that come after their
//!   table was dropped are ignored.

use std::cmp::Ordering;

use arrow::array::ArrayRef;
use arrow::datatypes::SchemaRef;

use super::{Keep, Keyed, Side, WARM_ROWS, build, coalesce, nullable, strange, times};
use crate::delta::{Delta, Diffs};
use crate::error::{Error, Result};
use crate::kernel::order::Time;
use crate::kernel::{OUTPUT_ROWS, TickOutput};
use crate::key::{Share, key_group};
use crate::plan::CloseRule;
use crate::state::{KeyedState, Part, PartData, Stateful, StoredData, StoredPart};
use crate::time::{NO_WATERMARK, Watermark};

/// What a counted set operation is.
#[derive(Debug, Clone)]
pub struct CountedSetSpec {
    /// Columns of the left side; those of the right have the same types.
    pub left: SchemaRef,
    pub right: SchemaRef,
    pub output: SchemaRef,
    /// EXCEPT, not INTERSECT.
    pub except: bool,
    /// When a row is final on both sides; `key` is its column.
    pub close: Option<CloseRule>,
}

impl CountedSetSpec {
    /// Refuses what the kernel cannot compute. It expects a spec that passed.
    pub fn validate(&self) -> Result<()> {
        let types = |schema: &SchemaRef| -> Vec<_> {
            let fields = schema.fields().iter();
            fields.map(|field| field.data_type().clone()).collect()
        };
        if types(&self.left) != types(&self.right) {
            return Err(Error::internal("a set operation over different columns"));
        }
        side(self).map(drop)
    }
}

/// The state of a counted set operation on one worker. See the module contract.
#[derive(Debug)]
pub struct CountedSetState {
    share: Share,
    /// Its tables hold how often each row stands on the left, and on the right.
    rows: Side,
    except: bool,
    output: SchemaRef,
    /// The watermark of the ticks before.
    closed: Watermark,
}

fn side(spec: &CountedSetSpec) -> Result<Side> {
    let all: Vec<usize> = (0..spec.left.fields().len()).collect();
    let keep = Keep {
        close: spec.close,
        growing: false,
        null_equal: true,
    };
    Side::new(&spec.left, &all, &all, keep)
}

const BYTES: usize = 16;

impl CountedSetState {
    pub fn new(spec: &CountedSetSpec, worker: usize, workers: usize) -> Self {
        Self {
            share: Share { worker, workers },
            rows: side(spec).expect("the plan was checked by `CountedSetSpec::validate`"),
            except: spec.except,
            output: nullable(&spec.output),
            closed: NO_WATERMARK,
        }
    }

    /// Applies all rows of one tick.
    pub fn tick(&mut self, left: &[Delta], right: &[Delta], watermark: Watermark) -> TickOutput {
        let mut out = TickOutput::default();
        let watermark = watermark.max(self.closed);
        let done = self.apply(left, right, &mut out);
        done.expect("rows have the types of the plan");
        self.rows.close(watermark);
        self.closed = watermark;
        self.relieve();
        out
    }

    fn apply(&mut self, left: &[Delta], right: &[Delta], out: &mut TickOutput) -> Result<()> {
        let (left, right) = (coalesce(left)?, coalesce(right)?);
        let from_right = left.len();
        let news: Vec<Delta> = left.into_iter().chain(right).collect();
        let keyed: Vec<Keyed> = news
            .iter()
            .map(|delta| self.rows.read(delta))
            .collect::<Result<_>>()?;
        let mut rows: Vec<Row> = Vec::with_capacity(news.iter().map(Delta::len).sum());
        for (number, (delta, keys)) in news.iter().zip(&keyed).enumerate() {
            let times = self.rows.close.map(|rule| times(&delta.batch, rule.key));
            let table_of = |row: usize| self.rows.table_of(times.as_ref()?(row));
            let open = (0..delta.len()).map(|row| Row {
                time: table_of(row),
                hash: keys.hashes[row],
                delta: number as u32,
                row: row as u32,
            });
            rows.extend(open.filter(|at| !self.rows.closes(at.time, self.closed)));
        }
        let key = |at: &Row| keyed[at.delta as usize].keys.row(at.row as usize);
        let order = |a: &Row, b: &Row| a.place().cmp(&b.place()).then_with(|| key(a).cmp(key(b)));
        rows.sort_unstable_by(order);
        let mut shown: (Vec<&[u8]>, Vec<i64>) = Default::default();
        let same = |a: &Row, b: &Row| order(a, b) == Ordering::Equal;
        for (number, run) in rows.chunk_by(same).enumerate() {
            let mut change = [0i64; 2];
            for at in run {
                let diff = news[at.delta as usize].diffs.get(at.row as usize);
                let side = &mut change[usize::from(at.delta as usize >= from_right)];
                *side = side.wrapping_add(diff);
            }
            let (at, tables) = (&run[0], &mut self.rows.tables);
            let table = tables.entry(at.time).or_insert_with(KeyedState::plain);
            let diff = add(table, at.hash, key(at), change, self.except);
            if diff != 0 {
                shown.0.push(key(at));
                shown.1.push(diff);
            }
            if number % WARM_ROWS == 0 {
                table.relieve();
            }
        }
        let shown = shown.0.chunks(OUTPUT_ROWS).zip(shown.1.chunks(OUTPUT_ROWS));
        for (keys, diffs) in shown {
            let columns: Vec<ArrayRef> = self.rows.keys.decode(keys.iter().copied())?;
            let batch = build(&self.output, columns, keys.len());
            out.deltas
                .push(Delta::new(batch, Diffs::from_vec(diffs.to_vec())));
        }
        Ok(())
    }
}

/// A row of either side.
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

/// Adds to the counts of a row; how much more often it is shown.
fn add(table: &mut KeyedState, hash: u64, key: &[u8], change: [i64; 2], except: bool) -> i64 {
    if change == [0, 0] {
        return 0;
    }
    let shown = |[left, right]: [i64; 2]| {
        let (left, right) = (left.max(0), right.max(0));
        match except {
            true => left.saturating_sub(right).max(0),
            false => left.min(right),
        }
    };
    let (id, value, _) = table.entry(hash, key, &[0; BYTES]);
    let before = counts(value);
    let after = [0, 1].map(|side| before[side].wrapping_add(change[side]));
    value[..8].copy_from_slice(&after[0].to_le_bytes());
    value[8..].copy_from_slice(&after[1].to_le_bytes());
    if after == [0, 0] {
        table.remove_located(id, hash);
    }
    shown(after) - shown(before)
}

fn counts(value: &[u8]) -> [i64; 2] {
    let (left, right) = value.split_at(8);
    [left, right]
        .map(|count| i64::from_le_bytes(count.try_into().expect("counts have eight bytes")))
}

/// The part that tells how far the watermark has come.
const CLOSED: &str = "closed";

impl Stateful for CountedSetState {
    fn freeze(&mut self) -> Vec<Part> {
        let mut parts = self.rows.freeze("rows");
        parts.push(Part {
            name: CLOSED.to_string(),
            data: PartData::Meta(self.closed.to_le_bytes().to_vec()),
        });
        parts
    }

    fn restore(&mut self, parts: &[StoredPart]) -> Result<()> {
        let owned = self.share.groups();
        for part in parts {
            match (part.name.split_once(':'), &part.data) {
                (Some(("rows", start)), _) => {
                    self.rows.restore(part, start, &owned, KeyedState::plain)?;
                }
                (None, StoredData::Meta(bytes)) if part.name == CLOSED => {
                    let bytes = bytes.as_ref().try_into().map_err(|_| strange(part))?;
                    self.closed = self.closed.max(i64::from_le_bytes(bytes));
                }
                _ => return Err(strange(part)),
            }
        }
        self.rows.drop_empty();
        Ok(())
    }

    fn rows(&self) -> u64 {
        self.rows.rows()
    }

    fn bytes(&self) -> u64 {
        self.rows.bytes()
    }

    fn swapped_bytes(&self) -> u64 {
        self.rows.swapped_bytes()
    }

    fn relieve(&mut self) {
        self.rows.relieve();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::kernel::testing::{accumulate, batch, int, stored, time};
    use crate::key::{hash_columns, owner};
    use crate::state::testing::{budget, enter};

    const SECOND: i64 = 1_000_000;

    /// Value, time in seconds, diff.
    type Row = (Option<i64>, Option<i64>, i64);

    fn delta(rows: &[Row]) -> Delta {
        let columns = vec![
            ("value", int(rows.iter().map(|row| row.0))),
            ("at", time(rows.iter().map(|row| Some(row.1? * SECOND)))),
        ];
        let diffs = rows.iter().map(|row| row.2).collect();
        Delta::new(batch(columns), Diffs::from_vec(diffs))
    }

    fn slice() -> impl Strategy<Value = Vec<Row>> {
        let diff = prop_oneof![4 => Just(1i64), 1 => Just(3), 3 => Just(-1)];
        let value = proptest::option::weighted(0.8, 0i64..3);
        let at = proptest::option::weighted(0.8, 0i64..4);
        prop::collection::vec((value, at, diff), 0..15)
    }

    fn closes(row: &Row, close: Option<i64>, watermark: i64) -> bool {
        let last = close
            .zip(row.1)
            .map(|(delay, at)| at * SECOND + SECOND - 1 + delay * SECOND);
        last.is_some_and(|last| watermark >= last)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn equals_a_recomputation_at_every_tick(
            ticks in prop::collection::vec((slice(), slice(), 0i64..3), 1..8),
            except in any::<bool>(),
            close in proptest::option::of(0i64..3),
            restart in 0usize..8,
            workers in (1usize..4, 1usize..4),
            budget in budget(),
        ) {
            let _entered = enter(budget);
            let schema = delta(&[]).batch.schema();
            let spec = CountedSetSpec {
                left: Arc::clone(&schema),
                right: Arc::clone(&schema),
                output: schema,
                except,
                close: close.map(|delay| CloseRule { key: 1, delay_us: delay * SECOND }),
            };
            spec.validate().unwrap();
            let new = |workers: usize| -> Vec<CountedSetState> {
                (0..workers).map(|worker| CountedSetState::new(&spec, worker, workers)).collect()
            };
            let mut states = new(workers.0);
            let (mut got, mut watermark) = (BTreeMap::new(), NO_WATERMARK);
            let mut counts: BTreeMap<(Option<i64>, Option<i64>), [i64; 2]> = BTreeMap::new();
            for (number, (left, right, step)) in ticks.iter().enumerate() {
                if number == restart {
                    let parts = states.iter_mut().flat_map(|state| stored(state.freeze()));
                    let parts: Vec<_> = parts.collect();
                    states = new(workers.1);
                    states.iter_mut().for_each(|state| state.restore(&parts).unwrap());
                }
                for (side, rows) in [left, right].into_iter().enumerate() {
                    for row in rows.iter().filter(|row| !closes(row, close, watermark)) {
                        counts.entry((row.0, row.1)).or_default()[side] += row.2;
                    }
                }
                watermark = watermark.max(0) + step * SECOND;
                let total = states.len();
                for (worker, state) in states.iter_mut().enumerate() {
                    let share = |rows: &[Row]| -> Vec<Delta> {
                        let shares = rows.chunks(4).map(delta).filter_map(|delta| {
                            let hashes = hash_columns(delta.batch.columns(), delta.len()).unwrap();
                            let mine = hashes.iter().map(|h| owner(key_group(*h), total) == worker);
                            delta.filter(&mine.map(Some).collect())
                        });
                        shares.collect()
                    };
                    let out = state.tick(&share(left), &share(right), watermark);
                    accumulate(&mut got, &out.deltas);
                }
                let mut wanted = BTreeMap::new();
                for ((value, at), [l, r]) in &counts {
                    let (l, r) = (*l.max(&0), *r.max(&0));
                    let shown = if except { (l - r).max(0) } else { l.min(r) };
                    let text = crate::kernel::testing::rows(&delta(&[(*value, *at, 1)]).batch);
                    wanted.insert(text[0].clone(), shown);
                }
                wanted.retain(|_, shown| *shown != 0);
                prop_assert_eq!(&got, &wanted, "tick {}", number);
            }
        }
    }
}
