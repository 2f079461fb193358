//! Appends a relation to a lake table, exactly once.
//!
//! # Contract
//!
//! * Namespace and table are created with the sink if missing, and never later; a table with other columns is refused
//!   then, not when rows arrive.
//! * A row with diff `n` is written `n` times. A retraction is an error, unless the sink keeps a
//!   changelog: then every change is a row with its sign (`op`) and its time (`tick`).
//! * Workers write and close files; what enters a checkpoint names closed, durable files. The committer
//!   publishes the files of an epoch with the sink's progress in one commit (see `millrace_lake::commit`).

mod committer;
mod layout;
mod metrics;
mod options;
mod patient;
mod writer;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_dataflow::plan::RelationId;
use millrace_dataflow::sink::{Committer, Sink, Writer};
use millrace_lake::{SqlCatalog, TableCommitter, TableName, TableVersion, schema, snapshot};

use committer::IcebergCommitter;
use layout::Layout;
pub use options::IcebergOptions;
use writer::IcebergWriter;

/// A lake table as a way out.
#[derive(Debug)]
pub struct IcebergSink {
    catalog: Arc<SqlCatalog>,
    table: TableVersion,
    id: String,
    options: IcebergOptions,
    layout: Arc<Layout>,
}

impl IcebergSink {
    /// Opens the table for a relation with these columns, creating what is missing.
    pub async fn create(
        catalog: Arc<SqlCatalog>,
        table: &TableName,
        sink: RelationId,
        columns: &SchemaRef,
        options: IcebergOptions,
    ) -> Result<Arc<Self>> {
        let written = layout::written_columns(columns, options.changelog)?;
        // Refuses columns that no table can hold, also when the table exists.
        schema::to_iceberg(&written)?;
        let version = match catalog.load_table(table).await {
            Err(e) if e.kind == ErrorKind::NotFound => {
                match catalog.create_table(table, &written, HashMap::new()).await {
                    // Somebody else was faster.
                    Err(e) if e.kind == ErrorKind::Conflict => catalog.load_table(table).await?,
                    other => other?,
                }
            }
            other => other?,
        };
        Self::over(catalog, version, sink, columns, options)
    }

    /// Opens the table that an existing sink writes to; it must be there.
    pub async fn open(
        catalog: Arc<SqlCatalog>,
        table: &TableName,
        sink: RelationId,
        columns: &SchemaRef,
        options: IcebergOptions,
    ) -> Result<Arc<Self>> {
        match catalog.load_table(table).await {
            Ok(version) => Self::over(catalog, version, sink, columns, options),
            Err(e) if e.kind == ErrorKind::NotFound => Err(Error::new(
                ErrorKind::NotFound,
                format!("lake table \"{table}\", which the sink writes to, was dropped"),
            )
            .code("42P01")
            .hint("drop the sink and create it anew")),
            Err(e) => Err(e),
        }
    }

    fn over(
        catalog: Arc<SqlCatalog>,
        version: TableVersion,
        sink: RelationId,
        columns: &SchemaRef,
        options: IcebergOptions,
    ) -> Result<Arc<Self>> {
        let written = layout::written_columns(columns, options.changelog)?;
        let name = version.name.to_string();
        schema::compatible(&name, version.metadata.current_schema(), &written)?;
        snapshot::check_appendable(&version)?;
        let layout = Arc::new(Layout::new(columns, &version, options.changelog)?);
        Ok(Arc::new(Self {
            catalog,
            table: version,
            id: sink.0.to_string(),
            options,
            layout,
        }))
    }

    pub fn table(&self) -> &TableName {
        &self.table.name
    }

    pub fn options(&self) -> &IcebergOptions {
        &self.options
    }
}

#[async_trait]
impl Sink for IcebergSink {
    fn accepts_retractions(&self) -> bool {
        self.options.changelog
    }

    async fn writer(&self, worker: usize, incarnation: u64) -> Result<Box<dyn Writer>> {
        let prefix = format!("{}-{incarnation}-{worker}", self.id);
        let layout = Arc::clone(&self.layout);
        Ok(Box::new(IcebergWriter::new(
            layout,
            prefix,
            self.options.target_file_size,
        )))
    }

    async fn committer(&self, incarnation: u64) -> Result<Box<dyn Committer>> {
        let catalog = Arc::clone(&self.catalog);
        let inner = TableCommitter::new(catalog, &self.table, self.id.clone(), incarnation);
        Ok(Box::new(IcebergCommitter::new(inner, self.table.clone())))
    }
}
