//! Disks that fill up, and checkpoints kept elsewhere.

use std::time::Duration;

use millrace_tests::server::{Fed, Server, offsets};
use millrace_tests::small_disk::SmallDisk;
use millrace_tests::wait;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(120);
const EVENTS: u64 = 60_000;
const FLAGS: &[&str] = &[
    "--workers",
    "2",
    "--checkpoint-interval",
    "200ms",
    "--commit-interval",
    "200ms",
];

fn create(server: &Server) {
    server.run(&format!(
        "CREATE SOURCE bid WITH (connector = 'generator', kind = 'nexmark', table = 'bid', seed = 3,
           rate = 6000, max_events = {EVENTS});
         CREATE MATERIALIZED VIEW g AS SELECT auction, bidder, count(*) AS n, sum(price) AS p FROM bid GROUP BY auction, bidder;
         CREATE SINK bids FROM bid INTO lake.full.bids"
    ));
    wait::until("a commit", LIMIT, || {
        match server.one("sinks", "bids").map(|s| s["committed"].clone()) {
            Some(Value::Number(n)) if n.as_u64() > Some(0) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}

/// Everything is there, once.
fn complete(server: &Server) {
    server.caught_up(&[Fed::Ended("bid")], LIMIT);
    let frontier = server.one("sources", "bid").expect("listed")["frontier"].as_u64();
    server.committed("bids", frontier.expect("a tick"), LIMIT);
    let sums = "count(*), sum(price), sum(auction), sum(bidder)";
    let all = server.rows(&format!("SELECT {sums} FROM bid"));
    assert_eq!(all[0][0], json!(EVENTS * 46 / 50));
    assert_eq!(
        server.rows(&format!("SELECT {sums} FROM lake.full.bids")),
        all
    );
    let view = server.rows("SELECT sum(n), sum(p) FROM g");
    assert_eq!(view[0][0], json!(all[0][0].to_string()));
    assert_eq!(view[0][1], all[0][1]);
}

/// Fills the disk under a folder of the data directory while rows flow. It must be said what is full,
/// readiness must be red; with room again everything must go on, also for a server that was killed
/// with the disk full.
fn fills_up(folder: &str, mib: u32, red: fn(&Value) -> bool) {
    let mut server = Server::prepare(FLAGS);
    let Some(mut disk) = SmallDisk::over(&server.data_dir().join(folder), mib) else {
        return;
    };
    server.start_again(&[]);
    create(&server);
    wait::until("readiness to turn red", LIMIT, || {
        disk.fill();
        let answer = server.get("/readyz");
        let body = answer.text();
        match serde_json::from_str::<Value>(&body) {
            Ok(body) if answer.status == 503 && red(&body["error"]) => Ok(()),
            _ => Err(format!("{} {body}", answer.status)),
        }
    });
    // What is there can be read, and it can be seen what is the matter.
    assert_eq!(server.get("/healthz").status, 200);
    assert!(!server.list("sinks").is_empty());
    disk.free();
    wait::until("readiness to come back", LIMIT, || {
        let answer = server.get("/readyz");
        match answer.status {
            200 => Ok(()),
            status => Err(format!("{status} {}", answer.text())),
        }
    });
    // Once more, and killed while it is full.
    let seen = |server: &Server| server.one("sources", "bid").map_or(0, |row| offsets(&row));
    let before = seen(&server);
    wait::until("rows to flow", LIMIT, || {
        let now = seen(&server);
        if now > before || now >= EVENTS {
            Ok(())
        } else {
            Err(format!("{now}"))
        }
    });
    disk.fill();
    server.kill();
    disk.free();
    server.start_again(&[]);
    complete(&server);
    assert!(server.terminate().success());
}

#[test]
fn a_full_disk_of_checkpoints_is_waited_for() {
    fills_up("engine/checkpoints", 24, |error| {
        error["code"] == "53100" && error["message"].to_string().contains("checkpoint")
    });
}

#[test]
fn a_full_disk_of_the_warehouse_is_waited_for() {
    fills_up("warehouse", 24, |error| {
        error["code"] == "53100" && error["message"].to_string().contains("bids")
    });
}

#[test]
fn a_full_disk_under_everything_is_waited_for() {
    fills_up("", 96, |error| error["code"] == "53100");
}

#[test]
fn checkpoints_may_be_kept_elsewhere() {
    let elsewhere = tempfile::tempdir().expect("a folder");
    let url = format!("file://{}", elsewhere.path().display());
    let mut flags = FLAGS.to_vec();
    flags.extend(["--checkpoints", &url]);
    let mut server = Server::start(&flags);
    create(&server);
    server.kill();
    assert!(elsewhere.path().join("checkpoints").is_dir());
    assert!(!server.data_dir().join("engine/checkpoints").exists());
    server.start_again(&[]);
    complete(&server);
    assert!(server.terminate().success());
    // No store that this build does not know is taken for another.
    let mut server = Server::prepare(&["--checkpoints", "s3://bucket/path"]);
    assert_eq!(server.try_start(&[]).expect_err("refused").code(), Some(2));
    assert!(server.log_text().contains("s3://bucket/path"));
}

#[test]
fn a_full_disk_under_statements_costs_nothing_later() {
    let mut server = Server::prepare(FLAGS);
    let Some(mut disk) = SmallDisk::over(&server.data_dir(), 24) else {
        return;
    };
    server.start_again(&[]);
    disk.fill();
    let text = "x".repeat(300_000);
    let view = |n: usize| server.sql(&format!("CREATE VIEW v{n} AS SELECT '{text}' AS x"));
    let refused = (0..8).filter(|n| view(*n)["error"]["code"] == json!("53100"));
    assert!(refused.count() > 0);
    disk.free();
    for n in 10..18 {
        assert!(view(n)["error"].is_null(), "{}", view(n)["error"]);
    }
    server.terminate();
}
