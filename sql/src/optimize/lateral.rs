//! LATERAL: a derived table that refers to the tables before it becomes a join with what it compares.

use std::collections::BTreeSet;
use std::sync::Arc;

use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion::common::{Column, JoinType, Result};
use datafusion::logical_expr::utils::conjunction;
use datafusion::logical_expr::{Expr, Join, LogicalPlan, LogicalPlanBuilder, Subquery, lit};
use datafusion::optimizer::decorrelate::PullUpCorrelatedExpr;

use super::correlated::is_pulled_up;
use super::subqueries::is_null_without_match;

/// The join without the reference, with the same columns; `None` when it has none, or cannot be had.
pub(super) fn decorrelated(join: &Join) -> Result<Option<LogicalPlan>> {
    let (subquery, alias) = match join.right.as_ref() {
        LogicalPlan::Subquery(subquery) => (subquery, None),
        LogicalPlan::SubqueryAlias(alias) => match alias.input.as_ref() {
            LogicalPlan::Subquery(subquery) => (subquery, Some(alias.alias.clone())),
            _ => return Ok(None),
        },
        _ => return Ok(None),
    };
    let inner = join.join_type == JoinType::Inner;
    if !(inner || join.join_type == JoinType::Left) || !join.on.is_empty() {
        return Ok(None);
    }
    if !is_pulled_up(subquery) || !is_null_without_match(subquery) {
        return Ok(None);
    }
    let Subquery { subquery, .. } = subquery;
    let mut pull_up = PullUpCorrelatedExpr::new().with_need_handle_count_bug(true);
    let plan = subquery.as_ref().clone().rewrite(&mut pull_up).data()?;
    if !pull_up.can_pull_up {
        return Ok(None);
    }
    let compared: BTreeSet<Column> = pull_up
        .correlated_subquery_cols_map
        .values()
        .flatten()
        .cloned()
        .collect();
    let mut filters = Vec::with_capacity(pull_up.join_filters.len());
    for filter in std::mem::take(&mut pull_up.join_filters) {
        let filter = filter.transform_up(|expr| match (&expr, &alias) {
            (Expr::Column(column), Some(alias)) if compared.contains(column) => {
                let column = Column::new(Some(alias.clone()), &column.name);
                Ok(Transformed::yes(Expr::Column(column)))
            }
            _ => Ok(Transformed::no(expr)),
        })?;
        filters.push(filter.data);
    }
    let plan = match alias {
        Some(alias) => LogicalPlanBuilder::from(plan).alias(alias)?.build()?,
        None => plan,
    };
    let within: BTreeSet<_> = plan.schema().columns().into_iter().collect();
    let own = |expr: &Expr| {
        let left = join.left.schema();
        let mut columns = expr.column_refs().into_iter();
        columns.all(|column| within.contains(column) || left.has_column(column))
    };
    if !filters.iter().all(own) {
        return Ok(None);
    }
    // An aggregate of no rows is a row.
    let always = pull_up.pulled_up_scalar_agg;
    let condition = join.filter.clone();
    let trivial = condition.as_ref().is_none_or(|c| *c == lit(true));
    if always && !inner && !trivial {
        return Ok(None);
    }
    let mut terms = filters;
    let (kind, after) = match (inner, always) {
        (true, true) => (JoinType::Left, condition),
        (true, false) => {
            terms.extend(condition);
            (JoinType::Inner, None)
        }
        (false, _) => {
            terms.extend(condition);
            (JoinType::Left, None)
        }
    };
    let on = conjunction(terms).unwrap_or_else(|| lit(true));
    let mut joined = LogicalPlanBuilder::from(Arc::clone(&join.left)).join_on(plan, kind, [on])?;
    if let Some(condition) = after {
        joined = joined.filter(condition)?;
    }
    let columns = join.schema.columns().into_iter().map(Expr::Column);
    joined.project(columns)?.build().map(Some)
}
