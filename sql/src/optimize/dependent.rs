//! A plan that refers to an outer row, for all outer rows at once.
//!
//! ```text
//! domain = SELECT DISTINCT c, … FROM outer rows        c, …: the columns that the plan refers to
//! plan(c, …) for each outer row ──► one plan with the columns of the domain behind its own
//! ```
//!
//! The domain goes down the plan until nothing below refers to the outer row: there it is joined with
//! what it finds. On the way groups, partitions and joins get its columns; the first rows of an order
//! are those of each value of the domain; an aggregate without rows has one all the same.
//!
//! The method is that of T. Neumann and A. Kemper, "Unnesting Arbitrary Queries", BTW 2015.
//!
//! # Contract
//!
//! * The columns of the result are those of the plan, then those of the domain, each under a name that
//!   nothing else has.
//! * `None` for plans in which something is left that has no such form.

use std::sync::Arc;

use datafusion::common::alias::AliasGenerator;
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion::common::{Column, JoinType, NullEquality, Result, ScalarValue};
use datafusion::logical_expr::expr::{AggregateFunction, Sort as SortKey, WindowFunction};
use datafusion::logical_expr::{
    Aggregate, Distinct, Expr, ExprSchemable, FetchType, Join, Limit, LogicalPlan,
    LogicalPlanBuilder, Projection, SkipType, Window, WindowFunctionDefinition, lit, when,
};

use crate::functions::functions;

/// The outer rows' columns that a plan refers to.
pub(super) struct Domain<'a> {
    /// As the plan calls them.
    columns: Vec<Column>,
    /// Their distinct values.
    values: LogicalPlan,
    names: &'a Arc<AliasGenerator>,
}

impl<'a> Domain<'a> {
    /// Of `plan`, which stands beside the rows of `outer`; `None` when it refers to other rows.
    pub(super) fn new(
        plan: &LogicalPlan,
        outer: &LogicalPlan,
        names: &'a Arc<AliasGenerator>,
    ) -> Result<Option<Self>> {
        let mut columns: Vec<Column> = Vec::new();
        for expr in plan.all_out_ref_exprs() {
            let Expr::OuterReferenceColumn(_, column) = expr else {
                return Ok(None);
            };
            if !outer.schema().has_column(&column) {
                return Ok(None);
            }
            if !columns.contains(&column) {
                columns.push(column);
            }
        }
        if columns.is_empty() {
            return Ok(None);
        }
        let exprs: Vec<Expr> = columns.iter().cloned().map(Expr::Column).collect();
        let values = LogicalPlanBuilder::from(outer.clone())
            .project(exprs.clone())?
            .aggregate(exprs, Vec::<Expr>::new())?
            .build()?;
        Ok(Some(Self {
            columns,
            values,
            names,
        }))
    }

    /// That rows of `left` are the outer rows of `right`, which [`Self::of_all`] made.
    pub(super) fn same(&self, right: &LogicalPlan) -> Vec<Expr> {
        let outer = self.columns.iter().cloned().map(Expr::Column);
        equal(outer, self.within(right))
    }

    /// The outer rows for which there is a row, each once, behind a column that says so.
    pub(super) fn found(&self, plan: LogicalPlan, name: &str) -> Result<LogicalPlan> {
        let within = self.within(&plan);
        let mut exprs = vec![lit(true).alias(name)];
        exprs.extend(within.iter().cloned());
        LogicalPlanBuilder::from(plan)
            .aggregate(within, Vec::<Expr>::new())?
            .project(exprs)?
            .build()
    }

    /// The plan for all outer rows.
    pub(super) fn of_all(&self, plan: &LogicalPlan) -> Result<Option<LogicalPlan>> {
        if !refers(plan) {
            let beside = self.fresh()?;
            let single = matches!(plan, LogicalPlan::EmptyRelation(empty)
                if empty.produce_one_row && empty.schema.fields().is_empty());
            return match single {
                true => Ok(Some(beside)),
                false => LogicalPlanBuilder::from(plan.clone())
                    .cross_join(beside)?
                    .build()
                    .map(Some),
            };
        }
        match plan {
            LogicalPlan::Projection(projection) => self.projection(projection),
            LogicalPlan::Filter(filter) => self.below(&filter.input, |input| {
                let predicate = self.inner(&filter.predicate, &input)?;
                LogicalPlanBuilder::from(input).filter(predicate)?.build()
            }),
            LogicalPlan::SubqueryAlias(alias) => self.below(&alias.input, |input| {
                let builder = LogicalPlanBuilder::from(input);
                builder.alias(alias.alias.clone())?.build()
            }),
            LogicalPlan::Subquery(subquery) => self.of_all(&subquery.subquery),
            LogicalPlan::Sort(sort) if sort.fetch.is_none() => self.of_all(&sort.input),
            LogicalPlan::Sort(sort) => self.first(&sort.input, &sort.expr, 0, sort.fetch),
            LogicalPlan::Limit(limit) => self.limit(limit),
            LogicalPlan::Aggregate(aggregate) => self.aggregate(aggregate),
            LogicalPlan::Distinct(Distinct::All(input)) => self.below(input, |input| {
                LogicalPlanBuilder::from(input).distinct()?.build()
            }),
            LogicalPlan::Join(join) => self.join(join),
            LogicalPlan::Window(window) => self.window(window),
            LogicalPlan::Union(union) => {
                let mut whole: Option<LogicalPlan> = None;
                for input in &union.inputs {
                    let Some(input) = self.of_all(input)? else {
                        return Ok(None);
                    };
                    whole = Some(match whole {
                        None => input,
                        Some(whole) => LogicalPlanBuilder::from(whole).union(input)?.build()?,
                    });
                }
                Ok(whole)
            }
            LogicalPlan::Unnest(unnest) => self.below(&unnest.input, |input| {
                let (columns, options) = (unnest.exec_columns.clone(), unnest.options.clone());
                LogicalPlanBuilder::from(input)
                    .unnest_columns_with_options(columns, options)?
                    .build()
            }),
            _ => Ok(None),
        }
    }

    fn below(
        &self,
        input: &LogicalPlan,
        above: impl FnOnce(LogicalPlan) -> Result<LogicalPlan>,
    ) -> Result<Option<LogicalPlan>> {
        self.of_all(input)?.map(above).transpose()
    }

    /// The domain under new names.
    fn fresh(&self) -> Result<LogicalPlan> {
        let columns = self.columns.iter();
        let columns = columns.map(|c| Expr::Column(c.clone()).alias(self.names.next("__outer")));
        LogicalPlanBuilder::from(self.values.clone())
            .project(columns.collect::<Vec<_>>())?
            .build()
    }

    /// The columns of the domain: the last ones.
    fn within(&self, plan: &LogicalPlan) -> Vec<Expr> {
        let fields = plan.schema().fields().len();
        columns_of(plan, fields - self.columns.len()..fields)
    }

    /// An expression with the columns of the domain for those of the outer row.
    fn inner(&self, expr: &Expr, plan: &LogicalPlan) -> Result<Expr> {
        let within = self.within(plan);
        let replaced = expr.clone().transform_up(|expr| match &expr {
            Expr::OuterReferenceColumn(_, column) => {
                Ok(match self.columns.iter().position(|c| c == column) {
                    Some(at) => Transformed::yes(within[at].clone()),
                    None => Transformed::no(expr),
                })
            }
            _ => Ok(Transformed::no(expr)),
        });
        replaced.data()
    }

    /// The expressions, each called as the column that it was in `named`.
    fn renamed(
        &self,
        exprs: &[Expr],
        input: &LogicalPlan,
        named: &LogicalPlan,
        from: usize,
    ) -> Result<Vec<Expr>> {
        let exprs = exprs.iter().enumerate().map(|(at, expr)| {
            let inner = self.inner(expr, input)?;
            Ok(match (&inner, inner == *expr) {
                (Expr::Column(_) | Expr::Alias(_), true) => inner,
                _ => named_as(inner, named, from + at),
            })
        });
        exprs.collect()
    }

    fn projection(&self, projection: &Projection) -> Result<Option<LogicalPlan>> {
        let named = LogicalPlan::Projection(projection.clone());
        self.below(&projection.input, |input| {
            let mut exprs = self.renamed(&projection.expr, &input, &named, 0)?;
            exprs.extend(self.within(&input));
            LogicalPlanBuilder::from(input).project(exprs)?.build()
        })
    }

    fn aggregate(&self, aggregate: &Aggregate) -> Result<Option<LogicalPlan>> {
        let sets = |e: &Expr| matches!(e, Expr::GroupingSet(_));
        if aggregate.group_expr.iter().any(sets) {
            return Ok(None);
        }
        let Some(input) = self.of_all(&aggregate.input)? else {
            return Ok(None);
        };
        let named = LogicalPlan::Aggregate(aggregate.clone());
        let groups = aggregate.group_expr.len();
        let mut by = self.renamed(&aggregate.group_expr, &input, &named, 0)?;
        let calls = aggregate
            .aggr_expr
            .iter()
            .map(|call| self.inner(call, &input));
        let calls = calls.collect::<Result<Vec<_>>>()?;
        by.extend(self.within(&input));
        let whole = LogicalPlanBuilder::from(input)
            .aggregate(by, calls)?
            .build()?;
        let behind = groups + self.columns.len();
        let domain = columns_of(&whole, groups..behind);
        if groups > 0 {
            let mut exprs = columns_of(&whole, 0..groups);
            let calls = columns_of(&whole, behind..whole.schema().fields().len());
            let calls = calls.into_iter().enumerate();
            exprs.extend(calls.map(|(at, call)| named_as(call, &named, groups + at)));
            exprs.extend(domain);
            return LogicalPlanBuilder::from(whole)
                .project(exprs)?
                .build()
                .map(Some);
        }
        // Each outer row has a group, also one without rows.
        let all = self.fresh()?;
        let of_all = self.within(&all);
        let on = equal(of_all.iter().cloned(), domain);
        let calls = columns_of(&whole, behind..whole.schema().fields().len());
        let joined = LogicalPlanBuilder::from(all).join_on(whole, JoinType::Left, on)?;
        let joined = joined.build()?;
        let mut exprs = Vec::with_capacity(calls.len() + of_all.len());
        for (at, (call, expr)) in calls.into_iter().zip(&aggregate.aggr_expr).enumerate() {
            let value = match default_value(expr, &named, at)? {
                value if value.is_null() => call,
                value => when(call.clone().is_null(), lit(value)).otherwise(call)?,
            };
            exprs.push(named_as(value, &named, at));
        }
        exprs.extend(of_all);
        LogicalPlanBuilder::from(joined)
            .project(exprs)?
            .build()
            .map(Some)
    }

    fn join(&self, join: &Join) -> Result<Option<LogicalPlan>> {
        let (left_refers, right_refers) = (refers(&join.left), refers(&join.right));
        let both = match join.join_type {
            JoinType::Inner => left_refers && right_refers,
            JoinType::Left | JoinType::LeftSemi | JoinType::LeftAnti | JoinType::LeftMark => {
                right_refers
            }
            _ => return Ok(None),
        };
        if join.null_aware {
            return Ok(None);
        }
        let to_left = both || left_refers || !right_refers || join.join_type != JoinType::Inner;
        let side = |plan: &Arc<LogicalPlan>, with: bool| match with {
            true => self.of_all(plan),
            false => Ok(Some(plan.as_ref().clone())),
        };
        let (Some(left), Some(right)) = (
            side(&join.left, to_left)?,
            side(&join.right, both || !to_left)?,
        ) else {
            return Ok(None);
        };
        let domain = match to_left {
            true => self.within(&left),
            false => self.within(&right),
        };
        let holder = if to_left { &left } else { &right };
        let mut on = Vec::new();
        for (a, b) in &join.on {
            let (a, b) = (self.inner(a, holder)?, self.inner(b, holder)?);
            on.push(match join.null_equality {
                NullEquality::NullEqualsNothing => a.eq(b),
                NullEquality::NullEqualsNull => is_not_distinct(a, b),
            });
        }
        if let Some(filter) = &join.filter {
            on.push(self.inner(filter, holder)?);
        }
        if both {
            on.extend(equal(domain.clone().into_iter(), self.within(&right)));
        }
        let own = |plan: &LogicalPlan, with: bool| {
            let fields = plan.schema().fields().len();
            columns_of(plan, 0..fields - if with { self.columns.len() } else { 0 })
        };
        let mut exprs = own(&left, to_left);
        match join.join_type {
            JoinType::Inner | JoinType::Left => exprs.extend(own(&right, both || !to_left)),
            // Its column is the last one of the join.
            JoinType::LeftMark => exprs.extend(columns_of_join(join).last().cloned().into_iter()),
            _ => {}
        }
        exprs.extend(domain);
        if on.is_empty() {
            on.push(lit(true));
        }
        LogicalPlanBuilder::from(left)
            .join_on(right, join.join_type, on)?
            .project(exprs)?
            .build()
            .map(Some)
    }

    fn window(&self, window: &Window) -> Result<Option<LogicalPlan>> {
        let Some(input) = self.of_all(&window.input)? else {
            return Ok(None);
        };
        let named = LogicalPlan::Window(window.clone());
        let domain = self.within(&input);
        let mut calls = Vec::with_capacity(window.window_expr.len());
        for call in &window.window_expr {
            let call = self.inner(call, &input)?.transform_up(|expr| match expr {
                Expr::WindowFunction(mut function) => {
                    function.params.partition_by.extend(domain.iter().cloned());
                    Ok(Transformed::yes(Expr::WindowFunction(function)))
                }
                other => Ok(Transformed::no(other)),
            });
            calls.push(call.data()?);
        }
        let own = input.schema().fields().len() - self.columns.len();
        let whole = LogicalPlan::Window(Window::try_new(calls, Arc::new(input))?);
        let mut exprs = columns_of(&whole, 0..own);
        let behind = own + self.columns.len();
        let calls = columns_of(&whole, behind..whole.schema().fields().len());
        let calls = calls.into_iter().enumerate();
        exprs.extend(calls.map(|(at, call)| named_as(call, &named, own + at)));
        exprs.extend(domain);
        LogicalPlanBuilder::from(whole)
            .project(exprs)?
            .build()
            .map(Some)
    }

    fn limit(&self, limit: &Limit) -> Result<Option<LogicalPlan>> {
        let (FetchType::Literal(fetch), SkipType::Literal(skip)) =
            (limit.get_fetch_type()?, limit.get_skip_type()?)
        else {
            return Ok(None);
        };
        self.first_of(&limit.input, skip, fetch)
    }

    fn first_of(
        &self,
        plan: &LogicalPlan,
        skip: usize,
        fetch: Option<usize>,
    ) -> Result<Option<LogicalPlan>> {
        match plan {
            LogicalPlan::Sort(sort) => {
                let most = sort.fetch.map(|most| most.saturating_sub(skip));
                let fetch = fetch.into_iter().chain(most).min();
                self.first(&sort.input, &sort.expr, skip, fetch)
            }
            // The rows that are taken are the same before and after.
            LogicalPlan::Projection(projection) => {
                let named = LogicalPlan::Projection(projection.clone());
                let Some(input) = self.first_of(&projection.input, skip, fetch)? else {
                    return Ok(None);
                };
                let mut exprs = self.renamed(&projection.expr, &input, &named, 0)?;
                exprs.extend(self.within(&input));
                LogicalPlanBuilder::from(input)
                    .project(exprs)?
                    .build()
                    .map(Some)
            }
            other => self.first(other, &[], skip, fetch),
        }
    }

    /// Of each outer row, the first rows in an order.
    fn first(
        &self,
        plan: &LogicalPlan,
        order: &[SortKey],
        skip: usize,
        fetch: Option<usize>,
    ) -> Result<Option<LogicalPlan>> {
        let own = plan.schema().fields().len();
        self.below(plan, |input| {
            let order = order.iter().map(|key| {
                let expr = self.inner(&key.expr, &input)?;
                Ok(SortKey::new(expr, key.asc, key.nulls_first))
            });
            let number =
                WindowFunctionDefinition::WindowUDF(Arc::clone(&functions().window["row_number"]));
            let mut number = WindowFunction::new(number, Vec::new());
            number.params.partition_by = self.within(&input);
            number.params.order_by = order.collect::<Result<_>>()?;
            let bare = Expr::WindowFunction(Box::new(number));
            let numbered = LogicalPlanBuilder::from(input)
                .window(vec![bare])?
                .build()?;
            let fields = numbered.schema().fields().len();
            let number = columns_of(&numbered, fields - 1..fields).swap_remove(0);
            let mut wanted = number.clone().gt(lit(skip as u64));
            if let Some(fetch) = fetch {
                let last = skip.saturating_add(fetch);
                wanted = wanted.and(number.lt_eq(lit(last as u64)));
            }
            let kept = columns_of(&numbered, 0..own + self.columns.len());
            LogicalPlanBuilder::from(numbered)
                .filter(wanted)?
                .project(kept)?
                .build()
        })
    }
}

/// Whether the plan refers to an outer row.
fn refers(plan: &LogicalPlan) -> bool {
    !plan.all_out_ref_exprs().is_empty()
}

fn columns_of(plan: &LogicalPlan, range: std::ops::Range<usize>) -> Vec<Expr> {
    let schema = plan.schema();
    range
        .map(|at| Expr::Column(Column::from(schema.qualified_field(at))))
        .collect()
}

fn columns_of_join(join: &Join) -> Vec<Expr> {
    let schema = &join.schema;
    (0..schema.fields().len())
        .map(|at| Expr::Column(Column::from(schema.qualified_field(at))))
        .collect()
}

/// An expression under the name of a column of another plan.
fn named_as(expr: Expr, plan: &LogicalPlan, at: usize) -> Expr {
    let (qualifier, field) = plan.schema().qualified_field(at);
    match &expr {
        Expr::Column(column)
            if column.relation.as_ref() == qualifier && column.name == *field.name() =>
        {
            expr
        }
        _ => expr.alias_qualified(qualifier.cloned(), field.name()),
    }
}

fn is_not_distinct(a: Expr, b: Expr) -> Expr {
    datafusion::logical_expr::binary_expr(
        a,
        datafusion::logical_expr::Operator::IsNotDistinctFrom,
        b,
    )
}

fn equal(left: impl Iterator<Item = Expr>, right: Vec<Expr>) -> Vec<Expr> {
    left.zip(right)
        .map(|(a, b)| is_not_distinct(a, b))
        .collect()
}

/// What an aggregate says of no rows.
fn default_value(expr: &Expr, named: &LogicalPlan, at: usize) -> Result<ScalarValue> {
    let mut expr = expr;
    while let Expr::Alias(alias) = expr {
        expr = &alias.expr;
    }
    let data_type = named.schema().field(at).data_type();
    match expr {
        Expr::AggregateFunction(AggregateFunction { func, .. }) => func.default_value(data_type),
        other => ScalarValue::try_from(&other.get_type(named.schema())?),
    }
}
