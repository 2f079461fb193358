//! Publishes closed files through the lake's committer.

use async_trait::async_trait;
use iceberg::spec::{DataFile, deserialize_data_file_from_json};
use millrace_dataflow::env;
use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_dataflow::sink::{Committable, Committer};
use millrace_dataflow::time::Tick;
use millrace_lake::{TableCommitter, TableVersion, storage};

/// Epochs without rows are committed this rarely: each commit adds a snapshot that readers and upkeep
/// have to carry. The next epoch with rows covers those left out.
const EMPTY_COMMIT_INTERVAL_MS: u64 = 10 * 60 * 1_000;

pub(super) struct IcebergCommitter {
    inner: TableCommitter,
    table: TableVersion,
    committed_at_ms: u64,
    /// What the table itself says.
    landed: Tick,
}

impl IcebergCommitter {
    pub(super) fn new(inner: TableCommitter, table: TableVersion) -> Self {
        Self {
            inner,
            table,
            committed_at_ms: env::now_ms(),
            landed: 0,
        }
    }

    /// The file that a worker described, which must still be there.
    fn data_file(&self, committable: &Committable) -> Result<DataFile> {
        let metadata = &self.table.metadata;
        let corrupt = |why: String| {
            Error::new(
                ErrorKind::Corrupt,
                format!(
                    "a file prepared for lake table \"{}\" cannot be committed",
                    self.table.name
                ),
            )
            .detail(why)
        };
        let text = std::str::from_utf8(&committable.payload).map_err(|e| corrupt(e.to_string()))?;
        let file = deserialize_data_file_from_json(
            text,
            metadata.default_partition_spec_id(),
            metadata.default_partition_type(),
            metadata.current_schema(),
        )
        .map_err(|e| corrupt(e.to_string()))?;
        let path = storage::local_path(file.file_path())?;
        match std::fs::metadata(&path) {
            Ok(found) if found.len() == file.file_size_in_bytes() => Ok(file),
            Ok(found) => Err(corrupt(format!(
                "\"{}\" has {} bytes instead of {}",
                path.display(),
                found.len(),
                file.file_size_in_bytes()
            ))),
            Err(e) => Err(corrupt(format!("\"{}\": {e}", path.display()))),
        }
    }
}

#[async_trait]
impl Committer for IcebergCommitter {
    async fn frontier(&mut self) -> Result<Option<Tick>> {
        let frontier = self.inner.frontier().await?;
        self.landed = frontier.unwrap_or(0);
        Ok(frontier)
    }

    async fn commit(
        &mut self,
        lower: Tick,
        upper: Tick,
        committables: &[Committable],
    ) -> Result<Tick> {
        if let Some(stray) = committables
            .iter()
            .find(|c| c.lower < lower || c.upper > upper)
        {
            return Err(Error::internal(format!(
                "a file of [{}, {}) was given to the epoch [{lower}, {upper})",
                stray.lower, stray.upper
            )));
        }
        let now = env::now_ms();
        let since = now.saturating_sub(self.committed_at_ms);
        if committables.is_empty() && since < EMPTY_COMMIT_INTERVAL_MS {
            self.inner.skip(lower, upper)?;
            return Ok(self.landed);
        }
        let files: Vec<DataFile> = committables
            .iter()
            .map(|c| self.data_file(c))
            .collect::<Result<_>>()?;
        self.inner.commit(lower, upper, &files).await?;
        self.committed_at_ms = now;
        self.landed = upper;
        Ok(upper)
    }
}
