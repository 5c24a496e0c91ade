//! Settings of the client of an HTTP endpoint.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ureq::Proxy;
use ureq::http::Uri;

use crate::blackbox::error::BlackBoxError;
use crate::blackbox::query::Key;

/// The address of an endpoint, and how to send requests to it.
#[derive(Clone)]
pub struct HttpConfig {
    pub(super) url: String,
    pub(super) batch_size: usize,
    pub(super) concurrency: usize,
    pub(super) timeout: Duration,
    pub(super) retries: u32,
    base: Duration,
    max: Duration,
    pub(super) token: Option<String>,
}

impl HttpConfig {
    /// The endpoint at `url`, such as `http://localhost:8080`: the part before `/v1/`.
    ///
    /// Requests go through the proxy that `ALL_PROXY`, `HTTPS_PROXY` or `HTTP_PROXY` names, the
    /// first of these that is set, unless `NO_PROXY` lists the host. Those to this machine
    /// (`localhost`, 127.0.0.0/8 and `::1`) never do.
    #[must_use]
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into().trim_end_matches('/').to_string(),
            batch_size: 32,
            concurrency: 2,
            timeout: Duration::from_secs(30),
            retries: 5,
            base: Duration::from_millis(250),
            max: Duration::from_secs(10),
            token: None,
        }
    }

    /// Largest number of queries in a request, at least 1 (default 32).
    #[must_use]
    pub fn with_batch_size(self, batch_size: usize) -> Self {
        Self { batch_size, ..self }
    }

    /// Largest number of requests in flight, over all calling threads, 1 to 256 (default 2).
    #[must_use]
    pub fn with_concurrency(self, concurrency: usize) -> Self {
        Self { concurrency, ..self }
    }

    /// Time limit of a request, from the name look-up to the last byte of the answer, up to a day
    /// (default 30 s).
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Largest number of retries of a request (default 5; 0 for none).
    #[must_use]
    pub fn with_retries(self, retries: u32) -> Self {
        Self { retries, ..self }
    }

    /// The wait before the first retry, which doubles with each further one up to `max` (default
    /// 0.25 s and 10 s; `max` is at most a day).
    ///
    /// Each wait is shortened by up to half, by a fraction that depends on the request and the
    /// attempt. `Retry-After` in seconds replaces the wait, up to `max`.
    #[must_use]
    pub fn with_backoff(self, base: Duration, max: Duration) -> Self {
        Self { base, max, ..self }
    }

    /// A token that each request carries as `Authorization: Bearer …` (default none). No error and
    /// no log shows it.
    #[must_use]
    pub fn with_bearer_token(self, token: impl Into<String>) -> Self {
        Self { token: Some(token.into()), ..self }
    }

    /// Checks that each setting lies in its range.
    pub(super) fn check(&self) -> Result<(), BlackBoxError> {
        const DAY: Duration = Duration::from_secs(86_400);
        let fail = |name, value: String, remedy| Err(BlackBoxError::Setting { name, value, remedy });
        if self.batch_size == 0 {
            return fail("batch_size", "0".into(), "give 1 or more");
        }
        if !(1..=256).contains(&self.concurrency) {
            return fail("concurrency", self.concurrency.to_string(), "give 1 to 256");
        }
        if self.timeout.is_zero() || self.timeout > DAY {
            return fail("timeout", format!("{:?}", self.timeout), "give more than 0 and at most a day");
        }
        if self.base > self.max || self.max > DAY {
            let remedy = "give a first wait no longer than the longest, and a longest of at most a day";
            return fail("backoff", format!("{:?} to {:?}", self.base, self.max), remedy);
        }
        if let Some(token) = &self.token
            && (token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()))
        {
            return fail("bearer_token", "(not shown)".into(), "give printable ASCII without spaces or line ends");
        }
        // errors show the address, so it must hold no password
        if self.url.contains('@') {
            return fail("url", "(not shown)".into(), "leave out user and password, and use with_bearer_token");
        }
        let uri = self.url.parse::<Uri>().ok();
        match uri.as_ref().and_then(|uri| uri.scheme_str().filter(|_| uri.query().is_none())) {
            Some("https") if cfg!(not(feature = "tls")) => Err(BlackBoxError::Tls { url: self.url.clone() }),
            Some("http" | "https") => Ok(()),
            _ => fail("url", self.url.clone(), "give an address like http://localhost:8080"),
        }
    }

    /// The proxy that the environment names, unless the endpoint is on this machine.
    pub(super) fn proxy(&self) -> Option<Proxy> {
        let uri = self.url.parse::<Uri>().ok()?;
        uri.host().filter(|host| !is_loopback(host)).and_then(|_| Proxy::try_from_env())
    }

    /// The wait before retry number `retry`, counted from 0.
    pub(super) fn wait(&self, key: Key, retry: u32, after: Option<Duration>) -> Duration {
        if let Some(after) = after {
            return after.min(self.max);
        }
        let full = self.base.saturating_mul(1u32.checked_shl(retry).unwrap_or(u32::MAX)).min(self.max);
        // each attempt takes the next byte of the key
        let part = f64::from(key.0[retry as usize % key.0.len()]) / 255.0;
        full.mul_f64(1.0 - 0.5 * part)
    }
}

/// Whether a host of an address is this machine.
pub(super) fn is_loopback(host: &str) -> bool {
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    if name == "localhost" || name.ends_with(".localhost") {
        return true;
    }
    if let Ok(address) = name.parse::<Ipv4Addr>() {
        return address.is_loopback();
    }
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<Ipv6Addr>();
    address.is_ok_and(|it| it.is_loopback() || it.to_ipv4_mapped().is_some_and(|it| it.is_loopback()))
}

impl fmt::Debug for HttpConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpConfig")
            .field("url", &self.url)
            .field("batch_size", &self.batch_size)
            .field("concurrency", &self.concurrency)
            .field("timeout", &self.timeout)
            .field("retries", &self.retries)
            .field("backoff", &(self.base, self.max))
            .field("bearer_token", &self.token.as_ref().map(|_| "(not shown)"))
            .finish()
    }
}
