//! From losses of perturbed passes to gradients: ĝ = (1/B) Σ_j (1/A_j) Σ_q c_jq s(ε_jq) ∂.
//!
//! An estimate walks in three passes. The *clean* pass gives the losses ℓ_j and keeps the state in front of the first trained
//! stage. The *query* pass evaluates each datum under its A_j perturbations and leaves nothing but the coefficients
//! c_jq = (ℓ_jq − ℓ_j)/σ. The *update* pass draws the same noise again, sums c·s(ε) over the queries of each datum, and forms one
//! product with the clean input per datum, instead of one per query. Memory is that of `max_rows` rows, whatever the budget.
//!
//! Which weight a query has, what is dropped and what the variance of a datum is, is the same for every perturbation space and
//! written here; where the noise falls and how gradients follow from it has a file per space.

mod activation;
mod estimate;
pub(crate) mod low_rank;
mod parallel;
mod weights;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::prelude::*;
use serde::{Deserialize, Serialize};

use crate::batch::{Batch, Rows};
use crate::budget::Allocation;
use crate::error::Error;
use crate::feedback::{Observation, Prediction};
use crate::noise::device::makes_noise;
use crate::noise::{NoiseLaw, NoiseSource, Placement, Sampling, derive};
use crate::objective::{ForwardModel, even};
use crate::ops;
use crate::probe::{Gradients, Prefix, Probe, Stages};
pub use estimate::{Estimate, PassCost};
use parallel::on_device;
pub(crate) use parallel::{callers, in_order};

/// Where the noise falls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Space {
    /// On the outputs of the trained layers, independent for every query of every datum; needs layers called through the probe.
    Activation,
    /// On the trained parameters themselves, one direction for all data of a forward pass; works for any module (SPSA, MeZO, ES).
    Weights,
    /// On the weights of the trained layers, of this rank, independent for every query of every datum (EGGROLL); needs layers called
    /// through the probe.
    LowRank(usize),
}

impl Space {
    /// Every space.
    pub const ALL: [Self; 3] = [Self::Activation, Self::Weights, Self::LowRank(1)];

    /// Whether noise is independent between data, so that allocation pays; otherwise the data of a pass share it.
    pub fn is_independent(self) -> bool {
        self != Self::Weights
    }
}

impl std::fmt::Display for Space {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Activation => f.write_str("activation"),
            Self::Weights => f.write_str("weights"),
            Self::LowRank(rank) => write!(f, "lowrank:{rank}"),
        }
    }
}

impl std::str::FromStr for Space {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self, Error> {
        match s {
            "activation" => Ok(Self::Activation),
            "weights" => Ok(Self::Weights),
            _ => s.strip_prefix("lowrank:").and_then(|rank| rank.parse().ok()).map(Self::LowRank).ok_or_else(|| {
                Error::Unknown {
                    what: "perturbation space",
                    name: s.into(),
                    choices: "activation, weights, lowrank:R (of rank R)",
                }
            }),
        }
    }
}

/// A perturbation space, a noise law, and the limits a machine sets.
///
/// # Example
/// A gradient by hand, for research; training uses [`ForwardLearner`](crate::ForwardLearner).
/// ```
/// # use burn::{backend::{Autodiff, Flex}, module::AutodiffModule, nn, prelude::*};
/// # use flops_core::{ForwardModel, Probe, Batch, QueryBudget, Allocation, cross_entropy};
/// # use flops_core::estimator::{Estimator, Space, trained_parameters};
/// # #[derive(Module, Debug)]
/// # struct Model<B: Backend> { fc: nn::Linear<B> }
/// # impl<B: Backend> ForwardModel<B> for Model<B> {
/// #     type Input = Tensor<B, 2>; type Target = Tensor<B, 1, Int>; type Output = Tensor<B, 2>;
/// #     fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> { probe.linear(&self.fc, x) }
/// #     fn losses(&self, y: Tensor<B, 2>, t: Tensor<B, 1, Int>) -> Tensor<B, 1> { cross_entropy(y, t) }
/// # }
/// # let device = Default::default();
/// # let with_graph = Model::<Autodiff<Flex>> { fc: nn::LinearConfig::new(4, 3).init(&device) };
/// let trained = trained_parameters(&with_graph);
/// let model = with_graph.valid();
/// let batch = Batch { ids: vec![0, 1], input: Tensor::ones([2, 4], &device), target: Tensor::zeros([2], &device) };
/// let estimator = Estimator::new(Space::Activation);
/// let clean = estimator.clean(&model, &batch, &trained)?;
/// let allocation = Allocation::uniform(2, &QueryBudget::new(20, 1)?);
/// let estimate = estimator.estimate(&model, &batch, &trained, &clean, &allocation, 0)?;
/// assert_eq!(estimate.gradient(&model.fc.weight).unwrap().dims(), [4, 3]);
/// # Ok::<(), flops_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimator {
    /// Where the noise falls.
    pub space: Space,
    /// Law of the noise.
    pub noise: NoiseLaw,
    /// One-sided or antithetic.
    pub sampling: Sampling,
    /// On all layers at once or on one (activation space).
    pub placement: Placement,
    /// Smoothing scale σ > 0: standard deviation of the perturbation, in units of what is perturbed.
    pub sigma: f64,
    /// Seed of the noise.
    pub seed: u64,
    /// Rows of a forward pass at most, at least 2: it bounds the memory. On a CPU a pass has fewer where its layers would not fit the cache.
    pub max_rows: usize,
    /// Threads that evaluate chunks of queries, at least 1. The result does not depend on it.
    pub threads: usize,
}

/// Names of the trained parameters: those that require a gradient in a module of an autodiff backend.
///
/// Ask the module that burn-train holds, not its `valid()` one, where no parameter requires a gradient.
pub fn trained_parameters<B: Backend, M: Module<B>>(module: &M) -> Arc<HashSet<ParamId>> {
    struct Collect(HashSet<ParamId>);
    impl<B: Backend> ModuleVisitor<B> for Collect {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if param.is_require_grad() {
                self.0.insert(param.id);
            }
        }
    }
    let mut collect = Collect(HashSet::new());
    module.visit(&mut collect);
    Arc::new(collect.0)
}

/// What the clean pass leaves.
pub struct CleanPass<B: Backend, O, T> {
    /// Loss ℓ_j of each datum.
    pub losses: Vec<f64>,
    /// What the running estimates of the variances are kept by: the losses, unless the model [knows better](ForwardModel::difficulty).
    pub difficulty: Vec<f64>,
    /// What the model said.
    pub output: O,
    /// What the losses of the queries compare their outputs with: the batch's targets, [coupled](ForwardModel::couple) where the data meet in
    /// the loss.
    pub target: T,
    /// What it [offered](Probe::embed) as embeddings, `[batch, dim]`.
    pub embeddings: Option<Tensor<B, 2>>,
    /// Rows that went through the model, and the seconds they took.
    pub cost: PassCost,
    pub(crate) stages: Stages,
    /// Probability of each site under [`Placement::Single`] and [`Placement::Staged`]: equal, unless the caller knows better. They sum to
    /// one.
    pub site_probabilities: Vec<f64>,
    /// The part of a pass that a query on each site takes, in (0, 1], by the multiply-adds of the layers called through the probe.
    pub site_costs: Vec<f64>,
    /// Gradients predicted for the control variate (activation space); none, unless the caller has some.
    pub prediction: Option<Arc<Prediction>>,
    /// Trained parameters that were called through the probe.
    reached: HashSet<ParamId>,
    /// Of the trained parameters that are never perturbed, the gradients of the mean loss.
    exact: Vec<(ParamId, Tensor<B, 1>)>,
}

impl<B: Backend, O, T> CleanPass<B, O, T> {
    /// The trained parameters whose gradient is estimated.
    fn estimated(&self, trained: &Arc<HashSet<ParamId>>) -> Arc<HashSet<ParamId>> {
        match self.exact.is_empty() {
            true => trained.clone(),
            false => Arc::new(
                trained.iter().filter(|id| self.exact.iter().all(|(exact, _)| exact != *id)).copied().collect(),
            ),
        }
    }

    /// Whether every parameter whose gradient is estimated was called through the probe. One that was not may act in any stage: none can be
    /// skipped.
    pub(crate) fn reaches_all(&self, trained: &Arc<HashSet<ParamId>>) -> bool {
        self.estimated(trained).is_subset(&self.reached)
    }
}

/// What a space hands back from its query pass and needs again for the update.
pub(crate) struct Problem<'a, B: Backend, M: ForwardModel<B>> {
    pub model: &'a M,
    pub batch: &'a Batch<M::Input, M::Target>,
    pub target: &'a M::Target,
    pub trained: &'a Arc<HashSet<ParamId>>,
    pub stages: &'a Stages,
    pub allocation: &'a Allocation,
    pub noise: NoiseSource,
    pub prediction: Option<&'a Arc<Prediction>>,
    /// Of noise on weights of low rank.
    pub rank: Option<usize>,
    pub max_rows: usize,
    pub on_host: bool,
    pub threads: usize,
}

impl<B: Backend, M: ForwardModel<B>> Problem<'_, B, M> {
    /// Rows of a pass that begins behind the first `stages` stages.
    pub fn rows(&self, stages: usize) -> usize {
        if self.on_host { cached_rows(self.stages.width(stages), self.max_rows) } else { self.max_rows }
    }
}

/// Rows of a pass on the host: `max_rows`, but no more than leave the outputs of its layers, of at most `width` numbers a row (0 where that is not
/// known), in the cache; more of them would cost up to half the speed.
fn cached_rows(width: usize, max_rows: usize) -> usize {
    CACHED_NUMBERS.checked_div(width).map_or(max_rows, |rows| rows.max(MIN_ROWS).min(max_rows))
}

/// Numbers of a layer's output that are taken to fit a CPU's cache: 4 MiB in single precision.
const CACHED_NUMBERS: usize = 1 << 20;

/// Rows that a pass has even where fewer would fill the cache: enough for a matrix product to reach its speed.
const MIN_ROWS: usize = 4;

/// What a space forms from the weights of the queries.
pub(crate) struct Formed<B: Backend> {
    pub gradients: Gradients<B>,
    /// E‖∂_s‖²/(c²·E s²) of each datum at each site.
    pub energies: Vec<Vec<f64>>,
    /// Rows recorded for it.
    pub recorded: u64,
    /// What the estimates show of the control variate's regression.
    pub observed: Option<Observation>,
}

/// Weights of the queries of each datum and what follows from their losses.
struct Weighted {
    /// c_jq/(B·A_j), zero where dropped.
    weights: Vec<Vec<f64>>,
    /// (direction, c², queries) of each surviving direction: of a pair twice the squared half-difference for each of its two queries.
    squares: Vec<Vec<(u64, f64, u64)>>,
    survived: Vec<usize>,
    dropped: u64,
}

impl Estimator {
    /// Rademacher signs, one-sided, one site per direction, σ = 10⁻², 256 rows, one thread. Sampling and placement were picked by
    /// measurement (README); between signs, Gaussian and uniform noise it shows no difference, and signs are the cheapest to draw.
    pub fn new(space: Space) -> Self {
        Self {
            space,
            noise: NoiseLaw::Rademacher,
            sampling: Sampling::OneSided,
            placement: Placement::Single,
            sigma: 1e-2,
            seed: 0,
            max_rows: 256,
            threads: 1,
        }
    }

    /// Whether the settings are usable.
    ///
    /// # Errors
    /// [`Error::Setting`], naming the setting at fault.
    pub fn validate(&self) -> Result<(), Error> {
        let fail = |name, value: f64, remedy: &str| Err(Error::Setting { name, value, remedy: remedy.into() });
        if !(self.sigma.is_finite() && self.sigma > 0.0) {
            return fail("sigma", self.sigma, "use a positive number, such as 0.01");
        }
        if self.max_rows < 2 {
            return fail("max_rows", self.max_rows as f64, "use at least 2, the rows of an antithetic pair");
        }
        if self.threads == 0 {
            return fail("threads", 0.0, "use at least 1");
        }
        if self.space == Space::LowRank(0) {
            return fail("rank", 0.0, "use at least 1");
        }
        Ok(())
    }

    /// E s² of a perturbed coordinate.
    fn score_second_moment(&self) -> f64 {
        // products of entries have no usable score: noise of low rank is taken as it is
        if matches!(self.space, Space::LowRank(_)) { 1.0 } else { self.noise.score_second_moment() }
    }

    /// Rows of a pass over the data themselves: a fraction of `max_rows`, so that a batch is several chunks, for several callers; all of them on a device.
    pub(crate) fn clean_rows<B: Backend, M: Module<B>>(&self, model: &M) -> usize {
        if on_device::<B, M>(model) { self.max_rows } else { (self.max_rows / 8).max(8).min(self.max_rows) }
    }

    /// Whether a direction falls on one site alone.
    fn single(&self) -> bool {
        self.space.is_independent() && self.placement.on_one()
    }

    /// The clean pass: losses, output, embeddings, and the state in front of the first trained stage.
    ///
    /// # Errors
    /// Where settings are unusable, the batch is empty, or the model cannot answer.
    pub fn clean<B: Backend, M: ForwardModel<B>>(
        &self,
        model: &M,
        batch: &Batch<M::Input, M::Target>,
        trained: &Arc<HashSet<ParamId>>,
    ) -> Result<CleanPass<B, M::Output, M::Target>, Error> {
        self.clean_from(model, batch, trained, None)
    }

    /// [`clean`](Self::clean), from a prefix that an earlier epoch kept.
    pub(crate) fn clean_from<B: Backend, M: ForwardModel<B>>(
        &self,
        model: &M,
        batch: &Batch<M::Input, M::Target>,
        trained: &Arc<HashSet<ParamId>>,
        prefix: Option<Prefix>,
    ) -> Result<CleanPass<B, M::Output, M::Target>, Error> {
        self.validate()?;
        let n = batch.ids.len();
        if n == 0 {
            return Err(Error::EmptyBatch);
        }
        let start = Instant::now();
        let late = self.single();
        let width = even(n, self.clean_rows(model));
        let context = (model.clone(), batch.input.clone(), batch.target.clone(), prefix.clone());
        let work = |(model, input, target, prefix): &(M, M::Input, M::Target, Option<Prefix>), job: usize| {
            let index: Vec<usize> = (job * width..n.min((job + 1) * width)).collect();
            let mut probe = Probe::survey(trained.clone(), prefix.as_ref().map(|p| p.rows(&index)), late);
            let output = model.forward(input.rows(&index), &mut probe);
            let losses = counted(model.losses(output.clone(), target.rows(&index)), index.len())?;
            Ok((losses, output, probe.surveyed()))
        };
        let (mut outputs, mut stages, mut embeddings, mut losses) = (vec![], vec![], vec![], vec![]);
        let (mut reached, mut sites) = (HashSet::new(), 0);
        in_order(n.div_ceil(width), callers(model, self.threads), context, work, |_, (loss, output, surveyed)| {
            losses.push(loss);
            (reached, sites) = (surveyed.reached, surveyed.sites);
            outputs.push(output);
            stages.push(surveyed.stages);
            embeddings.extend(surveyed.embeddings);
        })?;
        answers(model)?;
        let output = M::Output::cat(outputs);
        let coupled = model.couple(&output, &batch.target);
        if let Some(target) = &coupled {
            losses = vec![counted(model.losses(output.clone(), target.clone()), n)?];
        }
        let losses = read(losses);
        let target = coupled.unwrap_or_else(|| batch.target.clone());
        let difficulty = match model.difficulty(&output, &target) {
            Some(difficulty) => read(vec![counted(difficulty, n)?]),
            None => losses.clone(),
        };
        let mut exact = model.exact_gradients(&output, &target);
        exact.retain(|(id, _)| trained.contains(id));
        let count = exact.iter().filter(|(id, _)| reached.contains(id)).count();
        if count > 0 {
            return Err(Error::ExactSites { count });
        }
        let embeddings = (!embeddings.is_empty()).then(|| Tensor::cat(embeddings, 0)).filter(|e| e.dims()[0] == n);
        let cost = PassCost { rows: n as u64, elapsed: start.elapsed(), largest: width as u64 };
        let stages = Stages::cat(stages, prefix);
        Ok(CleanPass {
            site_costs: (0..sites).map(|site| if late { stages.cost(site) } else { 1.0 }).collect(),
            losses,
            difficulty,
            output,
            target,
            embeddings,
            cost,
            stages,
            site_probabilities: vec![1.0 / sites.max(1) as f64; sites],
            prediction: None,
            reached,
            exact,
        })
    }

    /// The gradient of the mean loss of `batch`, estimated from `allocation`'s queries; `step` keys the noise.
    ///
    /// Unbiased for the gradient of the loss smoothed by the law (for Rademacher and uniform noise: exact for quadratic losses,
    /// a bias of O(σ²) otherwise; in the activation space all of them up to the O(σ²) of using the clean inputs), whatever the
    /// allocation, as long as it was fixed before this call.
    ///
    /// # Errors
    /// Where settings are unusable, no parameter is trained, a trained one is not called through the probe (activation space), or
    /// the model returns another number of losses than rows.
    pub fn estimate<B: Backend, M: ForwardModel<B>>(
        &self,
        model: &M,
        batch: &Batch<M::Input, M::Target>,
        trained: &Arc<HashSet<ParamId>>,
        clean: &CleanPass<B, M::Output, M::Target>,
        allocation: &Allocation,
        step: u64,
    ) -> Result<Estimate<B>, Error> {
        self.validate()?;
        let n = batch.ids.len();
        if allocation.counts().len() != n {
            return Err(Error::Length { name: "allocation", got: allocation.counts().len(), expected: n });
        }
        let estimated = &clean.estimated(trained);
        if estimated.is_empty() {
            return Err(Error::NothingTrained);
        }
        let missed = estimated.difference(&clean.reached).count();
        if self.space.is_independent() && missed > 0 {
            return Err(Error::NotSites { missed, trained: estimated.len() });
        }
        let no_stages = Stages::default();
        let stages = if missed == 0 { &clean.stages } else { &no_stages };
        // workers of a multi-device strategy share the step: the batch tells them apart
        let seed = derive(&[self.seed, batch.ids.first().copied().unwrap_or(0)]);
        let sites = self.single().then(|| clean.site_probabilities.clone().into());
        let spread = self.placement == Placement::Staged;
        let on_device = model.devices().first().is_some_and(makes_noise::<B>);
        let (law, sampling, sigma) = (self.noise, self.sampling, self.sigma);
        let noise = NoiseSource { law, sampling, sigma, seed, step, sites, spread, on_device };
        let problem = Problem {
            model,
            batch,
            target: &clean.target,
            trained: estimated,
            stages,
            allocation,
            noise,
            prediction: clean.prediction.as_ref().filter(|_| self.space == Space::Activation),
            rank: if let Space::LowRank(rank) = self.space { Some(rank) } else { None },
            max_rows: self.max_rows,
            on_host: model.devices().first().is_some_and(ops::is_host::<B>),
            threads: callers(model, self.threads),
        };
        let start = Instant::now();
        let (losses, largest) = match self.space {
            Space::Activation | Space::LowRank(_) => activation::losses(&problem)?,
            Space::Weights => weights::losses(&problem)?,
        };
        answers(model)?;
        let rows = losses.iter().map(|l| l.len() as u64).sum();
        let queries = PassCost { rows, elapsed: start.elapsed(), largest: largest as u64 };
        let weighted = self.weigh(&losses, &clean.losses);
        let start = Instant::now();
        let Formed { mut gradients, energies, recorded, observed } = match self.space {
            Space::Activation | Space::LowRank(_) => {
                activation::gradients(&problem, &weighted.weights, &weighted.survived)?
            }
            Space::Weights => weights::gradients(&problem, &weighted.weights)?,
        };
        clean.exact.iter().for_each(|(id, g)| gradients.add(*id, g.clone().cast(ops::working::<B>())));
        let (second_moments, site_moments) = self.moments(&problem.noise, &weighted, &energies);
        Ok(Estimate {
            gradients,
            second_moments,
            site_moments,
            observed,
            survived: weighted.survived,
            dropped: weighted.dropped,
            mixed: None,
            loss_spread: loss_spread(&losses, &clean.losses),
            queries,
            update: PassCost { rows: recorded, elapsed: start.elapsed(), largest: 0 },
        })
    }

    /// Second moments of single-query estimates per datum, and c²·E_s·E s² per site as (sum, queries).
    fn moments(&self, noise: &NoiseSource, weighted: &Weighted, energies: &[Vec<f64>]) -> (Vec<f64>, Vec<(f64, u64)>) {
        let s2 = self.score_second_moment();
        let mut sites = vec![(0.0, 0); noise.sites.as_ref().map_or(0, |p| p.len())];
        let data = weighted.squares.iter().zip(energies).zip(&weighted.survived).enumerate();
        let moments = data.map(|(j, ((squares, energies), &survived))| {
            let mut sum = 0.0;
            for &(direction, square, queries) in squares {
                sum += s2
                    * square
                    * match (noise.chosen(j as u64, direction), &noise.sites) {
                        (Some(site), Some(p)) => {
                            sites[site].0 += s2 * square * energies[site];
                            sites[site].1 += queries;
                            energies[site] / p[site].powi(2)
                        }
                        _ => energies.iter().sum(),
                    };
            }
            sum / survived as f64
        });
        let moments = moments.collect();
        (moments, sites)
    }

    /// c_jq/(B·A_j) from the losses. A direction with a non-finite loss goes whole, and A_j becomes the surviving count.
    fn weigh(&self, losses: &[Vec<f64>], clean: &[f64]) -> Weighted {
        let batch = losses.len() as f64;
        let group = self.sampling.group();
        let mut out = Weighted { weights: vec![], squares: vec![], survived: vec![], dropped: 0 };
        for (queried, &clean) in losses.iter().zip(clean) {
            let mut c: Vec<f64> = queried.iter().map(|l| (l - clean) / self.sigma).collect();
            let (mut survived, mut squares) = (0usize, vec![]);
            for (index, direction) in c.chunks_mut(group).enumerate() {
                if direction.iter().any(|c| !c.is_finite()) {
                    out.dropped += direction.len() as u64;
                    direction.fill(0.0);
                    continue;
                }
                survived += direction.len();
                let square = match &*direction {
                    // two queries, each of twice the pair's own second moment ((c₊ − c₋)/2)²
                    [plus, minus] => (*plus - *minus).powi(2),
                    one => one.iter().map(|c| c * c).sum(),
                };
                squares.push((index as u64, square, direction.len() as u64));
            }
            let scale = if survived > 0 { 1.0 / (batch * survived as f64) } else { 0.0 };
            c.iter_mut().for_each(|c| *c *= scale);
            out.weights.push(c);
            out.squares.push(squares);
            out.survived.push(survived);
        }
        out
    }
}

/// Standard deviation over queries of the mean change of loss, ℓ_jq − ℓ_j, of the data that have the query.
fn loss_spread(losses: &[Vec<f64>], clean: &[f64]) -> f64 {
    let queries = losses.iter().map(Vec::len).max().unwrap_or(0);
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let changes = |q: usize| {
        let changes = losses.iter().zip(clean).filter_map(move |(l, clean)| l.get(q).map(|l| l - clean));
        changes.filter(|change| change.is_finite()).collect::<Vec<_>>()
    };
    let means: Vec<f64> = (0..queries).map(|q| mean(&changes(q))).filter(|m| m.is_finite()).collect();
    if means.len() < 2 {
        return 0.0;
    }
    let centre = mean(&means);
    (means.iter().map(|m| (m - centre).powi(2)).sum::<f64>() / (means.len() - 1) as f64).sqrt()
}

/// Whether the model had an answer to all it was asked.
fn answers<B: Backend, M: ForwardModel<B>>(model: &M) -> Result<(), Error> {
    model.failure().map_or(Ok(()), |why| Err(Error::Model { why }))
}

/// The losses of a pass, if there is one for each row.
fn counted<B: Backend>(losses: Tensor<B, 1>, rows: usize) -> Result<Tensor<B, 1>, Error> {
    match losses.dims()[0] {
        got if got == rows => Ok(losses),
        got => Err(Error::Length { name: "losses returned by the model", got, expected: rows }),
    }
}

/// Numbers of several passes on the host, in turn: a device is waited for once.
fn read<B: Backend>(parts: Vec<Tensor<B, 1>>) -> Vec<f64> {
    if parts.is_empty() {
        return vec![];
    }
    Tensor::cat(parts, 0).into_data().iter::<f64>().collect()
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod theory;
