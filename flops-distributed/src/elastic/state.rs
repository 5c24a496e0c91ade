//! What a worker knows of the run: other workers, who owns which leaf, and entries to come.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use flops_executor::ExecutorError;
use flops_executor::{Round, RoundPhase};

use crate::cost::SumCost;
use crate::{Entry, Key, RoundKey, WorkerStats, checked_name};

/// A worker counts as one that shares the leaves if it claimed some in one of so many last steps.
const RECENT_STEPS: u64 = 2;

/// The highest generation of claims. A leaf that was claimed so often is run without a claim.
pub(super) const MAX_GENERATION: u32 = 1 << 16;

/// Bytes of entries of rounds to come beyond which no more is read from the log: 256 MiB.
const MAX_INBOX: usize = 256 << 20;

/// What a worker knows, from the log alone.
#[derive(Debug, Default)]
pub(super) struct State {
    /// The step that this worker is at.
    step: u64,
    seats: Vec<Seat>,
    /// Claims of leaves whose round this worker has not reached.
    early: HashMap<RoundKey, Vec<(usize, Owner)>>,
    /// Results and failures of rounds that are not over.
    inbox: HashMap<RoundKey, Vec<Entry>>,
    /// Bytes of the inbox.
    inbox_bytes: usize,
    /// What the workers agreed on: identity, weights, modes.
    facts: HashMap<Key, Vec<u8>>,
    /// Rounds of this step that are over, with what they gave.
    past: HashMap<RoundKey, Result<(), ExecutorError>>,
    /// Owners of the leaves of this step, and of the one job of a round that has no more.
    owners: [Owners; 2],
    /// Steps whose checkpoints some worker makes.
    pub(super) checkpoints: Vec<u64>,
    /// How long jobs ran here in this step and in the one before.
    busy: Duration,
    busy_before: Duration,
    /// The longest time that a job took here.
    longest: HashMap<RoundPhase, Duration>,
    /// What sums cost here.
    pub(super) cost: Option<SumCost>,
}

/// A worker, in the order of joining.
#[derive(Debug)]
struct Seat {
    worker: String,
    /// The last step that it claimed something in, or the first after it joined.
    step: Option<u64>,
    left: bool,
}

/// The owners of leaves.
#[derive(Debug, Default)]
pub(super) struct Owners {
    /// The round in which the leaves were claimed first.
    round: Option<RoundKey>,
    /// The last round that they were kept for.
    last: Option<RoundKey>,
    leaves: Vec<Option<Owner>>,
}

/// The owner of a leaf.
#[derive(Clone, Debug)]
pub(super) struct Owner {
    /// Its name; nobody's where the claim cannot be read.
    pub(super) worker: Option<String>,
    /// How many owned the leaf before.
    pub(super) generation: u32,
    /// When the claim was read.
    pub(super) since: Instant,
}

impl State {
    /// Begins a round; returns what it gave if it is over already.
    pub(super) fn enter(&mut self, round: &Round) -> Option<Result<(), ExecutorError>> {
        let key = RoundKey::from(round);
        if round.step != self.step {
            self.step = round.step;
            self.busy_before = std::mem::take(&mut self.busy);
            self.past.clear();
            self.drop_before(round.step);
        }
        for seat in &mut self.seats {
            seat.step.get_or_insert(round.step);
        }
        if let Some(outcome) = self.past.get(&key) {
            return Some(outcome.clone());
        }
        let owners = &mut self.owners[usize::from(round.jobs == 1)];
        let follows = |last: RoundKey| (last.step, last.further) == (key.step, key.further) && last.phase < key.phase;
        let kept = owners.last.is_some_and(follows);
        if round.jobs == 1 || owners.leaves.len() != round.jobs || !kept {
            *owners = Owners { round: Some(key), last: None, leaves: vec![None; round.jobs] };
            for (leaf, claim) in self.early.remove(&key).unwrap_or_default() {
                owners.claim(leaf, claim);
            }
        }
        owners.last = Some(key);
        None
    }

    /// Begins at a step: entries of earlier ones are dropped, which a worker that joins late reads first.
    pub(super) fn start_at(&mut self, step: u64) {
        self.step = self.step.max(step);
        self.drop_before(self.step);
    }

    fn drop_before(&mut self, step: u64) {
        let dropped = self.inbox.extract_if(|of, _| of.step < step);
        self.inbox_bytes -= dropped.flat_map(|(_, entries)| entries).map(|entry| entry.bytes.len()).sum::<usize>();
        self.early.retain(|of, _| of.step >= step);
        self.facts.retain(|of, _| of.step().is_none_or(|of| of >= step));
    }

    /// Whether entries of rounds to come take so much memory that they had better stay in the log.
    pub(super) fn is_full(&self) -> bool {
        self.inbox_bytes > MAX_INBOX
    }

    /// Ends a round. Entries that still come are dropped.
    pub(super) fn leave(&mut self, round: RoundKey, outcome: Result<(), ExecutorError>) {
        self.arrived(round);
        self.past.insert(round, outcome);
    }

    pub(super) fn owners(&self, round: &Round) -> &Owners {
        &self.owners[usize::from(round.jobs == 1)]
    }

    pub(super) fn owners_mut(&mut self, round: &Round) -> &mut Owners {
        &mut self.owners[usize::from(round.jobs == 1)]
    }

    /// Sorts in an entry of the log.
    pub(super) fn absorb(&mut self, entry: Entry, stats: &mut WorkerStats) {
        let Entry { key, bytes } = entry;
        match &key {
            Key::Joined(worker) if self.has(worker) => {}
            Key::Joined(worker) => {
                stats.joins += 1;
                ::log::info!("worker {worker} joins; this one is at step {}", self.step);
                self.seats.push(Seat { worker: worker.clone(), step: None, left: false });
            }
            Key::Left(worker) => {
                let seat = self.seats.iter_mut().find(|seat| seat.worker == *worker && !seat.left);
                if let Some(seat) = seat {
                    seat.left = true;
                    stats.losses += 1;
                    let why = String::from_utf8_lossy(&bytes[..bytes.len().min(40)]);
                    ::log::info!("worker {worker} is gone ({why}); this one is at step {}", self.step);
                }
            }
            Key::Checkpoint(step) => self.checkpoints.push(*step),
            Key::Claim { round, leaf, generation } => {
                let (leaf, generation) = (*leaf, *generation);
                let worker = String::from_utf8(bytes).ok().and_then(|name| checked_name("worker", &name).ok());
                stats.refused += u64::from(worker.is_none());
                if let Some(seat) = self.seats.iter_mut().find(|seat| worker.as_ref() == Some(&seat.worker)) {
                    seat.step = seat.step.max(Some(round.step));
                }
                let claim = Owner { worker, generation, since: Instant::now() };
                if let Some(owners) = self.owners.iter_mut().find(|owners| owners.round == Some(*round)) {
                    owners.claim(leaf, claim);
                } else if self.is_to_come(*round) {
                    self.early.entry(*round).or_default().push((leaf, claim));
                }
            }
            Key::Result { round, .. } | Key::Failure { round, .. } | Key::Done(round) => {
                if self.is_to_come(*round) {
                    self.inbox_bytes += bytes.len();
                    self.inbox.entry(*round).or_default().push(Entry { key, bytes });
                }
            }
            Key::Identity | Key::Weights(_) | Key::Mode(_) => {
                if key.step().is_none_or(|step| step >= self.step) {
                    self.facts.insert(key, bytes);
                }
            }
        }
    }

    fn is_to_come(&self, round: RoundKey) -> bool {
        round.step >= self.step && !self.past.contains_key(&round)
    }

    /// Takes the entries of a round that arrived since, in order.
    pub(super) fn arrived(&mut self, round: RoundKey) -> Vec<Entry> {
        let entries = self.inbox.remove(&round).unwrap_or_default();
        self.inbox_bytes -= entries.iter().map(|entry| entry.bytes.len()).sum::<usize>();
        entries
    }

    /// Whether entries of a round arrived that were not taken.
    pub(super) fn has_arrived(&self, round: RoundKey) -> bool {
        self.inbox.contains_key(&round)
    }

    pub(super) fn fact(&self, key: &Key) -> Option<&[u8]> {
        self.facts.get(key).map(Vec::as_slice)
    }

    pub(super) fn has(&self, worker: &str) -> bool {
        self.seats.iter().any(|seat| seat.worker == worker)
    }

    /// How many workers joined so far, whether they are still there or not.
    pub(super) fn joined(&self) -> usize {
        self.seats.len()
    }

    /// The number of this worker among those that share the leaves, and how many they are.
    pub(super) fn place(&self, worker: &str) -> (usize, usize) {
        let is_recent = |step: u64| step + RECENT_STEPS >= self.step;
        let shares = |seat: &&Seat| seat.worker == worker || !seat.left && seat.step.is_none_or(is_recent);
        let seats: Vec<&Seat> = self.seats.iter().filter(shares).collect();
        (seats.iter().position(|seat| seat.worker == worker).unwrap_or(0), seats.len().max(1))
    }

    /// Whether nobody is to be waited for.
    pub(super) fn is_gone(&self, owner: &Owner) -> bool {
        let left = |worker: &String| self.seats.iter().any(|seat| seat.worker == *worker && seat.left);
        owner.worker.as_ref().is_none_or(left)
    }

    /// How long jobs ran here in the step before.
    pub(super) fn busy_before(&self) -> Duration {
        self.busy_before
    }

    /// Notes how long jobs took, in all and each.
    pub(super) fn took(&mut self, phase: RoundPhase, all: Duration, time: Duration) {
        self.busy += all;
        let longest = self.longest.entry(phase).or_default();
        *longest = time.max(*longest);
    }

    /// The longest that a job of a phase took here; of any phase, where none of this ran.
    pub(super) fn longest(&self, phase: RoundPhase) -> Duration {
        let all = || self.longest.values().max();
        self.longest.get(&phase).or_else(all).copied().unwrap_or_default()
    }
}

impl Owners {
    /// The round that claims of these leaves name.
    pub(super) fn round(&self) -> Option<RoundKey> {
        self.round
    }

    pub(super) fn of(&self, leaf: usize) -> Option<&Owner> {
        self.leaves.get(leaf)?.as_ref()
    }

    /// How many leaves a worker owns, of those that a test lets through.
    pub(super) fn count(&self, worker: &str, test: impl Fn(usize) -> bool) -> usize {
        let owned = |leaf: &usize| self.of(*leaf).is_some_and(|owner| owner.worker.as_deref() == Some(worker));
        (0..self.leaves.len()).filter(owned).filter(|leaf| test(*leaf)).count()
    }

    /// The claim of the highest generation owns the leaf.
    pub(super) fn claim(&mut self, leaf: usize, claim: Owner) {
        if let Some(owner) = self.leaves.get_mut(leaf)
            && claim.generation <= MAX_GENERATION
            && owner.as_ref().is_none_or(|owner| owner.generation < claim.generation)
        {
            *owner = Some(claim);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn absorb(state: &mut State, key: Key, bytes: &[u8]) {
        state.absorb(Entry { key, bytes: bytes.into() }, &mut WorkerStats::default());
    }

    fn round(step: u64, phase: RoundPhase) -> Round {
        Round::new((step, 0), phase, 1, 4)
    }

    fn owner(state: &State, round: &Round, leaf: usize) -> Option<String> {
        state.owners(round).of(leaf)?.worker.clone()
    }

    #[test]
    fn the_latest_claim_owns_a_leaf_to_the_end_of_a_step() {
        let mut state = State::default();
        let (clean, query) = (round(1, RoundPhase::Clean), round(1, RoundPhase::Query));
        let claim = |leaf, generation| Key::Claim { round: RoundKey::from(&clean), leaf, generation };
        // before the round is reached, in another order, and of leaves that are none
        absorb(&mut state, claim(0, 1), b"b");
        absorb(&mut state, claim(0, 0), b"a");
        absorb(&mut state, claim(9, 0), b"a");
        absorb(&mut state, claim(1, 0), b"no name");
        absorb(&mut state, claim(2, MAX_GENERATION + 1), b"a");
        assert!(state.enter(&clean).is_none());
        assert_eq!(owner(&state, &clean, 0).as_deref(), Some("b"));
        assert!(state.is_gone(state.owners(&clean).of(1).unwrap()));
        assert!(state.owners(&clean).of(2).is_none());
        state.leave(RoundKey::from(&clean), Ok(()));
        // a round of one job between them has an owner of its own
        let single = Round::new((1, 0), RoundPhase::Repeat, 1, 1);
        assert!(state.enter(&single).is_none() && owner(&state, &single, 0).is_none());
        assert!(state.enter(&query).is_none());
        absorb(&mut state, claim(0, 2), b"c");
        assert_eq!(owner(&state, &query, 0).as_deref(), Some("c"));
        assert_eq!(state.owners(&query).count("c", |_| true), 1);
        // a retry of the step with other data, and the next step, start anew
        for round in [Round::new((1, 0), RoundPhase::Clean, 2, 4), round(2, RoundPhase::Clean)] {
            assert!(state.enter(&round).is_none() && owner(&state, &round, 0).is_none());
        }
    }

    #[test]
    fn entries_of_rounds_that_are_over_are_dropped() {
        let mut state = State::default();
        let [clean, query] = [RoundPhase::Clean, RoundPhase::Query].map(|phase| round(5, phase));
        let result = |round: &Round, generation| Key::Result { round: round.into(), start: 0, end: 1, generation };
        state.enter(&clean);
        for (generation, of) in [&clean, &query, &round(4, RoundPhase::Clean)].into_iter().enumerate() {
            absorb(&mut state, result(of, generation as u32), b"");
        }
        assert_eq!(state.inbox.len(), 2);
        assert_eq!(state.arrived((&clean).into()).len(), 1);
        state.leave((&clean).into(), Ok(()));
        absorb(&mut state, result(&clean, 3), b"");
        assert!(!state.has_arrived((&clean).into()) && state.enter(&clean) == Some(Ok(())));
        absorb(&mut state, Key::Weights(5), b"");
        state.enter(&round(6, RoundPhase::Clean));
        assert!(state.inbox.is_empty() && state.facts.is_empty() && state.past.is_empty());
    }

    #[test]
    fn workers_that_left_or_claim_nothing_have_no_share() {
        let mut state = State::default();
        for worker in ["a", "b", "c", "b"] {
            absorb(&mut state, Key::Joined(worker.into()), b"");
        }
        let clean = round(7, RoundPhase::Clean);
        state.enter(&clean);
        assert_eq!((state.joined(), state.place("b"), state.place("none")), (3, (1, 3), (0, 3)));
        absorb(&mut state, Key::Left("a".into()), b"");
        assert_eq!(state.place("c"), (1, 2));
        let later = round(8 + RECENT_STEPS, RoundPhase::Clean);
        absorb(&mut state, Key::Claim { round: (&later).into(), leaf: 0, generation: 0 }, b"c");
        state.enter(&later);
        // itself, and c, which claims
        assert_eq!((state.place("b"), state.place("c")), ((0, 2), (0, 1)));
    }
}
