//! Runs files of the corpus on a real server, one way at a time.
//!
//! Several files share a server: their tables and views live side by side, as they would in use.
//! Every answer is compared with the one written in the file, so all ways give equal answers.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::Duration;

use serde_json::Value;

use super::corpus::{File, Table, View, canonical};
use super::feed::{self, Sent, Stream};
use crate::rng::Rng;
use crate::server::{Fed, Server};

const LIMIT: Duration = Duration::from_secs(240);
/// Files that share a server: some eighty views, of which each tick visits every operator.
const FILES: usize = 7;
/// Short intervals, so that a small run sees several checkpoints.
const FLAGS: &[&str] = &[
    "--checkpoint-interval",
    "300ms",
    "--commit-interval",
    "300ms",
];

/// Every query as a one-shot SELECT over bounded files.
pub fn batch(files: &[File]) {
    let server = Server::start(&["--workers", "2"]);
    let mut findings = String::new();
    for file in files {
        for table in &file.tables {
            server.run(&table.create(&feed::final_rows(table, server.scratch())));
        }
        for view in &file.views {
            // A view that is only text: what reads it computes it.
            server.run(&format!("CREATE VIEW {} AS {}", view.name, view.query));
            let answer = server.sql(&format!("SELECT * FROM {}", view.name));
            match (&view.errors, answer["error"]["code"].as_str()) {
                (None, None) => compare(view, &rows_of(&answer), "batch", &mut findings),
                (Some((_, code)), Some(found)) if code == found => {}
                _ => note(&mut findings, view, "batch", &format!("answered {answer}")),
            }
        }
        for refused in &file.refused {
            let statement = format!("CREATE MATERIALIZED VIEW refused AS {}", refused.query);
            let error = server.error(&statement);
            let helps = error["hint"].is_string() || error["detail"].is_string();
            if error["code"] != refused.code.as_str() || !helps {
                let _ = writeln!(findings, "{statement}\nwas refused with {error}\n");
            }
        }
    }
    finish(&findings);
}

/// Every query as a view that is kept up to date while rows arrive in random slices; with `restart`
/// the server is killed half-way.
pub fn stream(
    files: &[File],
    broker: &str,
    processes: usize,
    workers: usize,
    restart: bool,
    rng: &Rng,
) {
    for (number, files) in files.chunks(FILES).enumerate() {
        let rng = rng.fork(&format!("files {number}"));
        stream_some(files, broker, processes, workers, restart, &rng);
    }
}

fn stream_some(
    files: &[File],
    broker: &str,
    processes: usize,
    workers: usize,
    restart: bool,
    rng: &Rng,
) {
    let mode = format!(
        "{} with {processes} processes of {workers} workers",
        if restart { "restart" } else { "stream" }
    );
    let mut rng = rng.fork(&mode);
    let (processes, workers) = (processes.to_string(), workers.to_string());
    let mut flags = vec!["--processes", &processes, "--workers", &workers];
    flags.extend_from_slice(FLAGS);
    let mut server = Server::start(&flags);

    let mut streams = Vec::new();
    for table in files.iter().flat_map(|file| &file.tables) {
        let options = if table.changelog {
            feed::changelog(table, server.scratch(), &mut rng)
        } else {
            streams.push(Stream::new(broker, table, &mut rng));
            streams.last().expect("just pushed").options()
        };
        server.run(&table.create(&options));
    }

    let mut run = Run {
        server: &mut server,
        tables: files.iter().flat_map(|file| &file.tables).collect(),
        streams,
        read: BTreeSet::new(),
        rng,
    };
    let views: Vec<&View> = files.iter().flat_map(|file| &file.views).collect();
    let phases = phases(&views, &mut run.rng);
    run.create(&views, &phases, 0);
    run.feed(true);
    run.create(&views, &phases, 1);
    if restart {
        run.restart();
    }
    run.feed(false);
    run.create(&views, &phases, 2);
    run.caught_up();

    let mut findings = String::new();
    for view in &views {
        check(run.server, view, &mode, &mut findings);
    }
    finish(&findings);
}

/// When each view is created: before the data (0), midway (1) or after it (2); never before what it
/// reads. Lateness is a matter of the watermark at the time, so such views are there from the start.
fn phases<'a>(views: &[&'a View], rng: &mut Rng) -> BTreeMap<&'a str, usize> {
    let mut phases: BTreeMap<&str, usize> = BTreeMap::new();
    for view in views {
        let earliest = words(&view.query)
            .filter_map(|word| phases.get(word))
            .max()
            .copied()
            .unwrap_or(0);
        let chosen = if view.late.is_some() { 0 } else { rng.below(3) };
        phases.insert(&view.name, chosen.max(earliest));
    }
    phases
}

/// Names and other words of a query.
fn words(query: &str) -> impl Iterator<Item = &str> {
    query.split(|c: char| !c.is_alphanumeric() && c != '_')
}

struct Run<'a> {
    server: &'a mut Server,
    tables: Vec<&'a Table>,
    streams: Vec<Stream<'a>>,
    /// Tables that some view reads: nobody else makes a source run.
    read: BTreeSet<&'a str>,
    rng: Rng,
}

impl Run<'_> {
    fn create(&mut self, views: &[&View], phases: &BTreeMap<&str, usize>, phase: usize) {
        for view in views
            .iter()
            .filter(|view| phases[view.name.as_str()] == phase)
        {
            for word in words(&view.query) {
                self.read.extend(
                    self.tables
                        .iter()
                        .map(|t| t.name.as_str())
                        .find(|name| *name == word),
                );
            }
            let emit = if view.close {
                "EMIT ON WINDOW CLOSE"
            } else {
                ""
            };
            self.server.run(&format!(
                "CREATE MATERIALIZED VIEW {} AS {} {emit}",
                view.name, view.query
            ));
        }
    }

    /// Sends slices of random tables until all, or about half, of the rows are on their way.
    fn feed(&mut self, half: bool) {
        let total: usize = self.streams.iter().map(Stream::left).sum();
        let stop_at = if half { total / 2 } else { 0 };
        let longest = self
            .streams
            .iter()
            .map(|s| s.table.rows.len())
            .max()
            .unwrap_or(1);
        loop {
            let open: Vec<usize> = (0..self.streams.len())
                .filter(|i| self.streams[*i].left() > 0)
                .collect();
            let left: usize = self.streams.iter().map(Stream::left).sum();
            if open.is_empty() || left <= stop_at {
                return;
            }
            let stream = open[self.rng.below(open.len())];
            let count = 1 + self.rng.below(longest);
            if self.streams[stream].send(count, false, &mut self.rng) == Sent::LateNext {
                self.caught_up();
                self.streams[stream].send(1, true, &mut self.rng);
            }
            // Sometimes a slice gets ticks of its own, sometimes several share one.
            if self.rng.below(8) == 0 {
                self.caught_up();
            }
        }
    }

    fn restart(&mut self) {
        if self.rng.coin() {
            self.server.kill();
            self.server.start_again(&[]);
        } else {
            self.server.kill_child();
        }
    }

    fn caught_up(&self) {
        let read = |name: &str| self.read.contains(name);
        let bounded = self.tables.iter().filter(|t| t.changelog && read(&t.name));
        let mut fed: Vec<Fed<'_>> = bounded.map(|t| Fed::Ended(&t.name)).collect();
        let streams = self.streams.iter().filter(|s| read(&s.table.name));
        fed.extend(streams.map(|s| Fed::Records(&s.table.name, s.sent())));
        self.server.caught_up(&fed, LIMIT);
    }
}

fn check(server: &Server, view: &View, mode: &str, findings: &mut String) {
    let name = &view.name;
    let answer = server.sql(&format!("SELECT * FROM {name}"));
    if !answer["error"].is_null() {
        note(findings, view, mode, &format!("answered {answer}"));
        return;
    }
    compare(view, &rows_of(&answer), mode, findings);
    let noticed = answer["results"][0]["notices"]
        .as_array()
        .is_some_and(|n| !n.is_empty());
    if noticed != view.errors.as_ref().is_some_and(|(count, _)| *count > 0) {
        note(
            findings,
            view,
            mode,
            &format!("notices: {}", answer["results"][0]["notices"]),
        );
    }
    for (relation, wanted) in [
        (
            "errors",
            view.errors.as_ref().map_or(0, |(count, _)| *count),
        ),
        ("late", view.late.unwrap_or(0)),
    ] {
        let rows = server.sql(&format!("SELECT * FROM {name}${relation}"));
        let count = rows_of(&rows).len() as u64;
        // Only some views can have late rows; where none are expected the relation may be absent.
        let absent = wanted == 0 && !rows["error"].is_null();
        if count != wanted && !absent || (wanted > 0 && !rows["error"].is_null()) {
            note(
                findings,
                view,
                mode,
                &format!("wanted {wanted} rows in {name}${relation}: {rows}"),
            );
        }
    }
}

fn rows_of(answer: &Value) -> Vec<String> {
    let rows = answer["results"][0]["rows"].as_array();
    let mut rows: Vec<String> = rows.into_iter().flatten().map(canonical).collect();
    rows.sort();
    rows
}

fn compare(view: &View, found: &[String], mode: &str, findings: &mut String) {
    if view.expected == found {
        return;
    }
    let mut text = String::new();
    for row in difference(&view.expected, found) {
        let _ = writeln!(text, "  missing    {row}");
    }
    for row in difference(found, &view.expected) {
        let _ = writeln!(text, "  unexpected {row}");
    }
    note(findings, view, mode, &format!("gives other rows:\n{text}"));
}

/// Rows of `left` that `right` lacks, with multiplicity.
fn difference<'a>(left: &'a [String], right: &[String]) -> Vec<&'a String> {
    let mut count: BTreeMap<&String, i64> = BTreeMap::new();
    for row in right {
        *count.entry(row).or_default() += 1;
    }
    left.iter()
        .filter(|row| {
            let left = count.entry(row).or_default();
            *left -= 1;
            *left < 0
        })
        .collect()
}

fn note(findings: &mut String, view: &View, mode: &str, text: &str) {
    let _ = writeln!(
        findings,
        "{mode}: view {}\n{}\n{text}\n",
        view.name, view.query
    );
}

fn finish(findings: &str) {
    assert!(findings.is_empty(), "\n{findings}");
}
