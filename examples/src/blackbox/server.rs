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
//! the count.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::{Context, Result};
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use flops_multimodal::blackbox::protocol::{CountResponse, ScoreRequest, ScoreResponse};
use flops_multimodal::blackbox::{BlackBoxError, Info};

use super::charge_log::ChargeLog;
use super::classes::ClassifierArgs;
use super::scorer::Scorer;
use crate::backend;

/// The largest request, in bytes.
const MAX_REQUEST: usize = 64 << 20;

/// The state of the server.
struct App {
    scorer: Scorer,
    log: Mutex<ChargeLog>,
}

impl App {
    fn log(&self) -> MutexGuard<'_, ChargeLog> {
        self.log.lock().unwrap_or_else(|e| e.into_inner())
    }
}

async fn score(
    State(app): State<Arc<App>>,
    Json(request): Json<ScoreRequest>,
) -> Result<Json<ScoreResponse>, (StatusCode, String)> {
    let work = move || {
        let bad = |e: BlackBoxError| (StatusCode::BAD_REQUEST, e.to_string());
        let broken = |e: String| (StatusCode::INTERNAL_SERVER_ERROR, e);
        let info = app.scorer.info();
        let queries = request.queries(info).map_err(bad)?;
        info.check_queries(&queries).map_err(bad)?;
        let scores = app.scorer.scores(&queries).map_err(|e| broken(e.to_string()))?;
        app.log().charge(&queries).map_err(|e| broken(format!("the charge log cannot be written: {e}")))?;
        Ok(Json(ScoreResponse { scores }))
    };
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| (StatusCode::INTERNAL_SERVER_ERROR, format!("the classifier failed: {e}")))?
}

async fn info(State(app): State<Arc<App>>) -> Json<Info> {
    Json(app.scorer.info().clone())
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
    let app = App { scorer, log: Mutex::new(ChargeLog::open(charge_log)?) };
    let router = Router::new()
        .route("/v1/info", get(info))
        .route("/v1/scores", post(score))
        .route("/v1/count", get(count))
        .layer(DefaultBodyLimit::max(MAX_REQUEST))
        .with_state(Arc::new(app));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_io().build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", port));
        let listener = listener.await.with_context(|| format!("--port {port} cannot be used; choose another"))?;
        ready(&format!("http://{}", listener.local_addr()?));
        Ok(axum::serve(listener, router).await?)
    })
}
