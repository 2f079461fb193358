//! What cannot be kept up to date, with the reason and a way out.

use datafusion::common::JoinType;
use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::logical_expr::{Expr, LogicalPlan, Volatility};
use millrace_dataflow::error::{Error, Result};

use crate::error::{carry, planning};

/// Looks at a bound plan of a view, before rules change its shape.
pub(crate) fn refuse_unmaintainable(plan: &LogicalPlan) -> Result<()> {
    plan.apply_with_subqueries(|node| {
        check(node).map_err(carry)?;
        for expr in node.expressions() {
            expr.apply(|e| {
                check_expr(e).map_err(carry)?;
                Ok(TreeNodeRecursion::Continue)
            })?;
        }
        Ok(TreeNodeRecursion::Continue)
    })
    .map(|_| ())
    .map_err(|e| planning(e).0)
}

fn check(node: &LogicalPlan) -> Result<()> {
    match node {
        LogicalPlan::Join(join) if join.join_type != JoinType::Inner => {
            Err(join_kind(join.join_type))
        }
        _ => Ok(()),
    }
}

fn check_expr(expr: &Expr) -> Result<()> {
    match expr {
        Expr::ScalarFunction(function) => match function.func.signature().volatility {
            Volatility::Immutable => Ok(()),
            Volatility::Stable => Err(changes_by_itself(function.name())),
            Volatility::Volatile => Err(Error::unsupported(format!(
                "{}() gives another value each time, so a view over it cannot be kept up to date",
                function.name()
            ))
            .hint(
                "compute it when you query the view, or derive a value from the row, as in md5(id)",
            )),
        },
        Expr::ScalarSubquery(_) => Err(Error::unsupported(
            "a subquery as a value cannot be kept up to date yet",
        )
        .hint("join with the subquery instead")),
        Expr::Exists(_) | Expr::InSubquery(_) | Expr::SetComparison(_) => Err(Error::unsupported(
            "IN and EXISTS over a subquery cannot be kept up to date yet",
        )
        .hint("join with SELECT DISTINCT of the subquery's columns instead")),
        _ => Ok(()),
    }
}

fn changes_by_itself(name: &str) -> Error {
    let shown = match name {
        "current_date" | "current_time" => name.to_string(),
        _ => format!("{name}()"),
    };
    Error::unsupported(format!(
        "{shown} changes by itself, so a view over it cannot be kept up to date yet"
    ))
    .hint(format!(
        "compare with {shown} when you query the view; to bound a view by the time of its rows, group by TUMBLE or HOP windows with EMIT ON WINDOW CLOSE"
    ))
}

/// A node that no operator keeps.
pub(super) fn cannot(node: &LogicalPlan) -> Error {
    match node {
        LogicalPlan::Join(join) => join_kind(join.join_type),
        other => Error::unsupported(format!(
            "this query cannot be kept up to date: {} is not supported in a view",
            other
                .display()
                .to_string()
                .split(':')
                .next()
                .unwrap_or("a part of it")
        )),
    }
}

pub(super) fn join_kind(kind: JoinType) -> Error {
    let what = match kind {
        JoinType::Left => "LEFT JOIN",
        JoinType::Right => "RIGHT JOIN",
        JoinType::Full => "FULL JOIN",
        JoinType::LeftSemi | JoinType::RightSemi | JoinType::LeftMark | JoinType::RightMark => {
            "a semi-join (IN, EXISTS, INTERSECT)"
        }
        JoinType::LeftAnti | JoinType::RightAnti => "an anti-join (NOT IN, NOT EXISTS, EXCEPT)",
        JoinType::Inner => "this join",
    };
    Error::unsupported(format!("{what} cannot be kept up to date yet"))
        .hint("use an inner join in the view, and join when you query it")
}

pub(super) fn set_operation() -> Error {
    Error::unsupported("INTERSECT and EXCEPT cannot be kept up to date yet")
        .hint("use UNION, or a join")
}

pub(super) fn cross_join() -> Error {
    Error::unsupported("a join without an equality between the two sides cannot be kept up to date")
        .hint("add a condition such as a.id = b.id")
}

pub(super) fn grouping_sets() -> Error {
    Error::unsupported("GROUPING SETS, ROLLUP and CUBE have count, sum, avg, min and max in a view")
        .hint("write one view per grouping for other aggregates, and combine them with UNION ALL")
}

pub(super) fn aggregate(name: &str) -> Error {
    Error::unsupported(format!(
        "aggregate function {name} cannot be kept up to date yet"
    ))
    .hint("views have count, sum, avg, min and max; use others when you query the view")
}

pub(super) fn nothing_closes() -> Error {
    Error::invalid("EMIT ON WINDOW CLOSE needs a window among the grouping columns")
        .code("42P10")
        .hint("group by window_end of TUMBLE or HOP over a column with a watermark, or use EMIT CHANGES")
}
