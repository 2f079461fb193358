//! What PostgreSQL writes and the planner does not know, said in words that it knows.
//!
//! * A cast to `VARCHAR(n)` cuts at n characters.
//! * A number with an exponent is a DOUBLE, others with a point are exact, as are whole numbers
//!   beyond BIGINT.
//! * `mod(a, b)`, `localtimestamp`, `U&'…'`.
//! * Patterns of `to_char`, `to_date` and `to_timestamp` (`YYYY-MM-DD`) become those of strftime.

use std::ops::ControlFlow;

use datafusion::sql::sqlparser::ast::{
    BinaryOperator, DataType, ExactNumberInfo, Expr, Function, FunctionArg, FunctionArgExpr,
    FunctionArgumentList, FunctionArguments, Ident, ObjectName, Query, TableFactor, TimezoneInfo,
    Value, VisitMut, VisitorMut,
};
use millrace_dataflow::error::{Error, Result};

use super::relations::{fetched, function, names_columns, rows_in, within_group};
use crate::parse::fold_name;
use crate::types::text_length;

/// Rewrites a query or an expression in place.
pub(crate) fn rewrite<T: VisitMut>(tree: &mut T) -> Result<()> {
    match tree.visit(&mut Rewriter) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(error) => Err(error),
    }
}

struct Rewriter;

impl VisitorMut for Rewriter {
    type Break = Error;

    fn pre_visit_query(&mut self, query: &mut Query) -> ControlFlow<Error> {
        fetched(query);
        ControlFlow::Continue(())
    }

    fn post_visit_table_factor(&mut self, factor: &mut TableFactor) -> ControlFlow<Error> {
        match function(factor) {
            Ok(Some(new)) => *factor = new,
            Ok(None) => {}
            Err(error) => return ControlFlow::Break(error),
        }
        ControlFlow::Continue(())
    }

    fn post_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<Error> {
        match rewritten(expr) {
            Ok(Some(new)) => *expr = new,
            Ok(None) => {}
            Err(error) => return ControlFlow::Break(error),
        }
        ControlFlow::Continue(())
    }
}

fn rewritten(expr: &mut Expr) -> Result<Option<Expr>> {
    Ok(match expr {
        Expr::Value(value) => match &value.value {
            Value::Number(digits, _) if digits.contains(['e', 'E']) => Some(double(digits)?),
            Value::Number(digits, long) if digits.contains('_') => Some(Expr::Value(
                Value::Number(digits.replace('_', ""), *long).into(),
            )),
            // Between the largest BIGINT and what the planner takes for an unsigned number.
            Value::Number(digits, _)
                if digits.parse::<u64>().is_ok() && digits.parse::<i64>().is_err() =>
            {
                Some(cast(
                    Expr::Value(Value::SingleQuotedString(digits.clone()).into()),
                    DataType::Decimal(ExactNumberInfo::PrecisionAndScale(20, 0)),
                ))
            }
            Value::UnicodeStringLiteral(text) => {
                Some(Expr::Value(Value::SingleQuotedString(text.clone()).into()))
            }
            _ => None,
        },
        Expr::Cast { data_type, .. } => match text_length(data_type)? {
            Some(length) => {
                *data_type = DataType::Text;
                let whole = std::mem::replace(expr, Expr::Identifier(Ident::new("")));
                let length = Expr::Value(Value::Number(length.to_string(), false).into());
                Some(call("left", vec![whole, length]))
            }
            None => None,
        },
        Expr::Function(function) => {
            within_group(function)?;
            function_call(function)?
        }
        Expr::InSubquery { .. } => rows_in(expr)?,
        // The planner knows no outer row within the brackets of an array.
        Expr::Array(array) if array.elem.iter().any(names_columns) => {
            Some(call("make_array", std::mem::take(&mut array.elem)))
        }
        _ => None,
    })
}

fn double(digits: &str) -> Result<Expr> {
    if !digits.parse::<f64>().is_ok_and(f64::is_finite) {
        return Err(
            Error::invalid(format!("\"{digits}\" is out of range for type DOUBLE")).code("22003"),
        );
    }
    Ok(cast(
        Expr::Value(Value::SingleQuotedString(digits.to_string()).into()),
        DataType::Double(ExactNumberInfo::None),
    ))
}

fn function_call(function: &mut Function) -> Result<Option<Expr>> {
    let name = fold_name(&function.name).unwrap_or_default().join(".");
    match (name.as_str(), &mut function.args) {
        ("localtimestamp", FunctionArguments::None) => Ok(Some(cast(
            call("now", Vec::new()),
            DataType::Timestamp(None, TimezoneInfo::None),
        ))),
        ("mod", FunctionArguments::List(list)) => Ok(match &list.args[..] {
            [
                FunctionArg::Unnamed(FunctionArgExpr::Expr(left)),
                FunctionArg::Unnamed(FunctionArgExpr::Expr(right)),
            ] => Some(Expr::Nested(Box::new(Expr::BinaryOp {
                left: Box::new(Expr::Nested(Box::new(left.clone()))),
                op: BinaryOperator::Modulo,
                right: Box::new(Expr::Nested(Box::new(right.clone()))),
            }))),
            _ => None,
        }),
        ("to_char" | "to_date" | "to_timestamp", FunctionArguments::List(list)) => {
            if let [
                _,
                FunctionArg::Unnamed(FunctionArgExpr::Expr(Expr::Value(value))),
            ] = &mut list.args[..]
                && let Value::SingleQuotedString(pattern) = &mut value.value
                && !pattern.contains('%')
            {
                *pattern = strftime(pattern)?;
            }
            Ok(None)
        }
        _ => Ok(None),
    }
}

fn cast(expr: Expr, data_type: DataType) -> Expr {
    Expr::Cast {
        kind: datafusion::sql::sqlparser::ast::CastKind::Cast,
        expr: Box::new(expr),
        data_type,
        array: false,
        format: None,
    }
}

pub(super) fn call(name: &str, args: Vec<Expr>) -> Expr {
    Expr::Function(Function {
        name: ObjectName::from(vec![Ident::new(name)]),
        uses_odbc_syntax: false,
        parameters: FunctionArguments::None,
        args: FunctionArguments::List(FunctionArgumentList {
            duplicate_treatment: None,
            args: args
                .into_iter()
                .map(|a| FunctionArg::Unnamed(FunctionArgExpr::Expr(a)))
                .collect(),
            clauses: Vec::new(),
        }),
        filter: None,
        null_treatment: None,
        over: None,
        within_group: Vec::new(),
    })
}

/// PostgreSQL's pattern, strftime's; longer ones first.
const PATTERNS: &[(&str, &str)] = &[
    ("HH24", "%H"),
    ("HH12", "%I"),
    ("IYYY", "%G"),
    ("YYYY", "%Y"),
    ("DDD", "%j"),
    ("DD", "%d"),
    ("HH", "%I"),
    ("IW", "%V"),
    ("MI", "%M"),
    ("MM", "%m"),
    ("MS", "%3f"),
    ("SS", "%S"),
    ("US", "%6f"),
    ("YY", "%y"),
];

/// Patterns of which the letters' case means something.
const WORDS: &[(&str, &str)] = &[
    ("FMMonth", "%B"),
    ("FMDay", "%A"),
    ("Mon", "%b"),
    ("Dy", "%a"),
    ("AM", "%p"),
    ("PM", "%p"),
    ("am", "%P"),
    ("pm", "%P"),
];

/// A pattern of PostgreSQL as one of strftime. What has no counterpart is refused.
fn strftime(pattern: &str) -> Result<String> {
    let mut out = String::new();
    let mut rest = pattern;
    while let Some(first) = rest.chars().next() {
        if let Some(quoted) = rest.strip_prefix('"') {
            let end = quoted.find('"').unwrap_or(quoted.len());
            out.push_str(&quoted[..end]);
            rest = quoted.get(end + 1..).unwrap_or_default();
            continue;
        }
        let numeric = PATTERNS.iter().find(|(name, _)| {
            rest.get(..name.len())
                .is_some_and(|head| head.eq_ignore_ascii_case(name))
        });
        let word = WORDS.iter().find(|(name, _)| rest.starts_with(name));
        if let Some((name, chrono)) = word.or(numeric) {
            out.push_str(chrono);
            rest = &rest[name.len()..];
        } else if first.is_ascii_alphabetic() && first != 'T' && first != 'Z' {
            return Err(Error::unsupported(format!(
                "the date pattern \"{pattern}\" is not supported from \"{rest}\" on"
            ))
            .hint("patterns are YYYY, YY, MM, Mon, DD, DDD, Dy, HH24, HH12, MI, SS, MS, US, AM, IYYY, IW, FMMonth, FMDay, other text in double quotes; or those of strftime, as in '%Y-%m-%d'"));
        } else {
            out.push(first);
            rest = &rest[first.len_utf8()..];
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_translated_or_refused() {
        for (pattern, expected) in [
            ("YYYY-MM-DD", "%Y-%m-%d"),
            ("yyyy-mm-dd hh24:mi:ss.us", "%Y-%m-%d %H:%M:%S.%6f"),
            ("YYYY-MM-DD\"T\"HH24:MI:SS.MSZ", "%Y-%m-%dT%H:%M:%S.%3fZ"),
            ("Dy, DD Mon YYYY HH12 AM", "%a, %d %b %Y %I %p"),
        ] {
            assert_eq!(strftime(pattern).expect("known"), expected);
        }
        assert_eq!(strftime("YYYY Q").expect_err("no quarter").code, "0A000");
    }
}
