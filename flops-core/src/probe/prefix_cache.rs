//! Outputs of frozen stages, cached over the epochs.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};

use burn::module::ParamId;

use super::stages::{Prefix, Skipped, State, cat_states};

/// Outputs of the frozen stages of each example, kept in memory over the epochs.
///
/// Examples are identified by their ids alone. Entries are valid as long as the same parameters are
/// trained; [`reset_if_changed`](Self::reset_if_changed) tells the cache which.
#[derive(Default)]
pub struct PrefixCache {
    /// The most examples it holds.
    capacity: usize,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    trained: Arc<HashSet<ParamId>>,
    /// The stages that no example needs to run again.
    skipped: Vec<Skipped>,
    /// The output of the last of these stages, by the id of the example.
    states: HashMap<u64, Box<dyn State>>,
}

impl std::fmt::Debug for PrefixCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PrefixCache({})", self.capacity)
    }
}

impl PrefixCache {
    /// An empty cache for at most `capacity` examples.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { capacity, kept: Mutex::default() }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The prefixes of these examples; `None` unless all are cached, for these trained parameters.
    pub(crate) fn get(&self, ids: &[u64], trained: &Arc<HashSet<ParamId>>) -> Option<Prefix> {
        let kept = self.kept();
        if kept.trained != *trained {
            return None;
        }
        let states = ids.iter().map(|id| kept.states.get(id).map(|state| state.clone_box())).collect();
        cat_states(states).map(|state| Prefix { skipped: kept.skipped.clone(), state: Some(state) })
    }

    /// Inserts the prefix of a batch, row by row, as long as there is room.
    pub(crate) fn insert(&self, ids: &[u64], trained: &Arc<HashSet<ParamId>>, prefix: &Prefix) {
        let (false, Some(state)) = (self.capacity == 0, &prefix.state) else { return };
        self.reset_if_changed(trained.clone());
        let mut kept = self.kept();
        if kept.states.is_empty() {
            kept.skipped = prefix.skipped.clone();
        }
        for (i, &id) in ids.iter().enumerate() {
            if kept.states.len() >= self.capacity {
                return;
            }
            kept.states.entry(id).or_insert_with(|| state.rows_box(&[i]));
        }
    }

    /// Empties the cache if other parameters are trained than before.
    pub fn reset_if_changed(&self, trained: Arc<HashSet<ParamId>>) {
        let mut kept = self.kept();
        if self.capacity > 0 && kept.trained != trained {
            *kept = Kept { trained, ..Kept::default() };
        }
    }

    /// The trained parameters that the cached prefixes belong to; empty before the first
    /// [`reset_if_changed`](Self::reset_if_changed).
    pub(crate) fn trained(&self) -> Arc<HashSet<ParamId>> {
        self.kept().trained.clone()
    }

    /// Whether this many more examples fit.
    pub(crate) fn has_room(&self, examples: usize) -> bool {
        self.kept().states.len() + examples <= self.capacity
    }

    /// The number of examples it holds.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.kept().states.len()
    }
}
