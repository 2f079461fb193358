//! Aggregates: grouped, global, over grouping sets, with FILTER, DISTINCT and HAVING.

use super::{Generator, Relation};
use crate::data::Type;
use crate::expression::{Column, columns, expression, predicate, reference};
use crate::known;
use crate::tree::{Kind, Piece, Tree, pieces};

/// A relation whose text is not to be cut apart at its seams.
pub(super) fn whole(types: Vec<Type>, operator: &'static str, pieces: Vec<Piece>) -> Tree {
    Tree::relation(types, operator, pieces)
}

fn call(ty: Type, name: &'static str, pieces: Vec<Piece>) -> (Type, Tree) {
    (ty, Tree::expression(ty, pieces).with(name))
}

impl Generator<'_> {
    /// An argument of a type: mostly a column.
    fn argument(&mut self, ty: Type, scope: &[Column]) -> Tree {
        let depth = self.rng.below(3);
        expression(ty, scope, depth, &mut self.rng)
    }

    /// What LATERAL may hold (`sum`, `min`, `max`), and grouping sets, which may also hold `count`.
    pub(super) fn plain_aggregate(&mut self, scope: &[Column], count: bool) -> (Type, Tree) {
        match self
            .rng
            .below(if count || known::LATERAL_COUNT { 3 } else { 2 })
        {
            0 if count => self.sum(scope),
            // With a cast around it, it is not plain.
            0 => {
                let argument = self.argument(Type::Double, scope);
                call(Type::Double, "sum double", pieces!["sum(", argument, ")"])
            }
            1 => {
                let (ty, argument) = self.ordered_argument(scope);
                let name = *self.pick(&["min", "max"]);
                call(ty, name, pieces![format!("{name}("), argument, ")"])
            }
            _ => call(Type::Int, "count", pieces!["count(*)"]),
        }
    }

    /// An aggregate over a scope. What is not exact, or has no type of ours, is for the outermost
    /// relation only (`outermost`), where it is compared with a tolerance.
    pub(super) fn aggregate(&mut self, scope: &[Column], outermost: bool) -> (Type, Tree) {
        let (ty, mut tree) = match self.rng.below(if outermost { 13 } else { 8 }) {
            0 => call(Type::Int, "count", pieces!["count(*)"]),
            1 | 2 => {
                let column = self.pick(scope).clone();
                let argument = self.argument(column.ty, scope);
                if self.rng.coin() {
                    self.keyed_by(&[column.ty]);
                    call(
                        Type::Int,
                        "count distinct",
                        pieces!["count(DISTINCT ", argument, ")"],
                    )
                } else {
                    call(Type::Int, "count", pieces!["count(", argument, ")"])
                }
            }
            3 | 4 => self.sum(scope),
            5 => {
                let (ty, argument) = self.ordered_argument(scope);
                let name = *self.pick(&["min", "max"]);
                call(ty, name, pieces![format!("{name}("), argument, ")"])
            }
            6 => {
                let argument = self.argument(Type::Bool, scope);
                let name = *self.pick(&["bool_and", "bool_or"]);
                call(Type::Bool, name, pieces![format!("{name}("), argument, ")"])
            }
            7 => {
                let a = self.text_argument(scope);
                let order = if self.rng.coin() { "" } else { " DESC" };
                let again = a.clone();
                call(
                    Type::Text,
                    "string_agg",
                    pieces!["string_agg(", a, ", ',' ORDER BY ", again, order, ")"],
                )
            }
            _ => self.inexact(scope),
        };
        let ordered = ["string_agg", "array_agg", "first_value", "last_value"];
        if tree.operators.iter().any(|name| ordered.contains(name)) {
            self.ordered += 1;
        }
        if self.rng.below(4) == 0 {
            let condition = predicate(scope, 2, &mut self.rng);
            let filter =
                Tree::part(pieces![" FILTER (WHERE ", condition, ")"]).with("aggregate filter");
            match tree.pieces.last_mut() {
                // `CAST(sum(x) … AS T)`: within the cast.
                Some(Piece::Either(ours, duck)) => {
                    let rest = Piece::Either(ours.split_off(1), duck.split_off(1));
                    tree.pieces.push(filter.into());
                    tree.pieces.push(rest);
                }
                Some(Piece::Text(tail)) if tail.starts_with(") AS ") => {
                    let rest = tail.split_off(1);
                    tree.pieces.push(filter.into());
                    tree.pieces.push(rest.into());
                }
                _ => tree.pieces.push(filter.into()),
            }
        }
        (ty, tree)
    }

    /// A text that is no constant: neither engine takes one for an order (see `known`).
    fn text_argument(&mut self, scope: &[Column]) -> Tree {
        if known::CONSTANT_ORDER {
            return self.argument(Type::Text, scope);
        }
        // Texts of times and of doubles look different (see `known::TEXT_OF_TIMES`).
        let plain: Vec<Column> = scope
            .iter()
            .filter(|column| match column.ty {
                Type::Stamp => known::TEXT_OF_TIMES,
                ty => ty != Type::Double,
            })
            .cloned()
            .collect();
        if plain.is_empty() {
            return Tree::expression(
                Type::Text,
                pieces![format!("CAST(({} IS NULL) AS VARCHAR)", scope[0].name)],
            );
        }
        let column = crate::expression::some_column(Type::Text, &plain, &mut self.rng);
        match column.kind {
            Kind::Expression(Type::Text) => column,
            _ => Tree::expression(Type::Text, pieces!["CAST(", column, " AS VARCHAR)"]),
        }
    }

    fn sum(&mut self, scope: &[Column]) -> (Type, Tree) {
        let ty = *self.pick(&[Type::Int, Type::Int, Type::Dec, Type::Double]);
        let argument = self.argument(ty, scope);
        let distinct = ty != Type::Double && self.rng.below(4) == 0;
        let (word, name) = if distinct {
            ("DISTINCT ", "sum distinct")
        } else {
            ("", "sum")
        };
        match ty {
            Type::Double => call(ty, "sum double", pieces!["sum(", argument, ")"]),
            _ => call(
                ty,
                name,
                pieces![
                    format!("CAST(sum({word}"),
                    argument,
                    format!(") AS {})", ty.sql())
                ],
            ),
        }
    }

    /// An argument of a type that `min` and `max` order.
    fn ordered_argument(&mut self, scope: &[Column]) -> (Type, Tree) {
        let orderable: Vec<Type> = scope
            .iter()
            .map(|column| column.ty)
            .filter(|ty| *ty != Type::Bool)
            .collect();
        let ty = if orderable.is_empty() {
            Type::Int
        } else {
            *self.pick(&orderable)
        };
        self.keyed_by(&[ty]);
        (ty, self.argument(ty, scope))
    }

    fn inexact(&mut self, scope: &[Column]) -> (Type, Tree) {
        let ty = *self.pick(&[Type::Int, Type::Dec]);
        let a = self.argument(ty, scope);
        let double = |a: Tree| pieces!["CAST(", a, " AS DOUBLE)"];
        let of_double = |name: &'static str, a: Tree| {
            let mut pieces = pieces![format!("{name}(")];
            pieces.extend(double(a));
            pieces.push(")".into());
            call(Type::Double, name, pieces)
        };
        match self.rng.below(9) {
            // Ours has six digits.
            0 | 1 => call(
                Type::Double,
                "avg",
                vec![
                    Piece::Either("avg(".into(), "round(avg(".into()),
                    a.into(),
                    Piece::Either(")".into(), "), 6)".into()),
                ],
            ),
            2 => of_double("stddev_samp", a),
            3 => of_double("stddev_pop", a),
            4 => of_double("var_samp", a),
            5 => of_double("var_pop", a),
            6 if known::MEDIAN_OF_INTEGERS || ty == Type::Int => of_double("median", a),
            7 => {
                let column = self.pick(scope).clone();
                self.keyed_by(&[column.ty]);
                let (ty, x) = (column.ty, reference(&column));
                let again = x.clone();
                call(
                    ty,
                    "array_agg",
                    pieces!["array_agg(", x, " ORDER BY ", again, " NULLS FIRST)"],
                )
            }
            _ => {
                let column = self.pick(scope).clone();
                self.keyed_by(&[column.ty]);
                let (ty, x) = (column.ty, reference(&column));
                let again = x.clone();
                let (name, duck) = *self.pick(&[("first_value", "first"), ("last_value", "last")]);
                call(
                    ty,
                    name,
                    vec![
                        Piece::Either(format!("{name}("), format!("{duck}(")),
                        x.into(),
                        " ORDER BY ".into(),
                        again.into(),
                        " NULLS FIRST)".into(),
                    ],
                )
            }
        }
    }

    /// Keys of a grouping: columns, sometimes expressions.
    fn keys(&mut self, scope: &[Column], most: usize) -> Vec<(Type, Tree)> {
        let chosen = self.some(scope, most);
        let mut keys: Vec<(Type, Tree)> = chosen
            .iter()
            .map(|column| (column.ty, reference(column)))
            .collect();
        if known::CONSTANT_KEYS && self.rng.below(4) == 0 {
            let column = self.pick(scope).clone();
            keys[0] = (column.ty, expression(column.ty, scope, 2, &mut self.rng));
        }
        let types: Vec<Type> = keys.iter().map(|(ty, _)| *ty).collect();
        self.keyed_by(&types);
        keys
    }

    /// ` HAVING …`, sometimes. With `guarded` a group that is none is left out.
    fn having(&mut self, scope: &[Column], guarded: bool) -> Tree {
        let guard = " HAVING count(*) > 0";
        if self.rng.below(4) > 0 {
            return Tree::frame(pieces![if guarded { guard } else { "" }]);
        }
        let head = if guarded {
            format!("{guard} AND ")
        } else {
            " HAVING ".into()
        };
        let (ty, call) = self.aggregate(scope, false);
        let sign = *self.pick(&["=", "<", ">=", "<>"]);
        let literal = ty.literal(&mut self.rng);
        let condition = pieces![head, call, format!(" {sign} {literal}")];
        Tree::part(condition).with("having")
    }

    pub(super) fn group(&mut self, depth: usize) -> Relation {
        let outermost = self.outermost();
        let from = self.relation(depth);
        let alias = self.alias();
        let scope = columns(&alias, from.types());
        let filter = if self.rng.coin() {
            self.filter(&scope)
        } else {
            Tree::part(vec![])
        };
        let global = self.rng.below(6) == 0;
        // Any column but one of a table may be a constant.
        let guarded = !known::CONSTANT_KEYS && !from.tree.is_table();
        let keys = if global { vec![] } else { self.keys(&scope, 2) };
        let (mut types, mut items) = (Vec::new(), Vec::new());
        for (at, (ty, key)) in keys.iter().enumerate() {
            types.push(*ty);
            items.push(Tree::frame(pieces![key.clone(), format!(" AS c{at}")]));
        }
        for _ in 0..1 + self.rng.below(3) {
            let (ty, call) = self.aggregate(&scope, outermost);
            let at = types.len();
            types.push(ty);
            items.push(Tree::part(pieces![call, format!(" AS c{at}")]));
        }
        let mut pieces = vec![
            "SELECT ".into(),
            Piece::List(items, ", "),
            " FROM ".into(),
            Piece::From(from.tree),
            format!(" AS {alias}").into(),
            filter.into(),
        ];
        let name = if global {
            "global aggregate"
        } else {
            "group by"
        };
        if !global {
            // By place: a key that is an expression is said once.
            let places: Vec<String> = (1..=keys.len()).map(|i| i.to_string()).collect();
            pieces.push(format!(" GROUP BY {}", places.join(", ")).into());
            pieces.push(self.having(&scope, guarded).into());
        }
        Relation {
            tree: whole(types, name, pieces),
            rows: if global { 1 } else { from.rows },
        }
    }

    /// GROUPING SETS, ROLLUP and CUBE over columns.
    pub(super) fn grouping_sets(&mut self, depth: usize) -> Relation {
        let outermost = self.outermost();
        let from = self.relation(depth);
        let alias = self.alias();
        let scope = columns(&alias, from.types());
        let keys = self.some(&scope, 3);
        if !known::BATCH_ROLLUP_CONSTANTS && !from.tree.is_table() {
            self.batch = false;
        }
        let types: Vec<Type> = keys.iter().map(|column| column.ty).collect();
        self.keyed_by(&types);
        let names: Vec<&str> = keys.iter().map(|column| column.name.as_str()).collect();
        let all = names.join(", ");
        let (sets, name) = match self.rng.below(3) {
            0 => (format!("ROLLUP ({all})"), "rollup"),
            1 => (format!("CUBE ({all})"), "cube"),
            _ => {
                // Each set once (see `known::EQUAL_GROUPING_SETS`): all, and some of the single columns.
                let mut sets = vec![format!("({all})")];
                if names.len() > 1 {
                    sets.extend(names.iter().map(|name| format!("({name})")));
                }
                let fewer = 1 + self.rng.below(sets.len());
                sets.truncate(fewer);
                if known::EQUAL_GROUPING_SETS {
                    sets.push(sets[0].clone());
                }
                if self.rng.coin() {
                    sets.push("()".into());
                }
                (
                    format!("GROUPING SETS ({})", sets.join(", ")),
                    "grouping sets",
                )
            }
        };
        let (mut types, mut items) = Self::all(&keys);
        for item in &mut items {
            item.kind = Kind::Frame;
        }
        for _ in 0..1 + self.rng.below(2) {
            // The others are refused, or that is the wish of a few.
            let (ty, call) = match self.rng.below(10) {
                0 => self.aggregate(&scope, outermost),
                _ => self.plain_aggregate(&scope, true),
            };
            let at = types.len();
            types.push(ty);
            items.push(Tree::part(pieces![call, format!(" AS c{at}")]));
        }
        let having = if known::EMPTY_GRAND_TOTAL {
            ""
        } else {
            " HAVING count(*) > 0"
        };
        let pieces = vec![
            "SELECT ".into(),
            Piece::List(items, ", "),
            " FROM ".into(),
            Piece::From(from.tree),
            format!(" AS {alias} GROUP BY {sets}{having}").into(),
        ];
        Relation {
            tree: whole(types, name, pieces),
            rows: 3 * from.rows,
        }
    }
}
