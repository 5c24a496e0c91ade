//! The ratio of each example to the curve: a bounded map that is cheap to clone.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// Examples remembered at most. A table of 2²¹ slots of 25 bytes has room for them.
pub(super) const MAX_EXAMPLES: usize = 1_800_000;
/// Changes that may wait before a shared table is copied, beside an eighth of its size.
const PATIENCE: usize = 1 << 14;

/// An example's mean ratio to the curve, and its number of queries, where older ones count less.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Ratio {
    pub mean: f32,
    pub queries: f32,
    /// When the example was last observed, in batches.
    pub seen: u32,
}

type Table = HashMap<u64, Ratio, BuildHasherDefault<IdHasher>>;

/// The ratios of the examples, a value like any other: a clone does not see later changes.
///
/// burn-train clones the learner in every step and drops the original. The clone must not copy the
/// table, so the table is shared whenever something changes. Changes go into a table of their own.
/// They are moved when no clone is left, at the next reading. What is read does not depend on when
/// that happens.
#[derive(Default)]
pub(super) struct Ratios(Mutex<Layers>);

/// A shared table, and what has changed since.
#[derive(Clone, Default)]
pub(super) struct Layers {
    table: Arc<Table>,
    changes: Table,
    /// Examples of `changes` that `table` does not hold.
    added: usize,
}

impl Ratios {
    /// Access to the ratios, with as few changes waiting as possible.
    pub fn lock(&self) -> MutexGuard<'_, Layers> {
        let mut layers = self.0.lock().unwrap_or_else(|e| e.into_inner());
        layers.settle();
        layers
    }
}

impl Layers {
    pub fn len(&self) -> usize {
        self.table.len() + self.added
    }

    pub fn get(&self, id: u64) -> Option<Ratio> {
        let changed = if self.changes.is_empty() { None } else { self.changes.get(&id) };
        changed.or_else(|| self.table.get(&id)).copied()
    }

    /// Makes room for this many changes.
    pub fn reserve(&mut self, changes: usize) {
        self.changes.reserve(changes);
    }

    /// Replaces the ratio of an example by a function of the one that it has, if any.
    pub fn update(&mut self, id: u64, new: impl FnOnce(Option<Ratio>) -> Ratio) {
        match self.changes.entry(id) {
            Entry::Occupied(mut entry) => {
                let ratio = new(Some(*entry.get()));
                entry.insert(ratio);
            }
            Entry::Vacant(entry) => {
                let old = self.table.get(&id).copied();
                self.added += usize::from(old.is_none());
                entry.insert(new(old));
            }
        }
    }

    /// Moves the changes into the table if no clone shares it, or if they have become many.
    fn settle(&mut self) {
        if self.changes.is_empty() {
            return;
        }
        if Arc::get_mut(&mut self.table).is_some() || self.changes.len() > PATIENCE.max(self.table.len() / 8) {
            let table = Arc::make_mut(&mut self.table);
            // one by one: `extend` would reserve room for ids that are there already
            for (id, ratio) in std::mem::take(&mut self.changes) {
                table.insert(id, ratio);
            }
            self.added = 0;
        }
    }

    /// If there are more than `most` examples, forgets those seen longest ago, an eighth of `most`
    /// at a time. Of those last seen in one batch, the lower ids go first.
    pub fn forget(&mut self, most: usize) {
        if self.len() <= most {
            return;
        }
        let excess = self.len() - (most - most / 8);
        let mut order: Vec<(u32, u64)> = self.iter().map(|(id, ratio)| (ratio.seen, id)).collect();
        let (.., oldest_kept, _) = order.select_nth_unstable(excess);
        let oldest_kept = *oldest_kept;
        let kept = self.iter().filter(|(id, ratio)| (ratio.seen, *id) >= oldest_kept).collect();
        *self = Self { table: Arc::new(kept), ..Self::default() };
    }

    /// All examples, in no particular order.
    fn iter(&self) -> impl Iterator<Item = (u64, Ratio)> {
        let unchanged = self.table.iter().filter(|(id, _)| !self.changes.contains_key(id));
        unchanged.chain(&self.changes).map(|(&id, &ratio)| (id, ratio))
    }

    /// All examples, by id.
    fn sorted(&self) -> Vec<(u64, Ratio)> {
        let mut all: Vec<_> = self.iter().collect();
        all.sort_unstable_by_key(|(id, _)| *id);
        all
    }
}

impl Clone for Ratios {
    fn clone(&self) -> Self {
        Self(Mutex::new(self.lock().clone()))
    }
}

impl PartialEq for Ratios {
    fn eq(&self, other: &Self) -> bool {
        // one lock at a time: `other` may be `self`
        let sorted = self.lock().sorted();
        sorted == other.lock().sorted()
    }
}

impl std::fmt::Debug for Ratios {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ratios({} examples)", self.lock().len())
    }
}

/// The columns of the table, by id: compact, and the same bytes for the same content.
#[derive(Serialize, Deserialize)]
struct Columns {
    ids: Vec<u64>,
    means: Vec<f32>,
    queries: Vec<f32>,
    seen: Vec<u32>,
}

impl Serialize for Ratios {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let all = self.lock().sorted();
        let columns = Columns {
            ids: all.iter().map(|(id, _)| *id).collect(),
            means: all.iter().map(|(_, ratio)| ratio.mean).collect(),
            queries: all.iter().map(|(_, ratio)| ratio.queries).collect(),
            seen: all.iter().map(|(_, ratio)| ratio.seen).collect(),
        };
        columns.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Ratios {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Columns { ids, means, queries, seen } = Columns::deserialize(deserializer)?;
        if [means.len(), queries.len(), seen.len()].iter().any(|&n| n != ids.len()) {
            return Err(D::Error::custom("the columns of the variance tracker differ in length"));
        }
        let values = means.into_iter().zip(queries).zip(seen);
        let ratios = values.map(|((mean, queries), seen)| Ratio { mean, queries, seen });
        let table = Arc::new(ids.into_iter().zip(ratios).collect());
        Ok(Self(Mutex::new(Layers { table, ..Layers::default() })))
    }
}

/// Hashes ids by the finaliser of SplitMix64. Ids need no protection against an attacker.
#[derive(Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&b| self.write_u64(b.into()));
    }

    fn write_u64(&mut self, id: u64) {
        self.0 = crate::random::derive_seed(&[self.0, id]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(ratios: &Ratios, id: u64, mean: f32, seen: u32) {
        ratios.lock().update(id, |_| Ratio { mean, queries: 1.0, seen });
    }

    #[test]
    fn the_least_recently_seen_go_first() {
        // batches of 10 new ids, and id 3 in every one; room for 80, of which 10 are made free
        let ratios = Ratios::default();
        for batch in 0..30 {
            (0..10).for_each(|j| put(&ratios, 1000 * batch + j, 1.0, batch as u32));
            put(&ratios, 3, batch as f32, batch as u32);
            ratios.lock().forget(80);
            let len = ratios.lock().len();
            assert!(len <= 80 && len >= 70.min(10 * batch as usize + 10), "{batch}: {len}");
            assert!(batch != 8 || len == 70, "the ninth batch is the first without room: {len}");
            assert_eq!(ratios.lock().get(3).map(|r| r.mean), Some(batch as f32));
            // the last 6 batches are always there
            assert!((batch.saturating_sub(5)..=batch).all(|b| ratios.lock().get(1000 * b + 9).is_some()), "{batch}");
        }
        assert!(ratios.lock().get(9).is_none());
    }

    #[test]
    fn what_is_forgotten_does_not_depend_on_clones() {
        let (free, shared) = (Ratios::default(), Ratios::default());
        let mut clones = vec![];
        for batch in 0..40u64 {
            clones.push(shared.clone());
            for ratios in [&free, &shared] {
                (0..7).for_each(|j| put(ratios, (batch * 5 + j * 13) % 97, batch as f32, batch as u32));
                ratios.lock().forget(60);
            }
            assert_eq!(free, shared, "{batch}");
            assert_eq!(free.lock().len(), shared.lock().sorted().len(), "{batch}");
        }
        put(&free, 1, -1.0, 40);
        assert_ne!(free, shared);
    }

    #[test]
    fn a_shared_table_is_not_copied_until_changes_are_many() {
        let ratios = Ratios::default();
        (0..200_000).for_each(|id| put(&ratios, id, 1.0, 0));
        let clone = ratios.clone();
        let table = Arc::as_ptr(&ratios.lock().table);
        (0..25_000).for_each(|id| put(&ratios, id, 2.0, 1));
        assert_eq!(Arc::as_ptr(&ratios.lock().table), table);
        assert_eq!(ratios.lock().len(), 200_000);
        assert_eq!(ratios.lock().get(7).map(|r| r.mean), Some(2.0));
        // an eighth of the table
        (25_000..25_002).for_each(|id| put(&ratios, id, 2.0, 1));
        assert_ne!(Arc::as_ptr(&ratios.lock().table), table);
        assert_eq!(clone.lock().get(7).map(|r| r.mean), Some(1.0));
        // alone again, changes are moved at the next reading
        drop(clone);
        let table = Arc::as_ptr(&ratios.lock().table);
        put(&ratios, 300_000, 3.0, 2);
        assert!(ratios.lock().changes.is_empty());
        assert_eq!(Arc::as_ptr(&ratios.lock().table), table);
        assert_eq!(ratios.lock().len(), 200_001);
    }
}
