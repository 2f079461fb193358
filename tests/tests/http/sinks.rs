//! Tables that do not take what a sink has for them, or are not what they were.

use std::time::Duration;

use millrace_tests::lake::{python, script};
use millrace_tests::server::{Fed, Server};
use millrace_tests::wait;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(90);
/// With several writers it may take a restart more until the first tick that fails is known.
const FLAGS: &[&str] = &[
    "--workers",
    "1",
    "--commit-interval",
    "100ms",
    "--checkpoint-interval",
    "300ms",
];

/// Waits for the state of a sink, through restarts of the service.
fn until_state(server: &Server, sink: &str, state: &str) -> Value {
    wait::until(&format!("sink {sink} to be {state}"), LIMIT, || {
        let rows = server.try_list("sinks")?;
        let row = rows.into_iter().find(|row| row["name"] == sink);
        row.filter(|row| row["state"] == state)
            .ok_or_else(|| format!("{:?}", server.try_list("sinks")))
    })
}

fn number(server: &Server, sql: &str) -> Result<i64, String> {
    let body = json!({ "sql": sql }).to_string();
    let headers = [("Content-Type", "application/json")];
    let path = "/api/v1/sql";
    let answer =
        millrace_tests::http::request(&server.address, "POST", path, &headers, body.as_bytes());
    let answer = answer.map_err(|e| e.to_string())?;
    let row = answer.json()["results"][0]["rows"][0][0].clone();
    let text = row.to_string();
    text.trim_matches('"').parse().map_err(|_| answer.text())
}

#[test]
fn a_row_that_a_table_does_not_take_fails_its_sink_alone() {
    let Some(python) = python() else { return };
    let server = Server::start(FLAGS);
    script(
        &python,
        &server.data_dir(),
        "from pyiceberg.schema import Schema
from pyiceberg.types import LongType, NestedField
catalog.create_namespace_if_not_exists('r')
id = NestedField(1, 'id', LongType(), required=False)
k = NestedField(2, 'k', LongType(), required=True)
for name in ['t', 'doomed']:
    location = f'file://{data_dir}/warehouse/r/{name}'
    catalog.create_table(f'r.{name}', Schema(id, k), location=location)",
    );
    server.run(
        "CREATE SOURCE g WITH (connector = 'generator', kind = 'nexmark', table = 'bid', rate = 500, max_events = 12000);
         CREATE MATERIALIZED VIEW v AS SELECT auction AS id, CASE WHEN auction < 1300 THEN auction END AS k FROM g;
         CREATE SINK good FROM v INTO lake.m.good",
    );
    server.run("CREATE SINK strict FROM v INTO lake.r.t");
    server.run("CREATE SINK doomed FROM v INTO lake.r.doomed");
    for sink in ["strict", "doomed"] {
        // Not only on its way down: it is held, and nothing of it is tried again.
        let row = wait::until("the sink to be given up", LIMIT, || {
            match until_state(&server, sink, "failed") {
                row if !row["held_since"].is_null() => Ok(row),
                row => Err(row.to_string()),
            }
        });
        let error = row["last_error"].to_string();
        assert!(error.contains("requires a value"), "{row}");
        assert!(error.contains("optional in the table"), "{row}");
    }
    let late = server.error("CREATE SINK late FROM v INTO lake.r.t");
    assert_eq!(late["code"], json!("23502"), "{late}");
    // The others go on, and so do checkpoints, or the sinks would not be given up for good.
    let child = server.child_pid();
    server.run("DROP SINK doomed");
    server.caught_up(&[Fed::Ended("g")], LIMIT);
    let all = number(&server, "SELECT count(*) FROM v").expect("a count");
    let reach = |table: &str| {
        wait::until("all rows once", LIMIT, || {
            match number(&server, &format!("SELECT count(*) FROM lake.{table}"))? {
                n if n == all => Ok(()),
                n => Err(format!("{n} of {all}")),
            }
        });
    };
    reach("m.good");
    assert_eq!(server.child_pid(), child, "it runs on");
    let taken = number(&server, "SELECT count(*) FROM lake.r.t").expect("a count");
    assert!(taken < all, "{taken} of {all}");
    // Once the table takes them, what has waited is written, and nothing twice.
    script(
        &python,
        &server.data_dir(),
        "table = catalog.load_table('r.t')
with table.update_schema() as update:
    update.make_column_optional('k')",
    );
    server.run("ALTER SINK strict RESUME");
    reach("r.t");
    assert_eq!(
        number(&server, "SELECT sum(id) FROM lake.r.t"),
        number(&server, "SELECT sum(id) FROM v")
    );
}

/// A server that has stopped, with all of the view `v` in `lake.m.t`, through the sink `s`.
fn stopped_with_sink() -> Server {
    let mut server = Server::start(FLAGS);
    server.run(
        "CREATE SOURCE g WITH (connector = 'generator', kind = 'nexmark', table = 'bid', max_events = 5000);
         CREATE MATERIALIZED VIEW v AS SELECT auction, bidder FROM g;
         CREATE SINK s FROM v INTO lake.m.t",
    );
    server.caught_up(&[Fed::Ended("g")], LIMIT);
    let frontier = server.one("sources", "g").expect("listed")["frontier"].as_u64();
    server.committed("s", frontier.expect("a tick"), LIMIT);
    server.terminate();
    server
}

#[test]
fn a_table_that_was_dropped_is_not_made_again() {
    let Some(python) = python() else { return };
    let mut server = stopped_with_sink();
    script(&python, &server.data_dir(), "catalog.drop_table('m.t')");
    server.start_again(&[]);
    let row = until_state(&server, "s", "failed");
    let error = row["last_error"].to_string();
    assert!(
        error.contains("was dropped") && error.contains("create it anew"),
        "{row}"
    );
    assert_eq!(number(&server, "SELECT count(*) FROM v"), Ok(4_600));
    let error = server.error("SELECT count(*) FROM lake.m.t");
    assert_eq!(error["code"], json!("42P01"), "{error}");
    server.run("DROP SINK s; CREATE SINK s FROM v INTO lake.m.t");
    wait::until("all rows", LIMIT, || {
        match number(&server, "SELECT count(*) FROM lake.m.t")? {
            4_600 => Ok(()),
            n => Err(format!("{n}")),
        }
    });
}

#[test]
fn a_table_that_lost_rows_is_not_written_on() {
    let Some(python) = python() else { return };
    let mut server = stopped_with_sink();
    script(
        &python,
        &server.data_dir(),
        "schema = catalog.load_table('m.t').schema()
catalog.drop_table('m.t')
catalog.create_table('m.t', schema, location=f'file://{data_dir}/warehouse/m/other')",
    );
    server.start_again(&[]);
    let row = until_state(&server, "s", "failed");
    let error = row["last_error"].to_string();
    assert!(error.contains("holds less of this sink"), "{row}");
    assert_eq!(number(&server, "SELECT count(*) FROM lake.m.t"), Ok(0));
    assert_eq!(number(&server, "SELECT count(*) FROM v"), Ok(4_600));
    server.run("DROP SINK s");
}
