//! The subspace that weight noise lies in.

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// The subspace that the noise on a weight matrix lies in (weight space).
///
/// A matrix with `d` inputs sees noise B·U/√R. The basis B `[d, R]` is the same for all queries of
/// `period` steps, and U `[R, outputs]` is drawn anew for every query. Both have entries of unit
/// variance, so every coordinate of the noise has unit variance too (`docs/method.md`, *Weight noise in
/// a subspace*).
///
/// The parameter's first axis holds the inputs of a matrix, as in Burn's `Linear`. A parameter of
/// more axes has its outputs on the first one and all others are inputs, as in a convolution.
/// Vectors get full noise. So does a parameter with at most R inputs or R outputs, where the product
/// would not have a lower rank.
///
/// A basis is a function of (seed of the estimator, step / `period`, number of the parameter among
/// the trained ones). It is never stored, and a resumed run goes on with the same one. The steps of
/// several workers, accumulated steps and pilot queries share it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Subspace {
    /// All coordinates: no subspace.
    #[default]
    Full,
    /// A basis of independent entries of the noise's law.
    ///
    /// LOZO (Chen et al. 2025, arXiv 2410.07698) with Gaussian noise. A basis costs `rank` draws per
    /// input in a step.
    Random {
        /// Largest rank of the noise on a matrix, at least 1.
        rank: usize,
        /// Steps that share a basis, at least 1.
        period: u64,
    },
    /// √d times orthonormal columns, uniformly distributed.
    ///
    /// ZO-Muon (Lang et al. 2026, arXiv 2602.17155). Within a period the mean of the estimate is d/R
    /// times the projection of the gradient. The host makes the basis, with `rank`² products per
    /// input in a step.
    Orthonormal {
        /// Largest rank of the noise on a matrix, at least 1.
        rank: usize,
        /// Steps that share a basis, at least 1.
        period: u64,
    },
}

impl Subspace {
    /// Rank and period; `None` without a subspace.
    #[must_use]
    pub fn rank_and_period(self) -> Option<(usize, u64)> {
        match self {
            Self::Full => None,
            Self::Random { rank, period } | Self::Orthonormal { rank, period } => Some((rank, period)),
        }
    }

    /// Checks that rank and period are at least 1.
    ///
    /// # Errors
    /// [`Error::Setting`], naming the setting at fault.
    pub(super) fn validate(self) -> Result<(), Error> {
        let fail = |name| Err(Error::Setting { name, value: 0.0, remedy: "use at least 1".into() });
        match self.rank_and_period() {
            Some((0, _)) => fail("rank of the subspace"),
            Some((_, 0)) => fail("period of the subspace"),
            _ => Ok(()),
        }
    }
}

/// The name, then rank and period: `random:4:50`.
impl std::fmt::Display for Subspace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Full => f.write_str("full"),
            Self::Random { rank, period } => write!(f, "random:{rank}:{period}"),
            Self::Orthonormal { rank, period } => write!(f, "orthonormal:{rank}:{period}"),
        }
    }
}

impl std::str::FromStr for Subspace {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        let unknown = || Error::Unknown {
            what: "subspace",
            name: s.into(),
            choices: "full, random:R:T, orthonormal:R:T (of rank R, kept for T steps)",
        };
        let mut parts = s.split(':');
        let kind = parts.next();
        let (rank, period) = (parts.next().map(str::parse), parts.next().map(str::parse));
        match (kind, rank, period, parts.next()) {
            (Some("full"), None, None, None) => Ok(Self::Full),
            (Some("random"), Some(Ok(rank)), Some(Ok(period)), None) => Ok(Self::Random { rank, period }),
            (Some("orthonormal"), Some(Ok(rank)), Some(Ok(period)), None) => Ok(Self::Orthonormal { rank, period }),
            _ => Err(unknown()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subspaces_have_names() {
        for subspace in
            [Subspace::Full, Subspace::Random { rank: 4, period: 50 }, Subspace::Orthonormal { rank: 64, period: 100 }]
        {
            assert_eq!(subspace.to_string().parse::<Subspace>(), Ok(subspace));
        }
        for name in ["", "random", "random:4", "random:4:-1", "random:4:50:1", "full:1", "lowrank:4:50", "random:a:50"]
        {
            let message = name.parse::<Subspace>().unwrap_err().to_string();
            assert!(message.contains(&format!("'{name}'")) && message.contains("random:R:T"), "{message}");
        }
    }

    #[test]
    fn a_rank_or_period_of_0_is_named() {
        let message = |subspace: Subspace| subspace.validate().unwrap_err().to_string();
        assert!(message(Subspace::Random { rank: 0, period: 1 }).contains("rank"));
        assert!(message(Subspace::Orthonormal { rank: 1, period: 0 }).contains("period"));
        assert_eq!(Subspace::Orthonormal { rank: 1, period: 1 }.validate(), Ok(()));
        assert_eq!(Subspace::Full.validate(), Ok(()));
    }
}
