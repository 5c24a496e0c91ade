//! The rows of a pass of queries.

use std::ops::Range;

use burn::prelude::*;

use crate::batch::Rows;
use crate::noise::RowKey;

/// The rows of a pass of queries: some examples of the batch, each with a range of its queries.
#[derive(Clone, Debug)]
pub struct QueryRows {
    /// Rows of each example, in turn.
    pub(crate) groups: Vec<Range<usize>>,
    /// Which noise falls on each row.
    pub(crate) keys: Vec<RowKey>,
    /// The example of the pass that each row belongs to.
    pub(crate) datum: Vec<usize>,
}

impl QueryRows {
    /// Examples `positions` of the batch, example i with the queries `queries[i]`.
    pub(crate) fn new<Q: IntoIterator<Item = usize>>(
        positions: &[usize],
        queries: impl IntoIterator<Item = Q>,
    ) -> Self {
        let (mut groups, mut keys, mut datum) = (Vec::new(), Vec::new(), Vec::new());
        for (i, (&position, queries)) in positions.iter().zip(queries).enumerate() {
            let start = keys.len();
            keys.extend(queries.into_iter().map(|query| RowKey { position: position as u64, query }));
            datum.resize(keys.len(), i);
            groups.push(start..keys.len());
        }
        Self { groups, keys, datum }
    }

    /// Rows of the pass, one per query.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether the pass has no row.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// `x` with one row per query. Where it has one per example, the row is repeated for each
    /// query.
    ///
    /// A tensor of any other number of rows, such as a bare parameter's single row, stays as it is.
    ///
    /// The number of rows tells what they are. Every example of a pass has at least one query. So
    /// there are as many examples as queries only where each has one, and both orders are then the
    /// same. That a tensor has either number by accident is ruled out by the row contract of
    /// [`Probe`](super::Probe), which the clean pass checks, and the first step for two numbers of
    /// rows.
    pub fn repeat<B: Backend, const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        let given = x.dims()[0];
        if given == self.groups.len() && given != self.keys.len() { x.rows(&self.datum) } else { x }
    }
}
