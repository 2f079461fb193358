//! Finds the columns of a table in its files by field id.
//!
//! DataFusion matches columns by name. Names in a table may change, field ids never do, so a file's
//! columns are given the names the table uses for their ids now, DataFusion's own adapter does the
//! rest (casts, missing columns), and the names of the file are put back into the result. A file
//! without ids is matched by name.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::datatypes::{Field, Schema as ArrowSchema, SchemaRef};
use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::error::Result;
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::expressions::Column;
use datafusion::physical_expr_adapter::{
    DefaultPhysicalExprAdapterFactory, PhysicalExprAdapter, PhysicalExprAdapterFactory,
};
use iceberg::spec::Schema;
use parquet::arrow::PARQUET_FIELD_ID_META_KEY;

/// Makes adapters for the files of one table.
#[derive(Debug)]
pub(super) struct FieldIds {
    names: HashMap<i32, String>,
}

impl FieldIds {
    pub(super) fn new(columns: &Schema) -> Self {
        let fields = columns.as_struct().fields();
        Self {
            names: fields.iter().map(|f| (f.id, f.name.clone())).collect(),
        }
    }

    /// The file's columns under the table's names.
    fn rename(&self, file: &ArrowSchema) -> Option<ArrowSchema> {
        let id = |field: &Field| {
            field
                .metadata()
                .get(PARQUET_FIELD_ID_META_KEY)?
                .parse()
                .ok()
        };
        let ids: Vec<Option<i32>> = file.fields().iter().map(|f| id(f)).collect();
        if ids.iter().all(Option::is_none) {
            return None;
        }
        let fields = file
            .fields()
            .iter()
            .zip(ids)
            .enumerate()
            .map(|(index, (field, id))| {
                let name = match id.and_then(|id| self.names.get(&id)) {
                    Some(name) => name.clone(),
                    // Of no column of this table any more, whatever its name.
                    None => format!("\u{0}{index}"),
                };
                field.as_ref().clone().with_name(name)
            });
        Some(ArrowSchema::new(fields.collect::<Vec<_>>()))
    }
}

impl PhysicalExprAdapterFactory for FieldIds {
    fn create(&self, table: SchemaRef, file: SchemaRef) -> Result<Arc<dyn PhysicalExprAdapter>> {
        let default = DefaultPhysicalExprAdapterFactory;
        let Some(renamed) = self.rename(&file) else {
            return default.create(table, file);
        };
        if renamed
            .fields()
            .iter()
            .zip(file.fields())
            .all(|(r, f)| r.name() == f.name())
        {
            return default.create(table, file);
        }
        let inner = default.create(table, Arc::new(renamed))?;
        Ok(Arc::new(Renaming { inner, file }))
    }
}

#[derive(Debug)]
struct Renaming {
    inner: Arc<dyn PhysicalExprAdapter>,
    file: SchemaRef,
}

impl PhysicalExprAdapter for Renaming {
    fn rewrite(&self, expr: Arc<dyn PhysicalExpr>) -> Result<Arc<dyn PhysicalExpr>> {
        let rewritten = self.inner.rewrite(expr)?;
        let named = rewritten.transform(|expr| {
            let Some(column) = expr.as_any().downcast_ref::<Column>() else {
                return Ok(Transformed::no(expr));
            };
            let name = self.file.field(column.index()).name();
            if name == column.name() {
                return Ok(Transformed::no(expr));
            }
            Ok(Transformed::yes(Arc::new(Column::new(
                name,
                column.index(),
            ))))
        })?;
        Ok(named.data)
    }
}
