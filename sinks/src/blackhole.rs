//! Counts and drops what it receives, for measurements.
//!
//! It has no destination, so nothing says how far it is: after a restart it counts what is sent again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow::array::RecordBatch;
use async_trait::async_trait;
use millrace_dataflow::delta::Diffs;
use millrace_dataflow::error::Result;
use millrace_dataflow::sink::{Committable, Committer, Sink, Writer};
use millrace_dataflow::time::Tick;

use crate::options::Options;

/// What went in since the sink was made.
#[derive(Debug, Default)]
pub struct Counters {
    pub insertions: AtomicU64,
    pub retractions: AtomicU64,
    pub batches: AtomicU64,
}

/// Takes everything, retractions too.
#[derive(Debug, Default)]
pub struct BlackholeSink {
    counters: Arc<Counters>,
}

impl BlackholeSink {
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// A sink with the options of `WITH (…)`, of which there are none.
    pub fn from_options(options: &BTreeMap<String, String>) -> Result<Arc<Self>> {
        Options::new("blackhole", options).finish()?;
        Ok(Self::new())
    }

    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }
}

#[async_trait]
impl Sink for BlackholeSink {
    fn accepts_retractions(&self) -> bool {
        true
    }
    async fn writer(&self, _worker: usize, _incarnation: u64) -> Result<Box<dyn Writer>> {
        Ok(Box::new(BlackholeWriter {
            counters: Arc::clone(&self.counters),
        }))
    }
    async fn committer(&self, _incarnation: u64) -> Result<Box<dyn Committer>> {
        Ok(Box::new(BlackholeCommitter))
    }
}

struct BlackholeWriter {
    counters: Arc<Counters>,
}

#[async_trait]
impl Writer for BlackholeWriter {
    async fn write(&mut self, _tick: Tick, batch: &RecordBatch, diffs: &Diffs) -> Result<()> {
        let (mut plus, mut minus) = (0, 0);
        match diffs {
            Diffs::Ones => plus = batch.num_rows() as u64,
            Diffs::Each(each) => {
                for diff in each.iter() {
                    let side = if *diff > 0 { &mut plus } else { &mut minus };
                    *side += diff.unsigned_abs();
                }
            }
        }
        self.counters.insertions.fetch_add(plus, Ordering::Relaxed);
        self.counters
            .retractions
            .fetch_add(minus, Ordering::Relaxed);
        self.counters.batches.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    async fn close(&mut self, _lower: Tick, _upper: Tick) -> Result<Vec<Committable>> {
        Ok(vec![])
    }
}

struct BlackholeCommitter;

#[async_trait]
impl Committer for BlackholeCommitter {
    async fn frontier(&mut self) -> Result<Option<Tick>> {
        Ok(None)
    }
    async fn commit(&mut self, _: Tick, _: Tick, _: &[Committable]) -> Result<Tick> {
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::Int64Array;
    use arrow::datatypes::{DataType, Field, Schema};

    #[tokio::test]
    async fn counts_both_signs() {
        let schema = Arc::new(Schema::new(vec![Field::new("a", DataType::Int64, true)]));
        let batch = RecordBatch::try_new(schema, vec![Arc::new(Int64Array::from(vec![1, 2, 3]))])
            .expect("a batch");
        let sink = BlackholeSink::new();
        let mut writer = sink.writer(0, 1).await.expect("a writer");
        writer.write(1, &batch, &Diffs::Ones).await.expect("taken");
        writer
            .write(2, &batch, &Diffs::from_vec(vec![2, -1, -3]))
            .await
            .expect("taken");
        assert!(writer.close(0, 3).await.expect("closed").is_empty());
        assert_eq!(sink.counters().insertions.load(Ordering::Relaxed), 5);
        assert_eq!(sink.counters().retractions.load(Ordering::Relaxed), 4);
        let options = BTreeMap::from([("a".to_string(), "b".to_string())]);
        assert!(BlackholeSink::from_options(&options).is_err());
    }
}
