//! This process as a worker of a run: its place, its executor, and where it starts from.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use burn::data::dataloader::DataLoader;
use burn::prelude::Backend;
use flops_core::executor::Executor;
use flops_distributed::hub::HubClient;
use flops_distributed::{Elastic, ElasticOptions, WorkerStats};

use super::super::artifacts::{Artifacts, Settings};
use super::super::fit::resumable;
use super::guard::{self, Telling};
use super::identity::{Properties, SharedRun};
use super::offer::{Offering, Offers};
use super::tally::{Tally, Work, may_be_started_again};
use super::{bundle, starter};
use crate::cli::worker_args::{Engine, WorkerArgs};

/// How long other workers wait for the first one to read the run that is resumed.
const FIRST: Duration = Duration::from_secs(600);

/// What holds the workers of a run together.
#[derive(Clone, Debug)]
enum Team {
    Elastic(Arc<Elastic>),
    #[cfg(feature = "mpi")]
    Mpi(Arc<flops_distributed::Mpi>),
}

/// This process as a worker.
#[derive(Debug)]
pub struct Worker {
    /// 0 for the first, which has the artifact folder and the terminal.
    number: usize,
    /// Whether a starter started it.
    is_started: bool,
    args: WorkerArgs,
    /// The latest step.
    step: Arc<AtomicU64>,
    offers: std::sync::OnceLock<Arc<Offers>>,
    _telling: Option<Telling>,
    team: Team,
}

impl Worker {
    /// Joins the run that the flags and the environment name; nothing where this process is alone.
    ///
    /// # Errors
    /// Where the other processes cannot be reached.
    pub fn join(args: &WorkerArgs, dir: &Path) -> Result<Option<Self>> {
        let place = starter::place()?;
        let (number, telling, team) = match (&args.workers, &args.executor, &place) {
            (Some(_), _, Some((number, workers))) => {
                guard::end_with_starter().context("a thread cannot be started")?;
                let log = HubClient::from_env(&format!("w{number}"))?.context("there is no hub for this worker")?;
                let elastic = elastic(log, args, *workers);
                let folder = starter::folder(dir, *number);
                let telling = Telling::start(&elastic, &folder);
                let telling = telling.with_context(|| format!("cannot write to {}", folder.display()))?;
                (*number, Some(telling), Team::Elastic(elastic))
            }
            (_, Some(Engine::Hub), _) => {
                let log = HubClient::from_env("worker")?;
                let log = log.context("--executor hub: FLOPS_HUB does not name a hub; start one with --workers")?;
                (0, None, Team::Elastic(elastic(log, args, 1)))
            }
            (_, Some(Engine::Nats(servers)), _) => (0, None, nats(servers, args)?),
            (_, Some(Engine::Mpi), _) => {
                let (rank, team) = mpi(args)?;
                if rank > 0 {
                    flops_report::output::silence();
                }
                (rank, None, team)
            }
            (_, None, _) => return Ok(None),
        };
        Ok(Some(Self {
            number,
            is_started: telling.is_some(),
            args: args.clone(),
            step: Arc::default(),
            offers: Default::default(),
            _telling: telling,
            team,
        }))
    }

    /// Returns whether this worker has the artifact folder and the terminal.
    pub fn is_first(&self) -> bool {
        self.number == 0
    }

    /// Returns whether the terminal is for plain lines only.
    pub fn is_plain(&self) -> bool {
        !self.is_started || !self.is_first()
    }

    /// Returns the artifact folder of this worker in a run with the folder `dir`.
    pub fn folder(&self, dir: &Path) -> PathBuf {
        if self.is_first() { dir.into() } else { starter::folder(dir, self.number) }
    }

    /// Returns the executor for the learner. Workers whose `properties` differ are refused.
    pub fn executor(&self, properties: Properties) -> Arc<dyn Executor> {
        let inner: Arc<dyn Executor> = match &self.team {
            Team::Elastic(elastic) => elastic.clone(),
            #[cfg(feature = "mpi")]
            Team::Mpi(gang) => gang.clone(),
        };
        Arc::new(SharedRun::new(inner, properties, self.step.clone()))
    }

    /// Brings the artifact folder to where the run is, and returns whether to resume from there.
    ///
    /// A run that has a checkpoint is joined at that one. Otherwise `resume` says whether the run in
    /// the first worker's folder goes on.
    ///
    /// # Errors
    /// Where the run cannot be resumed with these settings, or others cannot be reached.
    pub fn catch_up(&self, artifacts: &Artifacts, resume: bool, settings: &Settings, free: &[&str]) -> Result<bool> {
        let own = || {
            artifacts.check_resumable(settings, free)?;
            bundle::pack(artifacts, resumable(artifacts)?.0)
        };
        match &self.team {
            Team::Elastic(elastic) => {
                let mut there = elastic.checkpoint()?;
                if there.is_none() && resume {
                    if self.is_first() {
                        // before all steps of this log
                        elastic.put_checkpoint(0, &own()?)?;
                        return Ok(true);
                    }
                    there = wait_for_first(elastic)?;
                }
                let Some((_, bytes)) = there else { return Ok(false) };
                bundle::install(artifacts, &bytes, settings, free)?;
                Ok(true)
            }
            #[cfg(feature = "mpi")]
            Team::Mpi(_) if !resume => Ok(false),
            #[cfg(feature = "mpi")]
            Team::Mpi(gang) => {
                let bytes = gang.broadcast(if self.is_first() { own()? } else { vec![] })?;
                if !self.is_first() {
                    bundle::install(artifacts, &bytes, settings, free)?;
                }
                Ok(true)
            }
        }
    }

    /// Wraps the training loader of a run that goes on after the epoch `first`: its checkpoints are
    /// kept for workers that join late.
    pub fn offering<B: Backend, I: 'static>(
        &self,
        loader: Arc<dyn DataLoader<B, I>>,
        artifacts: &Artifacts,
        first: usize,
    ) -> Arc<dyn DataLoader<B, I>> {
        match &self.team {
            Team::Elastic(elastic) => {
                let offers = || Arc::new(Offers::new(elastic.clone(), artifacts, self.step.clone(), first));
                Arc::new(Offering::new(loader, self.offers.get_or_init(offers).clone()))
            }
            #[cfg(feature = "mpi")]
            Team::Mpi(_) => loader,
        }
    }

    /// Returns what this worker did and saw; nothing where a starter tells it of all.
    pub fn tally(&self) -> Option<Tally> {
        let engine = self.args.executor.as_ref()?;
        let stats = self.stats();
        let mut work = Work::of(&stats.worker);
        work.add(&stats);
        Some(Tally {
            executor: engine.name(),
            sums: self.args.sums,
            leaves: self.args.leaves(),
            joins: stats.joins,
            losses: stats.losses,
            restarts: 0,
            each: vec![work],
        })
    }

    fn stats(&self) -> WorkerStats {
        match &self.team {
            Team::Elastic(elastic) => elastic.stats(),
            #[cfg(feature = "mpi")]
            Team::Mpi(gang) => gang.stats(),
        }
    }

    /// Ends the part of this worker. Where others went on without it, it asks its starter by the exit
    /// code to be started again.
    ///
    /// # Errors
    /// The error of the run.
    pub fn end(self, outcome: Result<()>) -> Result<()> {
        if let Some(offers) = self.offers.get() {
            offers.finish();
        }
        let again = self.is_started && outcome.as_ref().is_err_and(may_be_started_again);
        drop(self);
        match outcome {
            Err(error) if again => {
                eprintln!("error: {error:#}");
                std::process::exit(starter::AGAIN)
            }
            outcome => outcome,
        }
    }
}

/// A worker over a log.
fn elastic(log: impl flops_distributed::Log + 'static, args: &WorkerArgs, min_workers: usize) -> Arc<Elastic> {
    let default = ElasticOptions::default();
    let limit = args.wait.map_or(default.limit, Duration::from_secs);
    Arc::new(Elastic::new(log, ElasticOptions { sum_mode: args.sums, limit, min_workers, ..default }))
}

/// The checkpoint that the first worker reads from its folder.
fn wait_for_first(elastic: &Elastic) -> Result<Option<(u64, Vec<u8>)>> {
    let until = Instant::now() + FIRST;
    loop {
        let there = elastic.checkpoint()?;
        if there.is_some() {
            return Ok(there);
        }
        ensure!(Instant::now() < until, "the first worker has not read the run to resume within {FIRST:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A worker over NATS servers.
#[cfg(feature = "nats")]
fn nats(servers: &[String], args: &WorkerArgs) -> Result<Team> {
    use flops_distributed::{NatsAuth, NatsLog, NatsOptions};
    let run = args.run.clone().unwrap_or_default();
    let mut options = NatsOptions::new(servers.iter().map(|server| address(server).0), run.as_str());
    if let Some(user) = servers.iter().find_map(|server| address(server).1) {
        options.auth = match user.split_once(':') {
            Some((name, password)) => NatsAuth::User { name: name.into(), password: password.into() },
            None => NatsAuth::Token(user),
        };
    }
    if let Some(file) = &args.nats_credentials {
        ensure!(options.auth == NatsAuth::None, "--nats-credentials: leave the user out of --executor");
        options.auth = NatsAuth::Credentials(file.clone());
    }
    options.ca.clone_from(&args.nats_ca);
    options.client_certificate = args.nats_certificate.clone().zip(args.nats_key.clone());
    options.replicas = args.nats_replicas;
    options.limit = args.wait.map_or(options.limit, Duration::from_secs);
    let elastic = elastic(NatsLog::connect(&options, "worker")?, args, 1);
    let is_new = elastic.is_new(FIRST_ENTRY)?;
    let remedy = "check the name, or leave --join out to start the run";
    ensure!(!(args.join && is_new), "--run {run}: no run of this name has begun on the server; {remedy}");
    println!("run {run}: {}", if is_new { "this worker begins it" } else { "it has begun, this worker joins" });
    Ok(Team::Elastic(elastic))
}

/// How long the first entry of a run that has begun is waited for.
#[cfg(feature = "nats")]
const FIRST_ENTRY: Duration = Duration::from_secs(2);

/// An address without its user, and the user.
#[cfg(feature = "nats")]
fn address(server: &str) -> (String, Option<String>) {
    match (server.split_once("://"), server.rsplit_once('@')) {
        (Some((scheme, rest)), Some((_, host))) => {
            let user = rest.rsplit_once('@').map(|(user, _)| user.to_string());
            (format!("{scheme}://{host}"), user)
        }
        _ => (server.into(), None),
    }
}

#[cfg(not(feature = "nats"))]
fn nats(_: &[String], _: &WorkerArgs) -> Result<Team> {
    anyhow::bail!("NATS is not in this build; build with --features nats")
}

/// A rank of a gang, with its number.
#[cfg(feature = "mpi")]
fn mpi(args: &WorkerArgs) -> Result<(usize, Team)> {
    use flops_distributed::{Mpi, MpiOptions};
    let default = MpiOptions::default();
    let limit = args.wait.map_or(default.limit, Duration::from_secs);
    let gang = Mpi::start(MpiOptions { sums: args.sums, limit, ..default })?;
    Ok((gang.rank(), Team::Mpi(Arc::new(gang))))
}

#[cfg(not(feature = "mpi"))]
fn mpi(_: &WorkerArgs) -> Result<(usize, Team)> {
    anyhow::bail!("MPI is not in this build; build with --features mpi")
}

#[cfg(all(test, feature = "nats"))]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_told_apart_from_its_user() {
        for (text, server, user) in [
            ("nats://host:4222", "nats://host:4222", None),
            ("nats://ann:p@ss@host", "nats://host", Some("ann:p@ss")),
            ("tls://token@host:1", "tls://host:1", Some("token")),
        ] {
            assert_eq!(address(text), (server.to_string(), user.map(str::to_string)));
        }
    }
}
