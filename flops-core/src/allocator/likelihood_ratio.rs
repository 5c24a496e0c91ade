//! How a learned allocator learns: the likelihood ratio, and an Adam of its own.

use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};

use super::proxy;
use crate::budget::{Allocation, QueryBudget};
use crate::error::Error;

/// The law of a batch's allocation for one λ.
pub(super) trait Law {
    /// A raw draw, of which the allocation is a function.
    type Draw;

    fn draw(&self, rng: &mut StdRng) -> Self::Draw;

    /// The integers that the most likely draw stands for.
    fn most_likely(&self, budget: &QueryBudget) -> Result<Allocation, Error>;

    /// The integers that a draw stands for.
    fn allocation(&self, draw: &Self::Draw, budget: &QueryBudget) -> Result<Allocation, Error>;

    /// ∇_λ ln P(draw|λ), up to a constant that is the same for every draw.
    fn score(&self, draw: &Self::Draw) -> Vec<f64>;
}

/// How a learned allocator is trained and drawn from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Learning {
    pub every: usize,
    pub updates: usize,
    pub samples: usize,
    pub candidates: usize,
    pub lr: f64,
}

impl Learning {
    /// Whether the settings are usable.
    pub fn validate(&self) -> Result<(), Error> {
        within("update_every", self.every as f64, (1.0, 1e6))?;
        within("updates_per_step", self.updates as f64, (0.0, 1e6))?;
        within("samples", self.samples as f64, (2.0, 1e6))?;
        within("candidates", self.candidates as f64, (1.0, 1e6))?;
        within("lr", self.lr, (f64::MIN_POSITIVE, 1.0))
    }

    /// Updates λ on every `every`-th batch, keeping it within `bounds`, and draws the allocation from the `law` of the result; on the batches
    /// between takes the mode, unless a single draw is asked for.
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

/// The likelihood-ratio gradient of E[J] from `samples` draws; none where every draw is equally good.
///
/// Each J is compared with the mean of the others', which keeps the gradient unbiased, and divided by their spread, which frees it of scale.
/// The advantages sum to zero: constants of the score fall out.
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
        costs.push(proxy(variances, &law.allocation(draw, budget)?));
    }
    let n = costs.len() as f64;
    let mean = costs.iter().sum::<f64>() / n;
    let spread = (costs.iter().map(|c| (c - mean).powi(2)).sum::<f64>() / n).sqrt();
    if spread <= 1e-12 * mean {
        return Ok(None);
    }
    let mut gradient = vec![];
    for (draw, cost) in draws.iter().zip(&costs) {
        // cost − the mean of the others = (cost − mean)·n/(n − 1)
        let advantage = (cost - mean) / (spread * (n - 1.0));
        let score = law.score(draw);
        gradient.resize(score.len(), 0.0);
        gradient.iter_mut().zip(score).for_each(|(g, s)| *g += advantage * s);
    }
    Ok(Some(gradient))
}

/// A draw; of several `candidates`, of which the first is the mode, the best by the estimated variances. It is chosen before any noise is
/// drawn, as every allocation is.
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
    let mut least = proxy(variances, &best);
    for _ in 1..candidates {
        let other = law.allocation(&law.draw(rng), budget)?;
        let cost = proxy(variances, &other);
        if cost < least {
            (best, least) = (other, cost);
        }
    }
    Ok(best)
}

/// Where the learning of λ stands.
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

/// What a learned allocator learned in one step: λ and where its learning stands.
#[derive(Clone, Debug, PartialEq)]
pub struct LearnedUpdate {
    pub(super) lambda: Vec<f64>,
    pub(super) state: LearningState,
}

/// Whether a setting lies within its range.
pub(super) fn within(name: &'static str, value: f64, (low, high): (f64, f64)) -> Result<(), Error> {
    match value >= low && value <= high {
        true => Ok(()),
        false => Err(Error::Setting { name, value, remedy: format!("choose a value from {low} to {high}") }),
    }
}
