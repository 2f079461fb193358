//! What the generator leaves out: limits that `docs/reference/sql.md` names, and defects that are not
//! mended yet. Set one to `true` when it is.

/// One-shot queries group -0 and 0 apart and leave NaN out of `max`; views do as PostgreSQL.
pub(crate) const BATCH_DOUBLE_KEYS: bool = false;
/// A ROLLUP over no rows has no row for the grand total.
pub(crate) const EMPTY_GRAND_TOTAL: bool = false;
/// A grouping set that is named twice counts once.
pub(crate) const EQUAL_GROUPING_SETS: bool = false;
/// `median` of integers is an integer.
pub(crate) const MEDIAN_OF_INTEGERS: bool = false;
/// LATERAL over `count` is refused.
pub(crate) const LATERAL_COUNT: bool = true;
/// A correlated subquery in FROM that gives a column a name which its condition uses for another one:
/// `LATERAL (SELECT u.b AS a FROM u WHERE u.a = t.a)` is refused, "a" being ambiguous (42702).
pub(crate) const CORRELATED_NAMES: bool = true;
/// `last_value(x ORDER BY 0)`: a constant in the order of an aggregate is taken for a place (42P10).
pub(crate) const CONSTANT_ORDER: bool = false;
/// `date_trunc` of a time far from 1970 is off by centuries (it passes through nanoseconds):
/// `date_trunc('year', TIMESTAMP '9999-12-31 00:00:00')` gives 1816.
pub(crate) const DATE_TRUNC_FAR_AWAY: bool = false;
/// `SELECT t.b AS a, unnest(ARRAY[1]) FROM t`, where t has a column a: "a" is ambiguous (42702).
pub(crate) const UNNEST_RENAMES: bool = false;
/// `CAST(TIMESTAMP … AS VARCHAR)` has a `T` between date and time, PostgreSQL a blank.
pub(crate) const TEXT_OF_TIMES: bool = false;
/// `rank() OVER (ORDER BY d)` takes -0 and 0 for different, also in views.
pub(crate) const RANKS_OF_DOUBLES: bool = false;
/// NaN that arithmetic made (`Infinity - Infinity`) is less than all numbers, as its sign bit is set.
pub(crate) const NAN_OF_ARITHMETIC: bool = false;
/// Comparisons of expressions take -0 for less than 0 (`-d <= d` is false for a d of 0), also in views.
pub(crate) const MINUS_ZERO: bool = false;
/// A correlated condition over columns of which one is BIGINT and the other DECIMAL is refused (42804):
/// `UNION` of BIGINT and `row_number()` makes such a column.
pub(crate) const CORRELATED_TYPES: bool = false;
/// INTERSECT ALL and EXCEPT ALL within WITH RECURSIVE are refused, with a message of the planner (42P10).
pub(crate) const RECURSION_OVER_JOINS: bool = false;
/// A key that is constant counts as none: `SELECT 'b', count(*) FROM t GROUP BY 1` over no rows gives a row.
pub(crate) const CONSTANT_KEYS: bool = true;
/// One-shot queries take a constant for one that ROLLUP has made null, and leave it out of an order.
pub(crate) const BATCH_ROLLUP_CONSTANTS: bool = false;
/// One-shot queries on several workers put the values of one aggregate in the order of another one:
/// `string_agg(a, ',' ORDER BY a), string_agg(a, ',' ORDER BY a DESC)`.
pub(crate) const BATCH_SEVERAL_ORDERS: bool = false;
/// One-shot queries lose the null of `SELECT DISTINCT … ORDER BY … LIMIT`.
pub(crate) const BATCH_TOPK_NULLS: bool = false;

/// Refusals that are known, by SQLSTATE and a part of the message. They are counted, not reported.
pub(crate) const REFUSALS: &[(&str, &str)] = &[
    // Two aggregates whose arguments fold to the same constant: `stddev(1 + 1), stddev(2)`.
    ("42701", "is specified more than once"),
    // Windows of a relation whose condition folds to false: the relation is gone, and its watermark.
    ("42P10", "has no watermark"),
    // One-shot queries: nullability and names that the optimizer changes, with scalar subqueries, VALUES
    // and DISTINCT beneath.
    ("0A000", "this statement cannot be planned"),
    // A set operation over `CASE … ELSE string_agg(…)` of which the CASE folds away.
    ("XX000", "a set operation over different columns"),
    // A correlated condition over a column that UNION has made DECIMAL of BIGINT and `row_number()`.
    (
        "42804",
        "the sides of a join condition have different types",
    ),
];

pub(crate) fn refusal(error: &serde_json::Value) -> bool {
    let text = |name: &str| error[name].as_str().unwrap_or_default();
    REFUSALS
        .iter()
        .any(|(code, part)| text("code") == *code && text("message").contains(part))
}
