//! Elastic runs: workers that come and go, and a log that all of them read.

mod payload;
mod round;
mod state;

use std::fmt::Debug;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use flops_executor::{Executor, ExecutorError};
use flops_executor::{Jobs, Round, RunIdentity};

use crate::{Key, Log, RoundKey, SumMode, WorkerStats};
use round::Turn;
use state::State;

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
    log: Box<dyn Log>,
    options: ElasticOptions,
    state: Mutex<State>,
    stats: Mutex<WorkerStats>,
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
        WorkerStats { bytes_sent: traffic.sent, bytes_received: traffic.received, ..self.counts().clone() }
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
        let mut state = self.lock();
        self.pump(&mut state, Duration::ZERO)?;
        let before = state.checkpoints.iter().copied().filter(|of| *of < step).max();
        state.checkpoints.retain(|of| *of >= step);
        state.checkpoints.push(step);
        // whoever has downloaded the one before can still join
        before.map_or(Ok(()), |before| self.log.trim(before))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn counts(&self) -> MutexGuard<'_, WorkerStats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what the log has, and waits for an entry if it has nothing.
    fn pump(&self, state: &mut State, wait: Duration) -> Result<(), ExecutorError> {
        let start = Instant::now();
        let mut next = self.log.next(wait)?;
        self.counts().seconds_waited += start.elapsed().as_secs_f64();
        while let Some(entry) = next {
            state.absorb(entry, &mut self.counts());
            next = self.log.next(Duration::ZERO)?;
        }
        Ok(())
    }

    /// Reads the log until something is found there that must come.
    fn wait_for<T>(
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
    fn agree(&self, state: &mut State, key: &Key, mine: &[u8]) -> Result<Vec<u8>, ExecutorError> {
        self.pump(state, Duration::ZERO)?;
        if state.fact(key).is_none() && self.log.put(key, mine)? {
            return Ok(mine.into());
        }
        self.wait_for(state, &format!("the entry {key}"), |state| state.fact(key).map(<[u8]>::to_vec))
    }
}

impl Executor for Elastic {
    fn run(&self, round: &Round, jobs: &mut dyn Jobs) -> Result<(), ExecutorError> {
        let mut state = self.lock();
        self.pump(&mut state, Duration::ZERO)?;
        let outcome = match state.enter(round) {
            // as where a step is repeated with the same data: its entries are gone
            Some(Ok(())) => jobs.run(0..round.jobs).map_err(|why| ExecutorError::job(self.worker(), why)),
            Some(failed) => failed,
            None => {
                let outcome = Turn::new(self, &mut state, round, jobs).run()?;
                state.leave(RoundKey::from(round), outcome.clone());
                outcome
            }
        };
        self.counts().rounds += 1;
        outcome
    }

    fn begin(&self, run: &RunIdentity) -> Result<(), ExecutorError> {
        let mut state = self.lock();
        let mut run = run.clone();
        run.settings.push(("the sum mode".into(), self.options.sum_mode.to_string()));
        let there = self.agree(&mut state, &Key::Identity, &payload::identity(&run))?;
        let Some(there) = payload::read_identity(&there) else {
            return Err(ExecutorError::Unsupported {
                what: "the identity of the run, as the log has it, cannot be read".into(),
                remedy: "start all workers from the same version, or give the run another name".into(),
            });
        };
        if let Some((what, here, there)) = payload::difference(&run, &there) {
            return Err(ExecutorError::Mismatch { what, here, there });
        }
        self.log.put(&Key::Joined(self.worker().into()), &[])?;
        let until = Instant::now() + self.options.limit;
        self.wait_for(&mut state, "the entry of this worker", |state| {
            let enough = state.joined() >= self.options.min_workers || Instant::now() >= until;
            (state.has(self.worker()) && enough).then_some(())
        })
    }

    fn verify(&self, step: u64, weights: u64) -> Result<(), ExecutorError> {
        let there = self.agree(&mut self.lock(), &Key::Weights(step), &weights.to_le_bytes())?;
        match <[u8; 8]>::try_from(&there[..]) {
            Ok(there) if u64::from_le_bytes(there) == weights => Ok(()),
            Ok(_) => Err(ExecutorError::Diverged { worker: self.worker().into(), step }),
            // of no worker: nothing to compare with
            Err(_) => {
                self.counts().refused += 1;
                Ok(())
            }
        }
    }
}
