//! Rules over bound plans. One list for views and queries, so that both fail on the same rows.
//!
//! Left out for views, as they fit one-shot reads only: limit pushdown, single distinct to group by.
//! Left out for both: DataFusion's filter pushdown (see `push_filters`), common subexpressions (they
//! evaluate what a CASE would have skipped). `now()` is folded for queries only.

mod constant_keys;
mod constants;
mod correlated;
mod definite_filters;
mod dependent;
mod lateral;
mod push_filters;
mod subqueries;
mod types;
mod values;

use std::sync::Arc;

use datafusion::common::Result as DfResult;
use datafusion::execution::{SessionState, SessionStateBuilder};
use datafusion::logical_expr::LogicalPlan;
use datafusion::optimizer::analyzer::resolve_grouping_function::ResolveGroupingFunction;
use datafusion::optimizer::analyzer::type_coercion::TypeCoercion;
use datafusion::optimizer::decorrelate_predicate_subquery::DecorrelatePredicateSubquery;
use datafusion::optimizer::eliminate_cross_join::EliminateCrossJoin;
use datafusion::optimizer::eliminate_duplicated_expr::EliminateDuplicatedExpr;
use datafusion::optimizer::eliminate_filter::EliminateFilter;
use datafusion::optimizer::eliminate_limit::EliminateLimit;
use datafusion::optimizer::extract_equijoin_predicate::ExtractEquijoinPredicate;
use datafusion::optimizer::optimize_projections::OptimizeProjections;
use datafusion::optimizer::propagate_empty_relation::PropagateEmptyRelation;
use datafusion::optimizer::push_down_limit::PushDownLimit;
use datafusion::optimizer::replace_distinct_aggregate::ReplaceDistinctWithAggregate;
use datafusion::optimizer::scalar_subquery_to_join::ScalarSubqueryToJoin;
use datafusion::optimizer::simplify_expressions::SimplifyExpressions;
use datafusion::optimizer::single_distinct_to_groupby::SingleDistinctToGroupBy;
use datafusion::optimizer::{Analyzer, Optimizer, OptimizerRule};
use datafusion::prelude::SessionConfig;

use crate::catalog::OPTIONS;
use crate::checked::{Checked, short_circuit};
use crate::error::carry;
use crate::functions::functions;
use crate::sets::NumberCopies;
use constant_keys::ConstantKeys;
use correlated::CorrelatedSubqueries;
use definite_filters::DefiniteFilters;
use push_filters::PushFilters;
use subqueries::SubqueryPredicates;
use types::PostgresTypes;

pub(crate) use constants::bound_constants;
pub(crate) use subqueries::check_joined;

type Rules = Vec<Arc<dyn OptimizerRule + Send + Sync>>;

/// Types and checked arithmetic: the plan means what it will mean until the end.
pub(crate) fn analyze(plan: LogicalPlan) -> DfResult<LogicalPlan> {
    Analyzer::with_rules(vec![
        Arc::new(ResolveGroupingFunction::new()),
        Arc::new(PostgresTypes),
        Arc::new(TypeCoercion::new()),
        Arc::new(Checked),
    ])
    .execute_and_check(plan, &OPTIONS, |_, _| {})
}

/// Rules for one-shot queries.
pub(crate) fn query_rules() -> Rules {
    let mut rules = common_rules(true);
    rules.insert(0, Arc::new(NumberCopies));
    rules.push(Arc::new(EliminateLimit::new()));
    rules.push(Arc::new(PushDownLimit::new()));
    rules.push(Arc::new(SingleDistinctToGroupBy::new()));
    rules.push(Arc::new(DefiniteFilters));
    rules.push(Arc::new(OptimizeProjections::new()));
    rules
}

/// Rules for views.
fn view_rules() -> Rules {
    let mut rules = common_rules(false);
    rules.push(Arc::new(OptimizeProjections::new()));
    rules
}

fn common_rules(join_not_in: bool) -> Rules {
    vec![
        Arc::new(SubqueryPredicates { join_not_in }),
        Arc::new(SimplifyExpressions::new()),
        Arc::new(CorrelatedSubqueries { left: false }),
        Arc::new(ReplaceDistinctWithAggregate::new()),
        Arc::new(DecorrelatePredicateSubquery::new()),
        Arc::new(ScalarSubqueryToJoin::new()),
        Arc::new(CorrelatedSubqueries { left: true }),
        Arc::new(EliminateDuplicatedExpr::new()),
        Arc::new(EliminateFilter::new()),
        Arc::new(EliminateCrossJoin::new()),
        Arc::new(PropagateEmptyRelation::new()),
        Arc::new(PushFilters),
        Arc::new(ExtractEquijoinPredicate::new()),
        Arc::new(ConstantKeys),
    ]
}

/// What the rules for views look up: options and functions. It has no time, so `now()` stays, and it
/// is new for each statement, so that generated names, and with them fingerprints, are always the same.
fn rules_context() -> SessionState {
    SessionStateBuilder::new()
        .with_config(SessionConfig::from(OPTIONS.clone()))
        .with_aggregate_functions(functions().aggregate.values().cloned().collect())
        .build()
}

/// Optimizes the plan of a view.
pub(crate) fn optimize_view(plan: LogicalPlan) -> DfResult<LogicalPlan> {
    let plan = Optimizer::with_rules(view_rules()).optimize(plan, &rules_context(), |_, _| {})?;
    check_joined(&plan).map_err(carry)?;
    bound_constants(&plan)?;
    short_circuit(plan)
}
