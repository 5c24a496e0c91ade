//! The handle that a model's layers are called through.
//!
//! One forward pass has six readings. *Inference* is the plain pass. The *tracing* pass of a step
//! keeps the state in front of the first trained stage. The *recording* pass keeps the clean inputs
//! of the trained layers of a few examples. The *query* adds noise to their outputs. The *keeping*
//! pass keeps these outputs. The *pinned* pass gives them back, to see whether parameters act
//! anywhere else. The model's code is the same in all six.

mod check;
mod examples;
mod gradients;
mod joining;
mod layer;
mod layers;
mod layout;
pub(crate) mod low_rank;
mod mask;
mod masking;
mod module_input;
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
use burn::tensor::backend::DeviceId;

use crate::batch::Rows;
use crate::control_variate::PredictedRows;
use crate::error::Error;
pub use check::check_site;
pub(crate) use examples::{PassExamples, StepKey};
pub use gradients::Gradients;
pub use layer::{Site, SquaredScoreNorm, WeightNoise};
pub use layers::Lifted;
pub(crate) use layout::Layout;
pub(crate) use mask::TokenMask;
pub use module_input::ModuleInput;
pub(crate) use passes::Passes;
pub(crate) use pinned::SiteOutputs;
pub use prefix_cache::PrefixCache;
pub(crate) use query::Query;
pub(crate) use recorded::Recorded;
pub use rows::QueryRows;
use site_key::{Call, LayerId};
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
    /// What the model did that no pass can do; the baseline asks for it here.
    #[cfg_attr(not(feature = "train"), allow(dead_code))]
    pub fault: Option<Error>,
}

impl<B: Backend> Traced<B> {
    /// The same on another device.
    pub fn on_device(self, device: DeviceId) -> Self {
        let to = &B::Device::from_id(device);
        Self {
            stages: self.stages.on_device(device),
            embeddings: self.embeddings.map(|embeddings| embeddings.to_device(to)),
            masks: self.masks.into_iter().map(|mask| mask.map(|mask| mask.on(to))).collect(),
            ..self
        }
    }
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
/// own. The clean pass of a step checks this at the outputs of stages. Outside the weight space it
/// also does at every trained layer, and at tensors that the methods below join. What breaks it is
/// an [`Error`] that names the parameter, where there is one. Operations of the model's own are not
/// seen: they panic as Burn does.
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
    /// Tokens that stay apart from the others, which are alike; holds for the sites to come.
    alike: Option<usize>,
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
    /// Whether the pass takes the calls of a layer for one site, where noise falls on weights.
    by_layer: bool,
    /// The sites of the clean pass, in passes that follow it.
    expected: Arc<[TracedSite]>,
    /// The first site that is not the expected one.
    astray: Option<usize>,
}

impl<B: Backend> Probe<B> {
    /// Inference: every method is what its layer does, and dropout drops nothing.
    ///
    /// [`BackpropLearner`](crate::BackpropLearner) uses a probe of its own, which draws the masks.
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
            alike: None,
            fault: None,
            check: None,
            by_layer: false,
            expected: Arc::default(),
            astray: None,
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

    /// A pass that takes the calls of a layer for one site, where noise falls on its weights.
    pub(crate) fn with_sites_by_layer(self, by_layer: bool) -> Self {
        Self { by_layer, ..self }
    }

    /// A pass that follows a clean pass with these sites.
    pub(crate) fn with_expected(self, sites: Arc<[TracedSite]>) -> Self {
        Self { expected: sites, ..self }
    }

    /// Whether the pass, which has ended, had the expected sites.
    ///
    /// # Errors
    /// The number of the first site that differs, and the number of sites that there were.
    pub(crate) fn check_expected(&self) -> Result<(), (usize, usize)> {
        let short = (self.site < self.expected.len()).then_some(self.site);
        self.astray.or(short).map_or(Ok(()), |first| Err((first, self.site)))
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

    /// What the control variate predicts of each query.
    pub(crate) fn predicted(self) -> PredictedRows {
        match self.mode {
            Mode::Query(query) => query.predicted(),
            _ => PredictedRows::default(),
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
        // a stage without a row per example cannot be begun behind, nor can those after it
        let fits = self.check.as_ref().is_none_or(|check| check.stage(output.check_rows(check.rows())))
            && self.row_fault().is_none();
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

    /// Whether this pass makes the [`Site`] of a layer, from its clean input.
    ///
    /// A query of low rank makes one too, and asks for its weight noise alone.
    fn forms_sites(&self) -> bool {
        matches!(self.mode, Mode::Record { .. } | Mode::Keep(_))
    }

    /// Whether this pass makes sites, be it for their weight noise alone.
    fn makes_sites(&self) -> bool {
        self.forms_sites() || matches!(&self.mode, Mode::Query(query) if query.rank.is_some())
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

    /// The site of the next call of a layer.
    fn next_site(&mut self, layer: LayerId) -> Call {
        let (known, follows): (&[TracedSite], _) = match &self.mode {
            Mode::Trace { sites, .. } => (sites, false),
            _ => (&self.expected, !self.expected.is_empty()),
        };
        let call = Call::next(layer, known, self.site);
        if let Call::First(index) = call {
            let fits = known.get(index).is_some_and(|site| site.layer.has_parameters_of(layer));
            if follows && !fits {
                self.astray.get_or_insert(index);
            }
            self.site += 1;
        }
        call
    }

    /// Makes the output of a layer a site; this is how a layer of your own joins (see [`Site`]).
    ///
    /// Returns the output, perturbed in a query. The closure makes the [`Site`] from the clean
    /// input. It is called in the recording pass, and where a first step checks its sites. In the
    /// low-rank space it is called in every query, too: the input then has a row per example or one
    /// per query ([`QueryRows::repeat`]).
    /// Its argument holds the ids of the trained parameters, for [`trained_id`].
    ///
    /// A layer may be called several times in a pass, as in a recurrence. Noise on outputs is another
    /// for every call. Noise of low rank on weights is the same for all calls with the same parameters
    /// and the same type `S`: they are one site.
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
        if let Some(check) = &self.check {
            check.site(parameters, &output.dims());
        }
        let layer = LayerId::of::<S>(parameters);
        let (index, again) = match self.next_site(layer) {
            Call::First(index) => (index, false),
            Call::Again(index) => (index, true),
        };
        let mask = self.mask.clone().filter(|mask| mask.covers(&output.dims()));
        let layout = Layout::new(&output.dims(), self.alike, mask.is_some());
        match &mut self.mode {
            Mode::Inference => output,
            // the first call of a layer tells what there is to know
            Mode::Trace { .. } | Mode::Record { .. } if again => output,
            Mode::Trace { reached, sites, masks, .. } => {
                let mut traced = TracedSite::next((parameters, layer), sites, (output.dims()[0], layout));
                traced.is_layer = self.by_layer && site(&self.trained).weight_noise().is_some();
                sites.push(traced);
                masks.push(mask);
                reached.extend(parameters.iter().filter(|id| self.trained.contains(id)));
                output
            }
            Mode::Record { sites } => {
                let shape = output.dims();
                let tokens = (D > 2).then(|| shape[1]);
                let (site, device) = (Box::new(site(&self.trained)), output.device());
                sites.push(Recorded { site, rows: shape[0], coordinates: layout.len(), tokens, mask, layout, device });
                output
            }
            Mode::Keep(outputs) => {
                let site = site(&self.trained);
                let is_layer = self.by_layer && site.weight_noise().is_some();
                outputs.keep((parameters, layer, is_layer), &output, &site);
                output
            }
            Mode::Pinned(outputs) => outputs.pin(index, output),
            Mode::Query(query) if !query.falls_on(index) => output,
            Mode::Query(query) => match query.rank {
                Some(rank) => query.perturb_weights(index, output, &site(&self.trained), (rank, mask.as_ref())),
                None => query.perturb_output(index, output, mask.as_ref(), layout),
            },
        }
    }
}
