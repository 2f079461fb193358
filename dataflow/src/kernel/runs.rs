//! Contents of a relation that only grows: its batches, as they came.
//!
//! Small batches are merged like the digits of a binary counter: each row is copied a logarithmic
//! number of times until its batch is full, and few small batches exist at any moment.

use std::sync::Arc;

use arrow::array::{RecordBatch, UInt32Array};
use arrow::compute::{concat_batches, take_record_batch};
use arrow::datatypes::{Schema, SchemaRef};

use super::map::build;
use super::nullable;
use crate::delta::{Delta, Diffs};
use crate::error::{Error, Result};
use crate::key::Share;
use crate::state::{Account, HeldBatch, Part, PartData, Stateful, StoredData, StoredPart};

/// Batches of this many rows are not merged any further.
const FULL_ROWS: usize = 16_384;
const PART: &str = "runs";

/// Rows that never vanish.
#[derive(Debug)]
pub struct Runs {
    schema: SchemaRef,
    batches: Vec<Arc<HeldBatch>>,
    rows: u64,
    share: Share,
    account: Arc<Account>,
    /// The batches before this one were put out.
    out: usize,
}

impl Runs {
    pub fn new(schema: &Schema, share: Share) -> Self {
        Self {
            schema: nullable(schema),
            batches: Vec::new(),
            rows: 0,
            share,
            account: Account::open(),
            out: 0,
        }
    }

    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }
    pub fn len(&self) -> u64 {
        self.rows
    }
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Adds the rows of a tick.
    pub fn apply(&mut self, deltas: &[Delta]) -> Result<()> {
        for delta in deltas {
            self.push(&inserted(delta)?)?;
        }
        Ok(())
    }

    fn push(&mut self, batch: &RecordBatch) -> Result<()> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        self.rows += batch.num_rows() as u64;
        let mut last = build(&self.schema, batch.columns().to_vec(), batch.num_rows());
        while let Some(previous) = self.batches.last()
            && previous.num_rows() <= 2 * last.num_rows()
            && previous.num_rows() + last.num_rows() <= FULL_ROWS
        {
            last = concat_batches(&self.schema, [&previous.load()?, &last])
                .map_err(|e| Error::internal(format!("batches cannot be merged: {e}")))?;
            self.batches.pop();
        }
        self.batches.push(HeldBatch::new(last, &self.account));
        self.out = self.out.min(self.batches.len() - 1);
        self.relieve();
        Ok(())
    }

    /// Takes out all rows.
    pub fn take(&mut self) -> Result<Vec<RecordBatch>> {
        let batches = self.batches.iter().map(|batch| batch.load());
        let batches = batches.collect::<Result<_>>()?;
        self.batches.clear();
        self.rows = 0;
        self.out = 0;
        Ok(batches)
    }

    /// The rows as they are now.
    pub fn freeze_rows(&self) -> FrozenRuns {
        FrozenRuns {
            schema: Arc::clone(&self.schema),
            rows: self.rows,
            batches: self.batches.iter().map(Arc::clone).collect(),
        }
    }
}

/// The rows of a delta, each as often as it appears.
fn inserted(delta: &Delta) -> Result<RecordBatch> {
    let Diffs::Each(diffs) = &delta.diffs else {
        return Ok(delta.batch.clone());
    };
    let mut indices = Vec::with_capacity(diffs.len());
    for (row, diff) in diffs.iter().enumerate() {
        let copies = usize::try_from(*diff)
            .map_err(|_| Error::internal("a row was retracted from an append-only relation"))?;
        indices.extend(std::iter::repeat_n(row as u32, copies));
    }
    take_record_batch(&delta.batch, &UInt32Array::from(indices))
        .map_err(|e| Error::internal(format!("rows cannot be repeated: {e}")))
}

impl Stateful for Runs {
    fn freeze(&mut self) -> Vec<Part> {
        vec![Part {
            name: PART.to_string(),
            data: PartData::Batches(self.batches.clone()),
        }]
    }
    fn restore(&mut self, parts: &[StoredPart]) -> Result<()> {
        // Any worker may hold any batch; each takes every n-th, counted over all parts.
        let mut number = 0;
        for part in parts.iter().filter(|part| part.name == PART) {
            let StoredData::Batches(blocks) = &part.data else {
                return Err(Error::internal("stored runs hold no batches"));
            };
            for block in blocks {
                if number % self.share.workers == self.share.worker {
                    self.push(&block.read_batch()?)?;
                }
                number += 1;
            }
        }
        Ok(())
    }
    fn rows(&self) -> u64 {
        self.rows
    }
    fn bytes(&self) -> u64 {
        self.account.resident()
    }
    fn swapped_bytes(&self) -> u64 {
        self.account.swapped()
    }
    /// The oldest go first: nothing but scans reads them. The last one will be merged with what comes.
    fn relieve(&mut self) {
        if !self.account.is_over() {
            return;
        }
        let due = self.account.due();
        let mut freed = 0;
        while freed < due && self.out + 1 < self.batches.len() {
            match self.batches[self.out].put_out(&self.account) {
                Ok(0) => return,
                Ok(bytes) => freed += bytes,
                Err(error) => tracing::error!(%error, "a batch stays in memory"),
            }
            self.out += 1;
        }
    }
}

/// Rows of [`Runs`] at one moment.
#[derive(Debug, Clone)]
pub struct FrozenRuns {
    schema: SchemaRef,
    rows: u64,
    batches: Arc<[Arc<HeldBatch>]>,
}

impl FrozenRuns {
    pub(super) fn of_batches(batches: Vec<RecordBatch>) -> Self {
        let schema = batches.first().map(RecordBatch::schema);
        Self {
            schema: schema.unwrap_or_else(|| Arc::new(Schema::empty())),
            rows: batches.iter().map(|b| b.num_rows() as u64).sum(),
            batches: {
                let account = Account::open();
                let batches = batches.into_iter();
                batches
                    .map(|batch| HeldBatch::new(batch, &account))
                    .collect()
            },
        }
    }
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }
    pub fn len(&self) -> u64 {
        self.rows
    }
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }
    /// Number of pieces that can be read apart.
    pub fn chunks(&self) -> usize {
        self.batches.len()
    }
    pub(super) fn chunk(
        &self,
        chunk: usize,
        projection: Option<&[usize]>,
        schema: &SchemaRef,
    ) -> Result<RecordBatch> {
        let batch = self.batches[chunk].load()?;
        let columns = match projection {
            None => batch.columns().to_vec(),
            Some(projection) => projection
                .iter()
                .map(|c| Arc::clone(batch.column(*c)))
                .collect(),
        };
        Ok(build(schema, columns, batch.num_rows()))
    }
}
