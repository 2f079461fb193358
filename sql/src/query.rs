//! One-shot reads on DataFusion: the session with our functions, rules and window node.
//!
//! This path over the accumulated input is also the oracle for views. It shares binding and the
//! rewrite of expressions with them, and none of their operators.

mod stop;

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use datafusion::common::Result as DfResult;
use datafusion::execution::context::QueryPlanner;
use datafusion::execution::{SessionState, SessionStateBuilder};
use datafusion::logical_expr::LogicalPlan;
use datafusion::physical_optimizer::optimizer::PhysicalOptimizer;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_planner::{DefaultPhysicalPlanner, PhysicalPlanner};
use datafusion::prelude::SessionConfig;
use millrace_dataflow::error::Result;

use crate::bind::shown_schema;
use crate::checked::short_circuit;
use crate::error::{carry, execution_error};
use crate::functions::functions;
use crate::lower::SlotPlanner;
use crate::optimize::{bound_constants, check_joined, query_rules};
use crate::stack::on_big_stack;
use crate::windows::{AssignPlanner, WindowPlanner};

pub use stop::{Stop, StopOnDrop};

/// A guarded query over relations that can be read.
pub struct Executable {
    plan: LogicalPlan,
}

impl fmt::Debug for Executable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.plan.display_indent())
    }
}

impl Executable {
    pub(crate) fn new(plan: LogicalPlan) -> Self {
        Self { plan }
    }

    /// Columns of the answer; a name may stand there twice.
    pub fn schema(&self) -> SchemaRef {
        shown_schema(self.plan.schema().as_arrow())
    }

    /// The physical plan, ready to be executed with `state.task_ctx()`; `stop` ends it.
    pub async fn physical_until(
        self,
        state: &SessionState,
        stop: &Stop,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let plan = self.physical(state).await?;
        stop.watch(plan).map_err(execution_error)
    }

    /// As [`Executable::physical_until`], for a plan that runs to its end.
    pub async fn physical(self, state: &SessionState) -> Result<Arc<dyn ExecutionPlan>> {
        let plan = self.plan;
        let optimized = on_big_stack(move || {
            let plan = state.optimize(&plan)?;
            check_joined(&plan).map_err(carry)?;
            bound_constants(&plan)?;
            short_circuit(plan)
        })
        .map_err(execution_error)?;
        state
            .query_planner()
            .create_physical_plan(&optimized, state)
            .await
            .map_err(execution_error)
    }
}

/// Physical rules that move predicates without regard to what they might evaluate.
const MOVES_PREDICATES: &[&str] = &["FilterPushdown", "FilterPushdown(Post)"];

/// A session for one statement, whose `now()` is the time of this call. `target_partitions` bounds
/// the threads it keeps busy.
pub fn session_state(target_partitions: usize) -> SessionState {
    let mut config = SessionConfig::new()
        .with_target_partitions(target_partitions.max(1))
        .with_information_schema(false)
        .with_create_default_catalog_and_schema(false);
    let options = config.options_mut();
    options.execution.time_zone = Some("UTC".into());
    options.sql_parser.map_string_types_to_utf8view = false;
    options.optimizer.skip_failed_rules = false;
    options.optimizer.enable_dynamic_filter_pushdown = false;
    let physical = PhysicalOptimizer::new()
        .rules
        .into_iter()
        .filter(|rule| !MOVES_PREDICATES.contains(&rule.name()))
        .collect();
    // The registry holds a function once per name; a session wants each once.
    let mut seen = HashSet::new();
    let scalar = functions()
        .scalar
        .values()
        .filter(|f| seen.insert(f.name().to_string()))
        .cloned()
        .collect();
    seen.clear();
    let aggregate = functions()
        .aggregate
        .values()
        .filter(|f| seen.insert(f.name().to_string()))
        .cloned()
        .collect();
    seen.clear();
    let window = functions()
        .window
        .values()
        .filter(|f| seen.insert(f.name().to_string()))
        .cloned()
        .collect();
    let mut state = SessionStateBuilder::new()
        .with_config(config)
        .with_analyzer_rules(Vec::new())
        .with_optimizer_rules(query_rules())
        .with_physical_optimizer_rules(physical)
        .with_scalar_functions(scalar)
        .with_aggregate_functions(aggregate)
        .with_window_functions(window)
        .with_query_planner(Arc::new(Planner))
        .build();
    state.mark_start_execution();
    state
}

#[derive(Debug)]
struct Planner;

#[async_trait]
impl QueryPlanner for Planner {
    async fn create_physical_plan(
        &self,
        plan: &LogicalPlan,
        state: &SessionState,
    ) -> DfResult<Arc<dyn ExecutionPlan>> {
        DefaultPhysicalPlanner::with_extension_planners(vec![
            Arc::new(WindowPlanner),
            Arc::new(AssignPlanner),
            Arc::new(SlotPlanner),
        ])
        .create_physical_plan(plan, state)
        .await
    }
}

#[cfg(test)]
mod tests;
