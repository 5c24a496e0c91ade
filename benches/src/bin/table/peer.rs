//! PyTorch, in a process of its own that does task by task in turn with ours.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, ensure};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/peers/pytorch.py");

/// PyTorch's process.
pub struct Peer {
    child: Child,
    tasks: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// The version that PyTorch reports.
    pub version: String,
}

impl Peer {
    /// Starts the process with these arguments.
    ///
    /// # Errors
    /// If Python or PyTorch is missing.
    pub fn start(python: &str, arguments: &[String]) -> Result<Self> {
        let mut command = Command::new(python);
        command.arg(SCRIPT).args(arguments);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("'{python}' cannot be started"))?;
        let tasks = child.stdin.take().context("standard input is piped")?;
        let answers = BufReader::new(child.stdout.take().context("standard output is piped")?);
        let mut peer = Self { child, tasks, answers, version: String::new() };
        peer.version = peer.line()?;
        ensure!(peer.version.starts_with("torch "), "PyTorch is {}", peer.version);
        Ok(peer)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(!line.is_empty(), "PyTorch's process ended");
        Ok(line.trim().to_string())
    }

    /// Does a task and returns the seconds that it took.
    ///
    /// # Errors
    /// If the process ended, or its answer is not a number.
    pub fn seconds(&mut self, task: &str) -> Result<f64> {
        writeln!(self.tasks, "{task}")?;
        let line = self.line()?;
        line.parse().with_context(|| format!("PyTorch answered '{line}' to '{task}'"))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
