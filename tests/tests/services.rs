//! Sources and sinks against real parts: bad records, absent topics, brokers and files, damaged logs.

use std::path::Path;
use std::time::Duration;

use millrace_tests::kafka::{OwnBroker, Topic, Writer, broker};
use millrace_tests::lake::{ledger, python};
use millrace_tests::proxy::{Mode, Proxy};
use millrace_tests::server::{Fed, Server};
use millrace_tests::wait;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(120);
const FLAGS: &[&str] = &[
    "--workers",
    "2",
    "--checkpoint-interval",
    "300ms",
    "--commit-interval",
    "300ms",
];

fn source(name: &str, broker: &str, topic: &str) -> String {
    format!(
        "CREATE SOURCE {name} (id BIGINT, name VARCHAR, at TIMESTAMP)
         WITH (connector = 'kafka', bootstrap_servers = '{broker}', topic = '{topic}', format = 'json', start = 'earliest')"
    )
}

#[test]
fn records_that_do_not_decode_are_kept() {
    let Some(broker) = broker() else { return };
    let topic = Topic::create(&broker, "bad", 2);
    let mut writer = Writer::new(&broker);
    let records: &[&[u8]] = &[
        b"{\"id\": 1, \"name\": \"a\"}",
        b"not json",
        b"{\"id\": \"text\", \"name\": \"b\"}",
        b"{\"id\": 2, \"name\": \"c\", \"at\": \"2024-01-01T00:00:00Z\", \"more\": [1, {}]}",
        b"\xff\xfe",
        b"{\"id\": 3, \"name\": \"cut",
        b"{\"id\": 99999999999999999999}",
        b"[1, 2]",
        b"",
        b"{\"id\": 4}",
    ];
    for (i, record) in records.iter().enumerate() {
        writer.send(&topic, (i % 2) as i32, record);
    }
    writer.flush();
    let mut server = Server::start(FLAGS);
    server.run(&source("r", &broker, &topic.name));
    server.run("CREATE MATERIALIZED VIEW good AS SELECT id, name FROM r");
    server.caught_up(&[Fed::Records("r", records.len() as u64)], LIMIT);
    let check = |server: &Server| {
        let rows = server.rows("SELECT id, name FROM good ORDER BY id");
        assert_eq!(rows, [json!([1, "a"]), json!([2, "c"]), json!([4, null])]);
        let rejected = server.rows("SELECT * FROM r$rejected");
        assert_eq!(rejected.len(), 7, "{rejected:?}");
        let row = server.one("sources", "r").expect("listed");
        assert_eq!(row["rejected_rows"], 7, "{row}");
    };
    check(&server);
    // Bytes, partition, offset and reason: enough to find and to replay each.
    let columns: Vec<String> = server
        .rows("DESCRIBE r$rejected")
        .iter()
        .map(|row| row[0].as_str().unwrap_or_default().to_lowercase())
        .collect();
    for part in ["bytes", "offset", "reason"] {
        assert!(
            columns.iter().any(|c| c.contains(part)),
            "{part} is in {columns:?}"
        );
    }
    assert!(
        columns
            .iter()
            .any(|c| c.contains("partition") || c.contains("split")),
        "{columns:?}"
    );
    server.kill();
    server.start_again(&[]);
    server.caught_up(&[Fed::Records("r", records.len() as u64)], LIMIT);
    check(&server);
    let text = server.get("/metrics").text();
    assert!(
        text.lines()
            .any(|l| l.starts_with("millrace_rejected_rows_total") && l.ends_with(" 7")),
        "{text}"
    );
}

#[test]
fn what_is_missing_is_said_at_creation() {
    let Some(broker) = broker() else { return };
    let server = Server::start(FLAGS);
    let error = server.error(&source("r", &broker, "no-such-topic-of-this-name"));
    assert!(
        error["message"]
            .as_str()
            .is_some_and(|m| m.contains("no-such-topic-of-this-name")),
        "{error}"
    );
    assert!(error["hint"].is_string(), "{error}");
    let answer = server.post_sql(&json!({"sql": source("r", "127.0.0.1:1", "x")}), &[]);
    assert!([400, 503].contains(&answer.status), "{}", answer.text());
    let error = answer.json()["error"].clone();
    assert!(
        error["message"]
            .as_str()
            .is_some_and(|m| m.contains("127.0.0.1:1")),
        "{error}"
    );
    assert!(error["hint"].is_string(), "{error}");
    let wrong = source("r", &broker, "x").replace("'json'", "'jsn'");
    assert!(
        server.error(&wrong)["hint"]
            .as_str()
            .is_some_and(|h| h.contains("json"))
    );
    let wrong = source("r", &broker, "x").replace("'earliest'", "'yesterday'");
    assert!(server.error(&wrong)["hint"].is_string());
    // Nothing of it is left behind.
    assert!(server.list("sources").is_empty());
}

/// Tick of the last checkpoint since the server started.
fn checkpoint_tick(server: &Server) -> f64 {
    let metrics = server.get("/metrics").text();
    let line = metrics
        .lines()
        .find_map(|line| line.strip_prefix("millrace_checkpoint_tick "));
    line.and_then(|n| n.parse().ok()).expect("a number")
}

/// `start = 'latest'`: what was there before is not read, by nobody, also after restarts; a view that
/// comes later begins where the source began.
#[test]
fn latest_is_where_the_source_was_first_read() {
    let Some(broker) = broker() else { return };
    let topic = Topic::create(&broker, "latest", 1);
    let mut writer = Writer::new(&broker);
    let send = |writer: &mut Writer, ids: std::ops::Range<u64>| {
        for id in ids {
            writer.send(&topic, 0, json!({"id": id}).to_string().as_bytes());
        }
        writer.flush();
    };
    send(&mut writer, 0..100);
    let mut server = Server::start(&["--checkpoint-interval", "1h"]);
    server.run(&source("r", &broker, &topic.name).replace("earliest", "latest"));
    server.run("CREATE MATERIALIZED VIEW n AS SELECT count(*) AS n, min(id) AS first FROM r");
    wait::until("the position to be known", LIMIT, || {
        let row = server.one("sources", "r").ok_or("gone")?;
        match row["offsets"]["0"].as_u64() {
            Some(100) => Ok(()),
            _ => Err(row.to_string()),
        }
    });
    send(&mut writer, 100..150);
    server.caught_up(&[Fed::Records("r", 150)], LIMIT);
    assert_eq!(server.rows("SELECT n, first FROM n"), [json!([50, 100])]);
    // No checkpoint knows these records: they are read again from where the source began.
    server.kill();
    server.start_again(&[]);
    assert_eq!(server.rows("SELECT n, first FROM n"), [json!([50, 100])]);
    server.run("CREATE MATERIALIZED VIEW later AS SELECT count(*) AS n, min(id) AS first FROM r");
    assert_eq!(
        server.rows("SELECT n, first FROM later"),
        [json!([50, 100])]
    );
}

#[test]
fn a_broker_goes_and_comes_back() {
    if broker().is_none() {
        return;
    }
    let own = OwnBroker::new();
    own.start();
    let topic = Topic::create(&own.address(), "away", 1);
    let mut writer = Writer::new(&own.address());
    let send = |writer: &mut Writer, ids: std::ops::Range<u64>| {
        for id in ids {
            writer.send(
                &topic,
                0,
                json!({"id": id, "name": "x"}).to_string().as_bytes(),
            );
        }
        writer.flush();
    };
    send(&mut writer, 0..1_000);
    let mut server = Server::start(FLAGS);
    server.run(&source("r", &own.address(), &topic.name));
    server.run("CREATE MATERIALIZED VIEW n AS SELECT count(*) AS n, max(id) AS last FROM r");
    server.caught_up(&[Fed::Records("r", 1_000)], LIMIT);
    assert_eq!(server.rows("SELECT n, last FROM n"), [json!([1_000, 999])]);

    own.stop();
    wait::until("the source to say that the broker is away", LIMIT, || {
        let row = server.one("sources", "r").ok_or("gone")?;
        if row["last_error"].is_string() {
            Ok(())
        } else {
            Err(row.to_string())
        }
    });
    // What it had delivered is in a checkpoint at once, so that a restart needs nothing of it; without
    // one the start would wait for the broker.
    let applied = server.one("sources", "r").expect("listed")["frontier"].as_u64();
    wait::until("a checkpoint", LIMIT, || {
        let (tick, applied) = (checkpoint_tick(&server), applied.expect("a tick") as f64);
        match tick + 1.0 >= applied {
            true => Ok(()),
            false => Err(format!("{tick} below {applied}")),
        }
    });
    // Everything else goes on, through a restart too.
    assert_eq!(server.rows("SELECT n FROM n"), [json!([1_000])]);
    server.kill();
    server.start_again(&[]);
    wait::until("the view to be restored", LIMIT, || {
        let answer = server.sql("SELECT n FROM n");
        if answer["results"][0]["rows"] == json!([[1_000]]) {
            Ok(())
        } else {
            Err(answer.to_string())
        }
    });

    own.start();
    send(&mut writer, 1_000..1_500);
    server.caught_up(&[Fed::Records("r", 1_500)], LIMIT);
    assert_eq!(
        server.rows("SELECT n, last FROM n"),
        [json!([1_500, 1_499])]
    );
    wait::until("the trouble to be over", LIMIT, || {
        let row = server.one("sources", "r").ok_or("gone")?;
        if row["last_error"].is_null() {
            Ok(())
        } else {
            Err(row.to_string())
        }
    });
}

#[test]
fn files_of_all_formats_and_retractions_reach_the_lake() {
    let Some(python) = python() else { return };
    let mut server = Server::start(FLAGS);
    let folder = server.scratch().to_path_buf();
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).expect("written");
        path.to_string_lossy().into_owned()
    };
    let csv = write(
        "a.csv",
        "id,name,price\n1,ann,1.50\n2,\"b, c\",\n3,,2.25\nx,bad,1\n",
    );
    server.run(&format!(
        "CREATE SOURCE c (id BIGINT, name VARCHAR, price DECIMAL(10,2))
         WITH (connector = 'files', format = 'csv', path = '{csv}')"
    ));
    server.run("CREATE SINK c_out FROM c INTO lake.files.c");
    let changes = write(
        "ch.json",
        "{\"op\":\"+\",\"k\":\"a\",\"v\":1}\n{\"op\":\"+\",\"k\":\"b\",\"v\":2}\n{\"op\":\"-\",\"k\":\"a\",\"v\":1}\n",
    );
    server.run(&format!(
        "CREATE SOURCE ch (k VARCHAR, v BIGINT) WITH (connector = 'files', format = 'json', changelog = 'op', path = '{changes}')"
    ));
    // A retracting input is refused, unless the sink keeps the log of changes.
    let error = server.error("CREATE SINK no FROM ch INTO lake.files.no");
    assert!(
        error["hint"]
            .as_str()
            .is_some_and(|h| h.contains("changelog")),
        "{error}"
    );
    server.run("CREATE SINK log FROM ch INTO lake.files.log WITH (changelog = 'op')");
    server.caught_up(&[Fed::Ended("c"), Fed::Ended("ch")], LIMIT);
    let tick = server.one("sources", "ch").expect("listed")["frontier"]
        .as_u64()
        .expect("a tick");
    for sink in ["c_out", "log"] {
        server.committed(sink, tick, LIMIT);
    }
    let rows = server.rows("SELECT id, name, price FROM lake.files.c ORDER BY id");
    assert_eq!(
        rows,
        [
            json!([1, "ann", "1.50"]),
            json!([2, "b, c", null]),
            json!([3, null, "2.25"])
        ]
    );
    assert_eq!(server.rows("SELECT count(*) FROM c$rejected"), [json!([1])]);
    let log = server.rows("SELECT k, v, sum(CASE WHEN op = '+' THEN 1 ELSE -1 END) AS net FROM lake.files.log GROUP BY k, v ORDER BY k");
    assert_eq!(log, [json!(["a", 1, "0"]), json!(["b", 2, "1"])]);
    // An existing table of another form is refused.
    let error = server.error("CREATE SINK wrong FROM c INTO lake.files.log");
    assert!(error["message"].is_string(), "{error}");
    assert!(server.terminate().success());
    let report = ledger(&python, &server.data_dir(), &["read", "files.c"]);
    let mut rows = report["rows"].as_array().expect("rows").clone();
    rows.sort_by_key(ToString::to_string);
    assert_eq!(
        rows,
        [
            json!([1, "ann", "1.50"]),
            json!([2, "b, c", null]),
            json!([3, null, "2.25"])
        ]
    );
}

/// A server with a bounded source `t` of three rows.
fn with_file() -> Server {
    let server = Server::start(&["--workers", "1"]);
    let rows = "{\"id\":1,\"at\":\"2024-05-01T10:00:00Z\"}\n{\"id\":2}\n{\"id\":3}\n";
    let path = write(server.scratch(), "t.json", rows);
    server.run(&format!(
        "CREATE SOURCE t (id BIGINT, at TIMESTAMP)
         WITH (connector = 'files', format = 'json', path = '{path}')"
    ));
    server
}

fn write(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    std::fs::write(&path, text).expect("a file can be written");
    path.to_string_lossy().into_owned()
}

/// What cannot work is refused when it is asked for, with a way out.
#[test]
fn what_cannot_work_is_refused_at_creation() {
    let server = with_file();
    let text = write(server.scratch(), "text.csv", "a,b\n1,2\n");
    let nested = write(
        server.scratch(),
        "nested.json",
        "{\"a\":1,\"o\":{\"x\":1}}\n",
    );
    for (statement, code) in [
        (
            format!(
                "CREATE SOURCE p (a BIGINT) WITH (connector = 'files', format = 'parquet', path = '{text}')"
            ),
            "22000",
        ),
        (
            format!(
                "CREATE SOURCE p WITH (connector = 'files', format = 'parquet', path = '{text}')"
            ),
            "22000",
        ),
        (
            format!(
                "CREATE SOURCE p WITH (connector = 'files', format = 'json', path = '{nested}')"
            ),
            "0A000",
        ),
        (
            "CREATE MATERIALIZED VIEW h AS SELECT window_start, count(*) AS n FROM
               HOP(t, at, INTERVAL '1' MICROSECOND, INTERVAL '100' DAY) GROUP BY window_start"
                .to_string(),
            "54000",
        ),
    ] {
        let answer = server.post_sql(&json!({ "sql": statement }), &[]);
        assert_eq!(answer.status, 400, "{statement}: {}", answer.text());
        let error = answer.json()["error"].clone();
        assert_eq!(error["code"], code, "{statement}: {error}");
        assert!(error["hint"].is_string(), "{statement}: {error}");
    }
}

/// A finished source needs its files no more: what was made of them stays.
#[test]
fn views_outlive_the_files_they_were_made_of() {
    let mut server = with_file();
    server.run("CREATE MATERIALIZED VIEW n AS SELECT count(*) AS n FROM t");
    wait::until("the source to end", LIMIT, || {
        match server.one("sources", "t").ok_or("gone")?["state"].as_str() {
            Some("finished") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    assert_eq!(server.rows("SELECT n FROM n"), [json!([3])]);
    assert!(server.terminate().success());
    let path = server.scratch().join("t.json");
    std::fs::rename(&path, server.scratch().join("away")).expect("moved");
    server.start_again(&[]);
    assert_eq!(server.rows("SELECT n FROM n"), [json!([3])]);
    // Reading the files anew is another matter.
    assert!(server.error("SELECT count(*) FROM t")["message"].is_string());
}

/// A log that was damaged is never taken for a shorter one: rows would be written twice.
#[test]
fn a_damaged_log_is_noticed() {
    let mut server = Server::start(&[
        "--workers",
        "1",
        "--checkpoint-interval",
        "1h",
        "--commit-interval",
        "200ms",
    ]);
    server.run(
        "CREATE SOURCE bid WITH (connector = 'generator', kind = 'nexmark', table = 'bid', seed = 7, rate = 2000);
         CREATE MATERIALIZED VIEW n AS SELECT count(*) AS n FROM bid;
         CREATE SINK raw FROM bid INTO lake.damaged.raw",
    );
    let committed = |server: &Server| {
        server
            .one("sinks", "raw")
            .and_then(|s| s["committed"].as_u64())
    };
    let first = wait::until("a commit", LIMIT, || {
        committed(&server).ok_or_else(|| "none".to_string())
    });
    wait::until("another commit", LIMIT, || match committed(&server) {
        Some(now) if now > first => Ok(()),
        other => Err(format!("{other:?}")),
    });
    server.kill();
    let log = |server: &Server| {
        let dir = server.data_dir().join("engine/remap");
        let files = std::fs::read_dir(dir)
            .expect("a folder")
            .map(|f| f.expect("a file").path());
        files
            .max_by_key(|f| f.metadata().map_or(0, |m| m.len()))
            .expect("a segment")
    };
    let path = log(&server);
    let whole = std::fs::read(&path).expect("read");
    // A flipped byte before whole records: nothing is started.
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    std::fs::write(&path, flipped).expect("written");
    assert_eq!(server.try_start(&[]).expect_err("refused").code(), Some(2));
    // Cut short: the sink, whose table holds more, stops; the rest goes on.
    std::fs::write(&path, &whole[..whole.len() / 3]).expect("written");
    server.start_again(&[]);
    let sink = server.one("sinks", "raw").expect("listed");
    assert_eq!(sink["state"], "failed", "{sink}");
    assert_eq!(server.rows("SELECT n > 0 FROM n"), [json!([true])]);
}

/// The order of rows in files says nothing about time: however they lie, no row is late, and a view is
/// the batch answer.
#[test]
fn no_row_of_a_file_is_late() {
    let server = Server::start(FLAGS);
    let rows: String = (0..40_000)
        .rev()
        .map(|id| format!("{{\"id\":{id},\"ms\":{}}}\n", id * 100))
        .collect();
    let path = write(server.scratch(), "backwards.json", &rows);
    server.run(&format!(
        "CREATE SOURCE b (id BIGINT, ms BIGINT, at TIMESTAMP AS to_timestamp_millis(ms), WATERMARK FOR at AS at)
         WITH (connector = 'files', format = 'json', path = '{path}')"
    ));
    let query = |relation: &str| {
        format!(
            "SELECT window_start, count(*) AS n, sum(id) AS s FROM TUMBLE({relation}, at, INTERVAL '10' SECOND)
             GROUP BY window_start, window_end"
        )
    };
    server.run(&format!(
        "CREATE MATERIALIZED VIEW changes AS {0};
         CREATE MATERIALIZED VIEW closed AS {0} EMIT ON WINDOW CLOSE",
        query("b")
    ));
    server.caught_up(&[Fed::Ended("b")], LIMIT);
    let batch = server.rows(&format!(
        "SELECT * FROM ({}) ORDER BY window_start",
        query("b")
    ));
    assert_eq!(batch.len(), 400);
    for view in ["changes", "closed"] {
        let rows = server.rows(&format!("SELECT * FROM {view} ORDER BY window_start"));
        assert_eq!(rows, batch, "{view}");
        assert_eq!(server.rows(&format!("SELECT * FROM {view}$late")).len(), 0);
    }
}

/// Connections that are cut, stand still, are slow or lead nowhere cost time, not records.
#[test]
fn a_bad_way_to_the_broker_loses_and_doubles_nothing() {
    let Some(broker) = broker() else { return };
    let topic = Topic::create(&broker, "proxied", 2);
    let proxy = Proxy::start(&broker);
    let mut writer = Writer::new(&broker);
    let mut sent = 0_u64;
    let mut send = |count: u64| {
        for id in sent..sent + count {
            let text = format!(r#"{{"id":{id},"name":"{}"}}"#, "x".repeat(200));
            writer.send(&topic, (id % 2) as i32, text.as_bytes());
        }
        writer.flush();
        sent += count;
        sent
    };
    let mut server = Server::start(FLAGS);
    server.run(&source("r", &proxy.address(), &topic.name));
    server.run("CREATE MATERIALIZED VIEW n AS SELECT count(*) AS n, sum(id) AS s FROM r");
    server.run("CREATE MATERIALIZED VIEW d AS SELECT DISTINCT id FROM r");
    server.run("CREATE SINK out FROM r INTO lake.proxied.r");
    let check = |server: &Server, sent: u64| {
        server.caught_up(&[Fed::Records("r", sent)], LIMIT);
        let sum = (sent * (sent - 1) / 2).to_string();
        assert_eq!(server.rows("SELECT n, s FROM n"), [json!([sent, sum])]);
        assert_eq!(server.rows("SELECT count(*) FROM d"), [json!([sent])]);
    };
    check(&server, send(5_000));
    assert!(proxy.connections() > 0, "the client goes through the proxy");

    // Cut while records flow, three times.
    for _ in 0..3 {
        let all = send(3_000);
        proxy.set(Mode::Cut);
        wait::until("the cut to be seen", LIMIT, || {
            let row = server.one("sources", "r").ok_or("no source")?;
            match row["state"] == "retrying" {
                true => Ok(()),
                false => Err(row.to_string()),
            }
        });
        proxy.set(Mode::Pass);
        check(&server, all);
    }
    // Still for a while; a server that is killed meanwhile begins again while nothing moves.
    proxy.set(Mode::Stall);
    let all = send(3_000);
    server.kill();
    let lines = server.begin(&[]);
    let before = proxy.connections();
    wait::until("the new process to ask", LIMIT, || {
        match proxy.connections() > before {
            true => Ok(()),
            false => Err("it does not".to_string()),
        }
    });
    proxy.set(Mode::Pass);
    server.ready(&lines);
    check(&server, all);
    // Slow.
    proxy.set(Mode::Delay(Duration::from_millis(100)));
    check(&server, send(3_000));
    proxy.set(Mode::Pass);
    // The other end is gone and has not said so.
    let before = proxy.connections();
    proxy.leave_half_open();
    let all = send(3_000);
    check(&server, all);
    assert!(proxy.connections() > before, "it has connected anew");
    let frontier = server.one("sources", "r").expect("listed")["frontier"].as_u64();
    server.committed("out", frontier.expect("a tick"), LIMIT);
    let sum = (all * (all - 1) / 2).to_string();
    let rows = server.rows("SELECT count(*), count(DISTINCT id), sum(id) FROM lake.proxied.r");
    assert_eq!(rows, [json!([all, all, sum])]);
}
