//! Where checkpoints lie: `checkpoints/<id>/worker-<w>` and `checkpoints/<id>/manifest.json` in an
//! object store.
//!
//! Everything read back is verified: length and CRC-32 of each object, and the checksums inside the
//! parts. Damage is `Corrupt`; the caller then tries the checkpoint before.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions};

use super::manifest::{CheckpointManifest, ObjectEntry, VERSION};
use super::{RestoredDataflow, RestoredStage};
use crate::error::{Error, ErrorKind, Result};
use crate::plan::RelationId;
use crate::state::read_part;

/// See the module.
#[derive(Debug, Clone)]
pub struct CheckpointStore {
    store: Arc<dyn ObjectStore>,
    /// Root on the local disk, whose files are synced after writing.
    local: Option<PathBuf>,
}

fn store_error(e: object_store::Error) -> Error {
    let kind = match &e {
        object_store::Error::NotFound { .. } => ErrorKind::NotFound,
        object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. } => {
            ErrorKind::Conflict
        }
        _ => ErrorKind::Unavailable,
    };
    Error::new(kind, format!("checkpoint storage: {e}"))
}

fn corrupt(what: &str, id: u64) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("{what} of checkpoint {id} is damaged"),
    )
    .hint("the checkpoint before it is used if there is one")
}

fn object_path(id: u64, worker: usize) -> String {
    format!("checkpoints/{id:012}/worker-{worker}")
}

fn manifest_path(id: u64) -> Path {
    Path::from(format!("checkpoints/{id:012}/manifest.json"))
}

impl CheckpointStore {
    /// In a directory of the local disk.
    pub fn local(root: PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&root)?;
        let store = LocalFileSystem::new_with_prefix(&root).map_err(store_error)?;
        Ok(Self {
            store: Arc::new(store),
            local: Some(root),
        })
    }

    async fn put(&self, path: &Path, bytes: Bytes, mode: PutMode) -> Result<()> {
        self.store
            .put_opts(
                path,
                bytes.into(),
                PutOptions {
                    mode,
                    ..PutOptions::default()
                },
            )
            .await
            .map_err(store_error)?;
        if let Some(root) = &self.local {
            let file = root.join(path.as_ref());
            tokio::task::spawn_blocking(move || -> std::io::Result<()> {
                std::fs::File::open(&file)?.sync_all()?;
                match file.parent() {
                    Some(dir) => std::fs::File::open(dir)?.sync_all(),
                    None => Ok(()),
                }
            })
            .await
            .map_err(|e| Error::internal(e.to_string()))??;
        }
        Ok(())
    }

    /// Writes the object of one worker.
    pub async fn put_object(&self, id: u64, worker: usize, bytes: Vec<u8>) -> Result<ObjectEntry> {
        let path = object_path(id, worker);
        let entry = ObjectEntry {
            path: path.clone(),
            length: bytes.len() as u64,
            crc32: crc32fast::hash(&bytes),
        };
        self.put(&Path::from(path), bytes.into(), PutMode::Overwrite)
            .await?;
        Ok(entry)
    }

    /// Writes the manifest if there is none of this id: `Conflict` means somebody else was there.
    pub async fn put_manifest(&self, manifest: &CheckpointManifest) -> Result<()> {
        let body = serde_json::to_vec(manifest).map_err(|e| Error::internal(e.to_string()))?;
        let mut bytes = crc32fast::hash(&body).to_le_bytes().to_vec();
        bytes.extend_from_slice(&body);
        self.put(&manifest_path(manifest.id), bytes.into(), PutMode::Create)
            .await
    }

    pub async fn manifest(&self, id: u64) -> Result<CheckpointManifest> {
        let bytes = self.get(&manifest_path(id)).await?;
        let (crc, body) = bytes
            .split_at_checked(4)
            .ok_or_else(|| corrupt("the manifest", id))?;
        if crc32fast::hash(body).to_le_bytes() != crc {
            return Err(corrupt("the manifest", id));
        }
        let manifest: CheckpointManifest = serde_json::from_slice(body)
            .map_err(|e| corrupt("the manifest", id).detail(e.to_string()))?;
        if manifest.version > VERSION {
            return Err(Error::unsupported(format!(
                "checkpoint {id} was written by a newer version (format {})",
                manifest.version
            )));
        }
        Ok(manifest)
    }

    /// Ids of checkpoints that have a manifest, ascending.
    pub async fn list(&self) -> Result<Vec<u64>> {
        let prefix = Path::from("checkpoints");
        let metas: Vec<_> = self
            .store
            .list(Some(&prefix))
            .try_collect()
            .await
            .map_err(store_error)?;
        let mut ids: Vec<u64> = metas
            .iter()
            .filter(|m| m.location.filename() == Some("manifest.json"))
            .filter_map(|m| m.location.parts().nth(1)?.as_ref().parse().ok())
            .collect();
        ids.sort_unstable();
        Ok(ids)
    }

    async fn get(&self, path: &Path) -> Result<Bytes> {
        self.store
            .get(path)
            .await
            .map_err(store_error)?
            .bytes()
            .await
            .map_err(store_error)
    }

    /// Reads and verifies all state of a checkpoint, by dataflow.
    pub async fn restore(
        &self,
        manifest: &CheckpointManifest,
    ) -> Result<std::collections::BTreeMap<RelationId, RestoredDataflow>> {
        let mut objects = Vec::new();
        for entry in &manifest.objects {
            let bytes = self.get(&Path::from(entry.path.as_str())).await?;
            if bytes.len() as u64 != entry.length || crc32fast::hash(&bytes) != entry.crc32 {
                return Err(corrupt("an object", manifest.id).detail(entry.path.clone()));
            }
            objects.push(bytes);
        }
        let mut dataflows = std::collections::BTreeMap::<RelationId, RestoredDataflow>::new();
        for entry in &manifest.stages {
            let object = objects
                .get(entry.worker)
                .ok_or_else(|| corrupt("the manifest", manifest.id))?;
            let stage: &mut RestoredStage = dataflows
                .entry(entry.relation)
                .or_default()
                .stages
                .entry(entry.stage)
                .or_default();
            for part in &entry.parts {
                let start = part.offset as usize;
                let end = start + part.length as usize;
                if end > object.len() {
                    return Err(corrupt("the manifest", manifest.id));
                }
                stage.parts.push(read_part(&object.slice(start..end))?.0);
            }
        }
        Ok(dataflows)
    }

    /// Removes checkpoints other than `keep`.
    pub async fn remove_all_but(&self, keep: &[u64]) -> Result<()> {
        let prefix = Path::from("checkpoints");
        let mut list = self.store.list(Some(&prefix));
        while let Some(meta) = list.next().await {
            let meta = meta.map_err(store_error)?;
            let id = meta
                .location
                .parts()
                .nth(1)
                .and_then(|p| p.as_ref().parse::<u64>().ok());
            // A checkpoint under way has a larger id than any kept one.
            let newest = keep.iter().max().copied().unwrap_or(0);
            if id.is_some_and(|id| !keep.contains(&id) && id < newest) {
                crate::env::failpoint("ckpt.gc.before_delete");
                self.store
                    .delete(&meta.location)
                    .await
                    .map_err(store_error)?;
            }
        }
        if let Some(root) = &self.local {
            // An object store has no directories; a disk keeps the empty ones.
            if let Ok(entries) = std::fs::read_dir(root.join("checkpoints")) {
                for entry in entries.flatten() {
                    let _ = std::fs::remove_dir(entry.path());
                }
            }
        }
        Ok(())
    }
}
