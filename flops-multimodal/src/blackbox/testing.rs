//! A server on the loopback interface, and queries with known scores, for tests.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::protocol::{ScoreRequest, ScoreResponse};
use super::{BlackBoxError, HttpBlackBox, HttpConfig, Info, Query};

/// A request that a server received.
pub(crate) struct Request {
    /// The method and the path.
    pub(crate) line: String,
    /// Headers by their lower-case names.
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: Vec<u8>,
}

/// How the server replies.
pub(crate) enum Reply {
    Json(String),
    /// A status, further headers (each ends in CR LF), and a body.
    Status(u16, &'static str, &'static str),
    /// A header that never ends, one byte every 5 ms.
    DripHeader,
    /// A header at once, then a body, one byte every 5 ms.
    DripBody,
    /// Close the connection.
    Close,
    /// More bytes than any valid answer.
    Flood,
}

/// A server that is killed, with its connections, when it is dropped.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    killed: Arc<AtomicBool>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `/v1/info`, and passes each other request to `reply` with its number, from 0.
    pub(crate) fn new(reply: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static) -> Self {
        Self::at("127.0.0.1:0".parse().unwrap(), reply)
    }

    /// Serves `info` at `/v1/info`, whatever it says.
    pub(crate) fn with_info(
        info: &'static str,
        reply: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static,
    ) -> Self {
        Self::start("127.0.0.1:0".parse().unwrap(), info.into(), reply)
    }

    pub(crate) fn at(address: SocketAddr, reply: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static) -> Self {
        Self::start(address, serde_json::to_string(&info()).unwrap(), reply)
    }

    fn start(
        address: SocketAddr,
        info: String,
        reply: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let killed = Arc::new(AtomicBool::new(false));
        let streams = Arc::new(Mutex::new(Vec::new()));
        let shared = (killed.clone(), streams.clone(), Arc::new(reply), Arc::new(AtomicUsize::new(0)));
        let info: Arc<str> = info.into();
        let thread = std::thread::spawn(move || {
            let (killed, streams, reply, number) = shared;
            for stream in listener.incoming().flatten() {
                if killed.load(Ordering::SeqCst) {
                    return;
                }
                streams.lock().unwrap().push(stream.try_clone().unwrap());
                let (killed, reply, number, info) = (killed.clone(), reply.clone(), number.clone(), info.clone());
                std::thread::spawn(move || serve(stream, &info, &killed, &*reply, &number));
            }
        });
        Self { address, killed, streams, thread: Some(thread) }
    }

    pub(crate) fn config(&self) -> HttpConfig {
        config(self.address)
    }

    pub(crate) fn connect(&self) -> HttpBlackBox {
        HttpBlackBox::connect(self.config()).unwrap()
    }

    pub(crate) fn kill(self) {}
}

impl Drop for Server {
    fn drop(&mut self) {
        self.killed.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Settings for tests: batches of 4, short waits.
pub(crate) fn config(address: SocketAddr) -> HttpConfig {
    HttpConfig::new(format!("http://{address}/"))
        .with_batch_size(4)
        .with_timeout(Duration::from_secs(5))
        .with_backoff(Duration::from_millis(2), Duration::from_millis(20))
}

fn serve(
    stream: TcpStream,
    info: &str,
    killed: &AtomicBool,
    reply: &dyn Fn(&Request, usize) -> Reply,
    number: &AtomicUsize,
) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    while let Some(request) = receive(&mut reader) {
        let reply = if request.line.starts_with("GET /v1/info") {
            Reply::Json(info.into())
        } else {
            reply(&request, number.fetch_add(1, Ordering::SeqCst))
        };
        if killed.load(Ordering::SeqCst) || send(&stream, &reply, killed).is_none() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
            return;
        }
    }
}

fn receive(reader: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        match line.trim() {
            "" => break,
            line => lines.push(line.to_string()),
        }
    }
    let headers: HashMap<String, String> = lines[1..]
        .iter()
        .filter_map(|line| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_string())))
        .collect();
    let mut body = vec![0; headers.get("content-length").map_or(0, |length| length.parse().unwrap())];
    reader.read_exact(&mut body).ok()?;
    Some(Request { line: lines[0].clone(), headers, body })
}

fn send(stream: &TcpStream, reply: &Reply, killed: &AtomicBool) -> Option<()> {
    let complete = |status: u16, headers: &str, body: &str| {
        let mut stream = stream;
        let length = body.len();
        write!(stream, "HTTP/1.1 {status} X\r\n{headers}Content-Length: {length}\r\n\r\n{body}").ok()
    };
    let drip = |begin: &str| {
        let mut stream = stream;
        stream.write_all(begin.as_bytes()).ok()?;
        while !killed.load(Ordering::SeqCst) {
            stream.write_all(b"a").ok()?;
            std::thread::sleep(Duration::from_millis(5));
        }
        None
    };
    match reply {
        Reply::Json(body) => complete(200, "Content-Type: application/json\r\n", body),
        Reply::Status(status, headers, body) => complete(*status, headers, body),
        Reply::DripHeader => drip("HTTP/1.1 200 OK\r\nX-Slow: "),
        Reply::DripBody => drip("HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"),
        Reply::Close => None,
        Reply::Flood => {
            let mut stream = stream;
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").ok()?;
            (0..64).try_for_each(|_| stream.write_all(&[b' '; 1 << 16]).ok())?;
            None
        }
    }
}

/// Two classes, images of 4 values, contexts of up to 3 tokens of width 2.
pub(crate) fn info() -> Info {
    Info::new(["cat", "dog"], [1, 2, 2]).unwrap().with_context(3, 2).unwrap()
}

/// The scores that the black boxes of the tests return.
pub(crate) fn truth(query: &Query) -> Vec<f32> {
    let sum = query.image.iter().chain(query.context.iter().flat_map(|context| context.iter())).sum::<f32>();
    vec![sum, 0.1 - sum]
}

pub(crate) fn truths(queries: &[Query]) -> Vec<Vec<f32>> {
    queries.iter().map(truth).collect()
}

/// `count` different queries; every second one has a context.
pub(crate) fn queries(count: usize) -> Vec<Query> {
    let image: Arc<[f32]> = vec![0.5, 0.25, 0.125, 1.0].into();
    let query = |at: usize| match at % 2 {
        0 => Query::new(vec![at as f32 / 1000.0, 0.5, 0.25, 1.0]),
        _ => Query::new(image.clone()).with_context(vec![at as f32; 2 * (1 + at % 3)]),
    };
    (0..count).map(query).collect()
}

/// The queries of a request.
pub(crate) fn received(request: &Request) -> Vec<Query> {
    let request: ScoreRequest = serde_json::from_slice(&request.body).unwrap();
    request.queries(&info()).unwrap()
}

/// The correct answer to a request.
pub(crate) fn answer(request: &Request) -> Reply {
    Reply::Json(serde_json::to_string(&ScoreResponse { scores: truths(&received(request)) }).unwrap())
}

/// The error of the last attempt.
pub(crate) fn last(error: BlackBoxError) -> BlackBoxError {
    match error {
        BlackBoxError::GaveUp { last, .. } => *last,
        error => error,
    }
}
