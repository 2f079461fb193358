//! `ALTER …` while everything runs: intervals, pauses across crashes, what is said of them.

use std::time::Duration;

use millrace_tests::kafka::{Topic, Writer, broker};
use millrace_tests::server::{Fed, Server, offsets};
use millrace_tests::wait;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);

/// A topic of orders, one key per record in turn, and the server that reads it.
struct Orders {
    topic: Topic,
    writer: Writer,
    sent: u64,
}

impl Orders {
    fn new() -> Option<Self> {
        let broker = broker()?;
        let topic = Topic::create(&broker, "alter", 2);
        let writer = Writer::new(&broker);
        Some(Self {
            topic,
            writer,
            sent: 0,
        })
    }

    fn create_source(&self, server: &Server) {
        server.run(&format!(
            "CREATE SOURCE orders (id BIGINT, key BIGINT, ms BIGINT, at TIMESTAMP AS to_timestamp_millis(ms),
               WATERMARK FOR at AS at - INTERVAL '1' SECOND)
             WITH (connector = 'kafka', bootstrap_servers = '{}', topic = '{}', format = 'json')",
            self.topic.broker, self.topic.name
        ));
    }

    /// A second of event time every ten records.
    fn send(&mut self, count: u64) {
        for _ in 0..count {
            let id = self.sent;
            let text = format!(
                r#"{{"id":{id},"key":{},"ms":{}}}"#,
                id % 7,
                1_704_067_200_000 + id * 100
            );
            self.writer
                .send(&self.topic, (id % 2) as i32, text.as_bytes());
            self.sent += 1;
        }
        self.writer.flush();
    }

    /// Waits until all that was sent is bound.
    fn bound(&self, server: &Server) {
        wait::until("the orders to be read", LIMIT, || {
            let rows = server.try_list("sources")?;
            let row = rows.first().ok_or("no source")?;
            match offsets(row) {
                n if n >= self.sent => Ok(()),
                n => Err(format!("{n} of {}", self.sent)),
            }
        });
    }
}

fn sorted(server: &Server, relation: &str) -> Vec<Value> {
    let mut rows = server.rows(&format!("SELECT * FROM {relation}"));
    rows.sort_by_key(ToString::to_string);
    rows
}

fn state(server: &Server, resource: &str, name: &str) -> Value {
    server
        .one(resource, name)
        .map_or(Value::Null, |row| row["state"].clone())
}

fn ready(server: &Server) {
    wait::until("the service to be back", LIMIT, || {
        match server.get("/readyz").status {
            200 => Ok(()),
            status => Err(status.to_string()),
        }
    });
}

const FLAGS: &[&str] = &["--workers", "2", "--checkpoint-interval", "300ms"];

#[test]
fn a_sink_commits_as_often_as_it_is_told() {
    let mut server = Server::start(&["--workers", "1", "--commit-interval", "1h"]);
    server.run(
        "CREATE SOURCE bid WITH (connector = 'generator', kind = 'nexmark', table = 'bid', rate = 2000);
         CREATE SINK own FROM bid INTO lake.a.own WITH (commit_interval = '1h', target_file_size = '1 MB');
         CREATE SINK other FROM bid INTO lake.a.other;
         CREATE SINK nowhere FROM bid INTO blackhole",
    );
    let child = server.child_pid();
    let rows = |server: &Server, table: &str| {
        server.rows(&format!("SELECT count(*) FROM lake.a.{table}"))[0][0].clone()
    };
    assert_eq!(rows(&server, "own"), 0);
    server.run("ALTER SINK own SET (commit_interval = '100 ms')");
    wait::until("a commit", LIMIT, || match rows(&server, "own") {
        n if n.as_u64() > Some(0) => Ok(()),
        n => Err(n.to_string()),
    });
    assert_eq!(rows(&server, "other"), 0, "each sink for itself");
    server.run("ALTER SYSTEM SET (commit_interval = '200ms', checkpoint_interval = '400ms')");
    wait::until("a commit", LIMIT, || match rows(&server, "other") {
        n if n.as_u64() > Some(0) => Ok(()),
        n => Err(n.to_string()),
    });
    assert_eq!(server.child_pid(), child, "nothing was started again");

    let shown = |server: &Server| {
        let interval = |name: &str| {
            let row = server.one("sinks", name).expect("a sink");
            row["commit_interval_ms"].clone()
        };
        let text = server.rows("SHOW CREATE SINK own")[0][1].clone();
        (interval("own"), interval("other"), text)
    };
    let (own, other, text) = shown(&server);
    assert_eq!((own, other), (json!(100), json!(200)));
    let text = text.as_str().expect("a text");
    assert!(
        text.ends_with("WITH (commit_interval = '100 ms', target_file_size = '1 MB')"),
        "{text}"
    );
    server.kill();
    server.start_again(&[]);
    let (own, other, again) = shown(&server);
    assert_eq!((own, other), (json!(100), json!(200)));
    assert_eq!(again, text);

    for (script, hint) in [
        ("ALTER SINK own SET (changelog = 'op')", "commit_interval"),
        (
            "ALTER SINK nowhere SET (commit_interval = '1s')",
            "no option",
        ),
        ("ALTER SINK own SET (commit_interval = '1 ms')", "100 ms"),
        ("ALTER SYSTEM SET (colour = 'red')", "checkpoint_interval"),
        ("ALTER MATERIALIZED VIEW own PAUSE", "ALTER SINK"),
        ("ALTER SINK bid PAUSE", "source"),
    ] {
        let error = server.error(script);
        let said = error["hint"].as_str().unwrap_or_default();
        assert!(said.contains(hint), "{script}: {error}");
    }
    assert_eq!(server.error("ALTER SINK missing PAUSE")["code"], "42P01");
}

#[test]
fn a_paused_view_serves_what_it_was_and_catches_up_exactly() {
    let Some(mut orders) = Orders::new() else {
        return;
    };
    let mut server = Server::start(FLAGS);
    orders.create_source(&server);
    let views = |prefix: &str| {
        format!(
            "CREATE MATERIALIZED VIEW {prefix}sums AS SELECT key, count(*) AS n, sum(id) AS s FROM orders GROUP BY key;
             CREATE MATERIALIZED VIEW {prefix}top AS SELECT max(n) AS n, count(*) AS keys FROM {prefix}sums;
             CREATE MATERIALIZED VIEW {prefix}windows AS
               SELECT window_end, count(*) AS n, max(id) AS last
               FROM TUMBLE(orders, at, INTERVAL '10' SECOND) GROUP BY window_start, window_end EMIT ON WINDOW CLOSE;
             CREATE SINK {prefix}out FROM {prefix}windows INTO lake.a.{prefix}windows WITH (commit_interval = '100 ms');"
        )
    };
    server.run(&views("a_"));
    server.run(&views("b_"));
    orders.send(1_000);
    orders.bound(&server);
    server.run("ALTER MATERIALIZED VIEW a_sums PAUSE; ALTER MATERIALIZED VIEW a_windows PAUSE");
    let before = [
        sorted(&server, "a_sums"),
        sorted(&server, "a_top"),
        sorted(&server, "a_windows"),
    ];
    assert_eq!(
        before[0],
        sorted(&server, "b_sums"),
        "it had everything so far"
    );
    let again = server.run("ALTER MATERIALIZED VIEW a_sums PAUSE");
    assert!(again.to_string().contains("paused already"), "{again}");

    let stands = |server: &Server| {
        for name in ["a_sums", "a_windows"] {
            assert_eq!(state(server, "views", name), "paused", "{name}");
        }
        assert_eq!(state(server, "views", "a_top"), "running");
        let now = [
            sorted(server, "a_sums"),
            sorted(server, "a_top"),
            sorted(server, "a_windows"),
        ];
        assert_eq!(now, before);
    };
    orders.send(1_500);
    orders.bound(&server);
    stands(&server);
    let answer = server.run("SELECT * FROM a_top");
    let notice = answer["results"][0]["notices"].to_string();
    assert!(
        notice.contains("a_sums") && notice.contains("paused"),
        "{answer}"
    );

    // Its backlog is in no checkpoint or in one; either way it is there after a kill and a stop.
    server.kill_child();
    ready(&server);
    stands(&server);
    orders.send(500);
    orders.bound(&server);
    server.terminate();
    server.start_again(&[]);
    stands(&server);
    assert_eq!(sorted(&server, "b_top"), [json!([429, 7])]);

    server.run("ALTER MATERIALIZED VIEW a_sums RESUME; ALTER MATERIALIZED VIEW a_windows RESUME");
    orders.send(10);
    orders.bound(&server);
    for name in ["sums", "top", "windows"] {
        let (a, b) = (
            sorted(&server, &format!("a_{name}")),
            sorted(&server, &format!("b_{name}")),
        );
        assert_eq!(a, b, "{name}");
        assert!(!a.is_empty());
        assert_eq!(state(&server, "views", &format!("a_{name}")), "running");
    }
    assert_eq!(
        server.rows("SELECT count(*) FROM a_windows$late"),
        [json!([0])]
    );
    let wanted = sorted(&server, "b_windows");
    wait::until("the sink to follow", LIMIT, || {
        match sorted(&server, "lake.a.a_windows") {
            rows if rows == wanted => Ok(()),
            rows => Err(format!("{} of {} rows", rows.len(), wanted.len())),
        }
    });
    let again = server.run("ALTER MATERIALIZED VIEW a_sums RESUME");
    assert!(again.to_string().contains("not paused"), "{again}");
}

#[test]
fn a_paused_sink_commits_nothing_and_then_everything_once() {
    let Some(mut orders) = Orders::new() else {
        return;
    };
    let mut server = Server::start(FLAGS);
    orders.create_source(&server);
    server.run(
        "CREATE SINK raw FROM orders INTO lake.a.raw WITH (commit_interval = '100 ms');
         CREATE SINK other FROM orders INTO lake.a.other WITH (commit_interval = '100 ms')",
    );
    let rows = |server: &Server, table: &str| {
        let answer = server.rows(&format!(
            "SELECT count(*), count(DISTINCT id) FROM lake.a.{table}"
        ));
        (answer[0][0].as_u64(), answer[0][1].as_u64())
    };
    let holds = |server: &Server, table: &str, count: u64| {
        wait::until("commits", LIMIT, || match rows(server, table) {
            seen if seen == (Some(count), Some(count)) => Ok(()),
            seen => Err(format!("{seen:?} of {count}")),
        });
    };
    orders.send(500);
    holds(&server, "raw", 500);
    server.run("ALTER SINK raw PAUSE");
    orders.send(500);
    holds(&server, "other", 1_000);
    assert_eq!(rows(&server, "raw"), (Some(500), Some(500)));
    assert_eq!(state(&server, "sinks", "raw"), "paused");
    server.kill_child();
    ready(&server);
    orders.send(500);
    holds(&server, "other", 1_500);
    server.terminate();
    server.start_again(&[]);
    assert_eq!(state(&server, "sinks", "raw"), "paused");
    assert_eq!(rows(&server, "raw"), (Some(500), Some(500)));
    server.run("ALTER SINK raw RESUME");
    holds(&server, "raw", 1_500);
    assert_eq!(state(&server, "sinks", "raw"), "running");
}

/// Kills the service of its own accord: nobody answers until it is back.
fn send_and_die(server: &Server, script: &str) {
    let body = json!({ "sql": script }).to_string();
    let path = "/api/v1/sql";
    let headers = [("Content-Type", "application/json")];
    // The connection breaks, or the service says that it is starting.
    let _ = millrace_tests::http::request(&server.address, "POST", path, &headers, body.as_bytes());
}

fn failed(server: &Server, resource: &str, name: &str) -> Value {
    wait::until("it to be given up", LIMIT, || {
        // The connection breaks whenever the service dies.
        let path = format!("/api/v1/{resource}/{name}");
        let answer = millrace_tests::http::request(&server.address, "GET", &path, &[], b"");
        let answer = answer.map_err(|e| e.to_string())?;
        if answer.status != 200 {
            return Err(answer.text());
        }
        match answer.json() {
            row if row["state"] == "failed" => Ok(row),
            other => Err(other.to_string()),
        }
    })
}

#[test]
fn a_view_that_always_fails_is_given_up_and_the_others_run_exactly() {
    let Some(mut orders) = Orders::new() else {
        return;
    };
    // With several workers it may take more failures until the first tick that fails is known.
    let mut server = Server::start(&["--workers", "1", "--checkpoint-interval", "300ms"]);
    orders.create_source(&server);
    for prefix in ["a_", "b_"] {
        server.run(&format!(
            "CREATE MATERIALIZED VIEW {prefix}all AS SELECT id, key FROM orders;
             CREATE MATERIALIZED VIEW {prefix}sums AS SELECT key, count(*) AS n FROM {prefix}all GROUP BY key;
             CREATE SINK {prefix}out FROM {prefix}all INTO lake.a.{prefix}all WITH (commit_interval = '100 ms');"
        ));
    }
    orders.send(700);
    orders.bound(&server);
    let before = sorted(&server, "a_sums");
    // What was shown so far is in the last checkpoint: what fails is new.
    server.terminate();
    let armed = [("MILLRACE_FAILPOINTS", "view.a_all=panic")];
    server.start_again(&armed);
    send_some(&mut orders, &server, "a_all");
    let row = failed(&server, "views", "a_all");
    let error = row["last_error"].as_str().unwrap_or_default();
    assert!(
        error.contains("view.a_all") && error.contains("3 times"),
        "{row}"
    );
    orders.bound(&server);

    let isolated = |server: &Server, orders: &Orders| {
        assert_eq!(state(server, "views", "a_all"), "failed");
        assert_eq!(sorted(server, "a_sums"), before, "dependants see no change");
        assert_eq!(
            server.rows("SELECT count(*) FROM b_all"),
            [json!([orders.sent])]
        );
        let all = orders.sent;
        wait::until("the other sink", LIMIT, || {
            let rows = server.rows("SELECT count(*), count(DISTINCT id) FROM lake.a.b_all");
            match &rows[..] {
                [row] if *row == json!([all, all]) => Ok(()),
                other => Err(format!("{other:?} of {all}")),
            }
        });
    };
    let child = server.child_pid();
    orders.send(300);
    orders.bound(&server);
    isolated(&server, &orders);
    let answer = server.run("SELECT * FROM a_sums");
    let notice = answer["results"][0]["notices"].to_string();
    assert!(
        notice.contains("a_all") && notice.contains("failed"),
        "{answer}"
    );
    assert_eq!(server.child_pid(), child, "it runs on");

    // Known after a crash, and for a binary that is mended, until somebody says RESUME.
    server.kill_child();
    ready(&server);
    isolated(&server, &orders);
    server.kill();
    server.start_again(&[]);
    orders.send(100);
    orders.bound(&server);
    isolated(&server, &orders);
    server.run("ALTER MATERIALIZED VIEW a_all RESUME");
    orders.send(7);
    orders.bound(&server);
    for name in ["all", "sums"] {
        let (a, b) = (format!("a_{name}"), format!("b_{name}"));
        assert_eq!(sorted(&server, &a), sorted(&server, &b), "{name}");
    }
    assert_eq!(state(&server, "views", "a_all"), "running");
    let all = orders.sent;
    wait::until("its sink", LIMIT, || {
        let rows = server.rows("SELECT count(*), count(DISTINCT id) FROM lake.a.a_all");
        match &rows[..] {
            [row] if *row == json!([all, all]) => Ok(()),
            other => Err(format!("{other:?} of {all}")),
        }
    });
}

/// Sends rows until the view has met some of them and failed.
fn send_some(orders: &mut Orders, server: &Server, view: &str) {
    orders.send(350);
    wait::until("the first failure", LIMIT, || {
        match server
            .log_text()
            .contains(&format!("failpoint view.{view}"))
        {
            true => Ok(()),
            false => Err("none".to_string()),
        }
    });
}

#[test]
fn a_view_that_fails_while_it_is_created_does_not_stop_the_server() {
    let Some(mut orders) = Orders::new() else {
        return;
    };
    let mut server = Server::prepare(FLAGS);
    server.start_again(&[("MILLRACE_FAILPOINTS", "view.bad=panic")]);
    orders.create_source(&server);
    server
        .run("CREATE MATERIALIZED VIEW good AS SELECT key, count(*) AS n FROM orders GROUP BY key");
    orders.send(500);
    orders.bound(&server);
    send_and_die(
        &server,
        "CREATE MATERIALIZED VIEW bad AS SELECT key, max(id) AS last FROM orders GROUP BY key",
    );
    let row = failed(&server, "views", "bad");
    assert!(row["last_error"].to_string().contains("view.bad"), "{row}");
    ready(&server);
    let child = server.child_pid();
    orders.send(500);
    orders.bound(&server);
    let counted = |server: &Server| server.rows("SELECT sum(n) FROM good")[0][0].to_string();
    assert!(counted(&server).contains("1000"));
    assert!(!server.error("SELECT * FROM bad")["message"].is_null());
    assert_eq!(server.child_pid(), child, "it runs on");
    server.terminate();
    server.start_again(&[]);
    assert_eq!(state(&server, "views", "bad"), "failed");
    server.run("ALTER MATERIALIZED VIEW bad RESUME");
    wait::until("the view to be built", LIMIT, || {
        let rows = server.try_list("views")?;
        match rows.iter().find(|row| row["name"] == "bad") {
            Some(row) if row["state"] == "running" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    assert_eq!(
        server.rows("SELECT count(*), max(last) FROM bad"),
        [json!([7, 999])]
    );
    assert!(counted(&server).contains("1000"));
}

#[test]
fn a_creation_that_dies_half_way_is_completed_by_the_next_start() {
    let mut server = Server::start(FLAGS);
    server.run("CREATE SOURCE bid WITH (connector = 'generator', kind = 'nexmark', table = 'bid', max_events = 5000)");
    server.terminate();
    let point = "ddl.create.after_meta_before_dataflow";
    server.start_again(&[("MILLRACE_FAILPOINTS", &format!("{point}=kill"))]);
    send_and_die(
        &server,
        "CREATE MATERIALIZED VIEW v AS SELECT auction FROM bid",
    );
    wait::until("the view to be complete", LIMIT, || {
        let rows = server.try_list("views")?;
        match rows.iter().find(|row| row["name"] == "v") {
            Some(row) if row["state"] == "running" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    assert!(server.log_text().contains(point), "it did not die");
    server.caught_up(&[Fed::Ended("bid")], LIMIT);
    assert_eq!(server.rows("SELECT count(*) FROM v"), [json!([4_600])]);
}

#[test]
fn a_sink_that_always_fails_is_given_up_and_the_views_run() {
    let Some(mut orders) = Orders::new() else {
        return;
    };
    // With several writers it may take more failures until the first tick that fails is known.
    let mut server = Server::start(&["--workers", "1", "--checkpoint-interval", "300ms"]);
    orders.create_source(&server);
    server.run(
        "CREATE MATERIALIZED VIEW sums AS SELECT key, count(*) AS n FROM orders GROUP BY key;
         CREATE SINK raw FROM orders INTO lake.a.raw WITH (commit_interval = '100 ms')",
    );
    orders.send(500);
    orders.bound(&server);
    server.terminate();
    server.start_again(&[("MILLRACE_FAILPOINTS", "sink.file.mid_write=panic")]);
    orders.send(500);
    let row = failed(&server, "sinks", "raw");
    assert!(
        row["last_error"]
            .to_string()
            .contains("sink.file.mid_write"),
        "{row}"
    );
    orders.send(400);
    orders.bound(&server);
    let counted = server.rows("SELECT sum(n) FROM sums")[0][0].to_string();
    assert!(counted.contains("1400"), "{counted}");
    server.terminate();
    server.start_again(&[]);
    assert_eq!(state(&server, "sinks", "raw"), "failed");
    server.run("ALTER SINK raw RESUME");
    wait::until("the sink to have everything once", LIMIT, || {
        let rows = server.rows("SELECT count(*), count(DISTINCT id) FROM lake.a.raw");
        match &rows[..] {
            [row] if *row == json!([1_400, 1_400]) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}

#[test]
fn the_state_is_a_relation() {
    let server = Server::start(&["--workers", "2", "--checkpoint-interval", "100ms"]);
    server.run(
        "CREATE SOURCE bid WITH (connector = 'generator', kind = 'nexmark', table = 'bid', max_events = 50000);
         CREATE MATERIALIZED VIEW v AS SELECT bidder, count(*) AS n FROM bid GROUP BY bidder",
    );
    server.caught_up(&[Fed::Ended("bid")], LIMIT);
    let groups = server.rows("SELECT count(*) FROM v");
    // As of a checkpoint that has all of it.
    wait::until("a checkpoint", LIMIT, || {
        let rows = server.rows(
            "SELECT sum(rows), count(DISTINCT worker), sum(key_groups), sum(bytes_paged), min(bytes_resident) > 0,
               count(hottest_groups), count(oldest_row)
             FROM millrace.state WHERE relation = 'v' AND operator LIKE 'aggregate-%'",
        );
        let keys = &groups[0][0];
        let row = &rows[0];
        let same = row[0].to_string().trim_matches('"') == keys.to_string();
        // A thousand keys leave few of the groups empty.
        let filled = row[2].as_str().and_then(|n| n.parse::<u32>().ok());
        match same && row[1] == 2 && filled.is_some_and(|n| (200..=256).contains(&n)) {
            true => Ok(()),
            false => Err(format!("{row} with {keys} keys")),
        }
    });
    assert_eq!(
        server.rows("SELECT s.kind FROM millrace.state s JOIN millrace.state t USING (relation, operator, worker) LIMIT 1"),
        [json!(["view"])]
    );
    let error = server.error("CREATE MATERIALIZED VIEW w AS SELECT rows FROM millrace.state");
    assert!(
        error["message"].to_string().contains("millrace.state"),
        "{error}"
    );
    assert_eq!(server.error("SELECT * FROM millrace.stat")["code"], "42P01");
    let metrics = server.get("/metrics").text();
    assert!(
        metrics.contains("millrace_operator_key_groups{"),
        "{metrics}"
    );
}
