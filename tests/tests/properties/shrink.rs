//! Makes a failing case small: one query, a plain schedule, few rows. What is left is an `.slt` file.
//!
//! Many candidates run at once, as views (and tables) side by side on one server.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::case::{Case, Event, LAST_EVENT, Step};
use super::data::{Change, Feed, Row, Type};
use super::generate::Query;
use super::run::{Finding, Outcome, run};
use super::tree::{Dialect, Tree};
use super::{answer::Answer, duck};

/// Queries, and sets of rows, that are tried at once.
const QUERIES: usize = 30;
const SUBSETS: usize = 8;
/// Runs of what is left.
const AGAIN: usize = 3;
/// Changes that are printed of a case that needs several steps.
const SHOWN: usize = 40;

/// The smallest case found within the limit; none if the fault did not show again.
pub(crate) struct Shrinker<'a> {
    pub(crate) broker: &'a str,
    pub(crate) python: Option<&'a Path>,
    pub(crate) limit: Duration,
    started: Instant,
}

impl<'a> Shrinker<'a> {
    pub(crate) fn new(broker: &'a str, python: Option<&'a Path>, limit: Duration) -> Self {
        Self {
            broker,
            python,
            limit,
            started: Instant::now(),
        }
    }

    pub(crate) fn shrink(&self, case: &Case, finding: &Finding) -> Option<Case> {
        let mut small = case.clone();
        small.queries = vec![case.queries[finding.query].clone()];
        small.keep_tables(&small.queries[0].0.tree.tables());
        // The plainest schedule that shows it.
        let schedules = [small.plain(), small.calm(1), small.calm(4), small];
        small = schedules
            .into_iter()
            .find(|case| self.fails(case, finding))?;
        loop {
            let before = (small.queries[0].0.tree.size(), small.rows());
            self.cut_query(&mut small, finding);
            self.cut_rows(&mut small, finding);
            if self.late() || before == (small.queries[0].0.tree.size(), small.rows()) {
                return Some(small);
            }
        }
    }

    fn late(&self) -> bool {
        self.started.elapsed() > self.limit
    }

    fn fails(&self, case: &Case, finding: &Finding) -> bool {
        !self.failing(case, finding).is_empty()
    }

    /// Queries of the case that show the fault.
    fn failing(&self, case: &Case, finding: &Finding) -> Vec<usize> {
        let outcome: Outcome = run(case, self.broker, self.python);
        let same = |other: &&Finding| other.kind == finding.kind && other.code == finding.code;
        let mut found: Vec<usize> = outcome
            .findings
            .iter()
            .filter(same)
            .map(|f| f.query)
            .collect();
        found.dedup();
        found.sort_unstable();
        found
    }

    fn cut_query(&self, case: &mut Case, finding: &Finding) {
        let mut tried: Vec<Tree> = Vec::new();
        while !self.late() {
            let (query, when) = case.queries[0].clone();
            let cuts: Vec<Tree> = query
                .tree
                .cuts()
                .into_iter()
                .filter(|tree| !tried.contains(tree))
                .take(QUERIES)
                .collect();
            if cuts.is_empty() {
                return;
            }
            let mut candidates = case.clone();
            candidates.queries = cuts
                .iter()
                .enumerate()
                .map(|(i, tree)| {
                    let query = Query {
                        name: format!("q{i}"),
                        tree: tree.clone(),
                        ..query.clone()
                    };
                    (query, when)
                })
                .collect();
            let failing = self.failing(&candidates, finding);
            match failing.iter().min_by_key(|i| cuts[**i].size()) {
                Some(best) => case.queries[0].0.tree = cuts[*best].clone(),
                None => tried.extend(cuts),
            }
        }
    }

    /// Leaves out rows, half of them first, then fewer.
    fn cut_rows(&self, case: &mut Case, finding: &Finding) {
        let mut part = case.rows().div_ceil(2);
        while part > 0 && !self.late() {
            let ids = case.ids();
            let subsets: Vec<Case> = ids
                .chunks(part)
                .map(|without| case.without(without))
                .collect();
            let mut smaller = None;
            for group in subsets.chunks(SUBSETS) {
                let together = Case::side_by_side(group);
                if let Some(first) = self.failing(&together, finding).first() {
                    smaller = Some(group[*first].clone());
                    break;
                }
                if self.late() {
                    return;
                }
            }
            match smaller {
                Some(smaller) => *case = smaller,
                None if part == 1 => return,
                None => part = part.div_ceil(2),
            }
            part = part.min(case.rows().max(1));
        }
    }

    /// Writes the case as a file of the corpus, with the answer of the other engine, else of a one-shot
    /// query, as the right one. Gives its text.
    pub(crate) fn write(&self, case: &Case, finding: &Finding) -> (PathBuf, String) {
        let text = self.text(case, finding);
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions");
        let path = folder.join(format!("seed_{}_{}.slt", case.seed, finding.query));
        let _ = std::fs::create_dir_all(&folder);
        let _ = std::fs::write(&path, &text);
        (path, text)
    }

    /// How often the small case fails, and how.
    pub(crate) fn again(&self, case: &Case, finding: &Finding) -> String {
        let mut failed = Vec::new();
        for _ in 0..AGAIN {
            let outcome = run(case, self.broker, self.python);
            failed.extend(
                outcome
                    .findings
                    .into_iter()
                    .find(|f| f.kind == finding.kind),
            );
        }
        let text = failed.first().map_or("", |finding| finding.text.as_str());
        let events: Vec<Event> = case.steps.iter().map(|step| step.event).collect();
        let mut steps = String::new();
        for (at, step) in case
            .steps
            .iter()
            .enumerate()
            .filter(|_| case.steps.len() > 1)
        {
            for (table, changes) in case.tables.iter().zip(&step.changes) {
                for change in changes {
                    let sign = if change.removes { '-' } else { '+' };
                    let row = table.json(&change.row);
                    steps.push_str(&format!(
                        "step {at} {} {sign} {} {row}\n",
                        table.name, change.id
                    ));
                }
            }
        }
        if let Some((end, _)) = steps.match_indices('\n').nth(SHOWN) {
            steps.truncate(end);
            steps.push_str("\n…\n");
        }
        format!(
            "{steps}fails {} of {AGAIN} times, {} workers, {events:?}:\n{text}",
            failed.len(),
            case.workers
        )
    }

    fn text(&self, case: &Case, finding: &Finding) -> String {
        let prefix = format!("s{}q{}", case.seed, finding.query);
        let last = case.steps.len() - 1;
        let contents = case.contents(last);
        let mut text = format!("# Found by tests/properties: {}.\n", finding.kind);
        for (table, rows) in case.tables.iter().zip(contents) {
            let kind = if table.feed == Feed::Events {
                "watermark c1 INTERVAL '0' SECOND"
            } else {
                "changelog"
            };
            text.push_str(&format!(
                "\ntable {prefix}{} ({}) {kind}\n",
                table.name,
                table.columns()
            ));
            for row in rows {
                text.push_str(&format!("{}\n", table.json(&row)));
            }
        }
        let mut query = case.queries[0].0.clone();
        let opinion: Option<Answer> = self.python.filter(|_| query.duck).and_then(|python| {
            let opinions = duck::ask(python, case);
            opinions[last]
                .first()
                .and_then(|answer| answer.clone().ok())
        });
        query.tree.rename(&|name| format!("{prefix}{name}"));
        let close = if query.close { " close" } else { "" };
        text.push_str(&format!(
            "\nview {prefix}{close}\n{}\n----\n",
            query.tree.sql(Dialect::View)
        ));
        match opinion {
            Some(answer) => {
                let types = query.tree.types();
                for row in answer.rows {
                    let values: Value = row
                        .into_iter()
                        .enumerate()
                        .map(|(i, value)| in_our_words(types.get(i).copied(), value))
                        .collect();
                    text.push_str(&format!("{values}\n"));
                }
            }
            None => text.push_str("# The right answer is not known.\n"),
        }
        text
    }
}

/// A value of the other engine as our API writes it.
fn in_our_words(ty: Option<Type>, value: Value) -> Value {
    const EXACT: std::ops::RangeInclusive<i64> = -(1 << 53)..=1 << 53;
    match (ty, value.as_str()) {
        (Some(Type::Int | Type::Big), Some(text)) => match text.parse::<i64>() {
            Ok(number) if EXACT.contains(&number) => number.into(),
            _ => value,
        },
        (Some(Type::Stamp), Some(text)) => format!("{text}Z").into(),
        _ => value,
    }
}

impl Case {
    /// Only these tables, in their order.
    fn keep_tables(&mut self, names: &[String]) {
        let keep: Vec<bool> = self
            .tables
            .iter()
            .map(|t| names.contains(&t.name))
            .collect();
        let mut flags = keep.iter();
        self.tables.retain(|_| *flags.next().expect("a flag each"));
        for step in &mut self.steps {
            let mut flags = keep.iter();
            step.changes.retain(|_| *flags.next().expect("a flag each"));
        }
    }

    /// Its last rows, inserted at once from files, on one worker.
    fn plain(&self) -> Self {
        let mut case = self.clone();
        case.workers = 1;
        case.drained = false;
        let insert = |rows: Vec<Row>| {
            // The last event keeps its place: it closes windows.
            let count = rows.len();
            let last =
                |i: usize, row: &Row| i + 1 == count && row.contains(&Some(LAST_EVENT.into()));
            let change = |(i, row): (usize, Row)| Change {
                id: if last(i, &row) { u64::MAX } else { i as u64 },
                row,
                removes: false,
            };
            rows.into_iter().enumerate().map(change).collect::<Vec<_>>()
        };
        let last = self.steps.len() - 1;
        case.steps = vec![Step {
            event: Event::Nothing,
            changes: self.contents(last).into_iter().map(insert).collect(),
            pieces: 1,
        }];
        for table in &mut case.tables {
            if table.feed != Feed::Events {
                table.feed = Feed::File;
            }
        }
        case.queries[0].1 = 0;
        case
    }

    /// The same changes without kills or other numbers of workers.
    fn calm(&self, most_pieces: usize) -> Self {
        let mut case = self.clone();
        case.workers = 1;
        case.queries[0].1 = 0;
        for step in &mut case.steps {
            step.event = Event::Nothing;
            step.pieces = step.pieces.min(most_pieces);
        }
        case
    }

    /// Table and id of each row that ever was.
    fn ids(&self) -> Vec<(usize, u64)> {
        let mut ids = Vec::new();
        for step in &self.steps {
            for (table, changes) in step.changes.iter().enumerate() {
                for change in changes.iter().filter(|change| change.id != u64::MAX) {
                    if !ids.contains(&(table, change.id)) {
                        ids.push((table, change.id));
                    }
                }
            }
        }
        ids.sort_unstable();
        ids
    }

    fn rows(&self) -> usize {
        self.ids().len()
    }

    fn without(&self, ids: &[(usize, u64)]) -> Self {
        let mut case = self.clone();
        for step in &mut case.steps {
            for (table, changes) in step.changes.iter_mut().enumerate() {
                changes.retain(|change| !ids.contains(&(table, change.id)));
            }
        }
        case
    }

    /// Cases of one query each as one case: each has tables of its own.
    fn side_by_side(cases: &[Self]) -> Self {
        let mut all = cases[0].clone();
        all.tables.clear();
        all.queries.clear();
        for step in &mut all.steps {
            step.changes.clear();
        }
        for (i, case) in cases.iter().enumerate() {
            for table in &case.tables {
                let mut table = table.clone();
                table.name = format!("{}x{i}", table.name);
                all.tables.push(table);
            }
            for (step, other) in all.steps.iter_mut().zip(&case.steps) {
                step.changes.extend(other.changes.iter().cloned());
            }
            let (mut query, when) = case.queries[0].clone();
            query.name = format!("q{i}");
            query.tree.rename(&|name| format!("{name}x{i}"));
            all.queries.push((query, when));
        }
        all
    }
}
