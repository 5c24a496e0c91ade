//! Steps that wait for the update that commits them, and whose they are.
//!
//! burn-train steps on a learner and updates a clone of it. In a sweep, clones step and update side
//! by side. So a step is kept under the learner that took it and those that this one was cloned
//! from, and an update takes what belongs to its own learner.
//!
//! The workers of burn-train's multi-device strategy step on clones of a clone, and a clone of the
//! learner itself updates. Their gradients cannot be one update: this is told apart, and refused.

use std::sync::{Arc, Mutex, MutexGuard, Weak};

use super::state::Pending;
use crate::error::Error;
use crate::ledger::Ledger;

/// The identity of a learner; clones have one of their own.
type Token = Arc<()>;

/// A step under its owner, and the learners that the owner was cloned from, latest first.
struct Entry {
    lineage: Vec<Weak<()>>,
    /// `None` for a step that failed with an error.
    step: Option<Pending>,
}

impl Entry {
    /// Generations between `learner` and the owner of the step; 0 for the owner.
    fn distance(&self, learner: &Token) -> Option<usize> {
        self.lineage.iter().position(|owner| std::ptr::eq(owner.as_ptr(), Arc::as_ptr(learner)))
    }
}

/// What the steps since the last update have taken.
#[derive(Clone, Debug, Default)]
pub(super) struct Earlier {
    /// Their number; it keys the noise of the next one.
    pub steps: u64,
    /// Their cost.
    pub ledger: Ledger,
}

impl Earlier {
    /// Counts a step.
    pub fn add(&mut self, step: &Pending) {
        self.steps += 1;
        for &(phase, queries, cost) in &step.costs {
            self.ledger.add(phase, queries, cost.rows, cost.elapsed);
        }
    }
}

/// The uncommitted steps of a learner and its clones, seen from one of them.
pub(super) struct PendingSteps {
    store: Arc<Mutex<Vec<Entry>>>,
    me: Token,
    /// The learner that this one was cloned from, since its last update.
    parent: Option<Token>,
    /// Those that the parent was cloned from, latest first.
    ancestors: Vec<Weak<()>>,
}

impl Default for PendingSteps {
    fn default() -> Self {
        Self { store: Arc::default(), me: Arc::new(()), parent: None, ancestors: vec![] }
    }
}

impl Clone for PendingSteps {
    /// A learner of its own, cloned from this one.
    fn clone(&self) -> Self {
        let older = self.parent.iter().map(Arc::downgrade).chain(self.ancestors.iter().cloned());
        Self {
            store: self.store.clone(),
            me: Arc::new(()),
            parent: Some(self.me.clone()),
            ancestors: older.filter(is_alive).collect(),
        }
    }
}

/// Whether a learner or a clone of it can still ask for its steps.
fn is_alive(token: &Weak<()>) -> bool {
    token.strong_count() > 0
}

impl PendingSteps {
    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.store.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Takes all steps, whosever they are.
    #[cfg(test)]
    pub fn drain(&self) -> Vec<Pending> {
        self.lock().drain(..).filter_map(|entry| entry.step).collect()
    }

    /// Keeps a step of this learner, or that one failed with an error.
    pub fn push(&self, step: Option<Pending>) {
        let owners = std::iter::once(&self.me).chain(&self.parent).map(Arc::downgrade);
        let lineage = owners.chain(self.ancestors.iter().cloned()).collect();
        let mut entries = self.lock();
        entries.retain(|entry| entry.lineage.iter().any(is_alive));
        entries.push(Entry { lineage, step });
    }

    /// What this learner has taken since its last update.
    pub fn earlier(&self) -> Earlier {
        let mut earlier = Earlier::default();
        let own = |entry: &&Entry| entry.distance(&self.me) == Some(0);
        self.lock().iter().filter(own).filter_map(|e| e.step.as_ref()).for_each(|step| earlier.add(step));
        earlier
    }

    /// Takes the steps that an update of this learner commits, in the order in which they came.
    ///
    /// These are its own, or else those of the learner it was cloned from. Afterwards this learner is
    /// related to no other.
    ///
    /// # Errors
    /// [`Error::MultiDevice`] where neither has stepped, but clones of them have: these are workers.
    pub fn take(&mut self) -> Result<Vec<Pending>, Error> {
        let me = std::mem::replace(&mut self.me, Arc::new(()));
        let parent = self.parent.take();
        self.ancestors.clear();
        let mut entries = self.lock();
        let mut take = |learner: &Token, belongs: fn(usize) -> bool| -> Option<Vec<Pending>> {
            let is_taken = |entry: &mut Entry| entry.distance(learner).is_some_and(belongs);
            let taken: Vec<Entry> = entries.extract_if(.., is_taken).collect();
            (!taken.is_empty()).then(|| taken.into_iter().filter_map(|entry| entry.step).collect())
        };
        let of_parent = parent.as_ref();
        let own = take(&me, |distance| distance == 0).or_else(|| take(of_parent?, |distance| distance == 0));
        if let Some(own) = own {
            return Ok(own);
        }
        let of_workers = take(&me, |_| true).or_else(|| take(of_parent?, |_| true));
        if of_workers.is_some() { Err(Error::MultiDevice) } else { Ok(vec![]) }
    }

    /// Changes the steps that wait.
    #[cfg(test)]
    pub fn for_each(&self, change: impl FnMut(&mut Pending)) {
        self.lock().iter_mut().filter_map(|entry| entry.step.as_mut()).for_each(change);
    }

    /// The number of steps that wait.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.lock().len()
    }
}

impl std::fmt::Debug for PendingSteps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PendingSteps")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::estimator::PassCost;
    use crate::ledger::Phase;

    /// A step of example `first`, with as many queries.
    fn step(first: u64) -> Option<Pending> {
        let cost = PassCost { rows: first, elapsed: Duration::ZERO, largest: first };
        Some(Pending { ids: vec![first], costs: vec![(Phase::Query, first, cost)], ..Pending::default() })
    }

    fn firsts(steps: Vec<Pending>) -> Vec<u64> {
        steps.into_iter().map(|step| step.ids[0]).collect()
    }

    #[test]
    fn a_learner_takes_its_own_steps() {
        let mut learner = PendingSteps::default();
        learner.push(step(1));
        learner.push(step(2));
        assert_eq!((learner.earlier().steps, learner.earlier().ledger.total().queries), (2, 3));
        assert_eq!(firsts(learner.take().unwrap()), [1, 2]);
        assert_eq!((learner.earlier().steps, learner.len()), (0, 0));
    }

    /// burn-train steps on its model, and updates a clone that takes the model's place.
    #[test]
    fn a_clone_takes_the_steps_of_the_learner_it_replaces() {
        let mut learner = PendingSteps::default();
        for i in 0..5 {
            let _for_the_accumulator = learner.clone();
            learner.push(step(i));
            let mut clone = learner.clone();
            assert_eq!(firsts(clone.take().unwrap()), [i]);
            learner = clone;
        }
        assert_eq!(learner.len(), 0);
    }

    #[test]
    fn clones_of_a_sweep_take_their_own_steps_alone() {
        let base = PendingSteps::default();
        let (mut a, mut b) = (base.clone(), base.clone());
        a.push(step(1));
        b.push(step(2));
        b.push(step(3));
        assert_eq!(firsts(a.clone().take().unwrap()), [1]);
        assert_eq!(firsts(b.take().unwrap()), [2, 3]);
        // a step of b failed: it takes nothing of a
        a.push(step(4));
        b.push(None);
        assert_eq!(firsts(b.take().unwrap()), [0; 0]);
        assert_eq!(firsts(a.take().unwrap()), [4]);
        // so does a learner that never updated, beside a clone that steps
        let mut fresh = base.clone();
        base.push(None);
        fresh.push(step(5));
        assert_eq!(firsts(base.clone().take().unwrap()), [0; 0]);
        assert_eq!(firsts(fresh.take().unwrap()), [5]);
        // and one that steps itself, beside a clone of it
        let mut clone = base.clone();
        let mut own = base;
        clone.push(step(7));
        own.push(step(6));
        assert_eq!(own.clone().earlier().steps, 0, "what clones take is their own");
        assert_eq!(firsts(own.take().unwrap()), [6]);
        assert_eq!(firsts(clone.take().unwrap()), [7]);
    }

    /// Workers step on clones of a clone, which are gone when the learner's next clone updates.
    #[test]
    fn steps_of_workers_are_refused() {
        let main = PendingSteps::default();
        let sent = main.clone();
        std::thread::scope(|scope| {
            for worker in [1, 2] {
                let learner = sent.clone();
                scope.spawn(move || learner.push(step(worker)));
            }
        });
        let mut clone = main.clone();
        assert_eq!(clone.take().unwrap_err(), Error::MultiDevice);
        assert_eq!((clone.len(), clone.take().unwrap().len()), (0, 0));
    }

    #[test]
    fn steps_that_nobody_can_commit_are_dropped() {
        let learner = PendingSteps::default();
        let mut trial = learner.clone();
        trial.take().unwrap();
        trial.push(step(1));
        drop(trial);
        learner.push(step(2));
        assert_eq!(learner.len(), 1);
    }
}
