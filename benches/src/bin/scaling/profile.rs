//! Where the time of a step goes: an executor around another that takes the time of each round.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use flops_core::executor::{Executor, ExecutorError, JobFailure, Jobs, Round, RunIdentity};
use serde::{Deserialize, Serialize};

/// Seconds of the rounds of a phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Seconds {
    /// In the executor, jobs included.
    pub all: f64,
    /// In jobs that run here.
    pub jobs: f64,
    /// In packing and unpacking results.
    pub packing: f64,
}

impl Seconds {
    /// Neither in jobs nor in packing: requests, their way, and waiting for others.
    pub fn waited(&self) -> f64 {
        self.all - self.jobs - self.packing
    }

    /// Adds others, times a factor.
    pub fn add(&mut self, other: &Self, factor: f64) {
        self.all += factor * other.all;
        self.jobs += factor * other.jobs;
        self.packing += factor * other.packing;
    }
}

/// The seconds of each phase, by its name.
pub type Phases = BTreeMap<String, Seconds>;

/// An executor around another.
#[derive(Debug)]
pub struct Profiled {
    inner: Arc<dyn Executor>,
    phases: Mutex<Phases>,
}

impl Profiled {
    /// Around `inner`.
    pub fn new(inner: Arc<dyn Executor>) -> Self {
        Self { inner, phases: Mutex::default() }
    }

    /// The seconds since this was last called.
    pub fn take(&self) -> Phases {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Phases> {
        self.phases.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Executor for Profiled {
    fn run(&self, round: &Round, jobs: &mut dyn Jobs) -> Result<(), ExecutorError> {
        let mut timed = TimedJobs { jobs, seconds: Seconds::default() };
        let start = Instant::now();
        let outcome = self.inner.run(round, &mut timed);
        let seconds = Seconds { all: start.elapsed().as_secs_f64(), ..timed.seconds };
        self.lock().entry(round.phase.name().into()).or_default().add(&seconds, 1.0);
        outcome
    }

    fn is_local(&self) -> bool {
        self.inner.is_local()
    }

    fn begin(&self, run: &RunIdentity) -> Result<(), ExecutorError> {
        self.inner.begin(run)
    }

    fn verify(&self, step: u64, weights: u64) -> Result<(), ExecutorError> {
        self.inner.verify(step, weights)
    }
}

struct TimedJobs<'a> {
    jobs: &'a mut dyn Jobs,
    seconds: Seconds,
}

impl Jobs for TimedJobs<'_> {
    fn run(&mut self, jobs: Range<usize>) -> Result<(), JobFailure> {
        let start = Instant::now();
        let outcome = self.jobs.run(jobs);
        self.seconds.jobs += start.elapsed().as_secs_f64();
        outcome
    }

    fn has(&self, jobs: Range<usize>) -> bool {
        self.jobs.has(jobs)
    }

    fn pack(&mut self, jobs: Range<usize>) -> Result<Vec<u8>, JobFailure> {
        let start = Instant::now();
        let packed = self.jobs.pack(jobs);
        self.seconds.packing += start.elapsed().as_secs_f64();
        packed
    }

    fn unpack(&mut self, jobs: Range<usize>, bytes: &[u8]) -> Result<(), JobFailure> {
        let start = Instant::now();
        let unpacked = self.jobs.unpack(jobs, bytes);
        self.seconds.packing += start.elapsed().as_secs_f64();
        unpacked
    }

    fn max_bytes(&self, jobs: Range<usize>) -> usize {
        self.jobs.max_bytes(jobs)
    }
}
