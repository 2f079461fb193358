//! The same engine as several processes: worker processes run on threads here, but share nothing with the
//! server beside their sockets and the directory of the checkpoints.

use std::sync::mpsc;
use std::thread::JoinHandle;

use super::*;
use crate::checkpoint::manifest::CheckpointManifest;
use crate::checkpoint::store::CheckpointStore;
use crate::cluster::handshake::{Identity, Secret};
use crate::cluster::mesh::{Gate, Timing, join};
use crate::cluster::remote::{Planner, Setup, run};
use crate::cluster::{Lost, Peers};
use crate::follow::Event;
use crate::plan::{AggregateCall, AggregateKind, Emit};

/// How an item of a test is made again: kind, id, what it reads, a number.
type Recipe = (String, u64, u64, i64);

fn recipe(kind: &str, id: u64, from: u64, by: i64) -> Recipe {
    (kind.to_string(), id, from, by)
}

fn definition(recipe: &Recipe) -> Definition {
    serde_json::to_vec(recipe).expect("plain values").into()
}

fn counted_columns() -> SchemaRef {
    let field = |name| Field::new(name, DataType::Int64, true);
    Arc::new(Schema::new(vec![field("x"), field("n")]))
}

/// Rows of `from` counted by their remainder.
fn counted(id: u64, from: u64, by: i64) -> Item {
    let Item::View(filtered) = divisible(id, from, 1) else {
        unreachable!("a view")
    };
    let mut nodes = filtered.plan.nodes.clone();
    let x: Arc<dyn PhysicalExpr> = Arc::new(Column::new("x", 0));
    let modulo = Arc::new(BinaryExpr::new(x, Operator::Modulo, lit(by)));
    nodes[1].op = Op::Map {
        input: 0,
        steps: vec![MapStep::Project(vec![modulo], schema())],
    };
    nodes.push(Node {
        op: Op::Aggregate {
            input: 1,
            keys: vec![0],
            calls: vec![AggregateCall {
                kind: AggregateKind::Count,
                input: None,
                filter: None,
                output: DataType::Int64,
            }],
            close: None,
            emit: Emit::Changes,
            allowed_lateness_us: 0,
        },
        schema: counted_columns(),
        append_only: false,
    });
    Item::View(ViewItem {
        plan: Plan {
            nodes,
            append_only: false,
            ..filtered.plan
        },
        ..filtered
    })
}

/// Makes items in a worker process; none of them is the server's.
struct Recipes {
    destination: Arc<Destination>,
    /// Added to fingerprints.
    drift: u64,
}

#[async_trait]
impl Planner for Recipes {
    async fn define(&mut self, definition: &[u8]) -> Result<Vec<Item>> {
        let (kind, id, from, by): Recipe = serde_json::from_slice(definition).expect("a recipe");
        let mut item = match kind.as_str() {
            "divisible" => divisible(id, from, by),
            "counted" => counted(id, from, by),
            _ => Item::Sink(SinkItem {
                id: RelationId(id),
                name: "out".into(),
                from: RelationId(from),
                columns: 1,
                sink: Arc::new(MemorySink(Arc::clone(&self.destination))),
                commit_interval: None,
            }),
        };
        if let Item::View(view) = &mut item {
            view.plan.fingerprint += self.drift;
        }
        Ok(vec![item])
    }
    fn forget(&mut self, _ids: &[RelationId]) {}
}

struct Plane {
    engine: Engine,
    processes: Vec<JoinHandle<Result<()>>>,
    lost: mpsc::Receiver<Error>,
}

impl Plane {
    async fn create(&self, bed: &Bed, recipe: &Recipe) -> Result<()> {
        self.engine.define(&definition(recipe))?;
        self.engine.create(bed.made(recipe)).await
    }
    /// Stops the engine; all processes end well.
    async fn stop(self) {
        self.engine.stop().await.expect("stops");
        for process in self.processes {
            process.join().expect("no panic").expect("ends well");
        }
        assert!(self.lost.try_recv().is_err(), "no process was lost");
    }
}

fn identity() -> Identity {
    Identity {
        incarnation: 1,
        secret: Secret::random(),
    }
}

fn lost() -> (Lost, mpsc::Receiver<Error>) {
    let (sender, receiver) = mpsc::channel();
    let sender = Mutex::new(sender);
    let lost = move |error| drop(lock(&sender).send(error));
    (Lost(Arc::new(lost)), receiver)
}

impl Bed {
    fn made(&self, (kind, id, from, by): &Recipe) -> Item {
        match kind.as_str() {
            "divisible" => divisible(*id, *from, *by),
            "counted" => counted(*id, *from, *by),
            _ => self.sink(*id, *from),
        }
    }

    async fn start_processes(
        &self,
        processes: usize,
        workers: usize,
        source: u64,
        recipes: &[Recipe],
        drift: u64,
    ) -> Plane {
        let (lost, lost_receiver) = lost();
        let identity = identity();
        let gate = Gate::open(identity.clone(), Timing::default()).expect("a port");
        let address = gate.address().expect("an address");
        let runtime = tokio::runtime::Handle::current();
        let mut threads = Vec::new();
        for process in 1..processes {
            let (identity, runtime) = (identity.clone(), runtime.clone());
            let (dir, lost) = (self.dir.path().to_path_buf(), lost.clone());
            threads.push(std::thread::spawn(move || {
                let setup = Setup {
                    joined: join(address, &identity, process, Timing::default())?,
                    dir,
                    checkpoints: None,
                    pager: None,
                    incarnation: identity.incarnation,
                    planner: Box::new(Recipes {
                        destination: Arc::default(),
                        drift,
                    }),
                    resident_bytes: || 77,
                    lost,
                };
                run(setup, runtime)
            }));
        }
        let assemble = move || gate.assemble(processes, workers, &|| Ok(()));
        let connections = tokio::task::spawn_blocking(assemble).await;
        let peers = Peers {
            connections: connections.expect("no panic").expect("assembled"),
            definitions: recipes.iter().map(definition).collect(),
            lost,
        };
        let mut items: Vec<Item> = recipes.iter().map(|r| self.made(r)).collect();
        if !recipes.is_empty() {
            items.insert(0, self.source(source));
        }
        let meta: Arc<dyn Meta> = Arc::clone(&self.meta) as _;
        let config = self.config(workers);
        let found = Engine::find(&config, meta.as_ref()).await.expect("found");
        let engine = Engine::start_with(config, meta, found, items, Some(peers)).await;
        Plane {
            engine: engine.expect("starts"),
            processes: threads,
            lost: lost_receiver,
        }
    }
}

/// Key and count, in order.
async fn counts(engine: &Engine, id: u64) -> Vec<(i64, i64)> {
    let read = engine.read(&[RelationId(id)]).await.expect("reads");
    let mut all = Vec::new();
    for batch in &read.batches(RelationId(id)).expect("decodes") {
        let column = |c| {
            batch
                .column(c)
                .as_primitive::<Int64Type>()
                .values()
                .to_vec()
        };
        all.extend(column(0).into_iter().zip(column(1)));
    }
    all.sort_unstable();
    all
}

fn expect_counts(below: u64, by: i64) -> Vec<(i64, i64)> {
    let count = |k| (0..below as i64).filter(|x| x % by == k).count() as i64;
    (0..by).map(|k| (k, count(k))).collect()
}

#[test]
fn answers_of_several_processes_are_those_of_one() {
    for (processes, workers) in [(1, 2), (2, 1), (2, 2), (3, 1)] {
        runtime().block_on(async {
            let bed = Bed::new();
            let plane = bed.start_processes(processes, workers, 0, &[], 0).await;
            let engine = &plane.engine;
            engine.create(bed.source(10_000)).await.expect("source");
            for early in [
                recipe("divisible", 10, 1, 2),
                recipe("divisible", 20, 10, 3),
                recipe("counted", 30, 1, 97),
            ] {
                plane.create(&bed, &early).await.expect("created");
            }
            bed.available.store(5_000, Ordering::SeqCst);
            bound(engine, 1_000).await;
            for midway in [
                recipe("divisible", 40, 20, 1),
                recipe("counted", 50, 1, 97),
                recipe("counted", 60, 30, 7),
            ] {
                plane.create(&bed, &midway).await.expect("created");
            }
            bed.available.store(10_000, Ordering::SeqCst);
            bound(engine, 10_000).await;
            let after = recipe("counted", 70, 40, 12);
            plane.create(&bed, &after).await.expect("created");
            let of = format!("{processes} x {workers}");
            assert_eq!(numbers(engine, 10).await, expect(10_000, 2), "{of}");
            for id in [20, 40] {
                assert_eq!(numbers(engine, id).await, expect(10_000, 6), "{of}");
            }
            for id in [30, 50] {
                assert_eq!(counts(engine, id).await, expect_counts(10_000, 97), "{of}");
            }
            assert_eq!(counts(engine, 60).await, expect_counts(97, 7), "{of}");
            assert_eq!(counts(engine, 70).await, [(0, 834), (6, 833)], "{of}");
            // What passed through and what is held is counted over all processes.
            let status = engine.status();
            let of_view = |id| status.iter().find(|s| s.id == RelationId(id));
            let view = of_view(30).expect("it runs");
            assert_eq!(view.rows_in, 10_000, "{of}");
            assert!(view.operators.iter().all(|o| o.1.rows == 97), "{view:?}");
            assert_eq!(engine.resident_bytes().len(), processes - 1);
            engine.drop_items(&[RelationId(70)]).await.expect("drops");
            let gone = engine.read(&[RelationId(70)]).await.expect_err("gone");
            assert_eq!(gone.code, "42P01");
            plane.stop().await;
        });
    }
}

#[test]
fn subscribers_hear_of_the_rows_of_all_processes() {
    runtime().block_on(async {
        let bed = Bed::new();
        let plane = bed.start_processes(2, 1, 0, &[], 0).await;
        let engine = &plane.engine;
        engine.create(bed.source(3_000)).await.expect("source");
        let view = recipe("counted", 30, 1, 97);
        plane.create(&bed, &view).await.expect("created");
        bed.available.store(1_000, Ordering::SeqCst);
        bound(engine, 500).await;
        let columns = counted_columns();
        let follow = || engine.subscribe(RelationId(30), Arc::clone(&columns));
        let mut subscription = follow().await.expect("subscribes");
        let mut held: BTreeMap<(i64, i64), i64> = BTreeMap::new();
        let add = |held: &mut BTreeMap<(i64, i64), i64>, batch: &RecordBatch, diffs: &Diffs| {
            let column = |c| {
                batch
                    .column(c)
                    .as_primitive::<Int64Type>()
                    .values()
                    .to_vec()
            };
            for (row, key) in column(0).into_iter().zip(column(1)).enumerate() {
                *held.entry(key).or_default() += diffs.get(row);
            }
            held.retain(|_, n| *n != 0);
        };
        for batch in &subscription.contents {
            add(&mut held, batch, &Diffs::Ones);
        }
        bed.available.store(3_000, Ordering::SeqCst);
        let all: BTreeMap<_, _> = expect_counts(3_000, 97)
            .into_iter()
            .map(|k| (k, 1))
            .collect();
        while held != all {
            let (_, deltas) = subscription
                .next()
                .await
                .expect("follows")
                .expect("goes on");
            for delta in &deltas {
                add(&mut held, &delta.batch, &delta.diffs);
            }
        }
        // One that leaves is forgotten, one whose relation is dropped hears of it.
        drop(follow().await.expect("subscribes"));
        engine.drop_items(&[RelationId(30)]).await.expect("drops");
        assert!(subscription.next().await.expect("follows").is_none());
        plane.stop().await;
    });
}

#[test]
fn one_process_becomes_two_and_one_again_and_the_sink_has_each_row_once() {
    runtime().block_on(async {
        let bed = Bed::new();
        let recipes = [
            recipe("divisible", 10, 1, 3),
            recipe("counted", 30, 1, 97),
            recipe("sink", 20, 10, 0),
        ];
        let mut rows = 0;
        for (round, (processes, workers)) in
            [(1, 1), (2, 2), (2, 1), (1, 1)].into_iter().enumerate()
        {
            let known: &[Recipe] = if round == 0 { &[] } else { &recipes };
            let plane = bed
                .start_processes(processes, workers, u64::MAX, known, 0)
                .await;
            let engine = &plane.engine;
            if round == 0 {
                engine.create(bed.source(u64::MAX)).await.expect("source");
                for recipe in &recipes {
                    plane.create(&bed, recipe).await.expect("created");
                }
            }
            // What was there is there before anything new comes.
            let there = match rows {
                0 => Vec::new(),
                _ => expect_counts(rows, 97),
            };
            assert_eq!(counts(engine, 30).await, there);
            rows += 2_000;
            bed.available.store(rows, Ordering::SeqCst);
            bound(engine, rows - 500).await;
            engine.checkpoint().await.expect("checkpoint");
            bound(engine, rows).await;
            assert_eq!(numbers(engine, 10).await, expect(rows, 3));
            assert_eq!(counts(engine, 30).await, expect_counts(rows, 97));
            if round == 1 {
                // As a crash leaves it: with bindings after the checkpoint.
                engine.ask(Request::Stop).expect("runs");
                for process in plane.processes {
                    process.join().expect("no panic").expect("ends well");
                }
            } else {
                plane.stop().await;
            }
        }
        let mut written = lock(&bed.destination.0).0.clone();
        written.sort_unstable();
        assert_eq!(written, expect(rows, 3));
    });
}

#[test]
fn what_is_paused_waits_in_all_processes_and_across_their_number() {
    runtime().block_on(async {
        let bed = Bed::new();
        let recipes = [
            recipe("divisible", 10, 1, 3),
            recipe("counted", 30, 10, 97),
            recipe("counted", 40, 1, 97),
            recipe("sink", 20, 10, 0),
        ];
        let of_thirds = |below: u64| -> Vec<(i64, i64)> {
            let thirds = (0..below as i64).filter(|x| x % 3 == 0);
            let mut counts = BTreeMap::new();
            thirds.for_each(|x| *counts.entry(x % 97).or_default() += 1);
            counts.into_iter().collect()
        };
        let (view, sink) = (RelationId(10), RelationId(20));
        let mut rows = 0;
        for (round, (processes, workers)) in
            [(2, 1), (1, 1), (2, 2), (3, 1)].into_iter().enumerate()
        {
            let known: &[Recipe] = if round == 0 { &[] } else { &recipes };
            let plane = bed
                .start_processes(processes, workers, u64::MAX, known, 0)
                .await;
            let engine = &plane.engine;
            if round == 0 {
                engine.create(bed.source(u64::MAX)).await.expect("source");
                for recipe in &recipes {
                    plane.create(&bed, recipe).await.expect("created");
                }
                bed.available.store(1_000, Ordering::SeqCst);
                bound(engine, 1_000).await;
                assert_eq!(engine.pause(view).await.expect("pauses"), Changed::Yes);
                assert_eq!(numbers(engine, 10).await, expect(1_000, 3));
                rows = 1_000;
            }
            assert_eq!(state_of(engine, 10).0, "paused");
            rows += 2_000;
            bed.available.store(rows, Ordering::SeqCst);
            bound(engine, rows - 500).await;
            engine.checkpoint().await.expect("checkpoint");
            bound(engine, rows).await;
            assert_eq!(numbers(engine, 10).await, expect(1_000, 3), "{round}");
            assert_eq!(counts(engine, 30).await, of_thirds(1_000), "{round}");
            assert_eq!(counts(engine, 40).await, expect_counts(rows, 97), "{round}");
            if round == 3 {
                assert_eq!(engine.pause(sink).await.expect("pauses"), Changed::Yes);
                engine.resume(view).await.expect("resumes");
                assert_eq!(numbers(engine, 10).await, expect(rows, 3));
                assert_eq!(counts(engine, 30).await, of_thirds(rows));
                engine.checkpoint().await.expect("checkpoint");
                let mut written = lock(&bed.destination.0).0.clone();
                written.sort_unstable();
                assert_eq!(written, expect(1_000, 3), "the sink is paused");
                engine.resume(sink).await.expect("resumes");
                plane.stop().await;
            } else if round == 1 {
                plane.stop().await;
            } else {
                // As a crash leaves it: with bindings after the checkpoint.
                engine.ask(Request::Stop).expect("runs");
                for process in plane.processes {
                    process.join().expect("no panic").expect("ends well");
                }
            }
        }
        let mut written = lock(&bed.destination.0).0.clone();
        written.sort_unstable();
        assert_eq!(written, expect(rows, 3));
    });
}

#[test]
fn each_process_writes_its_own_changes_to_a_checkpoint() {
    runtime().block_on(async {
        let bed = Bed::new();
        let plane = bed.start_processes(2, 1, 0, &[], 0).await;
        let engine = &plane.engine;
        engine.create(bed.source(u64::MAX)).await.expect("source");
        let view = recipe("counted", 30, 1, 5_000);
        plane.create(&bed, &view).await.expect("created");
        let mut manifests = Vec::new();
        let store = CheckpointStore::local(bed.dir.path().to_path_buf()).expect("a store");
        // The first has everything, the others what has changed, once parts were written in full.
        for rows in [5_000, 5_050, 5_100] {
            bed.available.store(rows, Ordering::SeqCst);
            bound(engine, rows).await;
            let id = engine.checkpoint().await.expect("checkpoint");
            manifests.push(store.manifest(id).await.expect("a manifest"));
        }
        assert_eq!(manifests[2].workers, 2);
        for worker in [0, 1] {
            assert!(manifests[2].stages.iter().any(|s| s.worker == worker));
            let object = |manifest: &CheckpointManifest| {
                let id = manifest.id;
                let mut own = manifest.objects.iter().filter(|o| o.id.worker == worker);
                let earlier = own.clone().any(|o| o.id.checkpoint < id);
                let new = own.find(|o| o.id.checkpoint == id);
                (new.expect("an object of this worker").length, earlier)
            };
            let (full, _) = object(&manifests[0]);
            let (changed, earlier) = object(&manifests[2]);
            assert!(earlier, "what has not changed is still needed");
            assert!(changed < full / 5, "{changed} of {full}");
        }
        plane.stop().await;
    });
}

#[test]
fn another_plan_in_a_worker_process_is_an_error() {
    runtime().block_on(async {
        let bed = Bed::new();
        let plane = bed.start_processes(2, 1, 0, &[], 1).await;
        plane.engine.create(bed.source(10)).await.expect("source");
        let (engine, view) = (plane.engine.clone(), bed.made(&recipe("counted", 30, 1, 7)));
        engine
            .define(&definition(&recipe("counted", 30, 1, 7)))
            .expect("runs");
        let creating = tokio::spawn(async move { engine.create(view).await });
        let error = plane.lost.recv().expect("the server is told");
        let detail = error.detail.unwrap_or_default();
        assert!(detail.contains("plan view \"v30\" differently"), "{detail}");
        assert!(detail.contains("fingerprint"), "{detail}");
        creating.abort();
    });
}

#[test]
fn a_silent_process_is_lost() {
    runtime().block_on(async {
        let bed = Bed::new();
        let timing = Timing {
            beat: Duration::from_millis(20),
            dead_after: Duration::from_millis(200),
            ..Timing::default()
        };
        let identity = identity();
        let gate = Gate::open(identity.clone(), timing).expect("a port");
        let address = gate.address().expect("an address");
        let (over, silent) = mpsc::channel::<()>();
        let process = std::thread::spawn(move || {
            let joined = join(address, &identity, 1, timing).expect("joined");
            let mesh = crate::worker::start::Mesh {
                process: 1,
                sockets: joined.mesh,
            };
            let (parts, _) = tokio::sync::mpsc::unbounded_channel();
            // Its workers run, but it says nothing.
            let _workers = crate::worker::start::start(1, PartSender(parts), None, Some(mesh));
            let _ = silent.recv();
            drop(joined.control);
        });
        let assemble = move || gate.assemble(2, 1, &|| Ok(()));
        let connections = tokio::task::spawn_blocking(assemble).await;
        let (lost, told) = lost();
        let peers = Peers {
            connections: connections.expect("no panic").expect("assembled"),
            definitions: Vec::new(),
            lost,
        };
        let meta: Arc<dyn Meta> = Arc::clone(&bed.meta) as _;
        let config = bed.config(1);
        let found = Engine::find(&config, meta.as_ref()).await.expect("found");
        let started = Engine::start_with(config, meta, found, Vec::new(), Some(peers)).await;
        let engine = started.expect("starts");
        let error = told.recv().expect("it is noticed");
        assert!(error.message.contains("process 1"), "{error}");
        let detail = error.detail.unwrap_or_default();
        assert!(detail.contains("silent"), "{detail}");
        engine.ask(Request::Stop).expect("runs");
        over.send(()).expect("it waits");
        process.join().expect("no panic");
    });
}

#[test]
fn a_follower_that_is_cut_wakes_up() {
    let (sender, mut events) = mpsc_events();
    let load = Arc::new(crate::follow::Load::default());
    let follower = Follower::new(sender, Arc::clone(&load));
    assert!(follower.send(0, Event::Upto(1)));
    follower.cut();
    assert!(load.is_overrun());
    assert!(!follower.send(0, Event::Upto(2)));
    assert!(matches!(events.try_recv(), Ok((0, Event::Upto(1)))));
    assert!(matches!(events.try_recv(), Ok((0, Event::Closed))));
}

type Events = (usize, Event);

fn mpsc_events() -> (
    tokio::sync::mpsc::UnboundedSender<Events>,
    tokio::sync::mpsc::UnboundedReceiver<Events>,
) {
    tokio::sync::mpsc::unbounded_channel()
}
