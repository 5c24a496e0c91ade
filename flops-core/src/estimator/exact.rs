//! Estimates over every outcome of their draws: means and variances are exact, up to rounding.
//!
//! The loss is quadratic and the noise are signs, so the mean of an estimate is the gradient, at
//! any σ.

use burn::module::{AutodiffModule, Module};
use burn::nn::{Embedding, EmbeddingConfig};
use burn::prelude::*;

use super::*;
use crate::allocator::{Allocation, QueryBudget};
use crate::batch::Batch;
use crate::control_variate::Prediction;
use crate::model::ForwardModel;
use crate::noise::script::{for_all, mean};
use crate::noise::{NoiseLaw, NoiseSource, Placement, Sampling, Span, source};
use crate::probe::Probe;
use crate::random::derive_seed;
use crate::testing::pair::{Case, Pair, assert_close, case, pair};
use crate::testing::{AB, B, flat, true_gradient};

const SAMPLINGS: [Sampling; 2] = [Sampling::OneSided, Sampling::Antithetic];
/// Unequal, so that an equal weight for all sites shows.
const SITES: [f64; 2] = [0.3, 0.7];

fn estimator(space: Space, sampling: Sampling) -> Estimator {
    Estimator { sampling, sigma: 0.5, seed: 7, ..Estimator::new(space) }
}

fn activation(placement: Placement) -> Space {
    Space::activation().with_placement(placement).unwrap()
}

/// The clean pass of a case, with unequal probabilities of the sites.
fn clean<'a>(estimator: &'a Estimator, case: &'a Case) -> CleanPass<'a, B, Pair<B>> {
    let mut clean = estimator.clean(&case.model, &case.batch, &case.trained).unwrap();
    if clean.sites.len() == 2 {
        clean.set_site_probabilities(SITES.to_vec()).unwrap();
    }
    clean
}

fn vector(clean: &CleanPass<'_, B, Pair<B>>, estimate: &Estimate<B>) -> Vec<f64> {
    flat(clean.model, &mut |id, _| estimate.gradients.get(id).map(|g| g.to_data().iter::<f64>().collect()))
}

/// E ĝ, then E‖ĝ − g‖².
fn moments(clean: &CleanPass<'_, B, Pair<B>>, counts: &[usize], gradient: &[f64]) -> (Vec<f64>, f64) {
    let allocation = Allocation::of(counts);
    let both = mean(|| {
        let mut g = vector(clean, &clean.estimate(&allocation, 3).unwrap());
        g.push(g.iter().zip(gradient).map(|(g, t)| (g - t).powi(2)).sum());
        g
    });
    let (variance, mean) = both.split_last().unwrap();
    (mean.to_vec(), *variance)
}

/// E ĝ is the gradient, for every space and placement, with unequal counts and unequal
/// probabilities.
///
/// An odd last query of antithetic sampling is one-sided.
#[test]
fn means_are_gradients_in_every_space() {
    // inputs, biases, ids, one-sided counts, antithetic counts
    type Shape<'a> = (usize, bool, &'a [u64], &'a [usize], &'a [usize]);
    let two: Shape<'_> = (2, true, &[0, 1], &[2, 1], &[3, 2]);
    let narrow: Shape<'_> = (1, false, &[0, 1], &[2, 1], &[3, 2]);
    let low_rank: Shape<'_> = (1, false, &[0, 1], &[1, 1], &[2, 1]);
    let biased: Shape<'_> = (1, true, &[2], &[1], &[2]);
    let one: Shape<'_> = (1, false, &[2], &[1], &[2]);
    let cases = [
        (activation(Placement::Joint), two),
        (activation(Placement::Single), two),
        (activation(Placement::CostWeighted), two),
        (Space::weights(), narrow),
        (Space::low_rank(1), low_rank),
        (Space::low_rank(1), biased),
        (Space::low_rank(2), one),
        (Space::low_rank(1).with_placement(Placement::Single).unwrap(), biased),
        (Space::low_rank(2).with_placement(Placement::Single).unwrap(), one),
        (Space::low_rank(2).with_placement(Placement::CostWeighted).unwrap(), one),
    ];
    for (space, (inputs, bias, ids, one_sided, antithetic)) in cases {
        let case = case(&pair(inputs, bias), ids);
        for (sampling, counts) in SAMPLINGS.into_iter().zip([one_sided, antithetic]) {
            let estimator = estimator(space, sampling);
            let (mean, _) = moments(&clean(&estimator, &case), counts, &case.gradient);
            assert_close(&mean, &case.gradient, &format!("{space:?} {sampling} {counts:?}"));
        }
    }
}

/// A table, whose noise of low rank falls on its output: a row takes part in one entry alone.
#[derive(Module, Debug)]
struct Words<B: Backend> {
    table: Embedding<B>,
}

impl<B: Backend> ForwardModel<B> for Words<B> {
    type Input = Tensor<B, 2, Int>;
    type Target = Tensor<B, 2>;
    type Output = Tensor<B, 2>;
    fn forward(&self, ids: Tensor<B, 2, Int>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        probe.embedding(&self.table, ids).squeeze_dim(1)
    }
    fn losses(&self, y: Tensor<B, 2>, t: Tensor<B, 2>) -> Tensor<B, 1> {
        (y - t).powi_scalar(2).sum_dim(1).squeeze_dim(1)
    }
}

/// Noise of low rank that falls on outputs leaves the mean as well, in one job of both examples.
#[test]
fn noise_of_low_rank_on_an_output_leaves_the_mean() {
    fn words<B: Backend>() -> Batch<Tensor<B, 2, Int>, Tensor<B, 2>> {
        let device = Default::default();
        let target = Tensor::from_floats([[0.2, 0.9], [-1.0, 0.4]], &device);
        Batch { ids: vec![0, 1], input: Tensor::from_ints([[2], [0]], &device), target }
    }
    let with_graph = Words::<AB> { table: EmbeddingConfig::new(3, 2).init(&Default::default()) };
    let (model, trained, batch) = (with_graph.valid(), trained_parameters(&with_graph), words::<B>());
    let gradient = true_gradient(&with_graph, words::<AB>());
    for (sampling, counts) in SAMPLINGS.into_iter().zip([[2, 1], [4, 2]]) {
        let estimator = estimator(Space::low_rank(2), sampling);
        let clean = estimator.clean(&model, &batch, &trained).unwrap();
        let mean = mean(|| {
            let estimate = clean.estimate(&Allocation::of(&counts), 3).unwrap();
            // the shapes of the sites, and then both examples
            assert_eq!(estimate.update.rows, 1 + 2);
            flat(&model, &mut |id, _| estimate.gradients.get(id).map(|g| g.to_data().iter::<f64>().collect()))
        });
        assert_close(&mean, &gradient, &sampling.to_string());
    }
}

/// The gradient of an entry is the coefficient times the noise, also where that is no sign.
#[test]
fn noise_of_low_rank_on_an_output_is_its_own_score() {
    let with_graph = Words::<AB> { table: EmbeddingConfig::new(3, 2).init(&Default::default()) };
    let (model, trained) = (with_graph.valid(), trained_parameters(&with_graph));
    let (device, id) = (Default::default(), 4);
    let target = Tensor::from_floats([[0.2, 0.9]], &device);
    let batch = Batch { ids: vec![id], input: Tensor::<B, 2, Int>::from_ints([[2]], &device), target };
    let space = Space::low_rank(1).with_placement(Placement::Joint).unwrap();
    let estimator = Estimator { noise: NoiseLaw::Uniform, ..estimator(space, Sampling::OneSided) };
    let clean = estimator.clean(&model, &batch, &trained).unwrap();
    let estimate = clean.estimate(&Allocation::of(&[1]), 3).unwrap();
    let mut noise = [0f32; 2];
    let source = source(NoiseLaw::Uniform, Sampling::OneSided);
    NoiseSource { sigma: 0.5, seed: derive_seed(&[7, id]), step: 3, ..source }.draw(0, 0, 0, None, &mut noise);
    let gradient = estimate.gradient(&model.table.weight).unwrap().into_data().to_vec::<f32>().unwrap();
    assert_eq!(gradient[..4], [0.0; 4], "other words");
    let (a, b) = (gradient[4] * noise[1], gradient[5] * noise[0]);
    assert!((a - b).abs() < 1e-5 * a.abs() && a != 0.0, "{gradient:?} of {noise:?}");
}

/// E‖ĝ − g‖² = (1/B²) Σ_j Tr Σ_j/A_j: the queries of a batch are independent of one another.
///
/// Tr Σ_j is that of a single query, or pair, of the example alone.
#[test]
fn variances_follow_the_allocation() {
    let spaces = [
        (activation(Placement::Joint), [2, 1]),
        (activation(Placement::Single), [2, 1]),
        // directions of one example are spread, those of different ones independent
        (activation(Placement::CostWeighted), [1, 1]),
        (Space::low_rank(1), [1, 1]),
    ];
    for (space, directions) in spaces {
        let model = if matches!(space, Space::LowRank { .. }) { pair(1, false) } else { pair(2, true) };
        for sampling in SAMPLINGS {
            let (group, estimator) = (sampling.group(), estimator(space, sampling));
            let both = case(&model, &[0, 1]);
            let expected: f64 = [0, 1]
                .iter()
                .zip(directions)
                .map(|(&id, directions)| {
                    let alone = case(&model, &[id]);
                    moments(&clean(&estimator, &alone), &[group], &alone.gradient).1 / directions as f64
                })
                .sum::<f64>()
                / 4.0;
            let counts = directions.map(|n| n * group);
            let (_, variance) = moments(&clean(&estimator, &both), &counts, &both.gradient);
            assert_close(&[variance], &[expected], &format!("{space:?} {sampling}"));
        }
    }
}

/// m_j is ‖ĝ‖² of a single query of example j alone, 1/p² included, and in its mean over the draws
/// of a batch that of this example, not of another.
///
/// A pair counts twice, for it took two queries.
#[test]
fn second_moments_are_those_of_single_queries() {
    let model = pair(2, true);
    for placement in Placement::ALL {
        for sampling in SAMPLINGS {
            let (name, queries) = (format!("{placement} {sampling}"), sampling.group());
            let estimator = estimator(activation(placement), sampling);
            let mut expected = vec![];
            for id in [0, 1, 2] {
                let alone = case(&model, &[id]);
                let (clean, allocation) = (clean(&estimator, &alone), Allocation::of(&[queries]));
                let mut moment = 0.0;
                for_all(
                    || clean.estimate(&allocation, 3).unwrap(),
                    |probability, estimate| {
                        assert_eq!(estimate.site_moments.is_empty(), placement == Placement::Joint, "{name}");
                        let g = vector(&clean, &estimate);
                        let square = queries as f64 * g.iter().map(|g| g * g).sum::<f64>();
                        assert_close(&estimate.second_moments, &[square], &name);
                        moment += probability * square;
                        if let Some(site) = estimate.site_moments.iter().position(|moment| moment.queries > 0) {
                            let (here, other) = (estimate.site_moments[site], estimate.site_moments[1 - site]);
                            assert_close(&[here.sum], &[queries as f64 * square * SITES[site].powi(2)], &name);
                            assert_eq!((here.queries, other.queries, other.sum), (queries as u64, 0, 0.0), "{name}");
                        }
                    },
                );
                expected.push(moment);
            }
            assert!(expected.windows(2).all(|m| (m[1] / m[0] - 1.0).abs() > 0.1), "examples differ: {expected:?}");
            let all = case(&model, &[0, 1, 2]);
            // update jobs of one example each, and of all
            for max_rows in [2, 256] {
                let estimator = Estimator { max_rows, ..estimator.clone() };
                let (clean, allocation) = (clean(&estimator, &all), Allocation::of(&[queries; 3]));
                let moments = mean(|| clean.estimate(&allocation, 3).unwrap().second_moments);
                assert_close(&moments, &expected, &name);
            }
        }
    }
}

/// Any fixed prediction leaves the mean. An example without a finite loss has no estimate, and gets
/// no prediction either.
#[test]
fn predictions_leave_the_mean() {
    let model = pair(2, true);
    let prediction = |n: usize| {
        let values = |len: usize| (0..n * len).map(|i| 0.4 * (1.7 * i as f32 + len as f32).sin()).collect();
        Prediction::fixed(n, vec![(0.7, values(2)), (0.9, values(1))])
    };
    for placement in Placement::ALL {
        for sampling in SAMPLINGS {
            let (name, group) = (format!("{placement} {sampling}"), sampling.group());
            let estimator = estimator(activation(placement), sampling);
            let both = case(&model, &[0, 1]);
            let mut pass = clean(&estimator, &both);
            pass.set_prediction(Some(prediction(2)));
            let (mean, _) = moments(&pass, &[2 * group, group], &both.gradient);
            assert_close(&mean, &both.gradient, &name);

            let mut broken = case(&model, &[0, 1, 2]);
            let (targets, ..) = &mut broken.batch.target;
            *targets = targets.clone() + Tensor::from_floats([[0.0; 2], [f32::NAN; 2], [0.0; 2]], &Default::default());
            let mut pass = clean(&estimator, &broken);
            pass.set_prediction(Some(prediction(3)));
            let (mean, _) = moments(&pass, &[group; 3], &both.gradient);
            let rest = case(&model, &[0, 2]);
            let expected: Vec<f64> = rest.gradient.iter().map(|g| g * 2.0 / 3.0).collect();
            assert_close(&mean, &expected, &format!("{name}, one example broken"));
        }
    }
}

/// With a span at a site, the mean is h + U(g − h) there, U the projection onto the span, and the
/// gradient elsewhere.
///
/// Queries with noise on all coordinates have no part in the residual of such a site.
#[test]
fn the_residual_in_a_span_is_its_projection() {
    let model = pair(2, true);
    let batch = case(&model, &[0, 1]);
    let values = |len: usize| (0..2 * len).map(|i| 0.4 * (1.7 * i as f32 + len as f32).sin()).collect();
    let prediction = || Prediction::fixed(2, vec![(0.7, values(2)), (0.9, values(1))]);
    let span = Span::of(&[0.6, -0.8], 2);
    for placement in [Placement::Single, Placement::CostWeighted] {
        for sampling in SAMPLINGS {
            let (name, group) = (format!("{placement} {sampling}"), sampling.group());
            let estimator = estimator(activation(placement), sampling);
            let mean_of = |prediction: Prediction| {
                let mut pass = clean(&estimator, &batch);
                pass.set_prediction(Some(prediction));
                moments(&pass, &[2 * group, group], &batch.gradient).0
            };
            // h alone, with no weight for any residual
            let h = mean_of(prediction().with_alpha(0.0));
            let mean = mean_of(prediction().with_spans(vec![span.clone(), None]));
            // the first layer has six values, rows of its two outputs; those of the second follow
            let mut expected = batch.gradient.clone();
            for (g, h) in expected[..6].chunks_mut(2).zip(h.chunks(2)) {
                let along = 0.6 * (g[0] - h[0]) - 0.8 * (g[1] - h[1]);
                g.copy_from_slice(&[h[0] + 0.6 * along, h[1] - 0.8 * along]);
            }
            assert_close(&mean, &expected, &name);
        }
    }
}

/// With a span, m_j is ‖ĝ‖² of a single query as well: that of its part of the coordinates for a query
/// in the span, and 0 for one that only teaches the weights.
#[test]
fn moments_count_what_is_used() {
    let batch = case(&pair(2, true), &[1]);
    for sampling in SAMPLINGS {
        let (estimator, queries) = (estimator(activation(Placement::Single), sampling), sampling.group());
        let mut pass = clean(&estimator, &batch);
        let nothing = Prediction::fixed(1, vec![(0.0, vec![0.0; 2]), (0.0, vec![0.0])]);
        pass.set_prediction(Some(nothing.with_spans(vec![Span::of(&[0.6, -0.8], 2), None])));
        let (mut taught, mut used) = (0.0, 0.0);
        for_all(
            || pass.estimate(&Allocation::of(&[queries]), 3).unwrap(),
            |probability, estimate| {
                let square = queries as f64 * vector(&pass, &estimate).iter().map(|g| g * g).sum::<f64>();
                assert_close(&estimate.second_moments, &[square], &sampling.to_string());
                if square == 0.0 {
                    taught += probability;
                } else {
                    used += probability;
                }
            },
        );
        // a quarter of the queries has noise on all coordinates, and of these SITES[0] falls on the span's
        assert!((taught - 0.25 * SITES[0]).abs() < 1e-9 && (taught + used - 1.0).abs() < 1e-9, "{taught}");
    }
}

/// Estimates of two steps, of batches with other ids, and of other seeds are independent:
/// E[ĝ ĝ′ᵀ] = g g′ᵀ.
#[test]
fn noise_of_steps_batches_and_seeds_is_independent() {
    let spaces = [
        activation(Placement::Joint),
        activation(Placement::Single),
        activation(Placement::CostWeighted),
        Space::low_rank(1).with_placement(Placement::Single).unwrap(),
        Space::weights(),
    ];
    let model = pair(1, false);
    let (here, there) = (case(&model, &[0]), case(&model, &[1]));
    let one = Allocation::of(&[1]);
    for space in spaces {
        let estimator = estimator(space, Sampling::OneSided);
        let (a, b) = (clean(&estimator, &here), clean(&estimator, &there));
        let first = || vector(&a, &a.estimate(&one, 0).unwrap());
        type Draw<'a> = &'a dyn Fn() -> Vec<f64>;
        let others: [(&str, &Case, Draw<'_>); 3] = [
            ("another step", &here, &|| vector(&a, &a.estimate(&one, 1).unwrap())),
            ("another seed", &here, &|| vector(&a, &a.estimate_with_seed(8, &one, 0).unwrap())),
            ("another batch", &there, &|| vector(&b, &b.estimate(&one, 0).unwrap())),
        ];
        let outer =
            |a: &[f64], b: &[f64]| -> Vec<f64> { a.iter().flat_map(|a| b.iter().map(move |b| a * b)).collect() };
        for (name, case, second) in others {
            let products = mean(|| outer(&first(), &second()));
            assert_close(&products, &outer(&here.gradient, &case.gradient), &format!("{space:?}, {name}"));
        }
    }
}

/// Pilots decide the allocation of the other queries; the mean stays the gradient, and the variance
/// is the one that the estimate reports.
#[test]
fn pilots_leave_the_mean_and_the_reported_variance() {
    let mut model = pair(1, false);
    model.first = model.first.no_grad();
    let case_of = |ids: &[u64]| case(&model, ids);
    // for these the rest is (2, 2) or (1, 3), by the signs of the pilots
    let (both, budget) = (case_of(&[4, 9]), QueryBudget::new(3, 1).unwrap());
    let estimator = estimator(activation(Placement::Joint), Sampling::OneSided);
    let traces = [4, 9].map(|id| {
        let alone = case_of(&[id]);
        moments(&clean(&estimator, &alone), &[1], &alone.gradient).1
    });
    let (clean, pilots) = (clean(&estimator, &both), Allocation::of(&[1, 1]));
    let mut allocations = vec![];
    let means = mean(|| {
        let pilot = clean.estimate_with_seed(21, &pilots, 0).unwrap();
        let roots: Vec<f64> = pilot.second_moments.iter().map(|m| m.sqrt()).collect();
        let rest = Allocation::neyman(&roots, &budget.after_pilots(1).unwrap()).unwrap();
        let estimate = pilot.combine(clean.estimate_with_seed(22, &rest, 0).unwrap(), 1.0 / 3.0);
        let all = rest.with_more(1);
        assert_eq!(estimate.survived, all.counts());
        let mut g = vector(&clean, &estimate);
        assert_close(&[estimate.squared_norm()], &[g.iter().map(|g| g * g).sum()], "squared norm");
        let square = g.iter().zip(&both.gradient).map(|(g, t)| (g - t).powi(2)).sum();
        g.extend([square, estimate.variance_objective(&traces, &all) / 4.0]);
        allocations.push(all);
        g
    });
    allocations.dedup();
    assert!(allocations.len() > 1, "the pilots decide nothing");
    let (mean, variances) = means.split_at(both.gradient.len());
    assert_close(mean, &both.gradient, "pilots");
    assert_close(&variances[..1], &variances[1..], "variance of pilots and the rest");
}
