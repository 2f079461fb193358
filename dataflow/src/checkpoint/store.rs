//! Where checkpoints lie: `checkpoints/<id>/worker-<w>` and `checkpoints/<id>/manifest.json` in an
//! object store.
//!
//! An object holds what one worker's state needed at one checkpoint; later manifests refer to pieces of
//! it as long as they are true. Everything read back is verified: the length of each object, and the
//! checksums of each chunk. Damage is `Corrupt`; the caller then tries the checkpoint before.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::buffered::BufWriter;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions};

use super::manifest::{CheckpointManifest, ChunkRef, ObjectId, VERSION};
use super::{RestoredDataflow, RestoredStage};
use crate::env::create_directory;
use crate::error::{Error, ErrorKind, Result};
use crate::plan::RelationId;
use crate::state::{Blob, StoredPart, read_part_of};
use tokio::io::AsyncWriteExt;

/// Below the root.
const FOLDER: &str = "checkpoints";

/// Bytes gathered before they are handed to the store.
const BUFFER: usize = 4 << 20;

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
        _ => return Error::outside(format!("checkpoint storage: {e}")),
    };
    Error::new(kind, format!("checkpoint storage: {e}"))
}

/// The user part of a URL may hold a secret.
fn without_user(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        return url.to_string();
    };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    match authority.rsplit_once('@') {
        Some((_, host)) => format!("{scheme}://…@{host}{path}"),
        None => url.to_string(),
    }
}

/// A directory that cannot be made. Trying again helps where the disk is full or does not answer.
fn no_directory(root: &std::path::Path, e: std::io::Error) -> Error {
    use std::io::ErrorKind as Io;
    let path = root.display();
    let message = match e.kind() {
        Io::AlreadyExists | Io::NotADirectory => {
            format!("checkpoints cannot be kept in {path}: it is, or lies below, a file")
        }
        Io::NotFound
        | Io::PermissionDenied
        | Io::ReadOnlyFilesystem
        | Io::InvalidInput
        | Io::InvalidFilename => format!("checkpoints cannot be kept in {path}: {e}"),
        _ => {
            let error = Error::from(e);
            let message = format!("checkpoints cannot be kept in {path}: {}", error.message);
            return Error { message, ..error };
        }
    };
    Error::invalid(message).hint("name a directory that this server may create and write")
}

fn corrupt(what: &str, id: u64) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("{what} of checkpoint {id} is damaged"),
    )
    .hint("the checkpoint before it is used if there is one")
}

fn object_path(id: ObjectId) -> Path {
    let ObjectId { checkpoint, worker } = id;
    Path::from(format!("{FOLDER}/{checkpoint:012}/worker-{worker}"))
}

/// What a path below `checkpoints/` is: an object, or anything else of a checkpoint.
fn read_path(path: &Path) -> Option<(u64, Option<ObjectId>)> {
    let mut parts = path.parts().skip(1);
    let checkpoint = parts.next()?.as_ref().parse().ok()?;
    let name = parts.next()?;
    let worker = name.as_ref().strip_prefix("worker-");
    let object = worker
        .and_then(|w| w.parse().ok())
        .map(|worker| ObjectId { checkpoint, worker });
    Some((checkpoint, object))
}

fn manifest_path(id: u64) -> Path {
    Path::from(format!("{FOLDER}/{id:012}/manifest.json"))
}

impl CheckpointStore {
    /// At a URL. This build knows those of a disk, `file:///path`; [`Self::over`] takes any store.
    pub fn at(url: &str) -> Result<Self> {
        match url.strip_prefix("file://") {
            Some(path) if path.starts_with('/') => Self::local(PathBuf::from(path)),
            _ => Err(Error::unsupported(format!(
                "checkpoints cannot be kept at \"{}\" by this build",
                without_user(url)
            ))
            .hint("give an absolute path, such as file:///var/lib/millrace/checkpoints")),
        }
    }

    /// In an object store, which keeps what it has accepted.
    pub fn over(store: Arc<dyn ObjectStore>) -> Self {
        Self { store, local: None }
    }

    /// In a directory of the local disk.
    pub fn local(root: PathBuf) -> Result<Self> {
        create_directory(&root.join(FOLDER)).map_err(|e| no_directory(&root, e))?;
        let store = LocalFileSystem::new_with_prefix(&root).map_err(store_error)?;
        Ok(Self {
            store: Arc::new(store),
            local: Some(root),
        })
    }

    /// Writes an object that must not be there. A store that does not answer is asked again; what
    /// it then finds there may be our own.
    async fn create(&self, path: &Path, bytes: Bytes) -> Result<()> {
        let mut tries = Tries::default();
        let mut unknown = false;
        loop {
            let options = PutOptions {
                mode: PutMode::Create,
                ..PutOptions::default()
            };
            let put = self.store.put_opts(path, bytes.clone().into(), options);
            match put.await.map_err(store_error) {
                Ok(_) => break,
                Err(e) if e.kind == ErrorKind::Conflict && unknown => {
                    if self.get(path).await? == bytes {
                        break;
                    }
                    return Err(e);
                }
                Err(e) => {
                    unknown = true;
                    tries.again(e).await?;
                }
            }
        }
        self.sync(path).await
    }

    /// An object store keeps what it has accepted; a disk is told to.
    async fn sync(&self, path: &Path) -> Result<()> {
        let Some(root) = &self.local else {
            return Ok(());
        };
        let (root, file) = (root.clone(), root.join(path.as_ref()));
        // With the entries that lead to it: the store makes the directory of a checkpoint itself.
        tokio::task::spawn_blocking(move || sync_below(&root, &file))
            .await
            .map_err(|e| Error::internal(e.to_string()))??;
        Ok(())
    }

    /// A writer of one object, for a thread that may block. Nothing is there before
    /// [`ObjectWriter::finish`].
    pub fn writer(&self, id: ObjectId) -> ObjectWriter {
        ObjectWriter {
            store: self.clone(),
            path: object_path(id),
            upload: None,
            buffer: Vec::new(),
            runtime: tokio::runtime::Handle::current(),
        }
    }

    /// Writes the manifest if there is none of this id: `Conflict` means somebody else was there.
    pub async fn put_manifest(&self, manifest: &CheckpointManifest) -> Result<()> {
        let body = serde_json::to_vec(manifest).map_err(|e| Error::internal(e.to_string()))?;
        let mut bytes = crc32fast::hash(&body).to_le_bytes().to_vec();
        bytes.extend_from_slice(&body);
        self.create(&manifest_path(manifest.id), bytes.into()).await
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
        let prefix = Path::from(FOLDER);
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
        let mut tries = Tries::default();
        loop {
            let got = match self.store.get(path).await {
                Ok(got) => got.bytes().await,
                Err(e) => Err(e),
            };
            match got.map_err(store_error) {
                Ok(bytes) => return Ok(bytes),
                Err(e) => tries.again(e).await?,
            }
        }
    }

    /// Reads and verifies all state of a checkpoint, by dataflow.
    pub async fn restore(
        &self,
        manifest: &CheckpointManifest,
    ) -> Result<BTreeMap<RelationId, RestoredDataflow>> {
        let mut objects = BTreeMap::new();
        for entry in &manifest.objects {
            let path = object_path(entry.id);
            let object = self.open(&path).await?;
            if object.length() != entry.length {
                return Err(corrupt("an object", manifest.id).detail(path.to_string()));
            }
            objects.insert(entry.id, object);
        }
        let manifest = manifest.clone();
        tokio::task::spawn_blocking(move || assemble(&manifest, &objects))
            .await
            .map_err(|e| Error::internal(e.to_string()))?
    }

    /// An object, of which nothing is read yet.
    async fn open(&self, path: &Path) -> Result<Arc<dyn Blob>> {
        if let Some(root) = &self.local {
            return Ok(Arc::new(LocalObject::open(&root.join(path.as_ref()))?));
        }
        let meta = self.store.head(path).await.map_err(store_error)?;
        Ok(Arc::new(RemoteObject {
            store: Arc::clone(&self.store),
            path: path.clone(),
            length: meta.size,
            runtime: tokio::runtime::Handle::current(),
        }))
    }

    /// Removes the checkpoints below the newest of `keep` that are not among them, except the
    /// `objects` they lent; with them, what uploads have left behind that never ended.
    pub async fn remove_all_but(&self, keep: &[u64], objects: &BTreeSet<ObjectId>) -> Result<()> {
        let prefix = Path::from(FOLDER);
        // A checkpoint under way has a larger id than any kept one.
        let newest = keep.iter().max().copied().unwrap_or(0);
        let mut list = self.store.list(Some(&prefix));
        while let Some(meta) = list.next().await {
            let meta = meta.map_err(store_error)?;
            let garbage = match read_path(&meta.location) {
                Some((id, _)) if id > newest => false,
                Some((_, Some(object))) => !objects.contains(&object),
                Some((id, None)) => !keep.contains(&id),
                None => false,
            };
            if garbage {
                crate::env::failpoint("ckpt.gc.before_delete");
                self.store
                    .delete(&meta.location)
                    .await
                    .map_err(store_error)?;
                if crate::env::failpoint("ckpt.gc.mid_delete") {
                    return Err(Error::unavailable("failpoint ckpt.gc.mid_delete"));
                }
            }
        }
        if let Some(root) = self.local.clone() {
            tokio::task::spawn_blocking(move || tidy(&root.join(FOLDER), newest))
                .await
                .map_err(|e| Error::internal(e.to_string()))?;
        }
        Ok(())
    }
}

/// What a disk keeps that an object store does not: files that were being uploaded when their server
/// was killed (whose names hold a `#` and are not listed), and empty directories. Of checkpoints up to
/// `newest`; those after it may be under way. What cannot be removed now is tried the next time.
fn tidy(folder: &std::path::Path, newest: u64) {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    for checkpoint in entries {
        let id = checkpoint.file_name().to_str().and_then(|n| n.parse().ok());
        if id.is_none_or(|id: u64| id > newest) {
            continue;
        }
        let files = std::fs::read_dir(checkpoint.path());
        for file in files.into_iter().flatten().flatten() {
            if file.file_name().to_string_lossy().contains('#') {
                let _ = std::fs::remove_file(file.path());
            }
        }
        let _ = std::fs::remove_dir(checkpoint.path());
    }
}

/// Makes a file and its entries in the directories from `root` down durable.
fn sync_below(root: &std::path::Path, file: &std::path::Path) -> std::io::Result<()> {
    for path in file.ancestors().take_while(|a| a.starts_with(root)) {
        std::fs::File::open(path)?.sync_all()?;
    }
    Ok(())
}

/// A store that does not answer is asked a few times before that is an error.
#[derive(Default)]
struct Tries(u32);

impl Tries {
    /// Waits, or gives the error back.
    async fn again(&mut self, e: Error) -> Result<()> {
        if e.kind != ErrorKind::Unavailable || e.code == "53100" || self.0 == 4 {
            return Err(e);
        }
        tokio::time::sleep(Duration::from_millis(20 << self.0)).await;
        self.0 += 1;
        Ok(())
    }
}

/// Chunks of a manifest to the state of dataflows.
fn assemble(
    manifest: &CheckpointManifest,
    objects: &BTreeMap<ObjectId, Arc<dyn Blob>>,
) -> Result<BTreeMap<RelationId, RestoredDataflow>> {
    let read = |chunk: &ChunkRef| -> Result<StoredPart> {
        let end = chunk.offset.saturating_add(chunk.length);
        let object = objects.get(&chunk.object).filter(|o| end <= o.length());
        let object = object.ok_or_else(|| corrupt("the manifest", manifest.id))?;
        Ok(read_part_of(object, chunk.offset, end)?.0)
    };
    let mut dataflows = BTreeMap::<RelationId, RestoredDataflow>::new();
    for entry in &manifest.stages {
        let dataflow = dataflows.entry(entry.relation).or_default();
        let stage: &mut RestoredStage = dataflow.stages.entry(entry.stage).or_default();
        for part in &entry.parts {
            let mut chunks = part.chunks.iter();
            let first = chunks
                .next()
                .ok_or_else(|| corrupt("the manifest", manifest.id))?;
            let mut stored = read(first)?;
            for chunk in chunks {
                stored.push(read(chunk)?)?;
            }
            stage.parts.push(stored);
        }
    }
    Ok(dataflows)
}

/// An object on the local disk. It stays readable when its name is removed.
#[derive(Debug)]
struct LocalObject {
    file: std::fs::File,
    length: u64,
}

impl LocalObject {
    fn open(path: &std::path::Path) -> Result<Self> {
        let failed = |e: std::io::Error| {
            let kind = match e.kind() {
                std::io::ErrorKind::NotFound => ErrorKind::NotFound,
                _ => ErrorKind::Unavailable,
            };
            Error::new(kind, format!("checkpoint storage: {e}")).detail(path.display().to_string())
        };
        let file = std::fs::File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        Ok(Self { file, length })
    }
}

impl Blob for LocalObject {
    fn length(&self) -> u64 {
        self.length
    }
    fn read(&self, at: u64, length: usize) -> Result<Bytes> {
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, at)?;
        Ok(bytes.into())
    }
}

/// An object of a store that is asked over the network; for threads that may block.
#[derive(Debug)]
struct RemoteObject {
    store: Arc<dyn ObjectStore>,
    path: Path,
    length: u64,
    runtime: tokio::runtime::Handle,
}

impl Blob for RemoteObject {
    fn length(&self) -> u64 {
        self.length
    }
    /// A store that does not answer is asked until it does: whoever restores cannot go on without.
    fn read(&self, at: u64, length: usize) -> Result<Bytes> {
        let range = at..at + length as u64;
        let mut pause = Duration::from_millis(20);
        loop {
            let read = self.store.get_range(&self.path, range.clone());
            match self.runtime.block_on(read).map_err(store_error) {
                Err(error) if error.kind == ErrorKind::Unavailable => {
                    tracing::warn!(%error, "a checkpoint is read once more");
                    std::thread::sleep(pause);
                    pause = (2 * pause).min(Duration::from_secs(5));
                }
                done => return done,
            }
        }
    }
}

/// See [`CheckpointStore::writer`].
#[derive(Debug)]
pub struct ObjectWriter {
    store: CheckpointStore,
    path: Path,
    /// Begun with the first full buffer.
    upload: Option<BufWriter>,
    buffer: Vec<u8>,
    runtime: tokio::runtime::Handle,
}

impl ObjectWriter {
    fn flush_buffer(&mut self) -> std::io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        crate::env::failpoint("ckpt.part.mid_upload");
        let store = Arc::clone(&self.store.store);
        let upload = self
            .upload
            .get_or_insert_with(|| BufWriter::new(store, self.path.clone()));
        let bytes = Bytes::from(std::mem::take(&mut self.buffer));
        Ok(self.runtime.block_on(upload.put(bytes))?)
    }

    /// Makes the object durable; an empty one is not made.
    pub fn finish(mut self) -> Result<()> {
        self.flush_buffer()?;
        if let Some(mut upload) = self.upload.take() {
            self.runtime.block_on(async {
                upload.shutdown().await?;
                self.store.sync(&self.path).await
            })?;
        }
        Ok(())
    }
}

impl Write for ObjectWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= BUFFER {
            self.flush_buffer()?;
        }
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.flush_buffer()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_an_upload_has_left_behind_goes_with_the_next_checkpoint() {
        let dir = tempfile::tempdir().expect("a folder");
        let store = CheckpointStore::local(dir.path().to_path_buf()).expect("a store");
        let of = |id: u64| dir.path().join(FOLDER).join(format!("{id:012}"));
        for id in [3, 4, 5] {
            std::fs::create_dir(of(id)).expect("made");
            std::fs::write(of(id).join("worker-0#1"), "half").expect("written");
        }
        let object = ObjectId {
            checkpoint: 4,
            worker: 0,
        };
        std::fs::write(of(4).join("worker-0"), "whole").expect("written");
        let needed = BTreeSet::from([object]);
        store.remove_all_but(&[4], &needed).await.expect("removed");
        assert!(!of(3).exists());
        assert!(!of(4).join("worker-0#1").exists());
        assert!(of(4).join("worker-0").exists());
        assert!(of(5).join("worker-0#1").exists(), "it may be under way");
    }
}
