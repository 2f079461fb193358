//! Random expressions of a type over columns in scope.

use millrace_tests::rng::Rng;

use super::data::{TYPES, Type};
use super::known;
use super::tree::{Piece, Tree, pieces};

/// A column as expressions name it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Column {
    pub(crate) name: String,
    pub(crate) ty: Type,
}

/// Columns of a relation under an alias.
pub(crate) fn columns(alias: &str, types: &[Type]) -> Vec<Column> {
    let column = |(i, ty): (usize, &Type)| Column {
        name: format!("{alias}.c{i}"),
        ty: *ty,
    };
    types.iter().enumerate().map(column).collect()
}

pub(crate) fn of_type(scope: &[Column], ty: Type) -> Vec<&Column> {
    scope.iter().filter(|column| column.ty == ty).collect()
}

pub(crate) fn reference(column: &Column) -> Tree {
    Tree::expression(column.ty, pieces![column.name.as_str()])
}

/// A column of the type if there is one, else any column; never a constant.
pub(crate) fn some_column(ty: Type, scope: &[Column], rng: &mut Rng) -> Tree {
    let fitting = of_type(scope, ty);
    match fitting.is_empty() {
        true => reference(&scope[rng.below(scope.len())]),
        false => reference(fitting[rng.below(fitting.len())]),
    }
}

/// A column of the type, or a literal.
fn leaf(ty: Type, scope: &[Column], rng: &mut Rng) -> Tree {
    let fitting = of_type(scope, ty);
    if fitting.is_empty() || rng.below(5) == 0 {
        Tree::expression(ty, pieces![ty.literal(rng)])
    } else {
        reference(fitting[rng.below(fitting.len())])
    }
}

/// An expression over the scope, at most so deep.
pub(crate) fn expression(ty: Type, scope: &[Column], depth: usize, rng: &mut Rng) -> Tree {
    if depth == 0 || rng.below(3) == 0 {
        return leaf(ty, scope, rng);
    }
    let depth = depth - 1;
    match rng.below(9) {
        0 => return case(ty, scope, depth, rng),
        1 => {
            let (a, b) = two(ty, scope, depth, rng);
            return Tree::expression(ty, pieces!["coalesce(", a, ", ", b, ")"]).with("coalesce");
        }
        2 => {
            let (a, b) = two(ty, scope, depth, rng);
            return Tree::expression(ty, pieces!["nullif(", a, ", ", b, ")"]).with("nullif");
        }
        _ => {}
    }
    let make = |pieces: Vec<Piece>| Tree::expression(ty, pieces);
    let sub = |ty: Type, rng: &mut Rng| expression(ty, scope, depth, rng);
    match ty {
        Type::Int => int(scope, depth, rng),
        Type::Dec => match rng.below(4) {
            0 => make(pieces!["(", sub(ty, rng), " + ", sub(ty, rng), ")"]).with("decimal +"),
            1 => make(pieces!["(", sub(ty, rng), " - ", sub(ty, rng), ")"]).with("decimal -"),
            2 => {
                let (a, b) = two(ty, scope, depth, rng);
                make(pieces![
                    "CAST((",
                    a,
                    " % 100) * (",
                    b,
                    " % 10) AS DECIMAL(18,2))"
                ])
                .with("decimal *")
            }
            _ => make(pieces!["CAST(", sub(Type::Int, rng), " AS DECIMAL(18,2))"]).with("cast"),
        },
        Type::Double => match rng.below(4) {
            kind @ (0 | 1) => {
                let (mut a, mut b) = two(ty, scope, depth, rng);
                if !known::NAN_OF_ARITHMETIC {
                    (a, b) = (finite(a), finite(b));
                }
                let (sign, name) = [(" + ", "double +"), (" * ", "double *")][kind];
                make(pieces!["(", a, sign, b, ")"]).with(name)
            }
            // Minus 0 is another 0.
            2 if known::MINUS_ZERO => make(pieces!["(- ", sub(ty, rng), ")"]).with("double -"),
            2 => make(pieces!["(1 - ", sub(ty, rng), ")"]).with("double -"),
            _ => make(pieces!["CAST(", sub(Type::Int, rng), " AS DOUBLE)"]).with("cast"),
        },
        Type::Text => text(scope, depth, rng),
        Type::Bool => predicate(scope, depth, rng),
        Type::Date => make(pieces!["CAST(", sub(Type::Stamp, rng), " AS DATE)"]).with("cast"),
        Type::Stamp => {
            let unit = ["year", "month", "day", "hour"][rng.below(4)];
            // DuckDB makes a date of it.
            let head = format!("CAST(date_trunc('{unit}', ");
            let of = if known::DATE_TRUNC_FAR_AWAY {
                Tree::frame(pieces![sub(ty, rng)])
            } else {
                near_ours(sub(ty, rng))
            };
            make(pieces![head, of, ") AS TIMESTAMP)"]).with("date_trunc")
        }
        Type::Big | Type::Wide => leaf(ty, scope, rng),
    }
}

/// A time, or the beginning of 2024 instead of one that is far away.
fn near_ours(time: Tree) -> Tree {
    let again = time.clone();
    Tree::frame(pieces![
        "CASE WHEN ",
        time,
        " BETWEEN TIMESTAMP '1900-01-01 00:00:00' AND TIMESTAMP '2100-01-01 00:00:00' THEN ",
        again,
        " END"
    ])
}

/// A double, or NULL for one that is not finite.
fn finite(number: Tree) -> Tree {
    let again = number.clone();
    let range = " BETWEEN -1000000000 AND 1000000000 THEN ";
    Tree::frame(pieces!["CASE WHEN ", number, range, again, " END"])
}

fn two(ty: Type, scope: &[Column], depth: usize, rng: &mut Rng) -> (Tree, Tree) {
    let a = expression(ty, scope, depth, rng);
    (a, expression(ty, scope, depth, rng))
}

fn case(ty: Type, scope: &[Column], depth: usize, rng: &mut Rng) -> Tree {
    let (a, b) = two(ty, scope, depth, rng);
    let tree = if rng.coin() {
        let p = predicate(scope, depth, rng);
        let other = Tree::part(pieces![" ELSE ", b]);
        Tree::expression(ty, pieces!["CASE WHEN ", p, " THEN ", a, other, " END"])
    } else {
        let what = any_type(scope, rng);
        let of = expression(what, scope, depth, rng);
        let (x, y) = (what.literal(rng), what.literal(rng));
        let when = format!(" WHEN {y} THEN ");
        let c = leaf(ty, scope, rng);
        Tree::expression(
            ty,
            pieces![
                "CASE ",
                of,
                format!(" WHEN {x} THEN "),
                a,
                Tree::part(pieces![when, b]),
                " ELSE ",
                c,
                " END"
            ],
        )
    };
    tree.with("case")
}

fn int(scope: &[Column], depth: usize, rng: &mut Rng) -> Tree {
    let ty = Type::Int;
    let make = |pieces: Vec<Piece>| Tree::expression(ty, pieces);
    let (a, b) = two(ty, scope, depth, rng);
    match rng.below(10) {
        0 => make(pieces!["(", a, " + ", b, ")"]).with("int +"),
        1 => make(pieces!["(", a, " - ", b, ")"]).with("int -"),
        2 => make(pieces!["(", a, " % 1000 * (", b, " % 1000))"]).with("int *"),
        3 => {
            let by = ["2", "-3", "7"][rng.below(3)];
            let either = Piece::Either(format!(" / {by})"), format!(" // {by})"));
            make(vec!["(".into(), a.into(), either]).with("int /")
        }
        4 => make(pieces!["(", a, format!(" % {})", 2 + rng.below(5))]).with("int %"),
        5 => make(pieces!["abs(", a, ")"]).with("abs"),
        6 => {
            let t = expression(Type::Text, scope, depth, rng);
            make(pieces!["CAST(length(", t, ") AS BIGINT)"]).with("length")
        }
        7 => {
            let p = predicate(scope, depth, rng);
            make(pieces!["CAST(", p, " AS BIGINT)"]).with("cast")
        }
        8 => {
            let (ty, unit) = if rng.coin() {
                (Type::Date, "year")
            } else {
                (Type::Stamp, ["hour", "minute", "day"][rng.below(3)])
            };
            let t = expression(ty, scope, depth, rng);
            make(pieces![
                format!("CAST(extract({unit} FROM "),
                t,
                ") AS BIGINT)"
            ])
            .with("extract")
        }
        _ => {
            let name = if rng.coin() { "greatest" } else { "least" };
            make(pieces![format!("{name}("), a, ", ", b, ")"]).with("greatest")
        }
    }
}

fn text(scope: &[Column], depth: usize, rng: &mut Rng) -> Tree {
    let ty = Type::Text;
    let make = |pieces: Vec<Piece>| Tree::expression(ty, pieces);
    let (a, b) = two(ty, scope, depth, rng);
    match rng.below(7) {
        0 => make(pieces!["(", a, " || ", b, ")"]).with("||"),
        1 => make(pieces!["upper(", a, ")"]).with("upper"),
        2 => make(pieces!["lower(", a, ")"]).with("upper"),
        3 => make(pieces![
            "substr(",
            a,
            format!(", {}, {})", 1 + rng.below(2), rng.below(4))
        ])
        .with("substr"),
        4 => make(pieces!["trim(", a, ")"]).with("trim"),
        5 => make(pieces!["replace(", a, ", 'a', 'xyz')"]).with("replace"),
        _ => {
            let n = expression(Type::Int, scope, depth, rng);
            make(pieces!["CAST(", n, " AS VARCHAR)"]).with("cast")
        }
    }
}

/// A type that some column of the scope has, or any.
pub(crate) fn any_type(scope: &[Column], rng: &mut Rng) -> Type {
    if scope.is_empty() || rng.below(6) == 0 {
        TYPES[rng.below(TYPES.len())]
    } else {
        scope[rng.below(scope.len())].ty
    }
}

/// A condition.
pub(crate) fn predicate(scope: &[Column], depth: usize, rng: &mut Rng) -> Tree {
    let make = |pieces: Vec<Piece>| Tree::expression(Type::Bool, pieces);
    let depth = depth.saturating_sub(1);
    let ty = any_type(scope, rng);
    let kind = if depth == 0 {
        rng.below(6)
    } else {
        rng.below(10)
    };
    match kind {
        0..=2 => {
            let (a, b) = two(ty, scope, depth, rng);
            let sign = ["=", "<>", "<", "<=", ">", ">="][rng.below(6)];
            make(pieces!["(", a, format!(" {sign} "), b, ")"]).with("comparison")
        }
        3 => {
            let a = expression(ty, scope, depth, rng);
            let not = if rng.coin() { "NOT " } else { "" };
            make(pieces!["(", a, format!(" IS {not}NULL)")]).with("is null")
        }
        4 => {
            let a = expression(ty, scope, depth, rng);
            let not = if rng.coin() { "NOT " } else { "" };
            let list: Vec<String> = (0..1 + rng.below(4)).map(|_| ty.literal(rng)).collect();
            make(pieces!["(", a, format!(" {not}IN ({}))", list.join(", "))]).with("in list")
        }
        5 => {
            let (a, b) = two(ty, scope, depth, rng);
            let not = if rng.coin() { "NOT " } else { "" };
            make(pieces!["(", a, format!(" IS {not}DISTINCT FROM "), b, ")"])
                .with("is distinct from")
        }
        6 => {
            let a = predicate(scope, depth, rng);
            make(pieces!["(NOT ", a, ")"]).with("not")
        }
        7 => {
            let word = if rng.coin() { " AND " } else { " OR " };
            let parts = (0..2 + rng.below(2))
                .map(|_| Tree::part(pieces![predicate(scope, depth, rng)]))
                .collect();
            make(vec!["(".into(), Piece::List(parts, word), ")".into()]).with("and or")
        }
        8 => {
            let (a, b) = two(ty, scope, depth, rng);
            let c = leaf(ty, scope, rng);
            make(pieces!["(", a, " BETWEEN ", b, " AND ", c, ")"]).with("between")
        }
        _ => {
            let a = expression(Type::Text, scope, depth, rng);
            let pattern = ["a%", "%", "_", "%b%", "", "é"][rng.below(6)];
            let not = if rng.coin() { "NOT " } else { "" };
            make(pieces!["(", a, format!(" {not}LIKE '{pattern}')")]).with("like")
        }
    }
}
