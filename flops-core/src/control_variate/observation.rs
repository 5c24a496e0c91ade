//! What a step shows of the prediction.

use super::signals::Basis;
use crate::probe::SiteKey;

/// What a step adds to the predictor: sums over its queries.
#[derive(Clone, Debug, Default)]
pub struct Observation {
    /// The number of signals along which the innovations are.
    pub(super) dim: usize,
    /// The directions of these signals; `None` where they are the model's own.
    pub(super) basis: Option<Basis>,
    /// The directions from the next step on.
    pub(super) next: Option<Basis>,
    /// The sites, in the order in which they were met.
    pub(crate) sites: Vec<SiteObservation>,
}

/// What a step adds to the prediction of one site.
#[derive(Clone, Debug)]
pub(crate) struct SiteObservation {
    pub(super) key: SiteKey,
    /// Shared coordinates of a row.
    pub(super) shared: usize,
    /// Σ (answer − Wε) εᵀ over the queries, `[signals, shared]`; empty without signals.
    pub(super) innovation: Vec<f32>,
    /// The number of queries.
    pub(super) queries: f64,
    /// Shared coordinates that a query perturbs, of this site and of all others together with it.
    pub(crate) together: usize,
    /// Σ c·ĉ, of coefficients and of those that the weights predict.
    pub(super) along: f64,
    /// Σ ĉ².
    pub(super) squared: f64,
    /// Σ c².
    pub(super) total: f64,
    /// What halves of the batch show of the residual's estimate.
    pub(crate) residual: ResidualMoments,
}

/// Sums over pairs of estimates of the residual gradient, from two halves of some examples.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct ResidualMoments {
    /// Whether it was tried.
    pub tried: bool,
    /// Σ ⟨a, b⟩, whose mean is R.
    pub product: f64,
    /// Σ of what the pairs show of V.
    pub variance: f64,
    /// The number of pairs.
    pub pairs: f64,
}

impl Observation {
    /// Whether both are by the same signals, so that they can be merged.
    pub(crate) fn fits(&self, other: &Self) -> bool {
        self.dim == other.dim && self.basis == other.basis
    }

    /// Adds the observation of other queries by the same weights.
    ///
    /// Sums of the same site and width are added. Any other site is appended.
    pub(crate) fn merge(&mut self, other: Self) {
        self.next = other.next.or(self.next.take());
        for theirs in other.sites {
            match self.sites.iter_mut().find(|mine| mine.is_like(&theirs)) {
                Some(mine) => mine.merge(theirs),
                None => self.sites.push(theirs),
            }
        }
    }
}

impl SiteObservation {
    /// Whether both belong to the same site and width.
    fn is_like(&self, other: &Self) -> bool {
        (self.key, self.shared) == (other.key, other.shared) && self.innovation.len() == other.innovation.len()
    }

    pub(super) fn is_finite(&self) -> bool {
        let sums = [self.along, self.squared, self.total, self.residual.product, self.residual.variance];
        sums.iter().all(|v| v.is_finite()) && self.innovation.iter().all(|v| v.is_finite())
    }

    /// Weighs what the halves show of the variance, for an estimate that has a part in another.
    pub(crate) fn weigh_variance(&mut self, weight: f64) {
        self.residual.variance *= weight;
    }

    fn merge(&mut self, other: Self) {
        self.innovation.iter_mut().zip(other.innovation).for_each(|(a, b)| *a += b);
        self.queries += other.queries;
        self.together = self.together.max(other.together);
        self.along += other.along;
        self.squared += other.squared;
        self.total += other.total;
        self.residual.tried |= other.residual.tried;
        self.residual.product += other.residual.product;
        self.residual.variance += other.residual.variance;
        self.residual.pairs += other.residual.pairs;
    }
}
