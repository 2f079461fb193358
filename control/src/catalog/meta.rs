//! What the engine asks of the metadata: the checkpoint pointer.

use async_trait::async_trait;
use millrace_dataflow::engine::Meta;
use millrace_dataflow::error::Result;

use super::SqliteCatalog;

#[async_trait]
impl Meta for SqliteCatalog {
    async fn latest_checkpoint(&self) -> Result<Option<u64>> {
        Self::latest_checkpoint(self).await
    }

    async fn move_latest_checkpoint(
        &self,
        incarnation: u64,
        expected: Option<u64>,
        id: u64,
    ) -> Result<bool> {
        Self::move_latest_checkpoint(self, incarnation, expected, id).await
    }
}
