//! Helpers of the kernels' tests: small batches in, multisets of rows as text out.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch, TimestampMicrosecondArray};
use arrow::datatypes::{Field, Schema};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use datafusion::logical_expr::Operator;
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::expressions::{BinaryExpr, Column};

use crate::delta::Delta;
use crate::state::{Part, StoredPart, read_part, write_part};

pub(crate) fn batch(columns: Vec<(&str, ArrayRef)>) -> RecordBatch {
    let fields = columns
        .iter()
        .map(|(name, c)| Field::new(*name, c.data_type().clone(), true));
    let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
    RecordBatch::try_new(schema, columns.into_iter().map(|(_, c)| c).collect()).unwrap()
}

pub(crate) fn int(values: impl IntoIterator<Item = Option<i64>>) -> ArrayRef {
    Arc::new(values.into_iter().collect::<Int64Array>())
}

pub(crate) fn time(values: impl IntoIterator<Item = Option<i64>>) -> ArrayRef {
    Arc::new(values.into_iter().collect::<TimestampMicrosecondArray>())
}

pub(crate) fn column(name: &str, index: usize) -> Arc<dyn PhysicalExpr> {
    Arc::new(Column::new(name, index))
}

pub(crate) fn compare(
    left: Arc<dyn PhysicalExpr>,
    op: Operator,
    right: Arc<dyn PhysicalExpr>,
) -> Arc<dyn PhysicalExpr> {
    Arc::new(BinaryExpr::new(left, op, right))
}

pub(crate) fn checked_divide(
    left: Arc<dyn PhysicalExpr>,
    right: Arc<dyn PhysicalExpr>,
) -> Arc<dyn PhysicalExpr> {
    Arc::new(BinaryExpr::new(left, Operator::Divide, right).with_fail_on_overflow(true))
}

/// Rows as `a|b|c`, one per row.
pub(crate) fn rows(batch: &RecordBatch) -> Vec<String> {
    let options = FormatOptions::default().with_null("∅");
    let columns: Vec<_> = batch
        .columns()
        .iter()
        .map(|column| ArrayFormatter::try_new(column, &options).unwrap())
        .collect();
    let row = |row| {
        let values: Vec<_> = columns.iter().map(|c| c.value(row).to_string()).collect();
        values.join("|")
    };
    (0..batch.num_rows()).map(row).collect()
}

/// Adds the rows of deltas to a multiset; rows that cancel out are gone.
pub(crate) fn accumulate<'a>(
    into: &mut BTreeMap<String, i64>,
    deltas: impl IntoIterator<Item = &'a Delta>,
) {
    for delta in deltas {
        assert!(!delta.is_empty(), "a delta on an edge is never empty");
        for (at, row) in rows(&delta.batch).into_iter().enumerate() {
            assert_ne!(delta.diffs.get(at), 0, "no diff is zero");
            *into.entry(row).or_default() += delta.diffs.get(at);
        }
    }
    into.retain(|_, diff| *diff != 0);
}

pub(crate) fn consolidated<'a>(
    deltas: impl IntoIterator<Item = &'a Delta>,
) -> BTreeMap<String, i64> {
    let mut all = BTreeMap::new();
    accumulate(&mut all, deltas);
    all
}

/// Parts through their stored form.
pub(crate) fn stored(parts: Vec<Part>) -> Vec<StoredPart> {
    let mut bytes = Vec::new();
    for part in &parts {
        write_part(part, &mut bytes).unwrap();
    }
    let mut bytes = bytes::Bytes::from(bytes);
    let mut read = Vec::new();
    while !bytes.is_empty() {
        let (part, length) = read_part(&bytes).unwrap();
        read.push(part);
        bytes = bytes.slice(length..);
    }
    read
}
