//! The HTTP API as a client sees it: every promise of `/api/v1` that others build on.

#[path = "http/replace.rs"]
mod replace;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use arrow::array::AsArray;
use arrow::datatypes::{Float64Type, Int64Type};
use millrace_tests::http::{self, Lines};
use millrace_tests::server::{Fed, Server};
use millrace_tests::wait;
use serde_json::{Value, json};

#[path = "http/alter.rs"]
mod alter;
#[path = "http/mistakes.rs"]
mod mistakes;
#[path = "http/nexmark.rs"]
mod nexmark;
#[path = "http/processes.rs"]
mod processes;
#[path = "http/shell.rs"]
mod shell;
#[path = "http/sinks.rs"]
mod sinks;
#[path = "http/storage.rs"]
mod storage;
#[path = "http/tpch.rs"]
mod tpch;
#[path = "http/upgrade.rs"]
mod upgrade;

const LIMIT: Duration = Duration::from_secs(60);
const BASICS: &str = r#"{"id":1,"name":"ann","price":"1.50","x":0.5,"big":9007199254740993,"at":"2024-05-01T10:00:00Z","raw":"aGk="}
{"id":2,"name":"bob","price":"-2.25","x":"NaN","big":-9223372036854775808,"at":"2024-05-01T10:00:01.500Z","raw":""}
{"id":3,"x":"-Infinity","unknown":{"deep":[1,2]}}
"#;

fn write(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    std::fs::write(&path, text).expect("a file can be written");
    path.to_string_lossy().into_owned()
}

/// A server with a bounded source `t`.
fn with_basics() -> Server {
    let server = Server::start(&["--workers", "1"]);
    let path = write(server.scratch(), "t.json", BASICS);
    server.run(&format!(
        "CREATE SOURCE t (id BIGINT, name VARCHAR, price DECIMAL(10,2), x DOUBLE, big BIGINT, at TIMESTAMP, raw BYTEA)
         WITH (connector = 'files', format = 'json', path = '{path}')"
    ));
    server
}

#[test]
fn answers_have_the_promised_form() {
    let server = with_basics();
    let answer = server.post_sql(
        &json!({"sql": "SELECT * FROM t ORDER BY id; SELECT count(*) AS n FROM t", "format": "json"}),
        &[],
    );
    assert_eq!(answer.status, 200);
    assert!(
        answer
            .header("content-type")
            .is_some_and(|t| t.starts_with("application/json"))
    );
    let body = answer.json();
    let results = body["results"].as_array().expect("one entry per statement");
    assert_eq!(results.len(), 2);
    assert!(body.get("error").is_none_or(Value::is_null));
    let columns: Vec<(&str, &str)> = results[0]["columns"]
        .as_array()
        .expect("columns")
        .iter()
        .map(|c| {
            (
                c["name"].as_str().expect("a name"),
                c["type"].as_str().expect("a type"),
            )
        })
        .collect();
    assert_eq!(
        columns,
        [
            ("id", "BIGINT"),
            ("name", "TEXT"),
            ("price", "DECIMAL(10,2)"),
            ("x", "DOUBLE"),
            ("big", "BIGINT"),
            ("at", "TIMESTAMP"),
            ("raw", "BYTEA")
        ]
    );
    // Beyond 2^53 integers are strings, decimals always; NaN and infinities are strings; a missing
    // field is NULL and an unknown one is ignored.
    assert_eq!(
        results[0]["rows"],
        json!([
            [
                1,
                "ann",
                "1.50",
                0.5,
                "9007199254740993",
                "2024-05-01T10:00:00Z",
                "aGk="
            ],
            [
                2,
                "bob",
                "-2.25",
                "NaN",
                "-9223372036854775808",
                "2024-05-01T10:00:01.500Z",
                ""
            ],
            [3, null, null, "-Infinity", null, null, null],
        ])
    );
    for result in results {
        assert!(result["elapsed_ms"].is_number());
        for key in ["rows_affected", "tick"] {
            assert!(result.get(key).is_some(), "{key} is always there");
        }
    }
    assert_eq!(results[1]["rows"], json!([[3]]));
}

#[test]
fn parameters_stand_for_values() {
    let server = with_basics();
    let ask = |sql: &str, params: Value| {
        server
            .post_sql(&json!({"sql": sql, "params": params}), &[])
            .json()
    };
    let answer = ask(
        "SELECT id FROM t WHERE name = $1 AND id < $2",
        json!(["bob", 5]),
    );
    assert_eq!(answer["results"][0]["rows"], json!([[2]]), "{answer}");
    let answer = ask("SELECT $1 IS NULL AS missing", json!([null]));
    assert_eq!(answer["results"][0]["rows"], json!([[true]]), "{answer}");
    // Values are values: nothing in them is SQL.
    let answer = ask(
        "SELECT count(*) FROM t WHERE name = $1",
        json!(["x' OR '1'='1"]),
    );
    assert_eq!(answer["results"][0]["rows"], json!([[0]]), "{answer}");
    let answer = ask("SELECT id FROM t WHERE id = $1", json!([]));
    assert!(answer["error"]["code"].is_string(), "{answer}");
}

#[test]
fn one_result_may_be_csv_or_arrow() {
    let server = with_basics();
    let ask =
        |sql: &str, accept: &str| server.post_sql(&json!({ "sql": sql }), &[("Accept", accept)]);
    let csv = ask("SELECT id, name, x FROM t ORDER BY id", "text/csv");
    assert_eq!(csv.status, 200);
    assert!(
        csv.header("content-type")
            .is_some_and(|t| t.starts_with("text/csv"))
    );
    let text = csv.text();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines,
        ["id,name,x", "1,ann,0.5", "2,bob,NaN", "3,,-Infinity"]
    );

    let kind = "application/vnd.apache.arrow.stream";
    let arrow = ask("SELECT id, x FROM t ORDER BY id", kind);
    assert_eq!(arrow.status, 200, "{}", arrow.text());
    assert_eq!(arrow.header("content-type"), Some(kind));
    let reader = arrow::ipc::reader::StreamReader::try_new(arrow.body.as_slice(), None);
    let batches: Vec<_> = reader
        .expect("a stream")
        .map(|b| b.expect("a batch"))
        .collect();
    let ids: Vec<i64> = batches
        .iter()
        .flat_map(|b| b.column(0).as_primitive::<Int64Type>().values().to_vec())
        .collect();
    assert_eq!(ids, [1, 2, 3]);
    assert!(
        batches[0]
            .column(1)
            .as_primitive::<Float64Type>()
            .value(1)
            .is_nan()
    );

    // An empty answer still has its columns.
    let empty = ask("SELECT id FROM t WHERE id > 99", kind);
    let reader = arrow::ipc::reader::StreamReader::try_new(empty.body.as_slice(), None);
    assert_eq!(reader.expect("a stream").schema().field(0).name(), "id");
    assert_eq!(
        ask("SELECT id FROM t WHERE id > 99", "text/csv")
            .text()
            .trim(),
        "id"
    );

    // Several results, and errors, are JSON.
    let several = ask("SELECT 1; SELECT 2", "text/csv");
    assert_eq!(several.status, 400);
    assert!(several.json()["error"]["hint"].is_string());
    let failed = ask("SELECT nothing FROM t", kind);
    assert_eq!(failed.status, 400);
    assert_eq!(failed.json()["error"]["code"], "42703");
}

#[test]
fn errors_say_which_statement_and_why() {
    let server = with_basics();
    // Statements before the failing one have taken effect.
    let answer = server.post_sql(
        &json!({"sql": "CREATE VIEW v AS SELECT id FROM t; SELECT broken FROM t; CREATE VIEW w AS SELECT 1"}),
        &[],
    );
    assert_eq!(answer.status, 400);
    let body = answer.json();
    assert_eq!(body["results"].as_array().map(Vec::len), Some(1), "{body}");
    let error = &body["error"];
    assert_eq!(error["statement"], 1, "{error}");
    assert_eq!(error["code"], "42703");
    for key in ["message", "detail", "hint", "position"] {
        assert!(error.get(key).is_some(), "{key} is in {error}");
    }
    assert_eq!(server.rows("SELECT count(*) FROM v"), [json!([3])]);
    assert_eq!(server.error("SELECT * FROM w")["code"], "42P01");

    // A slip of the pen gets the name that was meant; positions count from 1.
    let error = server.error("SELECT nam FROM t");
    assert!(
        error["hint"].as_str().is_some_and(|h| h.contains("name")),
        "{error}"
    );
    let error = server.error("SELECT * FROM tt");
    assert_eq!(error["code"], "42P01");
    assert!(error["hint"].is_string(), "{error}");
    let error = server.error("SELEC 1");
    assert_eq!(
        (&error["code"], &error["position"], &error["statement"]),
        (&json!("42601"), &json!(1), &json!(0))
    );
    let error = server.error("SELECT 1;\n  SELECT FROM WHERE");
    assert_eq!(error["statement"], 1, "{error}");

    // Kinds map to status codes.
    let status = |sql: &str| server.post_sql(&json!({ "sql": sql }), &[]).status;
    assert_eq!(status("CREATE VIEW v AS SELECT 2 AS x"), 409);
    assert_eq!(status("CREATE VIEW IF NOT EXISTS v2 AS SELECT 2 AS x"), 200);
    assert_eq!(status("SELECT 1 / 0"), 400);
    assert_eq!(status("SELECT 9223372036854775807 + 1"), 400);
    assert_eq!(status("SELECT CAST('x' AS BIGINT)"), 400);
    assert_eq!(server.error("SELECT id / 0 FROM t")["code"], "22012");
    assert_eq!(status("DROP VIEW not_there"), 400);
    assert_eq!(status("DROP VIEW IF EXISTS not_there"), 200);
    assert_eq!(server.get("/api/v1/views/not_there").status, 404);
    assert_eq!(server.get("/api/v1/nothing").status, 404);
    assert_eq!(server.get("/nothing").status, 404);
}

#[test]
fn nothing_a_client_sends_is_answered_with_500() {
    let server = with_basics();
    let post = |body: &[u8]| {
        http::request(
            &server.address,
            "POST",
            "/api/v1/sql",
            &[("Content-Type", "application/json")],
            body,
        )
        .expect("an answer")
    };
    let deep_json = format!(
        "{{\"sql\":\"SELECT 1\",\"params\":{}1{}}}",
        "[".repeat(50_000),
        "]".repeat(50_000)
    );
    let bodies: Vec<Vec<u8>> = vec![
        b"".to_vec(),
        b"{".to_vec(),
        b"[]".to_vec(),
        b"null".to_vec(),
        b"\xff\xfe\x00".to_vec(),
        b"{\"sql\": 7}".to_vec(),
        b"{\"sql\": \"SELECT 1\", \"limit\": 3}".to_vec(),
        b"{\"sql\": \"SELECT 1\", \"format\": \"xml\"}".to_vec(),
        b"{\"sql\": \"SELECT $1\", \"params\": [1e999]}".to_vec(),
        b"{\"sql\": \"SELECT $1\", \"params\": [{\"a\": 1}]}".to_vec(),
        deep_json.into_bytes(),
    ];
    for body in bodies {
        let answer = post(&body);
        let shown = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
        assert_eq!(answer.status, 400, "{shown}: {}", answer.text());
        assert!(answer.json()["error"]["message"].is_string(), "{shown}");
    }
    // Statements that once brought databases down.
    let statements = [
        format!("SELECT {}1{}", "(".repeat(20_000), ")".repeat(20_000)),
        format!("SELECT 1{}", " + 1".repeat(20_000)),
        format!("SELECT {}true", "NOT ".repeat(20_000)),
        format!("SELECT {}1", "-".repeat(20_000)),
        format!("SELECT * FROM t WHERE {}", vec!["id = 1"; 20_000].join(" OR ")),
        format!("SELECT 1{}", " UNION ALL SELECT 1".repeat(5_000)),
        format!("SELECT '{}'", "x".repeat(1 << 20)),
        format!("SELECT {}", "9".repeat(10_000)),
        "SELECT 1e400".into(),
        "SELECT repeat('x', 50000000)".into(),
        "SELECT 'unclosed".into(),
        "SELECT \"unclosed".into(),
        "/* unclosed".into(),
        "SELECT \u{0} FROM t".into(),
        "SELECT $99".into(),
        "SELECT * FROM lake.no.such".into(),
        "SELECT * FROM a.b.c.d.e".into(),
        "CREATE SINK s FROM t INTO lake.x".into(),
        "EXPLAIN EXPLAIN SELECT 1".into(),
        "INSERT INTO t VALUES (1)".into(),
        "CREATE SOURCE q (a BIGINT) WITH (connector = 'nothing')".into(),
        "CREATE SOURCE q (a BIGINT, a BIGINT) WITH (connector = 'files', path = 'x', format = 'json')".into(),
        "CREATE SOURCE q (a NOSUCHTYPE) WITH (connector = 'files', path = 'x', format = 'json')".into(),
        "CREATE SOURCE q (a BIGINT) WITH (connector = 'files', path = '/no/such/file.json', format = 'json')".into(),
        "CREATE SOURCE q (a BIGINT) WITH (connector = 'files', path = 'x', format = 'json', colour = 'red')".into(),
        "CREATE SOURCE q (a BIGINT) WITH (connector = 'kafka', bootstrap_servers = '127.0.0.1:1', topic = 'x', format = 'json')".into(),
        "CREATE MATERIALIZED VIEW m AS SELECT random() AS r FROM t".into(),
        "CREATE MATERIALIZED VIEW m AS SELECT now() AS n FROM t".into(),
        "CREATE MATERIALIZED VIEW m AS SELECT id FROM t WHERE now() > TIMESTAMP '2024-01-01'".into(),
        "CREATE MATERIALIZED VIEW m AS SELECT id, count(*) FROM t GROUP BY id EMIT ON WINDOW CLOSE".into(),
        "CREATE MATERIALIZED VIEW m AS SELECT id FROM m".into(),
        ";;; ;".into(),
        "".into(),
    ];
    for sql in statements {
        let answer = server.post_sql(&json!({ "sql": sql }), &[]);
        let shown: String = sql.chars().take(80).collect();
        assert!(
            [200, 400, 409, 503].contains(&answer.status),
            "{shown}: {} {}",
            answer.status,
            answer.text()
        );
        let body = answer.json();
        if answer.status != 200 {
            assert!(body["error"]["code"].is_string(), "{shown}: {body}");
        }
    }
    for (sql, why) in [
        (
            "CREATE SOURCE q (a BIGINT) WITH (connector = 'fils', path = 'x', format = 'json')",
            "files",
        ),
        (
            "CREATE SOURCE q (a BIGINT) WITH (connector = 'files', pat = 'x', format = 'json')",
            "path",
        ),
        (
            "CREATE SOURCE q (a BIGINT) WITH (connector = 'files', path = '/no/such/file.json', format = 'json')",
            "",
        ),
        (
            "CREATE MATERIALIZED VIEW m AS SELECT random() AS r FROM t",
            "",
        ),
        (
            "CREATE MATERIALIZED VIEW m AS SELECT id FROM t WHERE now() > TIMESTAMP '2024-01-01'",
            "when you query",
        ),
    ] {
        let error = server.error(sql);
        let hint = error["hint"].as_str().unwrap_or_default();
        assert!(!hint.is_empty() && hint.contains(why), "{sql}: {error}");
    }
    // The service has lived through all of it.
    assert_eq!(server.rows("SELECT 1 AS one"), [json!([1])]);
    assert_eq!(server.rows("SELECT count(*) FROM t"), [json!([3])]);
    assert!(
        !server.log_tail().contains("panicked"),
        "{}",
        server.log_tail()
    );
}

#[test]
fn bodies_are_limited_and_methods_checked() {
    let server = Server::start(&["--workers", "1", "--max-body", "64KiB"]);
    let big = json!({ "sql": format!("SELECT '{}'", "x".repeat(100_000)) });
    let answer = server.post_sql(&big, &[]);
    assert_eq!(answer.status, 413, "{}", answer.text());
    assert!(answer.json()["error"]["hint"].is_string());
    let fits = json!({ "sql": format!("SELECT '{}' AS x", "x".repeat(50_000)) });
    assert_eq!(server.post_sql(&fits, &[]).status, 200);
    let ask = |method: &str, path: &str| {
        http::request(&server.address, method, path, &[], b"")
            .expect("an answer")
            .status
    };
    assert_eq!(ask("GET", "/api/v1/sql"), 405);
    assert_eq!(ask("DELETE", "/api/v1/views"), 405);
    // A request that is never finished holds nobody else up.
    let mut slow = TcpStream::connect(&server.address).expect("connected");
    slow.write_all(b"POST /api/v1/sql HTTP/1.1\r\nContent-Length: 10\r\n\r\n{")
        .expect("written");
    assert_eq!(ask("GET", "/healthz"), 200);
    // What is not HTTP gets an error and no more.
    let mut odd = TcpStream::connect(&server.address).expect("connected");
    odd.write_all(b"\x16\x03\x01\x02\x00 hello\r\n\r\n")
        .expect("written");
    odd.set_read_timeout(Some(LIMIT)).expect("set");
    let mut answer = Vec::new();
    let _ = odd.read_to_end(&mut answer);
    assert!(
        answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"),
        "{answer:?}"
    );
}

#[test]
fn what_runs_can_be_seen() {
    let server = with_basics();
    server.run(
        "CREATE MATERIALIZED VIEW m AS SELECT name, count(*) AS n FROM t GROUP BY name;
         CREATE VIEW plain AS SELECT n FROM m;
         CREATE SINK s FROM t INTO lake.ns.copy;
         CREATE SINK nowhere FROM m INTO blackhole;
         CREATE MATERIALIZED VIEW lake.ns.pub AS SELECT id, name FROM t WHERE id > 1",
    );
    server.caught_up(&[Fed::Ended("t")], LIMIT);
    let frontier = server.one("sources", "t").expect("listed")["frontier"]
        .as_u64()
        .expect("a tick");
    server.committed("s", frontier, LIMIT);

    let source = server.one("sources", "t").expect("listed");
    assert_eq!(
        (&source["state"], &source["rows_in"]),
        (&json!("finished"), &json!(3)),
        "{source}"
    );
    let view = server.one("views", "m").expect("listed");
    for key in [
        "state",
        "frontier",
        "lag_ms",
        "rows_in",
        "rows_out",
        "state_bytes",
        "last_error",
    ] {
        assert!(view.get(key).is_some(), "{key} is in {view}");
    }
    assert!(view["state_bytes"].as_u64() > Some(0), "{view}");
    let sink = server.one("sinks", "s").expect("listed");
    assert_eq!(sink["rows_out"], 3, "{sink}");
    assert_eq!(server.get("/api/v1/views/m").json()["name"], "m");
    let jobs: Vec<Value> = server
        .list("jobs")
        .iter()
        .map(|j| j["name"].clone())
        .collect();
    for name in ["m", "s", "nowhere", "lake.ns.pub"] {
        assert!(jobs.contains(&json!(name)), "{name} is among {jobs:?}");
    }

    let names =
        |sql: &str| -> Vec<Value> { server.rows(sql).iter().map(|r| r[0].clone()).collect() };
    assert_eq!(names("SHOW SOURCES"), [json!("t")]);
    assert_eq!(names("SHOW SINKS"), [json!("nowhere"), json!("s")]);
    for name in ["m", "plain", "lake.ns.pub"] {
        assert!(names("SHOW VIEWS").contains(&json!(name)));
    }
    for name in ["lake.ns.copy", "lake.ns.pub"] {
        assert!(names("SHOW TABLES").contains(&json!(name)));
    }
    let described = server.rows("DESCRIBE m");
    assert_eq!(described[0][0], "name");
    assert_eq!(
        (&described[1][0], &described[1][1]),
        (&json!("n"), &json!("BIGINT"))
    );
    let created = server.rows("SHOW CREATE MATERIALIZED VIEW m");
    assert!(
        created[0].to_string().to_lowercase().contains("count(*)"),
        "{created:?}"
    );
    let plan = server.rows("EXPLAIN m");
    assert!(
        plan.iter()
            .any(|r| r.to_string().to_lowercase().contains("aggregate")),
        "{plan:?}"
    );
    assert!(
        !server
            .rows("EXPLAIN SELECT id FROM t WHERE id > 1")
            .is_empty()
    );

    // One query over views, lake tables and bounded files together.
    let mixed = server.rows(
        "SELECT t.id, m.n, c.price FROM t JOIN m ON t.name = m.name JOIN lake.ns.copy c ON c.id = t.id ORDER BY t.id",
    );
    assert_eq!(mixed, [json!([1, 1, "1.50"]), json!([2, 1, "-2.25"])]);
    let answer = server.run("SELECT * FROM m");
    assert!(answer["results"][0]["tick"].as_u64() > Some(0), "{answer}");

    let metrics = server.get("/metrics");
    assert_eq!(metrics.status, 200);
    let text = metrics.text();
    for name in [
        "rows_in",
        "rows_out",
        "bytes_in",
        "lag_ms",
        "tick",
        "state_bytes",
        "state_rows",
        "checkpoint",
        "commit",
        "late",
        "rejected",
        "error",
    ] {
        assert!(
            text.lines()
                .any(|l| l.starts_with("millrace_") && l.contains(name)),
            "{name} in\n{text}"
        );
    }
    assert!(text.contains("relation=\"t\""), "{text}");
    let page = server.get("/");
    assert!(
        page.header("content-type")
            .is_some_and(|t| t.starts_with("text/html"))
    );
    assert!(page.text().contains("illrace"));
    assert_eq!(server.get("/healthz").status, 200);
    assert_eq!(server.get("/readyz").status, 200);
}

#[test]
fn dropping_asks_for_those_who_read() {
    let server = with_basics();
    server.run(
        "CREATE MATERIALIZED VIEW a AS SELECT id, name FROM t;
         CREATE MATERIALIZED VIEW b AS SELECT count(*) AS n FROM a;
         CREATE SINK c FROM b INTO blackhole",
    );
    let error = server.error("DROP SOURCE t");
    assert!(error.to_string().contains('a'), "{error}");
    assert!(
        error["hint"]
            .as_str()
            .is_some_and(|h| h.contains("CASCADE")),
        "{error}"
    );
    assert_eq!(
        server
            .post_sql(&json!({"sql": "DROP MATERIALIZED VIEW b"}), &[])
            .status,
        409
    );
    assert_eq!(server.rows("SELECT n FROM b").len(), 1);
    server.run("DROP MATERIALIZED VIEW a CASCADE");
    assert!(server.list("views").is_empty());
    assert!(server.list("sinks").is_empty());
    assert_eq!(server.error("SELECT * FROM a")["code"], "42P01");
    // The name is free again.
    server.run("CREATE MATERIALIZED VIEW a AS SELECT count(*) AS n FROM t");
    server.caught_up(&[Fed::Ended("t")], LIMIT);
    assert_eq!(server.rows("SELECT n FROM a"), [json!([3])]);
    server.run("DROP SOURCE t CASCADE");
    assert!(server.list("sources").is_empty());
}

#[test]
fn rows_with_errors_come_with_a_notice() {
    let server = with_basics();
    server.run("CREATE MATERIALIZED VIEW e AS SELECT id, 10 / (id - 2) AS q FROM t");
    server.caught_up(&[Fed::Ended("t")], LIMIT);
    let answer = server.run("SELECT id, q FROM e ORDER BY id");
    let result = &answer["results"][0];
    assert_eq!(result["rows"], json!([[1, -10], [3, 10]]));
    let notice = result["notices"][0].to_string();
    assert!(notice.contains('1') && notice.contains("e"), "{answer}");
    let errors = server.rows("SELECT * FROM e$errors");
    assert_eq!(errors.len(), 1);
    assert!(
        errors[0].to_string().contains("division by zero"),
        "{errors:?}"
    );
}

#[test]
fn a_record_whose_columns_fail_costs_itself_only() {
    let server = Server::start(&["--workers", "1"]);
    let csv = "id,name\n1,12\n2,twelve\n3,7\n4,123456\n";
    let path = write(server.scratch(), "c.csv", csv);
    server.run(&format!(
        "CREATE SOURCE c (id BIGINT, name VARCHAR(4), n BIGINT AS CAST(name AS BIGINT))
         WITH (connector = 'files', format = 'csv', path = '{path}')"
    ));
    let answer = server.run("SELECT id, n FROM c ORDER BY id");
    let result = &answer["results"][0];
    assert_eq!(result["rows"], json!([[1, 12], [3, 7]]));
    let notice = result["notices"][0]["message"].as_str().unwrap_or_default();
    assert!(notice.starts_with("2 records of source \"c\""), "{answer}");
    // The same whatever is asked for, and in a view.
    assert_eq!(server.rows("SELECT count(*) FROM c"), [json!([2])]);
    server.run("CREATE MATERIALIZED VIEW v AS SELECT id FROM c");
    server.caught_up(&[Fed::Ended("c")], LIMIT);
    assert_eq!(
        server.rows("SELECT id FROM v ORDER BY id"),
        [json!([1]), json!([3])]
    );
    let rejected = server.rows("SELECT reason FROM c$rejected");
    let all = Value::from(rejected).to_string();
    assert!(all.contains("VARCHAR(4)"), "{all}");
    assert!(
        server
            .run("SHOW CREATE SOURCE c")
            .to_string()
            .contains("VARCHAR(4)")
    );
}

#[test]
fn names_types_and_options_are_those_of_the_reference() {
    let server = with_basics();
    let answer =
        server.run("SELECT id, id, count(*), now() > at FROM t WHERE id = 1 GROUP BY id, at");
    let names: Vec<&str> = answer["results"][0]["columns"]
        .as_array()
        .expect("columns")
        .iter()
        .filter_map(|c| c["name"].as_str())
        .collect();
    assert_eq!(names, ["id", "id", "count", "?column?"]);
    assert_eq!(answer["results"][0]["rows"], json!([[1, 1, 1, true]]));
    let csv = server.post_sql(&json!({"sql": "SELECT 1.5, 1.5", "format": "csv"}), &[]);
    assert_eq!(csv.text(), "?column?,?column?\r\n1.5,1.5\r\n");
    let error =
        server.error("CREATE MATERIALIZED VIEW f WITH (on_error = 'fail') AS SELECT id FROM t");
    assert_eq!(error["code"], "0A000");
    let error = server.error("SELECT id FROM t WHERE name = 1");
    assert_eq!(error["code"], "42883", "{error}");
}

#[test]
fn a_slow_query_stops_with_its_client_or_its_time_and_blocks_nobody() {
    let server = Server::start(&["--workers", "1", "--statement-timeout", "3s"]);
    let rows: String = (0..2_000).map(|i| format!("{{\"id\":{i}}}\n")).collect();
    let path = write(server.scratch(), "n.json", &rows);
    server.run(&format!(
        "CREATE SOURCE n (id BIGINT) WITH (connector = 'files', format = 'json', path = '{path}');
         CREATE MATERIALIZED VIEW v AS SELECT id FROM n"
    ));
    server.caught_up(&[Fed::Ended("n")], LIMIT);
    let slow = json!({"sql": "SELECT count(*) FROM v a JOIN v b ON a.id <> b.id JOIN v c ON b.id <> c.id WHERE a.id + b.id + c.id > 17"}).to_string();
    // Clients that go away.
    for _ in 0..12 {
        let mut stream = TcpStream::connect(&server.address).expect("a connection");
        write!(
            stream,
            "POST /api/v1/sql HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{slow}",
            slow.len()
        )
        .expect("sent");
    }
    // One that stays.
    let started = std::time::Instant::now();
    std::thread::scope(|scope| {
        let stays = scope
            .spawn(|| http::request(&server.address, "POST", "/api/v1/sql", &[], slow.as_bytes()));
        assert_eq!(server.rows("SELECT count(*) FROM v"), [json!([2_000])]);
        assert!(
            started.elapsed() < Duration::from_secs(3),
            "{:?}",
            started.elapsed()
        );
        let answer = stays.join().expect("no panic").expect("an answer");
        assert_eq!(answer.status, 400);
        assert_eq!(answer.json()["error"]["code"], "57014");
    });
    // Nothing goes on computing.
    wait::until("a server that rests", LIMIT, || {
        let before = cpu_ticks(&server);
        std::thread::sleep(Duration::from_millis(500));
        match cpu_ticks(&server) - before {
            0..=15 => Ok(()),
            busy => Err(format!("{busy} ticks in half a second")),
        }
    });
}

/// Time that the service's process has computed, in hundredths of a second.
fn cpu_ticks(server: &Server) -> u64 {
    let pid = server.child_pid().expect("the service runs");
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("Linux");
    let rest = stat.rsplit(')').next().unwrap_or_default();
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let number = |at: usize| fields[at].parse::<u64>().expect("a number");
    number(11) + number(12)
}

/// Ids and rows of everything, to be the same after a restart.
fn picture(server: &Server) -> Value {
    let mut rows = server.rows("SELECT * FROM m");
    rows.sort_by_key(ToString::to_string);
    let list = |what: &str| -> Vec<Value> {
        server
            .list(what)
            .iter()
            .map(|r| json!([r["name"], r["id"], r["kind"], r["sql"]]))
            .collect()
    };
    json!([
        rows,
        list("sources"),
        list("views"),
        list("sinks"),
        server.rows("SELECT count(*) FROM lake.ns.copy")
    ])
}

#[test]
fn a_restart_keeps_everything() {
    let mut server = with_basics();
    server.run(
        "CREATE MATERIALIZED VIEW m AS SELECT name, count(*) AS n, sum(price) AS p FROM t GROUP BY name;
         CREATE SINK s FROM t INTO lake.ns.copy",
    );
    server.caught_up(&[Fed::Ended("t")], LIMIT);
    let tick = server.one("sources", "t").expect("listed")["frontier"]
        .as_u64()
        .expect("a tick");
    server.committed("s", tick, LIMIT);
    let before = picture(&server);
    let shown = server.run("SELECT * FROM m")["results"][0]["tick"]
        .as_u64()
        .expect("a tick");

    // SIGTERM: graceful.
    let status = server.terminate();
    assert!(status.success(), "{status}");
    server.start_again(&[]);
    server.views_at(shown, LIMIT);
    assert_eq!(picture(&server), before);
    let again = server.run("SELECT * FROM m")["results"][0]["tick"]
        .as_u64()
        .expect("a tick");
    assert!(again >= shown, "ticks never go back: {shown}, then {again}");

    // SIGKILL of all of it.
    server.kill();
    server.start_again(&[]);
    server.views_at(again, LIMIT);
    assert_eq!(picture(&server), before);

    // SIGKILL of the service alone: the parent holds the socket, connections queue.
    let address = server.address.clone();
    server.kill_child();
    let answer =
        http::request(&address, "GET", "/healthz", &[], b"").expect("queued, then answered");
    assert_eq!(answer.status, 200);
    wait::until("the service to be restored", LIMIT, || {
        let status = server.get("/readyz").status;
        if status == 200 {
            Ok(())
        } else {
            Err(format!("{status}"))
        }
    });
    server.views_at(again, LIMIT);
    assert_eq!(picture(&server), before);
    assert_eq!(server.address, address);
}

#[test]
fn settings_and_data_directories_are_checked() {
    for (flags, word) in [
        (&["--workers", "0"][..], "workers"),
        (&["--http", "nowhere"][..], "http"),
        (
            &["--checkpoint-interval", "10 parsecs"][..],
            "checkpoint-interval",
        ),
    ] {
        let mut server = Server::prepare(flags);
        let status = server.try_start(&[]).expect_err("refused");
        assert_eq!(status.code(), Some(2), "{flags:?}: {}", server.log_tail());
        assert!(
            server.log_tail().contains(word),
            "{flags:?}: {}",
            server.log_tail()
        );
    }
    // A data directory that is a file, and one whose metadata is not a database.
    let mut server = Server::prepare(&["--workers", "1"]);
    std::fs::write(server.data_dir(), "not a folder").expect("written");
    let status = server.try_start(&[]).expect_err("refused");
    assert_eq!(status.code(), Some(2), "{}", server.log_tail());
    std::fs::remove_file(server.data_dir()).expect("removed");
    std::fs::create_dir(server.data_dir()).expect("made");
    std::fs::write(server.data_dir().join("metadata.db"), vec![7; 8192]).expect("written");
    let status = server.try_start(&[]).expect_err("refused");
    assert_eq!(status.code(), Some(2), "{}", server.log_tail());
    assert!(
        server.log_tail().contains("metadata.db"),
        "{}",
        server.log_tail()
    );
}

#[test]
fn two_servers_do_not_share_a_data_directory() {
    let server = with_basics();
    server.run("CREATE MATERIALIZED VIEW m AS SELECT count(*) AS n FROM t");
    let mut second = std::process::Command::new(millrace_tests::server::binary())
        .args([
            "serve",
            "--http",
            "127.0.0.1:0",
            "--workers",
            "1",
            "--data-dir",
        ])
        .arg(server.data_dir())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("started");
    // Either the second one is refused or the first one is fenced out; never do both write.
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        wait::until("one of two servers to give way", LIMIT, || {
            if let Some(status) = second.try_wait().expect("asked") {
                return Ok(format!("the second one ended with {status}"));
            }
            let write = http::request(
                &server.address,
                "POST",
                "/api/v1/sql",
                &[("Content-Type", "application/json")],
                b"{\"sql\": \"CREATE VIEW IF NOT EXISTS w AS SELECT 1 AS x\"}",
            );
            match write {
                Ok(answer) if answer.status == 200 => Err("the first one writes".to_string()),
                Ok(answer) => Ok(format!("the first one answers {}", answer.status)),
                Err(e) => Ok(format!("the first one is gone: {e}")),
            }
        })
    }));
    let _ = second.kill();
    let _ = second.wait();
    println!("{}", outcome.expect("one gives way"));
}

/// Contents first, then changes: added up they are the view, at every tick.
#[test]
fn a_subscription_adds_up_to_the_view() {
    let server = Server::start(&["--workers", "2"]);
    server.run(
        "CREATE SOURCE bid WITH (connector = 'generator', kind = 'nexmark', table = 'bid', seed = 7, rate = 20000, max_events = 40000);
         CREATE MATERIALIZED VIEW per_auction AS SELECT auction % 10 AS slot, count(*) AS n FROM bid GROUP BY auction % 10",
    );
    let mut lines = Lines::of(&server.address, "per_auction");
    let first = lines.next().expect("a header");
    assert_eq!(first["columns"][1], json!({"name": "n", "type": "BIGINT"}));
    let mut rows = std::collections::BTreeMap::<String, i64>::new();
    let mut last = 0;
    let total = 40_000 * 46 / 50;
    loop {
        let line = lines.next().expect("the stream goes on");
        assert!(line.get("error").is_none(), "{line}");
        let tick = line["tick"].as_u64().expect("a tick");
        assert!(tick >= last, "{tick} after {last}");
        last = tick;
        if line["complete"] != true {
            *rows.entry(line["row"].to_string()).or_default() +=
                line["diff"].as_i64().expect("a diff");
            continue;
        }
        rows.retain(|_, diff| *diff != 0);
        assert!(rows.values().all(|diff| *diff == 1), "{rows:?}");
        let sum: i64 = rows.keys().map(|row| count_in(row)).sum();
        if sum == total {
            break;
        }
    }
    let mut want: Vec<String> = server
        .rows("SELECT slot, n FROM per_auction")
        .iter()
        .map(Value::to_string)
        .collect();
    want.sort();
    assert_eq!(rows.into_keys().collect::<Vec<_>>(), want);
    // It ends with its relation.
    server.run("DROP MATERIALIZED VIEW per_auction");
    let end = lines.next().expect("a last line");
    assert_eq!(end["error"]["code"], "42P01", "{end}");
    assert!(lines.next().is_none());
    // What keeps nothing cannot be followed, and it stands alone.
    assert_eq!(server.error("SUBSCRIBE TO bid")["code"], "42809");
    assert_eq!(server.error("SELECT 1; SUBSCRIBE TO bid")["statement"], 1);
}

/// The second column of a row `[slot,n]`.
fn count_in(row: &str) -> i64 {
    let row: Vec<i64> = serde_json::from_str(row).expect("two numbers");
    row[1]
}

/// The number of workers, as the metrics say it.
fn workers(server: &Server) -> String {
    let metrics = server.try_get("/metrics");
    let metrics = metrics.map_or_else(|e| e.to_string(), |answer| answer.text());
    let line = metrics
        .lines()
        .find_map(|line| line.strip_prefix("millrace_workers "));
    line.unwrap_or("none").to_string()
}

/// Another number of workers takes over the state; a later start keeps it unless told otherwise.
#[test]
fn workers_change_by_a_statement() {
    let mut server = Server::start(&["--workers", "1"]);
    server.run(
        "CREATE SOURCE bid WITH (connector = 'generator', kind = 'nexmark', table = 'bid', seed = 7, rate = 20000);
         CREATE MATERIALIZED VIEW per_auction AS SELECT auction, count(*) AS n FROM bid GROUP BY auction;
         CREATE MATERIALIZED VIEW n AS SELECT count(*) AS n FROM bid",
    );
    for (count, restart) in [("2", false), ("1", true), ("3", true)] {
        server.run(&format!("ALTER DATA PLANE SET WORKERS {count}"));
        wait::until("the workers", LIMIT, || match workers(&server) {
            now if now == count => Ok(()),
            now => Err(now),
        });
        if restart {
            server.kill();
            server.start_again(&[]);
            assert_eq!(workers(&server), count);
        }
        let rows = server.rows(
            "SELECT a.n, b.n FROM n a, (SELECT CAST(sum(n) AS BIGINT) AS n FROM per_auction) b",
        );
        assert_eq!(rows[0][0], rows[0][1], "{rows:?}");
        assert_ne!(rows[0][0], 0);
    }
    assert_eq!(
        server.error("ALTER DATA PLANE SET WORKERS 0")["code"],
        "22023"
    );
    assert_eq!(
        server.error("ALTER DATA PLANE other SET WORKERS 2")["code"],
        "42704"
    );
    assert!(server.terminate().success());
}
