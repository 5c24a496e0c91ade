//! Methods of the field as combinations of this crate's parts.

use std::fmt;
use std::str::FromStr;

use crate::allocator::AllocatorKind;
use crate::budget::QueryBudget;
use crate::error::Error;
use crate::estimator::Space;
use crate::feedback::ControlVariate;
use crate::learner::{ForwardConfig, Normalisation};
use crate::noise::{NoiseLaw, Placement, Sampling};

/// A published method, or this crate's default.
///
/// Each sets space, law, sampling, placement, σ, control variate, normalisation and allocator; the optimizer is the caller's.
/// Every one takes any number of queries per datum, FZOO at least 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Recipe {
    /// This crate's defaults: activation noise, signs, one-sided, one layer per query, learned feedback, [`GaussianAllocator`](crate::allocator::GaussianAllocator).
    Default,
    /// The paper: activation noise on all layers at once, Gaussian, antithetic, the Gaussian allocator in its own form, no control variate but
    /// the clean loss, σ = 10⁻³. Variances are still estimated from earlier steps; [`VarianceEstimate::Pilot`](crate::VarianceEstimate::Pilot) is the
    /// paper's initial queries.
    Flops,
    /// MeZO (Malladi et al. 2023, arXiv 2305.17333): antithetic Gaussian noise on the weights, shared by the batch, σ = 10⁻³.
    Mezo,
    /// FZOO (Dang et al. 2025, arXiv 2506.09034): one-sided signs on the weights, the step divided by the spread of the losses.
    Fzoo,
    /// Evolution strategies (Salimans et al. 2017, arXiv 1703.03864) with the clean loss as baseline: one-sided Gaussian noise on the weights.
    Es,
    /// EGGROLL (Sarkar et al. 2025, arXiv 2511.16652): antithetic noise of rank 1 on the weights, independent for every query of every datum.
    Eggroll,
}

impl Recipe {
    /// Every recipe.
    pub const ALL: [Self; 6] = [Self::Default, Self::Flops, Self::Mezo, Self::Fzoo, Self::Es, Self::Eggroll];

    /// The name it is chosen by.
    pub fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Flops => "flops",
            Self::Mezo => "mezo",
            Self::Fzoo => "fzoo",
            Self::Es => "es",
            Self::Eggroll => "eggroll",
        }
    }

    /// Its settings with `budget` queries.
    pub fn config(self, budget: QueryBudget) -> ForwardConfig {
        let config = ForwardConfig::new(budget);
        let plain = || config.clone().with_control_variate(ControlVariate::None).with_placement(Placement::Joint);
        let weights = || plain().with_space(Space::Weights).with_sigma(1e-3);
        match self {
            Self::Default => config,
            Self::Flops => plain().with_noise(NoiseLaw::Gaussian).with_sampling(Sampling::Antithetic).with_sigma(1e-3),
            Self::Mezo => weights().with_noise(NoiseLaw::Gaussian).with_sampling(Sampling::Antithetic),
            Self::Fzoo => weights().with_noise(NoiseLaw::Rademacher).with_normalisation(Normalisation::LossSpread),
            Self::Es => weights().with_noise(NoiseLaw::Gaussian),
            Self::Eggroll => {
                plain().with_space(Space::LowRank(1)).with_noise(NoiseLaw::Gaussian).with_sampling(Sampling::Antithetic)
            }
        }
    }

    /// Its allocator.
    pub fn allocator(self) -> AllocatorKind {
        match self {
            Self::Default => AllocatorKind::Gaussian,
            Self::Flops => AllocatorKind::GaussianPaper,
            Self::Mezo | Self::Fzoo | Self::Es | Self::Eggroll => AllocatorKind::Uniform,
        }
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Recipe {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|recipe| recipe.name() == name).ok_or_else(|| Error::Unknown {
            what: "recipe",
            name: name.into(),
            choices: "default, flops, mezo, fzoo, es, eggroll",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recipe_is_valid_and_has_a_name() {
        for recipe in Recipe::ALL {
            assert_eq!(recipe.name().parse::<Recipe>().unwrap(), recipe);
            let config = recipe.config(QueryBudget::new(2, 1).unwrap());
            config.validate().unwrap();
            let shared = !config.estimator.space.is_independent();
            assert!(!shared || recipe.allocator() == AllocatorKind::Uniform, "{recipe}: shared noise gains nothing");
        }
        assert!("adam".parse::<Recipe>().unwrap_err().to_string().contains("mezo"));
    }
}
