//! Columns: between Arrow and Iceberg.
//!
//! Iceberg has fewer types than Arrow. Unsigned integers become the next signed type, timestamps of
//! any unit become microseconds, all strings become `string`. Every column is optional: a stream can
//! always come to have a null. What does not fit is refused by name when a sink is created, not when
//! the first row arrives.

use std::collections::HashSet;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Fields, Schema as ArrowSchema, SchemaRef, TimeUnit};
use iceberg::spec::{
    ListType, NestedField, NestedFieldRef, PrimitiveType, Schema, StructType, Type,
};
use millrace_dataflow::error::{Error, ErrorKind, Result};

use crate::error;

/// The Iceberg schema of a table made for these columns.
pub fn to_iceberg(columns: &ArrowSchema) -> Result<Schema> {
    let mut seen = HashSet::new();
    for field in columns.fields() {
        if !seen.insert(field.name()) {
            return Err(
                Error::invalid(format!("column \"{}\" stands twice", field.name()))
                    .code("42701")
                    .hint("give each column of the query a name of its own with AS"),
            );
        }
    }
    if columns.fields().is_empty() {
        return Err(Error::invalid("a lake table needs at least one column").code("42611"));
    }
    let mut next_id = 0;
    let fields = fields_to_iceberg(columns.fields(), &mut next_id, None)?;
    Schema::builder()
        .with_fields(fields)
        .build()
        .map_err(|e| error::iceberg("describe the columns", e))
}

fn fields_to_iceberg(
    fields: &Fields,
    next_id: &mut i32,
    column: Option<&str>,
) -> Result<Vec<NestedFieldRef>> {
    fields
        .iter()
        .map(|field| {
            *next_id += 1;
            let id = *next_id;
            let column = column.unwrap_or(field.name());
            let inner = type_to_iceberg(field.data_type(), next_id, column)?;
            Ok(Arc::new(NestedField::optional(id, field.name(), inner)))
        })
        .collect()
}

fn type_to_iceberg(data_type: &DataType, next_id: &mut i32, column: &str) -> Result<Type> {
    use DataType as D;
    use PrimitiveType as P;
    let primitive = match data_type {
        D::Boolean => P::Boolean,
        D::Int8 | D::Int16 | D::Int32 | D::UInt8 | D::UInt16 => P::Int,
        D::Int64 | D::UInt32 => P::Long,
        D::UInt64 => P::Decimal {
            precision: 20,
            scale: 0,
        },
        D::Float16 | D::Float32 => P::Float,
        D::Float64 => P::Double,
        D::Decimal32(p, s) | D::Decimal64(p, s) | D::Decimal128(p, s)
            if *s >= 0 && *p <= 38 && *s as u8 <= *p =>
        {
            P::Decimal {
                precision: u32::from(*p),
                scale: *s as u32,
            }
        }
        D::Utf8 | D::LargeUtf8 | D::Utf8View => P::String,
        D::Binary | D::LargeBinary | D::BinaryView => P::Binary,
        D::FixedSizeBinary(length) if *length >= 0 => P::Fixed(*length as u64),
        D::Date32 => P::Date,
        D::Time32(_) | D::Time64(_) => P::Time,
        D::Timestamp(_, None) => P::Timestamp,
        D::Timestamp(_, Some(_)) => P::Timestamptz,
        D::Dictionary(_, values) => return type_to_iceberg(values, next_id, column),
        D::List(item) | D::LargeList(item) => {
            *next_id += 1;
            let id = *next_id;
            let item = type_to_iceberg(item.data_type(), next_id, column)?;
            let element = NestedField::list_element(id, item, false);
            return Ok(Type::List(ListType::new(Arc::new(element))));
        }
        D::Struct(fields) => {
            let fields = fields_to_iceberg(fields, next_id, Some(column))?;
            return Ok(Type::Struct(StructType::new(fields)));
        }
        other => {
            return Err(Error::unsupported(format!(
                "column \"{column}\" has type {other}, which a lake table cannot hold"
            ))
            .hint(format!(
                "cast \"{column}\" to another type, such as VARCHAR, in the query"
            )));
        }
    };
    Ok(Type::Primitive(primitive))
}

/// Columns of a table as queries see them: no metadata, binary and strings in their plain form.
pub fn to_arrow(schema: &Schema) -> Result<SchemaRef> {
    let written = to_arrow_with_ids(schema)?;
    let fields: Vec<Field> = written.fields().iter().map(|f| plain_field(f)).collect();
    Ok(Arc::new(ArrowSchema::new(fields)))
}

/// Columns of a table as its data files carry them, with field ids.
pub fn to_arrow_with_ids(schema: &Schema) -> Result<SchemaRef> {
    let schema = iceberg::arrow::schema_to_arrow_schema(schema)
        .map_err(|e| error::iceberg("read the columns of a table", e))?;
    Ok(Arc::new(schema))
}

fn plain_field(field: &Field) -> Field {
    let data_type = match field.data_type() {
        DataType::LargeBinary => DataType::Binary,
        DataType::LargeUtf8 => DataType::Utf8,
        DataType::List(item) => DataType::List(Arc::new(plain_field(item))),
        DataType::Struct(fields) => {
            DataType::Struct(fields.iter().map(|f| plain_field(f)).collect())
        }
        other => other.clone(),
    };
    Field::new(field.name(), data_type, field.is_nullable())
}

/// Whether a query with these columns can be written to a table: same names, in any order, and the
/// same types.
pub fn compatible(table_name: &str, table: &Schema, columns: &ArrowSchema) -> Result<()> {
    let wanted = to_iceberg(columns)?;
    let conflict = |message: String| {
        Err(Error::new(ErrorKind::Conflict, message).code("42804").hint(
            "change the query to give the columns of the table, write to another table, or drop this one",
        ))
    };
    for field in wanted.as_struct().fields() {
        let name = &field.name;
        match table.field_by_name(name) {
            None => {
                return conflict(format!(
                    "lake table \"{table_name}\" has no column \"{name}\""
                ));
            }
            Some(present) if !same_type(&present.field_type, &field.field_type) => {
                return conflict(format!(
                    "column \"{name}\" of lake table \"{table_name}\" is {}, not {}",
                    present.field_type, field.field_type
                ));
            }
            Some(_) => {}
        }
    }
    for field in table.as_struct().fields() {
        if wanted.field_by_name(&field.name).is_none() {
            return conflict(format!(
                "column \"{}\" of lake table \"{table_name}\" is not among the columns to write",
                field.name
            ));
        }
    }
    Ok(())
}

/// Equal types, whatever their field ids and nullability.
fn same_type(left: &Type, right: &Type) -> bool {
    match (left, right) {
        (Type::Primitive(left), Type::Primitive(right)) => left == right,
        (Type::List(left), Type::List(right)) => same_type(
            &left.element_field.field_type,
            &right.element_field.field_type,
        ),
        (Type::Struct(left), Type::Struct(right)) => {
            left.fields().len() == right.fields().len()
                && left
                    .fields()
                    .iter()
                    .zip(right.fields())
                    .all(|(left, right)| {
                        left.name == right.name && same_type(&left.field_type, &right.field_type)
                    })
        }
        _ => false,
    }
}

/// Microseconds without a zone: the engine's timestamp.
pub const TIMESTAMP: DataType = DataType::Timestamp(TimeUnit::Microsecond, None);

#[cfg(test)]
mod tests {
    use super::*;

    fn columns(fields: Vec<(&str, DataType)>) -> ArrowSchema {
        ArrowSchema::new(
            fields
                .into_iter()
                .map(|(n, t)| Field::new(n, t, false))
                .collect::<Vec<_>>(),
        )
    }

    #[test]
    fn engine_types_have_a_place_and_come_back() {
        let schema = to_iceberg(&columns(vec![
            ("small", DataType::Int16),
            ("count", DataType::UInt32),
            ("huge", DataType::UInt64),
            ("price", DataType::Decimal128(38, 6)),
            ("text", DataType::Utf8View),
            ("raw", DataType::BinaryView),
            ("at", DataType::Timestamp(TimeUnit::Nanosecond, None)),
            (
                "zoned",
                DataType::Timestamp(TimeUnit::Microsecond, Some("+02:00".into())),
            ),
            (
                "tags",
                DataType::List(Arc::new(Field::new("item", DataType::Utf8, true))),
            ),
        ]))
        .expect("all of them fit");
        assert!(schema.as_struct().fields().iter().all(|f| !f.required));
        let back = to_arrow(&schema).expect("and come back");
        let types: Vec<String> = back
            .fields()
            .iter()
            .take(8)
            .map(|f| f.data_type().to_string())
            .collect();
        assert_eq!(
            types,
            [
                "Int32",
                "Int64",
                "Decimal128(20, 0)",
                "Decimal128(38, 6)",
                "Utf8",
                "Binary",
                "Timestamp(µs)",
                "Timestamp(µs, \"+00:00\")"
            ]
        );
        assert!(back.fields().iter().all(|f| f.metadata().is_empty()));
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let e = to_iceberg(&columns(vec![
            ("a", DataType::Int64),
            ("wait", DataType::Duration(TimeUnit::Second)),
        ]))
        .expect_err("no such type");
        assert_eq!(e.kind, ErrorKind::Unsupported);
        assert!(e.message.contains("\"wait\""), "{}", e.message);
        let e = to_iceberg(&columns(vec![
            ("a", DataType::Int64),
            ("a", DataType::Int64),
        ]))
        .expect_err("twice");
        assert_eq!(e.code, "42701");
    }

    #[test]
    fn the_first_difference_is_named() {
        let table = to_iceberg(&columns(vec![
            ("a", DataType::Int64),
            ("b", DataType::Utf8),
        ]))
        .expect("fits");
        let swapped = columns(vec![("b", DataType::Utf8View), ("a", DataType::Int64)]);
        compatible("ns.t", &table, &swapped).expect("order does not matter");
        for (other, name) in [
            (vec![("a", DataType::Int32), ("b", DataType::Utf8)], "\"a\""),
            (vec![("a", DataType::Int64)], "\"b\""),
            (
                vec![
                    ("a", DataType::Int64),
                    ("b", DataType::Utf8),
                    ("c", DataType::Utf8),
                ],
                "\"c\"",
            ),
        ] {
            let e = compatible("ns.t", &table, &columns(other)).expect_err("differs");
            assert_eq!(e.kind, ErrorKind::Conflict);
            assert!(e.message.contains(name), "{}", e.message);
            assert!(e.hint.is_some());
        }
    }
}
