//! The service in this process: a pipeline end to end over HTTP, across a restart, and bad input.

use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Server;
use crate::cmd::client::{self, Response};
use crate::config::Config;

const SOURCE: &str = "CREATE SOURCE bids (auction BIGINT, bidder BIGINT, price BIGINT, \
    date_time TIMESTAMP, WATERMARK FOR date_time AS date_time - INTERVAL '4' SECOND) \
    WITH (connector = 'generator', kind = 'nexmark', table = 'bid', seed = 7, max_events = 50000)";
/// 46 of 50 events are bids.
const BIDS: i64 = 46_000;

async fn start(dir: &Path) -> Server {
    let config = Config {
        data_dir: dir.to_path_buf(),
        http: "127.0.0.1:0".to_string(),
        workers: 2,
        checkpoint_interval: Duration::from_secs(1),
        commit_interval: Duration::from_millis(500),
        max_body: 1 << 20,
        ..Config::default()
    };
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    Server::start(config, listener).await.expect("starts")
}

async fn request(server: &Server, method: &'static str, path: &str, body: String) -> Response {
    let (address, path) = (server.address().to_string(), path.to_string());
    tokio::task::spawn_blocking(move || client::request(&address, method, &path, &body))
        .await
        .expect("runs")
        .expect("answers")
}

async fn post(server: &Server, body: Value) -> (u16, Value) {
    let response = request(server, "POST", "/api/v1/sql", body.to_string()).await;
    (
        response.status,
        serde_json::from_slice(&response.body).expect("JSON"),
    )
}

async fn sql(server: &Server, text: &str) -> Value {
    let (status, body) = post(server, json!({ "sql": text })).await;
    assert_eq!(status, 200, "{text}: {body}");
    body["results"]
        .as_array()
        .expect("a list")
        .last()
        .cloned()
        .unwrap_or_default()
}

async fn refused(server: &Server, text: &str) -> (u16, Value) {
    let (status, body) = post(server, json!({ "sql": text })).await;
    assert!(status >= 400, "{text}: {body}");
    (status, body["error"].clone())
}

/// Asks until the first row is the one expected.
async fn eventually(server: &Server, text: &str, row: Value) {
    let started = Instant::now();
    loop {
        let result = sql(server, text).await;
        if result["rows"][0] == row {
            return;
        }
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "{text} gives {}",
            result["rows"]
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_pipeline_runs_is_queried_and_survives_a_restart() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let server = start(dir.path()).await;
    sql(&server, SOURCE).await;
    sql(&server, "CREATE MATERIALIZED VIEW per_auction AS SELECT auction, count(*) AS n, max(price) AS top FROM bids GROUP BY auction").await;
    sql(
        &server,
        "CREATE MATERIALIZED VIEW totals AS SELECT sum(n) AS n FROM per_auction",
    )
    .await;
    sql(&server, "CREATE SINK raw FROM bids INTO lake.market.bids").await;
    eventually(&server, "SELECT n FROM totals", json!([BIDS.to_string()])).await;
    eventually(
        &server,
        "SELECT count(*) FROM lake.market.bids",
        json!([BIDS]),
    )
    .await;

    // Two views and a lake table in one statement, the views at one tick.
    let both = sql(
        &server,
        "SELECT (SELECT sum(n) FROM per_auction) = (SELECT n FROM totals), \
        (SELECT count(*) FROM lake.market.bids)",
    )
    .await;
    assert_eq!(both["rows"], json!([[true, BIDS]]), "{both}");
    assert!(both["tick"].is_u64(), "{both}");
    assert!(both["snapshots"]["lake.market.bids"].is_string(), "{both}");

    server.stop().await.expect("stops");
    let server = start(dir.path()).await;
    let again = sql(&server, "SELECT n FROM totals").await;
    assert_eq!(again["rows"], json!([[BIDS.to_string()]]), "{again}");
    assert_eq!(
        sql(&server, "SELECT count(*) FROM lake.market.bids").await["rows"],
        json!([[BIDS]])
    );

    let (status, error) = refused(&server, "DROP SOURCE bids").await;
    assert_eq!((status, &error["code"]), (409, &json!("2BP01")), "{error}");
    assert!(
        error["detail"]
            .as_str()
            .is_some_and(|d| d.contains("per_auction")),
        "{error}"
    );
    sql(&server, "DROP SOURCE bids CASCADE").await;
    assert_eq!(sql(&server, "SHOW ALL").await["rows"], json!([]));
    server.stop().await.expect("stops");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn input_is_never_answered_with_500() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let server = start(dir.path()).await;
    let (status, body) = post(
        &server,
        json!({ "sql": "SELECT 1 AS a; SELECT nothing FROM nowhere; SELECT 2" }),
    )
    .await;
    assert_eq!(status, 400);
    assert_eq!(body["results"][0]["rows"], json!([[1]]));
    assert_eq!(body["results"].as_array().map(Vec::len), Some(1));
    assert_eq!(
        (&body["error"]["code"], &body["error"]["statement"]),
        (&json!("42P01"), &json!(1))
    );

    let (status, error) = refused(&server, "SELECT 1;; SELEKT 2").await;
    assert_eq!((status, &error["code"]), (400, &json!("42601")), "{error}");
    assert!(error["position"].is_u64(), "{error}");
    for text in [
        "SELECT 1/0".to_string(),
        "SELECT CAST('x' AS BIGINT)".to_string(),
        "SELECT 9223372036854775807 + 1".to_string(),
        format!("SELECT {}1{}", "(".repeat(5_000), ")".repeat(5_000)),
        format!("SELECT {}", vec!["1"; 20_000].join(" + ")),
        "SELECT * FROM lake.no.such".to_string(),
        "CREATE SOURCE s (a BIGINT) WITH (connector = 'carrier pigeon')".to_string(),
        "DROP SINK nothing".to_string(),
        "DESCRIBE nothing".to_string(),
        "SHOW CREATE VIEW nothing".to_string(),
        "\u{0}\u{feff}".to_string(),
        "SELECT 'open".to_string(),
    ] {
        let shown: String = text.chars().take(60).collect();
        let (status, error) = refused(&server, &text).await;
        assert!(
            [400, 404, 409].contains(&status),
            "{shown}: {status} {error}"
        );
    }
    let (status, body) = post(
        &server,
        json!({ "sql": "SELECT $1 + 1, $2", "params": [41, "x"] }),
    )
    .await;
    assert_eq!(
        (status, &body["results"][0]["rows"]),
        (200, &json!([[42, "x"]])),
        "{body}"
    );
    let (status, _) = refused(&server, "SELECT $1").await;
    assert_eq!(status, 400);

    for (method, path, body, expected) in [
        ("POST", "/api/v1/sql", "{".to_string(), 400),
        ("POST", "/api/v1/sql", "[".repeat(200_000), 400),
        ("POST", "/api/v1/sql", "x".repeat(2 << 20), 413),
        ("GET", "/api/v1/sql", String::new(), 405),
        ("GET", "/api/v1/nothing", String::new(), 404),
        ("GET", "/api/v1/views/nothing", String::new(), 404),
        ("GET", "/%ff%00", String::new(), 404),
        ("GET", "/api/v1/views/%ff", String::new(), 404),
    ] {
        let response = request(&server, method, path, body).await;
        let body: Value = serde_json::from_slice(&response.body).unwrap_or_default();
        assert_eq!(response.status, expected, "{method} {path}: {body}");
        assert!(
            body["error"]["message"].is_string(),
            "{method} {path}: {body}"
        );
    }
    for (path, part) in [
        ("/healthz", "ok"),
        ("/readyz", "ready"),
        ("/", "<title>Millrace</title>"),
        ("/metrics", "millrace_ready 1"),
        ("/api/v1/jobs", "\"jobs\":[]"),
    ] {
        let response = request(&server, "GET", path, String::new()).await;
        let text = String::from_utf8_lossy(&response.body).into_owned();
        assert!(
            response.status == 200 && text.contains(part),
            "{path}: {text}"
        );
    }
    server.stop().await.expect("stops");
}
