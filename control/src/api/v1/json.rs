//! Values as JSON, so that nothing is lost on the way to a client that knows only doubles.
//!
//! # Contract
//!
//! * 64-bit integers are numbers up to ±2^53 and strings beyond; decimals are always strings.
//! * Timestamps, dates and times follow RFC 3339 (a timestamp without time zone is shown in UTC);
//!   bytes are base64; NaN and the infinities are the strings `NaN`, `Infinity`, `-Infinity`.
//! * Lists and structs are JSON lists and objects; a map with text keys is an object, any other a
//!   list of pairs.

use std::fmt::Write as _;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes as t;
use arrow::datatypes::{DataType, TimeUnit};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use base64::Engine as _;
use chrono::{DateTime, NaiveDate, NaiveTime, Timelike};

/// Largest magnitude up to which every integer is exact in a double.
const EXACT: i64 = 1 << 53;

/// Appends `[[…],…]`, one list per row.
pub fn write_rows(out: &mut String, batches: &[RecordBatch]) {
    out.push('[');
    let mut first = true;
    for batch in batches {
        for row in 0..batch.num_rows() {
            if !std::mem::take(&mut first) {
                out.push(',');
            }
            write_row(out, batch, row);
        }
    }
    out.push(']');
}

/// Appends one row as a list.
pub fn write_row(out: &mut String, batch: &RecordBatch, row: usize) {
    out.push('[');
    for (i, column) in batch.columns().iter().enumerate() {
        if i > 0 {
            out.push(',');
        }
        write_value(out, column, row);
    }
    out.push(']');
}

/// Appends a JSON string.
pub fn write_string(out: &mut String, text: &str) {
    // serde_json's own escaping; a string always serializes.
    out.push_str(&serde_json::to_string(text).expect("text serializes"));
}

/// Appends one value.
pub fn write_value(out: &mut String, array: &dyn Array, row: usize) {
    if array.is_null(row) {
        out.push_str("null");
        return;
    }
    match array.data_type() {
        DataType::Null => out.push_str("null"),
        DataType::Boolean => out.push_str(if array.as_boolean().value(row) {
            "true"
        } else {
            "false"
        }),
        DataType::Int8 => number(out, array.as_primitive::<t::Int8Type>().value(row)),
        DataType::Int16 => number(out, array.as_primitive::<t::Int16Type>().value(row)),
        DataType::Int32 => number(out, array.as_primitive::<t::Int32Type>().value(row)),
        DataType::UInt8 => number(out, array.as_primitive::<t::UInt8Type>().value(row)),
        DataType::UInt16 => number(out, array.as_primitive::<t::UInt16Type>().value(row)),
        DataType::UInt32 => number(out, array.as_primitive::<t::UInt32Type>().value(row)),
        DataType::Int64 => {
            let value = array.as_primitive::<t::Int64Type>().value(row);
            if (-EXACT..=EXACT).contains(&value) {
                number(out, value)
            } else {
                quoted(out, value)
            }
        }
        DataType::UInt64 => {
            let value = array.as_primitive::<t::UInt64Type>().value(row);
            if value <= EXACT as u64 {
                number(out, value)
            } else {
                quoted(out, value)
            }
        }
        DataType::Float16 => float(
            out,
            f64::from(array.as_primitive::<t::Float16Type>().value(row).to_f32()),
        ),
        DataType::Float32 => {
            let value = array.as_primitive::<t::Float32Type>().value(row);
            if value.is_finite() {
                // Shortest text of the 32-bit value, not of its 64-bit neighbour.
                out.push_str(&serde_json::to_string(&value).expect("a finite number serializes"));
            } else {
                float(out, f64::from(value));
            }
        }
        DataType::Float64 => float(out, array.as_primitive::<t::Float64Type>().value(row)),
        DataType::Utf8 => write_string(out, array.as_string::<i32>().value(row)),
        DataType::LargeUtf8 => write_string(out, array.as_string::<i64>().value(row)),
        DataType::Utf8View => write_string(out, array.as_string_view().value(row)),
        DataType::Binary => bytes(out, array.as_binary::<i32>().value(row)),
        DataType::LargeBinary => bytes(out, array.as_binary::<i64>().value(row)),
        DataType::BinaryView => bytes(out, array.as_binary_view().value(row)),
        DataType::FixedSizeBinary(_) => bytes(out, array.as_fixed_size_binary().value(row)),
        DataType::Date32 => {
            let days = array.as_primitive::<t::Date32Type>().value(row);
            date(out, i64::from(days))
        }
        DataType::Date64 => {
            let ms = array.as_primitive::<t::Date64Type>().value(row);
            date(out, ms.div_euclid(86_400_000))
        }
        DataType::Time32(TimeUnit::Second) => time(
            out,
            i64::from(array.as_primitive::<t::Time32SecondType>().value(row)),
            1,
        ),
        DataType::Time32(_) => time(
            out,
            i64::from(array.as_primitive::<t::Time32MillisecondType>().value(row)),
            1_000,
        ),
        DataType::Time64(TimeUnit::Nanosecond) => time(
            out,
            array.as_primitive::<t::Time64NanosecondType>().value(row),
            1_000_000_000,
        ),
        DataType::Time64(_) => time(
            out,
            array.as_primitive::<t::Time64MicrosecondType>().value(row),
            1_000_000,
        ),
        DataType::Timestamp(unit, _) => {
            let (value, per_second) = match unit {
                TimeUnit::Second => (array.as_primitive::<t::TimestampSecondType>().value(row), 1),
                TimeUnit::Millisecond => (
                    array
                        .as_primitive::<t::TimestampMillisecondType>()
                        .value(row),
                    1_000,
                ),
                TimeUnit::Microsecond => (
                    array
                        .as_primitive::<t::TimestampMicrosecondType>()
                        .value(row),
                    1_000_000,
                ),
                TimeUnit::Nanosecond => (
                    array
                        .as_primitive::<t::TimestampNanosecondType>()
                        .value(row),
                    1_000_000_000,
                ),
            };
            write_string(out, &timestamp(value, per_second));
        }
        DataType::List(_) => list(out, array.as_list::<i32>().value(row).as_ref()),
        DataType::LargeList(_) => list(out, array.as_list::<i64>().value(row).as_ref()),
        DataType::FixedSizeList(..) => list(out, array.as_fixed_size_list().value(row).as_ref()),
        DataType::Struct(fields) => {
            let columns = array.as_struct().columns();
            out.push('{');
            for (i, (field, column)) in fields.iter().zip(columns).enumerate() {
                if i > 0 {
                    out.push(',');
                }
                write_string(out, field.name());
                out.push(':');
                write_value(out, column, row);
            }
            out.push('}');
        }
        DataType::Map(..) => map(out, array, row),
        DataType::Dictionary(..) => match array.as_any_dictionary_opt() {
            Some(dictionary) => {
                write_value(out, dictionary.values(), dictionary.normalized_keys()[row])
            }
            None => out.push_str("null"),
        },
        // Decimals among them: their text is exact.
        _ => formatted(out, array, row),
    }
}

fn number(out: &mut String, value: impl std::fmt::Display) {
    let _ = write!(out, "{value}");
}

fn quoted(out: &mut String, value: impl std::fmt::Display) {
    let _ = write!(out, "\"{value}\"");
}

fn float(out: &mut String, value: f64) {
    if value.is_nan() {
        out.push_str("\"NaN\"");
    } else if value.is_infinite() {
        out.push_str(if value > 0.0 {
            "\"Infinity\""
        } else {
            "\"-Infinity\""
        });
    } else {
        out.push_str(&serde_json::to_string(&value).expect("a finite number serializes"));
    }
}

fn bytes(out: &mut String, value: &[u8]) {
    out.push('"');
    base64::engine::general_purpose::STANDARD.encode_string(value, out);
    out.push('"');
}

fn date(out: &mut String, days: i64) {
    let day = i32::try_from(days)
        .ok()
        .and_then(|days| days.checked_add(719_163))
        .and_then(NaiveDate::from_num_days_from_ce_opt);
    match day {
        Some(day) => quoted(out, day),
        None => quoted(out, days),
    }
}

fn time(out: &mut String, value: i64, per_second: i64) {
    let seconds = u32::try_from(value.div_euclid(per_second)).ok();
    let nanos = (value.rem_euclid(per_second)) * (1_000_000_000 / per_second);
    match seconds.and_then(|s| NaiveTime::from_num_seconds_from_midnight_opt(s, nanos as u32)) {
        Some(time) => quoted(out, time),
        None => quoted(out, value),
    }
}

/// RFC 3339 in UTC with as many digits as needed; the bare number where no calendar reaches.
pub fn timestamp(value: i64, per_second: i64) -> String {
    let nanos = value.rem_euclid(per_second) * (1_000_000_000 / per_second);
    match DateTime::from_timestamp(value.div_euclid(per_second), nanos as u32) {
        Some(moment) => {
            let format = match moment.nanosecond() {
                0 => "%Y-%m-%dT%H:%M:%SZ",
                n if n % 1_000_000 == 0 => "%Y-%m-%dT%H:%M:%S%.3fZ",
                n if n % 1_000 == 0 => "%Y-%m-%dT%H:%M:%S%.6fZ",
                _ => "%Y-%m-%dT%H:%M:%S%.9fZ",
            };
            moment.format(format).to_string()
        }
        None => value.to_string(),
    }
}

fn list(out: &mut String, items: &dyn Array) {
    out.push('[');
    for i in 0..items.len() {
        if i > 0 {
            out.push(',');
        }
        write_value(out, items, i);
    }
    out.push(']');
}

fn map(out: &mut String, array: &dyn Array, row: usize) {
    let entries = array.as_map().value(row);
    let [keys, values] = entries.columns() else {
        out.push_str("null");
        return;
    };
    let text = matches!(
        keys.data_type(),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View
    );
    out.push(if text { '{' } else { '[' });
    for i in 0..entries.len() {
        if i > 0 {
            out.push(',');
        }
        if !text {
            out.push('[');
        }
        write_value(out, keys, i);
        out.push(if text { ':' } else { ',' });
        write_value(out, values, i);
        if !text {
            out.push(']');
        }
    }
    out.push(if text { '}' } else { ']' });
}

fn formatted(out: &mut String, array: &dyn Array, row: usize) {
    let options = FormatOptions::default();
    match ArrayFormatter::try_new(array, &options) {
        Ok(formatter) => match formatter.value(row).try_to_string() {
            Ok(text) => write_string(out, &text),
            Err(_) => out.push_str("null"),
        },
        Err(_) => out.push_str("null"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::*;
    use arrow::buffer::OffsetBuffer;
    use arrow::datatypes::{Field, Fields};

    use super::*;

    fn show(array: &dyn Array) -> String {
        let mut out = String::new();
        list(&mut out, array);
        let parsed: Result<serde_json::Value, _> = serde_json::from_str(&out);
        assert!(parsed.is_ok(), "not JSON: {out}");
        out
    }

    #[test]
    fn integers_survive_a_client_of_doubles() {
        let array = Int64Array::from(vec![Some(EXACT), Some(EXACT + 1), Some(i64::MIN), None]);
        assert_eq!(
            show(&array),
            r#"[9007199254740992,"9007199254740993","-9223372036854775808",null]"#
        );
        assert_eq!(
            show(&UInt64Array::from(vec![1, u64::MAX])),
            r#"[1,"18446744073709551615"]"#
        );
    }

    #[test]
    fn decimals_are_text() {
        let array = Decimal128Array::from(vec![Some(12345), Some(-5), None])
            .with_precision_and_scale(10, 2)
            .expect("fits");
        assert_eq!(show(&array), r#"["123.45","-0.05",null]"#);
    }

    #[test]
    fn floats_that_json_lacks_are_text() {
        let array = Float64Array::from(vec![1.5, 1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY]);
        assert_eq!(show(&array), r#"[1.5,1.0,"NaN","Infinity","-Infinity"]"#);
        assert_eq!(show(&Float32Array::from(vec![0.1_f32])), "[0.1]");
    }

    #[test]
    fn moments_follow_rfc_3339_also_out_of_reach() {
        let array = TimestampMicrosecondArray::from(vec![0, 1_500_000, -1, 1_000_001, i64::MAX]);
        assert_eq!(
            show(&array),
            "[\"1970-01-01T00:00:00Z\",\"1970-01-01T00:00:01.500Z\",\
             \"1969-12-31T23:59:59.999999Z\",\"1970-01-01T00:00:01.000001Z\",\
             \"9223372036854775807\"]"
        );
        assert_eq!(
            show(&Date32Array::from(vec![0, -1])),
            r#"["1970-01-01","1969-12-31"]"#
        );
        let times = Time64MicrosecondArray::from(vec![3_661_000_001]);
        assert_eq!(show(&times), r#"["01:01:01.000001"]"#);
        show(&TimestampSecondArray::from(vec![i64::MIN, i64::MAX]));
        show(&Date32Array::from(vec![i32::MIN, i32::MAX]));
        show(&Date64Array::from(vec![i64::MIN, i64::MAX]));
        show(&Time64NanosecondArray::from(vec![i64::MIN, i64::MAX]));
    }

    #[test]
    fn bytes_and_text() {
        assert_eq!(
            show(&BinaryArray::from(vec![&b"\xff\x00"[..]])),
            r#"["/wA="]"#
        );
        assert_eq!(
            show(&StringArray::from(vec!["a\"\n\u{1}"])),
            r#"["a\"\n\u0001"]"#
        );
    }

    #[test]
    fn nested_values_are_nested_json() {
        let numbers: ArrayRef = Arc::new(Int64Array::from(vec![Some(1), None]));
        let names: ArrayRef = Arc::new(StringArray::from(vec!["x", "y"]));
        let fields = Fields::from(vec![
            Field::new("n", DataType::Int64, true),
            Field::new("s", DataType::Utf8, true),
        ]);
        let rows = StructArray::new(fields, vec![Arc::clone(&numbers), names], None);
        assert_eq!(show(&rows), r#"[{"n":1,"s":"x"},{"n":null,"s":"y"}]"#);
        let item = Arc::new(Field::new("item", DataType::Int64, true));
        let lists = ListArray::new(item, OffsetBuffer::from_lengths([2, 0]), numbers, None);
        assert_eq!(show(&lists), "[[1,null],[]]");

        let mut text_keys = MapBuilder::new(None, StringBuilder::new(), Int64Builder::new());
        text_keys.keys().append_value("k");
        text_keys.values().append_value(1);
        text_keys.append(true).expect("one entry");
        assert_eq!(show(&text_keys.finish()), r#"[{"k":1}]"#);
        let mut number_keys = MapBuilder::new(None, Int64Builder::new(), Int64Builder::new());
        number_keys.keys().append_value(7);
        number_keys.values().append_value(1);
        number_keys.append(true).expect("one entry");
        assert_eq!(show(&number_keys.finish()), "[[[7,1]]]");

        let dictionary: DictionaryArray<arrow::datatypes::Int32Type> =
            vec![Some("a"), None, Some("a")].into_iter().collect();
        assert_eq!(show(&dictionary), r#"["a",null,"a"]"#);
    }
}
