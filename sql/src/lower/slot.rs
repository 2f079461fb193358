//! The inputs of a computation as leaves of a logical plan, and its physical plan.

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use datafusion::common::{DFSchema, DFSchemaRef, Result as DfResult, plan_err};
use datafusion::execution::SessionState;
use datafusion::logical_expr::{
    Expr, Extension, LogicalPlan, UserDefinedLogicalNode, UserDefinedLogicalNodeCore,
};
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_planner::{ExtensionPlanner, PhysicalPlanner};
use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::plan::{Computation, Iterations, OrderColumn, Slot};

use crate::error::planning;
use crate::query::session_state;

/// The rows of an input, in an order.
#[derive(Debug, Clone)]
pub(crate) struct SlotNode {
    input: usize,
    schema: DFSchemaRef,
    order: Vec<OrderColumn>,
}

impl SlotNode {
    fn key(&self) -> (usize, &DFSchemaRef, Vec<(usize, bool, bool)>) {
        let order = self.order.iter();
        let order = order.map(|o| (o.column, o.options.descending, o.options.nulls_first));
        (self.input, &self.schema, order.collect())
    }
}

impl PartialEq for SlotNode {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}
impl Eq for SlotNode {}
impl std::hash::Hash for SlotNode {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}
impl PartialOrd for SlotNode {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        self.input.partial_cmp(&other.input)
    }
}

impl UserDefinedLogicalNodeCore for SlotNode {
    fn name(&self) -> &str {
        "Slot"
    }
    fn inputs(&self) -> Vec<&LogicalPlan> {
        Vec::new()
    }
    fn schema(&self) -> &DFSchemaRef {
        &self.schema
    }
    fn expressions(&self) -> Vec<Expr> {
        Vec::new()
    }
    fn fmt_for_explain(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slot: {}", self.input)
    }
    fn with_exprs_and_inputs(&self, _: Vec<Expr>, _: Vec<LogicalPlan>) -> DfResult<Self> {
        Ok(self.clone())
    }
}

/// The leaf for the input of this number. Its columns are those of `schema`, all nullable, with
/// `more` behind them; its rows come sorted by `order`.
pub(super) fn slot(
    input: usize,
    schema: &DFSchema,
    more: &[Arc<arrow::datatypes::Field>],
    order: &[OrderColumn],
) -> Result<LogicalPlan> {
    let own = schema.iter().map(|(q, f)| (q.cloned(), Arc::clone(f)));
    let more = more.iter().map(|field| (None, Arc::clone(field)));
    let fields = own.chain(more).map(|(qualifier, field)| {
        let plain = field.as_ref().clone().with_metadata(Default::default());
        (qualifier, Arc::new(plain.with_nullable(true)))
    });
    let schema = DFSchema::new_with_metadata(fields.collect(), Default::default())
        .map_err(|e| planning(e).0)?;
    Ok(LogicalPlan::Extension(Extension {
        node: Arc::new(SlotNode {
            input,
            schema: Arc::new(schema),
            order: order.to_vec(),
        }),
    }))
}

/// The recursive term of a query, whose iterations are bounded.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd)]
struct BoundedNode {
    input: Arc<LogicalPlan>,
}

impl UserDefinedLogicalNodeCore for BoundedNode {
    fn name(&self) -> &str {
        "Bounded"
    }
    fn inputs(&self) -> Vec<&LogicalPlan> {
        vec![&self.input]
    }
    fn schema(&self) -> &DFSchemaRef {
        self.input.schema()
    }
    fn expressions(&self) -> Vec<Expr> {
        Vec::new()
    }
    fn fmt_for_explain(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bounded")
    }
    fn with_exprs_and_inputs(&self, _: Vec<Expr>, inputs: Vec<LogicalPlan>) -> DfResult<Self> {
        let input = inputs
            .into_iter()
            .next()
            .map_or(Arc::clone(&self.input), Arc::new);
        Ok(Self { input })
    }
}

/// The recursive term, made to end.
pub(super) fn bounded(input: Arc<LogicalPlan>) -> LogicalPlan {
    LogicalPlan::Extension(Extension {
        node: Arc::new(BoundedNode { input }),
    })
}

/// The computation of a plan over slots, and its columns. `order` is by slot what each partition is
/// sorted by.
pub(super) fn computation(
    plan: &LogicalPlan,
    order: Vec<Vec<OrderColumn>>,
) -> Result<Arc<Computation>> {
    let state = session_state(1);
    let planned =
        futures::executor::block_on(state.query_planner().create_physical_plan(plan, &state));
    let template = planned.map_err(|e| planning(e).0)?;
    if datafusion::physical_plan::ExecutionPlanProperties::output_partitioning(&template)
        .partition_count()
        != 1
    {
        return Err(Error::internal("a computation runs in several partitions"));
    }
    Ok(Arc::new(Computation {
        text: plan.display_indent().to_string(),
        template,
        order,
    }))
}

/// Plans [`SlotNode`]s.
#[derive(Debug)]
pub(crate) struct SlotPlanner;

#[async_trait]
impl ExtensionPlanner for SlotPlanner {
    async fn plan_extension(
        &self,
        _: &dyn PhysicalPlanner,
        node: &dyn UserDefinedLogicalNode,
        _: &[&LogicalPlan],
        physical_inputs: &[Arc<dyn ExecutionPlan>],
        _: &SessionState,
    ) -> DfResult<Option<Arc<dyn ExecutionPlan>>> {
        if node.as_any().is::<BoundedNode>() {
            let [input] = physical_inputs else {
                return plan_err!("a recursive term has one input");
            };
            return Ok(Some(Arc::new(Iterations::new(Arc::clone(input)))));
        }
        let Some(node) = node.as_any().downcast_ref::<SlotNode>() else {
            return Ok(None);
        };
        if !physical_inputs.is_empty() {
            return plan_err!("a slot has no input");
        }
        let schema = Arc::new(node.schema.as_arrow().clone());
        Ok(Some(Arc::new(Slot::new(node.input, schema, &node.order))))
    }
}
