//! Contents of a served relation: a table, or runs when it only grows.

use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{Schema, SchemaRef};

use super::runs::{FrozenRuns, Runs};
use super::table::{FrozenTable, Table};
use crate::delta::{Delta, Diffs};
use crate::error::Result;
use crate::key::Share;
use crate::state::{Part, Stateful, StoredPart};

/// What a relation holds on one worker.
#[derive(Debug)]
pub enum Contents {
    Table(Table),
    Runs(Runs),
}

impl Contents {
    /// Empty contents; `append_only` promises that every diff will be positive.
    pub fn new(schema: &Schema, append_only: bool, share: Share) -> Result<Self> {
        Ok(if append_only {
            Self::Runs(Runs::new(schema, share))
        } else {
            Self::Table(Table::new(schema, share)?)
        })
    }

    /// Rows must come to the worker that [`super::table::row_hashes`] says.
    pub fn needs_exchange(&self) -> bool {
        matches!(self, Self::Table(_))
    }

    /// Applies the changes of a tick.
    pub fn apply(&mut self, deltas: &[Delta]) -> Result<()> {
        match self {
            Self::Table(table) => table.apply(deltas),
            Self::Runs(runs) => runs.apply(deltas),
        }
    }

    /// The rows as they are now; later changes do not show in it.
    pub fn freeze_rows(&self) -> FrozenContents {
        match self {
            Self::Table(table) => FrozenContents::Table(table.freeze_rows()),
            Self::Runs(runs) => FrozenContents::Runs(runs.freeze_rows()),
        }
    }

    /// Rows, each as often as it is there.
    pub fn len(&self) -> u64 {
        match self {
            Self::Table(table) => table.len(),
            Self::Runs(runs) => runs.len(),
        }
    }
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    pub fn schema(&self) -> &SchemaRef {
        match self {
            Self::Table(table) => table.schema(),
            Self::Runs(runs) => runs.schema(),
        }
    }
}

/// The changes with each row once, by its net diff; rows that come and go are left out.
pub fn consolidate(schema: &SchemaRef, changes: &[Delta]) -> Result<Vec<Delta>> {
    let mut table = Table::new(schema, Share::ALL)?;
    table.apply(changes)?;
    let net = FrozenContents::Table(table.freeze_rows());
    let chunks = (0..net.chunks()).map(|chunk| net.chunk_deltas(chunk));
    Ok(chunks
        .collect::<Result<Vec<_>>>()?
        .into_iter()
        .flatten()
        .collect())
}

/// What turns `old` into `new`. Where both have the same columns each row appears once.
pub fn difference(old: &FrozenContents, new: &FrozenContents) -> Result<Vec<Delta>> {
    let mut changes = Vec::new();
    for chunk in 0..old.chunks() {
        for delta in old.chunk_deltas(chunk)? {
            let gone = (0..delta.len()).map(|row| -delta.diffs.get(row)).collect();
            changes.push(Delta::new(delta.batch, Diffs::from_vec(gone)));
        }
    }
    for chunk in 0..new.chunks() {
        changes.extend(new.chunk_deltas(chunk)?);
    }
    let (before, after) = (old.schema().fields(), new.schema().fields());
    let same = before.len() == after.len()
        && before
            .iter()
            .zip(after)
            .all(|(a, b)| a.name() == b.name() && a.data_type() == b.data_type());
    if same {
        consolidate(new.schema(), &changes)
    } else {
        // Rows of other columns are other rows.
        Ok(changes)
    }
}

impl Stateful for Contents {
    fn freeze(&mut self) -> Vec<Part> {
        match self {
            Self::Table(table) => table.freeze(),
            Self::Runs(runs) => runs.freeze(),
        }
    }
    fn restore(&mut self, parts: &[StoredPart]) -> Result<()> {
        match self {
            Self::Table(table) => table.restore(parts),
            Self::Runs(runs) => runs.restore(parts),
        }
    }
    fn rows(&self) -> u64 {
        match self {
            Self::Table(table) => table.rows(),
            Self::Runs(runs) => runs.rows(),
        }
    }
    fn bytes(&self) -> u64 {
        match self {
            Self::Table(table) => table.bytes(),
            Self::Runs(runs) => runs.bytes(),
        }
    }
    fn swapped_bytes(&self) -> u64 {
        match self {
            Self::Table(table) => table.swapped_bytes(),
            Self::Runs(runs) => runs.swapped_bytes(),
        }
    }
    fn relieve(&mut self) {
        match self {
            Self::Table(table) => table.relieve(),
            Self::Runs(runs) => runs.relieve(),
        }
    }
}

/// Rows at one moment; cheap to clone, may be read on any thread, piece by piece.
#[derive(Debug, Clone)]
pub enum FrozenContents {
    Table(FrozenTable),
    Runs(FrozenRuns),
}

impl FrozenContents {
    /// Rows that were frozen elsewhere.
    pub fn of_batches(batches: Vec<RecordBatch>) -> Self {
        Self::Runs(FrozenRuns::of_batches(batches))
    }
    pub fn schema(&self) -> &SchemaRef {
        match self {
            Self::Table(table) => table.schema(),
            Self::Runs(runs) => runs.schema(),
        }
    }
    /// Rows, each as often as it is there.
    pub fn rows(&self) -> u64 {
        match self {
            Self::Table(table) => table.len(),
            Self::Runs(runs) => runs.len(),
        }
    }
    /// Number of pieces that can be read apart, by several threads or one after the other.
    pub fn chunks(&self) -> usize {
        match self {
            Self::Table(table) => table.chunks(),
            Self::Runs(runs) => runs.chunks(),
        }
    }
    /// The schema of `projection`, all columns without one.
    pub fn projected(&self, projection: Option<&[usize]>) -> SchemaRef {
        let Some(projection) = projection else {
            return Arc::clone(self.schema());
        };
        let fields = projection
            .iter()
            .map(|c| Arc::clone(&self.schema().fields()[*c]));
        let metadata = self.schema().metadata().clone();
        Arc::new(Schema::new_with_metadata(
            fields.collect::<Vec<_>>(),
            metadata,
        ))
    }
    /// One piece as changes that build these contents.
    pub fn chunk_deltas(&self, chunk: usize) -> Result<Vec<Delta>> {
        match self {
            Self::Table(table) => table.chunk_deltas(chunk),
            Self::Runs(runs) => {
                let batch = runs.chunk(chunk, None, self.schema())?;
                Ok(if batch.num_rows() == 0 {
                    Vec::new()
                } else {
                    vec![Delta::inserts(batch)]
                })
            }
        }
    }
    /// The rows of one piece.
    pub fn chunk(&self, chunk: usize, projection: Option<&[usize]>) -> Result<Vec<RecordBatch>> {
        let schema = self.projected(projection);
        match self {
            Self::Table(table) => table.chunk(chunk, projection, &schema),
            Self::Runs(runs) => Ok(vec![runs.chunk(chunk, projection, &schema)?]),
        }
    }
    /// All rows. No batch is empty.
    pub fn batches(&self, projection: Option<&[usize]>) -> Result<Vec<RecordBatch>> {
        let mut all = Vec::new();
        for chunk in 0..self.chunks() {
            all.extend(self.chunk(chunk, projection)?);
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::delta::Diffs;
    use crate::kernel::testing::{accumulate, batch, consolidated, int, stored};
    use crate::state::testing::{budget, enter};
    use arrow::array::{ArrayRef, StringArray};
    use proptest::prelude::*;

    type Change = (Option<i64>, u8, i64);

    fn delta(changes: &[Change]) -> Delta {
        let text: StringArray = changes
            .iter()
            .map(|c| Some("x".repeat(c.1 as usize)))
            .collect();
        let columns = vec![
            ("a", int(changes.iter().map(|c| c.0))),
            ("b", Arc::new(text) as ArrayRef),
        ];
        Delta::new(
            batch(columns),
            Diffs::from_vec(changes.iter().map(|c| c.2).collect()),
        )
    }

    fn shown(contents: &FrozenContents) -> BTreeMap<String, i64> {
        let deltas: Vec<_> = contents
            .batches(None)
            .unwrap()
            .into_iter()
            .map(Delta::inserts)
            .collect();
        let all = consolidated(&deltas);
        assert_eq!(contents.rows(), all.values().sum::<i64>() as u64);
        let narrow = contents.batches(Some(&[1])).unwrap();
        let rows: usize = narrow.iter().map(RecordBatch::num_rows).sum();
        assert_eq!(rows as u64, contents.rows());
        assert!(
            narrow
                .iter()
                .all(|b| b.num_columns() == 1 && b.schema().field(0).name() == "b")
        );
        all
    }

    fn ticks() -> impl Strategy<Value = Vec<Vec<Change>>> {
        let change = (proptest::option::of(0i64..20), 0u8..3, 1i64..4);
        prop::collection::vec(prop::collection::vec(change, 1..40), 1..12)
    }

    proptest! {
        #[test]
        fn contents_are_the_sum_of_the_deltas(ticks in ticks(), take_back in any::<u64>(), workers in 1usize..4, budget in budget()) {
            let _entered = enter(budget);
            for append_only in [true, false] {
                let schema = delta(&ticks[0]).batch.schema();
                let mut contents = Contents::new(&schema, append_only, Share::ALL).unwrap();
                let mut want = BTreeMap::new();
                let mut earlier: Vec<(FrozenContents, BTreeMap<String, i64>)> = Vec::new();
                let mut past: Vec<Change> = Vec::new();
                for (number, tick) in ticks.iter().enumerate() {
                    let mut changes = tick.clone();
                    if !append_only && take_back >> (number % 64) & 1 == 1 {
                        changes.extend(past.drain(..).map(|(a, b, d)| (a, b, -d)));
                    }
                    past.extend(tick.iter().cloned());
                    let (first, second) = changes.split_at(changes.len() / 2);
                    let deltas: Vec<_> =
                        [first, second].into_iter().filter(|c| !c.is_empty()).map(delta).collect();
                    contents.apply(&deltas).unwrap();
                    accumulate(&mut want, &deltas);
                    let frozen = contents.freeze_rows();
                    prop_assert_eq!(&shown(&frozen), &want);
                    earlier.push((frozen, want.clone()));
                }
                for (frozen, want) in earlier {
                    prop_assert_eq!(shown(&frozen), want);
                }
                // Restored onto some workers, together they hold the same.
                let parts = stored(contents.freeze());
                let mut all = BTreeMap::new();
                for worker in 0..workers {
                    let share = Share { worker, workers };
                    let mut part = Contents::new(&schema, append_only, share).unwrap();
                    part.restore(&parts).unwrap();
                    for (row, count) in shown(&part.freeze_rows()) {
                        *all.entry(row).or_insert(0) += count;
                    }
                }
                prop_assert_eq!(all, want);
            }
        }
    }

    #[test]
    fn small_batches_are_merged() {
        let mut runs = Runs::new(&delta(&[(None, 1, 1)]).batch.schema(), Share::ALL);
        for number in 0..1000 {
            runs.apply(&[delta(&[(Some(number), 1, 1)])]).unwrap();
        }
        let frozen = FrozenContents::Runs(runs.freeze_rows());
        assert_eq!(frozen.rows(), 1000);
        assert!(frozen.chunks() < 12, "{}", frozen.chunks());
        assert!(runs.apply(&[delta(&[(Some(1), 1, -1)])]).is_err());
    }

    #[test]
    fn a_row_retracted_before_its_insertion_is_not_there_yet() {
        let mut table = Table::new(&delta(&[(None, 1, 1)]).batch.schema(), Share::ALL).unwrap();
        table.apply(&[delta(&[(Some(1), 1, -1)])]).unwrap();
        let frozen = FrozenContents::Table(table.freeze_rows());
        assert!(frozen.batches(None).unwrap().is_empty());
        let changes: Vec<Delta> = (0..frozen.chunks())
            .flat_map(|c| frozen.chunk_deltas(c).unwrap())
            .collect();
        assert_eq!(changes.len(), 1);
        assert_eq!(changes[0].diffs.get(0), -1);
        table.apply(&[delta(&[(Some(1), 1, 1)])]).unwrap();
        assert!(
            FrozenContents::Table(table.freeze_rows())
                .batches(None)
                .unwrap()
                .is_empty()
        );
    }
}
