//! Changes that wait in front of a relation: in order as they came, with their signs.

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Int64Array, RecordBatch, RecordBatchOptions};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef};

use super::runs::Runs;
use crate::delta::{Delta, Diffs};
use crate::error::{Error, Result};
use crate::key::Share;
use crate::state::{Part, Stateful, StoredPart};

/// The column behind those of the rows; no column of a relation is called so.
const DIFF: &str = "$diff";

/// See the module.
#[derive(Debug)]
pub struct Backlog {
    /// Of the rows.
    schema: SchemaRef,
    runs: Runs,
}

impl Backlog {
    pub fn new(schema: &SchemaRef, share: Share) -> Self {
        let mut fields = schema.fields().to_vec();
        fields.push(Arc::new(Field::new(DIFF, DataType::Int64, true)));
        Self {
            schema: Arc::clone(schema),
            runs: Runs::new(&Schema::new(fields), share),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Adds changes behind those that wait already.
    pub fn push(&mut self, delta: &Delta) -> Result<()> {
        let diffs: Int64Array = (0..delta.len()).map(|i| delta.diffs.get(i)).collect();
        let mut columns = delta.batch.columns().to_vec();
        columns.push(Arc::new(diffs));
        let batch = RecordBatch::try_new(Arc::clone(self.runs.schema()), columns)
            .map_err(|e| Error::internal(format!("changes cannot be kept: {e}")))?;
        self.runs.apply(&[Delta::inserts(batch)])
    }

    /// Takes out everything.
    pub fn take(&mut self) -> Result<Vec<Delta>> {
        let batches = self.runs.take()?;
        Ok(batches.iter().map(|batch| self.delta(batch)).collect())
    }

    fn delta(&self, batch: &RecordBatch) -> Delta {
        let (diffs, columns): (&ArrayRef, &[ArrayRef]) = batch
            .columns()
            .split_last()
            .expect("there is a column of diffs");
        let diffs = diffs.as_primitive::<Int64Type>().values().to_vec();
        let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
        let schema = Arc::clone(&self.schema);
        let batch = RecordBatch::try_new_with_options(schema, columns.to_vec(), &options)
            .expect("these columns came in with this schema");
        Delta {
            batch,
            diffs: Diffs::from_vec(diffs),
        }
    }
}

impl Stateful for Backlog {
    /// No part at all when nothing waits.
    fn freeze(&mut self) -> Vec<Part> {
        match self.is_empty() {
            true => Vec::new(),
            false => self.runs.freeze(),
        }
    }
    fn restore(&mut self, parts: &[StoredPart]) -> Result<()> {
        self.runs.restore(parts)
    }
    fn rows(&self) -> u64 {
        self.runs.rows()
    }
    fn bytes(&self) -> u64 {
        self.runs.bytes()
    }
    fn swapped_bytes(&self) -> u64 {
        self.runs.swapped_bytes()
    }
    fn relieve(&mut self) {
        self.runs.relieve();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::testing::{batch, int, stored};

    fn delta(rows: &[(i64, i64)]) -> Delta {
        let column = int(rows.iter().map(|r| Some(r.0)));
        let diffs = rows.iter().map(|r| r.1).collect();
        Delta::new(batch(vec![("a", column)]), Diffs::from_vec(diffs))
    }

    fn rows(deltas: &[Delta]) -> Vec<(i64, i64)> {
        let rows = deltas.iter().flat_map(|d| {
            let values = d.batch.column(0).as_primitive::<Int64Type>();
            (0..d.len()).map(|i| (values.value(i), d.diffs.get(i)))
        });
        rows.collect()
    }

    #[test]
    fn changes_come_out_as_they_went_in_also_after_a_restore() {
        let wanted = [(1, 1), (2, 1), (1, -1), (3, 2)];
        let one = Share {
            worker: 0,
            workers: 1,
        };
        let schema = delta(&wanted).batch.schema();
        let mut backlog = Backlog::new(&schema, one);
        assert!(backlog.freeze().is_empty());
        backlog.push(&delta(&wanted[..2])).expect("kept");
        backlog.push(&delta(&wanted[2..])).expect("kept");
        let parts = stored(backlog.freeze());
        let mut restored = Backlog::new(&schema, one);
        restored.restore(&parts).expect("read back");
        assert_eq!(rows(&restored.take().expect("taken")), wanted);
        assert_eq!(rows(&backlog.take().expect("taken")), wanted);
        assert!(backlog.is_empty() && backlog.take().expect("taken").is_empty());
    }

    #[test]
    fn rows_without_columns_are_counted() {
        let schema: SchemaRef = Arc::new(Schema::empty());
        let share = Share {
            worker: 0,
            workers: 1,
        };
        let options = RecordBatchOptions::new().with_row_count(Some(3));
        let empty = RecordBatch::try_new_with_options(Arc::clone(&schema), vec![], &options);
        let mut backlog = Backlog::new(&schema, share);
        backlog
            .push(&Delta::inserts(empty.expect("three rows")))
            .expect("kept");
        let taken = backlog.take().expect("taken");
        assert_eq!(taken.iter().map(Delta::len).sum::<usize>(), 3);
    }
}
