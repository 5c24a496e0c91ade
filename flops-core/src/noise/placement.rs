//! On which layers the noise of a query falls.

use serde::{Deserialize, Serialize};

use crate::names::named_enum;

/// On which layers the noise of a query falls (activation and low-rank spaces).
///
/// Let G_s be the squared norm of the gradient at the output of site s, and E_s its [squared score
/// norm](crate::probe::Site::squared_score_norm). With noise on all sites at once, each site's
/// estimate carries the noise of all others. Its variance per query is (Σ_s E_s)(Σ_s G_s).
///
/// With noise on one site per direction, drawn with probability p_s, the variance is Σ_s
/// E_s·G_s/p_s. At best this is (Σ_s √(E_s·G_s))², which is never larger, by the Cauchy–Schwarz
/// inequality.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Placement {
    /// On all sites at once.
    ///
    /// In the activation space gradients use clean inputs, and those of a query differ: by O(σ) in a
    /// smooth model, by anything behind a decision such as an argmax. Layers that are called again in
    /// a pass are refused there.
    Joint,
    /// On one site, drawn anew for every direction, with weight 1/(B·A_j·p_s).
    ///
    /// p_s ∝ √(E_s·G_s), from running estimates.
    Single,
    /// On one site, as [`Single`](Self::Single), with the cost of the query taken into account.
    ///
    /// p_s ∝ √(E_s·G_s/cost_s). A query on site s skips the stages before the site; cost_s is the
    /// part of a pass that it does run.
    ///
    /// The directions of an example are spread evenly over the sites. Each site gets ⌊A_j·p_s⌋
    /// directions or a few more for large A_j, and a fair draw for small A_j.
    ///
    /// The budget counts passes instead of queries: Σ A_js·cost_s is B·A₀ full passes on average.
    /// The cheaper the queries are on average, the more of them a budget buys.
    CostWeighted,
}

named_enum! {
    Placement: "placement" { Joint => "joint", Single => "single", CostWeighted => "cost-weighted" }
}

impl Placement {
    /// Whether a direction falls on a single site.
    pub(crate) fn is_single_site(self) -> bool {
        self != Self::Joint
    }
}
