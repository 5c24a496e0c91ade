//! What a step shows of the prediction.

use serde::{Deserialize, Serialize};

use super::signals::Basis;
use crate::probe::SiteKey;
use crate::wire::{Reader, Writer};

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
    /// Shared coordinates that a query perturbs, of this site and of all others together with it.
    pub(crate) together: usize,
    /// Of the queries with noise on all coordinates.
    pub(super) free: CoefficientSums,
    /// Of the queries with noise in the span.
    pub(super) spanned: CoefficientSums,
    /// What halves of the batch show of the residual's estimate.
    pub(crate) residual: ResidualMoments,
}

/// Sums over the coefficients c of queries, and ĉ, those that the weights predict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct CoefficientSums {
    /// The number of queries.
    pub queries: f64,
    /// Σ c·ĉ.
    pub along: f64,
    /// Σ ĉ².
    pub squared: f64,
    /// Σ c².
    pub total: f64,
}

impl CoefficientSums {
    /// Adds a query.
    pub fn add(&mut self, coefficient: f64, predicted: f64) {
        self.queries += 1.0;
        self.along += coefficient * predicted;
        self.squared += predicted * predicted;
        self.total += coefficient * coefficient;
    }

    /// Both together, these with a weight of `keep`.
    pub fn and(self, keep: f64, other: Self) -> Self {
        Self {
            queries: keep * self.queries + other.queries,
            along: keep * self.along + other.along,
            squared: keep * self.squared + other.squared,
            total: keep * self.total + other.total,
        }
    }

    /// The squared cosine of c and ĉ; 0 where they point apart.
    pub fn explained(self) -> f64 {
        let scale = self.squared * self.total;
        if scale > 0.0 { (self.along.max(0.0).powi(2) / scale).min(1.0) } else { 0.0 }
    }

    /// The mean of (c − γĉ)².
    pub fn residual(self, gain: f64) -> f64 {
        let left = self.total - 2.0 * gain * self.along + gain * gain * self.squared;
        if self.queries > 0.0 { left.max(0.0) / self.queries } else { 0.0 }
    }

    fn is_finite(self) -> bool {
        [self.along, self.squared, self.total].iter().all(|v| v.is_finite())
    }
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
    /// Writes what [`Prediction::read_observation`](super::Prediction::read_observation) reads.
    pub(crate) fn write(&self, writer: &mut Writer) {
        writer.number(self.sites.len());
        for site in &self.sites {
            writer.singles(&site.innovation);
            writer.number(site.together);
            for sums in [site.free, site.spanned] {
                writer.doubles(&[sums.queries, sums.along, sums.squared, sums.total]);
            }
            let ResidualMoments { tried, product, variance, pairs } = site.residual;
            writer.doubles(&[f64::from(u8::from(tried)), product, variance, pairs]);
        }
    }

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
    /// The observation of the same site from another process.
    pub(super) fn read(mut self, reader: &mut Reader<'_>) -> Option<Self> {
        self.innovation = reader.singles().filter(|values| values.len() == self.innovation.len())?;
        self.together = reader.number()?;
        for sums in [&mut self.free, &mut self.spanned] {
            let [queries, along, squared, total] = reader.doubles()?.try_into().ok()?;
            *sums = CoefficientSums { queries, along, squared, total };
        }
        let [tried, product, variance, pairs] = reader.doubles()?.try_into().ok()?;
        self.residual = ResidualMoments { tried: tried != 0.0, product, variance, pairs };
        Some(self)
    }

    /// Whether both belong to the same site and width.
    fn is_like(&self, other: &Self) -> bool {
        (self.key, self.shared) == (other.key, other.shared) && self.innovation.len() == other.innovation.len()
    }

    pub(super) fn is_finite(&self) -> bool {
        let of_halves = [self.residual.product, self.residual.variance];
        self.free.is_finite()
            && self.spanned.is_finite()
            && of_halves.iter().all(|v| v.is_finite())
            && self.innovation.iter().all(|v| v.is_finite())
    }

    /// Weighs what the halves show of the variance, for an estimate that has a part in another.
    pub(crate) fn weigh_variance(&mut self, weight: f64) {
        self.residual.variance *= weight;
    }

    fn merge(&mut self, other: Self) {
        self.innovation.iter_mut().zip(other.innovation).for_each(|(a, b)| *a += b);
        self.together = self.together.max(other.together);
        self.free = self.free.and(1.0, other.free);
        self.spanned = self.spanned.and(1.0, other.spanned);
        self.residual.tried |= other.residual.tried;
        self.residual.product += other.residual.product;
        self.residual.variance += other.residual.variance;
        self.residual.pairs += other.residual.pairs;
    }
}
