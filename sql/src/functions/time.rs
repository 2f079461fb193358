//! Functions that make timestamps, giving microseconds.

use std::any::Any;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, FieldRef, TimeUnit};
use datafusion::common::{Result, plan_err};
use datafusion::logical_expr::simplify::{ExprSimplifyResult, SimplifyContext};
use datafusion::logical_expr::{
    Cast, ColumnarValue, Expr, ReturnFieldArgs, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl,
    Signature,
};

/// Those of DataFusion's functions that give another unit.
const MAKERS: &[&str] = &[
    "now",
    "to_timestamp",
    "to_timestamp_seconds",
    "to_timestamp_millis",
    "to_timestamp_micros",
    "to_timestamp_nanos",
    "from_unixtime",
];

/// `function` itself, or a wrapper that casts its result to microseconds.
pub(crate) fn in_microseconds(function: Arc<ScalarUDF>) -> Arc<ScalarUDF> {
    if MAKERS.contains(&function.name()) {
        Arc::new(ScalarUDF::new_from_impl(Micros { inner: function }))
    } else {
        function
    }
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Micros {
    inner: Arc<ScalarUDF>,
}

fn micros(data_type: &DataType) -> DataType {
    match data_type {
        DataType::Timestamp(_, None) => DataType::Timestamp(TimeUnit::Microsecond, None),
        DataType::Timestamp(_, Some(_)) => {
            DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()))
        }
        other => other.clone(),
    }
}

impl ScalarUDFImpl for Micros {
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn aliases(&self) -> &[String] {
        self.inner.aliases()
    }
    fn signature(&self) -> &Signature {
        self.inner.signature()
    }
    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        plan_err!("the type of \"{}\" depends on its arguments", self.name())
    }
    fn return_field_from_args(&self, args: ReturnFieldArgs<'_>) -> Result<FieldRef> {
        let field = self.inner.inner().return_field_from_args(args)?;
        let data_type = if self.name() == "now" {
            DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()))
        } else {
            micros(field.data_type())
        };
        Ok(Arc::new(Field::new(
            field.name(),
            data_type,
            field.is_nullable(),
        )))
    }
    fn coerce_types(&self, arg_types: &[DataType]) -> Result<Vec<DataType>> {
        self.inner.inner().coerce_types(arg_types)
    }
    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let wanted = args.return_field.data_type().clone();
        let arg_types = &args.arg_fields;
        let scalars: Vec<Option<&datafusion::common::ScalarValue>> = args
            .args
            .iter()
            .map(|a| match a {
                ColumnarValue::Scalar(s) => Some(s),
                ColumnarValue::Array(_) => None,
            })
            .collect();
        let return_field = self.inner.inner().return_field_from_args(ReturnFieldArgs {
            arg_fields: arg_types,
            scalar_arguments: &scalars,
        })?;
        let args = ScalarFunctionArgs {
            return_field,
            ..args
        };
        self.inner.invoke_with_args(args)?.cast_to(&wanted, None)
    }
    fn simplify(&self, args: Vec<Expr>, info: &SimplifyContext) -> Result<ExprSimplifyResult> {
        if self.name() != "now" {
            return Ok(ExprSimplifyResult::Original(args));
        }
        Ok(match self.inner.inner().simplify(args, info)? {
            ExprSimplifyResult::Simplified(expr) => {
                ExprSimplifyResult::Simplified(Expr::Cast(Cast::new(
                    Box::new(expr),
                    DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
                )))
            }
            original => original,
        })
    }
}
