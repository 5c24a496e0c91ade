//! A box behind HTTP: batches in bounded concurrency, each with a time limit and retries.

mod config;

use std::io::Read;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::de::DeserializeOwned;
use ureq::http::Response;
use ureq::{Agent, Body};

pub use config::HttpConfig;

use super::protocol::{CountResponse, IDEMPOTENCY_KEY, ScoreRequest, ScoreResponse};
use super::{BlackBox, BlackBoxError, Info, Key, Meter, Query, Unmetered, keys};

/// An endpoint that speaks the [protocol](super::protocol), as a [`BlackBox`].
///
/// What is sent again: requests that met a refused or broken connection, no complete answer in time, HTTP 408, 429 or 5xx, or an
/// answer that is no JSON, has the wrong number of rows or scores, or a score that is not finite. Any other HTTP status is an
/// error at once. Redirects are not followed.
///
/// ```no_run
/// use flops_multimodal::blackbox::{BlackBox, Charge, HttpBlackBox, HttpConfig, Metered, Query};
///
/// let endpoint = HttpBlackBox::connect(HttpConfig::new("http://localhost:8080").with_batch_size(16))?;
/// let metered = Metered::new(endpoint, 10_000).with_charge(Charge::PerAnswer).with_journal("answers.journal")?;
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
    /// Asks the endpoint what it takes and gives, with the same retries as any request. This is no query.
    ///
    /// # Errors
    /// When a setting is out of range, or the endpoint does not say what it is.
    pub fn connect(config: HttpConfig) -> Result<Self, BlackBoxError> {
        config.check()?;
        let agent = Agent::config_builder()
            .timeout_global(Some(config.timeout))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_idle_connections_per_host(config.concurrency)
            .build()
            .new_agent();
        let slots = Slots { free: Mutex::new(config.concurrency), changed: Condvar::new() };
        let info = Info { classes: Vec::new(), image: [0; 3], context: None };
        let mut endpoint = Self { config, info, agent, slots };
        endpoint.info = endpoint.get::<Info>("/v1/info", Info::checked)?;
        Ok(endpoint)
    }

    /// The queries that the endpoint says it has charged, of whoever asked it. This is no query.
    ///
    /// # Errors
    /// When the endpoint does not say it, or cannot be asked.
    pub fn count(&self) -> Result<u64, BlackBoxError> {
        Ok(self.get("/v1/count", Ok::<CountResponse, BlackBoxError>)?.queries)
    }

    /// What the endpoint says at that path, with the same retries as any request.
    fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        check: impl Fn(T) -> Result<T, BlackBoxError>,
    ) -> Result<T, BlackBoxError> {
        self.persist(Key::of_rows(&[]), &Stop::default(), || {
            let url = format!("{}{path}", self.config.url);
            let _slot = self.slots.take();
            let mut request = self.agent.get(&url);
            if let Some(token) = &self.config.token {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            Ok(check(self.read(&url, request.call(), 16 << 20)?)?)
        })
    }

    /// One batch, with retries.
    fn batch(
        &self,
        queries: &[Query],
        key: Key,
        meter: &dyn Meter,
        stop: &Stop,
    ) -> Result<Vec<Vec<f32>>, BlackBoxError> {
        let url = format!("{}/v1/scores", self.config.url);
        let wire = |why: serde_json::Error| BlackBoxError::Wire { what: "request".into(), why: why.to_string() };
        let body = serde_json::to_vec(&ScoreRequest::new(queries)).map_err(wire)?;
        // a number takes less than 32 bytes; the rest is for what a server may add
        let limit = (queries.len() as u64).saturating_mul(32 * self.info.classes.len() as u64 + 32) + (64 << 10);
        self.persist(key, stop, || {
            let _slot = self.slots.take();
            stop.check()?;
            meter.attempt(queries.len())?;
            let mut request = self.agent.post(&url).header("Content-Type", "application/json");
            request = request.header(IDEMPOTENCY_KEY, key.to_string());
            if let Some(token) = &self.config.token {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            let answer: ScoreResponse = match self.read(&url, request.send(&body[..]), limit) {
                Ok(answer) => answer,
                Err(failure) => {
                    if matches!(failure.error, BlackBoxError::Transport { unsent: true, .. }) {
                        meter.unsent(queries.len())?;
                    }
                    return Err(failure);
                }
            };
            self.info.check_scores(queries.len(), &answer.scores).map_err(Failure::of_request)?;
            Ok(answer.scores)
        })
    }

    /// Makes attempts until one succeeds, one fails for good, or all are used up.
    fn persist<T>(
        &self,
        key: Key,
        stop: &Stop,
        mut attempt: impl FnMut() -> Result<T, Failure>,
    ) -> Result<T, BlackBoxError> {
        let mut retry = 0;
        loop {
            let Failure { error, again, after } = match attempt() {
                Ok(value) => return Ok(value),
                Err(failure) => failure,
            };
            if !again {
                return Err(error);
            }
            if retry == self.config.retries {
                return Err(match retry {
                    0 => error,
                    _ => BlackBoxError::GaveUp { attempts: retry.saturating_add(1), last: Box::new(error) },
                });
            }
            stop.sleep(self.config.wait(key, retry, after))?;
            retry += 1;
        }
    }

    /// The answer to a request as JSON, or what was wrong with it.
    fn read<T: DeserializeOwned>(
        &self,
        url: &str,
        answer: Result<Response<Body>, ureq::Error>,
        limit: u64,
    ) -> Result<T, Failure> {
        let fail = |error| Err(self.failure(url, error));
        let mut answer = match answer {
            Ok(answer) => answer,
            Err(error) => return fail(error),
        };
        let status = answer.status().as_u16();
        if !answer.status().is_success() {
            let after = answer.headers().get("Retry-After").and_then(|value| value.to_str().ok()?.trim().parse().ok());
            let mut message = Vec::new();
            // the status says enough where its text breaks off
            let _ = answer.body_mut().as_reader().take(4096).read_to_end(&mut message);
            let error = BlackBoxError::Status { url: url.into(), status, message: excerpt(&message, 200) };
            return Err(Failure { after: after.map(Duration::from_secs), ..Failure::of_request(error) });
        }
        // larger by one, so that an answer cut at the limit is told from a whole one
        let mut body = Vec::new();
        let reader = answer.body_mut().with_config().limit(limit.saturating_add(1)).reader();
        if let Err(error) = reader.take(limit.saturating_add(1)).read_to_end(&mut body) {
            return fail(error.into());
        }
        if body.len() as u64 > limit {
            return Err(Failure::of_request(BlackBoxError::TooLong { url: url.into(), limit }));
        }
        serde_json::from_slice(&body).map_err(|why| {
            let (why, begin) = (why.to_string(), excerpt(&body, 80));
            Failure::of_request(BlackBoxError::Body { url: url.into(), why, begin })
        })
    }

    fn failure(&self, url: &str, error: ureq::Error) -> Failure {
        let url = url.to_string();
        Failure::of_request(match error {
            ureq::Error::Timeout(_) => BlackBoxError::Timeout { url, seconds: self.config.timeout.as_secs_f64() },
            ureq::Error::TlsRequired => BlackBoxError::Tls { url },
            error => {
                // both come before the first byte of a request
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
        let keys = keys(queries);
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
                    let key = Key::of_rows(&keys[first..first + rows.len()]);
                    let scores = self.batch(rows, key, meter, &stop)?;
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
                // where no more threads are to be had, fewer do the work
                let _ = std::thread::Builder::new().spawn_scoped(scope, work);
            }
            work();
        });
        stop.check()?;
        Ok(all.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

/// An attempt that failed, whether there may be another, and when the server would like it.
struct Failure {
    error: BlackBoxError,
    again: bool,
    after: Option<Duration>,
}

impl Failure {
    /// What went wrong with a request.
    fn of_request(error: BlackBoxError) -> Self {
        Self { again: is_passing(&error), error, after: None }
    }
}

/// What went wrong beside the request, such as a cap that is reached, is final.
impl From<BlackBoxError> for Failure {
    fn from(error: BlackBoxError) -> Self {
        Self { error, again: false, after: None }
    }
}

/// Whether the next attempt may fare better.
fn is_passing(error: &BlackBoxError) -> bool {
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many requests may still be sent.
struct Slots {
    free: Mutex<usize>,
    changed: Condvar,
}

struct Slot<'a>(&'a Slots);

impl Slots {
    /// Waits until there is one.
    fn take(&self) -> Slot<'_> {
        let free = lock(&self.free);
        *self.changed.wait_while(free, |free| *free == 0).unwrap_or_else(PoisonError::into_inner) -= 1;
        Slot(self)
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        *lock(&self.0.free) += 1;
        self.0.changed.notify_one();
    }
}

/// The first error of a call, which ends the work of all its threads.
#[derive(Default)]
struct Stop {
    error: Mutex<Option<BlackBoxError>>,
    changed: Condvar,
}

impl Stop {
    fn fail(&self, error: BlackBoxError) {
        lock(&self.error).get_or_insert(error);
        self.changed.notify_all();
    }

    fn check(&self) -> Result<(), BlackBoxError> {
        lock(&self.error).clone().map_or(Ok(()), Err)
    }

    /// Waits for `time`, or until there is an error.
    fn sleep(&self, time: Duration) -> Result<(), BlackBoxError> {
        let error = lock(&self.error);
        let waited = self.changed.wait_timeout_while(error, time, |error| error.is_none());
        let (error, _) = waited.unwrap_or_else(PoisonError::into_inner);
        error.clone().map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests;
