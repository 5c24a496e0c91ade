//! How a learned allocator learns: by the likelihood ratio, with an Adam of its own.

use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};

use super::allocation::Allocation;
use super::budget::QueryBudget;
use super::objective::variance_objective;
use crate::error::Error;

/// The law of a batch's allocation for one λ.
pub(super) trait Law {
    /// A raw draw, which determines the allocation.
    type Draw;

    /// Draws once.
    fn draw(&self, rng: &mut StdRng) -> Self::Draw;

    /// The allocation of the most likely draw.
    fn most_likely(&self, budget: &QueryBudget) -> Result<Allocation, Error>;

    /// The allocation of a draw.
    fn allocation(&self, draw: &Self::Draw, budget: &QueryBudget) -> Result<Allocation, Error>;

    /// ∇_λ ln P(draw|λ), up to a constant common to all draws.
    fn score(&self, draw: &Self::Draw) -> Vec<f64>;
}

/// How often and how fast a learned allocator learns, and from how many draws it chooses.
#[derive(Clone, Copy, Debug)]
pub(super) struct Learning {
    /// Batches from one update of λ to the next.
    pub every: usize,
    /// Updates of λ on a batch that has any.
    pub updates: usize,
    /// Draws per update.
    pub samples: usize,
    /// Allocations to choose from.
    pub candidates: usize,
    /// Learning rate of λ.
    pub lr: f64,
}

impl Learning {
    /// Checks that every setting lies in its range.
    pub fn validate(&self) -> Result<(), Error> {
        within("update_every", self.every as f64, (1.0, 1e6))?;
        within("updates_per_step", self.updates as f64, (0.0, 1e6))?;
        within("samples", self.samples as f64, (2.0, 1e6))?;
        within("candidates", self.candidates as f64, (1.0, 1e6))?;
        within("lr", self.lr, (f64::MIN_POSITIVE, 1.0))
    }

    /// Updates λ on every `every`-th batch, keeps it within `bounds`, and allocates.
    ///
    /// On those batches the allocation is drawn from the `law` of the new λ. On the others it is
    /// the most likely one, unless there is a single candidate, which is always a draw.
    pub fn allocate<L: Law>(
        &self,
        (mut lambda, mut state): (Vec<f64>, LearningState),
        bounds: impl Fn(&mut [f64]),
        law: impl Fn(&[f64]) -> L,
        (variances, budget): (&[f64], &QueryBudget),
        rng: &mut StdRng,
    ) -> Result<(Allocation, LearnedUpdate), Error> {
        bounds(&mut lambda);
        let mut current = law(&lambda);
        let learns = state.batches.is_multiple_of(self.every as u64);
        state.batches += 1;
        if learns {
            for _ in 0..self.updates {
                let Some(gradient) = gradient(&current, variances, budget, self.samples, rng)? else { break };
                state.adam.step(&mut lambda, &gradient, self.lr);
                bounds(&mut lambda);
                current = law(&lambda);
            }
        }
        let allocation = match learns || self.candidates == 1 {
            true => best_of(&current, variances, budget, self.candidates, rng)?,
            false => current.most_likely(budget)?,
        };
        Ok((allocation, LearnedUpdate { lambda, state }))
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
    variances: &[f64],
    budget: &QueryBudget,
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

/// One draw, or the best of several `candidates` by the estimated variances.
///
/// Of several candidates the first is the most likely allocation, and the others are draws. The
/// choice is made before any noise is drawn, as for every allocation.
fn best_of<L: Law>(
    law: &L,
    variances: &[f64],
    budget: &QueryBudget,
    candidates: usize,
    rng: &mut StdRng,
) -> Result<Allocation, Error> {
    if candidates == 1 {
        return law.allocation(&law.draw(rng), budget);
    }
    let mut best = law.most_likely(budget)?;
    let mut least = variance_objective(variances, &best);
    for _ in 1..candidates {
        let other = law.allocation(&law.draw(rng), budget)?;
        let cost = variance_objective(variances, &other);
        if cost < least {
            (best, least) = (other, cost);
        }
    }
    Ok(best)
}

/// The state of learning λ, part of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LearningState {
    /// Batches allocated so far.
    batches: u64,
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

/// What a learned allocator learned in one step: the new λ and the state of learning.
#[derive(Clone, Debug, PartialEq)]
pub struct LearnedUpdate {
    pub(super) lambda: Vec<f64>,
    pub(super) state: LearningState,
}

/// Checks that a setting lies within its range, ends included.
pub(super) fn within(name: &'static str, value: f64, (low, high): (f64, f64)) -> Result<(), Error> {
    match value >= low && value <= high {
        true => Ok(()),
        false => Err(Error::Setting { name, value, remedy: format!("choose a value from {low} to {high}") }),
    }
}
