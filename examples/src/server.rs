//! A CLIP-style classifier behind HTTP: the black box of the prompt-tuning example, as another process.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/info` | classes, shape of an image, and of a context where it takes one |
//! | `POST /v1/scores` | a row of scores for each query, see [`protocol`](flops_multimodal::blackbox::protocol) |
//! | `GET /v1/count` | the queries charged |
//!
//! A query is charged once, however often it is asked: by its content, in a book on disk that is written before the answer goes out, so that a
//! server that was killed goes on counting where it was.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::{Context, Result, ensure};
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use burn::prelude::*;
use clap::{Args, ValueEnum};
use flops_multimodal::blackbox::protocol::{CountResponse, ScoreRequest, ScoreResponse};
use flops_multimodal::blackbox::{BlackBoxError, Info, Query};
use flops_multimodal::checkpoint::alignment;
use flops_multimodal::data::scenes::{COLOURS, SHAPES, SIDE, Scene, TEXTURES};
use flops_multimodal::{Classifier, ImageEncoder, TextEncoder};

use crate::backend::{self, B, Device};

/// The largest request, in bytes.
const BODY: usize = 64 << 20;

/// What the classes are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Classes {
    /// The colours of scenes.
    #[default]
    Colour,
    /// Their shapes.
    Shape,
    /// Their textures.
    Texture,
}

impl Classes {
    /// Their names.
    pub fn names(self) -> &'static [&'static str] {
        match self {
            Self::Colour => &COLOURS,
            Self::Shape => &SHAPES,
            Self::Texture => &TEXTURES,
        }
    }

    /// The class of a scene.
    pub fn of(self, scene: &Scene) -> usize {
        match self {
            Self::Colour => scene.colour,
            Self::Shape => scene.shape,
            Self::Texture => scene.texture,
        }
    }

    /// What is said of a class when nothing was tuned.
    pub fn template(self) -> &'static str {
        match self {
            Self::Shape => "a picture of a {}",
            _ => "a picture of a {} thing",
        }
    }

    /// The name it is chosen by.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
    }
}

/// What the server is.
#[derive(Args, Clone, Debug)]
pub struct Serving {
    /// What the classes are.
    #[arg(long, value_enum, default_value_t)]
    pub classes: Classes,
    /// Projections that clip_align wrote, of the shipped encoders [default: those shipped with flops-multimodal].
    #[arg(long)]
    pub alignment: Option<PathBuf>,
}

impl Serving {
    /// The classifier of the shipped encoders.
    pub fn classifier<B: Backend>(&self, device: &B::Device) -> Result<Classifier<B>> {
        let alignment = match &self.alignment {
            Some(path) => alignment::load(path, device)?,
            None => alignment::shipped(device)?,
        };
        let (image, text) = (ImageEncoder::shipped(device)?, TextEncoder::shipped(device)?);
        let (names, template) = (self.classes.names(), self.classes.template());
        Ok(Classifier::new(image, text, alignment, names, template, [3, SIDE, SIDE])?)
    }
}

/// The queries charged, one line each.
struct Book {
    file: Option<File>,
    charged: HashSet<String>,
}

impl Book {
    /// The book in that file, or one that is forgotten with the process. A last line that was not written to its end is dropped.
    fn open(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else { return Ok(Self { file: None, charged: HashSet::new() }) };
        let failed = || format!("the book {} cannot be used; choose another with --book", path.display());
        let mut charged = HashSet::new();
        if path.exists() {
            let mut whole = 0;
            let mut lines = BufReader::new(File::open(path).with_context(failed)?);
            let mut line = String::new();
            while lines.read_line(&mut line).with_context(failed)? > 0 {
                let Some(key) = line.strip_suffix('\n') else { break };
                ensure!(
                    key.len() == 32 && key.bytes().all(|b| b.is_ascii_hexdigit()),
                    "{}: '{key}' is no key",
                    failed()
                );
                whole += line.len() as u64;
                charged.insert(key.to_string());
                line.clear();
            }
            OpenOptions::new().write(true).open(path).and_then(|f| f.set_len(whole)).with_context(failed)?;
        }
        let file = OpenOptions::new().create(true).append(true).open(path).with_context(failed)?;
        Ok(Self { file: Some(file), charged })
    }

    /// Charges what was not charged before; on disk before this returns.
    fn charge(&mut self, queries: &[Query]) -> std::io::Result<()> {
        let keys = queries.iter().map(|query| query.key().to_string());
        let new: HashSet<String> = keys.filter(|key| !self.charged.contains(key)).collect();
        if let Some(file) = self.file.as_mut().filter(|_| !new.is_empty()) {
            let lines: String = new.iter().flat_map(|key| [key, "\n"]).collect();
            let length = file.metadata()?.len();
            if let Err(error) = file.write_all(lines.as_bytes()).and_then(|()| file.sync_data()) {
                // nothing is charged that is not in the book, and no line of it is half
                let _ = file.set_len(length);
                return Err(error);
            }
        }
        self.charged.extend(new);
        Ok(())
    }
}

/// The classifier and its book.
struct App {
    classifier: Classifier<B>,
    device: Device,
    book: Mutex<Book>,
    /// Embeddings of images asked before, by their bits: a context alone need not pay for the image tower again.
    embedded: Mutex<HashMap<Vec<u32>, Vec<f32>>>,
}

/// Embeddings that are kept at most.
const KEPT: usize = 4096;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Answers queries with `classifier`, the embeddings of images that come with a context kept in `embedded`.
fn answer(app: &App, queries: &[Query]) -> Result<Vec<Vec<f32>>, BlackBoxError> {
    let info = app.classifier.info();
    let bits = |query: &Query| query.image.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
    let keys: Vec<Vec<u32>> = queries.iter().map(bits).collect();
    let mut known: HashMap<&Vec<u32>, Vec<f32>> = {
        let embedded = lock(&app.embedded);
        keys.iter().filter_map(|key| Some((key, embedded.get(key)?.clone()))).collect()
    };
    let mut new: Vec<usize> = vec![];
    for (row, key) in keys.iter().enumerate() {
        if !known.contains_key(key) {
            known.insert(key, vec![]);
            new.push(row);
        }
    }
    if !new.is_empty() {
        let [c, h, w] = info.image;
        let pixels: Vec<f32> = new.iter().flat_map(|&row| queries[row].image.iter().copied()).collect();
        let images = Tensor::<B, 4>::from_data(TensorData::new(pixels, [new.len(), c, h, w]), &app.device);
        let embeddings = app.classifier.embed_images(images);
        let dim = embeddings.dims()[1];
        let values: Vec<f32> = embeddings.into_data().iter::<f32>().collect();
        let mut embedded = lock(&app.embedded);
        if embedded.len() + new.len() > KEPT {
            embedded.clear();
        }
        for (&row, embedding) in new.iter().zip(values.chunks_exact(dim)) {
            known.insert(&keys[row], embedding.to_vec());
            // without contexts images seldom come twice
            if queries[row].context.is_some() {
                embedded.insert(keys[row].clone(), embedding.to_vec());
            }
        }
    }
    let mut scores = vec![vec![]; queries.len()];
    for with in [true, false] {
        let rows: Vec<usize> = (0..queries.len()).filter(|&row| queries[row].context.is_some() == with).collect();
        // contexts of one length at a time
        let mut lengths: Vec<usize> =
            rows.iter().map(|&r| queries[r].context.as_ref().map_or(0, |c| c.len())).collect();
        lengths.sort_unstable();
        lengths.dedup();
        for length in lengths {
            let rows: Vec<usize> = rows
                .iter()
                .copied()
                .filter(|&r| queries[r].context.as_ref().map_or(0, |c| c.len()) == length)
                .collect();
            let images: Vec<f32> = rows.iter().flat_map(|&row| known[&keys[row]].iter().copied()).collect();
            let dim = images.len() / rows.len();
            let images = Tensor::<B, 2>::from_data(TensorData::new(images, [rows.len(), dim]), &app.device);
            let contexts = info.context.filter(|_| with).map(|[_, dim]| {
                let all: Vec<f32> =
                    rows.iter().filter_map(|&r| queries[r].context.clone()).flat_map(|c| c.to_vec()).collect();
                Tensor::<B, 3>::from_data(TensorData::new(all, [rows.len(), length / dim, dim]), &app.device)
            });
            let values: Vec<f32> = app.classifier.scores(images, contexts)?.into_data().iter::<f32>().collect();
            for (&row, values) in rows.iter().zip(values.chunks_exact(info.classes.len())) {
                scores[row] = values.to_vec();
            }
        }
    }
    Ok(scores)
}

async fn score(
    State(app): State<Arc<App>>,
    Json(request): Json<ScoreRequest>,
) -> Result<Json<ScoreResponse>, (StatusCode, String)> {
    let work = move || {
        let bad = |e: BlackBoxError| (StatusCode::BAD_REQUEST, e.to_string());
        let broken = |e: String| (StatusCode::INTERNAL_SERVER_ERROR, e);
        let info = app.classifier.info();
        let queries = request.queries(info).map_err(bad)?;
        info.check_queries(&queries).map_err(bad)?;
        let scores = answer(&app, &queries).map_err(|e| broken(e.to_string()))?;
        lock(&app.book).charge(&queries).map_err(|e| broken(format!("the book cannot be written: {e}")))?;
        Ok(Json(ScoreResponse { scores }))
    };
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| (StatusCode::INTERNAL_SERVER_ERROR, format!("the classifier failed: {e}")))?
}

async fn info(State(app): State<Arc<App>>) -> Json<Info> {
    Json(app.classifier.info().clone())
}

async fn count(State(app): State<Arc<App>>) -> Json<CountResponse> {
    Json(CountResponse { queries: lock(&app.book).charged.len() as u64 })
}

/// Serves until the process ends; `ready` is told the address.
///
/// # Errors
/// Where the classifier cannot be loaded, the book cannot be used, or the port is taken.
pub fn serve(serving: &Serving, port: u16, book: Option<&Path>, ready: impl FnOnce(&str)) -> Result<()> {
    let device = backend::device()?;
    let app = App {
        classifier: serving.classifier(&device)?,
        device,
        book: Mutex::new(Book::open(book)?),
        embedded: Mutex::default(),
    };
    let router = Router::new()
        .route("/v1/info", get(info))
        .route("/v1/scores", post(score))
        .route("/v1/count", get(count))
        .layer(DefaultBodyLimit::max(BODY))
        .with_state(Arc::new(app));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_io().build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", port));
        let listener = listener.await.with_context(|| format!("--port {port} cannot be used; choose another"))?;
        ready(&format!("http://{}", listener.local_addr()?));
        Ok(axum::serve(listener, router).await?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_book_counts_a_query_once_and_survives() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("book");
        let queries: Vec<Query> = (0..3).map(|i| Query::new(vec![i as f32])).collect();
        let mut book = Book::open(Some(&path)).unwrap();
        book.charge(&queries[..2]).unwrap();
        book.charge(&queries).unwrap();
        assert_eq!(book.charged.len(), 3);
        drop(book);
        // killed in the middle of a line
        let mut text = std::fs::read_to_string(&path).unwrap();
        text.truncate(text.len() - 5);
        std::fs::write(&path, text).unwrap();
        let mut book = Book::open(Some(&path)).unwrap();
        assert_eq!(book.charged.len(), 2);
        book.charge(&queries).unwrap();
        assert_eq!(Book::open(Some(&path)).unwrap().charged.len(), 3);
        std::fs::write(&path, "not a key\n").unwrap();
        assert!(Book::open(Some(&path)).is_err());
    }
}
