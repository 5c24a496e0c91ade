//! A server of one's own: another process, watched.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::server::Serving;

/// A server in another process, started again where it dies, and stopped with this value.
pub struct Supervised {
    child: Arc<Mutex<Child>>,
    done: Arc<AtomicBool>,
    /// Where it listens.
    pub address: String,
}

impl Supervised {
    /// Starts it: this program again, which has to [serve](crate::server::serve) where it finds `--serve PORT` and `--book FILE` among its arguments.
    ///
    /// # Errors
    /// Where the process cannot be started, or does not say where it listens.
    pub fn start(serving: &Serving, book: &Path) -> Result<Self> {
        let spawn = {
            let (serving, book) = (serving.clone(), book.to_path_buf());
            move |port: u16| -> Result<(Child, String)> {
                let mut command = Command::new(std::env::current_exe()?);
                command
                    .args(["--serve", &port.to_string(), "--classes", &serving.classes.name()])
                    .arg("--book")
                    .arg(&book);
                if let Some(path) = &serving.alignment {
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
        };
        let (child, address) = spawn(0)?;
        println!("server: process {} at {address}", child.id());
        let port = address.rsplit(':').next().and_then(|port| port.parse().ok()).context("the address has no port")?;
        let (child, done) = (Arc::new(Mutex::new(child)), Arc::new(AtomicBool::new(false)));
        let (watched, over) = (child.clone(), done.clone());
        std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(100));
                let mut child = watched.lock().unwrap_or_else(|e| e.into_inner());
                if matches!(child.try_wait(), Ok(Some(_))) && !over.load(Ordering::Relaxed) {
                    match spawn(port) {
                        Ok((new, _)) => {
                            println!("server: died, started again as process {}", new.id());
                            *child = new;
                        }
                        // the port may not be free yet; requests are retried meanwhile
                        Err(error) => eprintln!("server: {error:#}"),
                    }
                }
            }
        });
        Ok(Self { child, done, address })
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        let mut child = self.child.lock().unwrap_or_else(|e| e.into_inner());
        let _ = child.kill();
        let _ = child.wait();
    }
}
