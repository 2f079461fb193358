//! Errors of statements: what DataFusion and the parser say, in PostgreSQL's words.
//!
//! # Contract
//!
//! * Nothing of DataFusion's inner life is shown: no Rust types, no "this was likely caused by a
//!   bug", no back traces. What cannot be worded better keeps its first line.
//! * Unknown relations are `42P01`, unknown columns `42703`, both with "did you mean" where a name
//!   is near; positions count characters from 1.

use arrow::error::ArrowError;
use datafusion::common::{DataFusionError, SchemaError};
use millrace_dataflow::error::{Error, ErrorKind};

/// SQLSTATE of a syntax error.
pub(crate) const SYNTAX: &str = "42601";
pub(crate) const UNDEFINED_TABLE: &str = "42P01";
pub(crate) const UNDEFINED_COLUMN: &str = "42703";
pub(crate) const UNDEFINED_FUNCTION: &str = "42883";
pub(crate) const WRONG_OBJECT: &str = "42809";
pub(crate) const AMBIGUOUS: &str = "42702";
pub(crate) const DUPLICATE_COLUMN: &str = "42701";
pub(crate) const GROUPING: &str = "42803";
pub(crate) const TYPE_MISMATCH: &str = "42804";
pub(crate) const TOO_COMPLEX: &str = "54001";

pub(crate) fn syntax(message: impl Into<String>) -> Error {
    Error::invalid(message).code(SYNTAX)
}

/// A relation nobody knows.
pub(crate) fn unknown_relation<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Error {
    let error = Error::new(
        ErrorKind::NotFound,
        format!("relation \"{name}\" does not exist"),
    )
    .code(UNDEFINED_TABLE);
    match nearest(name, known) {
        Some(near) => error.hint(format!("did you mean \"{near}\"?")),
        None => error.hint("SHOW ALL lists what exists"),
    }
}

/// The candidate that a typing mistake would turn into `name`, if there is one.
pub(crate) fn nearest<'a>(
    name: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let lower = name.to_lowercase();
    let allowed = match name.chars().count() {
        0..=2 => 1,
        3..=6 => 2,
        _ => 3,
    };
    candidates
        .into_iter()
        .map(|c| (distance(&lower, &c.to_lowercase()), c))
        .filter(|(d, c)| *d <= allowed && *d < c.chars().count())
        .min()
        .map(|(_, c)| c)
}

/// Edits (insert, delete, replace, swap of neighbours) between two words.
fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.chars().take(64).collect();
    let b: Vec<char> = b.chars().take(64).collect();
    let mut rows = vec![vec![0usize; b.len() + 1]; a.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    for j in 0..=b.len() {
        rows[0][j] = j;
    }
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let replace = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replace.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = best;
        }
    }
    rows[a.len()][b.len()]
}

/// An [`Error`] on its way through DataFusion, which only carries its own kind.
pub(crate) fn carry(error: Error) -> DataFusionError {
    DataFusionError::External(Box::new(error))
}

/// Where in the text a DataFusion error points, as (line, column) counted from 1.
pub(crate) type Place = (u64, u64);

/// Translates an error of planning. The place is that of the offending name, if known.
pub(crate) fn planning(error: DataFusionError) -> (Error, Option<Place>) {
    match error {
        DataFusionError::Diagnostic(diagnostic, inner) => {
            let place = diagnostic.span.map(|s| (s.start.line, s.start.column));
            let (error, inner_place) = planning(*inner);
            (error, inner_place.or(place))
        }
        DataFusionError::Context(_, inner) => planning(*inner),
        DataFusionError::Shared(inner) => planning_ref(&inner),
        DataFusionError::Collection(mut errors) if !errors.is_empty() => {
            planning(errors.swap_remove(0))
        }
        DataFusionError::External(inner) => match inner.downcast::<Error>() {
            Ok(error) => (*error, None),
            Err(other) => (Error::invalid(clean(&other.to_string())), None),
        },
        DataFusionError::SchemaError(inner, _) => (schema(&inner), None),
        DataFusionError::ArrowError(inner, _) => (arrow(&inner), None),
        DataFusionError::SQL(inner, _) => (syntax(clean(&inner.to_string())), None),
        DataFusionError::NotImplemented(message) => (Error::unsupported(clean(&message)), None),
        DataFusionError::ResourcesExhausted(message) => (
            Error::new(ErrorKind::Unavailable, clean(&message)).code("53200"),
            None,
        ),
        DataFusionError::Internal(message) => (
            Error::unsupported(format!(
                "this statement cannot be planned: {}",
                clean(&message)
            )),
            None,
        ),
        DataFusionError::Plan(message)
        | DataFusionError::Configuration(message)
        | DataFusionError::Execution(message) => (plan(&message), None),
        other => (Error::invalid(clean(&other.strip_backtrace())), None),
    }
}

fn planning_ref(error: &DataFusionError) -> (Error, Option<Place>) {
    match error {
        DataFusionError::Shared(inner) => planning_ref(inner),
        DataFusionError::Context(_, inner) => planning_ref(inner),
        DataFusionError::External(inner) => match inner.downcast_ref::<Error>() {
            Some(error) => (error.clone(), None),
            None => (Error::invalid(clean(&inner.to_string())), None),
        },
        DataFusionError::ArrowError(inner, _) => (arrow(inner), None),
        DataFusionError::Plan(message) | DataFusionError::Execution(message) => {
            (plan(message), None)
        }
        other => (Error::invalid(clean(&other.strip_backtrace())), None),
    }
}

/// A file of a table that cannot be read as what it says it is, or is not there: not the fault of whoever
/// asks.
fn damaged_file(error: &DataFusionError) -> bool {
    match error.find_root() {
        DataFusionError::ParquetError(_) | DataFusionError::ObjectStore(_) => true,
        DataFusionError::ArrowError(inner, _) => matches!(**inner, ArrowError::ParquetError(_)),
        _ => false,
    }
}

/// Translates an error of executing a query.
pub fn execution_error(error: DataFusionError) -> Error {
    if damaged_file(&error) {
        tracing::error!(%error, "a data file cannot be read");
        return Error::new(
            ErrorKind::Corrupt,
            "a data file of a lake table is damaged or missing",
        )
        .hint("restore the files of the table in the warehouse from a copy, or drop the table; the log of the server names the file");
    }
    let error = planning(error).0;
    // What planning takes for a statement that makes no sense is here a value that does not.
    match error.code {
        "42P10" => error.code("22000"),
        _ => error,
    }
}

fn schema(error: &SchemaError) -> Error {
    match error {
        SchemaError::FieldNotFound {
            field,
            valid_fields,
        } => {
            let known: Vec<&str> = valid_fields.iter().map(|c| c.name.as_str()).collect();
            let error = match &field.relation {
                Some(relation)
                    if !valid_fields
                        .iter()
                        .any(|f| f.relation.as_ref() == Some(relation)) =>
                {
                    let relations = valid_fields
                        .iter()
                        .filter_map(|f| f.relation.as_ref().map(|r| r.table()));
                    let error = Error::invalid(format!(
                        "missing FROM-clause entry for table \"{}\"",
                        relation.table()
                    ))
                    .code(UNDEFINED_TABLE);
                    return match nearest(relation.table(), relations) {
                        Some(near) => error.hint(format!("did you mean \"{near}\"?")),
                        None => error,
                    };
                }
                Some(relation) => Error::invalid(format!(
                    "column \"{}.{}\" does not exist",
                    relation.table(),
                    field.name
                )),
                None => Error::invalid(format!("column \"{}\" does not exist", field.name)),
            }
            .code(UNDEFINED_COLUMN);
            if let Some(near) = nearest(&field.name, known.iter().copied()) {
                error.hint(format!("did you mean \"{near}\"?"))
            } else if known.is_empty() {
                error
            } else {
                let mut names = known;
                names.dedup();
                names.truncate(20);
                error.hint(format!("columns here are {}", quoted(&names)))
            }
        }
        SchemaError::AmbiguousReference { field } => {
            Error::invalid(format!("column reference \"{}\" is ambiguous", field.name))
                .code(AMBIGUOUS)
                .hint("qualify the column with its relation, as in \"relation.column\"")
        }
        SchemaError::DuplicateQualifiedField { qualifier, name } => Error::invalid(format!(
            "column \"{}.{name}\" is specified more than once",
            qualifier.table()
        ))
        .code(DUPLICATE_COLUMN)
        .hint("give one of them another name with AS"),
        SchemaError::DuplicateUnqualifiedField { name } => {
            Error::invalid(format!("column \"{name}\" is specified more than once"))
                .code(DUPLICATE_COLUMN)
                .hint("give one of them another name with AS")
        }
    }
}

/// Errors of evaluating: the codes that PostgreSQL gives to arithmetic and casts.
fn arrow(error: &ArrowError) -> Error {
    match error {
        ArrowError::DivideByZero => Error::invalid("division by zero").code("22012"),
        ArrowError::ArithmeticOverflow(_) => Error::invalid("value out of range").code("22003"),
        // Their messages carry the value, which may be nobody else's business.
        ArrowError::CastError(message) if message.contains("ast value") => {
            Error::invalid("value out of range").code("22003")
        }
        ArrowError::CastError(message) => match between(message, "to value of ", " type") {
            Some(target) => Error::invalid(format!("invalid input for type {}", sql_type(&target))),
            None => Error::invalid("invalid input for a cast"),
        }
        .code("22P02"),
        ArrowError::ParseError(_) => {
            Error::invalid("invalid input for a date or time").code("22007")
        }
        ArrowError::ComputeError(message) if message.contains("verflow") => {
            Error::invalid("value out of range").code("22003")
        }
        ArrowError::ExternalError(inner) => {
            if let Some(inner) = inner.downcast_ref::<DataFusionError>() {
                planning_ref(inner).0
            } else if let Some(inner) = inner.downcast_ref::<Error>() {
                inner.clone()
            } else {
                Error::invalid(clean(&inner.to_string()))
            }
        }
        ArrowError::InvalidArgumentError(message) if message.contains("too large to store") => {
            Error::invalid("value out of range").code("22003")
        }
        ArrowError::InvalidArgumentError(message) => Error::invalid(lower_first(&clean(message))),
        other => Error::invalid(clean(&other.to_string())),
    }
}

/// SQL's word for an Arrow type in a message.
fn sql_type(arrow: &str) -> String {
    let end = arrow.find('(').unwrap_or(arrow.len());
    match &arrow[..end] {
        "Int8" | "Int16" | "UInt8" => "SMALLINT",
        "Int32" | "UInt16" => "INT",
        "Int64" | "UInt32" => "BIGINT",
        "Float32" => "REAL",
        "Float64" => "DOUBLE",
        "Utf8" | "LargeUtf8" | "Utf8View" => "TEXT",
        "Binary" | "LargeBinary" | "BinaryView" => "BYTEA",
        "Decimal128" | "Decimal256" | "UInt64" => "DECIMAL",
        "Date32" | "Date64" => "DATE",
        "Time32" | "Time64" => "TIME",
        "Timestamp" => "TIMESTAMP",
        "Interval" | "Duration" => "INTERVAL",
        "Null" => "NULL",
        other => return other.to_uppercase(),
    }
    .to_string()
}

/// An operator that does not exist for these operands, as DataFusion says it.
fn wrong_operands(text: &str) -> Option<Error> {
    let operation = text
        .strip_prefix("Cannot coerce arithmetic expression ")
        .map(|rest| rest.split(" to valid types").next().unwrap_or(rest))
        .or_else(|| {
            text.strip_prefix("Cannot infer common argument type for comparison operation ")
        })?;
    // The operator stands between two types, which may have parentheses.
    let mut depth = 0;
    let spaces: Vec<usize> = operation
        .char_indices()
        .filter(|(_, c)| {
            depth += i32::from(*c == '(') - i32::from(*c == ')');
            *c == ' ' && depth == 0
        })
        .map(|(at, _)| at)
        .collect();
    let (first, last) = (*spaces.first()?, *spaces.last()?);
    let operator = operation.get(first + 1..last)?;
    let (left, right) = (
        sql_type(&operation[..first]),
        sql_type(&operation[last + 1..]),
    );
    Some(
        Error::invalid(format!(
            "operator does not exist: {left} {operator} {right}"
        ))
        .code(UNDEFINED_FUNCTION)
        .hint("an explicit CAST may be needed"),
    )
}

/// A function that exists, but not for these arguments, as DataFusion says it.
fn wrong_arguments(text: &str) -> Option<Error> {
    let call = between(text, "the given name and argument types '", "'")?;
    let (name, types) = call.strip_suffix(')')?.split_once('(')?;
    let types: Vec<String> = types
        .split(", ")
        // Not the scale of a decimal.
        .filter(|t| t.starts_with(char::is_alphabetic))
        .map(sql_type)
        .collect();
    Some(
        Error::invalid(format!(
            "function {name}({}) does not exist",
            types.join(", ")
        ))
        .code(UNDEFINED_FUNCTION)
        .hint("no function of that name takes these types; an explicit CAST may be needed"),
    )
}

/// Messages of `SqlToRel` and the analyzer that users meet often.
fn plan(message: &str) -> Error {
    let text = clean(message);
    if let Some(inner) = between(
        &text,
        "coercion failed with \"Error during planning: ",
        "\" No function",
    ) {
        return Error::invalid(inner).code(UNDEFINED_FUNCTION);
    }
    if text.starts_with("Error parsing timestamp from") {
        return Error::invalid("invalid input for a date or time").code("22007");
    }
    if let Some(name) = between(&text, "Invalid function '", "'") {
        let error =
            Error::invalid(format!("function {name} does not exist")).code(UNDEFINED_FUNCTION);
        return match between(&text, "Did you mean '", "'") {
            Some(near) if distance(&name, &near) <= 3 => {
                error.hint(format!("did you mean {near}?"))
            }
            _ => error,
        };
    }
    if text.starts_with("Column in SELECT must be in GROUP BY")
        || text.contains("must appear in the GROUP BY clause")
        || text.contains("Projection references non-aggregate values")
    {
        let column = between(&text, "column \"", "\"")
            .or_else(|| between(&text, "expression \"", "\""))
            .or_else(|| between(&text, "Expression ", " could not be resolved"));
        let what = column.map_or_else(
            || "a column".to_string(),
            |c| format!("column \"{}\"", c.replace('"', "")),
        );
        return Error::invalid(format!(
            "{what} must appear in the GROUP BY clause or be used in an aggregate function"
        ))
        .code(GROUPING);
    }
    if text.contains("No value found for placeholder") || text.contains("was not provided a value")
    {
        return Error::invalid("there is no value for a parameter of this statement")
            .code("08P01")
            .hint("pass one value per placeholder, in order: $1 is the first");
    }
    if text.starts_with("Projections require unique expression names") {
        let second = text.rsplit(" and \"").next().unwrap_or_default();
        let second = second.split("\" at position").next().unwrap_or_default();
        let second = second.rsplit(" AS ").next().unwrap_or_default();
        let name = second.rsplit('.').next().unwrap_or_default();
        return Error::invalid(format!("column \"{name}\" is specified more than once"))
            .code(DUPLICATE_COLUMN)
            .hint("give one of them another name with AS");
    }
    if let Some(rest) = text.strip_prefix("Invalid qualifier ") {
        return Error::invalid(format!("missing FROM-clause entry for table \"{rest}\""))
            .code(UNDEFINED_TABLE);
    }
    if let Some(position) = between(&text, "Order by column out of bounds, specified: ", ",") {
        return Error::invalid(format!(
            "ORDER BY position {position} is not in the select list"
        ))
        .code("42P10");
    }
    if text.starts_with("LIMIT must be >= 0") || text.starts_with("OFFSET must be >=0") {
        return Error::invalid("LIMIT and OFFSET must not be negative").code("2201W");
    }
    if text.starts_with("Expected LIMIT to be") || text.starts_with("Expected OFFSET to be") {
        return Error::invalid("LIMIT and OFFSET are whole numbers").code(TYPE_MISMATCH);
    }
    if let Some(found) = text
        .strip_prefix("Cannot create filter with non-boolean predicate '")
        .and_then(|rest| rest.rsplit("' returning ").next())
    {
        return Error::invalid(format!(
            "a condition is BOOLEAN, this one is {}",
            sql_type(found)
        ))
        .code(TYPE_MISMATCH);
    }
    if text.starts_with("Aggregate functions are not allowed in the WHERE clause") {
        return Error::invalid("aggregate functions are not allowed in WHERE")
            .code(GROUPING)
            .hint("filter groups with HAVING");
    }
    if let Some(error) = wrong_operands(&text) {
        return error;
    }
    if let Some(error) = wrong_arguments(&text) {
        return error;
    }
    if text.contains("No function matches the given name and argument types")
        || text.contains("Failed to coerce arguments")
        || text.contains("Cannot coerce arithmetic expression")
        || text.contains("Cannot infer common")
        || text.contains("There isn't a common type")
        || text.contains("Function '")
    {
        let short = text
            .split("You might need to add explicit type casts")
            .next()
            .unwrap_or(&text)
            .trim()
            .trim_end_matches('.');
        return Error::invalid(lower_first(short))
            .code(TYPE_MISMATCH)
            .hint("an explicit CAST may be needed");
    }
    if text.contains("SELECT * with no tables") {
        return Error::invalid("SELECT * with no tables specified is not valid").code(SYNTAX);
    }
    if text.contains("Divide by zero") {
        return Error::invalid("division by zero").code("22012");
    }
    if text.contains("verflow") {
        return Error::invalid("value out of range").code("22003");
    }
    Error::invalid(lower_first(&text)).code("42P10")
}

fn between(text: &str, left: &str, right: &str) -> Option<String> {
    let rest = &text[text.find(left)? + left.len()..];
    Some(rest[..rest.find(right)?].to_string())
}

/// First paragraph, without prefixes and phrases that speak about programs.
pub(crate) fn clean(message: &str) -> String {
    let mut text = message
        .split("\n\nbacktrace:")
        .next()
        .unwrap_or_default()
        .split("This was likely caused by a bug")
        .next()
        .unwrap_or_default()
        .split("This issue was likely caused by a bug")
        .next()
        .unwrap_or_default()
        .trim()
        .trim_end_matches('.')
        .to_string();
    loop {
        let before = text.len();
        for prefix in [
            "External error: ",
            "Internal error: ",
            "Arrow error: ",
            "Error during planning: ",
            "Execution error: ",
            "Schema error: ",
            "SQL error: ",
            "sql parser error: ",
            "This feature is not implemented: ",
            "Optimizer rule ",
            "type_coercion\ncaused by\n",
            "caused by\n",
            "Invalid argument error: ",
            "Compute error: ",
            "Cast error: ",
            "Parser error: ",
            "Assertion failed: ",
            "ParserError(",
        ] {
            if let Some(rest) = text.strip_prefix(prefix) {
                text = rest.to_string();
            }
        }
        if text.len() == before {
            break;
        }
    }
    text.replace('\n', " ").trim_end_matches('.').to_string()
}

/// Messages begin in lower case, unless the first word is a name or a keyword.
pub(crate) fn lower_first(text: &str) -> String {
    let mut chars = text.chars();
    match (chars.next(), chars.clone().next()) {
        (Some(first), Some(second)) if first.is_uppercase() && !second.is_uppercase() => {
            first.to_lowercase().chain(chars).collect()
        }
        _ => text.to_string(),
    }
}

pub(crate) fn quoted(names: &[&str]) -> String {
    let names: Vec<String> = names.iter().map(|n| format!("\"{n}\"")).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typing_mistake_is_found_and_a_stranger_is_not() {
        let known = ["bids", "auctions", "people"];
        assert_eq!(nearest("bidz", known), Some("bids"));
        assert_eq!(nearest("auctoins", known), Some("auctions"));
        assert_eq!(nearest("warehouse", known), None);
    }

    #[test]
    fn inner_words_are_not_shown() {
        let (error, _) = planning(DataFusionError::Internal(
            "Assertion failed: a != b.\nThis was likely caused by a bug in DataFusion's code. Please file".into(),
        ));
        assert_eq!(error.message, "this statement cannot be planned: a != b");
    }
}
