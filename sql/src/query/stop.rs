//! Ends plans that compute without a pause.
//!
//! A query that nobody wants any more is dropped where it waits for input. A join can be far from
//! there: it meets all rows of one side with all of the other before it asks for more. Joins
//! therefore pause after some batches of results, and the condition of a nested-loop join, which may
//! look at billions of pairs without a result, looks at a flag as well.

use std::any::Any;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, FieldRef, Schema};
use datafusion::common::Result;
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion::logical_expr::ColumnarValue;
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::coop::CooperativeExec;
use datafusion::physical_plan::joins::utils::JoinFilter;
use datafusion::physical_plan::joins::{NestedLoopJoinExec, NestedLoopJoinExecBuilder};
use millrace_dataflow::error::{Error, ErrorKind};

use crate::error::carry;

/// Tells the plans that were made with it to end.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

/// Ends the plans when it is dropped.
#[derive(Debug)]
pub struct StopOnDrop(Stop);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}

/// Operators that can give many rows for one.
const MULTIPLY: &[&str] = &[
    "CrossJoinExec",
    "HashJoinExec",
    "NestedLoopJoinExec",
    "SortMergeJoinExec",
    "UnnestExec",
];

impl Stop {
    /// A guard for the time in which somebody waits for the result.
    pub fn on_drop(&self) -> StopOnDrop {
        StopOnDrop(self.clone())
    }

    /// The plan with its joins watched.
    pub(crate) fn watch(&self, plan: Arc<dyn ExecutionPlan>) -> Result<Arc<dyn ExecutionPlan>> {
        plan.transform_up(|node| {
            if !MULTIPLY.contains(&node.name()) {
                return Ok(Transformed::no(node));
            }
            let node = match node.as_any().downcast_ref::<NestedLoopJoinExec>() {
                Some(join) => self.watched(join)?.unwrap_or(node),
                None => node,
            };
            Ok(Transformed::yes(Arc::new(CooperativeExec::new(node))))
        })
        .data()
    }

    fn watched(&self, join: &NestedLoopJoinExec) -> Result<Option<Arc<dyn ExecutionPlan>>> {
        let Some(filter) = join.filter() else {
            return Ok(None);
        };
        let watched = Watched {
            inner: Arc::clone(filter.expression()),
            stop: self.clone(),
        };
        let filter = JoinFilter::new(
            Arc::new(watched),
            filter.column_indices().to_vec(),
            Arc::clone(filter.schema()),
        );
        let join = NestedLoopJoinExecBuilder::new(
            Arc::clone(join.left()),
            Arc::clone(join.right()),
            *join.join_type(),
        )
        .with_projection_ref(join.projection().clone())
        .with_filter(Some(filter))
        .build()?;
        Ok(Some(Arc::new(join)))
    }
}

/// A condition that fails once nobody waits any more.
#[derive(Debug)]
struct Watched {
    inner: Arc<dyn PhysicalExpr>,
    stop: Stop,
}

impl PartialEq for Watched {
    fn eq(&self, other: &Self) -> bool {
        self.inner.eq(&other.inner)
    }
}

impl Eq for Watched {}

impl Hash for Watched {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.inner.hash(state);
    }
}

impl fmt::Display for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.inner)
    }
}

impl PhysicalExpr for Watched {
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn data_type(&self, schema: &Schema) -> Result<DataType> {
        self.inner.data_type(schema)
    }
    fn nullable(&self, schema: &Schema) -> Result<bool> {
        self.inner.nullable(schema)
    }
    fn return_field(&self, schema: &Schema) -> Result<FieldRef> {
        self.inner.return_field(schema)
    }
    fn evaluate(&self, batch: &RecordBatch) -> Result<ColumnarValue> {
        if self.stop.0.load(Ordering::Relaxed) {
            let ended = Error::new(ErrorKind::Unavailable, "the query was ended").code("57014");
            return Err(carry(ended));
        }
        self.inner.evaluate(batch)
    }
    fn children(&self) -> Vec<&Arc<dyn PhysicalExpr>> {
        vec![&self.inner]
    }
    fn with_new_children(
        self: Arc<Self>,
        mut children: Vec<Arc<dyn PhysicalExpr>>,
    ) -> Result<Arc<dyn PhysicalExpr>> {
        Ok(Arc::new(Self {
            inner: children.pop().unwrap_or_else(|| Arc::clone(&self.inner)),
            stop: self.stop.clone(),
        }))
    }
    fn fmt_sql(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt_sql(f)
    }
}
