//! GROUP BY, DISTINCT and UNION: keys, calls, and the rule by which groups close.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::common::{DFSchema, ScalarValue};
use datafusion::logical_expr::expr::{AggregateFunction, AggregateFunctionParams, GroupingSet};
use datafusion::logical_expr::{Aggregate, Expr, LogicalPlan};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::expressions::{Column, Literal};
use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::plan::{AggregateCall, AggregateKind, CloseRule, Emit, MapStep, NodeId, Op};

use super::event::{Event, later, only};
use super::{Lowering, Stream, arrow_schema, column_of, refuse};
use crate::bind::physical_expr;
use crate::error::planning;
use crate::functions::{Fold, Total};

/// Grouping sets of one aggregation: each is an operator that reads every row.
const MOST_SETS: usize = 512;

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
        let sets = match &aggregate.group_expr[..] {
            [Expr::GroupingSet(set)] => Some(grouping_sets(set)?),
            _ => None,
        };
        if !aggregate.aggr_expr.iter().all(has_operator) {
            return match sets {
                None => self.recomputed_aggregate(aggregate),
                Some(_) => Err(refuse::grouping_sets()),
            };
        }
        let input = self.build(&aggregate.input)?;
        let scope = aggregate.input.schema();
        let mut columns = Columns {
            scope,
            exprs: Vec::new(),
        };
        let grouped = match &sets {
            Some((exprs, _)) => exprs.clone(),
            None => aggregate.group_expr.clone(),
        };
        let keys = grouped.iter().map(|expr| columns.index(expr));
        let keys = keys.collect::<Result<Vec<usize>>>()?;
        let schema = arrow_schema(&aggregate.schema);
        let first = keys.len() + usize::from(sets.is_some());
        let mut calls = Vec::with_capacity(aggregate.aggr_expr.len());
        for (at, expr) in aggregate.aggr_expr.iter().enumerate() {
            let output = schema.field(first + at).data_type().clone();
            calls.push(call(expr, output, &mut columns)?);
        }
        let distinct: Vec<bool> = calls.iter().map(|c| c.distinct).collect();
        let alike = distinct_argument(&calls);
        let calls = calls.into_iter().map(|c| c.call).collect();
        let (mut input, mut keys, calls) = self.prepare(input, columns, keys, calls)?;
        if let Some((_, sets)) = &sets {
            (input, keys) = self.by_sets(input, keys, sets, schema.field(first - 1))?;
        }
        match (distinct.contains(&true), alike) {
            (false, _) => self.group(input, keys, calls, schema),
            (true, true) => self.group_distinct(input, keys, calls, schema),
            (true, false) => self.group_mixed(input, keys, calls, &distinct, schema),
        }
    }

    /// Each row once per grouping set: keys that are not in the set are null, and the number of the set
    /// is a key of its own.
    fn by_sets(
        &mut self,
        input: Stream,
        keys: Vec<usize>,
        sets: &[Vec<bool>],
        id: &Field,
    ) -> Result<(Stream, Vec<usize>)> {
        let below = Arc::clone(&self.nodes[input.node].schema);
        let width = below.fields().len();
        let mut fields: Vec<Field> = below.fields().iter().map(|f| f.as_ref().clone()).collect();
        fields.extend(
            keys.iter()
                .map(|k| below.field(*k).clone().with_nullable(true)),
        );
        fields.push(Field::new("$set", id.data_type().clone(), false));
        for (at, field) in fields.iter_mut().enumerate().skip(width) {
            *field = field.clone().with_name(format!("$set{at}"));
        }
        let schema = Arc::new(Schema::new(fields));
        let mut streams = Vec::with_capacity(sets.len());
        for set in sets {
            let column = |i: usize| -> Arc<dyn PhysicalExpr> {
                Arc::new(Column::new(below.field(i).name(), i))
            };
            let mut exprs: Vec<_> = (0..width).map(column).collect();
            for (key, present) in keys.iter().zip(set) {
                exprs.push(match present {
                    true => column(*key),
                    false => null(below.field(*key).data_type())?,
                });
            }
            let number = set
                .iter()
                .fold(0u64, |id, present| id << 1 | u64::from(!present));
            let number = ScalarValue::UInt64(Some(number))
                .cast_to(id.data_type())
                .map_err(|e| planning(e).0)?;
            exprs.push(Arc::new(Literal::new(number)));
            let events = input.events.clone();
            let one = Stream {
                node: input.node,
                events,
            };
            streams.push(self.project_apart(one, exprs, Arc::clone(&schema)));
        }
        let stream = self.union(streams, schema)?;
        Ok((stream, (width..width + keys.len() + 1).collect()))
    }

    /// Calls of which some look at distinct values: one aggregation for each of those columns and one
    /// for the others. Their rows are put together by a last one, in which each value stands once.
    fn group_mixed(
        &mut self,
        input: Stream,
        keys: Vec<usize>,
        calls: Vec<AggregateCall>,
        distinct: &[bool],
        schema: SchemaRef,
    ) -> Result<Stream> {
        let width = keys.len();
        // Calls that are computed together, by what they look at.
        let mut parts: Vec<(Option<(Option<usize>, Option<usize>)>, Vec<usize>)> = Vec::new();
        for (at, call) in calls.iter().enumerate() {
            let of = distinct[at].then_some((call.input, call.filter));
            match parts.iter_mut().find(|(have, _)| *have == of) {
                Some((_, part)) => part.push(at),
                None => parts.push((of, vec![at])),
            }
        }
        // Each part reads the input.
        self.sealed = self.nodes.len();
        let mut streams = Vec::with_capacity(parts.len());
        for (of, part) in parts {
            let mut some: Vec<AggregateCall> = part.iter().map(|at| calls[*at].clone()).collect();
            let fields = (0..width).chain(part.iter().map(|at| width + at));
            let fields: Vec<Field> = fields.map(|i| schema.field(i).clone()).collect();
            let part_schema = Arc::new(Schema::new(fields));
            let stream = Stream {
                node: input.node,
                events: input.events.clone(),
            };
            let grouped = match of {
                None => self.group(stream, keys.clone(), some, part_schema)?,
                Some((argument, filter)) => {
                    let mut inner = keys.clone();
                    inner.extend(argument);
                    inner.extend(filter);
                    let below = &self.nodes[stream.node].schema;
                    let fields: Vec<Field> =
                        inner.iter().map(|k| below.field(*k).clone()).collect();
                    let values = Arc::new(Schema::new(fields));
                    let values = self.group(stream, inner, Vec::new(), values)?;
                    for call in &mut some {
                        call.input = argument.map(|_| width);
                        call.filter = filter.map(|_| width + usize::from(argument.is_some()));
                    }
                    self.group(values, (0..width).collect(), some, part_schema)?
                }
            };
            // The columns of all calls, null where another part computes them.
            let below = Arc::clone(&self.nodes[grouped.node].schema);
            let mut exprs: Vec<Arc<dyn PhysicalExpr>> = Vec::new();
            for i in 0..width {
                exprs.push(Arc::new(Column::new(below.field(i).name(), i)));
            }
            for at in 0..calls.len() {
                exprs.push(match part.iter().position(|have| *have == at) {
                    Some(i) => Arc::new(Column::new(below.field(width + i).name(), width + i)),
                    None => null(schema.field(width + at).data_type())?,
                });
            }
            let fields = schema.fields().iter().enumerate();
            let fields: Vec<Field> = fields
                .map(|(i, f)| {
                    f.as_ref()
                        .clone()
                        .with_nullable(i >= width || f.is_nullable())
                })
                .collect();
            let wide = Arc::new(Schema::new(fields));
            streams.push(self.project_apart(grouped, exprs, wide));
        }
        let first = Arc::clone(&self.nodes[streams[0].node].schema);
        let all = self.union(streams, first)?;
        let last = (0..calls.len()).map(|at| AggregateCall {
            kind: AggregateKind::Max,
            input: Some(width + at),
            filter: None,
            output: schema.field(width + at).data_type().clone(),
        });
        let last = last.collect();
        self.group(all, (0..width).collect(), last, schema)
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
            let field = physical.return_field(&below).map_err(|e| planning(e).0)?;
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
}

/// Whether the calls look at the distinct values of one column, all of them.
fn distinct_argument(calls: &[Call]) -> bool {
    let Some(first) = calls.iter().find(|c| c.distinct) else {
        return false;
    };
    calls.iter().all(|c| {
        let idempotent = matches!(c.call.kind, AggregateKind::Min | AggregateKind::Max);
        (c.distinct || idempotent) && c.call.input == first.call.input && c.call.filter.is_none()
    })
}

/// The expressions of grouping sets, and for each set which of them it has.
type Sets = (Vec<Expr>, Vec<Vec<bool>>);

fn grouping_sets(set: &GroupingSet) -> Result<Sets> {
    let exprs: Vec<Expr> = match set {
        GroupingSet::Rollup(exprs) | GroupingSet::Cube(exprs) => exprs.clone(),
        GroupingSet::GroupingSets(_) => set.distinct_expr().into_iter().cloned().collect(),
    };
    let width = exprs.len();
    let count = match set {
        GroupingSet::Rollup(_) => width + 1,
        GroupingSet::Cube(_) => 1usize.checked_shl(width as u32).unwrap_or(usize::MAX),
        GroupingSet::GroupingSets(sets) => sets.len(),
    };
    if count > MOST_SETS {
        return Err(refuse::too_many_sets(MOST_SETS));
    }
    let sets = match set {
        GroupingSet::Rollup(_) => (0..=width)
            .map(|have| (0..width).map(|i| i < have).collect())
            .collect(),
        GroupingSet::Cube(_) => (0..count)
            .map(|bits| (0..width).map(|i| bits >> i & 1 == 1).collect())
            .collect(),
        GroupingSet::GroupingSets(sets) => sets
            .iter()
            .map(|set| exprs.iter().map(|e| set.contains(e)).collect())
            .collect(),
    };
    Ok((exprs, sets))
}

/// A null of this type.
fn null(data_type: &DataType) -> Result<Arc<dyn PhysicalExpr>> {
    let value = ScalarValue::try_from(data_type).map_err(|e| planning(e).0)?;
    Ok(Arc::new(Literal::new(value)))
}

/// Whether the aggregate has an operator that takes values back one by one.
fn has_operator(expr: &Expr) -> bool {
    let Expr::AggregateFunction(AggregateFunction { func, params }) = expr.clone().unalias() else {
        return false;
    };
    let total = func.inner().as_any().is::<Total>();
    let known = total || matches!(func.name(), "count" | "min" | "max");
    // count(a, b) counts rows in which neither is null.
    known && params.null_treatment.is_none() && params.args.len() <= 1
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
    })
}
