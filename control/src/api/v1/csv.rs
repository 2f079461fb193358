//! Rows as CSV (RFC 4180, with a header), each value in the text of the JSON encoding.
//!
//! NULL is an empty field, empty text is `""`, so that both survive; nested values are JSON text.

use arrow::array::{Array, RecordBatch};
use arrow::datatypes::SchemaRef;

use super::json;

/// Header and rows.
pub fn write(schema: &SchemaRef, batches: &[RecordBatch]) -> String {
    let mut out = String::new();
    for (i, field) in schema.fields().iter().enumerate() {
        if i > 0 {
            out.push(',');
        }
        quoted_if_needed(&mut out, field.name());
    }
    out.push_str("\r\n");
    let mut cell = String::new();
    for batch in batches {
        for row in 0..batch.num_rows() {
            for (i, column) in batch.columns().iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                if column.is_null(row) {
                    continue;
                }
                cell.clear();
                json::write_value(&mut cell, column, row);
                if cell.starts_with('"') {
                    // A JSON string: its text, not its JSON.
                    match serde_json::from_str::<String>(&cell) {
                        Ok(text) => quoted_if_needed(&mut out, &text),
                        Err(_) => quoted_if_needed(&mut out, &cell),
                    }
                } else {
                    quoted_if_needed(&mut out, &cell);
                }
            }
            out.push_str("\r\n");
        }
    }
    out
}

fn quoted_if_needed(out: &mut String, text: &str) {
    if !text.is_empty() && !text.contains([',', '"', '\n', '\r']) {
        out.push_str(text);
        return;
    }
    out.push('"');
    out.push_str(&text.replace('"', "\"\""));
    out.push('"');
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{Int64Array, StringArray};
    use arrow::datatypes::{DataType, Field, Schema};

    use super::*;

    #[test]
    fn null_empty_quotes_and_breaks_stay_apart() {
        let schema = Arc::new(Schema::new(vec![
            Field::new("n", DataType::Int64, true),
            Field::new("a,b", DataType::Utf8, true),
        ]));
        let batch = RecordBatch::try_new(
            Arc::clone(&schema),
            vec![
                Arc::new(Int64Array::from(vec![Some(1), None, Some(i64::MAX)])),
                Arc::new(StringArray::from(vec![
                    Some("say \"hi\"\n"),
                    Some(""),
                    None,
                ])),
            ],
        )
        .expect("columns fit");
        assert_eq!(
            write(&schema, &[batch]),
            "n,\"a,b\"\r\n1,\"say \"\"hi\"\"\n\"\r\n,\"\"\r\n9223372036854775807,\r\n"
        );
    }
}
