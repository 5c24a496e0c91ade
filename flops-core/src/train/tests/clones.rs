//! Whose steps an update commits: loops, burn-train's clones, sweeps, workers, accumulation.

use burn::module::{AutodiffModule, Module};
use burn::optim::{GradientsAccumulator, GradientsParams, MultiGradientsParams, SgdConfig};
use burn::tensor::backend::DeviceOps;
use burn::train::TrainStep;

use crate::allocator::{GaussianAllocator, GaussianAllocatorConfig, QueryBudget};
use crate::ledger::Ledger;
use crate::testing::{AB, B, Zoo, ZooBatch, weights, zoo, zoo_batch};
use crate::train::*;
use crate::variance::VarianceSource;

type Learner = ForwardLearner<AB, Zoo<AB>, GaussianAllocator<AB>>;

fn learner() -> Learner {
    let config = ForwardConfig::new(QueryBudget::new(6, 1).unwrap()).with_seed(3);
    let allocator = GaussianAllocatorConfig::new().init(&Default::default()).unwrap();
    ForwardLearner::new(zoo(1), allocator, config).unwrap()
}

/// Five examples with ids of their own for each `first`.
fn batch(first: u64) -> ZooBatch<B> {
    let mut batch = zoo_batch::<B>(5, first % 3);
    batch.ids = (first..first + 5).collect();
    batch
}

fn optimize(learner: Learner, lr: f64, grads: GradientsParams) -> Learner {
    learner.optimize::<AB, _>(&mut SgdConfig::new().init(), lr, grads)
}

/// θ and λ.
fn bits(learner: &Learner) -> (Vec<f64>, Vec<f64>) {
    (weights(&learner.model.valid()), weights::<GaussianAllocator<B>>(&learner.allocator.valid()))
}

/// A run as a plain loop has it.
fn plain(mut learner: Learner, lr: f64, steps: u64) -> Learner {
    for step in 0..steps {
        let grads = learner.step(batch(10 * step)).grads;
        learner = optimize(learner, lr, grads);
    }
    learner
}

#[test]
fn burn_trains_clones_end_on_the_bits_of_a_plain_loop() {
    let mut learner = learner();
    for step in 0..4 {
        let output = learner.step(batch(10 * step));
        let _for_metrics = learner.clone();
        let updated = optimize(learner.clone(), 0.05, output.grads);
        learner = updated;
    }
    let reference = plain(self::learner(), 0.05, 4);
    assert_eq!(bits(&learner), bits(&reference));
    assert_eq!((learner.state().step, learner.pending.len()), (4, 0));
    assert_eq!(learner.state().ledger.total().queries, 4 * 30);
}

/// Two clones with learning rates of their own, stepped in turn, end where each ends alone.
#[test]
fn the_clones_of_a_sweep_train_apart() {
    let base = plain(learner(), 0.05, 1);
    let alone = [0.02, 0.2].map(|lr| bits(&plain(base.clone(), lr, 3)));
    assert_ne!(alone[0], alone[1]);
    for cloned in [false, true] {
        let mut runs = [0.02, 0.2].map(|lr| (base.clone().apart(), lr));
        for step in 0..3 {
            // both have stepped before either is updated
            let grads = runs.each_ref().map(|(run, _)| run.step(batch(10 * step)).grads);
            let mut grads = grads.into_iter();
            runs = runs.map(|(run, lr)| {
                let updated = if cloned { run.clone() } else { run };
                (optimize(updated, lr, grads.next().unwrap()), lr)
            });
        }
        for (i, (run, _)) in runs.iter().enumerate() {
            assert_eq!(bits(run), alone[i], "clone {i}");
            assert_eq!(run.state().step, 4);
            assert_eq!(run.monitor().ledger().total().queries, 4 * 30);
            assert_eq!(run.monitor().take_reports().len(), 3);
        }
    }
}

/// Threads step on clones of a clone, as burn-train's multi-device strategy has them.
#[test]
fn the_steps_of_several_devices_are_refused() {
    let learner = learner();
    let sent = learner.clone();
    let grads = std::thread::scope(|scope| {
        let step = |first| {
            let worker = sent.clone();
            scope.spawn(move || worker.step(batch(first)).grads)
        };
        [0, 10].map(step).map(|handle| handle.join().unwrap())
    });
    let mut accumulator = GradientsAccumulator::new();
    grads.into_iter().for_each(|grads| accumulator.accumulate::<AB>(&learner.clone(), grads));
    let interrupter = burn::train::Interrupter::new();
    learner.monitor().stop_with(interrupter.clone());
    let updated = optimize(learner.clone(), 0.05, accumulator.grads());
    assert!(interrupter.should_stop());
    let error = learner.monitor().error().unwrap();
    assert!(error.to_string().contains("with_executor") && !error.may_pass(), "{error}");
    assert_eq!((bits(&updated), updated.state().step), (bits(&learner), 0));
}

/// Steps before one update: each has new noise, even on the same batch, and all are counted.
#[test]
fn accumulated_steps_draw_new_noise_and_are_counted() {
    for variance in [VarianceSource::Running, VarianceSource::Pilot(2)] {
        let config = learner().config().clone().with_variance(variance);
        let allocator = GaussianAllocatorConfig::new().init(&Default::default()).unwrap();
        let mut learner = ForwardLearner::new(zoo(1), allocator, config).unwrap();
        let mut seen: Vec<Vec<f64>> = vec![];
        for update in 0..2u64 {
            let mut accumulator = GradientsAccumulator::new();
            for _ in 0..3 {
                let output = learner.step(batch(0));
                let head = output.grads.get::<B, 2>(learner.model.head.weight.id).unwrap();
                seen.push(head.into_data().iter::<f64>().collect());
                let queries = seen.len() as u64 * 30;
                let stats = output.item.stats.unwrap();
                assert_eq!(stats.queries, queries as f64, "what Burn's metric shows");
                assert_eq!(learner.monitor().ledger().total().queries, queries);
                accumulator.accumulate::<AB>(&learner.clone(), output.grads);
            }
            let report = learner.monitor().take_reports().pop().unwrap();
            assert_eq!(report.queries_total, (update + 1) * 3 * 30);
            // θ stays where it is, so that only the noise can differ
            learner = optimize(learner.clone(), 0.0, accumulator.grads());
            assert_eq!(learner.state().ledger.total().queries, (update + 1) * 3 * 30);
            assert_eq!(learner.state().step, update + 1);
        }
        for i in 0..seen.len() {
            assert!((0..i).all(|j| seen[j] != seen[i]), "{variance}: step {i} repeats an earlier one");
        }
    }
}

/// After a resume the monitor counts what was spent before, also before the first update.
#[test]
fn the_ledger_of_a_resumed_run_goes_on() {
    let half = plain(learner(), 0.05, 2);
    let resumed = learner().load_record(half.into_record());
    let output = resumed.step(batch(0));
    assert_eq!(resumed.monitor().ledger().total().queries, 90);
    assert_eq!(output.item.stats.unwrap().queries, 90.0);
}

/// Gradients whose step another clone has committed are applied all the same.
#[test]
fn one_step_may_update_two_clones() {
    let base = learner();
    // another learner with the same parameters, whose steps are none of theirs
    let grads = || learner().load_record(base.clone().into_record()).step(batch(0)).grads;
    let (mut a, mut b) = (base.clone(), base.clone());
    base.step(batch(0));
    (a, b) = (optimize(a, 0.05, grads()), optimize(b, 0.05, grads()));
    assert_eq!(bits(&a).0, bits(&b).0);
    assert_ne!(bits(&b).0, bits(&base).0);
    assert_eq!((a.state().step, b.state().step), (1, 1));
    assert_eq!(b.state().ledger, Ledger::default());
}

/// The gradients of a multi-device strategy are applied, and there is no update without any.
#[test]
fn gradients_of_several_devices_update_once() {
    let base = learner();
    let id = base.model.devices()[0].id();
    let multi = |grads: GradientsParams| {
        let grads = MultiGradientsParams { grads: vec![(GradientsParams::new(), id), (grads, id)] };
        base.clone().optimize_multi::<AB, _>(&mut SgdConfig::new().init(), 0.05, grads)
    };
    // another learner with the same parameters, whose steps are none of this one's
    let grads = || learner().load_record(base.clone().into_record()).step(batch(0)).grads;
    let (updated, idle) = (multi(grads()), multi(GradientsParams::new()));
    assert_eq!(bits(&updated).0, bits(&optimize(base.clone(), 0.05, grads())).0);
    assert_ne!(bits(&updated).0, bits(&base).0);
    assert_eq!(bits(&idle), bits(&base));
    assert_eq!((updated.state().step, idle.state().step), (1, 0));
}

/// Kept reports are bounded by memory: 2 MiB of reports of examples, and the latest step's always.
#[test]
fn kept_reports_are_bounded() {
    let learner = learner();
    learner.step(batch(0));
    let report = learner.monitor().take_reports().pop().unwrap();
    let of = |examples: usize| StepReport { data: vec![report.data[0]; examples], sites: vec![], ..report.clone() };
    let monitor = learner.monitor();
    (0..2000).for_each(|_| monitor.report(of(8192)));
    let kept = monitor.take_reports();
    assert_eq!(kept.len(), 1024);
    let details: Vec<usize> = kept.iter().map(|report| report.data.len()).collect();
    assert_eq!(details.iter().sum::<usize>(), 1 << 16);
    assert!(details[1024 - 8..].iter().all(|&n| n == 8192), "the latest eight");
    // more examples than that in one step
    (0..3).for_each(|_| monitor.report(of(100_000)));
    assert_eq!(monitor.take_reports().iter().map(|report| report.data.len()).collect::<Vec<_>>(), [0, 0, 100_000]);
    // small batches are kept whole, and taking makes room
    (0..1500).for_each(|_| monitor.report(of(5)));
    assert_eq!(monitor.take_reports().iter().map(|report| report.data.len()).sum::<usize>(), 1024 * 5);
}
