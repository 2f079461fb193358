//! A bounded source as a table: its readers are drained by the query itself.
//!
//! An append-only source streams, one partition per reader. A changelog has to be read whole first,
//! because a later record may take back an earlier one. A record of which a computed column fails is
//! left out and counted, as the engine does.

use std::any::Any;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arrow::array::{RecordBatch, UInt64Array};
use arrow::compute::{concat_batches, take_record_batch};
use arrow::datatypes::{Schema, SchemaRef};
use arrow::row::{OwnedRow, RowConverter, SortField};
use async_trait::async_trait;
use datafusion::catalog::streaming::StreamingTable;
use datafusion::catalog::{MemTable, Session, TableProvider};
use datafusion::error::{DataFusionError, Result as QueryResult};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::logical_expr::{Expr, TableType};
use datafusion::physical_expr::utils::{collect_columns, reassign_expr_columns};
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::stream::RecordBatchReceiverStream;
use datafusion::physical_plan::streaming::PartitionStream;
use millrace_dataflow::delta::{Delta, Diffs};
use millrace_dataflow::error::Error;
use millrace_dataflow::kernel::map::MapKernel;
use millrace_dataflow::plan::{MapStep, SourcePlan};
use millrace_dataflow::source::{Chunk, Offsets, Polled, Reader, Source};

/// Longest wait of one poll; a dropped query is noticed after it at the latest.
const WAIT: Duration = Duration::from_millis(100);
/// Batches read ahead of the query, per reader.
const AHEAD: usize = 2;

/// See the module.
#[derive(Debug)]
pub struct SourceTable {
    plan: SourcePlan,
    source: Arc<dyn Source>,
    rejected: Arc<AtomicU64>,
}

impl SourceTable {
    pub fn new(plan: SourcePlan, source: Arc<dyn Source>) -> Self {
        Self {
            plan,
            source,
            rejected: Arc::default(),
        }
    }

    /// Records that were left out, once the query has ended.
    pub fn rejected(&self) -> u64 {
        self.rejected.load(Ordering::Relaxed)
    }
}

/// What one scan computes from each chunk.
#[derive(Debug)]
struct Scan {
    /// Physical columns to read.
    wanted: Vec<usize>,
    /// The columns asked for, then those that only decide whether a record is accepted.
    kernel: MapKernel,
    /// The columns asked for.
    schema: SchemaRef,
}

impl Scan {
    fn new(
        plan: &SourcePlan,
        physical: &SchemaRef,
        projection: Option<&Vec<usize>>,
    ) -> QueryResult<Self> {
        let mut chosen: Vec<usize> = match projection {
            Some(chosen) => chosen.clone(),
            None => (0..plan.columns.len()).collect(),
        };
        let schema = Arc::new(plan.schema.project(&chosen)?);
        for column in &plan.deciding {
            if !chosen.contains(column) {
                chosen.push(*column);
            }
        }
        let exprs: Vec<_> = chosen
            .iter()
            .map(|i| Arc::clone(&plan.columns[*i]))
            .collect();
        let mut wanted: Vec<usize> = exprs
            .iter()
            .flat_map(collect_columns)
            .map(|column| column.index())
            .collect();
        wanted.sort_unstable();
        wanted.dedup();
        // Rows must be counted even when no column is asked for.
        if wanted.is_empty() && !physical.fields().is_empty() {
            wanted.push(0);
        }
        let narrowed = Schema::new(
            wanted
                .iter()
                .map(|i| physical.field(*i).clone())
                .collect::<Vec<_>>(),
        );
        let exprs = exprs
            .into_iter()
            .map(|expr| reassign_expr_columns(expr, &narrowed))
            .collect::<QueryResult<_>>()?;
        let computed = Arc::new(plan.schema.project(&chosen)?);
        Ok(Self {
            wanted,
            kernel: MapKernel::new(&narrowed, &[MapStep::Project(exprs, computed)]),
            schema,
        })
    }

    /// The rows of a chunk with their diffs; what is left out is counted.
    fn apply(&self, chunk: Chunk, rejected: &AtomicU64) -> QueryResult<Option<Delta>> {
        let mut left_out = chunk.rejected.len() as u64;
        let mut rows = None;
        if chunk.batch.num_rows() > 0 {
            let diffs = chunk.diffs.map_or(Diffs::Ones, Diffs::from_vec);
            let made = self.kernel.apply(Delta::new(chunk.batch, diffs));
            left_out += made.errors.map_or(0, |e| e.len() as u64);
            rows = made.delta;
        }
        rejected.fetch_add(left_out, Ordering::Relaxed);
        let Some(Delta { batch, diffs }) = rows else {
            return Ok(None);
        };
        let asked: Vec<usize> = (0..self.schema.fields().len()).collect();
        let batch = batch
            .project(&asked)?
            .with_schema(Arc::clone(&self.schema))?;
        Ok(Some(Delta { batch, diffs }))
    }
}

fn external(error: Error) -> DataFusionError {
    DataFusionError::External(Box::new(error))
}

#[async_trait]
impl TableProvider for SourceTable {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.plan.schema)
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
        let physical = self.source.schema();
        let append_only = self.source.append_only();
        // A changelog is consolidated over whole rows, so all columns are read.
        let scan = Arc::new(Scan::new(
            &self.plan,
            &physical,
            projection.filter(|_| append_only),
        )?);
        let source = Arc::clone(&self.source);
        let wanted = scan.wanted.clone();
        let readers =
            tokio::task::spawn_blocking(move || source.open(&Offsets::default(), &wanted))
                .await
                .map_err(|e| DataFusionError::External(Box::new(e)))?
                .map_err(external)?;
        if append_only {
            let partitions = readers
                .into_iter()
                .enumerate()
                .map(|(number, reader)| -> Arc<dyn PartitionStream> {
                    Arc::new(Partition {
                        scan: Arc::clone(&scan),
                        source: Arc::clone(&self.source),
                        number,
                        reader: Mutex::new(Some(reader)),
                        rejected: Arc::clone(&self.rejected),
                    })
                })
                .collect();
            let table = StreamingTable::try_new(Arc::clone(&scan.schema), partitions)?;
            return table.scan(state, None, filters, limit).await;
        }
        let rejected = Arc::clone(&self.rejected);
        let schema = Arc::clone(&scan.schema);
        let batch = tokio::task::spawn_blocking(move || consolidated(readers, &scan, &rejected))
            .await
            .map_err(|e| DataFusionError::External(Box::new(e)))??;
        let table = MemTable::try_new(schema, vec![vec![batch]])?;
        table.scan(state, projection, filters, limit).await
    }
}

/// One reader. A recursive query executes it again for each iteration, and opens it anew.
struct Partition {
    scan: Arc<Scan>,
    source: Arc<dyn Source>,
    /// Among the readers of the source.
    number: usize,
    reader: Mutex<Option<Box<dyn Reader>>>,
    rejected: Arc<AtomicU64>,
}

impl std::fmt::Debug for Partition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Partition")
            .field("scan", &self.scan)
            .finish_non_exhaustive()
    }
}

impl PartitionStream for Partition {
    fn schema(&self) -> &SchemaRef {
        &self.scan.schema
    }

    fn execute(&self, _context: Arc<TaskContext>) -> SendableRecordBatchStream {
        let mut stream = RecordBatchReceiverStream::builder(Arc::clone(&self.scan.schema), AHEAD);
        let out = stream.tx();
        let reader = self.reader.lock().ok().and_then(|mut reader| reader.take());
        let scan = Arc::clone(&self.scan);
        // What is left out is counted once.
        let rejected = match &reader {
            Some(_) => Arc::clone(&self.rejected),
            None => Arc::<AtomicU64>::default(),
        };
        let (source, number) = (Arc::clone(&self.source), self.number);
        stream.spawn_blocking(move || {
            let mut reader = match reader {
                Some(reader) => reader,
                None => {
                    let readers = source.open(&Offsets::default(), &scan.wanted);
                    let again = readers.map_err(external)?.into_iter().nth(number);
                    again.ok_or_else(|| {
                        external(Error::unavailable("a source has changed while it was read"))
                    })?
                }
            };
            loop {
                match reader.poll(None, WAIT).map_err(external)? {
                    Polled::Chunk(chunk) => {
                        let Some(rows) = scan.apply(chunk, &rejected)? else {
                            if out.is_closed() {
                                return Ok(());
                            }
                            continue;
                        };
                        // The query has ended (LIMIT, or its client went away).
                        if out.blocking_send(Ok(rows.batch)).is_err() {
                            return Ok(());
                        }
                    }
                    Polled::Idle if out.is_closed() => return Ok(()),
                    Polled::Idle => {}
                    Polled::AtLimit | Polled::End => return Ok(()),
                }
            }
        });
        stream.build()
    }
}

/// All rows of a changelog with their final multiplicities.
fn consolidated(
    readers: Vec<Box<dyn Reader>>,
    scan: &Scan,
    rejected: &AtomicU64,
) -> QueryResult<RecordBatch> {
    let mut batches = Vec::new();
    let mut diffs = Vec::new();
    for mut reader in readers {
        loop {
            match reader.poll(None, WAIT).map_err(external)? {
                Polled::Chunk(chunk) => {
                    if let Some(rows) = scan.apply(chunk, rejected)? {
                        diffs.extend((0..rows.len()).map(|row| rows.diffs.get(row)));
                        batches.push(rows.batch);
                    }
                }
                Polled::Idle => {}
                Polled::AtLimit | Polled::End => break,
            }
        }
    }
    let all = concat_batches(&scan.schema, &batches)?;
    let fields = scan
        .schema
        .fields()
        .iter()
        .map(|f| SortField::new(f.data_type().clone()));
    let converter = RowConverter::new(fields.collect())?;
    let rows = converter.convert_columns(all.columns())?;
    // Per distinct row: where it first stood, and its multiplicity.
    let mut counts: HashMap<OwnedRow, (u64, i64)> = HashMap::new();
    for (i, diff) in diffs.iter().enumerate() {
        counts.entry(rows.row(i).owned()).or_insert((i as u64, 0)).1 += diff;
    }
    let mut kept: Vec<(u64, i64)> = counts
        .into_values()
        .filter(|(_, count)| *count != 0)
        .collect();
    kept.sort_unstable();
    if kept.iter().any(|(_, count)| *count < 0) {
        return Err(external(
            Error::invalid("the changelog retracts rows that it never inserted")
                .hint("a row with op '-' must repeat all values of an earlier row with op '+'"),
        ));
    }
    let indices: UInt64Array = kept
        .into_iter()
        .flat_map(|(i, count)| (0..count).map(move |_| i))
        .collect();
    Ok(take_record_batch(&all, &indices)?)
}
