//! Predicates over subqueries in a form that joins can compute, with SQL's three truth values.
//!
//! DataFusion turns `EXISTS` and `IN` of a filter into semi-joins, anti-joins and marks, which know two
//! values. Where a null can tell the difference, or where there is no filter, they are said otherwise
//! here first:
//!
//! ```text
//! x = ANY (S), x <> ALL (S)  x IN (S), x NOT IN (S)
//! x < ALL (S)                CASE WHEN EXISTS (x < y IS FALSE) THEN false
//!                            WHEN EXISTS (x < y IS NULL) THEN NULL ELSE true END
//! x NOT IN (S)               NOT EXISTS (y = x) AND NOT EXISTS (y IS NULL) AND NOT EXISTS (x IS NULL)
//! x IN (S) below OR or AND   EXISTS (y = x)
//! x IN (S) elsewhere         CASE WHEN EXISTS (y = x) THEN true
//!                            WHEN EXISTS (y IS NULL) OR x IS NULL AND EXISTS (S) THEN NULL ELSE false END
//! EXISTS (S) as a value      (SELECT count(*) FROM S) > 0
//! ```
//!
//! # Contract
//!
//! * What joins would compute wrongly is refused: an aggregate that is never empty becomes a group that
//!   may be missing, where it depends on the outer row.

use std::sync::Arc;

use datafusion::common::alias::AliasGenerator;
use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::common::{Column, DFSchema, ExprSchema, Result as DfResult, ScalarValue};
use datafusion::functions_aggregate::expr_fn::count;
use datafusion::logical_expr::expr::{Case, Exists, InSubquery, SetComparison, SetQuantifier};
use datafusion::logical_expr::utils::{conjunction, split_conjunction_owned};
use datafusion::logical_expr::{
    Aggregate, BinaryExpr, Expr, ExprSchemable, Filter, LogicalPlan, LogicalPlanBuilder, Operator,
    Subquery, lit, not,
};
use datafusion::optimizer::{OptimizerConfig, OptimizerRule};
use millrace_dataflow::error::{Error, Result};

use super::correlated::lateral;
use super::lateral::decorrelated;
use super::values::stacked;
use crate::error::{carry, planning};

#[derive(Debug)]
pub(super) struct SubqueryPredicates {
    /// One-shot queries have a join for NOT IN where nothing refers to the outer row.
    pub(super) join_not_in: bool,
}

impl OptimizerRule for SubqueryPredicates {
    fn name(&self) -> &str {
        "subquery_predicates"
    }
    fn supports_rewrite(&self) -> bool {
        true
    }
    fn rewrite(
        &self,
        plan: LogicalPlan,
        config: &dyn OptimizerConfig,
    ) -> DfResult<Transformed<LogicalPlan>> {
        let names = config.alias_generator();
        plan.transform_up_with_subqueries(|plan| {
            let plan = self.node(plan, names)?;
            plan.transform_data(|plan| stacked(plan, names))
        })
    }
}

impl SubqueryPredicates {
    fn node(
        &self,
        plan: LogicalPlan,
        names: &Arc<AliasGenerator>,
    ) -> DfResult<Transformed<LogicalPlan>> {
        let plan = hoisted(plan)?;
        let was_hoisted = plan.transformed;
        let plan = self.predicates(plan.data, names)?;
        Ok(Transformed::new_transformed(
            plan.data,
            was_hoisted || plan.transformed,
        ))
    }

    fn predicates(
        &self,
        plan: LogicalPlan,
        names: &Arc<AliasGenerator>,
    ) -> DfResult<Transformed<LogicalPlan>> {
        let mut schema = DFSchema::empty();
        for input in plan.inputs() {
            schema.merge(input.schema());
        }
        match plan {
            LogicalPlan::Filter(filter) if has_predicate(&filter.predicate) => {
                let at = Place {
                    schema: &schema,
                    names,
                };
                let mut terms = Vec::new();
                for term in split_conjunction_owned(filter.predicate.clone()) {
                    self.term(term, &at, &mut terms)?;
                }
                let predicate = conjunction(terms).unwrap_or_else(|| lit(true));
                let changed = predicate != filter.predicate;
                let filter = Filter::try_new(predicate, filter.input)?;
                Ok(match changed {
                    true => Transformed::yes(LogicalPlan::Filter(filter)),
                    false => Transformed::no(LogicalPlan::Filter(filter)),
                })
            }
            LogicalPlan::Projection(_) => {
                let at = Place {
                    schema: &schema,
                    names,
                };
                let names = datafusion::logical_expr::expr_rewriter::NamePreserver::new(&plan);
                plan.map_expressions(|expr| {
                    if !has_predicate(&expr) {
                        return Ok(Transformed::no(expr));
                    }
                    let name = names.save(&expr);
                    let value = embedded(expr, &at)?.transform_data(as_value)?;
                    Ok(value.update_data(|expr| name.restore(expr)))
                })
            }
            LogicalPlan::Join(join) => {
                let simple = decorrelated(&join);
                let plan = match simple {
                    Ok(Some(plan)) => Some(plan),
                    simple => match lateral(&join, names)? {
                        None => simple?,
                        plan => plan,
                    },
                };
                Ok(match plan {
                    Some(plan) => Transformed::yes(plan),
                    None => Transformed::no(LogicalPlan::Join(join)),
                })
            }
            other => Ok(Transformed::no(other)),
        }
    }

    /// A term of a filter: null is as good as false.
    fn term(&self, term: Expr, at: &Place<'_>, terms: &mut Vec<Expr>) -> DfResult<()> {
        let test = match denied(in_subquery(term)) {
            Expr::InSubquery(test) => test,
            other => {
                terms.push(accepted(other, at)?);
                return Ok(());
            }
        };
        match single_row(&test)? {
            Some(compared) => terms.push(compared),
            None if test.negated && !self.joins(&test, at.schema)? => {
                terms.extend(not_in(&test, at)?);
            }
            None => terms.push(Expr::InSubquery(test)),
        }
        Ok(())
    }

    /// Whether the query engine's join for NOT IN can compute it.
    fn joins(&self, test: &InSubquery, schema: &DFSchema) -> DfResult<bool> {
        let null =
            test.expr.nullable(schema)? || test.subquery.subquery.schema().field(0).is_nullable();
        let alone = test.subquery.outer_ref_columns.is_empty() && !test.expr.contains_outer();
        let keyed = self.join_not_in && !test.expr.column_refs().is_empty();
        // What is compared beside the key may be null too, which its joins do not tell apart.
        Ok(alone && (!null || keyed))
    }
}

/// What is computed from the aggregates of a subquery, `(SELECT 2 * avg(x) …)`, around it:
/// `2 * (SELECT avg(x) …)`. The subquery is then an aggregate that the rules for joins know.
fn hoisted(plan: LogicalPlan) -> DfResult<Transformed<LogicalPlan>> {
    let names = datafusion::logical_expr::expr_rewriter::NamePreserver::new(&plan);
    plan.map_expressions(|expr| {
        let name = names.save(&expr);
        let expr = expr.transform_up(|expr| {
            let hoisted = match &expr {
                Expr::ScalarSubquery(subquery) => around(subquery)?,
                _ => None,
            };
            Ok(match hoisted {
                Some(around) => Transformed::yes(around),
                None => Transformed::no(expr),
            })
        })?;
        Ok(match expr.transformed {
            true => expr.update_data(|expr| name.restore(expr)),
            false => expr,
        })
    })
}

fn around(subquery: &Subquery) -> DfResult<Option<Expr>> {
    let LogicalPlan::Projection(projection) = subquery.subquery.as_ref() else {
        return Ok(None);
    };
    let of_all = matches!(projection.input.as_ref(), LogicalPlan::Aggregate(aggregate)
        if aggregate.group_expr.is_empty());
    let [expr] = &projection.expr[..] else {
        return Ok(None);
    };
    let expr = expr.clone().unalias();
    let depends = !subquery.outer_ref_columns.is_empty();
    if !of_all || !depends || matches!(expr, Expr::Column(_)) || expr.contains_outer() {
        return Ok(None);
    }
    let expr = expr.transform_up(|expr| {
        let Expr::Column(column) = expr else {
            return Ok(Transformed::no(expr));
        };
        let plan = LogicalPlanBuilder::from(Arc::clone(&projection.input))
            .project(vec![Expr::Column(column)])?
            .build()?;
        Ok(Transformed::yes(Expr::ScalarSubquery(Subquery {
            outer_ref_columns: plan.all_out_ref_exprs(),
            subquery: Arc::new(plan),
            spans: subquery.spans.clone(),
        })))
    })?;
    Ok(Some(expr.data))
}

/// Predicates over subqueries, other than in subqueries.
fn has_predicate(expr: &Expr) -> bool {
    let is = |e: &Expr| {
        matches!(
            e,
            Expr::Exists(_) | Expr::InSubquery(_) | Expr::SetComparison(_)
        )
    };
    expr.exists(|e| Ok(is(e))).unwrap_or(true)
}

/// Where an expression stands: the columns of its row, and new names.
struct Place<'a> {
    schema: &'a DFSchema,
    names: &'a Arc<AliasGenerator>,
}

/// `= ANY` and `<> ALL` by their other names.
fn in_subquery(expr: Expr) -> Expr {
    match expr {
        Expr::SetComparison(SetComparison {
            expr,
            subquery,
            op: op @ (Operator::Eq | Operator::NotEq),
            quantifier,
        }) if (op == Operator::Eq) == (quantifier == SetQuantifier::Any) => {
            Expr::InSubquery(InSubquery::new(expr, subquery, op == Operator::NotEq))
        }
        other => other,
    }
}

/// `NOT x IN (S)` and `NOT EXISTS (S)` as one expression.
fn denied(expr: Expr) -> Expr {
    match expr {
        Expr::Not(inner) => match *inner {
            Expr::InSubquery(test) => Expr::InSubquery(InSubquery {
                negated: !test.negated,
                ..test
            }),
            Expr::Exists(test) => Expr::Exists(Exists {
                negated: !test.negated,
                ..test
            }),
            inner => Expr::Not(Box::new(inner)),
        },
        other => other,
    }
}

/// An expression of which only matters whether it is true.
fn accepted(expr: Expr, at: &Place<'_>) -> DfResult<Expr> {
    match denied(in_subquery(expr)) {
        Expr::BinaryExpr(both) if matches!(both.op, Operator::And | Operator::Or) => {
            Ok(Expr::BinaryExpr(BinaryExpr::new(
                Box::new(accepted(*both.left, at)?),
                both.op,
                Box::new(accepted(*both.right, at)?),
            )))
        }
        Expr::InSubquery(test) => match single_row(&test)? {
            Some(compared) => Ok(compared),
            None if test.negated => {
                Ok(conjunction(not_in(&test, at)?).unwrap_or_else(|| lit(true)))
            }
            None => {
                let x = outer(test.expr.as_ref().clone(), at.schema)?;
                exists(&test.subquery, at, |y| y.eq(x))
            }
        },
        other => Ok(embedded(other, at)?.data),
    }
}

/// Terms that are all true when NOT IN is.
fn not_in(test: &InSubquery, at: &Place<'_>) -> DfResult<Vec<Expr>> {
    let InSubquery { expr, subquery, .. } = test;
    let x = outer(expr.as_ref().clone(), at.schema)?;
    let mut terms = vec![not(exists(subquery, at, |y| y.eq(x.clone()))?)];
    if subquery.subquery.schema().field(0).is_nullable() {
        terms.push(not(exists(subquery, at, Expr::is_null)?));
    }
    if expr.nullable(at.schema)? {
        terms.push(not(exists(subquery, at, |_| x.is_null())?));
    }
    Ok(terms)
}

/// An expression in which a null is not the same as false.
fn embedded(expr: Expr, at: &Place<'_>) -> DfResult<Transformed<Expr>> {
    let null = || Box::new(Expr::Literal(ScalarValue::Boolean(None), None));
    let value = |value: bool| Box::new(lit(value));
    expr.transform_up(|expr| match in_subquery(expr) {
        Expr::InSubquery(test) => {
            if let Some(compared) = single_row(&test)? {
                return Ok(Transformed::yes(compared));
            }
            let InSubquery {
                expr,
                subquery,
                negated,
            } = test;
            let x = outer((*expr).clone(), at.schema)?;
            let found = exists(&subquery, at, |y| y.eq(x))?;
            let mut unknown = Vec::new();
            if subquery.subquery.schema().field(0).is_nullable() {
                unknown.push(exists(&subquery, at, Expr::is_null)?);
            }
            if expr.nullable(at.schema)? {
                unknown.push(expr.is_null().and(exists(&subquery, at, |_| lit(true))?));
            }
            let mut cases = vec![(Box::new(found), value(!negated))];
            if let Some(unknown) = unknown.into_iter().reduce(Expr::or) {
                cases.push((Box::new(unknown), null()));
            }
            let cases = Case::new(None, cases, Some(value(negated)));
            Ok(Transformed::yes(Expr::Case(cases)))
        }
        Expr::SetComparison(SetComparison {
            expr,
            subquery,
            op,
            quantifier,
        }) => {
            let x = outer(*expr, at.schema)?;
            let compare =
                |y: Expr| Expr::BinaryExpr(BinaryExpr::new(Box::new(x.clone()), op, Box::new(y)));
            let any = quantifier == SetQuantifier::Any;
            let decided = exists(&subquery, at, |y| match any {
                true => compare(y).is_true(),
                false => compare(y).is_false(),
            })?;
            let unknown = exists(&subquery, at, |y| compare(y).is_null())?;
            let cases = vec![(Box::new(decided), value(any)), (Box::new(unknown), null())];
            let cases = Case::new(None, cases, Some(value(!any)));
            Ok(Transformed::yes(Expr::Case(cases)))
        }
        Expr::Exists(test) if always(&test.subquery)? => Ok(Transformed::yes(lit(!test.negated))),
        other => Ok(Transformed::no(other)),
    })
}

/// Where there is no filter that a join could stand for.
fn as_value(expr: Expr) -> DfResult<Transformed<Expr>> {
    expr.transform_up(|expr| match expr {
        Expr::Exists(Exists { subquery, negated }) => {
            let counted = LogicalPlanBuilder::from(subquery.subquery.as_ref().clone())
                .aggregate(Vec::<Expr>::new(), vec![count(lit(1)).alias("count")])?
                .build()?;
            let rows = Expr::ScalarSubquery(Subquery {
                outer_ref_columns: counted.all_out_ref_exprs(),
                subquery: Arc::new(counted),
                spans: subquery.spans,
            });
            let none = lit(0i64);
            Ok(Transformed::yes(match negated {
                true => rows.eq(none),
                false => rows.gt(none),
            }))
        }
        other => Ok(Transformed::no(other)),
    })
}

/// Columns of this row, as a subquery refers to them.
fn outer(expr: Expr, schema: &DFSchema) -> DfResult<Expr> {
    let expr = expr.transform_up(|expr| match expr {
        Expr::Column(column) => {
            let field = Arc::clone(schema.field_from_column(&column)?);
            Ok(Transformed::yes(Expr::OuterReferenceColumn(field, column)))
        }
        other => Ok(Transformed::no(other)),
    })?;
    Ok(expr.data)
}

/// Whether the subquery has a row of which the condition is true. Its column gets a name of its own: the
/// outer row may be of a table of the same name.
fn exists(
    subquery: &Subquery,
    at: &Place<'_>,
    condition: impl FnOnce(Expr) -> Expr,
) -> DfResult<Expr> {
    let first = Column::from(subquery.subquery.schema().qualified_field(0));
    let name = at.names.next("__sq");
    let condition = condition(Expr::Column(Column::new_unqualified(&name)));
    let plan = LogicalPlanBuilder::from(subquery.subquery.as_ref().clone())
        .project(vec![Expr::Column(first).alias(name)])?
        .filter(condition)?
        .build()?;
    Ok(Expr::Exists(Exists {
        subquery: Subquery {
            outer_ref_columns: plan.all_out_ref_exprs(),
            subquery: Arc::new(plan),
            spans: subquery.spans.clone(),
        },
        negated: false,
    }))
}

/// The aggregate of all rows that the subquery is, and whether a condition stands above it.
fn aggregate_of_all(plan: &LogicalPlan) -> Option<(&Aggregate, bool)> {
    match plan {
        LogicalPlan::Projection(projection) => aggregate_of_all(&projection.input),
        LogicalPlan::SubqueryAlias(alias) => aggregate_of_all(&alias.input),
        LogicalPlan::Sort(sort) => aggregate_of_all(&sort.input),
        LogicalPlan::Filter(filter) => aggregate_of_all(&filter.input).map(|(a, _)| (a, true)),
        LogicalPlan::Aggregate(aggregate) if aggregate.group_expr.is_empty() => {
            Some((aggregate, false))
        }
        _ => None,
    }
}

/// The one row of an aggregate that depends on the outer row; `None` for other subqueries.
fn dependent_aggregate(subquery: &Subquery) -> DfResult<bool> {
    if subquery.outer_ref_columns.is_empty() {
        return Ok(false);
    }
    let found = aggregate_of_all(&subquery.subquery);
    // With HAVING there may be none.
    Ok(found.is_some_and(|(_, filtered)| !filtered))
}

/// `x IN (one row)` is `x = (that row)`.
fn single_row(test: &InSubquery) -> DfResult<Option<Expr>> {
    if !dependent_aggregate(&test.subquery)? {
        return Ok(None);
    }
    let (x, row) = (
        test.expr.as_ref().clone(),
        Expr::ScalarSubquery(test.subquery.clone()),
    );
    Ok(Some(match test.negated {
        true => x.not_eq(row),
        false => x.eq(row),
    }))
}

/// The subquery has a row, whatever the tables hold.
fn always(subquery: &Subquery) -> DfResult<bool> {
    dependent_aggregate(subquery)
}

/// Whether nulls for the columns of the subquery are right where it has no match: unless an aggregate
/// says something else of no rows.
pub(super) fn is_null_without_match(lateral: &Subquery) -> bool {
    let Some((aggregate, _)) = aggregate_of_all(&lateral.subquery) else {
        return true;
    };
    if lateral.subquery.all_out_ref_exprs().is_empty() {
        return true;
    }
    let counts = aggregate.aggr_expr.iter().any(|expr| {
        let is_count = |e: &Expr| match e {
            Expr::AggregateFunction(f) => !matches!(f.func.name(), "sum" | "avg" | "min" | "max"),
            _ => false,
        };
        expr.exists(|e| Ok(is_count(e))).unwrap_or(true)
    });
    !counts && plain(&lateral.subquery)
}

/// Only columns stand above the aggregate.
fn plain(plan: &LogicalPlan) -> bool {
    match plan {
        LogicalPlan::Projection(projection) => {
            let column = |e: &Expr| matches!(e.clone().unalias(), Expr::Column(_));
            projection.expr.iter().all(column) && plain(&projection.input)
        }
        LogicalPlan::SubqueryAlias(alias) => plain(&alias.input),
        LogicalPlan::Aggregate(_) => true,
        _ => false,
    }
}

/// Refuses a plan in which a subquery is left: no rule could turn it into a join.
pub(crate) fn check_joined(plan: &LogicalPlan) -> Result<()> {
    let left = || {
        Err(carry(
            Error::unsupported("a subquery of this form is not supported")
                .detail("it could not be turned into a join with the rows around it")
                .hint("compare columns of both by equality in the subquery's WHERE, or join with it instead"),
        ))
    };
    plan.apply(|node| {
        if matches!(node, LogicalPlan::Subquery(_)) {
            return left();
        }
        node.apply_expressions(|expr| {
            expr.apply(|expr| match expr {
                Expr::Exists(_)
                | Expr::InSubquery(_)
                | Expr::ScalarSubquery(_)
                | Expr::SetComparison(_)
                | Expr::OuterReferenceColumn(_, _) => left(),
                _ => Ok(TreeNodeRecursion::Continue),
            })
        })
    })
    .map(|_| ())
    .map_err(|e| planning(e).0)
}
