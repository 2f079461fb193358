//! The watermark of a batch: the greatest value of the watermark expression over its rows.
//!
//! Mostly the expression is the event time less a constant. That is greatest where the event time is, so
//! it is evaluated on one row: calendar arithmetic on every row costs more than a whole filter.

use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::TimestampMicrosecondType;
use datafusion::common::ScalarValue;
use datafusion::logical_expr::Operator;
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::expressions::{BinaryExpr, Column, Literal};

use crate::env;
use crate::time::{NO_WATERMARK, Watermark};

/// Computes what a batch says about event time.
pub(super) struct BatchWatermark {
    expr: Arc<dyn PhysicalExpr>,
    /// The column whose order the values of `expr` have.
    follows: Option<usize>,
    /// A row further ahead of the clock than this claims nothing.
    max_ahead_us: Option<i64>,
}

impl BatchWatermark {
    pub(super) fn new(expr: Arc<dyn PhysicalExpr>, max_ahead_us: Option<i64>) -> Self {
        Self {
            follows: followed(&expr),
            expr,
            max_ahead_us,
        }
    }

    pub(super) fn of(&self, batch: &RecordBatch) -> Watermark {
        let limit = self
            .max_ahead_us
            .map_or(i64::MAX, |ahead| env::now_us().saturating_add(ahead));
        if let Some(column) = self.follows
            && let Some(row) = greatest(batch, column)
            && let greatest = self.over(&batch.slice(row, 1), i64::MAX)
            && greatest != NO_WATERMARK
            && greatest <= limit
        {
            return greatest;
        }
        self.over(batch, limit)
    }

    /// The greatest value up to `limit`. A row whose watermark cannot be computed claims nothing.
    fn over(&self, batch: &RecordBatch, limit: i64) -> Watermark {
        let value = self.expr.evaluate(batch);
        let Ok(array) = value.and_then(|value| value.into_array(batch.num_rows())) else {
            return NO_WATERMARK;
        };
        let Some(times) = array.as_primitive_opt::<TimestampMicrosecondType>() else {
            return NO_WATERMARK;
        };
        let claims = |time: &i64| *time <= limit;
        let greatest = if times.null_count() == 0 {
            times.values().iter().copied().filter(claims).max()
        } else {
            times.iter().flatten().filter(claims).max()
        };
        greatest.unwrap_or(NO_WATERMARK)
    }
}

/// The row with the greatest time of a column, if it is one of timestamps and not all are null.
fn greatest(batch: &RecordBatch, column: usize) -> Option<usize> {
    let times = batch
        .column(column)
        .as_primitive_opt::<TimestampMicrosecondType>()?;
    let greatest = arrow::compute::max(times)?;
    let mut rows = times.values().iter().enumerate();
    rows.find_map(|(row, time)| (*time == greatest && times.is_valid(row)).then_some(row))
}

/// The column to which the expression adds a constant, perhaps none.
fn followed(expr: &Arc<dyn PhysicalExpr>) -> Option<usize> {
    if let Some(column) = expr.as_any().downcast_ref::<Column>() {
        return Some(column.index());
    }
    let sum = expr.as_any().downcast_ref::<BinaryExpr>()?;
    let constant = sum.right().as_any().downcast_ref::<Literal>()?;
    let steady = match constant.value() {
        // Months have different lengths: adding them may change the order.
        ScalarValue::IntervalMonthDayNano(Some(interval)) => interval.months == 0,
        ScalarValue::IntervalDayTime(Some(_)) | ScalarValue::DurationMicrosecond(Some(_)) => true,
        _ => false,
    };
    let adds = matches!(sum.op(), Operator::Plus | Operator::Minus);
    if steady && adds {
        followed(sum.left())
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::testing::{batch, column, time};
    use arrow::datatypes::IntervalMonthDayNano;
    use datafusion::physical_expr::expressions::lit;

    fn less(months: i32, nanoseconds: i64) -> Arc<dyn PhysicalExpr> {
        let interval = IntervalMonthDayNano::new(months, 0, nanoseconds);
        let interval = lit(ScalarValue::IntervalMonthDayNano(Some(interval)));
        Arc::new(BinaryExpr::new(column("at", 0), Operator::Minus, interval))
    }

    #[test]
    fn one_row_says_what_all_rows_say() {
        let cases = [
            vec![Some(5_000), Some(9_000), None, Some(7_000)],
            vec![Some(-3)],
            vec![None, Some(i64::MIN), Some(0)],
            vec![None, None],
            vec![Some(i64::MIN), Some(i64::MIN)],
            vec![],
        ];
        for times in cases {
            let batch = batch(vec![("at", time(times.iter().copied()))]);
            for expr in [column("at", 0), less(0, 2_000_000), less(1, 2_000_000)] {
                let watermark = BatchWatermark::new(Arc::clone(&expr), None);
                let good = times.iter().flatten().all(|time| *time > i64::MIN);
                if good {
                    assert_eq!(watermark.of(&batch), watermark.over(&batch, i64::MAX));
                }
            }
        }
        let watermark = BatchWatermark::new(less(0, 2_000_000), None);
        assert_eq!(watermark.follows, Some(0));
        let batch = batch(vec![("at", time([Some(9_000), Some(4_000)]))]);
        assert_eq!(watermark.of(&batch), 7_000);
        assert_eq!(BatchWatermark::new(less(1, 0), None).follows, None);
    }

    #[test]
    fn a_row_too_far_ahead_does_not_hide_the_others() {
        let now = env::now_us();
        let hour = 3_600_000_000;
        let batch = batch(vec![("at", time([Some(now - hour), Some(now + hour)]))]);
        let watermark = BatchWatermark::new(column("at", 0), Some(60_000_000));
        assert_eq!(watermark.of(&batch), now - hour);
    }
}
