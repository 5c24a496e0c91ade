//! Frozen prefixes that outlive a step.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};

use burn::module::ParamId;

use super::Prefix;

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
    prefixes: HashMap<u64, Prefix>,
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
        let parts: Option<Vec<Prefix>> = ids.iter().map(|id| kept.prefixes.get(id).cloned()).collect();
        parts.filter(|p| !p.is_empty()).map(Prefix::cat)
    }

    /// Takes in the prefix of a batch, row by row, as long as there is room.
    pub fn keep(&self, ids: &[u64], trained: &Arc<HashSet<ParamId>>, prefix: &Prefix) {
        if self.capacity == 0 || prefix.is_empty() {
            return;
        }
        let mut kept = self.kept();
        if kept.trained != *trained {
            *kept = Kept { trained: trained.clone(), prefixes: HashMap::new() };
        }
        for (i, &id) in ids.iter().enumerate() {
            if kept.prefixes.len() >= self.capacity {
                return;
            }
            kept.prefixes.entry(id).or_insert_with(|| prefix.rows(&[i]));
        }
    }

    /// Data it holds.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.kept().prefixes.len()
    }
}
