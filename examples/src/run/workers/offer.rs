//! Puts the checkpoint of each epoch where workers that join late find it.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use burn::data::dataloader::{DataLoader, DataLoaderIterator};
use burn::prelude::Backend;
use flops_distributed::Elastic;

use super::super::artifacts::Artifacts;
use super::super::history::{self, History};
use super::bundle;

/// How long the files of an epoch may take to be written.
const FILES: Duration = Duration::from_secs(60);

/// Puts checkpoints while training goes on; one worker of the run does so for each epoch.
#[derive(Debug)]
pub struct Offers {
    elastic: Arc<Elastic>,
    artifacts: Artifacts,
    /// The latest step of this worker.
    step: Arc<AtomicU64>,
    /// The epoch that has ended when the loader is next asked for one.
    ended: AtomicUsize,
    first: usize,
    running: Mutex<Option<JoinHandle<()>>>,
}

impl Offers {
    /// For a run that goes on after the epoch `first`.
    pub fn new(elastic: Arc<Elastic>, artifacts: &Artifacts, step: Arc<AtomicU64>, first: usize) -> Self {
        let (artifacts, ended) = (artifacts.clone(), AtomicUsize::new(first));
        Self { elastic, artifacts, step, ended, first, running: Mutex::default() }
    }

    /// Puts the checkpoint of the epoch that ended, on a thread of its own.
    ///
    /// Where the one before is still being put, this one is left out.
    fn epoch_begins(&self) {
        let epoch = self.ended.fetch_add(1, Ordering::Relaxed);
        let mut running = self.running.lock().unwrap_or_else(|e| e.into_inner());
        if epoch == self.first || running.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return;
        }
        // the checkpoint is that before the next step: nothing that it needs is forgotten
        let step = self.step.load(Ordering::Relaxed);
        let (elastic, artifacts) = (self.elastic.clone(), self.artifacts.clone());
        let put = move || {
            if let Err(why) = put(&elastic, &artifacts, epoch, step) {
                println!("warning: the checkpoint of epoch {epoch} is not kept for workers that join late: {why:#}");
            }
        };
        match std::thread::Builder::new().name("offers".into()).spawn(put) {
            Ok(thread) => *running = Some(thread),
            Err(why) => println!("warning: a thread cannot be started: {why}"),
        }
    }

    /// Waits for the checkpoint that is being put.
    pub fn finish(&self) {
        let running = self.running.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(thread) = running {
            let _ = thread.join();
        }
    }
}

/// Puts the checkpoint of an epoch, if no other worker does.
fn put(elastic: &Elastic, artifacts: &Artifacts, epoch: usize, step: u64) -> Result<()> {
    if !elastic.claim_checkpoint(step)? {
        return Ok(());
    }
    let until = Instant::now() + FILES;
    let is_whole = || {
        let read = || History::read(&artifacts.path(history::FILE));
        artifacts.checkpoints().contains(&epoch) && read().is_ok_and(|history| history.is_complete(epoch))
    };
    while !is_whole() {
        // as where two more epochs have ended since
        let newer = artifacts.checkpoints().iter().any(|&other| other > epoch + 1);
        ensure!(!newer && Instant::now() < until, "its files have not been written within {FILES:?}, or are gone");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(elastic.put_checkpoint(step, &bundle::pack(artifacts, epoch)?)?)
}

/// A loader whose epochs tell that the one before has ended.
pub struct Offering<B: Backend, I> {
    loader: Arc<dyn DataLoader<B, I>>,
    offers: Arc<Offers>,
}

impl<B: Backend, I: 'static> Offering<B, I> {
    /// Wraps the training loader of a run. It must be asked for each epoch once.
    pub fn new(loader: Arc<dyn DataLoader<B, I>>, offers: Arc<Offers>) -> Self {
        Self { loader, offers }
    }
}

impl<B: Backend, I: 'static> DataLoader<B, I> for Offering<B, I> {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<I> + 'a> {
        self.offers.epoch_begins();
        self.loader.iter()
    }

    fn num_items(&self) -> usize {
        self.loader.num_items()
    }

    fn to_device(&self, device: &B::Device) -> Arc<dyn DataLoader<B, I>> {
        Arc::new(Self::new(self.loader.to_device(device), self.offers.clone()))
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<B, I>> {
        Arc::new(Self::new(self.loader.slice(start, end), self.offers.clone()))
    }
}
