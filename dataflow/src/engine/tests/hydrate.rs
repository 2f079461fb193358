//! What reads history when something goes wrong, and what does not wait for it.

use super::restart::ones;
use super::*;

const LIMIT: Duration = Duration::from_secs(30);

async fn state_of(engine: &Engine, name: &str, state: &str) {
    let reached = async {
        loop {
            let found = engine.status().into_iter().find(|s| s.name == name);
            if found.expect("it is listed").state == state {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let reached = tokio::time::timeout(LIMIT, reached).await;
    reached.unwrap_or_else(|_| panic!("\"{name}\" is not {state}"));
}

async fn checkpoint(engine: &Engine) {
    let taken = tokio::time::timeout(LIMIT, engine.checkpoint()).await;
    taken.expect("in time").expect("a checkpoint");
}

#[test]
fn a_source_that_cannot_be_opened_again_goes_on_for_those_who_read_it() {
    runtime().block_on(async {
        let bed = Bed::new();
        let engine = bed.start(1, Vec::new()).await;
        engine.create(bed.source(u64::MAX)).await.expect("source");
        engine.create(ones(10, 1)).await.expect("view");
        bed.mood.refuses.store(true, Ordering::SeqCst);
        // Nothing is bound yet, so it is the live reader that would have to read one more column.
        let refused = engine.create(divisible(20, 1, 2)).await;
        assert_eq!(refused.expect_err("refused").kind, ErrorKind::Invalid);
        bed.available.store(700, Ordering::SeqCst);
        bound(&engine, 700).await;
        assert_eq!(numbers(&engine, 10).await.len(), 700);
        bed.mood.refuses.store(false, Ordering::SeqCst);
        engine.create(divisible(30, 1, 2)).await.expect("view");
        assert_eq!(numbers(&engine, 30).await, expect(700, 2));
        engine.stop().await.expect("stops");
    });
}

#[test]
fn what_a_start_cannot_build_is_shown_as_failed_and_holds_up_nobody() {
    runtime().block_on(async {
        let bed = Bed::new();
        bed.mood.refuses.store(true, Ordering::SeqCst);
        let items = vec![
            bed.source(u64::MAX),
            divisible(10, 1, 2),
            divisible(20, 10, 3),
        ];
        let engine = bed.start(1, items).await;
        for view in ["v10", "v20"] {
            state_of(&engine, view, "failed").await;
        }
        checkpoint(&engine).await;
        bed.mood.refuses.store(false, Ordering::SeqCst);
        bed.available.store(500, Ordering::SeqCst);
        engine.create(divisible(30, 1, 5)).await.expect("view");
        bound(&engine, 500).await;
        assert_eq!(numbers(&engine, 30).await, expect(500, 5));
        engine.stop().await.expect("stops");
    });
}

#[test]
fn a_start_does_not_wait_for_history() {
    runtime().block_on(async {
        let bed = Bed::new();
        let engine = bed.start(1, Vec::new()).await;
        bed.available.store(1_000, Ordering::SeqCst);
        for item in [bed.source(u64::MAX), divisible(10, 1, 2)] {
            engine.create(item).await.expect("creates");
        }
        bound(&engine, 1_000).await;
        engine.stop().await.expect("stops");
        bed.mood.silent.store(true, Ordering::SeqCst);
        let mut items = vec![bed.source(u64::MAX), divisible(10, 1, 2)];
        items.extend([
            divisible(20, 1, 3),
            divisible(30, 20, 2),
            divisible(40, 20, 5),
        ]);
        let start = tokio::time::timeout(LIMIT, bed.start(1, items)).await;
        let engine = start.expect("it does not wait");
        for view in ["v20", "v30", "v40"] {
            state_of(&engine, view, "hydrating").await;
        }
        assert_eq!(numbers(&engine, 10).await, expect(1_000, 2));
        engine.drop_items(&[RelationId(30)]).await.expect("drops");
        checkpoint(&engine).await;
        bed.mood.silent.store(false, Ordering::SeqCst);
        assert_eq!(numbers(&engine, 40).await, expect(1_000, 15));
        assert!(engine.status().iter().all(|s| s.name != "v30"));
        engine.stop().await.expect("stops");
    });
}
