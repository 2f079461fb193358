//! The value of a subquery, given how many rows it has.

use std::any::Any;
use std::sync::{Arc, LazyLock};

use arrow::array::AsArray;
use arrow::datatypes::{DataType, Int64Type};
use datafusion::common::{Result, plan_err};
use datafusion::logical_expr::{
    ColumnarValue, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility,
};
use millrace_dataflow::error::Error;

use crate::error::carry;

#[derive(Debug, PartialEq, Eq, Hash)]
struct SingleRow {
    signature: Signature,
}

static SINGLE_ROW: LazyLock<Arc<ScalarUDF>> = LazyLock::new(|| {
    Arc::new(ScalarUDF::new_from_impl(SingleRow {
        signature: Signature::any(2, Volatility::Immutable),
    }))
});

/// `single_row(rows, value)`: the value, or an error if there are several rows.
pub(crate) fn single_row() -> Arc<ScalarUDF> {
    Arc::clone(&SINGLE_ROW)
}

impl ScalarUDFImpl for SingleRow {
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn name(&self) -> &str {
        "single_row"
    }
    fn signature(&self) -> &Signature {
        &self.signature
    }
    fn return_type(&self, arg_types: &[DataType]) -> Result<DataType> {
        match arg_types {
            [_, value] => Ok(value.clone()),
            _ => plan_err!("single_row has two arguments"),
        }
    }
    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let [rows, value] = &args.args[..] else {
            return plan_err!("single_row has two arguments");
        };
        let rows = rows
            .cast_to(&DataType::Int64, None)?
            .into_array(args.number_rows)?;
        if rows
            .as_primitive::<Int64Type>()
            .iter()
            .flatten()
            .any(|rows| rows > 1)
        {
            return Err(carry(
                Error::invalid("more than one row returned by a subquery used as an expression")
                    .code("21000")
                    .hint("aggregate it, as in (SELECT max(x) FROM …), or compare with IN"),
            ));
        }
        Ok(value.clone())
    }
}
