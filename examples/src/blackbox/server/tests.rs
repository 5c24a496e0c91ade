use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use flops_multimodal::blackbox::protocol::ScoreRequest;
use flops_multimodal::blackbox::{BlackBox, BlackBoxError, HttpBlackBox, HttpConfig, Info, Query};

use super::{ChargeLog, Limits, serve_within};

/// Scores an image by its only value; a dark one has no finite score.
struct Inverse(Info);

impl BlackBox for Inverse {
    fn info(&self) -> &Info {
        &self.0
    }

    fn scores(&self, queries: &[Query]) -> Result<Vec<Vec<f32>>, BlackBoxError> {
        Ok(queries.iter().map(|query| vec![1.0 / query.image[0]]).collect())
    }
}

/// Starts a server that lives as long as the tests; returns its address.
fn start(limits: Limits) -> String {
    let (ready, address) = mpsc::channel();
    std::thread::spawn(move || {
        let black_box = Inverse(Info::new(["a"], [1, 1, 1]).unwrap());
        let ready = move |address: &str| ready.send(address.to_string()).unwrap();
        serve_within(limits, Box::new(black_box), ChargeLog::open(None).unwrap(), 0, ready)
    });
    address.recv_timeout(Duration::from_secs(60)).unwrap()
}

fn connect(address: &str) -> HttpBlackBox {
    HttpBlackBox::connect(HttpConfig::new(address).with_retries(0).with_batch_size(1 << 20)).unwrap()
}

fn stream(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address.trim_start_matches("http://")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream
}

/// Everything that the server says until it closes the connection.
fn rest(mut stream: TcpStream) -> String {
    let mut bytes = vec![];
    // a server that closes a connection with a body unread resets it after the answer
    let _ = stream.read_to_end(&mut bytes);
    String::from_utf8(bytes).unwrap()
}

#[test]
fn scores_that_are_not_finite_are_an_error_and_not_charged() {
    let client = connect(&start(Limits::default()));
    let queries = |values: &[f32]| values.iter().map(|&value| Query::new(vec![value])).collect::<Vec<_>>();
    let error = client.scores(&queries(&[0.5, 0.0])).unwrap_err();
    let BlackBoxError::Status { status: 500, message, .. } = &error else { panic!("{error}") };
    assert!(message.contains("inf in row 1") && message.contains("finite"), "{message}");
    assert_eq!(client.count(), Ok(0));
    assert_eq!(client.scores(&queries(&[0.5, 0.25])), Ok(vec![vec![2.0], vec![4.0]]));
    assert_eq!(client.scores(&queries(&[0.5])), Ok(vec![vec![2.0]]));
    assert_eq!(client.count(), Ok(2));
}

#[test]
fn requests_that_are_too_large_are_refused() {
    let address = start(Limits { bytes: 2000, rows: 4, ..Limits::default() });
    let client = connect(&address);
    let refused = |rows: usize| match client.scores(&vec![Query::new(vec![0.5]); rows]) {
        Err(BlackBoxError::Status { status: 413, message, .. }) => message,
        other => panic!("{rows} rows: {other:?}"),
    };
    assert!(client.scores(&vec![Query::new(vec![0.5]); 4]).is_ok());
    assert!(refused(5).contains("5 queries in a request; send at most 4"));
    // a length is refused before the body comes
    let mut huge = stream(&address);
    write!(huge, "POST /v1/scores HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999\r\n\r\n").unwrap();
    let answer = rest(huge);
    assert!(answer.starts_with("HTTP/1.1 413") && answer.contains("at most 2000 bytes"), "{answer}");
    // a body without a length, too
    let mut chunked = stream(&address);
    write!(chunked, "POST /v1/scores HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
    write!(chunked, "fff\r\n{}\r\n", "a".repeat(0xfff)).unwrap();
    assert!(rest(chunked).starts_with("HTTP/1.1 413"));
    // and what is no request
    let mut other = stream(&address);
    write!(other, "POST /v1/scores HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n[]").unwrap();
    assert!(rest(other).starts_with("HTTP/1.1 400"));
    assert_eq!(client.count(), Ok(1));
}

#[test]
fn idle_connections_are_closed_and_further_ones_wait() {
    let address = start(Limits { connections: 3, idle: Duration::from_millis(1000), ..Limits::default() });
    let started = Instant::now();
    let silent = stream(&address);
    let mut begun = stream(&address);
    write!(begun, "GET /v1/info HTTP/1.1\r\nHost: ").unwrap();
    // a body that stops in the middle
    let body = serde_json::to_string(&ScoreRequest::new(&[Query::new(vec![0.5])])).unwrap();
    let mut half = stream(&address);
    let length = body.len();
    write!(half, "POST /v1/scores HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{}", &body[..5]).unwrap();
    // all three slots are taken until they are idle for too long
    let mut fourth = stream(&address);
    write!(fourth, "GET /v1/count HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    assert!(rest(fourth).starts_with("HTTP/1.1 200"), "answered, and closed when it was idle");
    assert!(started.elapsed() >= Duration::from_millis(1000), "{:?}", started.elapsed());
    assert!(rest(half).starts_with("HTTP/1.1 408"));
    for stream in [silent, begun] {
        rest(stream);
    }
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_client_that_goes_away_keeps_no_turn() {
    let address = start(Limits { requests: 1, ..Limits::default() });
    for _ in 0..4 {
        let mut gone = stream(&address);
        write!(gone, "POST /v1/scores HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf").unwrap();
        gone.shutdown(Shutdown::Both).unwrap();
    }
    assert!(connect(&address).scores(&[Query::new(vec![0.5])]).is_ok());
}
