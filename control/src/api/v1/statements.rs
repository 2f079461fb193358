//! `POST /api/v1/sql`: a script in, one result per statement out.

use arrow::ipc::writer::StreamWriter;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use datafusion::common::ScalarValue;
use millrace_dataflow::error::{Error, Result};
use millrace_sql::sql_name;

use super::types::{SqlRequest, WireError, parameter};
use super::{csv, json};
use crate::error::{Door, http_status};
use crate::session::{Answer, Outcome, Session};

const ARROW: &str = "application/vnd.apache.arrow.stream";
const CSV: &str = "text/csv";

/// How an answer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Json,
    Csv,
    Arrow,
}

/// A request that has been read.
#[derive(Debug)]
pub struct Request {
    pub sql: String,
    pub params: Vec<ScalarValue>,
    pub format: Format,
}

/// Reads a body; whatever is wrong with it is the client's error.
pub fn read(body: &[u8], headers: &HeaderMap) -> Result<Request> {
    let request: SqlRequest = serde_json::from_slice(body).map_err(|e| {
        Error::invalid("the body is not a request in JSON")
            .code("08P01")
            .detail(e.to_string())
            .hint("send {\"sql\": \"SELECT 1\", \"params\": []}")
    })?;
    let params = request
        .params
        .iter()
        .enumerate()
        .map(|(i, value)| parameter(i, value))
        .collect::<Result<Vec<_>>>()?;
    let format = format(request.format.as_deref(), headers)?;
    if format != Format::Json && Session::count_statements(&request.sql) != 1 {
        return Err(
            Error::unsupported("CSV and Arrow hold the result of a single statement")
                .hint("send one statement, or ask for JSON"),
        );
    }
    Ok(Request {
        sql: request.sql,
        params,
        format,
    })
}

fn format(named: Option<&str>, headers: &HeaderMap) -> Result<Format> {
    match named {
        Some("json") => return Ok(Format::Json),
        Some("csv") => return Ok(Format::Csv),
        Some("arrow") => return Ok(Format::Arrow),
        Some(other) => {
            return Err(
                Error::invalid(format!("unknown format \"{}\"", other.escape_default()))
                    .hint("json, csv or arrow"),
            );
        }
        None => {}
    }
    // The first type we know wins; nobody sends weights here.
    let accept = headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|v| v.to_str().ok());
    for kind in accept.flat_map(|value| value.split(',')) {
        match kind.split(';').next().unwrap_or_default().trim() {
            ARROW => return Ok(Format::Arrow),
            CSV => return Ok(Format::Csv),
            "application/json" | "*/*" => return Ok(Format::Json),
            _ => {}
        }
    }
    Ok(Format::Json)
}

/// Writes what a script gave.
pub fn respond(outcome: Outcome, format: Format) -> Response {
    match (outcome.error.is_none(), format, outcome.answers.as_slice()) {
        (true, Format::Csv, [answer]) => {
            let text = csv::write(&answer.schema, &answer.batches);
            with_tick(
                answer,
                ([(header::CONTENT_TYPE, "text/csv; charset=utf-8")], text),
            )
        }
        (true, Format::Arrow, [answer]) => match arrow(answer) {
            Ok(bytes) => with_tick(answer, ([(header::CONTENT_TYPE, ARROW)], bytes)),
            Err(error) => respond_json(&Outcome {
                answers: Vec::new(),
                error: Some((0, error)),
            }),
        },
        _ => respond_json(&outcome),
    }
}

/// The tick travels as a header where the body has no room for it.
fn with_tick(answer: &Answer, response: impl IntoResponse) -> Response {
    let mut response = response.into_response();
    if let Some(tick) = answer.tick {
        response.headers_mut().insert("millrace-tick", tick.into());
    }
    if !answer.notices.is_empty() {
        response
            .headers_mut()
            .insert("millrace-notices", answer.notices.len().into());
    }
    response
}

fn arrow(answer: &Answer) -> Result<Vec<u8>> {
    let failed = |e| crate::error::from_arrow(&e);
    let mut writer = StreamWriter::try_new(Vec::new(), &answer.schema).map_err(failed)?;
    for batch in &answer.batches {
        writer.write(batch).map_err(failed)?;
    }
    writer.into_inner().map_err(failed)
}

fn respond_json(outcome: &Outcome) -> Response {
    let status = match &outcome.error {
        Some((_, error)) => http_status(error.kind, Door::Sql),
        None => StatusCode::OK,
    };
    let body = write_outcome(outcome);
    let mut response = (status, [(header::CONTENT_TYPE, "application/json")], body).into_response();
    if status == StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert(header::RETRY_AFTER, 1.into());
    }
    response
}

/// `{"results": […], "error": …}`.
fn write_outcome(outcome: &Outcome) -> String {
    let mut out = String::from("{\"results\":[");
    for (i, answer) in outcome.answers.iter().enumerate() {
        if i > 0 {
            out.push(',');
        }
        write_answer(&mut out, answer);
    }
    out.push(']');
    if let Some((statement, error)) = &outcome.error {
        out.push_str(",\"error\":");
        write(&mut out, &WireError::new(error, Some(*statement)));
    }
    out.push('}');
    out
}

fn write_answer(out: &mut String, answer: &Answer) {
    out.push_str("{\"columns\":[");
    for (i, field) in answer.schema.fields().iter().enumerate() {
        if i > 0 {
            out.push(',');
        }
        out.push_str("{\"name\":");
        json::write_string(out, field.name());
        out.push_str(",\"type\":");
        json::write_string(out, &sql_name(field.data_type()));
        out.push('}');
    }
    out.push_str("],\"rows\":");
    json::write_rows(out, &answer.batches);
    out.push_str(",\"rows_affected\":");
    write(out, &answer.rows_affected);
    out.push_str(",\"tick\":");
    write(out, &answer.tick);
    if !answer.snapshots.is_empty() {
        out.push_str(",\"snapshots\":");
        // Snapshot ids are random 64-bit numbers: text, so that no client rounds them.
        let snapshots: std::collections::BTreeMap<_, _> = answer
            .snapshots
            .iter()
            .map(|(name, id)| (name, id.to_string()))
            .collect();
        write(out, &snapshots);
    }
    out.push_str(",\"elapsed_ms\":");
    write(out, &(answer.elapsed.as_micros() as f64 / 1_000.0));
    if !answer.notices.is_empty() {
        out.push_str(",\"notices\":");
        write(out, &answer.notices);
    }
    out.push('}');
}

fn write(out: &mut String, value: &impl serde::Serialize) {
    out.push_str(&serde_json::to_string(value).expect("wire types have text keys"));
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{Int64Array, RecordBatch};
    use arrow::datatypes::{DataType, Field, Schema};

    use super::*;
    use crate::session::Notice;

    fn answer() -> Answer {
        let schema = Arc::new(Schema::new(vec![Field::new("n", DataType::Int64, true)]));
        let column = Arc::new(Int64Array::from(vec![1, 2]));
        let batch = RecordBatch::try_new(Arc::clone(&schema), vec![column]).expect("fits");
        let mut answer = Answer::rows(schema, vec![batch]);
        answer.tick = Some(7);
        answer.notice(Notice::warning("careful"))
    }

    #[test]
    fn an_answer_has_the_promised_form() {
        let outcome = Outcome {
            answers: vec![Answer::done(), answer()],
            error: Some((2, crate::error::unknown_relation("t").position(5))),
        };
        let value: serde_json::Value =
            serde_json::from_str(&write_outcome(&outcome)).expect("JSON");
        assert_eq!(value["results"][0]["rows"], serde_json::json!([]));
        assert_eq!(value["results"][0]["rows_affected"], 0);
        let rows = &value["results"][1];
        assert_eq!(
            rows["columns"],
            serde_json::json!([{"name": "n", "type": "BIGINT"}])
        );
        assert_eq!(rows["rows"], serde_json::json!([[1], [2]]));
        assert_eq!(rows["tick"], 7);
        assert!(rows["elapsed_ms"].is_number());
        assert_eq!(rows["notices"][0]["message"], "careful");
        let error = &value["error"];
        assert_eq!(
            (&error["code"], &error["statement"], &error["position"]),
            (&"42P01".into(), &2.into(), &5.into())
        );
    }

    #[test]
    fn single_results_leave_as_csv_and_arrow() {
        let outcome = || Outcome {
            answers: vec![answer()],
            error: None,
        };
        let response = respond(outcome(), Format::Csv);
        assert_eq!(
            response.headers()[header::CONTENT_TYPE],
            "text/csv; charset=utf-8"
        );
        assert_eq!(response.headers()["millrace-tick"], "7");
        let bytes = arrow(&answer()).expect("written");
        let mut reader =
            arrow::ipc::reader::StreamReader::try_new(bytes.as_slice(), None).expect("a stream");
        assert_eq!(
            reader.next().expect("one batch").expect("read").num_rows(),
            2
        );
    }

    #[test]
    fn bodies_that_are_no_requests_are_the_clients_error() {
        let headers = HeaderMap::new();
        let deep = "[".repeat(100_000);
        let nested = format!("{{\"sql\":\"SELECT 1\",\"params\":[{deep}");
        for body in [
            &b"\xff\xfe"[..],
            b"",
            b"[]",
            b"{\"sql\": 5}",
            b"{\"sql\":\"x\",\"limit\":1}",
            b"{\"sql\":\"x\",\"format\":\"xml\"}",
            nested.as_bytes(),
            b"{\"sql\":\"x\",\"params\":[{}]}",
        ] {
            let error = read(body, &headers).expect_err("refused");
            assert_eq!(http_status(error.kind, Door::Sql), StatusCode::BAD_REQUEST);
        }
    }

    #[test]
    fn accept_chooses_the_format() {
        let mut headers = HeaderMap::new();
        headers.insert(
            header::ACCEPT,
            "text/html, text/csv;q=0.5".parse().expect("header"),
        );
        assert_eq!(format(None, &headers).expect("known"), Format::Csv);
        assert_eq!(
            format(Some("arrow"), &headers).expect("known"),
            Format::Arrow
        );
        assert_eq!(
            format(None, &HeaderMap::new()).expect("known"),
            Format::Json
        );
    }
}
