//! The methods that are compared.

use std::fmt;
use std::str::FromStr;

use anyhow::Result;
use flops_core::allocator::AllocatorKind;
use flops_core::{ForwardConfig, GradientEstimate, QueryBudget, Recipe, Space};
use flops_examples::run::optimizer::OptimizerKind;
use flops_vit::Sites;

/// How gradients are obtained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// The library's default: activation noise, an unbiased estimate.
    Unbiased(Sites),
    /// The same, shrunk towards the prediction.
    Shrunk(Sites),
    /// A published method.
    Recipe(Recipe),
    /// Burn's autodiff.
    Backprop,
}

/// Learning rates of methods that predict gradients, or perturb activations.
const ACTIVATION_RATES: [f64; 3] = [5e-4, 2e-3, 8e-3];
/// Learning rates of shrunk estimates, which follow the gradient more closely.
const SHRUNK_RATES: [f64; 3] = [3e-4, 1e-3, 3e-3];
/// Learning rates of noise on weights, whose estimates are mostly noise in deep scopes.
const WEIGHT_RATES: [f64; 3] = [1e-4, 5e-4, 2.5e-3];
/// Learning rates of backpropagation.
const BACKPROP_RATES: [f64; 3] = [3e-4, 1e-3, 3e-3];

impl Method {
    /// Returns all methods. Every published recipe is among them.
    pub fn all() -> Vec<Self> {
        // the default recipe is the unbiased estimate at linear sites
        let recipes = Recipe::ALL.into_iter().filter(|&recipe| recipe != Recipe::Default);
        let ours = [Sites::Linear, Sites::Branch].map(|sites| [Self::Unbiased(sites), Self::Shrunk(sites)]);
        ours.into_iter().flatten().chain(recipes.map(Self::Recipe)).chain([Self::Backprop]).collect()
    }

    /// Returns where its noise falls.
    pub fn sites(self) -> Sites {
        match self {
            Self::Unbiased(sites) | Self::Shrunk(sites) => sites,
            Self::Recipe(_) | Self::Backprop => Sites::Linear,
        }
    }

    /// Returns the settings of its learner, with `sigma` as the smoothing scale of shrunk
    /// estimates.
    ///
    /// # Errors
    /// If the method does not work with so many queries.
    pub fn config(self, queries: usize, sigma: f64, seed: u64) -> Result<ForwardConfig> {
        let budget = QueryBudget::new(queries, 1)?;
        let config = match self {
            Self::Shrunk(_) => {
                let space = Space::activation().with_estimate(GradientEstimate::Shrunk)?;
                ForwardConfig::new(budget).with_space(space).with_sigma(sigma)
            }
            Self::Recipe(recipe) => recipe.config(budget),
            Self::Unbiased(_) | Self::Backprop => ForwardConfig::new(budget),
        };
        let config = config.with_seed(seed);
        config.validate()?;
        Ok(config)
    }

    /// Returns its allocator.
    pub fn allocator(self) -> AllocatorKind {
        match self {
            Self::Recipe(recipe) => recipe.allocator(),
            _ => Recipe::Default.allocator(),
        }
    }

    /// Returns its optimizer.
    pub fn optimizer(self) -> OptimizerKind {
        match self {
            Self::Recipe(recipe) => OptimizerKind::of(recipe),
            _ => OptimizerKind::AdamW,
        }
    }

    /// Returns the learning rates that it chooses from by default.
    pub fn rates(self) -> [f64; 3] {
        match self {
            Self::Unbiased(_) => ACTIVATION_RATES,
            Self::Shrunk(_) => SHRUNK_RATES,
            Self::Recipe(recipe) if matches!(recipe.space(), Space::Activation { .. }) => ACTIVATION_RATES,
            Self::Recipe(_) => WEIGHT_RATES,
            Self::Backprop => BACKPROP_RATES,
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unbiased(Sites::Branch) => "unbiased-branch",
            Self::Unbiased(_) => "unbiased",
            Self::Shrunk(Sites::Branch) => "shrunk-branch",
            Self::Shrunk(_) => "shrunk-linear",
            Self::Recipe(recipe) => recipe.name(),
            Self::Backprop => "backprop",
        })
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let all = Self::all();
        let names = || all.iter().map(Self::to_string).collect::<Vec<_>>().join(", ");
        all.iter().copied().find(|method| method.to_string() == name).ok_or_else(|| format!("choose from {}", names()))
    }
}
