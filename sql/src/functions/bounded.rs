//! Functions whose result can be far longer than their arguments, with a bound on it.
//!
//! # Contract
//!
//! * A value has at most [`MAX_VALUE`] bytes; the row that would get a longer one fails (54000).
//! * The values of one call have at most [`MAX_CALL`] bytes together. A view tries again with fewer
//!   rows, so what fails there is a single row; a query fails.
//! * Both are checked before anything is allocated.

use std::any::Any;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, OffsetSizeTrait};
use arrow::compute::{cast, concat};
use arrow::datatypes::{ArrowNativeType, DataType, FieldRef, Int64Type, IntervalMonthDayNanoType};
use datafusion::common::{Result, ScalarValue};
use datafusion::logical_expr::{
    ColumnarValue, ReturnFieldArgs, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature,
};
use millrace_dataflow::error::Error;

use crate::error::carry;

/// Longest value a function makes.
pub(crate) const MAX_VALUE: u64 = 16 << 20;
/// Values of one call together; below what 32-bit offsets can say.
pub(crate) const MAX_CALL: u64 = 512 << 20;
/// Steps a function may take for one row.
const MAX_STEPS: u64 = 10_000_000;

/// How the length of a result follows from the arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Rule {
    /// As often as the second argument says.
    Repeat,
    /// At least as many characters as the second argument says.
    Pad,
    /// The third argument for each occurrence of the second.
    Replace,
    /// The third argument for each match: only an upper bound is known.
    ReplaceMatches,
    /// All arguments in a row.
    Concat,
    /// The arguments after the first in a row, the first between them.
    ConcatWith,
    /// The elements of a list, the second argument between them.
    Join,
    /// The first argument in a list, as often as the second says.
    RepeatElement,
    /// A list of the second argument's length.
    Resize,
    /// From, to, step.
    Range,
    /// Time grows with the product of both lengths.
    Compare,
}

fn rule(name: &str) -> Option<Rule> {
    Some(match name {
        "repeat" => Rule::Repeat,
        "lpad" | "rpad" => Rule::Pad,
        "replace" => Rule::Replace,
        "regexp_replace" => Rule::ReplaceMatches,
        "concat" => Rule::Concat,
        "concat_ws" => Rule::ConcatWith,
        "array_to_string" => Rule::Join,
        "array_repeat" => Rule::RepeatElement,
        "array_resize" => Rule::Resize,
        "generate_series" | "range" => Rule::Range,
        "levenshtein" => Rule::Compare,
        _ => return None,
    })
}

/// `function` itself, or a wrapper that looks at the lengths first.
pub(crate) fn bounded(function: Arc<ScalarUDF>) -> Arc<ScalarUDF> {
    match rule(function.name()) {
        Some(rule) => Arc::new(ScalarUDF::new_from_impl(Bounded {
            inner: function,
            rule,
        })),
        None => function,
    }
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Bounded {
    inner: Arc<ScalarUDF>,
    rule: Rule,
}

impl ScalarUDFImpl for Bounded {
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn aliases(&self) -> &[String] {
        self.inner.aliases()
    }
    fn signature(&self) -> &Signature {
        self.inner.signature()
    }
    fn return_type(&self, arg_types: &[DataType]) -> Result<DataType> {
        self.inner.inner().return_type(arg_types)
    }
    fn return_field_from_args(&self, args: ReturnFieldArgs<'_>) -> Result<FieldRef> {
        self.inner.inner().return_field_from_args(args)
    }
    fn coerce_types(&self, arg_types: &[DataType]) -> Result<Vec<DataType>> {
        self.inner.inner().coerce_types(arg_types)
    }
    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let rows = rows_of(&args.args, args.number_rows);
        let bounds = bounds(self.rule, &args.args, rows)?;
        match self.rule {
            Rule::Compare => {
                if bounds.iter().any(|steps| *steps > MAX_STEPS) {
                    return Err(carry(
                        Error::invalid(format!("the arguments of {}() are too long", self.name()))
                            .code("54000"),
                    ));
                }
                self.inner.invoke_with_args(args)
            }
            Rule::ReplaceMatches => self.in_slices(args, &bounds),
            _ => {
                check(&bounds, MAX_VALUE)?;
                self.inner.invoke_with_args(args)
            }
        }
    }
}

impl Bounded {
    /// Runs on as many rows at once as surely fit, and looks at what came out.
    fn in_slices(&self, args: ScalarFunctionArgs, bounds: &[u64]) -> Result<ColumnarValue> {
        if total(bounds) <= MAX_VALUE {
            return self.inner.invoke_with_args(args);
        }
        let mut pieces: Vec<ArrayRef> = Vec::new();
        let (mut start, mut bytes) = (0, 0);
        while start < bounds.len() {
            let mut end = start + 1;
            let mut sum = bounds[start];
            if sum > MAX_CALL {
                return Err(too_long(MAX_VALUE));
            }
            while end < bounds.len() && sum + bounds[end] <= MAX_CALL {
                sum += bounds[end];
                end += 1;
            }
            let part = ScalarFunctionArgs {
                args: args
                    .args
                    .iter()
                    .map(|a| match a {
                        ColumnarValue::Array(array) => {
                            ColumnarValue::Array(array.slice(start, end - start))
                        }
                        scalar => scalar.clone(),
                    })
                    .collect(),
                arg_fields: args.arg_fields.clone(),
                number_rows: end - start,
                return_field: Arc::clone(&args.return_field),
                config_options: Arc::clone(&args.config_options),
            };
            let made = self.inner.invoke_with_args(part)?.into_array(end - start)?;
            let lengths = sizes(&made);
            check(&lengths, MAX_VALUE)?;
            bytes += total(&lengths);
            if bytes > MAX_CALL {
                return Err(too_long(MAX_CALL));
            }
            pieces.push(made);
            start = end;
        }
        let parts: Vec<&dyn Array> = pieces.iter().map(AsRef::as_ref).collect();
        let all = concat(&parts)?;
        let scalars = args
            .args
            .iter()
            .all(|a| matches!(a, ColumnarValue::Scalar(_)));
        Ok(match scalars {
            true => ColumnarValue::Scalar(ScalarValue::try_from_array(&all, 0)?),
            false => ColumnarValue::Array(all),
        })
    }
}

/// Refuses what `||` would make of its two sides.
pub(crate) fn check_concat(args: &[ColumnarValue], number_rows: usize) -> Result<()> {
    let rows = rows_of(args, number_rows);
    check(&bounds(Rule::Concat, args, rows)?, MAX_VALUE)
}

fn rows_of(args: &[ColumnarValue], number_rows: usize) -> usize {
    match args.iter().all(|a| matches!(a, ColumnarValue::Scalar(_))) {
        true => 1,
        false => number_rows,
    }
}

fn too_long(limit: u64) -> datafusion::error::DataFusionError {
    carry(
        Error::invalid(format!("the result is longer than {} MiB", limit >> 20))
            .code("54000")
            .hint("make it shorter, or look at fewer rows"),
    )
}

fn total(bounds: &[u64]) -> u64 {
    bounds.iter().fold(0, |sum, b| sum.saturating_add(*b))
}

fn check(bounds: &[u64], limit: u64) -> Result<()> {
    if bounds.iter().any(|b| *b > limit) {
        return Err(too_long(limit));
    }
    match total(bounds) > MAX_CALL {
        true => Err(too_long(MAX_CALL)),
        false => Ok(()),
    }
}

/// Bytes of the result, per row.
fn bounds(rule: Rule, args: &[ColumnarValue], rows: usize) -> Result<Vec<u64>> {
    let sizes = args.iter().map(Sizes::of).collect::<Result<Vec<_>>>()?;
    let size = |arg: usize, row: usize| sizes.get(arg).map_or(0, |s| s.at(row));
    let numbers = |arg: usize| Numbers::of(args.get(arg));
    let each = |bound: &dyn Fn(usize) -> u64| (0..rows).map(bound).collect();
    Ok(match rule {
        Rule::Concat => each(&|row| (0..args.len()).map(|a| size(a, row)).sum()),
        Rule::ConcatWith => each(&|row| {
            let between = size(0, row).saturating_mul(args.len() as u64);
            (1..args.len()).map(|a| size(a, row)).sum::<u64>() + between
        }),
        Rule::Repeat | Rule::RepeatElement => {
            let (times, text) = match rule {
                Rule::Repeat => (numbers(1)?, 0),
                _ => (numbers(1)?, 8),
            };
            each(&|row| size(0, row).max(text).saturating_mul(times.at(row)))
        }
        Rule::Pad => {
            let length = numbers(1)?;
            each(&|row| size(0, row).max(length.at(row).saturating_mul(4)))
        }
        Rule::Resize => {
            let length = numbers(1)?;
            each(&|row| {
                let grown = length.at(row).saturating_mul(size(2, row).max(8));
                size(0, row).max(grown)
            })
        }
        Rule::ReplaceMatches => each(&|row| {
            let matches = size(0, row).saturating_add(1);
            size(0, row).saturating_add(matches.saturating_mul(size(2, row)))
        }),
        Rule::Compare => each(&|row| size(0, row).saturating_mul(size(1, row))),
        Rule::Join => {
            let lengths = list_lengths(&args[0], rows)?;
            each(&|row| {
                let between = size(1, row).saturating_add(size(2, row));
                // A number's digits take more room than the number.
                let text = size(0, row).saturating_mul(3);
                text.saturating_add(lengths[row].saturating_mul(between))
            })
        }
        Rule::Range => range_bounds(args, rows)?,
        Rule::Replace => {
            // Rarely longer than the text; only then is it worth counting.
            let quick: Vec<u64> = each(&|row| {
                let matches = size(0, row).saturating_add(1);
                size(0, row).saturating_add(matches.saturating_mul(size(2, row)))
            });
            if quick.iter().all(|b| *b <= MAX_VALUE) && total(&quick) <= MAX_CALL {
                return Ok(quick);
            }
            let [text, from] = [&args[0], &args[1]].map(|a| Texts::of(a));
            let (text, from) = (text?, from?);
            each(&|row| {
                let (Some(t), Some(f)) = (text.at(row), from.at(row)) else {
                    return 0;
                };
                let found = t.matches(f).count() as u64;
                let kept = (t.len() as u64).saturating_sub(found * f.len() as u64);
                kept.saturating_add(found.saturating_mul(size(2, row)))
            })
        }
    })
}

/// Bytes per row of an argument.
enum Sizes {
    Same(u64),
    Each(Vec<u64>),
}

impl Sizes {
    fn of(value: &ColumnarValue) -> Result<Self> {
        Ok(match value {
            ColumnarValue::Scalar(scalar) => Self::Same(total(&sizes(&scalar.to_array()?))),
            ColumnarValue::Array(array) => Self::Each(sizes(array)),
        })
    }
    fn at(&self, row: usize) -> u64 {
        match self {
            Self::Same(size) => *size,
            Self::Each(sizes) => sizes.get(row).copied().unwrap_or(0),
        }
    }
}

fn sizes(array: &dyn Array) -> Vec<u64> {
    fn by_offset<O: OffsetSizeTrait>(offsets: &[O]) -> Vec<u64> {
        offsets
            .windows(2)
            .map(|w| (w[1].as_usize() - w[0].as_usize()) as u64)
            .collect()
    }
    match array.data_type() {
        DataType::Utf8 => by_offset(array.as_string::<i32>().value_offsets()),
        DataType::LargeUtf8 => by_offset(array.as_string::<i64>().value_offsets()),
        DataType::Binary => by_offset(array.as_binary::<i32>().value_offsets()),
        DataType::LargeBinary => by_offset(array.as_binary::<i64>().value_offsets()),
        // The low half of a view is its length.
        DataType::Utf8View => lengths(array.as_string_view().views()),
        DataType::BinaryView => lengths(array.as_binary_view().views()),
        DataType::List(_) => {
            let list = array.as_list::<i32>();
            let inner = sizes(list.values());
            list.value_offsets()
                .windows(2)
                .map(|w| 8 + total(&inner[w[0].as_usize()..w[1].as_usize()]))
                .collect()
        }
        DataType::LargeList(_) => {
            let list = array.as_list::<i64>();
            let inner = sizes(list.values());
            list.value_offsets()
                .windows(2)
                .map(|w| 8 + total(&inner[w[0].as_usize()..w[1].as_usize()]))
                .collect()
        }
        DataType::Null => vec![0; array.len()],
        other => vec![other.primitive_width().unwrap_or(16) as u64; array.len()],
    }
}

fn lengths(views: &[u128]) -> Vec<u64> {
    views.iter().map(|v| (v & 0xffff_ffff) as u64).collect()
}

fn list_lengths(value: &ColumnarValue, rows: usize) -> Result<Vec<u64>> {
    let array = match value {
        ColumnarValue::Scalar(scalar) => {
            let one = list_lengths(&ColumnarValue::Array(scalar.to_array()?), 1)?;
            return Ok(vec![one.first().copied().unwrap_or(0); rows]);
        }
        ColumnarValue::Array(array) => array,
    };
    Ok(match array.data_type() {
        DataType::List(_) => array
            .as_list::<i32>()
            .offsets()
            .lengths()
            .map(|n| n as u64)
            .collect(),
        DataType::LargeList(_) => array
            .as_list::<i64>()
            .offsets()
            .lengths()
            .map(|n| n as u64)
            .collect(),
        // Nested lists of a fixed size and the like: each byte could be an element.
        _ => sizes(array),
    })
}

/// Whole numbers of an argument; null and negative ones count as zero.
struct Numbers(ArrayRef, bool);

impl Numbers {
    fn of(value: Option<&ColumnarValue>) -> Result<Self> {
        let (array, same) = match value {
            Some(ColumnarValue::Array(array)) => (Arc::clone(array), false),
            Some(ColumnarValue::Scalar(scalar)) => (scalar.to_array()?, true),
            None => (ScalarValue::Int64(None).to_array()?, true),
        };
        Ok(Self(cast(&array, &DataType::Int64)?, same))
    }
    fn get(&self, row: usize) -> Option<i64> {
        let row = if self.1 { 0 } else { row };
        let numbers = self.0.as_primitive::<Int64Type>();
        (row < numbers.len() && numbers.is_valid(row)).then(|| numbers.value(row))
    }
    fn at(&self, row: usize) -> u64 {
        self.get(row)
            .and_then(|n| u64::try_from(n).ok())
            .unwrap_or(0)
    }
}

/// Texts of an argument.
struct Texts(ArrayRef, bool);

impl Texts {
    fn of(value: &ColumnarValue) -> Result<Self> {
        let (array, same) = match value {
            ColumnarValue::Array(array) => (Arc::clone(array), false),
            ColumnarValue::Scalar(scalar) => (scalar.to_array()?, true),
        };
        Ok(Self(cast(&array, &DataType::LargeUtf8)?, same))
    }
    fn at(&self, row: usize) -> Option<&str> {
        let row = if self.1 { 0 } else { row };
        let texts = self.0.as_string::<i64>();
        texts.is_valid(row).then(|| texts.value(row))
    }
}

/// Elements from the first to the second argument, in steps of the third.
fn range_bounds(args: &[ColumnarValue], rows: usize) -> Result<Vec<u64>> {
    let is_time = args.first().is_some_and(|a| a.data_type().is_temporal());
    let (from, to, step) = match args {
        [to] => (Numbers::of(None)?, Numbers::of(Some(to))?, None),
        [from, to] => (Numbers::of(Some(from))?, Numbers::of(Some(to))?, None),
        [from, to, step, ..] => (
            Numbers::of(Some(&comparable(from)?))?,
            Numbers::of(Some(&comparable(to)?))?,
            Some(step),
        ),
        [] => return Ok(vec![0; rows]),
    };
    let step: Vec<u64> = match step {
        None => vec![1; rows],
        Some(step) if is_time => intervals(step, rows)?,
        Some(step) => {
            let steps = Numbers::of(Some(step))?;
            (0..rows)
                .map(|row| steps.get(row).map_or(1, i64::unsigned_abs).max(1))
                .collect()
        }
    };
    Ok((0..rows)
        .map(|row| match (from.get(row), to.get(row)) {
            (a, Some(b)) => (b.abs_diff(a.unwrap_or(0)) / step[row] + 1).saturating_mul(8),
            _ => 0,
        })
        .collect())
}

/// Times in nanoseconds as far as they fit, dates too; numbers as they are.
fn comparable(value: &ColumnarValue) -> Result<ColumnarValue> {
    match value.data_type() {
        DataType::Timestamp(_, zone) => value.cast_to(
            &DataType::Timestamp(arrow::datatypes::TimeUnit::Microsecond, zone),
            None,
        ),
        DataType::Date32 | DataType::Date64 => value.cast_to(
            &DataType::Timestamp(arrow::datatypes::TimeUnit::Microsecond, None),
            None,
        ),
        _ => Ok(value.clone()),
    }
}

/// Lengths of intervals in microseconds.
fn intervals(step: &ColumnarValue, rows: usize) -> Result<Vec<u64>> {
    let array = step.to_array(rows.max(1))?;
    let wanted = DataType::Interval(arrow::datatypes::IntervalUnit::MonthDayNano);
    let array = cast(&array, &wanted)?;
    let steps = array.as_primitive::<IntervalMonthDayNanoType>();
    Ok(steps
        .iter()
        .map(|step| {
            let us = step.map_or(0, |s| {
                i128::from(s.months) * 28 * 86_400_000_000
                    + i128::from(s.days) * 86_400_000_000
                    + i128::from(s.nanoseconds) / 1_000
            });
            u64::try_from(us.unsigned_abs()).unwrap_or(u64::MAX).max(1)
        })
        .collect())
}
