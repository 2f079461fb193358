//! When groups close, in which table they are until then, and which rows come too late for them.

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray};
use arrow::buffer::BooleanBuffer;
use arrow::datatypes::TimestampMicrosecondType;

use super::order::Time;
use crate::plan::{CloseRule, Emit};
use crate::time::{END_OF_TIME, NO_WATERMARK, Watermark};

/// Values of the close key that share a table under EMIT CHANGES, where nothing is said of a group that
/// closes. A raw event time as key would otherwise make a table of hardly any rows per microsecond.
const GRAIN_US: i64 = 1_000_000;

/// The table in which groups of this value of the close key are.
pub(crate) fn table_of(emit: Emit, at: Time) -> Time {
    match emit {
        Emit::Changes => at.map(|at| at.saturating_sub(at.rem_euclid(GRAIN_US))),
        Emit::OnClose => at,
    }
}

/// How far behind the value that names it a table is closed: with the last group it may hold.
pub(crate) fn closes_after(rule: CloseRule, lateness_us: i64, emit: Emit) -> i64 {
    let past = rule.delay_us.saturating_add(lateness_us);
    match emit {
        Emit::Changes => past.saturating_add(GRAIN_US - 1),
        Emit::OnClose => past,
    }
}

/// Values of the close key below this one are closed.
pub(crate) fn open_from(rule: Option<CloseRule>, lateness_us: i64, watermark: Watermark) -> i64 {
    match (rule, watermark) {
        (None, _) | (_, NO_WATERMARK) => i64::MIN,
        (_, END_OF_TIME) => END_OF_TIME,
        (Some(rule), watermark) => {
            // value + past <= watermark
            let past = rule.delay_us.saturating_add(lateness_us);
            watermark
                .checked_sub(past)
                .map_or(i64::MIN, |last| last.saturating_add(1))
        }
    }
}

/// Rows with a value below `open`; `None` when there is none. A row without a time is not late.
pub(crate) fn late(column: &ArrayRef, open: i64) -> Option<BooleanArray> {
    if open == i64::MIN {
        return None;
    }
    let times = column.as_primitive::<TimestampMicrosecondType>();
    let late: BooleanBuffer = times.values().iter().map(|value| *value < open).collect();
    let late = match times.nulls() {
        Some(nulls) => &late & nulls.inner(),
        None => late,
    };
    (late.count_set_bits() > 0).then(|| BooleanArray::new(late, None))
}

/// The other rows of a mask without nulls.
pub(crate) fn not(mask: &BooleanArray) -> BooleanArray {
    BooleanArray::new(!mask.values(), None)
}
