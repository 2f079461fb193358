//! A guarded view to operators: `dataflow::plan::Plan`.
//!
//! # Contract
//!
//! * Deterministic: the same statement over the same picture gives the same plan and fingerprint.
//! * Each logical node becomes nodes whose last one has the logical node's columns, in its order.
//! * Columns of event time are followed through the plan (`lower::event`): they tell when a group
//!   or a joined row is final.
//! * What cannot be kept up to date is refused with the reason and a way out (`lower::refuse`).

mod aggregate;
mod compute;
mod event;
mod first;
mod interval;
mod join;
mod refuse;
mod slot;
mod values;

use std::collections::HashSet;
use std::sync::Arc;

use arrow::datatypes::{Schema, SchemaRef};
use datafusion::common::DFSchema;
use datafusion::logical_expr::{Expr, Extension, LogicalPlan};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::expressions::Column;
use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::plan::{Emit, MapStep, Node, NodeId, Op, Plan};

use crate::bind::{Purpose, ViewRules, physical_expr, takes_retractions};
use crate::catalog::{CatalogSource, Scanned};
use crate::error::planning;
use crate::explain::fingerprint;
use crate::guard::Guarded;
use crate::optimize::optimize_view;
use crate::parse::Options;
use crate::sets::CountedSet;
use crate::stack::on_big_stack;
use crate::windows::{AssignNode, WindowNode};

use event::{Event, Events};
pub(crate) use refuse::refuse_unmaintainable;
pub(crate) use slot::SlotPlanner;

/// A view as operators.
#[derive(Debug, Clone)]
pub struct Lowered {
    pub plan: Plan,
    /// Per column of the view: a row is final once `watermark >= value + delay` (microseconds).
    pub event_time: Vec<Option<i64>>,
    /// What its creator should know.
    pub notices: Vec<String>,
}

/// Lowers a guarded view.
pub fn lower(guarded: &Guarded) -> Result<Lowered> {
    let Purpose::View(rules) = guarded.purpose() else {
        return Err(Error::internal("a one-shot query is executed, not lowered"));
    };
    on_big_stack(|| {
        let optimized = optimize_view(guarded.plan().clone()).map_err(|e| planning(e).0)?;
        let mut lowering = Lowering {
            nodes: Vec::new(),
            events: Events::default(),
            rules,
            notices: Vec::new(),
            aggregates: 0,
            sealed: 0,
            first: None,
        };
        let root = lowering.build(&optimized)?;
        let root = lowering.finish(root, &optimized)?;
        let append_only = lowering.nodes[root.node].append_only;
        if rules.append_only && !append_only {
            takes_retractions(&Options::new(), "the view")?;
        }
        if rules.emit == Emit::OnClose && lowering.aggregates == 0 {
            return Err(refuse::nothing_closes());
        }
        let mut plan = Plan {
            nodes: lowering.nodes,
            append_only,
            fingerprint: 0,
            on_error: rules.on_error,
        }
        .share_equal_nodes();
        plan.fingerprint = fingerprint(&plan);
        let mut seen = HashSet::new();
        lowering
            .notices
            .retain(|notice| seen.insert(notice.clone()));
        Ok(Lowered {
            plan,
            event_time: root.events.iter().map(|e| e.map(|e| e.delay_us)).collect(),
            notices: lowering.notices,
        })
    })
}

/// The node that computes a logical node, and what is known of its columns.
struct Stream {
    node: NodeId,
    events: Vec<Option<Event>>,
}

struct Lowering<'a> {
    nodes: Vec<Node>,
    events: Events,
    rules: &'a ViewRules,
    notices: Vec<String>,
    /// Aggregates that close.
    aggregates: usize,
    /// Nodes before this one may be read by several others: no step is added to them.
    sealed: NodeId,
    /// Of the partitions of the window functions that come next, only so many rows are wanted.
    first: Option<usize>,
}

impl Lowering<'_> {
    fn push(&mut self, op: Op, schema: SchemaRef, append_only: bool) -> NodeId {
        self.nodes.push(Node {
            op,
            schema,
            append_only,
        });
        self.nodes.len() - 1
    }

    fn build(&mut self, plan: &LogicalPlan) -> Result<Stream> {
        match plan {
            LogicalPlan::TableScan(scan) => self.scan(scan),
            LogicalPlan::SubqueryAlias(alias) => self.build(&alias.input),
            LogicalPlan::Filter(filter) => {
                self.first = first::rows(filter);
                let input = self.build(&filter.input)?;
                let predicate = physical_expr(&filter.predicate, filter.input.schema())?;
                let schema = Arc::clone(&self.nodes[input.node].schema);
                let node = self.map(input.node, MapStep::Filter(predicate), schema);
                Ok(Stream { node, ..input })
            }
            LogicalPlan::Projection(projection) => {
                let input = self.build(&projection.input)?;
                let schema = arrow_schema(&projection.schema);
                self.project(input, &projection.expr, projection.input.schema(), schema)
            }
            LogicalPlan::Aggregate(aggregate) => self.aggregate(aggregate),
            LogicalPlan::Distinct(distinct) => self.distinct(distinct.input()),
            LogicalPlan::Join(join) => self.join(join),
            LogicalPlan::Window(window) => {
                let first = self.first.take();
                self.over(window, first)
            }
            LogicalPlan::Limit(limit) => self.limit(limit),
            LogicalPlan::Sort(sort) => match sort.fetch {
                Some(fetch) => self.top(&sort.input, &sort.expr, 0, Some(fetch)),
                None => {
                    self.notices
                        .push("a view has no order: ORDER BY without LIMIT has no effect".into());
                    self.build(&sort.input)
                }
            },
            LogicalPlan::Unnest(_) => self.unnest(plan),
            LogicalPlan::RecursiveQuery(_) => self.whole(plan, "WITH RECURSIVE"),
            LogicalPlan::Union(union) => {
                let mut streams = Vec::with_capacity(union.inputs.len());
                for input in &union.inputs {
                    streams.push(self.build(input)?);
                }
                self.union(streams, arrow_schema(&union.schema))
            }
            LogicalPlan::Extension(Extension { node }) => {
                if let Some(set) = node.as_any().downcast_ref::<CountedSet>() {
                    return self.counted_set(set);
                }
                if let Some(window) = node.as_any().downcast_ref::<WindowNode>() {
                    return self.window(window);
                }
                match node.as_any().downcast_ref::<AssignNode>() {
                    Some(assign) => self.assign(assign),
                    None => Err(refuse::cannot(plan)),
                }
            }
            LogicalPlan::EmptyRelation(empty) => self.empty(empty),
            LogicalPlan::Values(values) => self.values(values),
            other => Err(refuse::cannot(other)),
        }
    }

    fn scan(&mut self, scan: &datafusion::logical_expr::TableScan) -> Result<Stream> {
        let Some(source) = CatalogSource::of(&scan.source) else {
            return Err(Error::internal(
                "a view scans something that is not in the catalog",
            ));
        };
        let relation = match &source.scanned {
            Scanned::Engine(relation) => relation,
            Scanned::Lake(name, _) => {
                return Err(Error::unsupported(format!(
                    "a view over the table \"{name}\" is not supported yet"
                ))
                .hint("query the table together with views, or read its files as a source"));
            }
            Scanned::System(name, _) => {
                return Err(Error::unsupported(format!(
                    "\"{name}\" has no changes that a view could follow"
                ))
                .hint("query it"));
            }
        };
        if !scan.filters.is_empty() || scan.fetch.is_some() {
            return Err(Error::internal("a scan of the catalog carries a filter"));
        }
        let columns = match &scan.projection {
            Some(columns) => columns.clone(),
            None => (0..relation.schema.fields().len()).collect(),
        };
        let schema = Arc::new(
            relation
                .schema
                .project(&columns)
                .map_err(|e| Error::internal(e.to_string()))?,
        );
        let mut events = Vec::with_capacity(columns.len());
        for column in &columns {
            let delay = relation.event_time.get(*column).copied().flatten();
            events.push(delay.map(|delay_us| self.events.fresh(delay_us)));
        }
        let node = self.push(
            Op::Input {
                relation: relation.id,
                columns,
            },
            schema,
            relation.append_only,
        );
        Ok(Stream { node, events })
    }

    /// A stateless step, fused into the map below it.
    fn map(&mut self, input: NodeId, step: MapStep, schema: SchemaRef) -> NodeId {
        let last = self.nodes.len() - 1;
        if input == last
            && input >= self.sealed
            && let Op::Map { steps, .. } = &mut self.nodes[last].op
        {
            steps.push(step);
            self.nodes[last].schema = schema;
            return last;
        }
        let append_only = self.nodes[input].append_only;
        self.push(
            Op::Map {
                input,
                steps: vec![step],
            },
            schema,
            append_only,
        )
    }

    fn project(
        &mut self,
        input: Stream,
        exprs: &[Expr],
        scope: &DFSchema,
        schema: SchemaRef,
    ) -> Result<Stream> {
        let physical = exprs
            .iter()
            .map(|e| physical_expr(e, scope))
            .collect::<Result<Vec<_>>>()?;
        Ok(self.project_physical(input, physical, schema))
    }

    fn project_physical(
        &mut self,
        input: Stream,
        exprs: Vec<Arc<dyn PhysicalExpr>>,
        schema: SchemaRef,
    ) -> Stream {
        let events = exprs
            .iter()
            .map(|e| column_of(e).and_then(|i| input.events[i]))
            .collect();
        let below = &self.nodes[input.node].schema;
        let identity = exprs.len() == below.fields().len()
            && exprs
                .iter()
                .enumerate()
                .all(|(i, e)| column_of(e) == Some(i))
            && schema.fields() == below.fields();
        let node = match identity {
            true => input.node,
            false => self.map(
                input.node,
                MapStep::Project(exprs, Arc::clone(&schema)),
                schema,
            ),
        };
        Stream { node, events }
    }

    /// As [`Self::project_physical`], and never fused into a node that others read too.
    fn project_apart(
        &mut self,
        input: Stream,
        exprs: Vec<Arc<dyn PhysicalExpr>>,
        schema: SchemaRef,
    ) -> Stream {
        let events = exprs
            .iter()
            .map(|e| column_of(e).and_then(|i| input.events[i]))
            .collect();
        let append_only = self.nodes[input.node].append_only;
        let node = self.push(
            Op::Map {
                input: input.node,
                steps: vec![MapStep::Project(exprs, Arc::clone(&schema))],
            },
            schema,
            append_only,
        );
        Stream { node, events }
    }

    fn union(&mut self, mut streams: Vec<Stream>, schema: SchemaRef) -> Result<Stream> {
        if streams.len() == 1 {
            return Ok(streams.swap_remove(0));
        }
        for stream in &streams {
            let fields = self.nodes[stream.node].schema.fields();
            let same = fields.len() == schema.fields().len()
                && fields
                    .iter()
                    .zip(schema.fields())
                    .all(|(a, b)| a.data_type() == b.data_type());
            if !same {
                return Err(
                    Error::invalid("the parts of a UNION have different column types")
                        .code(crate::error::TYPE_MISMATCH)
                        .hint("CAST the columns to one type"),
                );
            }
        }
        let columns: Vec<Vec<Option<Event>>> = streams.iter().map(|s| s.events.clone()).collect();
        let events = self.events.union(&columns);
        let append_only = streams.iter().all(|s| self.nodes[s.node].append_only);
        let inputs = streams.into_iter().map(|s| s.node).collect();
        let node = self.push(Op::Union { inputs }, schema, append_only);
        Ok(Stream { node, events })
    }

    fn window(&mut self, window: &WindowNode) -> Result<Stream> {
        let input = self.build(&window.input)?;
        let time = window.time_index().map_err(|e| planning(e).0)?;
        let event = timed(&input, time, &window.input)?;
        let append_only = self.nodes[input.node].append_only;
        let node = self.push(
            Op::Window {
                input: input.node,
                time,
                window: window.window(),
            },
            arrow_schema(&window.schema),
            append_only,
        );
        let mut events = input.events;
        events.extend(self.events.window(event, window.size_us));
        Ok(Stream { node, events })
    }

    /// Gives the result the names of the view's columns.
    fn finish(&mut self, root: Stream, plan: &LogicalPlan) -> Result<Stream> {
        let wanted = arrow_schema(plan.schema());
        let node = &self.nodes[root.node];
        let last = root.node + 1 == self.nodes.len();
        let named = node
            .schema
            .fields()
            .iter()
            .zip(wanted.fields())
            .all(|(a, b)| a.name() == b.name());
        // The relation's own node comes last, and is not a bare input: a view is a relation.
        if last && named && !matches!(node.op, Op::Input { .. }) {
            return Ok(root);
        }
        let exprs = node
            .schema
            .fields()
            .iter()
            .enumerate()
            .map(|(i, f)| Arc::new(Column::new(f.name(), i)) as Arc<dyn PhysicalExpr>)
            .collect();
        let events = root.events;
        let node = self.map(
            root.node,
            MapStep::Project(exprs, Arc::clone(&wanted)),
            wanted,
        );
        Ok(Stream { node, events })
    }
}

/// The event time of a window's column.
fn timed(input: &Stream, time: usize, below: &LogicalPlan) -> Result<Event> {
    input.events[time].ok_or_else(|| {
        Error::invalid(format!(
            "column \"{}\" has no watermark, so its windows would never close",
            below.schema().field(time).name()
        ))
        .code("42P10")
        .hint("use the column that the source declares in WATERMARK FOR, unchanged")
    })
}

/// The column that the expression is.
fn column_of(expr: &Arc<dyn PhysicalExpr>) -> Option<usize> {
    expr.as_any().downcast_ref::<Column>().map(Column::index)
}

/// Columns without metadata.
fn arrow_schema(schema: &DFSchema) -> SchemaRef {
    let fields: Vec<_> = schema
        .fields()
        .iter()
        .map(|f| f.as_ref().clone().with_metadata(Default::default()))
        .collect();
    Arc::new(Schema::new(fields))
}

#[cfg(test)]
mod tests;
