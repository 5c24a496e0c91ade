//! The contract of every space × law × sampling × allocator, and closed-form statistics.

use super::*;
use crate::allocator::{Allocator, AllocatorKind, AnyAllocator, DatumFeatures};
use crate::budget::QueryBudget;
use crate::noise::device::forced;
use crate::testing::{AB, B, Zoo, ZooBatch, flat, plain, true_gradient, zoo, zoo_batch};
use rand::SeedableRng;
use rand::rngs::StdRng;

/// One line per allocator: the contract runs over it.
const ALLOCATORS: [AllocatorKind; 5] = AllocatorKind::ALL;

/// Samplings and placements; the weights space knows the joint one alone.
const VARIANTS: [(Sampling, Placement); 5] = [
    (Sampling::OneSided, Placement::Joint),
    (Sampling::OneSided, Placement::Single),
    (Sampling::Antithetic, Placement::Joint),
    (Sampling::Antithetic, Placement::Single),
    (Sampling::OneSided, Placement::Staged),
];

fn vector(model: &Zoo<B>, estimate: &Estimate<B>) -> Vec<f64> {
    flat(model, &mut |id, _| estimate.gradients.get(id).map(|g| g.to_data().iter::<f64>().collect()))
}

struct Fixture {
    with_graph: Zoo<AB>,
    model: Zoo<B>,
    trained: Arc<HashSet<ParamId>>,
    batch: ZooBatch<B>,
}

fn fixture(data: usize) -> Fixture {
    let with_graph = zoo(1);
    Fixture {
        model: plain(&with_graph),
        trained: trained_parameters(&with_graph),
        with_graph,
        batch: zoo_batch(data, 2),
    }
}

/// A datum beside which the others are already learnt: the rows' labels are those the model gives, but for the first.
fn uneven() -> Fixture {
    let mut f = fixture(4);
    f.model.head.weight = f.model.head.weight.map(|w| w * 6.0);
    let logits = f.model.forward(f.batch.input.clone(), &mut Probe::clean());
    let named = logits.argmax(1).reshape([4]);
    let wrong: Tensor<B, 1, Int> = (named.clone().narrow(0, 0, 1) + 1).remainder_scalar(3);
    f.batch.target = Tensor::cat(vec![wrong, named.narrow(0, 1, 3)], 0);
    f
}

impl Fixture {
    fn estimates(
        &self,
        estimator: &Estimator,
        n: u64,
        mut allocation: impl FnMut(u64, &[f64]) -> Allocation,
    ) -> Vec<Vec<f64>> {
        let clean = estimator.clean(&self.model, &self.batch, &self.trained).unwrap();
        (0..n)
            .map(|step| {
                let allocation = allocation(step, &clean.losses);
                let e = estimator.estimate(&self.model, &self.batch, &self.trained, &clean, &allocation, step).unwrap();
                assert_eq!(e.dropped, 0);
                vector(&self.model, &e)
            })
            .collect()
    }
}

fn mean_and_variance(samples: &[Vec<f64>]) -> (Vec<f64>, Vec<f64>) {
    let n = samples.len() as f64;
    let dim = samples[0].len();
    let mean: Vec<f64> = (0..dim).map(|i| samples.iter().map(|s| s[i]).sum::<f64>() / n).collect();
    let variance =
        (0..dim).map(|i| samples.iter().map(|s| (s[i] - mean[i]).powi(2)).sum::<f64>() / (n - 1.0)).collect();
    (mean, variance)
}

/// n = 200 estimates of 64 queries each; every coordinate of their mean lies within 5.5 standard errors of autodiff's gradient
/// (69 coordinates × 108 cases: false-failure rate about 10⁻³ for fresh seeds, none for these), and so does the projection on
/// the gradient within 4.5, which a biased scale would miss. At σ = 10⁻² the smoothing bias, O(σ²), is below 10⁻⁴ of the gradient.
#[test]
fn unbiased_for_every_space_law_sampling_and_allocator() {
    // every allocator on the two variants that the recipes use, the default one on the others
    let recipes = [(Sampling::OneSided, Placement::Single), (Sampling::Antithetic, Placement::Joint)];
    unbiased(&Space::ALL, |kind, variant| recipes.contains(&variant) || kind == AllocatorKind::Gaussian);
}

/// The same with noise that the device makes, by the default allocator: 28 cases.
#[test]
fn unbiased_with_noise_of_the_device() {
    let spaces = [Space::Activation, Space::Weights];
    forced::on(|| unbiased(&spaces, |kind, _| kind == AllocatorKind::Gaussian));
}

fn unbiased(spaces: &[Space], takes: impl Fn(AllocatorKind, (Sampling, Placement)) -> bool) {
    let f = fixture(4);
    let target = true_gradient(&f.with_graph, zoo_batch(4, 2));
    let norm = target.iter().map(|g| g * g).sum::<f64>().sqrt();
    let budget = QueryBudget::new(16, 1).unwrap();
    for &space in spaces {
        for noise in NoiseLaw::ALL {
            for (sampling, placement) in VARIANTS {
                if space == Space::Weights && placement != Placement::Joint {
                    continue;
                }
                for kind in ALLOCATORS.into_iter().filter(|&kind| takes(kind, (sampling, placement))) {
                    let name = format!("{space:?} × {noise} × {sampling:?} × {placement:?} × {kind:?}");
                    let estimator =
                        Estimator { noise, sampling, placement, max_rows: 64, seed: 11, ..Estimator::new(space) };
                    let allocator = AnyAllocator::<B>::new(kind, &Default::default()).unwrap();
                    let mut unequal = false;
                    let samples = f.estimates(&estimator, 200, |step, losses| {
                        let mut rng = StdRng::seed_from_u64(step);
                        // variances that have little to do with the true ones: bias must not depend on them
                        let features =
                            DatumFeatures { losses, variances: &[1.0, 30.0, 7.0, 0.1], ..Default::default() };
                        let allocation = allocator.allocate(&features, &budget, &mut rng).unwrap().0;
                        unequal |= allocation.min() < allocation.max();
                        allocation
                    });
                    assert_eq!(unequal, kind != AllocatorKind::Uniform, "{name}");
                    let (mean, variance) = mean_and_variance(&samples);
                    for (i, ((m, v), g)) in mean.iter().zip(&variance).zip(&target).enumerate() {
                        let se = (v / 200.0).sqrt();
                        assert!(
                            (m - g).abs() < 5.5 * se + 1e-4 * norm,
                            "{name}: coordinate {i}: {m} ± {se}, autodiff {g}"
                        );
                    }
                    let along: Vec<Vec<f64>> =
                        samples.iter().map(|s| vec![s.iter().zip(&target).map(|(a, b)| a * b / norm).sum()]).collect();
                    let (m, v) = mean_and_variance(&along);
                    assert!(
                        (m[0] - norm).abs() < 4.5 * (v[0] / 200.0).sqrt(),
                        "{name}: along the gradient {m:?}, not {norm}"
                    );
                }
            }
        }
    }
}

/// The mean stays where it was whatever is predicted, here numbers from nowhere as large as the gradients: n = 200 estimates of
/// 64 queries, unequal allocation, 4 laws × 5 variants, tolerances as above (false-failure rate below 10⁻³).
#[test]
fn unbiased_with_any_control_variate() {
    let f = fixture(4);
    let target = true_gradient(&f.with_graph, zoo_batch(4, 2));
    let norm = target.iter().map(|g| g * g).sum::<f64>().sqrt();
    let allocation = Allocation::project(&[1.0, 30.0, 7.0, 0.1], &QueryBudget::new(16, 1).unwrap()).unwrap();
    for noise in NoiseLaw::ALL {
        for (sampling, placement) in VARIANTS {
            let name = format!("{noise} × {sampling:?} × {placement:?}");
            let estimator =
                Estimator { noise, sampling, placement, max_rows: 64, seed: 12, ..Estimator::new(Space::Activation) };
            let mut clean = estimator.clean(&f.model, &f.batch, &f.trained).unwrap();
            let estimate = |clean: &CleanPass<B, _, _>, step| {
                estimator.estimate(&f.model, &f.batch, &f.trained, clean, &allocation, step).unwrap()
            };
            // the first look tells how wide the sites are
            clean.prediction = Some(Arc::new(Prediction::fixed(vec![1.0; 4], 1, vec![])));
            let widths = estimate(&clean, 0).observed.unwrap().widths();
            let sites = widths
                .iter()
                .map(|&len| (0.7, (0..4 * len).map(|i| 0.4 * (1.7 * i as f32 + len as f32).sin()).collect()));
            clean.prediction = Some(Arc::new(Prediction::fixed(vec![1.0; 4], 1, sites.collect())));
            let samples: Vec<Vec<f64>> = (0..200).map(|step| vector(&f.model, &estimate(&clean, step))).collect();
            let (mean, variance) = mean_and_variance(&samples);
            for (i, ((m, v), g)) in mean.iter().zip(&variance).zip(&target).enumerate() {
                let se = (v / 200.0).sqrt();
                assert!((m - g).abs() < 5.5 * se + 1e-4 * norm, "{name}: coordinate {i}: {m} ± {se}, autodiff {g}");
            }
        }
    }
}

/// Pilots decide the allocation of the rest, and join the estimate with a weight that does not depend on it: n = 400 estimates of 4 pilots and 12
/// more queries per datum, tolerances as above (false-failure rate below 10⁻³).
#[test]
fn unbiased_with_pilots() {
    let f = fixture(4);
    let target = true_gradient(&f.with_graph, zoo_batch(4, 2));
    let norm = target.iter().map(|g| g * g).sum::<f64>().sqrt();
    let (pilots, budget) = (4, QueryBudget::new(16, 1).unwrap());
    let shares = Allocation::uniform(4, &QueryBudget::new(pilots, 1).unwrap());
    for sampling in [Sampling::OneSided, Sampling::Antithetic] {
        let first = Estimator { sampling, seed: 21, ..Estimator::new(Space::Activation) };
        let second = Estimator { seed: 22, ..first.clone() };
        let clean = first.clean(&f.model, &f.batch, &f.trained).unwrap();
        let mut unequal = false;
        let (mut expected, mut squares) = (0.0, 0.0);
        let samples: Vec<Vec<f64>> = (0..400)
            .map(|step| {
                let estimate = |estimator: &Estimator, allocation| {
                    estimator.estimate(&f.model, &f.batch, &f.trained, &clean, allocation, step).unwrap()
                };
                let pilot = estimate(&first, &shares);
                let roots: Vec<f64> = pilot.second_moments.iter().map(|m| m.sqrt()).collect();
                let rest = Allocation::neyman(&roots, &budget.after_pilots(pilots).unwrap()).unwrap();
                unequal |= rest.min() < rest.max();
                let rest_of_it = estimate(&second, &rest);
                // the pilots' own moments decided the allocation: with hindsight they would flatter it
                let fresh = rest_of_it.second_moments.clone();
                let e = pilot.mix(rest_of_it, 0.25);
                assert_eq!(e.survived, rest.clone().with_more(pilots).counts());
                expected += e.proxy(&fresh, &rest.with_more(pilots)) / 16.0;
                let g = vector(&f.model, &e);
                assert!((e.squared_norm() / g.iter().map(|g| g * g).sum::<f64>() - 1.0).abs() < 1e-4);
                squares += g.iter().zip(&target).map(|(g, t)| (g - t).powi(2)).sum::<f64>();
                g
            })
            .collect();
        assert!(unequal);
        let (mean, variance) = mean_and_variance(&samples);
        for (i, ((m, v), g)) in mean.iter().zip(&variance).zip(&target).enumerate() {
            let se = (v / 400.0).sqrt();
            assert!((m - g).abs() < 5.5 * se + 1e-4 * norm, "{sampling:?}: coordinate {i}: {m} ± {se}, autodiff {g}");
        }
        // what the report says of the variance is what is seen, within the tails of 400 squares
        assert!((squares / expected - 1.0).abs() < 0.3, "{sampling:?}: {squares} of {expected}");
    }
}

/// With cheap queries on late sites the budget, counted in whole passes, is met in the mean, and each site gets its share of every datum: n = 300
/// steps of 12 data; the relative standard error of the mean cost is below 0.5 %.
#[test]
fn staged_queries_meet_the_budget_in_passes() {
    let f = fixture(12);
    let estimator = Estimator { placement: Placement::Staged, seed: 4, ..Estimator::new(Space::Activation) };
    let clean = estimator.clean(&f.model, &f.batch, &f.trained).unwrap();
    let (p, costs) = (&clean.site_probabilities, &clean.site_costs);
    assert_eq!((p.len(), costs[0]), (6, 1.0));
    // the head starts behind both stages, the norm and the mix behind the first
    assert!(costs[5] < costs[4] && costs[4] == costs[3] && costs[3] < 1.0, "{costs:?}");
    let sites: Arc<[f64]> = p.clone().into();
    let (mut cost, queries) = (0.0, 24);
    let mut counts = vec![0usize; 6];
    for step in 0..300 {
        let noise = NoiseSource {
            law: NoiseLaw::Rademacher,
            sampling: Sampling::OneSided,
            sigma: 1.0,
            seed: 1,
            step,
            sites: Some(sites.clone()),
            spread: true,
            on_device: false,
        };
        for position in 0..12 {
            let mut own = vec![0usize; 6];
            for q in 0..queries {
                own[noise.chosen(position, q).unwrap()] += 1;
            }
            for (site, &n) in own.iter().enumerate() {
                // 24 queries over six equal sites: four each, or one more or less, never eight or none
                assert!((2..=6).contains(&n), "{own:?}");
                counts[site] += n;
                cost += n as f64 * costs[site];
            }
        }
    }
    let expected = 300.0 * 12.0 * queries as f64 * p.iter().zip(costs).map(|(p, c)| p * c).sum::<f64>();
    assert!((cost / expected - 1.0).abs() < 0.02, "{cost} of {expected}");
    let even = 300.0 * 12.0 * queries as f64 / 6.0;
    assert!(counts.iter().all(|&n| (n as f64 / even - 1.0).abs() < 0.02), "{counts:?}");
}

/// With independent noise E‖ĝ − E ĝ‖² = (1/B²) Σ_j Tr Σ_j/A_j. Tr Σ_j from n = 3,000 single-query estimates of each datum alone, the left
/// side from n = 1,500 estimates; each has a relative standard error of about 3 % (kurtosis of a sum of squares), the tolerance of
/// 12 % is about 3 of both together, for fresh seeds a false-failure rate below 1 % a case.
#[test]
fn variance_follows_the_allocation() {
    let f = uneven();
    let estimator = Estimator { seed: 5, ..Estimator::new(Space::Activation) };
    let one = QueryBudget::new(1, 1).unwrap();
    let traces: Vec<f64> = (0..4)
        .map(|j| {
            let batch =
                Batch { ids: vec![j as u64], input: f.batch.input.rows(&[j]), target: f.batch.target.rows(&[j]) };
            let alone =
                Fixture { batch, with_graph: f.with_graph.clone(), model: f.model.clone(), trained: f.trained.clone() };
            let samples = alone.estimates(&estimator, 3000, |_, _| Allocation::uniform(1, &one));
            mean_and_variance(&samples).1.iter().sum()
        })
        .collect();
    let budget = QueryBudget::new(20, 1).unwrap();
    let roots: Vec<f64> = traces.iter().map(|v| v.sqrt()).collect();
    let neyman = Allocation::neyman(&roots, &budget).unwrap();
    let uniform = Allocation::uniform(4, &budget);
    let skewed = Allocation::project(&[1.0, 3.0, 9.0, 67.0], &budget).unwrap();
    let mut measured = vec![];
    for allocation in [uniform, neyman, skewed] {
        let samples = f.estimates(&estimator, 1500, |_, _| allocation.clone());
        let variance: f64 = mean_and_variance(&samples).1.iter().sum();
        let predicted = crate::allocator::proxy(&traces, &allocation) / 16.0;
        assert!((variance / predicted - 1.0).abs() < 0.12, "{allocation:?}: {variance} against {predicted}");
        measured.push(variance);
    }
    let mean = roots.iter().sum::<f64>() / 4.0;
    let ceiling = 4.0 * mean * mean / traces.iter().sum::<f64>();
    assert!(ceiling < 0.9, "the data must be uneven for this test to say anything: {ceiling}");
    assert!(
        measured[1] / measured[0] < 1.1 * ceiling,
        "Neyman {} of uniform, ceiling {ceiling}",
        measured[1] / measured[0]
    );
}

/// The estimate of E‖ĝ_jq‖² from coefficients and energies agrees with the norms of single-query estimates. n = 4,000; 10 % is about 4
/// standard errors where all sites are perturbed, 20 % where one is (the weights 1/p² make the tails heavier). It takes the squared
/// coefficient and the norm of the noise for independent: exact for signs; otherwise short by a part of 2/(D + 2) for Gaussian
/// noise on D coordinates, which at the three of a site of this network is too much, so that one site alone is tested with signs.
#[test]
fn second_moments_are_those_of_single_queries() {
    let f = fixture(2);
    for noise in NoiseLaw::ALL {
        for (sampling, placement) in VARIANTS {
            if placement != Placement::Joint && noise != NoiseLaw::Rademacher {
                continue;
            }
            let queries = sampling.group();
            let tolerance = if placement == Placement::Joint { 0.1 } else { 0.2 };
            let estimator = Estimator { noise, sampling, placement, seed: 9, ..Estimator::new(Space::Activation) };
            let batch = Batch { ids: vec![1], input: f.batch.input.rows(&[1]), target: f.batch.target.rows(&[1]) };
            let clean = estimator.clean(&f.model, &batch, &f.trained).unwrap();
            let allocation = Allocation::uniform(1, &QueryBudget::new(queries, 1).unwrap());
            let (mut norms, mut moments) = (0.0, 0.0);
            for step in 0..4000 {
                let e = estimator.estimate(&f.model, &batch, &f.trained, &clean, &allocation, step).unwrap();
                // a pair's square counts twice: it took two queries
                norms += queries as f64 * vector(&f.model, &e).iter().map(|g| g * g).sum::<f64>();
                moments += e.second_moments[0];
            }
            let ratio = moments / norms;
            assert!((ratio - 1.0).abs() < tolerance, "{noise} {sampling:?} {placement:?}: {ratio}");
        }
    }
}

fn one(f: &Fixture, estimator: &Estimator) -> Vec<f64> {
    let allocation = Allocation::project(&[1.0, 7.0, 2.0, 30.0, 6.0], &QueryBudget::new(9, 1).unwrap()).unwrap();
    f.estimates(estimator, 1, |_, _| allocation.clone()).remove(0)
}

/// Chunks differ by the rounding of f32 losses alone: one unit in the last place, divided by σ, is 10⁻⁵ of a coefficient at σ = 10⁻², and
/// what is left falls as 1/σ.
#[test]
fn chunks_and_threads_do_not_change_the_result() {
    chunked();
    forced::on(chunked);
}

fn chunked() {
    let f = fixture(5);
    for (sigma, tolerance) in [(0.01, 2e-4), (0.5, 1e-5)] {
        for space in Space::ALL {
            for (sampling, placement) in VARIANTS {
                let whole = Estimator { sampling, placement, sigma, max_rows: 1000, seed: 3, ..Estimator::new(space) };
                let reference = one(&f, &whole);
                let scale = reference.iter().map(|g| g * g).sum::<f64>().sqrt();
                for max_rows in [2, 5, 16] {
                    let chunked = Estimator { max_rows, ..whole.clone() };
                    let g = one(&f, &chunked);
                    let off = g.iter().zip(&reference).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
                    let name = format!("{space:?} {sampling:?} {placement:?} sigma {sigma} max_rows {max_rows}");
                    assert!(off < tolerance * scale, "{name}: {off} of {scale}");
                    for threads in [2, 4] {
                        assert_eq!(one(&f, &Estimator { threads, ..chunked.clone() }), g, "{name}, {threads} threads");
                    }
                }
            }
        }
    }
}

/// Second moments are those of the datum that they are said of, in whatever order the device sums: means over 400 steps, whose relative standard
/// error is below 5 %, against those of the host's noise.
#[test]
fn second_moments_of_the_device_s_noise_are_the_host_s() {
    let f = fixture(4);
    let allocation = Allocation::project(&[1.0, 3.0, 9.0, 2.0], &QueryBudget::new(32, 1).unwrap()).unwrap();
    let estimator = Estimator { placement: Placement::Joint, seed: 8, ..Estimator::new(Space::Activation) };
    let clean = estimator.clean(&f.model, &f.batch, &f.trained).unwrap();
    let moments = || {
        let mut sums = [0.0; 4];
        for step in 0..400 {
            let e = estimator.estimate(&f.model, &f.batch, &f.trained, &clean, &allocation, step).unwrap();
            sums.iter_mut().zip(e.second_moments).for_each(|(sum, m)| *sum += m / 400.0);
        }
        sums
    };
    let (host, device) = (moments(), forced::on(moments));
    for (a, b) in host.iter().zip(&device) {
        assert!((a / b - 1.0).abs() < 0.25, "{host:?} of the host, {device:?} of the device");
    }
    let (least, most) = host.iter().fold((f64::MAX, 0f64), |(l, m), &x| (l.min(x), m.max(x)));
    assert!(most > 2.0 * least, "{host:?} tells no datum from another");
}

#[test]
fn frozen_parameters_have_no_gradient_and_their_stages_run_once() {
    let mut with_graph = zoo(1);
    with_graph.conv = with_graph.conv.no_grad();
    with_graph.table = with_graph.table.no_grad();
    with_graph.cls = with_graph.cls.no_grad();
    with_graph.norm = with_graph.norm.no_grad();
    let f = Fixture {
        model: plain(&with_graph),
        trained: trained_parameters(&with_graph),
        with_graph,
        batch: zoo_batch(5, 2),
    };
    for space in Space::ALL {
        let estimator = Estimator::new(space);
        let clean = estimator.clean(&f.model, &f.batch, &f.trained).unwrap();
        assert!(!clean.stages.frozen().is_empty());
        let allocation = Allocation::uniform(5, &QueryBudget::new(4, 1).unwrap());
        let e = estimator.estimate(&f.model, &f.batch, &f.trained, &clean, &allocation, 0).unwrap();
        assert_eq!(e.gradients.iter().count(), 4);
        assert!(e.gradient(&f.model.conv.weight).is_none());
        assert!(e.gradient(&f.model.mix.weight).is_some());
        // the same numbers as without reuse
        let mut no_prefix = estimator.clean(&f.model, &f.batch, &f.trained).unwrap();
        no_prefix.stages = Stages::default();
        let full = estimator.estimate(&f.model, &f.batch, &f.trained, &no_prefix, &allocation, 0).unwrap();
        let (a, b) = (vector(&f.model, &e), vector(&f.model, &full));
        let scale = b.iter().map(|g| g * g).sum::<f64>().sqrt();
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 2e-4 * scale));
    }
}

#[test]
fn lost_queries_are_dropped_with_their_weight() {
    let estimator = Estimator { sampling: Sampling::Antithetic, sigma: 0.5, ..Estimator::new(Space::Activation) };
    let nan = f64::NAN;
    let w = estimator.weigh(&[vec![2.0, 1.0, nan, 3.0, 1.5], vec![nan, nan], vec![f64::INFINITY]], &[1.0, 1.0, 1.0]);
    // datum 0: the pair (NaN, 3) goes whole; three queries survive: c = 2, 0 and the odd 1, each over B·A_j = 3·3
    assert_eq!(w.weights[0], [2.0 / 9.0, 0.0, 0.0, 0.0, 1.0 / 9.0]);
    assert_eq!((w.survived.clone(), w.dropped), (vec![3, 0, 0], 2 + 2 + 1));
    assert_eq!(w.squares[0], [(0, 4.0, 2), (2, 1.0, 1)]);
    assert_eq!(w.weights[1], [0.0, 0.0]);
    assert!(w.squares[1].is_empty());
}

/// FZOO's step: the gradient over the spread of the losses, so that its length no longer depends on their scale.
#[test]
fn the_spread_of_the_losses_is_that_of_the_directions() {
    assert_eq!(loss_spread(&[vec![1.0, 3.0, 5.0], vec![3.0, 5.0, 7.0]], &[0.0, 2.0]), 2.0);
    // data that have fewer queries change nothing but their number
    assert_eq!(loss_spread(&[vec![1.0, 3.0], vec![7.0, 9.0], vec![5.0]], &[0.0, 6.0, 4.0]), 2f64.sqrt());
    assert_eq!(loss_spread(&[vec![1.0, f64::NAN], vec![3.0]], &[0.0, 0.0]), 0.0);
    let f = fixture(4);
    let estimator = Estimator { sigma: 1e-3, ..Estimator::new(Space::Weights) };
    let clean = estimator.clean(&f.model, &f.batch, &f.trained).unwrap();
    let allocation = Allocation::uniform(4, &QueryBudget::new(8, 1).unwrap());
    let mut e = estimator.estimate(&f.model, &f.batch, &f.trained, &clean, &allocation, 0).unwrap();
    let (before, by) = (e.squared_norm().sqrt(), e.loss_spread);
    e.normalise(1e-3);
    assert!((e.squared_norm().sqrt() / (before * 1e-3 / by) - 1.0).abs() < 1e-4);
}

#[test]
fn unusable_settings_are_named() {
    for (estimator, name) in [
        (Estimator { sigma: 0.0, ..Estimator::new(Space::Weights) }, "sigma"),
        (Estimator { sigma: f64::NAN, ..Estimator::new(Space::Weights) }, "sigma"),
        (Estimator { sigma: -1.0, ..Estimator::new(Space::Weights) }, "sigma"),
        (Estimator { max_rows: 1, ..Estimator::new(Space::Weights) }, "max_rows"),
        (Estimator { threads: 0, ..Estimator::new(Space::Weights) }, "threads"),
        (Estimator::new(Space::LowRank(0)), "rank"),
    ] {
        assert!(estimator.validate().unwrap_err().to_string().contains(name));
    }
}

/// A model that calls no layer through the probe.
#[derive(Module, Debug)]
struct Plain<B: Backend> {
    fc: burn::nn::Linear<B>,
}

impl<B: Backend> ForwardModel<B> for Plain<B> {
    type Input = Tensor<B, 2>;
    type Target = ();
    type Output = Tensor<B, 2>;
    fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        probe.stage(x, |x, _| self.fc.forward(x))
    }
    fn losses(&self, y: Tensor<B, 2>, (): ()) -> Tensor<B, 1> {
        y.powi_scalar(2).sum_dim(1).squeeze_dim(1)
    }
}

#[test]
fn a_model_without_sites_trains_in_the_weights_space_alone() {
    use burn::module::AutodiffModule;
    let device = Default::default();
    let with_graph = Plain::<AB> { fc: burn::nn::LinearConfig::new(3, 2).init(&device) };
    let trained = trained_parameters(&with_graph);
    let model = with_graph.valid();
    let batch = Batch { ids: vec![0, 1], input: Tensor::<B, 2>::ones([2, 3], &device), target: () };
    let allocation = Allocation::uniform(2, &QueryBudget::new(4, 1).unwrap());
    let estimate = |space, trained| {
        let estimator = Estimator::new(space);
        let clean = estimator.clean(&model, &batch, trained).unwrap();
        estimator.estimate(&model, &batch, trained, &clean, &allocation, 0)
    };
    let e = estimate(Space::Weights, &trained).unwrap();
    assert!(e.gradient(&model.fc.weight).unwrap().abs().sum().into_scalar() > 0.0);
    for space in [Space::Activation, Space::LowRank(1)] {
        assert!(matches!(estimate(space, &trained), Err(Error::NotSites { missed: 2, trained: 2 })));
    }
    assert!(matches!(estimate(Space::Weights, &Arc::default()), Err(Error::NothingTrained)));
}

/// A width that is not known limits nothing, and no width asks for more rows than are allowed.
#[test]
fn passes_are_no_wider_than_the_cache() {
    let widest = 65 * 512;
    assert_eq!(
        [0, 1, widest, 1 << 19, 1 << 30].map(|width| cached_rows(width, 256)),
        [256, 256, 31, MIN_ROWS, MIN_ROWS]
    );
    assert_eq!([0, 1, widest, 1 << 30].map(|width| cached_rows(width, 2)), [2; 4]);
}

/// What is split into passes of at most so many rows lies in passes of nearly as many each.
#[test]
fn passes_have_as_many_rows_each() {
    assert_eq!([(64, 31), (32, 31), (5, 8), (1, 1), (0, 4)].map(|(rows, most)| even(rows, most)), [22, 16, 5, 1, 1]);
}
