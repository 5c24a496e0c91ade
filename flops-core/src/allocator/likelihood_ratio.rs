//! How a learned allocator learns: by the likelihood ratio, with an Adam of its own.

use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};

use super::allocation::Allocation;
use super::budget::QueryBudget;
use super::covariance::Distances;
use super::mean::Design;
use super::objective::variance_objective;
use super::shown::Shown;
use crate::error::Error;

/// The law of a batch's allocation for one λ.
pub(super) trait Law {
    /// A raw draw, which determines the allocation.
    type Draw;

    /// Draws once.
    fn draw(&self, rng: &mut StdRng) -> Self::Draw;

    /// The allocation of the mean of the draws.
    fn mean(&self, budget: &QueryBudget) -> Result<Allocation, Error>;

    /// The allocation of a draw.
    fn allocation(&self, draw: &Self::Draw, budget: &QueryBudget) -> Result<Allocation, Error>;

    /// ∇_λ ln P(draw|λ), up to a constant common to all draws.
    fn score(&self, draw: &Self::Draw) -> Vec<f64>;

    /// The allocation of a batch: a draw, or the mean's.
    fn allocate(&self, draws: bool, budget: &QueryBudget, rng: &mut StdRng) -> Result<Allocation, Error> {
        if draws { self.allocation(&self.draw(rng), budget) } else { self.mean(budget) }
    }
}

/// How fast a learned allocator learns.
#[derive(Clone, Copy, Debug)]
pub(super) struct Learning {
    /// Updates of λ after a step.
    pub updates: usize,
    /// Draws per update.
    pub samples: usize,
    /// Learning rate of λ.
    pub lr: f64,
}

impl Learning {
    /// Checks that every setting lies in its range.
    pub fn validate(&self) -> Result<(), Error> {
        within("updates_per_step", self.updates as f64, (0.0, 1e6))?;
        within("samples", self.samples as f64, (2.0, 1e6))?;
        within("lr", self.lr, (f64::MIN_POSITIVE, 1.0))
    }

    /// λ and the state of learning after a step, from the second moments that it showed.
    ///
    /// λ is kept within `bounds`. It stays as it is where nothing was measured. So it does if
    /// `update` belongs to a batch of another size.
    pub fn learn<L: Law>(
        &self,
        (mut lambda, mut state): (Vec<f64>, LearningState),
        bounds: impl Fn(&mut [f64]),
        law: impl Fn(&[f64]) -> L,
        (update, shown): (&LearnedUpdate, &Shown<'_>),
    ) -> Result<(Vec<f64>, LearningState), Error> {
        let second_moments = shown.relative().filter(|m| m.len() == update.design.batch_size());
        let Some(second_moments) = second_moments else { return Ok((lambda, state)) };
        let mut rng = StdRng::seed_from_u64(update.seed);
        bounds(&mut lambda);
        for _ in 0..self.updates {
            let objective = (&second_moments[..], &update.budget);
            let Some(gradient) = gradient(&law(&lambda), objective, self.samples, &mut rng)? else { break };
            state.adam.step(&mut lambda, &gradient, self.lr);
            bounds(&mut lambda);
        }
        Ok((lambda, state))
    }
}

/// The likelihood-ratio gradient of E[J] from `samples` draws, or none if all draws are equally
/// good.
///
/// The mean of the other draws' J is subtracted from each J, which keeps the gradient unbiased. The
/// difference is divided by the spread of J, which makes it independent of scale. These advantages
/// sum to zero, so constants of the score cancel.
fn gradient<L: Law>(
    law: &L,
    (variances, budget): (&[f64], &QueryBudget),
    samples: usize,
    rng: &mut StdRng,
) -> Result<Option<Vec<f64>>, Error> {
    let draws: Vec<L::Draw> = (0..samples).map(|_| law.draw(rng)).collect();
    let mut costs = Vec::with_capacity(draws.len());
    for draw in &draws {
        costs.push(variance_objective(variances, &law.allocation(draw, budget)?));
    }
    let n = costs.len() as f64;
    let mean = costs.iter().sum::<f64>() / n;
    let spread = (costs.iter().map(|c| (c - mean).powi(2)).sum::<f64>() / n).sqrt();
    if spread <= 1e-12 * mean {
        return Ok(None);
    }
    let mut gradient = vec![];
    for (draw, cost) in draws.iter().zip(&costs) {
        // (cost − mean of the others) / (n·spread) = (cost − mean) / (spread·(n − 1))
        let advantage = (cost - mean) / (spread * (n - 1.0));
        let score = law.score(draw);
        gradient.resize(score.len(), 0.0);
        gradient.iter_mut().zip(score).for_each(|(g, s)| *g += advantage * s);
    }
    Ok(Some(gradient))
}

/// The state of learning λ, part of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LearningState {
    adam: Adam,
}

/// The Adam optimizer of λ.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Adam {
    step: u32,
    first: Vec<f64>,
    second: Vec<f64>,
}

impl Adam {
    const BETA1: f64 = 0.9;
    const BETA2: f64 = 0.99;

    /// One step down `gradient`.
    fn step(&mut self, lambda: &mut [f64], gradient: &[f64], lr: f64) {
        self.first.resize(lambda.len(), 0.0);
        self.second.resize(lambda.len(), 0.0);
        self.step = self.step.saturating_add(1);
        let correction = |beta: f64| 1.0 - beta.powf(self.step as f64);
        let (c1, c2) = (correction(Self::BETA1), correction(Self::BETA2));
        for i in 0..lambda.len() {
            self.first[i] += (1.0 - Self::BETA1) * (gradient[i] - self.first[i]);
            self.second[i] += (1.0 - Self::BETA2) * (gradient[i] * gradient[i] - self.second[i]);
            lambda[i] -= lr * (self.first[i] / c1) / ((self.second[i] / c2).sqrt() + 1e-8);
        }
    }
}

/// What a learned allocator needs of a batch to learn from it after the step.
#[derive(Clone, Debug)]
pub struct LearnedUpdate {
    /// The features of the mean.
    pub(super) design: Arc<Design>,
    /// Distances of the embeddings, if the law has a covariance.
    pub(super) distances: Option<Arc<Distances>>,
    /// The budget that was allocated.
    pub(super) budget: QueryBudget,
    /// Seed of the draws.
    pub(super) seed: u64,
}

/// Checks that a setting lies within its range, ends included.
pub(super) fn within(name: &'static str, value: f64, (low, high): (f64, f64)) -> Result<(), Error> {
    match value >= low && value <= high {
        true => Ok(()),
        false => Err(Error::Setting { name, value, remedy: format!("choose a value from {low} to {high}") }),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Draws 0, 1, 2, … in turn; draw k gives the first of two examples k + 1 of 5 queries, and has
    /// the score (k, 1).
    struct InTurn(Cell<usize>);

    impl Law for InTurn {
        type Draw = usize;
        fn draw(&self, _: &mut StdRng) -> usize {
            self.0.replace(self.0.get() + 1)
        }
        fn mean(&self, budget: &QueryBudget) -> Result<Allocation, Error> {
            Ok(Allocation::uniform(2, budget))
        }
        fn allocation(&self, draw: &usize, _: &QueryBudget) -> Result<Allocation, Error> {
            Ok(Allocation::of(&[draw + 1, 4 - draw]))
        }
        fn score(&self, draw: &usize) -> Vec<f64> {
            vec![*draw as f64, 1.0]
        }
    }

    /// Σ (J − mean of the others)/(n·spread)·score, written out for three draws.
    #[test]
    fn the_gradient_is_the_mean_of_the_scores_weighted_by_standardised_costs() {
        let budget = QueryBudget::new(3, 1).unwrap();
        let of = |variances: [f64; 2]| {
            gradient(&InTurn(Cell::new(0)), (&variances, &budget), 3, &mut StdRng::seed_from_u64(0)).unwrap()
        };
        let j = |a: f64| 8.0 / a + 2.0 / (5.0 - a);
        let costs = [j(1.0), j(2.0), j(3.0)];
        let mean = costs.iter().sum::<f64>() / 3.0;
        let spread = (costs.iter().map(|c| (c - mean) * (c - mean)).sum::<f64>() / 3.0).sqrt();
        let others = |i: usize| (costs.iter().sum::<f64>() - costs[i]) / 2.0;
        let expected: f64 = (0..3).map(|i| (costs[i] - others(i)) / (3.0 * spread) * i as f64).sum();
        let got = of([8.0, 2.0]).unwrap();
        assert!((got[0] - expected).abs() < 1e-12 && expected.abs() > 0.1, "{got:?}, not {expected}");
        assert!(got[1].abs() < 1e-12, "what all scores share cancels");
        // the scale of the variances has no part in it
        let scaled = of([8e-30, 2e-30]).unwrap();
        assert!((scaled[0] - expected).abs() < 1e-9, "{scaled:?}");
        assert_eq!(of([0.0; 2]), None);
    }

    /// Adam's first steps (Kingma & Ba 2015) with decays of 0.9 and 0.99, written out.
    #[test]
    fn steps_of_lambda_are_those_of_adam() {
        let (mut adam, mut lambda) = (Adam::default(), [1.0, -2.0]);
        adam.step(&mut lambda, &[3.0, -0.5], 0.1);
        // bias correction makes the first step a sign
        assert!((lambda[0] - 0.9).abs() < 1e-8 && (lambda[1] + 1.9).abs() < 1e-8, "{lambda:?}");
        adam.step(&mut lambda, &[-1.0, 2.0], 0.1);
        for (lambda, (start, g)) in lambda.into_iter().zip([(0.9, [3.0, -1.0]), (-1.9, [-0.5, 2.0])]) {
            let first = (0.9 * 0.1 * g[0] + 0.1 * g[1]) / (1.0 - 0.9 * 0.9);
            let second: f64 = (0.99 * 0.01 * g[0] * g[0] + 0.01 * g[1] * g[1]) / (1.0 - 0.99 * 0.99);
            let expected = start - 0.1 * first / second.sqrt();
            assert!((lambda - expected).abs() < 1e-7, "{lambda}, not {expected}");
        }
        // a gradient of zero leaves λ where it is, and is no number over no number
        let (mut still, mut adam) = ([4.0], Adam::default());
        adam.step(&mut still, &[0.0], 0.1);
        assert_eq!(still, [4.0]);
    }

    #[test]
    fn a_setting_lies_within_its_range_ends_included() {
        let ok = |value| within("lr", value, (0.5, 2.0)).is_ok();
        assert_eq!([0.5, 1.0, 2.0, 0.4, 2.1, f64::NAN].map(ok), [true, true, true, false, false, false]);
    }
}
