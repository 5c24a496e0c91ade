//! Tests of the regression, and of what it is kept under.

use burn::backend::Flex;
use burn::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::probe::TracedSite;

const EXAMPLES: usize = 40;
const DIM: usize = 3;
const LEN: usize = 5;

fn uniform(n: usize, rng: &mut StdRng) -> Vec<f64> {
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// One site has gradients g = Wᵀr, another unrelated ones. Both are measured with noise of five
/// times their size.
///
/// From step 250 on, with 40 examples a step, less than a tenth of ‖g‖² is left at the first
/// site. The gain of the second stays below 0.5. The seed is fixed.
#[test]
fn related_gradients_are_predicted_and_unrelated_ones_are_not() {
    let mut rng = StdRng::seed_from_u64(1);
    let sites = [TracedSite::fake(7, LEN), TracedSite::fake(3, LEN)];
    let truth = uniform(DIM * LEN, &mut rng);
    let (mut predictor, mut left, mut total, mut gain) = (GradientPredictor::default(), 0.0, 0.0, 1.0);
    for step in 0..300 {
        let signals = uniform(EXAMPLES * DIM, &mut rng);
        let tensor =
            Tensor::<Flex, 2>::from_data(TensorData::new(signals.clone(), [EXAMPLES, DIM]), &Default::default());
        let prediction = predictor.predict(tensor, &sites).unwrap();
        let positions: Vec<usize> = (0..EXAMPLES).collect();
        let shares = vec![1.0 / EXAMPLES as f64; EXAMPLES];
        let mut seen = prediction.observe(&positions, &shares);
        let exact = |j: usize, k: usize| (0..DIM).map(|f| signals[j * DIM + f] * truth[f * LEN + k]).sum::<f64>();
        let zeros = vec![0f32; EXAMPLES * LEN];
        let mut predicted = zeros.clone();
        prediction.add_back(0, &positions, &shares, &mut predicted);
        for site in 0..2 {
            // the queries measure the truth less the prediction, with noise
            let mut known = zeros.clone();
            prediction.add_back(site, &positions, &shares, &mut known);
            let mut measured: Vec<f32> = (0..EXAMPLES * LEN)
                .map(|i| {
                    let truth = if site == 0 { exact(i / LEN, i % LEN) } else { rng.random_range(-1.0..1.0) };
                    (truth / EXAMPLES as f64) as f32 - known[i] + rng.random_range(-5.0..5.0f32) / EXAMPLES as f32
                })
                .collect();
            seen.sites.extend(prediction.add_back(site, &positions, &shares, &mut measured));
        }
        if step >= 250 {
            for (i, h) in predicted.iter().enumerate() {
                let g = exact(i / LEN, i % LEN);
                left += (g - f64::from(h * EXAMPLES as f32)).powi(2);
                total += g * g;
            }
            gain = prediction.gain(1);
        }
        predictor.observe(seen);
    }
    assert!(left < 0.1 * total, "{left} of {total}");
    assert!(gain < 0.5, "unrelated gradients are predicted with gain {gain}");
}

#[test]
fn values_that_are_not_finite_and_wide_outputs_are_skipped() {
    let device = Default::default();
    let mut predictor = GradientPredictor::default();
    let sites = [TracedSite::fake(1, 4), TracedSite::fake(2, 4097)];
    let signals = Tensor::<Flex, 2>::from_data([[1.0f32, -1.0]], &device);
    let prediction = predictor.predict(signals.clone(), &sites).unwrap();
    for value in [f32::NAN, 1.0] {
        let mut seen = prediction.observe(&[0], &[1.0]);
        seen.sites.extend(prediction.add_back(0, &[0], &[1.0], &mut [value; 4]));
        predictor.observe(seen);
        assert_eq!(predictor.kept().is_empty(), value.is_nan());
    }
    let nothing = prediction.observe(&[0], &[0.0]);
    predictor.observe(nothing);
    // a site none of whose examples has an estimate shows nothing, beside another that does
    let mut seen = prediction.observe(&[0], &[1.0]);
    seen.sites.extend(prediction.add_back(0, &[0], &[0.0], &mut [1.0; 4]));
    predictor.observe(seen);
    let after = predictor.predict(signals.clone(), &sites).unwrap();
    assert!(after.gradients(0).is_some_and(|h| h.iter().all(|h| h.is_finite() && *h != 0.0)));
    assert!(predictor.predict(signals.mul_scalar(f32::NAN), &sites).is_none());
    assert!(predictor.predict(Tensor::<Flex, 2>::zeros([1, 129], &device), &sites).is_none());
    assert!(prediction.add_back(1, &[0], &[1.0], &mut [0.0; 4097]).is_none());
    assert!(prediction.add_back(2, &[0], &[1.0], &mut [0.0; 4]).is_none(), "a site that the step does not have");
}

/// Signals of three examples, one along each of the three axes: their covariance is `scale`²/3
/// times the identity.
fn axes(scale: f32) -> Tensor<Flex, 2> {
    Tensor::<Flex, 2>::from_data([[scale, 0.0, 0.0], [0.0, scale, 0.0], [0.0, 0.0, scale]], &Default::default())
}

/// Entry k of W for signal f at the site of this parameter.
fn weight(parameter: u64, f: usize, k: usize) -> f32 {
    ((3 * k + f) as f32 + 5.0 * (parameter % 100) as f32).sin()
}

/// A step on [`axes`] in which each site (parameter and width) has the exact gradients Wᵀr.
fn step(predictor: &mut GradientPredictor, scale: f32, sites: &[(u64, usize)]) {
    let traced: Vec<TracedSite> = sites.iter().map(|&(key, width)| TracedSite::fake(key, width)).collect();
    let prediction = predictor.predict(axes(scale), &traced).unwrap();
    let (positions, shares) = ([0, 1, 2], [1.0 / 3.0; 3]);
    let mut seen = prediction.observe(&positions, &shares);
    for (site, &(parameter, width)) in sites.iter().enumerate() {
        let mut predicted = vec![0f32; 3 * width];
        prediction.add_back(site, &positions, &shares, &mut predicted);
        // what the queries measure is what the prediction leaves
        let exact = |i: usize| scale / 3.0 * weight(parameter, i / width, i % width);
        let mut left: Vec<f32> = (0..3 * width).map(|i| exact(i) - predicted[i]).collect();
        seen.sites.extend(prediction.add_back(site, &positions, &shares, &mut left));
    }
    predictor.observe(seen);
}

/// The gradients predicted for [`axes`] at each site, before their gain.
fn predicted(predictor: &GradientPredictor, scale: f32, sites: &[(u64, usize)]) -> Vec<Option<Vec<f32>>> {
    let traced: Vec<TracedSite> = sites.iter().map(|&(key, width)| TracedSite::fake(key, width)).collect();
    let prediction = predictor.predict(axes(scale), &traced).unwrap();
    (0..sites.len()).map(|site| prediction.gradients(site).map(<[f32]>::to_vec)).collect()
}

/// A site is predicted where its key and its width agree, in whatever order the step has its sites.
#[test]
fn a_site_is_predicted_at_the_width_it_was_seen_at() {
    let mut predictor = GradientPredictor::default();
    for _ in 0..3 {
        step(&mut predictor, 1.0, &[(9, 5), (4, 2)]);
    }
    let both = predicted(&predictor, 1.0, &[(9, 5), (4, 2)]);
    assert!(both.iter().all(Option::is_some));
    assert_eq!(predicted(&predictor, 1.0, &[(4, 2), (9, 5)]), [both[1].clone(), both[0].clone()]);
    assert_eq!(predicted(&predictor, 1.0, &[(9, 7), (4, 2), (6, 2)]), [None, both[1].clone(), None]);
    // a step without the site, and one at another width, leave its regression as it was
    step(&mut predictor, 1.0, &[(9, 7)]);
    let later = predicted(&predictor, 1.0, &[(4, 2), (9, 7), (9, 5)]);
    assert!(later.iter().all(Option::is_some));
    assert_eq!(predictor.kept().len(), 3);
}

/// The head of a text model has the same width for all lengths, and learns as if they were equal.
#[test]
fn a_head_learns_the_same_over_all_lengths() {
    let (mut varying, mut constant) = (GradientPredictor::default(), GradientPredictor::default());
    for (i, length) in [5, 5, 7, 5, 7, 9, 7, 5].into_iter().enumerate() {
        let scale = 1.0 / (1 + i) as f32;
        step(&mut varying, scale, &[(1, 3 * length), (2, 4)]);
        step(&mut constant, scale, &[(1, 15), (2, 4)]);
        assert_eq!(predicted(&varying, scale, &[(2, 4)]), predicted(&constant, scale, &[(2, 4)]));
    }
    let every = |predictor: &GradientPredictor| predictor.kept().iter().filter(|(_, _, every)| *every).count();
    assert_eq!((varying.kept().len(), every(&varying)), (4, 1));
    assert_eq!((constant.kept().len(), every(&constant)), (2, 2));
}

/// With signals along the axes, h = Wᵀr/(1 + ridge) in closed form.
///
/// That holds for a site that every step has, for one that joins late, and for one that left while
/// the signals went on shrinking. The tolerance is that of sums in f32.
#[test]
fn predictions_keep_their_scale_where_steps_lack_a_site() {
    let mut predictor = GradientPredictor::default();
    let mut scale = 1.0;
    for i in 0..120 {
        let sites: &[(u64, usize)] = match i {
            0..40 => &[(1, 4), (2, 3)],
            40..119 => &[(1, 4)],
            _ => &[(1, 4), (3, 6)],
        };
        step(&mut predictor, scale, sites);
        scale *= 0.95;
    }
    let sites = [(1, 4), (2, 3), (3, 6)];
    for (h, (parameter, width)) in predicted(&predictor, scale, &sites).into_iter().zip(sites) {
        for (i, h) in h.unwrap().into_iter().enumerate() {
            let expected = scale * weight(parameter, i / width, i % width) / 1.1;
            assert!((h - expected).abs() < 1e-3 * scale, "site {parameter}: {h}, not {expected}");
        }
    }
}

/// A site whose width changes all the time keeps the last eight; other sites keep theirs.
#[test]
fn the_widths_of_a_site_are_bounded() {
    let mut predictor = GradientPredictor::default();
    for width in [1, 2, 3, 4, 5, 6, 7, 8, 1, 9, 10] {
        step(&mut predictor, 1.0, &[(5, width), (6, 1)]);
    }
    let widths = |predictor: &GradientPredictor| -> Vec<usize> { predictor.kept().iter().map(|kept| kept.1).collect() };
    assert_eq!(widths(&predictor), [1, 4, 5, 6, 7, 8, 9, 10, 1]);
    // the oldest may lie behind the new one, too
    step(&mut predictor, 1.0, &[(5, 2), (6, 1)]);
    assert_eq!(widths(&predictor), [1, 2, 5, 6, 7, 8, 9, 10, 1]);
    // each has what its own steps showed
    let sites = [1, 2, 5, 6, 7, 8, 9, 10].map(|width| (5, width));
    for (h, (parameter, width)) in predicted(&predictor, 1.0, &sites).into_iter().zip(sites) {
        for (i, h) in h.unwrap().into_iter().enumerate() {
            let expected = weight(parameter, i / width, i % width) / 1.1;
            assert!((h - expected).abs() < 1e-5, "width {width}: {h}, not {expected}");
        }
    }
}

/// Through JSON, whose maps have strings for keys, and whose reader rounds in the last bit.
#[test]
fn a_predictor_survives_serde() {
    let mut predictor = GradientPredictor::default();
    for width in [3, 5, 3] {
        step(&mut predictor, 1.0, &[(u64::MAX, width), (6, 1)]);
    }
    let json = serde_json::to_string(&predictor).unwrap();
    let back: GradientPredictor = serde_json::from_str(&json).unwrap();
    let sites = [(u64::MAX, 3), (u64::MAX, 5), (6, 1)];
    let gradients = |of: &GradientPredictor| predicted(of, 1.0, &sites).into_iter().flat_map(Option::unwrap);
    assert_eq!(gradients(&back).count(), 3 * (3 + 5 + 1));
    assert!(gradients(&back).zip(gradients(&predictor)).all(|(a, b)| (a - b).abs() < 1e-6));
}

/// γ is the regression coefficient of gradients on predictions, kept from 0 to 1.
#[test]
fn the_gain_is_the_share_of_a_prediction_that_holds() {
    let sites = [TracedSite::fake(1, 4)];
    let (positions, shares) = ([0, 1, 2], [1.0 / 3.0; 3]);
    for (measured, gain) in [(-2.0, 0.0), (0.0, 0.0), (0.25, 0.25), (1.0, 1.0), (2.0, 1.0)] {
        let mut predictor = GradientPredictor::default();
        step(&mut predictor, 1.0, &[(1, 4)]);
        let prediction = predictor.predict(axes(1.0), &sites).unwrap();
        assert_eq!(prediction.gain(0), 0.0, "nothing was predicted before");
        let mut gradients: Vec<f32> = prediction.gradients(0).unwrap().iter().map(|h| measured * h / 3.0).collect();
        let mut seen = prediction.observe(&positions, &shares);
        seen.sites.extend(prediction.add_back(0, &positions, &shares, &mut gradients));
        predictor.observe(seen);
        let got = predictor.predict(axes(1.0), &sites).unwrap().gain(0);
        assert!((got - gain).abs() < 1e-6, "{measured} times the prediction: {got}");
    }
}

/// With one step behind it, h = r_jᵀ(C + ridge·c̄)⁻¹X in closed form, for signals that are neither
/// orthogonal nor of one length.
#[test]
fn predictions_are_those_of_ridge_regression() {
    let r = [[1.0f64, 2.0], [-1.0, 0.5]];
    let g = [[3.0f64, -1.0, 0.5], [2.0, 4.0, -2.0]];
    let signals = Tensor::<Flex, 2>::from_data([[1.0f32, 2.0], [-1.0, 0.5]], &Default::default());
    let (mut predictor, sites) = (GradientPredictor::default(), [TracedSite::fake(1, 3)]);
    let prediction = predictor.predict(signals.clone(), &sites).unwrap();
    let mut seen = prediction.observe(&[0, 1], &[0.5; 2]);
    let mut gradients: Vec<f32> = g.as_flattened().iter().map(|g| 0.5 * *g as f32).collect();
    seen.sites.extend(prediction.add_back(0, &[0, 1], &[0.5; 2], &mut gradients));
    predictor.observe(seen);
    // sums over the examples; the rate and the number of examples cancel
    let c = |a: usize, b: usize| r[0][a] * r[0][b] + r[1][a] * r[1][b];
    let ridge = 0.1 * (c(0, 0) + c(1, 1)) / 2.0;
    let (a, b, d) = (c(0, 0) + ridge, c(0, 1), c(1, 1) + ridge);
    let x = |f: usize, k: usize| r[0][f] * g[0][k] + r[1][f] * g[1][k];
    let w = |k: usize| {
        let (x, y) = (x(0, k), x(1, k));
        [(d * x - b * y) / (a * d - b * b), (a * y - b * x) / (a * d - b * b)]
    };
    let prediction = predictor.predict(signals, &sites).unwrap();
    for (i, h) in prediction.gradients(0).unwrap().iter().enumerate() {
        let expected = r[i / 3][0] * w(i % 3)[0] + r[i / 3][1] * w(i % 3)[1];
        assert!((f64::from(*h) - expected).abs() < 1e-5, "{i}: {h}, not {expected}");
    }
}

/// γ·h_jᵀ(σε) for the coordinates at hand, of the row's own example.
#[test]
fn the_predicted_effect_of_a_perturbation_is_subtracted() {
    let h = (1..=6).map(|i| i as f32).collect();
    let prediction = Prediction::fixed(vec![1.0; 2], 1, vec![(0.5, h)]);
    assert_eq!(prediction.subtract(0, 1, 3, 0, &[1.0, 10.0, 100.0]), 0.5 * (4.0 + 50.0 + 600.0));
    assert_eq!(prediction.subtract(0, 1, 3, 1, &[10.0, 100.0]), 0.5 * (50.0 + 600.0));
    assert_eq!(prediction.subtract(0, 0, 3, 2, &[100.0]), 0.5 * 300.0);
    // a row of another width, and a site that the step does not have
    assert_eq!(prediction.subtract(0, 0, 2, 0, &[1.0, 1.0]), 0.0);
    assert_eq!(prediction.subtract(1, 0, 3, 0, &[1.0; 3]), 0.0);
}

/// Two tokens of two values for each of three examples; what a masked one measured does not count.
#[test]
fn nothing_is_learned_from_masked_tokens() {
    let mut prediction = Prediction::fixed(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2, vec![(0.5, vec![2.0; 12])]);
    prediction.mask(0, vec![true, false, true, true, false, true]);
    prediction.mask(7, vec![true]);
    let mut gradients = vec![1.0; 8];
    // the examples 2 and 0, of weights 1/2 and 1/4
    let seen = prediction.add_back(0, &[2, 0], &[0.5, 0.25], &mut gradients).unwrap();
    assert_eq!(gradients, [0.0, 0.0, 1.5, 1.5, 1.25, 1.25, 0.0, 0.0]);
    assert_eq!((seen.examples, seen.squares), (2.0, 61.0 + 5.0));
    assert_eq!((seen.along, seen.squared), (2.0 * 2.0 * 1.5 / 0.5 + 2.0 * 2.0 * 1.25 / 0.25, 8.0 + 8.0));
    // Σ r·g/weight, for each of the two signals
    assert_eq!(seen.cross, [5.0, 5.0, 15.0, 15.0, 10.0, 10.0, 18.0, 18.0]);
}

/// Of the whole batch and of its parts, with a prediction whose part in them is not zero.
#[test]
fn what_a_site_shows_adds_up() {
    let prediction = Prediction::fixed(vec![1.0, 2.0, 4.0], 1, vec![(0.5, vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0])]);
    let observe = |positions: &[usize]| {
        let mut gradients: Vec<f32> = positions.iter().flat_map(|&j| [8.0 * j as f32 + 1.0, -4.0]).collect();
        let mut seen = prediction.observe(positions, &vec![0.5; positions.len()]);
        seen.sites.extend(prediction.add_back(0, positions, &vec![0.5; positions.len()], &mut gradients));
        seen
    };
    let (whole, mut merged) = (observe(&[0, 1, 2]), observe(&[0]));
    merged.merge(observe(&[1, 2]));
    assert_eq!((merged.examples, merged.squares, merged.covariance), (3.0, 21.0, whole.covariance));
    let (a, b) = (&whole.sites[0], &merged.sites[0]);
    assert_eq!((a.examples, a.squares, a.along, a.squared), (b.examples, b.squares, b.along, b.squared));
    assert_eq!(a.cross, b.cross);
    assert!(a.along != 0.0 && a.squares == 21.0 && a.squared == 91.0);
}

/// Another width of the same site, or another site of the same width, is one of its own.
#[test]
fn observations_of_other_sites_and_widths_stay_apart() {
    let observe = |key: u64, width: usize| {
        let prediction = GradientPredictor::default().predict(axes(1.0), &[TracedSite::fake(key, width)]).unwrap();
        let mut seen = prediction.observe(&[0], &[1.0]);
        seen.sites.extend(prediction.add_back(0, &[0], &[1.0], &mut vec![1.0; width]));
        seen
    };
    let mut merged = observe(1, 2);
    for (key, width, expected) in [(1, 3, 2), (2, 2, 3), (1, 2, 3), (2, 2, 3)] {
        merged.merge(observe(key, width));
        assert_eq!(merged.sites.len(), expected, "site {key} of width {width}");
    }
}

/// Signals of another number start everything anew.
#[test]
fn other_signals_start_anew() {
    let mut predictor = GradientPredictor::default();
    step(&mut predictor, 1.0, &[(1, 4), (2, 3)]);
    let sites = [TracedSite::fake(1, 4)];
    let signals = Tensor::<Flex, 2>::from_data([[1.0f32, -1.0], [0.5, 0.5]], &Default::default());
    let prediction = predictor.predict(signals.clone(), &sites).unwrap();
    assert!(prediction.gradients(0).is_none());
    let mut seen = prediction.observe(&[0, 1], &[0.5; 2]);
    seen.sites.extend(prediction.add_back(0, &[0, 1], &[0.5; 2], &mut [1.0; 8]));
    predictor.observe(seen);
    assert_eq!(predictor.kept().len(), 1);
    assert!(predictor.predict(signals, &sites).unwrap().gradients(0).is_some());
}

/// Jobs observe parts of a batch. Merged they are the whole, also where a site is only in one.
#[test]
fn observations_add_up_by_site_and_width() {
    let sites = [TracedSite::fake(1, 2), TracedSite::fake(2, 1)];
    let prediction = GradientPredictor::default().predict(axes(1.0), &sites).unwrap();
    let gradients = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0];
    let observe = |positions: &[usize], with_second: bool| {
        let shares = vec![1.0; positions.len()];
        let mut seen = prediction.observe(positions, &shares);
        let mut first: Vec<f32> = positions.iter().flat_map(|&j| [gradients[2 * j], gradients[2 * j + 1]]).collect();
        seen.sites.extend(prediction.add_back(0, positions, &shares, &mut first));
        if with_second {
            let mut second = vec![1.0; positions.len()];
            seen.sites.extend(prediction.add_back(1, positions, &shares, &mut second));
        }
        seen
    };
    let (whole, mut merged) = (observe(&[0, 1, 2], false), observe(&[0], false));
    merged.merge(observe(&[1, 2], true));
    assert_eq!((merged.examples, merged.squares, &merged.covariance), (3.0, 3.0, &whole.covariance));
    assert_eq!(merged.sites.len(), 2);
    assert_eq!((&merged.sites[0].cross, merged.sites[0].examples), (&whole.sites[0].cross, 3.0));
    assert_eq!((&merged.sites[1].cross[..], merged.sites[1].examples), (&[0.0, 1.0, 1.0][..], 2.0));
}
