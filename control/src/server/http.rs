//! The HTTP door: routes, limits, JSON errors for everything that goes wrong.

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection};
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use millrace_dataflow::error::{Error, ErrorKind};
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::Service;
use crate::api::v1::relations::{self, Resource};
use crate::api::v1::types::WireError;
use crate::api::v1::{statements, subscribe};
use crate::error::{Door, http_status};
use crate::metrics;
use crate::session::Session;

const PAGE: &str = include_str!("page.html");

type Shared = State<Arc<Service>>;

/// Serves until told to stop, then lets running requests end.
pub async fn serve(
    listener: TcpListener,
    service: Arc<Service>,
    mut stopped: watch::Receiver<bool>,
) -> std::io::Result<()> {
    let listener = listener.tap_io(|stream| {
        // Small answers should not wait for more.
        let _ = stream.set_nodelay(true);
    });
    axum::serve(listener, router(service))
        .with_graceful_shutdown(async move {
            // An error means that the server itself is gone.
            let _ = stopped.wait_for(|stop| *stop).await;
        })
        .await
}

/// All routes.
pub fn router(service: Arc<Service>) -> Router {
    let limit = service.config.max_body;
    Router::new()
        .route("/", get(|| async { Html(PAGE) }))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(show_metrics))
        .route("/api/v1/sql", post(sql))
        .route("/api/v1/{resource}", get(list))
        .route("/api/v1/{resource}/{name}", get(one))
        .fallback(|uri: Uri| async move { not_found(uri.path()) })
        .method_not_allowed_fallback(not_allowed)
        .layer(DefaultBodyLimit::max(limit))
        .with_state(service)
}

async fn ready(State(service): Shared) -> Response {
    let trouble = |coordinator: crate::coordinator::Coordinator| match coordinator.trouble() {
        Some(error) => Err(error),
        None => Ok(()),
    };
    match service.coordinator().and_then(trouble) {
        Ok(()) => "ready\n".into_response(),
        Err(error) => failure(&error, Door::Path),
    }
}

async fn show_metrics(State(service): Shared) -> Response {
    let kind = [(
        header::CONTENT_TYPE,
        "text/plain; version=0.0.4; charset=utf-8",
    )];
    match metrics::render(service.coordinator().ok().as_ref(), service.started) {
        Ok(text) => (kind, text).into_response(),
        Err(error) => failure(&error, Door::Path),
    }
}

async fn sql(
    State(service): Shared,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    if let Err(error) = same_origin(&headers) {
        return failure(&error, Door::Sql);
    }
    let body = match body {
        Ok(body) => body,
        Err(rejection) => return unreadable(&rejection, service.config.max_body),
    };
    let session = match service.session().await {
        Ok(session) => session,
        Err(error) => return failure(&error, Door::Sql),
    };
    let stopped = service.stopped();
    // Reading, planning, running and writing: all of it on the threads of queries.
    let work = async move {
        let request = match statements::read(&body, &headers) {
            Ok(request) => request,
            Err(error) => return failure(&error, Door::Sql),
        };
        if let Some(parsed) = Session::subscribe_of(&request.sql) {
            return match session.subscribe(parsed).await {
                Ok((schema, subscription)) => subscribe::respond(&schema, subscription, stopped),
                Err(error) => failure(&error, Door::Sql),
            };
        }
        let outcome = session.execute(&request.sql, &request.params).await;
        statements::respond(outcome, request.format)
    };
    match service.on_query_threads(work).await {
        Ok(response) => response,
        Err(error) => failure(&error, Door::Sql),
    }
}

async fn list(State(service): Shared, path: Result<Path<String>, PathRejection>) -> Response {
    let Ok(Path(resource)) = path else {
        return not_found("that path");
    };
    let Some(resource) = named(&resource) else {
        return not_found(&format!("/api/v1/{resource}"));
    };
    match service.restored().await {
        Ok(coordinator) => axum::Json(relations::list(&coordinator, resource)).into_response(),
        Err(error) => failure(&error, Door::Path),
    }
}

async fn one(
    State(service): Shared,
    path: Result<Path<(String, String)>, PathRejection>,
) -> Response {
    let Ok(Path((resource, name))) = path else {
        return not_found("that path");
    };
    let Some(resource) = named(&resource) else {
        return not_found(&format!("/api/v1/{resource}/{name}"));
    };
    match service.restored().await {
        Ok(coordinator) => match relations::one(&coordinator, resource, &name) {
            Some(row) => axum::Json(row).into_response(),
            None => failure(&crate::error::unknown_relation(&name), Door::Path),
        },
        Err(error) => failure(&error, Door::Path),
    }
}

fn named(word: &str) -> Option<Resource> {
    [
        Resource::Views,
        Resource::Sources,
        Resource::Sinks,
        Resource::Jobs,
        Resource::Backfills,
        Resource::Planes,
    ]
    .into_iter()
    .find(|resource| resource.word() == word)
}

/// A page of another site must not steer this server through its reader's browser.
fn same_origin(headers: &HeaderMap) -> Result<(), Error> {
    let Some(origin) = headers.get(header::ORIGIN) else {
        return Ok(());
    };
    let origin = origin.to_str().unwrap_or_default();
    let host = headers
        .get(header::HOST)
        .and_then(|h| h.to_str().ok())
        .unwrap_or_default();
    if origin
        .split_once("://")
        .is_some_and(|(_, from)| from == host)
    {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Denied,
        "requests from pages of another origin are refused",
    )
    .hint("call the API from a program, or from a page of this server"))
}

fn unreadable(rejection: &BytesRejection, limit: usize) -> Response {
    let status = rejection.status();
    let error = if status == StatusCode::PAYLOAD_TOO_LARGE {
        Error::invalid(format!("the body is larger than {limit} bytes"))
            .code("54000")
            .hint("send the statements in several requests, or raise --max-body")
    } else {
        Error::invalid("the body could not be read")
            .code("08P01")
            .detail(rejection.body_text())
    };
    with_status(status, &error)
}

fn not_found(path: &str) -> Response {
    let error = Error::new(ErrorKind::NotFound, format!("there is nothing at {}", path.escape_default()))
        .hint("POST /api/v1/sql, GET /api/v1/views, /api/v1/sources, /api/v1/sinks, /api/v1/jobs, /api/v1/backfills, /metrics");
    failure(&error, Door::Path)
}

async fn not_allowed(method: Method, uri: Uri) -> Response {
    let error = Error::unsupported(format!(
        "{method} is not supported at {}",
        uri.path().escape_default()
    ))
    .hint("POST /api/v1/sql runs statements; everything else is read with GET");
    with_status(StatusCode::METHOD_NOT_ALLOWED, &error)
}

/// `{"results": [], "error": {…}}`.
fn failure(error: &Error, door: Door) -> Response {
    let mut response = with_status(http_status(error.kind, door), error);
    if error.kind == ErrorKind::Unavailable {
        response.headers_mut().insert(header::RETRY_AFTER, 1.into());
    }
    response
}

fn with_status(status: StatusCode, error: &Error) -> Response {
    let body = serde_json::json!({ "results": [], "error": WireError::new(error, None) });
    (status, axum::Json(body)).into_response()
}
