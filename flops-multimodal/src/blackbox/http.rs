//! A black box behind HTTP: concurrent batches, each with a time limit and retries.

mod config;
mod sync;

use std::io::Read;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::de::DeserializeOwned;
use ureq::http::Response;
use ureq::{Agent, Body};

pub use config::HttpConfig;

use super::error::BlackBoxError;
use super::info::Info;
use super::interface::{BlackBox, Meter, Unmetered};
use super::protocol::{CountResponse, IDEMPOTENCY_KEY, ScoreRequest, ScoreResponse};
use super::query::{Key, Query, query_keys};
use sync::{Slots, Stop, lock};

/// An endpoint that speaks the [protocol](super::protocol), as a [`BlackBox`].
///
/// These failures are retried:
/// - a connection that is refused or breaks off, and an answer that does not arrive completely in
///   time;
/// - HTTP 408, 429 and 5xx;
/// - an answer that is not valid JSON or too long;
/// - scores that are not finite, or too few or too many of them.
///
/// Any other HTTP status is an error at once, also 206 and other successes than 200: they are no
/// complete answer. Redirects are not followed.
///
/// A proxy that the environment names is used ([`HttpConfig::new`]), but never for this machine.
///
/// ```no_run
/// use flops_multimodal::blackbox::{BlackBox, Charge, HttpBlackBox, HttpConfig, Metered, Query};
///
/// let endpoint = HttpBlackBox::connect(HttpConfig::new("http://localhost:8080").with_batch_size(16))?;
/// let metered = Metered::new(endpoint, 10_000).with_charge(Charge::PerAnswer);
/// let metered = metered.with_journal("answers.journal")?;
/// let image = vec![0.5; metered.info().image_len()];
/// let scores = metered.scores(&[Query::new(image)])?;
/// # Ok::<(), flops_multimodal::blackbox::BlackBoxError>(())
/// ```
pub struct HttpBlackBox {
    config: HttpConfig,
    info: Info,
    agent: Agent,
    slots: Slots,
}

impl HttpBlackBox {
    /// Connects, and gets the [`Info`] of the endpoint, with retries. This is not a query.
    ///
    /// # Errors
    /// If a setting is out of range, or the endpoint does not send a valid [`Info`]. An info of
    /// absurd sizes is an error at once, before anything is allocated by them.
    pub fn connect(config: HttpConfig) -> Result<Self, BlackBoxError> {
        config.check()?;
        let agent = Agent::config_builder()
            .timeout_global(Some(config.timeout))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_idle_connections_per_host(config.concurrency)
            .proxy(config.proxy())
            .build()
            .new_agent();
        let slots = Slots::new(config.concurrency);
        let info = Info { classes: Vec::new(), image: [0; 3], context: None };
        let mut endpoint = Self { config, info, agent, slots };
        endpoint.info = endpoint.get::<Info>("/v1/info", Info::checked)?;
        Ok(endpoint)
    }

    /// The queries of all clients that the endpoint says it has charged. This is not a query.
    ///
    /// # Errors
    /// If the endpoint does not count queries, or does not answer.
    pub fn count(&self) -> Result<u64, BlackBoxError> {
        Ok(self.get("/v1/count", Ok::<CountResponse, BlackBoxError>)?.queries)
    }

    /// The answer to a `GET` of `path`, with retries.
    fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        check: impl Fn(T) -> Result<T, BlackBoxError>,
    ) -> Result<T, BlackBoxError> {
        self.with_retries(Key::of_request(&[]), &Stop::default(), || {
            let url = format!("{}{path}", self.config.url);
            let _slot = self.slots.take();
            let mut request = self.agent.get(&url);
            if let Some(token) = &self.config.token {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            let body = self.body(&url, request.call(), 16 << 20)?;
            let answer = serde_json::from_slice(&body);
            // JSON that says something else says so again
            Ok(check(answer.map_err(|why| Failure { transient: !why.is_data(), ..unparsed(&url, &body, &why) })?)?)
        })
    }

    /// Sends one batch, with retries.
    fn send_batch(
        &self,
        queries: &[Query],
        key: Key,
        meter: &dyn Meter,
        stop: &Stop,
    ) -> Result<Vec<Vec<f32>>, BlackBoxError> {
        let url = format!("{}/v1/scores", self.config.url);
        let wire = |why: serde_json::Error| BlackBoxError::Wire { what: "request".into(), why: why.to_string() };
        let body = serde_json::to_vec(&ScoreRequest::new(queries)).map_err(wire)?;
        // a score takes less than 32 bytes; the rest is for fields that a server may add
        let limit = (queries.len() as u64).saturating_mul(32 * self.info.classes.len() as u64 + 32) + (64 << 10);
        self.with_retries(key, stop, || {
            let _slot = self.slots.take();
            stop.check()?;
            meter.attempt(queries.len())?;
            let mut request = self.agent.post(&url).header("Content-Type", "application/json");
            request = request.header(IDEMPOTENCY_KEY, key.to_string());
            if let Some(token) = &self.config.token {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            let answer = match self.body(&url, request.send(&body[..]), limit) {
                Ok(answer) => answer,
                Err(failure) => {
                    if matches!(failure.error, BlackBoxError::Transport { unsent: true, .. }) {
                        meter.unsent(queries.len())?;
                    }
                    return Err(failure);
                }
            };
            let parsed = serde_json::from_slice::<ScoreResponse>(&answer);
            let answer = parsed.map_err(|why| unparsed(&url, &answer, &why))?;
            self.info.check_scores(queries.len(), &answer.scores).map_err(Failure::from_request)?;
            Ok(answer.scores)
        })
    }

    /// Repeats `attempt` until it succeeds, fails with a permanent error, or no retries are left.
    fn with_retries<T>(
        &self,
        key: Key,
        stop: &Stop,
        mut attempt: impl FnMut() -> Result<T, Failure>,
    ) -> Result<T, BlackBoxError> {
        let mut retry = 0;
        loop {
            let Failure { error, transient, retry_after } = match attempt() {
                Ok(value) => return Ok(value),
                Err(failure) => failure,
            };
            if !transient {
                return Err(error);
            }
            if retry == self.config.retries {
                return Err(match retry {
                    0 => error,
                    _ => BlackBoxError::GaveUp { attempts: retry.saturating_add(1), last: Box::new(error) },
                });
            }
            stop.sleep(self.config.wait(key, retry, retry_after))?;
            retry += 1;
        }
    }

    /// The body of the answer to a request, of at most `limit` bytes.
    fn body(&self, url: &str, answer: Result<Response<Body>, ureq::Error>, limit: u64) -> Result<Vec<u8>, Failure> {
        let fail = |error| Err(self.failure(url, error));
        let mut answer = match answer {
            Ok(answer) => answer,
            Err(error) => return fail(error),
        };
        let status = answer.status().as_u16();
        if answer.status().is_success() && status != 200 {
            return Err(Failure::from_request(BlackBoxError::NotComplete { url: url.into(), status }));
        }
        if status != 200 {
            let retry_after =
                answer.headers().get("Retry-After").and_then(|value| value.to_str().ok()?.trim().parse().ok());
            let mut message = Vec::new();
            // a body that breaks off is no further error: the status suffices
            let _ = answer.body_mut().as_reader().take(4096).read_to_end(&mut message);
            let error = BlackBoxError::Status { url: url.into(), status, message: excerpt(&message, 200) };
            return Err(Failure { retry_after: retry_after.map(Duration::from_secs), ..Failure::from_request(error) });
        }
        // one byte more than the limit, to detect an answer that is longer
        let mut body = Vec::new();
        let reader = answer.body_mut().with_config().limit(limit.saturating_add(1)).reader();
        if let Err(error) = reader.take(limit.saturating_add(1)).read_to_end(&mut body) {
            return fail(error.into());
        }
        if body.len() as u64 > limit {
            return Err(Failure::from_request(BlackBoxError::TooLong { url: url.into(), limit }));
        }
        Ok(body)
    }

    /// The failure that an error of the HTTP library stands for.
    fn failure(&self, url: &str, error: ureq::Error) -> Failure {
        let url = url.to_string();
        Failure::from_request(match error {
            ureq::Error::Timeout(_) => BlackBoxError::Timeout { url, seconds: self.config.timeout.as_secs_f64() },
            ureq::Error::TlsRequired => BlackBoxError::Tls { url },
            error => {
                // both errors occur before the first byte of a request is sent
                let refused =
                    matches!(&error, ureq::Error::Io(why) if why.kind() == std::io::ErrorKind::ConnectionRefused);
                let unsent = refused || matches!(error, ureq::Error::HostNotFound);
                BlackBoxError::Transport { url, why: error.to_string(), unsent }
            }
        })
    }
}

impl BlackBox for HttpBlackBox {
    fn info(&self) -> &Info {
        &self.info
    }

    fn scores(&self, queries: &[Query]) -> Result<Vec<Vec<f32>>, BlackBoxError> {
        self.scores_metered(queries, &Unmetered)
    }

    fn scores_metered(&self, queries: &[Query], meter: &dyn Meter) -> Result<Vec<Vec<f32>>, BlackBoxError> {
        self.info.check_queries(queries)?;
        let keys = query_keys(queries);
        let batches: Vec<(usize, &[Query])> = queries
            .chunks(self.config.batch_size)
            .enumerate()
            .map(|(at, rows)| (at * self.config.batch_size, rows))
            .collect();
        let (stop, next) = (Stop::default(), AtomicUsize::new(0));
        let all = Mutex::new(vec![Vec::new(); queries.len()]);
        let work = || {
            while let Some(&(first, rows)) = batches.get(next.fetch_add(1, Ordering::Relaxed)) {
                let answered = stop.check().and_then(|()| {
                    let key = Key::of_request(&keys[first..first + rows.len()]);
                    let scores = self.send_batch(rows, key, meter, &stop)?;
                    meter.answered(first, &scores)?;
                    Ok(scores)
                });
                match answered {
                    Ok(scores) => lock(&all)[first..].iter_mut().zip(scores).for_each(|(row, scores)| *row = scores),
                    Err(error) => return stop.fail(error),
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..self.config.concurrency.min(batches.len()) {
                // if a thread cannot be started, fewer threads do the work
                let _ = std::thread::Builder::new().spawn_scoped(scope, work);
            }
            work();
        });
        stop.check()?;
        Ok(all.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

/// An attempt that failed.
struct Failure {
    error: BlackBoxError,
    /// Whether another attempt may succeed.
    transient: bool,
    /// The wait before it, if the server names one.
    retry_after: Option<Duration>,
}

impl Failure {
    /// The failure of a request, which the kind of error makes transient or permanent.
    fn from_request(error: BlackBoxError) -> Self {
        Self { transient: is_transient(&error), error, retry_after: None }
    }
}

/// A failure outside the request, such as a cap that is reached, is permanent.
impl From<BlackBoxError> for Failure {
    fn from(error: BlackBoxError) -> Self {
        Self { error, transient: false, retry_after: None }
    }
}

/// The failure of an answer that cannot be parsed.
fn unparsed(url: &str, body: &[u8], why: &serde_json::Error) -> Failure {
    let (why, begin) = (why.to_string(), excerpt(body, 80));
    Failure::from_request(BlackBoxError::Body { url: url.into(), why, begin })
}

/// Whether another attempt may succeed.
fn is_transient(error: &BlackBoxError) -> bool {
    use BlackBoxError::{Body, Classes, Rows, Score, Status, Timeout, TooLong, Transport};
    match error {
        Status { status, .. } => matches!(status, 408 | 429 | 500..=599),
        Transport { .. } | Timeout { .. } | Body { .. } | TooLong { .. } => true,
        Rows { .. } | Classes { .. } | Score { .. } => true,
        _ => false,
    }
}

/// The first `chars` characters of a text, on one line.
fn excerpt(text: &[u8], chars: usize) -> String {
    let text = String::from_utf8_lossy(text);
    text.trim().chars().take(chars).map(|char| if char.is_control() { ' ' } else { char }).collect()
}

#[cfg(test)]
mod tests;
