//! A worker that a starter started: it ends with its starter, and tells what it did.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use flops_distributed::{Elastic, WorkerStats};

/// The file of what a worker did so far.
const FILE: &str = "stats.json";
/// How often it is written.
const EVERY: Duration = Duration::from_millis(500);

/// Ends this process when the starter is gone: it holds the other end of standard input and writes
/// nothing there.
///
/// # Errors
/// Where no thread can be started.
pub fn end_with_starter() -> std::io::Result<()> {
    let watch = || {
        let (mut input, mut byte) = (std::io::stdin(), [0]);
        loop {
            match input.read(&mut byte) {
                Ok(1) => {}
                Err(why) if why.kind() == std::io::ErrorKind::Interrupted => {}
                _ => std::process::exit(1),
            }
        }
    };
    std::thread::Builder::new().name("guard".into()).spawn(watch).map(drop)
}

/// Writes what a worker did to a file, from time to time and when it is dropped.
#[derive(Debug)]
pub struct Telling {
    elastic: Arc<Elastic>,
    folder: PathBuf,
    stop: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Telling {
    /// Begins to write to a folder, which is created if it does not exist.
    ///
    /// # Errors
    /// Where the folder cannot be written to, or no thread can be started.
    pub fn start(elastic: &Arc<Elastic>, folder: &Path) -> std::io::Result<Self> {
        fs::create_dir_all(folder)?;
        write(folder, &elastic.stats())?;
        let (sender, stop) = channel();
        let (weak, to): (Weak<Elastic>, PathBuf) = (Arc::downgrade(elastic), folder.into());
        let tell = move || {
            while stop.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                let Some(elastic) = weak.upgrade() else { return };
                // the next one may succeed
                let _ = write(&to, &elastic.stats());
            }
        };
        let thread = std::thread::Builder::new().name("telling".into()).spawn(tell)?;
        Ok(Self { elastic: elastic.clone(), folder: folder.into(), stop: Some((sender, thread)) })
    }
}

impl Drop for Telling {
    fn drop(&mut self) {
        if let Some((sender, thread)) = self.stop.take() {
            drop(sender);
            let _ = thread.join();
        }
        let _ = write(&self.folder, &self.elastic.stats());
    }
}

/// Replaces the file. It is read by the starter alone, and need not outlive a loss of power.
fn write(folder: &Path, stats: &WorkerStats) -> std::io::Result<()> {
    let new = folder.join(format!(".partial-{FILE}"));
    fs::write(&new, serde_json::to_vec(stats)?)?;
    fs::rename(new, folder.join(FILE))
}

/// Takes what a worker that has ended wrote, so that its next life begins anew.
pub fn take(folder: &Path) -> Option<WorkerStats> {
    let path = folder.join(FILE);
    let stats = fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
    let _ = fs::remove_file(path);
    stats
}
