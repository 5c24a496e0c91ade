//! The methods that are compared.

use std::fmt;

use anyhow::Result;
use clap::ValueEnum;
use flops_core::allocator::AllocatorKind;
use flops_core::{ForwardConfig, QueryBudget, Recipe, Space};
use flops_vit::Scope;
use flops_vit::tuning::Noise;

/// The width at which learning rates were picked.
const WIDTH: f64 = 64.0;

/// How gradients are obtained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Method {
    /// Activation noise, as recommended for the scope.
    Forward,
    /// MeZO: a pair of opposite queries with noise on the weights.
    Mezo,
    /// Burn's autodiff.
    Backprop,
}

impl Method {
    pub const ALL: [Self; 3] = [Self::Forward, Self::Mezo, Self::Backprop];

    /// Queries of each text and step; MeZO has its pair.
    pub fn queries(self, queries: usize) -> usize {
        match self {
            Self::Forward => queries,
            Self::Mezo => 2,
            Self::Backprop => 0,
        }
    }

    /// The noise that is recommended for a scope; MeZO and backpropagation have none on activations.
    pub fn noise(self, scope: Scope) -> Option<Noise> {
        (self == Self::Forward).then(|| Noise::new(scope))
    }

    /// The settings of its learner.
    ///
    /// # Errors
    /// If the number of queries is invalid.
    pub fn config(self, scope: Scope, queries: usize, seed: u64) -> Result<ForwardConfig> {
        let budget = QueryBudget::new(self.queries(queries).max(1), 1)?;
        let config = match self.noise(scope) {
            Some(Noise { estimate, sigma, .. }) => {
                let space = Space::activation().with_estimate(estimate)?;
                ForwardConfig::new(budget).with_space(space).with_sigma(sigma)
            }
            None => Recipe::Mezo.config(budget),
        };
        let config = config.with_seed(seed);
        config.validate()?;
        Ok(config)
    }

    pub fn allocator(self) -> AllocatorKind {
        match self {
            Self::Forward => Recipe::Default.allocator(),
            _ => Recipe::Mezo.allocator(),
        }
    }

    /// The learning rate for an encoder of that width.
    ///
    /// Those of width 64 were picked on captions, seed 0. The rule for other widths is that of
    /// [`FineTuning`](flops_vit::FineTuning).
    pub fn lr(self, scope: Scope, width: usize) -> f64 {
        let lr = match (self, scope) {
            (Self::Forward, Scope::Full | Scope::Last(_)) => 2e-3,
            (Self::Forward, _) => 4e-2,
            (Self::Mezo, Scope::Full | Scope::Last(_)) => 5e-4,
            (Self::Mezo, _) => 2e-3,
            (Self::Backprop, Scope::Full | Scope::Last(_)) => 1e-3,
            (Self::Backprop, _) => 8e-3,
        };
        lr * (WIDTH / width.max(1) as f64).min(1.0)
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Forward => "forward",
            Self::Mezo => "mezo",
            Self::Backprop => "backprop",
        })
    }
}
