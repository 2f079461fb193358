//! Reading: one snapshot of a table as a DataFusion table.
//!
//! # Contract
//!
//! * The snapshot is chosen when the provider is made and never changes; a statement makes its own.
//! * Rows come out exactly once, or an error: delete files of others are refused, not ignored.
//! * Row and null counts are exact; bounds serve pruning only.
//! * Columns are found by field id, so a renamed column still reads its old files.

mod adapt;
mod plan;
mod prune;

#[cfg(test)]
mod tests;

use std::any::Any;
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::datasource::listing::PartitionedFile;
use datafusion::datasource::object_store::ObjectStoreUrl;
use datafusion::datasource::physical_plan::{FileGroup, FileScanConfigBuilder, ParquetSource};
use datafusion::datasource::source::DataSourceExec;
use datafusion::error::Result as DataFusionResult;
use datafusion::logical_expr::{Expr, TableProviderFilterPushDown, TableType};
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::empty::EmptyExec;
use iceberg::spec::{Schema, SnapshotRef};
use millrace_dataflow::error::{Error, ErrorKind, Result};
use tokio::sync::OnceCell;

use crate::catalog::{SqlCatalog, TableName, TableVersion};
use crate::{error, schema};
use plan::LiveFile;

/// A table at one snapshot.
#[derive(Debug)]
pub struct LakeTable {
    catalog: Arc<SqlCatalog>,
    version: TableVersion,
    /// `None`: the table has no snapshot yet and is empty.
    snapshot: Option<SnapshotRef>,
    columns: Arc<Schema>,
    schema: SchemaRef,
    files: OnceCell<Vec<LiveFile>>,
}

impl LakeTable {
    /// The table as it is now.
    pub async fn open(catalog: Arc<SqlCatalog>, name: &TableName) -> Result<Arc<Self>> {
        let version = catalog.load_table(name).await?;
        let snapshot = version.metadata.current_snapshot().cloned();
        let columns = version.metadata.current_schema().clone();
        Self::new(catalog, version, snapshot, columns)
    }

    /// The table as it was at a snapshot that is still kept.
    pub async fn open_at(
        catalog: Arc<SqlCatalog>,
        name: &TableName,
        snapshot_id: i64,
    ) -> Result<Arc<Self>> {
        let version = catalog.load_table(name).await?;
        let Some(snapshot) = version.metadata.snapshot_by_id(snapshot_id).cloned() else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("lake table \"{name}\" has no snapshot {snapshot_id}"),
            )
            .hint("it may have expired"));
        };
        let columns = snapshot
            .schema(&version.metadata)
            .map_err(|e| error::iceberg("read the columns of a snapshot", e))?;
        Self::new(catalog, version, Some(snapshot), columns)
    }

    fn new(
        catalog: Arc<SqlCatalog>,
        version: TableVersion,
        snapshot: Option<SnapshotRef>,
        columns: Arc<Schema>,
    ) -> Result<Arc<Self>> {
        let schema = schema::to_arrow(&columns)?;
        let files = OnceCell::new();
        Ok(Arc::new(Self {
            catalog,
            version,
            snapshot,
            columns,
            schema,
            files,
        }))
    }

    /// The snapshot that is read; `None` while the table has none.
    pub fn snapshot_id(&self) -> Option<i64> {
        self.snapshot.as_ref().map(|s| s.snapshot_id())
    }

    pub fn version(&self) -> &TableVersion {
        &self.version
    }

    /// Rows of the snapshot.
    pub async fn row_count(&self) -> Result<u64> {
        Ok(self
            .files()
            .await?
            .iter()
            .map(|f| f.file().record_count())
            .sum())
    }

    async fn files(&self) -> Result<&Vec<LiveFile>> {
        self.files
            .get_or_try_init(async || match &self.snapshot {
                Some(snapshot) => plan::live_files(&self.catalog, &self.version, snapshot).await,
                None => Ok(vec![]),
            })
            .await
    }
}

#[async_trait]
impl TableProvider for LakeTable {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    fn supports_filters_pushdown(
        &self,
        filters: &[&Expr],
    ) -> DataFusionResult<Vec<TableProviderFilterPushDown>> {
        Ok(vec![TableProviderFilterPushDown::Inexact; filters.len()])
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> DataFusionResult<Arc<dyn ExecutionPlan>> {
        let files = self.files().await.map_err(error::into_datafusion)?;
        let mut kept = prune::prune(state, &self.schema, &self.columns, files, filters)?;
        let exact = kept.len() == files.len();
        // A limit counts rows of the result, so it can stop early only when no filter drops any.
        let limit = limit.filter(|_| filters.is_empty());
        if let Some(limit) = limit {
            let mut rows = 0;
            kept.retain(|file| {
                let needed = rows < limit as u64;
                rows += file.file().record_count();
                needed
            });
        }
        if kept.is_empty() {
            let schema = match projection {
                Some(columns) => Arc::new(self.schema.project(columns)?),
                None => Arc::clone(&self.schema),
            };
            return Ok(Arc::new(EmptyExec::new(schema)));
        }
        let statistics = plan::statistics(&self.schema, &self.columns, &kept);
        let statistics = if exact {
            statistics
        } else {
            statistics.to_inexact()
        };
        let partitions = state.config().target_partitions().max(1);
        let groups = plan::distribute(&kept, partitions)
            .into_iter()
            .map(|group| {
                group
                    .into_iter()
                    .map(|file| plan::partitioned_file(file, &self.schema, &self.columns))
                    .collect::<Result<Vec<PartitionedFile>>>()
                    .map(FileGroup::new)
            })
            .collect::<Result<Vec<_>>>()
            .map_err(error::into_datafusion)?;
        let mut options = state.table_options().parquet.clone();
        if prune::may_hold_nan(&self.schema, &self.columns, &kept) {
            // Statistics inside the files leave NaN out, though it compares as the largest value.
            options.global.pruning = false;
            options.global.enable_page_index = false;
        }
        let source =
            ParquetSource::new(Arc::clone(&self.schema)).with_table_parquet_options(options);
        let config =
            FileScanConfigBuilder::new(ObjectStoreUrl::local_filesystem(), Arc::new(source))
                .with_file_groups(groups)
                .with_statistics(statistics)
                .with_limit(limit)
                .with_expr_adapter(Some(Arc::new(adapt::FieldIds::new(&self.columns))))
                .with_projection_indices(projection.cloned())?
                .build();
        Ok(DataSourceExec::from_data_source(config))
    }
}
