//! How a worker goes through a round.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::time::{Duration, Instant};

use flops_executor::ExecutorError;
use flops_executor::{JobFailure, Jobs, Round, nodes, share};

use super::payload;
use super::state::{MAX_GENERATION, Owner, State};
use super::worker::Elastic;
use crate::cost::SumCost;
use crate::{Entry, Key, RoundKey, SumMode};

/// The least time before leaves that are meant for another worker are claimed.
const GRACE: Duration = Duration::from_millis(10);
/// How many times longer than the longest job here a job may take elsewhere.
const SLACK: u32 = 10;

/// What a round gives, the same on all workers.
type Outcome = Result<(), ExecutorError>;

/// A worker in a round.
///
/// The outcome depends on the entries of the round and their order alone: it is well as soon as
/// results of all jobs are in the log, this worker's own among them, unless a failure of a job without
/// a result comes first.
pub(super) struct Turn<'a> {
    elastic: &'a Elastic,
    state: &'a mut State,
    round: &'a Round,
    key: RoundKey,
    jobs: &'a mut dyn Jobs,
    entered: Instant,
    /// When this worker last ran something, and for how long it ran in all.
    idle: Instant,
    ran_for: Duration,
    /// Jobs with a result in the log.
    covered: Vec<bool>,
    /// Jobs that ran here.
    ran: Vec<bool>,
    /// Jobs whose results or failure this worker has sent.
    sent: Vec<Option<Instant>>,
    /// Leaves that this worker has asked for, as their first owner.
    asked: HashSet<usize>,
    /// When entries of this worker were last on their way to the log.
    writing: Instant,
    /// Checksums of the results of this worker that have not come through the log.
    mine: HashMap<Key, [u8; 8]>,
    /// Ranges and generations of results that were refused.
    refused: HashSet<(usize, usize, u32)>,
    /// When a worker's last result came.
    heard: HashMap<String, Instant>,
    /// The last result that was sent, if nothing ran since.
    exchange: Option<Exchange>,
}

/// A result on its way.
struct Exchange {
    sent: Instant,
    /// How long each of its jobs took.
    leaf: Duration,
    key: Option<Key>,
}

/// What to do about leaves that nobody runs.
enum Next {
    Claim(usize, Option<Owner>),
    /// Nothing before a time.
    Wait(Duration),
}

impl<'a> Turn<'a> {
    pub(super) fn new(elastic: &'a Elastic, state: &'a mut State, round: &'a Round, jobs: &'a mut dyn Jobs) -> Self {
        let now = Instant::now();
        Self {
            elastic,
            state,
            round,
            key: RoundKey::from(round),
            jobs,
            entered: now,
            idle: now,
            ran_for: Duration::ZERO,
            covered: vec![false; round.jobs],
            ran: vec![false; round.jobs],
            sent: vec![None; round.jobs],
            asked: HashSet::new(),
            writing: now,
            mine: HashMap::new(),
            refused: HashSet::new(),
            heard: HashMap::new(),
            exchange: None,
        }
    }

    /// Goes through the round; an error that is no outcome is of this worker alone.
    pub(super) fn run(mut self) -> Result<Outcome, ExecutorError> {
        let alone = self.round.is_sum() && self.sum_mode()? == SumMode::Scalars;
        let outcome = if alone { self.alone()? } else { self.shared()? };
        if let Err(why) = &outcome {
            ::log::info!("round {} failed: {why}", self.key);
        }
        let mut counts = self.elastic.counts();
        counts.sums_alone += u64::from(alone);
        counts.sums_shared += u64::from(self.round.is_sum() && !alone);
        counts.rounds_taken += u64::from(!self.ran.contains(&true));
        Ok(outcome)
    }

    /// How this sum is run: as the first worker says that reaches it.
    fn sum_mode(&mut self) -> Result<SumMode, ExecutorError> {
        let mode = self.elastic.options.sum_mode;
        if mode != SumMode::Auto {
            return Ok(mode);
        }
        if !self.round.repeats {
            return Ok(SumMode::Gradients);
        }
        let (_, workers) = self.state.place(self.elastic.worker());
        // the first sum is shared, and so measured
        let mine = self.state.cost.map_or(SumMode::Gradients, |cost| cost.mode(self.round.jobs, workers, workers));
        let said = self.elastic.agree(self.state, &Key::Mode(self.key), mine.name().as_bytes())?;
        Ok(if said == SumMode::Scalars.name().as_bytes() { SumMode::Scalars } else { SumMode::Gradients })
    }

    /// Runs all jobs here. Workers agree only on whether they failed.
    fn alone(&mut self) -> Result<Outcome, ExecutorError> {
        let mut verdict = None;
        self.elastic.pump(self.state, Duration::ZERO)?;
        self.verdict(&mut verdict);
        if let Some(Err(why)) = verdict {
            return Ok(Err(why));
        }
        let here = self.run_here(0..self.round.jobs);
        if verdict.is_none() {
            let worker = self.elastic.worker();
            match &here {
                Ok(()) => self.elastic.log.put(&Key::Done(self.key), worker.as_bytes())?,
                Err(why) => {
                    self.elastic.log.put(&Key::Failure { round: self.key, job: 0 }, &payload::failure(worker, why))?
                }
            };
        }
        while verdict.is_none() {
            let (elastic, key) = (self.elastic, self.key);
            let arrived = |state: &mut State| state.has_arrived(key).then_some(());
            elastic.wait_for(self.state, "the outcome of a round", arrived)?;
            self.verdict(&mut verdict);
        }
        Ok(match (verdict, here) {
            // others went on, and this worker cannot
            (Some(Ok(())), Err(why)) => {
                return Err(self.elastic.cannot_follow(why));
            }
            (verdict, _) => verdict.unwrap_or(Ok(())),
        })
    }

    /// Reads what was first: a worker that has run the round, or one that failed.
    fn verdict(&mut self, verdict: &mut Option<Outcome>) {
        for Entry { key, bytes } in self.state.arrived(self.key) {
            let said = match key {
                Key::Done(_) => Some(Ok(())),
                Key::Failure { .. } => Some(Err(self.failure(&bytes))),
                _ => None,
            };
            if verdict.is_none() {
                *verdict = said;
            }
        }
    }

    /// Shares the jobs with the other workers.
    fn shared(&mut self) -> Result<Outcome, ExecutorError> {
        loop {
            self.elastic.pump(self.state, Duration::ZERO)?;
            if let Some(outcome) = self.read()? {
                return Ok(outcome);
            }
            if let Some(range) = self.to_run() {
                self.claim_ahead()?;
                self.run_and_send(range)?;
                continue;
            }
            if self.elastic.log.is_writing() {
                self.writing = Instant::now();
            }
            match self.next_claim()? {
                Next::Claim(leaf, owner) => self.claim(leaf, owner)?,
                Next::Wait(time) => self.elastic.pump(self.state, time)?,
            }
        }
    }

    /// Takes the entries that arrived, in order, until they give the outcome.
    fn read(&mut self) -> Result<Option<Outcome>, ExecutorError> {
        for Entry { key, bytes } in self.state.arrived(self.key) {
            match key {
                Key::Result { start, end, generation, .. } => {
                    let taken = self.take(start..end, &key, &bytes)?;
                    if !taken {
                        self.elastic.counts().refused += 1;
                        self.refused.insert((start, end, generation));
                        // sent by this worker, perhaps, and not the first: again, in the next generation
                        let all = self.round.jobs;
                        self.sent[start.min(all)..end.clamp(start.min(all), all)].fill(None);
                    }
                }
                Key::Failure { job, .. } if self.covered.get(job) == Some(&false) => {
                    return Ok(Some(Err(self.failure(&bytes))));
                }
                _ => {}
            }
            if !self.covered.contains(&false) {
                break;
            }
        }
        if self.covered.contains(&false) {
            return Ok(None);
        }
        // where `Jobs` keeps its contract, all are done
        if !self.jobs.has(0..self.round.jobs) {
            self.run_here(0..self.round.jobs).map_err(|why| self.elastic.cannot_follow(why))?;
        }
        Ok(Some(Ok(())))
    }

    fn failure(&self, bytes: &[u8]) -> ExecutorError {
        let unknown = || {
            self.elastic.counts().refused += 1;
            ("unknown".into(), JobFailure { why: "a failure that cannot be read".into(), may_pass: true })
        };
        let (worker, failure) = payload::read_failure(bytes).unwrap_or_else(unknown);
        ExecutorError::job(worker, failure)
    }

    /// Takes a result; false where it is none.
    fn take(&mut self, range: Range<usize>, key: &Key, bytes: &[u8]) -> Result<bool, ExecutorError> {
        let len = range.len();
        let is_node = len.is_power_of_two() && range.start.is_multiple_of(len);
        if range.is_empty() || range.end > self.round.jobs || self.round.is_sum() && !is_node {
            return Ok(false);
        }
        if self.mine.remove(key).is_some_and(|mine| payload::seal(bytes) == Some(&mine)) {
            if let Some(Exchange { sent, leaf, .. }) = self.exchange.take_if(|of| of.key.as_ref() == Some(key))
                && self.round.is_sum()
            {
                self.state.cost = Some(SumCost { leaf, exchange: sent.elapsed() });
            }
            self.covered[range].fill(true);
            return Ok(true);
        }
        let Some((worker, packed)) = payload::read_result(bytes) else { return Ok(false) };
        if packed.len() > self.jobs.max_bytes(range.clone()) {
            return Ok(false);
        }
        let ran_here = self.ran[range.clone()].iter().all(|ran| *ran);
        let here = if ran_here { self.jobs.pack(range.clone()).ok() } else { None };
        if self.jobs.unpack(range.clone(), packed).is_err() {
            return Ok(false);
        }
        if here.is_some_and(|here| here != packed) {
            ::log::error!("jobs {range:?} of round {} gave other bits on worker {worker}", self.key);
            let worker = self.elastic.worker().into();
            return Err(ExecutorError::Diverged { worker, step: self.round.step });
        }
        let taken = range.clone().filter(|job| !self.covered[*job] && !self.ran[*job]).count();
        self.elastic.counts().jobs_taken += taken as u64;
        self.covered[range].fill(true);
        self.heard.insert(worker, Instant::now());
        Ok(true)
    }

    /// Whether somebody must still run a job, for all that this worker knows.
    fn is_open(&self, job: usize) -> bool {
        !self.covered[job] && self.sent[job].is_none()
    }

    /// Jobs that follow one another and are for this worker to run.
    fn to_run(&self) -> Option<Range<usize>> {
        let owners = self.state.owners(self.round);
        let me = Some(self.elastic.worker());
        let mine =
            |job: &usize| self.is_open(*job) && owners.of(*job).is_some_and(|owner| owner.worker.as_deref() == me);
        let start = (0..self.round.jobs).find(mine)?;
        Some(start..(start..self.round.jobs).find(|job| !mine(job)).unwrap_or(self.round.jobs))
    }

    fn run_here(&mut self, range: Range<usize>) -> Result<(), JobFailure> {
        let fresh = range.clone().filter(|job| !self.jobs.has(*job..*job + 1)).count();
        let start = Instant::now();
        let done = self.jobs.run(range.clone());
        let took = start.elapsed();
        self.idle = Instant::now();
        self.ran_for += took;
        self.ran[range.clone()].fill(true);
        let mut counts = self.elastic.counts();
        counts.seconds_run += took.as_secs_f64();
        if fresh > 0 {
            let each = took / fresh as u32;
            self.state.took(self.round.phase, took, each);
            counts.jobs_run += fresh as u64;
            if done.is_ok() && self.round.is_sum() {
                // kept where nothing is exchanged
                self.state.cost = self.state.cost.map(|cost| SumCost { leaf: each, ..cost });
                self.exchange = Some(Exchange { sent: self.idle, leaf: each, key: None });
            }
        }
        done
    }

    /// Runs jobs and tells what they gave.
    fn run_and_send(&mut self, range: Range<usize>) -> Result<(), ExecutorError> {
        let sent = match self.run_here(range.clone()) {
            Ok(()) => {
                let whole = std::slice::from_ref(&range);
                let parts = if self.round.is_sum() { nodes(range.clone(), self.round.jobs) } else { whole.to_vec() };
                parts.into_iter().try_for_each(|part| self.send(part))
            }
            Err(why) => Err(Unsent::Failed(why)),
        };
        let told = match sent {
            Ok(()) => range,
            Err(Unsent::Lost(why)) => return Err(why),
            Err(Unsent::Failed(why)) => {
                let job = range.clone().find(|job| !self.jobs.has(*job..*job + 1)).unwrap_or(range.start);
                let bytes = payload::failure(self.elastic.worker(), &why);
                self.elastic.log.put(&Key::Failure { round: self.key, job }, &bytes)?;
                job..job + 1
            }
        };
        self.sent[told].fill(Some(Instant::now()));
        Ok(())
    }

    /// Writes the result of jobs that ran here.
    fn send(&mut self, part: Range<usize>) -> Result<(), Unsent> {
        let packed = self.jobs.pack(part.clone()).map_err(Unsent::Failed)?;
        let (start, end) = (part.start, part.end);
        let generation = (0..).find(|generation| !self.refused.contains(&(start, end, *generation))).unwrap_or(0);
        let key = Key::Result { round: self.key, start, end, generation };
        if let Some(exchange) = &mut self.exchange {
            (exchange.sent, exchange.key) = (Instant::now(), Some(key.clone()));
        }
        let bytes = payload::result(self.elastic.worker(), &packed);
        self.mine.extend(payload::seal(&bytes).map(|seal| (key.clone(), *seal)));
        self.elastic.log.send(&key, bytes).map_err(Unsent::Lost)
    }

    /// The next leaf to claim: of this worker's share at once, of others' where they do not come, and
    /// of owners that are gone or late.
    fn next_claim(&self) -> Result<Next, ExecutorError> {
        let (now, all) = (Instant::now(), self.round.jobs);
        let options = &self.elastic.options;
        let owners = self.state.owners(self.round);
        let (rank, workers) = self.state.place(self.elastic.worker());
        let own = share(all, rank, workers);
        let job_limit = self.state.longest(self.round.phase) * SLACK;
        // leaves are kept for the step: a worker that comes a little late should still get its share
        let wait = if all == 1 { Duration::ZERO } else { self.state.busy_before() / 8 };
        let grace = GRACE.max(self.ran_for).max(wait);
        let mut first = now + Duration::from_secs(1);
        for leaf in (own.start..all).chain(0..own.start) {
            // the limit is of what comes back, and not of what is long to write
            let waits = |sent: Instant| !self.covered[leaf] && now > sent.max(self.writing) + options.limit;
            if self.sent[leaf].is_some_and(waits) {
                let what = format!("a result has not come through the log within {:?}", options.limit);
                return Err(ExecutorError::Lost { what });
            }
            if !self.is_open(leaf) {
                continue;
            }
            let owner = owners.of(leaf);
            let due = match owner {
                None if own.contains(&leaf) => now,
                None => self.idle + grace,
                Some(owner) if self.state.is_gone(owner) => now,
                Some(owner) => {
                    let worker = owner.worker.as_deref().unwrap_or_default();
                    let heard = self.heard.get(worker).copied();
                    let since = owner.since.max(self.entered).max(heard.unwrap_or(self.entered));
                    let open = owners.count(worker, |leaf| !self.covered[leaf]);
                    since + options.patience.max(job_limit * open as u32)
                }
            };
            if due <= now {
                return Ok(Next::Claim(leaf, owner.cloned()));
            }
            first = first.min(due);
        }
        Ok(Next::Wait(first - now))
    }

    /// Asks for one more leaf of this worker's share, which the log gives while it runs others.
    fn claim_ahead(&mut self) -> Result<(), ExecutorError> {
        let owners = self.state.owners(self.round);
        let (rank, workers) = self.state.place(self.elastic.worker());
        let is_free = |leaf: &usize| self.is_open(*leaf) && owners.of(*leaf).is_none();
        match (owners.round(), share(self.round.jobs, rank, workers).find(is_free)) {
            (Some(round), Some(leaf)) => self.ask(round, leaf),
            _ => Ok(()),
        }
    }

    /// Asks for a leaf that nobody owns, once.
    fn ask(&mut self, round: RoundKey, leaf: usize) -> Result<(), ExecutorError> {
        if !self.asked.insert(leaf) {
            return Ok(());
        }
        self.elastic.log.send(&Key::Claim { round, leaf, generation: 0 }, self.elastic.worker().into())
    }

    /// Claims a leaf and waits for the log to say who owns it.
    fn claim(&mut self, leaf: usize, owner: Option<Owner>) -> Result<(), ExecutorError> {
        let worker = self.elastic.worker();
        let generation = owner.as_ref().map_or(0, |owner| owner.generation.saturating_add(1));
        let owners = self.state.owners_mut(self.round);
        let Some(round) = owners.round().filter(|_| generation <= MAX_GENERATION) else {
            // a second result changes nothing
            return self.run_and_send(leaf..leaf + 1);
        };
        match owner {
            None => self.ask(round, leaf)?,
            Some(Owner { worker: of, .. }) => {
                if self.elastic.log.put(&Key::Claim { round, leaf, generation }, worker.as_bytes())? {
                    self.elastic.counts().takeovers += 1;
                    let of = of.as_deref().unwrap_or("unknown");
                    ::log::info!("job {leaf} of round {} is taken over from worker {of}", self.key);
                }
            }
        }
        let shape = *self.round;
        self.elastic.wait_for(self.state, "a claim", |state| {
            let owner = state.owners(&shape).of(leaf);
            owner.is_some_and(|owner| owner.generation >= generation).then_some(())
        })
    }
}

/// Why a result was not sent.
enum Unsent {
    Failed(JobFailure),
    Lost(ExecutorError),
}
