//! Subqueries that refer to the outer row in a way that DataFusion's rules cannot compute, or compute
//! wrongly: by the domain of what they refer to.
//!
//! DataFusion pulls comparisons with the outer row up through projections, filters, groups and inner
//! joins. Through windows, limits, DISTINCT, unions, outer joins and `unnest` they must not go.
//!
//! ```text
//! … (SELECT value … c …) …     LEFT JOIN value of all c ON c IS NOT DISTINCT FROM …
//! [NOT] EXISTS (… c …)         semi- or anti-join with it
//! x [NOT] IN (… c …)           the same, and x = its column
//! LATERAL (… c …)              a join with it
//! ```

use std::sync::Arc;

use datafusion::common::alias::AliasGenerator;
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion::common::{Column, JoinType, Result};
use datafusion::logical_expr::expr::{Exists, InSubquery};
use datafusion::logical_expr::expr_rewriter::NamePreserver;
use datafusion::logical_expr::utils::{conjunction, split_conjunction_owned};
use datafusion::logical_expr::{
    Aggregate, Expr, Filter, Join, LogicalPlan, LogicalPlanBuilder, Projection, Subquery,
};
use datafusion::optimizer::{ApplyOrder, OptimizerConfig, OptimizerRule};

use super::dependent::Domain;

#[derive(Debug)]
pub(super) struct CorrelatedSubqueries {
    /// Those that DataFusion's rules left, too; they have been asked then.
    pub(super) left: bool,
}

impl OptimizerRule for CorrelatedSubqueries {
    fn name(&self) -> &str {
        "correlated_subqueries"
    }
    fn apply_order(&self) -> Option<ApplyOrder> {
        Some(ApplyOrder::BottomUp)
    }
    fn supports_rewrite(&self) -> bool {
        true
    }
    fn rewrite(
        &self,
        plan: LogicalPlan,
        config: &dyn OptimizerConfig,
    ) -> Result<Transformed<LogicalPlan>> {
        let names = config.alias_generator();
        let is_ours = |subquery: &Subquery| self.left || !is_pulled_up(subquery);
        let ours = |expr: &Expr| correlated(expr, &is_ours);
        match plan {
            LogicalPlan::Filter(filter) if ours(&filter.predicate) => {
                filtered(filter, &is_ours, names)
            }
            LogicalPlan::Projection(projection) if projection.expr.iter().any(ours) => {
                projected(projection, &is_ours, names)
            }
            LogicalPlan::Aggregate(aggregate)
                if aggregate.group_expr.iter().any(ours)
                    || aggregate.aggr_expr.iter().any(ours) =>
            {
                aggregated(aggregate, &is_ours, names)
            }
            LogicalPlan::Join(join) => match lateral(&join, names)? {
                Some(plan) => Ok(Transformed::yes(plan)),
                None => Ok(Transformed::no(LogicalPlan::Join(join))),
            },
            other => Ok(Transformed::no(other)),
        }
    }
}

/// Whether DataFusion's rules pull up what the subquery compares with the outer row, and may.
pub(super) fn is_pulled_up(subquery: &Subquery) -> bool {
    fn passes(plan: &LogicalPlan, grouped: bool) -> bool {
        if plan.all_out_ref_exprs().is_empty() {
            return true;
        }
        let groups = matches!(plan, LogicalPlan::Aggregate(_));
        let passed = match plan {
            // HAVING takes away the row that an aggregate of nothing is.
            LogicalPlan::Filter(filter) => !is_of_groups(&filter.input),
            LogicalPlan::Projection(_)
            | LogicalPlan::SubqueryAlias(_)
            | LogicalPlan::Aggregate(_)
            | LogicalPlan::EmptyRelation(_)
            | LogicalPlan::Sort(_) => true,
            LogicalPlan::Join(join) => join.join_type == JoinType::Inner,
            _ => false,
        };
        // What one aggregate groups by, another one above it would have to group by, too.
        let mut below = plan.inputs().into_iter();
        passed && !(grouped && groups) && below.all(|input| passes(input, grouped || groups))
    }
    passes(&subquery.subquery, false)
}

fn is_of_groups(plan: &LogicalPlan) -> bool {
    match plan {
        LogicalPlan::Aggregate(_) => true,
        LogicalPlan::Projection(projection) => is_of_groups(&projection.input),
        LogicalPlan::SubqueryAlias(alias) => is_of_groups(&alias.input),
        _ => false,
    }
}

/// Whether a subquery in the expression refers to the row and is among those wanted.
fn correlated(expr: &Expr, wanted: &dyn Fn(&Subquery) -> bool) -> bool {
    let of = |subquery: &Subquery| !subquery.outer_ref_columns.is_empty() && wanted(subquery);
    let is = |e: &Expr| match e {
        Expr::ScalarSubquery(subquery) => of(subquery),
        Expr::Exists(Exists { subquery, .. }) | Expr::InSubquery(InSubquery { subquery, .. }) => {
            of(subquery) || clashes(e)
        }
        _ => false,
    };
    expr.exists(|e| Ok(is(e))).unwrap_or(false)
}

/// Whether a table of a predicate's subquery has columns that are called as those of the outer row
/// which it refers to: when they are pulled up, nothing tells them apart.
fn clashes(predicate: &Expr) -> bool {
    let (Expr::Exists(Exists { subquery, .. }) | Expr::InSubquery(InSubquery { subquery, .. })) =
        predicate
    else {
        return false;
    };
    let outer: Vec<&Column> = subquery
        .outer_ref_columns
        .iter()
        .filter_map(|expr| match expr {
            Expr::OuterReferenceColumn(_, column) => Some(column),
            _ => None,
        })
        .collect();
    let named = |node: &LogicalPlan| {
        let schema = node.schema();
        Ok(outer.iter().any(|column| schema.has_column(column)))
    };
    !outer.is_empty() && subquery.subquery.exists(named).unwrap_or(true)
}

type Wanted<'a> = &'a dyn Fn(&Subquery) -> bool;

fn filtered(
    filter: Filter,
    wanted: Wanted<'_>,
    names: &Arc<AliasGenerator>,
) -> Result<Transformed<LogicalPlan>> {
    let columns = own_columns(&filter.input);
    let terms = split_conjunction_owned(filter.predicate.clone());
    let (with, plain): (Vec<Expr>, Vec<Expr>) =
        terms.into_iter().partition(|term| correlated(term, wanted));
    let mut input = filter.input.as_ref().clone();
    let (plain, mut left): (Vec<Expr>, Vec<Expr>) =
        plain.into_iter().partition(|term| !has_subquery(term));
    if let Some(plain) = conjunction(plain) {
        input = LogicalPlanBuilder::from(input).filter(plain)?.build()?;
    }
    let mut changed = false;
    for term in with {
        let (test, negated, column) = match &term {
            Expr::Exists(Exists { subquery, negated }) => (subquery, *negated, None),
            Expr::InSubquery(InSubquery {
                expr,
                subquery,
                negated,
            }) => (subquery, *negated, Some(expr)),
            other => {
                let (plan, value, done) = valued(input, other.clone(), wanted, names)?;
                input = plan;
                changed |= done;
                left.push(value);
                continue;
            }
        };
        let Some((domain, of_all)) = for_all(test, &input, names)? else {
            left.push(term);
            continue;
        };
        let mut on = domain.same(&of_all);
        if let Some(x) = column {
            let first = Column::from(of_all.schema().qualified_field(0));
            on.push(x.as_ref().clone().eq(Expr::Column(first)));
        }
        let kind = match negated {
            true => JoinType::LeftAnti,
            false => JoinType::LeftSemi,
        };
        input = LogicalPlanBuilder::from(input)
            .join_on(of_all, kind, on)?
            .build()?;
        changed = true;
    }
    if !changed {
        return Ok(Transformed::no(LogicalPlan::Filter(filter)));
    }
    let mut builder = LogicalPlanBuilder::from(input);
    if let Some(left) = conjunction(left) {
        builder = builder.filter(left)?;
    }
    builder.project(columns)?.build().map(Transformed::yes)
}

fn has_subquery(expr: &Expr) -> bool {
    let is = |e: &Expr| {
        matches!(
            e,
            Expr::ScalarSubquery(_) | Expr::Exists(_) | Expr::InSubquery(_)
        )
    };
    expr.exists(|e| Ok(is(e))).unwrap_or(true)
}

fn projected(
    projection: Projection,
    wanted: Wanted<'_>,
    names: &Arc<AliasGenerator>,
) -> Result<Transformed<LogicalPlan>> {
    let mut input = projection.input.as_ref().clone();
    let (mut exprs, mut changed) = (Vec::with_capacity(projection.expr.len()), false);
    let whole = LogicalPlan::Projection(projection.clone());
    let preserver = NamePreserver::new(&whole);
    for expr in &projection.expr {
        let name = preserver.save(expr);
        let (plan, value, done) = valued(input, expr.clone(), wanted, names)?;
        input = plan;
        changed |= done;
        exprs.push(if done { name.restore(value) } else { value });
    }
    if !changed {
        return Ok(Transformed::no(whole));
    }
    let builder = LogicalPlanBuilder::from(input).project(exprs)?;
    builder.build().map(Transformed::yes)
}

fn aggregated(
    aggregate: Aggregate,
    wanted: Wanted<'_>,
    names: &Arc<AliasGenerator>,
) -> Result<Transformed<LogicalPlan>> {
    let mut input = aggregate.input.as_ref().clone();
    let mut changed = false;
    let whole = LogicalPlan::Aggregate(aggregate.clone());
    let preserver = NamePreserver::new(&whole);
    let mut all = Vec::new();
    for expr in aggregate.group_expr.iter().chain(&aggregate.aggr_expr) {
        let name = preserver.save(expr);
        let (plan, value, done) = valued(input, expr.clone(), wanted, names)?;
        input = plan;
        changed |= done;
        all.push(if done { name.restore(value) } else { value });
    }
    if !changed {
        return Ok(Transformed::no(whole));
    }
    let calls = all.split_off(aggregate.group_expr.len());
    let aggregate = Aggregate::try_new(Arc::new(input), all, calls)?;
    Ok(Transformed::yes(LogicalPlan::Aggregate(aggregate)))
}

/// An expression over rows, with what its subqueries say joined to them.
fn valued(
    mut input: LogicalPlan,
    expr: Expr,
    wanted: Wanted<'_>,
    names: &Arc<AliasGenerator>,
) -> Result<(LogicalPlan, Expr, bool)> {
    if !correlated(&expr, wanted) {
        return Ok((input, expr, false));
    }
    let mut changed = false;
    let expr = expr
        .transform_up(|expr| {
            let (subquery, exists) = match &expr {
                Expr::ScalarSubquery(subquery) => (subquery, None),
                Expr::Exists(Exists { subquery, negated }) => (subquery, Some(*negated)),
                _ => return Ok(Transformed::no(expr)),
            };
            if !wanted(subquery) {
                return Ok(Transformed::no(expr));
            }
            let Some((domain, of_all)) = for_all(subquery, &input, names)? else {
                return Ok(Transformed::no(expr));
            };
            if let Some(negated) = exists {
                let found = names.next("__found");
                let of_all = domain.found(of_all, &found)?;
                let on = domain.same(&of_all);
                let joined = LogicalPlanBuilder::from(input.clone());
                input = joined.join_on(of_all, JoinType::Left, on)?.build()?;
                changed = true;
                let found = Expr::Column(Column::new_unqualified(found));
                return Ok(Transformed::yes(match negated {
                    true => found.is_null(),
                    false => found.is_not_null(),
                }));
            }
            let value = names.next("__value");
            let fields = of_all.schema().fields().len();
            let column =
                |at: usize| Expr::Column(Column::from(of_all.schema().qualified_field(at)));
            let mut exprs = vec![column(0).alias(&value)];
            exprs.extend((1..fields).map(column));
            let of_all = LogicalPlanBuilder::from(of_all.clone())
                .project(exprs)?
                .build()?;
            let on = domain.same(&of_all);
            let joined = LogicalPlanBuilder::from(input.clone());
            input = joined.join_on(of_all, JoinType::Left, on)?.build()?;
            changed = true;
            Ok(Transformed::yes(Expr::Column(Column::new_unqualified(
                value,
            ))))
        })
        .data()?;
    Ok((input, expr, changed))
}

/// A subquery for all rows of `outer`.
fn for_all<'a>(
    subquery: &Subquery,
    outer: &LogicalPlan,
    names: &'a Arc<AliasGenerator>,
) -> Result<Option<(Domain<'a>, LogicalPlan)>> {
    let plan = subquery.subquery.as_ref();
    let Some(domain) = Domain::new(plan, outer, names)? else {
        return Ok(None);
    };
    let Some(of_all) = domain.of_all(plan)? else {
        return Ok(None);
    };
    // Its columns may be called as those of the outer rows.
    let own = plan.schema().fields().len();
    let exprs = (0..of_all.schema().fields().len()).map(|at| {
        let column = Expr::Column(Column::from(of_all.schema().qualified_field(at)));
        match at < own {
            true => column.alias(names.next("__column")),
            false => column,
        }
    });
    let of_all = LogicalPlanBuilder::from(of_all.clone())
        .project(exprs.collect::<Vec<_>>())?
        .build()?;
    Ok(Some((domain, of_all)))
}

/// A join with a derived table that refers to its left side.
pub(super) fn lateral(join: &Join, names: &Arc<AliasGenerator>) -> Result<Option<LogicalPlan>> {
    let (subquery, alias) = match join.right.as_ref() {
        LogicalPlan::Subquery(subquery) => (subquery, None),
        LogicalPlan::SubqueryAlias(alias) => match alias.input.as_ref() {
            LogicalPlan::Subquery(subquery) => (subquery, Some(alias.alias.clone())),
            _ => return Ok(None),
        },
        _ => return Ok(None),
    };
    if !matches!(join.join_type, JoinType::Inner | JoinType::Left) {
        return Ok(None);
    }
    let plan = subquery.subquery.as_ref();
    let Some(domain) = Domain::new(plan, &join.left, names)? else {
        return Ok(None);
    };
    let Some(of_all) = domain.of_all(plan)? else {
        return Ok(None);
    };
    let of_all = match alias {
        Some(alias) => LogicalPlanBuilder::from(of_all).alias(alias)?.build()?,
        None => of_all,
    };
    let mut on = domain.same(&of_all);
    on.extend(join.on.iter().map(|(a, b)| a.clone().eq(b.clone())));
    on.extend(join.filter.clone());
    let columns = join.schema.columns().into_iter().map(Expr::Column);
    LogicalPlanBuilder::from(Arc::clone(&join.left))
        .join_on(of_all, join.join_type, on)?
        .project(columns)?
        .build()
        .map(Some)
}

fn own_columns(plan: &LogicalPlan) -> Vec<Expr> {
    let columns = plan.schema().columns().into_iter();
    columns.map(Expr::Column).collect()
}
