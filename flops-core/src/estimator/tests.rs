//! The contract of every space × law × sampling × allocator, and statistics in closed form.

use std::collections::HashSet;
use std::sync::Arc;

use burn::module::{Module, ParamId};
use burn::prelude::*;

use super::leaves::LeafStages;
use super::*;
use crate::allocator::{Allocation, Allocator, AllocatorKind, AnyAllocator, DatumFeatures, QueryBudget, Shown};
use crate::batch::{Batch, Rows};
use crate::error::Error;
use crate::model::ForwardModel;
use crate::noise::{NoiseLaw, NoiseSource, Placement, Sampling};
use crate::noise::{forced, source};
use crate::parallel::balanced_chunk;
use crate::probe::Probe;
use crate::testing::{AB, B, Zoo, ZooBatch, flat, plain, true_gradient, zoo, zoo_batch};
use rand::SeedableRng;
use rand::rngs::StdRng;

/// One line per allocator: the contract runs over it.
const ALLOCATORS: [AllocatorKind; 5] = AllocatorKind::ALL;

/// Samplings and placements. The weight space has no placement: it counts as joint.
const VARIANTS: [(Sampling, Placement); 5] = [
    (Sampling::OneSided, Placement::Joint),
    (Sampling::OneSided, Placement::Single),
    (Sampling::Antithetic, Placement::Joint),
    (Sampling::Antithetic, Placement::Single),
    (Sampling::OneSided, Placement::CostWeighted),
];

/// Activation noise with this placement and the learned control variate.
fn activation(placement: Placement) -> Space {
    Space::activation().with_placement(placement).unwrap()
}

/// The space with this placement; the weight space has none.
fn placed(space: Space, placement: Placement) -> Space {
    space.with_placement(placement).unwrap_or(space)
}

/// Weight noise in a subspace of each kind, another one in every step.
pub(super) fn subspaces() -> [Space; 2] {
    [Subspace::Random { rank: 2, period: 1 }, Subspace::Orthonormal { rank: 1, period: 1 }]
        .map(|subspace| Space::weights().with_subspace(subspace).unwrap())
}

/// The gradients of all parameters, in the order of the model's fields.
fn vector<M: Module<B>>(model: &M, estimate: &Estimate<B>) -> Vec<f64> {
    flat(model, &mut |id, _| estimate.gradients.get(id).map(|g| g.to_data().iter::<f64>().collect()))
}

/// Losses, second moments and gradients of an estimate.
pub(super) fn figures_of<M: ForwardModel<B>>(
    clean: &CleanPass<'_, B, M>,
    allocation: &Allocation,
    step: u64,
) -> [Vec<f64>; 3] {
    let estimate = clean.estimate(allocation, step).unwrap();
    [clean.losses.clone(), estimate.second_moments.clone(), vector(clean.model, &estimate)]
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
                let e = clean.estimate(&allocation, step).unwrap();
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

/// The mean of n = 200 estimates of 64 queries each is autodiff's gradient.
///
/// Every coordinate of the mean lies within 5.5 standard errors of the gradient. The projection on
/// the gradient lies within 4.5, which a biased scale would miss. There are 66 coordinates and 32
/// cases a law. The false-failure rate is about 10⁻³ for fresh seeds, and zero for these. At σ =
/// 10⁻² the smoothing bias, O(σ²), is below 10⁻⁴ of the gradient.
///
/// A wrong scale shows from 13 to 25 % on, by the law and the space. `exact.rs` sees any bias, for
/// signs and a quadratic loss; this test is for the other laws, layers and allocators.
#[test]
fn unbiased_for_every_space_law_sampling_and_allocator() {
    // every allocator on the two variants that the recipes use, the default one on the others
    let recipes = [(Sampling::OneSided, Placement::Single), (Sampling::Antithetic, Placement::Joint)];
    let cases = unbiased(&Space::ALL, |kind, variant| recipes.contains(&variant) || kind == AllocatorKind::Gaussian);
    assert_eq!(cases, 32 * NoiseLaw::ALL.len());
}

/// The same with noise that the device makes and the default allocator, in 7 cases a law.
#[test]
fn unbiased_with_noise_of_the_device() {
    let spaces = [Space::activation(), Space::weights()];
    let cases = forced::on(|| unbiased(&spaces, |kind, _| kind == AllocatorKind::Gaussian));
    assert_eq!(cases, 7 * NoiseLaw::ALL.len());
}

/// Checks the cases that `takes` picks, and returns their number.
pub(super) fn unbiased(spaces: &[Space], takes: impl Fn(AllocatorKind, (Sampling, Placement)) -> bool) -> usize {
    let (f, mut cases) = (fixture(4), 0);
    let target = true_gradient(&f.with_graph, zoo_batch(4, 2));
    assert_eq!(target.len(), 66);
    let norm = target.iter().map(|g| g * g).sum::<f64>().sqrt();
    let budget = QueryBudget::new(16, 1).unwrap();
    for &space in spaces {
        for noise in NoiseLaw::ALL {
            for (sampling, placement) in VARIANTS {
                if !space.is_independent() && placement != Placement::Joint {
                    continue;
                }
                for kind in ALLOCATORS.into_iter().filter(|&kind| takes(kind, (sampling, placement))) {
                    cases += 1;
                    let name = format!("{space} × {noise} × {sampling} × {placement} × {kind}");
                    let space = placed(space, placement);
                    let estimator = Estimator { noise, sampling, max_rows: 64, seed: 11, ..Estimator::new(space) };
                    let mut allocator = Some(AnyAllocator::<B>::new(kind, &Default::default()).unwrap());
                    let mut unequal = false;
                    let samples = f.estimates(&estimator, 200, |step, losses| {
                        let mut rng = StdRng::seed_from_u64(step);
                        // variances unlike the true ones: no bias may depend on them
                        let variances = [1.0, 30.0, 7.0, 0.1];
                        let features = DatumFeatures { losses, variances: &variances, ..Default::default() };
                        let learned = allocator.take().unwrap();
                        let (allocation, update) = learned.allocate(&features, &budget, &mut rng).unwrap();
                        allocator = Some(learned.apply(update, &Shown::new(&variances)));
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
    cases
}

/// A budget of whole passes is met on average, and each site gets its share of every example.
///
/// Queries on late sites are cheap. n = 300 steps of 12 examples; the relative standard error of
/// the mean cost is below 0.5 %.
#[test]
fn cost_weighted_queries_meet_the_budget_in_passes() {
    let f = fixture(12);
    let estimator = Estimator { seed: 4, ..Estimator::new(activation(Placement::CostWeighted)) };
    let clean = estimator.clean(&f.model, &f.batch, &f.trained).unwrap();
    let (p, costs) = (clean.site_probabilities(), clean.site_costs());
    assert_eq!((p.len(), costs[0]), (6, 1.0));
    // the head starts behind both stages, the norm and the mix behind the first
    assert!(costs[5] < costs[4] && costs[4] == costs[3] && costs[3] < 1.0, "{costs:?}");
    let sites: Arc<[f64]> = p.into();
    let (mut cost, queries) = (0.0, 24);
    let mut counts = vec![0usize; 6];
    for step in 0..300 {
        let source = source(NoiseLaw::Rademacher, Sampling::OneSided);
        let noise = NoiseSource { seed: 1, step, sites: Some(sites.clone()), spread: true, ..source };
        for position in 0..12 {
            let mut own = vec![0usize; 6];
            for q in 0..queries {
                own[noise.chosen(position, q).unwrap()] += 1;
            }
            for (site, &n) in own.iter().enumerate() {
                // 24 queries over six equal sites: about four each, never none
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

/// Second moments from coefficients and squared score norms match the norms of single-query
/// estimates, for the laws whose squares are not constant.
///
/// Signs have an exact test (`second_moments_are_those_of_single_queries`). n = 4,000; 10 % is about
/// 4 standard errors. Noise falls on all sites: the formula takes the squared coefficient and the
/// norm of the noise for independent. For Gaussian noise on D coordinates it is short by a part of
/// 2/(D + 2), too much for the three coordinates of a single site here.
#[test]
fn second_moments_of_every_law_match_single_queries() {
    let f = fixture(2);
    for noise in NoiseLaw::ALL.into_iter().filter(|&law| law != NoiseLaw::Rademacher) {
        for sampling in [Sampling::OneSided, Sampling::Antithetic] {
            let queries = sampling.group();
            let estimator = Estimator { noise, sampling, seed: 9, ..Estimator::new(activation(Placement::Joint)) };
            let batch = Batch { ids: vec![1], input: f.batch.input.rows(&[1]), target: f.batch.target.rows(&[1]) };
            let clean = estimator.clean(&f.model, &batch, &f.trained).unwrap();
            let allocation = Allocation::uniform(1, &QueryBudget::new(queries, 1).unwrap());
            let (mut norms, mut moments) = (0.0, 0.0);
            for step in 0..4000 {
                let e = clean.estimate(&allocation, step).unwrap();
                // a pair's square counts twice: it took two queries
                norms += queries as f64 * vector(&f.model, &e).iter().map(|g| g * g).sum::<f64>();
                moments += e.second_moments[0];
            }
            let ratio = moments / norms;
            assert!((ratio - 1.0).abs() < 0.1, "{noise} {sampling}: {ratio}");
        }
    }
}

fn one(f: &Fixture, estimator: &Estimator) -> Vec<f64> {
    let allocation = Allocation::project(&[1.0, 7.0, 2.0, 30.0, 6.0], &QueryBudget::new(9, 1).unwrap()).unwrap();
    f.estimates(estimator, 1, |_, _| allocation.clone()).remove(0)
}

/// Chunks change the result by the rounding of f32 losses alone.
///
/// One unit in the last place, divided by σ, is 10⁻⁵ of a coefficient at σ = 10⁻². It falls as 1/σ.
#[test]
fn chunks_and_threads_do_not_change_the_result() {
    chunked();
    forced::on(chunked);
}

fn chunked() {
    let f = fixture(5);
    for (sigma, tolerance) in [(0.01, 2e-4), (0.5, 1e-5)] {
        for space in Space::ALL.into_iter().chain(subspaces()) {
            for (sampling, placement) in VARIANTS {
                let space = placed(space, placement);
                let whole = Estimator { sampling, sigma, max_rows: 1000, seed: 3, ..Estimator::new(space) };
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

/// Second moments belong to their example, in whatever order the device sums.
///
/// Means over 400 steps, with a relative standard error below 5 %, are compared with the host's.
#[test]
fn second_moments_of_device_noise_match_the_host() {
    let f = fixture(4);
    let allocation = Allocation::project(&[1.0, 3.0, 9.0, 2.0], &QueryBudget::new(32, 1).unwrap()).unwrap();
    let estimator = Estimator { seed: 8, ..Estimator::new(activation(Placement::Joint)) };
    let clean = estimator.clean(&f.model, &f.batch, &f.trained).unwrap();
    let moments = || {
        let mut sums = [0.0; 4];
        for step in 0..400 {
            let e = clean.estimate(&allocation, step).unwrap();
            sums.iter_mut().zip(e.second_moments).for_each(|(sum, m)| *sum += m / 400.0);
        }
        sums
    };
    let (host, device) = (moments(), forced::on(moments));
    for (a, b) in host.iter().zip(&device) {
        assert!((a / b - 1.0).abs() < 0.25, "{host:?} of the host, {device:?} of the device");
    }
    let (least, most) = host.iter().fold((f64::MAX, 0f64), |(l, m), &x| (l.min(x), m.max(x)));
    assert!(most > 2.0 * least, "{host:?} does not tell the examples apart");
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
        assert!(!clean.stages.any().frozen().is_empty());
        let allocation = Allocation::uniform(5, &QueryBudget::new(4, 1).unwrap());
        let e = clean.estimate(&allocation, 0).unwrap();
        assert_eq!(e.gradients.iter().count(), 4);
        assert!(e.gradient(&f.model.conv.weight).is_none());
        assert!(e.gradient(&f.model.mix.weight).is_some());
        // the same values as without reuse
        let mut no_prefix = estimator.clean(&f.model, &f.batch, &f.trained).unwrap();
        no_prefix.stages = LeafStages::nowhere(5, 1);
        let full = no_prefix.estimate(&allocation, 0).unwrap();
        let (a, b) = (vector(&f.model, &e), vector(&f.model, &full));
        let scale = b.iter().map(|g| g * g).sum::<f64>().sqrt();
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 2e-4 * scale));
    }
}

/// FZOO's step: the gradient over the spread of the losses.
#[test]
fn normalising_divides_by_the_loss_spread() {
    let f = fixture(4);
    let estimator = Estimator { sigma: 1e-3, ..Estimator::new(Space::weights()) };
    let clean = estimator.clean(&f.model, &f.batch, &f.trained).unwrap();
    let allocation = Allocation::uniform(4, &QueryBudget::new(8, 1).unwrap());
    let mut e = clean.estimate(&allocation, 0).unwrap();
    let (before, by) = (e.squared_norm().sqrt(), e.loss_spread);
    e.normalise(1e-3);
    assert!((e.squared_norm().sqrt() / (before * 1e-3 / by) - 1.0).abs() < 1e-4);
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
        clean.estimate(&allocation, 0)
    };
    let e = estimate(Space::weights(), &trained).unwrap();
    assert!(e.gradient(&model.fc.weight).unwrap().abs().sum().into_scalar() > 0.0);
    for space in [Space::activation(), Space::low_rank(1)] {
        match estimate(space, &trained) {
            Err(Error::NotSites { missed: 2, trained: 2, paths }) => {
                assert_eq!(paths, "model.fc.weight, model.fc.bias");
            }
            _ => panic!("{space}"),
        }
    }
    assert!(matches!(estimate(Space::weights(), &Arc::default()), Err(Error::NothingTrained)));
}

/// A layer, and a bias behind it that is not called through the probe.
#[derive(Module, Debug)]
struct Biased<B: Backend> {
    fc: burn::nn::Linear<B>,
    bias: burn::module::Param<Tensor<B, 1>>,
    /// Parameters whose gradient the model gives: ones.
    #[module(skip)]
    exact: Vec<ParamId>,
    #[module(skip)]
    fails: bool,
}

impl<B: Backend> ForwardModel<B> for Biased<B> {
    type Input = Tensor<B, 2>;
    type Target = ();
    type Output = Tensor<B, 2>;
    fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        probe.linear(&self.fc, x) + self.bias.val().unsqueeze()
    }
    fn losses(&self, y: Tensor<B, 2>, (): ()) -> Tensor<B, 1> {
        y.powi_scalar(2).sum_dim(1).squeeze_dim(1)
    }
    fn exact_gradients(&self, y: &Tensor<B, 2>, (): &()) -> Vec<(ParamId, Tensor<B, 1>)> {
        self.exact.iter().map(|&id| (id, Tensor::ones([2], &y.device()))).collect()
    }
    fn failure(&self) -> Option<String> {
        self.fails.then(|| "no answer".into())
    }
}

/// The estimate of a [`Biased`] that gives the gradients of these of its two biases.
fn biased(space: Space, exact: [bool; 2], fails: bool) -> Result<(Biased<B>, Estimate<B>), Error> {
    use burn::module::AutodiffModule;
    let device = Default::default();
    let fc = burn::nn::LinearConfig::new(3, 2).init(&device);
    let bias = burn::module::Param::from_tensor(Tensor::<AB, 1>::ones([2], &device).require_grad());
    let mut with_graph = Biased { fc, bias, exact: vec![], fails };
    let ids = [with_graph.fc.bias.as_ref().unwrap().id, with_graph.bias.id];
    with_graph.exact = ids.into_iter().zip(exact).filter_map(|(id, exact)| exact.then_some(id)).collect();
    let (trained, model) = (trained_parameters(&with_graph), with_graph.valid());
    let batch = Batch { ids: vec![0, 1], input: Tensor::<B, 2>::ones([2, 3], &device), target: () };
    let estimator = Estimator::new(space);
    let clean = estimator.clean(&model, &batch, &trained)?;
    let estimate = clean.estimate(&Allocation::uniform(2, &QueryBudget::new(4, 1).unwrap()), 0)?;
    Ok((model.clone(), estimate))
}

/// A gradient in closed form is taken as it is, and its parameter need not be a site.
#[test]
fn gradients_in_closed_form_are_not_estimated() {
    for space in Space::ALL {
        let (model, estimate) = biased(space, [false, true], false).unwrap();
        let values = |gradient: Option<Tensor<B, 1>>| gradient.unwrap().into_data().to_vec::<f32>().unwrap();
        assert_eq!(values(estimate.gradient(&model.bias)), [1.0; 2], "{space}");
        assert_ne!(values(estimate.gradient(model.fc.bias.as_ref().unwrap())), [1.0; 2], "{space}");
        assert!(estimate.gradient(&model.fc.weight).is_some(), "{space}");
        // that of a site would be the sum of both
        let told = biased(space, [true, true], false).err();
        assert_eq!(told, Some(Error::ExactSites { paths: "model.fc.bias".into(), count: 1 }), "{space}");
    }
}

/// Of several parameters, those that no site has are named alone.
#[test]
fn a_parameter_that_is_no_site_is_named() {
    for space in Space::ALL.into_iter().filter(|space| space.is_independent()) {
        let told = biased(space, [false; 2], false).err();
        assert_eq!(told, Some(Error::NotSites { paths: "model.bias".into(), missed: 1, trained: 3 }), "{space}");
    }
}

#[test]
fn a_model_that_cannot_answer_says_why() {
    for space in Space::ALL {
        assert_eq!(biased(space, [false, true], true).err(), Some(Error::Model { why: "no answer".into() }), "{space}");
    }
}

#[test]
fn every_site_needs_a_probability() {
    let (f, estimator) = (fixture(2), Estimator::new(Space::activation()));
    let mut clean = estimator.clean(&f.model, &f.batch, &f.trained).unwrap();
    let given = [0.5, 0.1, 0.1, 0.1, 0.1, 0.1];
    clean.set_site_probabilities(given.to_vec()).unwrap();
    for (index, bad) in [0.0, -0.1, 1.1, f64::NAN].into_iter().enumerate() {
        let mut probabilities = given.to_vec();
        probabilities[index] = bad;
        let told = clean.set_site_probabilities(probabilities);
        assert!(matches!(told, Err(Error::Value { index: at, .. }) if at == index), "{told:?}");
    }
    let told = clean.set_site_probabilities(vec![0.2; 5]);
    assert_eq!(told, Err(Error::Length { name: "site probabilities", got: 5, expected: 6 }));
    assert_eq!(clean.site_probabilities(), given, "what is refused changes nothing");
}

/// The update records each example once, in five jobs, in three and in one.
#[test]
fn the_cost_of_an_update_is_a_row_for_each_example() {
    let f = fixture(5);
    for max_rows in [2, 32, 256] {
        let estimator = Estimator { max_rows, ..Estimator::new(Space::activation()) };
        let clean = estimator.clean(&f.model, &f.batch, &f.trained).unwrap();
        let estimate = clean.estimate(&Allocation::uniform(5, &QueryBudget::new(4, 1).unwrap()), 0).unwrap();
        assert_eq!((estimate.queries.rows, estimate.update.rows, clean.cost.rows), (20, 5, 5));
    }
}

/// Passes of a split batch have nearly equally many rows.
#[test]
fn passes_have_as_many_rows_each() {
    assert_eq!(
        [(64, 31), (32, 31), (5, 8), (1, 1), (0, 4)].map(|(rows, most)| balanced_chunk(rows, most)),
        [22, 16, 5, 1, 1]
    );
}
