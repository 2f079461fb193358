//! SQL types and Arrow types: one mapping for declared columns, casts and literals.
//!
//! Timestamps are microseconds everywhere. A type parameter that nothing would enforce is refused;
//! the length of `VARCHAR(n)` is enforced where such a type may stand (see [`text_length`]).

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, IntervalUnit, TimeUnit};
use datafusion::common::Result as DfResult;
use datafusion::logical_expr::planner::TypePlanner;
use datafusion::sql::sqlparser::ast::{
    ArrayElemTypeDef, CharacterLength, DataType as SqlType, ExactNumberInfo, TimezoneInfo,
};
use millrace_dataflow::error::{Error, Result};

use crate::error::carry;

/// Precision and scale of a DECIMAL without parameters.
const DEFAULT_DECIMAL: (u8, i8) = (38, 9);

/// `TIMESTAMP`.
pub fn timestamp() -> DataType {
    DataType::Timestamp(TimeUnit::Microsecond, None)
}

/// `TIMESTAMPTZ`.
pub fn timestamptz() -> DataType {
    DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()))
}

/// First words of the types that exist, for hints.
pub(crate) fn type_words() -> impl Iterator<Item = &'static str> {
    [
        "smallint",
        "int",
        "integer",
        "bigint",
        "real",
        "double",
        "float",
        "decimal",
        "numeric",
        "text",
        "varchar",
        "string",
        "boolean",
        "date",
        "time",
        "timestamp",
        "timestamptz",
        "bytea",
    ]
    .into_iter()
}

/// The type of a column.
pub(crate) fn column_type(sql: &SqlType) -> Result<DataType> {
    match arrow_type(sql)? {
        DataType::Interval(_) => Err(Error::unsupported(
            "a column of type INTERVAL is not supported",
        )),
        other => Ok(other),
    }
}

/// The Arrow type of a SQL type.
pub(crate) fn arrow_type(sql: &SqlType) -> Result<DataType> {
    let unknown = || {
        Error::invalid(format!(
            "type \"{}\" does not exist",
            sql.to_string().to_lowercase()
        ))
        .code("42704")
    };
    Ok(match sql {
        SqlType::Boolean | SqlType::Bool => DataType::Boolean,
        SqlType::SmallInt(None) | SqlType::Int2(None) => DataType::Int16,
        SqlType::Int(None) | SqlType::Integer(None) | SqlType::Int4(None) => DataType::Int32,
        SqlType::BigInt(None) | SqlType::Int8(None) => DataType::Int64,
        SqlType::Real | SqlType::Float4 => DataType::Float32,
        SqlType::Float(ExactNumberInfo::None)
        | SqlType::Double(ExactNumberInfo::None)
        | SqlType::DoublePrecision
        | SqlType::Float8 => DataType::Float64,
        SqlType::Float(ExactNumberInfo::Precision(p)) if *p <= 24 => DataType::Float32,
        SqlType::Float(ExactNumberInfo::Precision(p)) if *p <= 53 => DataType::Float64,
        SqlType::Numeric(info) | SqlType::Decimal(info) | SqlType::Dec(info) => decimal(*info)?,
        SqlType::Text
        | SqlType::Varchar(None)
        | SqlType::CharacterVarying(None)
        | SqlType::CharVarying(None)
        | SqlType::String(None) => DataType::Utf8,
        SqlType::Varchar(Some(_))
        | SqlType::CharacterVarying(Some(_))
        | SqlType::CharVarying(Some(_)) => {
            return Err(Error::unsupported(
                "VARCHAR with a length is not supported here: nothing would enforce it",
            )
            .hint("use TEXT"));
        }
        SqlType::Char(_) | SqlType::Character(_) => {
            return Err(Error::unsupported(
                "type CHAR is not supported: its values are padded with blanks",
            )
            .hint("use TEXT, or VARCHAR(n)"));
        }
        SqlType::Date => DataType::Date32,
        SqlType::Time(None | Some(6), TimezoneInfo::None | TimezoneInfo::WithoutTimeZone) => {
            DataType::Time64(TimeUnit::Microsecond)
        }
        SqlType::Timestamp(None | Some(6), TimezoneInfo::None | TimezoneInfo::WithoutTimeZone) => {
            timestamp()
        }
        SqlType::Timestamp(None | Some(6), TimezoneInfo::Tz | TimezoneInfo::WithTimeZone) => {
            timestamptz()
        }
        SqlType::Timestamp(Some(_), _) => {
            return Err(Error::unsupported(
                "a timestamp has microseconds; another precision is not supported",
            )
            .hint("write TIMESTAMP without a precision"));
        }
        SqlType::Bytea | SqlType::Blob(None) | SqlType::Bytes(None) => DataType::Binary,
        SqlType::Interval {
            fields: None,
            precision: None,
        } => DataType::Interval(IntervalUnit::MonthDayNano),
        SqlType::Array(
            ArrayElemTypeDef::SquareBracket(inner, None) | ArrayElemTypeDef::AngleBracket(inner),
        ) => DataType::List(Arc::new(Field::new_list_field(arrow_type(inner)?, true))),
        SqlType::TinyInt(_) => return Err(unknown().hint("use SMALLINT")),
        SqlType::JSON | SqlType::JSONB => return Err(unknown().hint("use TEXT")),
        SqlType::Uuid => return Err(unknown().hint("use TEXT")),
        _ => return Err(unknown()),
    })
}

/// Longest `VARCHAR(n)`, as in PostgreSQL.
const MAX_LENGTH: u64 = 10_485_760;

/// The n of `VARCHAR(n)`, for the places that enforce it: casts, which cut, and columns of sources,
/// which reject the record.
pub(crate) fn text_length(sql: &SqlType) -> Result<Option<u64>> {
    let length = match sql {
        SqlType::Varchar(Some(length))
        | SqlType::CharacterVarying(Some(length))
        | SqlType::CharVarying(Some(length)) => length,
        _ => return Ok(None),
    };
    match length {
        CharacterLength::IntegerLength { length, unit: None }
            if (1..=MAX_LENGTH).contains(length) =>
        {
            Ok(Some(*length))
        }
        CharacterLength::IntegerLength { unit: None, .. } => Err(Error::invalid(format!(
            "the length of a VARCHAR lies between 1 and {MAX_LENGTH}"
        ))
        .hint("use TEXT for texts of any length")),
        _ => Ok(None),
    }
}

fn decimal(info: ExactNumberInfo) -> Result<DataType> {
    let (precision, scale) = match info {
        ExactNumberInfo::None => {
            return Ok(DataType::Decimal128(DEFAULT_DECIMAL.0, DEFAULT_DECIMAL.1));
        }
        ExactNumberInfo::Precision(p) => (p, 0),
        ExactNumberInfo::PrecisionAndScale(p, s) => (p, s),
    };
    match (u8::try_from(precision), i8::try_from(scale)) {
        (Ok(p @ 1..=38), Ok(s)) if s >= 0 && s.unsigned_abs() <= p => {
            Ok(DataType::Decimal128(p, s))
        }
        _ => Err(
            Error::invalid(format!("DECIMAL({precision},{scale}) is out of range"))
                .hint("precision lies between 1 and 38, scale between 0 and the precision"),
        ),
    }
}

/// Gives our mapping to `SqlToRel`.
#[derive(Debug)]
pub(crate) struct Types;

impl TypePlanner for Types {
    fn plan_type(&self, sql: &SqlType) -> DfResult<Option<DataType>> {
        arrow_type(sql).map(Some).map_err(carry)
    }
}

/// An Arrow type as SQL writes it.
pub fn sql_name(data_type: &DataType) -> String {
    match data_type {
        DataType::Null => "NULL".into(),
        DataType::Boolean => "BOOLEAN".into(),
        DataType::Int8 | DataType::UInt8 | DataType::Int16 => "SMALLINT".into(),
        DataType::UInt16 | DataType::Int32 => "INT".into(),
        DataType::UInt32 | DataType::Int64 => "BIGINT".into(),
        DataType::UInt64 => "DECIMAL(20,0)".into(),
        DataType::Float16 | DataType::Float32 => "REAL".into(),
        DataType::Float64 => "DOUBLE".into(),
        DataType::Decimal128(p, s)
        | DataType::Decimal256(p, s)
        | DataType::Decimal64(p, s)
        | DataType::Decimal32(p, s) => {
            format!("DECIMAL({p},{s})")
        }
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => "TEXT".into(),
        DataType::Binary
        | DataType::LargeBinary
        | DataType::BinaryView
        | DataType::FixedSizeBinary(_) => "BYTEA".into(),
        DataType::Date32 | DataType::Date64 => "DATE".into(),
        DataType::Time32(_) | DataType::Time64(_) => "TIME".into(),
        DataType::Timestamp(_, None) => "TIMESTAMP".into(),
        DataType::Timestamp(_, Some(_)) => "TIMESTAMPTZ".into(),
        DataType::Interval(_) | DataType::Duration(_) => "INTERVAL".into(),
        DataType::List(f) | DataType::LargeList(f) | DataType::FixedSizeList(f, _) => {
            format!("{}[]", sql_name(f.data_type()))
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use datafusion::sql::sqlparser::dialect::PostgreSqlDialect;
    use datafusion::sql::sqlparser::parser::Parser;

    use super::*;

    fn of(sql: &str) -> String {
        let dialect = PostgreSqlDialect {};
        let mut parser = Parser::new(&dialect).try_with_sql(sql).expect("tokens");
        let parsed = parser.parse_data_type().expect("a type");
        match arrow_type(&parsed) {
            Ok(t) => sql_name(&t),
            Err(e) => e.message,
        }
    }

    #[test]
    fn names_map_and_come_back() {
        for (sql, expected) in [
            ("smallint", "SMALLINT"),
            ("INT", "INT"),
            ("bigint", "BIGINT"),
            ("real", "REAL"),
            ("double precision", "DOUBLE"),
            ("float", "DOUBLE"),
            ("numeric(18,2)", "DECIMAL(18,2)"),
            ("decimal", "DECIMAL(38,9)"),
            ("numeric(40,2)", "DECIMAL(40,2) is out of range"),
            ("varchar", "TEXT"),
            ("string", "TEXT"),
            ("timestamp", "TIMESTAMP"),
            ("timestamptz", "TIMESTAMPTZ"),
            ("timestamp with time zone", "TIMESTAMPTZ"),
            ("bytea", "BYTEA"),
            ("bigint[]", "BIGINT[]"),
            (
                "varchar(10)",
                "VARCHAR with a length is not supported here: nothing would enforce it",
            ),
            (
                "char(3)",
                "type CHAR is not supported: its values are padded with blanks",
            ),
            ("whatever", "type \"whatever\" does not exist"),
        ] {
            assert_eq!(of(sql), expected, "{sql}");
        }
    }
}
