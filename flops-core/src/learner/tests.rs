//! The step inside burn-train's contract: no graph, exact resume, nothing trained on broken numbers.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::BackpropLearner;
use crate::allocator::{AnyAllocator, GaussianAllocator, GaussianAllocatorConfig, Uniform};
use crate::batch::Rows;
use crate::noise::NoiseLaw;
use crate::objective::zero_one;
use crate::probe::Probe;
use crate::testing::{AB, B, Zoo, weights, zoo, zoo_batch};
use burn::module::Param;
use burn::optim::{AdamConfig, SgdConfig};
use burn::record::{DefaultRecorder, Recorder};
use burn::train::Interrupter;

type Learner = ForwardLearner<AB, Zoo<AB>, GaussianAllocator<AB>>;

fn config() -> ForwardConfig {
    ForwardConfig::new(QueryBudget::new(6, 1).unwrap()).with_seed(3)
}

fn learner(config: ForwardConfig) -> Learner {
    let allocator = GaussianAllocatorConfig::new().init(&Default::default()).unwrap();
    ForwardLearner::new(zoo(1), allocator, config).unwrap()
}

fn train(mut learner: Learner, optimizer: &mut impl Optimizer<Learner, AB>, steps: std::ops::Range<u64>) -> Learner {
    for i in steps {
        let output = TrainStep::step(&learner, zoo_batch::<B>(5, i % 3));
        learner = learner.optimize::<AB, _>(optimizer, 0.02, output.grads);
    }
    learner
}

fn mean_loss(learner: &Learner) -> f64 {
    let output = InferenceStep::step(&learner.valid(), zoo_batch::<B>(5, 0));
    output.losses.mean().into_scalar().into()
}

#[test]
fn training_lowers_the_loss_and_spends_the_budget() {
    let before = learner(config());
    let first = mean_loss(&before);
    let trained = train(before, &mut AdamConfig::new().init(), 0..60);
    assert!(mean_loss(&trained) < 0.8 * first, "{} after {first}", mean_loss(&trained));
    assert_eq!(trained.state().step, 60);
    assert_eq!(trained.state().ledger.of(Phase::Query).queries, 60 * 5 * 6);
    assert_eq!(trained.monitor().ledger().total().queries, 60 * 5 * 6);
    let reports = trained.monitor().take_reports();
    assert_eq!((reports.len(), reports[59].queries_total), (60, 1800));
    assert!(trained.monitor().error().is_none());
}

/// Every estimate of the variances trains within the budget; pilots are booked as what they are.
#[test]
fn every_estimate_of_the_variances_spends_the_budget() {
    for variance in [VarianceEstimate::Running, VarianceEstimate::Loss, VarianceEstimate::Pilot(2)] {
        let before = learner(config().with_variance(variance));
        let first = mean_loss(&before);
        let trained = train(before, &mut AdamConfig::new().init(), 0..60);
        assert!(mean_loss(&trained) < 0.85 * first, "{variance}: {} after {first}", mean_loss(&trained));
        let ledger = &trained.state().ledger;
        let pilots = if let VarianceEstimate::Pilot(n) = variance { n as u64 } else { 0 };
        assert_eq!(ledger.of(Phase::Pilot).queries, 60 * 5 * pilots);
        assert_eq!(ledger.total().queries, 60 * 5 * 6);
        let reports = trained.monitor().take_reports();
        assert!(reports.iter().all(|r| r.queries == 30 && r.allocation.min as u64 >= pilots.max(1)));
        assert!(reports.iter().all(|r| r.variance > 0.0 && r.squared_norm > 0.0 && r.rows > 0));
    }
    let bad = config().with_variance(VarianceEstimate::Pilot(6));
    let message = ForwardLearner::new(zoo(1), Uniform, bad).err().unwrap().to_string();
    assert!(message.contains("pilot queries = 6") && message.contains("1 to 5"), "{message}");
}

/// Low rank noise and staged placement train too; staged queries are more than A₀ where they are cheaper than a pass.
#[test]
fn every_space_and_placement_trains() {
    for space in Space::ALL {
        for placement in Placement::ALL {
            let before = learner(config().with_space(space).with_placement(placement).with_noise(NoiseLaw::Gaussian));
            let first = mean_loss(&before);
            let trained = train(before, &mut AdamConfig::new().init(), 0..80);
            assert!(mean_loss(&trained) < 0.95 * first, "{space} {placement:?}: {} of {first}", mean_loss(&trained));
            let queries = trained.state().ledger.total().queries;
            if placement == Placement::Staged && space.is_independent() {
                assert!(queries > 80 * 30, "{space}: {queries}");
            } else {
                assert_eq!(queries, 80 * 30, "{space} {placement:?}");
            }
        }
    }
}

/// θ at rest, 80 steps on one batch: the spread of the last 40 estimates with the learned control variate is at most 0.7 of that
/// without, at the same budget and with the same noise. A fixed seed; over others the ratio stays below it too.
#[test]
fn the_control_variate_lowers_the_variance() {
    let spread = |control_variate| {
        let mut learner = learner(config().with_control_variate(control_variate));
        let mut optimizer = SgdConfig::new().init();
        let mut estimates: Vec<Vec<f64>> = vec![];
        for step in 0..80 {
            let output = TrainStep::step(&learner, zoo_batch::<B>(12, 1));
            if step >= 40 {
                let head = &learner.model.head.weight;
                let grad = output.grads.get::<B, 2>(head.id).unwrap();
                estimates.push(grad.into_data().iter::<f64>().collect());
            }
            learner = learner.optimize::<AB, _>(&mut optimizer, 0.0, output.grads);
        }
        let n = estimates.len() as f64;
        (0..estimates[0].len())
            .map(|i| {
                let mean = estimates.iter().map(|e| e[i]).sum::<f64>() / n;
                estimates.iter().map(|e| (e[i] - mean).powi(2)).sum::<f64>() / n
            })
            .sum::<f64>()
    };
    let (without, with) = (spread(ControlVariate::None), spread(ControlVariate::Feedback));
    assert!(with < 0.7 * without, "{with} with, {without} without");
}

/// λ moves, its own way: the outer optimizer never sees it.
#[test]
fn the_allocator_learns_with_its_own_rate() {
    let before = learner(config());
    let lambda = |l: &Learner| weights::<GaussianAllocator<B>>(&l.allocator.valid());
    let start = lambda(&before);
    // lr 0 for θ
    let mut optimizer = SgdConfig::new().init();
    let theta = weights(&before.model.valid());
    let mut after = before;
    for i in 0..5 {
        let output = TrainStep::step(&after, zoo_batch::<B>(5, i));
        after = after.optimize::<AB, _>(&mut optimizer, 0.0, output.grads);
    }
    assert_ne!(lambda(&after), start);
    assert_eq!(weights(&after.model.valid()), theta);
}

#[test]
fn the_same_seed_gives_the_same_bits_on_any_number_of_threads() {
    let run = |config| weights(&train(learner(config), &mut AdamConfig::new().init(), 0..6).model.valid());
    let reference = run(config());
    assert_eq!(run(config()), reference);
    assert_eq!(run(config().with_threads(3)), reference);
    assert_ne!(run(config().with_seed(4)), reference);
}

/// Through Burn's recorder at full precision, as its checkpointer does it: θ, λ, the optimizer, variances and step.
#[test]
fn a_resumed_run_ends_on_the_same_bits() {
    let device = Default::default();
    let mut optimizer = AdamConfig::new().init();
    let half = train(learner(config()), &mut optimizer, 0..4);
    let folder = tempfile::tempdir().unwrap();
    let recorder = DefaultRecorder::new();
    Recorder::<AB>::record(&recorder, half.clone().into_record(), folder.path().join("model")).unwrap();
    Recorder::<AB>::record(&recorder, optimizer.to_record(), folder.path().join("optimizer")).unwrap();
    let uninterrupted = train(half, &mut optimizer, 4..9);

    let record = Recorder::<AB>::load(&recorder, folder.path().join("model"), &device).unwrap();
    let resumed = learner(config()).load_record(record);
    let record = Recorder::<AB>::load(&recorder, folder.path().join("optimizer"), &device).unwrap();
    let mut optimizer = AdamConfig::new().init().load_record(record);
    let resumed = train(resumed, &mut optimizer, 4..9);
    assert_eq!(weights(&resumed.model.valid()), weights(&uninterrupted.model.valid()));
    assert_eq!(weights::<GaussianAllocator<B>>(&resumed.allocator.valid()), weights(&uninterrupted.allocator.valid()));
    assert_eq!(resumed.state().step, 9);
}

/// A cached prefix gives the same training as one computed in every epoch.
#[test]
fn the_prefix_cache_changes_nothing() {
    let run = |cache| {
        let mut learner = learner(config().with_prefix_cache(cache));
        learner.model.conv = learner.model.conv.no_grad();
        learner.model.table = learner.model.table.no_grad();
        learner.model.cls = learner.model.cls.no_grad();
        // one batch, many epochs: ids name the same data
        let mut optimizer = AdamConfig::new().init();
        for _ in 0..6 {
            let output = TrainStep::step(&learner, zoo_batch::<B>(5, 0));
            learner = learner.optimize::<AB, _>(&mut optimizer, 0.02, output.grads);
        }
        (weights(&learner.model.valid()), learner.prefixes.len())
    };
    let ((without, none), (with, kept)) = (run(0), run(100));
    assert_eq!(without, with);
    assert_eq!((none, kept), (0, 5));
}

/// An evaluation from kept prefixes says what one from the input does, also once training has moved what lies behind them; with other data
/// in training under the same ids, and with evaluations before the first step.
#[test]
fn the_evaluation_cache_changes_nothing() {
    let run = |cache| {
        let mut learner = learner(config().with_evaluation_cache(cache));
        learner.model.conv = learner.model.conv.no_grad();
        learner.model.table = learner.model.table.no_grad();
        learner.model.cls = learner.model.cls.no_grad();
        let mut optimizer = AdamConfig::new().init();
        let mut losses = vec![];
        for _ in 0..3 {
            let evaluated = InferenceStep::step(&learner.valid(), zoo_batch::<B>(70, 1));
            losses.push(evaluated.losses.into_data().iter::<f32>().collect::<Vec<_>>());
            let output = TrainStep::step(&learner, zoo_batch::<B>(5, 0));
            learner = learner.optimize::<AB, _>(&mut optimizer, 0.02, output.grads);
        }
        (losses, learner.evaluated.len())
    };
    let ((without, none), (with, kept)) = (run(0), run(100));
    assert_eq!(without, with);
    assert!(without[0] != without[1] && without[1] != without[2], "training moves the losses");
    assert_eq!((none, kept), (0, 70));
}

/// A layer in a stage that the probe does not see.
#[derive(Module, Debug)]
struct Unseen<B: Backend> {
    fc: burn::nn::Linear<B>,
}

impl<B: Backend> ForwardModel<B> for Unseen<B> {
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

/// What is trained unseen may act in any stage: none is kept, and the clean loss of a batch follows the weights.
#[test]
fn a_stage_with_unseen_parameters_is_not_kept() {
    let device = Default::default();
    let model = Unseen::<AB> { fc: burn::nn::LinearConfig::new(3, 2).init(&device) };
    let config = config().with_space(Space::Weights).with_prefix_cache(10).with_evaluation_cache(10);
    let mut learner = ForwardLearner::new(model, Uniform, config).unwrap();
    let batch = Batch { ids: vec![0, 1], input: Tensor::<B, 2>::ones([2, 3], &device), target: () };
    let mut optimizer = SgdConfig::new().init();
    let losses: Vec<f64> = (0..5)
        .map(|_| {
            let output = TrainStep::step(&learner, batch.clone());
            learner = learner.clone().optimize::<AB, _>(&mut optimizer, 0.01, output.grads);
            output.item.losses.mean().into_scalar().into()
        })
        .collect();
    assert_eq!((learner.prefixes.len(), learner.evaluated.trained().len()), (0, 0));
    assert!(losses.windows(2).all(|l| l[1] != l[0]), "{losses:?}");
}

/// The same of backpropagation, which starts behind the prefix, too.
#[test]
fn the_prefix_cache_does_not_change_backpropagation() {
    let run = |cache| {
        let mut model = zoo(1);
        model.conv = model.conv.no_grad();
        model.table = model.table.no_grad();
        model.cls = model.cls.no_grad();
        let mut learner = BackpropLearner::new(model).with_prefix_cache(cache);
        let mut optimizer = AdamConfig::new().init();
        for _ in 0..6 {
            let output = TrainStep::step(&learner, zoo_batch::<AB>(5, 0));
            learner = learner.optimize::<AB, _>(&mut optimizer, 0.02, output.grads);
        }
        weights(&learner.model.valid())
    };
    assert_eq!(run(0), run(100));
    assert_ne!(run(0), weights(&zoo(1).valid()));
}

/// A model that counts its forward passes, those on a backend with autodiff apart.
#[derive(Module, Debug)]
struct Watchful<B: Backend> {
    weight: Param<Tensor<B, 2>>,
    #[module(skip)]
    passes: Arc<[AtomicUsize; 2]>,
    #[module(skip)]
    poison: Arc<Mutex<f32>>,
}

impl<B: Backend> ForwardModel<B> for Watchful<B> {
    type Input = Tensor<B, 2>;
    type Target = ();
    type Output = Tensor<B, 2>;

    fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        self.passes[usize::from(B::ad_enabled(&x.device()))].fetch_add(1, Ordering::Relaxed);
        let w = probe.param(&self.weight);
        let poison = *self.poison.lock().unwrap();
        // clean rows keep their numbers; perturbed ones get the poison's
        if w.dims()[0] > 1 { probe.add(x, w) * poison } else { x + w }
    }

    fn losses(&self, y: Tensor<B, 2>, (): ()) -> Tensor<B, 1> {
        y.powi_scalar(2).sum_dim(1).squeeze_dim(1)
    }
}

fn watchful() -> ForwardLearner<AB, Watchful<AB>, Uniform> {
    let device = Default::default();
    let model = Watchful::<AB> {
        weight: Param::from_tensor(Tensor::ones([1, 3], &device)),
        passes: Default::default(),
        poison: Arc::new(Mutex::new(1.0)),
    };
    let config = ForwardConfig::new(QueryBudget::new(4, 1).unwrap()).with_max_failed_steps(3);
    ForwardLearner::new(model, Uniform, config).unwrap()
}

fn points(values: [f32; 2]) -> Batch<Tensor<B, 2>, ()> {
    let x = Tensor::<B, 1>::from_floats(values, &Default::default()).reshape([2, 1]).repeat_dim(1, 3);
    Batch { ids: vec![7, 8], input: x, target: () }
}

/// Every pass of a step runs on a backend where autodiff does not exist, and so do the gradients that it registers.
#[test]
fn no_graph_is_recorded() {
    let learner = watchful();
    let output = TrainStep::step(&learner, points([1.0, 2.0]));
    let [plain, with_graph] = [0, 1].map(|i| learner.model.passes[i].load(Ordering::Relaxed));
    assert!(plain >= 3, "clean, queries and update: {plain}");
    assert_eq!(with_graph, 0);
    assert!(output.grads.get::<B, 2>(learner.model.weight.id).is_some());
}

#[test]
fn broken_data_are_named_and_nothing_is_trained_on_them() {
    let learner = watchful();
    let output = TrainStep::step(&learner, points([f32::NAN, 2.0]));
    assert_eq!(output.grads.len(), 0);
    assert_eq!(learner.monitor().error(), Some(Error::NonFiniteData { count: 1, ids: "7".into() }));
    let learner = watchful();
    let batch = Batch { ids: vec![], input: points([1.0, 2.0]).input.rows(&[]), target: () };
    assert_eq!(TrainStep::step(&learner, batch).grads.len(), 0);
    assert_eq!(learner.monitor().error(), Some(Error::EmptyBatch));
}

#[test]
fn steps_without_a_finite_loss_leave_the_model_and_stop_the_training() {
    let mut learner = watchful();
    let interrupter = Interrupter::new();
    learner.monitor().stop_with(interrupter.clone());
    *learner.model.poison.lock().unwrap() = f32::NAN;
    let mut optimizer = AdamConfig::new().init();
    for failed in 1..=3 {
        assert!(!interrupter.should_stop());
        let output = TrainStep::step(&learner, points([1.0, 2.0]));
        learner = learner.optimize::<AB, _>(&mut optimizer, 0.1, output.grads);
        assert_eq!(learner.state().failed_steps, failed);
        assert_eq!(weights(&learner.model.valid()), [1.0; 3]);
    }
    assert!(interrupter.should_stop());
    let error = learner.monitor().error().unwrap();
    assert_eq!(error, Error::Diverged { steps: 3, sigma: 1e-2, lr: 0.1 });
    assert!(error.to_string().contains("sigma = 0.01") && error.to_string().contains("lr = 0.1"));
    // a good step in between starts the count anew
    *learner.model.poison.lock().unwrap() = 1.0;
    let output = TrainStep::step(&learner, points([1.0, 2.0]));
    learner = learner.optimize::<AB, _>(&mut optimizer, 0.1, output.grads);
    assert_eq!(learner.state().failed_steps, 0);
    assert_ne!(weights(&learner.model.valid()), [1.0; 3]);
}

/// The 0-1 loss has no gradient; its smoothed version has, and is trained.
#[derive(Module, Debug)]
struct Perceptron<B: Backend> {
    fc: burn::nn::Linear<B>,
}

impl<B: Backend> ForwardModel<B> for Perceptron<B> {
    type Input = Tensor<B, 2>;
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;
    fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        probe.linear(&self.fc, x)
    }
    fn losses(&self, y: Tensor<B, 2>, t: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        zero_one(y, t)
    }
}

#[test]
fn a_loss_without_gradient_is_trained() {
    let device = Default::default();
    let model = Perceptron::<AB> {
        fc: burn::nn::LinearConfig::new(2, 2).with_initializer(burn::nn::Initializer::Zeros).init(&device),
    };
    let config = ForwardConfig::new(QueryBudget::new(50, 1).unwrap()).with_sigma(1.0).with_noise(NoiseLaw::Gaussian);
    let allocator = AnyAllocator::from_name("gaussian", &device).unwrap();
    let mut learner = ForwardLearner::<AB, _, _>::new(model, allocator, config).unwrap();
    let x: Vec<f32> = (0..16).flat_map(|i| [(i as f32 * 0.7).sin(), (i as f32 * 1.3).cos()]).collect();
    let labels: Vec<i32> = x.chunks(2).map(|p| i32::from(p[0] + p[1] > 0.0)).collect();
    let batch = || Batch {
        ids: (0..16).collect(),
        input: Tensor::<B, 2>::from_data(TensorData::new(x.clone(), [16, 2]), &device),
        target: Tensor::<B, 1, Int>::from_data(TensorData::new(labels.clone(), [16]), &device),
    };
    let mut optimizer = AdamConfig::new().init();
    for _ in 0..150 {
        let output = TrainStep::step(&learner, batch());
        learner = learner.optimize::<AB, _>(&mut optimizer, 0.05, output.grads);
    }
    let wrong: f32 = InferenceStep::step(&learner.valid(), batch()).losses.sum().into_scalar();
    assert!(wrong <= 1.0, "{wrong} of 16 wrong");
}
