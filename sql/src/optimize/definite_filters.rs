//! `FILTER (WHERE c)` of an aggregate counts the rows for which `c` is true. DataFusion's grouped count
//! takes those for which it is null too (it reads the value beneath the null), so it is told so.

use datafusion::common::Result as DfResult;
use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::logical_expr::expr::AggregateFunction;
use datafusion::logical_expr::expr_rewriter::NamePreserver;
use datafusion::logical_expr::{Expr, ExprSchemable, LogicalPlan};
use datafusion::optimizer::optimizer::ApplyOrder;
use datafusion::optimizer::{OptimizerConfig, OptimizerRule};

#[derive(Debug)]
pub(super) struct DefiniteFilters;

impl OptimizerRule for DefiniteFilters {
    fn name(&self) -> &'static str {
        "definite_filters"
    }
    fn apply_order(&self) -> Option<ApplyOrder> {
        Some(ApplyOrder::BottomUp)
    }
    fn rewrite(
        &self,
        plan: LogicalPlan,
        _config: &dyn OptimizerConfig,
    ) -> DfResult<Transformed<LogicalPlan>> {
        let LogicalPlan::Aggregate(aggregate) = &plan else {
            return Ok(Transformed::no(plan));
        };
        let schema = aggregate.input.schema().clone();
        let names = NamePreserver::new(&plan);
        plan.map_expressions(|expr| {
            let name = names.save(&expr);
            let changed = expr.transform_up(|expr| definite(expr, &schema))?;
            Ok(if changed.transformed {
                changed.update_data(|expr| name.restore(expr))
            } else {
                changed
            })
        })
    }
}

fn definite(expr: Expr, schema: &datafusion::common::DFSchema) -> DfResult<Transformed<Expr>> {
    let Expr::AggregateFunction(AggregateFunction { func, mut params }) = expr else {
        return Ok(Transformed::no(expr));
    };
    let mut changed = false;
    if let Some(filter) = params.filter.take() {
        changed = filter.nullable(schema)?;
        let filter = match changed {
            true => Box::new(Expr::IsTrue(filter)),
            false => filter,
        };
        params.filter = Some(filter);
    }
    let expr = Expr::AggregateFunction(AggregateFunction { func, params });
    Ok(match changed {
        true => Transformed::yes(expr),
        false => Transformed::no(expr),
    })
}
