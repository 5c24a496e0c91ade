//! A log in memory.

use std::collections::HashSet;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use flops_distributed::{Entry, Key, Log, Traffic};
use flops_executor::ExecutorError;

/// A log in memory. A worker that drops it is gone without a word.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    shared: Arc<(Mutex<Shared>, Condvar)>,
    worker: String,
    read: Arc<Mutex<usize>>,
    /// Whether every entry comes twice.
    pub twice: bool,
}

#[derive(Debug, Default)]
struct Shared {
    entries: Vec<Entry>,
    keys: HashSet<Key>,
    checkpoint: Option<(u64, Vec<u8>)>,
    workers: usize,
}

impl Memory {
    /// Another worker's connection.
    pub fn connect(&self) -> Self {
        let mut shared = self.shared.0.lock().unwrap();
        shared.workers += 1;
        let worker = format!("w-{}", shared.workers);
        Self { shared: self.shared.clone(), worker, read: Arc::default(), twice: self.twice }
    }

    pub fn entries(&self) -> Vec<Entry> {
        self.shared.0.lock().unwrap().entries.clone()
    }
}

impl Log for Memory {
    fn worker(&self) -> &str {
        &self.worker
    }

    fn put(&self, key: &Key, bytes: &[u8]) -> Result<bool, ExecutorError> {
        let mut shared = self.shared.0.lock().unwrap();
        let first = shared.keys.insert(key.clone());
        if first {
            shared.entries.push(Entry { key: key.clone(), bytes: bytes.into() });
            self.shared.1.notify_all();
        }
        Ok(first)
    }

    fn next(&self, timeout: Duration) -> Result<Option<Entry>, ExecutorError> {
        let until = Instant::now() + timeout;
        let mut read = self.read.lock().unwrap();
        let mut shared = self.shared.0.lock().unwrap();
        loop {
            let at = if self.twice { *read / 2 } else { *read };
            if let Some(entry) = shared.entries.get(at) {
                *read += 1;
                return Ok(Some(entry.clone()));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            shared = self.shared.1.wait_timeout(shared, left).unwrap().0;
        }
    }

    fn trim(&self, _step: u64) -> Result<(), ExecutorError> {
        Ok(())
    }

    fn put_checkpoint(&self, step: u64, bytes: &[u8]) -> Result<(), ExecutorError> {
        self.shared.0.lock().unwrap().checkpoint = Some((step, bytes.into()));
        Ok(())
    }

    fn checkpoint(&self) -> Result<Option<(u64, Vec<u8>)>, ExecutorError> {
        Ok(self.shared.0.lock().unwrap().checkpoint.clone())
    }

    fn traffic(&self) -> Traffic {
        Traffic::default()
    }
}
