//! Windows in one-shot queries.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, TimestampMicrosecondArray, UInt32Array};
use arrow::compute::take_record_batch;
use arrow::datatypes::{SchemaRef, TimestampMicrosecondType};
use arrow::error::ArrowError;
use async_trait::async_trait;
use datafusion::common::{DataFusionError, Result, plan_err};
use datafusion::execution::{SendableRecordBatchStream, SessionState, TaskContext};
use datafusion::logical_expr::{LogicalPlan, UserDefinedLogicalNode};
use datafusion::physical_expr::EquivalenceProperties;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{
    DisplayAs, DisplayFormatType, ExecutionPlan, ExecutionPlanProperties, PlanProperties,
};
use datafusion::physical_planner::{ExtensionPlanner, PhysicalPlanner};
use futures::StreamExt;
use millrace_dataflow::plan::TimeWindow;

use super::WindowNode;

/// Each row once per window it belongs to, with the window's bounds as last columns.
pub(crate) fn assign_windows(
    batch: &RecordBatch,
    time: usize,
    window: TimeWindow,
    schema: &SchemaRef,
) -> Result<RecordBatch, ArrowError> {
    let out_of_range =
        || ArrowError::ArithmeticOverflow("a window lies beyond the range of timestamps".into());
    let times = batch
        .column(time)
        .as_primitive_opt::<TimestampMicrosecondType>()
        .ok_or_else(|| ArrowError::SchemaError("a window needs a timestamp".into()))?;
    let mut rows = Vec::with_capacity(batch.num_rows());
    let mut starts = Vec::with_capacity(batch.num_rows());
    let mut ends = Vec::with_capacity(batch.num_rows());
    for row in 0..times.len() {
        if times.is_null(row) {
            continue;
        }
        let at = times.value(row);
        let mut start = at
            .div_euclid(window.slide_us)
            .checked_mul(window.slide_us)
            .ok_or_else(out_of_range)?;
        while at
            .checked_sub(start)
            .is_some_and(|age| age < window.size_us)
        {
            let end = start.checked_add(window.size_us).ok_or_else(out_of_range)?;
            rows.push(u32::try_from(row).map_err(|_| out_of_range())?);
            starts.push(start);
            ends.push(end);
            match start.checked_sub(window.slide_us) {
                Some(earlier) => start = earlier,
                None => break,
            }
        }
    }
    let taken = take_record_batch(batch, &UInt32Array::from(rows))?;
    let mut columns = taken.columns().to_vec();
    columns.push(Arc::new(TimestampMicrosecondArray::from(starts)) as ArrayRef);
    columns.push(Arc::new(TimestampMicrosecondArray::from(ends)) as ArrayRef);
    RecordBatch::try_new(Arc::clone(schema), columns)
}

/// Plans [`WindowNode`]s of one-shot queries.
#[derive(Debug)]
pub(crate) struct WindowPlanner;

#[async_trait]
impl ExtensionPlanner for WindowPlanner {
    async fn plan_extension(
        &self,
        _: &dyn PhysicalPlanner,
        node: &dyn UserDefinedLogicalNode,
        _: &[&LogicalPlan],
        physical_inputs: &[Arc<dyn ExecutionPlan>],
        _: &SessionState,
    ) -> Result<Option<Arc<dyn ExecutionPlan>>> {
        let Some(node) = node.as_any().downcast_ref::<WindowNode>() else {
            return Ok(None);
        };
        let [input] = physical_inputs else {
            return plan_err!("a window has one input");
        };
        let exec = WindowExec::new(
            Arc::clone(input),
            node.time_index()?,
            node.window(),
            Arc::new(node.schema.as_arrow().clone()),
        );
        Ok(Some(Arc::new(exec)))
    }
}

#[derive(Debug)]
struct WindowExec {
    input: Arc<dyn ExecutionPlan>,
    time: usize,
    window: TimeWindow,
    schema: SchemaRef,
    properties: Arc<PlanProperties>,
}

impl WindowExec {
    fn new(
        input: Arc<dyn ExecutionPlan>,
        time: usize,
        window: TimeWindow,
        schema: SchemaRef,
    ) -> Self {
        let partitions = input.output_partitioning().partition_count();
        let properties = PlanProperties::new(
            EquivalenceProperties::new(Arc::clone(&schema)),
            datafusion::physical_plan::Partitioning::UnknownPartitioning(partitions),
            input.pipeline_behavior(),
            input.boundedness(),
        );
        Self {
            input,
            time,
            window,
            schema,
            properties: Arc::new(properties),
        }
    }
}

impl DisplayAs for WindowExec {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "WindowExec: time=#{}, slide={}us, size={}us",
            self.time, self.window.slide_us, self.window.size_us
        )
    }
}

impl ExecutionPlan for WindowExec {
    fn name(&self) -> &str {
        "WindowExec"
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
    fn with_new_children(
        self: Arc<Self>,
        mut children: Vec<Arc<dyn ExecutionPlan>>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        Ok(Arc::new(Self::new(
            children.swap_remove(0),
            self.time,
            self.window,
            Arc::clone(&self.schema),
        )))
    }
    fn execute(
        &self,
        partition: usize,
        context: Arc<TaskContext>,
    ) -> Result<SendableRecordBatchStream> {
        let input = self.input.execute(partition, context)?;
        let (time, window, schema) = (self.time, self.window, Arc::clone(&self.schema));
        let output = input.map(move |batch| {
            assign_windows(&batch?, time, window, &schema).map_err(DataFusionError::from)
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(
            Arc::clone(&self.schema),
            output,
        )))
    }
}
