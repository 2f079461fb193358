//! The functions of the dialect: DataFusion's, with ours in place of some.
//!
//! * `sum`, `avg` (`mean`): exact, see `functions::sum`.
//! * Functions that make timestamps give microseconds, as every timestamp here has.
//! * What can make long values of short ones has a bound, see `functions::bounded`.
//! * Names PostgreSQL users expect and DataFusion does not know.

mod bounded;
mod length;
mod single;
mod sum;
mod time;

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use datafusion::execution::SessionStateDefaults;
use datafusion::logical_expr::planner::ExprPlanner;
use datafusion::logical_expr::{AggregateUDF, ScalarUDF, WindowUDF};

pub(crate) use bounded::check_concat;
pub(crate) use length::at_most;
pub(crate) use single::single_row;
pub(crate) use sum::{Fold, Total};

/// Functions by name, aliases included.
#[derive(Debug)]
pub(crate) struct Functions {
    pub(crate) scalar: HashMap<String, Arc<ScalarUDF>>,
    pub(crate) aggregate: HashMap<String, Arc<AggregateUDF>>,
    pub(crate) window: HashMap<String, Arc<WindowUDF>>,
    pub(crate) planners: Vec<Arc<dyn ExprPlanner>>,
}

/// PostgreSQL's name, DataFusion's name.
const ALIASES: &[(&str, &str)] = &[
    ("ceiling", "ceil"),
    ("char_length", "character_length"),
    ("pow", "power"),
    ("sign", "signum"),
    ("gen_random_uuid", "uuid"),
    ("every", "bool_and"),
    ("timezone", "to_local_time"),
];

static FUNCTIONS: LazyLock<Functions> = LazyLock::new(|| {
    let mut scalar = HashMap::new();
    for function in SessionStateDefaults::default_scalar_functions() {
        let function = bounded::bounded(time::in_microseconds(function));
        for name in
            std::iter::once(function.name()).chain(function.aliases().iter().map(String::as_str))
        {
            scalar.insert(name.to_string(), Arc::clone(&function));
        }
    }
    let mut aggregate = HashMap::new();
    for function in SessionStateDefaults::default_aggregate_functions() {
        for name in
            std::iter::once(function.name()).chain(function.aliases().iter().map(String::as_str))
        {
            aggregate.insert(name.to_string(), Arc::clone(&function));
        }
    }
    for function in [Total::udaf(Fold::Sum), Total::udaf(Fold::Average)] {
        for name in
            std::iter::once(function.name()).chain(function.aliases().iter().map(String::as_str))
        {
            aggregate.insert(name.to_string(), Arc::clone(&function));
        }
    }
    for (alias, name) in ALIASES {
        if let Some(function) = scalar.get(*name).cloned() {
            scalar.entry((*alias).to_string()).or_insert(function);
        }
        if let Some(function) = aggregate.get(*name).cloned() {
            aggregate.entry((*alias).to_string()).or_insert(function);
        }
    }
    let mut window = HashMap::new();
    for function in SessionStateDefaults::default_window_functions() {
        for name in
            std::iter::once(function.name()).chain(function.aliases().iter().map(String::as_str))
        {
            window.insert(name.to_string(), Arc::clone(&function));
        }
    }
    Functions {
        scalar,
        aggregate,
        window,
        planners: SessionStateDefaults::default_expr_planners(),
    }
});

/// The registry; the same for views and queries.
pub(crate) fn functions() -> &'static Functions {
    &FUNCTIONS
}

/// Functions of which every argument of the right type has a value: no error can come of them.
pub(crate) fn is_total(name: &str) -> bool {
    matches!(
        name,
        "abs_float"
            | "ascii"
            | "bit_length"
            | "btrim"
            | "character_length"
            | crate::checked::CONCAT
            | "coalesce"
            | "concat"
            | "concat_ws"
            | "date_part"
            | "date_trunc"
            | "ends_with"
            | "greatest"
            | "initcap"
            | "isnan"
            | "iszero"
            | "least"
            | "left"
            | "lower"
            | "ltrim"
            | "md5"
            | "nanvl"
            | "nullif"
            | "nvl"
            | "octet_length"
            | "reverse"
            | "right"
            | "rtrim"
            | "split_part"
            | "starts_with"
            | "strpos"
            | "substr"
            | "upper"
    )
}
