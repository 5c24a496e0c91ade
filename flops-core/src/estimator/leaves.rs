//! The leaves of a batch: contiguous parts of its examples, of which each is a job of a round.

use std::cell::OnceCell;
use std::ops::Range;

use crate::error::Error;
use crate::probe::Stages;

/// The examples of leaf `leaf` of `leaves`, among `examples`: a range that may be empty.
pub(crate) fn leaf(examples: usize, leaves: usize, leaf: usize) -> Range<usize> {
    examples * leaf / leaves..examples * (leaf + 1) / leaves
}

/// Part `part` of `parts` of `items` items, cut between whole groups of `group` of them.
pub(crate) fn part(items: usize, group: usize, parts: usize, part: usize) -> Range<usize> {
    let Range { start, end } = leaf(items.div_ceil(group), parts, part);
    (start * group).min(items)..(end * group).min(items)
}

/// The stages of the clean passes of the leaves, as far as they ran here.
pub(crate) struct LeafStages {
    /// The examples of each leaf.
    ranges: Vec<Range<usize>>,
    stages: Vec<OnceCell<Stages>>,
    /// Stages of one row of an earlier batch, for a step in which no leaf ran here.
    earlier: Option<Stages>,
}

impl LeafStages {
    /// None yet, of a batch of `examples`.
    pub fn new(examples: usize, leaves: usize) -> Self {
        let ranges = (0..leaves).map(|l| leaf(examples, leaves, l)).collect();
        Self { ranges, stages: (0..leaves).map(|_| OnceCell::new()).collect(), earlier: None }
    }

    /// With the stages of one row of an earlier batch, for a step in which no leaf ran here.
    pub fn with_earlier(mut self, earlier: Option<Stages>) -> Self {
        self.earlier = earlier;
        self
    }

    /// Stages behind which no pass may begin.
    pub fn nowhere(examples: usize, leaves: usize) -> Self {
        let none = Self::new(examples, leaves);
        none.stages.iter().for_each(|cell| drop(cell.set(Stages::default())));
        none
    }

    /// The number of leaves.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// The examples of a leaf.
    pub fn range(&self, leaf: usize) -> Range<usize> {
        self.ranges[leaf].clone()
    }

    /// Keeps the stages of a leaf, unless it has some.
    pub fn set(&self, leaf: usize, stages: Stages) {
        let _ = self.stages[leaf].set(stages);
    }

    /// The stages of those leaves that ran here, with their examples.
    pub fn here(&self) -> impl Iterator<Item = (Range<usize>, &Stages)> {
        let ran = |(range, cell): (&Range<usize>, _)| Some((range.clone(), OnceCell::get(cell)?));
        self.ranges.iter().zip(&self.stages).filter_map(ran)
    }

    /// Stages of any leaf: all have the same, but for the rows of their outputs.
    ///
    /// # Panics
    /// Where no leaf ran here, and there are none of an earlier batch.
    pub fn any(&self) -> &Stages {
        let here = self.here().next().map(|(_, stages)| stages);
        here.or(self.earlier.as_ref()).expect("a clean pass runs a leaf here, or remembers one")
    }

    /// The stages of a leaf, from `run` where it did not run here.
    ///
    /// # Errors
    /// Those of `run`.
    pub fn of(&self, leaf: usize, run: impl FnOnce(usize) -> Result<Stages, Error>) -> Result<&Stages, Error> {
        if self.stages[leaf].get().is_none() {
            self.set(leaf, run(leaf)?);
        }
        Ok(self.stages[leaf].get().unwrap_or_else(|| self.any()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_hold_every_example_once_and_parts_no_half_group() {
        for examples in [0, 1, 5, 8, 64, 67] {
            for leaves in [1, 2, 8, 16] {
                let all: Vec<usize> = (0..leaves).flat_map(|l| leaf(examples, leaves, l)).collect();
                assert_eq!(all, (0..examples).collect::<Vec<_>>());
                let parts: Vec<Range<usize>> = (0..leaves).map(|p| part(examples, 2, leaves, p)).collect();
                assert_eq!(parts.iter().cloned().flatten().collect::<Vec<_>>(), all);
                assert!(parts.iter().all(|p| p.is_empty() || p.start.is_multiple_of(2)));
            }
        }
    }
}
