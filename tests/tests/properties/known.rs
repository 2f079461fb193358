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
pub(crate) const LATERAL_COUNT: bool = false;
