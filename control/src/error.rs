//! Kinds of errors to HTTP status, in one table; the constructors that `control` itself needs.
//!
//! # Contract
//!
//! Nothing a client sends makes a 500: input errors are `Invalid`, `Unsupported`, `NotFound`,
//! `Conflict` or `Denied`. Only a bug (`Internal`) or damaged storage (`Corrupt`) is answered 500.

use axum::http::StatusCode;
use millrace_dataflow::error::{Error, ErrorKind};

/// Where an error is answered: in SQL an unknown relation is a wrong statement, in a path it is a
/// resource that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    Sql,
    Path,
}

/// The one table from kinds to HTTP status.
pub fn http_status(kind: ErrorKind, door: Door) -> StatusCode {
    match (kind, door) {
        (ErrorKind::Invalid | ErrorKind::Unsupported, _) => StatusCode::BAD_REQUEST,
        (ErrorKind::NotFound, Door::Sql) => StatusCode::BAD_REQUEST,
        (ErrorKind::NotFound, Door::Path) => StatusCode::NOT_FOUND,
        (ErrorKind::Conflict, _) => StatusCode::CONFLICT,
        (ErrorKind::Denied, _) => StatusCode::FORBIDDEN,
        (ErrorKind::Unavailable, _) => StatusCode::SERVICE_UNAVAILABLE,
        (ErrorKind::Corrupt | ErrorKind::Internal, _) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// A relation of that name does not exist (`42P01`).
pub fn unknown_relation(name: &str) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("relation \"{name}\" does not exist"),
    )
    .code("42P01")
    .hint("SHOW SOURCES, SHOW VIEWS and SHOW SINKS list what exists")
}

/// Something of that name exists already (`42P07`).
pub fn duplicate_relation(name: &str) -> Error {
    Error::new(
        ErrorKind::Conflict,
        format!("relation \"{name}\" already exists"),
    )
    .code("42P07")
    .hint("choose another name, DROP it first, or say IF NOT EXISTS")
}

/// The server is still restoring (`57P03`, PostgreSQL's `cannot_connect_now`).
///
/// `waiting` names a source that is away and has to be read again before anything can be shown.
pub fn starting(waiting: Option<&(String, Error)>) -> Error {
    let error = Error::unavailable("the server is starting")
        .code("57P03")
        .hint("try again in a moment; /readyz tells when");
    match waiting {
        None => error,
        Some((source, trouble)) => error.detail(format!(
            "source \"{source}\" was read shortly before the stop and is needed again: {}",
            trouble.message
        )),
    }
}

/// What was asked for ends with the server (`57P01`).
pub fn stopping() -> Error {
    Error::unavailable("the server is stopping")
        .code("57P01")
        .hint("subscribe again once it is back")
}

/// What was followed is not there any more.
pub fn gone() -> Error {
    Error::new(ErrorKind::NotFound, "the relation was dropped").code("42P01")
}

/// Another server has taken over the data directory (`57P01`, PostgreSQL's `admin_shutdown`).
pub fn fenced() -> Error {
    Error::unavailable("another server has taken over this data directory")
        .code("57P01")
        .hint("only one server may work on a data directory; stop one of them")
}

/// An error of DataFusion while planning or running a query.
///
/// What the query did (overflow, division by zero, a cast) is the user's to mend; only what
/// DataFusion itself calls internal stays a bug.
pub fn from_datafusion(e: datafusion::error::DataFusionError) -> Error {
    use datafusion::error::DataFusionError as D;
    match e.find_root() {
        D::External(inner) => {
            if let Some(ours) = inner.downcast_ref::<Error>() {
                return ours.clone();
            }
            Error::invalid(first_line(&inner.to_string()))
        }
        D::ArrowError(inner, _) => from_arrow(inner),
        D::NotImplemented(text) => Error::unsupported(first_line(text)),
        D::ResourcesExhausted(text) => Error::invalid(first_line(text)).code("53200").hint(
            "the query needs more memory than the server allows; narrow it or raise --query-memory",
        ),
        D::IoError(inner) => Error::unavailable(inner.to_string()),
        D::ObjectStore(inner) => Error::unavailable(first_line(&inner.to_string())),
        D::Internal(text) => Error::internal(first_line(text)),
        other => Error::invalid(first_line(&other.strip_backtrace())),
    }
}

/// An error of an Arrow kernel while running a query: by far most are caused by values.
pub fn from_arrow(e: &arrow::error::ArrowError) -> Error {
    use arrow::error::ArrowError as A;
    match e {
        A::DivideByZero => Error::invalid("division by zero").code("22012"),
        A::ArithmeticOverflow(_) => Error::invalid("value out of range").code("22003"),
        A::CastError(text) | A::ParseError(text) => Error::invalid(first_line(text)).code("22P02"),
        A::ExternalError(inner) => match inner.downcast_ref::<Error>() {
            Some(ours) => ours.clone(),
            None => Error::invalid(first_line(&inner.to_string())),
        },
        other => Error::invalid(first_line(&other.to_string())),
    }
}

/// One line, lowercase at the start, without a period, as all messages are.
fn first_line(text: &str) -> String {
    let line = text
        .lines()
        .next()
        .unwrap_or_default()
        .trim()
        .trim_end_matches('.');
    let mut chars = line.chars();
    match (chars.next(), line.chars().nth(1)) {
        // An abbreviation at the start (`UTF-8 …`) stays as it is.
        (Some(first), Some(second)) if first.is_uppercase() && second.is_lowercase() => {
            first.to_lowercase().chain(chars).collect()
        }
        _ => line.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_is_never_answered_with_500() {
        let cases = [
            (ErrorKind::Invalid, 400, 400),
            (ErrorKind::Unsupported, 400, 400),
            (ErrorKind::NotFound, 400, 404),
            (ErrorKind::Conflict, 409, 409),
            (ErrorKind::Denied, 403, 403),
            (ErrorKind::Unavailable, 503, 503),
            (ErrorKind::Corrupt, 500, 500),
            (ErrorKind::Internal, 500, 500),
        ];
        for (kind, sql, path) in cases {
            assert_eq!(http_status(kind, Door::Sql).as_u16(), sql, "{kind:?}");
            assert_eq!(http_status(kind, Door::Path).as_u16(), path, "{kind:?}");
        }
    }

    #[test]
    fn what_values_cause_is_the_statements_error() {
        use arrow::error::ArrowError;
        use datafusion::error::DataFusionError;
        let e = from_datafusion(DataFusionError::ArrowError(
            Box::new(ArrowError::DivideByZero),
            None,
        ));
        assert_eq!((e.kind, e.code), (ErrorKind::Invalid, "22012"));
        let inner = unknown_relation("t");
        let e =
            from_datafusion(DataFusionError::External(Box::new(inner)).context("while planning"));
        assert_eq!(e.code, "42P01");
    }

    #[test]
    fn messages_follow_one_manner() {
        assert_eq!(first_line("Cannot do this.\nbacktrace"), "cannot do this");
        assert_eq!(first_line("UTF-8 expected"), "UTF-8 expected");
    }
}
