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
    let widths: Vec<usize> = predictor.kept().iter().map(|(_, width, _)| *width).collect();
    assert_eq!(widths, [1, 4, 5, 6, 7, 8, 9, 10, 1]);
}

/// Through JSON, whose maps have strings for keys.
#[test]
fn a_predictor_survives_serde() {
    let mut predictor = GradientPredictor::default();
    for width in [3, 5, 3] {
        step(&mut predictor, 1.0, &[(u64::MAX, width), (6, 1)]);
    }
    let json = serde_json::to_string(&predictor).unwrap();
    let back: GradientPredictor = serde_json::from_str(&json).unwrap();
    let sites = [(u64::MAX, 3), (u64::MAX, 5), (6, 1)];
    assert_eq!(predicted(&back, 1.0, &sites), predicted(&predictor, 1.0, &sites));
    assert_eq!(serde_json::to_string(&back).unwrap(), json);
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
