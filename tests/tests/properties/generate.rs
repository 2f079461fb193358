//! Random queries: typed relations over relations, to a depth.

use millrace_tests::rng::Rng;

use super::data::{Table, Type};
use super::expression::{Column, columns, expression, of_type, predicate, reference};
use super::known;
use super::tree::{Dialect, Piece, Tree, pieces};

#[path = "generate/aggregate.rs"]
mod aggregate;
#[path = "generate/join.rs"]
mod join;
#[path = "generate/rows.rs"]
mod rows;
#[path = "generate/time.rs"]
pub(crate) mod time;

/// A query and what may be asked about it.
#[derive(Debug, Clone)]
pub(crate) struct Query {
    pub(crate) name: String,
    pub(crate) tree: Tree,
    /// The one-shot query says the same.
    pub(crate) batch: bool,
    /// DuckDB says the same.
    pub(crate) duck: bool,
    /// EMIT ON WINDOW CLOSE: the view holds a part of the answer until the last event came.
    pub(crate) close: bool,
}

impl Query {
    pub(crate) fn create(&self) -> String {
        format!(
            "CREATE MATERIALIZED VIEW {} AS {}{}",
            self.name,
            self.tree.sql(Dialect::View),
            if self.close {
                " EMIT ON WINDOW CLOSE"
            } else {
                ""
            }
        )
    }
}

/// A relation and a bound of its number of rows, about.
#[derive(Debug, Clone)]
pub(crate) struct Relation {
    pub(crate) tree: Tree,
    pub(crate) rows: usize,
}

impl Relation {
    pub(crate) fn types(&self) -> &[Type] {
        self.tree.types()
    }
}

/// Rows of a base relation, about; more than the square of it is too many.
const BASE_ROWS: usize = 30;
const MOST_ROWS: usize = 1_500;

#[derive(Debug)]
pub(crate) struct Generator<'a> {
    pub(crate) rng: Rng,
    tables: &'a [Table],
    aliases: usize,
    /// Relations that are being made around this one.
    level: usize,
    batch: bool,
    duck: bool,
    close: bool,
    /// Aggregates with an order.
    ordered: usize,
}

impl<'a> Generator<'a> {
    pub(crate) fn new(tables: &'a [Table], rng: Rng) -> Self {
        Self {
            rng,
            tables,
            aliases: 0,
            level: 0,
            batch: true,
            duck: true,
            close: false,
            ordered: 0,
        }
    }

    pub(crate) fn query(&mut self, name: String) -> Query {
        self.aliases = 0;
        (self.batch, self.duck, self.close) = (true, true, false);
        self.ordered = 0;
        let depth = 1 + self.rng.below(6);
        let relation = if self.rng.below(8) == 0 {
            self.windowed()
        } else {
            self.relation(depth)
        };
        Query {
            name,
            tree: relation.tree,
            batch: self.batch && (known::BATCH_SEVERAL_ORDERS || self.ordered < 2),
            duck: self.duck,
            close: self.close,
        }
    }

    fn alias(&mut self) -> String {
        self.aliases += 1;
        format!("r{}", self.aliases)
    }

    fn pick<'b, T>(&mut self, from: &'b [T]) -> &'b T {
        &from[self.rng.below(from.len())]
    }

    fn table(&mut self) -> Relation {
        let tables: Vec<&Table> = self
            .tables
            .iter()
            .filter(|table| !table.name.starts_with('e'))
            .collect();
        let table = self.pick(&tables);
        Relation {
            tree: Tree::table(&table.name, &table.types),
            rows: BASE_ROWS,
        }
    }

    /// A relation at most so deep.
    fn relation(&mut self, depth: usize) -> Relation {
        if depth == 0 {
            return self.table();
        }
        let depth = depth - 1;
        self.level += 1;
        let relation = self.any(depth);
        self.level -= 1;
        relation
    }

    /// Nothing reads the relation that is being made.
    fn outermost(&self) -> bool {
        self.level <= 1
    }

    fn any(&mut self, depth: usize) -> Relation {
        match self.rng.below(24) {
            0..=2 => self.select(depth),
            3..=5 => self.join(depth),
            6 => self.semi(depth),
            7 => self.scalar(depth),
            8 => self.lateral(depth),
            9..=11 => self.group(depth),
            12 => self.grouping_sets(depth),
            13 | 14 => self.set_operation(depth),
            15 | 16 => self.window(depth),
            17 => self.top_rows(depth),
            18 => self.distinct(depth),
            19 => self.distinct_on(depth),
            20 => self.limit(depth),
            21 => self.cte(depth),
            22 => self.unnest(depth),
            _ => self.recursive(depth),
        }
    }

    /// Marks what one-shot queries are known to see otherwise: doubles as keys and in an order.
    fn keyed_by(&mut self, types: &[Type]) {
        if !known::BATCH_DOUBLE_KEYS && types.contains(&Type::Double) {
            self.batch = false;
        }
    }

    /// Columns for a SELECT list: types and items `x AS c0, …`.
    fn items(&mut self, scope: &[Column], depth: usize) -> (Vec<Type>, Vec<Tree>) {
        let mut types = Vec::new();
        let mut items = Vec::new();
        for i in 0..1 + self.rng.below(4) {
            let column = self.pick(scope).clone();
            let tree = if self.rng.coin() {
                reference(&column)
            } else {
                expression(column.ty, scope, depth, &mut self.rng)
            };
            types.push(column.ty);
            items.push(Tree::part(pieces![tree, format!(" AS c{i}")]));
        }
        (types, items)
    }

    /// ` WHERE …`, mostly.
    fn filter(&mut self, scope: &[Column]) -> Tree {
        if self.rng.below(3) == 0 {
            return Tree::part(vec![]);
        }
        let condition = predicate(scope, 3, &mut self.rng);
        Tree::part(pieces![" WHERE ", condition]).with("filter")
    }

    fn select(&mut self, depth: usize) -> Relation {
        let from = self.relation(depth);
        let alias = self.alias();
        let scope = columns(&alias, from.types());
        let (types, items) = self.items(&scope, 3);
        let filter = self.filter(&scope);
        let pieces = vec![
            "SELECT ".into(),
            Piece::List(items, ", "),
            " FROM ".into(),
            Piece::From(from.tree),
            format!(" AS {alias}").into(),
            filter.into(),
        ];
        Relation {
            tree: Tree::relation(types, "project", pieces),
            rows: from.rows,
        }
    }

    /// All columns of a relation under an alias, as items and types.
    fn all(scope: &[Column]) -> (Vec<Type>, Vec<Tree>) {
        let item = |(i, column): (usize, &Column)| {
            Tree::part(pieces![reference(column), format!(" AS c{i}")])
        };
        let types = scope.iter().map(|column| column.ty).collect();
        (types, scope.iter().enumerate().map(item).collect())
    }

    /// Some columns, at least one, at most so many.
    fn some(&mut self, scope: &[Column], most: usize) -> Vec<Column> {
        let mut chosen: Vec<Column> = scope.to_vec();
        self.rng.shuffle(&mut chosen);
        chosen.truncate(1 + self.rng.below(most));
        chosen
    }

    /// An order over all columns: rows that tie in it are equal. `first` come first.
    fn order(&mut self, first: &[Column], scope: &[Column]) -> String {
        let types: Vec<Type> = scope.iter().map(|column| column.ty).collect();
        self.keyed_by(&types);
        let mut columns: Vec<Column> = first.to_vec();
        let mut others = scope.to_vec();
        self.rng.shuffle(&mut others);
        for column in others {
            if !columns.contains(&column) {
                columns.push(column);
            }
        }
        let terms: Vec<String> = columns
            .iter()
            .map(|column| {
                let way = [
                    "ASC NULLS FIRST",
                    "ASC NULLS LAST",
                    "DESC NULLS FIRST",
                    "DESC NULLS LAST",
                ];
                format!("{} {}", column.name, self.pick(&way))
            })
            .collect();
        terms.join(", ")
    }

    /// Two columns of equal type, one of each scope.
    fn pair(&mut self, left: &[Column], right: &[Column]) -> Option<(Column, Column)> {
        let mut pairs = Vec::new();
        for l in left {
            for r in of_type(right, l.ty) {
                pairs.push((l.clone(), r.clone()));
            }
        }
        if pairs.is_empty() {
            return None;
        }
        let (l, r) = self.pick(&pairs).clone();
        self.keyed_by(&[l.ty]);
        Some((l, r))
    }
}
