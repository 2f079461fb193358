//! What the tests of this crate share: a catalog in a temporary directory and small data files.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use iceberg::spec::{
    DataContentType, DataFile, DataFileBuilder, DataFileFormat, Datum, ManifestContentType,
};
use parquet::arrow::ArrowWriter;
use tempfile::TempDir;

use crate::catalog::sql::open_pool;
use crate::catalog::{SqlCatalog, TableName, TableVersion};
use crate::{schema, storage};

/// A catalog that lives as long as its directory.
pub(crate) struct Place {
    pub(crate) directory: TempDir,
    pub(crate) catalog: Arc<SqlCatalog>,
}

pub(crate) async fn place() -> Place {
    let directory = tempfile::tempdir().expect("a directory");
    let pool = open_pool(&directory.path().join("metadata.db"))
        .await
        .expect("a database");
    let warehouse = directory.path().join("ware house");
    let catalog = SqlCatalog::open(pool, warehouse).await.expect("a catalog");
    Place { directory, catalog }
}

pub(crate) fn name() -> TableName {
    TableName::new("ns", "t").expect("a name")
}

pub(crate) fn columns() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("id", DataType::Int64, true),
        Field::new("text", DataType::Utf8, true),
    ]))
}

pub(crate) async fn table(catalog: &SqlCatalog) -> TableVersion {
    catalog
        .create_table(&name(), &columns(), HashMap::new())
        .await
        .expect("a table")
}

/// A data file with one row per id.
pub(crate) fn data_file(table: &TableVersion, label: &str, ids: &[i64]) -> DataFile {
    let columns = table.metadata.current_schema();
    let schema = schema::to_arrow_with_ids(columns).expect("columns");
    let texts: Vec<String> = ids.iter().map(|id| format!("row {id}")).collect();
    let arrays: Vec<ArrayRef> = vec![
        Arc::new(Int64Array::from(ids.to_vec())),
        Arc::new(StringArray::from(texts)),
    ];
    let batch = RecordBatch::try_new(Arc::clone(&schema), arrays).expect("a batch");
    let location = format!("{}/data/{label}.parquet", table.metadata.location());
    let path = storage::local_path(&location).expect("a path");
    let file = std::fs::File::create(&path).expect("a file");
    let mut writer = ArrowWriter::try_new(file, schema, None).expect("a writer");
    writer.write(&batch).expect("rows");
    writer.close().expect("a footer");
    let bound = |v: Option<&i64>| HashMap::from([(1, Datum::long(*v.expect("rows")))]);
    DataFileBuilder::default()
        .content(DataContentType::Data)
        .file_path(location)
        .file_format(DataFileFormat::Parquet)
        .record_count(ids.len() as u64)
        .file_size_in_bytes(std::fs::metadata(&path).expect("a size").len())
        .null_value_counts(HashMap::from([(1, 0), (2, 0)]))
        .lower_bounds(bound(ids.iter().min()))
        .upper_bounds(bound(ids.iter().max()))
        .build()
        .expect("a data file")
}

/// Paths of the live data files of the current version, in no order, each as often as it stands there.
pub(crate) async fn live_paths(catalog: &SqlCatalog) -> Vec<String> {
    let table = catalog.load_table(&name()).await.expect("the table");
    let mut paths = vec![];
    if let Some(snapshot) = table.metadata.current_snapshot() {
        let list = catalog
            .manifest_list(&table.metadata, snapshot)
            .await
            .expect("a list");
        for manifest in list
            .entries()
            .iter()
            .filter(|m| m.content == ManifestContentType::Data)
        {
            let manifest = catalog.manifest(manifest).await.expect("a manifest");
            let alive = manifest.entries().iter().filter(|e| e.is_alive());
            paths.extend(alive.map(|e| e.file_path().to_string()));
        }
    }
    paths
}
