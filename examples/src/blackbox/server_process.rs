//! A server in a process of its own, restarted if it dies.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::classes::ClassifierArgs;

/// How often the process is looked at.
const INTERVAL: Duration = Duration::from_millis(100);

/// A server in another process. It is restarted if it dies, and stopped when this value is dropped.
pub struct ServerProcess {
    child: Arc<Mutex<Child>>,
    done: Arc<AtomicBool>,
    /// The address that it listens at.
    pub address: String,
}

impl ServerProcess {
    /// Starts the server: this program once more, with `--serve PORT` and `--charge-log FILE`.
    ///
    /// With these flags the program must [serve](super::server::serve).
    ///
    /// # Errors
    /// Where the process cannot be started, or does not report its address.
    pub fn start(classifier: &ClassifierArgs, charge_log: &Path) -> Result<Self> {
        let launcher = Launcher { classifier: classifier.clone(), charge_log: charge_log.to_path_buf() };
        let (child, address) = launcher.spawn(0)?;
        println!("server: process {} at {address}", child.id());
        let port = address.rsplit(':').next().and_then(|port| port.parse().ok()).context("the address has no port")?;
        let (child, done) = (Arc::new(Mutex::new(child)), Arc::new(AtomicBool::new(false)));
        let (watched, over) = (child.clone(), done.clone());
        std::thread::spawn(move || watch(&launcher, port, &watched, &over));
        Ok(Self { child, done, address })
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        let mut child = lock(&self.child);
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Starts server processes that share one charge log.
struct Launcher {
    classifier: ClassifierArgs,
    charge_log: PathBuf,
}

impl Launcher {
    /// Starts a process on that port, or on a free one for 0; returns it and its address.
    fn spawn(&self, port: u16) -> Result<(Child, String)> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(["--serve", &port.to_string(), "--classes", &self.classifier.classes.name()])
            .arg("--charge-log")
            .arg(&self.charge_log);
        if let Some(path) = &self.classifier.alignment {
            command.arg("--alignment").arg(path);
        }
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot start the server")?;
        let out = child.stdout.take().context("the server has no output")?;
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line)?;
        let Some(address) = line.trim().strip_prefix("listening on ") else {
            let _ = child.kill();
            bail!("the server did not start; see what it says above");
        };
        Ok((child, address.to_string()))
    }
}

/// Restarts the process whenever it ends, until `done`.
fn watch(launcher: &Launcher, port: u16, child: &Mutex<Child>, done: &AtomicBool) {
    while !done.load(Ordering::Relaxed) {
        std::thread::sleep(INTERVAL);
        let mut child = lock(child);
        if matches!(child.try_wait(), Ok(Some(_))) && !done.load(Ordering::Relaxed) {
            match launcher.spawn(port) {
                Ok((new, _)) => {
                    println!("server: died, started again as process {}", new.id());
                    *child = new;
                }
                // the port may not be free yet; requests are retried meanwhile
                Err(error) => eprintln!("server: {error:#}"),
            }
        }
    }
}

fn lock(child: &Mutex<Child>) -> MutexGuard<'_, Child> {
    child.lock().unwrap_or_else(|e| e.into_inner())
}
