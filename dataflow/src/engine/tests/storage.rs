//! Checkpoints that are damaged, and a store that misbehaves.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path as FilePath;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result as StoreResult,
};

use super::*;

fn copy(from: &FilePath, to: &FilePath) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder") {
        let path = entry.expect("an entry").path();
        let target = to.join(path.file_name().expect("a name"));
        if path.is_dir() {
            copy(&path, &target);
        } else {
            std::fs::copy(&path, target).expect("copies");
        }
    }
}

impl Bed {
    /// The same as it lies there, for a life of its own.
    fn copy(&self) -> Self {
        let dir = tempfile::tempdir().expect("dir");
        copy(self.dir.path(), dir.path());
        let latest = *lock(&self.meta.0);
        Self {
            dir,
            meta: Arc::new(TestMeta(Mutex::new(latest), AtomicU64::new(0))),
            mood: Arc::default(),
            available: Arc::clone(&self.available),
            destination: Arc::default(),
            starts: AtomicU64::new(self.starts.load(Ordering::SeqCst)),
            store: None,
            failed: BTreeMap::new(),
        }
    }
}

/// A bed with two checkpoints of one view, and their ids.
async fn two_checkpoints() -> (Bed, [u64; 2]) {
    let bed = Bed::new();
    let engine = bed.start(1, Vec::new()).await;
    for item in [bed.source(u64::MAX), divisible(10, 1, 2)] {
        engine.create(item).await.expect("creates");
    }
    let mut ids = [0; 2];
    for (i, id) in ids.iter_mut().enumerate() {
        let rows = 500 * (i as u64 + 1);
        bed.available.store(rows, Ordering::SeqCst);
        bound(&engine, rows).await;
        *id = engine.checkpoint().await.expect("checkpoint");
    }
    let _ = numbers(&engine, 10).await;
    engine.ask(Request::Stop).expect("runs");
    (bed, ids)
}

type Damage = (&'static str, fn(&FilePath));

fn change(path: &FilePath, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).expect("it is there");
    change(&mut bytes);
    std::fs::write(path, bytes).expect("writes");
}

const DAMAGES: &[Damage] = &[
    ("flipped at the front", |p| change(p, |b| b[0] ^= 1)),
    ("flipped in the middle", |p| {
        change(p, |b| {
            let middle = b.len() / 2;
            b[middle] ^= 0x40;
        });
    }),
    ("flipped at the end", |p| {
        change(p, |b| *b.last_mut().expect("not empty") ^= 0x80);
    }),
    ("cut in half", |p| change(p, |b| b.truncate(b.len() / 2))),
    ("short of a byte", |p| {
        change(p, |b| b.truncate(b.len() - 1))
    }),
    ("empty", |p| change(p, Vec::clear)),
    ("torn", |p| {
        change(p, |b| {
            let middle = b.len() / 2;
            b[middle..].fill(0);
        });
    }),
    ("longer", |p| change(p, |b| b.extend([0; 9]))),
    ("missing", |p| std::fs::remove_file(p).expect("removes")),
];

fn file(bed: &Bed, checkpoint: u64, name: &str) -> PathBuf {
    let dir = bed.dir.path();
    dir.join(format!("checkpoints/{checkpoint:012}/{name}"))
}

#[test]
fn whatever_is_damaged_the_checkpoint_before_is_used() {
    runtime().block_on(async {
        let (bed, [_, newest]) = two_checkpoints().await;
        let items = || vec![bed.source(u64::MAX), divisible(10, 1, 2)];
        for name in ["manifest.json", "worker-0"] {
            for (how, damage) in DAMAGES {
                let bed = bed.copy();
                damage(&file(&bed, newest, name));
                let engine = bed.start(2, items()).await;
                let found = numbers(&engine, 10).await;
                assert_eq!(found, expect(1_000, 2), "{name} {how}");
                // It goes on from there, and the next start needs nothing that is damaged.
                engine.checkpoint().await.expect("checkpoint");
                engine.ask(Request::Stop).expect("runs");
                let engine = bed.start(1, items()).await;
                assert_eq!(numbers(&engine, 10).await, expect(1_000, 2), "{name} {how}");
                engine.stop().await.expect("stops");
            }
        }
    });
}

#[test]
fn without_any_good_checkpoint_nothing_starts() {
    runtime().block_on(async {
        let (bed, ids) = two_checkpoints().await;
        for (how, damage) in DAMAGES {
            let bed = bed.copy();
            for id in ids {
                damage(&file(&bed, id, "manifest.json"));
            }
            let error = bed.try_start(1, Vec::new()).await.expect_err(how);
            assert!(
                matches!(error.kind, ErrorKind::Corrupt | ErrorKind::NotFound),
                "{how}: {error}"
            );
        }
    });
}

#[test]
fn a_newer_format_is_refused() {
    runtime().block_on(async {
        let (bed, ids) = two_checkpoints().await;
        for id in ids {
            change(&file(&bed, id, "manifest.json"), |bytes| {
                let mut manifest: serde_json::Value =
                    serde_json::from_slice(&bytes[4..]).expect("a manifest");
                manifest["version"] = 1_000.into();
                let body = serde_json::to_vec(&manifest).expect("plain data");
                *bytes = crc32fast::hash(&body).to_le_bytes().to_vec();
                bytes.extend(body);
            });
        }
        let error = bed.try_start(1, Vec::new()).await.expect_err("refused");
        assert_eq!(error.kind, ErrorKind::Unsupported);
        assert!(error.message.contains("newer version"), "{error}");
    });
}

/// An object store whose requests fail before or after they had their effect, or take their time.
#[derive(Debug)]
struct Moody {
    inner: InMemory,
    dice: AtomicU64,
    well: AtomicBool,
    failures: AtomicU64,
}

impl fmt::Display for Moody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a moody store")
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Well,
    FailsBefore,
    FailsAfter,
}

impl Moody {
    fn new(seed: u64) -> Self {
        Self {
            inner: InMemory::new(),
            dice: AtomicU64::new(seed),
            well: AtomicBool::new(false),
            failures: AtomicU64::new(0),
        }
    }

    fn roll(&self) -> u64 {
        let x = self.dice.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::SeqCst);
        let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 32
    }

    async fn mood(&self) -> Mood {
        if self.well.load(Ordering::SeqCst) {
            return Mood::Well;
        }
        let mood = match self.roll() % 10 {
            0 => Mood::FailsBefore,
            1 => Mood::FailsAfter,
            2 => {
                tokio::time::sleep(Duration::from_millis(self.roll() % 20)).await;
                Mood::Well
            }
            _ => Mood::Well,
        };
        if mood != Mood::Well {
            self.failures.fetch_add(1, Ordering::SeqCst);
        }
        mood
    }
}

fn unavailable() -> object_store::Error {
    object_store::Error::Generic {
        store: "moody",
        source: "503 slow down".into(),
    }
}

#[async_trait]
impl ObjectStore for Moody {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> StoreResult<PutResult> {
        let mood = self.mood().await;
        if mood == Mood::FailsBefore {
            return Err(unavailable());
        }
        let done = self.inner.put_opts(location, payload, opts).await;
        if mood == Mood::FailsAfter {
            return Err(unavailable());
        }
        done
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> StoreResult<Box<dyn MultipartUpload>> {
        if self.mood().await != Mood::Well {
            return Err(unavailable());
        }
        self.inner.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> StoreResult<GetResult> {
        if self.mood().await != Mood::Well {
            return Err(unavailable());
        }
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, StoreResult<Path>>,
    ) -> BoxStream<'static, StoreResult<Path>> {
        if !self.well.load(Ordering::SeqCst) && self.roll().is_multiple_of(5) {
            self.failures.fetch_add(1, Ordering::SeqCst);
            return locations.map(|_| Err(unavailable())).boxed();
        }
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, StoreResult<ObjectMeta>> {
        if !self.well.load(Ordering::SeqCst) && self.roll().is_multiple_of(10) {
            self.failures.fetch_add(1, Ordering::SeqCst);
            return futures::stream::iter([Err(unavailable())]).boxed();
        }
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> StoreResult<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> StoreResult<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[test]
fn a_store_that_misbehaves_costs_time_only() {
    for seed in 1..=4 {
        runtime().block_on(async {
            let store = Arc::new(Moody::new(seed));
            let mut bed = Bed::new();
            bed.store = Some(CheckpointStore::over(
                Arc::clone(&store) as Arc<dyn ObjectStore>
            ));
            let items = || vec![bed.source(u64::MAX), divisible(10, 1, 3), bed.sink(20, 10)];
            let start = || async {
                loop {
                    match bed.try_start(1, items()).await {
                        Ok(engine) => return engine,
                        Err(e) => assert_eq!(e.kind, ErrorKind::Unavailable, "{e}"),
                    }
                }
            };
            let mut rows = 0;
            let mut taken = 0;
            let mut engine = start().await;
            for round in 0..24 {
                rows += 100;
                bed.available.store(rows, Ordering::SeqCst);
                bound(&engine, rows).await;
                match engine.checkpoint().await {
                    Ok(_) => taken += 1,
                    Err(e) => assert_eq!(e.kind, ErrorKind::Unavailable, "{e}"),
                }
                if taken > 0 {
                    assert_eq!(numbers(&engine, 10).await, expect(rows, 3), "round {round}");
                }
                if store.roll().is_multiple_of(3) {
                    // As a crash leaves it.
                    engine.ask(Request::Stop).expect("runs");
                    engine = start().await;
                }
            }
            assert!(taken > 0 && store.failures.load(Ordering::SeqCst) > 10);
            store.well.store(true, Ordering::SeqCst);
            assert_eq!(numbers(&engine, 10).await, expect(rows, 3));
            engine.stop().await.expect("stops");
            let mut there = lock(&bed.destination.0).0.clone();
            there.sort_unstable();
            assert_eq!(there, expect(rows, 3), "seed {seed}");
            // Nothing is left of what failed: two checkpoints and the objects they name.
            let there = bed
                .store
                .as_ref()
                .expect("given")
                .list()
                .await
                .expect("lists");
            let kept: BTreeSet<u64> = there.into_iter().collect();
            assert!(kept.len() <= 2, "{kept:?}");
        });
    }
}
