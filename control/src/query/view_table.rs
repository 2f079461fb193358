//! Contents of a view, frozen at a tick, as a table: decoded as the query goes, only what it asks for.
//!
//! # Contract
//!
//! * Small contents are handed over decoded, with exact statistics. Large ones stream, so that memory
//!   does not depend on their size; pieces are spread over partitions.

use std::any::Any;
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use datafusion::catalog::streaming::StreamingTable;
use datafusion::catalog::{Session, TableProvider};
use datafusion::error::{DataFusionError, Result as QueryResult};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::logical_expr::{Expr, TableType};
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::stream::RecordBatchReceiverStream;
use datafusion::physical_plan::streaming::PartitionStream;
use millrace_dataflow::kernel::contents::FrozenContents;

use super::{memory_table, with_schema};

/// Contents with fewer rows are decoded before the query starts.
const SMALL: u64 = 262_144;
/// Batches decoded ahead of the query, per partition.
const AHEAD: usize = 2;

/// See the module.
#[derive(Debug)]
pub struct ViewTable {
    schema: SchemaRef,
    /// One piece per worker.
    pieces: Vec<FrozenContents>,
    partitions: usize,
}

impl ViewTable {
    pub fn new(schema: &SchemaRef, pieces: Vec<FrozenContents>, partitions: usize) -> Self {
        Self {
            schema: Arc::clone(schema),
            pieces,
            partitions: partitions.max(1),
        }
    }
}

fn external(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> DataFusionError {
    DataFusionError::External(error.into())
}

#[async_trait]
impl TableProvider for ViewTable {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> QueryResult<Arc<dyn ExecutionPlan>> {
        let wanted: Vec<usize> = match projection {
            Some(columns) => columns.clone(),
            None => (0..self.schema.fields().len()).collect(),
        };
        let schema = Arc::new(self.schema.project(&wanted)?);
        let rows: u64 = self.pieces.iter().map(FrozenContents::rows).sum();
        if rows < SMALL {
            let pieces = self.pieces.clone();
            let decode = move || {
                let mut batches = Vec::new();
                for piece in &pieces {
                    batches.extend(piece.batches(Some(&wanted))?);
                }
                Ok::<_, millrace_dataflow::error::Error>(batches)
            };
            let batches = tokio::task::spawn_blocking(decode).await;
            let batches = batches.map_err(external)?.map_err(external)?;
            let table = memory_table(&schema, batches, self.partitions).map_err(external)?;
            return table.scan(state, None, filters, limit).await;
        }
        let mut work: Vec<Vec<(FrozenContents, usize)>> = vec![Vec::new(); self.partitions];
        let pieces = self.pieces.iter();
        let chunks = pieces.flat_map(|piece| (0..piece.chunks()).map(move |chunk| (piece, chunk)));
        for (number, (piece, chunk)) in chunks.enumerate() {
            work[number % self.partitions].push((piece.clone(), chunk));
        }
        let partitions = work.into_iter().map(|chunks| {
            let schema = Arc::clone(&schema);
            let wanted = wanted.clone();
            Arc::new(Partition {
                schema,
                wanted,
                chunks: chunks.into(),
            }) as Arc<dyn PartitionStream>
        });
        let table = StreamingTable::try_new(Arc::clone(&schema), partitions.collect())?;
        table.scan(state, None, filters, limit).await
    }
}

/// Some of the chunks.
#[derive(Debug)]
struct Partition {
    schema: SchemaRef,
    wanted: Vec<usize>,
    chunks: Arc<[(FrozenContents, usize)]>,
}

impl PartitionStream for Partition {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, _context: Arc<TaskContext>) -> SendableRecordBatchStream {
        let mut stream = RecordBatchReceiverStream::builder(Arc::clone(&self.schema), AHEAD);
        let out = stream.tx();
        let (schema, wanted) = (Arc::clone(&self.schema), self.wanted.clone());
        let chunks = Arc::clone(&self.chunks);
        stream.spawn_blocking(move || {
            for (contents, chunk) in chunks.iter() {
                for batch in contents.chunk(*chunk, Some(&wanted)).map_err(external)? {
                    let batch = with_schema(&schema, &batch).map_err(external)?;
                    if out.blocking_send(Ok(batch)).is_err() {
                        // Nobody wants the rest.
                        return Ok(());
                    }
                }
            }
            Ok(())
        });
        stream.build()
    }
}
