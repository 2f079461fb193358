//! PostgreSQL's types where DataFusion's differ; before types are coerced.
//!
//! * A text literal beside a number or a truth value takes its type. DataFusion would compare both as
//!   texts, by which `9 > '10'`. A text that is no literal is never compared with a number: that is an
//!   error.
//! * A decimal beside a DOUBLE becomes one. DataFusion would take the DOUBLE for a decimal of 15 digits
//!   before the point.
//! * A quotient of decimals has more digits: `10 / 3.0` shall not end after four.
//! * `round(x, n)` of a decimal has n digits behind the point, whatever type n was written in.
//! * A power of decimals is a DOUBLE; DataFusion would cut it to the digits of its base.
//! * `'\x41'` as BYTEA is one byte.

use std::sync::Arc;

use arrow::datatypes::DataType;
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion::common::{Column, DFSchema, Result, ScalarValue};
use datafusion::config::ConfigOptions;
use datafusion::logical_expr::expr::{Between, InList};
use datafusion::logical_expr::expr_rewriter::NamePreserver;
use datafusion::logical_expr::{
    BinaryExpr, Cast, Expr, ExprSchemable, LogicalPlan, Operator, Projection, Union,
};
use datafusion::optimizer::AnalyzerRule;
use millrace_dataflow::error::Error;

use crate::error::{UNDEFINED_FUNCTION, carry};
use crate::types::sql_name;

/// The analyzer rule: see the module.
#[derive(Debug)]
pub(crate) struct PostgresTypes;

impl AnalyzerRule for PostgresTypes {
    fn analyze(&self, plan: LogicalPlan, _: &ConfigOptions) -> Result<LogicalPlan> {
        plan.transform_up_with_subqueries(|plan| {
            let mut schema = DFSchema::empty();
            for input in plan.inputs() {
                schema.merge(input.schema());
            }
            let names = NamePreserver::new(&plan);
            plan.map_expressions(|expr| {
                let name = names.save(&expr);
                let rewritten = expr.transform_up(|e| typed(e, &schema))?;
                Ok(rewritten.update_data(|e| name.restore(e)))
            })?
            .map_data(LogicalPlan::recompute_schema)?
            .map_data(|plan| match plan {
                LogicalPlan::Union(parts) => union(parts),
                other => Ok(other),
            })
        })
        .data()
    }
    fn name(&self) -> &str {
        "postgres_types"
    }
}

fn typed(expr: Expr, schema: &DFSchema) -> Result<Transformed<Expr>> {
    Ok(match expr {
        Expr::BinaryExpr(BinaryExpr {
            left,
            op: Operator::Divide,
            right,
        }) => match more_digits(&left.get_type(schema)?, &right.get_type(schema)?) {
            Some(wider) => Transformed::yes(Expr::BinaryExpr(BinaryExpr::new(
                Box::new(Expr::Cast(Cast::new(left, wider))),
                Operator::Divide,
                right,
            ))),
            None => Transformed::no(Expr::BinaryExpr(BinaryExpr::new(
                left,
                Operator::Divide,
                right,
            ))),
        },
        // As a literal of its type: a cast around it would hide how many digits are left.
        Expr::ScalarFunction(mut function)
            if function.name() == "round" && function.args.len() == 2 =>
        {
            let digits = match &function.args[1] {
                Expr::Literal(ScalarValue::Int64(Some(digits)), _) => i32::try_from(*digits).ok(),
                Expr::Negative(digits) => match digits.as_ref() {
                    Expr::Literal(ScalarValue::Int64(Some(digits)), _) => {
                        i32::try_from(-digits).ok()
                    }
                    _ => None,
                },
                _ => None,
            };
            match digits {
                Some(digits) => {
                    function.args[1] = Expr::Literal(ScalarValue::Int32(Some(digits)), None);
                    Transformed::yes(Expr::ScalarFunction(function))
                }
                None => Transformed::no(Expr::ScalarFunction(function)),
            }
        }
        Expr::ScalarFunction(mut function) if function.name() == "power" => {
            let mut changed = false;
            for arg in &mut function.args {
                if arg.get_type(schema)?.is_decimal() {
                    *arg = double(std::mem::take(arg));
                    changed = true;
                }
            }
            let expr = Expr::ScalarFunction(function);
            match changed {
                true => Transformed::yes(expr),
                false => Transformed::no(expr),
            }
        }
        Expr::Cast(cast) if cast.data_type == DataType::Binary => match bytes(&cast.expr)? {
            Some(bytes) => Transformed::yes(Expr::Literal(ScalarValue::Binary(Some(bytes)), None)),
            None => Transformed::no(Expr::Cast(cast)),
        },
        Expr::BinaryExpr(BinaryExpr { left, op, right }) if compares(op) => {
            let (l, r) = pair(*left, *right, &op.to_string(), schema)?;
            Transformed::yes(Expr::BinaryExpr(BinaryExpr::new(
                Box::new(l),
                op,
                Box::new(r),
            )))
        }
        Expr::Between(Between {
            expr,
            negated,
            low,
            high,
        }) => {
            let (value, low) = pair(*expr, *low, ">=", schema)?;
            let (value, high) = pair(value, *high, "<=", schema)?;
            Transformed::yes(Expr::Between(Between::new(
                Box::new(value),
                negated,
                Box::new(low),
                Box::new(high),
            )))
        }
        Expr::InList(InList {
            expr,
            list,
            negated,
        }) => {
            let mut value = *expr;
            let mut items = Vec::with_capacity(list.len());
            for item in list {
                let (v, item) = pair(value, item, "=", schema)?;
                value = v;
                items.push(item);
            }
            Transformed::yes(Expr::InList(InList::new(Box::new(value), items, negated)))
        }
        Expr::Case(mut case) => {
            if let Some(operand) = case.expr.take() {
                let mut value = *operand;
                for (when, _) in &mut case.when_then_expr {
                    let (v, typed) = pair(value, std::mem::take(&mut **when), "=", schema)?;
                    value = v;
                    **when = typed;
                }
                case.expr = Some(Box::new(value));
            }
            let results = case.when_then_expr.iter_mut().map(|(_, then)| &mut **then);
            let results = results.chain(case.else_expr.as_deref_mut());
            alike(results.collect(), schema)?;
            Transformed::yes(Expr::Case(case))
        }
        Expr::ScalarFunction(mut function) if CHOOSE.contains(&function.name()) => {
            alike(function.args.iter_mut().collect(), schema)?;
            Transformed::yes(Expr::ScalarFunction(function))
        }
        other => Transformed::no(other),
    })
}

fn compares(op: Operator) -> bool {
    matches!(
        op,
        Operator::Eq
            | Operator::NotEq
            | Operator::Lt
            | Operator::LtEq
            | Operator::Gt
            | Operator::GtEq
            | Operator::IsDistinctFrom
            | Operator::IsNotDistinctFrom
    )
}

/// Functions that give one of their arguments.
const CHOOSE: &[&str] = &["coalesce", "greatest", "least", "nullif", "nvl", "nvl2"];

/// Makes decimals beside a DOUBLE into one, where one of several values is chosen.
fn alike(values: Vec<&mut Expr>, schema: &DFSchema) -> Result<()> {
    let types = values
        .iter()
        .map(|v| v.get_type(schema))
        .collect::<Result<Vec<_>>>()?;
    if !types.iter().any(DataType::is_floating) {
        return Ok(());
    }
    for (value, data_type) in values.into_iter().zip(types) {
        if data_type.is_decimal() {
            *value = double(std::mem::take(value));
        }
    }
    Ok(())
}

fn double(expr: Expr) -> Expr {
    Expr::Cast(Cast::new(Box::new(expr), DataType::Float64))
}

/// The parts of a UNION, decimals in a column that is DOUBLE elsewhere made DOUBLE.
fn union(mut union: Union) -> Result<LogicalPlan> {
    let columns = union
        .inputs
        .first()
        .map_or(0, |i| i.schema().fields().len());
    let is = |input: &LogicalPlan, column: usize, wanted: fn(&DataType) -> bool| {
        let fields = input.schema().fields();
        fields.get(column).is_some_and(|f| wanted(f.data_type()))
    };
    let mixed: Vec<usize> = (0..columns)
        .filter(|c| {
            let any = |wanted| union.inputs.iter().any(|i| is(i, *c, wanted));
            any(DataType::is_floating) && any(DataType::is_decimal)
        })
        .collect();
    if mixed.is_empty() {
        return Ok(LogicalPlan::Union(union));
    }
    for input in &mut union.inputs {
        let exprs = input.schema().iter().enumerate();
        let exprs = exprs
            .map(|(at, (qualifier, field))| {
                let column = Expr::Column(Column::new(qualifier.cloned(), field.name()));
                match mixed.contains(&at) && field.data_type().is_decimal() {
                    true => double(column).alias_qualified(qualifier.cloned(), field.name()),
                    false => column,
                }
            })
            .collect();
        let projection = Projection::try_new(exprs, Arc::clone(input))?;
        *input = Arc::new(LogicalPlan::Projection(projection));
    }
    LogicalPlan::Union(union).recompute_schema()
}

/// Both sides of an operator, a text literal among them with the type of the other.
fn pair(left: Expr, right: Expr, op: &str, schema: &DFSchema) -> Result<(Expr, Expr)> {
    let (Ok(l), Ok(r)) = (left.get_type(schema), right.get_type(schema)) else {
        return Ok((left, right));
    };
    if l.is_floating() && r.is_decimal() {
        return Ok((left, double(right)));
    }
    if l.is_decimal() && r.is_floating() {
        return Ok((double(left), right));
    }
    match (
        takes_literals(&l),
        l.is_string(),
        takes_literals(&r),
        r.is_string(),
    ) {
        (true, _, _, true) => match literal(&right, &l) {
            Some(right) => Ok((left, right)),
            None => Err(mismatch(&l, op, &r)),
        },
        (_, true, true, _) => match literal(&left, &r) {
            Some(left) => Ok((left, right)),
            None => Err(mismatch(&l, op, &r)),
        },
        _ => Ok((left, right)),
    }
}

fn takes_literals(data_type: &DataType) -> bool {
    data_type.is_numeric() || *data_type == DataType::Boolean
}

fn mismatch(left: &DataType, op: &str, right: &DataType) -> datafusion::error::DataFusionError {
    carry(
        Error::invalid(format!(
            "operator does not exist: {} {op} {}",
            sql_name(left),
            sql_name(right)
        ))
        .code(UNDEFINED_FUNCTION)
        .hint("CAST one of the two to the type of the other"),
    )
}

/// A text literal as a value of the type; `None` for what is no literal.
fn literal(expr: &Expr, wanted: &DataType) -> Option<Expr> {
    let Expr::Literal(
        ScalarValue::Utf8(text) | ScalarValue::LargeUtf8(text) | ScalarValue::Utf8View(text),
        _,
    ) = expr
    else {
        return None;
    };
    // A literal keeps the digits that the other side does not have.
    let wanted = match (
        wanted,
        text.as_deref().and_then(|t| t.trim().split_once('.')),
    ) {
        (DataType::Decimal128(_, scale), Some((_, digits))) => {
            let digits = i8::try_from(digits.len()).unwrap_or(i8::MAX).min(18);
            DataType::Decimal128(38, digits.max(*scale))
        }
        _ => wanted.clone(),
    };
    Some(Expr::Cast(Cast::new(Box::new(expr.clone()), wanted)))
}

/// Digits behind the point of a dividend; a quotient of decimals has four more.
const DIVIDEND_SCALE: i8 = 12;
/// Digits before the point that a dividend keeps room for.
const DIVIDEND_DIGITS: i16 = 20;

/// The type in which a number is divided by another, if one of them is a decimal and the quotient
/// would end early.
fn more_digits(left: &DataType, right: &DataType) -> Option<DataType> {
    if !left.is_decimal() && !right.is_decimal() {
        return None;
    }
    let ((precision, scale), (_, divisor)) = (digits(left)?, digits(right)?);
    // The division works on 38 digits, which also hold those of the divisor behind the point.
    let before = (precision - scale).min(DIVIDEND_DIGITS);
    let room = i8::try_from(34 - divisor - before).unwrap_or(0);
    let wider = room.min(DIVIDEND_SCALE);
    if i16::from(wider) <= scale {
        return None;
    }
    let precision = (precision - scale + i16::from(wider)).min(38);
    Some(DataType::Decimal128(u8::try_from(precision).ok()?, wider))
}

/// Precision and scale of a decimal or of a whole number.
fn digits(data_type: &DataType) -> Option<(i16, i16)> {
    Some(match data_type {
        DataType::Decimal128(p, s) => (i16::from(*p), i16::from(*s)),
        DataType::Int8 | DataType::UInt8 => (3, 0),
        DataType::Int16 | DataType::UInt16 => (5, 0),
        DataType::Int32 | DataType::UInt32 => (10, 0),
        DataType::Int64 => (20, 0),
        _ => return None,
    })
}

/// The bytes that a literal writes in hexadecimal.
fn bytes(expr: &Expr) -> Result<Option<Vec<u8>>> {
    let Expr::Literal(ScalarValue::Utf8(Some(text)), _) = expr else {
        return Ok(None);
    };
    let Some(hex) = text.strip_prefix("\\x") else {
        return Ok(None);
    };
    let wrong = || carry(Error::invalid("invalid hexadecimal data").code("22P02"));
    if !hex.is_ascii() || hex.len() % 2 != 0 {
        return Err(wrong());
    }
    (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).map_err(|_| wrong()))
        .collect::<Result<_>>()
        .map(Some)
}
