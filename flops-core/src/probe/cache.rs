//! Frozen prefixes that outlive a step.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};

use burn::module::ParamId;

use super::stages::{Prefix, Skipped, State, cat_states};

/// The frozen prefix of each datum, kept over the epochs in memory. Data are known by their ids alone; what is kept counts as long as
/// the same parameters are trained.
#[derive(Default)]
pub(crate) struct PrefixCache {
    /// Data it holds at most.
    capacity: usize,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    trained: Arc<HashSet<ParamId>>,
    /// The stages that no datum need run again.
    skipped: Vec<Skipped>,
    /// Of each datum what the last of them returned.
    states: HashMap<u64, Box<dyn State>>,
}

impl std::fmt::Debug for PrefixCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PrefixCache({})", self.capacity)
    }
}

impl PrefixCache {
    /// An empty cache for at most `capacity` data.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, kept: Mutex::default() }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The prefixes of these data, where they are all there and belong to the parameters that are `trained`.
    pub fn get(&self, ids: &[u64], trained: &Arc<HashSet<ParamId>>) -> Option<Prefix> {
        let kept = self.kept();
        if kept.trained != *trained {
            return None;
        }
        let states = ids.iter().map(|id| kept.states.get(id).map(|state| state.clone_box())).collect();
        cat_states(states).map(|state| Prefix { skipped: kept.skipped.clone(), state: Some(state) })
    }

    /// Takes in the prefix of a batch, row by row, as long as there is room.
    pub fn keep(&self, ids: &[u64], trained: &Arc<HashSet<ParamId>>, prefix: &Prefix) {
        let (false, Some(state)) = (self.capacity == 0, &prefix.state) else { return };
        self.turn_to(trained.clone());
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

    /// Begins anew where other parameters are trained than before.
    pub fn turn_to(&self, trained: Arc<HashSet<ParamId>>) {
        let mut kept = self.kept();
        if self.capacity > 0 && kept.trained != trained {
            *kept = Kept { trained, ..Kept::default() };
        }
    }

    /// The parameters in front of which prefixes are kept; none where none are, or before the cache was told.
    pub fn trained(&self) -> Arc<HashSet<ParamId>> {
        self.kept().trained.clone()
    }

    /// Whether so many data more can be kept.
    pub fn has_room(&self, data: usize) -> bool {
        self.kept().states.len() + data <= self.capacity
    }

    /// Data it holds.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.kept().states.len()
    }
}
