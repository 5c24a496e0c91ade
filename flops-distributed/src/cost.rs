//! What a sum over leaves costs: computed everywhere, or shared.

use std::fmt::{self, Display, Formatter};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::DistributedError;

/// How workers come by a sum over all leaves, such as a gradient.
///
/// The bits are the same in all modes, since the tree of the sum is fixed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SumMode {
    /// The cheaper of the two, as measured in the run.
    #[default]
    Auto,
    /// Every worker adds all leaves itself from losses and seeds, and nothing is sent.
    Scalars,
    /// Every worker adds its own leaves, and the parts are exchanged.
    Gradients,
}

impl SumMode {
    /// All modes.
    pub const ALL: [Self; 3] = [Self::Auto, Self::Scalars, Self::Gradients];

    /// The name, as in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Scalars => "scalars",
            Self::Gradients => "gradients",
        }
    }
}

impl Display for SumMode {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for SumMode {
    type Err = DistributedError;

    fn from_str(name: &str) -> Result<Self, DistributedError> {
        let known = Self::ALL.into_iter().find(|mode| mode.name() == name);
        let remedy = || "give auto, scalars or gradients".to_string();
        known.ok_or_else(|| DistributedError::Setting { what: "the sum mode", value: name.into(), remedy: remedy() })
    }
}

/// What was measured of a sum whose jobs [cost the same on every worker](flops_executor::Round::repeats).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SumCost {
    /// The time that a leaf takes here.
    pub leaf: Duration,
    /// The time that one exchange of a packed sum takes.
    pub exchange: Duration,
}

impl SumCost {
    /// The cheaper mode for a number of workers that need `exchanges` exchanges to share a sum over
    /// `leaves` leaves.
    pub fn mode(self, leaves: usize, workers: usize, exchanges: usize) -> SumMode {
        let leaf = self.leaf.as_secs_f64();
        let scalars = leaf * leaves as f64;
        let gradients = leaf * leaves.div_ceil(workers.max(1)) as f64 + self.exchange.as_secs_f64() * exchanges as f64;
        if scalars <= gradients { SumMode::Scalars } else { SumMode::Gradients }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cheaper_mode_is_chosen() {
        let cost =
            |leaf, exchange| SumCost { leaf: Duration::from_millis(leaf), exchange: Duration::from_millis(exchange) };
        // one worker has nobody to share with
        assert_eq!(cost(100, 0).mode(8, 1, 0), SumMode::Scalars);
        assert_eq!(cost(100, 10).mode(8, 2, 2), SumMode::Gradients);
        assert_eq!(cost(1, 10).mode(8, 2, 2), SumMode::Scalars);
        assert_eq!(cost(0, 0).mode(8, 0, 0), SumMode::Scalars);
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for mode in SumMode::ALL {
            assert_eq!(mode.to_string().parse::<SumMode>().unwrap(), mode);
        }
        assert!("both".parse::<SumMode>().unwrap_err().to_string().contains("\"both\""));
    }
}
