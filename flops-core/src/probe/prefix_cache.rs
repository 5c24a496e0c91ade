//! Outputs of frozen stages, cached over the epochs.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};

use burn::module::ParamId;

use super::stages::{Prefix, Skipped, State, cat_states};

/// Outputs of the frozen stages of each example, kept in memory over the epochs.
///
/// Examples are identified by their ids and the sizes of their input rows. An example that was
/// padded otherwise is computed again, for its padding may reach the output. Entries are valid as
/// long as the same parameters are trained; [`reset_if_changed`](Self::reset_if_changed) tells the
/// cache which.
#[derive(Default)]
pub struct PrefixCache {
    /// The most outputs it holds.
    capacity: usize,
    kept: Mutex<Kept>,
}

/// The outputs of an example, each with the number of its layout.
type Outputs = Vec<(usize, Box<dyn State>)>;

#[derive(Default)]
struct Kept {
    trained: Arc<HashSet<ParamId>>,
    layouts: Vec<Layout>,
    /// Outputs of the last frozen stage by the id of the example.
    states: HashMap<u64, Outputs>,
    /// Outputs in all.
    len: usize,
}

/// What all outputs of inputs of one size share.
struct Layout {
    /// Sizes of a row of the input.
    input: Vec<usize>,
    /// Sizes of a row of the output.
    output: Vec<usize>,
    /// The stages that no example needs to run again.
    skipped: Vec<Skipped>,
}

/// The rows of a batch that are cached.
pub(crate) struct CachedRows {
    /// Their positions in the batch, in order.
    pub rows: Vec<usize>,
    /// Their prefix.
    pub prefix: Prefix,
}

impl std::fmt::Debug for PrefixCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PrefixCache({})", self.capacity)
    }
}

impl PrefixCache {
    /// An empty cache for at most `capacity` examples.
    ///
    /// An example that comes in several paddings counts once for each.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { capacity, kept: Mutex::default() }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The rows of a batch that are cached, for these trained parameters; `None` where none is.
    ///
    /// - input: [sizes](crate::Rows::row_shape) of a row of the input
    pub(crate) fn get(&self, ids: &[u64], input: &[usize], trained: &Arc<HashSet<ParamId>>) -> Option<CachedRows> {
        let kept = self.kept();
        if kept.trained != *trained {
            return None;
        }
        let layout = kept.layout(input)?;
        let state = |(row, id)| Some((row, Some(kept.state(id, layout)?.clone_box())));
        let (rows, states) = ids.iter().enumerate().filter_map(state).unzip();
        let (skipped, state) = (kept.layouts[layout].skipped.clone(), Some(cat_states(states)?));
        Some(CachedRows { rows, prefix: Prefix { skipped, state } })
    }

    /// Inserts the prefix of examples whose input rows have these sizes, as long as there is room and
    /// the cache belongs to these trained parameters.
    ///
    /// Without room, an example that is cached in another padding changes to this one.
    pub(crate) fn insert(&self, ids: &[u64], input: &[usize], trained: &Arc<HashSet<ParamId>>, prefix: &Prefix) {
        let mut kept = self.kept();
        if kept.trained == *trained {
            kept.insert(self.capacity, (ids, input), prefix);
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

    /// Whether [`insert`](Self::insert) would keep the prefix of any of these examples, none of
    /// which is cached.
    pub(crate) fn has_room(&self, ids: impl IntoIterator<Item = u64>) -> bool {
        self.kept().has_room(self.capacity, ids)
    }

    /// The number of outputs it holds.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.kept().len
    }
}

impl Kept {
    fn has_room(&self, capacity: usize, ids: impl IntoIterator<Item = u64>) -> bool {
        ids.into_iter().any(|id| self.len < capacity || self.states.contains_key(&id))
    }

    fn insert(&mut self, capacity: usize, (ids, input): (&[u64], &[usize]), prefix: &Prefix) {
        let Some(state) = &prefix.state else { return };
        // a layout is kept for examples alone
        if !self.has_room(capacity, ids.iter().copied()) {
            return;
        }
        let Some(layout) = self.layout_of(input, state.shape_of_row(), prefix) else { return };
        for (row, id) in ids.iter().enumerate() {
            let room = self.len < capacity;
            if self.state(id, layout).is_none() && (room || self.states.contains_key(id)) {
                let of_id = self.states.entry(*id).or_default();
                if !room {
                    of_id.remove(0);
                }
                of_id.push((layout, state.rows_box(&[row])));
                self.len += usize::from(room);
            }
        }
    }

    /// The layout of inputs of this size.
    fn layout(&self, input: &[usize]) -> Option<usize> {
        self.layouts.iter().position(|layout| layout.input == input)
    }

    /// The same, added if it is new; `None` where inputs of this size had other outputs before.
    fn layout_of(&mut self, input: &[usize], output: Vec<usize>, prefix: &Prefix) -> Option<usize> {
        let Some(layout) = self.layout(input) else {
            self.layouts.push(Layout { input: input.to_vec(), output, skipped: prefix.skipped.clone() });
            return Some(self.layouts.len() - 1);
        };
        let known = &self.layouts[layout];
        (known.output == output && known.skipped.len() == prefix.skipped.len()).then_some(layout)
    }

    /// The output of an example in this layout.
    fn state(&self, id: &u64, layout: usize) -> Option<&dyn State> {
        self.states.get(id)?.iter().find(|(of, _)| *of == layout).map(|(_, state)| &**state)
    }
}
