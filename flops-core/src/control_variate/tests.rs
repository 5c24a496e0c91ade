//! Tests of the learned weights, and of what they are kept under.

use burn::backend::Flex;
use burn::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::observation::CoefficientSums;
use super::*;
use crate::probe::{Layout, TracedSite};

const UNBIASED: GradientEstimate = GradientEstimate::Unbiased;
const SHRUNK: GradientEstimate = GradientEstimate::Shrunk;

fn matrix(values: &[f64], columns: usize) -> Tensor<Flex, 2> {
    let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
    Tensor::from_data(TensorData::new(values.clone(), [values.len() / columns, columns]), &Default::default())
}

fn uniform(n: usize, rng: &mut StdRng) -> Vec<f64> {
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// A problem whose outputs answer by J at each site: outputs of `dim` values, examples with signals
/// of their own.
struct Problem {
    dim: usize,
    sites: Vec<TracedSite>,
    /// J of each site, `[dim, coordinates]`; `None` for answers by chance.
    truth: Vec<Option<Vec<f64>>>,
    visible: bool,
    estimate: GradientEstimate,
    /// Whether tokens that are alike share their noise.
    shares: bool,
    rng: StdRng,
}

impl Problem {
    fn new(dim: usize, sites: Vec<TracedSite>) -> Self {
        let mut rng = StdRng::seed_from_u64(1);
        let truth = sites.iter().map(|site| Some(uniform(dim * site.coordinates, &mut rng))).collect();
        Self { dim, sites, truth, visible: true, estimate: UNBIASED, shares: false, rng }
    }

    fn predict(&self, predictor: &GradientPredictor, signals: &[f64]) -> Prediction {
        let signals = matrix(signals, self.dim);
        let outputs = self.visible.then(|| signals.zeros_like());
        predictor.predict(Some(signals), outputs, &self.sites, self.estimate).unwrap()
    }

    /// A step of `queries` queries of each of `examples` examples at every site.
    fn step(&mut self, predictor: &mut GradientPredictor, examples: usize, queries: usize) {
        let signals = uniform(examples * self.dim, &mut self.rng);
        let prediction = self.predict(predictor, &signals);
        let mut seen = prediction.observe();
        for (index, site) in self.sites.iter().enumerate() {
            let mut of_site = prediction.observe_site(index).unwrap();
            for j in 0..examples {
                let r = &signals[j * self.dim..(j + 1) * self.dim];
                for _ in 0..queries {
                    let width = if self.shares { site.layout.shared() } else { site.coordinates };
                    let noise: Vec<f32> =
                        (0..width).map(|_| if self.rng.random::<bool>() { 1.0 } else { -1.0 }).collect();
                    let mut full = noise.clone();
                    if self.shares {
                        full = vec![0.0; site.coordinates];
                        site.layout.add_shared(&noise, None, &mut full);
                    }
                    let answer: Vec<f32> = match &self.truth[index] {
                        Some(truth) => truth
                            .chunks(site.coordinates)
                            .map(|row| row.iter().zip(&full).map(|(t, e)| t * f64::from(*e)).sum::<f64>() as f32)
                            .collect(),
                        None => uniform(self.dim, &mut self.rng).into_iter().map(|v| v as f32).collect(),
                    };
                    let coefficient = r.iter().zip(&answer).map(|(r, a)| r * f64::from(*a)).sum();
                    let mut rows = PredictedRows { answers: vec![0.0; self.dim], explained: vec![0.0] };
                    prediction.expect(index, j, (self.shares, &noise), 0, &mut rows);
                    let outputs = self.visible.then_some(&answer[..]);
                    let shown = prediction.innovation(j, &rows.answers, outputs, coefficient, 1.0);
                    prediction.observe_query(
                        index,
                        j,
                        (self.shares, &noise),
                        (&shown, coefficient),
                        false,
                        &mut of_site,
                    );
                }
            }
            seen.sites.push(of_site);
        }
        predictor.observe(seen);
    }

    /// The share of the gradients of new examples that the prediction leaves at a site, before its
    /// gain; tokens that are alike have equal parts.
    fn left(&mut self, predictor: &GradientPredictor, index: usize) -> f64 {
        let (signals, site) = (uniform(20 * self.dim, &mut self.rng), self.sites[index]);
        let mut prediction = self.predict(predictor, &signals);
        prediction.set_gain(index, 1.0);
        let (mut left, mut total) = (0.0, 0.0);
        for j in 0..20 {
            let mut h = prediction.gradient(index, j).unwrap_or_else(|| vec![0.0; site.layout.shared()]);
            site.layout.divide(&site.layout.counts(None), &mut h);
            let mut predicted = vec![0f32; site.coordinates];
            site.layout.add_shared(&h, None, &mut predicted);
            for (k, h) in predicted.iter().enumerate() {
                let truth = self.truth[index].as_ref().unwrap();
                let g: f64 = (0..self.dim).map(|d| signals[j * self.dim + d] * truth[d * site.coordinates + k]).sum();
                left += (g - f64::from(*h)).powi(2);
                total += g * g;
            }
        }
        left / total
    }
}

/// Reports of a step whose one example has `dim` signals.
fn reports(
    predictor: &GradientPredictor,
    dim: usize,
    sites: &[TracedSite],
    estimate: GradientEstimate,
) -> Vec<SiteReport> {
    let signals = (dim > 0).then(|| matrix(&vec![1.0; dim], dim));
    predictor.reports(&predictor.predict(signals, None, sites, estimate).unwrap())
}

/// Answers that follow J are predicted, and answers by chance are not.
///
/// 60 steps of 40 queries at 5 coordinates, noise without error: less than 10⁻³ of ‖g‖² is left, and
/// the site explains more than 0.99. Of chance it explains less than 0.1, with the seed fixed.
#[test]
fn related_gradients_are_predicted_and_unrelated_ones_are_not() {
    for (visible, steps) in [(true, 60), (false, 300)] {
        let mut problem = Problem::new(3, vec![TracedSite::fake(7, 5), TracedSite::fake(3, 5)]);
        (problem.truth[1], problem.visible) = (None, visible);
        let mut predictor = GradientPredictor::default();
        (0..steps).for_each(|_| problem.step(&mut predictor, 20, 2));
        let left = problem.left(&predictor, 0);
        assert!(left < 1e-3, "{left} is left; outputs visible: {visible}");
        let [known, chance] = reports(&predictor, problem.dim, &problem.sites, UNBIASED)[..] else {
            panic!("two sites")
        };
        assert!(known.explained > 0.99 && (known.gain - 1.0).abs() < 0.01, "{known:?}");
        assert!(chance.explained < 0.1, "{chance:?}");
        assert_eq!((known.alpha, chance.alpha), (1.0, 1.0));
        // a shrunk estimate does not use the second at all, and the residual has not been measured
        let [known, chance] = reports(&predictor, problem.dim, &problem.sites, SHRUNK)[..] else { panic!("two sites") };
        assert!(known.gain > 0.99 && chance.gain == 0.0, "{known:?}, {chance:?}");
    }
}

/// A query shows as many equations as there are outputs: with 8 of them a tenth of the steps is
/// enough.
#[test]
fn visible_outputs_teach_faster_than_losses() {
    let steps = |visible: bool| {
        let mut problem = Problem { visible, ..Problem::new(8, vec![TracedSite::fake(7, 16)]) };
        let mut predictor = GradientPredictor::default();
        (1..2000).find(|_| {
            problem.step(&mut predictor, 16, 1);
            problem.left(&predictor, 0) < 0.1
        })
    };
    let (visible, losses) = (steps(true).unwrap(), steps(false).unwrap());
    assert!(5 * visible < losses, "{visible} steps with outputs, {losses} without");
}

/// Four tokens that answer alike, and one apart: W has two parts, and learns the same from noise that
/// is shared and from noise that is not.
#[test]
fn tokens_that_are_alike_share_their_weights() {
    let layout = Layout::new(&[1, 5, 3], Some(1), false);
    let site = TracedSite { coordinates: 15, layout, ..TracedSite::fake(7, 15) };
    for shares in [true, false] {
        let mut problem = Problem { shares, ..Problem::new(2, vec![site]) };
        let truth = problem.truth[0].as_mut().unwrap();
        for row in truth.chunks_mut(15) {
            let alike: Vec<f64> = row[3..6].to_vec();
            row[3..].chunks_mut(3).for_each(|token| token.copy_from_slice(&alike));
        }
        let mut predictor = GradientPredictor::default();
        (0..150).for_each(|_| problem.step(&mut predictor, 20, 2));
        let left = problem.left(&predictor, 0);
        assert!(left < 1e-3, "{left} is left; noise shared: {shares}");
        assert_eq!(predictor.kept().iter().map(|kept| kept.1).collect::<Vec<_>>(), [6]);
    }
}

/// Of 50 signals that vary along three directions nothing is lost, and weights follow the
/// directions as they turn.
#[test]
fn many_signals_are_seen_along_few_directions() {
    let (mut rng, full, site) = (StdRng::seed_from_u64(4), 50, TracedSite::fake(7, 6));
    let (mixing, truth) = (uniform(3 * full, &mut rng), uniform(full * 6, &mut rng));
    let mut predictor = GradientPredictor::default();
    let mut left = vec![];
    for step in 0..120 {
        // the sizes of the three directions change from step to step
        let scale = |k: usize| 1.0 + 0.9 * (f64::from(step) * 0.2 + k as f64).sin();
        let latent = uniform(30 * 3, &mut rng);
        let signals: Vec<f64> = (0..30 * full)
            .map(|i| (0..3).map(|k| scale(k) * latent[i / full * 3 + k] * mixing[k * full + i % full]).sum())
            .collect();
        let (r, o) = (matrix(&signals, full), matrix(&vec![0.0; 30 * full], full));
        let prediction = predictor.predict(Some(r), Some(o), &[site], UNBIASED).unwrap();
        let mut seen = prediction.observe();
        if let Some(mut of_site) = prediction.observe_site(0) {
            let (mut unexplained, mut total) = (0.0, 0.0);
            for j in 0..30 {
                let noise: Vec<f32> = (0..6).map(|_| if rng.random::<bool>() { 1.0 } else { -1.0 }).collect();
                let answer: Vec<f64> = truth
                    .chunks(6)
                    .map(|row| row.iter().zip(&noise).map(|(t, e)| t * f64::from(*e)).sum::<f64>())
                    .collect();
                let coefficient: f64 = signals[j * full..][..full].iter().zip(&answer).map(|(r, a)| r * a).sum();
                let along = prediction.along_signals(matrix(&answer, full)).into_data().to_vec::<f32>().unwrap();
                let rows = (vec![0.0; prediction.dim()], vec![0.0]);
                let mut rows = PredictedRows { answers: rows.0, explained: rows.1 };
                prediction.expect(0, j, (false, &noise), 0, &mut rows);
                let predicted: f64 = prediction.dot_signals(j, &rows.answers);
                unexplained += (coefficient - predicted).powi(2);
                total += coefficient * coefficient;
                let shown = prediction.innovation(j, &rows.answers, Some(&along), coefficient, 1.0);
                prediction.observe_query(0, j, (false, &noise), (&shown, coefficient), false, &mut of_site);
            }
            left.push(unexplained / total);
            seen.sites.push(of_site);
        }
        predictor.observe(seen);
    }
    assert_eq!(left.len(), 119, "the first step has no directions yet");
    assert!(left[100..].iter().all(|left| *left < 1e-3), "{left:?}");
}

#[test]
fn values_that_are_not_finite_and_wide_outputs_are_skipped() {
    let sites = [TracedSite::fake(1, 4), TracedSite::fake(2, (1 << 21) + 1)];
    let mut predictor = GradientPredictor::default();
    let signals = matrix(&[1.0, -1.0], 2);
    let prediction = predictor.predict(Some(signals.clone()), None, &sites, UNBIASED).unwrap();
    assert!(prediction.observe_site(1).is_none(), "more than 4 million weights");
    assert!(prediction.observe_site(2).is_none(), "a site that the step does not have");
    for value in [f32::NAN, 1.0] {
        let (mut seen, mut site) = (prediction.observe(), prediction.observe_site(0).unwrap());
        prediction.observe_query(0, 0, (false, &[1.0; 4]), (&[value, 0.0], 1.0), false, &mut site);
        prediction.observe_query(0, 0, (false, &[1.0; 4]), (&[1.0, 0.0], f64::from(value)), false, &mut site);
        seen.sites.push(site);
        predictor.observe(seen);
        let h = predictor.predict(Some(signals.clone()), None, &sites, UNBIASED).unwrap();
        assert_eq!(h.site(0).weights.is_some(), !value.is_nan());
    }
    let mut seen = prediction.observe();
    let mut site = prediction.observe_site(0).unwrap();
    site.free.along = f64::INFINITY;
    seen.sites.push(site);
    predictor.observe(seen);
    assert!(reports(&predictor, 2, &sites, UNBIASED).iter().all(|site| site.explained.is_finite()));
    let nan = signals.mul_scalar(f32::NAN);
    let without = predictor.predict(Some(nan.clone()), None, &sites, SHRUNK).unwrap();
    assert_eq!((without.dim(), without.gradient(0, 0)), (0, None));
    assert!(predictor.predict(Some(nan), None, &sites, UNBIASED).is_none());
    assert!(predictor.predict::<Flex>(None, None, &sites, UNBIASED).is_none());
    assert!(predictor.predict::<Flex>(None, None, &sites, SHRUNK).is_some(), "α needs no signals");
}

/// The weights of a site at every width, by its key; others are left as they are.
#[test]
fn a_site_is_predicted_at_the_width_it_was_seen_at() {
    let site = |(key, width): (u64, usize)| TracedSite::fake(key, width);
    let mut predictor = GradientPredictor::default();
    let mut problem = Problem::new(3, [(9, 5), (4, 2)].map(site).to_vec());
    (0..3).for_each(|_| problem.step(&mut predictor, 4, 2));
    let signals = [1.0, 0.5, -0.5];
    let predicted = |predictor: &GradientPredictor, sites: &[(u64, usize)]| -> Vec<Option<Vec<f32>>> {
        let sites: Vec<TracedSite> = sites.iter().copied().map(site).collect();
        let prediction = predictor.predict(Some(matrix(&signals, 3)), None, &sites, UNBIASED).unwrap();
        (0..sites.len()).map(|site| prediction.site(site).weights.as_ref().map(|w| w.to_vec())).collect()
    };
    let both = predicted(&predictor, &[(9, 5), (4, 2)]);
    assert!(both.iter().all(Option::is_some));
    assert_eq!(predicted(&predictor, &[(4, 2), (9, 5)]), [both[1].clone(), both[0].clone()]);
    assert_eq!(predicted(&predictor, &[(9, 7), (4, 2), (6, 2)]), [None, both[1].clone(), None]);
    // a step at another width leaves its weights as they were
    Problem::new(3, vec![site((9, 7))]).step(&mut predictor, 4, 2);
    assert_eq!(predicted(&predictor, &[(9, 5), (4, 2)]), both);
    assert_eq!(predictor.kept().len(), 3);
    // another number of signals starts anew
    Problem::new(2, vec![site((9, 5))]).step(&mut predictor, 4, 2);
    assert_eq!(predictor.kept().len(), 1);
}

/// A site whose width changes all the time keeps the last eight; other sites keep theirs.
#[test]
fn the_widths_of_a_site_are_bounded() {
    let mut predictor = GradientPredictor::default();
    for width in [1, 2, 3, 4, 5, 6, 7, 8, 1, 9, 10] {
        Problem::new(2, vec![TracedSite::fake(5, width), TracedSite::fake(6, 1)]).step(&mut predictor, 2, 1);
    }
    let widths = |predictor: &GradientPredictor| -> Vec<usize> { predictor.kept().iter().map(|kept| kept.1).collect() };
    assert_eq!(widths(&predictor), [1, 4, 5, 6, 7, 8, 9, 10, 1]);
    // the oldest may lie behind the new one, too
    Problem::new(2, vec![TracedSite::fake(5, 2), TracedSite::fake(6, 1)]).step(&mut predictor, 2, 1);
    assert_eq!(widths(&predictor), [1, 2, 5, 6, 7, 8, 9, 10, 1]);
}

/// Through JSON, as in a checkpoint.
#[test]
fn the_state_survives_a_record() {
    let mut problem = Problem::new(3, vec![TracedSite::fake(9, 5)]);
    let mut predictor = GradientPredictor::default();
    (0..5).for_each(|_| problem.step(&mut predictor, 4, 2));
    let record = serde_json::to_string(&predictor).unwrap();
    let read: GradientPredictor = serde_json::from_str(&record).unwrap();
    assert_eq!(read.kept(), predictor.kept());
    let weights = |p: &GradientPredictor| problem.predict(p, &[1.0, 0.0, 0.0]).site(0).weights.clone();
    assert_eq!(weights(&read), weights(&predictor));
}

/// Jobs observe parts of a batch. Merged they are the whole, also where a site is only in one.
#[test]
fn observations_add_up_by_site_and_width() {
    let sites = [TracedSite::fake(1, 2), TracedSite::fake(2, 1)];
    let signals = matrix(&[1.0, 2.0, 4.0], 1);
    let prediction = GradientPredictor::default().predict(Some(signals), None, &sites, UNBIASED).unwrap();
    let observe = |positions: &[usize], with_second: bool| {
        let mut seen = prediction.observe();
        for site in 0..1 + usize::from(with_second) {
            let mut of_site = prediction.observe_site(site).unwrap();
            for &j in positions {
                let noise = [1.0 + j as f32, -2.0];
                let noise = &noise[..sites[site].coordinates];
                prediction.observe_query(site, j, (false, noise), (&[j as f32], 2.0), false, &mut of_site);
            }
            of_site.residual = ResidualMoments { tried: true, product: 1.0, variance: 2.0, pairs: 1.0 };
            seen.sites.push(of_site);
        }
        seen
    };
    let (whole, mut merged) = (observe(&[0, 1, 2], false), observe(&[0], false));
    merged.merge(observe(&[1, 2], true));
    assert_eq!(merged.sites.len(), 2);
    let (a, b) = (&whole.sites[0], &merged.sites[0]);
    assert_eq!((&a.innovation, a.free), (&b.innovation, b.free));
    assert_eq!(a.innovation, [0.0 + 2.0 + 6.0, -2.0 - 4.0]);
    assert_eq!(b.residual, ResidualMoments { tried: true, product: 2.0, variance: 4.0, pairs: 2.0 });
    assert_eq!(merged.sites[1].free.queries, 2.0);
}

/// α = R/(R + V) by the halves that were compared; 0 below a tenth, and 1 where there were none.
#[test]
fn alpha_is_the_share_of_the_residual_in_its_estimate() {
    let site = TracedSite::fake(1, 4);
    let alpha = |moments: &[(f64, f64)]| {
        let mut predictor = GradientPredictor::default();
        for &(product, variance) in moments {
            let mut prediction = predictor.predict::<Flex>(None, None, &[site], SHRUNK).unwrap();
            prediction.measure_all();
            let mut seen = prediction.observe();
            let mut of_site = prediction.observe_site(0).unwrap();
            let pairs = f64::from(u8::from(variance > 0.0));
            of_site.residual = ResidualMoments { tried: true, product, variance, pairs };
            seen.sites.push(of_site);
            predictor.observe(seen);
        }
        reports(&predictor, 0, &[site], SHRUNK)[0].alpha
    };
    assert!((alpha(&[(3.0, 1.0); 3]) - 0.75).abs() < 1e-12);
    assert_eq!(alpha(&[(3.0, 1.0); 2]), 0.0, "too few to tell");
    assert_eq!(alpha(&[(-1.0, 1.0); 3]), 0.0);
    assert_eq!(alpha(&[(0.1, 1.0); 3]), 0.0, "0.09 counts as nothing");
    assert_eq!(alpha(&[(0.0, 0.0)]), 1.0, "halves that could not be compared");
    // the past has a weight of 0.9
    let (r, v) = (0.81 * 3.0 + 0.9 * 3.0 + 1.0, 0.81 + 0.9 + 2.0);
    assert!((alpha(&[(3.0, 1.0), (3.0, 1.0), (1.0, 2.0)]) - r / (r + v)).abs() < 1e-12);
    // unknown sites wait for the first comparison
    let prediction = GradientPredictor::default().predict::<Flex>(None, None, &[site], SHRUNK).unwrap();
    assert_eq!((prediction.alpha(0), prediction.measures()), (0.0, true));
}

/// A site of 8 values and 3 signals, whose W is learned: the residual is measured in the span of its
/// rows, which holds the gradients. Before that, and of answers by chance, on all coordinates.
#[test]
fn the_residual_is_measured_where_gradients_lie() {
    let mut problem = Problem::new(3, vec![TracedSite::fake(7, 8), TracedSite::fake(3, 8)]);
    (problem.truth[1], problem.estimate) = (None, SHRUNK);
    let mut predictor = GradientPredictor::default();
    assert!(problem.predict(&predictor, &[1.0; 3]).spans().is_empty());
    (0..60).for_each(|_| problem.step(&mut predictor, 20, 2));
    let prediction = problem.predict(&predictor, &[1.0, -2.0, 0.5]);
    let [Some(span), None] = &prediction.spans()[..] else { panic!("a span at the first site alone") };
    assert_eq!((span.dim(), span.len()), (3, 8));
    assert_eq!((prediction.alpha(0), prediction.measures_at(0), prediction.measures_at(1)), (1.0, false, true));
    // the places: both sites, and then the span, which has three quarters
    let places = prediction.places(&[0.5; 2]);
    assert!(places.iter().zip([0.125, 0.125, 0.75, 0.0]).all(|(p, e)| (p - e).abs() < 1e-12), "{places:?}");
    // the gradient of an example lies in it: noise in the span has all of its energy
    let h = prediction.gradient(0, 0).unwrap();
    let along = |z: [f32; 3]| {
        let mut noise = [0.0; 8];
        span.combine(&z, &mut noise);
        crate::ops::dot(&noise, &h).powi(2)
    };
    let in_span = along([1.0, 0.0, 0.0]) + along([0.0, 1.0, 0.0]) + along([0.0, 0.0, 1.0]);
    assert!((in_span / crate::ops::dot(&h, &h) - 1.0).abs() < 1e-5);
    // without spans, as where all sites have noise at once, there is an α, which waits to be measured
    let mut joint = problem.predict(&predictor, &[1.0; 3]);
    joint.leave_spans();
    assert_eq!((joint.alpha(0), joint.measures_at(0)), (0.0, true));
    assert_eq!(joint.places(&[0.5; 2]), [0.5; 2]);
    // an unbiased estimate has no span, and one without a residual neither
    for estimate in [UNBIASED, GradientEstimate::Predicted] {
        problem.estimate = estimate;
        let prediction = problem.predict(&predictor, &[1.0; 3]);
        assert!(prediction.spans().is_empty() && !prediction.measures(), "{estimate}");
        assert_eq!(prediction.alpha(0), if estimate == UNBIASED { 1.0 } else { 0.0 });
        assert!(prediction.gradient(0, 0).is_some(), "{estimate}");
    }
}

/// α of a site with a span is the share of the residual's energy there: (c − γĉ)² of queries in the
/// span, over that of queries on all coordinates.
#[test]
fn reports_have_the_share_of_the_residual_in_the_span() {
    let site = TracedSite::fake(1, 4);
    let mut predictor = GradientPredictor::default();
    let prediction = predictor.predict(Some(matrix(&[1.0], 1)), None, &[site], SHRUNK).unwrap();
    let (mut seen, mut of_site) = (prediction.observe(), prediction.observe_site(0).unwrap());
    of_site.innovation = vec![1.0, 0.0, 0.0, 0.0];
    of_site.free = CoefficientSums { queries: 2.0, along: 4.0, squared: 4.0, total: 10.0 };
    of_site.spanned = CoefficientSums { queries: 4.0, along: 4.0, squared: 4.0, total: 7.0 };
    seen.sites.push(of_site);
    predictor.observe(seen);
    let report = reports(&predictor, 1, &[site], SHRUNK)[0];
    // γ = 8/8, explained 16/40; residuals (10 − 8 + 4)/2 and (7 − 8 + 4)/4
    assert_eq!((report.span, report.gain, report.explained), (Some(1), 1.0, 0.4));
    assert!((report.alpha - 0.75 / 3.0).abs() < 1e-12, "{}", report.alpha);
    assert_eq!(reports(&predictor, 1, &[site], UNBIASED)[0].alpha, 1.0);
}

/// The predicted effect of a perturbation: γ·h_jᵀ(σε), of the row's own example.
#[test]
fn the_predicted_effect_of_a_perturbation_is_subtracted() {
    let h = (1..=6).map(|i| i as f32).collect();
    let prediction = Prediction::fixed(2, vec![(0.5, h)]);
    let explained = |site: usize, position: usize, noise: &[f32]| {
        let mut rows = PredictedRows { answers: vec![0.0; 4], explained: vec![0.0; 2] };
        prediction.expect(site, position, (false, noise), 1, &mut rows);
        assert_eq!((rows.explained[0], &rows.answers[..2]), (0.0, &[0.0; 2][..]), "the other row");
        rows.explained[1]
    };
    assert_eq!(explained(0, 1, &[1.0, 10.0, 100.0]), 0.5 * (4.0 + 50.0 + 600.0));
    assert_eq!(explained(0, 0, &[0.0, 0.0, 100.0]), 0.5 * 300.0);
    assert_eq!(explained(1, 0, &[1.0; 3]), 0.0, "a site that the step does not have");
}

/// Two tokens of two values for each of three examples; masked ones are neither predicted nor
/// learned from.
#[test]
fn nothing_is_learned_from_masked_tokens() {
    let layout = Layout::new(&[3, 2, 2], Some(0), true);
    let site = TracedSite { coordinates: 4, layout, ..TracedSite::fake(1, 4) };
    let prediction = GradientPredictor::default().predict(Some(matrix(&[1.0; 3], 1)), None, &[site], UNBIASED);
    let mut prediction = prediction.unwrap();
    prediction.mask(0, vec![true, false, true, true, false, true]);
    prediction.mask(7, vec![true]);
    let shown = |position: usize| {
        let mut seen = prediction.observe_site(0).unwrap();
        prediction.observe_query(0, position, (false, &[1.0, 2.0, 4.0, 8.0]), (&[1.0], 1.0), false, &mut seen);
        seen.innovation
    };
    assert_eq!([shown(0), shown(1), shown(2)], [[1.0, 2.0], [5.0, 10.0], [4.0, 8.0]]);
}

/// What is subtracted from the losses is what is added back: over all signs of the noise, the mean of
/// h(ε)·ε is the gradient added to each token, alike or apart, masked or not.
#[test]
fn what_is_subtracted_is_added_back() {
    let layout = Layout::new(&[1, 4, 1], Some(1), true);
    let site = TracedSite { coordinates: 4, layout, ..TracedSite::fake(0, 4) };
    for mask in [None, Some(vec![true, true, false, true])] {
        let mut prediction = Prediction::fixed(1, vec![(0.7, vec![2.0, -3.0])]).with_layouts(&[site]);
        mask.clone().into_iter().for_each(|mask| prediction.mask(0, mask));
        let mut sums = [0.0; 4];
        for signs in 0..16u32 {
            let noise: Vec<f32> = (0..4)
                .map(|t| match &mask {
                    Some(mask) if !mask[t] => 0.0,
                    _ => 1.0 - 2.0 * (signs >> t & 1) as f32,
                })
                .collect();
            let mut rows = PredictedRows { answers: vec![0.0], explained: vec![0.0] };
            prediction.expect(0, 0, (false, &noise), 0, &mut rows);
            sums.iter_mut().zip(&noise).for_each(|(sum, e)| *sum += rows.explained[0] * f64::from(*e) / 16.0);
        }
        let mut h = prediction.gradient(0, 0).unwrap();
        layout.divide(&layout.counts(mask.as_deref()), &mut h);
        let mut added = [0f32; 4];
        layout.add_shared(&h, mask.as_deref(), &mut added);
        assert!(sums.iter().zip(added).all(|(s, a)| (s - f64::from(a)).abs() < 1e-6), "{sums:?}, {added:?}");
    }
}

/// Whatever the queries show, γ lies in [0, 1].
#[test]
fn the_gain_is_clamped() {
    let site = TracedSite::fake(1, 4);
    for (along, gain) in [(-2.0, 0.0), (0.0, 0.0), (0.25, 0.25), (1.0, 1.0), (2.0, 1.0)] {
        let mut predictor = GradientPredictor::default();
        let prediction = predictor.predict(Some(matrix(&[1.0], 1)), None, &[site], UNBIASED).unwrap();
        assert_eq!(prediction.site(0).gain, 0.0, "nothing was predicted before");
        let (mut seen, mut of_site) = (prediction.observe(), prediction.observe_site(0).unwrap());
        of_site.free = CoefficientSums { queries: 1.0, along, squared: 1.0, total: 5.0 };
        seen.sites.push(of_site);
        predictor.observe(seen);
        let got = predictor.predict(Some(matrix(&[1.0], 1)), None, &[site], UNBIASED).unwrap().site(0).gain;
        assert_eq!(got, gain, "{along} times the prediction");
    }
}

/// An output of −∞, as of a masked class, or a step without signals, leaves what is known as it is.
#[test]
fn what_is_missing_for_a_step_leaves_the_weights() {
    let site = TracedSite::fake(9, 5);
    let mut predictor = GradientPredictor::default();
    let mut problem = Problem { estimate: SHRUNK, ..Problem::new(3, vec![site]) };
    (0..5).for_each(|_| problem.step(&mut predictor, 8, 2));
    let known = problem.predict(&predictor, &[1.0; 3]).site(0).weights.clone();
    let masked = matrix(&[0.0, f64::NEG_INFINITY, 1.0], 3);
    let prediction = predictor.predict(Some(matrix(&[1.0; 3], 3)), Some(masked), &[site], SHRUNK).unwrap();
    assert!(!prediction.sees_outputs(), "losses tell instead");
    let without = predictor.predict::<Flex>(None, None, &[site], SHRUNK).unwrap();
    let mut seen = without.observe();
    let mut of_site = predictor.predict::<Flex>(None, None, &[site], SHRUNK).map(|mut prediction| {
        prediction.measure_all();
        prediction.observe_site(0).unwrap()
    });
    of_site.as_mut().unwrap().residual = ResidualMoments { tried: true, product: 3.0, variance: 1.0, pairs: 1.0 };
    seen.sites.extend(of_site);
    (0..3).for_each(|_| predictor.observe(seen.clone()));
    assert_eq!(problem.predict(&predictor, &[1.0; 3]).site(0).weights, known);
    let alpha = predictor.predict::<Flex>(None, None, &[site], SHRUNK).unwrap().alpha(0);
    assert!((alpha - 0.75).abs() < 1e-12, "α needs no signals: {alpha}");
}
