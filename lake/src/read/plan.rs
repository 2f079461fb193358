//! From a snapshot to the files that hold its rows, and from files to scan partitions.

use std::cmp::Reverse;
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use datafusion::common::stats::Precision;
use datafusion::common::{ColumnStatistics, Statistics};
use datafusion::datasource::listing::PartitionedFile;
use iceberg::spec::{
    DataContentType, DataFile, DataFileFormat, Manifest, ManifestContentType, ManifestEntryRef,
    Schema, Snapshot,
};
use millrace_dataflow::error::{Error, ErrorKind, Result};
use object_store::ObjectMeta;
use object_store::path::Path;

use crate::catalog::{SqlCatalog, TableVersion};
use crate::storage;

/// A data file that belongs to the snapshot; shared with the manifest it stands in.
#[derive(Debug, Clone)]
pub(super) struct LiveFile {
    entry: ManifestEntryRef,
}

impl LiveFile {
    pub(super) fn file(&self) -> &DataFile {
        self.entry.data_file()
    }
}

/// All files of a snapshot. Fails on what would change rows and is not understood.
pub(super) async fn live_files(
    catalog: &SqlCatalog,
    table: &TableVersion,
    snapshot: &Snapshot,
) -> Result<Vec<LiveFile>> {
    let mut files = Vec::new();
    for entry in catalog
        .manifest_list(&table.metadata, snapshot)
        .await?
        .entries()
    {
        let manifest = catalog.manifest(entry).await?;
        if entry.content == ManifestContentType::Deletes {
            refuse_deletes(table, &manifest)?;
            continue;
        }
        for entry in manifest.entries().iter().filter(|e| e.is_alive()) {
            let file = entry.data_file();
            if file.file_format() != DataFileFormat::Parquet {
                return Err(Error::unsupported(format!(
                    "lake table \"{}\" has {} files; only parquet can be read",
                    table.name,
                    file.file_format()
                )));
            }
            files.push(LiveFile {
                entry: Arc::clone(entry),
            });
        }
    }
    Ok(files)
}

fn refuse_deletes(table: &TableVersion, manifest: &Manifest) -> Result<()> {
    let Some(entry) = manifest.entries().iter().find(|e| e.is_alive()) else {
        return Ok(());
    };
    let what = match (entry.content_type(), entry.file_format()) {
        (DataContentType::EqualityDeletes, _) => "equality deletes",
        (_, DataFileFormat::Puffin) => "deletion vectors",
        _ => "position deletes",
    };
    Err(Error::unsupported(format!("lake table \"{}\" has {what}", table.name)).hint(
        "reading row-level deletes is not supported yet; compact the table with the engine that wrote them",
    ))
}

/// Files over at most `partitions` groups of about equal bytes, the largest first.
pub(super) fn distribute(files: &[LiveFile], partitions: usize) -> Vec<Vec<&LiveFile>> {
    let mut largest_first: Vec<&LiveFile> = files.iter().collect();
    largest_first.sort_by_key(|f| Reverse(f.file().file_size_in_bytes()));
    let mut groups = vec![(0, vec![]); partitions.min(files.len())];
    for file in largest_first {
        if let Some(group) = groups.iter_mut().min_by_key(|(bytes, _)| *bytes) {
            group.0 += file.file().file_size_in_bytes();
            group.1.push(file);
        }
    }
    groups.into_iter().map(|(_, group)| group).collect()
}

/// The file as DataFusion scans it.
pub(super) fn partitioned_file(
    file: &LiveFile,
    schema: &SchemaRef,
    columns: &Schema,
) -> Result<PartitionedFile> {
    let path = storage::local_path(file.file().file_path())?;
    let location = Path::from_absolute_path(&path).map_err(|e| {
        Error::new(
            ErrorKind::Corrupt,
            "a data file has a path that cannot be opened",
        )
        .detail(e.to_string())
    })?;
    let meta = ObjectMeta {
        location,
        last_modified: chrono::DateTime::UNIX_EPOCH,
        size: file.file().file_size_in_bytes(),
        e_tag: None,
        version: None,
    };
    let mut partitioned = PartitionedFile::new_from_meta(meta);
    let statistics = statistics(schema, columns, std::slice::from_ref(file));
    partitioned.statistics = Some(Arc::new(statistics));
    Ok(partitioned)
}

/// Row and null counts, which the format promises to be exact. Bounds need only hold, so they are not
/// passed on as minimum and maximum.
pub(super) fn statistics(schema: &SchemaRef, columns: &Schema, files: &[LiveFile]) -> Statistics {
    let rows: u64 = files.iter().map(|f| f.file().record_count()).sum();
    let column_statistics = schema
        .fields()
        .iter()
        .map(|field| {
            let id = columns.field_id_by_name(field.name());
            let nulls: Option<u64> = files
                .iter()
                .map(|f| id.and_then(|id| f.file().null_value_counts().get(&id).copied()))
                .sum();
            ColumnStatistics {
                null_count: nulls.map_or(Precision::Absent, |n| Precision::Exact(n as usize)),
                ..ColumnStatistics::new_unknown()
            }
        })
        .collect();
    Statistics {
        num_rows: Precision::Exact(rows as usize),
        total_byte_size: Precision::Absent,
        column_statistics,
    }
}
