//! A little network whose sums depend on their order, and a log in memory.
#![allow(dead_code)]

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use flops_distributed::{Entry, Key, Log, Traffic};
use flops_executor::{Executor, ExecutorError};
use flops_executor::{JobFailure, Jobs, Round, RoundPhase, RunIdentity};

/// Leaves of a step.
pub const LEAVES: usize = 8;
const WIDTH: usize = 5;

/// What happens when a job runs: its number among all that ran here.
pub type Hook<'a> = &'a mut dyn FnMut(&Round, usize) -> Result<(), JobFailure>;

/// The jobs of a round: values of jobs, or of nodes of their tree.
struct Fake<'a, 'b> {
    round: Round,
    value: &'a dyn Fn(usize) -> Vec<f32>,
    hook: &'a mut Hook<'b>,
    done: BTreeMap<(usize, usize), Vec<f32>>,
}

impl Fake<'_, '_> {
    /// The sum of a node, if it is known or its halves are.
    fn node(&self, range: Range<usize>) -> Option<Vec<f32>> {
        if let Some(known) = self.done.get(&(range.start, range.end)) {
            return Some(known.clone());
        }
        if range.len() < 2 {
            return None;
        }
        let middle = range.start + range.len() / 2;
        let (left, right) = (self.node(range.start..middle)?, self.node(middle..range.end)?);
        Some(left.iter().zip(right).map(|(a, b)| a + b).collect())
    }
}

impl Jobs for Fake<'_, '_> {
    fn run(&mut self, jobs: Range<usize>) -> Result<(), JobFailure> {
        for job in jobs {
            if !self.has(job..job + 1) {
                (self.hook)(&self.round, job)?;
                self.done.insert((job, job + 1), (self.value)(job));
            }
        }
        Ok(())
    }

    fn has(&self, mut jobs: Range<usize>) -> bool {
        jobs.all(|job| self.done.keys().any(|(start, end)| (*start..*end).contains(&job)))
    }

    fn pack(&mut self, jobs: Range<usize>) -> Result<Vec<u8>, JobFailure> {
        let missing = || JobFailure { why: format!("{jobs:?} is not done"), may_pass: false };
        let values = if self.round.is_sum() {
            self.node(jobs.clone()).ok_or_else(missing)?
        } else {
            let all: Option<Vec<_>> = jobs.clone().map(|job| self.done.get(&(job, job + 1))).collect();
            all.ok_or_else(missing)?.into_iter().flatten().copied().collect()
        };
        Ok(values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    fn unpack(&mut self, jobs: Range<usize>, bytes: &[u8]) -> Result<(), JobFailure> {
        if bytes.len() != self.max_bytes(jobs.clone()) {
            return Err(JobFailure { why: format!("{} bytes for {jobs:?}", bytes.len()), may_pass: false });
        }
        let values: Vec<f32> = bytes.chunks(4).map(|value| f32::from_le_bytes(value.try_into().unwrap())).collect();
        if self.round.is_sum() {
            if !self.has(jobs.clone()) {
                self.done.insert((jobs.start, jobs.end), values);
            }
        } else {
            for (job, part) in jobs.zip(values.chunks(WIDTH)) {
                self.done.entry((job, job + 1)).or_insert_with(|| part.to_vec());
            }
        }
        Ok(())
    }

    fn max_bytes(&self, jobs: Range<usize>) -> usize {
        4 * WIDTH * if self.round.is_sum() { 1 } else { jobs.len() }
    }
}

/// A network in training.
#[derive(Clone, Debug, PartialEq)]
pub struct Net {
    pub step: u64,
    pub weights: Vec<f32>,
    /// Steps that failed and were passed over.
    pub passed: Vec<u64>,
}

impl Default for Net {
    fn default() -> Self {
        Self { step: 0, weights: (0..WIDTH).map(|i| 0.1 + i as f32).collect(), passed: vec![] }
    }
}

impl Net {
    pub fn hash(&self) -> u64 {
        self.weights.iter().fold(7, |hash, weight| (hash ^ u64::from(weight.to_bits())).wrapping_mul(0x100_0000_01b3))
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        self.weights.iter().flat_map(|weight| weight.to_le_bytes()).collect()
    }

    pub fn from_checkpoint((step, bytes): (u64, Vec<u8>)) -> Self {
        let weights = bytes.chunks(4).map(|value| f32::from_le_bytes(value.try_into().unwrap())).collect();
        Self { step, weights, passed: vec![] }
    }

    pub fn begin(&self, executor: &dyn Executor) -> Result<(), ExecutorError> {
        executor.begin(&RunIdentity::new(vec![("sigma".into(), "0.1".into())], (self.step, self.hash())))
    }

    /// One step. A failure that may pass is passed over.
    pub fn step(&mut self, executor: &dyn Executor, mut hook: Hook) -> Result<(), ExecutorError> {
        if self.step.is_multiple_of(4) {
            executor.verify(self.step, self.hash())?;
        }
        match self.gradient(executor, &mut hook) {
            Ok(gradient) => {
                for (weight, slope) in self.weights.iter_mut().zip(gradient) {
                    *weight -= 0.01 * slope;
                }
            }
            Err(why) if why.may_pass() => self.passed.push(self.step),
            Err(why) => return Err(why),
        }
        self.step += 1;
        Ok(())
    }

    fn gradient(&self, executor: &dyn Executor, hook: &mut Hook) -> Result<Vec<f32>, ExecutorError> {
        let mut before = self.weights.clone();
        for (phase, jobs) in [
            (RoundPhase::Clean, LEAVES),
            (RoundPhase::Repeat, 1),
            (RoundPhase::Query, LEAVES),
            (RoundPhase::Update, LEAVES),
        ] {
            let digest = before.iter().fold(9, |hash: u64, value| hash.rotate_left(5) ^ u64::from(value.to_bits()));
            let round = Round::new((self.step, 0), phase, digest, jobs);
            let value = |job: usize| -> Vec<f32> {
                let of = |(i, weight): (usize, &f32)| (weight * 1.7 + i as f32).sin() * 10f32.powi(job as i32 % 5 - 2);
                before.iter().enumerate().map(of).collect()
            };
            let mut fake = Fake { round, value: &value, hook, done: BTreeMap::new() };
            executor.run(&round, &mut fake)?;
            let all: Vec<f32> = if round.is_sum() {
                fake.node(0..jobs).expect("all jobs")
            } else {
                let each = |job: usize| fake.done[&(job, job + 1)].clone();
                (0..jobs).map(each).fold(before.clone(), |a, b| a.iter().zip(b).map(|(a, b)| a * 0.5 + b).collect())
            };
            before = all;
        }
        Ok(before)
    }

    /// Steps up to a step.
    pub fn train(mut self, executor: &dyn Executor, steps: u64, hook: Hook) -> Result<Self, ExecutorError> {
        self.begin(executor)?;
        while self.step < steps {
            self.step(executor, hook)?;
        }
        Ok(self)
    }
}

/// What one process gives.
pub fn reference(steps: u64) -> Net {
    Net::default().train(&flops_executor::Threads, steps, &mut |_, _| Ok(())).unwrap()
}

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
