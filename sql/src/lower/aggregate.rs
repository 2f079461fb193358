//! GROUP BY, DISTINCT and UNION: keys, calls, and the rule by which groups close.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::common::DFSchema;
use datafusion::logical_expr::expr::{AggregateFunction, AggregateFunctionParams};
use datafusion::logical_expr::{Aggregate, Expr, LogicalPlan};
use datafusion::physical_expr::PhysicalExpr;
use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::plan::{AggregateCall, AggregateKind, CloseRule, Emit, MapStep, NodeId, Op};

use super::event::{Event, later, only};
use super::{Lowering, Stream, arrow_schema, column_of, refuse};
use crate::bind::physical_expr;
use crate::functions::{Fold, Total};

/// Columns an aggregate needs, each computed once below it.
struct Columns<'a> {
    scope: &'a DFSchema,
    exprs: Vec<(Expr, Arc<dyn PhysicalExpr>)>,
}

impl Columns<'_> {
    fn index(&mut self, expr: &Expr) -> Result<usize> {
        let expr = expr.clone().unalias();
        if let Some(at) = self.exprs.iter().position(|(e, _)| *e == expr) {
            return Ok(at);
        }
        let physical = physical_expr(&expr, self.scope)?;
        self.exprs.push((expr, physical));
        Ok(self.exprs.len() - 1)
    }
}

impl Lowering<'_> {
    pub(super) fn aggregate(&mut self, aggregate: &Aggregate) -> Result<Stream> {
        let input = self.build(&aggregate.input)?;
        let scope = aggregate.input.schema();
        let mut columns = Columns {
            scope,
            exprs: Vec::new(),
        };
        let mut keys = Vec::with_capacity(aggregate.group_expr.len());
        for expr in &aggregate.group_expr {
            if matches!(expr, Expr::GroupingSet(_)) {
                return Err(refuse::grouping_sets());
            }
            keys.push(columns.index(expr)?);
        }
        let schema = arrow_schema(&aggregate.schema);
        let mut calls = Vec::with_capacity(aggregate.aggr_expr.len());
        for (at, expr) in aggregate.aggr_expr.iter().enumerate() {
            let output = schema.field(keys.len() + at).data_type().clone();
            calls.push(call(expr, output, &mut columns)?);
        }
        let distinct = distinct_argument(&calls)?;
        let calls = calls.into_iter().map(|c| c.call).collect();
        let (input, keys, calls) = self.prepare(input, columns, keys, calls)?;
        match distinct {
            false => self.group(input, keys, calls, schema),
            true => self.group_distinct(input, keys, calls, schema),
        }
    }

    /// Calls over the distinct values of one column: first the values of each group, then the group.
    fn group_distinct(
        &mut self,
        input: Stream,
        mut keys: Vec<usize>,
        mut calls: Vec<AggregateCall>,
        schema: SchemaRef,
    ) -> Result<Stream> {
        let outer: Vec<usize> = (0..keys.len()).collect();
        keys.extend(calls.iter().find_map(|c| c.input));
        let below = &self.nodes[input.node].schema;
        let fields: Vec<Field> = keys.iter().map(|k| below.field(*k).clone()).collect();
        let values = self.group(input, keys, Vec::new(), Arc::new(Schema::new(fields)))?;
        for call in &mut calls {
            call.input = Some(outer.len());
        }
        self.group(values, outer, calls, schema)
    }

    pub(super) fn distinct(&mut self, input: &LogicalPlan) -> Result<Stream> {
        let stream = self.build(input)?;
        let keys = (0..stream.events.len()).collect();
        self.group(stream, keys, Vec::new(), arrow_schema(input.schema()))
    }

    /// A projection below the aggregate, unless all it needs is there.
    fn prepare(
        &mut self,
        input: Stream,
        columns: Columns<'_>,
        mut keys: Vec<usize>,
        mut calls: Vec<AggregateCall>,
    ) -> Result<(Stream, Vec<usize>, Vec<AggregateCall>)> {
        let plain: Option<Vec<usize>> = columns.exprs.iter().map(|(_, e)| column_of(e)).collect();
        if let Some(at) = plain {
            for key in &mut keys {
                *key = at[*key];
            }
            for call in &mut calls {
                call.input = call.input.map(|i| at[i]);
                call.filter = call.filter.map(|i| at[i]);
            }
            return Ok((input, keys, calls));
        }
        let below = Arc::clone(&self.nodes[input.node].schema);
        let mut fields = Vec::with_capacity(columns.exprs.len());
        for (expr, physical) in &columns.exprs {
            let field = physical
                .return_field(&below)
                .map_err(|e| crate::error::planning(e).0)?;
            fields.push(Field::new(
                expr.schema_name().to_string(),
                field.data_type().clone(),
                field.is_nullable(),
            ));
        }
        let exprs = columns.exprs.into_iter().map(|(_, e)| e).collect();
        let stream = self.project_physical(input, exprs, Arc::new(Schema::new(fields)));
        Ok((stream, keys, calls))
    }

    /// Reads a window directly where only a choice of its columns stands between: the aggregate then
    /// computes the window itself, and a row is not spread over its windows first.
    fn read_window(
        &mut self,
        node: NodeId,
        keys: &mut [usize],
        calls: &mut [AggregateCall],
    ) -> NodeId {
        let Op::Map { input, steps } = &self.nodes[node].op else {
            return node;
        };
        let [MapStep::Project(exprs, _)] = &steps[..] else {
            return node;
        };
        let window = *input;
        let chosen: Option<Vec<usize>> = exprs.iter().map(column_of).collect();
        let Some(chosen) = chosen else { return node };
        // A node that is not the last one may be read by others.
        let alone = node + 1 == self.nodes.len() && node >= self.sealed;
        if !alone || !matches!(self.nodes[window].op, Op::Window { .. }) {
            return node;
        }
        self.nodes.pop();
        keys.iter_mut().for_each(|key| *key = chosen[*key]);
        for call in calls {
            call.input = call.input.map(|column| chosen[column]);
            call.filter = call.filter.map(|column| chosen[column]);
        }
        window
    }

    fn group(
        &mut self,
        mut input: Stream,
        mut keys: Vec<usize>,
        mut calls: Vec<AggregateCall>,
        schema: SchemaRef,
    ) -> Result<Stream> {
        let key_events: Vec<Option<Event>> = keys.iter().map(|k| input.events[*k]).collect();
        input.node = self.read_window(input.node, &mut keys, &mut calls);
        // The earliest promise: the end of a window rather than its start.
        let close = key_events
            .iter()
            .enumerate()
            .filter_map(|(key, e)| e.map(|e| (e, key)))
            .min_by_key(|(e, key)| (e.delay_us, *key));
        let emit = self.rules.emit;
        if emit == Emit::OnClose && close.is_none() {
            return Err(refuse::nothing_closes());
        }
        self.aggregates += usize::from(close.is_some());
        let lateness = self.rules.allowed_lateness_us;
        let mut events = match (emit, close) {
            (_, None) => vec![None; keys.len()],
            // Rows come when the group closes, whatever other times they carry.
            (Emit::OnClose, Some((event, _))) => only(&key_events, event, lateness),
            (Emit::Changes, Some(_)) => key_events
                .iter()
                .map(|e| e.map(|e| later(e, lateness)))
                .collect(),
        };
        events.resize(keys.len() + calls.len(), None);
        let inserts_only =
            calls.is_empty() && !keys.is_empty() && self.nodes[input.node].append_only;
        let append_only = emit == Emit::OnClose || inserts_only;
        if close.is_none() && !keys.is_empty() {
            self.notices.push(
                "groups without a window are kept for ever; group by window_end to bound the state"
                    .into(),
            );
        }
        let node = self.push(
            Op::Aggregate {
                input: input.node,
                keys,
                calls,
                close: close.map(|(event, key)| CloseRule {
                    key,
                    delay_us: event.delay_us,
                }),
                emit,
                allowed_lateness_us: lateness,
            },
            schema,
            append_only,
        );
        Ok(Stream { node, events })
    }
}

/// A call, and whether it looks at each value once.
struct Call {
    call: AggregateCall,
    distinct: bool,
    name: String,
}

/// Whether the calls look at the distinct values of one column. Some of them doing so and others
/// not would need two groups of states, joined.
fn distinct_argument(calls: &[Call]) -> Result<bool> {
    let Some(first) = calls.iter().find(|c| c.distinct) else {
        return Ok(false);
    };
    let alike = calls.iter().all(|c| {
        let idempotent = matches!(c.call.kind, AggregateKind::Min | AggregateKind::Max);
        (c.distinct || idempotent) && c.call.input == first.call.input && c.call.filter.is_none()
    });
    match alike {
        true => Ok(true),
        false => Err(refuse::distinct_aggregate(&first.name)),
    }
}

fn call(expr: &Expr, output: DataType, columns: &mut Columns<'_>) -> Result<Call> {
    let expr = expr.clone().unalias();
    let Expr::AggregateFunction(AggregateFunction { func, params }) = &expr else {
        return Err(Error::internal("an aggregate is not a function"));
    };
    let AggregateFunctionParams {
        args,
        distinct,
        filter,
        order_by: _,
        null_treatment,
    } = params;
    let name = func.name();
    let total = func
        .inner()
        .as_any()
        .downcast_ref::<Total>()
        .map(|t| t.fold);
    let kind = match (total, name) {
        (Some(Fold::Sum), _) => AggregateKind::Sum,
        (Some(Fold::Average), _) => AggregateKind::Avg,
        (_, "count") => AggregateKind::Count,
        (_, "min") => AggregateKind::Min,
        (_, "max") => AggregateKind::Max,
        _ => return Err(refuse::aggregate(name)),
    };
    let idempotent = matches!(kind, AggregateKind::Min | AggregateKind::Max);
    if null_treatment.is_some() {
        return Err(refuse::aggregate(name));
    }
    let input = match &args[..] {
        [Expr::Literal(value, _)]
            if kind == AggregateKind::Count && !value.is_null() && !distinct =>
        {
            None
        }
        [argument] => Some(columns.index(argument)?),
        [] if kind == AggregateKind::Count => None,
        _ => {
            return Err(Error::unsupported(format!(
                "{name} takes one argument in a view"
            )));
        }
    };
    let filter = match filter {
        Some(filter) => Some(columns.index(filter)?),
        None => None,
    };
    Ok(Call {
        // The distinct rows of count(DISTINCT 1) are one row: a constant is a column like others.
        distinct: *distinct && !idempotent,
        call: AggregateCall {
            kind,
            input,
            filter,
            output,
        },
        name: name.to_string(),
    })
}
