//! Nodes that compute the same are computed once.
//!
//! A query that names the same windowed aggregate twice (Nexmark q5: the counts, and their maximum)
//! plans it twice. Two nodes are the same when their operators, inputs and output columns are; operators
//! are deterministic, so sharing changes no answer.

use std::collections::HashMap;

use super::{NodeId, Op, Plan};

impl Plan {
    /// The plan with equal nodes merged. Order and result stay.
    #[must_use]
    pub fn share_equal_nodes(mut self) -> Self {
        let mut seen: HashMap<String, NodeId> = HashMap::new();
        let mut place: Vec<NodeId> = Vec::with_capacity(self.nodes.len());
        let mut kept = Vec::with_capacity(self.nodes.len());
        let last = self.nodes.len().saturating_sub(1);
        for (id, mut node) in std::mem::take(&mut self.nodes).into_iter().enumerate() {
            node.op.each_input(|input| *input = place[*input]);
            let text = format!("{:?} {:?}", node.op, node.schema);
            // The result stays the last node, also when it repeats another.
            match seen.get(&text) {
                Some(same) if id != last => place.push(*same),
                _ => {
                    seen.insert(text, kept.len());
                    place.push(kept.len());
                    kept.push(node);
                }
            }
        }
        self.nodes = kept;
        self
    }
}

impl Op {
    /// Visits the inputs for writing.
    fn each_input(&mut self, mut visit: impl FnMut(&mut NodeId)) {
        match self {
            Self::Input { .. } | Self::Values { .. } => {}
            Self::Map { input, .. }
            | Self::Window { input, .. }
            | Self::Aggregate { input, .. } => visit(input),
            Self::Join { left, right, .. }
            | Self::SemiJoin { left, right, .. }
            | Self::CountedSet { left, right, .. } => {
                visit(left);
                visit(right);
            }
            Self::Expand { input, .. } => visit(input),
            Self::Recompute { inputs, .. } | Self::Union { inputs } => {
                inputs.iter_mut().for_each(visit)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::datatypes::{DataType, Field, Schema};

    use super::*;
    use crate::plan::{Node, OnError, RelationId};

    #[test]
    fn equal_inputs_become_one_and_the_result_stays_last() {
        let schema = Arc::new(Schema::new(vec![Field::new("x", DataType::Int64, true)]));
        let node = |op| Node {
            op,
            schema: Arc::clone(&schema),
            append_only: true,
        };
        let input = || Op::Input {
            relation: RelationId(1),
            columns: vec![0],
        };
        let plan = Plan {
            nodes: vec![
                node(input()),
                node(input()),
                node(Op::Input {
                    relation: RelationId(2),
                    columns: vec![0],
                }),
                node(Op::Union {
                    inputs: vec![0, 1, 2],
                }),
            ],
            append_only: true,
            fingerprint: 0,
            on_error: OnError::Continue,
        };
        let shared = plan.share_equal_nodes();
        assert_eq!(shared.nodes.len(), 3);
        assert!(matches!(&shared.nodes[2].op, Op::Union { inputs } if *inputs == [0, 0, 1]));
    }
}
