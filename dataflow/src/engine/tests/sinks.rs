//! Sinks whose destination refuses a row, or is away.

use std::sync::atomic::AtomicI64;

use super::*;

const LIMIT: Duration = Duration::from_secs(30);

/// A destination that can be told to misbehave.
#[derive(Debug)]
struct Fickle {
    there: Arc<Destination>,
    /// A row that it does not take.
    refused: AtomicI64,
    away: AtomicBool,
}

#[derive(Debug)]
struct FickleSink(Arc<Fickle>);

struct FickleWriter(MemoryWriter, Arc<Fickle>);
struct FickleCommitter(MemoryCommitter, Arc<Fickle>);

#[async_trait]
impl Sink for FickleSink {
    fn accepts_retractions(&self) -> bool {
        false
    }
    async fn writer(&self, _worker: usize, _incarnation: u64) -> Result<Box<dyn Writer>> {
        let inner = MemoryWriter(Vec::new());
        Ok(Box::new(FickleWriter(inner, Arc::clone(&self.0))))
    }
    async fn committer(&self, incarnation: u64) -> Result<Box<dyn Committer>> {
        let inner = MemoryCommitter(Arc::clone(&self.0.there), incarnation);
        Ok(Box::new(FickleCommitter(inner, Arc::clone(&self.0))))
    }
}

#[async_trait]
impl Writer for FickleWriter {
    async fn write(&mut self, tick: Tick, batch: &RecordBatch, diffs: &Diffs) -> Result<()> {
        let refused = self.1.refused.load(Ordering::SeqCst);
        let rows = batch.column(0).as_primitive::<Int64Type>().values();
        if rows.contains(&refused) {
            return Err(Error::invalid("a row does not fit").code("22003"));
        }
        self.0.write(tick, batch, diffs).await
    }
    async fn close(&mut self, lower: Tick, upper: Tick) -> Result<Vec<Committable>> {
        self.0.close(lower, upper).await
    }
}

#[async_trait]
impl Committer for FickleCommitter {
    async fn frontier(&mut self) -> Result<Option<Tick>> {
        self.0.frontier().await
    }
    async fn commit(&mut self, lower: Tick, upper: Tick, files: &[Committable]) -> Result<Tick> {
        if self.1.away.load(Ordering::SeqCst) {
            return Err(Error::unavailable("the destination is away"));
        }
        self.0.commit(lower, upper, files).await
    }
}

fn fickle(bed: &Bed) -> Arc<Fickle> {
    Arc::new(Fickle {
        there: Arc::clone(&bed.destination),
        refused: AtomicI64::new(-1),
        away: AtomicBool::new(false),
    })
}

fn into(fickle: &Arc<Fickle>, from: u64) -> Item {
    Item::Sink(SinkItem {
        id: RelationId(20),
        name: "out".into(),
        from: RelationId(from),
        columns: 1,
        sink: Arc::new(FickleSink(Arc::clone(fickle))),
        commit_interval: None,
    })
}

async fn in_time<T>(what: &str, work: impl Future<Output = T>) -> T {
    let done = tokio::time::timeout(LIMIT, work).await;
    done.unwrap_or_else(|_| panic!("waited too long for {what}"))
}

/// Waits until the destination has exactly the numbers below `rows`.
async fn has(bed: &Bed, rows: u64) {
    in_time("rows", async {
        loop {
            let mut there = lock(&bed.destination.0).0.clone();
            there.sort_unstable();
            if there == expect(rows, 1) {
                return;
            }
            assert!(there.len() as u64 <= rows, "{} rows", there.len());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

async fn until_said(engine: &Engine, text: &str) {
    in_time(text, async {
        loop {
            let status = engine.status().into_iter().find(|s| s.kind == "sink");
            let said = status.and_then(|s| s.last_error);
            if said.is_some_and(|said| said.contains(text)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[test]
fn a_commit_that_is_tried_again_holds_up_no_checkpoint() {
    runtime().block_on(async {
        let bed = Bed::new();
        let fickle = fickle(&bed);
        let items = || vec![bed.source(u64::MAX), divisible(10, 1, 1), into(&fickle, 10)];
        let engine = bed.start(2, Vec::new()).await;
        for item in items() {
            engine.create(item).await.expect("creates");
        }
        fickle.away.store(true, Ordering::SeqCst);
        for rows in [1_000, 2_000] {
            bed.available.store(rows, Ordering::SeqCst);
            bound(&engine, rows).await;
            until_said(&engine, "away").await;
            let taken = in_time("a checkpoint", engine.checkpoint()).await;
            taken.expect("a checkpoint");
        }
        assert!(lock(&bed.destination.0).0.is_empty());
        fickle.away.store(false, Ordering::SeqCst);
        has(&bed, 2_000).await;
        // What a checkpoint held meanwhile comes once.
        fickle.away.store(true, Ordering::SeqCst);
        bed.available.store(3_000, Ordering::SeqCst);
        bound(&engine, 3_000).await;
        until_said(&engine, "away").await;
        engine.checkpoint().await.expect("a checkpoint");
        engine.ask(Request::Stop).expect("runs");
        let engine = bed.start(1, items()).await;
        fickle.away.store(false, Ordering::SeqCst);
        has(&bed, 3_000).await;
        in_time("the stop", engine.stop()).await.expect("stops");
    });
}

#[test]
fn a_row_that_is_refused_fails_the_statement_and_holds_up_nobody() {
    runtime().block_on(async {
        let bed = Bed::new();
        let fickle = fickle(&bed);
        fickle.refused.store(77, Ordering::SeqCst);
        let engine = bed.start(2, Vec::new()).await;
        bed.available.store(1_000, Ordering::SeqCst);
        engine.create(bed.source(u64::MAX)).await.expect("source");
        engine.create(divisible(10, 1, 1)).await.expect("view");
        bound(&engine, 1_000).await;
        let created = in_time("the sink", engine.create(into(&fickle, 10))).await;
        assert_eq!(created.expect_err("refused").code, "22003");
        let taken = in_time("a checkpoint", engine.checkpoint()).await;
        taken.expect("a checkpoint");
        assert_eq!(engine.inner.shared.queued_bytes.load(Ordering::SeqCst), 0);
        fickle.refused.store(-1, Ordering::SeqCst);
        let created = in_time("the sink", engine.create(into(&fickle, 10))).await;
        created.expect("created");
        has(&bed, 1_000).await;
        in_time("the stop", engine.stop()).await.expect("stops");
    });
}

#[test]
fn a_sink_that_breaks_goes_on_from_its_checkpoint_when_it_is_resumed() {
    runtime().block_on(async {
        let mut bed = Bed::new();
        let fickle = fickle(&bed);
        let items = |bed: &Bed| vec![bed.source(u64::MAX), divisible(10, 1, 1), into(&fickle, 10)];
        let engine = bed.start(2, Vec::new()).await;
        for item in items(&bed) {
            engine.create(item).await.expect("creates");
        }
        bed.available.store(1_000, Ordering::SeqCst);
        has(&bed, 1_000).await;
        fickle.refused.store(1_500, Ordering::SeqCst);
        bed.available.store(2_000, Ordering::SeqCst);
        let broken = in_time("the failure", engine.broken()).await;
        assert_eq!((broken.id, broken.error.code), (RelationId(20), "22003"));
        bound(&engine, 2_000).await;
        assert_eq!(numbers(&engine, 10).await, expect(2_000, 1));
        in_time("room in the queues", async {
            while engine.inner.shared.queued_bytes.load(Ordering::SeqCst) > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        engine.ask(Request::Stop).expect("runs");
        // As the service starts it again.
        let failing = Failing {
            at: Some(broken.tick),
            error: broken.error,
        };
        bed.failed.insert(RelationId(20), failing);
        let engine = bed.start(1, items(&bed)).await;
        until_said(&engine, "does not fit").await;
        let taken = in_time("a checkpoint", engine.checkpoint()).await;
        taken.expect("a checkpoint");
        bed.available.store(2_500, Ordering::SeqCst);
        bound(&engine, 2_500).await;
        assert_eq!(numbers(&engine, 10).await, expect(2_500, 1));
        fickle.refused.store(-1, Ordering::SeqCst);
        engine.resume(RelationId(20)).await.expect("resumes");
        has(&bed, 2_500).await;
        in_time("the stop", engine.stop()).await.expect("stops");
    });
}
