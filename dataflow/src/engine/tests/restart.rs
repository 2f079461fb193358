//! What a restart reads again.

use super::*;

/// A one for each row of `from`, of which no column is read: the core of `count(*)`.
pub(super) fn ones(id: u64, from: u64) -> Item {
    let Item::View(mut view) = divisible(id, from, 1) else {
        unreachable!("a view")
    };
    let one: Arc<dyn PhysicalExpr> = lit(1i64);
    view.plan.nodes = vec![
        Node {
            op: Op::Input {
                relation: RelationId(from),
                columns: Vec::new(),
            },
            schema: Arc::new(Schema::empty()),
            append_only: true,
        },
        Node {
            op: Op::Map {
                input: 0,
                steps: vec![MapStep::Project(vec![one], schema())],
            },
            schema: schema(),
            append_only: true,
        },
    ];
    Item::View(view)
}

#[test]
fn a_source_that_is_read_without_any_column_is_read_again() {
    for checkpoint in [false, true] {
        runtime().block_on(async {
            let bed = Bed::new();
            let items = || vec![bed.source(10_000), ones(10, 1)];
            let engine = bed.start(2, Vec::new()).await;
            for item in items() {
                engine.create(item).await.expect("created");
            }
            bed.available.store(500, Ordering::SeqCst);
            bound(&engine, 500).await;
            assert_eq!(numbers(&engine, 10).await.len(), 500);
            if checkpoint {
                engine.checkpoint().await.expect("checkpoint");
            }
            // A crash: what it still does counts no more.
            let engine = bed.start(2, items()).await;
            assert_eq!(numbers(&engine, 10).await.len(), 500, "{checkpoint}");
            bed.available.store(900, Ordering::SeqCst);
            bound(&engine, 900).await;
            assert_eq!(numbers(&engine, 10).await.len(), 900, "{checkpoint}");
            engine.stop().await.expect("stops");
        });
    }
}

#[test]
fn a_checkpoint_that_does_not_end_is_trouble() {
    runtime().block_on(async {
        let bed = Bed::new();
        let engine = bed.start(1, Vec::new()).await;
        let began =
            |ago| *lock(&engine.inner.shared.checkpoint_began) = Instant::now().checked_sub(ago);
        began(Duration::from_secs(1));
        assert!(engine.trouble().is_none());
        began(Duration::from_secs(300));
        assert!(engine.trouble().is_none());
        engine.set_intervals(Some(Duration::from_secs(5)), None);
        let trouble = engine.trouble();
        assert!(trouble.is_some_and(|e| e.message.contains("under way")));
        engine.checkpoint().await.expect("it can be taken");
        assert!(engine.trouble().is_none());
        engine.stop().await.expect("stops");
    });
}
