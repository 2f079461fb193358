//! Refuses what sqlparser reads and nothing behind it would use.
//!
//! The patterns name every field on purpose: a new one in sqlparser is a compile error here, not a
//! clause that is silently ignored.

use std::ops::ControlFlow;

use datafusion::sql::sqlparser::ast::{
    Cte, Expr, Function, FunctionArg, FunctionArgumentClause, FunctionArguments, GroupByExpr, Join,
    JoinConstraint, JoinOperator, LimitClause, OrderBy, OrderByKind, Query, Select, SelectFlavor,
    SetExpr, SetOperator, Spanned, TableFactor, TableWithJoins, Visit, Visitor,
};
use millrace_dataflow::error::{Error, Result};

use super::cursor::{Lines, fold_name};
use crate::bind::is_ordered_set;

pub(crate) fn check<T: Visit>(tree: &T, lines: &Lines) -> Result<()> {
    let mut strict = Strict { lines };
    match tree.visit(&mut strict) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(error) => Err(error),
    }
}

fn has_limit(clause: Option<&LimitClause>) -> bool {
    matches!(
        clause,
        Some(LimitClause::LimitOffset { limit: Some(_), .. })
    )
}

struct Strict<'a> {
    lines: &'a Lines,
}

impl Strict<'_> {
    fn refuse(&self, what: &str, at: &impl Spanned) -> ControlFlow<Error> {
        let error = Error::unsupported(format!("{what} is not supported"));
        let start = at.span().start;
        ControlFlow::Break(if start.line == 0 {
            error
        } else {
            error.position(self.lines.offset((start.line, start.column)) + 1)
        })
    }

    fn select(&self, select: &Select) -> ControlFlow<Error> {
        let Select {
            select_token: _,
            optimizer_hint,
            distinct: _,
            select_modifiers,
            top,
            top_before_distinct: _,
            projection,
            exclude,
            into,
            from,
            lateral_views,
            prewhere,
            selection: _,
            connect_by,
            group_by,
            cluster_by,
            distribute_by,
            sort_by,
            having: _,
            named_window: _,
            qualify: _,
            window_before_qualify: _,
            value_table_mode,
            flavor,
        } = select;
        let group_modifiers = match group_by {
            GroupByExpr::All(m) | GroupByExpr::Expressions(_, m) => !m.is_empty(),
        };
        for (given, what) in [
            (optimizer_hint.is_some(), "an optimizer hint"),
            (select_modifiers.is_some(), "a SELECT modifier"),
            (top.is_some(), "TOP"),
            (exclude.is_some(), "EXCLUDE"),
            (into.is_some(), "SELECT INTO"),
            (!lateral_views.is_empty(), "LATERAL VIEW"),
            (prewhere.is_some(), "PREWHERE"),
            (!connect_by.is_empty(), "CONNECT BY"),
            (group_modifiers, "a modifier of GROUP BY"),
            (!cluster_by.is_empty(), "CLUSTER BY"),
            (!distribute_by.is_empty(), "DISTRIBUTE BY"),
            (!sort_by.is_empty(), "SORT BY"),
            (value_table_mode.is_some(), "SELECT AS VALUE"),
            (
                !matches!(flavor, SelectFlavor::Standard),
                "a query that begins with FROM",
            ),
            (projection.is_empty(), "an empty SELECT list"),
        ] {
            if given {
                return self.refuse(what, select);
            }
        }
        for item in from {
            self.tables(item)?;
        }
        ControlFlow::Continue(())
    }

    fn tables(&self, tables: &TableWithJoins) -> ControlFlow<Error> {
        for join in &tables.joins {
            let Join {
                relation,
                global,
                join_operator,
            } = join;
            if *global {
                return self.refuse("GLOBAL JOIN", relation);
            }
            let what = match join_operator {
                JoinOperator::AsOf { .. } => "ASOF JOIN",
                JoinOperator::CrossApply | JoinOperator::OuterApply => "APPLY",
                JoinOperator::StraightJoin(_) => "STRAIGHT_JOIN",
                // The planner takes the left column, which can be null.
                JoinOperator::Right(JoinConstraint::Natural)
                | JoinOperator::RightOuter(JoinConstraint::Natural)
                | JoinOperator::FullOuter(JoinConstraint::Natural) => {
                    return ControlFlow::Break(
                        Error::unsupported("NATURAL RIGHT and FULL joins are not supported")
                            .hint("name the columns: JOIN b USING (id)"),
                    );
                }
                _ => continue,
            };
            return self.refuse(what, relation);
        }
        ControlFlow::Continue(())
    }

    fn body(&self, body: &SetExpr) -> ControlFlow<Error> {
        let mut body = body;
        loop {
            match body {
                SetExpr::Select(select) => return self.select(select),
                SetExpr::SetOperation {
                    op,
                    set_quantifier,
                    left,
                    right,
                } => {
                    if matches!(op, SetOperator::Minus) {
                        return self.refuse(&format!("{op} {set_quantifier}"), body);
                    }
                    self.body(right)?;
                    body = left;
                }
                SetExpr::Query(_) | SetExpr::Values(_) => return ControlFlow::Continue(()),
                SetExpr::Table(_) => {
                    return ControlFlow::Break(
                        Error::unsupported("TABLE is not supported")
                            .hint("write SELECT * FROM the relation"),
                    );
                }
                SetExpr::Insert(_)
                | SetExpr::Update(_)
                | SetExpr::Delete(_)
                | SetExpr::Merge(_) => {
                    return ControlFlow::Break(Error::unsupported(
                        "a change of data inside a query is not supported",
                    ));
                }
            }
        }
    }

    fn function(&self, function: &Function) -> ControlFlow<Error> {
        let Function {
            name,
            uses_odbc_syntax,
            parameters,
            args,
            filter: _,
            null_treatment: _,
            over: _,
            within_group,
        } = function;
        if *uses_odbc_syntax {
            return self.refuse("ODBC syntax", name);
        }
        if !matches!(parameters, FunctionArguments::None) {
            return self.refuse("a parametric function", name);
        }
        let folded = fold_name(name).unwrap_or_default().join(".");
        if !within_group.is_empty() && !is_ordered_set(&folded) {
            return self.refuse("WITHIN GROUP", name);
        }
        if let FunctionArguments::List(list) = args {
            for clause in &list.clauses {
                let what = match clause {
                    FunctionArgumentClause::OrderBy(_)
                    | FunctionArgumentClause::IgnoreOrRespectNulls(_) => continue,
                    FunctionArgumentClause::Limit(_) => "LIMIT inside a function",
                    FunctionArgumentClause::Having(_) => "HAVING inside a function",
                    FunctionArgumentClause::OnOverflow(_)
                    | FunctionArgumentClause::Separator(_)
                    | FunctionArgumentClause::JsonNullClause(_)
                    | FunctionArgumentClause::JsonReturningClause(_) => {
                        "a clause inside these parentheses"
                    }
                };
                return self.refuse(what, name);
            }
        }
        ControlFlow::Continue(())
    }
}

impl Visitor for Strict<'_> {
    type Break = Error;

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<Error> {
        let Query {
            with,
            body,
            order_by,
            limit_clause,
            fetch,
            locks,
            for_clause,
            settings,
            format_clause,
            pipe_operators,
        } = query;
        for (given, what) in [
            (fetch.as_ref().is_some_and(|f| f.percent), "FETCH … PERCENT"),
            (
                fetch.as_ref().is_some_and(|f| f.with_ties),
                "FETCH … WITH TIES",
            ),
            (
                fetch.is_some() && has_limit(limit_clause.as_ref()),
                "LIMIT beside FETCH",
            ),
            (!locks.is_empty(), "FOR UPDATE"),
            (for_clause.is_some(), "FOR XML or FOR JSON"),
            (settings.is_some(), "SETTINGS"),
            (format_clause.is_some(), "FORMAT"),
            (!pipe_operators.is_empty(), "a pipe operator"),
        ] {
            if given {
                return self.refuse(what, query);
            }
        }
        if let Some(with) = with {
            for Cte {
                alias: _,
                query: _,
                from,
                materialized: _,
                closing_paren_token: _,
            } in &with.cte_tables
            {
                if from.is_some() {
                    return self.refuse("FROM after a common table expression", query);
                }
            }
        }
        if let Some(OrderBy { kind, interpolate }) = order_by {
            if interpolate.is_some() {
                return self.refuse("INTERPOLATE", query);
            }
            match kind {
                OrderByKind::All(_) => return self.refuse("ORDER BY ALL", query),
                OrderByKind::Expressions(exprs) => {
                    if let Some(filled) = exprs.iter().find(|e| e.with_fill.is_some()) {
                        return self.refuse("WITH FILL", &filled.expr);
                    }
                }
            }
        }
        match limit_clause {
            Some(LimitClause::LimitOffset { limit_by, .. }) if !limit_by.is_empty() => {
                return self.refuse("LIMIT BY", query);
            }
            Some(LimitClause::OffsetCommaLimit { .. }) => {
                return self.refuse("LIMIT with a comma", query);
            }
            _ => {}
        }
        self.body(body)
    }

    fn pre_visit_table_factor(&mut self, factor: &TableFactor) -> ControlFlow<Error> {
        match factor {
            TableFactor::Table {
                name,
                alias: _,
                args,
                with_hints,
                version,
                with_ordinality,
                partitions,
                json_path,
                sample,
                index_hints,
            } => {
                for (given, what) in [
                    (!with_hints.is_empty(), "a table hint"),
                    (version.is_some(), "a table version"),
                    (*with_ordinality, "WITH ORDINALITY"),
                    (!partitions.is_empty(), "PARTITION"),
                    (json_path.is_some(), "a path into a table"),
                    (sample.is_some(), "TABLESAMPLE"),
                    (!index_hints.is_empty(), "an index hint"),
                    (
                        args.as_ref().is_some_and(|a| a.settings.is_some()),
                        "SETTINGS",
                    ),
                ] {
                    if given {
                        return self.refuse(what, name);
                    }
                }
                if let Some(args) = args {
                    let plain = args
                        .args
                        .iter()
                        .all(|a| matches!(a, FunctionArg::Unnamed(_)));
                    let folded = fold_name(name).unwrap_or_default().join(".");
                    if !matches!(
                        folded.as_str(),
                        "tumble" | "hop" | "session" | "cumulate" | "generate_series"
                    ) {
                        return ControlFlow::Break(
                            Error::unsupported(format!(
                                "table function \"{folded}\" does not exist"
                            ))
                            .code(crate::error::UNDEFINED_FUNCTION)
                            .hint("functions that give relations are TUMBLE, HOP, SESSION, CUMULATE, unnest and generate_series"),
                        );
                    }
                    if !plain {
                        return self.refuse("a named argument here", name);
                    }
                }
                ControlFlow::Continue(())
            }
            TableFactor::Derived {
                lateral: _,
                subquery: _,
                alias: _,
                sample,
            } => {
                if sample.is_some() {
                    return self.refuse("TABLESAMPLE", factor);
                }
                ControlFlow::Continue(())
            }
            TableFactor::NestedJoin {
                table_with_joins, ..
            } => self.tables(table_with_joins),
            TableFactor::UNNEST {
                with_offset,
                with_ordinality,
                ..
            } => match (with_offset, with_ordinality) {
                (true, _) => self.refuse("WITH OFFSET", factor),
                (_, true) => self.refuse("WITH ORDINALITY", factor),
                _ => ControlFlow::Continue(()),
            },
            TableFactor::Function { name, .. } => {
                let folded = fold_name(name).unwrap_or_default().join(".");
                match folded.as_str() {
                    "unnest" | "generate_series" => ControlFlow::Continue(()),
                    _ => self.refuse(&format!("table function \"{folded}\" here"), factor),
                }
            }
            TableFactor::Pivot { .. } => self.refuse("PIVOT", factor),
            TableFactor::Unpivot { .. } => self.refuse("UNPIVOT", factor),
            TableFactor::MatchRecognize { .. } => self.refuse("MATCH_RECOGNIZE", factor),
            _ => self.refuse("this form of relation", factor),
        }
    }

    fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<Error> {
        match expr {
            Expr::Function(function) => self.function(function),
            Expr::Collate { .. } => self.refuse("COLLATE", expr),
            Expr::MatchAgainst { .. } => self.refuse("MATCH … AGAINST", expr),
            Expr::OuterJoin(_) => self.refuse("the (+) join operator", expr),
            Expr::Prior(_) => self.refuse("PRIOR", expr),
            Expr::Prefixed { .. } => self.refuse("a character set introducer", expr),
            _ => ControlFlow::Continue(()),
        }
    }
}
