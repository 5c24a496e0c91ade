//! Running second moments of the sites, and the probabilities that follow from them.

use serde::{Deserialize, Serialize};

/// Share of the site probabilities that is equal for all sites, so that none is neglected.
const EQUAL_SHARE: f64 = 0.2;
/// Factor on a site's running sums per step.
const SITE_DECAY: f64 = 0.95;

/// Running second moments E_s·G_s of the estimates at each site, and site probabilities p_s ∝
/// √(E_s·G_s).
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SiteTracker {
    /// Σ c²·E_s and the number of queries at each site, decayed.
    sites: Vec<(f64, f64)>,
}

impl SiteTracker {
    /// Probabilities of sites whose queries cost `costs`: p_s ∝ √(E_s·G_s/cost_s), mixed with equal
    /// ones.
    ///
    /// They are all equal until every site has been seen.
    pub fn probabilities(&self, costs: &[f64]) -> Vec<f64> {
        let sites = costs.len();
        let equal = 1.0 / sites.max(1) as f64;
        let known = self.sites.len() == sites && self.sites.iter().all(|s| s.1 > 0.0);
        let roots: Vec<f64> = self.sites.iter().zip(costs).map(|((sum, n), cost)| (sum / (n * cost)).sqrt()).collect();
        let total: f64 = roots.iter().sum();
        if !known || total <= 0.0 || !total.is_finite() {
            return vec![equal; sites];
        }
        roots.iter().map(|r| EQUAL_SHARE * equal + (1.0 - EQUAL_SHARE) * r / total).collect()
    }

    /// E_s·G_s at each site, the second moment of a query there, as a running mean.
    ///
    /// It is NaN for a site without queries.
    pub fn moments(&self) -> Vec<f64> {
        self.sites.iter().map(|(sum, queries)| sum / queries).collect()
    }

    /// Adds the observations of one step at each site: the sum of c²·E_s over its queries, and
    /// their number.
    pub fn observe(&mut self, moments: &[(f64, u64)]) {
        if moments.is_empty() {
            return;
        }
        if self.sites.len() != moments.len() {
            self.sites = vec![(0.0, 0.0); moments.len()];
        }
        for (kept, &(sum, n)) in self.sites.iter_mut().zip(moments) {
            if sum.is_finite() {
                *kept = (SITE_DECAY * kept.0 + sum, SITE_DECAY * kept.1 + n as f64);
            }
        }
    }
}
