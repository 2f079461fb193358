//! Wire types: names of column types, requests, errors, parameters.

use datafusion::common::ScalarValue;
use millrace_dataflow::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// Body of `POST /api/v1/sql`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SqlRequest {
    pub sql: String,
    #[serde(default)]
    pub params: Vec<serde_json::Value>,
    /// `json` (default), `csv` or `arrow`; an `Accept` header asks for the same.
    #[serde(default)]
    pub format: Option<String>,
}

/// An error as it leaves.
#[derive(Debug, Serialize, PartialEq, Eq)]
pub struct WireError {
    pub code: &'static str,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
    pub position: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub statement: Option<usize>,
}

impl WireError {
    pub fn new(error: &Error, statement: Option<usize>) -> Self {
        Self {
            code: error.code,
            message: error.message.clone(),
            detail: error.detail.clone(),
            hint: error.hint.clone(),
            position: error.position,
            statement,
        }
    }
}

/// A parameter's value. Text takes the type of where it stands when the statement is bound.
pub fn parameter(index: usize, value: &serde_json::Value) -> Result<ScalarValue> {
    use serde_json::Value as V;
    Ok(match value {
        V::Null => ScalarValue::Null,
        V::Bool(b) => ScalarValue::Boolean(Some(*b)),
        V::String(s) => ScalarValue::Utf8(Some(s.clone())),
        V::Number(n) => match (n.as_i64(), n.as_u64(), n.as_f64()) {
            (Some(i), _, _) => ScalarValue::Int64(Some(i)),
            (None, Some(u), _) => ScalarValue::Decimal128(Some(i128::from(u)), 20, 0),
            (None, None, f) => ScalarValue::Float64(f),
        },
        V::Array(_) | V::Object(_) => {
            return Err(Error::unsupported(format!(
                "parameter ${} is a list or an object",
                index + 1
            ))
            .hint("pass numbers, text, booleans or null"));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_keep_their_values() {
        let value = |text: &str| {
            parameter(0, &serde_json::from_str(text).expect("valid JSON")).expect("accepted")
        };
        assert_eq!(
            value("9223372036854775807"),
            ScalarValue::Int64(Some(i64::MAX))
        );
        assert_eq!(
            value("18446744073709551615"),
            ScalarValue::Decimal128(Some(u64::MAX.into()), 20, 0)
        );
        assert_eq!(value("1.5"), ScalarValue::Float64(Some(1.5)));
        assert_eq!(value("null"), ScalarValue::Null);
        let list = serde_json::json!([1]);
        assert_eq!(parameter(0, &list).expect_err("refused").code, "0A000");
    }

    #[test]
    fn unknown_fields_of_a_request_are_refused() {
        assert!(serde_json::from_str::<SqlRequest>(r#"{"sql":"x","parms":[]}"#).is_err());
        assert!(serde_json::from_str::<SqlRequest>(r#"{"sql":"x","params":[1]}"#).is_ok());
    }
}
