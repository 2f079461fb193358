//! Runs a case on a real server and collects what differs.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use millrace_tests::Server;
use millrace_tests::kafka::{Topic, Writer};
use millrace_tests::rng::Rng;
use millrace_tests::server::Fed;
use serde_json::Value;

use super::answer::Answer;
use super::case::{Case, Event};
use super::data::{Feed, Table};
use super::duck;
use super::generate::Query;
use super::known;
use super::tree::Dialect;
use super::watch::Watch;

const LIMIT: Duration = Duration::from_secs(240);
const FLAGS: &[&str] = &[
    "--checkpoint-interval",
    "300ms",
    "--commit-interval",
    "300ms",
];
/// Subscribers of a case.
const WATCHES: usize = 3;
/// Statements that travel together.
const SCRIPT: usize = 40;

/// A query whose answers differ, at a step.
#[derive(Debug, Clone)]
pub(crate) struct Finding {
    pub(crate) query: usize,
    pub(crate) step: usize,
    /// Which answers differ, in a few words.
    pub(crate) kind: &'static str,
    /// SQLSTATE, where there is one.
    pub(crate) code: String,
    pub(crate) text: String,
}

#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) findings: Vec<Finding>,
    /// Queries that were refused as views, with the error.
    pub(crate) refused: Vec<(usize, String)>,
    /// Queries of which some row fails (an overflow, a cast).
    pub(crate) failing: usize,
    /// Comparisons with subscribers, and of state with what it was at first.
    pub(crate) watched: usize,
    pub(crate) drained: usize,
    pub(crate) batch_compared: usize,
    /// One-shot queries that fail in a way that is known.
    pub(crate) batch_refused: usize,
    pub(crate) duck_compared: usize,
    /// What the other engine does not take.
    pub(crate) duck_refused: Vec<(usize, String)>,
}

struct Input<'a> {
    table: &'a Table,
    topic: Option<(Topic, Writer)>,
    sent: u64,
}

struct Run<'a> {
    case: &'a Case,
    server: Server,
    inputs: Vec<Input<'a>>,
    rng: Rng,
    /// By query: it is there.
    made: Vec<bool>,
    /// Subscribers, with their queries.
    watches: Vec<(usize, Watch)>,
    /// Rows of state by query, before there was any input.
    baseline: BTreeMap<String, u64>,
    outcome: Outcome,
}

/// Runs all of it. Without `python` there is no second opinion.
pub(crate) fn run(case: &Case, broker: &str, python: Option<&Path>) -> Outcome {
    let workers = case.workers.to_string();
    let mut flags = vec!["--workers", &workers];
    flags.extend_from_slice(FLAGS);
    let mut run = Run {
        case,
        server: Server::start(&flags),
        inputs: vec![],
        rng: Rng::new(case.seed).fork("run"),
        made: vec![false; case.queries.len()],
        watches: vec![],
        baseline: BTreeMap::new(),
        outcome: Outcome::default(),
    };
    run.create_inputs(broker);
    let opinions = python.map(|python| duck::ask(python, case));
    for step in 0..case.steps.len() {
        run.create(step);
        if step == 0 {
            run.baseline = run.state();
            run.watch();
        }
        run.happen(case.steps[step].event);
        run.feed(step);
        run.create_views_after(step);
        run.caught_up();
        run.check(step, opinions.as_ref().map(|steps| steps[step].as_slice()));
    }
    if case.drained {
        run.check_state();
    }
    run.outcome
}

impl<'a> Run<'a> {
    fn create_inputs(&mut self, broker: &str) {
        for (at, table) in self.case.tables.iter().enumerate() {
            let (name, columns, names) = (&table.name, table.columns(), table.names());
            let mut input = Input {
                table,
                topic: None,
                sent: 0,
            };
            let (source, extra, options) = match table.feed {
                Feed::File => {
                    let path = self.server.scratch().join(format!("{name}.json"));
                    let changes = &self.case.steps[0].changes[at];
                    let lines: String = changes
                        .iter()
                        .map(|change| format!("{}\n", table.record(change, 0)))
                        .collect();
                    std::fs::write(&path, lines).expect("a file can be written");
                    let options = format!(
                        "connector = 'files', format = 'json', changelog = 'op', path = '{}'",
                        path.display()
                    );
                    (format!("{name}_in"), "", options)
                }
                feed => {
                    let partitions = if feed == Feed::Events { 1 } else { 2 };
                    let topic = Topic::create(broker, &format!("oracle-{name}"), partitions);
                    let options = format!(
                        "connector = 'kafka', bootstrap_servers = '{broker}', topic = '{}', \
                         format = 'json', start = 'earliest'",
                        topic.name
                    );
                    input.topic = Some((topic, Writer::new(broker)));
                    match feed {
                        Feed::Events => (
                            name.clone(),
                            ", WATERMARK FOR c1 AS c1 - INTERVAL '0' SECOND",
                            options,
                        ),
                        Feed::Versions => (
                            format!("{name}_in"),
                            ", id BIGINT, seq BIGINT, dead BOOLEAN",
                            options,
                        ),
                        _ => (format!("{name}_in"), ", dead BOOLEAN", options),
                    }
                }
            };
            let view = match table.feed {
                Feed::File => format!("{name} AS SELECT {names} FROM {source}"),
                Feed::Versions => format!(
                    "{name} AS SELECT {names} FROM (SELECT *, row_number() OVER (PARTITION BY id \
                     ORDER BY seq DESC) AS rn FROM {source}) AS x WHERE rn <= 1 AND NOT dead"
                ),
                Feed::Signed => format!(
                    "{name} AS SELECT {names} FROM {source} WHERE NOT dead EXCEPT ALL \
                     SELECT {names} FROM {source} WHERE dead"
                ),
                Feed::Events => format!("all_{name} AS SELECT {names} FROM {source}"),
            };
            self.server.run(&format!(
                "CREATE SOURCE {source} ({columns}{extra}) WITH ({options}); \
                 CREATE MATERIALIZED VIEW {view}"
            ));
            self.inputs.push(input);
        }
    }

    /// Views that come after everything.
    fn create_views_after(&mut self, step: usize) {
        if step + 1 == self.case.steps.len() {
            for later in step + 1..=step + 2 {
                self.create(later);
            }
        }
    }

    fn create(&mut self, step: usize) {
        for at in 0..self.case.queries.len() {
            let (query, when) = &self.case.queries[at];
            if *when != step {
                continue;
            }
            let answer = self.server.sql(&query.create());
            match answer["error"]["code"].as_str() {
                None => self.made[at] = true,
                Some(code)
                    if matches!(code, "0A000" | "54000") || known::refusal(&answer["error"]) =>
                {
                    self.outcome.refused.push((at, answer["error"].to_string()));
                }
                Some(_) => self.note(at, step, "creation fails", answer["error"].to_string()),
            }
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Nothing => {}
            // Nothing to wait for: this is the passing of time itself.
            Event::Idle => std::thread::sleep(Duration::from_millis(700)),
            Event::Kill => {
                self.server.kill();
                self.server.start_again(&[]);
            }
            Event::KillService => self.server.kill_child(),
            Event::Restart => {
                let status = self.server.terminate();
                assert!(status.success(), "ended with {status}");
                self.server.start_again(&[]);
            }
            Event::Workers(n) => {
                self.server
                    .run(&format!("ALTER DATA PLANE SET WORKERS {n}"));
            }
        }
    }

    fn feed(&mut self, step: usize) {
        let pieces = self.case.steps[step].pieces;
        for piece in 0..pieces {
            for at in 0..self.inputs.len() {
                let changes = &self.case.steps[step].changes[at];
                let input = &mut self.inputs[at];
                let Some((topic, writer)) = &mut input.topic else {
                    continue;
                };
                let (from, to) = (
                    changes.len() * piece / pieces,
                    changes.len() * (piece + 1) / pieces,
                );
                for change in &changes[from..to] {
                    input.sent += 1;
                    let partition = self.rng.below(topic.partitions as usize) as i32;
                    let record = input.table.record(change, input.sent).to_string();
                    writer.send(topic, partition, record.as_bytes());
                }
                writer.flush();
            }
            // Sometimes a piece gets ticks of its own.
            if self.rng.below(3) == 0 {
                self.caught_up();
            }
        }
    }

    fn caught_up(&self) {
        let names: Vec<String> = self
            .inputs
            .iter()
            .map(|input| match input.table.feed {
                Feed::Events => input.table.name.clone(),
                _ => format!("{}_in", input.table.name),
            })
            .collect();
        let fed: Vec<Fed<'_>> = self
            .inputs
            .iter()
            .zip(&names)
            .map(|(input, name)| match input.table.feed {
                Feed::File => Fed::Ended(name),
                _ => Fed::Records(name, input.sent),
            })
            .collect();
        self.server.caught_up(&fed, LIMIT);
        for source in self.server.list("sources") {
            assert_eq!(source["rejected_rows"], 0, "{source}");
        }
    }

    fn check(&mut self, step: usize, opinions: Option<&[Result<Answer, String>]>) {
        let made: Vec<usize> = (0..self.made.len()).filter(|at| self.made[*at]).collect();
        let case = self.case;
        let query = |at: usize| &case.queries[at].0;
        let reads: Vec<String> = made
            .iter()
            .map(|at| format!("SELECT * FROM {}", query(*at).name))
            .collect();
        let views = self.ask(&reads);
        let batches: Vec<String> = made
            .iter()
            .map(|at| query(*at).tree.sql(Dialect::Batch))
            .collect();
        let batches = self.ask(&batches);
        for ((at, view), batch) in made.iter().zip(views).zip(batches) {
            let opinion = opinions.map(|opinions| &opinions[*at]);
            if let Ok(view) = &view {
                self.check_watch(*at, step, &Answer::of(view));
            }
            self.judge(*at, step, view, batch, opinion);
        }
    }

    /// Some of the views that are there from the start get a subscriber.
    fn watch(&mut self) {
        let made = (0..self.made.len()).filter(|at| self.made[*at]);
        for at in made.take(WATCHES) {
            let name = &self.case.queries[at].0.name;
            let watch = Watch::start(&self.server.address, name);
            self.watches.push((at, watch));
        }
    }

    fn check_watch(&mut self, at: usize, step: usize, view: &Answer) {
        let Some((_, watch)) = self.watches.iter_mut().find(|(other, _)| *other == at) else {
            return;
        };
        if watch.ended() {
            let name = &self.case.queries[at].0.name;
            *watch = Watch::start(&self.server.address, name);
        }
        self.outcome.watched += 1;
        if let Some(text) = watch.difference(view) {
            self.note(at, step, "view and subscription differ", text);
        }
    }

    /// Rows of state by relation.
    fn state(&self) -> BTreeMap<String, u64> {
        let mut rows = BTreeMap::new();
        for row in self
            .server
            .rows("SELECT relation, rows FROM millrace.state")
        {
            let name = row[0].as_str().unwrap_or_default().to_string();
            *rows.entry(name).or_default() += row[1].as_u64().unwrap_or_default();
        }
        rows
    }

    /// Nothing is left of rows that are gone. Views of what cannot lose rows are left out, and those
    /// that keep one for an empty input.
    fn check_state(&mut self) {
        let state = self.state();
        for (at, (query, when)) in self.case.queries.iter().enumerate() {
            let tables = query.tree.tables();
            let mut operators = BTreeMap::new();
            query.tree.count(&mut operators);
            let constant = [
                "global aggregate",
                "scalar subquery",
                "values",
                "correlated subquery",
            ];
            if *when > 0
                || !self.made[at]
                || tables.iter().any(|name| name != "t0" && name != "t1")
                || constant.iter().any(|name| operators.contains_key(name))
            {
                continue;
            }
            self.outcome.drained += 1;
            let rows = |of: &BTreeMap<String, u64>| of.get(&query.name).copied().unwrap_or(0);
            let (before, now) = (rows(&self.baseline), rows(&state));
            if now > before {
                let text =
                    format!("    {before} rows of state before any input, {now} at the end\n");
                let step = self.case.steps.len() - 1;
                self.outcome.findings.push(Finding {
                    query: at,
                    step,
                    kind: "state is left of rows that are gone",
                    code: String::new(),
                    text,
                });
            }
        }
    }

    /// Runs statements; each one's result, or its error.
    fn ask(&self, statements: &[String]) -> Vec<Result<Value, Value>> {
        let mut answers = Vec::new();
        while answers.len() < statements.len() {
            let rest = &statements[answers.len()..];
            let script = rest[..rest.len().min(SCRIPT)].join(";\n");
            let answer = self.server.sql(&script);
            let results = answer["results"].as_array().cloned().unwrap_or_default();
            answers.extend(results.into_iter().map(Ok));
            if !answer["error"].is_null() {
                answers.push(Err(answer["error"].clone()));
            }
        }
        answers
    }

    fn judge(
        &mut self,
        at: usize,
        step: usize,
        view: Result<Value, Value>,
        batch: Result<Value, Value>,
        opinion: Option<&Result<Answer, String>>,
    ) {
        let query: &Query = &self.case.queries[at].0;
        let view = match view {
            Ok(view) => view,
            Err(error) => return self.note(at, step, "a view cannot be read", error.to_string()),
        };
        let has_errors = view["notices"].as_array().is_some_and(|n| !n.is_empty());
        let answer = Answer::of(&view);
        // Until the last event came, a view that waits for windows to close has some of the rows.
        let part = query.close && step + 1 < self.case.steps.len();
        if let Err(error) = &batch {
            let code = error["code"].as_str().unwrap_or_default();
            if known::refusal(error) {
                self.outcome.batch_refused += 1;
            } else if code == "XX000" || !(code.starts_with("22") || code.starts_with("21")) {
                return self.note(at, step, "a one-shot query fails", error.to_string());
            }
        }
        if has_errors {
            self.outcome.failing += 1;
            if batch.is_ok() && query.batch {
                let text = view["notices"].to_string();
                self.note(at, step, "a view has errors, a one-shot query none", text);
            }
            return;
        }
        if let (Ok(batch), true) = (&batch, query.batch) {
            self.outcome.batch_compared += 1;
            if let Some(text) = answer.difference(&Answer::of(batch), part) {
                self.note(at, step, "view and one-shot query differ", text);
            }
        }
        match opinion {
            Some(Ok(opinion)) if query.duck => {
                self.outcome.duck_compared += 1;
                if let Some(text) = answer.difference(opinion, part) {
                    self.note(at, step, "view and DuckDB differ", text);
                }
            }
            Some(Err(error)) if query.duck => {
                self.outcome.duck_refused.push((at, error.clone()));
            }
            _ => {}
        }
    }

    fn note(&mut self, query: usize, step: usize, kind: &'static str, text: String) {
        let error: Value = serde_json::from_str(&text).unwrap_or_default();
        let code = error["code"].as_str().unwrap_or_default().to_string();
        self.outcome.findings.push(Finding {
            query,
            step,
            kind,
            code,
            text,
        });
    }
}
