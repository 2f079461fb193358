//! From a batch of changes to a batch of the table's columns.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, Int64Array, RecordBatch, StringArray, UInt32Array};
use arrow::compute::{CastOptions, cast_with_options, take_record_batch};
use arrow::datatypes::{DataType, Field, Schema as ArrowSchema, SchemaRef};
use iceberg::spec::SchemaRef as IcebergSchemaRef;
use millrace_dataflow::delta::Diffs;
use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_dataflow::time::Tick;
use millrace_lake::{TableVersion, schema};

const OP: &str = "op";
const TICK: &str = "tick";

/// A row with a huge diff is written in steps of at most so many copies.
const COPIES_MAX: usize = 1 << 16;

/// Columns that are written for a relation.
pub(super) fn written_columns(columns: &SchemaRef, changelog: bool) -> Result<SchemaRef> {
    if !changelog {
        return Ok(Arc::clone(columns));
    }
    for name in [OP, TICK] {
        if columns.field_with_name(name).is_ok() {
            return Err(Error::invalid(format!(
                "a changelog adds a column \"{name}\", but the relation has one already"
            ))
            .code("42701")
            .hint(format!("give \"{name}\" another name in the query")));
        }
    }
    let mut fields = columns.fields().to_vec();
    fields.push(Arc::new(Field::new(OP, DataType::Utf8, true)));
    fields.push(Arc::new(Field::new(TICK, DataType::Int64, true)));
    Ok(Arc::new(ArrowSchema::new(fields)))
}

#[derive(Debug, Clone, Copy)]
enum Origin {
    Column(usize),
    Op,
    Tick,
}

/// Where each column of the table comes from.
#[derive(Debug)]
pub(super) struct Layout {
    changelog: bool,
    from: Vec<Origin>,
    /// Columns of the files, with field ids.
    pub(super) schema: SchemaRef,
    pub(super) columns: IcebergSchemaRef,
    pub(super) partition_spec: i32,
    pub(super) partition_type: iceberg::spec::StructType,
    /// Where data files go.
    pub(super) location: String,
}

impl Layout {
    /// The table must be compatible with the columns.
    pub(super) fn new(columns: &SchemaRef, table: &TableVersion, changelog: bool) -> Result<Self> {
        let metadata = &table.metadata;
        let schema = schema::to_arrow_with_ids(metadata.current_schema())?;
        let from = schema
            .fields()
            .iter()
            .map(
                |field| match (field.name().as_str(), columns.index_of(field.name())) {
                    (_, Ok(index)) => Ok(Origin::Column(index)),
                    (OP, _) if changelog => Ok(Origin::Op),
                    (TICK, _) if changelog => Ok(Origin::Tick),
                    (name, Err(_)) => Err(Error::internal(format!(
                        "column \"{name}\" comes from nowhere"
                    ))),
                },
            )
            .collect::<Result<_>>()?;
        Ok(Self {
            changelog,
            from,
            schema,
            columns: metadata.current_schema().clone(),
            partition_spec: metadata.default_partition_spec_id(),
            partition_type: metadata.default_partition_type().clone(),
            location: format!("{}/data", metadata.location()),
        })
    }

    /// The rows to write for the changes of a tick, in one or more batches.
    pub(super) fn arrange(
        &self,
        tick: Tick,
        batch: &RecordBatch,
        diffs: &Diffs,
    ) -> Result<Vec<RecordBatch>> {
        let Diffs::Each(each) = diffs else {
            return Ok(vec![self.columns_of(tick, batch, None)?]);
        };
        if !self.changelog && each.iter().any(|diff| *diff < 0) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "the relation retracts rows, but the sink only appends",
            )
            .hint("create the sink WITH (changelog = 'op') to append each change with its sign"));
        }
        let mut batches = vec![];
        let (mut rows, mut signs) = (vec![], vec![]);
        for (row, diff) in each.iter().enumerate() {
            let mut copies = diff.unsigned_abs();
            while copies > 0 {
                let now = copies.min((COPIES_MAX - rows.len()) as u64);
                copies -= now;
                rows.extend(std::iter::repeat_n(row as u32, now as usize));
                signs.extend(std::iter::repeat_n(*diff > 0, now as usize));
                if rows.len() == COPIES_MAX {
                    batches.push(self.repeated(tick, batch, &mut rows, &mut signs)?);
                }
            }
        }
        if !rows.is_empty() {
            batches.push(self.repeated(tick, batch, &mut rows, &mut signs)?);
        }
        Ok(batches)
    }

    fn repeated(
        &self,
        tick: Tick,
        batch: &RecordBatch,
        rows: &mut Vec<u32>,
        signs: &mut Vec<bool>,
    ) -> Result<RecordBatch> {
        let rows = UInt32Array::from(std::mem::take(rows));
        let taken = take_record_batch(batch, &rows)
            .map_err(|e| Error::internal(format!("cannot repeat rows: {e}")))?;
        self.columns_of(tick, &taken, Some(&std::mem::take(signs)))
    }

    fn columns_of(
        &self,
        tick: Tick,
        batch: &RecordBatch,
        signs: Option<&[bool]>,
    ) -> Result<RecordBatch> {
        let rows = batch.num_rows();
        let options = CastOptions {
            safe: false,
            ..CastOptions::default()
        };
        let columns = self
            .from
            .iter()
            .zip(self.schema.fields())
            .map(|(from, field)| -> Result<ArrayRef> {
                let column: ArrayRef = match from {
                    Origin::Column(index) => Arc::clone(batch.column(*index)),
                    Origin::Op => {
                        let sign = |row| {
                            if signs.is_none_or(|s| s[row]) {
                                "+"
                            } else {
                                "-"
                            }
                        };
                        Arc::new(StringArray::from_iter_values((0..rows).map(sign)))
                    }
                    Origin::Tick => Arc::new(Int64Array::from_value(tick as i64, rows)),
                };
                if !field.is_nullable() && column.null_count() > 0 {
                    return Err(Error::invalid(format!(
                        "column \"{}\" is null, but the lake table requires a value",
                        field.name()
                    ))
                    .code("23502")
                    .hint("make the column optional in the table, or remove nulls in the query"));
                }
                if column.data_type() == field.data_type() {
                    return Ok(column);
                }
                cast_with_options(&column, field.data_type(), &options).map_err(|_| {
                    Error::invalid(format!(
                        "a value of column \"{}\" does not fit the lake table",
                        field.name()
                    ))
                    .code("22003")
                })
            })
            .collect::<Result<Vec<_>>>()?;
        RecordBatch::try_new(Arc::clone(&self.schema), columns)
            .map_err(|e| Error::internal(format!("columns do not form a batch: {e}")))
    }
}
