//! Steps of a learner over every outcome of their draws.

use burn::module::{AutodiffModule, Module};
use burn::optim::SgdConfig;
use burn::prelude::*;
use burn::train::TrainStep;

use crate::allocator::{AllocatorKind, AnyAllocator, QueryBudget};
use crate::estimator::Space;
use crate::model::ForwardModel;
use crate::noise::Placement;
use crate::noise::script::mean;
use crate::probe::Probe;
use crate::testing::pair::{Pair, assert_close, case, pair, pair_batch};
use crate::testing::{AB, B, flat};
use crate::train::*;
use crate::variance::VarianceSource;

type Learner = ForwardLearner<AB, Pair<AB>, AnyAllocator<AB>>;

fn learner(model: Pair<AB>, space: Space, queries: usize, variance: VarianceSource) -> Learner {
    let config = ForwardConfig::new(QueryBudget::new(queries, 1).unwrap()).with_seed(3).with_sigma(0.5);
    let config = config.with_space(space).with_variance(variance);
    let allocator = AnyAllocator::new(AllocatorKind::Neyman, &Default::default()).unwrap();
    ForwardLearner::new(model, allocator, config).unwrap()
}

fn activation(placement: Placement) -> Space {
    Space::activation().with_placement(placement).unwrap()
}

/// The gradients of a step; nothing is left for an update.
fn step(learner: &Learner, ids: &[u64], inputs: usize) -> Vec<f64> {
    let output = TrainStep::step(learner, pair_batch::<B>(ids, inputs));
    learner.pending.drain();
    flat(&learner.model.valid(), &mut |id, _| {
        output.grads.get::<B, 2>(id).map(|g| g.into_data().iter::<f64>().collect())
    })
}

/// The allocations of the steps since the last call, without repetitions in a row.
fn allocations(learner: &Learner) -> Vec<Vec<usize>> {
    let counts = |report: &StepReport| report.data.iter().map(|d| d.queries).collect::<Vec<_>>();
    let mut all: Vec<_> = learner.monitor().take_reports().iter().map(counts).collect();
    all.dedup();
    all
}

/// The pilots' losses decide how many queries follow, and their share P/A₀ in the gradient does
/// not depend on it: the mean is the gradient.
#[test]
fn pilots_of_a_learner_leave_the_mean() {
    for second in [false, true] {
        // one layer alone is trained, so that all patterns can be tried
        let (mut model, space) = (pair(1, false), activation(Placement::Joint));
        let frozen = if second { &mut model.first } else { &mut model.second };
        *frozen = frozen.clone().no_grad();
        let queries = if second { 3 } else { 2 };
        let (case, learner) = (case(&model, &[4, 9]), learner(model, space, queries, VarianceSource::Pilot(1)));
        let gradient = mean(|| step(&learner, &[4, 9], 1));
        assert!(learner.monitor().error().is_none());
        assert_eq!(allocations(&learner).len() > 1, second, "the pilots decide where there is a choice");
        assert_close(&gradient, &case.gradient, &format!("second layer {second}"));
    }
}

/// The mean is the gradient with the allocation that the learner's own allocator makes.
#[test]
fn unequal_allocations_of_a_learner_leave_the_mean() {
    let (model, space) = (pair(1, false), activation(Placement::Single));
    let (case, learner) = (case(&model, &[0, 2]), learner(model, space, 2, VarianceSource::Loss));
    let gradient = mean(|| step(&learner, &[0, 2], 1));
    let counts = allocations(&learner);
    assert!(counts.len() == 1 && counts[0][0] != counts[0][1], "{counts:?}");
    assert_close(&gradient, &case.gradient, "unequal counts");
}

/// E[ĝ₀ĝ₁ᵀ] = g gᵀ for two steps on one batch, with an update of rate 0 between them.
#[test]
fn steps_of_a_learner_draw_independent_noise() {
    for placement in [Placement::Joint, Placement::Single] {
        let model = pair(1, false);
        let (case, learner) = (case(&model, &[2]), learner(model, activation(placement), 1, VarianceSource::Loss));
        let products = mean(|| {
            let first = step(&learner, &[2], 1);
            let output = TrainStep::step(&learner, pair_batch::<B>(&[2], 1));
            let next = learner.clone().optimize::<AB, _>(&mut SgdConfig::new().init(), 0.0, output.grads);
            assert_eq!(next.state().step, 1);
            let second = step(&next, &[2], 1);
            first.iter().flat_map(|a| second.iter().map(move |b| a * b)).collect()
        });
        let g = &case.gradient;
        let expected: Vec<f64> = g.iter().flat_map(|a| g.iter().map(move |b| a * b)).collect();
        assert_close(&products, &expected, &placement.to_string());
    }
}

/// The share of a site in the queries of a step is its closed form, from the moments of earlier
/// steps and the costs of the sites.
///
/// The layers make 4 and 2 products, and a query on the second one starts behind the first.
#[test]
fn sites_are_drawn_by_moment_and_cost() {
    for (placement, cost) in [(Placement::Single, 1.0), (Placement::CostWeighted, 2.0 / 6.0)] {
        let make = |queries| learner(pair(2, true), activation(placement), queries, VarianceSource::Loss);
        let mut trained = make(4);
        for _ in 0..3 {
            let output = TrainStep::step(&trained, pair_batch::<B>(&[0, 1, 2], 2));
            trained = trained.optimize::<AB, _>(&mut SgdConfig::new().init(), 0.0, output.grads);
        }
        let moments = trained.state().sites.moments();
        let roots = [moments[0].sqrt(), (moments[1] / cost).sqrt()];
        let expected = roots.map(|root| 0.1 + 0.8 * root / (roots[0] + roots[1]));
        assert!((expected[0] - 0.5).abs() > 0.05, "the sites differ: {expected:?}");
        let learner = make(1).load_record(trained.into_record());
        let shares = mean(|| {
            let _ = TrainStep::step(&learner, pair_batch::<B>(&[1], 2));
            let pending = learner.pending.drain().pop().unwrap();
            let queries: u64 = pending.site_moments.iter().map(|site| site.queries).sum();
            pending.site_moments.iter().map(|site| site.queries as f64 / queries as f64).collect()
        });
        assert_close(&shares, &expected, &placement.to_string());
    }
}

/// The budget counts whole passes. In the first step the sites are equally likely, and a query costs
/// 1/2 + 1/2·1/3 of a pass.
#[test]
fn a_budget_buys_more_queries_where_they_cost_less() {
    for (placement, each) in [(Placement::Joint, 4), (Placement::Single, 4), (Placement::CostWeighted, 6)] {
        let learner = learner(pair(2, true), activation(placement), 4, VarianceSource::Loss);
        let _ = TrainStep::step(&learner, pair_batch::<B>(&[0, 1, 2], 2));
        assert_eq!(learner.monitor().take_reports()[0].queries, 3 * each, "{placement}");
    }
}

/// A report's variance is that of the estimate: with P pilots of A₀ queries, (1/B²) Σ v_j (w²/P +
/// (1 − w)²/(A_j − P)) with w = P/A₀, and (1/B²) Σ v_j/A_j without.
#[test]
fn reports_have_the_loss_and_the_variance_of_their_examples() {
    for (source, pilots, weight) in [(VarianceSource::Loss, 0.0, 0.0f64), (VarianceSource::Pilot(2), 2.0, 0.4)] {
        let learner = learner(pair(2, true), activation(Placement::Joint), 5, source);
        let _ = TrainStep::step(&learner, pair_batch::<B>(&[0, 1, 2], 2));
        let report = learner.monitor().take_reports().remove(0);
        let of_pilots = if pilots > 0.0 { weight * weight / pilots } else { 0.0 };
        let share = |queries: usize| of_pilots + (1.0 - weight).powi(2) / (queries as f64 - pilots);
        let variance = report.data.iter().map(|d| d.second_moment * share(d.queries)).sum::<f64>() / 9.0;
        assert!((report.variance / variance - 1.0).abs() < 1e-12, "{source}: {}, not {variance}", report.variance);
        let loss = report.data.iter().map(|d| d.loss).sum::<f64>() / 3.0;
        assert!((report.loss - loss).abs() < 1e-12, "{source}: {}, not {loss}", report.loss);
    }
}

/// What is learned of an example's variance stays with its id when the batch is in another order.
///
/// All losses are alike, so that ids alone tell the examples apart. Example 10 has no gradient: its
/// queries do not change its loss, and the next step gives it fewest. The seed is fixed.
#[test]
fn variances_are_learned_under_the_id_of_the_example() {
    let model: Pair<B> = pair(2, true).valid();
    let batch = |ids: &[u64]| {
        let mut batch = pair_batch::<B>(ids, 2);
        let (targets, _, offsets) = batch.target.clone();
        let flags: Vec<f32> = ids.iter().map(|&id| f32::from(id != 10)).collect();
        let weights = Tensor::from_floats(flags.as_slice(), &Default::default());
        let output = model.forward(batch.input.clone(), &mut Probe::clean());
        let losses = model.losses(output, (targets.clone(), weights.clone(), offsets));
        batch.target = (targets, weights, losses.neg() + 5.0);
        batch
    };
    let mut learner = learner(pair(2, true), activation(Placement::Joint), 20, VarianceSource::Running);
    for _ in 0..3 {
        let output = TrainStep::step(&learner, batch(&[30, 10, 20]));
        learner = learner.optimize::<AB, _>(&mut SgdConfig::new().init(), 0.0, output.grads);
    }
    let _ = TrainStep::step(&learner, batch(&[10, 20, 30]));
    let reports = learner.monitor().take_reports();
    assert!(reports.iter().flat_map(|r| &r.data).all(|d| (d.loss - 5.0).abs() < 1e-5), "{reports:?}");
    let [none, second, third] = [0, 1, 2].map(|j| reports[3].data[j].queries);
    assert!(none + 3 < second.min(third), "{none} queries for id 10, {second} and {third} for the others");
}
