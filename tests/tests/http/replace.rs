//! `CREATE OR REPLACE MATERIALIZED VIEW` and backfills, end to end: what depends on a view, follows it
//! or writes it out sees one change, crashes leave the old definition or the new one, and what is
//! called off leaves nothing.
//!
//! Answers are compared with the batch answer: the same query straight from a bounded source.

use std::collections::BTreeMap;
use std::time::Duration;

use millrace_tests::http::Lines;
use millrace_tests::lake::{ledger, python};
use millrace_tests::server::{Fed, Server};
use millrace_tests::wait;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(120);
const FLAGS: &[&str] = &[
    "--workers",
    "2",
    "--checkpoint-interval",
    "1s",
    "--commit-interval",
    "300ms",
];
const OLD: &str = "SELECT auction % 10 AS slot, count(*) AS n FROM bid GROUP BY auction % 10";
const NEW: &str =
    "SELECT auction % 10 AS slot, count(*) AS n FROM bid WHERE price > 1000 GROUP BY auction % 10";
const READER: &str = "SELECT slot % 2 AS odd, sum(n) AS total, max(n) AS most, count(*) AS groups \
                      FROM v GROUP BY slot % 2";

/// A bounded source of `events` events; `all` has the same ones and is never read by a view.
fn source(server: &Server, events: u64, rate: &str) {
    let options = format!(
        "connector = 'generator', kind = 'nexmark', table = 'bid', seed = 7, max_events = {events}"
    );
    server.run(&format!(
        "CREATE SOURCE bid WITH ({options}{rate}); CREATE SOURCE every WITH ({options})"
    ));
}

/// What the batch engine answers to a query over `bid`.
fn batch(server: &Server, query: &str) -> Vec<Value> {
    sorted(server.rows(&query.replace("FROM bid", "FROM every")))
}

fn sorted(mut rows: Vec<Value>) -> Vec<Value> {
    rows.sort_by_key(Value::to_string);
    rows
}

fn contents(server: &Server, view: &str) -> Vec<Value> {
    sorted(server.rows(&format!("SELECT * FROM {view}")))
}

/// Waits until everything is applied, then compares `v` and its reader `d` with the batch answers.
fn agree(server: &Server, query: &str) {
    server.caught_up(&[Fed::Ended("bid")], LIMIT);
    assert_eq!(contents(server, "v"), batch(server, query));
    let reader = READER.replace("FROM v", &format!("FROM ({query}) AS v"));
    assert_eq!(contents(server, "d"), batch(server, &reader));
}

/// The changelog in the lake ends with what the view holds, and never takes back what is not there.
fn written(server: &Server, table: &str, sink: &str, rows: &[Value]) {
    let Some(python) = python() else {
        return;
    };
    let tick = server.run(&format!(
        "SELECT count(*) FROM {}",
        sink.trim_end_matches("_out")
    ))["results"][0]["tick"]
        .as_u64()
        .expect("a tick");
    server.committed(sink, tick, LIMIT);
    let path = server.scratch().join(format!("{sink}.json"));
    std::fs::write(&path, Value::from(rows.to_vec()).to_string()).expect("written");
    let path = path.to_string_lossy();
    println!(
        "{}",
        ledger(&python, &server.data_dir(), &["net", table, &path])
    );
}

fn definition(server: &Server) -> String {
    server.rows("SHOW CREATE v")[0][1].to_string()
}

fn with_readers(server: &Server) {
    server.run(&format!(
        "CREATE MATERIALIZED VIEW v AS {OLD};
         CREATE MATERIALIZED VIEW d AS {READER};
         CREATE SINK v_out FROM v INTO lake.t.v WITH (changelog = 'op');
         CREATE SINK d_out FROM d INTO lake.t.d WITH (changelog = 'op')"
    ));
}

fn replace(query: &str) -> String {
    format!("CREATE OR REPLACE MATERIALIZED VIEW v AS {query}")
}

/// Rows of a subscription, added up tick by tick.
struct Followed {
    lines: Lines,
    rows: BTreeMap<String, i64>,
}

impl Followed {
    fn of(server: &Server, relation: &str) -> Self {
        let mut lines = Lines::of(&server.address, relation);
        assert!(lines.next().expect("a header")["columns"].is_array());
        let mut followed = Self {
            lines,
            rows: BTreeMap::new(),
        };
        followed.tick();
        followed
    }

    /// The next tick: its changes, with their diffs. Afterwards each row is there once or not at all.
    fn tick(&mut self) -> Vec<(i64, Value)> {
        let mut changes = Vec::new();
        loop {
            let line = self.lines.next().expect("the stream goes on");
            assert!(line.get("error").is_none(), "{line}");
            if line["complete"] == true {
                break;
            }
            let diff = line["diff"].as_i64().expect("a diff");
            *self.rows.entry(line["row"].to_string()).or_default() += diff;
            changes.push((diff, line["row"].clone()));
        }
        self.rows.retain(|_, n| *n != 0);
        assert!(self.rows.values().all(|n| *n == 1), "{:?}", self.rows);
        changes
    }

    fn until(&mut self, want: &[Value]) {
        let want: Vec<String> = want.iter().map(Value::to_string).collect();
        while self.rows.keys().ne(want.iter()) {
            self.tick();
        }
    }
}

#[test]
fn a_replacement_reaches_all_that_read_while_rows_flow() {
    let mut server = Server::start(FLAGS);
    source(&server, 200_000, ", rate = 20000");
    with_readers(&server);
    server.run(
        "CREATE VIEW spelled AS SELECT * FROM v;
         CREATE MATERIALIZED VIEW star AS SELECT * FROM spelled WHERE n > 0",
    );
    let mut followed = Followed::of(&server, "v");
    // A new column stands behind those that others read.
    let wider = NEW.replace("AS n", "AS n, max(price) AS most");
    server.run(&replace(&wider));
    let live = server.one("sources", "bid").expect("a source");
    assert_eq!(live["state"], "running", "rows flow: {live}");
    assert_eq!(
        server.rows("SELECT count(most) = count(*) FROM v"),
        [json!([true])]
    );
    agree(&server, &wider);
    let narrow = batch(&server, NEW);
    followed.until(&narrow);
    written(&server, "t.v", "v_out", &narrow);
    written(&server, "t.d", "d_out", &contents(&server, "d"));
    // Again, back to what was there before, and over a restart; readers know the columns they knew.
    server.terminate();
    server.start_again(&[]);
    agree(&server, &wider);
    let notices = server.run(&replace(&wider));
    let notice = &notices["results"][0]["notices"][0]["message"];
    assert!(
        notice
            .as_str()
            .is_some_and(|n| n.contains("nothing changes")),
        "{notices}"
    );
    server.run(&replace(&OLD.replace("AS n", "AS n, max(price) AS most")));
    agree(&server, &OLD.replace("AS n", "AS n, max(price) AS most"));
    server.kill();
    server.start_again(&[]);
    agree(&server, &OLD.replace("AS n", "AS n, max(price) AS most"));
    for row in server.list("jobs") {
        assert_eq!(row["state"], "running", "{row}");
    }
    assert_eq!(contents(&server, "star"), batch(&server, OLD));
    written(&server, "t.v", "v_out", &batch(&server, OLD));
    written(&server, "t.d", "d_out", &contents(&server, "d"));
}

#[test]
fn subscribers_see_one_tick_that_turns_the_old_rows_into_the_new_ones() {
    let server = Server::start(FLAGS);
    source(&server, 20_000, "");
    server.run(&format!(
        "CREATE MATERIALIZED VIEW v AS {OLD}; CREATE MATERIALIZED VIEW d AS {READER}"
    ));
    agree(&server, OLD);
    let (mut v, mut d) = (Followed::of(&server, "v"), Followed::of(&server, "d"));
    let before = batch(&server, OLD);
    server.run(&replace(NEW));
    let after = batch(&server, NEW);
    let changes = v.tick();
    let of = |diff| -> Vec<Value> {
        let some = changes.iter().filter(|(d, _)| *d == diff);
        some.map(|(_, row)| row.clone()).collect()
    };
    let only = |these: &[Value], those: &[Value]| -> Vec<Value> {
        these
            .iter()
            .filter(|row| !those.contains(row))
            .cloned()
            .collect()
    };
    assert_eq!(sorted(of(-1)), only(&before, &after));
    assert_eq!(sorted(of(1)), only(&after, &before));
    // One tick, too, for what is computed from it.
    d.tick();
    d.until(&contents(&server, "d"));
    agree(&server, NEW);
    // Without readers a view may get other columns; who follows it has to begin again.
    server.run("DROP MATERIALIZED VIEW d");
    server.run(&replace(
        "SELECT price AS p, count(*) AS n FROM bid GROUP BY price",
    ));
    let line = v.lines.next().expect("a last line");
    assert_eq!(line["error"]["code"], "42710", "{line}");
    assert_eq!(
        contents(&server, "v"),
        batch(
            &server,
            "SELECT price AS p, count(*) AS n FROM bid GROUP BY price"
        )
    );
}

#[test]
fn an_append_only_view_is_replaced_by_another_one() {
    let mut server = Server::start(FLAGS);
    source(&server, 50_000, ", rate = 20000");
    let all = "SELECT auction, price FROM bid WHERE auction % 7 = 0";
    let other = "SELECT auction, price FROM bid WHERE auction % 7 = 0 AND price % 2 = 0";
    let different = "SELECT count(*) AS n FROM (SELECT DISTINCT price FROM v)";
    let sums =
        "SELECT auction % 10 AS slot, sum(price) AS s, count(*) AS n FROM v GROUP BY auction % 10";
    server.run(&format!(
        "CREATE MATERIALIZED VIEW v AS {all};
         CREATE MATERIALIZED VIEW sums AS {sums};
         CREATE MATERIALIZED VIEW different AS {different};"
    ));
    server.run(&replace(other));
    let want = |query: &str| query.replace("FROM v", &format!("FROM ({other}) AS v"));
    for again in [false, true] {
        if again {
            server.kill();
            server.start_again(&[]);
        }
        server.caught_up(&[Fed::Ended("bid")], LIMIT);
        assert_eq!(contents(&server, "v"), batch(&server, other));
        assert_eq!(contents(&server, "sums"), batch(&server, &want(sums)));
        let want = want(different);
        assert_eq!(contents(&server, "different"), batch(&server, &want));
    }
}

/// The service dies at a failpoint during the statement; the parent starts it again.
fn replace_and_die(point: &str) -> Server {
    let mut server = Server::prepare(FLAGS);
    server.start_again(&[("MILLRACE_FAILPOINTS", &format!("{point}=kill"))]);
    source(&server, 60_000, ", rate = 20000");
    with_readers(&server);
    let first = server.child_pid();
    // The connection ends with the service.
    let body = json!({ "sql": replace(NEW) }).to_string();
    let answer = millrace_tests::http::request(
        &server.address,
        "POST",
        "/api/v1/sql",
        &[("Content-Type", "application/json")],
        body.as_bytes(),
    );
    assert!(answer.is_err() || answer.is_ok_and(|a| a.status != 200));
    wait::until("another service", LIMIT, || {
        let ready = server.get("/readyz").status == 200;
        match (server.child_pid(), ready) {
            (Some(pid), true) if Some(pid) != first => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    server
}

#[test]
fn killed_before_the_switch_the_old_definition_stays() {
    for point in ["replace.before_switch", "replace.tick.after"] {
        let mut server = replace_and_die(point);
        assert!(!definition(&server).contains("1000"), "{point}");
        agree(&server, OLD);
        assert!(server.rows("SHOW BACKFILLS").is_empty());
        written(&server, "t.v", "v_out", &batch(&server, OLD));
        // Nothing is left that would be in the way of another try.
        server.kill();
        server.start_again(&[]);
        server.run(&replace(NEW));
        agree(&server, NEW);
        written(&server, "t.v", "v_out", &batch(&server, NEW));
        written(&server, "t.d", "d_out", &contents(&server, "d"));
    }
}

#[test]
fn killed_after_the_switch_the_new_definition_counts() {
    let mut server = replace_and_die("replace.checkpoint.after");
    for _ in 0..2 {
        assert!(definition(&server).contains("1000"));
        agree(&server, NEW);
        written(&server, "t.v", "v_out", &batch(&server, NEW));
        written(&server, "t.d", "d_out", &contents(&server, "d"));
        server.kill();
        server.start_again(&[]);
    }
}

#[test]
fn what_cannot_follow_keeps_the_old_definition() {
    let server = Server::start(FLAGS);
    source(&server, 5_000, "");
    server.run(&format!(
        "CREATE MATERIALIZED VIEW v AS {OLD};
         CREATE MATERIALIZED VIEW d AS {READER};
         CREATE VIEW spelled AS SELECT slot FROM v;
         CREATE MATERIALIZED VIEW rows_only AS SELECT auction, price, date_time FROM bid;
         CREATE SINK rows_out FROM rows_only INTO lake.t.rows_only;
         CREATE MATERIALIZED VIEW windowed AS SELECT auction, price, date_time FROM bid;
         CREATE MATERIALIZED VIEW per_window AS SELECT window_start, count(*) AS n
           FROM TUMBLE(windowed, date_time, INTERVAL '1' SECOND) GROUP BY window_start, window_end;
         CREATE MATERIALIZED VIEW growing AS SELECT auction, price FROM bid;
         CREATE MATERIALIZED VIEW highest AS SELECT max(price) AS p FROM growing;
         CREATE MATERIALIZED VIEW lake.t.published WITH (changelog = 'op') AS
           SELECT auction % 10 AS slot, count(*) AS n FROM bid GROUP BY auction % 10"
    ));
    let refused = |statement: &str, code: &str, says: &str| {
        let error = server.error(statement);
        assert_eq!(error["code"], code, "{statement}: {error}");
        let text = error.to_string();
        assert!(text.contains(says), "{statement}: {error}");
        assert!(error["hint"].is_string() || code == "42P17", "{error}");
    };
    let of =
        |name: &str, query: &str| format!("CREATE OR REPLACE MATERIALIZED VIEW {name} AS {query}");
    // Columns that others read.
    refused(
        &of(
            "v",
            "SELECT auction % 10 AS slot FROM bid GROUP BY auction % 10",
        ),
        "42P16",
        "materialized view \\\"d\\\", view \\\"spelled\\\" read it",
    );
    refused(
        &of(
            "v",
            "SELECT auction % 10 AS s, count(*) AS n FROM bid GROUP BY auction % 10",
        ),
        "42P16",
        "change name of column",
    );
    refused(
        &of(
            "v",
            "SELECT auction % 10 AS slot, sum(price) AS n FROM bid GROUP BY auction % 10",
        ),
        "42P16",
        "from BIGINT to DECIMAL",
    );
    // Readers that keep too little.
    refused(
        &of(
            "rows_only",
            "SELECT auction, price, date_time FROM bid WHERE price > 5",
        ),
        "0A000",
        "only appends",
    );
    refused(
        &of(
            "windowed",
            "SELECT auction, price, date_time FROM bid WHERE price > 5",
        ),
        "0A000",
        "per_window",
    );
    refused(
        &of("growing", "SELECT auction, price FROM bid WHERE price > 5"),
        "0A000",
        "highest",
    );
    // Itself, directly or through others.
    refused(
        &of("v", "SELECT slot, n FROM v WHERE n > 1"),
        "42P17",
        "cannot read itself",
    );
    refused(
        &of("v", "SELECT odd AS slot, groups AS n FROM d"),
        "42P17",
        "cannot read itself",
    );
    // Other objects, other forms.
    refused(&of("bid", "SELECT 1 AS x"), "42809", "is a source");
    refused(
        "CREATE OR REPLACE SOURCE bid WITH (connector = 'generator', kind = 'nexmark', table = 'bid')",
        "0A000",
        "REPLACE SOURCE",
    );
    refused(
        "CREATE OR REPLACE MATERIALIZED VIEW IF NOT EXISTS v AS SELECT 1 AS x",
        "42601",
        "exclude each other",
    );
    // The table of a published view stays what it is.
    let published = "SELECT auction % 10 AS slot, count(*) AS n, max(price) AS p FROM bid GROUP BY auction % 10";
    refused(
        &of("lake.t.published WITH (changelog = 'op')", published),
        "0A000",
        "columns of table",
    );
    refused(
        &of(
            "lake.t.published WITH (changelog = 'op', commit_interval = '9 s')",
            OLD,
        ),
        "0A000",
        "options of table",
    );
    // Nothing has changed.
    agree(&server, OLD);
    assert!(!definition(&server).contains("REPLACE"));
    assert!(server.rows("SHOW BACKFILLS").is_empty());
    // What does fit goes through, also into the table of a published view.
    server.run(&of("lake.t.published WITH (changelog = 'op')", NEW));
    if let Some(python) = python() {
        let want = batch(&server, NEW);
        let tick = server.run("SELECT count(*) FROM v")["results"][0]["tick"].as_u64();
        server.committed("lake.t.published", tick.expect("a tick"), LIMIT);
        let path = server.scratch().join("published.json");
        std::fs::write(&path, Value::from(want).to_string()).expect("written");
        let path = path.to_string_lossy();
        ledger(&python, &server.data_dir(), &["net", "t.published", &path]);
    }
    // Where nothing stands under the name, it is a CREATE.
    server.run(&of("fresh", OLD));
    assert_eq!(contents(&server, "fresh"), batch(&server, OLD));
}

#[test]
fn a_replacement_whose_source_is_gone_leaves_the_view() {
    let server = Server::start(FLAGS);
    let path = server.scratch().join("t.json");
    std::fs::write(&path, "{\"id\":1}\n{\"id\":2}\n").expect("written");
    server.run(&format!(
        "CREATE SOURCE t (id BIGINT) WITH (connector = 'files', format = 'json', path = '{}');
         CREATE MATERIALIZED VIEW v AS SELECT count(*) AS n FROM t",
        path.display()
    ));
    server.caught_up(&[Fed::Ended("t")], LIMIT);
    std::fs::remove_file(&path).expect("removed");
    let error = server.error(&replace("SELECT sum(id) AS n FROM t"));
    assert!(error["message"].is_string(), "{error}");
    assert_eq!(server.rows("SELECT n FROM v"), [json!([2])]);
    assert!(!definition(&server).contains("sum"));
    assert!(server.rows("SHOW BACKFILLS").is_empty());
    assert_eq!(
        server.one("views", "v").expect("a view")["state"],
        "running"
    );
}

#[test]
fn a_view_may_be_moved_onto_one_that_was_made_later() {
    let mut server = Server::start(FLAGS);
    source(&server, 20_000, "");
    server.run(&format!(
        "CREATE MATERIALIZED VIEW v AS {OLD};
         CREATE MATERIALIZED VIEW d AS {READER};
         CREATE MATERIALIZED VIEW dear AS SELECT auction, price FROM bid WHERE price > 1000"
    ));
    server.run(&replace(
        &NEW.replace("FROM bid WHERE price > 1000", "FROM dear"),
    ));
    agree(&server, NEW);
    server.kill();
    server.start_again(&[]);
    agree(&server, NEW);
    assert_eq!(server.error("DROP MATERIALIZED VIEW dear")["code"], "2BP01");
    server.run("DROP SOURCE bid CASCADE");
    assert!(server.rows("SHOW MATERIALIZED VIEWS").is_empty());
}

/// A server whose first piece of history takes ten seconds to read, once views run.
fn slow() -> Server {
    let mut server = Server::prepare(FLAGS);
    server.start_again(&[]);
    source(&server, 100_000_000, ", rate = 20000");
    server.run("CREATE MATERIALIZED VIEW v AS SELECT auction % 10 AS slot, count(*) AS n FROM bid GROUP BY auction % 10");
    server.terminate();
    server.start_again(&[("MILLRACE_FAILPOINTS", "backfill.read=delay10000")]);
    server
}

/// Waits until `name` reads history; its row.
fn backfill(server: &Server, name: &str) -> Value {
    wait::until("a backfill", LIMIT, || {
        let rows = server.try_list("backfills")?;
        let row = rows.iter().find(|row| row["name"] == name);
        match row {
            Some(row) if row["total"].as_u64() > Some(0) => Ok(row.clone()),
            _ => Err(format!("{rows:?}")),
        }
    })
}

#[test]
fn a_backfill_shows_itself_disturbs_nobody_and_is_called_off() {
    let server = slow();
    let create =
        "CREATE MATERIALIZED VIEW w AS SELECT auction, count(*) AS n FROM bid GROUP BY auction";
    std::thread::scope(|scope| {
        let creating = scope.spawn(|| server.error(create));
        let row = backfill(&server, "w");
        assert_eq!(
            (&row["what"], &row["kind"]),
            (&"create".into(), &"view".into()),
            "{row}"
        );
        assert_eq!(row["inputs"][0]["name"], "bid", "{row}");
        assert!(row["percent"].as_f64() < Some(100.0), "{row}");
        let shown = server.rows("SHOW BACKFILLS");
        assert_eq!(
            (&shown[0][0], &shown[0][2]),
            (&"w".into(), &"create".into())
        );
        let metrics = server.get("/metrics").text();
        assert!(
            metrics.contains("millrace_backfill_total{kind=\"view\",relation=\"w\"}"),
            "{metrics}"
        );
        // The others go on meanwhile.
        let frontier = |row: &Value| row["frontier"].as_u64().expect("a frontier");
        let before = frontier(&server.one("views", "v").expect("a view"));
        wait::until("live rows", LIMIT, || {
            let now = frontier(&server.one("views", "v").expect("a view"));
            (now > before + 100).then_some(()).ok_or(format!("{now}"))
        });
        // So do other statements, but for those that would take away what is read.
        server.run("CREATE MATERIALIZED VIEW quick AS SELECT count(*) AS n FROM v");
        assert_eq!(server.error("DROP SOURCE bid CASCADE")["code"], "55006");
        assert_eq!(server.error(create)["code"], "55006");
        assert_eq!(server.list("backfills").len(), 1, "it still reads");
        server.run("CANCEL BACKFILL w");
        assert_eq!(creating.join().expect("answered")["code"], "57014");
    });
    assert!(server.rows("SHOW BACKFILLS").is_empty());
    assert_eq!(server.error("SELECT * FROM w")["code"], "42P01");
    let names = server.rows("SHOW ALL");
    assert!(names.iter().all(|row| row[0] != "w"), "{names:?}");
    assert_eq!(server.error("CANCEL BACKFILL w")["code"], "42P01");
    // Its name is free.
    server.run(create);
    assert!(!server.rows("SELECT * FROM w LIMIT 1").is_empty());
}

#[test]
fn a_drop_calls_off_a_creation_and_its_table() {
    let server = slow();
    let create = "CREATE MATERIALIZED VIEW lake.t.w WITH (changelog = 'op') AS \
                  SELECT auction % 10 AS a, count(*) AS n FROM bid GROUP BY auction % 10";
    std::thread::scope(|scope| {
        let creating = scope.spawn(|| server.error(create));
        backfill(&server, "lake.t.w");
        let answer = server.run("DROP MATERIALIZED VIEW lake.t.w");
        let notice = &answer["results"][0]["notices"][0]["message"];
        assert!(
            notice.as_str().is_some_and(|n| n.contains("cancelled")),
            "{answer}"
        );
        assert_eq!(creating.join().expect("answered")["code"], "57014");
    });
    assert!(server.rows("SHOW TABLES").is_empty());
    assert!(server.rows("SHOW SINKS").is_empty());
    assert_eq!(
        server.one("views", "v").expect("a view")["state"],
        "running"
    );
}

#[test]
fn a_replacement_is_called_off() {
    let mut server = slow();
    let query = "SELECT auction % 10 AS slot, count(*) + 1 AS n FROM bid GROUP BY auction % 10";
    std::thread::scope(|scope| {
        let replacing = scope.spawn(|| server.error(&replace(query)));
        let row = backfill(&server, "v");
        assert_eq!(row["what"], "replace", "{row}");
        let view = server.one("views", "v").expect("a view");
        assert_eq!(view["state"], "running", "{view}");
        assert_eq!(view["backfill"]["what"], "replace", "{view}");
        assert!(
            !server.rows("SELECT * FROM v").is_empty(),
            "the old one serves"
        );
        let reader = server.error("CREATE MATERIALIZED VIEW r AS SELECT sum(n) AS s FROM v");
        assert_eq!(reader["code"], "55006", "{reader}");
        assert_eq!(server.error(&replace(OLD))["code"], "55006");
        server.run("CANCEL BACKFILL v");
        assert_eq!(replacing.join().expect("answered")["code"], "57014");
    });
    assert!(!definition(&server).contains("+ 1"));
    server.kill();
    server.start_again(&[]);
    assert!(!definition(&server).contains("+ 1"));
    assert_eq!(
        server.one("views", "v").expect("a view")["state"],
        "running"
    );
    server.run(&replace(query));
    assert!(definition(&server).contains("+ 1"));
}
