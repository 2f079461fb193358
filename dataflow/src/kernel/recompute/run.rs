//! Runs a computation on the thread that asks.

use std::sync::{Arc, OnceLock};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion::error::Result as DfResult;
use datafusion::execution::TaskContext;
use datafusion::physical_plan::{ExecutionPlan, collect};
use tokio::runtime::Runtime;

use crate::kernel::map::build;
use crate::plan::{Computation, Iterations, Slot};

/// See the module.
#[derive(Debug)]
pub struct Runner {
    computation: Arc<Computation>,
    context: Arc<TaskContext>,
    output: SchemaRef,
    /// Made when first needed. Some plans (a union within a recursion) run parts of them as tasks.
    tasks: OnceLock<Runtime>,
}

impl Runner {
    /// `output` are the columns it gives, all nullable.
    pub fn new(computation: Arc<Computation>, output: SchemaRef) -> Self {
        Self {
            computation,
            context: Arc::default(),
            output,
            tasks: OnceLock::new(),
        }
    }

    /// The answer over these rows, given by input.
    pub fn run(&self, rows: &[RecordBatch]) -> DfResult<Vec<RecordBatch>> {
        let template = Arc::clone(&self.computation.template);
        let fill = |node: Arc<dyn ExecutionPlan>| {
            if let Some(iterations) = node.as_any().downcast_ref::<Iterations>() {
                let fresh: Arc<dyn ExecutionPlan> = Arc::new(iterations.anew());
                return Ok(Transformed::yes(fresh));
            }
            let Some(slot) = node.as_any().downcast_ref::<Slot>() else {
                // A join, for one, would remember the side that it has read before.
                return node.reset_state().map(Transformed::yes);
            };
            let rows = rows[slot.input()].clone();
            let filled: Arc<dyn ExecutionPlan> = Arc::new(slot.with_rows(vec![rows]));
            Ok(Transformed::yes(filled))
        };
        let plan = template.transform_up(fill).data()?;
        let tasks = match self.tasks.get() {
            Some(tasks) => tasks,
            None => {
                let tasks = tokio::runtime::Builder::new_current_thread().build()?;
                self.tasks.get_or_init(|| tasks)
            }
        };
        // All is in memory and on this thread: nothing outside is waited for.
        let batches = tasks.block_on(collect(plan, Arc::clone(&self.context)))?;
        let shaped = batches.into_iter().filter(|batch| batch.num_rows() > 0);
        Ok(shaped
            .map(|batch| build(&self.output, batch.columns().to_vec(), batch.num_rows()))
            .collect())
    }
}
