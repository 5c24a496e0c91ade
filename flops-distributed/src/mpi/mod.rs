//! Gangs: a fixed number of processes that `mpirun` starts and that end together.
//!
//! A rank runs its [share](share) of the leaves, and all ranks get what the others' gave. Two ranks
//! swap the halves of a sum; more of them swap nodes of the tree in log2(ranks) exchanges, where
//! their number is a power of two that divides the leaves, and gather all nodes otherwise. The bits
//! are the same for every number of ranks.
//!
//! Every exchange begins with a status of each rank. A job that fails or panics anywhere is
//! therefore the same error everywhere, and ranks in different rounds are an error. A rank that never
//! comes is [`Lost`](ExecutorError::Lost) after [a limit](MpiOptions::limit). A process that dies takes
//! the gang with it, as `mpirun` sees to: start it again from the last checkpoint.

mod link;
mod sums;
mod what;

use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use flops_executor::{Executor, ExecutorError, JobFailure, Jobs, Round, RunIdentity, nodes, share};

use self::link::{Answer, Exchange, Link, NoAnswer, Outcome, Status, starts};
use self::sums::Sums;
use self::what::{What, odd_one};
use crate::{DistributedError, SumMode, WorkerStats, identity, wire};

/// The most bytes of a failure's text that other ranks are told.
const MAX_TEXT: usize = 4096;

/// How a gang works together.
#[derive(Clone, Debug)]
pub struct MpiOptions {
    /// How long a rank waits for the others in an exchange. It must cover what one rank may do
    /// alone: a long round, or an evaluation. 30 minutes by default.
    pub limit: Duration,
    /// The most bytes of a message. Longer data are cut. 1 GiB by default; MPI allows no more than 2.
    pub max_message: usize,
    /// Whether sums are exchanged, or added by every rank. [`SumMode::Auto`] by default. Rank 0
    /// decides, so only its value matters.
    pub sums: SumMode,
}

impl Default for MpiOptions {
    fn default() -> Self {
        Self { limit: Duration::from_secs(30 * 60), max_message: 1 << 30, sums: SumMode::Auto }
    }
}

/// A rank of a gang that `mpirun` started.
///
/// ```no_run
/// # fn main() -> Result<(), flops_distributed::DistributedError> {
/// use flops_distributed::{Mpi, MpiOptions};
///
/// // mpirun -n 4 program
/// let gang = Mpi::start(MpiOptions::default())?;
/// println!("rank {} of {}", gang.rank(), gang.size());
/// # Ok(())
/// # }
/// ```
///
/// Drop it at the end, also after an error: that tells the other ranks, which otherwise wait.
#[derive(Debug)]
pub struct Mpi {
    rank: usize,
    size: usize,
    limit: Duration,
    gang: Mutex<Gang>,
    stats: Mutex<WorkerStats>,
}

/// What a rank knows of its gang.
#[derive(Debug)]
struct Gang {
    link: Link,
    state: State,
    /// A buffer to receive into.
    spare: Vec<u8>,
    sums: Sums,
    /// Seconds that packing and the way of the data took in this round, without waiting for a rank.
    travelled: f64,
}

/// Whether ranks can still be told something.
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Open,
    /// This rank cannot go on, and the others do not know.
    Failed(String),
    /// All ranks know that the run is over.
    Closed(String),
    /// A rank did not come, and the thread waits for it for ever.
    Stuck(String),
}

impl Mpi {
    /// Joins the gang. All ranks do so before any of them goes on.
    ///
    /// A program that `mpirun` did not start is a gang of one.
    ///
    /// # Errors
    /// Where the process has started MPI before: that is possible once.
    pub fn start(options: MpiOptions) -> Result<Self, DistributedError> {
        let MpiOptions { limit, max_message, sums } = options;
        let failed =
            |why: String, remedy: &str| DistributedError::Server { server: "MPI".into(), why, remedy: remedy.into() };
        let link = Link::start(limit, max_message).map_err(|why| match why {
            NoAnswer::Late => {
                let why = format!("it has not started within a minute, or {limit:?}");
                failed(why, "see that mpirun reaches all its hosts, and that all ranks start the same program")
            }
            NoAnswer::Ended => {
                let why = "it does not start in this process, or has started before";
                failed(why.into(), "start one gang in a process, and keep it to the end")
            }
        })?;
        let (rank, size) = (link.rank, link.size);
        let stats = WorkerStats { worker: rank.to_string(), joins: size as u64, ..WorkerStats::default() };
        let gang = Gang { link, state: State::Open, spare: vec![], sums: Sums::new(sums), travelled: 0.0 };
        Ok(Self { rank, size, limit, gang: Mutex::new(gang), stats: Mutex::new(stats) })
    }

    /// The number of this rank, from 0. Rank 0 writes what a run leaves behind.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of ranks.
    pub fn size(&self) -> usize {
        self.size
    }

    /// What this rank has done so far.
    pub fn stats(&self) -> WorkerStats {
        lock(&self.stats).clone()
    }

    /// Gives every rank the bytes of rank 0, such as a checkpoint that only rank 0 can read.
    ///
    /// All ranks call it at the same point of the program. What other ranks pass is not used.
    ///
    /// # Errors
    /// Where ranks are lost or do something else.
    pub fn broadcast(&self, bytes: Vec<u8>) -> Result<Vec<u8>, ExecutorError> {
        let data = if self.rank == 0 { bytes } else { vec![] };
        let status = Status { what: What::Broadcast.words(), ..Status::default() };
        let mut gang = lock(&self.gang);
        self.meet(&mut gang, status, Exchange::Gather, data).map(|(_, received)| received)
    }

    /// Meets the other ranks. What arrives is the data, once all ranks agree and none has failed.
    fn meet(
        &self,
        gang: &mut Gang,
        status: Status,
        how: Exchange,
        data: Vec<u8>,
    ) -> Result<(Vec<Status>, Vec<u8>), ExecutorError> {
        match &gang.state {
            State::Open => {}
            State::Failed(why) | State::Closed(why) | State::Stuck(why) => return Err(lost(why)),
        }
        let sent = data.len();
        let spare = std::mem::take(&mut gang.spare);
        let start = Instant::now();
        let answer = gang.link.meet(status, how, data, spare);
        let Answer { statuses, received, spare, .. } = self.answered(gang, answer, start, sent)?;
        let Some(received) = received else {
            gang.spare = spare;
            return Err(self.disagreement(gang, status, &statuses));
        };
        match statuses.iter().position(|all| all.outcome != Outcome::Done) {
            None => {
                gang.sums.announced(&statuses);
                Ok((statuses, received))
            }
            Some(rank) => {
                let text = received.get(..statuses[rank].bytes).unwrap_or_default();
                let why = String::from_utf8_lossy(text).into_owned();
                let may_pass = statuses[rank].outcome == Outcome::MayPass;
                gang.spare = received;
                Err(ExecutorError::job(rank.to_string(), JobFailure { why, may_pass }))
            }
        }
    }

    /// Counts an exchange, or marks the gang where there is none.
    fn answered(
        &self,
        gang: &mut Gang,
        answer: Result<Answer, NoAnswer>,
        start: Instant,
        sent: usize,
    ) -> Result<Answer, ExecutorError> {
        let mut stats = lock(&self.stats);
        stats.seconds_waited += start.elapsed().as_secs_f64();
        match answer {
            Ok(answer) => {
                gang.travelled += answer.seconds;
                stats.bytes_sent += sent as u64;
                stats.bytes_received += answer.received.as_ref().map_or(0, Vec::len) as u64;
                Ok(answer)
            }
            Err(why) => {
                let what = match why {
                    NoAnswer::Late => format!("not all ranks of the gang came within {:?}", self.limit),
                    NoAnswer::Ended => "MPI ended on this rank".into(),
                };
                gang.state = State::Stuck(what.clone());
                Err(lost(&what))
            }
        }
    }

    /// The error of ranks that do not do the same.
    fn disagreement(&self, gang: &mut Gang, mine: Status, all: &[Status]) -> ExecutorError {
        let here = What::of(&mine.what).to_string();
        let left = all.iter().position(|status| What::of(&status.what) == What::Leave);
        if let Some(rank) = left {
            let why = format!("rank {rank} left the gang while rank {} was at {here}", self.rank);
            gang.state = State::Closed(why.clone());
            lock(&self.stats).losses += 1;
            return lost(&why);
        }
        // rank 0 sets the measure, and is itself compared with the first that differs
        let other = all.iter().find(|status| status.what != all[0].what).filter(|_| mine.what == all[0].what);
        let there = What::of(&other.unwrap_or(&all[0]).what).to_string();
        gang.state = State::Closed(format!("the ranks of the gang were in different rounds: {here}, and {there}"));
        ExecutorError::Mismatch { what: "the round".into(), here, there }
    }

    /// Marks this rank: the others are told when they next ask.
    fn failed(&self, gang: &mut Gang, rank: usize, why: &str) -> ExecutorError {
        let what = format!("rank {} cannot take what rank {rank} sent: {why}", self.rank);
        lock(&self.stats).refused += 1;
        gang.state = State::Failed(what.clone());
        lost(&what)
    }

    /// Takes the jobs of a range that another rank sent.
    fn take(
        &self,
        gang: &mut Gang,
        jobs: &mut dyn Jobs,
        (range, rank): (Range<usize>, usize),
        bytes: &[u8],
    ) -> Result<(), ExecutorError> {
        if range.is_empty() {
            return Ok(());
        }
        let most = jobs.max_bytes(range.clone());
        if bytes.len() > most {
            let why = format!("jobs {range:?} have {} bytes, and at most {most} are possible", bytes.len());
            return Err(self.failed(gang, rank, &why));
        }
        guarded(|| jobs.unpack(range.clone(), bytes))
            .map_err(|JobFailure { why, .. }| self.failed(gang, rank, &why))?;
        lock(&self.stats).jobs_taken += range.len() as u64;
        Ok(())
    }

    /// Whether nodes of the tree can be swapped in pairs.
    fn doubles(&self, leaves: usize) -> bool {
        self.size.is_power_of_two() && leaves.is_power_of_two() && leaves >= self.size
    }

    /// The node that this rank has, and that of its partner, once `with` ranks know one another's sums.
    fn pair(&self, leaves: usize, with: usize) -> (Range<usize>, Range<usize>, usize) {
        let node = |rank: usize| {
            let first = rank / with * with;
            leaves / self.size * first..leaves / self.size * (first + with)
        };
        let partner = self.rank ^ with;
        (node(self.rank), node(partner), partner)
    }

    /// The round proper.
    fn round(&self, gang: &mut Gang, round: &Round, jobs: &mut dyn Jobs) -> Result<(), ExecutorError> {
        let leaves = round.jobs;
        let sum = round.is_sum() && leaves > 1;
        let whole = self.size == 1 || sum && !gang.sums.are_shared(round.phase);
        let doubles = sum && self.doubles(leaves);
        let mine = if whole { 0..leaves } else { share(leaves, self.rank, self.size) };
        let here = mine.len() as u64;
        let start = Instant::now();
        let ran = guarded(|| jobs.run(mine.clone()));
        let seconds = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let packed = ran.and_then(|()| {
            guarded(|| match (whole, sum && !doubles) {
                (true, _) => Ok(vec![]),
                (_, true) => pack_nodes(jobs, nodes(mine.clone(), leaves)),
                _ if mine.is_empty() => Ok(vec![]),
                _ => jobs.pack(mine.clone()),
            })
        });
        gang.travelled = start.elapsed().as_secs_f64();
        {
            let mut stats = lock(&self.stats);
            stats.rounds += 1;
            stats.jobs_run += here;
            stats.seconds_run += seconds;
            stats.sums_alone += u64::from(sum && whole);
            stats.sums_shared += u64::from(sum && !whole);
        }
        let (outcome, data) = match packed {
            Ok(data) => (Outcome::Done, data),
            Err(failure) => {
                let outcome = if failure.may_pass { Outcome::MayPass } else { Outcome::Failed };
                (outcome, clipped(failure.why).into_bytes())
            }
        };
        let how = match (whole, doubles) {
            (true, _) => Exchange::Nothing,
            (_, true) => Exchange::Pair(self.rank ^ 1),
            _ => Exchange::Gather,
        };
        let what = What::Round(*round).words();
        let status = Status { what, outcome, value: gang.sums.announcement(), ..Status::default() };
        let (statuses, received) = self.meet(gang, status, how, data)?;
        let start = Instant::now();
        let taken = match how {
            Exchange::Nothing => Ok(()),
            Exchange::Pair(_) => self.double(gang, jobs, leaves, &received),
            Exchange::Gather => self.take_all(gang, jobs, (leaves, sum), &statuses, &received),
        };
        gang.spare = received;
        taken?;
        if sum && !whole && round.repeats {
            // larger nodes are swapped after the first
            let exchange = gang.travelled + start.elapsed().as_secs_f64();
            gang.sums.measured(round.phase, (seconds, exchange), (here as usize, leaves));
        }
        Ok(())
    }

    /// Takes the node of the first partner, and swaps ever larger ones with the next.
    fn double(
        &self,
        gang: &mut Gang,
        jobs: &mut dyn Jobs,
        leaves: usize,
        received: &[u8],
    ) -> Result<(), ExecutorError> {
        let (_, theirs, partner) = self.pair(leaves, 1);
        let mut taken = self.take(gang, jobs, (theirs, partner), received);
        let mut with = 2;
        while with < self.size {
            let (node, theirs, partner) = self.pair(leaves, with);
            // a rank that cannot go on says so to those that wait for it
            let packed = taken.and_then(|()| {
                let packed = guarded(|| jobs.pack(node));
                packed.map_err(|JobFailure { why, .. }| self.failed(gang, self.rank, &why))
            });
            let (data, so_far) = match packed {
                Ok(data) => (Some(data), Ok(())),
                Err(why) => (None, Err(why)),
            };
            let (sent, start) = (data.as_ref().map_or(0, Vec::len), Instant::now());
            let spare = std::mem::take(&mut gang.spare);
            let answer = gang.link.swap(partner, data, spare);
            let Answer { received, spare, .. } = self.answered(gang, answer, start, sent)?;
            taken = match (so_far, received) {
                (Ok(()), Some(received)) => {
                    let taken = self.take(gang, jobs, (theirs, partner), &received);
                    gang.spare = received;
                    taken
                }
                (Ok(()), None) => Err(self.failed(gang, partner, "it has failed")),
                (Err(why), _) => Err(why),
            };
            if gang.spare.is_empty() {
                gang.spare = spare;
            }
            with *= 2;
        }
        taken
    }

    /// Takes the jobs of all other ranks.
    fn take_all(
        &self,
        gang: &mut Gang,
        jobs: &mut dyn Jobs,
        (leaves, sum): (usize, bool),
        statuses: &[Status],
        received: &[u8],
    ) -> Result<(), ExecutorError> {
        let counts: Vec<usize> = statuses.iter().map(|status| status.bytes).collect();
        for (rank, (count, start)) in counts.iter().zip(starts(&counts)).enumerate() {
            if rank == self.rank {
                continue;
            }
            let mut bytes = received.get(start..start + count).unwrap_or_default();
            let range = share(leaves, rank, self.size);
            if !sum {
                self.take(gang, jobs, (range, rank), bytes)?;
                continue;
            }
            for node in nodes(range, leaves) {
                let Some(part) = wire::take(&mut bytes) else {
                    return Err(self.failed(gang, rank, "its nodes are cut short"));
                };
                self.take(gang, jobs, (node, rank), part)?;
            }
        }
        Ok(())
    }
}

impl Executor for Mpi {
    fn run(&self, round: &Round, jobs: &mut dyn Jobs) -> Result<(), ExecutorError> {
        let mut gang = lock(&self.gang);
        self.round(&mut gang, round, jobs)
    }

    fn is_local(&self) -> bool {
        self.size == 1
    }

    fn begin(&self, run: &RunIdentity) -> Result<(), ExecutorError> {
        let mut gang = lock(&self.gang);
        let status = Status { what: What::Begin.words(), value: gang.sums.announcement(), ..Status::default() };
        let (statuses, received) = self.meet(&mut gang, status, Exchange::Gather, identity::bytes(run))?;
        let counts: Vec<usize> = statuses.iter().map(|status| status.bytes).collect();
        let mut all = vec![];
        for (rank, (count, start)) in counts.iter().zip(starts(&counts)).enumerate() {
            let bytes = received.get(start..start + count).unwrap_or_default();
            match identity::read(bytes) {
                Some(identity) => all.push(identity),
                None => return Err(self.failed(&mut gang, rank, "it is no identity of a run")),
            }
        }
        match all.iter().position(|identity| *identity != all[0]) {
            None => Ok(()),
            Some(first) => {
                // all ranks know; the one that agrees with rank 0 is told of the first that does not
                gang.state = State::Closed("the ranks of the gang were not started alike".into());
                let there = if all[self.rank] == all[0] { first } else { 0 };
                let (here, other) = (&all[self.rank], &all[there]);
                let (what, here, value) = if here.step == other.step {
                    let order = || ("the order of the settings".into(), "another".into(), "its own".into());
                    identity::difference(here, other).unwrap_or_else(order)
                } else {
                    ("the first step".into(), here.step.to_string(), other.step.to_string())
                };
                Err(ExecutorError::Mismatch { what, here, there: format!("{value} on rank {there}") })
            }
        }
    }

    fn verify(&self, step: u64, weights: u64) -> Result<(), ExecutorError> {
        let mut gang = lock(&self.gang);
        let status = Status { what: What::Verify(step).words(), value: weights, ..Status::default() };
        let (statuses, received) = self.meet(&mut gang, status, Exchange::Nothing, vec![])?;
        gang.spare = received;
        let values: Vec<u64> = statuses.iter().map(|status| status.value).collect();
        match odd_one(&values) {
            None => Ok(()),
            Some(rank) => {
                gang.state = State::Closed(format!("the weights of rank {rank} differed before step {step}"));
                Err(ExecutorError::Diverged { worker: rank.to_string(), step })
            }
        }
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        let mut gang = lock(&self.gang);
        if let State::Open | State::Failed(_) = gang.state {
            gang.state = State::Open;
            let status = Status { what: What::Leave.words(), ..Status::default() };
            // others may be in the middle of a run: they are told by this
            let _ = self.meet(&mut gang, status, Exchange::Nothing, vec![]);
        }
        if !matches!(gang.state, State::Stuck(_)) && !gang.link.finish() {
            log::warn!("not all ranks of the gang ended within {:?}", self.limit);
        }
    }
}

/// Runs something of the jobs, whose panic is a failure.
fn guarded<T>(run: impl FnOnce() -> Result<T, JobFailure>) -> Result<T, JobFailure> {
    let panicked = |panic| Err(JobFailure { why: format!("it panicked: {}", text(&panic)), may_pass: false });
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(panicked)
}

fn text(panic: &Box<dyn Any + Send>) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

/// The nodes of a share, each behind its length.
fn pack_nodes(jobs: &mut dyn Jobs, nodes: Vec<Range<usize>>) -> Result<Vec<u8>, JobFailure> {
    let mut all = vec![];
    for node in nodes {
        wire::push(&mut all, &jobs.pack(node)?);
    }
    Ok(all)
}

/// The beginning of a text, as long as other ranks are told.
fn clipped(mut text: String) -> String {
    let end = (0..=MAX_TEXT.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
    text.truncate(end.unwrap_or_default());
    text
}

fn lost(what: &str) -> ExecutorError {
    ExecutorError::Lost { what: what.into() }
}

/// A lock whose holder may have panicked: what it guards is whole at any time.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_between_letters() {
        assert_eq!(clipped("short".into()), "short");
        let long = clipped("é".repeat(MAX_TEXT));
        assert_eq!(long.len(), MAX_TEXT);
    }
}
