//! Growing columns that can take a row back.
//!
//! A record may fail after some of its fields were stored. Every column can therefore be cut to the
//! rows before it ([`Column::truncate`]); arrow's own builders cannot.
//!
//! # Contract
//!
//! * A kept column holds one value per row; [`Column::rows`] counts them. A column that is only
//!   checked (not `keep`) stores nothing and always has zero rows.

use std::sync::Arc;

use arrow::array::builder::NullBufferBuilder;
use arrow::array::{
    ArrayRef, ArrowPrimitiveType, BinaryArray, BooleanArray, Decimal128Array, ListArray,
    PrimitiveArray, StringArray, StructArray, new_empty_array,
};
use arrow::buffer::{Buffer, NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{
    DataType, Date32Type, Field, FieldRef, Float32Type, Float64Type, Int8Type, Int16Type,
    Int32Type, Int64Type, Time64MicrosecondType, TimeUnit, TimestampMicrosecondType, UInt8Type,
    UInt16Type, UInt32Type, UInt64Type,
};
use millrace_dataflow::error::{Error, Result};

use crate::format::{Reject, type_name, unsupported_type};

pub(crate) mod keys;
pub(crate) mod text;

use keys::Keys;

/// One column, kept or only checked.
#[derive(Debug)]
pub(crate) struct Column {
    pub field: FieldRef,
    pub keep: bool,
    pub values: Values,
    nulls: NullBufferBuilder,
}

/// Values by physical form; the exact type is in the field.
#[derive(Debug)]
pub(crate) enum Values {
    Bool(Vec<bool>),
    /// Signed integers and small unsigned ones, within the given range.
    Int {
        values: Vec<i64>,
        min: i64,
        max: i64,
    },
    UInt(Vec<u64>),
    Float {
        values: Vec<f64>,
        single: bool,
    },
    Decimal {
        values: Vec<i128>,
        precision: u8,
        scale: u8,
    },
    Date(Vec<i32>),
    /// Microseconds since the epoch.
    Timestamp(Vec<i64>),
    /// Microseconds since midnight.
    Time(Vec<i64>),
    Text(Bytes),
    Binary(Bytes),
    /// `+` or `-`.
    Sign(Vec<i64>),
    List {
        offsets: Vec<i32>,
        item: Box<Column>,
    },
    Struct(Object),
}

/// Strings end to end; `offsets` has one entry more than there are strings.
#[derive(Debug)]
pub(crate) struct Bytes {
    pub data: Vec<u8>,
    offsets: Vec<i32>,
}

impl Default for Bytes {
    fn default() -> Self {
        Self {
            data: Vec::new(),
            offsets: vec![0],
        }
    }
}

impl Bytes {
    /// Ends the string that was written to `data`.
    #[inline]
    pub(crate) fn close(&mut self) -> Result<(), Reject> {
        let end = i32::try_from(self.data.len())
            .map_err(|_| Reject::new("text of this batch is larger than 2 GiB"))?;
        self.offsets.push(end);
        Ok(())
    }
    fn truncate(&mut self, rows: usize) {
        self.offsets.truncate(rows + 1);
        self.data.truncate(self.offsets[rows] as usize);
    }
    fn take(&mut self) -> (OffsetBuffer<i32>, Buffer) {
        let taken = std::mem::take(self);
        // The next batch will look like this one.
        self.data.reserve(taken.data.len());
        self.offsets.reserve(taken.offsets.len());
        let offsets = OffsetBuffer::new(ScalarBuffer::from(taken.offsets));
        (offsets, Buffer::from_vec(taken.data))
    }
}

/// Named columns side by side: a record, or a struct inside one.
#[derive(Debug)]
pub(crate) struct Object {
    pub keys: Keys,
    pub columns: Vec<Column>,
}

impl Object {
    pub(crate) fn new<'a>(
        fields: impl Iterator<Item = (&'a FieldRef, bool)>,
        format: &str,
    ) -> Result<Self> {
        let columns = fields
            .map(|(field, keep)| Column::new(field, keep, format))
            .collect::<Result<Vec<_>>>()?;
        let keys = Keys::new(columns.iter().map(|c| c.field.name().as_str()));
        Ok(Self { keys, columns })
    }
    /// One more column; its place.
    pub(crate) fn add(&mut self, column: Column) -> usize {
        self.columns.push(column);
        self.keys = Keys::new(self.columns.iter().map(|c| c.field.name().as_str()));
        self.columns.len() - 1
    }
    pub(crate) fn truncate(&mut self, rows: usize) {
        for column in self.columns.iter_mut().filter(|c| c.keep) {
            column.truncate(rows);
        }
    }
    /// Makes row number `row` complete: NULL where the record had no such field.
    #[inline]
    pub(crate) fn fill(&mut self, row: usize) -> Result<(), Reject> {
        for column in &mut self.columns {
            if column.keep && column.rows() == row {
                column
                    .push_null()
                    .map_err(|reason| column.name_it(reason))?;
            }
        }
        Ok(())
    }
}

impl Column {
    pub(crate) fn new(field: &FieldRef, keep: bool, format: &str) -> Result<Self> {
        let int = |min, max| Values::Int {
            values: Vec::new(),
            min,
            max,
        };
        let values = match field.data_type() {
            DataType::Boolean => Values::Bool(Vec::new()),
            DataType::Int8 => int(i8::MIN.into(), i8::MAX.into()),
            DataType::Int16 => int(i16::MIN.into(), i16::MAX.into()),
            DataType::Int32 => int(i32::MIN.into(), i32::MAX.into()),
            DataType::Int64 => int(i64::MIN, i64::MAX),
            DataType::UInt8 => int(0, u8::MAX.into()),
            DataType::UInt16 => int(0, u16::MAX.into()),
            DataType::UInt32 => int(0, u32::MAX.into()),
            DataType::UInt64 => Values::UInt(Vec::new()),
            DataType::Float32 => Values::Float {
                values: Vec::new(),
                single: true,
            },
            DataType::Float64 => Values::Float {
                values: Vec::new(),
                single: false,
            },
            DataType::Decimal128(precision, scale) if *scale >= 0 => Values::Decimal {
                values: Vec::new(),
                precision: *precision,
                scale: scale.unsigned_abs(),
            },
            DataType::Date32 => Values::Date(Vec::new()),
            DataType::Timestamp(TimeUnit::Microsecond, _) => Values::Timestamp(Vec::new()),
            DataType::Time64(TimeUnit::Microsecond) => Values::Time(Vec::new()),
            DataType::Utf8 => Values::Text(Bytes::default()),
            DataType::Binary => Values::Binary(Bytes::default()),
            DataType::List(item) => Values::List {
                offsets: vec![0],
                item: Box::new(Self::new(item, keep, format)?),
            },
            DataType::Struct(fields) => {
                Values::Struct(Object::new(fields.iter().map(|f| (f, keep)), format)?)
            }
            other => return Err(unsupported_type(field.name(), other, format)),
        };
        Ok(Self {
            field: Arc::clone(field),
            keep,
            values,
            nulls: NullBufferBuilder::new(0),
        })
    }

    /// The field of a changelog that becomes the diffs.
    pub(crate) fn sign(name: &str) -> Self {
        Self {
            field: Arc::new(Field::new(name, DataType::Utf8, false)),
            keep: true,
            values: Values::Sign(Vec::new()),
            nulls: NullBufferBuilder::new(0),
        }
    }

    /// Rows stored so far.
    #[inline]
    pub(crate) fn rows(&self) -> usize {
        self.nulls.len()
    }

    /// Completes a value that was pushed to `values`.
    #[inline]
    pub(crate) fn push_valid(&mut self) {
        self.nulls.append_non_null();
    }

    pub(crate) fn push_null(&mut self) -> Result<(), Reject> {
        if !self.field.is_nullable() {
            return Err(Reject::new("no value, but the column is NOT NULL"));
        }
        if !self.keep {
            return Ok(());
        }
        self.push_default();
        self.nulls.append_null();
        Ok(())
    }

    /// A place holder under a null.
    fn push_default(&mut self) {
        match &mut self.values {
            Values::Bool(v) => v.push(false),
            Values::Int { values: v, .. }
            | Values::Timestamp(v)
            | Values::Time(v)
            | Values::Sign(v) => v.push(0),
            Values::UInt(v) => v.push(0),
            Values::Float { values: v, .. } => v.push(0.0),
            Values::Decimal { values: v, .. } => v.push(0),
            Values::Date(v) => v.push(0),
            Values::Text(bytes) | Values::Binary(bytes) => {
                let end = bytes.offsets[bytes.offsets.len() - 1];
                bytes.data.truncate(end as usize);
                bytes.offsets.push(end);
            }
            Values::List { offsets, .. } => offsets.push(offsets[offsets.len() - 1]),
            Values::Struct(object) => {
                for column in &mut object.columns {
                    column.push_default();
                    column.nulls.append_null();
                }
            }
        }
    }

    /// Takes back all rows from `rows` on, a half-written one included.
    pub(crate) fn truncate(&mut self, rows: usize) {
        match &mut self.values {
            Values::Bool(v) => v.truncate(rows),
            Values::Int { values: v, .. }
            | Values::Timestamp(v)
            | Values::Time(v)
            | Values::Sign(v) => v.truncate(rows),
            Values::UInt(v) => v.truncate(rows),
            Values::Float { values: v, .. } => v.truncate(rows),
            Values::Decimal { values: v, .. } => v.truncate(rows),
            Values::Date(v) => v.truncate(rows),
            Values::Text(bytes) | Values::Binary(bytes) => bytes.truncate(rows),
            Values::List { offsets, item } => {
                offsets.truncate(rows + 1);
                item.truncate(offsets[rows] as usize);
            }
            Values::Struct(object) => object.truncate(rows),
        }
        if self.nulls.len() > rows {
            self.nulls.truncate(rows);
        }
    }

    /// The rows so far as an array; the column is empty afterwards.
    pub(crate) fn finish(&mut self) -> Result<ArrayRef> {
        let nulls = self.nulls.finish();
        let data_type = self.field.data_type().clone();
        let misfit = |e: arrow::error::ArrowError| Error::internal(format!("decoded column: {e}"));
        Ok(match &mut self.values {
            Values::Bool(v) => Arc::new(BooleanArray::new(std::mem::take(v).into(), nulls)),
            Values::Int { values, .. } => {
                let v = renew(values);
                match data_type {
                    DataType::Int8 => narrow::<Int8Type>(&v, nulls, |x| x as i8),
                    DataType::Int16 => narrow::<Int16Type>(&v, nulls, |x| x as i16),
                    DataType::Int32 => narrow::<Int32Type>(&v, nulls, |x| x as i32),
                    DataType::UInt8 => narrow::<UInt8Type>(&v, nulls, |x| x as u8),
                    DataType::UInt16 => narrow::<UInt16Type>(&v, nulls, |x| x as u16),
                    DataType::UInt32 => narrow::<UInt32Type>(&v, nulls, |x| x as u32),
                    _ => primitive::<Int64Type>(v, nulls),
                }
            }
            Values::UInt(values) => primitive::<UInt64Type>(renew(values), nulls),
            Values::Float {
                values,
                single: true,
            } => {
                let v = renew(values).iter().map(|x| *x as f32).collect();
                primitive::<Float32Type>(v, nulls)
            }
            Values::Float { values, .. } => primitive::<Float64Type>(renew(values), nulls),
            Values::Decimal {
                values,
                precision,
                scale,
            } => Arc::new(
                Decimal128Array::new(renew(values).into(), nulls)
                    .with_precision_and_scale(*precision, *scale as i8)
                    .map_err(misfit)?,
            ),
            Values::Date(values) => primitive::<Date32Type>(renew(values), nulls),
            Values::Timestamp(values) => Arc::new(
                PrimitiveArray::<TimestampMicrosecondType>::new(renew(values).into(), nulls)
                    .with_data_type(data_type),
            ),
            Values::Time(values) => primitive::<Time64MicrosecondType>(renew(values), nulls),
            Values::Text(bytes) => {
                let (offsets, data) = bytes.take();
                Arc::new(StringArray::try_new(offsets, data, nulls).map_err(misfit)?)
            }
            Values::Binary(bytes) => {
                let (offsets, data) = bytes.take();
                Arc::new(BinaryArray::try_new(offsets, data, nulls).map_err(misfit)?)
            }
            Values::Sign(values) => primitive::<Int64Type>(renew(values), nulls),
            Values::List { offsets, item } => {
                let offsets = std::mem::replace(offsets, vec![0]);
                let offsets = OffsetBuffer::new(ScalarBuffer::from(offsets));
                let items = item.finish()?;
                let field = Arc::clone(&item.field);
                Arc::new(ListArray::try_new(field, offsets, items, nulls).map_err(misfit)?)
            }
            Values::Struct(object) => {
                let fields = object
                    .columns
                    .iter()
                    .map(|c| Arc::clone(&c.field))
                    .collect();
                let rows = nulls.as_ref().map(NullBuffer::len);
                let columns = object
                    .columns
                    .iter_mut()
                    .map(Self::finish)
                    .collect::<Result<Vec<_>>>()?;
                let rows = rows.or(columns.first().map(|c| c.len()));
                match rows {
                    Some(rows) => Arc::new(
                        StructArray::try_new_with_length(fields, columns, nulls, rows)
                            .map_err(misfit)?,
                    ),
                    None => new_empty_array(&data_type),
                }
            }
        })
    }

    /// Diffs of a sign column.
    pub(crate) fn finish_signs(&mut self) -> Vec<i64> {
        self.nulls.finish();
        match &mut self.values {
            Values::Sign(values) => renew(values),
            _ => Vec::new(),
        }
    }

    /// `reason` with the column's name in front.
    pub(crate) fn name_it(&self, reason: Reject) -> Reject {
        Reject(format!("column \"{}\": {}", self.field.name(), reason.0))
    }

    /// The value cannot be of this column's type.
    #[cold]
    pub(crate) fn expected(&self, found: &str) -> Reject {
        let wanted = match self.values {
            Values::Sign(_) => "\"+\" or \"-\"".to_string(),
            _ => type_name(self.field.data_type()),
        };
        Reject(format!("expected {wanted}, found {found}"))
    }
}

/// Takes the values and leaves room for as many.
fn renew<T>(values: &mut Vec<T>) -> Vec<T> {
    let room = Vec::with_capacity(values.len());
    std::mem::replace(values, room)
}

fn primitive<T: ArrowPrimitiveType>(values: Vec<T::Native>, nulls: Option<NullBuffer>) -> ArrayRef {
    Arc::new(PrimitiveArray::<T>::new(values.into(), nulls))
}

fn narrow<T: ArrowPrimitiveType>(
    values: &[i64],
    nulls: Option<NullBuffer>,
    cast: impl Fn(i64) -> T::Native,
) -> ArrayRef {
    primitive::<T>(values.iter().map(|v| cast(*v)).collect(), nulls)
}
