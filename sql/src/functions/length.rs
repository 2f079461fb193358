//! `VARCHAR(n)` as the type of a column: longer values fail, unless only blanks stand behind.

use std::any::Any;
use std::sync::{Arc, LazyLock};

use arrow::array::{Array, AsArray, StringArray};
use arrow::datatypes::DataType;
use datafusion::common::{Result, plan_err};
use datafusion::logical_expr::{
    ColumnarValue, Expr, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility, lit,
};
use millrace_dataflow::error::Error;

use crate::error::carry;

static FUNCTION: LazyLock<Arc<ScalarUDF>> = LazyLock::new(|| {
    Arc::new(ScalarUDF::new_from_impl(AtMost {
        signature: Signature::exact(vec![DataType::Utf8, DataType::Int64], Volatility::Immutable),
    }))
});

/// `text`, which fails where it has more than `length` characters.
pub(crate) fn at_most(text: Expr, length: u64) -> Expr {
    let length = i64::try_from(length).unwrap_or(i64::MAX);
    FUNCTION.call(vec![text, lit(length)])
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct AtMost {
    signature: Signature,
}

impl ScalarUDFImpl for AtMost {
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn name(&self) -> &str {
        "character_varying"
    }
    fn signature(&self) -> &Signature {
        &self.signature
    }
    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        Ok(DataType::Utf8)
    }
    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let arrays = ColumnarValue::values_to_arrays(&args.args)?;
        let [text, length] = &arrays[..] else {
            return plan_err!("character_varying takes two arguments");
        };
        let text = text.as_string::<i32>();
        let length = length.as_primitive::<arrow::datatypes::Int64Type>();
        let mut changed = false;
        let mut out = Vec::with_capacity(text.len());
        for (value, length) in text.iter().zip(length.values()) {
            let fitted = value.map(|v| fit(v, *length)).transpose()?;
            changed |= fitted.map(str::len) != value.map(str::len);
            out.push(fitted);
        }
        Ok(ColumnarValue::Array(match changed {
            true => Arc::new(StringArray::from(out)),
            false => Arc::clone(&arrays[0]),
        }))
    }
}

fn fit(text: &str, length: i64) -> Result<&str> {
    let limit = usize::try_from(length).unwrap_or(usize::MAX);
    // So many characters have at least as many bytes.
    if text.len() <= limit {
        return Ok(text);
    }
    match text.char_indices().nth(limit) {
        None => Ok(text),
        Some((end, _)) if text[end..].chars().all(|c| c == ' ') => Ok(&text[..end]),
        Some(_) => Err(carry(
            Error::invalid(format!("value too long for type VARCHAR({length})")).code("22001"),
        )),
    }
}
