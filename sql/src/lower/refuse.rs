//! What cannot be kept up to date, with the reason and a way out.

use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::logical_expr::{Expr, LogicalPlan, Volatility};
use millrace_dataflow::error::{Error, Result};

use crate::error::{carry, planning};

/// Looks at a bound plan of a view, before rules change its shape.
pub(crate) fn refuse_unmaintainable(plan: &LogicalPlan) -> Result<()> {
    plan.apply_with_subqueries(|node| {
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

pub(super) fn grouping_sets() -> Error {
    Error::unsupported("GROUPING SETS, ROLLUP and CUBE have count, sum, avg, min and max in a view")
        .hint("write one view per grouping for other aggregates, and combine them with UNION ALL")
}

pub(super) fn too_many_sets(most: usize) -> Error {
    Error::invalid(format!("there are more than {most} grouping sets"))
        .code("54001")
        .hint("name the sets that are needed: GROUPING SETS ((a, b), (a), ())")
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
