//! How a NATS server is reached.

use std::error::Error;
use std::fmt::{self, Debug, Formatter};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_nats::{ConnectError, ConnectErrorKind, ConnectOptions, Event, ServerAddr};

use crate::{DistributedError, checked_name};

/// How a worker reaches the NATS servers of a run.
///
/// ```
/// use std::time::Duration;
/// use flops_distributed::{NatsAuth, NatsOptions};
///
/// let options = NatsOptions {
///     auth: NatsAuth::Credentials("worker.creds".into()),
///     limit: Duration::from_secs(300),
///     ..NatsOptions::new(["tls://10.0.0.7:4222", "tls://10.0.0.8:4222"], "vit-b_2")
/// };
/// ```
#[derive(Clone)]
pub struct NatsOptions {
    /// Addresses, such as `nats://10.0.0.7:4222`: servers of one cluster, tried in any order.
    pub servers: Vec<String>,
    /// The name of the run: 1 to 64 letters, digits, `-` or `_`. Workers of a run share it, and no two
    /// runs on a server do.
    pub run: String,
    /// What the servers want to see. [`NatsAuth::None`] by default.
    pub auth: NatsAuth,
    /// A file with the certificates that a server's must be signed by, in place of the system's. The
    /// connection is then encrypted, as it is with an address that begins with `tls://`.
    pub ca: Option<PathBuf>,
    /// The files of a client certificate and of its key.
    pub client_certificate: Option<(PathBuf, PathBuf)>,
    /// How long a server that does not answer is waited for. 60 s by default.
    pub limit: Duration,
    /// How many servers of a cluster keep the log: 1, the default, or 3 or 5.
    pub replicas: usize,
}

/// What shows a server who connects.
#[derive(Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum NatsAuth {
    /// Nothing.
    #[default]
    None,
    /// A token.
    Token(String),
    /// A user's name and password.
    User {
        /// The name.
        name: String,
        /// The password.
        password: String,
    },
    /// A file of credentials, as `nsc` makes it.
    Credentials(PathBuf),
}

impl NatsOptions {
    /// Servers without authentication.
    pub fn new<S: Into<String>>(servers: impl IntoIterator<Item = S>, run: impl Into<String>) -> Self {
        Self {
            servers: servers.into_iter().map(Into::into).collect(),
            run: run.into(),
            auth: NatsAuth::None,
            ca: None,
            client_certificate: None,
            limit: Duration::from_secs(60),
            replicas: 1,
        }
    }

    /// The addresses without names and passwords, for messages.
    pub(super) fn named(&self) -> String {
        let plain: Vec<String> = self.servers.iter().map(|server| without_user(server)).collect();
        format!("the NATS server at {}", plain.join(", "))
    }

    /// Everything that can be checked before there is a connection.
    pub(super) fn checked(&self) -> Result<Vec<ServerAddr>, DistributedError> {
        checked_name("the name of the run", &self.run)?;
        let setting = |what, value, remedy: &str| DistributedError::Setting { what, value, remedy: remedy.into() };
        if self.servers.is_empty() {
            return Err(setting("the list of NATS servers", String::new(), "give one, such as nats://127.0.0.1:4222"));
        }
        if !matches!(self.replicas, 1 | 3 | 5) {
            return Err(setting("the number of replicas", self.replicas.to_string(), "give 1, 3 or 5"));
        }
        let server = |text: &String| {
            let remedy = "give an address such as nats://127.0.0.1:4222";
            text.parse().map_err(|_| setting("the address of a NATS server", without_user(text), remedy))
        };
        self.servers.iter().map(server).collect()
    }

    /// Options of a connection, except for what is called when it changes.
    pub(super) fn connection(&self, worker: &str) -> Result<ConnectOptions, DistributedError> {
        let delay = |attempts: usize| Duration::from_millis((20 << attempts.min(6)) as u64).min(Duration::from_secs(1));
        let mut options = ConnectOptions::new()
            .name(format!("flops {} {worker}", self.run))
            .connection_timeout(self.limit.min(Duration::from_secs(5)))
            .request_timeout(Some(ANSWER))
            .ping_interval(Duration::from_secs(10))
            .max_reconnects(None)
            .reconnect_delay_callback(delay);
        options = match &self.auth {
            NatsAuth::None => options,
            NatsAuth::Token(token) => options.token(token.clone()),
            NatsAuth::User { name, password } => options.user_and_password(name.clone(), password.clone()),
            NatsAuth::Credentials(path) => {
                let remedy = "give a file of credentials, as `nsc generate creds` makes it";
                options.credentials(&text(path)?).map_err(|_| DistributedError::Setting {
                    what: "the credentials file",
                    value: path.display().to_string(),
                    remedy: remedy.into(),
                })?
            }
        };
        if let Some(ca) = &self.ca {
            text(ca)?;
            options = options.add_root_certificates(ca.clone()).require_tls(true);
        }
        if let Some((certificate, key)) = &self.client_certificate {
            text(certificate)?;
            text(key)?;
            options = options.add_client_certificate(certificate.clone(), key.clone()).require_tls(true);
        }
        Ok(options)
    }
}

/// How long a server may take for an answer before it is asked again.
pub(super) const ANSWER: Duration = Duration::from_secs(3);

/// What to do about an error of a first connection, if it stays however often one tries.
pub(super) fn remedy(why: &ConnectError) -> Option<&'static str> {
    let certificates = "give the file of certificates that the server's is signed by, and the client certificate that \
                        it asks for";
    match why.kind() {
        ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication => {
            Some("give the token, the user and password, or the credentials that the server wants")
        }
        ConnectErrorKind::Tls => Some(certificates),
        // what went wrong between the two is invalid data to the one
        ConnectErrorKind::Io => {
            let why = why.source().and_then(|source| source.downcast_ref::<io::Error>());
            why.filter(|why| why.kind() == io::ErrorKind::InvalidData).map(|_| certificates)
        }
        ConnectErrorKind::ServerParse => Some("give an address such as nats://127.0.0.1:4222"),
        _ => None,
    }
}

/// A line for the log of the program.
pub(super) fn note(event: &Event, named: &str) {
    match event {
        Event::Connected => log::info!("connected with {named}"),
        Event::Disconnected => log::warn!("{named} is lost; waiting for it"),
        Event::ClientError(why) => log::debug!("{named}: {why}"),
        other => log::warn!("{named}: {other}"),
    }
}

fn text(path: &Path) -> Result<String, DistributedError> {
    std::fs::read_to_string(path)
        .map_err(|why| DistributedError::Io { what: format!("{} cannot be read", path.display()), why })
}

/// An address without a name and password.
fn without_user(server: &str) -> String {
    let (scheme, rest) = server.split_once("://").map_or(("", server), |(scheme, rest)| (scheme, rest));
    let host = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
    if scheme.is_empty() { host.into() } else { format!("{scheme}://{host}") }
}

/// Secrets are not shown.
impl Debug for NatsOptions {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let servers: Vec<String> = self.servers.iter().map(|server| without_user(server)).collect();
        f.debug_struct("NatsOptions")
            .field("servers", &servers)
            .field("run", &self.run)
            .field("auth", &self.auth)
            .field("ca", &self.ca)
            .field("client_certificate", &self.client_certificate)
            .field("limit", &self.limit)
            .field("replicas", &self.replicas)
            .finish()
    }
}

/// Secrets are not shown.
impl Debug for NatsAuth {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::Token(_) => f.write_str("Token"),
            Self::User { name, .. } => write!(f, "User({name:?})"),
            Self::Credentials(path) => write!(f, "Credentials({})", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_shown() {
        let user = NatsAuth::User { name: "ann".into(), password: "secret".into() };
        for auth in [NatsAuth::Token("secret".into()), user] {
            let options = NatsOptions { auth, ..NatsOptions::new(["nats://ann:secret@host:4222"], "run") };
            let shown = format!("{options:?} {}", options.named());
            assert!(!shown.contains("secret") && shown.contains("nats://host:4222"), "{shown}");
        }
        let options = NatsOptions::new(["nats://ann:secret@ho st"], "run");
        let message = options.checked().unwrap_err().to_string();
        assert!(message.contains("ho st") && !message.contains("secret"), "{message}");
    }

    #[test]
    fn wrong_options_are_named_before_anything_is_tried() {
        let message = |options: NatsOptions| options.checked().unwrap_err().to_string();
        let one = || NatsOptions::new(["nats://127.0.0.1:1"], "run");
        assert!(message(NatsOptions { run: "a.b".into(), ..one() }).contains("a.b"));
        assert!(message(NatsOptions { servers: vec![], ..one() }).contains("nats://127.0.0.1:4222"));
        assert!(message(NatsOptions { replicas: 2, ..one() }).contains("1, 3 or 5"));
        let absent = || PathBuf::from("/absent/file");
        for options in [
            NatsOptions { ca: Some(absent()), ..one() },
            NatsOptions { client_certificate: Some((absent(), absent())), ..one() },
            NatsOptions { auth: NatsAuth::Credentials(absent()), ..one() },
        ] {
            assert!(options.connection("w").unwrap_err().to_string().contains("/absent/file cannot be read"));
        }
    }
}
