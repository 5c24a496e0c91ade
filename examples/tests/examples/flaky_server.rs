//! A black box over HTTP that fails when a test wants it to, and counts what it was asked.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use flops_multimodal::blackbox::protocol::{ScoreRequest, ScoreResponse};
use flops_multimodal::blackbox::{Info, Query};
use flops_multimodal::data::scenes::{COLOURS, SIDE};

/// A server that lives as long as the tests.
pub struct FlakyServer {
    /// Where it listens.
    pub address: String,
    rows: Arc<AtomicU64>,
}

/// What the server takes and returns.
fn info() -> Info {
    Info::new(COLOURS, [3, SIDE, SIDE]).unwrap().with_context(2, 3).unwrap()
}

/// A smooth function of image and context for each class.
fn scores(query: &Query) -> Vec<f32> {
    let side = SIDE * SIDE;
    let mean = |channel: usize| query.image[channel * side..(channel + 1) * side].iter().sum::<f32>() / side as f32;
    let means = [mean(0), mean(1), mean(2)];
    let context = query.context.as_deref().unwrap_or_default();
    let class = |class: usize| {
        let weight = |at: usize| ((3 * class + at) as f32).sin();
        let image: f32 = means.iter().enumerate().map(|(at, mean)| weight(at) * mean).sum();
        image + context.iter().enumerate().map(|(at, x)| weight(at + 5) * x).sum::<f32>()
    };
    (0..COLOURS.len()).map(class).collect()
}

impl FlakyServer {
    /// Starts a server. It answers with HTTP 500 the requests for scores for which `fails` holds,
    /// numbered from 0.
    pub fn start(fails: impl Fn(usize) -> bool + Send + Sync + 'static) -> Self {
        Self::with_info(serde_json::to_string(&info()).unwrap(), fails)
    }

    /// A server that describes itself by that text.
    pub fn with_info(info: String, fails: impl Fn(usize) -> bool + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let rows = Arc::new(AtomicU64::new(0));
        let shared = Arc::new((info, fails, rows.clone(), AtomicUsize::new(0)));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = shared.clone();
                std::thread::spawn(move || {
                    let (info, fails, rows, posts) = &*shared;
                    serve(&stream, info, fails, rows, posts)
                });
            }
        });
        Self { address, rows }
    }

    /// The queries that it was asked, in every attempt.
    pub fn rows(&self) -> u64 {
        self.rows.load(Ordering::SeqCst)
    }
}

/// Answers one request and closes the connection; nothing where it breaks off.
fn serve(
    stream: &TcpStream,
    info: &str,
    fails: &impl Fn(usize) -> bool,
    rows: &AtomicU64,
    posts: &AtomicUsize,
) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let (mut first, mut length) = (String::new(), 0);
    reader.read_line(&mut first).ok()?;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        match line.trim().to_lowercase().split_once(": ") {
            Some(("content-length", value)) => length = value.parse().ok()?,
            None if line.trim().is_empty() => break,
            _ => {}
        }
    }
    let (status, body) = if first.starts_with("GET /v1/info") {
        (200, info.to_string())
    } else if first.starts_with("GET /v1/count") {
        (200, format!(r#"{{"queries":{}}}"#, rows.load(Ordering::SeqCst)))
    } else {
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        let queries = serde_json::from_slice::<ScoreRequest>(&body).ok()?.queries(&self::info()).ok()?;
        rows.fetch_add(queries.len() as u64, Ordering::SeqCst);
        if fails(posts.fetch_add(1, Ordering::SeqCst)) {
            (500, "out of order".to_string())
        } else {
            let scores = queries.iter().map(scores).collect();
            (200, serde_json::to_string(&ScoreResponse { scores }).ok()?)
        }
    };
    let length = body.len();
    let mut stream = stream;
    write!(stream, "HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}").ok()
}
