//! `SESSION(rel, time, gap, key, …)` and `CUMULATE(rel, time, step, size)`: windows that an executor
//! computes, in views over whole partitions or row by row, in queries over everything.

use std::any::Any;
use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, TimestampMicrosecondArray, UInt32Array};
use arrow::compute::{SortOptions, concat_batches, partition, take_record_batch};
use arrow::datatypes::{SchemaRef, TimestampMicrosecondType};
use arrow::error::ArrowError;
use async_trait::async_trait;
use datafusion::common::{DFSchemaRef, DataFusionError, Result, plan_err};
use datafusion::execution::{SendableRecordBatchStream, SessionState, TaskContext};
use datafusion::logical_expr::{
    Expr, LogicalPlan, UserDefinedLogicalNode, UserDefinedLogicalNodeCore,
};
use datafusion::physical_expr::expressions::Column;
use datafusion::physical_expr::{
    Distribution, EquivalenceProperties, LexOrdering, OrderingRequirements, Partitioning,
    PhysicalSortExpr,
};
use datafusion::physical_plan::execution_plan::EmissionType;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{
    DisplayAs, DisplayFormatType, ExecutionPlan, ExecutionPlanProperties, PlanProperties,
};
use datafusion::physical_planner::{ExtensionPlanner, PhysicalPlanner};
use futures::{StreamExt, TryStreamExt};

use super::windowed;

/// How rows get their windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd)]
pub(crate) enum Assigned {
    /// Rows of one key that follow each other by less than the gap are in one window, which ends a gap
    /// after the last of them.
    Session { gap_us: i64 },
    /// Windows that begin every `size` and end at each `step` of it.
    Cumulate { step_us: i64, size_us: i64 },
}

/// The logical node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct AssignNode {
    pub(crate) input: LogicalPlan,
    /// Columns of the input.
    pub(crate) time: Expr,
    pub(crate) keys: Vec<Expr>,
    pub(crate) assigned: Assigned,
    pub(crate) schema: DFSchemaRef,
}

impl PartialOrd for AssignNode {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        self.input.partial_cmp(&other.input)
    }
}

impl AssignNode {
    pub(crate) fn try_new(
        input: LogicalPlan,
        time: Expr,
        keys: Vec<Expr>,
        assigned: Assigned,
    ) -> Result<Self> {
        let schema = windowed(&input)?;
        Ok(Self {
            input,
            time,
            keys,
            assigned,
            schema,
        })
    }

    fn index(&self, expr: &Expr) -> Result<usize> {
        match expr {
            Expr::Column(column) => self.input.schema().index_of_column(column),
            other => plan_err!("{other} is not a column"),
        }
    }
    /// Index of the time column in the input.
    pub(crate) fn time_index(&self) -> Result<usize> {
        self.index(&self.time)
    }
    /// Indexes of the keys in the input.
    pub(crate) fn key_indexes(&self) -> Result<Vec<usize>> {
        self.keys.iter().map(|key| self.index(key)).collect()
    }
}

impl UserDefinedLogicalNodeCore for AssignNode {
    fn name(&self) -> &str {
        "AssignWindow"
    }
    fn inputs(&self) -> Vec<&LogicalPlan> {
        vec![&self.input]
    }
    fn schema(&self) -> &DFSchemaRef {
        &self.schema
    }
    fn expressions(&self) -> Vec<Expr> {
        let time = std::iter::once(self.time.clone());
        time.chain(self.keys.iter().cloned()).collect()
    }
    fn fmt_for_explain(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.assigned {
            Assigned::Session { gap_us } => {
                write!(f, "Session: time={}, gap={gap_us}us", self.time)?
            }
            Assigned::Cumulate { step_us, size_us } => write!(
                f,
                "Cumulate: time={}, step={step_us}us, size={size_us}us",
                self.time
            )?,
        }
        if !self.keys.is_empty() {
            let keys: Vec<String> = self.keys.iter().map(ToString::to_string).collect();
            write!(f, ", by {}", keys.join(", "))?;
        }
        Ok(())
    }
    fn with_exprs_and_inputs(
        &self,
        mut exprs: Vec<Expr>,
        mut inputs: Vec<LogicalPlan>,
    ) -> Result<Self> {
        let time = exprs.remove(0);
        Self::try_new(inputs.swap_remove(0), time, exprs, self.assigned)
    }
    fn necessary_children_exprs(&self, output: &[usize]) -> Option<Vec<Vec<usize>>> {
        let width = self.input.schema().fields().len();
        let mut needed: Vec<usize> = output.iter().copied().filter(|i| *i < width).collect();
        needed.push(self.time_index().ok()?);
        needed.extend(self.key_indexes().ok()?);
        needed.sort_unstable();
        needed.dedup();
        Some(vec![needed])
    }
}

/// Plans [`AssignNode`]s.
#[derive(Debug)]
pub(crate) struct AssignPlanner;

#[async_trait]
impl ExtensionPlanner for AssignPlanner {
    async fn plan_extension(
        &self,
        _: &dyn PhysicalPlanner,
        node: &dyn UserDefinedLogicalNode,
        _: &[&LogicalPlan],
        physical_inputs: &[Arc<dyn ExecutionPlan>],
        _: &SessionState,
    ) -> Result<Option<Arc<dyn ExecutionPlan>>> {
        let Some(node) = node.as_any().downcast_ref::<AssignNode>() else {
            return Ok(None);
        };
        let [input] = physical_inputs else {
            return plan_err!("a window has one input");
        };
        let exec = AssignExec::new(
            Arc::clone(input),
            node.time_index()?,
            node.key_indexes()?,
            node.assigned,
            Arc::new(node.schema.as_arrow().clone()),
        );
        Ok(Some(Arc::new(exec)))
    }
}

#[derive(Debug)]
struct AssignExec {
    input: Arc<dyn ExecutionPlan>,
    time: usize,
    keys: Vec<usize>,
    assigned: Assigned,
    schema: SchemaRef,
    properties: Arc<PlanProperties>,
}

impl AssignExec {
    fn new(
        input: Arc<dyn ExecutionPlan>,
        time: usize,
        keys: Vec<usize>,
        assigned: Assigned,
        schema: SchemaRef,
    ) -> Self {
        let partitions = input.output_partitioning().partition_count();
        let properties = PlanProperties::new(
            EquivalenceProperties::new(Arc::clone(&schema)),
            Partitioning::UnknownPartitioning(partitions),
            EmissionType::Final,
            input.boundedness(),
        );
        Self {
            input,
            time,
            keys,
            assigned,
            schema,
            properties: Arc::new(properties),
        }
    }

    fn sorted(&self, columns: impl Iterator<Item = usize>) -> Option<LexOrdering> {
        let schema = self.input.schema();
        let ascending = SortOptions {
            descending: false,
            nulls_first: true,
        };
        LexOrdering::new(columns.map(|i| {
            let column = Arc::new(Column::new(schema.field(i).name(), i));
            PhysicalSortExpr::new(column, ascending)
        }))
    }
}

impl DisplayAs for AssignExec {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AssignExec: {:?}", self.assigned)
    }
}

impl ExecutionPlan for AssignExec {
    fn name(&self) -> &str {
        "AssignExec"
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }
    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.input]
    }
    fn required_input_distribution(&self) -> Vec<Distribution> {
        vec![match self.assigned {
            Assigned::Session { .. } => Distribution::SinglePartition,
            Assigned::Cumulate { .. } => Distribution::UnspecifiedDistribution,
        }]
    }
    fn required_input_ordering(&self) -> Vec<Option<OrderingRequirements>> {
        let columns = self.keys.iter().copied().chain([self.time]);
        vec![match self.assigned {
            Assigned::Session { .. } => self.sorted(columns).map(OrderingRequirements::from),
            Assigned::Cumulate { .. } => None,
        }]
    }
    fn with_new_children(
        self: Arc<Self>,
        mut children: Vec<Arc<dyn ExecutionPlan>>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        Ok(Arc::new(Self::new(
            children.swap_remove(0),
            self.time,
            self.keys.clone(),
            self.assigned,
            Arc::clone(&self.schema),
        )))
    }
    fn execute(
        &self,
        partition: usize,
        context: Arc<TaskContext>,
    ) -> Result<SendableRecordBatchStream> {
        let input = self.input.execute(partition, context)?;
        let (time, schema) = (self.time, Arc::clone(&self.schema));
        let below = self.input.schema();
        let output = match self.assigned {
            Assigned::Cumulate { step_us, size_us } => {
                let schema = Arc::clone(&schema);
                input
                    .map(move |batch| {
                        cumulate(&batch?, time, step_us, size_us, &schema)
                            .map_err(DataFusionError::from)
                    })
                    .boxed()
            }
            Assigned::Session { gap_us } => {
                let (keys, schema) = (self.keys.clone(), Arc::clone(&schema));
                let whole = async move {
                    let batches: Vec<RecordBatch> = input.try_collect().await?;
                    let all = concat_batches(&below, &batches)?;
                    Ok(sessions(&all, time, &keys, gap_us, &schema)?)
                };
                futures::stream::once(whole).boxed()
            }
        };
        Ok(Box::pin(RecordBatchStreamAdapter::new(schema, output)))
    }
}

fn out_of_range() -> ArrowError {
    ArrowError::ArithmeticOverflow("a window lies beyond the range of timestamps".into())
}

fn times(
    batch: &RecordBatch,
    time: usize,
) -> std::result::Result<&TimestampMicrosecondArray, ArrowError> {
    let column = batch.column(time);
    column
        .as_primitive_opt::<TimestampMicrosecondType>()
        .ok_or_else(|| ArrowError::SchemaError("a window needs a timestamp".into()))
}

/// The rows with the bounds of their windows behind their columns.
fn bounded(
    batch: &RecordBatch,
    rows: Vec<u32>,
    starts: Vec<i64>,
    ends: Vec<i64>,
    schema: &SchemaRef,
) -> std::result::Result<RecordBatch, ArrowError> {
    let taken = take_record_batch(batch, &UInt32Array::from(rows))?;
    let mut columns = taken.columns().to_vec();
    columns.push(Arc::new(TimestampMicrosecondArray::from(starts)) as ArrayRef);
    columns.push(Arc::new(TimestampMicrosecondArray::from(ends)) as ArrayRef);
    RecordBatch::try_new(Arc::clone(schema), columns)
}

/// Rows sorted by keys and time, each with its session; a row without a time has none.
fn sessions(
    batch: &RecordBatch,
    time: usize,
    keys: &[usize],
    gap_us: i64,
    schema: &SchemaRef,
) -> std::result::Result<RecordBatch, ArrowError> {
    let at = times(batch, time)?;
    let columns: Vec<ArrayRef> = keys.iter().map(|k| Arc::clone(batch.column(*k))).collect();
    let ranges = match columns.is_empty() || batch.num_rows() == 0 {
        true => std::iter::once(0..batch.num_rows()).collect(),
        false => partition(&columns)?.ranges(),
    };
    let (mut rows, mut starts, mut ends) = (Vec::new(), Vec::new(), Vec::new());
    for range in ranges {
        let mut begin = rows.len();
        let mut last: Option<i64> = None;
        let mut finish = |begin: usize, last: Option<i64>, until: usize| {
            if let Some(last) = last {
                let end = last.checked_add(gap_us).ok_or_else(out_of_range)?;
                ends.resize(until, end);
            }
            debug_assert!(begin <= until);
            Ok::<_, ArrowError>(())
        };
        let mut first = 0;
        for row in range {
            if at.is_null(row) {
                continue;
            }
            let now = at.value(row);
            let apart = last.is_none_or(|last| now.checked_sub(last).is_none_or(|d| d >= gap_us));
            if apart {
                finish(begin, last, rows.len())?;
                begin = rows.len();
                first = now;
            }
            rows.push(u32::try_from(row).map_err(|_| out_of_range())?);
            starts.push(first);
            last = Some(now);
        }
        finish(begin, last, rows.len())?;
    }
    bounded(batch, rows, starts, ends, schema)
}

/// Each row once per window that it is in.
fn cumulate(
    batch: &RecordBatch,
    time: usize,
    step_us: i64,
    size_us: i64,
    schema: &SchemaRef,
) -> std::result::Result<RecordBatch, ArrowError> {
    let at = times(batch, time)?;
    let (mut rows, mut starts, mut ends) = (Vec::new(), Vec::new(), Vec::new());
    for row in 0..batch.num_rows() {
        if at.is_null(row) {
            continue;
        }
        let now = at.value(row);
        let start = now
            .div_euclid(size_us)
            .checked_mul(size_us)
            .ok_or_else(out_of_range)?;
        let mut length = (now - start) / step_us * step_us + step_us;
        while length <= size_us {
            rows.push(u32::try_from(row).map_err(|_| out_of_range())?);
            starts.push(start);
            ends.push(start.checked_add(length).ok_or_else(out_of_range)?);
            length += step_us;
        }
    }
    bounded(batch, rows, starts, ends, schema)
}
