//! Several workers end every step on the bits of one.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::module::{AutodiffModule, Module};
use burn::nn::{Linear, LinearConfig};
use burn::optim::SgdConfig;
use burn::prelude::*;
use burn::train::TrainStep;

use crate::allocator::{AllocatorKind, AnyAllocator, QueryBudget, Uniform};
use crate::batch::Batch;
use crate::control_variate::GradientEstimate;
use crate::devices::Devices;
use crate::error::Error;
use crate::estimator::Space;
use crate::executor::{Executor, ExecutorError, Threads};
use crate::model::ForwardModel;
use crate::noise::Placement;
use crate::probe::Probe;
use crate::recipe::Recipe;
use crate::testing::gang::{Deal, on_workers};
use crate::testing::{AB, B, Zoo, padded_batch, weights, zoo};
use crate::train::*;
use crate::variance::VarianceSource;

type Learner = ForwardLearner<AB, Zoo<AB>, AnyAllocator<AB>>;

/// What a run ends with: θ, λ, losses and reports of all steps, the state without its seconds.
type Outcome = (Vec<f64>, Vec<f64>, Vec<String>, String);

/// Debug output without the ids of parameters, which differ from process to process.
fn without_ids(text: &str) -> String {
    let mut parts = text.split("parameter: ");
    let first = parts.next().unwrap_or_default().to_string();
    parts.fold(first, |text, part| text + part.trim_start_matches(|c: char| c.is_ascii_digit()))
}

/// Like `assert_eq!`, without printing thousands of numbers.
fn assert_same(found: &Outcome, expected: &Outcome, what: &str) {
    assert!(found.0 == expected.0, "{what}: the weights differ");
    assert!(found.1 == expected.1, "{what}: the allocators differ");
    for (found, expected) in found.2.iter().zip(&expected.2) {
        assert!(found == expected, "{what}: {found:.300} instead of {expected:.300}");
    }
    assert!(found.2.len() == expected.2.len() && found.3 == expected.3, "{what}: the states differ");
}

/// Trains for three steps; the second is of two batches. A zoo whose stem is frozen has prefixes.
fn run(config: &ForwardConfig, kind: AllocatorKind, frozen: bool, executor: Arc<dyn Executor>) -> Outcome {
    let full = zoo(1);
    let model = if frozen { Zoo { mix: full.mix.clone(), head: full.head.clone(), ..full.no_grad() } } else { full };
    let allocator = AnyAllocator::new(kind, &Default::default()).unwrap();
    let mut learner: Learner = ForwardLearner::new(model, allocator, config.clone()).unwrap().with_executor(executor);
    let mut optimizer = SgdConfig::new().init();
    let mut seen = vec![];
    for step in 0..3u64 {
        let mut grads = burn::optim::GradientsAccumulator::new();
        for part in 0..=u64::from(step == 1) {
            let ids: Vec<u64> = (0..7).map(|i| (5 * step + 3 * part + i) % 11).collect();
            let output = TrainStep::step(&learner, padded_batch(&ids, 3));
            assert_eq!(learner.monitor().error(), None);
            seen.push(format!("{:?}", output.item.losses.into_data().to_vec::<f32>().unwrap()));
            grads.accumulate::<AB>(&learner, output.grads);
        }
        learner = learner.optimize::<AB, _>(&mut optimizer, 0.05, grads.grads());
    }
    for report in learner.monitor().take_reports() {
        seen.push(without_ids(&format!("{:?}", StepReport { memory: None, ..report })));
    }
    let state = learner.state();
    let total = state.ledger.total();
    let state =
        format!("{} {} {} {:?} {:?}", state.step, total.queries, total.row_forwards, state.variances, state.sites);
    let lambda = weights::<AnyAllocator<B>>(&learner.allocator.valid());
    (weights(&learner.model.valid()), lambda, seen, without_ids(&state))
}

fn config(space: Space) -> ForwardConfig {
    ForwardConfig::new(QueryBudget::new(6, 1).unwrap()).with_seed(3).with_space(space).with_leaves(4)
}

fn check(name: &str, config: &ForwardConfig, kind: AllocatorKind) {
    for frozen in [false, true] {
        let alone = run(config, kind, frozen, Arc::new(Threads));
        let threads = run(&config.clone().with_threads(3), kind, frozen, Arc::new(Threads));
        assert_same(&threads, &alone, &format!("{name}, frozen {frozen}: threads"));
        let devices = Devices::new::<B>(&[Default::default(); 3]).unwrap();
        let devices = run(config, kind, frozen, Arc::new(devices));
        assert_same(&devices, &alone, &format!("{name}, frozen {frozen}: devices"));
        for (workers, deal) in [
            (2, Deal::Shares),
            (3, Deal::Shares),
            (4, Deal::Shares),
            (3, Deal::Rotating),
            (2, Deal::First),
            (2, Deal::All),
        ] {
            for outcome in on_workers(workers, deal, |worker| run(config, kind, frozen, Arc::new(worker))) {
                assert_same(&outcome, &alone, &format!("{name}, frozen {frozen}: {workers} workers, {deal:?}"));
            }
        }
    }
}

#[test]
fn every_recipe_is_the_same_on_any_number_of_workers() {
    for recipe in Recipe::ALL {
        let config = recipe.config(QueryBudget::new(6, 2).unwrap()).with_seed(3).with_leaves(4);
        check(recipe.name(), &config, recipe.allocator());
    }
}

#[test]
fn spaces_placements_and_estimates_are_the_same_on_any_number_of_workers() {
    for placement in Placement::ALL {
        let space = Space::activation().with_placement(placement).unwrap();
        check(&format!("{space}"), &config(space), AllocatorKind::Neyman);
        for estimate in [GradientEstimate::Shrunk, GradientEstimate::Predicted] {
            let Ok(space) = space.with_estimate(estimate) else { continue };
            check(&format!("{space} {estimate:?}"), &config(space).with_prefix_cache(6), AllocatorKind::Gaussian);
        }
    }
    check("low rank", &config(Space::low_rank(2)), AllocatorKind::Bernoulli);
    let pilots = config(Space::activation()).with_variance(VarianceSource::Pilot(2));
    check("pilots", &pilots, AllocatorKind::Gaussian);
}

/// Leaves change nothing but the rounding.
#[test]
fn leaves_change_rounding_alone() {
    for space in Space::ALL {
        let of = |leaves| run(&config(space).with_leaves(leaves), AllocatorKind::Uniform, false, Arc::new(Threads)).0;
        let one = of(1);
        let scale = one.iter().map(|v| v * v).sum::<f64>().sqrt();
        for leaves in [2, 8, 64] {
            let distance = of(leaves).iter().zip(&one).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
            assert!(distance < 1e-5 * scale, "{space}, {leaves} leaves: {distance} of {scale}");
        }
    }
}

/// A model that counts its rows, and fails or panics when it is told to.
#[derive(Module, Debug)]
struct Counting<B: Backend> {
    fc: Linear<B>,
    #[module(skip)]
    rows: Arc<AtomicUsize>,
    #[module(skip)]
    fails: Option<(usize, bool)>,
}

impl<B: Backend> ForwardModel<B> for Counting<B> {
    type Input = Tensor<B, 2>;
    type Target = ();
    type Output = Tensor<B, 2>;

    fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let y = probe.linear(&self.fc, x);
        let before = self.rows.fetch_add(y.dims()[0], Ordering::Relaxed);
        match self.fails {
            Some((at, true)) if before >= at => panic!("the forward pass is broken"),
            _ => y,
        }
    }

    fn losses(&self, y: Tensor<B, 2>, (): ()) -> Tensor<B, 1> {
        y.powi_scalar(2).sum_dim(1).squeeze_dim(1)
    }

    fn failure(&self) -> Option<String> {
        let (at, panics) = self.fails?;
        (!panics && self.rows.load(Ordering::Relaxed) >= at).then(|| "the service is away".into())
    }

    fn skips_site_check(&self) -> bool {
        true
    }
}

fn counting(fails: Option<(usize, bool)>) -> (ForwardLearner<AB, Counting<AB>, Uniform>, Arc<AtomicUsize>) {
    let rows = Arc::new(AtomicUsize::new(0));
    let fc = crate::testing::reseeded(LinearConfig::new(3, 2).init(&Default::default()), 5);
    let model = Counting { fc, rows: rows.clone(), fails };
    let config = ForwardConfig::new(QueryBudget::new(5, 1).unwrap()).with_leaves(4);
    (ForwardLearner::new(model, Uniform, config).unwrap(), rows)
}

fn eight() -> Batch<Tensor<B, 2>, ()> {
    let x = Tensor::<B, 1, Int>::arange(0..24, &Default::default()).float();
    Batch { ids: (0..8).collect(), input: x.sin().reshape([8, 3]), target: () }
}

/// Every clean row and every query is asked once in all: a black box charges for each.
#[test]
fn rows_are_asked_once_in_all() {
    let alone = counting(None);
    alone.0.step(eight());
    let alone = alone.1.load(Ordering::Relaxed);
    // 8 clean rows, 8 repeated, 40 queries, 8 recorded
    assert_eq!(alone, 64);
    let shared = on_workers(4, Deal::Shares, |worker| {
        let (learner, rows) = counting(None);
        let learner = learner.with_executor(Arc::new(worker));
        learner.step(eight());
        assert_eq!(learner.monitor().error(), None);
        assert_eq!(learner.monitor().ledger().total().row_forwards, 64);
        rows.load(Ordering::Relaxed)
    });
    assert_eq!(shared.iter().sum::<usize>(), alone, "{shared:?}");
}

/// A worker that only takes results, as one that replays a log, asks for one leaf once.
#[test]
fn a_worker_that_takes_everything_asks_for_one_leaf_once() {
    let rows = on_workers(2, Deal::First, |worker| {
        let (mut learner, rows) = counting(None);
        learner = learner.with_executor(Arc::new(worker));
        let mut optimizer = SgdConfig::new().init();
        let asked = [(); 3].map(|()| {
            let before = rows.load(Ordering::Relaxed);
            let grads = learner.step(eight()).grads;
            learner = learner.clone().optimize::<AB, _>(&mut optimizer, 0.01, grads);
            rows.load(Ordering::Relaxed) - before
        });
        (asked, weights(&learner.model.valid()))
    });
    assert_eq!((rows[0].0, rows[1].0), ([64, 56, 56], [2, 0, 0]));
    assert_eq!(rows[0].1, rows[1].1);
}

/// A job that fails or panics on one worker is an error on all of them.
#[test]
fn a_failure_on_one_worker_is_an_error_on_all() {
    for (at, panics) in [(0, true), (4, true), (0, false), (4, false)] {
        let errors = on_workers(4, Deal::Shares, |worker| {
            let fails = (worker.rank == 2).then_some((at, panics));
            let rank = worker.rank;
            let learner = counting(fails).0.with_executor(Arc::new(worker));
            let output = learner.step(eight());
            assert!(output.grads.is_empty());
            (rank, learner.monitor().error())
        });
        for (rank, error) in errors {
            let error = error.unwrap();
            assert_eq!(error.may_pass(), !panics, "{error}");
            let (why, here) = match panics {
                true => ("the forward pass is broken", matches!(error, Error::JobPanicked { .. })),
                false => ("the service is away", matches!(error, Error::Model { .. })),
            };
            let there = matches!(&error, Error::Executor(ExecutorError::Job { worker, .. }) if worker == "2");
            assert!(error.to_string().contains(why) && if rank == 2 { here } else { there }, "{rank}: {error}");
        }
    }
}

/// An executor that does nothing.
#[derive(Debug)]
struct Idle;

impl Executor for Idle {
    fn run(&self, _: &crate::executor::Round, _: &mut dyn crate::executor::Jobs) -> Result<(), ExecutorError> {
        Ok(())
    }

    fn begin(&self, run: &crate::executor::RunIdentity) -> Result<(), ExecutorError> {
        let leaves = run.settings.iter().find(|(name, _)| name == "leaves");
        assert_eq!((run.step, leaves.map(|(_, value)| value.as_str())), (0, Some("4")));
        Ok(())
    }
}

#[test]
fn an_executor_that_breaks_its_contract_is_an_error() {
    let learner = counting(None).0.with_executor(Arc::new(Idle));
    assert!(learner.step(eight()).grads.is_empty());
    assert!(learner.monitor().error().unwrap().to_string().contains("'clean' before all jobs were done"));
}
