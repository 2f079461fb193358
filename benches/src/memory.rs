//! A source whose batches are built before the clock starts: what is measured is the engine.

use std::sync::Arc;
use std::time::Duration;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use millrace_dataflow::error::Result;
use millrace_dataflow::source::{Chunk, Offsets, Polled, Reader, Source};

/// Batches with the offset after each, of all columns.
#[derive(Debug)]
pub(crate) struct Memory {
    schema: SchemaRef,
    batches: Arc<Vec<(u64, RecordBatch)>>,
}

impl Memory {
    /// Reads `source` to its end.
    pub(crate) fn load(source: &dyn Source, projection: &[usize]) -> Result<Self> {
        let mut batches = Vec::new();
        let all: Vec<usize> = (0..source.schema().fields().len()).collect();
        for mut reader in source.open(&Offsets::default(), &all)? {
            loop {
                match reader.poll(None, Duration::from_secs(1))? {
                    Polled::Chunk(chunk) => {
                        batches.push((chunk.end, blank(&chunk.batch, projection)))
                    }
                    Polled::Idle => {}
                    Polled::AtLimit | Polled::End => break,
                }
            }
        }
        Ok(Self {
            schema: source.schema(),
            batches: Arc::new(batches),
        })
    }
}

/// Columns outside the projection are not kept: nobody reads them.
fn blank(batch: &RecordBatch, keep: &[usize]) -> RecordBatch {
    let columns = batch
        .columns()
        .iter()
        .enumerate()
        .map(|(i, c)| {
            if keep.contains(&i) {
                Arc::clone(c)
            } else {
                arrow::array::new_null_array(&arrow::datatypes::DataType::Null, c.len())
            }
        })
        .collect::<Vec<_>>();
    let fields: Vec<_> = batch
        .schema()
        .fields()
        .iter()
        .zip(&columns)
        .map(|(f, c)| {
            f.as_ref()
                .clone()
                .with_data_type(c.data_type().clone())
                .with_nullable(true)
        })
        .collect();
    RecordBatch::try_new(Arc::new(arrow::datatypes::Schema::new(fields)), columns)
        .expect("same lengths")
}

impl Source for Memory {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }
    fn open(&self, start: &Offsets, projection: &[usize]) -> Result<Vec<Box<dyn Reader>>> {
        let from = start.0.get("0").copied().unwrap_or(0);
        let next = self
            .batches
            .iter()
            .position(|(end, _)| *end > from)
            .unwrap_or(self.batches.len());
        Ok(vec![Box::new(MemoryReader {
            batches: Arc::clone(&self.batches),
            next,
            projection: projection.to_vec(),
        })])
    }
    fn bounded(&self) -> bool {
        true
    }
    fn append_only(&self) -> bool {
        true
    }
}

struct MemoryReader {
    batches: Arc<Vec<(u64, RecordBatch)>>,
    next: usize,
    projection: Vec<usize>,
}

impl Reader for MemoryReader {
    fn poll(&mut self, limit: Option<&Offsets>, _wait: Duration) -> Result<Polled> {
        let Some((end, batch)) = self.batches.get(self.next) else {
            return Ok(Polled::End);
        };
        if limit.is_some_and(|l| l.0.get("0").is_none_or(|l| end > l)) {
            return Ok(Polled::AtLimit);
        }
        let begin = match self.next {
            0 => 0,
            next => self.batches[next - 1].0,
        };
        self.next += 1;
        Ok(Polled::Chunk(Chunk {
            split: "0".into(),
            begin,
            end: *end,
            batch: batch
                .project(&self.projection)
                .expect("columns of the schema"),
            diffs: None,
            rejected: Vec::new(),
            bytes: batch.get_array_memory_size() as u64,
            digest: None,
            remaining: None,
        }))
    }
}
