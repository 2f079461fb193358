//! Incremental equals batch, and equals what an engine says that shares no code with ours.
//!
//! A case is made from a seed: tables with awkward values, some forty random queries, and a schedule of
//! changes, kills, restarts and other numbers of workers. All queries are views of one server, made
//! before, between and after the changes. After each step each view is compared with the one-shot query of
//! the same text, and with DuckDB.
//!
//! * `MILLRACE_CASE` or `MILLRACE_SEED` chooses the cases; `MILLRACE_ORACLE_PAIRS` says how many pairs of query and schedule.

#[path = "properties/answer.rs"]
mod answer;
#[path = "properties/case.rs"]
mod case;
#[path = "properties/data.rs"]
mod data;
#[path = "properties/duck.rs"]
mod duck;
#[path = "properties/expression.rs"]
mod expression;
#[path = "properties/generate.rs"]
mod generate;
#[path = "properties/known.rs"]
mod known;
#[path = "properties/run.rs"]
mod run;
#[path = "properties/shrink.rs"]
mod shrink;
#[path = "properties/tree.rs"]
mod tree;
#[path = "properties/watch.rs"]
mod watch;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use millrace_tests::kafka::broker;
use millrace_tests::lake::python;
use millrace_tests::rng::Rng;

use case::Case;
use run::{Finding, Outcome};
use shrink::Shrinker;
use tree::Dialect;

/// Queries of a case: they live side by side on one server.
const QUERIES: usize = 40;
const PAIRS: usize = 800;
/// The first case unless `MILLRACE_CASE` or `MILLRACE_SEED` says otherwise.
const FIRST: u64 = 765_133_858;
/// Cases that run side by side.
const THREADS: usize = 2;

/// Findings that are made small, each within so many seconds.
const SHRUNK: usize = 12;
const SHRINK_S: usize = 60;

fn number(name: &str, otherwise: usize) -> usize {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(otherwise)
}

#[derive(Debug, Default)]
struct Report {
    pairs: usize,
    refused: usize,
    failing: usize,
    watched: usize,
    drained: usize,
    batch_compared: usize,
    batch_refused: usize,
    duck_compared: usize,
    duck_refused: usize,
    operators: BTreeMap<&'static str, usize>,
    findings: Vec<(Case, Finding)>,
}

impl Report {
    fn add(&mut self, case: &Case, outcome: Outcome) {
        for (at, (query, _)) in case.queries.iter().enumerate() {
            if outcome.refused.iter().all(|(refused, _)| *refused != at) {
                self.pairs += 1;
                query.tree.count(&mut self.operators);
            }
        }
        self.refused += outcome.refused.len();
        self.failing += outcome.failing;
        self.watched += outcome.watched;
        self.drained += outcome.drained;
        self.batch_compared += outcome.batch_compared;
        self.batch_refused += outcome.batch_refused;
        self.duck_compared += outcome.duck_compared;
        self.duck_refused += outcome.duck_refused.len();
        let verbose = std::env::var("MILLRACE_ORACLE_VERBOSE").is_ok();
        if verbose {
            for (at, error) in &outcome.refused {
                println!("REFUSED {error}\n  {}", case.queries[*at].0.create());
            }
            for (at, error) in &outcome.duck_refused {
                println!(
                    "DUCK {error}\n  {}",
                    case.queries[*at].0.tree.sql(Dialect::Duck)
                );
            }
        }
        let mut seen = Vec::new();
        for finding in outcome.findings {
            if seen.contains(&finding.query) {
                continue;
            }
            seen.push(finding.query);
            let text = format!(
                "seed {} step {}: {}\n  {}\n{}",
                case.seed,
                finding.step,
                finding.kind,
                case.queries[finding.query].0.create(),
                finding.text
            );
            println!("FOUND {text}");
            self.findings.push((case.clone(), finding));
        }
    }

    fn print(&self) {
        println!(
            "{} pairs; {} refused; {} with failing rows; compared {} times with one-shot queries (of which {} failed), \
             {} times with DuckDB (which refused {}), {} times with subscribers; {} states drained",
            self.pairs,
            self.refused,
            self.failing,
            self.batch_compared,
            self.batch_refused,
            self.duck_compared,
            self.duck_refused,
            self.watched,
            self.drained
        );
        let mut operators: Vec<(usize, &str)> =
            self.operators.iter().map(|(name, n)| (*n, *name)).collect();
        operators.sort_unstable();
        for (count, name) in operators.iter().rev() {
            println!("{count:8} {name}");
        }
    }
}

#[test]
fn incremental_equals_batch_and_another_engine() {
    let Some(broker) = broker() else { return };
    let python = python();
    let pairs = number("MILLRACE_ORACLE_PAIRS", PAIRS);
    let queries = number("MILLRACE_ORACLE_QUERIES", QUERIES);
    let threads = number("MILLRACE_ORACLE_THREADS", THREADS);
    // The same cases in each run of the tests: what a new seed finds is to be mended, not to stop others.
    let first = match (
        std::env::var("MILLRACE_CASE"),
        std::env::var("MILLRACE_SEED"),
    ) {
        (Ok(case), _) => case.parse().expect("a number"),
        (_, Ok(_)) => Rng::from_env("properties").next_u64() % 1_000_000_000,
        _ => FIRST,
    };
    println!("properties: MILLRACE_CASE={first}");
    let cases = pairs.div_ceil(queries);
    let next = AtomicUsize::new(0);
    let report = Mutex::new(Report::default());
    std::thread::scope(|scope| {
        for _ in 0..threads.min(cases) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    if at >= cases {
                        return;
                    }
                    let case = Case::random(first + at as u64, queries);
                    let outcome = run::run(&case, &broker, python.as_deref().map(Path::new));
                    report.lock().expect("no panic").add(&case, outcome);
                }
            });
        }
    });
    let report = report.into_inner().expect("no panic");
    report.print();
    let limit = number("MILLRACE_ORACLE_SHRINK_S", SHRINK_S);
    for (case, finding) in report.findings.iter().take(SHRUNK) {
        let limit = Duration::from_secs(limit as u64);
        let shrinker = Shrinker::new(&broker, python.as_deref(), limit);
        match shrinker.shrink(case, finding) {
            Some(small) => {
                let (path, text) = shrinker.write(&small, finding);
                println!("SMALL {}\n{}\n{text}", path.display(), finding.kind);
                println!("{}", shrinker.again(&small, finding));
            }
            None => println!("seed {} did not fail again", case.seed),
        }
    }
    assert!(
        report.refused * 5 <= report.pairs,
        "{} of {} queries are refused as views",
        report.refused,
        report.pairs
    );
    assert!(
        report.batch_refused * 20 <= report.batch_compared,
        "{} one-shot queries fail",
        report.batch_refused
    );
    assert!(
        report.findings.is_empty(),
        "{} findings",
        report.findings.len()
    );
}
