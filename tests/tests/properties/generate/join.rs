//! Relations over two relations: joins, semi-joins, subqueries as values, LATERAL.

use super::aggregate::whole;
use super::{Column, Generator, MOST_ROWS, Relation};
use crate::data::Type;
use crate::expression::{columns, predicate, reference};
use crate::known;
use crate::tree::{Piece, Tree, pieces};

impl Generator<'_> {
    /// Two relations that are not too large together.
    pub(super) fn two(&mut self, depth: usize) -> (Relation, Relation) {
        let left = self.relation(depth);
        let less = self.rng.below(depth + 1);
        let right = self.relation(less);
        if left.rows * right.rows > MOST_ROWS {
            (left, self.table())
        } else {
            (left, right)
        }
    }

    pub(super) fn join(&mut self, depth: usize) -> Relation {
        let (left, right) = self.two(depth);
        let (l, r) = (self.alias(), self.alias());
        let (left_scope, right_scope) = (columns(&l, left.types()), columns(&r, right.types()));
        let both: Vec<Column> = left_scope.iter().chain(&right_scope).cloned().collect();
        let pair = self.pair(&left_scope, &right_scope);
        let kinds = [
            ("JOIN", "inner join"),
            ("LEFT JOIN", "left join"),
            ("RIGHT JOIN", "right join"),
            ("FULL JOIN", "full join"),
        ];
        let (mut word, mut name) = *self.pick(&kinds);
        let rows = left.rows + right.rows + left.rows * right.rows / 6;
        let cross = self.rng.below(8) == 0 && left.rows * right.rows <= MOST_ROWS;
        let on: Vec<Piece> = match pair {
            Some((a, b)) if !cross => {
                let mut terms = vec![Tree::frame(self.equal(&a, &b))];
                if self.rng.below(4) == 0
                    && let Some((a, b)) = self.pair(&left_scope, &right_scope)
                {
                    terms.push(Tree::part(self.equal(&a, &b)));
                }
                if self.rng.below(3) == 0 {
                    let more = predicate(&both, 2, &mut self.rng);
                    terms.push(Tree::part(pieces![more]).with("join condition"));
                }
                vec![" ON ".into(), Piece::List(terms, " AND ")]
            }
            _ => {
                (word, name) = ("CROSS JOIN", "cross join");
                vec![]
            }
        };
        let (types, items) = if self.rng.coin() {
            self.items(&both, 2)
        } else {
            let some = self.some(&both, 6);
            Self::all(&some)
        };
        let filter = if self.rng.coin() {
            self.filter(&both)
        } else {
            Tree::part(vec![])
        };
        let mut pieces = vec![
            "SELECT ".into(),
            Piece::List(items, ", "),
            " FROM ".into(),
            Piece::From(left.tree),
            format!(" AS {l} {word} ").into(),
            Piece::From(right.tree),
            format!(" AS {r}").into(),
        ];
        pieces.extend(on);
        pieces.push(filter.into());
        Relation {
            tree: Tree::relation(types, name, pieces),
            rows,
        }
    }

    fn equal(&mut self, a: &Column, b: &Column) -> Vec<Piece> {
        let sign = if self.rng.below(5) == 0 {
            "IS NOT DISTINCT FROM"
        } else {
            "="
        };
        pieces![format!("{} {sign} {}", a.name, b.name)]
    }

    /// EXISTS, IN, ANY, ALL and their negations, in WHERE.
    pub(super) fn semi(&mut self, depth: usize) -> Relation {
        let (left, right) = self.two(depth);
        let (l, r) = (self.alias(), self.alias());
        let (left_scope, right_scope) = (columns(&l, left.types()), columns(&r, right.types()));
        let Some((a, b)) = self.pair(&left_scope, &right_scope) else {
            return left;
        };
        let inner = if self.rng.coin() {
            predicate(&right_scope, 2, &mut self.rng)
        } else {
            Tree::expression(Type::Bool, pieces!["TRUE"])
        };
        let (head, name) = match self.rng.below(6) {
            0 => ("EXISTS".to_string(), "exists"),
            1 => ("NOT EXISTS".to_string(), "not exists"),
            2 => (format!("{} IN", a.name), "in subquery"),
            3 => (format!("{} NOT IN", a.name), "not in subquery"),
            4 => (format!("{} = ANY", a.name), "any"),
            _ => (format!("{} <> ALL", a.name), "all"),
        };
        let test: Vec<Piece> = if name.contains("exists") {
            vec![
                format!("{head} (SELECT 1 FROM ").into(),
                Piece::From(right.tree),
                format!(" AS {r} WHERE {} = {}", b.name, a.name).into(),
                Tree::part(pieces![" AND ", inner]).into(),
                ")".into(),
            ]
        } else {
            vec![
                format!("{head} (SELECT {} AS c0 FROM ", b.name).into(),
                Piece::From(right.tree),
                format!(" AS {r}").into(),
                Tree::part(pieces![" WHERE ", inner]).into(),
                ")".into(),
            ]
        };
        let mut condition = Tree::expression(Type::Bool, test).with(name);
        if self.rng.below(4) == 0 {
            let other = predicate(&left_scope, 2, &mut self.rng);
            condition = Tree::expression(Type::Bool, pieces!["(", condition, " OR ", other, ")"])
                .with("semi in or");
        } else if self.rng.coin() {
            let other = predicate(&left_scope, 2, &mut self.rng);
            condition = Tree::expression(
                Type::Bool,
                pieces![condition, Tree::part(pieces![" AND ", other])],
            );
        }
        let (types, items) = self.items(&left_scope, 1);
        let pieces = vec![
            "SELECT ".into(),
            Piece::List(items, ", "),
            " FROM ".into(),
            Piece::From(left.tree),
            format!(" AS {l} WHERE ").into(),
            condition.into(),
        ];
        Relation {
            tree: Tree::relation(types, "semi", pieces),
            rows: left.rows,
        }
    }

    /// A subquery as a value: an aggregate, correlated by an equality or not at all.
    pub(super) fn scalar(&mut self, depth: usize) -> Relation {
        let (left, right) = self.two(depth);
        let (l, r) = (self.alias(), self.alias());
        let (left_scope, right_scope) = (columns(&l, left.types()), columns(&r, right.types()));
        let (ty, call) = self.aggregate(&right_scope, false);
        let pair = self.pair(&left_scope, &right_scope);
        let (on, name): (Vec<Piece>, _) = match pair {
            Some((a, b)) if self.rng.below(3) > 0 => {
                // TPC-H q17: the type of an aggregate of decimals within another expression.
                let on = pieces![format!(" WHERE {} = {}", b.name, a.name)];
                (on, "correlated subquery")
            }
            _ => (vec![], "scalar subquery"),
        };
        let mut value = vec![
            "(SELECT ".into(),
            call.into(),
            " FROM ".into(),
            Piece::From(right.tree),
            format!(" AS {r}").into(),
        ];
        value.extend(on);
        value.push(")".into());
        let value = Tree::expression(ty, value).with(name);
        let mut some = self.some(&left_scope, 3);
        let in_filter = self.rng.coin();
        if some.is_empty() {
            some = left_scope.clone();
        }
        let (mut types, mut items) = Self::all(&some);
        let mut filter = Tree::part(vec![]);
        if in_filter {
            let sign = *self.pick(&["=", "<", ">=", "<>"]);
            let other = crate::expression::expression(ty, &left_scope, 1, &mut self.rng);
            filter = Tree::part(pieces![" WHERE ", other, format!(" {sign} "), value]);
        } else {
            let at = types.len();
            types.push(ty);
            items.push(Tree::part(pieces![value, format!(" AS c{at}")]));
        }
        let pieces = vec![
            "SELECT ".into(),
            Piece::List(items, ", "),
            " FROM ".into(),
            Piece::From(left.tree),
            format!(" AS {l}").into(),
            filter.into(),
        ];
        Relation {
            tree: Tree::relation(types, "subquery", pieces),
            rows: left.rows,
        }
    }

    /// `FROM a, LATERAL (SELECT … FROM b WHERE b.k = a.k)`.
    pub(super) fn lateral(&mut self, depth: usize) -> Relation {
        let (left, right) = self.two(depth);
        let (l, r, x) = (self.alias(), self.alias(), self.alias());
        let (left_scope, right_scope) = (columns(&l, left.types()), columns(&r, right.types()));
        let Some((a, b)) = self.pair(&left_scope, &right_scope) else {
            return left;
        };
        let grouped = self.rng.coin();
        let name = if known::CORRELATED_NAMES { "c" } else { "x" };
        let (types, items) = if grouped {
            let (ty, call) = self.plain_aggregate(&right_scope, false);
            let item = Tree::frame(pieces![call, format!(" AS {name}0")]);
            (vec![ty], vec![item])
        } else {
            let some = self.some(&right_scope, 3);
            let item = |(i, column): (usize, &Column)| {
                Tree::frame(pieces![reference(column), format!(" AS {name}{i}")])
            };
            let types = some.iter().map(|column| column.ty).collect();
            (types, some.iter().enumerate().map(item).collect())
        };
        let rows = if grouped {
            left.rows
        } else {
            left.rows * right.rows / 6
        };
        let scope: Vec<Column> = left_scope
            .iter()
            .cloned()
            .chain(columns(&x, &types).into_iter().map(|mut column| {
                column.name = column.name.replace(".c", &format!(".{name}"));
                column
            }))
            .collect();
        let some = self.some(&scope, 5);
        let (outer_types, outer) = Self::all(&some);
        let pieces = vec![
            "SELECT ".into(),
            Piece::List(outer, ", "),
            " FROM ".into(),
            Piece::From(left.tree),
            format!(" AS {l}, LATERAL (SELECT ").into(),
            Piece::List(items, ", "),
            " FROM ".into(),
            Piece::From(right.tree),
            format!(" AS {r} WHERE {} = {}) AS {x}", b.name, a.name).into(),
        ];
        Relation {
            tree: Tree::relation(outer_types, "lateral", pieces),
            rows,
        }
    }

    /// One relation under a name, read twice.
    pub(super) fn cte(&mut self, depth: usize) -> Relation {
        let body = self.relation(depth);
        let types = body.types().to_vec();
        let name = format!("w{}", self.alias());
        let (l, r) = (self.alias(), self.alias());
        let (left, right) = (columns(&l, &types), columns(&r, &types));
        if body.rows * body.rows > MOST_ROWS {
            let (types, items) = self.items(&left, 2);
            let pieces = vec![
                format!("WITH {name} AS (").into(),
                body.tree.into(),
                ") SELECT ".into(),
                Piece::List(items, ", "),
                format!(" FROM {name} AS {l}").into(),
            ];
            return Relation {
                tree: Tree::relation(types, "cte", pieces),
                rows: body.rows,
            };
        }
        let column = self.rng.below(types.len());
        self.keyed_by(&types[column..=column]);
        let both: Vec<Column> = left.iter().chain(&right).cloned().collect();
        let (out, items) = self.items(&both, 1);
        let pieces = vec![
            format!("WITH {name} AS (").into(),
            body.tree.into(),
            ") SELECT ".into(),
            Piece::List(items, ", "),
            format!(
                " FROM {name} AS {l} JOIN {name} AS {r} ON {} = {}",
                left[column].name, right[column].name
            )
            .into(),
        ];
        Relation {
            tree: Tree::relation(out, "cte", pieces),
            rows: body.rows * body.rows / 3,
        }
    }

    /// WITH RECURSIVE in bounded forms: counting up, and what a graph of small numbers reaches.
    pub(super) fn recursive(&mut self, depth: usize) -> Relation {
        let base = if known::RECURSION_OVER_JOINS {
            self.relation(depth.min(2))
        } else {
            self.table()
        };
        let alias = self.alias();
        let scope = columns(&alias, base.types());
        let ints: Vec<&Column> = scope.iter().filter(|c| c.ty == Type::Int).collect();
        if ints.is_empty() {
            return base;
        }
        let (a, b) = (self.pick(&ints).name.clone(), self.pick(&ints).name.clone());
        let name = format!("w{}", self.alias());
        let start: Vec<Piece> = vec![
            format!("WITH RECURSIVE {name}(c0, c1) AS (SELECT {a} AS c0, {b} AS c1 FROM ").into(),
            Piece::From(base.tree),
            format!(" AS {alias} WHERE {a} BETWEEN -5 AND 9 AND {b} BETWEEN -5 AND 9").into(),
        ];
        let mut pieces = start;
        if self.rng.coin() {
            let all = if self.rng.coin() { " ALL" } else { "" };
            pieces.push(
                format!(
                    " UNION{all} SELECT {name}.c0 + 1, {name}.c1 FROM {name} WHERE {name}.c0 < 4)"
                )
                .into(),
            );
        } else {
            let table = self.table();
            let edges = self.alias();
            let to: Vec<Column> = columns(&edges, table.types())
                .into_iter()
                .filter(|c| c.ty == Type::Int)
                .collect();
            let to = self.pick(&to).name.clone();
            pieces.extend([
                format!(" UNION SELECT {name}.c0, {to} FROM {name} JOIN ").into(),
                Piece::From(table.tree),
                format!(" AS {edges} ON {edges}.c0 = {name}.c1)").into(),
            ]);
        }
        let x = self.alias();
        pieces.push(format!(" SELECT {x}.c0 AS c0, {x}.c1 AS c1 FROM {name} AS {x}").into());
        Relation {
            tree: whole(vec![Type::Int, Type::Int], "recursive", pieces),
            rows: 2 * base.rows,
        }
    }
}
