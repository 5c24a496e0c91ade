//! Where the jobs of a step run.
//!
//! A step is a sequence of *rounds*: the clean pass, the queries, the update. Each round is cut into
//! jobs, and a job is a pure function of the weights, the step and its number: it does not matter
//! where it runs, nor how often. Every worker runs the same training loop with the same loader,
//! allocator and optimizer, and is told the result of every job; only the jobs are shared. So all
//! workers end a step with the same weights, and there is one report.
//!
//! The examples of a batch are cut into *leaves*, contiguous parts, and
//! job l of a round is what leaf l needs. Sums over the leaves follow a fixed binary tree, whoever
//! adds them: the bits of a sum depend on the number of leaves, and not on the number of workers.
//!
//! [`Threads`] runs all jobs in this process. `flops-core` makes the jobs, and `flops-distributed` has
//! executors of several workers. This crate lies between them, and depends on neither.
#![deny(missing_docs)]

use std::fmt::Debug;
use std::ops::Range;

/// Runs the jobs of each round of a step, on this worker and on others.
///
/// # Contract
/// When [`run`](Self::run) returns `Ok`, every job has [run here](Jobs::run) or was
/// [taken](Jobs::unpack) from a worker that ran it. All workers see the same rounds in the same order. A
/// worker that is lost, a message that comes twice, late or in another order changes nothing.
pub trait Executor: Debug + Send + Sync {
    /// Sees to it that all jobs of a round are done.
    ///
    /// # Errors
    /// Where a job fails, on whichever worker, and where other workers cannot be reached.
    fn run(&self, round: &Round, jobs: &mut dyn Jobs) -> Result<(), ExecutorError>;

    /// Whether all jobs run in this process: nothing is ever packed then.
    fn is_local(&self) -> bool {
        false
    }

    /// Devices of this process that run jobs side by side, as (type, number); the first is the model's.
    ///
    /// Empty for the device of the model alone.
    fn devices(&self) -> Vec<(u16, u16)> {
        vec![]
    }

    /// Compares this worker with the others, once, before its first round.
    ///
    /// # Errors
    /// [`ExecutorError::Mismatch`] where they differ.
    fn begin(&self, _run: &RunIdentity) -> Result<(), ExecutorError> {
        Ok(())
    }

    /// Compares the weights before a step with those of the other workers.
    ///
    /// The learner asks at its first step and at every 100th.
    ///
    /// # Errors
    /// [`ExecutorError::Diverged`] where they differ.
    fn verify(&self, _step: u64, _weights: u64) -> Result<(), ExecutorError> {
        Ok(())
    }
}

/// A round: jobs that depend on what earlier rounds gave, and not on one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Round {
    /// Number of the step.
    pub step: u64,
    /// Steps before this one that wait for the same update.
    pub further: u64,
    /// What the jobs do.
    pub phase: RoundPhase,
    /// A hash of all that the jobs depend on beside the weights: equal on all workers.
    pub digest: u64,
    /// The number of jobs.
    pub jobs: usize,
    /// Whether any worker can run any job at the cost of its own: nothing that a job needs lies where
    /// an earlier one ran.
    pub repeats: bool,
}

impl Round {
    /// A round.
    pub fn new((step, further): (u64, u64), phase: RoundPhase, digest: u64, jobs: usize) -> Self {
        Self { step, further, phase, digest, jobs, repeats: true }
    }

    /// Whether the result is the sum over all jobs, so that parts can be added before they travel.
    pub fn is_sum(&self) -> bool {
        self.phase.is_sum()
    }

    /// The same round, of jobs that need what earlier ones left where they ran.
    #[must_use]
    pub fn bound(mut self) -> Self {
        self.repeats = false;
        self
    }
}

/// What the jobs of a round do, in the order of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum RoundPhase {
    /// The clean pass of a leaf.
    Clean,
    /// The check that parameters act through their sites; one job.
    SiteCheck,
    /// The clean pass of some examples once more; one job.
    Repeat,
    /// Pilot queries of a leaf.
    Pilot,
    /// The gradients that pilots give.
    PilotUpdate,
    /// Queries of a leaf.
    Query,
    /// The gradients that queries give.
    Update,
}

impl RoundPhase {
    /// All phases.
    pub const ALL: [Self; 7] =
        [Self::Clean, Self::SiteCheck, Self::Repeat, Self::Pilot, Self::PilotUpdate, Self::Query, Self::Update];

    /// Whether the result of a round is a sum over its jobs.
    pub fn is_sum(self) -> bool {
        matches!(self, Self::PilotUpdate | Self::Update)
    }

    /// A short name, as in subjects and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::SiteCheck => "check",
            Self::Repeat => "repeat",
            Self::Pilot => "pilot",
            Self::PilotUpdate => "pilotupdate",
            Self::Query => "query",
            Self::Update => "update",
        }
    }
}

/// The jobs of a round, as an executor sees them.
///
/// In a round that [is a sum](Round::is_sum) every range that is packed or unpacked is a
/// [node](nodes) of the tree, and a packed range has been run or taken in whole.
pub trait Jobs {
    /// Runs those jobs of a range here that have neither run nor been taken.
    ///
    /// # Errors
    /// Where one of them fails, or panics on a worker that is not alone.
    fn run(&mut self, jobs: Range<usize>) -> Result<(), JobFailure>;

    /// Whether all jobs of a range have run or been taken.
    fn has(&self, jobs: Range<usize>) -> bool;

    /// What jobs that are done gave, for other workers.
    ///
    /// # Errors
    /// Where one of them is not done.
    fn pack(&mut self, jobs: Range<usize>) -> Result<Vec<u8>, JobFailure>;

    /// Takes what jobs gave elsewhere. Jobs that are done already keep what they have.
    ///
    /// # Errors
    /// Where the bytes are not what [`pack`](Self::pack) makes of these jobs; nothing is taken then.
    fn unpack(&mut self, jobs: Range<usize>, bytes: &[u8]) -> Result<(), JobFailure>;

    /// The most bytes that a packed range can have.
    fn max_bytes(&self, jobs: Range<usize>) -> usize;
}

/// Why a job failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobFailure {
    /// The reason.
    pub why: String,
    /// Whether a later step may succeed.
    pub may_pass: bool,
}

/// What all workers of a run must have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RunIdentity {
    /// Version of this crate.
    pub version: String,
    /// Names and values of the settings, in order: space, noise, σ, seed, `max_rows`, leaves, …
    pub settings: Vec<(String, String)>,
    /// Hash of the weights that the worker starts with.
    pub weights: u64,
    /// Number of its first step.
    pub step: u64,
}

impl RunIdentity {
    /// The identity of a run.
    pub fn new(settings: Vec<(String, String)>, (step, weights): (u64, u64)) -> Self {
        Self { version: env!("CARGO_PKG_VERSION").into(), settings, weights, step }
    }
}

/// Why a round cannot be completed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ExecutorError {
    /// A job failed, here or on another worker.
    #[error("a job failed on worker {worker}: {why}")]
    Job {
        /// The worker.
        worker: String,
        /// The reason.
        why: String,
        /// Whether a later step may succeed.
        may_pass: bool,
    },
    /// A worker that was started otherwise than the others.
    #[error("{what} of this worker is {here}, and that of the run is {there}; start all workers alike")]
    Mismatch {
        /// What differs.
        what: String,
        /// Its value here.
        here: String,
        /// Its value in the run.
        there: String,
    },
    /// A worker whose weights are not those of the others.
    #[error(
        "the weights of worker {worker} before step {step} differ from those of the run; start it again, so that it \
         joins from the last checkpoint, and look for a backend, a processor or a build unlike the others'"
    )]
    Diverged {
        /// The worker.
        worker: String,
        /// The step.
        step: u64,
    },
    /// Other workers, or what connects them, cannot be reached.
    #[error("{what}; the run can be resumed from its last checkpoint")]
    Lost {
        /// What is lost, and for how long it was waited for.
        what: String,
    },
    /// Something that the executor cannot do.
    #[error("{what}; {remedy}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// What to do about it.
        remedy: String,
    },
}

impl ExecutorError {
    /// The failure of a job on a worker.
    pub fn job(worker: impl Into<String>, JobFailure { why, may_pass }: JobFailure) -> Self {
        Self::Job { worker: worker.into(), why, may_pass }
    }

    /// Whether a later step may succeed.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Job { may_pass: true, .. })
    }
}

/// All jobs run in this process, on as many threads as the estimator says.
#[derive(Clone, Copy, Debug, Default)]
pub struct Threads;

impl Executor for Threads {
    fn run(&self, round: &Round, jobs: &mut dyn Jobs) -> Result<(), ExecutorError> {
        jobs.run(0..round.jobs).map_err(|failure| ExecutorError::job("0", failure))
    }

    fn is_local(&self) -> bool {
        true
    }
}

/// The nodes of the binary tree over `leaves` leaves that make up a range of them, largest first in
/// each direction: the fewest.
///
/// `leaves` is a power of two. The node of leaves a..b is the sum of its two halves.
///
/// # Panics
/// Where the range goes beyond the leaves.
pub fn nodes(range: Range<usize>, leaves: usize) -> Vec<Range<usize>> {
    assert!(range.end <= leaves, "leaves {range:?} of {leaves}");
    let (mut nodes, mut from) = (vec![], range.start);
    while from < range.end {
        let aligned = if from == 0 { leaves.next_power_of_two() } else { 1 << from.trailing_zeros() };
        let mut size = aligned;
        while from + size > range.end {
            size /= 2;
        }
        nodes.push(from..from + size);
        from += size;
    }
    nodes
}

/// The leaves of worker `rank` of `workers`, where all have as many: a contiguous range.
pub fn share(leaves: usize, rank: usize, workers: usize) -> Range<usize> {
    leaves * rank / workers..leaves * (rank + 1) / workers
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every range is made of nodes that follow one another, each aligned to its size.
    #[test]
    fn nodes_cover_a_range() {
        for leaves in [1, 2, 4, 8, 16] {
            for start in 0..=leaves {
                for end in start..=leaves {
                    let mut next = start;
                    for node in nodes(start..end, leaves) {
                        let size = node.end - node.start;
                        assert!(node.start == next && size.is_power_of_two() && node.start % size == 0);
                        next = node.end;
                    }
                    assert_eq!(next, end);
                }
            }
            assert_eq!(nodes(0..leaves, leaves).len(), 1);
        }
        assert_eq!(nodes(3..8, 8), [3..4, 4..8]);
        assert_eq!(nodes(1..6, 8), [1..2, 2..4, 4..6]);
    }

    #[test]
    fn shares_cover_the_leaves() {
        for workers in 1..10 {
            let all: Vec<usize> = (0..workers).flat_map(|rank| share(8, rank, workers)).collect();
            assert_eq!(all, (0..8).collect::<Vec<_>>());
        }
    }
}
