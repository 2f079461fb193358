//! What older versions have stored must be read by this one.
//!
//! `tests/upgrade/<n>.tar.gz` is a data directory as format `n` left it when it was killed while rows
//! flowed: a checkpoint with every kind of state, a remap log with ticks above it, the metadata, tables of
//! the lake with committed and with prepared files. Each is unpacked where it was made (tables name
//! their files by absolute path), started, and run to the end of its sources; then every answer must
//! be the one that its own version gave. `tests/upgrade/make.sh` makes one for a new format.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use millrace_tests::server::{Fed, Server, offsets};
use millrace_tests::wait;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(120);
/// Of the fixture that `make.sh` makes; grows with every change of a stored format.
const FORMAT: u32 = 1;
const EVENTS: u64 = 30_000;
const FLAGS: &[&str] = &[
    "--workers",
    "2",
    "--checkpoint-interval",
    "700ms",
    "--commit-interval",
    "500ms",
];

/// Where a fixture is made and unpacked.
fn place(format: u32) -> PathBuf {
    PathBuf::from(format!("/tmp/millrace-upgrade-{format}"))
}

fn fixture(format: u32) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("upgrade")
        .join(format!("{format}.tar.gz"))
}

/// One at a time, among all who test on this machine.
fn lock(format: u32) -> File {
    let file = File::create(place(format).with_extension("lock")).expect("a file");
    // SAFETY: a plain system call on a descriptor that is open.
    let locked = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) };
    assert_eq!(locked, 0);
    file
}

fn tar(args: &[&str]) {
    let status = Command::new("tar").args(args).status().expect("tar");
    assert!(status.success(), "tar {args:?}: {status}");
}

fn create(server: &Server, dir: &Path) {
    let records = "{\"id\":1,\"x\":0}\n{\"id\":2,\"x\":5}\nnot json\n{\"id\":3,\"x\":-7}\n{\"id\":3,\"x\":-7}\n";
    let path = dir.join("records.json");
    std::fs::write(&path, records).expect("written");
    server.run(&format!(
        "CREATE SOURCE bid WITH (connector = 'generator', kind = 'nexmark', table = 'bid', seed = 9,
           rate = 5000, max_events = {EVENTS});
         CREATE SOURCE auction WITH (connector = 'generator', kind = 'nexmark', table = 'auction', seed = 9,
           rate = 5000, max_events = {EVENTS});
         CREATE SOURCE r (id BIGINT, x BIGINT) WITH (connector = 'files', format = 'json', path = '{}');
         CREATE MATERIALIZED VIEW plain AS SELECT auction, price * 2 AS p FROM bid WHERE auction % 97 = 0;
         CREATE MATERIALIZED VIEW totals AS
           SELECT auction, count(*) AS n, min(price) AS lo, max(price) AS hi, sum(price) AS s, avg(price) AS a
           FROM bid WHERE auction % 31 = 0 GROUP BY auction;
         CREATE MATERIALIZED VIEW closed AS
           SELECT auction % 10 AS k, window_start, count(*) AS n FROM TUMBLE(bid, date_time, INTERVAL '1' SECOND)
           GROUP BY auction % 10, window_start EMIT ON WINDOW CLOSE;
         CREATE MATERIALIZED VIEW hops AS
           SELECT window_start, count(*) AS n, max(price) AS hi
           FROM HOP(bid, date_time, INTERVAL '1' SECOND, INTERVAL '3' SECOND) GROUP BY window_start, window_end;
         CREATE MATERIALIZED VIEW joined AS
           SELECT t.auction, t.n, a.category FROM totals t JOIN (SELECT id, category FROM auction) a ON t.auction = a.id;
         CREATE MATERIALIZED VIEW seen AS SELECT DISTINCT bidder % 100 AS b FROM bid
           UNION ALL SELECT x AS b FROM r;
         CREATE MATERIALIZED VIEW failing AS SELECT id, 10 / x AS q FROM r;
         CREATE SINK out FROM plain INTO lake.old.plain;
         CREATE SINK changes FROM totals INTO lake.old.totals WITH (changelog = 'op')",
        path.display()
    ));
}

/// Everything that can be asked at the end.
fn answers(server: &Server) -> Value {
    server.caught_up(
        &[Fed::Ended("bid"), Fed::Ended("auction"), Fed::Ended("r")],
        LIMIT,
    );
    let frontier = server.one("sources", "bid").expect("listed")["frontier"].as_u64();
    for sink in ["out", "changes"] {
        server.committed(sink, frontier.expect("a tick"), LIMIT);
    }
    let mut all = serde_json::Map::new();
    for query in [
        "SELECT count(*), sum(p) FROM plain",
        "SELECT * FROM totals ORDER BY auction",
        "SELECT * FROM closed ORDER BY 1, 2",
        "SELECT * FROM hops ORDER BY 1",
        "SELECT * FROM joined ORDER BY 1, 2, 3",
        "SELECT * FROM seen ORDER BY 1",
        "SELECT * FROM failing ORDER BY 1",
        "SELECT count(*) FROM failing$errors",
        "SELECT count(*) FROM r$rejected",
        "SELECT count(*) FROM closed$late",
        "SELECT count(*), sum(p) FROM lake.old.plain",
        "SELECT auction, sum(CASE WHEN op = '+' THEN n ELSE -n END) FROM lake.old.totals GROUP BY auction ORDER BY 1",
    ] {
        all.insert(query.to_string(), json!(server.rows(query)));
    }
    Value::Object(all)
}

/// What the sources alone say, for the answers that are simple to say again.
fn check_against_sources(server: &Server) {
    for (view, query) in [
        (
            "SELECT auction, n, lo, hi, s FROM totals ORDER BY 1",
            "SELECT auction, count(*), min(price), max(price), sum(price) FROM bid WHERE auction % 31 = 0 GROUP BY auction ORDER BY 1",
        ),
        (
            "SELECT count(*), sum(p) FROM lake.old.plain",
            "SELECT count(*), sum(price * 2) FROM bid WHERE auction % 97 = 0",
        ),
    ] {
        assert_eq!(server.rows(view), server.rows(query), "{view}");
    }
}

#[test]
fn what_older_versions_stored_is_read() {
    let mut formats = 0;
    for format in 1..=FORMAT {
        let _one = lock(format);
        let place = place(format);
        let _ = std::fs::remove_dir_all(&place);
        let archive = fixture(format);
        tar(&["xzf", &archive.to_string_lossy(), "-C", "/tmp"]);
        let expected = std::fs::read_to_string(place.join("expected.json")).expect("it is there");
        let expected: Value = serde_json::from_str(&expected).expect("JSON");
        let mut server = Server::prepare_at(&place, FLAGS);
        server.start_again(&[]);
        assert_eq!(answers(&server), expected, "format {format}");
        check_against_sources(&server);
        // And what this version makes of it, it can read as well.
        server.kill();
        server.start_again(&[]);
        assert_eq!(answers(&server), expected, "format {format}, started again");
        assert!(server.terminate().success());
        let _ = std::fs::remove_dir_all(&place);
        formats += 1;
    }
    assert!(formats > 0);
}

/// `tests/upgrade/make.sh`
#[test]
#[ignore = "makes a file of the repository"]
fn make_the_fixture_of_this_format() {
    let _one = lock(FORMAT);
    let place = place(FORMAT);
    let _ = std::fs::remove_dir_all(&place);
    std::fs::create_dir_all(&place).expect("a folder");
    let mut server = Server::prepare_at(&place, FLAGS);
    server.start_again(&[]);
    create(&server, &place);
    wait::until("the middle of the stream", LIMIT, || {
        let row = server.one("sources", "bid").ok_or("none")?;
        let committed = server
            .one("sinks", "changes")
            .map(|s| s["committed"].clone());
        let some = committed.is_some_and(|c| c.as_u64() > Some(0));
        match offsets(&row) > EVENTS / 2 && some {
            true => Ok(()),
            false => Err(row.to_string()),
        }
    });
    server.kill();
    let middle = place.with_extension("middle");
    let _ = std::fs::remove_dir_all(&middle);
    let copied = Command::new("cp")
        .arg("-a")
        .arg(&place)
        .arg(&middle)
        .status();
    assert!(copied.is_ok_and(|s| s.success()));
    // The answers of the version that makes it, to the end of the stream.
    server.start_again(&[]);
    let expected = answers(&server);
    check_against_sources(&server);
    assert!(server.terminate().success());
    drop(server);
    std::fs::remove_dir_all(&place).expect("removed");
    std::fs::rename(&middle, &place).expect("moved back");
    let _ = std::fs::remove_file(place.join("server.log"));
    std::fs::write(place.join("expected.json"), expected.to_string()).expect("written");
    let archive = fixture(FORMAT);
    let name = place.file_name().expect("a name").to_string_lossy();
    tar(&["czf", &archive.to_string_lossy(), "-C", "/tmp", &name]);
    let size = std::fs::metadata(&archive).expect("it is there").len();
    println!("{}: {size} bytes", archive.display());
    assert!(size < 300_000, "too large for the repository");
    std::fs::remove_dir_all(&place).expect("removed");
}
