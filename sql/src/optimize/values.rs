//! Subqueries as values, one at a time: each as a column of a projection of its own below the node that
//! uses it. DataFusion tells the columns of several in one node apart by name only.

use std::sync::Arc;

use datafusion::common::alias::AliasGenerator;
use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::common::{Column, Result};
use datafusion::logical_expr::expr_rewriter::NamePreserver;
use datafusion::logical_expr::{Expr, LogicalPlan, Projection, Subquery};

/// The node over columns that are subqueries.
pub(super) fn stacked(
    plan: LogicalPlan,
    names: &Arc<AliasGenerator>,
) -> Result<Transformed<LogicalPlan>> {
    let whole = match &plan {
        LogicalPlan::Filter(_) => false,
        LogicalPlan::Projection(projection) if is_stacked(projection) => {
            return Ok(Transformed::no(plan));
        }
        LogicalPlan::Projection(_) | LogicalPlan::Aggregate(_) => true,
        _ => return Ok(Transformed::no(plan)),
    };
    let mut found: Vec<Subquery> = Vec::new();
    plan.apply_expressions(|expr| {
        expr.apply(|expr| {
            if let Expr::ScalarSubquery(subquery) = expr
                && !found.contains(subquery)
            {
                found.push(subquery.clone());
            }
            Ok(TreeNodeRecursion::Continue)
        })
    })?;
    if found.is_empty() {
        return Ok(Transformed::no(plan));
    }
    let inputs = plan.inputs();
    let Some(input) = inputs.first() else {
        return Ok(Transformed::no(plan));
    };
    let columns: Vec<Expr> = input
        .schema()
        .columns()
        .into_iter()
        .map(Expr::Column)
        .collect();
    let mut below = (*input).clone();
    let mut named = Vec::with_capacity(found.len());
    for subquery in found {
        let name = names.next("__value");
        let mut exprs: Vec<Expr> = below
            .schema()
            .columns()
            .into_iter()
            .map(Expr::Column)
            .collect();
        exprs.push(Expr::ScalarSubquery(subquery.clone()).alias(&name));
        below = LogicalPlan::Projection(Projection::try_new(exprs, Arc::new(below))?);
        named.push((subquery, Expr::Column(Column::new_unqualified(name))));
    }
    let kept = NamePreserver::new(&plan);
    let exprs = plan.expressions().into_iter().map(|expr| {
        let name = kept.save(&expr);
        let expr = expr.transform_down(|expr| match &expr {
            Expr::ScalarSubquery(subquery) => {
                let column = named.iter().find(|(s, _)| s == subquery);
                Ok(match column {
                    Some((_, column)) => Transformed::yes(column.clone()),
                    None => Transformed::no(expr),
                })
            }
            _ => Ok(Transformed::no(expr)),
        })?;
        Ok(name.restore(expr.data))
    });
    let exprs = exprs.collect::<Result<Vec<_>>>()?;
    let plan = plan.with_new_exprs(exprs, vec![below])?;
    Ok(Transformed::yes(match whole {
        true => plan,
        false => LogicalPlan::Projection(Projection::try_new(columns, Arc::new(plan))?),
    }))
}

/// Columns, and one subquery.
fn is_stacked(projection: &Projection) -> bool {
    let mut values = projection
        .expr
        .iter()
        .filter(|e| !matches!(e, Expr::Column(_)));
    let first = values.next().map(|e| e.clone().unalias());
    matches!(first, Some(Expr::ScalarSubquery(_))) && values.next().is_none()
}
