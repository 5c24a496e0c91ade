use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::config::is_loopback;
use crate::blackbox::testing::{Reply, Request, Server, answer, config, last, queries, received, truths};
use crate::blackbox::{BlackBox, BlackBoxError, HttpBlackBox, HttpConfig};

/// Sends `count` queries to a server that gives `reply`, or the correct answer where `reply` is
/// `None`.
///
/// Returns the result, the number of requests and the time; the scores must be right.
fn send_queries(
    count: usize,
    retries: u32,
    reply: impl Fn(usize) -> Option<Reply> + Send + Sync + 'static,
) -> (Result<(), BlackBoxError>, usize, Duration) {
    let requests = Arc::new(AtomicUsize::new(0));
    let seen = requests.clone();
    let server = Server::new(move |request: &Request, number| {
        seen.fetch_add(1, Ordering::SeqCst);
        reply(number).unwrap_or_else(|| answer(request))
    });
    let config = server.config().with_concurrency(1).with_retries(retries).with_timeout(Duration::from_millis(300));
    let endpoint = HttpBlackBox::connect(config).unwrap();
    let (queries, start) = (queries(count), Instant::now());
    let scores = endpoint.scores(&queries).map(|scores| assert_eq!(scores, truths(&queries)));
    (scores, requests.load(Ordering::SeqCst), start.elapsed())
}

fn json(scores: &str) -> Reply {
    Reply::Json(format!(r#"{{"scores":{scores}}}"#))
}

#[test]
fn a_correct_server_gets_one_request_per_batch() {
    let (scores, requests, _) = send_queries(10, 5, |_| None);
    assert_eq!((scores, requests), (Ok(()), 3));
    let server = Server::new(|request, _| answer(request));
    let endpoint = server.connect();
    assert_eq!(endpoint.info(), &crate::blackbox::testing::info());
    assert_eq!(endpoint.scores(&[]), Ok(vec![]));
    assert_eq!(endpoint.scores(&queries(1)).unwrap(), truths(&queries(1)));
}

#[test]
fn transient_failures_are_retried_and_then_reported() {
    type Case = (fn() -> Reply, fn(&BlackBoxError) -> bool);
    let cases: [Case; 13] = [
        (
            || Reply::Status(500, "", "out of memory"),
            |e| matches!(e, BlackBoxError::Status { status: 500, message, .. } if message == "out of memory"),
        ),
        (|| Reply::Status(429, "Retry-After: 0\r\n", ""), |e| matches!(e, BlackBoxError::Status { status: 429, .. })),
        (
            || Reply::Status(408, "Retry-After: tomorrow\r\n", ""),
            |e| matches!(e, BlackBoxError::Status { status: 408, .. }),
        ),
        (|| json("[[NaN,1.0]]"), |e| matches!(e, BlackBoxError::Body { begin, .. } if begin.contains("NaN"))),
        (|| json("[[null,1.0]]"), |e| matches!(e, BlackBoxError::Body { .. })),
        (|| json("[[1e999,1.0]]"), |e| matches!(e, BlackBoxError::Body { .. })),
        (
            || json("[[1.0,-1e300]]"),
            |e| matches!(e, BlackBoxError::Score { row: 0, class: 1, value } if *value == f32::NEG_INFINITY),
        ),
        (|| json("[[1.0]]"), |e| *e == BlackBoxError::Classes { row: 0, got: 1, expected: 2 }),
        (|| json("[[1.0,2.0,3.0]]"), |e| *e == BlackBoxError::Classes { row: 0, got: 3, expected: 2 }),
        (|| json("[[1.0,2.0],[1.0,2.0]]"), |e| *e == BlackBoxError::Rows { got: 2, expected: 1 }),
        (|| Reply::Json("<html>".into()), |e| matches!(e, BlackBoxError::Body { begin, .. } if begin == "<html>")),
        (|| Reply::Close, |e| matches!(e, BlackBoxError::Transport { unsent: false, .. })),
        (|| Reply::Flood, |e| matches!(e, BlackBoxError::TooLong { .. })),
    ];
    for (at, (reply, is_expected)) in cases.into_iter().enumerate() {
        let (scores, requests, _) = send_queries(1, 2, move |number| (number < 2).then(reply));
        assert_eq!((scores, requests), (Ok(()), 3), "case {at}");
        let (scores, requests, _) = send_queries(1, 2, move |_| Some(reply()));
        let error = scores.unwrap_err();
        assert_eq!(requests, 3, "case {at}");
        assert!(matches!(error, BlackBoxError::GaveUp { attempts: 3, .. }), "case {at}: {error}");
        let error = last(error);
        assert!(is_expected(&error), "case {at}: {error:?}");
    }
}

#[test]
fn other_statuses_are_errors_at_once() {
    for status in [400, 401, 404, 302] {
        let (scores, requests, _) =
            send_queries(1, 5, move |_| Some(Reply::Status(status, "Location: /\r\n", "no\nsuch model")));
        assert_eq!(requests, 1);
        let error = scores.unwrap_err();
        assert!(error.to_string().ends_with(&format!("/v1/scores: HTTP {status}: no such model")), "{error}");
    }
}

#[test]
fn only_200_is_an_answer() {
    // a part of an answer may be valid JSON of the right form
    for status in [201, 202, 203, 204, 206, 299] {
        let whole = r#"{"scores":[[1.0,2.0]]}"#;
        let (scores, requests, _) = send_queries(1, 5, move |_| Some(Reply::Status(status, "", whole)));
        let error = scores.unwrap_err();
        assert!(matches!(error, BlackBoxError::NotComplete { status: got, .. } if got == status), "{status}: {error}");
        assert_eq!(requests, 1, "{status}");
    }
}

#[test]
fn an_info_of_absurd_sizes_is_refused_at_once() {
    let connect = |info: &'static str| {
        let server = Server::with_info(info, |request, _| answer(request));
        // a wait would take longer than the test may
        let config = server.config().with_backoff(Duration::from_secs(60), Duration::from_secs(60));
        HttpBlackBox::connect(config).err().map(|error| error.to_string()).unwrap_or_default()
    };
    for (info, says) in [
        (r#"{"classes":["a"],"image":[3,4000000000,4000000000]}"#, "image = [3, 4000000000, 4000000000]"),
        (r#"{"classes":["a"],"image":[4000000,1,1]}"#, "image = [4000000, 1, 1]"),
        (r#"{"classes":["a"],"image":[0,1,1]}"#, "image = [0, 1, 1]"),
        (r#"{"classes":["a"],"image":[1,1,1],"context":[1,9000000000000000000]}"#, "context = [1, 90000"),
        (r#"{"classes":[],"image":[1,1,1]}"#, "classes = 0"),
        (r#"{"classes":["a"],"image":[1,1,1e300]}"#, "invalid type"),
        (r#"{"classes":["a"],"image":[-1,1,1]}"#, "invalid value"),
        (r#"{"classes":["a"],"image":[1,1]}"#, "invalid length"),
        (r#"{"classes":7}"#, "invalid type"),
    ] {
        let error = connect(info);
        assert!(error.contains(says) && error.lines().count() == 1, "{info}: {error}");
    }
}

#[test]
fn this_machine_is_told_from_others() {
    for host in ["localhost", "LocalHost.", "a.localhost", "127.0.0.1", "127.9.9.9", "[::1]", "[::ffff:127.0.0.1]"] {
        assert!(is_loopback(host), "{host}");
    }
    for host in ["example.org", "localhost.org", "128.0.0.1", "10.0.0.1", "[::2]", "127.0.0.1.org", ""] {
        assert!(!is_loopback(host), "{host}");
    }
}

/// Runs this test once more in a process whose environment names a proxy that does not exist.
#[test]
fn a_proxy_is_not_used_for_this_machine() {
    const PROXY: &str = "http://127.0.0.1:9";
    if std::env::var("HTTP_PROXY").is_ok_and(|proxy| proxy == PROXY) {
        let server = Server::new(|request, _| answer(request));
        assert_eq!(server.connect().scores(&queries(3)).unwrap(), truths(&queries(3)));
        let proxy = |url: &str| HttpConfig::new(url).proxy().map(|proxy| proxy.port());
        assert_eq!((proxy("http://localhost:1"), proxy("http://example.org")), (None, Some(9)));
        return;
    }
    let name = "blackbox::http::tests::a_proxy_is_not_used_for_this_machine";
    let mut again = std::process::Command::new(std::env::current_exe().unwrap());
    for name in ["ALL_PROXY", "all_proxy", "HTTPS_PROXY", "https_proxy", "http_proxy", "NO_PROXY", "no_proxy"] {
        again.env_remove(name);
    }
    let output = again.args([name, "--exact"]).env("HTTP_PROXY", PROXY).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
fn a_drip_feeding_server_times_out() {
    for reply in [|| Reply::DripHeader, || Reply::DripBody] {
        let (scores, requests, time) = send_queries(1, 1, move |_| Some(reply()));
        let error = last(scores.unwrap_err());
        assert!(matches!(error, BlackBoxError::Timeout { seconds: 0.3, .. }), "{error}");
        assert_eq!(requests, 2);
        assert!((0.55..2.0).contains(&time.as_secs_f64()), "{time:?}");
    }
    let (scores, requests, _) = send_queries(1, 1, |number| (number == 0).then_some(Reply::DripBody));
    assert_eq!((scores, requests), (Ok(()), 2));
}

#[test]
fn retry_after_replaces_the_wait_up_to_the_longest() {
    let (key, config) = (queries(1)[0].key(), HttpConfig::new("http://x"));
    let seconds = |retry, after: Option<u64>| config.wait(key, retry, after.map(Duration::from_secs)).as_secs_f64();
    assert_eq!((seconds(0, Some(3)), seconds(0, Some(0)), seconds(0, Some(3600))), (3.0, 0.0, 10.0));
    for (retry, full) in [(0, 0.25), (1, 0.5), (3, 2.0), (6, 10.0), (40, 10.0), (u32::MAX, 10.0)] {
        let wait = seconds(retry, None);
        assert!((full / 2.0..=full).contains(&wait), "{retry}: {wait}");
        assert_eq!(wait, seconds(retry, None));
    }
    // over HTTP: the server names 1 s, the longest wait is 0.02 s
    let (scores, _, time) =
        send_queries(1, 1, |number| (number == 0).then_some(Reply::Status(429, "Retry-After: 1\r\n", "")));
    assert!(scores.is_ok() && (0.02..0.5).contains(&time.as_secs_f64()), "{time:?}");
}

#[test]
fn requests_in_flight_are_bounded_over_all_threads() {
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counters = (now.clone(), most.clone());
    let server = Server::new(move |request, _| {
        counters.1.fetch_max(counters.0.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(15));
        counters.0.fetch_sub(1, Ordering::SeqCst);
        answer(request)
    });
    let endpoint = HttpBlackBox::connect(server.config().with_concurrency(3)).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| assert_eq!(endpoint.scores(&queries(40)).unwrap(), truths(&queries(40))));
        }
    });
    assert_eq!(most.load(Ordering::SeqCst), 3);
}

#[test]
fn retries_reach_a_restarted_server() {
    let server = Server::new(|request, _| answer(request));
    let address = server.address;
    let endpoint = HttpBlackBox::connect(config(address).with_retries(100)).unwrap();
    assert!(endpoint.scores(&queries(3)).is_ok());
    server.kill();
    let refused = HttpBlackBox::connect(config(address).with_retries(1)).err().map(last);
    assert!(matches!(refused, Some(BlackBoxError::Transport { unsent: true, .. })), "{refused:?}");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| endpoint.scores(&queries(9)));
        std::thread::sleep(Duration::from_millis(60));
        let _server = Server::at(address, |request, _| answer(request));
        assert_eq!(waiting.join().unwrap().unwrap(), truths(&queries(9)));
    });
}

#[test]
fn retries_carry_the_same_key_and_every_request_the_token() {
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let keys = seen.clone();
    let server = Server::new(move |request, number| {
        assert_eq!(request.headers["authorization"], "Bearer secret");
        keys.lock().unwrap().push(request.headers["idempotency-key"].clone());
        if number == 0 { Reply::Close } else { answer(request) }
    });
    let config = server.config().with_concurrency(1).with_bearer_token("secret");
    assert!(!format!("{config:?}").contains("secret"));
    HttpBlackBox::connect(config).unwrap().scores(&queries(8)).unwrap();
    let keys = seen.lock().unwrap();
    assert_eq!((keys.len(), keys[0].len(), &keys[0]), (3, 32, &keys[1]));
    assert_ne!(keys[0], keys[2]);
}

#[test]
fn the_first_error_ends_the_call() {
    // the second of 100 batches fails permanently, so no third one is sent
    let (scores, requests, _) = send_queries(400, 5, |number| (number == 1).then_some(Reply::Status(403, "", "")));
    assert!(matches!(scores, Err(BlackBoxError::Status { status: 403, .. })));
    assert_eq!(requests, 2);
    // the wait before a retry ends when another batch fails
    let server = Server::new(|request, _| match received(request).len() {
        4 => Reply::Status(503, "Retry-After: 60\r\n", ""),
        _ => Reply::Status(400, "", ""),
    });
    let config = server.config().with_backoff(Duration::ZERO, Duration::from_secs(60));
    let (endpoint, start) = (HttpBlackBox::connect(config).unwrap(), Instant::now());
    assert!(matches!(endpoint.scores(&queries(5)), Err(BlackBoxError::Status { status: 400, .. })));
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn settings_out_of_range_are_refused() {
    let refused = |config: HttpConfig| HttpBlackBox::connect(config.with_retries(0)).err().unwrap().to_string();
    let good = || HttpConfig::new("http://127.0.0.1:9");
    assert!(refused(good().with_batch_size(0)).contains("batch_size = 0"));
    assert!(refused(good().with_concurrency(0)).contains("concurrency = 0"));
    assert!(refused(good().with_concurrency(257)).contains("concurrency = 257"));
    assert!(refused(good().with_timeout(Duration::ZERO)).contains("timeout = 0ns"));
    assert!(refused(good().with_timeout(Duration::MAX)).contains("timeout"));
    assert!(
        refused(good().with_backoff(Duration::from_secs(2), Duration::from_secs(1))).contains("backoff = 2s to 1s")
    );
    let token = refused(good().with_bearer_token("two\r\nlines"));
    assert!(token.contains("bearer_token") && !token.contains("lines\r"), "{token}");
    let password = refused(HttpConfig::new("http://me:hidden@host"));
    assert!(password.contains("with_bearer_token") && !password.contains("hidden"), "{password}");
    for url in ["", "localhost:80", "ftp://host", "http://", "http://host/?a=b"] {
        assert!(refused(HttpConfig::new(url)).contains("url = "), "{url}");
    }
    #[cfg(not(feature = "tls"))]
    assert!(matches!(HttpBlackBox::connect(HttpConfig::new("https://host")), Err(BlackBoxError::Tls { .. })));
}
