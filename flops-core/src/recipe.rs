//! Published methods as combinations of this crate's parts.

use crate::allocator::{AllocatorKind, QueryBudget};
use crate::control_variate::{ControlVariate, GradientEstimate};
use crate::estimator::{Normalisation, Space, Subspace};
use crate::names::named_enum;
use crate::noise::{NoiseLaw, Placement, Sampling};
use crate::train::ForwardConfig;

/// A published method, or this crate's default.
///
/// Each sets space, noise law, sampling, placement, σ, control variate, normalisation, subspace and
/// allocator. The optimizer is the caller's choice. Any number of queries per example works, but
/// FZOO needs at least 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Recipe {
    /// This crate's defaults.
    ///
    /// One-sided Rademacher noise falls on the activations of one layer per query. The control
    /// variate is learned, and queries are allocated by [`Neyman`](crate::allocator::Neyman).
    Default,
    /// FLOPS (Ren et al. 2025, arXiv 2410.05966): antithetic Gaussian noise on the activations of
    /// all layers, σ = 10⁻³.
    ///
    /// The allocator is the [paper's](crate::allocator::GaussianAllocatorConfig::paper), and the
    /// clean loss is the only control variate. Variances are estimated from earlier steps;
    /// [`VarianceSource::Pilot`](crate::VarianceSource::Pilot) is the paper's initial queries.
    Flops,
    /// MeZO (Malladi et al. 2023, arXiv 2305.17333): antithetic Gaussian noise on the weights, σ =
    /// 10⁻³.
    ///
    /// The batch shares each direction of the noise. The paper's code perturbs the weights in place
    /// and has no clean pass; this one perturbs copies, behind a clean pass for the whole batch.
    Mezo,
    /// FZOO (Dang et al. 2025, arXiv 2506.09034): one-sided Rademacher noise on the weights.
    ///
    /// The step is divided by the spread of the losses.
    Fzoo,
    /// Evolution strategies (Salimans et al. 2017, arXiv 1703.03864): one-sided Gaussian noise on
    /// the weights.
    ///
    /// The clean loss is the baseline. The paper's code mirrors its noise and takes centred ranks of
    /// the returns instead of the returns.
    Es,
    /// EGGROLL (Sarkar et al. 2025, arXiv 2511.16652): antithetic noise of rank 1 on the weights.
    ///
    /// The noise is independent for every query of every example, and biases have noise of full rank.
    /// The paper's code standardises the scores over the population, and its scripts for language
    /// models freeze what has no noise of low rank and take σ = 10⁻³; here σ is 10⁻².
    Eggroll,
    /// LOZO (Chen et al. 2025, arXiv 2410.07698): MeZO with noise of rank 4 on matrices, whose bases
    /// are kept for 50 steps.
    ///
    /// σ is 2·10⁻³, the paper's scale of 10⁻³ on a product without the divisor √4. The paper's code
    /// leaves out the 1/rank of the paper's estimate, so its steps are `rank` times as long. Its
    /// variant with momentum in the subspace, LOZO-M, is not here: momentum is the optimizer's. Rank
    /// and steps are the defaults of its script for RoBERTa.
    Lozo,
    /// ZO-Muon (Lang et al. 2026, arXiv 2602.17155): one-sided Gaussian noise of rank 64 on matrices,
    /// in orthonormal bases that are kept for 100 steps.
    ///
    /// It goes with [`MatrixOptimizer`](crate::train::matrix_optimizer::MatrixOptimizer), Burn's Muon
    /// on matrices, and 16 queries. The paper's code keeps the bases of outputs instead of inputs.
    /// In a step that changes them it draws new ones for every query, and goes by the last.
    ZoMuon,
    /// PseuZO (NeurIPS 2025): one-sided Gaussian noise, and a running estimate of the outputs' derivative
    /// times the known error of the output.
    ///
    /// It is [`GradientEstimate::Predicted`], with a **bias**. The paper's code has its noise and its
    /// running estimate on all weights, which each query perturbs for the whole batch. Here both are on
    /// the outputs of layers, for each example, and the estimate is corrected by what it does not
    /// explain.
    PseuZo,
}

named_enum! {
    Recipe: "recipe" {
        Default => "default",
        Flops => "flops",
        Mezo => "mezo",
        Fzoo => "fzoo",
        Es => "es",
        Eggroll => "eggroll",
        Lozo => "lozo",
        ZoMuon => "zo-muon",
        PseuZo => "pseuzo",
    }
}

impl Recipe {
    /// The settings of the method, with `budget` queries.
    #[must_use]
    pub fn config(self, budget: QueryBudget) -> ForwardConfig {
        let config = ForwardConfig::new(budget).with_space(self.space());
        let antithetic =
            |config: ForwardConfig| config.with_noise(NoiseLaw::Gaussian).with_sampling(Sampling::Antithetic);
        match self {
            Self::Default => config,
            Self::Flops | Self::Mezo => antithetic(config.with_sigma(1e-3)),
            Self::Fzoo => config.with_sigma(1e-3).with_noise(NoiseLaw::Rademacher),
            Self::Es | Self::ZoMuon | Self::PseuZo => config.with_sigma(1e-3).with_noise(NoiseLaw::Gaussian),
            Self::Eggroll => antithetic(config),
            Self::Lozo => antithetic(config.with_sigma(2e-3)),
        }
    }

    /// The space of the method.
    #[must_use]
    pub fn space(self) -> Space {
        self.settings_in(match self {
            Self::Default | Self::Flops | Self::PseuZo => Space::activation(),
            Self::Mezo | Self::Fzoo | Self::Es | Self::Lozo | Self::ZoMuon => Space::weights(),
            Self::Eggroll => Space::low_rank(1),
        })
    }

    /// Any `space` with the settings that the method gives it.
    ///
    /// The published methods perturb all layers at once, and have no control variate, but for PseuZO,
    /// whose gradient is the prediction. FZOO divides
    /// the gradient of weight noise by the spread of the losses, LOZO and ZO-Muon keep it in a
    /// subspace; other spaces have neither.
    #[must_use]
    pub fn settings_in(self, space: Space) -> Space {
        if self == Self::Default {
            return space;
        }
        let placement = Placement::Joint;
        let (control_variate, estimate) = match self {
            Self::PseuZo => (ControlVariate::Prediction, GradientEstimate::Predicted),
            _ => (ControlVariate::None, GradientEstimate::Unbiased),
        };
        match space {
            Space::Activation { .. } => Space::Activation { placement, control_variate, estimate },
            Space::LowRank { rank, .. } => Space::LowRank { rank, placement },
            Space::Weights { normalisation, subspace } => match self {
                Self::Fzoo => Space::Weights { normalisation: Normalisation::LossSpread, subspace },
                Self::Lozo => Space::Weights { normalisation, subspace: Subspace::Random { rank: 4, period: 50 } },
                Self::ZoMuon => {
                    Space::Weights { normalisation, subspace: Subspace::Orthonormal { rank: 64, period: 100 } }
                }
                _ => space,
            },
        }
    }

    /// The allocator of the method.
    pub fn allocator(self) -> AllocatorKind {
        match self {
            Self::Default => AllocatorKind::Neyman,
            Self::Flops => AllocatorKind::GaussianPaper,
            _ => AllocatorKind::Uniform,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_methods_bring_their_settings_to_each_space_that_has_them() {
        for recipe in Recipe::ALL {
            let [activation, weights, low_rank] = Space::ALL.map(|space| recipe.settings_in(space));
            let published = recipe != Recipe::Default;
            let placement = if published { Placement::Joint } else { Placement::Single };
            assert_eq!([activation, low_rank].map(Space::placement), [Some(placement); 2], "{recipe}");
            let predicted = activation.control_variate() == Some(ControlVariate::Prediction);
            assert_eq!(predicted, !published || recipe == Recipe::PseuZo, "{recipe}");
            assert_eq!(activation.estimate().is_biased(), recipe == Recipe::PseuZo, "{recipe}");
            assert_eq!(weights.normalisation() == Normalisation::LossSpread, recipe == Recipe::Fzoo);
            let subspace = match recipe {
                Recipe::Lozo => Some((4, 50)),
                Recipe::ZoMuon => Some((64, 100)),
                _ => None,
            };
            assert_eq!(weights.subspace().rank_and_period(), subspace, "{recipe}");
            assert_eq!(recipe.config(QueryBudget::new(2, 1).unwrap()).estimator.space, recipe.space());
        }
    }

    /// A learned allocation gains nothing over the closed form with the same estimates.
    #[test]
    fn only_the_paper_s_recipe_learns_its_allocation() {
        let allocators = Recipe::ALL.map(Recipe::allocator);
        assert_eq!(allocators[..2], [AllocatorKind::Neyman, AllocatorKind::GaussianPaper]);
        assert!(allocators[2..].iter().all(|a| a.is_uniform()));
    }

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
