//! Jobs of plain arithmetic, whose sums show in which order they were made.

use std::collections::BTreeMap;
use std::ops::Range;

use flops_executor::{JobFailure, Jobs, Round, RunIdentity};

/// What happens when a job of a round runs, before it gives anything.
pub type Hook<'a> = &'a mut dyn FnMut(&Round, usize) -> Result<(), JobFailure>;

/// The jobs of a round. They keep and add results as those of a learner do.
pub struct Fake<'a> {
    pub round: Round,
    /// The number of values of a sum.
    pub len: usize,
    /// What a job gives: `len` values. Without it, values that depend on the round and the job.
    pub value: Option<&'a dyn Fn(usize) -> Vec<f32>>,
    pub hook: Option<Hook<'a>>,
    /// Refuses everything from elsewhere.
    pub refuses: bool,
    /// Results, by the first job of each.
    pub done: BTreeMap<usize, Part>,
}

/// The result of some jobs, up to `end`.
pub struct Part {
    end: usize,
    values: Vec<f32>,
    /// It came from elsewhere: nobody will ask for it alone.
    is_free: bool,
}

impl<'a> Fake<'a> {
    pub fn new(round: Round, len: usize) -> Self {
        Self { round, len, value: None, hook: None, refuses: false, done: BTreeMap::new() }
    }

    /// Values of all magnitudes, so that the order of a sum shows in its bits.
    pub fn leaf(&self, job: usize) -> Vec<f32> {
        let seed = mix(self.round.digest ^ mix(self.round.step << 8 | self.round.phase as u64) ^ job as u64);
        let value = |at: u64| {
            let bits = mix(seed ^ at.wrapping_mul(0x9E37_79B9_7F4A_7C15));
            let size = 10f32.powi((bits % 7) as i32 - 3);
            ((bits >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * size
        };
        (0..self.len_of(job) as u64).map(value).collect()
    }

    /// Jobs of rounds that are no sum give unlike lengths.
    fn len_of(&self, job: usize) -> usize {
        if self.round.is_sum() || self.value.is_some() { self.len } else { self.len / 2 + job % 3 }
    }

    fn covered(&self, job: usize) -> bool {
        self.done.range(..=job).next_back().is_some_and(|(_, part)| part.end > job)
    }

    /// Makes one part of a node; whether all of it is there.
    fn node(&mut self, Range { start, end }: Range<usize>) -> bool {
        if self.done.get(&start).is_some_and(|part| part.end == end) {
            return true;
        }
        let middle = start + (end - start) / 2;
        if end - start < 2 || !self.node(start..middle) || !self.node(middle..end) {
            return false;
        }
        let (left, right) = (self.done.remove(&start).unwrap(), self.done.remove(&middle).unwrap());
        self.done.insert(start, Part { end, values: add(left.values, right.values), is_free: false });
        true
    }

    /// Takes a result from elsewhere, and adds it to its neighbour where that came from elsewhere too.
    fn keep(&mut self, Range { mut start, mut end }: Range<usize>, mut values: Vec<f32>) {
        while self.round.is_sum() && end - start < self.round.jobs {
            let size = end - start;
            let is_left = (start / size).is_multiple_of(2);
            let neighbour = if is_left { end } else { start - size };
            if self.done.get(&neighbour).is_none_or(|part| !part.is_free || part.end != neighbour + size) {
                break;
            }
            let other = self.done.remove(&neighbour).unwrap().values;
            values = if is_left { add(values, other) } else { add(other, values) };
            (start, end) = (start.min(neighbour), end.max(neighbour + size));
        }
        self.done.insert(start, Part { end, values, is_free: true });
    }

    /// The ranges that a packed range is made of: itself in a sum, else its jobs.
    fn packed(&self, jobs: Range<usize>) -> Vec<Range<usize>> {
        if self.round.is_sum() {
            assert!(jobs.len().is_power_of_two() && jobs.start.is_multiple_of(jobs.len()), "{jobs:?} is no node");
            return vec![jobs];
        }
        jobs.map(|job| job..job + 1).collect()
    }

    /// The result of jobs: of each of them, or one sum. None where a job is not done.
    pub fn results(&mut self, jobs: Range<usize>) -> Option<Vec<Vec<f32>>> {
        let ranges = self.packed(jobs);
        ranges
            .into_iter()
            .map(|range| self.node(range.clone()).then(|| self.done[&range.start].values.clone()))
            .collect()
    }
}

impl Jobs for Fake<'_> {
    fn run(&mut self, jobs: Range<usize>) -> Result<(), JobFailure> {
        for job in jobs {
            if !self.covered(job) {
                self.hook.as_mut().map_or(Ok(()), |hook| hook(&self.round, job))?;
                let values = self.value.map_or_else(|| self.leaf(job), |value| value(job));
                assert_eq!(values.len(), self.len_of(job));
                self.done.insert(job, Part { end: job + 1, values, is_free: false });
            }
        }
        Ok(())
    }

    fn has(&self, mut jobs: Range<usize>) -> bool {
        jobs.all(|job| self.covered(job))
    }

    fn pack(&mut self, jobs: Range<usize>) -> Result<Vec<u8>, JobFailure> {
        let missing = || JobFailure { why: format!("jobs {jobs:?} are not done"), may_pass: false };
        let values = self.results(jobs.clone()).ok_or_else(missing)?;
        Ok(values.iter().flatten().flat_map(|value| value.to_le_bytes()).collect())
    }

    fn unpack(&mut self, jobs: Range<usize>, bytes: &[u8]) -> Result<(), JobFailure> {
        if self.refuses || jobs.end > self.round.jobs || bytes.len() != self.max_bytes(jobs.clone()) {
            return Err(JobFailure { why: format!("{} bytes are no jobs {jobs:?}", bytes.len()), may_pass: false });
        }
        let mut values = bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
        for range in self.packed(jobs) {
            let taken = values.by_ref().take(self.len_of(range.start)).collect();
            // what is done stays as it is; a part of it gives way to the whole
            if !self.has(range.clone()) {
                self.done.retain(|first, _| !range.contains(first));
                self.keep(range, taken);
            }
        }
        Ok(())
    }

    fn max_bytes(&self, jobs: Range<usize>) -> usize {
        4 * self.packed(jobs).into_iter().map(|range| self.len_of(range.start)).sum::<usize>()
    }
}

/// The sum of two neighbours.
pub fn add(mut left: Vec<f32>, right: Vec<f32>) -> Vec<f32> {
    left.iter_mut().zip(right).for_each(|(a, b)| *a += b);
    left
}

/// Scrambles bits.
pub fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// A hash of the bits of values.
pub fn hash(values: &[f32]) -> u64 {
    values.iter().fold(values.len() as u64, |hash, value| mix(hash ^ u64::from(value.to_bits())))
}

/// What the workers of a run have in common. It starts with a step and the hash of its weights.
pub fn identity(sigma: &str, start: (u64, u64)) -> RunIdentity {
    RunIdentity::new(vec![("space".into(), "weights".into()), ("sigma".into(), sigma.into())], start)
}
