//! `SHOW …`, `SHOW CREATE`, `DESCRIBE`: the catalog and what runs, as rows.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, RecordBatchOptions, StringArray};
use arrow::datatypes::{DataType, Field, Schema};
use millrace_dataflow::engine::shared::Status;
use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_dataflow::plan::RelationId;
use millrace_sql::bind::DescribeDef;
use millrace_sql::parse::{ObjectKind, Show};
use millrace_sql::sql_name;

use super::world::{Detail, Entry};
use super::{Coordinator, World, backfill};
use crate::api::v1::relations::watermark_text;
use crate::catalog::Kind;
use crate::error::unknown_relation;
use crate::session::Answer;

type Cells = Vec<Option<String>>;

const VIEW_COLUMNS: [&str; 6] = [
    "name",
    "kind",
    "state",
    "rows_out",
    "last_error",
    "backfill",
];

impl Coordinator {
    pub(super) async fn show(&self, world: &World, what: Show) -> Result<Answer> {
        let status: BTreeMap<RelationId, Status> =
            self.status().into_iter().map(|s| (s.id, s)).collect();
        let of = |kinds: &[Kind]| -> Vec<&Entry> {
            world
                .entries
                .values()
                .filter(|e| kinds.contains(&e.object.kind))
                .collect()
        };
        match what {
            Show::Sources => table(
                &[
                    "name",
                    "connector",
                    "state",
                    "watermark",
                    "rows_in",
                    "rejected_rows",
                    "last_error",
                ],
                of(&[Kind::Source])
                    .into_iter()
                    .map(|e| source_cells(e, &status))
                    .collect(),
            ),
            Show::Views => table(
                &VIEW_COLUMNS,
                of(&[Kind::View, Kind::MaterializedView])
                    .into_iter()
                    .map(|e| view_cells(e, &status))
                    .collect(),
            ),
            Show::MaterializedViews => table(
                &VIEW_COLUMNS,
                of(&[Kind::MaterializedView])
                    .into_iter()
                    .map(|e| view_cells(e, &status))
                    .collect(),
            ),
            Show::Sinks => table(
                &[
                    "name",
                    "from",
                    "into",
                    "state",
                    "committed",
                    "last_error",
                    "backfill",
                ],
                of(&[Kind::Sink])
                    .into_iter()
                    .map(|e| sink_cells(e, &status))
                    .collect(),
            ),
            Show::Tables => {
                let tables = self.0.outside.lake.tables(None).await?;
                let rows = tables
                    .into_iter()
                    .map(|t| vec![Some(format!("lake.{t}")), Some(t.namespace), Some(t.name)])
                    .collect();
                table(&["name", "namespace", "table"], rows)
            }
            Show::Jobs => table(
                &[
                    "name",
                    "kind",
                    "state",
                    "lag_ms",
                    "rows_in",
                    "rows_out",
                    "last_error",
                ],
                status
                    .values()
                    .filter(|s| s.kind != "source")
                    .map(job_cells)
                    .collect(),
            ),
            Show::Backfills => backfill::show(status.into_values()),
            Show::All => table(
                &["name", "kind", "state"],
                world
                    .entries
                    .values()
                    .map(|e| {
                        let kind = e.object.kind.as_str().to_string();
                        vec![
                            Some(e.object.name.clone()),
                            Some(kind),
                            Some(state(e, &status)),
                        ]
                    })
                    .collect(),
            ),
        }
    }
}

/// State of an object: the engine's word, `failed` when it was never started, `ready` for a view
/// that is only text.
pub fn state(entry: &Entry, status: &BTreeMap<RelationId, Status>) -> String {
    match (&entry.failed, status.get(&entry.object.id)) {
        (Some(_), _) => "failed".to_string(),
        (None, Some(status)) => status.state.to_string(),
        (None, None) if entry.object.kind == Kind::View => "ready".to_string(),
        (None, None) => "starting".to_string(),
    }
}

/// What went wrong last with an object.
pub fn last_error(entry: &Entry, status: &BTreeMap<RelationId, Status>) -> Option<String> {
    match &entry.failed {
        Some(error) => Some(error.message.clone()),
        None => status
            .get(&entry.object.id)
            .and_then(|s| s.last_error.clone()),
    }
}

fn source_cells(entry: &Entry, status: &BTreeMap<RelationId, Status>) -> Cells {
    let connector = match &entry.detail {
        Detail::Source { connector, .. } => Some(connector.clone()),
        _ => None,
    };
    let live = status.get(&entry.object.id);
    vec![
        Some(entry.object.name.clone()),
        connector,
        Some(state(entry, status)),
        live.and_then(|s| s.watermark).and_then(watermark_text),
        live.map(|s| s.rows_in.to_string()),
        live.map(|s| s.rejected_rows.to_string()),
        last_error(entry, status),
    ]
}

fn view_cells(entry: &Entry, status: &BTreeMap<RelationId, Status>) -> Cells {
    vec![
        Some(entry.object.name.clone()),
        Some(entry.object.kind.as_str().to_string()),
        Some(state(entry, status)),
        status.get(&entry.object.id).map(|s| s.rows_out.to_string()),
        last_error(entry, status),
        status.get(&entry.object.id).and_then(backfill::summary),
    ]
}

fn sink_cells(entry: &Entry, status: &BTreeMap<RelationId, Status>) -> Cells {
    let (from, into) = match &entry.detail {
        Detail::Sink { from, into } => (Some(from.clone()), Some(into.clone())),
        _ => (None, None),
    };
    let committed = status.get(&entry.object.id).and_then(|s| s.committed);
    vec![
        Some(entry.object.name.clone()),
        from,
        into,
        Some(state(entry, status)),
        committed.map(|tick| tick.to_string()),
        last_error(entry, status),
        status.get(&entry.object.id).and_then(backfill::summary),
    ]
}

fn job_cells(status: &Status) -> Cells {
    vec![
        Some(status.name.clone()),
        Some(status.kind.to_string()),
        Some(status.state.to_string()),
        Some(status.lag_ms.to_string()),
        Some(status.rows_in.to_string()),
        Some(status.rows_out.to_string()),
        status.last_error.clone(),
    ]
}

/// `SHOW CREATE`: the stored statement without its secrets.
pub(super) fn show_create(world: &World, kind: Option<ObjectKind>, name: &str) -> Result<Answer> {
    let entry = world
        .entries
        .get(name)
        .ok_or_else(|| unknown_relation(name))?;
    let is = entry.object.kind;
    let fits = match kind {
        None => true,
        Some(ObjectKind::Source) => is == Kind::Source,
        // As in SHOW VIEWS, both kinds of views answer to VIEW.
        Some(ObjectKind::View) => is == Kind::View || is == Kind::MaterializedView,
        Some(ObjectKind::MaterializedView) => is == Kind::MaterializedView,
        Some(ObjectKind::Sink) => is == Kind::Sink,
        Some(ObjectKind::Table) => false,
    };
    if !fits {
        let wanted = kind.map_or("relation", ObjectKind::word);
        return Err(
            Error::new(ErrorKind::Invalid, format!("\"{name}\" is not a {wanted}"))
                .code("42809")
                .hint(format!("it is a {}", is.as_str())),
        );
    }
    let text = millrace_sql::explain::show_create(&entry.object.text);
    table(
        &["name", "create_statement"],
        vec![vec![Some(name.to_string()), Some(text)]],
    )
}

/// `DESCRIBE`: columns and what is known of them.
pub(super) fn describe(def: DescribeDef) -> Result<Answer> {
    let rows = def
        .columns
        .fields()
        .iter()
        .enumerate()
        .map(|(i, field)| {
            let event_time = def.event_time.get(i).is_some_and(Option::is_some);
            vec![
                Some(field.name().clone()),
                Some(sql_name(field.data_type())),
                Some(if event_time { "YES" } else { "NO" }.to_string()),
            ]
        })
        .collect();
    table(&["column", "type", "event_time"], rows)
}

/// Rows of text.
pub(super) fn table(columns: &[&str], rows: Vec<Cells>) -> Result<Answer> {
    let fields: Vec<Field> = columns
        .iter()
        .map(|c| Field::new(*c, DataType::Utf8, true))
        .collect();
    let schema = Arc::new(Schema::new(fields));
    let arrays: Vec<ArrayRef> = (0..columns.len())
        .map(|i| -> ArrayRef {
            Arc::new(
                rows.iter()
                    .map(|row| row.get(i).cloned().flatten())
                    .collect::<StringArray>(),
            )
        })
        .collect();
    let options = RecordBatchOptions::new().with_row_count(Some(rows.len()));
    let batch = RecordBatch::try_new_with_options(Arc::clone(&schema), arrays, &options)
        .map_err(|e| crate::error::from_arrow(&e))?;
    Ok(Answer::rows(schema, vec![batch]))
}
