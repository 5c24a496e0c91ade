//! Tensors that meet in a model: some have a row per example, others one per query.

use burn::prelude::*;

use super::{Mode, ModuleInput, Probe};
use crate::batch::Rows;

impl<B: Backend> Probe<B> {
    /// a + b. Where only one of the two has a row per query, the other's rows are repeated.
    ///
    /// # Shapes
    /// - a, b: `[rows, …]`; a tensor of one row is broadcast
    pub fn add<const D: usize>(&self, a: Tensor<B, D>, b: Tensor<B, D>) -> Tensor<B, D> {
        let (a, b) = (self.joined("add", a), self.joined("add", b));
        let rows = a.dims()[0].max(b.dims()[0]);
        let (a, b) = (self.repeat(a, rows), self.repeat(b, rows));
        let (shape, row) = (a.dims(), b.dims());
        if shape[0] == row[0] || shape[1..] != row[1..] {
            return a + b;
        }
        // one row for all: some backends are ten times slower on more than two axes
        let flat = |x: Tensor<B, D>, [rows, n]: [usize; 2]| -> Tensor<B, 2> { x.reshape([rows, n]) };
        let n = shape[1..].iter().product();
        let mut all = shape;
        all[0] = rows;
        (flat(a, [shape[0], n]) + flat(b, [row[0], n])).reshape(all)
    }

    /// The tensors with equally many rows, repeated as in [`add`](Self::add).
    pub fn align<const D: usize, const N: usize>(&self, tensors: [Tensor<B, D>; N]) -> [Tensor<B, D>; N] {
        let tensors = tensors.map(|t| self.joined("align", t));
        let rows = tensors.iter().map(|t| t.dims()[0]).max().unwrap_or(0);
        tensors.map(|t| self.repeat(t, rows))
    }

    /// Concatenates along `dim`. Rows are repeated as in [`add`](Self::add), a single row for all
    /// rows.
    pub fn cat<const D: usize>(&self, parts: Vec<Tensor<B, D>>, dim: usize) -> Tensor<B, D> {
        let parts: Vec<_> = parts.into_iter().map(|p| self.joined("cat", p)).collect();
        let rows = parts.iter().map(|p| p.dims()[0]).max().unwrap_or(0);
        let parts = parts
            .into_iter()
            .map(|p| {
                let p = self.repeat(p, rows);
                let mut shape = p.dims();
                if shape[0] == rows {
                    return p;
                }
                shape[0] = rows;
                p.expand(shape)
            })
            .collect();
        Tensor::cat(parts, dim)
    }

    /// Runs attention with its queries `q` laid out to match keys and values of `context_rows`
    /// rows.
    ///
    /// There are two cases where the rows differ:
    /// - `q` has one row per example, keys and values one per forward query: the rows of `q` are
    ///   repeated.
    /// - keys and values have one row per example, `q` one per forward query: the forward queries
    ///   of an example become further tokens of its row. They share its keys and values instead of
    ///   copying them.
    ///
    /// # Shapes
    /// - q: `[rows, tokens, d]`
    /// - `attend`: `[context_rows, any, d]` → `[context_rows, any, d]`, each token on its own
    /// - returns: `[rows, tokens, d]`
    pub fn share_context(
        &self,
        q: Tensor<B, 3>,
        context_rows: usize,
        attend: impl FnOnce(Tensor<B, 3>) -> Tensor<B, 3>,
    ) -> Tensor<B, 3> {
        let q = self.joined("share_context", q);
        let q = self.repeat(q, context_rows);
        let [rows, tokens, d] = q.dims();
        let query = match &self.mode {
            Mode::Query(query) if context_rows != rows && context_rows == query.rows.groups.len() => query,
            _ => return attend(q),
        };
        let groups = &query.rows.groups;
        let most = groups.iter().map(|g| g.len()).max().unwrap_or(0);
        if groups.iter().all(|g| g.len() == most) {
            let out = attend(q.reshape([context_rows, most * tokens, d]));
            let d = out.dims()[2];
            return out.reshape([rows, tokens, d]);
        }
        // short groups are filled with copies of their first row; the results of the copies are
        // dropped
        let fill: Vec<usize> =
            groups.iter().flat_map(|g| (0..most).map(|i| if i < g.len() { g.start + i } else { g.start })).collect();
        let out = attend(q.rows(&fill).reshape([context_rows, most * tokens, d]));
        let d = out.dims()[2];
        let back: Vec<usize> =
            groups.iter().enumerate().flat_map(|(j, g)| (0..g.len()).map(move |i| j * most + i)).collect();
        out.reshape([context_rows * most, tokens, d]).rows(&back)
    }

    /// The input of a module, with the rows of its tensors repeated as in [`align`](Self::align).
    pub(super) fn align_input<I: ModuleInput<B>>(&self, input: I) -> I {
        if let Mode::Query(query) = &self.mode {
            let (rows, examples) = (query.rows.len(), query.rows.groups.len());
            let mut is_perturbed = false;
            input.shapes(&mut |shape| is_perturbed |= shape[0] == rows);
            return if is_perturbed && rows != examples { input.gather(examples, &query.rows.datum) } else { input };
        }
        if let Some(check) = &self.check {
            input.shapes(&mut |shape| {
                check.joined("module", shape);
            });
        }
        input
    }

    /// A tensor that is joined to others. In a pass that checks the row contract, one that breaks it
    /// is noted and cut to a single row, so that the pass ends and the fault is told.
    fn joined<const D: usize>(&self, method: &'static str, x: Tensor<B, D>) -> Tensor<B, D> {
        match &self.check {
            Some(check) if !check.joined(method, &x.dims()) && x.dims()[0] > 1 => x.narrow(0, 0, 1),
            _ => x,
        }
    }

    /// `x` with one row per query, where `rows` says so and `x` has one per example.
    pub(super) fn repeat<const D: usize>(&self, x: Tensor<B, D>, rows: usize) -> Tensor<B, D> {
        match &self.mode {
            Mode::Query(query) if rows == query.rows.len() => query.rows.repeat(x),
            _ => x,
        }
    }
}
