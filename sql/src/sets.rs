//! INTERSECT ALL and EXCEPT ALL: as often as on both sides, as often more as on the left.
//!
//! DataFusion plans them as semi- and anti-joins over all columns, which keep or drop all copies of a
//! row alike. [`counted`] puts a node of its own in their place before anything else is planned with
//! them. Views lower it to an operator; for one-shot queries [`NumberCopies`] numbers the copies of
//! each row and joins by the number too.

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use arrow::datatypes::Field;
use datafusion::common::tree_node::Transformed;
use datafusion::common::{Column, DFSchema, DFSchemaRef, JoinType, NullEquality, Result};
use datafusion::logical_expr::expr::{WindowFunction, WindowFunctionParams};
use datafusion::logical_expr::type_coercion::binary::type_union_resolution;
use datafusion::logical_expr::{
    Expr, Extension, LogicalPlan, LogicalPlanBuilder, UserDefinedLogicalNodeCore, WindowFrame,
    WindowFunctionDefinition, cast,
};
use datafusion::optimizer::{ApplyOrder, OptimizerConfig, OptimizerRule};
use millrace_dataflow::error::Error;

use crate::error::{TYPE_MISMATCH, carry};
use crate::functions::functions;

/// The logical node. Both sides have the same column types.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct CountedSet {
    pub(crate) left: LogicalPlan,
    pub(crate) right: LogicalPlan,
    /// EXCEPT, not INTERSECT.
    pub(crate) except: bool,
    schema: DFSchemaRef,
}

impl PartialOrd for CountedSet {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        self.left.partial_cmp(&other.left)
    }
}

impl CountedSet {
    fn try_new(left: LogicalPlan, right: LogicalPlan, except: bool) -> Result<Self> {
        let fields = left.schema().iter().zip(right.schema().fields());
        let fields = fields.map(|((qualifier, l), r)| {
            let nullable = l.is_nullable() && (except || r.is_nullable());
            let field = Field::new(l.name(), l.data_type().clone(), nullable);
            (qualifier.cloned(), Arc::new(field))
        });
        let schema = DFSchema::new_with_metadata(fields.collect(), Default::default())?;
        Ok(Self {
            schema: Arc::new(schema),
            left,
            right,
            except,
        })
    }
}

impl UserDefinedLogicalNodeCore for CountedSet {
    fn name(&self) -> &str {
        "CountedSet"
    }
    fn inputs(&self) -> Vec<&LogicalPlan> {
        vec![&self.left, &self.right]
    }
    fn schema(&self) -> &DFSchemaRef {
        &self.schema
    }
    fn expressions(&self) -> Vec<Expr> {
        vec![]
    }
    fn fmt_for_explain(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.except {
            "ExceptAll"
        } else {
            "IntersectAll"
        })
    }
    fn with_exprs_and_inputs(&self, _: Vec<Expr>, inputs: Vec<LogicalPlan>) -> Result<Self> {
        let [left, right]: [LogicalPlan; 2] = inputs
            .try_into()
            .map_err(|_| carry(Error::internal("a set operation has two inputs")))?;
        Self::try_new(left, right, self.except)
    }
}

/// Replaces the plan of INTERSECT ALL and EXCEPT ALL: as yet nothing else makes a semi-join for which
/// nulls are equal, apart from the forms without ALL. Those are distinct on the left, where it is the
/// same.
pub(crate) fn counted(plan: LogicalPlan) -> Result<Transformed<LogicalPlan>> {
    let LogicalPlan::Join(join) = &plan else {
        return Ok(Transformed::no(plan));
    };
    let except = match join.join_type {
        JoinType::LeftSemi => false,
        JoinType::LeftAnti => true,
        _ => return Ok(Transformed::no(plan)),
    };
    let nulls = join.null_equality == NullEquality::NullEqualsNull;
    if !nulls || matches!(join.left.as_ref(), LogicalPlan::Distinct(_)) {
        return Ok(Transformed::no(plan));
    }
    let types = join
        .left
        .schema()
        .fields()
        .iter()
        .zip(join.right.schema().fields());
    let types = types.map(|(l, r)| {
        let both = [l.data_type().clone(), r.data_type().clone()];
        type_union_resolution(&both).ok_or_else(|| {
            carry(
                Error::invalid(format!(
                    "column \"{}\" has different types on the sides of INTERSECT or EXCEPT",
                    l.name()
                ))
                .code(TYPE_MISMATCH)
                .hint("CAST one of them"),
            )
        })
    });
    let types = types.collect::<Result<Vec<_>>>()?;
    let side = |plan: &LogicalPlan| -> Result<LogicalPlan> {
        if plan
            .schema()
            .fields()
            .iter()
            .zip(&types)
            .all(|(f, t)| f.data_type() == t)
        {
            return Ok(plan.clone());
        }
        let columns =
            plan.schema()
                .iter()
                .zip(&types)
                .map(|((qualifier, field), t)| {
                    let column = Expr::Column(Column::new(qualifier.cloned(), field.name()));
                    match field.data_type() == t {
                        true => column,
                        false => cast(column, t.clone())
                            .alias_qualified(qualifier.cloned(), field.name()),
                    }
                });
        let columns: Vec<Expr> = columns.collect();
        LogicalPlanBuilder::from(plan.clone())
            .project(columns)?
            .build()
    };
    let node = CountedSet::try_new(side(&join.left)?, side(&join.right)?, except)?;
    Ok(Transformed::yes(LogicalPlan::Extension(Extension {
        node: Arc::new(node),
    })))
}

/// For one-shot queries.
#[derive(Debug)]
pub(crate) struct NumberCopies;

const COPY: &str = "\u{1f}copy";

impl OptimizerRule for NumberCopies {
    fn name(&self) -> &str {
        "number_copies"
    }
    fn apply_order(&self) -> Option<ApplyOrder> {
        Some(ApplyOrder::TopDown)
    }
    fn supports_rewrite(&self) -> bool {
        true
    }
    fn rewrite(
        &self,
        plan: LogicalPlan,
        _: &dyn OptimizerConfig,
    ) -> Result<Transformed<LogicalPlan>> {
        let LogicalPlan::Extension(Extension { node }) = &plan else {
            return Ok(Transformed::no(plan));
        };
        let Some(set) = node.as_any().downcast_ref::<CountedSet>() else {
            return Ok(Transformed::no(plan));
        };
        let columns: Vec<Expr> = columns(set.left.schema())
            .into_iter()
            .map(Expr::from)
            .collect();
        let left = LogicalPlanBuilder::from(numbered(&set.left)?);
        let right = LogicalPlanBuilder::from(numbered(&set.right)?).alias("\u{1f}copies")?;
        let right = right.build()?;
        let keys = (columns_of(left.schema()), columns_of(right.schema()));
        let kind = match set.except {
            true => JoinType::LeftAnti,
            false => JoinType::LeftSemi,
        };
        let plan = left
            .join_detailed(right, kind, keys, None, NullEquality::NullEqualsNull)?
            .project(columns)?
            .build()?;
        Ok(Transformed::yes(plan))
    }
}

fn columns(schema: &DFSchema) -> Vec<Column> {
    schema.iter().map(Column::from).collect()
}

fn columns_of(schema: &DFSchemaRef) -> Vec<Column> {
    columns(schema)
}

/// The rows with the number of each among its equals.
fn numbered(plan: &LogicalPlan) -> Result<LogicalPlan> {
    let function =
        WindowFunctionDefinition::WindowUDF(Arc::clone(&functions().window["row_number"]));
    let number = Expr::from(WindowFunction {
        fun: function,
        params: WindowFunctionParams {
            args: vec![],
            partition_by: columns(plan.schema()).into_iter().map(Expr::from).collect(),
            order_by: vec![],
            window_frame: WindowFrame::new(None),
            filter: None,
            null_treatment: None,
            distinct: false,
        },
    });
    let name = number.schema_name().to_string();
    let plan = LogicalPlanBuilder::from(plan.clone()).window(vec![number])?;
    let mut all: Vec<Expr> = columns(plan.schema()).into_iter().map(Expr::from).collect();
    if let Some(number) = all.pop() {
        debug_assert_eq!(number.schema_name().to_string(), name);
        all.push(number.alias(COPY));
    }
    plan.project(all)?.build()
}
