//! Windows of event time over the source of events.

use super::{Generator, Relation};
use crate::data::{Table, Type};
use crate::expression::{Column, columns};
use crate::tree::{Piece, Tree, pieces};

/// After all events but the last one, which closes every window.
pub(crate) const END: &str = "2024-02-29 14:00:00";

/// One way to make windows: ours, and the same in plain SQL around a table.
struct Windows {
    name: &'static str,
    ours: (String, String),
    duck: (String, String),
}

fn seconds(n: usize) -> String {
    format!("INTERVAL '{n}' SECOND")
}

impl Windows {
    fn tumble(size: usize) -> Self {
        Self {
            name: "tumble",
            ours: ("TUMBLE(".into(), format!(", c1, {})", seconds(size))),
            duck: (
                format!(
                    "(SELECT *, window_start + {} AS window_end FROM (SELECT *, \
                     time_bucket({}, c1, TIMESTAMP '1970-01-01') AS window_start FROM ",
                    seconds(size),
                    seconds(size)
                ),
                "))".into(),
            ),
        }
    }

    fn hop(slide: usize, count: usize) -> Self {
        let size = slide * count;
        Self {
            name: "hop",
            ours: (
                "HOP(".into(),
                format!(", c1, {}, {})", seconds(slide), seconds(size)),
            ),
            duck: (
                format!(
                    "(SELECT * EXCLUDE (i), window_start + {} AS window_end FROM (SELECT e.*, i, \
                     time_bucket({}, c1, TIMESTAMP '1970-01-01') - i * {} AS window_start FROM ",
                    seconds(size),
                    seconds(slide),
                    seconds(slide)
                ),
                format!(" AS e CROSS JOIN (SELECT unnest(range({count})) AS i)))"),
            ),
        }
    }

    fn cumulate(step: usize, count: usize) -> Self {
        let size = step * count;
        Self {
            name: "cumulate",
            ours: (
                "CUMULATE(".into(),
                format!(", c1, {}, {})", seconds(step), seconds(size)),
            ),
            duck: (
                format!(
                    "(SELECT * EXCLUDE (i) FROM (SELECT *, window_start + i * {} AS window_end FROM \
                     (SELECT e.*, i, time_bucket({}, c1, TIMESTAMP '1970-01-01') AS window_start FROM ",
                    seconds(step),
                    seconds(size)
                ),
                format!(
                    " AS e CROSS JOIN (SELECT unnest(range(1, {})) AS i))) WHERE window_end > c1)",
                    count + 1
                ),
            ),
        }
    }

    fn session(gap: usize) -> Self {
        let gap = seconds(gap);
        Self {
            name: "session",
            ours: ("SESSION(".into(), format!(", c1, {gap}, c0)")),
            duck: (
                format!(
                    "(SELECT * EXCLUDE (n, g), min(c1) OVER (PARTITION BY c0, g) AS window_start, \
                     max(c1) OVER (PARTITION BY c0, g) + {gap} AS window_end FROM (SELECT *, \
                     sum(n) OVER (PARTITION BY c0 ORDER BY c1) AS g FROM (SELECT *, CASE WHEN c1 - \
                     lag(c1) OVER (PARTITION BY c0 ORDER BY c1) < {gap} THEN 0 ELSE 1 END AS n FROM "
                ),
                ")))".into(),
            ),
        }
    }
}

impl Generator<'_> {
    fn windows(&mut self) -> Windows {
        match self.rng.below(4) {
            0 => Windows::tumble([10, 30, 60][self.rng.below(3)]),
            1 => Windows::hop(10, 1 + self.rng.below(4)),
            2 => Windows::cumulate(10, 2 + self.rng.below(3)),
            _ => Windows::session([5, 15, 40][self.rng.below(3)]),
        }
    }

    /// A query over windows of events: grouped, ranked within, or row by row.
    pub(super) fn windowed(&mut self) -> Relation {
        let events: Vec<&Table> = self
            .tables
            .iter()
            .filter(|table| table.name.starts_with('e'))
            .collect();
        let Some(table) = events.first().copied() else {
            return self.table();
        };
        let windows = self.windows();
        let alias = self.alias();
        let scope = columns(&alias, &table.types);
        let from: Vec<Piece> = vec![
            Piece::Either(windows.ours.0, windows.duck.0),
            Piece::Table(table.name.clone()),
            Piece::Either(windows.ours.1, windows.duck.1),
            format!(" AS {alias}").into(),
        ];
        let bounds = |items: &mut Vec<Tree>, types: &mut Vec<Type>| {
            for name in ["window_start", "window_end"] {
                items.push(Tree::frame(pieces![format!(
                    "{alias}.{name} AS c{}",
                    types.len()
                )]));
                types.push(Type::Stamp);
            }
        };
        let (mut types, mut items) = (Vec::new(), Vec::new());
        bounds(&mut items, &mut types);
        let kind = self.rng.below(4);
        let (tail, operators): (Vec<Piece>, Vec<&'static str>) = if kind < 3 {
            let mut by = "1, 2".to_string();
            if self.rng.coin() || windows.name == "session" {
                // Sessions are of a key.
                by.push_str(", 3");
                types.push(Type::Int);
                items.push(Tree::frame(pieces![format!("{alias}.c0 AS c2")]));
            }
            for _ in 0..1 + self.rng.below(3) {
                let (ty, call) = self.aggregate(&scope, true);
                let at = types.len();
                types.push(ty);
                items.push(Tree::part(pieces![call, format!(" AS c{at}")]));
            }
            self.close = self.rng.coin();
            let filter = if self.close {
                pieces![format!(" WHERE {alias}.c1 < TIMESTAMP '{END}'")]
            } else {
                vec![self.filter(&scope).into()]
            };
            let mut tail = filter;
            tail.push(format!(" GROUP BY {by}").into());
            let name = if self.close {
                "window close"
            } else {
                "window aggregate"
            };
            (tail, vec![name])
        } else {
            let some: Vec<Column> = self.some(&scope, 3);
            for column in &some {
                items.push(Tree::part(pieces![format!(
                    "{} AS c{}",
                    column.name,
                    types.len()
                )]));
                types.push(column.ty);
            }
            if self.rng.coin() {
                let order = self.order(&[], &scope);
                items.push(Tree::part(pieces![format!(
                    "row_number() OVER (PARTITION BY {alias}.window_start, {alias}.window_end \
                     ORDER BY {order}) AS c{}",
                    types.len()
                )]));
                types.push(Type::Int);
            }
            (vec![self.filter(&scope).into()], vec![])
        };
        let mut pieces = vec![
            "SELECT ".into(),
            Piece::List(items, ", "),
            " FROM ".into(),
            Tree::frame(from).into(),
        ];
        pieces.extend(tail);
        let mut tree = Tree::relation(types, windows.name, pieces);
        tree.operators.extend(operators);
        Relation { tree, rows: 100 }
    }
}
