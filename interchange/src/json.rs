//! JSON records into columns, in one pass over the bytes.
//!
//! # Contract
//!
//! * A record is one object, by RFC 8259: valid UTF-8, nothing behind it, at most 128 levels deep. A
//!   name that occurs twice counts with its last value.
//! * A missing field and `null` are NULL; unknown fields are skipped, though they must be valid JSON.
//! * Types are strict: a number is no string and a fraction no integer. Decimals may be numbers or
//!   strings and are never rounded; floats also take `"NaN"`, `"Infinity"` and `"-Infinity"`; dates,
//!   times and timestamps are strings in the forms of [`crate::scalar`]; BYTEA is base64.
//!
//! Values that nobody wants are checked where they stand and never copied. Text without escapes is
//! copied once, into the column. The whole record is validated as UTF-8 up front, which for ASCII
//! costs next to nothing and lets every later step work on bytes.

use std::io::BufRead;

use arrow::array::{RecordBatch, RecordBatchOptions};
use arrow::datatypes::{Schema, SchemaRef};
use millrace_dataflow::error::{Error, Result};

use crate::column::{Column, Object, Values};
use crate::format::{Decoded, Decoder, INFER_RECORDS, Layout, Reject, settled_schema};

mod scan;
#[cfg(test)]
mod tests;

use scan::{DEPTH_MAX, Scan};

/// A decoder of JSON records.
pub fn decoder(layout: &Layout) -> Result<Box<dyn Decoder>> {
    Ok(Box::new(JsonDecoder::new(layout)?))
}

/// Columns of a file of JSON lines as its first records suggest.
pub fn infer(file: impl BufRead) -> Result<Schema> {
    let (schema, _) =
        arrow::json::reader::infer_json_schema(file, Some(INFER_RECORDS)).map_err(|e| {
            Error::invalid("columns cannot be told from the JSON file").detail(e.to_string())
        })?;
    settled_schema(&schema)
}

struct JsonDecoder {
    record: Object,
    rows: usize,
    output: SchemaRef,
    projection: Vec<usize>,
    /// Place of the changelog field, behind the declared columns.
    sign: Option<usize>,
    /// Text with its escapes resolved, when it is not stored as it is.
    scratch: Vec<u8>,
}

impl JsonDecoder {
    fn new(layout: &Layout) -> Result<Self> {
        let wanted = |i: usize| layout.projection.contains(&i);
        let fields = layout
            .schema
            .fields()
            .iter()
            .enumerate()
            .map(|(i, f)| (f, wanted(i)));
        let mut record = Object::new(fields, "json")?;
        let sign = layout
            .changelog
            .as_ref()
            .map(|name| record.add(Column::sign(name)));
        Ok(Self {
            record,
            rows: 0,
            output: layout.projected()?,
            projection: layout.projection.clone(),
            sign,
            scratch: Vec::new(),
        })
    }

    fn decode(&mut self, text: &[u8]) -> Result<(), Reject> {
        if text.is_empty() {
            return Err(Reject::new("empty record"));
        }
        if std::str::from_utf8(text).is_err() {
            return Err(Reject::new("not valid UTF-8"));
        }
        let mut scan = Scan::new(text);
        scan.space();
        if scan.peek() != Some(b'{') {
            return Err(Reject::new("not a JSON object"));
        }
        object(&mut scan, &mut self.record, self.rows, 0, &mut self.scratch)?;
        scan.space();
        match scan.peek() {
            None => Ok(()),
            Some(_) => Err(scan.error("something follows the object")),
        }
    }
}

impl Decoder for JsonDecoder {
    fn push(&mut self, record: &[u8]) -> Result<(), Reject> {
        match self.decode(record) {
            Ok(()) => {
                self.rows += 1;
                Ok(())
            }
            Err(reason) => {
                self.record.truncate(self.rows);
                Err(reason)
            }
        }
    }

    fn rows(&self) -> usize {
        self.rows
    }

    fn finish(&mut self) -> Result<Decoded> {
        finish(
            &mut self.record,
            &mut self.rows,
            &self.output,
            &self.projection,
            self.sign,
        )
    }
}

/// The rows of a record's columns as a batch; shared with CSV.
pub(crate) fn finish(
    record: &mut Object,
    rows: &mut usize,
    output: &SchemaRef,
    projection: &[usize],
    sign: Option<usize>,
) -> Result<Decoded> {
    let diffs = sign.map(|sign| record.columns[sign].finish_signs());
    let mut arrays = vec![None; record.columns.len()];
    for column in projection {
        if arrays[*column].is_none() {
            arrays[*column] = Some(record.columns[*column].finish()?);
        }
    }
    let columns = projection
        .iter()
        .filter_map(|column| arrays[*column].clone())
        .collect();
    let options = RecordBatchOptions::new().with_row_count(Some(std::mem::take(rows)));
    let batch = RecordBatch::try_new_with_options(SchemaRef::clone(output), columns, &options)
        .map_err(|e| Error::internal(format!("decoded columns do not fit: {e}")))?;
    Ok(Decoded { batch, diffs })
}

/// An object into the columns of `target`, as row `row`.
fn object(
    scan: &mut Scan<'_>,
    target: &mut Object,
    row: usize,
    depth: usize,
    scratch: &mut Vec<u8>,
) -> Result<(), Reject> {
    if depth >= DEPTH_MAX {
        return Err(scan.error("nested too deeply"));
    }
    scan.step();
    scan.space();
    if scan.peek() == Some(b'}') {
        scan.step();
        return target.fill(row);
    }
    let mut place = 0;
    loop {
        match key(scan, target, place, scratch)? {
            Some(i) => {
                let column = &mut target.columns[i];
                // The name was there before: the last one wins.
                if column.keep && column.rows() > row {
                    column.truncate(row);
                }
                value(scan, column, depth + 1, scratch).map_err(|r| column.name_it(r))?;
            }
            None => scan.skip_value(depth + 1)?,
        }
        place += 1;
        scan.space();
        match scan.next() {
            Some(b',') => scan.space(),
            Some(b'}') => return target.fill(row),
            _ => return Err(scan.error("expected \",\" or \"}\"")),
        }
    }
}

/// A field name and its colon; the column it belongs to, if any.
#[inline]
fn key(
    scan: &mut Scan<'_>,
    target: &mut Object,
    place: usize,
    scratch: &mut Vec<u8>,
) -> Result<Option<usize>, Reject> {
    if scan.next() != Some(b'"') {
        return Err(scan.error("expected a field name"));
    }
    let column = match target.keys.guess(place, scan.rest()) {
        Some((length, column)) => {
            scan.advance(length + 1);
            column
        }
        None => {
            let text = scan.string()?;
            if text.escaped {
                scratch.clear();
                scan.unescape(text, scratch)?;
                target.keys.find(place, scratch, false)
            } else {
                target.keys.find(place, scan.slice(text), true)
            }
        }
    };
    scan.space();
    if scan.next() != Some(b':') {
        return Err(scan.error("expected \":\""));
    }
    scan.space();
    Ok(column)
}

/// A value into a column.
#[inline]
fn value(
    scan: &mut Scan<'_>,
    column: &mut Column,
    depth: usize,
    scratch: &mut Vec<u8>,
) -> Result<(), Reject> {
    match scan.peek() {
        Some(b'"') => {
            scan.step();
            let text = scan.string()?;
            if let Values::Text(bytes) = &mut column.values {
                if column.keep {
                    if text.escaped {
                        scan.unescape(text, &mut bytes.data)?;
                    } else {
                        bytes.data.extend_from_slice(scan.slice(text));
                    }
                    bytes.close()?;
                    column.push_valid();
                } else if text.escaped {
                    scratch.clear();
                    scan.unescape(text, scratch)?;
                }
                return Ok(());
            }
            if !text.escaped {
                return column.push_quoted(scan.slice(text));
            }
            scratch.clear();
            scan.unescape(text, scratch)?;
            column.push_quoted(scratch)
        }
        Some(b'-' | b'0'..=b'9') => number(scan, column),
        Some(b'n') => {
            scan.literal(b"null")?;
            column.push_null()
        }
        Some(b't') => {
            scan.literal(b"true")?;
            column.push_bool(true)
        }
        Some(b'f') => {
            scan.literal(b"false")?;
            column.push_bool(false)
        }
        Some(b'{') => {
            let row = column.rows();
            let Values::Struct(target) = &mut column.values else {
                return Err(column.expected("an object"));
            };
            object(scan, target, row, depth, scratch)?;
            if column.keep {
                column.push_valid();
            }
            Ok(())
        }
        Some(b'[') => list(scan, column, depth, scratch),
        _ => Err(scan.error("expected a value")),
    }
}

#[inline]
fn number(scan: &mut Scan<'_>, column: &mut Column) -> Result<(), Reject> {
    if let Values::Int { .. } | Values::UInt(_) = column.values {
        let (negative, magnitude) = scan.integer()?;
        if let Some(b'.' | b'e' | b'E') = scan.peek() {
            return Err(column.expected("a number with a fraction or exponent"));
        }
        return column.push_integer(negative, magnitude);
    }
    let text = scan.number()?;
    if let Values::Decimal { .. } = column.values {
        return column.push_decimal(scan.slice(text));
    }
    let digits = std::str::from_utf8(scan.slice(text)).expect("a number is ASCII");
    column.push_float(digits)
}

fn list(
    scan: &mut Scan<'_>,
    column: &mut Column,
    depth: usize,
    scratch: &mut Vec<u8>,
) -> Result<(), Reject> {
    if depth >= DEPTH_MAX {
        return Err(scan.error("nested too deeply"));
    }
    let Values::List { offsets, item } = &mut column.values else {
        return Err(column.expected("an array"));
    };
    scan.step();
    scan.space();
    if scan.peek() == Some(b']') {
        scan.step();
    } else {
        loop {
            value(scan, item, depth + 1, scratch)?;
            scan.space();
            match scan.next() {
                Some(b',') => scan.space(),
                Some(b']') => break,
                _ => return Err(scan.error("expected \",\" or \"]\"")),
            }
        }
    }
    if column.keep {
        let end = i32::try_from(item.rows()).map_err(|_| Reject::new("array is too long"))?;
        offsets.push(end);
        column.push_valid();
    }
    Ok(())
}
