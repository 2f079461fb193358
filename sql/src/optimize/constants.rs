//! A bound on constants that stand beside rows.
//!
//! A constant is repeated for every row of a batch before anything looks at it: a text of a megabyte
//! that costs nothing in a query without relations would take gigabytes beside a relation.

use arrow::array::Array;
use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::common::{Result, ScalarValue};
use datafusion::logical_expr::{Expr, LogicalPlan};
use millrace_dataflow::error::Error;

use crate::error::carry;

/// Longest constant in an expression over rows. The largest batches have 65,536 rows, and a column
/// of a batch less than two gigabytes.
const MAX_BYTES: usize = 16 << 10;

/// Refuses long constants in the expressions of an optimized plan.
pub(crate) fn bound_constants(plan: &LogicalPlan) -> Result<()> {
    plan.apply_with_subqueries(|node| {
        if node.inputs().iter().all(|input| is_one_row(input)) {
            return Ok(TreeNodeRecursion::Continue);
        }
        node.apply_expressions(|expr| {
            expr.apply(|e| match e {
                Expr::Literal(value, _) if bytes(value) > MAX_BYTES => Err(carry(
                    Error::invalid(format!(
                        "a constant of {} bytes is too long to stand beside rows",
                        bytes(value)
                    ))
                    .code("54000")
                    .detail(format!("it may have {} KiB there", MAX_BYTES >> 10)),
                )),
                _ => Ok(TreeNodeRecursion::Continue),
            })
        })
    })
    .map(|_| ())
}

fn is_one_row(plan: &LogicalPlan) -> bool {
    matches!(plan, LogicalPlan::EmptyRelation(_))
}

fn bytes(value: &ScalarValue) -> usize {
    match value {
        ScalarValue::Utf8(v) | ScalarValue::LargeUtf8(v) | ScalarValue::Utf8View(v) => {
            v.as_ref().map_or(0, String::len)
        }
        ScalarValue::Binary(v) | ScalarValue::LargeBinary(v) | ScalarValue::BinaryView(v) => {
            v.as_ref().map_or(0, Vec::len)
        }
        ScalarValue::List(list) => list.get_array_memory_size(),
        _ => 0,
    }
}
