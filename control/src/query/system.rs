//! The relations `millrace.…`: what the engine says of itself at the moment a query asks.

use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use datafusion::catalog::TableProvider;
use millrace_dataflow::engine::Engine;
use millrace_dataflow::engine::shared::StateRow;
use millrace_dataflow::error::{Error, Result};
use millrace_sql::catalog::system;

use super::memory_table;

/// The system relation of this name.
pub fn table(name: &str, engine: &Engine) -> Result<Arc<dyn TableProvider>> {
    let schema = system::relation(name)
        .ok_or_else(|| Error::internal(format!("there is no relation \"{name}\"")))?;
    let batch = RecordBatch::try_new(Arc::clone(&schema), state(&engine.state()))
        .map_err(|e| crate::error::from_arrow(&e))?;
    memory_table(&schema, vec![batch], 1)
}

/// The columns of `millrace.state`.
fn state(rows: &[StateRow]) -> Vec<ArrayRef> {
    let text = |of: &dyn Fn(&StateRow) -> Option<String>| -> ArrayRef {
        Arc::new(rows.iter().map(of).collect::<StringArray>())
    };
    let number = |of: &dyn Fn(&StateRow) -> Option<u64>| -> ArrayRef {
        let values = rows
            .iter()
            .map(|row| of(row).and_then(|n| i64::try_from(n).ok()));
        Arc::new(values.collect::<Int64Array>())
    };
    let hottest = |row: &StateRow| {
        let groups = row.usage.hottest.iter();
        let texts: Vec<String> = groups.map(|(group, n)| format!("{group}:{n}")).collect();
        row.usage.groups.map(|_| texts.join(" "))
    };
    let since = rows.iter().map(|row| {
        let ms = row.since.and_then(|tick| i64::try_from(tick).ok())?;
        ms.checked_mul(1_000)
    });
    vec![
        text(&|row| Some(row.relation.clone())),
        text(&|row| Some(row.kind.to_string())),
        text(&|row| Some(row.operator.clone())),
        number(&|row| Some(row.worker as u64)),
        number(&|row| Some(row.rows)),
        number(&|row| Some(row.bytes)),
        number(&|row| Some(row.paged)),
        number(&|row| row.usage.groups.map(u64::from)),
        text(&hottest),
        Arc::new(since.collect::<TimestampMicrosecondArray>()),
    ]
}
