//! Which plans can take back rows of an input that only grew until now.
//!
//! A plan over rows that only come keeps less: no counts beside extremes, no multiplicities of joined
//! rows, batches instead of a table. And what a watermark has closed is gone. Such a plan cannot follow
//! when a view it reads is replaced.

use super::{AggregateKind, Op, Plan, RelationId};

impl Plan {
    /// Why the plan cannot take arbitrary changes of `relation`; `None` when it can.
    pub fn keeps_too_little_of(&self, relation: RelationId) -> Option<&'static str> {
        let mut changing = vec![false; self.nodes.len()];
        for (id, node) in self.nodes.iter().enumerate() {
            changing[id] = match &node.op {
                Op::Input { relation: r, .. } => *r == relation,
                Op::Values { .. } => false,
                Op::Map { input, .. } | Op::Window { input, .. } | Op::Expand { input, .. } => {
                    changing[*input]
                }
                Op::Recompute {
                    inputs,
                    close,
                    first,
                    ..
                } => {
                    let any = inputs.iter().any(|input| changing[*input]);
                    if any && close.is_some() {
                        return Some("its windows close by the watermark, and stay as they are");
                    }
                    let growing = inputs.iter().all(|input| self.nodes[*input].append_only);
                    if any && first.is_some() && growing {
                        return Some("it keeps the first of rows that were never taken back");
                    }
                    any
                }
                Op::Union { inputs } => inputs.iter().any(|input| changing[*input]),
                Op::Aggregate {
                    input,
                    calls,
                    close,
                    ..
                } if changing[*input] => {
                    if close.is_some() {
                        return Some("its windows close by the watermark, and stay as they are");
                    }
                    let extremes = [AggregateKind::Min, AggregateKind::Max];
                    if self.nodes[*input].append_only
                        && calls.iter().any(|call| extremes.contains(&call.kind))
                    {
                        return Some("it keeps extremes of rows that were never taken back");
                    }
                    true
                }
                Op::Aggregate { .. } => false,
                Op::Join {
                    left,
                    right,
                    left_close,
                    right_close,
                    ..
                } if changing[*left] || changing[*right] => {
                    if left_close.is_some() || right_close.is_some() {
                        return Some("it forgets joined rows by the watermark");
                    }
                    if self.nodes[*left].append_only && self.nodes[*right].append_only {
                        return Some("it joins rows that were never taken back");
                    }
                    true
                }
                Op::Join { .. } => false,
                Op::SemiJoin {
                    left, right, close, ..
                } if changing[*left] || changing[*right] => {
                    if close.is_some() {
                        return Some("it forgets rows by the watermark");
                    }
                    if self.nodes[*left].append_only && self.nodes[*right].append_only {
                        return Some("it joins rows that were never taken back");
                    }
                    true
                }
                Op::SemiJoin { .. } => false,
                Op::CountedSet {
                    left, right, close, ..
                } if changing[*left] || changing[*right] => {
                    if close.is_some() {
                        return Some("it forgets rows by the watermark");
                    }
                    true
                }
                Op::CountedSet { .. } => false,
            };
        }
        let result = *changing.last()?;
        (result && self.append_only).then_some("its rows were never taken back")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::datatypes::{DataType, Field, Schema};

    use super::*;
    use crate::plan::{AggregateCall, CloseRule, Emit, Node, OnError};

    fn plan(kind: AggregateKind, grows: bool, close: Option<CloseRule>) -> Plan {
        let schema = Arc::new(Schema::new(vec![Field::new("x", DataType::Int64, true)]));
        let node = |op, append_only| Node {
            op,
            schema: Arc::clone(&schema),
            append_only,
        };
        let input = Op::Input {
            relation: RelationId(7),
            columns: vec![0],
        };
        let call = AggregateCall {
            kind,
            input: Some(0),
            filter: None,
            output: DataType::Int64,
        };
        let aggregate = Op::Aggregate {
            input: 0,
            keys: Vec::new(),
            calls: vec![call],
            close,
            emit: Emit::Changes,
            allowed_lateness_us: 0,
        };
        Plan {
            nodes: vec![node(input, grows), node(aggregate, false)],
            append_only: false,
            fingerprint: 0,
            on_error: OnError::Continue,
        }
    }

    #[test]
    fn what_was_not_kept_cannot_be_taken_back() {
        let close = CloseRule {
            key: 0,
            delay_us: 0,
        };
        let of = |plan: Plan| plan.keeps_too_little_of(RelationId(7)).is_some();
        assert!(!of(plan(AggregateKind::Count, true, None)));
        assert!(of(plan(AggregateKind::Max, true, None)));
        assert!(!of(plan(AggregateKind::Max, false, None)));
        assert!(of(plan(AggregateKind::Count, false, Some(close))));
        let other = plan(AggregateKind::Max, true, Some(close));
        assert!(other.keeps_too_little_of(RelationId(8)).is_none());
        let mut grows = plan(AggregateKind::Count, true, None);
        grows.nodes.pop();
        grows.append_only = true;
        assert!(of(grows));
    }
}
