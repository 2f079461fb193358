//! CSV records (RFC 4180) into columns.
//!
//! # Contract
//!
//! * With a header, fields are matched to columns by name and other fields are ignored; without one,
//!   by position. A record with another number of fields than the header (or the columns) is
//!   rejected alone.
//! * An empty field is NULL; a quoted empty field (`""`) is the empty string for VARCHAR and NULL
//!   otherwise. Values have the text forms of [`crate::scalar`]; booleans are `true`, `false`, `t`,
//!   `f` in any case; BYTEA is base64.
//! * A quote inside an unquoted field stands for itself; text after a closing quote is an error.

use std::io::Read;

use arrow::datatypes::{DataType, Schema, SchemaRef};
use millrace_dataflow::error::{Error, ErrorKind, Result};

use crate::column::{Column, Object, Values};
use crate::format::{
    Decoded, Decoder, INFER_RECORDS, Layout, Reject, settled_schema, unsupported_type,
};
use crate::frame::find;
use crate::json;

/// How a CSV file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CsvOptions {
    /// The first record names the fields.
    pub header: bool,
    /// Without a header: the place of the changelog field among the fields; last if not given.
    pub sign_at: Option<usize>,
    pub delimiter: u8,
}

impl Default for CsvOptions {
    fn default() -> Self {
        Self {
            header: true,
            sign_at: None,
            delimiter: b',',
        }
    }
}

/// A decoder of CSV records. `header` is the first record of the file if the options say it has one.
pub fn decoder(
    layout: &Layout,
    options: CsvOptions,
    header: Option<&[u8]>,
) -> Result<Box<dyn Decoder>> {
    Ok(Box::new(CsvDecoder::new(layout, options, header)?))
}

/// The fields of a record as text, for a header.
pub fn fields(record: &[u8], delimiter: u8) -> Result<Vec<String>> {
    let mut scratch = Vec::new();
    let mut names = Vec::new();
    let mut rest = Some(record);
    while let Some(text) = rest {
        let (field, next) = split(text, delimiter, &mut scratch)
            .map_err(|reason| Error::invalid(format!("CSV header cannot be read: {reason}")))?;
        names.push(String::from_utf8_lossy(field.text).trim().to_string());
        rest = next;
    }
    Ok(names)
}

/// Columns of a file as its first records suggest.
pub fn infer(file: impl Read, options: CsvOptions) -> Result<Schema> {
    let format = arrow::csv::reader::Format::default()
        .with_header(options.header)
        .with_delimiter(options.delimiter);
    let (schema, _) = format
        .infer_schema(file, Some(INFER_RECORDS))
        .map_err(|e| {
            Error::invalid("columns cannot be told from the CSV file").detail(e.to_string())
        })?;
    settled_schema(&schema)
}

struct CsvDecoder {
    record: Object,
    rows: usize,
    output: SchemaRef,
    projection: Vec<usize>,
    sign: Option<usize>,
    delimiter: u8,
    /// Column of each field of a record.
    places: Vec<Option<usize>>,
    scratch: Vec<u8>,
}

/// One field; `text` has its quotes resolved.
struct CsvField<'a> {
    text: &'a [u8],
    quoted: bool,
}

impl CsvDecoder {
    fn new(layout: &Layout, options: CsvOptions, header: Option<&[u8]>) -> Result<Self> {
        for field in layout.schema.fields() {
            if let DataType::List(_) | DataType::Struct(_) = field.data_type() {
                return Err(unsupported_type(field.name(), field.data_type(), "csv"));
            }
        }
        let wanted = |i: usize| layout.projection.contains(&i);
        let fields = layout
            .schema
            .fields()
            .iter()
            .enumerate()
            .map(|(i, f)| (f, wanted(i)));
        let mut record = Object::new(fields, "csv")?;
        let sign = layout
            .changelog
            .as_ref()
            .map(|name| record.add(Column::sign(name)));
        let places = match header {
            Some(header) => by_name(&record, &self::fields(header, options.delimiter)?)?,
            None => {
                let mut places: Vec<_> = (0..record.columns.len()).map(Some).collect();
                if let (Some(_), Some(at)) = (sign, options.sign_at) {
                    let last = places.pop().flatten();
                    places.insert(at.min(places.len()), last);
                }
                places
            }
        };
        Ok(Self {
            record,
            rows: 0,
            output: layout.projected()?,
            projection: layout.projection.clone(),
            sign,
            delimiter: options.delimiter,
            places,
            scratch: Vec::new(),
        })
    }

    fn decode(&mut self, record: &[u8]) -> Result<(), Reject> {
        let wrong_count = || Reject(format!("expected {} fields", self.places.len()));
        let mut rest = Some(record);
        for place in &self.places {
            let text = rest.ok_or_else(wrong_count)?;
            let (field, next) = split(text, self.delimiter, &mut self.scratch)?;
            rest = next;
            if let Some(place) = place {
                let column = &mut self.record.columns[*place];
                push(column, &field).map_err(|reason| column.name_it(reason))?;
            }
        }
        if rest.is_some() {
            Err(wrong_count())
        } else {
            self.record.fill(self.rows)
        }
    }
}

impl Decoder for CsvDecoder {
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
        json::finish(
            &mut self.record,
            &mut self.rows,
            &self.output,
            &self.projection,
            self.sign,
        )
    }
}

/// The column of each named field; every column must be there.
fn by_name(record: &Object, names: &[String]) -> Result<Vec<Option<usize>>> {
    for column in &record.columns {
        let name = column.field.name();
        if !names.iter().any(|n| n == name) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("column \"{name}\" is not in the header of the CSV file"),
            )
            .code("42703")
            .hint(format!(
                "the header names {}; a file without a header needs header = 'false'",
                names
                    .iter()
                    .map(|n| format!("\"{n}\""))
                    .collect::<Vec<_>>()
                    .join(", ")
            )));
        }
    }
    let place = |name: &String| record.columns.iter().position(|c| c.field.name() == name);
    Ok(names.iter().map(place).collect())
}

/// The first field of `text`, and what follows its delimiter.
fn split<'t: 's, 's>(
    text: &'t [u8],
    delimiter: u8,
    scratch: &'s mut Vec<u8>,
) -> Result<(CsvField<'s>, Option<&'t [u8]>), Reject> {
    let Some(inner) = text.strip_prefix(b"\"") else {
        let end = find(text, delimiter);
        let (field, rest) = match end {
            Some(end) => (&text[..end], Some(&text[end + 1..])),
            None => (text, None),
        };
        return Ok((
            CsvField {
                text: field,
                quoted: false,
            },
            rest,
        ));
    };
    scratch.clear();
    let mut rest = inner;
    loop {
        let quote = find(rest, b'"');
        let quote = quote.ok_or_else(|| Reject::new("quoted field without an end"))?;
        scratch.extend_from_slice(&rest[..quote]);
        rest = &rest[quote + 1..];
        match rest.first() {
            Some(b'"') => {
                scratch.push(b'"');
                rest = &rest[1..];
            }
            None => {
                return Ok((
                    CsvField {
                        text: scratch,
                        quoted: true,
                    },
                    None,
                ));
            }
            Some(b) if *b == delimiter => {
                return Ok((
                    CsvField {
                        text: scratch,
                        quoted: true,
                    },
                    Some(&rest[1..]),
                ));
            }
            Some(_) => return Err(Reject::new("text behind a closing quote")),
        }
    }
}

fn push(column: &mut Column, field: &CsvField<'_>) -> Result<(), Reject> {
    let is_text = matches!(column.values, Values::Text(_));
    if field.text.is_empty() && !(field.quoted && is_text) {
        return column.push_null();
    }
    let text = std::str::from_utf8(field.text).map_err(|_| Reject::new("not valid UTF-8"))?;
    match &column.values {
        Values::Bool(_) if text.eq_ignore_ascii_case("true") || text.eq_ignore_ascii_case("t") => {
            column.push_bool(true)
        }
        Values::Bool(_) if text.eq_ignore_ascii_case("false") || text.eq_ignore_ascii_case("f") => {
            column.push_bool(false)
        }
        Values::Int { .. } | Values::UInt(_) => {
            let (negative, digits) = match text.strip_prefix('-') {
                Some(digits) => (true, digits),
                None => (false, text.strip_prefix('+').unwrap_or(text)),
            };
            if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
                return Err(column.expected("text that is not an integer"));
            }
            column.push_integer(negative, digits.parse().ok())
        }
        Values::Float { .. } if !matches!(text, "NaN" | "Infinity" | "-Infinity") => {
            column.push_float(text)
        }
        _ => column.push_quoted(field.text),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::AsArray;
    use arrow::datatypes::{Field, Float64Type, Int32Type, TimeUnit};

    use super::*;

    fn layout() -> Layout {
        Layout {
            schema: Arc::new(Schema::new(vec![
                Field::new("id", DataType::Int32, true),
                Field::new("name", DataType::Utf8, true),
                Field::new("score", DataType::Float64, true),
                Field::new("at", DataType::Timestamp(TimeUnit::Microsecond, None), true),
                Field::new("ok", DataType::Boolean, true),
            ])),
            projection: vec![1, 0, 2],
            changelog: None,
        }
    }

    #[test]
    fn bad_records_are_rejected_alone() {
        let header = b"at,id,\"na\"\"me\",name,score,ok";
        let mut decoder = CsvDecoder::new(&layout(), CsvOptions::default(), Some(header)).unwrap();
        decoder
            .push(b"2024-01-31 00:00:00,1,x,\"a, \"\"b\"\"\",1.5,TRUE")
            .unwrap();
        for bad in [
            "2024-01-31 00:00:00,1,x,a,1.5",
            "2024-01-31 00:00:00,1,x,a,1.5,true,7",
            "2024-01-31 00:00:00,1.0,x,a,1.5,true",
            "2024-01-31 00:00:00,3000000000,x,a,1.5,true",
            "2024-01-31 00:00:00,1,x,a,one,true",
            "2024-01-31,1,x,a,1.5,true",
            "2024-01-31 00:00:00,1,x,a,1.5,yes",
            "2024-01-31 00:00:00,1,x,\"a\"b,1.5,true",
            "2024-01-31 00:00:00,1,x,\"a,1.5,true",
        ] {
            assert!(decoder.push(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(decoder.push(b",1,,\xff,,").is_err());
        decoder.push(b",,,\"\",Infinity,f").unwrap();
        decoder.push(b",-7,,,,").unwrap();
        let batch = decoder.finish().unwrap().batch;
        let names: Vec<_> = batch.column(0).as_string::<i32>().iter().collect();
        assert_eq!(names, [Some("a, \"b\""), Some(""), None]);
        let ids: Vec<_> = batch.column(1).as_primitive::<Int32Type>().iter().collect();
        assert_eq!(ids, [Some(1), None, Some(-7)]);
        let scores: Vec<_> = batch
            .column(2)
            .as_primitive::<Float64Type>()
            .iter()
            .collect();
        assert_eq!(scores, [Some(1.5), Some(f64::INFINITY), None]);
    }

    #[test]
    fn a_column_must_be_in_the_header() {
        let error = decoder(&layout(), CsvOptions::default(), Some(b"id,name,score,at"));
        let error = error.err().unwrap();
        assert_eq!(
            error.message,
            "column \"ok\" is not in the header of the CSV file"
        );
    }

    #[test]
    fn without_a_header_the_changelog_field_has_a_place() {
        let mut layout = layout();
        layout.changelog = Some("op".into());
        for (sign_at, good, bad) in [
            (None, "1;a;2;;;-", "1;a;2;;;"),
            (Some(0), "-;1;a;2;;", "1;a;2;;;-"),
        ] {
            let options = CsvOptions {
                header: false,
                delimiter: b';',
                sign_at,
            };
            let mut decoder = CsvDecoder::new(&layout, options, None).unwrap();
            decoder.push(good.as_bytes()).unwrap();
            assert!(decoder.push(bad.as_bytes()).is_err());
            assert_eq!(decoder.finish().unwrap().diffs, Some(vec![-1]));
        }
    }
}
