//! What the sites of a ViT are.

use std::fmt;
use std::str::FromStr;

use crate::error::VitError;

/// What the sites of a ViT are: where noise falls in the activation space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Sites {
    /// `linear`: every layer.
    ///
    /// Nothing at all is differentiated, and scopes of a few layers reuse the most of a pass.
    #[default]
    Linear,
    /// `branch`: what the embedding, each residual branch and the head give.
    ///
    /// A block perturbs 2·tokens·embed_dim coordinates, instead of some (6 + mlp_ratio) times
    /// tokens·embed_dim. In the update each branch is differentiated by itself
    /// ([`Probe::module`](flops_core::Probe::module)), which costs about one backpropagation of the
    /// trained branches, one at a time.
    Branch,
}

impl fmt::Display for Sites {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Linear => "linear",
            Self::Branch => "branch",
        })
    }
}

impl FromStr for Sites {
    type Err = VitError;

    fn from_str(text: &str) -> Result<Self, VitError> {
        match text {
            "linear" => Ok(Self::Linear),
            "branch" => Ok(Self::Branch),
            _ => Err(VitError::UnknownSites { name: text.into() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sites_round_trip_through_text_and_errors_name_them() {
        for sites in [Sites::Linear, Sites::Branch] {
            assert_eq!(sites.to_string().parse::<Sites>().unwrap(), sites);
        }
        let error = "block".parse::<Sites>().unwrap_err().to_string();
        assert!(error.contains("block") && error.contains("linear or branch"), "{error}");
    }
}
