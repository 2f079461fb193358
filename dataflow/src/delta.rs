//! `Delta`: the changes of one tick as one batch; the container on every edge.
//!
//! # Contract
//!
//! * A `Delta` on an edge is never empty: timely counts records to know that a message exists.
//! * All rows of a `Delta` belong to one tick, that of the message that carries it.
//! * A row with diff `d` means: `d` copies appear (`d > 0`) or vanish (`d < 0`). No diff is 0.

pub mod exchange;
pub mod ipc;

use std::sync::{Arc, LazyLock};

use arrow::array::{BooleanArray, RecordBatch, RecordBatchOptions, UInt32Array};
use arrow::compute::{filter_record_batch, take};
use arrow::datatypes::{Schema, SchemaRef};
use timely::container::Accountable;

/// Multiplicities of the rows of a batch; the common case, all +1, is a constant.
#[derive(Debug, Clone)]
pub enum Diffs {
    Ones,
    Each(Arc<[i64]>),
}

impl Diffs {
    /// Compact form of explicit diffs.
    pub fn from_vec(diffs: Vec<i64>) -> Self {
        if diffs.iter().all(|d| *d == 1) {
            Self::Ones
        } else {
            Self::Each(diffs.into())
        }
    }
    #[inline]
    pub fn get(&self, row: usize) -> i64 {
        match self {
            Self::Ones => 1,
            Self::Each(diffs) => diffs[row],
        }
    }
    pub fn is_ones(&self) -> bool {
        matches!(self, Self::Ones)
    }
}

/// Changes of one tick: rows and their multiplicities. See the module contract.
#[derive(Debug, Clone)]
pub struct Delta {
    pub batch: RecordBatch,
    pub diffs: Diffs,
}

static EMPTY: LazyLock<SchemaRef> = LazyLock::new(|| Arc::new(Schema::empty()));

impl Default for Delta {
    fn default() -> Self {
        Self {
            batch: RecordBatch::new_empty(Arc::clone(&EMPTY)),
            diffs: Diffs::Ones,
        }
    }
}

impl Accountable for Delta {
    fn record_count(&self) -> i64 {
        self.batch.num_rows() as i64
    }
}

impl Delta {
    /// Insertions only.
    pub fn inserts(batch: RecordBatch) -> Self {
        Self {
            batch,
            diffs: Diffs::Ones,
        }
    }
    pub fn new(batch: RecordBatch, diffs: Diffs) -> Self {
        if let Diffs::Each(each) = &diffs {
            debug_assert_eq!(each.len(), batch.num_rows());
        }
        Self { batch, diffs }
    }
    pub fn len(&self) -> usize {
        self.batch.num_rows()
    }
    pub fn is_empty(&self) -> bool {
        self.batch.num_rows() == 0
    }
    /// Bytes held by the columns.
    pub fn bytes(&self) -> usize {
        self.batch.get_array_memory_size()
    }
    /// Rows where `mask` is true (null counts as false); `None` when no row is left.
    pub fn filter(&self, mask: &BooleanArray) -> Option<Self> {
        let batch =
            filter_record_batch(&self.batch, mask).expect("the mask has the length of the batch");
        if batch.num_rows() == 0 {
            return None;
        }
        if batch.num_rows() == self.batch.num_rows() {
            return Some(Self {
                batch,
                diffs: self.diffs.clone(),
            });
        }
        let diffs = match &self.diffs {
            Diffs::Ones => Diffs::Ones,
            Diffs::Each(each) => Diffs::from_vec(
                mask.iter()
                    .zip(each.iter())
                    .filter(|(m, _)| *m == Some(true))
                    .map(|(_, d)| *d)
                    .collect(),
            ),
        };
        Some(Self { batch, diffs })
    }
    /// The rows at `indices`, in that order.
    pub fn take(&self, indices: &UInt32Array) -> Self {
        let columns = self.batch.columns().iter();
        let columns = columns
            .map(|column| take(column, indices, None).expect("indices lie within the batch"))
            .collect();
        // There may be no column.
        let options = RecordBatchOptions::new().with_row_count(Some(indices.len()));
        let batch = RecordBatch::try_new_with_options(self.batch.schema(), columns, &options)
            .expect("the columns are those of the schema");
        let diffs = match &self.diffs {
            Diffs::Ones => Diffs::Ones,
            Diffs::Each(each) => {
                Diffs::from_vec(indices.values().iter().map(|i| each[*i as usize]).collect())
            }
        };
        Self { batch, diffs }
    }
}
