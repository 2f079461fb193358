//! Forms of relations and predicates that PostgreSQL knows, as others that the planner knows.
//!
//! ```text
//! FETCH FIRST n ROWS ONLY        LIMIT n
//! FROM t, unnest(t.a) AS x(u)    FROM t, LATERAL (SELECT unnest(t.a)) AS x(u)
//! generate_series(a, b [, step]) LATERAL (SELECT unnest(generate_series(a, b [, step])))
//! (a, b) IN (SELECT c, d …)      EXISTS (SELECT … FROM (SELECT c, d …) WHERE c = a AND d = b)
//! f(p) WITHIN GROUP (ORDER BY x) f(x, p)
//! ```

use std::ops::ControlFlow;

use datafusion::sql::sqlparser::ast::{
    BinaryOperator, Expr, Function, FunctionArg, FunctionArgExpr, FunctionArguments, Ident,
    LimitClause, Query, SelectItem, SetExpr, TableAlias, TableAliasColumnDef, TableFactor, Value,
    Visit, Visitor,
};
use datafusion::sql::sqlparser::parser::Parser;
use millrace_dataflow::error::{Error, Result};

use super::postgres::call;
use crate::parse::{Dialect, fold_name};

/// `FETCH` as `LIMIT`.
pub(super) fn fetched(query: &mut Query) {
    let Some(fetch) = query.fetch.take() else {
        return;
    };
    let one = || Expr::Value(Value::Number("1".to_string(), false).into());
    let wanted = fetch.quantity.unwrap_or_else(one);
    match &mut query.limit_clause {
        Some(LimitClause::LimitOffset { limit, .. }) => *limit = Some(wanted),
        clause => {
            *clause = Some(LimitClause::LimitOffset {
                limit: Some(wanted),
                offset: None,
                limit_by: Vec::new(),
            });
        }
    }
}

/// Functions that give relations as subqueries; `None` for other relations.
pub(super) fn function(factor: &TableFactor) -> Result<Option<TableFactor>> {
    let (exprs, alias, name) = match factor {
        TableFactor::UNNEST {
            alias, array_exprs, ..
        } if array_exprs.iter().any(names_columns) => (array_exprs.clone(), alias, "unnest"),
        TableFactor::Function {
            name, args, alias, ..
        } => match fold_name(name).unwrap_or_default().join(".").as_str() {
            "unnest" => (plain(args)?, alias, "unnest"),
            "generate_series" => (vec![call("generate_series", plain(args)?)], alias, SERIES),
            _ => return Ok(None),
        },
        TableFactor::Table {
            name,
            args: Some(args),
            alias,
            ..
        } if fold_name(name).unwrap_or_default().join(".") == SERIES => {
            let series = call(SERIES, plain(&args.args)?);
            (vec![series], alias, SERIES)
        }
        _ => return Ok(None),
    };
    // A single column without a name of its own is called as the relation.
    let own = match alias {
        Some(alias) if alias.columns.is_empty() && exprs.len() == 1 => alias.name.clone(),
        _ => Ident::new(name),
    };
    let mut query = parsed("SELECT 1")?;
    if let SetExpr::Select(select) = query.body.as_mut() {
        let items = exprs.into_iter().enumerate().map(|(at, expr)| {
            let alias = match at {
                0 => own.clone(),
                at => Ident::new(format!("{}{}", own.value, at + 1)),
            };
            let expr = call("unnest", vec![expr]);
            SelectItem::ExprWithAlias { expr, alias }
        });
        select.projection = items.collect();
    }
    let named = || TableAlias {
        explicit: true,
        name: Ident::new(name),
        columns: Vec::new(),
    };
    Ok(Some(TableFactor::Derived {
        lateral: true,
        subquery: Box::new(query),
        alias: Some(alias.clone().unwrap_or_else(named)),
        sample: None,
    }))
}

const SERIES: &str = "generate_series";

fn plain(args: &[FunctionArg]) -> Result<Vec<Expr>> {
    let exprs = args.iter().map(|arg| match arg {
        FunctionArg::Unnamed(FunctionArgExpr::Expr(expr)) => Ok(expr.clone()),
        _ => Err(Error::unsupported("a named argument here is not supported")),
    });
    exprs.collect()
}

/// Whether an expression names a column.
pub(super) fn names_columns(expr: &Expr) -> bool {
    struct Names;
    impl Visitor for Names {
        type Break = ();
        fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<()> {
            match expr {
                Expr::Identifier(_) | Expr::CompoundIdentifier(_) => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        }
    }
    expr.visit(&mut Names).is_break()
}

/// Several columns IN a subquery, as EXISTS; `None` for other expressions.
pub(super) fn rows_in(expr: &mut Expr) -> Result<Option<Expr>> {
    let Expr::InSubquery {
        expr: row,
        subquery,
        negated,
    } = expr
    else {
        return Ok(None);
    };
    let Expr::Tuple(values) = row.as_mut() else {
        return Ok(None);
    };
    let mut found = parsed("SELECT 1 FROM (SELECT 1) AS r WHERE true")?;
    let SetExpr::Select(select) = found.body.as_mut() else {
        return Err(Error::internal("a query without SELECT"));
    };
    let name = Ident::new("__in");
    let column = |at: usize| Ident::new(format!("__in{at}"));
    let pairs = values.drain(..).enumerate().map(|(at, value)| {
        let own = Expr::CompoundIdentifier(vec![name.clone(), column(at)]);
        binary(own, BinaryOperator::Eq, Expr::Nested(Box::new(value)))
    });
    let pairs: Vec<Expr> = pairs.collect();
    let count = pairs.len();
    let mut same = pairs
        .into_iter()
        .reduce(|a, b| binary(a, BinaryOperator::And, b));
    if *negated {
        // A row of which it is not known whether it is equal stands in the way, too.
        same = same.map(|same| Expr::IsNotFalse(Box::new(Expr::Nested(Box::new(same)))));
    }
    select.selection = same;
    if let Some(TableFactor::Derived {
        subquery: relation,
        alias,
        ..
    }) = select.from.first_mut().map(|from| &mut from.relation)
    {
        std::mem::swap(relation, subquery);
        let columns = (0..count).map(|at| TableAliasColumnDef::from_name(column(at).value));
        *alias = Some(TableAlias {
            explicit: true,
            name,
            columns: columns.collect(),
        });
    }
    Ok(Some(Expr::Exists {
        subquery: Box::new(found),
        negated: *negated,
    }))
}

fn binary(left: Expr, op: BinaryOperator, right: Expr) -> Expr {
    Expr::BinaryOp {
        left: Box::new(left),
        op,
        right: Box::new(right),
    }
}

/// Aggregates that are given their argument by WITHIN GROUP.
pub(crate) fn is_ordered_set(name: &str) -> bool {
    matches!(
        name,
        "percentile_cont" | "approx_percentile_cont" | "quantile_cont"
    )
}

/// The argument of WITHIN GROUP as the first one.
pub(super) fn within_group(function: &mut Function) -> Result<()> {
    let FunctionArguments::List(list) = &mut function.args else {
        return Ok(());
    };
    let [by] = &function.within_group[..] else {
        return match function.within_group.is_empty() {
            true => Ok(()),
            false => Err(Error::unsupported(
                "WITHIN GROUP with several columns is not supported",
            )),
        };
    };
    if by.options.asc == Some(false)
        && let Some(FunctionArg::Unnamed(FunctionArgExpr::Expr(share))) = list.args.first_mut()
    {
        let one = Expr::Value(Value::Number("1".to_string(), false).into());
        let whole = std::mem::replace(share, one.clone());
        let whole = Expr::Nested(Box::new(whole));
        *share = Expr::Nested(Box::new(binary(one, BinaryOperator::Minus, whole)));
    }
    let argument = FunctionArg::Unnamed(FunctionArgExpr::Expr(by.expr.clone()));
    list.args.insert(0, argument);
    function.within_group.clear();
    Ok(())
}

fn parsed(text: &str) -> Result<Query> {
    let query = Parser::new(&Dialect)
        .try_with_sql(text)
        .and_then(|mut parser| parser.parse_query());
    query
        .map(|query| *query)
        .map_err(|e| Error::internal(e.to_string()))
}
