//! Contents of a relation whose rows can vanish: a multiset of rows.
//!
//! # Contract
//!
//! * Rows come to the worker that [`row_hashes`] says, so that a retraction meets its row also after
//!   a restart on another number of workers.
//! * Values come back bit by bit as they were given.

use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{Schema, SchemaRef};

use super::map::build;
use super::{WARM_ROWS, nullable};
use crate::delta::{Delta, Diffs};
use crate::error::Result;
use crate::key::{RowCodec, Share, touch_order};
use crate::state::{Frozen, KeyedState, Part, PartData, Stateful, StoredPart};

/// Rows of one decoded batch, and about as many in one chunk of a frozen table.
const CHUNK_ROWS: usize = 8192;
const PART: &str = "rows";

/// A multiset of rows. See the module contract.
#[derive(Debug)]
pub struct Table {
    schema: SchemaRef,
    codec: Arc<RowCodec>,
    /// Row bytes to multiplicity.
    state: KeyedState,
    /// Sum of the multiplicities.
    total: i64,
    share: Share,
}

/// By which the rows of a table are spread over workers.
pub fn row_hashes(batch: &RecordBatch) -> Result<Vec<u64>> {
    let codec = RowCodec::rows(batch.columns().iter().map(|c| c.data_type().clone()))?;
    Ok(codec.encode(batch.columns(), batch.num_rows())?.hashes())
}

impl Table {
    pub fn new(schema: &Schema, share: Share) -> Result<Self> {
        let types = schema.fields().iter().map(|f| f.data_type().clone());
        Ok(Self {
            schema: nullable(schema),
            codec: Arc::new(RowCodec::rows(types)?),
            state: KeyedState::plain(),
            total: 0,
            share,
        })
    }

    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Rows, each as often as it is there.
    pub fn len(&self) -> u64 {
        self.total.max(0) as u64
    }
    pub fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// Applies the changes of a tick.
    pub fn apply(&mut self, deltas: &[Delta]) -> Result<()> {
        for delta in deltas {
            let encoded = self.codec.encode(delta.batch.columns(), delta.len())?;
            let hashes = encoded.hashes();
            for block in touch_order(&hashes, |_| 0).chunks(WARM_ROWS) {
                self.state
                    .warm(block.iter().map(|row| hashes[*row as usize]));
                for row in block {
                    let row = *row as usize;
                    self.add(hashes[row], encoded.row(row), delta.diffs.get(row));
                }
                self.state.relieve();
            }
        }
        self.state.relieve();
        Ok(())
    }

    fn add(&mut self, hash: u64, row: &[u8], diff: i64) {
        self.total += diff;
        let (id, value, new) = self.state.entry(hash, row, &diff.to_le_bytes());
        if new {
            return;
        }
        let count = multiplicity(value).wrapping_add(diff);
        value.copy_from_slice(&count.to_le_bytes());
        if count == 0 {
            self.state.remove_located(id, hash);
        }
    }

    /// The rows as they are now.
    pub fn freeze_rows(&self) -> FrozenTable {
        FrozenTable {
            schema: Arc::clone(&self.schema),
            codec: Arc::clone(&self.codec),
            rows: self.len(),
            chunks: self.state.freeze().chunks(CHUNK_ROWS).into(),
        }
    }
}

impl Stateful for Table {
    fn freeze(&mut self) -> Vec<Part> {
        vec![Part {
            name: PART.to_string(),
            data: PartData::Keyed(self.state.snapshot()),
        }]
    }
    fn restore(&mut self, parts: &[StoredPart]) -> Result<()> {
        for part in parts.iter().filter(|part| part.name == PART) {
            self.state.restore_part(part, &self.share.groups())?;
        }
        self.total = 0;
        for group in 0..=u8::MAX {
            let rows = self.state.rows_of_group(group);
            self.total += rows.map(|row| multiplicity(row.2)).sum::<i64>();
            self.state.relieve();
        }
        Ok(())
    }
    fn rows(&self) -> u64 {
        self.state.len()
    }
    fn bytes(&self) -> u64 {
        self.state.bytes()
    }
    fn swapped_bytes(&self) -> u64 {
        self.state.swapped_bytes()
    }
    fn relieve(&mut self) {
        self.state.relieve();
    }
}

/// Rows of a [`Table`] at one moment.
#[derive(Debug, Clone)]
pub struct FrozenTable {
    schema: SchemaRef,
    codec: Arc<RowCodec>,
    rows: u64,
    chunks: Arc<[Frozen]>,
}

impl FrozenTable {
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
        self.chunks.len()
    }

    /// One piece as changes: each row once, with its multiplicity. A row that was retracted before its
    /// insertion came has a negative one.
    pub(super) fn chunk_deltas(&self, chunk: usize) -> Result<Vec<Delta>> {
        let mut rows: Vec<&[u8]> = Vec::with_capacity(CHUNK_ROWS);
        let mut diffs = Vec::with_capacity(CHUNK_ROWS);
        let loaded = self.chunks[chunk].load()?;
        for (_, row, value) in loaded.iter() {
            rows.push(row);
            diffs.push(multiplicity(value));
        }
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let batch = self.decode(&rows, None, &self.schema)?;
        Ok(vec![Delta::new(batch, Diffs::from_vec(diffs))])
    }

    /// Rows of one piece, each as often as it is there; a row that was retracted before its insertion
    /// came is not there yet. `schema` is that of the projection.
    pub(super) fn chunk(
        &self,
        chunk: usize,
        projection: Option<&[usize]>,
        schema: &SchemaRef,
    ) -> Result<Vec<RecordBatch>> {
        let mut batches = Vec::new();
        let loaded = self.chunks[chunk].load()?;
        let mut rows: Vec<&[u8]> = Vec::with_capacity(CHUNK_ROWS);
        for (_, row, value) in loaded.iter() {
            let mut count = multiplicity(value);
            while count > 0 {
                let some = (count as usize).min(CHUNK_ROWS - rows.len());
                rows.extend(std::iter::repeat_n(row, some));
                count -= some as i64;
                if rows.len() == CHUNK_ROWS {
                    batches.push(self.decode(&rows, projection, schema)?);
                    rows.clear();
                }
            }
        }
        if !rows.is_empty() {
            batches.push(self.decode(&rows, projection, schema)?);
        }
        Ok(batches)
    }

    fn decode(
        &self,
        rows: &[&[u8]],
        projection: Option<&[usize]>,
        schema: &SchemaRef,
    ) -> Result<RecordBatch> {
        if projection.is_some_and(<[usize]>::is_empty) {
            return Ok(build(schema, Vec::new(), rows.len()));
        }
        let columns = self.codec.decode(rows.iter().copied())?;
        let columns = match projection {
            None => columns,
            Some(projection) => projection
                .iter()
                .map(|c| Arc::clone(&columns[*c]))
                .collect(),
        };
        Ok(build(schema, columns, rows.len()))
    }
}

fn multiplicity(value: &[u8]) -> i64 {
    i64::from_le_bytes(
        value
            .try_into()
            .expect("the value of a table row is its multiplicity"),
    )
}
