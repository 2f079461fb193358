//! Mistakes of people and damage on disks: what happens is said, with what to do about it, and what was
//! shown stays true.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use millrace_tests::server::{Fed, Server};
use millrace_tests::wait;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);

/// A server with the view `v` and all of it in `lake.m.t`.
fn with_sink() -> Server {
    let server = Server::start(&["--workers", "1", "--commit-interval", "100ms"]);
    server.run(
        "CREATE SOURCE g WITH (connector = 'generator', kind = 'nexmark', table = 'bid', max_events = 5000);
         CREATE MATERIALIZED VIEW v AS SELECT auction, bidder FROM g;
         CREATE SINK s FROM v INTO lake.m.t",
    );
    server.caught_up(&[Fed::Ended("g")], LIMIT);
    let frontier = server.one("sources", "g").expect("listed")["frontier"].as_u64();
    server.committed("s", frontier.expect("a tick"), LIMIT);
    server
}

fn has_hint(error: &Value) -> bool {
    error["hint"].as_str().is_some_and(|hint| !hint.is_empty())
}

/// Files below `folder` that end with `extension`.
fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path, extension));
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
    found
}

#[test]
fn a_view_that_only_counts_goes_on_after_a_kill() {
    let mut server = Server::start(&["--checkpoint-interval", "1h", "--workers", "2"]);
    server.run(
        "CREATE SOURCE g WITH (connector = 'generator', kind = 'nexmark', table = 'bid', rate = 1000, max_events = 4000);
         CREATE MATERIALIZED VIEW v AS SELECT count(*) AS n FROM g",
    );
    let count = |server: &Server| server.rows("SELECT n FROM v")[0][0].as_u64().unwrap_or(0);
    wait::until("some rows", LIMIT, || match count(&server) {
        n if n > 50 => Ok(()),
        n => Err(format!("{n}")),
    });
    let shown = count(&server);
    server.kill();
    server.start_again(&[]);
    assert!(count(&server) >= shown);
    wait::until("all rows", LIMIT, || match count(&server) {
        3680 => Ok(()),
        n => Err(format!("{n}")),
    });
}

#[test]
fn refusals_say_what_to_do() {
    let server = with_sink();
    let source = "CREATE SOURCE h WITH (connector = 'generator', kind = 'nexmark', table = 'bid'";
    let long = "n".repeat(129);
    for (statement, code) in [
        ("ALTER DATA PLANE SET WORKERS 0".to_string(), "22023"),
        ("ALTER DATA PLANE SET WORKERS -3".to_string(), "42601"),
        ("ALTER DATA PLANE SET PROCESSES 65".to_string(), "22023"),
        ("ALTER SYSTEM SET ()".to_string(), "42601"),
        (format!("{source}, rate = 1, rate = 2)"), "42601"),
        (format!("{source}, rate = 99999999999999999999)"), "22023"),
        (format!("{source}, rate = 'fast')"), "22023"),
        (
            "CREATE OR REPLACE MATERIALIZED VIEW v AS SELECT auction, bidder FROM v".to_string(),
            "42P17",
        ),
        ("CANCEL BACKFILL nobody".to_string(), "42P01"),
        ("CANCEL BACKFILL v".to_string(), "55000"),
        (
            format!("CREATE MATERIALIZED VIEW {long} AS SELECT auction FROM g"),
            "42622",
        ),
        (
            format!("CREATE VIEW {long} AS SELECT auction FROM g"),
            "42622",
        ),
        (format!("CREATE SINK {long} FROM v INTO lake.m.u"), "42622"),
        (format!("CREATE SINK u FROM v INTO lake.m.{long}"), "42622"),
        (
            "CREATE VIEW \"a\tb\" AS SELECT auction FROM g".to_string(),
            "42622",
        ),
    ] {
        let error = server.error(&statement);
        assert_eq!(error["code"], json!(code), "{statement}: {error}");
        assert!(has_hint(&error), "{statement}: {error}");
    }
    let error = server.error(&format!("{source}, rate = 99999999999999999999)"));
    assert!(
        !error["message"].to_string().contains("negative"),
        "{error}"
    );
}

#[test]
fn a_sink_into_a_table_with_rows_says_so() {
    let server = with_sink();
    server.run("DROP SINK s");
    let answer = server.run("CREATE SINK again FROM v INTO lake.m.t");
    let notice = &answer["results"][0]["notices"][0];
    assert_eq!(notice["code"], json!("01000"), "{answer}");
    let text = notice["message"].as_str().expect("a message");
    assert!(text.contains("4600 rows of another sink"), "{text}");
    let answer = server.run("CREATE SINK other FROM v INTO lake.m.new");
    let notices = answer["results"][0]["notices"].as_array();
    assert!(notices.is_none_or(Vec::is_empty), "{answer}");
}

#[test]
fn damage_in_the_lake_is_not_the_clients_fault() {
    let mut server = with_sink();
    let warehouse = server.data_dir().join("warehouse");
    let select = |server: &Server| {
        let body = json!({"sql": "SELECT sum(auction), sum(bidder) FROM lake.m.t"});
        server.post_sql(&body, &[])
    };
    assert_eq!(select(&server).status, 200);
    let damaged = |server: &Server, what: &str| {
        let answer = select(server);
        let error = answer.json()["error"].clone();
        assert_eq!(answer.status, 500, "{what}: {error}");
        assert_eq!(error["code"], json!("XX001"), "{what}: {error}");
        assert!(has_hint(&error), "{what}: {error}");
        assert!(error.to_string().contains("m.t"), "{what}: {error}");
        let place = server.data_dir().to_string_lossy().into_owned();
        assert!(!error.to_string().contains(&place), "{what}: {error}");
    };
    let parquet = files(&warehouse, "parquet");
    let whole: Vec<_> = parquet.iter().map(|f| fs::read(f).expect("read")).collect();
    for (file, bytes) in parquet.iter().zip(&whole) {
        let mut broken = bytes.clone();
        broken[4..].iter_mut().take(64).for_each(|b| *b ^= 0xa5);
        fs::write(file, broken).expect("written");
    }
    damaged(&server, "the head of a data file");
    for (file, bytes) in parquet.iter().zip(&whole) {
        fs::write(file, &bytes[..bytes.len() / 2]).expect("written");
    }
    damaged(&server, "a short data file");
    parquet
        .iter()
        .for_each(|f| fs::remove_file(f).expect("removed"));
    damaged(&server, "no data file");
    for (file, bytes) in parquet.iter().zip(&whole) {
        fs::write(file, bytes).expect("written");
    }
    assert_eq!(select(&server).status, 200);
    // What was read once is remembered until a restart.
    server.terminate();
    for file in files(&warehouse, "json") {
        fs::remove_file(file).expect("removed");
    }
    server.start_again(&[]);
    damaged(&server, "no metadata");
}

#[test]
fn checkpoints_that_cannot_be_kept_or_found_are_explained() {
    for place in ["file:///etc/hostname", "file:///proc/nowhere/at/all"] {
        let mut server = Server::prepare(&["--checkpoints", place]);
        let status = server.try_start(&[]).expect_err("no place for checkpoints");
        assert_eq!(status.code(), Some(2), "{}", server.log_text());
        let log = server.log_text();
        let path = place.strip_prefix("file://").expect("a file");
        assert!(log.contains("--checkpoints") && log.contains(path), "{log}");
    }
    let mut server = Server::prepare(&["--checkpoints", "s3://KEY:SECRET@bucket/x"]);
    let status = server.try_start(&[]).expect_err("no such store");
    assert_eq!(status.code(), Some(2));
    let log = server.log_text();
    assert!(
        log.contains("s3://…@bucket/x") && !log.contains("SECRET"),
        "{log}"
    );

    let mut server = with_sink();
    server.terminate();
    fs::remove_dir_all(server.data_dir().join("engine/checkpoints")).expect("removed");
    let status = server.try_start(&[]).expect_err("nothing to begin with");
    assert_eq!(status.code(), Some(2));
    let log = server.log_text();
    assert!(log.contains("was --checkpoints changed"), "{log}");
}
