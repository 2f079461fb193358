//! Several processes for one data plane: answers are the same, fate is shared, the number changes.

use std::process::{Command, Stdio};

use millrace_tests::server::binary;

use super::*;

const QUERIES: &[&str] = &[
    "SELECT auction, n FROM per_auction ORDER BY auction",
    "SELECT count(*), sum(n), max(n) FROM per_auction",
    "SELECT b.bidder, b.n, w.total FROM per_bidder b JOIN windows w ON b.bidder = w.bidder ORDER BY b.bidder",
    "SELECT count(*), sum(price) FROM expensive",
];

/// A bounded source and views over it: an aggregate, a join, a plain filter.
fn create(server: &Server) {
    server.run(
        "CREATE SOURCE bid WITH (connector = 'generator', kind = 'nexmark', table = 'bid', seed = 11,
           rate = 40000, max_events = 60000);
         CREATE MATERIALIZED VIEW per_auction AS SELECT auction, count(*) AS n FROM bid GROUP BY auction;
         CREATE VIEW dear AS SELECT * FROM bid WHERE price > 1000000;
         CREATE MATERIALIZED VIEW expensive AS SELECT auction, price FROM dear;
         CREATE MATERIALIZED VIEW per_bidder AS SELECT bidder, count(*) AS n FROM bid GROUP BY bidder",
    );
}

/// A view over views, created when rows have come.
fn create_later(server: &Server) {
    server.run(
        "CREATE MATERIALIZED VIEW windows AS SELECT bidder, sum(n) AS total FROM (
           SELECT bidder, window_start, count(*) AS n FROM TUMBLE(bid, date_time, INTERVAL '1' SECOND)
           GROUP BY bidder, window_start) w GROUP BY bidder;
         CREATE MATERIALIZED VIEW both AS SELECT a.auction, a.n, e.price
           FROM per_auction a JOIN expensive e ON a.auction = e.auction",
    );
}

fn answers(server: &Server) -> Vec<Vec<Value>> {
    let both = "SELECT auction, n, price FROM both ORDER BY auction, price, n";
    let queries = QUERIES.iter().copied().chain([both]);
    queries.map(|query| server.rows(query)).collect()
}

/// Processes of the plane, as the API says it; `None` while it restarts.
fn processes(server: &Server) -> Option<usize> {
    let plane = server.try_list("planes").ok()?.pop()?;
    let processes = plane["processes"].as_array()?;
    assert_eq!(plane["workers"], 1, "{plane}");
    Some(processes.len())
}

#[test]
fn one_process_becomes_two_and_one_with_equal_answers() {
    let mut server = Server::start(&["--workers", "1", "--commit-interval", "100ms"]);
    create(&server);
    let mut expected = None;
    for (count, rows) in [(2, 20_000), (1, 40_000), (2, 60_000), (1, 60_000)] {
        wait::until("rows", LIMIT, || {
            let source = server.try_list("sources")?.pop().ok_or("no source")?;
            match millrace_tests::server::offsets(&source) {
                seen if seen >= rows * 46 / 50 => Ok(()),
                seen => Err(seen.to_string()),
            }
        });
        server.run(&format!("ALTER DATA PLANE SET PROCESSES {count}"));
        wait::until("the processes", LIMIT, || match processes(&server) {
            Some(now) if now == count => Ok(()),
            now => Err(format!("{now:?}")),
        });
        assert_eq!(server.worker_pids().len(), count - 1);
        let metrics = server.get("/metrics").text();
        let line = format!("millrace_processes {count}");
        assert!(metrics.lines().any(|l| l == line), "{metrics}");
        if rows == 20_000 {
            create_later(&server);
        }
        if rows == 60_000 {
            server.caught_up(&[Fed::Ended("bid")], LIMIT);
            let now = answers(&server);
            assert_eq!(expected.get_or_insert_with(|| now.clone()), &now);
        }
    }
    // The batch engine answers the same from the source.
    let n = "SELECT auction, count(*) AS n FROM bid GROUP BY auction ORDER BY auction";
    assert_eq!(Some(&server.rows(n)), expected.iter().flatten().next());
    // A start that says another number means it.
    assert!(server.terminate().success());
    server.start_again(&[("MILLRACE_PROCESSES", "2")]);
    assert_eq!(processes(&server), Some(2));
    assert_eq!(Some(answers(&server)), expected);
    for wrong in ["0", "65"] {
        let error = server.error(&format!("ALTER DATA PLANE default SET PROCESSES = {wrong}"));
        assert_eq!(error["code"], "22023");
    }
    assert!(server.terminate().success());
}

/// Waits until another service than `before` is ready: the old one does not know at once that it ends.
fn started_again(server: &Server, before: Option<i32>) {
    wait::until("the service to be back", LIMIT, || {
        let ready = server.try_get("/readyz").map_err(|e| e.to_string())?;
        match server.child_pid() {
            now if now.is_some() && now != before && ready.status == 200 => Ok(()),
            now => Err(format!("{before:?}, {now:?}: {}", ready.status)),
        }
    });
}

#[test]
fn a_process_that_dies_or_is_stopped_ends_the_incarnation_for_all() {
    let mut server = Server::prepare(&["--workers", "1", "--processes", "3"]);
    server.start_again(&[("MILLRACE_PEER_TIMEOUT", "2s")]);
    create(&server);
    create_later(&server);
    server.caught_up(&[Fed::Ended("bid")], LIMIT);
    let expected = answers(&server);
    assert_eq!(server.worker_pids().len(), 2);
    for end in [Server::kill_worker, Server::stop_worker, Server::kill_child] {
        let before = server.child_pid();
        end(&server);
        started_again(&server, before);
        assert_eq!(answers(&server), expected);
    }
    let log = server.log_text();
    assert!(log.contains("it was silent for too long"), "{log}");
    // A subscriber hears of all processes; what it holds is what a query says.
    let mut lines = Lines::of(&server.address, "per_auction");
    let mut rows = 0;
    loop {
        let line = lines.next().expect("the contents come first");
        if line["complete"] == true {
            break;
        }
        rows += i64::from(line["diff"] == 1);
    }
    assert_eq!(
        json!(rows),
        server.rows("SELECT count(*) FROM per_auction")[0][0]
    );
    drop(lines);
    assert!(server.terminate().success());
}

#[test]
fn what_is_paused_or_fails_is_so_in_all_processes() {
    let mut server = Server::prepare(&["--workers", "1", "--processes", "2"]);
    server.start_again(&[("MILLRACE_FAILPOINTS", "view.bad=panic")]);
    create(&server);
    let rows = |server: &Server, view: &str| {
        server.rows(&format!("SELECT count(*), sum(n) FROM {view}"))[0].clone()
    };
    server.run("ALTER MATERIALIZED VIEW per_auction PAUSE");
    let before = rows(&server, "per_auction");
    // Sums are exact numbers, as text.
    let all = json!(server.rows("SELECT count(*) FROM bid")[0][0].to_string());
    server.kill_worker();
    wait::until("all rows", LIMIT, || {
        let source = server.try_list("sources")?.pop().ok_or("no source")?;
        match millrace_tests::server::offsets(&source) {
            60_000 => Ok(()),
            seen => Err(seen.to_string()),
        }
    });
    assert_eq!(rows(&server, "per_auction"), before);
    assert_eq!(rows(&server, "per_bidder")[1], all);
    // Whichever process panics first: it is the view that is given up, not the server.
    let body = json!({ "sql": "CREATE MATERIALIZED VIEW bad AS SELECT bidder, count(*) AS n FROM bid GROUP BY bidder" });
    let headers = [("Content-Type", "application/json")];
    let path = "/api/v1/sql";
    let body = body.to_string();
    let _ = http::request(&server.address, "POST", path, &headers, body.as_bytes());
    wait::until("it to be given up", LIMIT, || {
        let path = "/api/v1/views/bad";
        let answer = http::request(&server.address, "GET", path, &[], b"");
        let answer = answer.map_err(|e| e.to_string())?;
        match answer.status {
            200 if answer.json()["state"] == "failed" => Ok(()),
            status => Err(format!("{status}: {}", answer.text())),
        }
    });
    assert_eq!(server.worker_pids().len(), 1);
    assert_eq!(rows(&server, "per_auction"), before);
    server.run("ALTER MATERIALIZED VIEW per_auction RESUME");
    assert_eq!(rows(&server, "per_auction")[1], all);
    assert!(server.terminate().success());
}

/// Not to be started by hand, and the secret is not to be seen.
#[test]
fn a_worker_process_belongs_to_a_server() {
    let output = Command::new(binary())
        .args(["worker", "--process", "1", "--server", "127.0.0.1:9"])
        .stdin(Stdio::null())
        .output()
        .expect("the binary starts");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("started by a server"), "{text}");

    let server = Server::start(&["--workers", "1", "--processes", "2"]);
    let pids = server.worker_pids();
    assert_eq!(pids.len(), 1);
    let seen = |what: &str| {
        let path = format!("/proc/{}/{what}", pids[0]);
        let bytes = std::fs::read(path).expect("our own process");
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let hex = |text: &str| {
        let mut run = 0;
        text.chars().any(|c| {
            run = if c.is_ascii_hexdigit() { run + 1 } else { 0 };
            run >= 64
        })
    };
    assert!(seen("cmdline").contains("worker"));
    assert!(!hex(&seen("cmdline")) && !hex(&seen("environ")));
}
