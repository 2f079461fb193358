//! Constant keys of a group are left out, but for the last key: a group without rows is none, an
//! aggregate without keys is a row.

use datafusion::common::Result;
use datafusion::common::tree_node::Transformed;
use datafusion::logical_expr::LogicalPlan;
use datafusion::optimizer::eliminate_group_by_constant::EliminateGroupByConstant;
use datafusion::optimizer::{ApplyOrder, OptimizerConfig, OptimizerRule};

#[derive(Debug)]
pub(super) struct ConstantKeys;

impl OptimizerRule for ConstantKeys {
    fn name(&self) -> &str {
        "constant_keys"
    }
    fn apply_order(&self) -> Option<ApplyOrder> {
        EliminateGroupByConstant::new().apply_order()
    }
    fn supports_rewrite(&self) -> bool {
        true
    }
    fn rewrite(
        &self,
        plan: LogicalPlan,
        config: &dyn OptimizerConfig,
    ) -> Result<Transformed<LogicalPlan>> {
        let LogicalPlan::Aggregate(aggregate) = &plan else {
            return Ok(Transformed::no(plan));
        };
        if aggregate.group_expr.is_empty() {
            return Ok(Transformed::no(plan));
        }
        let fewer = EliminateGroupByConstant::new().rewrite(plan.clone(), config)?;
        let none_left = match &fewer.data {
            LogicalPlan::Projection(projection) => matches!(projection.input.as_ref(),
                LogicalPlan::Aggregate(aggregate) if aggregate.group_expr.is_empty()),
            LogicalPlan::Aggregate(aggregate) => aggregate.group_expr.is_empty(),
            _ => false,
        };
        Ok(match none_left {
            true => Transformed::no(plan),
            false => fewer,
        })
    }
}
