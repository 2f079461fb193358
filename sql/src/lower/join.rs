//! Inner equi-joins: keys as columns, the rest of the condition over both sides.

use std::sync::Arc;

use arrow::datatypes::{Field, Schema};
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion::common::{DFSchema, JoinType, NullEquality};
use datafusion::logical_expr::{Expr, Join};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::expressions::Column;
use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::plan::{CloseRule, Op};

use super::event::{Event, later, only};
use super::{Lowering, Stream, column_of, refuse};
use crate::bind::physical_expr;
use crate::error::planning;

impl Lowering<'_> {
    pub(super) fn join(&mut self, join: &Join) -> Result<Stream> {
        if join.join_type != JoinType::Inner {
            return Err(refuse::join_kind(join.join_type));
        }
        if join.null_equality != NullEquality::NullEqualsNothing {
            return Err(refuse::set_operation());
        }
        if join.on.is_empty() {
            return Err(refuse::cross_join());
        }
        let (left_keys, right_keys): (Vec<&Expr>, Vec<&Expr>) =
            join.on.iter().map(|(l, r)| (l, r)).unzip();
        let left = self.build(&join.left)?;
        let (left, left_keys) = self.keyed(left, &left_keys, join.left.schema())?;
        let right = self.build(&join.right)?;
        let (right, right_keys) = self.keyed(right, &right_keys, join.right.schema())?;
        let on: Vec<(usize, usize)> = left_keys.into_iter().zip(right_keys).collect();
        let left_schema = Arc::clone(&self.nodes[left.node].schema);
        let right_schema = Arc::clone(&self.nodes[right.node].schema);
        for (l, r) in &on {
            if left_schema.field(*l).data_type() != right_schema.field(*r).data_type() {
                return Err(
                    Error::invalid("the sides of a join condition have different types")
                        .code(crate::error::TYPE_MISMATCH)
                        .hint("CAST one of them"),
                );
            }
        }
        let (left_close, right_close, events) = close(&on, &left.events, &right.events);
        let left_width = left_schema.fields().len();
        let visible_left = join.left.schema().fields().len();
        let visible_right = join.right.schema().fields().len();
        let filter = match &join.filter {
            Some(filter) => {
                let mut scope = join.left.schema().as_ref().clone();
                scope = scope.join(join.right.schema()).map_err(|e| planning(e).0)?;
                let filter = physical_expr(filter, &scope)?;
                Some(shift(filter, visible_left, left_width - visible_left)?)
            }
            None => None,
        };
        let fields: Vec<_> = left_schema
            .fields()
            .iter()
            .chain(right_schema.fields())
            .cloned()
            .collect();
        let schema = Arc::new(Schema::new(fields));
        let append_only = self.nodes[left.node].append_only && self.nodes[right.node].append_only;
        if left_close.is_none() {
            self.notices.push(
                "both sides of the join are kept for ever; join on window_end too to bound the state".into(),
            );
        }
        let node = self.push(
            Op::Join {
                left: left.node,
                right: right.node,
                on,
                filter,
                left_close,
                right_close,
            },
            Arc::clone(&schema),
            append_only,
        );
        let joined = Stream { node, events };
        let wide = left_width > visible_left || schema.fields().len() > left_width + visible_right;
        if !wide {
            return Ok(joined);
        }
        let kept: Vec<usize> = (0..visible_left)
            .chain(left_width..left_width + visible_right)
            .collect();
        let exprs = kept
            .iter()
            .map(|i| Arc::new(Column::new(schema.field(*i).name(), *i)) as Arc<dyn PhysicalExpr>)
            .collect();
        let schema = schema
            .project(&kept)
            .map_err(|e| Error::internal(e.to_string()))?;
        Ok(self.project_physical(joined, exprs, Arc::new(schema)))
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
    if by == 0 {
        return Ok(filter);
    }
    filter
        .transform_up(|e| {
            Ok(match e.as_any().downcast_ref::<Column>() {
                Some(c) if c.index() >= from => {
                    Transformed::yes(
                        Arc::new(Column::new(c.name(), c.index() + by)) as Arc<dyn PhysicalExpr>
                    )
                }
                _ => Transformed::no(e),
            })
        })
        .data()
        .map_err(|e| planning(e).0)
}
