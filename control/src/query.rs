//! One-shot reads on DataFusion: contents of views in memory, bounded sources, execution to the end.
//!
//! # Contract
//!
//! * Everything here runs on the threads of queries and ends when its future is dropped: a client
//!   that goes away takes its query along, a limit of time ends it.
//! * Memory is bounded: that of operators by the pool all queries share, that of the answer by
//!   `max_result`.

pub mod source_table;
pub mod system;
pub mod view_table;

use std::sync::Arc;
use std::time::Duration;

use arrow::array::{RecordBatch, RecordBatchOptions};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::SchemaRef;
use datafusion::catalog::{MemTable, TableProvider};
use datafusion::execution::runtime_env::RuntimeEnv;
use datafusion::execution::{SessionState, SessionStateBuilder};
use datafusion::physical_plan::{ExecutionPlan, execute_stream};
use futures::StreamExt;
use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_dataflow::kernel::nullable;
use millrace_sql::execution_error;
use tokio::task::JoinHandle;

pub use source_table::SourceTable;
pub use view_table::ViewTable;

/// Rows of a memory table's batches: small enough to spread over threads.
const BATCH_ROWS: usize = 8192;

/// Session of one query: our functions and rules, the shared memory and scratch space.
pub fn session_state(workers: usize, env: &Arc<RuntimeEnv>) -> SessionState {
    SessionStateBuilder::new_from_existing(millrace_sql::query::session_state(workers))
        .with_runtime_env(Arc::clone(env))
        .build()
}

/// A task that ends with its owner.
#[derive(Debug)]
pub struct AbortOnDrop<T>(pub JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Runs work on a task of its own, so that the answer comes in time also from work that is slow to
/// notice that nobody wants its result.
pub async fn within<T: Send + 'static>(
    limit: Option<Duration>,
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    let mut task = AbortOnDrop(tokio::spawn(work));
    let ended = match limit {
        Some(limit) => match tokio::time::timeout(limit, &mut task.0).await {
            Ok(ended) => ended,
            Err(_) => {
                return Err(Error::invalid(format!(
                    "the query was ended: it took longer than {} ms",
                    limit.as_millis()
                ))
                .code("57014")
                .hint("ask for less, or raise --statement-timeout"));
            }
        },
        None => (&mut task.0).await,
    };
    match ended {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(Error::unavailable("the query was ended").code("57014")),
    }
}

/// Runs a plan to its end.
pub async fn collect(
    plan: Arc<dyn ExecutionPlan>,
    state: &SessionState,
    max_bytes: usize,
) -> Result<Vec<RecordBatch>> {
    let mut stream = execute_stream(plan, state.task_ctx()).map_err(execution_error)?;
    let mut batches = Vec::new();
    let mut bytes = 0_usize;
    while let Some(batch) = stream.next().await {
        let batch = batch.map_err(execution_error)?;
        bytes = bytes.saturating_add(batch.get_array_memory_size());
        if bytes > max_bytes {
            return Err(Error::invalid(format!(
                "the answer is larger than {} MiB",
                max_bytes >> 20
            ))
            .code("54000")
            .hint("add a LIMIT, aggregate, or raise --max-result"));
        }
        if batch.num_rows() > 0 {
            batches.push(batch);
        }
    }
    Ok(batches)
}

/// The answer with the columns that were promised: operators may name them otherwise, and give a
/// decimal another scale than planning said.
pub fn conform(schema: &SchemaRef, batches: Vec<RecordBatch>) -> Result<Vec<RecordBatch>> {
    let strict = CastOptions {
        safe: false,
        ..CastOptions::default()
    };
    let nullable = nullable(schema);
    let conform = |batch: RecordBatch| {
        let columns = batch
            .columns()
            .iter()
            .zip(schema.fields())
            .map(
                |(column, field)| match column.data_type() == field.data_type() {
                    true => Ok(Arc::clone(column)),
                    false => cast_with_options(column, field.data_type(), &strict),
                },
            )
            .collect::<std::result::Result<_, _>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
        RecordBatch::try_new_with_options(Arc::clone(&nullable), columns, &options)
    };
    batches
        .into_iter()
        .map(|batch| conform(batch).map_err(|e| crate::error::from_arrow(&e)))
        .collect()
}

/// Contents of a view as a table, spread over `partitions`.
pub fn memory_table(
    schema: &SchemaRef,
    batches: Vec<RecordBatch>,
    partitions: usize,
) -> Result<Arc<dyn TableProvider>> {
    let partitions = partitions.max(1);
    let mut spread: Vec<Vec<RecordBatch>> = vec![Vec::new(); partitions];
    let mut next = 0;
    for batch in batches {
        let mut offset = 0;
        while offset < batch.num_rows() {
            let rows = BATCH_ROWS.min(batch.num_rows() - offset);
            spread[next % partitions].push(with_schema(schema, &batch.slice(offset, rows))?);
            offset += rows;
            next += 1;
        }
    }
    let table = MemTable::try_new(Arc::clone(schema), spread).map_err(execution_error)?;
    Ok(Arc::new(table))
}

/// The same columns under the schema that planning knows (metadata may differ).
fn with_schema(schema: &SchemaRef, batch: &RecordBatch) -> Result<RecordBatch> {
    // A view that was replaced since the statement was planned may have got more columns, or others.
    let columns = schema.fields().len();
    let known = batch.num_columns() >= columns
        && (schema.fields().iter().zip(batch.schema_ref().fields()))
            .all(|(known, is)| known.name() == is.name() && known.data_type() == is.data_type());
    if !known {
        return Err(Error::new(
            ErrorKind::Conflict,
            "the columns of a relation have changed while the statement was run",
        )
        .hint("run the statement again"));
    }
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    let arrays = batch.columns()[..columns].to_vec();
    RecordBatch::try_new_with_options(Arc::clone(schema), arrays, &options)
        .map_err(|e| Error::internal(format!("contents do not fit their schema: {e}")))
}
