//! A piece of a query that is run by DataFusion over whole partitions.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::compute::SortOptions;
use arrow::datatypes::SchemaRef;
use datafusion::common::Result as DfResult;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::expressions::Column;
use datafusion::physical_expr::{EquivalenceProperties, Partitioning, PhysicalSortExpr};
use datafusion::physical_plan::execution_plan::{Boundedness, EmissionType};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{DisplayAs, DisplayFormatType, ExecutionPlan, PlanProperties};

/// One column of an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OrderColumn {
    pub column: usize,
    pub options: SortOptions,
}

/// A physical plan whose leaves are [`Slot`]s, to be run over rows that are put into them.
///
/// Its answer depends on the rows and their order alone, one partition at a time: over several whole
/// partitions it is the answers of each, put together.
#[derive(Clone)]
pub struct Computation {
    /// What it computes. Two computations of equal text, inputs and output are the same.
    pub text: String,
    pub template: Arc<dyn ExecutionPlan>,
    /// By input: the order in which it wants its rows, behind the columns of the partition. Rows that
    /// are equal in it come in an order of their own that is always the same.
    pub order: Vec<Vec<OrderColumn>>,
}

impl fmt::Debug for Computation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} order {:?}", self.text, self.order)
    }
}

/// A leaf of a [`Computation`]: the rows of its input of this number.
#[derive(Debug)]
pub struct Slot {
    input: usize,
    schema: SchemaRef,
    rows: Vec<RecordBatch>,
    properties: Arc<PlanProperties>,
}

impl Slot {
    /// `order` is what its rows will be sorted by. All columns of `schema` are nullable.
    pub fn new(input: usize, schema: SchemaRef, order: &[OrderColumn]) -> Self {
        let sorted = order.iter().map(|o| PhysicalSortExpr {
            expr: Arc::new(Column::new(schema.field(o.column).name(), o.column)),
            options: o.options,
        });
        let sorted: Vec<_> = sorted.collect();
        let equivalence = match sorted.is_empty() {
            true => EquivalenceProperties::new(Arc::clone(&schema)),
            false => EquivalenceProperties::new_with_orderings(Arc::clone(&schema), [sorted]),
        };
        let properties = PlanProperties::new(
            equivalence,
            Partitioning::UnknownPartitioning(1),
            EmissionType::Incremental,
            Boundedness::Bounded,
        );
        Self {
            input,
            schema,
            rows: Vec::new(),
            properties: Arc::new(properties),
        }
    }

    /// Number of the input.
    pub fn input(&self) -> usize {
        self.input
    }

    /// The same leaf with these rows.
    #[must_use]
    pub fn with_rows(&self, rows: Vec<RecordBatch>) -> Self {
        Self {
            input: self.input,
            schema: Arc::clone(&self.schema),
            rows,
            properties: Arc::clone(&self.properties),
        }
    }
}

impl DisplayAs for Slot {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slot: {}", self.input)
    }
}

impl ExecutionPlan for Slot {
    fn name(&self) -> &str {
        "Slot"
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }
    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        Vec::new()
    }
    fn with_new_children(
        self: Arc<Self>,
        _: Vec<Arc<dyn ExecutionPlan>>,
    ) -> DfResult<Arc<dyn ExecutionPlan>> {
        Ok(self)
    }
    fn execute(&self, _: usize, _: Arc<TaskContext>) -> DfResult<SendableRecordBatchStream> {
        let rows = futures::stream::iter(self.rows.clone().into_iter().map(Ok));
        let schema = Arc::clone(&self.schema);
        Ok(Box::pin(RecordBatchStreamAdapter::new(schema, rows)))
    }
}
