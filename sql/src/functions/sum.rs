//! `sum` and `avg`: exact, checked, and independent of the order of rows.
//!
//! # Contract
//!
//! * Integers sum into `DECIMAL(38,0)`, decimals into `DECIMAL(38,s)`; a total that does not fit is
//!   an error, partial totals never are (they are kept in 256 bits).
//! * Doubles sum in fixed point and are rounded once.
//! * `avg` of integers and decimals is `DECIMAL(38,max(6,s))`, rounded half away from zero; `avg` of
//!   doubles is the rounded sum divided by the count.
//! * Nulls are skipped; over no value at all the result is null.

use std::any::Any;
use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Decimal128Type, Field, FieldRef, Float64Type, Int64Type, i256};
use arrow::error::ArrowError;
use datafusion::common::{DataFusionError, Result, ScalarValue, exec_err, plan_err};
use datafusion::logical_expr::function::{AccumulatorArgs, StateFieldsArgs};
use datafusion::logical_expr::utils::format_state_name;
use datafusion::logical_expr::{
    Accumulator, AggregateUDF, AggregateUDFImpl, Signature, Volatility,
};
use millrace_dataflow::exact::ExactSum;

const MAX_PRECISION: u8 = 38;
/// Digits behind the point that an average of whole numbers has.
const AVERAGE_SCALE: i8 = 6;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Fold {
    Sum,
    Average,
}

/// The aggregate function.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(crate) struct Total {
    pub(crate) fold: Fold,
    signature: Signature,
    aliases: Vec<String>,
}

impl Total {
    pub(crate) fn udaf(fold: Fold) -> Arc<AggregateUDF> {
        Arc::new(AggregateUDF::new_from_impl(Self {
            fold,
            signature: Signature::user_defined(Volatility::Immutable),
            aliases: match fold {
                Fold::Sum => Vec::new(),
                Fold::Average => vec!["mean".into()],
            },
        }))
    }
}

/// The type in which a column is added up.
fn addend(data_type: &DataType) -> Option<DataType> {
    Some(match data_type {
        DataType::Int8
        | DataType::Int16
        | DataType::Int32
        | DataType::Int64
        | DataType::UInt8
        | DataType::UInt16
        | DataType::UInt32
        | DataType::Null => DataType::Int64,
        DataType::UInt64 => DataType::Decimal128(20, 0),
        DataType::Decimal32(p, s) | DataType::Decimal64(p, s) | DataType::Decimal128(p, s) => {
            DataType::Decimal128(*p, *s)
        }
        DataType::Float16 | DataType::Float32 | DataType::Float64 => DataType::Float64,
        DataType::Dictionary(_, value) => return addend(value),
        _ => return None,
    })
}

fn result(fold: Fold, argument: &DataType) -> Result<DataType> {
    Ok(match (argument, fold) {
        (DataType::Float64, _) => DataType::Float64,
        (DataType::Int64, Fold::Sum) => DataType::Decimal128(MAX_PRECISION, 0),
        (DataType::Int64, Fold::Average) => DataType::Decimal128(MAX_PRECISION, AVERAGE_SCALE),
        (DataType::Decimal128(_, s), Fold::Sum) => DataType::Decimal128(MAX_PRECISION, *s),
        (DataType::Decimal128(_, s), Fold::Average) => {
            DataType::Decimal128(MAX_PRECISION, (*s).max(AVERAGE_SCALE))
        }
        (other, _) => match addend(other) {
            Some(addend) => return result(fold, &addend),
            None => return plan_err!("a column of type {other} cannot be added up"),
        },
    })
}

impl AggregateUDFImpl for Total {
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn name(&self) -> &str {
        match self.fold {
            Fold::Sum => "sum",
            Fold::Average => "avg",
        }
    }
    fn aliases(&self) -> &[String] {
        &self.aliases
    }
    fn signature(&self) -> &Signature {
        &self.signature
    }
    fn coerce_types(&self, arg_types: &[DataType]) -> Result<Vec<DataType>> {
        let [argument] = arg_types else {
            return plan_err!("{} takes one argument", self.name());
        };
        match addend(argument) {
            Some(addend) => Ok(vec![addend]),
            None => plan_err!(
                "function {}({}) does not exist: it adds up numbers",
                self.name(),
                crate::types::sql_name(argument)
            ),
        }
    }
    fn return_type(&self, arg_types: &[DataType]) -> Result<DataType> {
        match arg_types {
            [argument] => result(self.fold, argument),
            _ => plan_err!("{} takes one argument", self.name()),
        }
    }
    fn state_fields(&self, args: StateFieldsArgs<'_>) -> Result<Vec<FieldRef>> {
        if args.is_distinct {
            let value = args.input_fields[0].data_type().clone();
            return Ok(vec![Arc::new(Field::new_list(
                format_state_name(args.name, "values"),
                Field::new_list_field(value, true),
                false,
            ))]);
        }
        Ok(vec![
            Arc::new(Field::new(
                format_state_name(args.name, "total"),
                DataType::Binary,
                false,
            )),
            Arc::new(Field::new(
                format_state_name(args.name, "count"),
                DataType::Int64,
                false,
            )),
        ])
    }
    fn accumulator(&self, args: AccumulatorArgs<'_>) -> Result<Box<dyn Accumulator>> {
        let argument = args.expr_fields[0].data_type().clone();
        let state = TotalState::new(self.fold, &argument, args.return_type())?;
        Ok(if args.is_distinct {
            Box::new(Distinct {
                values: HashSet::new(),
                argument,
                state,
            })
        } else {
            Box::new(state)
        })
    }
    fn order_sensitivity(&self) -> datafusion::logical_expr::utils::AggregateOrderSensitivity {
        datafusion::logical_expr::utils::AggregateOrderSensitivity::Insensitive
    }
    fn reverse_expr(&self) -> datafusion::logical_expr::ReversedUDAF {
        datafusion::logical_expr::ReversedUDAF::Identical
    }
}

#[derive(Debug, Clone)]
enum Sum {
    /// In units of 10^-scale.
    Units(i256),
    Float(ExactSum),
}

#[derive(Debug, Clone)]
struct TotalState {
    fold: Fold,
    sum: Sum,
    count: i64,
    /// Digits behind the point of what is added.
    scale: i8,
    output: DataType,
}

impl TotalState {
    fn new(fold: Fold, argument: &DataType, output: &DataType) -> Result<Self> {
        let (sum, scale) = match addend(argument) {
            Some(DataType::Float64) => (Sum::Float(ExactSum::new()), 0),
            Some(DataType::Decimal128(_, s)) => (Sum::Units(i256::ZERO), s),
            Some(_) => (Sum::Units(i256::ZERO), 0),
            None => return plan_err!("a column of type {argument} cannot be added up"),
        };
        Ok(Self {
            fold,
            sum,
            count: 0,
            scale,
            output: output.clone(),
        })
    }

    fn apply(&mut self, values: &ArrayRef, sign: i64) -> Result<()> {
        let values = match addend(values.data_type()) {
            Some(addend) if addend != *values.data_type() => &cast(values, &addend)?,
            _ => values,
        };
        let live = (values.len() - values.logical_null_count()) as i64;
        self.count += sign * live;
        match &mut self.sum {
            Sum::Float(sum) => {
                for value in values.as_primitive::<Float64Type>().iter().flatten() {
                    sum.add(value, sign);
                }
            }
            Sum::Units(sum) => {
                let mut add = |value: i128| {
                    let term = i256::from_i128(value);
                    let next = if sign > 0 {
                        sum.checked_add(term)
                    } else {
                        sum.checked_sub(term)
                    };
                    next.map(|next| *sum = next).ok_or_else(overflow)
                };
                match values.data_type() {
                    DataType::Int64 => {
                        for value in values.as_primitive::<Int64Type>().iter().flatten() {
                            add(i128::from(value))?;
                        }
                    }
                    DataType::Decimal128(_, _) => {
                        for value in values.as_primitive::<Decimal128Type>().iter().flatten() {
                            add(value)?;
                        }
                    }
                    other => return exec_err!("a column of type {other} cannot be added up"),
                }
            }
        }
        Ok(())
    }

    fn value(&self) -> Result<ScalarValue> {
        if self.count == 0 {
            return ScalarValue::try_from(&self.output);
        }
        match (&self.sum, &self.output) {
            (Sum::Float(sum), _) => {
                let value = sum.value();
                Ok(ScalarValue::Float64(Some(match self.fold {
                    Fold::Sum => value,
                    Fold::Average => value / self.count as f64,
                })))
            }
            (Sum::Units(sum), DataType::Decimal128(p, s)) => {
                let units = match self.fold {
                    Fold::Sum => *sum,
                    Fold::Average => average(*sum, self.count, s - self.scale)?,
                };
                let limit = i256::from_i128(10i128.pow(u32::from(MAX_PRECISION)));
                if units >= limit || units <= limit.wrapping_neg() {
                    return Err(overflow());
                }
                Ok(ScalarValue::Decimal128(units.to_i128(), *p, *s))
            }
            (_, other) => exec_err!("a sum cannot be of type {other}"),
        }
    }
}

/// `sum / count` with `digits` more behind the point, rounded half away from zero.
fn average(sum: i256, count: i64, digits: i8) -> Result<i256> {
    let factor = i256::from_i128(10i128.pow(u32::from(digits.max(0).unsigned_abs())));
    let scaled = sum.checked_mul(factor).ok_or_else(overflow)?;
    let count = i256::from_i128(i128::from(count));
    let quotient = scaled.wrapping_div(count);
    let rest = scaled.wrapping_rem(count).wrapping_abs();
    let half_up = rest.wrapping_add(rest) >= count;
    Ok(match (half_up, scaled.is_negative()) {
        (false, _) => quotient,
        (true, false) => quotient.wrapping_add(i256::ONE),
        (true, true) => quotient.wrapping_sub(i256::ONE),
    })
}

fn overflow() -> DataFusionError {
    DataFusionError::from(ArrowError::ArithmeticOverflow(
        "the sum is out of range".into(),
    ))
}

impl Accumulator for TotalState {
    fn update_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        self.apply(&values[0], 1)
    }
    fn retract_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        self.apply(&values[0], -1)
    }
    fn supports_retract_batch(&self) -> bool {
        true
    }
    fn evaluate(&mut self) -> Result<ScalarValue> {
        self.value()
    }
    fn size(&self) -> usize {
        // A sum of floats may hold all limbs of the range.
        size_of::<Self>()
            + if matches!(self.sum, Sum::Float(_)) {
                320
            } else {
                0
            }
    }
    fn state(&mut self) -> Result<Vec<ScalarValue>> {
        let bytes = match &self.sum {
            Sum::Units(sum) => sum.to_le_bytes().to_vec(),
            Sum::Float(sum) => sum.to_bytes(),
        };
        Ok(vec![
            ScalarValue::Binary(Some(bytes)),
            ScalarValue::Int64(Some(self.count)),
        ])
    }
    fn merge_batch(&mut self, states: &[ArrayRef]) -> Result<()> {
        let totals = states[0].as_binary::<i32>();
        let counts = states[1].as_primitive::<Int64Type>();
        for (total, count) in totals.iter().zip(counts.iter()) {
            let (Some(total), Some(count)) = (total, count) else {
                continue;
            };
            self.count += count;
            match &mut self.sum {
                Sum::Units(sum) => {
                    let bytes: [u8; 32] = total.try_into().map_err(|_| {
                        DataFusionError::Execution("a partial sum is damaged".into())
                    })?;
                    *sum = sum
                        .checked_add(i256::from_le_bytes(bytes))
                        .ok_or_else(overflow)?;
                }
                Sum::Float(sum) => {
                    sum.merge(&ExactSum::from_bytes(total).map_err(crate::error::carry)?)
                }
            }
        }
        Ok(())
    }
}

/// Adds each distinct value once, at the end.
#[derive(Debug)]
struct Distinct {
    values: HashSet<ScalarValue>,
    argument: DataType,
    state: TotalState,
}

impl Accumulator for Distinct {
    fn update_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        let values = &values[0];
        for row in 0..values.len() {
            if values.is_valid(row) {
                self.values
                    .insert(ScalarValue::try_from_array(values, row)?);
            }
        }
        Ok(())
    }
    fn evaluate(&mut self) -> Result<ScalarValue> {
        let mut total = self.state.clone();
        if !self.values.is_empty() {
            total.apply(&ScalarValue::iter_to_array(self.values.iter().cloned())?, 1)?;
        }
        total.value()
    }
    fn size(&self) -> usize {
        size_of::<Self>() + self.values.capacity() * size_of::<ScalarValue>()
    }
    fn state(&mut self) -> Result<Vec<ScalarValue>> {
        let values: Vec<ScalarValue> = self.values.iter().cloned().collect();
        Ok(vec![ScalarValue::List(ScalarValue::new_list(
            &values,
            &self.argument,
            true,
        ))])
    }
    fn merge_batch(&mut self, states: &[ArrayRef]) -> Result<()> {
        let lists = states[0].as_list::<i32>();
        for list in lists.iter().flatten() {
            self.update_batch(&[list])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{Float64Array, Int64Array};

    use super::*;

    fn total(fold: Fold, parts: &[ArrayRef]) -> ScalarValue {
        let argument = parts[0].data_type().clone();
        let output = result(fold, &argument).expect("a type");
        let mut whole = TotalState::new(fold, &argument, &output).expect("a state");
        for part in parts {
            let mut state = TotalState::new(fold, &argument, &output).expect("a state");
            state.update_batch(&[Arc::clone(part)]).expect("adds");
            let partial: Vec<ArrayRef> = state
                .state()
                .expect("a state")
                .iter()
                .map(|s| s.to_array().expect("an array"))
                .collect();
            whole.merge_batch(&partial).expect("merges");
        }
        whole.evaluate().expect("a value")
    }

    #[test]
    fn whole_numbers_pass_64_bits() {
        let max: ArrayRef = Arc::new(Int64Array::from(vec![Some(i64::MAX), None, Some(i64::MAX)]));
        assert_eq!(
            total(Fold::Sum, &[max]),
            ScalarValue::Decimal128(Some(2 * i128::from(i64::MAX)), 38, 0)
        );
    }

    #[test]
    fn averages_round_half_away_from_zero() {
        let of = |v: Vec<i64>| total(Fold::Average, &[Arc::new(Int64Array::from(v)) as ArrayRef]);
        assert_eq!(
            of(vec![1, 1, 0]),
            ScalarValue::Decimal128(Some(666_667), 38, 6)
        );
        assert_eq!(
            of(vec![-1, -1, 0]),
            ScalarValue::Decimal128(Some(-666_667), 38, 6)
        );
        assert_eq!(of(vec![]), ScalarValue::Decimal128(None, 38, 6));
    }

    #[test]
    fn float_sums_do_not_depend_on_order() {
        let values = [1e16, 1.0, -1e16, 1.0, 0.1];
        let mut back = values;
        back.reverse();
        let of = |v: &[f64]| {
            total(
                Fold::Sum,
                &[Arc::new(Float64Array::from(v.to_vec())) as ArrayRef],
            )
        };
        assert_eq!(of(&values), of(&back));
        assert_eq!(of(&values), ScalarValue::Float64(Some(2.1)));
    }

    #[test]
    fn a_total_beyond_38_digits_is_an_error() {
        let big = arrow::array::Decimal128Array::from(vec![10i128.pow(38) - 1, 1])
            .with_precision_and_scale(38, 0)
            .expect("fits");
        let mut state = TotalState::new(
            Fold::Sum,
            &DataType::Decimal128(38, 0),
            &DataType::Decimal128(38, 0),
        )
        .expect("a state");
        state
            .update_batch(&[Arc::new(big)])
            .expect("partial totals fit");
        assert!(state.evaluate().is_err());
    }
}
