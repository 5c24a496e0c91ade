//! The flags of runs that several processes share.

use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Result, bail, ensure};
use clap::Args;
use flops_distributed::SumMode;

/// Leaves of a run that is shared, at least.
const LEAVES: usize = 8;
/// The most processes on one machine.
const MAX_WORKERS: usize = 256;

/// Which processes share a run, and how.
#[derive(Args, Clone, Debug)]
pub struct WorkerArgs {
    /// Share the run among this many processes, which the program starts and watches. One that is
    /// killed is started again. The model is that of one process with the same --leaves.
    #[arg(long, conflicts_with = "executor")]
    pub workers: Option<usize>,
    /// Share the run with the same command elsewhere: nats://HOST:PORT, nats://USER:PASSWORD@HOST or
    /// nats://TOKEN@HOST (tls:// for encryption; servers of a cluster are joined by commas; build
    /// with --features nats), or mpi, under mpirun (build with --features mpi).
    #[arg(long)]
    pub executor: Option<Engine>,
    /// The name of the run on a NATS server, the same for all its workers: letters, digits, - and _.
    #[arg(long)]
    pub run: Option<String>,
    /// Join a run on a NATS server that has begun: a name that no run has is an error.
    #[arg(long)]
    pub join: bool,
    /// Parts that a batch is cut into, a power of two up to 1024: the most workers that share it.
    /// The model depends on it in rounding only [default: 1; with workers 8, or more for more than
    /// 8].
    #[arg(long)]
    pub leaves: Option<usize>,
    /// How workers add gradients: gradients (parts are exchanged), scalars (every worker adds all of
    /// them itself from losses and seeds) or auto (what is faster).
    #[arg(long, default_value_t)]
    pub sums: SumMode,
    /// File of credentials for a NATS server, as `nsc` makes it.
    #[arg(long)]
    pub nats_credentials: Option<PathBuf>,
    /// File of the certificates that a NATS server's must be signed by.
    #[arg(long)]
    pub nats_ca: Option<PathBuf>,
    /// File of a client certificate for a NATS server.
    #[arg(long, requires = "nats_key")]
    pub nats_certificate: Option<PathBuf>,
    /// File of the key of --nats-certificate.
    #[arg(long, requires = "nats_certificate")]
    pub nats_key: Option<PathBuf>,
    /// Servers of a NATS cluster that keep the log of the run: 1, 3 or 5.
    #[arg(long, default_value_t = 1)]
    pub nats_replicas: usize,
    /// Seconds that a NATS server, or a rank of MPI, is waited for [default: 60; 1800 for ranks].
    #[arg(long)]
    pub wait: Option<u64>,
}

/// What carries the results of the jobs of a run.
#[derive(Clone, PartialEq, Eq)]
pub enum Engine {
    /// The hub that the environment names.
    Hub,
    /// Servers with JetStream.
    Nats(Vec<String>),
    /// The ranks of a gang.
    Mpi,
}

impl Engine {
    /// Returns the name in summaries.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hub => "hub",
            Self::Nats(_) => "nats",
            Self::Mpi => "mpi",
        }
    }

    /// Checks that the program has been built with it.
    ///
    /// # Errors
    /// Where it has not; the message names the feature.
    fn check_built(&self) -> Result<()> {
        let built = match self {
            Self::Hub => true,
            Self::Nats(_) => cfg!(feature = "nats"),
            Self::Mpi => cfg!(feature = "mpi"),
        };
        ensure!(built, "--executor {self} is not in this build; build with --features {}", self.name());
        Ok(())
    }
}

impl FromStr for Engine {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_server = |text: &&str| text.starts_with("nats://") || text.starts_with("tls://");
        match text {
            "hub" => Ok(Self::Hub),
            "mpi" => Ok(Self::Mpi),
            _ if text.split(',').all(|server| is_server(&server)) => {
                Ok(Self::Nats(text.split(',').map(str::to_string).collect()))
            }
            _ => Err("give nats://HOST[:PORT], tls://HOST[:PORT] or mpi".into()),
        }
    }
}

/// Without user names, passwords and tokens.
impl Display for Engine {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let Self::Nats(servers) = self else { return f.write_str(self.name()) };
        let plain = servers.iter().map(|server| match (server.split_once("://"), server.rsplit_once('@')) {
            (Some((scheme, _)), Some((_, host))) => format!("{scheme}://{host}"),
            _ => server.clone(),
        });
        f.write_str(&plain.collect::<Vec<_>>().join(","))
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        Display::fmt(self, f)
    }
}

impl WorkerArgs {
    /// Returns whether the run is shared.
    pub fn is_shared(&self) -> bool {
        self.workers.is_some() || self.executor.is_some()
    }

    /// Returns the parts that a batch is cut into.
    pub fn leaves(&self) -> usize {
        let default = if self.is_shared() { LEAVES.max(self.workers.unwrap_or(1).next_power_of_two()) } else { 1 };
        self.leaves.unwrap_or(default)
    }

    /// Checks the flags before anything is loaded.
    ///
    /// # Errors
    /// For a number of workers that cannot be, flags of NATS without it, and engines that this
    /// program has been built without.
    pub fn validate(&self) -> Result<()> {
        if let Some(workers) = self.workers {
            ensure!((1..=MAX_WORKERS).contains(&workers), "--workers {workers}: use 1 to {MAX_WORKERS}");
            let leaves = self.leaves();
            ensure!(
                leaves >= workers,
                "--leaves {leaves}: {workers} workers need as many leaves or more; leave it out"
            );
        }
        ensure!(self.wait != Some(0), "--wait 0: wait for at least 1 second");
        if let Some(engine) = &self.executor {
            engine.check_built()?;
        }
        let flags = [
            ("--run", self.run.is_some()),
            ("--join", self.join),
            ("--nats-credentials", self.nats_credentials.is_some()),
            ("--nats-ca", self.nats_ca.is_some()),
            ("--nats-certificate", self.nats_certificate.is_some()),
        ];
        match &self.executor {
            Some(engine @ Engine::Nats(_)) => {
                ensure!(self.run.is_some(), "--executor {engine}: name the run with --run, as on its other machines");
            }
            _ => {
                if let Some((flag, _)) = flags.iter().find(|(_, given)| *given) {
                    bail!("{flag} belongs to a NATS server; give one with --executor nats://HOST");
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser, Debug)]
    struct Program {
        #[command(flatten)]
        workers: WorkerArgs,
    }

    fn args(flags: &[&str]) -> WorkerArgs {
        Program::try_parse_from([&["program"], flags].concat()).unwrap().workers
    }

    #[test]
    fn leaves_follow_the_workers() {
        for (flags, leaves) in [
            (vec![], 1),
            (vec!["--workers", "2"], 8),
            (vec!["--workers", "9"], 16),
            (vec!["--executor", "mpi"], 8),
            (vec!["--executor", "mpi", "--leaves", "4"], 4),
            (vec!["--leaves", "32"], 32),
        ] {
            assert_eq!(args(&flags).leaves(), leaves, "{flags:?}");
        }
    }

    #[test]
    fn secrets_of_an_address_are_not_shown() {
        let args = args(&["--executor", "nats://ann:secret@one:4222,tls://secret@two", "--run", "a"]);
        let engine = args.executor.clone().unwrap();
        assert_eq!(engine.to_string(), "nats://one:4222,tls://two");
        assert!(!format!("{args:?}").contains("secret"));
        let Engine::Nats(servers) = engine else { panic!("no servers") };
        assert_eq!(servers, ["nats://ann:secret@one:4222", "tls://secret@two"]);
    }

    #[test]
    fn flags_that_do_not_fit_are_refused() {
        for (flags, says) in [
            (vec!["--workers", "0"], "--workers 0"),
            (vec!["--workers", "4", "--leaves", "2"], "--leaves 2"),
            (vec!["--workers", "2", "--run", "a"], "--run"),
            (vec!["--nats-ca", "file"], "--nats-ca"),
            (vec!["--executor", "hub", "--wait", "0"], "--wait 0"),
        ] {
            let message = args(&flags).validate().unwrap_err().to_string();
            assert!(message.contains(says), "{message}");
        }
        if !cfg!(feature = "nats") {
            let message =
                args(&["--executor", "nats://u:secret@host", "--run", "a"]).validate().unwrap_err().to_string();
            assert!(message.contains("--features nats") && !message.contains("secret"), "{message}");
        }
        if !cfg!(feature = "mpi") {
            let message = args(&["--executor", "mpi"]).validate().unwrap_err().to_string();
            assert!(message.contains("--features mpi"), "{message}");
        }
        assert!(Program::try_parse_from(["program", "--executor", "carrier-pigeon"]).is_err());
        assert!(Program::try_parse_from(["program", "--executor", "mpi", "--workers", "2"]).is_err());
    }
}
