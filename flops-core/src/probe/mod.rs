//! The handle that a model's layers are called through.
//!
//! One forward pass has five readings. *Inference* is the plain pass. The *tracing* pass of a step
//! keeps the state in front of the first trained stage. The *recording* pass keeps the clean inputs
//! of the trained layers of a few examples. The *query* adds noise to their outputs. The *pinned*
//! pass gives them the outputs of an earlier pass, to see whether parameters act anywhere else. The
//! model's code is the same in all five.

mod check;
mod examples;
mod gradients;
mod layer;
mod layers;
pub(crate) mod low_rank;
mod mask;
mod masking;
mod passes;
mod pinned;
mod prefix_cache;
mod query;
mod recorded;
mod rows;
mod site_key;
mod stages;
mod trace;

use std::collections::HashSet;
use std::sync::Arc;

use burn::module::ParamId;
use burn::prelude::*;

use crate::batch::Rows;
use crate::error::Error;
pub use check::check_site;
pub(crate) use examples::{PassExamples, StepKey};
pub use gradients::Gradients;
pub use layer::{Site, SquaredScoreNorm, WeightNoise};
pub(crate) use mask::TokenMask;
pub(crate) use passes::Passes;
pub(crate) use pinned::SiteOutputs;
pub use prefix_cache::PrefixCache;
pub(crate) use query::Query;
pub(crate) use recorded::Recorded;
pub use rows::QueryRows;
pub use site_key::{SiteKey, TracedSite};
use stages::unbox;
pub(crate) use stages::{Prefix, Stages};
use trace::RowCheck;
pub(crate) use trace::RowFault;

/// `id`, if its parameter is trained; for the closure of [`Probe::site`].
pub fn trained_id(trained: &HashSet<ParamId>, id: ParamId) -> Option<ParamId> {
    trained.contains(&id).then_some(id)
}

/// What the clean pass of a step finds.
pub(crate) struct Traced<B: Backend> {
    pub stages: Stages,
    pub embeddings: Option<Tensor<B, 2>>,
    /// The trained parameters that are sites.
    pub reached: HashSet<ParamId>,
    /// The sites, in order.
    pub sites: Vec<TracedSite>,
    /// The token mask of each site that follows one.
    pub masks: Vec<Option<TokenMask<B>>>,
    /// What the model did that no pass can do.
    pub fault: Option<Error>,
}

enum Mode<B: Backend> {
    Inference,
    Trace {
        embeddings: Option<Tensor<B, 2>>,
        reached: HashSet<ParamId>,
        sites: Vec<TracedSite>,
        masks: Vec<Option<TokenMask<B>>>,
        stages: Stages,
        late: bool,
    },
    Record {
        sites: Vec<Recorded<B>>,
    },
    Query(Query<B>),
    /// Keeps the outputs of the sites.
    Keep(SiteOutputs<B>),
    /// Gives the sites the outputs that were kept.
    Pinned(SiteOutputs<B>),
}

/// The handle that a model's layers are called through; see the [module](self).
///
/// Layers called through it are *sites*. In inference and in backpropagation
/// `probe.linear(&self.fc, x)` is `self.fc.forward(x)`. In a query of the activation space it adds
/// σ·ε to the output; in one of the low-rank space the layer's weights are perturbed. Every row has
/// noise of its own. Only layers with a trained parameter are perturbed.
///
/// # Rows
/// The first axis of every tensor is its rows: one per example, or a single one for what does not
/// depend on the input, such as a bare parameter `[1, tokens, d]`. Tokens stay on an axis of their
/// own. The clean pass of a step checks this at every trained layer, at the outputs of stages, and
/// at tensors that the methods below join. What breaks it is an [`Error`] that names
/// the parameter. Operations of the model's own are not seen: they panic as Burn does.
///
/// A tensor of a query has one row per example until something before it is perturbed, then one row
/// per query. Sites accept both. Where two tensors meet, use [`add`](Self::add), [`cat`](Self::cat)
/// or [`align`](Self::align): they repeat the rows of an example for its queries where needed. A
/// model without residual connections never notices.
pub struct Probe<B: Backend> {
    mode: Mode<B>,
    trained: Arc<HashSet<ParamId>>,
    prefix: Prefix,
    /// The examples of a training pass; none in inference.
    examples: Option<PassExamples>,
    /// The mask that holds for the sites to come.
    mask: Option<TokenMask<B>>,
    fault: Option<Error>,
    stage: usize,
    site: usize,
    /// Dropouts so far that dropped anything.
    dropouts: u64,
    /// Multiply-adds of a row so far.
    work: f64,
    /// Values of a row in the widest output of a layer in this stage.
    width: usize,
    /// The row contract, in passes that check it.
    check: Option<RowCheck>,
}

impl<B: Backend> Probe<B> {
    /// Inference, and the forward pass of backpropagation: every method is what its layer does.
    pub fn clean() -> Self {
        Self::new(Mode::Inference, Arc::default(), Prefix::empty())
    }

    /// Inference from a prefix on.
    pub(crate) fn resume(prefix: Prefix) -> Self {
        Self::new(Mode::Inference, Arc::default(), prefix)
    }

    /// The clean pass of a step, which keeps the output of the last stage before anything is
    /// trained.
    ///
    /// With `late` it keeps those of all later stages too, so that queries can start behind them.
    pub(crate) fn trace(trained: Arc<HashSet<ParamId>>, prefix: Option<Prefix>, late: bool) -> Self {
        let prefix = prefix.unwrap_or_else(Prefix::empty);
        let stages = Stages::behind(prefix.clone());
        Self::new(
            Mode::Trace { embeddings: None, reached: HashSet::new(), sites: vec![], masks: vec![], stages, late },
            trained,
            prefix,
        )
    }

    /// A clean pass of some examples that keeps what their gradients are products of.
    pub(crate) fn record(trained: Arc<HashSet<ParamId>>, prefix: Prefix) -> Self {
        Self::new(Mode::Record { sites: Vec::new() }, trained, prefix)
    }

    /// A perturbed pass.
    pub(crate) fn query(trained: Arc<HashSet<ParamId>>, prefix: Prefix, query: Query<B>) -> Self {
        Self::new(Mode::Query(query), trained, prefix)
    }

    /// A clean pass from the input on that keeps the outputs of all sites.
    pub(crate) fn keep(trained: Arc<HashSet<ParamId>>) -> Self {
        Self::new(Mode::Keep(SiteOutputs::default()), trained, Prefix::empty())
    }

    /// A pass from the input on in which every site has the output that was kept of it.
    pub(crate) fn pinned(trained: Arc<HashSet<ParamId>>, outputs: SiteOutputs<B>) -> Self {
        Self::new(Mode::Pinned(outputs), trained, Prefix::empty())
    }

    fn new(mode: Mode<B>, trained: Arc<HashSet<ParamId>>, prefix: Prefix) -> Self {
        Self {
            mode,
            trained,
            prefix,
            examples: None,
            mask: None,
            fault: None,
            check: None,
            stage: 0,
            site: 0,
            dropouts: 0,
            work: 0.0,
            width: 0,
        }
    }

    /// The same pass in training: [dropout](Self::dropout) drops values of these examples.
    pub(crate) fn with_examples(self, examples: PassExamples) -> Self {
        Self { examples: Some(examples), ..self }
    }

    /// Notes what no pass can do; the first such fault becomes the error of the step.
    fn fault(&mut self, fault: Error) {
        self.fault.get_or_insert(fault);
    }

    /// The first of these faults.
    pub(crate) fn take_fault(&mut self) -> Option<Error> {
        self.fault.take()
    }

    /// Checks the row contract in this pass of `rows` rows: that of stages, and with `sites` that of
    /// layers and of tensors that the probe joins.
    pub(crate) fn with_row_check(mut self, rows: usize, sites: bool) -> Self {
        self.check = Some(RowCheck::new(rows, sites));
        self
    }

    /// The first tensor that broke the row contract.
    pub(crate) fn row_fault(&self) -> Option<RowFault> {
        self.check.as_ref().and_then(RowCheck::fault)
    }

    /// The outputs of the sites of a pass that keeps them.
    pub(crate) fn kept(self) -> SiteOutputs<B> {
        match self.mode {
            Mode::Keep(outputs) => outputs,
            _ => SiteOutputs::default(),
        }
    }

    /// What the tracing pass found.
    pub(crate) fn traced(self) -> Traced<B> {
        match self.mode {
            Mode::Trace { embeddings, reached, sites, masks, mut stages, .. } => {
                stages.total = self.work;
                stages.tail = self.width;
                Traced { stages, embeddings, reached, sites, masks, fault: self.fault }
            }
            _ => Traced {
                stages: Stages::default(),
                embeddings: None,
                reached: HashSet::new(),
                sites: vec![],
                masks: vec![],
                fault: self.fault,
            },
        }
    }

    /// The stages of a tracing pass.
    pub(crate) fn into_stages(self) -> Option<Stages> {
        matches!(self.mode, Mode::Trace { .. }).then(|| self.traced().stages)
    }

    /// The sites of a recording pass, in order.
    pub(crate) fn recorded(self) -> Vec<Recorded<B>> {
        match self.mode {
            Mode::Record { sites } => sites,
            _ => Vec::new(),
        }
    }

    /// The part of each query's loss that the control variate predicts.
    pub(crate) fn explained(self) -> Vec<f64> {
        match self.mode {
            Mode::Query(query) => query.explained(),
            _ => Vec::new(),
        }
    }

    /// Runs a part of the forward pass, or returns its result from the clean pass of the step.
    ///
    /// A stage is the unit of reuse. Stages in front of the first trained layer run once per
    /// example instead of once per query. A query whose noise falls on a single site starts behind
    /// the last stage before that site.
    ///
    /// Stages follow one another in the same order in every pass, and are not nested. Nothing but a
    /// stage may happen between two stages that can be skipped.
    ///
    /// # Panics
    /// If the stages of a model differ from pass to pass.
    pub fn stage<S: Rows, T: Rows>(&mut self, input: S, run: impl FnOnce(S, &mut Self) -> T) -> T {
        let index = self.stage;
        self.stage += 1;
        if let (Some(state), Some(skipped)) = (&self.prefix.state, self.prefix.skipped.get(index)) {
            (self.site, self.dropouts) = (skipped.sites, skipped.dropouts);
            let last = index + 1 == self.prefix.skipped.len();
            return *unbox::<T>(if last { state } else { &skipped.row }.clone_box());
        }
        let output = run(input, self);
        // a stage without a row per example cannot be begun behind
        let fits = self.check.as_ref().is_none_or(|check| check.stage(output.check_rows(check.rows())));
        if let Mode::Trace { stages, late, .. } = &mut self.mode
            && (*late || self.site == 0)
            && fits
        {
            stages.total = self.work;
            stages.push(&output, (self.site, self.dropouts), self.width);
            self.width = 0;
        }
        output
    }

    /// Offers the allocator an embedding of each example, which the clean pass of a step keeps.
    ///
    /// # Shapes
    /// - embedding: `[rows, dim]`
    pub fn embed(&mut self, embedding: &Tensor<B, 2>) {
        self.embed_with(|| embedding.clone());
    }

    /// [`embed`](Self::embed) for an embedding that has to be computed: a query does not compute
    /// it.
    pub fn embed_with(&mut self, embedding: impl FnOnce() -> Tensor<B, 2>) {
        if let Mode::Trace { embeddings, .. } = &mut self.mode {
            *embeddings = Some(embedding());
        }
    }

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

    /// A tensor that is joined to others. In a pass that checks the row contract, one that breaks it
    /// is noted and cut to a single row, so that the pass ends and the fault is told.
    fn joined<const D: usize>(&self, method: &'static str, x: Tensor<B, D>) -> Tensor<B, D> {
        match &self.check {
            Some(check) if !check.joined(method, &x.dims()) && x.dims()[0] > 1 => x.narrow(0, 0, 1),
            _ => x,
        }
    }

    /// `x` with one row per query, where `rows` says so and `x` has one per example.
    fn repeat<const D: usize>(&self, x: Tensor<B, D>, rows: usize) -> Tensor<B, D> {
        match &self.mode {
            Mode::Query(query) if rows == query.rows.len() => query.rows.repeat(x),
            _ => x,
        }
    }

    /// Records the cost of a layer that is called through the probe.
    ///
    /// Costs decide where [cost-weighted placement](crate::Placement::CostWeighted) puts its
    /// queries, and how many rows of a pass fit the cache of a CPU. A layer that records none
    /// counts as free.
    ///
    /// - work: multiply-adds of a row
    /// - width: values of a row in the output
    pub fn record_cost(&mut self, work: usize, width: usize) {
        self.work += work as f64;
        self.width = self.width.max(width);
    }

    /// Whether any of the parameters is trained, in a pass that looks for sites.
    fn is_site(&self, parameters: &[ParamId]) -> bool {
        !matches!(self.mode, Mode::Inference) && parameters.iter().any(|id| self.trained.contains(id))
    }

    /// Notes a bare parameter that is not stored with one row.
    fn check_param(&self, id: ParamId, shape: &[usize]) {
        if let Some(check) = self.check.as_ref().filter(|_| self.is_site(&[id])) {
            check.param(id, shape);
        }
    }

    /// Makes the output of a layer a site; this is how a layer of your own joins (see [`Site`]).
    ///
    /// Returns the output, perturbed in a query. The closure makes the [`Site`] from the clean
    /// input. It is called in the recording pass. In the low-rank space it is called in every
    /// query, too: the input then has a row per example or one per query ([`QueryRows::repeat`]).
    /// Its argument holds the ids of the trained parameters, for [`trained_id`].
    ///
    /// # Shapes
    /// - output: `[rows, …]`, or `[1, …]` for what does not depend on the input
    /// - returns: the same, or `[queries, …]`
    pub fn site<S: Site<B>, const D: usize>(
        &mut self,
        parameters: &[ParamId],
        output: Tensor<B, D>,
        site: impl FnOnce(&HashSet<ParamId>) -> S,
    ) -> Tensor<B, D> {
        if !self.is_site(parameters) {
            return output;
        }
        let index = self.site;
        self.site += 1;
        if let Some(check) = &self.check {
            check.site(parameters, &output.dims());
        }
        let mask = self.mask.clone().filter(|mask| mask.covers(&output.dims()));
        match &mut self.mode {
            Mode::Inference => output,
            Mode::Trace { reached, sites, masks, .. } => {
                let shape = output.dims();
                let key = SiteKey::next(parameters, sites);
                sites.push(TracedSite { key, rows: shape[0], coordinates: shape[1..].iter().product() });
                masks.push(mask);
                reached.extend(parameters.iter().filter(|id| self.trained.contains(id)));
                output
            }
            Mode::Record { sites } => {
                let shape = output.dims();
                let (rows, coordinates) = (shape[0], shape[1..].iter().product());
                let tokens = (D > 2).then(|| shape[1]);
                let site = Box::new(site(&self.trained));
                sites.push(Recorded { site, rows, coordinates, tokens, mask, device: output.device() });
                output
            }
            Mode::Keep(outputs) => {
                outputs.keep(parameters, &output);
                output
            }
            Mode::Pinned(outputs) => outputs.pin(index, output),
            Mode::Query(query) if !query.falls_on(index) => output,
            Mode::Query(query) => match query.rank {
                Some(rank) => query.perturb_weights(index, output, &site(&self.trained), (rank, mask.as_ref())),
                None => query.perturb_output(index, output, mask.as_ref()),
            },
        }
    }
}
