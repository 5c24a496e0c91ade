//! The passes of a batch of which some rows are cached.

use std::ops::Range;

use burn::tensor::backend::DeviceId;

use super::prefix_cache::CachedRows;
use super::stages::{Prefix, Stages};
use crate::batch::Rows;
use crate::parallel::balanced_chunk;

/// How a batch is cut into passes: first rows that begin with the input, then rows that begin
/// behind a cached prefix.
#[derive(Clone)]
pub(crate) struct Passes {
    /// Positions of the rows in the batch, pass after pass.
    order: Vec<usize>,
    /// The rows of each pass, in this order.
    jobs: Vec<Range<usize>>,
    /// Rows that begin with the input.
    fresh: usize,
    /// Prefix of the others.
    prefix: Option<Prefix>,
}

impl Passes {
    /// Passes of at most `max_rows` of the `rows` rows of a batch, nearly equal ones; one for an
    /// empty batch.
    pub fn new(rows: usize, cached: Option<CachedRows>, max_rows: usize) -> Self {
        let (cached, prefix) = cached.map_or((vec![], None), |cached| (cached.rows, Some(cached.prefix)));
        let mut is_cached = vec![false; rows];
        cached.iter().for_each(|&row| is_cached[row] = true);
        let mut order: Vec<usize> = (0..rows).filter(|&row| !is_cached[row]).collect();
        let fresh = order.len();
        order.extend(cached);
        let mut jobs = vec![];
        for Range { start, end } in [0..fresh, fresh..rows] {
            let width = balanced_chunk(end - start, max_rows.max(1));
            jobs.extend((start..end).step_by(width).map(|first| first..end.min(first + width)));
        }
        if rows == 0 {
            jobs.push(0..0);
        }
        Self { order, jobs, fresh, prefix }
    }

    /// The same passes, their prefix on another device.
    pub fn on_device(mut self, device: DeviceId) -> Self {
        self.prefix = self.prefix.map(|prefix| prefix.on_device(device));
        self
    }

    /// The number of passes.
    pub fn len(&self) -> usize {
        self.jobs.len()
    }

    /// Rows of the largest pass.
    pub fn largest(&self) -> usize {
        self.jobs.iter().map(Range::len).max().unwrap_or(0)
    }

    /// Positions in the batch of the rows of a pass.
    pub fn rows(&self, job: usize) -> &[usize] {
        &self.order[self.jobs[job].clone()]
    }

    /// What a pass begins with; `None` for the input.
    pub fn prefix(&self, job: usize) -> Option<Prefix> {
        let Range { start, end } = self.jobs[job];
        let index: Vec<usize> = (start.checked_sub(self.fresh)?..end - self.fresh).collect();
        self.prefix.as_ref().map(|prefix| prefix.rows(&index))
    }

    /// Positions in the batch of the rows that begin with the input.
    pub fn fresh(&self) -> &[usize] {
        &self.order[..self.fresh]
    }

    /// What the passes gave, in the order of the batch.
    pub fn in_order<T: Rows>(&self, parts: Vec<T>) -> T {
        let all = T::cat(parts);
        if self.is_sorted() { all } else { all.rows(&self.places()) }
    }

    /// The stages of the batch, from those of the passes.
    pub fn stages(&self, parts: Vec<Stages>) -> Stages {
        let whole = if self.fresh == 0 { self.prefix.clone() } else { None };
        Stages::cat(parts, whole, &self.places())
    }

    fn is_sorted(&self) -> bool {
        self.order.is_sorted()
    }

    /// Where the passes, one after the other, have each row of the batch.
    pub fn places(&self) -> Vec<usize> {
        let mut places = vec![0; self.order.len()];
        self.order.iter().enumerate().for_each(|(place, &row)| places[row] = place);
        places
    }
}

#[cfg(test)]
mod tests {
    use burn::prelude::*;

    use super::super::stages::unbox;
    use super::*;
    use crate::testing::B;

    fn cached(rows: Vec<usize>) -> CachedRows {
        let state: Vec<usize> = rows.iter().map(|row| 10 * row).collect();
        CachedRows { rows, prefix: Prefix { skipped: vec![], state: Some(Box::new(state)) } }
    }

    /// Every row is in one pass, begins with its own prefix, and comes back to its place.
    #[test]
    fn rows_come_back_in_the_order_of_the_batch() {
        for kept in [vec![], vec![1, 4, 5], vec![0], vec![6], (0..7).collect()] {
            for max_rows in [1, 2, 3, 7, usize::MAX] {
                let passes = Passes::new(7, Some(cached(kept.clone())), max_rows);
                let (mut parts, mut fresh) = (vec![], vec![]);
                for job in 0..passes.len() {
                    let rows = passes.rows(job).to_vec();
                    assert!((1..=max_rows).contains(&rows.len()) && rows.len() <= passes.largest());
                    match passes.prefix(job) {
                        Some(prefix) => {
                            let state = unbox::<Vec<usize>>(prefix.state.unwrap());
                            assert_eq!(*state, rows.iter().map(|row| 10 * row).collect::<Vec<_>>());
                        }
                        None => fresh.extend(rows.clone()),
                    }
                    parts.push(rows);
                }
                assert_eq!(passes.in_order(parts), (0..7).collect::<Vec<_>>());
                assert_eq!(passes.fresh(), fresh);
                assert_eq!(fresh, (0..7).filter(|row| !kept.contains(row)).collect::<Vec<_>>());
            }
        }
        assert_eq!(Passes::new(0, None, 4).len(), 1);
    }

    /// Stages whose outputs differ in size from pass to pass keep none: passes begin before them.
    #[test]
    fn outputs_of_different_sizes_are_not_put_together() {
        let pass = |rows: usize, tokens: usize, first: f32| {
            let (mut stages, device) = (Stages::default(), Default::default());
            let output = Tensor::<B, 2>::full([rows, tokens], first, &device);
            stages.push(&output, (0, 0), 1);
            stages
        };
        let passes = Passes::new(3, Some(cached(vec![0])), 2);
        let whole = passes.stages(vec![pass(2, 4, 1.0), pass(1, 4, 2.0)]).frozen();
        let state = unbox::<Tensor<B, 2>>(whole.state.unwrap());
        assert_eq!(state.slice([0..3, 0..1]).into_data().to_vec::<f32>().unwrap(), [2.0, 1.0, 1.0]);
        assert!(passes.stages(vec![pass(2, 4, 1.0), pass(1, 5, 2.0)]).frozen().is_empty());
    }
}
