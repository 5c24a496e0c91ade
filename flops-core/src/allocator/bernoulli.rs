//! The learned Bernoulli allocator.

use std::sync::Arc;

use burn::config::Config;
use burn::module::{Module, Param};
use burn::prelude::{Backend, Tensor};
use rand::Rng;
use rand::rngs::StdRng;
use rand_distr::{Binomial, Distribution};

use super::allocation::Allocation;
use super::budget::QueryBudget;
use super::features::{DatumFeatures, Needs};
use super::likelihood_ratio::{Law, LearnedUpdate, Learning, LearningState, within};
use super::mean::{Design, MeanModel};
use super::params::{set_values, values};
use super::shown::Shown;
use super::traits::Allocator;
use crate::error::Error;
use crate::ops;
use crate::persist::Persist;

/// Bounds of every coefficient of the logit.
const LOGIT: (f64, f64) = (-8.0, 8.0);

/// Configuration of a [`BernoulliAllocator`].
#[derive(Config, Debug)]
pub struct BernoulliAllocatorConfig {
    /// The features in which the logit is linear.
    #[config(default = "MeanModel::Loss")]
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
    #[config(default = 0.05)]
    pub lr: f64,
    /// Initial probability to keep a query, the same for all examples, from 0.001 to 0.999.
    #[config(default = 0.7)]
    pub keep: f64,
}

impl BernoulliAllocatorConfig {
    /// An allocator that has learned nothing yet. All examples keep queries with equal probability.
    ///
    /// # Errors
    /// If a setting is out of range.
    pub fn init<B: Backend>(&self, device: &B::Device) -> Result<BernoulliAllocator<B>, Error> {
        within("keep", self.keep, (1e-3, 0.999))?;
        let learning = Learning { updates: self.updates_per_step, samples: self.samples, lr: self.lr };
        learning.validate()?;
        let beta: Vec<f32> =
            self.mean.start((self.keep / (1.0 - self.keep)).ln(), 0.0)?.into_iter().map(|b| b as f32).collect();
        let n = beta.len();
        Ok(BernoulliAllocator {
            beta: Param::from_tensor(ops::from_host(beta, [n], device)),
            state: Persist::new(LearningState::default()),
            mean: self.mean,
            draws: self.draws,
            learning,
        })
    }
}

/// Each example gives up queries with a learned probability, and those who keep theirs share them.
///
/// # The distribution
/// An example has A_min queries for certain. It keeps each of the other A₀ − A_min independently,
/// with probability p_j = 1/(1 + exp(−β₀ − β₁φ_j)). φ are the losses standardised within the batch;
/// [`MeanModel`] has other choices. K_j is the number that example j keeps.
///
/// All B(A₀ − A_min) are shared in proportion to what was kept: A_j = A_min + B(A₀ − A_min)·K_j/ΣK.
/// Rounding by largest remainders meets the budget exactly. If nothing was kept, the shares are
/// equal. The largest ratio of two shares is not bounded by A₀, because small p_j can have any
/// ratio. By default the mean of K is shared, (A₀ − A_min)·p_j, and with `draws` a draw.
///
/// # Learning
/// λ = β minimises E[J(A)], J(A) = Σ_j m_j / A_j, by the likelihood ratio. m_j are the second
/// moments that the step's queries [showed](super::Shown). The score is
///
/// ∂ ln P/∂β = Σ_j (K_j − (A₀ − A_min)·p_j)·x_j.
///
/// Gradient and optimizer are those of the [Gaussian allocator](super::GaussianAllocator). No
/// covariance is needed: an update with M samples costs O(M·B) plus the rounding.
///
/// Paper: [FLOPS: Forward Learning with OPtimal Sampling](https://arxiv.org/abs/2410.05966),
/// section 4. There an example keeps or loses half of its queries at once. Here each query is kept
/// or lost on its own, and the probability is learned.
#[derive(Module, Debug)]
pub struct BernoulliAllocator<B: Backend> {
    /// β, `[coefficients]`: (β₀, β₁) by default.
    pub beta: Param<Tensor<B, 1>>,
    state: Persist<B, LearningState>,
    #[module(skip)]
    mean: MeanModel,
    #[module(skip)]
    draws: bool,
    #[module(skip)]
    learning: Learning,
}

impl<B: Backend> BernoulliAllocator<B> {
    /// λ = β.
    pub fn lambda(&self) -> Vec<f64> {
        values(&self.beta)
    }
}

impl<B: Backend> Allocator<B> for BernoulliAllocator<B> {
    type Update = LearnedUpdate;

    fn allocate(
        &self,
        features: &DatumFeatures<'_>,
        budget: &QueryBudget,
        rng: &mut StdRng,
    ) -> Result<(Allocation, LearnedUpdate), Error> {
        features.validate()?;
        self.mean.check(self.beta.val().dims()[0])?;
        let design = self.mean.design(features)?;
        let mut lambda = self.lambda();
        clamp(&mut lambda);
        let allocation = Bernoulli::new(&lambda, &design, spare(budget)).allocate(self.draws, budget, rng)?;
        let design = Arc::new(design);
        Ok((allocation, LearnedUpdate { design, distances: None, budget: *budget, seed: rng.next_u64() }))
    }

    fn apply(mut self, update: LearnedUpdate, shown: &Shown<'_>) -> Self {
        // a record or an allocator of another mean came between; the next allocation says so
        if [self.beta.val().dims()[0], update.design.coefficients()].iter().any(|&n| self.mean.check(n).is_err()) {
            return self;
        }
        let law = |lambda: &[f64]| Bernoulli::new(lambda, &update.design, spare(&update.budget));
        let start = (self.lambda(), self.state.value.clone());
        // an allocation of finite features and bounded λ exists: there is no error to hear of
        let Ok((lambda, state)) = self.learning.learn(start, clamp, law, (&update, shown)) else { return self };
        self.beta = set_values(self.beta, &lambda);
        self.state.value = state;
        self
    }

    fn needs(&self) -> Needs {
        Needs { extra: self.mean.needs_features(), ..Needs::default() }
    }

    fn name(&self) -> &'static str {
        "bernoulli"
    }
}

/// Keeps λ within its bounds.
fn clamp(lambda: &mut [f64]) {
    lambda.iter_mut().for_each(|b| *b = b.clamp(LOGIT.0, LOGIT.1));
}

/// A₀ − A_min.
fn spare(budget: &QueryBudget) -> u64 {
    (budget.queries_per_datum() - budget.min_per_datum()) as u64
}

/// The law of the kept queries K for one λ and one batch.
struct Bernoulli<'a> {
    design: &'a Design,
    /// p_j.
    keep: Vec<f64>,
    /// A₀ − A_min.
    spare: u64,
}

impl<'a> Bernoulli<'a> {
    fn new(beta: &[f64], design: &'a Design, spare: u64) -> Self {
        let keep = design.mean(beta).into_iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect();
        Self { design, keep, spare }
    }

    /// What is to be shared, in proportion to `kept`.
    fn share(&self, kept: &[f64], budget: &QueryBudget) -> Result<Allocation, Error> {
        let (n, sum) = (kept.len(), kept.iter().sum::<f64>());
        if sum == 0.0 {
            return Ok(Allocation::uniform(n, budget));
        }
        let spare = (self.spare * n as u64) as f64;
        let raw: Vec<f64> = kept.iter().map(|k| budget.min_per_datum() as f64 + spare * k / sum).collect();
        Allocation::project(&raw, budget)
    }
}

impl Law for Bernoulli<'_> {
    /// K_j of each example.
    type Draw = Vec<u64>;

    fn draw(&self, rng: &mut StdRng) -> Vec<u64> {
        // p is always in [0, 1], so the law exists
        self.keep.iter().map(|&p| Binomial::new(self.spare, p).map_or(0, |law| law.sample(rng))).collect()
    }

    fn mean(&self, budget: &QueryBudget) -> Result<Allocation, Error> {
        self.share(&self.keep, budget)
    }

    fn allocation(&self, kept: &Vec<u64>, budget: &QueryBudget) -> Result<Allocation, Error> {
        self.share(&kept.iter().map(|&k| k as f64).collect::<Vec<_>>(), budget)
    }

    fn score(&self, kept: &Vec<u64>) -> Vec<f64> {
        let residual: Vec<f64> = kept.iter().zip(&self.keep).map(|(&k, p)| k as f64 - self.spare as f64 * p).collect();
        self.design.transpose_mul(&residual)
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;
    use rand::SeedableRng;
    use rand::seq::SliceRandom;

    use super::*;
    use crate::allocator::variance_objective;
    use crate::testing::{skewed_losses, train_allocator};

    fn budget(queries: usize) -> QueryBudget {
        QueryBudget::new(queries, 1).unwrap()
    }

    fn allocator(config: BernoulliAllocatorConfig) -> BernoulliAllocator<Flex> {
        config.init(&Default::default()).unwrap()
    }

    fn ln_choose(n: u64, k: u64) -> f64 {
        (1..=k).map(|i| ((n - k + i) as f64 / i as f64).ln()).sum()
    }

    #[test]
    fn the_score_agrees_with_finite_differences() {
        let losses = skewed_losses(12, 3);
        let features = DatumFeatures { losses: &losses, variances: &losses, ..Default::default() };
        for mean in [MeanModel::Loss, MeanModel::Ranks(5)] {
            let design = mean.design(&features).unwrap();
            let beta: Vec<f64> = (0..mean.coefficients()).map(|k| 0.4 - 0.3 * k as f64).collect();
            let law = Bernoulli::new(&beta, &design, 19);
            let kept = law.draw(&mut StdRng::seed_from_u64(1));
            let log_density = |beta: &[f64]| -> f64 {
                let law = Bernoulli::new(beta, &design, 19);
                let term =
                    |(&k, p): (&u64, &f64)| ln_choose(19, k) + k as f64 * p.ln() + (19 - k) as f64 * (1.0 - p).ln();
                kept.iter().zip(&law.keep).map(term).sum()
            };
            for (i, score) in law.score(&kept).into_iter().enumerate() {
                let at = |h: f64| {
                    let mut beta = beta.clone();
                    beta[i] += h;
                    log_density(&beta)
                };
                let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
                assert!((numeric - score).abs() < 1e-6 * (1.0 + score.abs()), "{mean:?} {i}: {numeric} {score}");
            }
        }
    }

    #[test]
    fn equal_numbers_of_kept_queries_give_equal_shares() {
        let design =
            MeanModel::Loss.design(&DatumFeatures { losses: &[1.0; 4], variances: &[1.0; 4], ..Default::default() });
        let design = design.unwrap();
        let law = Bernoulli::new(&[0.0, 0.0], &design, 19);
        let counts = |kept: [u64; 4]| law.allocation(&kept.to_vec(), &budget(20)).unwrap().counts().to_vec();
        assert_eq!(counts([0; 4]), [20; 4]);
        assert_eq!(counts([19; 4]), [20; 4]);
        assert_eq!(counts([1, 0, 0, 0]), [77, 1, 1, 1]);
    }

    // The seeds are fixed, so a failure means a change. E[J] comes from 100 draws, with a standard
    // error below 1 %. The J of the Neyman allocation is 0.32 to 0.43 of the uniform one's here.
    // The kept counts scatter, the more so with few queries, and that is the loss against Neyman.

    #[test]
    fn it_gains_if_losses_explain_the_variances_and_does_no_harm_if_not() {
        for (queries, explained, flat) in [(20, 1.4, 1.05), (4, 1.6, 1.06)] {
            for seed in 0..3 {
                let losses = skewed_losses(64, seed);
                let mut variances: Vec<f64> = losses.iter().map(|l| (0.1 + l) * (0.1 + l)).collect();
                let weights: Vec<f64> = variances.iter().map(|v| v.sqrt()).collect();
                let budget = budget(queries);
                let j = |variances: &[f64]| {
                    let features = DatumFeatures { losses: &losses, variances, ..Default::default() };
                    let start = allocator(BernoulliAllocatorConfig::new());
                    train_allocator(start, &features, &budget, seed, 300)
                };
                let neyman = variance_objective(&variances, &Allocation::neyman(&weights, &budget).unwrap());
                assert!(j(&variances) <= explained * neyman, "{queries}, {seed}: {} against {neyman}", j(&variances));
                variances.shuffle(&mut StdRng::seed_from_u64(seed + 100));
                let uniform = variance_objective(&variances, &Allocation::uniform(64, &budget));
                assert!(j(&variances) <= flat * uniform, "{queries}, {seed}: {} against {uniform}", j(&variances));
            }
        }
    }

    #[test]
    fn the_mean_shares_in_proportion_to_the_probabilities_and_a_draw_to_what_was_kept() {
        let losses = [1.0, 2.0, 3.0, 6.0];
        let features = DatumFeatures { losses: &losses, variances: &[1.0; 4], ..Default::default() };
        let design = MeanModel::Loss.design(&features).unwrap();
        let law = Bernoulli::new(&[-4.0, 1.0], &design, 19);
        let sum: f64 = law.keep.iter().sum();
        let wanted: Vec<f64> = law.keep.iter().map(|p| 1.0 + 76.0 * p / sum).collect();
        let counts = law.mean(&budget(20)).unwrap();
        assert!(counts.counts().iter().zip(wanted).all(|(&a, w)| (a as f64 - w).abs() < 1.0), "{counts:?}");
        let rng = || StdRng::seed_from_u64(3);
        let kept = law.draw(&mut rng());
        let drawn = law.allocate(true, &budget(20), &mut rng()).unwrap();
        assert_eq!(drawn, law.allocation(&kept, &budget(20)).unwrap());
    }

    #[test]
    fn it_starts_with_the_logit_of_the_configured_probability() {
        let lambda = allocator(BernoulliAllocatorConfig::new().with_keep(0.8)).lambda();
        assert!(lambda.len() == 2 && (lambda[0] - 4f64.ln()).abs() < 1e-6 && lambda[1] == 0.0, "{lambda:?}");
    }

    /// With at least two queries each, six are left to be shared by what two examples kept.
    #[test]
    fn the_minimum_comes_before_the_shares() {
        let budget = QueryBudget::new(5, 2).unwrap();
        assert_eq!(spare(&budget), 3);
        let features = DatumFeatures { losses: &[1.0; 2], variances: &[1.0; 2], ..Default::default() };
        let design = MeanModel::Loss.design(&features).unwrap();
        let law = Bernoulli::new(&[0.0, 0.0], &design, spare(&budget));
        assert_eq!(law.allocation(&vec![1, 2], &budget).unwrap().counts(), [4, 6]);
    }

    #[test]
    fn coefficients_stay_within_their_bounds() {
        let mut lambda = [-9.0, 9.0, 0.5];
        clamp(&mut lambda);
        assert_eq!(lambda, [-8.0, 8.0, 0.5]);
    }

    #[test]
    fn errors_name_the_setting() {
        let fail = |c: BernoulliAllocatorConfig| c.init::<Flex>(&Default::default()).unwrap_err().to_string();
        let config = BernoulliAllocatorConfig::new;
        assert!(fail(config().with_keep(1.0)).contains("keep = 1"));
        assert!(fail(config().with_samples(1)).contains("samples = 1"));
        assert!(fail(config().with_lr(f64::NAN)).contains("lr = NaN"));
        assert!(fail(config().with_mean(MeanModel::Ranks(1))).contains("ranks = 1"));
    }
}
