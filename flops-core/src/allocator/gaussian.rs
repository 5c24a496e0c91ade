//! The learned Gaussian allocator.

use std::cell::LazyCell;
use std::sync::Arc;

use burn::config::Config;
use burn::module::{Module, Param};
use burn::prelude::{Backend, Tensor};
use burn::tensor::{Distribution, TensorData};
use rand::Rng;
use rand::rngs::StdRng;

use super::allocation::Allocation;
use super::budget::QueryBudget;
use super::covariance::{Covariance, Distances};
use super::features::{DatumFeatures, Needs};
use super::likelihood_ratio::{Law, LearnedUpdate, Learning, LearningState, within};
use super::mean::{Design, MeanModel};
use super::params::{set_values, values};
use super::shown::Shown;
use super::traits::Allocator;
use crate::error::Error;
use crate::linalg::dot;
use crate::ops;
use crate::persist::Persist;

/// Bounds of β₀.
const BETA0: (f64, f64) = (0.0, 2.0);
/// Bounds of the other coefficients.
const BETA: (f64, f64) = (-4.0, 4.0);
/// Bounds of σ. `sigma_floor` raises the lower one.
const SIGMA: (f64, f64) = (1e-3, 0.5);
/// Bounds of γ. A larger γ would make the noise common to all examples, and the projection undoes
/// that.
const GAMMA: (f64, f64) = (0.1, 1.0);

/// Configuration of a [`GaussianAllocator`].
#[derive(Config, Debug)]
pub struct GaussianAllocatorConfig {
    /// The features in which the mean is linear. The paper uses [`MeanModel::Loss`].
    #[config(default = "MeanModel::Variance")]
    pub mean: MeanModel,
    /// Whether the allocation is a draw, as in the paper. Otherwise it is the mean's, which does not
    /// pay for exploring.
    #[config(default = false)]
    pub draws: bool,
    /// Likelihood-ratio updates of λ after a step. 0 freezes λ.
    #[config(default = 2)]
    pub updates_per_step: usize,
    /// Allocations drawn per update, at least 2.
    #[config(default = 32)]
    pub samples: usize,
    /// Learning rate of λ, in (0, 1].
    #[config(default = 0.015)]
    pub lr: f64,
    /// Initial σ, in units of A₀, from 0.001 to 0.5.
    #[config(default = 0.1)]
    pub sigma: f64,
    /// Lower bound of A₀·σ, in queries, from 0.001 to 1,000.
    ///
    /// Draws that differ by less than a query round to the same allocation. λ would learn nothing
    /// from them and drift.
    #[config(default = 1.0)]
    pub sigma_floor: f64,
    /// Initial γ, the length scale of the covariance, from 0.1 to 1.
    #[config(default = 0.5)]
    pub gamma: f64,
    /// The largest batch with an exact covariance. Larger ones use a low-rank covariance, whose
    /// cost is linear in the batch.
    #[config(default = 1024)]
    pub exact_up_to: usize,
    /// Rank of that covariance: the examples that all others are compared with, from 1 to 10,000.
    #[config(default = 64)]
    pub landmarks: usize,
}

impl GaussianAllocatorConfig {
    /// The paper's form.
    ///
    /// The mean follows only the losses, and the allocation is a draw.
    #[must_use]
    pub fn paper() -> Self {
        Self::new().with_mean(MeanModel::Loss).with_draws(true)
    }

    fn learning(&self) -> Learning {
        Learning { updates: self.updates_per_step, samples: self.samples, lr: self.lr }
    }

    /// Keeps λ within its bounds.
    fn clamp(&self, lambda: &mut [f64], budget: &QueryBudget) {
        let floor = (self.sigma_floor / budget.queries_per_datum() as f64).clamp(SIGMA.0, SIGMA.1);
        let betas = lambda.len() - 2;
        // coefficients of ranks are all bounded alike; otherwise β₀ has bounds of its own
        let level = if matches!(self.mean, MeanModel::Ranks(_)) { 0 } else { 1 };
        for (k, b) in lambda[..betas].iter_mut().enumerate() {
            let (low, high) = if k < level { BETA0 } else { BETA };
            *b = b.clamp(low, high);
        }
        lambda[betas] = lambda[betas].clamp(floor.ln(), SIGMA.1.ln());
        lambda[betas + 1] = lambda[betas + 1].clamp(GAMMA.0.ln(), GAMMA.1.ln());
    }

    /// Whether draws are made, to be followed or to learn from.
    fn needs_covariance(&self) -> bool {
        self.draws || self.updates_per_step > 0
    }

    fn is_paper(&self) -> bool {
        self.mean == MeanModel::Loss && self.draws
    }

    /// An allocator that has learned nothing yet.
    ///
    /// Its mean is the Neyman allocation by the estimated variances, β = (1, 0, 1). With another
    /// [`MeanModel`] than [`Variance`](MeanModel::Variance) it is the uniform allocation.
    ///
    /// # Errors
    /// If a setting is out of range.
    pub fn init<B: Backend>(&self, device: &B::Device) -> Result<GaussianAllocator<B>, Error> {
        within("sigma_floor", self.sigma_floor, (1e-3, 1e3))?;
        within("sigma", self.sigma, SIGMA)?;
        within("gamma", self.gamma, GAMMA)?;
        self.learning().validate()?;
        within("landmarks", self.landmarks as f64, (1.0, 1e4))?;
        let param = |values: &[f64]| {
            let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
            let n = values.len();
            Param::from_tensor(ops::from_host(values, [n], device))
        };
        Ok(GaussianAllocator {
            beta: param(&self.mean.start(1.0, 1.0)?),
            log_sigma: param(&[self.sigma.ln()]),
            log_gamma: param(&[self.gamma.ln()]),
            state: Persist::new(LearningState::default()),
            config: Configured(self.clone()),
        })
    }
}

/// Allocates from a Gaussian, whose mean and covariance it learns during training.
///
/// # The distribution
/// In units of A₀ the raw allocation is a ∼ N(μ, K), with
///
/// - μ_j = β₀ + β₁ φ_j + β₂ ψ_j. The φ_j are the losses, standardised within the batch, or zeros if
///   they are all equal. The ψ_j = √v_j/mean(√v) − 1 follow the estimates v_j of Tr Σ_j.
/// - K_ij = σ² (exp(−d_ij / 2γ²) + jitter·[i = j]), with d_ij the cosine distance of the
///   embeddings. Without embeddings d_ij = 1 for i ≠ j. The jitter keeps K positive definite when
///   examples repeat.
///
/// β = (1, 0, 1) is the Neyman allocation. The paper has no ψ, which is [`MeanModel::Loss`].
///
/// The queries A are the projection of A₀·a onto the budget, [`Allocation::project`]. It removes
/// what is common to all examples, so β₀ has no effect there. It is kept as part of the published
/// parameterisation.
///
/// # Learning
/// λ = (β, log σ, log γ) minimises E[J(A)], J(A) = Σ_j m_j / A_j, by the likelihood ratio:
///
/// ∇_λ E[J(A)] = E[J(A) ∇_λ ln P(a|λ)].
///
/// m_j are the second moments that the step's queries [showed](super::Shown). The draws a are
/// independent of them, so J is unbiased for the true variances, which the estimates v_j may miss.
/// The score is taken at the raw draw and J at its projection. The gradient is therefore unbiased,
/// although the projection has no derivative. The mean of the other samples' J is subtracted from
/// each J, and the difference is divided by their spread. Adam, with a learning rate of its own,
/// takes the step. Learning spends no query of the model.
///
/// The queries of a step are allocated before they show anything: by the λ that earlier steps left.
/// By default A is the projection of A₀·μ, and with `draws` of a draw, as in the paper.
///
/// # Cost
/// One update with M samples costs O(B³/6 + M·B²) on the host, for batches of up to 1,024 examples.
/// For larger ones K is a Nyström approximation from 64 examples of the batch, with an exact
/// diagonal. It costs O(64²·B + 64·M·B + M·B log B). [`Neyman`](super::Neyman) costs less than a
/// hundredth.
///
/// Paper: [FLOPS: Forward Learning with OPtimal Sampling](https://arxiv.org/abs/2410.05966),
/// section 4.3.
#[derive(Module, Debug)]
pub struct GaussianAllocator<B: Backend> {
    /// β, `[coefficients]`: (β₀, β₁, β₂) by default.
    pub beta: Param<Tensor<B, 1>>,
    /// log σ, `[1]`.
    pub log_sigma: Param<Tensor<B, 1>>,
    /// log γ, `[1]`.
    pub log_gamma: Param<Tensor<B, 1>>,
    state: Persist<B, LearningState>,
    #[module(skip)]
    config: Configured,
}

/// The configuration in a form that a field of a module can hold.
#[derive(Clone, Debug)]
struct Configured(GaussianAllocatorConfig);

impl<B: Backend> GaussianAllocator<B> {
    /// λ = (β, log σ, log γ).
    pub fn lambda(&self) -> Vec<f64> {
        [&self.beta, &self.log_sigma, &self.log_gamma].into_iter().flat_map(values).collect()
    }
}

impl<B: Backend> Allocator<B> for GaussianAllocator<B> {
    type Update = LearnedUpdate;

    fn allocate(
        &self,
        features: &DatumFeatures<'_>,
        budget: &QueryBudget,
        rng: &mut StdRng,
    ) -> Result<(Allocation, LearnedUpdate), Error> {
        features.validate()?;
        let (config, mut lambda) = (&self.config.0, self.lambda());
        config.mean.check(lambda.len() - 2)?;
        let design = config.mean.design(features)?;
        let (n, embeddings) = (design.batch_size(), features.embeddings.as_ref());
        // without embeddings and at rank 1 it costs nothing
        let (embeddings, exact) = if config.needs_covariance() { (embeddings, config.exact_up_to) } else { (None, 0) };
        let distances = Distances::new(n, embeddings, exact, config.landmarks);
        config.clamp(&mut lambda, budget);
        let law = Gaussian::new(&lambda, &design, |log_gamma| Covariance::new(&distances, log_gamma));
        let allocation = law.allocate(config.draws, budget, rng)?;
        drop(law);
        let (design, distances) = (Arc::new(design), Some(Arc::new(distances)));
        Ok((allocation, LearnedUpdate { design, distances, budget: *budget, seed: rng.next_u64() }))
    }

    fn apply(mut self, update: LearnedUpdate, shown: &Shown<'_>) -> Self {
        let (config, lambda) = (&self.config.0, self.lambda());
        let Some(distances) = update.distances.as_deref() else { return self };
        // a record or an allocator of another mean came between; the next allocation says so
        if [lambda.len() - 2, update.design.coefficients()].iter().any(|&n| config.mean.check(n).is_err()) {
            return self;
        }
        let design = &*update.design;
        let law = |l: &[f64]| Gaussian::new(l, design, |log_gamma| Covariance::new(distances, log_gamma));
        let bounds = |l: &mut [f64]| config.clamp(l, &update.budget);
        let start = (lambda, self.state.value.clone());
        // an allocation of finite features and bounded λ exists: there is no error to hear of
        let Ok((lambda, state)) = config.learning().learn(start, bounds, law, (&update, shown)) else { return self };
        let betas = lambda.len() - 2;
        self.beta = set_values(self.beta, &lambda[..betas]);
        self.log_sigma = set_values(self.log_sigma, &lambda[betas..=betas]);
        self.log_gamma = set_values(self.log_gamma, &lambda[betas + 1..]);
        self.state.value = state;
        self
    }

    fn needs(&self) -> Needs {
        Needs { embeddings: self.config.0.needs_covariance(), extra: self.config.0.mean.needs_features() }
    }

    fn name(&self) -> &'static str {
        if self.config.0.is_paper() { "gaussian-paper" } else { "gaussian" }
    }
}

/// N(μ, K) for one λ and one batch, K = σ² times a [`Covariance`].
///
/// A draw is given by its standard normals z.
struct Gaussian<'a> {
    design: &'a Design,
    mean: Vec<f64>,
    sigma: f64,
    /// Made when the first draw needs it. The mean needs none.
    covariance: LazyCell<Covariance, Box<dyn FnOnce() -> Covariance + 'a>>,
}

impl<'a> Gaussian<'a> {
    /// `covariance` makes the covariance from log γ.
    fn new(lambda: &[f64], design: &'a Design, covariance: impl FnOnce(f64) -> Covariance + 'a) -> Self {
        let (beta, rest) = lambda.split_at(lambda.len() - 2);
        let (mean, sigma, log_gamma) = (design.mean(beta), rest[0].exp(), rest[1]);
        Self { design, mean, sigma, covariance: LazyCell::new(Box::new(move || covariance(log_gamma))) }
    }

    /// a = μ + σ K^½ z.
    fn raw(&self, z: &[f64]) -> Vec<f64> {
        self.mean.iter().zip(self.covariance.colour(z)).map(|(m, x)| m + self.sigma * x).collect()
    }
}

impl Law for Gaussian<'_> {
    type Draw = Vec<f64>;

    fn draw(&self, rng: &mut StdRng) -> Vec<f64> {
        standard_normal(self.covariance.dim(), rng)
    }

    fn mean(&self, budget: &QueryBudget) -> Result<Allocation, Error> {
        nearest(&self.mean, budget)
    }

    fn allocation(&self, z: &Vec<f64>, budget: &QueryBudget) -> Result<Allocation, Error> {
        nearest(&self.raw(z), budget)
    }

    /// (Xᵀy/σ, xᵀy, ½ yᵀ ∂C/∂log γ y), with x = (a − μ)/σ, C = K/σ² and y = C⁻¹x.
    ///
    /// This leaves out the constant (0, −B, −½ tr C⁻¹ ∂C/∂log γ), which would cost O(B³).
    fn score(&self, z: &Vec<f64>) -> Vec<f64> {
        let (x, y) = self.covariance.whiten(z);
        let mut score = self.design.transpose_mul(&y);
        score.iter_mut().for_each(|s| *s /= self.sigma);
        score.push(dot(&x, &y));
        score.push(0.5 * self.covariance.curvature(&y));
        score
    }
}

/// The allocation nearest to A₀·a.
fn nearest(a: &[f64], budget: &QueryBudget) -> Result<Allocation, Error> {
    let scale = budget.queries_per_datum() as f64;
    let raw: Vec<f64> = a.iter().map(|a| a * scale).collect();
    Allocation::project(&raw, budget)
}

/// `n` standard normals.
pub(super) fn standard_normal(n: usize, rng: &mut StdRng) -> Vec<f64> {
    let data = TensorData::random::<f64, _, _>([n], Distribution::Normal(0.0, 1.0), rng);
    data.iter::<f64>().collect()
}

#[cfg(test)]
mod tests;
