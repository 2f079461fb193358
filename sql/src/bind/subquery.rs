//! What the planner takes for granted and SQL does not: that a subquery as a value has one row, and
//! that INTERSECT ALL and EXCEPT ALL do not count.
//!
//! # Contract
//!
//! * A subquery as a value that may have several rows fails on the outer row that sees them (21000),
//!   and on no other.

use std::sync::Arc;

use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion::common::{Column, Result};
use datafusion::logical_expr::expr_rewriter::NamePreserver;
use datafusion::logical_expr::{Expr, LogicalPlan, LogicalPlanBuilder, Subquery, lit};

use crate::functions::{functions, single_row};
use crate::sets::counted;

/// Rewrites a plan as the planner gave it.
pub(super) fn prepare(plan: LogicalPlan) -> Result<LogicalPlan> {
    plan.transform_up_with_subqueries(|plan| {
        let names = NamePreserver::new(&plan);
        let plan = plan.map_expressions(|expr| {
            let name = names.save(&expr);
            let expr = expr.transform_up(single)?;
            Ok(match expr.transformed {
                true => expr.update_data(|expr| name.restore(expr)),
                false => expr,
            })
        })?;
        plan.transform_data(counted)
    })
    .data()
}

fn single(expr: Expr) -> Result<Transformed<Expr>> {
    let Expr::ScalarSubquery(subquery) = &expr else {
        return Ok(Transformed::no(expr));
    };
    let plan = &subquery.subquery;
    if plan.schema().fields().len() != 1 || has_one_row(subquery) {
        return Ok(Transformed::no(expr));
    }
    let column = Expr::Column(Column::from(plan.schema().qualified_field(0)));
    let rows = aggregate(subquery, "count", lit(1i64))?;
    let value = aggregate(subquery, "min", column)?;
    Ok(Transformed::yes(single_row().call(vec![rows, value])))
}

/// There cannot be more.
fn has_one_row(subquery: &Subquery) -> bool {
    let grouped = match below(&subquery.subquery) {
        LogicalPlan::Aggregate(aggregate) => Some(!aggregate.group_expr.is_empty()),
        _ => None,
    };
    match grouped {
        Some(false) => true,
        // The planner checks that the groups are those of the outer row.
        Some(true) if !subquery.outer_ref_columns.is_empty() => true,
        _ => subquery.subquery.max_rows().is_some_and(|rows| rows <= 1),
    }
}

fn below(plan: &LogicalPlan) -> &LogicalPlan {
    match plan {
        LogicalPlan::Projection(projection) => below(&projection.input),
        LogicalPlan::SubqueryAlias(alias) => below(&alias.input),
        LogicalPlan::Filter(filter) => match below(&filter.input) {
            aggregate @ LogicalPlan::Aggregate(_) => aggregate,
            _ => plan,
        },
        other => other,
    }
}

/// An aggregate of the rows of a subquery, as a value.
fn aggregate(subquery: &Subquery, name: &str, argument: Expr) -> Result<Expr> {
    let call = functions().aggregate[name].call(vec![argument]);
    let plan = LogicalPlanBuilder::from(subquery.subquery.as_ref().clone())
        .aggregate(Vec::<Expr>::new(), vec![call.alias(name)])?
        .build()?;
    Ok(Expr::ScalarSubquery(Subquery {
        outer_ref_columns: plan.all_out_ref_exprs(),
        subquery: Arc::new(plan),
        spans: subquery.spans.clone(),
    }))
}
