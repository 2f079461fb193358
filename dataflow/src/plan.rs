//! Plan: what a dataflow is. Produced by `sql::lower`, rendered by `render`.
//!
//! Nodes stand in topological order: inputs have smaller indices. Expressions are DataFusion
//! physical expressions over the columns of the node's input, already in checked arithmetic.

mod changes;
mod computation;
mod iterations;
mod share;

use std::fmt;
use std::sync::Arc;

use arrow::datatypes::{DataType, SchemaRef};
use datafusion::physical_expr::PhysicalExpr;

pub use computation::{Computation, OrderColumn, Slot};
pub use iterations::Iterations;

/// Identifies a source, view or sink in a data plane; never reused.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub struct RelationId(pub u64);

impl fmt::Display for RelationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r{}", self.0)
    }
}

/// Index of a node in [`Plan::nodes`].
pub type NodeId = usize;

/// A dataflow: nodes in topological order, the last one is the result.
#[derive(Debug, Clone)]
pub struct Plan {
    pub nodes: Vec<Node>,
    /// Every diff of the result is +1.
    pub append_only: bool,
    /// Hash of the normalised plan text; a different one means that stored state does not fit.
    pub fingerprint: u64,
    /// What to do with rows whose expressions fail.
    pub on_error: OnError,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnError {
    /// Keep the failing row in the relation's errors collection and go on.
    #[default]
    Continue,
    /// Stop the pipeline.
    Fail,
}

#[derive(Debug, Clone)]
pub struct Node {
    pub op: Op,
    /// Columns of the output.
    pub schema: SchemaRef,
    /// Every diff of the output is +1.
    pub append_only: bool,
}

/// One step of a fused stateless chain.
#[derive(Debug, Clone)]
pub enum MapStep {
    /// Keep rows where the expression is true.
    Filter(Arc<dyn PhysicalExpr>),
    /// Replace the columns; names and types of the result are in the schema.
    Project(Vec<Arc<dyn PhysicalExpr>>, SchemaRef),
}

/// Windows of one length; all in microseconds. `slide == size` is TUMBLE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeWindow {
    pub size_us: i64,
    pub slide_us: i64,
}

/// Tells when a group, or a row, is final: when `watermark >= value(column) + delay_us`, the column
/// being a timestamp.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CloseRule {
    /// For an aggregate: index among the keys. Its type is `Timestamp(Microsecond, None)`.
    pub key: usize,
    pub delay_us: i64,
}

/// When an aggregate shows its groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Emit {
    /// As they change: retraction of the old row, insertion of the new one.
    Changes,
    /// Once, when the watermark closes them. Needs a [`CloseRule`].
    OnClose,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AggregateKind {
    /// `count(*)` (no argument) or `count(x)`. Int64.
    Count,
    /// Integers give `Decimal128(38, 0)`, decimals `Decimal128(38, s)`, floats `Float64`.
    Sum,
    /// Integers and decimals give `Decimal128(38, max(6, s))`, floats `Float64`.
    Avg,
    Min,
    Max,
}

#[derive(Debug, Clone)]
pub struct AggregateCall {
    pub kind: AggregateKind,
    /// Column of the input; `None` for `count(*)`.
    pub input: Option<usize>,
    /// A boolean column of the input: rows where it is not true are ignored (`FILTER (WHERE …)`).
    pub filter: Option<usize>,
    pub output: DataType,
}

#[derive(Debug, Clone)]
pub enum Op {
    /// Rows of another relation: the columns `columns` of it, in that order.
    Input {
        relation: RelationId,
        columns: Vec<usize>,
    },
    /// Constant rows, present once.
    Values {
        rows: arrow::array::RecordBatch,
    },
    Map {
        input: NodeId,
        steps: Vec<MapStep>,
    },
    /// Appends `window_start` and `window_end` (`Timestamp(Microsecond, None)`); a row stands once in
    /// each window it belongs to. A row whose time is null belongs to none. `time` is a
    /// `Timestamp(Microsecond, None)` column of the input.
    Window {
        input: NodeId,
        time: usize,
        window: TimeWindow,
    },
    /// Groups by the columns `keys` of the input (none: one group, which exists also when empty).
    /// Output: keys, then aggregates.
    Aggregate {
        input: NodeId,
        keys: Vec<usize>,
        calls: Vec<AggregateCall>,
        close: Option<CloseRule>,
        emit: Emit,
        /// Groups stay open this much longer, in microseconds.
        allowed_lateness_us: i64,
    },
    /// Inner equi-join: left columns, then right columns. `on` pairs have equal types; null equals
    /// nothing, or null. Without pairs every row joins every row, on one worker. When `close` is given
    /// (index among the left/right columns), rows are dropped from state once final.
    Join {
        left: NodeId,
        right: NodeId,
        on: Vec<(usize, usize)>,
        null_equal: bool,
        /// Over the concatenated columns.
        filter: Option<Arc<dyn PhysicalExpr>>,
        left_close: Option<CloseRule>,
        right_close: Option<CloseRule>,
    },
    /// Partitions that are computed anew when they change. See [`crate::kernel::recompute`].
    Recompute {
        inputs: Vec<NodeId>,
        /// By input, the columns of its partitions (none: all rows are one).
        keys: Vec<Vec<usize>>,
        compute: Arc<Computation>,
        close: Option<CloseRule>,
        emit: Emit,
        allowed_lateness_us: i64,
        /// Of the single input: the computation depends on so many rows of a partition only, the first
        /// ones in its order.
        first: Option<usize>,
    },
    /// Each row to any number of rows, by itself: the computation over a batch of rows.
    Expand {
        input: NodeId,
        compute: Arc<Computation>,
    },
    /// Rows of the left side that have a row with their key on the right, or (`anti`) that have none.
    /// The right side is its key alone: column `i` of it equals column `on[i]` of the left; null equals
    /// nothing, or null. Without columns: rows of the left side while there is any row on the right, on
    /// one worker. `close` (index among the keys) tells when both sides of a key are final.
    SemiJoin {
        left: NodeId,
        right: NodeId,
        on: Vec<usize>,
        anti: bool,
        null_equal: bool,
        close: Option<CloseRule>,
    },
    /// INTERSECT ALL or EXCEPT ALL of inputs with the same column types; nulls are equal. `close` (index
    /// of a column) tells when a row is final on both sides.
    CountedSet {
        left: NodeId,
        right: NodeId,
        except: bool,
        close: Option<CloseRule>,
    },
    /// UNION ALL; all inputs have the same column types.
    Union {
        inputs: Vec<NodeId>,
    },
}

impl Plan {
    /// The node whose output is the relation.
    pub fn root(&self) -> &Node {
        self.nodes.last().expect("a plan has at least one node")
    }
    pub fn schema(&self) -> &SchemaRef {
        &self.root().schema
    }
    /// Relations this plan reads, in order of first use, each once.
    pub fn inputs(&self) -> Vec<RelationId> {
        let mut seen = Vec::new();
        for node in &self.nodes {
            if let Op::Input { relation, .. } = &node.op
                && !seen.contains(relation)
            {
                seen.push(*relation);
            }
        }
        seen
    }
}

/// How the columns of a source relation come from what its connector reads.
#[derive(Debug, Clone)]
pub struct SourcePlan {
    /// One expression per column of the relation, over [`crate::source::Source::schema`] (all
    /// physical columns). A plain column reference, or a computed column.
    pub columns: Vec<Arc<dyn PhysicalExpr>>,
    /// Columns of the relation.
    pub schema: SchemaRef,
    pub watermark: Option<WatermarkPlan>,
    /// Columns of which a failure rejects the record, whether anything reads them or not: what one
    /// view sees of a source must not depend on what other views ask of it.
    pub deciding: Vec<usize>,
}

/// `WATERMARK FOR column AS expr`.
#[derive(Debug, Clone)]
pub struct WatermarkPlan {
    /// Column of the relation, a `Timestamp(Microsecond, None)`.
    pub column: usize,
    /// Over the relation's columns; gives `Timestamp(Microsecond, None)`. The watermark is the
    /// maximum of it over the rows seen, per split, then the minimum over splits.
    pub expr: Arc<dyn PhysicalExpr>,
    /// A row further ahead of the clock than this, in microseconds, does not move the watermark.
    pub max_ahead_us: Option<i64>,
}
