//! USING in RIGHT and FULL joins: the merged column is the one of the kept side, or the first that is
//! not null. The planner takes the left one, which is right for inner and LEFT joins only; others are
//! written out with ON.
//!
//! ```text
//! SELECT * FROM a FULL JOIN b USING (k)
//! SELECT coalesce(a.k, b.k) AS k, a.* EXCEPT (k), b.* EXCEPT (k) FROM a FULL JOIN b ON a.k = b.k
//! ```

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use datafusion::sql::sqlparser::ast::{
    BinaryOperator, ExceptSelectItem, Expr, Ident, JoinConstraint, JoinOperator, ObjectName, Query,
    Select, SelectItem, SelectItemQualifiedWildcardKind, SetExpr, TableFactor, TableWithJoins,
    VisitMut, VisitorMut, WildcardAdditionalOptions,
};
use millrace_dataflow::error::{Error, Result};

use super::postgres::call;
use crate::parse::{fold, fold_name};

/// Rewrites a query and the queries in it.
pub(super) fn write_out(query: &mut Query) -> Result<()> {
    match query.visit(&mut Queries) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(error) => Err(error),
    }
}

struct Queries;

impl VisitorMut for Queries {
    type Break = Error;

    fn pre_visit_query(&mut self, query: &mut Query) -> ControlFlow<Error> {
        match body(&mut query.body) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => ControlFlow::Break(error),
        }
    }
}

/// The SELECTs of a query; queries in parentheses are visited by themselves.
fn body(set: &mut SetExpr) -> Result<()> {
    match set {
        SetExpr::Select(select) => write_out_select(select),
        SetExpr::SetOperation { left, right, .. } => {
            body(left)?;
            body(right)
        }
        _ => Ok(()),
    }
}

/// A merged column: its name and value.
type Merged = (String, Expr);

fn write_out_select(select: &mut Select) -> Result<()> {
    if !select.from.iter().any(needs_it) {
        return Ok(());
    }
    let mut merged: Vec<Merged> = Vec::new();
    let mut every: Vec<SelectItem> = Vec::new();
    for tables in &mut select.from {
        let (columns, hidden) = write_out_tables(tables)?;
        every.extend(columns.iter().map(item));
        for (name, hidden) in hidden {
            every.push(all_of(name, hidden));
        }
        merged.extend(columns);
    }
    let projection = std::mem::take(&mut select.projection);
    for part in projection {
        match part {
            SelectItem::Wildcard(_) => select.projection.extend(every.iter().cloned()),
            SelectItem::UnnamedExpr(Expr::Identifier(name)) => {
                let found = merged.iter().find(|(merged, _)| *merged == fold(&name));
                select.projection.push(match found {
                    Some(column) => item(column),
                    None => SelectItem::UnnamedExpr(Expr::Identifier(name)),
                });
            }
            other => select.projection.push(other),
        }
    }
    let mut replace = Replace {
        merged: &merged,
        depth: 0,
    };
    let _ = select.projection.visit(&mut replace);
    let _ = select.selection.visit(&mut replace);
    let _ = select.group_by.visit(&mut replace);
    let _ = select.having.visit(&mut replace);
    Ok(())
}

/// Some join keeps rows of its right side and merges columns.
fn needs_it(tables: &TableWithJoins) -> bool {
    tables.joins.iter().any(|join| {
        matches!(
            join.join_operator,
            JoinOperator::Right(JoinConstraint::Using(_))
                | JoinOperator::RightOuter(JoinConstraint::Using(_))
                | JoinOperator::FullOuter(JoinConstraint::Using(_))
        )
    })
}

type Hidden = Vec<(ObjectName, Vec<Ident>)>;

/// The merged columns in their order, and what they hide of each table.
fn write_out_tables(tables: &mut TableWithJoins) -> Result<(Vec<Merged>, Hidden)> {
    let mut merged: Vec<Merged> = Vec::new();
    let mut hidden: Hidden = vec![(name_of(&tables.relation)?, Vec::new())];
    // Tables that have a merged column under its own name.
    let mut owners: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for join in &mut tables.joins {
        let right = name_of(&join.relation)?;
        let (left_kept, right_kept, constraint) = match &mut join.join_operator {
            JoinOperator::Join(c) | JoinOperator::Inner(c) => (true, true, c),
            JoinOperator::Left(c) | JoinOperator::LeftOuter(c) => (true, false, c),
            JoinOperator::Right(c) | JoinOperator::RightOuter(c) => (false, true, c),
            JoinOperator::FullOuter(c) => (false, false, c),
            JoinOperator::CrossJoin(c) => (true, true, c),
            _ => return Err(unsupported()),
        };
        match constraint {
            JoinConstraint::Natural => return Err(unsupported()),
            JoinConstraint::None => {}
            JoinConstraint::On(on) => {
                let merged = &merged;
                let _ = on.visit(&mut Replace { merged, depth: 0 });
            }
            JoinConstraint::Using(names) => {
                let mut first = Vec::with_capacity(names.len());
                let mut all: Option<Expr> = None;
                for name in names.iter() {
                    let Some([column]) = fold_name(name)
                        .map(|parts| <[String; 1]>::try_from(parts).map_err(|_| unsupported()))
                        .transpose()?
                    else {
                        return Err(unsupported());
                    };
                    let place = merged.iter().position(|(merged, _)| *merged == column);
                    let left = match place {
                        Some(place) => merged.remove(place).1,
                        // Whose column it is cannot be seen here.
                        None if hidden.len() > 1 => return Err(unsupported()),
                        None => column_of(&hidden[0].0, &column),
                    };
                    let right = column_of(&right, &column);
                    let equal = Expr::BinaryOp {
                        left: Box::new(left.clone()),
                        op: BinaryOperator::Eq,
                        right: Box::new(right.clone()),
                    };
                    all = Some(match all {
                        None => equal,
                        Some(all) => Expr::BinaryOp {
                            left: Box::new(all),
                            op: BinaryOperator::And,
                            right: Box::new(equal),
                        },
                    });
                    let value = match (left_kept, right_kept) {
                        (true, _) => left,
                        (false, true) => right,
                        (false, false) => call("coalesce", vec![left, right]),
                    };
                    let owners = owners.entry(column.clone()).or_insert_with(|| vec![0]);
                    owners.push(hidden.len());
                    first.push((column, value));
                }
                first.append(&mut merged);
                merged = first;
                *constraint = JoinConstraint::On(all.ok_or_else(unsupported)?);
            }
        }
        hidden.push((right, Vec::new()));
    }
    for (column, owners) in owners {
        for owner in owners {
            hidden[owner].1.push(quoted(&column));
        }
    }
    Ok((merged, hidden))
}

fn unsupported() -> Error {
    Error::unsupported("USING and NATURAL are not supported in this RIGHT or FULL join")
        .hint("join ON a.id = b.id, and select coalesce(a.id, b.id) AS id")
}

/// The name by which columns of a table are qualified.
fn name_of(table: &TableFactor) -> Result<ObjectName> {
    let alias = match table {
        TableFactor::Table { alias, .. } | TableFactor::Derived { alias, .. } => alias,
        _ => return Err(unsupported()),
    };
    match (alias, table) {
        (Some(alias), _) => Ok(ObjectName::from(vec![alias.name.clone()])),
        (
            None,
            TableFactor::Table {
                name, args: None, ..
            },
        ) => Ok(name.clone()),
        _ => Err(unsupported()),
    }
}

fn quoted(name: &str) -> Ident {
    Ident::with_quote('"', name)
}

fn column_of(table: &ObjectName, column: &str) -> Expr {
    let parts = table.0.iter().filter_map(|part| part.as_ident().cloned());
    Expr::CompoundIdentifier(parts.chain([quoted(column)]).collect())
}

fn item((name, value): &Merged) -> SelectItem {
    SelectItem::ExprWithAlias {
        expr: value.clone(),
        alias: quoted(name),
    }
}

fn all_of(table: ObjectName, mut hidden: Vec<Ident>) -> SelectItem {
    let except = (!hidden.is_empty()).then(|| ExceptSelectItem {
        first_element: hidden.remove(0),
        additional_elements: hidden,
    });
    SelectItem::QualifiedWildcard(
        SelectItemQualifiedWildcardKind::ObjectName(table),
        WildcardAdditionalOptions {
            opt_except: except,
            ..WildcardAdditionalOptions::default()
        },
    )
}

/// Puts the values of merged columns in the place of their names, other than in subqueries.
struct Replace<'a> {
    merged: &'a [Merged],
    depth: usize,
}

impl VisitorMut for Replace<'_> {
    type Break = ();

    fn pre_visit_query(&mut self, _: &mut Query) -> ControlFlow<()> {
        self.depth += 1;
        ControlFlow::Continue(())
    }
    fn post_visit_query(&mut self, _: &mut Query) -> ControlFlow<()> {
        self.depth -= 1;
        ControlFlow::Continue(())
    }
    fn post_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<()> {
        if let Expr::Identifier(name) = expr
            && self.depth == 0
        {
            let name = fold(name);
            if let Some((_, value)) = self.merged.iter().find(|(merged, _)| *merged == name) {
                *expr = value.clone();
            }
        }
        ControlFlow::Continue(())
    }
}
