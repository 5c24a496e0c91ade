//! One-sided and antithetic queries.

use serde::{Deserialize, Serialize};

use crate::names::named_enum;

/// How the queries of an example are sampled: one-sided or in antithetic pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Sampling {
    /// Every query has its own direction, and the clean loss is the baseline: c = (ℓ(z + σε) −
    /// ℓ_clean)/σ.
    OneSided,
    /// Two queries of an example share a direction: c = (ℓ(z + σε) − ℓ(z − σε))/2σ. An odd last
    /// query is one-sided.
    Antithetic,
}

named_enum! { Sampling: "sampling" { OneSided => "one-sided", Antithetic => "antithetic" } }

impl Sampling {
    /// Returns the direction of an example's query number `query`, and its sign.
    pub(crate) fn direction(self, query: usize) -> (u64, f32) {
        match self {
            Self::OneSided => (query as u64, 1.0),
            Self::Antithetic => ((query / 2) as u64, if query.is_multiple_of(2) { 1.0 } else { -1.0 }),
        }
    }

    /// Number of queries that share a direction.
    ///
    /// They must be evaluated, weighted and dropped together.
    pub(crate) fn group(self) -> usize {
        match self {
            Self::OneSided => 1,
            Self::Antithetic => 2,
        }
    }
}
