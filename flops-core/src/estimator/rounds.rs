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
    pub fn gather<T: Send>(
        &self,
        (phase, key, jobs): (RoundPhase, &[u64], usize),
        run: Run<'_, T>,
        codec: &dyn Codec<T>,
    ) -> Result<Vec<T>, Error> {
        let mut typed = self.run((phase, key, jobs, true), (run, None), codec)?;
        Ok((0..jobs).filter_map(|job| typed.parts.take(job)).collect())
    }

    /// The sum of what `jobs` jobs give, along the fixed tree. `jobs` is a power of two.
    ///
    /// `add` adds two neighbours. `repeats` tells whether a job costs the same wherever it runs.
    ///
    /// # Errors
    /// As [`gather`](Self::gather).
    pub fn sum<T: Send>(
        &self,
        (phase, key, jobs, repeats): (RoundPhase, &[u64], usize, bool),
        (run, add): (Run<'_, T>, Add<T>),
        codec: &dyn Codec<T>,
    ) -> Result<T, Error> {
        let mut typed = self.run((phase, key, jobs, repeats), (run, Some(add)), codec)?;
        typed.parts.node(0..jobs);
        typed.parts.take(0).ok_or_else(|| undone(phase))
    }

    fn run<'r, T: Send>(
        &self,
        (phase, key, jobs, repeats): (RoundPhase, &[u64], usize, bool),
        (run, add): (Run<'r, T>, Option<Add<T>>),
        codec: &'r dyn Codec<T>,
    ) -> Result<TypedJobs<'r, T>, Error> {
        debug_assert_eq!(add.is_some(), phase.is_sum(), "{phase:?}");
        let parts = Parts { done: BTreeMap::new(), jobs, add };
        let mut typed = TypedJobs { parts, is_local: self.executor.is_local(), run, codec, error: None };
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

/// Adds two neighbours.
type Add<T> = fn(T, T) -> T;

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

/// The results of the jobs of a round.
struct Parts<T> {
    /// By the first job of each.
    done: BTreeMap<usize, Part<T>>,
    jobs: usize,
    /// Adds two neighbours, in a round that is a sum.
    add: Option<Add<T>>,
}

impl<T> Parts<T> {
    fn take(&mut self, first: usize) -> Option<T> {
        self.done.remove(&first).map(|part| part.value)
    }

    /// The jobs of a range that are not done.
    fn missing(&self, jobs: Range<usize>) -> Vec<usize> {
        let done = |job: usize| self.done.range(..=job).next_back().is_some_and(|(_, part)| part.end > job);
        jobs.filter(|&job| !done(job)).collect()
    }

    /// Makes one part of a node; whether all of it is there.
    fn node(&mut self, node: Range<usize>) -> bool {
        let Range { start, end } = node;
        if self.done.get(&start).is_some_and(|part| part.end == end) {
            return true;
        }
        let (middle, Some(add)) = (start + (end - start) / 2, self.add) else { return false };
        if end - start < 2 || !self.node(start..middle) || !self.node(middle..end) {
            return false;
        }
        if let (Some(left), Some(right)) = (self.take(start), self.take(middle)) {
            self.done.insert(start, Part { end, value: add(left, right), is_free: false });
        }
        true
    }

    /// Keeps the result of a range, and adds it to its neighbour as long as both are free.
    fn keep(&mut self, Range { mut start, mut end }: Range<usize>, mut value: T, is_free: bool) {
        while let Some(add) = self.add.filter(|_| is_free && end - start < self.jobs) {
            let size = end - start;
            let is_left = (start / size).is_multiple_of(2);
            let neighbour = if is_left { end } else { start - size };
            if self.done.get(&neighbour).is_none_or(|part| !part.is_free || part.end != neighbour + size) {
                break;
            }
            let Some(other) = self.take(neighbour) else { break };
            value = if is_left { add(value, other) } else { add(other, value) };
            (start, end) = (start.min(neighbour), end.max(neighbour + size));
        }
        self.done.insert(start, Part { end, value, is_free });
    }

    /// The ranges that a packed range is made of: itself in a sum, else its jobs.
    fn packed(&self, jobs: Range<usize>) -> Vec<Range<usize>> {
        match self.add {
            Some(_) => vec![jobs],
            None => jobs.map(|job| job..job + 1).collect(),
        }
    }
}

/// The jobs of a round with their results.
struct TypedJobs<'a, T> {
    parts: Parts<T>,
    is_local: bool,
    run: Run<'a, T>,
    codec: &'a dyn Codec<T>,
    /// Why a job failed here.
    error: Option<Error>,
}

impl<T: Send> Jobs for TypedJobs<'_, T> {
    fn run(&mut self, jobs: Range<usize>) -> Result<(), JobFailure> {
        let missing = self.parts.missing(jobs);
        if missing.is_empty() {
            return Ok(());
        }
        // what only this process needs is added up at once; others may ask for any node
        let (parts, is_free) = (&mut self.parts, self.is_local);
        let mut run = || (self.run)(&missing, &mut |job, value| parts.keep(job..job + 1, value, is_free));
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
        self.parts.missing(jobs).is_empty()
    }

    fn pack(&mut self, jobs: Range<usize>) -> Result<Vec<u8>, JobFailure> {
        let mut writer = Writer::default();
        for range in self.parts.packed(jobs) {
            let is_there = self.parts.node(range.clone());
            let Some(part) = self.parts.done.get(&range.start).filter(|_| is_there) else {
                return Err(JobFailure { why: format!("jobs {range:?} are not done as one"), may_pass: false });
            };
            self.codec.write(&part.value, &mut writer);
        }
        Ok(writer.into_bytes())
    }

    fn unpack(&mut self, jobs: Range<usize>, bytes: &[u8]) -> Result<(), JobFailure> {
        let unreadable = || JobFailure { why: format!("the results of jobs {jobs:?} cannot be read"), may_pass: false };
        if jobs.is_empty() || jobs.end > self.parts.jobs || bytes.len() > self.max_bytes(jobs.clone()) {
            return Err(unreadable());
        }
        let (mut reader, mut values) = (Reader::new(bytes), vec![]);
        for range in self.parts.packed(jobs.clone()) {
            let value = self.codec.read(range.clone(), &mut reader).ok_or_else(unreadable)?;
            values.push((range, value));
        }
        reader.end().ok_or_else(unreadable)?;
        for (range, value) in values {
            // what is done stays as it is; a part of it gives way to the whole
            if !self.has(range.clone()) {
                self.parts.done.retain(|first, _| !range.contains(first));
                self.parts.keep(range, value, true);
            }
        }
        Ok(())
    }

    fn max_bytes(&self, jobs: Range<usize>) -> usize {
        self.parts.packed(jobs).into_iter().map(|range| self.codec.max_bytes(range)).sum()
    }
}

/// What a panic says.
fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Plain;

    impl Codec<f32> for Plain {
        fn write(&self, value: &f32, writer: &mut Writer) {
            writer.singles(&[*value]);
        }

        fn read(&self, _: Range<usize>, reader: &mut Reader<'_>) -> Option<f32> {
            reader.singles().filter(|values| values.len() == 1).map(|values| values[0])
        }

        fn max_bytes(&self, _: Range<usize>) -> usize {
            16
        }
    }

    /// Leaves whose sum depends on the order.
    const LEAVES: [f32; 8] = [1e8, 1.0, -1e8, 3.0, 0.1, 7e7, -7e7, 0.3];

    /// The sum along the tree.
    fn tree(leaves: &[f32]) -> f32 {
        match leaves {
            [one] => *one,
            _ => {
                let (left, right) = leaves.split_at(leaves.len() / 2);
                tree(left) + tree(right)
            }
        }
    }

    /// The jobs of a sum on a worker that is not alone, after `change`; the sum, and the leaves that ran here.
    fn sum(change: impl FnOnce(&mut dyn Jobs)) -> (Option<f32>, Vec<usize>) {
        let mut ran = vec![];
        let mut run = |jobs: &[usize], take: &mut (dyn FnMut(usize, f32) + Send)| {
            ran.extend_from_slice(jobs);
            jobs.iter().for_each(|&job| take(job, LEAVES[job]));
            Ok(())
        };
        let parts = Parts { done: BTreeMap::new(), jobs: 8, add: Some((|a, b| a + b) as Add<f32>) };
        let mut jobs = TypedJobs { parts, is_local: false, run: &mut run, codec: &Plain, error: None };
        change(&mut jobs);
        let is_whole = jobs.parts.node(0..8);
        let total = jobs.parts.take(0).filter(|_| is_whole);
        (total, ran)
    }

    fn packed(range: Range<usize>) -> Vec<u8> {
        let mut writer = Writer::default();
        Plain.write(&tree(&LEAVES[range]), &mut writer);
        writer.into_bytes()
    }

    /// The tree is the same whatever runs here and whatever comes, in any order and more than once.
    #[test]
    fn a_sum_follows_the_tree() {
        let expected = Some(tree(&LEAVES));
        assert_ne!(expected, Some(LEAVES.iter().sum()));
        assert_eq!(sum(|jobs| jobs.run(0..8).unwrap()), (expected, (0..8).collect()));
        let (total, ran) = sum(|jobs| {
            jobs.run(2..4).unwrap();
            assert_eq!(jobs.pack(2..4).unwrap(), packed(2..4));
            for range in [4..8, 0..1, 1..2, 4..8, 2..3] {
                jobs.unpack(range.clone(), &packed(range)).unwrap();
            }
            assert!(jobs.has(0..8));
            assert_eq!(jobs.pack(0..4).unwrap(), packed(0..4));
        });
        assert_eq!((total, ran), (expected, vec![2, 3]));
    }

    /// A leaf that was taken over before its owner's node came.
    #[test]
    fn a_node_replaces_a_part_of_it_that_is_done() {
        let (total, ran) = sum(|jobs| {
            jobs.run(1..2).unwrap();
            jobs.unpack(6..7, &packed(6..7)).unwrap();
            for range in [0..4, 4..8] {
                jobs.unpack(range.clone(), &packed(range.clone())).unwrap();
                assert!(jobs.has(range));
            }
        });
        assert_eq!((total, ran), (Some(tree(&LEAVES)), vec![1]));
    }
}
