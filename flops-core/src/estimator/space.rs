//! Where the noise falls, with the settings that each place has.

use serde::{Deserialize, Serialize};

use super::subspace::Subspace;
use crate::control_variate::{ControlVariate, GradientEstimate};
use crate::error::Error;
use crate::names::named_enum;
use crate::noise::Placement;

/// Divisor of the gradient before the optimizer sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Normalisation {
    /// No normalisation.
    #[default]
    None,
    /// s/σ, where s is the standard deviation, over the directions of a step, of the batch's mean
    /// change of loss.
    ///
    /// This is FZOO's step (Dang et al. 2025, arXiv 2506.09034): its length follows the learning
    /// rate alone. It needs at least 2 queries per example. Adam needs no normalisation: its step
    /// does not depend on the scale of the gradient.
    LossSpread,
}

named_enum! { Normalisation: "normalisation" { None => "none", LossSpread => "loss-spread" } }

/// Where the noise falls, with the settings of that place.
///
/// [`ForwardLearner`](crate::ForwardLearner) applies all settings. An
/// [`Estimator`](super::Estimator) alone applies the placement, and in a shrunk estimate shares the
/// noise of tokens that are alike: predictions and site probabilities
/// are set on its [`CleanPass`](super::CleanPass). A name such as `activation` stands for the
/// default settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Space {
    /// On the outputs of the trained layers, independent for every query of every example.
    ///
    /// It needs layers that are called through the probe.
    Activation {
        /// On how many layers the noise of a query falls.
        placement: Placement,
        /// What is subtracted from the coefficients of the queries, besides the clean loss.
        control_variate: ControlVariate,
        /// Whether the estimate is unbiased, or shrunk towards the prediction.
        estimate: GradientEstimate,
    },
    /// On the trained parameters themselves, one direction for all examples of a forward pass.
    ///
    /// It works for any module (SPSA, MeZO, evolution strategies; in a subspace LOZO and ZO-Muon).
    Weights {
        /// Divisor of the gradient.
        normalisation: Normalisation,
        /// The subspace that the noise on a matrix lies in.
        #[serde(default)]
        subspace: Subspace,
    },
    /// On the weights of the trained layers, of low rank, independent for every query of every
    /// example.
    ///
    /// All calls of a layer in a pass share the noise of its weights, so that a recurrence or an
    /// episode is perturbed as a whole.
    ///
    /// It needs layers that are called through the probe (EGGROLL). Embeddings, bare parameters,
    /// and layers without [`WeightNoise`](crate::probe::WeightNoise) get noise on their output.
    LowRank {
        /// Rank of the noise on a weight, at least 1.
        rank: usize,
        /// On how many layers the noise of a query falls.
        placement: Placement,
    },
}

impl Space {
    /// Every space with its default settings, the low rank being 1.
    pub const ALL: [Self; 3] = [Self::activation(), Self::weights(), Self::low_rank(1)];

    /// Activation noise on one layer per direction, with the learned control variate.
    #[must_use]
    pub const fn activation() -> Self {
        Self::Activation {
            placement: Placement::Single,
            control_variate: ControlVariate::Prediction,
            estimate: GradientEstimate::Unbiased,
        }
    }

    /// Weight noise on all coordinates, the gradient as it is.
    #[must_use]
    pub const fn weights() -> Self {
        Self::Weights { normalisation: Normalisation::None, subspace: Subspace::Full }
    }

    /// Noise of rank `rank` on the weights of one layer per direction.
    #[must_use]
    pub const fn low_rank(rank: usize) -> Self {
        Self::LowRank { rank, placement: Placement::Single }
    }

    /// Whether noise is independent between examples, so that allocation pays; otherwise those of a
    /// pass share it.
    #[must_use]
    pub fn is_independent(self) -> bool {
        !matches!(self, Self::Weights { .. })
    }

    /// Whether the calls of a layer in a pass share the noise of its weights, and are one site.
    pub(crate) fn is_by_layer(self) -> bool {
        matches!(self, Self::LowRank { .. })
    }

    /// On how many layers the noise of a query falls, where the space has the choice.
    #[must_use]
    pub fn placement(self) -> Option<Placement> {
        match self {
            Self::Activation { placement, .. } | Self::LowRank { placement, .. } => Some(placement),
            Self::Weights { .. } => None,
        }
    }

    /// The control variate, where the space has one.
    #[must_use]
    pub fn control_variate(self) -> Option<ControlVariate> {
        match self {
            Self::Activation { control_variate, .. } => Some(control_variate),
            Self::Weights { .. } | Self::LowRank { .. } => None,
        }
    }

    /// Whether gradients are unbiased, or shrunk towards a prediction.
    #[must_use]
    pub fn estimate(self) -> GradientEstimate {
        match self {
            Self::Activation { estimate, .. } => estimate,
            Self::Weights { .. } | Self::LowRank { .. } => GradientEstimate::Unbiased,
        }
    }

    /// Divisor of the gradient.
    #[must_use]
    pub fn normalisation(self) -> Normalisation {
        match self {
            Self::Weights { normalisation, .. } => normalisation,
            Self::Activation { .. } | Self::LowRank { .. } => Normalisation::None,
        }
    }

    /// The subspace of weight noise; full in the other spaces.
    #[must_use]
    pub fn subspace(self) -> Subspace {
        match self {
            Self::Weights { subspace, .. } => subspace,
            Self::Activation { .. } | Self::LowRank { .. } => Subspace::Full,
        }
    }

    /// The same space with this placement.
    ///
    /// # Errors
    /// [`Error::UnusedSetting`] for the weight space, where noise falls on all parameters at once.
    pub fn with_placement(self, placement: Placement) -> Result<Self, Error> {
        match self {
            Self::Activation { control_variate, estimate, .. } => {
                Ok(Self::Activation { placement, control_variate, estimate })
            }
            Self::LowRank { rank, .. } => Ok(Self::LowRank { rank, placement }),
            Self::Weights { .. } => Err(self.unused("placement", placement, "activation or lowrank:R")),
        }
    }

    /// The same space with this control variate.
    ///
    /// # Errors
    /// [`Error::UnusedSetting`] for any space but the activation space.
    pub fn with_control_variate(self, control_variate: ControlVariate) -> Result<Self, Error> {
        match self {
            Self::Activation { placement, estimate, .. } => {
                Ok(Self::Activation { placement, control_variate, estimate })
            }
            Self::Weights { .. } | Self::LowRank { .. } => {
                Err(self.unused("control variate", control_variate, "activation"))
            }
        }
    }

    /// The same space with this kind of estimate.
    ///
    /// # Errors
    /// [`Error::UnusedSetting`] for any space but the activation space.
    pub fn with_estimate(self, estimate: GradientEstimate) -> Result<Self, Error> {
        match self {
            Self::Activation { placement, control_variate, .. } => {
                Ok(Self::Activation { placement, control_variate, estimate })
            }
            Self::Weights { .. } | Self::LowRank { .. } => {
                Err(self.unused("gradient estimate", estimate, "activation"))
            }
        }
    }

    /// The same space with this normalisation.
    ///
    /// # Errors
    /// [`Error::UnusedSetting`] for any space but the weight space.
    pub fn with_normalisation(self, normalisation: Normalisation) -> Result<Self, Error> {
        match self {
            Self::Weights { subspace, .. } => Ok(Self::Weights { normalisation, subspace }),
            Self::Activation { .. } | Self::LowRank { .. } => {
                Err(self.unused("normalisation", normalisation, "weights"))
            }
        }
    }

    /// The same space with its noise in this subspace.
    ///
    /// # Errors
    /// [`Error::UnusedSetting`] for any space but the weight space.
    pub fn with_subspace(self, subspace: Subspace) -> Result<Self, Error> {
        match self {
            Self::Weights { normalisation, .. } => Ok(Self::Weights { normalisation, subspace }),
            Self::Activation { .. } | Self::LowRank { .. } => Err(self.unused("subspace", subspace, "weights")),
        }
    }

    fn unused(self, setting: &'static str, value: impl std::fmt::Display, spaces: &'static str) -> Error {
        Error::UnusedSetting { setting, value: value.to_string(), space: self.to_string(), spaces }
    }
}

impl std::fmt::Display for Space {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Activation { .. } => f.write_str("activation"),
            Self::Weights { .. } => f.write_str("weights"),
            Self::LowRank { rank, .. } => write!(f, "lowrank:{rank}"),
        }
    }
}

/// The space of that name with its default settings.
impl std::str::FromStr for Space {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        match s {
            "activation" => Ok(Self::activation()),
            "weights" => Ok(Self::weights()),
            _ => s.strip_prefix("lowrank:").and_then(|rank| rank.parse().ok()).map(Self::low_rank).ok_or_else(|| {
                Error::Unknown {
                    what: "perturbation space",
                    name: s.into(),
                    choices: "activation, weights, lowrank:R (of rank R)",
                }
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spaces_have_names() {
        for space in [Space::activation(), Space::weights(), Space::low_rank(3)] {
            assert_eq!(space.to_string().parse::<Space>(), Ok(space));
        }
        assert!("outer".parse::<Space>().unwrap_err().to_string().contains("lowrank:R"));
    }

    #[test]
    fn a_space_refuses_what_it_does_not_use() {
        let message = |result: Result<Space, Error>| result.unwrap_err().to_string();
        let weights = Space::weights();
        for (refused, words) in [
            (weights.with_placement(Placement::Single), ["placement = single", "weights", "lowrank:R"]),
            (weights.with_control_variate(ControlVariate::None), ["control variate = none", "weights", "activation"]),
            (
                Space::low_rank(2).with_control_variate(ControlVariate::Prediction),
                ["control variate = prediction", "lowrank:2", "activation"],
            ),
            (
                Space::activation().with_normalisation(Normalisation::LossSpread),
                ["normalisation = loss-spread", "activation", "weights"],
            ),
            (
                Space::low_rank(2).with_subspace(Subspace::Random { rank: 4, period: 50 }),
                ["subspace = random:4:50", "lowrank:2", "weights"],
            ),
        ] {
            let message = message(refused);
            assert!(words.iter().all(|word| message.contains(word)), "{message}");
        }
        let joint = Space::low_rank(2).with_placement(Placement::Joint).unwrap();
        assert_eq!((joint.placement(), joint.control_variate()), (Some(Placement::Joint), None));
        // a setting leaves the others as they are
        let (spread, subspace) = (Normalisation::LossSpread, Subspace::Orthonormal { rank: 2, period: 9 });
        let both = weights.with_normalisation(spread).unwrap().with_subspace(subspace).unwrap();
        assert_eq!(both, weights.with_subspace(subspace).unwrap().with_normalisation(spread).unwrap());
        assert_eq!((both.normalisation(), both.subspace()), (spread, subspace));
    }

    /// Settings that were written before there were subspaces are read back as full noise.
    #[test]
    fn spaces_are_read_back() {
        let lozo = Space::weights().with_subspace(Subspace::Random { rank: 4, period: 50 }).unwrap();
        let json = serde_json::to_string(&lozo).unwrap();
        assert!(json.contains(r#""subspace":{"random":{"rank":4,"period":50}}"#), "{json}");
        assert_eq!(serde_json::from_str::<Space>(&json).unwrap(), lozo);
        let before = r#"{"weights":{"normalisation":"none"}}"#;
        assert_eq!(serde_json::from_str::<Space>(before).unwrap(), Space::weights());
    }
}
