//! `EXPLAIN`: the stages of a plan as lines of text.

use millrace_dataflow::error::Result;
use millrace_sql::bind::ExplainDef;
use millrace_sql::guard::Policy;

use super::show::table;
use crate::session::Answer;

/// One row per line, as PostgreSQL does.
pub(super) fn explain(def: ExplainDef, policy: &Policy) -> Result<Answer> {
    let text = millrace_sql::explain::explain(def, policy)?;
    let rows = text
        .lines()
        .map(|line| vec![Some(line.to_string())])
        .collect();
    table(&["plan"], rows)
}
