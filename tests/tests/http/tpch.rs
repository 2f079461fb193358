//! TPC-H's 22 queries as views under the refresh stream: at every step each equals the batch answer
//! over the same contents, also after a kill; and once, while the stream is held, DuckDB's answer.
//!
//! `MILLRACE_TPCH_SCALE=1` runs it at scale 1, `MILLRACE_TPCH_QUERIES=q1,q6` with some queries only.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use millrace_tests::lake;
use millrace_tests::server::{Server, offsets};
use millrace_tests::wait;
use serde_json::{Value, json};

const TABLES: &[&str] = &[
    "region", "nation", "supplier", "customer", "part", "partsupp", "orders", "lineitem",
];
/// With it no query has an empty answer at scale 0.01, not even q18.
const SEED: u64 = 4;
/// Comparisons of all views; before some of them the server is killed, and views pause.
const STEPS: usize = 6;
const KILLED: usize = 2;
const PAUSED: usize = 4;
/// Orders of a refresh pair at scale 0.01, new and old ones.
const PAIR: f64 = 30.0;
/// Far more pairs than are waited for.
const REFRESHES: u64 = 1_000_000;

#[test]
fn tpch_as_views_equals_batch_under_refreshes() {
    let scale = std::env::var("MILLRACE_TPCH_SCALE").unwrap_or("0.01".into());
    let hundredths = scale.parse::<f64>().expect("a scale is a number") * 100.0;
    let limit = Duration::from_secs_f64(super::LIMIT.as_secs_f64() * hundredths.max(1.0));
    // A pair of refreshes comes in a second.
    let pair = PAIR * hundredths;
    let mut server = Server::start(&[]);
    let began = Instant::now();
    for table in TABLES {
        server.run(&format!(
            "CREATE SOURCE {table}_source WITH (connector = 'generator', kind = 'tpch', table = '{table}', \
             scale = '{scale}', seed = {SEED}, refreshes = {REFRESHES}, rate = {pair:.0}); \
             CREATE MATERIALIZED VIEW {table} AS SELECT * FROM {table}_source"
        ));
    }
    // All of the initial rows, before views are made of them.
    let initial = (15_000.0 * hundredths) as u64;
    let mut read = progressed(&server, initial, limit);
    println!("initial rows after {:.1} s", seconds(began));
    let mut views = Vec::new();
    for (name, query) in queries() {
        let create = format!("CREATE MATERIALIZED VIEW {name} AS {query}");
        let began = Instant::now();
        server.run(&create);
        println!("{name} after {:.1} s", seconds(began));
        views.push((name, query));
    }
    caught_up(&server, limit);
    println!("all views after {:.1} s", seconds(began));
    let mut differ = Vec::new();
    for step in 0..STEPS {
        let began = Instant::now();
        match step {
            KILLED => {
                server.kill();
                server.start_again(&[]);
                println!("started again after {:.1} s", seconds(began));
            }
            PAUSED => {
                standing_still(&server, limit, || {
                    second_opinion(&server, &views, hundredths)
                });
                println!("second opinion after {:.1} s", seconds(began));
            }
            _ => {}
        }
        let began = Instant::now();
        read = progressed(&server, read + pair as u64, limit);
        let came = Instant::now();
        caught_up(&server, limit);
        println!("step {step}: kept up after {:.2} s", seconds(came));
        for (name, query) in &views {
            match compare(&server, name, query) {
                // Later the rows that a query looks for may be among those that are gone.
                Ok(rows) => assert!(rows || step > 0, "{name} has rows to compare"),
                Err(difference) => differ.push(format!("step {step}: {difference}")),
            }
        }
        println!("step {step}: compared after {:.2} s", seconds(began));
    }
    assert!(differ.is_empty(), "{}", differ.join("\n"));
}

fn seconds(began: Instant) -> f64 {
    began.elapsed().as_secs_f64()
}

/// The queries by number.
fn queries() -> Vec<(String, String)> {
    let chosen = std::env::var("MILLRACE_TPCH_QUERIES").ok();
    let is_chosen = |name: &str| match &chosen {
        Some(names) => names.split(',').any(|chosen| chosen == name),
        None => true,
    };
    let names = (1..=22).map(|number| format!("q{number}"));
    names
        .filter(|name| is_chosen(name))
        .map(|name| {
            let path = folder().join(format!("{name}.sql"));
            let query = std::fs::read_to_string(path).expect("a query");
            (name, query)
        })
        .collect()
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tpch")
}

/// Waits until orders and their lines are read up to an offset; how far they are.
fn progressed(server: &Server, target: u64, limit: Duration) -> u64 {
    wait::until("the refresh stream to go on", limit, || {
        let sources = server.try_list("sources")?;
        let read = ["orders_source", "lineitem_source"].map(|name| {
            let row = sources.iter().find(|row| row["name"] == name);
            row.map_or(0, offsets)
        });
        match read.iter().min() {
            Some(least) if *least >= target => Ok(*least),
            _ => Err(format!("{read:?} of {target}")),
        }
    })
}

/// The view and the query over the same contents: one statement reads everything at one tick. Whether
/// there is anything in them, if they are equal.
fn compare(server: &Server, name: &str, query: &str) -> Result<bool, String> {
    let answer = server.sql(&format!(
        "SELECT 'view' AS side, v.* FROM {name} AS v UNION ALL SELECT 'batch', b.* FROM ({query}) AS b"
    ));
    let Some(rows) = answer["results"][0]["rows"].as_array() else {
        return Err(format!("{name}: {answer}"));
    };
    let side = |side: &str| {
        let of_side = rows.iter().filter(|row| row[0] == side);
        let mut rows: Vec<String> = of_side
            .map(|row| json!(row.as_array().map(|row| &row[1..])).to_string())
            .collect();
        rows.sort();
        rows
    };
    let (view, batch) = (side("view"), side("batch"));
    if view == batch {
        return Ok(batch.iter().any(|row| row != "[null]"));
    }
    let only = |these: &[String], others: &[String]| {
        let only = these.iter().filter(|row| !others.contains(row));
        only.take(3).cloned().collect::<Vec<_>>()
    };
    Err(format!(
        "{name}: {} rows in the view, {} in the batch answer; only in the view {:?}, only in the answer {:?}",
        view.len(),
        batch.len(),
        only(&view, &batch),
        only(&batch, &view)
    ))
}

/// Waits until all views that run have applied what the sources have delivered.
fn caught_up(server: &Server, limit: Duration) {
    let sources = server.list("sources");
    let frontiers = sources.iter().filter_map(|row| row["frontier"].as_u64());
    let target = frontiers.max();
    wait::until("the views to catch up", limit, || {
        for row in server.try_list("views")? {
            if row["state"] != "paused" && row["frontier"].as_u64() < target {
                return Err(format!("{row}, wanted {target:?}"));
            }
        }
        Ok(())
    });
}

/// Pauses what changes, so that several statements see the same contents.
fn standing_still(server: &Server, limit: Duration, look: impl FnOnce()) {
    let alter = |how: &str| {
        for table in ["orders", "lineitem"] {
            server.run(&format!("ALTER MATERIALIZED VIEW {table} {how}"));
        }
    };
    alter("PAUSE");
    caught_up(server, limit);
    look();
    alter("RESUME");
}

/// DuckDB answers the queries over the same tables.
fn second_opinion(server: &Server, views: &[(String, String)], hundredths: f64) {
    let Some(python) = lake::python() else { return };
    let tables = server.scratch().join("tables");
    std::fs::create_dir_all(&tables).expect("a folder for the tables");
    for table in TABLES {
        let columns = server.run(&format!("SELECT * FROM {table} LIMIT 0"));
        let key = columns["results"][0]["columns"][0]["name"].clone();
        let key = key.as_str().expect("a first column");
        // An answer has a bound.
        let pieces = (hundredths / 10.0).ceil() as u64;
        for piece in 0..pieces {
            let ask = format!("SELECT * FROM {table} WHERE {key} % {pieces} = {piece}");
            let answer = server.post_sql(&json!({ "sql": ask }), &[("Accept", "text/csv")]);
            assert_eq!(answer.status, 200, "{}", answer.text());
            let path = tables.join(format!("{table}-{piece}.csv"));
            std::fs::write(path, answer.body).expect("a file can be written");
        }
    }
    let views: BTreeMap<&str, Vec<Value>> = views
        .iter()
        .map(|(name, _)| (name.as_str(), server.rows(&format!("SELECT * FROM {name}"))))
        .collect();
    let path = server.scratch().join("views.json");
    std::fs::write(&path, json!(views).to_string()).expect("a file can be written");
    let output = Command::new(python)
        .arg(folder().join("duckdb_answers.py"))
        .args([&tables, &path])
        .output()
        .expect("python runs");
    if output.status.code() == Some(3) {
        let missing = "no DuckDB: run tests/services/pyiceberg.sh install";
        assert!(std::env::var("CI").is_err(), "{missing}");
        return println!("SKIPPED: {missing}");
    }
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "DuckDB answers otherwise:\n{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    print!("{text}");
}
