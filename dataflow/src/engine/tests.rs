//! The engine as a whole, with a source of integers and sinks in memory: attach, read, sinks, restart.

mod hydrate;
mod processes;
mod restart;
mod sinks;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arrow::array::{AsArray, Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef};
use async_trait::async_trait;
use datafusion::logical_expr::Operator;
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::expressions::{BinaryExpr, Column, lit};

mod storage;

use super::alter::Changed;
use super::*;
use crate::delta::Diffs;
use crate::error::Result;
use crate::plan::{MapStep, Node, OnError, Op};
use crate::sink::{Committable, Committer, Writer};
use crate::source::{Chunk, Offsets, Polled, Reader};

fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![Field::new("x", DataType::Int64, true)]))
}

/// Yields 0, 1, 2, … up to what is available; ends at `end`.
#[derive(Debug)]
struct Numbers {
    available: Arc<AtomicU64>,
    mood: Arc<Mood>,
    end: u64,
}

struct NumbersReader {
    at: u64,
    available: Arc<AtomicU64>,
    mood: Arc<Mood>,
    end: u64,
}

/// How a source behaves.
#[derive(Debug, Default)]
struct Mood {
    /// It cannot be opened.
    refuses: AtomicBool,
    /// It has nothing at the moment.
    silent: AtomicBool,
}

impl Source for Numbers {
    fn schema(&self) -> SchemaRef {
        schema()
    }
    fn open(&self, start: &Offsets, _projection: &[usize]) -> Result<Vec<Box<dyn Reader>>> {
        if self.mood.refuses.load(Ordering::SeqCst) {
            return Err(Error::invalid("the source cannot be opened"));
        }
        let at = start.0.get("0").copied().unwrap_or(0);
        Ok(vec![Box::new(NumbersReader {
            at,
            available: Arc::clone(&self.available),
            mood: Arc::clone(&self.mood),
            end: self.end,
        })])
    }
    fn bounded(&self) -> bool {
        true
    }
    fn append_only(&self) -> bool {
        true
    }
}

impl Reader for NumbersReader {
    fn poll(&mut self, limit: Option<&Offsets>, wait: Duration) -> Result<Polled> {
        let top = self.available.load(Ordering::SeqCst);
        let mut to = top.min(self.at + 100);
        if let Some(limit) = limit {
            let limit = limit.0.get("0").copied().unwrap_or(0);
            if self.at >= limit {
                return Ok(Polled::AtLimit);
            }
            to = to.min(limit);
        }
        if self.at >= self.end {
            return Ok(Polled::End);
        }
        if to <= self.at || self.mood.silent.load(Ordering::SeqCst) {
            std::thread::sleep(wait.min(Duration::from_millis(2)));
            return Ok(Polled::Idle);
        }
        let column = Int64Array::from_iter_values((self.at..to).map(|x| x as i64));
        let begin = std::mem::replace(&mut self.at, to);
        Ok(Polled::Chunk(Chunk {
            split: "0".into(),
            begin,
            end: to,
            batch: RecordBatch::try_new(schema(), vec![Arc::new(column)]).expect("one column"),
            diffs: None,
            rejected: Vec::new(),
            bytes: 8,
            digest: None,
            remaining: Some(top - to),
        }))
    }
}

#[derive(Debug, Default)]
struct TestMeta(
    Mutex<Option<u64>>,
    /* the newest incarnation */ AtomicU64,
);

#[async_trait]
impl Meta for TestMeta {
    async fn latest_checkpoint(&self) -> Result<Option<u64>> {
        Ok(*lock(&self.0))
    }
    async fn move_latest_checkpoint(
        &self,
        incarnation: u64,
        expected: Option<u64>,
        id: u64,
    ) -> Result<bool> {
        let mut latest = lock(&self.0);
        let same = *latest == expected && incarnation >= self.1.load(Ordering::SeqCst);
        if same {
            *latest = Some(id);
        }
        Ok(same)
    }
}

/// A destination in memory: rows and the frontier, moved together; and the newest incarnation, which
/// shuts out what an engine that was left as by a crash still does.
#[derive(Debug, Default)]
struct Destination(Mutex<(Vec<i64>, Option<Tick>)>, AtomicU64);

#[derive(Debug)]
struct MemorySink(Arc<Destination>);

struct MemoryWriter(Vec<i64>);
struct MemoryCommitter(Arc<Destination>, u64);

#[async_trait]
impl Sink for MemorySink {
    fn accepts_retractions(&self) -> bool {
        false
    }
    async fn writer(&self, _worker: usize, _incarnation: u64) -> Result<Box<dyn Writer>> {
        Ok(Box::new(MemoryWriter(Vec::new())))
    }
    async fn committer(&self, incarnation: u64) -> Result<Box<dyn Committer>> {
        let committer = MemoryCommitter(Arc::clone(&self.0), incarnation);
        Ok(Box::new(committer))
    }
}

#[async_trait]
impl Writer for MemoryWriter {
    async fn write(&mut self, _tick: Tick, batch: &RecordBatch, _diffs: &Diffs) -> Result<()> {
        self.0
            .extend(batch.column(0).as_primitive::<Int64Type>().values());
        Ok(())
    }
    async fn close(&mut self, lower: Tick, upper: Tick) -> Result<Vec<Committable>> {
        if self.0.is_empty() {
            return Ok(Vec::new());
        }
        let rows = std::mem::take(&mut self.0);
        let payload = rows.iter().flat_map(|x| x.to_le_bytes()).collect();
        Ok(vec![Committable {
            lower,
            upper,
            rows: rows.len() as u64,
            bytes: 0,
            payload,
        }])
    }
}

#[async_trait]
impl Committer for MemoryCommitter {
    async fn frontier(&mut self) -> Result<Option<Tick>> {
        let there = lock(&self.0.0);
        self.0.1.fetch_max(self.1, Ordering::SeqCst);
        Ok(there.1)
    }
    async fn commit(
        &mut self,
        _lower: Tick,
        upper: Tick,
        committables: &[Committable],
    ) -> Result<Tick> {
        let mut there = lock(&self.0.0);
        if self.0.1.load(Ordering::SeqCst) > self.1 {
            return Err(Error::new(ErrorKind::Conflict, "fenced"));
        }
        for committable in committables {
            let rows = committable.payload.chunks(8);
            there
                .0
                .extend(rows.map(|b| i64::from_le_bytes(b.try_into().expect("eight bytes"))));
        }
        there.1 = Some(upper);
        Ok(upper)
    }
}

struct Bed {
    dir: tempfile::TempDir,
    meta: Arc<TestMeta>,
    available: Arc<AtomicU64>,
    mood: Arc<Mood>,
    destination: Arc<Destination>,
    starts: AtomicU64,
    store: Option<CheckpointStore>,
    failed: BTreeMap<RelationId, Failing>,
}

impl Bed {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().expect("dir"),
            meta: Arc::default(),
            available: Arc::default(),
            mood: Arc::default(),
            destination: Arc::default(),
            starts: AtomicU64::new(0),
            store: None,
            failed: BTreeMap::new(),
        }
    }
    fn config(&self, workers: usize) -> EngineConfig {
        EngineConfig {
            workers,
            dir: self.dir.path().to_path_buf(),
            checkpoints: self.store.clone(),
            incarnation: 1 + self.starts.fetch_add(1, Ordering::SeqCst),
            checkpoint_interval: Duration::from_secs(3600),
            commit_interval: Duration::from_millis(20),
            max_rows_in_flight: 100_000,
            waiting: Arc::default(),
            pager: None,
            paused: BTreeSet::new(),
            failed: self.failed.clone(),
        }
    }
    async fn start(&self, workers: usize, items: Vec<Item>) -> Engine {
        self.try_start(workers, items).await.expect("starts")
    }
    async fn try_start(&self, workers: usize, items: Vec<Item>) -> Result<Engine> {
        let config = self.config(workers);
        {
            // Not while the one before moves it.
            let _latest = lock(&self.meta.0);
            self.meta.1.fetch_max(config.incarnation, Ordering::SeqCst);
        }
        let meta: Arc<dyn Meta> = Arc::clone(&self.meta) as _;
        Engine::start(config, meta, items).await
    }
    fn source(&self, end: u64) -> Item {
        Item::Source(SourceItem {
            id: RelationId(1),
            name: "numbers".into(),
            source: Arc::new(Numbers {
                available: Arc::clone(&self.available),
                mood: Arc::clone(&self.mood),
                end,
            }),
            plan: SourcePlan {
                columns: vec![Arc::new(Column::new("x", 0))],
                schema: schema(),
                watermark: None,
                deciding: Vec::new(),
            },
            rejected: RelationId(2),
            idle_timeout: Duration::from_secs(10),
        })
    }
    fn sink(&self, id: u64, from: u64) -> Item {
        Item::Sink(SinkItem {
            id: RelationId(id),
            name: "out".into(),
            from: RelationId(from),
            columns: 1,
            sink: Arc::new(MemorySink(Arc::clone(&self.destination))),
            commit_interval: None,
        })
    }
}

/// Numbers of `from` that are divisible by `by`.
fn divisible(id: u64, from: u64, by: i64) -> Item {
    let x: Arc<dyn PhysicalExpr> = Arc::new(Column::new("x", 0));
    let modulo = Arc::new(BinaryExpr::new(x, Operator::Modulo, lit(by)));
    let filter = Arc::new(BinaryExpr::new(modulo, Operator::Eq, lit(0i64)));
    let node = |op| Node {
        op,
        schema: schema(),
        append_only: true,
    };
    let nodes = vec![
        node(Op::Input {
            relation: RelationId(from),
            columns: vec![0],
        }),
        node(Op::Map {
            input: 0,
            steps: vec![MapStep::Filter(filter)],
        }),
    ];
    Item::View(ViewItem {
        id: RelationId(id),
        dataflow: RelationId(id),
        name: format!("v{id}"),
        plan: Plan {
            nodes,
            append_only: true,
            fingerprint: id,
            on_error: OnError::Continue,
        },
        errors: RelationId(id + 1),
        late: RelationId(id + 2),
    })
}

async fn numbers(engine: &Engine, id: u64) -> Vec<i64> {
    let read = engine.read(&[RelationId(id)]).await.expect("reads");
    let batches = read.batches(RelationId(id)).expect("decodes");
    let mut all: Vec<i64> = batches
        .iter()
        .flat_map(|b| b.column(0).as_primitive::<Int64Type>().values().to_vec())
        .collect();
    all.sort_unstable();
    all
}

fn expect(below: u64, by: i64) -> Vec<i64> {
    (0..below as i64).filter(|x| x % by == 0).collect()
}

/// Waits until the source has bound everything below `rows`.
async fn bound(engine: &Engine, rows: u64) {
    loop {
        let status = engine.status();
        let source = status
            .iter()
            .find(|s| s.kind == "source")
            .expect("a source");
        assert!(source.last_error.is_none(), "{:?}", source.last_error);
        if source.offsets.get("0").copied().unwrap_or(0) >= rows {
            return;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("runtime")
}

#[test]
fn views_before_midway_and_after_the_data_agree() {
    for workers in [1, 2, 3] {
        runtime().block_on(async {
            let bed = Bed::new();
            let engine = bed.start(workers, Vec::new()).await;
            engine.create(bed.source(10_000)).await.expect("source");
            engine.create(divisible(10, 1, 2)).await.expect("before");
            engine
                .create(divisible(20, 10, 3))
                .await
                .expect("view over view");
            bed.available.store(5_000, Ordering::SeqCst);
            bound(&engine, 1_000).await;
            engine
                .create(divisible(30, 1, 6))
                .await
                .expect("midway, over the source");
            engine
                .create(divisible(40, 20, 2))
                .await
                .expect("midway, over a view");
            bed.available.store(10_000, Ordering::SeqCst);
            bound(&engine, 10_000).await;
            engine.create(divisible(50, 1, 6)).await.expect("after");
            engine
                .create(divisible(60, 40, 1))
                .await
                .expect("after, over a view");
            assert_eq!(numbers(&engine, 10).await, expect(10_000, 2));
            for id in [20, 30, 40, 50, 60] {
                assert_eq!(
                    numbers(&engine, id).await,
                    expect(10_000, 6),
                    "view {id}, {workers} workers"
                );
            }
            engine.stop().await.expect("stops");
        });
    }
}

#[test]
fn a_restart_goes_on_with_other_workers_and_the_sink_has_each_row_once() {
    runtime().block_on(async {
        let bed = Bed::new();
        let items = || vec![bed.source(9_000), divisible(10, 1, 3), bed.sink(20, 10)];
        let engine = bed.start(2, Vec::new()).await;
        bed.available.store(2_000, Ordering::SeqCst);
        for item in items() {
            engine.create(item).await.expect("creates");
        }
        for (round, workers) in [1, 3, 2].into_iter().enumerate() {
            let more = 2_000 * (round as u64 + 2);
            bed.available.store(more, Ordering::SeqCst);
            let engine = if round == 0 {
                engine.clone()
            } else {
                bed.start(workers, items()).await
            };
            bound(&engine, more - 500).await;
            if round == 1 {
                // Not a stop: the engine is left as a crash leaves it, with bindings after the checkpoint.
                engine.checkpoint().await.expect("checkpoint");
                bound(&engine, more).await;
                let _ = numbers(&engine, 10).await;
                engine.ask(Request::Stop).expect("runs");
            } else {
                assert_eq!(numbers(&engine, 10).await.first(), Some(&0));
                engine.stop().await.expect("stops");
            }
        }
        bed.available.store(9_000, Ordering::SeqCst);
        let engine = bed.start(1, items()).await;
        bound(&engine, 9_000).await;
        assert_eq!(numbers(&engine, 10).await, expect(9_000, 3));
        engine.stop().await.expect("stops");
        let mut rows = lock(&bed.destination.0).0.clone();
        rows.sort_unstable();
        assert_eq!(rows, expect(9_000, 3));
    });
}

#[test]
fn dropped_views_free_their_names_and_others_go_on() {
    runtime().block_on(async {
        let bed = Bed::new();
        let engine = bed.start(2, Vec::new()).await;
        engine.create(bed.source(u64::MAX)).await.expect("source");
        engine.create(divisible(10, 1, 2)).await.expect("view");
        engine.create(divisible(20, 1, 5)).await.expect("view");
        bed.available.store(1_000, Ordering::SeqCst);
        bound(&engine, 1_000).await;
        engine.drop_items(&[RelationId(10)]).await.expect("drops");
        assert_eq!(
            engine.read(&[RelationId(10)]).await.expect_err("gone").code,
            "42P01"
        );
        bed.available.store(2_000, Ordering::SeqCst);
        bound(&engine, 2_000).await;
        assert_eq!(numbers(&engine, 20).await, expect(2_000, 5));
        engine.stop().await.expect("stops");
    });
}

#[test]
fn a_damaged_checkpoint_is_noticed_and_the_one_before_is_used() {
    runtime().block_on(async {
        let bed = Bed::new();
        let items = || vec![bed.source(u64::MAX), divisible(10, 1, 2)];
        let engine = bed.start(1, Vec::new()).await;
        for item in items() {
            engine.create(item).await.expect("creates");
        }
        bed.available.store(500, Ordering::SeqCst);
        bound(&engine, 500).await;
        engine.checkpoint().await.expect("checkpoint");
        bed.available.store(1_000, Ordering::SeqCst);
        bound(&engine, 1_000).await;
        let last = engine.checkpoint().await.expect("checkpoint");
        let _ = numbers(&engine, 10).await;
        engine.ask(Request::Stop).expect("runs");
        let object = bed
            .dir
            .path()
            .join(format!("checkpoints/{last:012}/worker-0"));
        let mut bytes = std::fs::read(&object).expect("the object");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&object, bytes).expect("writes");
        let engine = bed.start(1, items()).await;
        assert_eq!(numbers(&engine, 10).await, expect(1_000, 2));
        engine.stop().await.expect("stops");
    });
}

/// The view `v10` with another plan.
fn instead(by: i64, dataflow: u64) -> ViewItem {
    let Item::View(mut view) = divisible(10, 1, by) else {
        unreachable!("a view")
    };
    view.dataflow = RelationId(dataflow);
    view.plan.fingerprint = dataflow;
    view
}

/// Changes of a subscription from now on, added up over its contents.
async fn follow(subscription: &mut subscribe::Subscription, until: &[i64]) -> usize {
    let mut rows: BTreeMap<i64, i64> = BTreeMap::new();
    let add = |rows: &mut BTreeMap<i64, i64>, batch: &RecordBatch, diff: &dyn Fn(usize) -> i64| {
        let values = batch.column(0).as_primitive::<Int64Type>();
        for row in 0..batch.num_rows() {
            *rows.entry(values.value(row)).or_default() += diff(row);
        }
    };
    for batch in &subscription.contents {
        add(&mut rows, batch, &|_| 1);
    }
    let mut ticks = 0;
    while !rows
        .iter()
        .filter(|(_, n)| **n != 0)
        .map(|(x, _)| x)
        .eq(until)
    {
        let (_, deltas) = (subscription.next().await.expect("no error")).expect("goes on");
        for delta in &deltas {
            add(&mut rows, &delta.batch, &|row| delta.diffs.get(row));
        }
        assert!(rows.values().all(|n| (0..=1).contains(n)), "{rows:?}");
        ticks += 1;
    }
    ticks
}

#[test]
fn a_replaced_view_is_the_old_one_up_to_a_tick_and_the_new_one_from_it_on() {
    runtime().block_on(async {
        let bed = Bed::new();
        let engine = bed.start(3, Vec::new()).await;
        engine.create(bed.source(u64::MAX)).await.expect("created");
        engine.create(divisible(10, 1, 2)).await.expect("created");
        bed.available.store(1000, Ordering::SeqCst);
        bound(&engine, 1000).await;
        assert_eq!(numbers(&engine, 10).await, expect(1000, 2));
        let mut followed = engine
            .subscribe(RelationId(10), schema())
            .await
            .expect("follows");
        engine.replace(instead(3, 50)).await.expect("replaced");
        // One tick, in which each row is taken back or inserted once.
        assert_eq!(follow(&mut followed, &expect(1000, 3)).await, 1);
        assert_eq!(numbers(&engine, 10).await, expect(1000, 3));
        bed.available.store(1500, Ordering::SeqCst);
        bound(&engine, 1500).await;
        assert_eq!(numbers(&engine, 10).await, expect(1500, 3));
        assert!(engine.status().iter().all(|s| s.backfill.is_none()));
        // And again; then a start finds what the checkpoint holds.
        engine.replace(instead(5, 60)).await.expect("replaced");
        assert_eq!(numbers(&engine, 10).await, expect(1500, 5));
        engine.stop().await.expect("stops");
        let items = vec![bed.source(u64::MAX), Item::View(instead(5, 60))];
        let engine = bed.start(2, items).await;
        assert_eq!(numbers(&engine, 10).await, expect(1500, 5));
        bed.available.store(1600, Ordering::SeqCst);
        bound(&engine, 1600).await;
        assert_eq!(numbers(&engine, 10).await, expect(1600, 5));
        engine.stop().await.expect("stops");
    });
}

#[test]
fn what_cannot_follow_a_replacement_is_asked_first() {
    runtime().block_on(async {
        let bed = Bed::new();
        let engine = bed.start(2, Vec::new()).await;
        bed.available.store(100, Ordering::SeqCst);
        engine.create(bed.source(u64::MAX)).await.expect("created");
        engine.create(divisible(10, 1, 2)).await.expect("created");
        bound(&engine, 100).await;
        engine.create(bed.sink(40, 10)).await.expect("created");
        let refused = engine
            .replace(instead(3, 50))
            .await
            .expect_err("the sink only appends");
        assert!(refused.old_stays && refused.error.message.contains("only appends"));
        engine.drop_items(&[RelationId(40)]).await.expect("dropped");
        engine.create(divisible(20, 10, 3)).await.expect("created");
        let refused = engine
            .replace(instead(3, 50))
            .await
            .expect_err("v20 only grows");
        assert!(refused.old_stays && refused.error.message.contains("v20"));
        assert_eq!(numbers(&engine, 20).await, expect(100, 6));
        engine.drop_items(&[RelationId(20)]).await.expect("dropped");
        engine.replace(instead(3, 50)).await.expect("replaced");
        assert_eq!(numbers(&engine, 10).await, expect(100, 3));
        engine.stop().await.expect("stops");
    });
}

#[test]
fn a_crash_during_a_replacement_brings_back_what_the_checkpoint_holds() {
    runtime().block_on(async {
        let bed = Bed::new();
        let engine = bed.start(2, Vec::new()).await;
        bed.available.store(500, Ordering::SeqCst);
        engine.create(bed.source(u64::MAX)).await.expect("created");
        engine.create(divisible(10, 1, 2)).await.expect("created");
        bound(&engine, 500).await;
        let before = *lock(&bed.meta.0);
        engine.replace(instead(3, 50)).await.expect("replaced");
        // As if `latest` had not been moved: the checkpoint before holds the old plan only.
        let kept = *lock(&bed.meta.0);
        assert_ne!(kept, before);
        *lock(&bed.meta.0) = before;
        let config = bed.config(2);
        let found = Engine::find(&config, bed.meta.as_ref())
            .await
            .expect("found");
        assert!(!found.holds(RelationId(50)));
        *lock(&bed.meta.0) = kept;
        let found = Engine::find(&config, bed.meta.as_ref())
            .await
            .expect("found");
        assert!(found.holds(RelationId(50)) && !found.holds(RelationId(10)));
        engine.stop().await.expect("stops");
    });
}

fn state_of(engine: &Engine, id: u64) -> (&'static str, Option<String>) {
    let status = engine.status().into_iter().find(|s| s.id == RelationId(id));
    let status = status.expect("it is known");
    (status.state, status.last_error)
}

#[test]
fn a_paused_view_stands_still_across_a_crash_and_then_catches_up() {
    runtime().block_on(async {
        let bed = Bed::new();
        let items = || {
            vec![
                bed.source(u64::MAX),
                divisible(10, 1, 2),
                divisible(20, 10, 3),
                divisible(40, 1, 5),
                bed.sink(30, 20),
            ]
        };
        let engine = bed.start(2, Vec::new()).await;
        for item in items() {
            engine.create(item).await.expect("creates");
        }
        let view = RelationId(10);
        bed.available.store(1_000, Ordering::SeqCst);
        bound(&engine, 1_000).await;
        assert_eq!(engine.pause(view).await.expect("pauses"), Changed::Yes);
        assert_eq!(engine.pause(view).await.expect("known"), Changed::No);
        bed.available.store(2_000, Ordering::SeqCst);
        bound(&engine, 2_000).await;
        engine.checkpoint().await.expect("checkpoint");
        bed.available.store(3_000, Ordering::SeqCst);
        bound(&engine, 3_000).await;
        for (id, rows) in [(10, expect(1_000, 2)), (20, expect(1_000, 6))] {
            assert_eq!(numbers(&engine, id).await, rows, "{id}");
        }
        assert_eq!(numbers(&engine, 40).await, expect(3_000, 5), "others go on");
        engine.ask(Request::Stop).expect("runs");
        for workers in [3, 1] {
            let engine = bed.start(workers, items()).await;
            assert_eq!(state_of(&engine, 10).0, "paused");
            assert_eq!(numbers(&engine, 10).await, expect(1_000, 2));
            assert_eq!(numbers(&engine, 40).await, expect(3_000, 5));
            engine.stop().await.expect("stops");
        }
        let engine = bed.start(2, items()).await;
        bed.available.store(4_000, Ordering::SeqCst);
        bound(&engine, 4_000).await;
        assert_eq!(engine.resume(view).await.expect("resumes"), Changed::Yes);
        for (id, by) in [(10, 2), (20, 6), (40, 5)] {
            assert_eq!(numbers(&engine, id).await, expect(4_000, by), "{id}");
        }
        assert_eq!(state_of(&engine, 10).0, "running");
        engine.stop().await.expect("stops");
        let mut rows = lock(&bed.destination.0).0.clone();
        rows.sort_unstable();
        assert_eq!(rows, expect(4_000, 6));
    });
}

#[test]
fn a_paused_sink_commits_nothing_until_it_is_resumed() {
    runtime().block_on(async {
        let bed = Bed::new();
        let engine = bed.start(2, Vec::new()).await;
        engine.create(bed.source(u64::MAX)).await.expect("source");
        engine.create(bed.sink(20, 1)).await.expect("sink");
        let sink = RelationId(20);
        engine.pause(sink).await.expect("pauses");
        bed.available.store(1_000, Ordering::SeqCst);
        bound(&engine, 1_000).await;
        // The intervals of many epochs pass in checkpoints, each of which closes files.
        for _ in 0..3 {
            engine.checkpoint().await.expect("checkpoint");
        }
        assert_eq!(state_of(&engine, 20).0, "paused");
        assert_eq!(lock(&bed.destination.0).0.len(), 0);
        engine.stop().await.expect("stops without its commit");
        assert_eq!(lock(&bed.destination.0).0.len(), 0);
        let items = || vec![bed.source(u64::MAX), bed.sink(20, 1)];
        let engine = bed.start(1, items()).await;
        engine.resume(sink).await.expect("resumes");
        engine.stop().await.expect("stops");
        let mut rows = lock(&bed.destination.0).0.clone();
        rows.sort_unstable();
        assert_eq!(rows, expect(1_000, 1));
    });
}

#[test]
fn what_fails_at_a_tick_is_held_before_it_and_the_others_run() {
    runtime().block_on(async {
        let mut bed = Bed::new();
        let make = |bed: &Bed| {
            vec![
                bed.source(u64::MAX),
                divisible(10, 1, 2),
                divisible(20, 1, 3),
                bed.sink(30, 20),
            ]
        };
        let engine = bed.start(1, Vec::new()).await;
        for item in make(&bed) {
            engine.create(item).await.expect("creates");
        }
        bed.available.store(1_000, Ordering::SeqCst);
        bound(&engine, 1_000).await;
        engine.checkpoint().await.expect("checkpoint");
        let first = engine.read(&[RelationId(10)]).await.expect("reads").tick + 1;
        bed.available.store(2_000, Ordering::SeqCst);
        bound(&engine, 2_000).await;
        assert_eq!(numbers(&engine, 20).await, expect(2_000, 3));
        engine.ask(Request::Stop).expect("runs");
        let failing = |at| Failing {
            at: Some(at),
            error: Error::internal("boom"),
        };
        bed.failed.insert(RelationId(10), failing(first));
        for round in 0..2 {
            let engine = bed.start(1 + round, make(&bed)).await;
            assert_eq!(numbers(&engine, 10).await, expect(1_000, 2));
            assert_eq!(numbers(&engine, 20).await, expect(2_000, 3));
            let (state, error) = state_of(&engine, 10);
            assert_eq!((state, error.as_deref()), ("failed", Some("boom")));
            engine.ask(Request::Stop).expect("runs");
        }
        let engine = bed.start(2, make(&bed)).await;
        engine.resume(RelationId(10)).await.expect("resumes");
        assert_eq!(numbers(&engine, 10).await, expect(2_000, 2));
        engine.stop().await.expect("stops");
        // A later start that knows of no failure lets go what an earlier one held.
        let engine = bed.start(1, make(&bed)).await;
        engine.stop().await.expect("stops");
        bed.failed.clear();
        let engine = bed.start(1, make(&bed)).await;
        assert_eq!(numbers(&engine, 10).await, expect(2_000, 2));
        assert_eq!(state_of(&engine, 10).0, "running");
        engine.stop().await.expect("stops");
        let mut rows = lock(&bed.destination.0).0.clone();
        rows.sort_unstable();
        assert_eq!(rows, expect(2_000, 3));
    });
}

#[test]
fn a_sink_that_fails_keeps_what_waits_for_it_across_restarts() {
    runtime().block_on(async {
        let mut bed = Bed::new();
        let engine = bed.start(2, Vec::new()).await;
        engine.create(bed.source(u64::MAX)).await.expect("source");
        engine.create(bed.sink(20, 1)).await.expect("sink");
        bed.available.store(500, Ordering::SeqCst);
        bound(&engine, 500).await;
        engine.stop().await.expect("stops");
        assert_eq!(lock(&bed.destination.0).0.len(), 500);
        let last = engine.inner.shared.last_tick.load(Ordering::Relaxed);
        let failing = Failing {
            at: Some(last + 1),
            error: Error::internal("boom"),
        };
        bed.failed.insert(RelationId(20), failing);
        let items = |bed: &Bed| vec![bed.source(u64::MAX), bed.sink(20, 1)];
        for (workers, available) in [(1, 1_000), (2, 1_500)] {
            let engine = bed.start(workers, items(&bed)).await;
            bed.available.store(available, Ordering::SeqCst);
            bound(&engine, available).await;
            engine.stop().await.expect("stops");
            assert_eq!(state_of(&engine, 20).0, "failed");
            assert_eq!(lock(&bed.destination.0).0.len(), 500);
        }
        let engine = bed.start(1, items(&bed)).await;
        engine.resume(RelationId(20)).await.expect("resumes");
        engine.stop().await.expect("stops");
        let mut rows = lock(&bed.destination.0).0.clone();
        rows.sort_unstable();
        assert_eq!(rows, expect(1_500, 1));
    });
}
