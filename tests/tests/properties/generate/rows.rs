//! Relations of rows among rows: set operations, window functions, first rows, UNNEST.

use super::{Generator, MOST_ROWS, Relation};
use crate::data::Type;
use crate::expression::{Column, columns, of_type, reference};
use crate::known;
use crate::tree::{Piece, Tree, pieces};

impl Generator<'_> {
    pub(super) fn set_operation(&mut self, depth: usize) -> Relation {
        let left = self.relation(depth);
        let less = self.rng.below(depth + 1);
        let right = self.relation(less);
        let (l, r) = (self.alias(), self.alias());
        let left_columns = {
            let scope = columns(&l, left.types());
            self.some(&scope, 3)
        };
        let scope = columns(&r, right.types());
        let (types, left_items) = Self::all(&left_columns);
        let right_items: Vec<Tree> = types
            .iter()
            .enumerate()
            .map(|(i, ty)| {
                let fitting = of_type(&scope, *ty);
                let value = if fitting.is_empty() {
                    Tree::expression(*ty, pieces![ty.literal(&mut self.rng)])
                } else {
                    reference(self.pick::<&Column>(&fitting))
                };
                Tree::frame(pieces![value, format!(" AS c{i}")])
            })
            .collect();
        let left_items = left_items
            .into_iter()
            .map(|item| Tree::frame(item.pieces))
            .collect();
        let kinds = [
            ("UNION ALL", "union all"),
            ("UNION", "union"),
            ("INTERSECT", "intersect"),
            ("INTERSECT ALL", "intersect all"),
            ("EXCEPT", "except"),
            ("EXCEPT ALL", "except all"),
        ];
        let (word, name) = *self.pick(&kinds);
        if word != "UNION ALL" {
            self.keyed_by(&types);
        }
        let side = |items: Vec<Tree>, from: Tree, alias: &str, types: &[Type]| {
            let pieces = vec![
                "SELECT ".into(),
                Piece::List(items, ", "),
                " FROM ".into(),
                Piece::From(from),
                format!(" AS {alias}").into(),
            ];
            Tree::relation(types.to_vec(), "project", pieces)
        };
        let pieces = pieces![
            side(left_items, left.tree, &l, &types),
            format!(" {word} "),
            side(right_items, right.tree, &r, &types)
        ];
        Relation {
            tree: Tree::relation(types, name, pieces),
            rows: left.rows + right.rows,
        }
    }

    pub(super) fn distinct(&mut self, depth: usize) -> Relation {
        let from = self.relation(depth);
        let alias = self.alias();
        let scope = columns(&alias, from.types());
        let (types, items) = self.items(&scope, 2);
        self.keyed_by(&types);
        let pieces = vec![
            "SELECT DISTINCT ".into(),
            Piece::List(items, ", "),
            " FROM ".into(),
            Piece::From(from.tree),
            format!(" AS {alias}").into(),
        ];
        Relation {
            tree: Tree::relation(types, "distinct", pieces),
            rows: from.rows,
        }
    }

    pub(super) fn distinct_on(&mut self, depth: usize) -> Relation {
        let from = self.relation(depth);
        let alias = self.alias();
        let scope = columns(&alias, from.types());
        let keys = self.some(&scope, 2);
        let names: Vec<&str> = keys.iter().map(|column| column.name.as_str()).collect();
        let head = format!("SELECT DISTINCT ON ({}) ", names.join(", "));
        let (types, items) = Self::all(&scope);
        let order = self.order(&keys, &scope);
        let pieces = vec![
            head.into(),
            Piece::List(items, ", "),
            " FROM ".into(),
            Piece::From(from.tree),
            format!(" AS {alias} ORDER BY {order}").into(),
        ];
        Relation {
            tree: Tree::relation(types, "distinct on", pieces),
            rows: from.rows,
        }
    }

    pub(super) fn limit(&mut self, depth: usize) -> Relation {
        let from = self.relation(depth);
        let alias = self.alias();
        let scope = columns(&alias, from.types());
        let (types, items) = Self::all(&scope);
        let order = self.order(&[], &scope);
        self.batch &= known::BATCH_TOPK_NULLS || from.tree.is_table();
        let limit = 1 + self.rng.below(8);
        let offset = match self.rng.below(3) {
            0 => format!(" OFFSET {}", self.rng.below(5)),
            _ => String::new(),
        };
        let pieces = vec![
            "SELECT ".into(),
            Piece::List(items, ", "),
            " FROM ".into(),
            Piece::From(from.tree),
            format!(" AS {alias} ORDER BY {order} LIMIT {limit}").into(),
            Tree::part(pieces![offset]).into(),
        ];
        Relation {
            tree: Tree::relation(types, "order limit", pieces),
            rows: limit,
        }
    }

    /// ` PARTITION BY …`, or nothing.
    fn partition(&mut self, scope: &[Column]) -> String {
        if self.rng.below(4) == 0 {
            return String::new();
        }
        let keys = self.some(scope, 2);
        let types: Vec<Type> = keys.iter().map(|column| column.ty).collect();
        self.keyed_by(&types);
        let names: Vec<&str> = keys.iter().map(|column| column.name.as_str()).collect();
        format!("PARTITION BY {} ", names.join(", "))
    }

    pub(super) fn window(&mut self, depth: usize) -> Relation {
        let from = self.relation(depth);
        let alias = self.alias();
        let scope = columns(&alias, from.types());
        let some = self.some(&scope, 3);
        let (mut types, mut items) = Self::all(&some);
        // Equal rows take their places in one order or another: with two functions beside each other
        // that would be two orders, and several right answers.
        let (ty, call) = self.over(&scope);
        let at = types.len();
        types.push(ty);
        items.push(Tree::part(pieces![call, format!(" AS c{at}")]));
        let pieces = vec![
            "SELECT ".into(),
            Piece::List(items, ", "),
            " FROM ".into(),
            Piece::From(from.tree),
            format!(" AS {alias}").into(),
        ];
        Relation {
            tree: Tree::relation(types, "window", pieces),
            rows: from.rows,
        }
    }

    /// One window function.
    fn over(&mut self, scope: &[Column]) -> (Type, Tree) {
        let partition = self.partition(scope);
        let column = self.pick(scope).clone();
        let ints: Vec<Column> = of_type(scope, Type::Int).into_iter().cloned().collect();
        if self.rng.below(6) == 0 && !ints.is_empty() {
            let by = self.pick(&ints).name.clone();
            let (of, ty) = self.framed(scope);
            let nulls = *self.pick(&["ASC NULLS FIRST", "ASC NULLS LAST", "DESC NULLS LAST"]);
            let frame = *self.pick(&[
                "RANGE BETWEEN 2 PRECEDING AND 1 FOLLOWING",
                "RANGE BETWEEN 1 PRECEDING AND CURRENT ROW",
                "RANGE BETWEEN UNBOUNDED PRECEDING AND 1 FOLLOWING",
                "RANGE BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING",
            ]);
            let over = format!(" OVER ({partition}ORDER BY {by} {nulls} {frame})");
            return (ty, cast_over(ty, of, &over).with("range frame"));
        }
        let order = self.order(&[], scope);
        let plain = format!(" OVER ({partition}ORDER BY {order})");
        let frame = *self.pick(&[
            "",
            "",
            " ROWS BETWEEN 2 PRECEDING AND CURRENT ROW",
            " ROWS BETWEEN 1 PRECEDING AND 1 FOLLOWING",
            " ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING",
            " ROWS BETWEEN CURRENT ROW AND 2 FOLLOWING",
            " ROWS BETWEEN 3 PRECEDING AND 1 PRECEDING",
        ]);
        let framed = format!(" OVER ({partition}ORDER BY {order}{frame})");
        let make = |ty: Type, text: String, name: &'static str| {
            (ty, Tree::expression(ty, pieces![text]).with(name))
        };
        let c = &column.name;
        let ranked = known::RANKS_OF_DOUBLES || of_type(scope, Type::Double).is_empty();
        let kind = match self.rng.below(12) {
            1 | 2 | 9 if !ranked => 0,
            kind => kind,
        };
        match kind {
            0 => make(
                Type::Int,
                bigint(&format!("row_number(){plain}")),
                "row_number",
            ),
            1 => make(Type::Int, bigint(&format!("rank(){plain}")), "rank"),
            2 => make(
                Type::Int,
                bigint(&format!("dense_rank(){plain}")),
                "dense_rank",
            ),
            3 => make(
                Type::Int,
                format!("CAST(ntile(3){plain} AS BIGINT)"),
                "ntile",
            ),
            4 => make(column.ty, format!("lag({c}){plain}"), "lag"),
            5 => make(column.ty, format!("lead({c}, 2){plain}"), "lead"),
            6 => make(
                column.ty,
                format!("first_value({c}){framed}"),
                "first_value over",
            ),
            7 => make(
                column.ty,
                format!("last_value({c}){framed}"),
                "last_value over",
            ),
            8 => make(column.ty, format!("nth_value({c}, 2){framed}"), "nth_value"),
            9 => make(Type::Double, format!("cume_dist(){plain}"), "cume_dist"),
            _ => {
                let (of, ty) = self.framed(scope);
                (ty, cast_over(ty, of, &framed).with("rows frame"))
            }
        }
    }

    /// An aggregate for a frame.
    fn framed(&mut self, scope: &[Column]) -> (String, Type) {
        let column = self.pick(scope).clone();
        match (column.ty, self.rng.below(3)) {
            (Type::Int | Type::Dec, 0) => (format!("sum({})", column.name), column.ty),
            (ty, 1) if ty != Type::Bool => {
                self.keyed_by(&[ty]);
                let name = *self.pick(&["min", "max"]);
                (format!("{name}({})", column.name), ty)
            }
            _ => (format!("count({})", column.name), Type::Int),
        }
    }

    /// `row_number() … WHERE rn <= n`.
    pub(super) fn top_rows(&mut self, depth: usize) -> Relation {
        let from = self.relation(depth);
        let (alias, x) = (self.alias(), self.alias());
        let types = from.types().to_vec();
        let scope = columns(&alias, &types);
        let partition = self.partition(&scope);
        let order = self.order(&[], &scope);
        let (_, items) = Self::all(&scope);
        let items = items
            .into_iter()
            .map(|item| Tree::frame(item.pieces))
            .collect();
        let outer = columns(&x, &types);
        let (mut out, mut outer) = Self::all(&outer);
        if self.rng.coin() {
            outer.push(Tree::part(pieces![format!(
                "{} AS c{}",
                bigint(&format!("{x}.rn")),
                out.len()
            )]));
            out.push(Type::Int);
        }
        let bound = *self.pick(&["<= 1", "<= 2", "< 4", "= 1", "= 2"]);
        let pieces = vec![
            "SELECT ".into(),
            Piece::List(outer, ", "),
            " FROM (SELECT ".into(),
            Piece::List(items, ", "),
            format!(", row_number() OVER ({partition}ORDER BY {order}) AS rn FROM ").into(),
            Piece::From(from.tree),
            format!(" AS {alias}) AS {x} WHERE {x}.rn {bound}").into(),
        ];
        Relation {
            tree: Tree::relation(out, "top rows", pieces),
            rows: from.rows,
        }
    }

    /// UNNEST of a list of columns, or VALUES beside a relation.
    pub(super) fn unnest(&mut self, depth: usize) -> Relation {
        let from = self.relation(depth);
        if 3 * from.rows > MOST_ROWS {
            return from;
        }
        let alias = self.alias();
        let scope = columns(&alias, from.types());
        let some = self.some(&scope, 2);
        let (mut types, mut items) = Self::all(&some);
        let rows = 3 * from.rows;
        if self.rng.below(3) == 0 {
            let (v, ty) = (
                self.alias(),
                crate::expression::any_type(&scope, &mut self.rng),
            );
            let values: Vec<String> = (0..1 + self.rng.below(3))
                .map(|i| format!("({i}, {})", ty.literal(&mut self.rng)))
                .collect();
            types.extend([Type::Int, ty]);
            let at = items.len();
            items.push(Tree::part(pieces![format!(
                "{v}.c0 AS c{at}, {v}.c1 AS c{}",
                at + 1
            )]));
            let pieces = vec![
                "SELECT ".into(),
                Piece::List(items, ", "),
                " FROM ".into(),
                Piece::From(from.tree),
                format!(
                    " AS {alias} CROSS JOIN (VALUES {}) AS {v}(c0, c1)",
                    values.join(", ")
                )
                .into(),
            ];
            return Relation {
                tree: Tree::relation(types, "values", pieces),
                rows,
            };
        }
        let column = self.pick(&scope).clone();
        let elements: Vec<Tree> = (0..1 + self.rng.below(3))
            .map(|_| {
                let value = crate::expression::expression(column.ty, &scope, 1, &mut self.rng);
                Tree::part(pieces![value])
            })
            .collect();
        let at = types.len();
        types.push(column.ty);
        let (name, x) = match known::UNNEST_RENAMES {
            true => ("c", String::new()),
            false => ("x", self.alias()),
        };
        let mut items: Vec<Tree> = some
            .iter()
            .enumerate()
            .map(|(i, column)| Tree::frame(pieces![reference(column), format!(" AS {name}{i}")]))
            .collect();
        items.push(Tree::frame(vec![
            "unnest(ARRAY[".into(),
            Piece::List(elements, ", "),
            format!("]) AS {name}{at}").into(),
        ]));
        let mut pieces = vec![
            "SELECT ".into(),
            Piece::List(items, ", "),
            " FROM ".into(),
            Piece::From(from.tree),
            format!(" AS {alias}").into(),
        ];
        if !known::UNNEST_RENAMES {
            let outer = (0..=at).map(|i| Tree::part(pieces![format!("{x}.x{i} AS c{i}")]));
            pieces.insert(0, " FROM (".into());
            pieces.insert(0, Piece::List(outer.collect(), ", "));
            pieces.insert(0, "SELECT ".into());
            pieces.push(format!(") AS {x}").into());
        }
        Relation {
            tree: Tree::relation(types, "unnest", pieces),
            rows,
        }
    }
}

/// Sums have wider types of their own.
fn cast_over(ty: Type, of: String, over: &str) -> Tree {
    let text = if of.starts_with("sum") {
        format!("CAST({of}{over} AS {})", ty.sql())
    } else {
        format!("{of}{over}")
    };
    Tree::expression(ty, pieces![text])
}

/// A number of a row as the BIGINT that it is said to be.
fn bigint(number: &str) -> String {
    if known::CORRELATED_TYPES {
        number.to_string()
    } else {
        format!("CAST({number} AS BIGINT)")
    }
}
