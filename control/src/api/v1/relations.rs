//! `GET /api/v1/{views,sources,sinks,jobs,backfills,planes}` and `…/{name}`: what exists and how it runs.

use std::collections::BTreeMap;

use millrace_dataflow::engine::backfill::BackfillStatus;
use millrace_dataflow::engine::shared::Status;
use millrace_dataflow::plan::RelationId;
use millrace_dataflow::time::{END_OF_TIME, NO_WATERMARK};
use serde_json::{Value, json};

use super::json;
use crate::catalog::Kind;
use crate::coordinator::show::{last_error, state};
use crate::coordinator::{Coordinator, Entry};
use crate::metrics::resident_bytes;

/// A list of relations that can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    Views,
    Sources,
    Sinks,
    Jobs,
    Backfills,
    /// Data planes: processes and workers.
    Planes,
}

impl Resource {
    /// The word in the path, and the key of the list in the answer.
    pub fn word(self) -> &'static str {
        match self {
            Self::Views => "views",
            Self::Sources => "sources",
            Self::Sinks => "sinks",
            Self::Jobs => "jobs",
            Self::Backfills => "backfills",
            Self::Planes => "planes",
        }
    }
}

/// `{"views": […]}` and so on.
pub fn list(coordinator: &Coordinator, resource: Resource) -> Value {
    json!({ resource.word(): rows(coordinator, resource) })
}

/// One of them, by name.
pub fn one(coordinator: &Coordinator, resource: Resource, name: &str) -> Option<Value> {
    rows(coordinator, resource)
        .into_iter()
        .find(|row| row["name"] == name)
}

fn rows(coordinator: &Coordinator, resource: Resource) -> Vec<Value> {
    if resource == Resource::Backfills {
        return backfills(coordinator);
    }
    let world = coordinator.world();
    let status: BTreeMap<RelationId, Status> = coordinator
        .status()
        .into_iter()
        .map(|s| (s.id, s))
        .collect();
    let kinds: &[Kind] = match resource {
        Resource::Views => &[Kind::View, Kind::MaterializedView],
        Resource::Sources => &[Kind::Source],
        Resource::Sinks => &[Kind::Sink],
        Resource::Jobs | Resource::Backfills => &[Kind::MaterializedView, Kind::Sink],
        Resource::Planes => return vec![plane(coordinator)],
    };
    let mut rows = Vec::new();
    for entry in world.entries.values() {
        if kinds.contains(&entry.object.kind) {
            rows.push(relation(
                entry,
                entry.object.id,
                entry.object.kind.as_str(),
                &status,
            ));
        }
        // A view under a name of the lake is a view and the sink that publishes it.
        if let Some(sink) = entry.object.companion
            && matches!(resource, Resource::Sinks | Resource::Jobs)
        {
            rows.push(relation(entry, sink, "sink", &status));
        }
    }
    rows
}

/// The one data plane of this server. Its first process is the service itself.
fn plane(coordinator: &Coordinator) -> Value {
    let config = coordinator.config();
    let resident = std::iter::once(resident_bytes()).chain(coordinator.resident_bytes());
    let processes: Vec<Value> = resident
        .enumerate()
        .map(|(process, bytes)| json!({"process": process, "resident_bytes": bytes}))
        .collect();
    json!({
        "name": "default",
        "state": "running",
        "workers": config.workers,
        "processes": processes,
    })
}

fn relation(
    entry: &Entry,
    id: RelationId,
    kind: &str,
    status: &BTreeMap<RelationId, Status>,
) -> Value {
    let live = status.get(&id);
    let state = match (id == entry.object.id, live) {
        (false, Some(live)) => live.state.to_string(),
        _ => state(entry, status),
    };
    let error = match (id == entry.object.id, live) {
        (false, Some(live)) => live.last_error.clone(),
        _ => last_error(entry, status),
    };
    let mut row = json!({
        "name": entry.object.name,
        "id": id.to_string(),
        "kind": kind,
        "state": state,
        "last_error": error,
        "depends_on": entry.object.depends_on,
        "created": json::timestamp(i64::try_from(entry.object.created_ms).unwrap_or(i64::MAX), 1_000),
        "sql": millrace_sql::explain::show_create(&entry.object.text),
    });
    if let (Some(live), Some(row)) = (live, row.as_object_mut()) {
        let facts = json!({
            "frontier": live.frontier,
            "watermark": live.watermark.and_then(watermark_text),
            "lag_ms": live.lag_ms,
            "lag_offsets": live.lag_offsets,
            "rows_in": live.rows_in,
            "rows_out": live.rows_out,
            "bytes_in": live.bytes_in,
            "bytes_out": live.bytes_out,
            "state_rows": live.state_rows,
            "state_bytes": live.state_bytes,
            "state_swapped_bytes": live.state_swapped_bytes,
            "operators": live.operators.iter().map(|(name, size)| json!({"operator": name, "rows": size.rows, "bytes": size.bytes, "swapped_bytes": size.swapped})).collect::<Vec<_>>(),
            "late_rows": live.late_rows,
            "rejected_rows": live.rejected_rows,
            "error_rows": live.error_rows,
            "offsets": live.offsets,
            "committed": live.committed,
            "backfill": live.backfill.as_ref().map(backfill),
            "commit_interval_ms": live.commit_interval_ms,
            "held_since": live.held_since,
        });
        if let Value::Object(facts) = facts {
            row.extend(facts);
        }
    }
    row
}

/// What is read of history, and how far that is.
fn backfill(backfill: &BackfillStatus) -> Value {
    let inputs = backfill.inputs.iter().map(|input| {
        json!({"name": input.name, "unit": input.unit, "done": input.done, "total": input.total})
    });
    json!({
        "what": backfill.what,
        "phase": backfill.phase,
        "rows": backfill.rows,
        "rows_per_s": backfill.rows_per_s,
        "elapsed_ms": backfill.elapsed_ms,
        "done": backfill.done,
        "total": backfill.total,
        "percent": backfill.percent,
        "inputs": inputs.collect::<Vec<_>>(),
    })
}

/// What reads history, also what is no object yet because its creation has not ended.
fn backfills(coordinator: &Coordinator) -> Vec<Value> {
    let rows = coordinator.status().into_iter().filter_map(|status| {
        let mut row = backfill(status.backfill.as_ref()?);
        row["name"] = status.name.into();
        row["kind"] = status.kind.into();
        row["last_error"] = status.last_error.into();
        Some(row)
    });
    rows.collect()
}

/// A watermark for people: RFC 3339, `infinity` for a source that has ended.
pub fn watermark_text(watermark: i64) -> Option<String> {
    match watermark {
        NO_WATERMARK => None,
        END_OF_TIME => Some("infinity".to_string()),
        moment => Some(json::timestamp(moment, 1_000_000)),
    }
}
