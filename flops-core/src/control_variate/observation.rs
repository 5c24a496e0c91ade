//! What a step shows of the regression.

use crate::probe::SiteKey;

/// What a step adds to the regression: sums over the examples whose queries survived.
#[derive(Clone, Debug)]
pub struct Observation {
    /// The number of signals.
    pub(super) dim: usize,
    /// The number of examples.
    pub(super) examples: f64,
    /// Σ r_j r_jᵀ, `[signals, signals]`.
    pub(super) covariance: Vec<f64>,
    /// Σ ‖r_j‖².
    pub(super) squares: f64,
    /// The sites, in the order in which they were met.
    pub(crate) sites: Vec<SiteObservation>,
}

/// What a step adds to the regression of one site.
#[derive(Clone, Debug)]
pub(crate) struct SiteObservation {
    pub(super) key: SiteKey,
    /// The number of examples.
    pub(super) examples: f64,
    /// Σ ‖r_j‖², over these examples.
    pub(super) squares: f64,
    /// Σ r_j ĝ_jᵀ, `[signals, coordinates]`.
    pub(super) cross: Vec<f32>,
    /// Σ h_jᵀĝ_j, with h_j before its gain.
    pub(super) along: f64,
    /// Σ ‖h_j‖², with h_j before its gain.
    pub(super) squared: f64,
}

impl Observation {
    /// Adds the observation of other examples, by the same signals.
    ///
    /// Sums of the same site and width are added. Any other site is appended.
    pub(crate) fn merge(&mut self, other: Self) {
        self.examples += other.examples;
        self.squares += other.squares;
        self.covariance.iter_mut().zip(other.covariance).for_each(|(a, b)| *a += b);
        for theirs in other.sites {
            match self.sites.iter_mut().find(|mine| mine.is_like(&theirs)) {
                Some(mine) => mine.merge(theirs),
                None => self.sites.push(theirs),
            }
        }
    }

    pub(super) fn is_finite(&self) -> bool {
        self.covariance.iter().all(|c| c.is_finite())
            && self.sites.iter().all(|s| s.along.is_finite() && s.cross.iter().all(|c| c.is_finite()))
    }
}

impl SiteObservation {
    /// Whether both belong to the same site and width.
    fn is_like(&self, other: &Self) -> bool {
        self.key == other.key && self.cross.len() == other.cross.len()
    }

    fn merge(&mut self, other: Self) {
        self.examples += other.examples;
        self.squares += other.squares;
        self.cross.iter_mut().zip(other.cross).for_each(|(a, b)| *a += b);
        self.along += other.along;
        self.squared += other.squared;
    }
}
