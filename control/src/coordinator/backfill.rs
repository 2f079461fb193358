//! `CANCEL BACKFILL` and `SHOW BACKFILLS`: what reads history.

use std::sync::Arc;

use millrace_dataflow::engine::backfill::Backfill;
use millrace_dataflow::engine::shared::Status;
use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_sql::parse::{Drop, ObjectKind};

use super::show::table;
use super::{Coordinator, World};
use crate::session::Answer;

impl Coordinator {
    /// Calls off what reads history for `name`; returns once nothing of it is left.
    pub(super) async fn cancel_backfill(&self, name: &str) -> Result<Answer> {
        let not_now = |text: String| Error::new(ErrorKind::Conflict, text).code("55000");
        let found = self.0.engine.backfills(name);
        if found.is_empty() && !self.world().entries.contains_key(name) {
            return Err(crate::error::unknown_relation(name));
        }
        if found.is_empty() {
            return Err(not_now(format!("\"{name}\" reads no history"))
                .hint("SHOW BACKFILLS lists what does"));
        }
        if found.iter().any(|backfill| !backfill.asked) {
            return Err(not_now(format!(
                "\"{name}\" is read again since the start of the server"
            ))
            .detail("it exists, and no statement waits for it")
            .hint("drop it, if it is not wanted any more"));
        }
        if !cancel(&found) {
            return Err(not_now(format!("the backfill of \"{name}\" is complete"))
                .detail("what it has read is being put in its place, with a checkpoint")
                .hint("wait until SHOW BACKFILLS does not list it any more"));
        }
        self.0.busy.ended(name).await;
        Ok(Answer::done())
    }

    /// A DROP calls off the creation or the replacement of what it drops, instead of waiting for it.
    /// The names of which nothing will be left.
    pub(super) async fn cancel_for_drop(&self, world: &World, statement: &Drop) -> Vec<String> {
        let mut gone = Vec::new();
        for name in &statement.names {
            let exists = world.entries.contains_key(name);
            let used = !world.readers(name).is_empty();
            let mut found = self.0.engine.backfills(name);
            let kind = match statement.kind {
                ObjectKind::MaterializedView => "view",
                ObjectKind::Sink => "sink",
                _ => continue,
            };
            found.retain(|b| b.asked && (b.kind == kind || kind == "view"));
            // A drop that will be refused has called off nothing.
            if exists && used && !statement.cascade {
                continue;
            }
            if cancel(&found) {
                self.0.busy.ended(name).await;
                if !exists {
                    gone.push(name.clone());
                }
            }
        }
        gone
    }
}

fn cancel(found: &[Arc<Backfill>]) -> bool {
    found.iter().fold(false, |any, one| one.cancel() || any)
}

/// One line of what a relation's backfill has done.
pub(super) fn summary(status: &Status) -> Option<String> {
    let backfill = status.backfill.as_ref()?;
    Some(format!(
        "{}: {} % ({} of {}), {} rows/s",
        backfill.what, backfill.percent, backfill.done, backfill.total, backfill.rows_per_s
    ))
}

/// `SHOW BACKFILLS`.
pub(super) fn show(status: impl Iterator<Item = Status>) -> Result<Answer> {
    let rows = status
        .filter_map(|s| {
            let backfill = s.backfill?;
            Some(vec![
                Some(s.name),
                Some(s.kind.to_string()),
                Some(backfill.what.to_string()),
                Some(backfill.phase.to_string()),
                Some(backfill.percent.to_string()),
                Some(backfill.done.to_string()),
                Some(backfill.total.to_string()),
                Some(backfill.rows.to_string()),
                Some(backfill.rows_per_s.to_string()),
                Some(backfill.elapsed_ms.to_string()),
                s.last_error,
            ])
        })
        .collect();
    let columns = [
        "name",
        "kind",
        "what",
        "phase",
        "percent",
        "done",
        "total",
        "rows",
        "rows_per_s",
        "elapsed_ms",
        "last_error",
    ];
    table(&columns, rows)
}
