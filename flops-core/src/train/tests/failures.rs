//! Failures provoked in real learners: what is told, in every space where it can occur.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use burn::module::AutodiffModule;
use burn::optim::SgdConfig;
use burn::prelude::*;
use burn::train::{InferenceStep, Interrupter, TrainStep};

use crate::allocator::{AllocatorKind, AnyAllocator, QueryBudget, Uniform};
use crate::batch::Batch;
use crate::control_variate::GradientEstimate;
use crate::error::Error;
use crate::estimator::Space;
use crate::ledger::Phase;
use crate::model::ForwardModel;
use crate::probe::Probe;
use crate::random::derive_seed;
use crate::testing::{AB, B, weights, zoo, zoo_batch};
use crate::train::*;

/// What is wrong with the loss.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    Nothing,
    /// 0 or 1.
    Steps,
    /// A constant of 10⁶.
    Constant,
    /// Noise of this scale on every loss.
    Noise(f32),
    /// The layer is not called through the probe.
    Bypass,
}

/// A linear model with a squared error.
#[derive(Module, Debug)]
struct Faulty<B: Backend> {
    fc: burn::nn::Linear<B>,
    #[module(skip)]
    fault: Fault,
    /// Losses computed so far, which key their noise.
    #[module(skip)]
    losses: Arc<AtomicU64>,
}

impl<B: Backend> ForwardModel<B> for Faulty<B> {
    type Input = Tensor<B, 2>;
    type Target = Tensor<B, 2>;
    type Output = Tensor<B, 2>;

    fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        if self.fault == Fault::Bypass { self.fc.forward(x) } else { probe.linear(&self.fc, x) }
    }

    fn losses(&self, y: Tensor<B, 2>, t: Tensor<B, 2>) -> Tensor<B, 1> {
        let [rows, _] = y.dims();
        let squared = (y.clone() - t.clone()).powi_scalar(2).sum_dim(1).squeeze_dim::<1>(1);
        match self.fault {
            Fault::Steps => y.greater(t).float().sum_dim(1).squeeze_dim(1),
            Fault::Constant => squared + 1e6,
            Fault::Noise(scale) => {
                let noise = || {
                    let key = self.losses.fetch_add(1, Ordering::Relaxed);
                    scale * (derive_seed(&[key]) as f64 / u64::MAX as f64 - 0.5) as f32
                };
                let noise: Vec<f32> = (0..rows).map(|_| noise()).collect();
                squared + Tensor::from_data(TensorData::new(noise, [rows]), &Default::default())
            }
            _ => squared,
        }
    }
}

type Learner = ForwardLearner<AB, Faulty<AB>, AnyAllocator<AB>>;

fn model(fault: Fault) -> Faulty<AB> {
    let fc = burn::nn::LinearConfig::new(3, 2).with_initializer(burn::nn::Initializer::Constant { value: 0.3 });
    Faulty { fc: fc.init(&Default::default()), fault, losses: Arc::default() }
}

fn learner(fault: Fault, space: Space, sigma: f64) -> Learner {
    let kind = if space.is_independent() { AllocatorKind::Neyman } else { AllocatorKind::Uniform };
    let config = ForwardConfig::new(QueryBudget::new(8, 2).unwrap()).with_space(space).with_sigma(sigma);
    let allocator = AnyAllocator::new(kind, &Default::default()).unwrap();
    ForwardLearner::new(model(fault), allocator, config.with_seed(5)).unwrap()
}

fn batch(rows: usize, step: u64) -> Batch<Tensor<B, 2>, Tensor<B, 2>> {
    let value = |i: usize| ((i as f32 + 7.0 * step as f32) * 1.7).sin();
    let tensor = |width: usize, from: usize| {
        let values: Vec<f32> = (0..rows * width).map(|i| value(from + i)).collect();
        Tensor::from_data(TensorData::new(values, [rows, width]), &Default::default())
    };
    let first = rows as u64 * (step % 3);
    Batch { ids: (first..first + rows as u64).collect(), input: tensor(3, 0), target: tensor(2, 1000) }
}

/// The advice of a run; `lr` 0 keeps the loss where it is.
fn advice(mut learner: Learner, rows: usize, steps: u64, lr: f64) -> Vec<Advice> {
    let mut optimizer = SgdConfig::new().init();
    for step in 0..steps {
        let output = TrainStep::step(&learner, batch(rows, step % 3));
        learner = learner.optimize::<AB, _>(&mut optimizer, lr, output.grads);
    }
    assert_eq!(learner.monitor().error(), None);
    learner.monitor().advice()
}

#[track_caller]
fn only(advice: &[Advice], signature: Signature, words: &[&str]) {
    assert_eq!(advice.iter().map(|a| a.signature).collect::<Vec<_>>(), [signature], "{advice:?}");
    words.iter().for_each(|word| assert!(advice[0].message.contains(word), "{word} in {}", advice[0].message));
}

#[test]
fn a_sound_loss_gets_no_advice_in_any_space() {
    for space in Space::ALL {
        assert_eq!(advice(learner(Fault::Nothing, space, 0.01), 6, 25, 0.0), [], "{space}");
    }
}

#[test]
fn queries_that_do_not_move_the_loss_are_told_in_every_space() {
    for space in Space::ALL {
        let told = |fault, sigma| advice(learner(fault, space, sigma), 6, 25, 0.0);
        only(
            &told(Fault::Steps, 1e-3),
            Signature::UnmovedLoss,
            &["the loss has steps", "sigma = 0.001", "raise sigma"],
        );
        only(&told(Fault::Constant, 1e-3), Signature::UnmovedLoss, &["1.000e6", "subtract a constant"]);
        only(&told(Fault::Nothing, 1e-9), Signature::UnmovedLoss, &["is too small", "raise sigma"]);
    }
}

/// In a run long enough for "raise lr", a loss at fault gets the advice that helps.
#[test]
fn a_loss_at_fault_is_not_answered_by_raise_lr() {
    let space = Space::activation();
    only(&advice(learner(Fault::Steps, space, 1e-3), 3, 900, 0.0), Signature::UnmovedLoss, &["has steps"]);
    only(&advice(learner(Fault::Noise(0.5), space, 1e-2), 3, 900, 0.0), Signature::NoisyLoss, &["raise sigma (0.01)"]);
}

#[test]
fn noise_of_the_loss_is_told_in_every_space_and_its_rows_are_counted() {
    for space in Space::ALL {
        let mut noisy = learner(Fault::Noise(0.5), space, 0.01);
        let output = TrainStep::step(&noisy, batch(6, 0));
        only(&noisy.monitor().advice(), Signature::NoisyLoss, &["the same examples", "average", "raise sigma"]);
        // uniform in ±scale/2: a standard deviation of 0.144, by six pairs, within a factor of three
        let report = &noisy.monitor().take_reports()[0];
        let noise = report.loss_noise.unwrap();
        assert!((0.05..0.4).contains(&noise), "{space}: {noise}");
        noisy = noisy.optimize::<AB, _>(&mut SgdConfig::new().init(), 0.0, output.grads);
        assert_eq!(noisy.state().ledger.of(Phase::Clean).row_forwards, 6 + 12);
        // a sound model is evaluated once more, and only in the first step
        let mut sound = learner(Fault::Nothing, space, 0.01);
        for step in 0..2 {
            let output = TrainStep::step(&sound, batch(10, step));
            sound = sound.optimize::<AB, _>(&mut SgdConfig::new().init(), 0.0, output.grads);
        }
        let noises: Vec<_> = sound.monitor().take_reports().iter().map(|r| r.loss_noise).collect();
        assert_eq!(noises, [Some(0.0), None]);
        assert_eq!(sound.state().ledger.of(Phase::Clean).row_forwards, 2 * 10 + 8);
        // nor in a further step before the first update
        let twice = learner(Fault::Nothing, space, 0.01);
        (0..2).for_each(|step| drop(TrainStep::step(&twice, batch(10, step))));
        let noises: Vec<_> = twice.monitor().take_reports().iter().map(|r| r.loss_noise).collect();
        assert_eq!(noises, [Some(0.0), None]);
        // little noise under a large σ is no fault
        assert_eq!(advice(learner(Fault::Noise(1e-3), space, 0.5), 6, 2, 0.0), [], "{space}");
    }
}

#[test]
fn an_exploding_loss_is_told_in_every_space() {
    for space in Space::ALL {
        // steps of 2.5 times 2/L diverge by a factor of 4 in each
        let told = advice(learner(Fault::Nothing, space, 0.01), 6, 25, 2.0);
        only(&told, Signature::ExplodingLoss, &["training diverges", "lower lr"]);
    }
}

#[test]
fn batches_of_one_are_told_where_there_is_an_allocation() {
    for space in Space::ALL {
        let told = advice(learner(Fault::Nothing, space, 0.01), 1, 60, 0.0);
        if space.is_independent() {
            only(&told, Signature::SingleExamples, &["one example", "larger batches"]);
        } else {
            assert_eq!(told, [], "{space}");
        }
    }
}

/// The same datum, first finite and then NaN after updates at a huge learning rate, beside one that
/// is NaN at first sight.
#[test]
fn divergence_is_told_apart_from_broken_data() {
    for space in Space::ALL {
        let run = |lr: f64, poison: bool| {
            let mut learner = learner(Fault::Nothing, space, 0.01);
            learner.monitor().stop_with(Interrupter::new());
            for step in 0..400 {
                let mut batch = batch(4, step % 3);
                // one example grows no weight's overflow: the others end first
                batch.input = batch.input.slice_fill([0..1, 0..3], 0.0);
                if poison && step == 5 {
                    batch.ids[2] = 99;
                    batch.input = batch.input.slice_fill([2..3, 0..1], f32::NAN);
                }
                let output = TrainStep::step(&learner, batch);
                learner = learner.optimize::<AB, _>(&mut SgdConfig::new().init(), lr, output.grads);
                if let Some(error) = learner.monitor().error() {
                    return error;
                }
            }
            panic!("{space}: no error")
        };
        assert_eq!(run(1e-3, true), Error::NonFiniteData { count: 1, ids: "99".into() }, "{space}");
        // the first update makes squares overflow; after a smaller one they may only lose their digits
        match run(1e30, false) {
            Error::Diverged { lr, .. } => assert_eq!(lr, 1e30),
            other => panic!("{space}: {other}"),
        }
    }
}

/// NaN everywhere before the first update is no divergence.
#[test]
fn a_run_that_starts_with_nan_names_its_data() {
    let learner = learner(Fault::Nothing, Space::activation(), 0.01);
    let mut batch = batch(2, 0);
    batch.input = batch.input * f32::NAN;
    assert!(TrainStep::step(&learner, batch).grads.is_empty());
    let error = learner.monitor().error().unwrap();
    assert_eq!(error, Error::NonFiniteData { count: 2, ids: "0, 1".into() });
    assert!(error.to_string().contains("initial parameters"));
}

/// What can never work ends the first step, and `check` tells it before.
#[test]
fn a_bypassed_probe_fails_at_the_first_step() {
    for space in Space::ALL.into_iter().filter(|space| space.is_independent()) {
        let learner = learner(Fault::Bypass, space, 0.01);
        let told = learner.check(&batch(4, 0)).unwrap_err();
        assert!(matches!(told, Error::NotSites { .. }), "{told}");
        assert_eq!(learner.monitor().error(), None);
        let step = std::panic::AssertUnwindSafe(|| {
            let output = TrainStep::step(&learner, batch(4, 0));
            learner.clone().optimize::<AB, _>(&mut SgdConfig::new().init(), 0.1, output.grads)
        });
        let panic = std::panic::catch_unwind(step).map(drop).unwrap_err();
        assert_eq!(panic.downcast_ref::<String>(), Some(&told.to_string()));
        assert!(!told.to_string().contains('\n'));
        assert_eq!(learner.monitor().error(), Some(told.clone()));

        // with an interrupter training ends in an orderly way
        let learner = self::learner(Fault::Bypass, space, 0.01);
        let interrupter = Interrupter::new();
        learner.monitor().stop_with(interrupter.clone());
        assert!(TrainStep::step(&learner, batch(4, 0)).grads.is_empty());
        assert_eq!(interrupter.get_message(), Some(told.to_string()));
        assert_eq!(learner.monitor().error(), Some(told));
    }
    assert_eq!(learner(Fault::Bypass, Space::weights(), 0.01).check(&batch(4, 0)), Ok(()));
}

/// The baseline refuses the batches that the forward learner refuses.
#[test]
fn the_baseline_tells_what_it_cannot_train_on() {
    let short = || {
        let Batch { ids, input, target } = batch(4, 0);
        let ids = ids.into_iter().chain([9]).collect();
        Batch { ids, input, target }
    };
    let expected = Error::Length { name: "the list of ids of the batch", got: 5, expected: 4 };
    let learner = BackpropLearner::new(model(Fault::Nothing));
    let train = std::panic::AssertUnwindSafe(|| {
        let output = TrainStep::step(&learner, short());
        assert!(output.grads.is_empty());
        learner.clone().optimize::<AB, _>(&mut SgdConfig::new().init(), 0.1, output.grads)
    });
    let panic = std::panic::catch_unwind(train).map(drop).unwrap_err();
    assert_eq!(panic.downcast_ref::<String>(), Some(&expected.to_string()));
    assert_eq!(learner.monitor().error(), Some(expected.clone()));

    // with an interrupter the run ends in an orderly way, and the model is as it was
    let learner = BackpropLearner::new(model(Fault::Nothing));
    let interrupter = Interrupter::new();
    learner.monitor().stop_with(interrupter.clone());
    let output = TrainStep::step(&learner, short());
    let after = learner.clone().optimize::<AB, _>(&mut SgdConfig::new().init(), 0.1, output.grads);
    assert_eq!(weights(&after.model.valid()), weights(&learner.model.valid()));
    assert!(InferenceStep::step(&learner, short().lift::<AB>()).losses.into_data().iter::<f32>().all(f32::is_nan));
    assert_eq!(interrupter.get_message(), Some(expected.to_string()));
}

/// A check leaves nothing: the run after it has the bits of one without.
#[test]
fn a_check_leaves_no_trace() {
    let run = |checked: bool| {
        let mut learner = learner(Fault::Nothing, Space::activation(), 0.01);
        if checked {
            learner.check(&batch(4, 0)).unwrap();
            assert_eq!((learner.monitor().take_reports().len(), learner.monitor().ledger().total().queries), (0, 0));
        }
        let output = TrainStep::step(&learner, batch(4, 0));
        learner = learner.optimize::<AB, _>(&mut SgdConfig::new().init(), 0.1, output.grads);
        weights(&burn::module::AutodiffModule::valid(&learner.model))
    };
    assert_eq!(run(true), run(false));
}

#[test]
fn a_model_without_a_trained_parameter_is_refused() {
    let mut frozen = model(Fault::Nothing);
    frozen.fc = frozen.fc.no_grad();
    let config = ForwardConfig::new(QueryBudget::new(4, 1).unwrap());
    assert_eq!(ForwardLearner::new(frozen.clone(), Uniform, config.clone()).err(), Some(Error::NothingTrained));
    // on a backend without a graph nothing asks for a gradient, and the module is only evaluated
    let evaluated = burn::module::AutodiffModule::valid(&frozen);
    assert!(ForwardLearner::<B, Faulty<B>, Uniform>::new(evaluated, Uniform, config).is_ok());
}

/// Labels that are no class are errors of their examples, not panics.
#[test]
fn labels_that_are_no_class_are_named() {
    let config = ForwardConfig::new(QueryBudget::new(4, 1).unwrap()).with_seed(5);
    let learner = ForwardLearner::<AB, _, _>::new(zoo(1), Uniform, config).unwrap();
    for label in [3, -1, i32::MAX] {
        let mut batch = zoo_batch::<B>(4, 0);
        let third = Tensor::<B, 1, Int>::arange(0..4, &Default::default()).equal_elem(2);
        batch.target = batch.target.mask_fill(third, label);
        let expected = Error::NonFiniteData { count: 1, ids: "102".into() };
        assert_eq!(learner.estimate(&batch).err(), Some(expected.clone()), "{label}");
        let backprop = BackpropLearner::new(zoo(1));
        assert!(TrainStep::step(&backprop, batch).grads.is_empty());
        assert_eq!(backprop.monitor().error(), Some(expected), "{label}");
        assert!(!TrainStep::step(&backprop, zoo_batch::<B>(4, 0)).grads.is_empty());
    }
}

/// A loss of one's own may leave out what has no label: such an example has signals all the same.
#[test]
fn examples_without_a_label_have_signals() {
    let logits = Tensor::<B, 2>::from_data([[0f32, 0.0], [0.0, 0.0]], &Default::default());
    let labels = Tensor::from_data([1i64, -1], &Default::default());
    let signals = zoo(1).valid().error_signals(&logits, &labels).unwrap();
    assert_eq!(signals.into_data().to_vec::<f32>().unwrap(), [0.5, -0.5, 0.5, 0.5]);
}

/// An estimate that follows a prediction needs something to predict from.
#[test]
fn a_biased_estimate_without_signals_is_refused() {
    for estimate in GradientEstimate::ALL.into_iter().filter(|estimate| estimate.is_biased()) {
        let learner = learner(Fault::Nothing, Space::activation().with_estimate(estimate).unwrap(), 0.01);
        let expected = Error::NoSignals { estimate: estimate.name() };
        assert_eq!(learner.check(&batch(4, 0)), Err(expected), "{estimate}");
    }
}

/// A learning rate that would spoil the parameters leaves them, and the step, as they are.
#[test]
fn a_learning_rate_that_is_no_number_is_refused() {
    for lr in [f64::NAN, f64::INFINITY, -0.1] {
        let learner = learner(Fault::Nothing, Space::activation(), 0.01);
        let mut optimizer = SgdConfig::new().init();
        let grads = || learner.estimate(&batch(4, 0)).unwrap().grads;
        let error = learner.clone().update(&mut optimizer, lr, grads()).err().unwrap().to_string();
        assert_eq!(error, format!("invalid setting: lr = {lr}; use a finite learning rate, 0 or above"));
        assert_eq!(learner.monitor().error().map(|error| error.to_string()), Some(error));
        assert_eq!(learner.clone().update(&mut optimizer, 0.1, grads()).unwrap().state().step, 1);
    }
}

#[test]
fn only_errors_that_may_pass_let_training_go_on() {
    let may = [
        Error::EmptyBatch,
        Error::Model { why: "timeout".into() },
        Error::NonFiniteData { count: 1, ids: "3".into() },
        Error::Diverged { evidence: String::new(), sigma: 0.01, lr: 0.1 },
    ];
    assert!(may.iter().all(Error::may_pass));
    assert!(![Error::NothingTrained, Error::ForeignUpdate { allocator: "uniform" }].iter().any(Error::may_pass));
}
