//! A worker: a process that takes steps when the program that started it says so.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use flops_core::executor::{Executor, Threads};
use flops_distributed::hub::HubClient;
use flops_distributed::{Elastic, ElasticOptions, Log, WorkerStats};
use serde::{Deserialize, Serialize};

use crate::profile::{Phases, Profiled};
use crate::task::{Engine, Stepper, Task};

/// What a worker says once it has taken some steps.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Reply {
    /// Why it could not.
    pub error: Option<String>,
    /// Seconds of the steps.
    pub seconds: f64,
    /// Seconds of a processor in these steps, if the system tells.
    pub busy: Option<f64>,
    /// Steps taken so far.
    pub taken: u64,
    /// A hash of the weights.
    pub hash: u64,
    /// Values that are trained.
    pub trained: usize,
    /// Bytes sent and received in these steps.
    pub bytes: (u64, u64),
    /// Seconds of each phase in these steps.
    pub phases: Phases,
    /// Seconds of an exchange of nothing, and bytes a second of a large one, where they were asked
    /// for.
    pub link: Option<(f64, f64)>,
}

/// What runs the jobs of a worker.
enum Crew {
    Single,
    Elastic(Arc<Elastic>),
    #[cfg(feature = "mpi")]
    Mpi(Arc<flops_distributed::Mpi>),
}

impl Crew {
    fn join(task: &Task) -> Result<Self> {
        Ok(match task.engine {
            Engine::Single => Self::Single,
            Engine::Hub => {
                let client = HubClient::from_env("worker")?.context("the environment names no hub")?;
                Self::elastic(client, task)
            }
            #[cfg(feature = "nats")]
            Engine::Nats => {
                let options = flops_distributed::NatsOptions::new([&task.server], &task.run);
                Self::elastic(flops_distributed::NatsLog::connect(&options, "worker")?, task)
            }
            #[cfg(feature = "mpi")]
            Engine::Mpi => {
                let limit = Duration::from_secs(300);
                let options = flops_distributed::MpiOptions {
                    limit,
                    sums: task.sums,
                    ..flops_distributed::MpiOptions::default()
                };
                Self::Mpi(Arc::new(flops_distributed::Mpi::start(options)?))
            }
            #[allow(unreachable_patterns)]
            other => {
                other.check()?;
                bail!("{other} is no engine of this program")
            }
        })
    }

    fn elastic(log: impl Log + 'static, task: &Task) -> Self {
        // nobody is lost in a measurement, and a machine that is busy with other things is slow
        let patience = Duration::from_secs(60);
        let options =
            ElasticOptions { sum_mode: task.sums, patience, min_workers: task.workers, ..ElasticOptions::default() };
        Self::Elastic(Arc::new(Elastic::new(log, options)))
    }

    fn executor(&self) -> Arc<dyn Executor> {
        match self {
            Self::Single => Arc::new(Threads),
            Self::Elastic(elastic) => elastic.clone(),
            #[cfg(feature = "mpi")]
            Self::Mpi(gang) => gang.clone(),
        }
    }

    fn stats(&self) -> WorkerStats {
        match self {
            Self::Single => WorkerStats::default(),
            Self::Elastic(elastic) => elastic.stats(),
            #[cfg(feature = "mpi")]
            Self::Mpi(gang) => gang.stats(),
        }
    }

    /// Seconds of an exchange of nothing, and bytes a second of a large one.
    fn link(&self) -> Result<(f64, f64)> {
        match self {
            #[cfg(feature = "mpi")]
            Self::Mpi(gang) => {
                let exchange = |bytes: usize, times: u32| {
                    let start = Instant::now();
                    for _ in 0..times {
                        gang.broadcast(vec![0; bytes])?;
                    }
                    Ok::<f64, anyhow::Error>(start.elapsed().as_secs_f64() / f64::from(times))
                };
                exchange(0, 20)?;
                exchange(LARGE, 2)?;
                let small = exchange(0, 200)?;
                Ok((small, LARGE as f64 / (exchange(LARGE, 8)? - small).max(1e-9)))
            }
            _ => bail!("this is measured over MPI alone"),
        }
    }
}

/// Bytes of a large exchange.
pub const LARGE: usize = 8 << 20;

/// Joins the others and does what it is told, until the connection ends.
///
/// # Errors
/// If the others or the program cannot be reached.
pub fn work(task: &Task) -> Result<()> {
    let mut stream = TcpStream::connect(task.control)?;
    stream.set_nodelay(true)?;
    let lines = BufReader::new(stream.try_clone()?).lines();
    let joined = Crew::join(task).and_then(|crew| {
        let profiled = Arc::new(Profiled::new(crew.executor()));
        Ok((Stepper::new(&task.steps, profiled.clone())?, crew, profiled))
    });
    let (mut stepper, crew, profiled) = match joined {
        Ok(joined) => joined,
        Err(error) => {
            say(&mut stream, &Reply { error: Some(format!("{error:#}")), ..Reply::default() })?;
            return Err(error);
        }
    };
    say(&mut stream, &Reply { trained: stepper.trained(), ..Reply::default() })?;
    for line in lines {
        let Ok(line) = line else { break };
        let done = match line.split_once(' ') {
            Some(("run", steps)) => run(&mut stepper, steps.parse()?, (&crew, &profiled)),
            Some(("link", _)) => crew.link().map(|link| Reply { link: Some(link), ..Reply::default() }),
            _ => break,
        };
        let reply = done.unwrap_or_else(|error| Reply { error: Some(format!("{error:#}")), ..Reply::default() });
        say(&mut stream, &reply)?;
    }
    Ok(())
}

fn run(stepper: &mut Stepper, steps: usize, (crew, profiled): (&Crew, &Profiled)) -> Result<Reply> {
    let before = crew.stats();
    profiled.take();
    let busy = processor_seconds();
    let start = Instant::now();
    for _ in 0..steps {
        stepper.step()?;
    }
    let seconds = start.elapsed().as_secs_f64();
    let busy = processor_seconds().zip(busy).map(|(after, before)| after - before);
    let after = crew.stats();
    Ok(Reply {
        seconds,
        busy,
        taken: stepper.taken(),
        hash: stepper.hash(),
        bytes: (after.bytes_sent - before.bytes_sent, after.bytes_received - before.bytes_received),
        phases: profiled.take(),
        ..Reply::default()
    })
}

/// Seconds of a processor that this process has had, on Linux: without those of the thread in which
/// MPI waits, which is busy all the while.
fn processor_seconds() -> Option<f64> {
    let ticks = |path: PathBuf| -> Option<f64> {
        let text = std::fs::read_to_string(path).ok()?;
        // behind the name, which may hold anything, follow the state and ten numbers
        let mut fields = text.rsplit_once(')')?.1.split_whitespace().skip(11);
        Some(fields.next()?.parse::<f64>().ok()? + fields.next()?.parse::<f64>().ok()?)
    };
    let mut all = ticks("/proc/self/stat".into())?;
    for thread in std::fs::read_dir("/proc/self/task").ok()?.flatten() {
        let name = std::fs::read_to_string(thread.path().join("comm")).unwrap_or_default();
        if name.trim() == "mpi" {
            all -= ticks(thread.path().join("stat"))?;
        }
    }
    // Linux counts in hundredths of a second
    Some(all / 100.0)
}

fn say(stream: &mut TcpStream, reply: &Reply) -> Result<()> {
    let line = serde_json::to_string(reply)? + "\n";
    Ok(stream.write_all(line.as_bytes())?)
}
