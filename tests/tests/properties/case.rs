//! One case: tables, queries and a schedule, all made from a seed, all plain data that can be cut.

use millrace_tests::rng::Rng;

use super::data::{Change, Contents, Feed, Row, Table, Type};
use super::generate::{Generator, Query};

/// What happens to the server between two steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    Nothing,
    /// A checkpoint may pass meanwhile.
    Idle,
    /// SIGKILL to all of it.
    Kill,
    /// SIGKILL to the service; its parent starts it again.
    KillService,
    /// SIGTERM, and a start.
    Restart,
    Workers(usize),
}

#[derive(Debug, Clone)]
pub(crate) struct Step {
    pub(crate) event: Event,
    /// Changes by table.
    pub(crate) changes: Vec<Vec<Change>>,
    /// The changes of this step come in so many pieces.
    pub(crate) pieces: usize,
}

#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) seed: u64,
    pub(crate) workers: usize,
    pub(crate) tables: Vec<Table>,
    /// With the step before which each is created.
    pub(crate) queries: Vec<(Query, usize)>,
    pub(crate) steps: Vec<Step>,
    /// The last step removes every row of the tables that can lose rows.
    pub(crate) drained: bool,
}

const STEPS: usize = 3;

impl Case {
    pub(crate) fn random(seed: u64, queries: usize) -> Self {
        let mut rng = Rng::new(seed).fork("case");
        let feeds = [
            ("t0", Feed::Versions),
            ("t1", Feed::Signed),
            ("t2", Feed::File),
            ("e0", Feed::Events),
        ];
        let tables: Vec<Table> = feeds
            .iter()
            .map(|(name, feed)| Table::random(name, *feed, &mut rng))
            .collect();
        let drained = rng.below(3) == 0;
        let mut generator = Generator::new(&tables, rng.fork("queries"));
        let queries = (0..queries)
            .map(|i| {
                let query = generator.query(format!("q{i}"));
                // Lateness is a matter of the watermark at the time: such views are there first.
                let step = if query.close { 0 } else { rng.below(STEPS + 1) };
                (query, step)
            })
            .collect();
        let mut case = Self {
            seed,
            workers: [1, 1, 2, 4][rng.below(4)],
            tables,
            queries,
            steps: vec![],
            drained,
        };
        case.schedule(&mut rng);
        case
    }

    fn schedule(&mut self, rng: &mut Rng) {
        let mut contents: Vec<Contents> = self.tables.iter().map(|_| Contents::new()).collect();
        for step in 0..STEPS {
            let changes = self
                .tables
                .iter()
                .zip(&mut contents)
                .map(|(table, contents)| {
                    let count = match (table.feed, step) {
                        (Feed::File, 0) => 60,
                        (Feed::File, _) => 0,
                        (_, 0) => 5 + rng.below(30),
                        _ => rng.below(30),
                    };
                    let mut changes = contents.change(table, count, rng);
                    if table.feed == Feed::Events && step + 1 == STEPS {
                        changes.push(last_event(table));
                    }
                    changes
                })
                .collect();
            let event = match rng.below(8) {
                _ if step == 0 => Event::Nothing,
                0 | 1 => Event::Nothing,
                2 => Event::Idle,
                3 => Event::Kill,
                4 => Event::KillService,
                5 => Event::Restart,
                _ => Event::Workers([1, 2, 4][rng.below(3)]),
            };
            let pieces = 1 + rng.below(4);
            self.steps.push(Step {
                event,
                changes,
                pieces,
            });
        }
        if self.drained {
            let changes = self
                .tables
                .iter()
                .zip(&mut contents)
                .map(|(table, contents)| {
                    let mut changes = Vec::new();
                    while matches!(table.feed, Feed::Versions | Feed::Signed)
                        && !contents.rows.is_empty()
                    {
                        changes.push(contents.remove(rng.below(contents.rows.len())));
                    }
                    changes
                })
                .collect();
            self.steps.push(Step {
                event: Event::Nothing,
                changes,
                pieces: 2,
            });
        }
    }

    /// Rows of each table after a step.
    pub(crate) fn contents(&self, step: usize) -> Vec<Vec<Row>> {
        (0..self.tables.len())
            .map(|table| {
                let mut rows: Vec<(u64, Row)> = Vec::new();
                for change in self.steps[..=step].iter().flat_map(|s| &s.changes[table]) {
                    let at = rows.iter().position(|(id, _)| *id == change.id);
                    match (at, change.removes) {
                        (Some(at), true) => drop(rows.remove(at)),
                        (Some(at), false) => rows[at].1.clone_from(&change.row),
                        (None, false) => rows.push((change.id, change.row.clone())),
                        (None, true) => {}
                    }
                }
                rows.into_iter().map(|(_, row)| row).collect()
            })
            .collect()
    }
}

/// When the last event is.
pub(crate) const LAST_EVENT: &str = "2024-03-05T00:00:00";

/// An event after all others, whose time closes every window.
fn last_event(table: &Table) -> Change {
    let mut row: Row = table.types.iter().map(|_| None).collect();
    debug_assert_eq!(table.types[1], Type::Stamp);
    row[1] = Some(LAST_EVENT.into());
    Change {
        id: u64::MAX,
        row,
        removes: false,
    }
}
