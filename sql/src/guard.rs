//! Policy: the only maker of [`Guarded`], without which nothing is lowered or executed.
//!
//! Binding scans catalog sources that cannot be planned physically; only what passed here gets the
//! providers of its relations. A forgotten policy check is therefore a type error. The policy of
//! today allows everything; row filters and masks will be barriers around the scans.

use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use datafusion::catalog::TableProvider;
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNodeRecursion};
use datafusion::datasource::provider_as_source;
use datafusion::logical_expr::{LogicalPlan, TableScan};
use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::plan::RelationId;

use crate::bind::{BoundQuery, Purpose, shown_schema};
use crate::catalog::{CatalogSource, LakeName, Scanned};
use crate::error::{carry, planning};
use crate::query::Executable;
use crate::stack::on_big_stack;

/// Who may see what. Allows all, for now.
#[derive(Debug, Clone, Default)]
pub struct Policy;

/// A plan that policy has been applied to.
#[derive(Debug, Clone)]
pub struct Guarded {
    plan: LogicalPlan,
    purpose: Purpose,
}

/// A relation that a guarded query reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RelationRef {
    /// A view, a bounded source or a system relation.
    Engine {
        id: RelationId,
        /// As stored, with `$suffix` for a system relation.
        name: String,
        schema: SchemaRef,
        source: bool,
    },
    /// A table of the lake.
    Lake { name: LakeName, schema: SchemaRef },
    /// What the server says of itself: see [`crate::catalog::system`].
    System { name: String, schema: SchemaRef },
}

/// Applies the policy.
pub fn guard(query: BoundQuery, policy: &Policy) -> Result<Guarded> {
    let Policy = policy;
    Ok(Guarded {
        plan: query.plan,
        purpose: query.purpose,
    })
}

/// What the query reads, each relation once, in order of first use.
pub fn relations_of(guarded: &Guarded) -> Vec<RelationRef> {
    on_big_stack(|| {
        let mut found = Vec::new();
        let _ = guarded.plan.apply_with_subqueries(|plan| {
            if let LogicalPlan::TableScan(scan) = plan
                && let Some(relation) = relation(scan)
                && !found.contains(&relation)
            {
                found.push(relation);
            }
            Ok(TreeNodeRecursion::Continue)
        });
        found
    })
}

fn relation(scan: &TableScan) -> Option<RelationRef> {
    Some(match &CatalogSource::of(&scan.source)?.scanned {
        Scanned::Engine(r) => RelationRef::Engine {
            id: r.id,
            name: r.name.clone(),
            schema: Arc::clone(&r.schema),
            source: r.source.is_some(),
        },
        Scanned::Lake(name, schema) => RelationRef::Lake {
            name: name.clone(),
            schema: Arc::clone(schema),
        },
        Scanned::System(name, schema) => RelationRef::System {
            name: name.clone(),
            schema: Arc::clone(schema),
        },
    })
}

impl Guarded {
    /// Columns of the answer; that of a query may hold a name twice.
    pub fn schema(&self) -> SchemaRef {
        shown_schema(self.plan.schema().as_arrow())
    }
    pub(crate) fn plan(&self) -> &LogicalPlan {
        &self.plan
    }
    pub(crate) fn purpose(&self) -> &Purpose {
        &self.purpose
    }

    /// Puts what can be read in the place of each relation. `provider` must have the columns of the
    /// relation's schema, in its order.
    pub fn resolve(
        self,
        provider: &(dyn Fn(&RelationRef) -> Result<Arc<dyn TableProvider>> + Sync),
    ) -> Result<Executable> {
        let plan = self.plan;
        let resolved = on_big_stack(move || {
            plan.transform_up_with_subqueries(|node| {
                let LogicalPlan::TableScan(scan) = &node else {
                    return Ok(Transformed::no(node));
                };
                let Some(relation) = relation(scan) else {
                    return Ok(Transformed::no(node));
                };
                let table = provider(&relation).map_err(carry)?;
                same_columns(&relation, &table.schema()).map_err(carry)?;
                let scan = TableScan::try_new(
                    scan.table_name.clone(),
                    provider_as_source(table),
                    scan.projection.clone(),
                    scan.filters.clone(),
                    scan.fetch,
                )?;
                Ok(Transformed::yes(LogicalPlan::TableScan(scan)))
            })
            .data()
            .map_err(|e| planning(e).0)
        })?;
        Ok(Executable::new(resolved))
    }
}

fn same_columns(relation: &RelationRef, given: &SchemaRef) -> Result<()> {
    let (name, wanted) = match relation {
        RelationRef::Engine { name, schema, .. } => (name.clone(), schema),
        RelationRef::Lake { name, schema } => (name.to_string(), schema),
        RelationRef::System { name, schema } => (name.clone(), schema),
    };
    let same = wanted.fields().len() == given.fields().len()
        && wanted
            .fields()
            .iter()
            .zip(given.fields())
            .all(|(w, g)| w.name() == g.name() && w.data_type() == g.data_type());
    if same {
        Ok(())
    } else {
        Err(Error::new(
            millrace_dataflow::error::ErrorKind::Conflict,
            format!("the columns of \"{name}\" have changed"),
        )
        .hint("run the statement again"))
    }
}
