//! `SUBSCRIBE TO v`: JSON lines without an end.
//!
//! ```text
//! {"columns":[{"name":"n","type":"BIGINT"}],"tick":7}      once, first
//! {"tick":7,"diff":1,"row":[3]}                            contents at that tick, each row +1
//! {"tick":7,"complete":true}                               all of the tick was said
//! {"tick":9,"diff":-1,"row":[3]}                           then the changes, tick by tick
//! {"tick":9,"diff":1,"row":[4]}
//! {"tick":9,"complete":true}
//! {"error":{"code":"53400","message":"…"}}                 last, if the stream ends early
//! ```
//!
//! Within a tick a row appears once, with its net diff; retractions come before insertions.

use std::collections::BTreeMap;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use millrace_dataflow::delta::Delta;
use millrace_dataflow::engine::subscribe::Subscription;
use millrace_dataflow::error::Error;
use millrace_dataflow::time::Tick;
use millrace_sql::sql_name;
use tokio::sync::watch;

use super::json;
use super::types::WireError;

const JSON_LINES: &str = "application/x-ndjson";

struct Lines {
    subscription: Subscription,
    /// Said before anything else.
    first: Option<String>,
    stopped: watch::Receiver<bool>,
    ended: bool,
}

/// The stream of a subscription; it ends with its client, its relation or the server.
pub fn respond(
    schema: &SchemaRef,
    mut subscription: Subscription,
    stopped: watch::Receiver<bool>,
) -> Response {
    let contents = std::mem::take(&mut subscription.contents);
    let mut first = header_line(schema, subscription.tick);
    let rows = contents.iter().map(|batch| (batch, None));
    write_tick(&mut first, subscription.tick, rows);
    let lines = Lines {
        subscription,
        first: Some(first),
        stopped,
        ended: false,
    };
    let stream = futures::stream::unfold(lines, |mut lines| async move {
        let text = lines.next().await?;
        Some((Ok::<_, std::convert::Infallible>(Bytes::from(text)), lines))
    });
    (
        [(header::CONTENT_TYPE, JSON_LINES)],
        Body::from_stream(stream),
    )
        .into_response()
}

impl Lines {
    async fn next(&mut self) -> Option<String> {
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        if self.ended {
            return None;
        }
        let changes = tokio::select! {
            changes = self.subscription.next() => changes,
            // An error means that the server itself is gone.
            _ = self.stopped.wait_for(|stop| *stop) => {
                self.ended = true;
                return Some(error_line(&crate::error::stopping()));
            }
        };
        match changes {
            Ok(Some((tick, deltas))) => {
                let mut text = String::new();
                write_tick(&mut text, tick, deltas.iter().map(|d| (&d.batch, Some(d))));
                Some(text)
            }
            Ok(None) => {
                self.ended = true;
                Some(error_line(&crate::error::gone()))
            }
            Err(error) => {
                self.ended = true;
                Some(error_line(&error))
            }
        }
    }
}

fn header_line(schema: &SchemaRef, tick: Tick) -> String {
    let mut out = String::from("{\"columns\":[");
    for (i, field) in schema.fields().iter().enumerate() {
        if i > 0 {
            out.push(',');
        }
        out.push_str("{\"name\":");
        json::write_string(&mut out, field.name());
        out.push_str(",\"type\":");
        json::write_string(&mut out, &sql_name(field.data_type()));
        out.push('}');
    }
    out.push_str(&format!("],\"tick\":{tick}}}\n"));
    out
}

/// The net changes of a tick; batches without a delta are insertions.
fn write_tick<'a>(
    out: &mut String,
    tick: Tick,
    changes: impl Iterator<Item = (&'a RecordBatch, Option<&'a Delta>)>,
) {
    let mut net = BTreeMap::<String, i64>::new();
    for (batch, delta) in changes {
        for row in 0..batch.num_rows() {
            let mut text = String::new();
            json::write_row(&mut text, batch, row);
            *net.entry(text).or_default() += delta.map_or(1, |d| d.diffs.get(row));
        }
    }
    for insertions in [false, true] {
        let some = net.iter().filter(|(_, diff)| **diff != 0);
        for (row, diff) in some.filter(|(_, diff)| (**diff > 0) == insertions) {
            out.push_str(&format!(
                "{{\"tick\":{tick},\"diff\":{diff},\"row\":{row}}}\n"
            ));
        }
    }
    out.push_str(&format!("{{\"tick\":{tick},\"complete\":true}}\n"));
}

fn error_line(error: &Error) -> String {
    let error = serde_json::json!({ "error": WireError::new(error, None) });
    format!("{error}\n")
}
