//! Builds the next version of a table: a snapshot that appends files.
//!
//! # Contract
//!
//! * Everything is written and durable when [`append`] returns; nothing refers to it until the
//!   catalog's pointer moves to [`Staged::location`].
//! * The data files themselves must be durable before.
//! * A commit always adds a snapshot, also when it adds no file: a property alone would not be seen by
//!   those who compare snapshots.

use std::collections::{HashMap, HashSet};
use std::str::FromStr;

use iceberg::MetadataLocation;
use iceberg::io::FileIO;
use iceberg::spec::{
    DataFile, FormatVersion, MAIN_BRANCH, ManifestContentType, ManifestFile, ManifestListWriter,
    ManifestWriter, ManifestWriterBuilder, Operation, PartitionSpec, Snapshot,
    SnapshotSummaryCollector, Summary, TableMetadata,
};
use millrace_dataflow::env;
use millrace_dataflow::error::{Error, Result};

use crate::catalog::{SqlCatalog, TableVersion};
use crate::{error, storage};

/// Small manifests in a list before they are merged into one. A list is read by every query and
/// rewritten by every commit; merging costs one pass over the entries.
const MANIFESTS_MAX: usize = 100;
/// A manifest with more files than this is left alone, so that merging stays cheap for ever.
const MERGED_FILES_MAX: u32 = 4096;

/// The property of a table that asks for the deletion of metadata files nobody lists any more.
pub const DELETE_OLD_METADATA: &str = "write.metadata.delete-after-commit.enabled";

/// A version that is written but not yet current.
#[derive(Debug)]
pub struct Staged {
    pub metadata: TableMetadata,
    /// The metadata file.
    pub location: String,
    /// Files written for it, data files not among them. Of no use if the commit fails.
    pub written: Vec<String>,
    /// Metadata files that the table no longer lists. Of no use if the commit succeeds.
    pub outdated: Vec<String>,
}

/// Refuses tables that this module cannot append to.
pub fn check_appendable(table: &TableVersion) -> Result<()> {
    let name = &table.name;
    if table.metadata.format_version() == FormatVersion::V1 {
        return Err(
            Error::unsupported(format!("lake table \"{name}\" has format version 1"))
                .hint("upgrade the table to format version 2"),
        );
    }
    if !table.metadata.default_partition_spec().is_unpartitioned() {
        return Err(
            Error::unsupported(format!("lake table \"{name}\" is partitioned"))
                .hint("writing to partitioned tables is not supported yet; write to another table"),
        );
    }
    Ok(())
}

/// Appends `files`, with `summary` in the snapshot and `properties` in the table.
pub async fn append(
    catalog: &SqlCatalog,
    table: &TableVersion,
    files: &[DataFile],
    summary: HashMap<String, String>,
    properties: HashMap<String, String>,
) -> Result<Staged> {
    check_appendable(table)?;
    let mut build = Build::new(catalog.io(), &table.metadata);
    let mut manifests = match table.metadata.current_snapshot() {
        Some(current) => {
            let list = catalog.manifest_list(&table.metadata, current).await?;
            let kept = list
                .consume_entries()
                .into_iter()
                .filter(is_needed)
                .collect();
            build.merge(catalog, kept).await?
        }
        None => vec![],
    };
    if !files.is_empty() {
        manifests.push(build.new_manifest(files).await?);
    }
    if env::failpoint("sink.manifest.after_write") {
        return Err(Error::unavailable("failpoint sink.manifest.after_write"));
    }
    let snapshot = build.snapshot(manifests, summary, files).await?;
    build.metadata(table, snapshot, properties).await
}

/// A manifest without live entries says nothing.
fn is_needed(manifest: &ManifestFile) -> bool {
    let count = |files: Option<u32>| files.unwrap_or(1);
    count(manifest.added_files_count) + count(manifest.existing_files_count) > 0
}

struct Build<'a> {
    io: &'a FileIO,
    metadata: &'a TableMetadata,
    snapshot_id: i64,
    uuid: uuid::Uuid,
    written: Vec<String>,
}

impl<'a> Build<'a> {
    fn new(io: &'a FileIO, metadata: &'a TableMetadata) -> Self {
        let snapshot_id = (env::random_id().as_u128() as i64) & i64::MAX;
        Self {
            io,
            metadata,
            snapshot_id,
            uuid: env::random_id(),
            written: vec![],
        }
    }

    fn v3(&self) -> bool {
        self.metadata.format_version() == FormatVersion::V3
    }

    fn manifest_writer(&mut self, spec: PartitionSpec) -> Result<ManifestWriter> {
        let name = format!("{}-m{}.avro", self.uuid, self.written.len());
        let location = format!("{}/metadata/{name}", self.metadata.location());
        let output = self
            .io
            .new_output(&location)
            .map_err(|e| error::iceberg("write a manifest", e))?;
        self.written.push(location);
        let schema = self.metadata.current_schema().clone();
        let builder = ManifestWriterBuilder::new(output, Some(self.snapshot_id), schema, spec);
        Ok(if self.v3() {
            builder.build_v3_data()
        } else {
            builder.build_v2_data()
        })
    }

    async fn new_manifest(&mut self, files: &[DataFile]) -> Result<ManifestFile> {
        let spec = self.metadata.default_partition_spec().as_ref().clone();
        let mut writer = self.manifest_writer(spec)?;
        let write = async {
            for file in files {
                // -1: the file takes the sequence number of this snapshot.
                writer.add_file(file.clone(), -1)?;
            }
            writer.write_manifest_file().await
        };
        write
            .await
            .map_err(|e| error::iceberg("write a manifest", e))
    }

    /// Merges the manifests of the table's own partition layout into one when there are too many.
    async fn merge(
        &mut self,
        catalog: &SqlCatalog,
        manifests: Vec<ManifestFile>,
    ) -> Result<Vec<ManifestFile>> {
        // Version 3 entries carry row ids that would have to be kept; such tables are not ours yet.
        let spec = self.metadata.default_partition_spec().as_ref().clone();
        let is_small = |m: &ManifestFile| {
            let files = m.added_files_count.unwrap_or(u32::MAX);
            let files = files.saturating_add(m.existing_files_count.unwrap_or(u32::MAX));
            m.content == ManifestContentType::Data
                && m.partition_spec_id == spec.spec_id()
                && files <= MERGED_FILES_MAX
        };
        if self.v3() || manifests.iter().filter(|m| is_small(m)).count() < MANIFESTS_MAX {
            return Ok(manifests);
        }
        let (merged, mut kept): (Vec<_>, Vec<_>) = manifests.into_iter().partition(is_small);
        let mut writer = self.manifest_writer(spec.clone())?;
        for manifest in &merged {
            for entry in catalog
                .manifest(manifest)
                .await?
                .entries()
                .iter()
                .filter(|e| e.is_alive())
            {
                let (Some(snapshot), Some(sequence)) =
                    (entry.snapshot_id(), entry.sequence_number())
                else {
                    return Err(Error::internal(
                        "a manifest entry came without its inherited numbers",
                    ));
                };
                writer
                    .add_existing_file(
                        entry.data_file().clone(),
                        snapshot,
                        sequence,
                        entry.file_sequence_number,
                    )
                    .map_err(|e| error::iceberg("merge manifests", e))?;
            }
        }
        let written = writer.write_manifest_file().await;
        kept.push(written.map_err(|e| error::iceberg("merge manifests", e))?);
        Ok(kept)
    }

    async fn snapshot(
        &mut self,
        manifests: Vec<ManifestFile>,
        summary: HashMap<String, String>,
        files: &[DataFile],
    ) -> Result<Snapshot> {
        let metadata = self.metadata;
        let (parent, sequence) = (
            metadata.current_snapshot_id(),
            metadata.next_sequence_number(),
        );
        let list = format!(
            "{}/metadata/snap-{}-0-{}.avro",
            metadata.location(),
            self.snapshot_id,
            self.uuid
        );
        let write = async {
            let file = self.io.new_output(&list)?.writer().await?;
            let mut writer = if self.v3() {
                let next_row = Some(metadata.next_row_id());
                ManifestListWriter::v3(file, self.snapshot_id, parent, sequence, next_row)
            } else {
                ManifestListWriter::v2(file, self.snapshot_id, parent, sequence)
            };
            writer.add_manifests(manifests.into_iter())?;
            let next_row = writer.next_row_id();
            writer.close().await?;
            Ok(next_row)
        };
        let next_row = write
            .await
            .map_err(|e| error::iceberg("write a manifest list", e))?;
        self.written.push(list.clone());
        let now = env::now_ms() as i64;
        let builder = Snapshot::builder()
            .with_snapshot_id(self.snapshot_id)
            .with_parent_snapshot_id(parent)
            .with_sequence_number(sequence)
            // The clock may have been set back; a table's history may not.
            .with_timestamp_ms(now.max(metadata.last_updated_ms()))
            .with_manifest_list(list)
            .with_summary(Summary {
                operation: Operation::Append,
                additional_properties: self.summary(summary, files),
            })
            .with_schema_id(metadata.current_schema_id());
        Ok(match next_row {
            Some(next) => builder
                .with_row_range(metadata.next_row_id(), next - metadata.next_row_id())
                .build(),
            None => builder.build(),
        })
    }

    /// What was added, and the totals, which are ours to compute.
    fn summary(
        &self,
        mut entries: HashMap<String, String>,
        files: &[DataFile],
    ) -> HashMap<String, String> {
        let mut collector = SnapshotSummaryCollector::default();
        for file in files {
            let spec = self.metadata.default_partition_spec().clone();
            collector.add_file(file, self.metadata.current_schema().clone(), spec);
        }
        entries.extend(collector.build());
        let number = |map: &HashMap<String, String>, key: &str| {
            map.get(key)
                .and_then(|text| text.parse::<u64>().ok())
                .unwrap_or(0)
        };
        let before = self.metadata.current_snapshot();
        for (total, added) in [
            ("total-data-files", "added-data-files"),
            ("total-records", "added-records"),
            ("total-files-size", "added-files-size"),
            ("total-delete-files", "added-delete-files"),
            ("total-position-deletes", "added-position-deletes"),
            ("total-equality-deletes", "added-equality-deletes"),
        ] {
            let base = before.map_or(0, |s| number(&s.summary().additional_properties, total));
            let sum = base + number(&entries, added);
            entries.insert(total.to_string(), sum.to_string());
        }
        entries
    }

    async fn metadata(
        mut self,
        table: &TableVersion,
        snapshot: Snapshot,
        properties: HashMap<String, String>,
    ) -> Result<Staged> {
        let metadata = self
            .metadata
            .clone()
            .into_builder(Some(table.location.clone()))
            .set_branch_snapshot(snapshot, MAIN_BRANCH)
            .and_then(|builder| builder.set_properties(properties))
            .and_then(|builder| builder.build())
            .map_err(|e| error::iceberg("build the next version of a table", e))?
            .metadata;
        let file = match MetadataLocation::from_str(&table.location) {
            Ok(location) => location.with_next_version().with_new_metadata(&metadata),
            // Somebody else's way of naming metadata files; ours is as good.
            Err(_) => MetadataLocation::new_with_metadata(metadata.location(), &metadata),
        };
        metadata
            .write_to(self.io, &file)
            .await
            .map_err(|e| error::iceberg("write a metadata file", e))?;
        let location = file.to_string();
        self.written.push(location.clone());
        storage::sync(&self.written).await?;
        let outdated = outdated(self.metadata, &metadata);
        Ok(Staged {
            metadata,
            location,
            written: self.written,
            outdated,
        })
    }
}

/// Metadata files listed before and not after, if the table asks for their deletion.
fn outdated(before: &TableMetadata, after: &TableMetadata) -> Vec<String> {
    if after
        .properties()
        .get(DELETE_OLD_METADATA)
        .map(String::as_str)
        != Some("true")
    {
        return vec![];
    }
    let listed: HashSet<&str> = after
        .metadata_log()
        .iter()
        .map(|log| log.metadata_file.as_str())
        .collect();
    let before = before.metadata_log().iter().map(|log| &log.metadata_file);
    before
        .filter(|file| !listed.contains(file.as_str()))
        .cloned()
        .collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Adds a delete file as another engine would; gives the location of the new version.
    pub(crate) async fn append_deletes(
        catalog: &SqlCatalog,
        table: &TableVersion,
        file: DataFile,
    ) -> String {
        let mut build = Build::new(catalog.io(), &table.metadata);
        let current = table.metadata.current_snapshot().expect("a snapshot");
        let list = catalog
            .manifest_list(&table.metadata, current)
            .await
            .expect("a list");
        let mut manifests: Vec<_> = list.consume_entries().into_iter().collect();
        let location = format!("{}/metadata/deletes-m0.avro", table.metadata.location());
        let output = catalog.io().new_output(&location).expect("a file");
        let mut writer = ManifestWriterBuilder::new(
            output,
            Some(build.snapshot_id),
            table.metadata.current_schema().clone(),
            table.metadata.default_partition_spec().as_ref().clone(),
        )
        .build_v2_deletes();
        writer.add_file(file, -1).expect("an entry");
        manifests.push(writer.write_manifest_file().await.expect("a manifest"));
        let snapshot = build
            .snapshot(manifests, HashMap::new(), &[])
            .await
            .expect("a snapshot");
        build
            .metadata(table, snapshot, HashMap::new())
            .await
            .expect("metadata")
            .location
    }
}
