//! Moves predicates towards the rows they test, except those that can fail.
//!
//! DataFusion's own rule moves every predicate, and evaluates a later one before an earlier one
//! where it merges them: `10 / x > 1` above a join, or above a subquery that keeps `x <> 0`, would
//! then see rows it was never meant to see. Here a fallible predicate stays where it was written,
//! and merged predicates keep their order, inner ones first.

use std::sync::Arc;

use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::common::{DFSchema, JoinType, Result};
use datafusion::logical_expr::expr_rewriter::unnormalize_col;
use datafusion::logical_expr::utils::split_conjunction_owned;
use datafusion::logical_expr::{
    Distinct, Expr, Extension, Filter, Join, LogicalPlan, TableProviderFilterPushDown, TableScan,
    Union, and,
};
use datafusion::optimizer::{ApplyOrder, OptimizerConfig, OptimizerRule};

use crate::checked::fallible;
use crate::windows::WindowNode;

#[derive(Debug)]
pub(crate) struct PushFilters;

impl OptimizerRule for PushFilters {
    fn name(&self) -> &str {
        "push_filters"
    }
    fn apply_order(&self) -> Option<ApplyOrder> {
        Some(ApplyOrder::TopDown)
    }
    fn supports_rewrite(&self) -> bool {
        true
    }
    fn rewrite(
        &self,
        plan: LogicalPlan,
        _: &dyn OptimizerConfig,
    ) -> Result<Transformed<LogicalPlan>> {
        match plan {
            LogicalPlan::Filter(filter) => push(filter),
            LogicalPlan::Join(join) => push_condition(join),
            other => Ok(Transformed::no(other)),
        }
    }
}

/// A balanced conjunction: chains of thousands of terms must not become trees as deep.
fn conjunction(mut terms: Vec<Expr>) -> Option<Expr> {
    if terms.len() < 2 {
        return terms.pop();
    }
    let right = terms.split_off(terms.len() / 2);
    Some(and(conjunction(terms)?, conjunction(right)?))
}

fn filter(terms: Vec<Expr>, input: Arc<LogicalPlan>) -> Result<Arc<LogicalPlan>> {
    match conjunction(terms) {
        Some(predicate) => Ok(Arc::new(LogicalPlan::Filter(Filter::try_new(
            predicate, input,
        )?))),
        None => Ok(input),
    }
}

fn push(outer: Filter) -> Result<Transformed<LogicalPlan>> {
    let Filter {
        predicate, input, ..
    } = outer;
    let schema = Arc::clone(input.schema());
    let terms = split_conjunction_owned(predicate.clone());
    let (safe, kept): (Vec<Expr>, Vec<Expr>) = terms
        .into_iter()
        .partition(|t| !fallible(t, &schema) && !t.is_volatile() && !has_subquery(t));
    let unchanged = |input| {
        Filter::try_new(predicate.clone(), input).map(|f| Transformed::no(LogicalPlan::Filter(f)))
    };

    match input.as_ref() {
        LogicalPlan::Filter(inner) => {
            let mut all = split_conjunction_owned(inner.predicate.clone());
            for term in split_conjunction_owned(predicate) {
                if !all.contains(&term) {
                    all.push(term);
                }
            }
            let merged = filter(all, Arc::clone(&inner.input))?;
            Ok(Transformed::yes(Arc::unwrap_or_clone(merged)))
        }
        LogicalPlan::SubqueryAlias(alias) if !safe.is_empty() => {
            let below = rename(safe, &schema, alias.input.schema())?;
            let child = filter(below, Arc::clone(&alias.input))?;
            rebuild(&input, vec![child], kept)
        }
        LogicalPlan::Projection(projection) => {
            let (mut below, mut stay) = (Vec::new(), kept);
            for term in safe {
                match through(&term, &schema, &projection.expr, projection.input.schema())? {
                    Some(term) => below.push(term),
                    None => stay.push(term),
                }
            }
            if below.is_empty() {
                return unchanged(input);
            }
            let child = filter(below, Arc::clone(&projection.input))?;
            rebuild(&input, vec![child], stay)
        }
        LogicalPlan::Union(union) if !safe.is_empty() => {
            let mut inputs = Vec::with_capacity(union.inputs.len());
            for child in &union.inputs {
                let below = rename(safe.clone(), &schema, child.schema())?;
                inputs.push(filter(below, Arc::clone(child))?);
            }
            let union = LogicalPlan::Union(Union {
                inputs,
                schema: Arc::clone(&union.schema),
            });
            Ok(Transformed::yes(Arc::unwrap_or_clone(filter(
                kept,
                Arc::new(union),
            )?)))
        }
        LogicalPlan::Distinct(Distinct::All(child)) if !safe.is_empty() => {
            let child = filter(safe, Arc::clone(child))?;
            rebuild(&input, vec![child], kept)
        }
        LogicalPlan::Sort(sort) if sort.fetch.is_none() && !safe.is_empty() => {
            let child = filter(safe, Arc::clone(&sort.input))?;
            rebuild(&input, vec![child], kept)
        }
        LogicalPlan::Aggregate(aggregate) if !aggregate.group_expr.is_empty() => {
            let keys = &aggregate.group_expr;
            if keys.iter().any(|k| matches!(k, Expr::GroupingSet(_))) {
                return unchanged(input);
            }
            let (mut below, mut stay) = (Vec::new(), kept);
            for term in safe {
                let on_keys =
                    indices(&term, &schema).is_some_and(|at| at.iter().all(|i| *i < keys.len()));
                match on_keys {
                    true => match through(&term, &schema, keys, aggregate.input.schema())? {
                        Some(term) => below.push(term),
                        None => stay.push(term),
                    },
                    false => stay.push(term),
                }
            }
            if below.is_empty() {
                return unchanged(input);
            }
            let child = filter(below, Arc::clone(&aggregate.input))?;
            rebuild(&input, vec![child], stay)
        }
        LogicalPlan::Extension(Extension { node }) => {
            let Some(window) = node.as_any().downcast_ref::<WindowNode>() else {
                return unchanged(input);
            };
            let width = window.input.schema().fields().len();
            let (below, bounds): (Vec<Expr>, Vec<Expr>) = safe
                .into_iter()
                .partition(|t| indices(t, &schema).is_some_and(|at| at.iter().all(|i| *i < width)));
            if below.is_empty() {
                return unchanged(input);
            }
            let child = filter(below, Arc::new(window.input.clone()))?;
            rebuild(
                &input,
                vec![child],
                kept.into_iter().chain(bounds).collect(),
            )
        }
        LogicalPlan::Join(join) => {
            let mut sides = Sides::of(join);
            let mut stay = Vec::new();
            // In the order of writing, so that what stays keeps it.
            for term in split_conjunction_owned(predicate.clone()) {
                let safe = !fallible(&term, &schema) && !term.is_volatile() && !has_subquery(&term);
                match (safe, side(&term, join), join.join_type) {
                    (
                        true,
                        Side::Left,
                        JoinType::Inner | JoinType::Left | JoinType::LeftSemi | JoinType::LeftAnti,
                    ) => {
                        sides.left.push(term);
                    }
                    (
                        true,
                        Side::Right,
                        JoinType::Inner
                        | JoinType::Right
                        | JoinType::RightSemi
                        | JoinType::RightAnti,
                    ) => {
                        sides.right.push(term);
                    }
                    (true, Side::Both, JoinType::Inner) => sides.condition.push(term),
                    // It sees the same pairs there, after the same terms.
                    (false, Side::Both, JoinType::Inner)
                        if stay.is_empty() && !term.is_volatile() && !has_subquery(&term) =>
                    {
                        sides.condition.push(term);
                    }
                    _ => stay.push(term),
                }
            }
            if !sides.changed(join) {
                return unchanged(input);
            }
            let join = sides.rebuild(join)?;
            Ok(Transformed::yes(Arc::unwrap_or_clone(filter(
                stay,
                Arc::new(join),
            )?)))
        }
        LogicalPlan::TableScan(scan) if scan.fetch.is_none() && !safe.is_empty() => {
            let refs: Vec<&Expr> = safe.iter().collect();
            let answers = scan.source.supports_filters_pushdown(&refs)?;
            let (mut pushed, mut stay) = (scan.filters.clone(), kept);
            for (term, answer) in safe.into_iter().zip(answers) {
                if answer != TableProviderFilterPushDown::Unsupported {
                    let bare = unnormalize_col(term.clone());
                    let known = pushed
                        .iter()
                        .any(|p| *p == term || unnormalize_col(p.clone()) == bare);
                    if !known {
                        pushed.push(term.clone());
                    }
                }
                if answer != TableProviderFilterPushDown::Exact {
                    stay.push(term);
                }
            }
            if pushed.len() == scan.filters.len() {
                return unchanged(input);
            }
            let scan = LogicalPlan::TableScan(TableScan {
                filters: pushed,
                ..scan.clone()
            });
            Ok(Transformed::yes(Arc::unwrap_or_clone(filter(
                stay,
                Arc::new(scan),
            )?)))
        }
        _ => unchanged(input),
    }
}

/// Parts of an inner join's own condition that test one side only.
fn push_condition(join: Join) -> Result<Transformed<LogicalPlan>> {
    let Some(condition) = join
        .filter
        .clone()
        .filter(|_| join.join_type == JoinType::Inner)
    else {
        return Ok(Transformed::no(LogicalPlan::Join(join)));
    };
    let mut schema = join.left.schema().as_ref().clone();
    schema.merge(join.right.schema());
    let mut sides = Sides::default();
    for term in split_conjunction_owned(condition) {
        let safe = !fallible(&term, &schema) && !term.is_volatile() && !has_subquery(&term);
        match side(&term, &join) {
            Side::Left if safe => sides.left.push(term),
            Side::Right if safe => sides.right.push(term),
            _ => sides.condition.push(term),
        }
    }
    if sides.left.is_empty() && sides.right.is_empty() {
        return Ok(Transformed::no(LogicalPlan::Join(join)));
    }
    sides.rebuild(&join).map(Transformed::yes)
}

fn rebuild(
    plan: &LogicalPlan,
    inputs: Vec<Arc<LogicalPlan>>,
    above: Vec<Expr>,
) -> Result<Transformed<LogicalPlan>> {
    let inputs = inputs.into_iter().map(Arc::unwrap_or_clone).collect();
    let plan = plan.with_new_exprs(plan.expressions(), inputs)?;
    Ok(Transformed::yes(Arc::unwrap_or_clone(filter(
        above,
        Arc::new(plan),
    )?)))
}

#[derive(Default)]
struct Sides {
    left: Vec<Expr>,
    right: Vec<Expr>,
    condition: Vec<Expr>,
}

impl Sides {
    fn of(join: &Join) -> Self {
        Self {
            condition: join
                .filter
                .clone()
                .map(split_conjunction_owned)
                .unwrap_or_default(),
            ..Self::default()
        }
    }
    fn changed(&self, join: &Join) -> bool {
        let before = join
            .filter
            .clone()
            .map_or(0, |f| split_conjunction_owned(f).len());
        !self.left.is_empty() || !self.right.is_empty() || self.condition.len() != before
    }
    fn rebuild(self, join: &Join) -> Result<LogicalPlan> {
        Ok(LogicalPlan::Join(Join {
            left: filter(self.left, Arc::clone(&join.left))?,
            right: filter(self.right, Arc::clone(&join.right))?,
            filter: conjunction(self.condition),
            ..join.clone()
        }))
    }
}

#[derive(PartialEq)]
enum Side {
    Left,
    Right,
    Both,
    Neither,
}

fn side(term: &Expr, join: &Join) -> Side {
    let columns = term.column_refs();
    let (mut left, mut right) = (false, false);
    for column in columns {
        if join.left.schema().maybe_index_of_column(column).is_some() {
            left = true;
        } else {
            right = true;
        }
    }
    match (left, right) {
        (true, true) => Side::Both,
        (true, false) => Side::Left,
        (false, true) => Side::Right,
        (false, false) => Side::Neither,
    }
}

fn has_subquery(term: &Expr) -> bool {
    term.exists(|e| {
        Ok(matches!(
            e,
            Expr::Exists(_)
                | Expr::InSubquery(_)
                | Expr::ScalarSubquery(_)
                | Expr::SetComparison(_)
        ))
    })
    .unwrap_or(true)
}

/// Columns of `schema` that the expression reads.
fn indices(term: &Expr, schema: &DFSchema) -> Option<Vec<usize>> {
    term.column_refs()
        .into_iter()
        .map(|c| schema.maybe_index_of_column(c))
        .collect()
}

/// The same columns under the names of another schema.
fn rename(terms: Vec<Expr>, from: &DFSchema, to: &DFSchema) -> Result<Vec<Expr>> {
    let columns: Vec<Expr> = to
        .iter()
        .map(|(q, f)| Expr::Column(datafusion::common::Column::new(q.cloned(), f.name())))
        .collect();
    terms.iter().map(|t| replace(t, from, &columns)).collect()
}

/// The term over the input of a projection, unless it would then evaluate something fallible.
fn through(
    term: &Expr,
    schema: &DFSchema,
    exprs: &[Expr],
    below: &DFSchema,
) -> Result<Option<Expr>> {
    let Some(at) = indices(term, schema) else {
        return Ok(None);
    };
    let plain = at.iter().all(|i| {
        exprs.get(*i).is_some_and(|e| {
            !fallible(e, below)
                && !e.is_volatile()
                && !has_subquery(e)
                && !matches!(e.clone().unalias(), Expr::Unnest(_))
        })
    });
    if !plain {
        return Ok(None);
    }
    let exprs: Vec<Expr> = exprs.iter().map(|e| e.clone().unalias()).collect();
    replace(term, schema, &exprs).map(Some)
}

fn replace(term: &Expr, schema: &DFSchema, by: &[Expr]) -> Result<Expr> {
    let replaced = term.clone().transform_up(|e| {
        Ok(match &e {
            Expr::Column(c) => match schema.maybe_index_of_column(c).and_then(|i| by.get(i)) {
                Some(expr) => Transformed::yes(expr.clone()),
                None => Transformed::no(e),
            },
            _ => Transformed::no(e),
        })
    })?;
    Ok(replaced.data)
}
