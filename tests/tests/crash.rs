//! Real processes killed while rows flow and while they commit; then each expected row is in the
//! lake once, none twice, none missing. PyIceberg is the witness.
//!
//! `MILLRACE_CRASH_ROWS` (default 2,000,000), `MILLRACE_CRASH_KILLS` (8) and `MILLRACE_CRASH_ZOMBIES` (2) set the
//! size of the large run, `MILLRACE_CRASH_PROCESSES` (1) its processes; `make crash-long` is one of hundreds of
//! kills. With several processes any of them is killed, and worker processes are stopped too.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use millrace_tests::kafka::{Topic, Writer, broker};
use millrace_tests::lake::{ledger, python};
use millrace_tests::rng::Rng;
use millrace_tests::server::{Fed, Server, offsets};
use millrace_tests::wait;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(300);
/// Two workers, in one process or in several.
fn flags(processes: &str) -> Vec<&str> {
    let workers = if processes == "1" { "2" } else { "1" };
    let mut flags = vec!["--workers", workers, "--processes", processes];
    flags.extend(["--checkpoint-interval", "1s", "--commit-interval", "1s"]);
    flags
}

/// SIGKILL to the service, to its parent, or to a worker process.
fn kill_some(server: &mut Server, processes: u64, rng: &mut Rng) {
    match rng.below(if processes > 1 { 3 } else { 2 }) {
        0 => server.kill_child(),
        1 => {
            server.kill();
            server.start_again(&[]);
        }
        _ => server.kill_worker(),
    }
}

/// Event time of record 0: 2024-01-01T00:00:00Z.
const BASE_MS: u64 = 1_704_067_200_000;
const WINDOW_MS: u64 = 10_000;
const KEYS: u64 = 37;

/// Record `id`: pure, so that what must come out can be computed without the system.
fn record(id: u64) -> (u64, u64, u64) {
    let mixed = (id ^ 0x5bd1_e995).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let key = (mixed >> 40) % KEYS;
    let value = (mixed >> 20) % 10_000;
    // A millisecond per record, up to two seconds out of order.
    let at = BASE_MS + id + 2_000 - mixed % 2_000;
    (key, value, at)
}

/// A thread that sends records in order of their ids, to two partitions in turn, and at last a row
/// per partition that is late enough in event time to close all windows.
struct Feed {
    sent: Arc<AtomicU64>,
    hurry: Arc<AtomicBool>,
    thread: JoinHandle<Topic>,
}

impl Feed {
    /// Sending all records takes `flow` while the server is hurt: each kill finds rows on their way.
    fn start(topic: Topic, total: u64, flow: Duration) -> Self {
        let sent = Arc::new(AtomicU64::new(0));
        let hurry = Arc::new(AtomicBool::new(false));
        let (counter, fast) = (Arc::clone(&sent), Arc::clone(&hurry));
        let thread = std::thread::spawn(move || {
            let mut writer = Writer::new(&topic.broker);
            let started = Instant::now();
            for id in 0..total {
                let (key, value, at) = record(id);
                let text = format!(
                    r#"{{"id":{id},"key":{key},"value":{value},"ms":{at},"note":"record {id}"}}"#
                );
                writer.send(&topic, (id % 2) as i32, text.as_bytes());
                counter.store(id + 1, Ordering::Relaxed);
                let due = flow.mul_f64(id as f64 / total as f64);
                let hurry = fast.load(Ordering::Relaxed);
                if id > total - total / 10 && !hurry {
                    // The last tenth trickles: however slow the machine is, rows are on their way.
                    std::thread::sleep(Duration::from_millis(2));
                } else if id % 500 == 0 && !hurry {
                    // Keeps the pace; nothing waits for this.
                    std::thread::sleep(due.saturating_sub(started.elapsed()));
                }
            }
            for partition in 0..2 {
                let (id, at) = (total + partition, BASE_MS + total + 600_000);
                let text = format!(r#"{{"id":{id},"key":-1,"value":0,"ms":{at},"note":"end"}}"#);
                writer.send(&topic, partition as i32, text.as_bytes());
            }
            writer.flush();
            topic
        });
        Self {
            sent,
            hurry,
            thread,
        }
    }

    fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Sends the rest as fast as it goes; the topic, to keep.
    fn finish(self) -> Topic {
        self.hurry.store(true, Ordering::Relaxed);
        self.thread.join().expect("the producer ends well")
    }
}

fn create(server: &Server, topic: &Topic) {
    server.run(&format!(
        "CREATE SOURCE ledger (id BIGINT, key BIGINT, value BIGINT, ms BIGINT, note VARCHAR,
           at TIMESTAMP AS to_timestamp_millis(ms),
           WATERMARK FOR at AS at - INTERVAL '4' SECOND)
         WITH (connector = 'kafka', bootstrap_servers = '{}', topic = '{}', format = 'json', start = 'earliest');
         CREATE SINK raw FROM ledger INTO lake.crash.raw;
         CREATE MATERIALIZED VIEW totals AS
           SELECT key, window_start, window_end, count(*) AS n, sum(value) AS s, max(id) AS last
           FROM TUMBLE(ledger, at, INTERVAL '10' SECOND) WHERE key >= 0
           GROUP BY key, window_start, window_end EMIT ON WINDOW CLOSE;
         CREATE SINK totals_out FROM totals INTO lake.crash.totals;
         CREATE MATERIALIZED VIEW newest AS SELECT key, max(id) AS last FROM ledger GROUP BY key;
         CREATE MATERIALIZED VIEW joined AS
           SELECT p.key, p.n, q.last FROM (SELECT key, count(*) AS n FROM ledger GROUP BY key) p
           JOIN newest q ON p.key = q.key;
         CREATE SINK joined_out FROM joined INTO lake.crash.joined WITH (changelog = 'op');
         CREATE MATERIALIZED VIEW placed AS
           SELECT key, last, row_number() OVER (ORDER BY last DESC) AS place FROM newest;
         CREATE MATERIALIZED VIEW chained AS
           SELECT a.key, a.place, b.last AS before FROM placed a LEFT JOIN placed b ON b.place = a.place + 1;
         CREATE SINK chained_out FROM chained INTO lake.crash.chained WITH (changelog = 'op');",
        topic.broker, topic.name
    ));
}

/// What `joined` must hold at the end: of each key the number of records and the last one.
fn expected_joined(count: u64) -> Vec<Value> {
    let mut keys: BTreeMap<i64, (u64, u64)> = BTreeMap::new();
    for id in 0..count {
        let key = keys.entry(record(id).0 as i64).or_default();
        *key = (key.0 + 1, id);
    }
    keys.insert(-1, (2, count + 1));
    keys.into_iter()
        .map(|(key, (n, last))| json!([key, n, last]))
        .collect()
}

/// What `chained` must hold at the end: the keys by their last record, each with the one before it.
fn expected_chained(count: u64) -> Vec<Value> {
    let mut keys: BTreeMap<i64, u64> = (0..count).map(|id| (record(id).0 as i64, id)).collect();
    keys.insert(-1, count + 1);
    let mut places: Vec<(u64, i64)> = keys.into_iter().map(|(key, last)| (last, key)).collect();
    places.sort_unstable_by(|a, b| b.cmp(a));
    (0..places.len())
        .map(|i| json!([places[i].1, i + 1, places.get(i + 1).map(|before| before.0)]))
        .collect()
}

/// What `totals` must hold, from the records alone.
fn expected_totals(count: u64) -> Vec<Value> {
    let mut groups: BTreeMap<(u64, u64), (u64, u64, u64)> = BTreeMap::new();
    for id in 0..count {
        let (key, value, at) = record(id);
        let group = groups.entry((key, at - at % WINDOW_MS)).or_default();
        *group = (group.0 + 1, group.1 + value, group.2.max(id));
    }
    let time = |ms: u64| {
        // All of it is in January 2024.
        let s = (ms - BASE_MS) / 1000;
        let (day, hour, minute) = (1 + s / 86_400, s / 3_600 % 24, s / 60 % 60);
        format!(
            "2024-01-{day:02}T{hour:02}:{minute:02}:{:02}.000000",
            s % 60
        )
    };
    groups
        .into_iter()
        .map(|((key, start), (n, sum, last))| {
            json!([
                key,
                time(start),
                time(start + WINDOW_MS),
                n,
                sum.to_string(),
                last
            ])
        })
        .collect()
}

/// A setting of the run.
fn setting(name: &str, default: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Where the service is killed in each run, beside random moments.
const FAILPOINTS: &[&str] = &[
    "source.poll.after=kill:5",
    "reclock.bind.before_write=kill:3",
    "reclock.bind.after_write=kill:3",
    "reclock.publish.after=kill:3",
    "ckpt.begin=kill",
    "ckpt.part.mid_upload=kill",
    "ckpt.part.after_upload=kill",
    "ckpt.manifest.before_cas=kill",
    "ckpt.manifest.after_cas=kill",
    "ckpt.gc.before_delete=kill",
    "ckpt.gc.mid_delete=kill",
    "sink.file.mid_write=kill",
    "sink.file.after_close=kill",
    "sink.manifest.after_write=kill",
    "sink.commit.before_send=kill:2",
    "sink.commit.after_answer=kill:2",
    "sink.progress.after=kill:2",
    "recover.after_fence=kill",
];

fn seen(server: &Server) -> u64 {
    // The API answers 503 while the service comes up again.
    let answer = server.get("/api/v1/sources");
    if answer.status != 200 {
        return 0;
    }
    let body = answer.json();
    body["sources"]
        .as_array()
        .into_iter()
        .flatten()
        .map(offsets)
        .max()
        .unwrap_or(0)
}

/// Starts the server with a failpoint and waits until the service has died of it, perhaps while it
/// starts.
fn die_at(server: &mut Server, failpoint: &str) {
    println!("killing at {failpoint}");
    let name = failpoint.split('=').next().unwrap_or_default();
    let line = format!("failpoint=\"{name}\"");
    let fired = |server: &Server| server.log_text().matches(&line).count();
    let before = fired(server);
    server.kill();
    let _lines = server.begin(&[("MILLRACE_FAILPOINTS", failpoint)]);
    wait::until(failpoint, LIMIT, || match fired(server) > before {
        true => Ok(()),
        false => Err("it does not fire".to_string()),
    });
    // The parent would start it with the same failpoint again.
    server.kill();
    server.start_again(&[]);
}

#[test]
fn kafka_to_iceberg_exactly_once_through_kills() {
    let (Some(broker), Some(python)) = (broker(), python()) else {
        return;
    };
    let total = setting("MILLRACE_CRASH_ROWS", 2_000_000);
    let kills = setting("MILLRACE_CRASH_KILLS", 8);
    let zombies = setting("MILLRACE_CRASH_ZOMBIES", 2);
    let mut rng = Rng::from_env("crash");
    let started = Instant::now();
    let topic = Topic::create(&broker, "crash", 2);
    let processes = setting("MILLRACE_CRASH_PROCESSES", 1);
    let mut server = Server::start(&flags(&processes.to_string()));
    create(&server, &topic);
    let flow = Duration::from_secs(50 + kills + 2 * zombies);
    let feed = Feed::start(topic, total, flow);

    // Kills at random points of the stream, while more rows are on their way.
    let mut points: Vec<u64> = (0..kills)
        .map(|_| rng.below(total as usize / 2) as u64)
        .collect();
    points.sort_unstable();
    for (i, point) in points.into_iter().enumerate() {
        wait::until("rows to flow", LIMIT, || {
            let seen = seen(&server);
            if seen >= point {
                Ok(())
            } else {
                Err(format!("{seen} of {point}"))
            }
        });
        println!(
            "{:.1?} kill {} at {} of {} sent",
            started.elapsed(),
            i + 1,
            seen(&server),
            feed.sent()
        );
        kill_some(&mut server, processes, &mut rng);
    }
    // Zombies: a server that was stopped wakes up when another one has taken over.
    for i in 0..zombies {
        println!("{:.1?} zombie {}", started.elapsed(), i + 1);
        if processes > 1 && i % 2 == 1 {
            server.stop_worker();
        } else {
            server.outlive_by_another(Duration::from_millis(rng.below(1_500) as u64));
        }
    }
    // Kills where it hurts, and one run with the answer of the catalog lost after it committed.
    for failpoint in FAILPOINTS {
        die_at(&mut server, failpoint);
    }
    println!("{:.1?} losing an answer", started.elapsed());
    server.kill();
    server.start_again(&[(
        "MILLRACE_FAILPOINTS",
        "sink.commit.after_send_before_answer=error:2",
    )]);
    let topic = feed.finish();
    println!("{:.1?} all {} records sent", started.elapsed(), total + 2);

    server.caught_up(&[Fed::Records("ledger", total + 2)], LIMIT);
    let frontier = server.one("sources", "ledger").expect("listed")["frontier"].as_u64();
    let frontier = frontier.expect("a tick");
    for sink in ["raw", "totals_out", "joined_out", "chained_out"] {
        server.committed(sink, frontier, LIMIT);
    }
    assert_eq!(
        server.rows("SELECT * FROM totals$late").len(),
        0,
        "no row is late"
    );
    // What is served and what was committed are the same.
    let served = server.rows("SELECT count(*), sum(n) FROM totals");
    let expected = expected_totals(total);
    assert_eq!(served, [json!([expected.len(), total.to_string()])]);
    assert!(server.terminate().success());
    assert!(
        server
            .log_text()
            .contains("sink.commit.after_send_before_answer"),
        "no answer of the catalog was lost"
    );

    println!("{:.1?} asking PyIceberg", started.elapsed());
    let dir = server.data_dir();
    let count = (total + 2).to_string();
    println!(
        "{}",
        ledger(&python, &dir, &["rows", "crash.raw", "id", &count])
    );
    let path = server.scratch().join("expected.json");
    std::fs::write(&path, json!(expected).to_string()).expect("written");
    let path = path.to_string_lossy().into_owned();
    println!(
        "{}",
        ledger(&python, &dir, &["equal", "crash.totals", &path])
    );
    for (table, expected) in [
        ("joined", expected_joined(total)),
        ("chained", expected_chained(total)),
    ] {
        let path = server.scratch().join(format!("{table}.json"));
        std::fs::write(&path, json!(expected).to_string()).expect("written");
        let (table, path) = (
            format!("crash.{table}"),
            path.to_string_lossy().into_owned(),
        );
        println!("{}", ledger(&python, &dir, &["net", &table, &path]));
    }
    println!("{:.1?} done", started.elapsed());
    drop(topic);
}

/// The same from the generator, which needs no broker: each start is killed after a random time.
#[test]
fn generator_to_iceberg_exactly_once() {
    generator_to_iceberg(1);
}

#[test]
fn generator_to_iceberg_exactly_once_by_two_processes() {
    generator_to_iceberg(2);
}

fn generator_to_iceberg(processes: u64) {
    let Some(python) = python() else { return };
    let mut rng = Rng::from_env("crash generator");
    let count = processes.to_string();
    let mut server = Server::start(&[
        "--workers",
        "1",
        "--processes",
        &count,
        "--checkpoint-interval",
        "200ms",
        "--commit-interval",
        "200ms",
    ]);
    // 92 % of the events are bids.
    let events = 200_000_u64;
    server.run(&format!(
        "CREATE SOURCE bid WITH (connector = 'generator', kind = 'nexmark', table = 'bid', seed = '7',
           rate = '60000', max_events = '{events}');
         CREATE MATERIALIZED VIEW lake.gen.per_bidder AS
           SELECT bidder, window_start, count(*) AS n, sum(price) AS s
           FROM TUMBLE(bid, date_time, INTERVAL '1' SECOND) GROUP BY bidder, window_start
           EMIT ON WINDOW CLOSE;
         CREATE SINK bids FROM bid INTO lake.gen.bids;"
    ));
    for kill in 0..4 {
        let point = (kill + 1) * events / 6 + rng.below(events as usize / 12) as u64;
        wait::until("events to flow", LIMIT, || {
            let seen = seen(&server);
            if seen >= point {
                Ok(())
            } else {
                Err(format!("{seen} of {point}"))
            }
        });
        if processes > 1 && kill == 1 {
            server.stop_worker();
        } else {
            kill_some(&mut server, processes, &mut rng);
        }
    }
    server.caught_up(&[Fed::Ended("bid")], LIMIT);
    let frontier = server.one("sources", "bid").expect("listed")["frontier"].as_u64();
    let frontier = frontier.expect("a tick");
    let sinks = server.list("sinks");
    assert_eq!(sinks.len(), 2, "{sinks:?}");
    for sink in &sinks {
        server.committed(sink["name"].as_str().expect("a name"), frontier, LIMIT);
    }
    // The batch answers over the source, which generates the same again.
    let totals = server.rows(
        "SELECT count(*), sum(price), sum(auction), sum(bidder), min(date_time), max(date_time) FROM bid",
    );
    let windows = server.rows(
        "SELECT count(*), sum(n), sum(s), count(DISTINCT bidder) FROM (
           SELECT bidder, window_start, count(*) AS n, sum(price) AS s
           FROM TUMBLE(bid, date_time, INTERVAL '1' SECOND) GROUP BY bidder, window_start) w",
    );
    assert_eq!(totals[0][0], json!(events * 46 / 50));
    let in_lake = server.rows(
        "SELECT count(*), sum(price), sum(auction), sum(bidder), min(date_time), max(date_time)
         FROM lake.gen.bids",
    );
    assert_eq!(in_lake, totals);
    let in_lake = server
        .rows("SELECT count(*), sum(n), sum(s), count(DISTINCT bidder) FROM lake.gen.per_bidder");
    assert_eq!(in_lake, windows);
    assert!(server.terminate().success());
    for (table, rows) in [
        ("gen.bids", &totals[0][0]),
        ("gen.per_bidder", &windows[0][0]),
    ] {
        let report = ledger(&python, &server.data_dir(), &["read", table]);
        assert_eq!(
            json!(report["rows"].as_array().expect("rows").len()),
            *rows,
            "{table}"
        );
    }
}
