//! The rounds of a step: typed jobs before the executor that runs them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::tensor::backend::DeviceId;

use crate::error::Error;
use crate::executor::{Executor, ExecutorError, JobFailure, Jobs, Round, RoundPhase, Threads};
use crate::random::derive_seed;
use crate::wire::{Reader, Writer};

/// Who runs the jobs of a step, and what names its rounds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rounds<'a> {
    executor: &'a dyn Executor,
    /// Number of the step, and of the steps before it that wait for the same update.
    step: (u64, u64),
}

impl<'a> Rounds<'a> {
    /// The rounds of a step, and of further steps before one update.
    pub fn new(executor: &'a dyn Executor, step: u64, further: u64) -> Self {
        Self { executor, step: (step, further) }
    }

    /// Rounds whose jobs all run on the threads of this process.
    pub fn local() -> Rounds<'static> {
        Rounds { executor: &Threads, step: (0, 0) }
    }

    /// The devices of this process that run jobs; empty for that of the model.
    pub fn devices(&self) -> Vec<DeviceId> {
        self.executor.devices().into_iter().map(|(type_id, index_id)| DeviceId { type_id, index_id }).collect()
    }

    /// Whether jobs may run in other processes.
    pub fn are_shared(&self) -> bool {
        !self.executor.is_local()
    }

    /// What each of `jobs` jobs gives.
    ///
    /// `key` holds all that the jobs depend on beside the weights.
    ///
    /// # Errors
    /// Where a job fails, here or elsewhere, or the executor does.
    pub fn gather<T: JobResult>(
        &self,
        (phase, key, jobs): (RoundPhase, &[u64], usize),
        run: Run<'_, T>,
        codec: &dyn Codec<T>,
    ) -> Result<Vec<T>, Error> {
        let mut typed = self.run((phase, key, jobs, true), run, codec)?;
        Ok((0..jobs).filter_map(|job| Some(typed.parts.remove(&job)?.value)).collect())
    }

    /// The sum of what `jobs` jobs give, along the fixed tree. `jobs` is a power of two.
    ///
    /// `repeats` tells whether a job costs the same wherever it runs.
    ///
    /// # Errors
    /// As [`gather`](Self::gather).
    pub fn sum<T: JobResult>(
        &self,
        (phase, key, jobs, repeats): (RoundPhase, &[u64], usize, bool),
        run: Run<'_, T>,
        codec: &dyn Codec<T>,
    ) -> Result<T, Error> {
        let mut typed = self.run((phase, key, jobs, repeats), run, codec)?;
        typed.node(0..jobs);
        typed.parts.remove(&0).map(|part| part.value).ok_or_else(|| undone(phase))
    }

    fn run<'r, T: JobResult>(
        &self,
        (phase, key, jobs, repeats): (RoundPhase, &[u64], usize, bool),
        run: Run<'r, T>,
        codec: &'r dyn Codec<T>,
    ) -> Result<TypedJobs<'r, T>, Error> {
        let (is_local, is_sum, parts) = (self.executor.is_local(), phase.is_sum(), BTreeMap::new());
        let mut typed = TypedJobs { parts, jobs, is_sum, is_local, run, codec, error: None };
        let round = Round::new(self.step, phase, derive_seed(key), jobs);
        let outcome = self.executor.run(&if repeats { round } else { round.bound() }, &mut typed);
        match (outcome, typed.error.take()) {
            // a job that failed here may have run elsewhere before
            (Ok(()), _) if typed.has(0..jobs) => Ok(typed),
            (Ok(()), _) => Err(undone(phase)),
            // the error itself says more than its text; all workers must agree whether to go on
            (Err(found), Some(error)) if found.may_pass() == error.may_pass() => Err(error),
            (Err(found), _) => Err(found.into()),
        }
    }
}

/// An executor that breaks its contract.
fn undone(phase: RoundPhase) -> Error {
    let what = format!("the executor returned from the round '{}' before all jobs were done", phase.name());
    ExecutorError::Unsupported { what, remedy: "see the contract of flops_core::Executor".into() }.into()
}

/// Runs jobs here and hands each result to the function that it is given, in the order of the jobs.
pub(crate) type Run<'a, T> = &'a mut dyn FnMut(&[usize], &mut (dyn FnMut(usize, T) + Send)) -> Result<(), Error>;

/// What a job gives.
pub(crate) trait JobResult: Send + Sized {
    /// The sum of two neighbours, where the round is a sum.
    fn add(self, right: Self) -> Self;
}

/// How the results of jobs travel.
pub(crate) trait Codec<T> {
    /// Writes what other workers need of a result.
    fn write(&self, value: &T, writer: &mut Writer);
    /// The result of these jobs; `None` where the bytes are of something else.
    fn read(&self, jobs: Range<usize>, reader: &mut Reader<'_>) -> Option<T>;
    /// The most bytes that the result of these jobs has.
    fn max_bytes(&self, jobs: Range<usize>) -> usize;
}

/// The result of some jobs, up to `end`.
struct Part<T> {
    end: usize,
    value: T,
    /// Whether it may be added to its neighbour: nobody will ask for it alone.
    is_free: bool,
}

/// The jobs of a round with their results, by the first job of each.
struct TypedJobs<'a, T> {
    parts: BTreeMap<usize, Part<T>>,
    jobs: usize,
    is_sum: bool,
    is_local: bool,
    run: Run<'a, T>,
    codec: &'a dyn Codec<T>,
    /// Why a job failed here.
    error: Option<Error>,
}

impl<T: JobResult> TypedJobs<'_, T> {
    /// The jobs of a range that are not done.
    fn missing(&self, jobs: Range<usize>) -> Vec<usize> {
        let done = |job: usize| self.parts.range(..=job).next_back().is_some_and(|(_, part)| part.end > job);
        jobs.filter(|&job| !done(job)).collect()
    }

    /// Makes one part of a node; whether all of it is there.
    fn node(&mut self, node: Range<usize>) -> bool {
        let Range { start, end } = node;
        if self.parts.get(&start).is_some_and(|part| part.end == end) {
            return true;
        }
        let middle = start + (end - start) / 2;
        if end - start < 2 || !self.node(start..middle) || !self.node(middle..end) {
            return false;
        }
        if let (Some(left), Some(right)) = (self.parts.remove(&start), self.parts.remove(&middle)) {
            let value = left.value.add(right.value);
            self.parts.insert(start, Part { end, value, is_free: false });
        }
        true
    }
}

/// Keeps the result of a range of the jobs of a round, and adds it to its neighbour as long as both are
/// free.
fn keep<T: JobResult>(
    parts: &mut BTreeMap<usize, Part<T>>,
    (jobs, is_sum): (usize, bool),
    (range, mut value, is_free): (Range<usize>, T, bool),
) {
    let Range { mut start, mut end } = range;
    while is_sum && is_free && end - start < jobs {
        let size = end - start;
        let is_left = (start / size).is_multiple_of(2);
        let neighbour = if is_left { end } else { start - size };
        if parts.get(&neighbour).is_none_or(|part| !part.is_free || part.end != neighbour + size) {
            break;
        }
        let Some(other) = parts.remove(&neighbour) else { break };
        value = if is_left { value.add(other.value) } else { other.value.add(value) };
        (start, end) = (start.min(neighbour), end.max(other.end));
    }
    parts.insert(start, Part { end, value, is_free });
}

impl<T: JobResult> Jobs for TypedJobs<'_, T> {
    fn run(&mut self, jobs: Range<usize>) -> Result<(), JobFailure> {
        let missing = self.missing(jobs);
        if missing.is_empty() {
            return Ok(());
        }
        // what only this process needs is added up at once; others may ask for any node
        let (parts, of_round, is_free) = (&mut self.parts, (self.jobs, self.is_sum), self.is_local);
        let mut run = || (self.run)(&missing, &mut |job, value| keep(parts, of_round, (job..job + 1, value, is_free)));
        let outcome = if is_free {
            run()
        } else {
            catch_unwind(AssertUnwindSafe(run))
                .unwrap_or_else(|panic| Err(Error::JobPanicked { why: message(&*panic) }))
        };
        outcome.map_err(|error| {
            let failure = JobFailure { why: error.to_string(), may_pass: error.may_pass() };
            self.error.get_or_insert(error);
            failure
        })
    }

    fn has(&self, jobs: Range<usize>) -> bool {
        self.missing(jobs).is_empty()
    }

    fn pack(&mut self, jobs: Range<usize>) -> Result<Vec<u8>, JobFailure> {
        let mut writer = Writer::default();
        let parts: Vec<usize> = if self.is_sum {
            if !self.node(jobs.clone()) {
                return Err(JobFailure { why: format!("jobs {jobs:?} are not a node that is done"), may_pass: false });
            }
            vec![jobs.start]
        } else {
            jobs.clone().collect()
        };
        for part in parts {
            let Some(part) = self.parts.get(&part) else {
                return Err(JobFailure { why: format!("job {part} is not done"), may_pass: false });
            };
            self.codec.write(&part.value, &mut writer);
        }
        Ok(writer.into_bytes())
    }

    fn unpack(&mut self, jobs: Range<usize>, bytes: &[u8]) -> Result<(), JobFailure> {
        let unreadable = || JobFailure { why: format!("the results of jobs {jobs:?} cannot be read"), may_pass: false };
        if jobs.is_empty() || jobs.end > self.jobs || bytes.len() > self.max_bytes(jobs.clone()) {
            return Err(unreadable());
        }
        let ranges: Vec<Range<usize>> = match self.is_sum {
            true => vec![jobs.clone()],
            false => jobs.clone().map(|job| job..job + 1).collect(),
        };
        let mut reader = Reader::new(bytes);
        let mut values = vec![];
        for range in ranges {
            let value = self.codec.read(range.clone(), &mut reader).ok_or_else(unreadable)?;
            values.push((range, value));
        }
        reader.end().ok_or_else(unreadable)?;
        for (range, value) in values {
            // what is done, in whole or in part, stays as it is
            if self.missing(range.clone()).len() == range.len() {
                keep(&mut self.parts, (self.jobs, self.is_sum), (range, value, true));
            }
        }
        Ok(())
    }

    fn max_bytes(&self, jobs: Range<usize>) -> usize {
        match self.is_sum {
            true => self.codec.max_bytes(jobs),
            false => jobs.map(|job| self.codec.max_bytes(job..job + 1)).sum(),
        }
    }
}

/// What a panic says.
fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}
