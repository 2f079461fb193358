//! Accumulators: what an aggregation keeps of a group.
//!
//! ```text
//! calls ──► accumulators (shared: sum, avg and count of one column need two) ──► layout of a value
//! value = touch (4) ++ fixed slots ++ tails (length, bytes)*
//! ```
//!
//! An accumulator has three forms: a *partial* column that [`partial`] makes of a batch, a *slot* in the
//! value of the group's row in keyed state, and an *output* column that [`output`] makes of slots.
//!
//! # Contract
//!
//! * The first accumulator counts the rows of the group.
//! * Adding is associative and commutative, and over retracting input it has an inverse: what a group
//!   keeps depends on the multiset of its rows only.
//! * Extremes over append-only input keep the extreme alone. Over retracting input the values live
//!   with their counts in chained state and the slot caches the extremes.

pub(crate) mod output;
pub(crate) mod partial;
pub(crate) mod wide;
pub(crate) mod words;

use arrow::datatypes::DataType;

use crate::error::{Error, Result};
use crate::exact::ExactSum;
use crate::key::{RowCodec, is_word};
use crate::plan::AggregateKind;

use super::aggregate::AggregateSpec;

/// What an accumulator keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Number of rows whose input is not null.
    Count,
    /// Exact sum of integers or decimals, in 192 bits.
    Sum,
    /// Exact sum of floats.
    FloatSum,
    /// The greatest or the least value, append-only.
    Extreme { max: bool },
    /// All values with their counts, and of them the extremes asked for.
    Values { min: bool, max: bool },
}

#[derive(Debug)]
pub(crate) struct Accumulator {
    pub kind: Kind,
    /// Column of the input; `None` counts rows.
    pub input: Option<usize>,
    pub filter: Option<usize>,
    pub data_type: DataType,
    /// Of extremes whose values are no words, and of values.
    pub codec: Option<RowCodec>,
}

impl Accumulator {
    /// Type of its column in partial deltas.
    pub(crate) fn partial_type(&self) -> DataType {
        match self.kind {
            Kind::Count => DataType::Int64,
            Kind::Sum => DataType::FixedSizeBinary(wide::BYTES as i32),
            Kind::FloatSum | Kind::Values { .. } => DataType::Binary,
            Kind::Extreme { .. } => self.data_type.clone(),
        }
    }

    /// The extreme is kept as a word.
    pub(crate) fn is_word(&self) -> bool {
        matches!(self.kind, Kind::Extreme { .. }) && is_word(&self.data_type)
    }
}

/// Where an accumulator lives in a group's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Slot {
    /// At this offset.
    Fixed(usize),
    /// In this tail; values have two, least and greatest.
    Tail(usize),
}

/// How an output column comes from accumulators (indices).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Final {
    Count(usize),
    /// The sum is multiplied by ten to `power` for the output's scale.
    Sum {
        sum: usize,
        count: usize,
        power: u32,
    },
    Average {
        sum: usize,
        count: usize,
        power: u32,
    },
    FloatSum {
        sum: usize,
        count: usize,
    },
    FloatAverage {
        sum: usize,
        count: usize,
    },
    /// A word or, by tail, row bytes.
    Extreme(usize),
    Least(usize),
    Greatest(usize),
}

/// Bytes at the front of a value that say where the group stands among those touched in this tick.
pub(crate) const TOUCH: usize = 4;
/// Where the number of rows stands.
const ROWS: usize = TOUCH;
/// A flag that there is a value, and its word.
const WORD: usize = 1 + 8;

/// The accumulators of a spec and the form of a group's value.
#[derive(Debug)]
pub(crate) struct Layout {
    pub accumulators: Vec<Accumulator>,
    pub slots: Vec<Slot>,
    pub finals: Vec<Final>,
    /// Length of a value without its tails.
    pub fixed: usize,
    pub tails: usize,
    /// The value of a group without rows.
    pub initial: Vec<u8>,
}

impl Layout {
    pub(crate) fn new(spec: &AggregateSpec) -> Result<Self> {
        let mut layout = Self {
            accumulators: Vec::new(),
            slots: Vec::new(),
            finals: Vec::new(),
            fixed: TOUCH,
            tails: 0,
            initial: Vec::new(),
        };
        layout.accumulator(spec, Kind::Count, None, None)?;
        for call in &spec.calls {
            let by = |layout: &mut Self, kind| {
                let input = if kind == Kind::Count && call.input.is_none() {
                    None
                } else {
                    call.input
                };
                layout.accumulator(spec, kind, input, call.filter)
            };
            if call.input.is_none() && call.kind != AggregateKind::Count {
                return Err(Error::internal(
                    "an aggregate other than count has no argument",
                ));
            }
            let input_type = call.input.map(|c| spec.input.field(c).data_type().clone());
            let float = input_type.as_ref().is_some_and(DataType::is_floating);
            let made = match call.kind {
                AggregateKind::Count => Final::Count(by(&mut layout, Kind::Count)?),
                AggregateKind::Sum | AggregateKind::Avg if float => {
                    let sum = by(&mut layout, Kind::FloatSum)?;
                    let count = by(&mut layout, Kind::Count)?;
                    if call.kind == AggregateKind::Sum {
                        Final::FloatSum { sum, count }
                    } else {
                        Final::FloatAverage { sum, count }
                    }
                }
                AggregateKind::Sum | AggregateKind::Avg => {
                    let sum = by(&mut layout, Kind::Sum)?;
                    let count = by(&mut layout, Kind::Count)?;
                    let power = power(&layout.accumulators[sum].data_type, &call.output)?;
                    if call.kind == AggregateKind::Sum {
                        Final::Sum { sum, count, power }
                    } else {
                        Final::Average { sum, count, power }
                    }
                }
                AggregateKind::Min | AggregateKind::Max => {
                    let max = call.kind == AggregateKind::Max;
                    if !spec.retracting {
                        Final::Extreme(by(&mut layout, Kind::Extreme { max })?)
                    } else if max {
                        Final::Greatest(by(&mut layout, Kind::Values { min: false, max })?)
                    } else {
                        Final::Least(by(&mut layout, Kind::Values { min: true, max })?)
                    }
                }
            };
            layout.finals.push(made);
        }
        layout.place();
        Ok(layout)
    }

    /// The accumulator of this kind, shared with other calls.
    fn accumulator(
        &mut self,
        spec: &AggregateSpec,
        kind: Kind,
        input: Option<usize>,
        filter: Option<usize>,
    ) -> Result<usize> {
        for (at, have) in self.accumulators.iter_mut().enumerate() {
            if (have.input, have.filter) != (input, filter) {
                continue;
            }
            match (&mut have.kind, kind) {
                (
                    Kind::Values { min, max },
                    Kind::Values {
                        min: wants_min,
                        max: wants_max,
                    },
                ) => {
                    *min |= wants_min;
                    *max |= wants_max;
                    return Ok(at);
                }
                (have, kind) if *have == kind => return Ok(at),
                _ => {}
            }
        }
        let data_type = input.map_or(DataType::Null, |c| spec.input.field(c).data_type().clone());
        let encoded = match kind {
            Kind::Extreme { .. } => !is_word(&data_type),
            Kind::Values { .. } => true,
            _ => false,
        };
        let codec = if encoded {
            Some(RowCodec::keys([data_type.clone()])?)
        } else {
            None
        };
        self.accumulators.push(Accumulator {
            kind,
            input,
            filter,
            data_type,
            codec,
        });
        Ok(self.accumulators.len() - 1)
    }

    /// Gives each accumulator its slot and makes the initial value.
    fn place(&mut self) {
        for accumulator in &self.accumulators {
            let fixed = match accumulator.kind {
                Kind::Count => Some(8),
                Kind::Sum => Some(wide::BYTES),
                Kind::Extreme { .. } if accumulator.is_word() => Some(WORD),
                Kind::FloatSum | Kind::Extreme { .. } | Kind::Values { .. } => None,
            };
            self.slots.push(match fixed {
                Some(length) => {
                    self.fixed += length;
                    Slot::Fixed(self.fixed - length)
                }
                None => {
                    let values = matches!(accumulator.kind, Kind::Values { .. });
                    self.tails += if values { 2 } else { 1 };
                    Slot::Tail(self.tails - if values { 2 } else { 1 })
                }
            });
        }
        self.initial = vec![0; self.fixed];
        for accumulator in &self.accumulators {
            match accumulator.kind {
                Kind::FloatSum => push_tail(&mut self.initial, &ExactSum::new().to_bytes()),
                Kind::Extreme { .. } if !accumulator.is_word() => push_tail(&mut self.initial, &[]),
                Kind::Values { .. } => {
                    push_tail(&mut self.initial, &[]);
                    push_tail(&mut self.initial, &[]);
                }
                _ => {}
            }
        }
    }

    /// Values have chained state beside them.
    pub(crate) fn has_values(&self) -> bool {
        self.accumulators
            .iter()
            .any(|a| matches!(a.kind, Kind::Values { .. }))
    }

    /// The group holds nothing, apart from what chained state may hold.
    pub(crate) fn is_initial(&self, value: &[u8]) -> bool {
        value[TOUCH..] == self.initial[TOUCH..]
    }
}

/// Number of rows of the group.
#[inline]
pub(crate) fn rows_in(value: &[u8]) -> i64 {
    read_i64(value, ROWS)
}

#[inline]
pub(crate) fn read_i64(value: &[u8], at: usize) -> i64 {
    i64::from_le_bytes(
        value[at..at + 8]
            .try_into()
            .expect("the slice has eight bytes"),
    )
}

pub(crate) fn push_tail(value: &mut Vec<u8>, tail: &[u8]) {
    value.extend_from_slice(&(tail.len() as u32).to_le_bytes());
    value.extend_from_slice(tail);
}

/// The tails of a value, in order.
pub(crate) fn tails(value: &[u8], fixed: usize) -> impl Iterator<Item = &[u8]> {
    let mut rest = &value[fixed..];
    std::iter::from_fn(move || {
        let (length, after) = rest.split_first_chunk::<4>()?;
        let (tail, after) = after.split_at(u32::from_le_bytes(*length) as usize);
        rest = after;
        Some(tail)
    })
}

/// By which power of ten a sum is multiplied to have the scale of the output.
fn power(input: &DataType, output: &DataType) -> Result<u32> {
    let scale = match input {
        DataType::Decimal32(_, s) | DataType::Decimal64(_, s) | DataType::Decimal128(_, s) => *s,
        other if other.is_integer() => 0,
        other => {
            return Err(Error::unsupported(format!(
                "sums of type {other} cannot be maintained"
            )));
        }
    };
    let DataType::Decimal128(_, wanted) = output else {
        return Err(Error::internal(format!("a sum of type {output}")));
    };
    u32::try_from(i32::from(*wanted) - i32::from(scale))
        .map_err(|_| Error::internal("a sum with fewer digits than its terms"))
}
