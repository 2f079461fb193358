//! Parquet files into columns: projection, names, types.
//!
//! # Contract
//!
//! * Declared columns are found by name and may have any type that converts without loss (`INTEGER`
//!   for a declared `BIGINT`, any unit for a timestamp). A missing or misfitting column is an error
//!   when the file is opened, whether it is wanted or not.
//! * Reading can begin at any row; row groups before it are not touched.

use std::fs::File;
use std::path::{Path, PathBuf};

use arrow::array::{ArrayRef, AsArray, BooleanArray, RecordBatch, RecordBatchOptions};
use arrow::compute::{CastOptions, cast_with_options, filter_record_batch};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::error::ArrowError;
use millrace_dataflow::error::{Error, ErrorKind, Result};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};

use crate::format::{Decoded, Layout, settled_schema, type_name};

/// The rows of one file from some row on.
pub struct ParquetRows {
    path: PathBuf,
    reader: ParquetRecordBatchReader,
    output: SchemaRef,
    projection: Vec<String>,
    changelog: Option<String>,
    /// Rows in the whole file.
    pub total: u64,
}

/// Some consecutive rows.
pub struct ParquetChunk {
    pub decoded: Decoded,
    /// Rows of the file, the rejected ones included.
    pub rows: usize,
    /// Rows whose changelog field is neither `+` nor `-`: place in the chunk, and the row as JSON.
    pub rejected: Vec<(usize, Vec<u8>)>,
}

/// Columns of a file, in the types the engine uses.
pub fn infer(path: &Path) -> Result<Schema> {
    settled_schema(open_file(path)?.schema())
}

/// Opens a file at row `skip`.
pub fn open(path: &Path, layout: &Layout, skip: u64, batch_rows: usize) -> Result<ParquetRows> {
    let builder = open_file(path)?;
    let total = u64::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or(0);
    check_columns(path, builder.schema(), layout)?;
    let mut names: Vec<String> = layout
        .projection
        .iter()
        .map(|i| layout.schema.field(*i).name().clone())
        .collect();
    let projection = names.clone();
    names.extend(layout.changelog.clone());
    let roots = builder.schema().fields().iter().enumerate();
    let wanted = roots
        .filter(|(_, f)| names.contains(f.name()))
        .map(|(i, _)| i);
    let mask = ProjectionMask::roots(builder.parquet_schema(), wanted.collect::<Vec<_>>());
    let reader = builder
        .with_projection(mask)
        .with_offset(usize::try_from(skip).unwrap_or(usize::MAX))
        .with_batch_size(batch_rows)
        .build()
        .map_err(|e| damaged(path, &e.to_string()))?;
    Ok(ParquetRows {
        path: path.to_path_buf(),
        reader,
        output: layout.projected()?,
        projection,
        changelog: layout.changelog.clone(),
        total,
    })
}

impl ParquetRows {
    /// The next rows; `None` at the end of the file.
    pub fn next_chunk(&mut self) -> Result<Option<ParquetChunk>> {
        match self.reader.next() {
            None => Ok(None),
            Some(Err(e)) => Err(damaged(&self.path, &e.to_string())),
            Some(Ok(batch)) => self
                .convert(&batch)
                .map(Some)
                .map_err(|e| damaged(&self.path, &e.to_string())),
        }
    }

    fn convert(&self, batch: &RecordBatch) -> Result<ParquetChunk, ArrowError> {
        let column = |name: &str, to: &DataType| -> Result<ArrayRef, ArrowError> {
            let column = batch.column_by_name(name).ok_or_else(|| {
                ArrowError::SchemaError(format!("column \"{name}\" is not there"))
            })?;
            cast_with_options(
                column,
                to,
                &CastOptions {
                    safe: false,
                    ..Default::default()
                },
            )
        };
        let wanted = self.projection.iter().zip(self.output.fields());
        let columns = wanted.map(|(name, field)| column(name, field.data_type()));
        let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
        let rows = RecordBatch::try_new_with_options(
            SchemaRef::clone(&self.output),
            columns.collect::<Result<Vec<_>, _>>()?,
            &options,
        )?;
        let Some(changelog) = &self.changelog else {
            let decoded = Decoded {
                batch: rows,
                diffs: None,
            };
            return Ok(ParquetChunk {
                decoded,
                rows: batch.num_rows(),
                rejected: Vec::new(),
            });
        };
        let signs = column(changelog, &DataType::Utf8)?;
        let signs = signs.as_string::<i32>();
        let diffs: Vec<Option<i64>> = signs.iter().map(sign).collect();
        let keep: BooleanArray = diffs.iter().map(|d| Some(d.is_some())).collect();
        let rejected = diffs
            .iter()
            .enumerate()
            .filter(|(_, diff)| diff.is_none())
            .map(|(row, _)| Ok((row, as_json(&batch.slice(row, 1))?)))
            .collect::<Result<Vec<_>, ArrowError>>()?;
        let batch_rows = batch.num_rows();
        let batch = if rejected.is_empty() {
            rows
        } else {
            filter_record_batch(&rows, &keep)?
        };
        let decoded = Decoded {
            batch,
            diffs: Some(diffs.into_iter().flatten().collect()),
        };
        Ok(ParquetChunk {
            decoded,
            rows: batch_rows,
            rejected,
        })
    }
}

fn sign(text: Option<&str>) -> Option<i64> {
    match text {
        Some("+") => Some(1),
        Some("-") => Some(-1),
        _ => None,
    }
}

/// A row in a form that can be kept and read.
fn as_json(row: &RecordBatch) -> Result<Vec<u8>, ArrowError> {
    let mut writer = arrow::json::LineDelimitedWriter::new(Vec::new());
    writer.write(row)?;
    writer.finish()?;
    let mut bytes = writer.into_inner();
    bytes.pop_if(|b| *b == b'\n');
    Ok(bytes)
}

fn open_file(path: &Path) -> Result<ParquetRecordBatchReaderBuilder<File>> {
    let file = File::open(path).map_err(|e| {
        let kind = match e.kind() {
            std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            std::io::ErrorKind::PermissionDenied => ErrorKind::Denied,
            _ => ErrorKind::Unavailable,
        };
        Error::new(
            kind,
            format!("file \"{}\" cannot be opened: {e}", path.display()),
        )
    })?;
    ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| damaged(path, &e.to_string()))
}

fn damaged(path: &Path, detail: &str) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("file \"{}\" cannot be read as Parquet", path.display()),
    )
    .detail(detail)
}

/// Every declared column is there, in a type that converts without loss.
fn check_columns(path: &Path, file: &Schema, layout: &Layout) -> Result<()> {
    let sign = layout
        .changelog
        .as_ref()
        .map(|name| Field::new(name, DataType::Utf8, true));
    for declared in layout
        .schema
        .fields()
        .iter()
        .map(|f| f.as_ref())
        .chain(sign.as_ref())
    {
        let name = declared.name();
        let Ok(found) = file.field_with_name(name) else {
            let names: Vec<_> = file
                .fields()
                .iter()
                .map(|f| format!("\"{}\"", f.name()))
                .collect();
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("column \"{name}\" is not in file \"{}\"", path.display()),
            )
            .code("42703")
            .hint(format!("its columns are {}", names.join(", "))));
        };
        if !lossless(found.data_type(), declared.data_type()) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "column \"{name}\" is declared as {} but is {} in file \"{}\"",
                    type_name(declared.data_type()),
                    type_name(found.data_type()),
                    path.display()
                ),
            )
            .code("42804")
            .hint("declare the type that the file has, and cast in a view"));
        }
    }
    Ok(())
}

/// Whether every value of `from` is one of `to`.
fn lossless(from: &DataType, to: &DataType) -> bool {
    use DataType as T;
    if from == to {
        return true;
    }
    match (from, to) {
        (T::Dictionary(_, values), to) => lossless(values, to),
        (T::Null, _) => true,
        (T::Utf8 | T::LargeUtf8 | T::Utf8View, T::Utf8) => true,
        (T::Binary | T::LargeBinary | T::BinaryView | T::FixedSizeBinary(_), T::Binary) => true,
        (T::Timestamp(_, _), T::Timestamp(_, _)) | (T::Date64, T::Timestamp(_, None)) => true,
        (T::Time32(_) | T::Time64(_), T::Time64(_)) => true,
        (T::Float16, T::Float32 | T::Float64) | (T::Float32, T::Float64) => true,
        (T::Decimal128(p, s), T::Decimal128(to_p, to_s)) => {
            to_s >= s && i16::from(*to_p) - i16::from(*to_s) >= i16::from(*p) - i16::from(*s)
        }
        (T::List(a) | T::LargeList(a) | T::FixedSizeList(a, _), T::List(b)) => {
            lossless(a.data_type(), b.data_type())
        }
        (T::Struct(a), T::Struct(b)) => {
            a.len() == b.len()
                && a.iter()
                    .zip(b)
                    .all(|(a, b)| a.name() == b.name() && lossless(a.data_type(), b.data_type()))
        }
        (from, to) if from.is_integer() => integer_fits(from, to),
        _ => false,
    }
}

fn integer_fits(from: &DataType, to: &DataType) -> bool {
    let bits = from.primitive_width().unwrap_or(8) * 8;
    match to {
        DataType::Decimal128(p, s) => {
            // Digits of the largest value of 8, 16, 32 and 64 bits.
            let digits = [3, 5, 10, 20][bits.ilog2() as usize - 3];
            i16::from(*p) - i16::from(*s) >= digits
        }
        DataType::Float64 => bits <= 32,
        DataType::Float32 => bits <= 16,
        to if to.is_integer() => {
            let wide = to.primitive_width().unwrap_or(0) * 8;
            match (from.is_signed_integer(), to.is_signed_integer()) {
                (true, false) => false,
                (false, true) => wide > bits,
                _ => wide >= bits,
            }
        }
        _ => false,
    }
}

/// The reader within has no useful form.
impl std::fmt::Debug for ParquetRows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ParquetRows")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{Int32Array, StringArray, TimestampMillisecondArray};
    use arrow::datatypes::{Int64Type, TimeUnit};
    use parquet::arrow::ArrowWriter;
    use parquet::file::properties::WriterProperties;

    use super::*;

    fn file() -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let batch = RecordBatch::try_from_iter([
            (
                "id",
                Arc::new(Int32Array::from_iter_values(0..10)) as ArrayRef,
            ),
            (
                "at",
                Arc::new(TimestampMillisecondArray::from_iter_values(0..10)) as ArrayRef,
            ),
            (
                "op",
                Arc::new(StringArray::from_iter_values(
                    "+++-+?++-+".chars().map(String::from),
                )) as _,
            ),
        ]);
        let batch = batch.unwrap();
        let properties = WriterProperties::builder()
            .set_max_row_group_row_count(Some(3))
            .build();
        let mut writer =
            ArrowWriter::try_new(file.reopen().unwrap(), batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        file
    }

    fn layout() -> Layout {
        Layout {
            schema: Arc::new(Schema::new(vec![
                Field::new("at", DataType::Timestamp(TimeUnit::Microsecond, None), true),
                Field::new("id", DataType::Int64, true),
            ])),
            projection: vec![1],
            changelog: None,
        }
    }

    #[test]
    fn rows_from_any_place_by_name() {
        let file = file();
        let mut rows = open(file.path(), &layout(), 4, 4).unwrap();
        assert_eq!(rows.total, 10);
        let mut ids = Vec::new();
        while let Some(chunk) = rows.next_chunk().unwrap() {
            ids.extend_from_slice(
                chunk
                    .decoded
                    .batch
                    .column(0)
                    .as_primitive::<Int64Type>()
                    .values(),
            );
        }
        assert_eq!(ids, [4, 5, 6, 7, 8, 9]);
        assert!(
            open(file.path(), &layout(), 10, 4)
                .unwrap()
                .next_chunk()
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn signs_become_diffs() {
        let file = file();
        let layout = Layout {
            changelog: Some("op".into()),
            ..layout()
        };
        let mut rows = open(file.path(), &layout, 3, 10).unwrap();
        let mut diffs = Vec::new();
        let mut rejected = Vec::new();
        let mut before = 3;
        while let Some(chunk) = rows.next_chunk().unwrap() {
            assert_eq!(chunk.decoded.batch.num_columns(), 1);
            assert_eq!(
                chunk.decoded.batch.num_rows() + chunk.rejected.len(),
                chunk.rows
            );
            diffs.extend(chunk.decoded.diffs.unwrap());
            rejected.extend(
                chunk
                    .rejected
                    .into_iter()
                    .map(|(row, json)| (before + row, json)),
            );
            before += chunk.rows;
        }
        assert_eq!(diffs, [-1, 1, 1, 1, -1, 1]);
        assert_eq!(rejected, [(5, br#"{"id":5,"op":"?"}"#.to_vec())]);
    }

    #[test]
    fn misfits_are_errors_when_opened() {
        let file = file();
        let with = |name: &str, data_type| Layout {
            schema: Arc::new(Schema::new(vec![Field::new(name, data_type, true)])),
            projection: vec![],
            changelog: None,
        };
        let missing = open(file.path(), &with("other", DataType::Int64), 0, 4).unwrap_err();
        assert!(
            missing
                .message
                .starts_with("column \"other\" is not in file"),
            "{missing}"
        );
        let narrow = open(file.path(), &with("id", DataType::Int16), 0, 4).unwrap_err();
        assert!(
            narrow
                .message
                .contains("declared as SMALLINT but is INTEGER"),
            "{narrow}"
        );
        let text = open(file.path(), &with("id", DataType::Utf8), 0, 4).unwrap_err();
        assert_eq!(text.code, "42804");
        let none = open(Path::new("/nowhere/x.parquet"), &layout(), 0, 4).unwrap_err();
        assert_eq!(none.kind, ErrorKind::NotFound);
    }

    #[test]
    fn inferred_types_are_the_engines() {
        let schema = infer(file().path()).unwrap();
        let at = schema.field_with_name("at").unwrap().data_type();
        assert_eq!(at, &DataType::Timestamp(TimeUnit::Microsecond, None));
    }
}
