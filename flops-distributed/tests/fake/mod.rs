//! Jobs of plain arithmetic, whose sums show in which order they were made.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use flops_executor::{JobFailure, Jobs, Round};

/// What happens when a job runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Fails,
    MayPass,
    Panics,
    Aborts,
    /// The job is done, and the worker rests: it publishes late.
    Sleeps(Duration),
}

/// The jobs of a round. Leaf l gives values that depend on the round and l.
#[derive(Debug)]
pub struct Fake {
    pub round: Round,
    pub values: usize,
    /// Sums of nodes, or values of leaves.
    pub known: BTreeMap<(usize, usize), Vec<f32>>,
    pub ran: Vec<usize>,
    pub fates: Vec<(usize, Fate)>,
    /// Refuses everything from elsewhere.
    pub refuses: bool,
    /// The time of a leaf.
    pub pause: Duration,
}

impl Fake {
    pub fn new(round: Round, values: usize) -> Self {
        Self {
            round,
            values,
            known: BTreeMap::new(),
            ran: vec![],
            fates: vec![],
            refuses: false,
            pause: Duration::ZERO,
        }
    }

    /// The values of a leaf: of all magnitudes, so that the order of a sum shows in its bits.
    fn leaf(&self, leaf: usize) -> Vec<f32> {
        let seed = mix(self.round.digest ^ mix(self.round.step << 8 | self.round.phase as u64) ^ leaf as u64);
        let value = |at: u64| {
            let bits = mix(seed ^ at.wrapping_mul(0x9E37_79B9_7F4A_7C15));
            let size = 10f32.powi((bits % 7) as i32 - 3);
            ((bits >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * size
        };
        (0..self.len(leaf) as u64).map(value).collect()
    }

    /// Leaves of rounds that are no sum have unlike lengths.
    fn len(&self, leaf: usize) -> usize {
        if self.round.is_sum() { self.values } else { self.values / 2 + leaf % 3 }
    }

    /// The sum of a node, if all below it is known.
    fn node(&self, start: usize, len: usize) -> Option<Vec<f32>> {
        if let Some(known) = self.known.get(&(start, len)) {
            return Some(known.clone());
        }
        if len == 1 {
            return None;
        }
        let mut left = self.node(start, len / 2)?;
        let right = self.node(start + len / 2, len / 2)?;
        left.iter_mut().zip(right).for_each(|(a, b)| *a += b);
        Some(left)
    }

    /// A hash of the result of the round. None where a job is not done.
    pub fn hash(&self) -> Option<u64> {
        let jobs = self.round.jobs;
        let values = if self.round.is_sum() {
            self.node(0, jobs)?
        } else {
            (0..jobs).map(|leaf| self.node(leaf, 1)).collect::<Option<Vec<_>>>()?.concat()
        };
        Some(values.iter().fold(jobs as u64, |hash, value| mix(hash ^ u64::from(value.to_bits()))))
    }

    /// The hash where leaves are added one after the other: what must not come out of a sum.
    pub fn hash_in_sequence(&self) -> u64 {
        let sum = (0..self.round.jobs).map(|leaf| self.leaf(leaf)).reduce(|mut a, b| {
            a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
            a
        });
        let sum = sum.unwrap_or_default();
        sum.iter().fold(self.round.jobs as u64, |hash, value| mix(hash ^ u64::from(value.to_bits())))
    }

    fn covered(&self, leaf: usize) -> bool {
        self.known.keys().any(|&(start, len)| (start..start + len).contains(&leaf))
    }
}

impl Jobs for Fake {
    fn run(&mut self, jobs: Range<usize>) -> Result<(), JobFailure> {
        for leaf in jobs {
            if self.covered(leaf) {
                continue;
            }
            if !self.pause.is_zero() {
                std::thread::sleep(self.pause);
            }
            self.ran.push(leaf);
            let values = self.leaf(leaf);
            let fate = self.fates.iter().find(|(at, _)| *at == leaf).map(|(_, fate)| *fate);
            match fate {
                Some(Fate::Fails) => return Err(JobFailure { why: format!("leaf {leaf} fails"), may_pass: false }),
                Some(Fate::MayPass) => return Err(JobFailure { why: format!("leaf {leaf} fails"), may_pass: true }),
                Some(Fate::Panics) => panic!("leaf {leaf} panics"),
                Some(Fate::Aborts) => std::process::abort(),
                Some(Fate::Sleeps(time)) => std::thread::sleep(time),
                None => {}
            }
            self.known.insert((leaf, 1), values);
        }
        Ok(())
    }

    fn has(&self, mut jobs: Range<usize>) -> bool {
        jobs.all(|leaf| self.covered(leaf))
    }

    fn pack(&mut self, jobs: Range<usize>) -> Result<Vec<u8>, JobFailure> {
        let missing = || JobFailure { why: format!("jobs {jobs:?} are not done"), may_pass: false };
        let values = if self.round.is_sum() {
            assert!(jobs.len().is_power_of_two() && jobs.start.is_multiple_of(jobs.len()), "{jobs:?} is no node");
            self.node(jobs.start, jobs.len()).ok_or_else(missing)?
        } else {
            let all: Option<Vec<_>> = jobs.clone().map(|leaf| self.node(leaf, 1)).collect();
            all.ok_or_else(missing)?.concat()
        };
        Ok(values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    fn unpack(&mut self, jobs: Range<usize>, bytes: &[u8]) -> Result<(), JobFailure> {
        if self.refuses || bytes.len() != self.max_bytes(jobs.clone()) {
            return Err(JobFailure { why: format!("{} bytes are no jobs {jobs:?}", bytes.len()), may_pass: false });
        }
        let mut values = bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
        if self.round.is_sum() {
            assert!(jobs.len().is_power_of_two() && jobs.start.is_multiple_of(jobs.len()), "{jobs:?} is no node");
            if !self.has(jobs.clone()) {
                self.known.insert((jobs.start, jobs.len()), values.collect());
            }
        } else {
            for leaf in jobs {
                let taken: Vec<f32> = values.by_ref().take(self.len(leaf)).collect();
                self.known.entry((leaf, 1)).or_insert(taken);
            }
        }
        Ok(())
    }

    fn max_bytes(&self, jobs: Range<usize>) -> usize {
        if self.round.is_sum() { 4 * self.values } else { 4 * jobs.map(|leaf| self.len(leaf)).sum::<usize>() }
    }
}

/// Scrambles bits.
pub fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}
