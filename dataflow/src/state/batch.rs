//! A batch of rows without a key: in memory, or in the swap file.

use std::io::Cursor;
use std::sync::{Arc, RwLock};

use arrow::array::RecordBatch;
use arrow::ipc::reader::StreamReader;
use arrow::ipc::writer::StreamWriter;

use super::pager::{Account, Charge, Out};
use crate::error::{Error, Result};

/// See the module. Shared by the state, by readers and by checkpoints; a checkpoint knows it again by
/// its address.
#[derive(Debug)]
pub struct HeldBatch {
    rows: usize,
    place: RwLock<Place>,
}

#[derive(Debug)]
enum Place {
    /// The charge counts as long as the rows are here.
    Resident(RecordBatch, #[expect(dead_code)] Charge),
    Swapped(Out),
}

fn failed(error: impl ToString) -> Error {
    Error::internal("a batch cannot be put out").detail(error.to_string())
}

impl HeldBatch {
    pub(crate) fn new(batch: RecordBatch, account: &Arc<Account>) -> Arc<Self> {
        let mut charge = Charge::new(Some(Arc::clone(account)));
        charge.set(batch.get_array_memory_size());
        Arc::new(Self {
            rows: batch.num_rows(),
            place: RwLock::new(Place::Resident(batch, charge)),
        })
    }

    pub fn num_rows(&self) -> usize {
        self.rows
    }

    /// The rows. Reading them back does not bring them into memory for others.
    pub fn load(&self) -> Result<RecordBatch> {
        let place = self.place.read().unwrap_or_else(|e| e.into_inner());
        match &*place {
            Place::Resident(batch, _) => Ok(batch.clone()),
            Place::Swapped(out) => {
                let mut bytes = Vec::new();
                out.read(&mut bytes)?;
                let mut reader = StreamReader::try_new(Cursor::new(bytes), None).map_err(failed)?;
                let batch = reader.next().ok_or_else(|| failed("it holds nothing"))?;
                batch.map_err(failed)
            }
        }
    }

    /// Puts the rows out; the bytes that are free by it, zero when they cannot be written.
    pub(crate) fn put_out(&self, account: &Arc<Account>) -> Result<u64> {
        let mut place = self.place.write().unwrap_or_else(|e| e.into_inner());
        let Place::Resident(batch, _) = &*place else {
            return Ok(0);
        };
        let size = batch.get_array_memory_size();
        let mut bytes = Vec::with_capacity(size + size / 16 + 1024);
        let mut writer = StreamWriter::try_new(&mut bytes, &batch.schema()).map_err(failed)?;
        writer.write(batch).map_err(failed)?;
        writer.finish().map_err(failed)?;
        drop(writer);
        match account.put_out(&bytes) {
            None => Ok(0),
            Some(out) => {
                *place = Place::Swapped(out);
                Ok(size as u64)
            }
        }
    }
}
