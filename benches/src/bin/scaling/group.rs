//! The processes of one run, as the program that measures them sees it.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::num::NonZero;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use flops_benches::TASK;
use flops_distributed::SumMode;
use flops_distributed::hub::{Hub, HubOptions};

use crate::task::{Engine, Steps, Task};
use crate::worker::Reply;

/// The time in which all workers must have come.
const START: Duration = Duration::from_secs(120);
/// The time in which a worker must have answered.
const ANSWER: Duration = Duration::from_secs(900);

/// Workers that take steps together.
pub struct Group {
    children: Vec<Child>,
    workers: Vec<BufReader<TcpStream>>,
    /// Values that are trained.
    pub trained: usize,
    /// The log that they share, if it is here.
    _hub: Option<Hub>,
}

impl Group {
    /// Starts workers and waits until all have come.
    ///
    /// # Errors
    /// If one of them does not start, or says that it cannot take part.
    pub fn start(steps: &Steps, engine: Engine, workers: usize, sums: SumMode, server: &str) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let control: SocketAddr = listener.local_addr()?;
        let run = format!("scaling-{}", control.port());
        let task = Task { steps: steps.clone(), engine, sums, workers, control, server: server.into(), run };
        let text = serde_json::to_string(&task)?;
        let exe = std::env::current_exe()?;
        let hub = if engine == Engine::Hub { Some(Hub::start(HubOptions::default())?) } else { None };
        let mut group = Self { children: vec![], workers: vec![], trained: 0, _hub: None };
        let mut spawn = |mut command: Command| {
            command.env(TASK, &text).env("RAYON_NUM_THREADS", "1").stdin(Stdio::null()).stdout(Stdio::null());
            if let Some(hub) = &hub {
                command.envs(hub.environment());
            }
            let child =
                command.spawn().with_context(|| format!("{} cannot be started", command.get_program().display()));
            child.map(|child| group.children.push(child))
        };
        if engine == Engine::Mpi {
            spawn(mpirun(&exe, workers))?;
        } else {
            (0..workers).try_for_each(|_| spawn(Command::new(&exe)))?;
        }
        group._hub = hub;
        group.accept(&listener, workers)?;
        let replies = group.replies()?;
        group.trained = replies[0].trained;
        Ok(group)
    }

    fn accept(&mut self, listener: &TcpListener, workers: usize) -> Result<()> {
        listener.set_nonblocking(true)?;
        let start = Instant::now();
        while self.workers.len() < workers {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    stream.set_nodelay(true)?;
                    stream.set_read_timeout(Some(ANSWER))?;
                    self.workers.push(BufReader::new(stream));
                }
                Err(why) if why.kind() == ErrorKind::WouldBlock => {
                    ensure!(start.elapsed() < START, "not all of {workers} workers came within {START:?}");
                    for child in &mut self.children {
                        if let Some(status) = child.try_wait()? {
                            bail!("a worker ended before it began: {status}");
                        }
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(why) => return Err(why.into()),
            }
        }
        Ok(())
    }

    /// Takes steps; returns what each worker says.
    ///
    /// # Errors
    /// If one of them fails.
    pub fn run(&mut self, steps: usize) -> Result<Vec<Reply>> {
        self.begin(steps)?;
        self.replies()
    }

    /// Lets the workers take steps.
    ///
    /// # Errors
    /// If one of them is lost.
    pub fn begin(&mut self, steps: usize) -> Result<()> {
        self.tell(&format!("run {steps}\n"))
    }

    /// Seconds of an exchange of nothing over MPI, and bytes a second of a large one.
    ///
    /// # Errors
    /// If the workers are no gang.
    pub fn link(&mut self) -> Result<(f64, f64)> {
        self.tell("link it\n")?;
        self.replies()?.first().and_then(|reply| reply.link).context("the workers do not tell")
    }

    fn tell(&mut self, line: &str) -> Result<()> {
        self.workers.iter_mut().try_for_each(|worker| Ok(worker.get_mut().write_all(line.as_bytes())?))
    }

    /// What each worker says of the steps that it was let take.
    ///
    /// # Errors
    /// If one of them failed.
    pub fn replies(&mut self) -> Result<Vec<Reply>> {
        let reply = |worker: &mut BufReader<TcpStream>| {
            let mut line = String::new();
            worker.read_line(&mut line).context("a worker does not answer")?;
            let reply: Reply = serde_json::from_str(&line).context("a worker is lost")?;
            match &reply.error {
                Some(why) => bail!("a worker says: {why}"),
                None => Ok(reply),
            }
        };
        self.workers.iter_mut().map(reply).collect()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = self.tell("end\n");
        self.workers.clear();
        let start = Instant::now();
        for child in &mut self.children {
            while start.elapsed() < Duration::from_secs(10) && matches!(child.try_wait(), Ok(None)) {
                std::thread::sleep(Duration::from_millis(5));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// This program as the ranks of a gang, wherever the system puts them.
fn mpirun(exe: &PathBuf, ranks: usize) -> Command {
    let mut command = Command::new("mpirun");
    // a rank that waits spins, and must not do so on the core of one that computes
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let to = if ranks <= cores { "core" } else { "none" };
    command.args(["--oversubscribe", "--bind-to", to, "-n", &ranks.to_string()]).arg(exe);
    // containers have no other user
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command
}

/// A nats-server of this program, with a store that goes when it is dropped.
pub struct Server {
    child: Child,
    /// Where it listens.
    pub address: String,
    _store: tempfile::TempDir,
}

impl Server {
    /// Starts nats-server on a free port.
    ///
    /// # Errors
    /// If it is not installed, or does not answer.
    pub fn start() -> Result<Self> {
        let store = tempfile::tempdir()?;
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let mut command = Command::new("nats-server");
        command.args(["-js", "-a", "127.0.0.1", "-p", &port.to_string(), "-sd"]).arg(store.path());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child =
            command.spawn().context("nats-server cannot be started; install it, or leave out --engines nats")?;
        let server = Self { child, address: format!("nats://127.0.0.1:{port}"), _store: store };
        let start = Instant::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            ensure!(start.elapsed() < Duration::from_secs(20), "nats-server does not listen on port {port}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
