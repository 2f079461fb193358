//! A bound on recursion, so that a query that never ends is an error and not a worker that hangs.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use datafusion::common::{DataFusionError, Result};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{DisplayAs, DisplayFormatType, ExecutionPlan, PlanProperties};
use futures::StreamExt;

use crate::error::Error;

/// Iterations and rows of one recursion at the most.
const ITERATIONS: u64 = 100_000;
const ROWS: u64 = 10_000_000;

/// On top of a recursive term: counts how often it is asked, and what it gives.
#[derive(Debug)]
pub struct Iterations {
    input: Arc<dyn ExecutionPlan>,
    iterations: Arc<AtomicU64>,
    rows: Arc<AtomicU64>,
}

impl Iterations {
    pub fn new(input: Arc<dyn ExecutionPlan>) -> Self {
        Self {
            input,
            iterations: Arc::default(),
            rows: Arc::default(),
        }
    }

    /// For another run.
    #[must_use]
    pub fn anew(&self) -> Self {
        Self::new(Arc::clone(&self.input))
    }
}

fn too_long() -> DataFusionError {
    let error = Error::invalid("the recursion of a query does not end")
        .code("54001")
        .detail(format!(
            "it may take {ITERATIONS} iterations and give {ROWS} rows"
        ))
        .hint("bound it, as in WHERE depth < 100, or use UNION instead of UNION ALL");
    DataFusionError::External(Box::new(error))
}

impl DisplayAs for Iterations {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Iterations")
    }
}

impl ExecutionPlan for Iterations {
    fn name(&self) -> &str {
        "Iterations"
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn properties(&self) -> &Arc<PlanProperties> {
        self.input.properties()
    }
    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.input]
    }
    /// The counts go on: a recursion renews its term for each iteration.
    fn with_new_children(
        self: Arc<Self>,
        children: Vec<Arc<dyn ExecutionPlan>>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let input = children
            .into_iter()
            .next()
            .unwrap_or(Arc::clone(&self.input));
        Ok(Arc::new(Self {
            input,
            iterations: Arc::clone(&self.iterations),
            rows: Arc::clone(&self.rows),
        }))
    }
    fn execute(
        &self,
        partition: usize,
        context: Arc<TaskContext>,
    ) -> Result<SendableRecordBatchStream> {
        if self.iterations.fetch_add(1, Ordering::Relaxed) >= ITERATIONS {
            return Err(too_long());
        }
        let rows = Arc::clone(&self.rows);
        let input = self.input.execute(partition, context)?;
        let schema = input.schema();
        let counted = input.map(move |batch| {
            let batch = batch?;
            let count = batch.num_rows() as u64;
            match rows.fetch_add(count, Ordering::Relaxed) + count > ROWS {
                true => Err(too_long()),
                false => Ok(batch),
            }
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(schema, counted)))
    }
}
