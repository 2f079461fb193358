//! Errors of expressions: checked arithmetic, and nothing evaluated that need not be.
//!
//! DataFusion wraps on overflow and evaluates both sides of AND and OR. One rewrite, for views and
//! one-shot queries alike, changes both:
//!
//! * [`Checked`], an analyzer rule, turns `+ - *` over whole numbers, decimals and times into
//!   functions that fail on overflow. It runs before constants are folded, so that folding is
//!   checked too. Lowering turns the functions back into operators that fail. `||` becomes a
//!   function that bounds its result.
//! * [`short_circuit`], applied after all other rules (which rebuild conjunctions), turns a chain of
//!   AND or OR with a fallible member into a CASE that looks at the members in their order.
//!
//! [`fallible`] says whether evaluating can fail; filter pushdown keeps such predicates in place.

use std::any::Any;
use std::sync::{Arc, LazyLock};

use arrow::compute::kernels::concat_elements::concat_elements_dyn;
use arrow::compute::kernels::numeric::{add, mul, sub};
use arrow::datatypes::DataType;
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion::common::{DFSchema, Result, ScalarValue, plan_err};
use datafusion::config::ConfigOptions;
use datafusion::logical_expr::expr::{Alias, Case, InList, Like, ScalarFunction};
use datafusion::logical_expr::expr_rewriter::NamePreserver;
use datafusion::logical_expr::type_coercion::binary::BinaryTypeCoercer;
use datafusion::logical_expr::{
    BinaryExpr, ColumnarValue, Expr, ExprSchemable, LogicalPlan, Operator, ScalarFunctionArgs,
    ScalarUDF, ScalarUDFImpl, Signature, Volatility,
};
use datafusion::optimizer::AnalyzerRule;
use datafusion::physical_expr_common::datum::apply;

use crate::functions::{check_concat, is_total};

/// `+`, `-` or `*` that fails on overflow, `||` that fails when its result is too long.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(crate) struct CheckedOp {
    pub(crate) op: Operator,
    signature: Signature,
}

const CHECKED: [Operator; 4] = [
    Operator::Plus,
    Operator::Minus,
    Operator::Multiply,
    Operator::StringConcat,
];

static OPS: LazyLock<[Arc<ScalarUDF>; 4]> = LazyLock::new(|| {
    CHECKED.map(|op| {
        Arc::new(ScalarUDF::new_from_impl(CheckedOp {
            op,
            signature: Signature::any(2, Volatility::Immutable),
        }))
    })
});

/// Name of `||` as a function.
pub(crate) const CONCAT: &str = "checked_concat";

fn checked_op(op: Operator) -> Option<Arc<ScalarUDF>> {
    let index = CHECKED.iter().position(|checked| *checked == op)?;
    Some(Arc::clone(&OPS[index]))
}

impl ScalarUDFImpl for CheckedOp {
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn name(&self) -> &str {
        match self.op {
            Operator::Plus => "checked_add",
            Operator::Minus => "checked_subtract",
            Operator::StringConcat => CONCAT,
            _ => "checked_multiply",
        }
    }
    fn schema_name(&self, args: &[Expr]) -> Result<String> {
        match args {
            [l, r] => Ok(format!(
                "{} {} {}",
                l.schema_name(),
                self.op,
                r.schema_name()
            )),
            _ => plan_err!("an operator has two arguments"),
        }
    }
    fn signature(&self) -> &Signature {
        &self.signature
    }
    fn return_type(&self, arg_types: &[DataType]) -> Result<DataType> {
        match arg_types {
            [l, r] => BinaryTypeCoercer::new(l, &self.op, r).get_result_type(),
            _ => plan_err!("an operator has two arguments"),
        }
    }
    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let [l, r] = &args.args[..] else {
            return plan_err!("an operator has two arguments");
        };
        match self.op {
            Operator::Plus => apply(l, r, add),
            Operator::Minus => apply(l, r, sub),
            Operator::StringConcat => {
                check_concat(&args.args, args.number_rows)?;
                concat(l, r)
            }
            _ => apply(l, r, mul),
        }
    }
}

fn concat(left: &ColumnarValue, right: &ColumnarValue) -> Result<ColumnarValue> {
    let arrays = ColumnarValue::values_to_arrays(&[left.clone(), right.clone()])?;
    let joined = concat_elements_dyn(&arrays[0], &arrays[1])?;
    Ok(match (left, right) {
        (ColumnarValue::Scalar(_), ColumnarValue::Scalar(_)) => {
            ColumnarValue::Scalar(ScalarValue::try_from_array(&joined, 0)?)
        }
        _ => ColumnarValue::Array(joined),
    })
}

/// The checked operator of arithmetic behind a function, if it is one.
pub(crate) fn as_checked(function: &ScalarUDF) -> Option<Operator> {
    function
        .inner()
        .as_any()
        .downcast_ref::<CheckedOp>()
        .map(|c| c.op)
        .filter(|op| *op != Operator::StringConcat)
}

/// The analyzer rule: see the module.
#[derive(Debug)]
pub(crate) struct Checked;

impl AnalyzerRule for Checked {
    fn analyze(&self, plan: LogicalPlan, _: &ConfigOptions) -> Result<LogicalPlan> {
        plan.transform_up_with_subqueries(|plan| {
            // Expressions of a join see both sides.
            let mut schema = DFSchema::empty();
            for input in plan.inputs() {
                schema.merge(input.schema());
            }
            if let LogicalPlan::TableScan(scan) = &plan {
                schema.merge(&DFSchema::try_from_qualified_schema(
                    scan.table_name.clone(),
                    &scan.source.schema(),
                )?);
            }
            let names = NamePreserver::new(&plan);
            plan.map_expressions(|expr| {
                let name = names.save(&expr);
                let rewritten = check(expr, &schema)?;
                Ok(rewritten.update_data(|e| name.restore(e)))
            })
        })
        .data()
    }
    fn name(&self) -> &str {
        "checked_arithmetic"
    }
}

/// Checked arithmetic throughout an expression.
pub(crate) fn check(expr: Expr, schema: &DFSchema) -> Result<Transformed<Expr>> {
    expr.transform_up(|expr| {
        Ok(match expr {
            Expr::BinaryExpr(BinaryExpr { left, op, right }) => {
                let l = left.get_type(schema)?;
                let r = right.get_type(schema)?;
                let text = |t: &DataType| t.is_string() && l == r;
                match checked_op(op) {
                    Some(function) if op == Operator::StringConcat && text(&l) => {
                        Transformed::yes(Expr::ScalarFunction(ScalarFunction::new_udf(
                            function,
                            vec![*left, *right],
                        )))
                    }
                    Some(function) if op != Operator::StringConcat && overflows(&l, &r) => {
                        Transformed::yes(Expr::ScalarFunction(ScalarFunction::new_udf(
                            function,
                            vec![*left, *right],
                        )))
                    }
                    _ => Transformed::no(Expr::BinaryExpr(BinaryExpr { left, op, right })),
                }
            }
            Expr::Negative(inner) => {
                let data_type = inner.get_type(schema)?;
                if !data_type.is_integer() {
                    return Ok(Transformed::no(Expr::Negative(inner)));
                }
                let zero = Expr::Literal(ScalarValue::new_zero(&data_type)?, None);
                match checked_op(Operator::Minus) {
                    Some(function) => Transformed::yes(Expr::ScalarFunction(
                        ScalarFunction::new_udf(function, vec![zero, *inner]),
                    )),
                    None => Transformed::no(Expr::Negative(inner)),
                }
            }
            other => Transformed::no(other),
        })
    })
}

fn overflows(left: &DataType, right: &DataType) -> bool {
    let is_date = |t: &DataType| matches!(t, DataType::Date32 | DataType::Date64);
    let float = |t: &DataType| t.is_floating() || t.is_null();
    // The difference of two dates is a number of days: nothing to overflow, and a kernel of its own.
    !(float(left) && float(right)) && !(is_date(left) && is_date(right))
}

/// Whether evaluating the expression can fail for some row.
pub(crate) fn fallible(expr: &Expr, schema: &DFSchema) -> bool {
    let of = |e: &Expr| fallible(e, schema);
    match expr {
        Expr::Column(_) | Expr::Literal(_, _) | Expr::OuterReferenceColumn(_, _) => false,
        Expr::Alias(Alias { expr, .. })
        | Expr::Not(expr)
        | Expr::IsNull(expr)
        | Expr::IsNotNull(expr)
        | Expr::IsTrue(expr)
        | Expr::IsFalse(expr)
        | Expr::IsUnknown(expr)
        | Expr::IsNotTrue(expr)
        | Expr::IsNotFalse(expr)
        | Expr::IsNotUnknown(expr) => of(expr),
        Expr::BinaryExpr(BinaryExpr { left, op, right }) => {
            of(left) || of(right) || {
                let float = |e: &Expr| e.get_type(schema).is_ok_and(|t| t.is_floating());
                match op {
                    Operator::Plus
                    | Operator::Minus
                    | Operator::Multiply
                    | Operator::Divide
                    | Operator::Modulo => !(float(left) && float(right)),
                    Operator::RegexMatch
                    | Operator::RegexIMatch
                    | Operator::RegexNotMatch
                    | Operator::RegexNotIMatch => !matches!(**right, Expr::Literal(_, _)),
                    other => {
                        !(other.supports_propagation()
                            || matches!(
                                other,
                                Operator::And
                                    | Operator::Or
                                    | Operator::NotEq
                                    | Operator::IsDistinctFrom
                                    | Operator::IsNotDistinctFrom
                                    | Operator::StringConcat
                            ))
                    }
                }
            }
        }
        Expr::Like(Like { expr, pattern, .. }) => {
            of(expr) || !matches!(**pattern, Expr::Literal(_, _))
        }
        Expr::Between(b) => of(&b.expr) || of(&b.low) || of(&b.high),
        Expr::InList(InList { expr, list, .. }) => of(expr) || list.iter().any(of),
        Expr::Case(Case {
            expr,
            when_then_expr,
            else_expr,
        }) => {
            expr.as_deref().is_some_and(of)
                || else_expr.as_deref().is_some_and(of)
                || when_then_expr.iter().any(|(w, t)| of(w) || of(t))
        }
        Expr::Cast(cast) => {
            of(&cast.expr)
                || !cast
                    .expr
                    .get_type(schema)
                    .is_ok_and(|from| lossless(&from, &cast.data_type))
        }
        Expr::TryCast(cast) => of(&cast.expr),
        Expr::ScalarFunction(f) => !is_total(f.name()) || f.args.iter().any(of),
        _ => true,
    }
}

/// Casts that have a result for every value.
fn lossless(from: &DataType, to: &DataType) -> bool {
    use DataType::*;
    if from == to || from.is_null() {
        return true;
    }
    let width = |t: &DataType| match t {
        Int8 => Some(3),
        Int16 => Some(5),
        Int32 => Some(10),
        Int64 => Some(19),
        _ => None,
    };
    match (from, to) {
        (Int8, Int16 | Int32 | Int64) | (Int16, Int32 | Int64) | (Int32, Int64) => true,
        (f, Float32 | Float64) => f.is_integer() || f.is_floating() || f.is_decimal(),
        (f, Decimal128(p, s)) => match (width(f), f) {
            (Some(digits), _) => *s >= 0 && i16::from(*p) - i16::from(*s) >= digits,
            (None, Decimal128(fp, fs)) => {
                s >= fs && i16::from(*p) - i16::from(*s) >= i16::from(*fp) - i16::from(*fs)
            }
            _ => false,
        },
        (Boolean, t) => t.is_integer() || matches!(t, Utf8),
        (f, Utf8) => !f.is_nested() && !f.is_binary(),
        (Timestamp(a, _), Timestamp(b, _)) => a >= b,
        (Utf8 | LargeUtf8 | Utf8View, Utf8View | LargeUtf8) => true,
        _ => false,
    }
}

/// Makes chains of AND and OR with fallible members evaluate them in order, on the rows that need it.
pub(crate) fn short_circuit(plan: LogicalPlan) -> Result<LogicalPlan> {
    plan.transform_up_with_subqueries(|plan| {
        let mut schema = DFSchema::empty();
        for input in plan.inputs() {
            schema.merge(input.schema());
        }
        // What a scan filters by is a hint to its provider; the provider decides how.
        if matches!(plan, LogicalPlan::TableScan(_)) {
            return Ok(Transformed::no(plan));
        }
        let names = NamePreserver::new(&plan);
        let filter = matches!(plan, LogicalPlan::Filter(_) | LogicalPlan::Join(_));
        plan.map_expressions(|expr| {
            let name = names.save(&expr);
            let rewritten = lazy(expr, &schema, filter)?;
            Ok(rewritten.update_data(|e| name.restore(e)))
        })
    })
    .data()
}

fn lazy(expr: Expr, schema: &DFSchema, filter: bool) -> Result<Transformed<Expr>> {
    if let Expr::BinaryExpr(BinaryExpr {
        op: op @ (Operator::And | Operator::Or),
        ..
    }) = &expr
    {
        let op = *op;
        let mut terms = Vec::new();
        flatten(&expr, op, &mut terms);
        // The first member is always evaluated: only the others can do harm.
        if terms.iter().skip(1).any(|t| fallible(t, schema)) {
            let mut lazy_terms = Vec::with_capacity(terms.len());
            for term in terms {
                lazy_terms.push(lazy(term.clone(), schema, filter)?.data);
            }
            return Ok(Transformed::yes(chain(lazy_terms, op, schema, filter)?));
        }
        return Ok(Transformed::no(expr));
    }
    // Below NOT, a comparison or a function, null and false are no longer the same.
    expr.map_children(|child| lazy(child, schema, false))
}

fn flatten<'a>(expr: &'a Expr, op: Operator, terms: &mut Vec<&'a Expr>) {
    match expr {
        Expr::BinaryExpr(b) if b.op == op => {
            flatten(&b.left, op, terms);
            flatten(&b.right, op, terms);
        }
        other => terms.push(other),
    }
}

/// `a AND b AND c`: CASE WHEN NOT a THEN false WHEN NOT b THEN false WHEN NOT c THEN false ELSE rest,
/// where rest is true, or null if one of them is.
fn chain(terms: Vec<Expr>, op: Operator, schema: &DFSchema, filter: bool) -> Result<Expr> {
    let decided = op == Operator::Or;
    // In a filter a null drops the row as false does. Then AND can ask for "not true".
    let strict = filter && op == Operator::And;
    let mut whens = Vec::with_capacity(terms.len());
    let mut rest: Option<Expr> = None;
    for term in terms {
        let nullable = term.nullable(schema).unwrap_or(true);
        if nullable && !strict {
            rest = Some(match rest {
                None => term.clone(),
                Some(r) => {
                    Expr::BinaryExpr(BinaryExpr::new(Box::new(r), op, Box::new(term.clone())))
                }
            });
        }
        let when = match (op, strict) {
            (Operator::Or, _) => term,
            (_, false) => Expr::Not(Box::new(term)),
            (_, true) => Expr::IsNotTrue(Box::new(term)),
        };
        whens.push((Box::new(when), Box::new(boolean(decided))));
    }
    let otherwise = rest.unwrap_or_else(|| boolean(!decided));
    Ok(Expr::Case(Case::new(
        None,
        whens,
        Some(Box::new(otherwise)),
    )))
}

fn boolean(value: bool) -> Expr {
    Expr::Literal(ScalarValue::Boolean(Some(value)), None)
}
