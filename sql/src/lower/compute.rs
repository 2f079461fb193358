//! What DataFusion computes over whole partitions: window functions, other aggregates, top rows,
//! rows that become several, recursion.

use std::sync::Arc;

use arrow::compute::SortOptions;
use arrow::datatypes::{Field, Schema, SchemaRef};
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion::common::{Column as Name, DFSchema};
use datafusion::logical_expr::expr::{AggregateFunction, Sort, WindowFunction};
use datafusion::logical_expr::{
    Aggregate, Expr, Extension, FetchType, Limit, LogicalPlan, SkipType,
    UserDefinedLogicalNodeCore, Window,
};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::expressions::Column;
use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::plan::{CloseRule, Computation, Emit, NodeId, Op, OrderColumn};

use super::event::{Event, later, only};
use super::first::Which;
use super::slot::{bounded, computation, slot};
use super::{Lowering, Stream, arrow_schema, column_of, refuse, timed};
use crate::bind::physical_expr;
use crate::catalog::CatalogSource;
use crate::error::planning;
use crate::windows::{AssignNode, Assigned};

/// The input of a computation: expressions that partition or order it stand behind its columns.
struct Wide<'a> {
    scope: &'a DFSchema,
    width: usize,
    fields: Vec<Arc<Field>>,
    exprs: Vec<(Expr, Arc<dyn PhysicalExpr>)>,
}

impl<'a> Wide<'a> {
    fn new(scope: &'a DFSchema) -> Self {
        Self {
            scope,
            width: scope.fields().len(),
            fields: Vec::new(),
            exprs: Vec::new(),
        }
    }

    /// The column of an expression.
    fn index(&mut self, expr: &Expr) -> Result<usize> {
        let expr = expr.clone().unalias();
        let physical = physical_expr(&expr, self.scope)?;
        if let Some(column) = column_of(&physical) {
            return Ok(column);
        }
        if let Some(at) = self.exprs.iter().position(|(e, _)| *e == expr) {
            return Ok(self.width + at);
        }
        let below = self.scope.as_arrow();
        let data_type = physical.data_type(below).map_err(|e| planning(e).0)?;
        let name = format!("$key{}", self.exprs.len());
        self.fields
            .push(Arc::new(Field::new(name, data_type, true)));
        self.exprs.push((expr, physical));
        Ok(self.width + self.exprs.len() - 1)
    }

    /// The expression as the name of its column.
    fn name(&mut self, expr: &Expr) -> Result<Expr> {
        let at = self.index(expr)?;
        Ok(match at.checked_sub(self.width) {
            Some(more) => Expr::Column(Name::new_unqualified(self.fields[more].name())),
            None => Expr::Column(Name::from(self.scope.qualified_field(at))),
        })
    }

    fn order(&mut self, sorts: &[Sort]) -> Result<Vec<OrderColumn>> {
        let mut order: Vec<OrderColumn> = Vec::with_capacity(sorts.len());
        for sort in sorts {
            let column = self.index(&sort.expr)?;
            if order.iter().all(|have| have.column != column) {
                order.push(OrderColumn {
                    column,
                    options: SortOptions {
                        descending: !sort.asc,
                        nulls_first: sort.nulls_first,
                    },
                });
            }
        }
        Ok(order)
    }

    fn names(&mut self, sorts: &[Sort]) -> Result<Vec<Sort>> {
        let name = |sort: &Sort| {
            let expr = self.name(&sort.expr)?;
            Ok(Sort::new(expr, sort.asc, sort.nulls_first))
        };
        sorts.iter().map(name).collect()
    }

    /// The leaf of the computation: rows sorted by partition, then by `order`.
    fn slot(&self, keys: &[usize], order: &[OrderColumn]) -> Result<LogicalPlan> {
        let ascending = SortOptions {
            descending: false,
            nulls_first: true,
        };
        let mut sorted: Vec<OrderColumn> = Vec::new();
        let keys = keys.iter().map(|column| OrderColumn {
            column: *column,
            options: ascending,
        });
        for column in keys.chain(order.iter().copied()) {
            if sorted.iter().all(|have| have.column != column.column) {
                sorted.push(column);
            }
        }
        slot(0, self.scope, &self.fields, &sorted)
    }
}

/// A computation over the partitions of one stream.
struct Over {
    keys: Vec<usize>,
    order: Vec<OrderColumn>,
    compute: Arc<Computation>,
    /// Columns of its answer.
    schema: SchemaRef,
    /// It depends on so many rows of a partition only, the first ones.
    first: Option<usize>,
}

impl Lowering<'_> {
    /// Window functions.
    pub(super) fn over(&mut self, window: &Window, first: Option<usize>) -> Result<Stream> {
        let input = self.build(&window.input)?;
        let scope = window.input.schema();
        let mut wide = Wide::new(scope);
        let mut keys: Option<Vec<usize>> = None;
        let mut order = Vec::new();
        let mut exprs = Vec::with_capacity(window.window_expr.len());
        for expr in &window.window_expr {
            let (function, alias) = window_function(expr)?;
            let mut function = function.clone();
            let params = &mut function.params;
            let partition = params.partition_by.iter().map(|e| wide.index(e));
            let mut partition = partition.collect::<Result<Vec<_>>>()?;
            partition.dedup();
            if order.is_empty() {
                order = wide.order(&params.order_by)?;
            }
            // Rows that share a partition of every function are computed together.
            keys = Some(match keys {
                None => partition,
                Some(mut keys) => {
                    keys.retain(|key| partition.contains(key));
                    keys
                }
            });
            let named = params.partition_by.iter().map(|e| wide.name(e));
            params.partition_by = named.collect::<Result<_>>()?;
            params.order_by = wide.names(&params.order_by)?;
            let name = alias.unwrap_or_else(|| expr.schema_name().to_string());
            exprs.push(Expr::WindowFunction(Box::new(function)).alias(name));
        }
        let mut keys = keys.unwrap_or_default();
        keys.sort_unstable();
        keys.dedup();
        let leaf = wide.slot(&keys, &order)?;
        // The physical planner wants the bare functions; names are given behind.
        let bare: Vec<Expr> = exprs.iter().map(|e| e.clone().unalias()).collect();
        let plan = Window::try_new(bare, Arc::new(leaf)).map_err(|e| planning(e).0)?;
        let plan = LogicalPlan::Window(plan);
        if keys.is_empty() {
            self.one_worker("a window function without PARTITION BY");
        }
        let compute = computation(&plan, vec![order.clone()])?;
        let over = Over {
            keys,
            order,
            compute,
            schema: arrow_schema(plan.schema()),
            first,
        };
        let width = scope.fields().len();
        let more = wide.fields.len();
        let events = |lowering: &Self, input: &Stream, key: Option<(Event, usize)>| {
            let mut events = lowering.promised(&input.events, key);
            events.truncate(width + more);
            events.resize(width + more + exprs.len(), None);
            events
        };
        let stream = self.recompute(input, &wide, over, events)?;
        // Without the columns that were added.
        let schema = arrow_schema(&window.schema);
        let kept = (0..width).chain(width + more..width + more + exprs.len());
        Ok(self.pick(stream, kept, schema))
    }

    /// Aggregates that have no operator of their own.
    pub(super) fn recomputed_aggregate(&mut self, aggregate: &Aggregate) -> Result<Stream> {
        let input = self.build(&aggregate.input)?;
        let scope = aggregate.input.schema();
        let mut wide = Wide::new(scope);
        // Two expressions may be the same column once they are simplified.
        let mut keys: Vec<usize> = Vec::new();
        let mut groups: Vec<Expr> = Vec::new();
        let mut places = Vec::with_capacity(aggregate.group_expr.len());
        for expr in &aggregate.group_expr {
            let key = wide.index(expr)?;
            let place = match keys.iter().position(|have| *have == key) {
                Some(place) => place,
                None => {
                    groups.push(wide.name(expr)?);
                    keys.push(key);
                    keys.len() - 1
                }
            };
            places.push(place);
        }
        let single = super::first::one_row(aggregate);
        let mut order = Vec::new();
        let mut calls = Vec::with_capacity(aggregate.aggr_expr.len());
        for expr in &aggregate.aggr_expr {
            let Expr::AggregateFunction(AggregateFunction { func, params }) =
                expr.clone().unalias()
            else {
                return Err(Error::internal("an aggregate is not a function"));
            };
            let mut params = params;
            if order.is_empty() {
                order = wide.order(&params.order_by)?;
                if single == Some(Which::Last) {
                    order.iter_mut().for_each(|by| by.options = !by.options);
                }
            }
            params.order_by = wide.names(&params.order_by)?;
            // A condition that is null is not met; not every accumulator knows.
            params.filter = params.filter.map(|filter| Box::new(Expr::IsTrue(filter)));
            let call = Expr::AggregateFunction(AggregateFunction { func, params });
            calls.push(call.alias(format!("$call{}", calls.len())));
        }
        let leaf = wide.slot(&keys, &order)?;
        let plan = Aggregate::try_new(Arc::new(leaf), groups, calls).map_err(|e| planning(e).0)?;
        let plan = LogicalPlan::Aggregate(plan);
        let over = Over {
            compute: computation(&plan, vec![order.clone()])?,
            schema: arrow_schema(plan.schema()),
            keys: keys.clone(),
            order,
            first: single.map(|_| 1),
        };
        let count = aggregate.aggr_expr.len();
        let events = |lowering: &Self, input: &Stream, key: Option<(Event, usize)>| {
            let of_keys: Vec<Option<Event>> = keys
                .iter()
                .map(|k| input.events.get(*k).copied().flatten())
                .collect();
            let mut events = lowering.promised(&of_keys, key);
            events.resize(keys.len() + count, None);
            events
        };
        let stream = self.recompute(input, &wide, over, events)?;
        let schema = arrow_schema(&aggregate.schema);
        let shown = places.into_iter();
        let shown = shown.chain(keys.len()..keys.len() + count);
        Ok(self.pick(stream, shown, schema))
    }

    /// The first rows in an order.
    pub(super) fn limit(&mut self, limit: &Limit) -> Result<Stream> {
        let (FetchType::Literal(fetch), SkipType::Literal(skip)) = (
            limit.get_fetch_type().map_err(|e| planning(e).0)?,
            limit.get_skip_type().map_err(|e| planning(e).0)?,
        ) else {
            return Err(Error::unsupported(
                "LIMIT and OFFSET of a view are constants",
            ));
        };
        self.first_of(&limit.input, skip, fetch)
    }

    /// The first rows of a plan, whose order may be given below a projection.
    fn first_of(
        &mut self,
        plan: &LogicalPlan,
        skip: usize,
        fetch: Option<usize>,
    ) -> Result<Stream> {
        match plan {
            LogicalPlan::Sort(sort) => {
                let most = sort.fetch.map(|most| most.saturating_sub(skip));
                let fetch = fetch.into_iter().chain(most).min();
                self.top(&sort.input, &sort.expr, skip, fetch)
            }
            LogicalPlan::Projection(projection) if is_ordered(&projection.input) => {
                let input = self.first_of(&projection.input, skip, fetch)?;
                let schema = arrow_schema(&projection.schema);
                self.project(input, &projection.expr, projection.input.schema(), schema)
            }
            LogicalPlan::SubqueryAlias(alias) if is_ordered(&alias.input) => {
                self.first_of(&alias.input, skip, fetch)
            }
            other => self.top(other, &[], skip, fetch),
        }
    }

    pub(super) fn top(
        &mut self,
        below: &LogicalPlan,
        sorts: &[Sort],
        skip: usize,
        fetch: Option<usize>,
    ) -> Result<Stream> {
        let input = self.build(below)?;
        let scope = below.schema();
        let mut wide = Wide::new(scope);
        let order = wide.order(sorts)?;
        let leaf = wide.slot(&[], &order)?;
        let plan = datafusion::logical_expr::LogicalPlanBuilder::from(leaf)
            .limit(skip, fetch)
            .and_then(|plan| plan.build())
            .map_err(|e| planning(e).0)?;
        self.one_worker("ORDER BY … LIMIT");
        let over = Over {
            keys: Vec::new(),
            compute: computation(&plan, vec![order.clone()])?,
            schema: arrow_schema(plan.schema()),
            order,
            first: fetch
                .and_then(|fetch| fetch.checked_add(skip))
                .filter(|rows| *rows > 0),
        };
        let width = scope.fields().len();
        let more = wide.fields.len();
        let none = |_: &Self, _: &Stream, _: Option<(Event, usize)>| vec![None; width + more];
        let stream = self.recompute(input, &wide, over, none)?;
        Ok(self.pick(stream, 0..width, arrow_schema(scope)))
    }

    /// Each row to any number of rows.
    pub(super) fn unnest(&mut self, plan: &LogicalPlan) -> Result<Stream> {
        let LogicalPlan::Unnest(unnest) = plan else {
            return Err(refuse::cannot(plan));
        };
        let input = self.build(&unnest.input)?;
        let leaf = slot(0, unnest.input.schema(), &[], &[])?;
        let options = unnest.options.clone();
        let whole = datafusion::logical_expr::LogicalPlanBuilder::from(leaf)
            .unnest_columns_with_options(unnest.exec_columns.clone(), options)
            .and_then(|plan| plan.build())
            .map_err(|e| planning(e).0)?;
        let compute = computation(&whole, vec![Vec::new()])?;
        let schema = arrow_schema(plan.schema());
        let append_only = self.nodes[input.node].append_only;
        let width = schema.fields().len();
        // A column that is not unnested keeps what is known of it.
        let from = unnest.dependency_indices.iter();
        let listed = |at: &usize| {
            unnest.list_type_columns.iter().any(|(i, _)| i == at)
                || unnest.struct_type_columns.contains(at)
        };
        let mut events: Vec<Option<Event>> = from
            .map(|at| {
                input
                    .events
                    .get(*at)
                    .copied()
                    .flatten()
                    .filter(|_| !listed(at))
            })
            .collect();
        events.resize(width, None);
        let node = self.push(
            Op::Expand {
                input: input.node,
                compute,
            },
            schema,
            append_only,
        );
        Ok(Stream { node, events })
    }

    /// Sessions and cumulating windows.
    pub(super) fn assign(&mut self, assign: &AssignNode) -> Result<Stream> {
        let input = self.build(&assign.input)?;
        let time = assign.time_index().map_err(|e| planning(e).0)?;
        let event = timed(&input, time, &assign.input)?;
        let scope = assign.input.schema();
        let wide = Wide::new(scope);
        let keys = assign.key_indexes().map_err(|e| planning(e).0)?;
        let order = vec![OrderColumn {
            column: time,
            options: SortOptions {
                descending: false,
                nulls_first: true,
            },
        }];
        let leaf = wide.slot(&keys, &order)?;
        let exprs = std::iter::once(&assign.time).chain(&assign.keys);
        let node = assign
            .with_exprs_and_inputs(exprs.cloned().collect(), vec![leaf])
            .map_err(|e| planning(e).0)?;
        let plan = LogicalPlan::Extension(Extension {
            node: Arc::new(node),
        });
        let compute = computation(&plan, vec![order.clone()])?;
        let schema = arrow_schema(plan.schema());
        // The last row of a window has a time before its end.
        let end = self.events.window(event, 0)[1];
        match assign.assigned {
            Assigned::Cumulate { size_us, .. } => {
                let start = end.map(|end| self.events.fresh(end.delay_us.saturating_add(size_us)));
                let mut events = input.events.clone();
                events.extend([start, end]);
                let append_only = self.nodes[input.node].append_only;
                let node = self.push(
                    Op::Expand {
                        input: input.node,
                        compute,
                    },
                    schema,
                    append_only,
                );
                Ok(Stream { node, events })
            }
            Assigned::Session { .. } => {
                self.notices.push(
                    "rows of sessions are kept for ever: a late row may join two of them".into(),
                );
                let width = scope.fields().len();
                let node = self.push(
                    Op::Recompute {
                        inputs: vec![input.node],
                        keys: vec![keys],
                        compute,
                        close: None,
                        emit: Emit::Changes,
                        allowed_lateness_us: 0,
                        first: None,
                    },
                    schema,
                    false,
                );
                let mut events = vec![None; width + 1];
                events.push(end);
                Ok(Stream { node, events })
            }
        }
    }

    /// A plan that is computed as a whole at each tick that changes what it reads.
    pub(super) fn whole(&mut self, plan: &LogicalPlan, why: &str) -> Result<Stream> {
        let mut scans: Vec<LogicalPlan> = Vec::new();
        let mut leaf = |node: LogicalPlan| {
            let LogicalPlan::TableScan(scan) = &node else {
                return Ok(Transformed::no(node));
            };
            if CatalogSource::of(&scan.source).is_none() {
                return Ok(Transformed::no(node));
            }
            let input = match scans.iter().position(|have| *have == node) {
                Some(input) => input,
                None => {
                    scans.push(node.clone());
                    scans.len() - 1
                }
            };
            let leaf = slot(input, node.schema(), &[], &[]).map_err(crate::error::carry)?;
            Ok(Transformed::yes(leaf))
        };
        let replaced = plan.clone().transform_up(|node| leaf(node));
        let replaced = replaced.data().map_err(|e| planning(e).0)?;
        let renewed = replaced
            .transform_up(|node| {
                let mut node = node.recompute_schema()?;
                if let LogicalPlan::RecursiveQuery(query) = &mut node {
                    let term = Arc::clone(&query.recursive_term);
                    query.recursive_term = Arc::new(bounded(term));
                }
                Ok(Transformed::yes(node))
            })
            .data()
            .map_err(|e| planning(e).0)?;
        let mut inputs: Vec<NodeId> = Vec::with_capacity(scans.len());
        for scan in &scans {
            inputs.push(self.build(scan)?.node);
        }
        if inputs.is_empty() {
            return Err(
                Error::unsupported(format!("{why} over no relation cannot be a view yet"))
                    .hint("ask it when you query"),
            );
        }
        let order = vec![Vec::new(); inputs.len()];
        let compute = computation(&renewed, order)?;
        self.notices.push(format!(
            "{why} is computed anew, on one worker, at each tick that changes what it reads"
        ));
        let schema = arrow_schema(plan.schema());
        let width = schema.fields().len();
        let node = self.push(
            Op::Recompute {
                keys: vec![Vec::new(); inputs.len()],
                inputs,
                compute,
                close: None,
                emit: Emit::Changes,
                allowed_lateness_us: 0,
                first: None,
            },
            schema,
            false,
        );
        Ok(Stream {
            node,
            events: vec![None; width],
        })
    }

    /// Events of columns whose rows are computed in partitions that `key` closes.
    fn promised(
        &self,
        events: &[Option<Event>],
        key: Option<(Event, usize)>,
    ) -> Vec<Option<Event>> {
        let lateness = self.rules.allowed_lateness_us;
        match (self.rules.emit, key) {
            (_, None) => vec![None; events.len()],
            (Emit::OnClose, Some((event, _))) => only(events, event, lateness),
            (Emit::Changes, Some((event, _))) => only(events, event, 0)
                .into_iter()
                .map(|e| e.map(|e| later(e, lateness)))
                .collect(),
        }
    }

    fn recompute(
        &mut self,
        mut input: Stream,
        wide: &Wide<'_>,
        over: Over,
        events: impl Fn(&Self, &Stream, Option<(Event, usize)>) -> Vec<Option<Event>>,
    ) -> Result<Stream> {
        if !wide.exprs.is_empty() {
            let below = Arc::clone(&self.nodes[input.node].schema);
            let own = below.fields().iter().enumerate();
            let own = own.map(|(i, f)| Arc::new(Column::new(f.name(), i)) as Arc<dyn PhysicalExpr>);
            let more = wide.exprs.iter().map(|(_, e)| Arc::clone(e));
            let exprs: Vec<_> = own.chain(more).collect();
            let fields = below.fields().iter().chain(&wide.fields).cloned();
            let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
            input = self.project_physical(input, exprs, schema);
        }
        let close = over
            .keys
            .iter()
            .enumerate()
            .filter_map(|(key, column)| Some((input.events.get(*column).copied()??, key)))
            .min_by_key(|(event, key)| (event.delay_us, *key));
        let on_close = self.rules.emit == Emit::OnClose && close.is_some();
        self.aggregates += usize::from(close.is_some());
        if close.is_none() && !over.keys.is_empty() {
            self.notices.push(
                "partitions without a window are kept for ever; partition by window_end to bound the state"
                    .into(),
            );
        }
        let events = events(self, &input, close);
        debug_assert_eq!(over.compute.order, [over.order]);
        let node = self.push(
            Op::Recompute {
                inputs: vec![input.node],
                keys: vec![over.keys],
                compute: over.compute,
                close: close.map(|(event, key)| CloseRule {
                    key,
                    delay_us: event.delay_us,
                }),
                emit: match on_close {
                    true => Emit::OnClose,
                    false => Emit::Changes,
                },
                allowed_lateness_us: self.rules.allowed_lateness_us,
                first: over.first,
            },
            over.schema,
            on_close,
        );
        Ok(Stream { node, events })
    }

    /// These columns under the names of `schema`.
    fn pick(
        &mut self,
        input: Stream,
        columns: impl Iterator<Item = usize>,
        schema: SchemaRef,
    ) -> Stream {
        let below = Arc::clone(&self.nodes[input.node].schema);
        let exprs = columns
            .map(|i| Arc::new(Column::new(below.field(i).name(), i)) as Arc<dyn PhysicalExpr>)
            .collect();
        self.project_physical(input, exprs, schema)
    }

    fn one_worker(&mut self, what: &str) {
        self.notices
            .push(format!("{what} keeps all rows of its input on one worker"));
    }
}

/// Whether the rows of a plan come in an order that was asked for.
fn is_ordered(plan: &LogicalPlan) -> bool {
    match plan {
        LogicalPlan::Sort(_) => true,
        LogicalPlan::Projection(projection) => is_ordered(&projection.input),
        LogicalPlan::SubqueryAlias(alias) => is_ordered(&alias.input),
        _ => false,
    }
}

fn window_function(expr: &Expr) -> Result<(&WindowFunction, Option<String>)> {
    match expr {
        Expr::WindowFunction(function) => Ok((function, None)),
        Expr::Alias(alias) => {
            let (function, _) = window_function(&alias.expr)?;
            Ok((function, Some(alias.name.clone())))
        }
        _ => Err(Error::internal("a window expression is not a function")),
    }
}
