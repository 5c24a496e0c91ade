//! The handle that a model's layers are called through.
//!
//! One forward pass, four readings of it: plain inference; the *survey* of a step, which keeps the state in front of the first
//! trained stage; the *record*, which keeps the clean inputs of the trained layers of a few data; and the *query*, which adds noise
//! to their outputs. The model's code is the same in all four.

mod cache;
mod site;
mod stages;

use std::collections::HashSet;
use std::sync::Arc;

use burn::module::{Param, ParamId};
use burn::nn::conv::Conv2d;
use burn::nn::{Embedding, LayerNorm, Linear};
use burn::prelude::*;

use crate::batch::Rows;
use crate::estimator::low_rank;
use crate::feedback::Prediction;
use crate::noise::{NoiseSource, RowKey, device};
use crate::ops;
pub(crate) use cache::PrefixCache;
pub(crate) use site::{Energy, Gradients, Site, SiteInput};
use stages::unbox;
pub(crate) use stages::{Prefix, Stages};

/// The rows of a chunk of queries: some data of the batch, each with a range of its queries.
#[derive(Clone, Debug)]
pub(crate) struct QueryRows {
    /// Rows of each datum, in turn.
    pub groups: Vec<std::ops::Range<usize>>,
    /// Which noise falls on each row.
    pub keys: Vec<RowKey>,
    /// The datum of the chunk that each row belongs to.
    pub datum: Vec<usize>,
}

impl QueryRows {
    /// Data `positions` of the batch, datum i with the queries `queries[i]`.
    pub fn new<Q: IntoIterator<Item = usize>>(positions: &[usize], queries: impl IntoIterator<Item = Q>) -> Self {
        let (mut groups, mut keys, mut datum) = (Vec::new(), Vec::new(), Vec::new());
        for (i, (&position, queries)) in positions.iter().zip(queries).enumerate() {
            let start = keys.len();
            keys.extend(queries.into_iter().map(|query| RowKey { position: position as u64, query }));
            datum.resize(keys.len(), i);
            groups.push(start..keys.len());
        }
        Self { groups, keys, datum }
    }
}

/// What a perturbed pass needs to know.
pub(crate) struct Query<B: Backend> {
    rows: Arc<QueryRows>,
    noise: NoiseSource,
    prediction: Option<Arc<Prediction>>,
    /// Of each row's loss, what the prediction explains.
    explained: Vec<f64>,
    /// Rank of noise on weights; noise falls on outputs where there is none.
    rank: Option<usize>,
    /// The rows' noise that their device makes, of which the sites take theirs in turn.
    numbers: Option<device::Numbers<B>>,
}

impl<B: Backend> Query<B> {
    pub fn new(
        rows: Arc<QueryRows>,
        noise: NoiseSource,
        prediction: Option<Arc<Prediction>>,
        rank: Option<usize>,
    ) -> Self {
        let explained = vec![0.0; rows.keys.len()];
        Self { rows, noise, prediction, explained, rank, numbers: None }
    }
}

/// What the clean pass of a step finds.
pub(crate) struct Surveyed<B: Backend> {
    pub stages: Stages,
    pub embeddings: Option<Tensor<B, 2>>,
    /// The trained parameters that are sites.
    pub reached: HashSet<ParamId>,
    pub sites: usize,
}

enum Mode<B: Backend> {
    Plain,
    Survey { embeddings: Option<Tensor<B, 2>>, reached: HashSet<ParamId>, stages: Stages, late: bool },
    Record { sites: Vec<Site<B>> },
    Query(Query<B>),
}

/// The handle that a model's layers are called through; see the [module](self).
///
/// Layers called through it are *sites*: `probe.linear(&self.fc, x)` is `self.fc.forward(x)` in inference and in backpropagation,
/// and the same plus σ·ε, a noise of its own for every row, in a query. Only layers with a trained parameter are perturbed.
///
/// In a query, tensors have either one row per datum, as long as nothing before them was perturbed, or one row per query.
/// Sites accept both. Where two tensors meet, use [`add`](Self::add), [`cat`](Self::cat) or [`align`](Self::align) of the probe, which repeat the rows of a
/// datum for its queries where needed; a model without residual connections never notices.
pub struct Probe<B: Backend> {
    mode: Mode<B>,
    trained: Arc<HashSet<ParamId>>,
    prefix: Prefix,
    stage: usize,
    site: usize,
    /// Multiply-adds of a row so far.
    work: f64,
    /// Numbers of a row in the widest output of a layer in this stage.
    width: usize,
}

impl<B: Backend> Probe<B> {
    /// Plain inference, and the forward pass of backpropagation: every method is what its layer does.
    pub fn clean() -> Self {
        Self::new(Mode::Plain, Arc::default(), Prefix::empty())
    }

    /// Plain inference from a prefix on.
    pub(crate) fn resume(prefix: Prefix) -> Self {
        Self::new(Mode::Plain, Arc::default(), prefix)
    }

    /// The clean pass of a step, which keeps what the stages return: the last one before anything is trained, and, where queries
    /// are to start `late`, all from there on.
    pub(crate) fn survey(trained: Arc<HashSet<ParamId>>, prefix: Option<Prefix>, late: bool) -> Self {
        let prefix = prefix.unwrap_or_else(Prefix::empty);
        let stages = Stages::behind(prefix.clone());
        Self::new(Mode::Survey { embeddings: None, reached: HashSet::new(), stages, late }, trained, prefix)
    }

    /// The clean pass of some data that keeps what their gradients are products of.
    pub(crate) fn record(trained: Arc<HashSet<ParamId>>, prefix: Prefix) -> Self {
        Self::new(Mode::Record { sites: Vec::new() }, trained, prefix)
    }

    /// A perturbed pass.
    pub(crate) fn query(trained: Arc<HashSet<ParamId>>, prefix: Prefix, query: Query<B>) -> Self {
        Self::new(Mode::Query(query), trained, prefix)
    }

    fn new(mode: Mode<B>, trained: Arc<HashSet<ParamId>>, prefix: Prefix) -> Self {
        Self { mode, trained, prefix, stage: 0, site: 0, work: 0.0, width: 0 }
    }

    /// What the survey found.
    pub(crate) fn surveyed(self) -> Surveyed<B> {
        let sites = self.site;
        match self.mode {
            Mode::Survey { embeddings, reached, mut stages, .. } => {
                stages.total = self.work;
                stages.tail = self.width;
                Surveyed { stages, embeddings, reached, sites }
            }
            _ => Surveyed { stages: Stages::default(), embeddings: None, reached: HashSet::new(), sites },
        }
    }

    /// The sites that were recorded, in order.
    pub(crate) fn recorded(self) -> Vec<Site<B>> {
        match self.mode {
            Mode::Record { sites } => sites,
            _ => Vec::new(),
        }
    }

    /// Of the loss of each row of a query, the change that the control variate predicts.
    pub(crate) fn explained(self) -> Vec<f64> {
        match self.mode {
            Mode::Query(query) => query.explained,
            _ => Vec::new(),
        }
    }

    /// Runs a named part of the forward pass, or, where nothing in it or before it is trained, hands back what it gave in the
    /// clean pass of the step.
    ///
    /// A stage is the unit of reuse: with a scope of the last blocks, the stages before them run once per datum instead of
    /// once per query; and a query whose noise falls on one site alone starts behind the last stage before it. Stages follow one another in the same order in every pass, and are not nested; nothing but a stage may
    /// happen between two stages that can be skipped.
    ///
    /// # Panics
    /// Where a model's stages differ from pass to pass.
    pub fn stage<S: Rows, T: Rows>(&mut self, input: S, run: impl FnOnce(S, &mut Self) -> T) -> T {
        let index = self.stage;
        self.stage += 1;
        if let (Some(state), Some(skipped)) = (&self.prefix.state, self.prefix.skipped.get(index)) {
            self.site = skipped.sites;
            let last = index + 1 == self.prefix.skipped.len();
            return *unbox::<T>(if last { state } else { &skipped.row }.clone_box());
        }
        let output = run(input, self);
        if let Mode::Survey { stages, late, .. } = &mut self.mode
            && (*late || self.site == 0)
        {
            stages.total = self.work;
            stages.push(&output, self.site, self.width);
            self.width = 0;
        }
        output
    }

    /// Offers the allocator an embedding of each datum, `[rows, dim]`; only the clean pass of a step looks at it.
    pub fn embed(&mut self, embedding: &Tensor<B, 2>) {
        self.embed_with(|| embedding.clone());
    }

    /// The same for one that has to be made first: in a query it is not.
    pub fn embed_with(&mut self, embedding: impl FnOnce() -> Tensor<B, 2>) {
        if let Mode::Survey { embeddings, .. } = &mut self.mode {
            *embeddings = Some(embedding());
        }
    }

    /// A linear layer as a site.
    ///
    /// Gradient of a query: xᵀ(c·s(ε)) for the weight, Σ c·s(ε) over the tokens for the bias, with the clean x.
    ///
    /// # Shapes
    /// - x: `[rows, …, d_in]`
    /// - returns: `[rows, …, d_out]`
    pub fn linear<const D: usize>(&mut self, layer: &Linear<B>, x: Tensor<B, D>) -> Tensor<B, D> {
        let [d_in, d_out] = layer.weight.dims();
        let mut shape = x.dims();
        shape[D - 1] = d_out;
        let tokens: usize = shape[..D - 1].iter().product();
        self.does(tokens / shape[0].max(1) * d_in * d_out, tokens / shape[0].max(1) * d_out);
        // one matrix product: some backends are three times slower on more than two axes
        let flat: Tensor<B, 2> = x.reshape([tokens, d_in]);
        let y = layer.forward(flat.clone()).reshape(shape);
        self.site(Some(layer.weight.id), layer.bias.as_ref().map(|b| b.id), y, || SiteInput::Linear { x: flat })
    }

    /// A layer normalisation as a site: noise on its output reaches its scale γ and shift β.
    ///
    /// # Shapes
    /// - x: `[rows, …, d]`
    /// - returns: `[rows, …, d]`
    pub fn layer_norm<const D: usize>(&mut self, layer: &LayerNorm<B>, x: Tensor<B, D>) -> Tensor<B, D> {
        let (gamma, beta) = (layer.gamma.id, layer.beta.as_ref().map(|b| b.id));
        if !self.is_site(Some(gamma), beta) {
            return layer.forward(x);
        }
        let y = layer.forward(x.clone());
        self.site(Some(gamma), beta, y, || SiteInput::norm(layer, x))
    }

    /// A convolution (any stride, padding and dilation; one group) as a site.
    ///
    /// With more than one group the layer runs, but is no site: its gradient is not estimated.
    ///
    /// # Shapes
    /// - x: `[rows, channels_in, height, width]`
    /// - returns: `[rows, channels_out, height_out, width_out]`
    pub fn conv2d(&mut self, layer: &Conv2d<B>, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let y = layer.forward(x.clone());
        let [_, channels, kh, kw] = layer.weight.dims();
        let width = y.dims()[1..].iter().product::<usize>();
        self.does(width * channels * kh * kw, width);
        if layer.groups != 1 {
            return y;
        }
        self.site(Some(layer.weight.id), layer.bias.as_ref().map(|b| b.id), y, || SiteInput::conv(layer, x))
    }

    /// An embedding table as a site: the gradient of a looked-up row goes to that row of the table.
    ///
    /// # Shapes
    /// - ids: `[rows, tokens]`
    /// - returns: `[rows, tokens, d]`
    pub fn embedding(&mut self, layer: &Embedding<B>, ids: Tensor<B, 2, Int>) -> Tensor<B, 3> {
        let y = layer.forward(ids.clone());
        self.site(Some(layer.weight.id), None, y, || SiteInput::Embedding { ids, table: layer.weight.val() })
    }

    /// A bare parameter (class token, positional embedding, prompt) as a site.
    ///
    /// Clean, it has the one row it is stored with; perturbed, one row per query. Join it by [`add`](Self::add) or
    /// [`cat`](Self::cat).
    ///
    /// # Shapes
    /// - param: `[1, …]`
    /// - returns: `[1 or rows, …]`
    pub fn param<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) -> Tensor<B, D> {
        self.site(Some(param.id), None, param.val(), || SiteInput::Parameter)
    }

    /// a + b, the rows of a datum repeated for its queries where only one of the two has a row per query.
    pub fn add<const D: usize>(&self, a: Tensor<B, D>, b: Tensor<B, D>) -> Tensor<B, D> {
        let rows = a.dims()[0].max(b.dims()[0]);
        let (a, b) = (self.repeat_data(a, rows), self.repeat_data(b, rows));
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

    /// All tensors with the rows of the one that has most, rows repeated as in [`add`](Self::add).
    pub fn align<const D: usize, const N: usize>(&self, tensors: [Tensor<B, D>; N]) -> [Tensor<B, D>; N] {
        let rows = tensors.iter().map(|t| t.dims()[0]).max().unwrap_or(0);
        tensors.map(|t| self.repeat_data(t, rows))
    }

    /// Concatenation along `dim`, rows repeated as in [`add`](Self::add); a tensor of one row is repeated for all.
    pub fn cat<const D: usize>(&self, parts: Vec<Tensor<B, D>>, dim: usize) -> Tensor<B, D> {
        let rows = parts.iter().map(|p| p.dims()[0]).max().unwrap_or(0);
        let parts = parts
            .into_iter()
            .map(|p| {
                let p = self.repeat_data(p, rows);
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

    /// Runs `attend` on the queries of attention laid out to match keys and values of `context_rows` rows.
    ///
    /// Where `q` has one row per datum while keys and values have one per forward query, its rows are repeated. Where it is the
    /// other way round, the forward queries of a datum become further tokens of its row: they share its keys and values instead of
    /// copying them.
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
        let q = self.repeat_data(q, context_rows);
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
        // short groups are filled up with copies of their first row, whose results are not looked at
        let fill: Vec<usize> =
            groups.iter().flat_map(|g| (0..most).map(|i| if i < g.len() { g.start + i } else { g.start })).collect();
        let out = attend(q.rows(&fill).reshape([context_rows, most * tokens, d]));
        let d = out.dims()[2];
        let back: Vec<usize> =
            groups.iter().enumerate().flat_map(|(j, g)| (0..g.len()).map(move |i| j * most + i)).collect();
        out.reshape([context_rows * most, tokens, d]).rows(&back)
    }

    /// `x` with one row per query, where `rows` says so and `x` has one per datum.
    fn repeat_data<const D: usize>(&self, x: Tensor<B, D>, rows: usize) -> Tensor<B, D> {
        match &self.mode {
            Mode::Query(q)
                if rows == q.rows.keys.len() && x.dims()[0] == q.rows.groups.len() && x.dims()[0] != rows =>
            {
                x.rows(&q.rows.datum)
            }
            _ => x,
        }
    }

    /// Takes note of a layer, by the multiply-adds of a row and the numbers it gives.
    fn does(&mut self, work: usize, width: usize) {
        self.work += work as f64;
        self.width = self.width.max(width);
    }

    fn is_site(&self, weight: Option<ParamId>, bias: Option<ParamId>) -> bool {
        !matches!(self.mode, Mode::Plain) && [weight, bias].into_iter().flatten().any(|id| self.trained.contains(&id))
    }

    /// The output of a layer, perturbed in a query; its input, kept in a record.
    fn site<const D: usize>(
        &mut self,
        weight: Option<ParamId>,
        bias: Option<ParamId>,
        y: Tensor<B, D>,
        input: impl FnOnce() -> SiteInput<B>,
    ) -> Tensor<B, D> {
        if !self.is_site(weight, bias) {
            return y;
        }
        let index = self.site;
        self.site += 1;
        let keep = |id: Option<ParamId>| id.filter(|id| self.trained.contains(id));
        match &mut self.mode {
            Mode::Plain => y,
            Mode::Survey { reached, .. } => {
                reached.extend([keep(weight), keep(bias)].into_iter().flatten());
                y
            }
            Mode::Record { sites } => {
                sites.push(Site {
                    weight: keep(weight),
                    bias: keep(bias),
                    shape: y.dims().to_vec(),
                    device: y.device(),
                    input: input().working(),
                });
                y
            }
            Mode::Query(query) => {
                let rows = query.rows.clone();
                if !query.noise.falls_on(index, &rows.keys) {
                    return y;
                }
                if let Some(rank) = query.rank {
                    let trained = (keep(weight).is_some(), keep(bias).is_some());
                    return low_rank::perturb(y, input(), trained, rank, (index, &query.noise), &rows);
                }
                let mut shape = y.dims();
                let given = shape[0];
                shape[0] = rows.keys.len();
                let y = if given == shape[0] {
                    y
                } else if given == rows.groups.len() {
                    y.rows(&rows.datum)
                } else {
                    y // a bare parameter: one row for all, added by broadcasting
                };
                let (noise, prediction, explained) = (&query.noise, &query.prediction, &mut query.explained);
                let len = shape[1..].iter().product();
                if noise.made_by_device(len, prediction.as_deref()) {
                    let device = y.device();
                    let of_rows = || noise.of_rows(index, &rows.keys, &device);
                    return noise.numbers(&mut query.numbers, of_rows).add(y, shape);
                }
                ops::add_numbers(y, shape, |values| {
                    noise.perturb(index, &rows.keys, len, |r, start, noise| {
                        values[r * len + start..].iter_mut().zip(noise).for_each(|(v, e)| *v += e);
                        if let Some(prediction) = prediction {
                            explained[r] += prediction.explain(index, rows.keys[r], len, start, noise);
                        }
                    });
                })
            }
        }
    }
}
