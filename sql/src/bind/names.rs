//! Names of unnamed output columns, as PostgreSQL gives them.
//!
//! # Contract
//!
//! * A function call, an aggregate and what is written like one are called by their function, a
//!   column by its name, a cast by what it casts or else by its type, CASE by its ELSE or else
//!   `case`; everything else is `?column?`.
//! * The answer of a query may hold a name twice. Plans cannot, so the later one carries a mark
//!   there ([`shown`] takes it off). Marks never reach the columns of a view or of a subquery, whose
//!   names differ.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::Arc;

use arrow::datatypes::{Schema, SchemaRef};
use datafusion::sql::sqlparser::ast::{
    AccessExpr, DataType, Expr, Ident, OrderBy, OrderByKind, Query, Select, SelectItem, SetExpr,
    TrimWhereField, VisitMut, VisitorMut,
};

use crate::parse::{fold, fold_name};

/// Between a name and the number that makes it differ. No statement can hold it unquoted.
const MARK: char = '\u{1f}';

/// The name as the user reads it.
fn shown(name: &str) -> &str {
    name.split(MARK).next().unwrap_or(name)
}

/// The columns as the user reads them.
pub(crate) fn shown_schema(schema: &Schema) -> SchemaRef {
    let fields = schema
        .fields()
        .iter()
        .map(|f| match shown(f.name()) {
            name if name == f.name() => Arc::clone(f),
            name => Arc::new(f.as_ref().clone().with_name(name)),
        })
        .collect::<Vec<_>>();
    Arc::new(Schema::new_with_metadata(fields, schema.metadata().clone()))
}

/// Names all output columns of a query and of the queries in it. Only the answer itself may hold a
/// name twice, if `duplicates` allows it.
pub(crate) fn name_columns(query: &mut Query, duplicates: bool) {
    let _ = query.visit(&mut Namer {
        top: true,
        duplicates,
    });
}

struct Namer {
    /// The outermost query has not been seen yet.
    top: bool,
    duplicates: bool,
}

impl VisitorMut for Namer {
    type Break = ();

    fn pre_visit_query(&mut self, query: &mut Query) -> ControlFlow<()> {
        let may_repeat = self.duplicates && self.top;
        self.top = false;
        let hide_casts = may_repeat && orders_by_expression(query);
        selects(&mut query.body, may_repeat, hide_casts);
        ControlFlow::Continue(())
    }
}

/// The SELECTs whose rows the query gives. Nested queries are visited by themselves.
fn selects(body: &mut SetExpr, may_repeat: bool, hide_casts: bool) {
    match body {
        SetExpr::Select(select) => {
            for (at, item) in select.projection.iter_mut().enumerate() {
                name_item(item, hide_casts.then_some(at));
            }
            if may_repeat {
                tell_apart(select);
            }
        }
        SetExpr::SetOperation { left, right, .. } => {
            selects(left, may_repeat, hide_casts);
            // Whatever the right side calls its columns, they get the names of the left.
            selects(right, true, hide_casts);
        }
        // A query in parentheses is this query, unless it is visited first as another one.
        SetExpr::Query(query) => selects(&mut query.body, may_repeat, hide_casts),
        _ => {}
    }
}

/// Whether ORDER BY computes. Its expressions are over the input, whose column `id` a cast
/// `id::text` of that name must not hide.
fn orders_by_expression(query: &Query) -> bool {
    let Some(OrderBy {
        kind: OrderByKind::Expressions(exprs),
        ..
    }) = &query.order_by
    else {
        return false;
    };
    exprs
        .iter()
        .any(|e| !matches!(e.expr, Expr::Identifier(_) | Expr::Value(_)))
}

fn name_item(item: &mut SelectItem, hide_cast: Option<usize>) {
    if let SelectItem::UnnamedExpr(expr) = item
        && !is_column(expr)
    {
        let name = name(expr);
        let alias = match hide_cast {
            Some(at) if matches!(expr, Expr::Cast { .. } | Expr::Nested(_)) => marked(&name, at),
            _ => Ident::with_quote('"', name),
        };
        let expr = std::mem::replace(expr, Expr::Identifier(Ident::new("")));
        *item = SelectItem::ExprWithAlias { expr, alias };
    }
}

fn is_column(expr: &Expr) -> bool {
    matches!(expr, Expr::Identifier(_) | Expr::CompoundIdentifier(_))
}

/// Marks every column whose name stands in the list already; a bare column rather than an alias,
/// to which ORDER BY may refer.
fn tell_apart(select: &mut Select) {
    let wildcard = select.projection.iter().any(|i| {
        matches!(
            i,
            SelectItem::Wildcard(_) | SelectItem::QualifiedWildcard(..)
        )
    });
    let aliases: HashSet<String> = select
        .projection
        .iter()
        .filter_map(|i| match i {
            SelectItem::ExprWithAlias { alias, .. } => Some(fold(alias)),
            _ => None,
        })
        .collect();
    let mut named = HashSet::new();
    // Columns as written, of which two may have one name and different relations.
    let mut bare: Vec<Vec<String>> = Vec::new();
    for (at, item) in select.projection.iter_mut().enumerate() {
        match item {
            SelectItem::ExprWithAlias { alias, .. } => {
                let name = fold(alias);
                if !named.insert(name.clone()) {
                    *alias = marked(&name, at);
                }
            }
            SelectItem::UnnamedExpr(expr) => {
                let parts = match expr {
                    Expr::Identifier(ident) => vec![fold(ident)],
                    Expr::CompoundIdentifier(idents) => idents.iter().map(fold).collect(),
                    _ => continue,
                };
                let Some(name) = parts.last().cloned() else {
                    continue;
                };
                let same = |other: &Vec<String>| {
                    other.last() == Some(&name)
                        && (other.len() == 1 || parts.len() == 1 || *other == parts)
                };
                if wildcard || aliases.contains(&name) || bare.iter().any(same) {
                    let expr = std::mem::replace(expr, Expr::Identifier(Ident::new("")));
                    *item = SelectItem::ExprWithAlias {
                        expr,
                        alias: marked(&name, at),
                    };
                } else {
                    bare.push(parts);
                }
            }
            _ => {}
        }
    }
}

fn marked(name: &str, at: usize) -> Ident {
    Ident::with_quote('"', format!("{name}{MARK}{at}"))
}

fn name(expr: &Expr) -> String {
    match figure(expr) {
        Some(Name::Strong(name) | Name::Weak(name)) => name,
        None => "?column?".to_string(),
    }
}

enum Name {
    Strong(String),
    /// Taken only if nothing inside has a better one.
    Weak(String),
}

fn figure(expr: &Expr) -> Option<Name> {
    let strong = |name: &str| Some(Name::Strong(name.to_string()));
    match expr {
        Expr::Identifier(ident) => Some(Name::Strong(fold(ident))),
        Expr::CompoundIdentifier(idents) => idents.last().map(|i| Name::Strong(fold(i))),
        Expr::CompoundFieldAccess { root, access_chain } => access_chain
            .iter()
            .rev()
            .find_map(|access| match access {
                AccessExpr::Dot(field) => figure(field),
                AccessExpr::Subscript(_) => None,
            })
            .or_else(|| figure(root)),
        Expr::Nested(inner) | Expr::Collate { expr: inner, .. } => figure(inner),
        Expr::Function(function) => fold_name(&function.name)
            .and_then(|mut parts| parts.pop())
            .map(Name::Strong),
        Expr::Cast {
            expr, data_type, ..
        } => match figure(expr) {
            Some(Name::Strong(name)) => Some(Name::Strong(name)),
            _ => Some(Name::Weak(type_name(data_type))),
        },
        Expr::TypedString(typed) => Some(Name::Weak(type_name(&typed.data_type))),
        Expr::Interval(_) => Some(Name::Weak("interval".into())),
        Expr::Case { else_result, .. } => match else_result.as_deref().and_then(figure) {
            Some(Name::Strong(name)) => Some(Name::Strong(name)),
            _ => Some(Name::Weak("case".into())),
        },
        Expr::Extract { .. } => strong("extract"),
        Expr::Ceil { .. } => strong("ceil"),
        Expr::Floor { .. } => strong("floor"),
        Expr::Position { .. } => strong("position"),
        Expr::Substring { .. } => strong("substring"),
        Expr::Overlay { .. } => strong("overlay"),
        Expr::AtTimeZone { .. } => strong("timezone"),
        Expr::Exists { .. } => strong("exists"),
        Expr::Array(_) => strong("array"),
        Expr::Trim { trim_where, .. } => strong(match trim_where {
            Some(TrimWhereField::Leading) => "ltrim",
            Some(TrimWhereField::Trailing) => "rtrim",
            _ => "btrim",
        }),
        Expr::Subquery(query) => first_column(&query.body),
        _ => None,
    }
}

fn first_column(body: &SetExpr) -> Option<Name> {
    match body {
        SetExpr::Select(select) => match select.projection.first()? {
            SelectItem::ExprWithAlias { alias, .. } => Some(Name::Strong(fold(alias))),
            SelectItem::UnnamedExpr(expr) => figure(expr),
            _ => None,
        },
        SetExpr::Query(query) => first_column(&query.body),
        SetExpr::SetOperation { left, .. } => first_column(left),
        _ => None,
    }
}

/// PostgreSQL's own name of a type.
fn type_name(data_type: &DataType) -> String {
    match data_type {
        DataType::SmallInt(_) | DataType::Int2(_) => "int2",
        DataType::Int(_) | DataType::Integer(_) | DataType::Int4(_) => "int4",
        DataType::BigInt(_) | DataType::Int8(_) => "int8",
        DataType::Real | DataType::Float4 => "float4",
        DataType::Float(_) | DataType::Double(_) | DataType::DoublePrecision | DataType::Float8 => {
            "float8"
        }
        DataType::Numeric(_) | DataType::Decimal(_) | DataType::Dec(_) => "numeric",
        DataType::Boolean | DataType::Bool => "bool",
        DataType::Varchar(_) | DataType::CharacterVarying(_) | DataType::CharVarying(_) => {
            "varchar"
        }
        DataType::Timestamp(_, zone) => match zone.to_string().contains("WITH TIME") {
            true => "timestamptz",
            false if zone.to_string().contains("TZ") => "timestamptz",
            false => "timestamp",
        },
        other => {
            let text = other.to_string().to_lowercase();
            let end = text
                .find(|c: char| !c.is_alphanumeric())
                .unwrap_or(text.len());
            return text[..end].to_string();
        }
    }
    .to_string()
}
