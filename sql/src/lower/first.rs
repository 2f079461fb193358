//! Of which partitions the first rows are enough: `row_number() … <= n`, and aggregates that are one row's.

use datafusion::common::ScalarValue;
use datafusion::logical_expr::expr::{AggregateFunction, WindowFunction};
use datafusion::logical_expr::utils::split_conjunction;
use datafusion::logical_expr::{Aggregate, BinaryExpr, Expr, Filter, LogicalPlan, Operator};

/// At which end of its order the row of an aggregate is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    First,
    Last,
}

/// The aggregates are all of one row of each group: `first_value`, or `last_value`, in one order.
pub(super) fn one_row(aggregate: &Aggregate) -> Option<Which> {
    if aggregate.group_expr.is_empty() {
        // Without rows there is a row of nulls all the same.
        return None;
    }
    let mut found = None;
    for expr in &aggregate.aggr_expr {
        let mut expr = expr;
        while let Expr::Alias(alias) = expr {
            expr = &alias.expr;
        }
        let Expr::AggregateFunction(AggregateFunction { func, params }) = expr else {
            return None;
        };
        let which = match func.name() {
            "first_value" => Which::First,
            "last_value" => Which::Last,
            _ => return None,
        };
        if params.filter.is_some() || params.null_treatment.is_some() {
            return None;
        }
        match found {
            None => found = Some((which, &params.order_by)),
            Some(have) if have == (which, &params.order_by) => {}
            Some(_) => return None,
        }
    }
    found.map(|(which, _)| which)
}

/// The greatest row number that passes a filter straight over numbered rows. What else is computed
/// over the rows must not depend on those behind: ranks in the same order do not.
pub(super) fn rows(filter: &Filter) -> Option<usize> {
    let bounds = split_conjunction(&filter.predicate);
    let bounds = bounds.into_iter().filter_map(|term| {
        let (column, most) = bound(term)?;
        let schema = filter.input.schema();
        let index = schema.maybe_index_of_column(column)?;
        is_numbered(&filter.input, index).then_some(most)
    });
    // At least one, so that the partition is there; the filter itself stays.
    bounds.min().map(|most| most.max(1))
}

/// `column <= most`, in one of its forms.
fn bound(term: &Expr) -> Option<(&datafusion::common::Column, usize)> {
    match term {
        Expr::BinaryExpr(BinaryExpr { left, op, right }) => {
            let (column, op, number) = match (number(left), number(right)) {
                (None, Some(number)) => (column(left)?, *op, number),
                (Some(number), None) => (column(right)?, op.swap()?, number),
                _ => return None,
            };
            let most = match op {
                Operator::LtEq | Operator::Eq => number,
                Operator::Lt => number.checked_sub(1)?,
                _ => return None,
            };
            Some((column, usize::try_from(most.max(0)).ok()?))
        }
        Expr::Between(between) if !between.negated => {
            let most = number(&between.high)?;
            Some((column(&between.expr)?, usize::try_from(most.max(0)).ok()?))
        }
        _ => None,
    }
}

/// A column, perhaps as another type of integer.
fn column(expr: &Expr) -> Option<&datafusion::common::Column> {
    match expr {
        Expr::Column(column) => Some(column),
        Expr::Cast(cast) if cast.data_type.is_integer() => column(&cast.expr),
        _ => None,
    }
}

fn number(expr: &Expr) -> Option<i128> {
    let Expr::Literal(value, _) = expr else {
        return None;
    };
    match value.cast_to(&arrow::datatypes::DataType::Int64).ok()? {
        ScalarValue::Int64(Some(number)) if value.data_type().is_integer() => Some(number.into()),
        _ => None,
    }
}

/// Whether the column is a `row_number()` whose window may stop behind the bound.
fn is_numbered(plan: &LogicalPlan, index: usize) -> bool {
    match plan {
        LogicalPlan::SubqueryAlias(alias) => is_numbered(&alias.input, index),
        LogicalPlan::Projection(projection) => {
            let mut expr = &projection.expr[index];
            while let Expr::Alias(alias) = expr {
                expr = &alias.expr;
            }
            column(expr)
                .and_then(|column| projection.input.schema().maybe_index_of_column(column))
                .is_some_and(|index| is_numbered(&projection.input, index))
        }
        LogicalPlan::Window(window) => {
            let functions = window.window_expr.iter().map(function);
            let Some(functions) = functions.collect::<Option<Vec<_>>>() else {
                return false;
            };
            let number = index.checked_sub(window.input.schema().fields().len());
            let Some(number) = number.and_then(|number| functions.get(number)) else {
                return false;
            };
            number.fun.name() == "row_number"
                && functions.iter().all(|function| {
                    matches!(function.fun.name(), "row_number" | "rank" | "dense_rank")
                        && function.params.partition_by == number.params.partition_by
                        && function.params.order_by == number.params.order_by
                })
        }
        _ => false,
    }
}

fn function(expr: &Expr) -> Option<&WindowFunction> {
    match expr {
        Expr::Alias(alias) => function(&alias.expr),
        Expr::WindowFunction(function) => Some(function),
        _ => None,
    }
}
