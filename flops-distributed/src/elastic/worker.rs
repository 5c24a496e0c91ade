//! A worker of an elastic run: its log, and what it knows of the run.

use std::fmt::Debug;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use flops_executor::{ExecutorError, JobFailure};

use super::state::State;
use crate::{Key, Log, SumMode, WorkerStats};

/// Settings of an [`Elastic`] worker.
#[derive(Clone, Debug)]
pub struct ElasticOptions {
    /// How sums are run. It must be the same on all workers.
    pub sum_mode: SumMode,
    /// The least time that a worker has for its jobs before others take them over. It has more where
    /// ten times as long as the longest job of the kind here is more.
    pub patience: Duration,
    /// How long the log is waited for.
    pub limit: Duration,
    /// How many workers are waited for before the first round, up to [`limit`](Self::limit).
    pub min_workers: usize,
}

impl Default for ElasticOptions {
    fn default() -> Self {
        let (patience, limit) = (Duration::from_secs(5), Duration::from_secs(60));
        Self { sum_mode: SumMode::Auto, patience, limit, min_workers: 1 }
    }
}

/// An executor whose workers may come and go at any time, over any [`Log`].
///
/// The workers claim leaves in the first round of a step and keep them to its end. The result of a
/// round is what the log says, in its order: all workers return the same, whoever of them is slow,
/// lost or late.
///
/// Jobs must be exact: where a worker computes other bits than one before it, it returns
/// [`ExecutorError::Diverged`].
#[derive(Debug)]
pub struct Elastic {
    pub(super) log: Box<dyn Log>,
    pub(super) options: ElasticOptions,
    pub(super) state: Mutex<State>,
    pub(super) stats: Mutex<WorkerStats>,
}

impl Elastic {
    /// A worker with a connection to the log of its run.
    #[must_use]
    pub fn new(log: impl Log + 'static, options: ElasticOptions) -> Self {
        let stats = WorkerStats { worker: log.worker().into(), ..WorkerStats::default() };
        Self { log: Box::new(log), options, state: Mutex::default(), stats: Mutex::new(stats) }
    }

    /// The name of this worker.
    pub fn worker(&self) -> &str {
        self.log.worker()
    }

    /// What this worker did and saw so far.
    pub fn stats(&self) -> WorkerStats {
        let traffic = self.log.traffic();
        let counts = self.counts().clone();
        let refused = counts.refused + traffic.refused;
        WorkerStats { bytes_sent: traffic.sent, bytes_received: traffic.received, refused, ..counts }
    }

    /// Whether no worker has begun this run, as far as its log tells within `wait`.
    ///
    /// # Errors
    /// Where the log cannot be reached.
    pub fn is_new(&self, wait: Duration) -> Result<bool, ExecutorError> {
        let (mut state, until) = (self.lock(), Instant::now() + wait);
        while state.fact(&Key::Identity).is_none() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(true);
            }
            self.pump(&mut state, left)?;
        }
        Ok(false)
    }

    /// The latest checkpoint of the run and its step, from which a worker that joins late resumes.
    ///
    /// # Errors
    /// Where the log cannot be reached.
    pub fn checkpoint(&self) -> Result<Option<(u64, Vec<u8>)>, ExecutorError> {
        self.log.checkpoint()
    }

    /// Asks whether it is for this worker to [put the checkpoint](Self::put_checkpoint) before a step.
    /// One worker is told so.
    ///
    /// # Errors
    /// Where the log cannot be reached.
    pub fn claim_checkpoint(&self, step: u64) -> Result<bool, ExecutorError> {
        self.log.put(&Key::Checkpoint(step), self.worker().as_bytes())
    }

    /// Stores the checkpoint before a step for workers that join later, and forgets the rounds before
    /// the checkpoint that preceded it. The log grows for as long as no checkpoint is put.
    ///
    /// # Errors
    /// Where the log cannot be reached.
    pub fn put_checkpoint(&self, step: u64, bytes: &[u8]) -> Result<(), ExecutorError> {
        self.log.put_checkpoint(step, bytes)?;
        let before = {
            let mut state = self.lock();
            self.pump(&mut state, Duration::ZERO)?;
            let before = state.checkpoints.iter().copied().filter(|of| *of < step).max();
            state.checkpoints.retain(|of| *of >= step);
            state.checkpoints.push(step);
            before
        };
        // whoever has downloaded the one before can still join; rounds go on meanwhile
        before.map_or(Ok(()), |before| self.log.trim(before))
    }

    /// The error of a worker whose jobs fail in a round that the others have ended well: it cannot go on.
    pub(super) fn cannot_follow(&self, why: JobFailure) -> ExecutorError {
        ExecutorError::job(self.worker(), JobFailure { may_pass: false, ..why })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn counts(&self) -> MutexGuard<'_, WorkerStats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what the log has, and waits for an entry if it has nothing.
    pub(super) fn pump(&self, state: &mut State, wait: Duration) -> Result<(), ExecutorError> {
        let start = Instant::now();
        let mut next = self.log.next(wait)?;
        self.counts().seconds_waited += start.elapsed().as_secs_f64();
        while let Some(entry) = next {
            state.absorb(entry, &mut self.counts());
            // what is left comes with the next look: rounds are in the log in their order
            next = if state.is_full() { None } else { self.log.next(Duration::ZERO)? };
        }
        Ok(())
    }

    /// Reads the log until something is found there that must come.
    pub(super) fn wait_for<T>(
        &self,
        state: &mut State,
        what: &str,
        mut find: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, ExecutorError> {
        let until = Instant::now() + self.options.limit;
        self.pump(state, Duration::ZERO)?;
        loop {
            if let Some(found) = find(state) {
                return Ok(found);
            }
            if Instant::now() >= until {
                let what = format!("{what} has not come through the log within {:?}", self.options.limit);
                return Err(ExecutorError::Lost { what });
            }
            self.pump(state, Duration::from_millis(100).min(self.options.limit))?;
        }
    }

    /// Proposes something, and returns what was proposed first.
    pub(super) fn agree(&self, state: &mut State, key: &Key, mine: &[u8]) -> Result<Vec<u8>, ExecutorError> {
        self.pump(state, Duration::ZERO)?;
        if state.fact(key).is_none() && self.log.put(key, mine)? {
            return Ok(mine.into());
        }
        self.wait_for(state, &format!("the entry {key}"), |state| state.fact(key).map(<[u8]>::to_vec))
    }
}
