//! Event-time windows as relations: `TUMBLE(rel, time, size)`, `HOP(rel, time, slide, size)`,
//! `SESSION(rel, time, gap, key, …)` and `CUMULATE(rel, time, step, size)`.
//!
//! A `RelationPlanner` sees the table factor before DataFusion would take it for a table function,
//! plans the first argument as a relation (so that CTEs and subqueries resolve), and yields an
//! extension node. Views lower it to an operator; one-shot queries execute it here, in code that
//! shares nothing with the operator, so that each checks the other.
//!
//! # Contract
//!
//! * Output: the input's columns, then `window_start` and `window_end`.
//! * Windows are `[k * slide, k * slide + size)` for every integer `k`, in microseconds since the
//!   epoch; a row stands once in each window it belongs to, a row without a time in none.

mod exec;
mod session;

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field};
use datafusion::common::{Column, DFSchema, DFSchemaRef, Result as DfResult, ScalarValue};
use datafusion::logical_expr::planner::{
    PlannedRelation, RelationPlanner, RelationPlannerContext, RelationPlanning,
};
use datafusion::logical_expr::{
    Expr, Extension, LogicalPlan, UserDefinedLogicalNode, UserDefinedLogicalNodeCore,
};
use datafusion::sql::sqlparser::ast::{
    Expr as SqlExpr, FunctionArg, FunctionArgExpr, Ident, ObjectName, TableFactor,
};
use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::plan::TimeWindow;

use crate::error::{SYNTAX, TYPE_MISMATCH, carry};
use crate::types::{sql_name, timestamp};

pub(crate) use exec::WindowPlanner;
pub(crate) use session::{AssignNode, AssignPlanner, Assigned};

/// Windows that hold one row, at the most: each keeps its own state.
const MOST_WINDOWS: i64 = 10_000;

/// The logical node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct WindowNode {
    pub(crate) input: LogicalPlan,
    /// A column of the input.
    pub(crate) time: Expr,
    pub(crate) size_us: i64,
    pub(crate) slide_us: i64,
    pub(crate) schema: DFSchemaRef,
}

/// The columns of a relation with those of a window behind them.
fn windowed(input: &LogicalPlan) -> DfResult<DFSchemaRef> {
    let mut fields: Vec<_> = input
        .schema()
        .iter()
        .map(|(q, f)| (q.cloned(), Arc::clone(f)))
        .collect();
    let first = fields.first().and_then(|(q, _)| q.clone());
    let qualifier = first.filter(|q| fields.iter().all(|(other, _)| other.as_ref() == Some(q)));
    for name in ["window_start", "window_end"] {
        fields.push((
            qualifier.clone(),
            Arc::new(Field::new(name, timestamp(), false)),
        ));
    }
    let schema = Arc::new(DFSchema::new_with_metadata(fields, Default::default())?);
    Ok(schema)
}

impl PartialOrd for WindowNode {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        self.input.partial_cmp(&other.input)
    }
}

impl WindowNode {
    fn try_new(input: LogicalPlan, time: Expr, window: TimeWindow) -> DfResult<Self> {
        let schema = windowed(&input)?;
        Ok(Self {
            input,
            time,
            size_us: window.size_us,
            slide_us: window.slide_us,
            schema,
        })
    }
    pub(crate) fn window(&self) -> TimeWindow {
        TimeWindow {
            size_us: self.size_us,
            slide_us: self.slide_us,
        }
    }
    /// Index of the time column in the input.
    pub(crate) fn time_index(&self) -> DfResult<usize> {
        match &self.time {
            Expr::Column(c) => self.input.schema().index_of_column(c),
            other => datafusion::common::plan_err!("{other} is not a column"),
        }
    }
}

impl UserDefinedLogicalNodeCore for WindowNode {
    fn name(&self) -> &str {
        "TimeWindow"
    }
    fn inputs(&self) -> Vec<&LogicalPlan> {
        vec![&self.input]
    }
    fn schema(&self) -> &DFSchemaRef {
        &self.schema
    }
    fn expressions(&self) -> Vec<Expr> {
        vec![self.time.clone()]
    }
    fn fmt_for_explain(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.size_us == self.slide_us {
            write!(f, "Tumble: time={}, size={}us", self.time, self.size_us)
        } else {
            write!(
                f,
                "Hop: time={}, slide={}us, size={}us",
                self.time, self.slide_us, self.size_us
            )
        }
    }
    fn with_exprs_and_inputs(
        &self,
        mut exprs: Vec<Expr>,
        mut inputs: Vec<LogicalPlan>,
    ) -> DfResult<Self> {
        Self::try_new(inputs.swap_remove(0), exprs.swap_remove(0), self.window())
    }
    fn necessary_children_exprs(&self, output: &[usize]) -> Option<Vec<Vec<usize>>> {
        let width = self.input.schema().fields().len();
        let mut needed: Vec<usize> = output.iter().copied().filter(|i| *i < width).collect();
        needed.push(self.time_index().ok()?);
        needed.sort_unstable();
        needed.dedup();
        Some(vec![needed])
    }
}

/// Plans `TUMBLE` and `HOP` in FROM clauses.
#[derive(Debug)]
pub(crate) struct Windows;

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Tumble,
    Hop,
    Session,
    Cumulate,
}

impl RelationPlanner for Windows {
    fn plan_relation(
        &self,
        relation: TableFactor,
        context: &mut dyn RelationPlannerContext,
    ) -> DfResult<RelationPlanning> {
        let TableFactor::Table {
            name,
            alias,
            args: Some(args),
            ..
        } = &relation
        else {
            return Ok(RelationPlanning::Original(Box::new(relation)));
        };
        let kind = match name.to_string().to_lowercase().as_str() {
            "tumble" => Kind::Tumble,
            "hop" => Kind::Hop,
            "session" => Kind::Session,
            "cumulate" => Kind::Cumulate,
            _ => return Ok(RelationPlanning::Original(Box::new(relation))),
        };
        let exprs: Vec<&SqlExpr> = args
            .args
            .iter()
            .filter_map(|a| match a {
                FunctionArg::Unnamed(FunctionArgExpr::Expr(e)) => Some(e),
                _ => None,
            })
            .collect();
        let mut keys: &[&SqlExpr] = &[];
        let (rel, time, slide, size) = match (kind, &exprs[..]) {
            (Kind::Session, [rel, time, gap, by @ ..]) => {
                keys = by;
                (*rel, *time, *gap, *gap)
            }
            (Kind::Cumulate, [rel, time, step, size]) => (*rel, *time, *step, *size),
            (Kind::Session, _) => {
                return Err(carry(usage(
                    "SESSION takes a relation, a time column, a gap, and columns by which it groups",
                )));
            }
            (Kind::Cumulate, _) => {
                return Err(carry(usage(
                    "CUMULATE takes a relation, a time column, a step and a size",
                )));
            }
            (Kind::Tumble, [rel, time, size]) => (*rel, *time, *size, *size),
            (Kind::Hop, [rel, time, slide, size]) => (*rel, *time, *slide, *size),
            (Kind::Tumble, _) => {
                return Err(carry(usage(
                    "TUMBLE takes a relation, a time column and a size",
                )));
            }
            (Kind::Hop, _) => {
                return Err(carry(usage(
                    "HOP takes a relation, a time column, a slide and a size",
                )));
            }
        };
        let input = context.plan(factor(rel).map_err(carry)?)?;
        let schema = Arc::clone(input.schema());
        let time = context.sql_to_expr(time.clone(), &schema)?;
        check_time(&time, &schema).map_err(carry)?;
        let mut length = |sql: &SqlExpr, what| {
            let expr = context.sql_to_expr(sql.clone(), &schema)?;
            microseconds(&expr, what).map_err(carry)
        };
        let window = TimeWindow {
            size_us: length(size, "size")?,
            slide_us: length(slide, "slide")?,
        };
        if window.size_us / window.slide_us > MOST_WINDOWS {
            return Err(carry(
                Error::invalid(format!(
                    "a row would stand in {} windows; at most {MOST_WINDOWS} are allowed",
                    window.size_us / window.slide_us
                ))
                .code("54000")
                .hint("choose a longer slide or a shorter size"),
            ));
        }
        let whole = window.size_us % window.slide_us == 0;
        if kind == Kind::Cumulate && !whole {
            return Err(carry(
                Error::invalid("the size of CUMULATE is not a multiple of its step")
                    .hint("as in CUMULATE(bids, at, INTERVAL '10' MINUTE, INTERVAL '1' HOUR)"),
            ));
        }
        if window.slide_us > window.size_us {
            return Err(carry(
                Error::invalid("the slide of a window is longer than its size")
                    .hint("the order is HOP(relation, time, slide, size); rows between two windows would be lost"),
            ));
        }
        let assigned = match kind {
            Kind::Tumble | Kind::Hop => None,
            Kind::Session => Some(Assigned::Session {
                gap_us: window.size_us,
            }),
            Kind::Cumulate => Some(Assigned::Cumulate {
                step_us: window.slide_us,
                size_us: window.size_us,
            }),
        };
        let node: Arc<dyn UserDefinedLogicalNode> = match assigned {
            None => Arc::new(WindowNode::try_new(input, time, window)?),
            Some(assigned) => {
                let keys = keys.iter().map(|key| {
                    let key = context.sql_to_expr((*key).clone(), &schema)?;
                    match key {
                        Expr::Column(_) => Ok(key),
                        _ => Err(carry(usage("SESSION groups by columns of its relation"))),
                    }
                });
                let keys = keys.collect::<DfResult<Vec<_>>>()?;
                Arc::new(AssignNode::try_new(input, time, keys, assigned)?)
            }
        };
        let plan = LogicalPlan::Extension(Extension { node });
        Ok(RelationPlanning::Planned(Box::new(PlannedRelation::new(
            plan,
            alias.clone(),
        ))))
    }
}

fn usage(message: &str) -> Error {
    Error::invalid(message).code(SYNTAX).hint(
        "as in TUMBLE(bids, at, INTERVAL '10' SECOND), HOP(bids, at, INTERVAL '2' SECOND, INTERVAL '10' SECOND) or SESSION(bids, at, INTERVAL '10' SECOND, bidder)",
    )
}

/// The relation that an argument names.
fn factor(rel: &SqlExpr) -> Result<TableFactor> {
    let name: Vec<Ident> = match rel {
        SqlExpr::Identifier(i) => vec![i.clone()],
        SqlExpr::CompoundIdentifier(parts) => parts.clone(),
        SqlExpr::Subquery(query) => {
            return Ok(TableFactor::Derived {
                lateral: false,
                subquery: query.clone(),
                alias: None,
                sample: None,
            });
        }
        SqlExpr::Nested(inner) => return factor(inner),
        other => {
            return Err(Error::invalid(format!(
                "the first argument of a window is a relation, not {other}"
            ))
            .code(SYNTAX)
            .hint("name a source or view, or write a subquery in parentheses"));
        }
    };
    Ok(TableFactor::Table {
        name: ObjectName::from(name),
        alias: None,
        args: None,
        with_hints: vec![],
        version: None,
        with_ordinality: false,
        partitions: vec![],
        json_path: None,
        sample: None,
        index_hints: vec![],
    })
}

fn check_time(time: &Expr, schema: &DFSchema) -> Result<()> {
    let Expr::Column(Column { name, .. }) = time else {
        return Err(
            Error::invalid("the second argument of a window is a column")
                .code(SYNTAX)
                .hint("compute the time in a subquery, or as a column of the source"),
        );
    };
    let index = match time {
        Expr::Column(c) => schema.maybe_index_of_column(c),
        _ => None,
    };
    let data_type = index.map(|i| schema.field(i).data_type().clone());
    match data_type {
        Some(t) if t == timestamp() => Ok(()),
        Some(other) => {
            let error = Error::invalid(format!(
                "column \"{name}\" is of type {}, a window needs a TIMESTAMP",
                sql_name(&other)
            ))
            .code(TYPE_MISMATCH);
            Err(match other {
                DataType::Timestamp(_, Some(_)) => {
                    error.hint("declare the column as TIMESTAMP in the source")
                }
                _ => error.hint(
                    "compute it in the source, as in at TIMESTAMP AS to_timestamp_millis(column)",
                ),
            })
        }
        None => Err(Error::invalid(format!("column \"{name}\" does not exist"))
            .code(crate::error::UNDEFINED_COLUMN)),
    }
}

/// Length of an interval constant.
pub(crate) fn microseconds(expr: &Expr, what: &str) -> Result<i64> {
    let literal = match expr {
        Expr::Literal(value, _) => value,
        Expr::Alias(alias) => return microseconds(&alias.expr, what),
        other => {
            return Err(Error::invalid(format!(
                "the {what} of a window is an interval constant, not {other}"
            ))
            .code(SYNTAX)
            .hint("write it as INTERVAL '10' SECOND"));
        }
    };
    let us = match literal {
        ScalarValue::IntervalMonthDayNano(Some(i)) => {
            if i.months != 0 {
                return Err(Error::unsupported(format!(
                    "the {what} of a window cannot have months or years: their length varies"
                ))
                .hint("use days"));
            }
            let nanos = i128::from(i.days) * 86_400_000_000_000 + i128::from(i.nanoseconds);
            if nanos % 1_000 != 0 {
                return Err(Error::invalid(format!(
                    "the {what} of a window has whole microseconds"
                )));
            }
            i64::try_from(nanos / 1_000).ok()
        }
        ScalarValue::IntervalDayTime(Some(i)) => {
            Some(i64::from(i.days) * 86_400_000_000 + i64::from(i.milliseconds) * 1_000)
        }
        _ => {
            return Err(
                Error::invalid(format!("the {what} of a window is an interval"))
                    .code(TYPE_MISMATCH)
                    .hint("write it as INTERVAL '10' SECOND"),
            );
        }
    };
    match us {
        Some(us) if us > 0 => Ok(us),
        _ => Err(Error::invalid(format!(
            "the {what} of a window must be positive"
        ))),
    }
}
