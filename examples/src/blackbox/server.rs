//! A CLIP-style classifier behind HTTP: the black box of the prompt-tuning example, in a process of
//! its own.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/info` | the classes, the shape of an image, and the shape of a context if it takes one |
//! | `POST /v1/scores` | one row of scores per query, see [`protocol`](flops_multimodal::blackbox::protocol) |
//! | `GET /v1/count` | the number of charged queries |
//!
//! A query is charged once, however often it is asked: the charge log recognises it by its content.
//! The log is written to the disk before the answer is sent, so a server that was killed continues
//! the count. Scores that are not finite are an error, and not charged.
//!
//! What a client can take is bounded: connections, the size of a request, and how many
//! requests are held in memory at once. All of them together take less than 1 GiB beside the model.

mod connections;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context, Result};
use axum::body::HttpBody;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use flops_multimodal::blackbox::protocol::{CountResponse, ScoreRequest, ScoreResponse};
use flops_multimodal::blackbox::{BlackBox, BlackBoxError, Info};
use tokio::sync::Semaphore;

use super::charge_log::{ChargeError, ChargeLog};
use super::classes::ClassifierArgs;
use super::scorer::Scorer;
use crate::backend;

/// What clients can take of the server.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Connections at once. Further ones wait.
    connections: usize,
    /// Requests that are read, parsed and scored at once. Further ones wait, unread.
    requests: usize,
    /// Bytes of a request. Once parsed it may take ten times as many.
    bytes: usize,
    /// Queries of a request.
    rows: usize,
    /// The time until a request must have arrived: its head, and then its body. A connection
    /// without one is closed.
    idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 512, requests: 4, bytes: 8 << 20, rows: 1024, idle: Duration::from_secs(30) }
    }
}

/// The state of the server.
struct App {
    black_box: Box<dyn BlackBox>,
    log: Mutex<ChargeLog>,
    limits: Limits,
    turns: Arc<Semaphore>,
}

/// The status and the message of a request that is refused.
type Refusal = (StatusCode, String);

impl App {
    fn log(&self) -> MutexGuard<'_, ChargeLog> {
        self.log.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Reads the body of a request, within the limits.
    async fn body(&self, request: Request) -> Result<Vec<u8>, Refusal> {
        let Limits { bytes, idle, .. } = self.limits;
        let large = || {
            let says = format!("a request takes at most {bytes} bytes; send fewer queries at once");
            (StatusCode::PAYLOAD_TOO_LARGE, says)
        };
        let body = request.into_body();
        if body.size_hint().lower() > bytes as u64 {
            return Err(large());
        }
        let late = |_| (StatusCode::REQUEST_TIMEOUT, format!("the request did not arrive within {idle:?}"));
        let body = tokio::time::timeout(idle, axum::body::to_bytes(body, bytes)).await.map_err(late)?;
        // where the connection broke off instead, nobody reads this
        body.map(Vec::from).map_err(|_| large())
    }

    /// Scores the queries of a request and charges them.
    fn answer(&self, body: &[u8]) -> Result<ScoreResponse, Refusal> {
        let bad = |e: BlackBoxError| (StatusCode::BAD_REQUEST, e.to_string());
        let broken = |e: BlackBoxError| (StatusCode::INTERNAL_SERVER_ERROR, e.to_string());
        let request: ScoreRequest =
            serde_json::from_slice(body).map_err(|e| (StatusCode::BAD_REQUEST, format!("not a request: {e}")))?;
        let (rows, most) = (request.rows(), self.limits.rows);
        if rows > most {
            let says = format!("{rows} queries in a request; send at most {most} at once");
            return Err((StatusCode::PAYLOAD_TOO_LARGE, says));
        }
        let info = self.black_box.info();
        let queries = request.queries(info).map_err(bad)?;
        let scores = self.black_box.scores(&queries).map_err(broken)?;
        // before anything is charged
        info.check_scores(queries.len(), &scores).map_err(broken)?;
        self.log().charge(&queries).map_err(|error| match error {
            ChargeError::Full => (StatusCode::FORBIDDEN, error.to_string()),
            ChargeError::Io(_) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        })?;
        Ok(ScoreResponse { scores })
    }
}

async fn score(State(app): State<Arc<App>>, request: Request) -> Result<Json<ScoreResponse>, Refusal> {
    // the turn ends with the work, also where the client has gone
    let turn = app.turns.clone().acquire_owned().await;
    let body = app.body(request).await?;
    let work = move || {
        let answer = app.answer(&body);
        drop(turn);
        answer
    };
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| (StatusCode::INTERNAL_SERVER_ERROR, format!("the classifier failed: {e}")))?.map(Json)
}

async fn info(State(app): State<Arc<App>>) -> Json<Info> {
    Json(app.black_box.info().clone())
}

async fn count(State(app): State<Arc<App>>) -> Json<CountResponse> {
    Json(CountResponse { queries: app.log().count() })
}

/// Serves until the process ends. Calls `ready` with the address once it listens.
///
/// # Errors
/// Where the classifier cannot be loaded, the charge log cannot be used, or the port is taken.
pub fn serve(
    classifier: &ClassifierArgs,
    port: u16,
    charge_log: Option<&Path>,
    ready: impl FnOnce(&str),
) -> Result<()> {
    let device = backend::device()?;
    let scorer = Scorer::new(classifier.classifier(&device)?, device);
    serve_within(Limits::default(), Box::new(scorer), ChargeLog::open(charge_log)?, port, ready)
}

/// Serves a black box within limits.
fn serve_within(
    limits: Limits,
    black_box: Box<dyn BlackBox>,
    log: ChargeLog,
    port: u16,
    ready: impl FnOnce(&str),
) -> Result<()> {
    let app = App { black_box, log: Mutex::new(log), limits, turns: Arc::new(Semaphore::new(limits.requests)) };
    let router = Router::new()
        .route("/v1/info", get(info))
        .route("/v1/scores", post(score))
        .route("/v1/count", get(count))
        .with_state(Arc::new(app));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", port));
        let listener = listener.await.with_context(|| format!("--port {port} cannot be used; choose another"))?;
        ready(&format!("http://{}", listener.local_addr()?));
        match connections::accept(listener, router, limits.connections, limits.idle).await {}
    })
}

#[cfg(test)]
mod tests;
