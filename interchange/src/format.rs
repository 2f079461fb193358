//! What a record format promises: one record after another in, columns out.
//!
//! # Contract
//!
//! * A record is kept whole or rejected whole; a rejected one leaves no trace in the columns.
//! * The types of **all** declared columns are checked, only those of the projection are
//!   materialised. What one reader of a source accepts does not depend on what another one wants.
//! * A reason for a rejection names the column and the expected type, never the value.

use std::fmt;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef, TimeUnit};
use millrace_dataflow::error::{Error, Result};

/// Why a record was rejected, in words, without the value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reject(pub String);

impl Reject {
    pub fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

impl fmt::Display for Reject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which columns a decoder checks, and which it yields.
#[derive(Debug, Clone)]
pub struct Layout {
    /// Declared columns, without the changelog column.
    pub schema: SchemaRef,
    /// Indices into `schema`, in the order of the output.
    pub projection: Vec<usize>,
    /// Name of a field that holds `+` or `-` and becomes the diffs.
    pub changelog: Option<String>,
}

impl Layout {
    /// Columns of the output.
    pub fn projected(&self) -> Result<SchemaRef> {
        let projected = self.schema.project(&self.projection);
        Ok(projected
            .map_err(|e| Error::internal(format!("projection does not fit: {e}")))?
            .into())
    }
}

/// Columns of the records that were kept.
#[derive(Debug)]
pub struct Decoded {
    pub batch: RecordBatch,
    /// +1 or -1 per row, if the layout has a changelog field.
    pub diffs: Option<Vec<i64>>,
}

/// Turns records into columns. See the module contract.
pub trait Decoder: Send {
    /// Takes one record: as a row, or not at all.
    fn push(&mut self, record: &[u8]) -> Result<(), Reject>;
    /// Rows taken since the last `finish`.
    fn rows(&self) -> usize;
    /// Hands out the rows taken so far and begins anew.
    fn finish(&mut self) -> Result<Decoded>;
}

/// The SQL name of a type, for messages.
pub fn type_name(data_type: &DataType) -> String {
    let name = match data_type {
        DataType::Boolean => "BOOLEAN",
        DataType::Int8 => "TINYINT",
        DataType::Int16 => "SMALLINT",
        DataType::Int32 => "INTEGER",
        DataType::Int64 => "BIGINT",
        DataType::UInt8 => "TINYINT UNSIGNED",
        DataType::UInt16 => "SMALLINT UNSIGNED",
        DataType::UInt32 => "INTEGER UNSIGNED",
        DataType::UInt64 => "BIGINT UNSIGNED",
        DataType::Float32 => "REAL",
        DataType::Float64 => "DOUBLE",
        DataType::Decimal128(p, s) => return format!("DECIMAL({p}, {s})"),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => "VARCHAR",
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => "BYTEA",
        DataType::Date32 => "DATE",
        DataType::Timestamp(TimeUnit::Microsecond, None) => "TIMESTAMP",
        DataType::Timestamp(TimeUnit::Microsecond, Some(_)) => "TIMESTAMP WITH TIME ZONE",
        DataType::Time64(TimeUnit::Microsecond) => "TIME",
        DataType::List(item) => return format!("{}[]", type_name(item.data_type())),
        DataType::Struct(_) => "STRUCT",
        other => return other.to_string(),
    };
    name.to_string()
}

/// A column type that a format cannot read.
pub(crate) fn unsupported_type(column: &str, data_type: &DataType, format: &str) -> Error {
    Error::unsupported(format!(
        "column \"{column}\" has type {}, which format \"{format}\" cannot read",
        type_name(data_type)
    ))
    .hint("declare the column as VARCHAR and cast it in a view")
}

/// Records looked at when columns are told from a file.
pub(crate) const INFER_RECORDS: usize = 1000;

/// The columns of a foreign schema in the types the engine uses.
pub(crate) fn settled_schema(schema: &Schema) -> Result<Schema> {
    Ok(Schema::new(settled_fields(schema.fields())?))
}

fn settled_fields(fields: &Fields) -> Result<Vec<Field>> {
    fields
        .iter()
        .map(|field| {
            Ok(Field::new(
                field.name(),
                settled(field.name(), field.data_type())?,
                true,
            ))
        })
        .collect()
}

/// One type for strings, one for bytes, microseconds everywhere.
fn settled(column: &str, data_type: &DataType) -> Result<DataType> {
    Ok(match data_type {
        DataType::Null | DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => {
            DataType::Utf8
        }
        DataType::Binary
        | DataType::LargeBinary
        | DataType::BinaryView
        | DataType::FixedSizeBinary(_) => DataType::Binary,
        DataType::Dictionary(_, values) => settled(column, values)?,
        DataType::Timestamp(_, _) | DataType::Date64 => {
            DataType::Timestamp(TimeUnit::Microsecond, None)
        }
        DataType::Time32(_) | DataType::Time64(_) => DataType::Time64(TimeUnit::Microsecond),
        DataType::Float16 => DataType::Float32,
        DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _) => {
            let items = settled(column, item.data_type())?;
            DataType::List(Arc::new(Field::new("item", items, true)))
        }
        DataType::Struct(fields) => DataType::Struct(settled_fields(fields)?.into()),
        DataType::Boolean | DataType::Date32 | DataType::Decimal128(_, _) => data_type.clone(),
        number if number.is_integer() || number.is_floating() => number.clone(),
        other => {
            return Err(Error::unsupported(format!(
                "column \"{column}\" has type {other}, which cannot be read"
            ))
            .hint("declare the columns of the source, without this one"));
        }
    })
}
