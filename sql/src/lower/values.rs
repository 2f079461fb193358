//! Constant rows.

use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, RecordBatchOptions};
use arrow::compute::concat;
use arrow::datatypes::Schema;
use datafusion::common::DFSchema;
use datafusion::logical_expr::{EmptyRelation, Values};
use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::plan::Op;

use super::{Lowering, Stream, arrow_schema};
use crate::bind::physical_expr;
use crate::error::planning;

impl Lowering<'_> {
    pub(super) fn empty(&mut self, empty: &EmptyRelation) -> Result<Stream> {
        let schema = arrow_schema(&empty.schema);
        let rows = if empty.produce_one_row {
            one_row()?
        } else {
            RecordBatch::new_empty(Arc::clone(&schema))
        };
        let width = schema.fields().len();
        let node = self.push(Op::Values { rows }, schema, true);
        Ok(Stream {
            node,
            events: vec![None; width],
        })
    }

    pub(super) fn values(&mut self, values: &Values) -> Result<Stream> {
        let schema = arrow_schema(&values.schema);
        let row = one_row()?;
        let scope = DFSchema::empty();
        let mut columns: Vec<Vec<ArrayRef>> = vec![Vec::new(); schema.fields().len()];
        for exprs in &values.values {
            for (column, expr) in columns.iter_mut().zip(exprs) {
                let value = physical_expr(expr, &scope)?
                    .evaluate(&row)
                    .and_then(|v| v.into_array(1))
                    .map_err(|e| planning(e).0)?;
                column.push(value);
            }
        }
        let mut arrays = Vec::with_capacity(columns.len());
        for (column, field) in columns.iter().zip(schema.fields()) {
            let parts: Vec<&dyn arrow::array::Array> = column.iter().map(AsRef::as_ref).collect();
            let array = concat(&parts)
                .and_then(|a| arrow::compute::cast(&a, field.data_type()))
                .map_err(|e| Error::invalid(crate::error::clean(&e.to_string())))?;
            arrays.push(array);
        }
        let rows = RecordBatch::try_new(Arc::clone(&schema), arrays)
            .map_err(|e| Error::internal(e.to_string()))?;
        let width = schema.fields().len();
        let node = self.push(Op::Values { rows }, schema, true);
        Ok(Stream {
            node,
            events: vec![None; width],
        })
    }
}

/// One row without columns, over which a constant has one value.
fn one_row() -> Result<RecordBatch> {
    let options = RecordBatchOptions::new().with_row_count(Some(1));
    RecordBatch::try_new_with_options(Arc::new(Schema::empty()), Vec::new(), &options)
        .map_err(|e| Error::internal(e.to_string()))
}
