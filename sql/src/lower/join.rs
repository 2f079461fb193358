//! Joins: keys as columns, the rest of the condition over both sides.
//!
//! ```text
//! LEFT, RIGHT, FULL  inner join ∪ rows of the kept sides that match nothing, padded with nulls
//! EXISTS, IN         semi-join; its negation, anti-join
//! … under OR         semi-join with true ∪ anti-join with false
//! ```
//!
//! # Contract
//!
//! * Each side is lowered once, whatever number of nodes reads it.
//! * A condition beyond equalities is evaluated on pairs with equal keys only. Where it decides about
//!   rows of one side, the inner join gives the rows that match, and a semi-join over all columns
//!   chooses by them.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion::common::{DFSchema, JoinType, NullEquality, ScalarValue};
use datafusion::logical_expr::utils::{conjunction, split_conjunction_owned};
use datafusion::logical_expr::{Expr, Join, LogicalPlan, UserDefinedLogicalNodeCore};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::expressions::{Column, Literal};
use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::plan::{CloseRule, MapStep, NodeId, Op};

use super::event::{Event, later, only};
use super::interval::Bounds;
use super::{Lowering, Stream, arrow_schema, column_of};
use crate::bind::physical_expr;
use crate::checked::fallible;
use crate::error::planning;
use crate::sets::CountedSet;

/// One side of a join.
#[derive(Clone)]
struct Side {
    node: NodeId,
    events: Vec<Option<Event>>,
    /// Columns that the join is over. Computed keys follow them.
    visible: usize,
    keys: Vec<usize>,
}

/// Which rows of a side are wanted beside the joined ones.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// Those with a match.
    Matched,
    /// Those without one.
    Alone,
}

/// Both sides of a join, and how their rows meet.
struct Meeting {
    left: Side,
    right: Side,
    null_equal: bool,
    /// Over the columns of the left side, then those of the right.
    filter: Option<Arc<dyn PhysicalExpr>>,
    bounds: Bounds,
    /// Of the inner join, once it is there.
    joined: Option<(NodeId, Vec<Option<Event>>)>,
}

impl Lowering<'_> {
    pub(super) fn join(&mut self, join: &Join) -> Result<Stream> {
        if join.null_aware {
            return Err(Error::internal("NOT IN was not rewritten"));
        }
        let schema = arrow_schema(&join.schema);
        let mut terms = Terms::of(join)?;
        let (left_keys, right_keys): (Vec<&Expr>, Vec<&Expr>) =
            join.on.iter().map(|(l, r)| (l, r)).unzip();
        let left = self.build(&join.left)?;
        let left = self.filtered(left, std::mem::take(&mut terms.left), join.left.schema())?;
        let (left, left_keys) = self.keyed(left, &left_keys, join.left.schema())?;
        let right = self.build(&join.right)?;
        let right = self.filtered(right, std::mem::take(&mut terms.right), join.right.schema())?;
        let (right, right_keys) = self.keyed(right, &right_keys, join.right.schema())?;
        // Both are read more than once from here on.
        self.sealed = self.nodes.len();
        let side = |stream: Stream, keys, schema: &DFSchema| Side {
            node: stream.node,
            events: stream.events,
            visible: schema.fields().len(),
            keys,
        };
        let mut meeting = Meeting {
            left: side(left, left_keys, join.left.schema()),
            right: side(right, right_keys, join.right.schema()),
            null_equal: join.null_equality == NullEquality::NullEqualsNull,
            filter: None,
            bounds: Bounds::of(&terms.both, join.left.schema(), join.right.schema()),
            joined: None,
        };
        self.comparable(&meeting)?;
        if let Some(filter) = conjunction(terms.both) {
            let mut scope = join.left.schema().as_ref().clone();
            scope = scope.join(join.right.schema()).map_err(|e| planning(e).0)?;
            let filter = physical_expr(&filter, &scope)?;
            let by = meeting.left.width(self) - meeting.left.visible;
            meeting.filter = Some(shift(filter, meeting.left.visible, by)?);
        }
        let kind = match join.join_type {
            JoinType::Left if is_product(join) && has_one_row(&join.right) => JoinType::Inner,
            kind => kind,
        };
        let without = match kind {
            JoinType::Right | JoinType::RightAnti | JoinType::RightMark => {
                self.divide(&mut meeting.right, terms.deciding, join.right.schema())?
            }
            _ => self.divide(&mut meeting.left, terms.deciding, join.left.schema())?,
        };
        let meeting = &mut meeting;
        match kind {
            JoinType::Inner => self.joined(meeting),
            JoinType::Left | JoinType::Right | JoinType::Full => {
                let mut parts = vec![self.joined(meeting)?];
                let mut alone: Vec<Stream> = without.into_iter().collect();
                let left_first = kind != JoinType::Right;
                if left_first {
                    alone.push(self.chosen(meeting, Wanted::Alone)?);
                }
                let padded =
                    |lowering: &mut Self, part, behind| lowering.padded(part, &schema, behind);
                for part in alone {
                    parts.push(padded(self, part, !left_first)?);
                }
                if kind != JoinType::Left {
                    meeting.swap(self)?;
                    let part = self.chosen(meeting, Wanted::Alone)?;
                    parts.push(padded(self, part, true)?);
                }
                self.union(parts, schema)
            }
            JoinType::LeftSemi => self.chosen(meeting, Wanted::Matched),
            JoinType::LeftAnti | JoinType::LeftMark => self.kept(meeting, without, kind, schema),
            JoinType::RightSemi => {
                meeting.swap(self)?;
                self.chosen(meeting, Wanted::Matched)
            }
            JoinType::RightAnti | JoinType::RightMark => {
                meeting.swap(self)?;
                self.kept(meeting, without, kind, schema)
            }
        }
    }

    /// Sets apart the rows of a side that match nothing whatever the other side has; the side is the
    /// others from now on.
    fn divide(
        &mut self,
        side: &mut Side,
        deciding: Vec<Expr>,
        scope: &DFSchema,
    ) -> Result<Option<Stream>> {
        let Some(all) = conjunction(deciding) else {
            return Ok(None);
        };
        let whole = || Stream {
            node: side.node,
            events: side.events.clone(),
        };
        let visible: Vec<usize> = (0..side.visible).collect();
        let without = Expr::IsNotTrue(Box::new(all.clone()));
        let without = self.filtered(whole(), vec![without], scope)?;
        let without = self.cut(without, &visible)?;
        side.node = self.filtered(whole(), vec![all], scope)?.node;
        self.sealed = self.nodes.len();
        Ok(Some(without))
    }

    /// INTERSECT ALL or EXCEPT ALL.
    pub(super) fn counted_set(&mut self, set: &CountedSet) -> Result<Stream> {
        let left = self.build(&set.left)?;
        let right = self.build(&set.right)?;
        let pairs: Vec<(usize, usize)> = (0..left.events.len()).map(|i| (i, i)).collect();
        let (close, _, mut events) = close(&pairs, &left.events, &right.events);
        events.truncate(left.events.len());
        if close.is_none() {
            self.notices.push(
                "both sides of the set operation are kept for ever; have window_end among their columns to bound the state"
                    .into(),
            );
        }
        let op = Op::CountedSet {
            left: left.node,
            right: right.node,
            except: set.except,
            close,
        };
        let rows_only_come =
            !set.except && self.nodes[left.node].append_only && self.nodes[right.node].append_only;
        let node = self.push(op, arrow_schema(set.schema()), rows_only_come);
        Ok(Stream { node, events })
    }

    fn comparable(&self, meeting: &Meeting) -> Result<()> {
        let (left, right) = (&meeting.left, &meeting.right);
        for (l, r) in left.keys.iter().zip(&right.keys) {
            let left = self.nodes[left.node].schema.field(*l).data_type();
            if left != self.nodes[right.node].schema.field(*r).data_type() {
                return Err(
                    Error::invalid("the sides of a join condition have different types")
                        .code(crate::error::TYPE_MISMATCH)
                        .hint("CAST one of them"),
                );
            }
        }
        Ok(())
    }

    fn filtered(&mut self, input: Stream, terms: Vec<Expr>, scope: &DFSchema) -> Result<Stream> {
        let Some(predicate) = conjunction(terms) else {
            return Ok(input);
        };
        let predicate = physical_expr(&predicate, scope)?;
        let schema = Arc::clone(&self.nodes[input.node].schema);
        let node = self.map(input.node, MapStep::Filter(predicate), schema);
        Ok(Stream { node, ..input })
    }

    /// The inner join with all columns of both sides.
    fn inner(&mut self, meeting: &mut Meeting) -> (NodeId, Vec<Option<Event>>) {
        if let Some(joined) = &meeting.joined {
            return joined.clone();
        }
        let (left, right) = (&meeting.left, &meeting.right);
        let on: Vec<(usize, usize)> = left
            .keys
            .iter()
            .copied()
            .zip(right.keys.iter().copied())
            .collect();
        let (mut left_close, mut right_close, mut events) = close(&on, &left.events, &right.events);
        if left_close.is_none() {
            let own = meeting.bounds.left_close(&left.events, &right.events);
            let other = meeting.bounds.right_close(&left.events, &right.events);
            left_close = own.as_ref().map(|closed| closed.rule);
            right_close = other.as_ref().map(|closed| closed.rule);
            let sides = [(own, &left.events), (other, &right.events)];
            let timed = sides.into_iter().flat_map(|(closed, events)| match closed {
                Some(closed) => only(events, closed.event, closed.later_us),
                None => vec![None; events.len()],
            });
            events = timed.collect();
        }
        let fields: Vec<_> = [left, right]
            .iter()
            .flat_map(|side| self.nodes[side.node].schema.fields().iter().cloned())
            .collect();
        let append_only = self.nodes[left.node].append_only && self.nodes[right.node].append_only;
        self.notice(on.is_empty(), left_close.is_none() || right_close.is_none());
        let node = self.push(
            Op::Join {
                left: left.node,
                right: right.node,
                on,
                null_equal: meeting.null_equal,
                filter: meeting.filter.clone(),
                left_close,
                right_close,
            },
            Arc::new(Schema::new(fields)),
            append_only,
        );
        self.sealed = self.nodes.len();
        meeting.joined = Some((node, events.clone()));
        (node, events)
    }

    fn notice(&mut self, no_keys: bool, no_close: bool) {
        if no_keys {
            self.notices.push(
                "a join without an equality is computed by one worker; add one such as a.id = b.id to spread it"
                    .into(),
            );
        }
        if no_close {
            self.notices.push(
                "both sides of the join are kept for ever; join on window_end too to bound the state".into(),
            );
        }
    }

    /// The inner join.
    fn joined(&mut self, meeting: &mut Meeting) -> Result<Stream> {
        let (node, events) = self.inner(meeting);
        let left_width = meeting.left.width(self);
        let kept: Vec<usize> = (0..meeting.left.visible)
            .chain(left_width..left_width + meeting.right.visible)
            .collect();
        self.cut(Stream { node, events }, &kept)
    }

    /// Some columns of a stream.
    fn cut(&mut self, stream: Stream, kept: &[usize]) -> Result<Stream> {
        let schema = Arc::clone(&self.nodes[stream.node].schema);
        let all = kept.len() == schema.fields().len();
        if all && kept.iter().enumerate().all(|(at, column)| at == *column) {
            return Ok(stream);
        }
        let exprs = kept.iter().map(|i| column(&schema, *i)).collect();
        let schema = schema
            .project(kept)
            .map_err(|e| Error::internal(e.to_string()))?;
        Ok(self.project_physical(stream, exprs, Arc::new(schema)))
    }

    /// Rows of the left side with a match, or without one, by the whole condition.
    fn chosen(&mut self, meeting: &mut Meeting, wanted: Wanted) -> Result<Stream> {
        let (right, on, null_equal) = match meeting.filter {
            None => {
                let right = Stream {
                    node: meeting.right.node,
                    events: meeting.right.events.clone(),
                };
                let right = self.cut(right, &meeting.right.keys)?;
                (right, meeting.left.keys.clone(), meeting.null_equal)
            }
            // The joined rows tell which rows of the left side match.
            Some(_) => {
                let all: Vec<usize> = (0..meeting.left.width(self)).collect();
                let (node, events) = self.inner(meeting);
                (self.cut(Stream { node, events }, &all)?, all, true)
            }
        };
        self.sealed = self.nodes.len();
        let left = &meeting.left;
        let pairs: Vec<(usize, usize)> = on.iter().copied().zip(0..).collect();
        let (_, right_close, mut events) = close(&pairs, &left.events, &right.events);
        events.truncate(left.events.len());
        let (left_node, visible) = (left.node, left.visible);
        self.notice(on.is_empty(), right_close.is_none());
        let anti = wanted == Wanted::Alone;
        let append_only =
            !anti && self.nodes[left_node].append_only && self.nodes[right.node].append_only;
        let node = self.push(
            Op::SemiJoin {
                left: left_node,
                right: right.node,
                on,
                anti,
                null_equal,
                close: right_close,
            },
            Arc::clone(&self.nodes[left_node].schema),
            append_only,
        );
        self.sealed = self.nodes.len();
        let visible: Vec<usize> = (0..visible).collect();
        self.cut(Stream { node, events }, &visible)
    }

    /// An anti-join of the left side, or all rows of it and whether they have a match. `without` are
    /// rows that have none in any case.
    fn kept(
        &mut self,
        meeting: &mut Meeting,
        without: Option<Stream>,
        kind: JoinType,
        schema: SchemaRef,
    ) -> Result<Stream> {
        let mut parts: Vec<(Stream, bool)> =
            without.map(|part| (part, false)).into_iter().collect();
        parts.push((self.chosen(meeting, Wanted::Alone)?, false));
        if matches!(kind, JoinType::LeftAnti | JoinType::RightAnti) {
            return self.union(parts.into_iter().map(|(part, _)| part).collect(), schema);
        }
        parts.push((self.chosen(meeting, Wanted::Matched)?, true));
        let mut marked = Vec::with_capacity(parts.len());
        for (part, mark) in parts {
            let below = Arc::clone(&self.nodes[part.node].schema);
            let mut exprs: Vec<Arc<dyn PhysicalExpr>> = (0..meeting.left.visible)
                .map(|i| column(&below, i))
                .collect();
            exprs.push(Arc::new(Literal::new(ScalarValue::Boolean(Some(mark)))));
            marked.push(self.project_physical(part, exprs, Arc::clone(&schema)));
        }
        self.union(marked, schema)
    }

    /// Rows of one side with nulls for the other, which comes first if `behind`.
    fn padded(&mut self, part: Stream, schema: &SchemaRef, behind: bool) -> Result<Stream> {
        let below = Arc::clone(&self.nodes[part.node].schema);
        let (own, width) = (below.fields().len(), schema.fields().len());
        let start = if behind { width - own } else { 0 };
        let exprs = (0..width)
            .map(|i| match (start..start + own).contains(&i) {
                true => Ok(column(&below, i - start)),
                false => null(schema.field(i).data_type()),
            })
            .collect::<Result<_>>()?;
        Ok(self.project_physical(part, exprs, Arc::clone(schema)))
    }

    /// The stream with its join keys as columns, appended where they are expressions.
    fn keyed(
        &mut self,
        stream: Stream,
        keys: &[&Expr],
        scope: &DFSchema,
    ) -> Result<(Stream, Vec<usize>)> {
        let below = Arc::clone(&self.nodes[stream.node].schema);
        let mut fields: Vec<Arc<Field>> = below.fields().iter().cloned().collect();
        let mut exprs: Vec<Arc<dyn PhysicalExpr>> = fields
            .iter()
            .enumerate()
            .map(|(i, f)| Arc::new(Column::new(f.name(), i)) as Arc<dyn PhysicalExpr>)
            .collect();
        let mut at = Vec::with_capacity(keys.len());
        for key in keys {
            let physical = physical_expr(key, scope)?;
            if let Some(column) = column_of(&physical) {
                at.push(column);
                continue;
            }
            let field = physical.return_field(&below).map_err(|e| planning(e).0)?;
            fields.push(Arc::new(Field::new(
                format!("key{}", exprs.len()),
                field.data_type().clone(),
                field.is_nullable(),
            )));
            at.push(exprs.len());
            exprs.push(physical);
        }
        if exprs.len() == below.fields().len() {
            return Ok((stream, at));
        }
        let stream = self.project_physical(stream, exprs, Arc::new(Schema::new(fields)));
        Ok((stream, at))
    }
}

impl Side {
    /// Columns with the computed keys.
    fn width(&self, lowering: &Lowering<'_>) -> usize {
        lowering.nodes[self.node].schema.fields().len()
    }
}

impl Meeting {
    /// The same rows meet with the sides exchanged.
    fn swap(&mut self, lowering: &Lowering<'_>) -> Result<()> {
        let (left, right) = (self.left.width(lowering), self.right.width(lowering));
        if let Some(filter) = self.filter.take() {
            let place = |i: usize| if i < left { i + right } else { i - left };
            self.filter = Some(moved(filter, &place)?);
        }
        self.joined = None;
        self.bounds.swap();
        std::mem::swap(&mut self.left, &mut self.right);
        Ok(())
    }
}

/// A condition beyond equalities, by what it reads.
#[derive(Default)]
struct Terms {
    /// Rows of a side for which these are not true cannot match, and are not wanted either.
    left: Vec<Expr>,
    right: Vec<Expr>,
    /// Rows of the kept side for which these are not true have no match, and may be wanted.
    deciding: Vec<Expr>,
    both: Vec<Expr>,
}

impl Terms {
    fn of(join: &Join) -> Result<Self> {
        use JoinType::{
            Full, Inner, Left, LeftAnti, LeftMark, LeftSemi, Right, RightAnti, RightMark, RightSemi,
        };
        let mut terms = Self::default();
        let Some(filter) = join.filter.clone() else {
            return Ok(terms);
        };
        let mut scope = join.left.schema().as_ref().clone();
        scope.merge(join.right.schema());
        for term in split_conjunction_owned(filter) {
            if matches!(&term, Expr::Literal(ScalarValue::Boolean(Some(true)), _)) {
                continue;
            }
            let within = |schema: &DFSchema| {
                let mut columns = term.column_refs().into_iter();
                columns.all(|c| schema.maybe_index_of_column(c).is_some())
            };
            let (left, right) = (within(join.left.schema()), within(join.right.schema()));
            // A pair decides about errors too: what can fail is evaluated on pairs only.
            let free = !fallible(&term, &scope);
            let to = match (free, join.join_type) {
                (true, Inner | LeftSemi | RightSemi) if left => &mut terms.left,
                (true, Inner | LeftSemi | RightSemi) if right => &mut terms.right,
                (true, Left | LeftAnti | LeftMark) if right => &mut terms.right,
                (true, Left | LeftAnti | LeftMark) if left => &mut terms.deciding,
                (true, Right | RightAnti | RightMark) if left => &mut terms.left,
                (true, Right | RightAnti | RightMark) if right => &mut terms.deciding,
                (_, Full) | (true, _) | (false, _) => &mut terms.both,
            };
            to.push(term);
        }
        Ok(terms)
    }
}

/// Every row meets every row.
fn is_product(join: &Join) -> bool {
    let all = |e: &Expr| matches!(e, Expr::Literal(ScalarValue::Boolean(Some(true)), _));
    join.on.is_empty() && join.filter.as_ref().is_none_or(all)
}

/// There is one row at any time, as of an aggregate of all rows.
fn has_one_row(plan: &LogicalPlan) -> bool {
    match plan {
        LogicalPlan::Aggregate(aggregate) => aggregate.group_expr.is_empty(),
        LogicalPlan::Projection(projection) => has_one_row(&projection.input),
        LogicalPlan::SubqueryAlias(alias) => has_one_row(&alias.input),
        _ => false,
    }
}

fn column(schema: &Schema, index: usize) -> Arc<dyn PhysicalExpr> {
    Arc::new(Column::new(schema.field(index).name(), index))
}

/// A null of a type.
fn null(data_type: &DataType) -> Result<Arc<dyn PhysicalExpr>> {
    let value = ScalarValue::try_new_null(data_type).map_err(|e| planning(e).0)?;
    Ok(Arc::new(Literal::new(value)))
}

type Closing = (Option<CloseRule>, Option<CloseRule>, Vec<Option<Event>>);

/// When both keys of a pair are event time, rows of one value are final on both sides at one
/// instant: neither side needs them any longer, and the joined rows are final too.
fn close(on: &[(usize, usize)], left: &[Option<Event>], right: &[Option<Event>]) -> Closing {
    let timed = on
        .iter()
        .filter_map(|(l, r)| Some((*l, left[*l]?, *r, right[*r]?)))
        .min_by_key(|(_, l, _, r)| l.delay_us.max(r.delay_us));
    let Some((l, left_event, r, right_event)) = timed else {
        return (None, None, vec![None; left.len() + right.len()]);
    };
    let delay_us = left_event.delay_us.max(right_event.delay_us);
    let mut events = only(left, left_event, delay_us - left_event.delay_us);
    events.extend(
        only(right, right_event, delay_us - right_event.delay_us)
            .into_iter()
            .map(|e| e.map(|e| later(e, 0))),
    );
    (
        Some(CloseRule { key: l, delay_us }),
        Some(CloseRule { key: r, delay_us }),
        events,
    )
}

/// Makes room for columns appended to the left side.
fn shift(filter: Arc<dyn PhysicalExpr>, from: usize, by: usize) -> Result<Arc<dyn PhysicalExpr>> {
    moved(filter, &|i| if i >= from { i + by } else { i })
}

/// The expression with its columns elsewhere.
fn moved(
    expr: Arc<dyn PhysicalExpr>,
    place: &dyn Fn(usize) -> usize,
) -> Result<Arc<dyn PhysicalExpr>> {
    expr.transform_up(|e| {
        Ok(match e.as_any().downcast_ref::<Column>() {
            Some(c) if place(c.index()) != c.index() => {
                Transformed::yes(
                    Arc::new(Column::new(c.name(), place(c.index()))) as Arc<dyn PhysicalExpr>
                )
            }
            _ => Transformed::no(e),
        })
    })
    .data()
    .map_err(|e| planning(e).0)
}
