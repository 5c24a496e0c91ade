//! Running second moments of the sites, and the probabilities that follow from them.

use serde::{Deserialize, Serialize};

use crate::probe::{SiteKey, TracedSite};

/// Share of the site probabilities that is equal for all sites, so that none is neglected.
const EQUAL_SHARE: f64 = 0.2;
/// Factor on a site's running sums per step that has it.
const SITE_DECAY: f64 = 0.95;

/// What the queries of a step show of one site.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct SiteMoment {
    /// Which site it is.
    pub key: SiteKey,
    /// Σ c²·E s²·E‖∂_s‖² over the queries on the site.
    pub sum: f64,
    /// The number of these queries.
    pub queries: u64,
}

impl SiteMoment {
    /// The sums of `queries` queries on a site.
    pub(crate) fn new(key: SiteKey, (sum, queries): (f64, u64)) -> Self {
        Self { key, sum, queries }
    }
}

/// Adds the moments of other queries; those of a site that is not there yet are appended.
pub(crate) fn merge(moments: &mut Vec<SiteMoment>, others: Vec<SiteMoment>) {
    for other in others {
        match moments.iter_mut().find(|mine| mine.key == other.key) {
            Some(mine) => (mine.sum, mine.queries) = (mine.sum + other.sum, mine.queries + other.queries),
            None => moments.push(other),
        }
    }
}

/// Running second moments E_s·G_s of the estimates at each site, and site probabilities p_s ∝
/// √(E_s·G_s).
///
/// A second moment is one number, whatever the width of the site, so it is kept by site alone:
/// texts of several lengths share it. A step that does not have a site leaves its sums as they were.
///
/// Memory: 32 bytes for each site that the model has had.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SiteTracker {
    /// In the order in which they were first met.
    sites: Vec<SiteSums>,
}

/// Running sums of one site.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct SiteSums {
    key: SiteKey,
    /// Σ c²·E_s, decayed.
    sum: f64,
    /// The number of queries, decayed.
    queries: f64,
}

impl SiteTracker {
    /// Probabilities of the sites of a step, whose queries cost `costs`: p_s ∝ √(E_s·G_s/cost_s),
    /// mixed with equal ones.
    ///
    /// They are all equal until every site of the step has been seen.
    ///
    /// # Shapes
    /// - sites, costs: `[sites]`, as many of both; costs above 0
    /// - returns: `[sites]`, which sum to 1
    pub fn probabilities(&self, sites: &[TracedSite], costs: &[f64]) -> Vec<f64> {
        let equal = 1.0 / sites.len().max(1) as f64;
        let root = |(site, cost): (&TracedSite, &f64)| {
            let known = self.sites.iter().find(|known| known.key == site.key && known.queries > 0.0)?;
            Some((known.sum / (known.queries * cost)).sqrt())
        };
        let roots: Option<Vec<f64>> = sites.iter().zip(costs).map(root).collect();
        let total: f64 = roots.iter().flatten().sum();
        match roots {
            Some(roots) if total > 0.0 && total.is_finite() => {
                roots.iter().map(|r| EQUAL_SHARE * equal + (1.0 - EQUAL_SHARE) * r / total).collect()
            }
            _ => vec![equal; sites.len()],
        }
    }

    /// E_s·G_s at each site, the second moment of a query there, as a running mean.
    ///
    /// Sites come in the order in which they were first met. It is NaN for a site without queries.
    pub fn moments(&self) -> Vec<f64> {
        self.sites.iter().map(|site| site.sum / site.queries).collect()
    }

    /// Adds the observations of one step at each of its sites.
    ///
    /// A sum that is not finite is skipped.
    pub fn observe(&mut self, moments: &[SiteMoment]) {
        for moment in moments {
            let at = self.sites.iter().position(|site| site.key == moment.key).unwrap_or_else(|| {
                self.sites.push(SiteSums { key: moment.key, sum: 0.0, queries: 0.0 });
                self.sites.len() - 1
            });
            if moment.sum.is_finite() {
                let kept = &mut self.sites[at];
                kept.sum = SITE_DECAY * kept.sum + moment.sum;
                kept.queries = SITE_DECAY * kept.queries + moment.queries as f64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(parameter: u64, sum: f64, queries: u64) -> SiteMoment {
        SiteMoment::new(TracedSite::fake(parameter, 1).key, (sum, queries))
    }

    fn sites<const N: usize>(parameters: [u64; N]) -> [TracedSite; N] {
        parameters.map(|parameter| TracedSite::fake(parameter, 1))
    }

    fn close(got: Vec<f64>, expected: &[f64]) {
        assert_eq!(got.len(), expected.len());
        assert!(got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{got:?}, not {expected:?}");
    }

    /// p_s = 0.2/S + 0.8·√(m_s/cost_s)/Σ, in closed form.
    #[test]
    fn probabilities_follow_moments_and_costs() {
        let mut tracker = SiteTracker::default();
        tracker.observe(&[moment(8, 8.0, 2), moment(3, 64.0, 4), moment(5, 9.0, 9)]);
        // moments 4, 16 and 1, roots 2, 4 and 1
        close(tracker.probabilities(&sites([8, 3, 5]), &[1.0; 3]), &[2.0, 4.0, 1.0].map(|r| 0.2 / 3.0 + 0.8 * r / 7.0));
        close(tracker.probabilities(&sites([5, 8]), &[1.0; 2]), &[1.0, 2.0].map(|r| 0.1 + 0.8 * r / 3.0));
        close(tracker.probabilities(&sites([8, 3]), &[1.0, 0.25]), &[2.0, 8.0].map(|r| 0.1 + 0.8 * r / 10.0));
        assert_eq!(tracker.moments(), [4.0, 16.0, 1.0]);
    }

    /// Sites that the step does not have play no part, and one that nobody has seen makes all equal.
    #[test]
    fn probabilities_are_equal_until_every_site_of_the_step_is_known() {
        let mut tracker = SiteTracker::default();
        close(tracker.probabilities(&sites([1, 2]), &[1.0; 2]), &[0.5; 2]);
        tracker.observe(&[moment(1, 9.0, 1), moment(2, 0.0, 0)]);
        close(tracker.probabilities(&sites([1, 2]), &[1.0; 2]), &[0.5; 2]);
        close(tracker.probabilities(&sites([1]), &[1.0]), &[1.0]);
        // a step with the second site alone leaves the first as it was
        tracker.observe(&[moment(2, 1.0, 1)]);
        close(tracker.probabilities(&sites([1, 2]), &[1.0; 2]), &[3.0, 1.0].map(|r| 0.1 + 0.8 * r / 4.0));
        close(tracker.probabilities(&sites([1, 2, 3]), &[1.0; 3]), &[1.0 / 3.0; 3]);
        let mut flat = SiteTracker::default();
        flat.observe(&[moment(1, 0.0, 1), moment(2, 0.0, 1)]);
        close(flat.probabilities(&sites([1, 2]), &[1.0; 2]), &[0.5; 2]);
        assert!(tracker.probabilities(&[], &[]).is_empty());
    }

    #[test]
    fn sums_decay_and_broken_ones_are_skipped() {
        let mut tracker = SiteTracker::default();
        tracker.observe(&[moment(1, 10.0, 2)]);
        tracker.observe(&[moment(1, 1.0, 1)]);
        assert_eq!(tracker.moments(), [(0.95 * 10.0 + 1.0) / (0.95 * 2.0 + 1.0)]);
        let before = tracker.clone();
        tracker.observe(&[moment(1, f64::INFINITY, 1)]);
        assert_eq!(tracker, before);
        let json = serde_json::to_string(&tracker).unwrap();
        assert_eq!(serde_json::from_str::<SiteTracker>(&json).unwrap(), tracker);
    }

    #[test]
    fn moments_of_pilots_and_of_the_rest_add_up_by_site() {
        let mut moments = vec![moment(1, 2.0, 1), moment(2, 3.0, 1)];
        merge(&mut moments, vec![moment(2, 4.0, 2), moment(3, 5.0, 1)]);
        assert_eq!(moments, [moment(1, 2.0, 1), moment(2, 7.0, 3), moment(3, 5.0, 1)]);
    }
}
