//! What a plan must satisfy before it is rendered: every kernel can be built from it.
//!
//! Kernels are built on workers, where a failure would end the process; so what can fail is tried
//! here first, where it is an answer to whoever asked.

use super::nodes::{aggregate_spec, counted_set_spec, join_spec, semi_join_spec};
use super::recompute::recompute_spec;
use crate::error::{Error, Result};
use crate::kernel::contents::Contents;
use crate::kernel::window::WindowKernel;
use crate::key::{RowCodec, Share};
use crate::plan::{Op, Plan};

/// Checks all nodes and the result.
pub fn check(plan: &Plan) -> Result<()> {
    for (id, node) in plan.nodes.iter().enumerate() {
        match &node.op {
            Op::Window {
                input,
                time,
                window,
            } => {
                WindowKernel::new(&plan.nodes[*input].schema, *time, *window)?;
            }
            Op::Aggregate { .. } => aggregate_spec(plan, id).validate()?,
            Op::Join {
                on, left, right, ..
            } => {
                join_spec(plan, id).validate()?;
                for (side, columns) in [
                    (left, on.iter().map(|o| o.0).collect::<Vec<_>>()),
                    (right, on.iter().map(|o| o.1).collect()),
                ] {
                    let schema = &plan.nodes[*side].schema;
                    RowCodec::keys(columns.iter().map(|c| schema.field(*c).data_type().clone()))?;
                    RowCodec::rows(schema.fields().iter().map(|f| f.data_type().clone()))?;
                }
            }
            Op::SemiJoin { .. } => semi_join_spec(plan, id).validate()?,
            Op::CountedSet { .. } => counted_set_spec(plan, id).validate()?,
            Op::Recompute { .. } => recompute_spec(plan, id).validate()?,
            Op::Expand { .. }
            | Op::Input { .. }
            | Op::Values { .. }
            | Op::Map { .. }
            | Op::Union { .. } => {}
        }
    }
    Contents::new(plan.schema(), plan.append_only, Share::ALL)
        .map(drop)
        .map_err(|e| {
            Error::unsupported("a column of the result has a type that cannot be kept")
                .detail(e.message)
        })
}
