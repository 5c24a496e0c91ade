//! The gradients that a step predicts, what its queries are expected to answer, and what they show.

use std::borrow::Cow;
use std::sync::Arc;

use burn::prelude::*;

use super::observation::{CoefficientSums, Observation, SiteObservation};
use super::signals::Basis;
use crate::noise::Span;
use crate::ops;
use crate::probe::{Layout, SiteKey, TracedSite};
use crate::wire::Reader;

/// Largest number of weights of a site, 16 MiB; a site that needs more has no prediction.
const MAX_WEIGHTS: usize = 1 << 22;

/// Largest number of coordinates of a row that the host reads where noise is made by a device.
const MAX_READ: usize = 4096;

/// Part of the signals' mean square that keeps small signals from being divided by nearly 0.
const FLOOR: f64 = 0.1;

/// Part of the queries that fall in the spans of sites, where any site has one.
///
/// The others have noise on all coordinates, and W learns from them what lies outside.
const SPAN_SHARE: f64 = 0.75;

/// The signals of a batch, and the weights that gradients are predicted by at each site.
#[derive(Clone, Debug)]
pub struct Prediction {
    /// r_j, `[batch, dim]`.
    pub(super) signals: Vec<f32>,
    /// The number of signals; 0 where there are none.
    pub(super) dim: usize,
    /// Mean of ‖r_j‖² over the batch.
    mean_square: f64,
    /// The clean outputs that the signals are derivatives of, `[batch, dim]`, where they are visible.
    outputs: Option<Vec<f32>>,
    /// The directions of the signals; `None` where they are the model's own.
    pub(super) basis: Option<Basis>,
    /// The directions from the next step on.
    pub(super) next: Option<Basis>,
    /// The sites of the step, in order.
    sites: Vec<PredictedSite>,
}

/// A site of the step.
#[derive(Clone, Debug)]
pub(super) struct PredictedSite {
    pub key: SiteKey,
    pub layout: Layout,
    /// W, `[dim, shared]`; `None` for zeros.
    pub weights: Option<Arc<Vec<f32>>>,
    /// γ; 0 where the prediction is not used.
    pub gain: f64,
    /// α, where there is no span.
    pub alpha: f64,
    /// What the residual is measured in; `None` for all coordinates.
    pub span: Option<Span>,
    /// Whether this step compares halves of its batch for α, where there is no span.
    pub measures: bool,
    /// Which tokens are real, `[batch, tokens]`; `None` for all.
    pub mask: Option<Vec<bool>>,
    /// Whether weights are learned here.
    pub learns: bool,
}

impl PredictedSite {
    /// A site without weights, whose residual counts in full.
    pub fn new(site: &TracedSite, dim: usize) -> Self {
        let learns = dim > 0 && dim * site.layout.shared() <= MAX_WEIGHTS && site.layout.shared() > 0;
        let (key, layout) = (site.key, site.layout);
        let (weights, span, mask) = Default::default();
        Self { key, layout, weights, gain: 0.0, alpha: 1.0, span, measures: false, mask, learns }
    }

    /// Whether this step compares halves of its batch here.
    fn compares(&self) -> bool {
        self.measures && self.span.is_none()
    }
}

/// What the prediction expects of the rows of a pass.
#[derive(Clone, Debug, Default)]
pub(crate) struct PredictedRows {
    /// The change of the outputs along the signals, W(σε), `[rows, dim]`.
    pub answers: Vec<f32>,
    /// The part of each row's loss to subtract, Σ γ·r_jᵀW(σε).
    pub explained: Vec<f64>,
}

impl Prediction {
    /// The prediction of a batch by these sites.
    ///
    /// # Shapes
    /// - signals, outputs: `[batch, dim]`
    pub(super) fn new(signals: Vec<f32>, outputs: Option<Vec<f32>>, dim: usize, sites: Vec<PredictedSite>) -> Self {
        let batch = signals.len().checked_div(dim).unwrap_or(0).max(1);
        let mean_square = ops::dot(&signals, &signals) / batch as f64;
        Self { signals, dim, mean_square, outputs, basis: None, next: None, sites }
    }

    /// The number of signals.
    pub(crate) fn dim(&self) -> usize {
        self.dim
    }

    /// Whether queries are asked for the outputs, and not for the loss alone.
    pub(crate) fn sees_outputs(&self) -> bool {
        self.outputs.is_some()
    }

    /// Whether this step compares halves of its batch at any site.
    pub(crate) fn measures(&self) -> bool {
        (0..self.sites.len()).any(|site| self.measures_at(site))
    }

    /// Whether it does so at this one.
    pub(crate) fn measures_at(&self, site: usize) -> bool {
        self.sites.get(site).is_some_and(PredictedSite::compares)
    }

    /// What the residual of each site is measured in; empty where no site has a span.
    pub(crate) fn spans(&self) -> Vec<Option<Span>> {
        if self.sites.iter().all(|site| site.span.is_none()) {
            return vec![];
        }
        self.sites.iter().map(|site| site.span.clone()).collect()
    }

    /// The probability of each place of a direction, from those of the sites: the sites with noise
    /// on all coordinates, and then, if any site has a span, the sites again with noise in it.
    ///
    /// Of the latter each has a part in proportion to √k, as its estimate has the noise of k
    /// coordinates.
    pub(crate) fn places(&self, sites: &[f64]) -> Vec<f64> {
        let root = |site: &PredictedSite| site.span.as_ref().map_or(0.0, |span| (span.dim() as f64).sqrt());
        let total: f64 = self.sites.iter().map(root).sum();
        if total == 0.0 {
            return sites.to_vec();
        }
        let spanned = self.sites.iter().map(|site| SPAN_SHARE * root(site) / total);
        sites.iter().map(|p| (1.0 - SPAN_SHARE) * p).chain(spanned).collect()
    }

    /// The outputs of queries along the signals.
    ///
    /// # Shapes
    /// - outputs: `[rows, all signals]`; the result `[rows, dim]`
    pub(crate) fn along_signals<B: Backend>(&self, outputs: Tensor<B, 2>) -> Tensor<B, 2> {
        match &self.basis {
            Some(basis) => basis.project(outputs),
            None => outputs.cast(ops::accum_dtype::<B>()),
        }
    }

    /// Leaves out sites whose noise a device makes and the host would have to read in full.
    ///
    /// `shares` tells whether tokens that are alike share their noise, which the host then draws.
    pub(crate) fn read_no_device(&mut self, shares: bool) {
        for site in &mut self.sites {
            if site.layout.len() > MAX_READ && !(shares && site.layout.is_shared()) {
                (site.learns, site.weights, site.gain, site.span) = (false, None, 0.0, None);
            }
        }
    }

    /// Measures residuals on all coordinates, where noise falls on all sites at once.
    pub(crate) fn leave_spans(&mut self) {
        self.sites.iter_mut().for_each(|site| site.span = None);
    }

    /// The sites of the step, in order.
    pub(super) fn sites(&self) -> &[PredictedSite] {
        &self.sites
    }

    /// Whether the host must see the noise of this site, whose rows have `len` coordinates.
    pub(crate) fn looks_at(&self, site: usize, len: usize) -> bool {
        self.sites.get(site).is_some_and(|site| site.learns && site.layout.len() == len)
    }

    /// Whether anything is expected of the queries on this site.
    pub(crate) fn expects(&self, site: usize) -> bool {
        self.sites.get(site).is_some_and(|site| site.weights.is_some())
    }

    /// The weight of the residual's estimate at a site: α, and 1 in a span.
    pub(crate) fn alpha(&self, site: usize) -> f64 {
        self.sites.get(site).map_or(1.0, |site| if site.span.is_some() { 1.0 } else { site.alpha })
    }

    /// Keeps predictions and observations at a site off masked tokens.
    ///
    /// # Shapes
    /// - mask: `[batch, tokens]`, true at a real token
    pub(crate) fn mask(&mut self, site: usize, mask: Vec<bool>) {
        if let Some(site) = self.sites.get_mut(site) {
            site.mask = Some(mask);
        }
    }

    /// The mask of an example at a site.
    fn mask_of<'a>(&self, site: &'a PredictedSite, position: usize) -> Option<&'a [bool]> {
        let mask = site.mask.as_ref()?;
        let tokens = mask.len() / (self.signals.len() / self.dim.max(1)).max(1);
        Some(&mask[position * tokens..(position + 1) * tokens])
    }

    /// r_j.
    fn signals_of(&self, position: usize) -> &[f32] {
        &self.signals[position * self.dim..(position + 1) * self.dim]
    }

    /// The mean noise of each group's real tokens, `[shared]`; 0 for a group without any.
    ///
    /// - noise: that of a row, `[coordinates]`, or `[shared]` where tokens that are alike share it
    fn means<'a>(&self, site: &PredictedSite, position: usize, (shares, noise): (bool, &'a [f32])) -> Cow<'a, [f32]> {
        let (layout, mask) = (&site.layout, self.mask_of(site, position));
        if mask.is_none() && (shares || !layout.is_shared()) {
            return Cow::Borrowed(noise);
        }
        let mut counts = layout.counts(mask);
        let means = if shares {
            counts.iter_mut().for_each(|count| *count = count.min(1.0));
            noise.to_vec()
        } else {
            let mut sums = vec![0.0; layout.shared()];
            layout.sum_groups(noise, mask, &mut sums);
            sums
        };
        Cow::Owned(layout.divided(&counts, means))
    }

    /// Adds what is expected of a row to `predicted`.
    ///
    /// - perturbation: σε of the row at this site, `[coordinates]`, or `[shared]` where the tokens
    ///   that are alike share it
    pub(crate) fn expect(
        &self,
        site: usize,
        position: usize,
        perturbation: (bool, &[f32]),
        row: usize,
        predicted: &mut PredictedRows,
    ) {
        let Some(site) = self.sites.get(site) else { return };
        let Some(weights) = &site.weights else { return };
        let means = self.means(site, position, perturbation);
        let answers = &mut predicted.answers[row * self.dim..(row + 1) * self.dim];
        let signals = self.signals_of(position);
        for ((answer, weights), r) in answers.iter_mut().zip(weights.chunks_exact(means.len())).zip(signals) {
            let change = ops::dot(weights, &means);
            *answer += change as f32;
            predicted.explained[row] += site.gain * f64::from(*r) * change;
        }
    }

    /// What a query of an example shows beyond the prediction, per unit of noise, `[dim]`.
    ///
    /// Where outputs are visible it is (Δo − Ŵ)/σ, with `predicted` the Ŵ. Where the loss alone is,
    /// it is the smallest vector that explains what the prediction leaves of Δℓ.
    pub(crate) fn innovation(
        &self,
        position: usize,
        predicted: &[f32],
        outputs: Option<&[f32]>,
        loss_change: f64,
        sigma: f64,
    ) -> Vec<f32> {
        let signals = self.signals_of(position);
        match (&self.outputs, outputs) {
            (Some(clean), Some(outputs)) => {
                let clean = &clean[position * self.dim..(position + 1) * self.dim];
                let change = outputs.iter().zip(clean).zip(predicted);
                change.map(|((o, clean), predicted)| (o - clean - predicted) / sigma as f32).collect()
            }
            _ => {
                let left = (loss_change - ops::dot(signals, predicted)) / sigma;
                let scale = left / (ops::dot(signals, signals) + FLOOR * self.mean_square).max(f64::MIN_POSITIVE);
                signals.iter().map(|r| (scale * f64::from(*r)) as f32).collect()
            }
        }
    }

    /// γ·r_jᵀW of an example, `[shared]`: the predicted gradient, summed over the tokens of each
    /// group.
    pub(crate) fn gradient(&self, site: usize, position: usize) -> Option<Vec<f32>> {
        let site = self.sites.get(site).filter(|site| site.gain != 0.0)?;
        let weights = site.weights.as_ref()?;
        let shared = site.layout.shared();
        let mut out = vec![0f32; shared];
        for (weights, r) in weights.chunks_exact(shared).zip(self.signals_of(position)) {
            let scale = (site.gain * f64::from(*r)) as f32;
            out.iter_mut().zip(weights).for_each(|(h, w)| *h += scale * w);
        }
        Some(out)
    }

    /// Shared coordinates of all sites at which weights are learned.
    pub(crate) fn learned_coordinates(&self) -> usize {
        self.sites.iter().filter(|site| site.learns).map(|site| site.layout.shared()).sum()
    }

    /// An observation of this step without a site yet.
    pub(crate) fn observe(&self) -> Observation {
        let (basis, next) = (self.basis.clone(), self.next.clone());
        Observation { dim: self.dim, basis, next, sites: vec![] }
    }

    /// An observation of a site without a query yet; `None` where nothing is learned there.
    pub(crate) fn observe_site(&self, site: usize) -> Option<SiteObservation> {
        let site = self.sites.get(site).filter(|site| site.learns || site.compares())?;
        let (key, shared) = (site.key, site.layout.shared());
        let innovation = if site.learns { vec![0.0; self.dim * shared] } else { vec![] };
        let (free, spanned, residual) = Default::default();
        Some(SiteObservation { key, shared, innovation, together: shared, free, spanned, residual })
    }

    /// The observation of this step that another process [wrote](Observation::write); `None` where the
    /// bytes are of something else.
    pub(crate) fn read_observation(&self, reader: &mut Reader<'_>) -> Option<Observation> {
        let mut observed = self.observe();
        let mine: Vec<SiteObservation> = (0..self.sites.len()).filter_map(|site| self.observe_site(site)).collect();
        reader.number().filter(|&sites| sites == mine.len())?;
        observed.sites = mine.into_iter().map(|site| site.read(reader)).collect::<Option<_>>()?;
        Some(observed)
    }

    /// The most bytes of a written observation.
    pub(crate) fn observation_bytes(&self) -> usize {
        64 + self.sites.iter().map(|site| 256 + 4 * self.dim * site.layout.shared()).sum::<usize>()
    }

    /// Adds a query of an example to the observation of a site.
    ///
    /// - noise: ε of the query, `[coordinates]`, or `[shared]` where tokens that are alike share it
    /// - innovation, coefficient: what the query showed, and its (ℓ_q − ℓ)/σ
    /// - in_span: whether its noise is confined to the span of the site
    pub(crate) fn observe_query(
        &self,
        site: usize,
        position: usize,
        (shares, noise): (bool, &[f32]),
        (innovation, coefficient): (&[f32], f64),
        in_span: bool,
        seen: &mut SiteObservation,
    ) {
        let site = &self.sites[site];
        if seen.innovation.is_empty() || !coefficient.is_finite() || innovation.iter().any(|v| !v.is_finite()) {
            return;
        }
        // sums and means of independent noise over a group are dual: E[sum·mean] = 1 a coordinate
        let means = self.means(site, position, (shares, noise));
        let sums = if shares || !site.layout.is_shared() {
            means.clone()
        } else {
            let mut sums = vec![0.0; seen.shared];
            site.layout.sum_groups(noise, self.mask_of(site, position), &mut sums);
            Cow::Owned(sums)
        };
        for (row, &e) in seen.innovation.chunks_exact_mut(seen.shared).zip(innovation) {
            row.iter_mut().zip(&*sums).for_each(|(w, s)| *w += e * s);
        }
        let predicted = site.weights.as_ref().map_or(0.0, |weights| {
            let rows = weights.chunks_exact(seen.shared).zip(self.signals_of(position));
            rows.map(|(weights, r)| f64::from(*r) * ops::dot(weights, &means)).sum()
        });
        let sums: &mut CoefficientSums = if in_span { &mut seen.spanned } else { &mut seen.free };
        sums.add(coefficient, predicted);
    }
}

#[cfg(test)]
impl Prediction {
    /// A prediction with given gain and gradients, `[batch, coordinates]`, at each site.
    ///
    /// Each example has a signal of its own, so that W is the gradients.
    pub(crate) fn fixed(batch: usize, sites: Vec<(f64, Vec<f32>)>) -> Self {
        let signals = (0..batch * batch).map(|i| f32::from(u8::from(i % (batch + 1) == 0))).collect();
        let site = |(i, (gain, gradients)): (usize, (f64, Vec<f32>))| {
            let site = PredictedSite::new(&TracedSite::fake(i as u64, gradients.len() / batch), batch);
            PredictedSite { weights: Some(Arc::new(gradients)), gain, ..site }
        };
        Self::new(signals, None, batch, sites.into_iter().enumerate().map(site).collect())
    }

    /// Gives the sites their layouts.
    pub(crate) fn with_layouts(mut self, sites: &[TracedSite]) -> Self {
        self.sites.iter_mut().zip(sites).for_each(|(site, traced)| site.layout = traced.layout);
        self
    }

    pub(super) fn site(&self, site: usize) -> &PredictedSite {
        &self.sites[site]
    }

    /// The same with α at every site, and no span.
    pub(crate) fn with_alpha(mut self, alpha: f64) -> Self {
        self.sites.iter_mut().for_each(|site| (site.alpha, site.span) = (alpha, None));
        self
    }

    /// Compares halves of the batch at every site.
    pub(super) fn measure_all(&mut self) {
        self.sites.iter_mut().for_each(|site| site.measures = true);
    }

    /// Measures the residual in these spans.
    pub(crate) fn with_spans(mut self, spans: Vec<Option<Span>>) -> Self {
        self.sites.iter_mut().zip(spans).for_each(|(site, span)| site.span = span);
        self
    }

    pub(super) fn set_gain(&mut self, site: usize, gain: f64) {
        self.sites[site].gain = gain;
    }

    /// r_jᵀx.
    pub(super) fn dot_signals(&self, position: usize, x: &[f32]) -> f64 {
        ops::dot(self.signals_of(position), x)
    }
}
