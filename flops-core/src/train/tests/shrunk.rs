//! Shrunk estimates: their error, what they report, and what they leave alone.

use burn::module::AutodiffModule;
use burn::optim::{AdamConfig, SgdConfig};
use burn::prelude::*;
use burn::train::TrainStep;

use crate::allocator::{Allocation, QueryBudget, Uniform};
use crate::control_variate::{ControlVariate, GradientEstimate, Prediction};
use crate::estimator::{Estimator, Space, trained_parameters};
use crate::model::ForwardModel;
use crate::noise::Placement;
use crate::testing::{AB, B, Zoo, weights, zoo, zoo_batch};
use crate::train::*;

type Learner = ForwardLearner<AB, Zoo<AB>, Uniform>;

const EXAMPLES: usize = 24;

fn shrunk() -> Space {
    Space::activation().with_estimate(GradientEstimate::Shrunk).unwrap()
}

fn learner(space: Space, queries: usize) -> Learner {
    let config = ForwardConfig::new(QueryBudget::new(queries, 1).unwrap()).with_seed(3).with_space(space);
    ForwardLearner::new(zoo(1), Uniform, config).unwrap()
}

/// Steps on one batch at this rate.
fn train(mut learner: Learner, steps: usize, lr: f64) -> Learner {
    let mut optimizer = SgdConfig::new().init();
    for _ in 0..steps {
        let output = TrainStep::step(&learner, zoo_batch::<B>(EXAMPLES, 1));
        assert_eq!(learner.monitor().error(), None);
        learner = learner.optimize::<AB, _>(&mut optimizer, lr, output.grads);
    }
    learner
}

/// The mean squared error of a gradient, of three estimates of one predictor.
///
/// The model stands still while the predictor learns, over 300 steps. The error is the mean over 200
/// further estimates, against autodiff's gradient: shrunk, with α = 1 and independent noise
/// (unbiased), and with α = 0 (the prediction alone). The seed is fixed; the three differ by more
/// than ten standard errors.
#[test]
fn a_shrunk_estimate_has_less_error_than_what_it_is_made_of() {
    let learner = train(learner(shrunk(), 16), 300, 0.0);
    let (model, trained) = (learner.model.valid(), trained_parameters(&learner.model));
    let batch = zoo_batch::<B>(EXAMPLES, 1);
    let truth = {
        let batch = zoo_batch::<AB>(EXAMPLES, 1);
        let output = learner.model.forward(batch.input, &mut crate::Probe::clean());
        learner.model.losses(output, batch.target).mean().backward()
    };
    let exact = |id| -> Vec<f64> {
        struct Find<'a>(&'a <AB as burn::tensor::backend::AutodiffBackend>::Gradients, burn::module::ParamId, Vec<f64>);
        impl burn::module::ModuleVisitor<AB> for Find<'_> {
            fn visit_float<const D: usize>(&mut self, param: &burn::module::Param<Tensor<AB, D>>) {
                if param.id == self.1
                    && let Some(g) = param.val().grad(self.0)
                {
                    self.2 = g.into_data().iter::<f64>().collect();
                }
            }
        }
        let mut find = Find(&truth, id, vec![]);
        burn::module::Module::visit(&learner.model, &mut find);
        find.2
    };
    let predictor = &learner.state().gradient_predictor;
    let error = |space: Space, change: &dyn Fn(Prediction) -> Prediction| {
        let estimator = Estimator { space, ..learner.config().estimator.clone() };
        let mut clean = estimator.clean(&model, &batch, &trained).unwrap();
        let signals = model.error_signals(&clean.output, &clean.target);
        let outputs = model.signal_outputs(&clean.output, &clean.target);
        let prediction = predictor.predict(signals, outputs, clean.sites(), space.estimate()).unwrap();
        clean.set_prediction(Some(change(prediction)));
        let allocation = Allocation::uniform(EXAMPLES, &QueryBudget::new(16, 1).unwrap());
        let errors = (1000..1200).map(|step| {
            let estimate = clean.estimate(&allocation, step).unwrap();
            trained
                .iter()
                .map(|&id| {
                    let estimated: Vec<f64> = match estimate.gradients.get(id) {
                        Some(g) => g.to_data().iter::<f64>().collect(),
                        None => vec![0.0; exact(id).len()],
                    };
                    estimated.iter().zip(exact(id)).map(|(e, t)| (e - t).powi(2)).sum::<f64>()
                })
                .sum::<f64>()
        });
        errors.sum::<f64>() / 200.0
    };
    let both = error(shrunk(), &|prediction| prediction);
    let unbiased = error(Space::activation(), &|prediction| prediction);
    let alone = error(shrunk(), &|prediction| prediction.with_alpha(0.0));
    assert!(
        both < 0.9 * unbiased && both < 0.9 * alone,
        "shrunk {both}, unbiased {unbiased}, prediction alone {alone}"
    );
}

/// α is 1 without shrinkage, and between 0 and 1 with it; reports have it by site, the metrics its
/// mean.
#[test]
fn reports_tell_what_is_biased() {
    for (space, biased) in [(Space::activation(), false), (shrunk(), true)] {
        let learner = train(learner(space, 2), 12, 0.01);
        let output = TrainStep::step(&learner, zoo_batch::<B>(EXAMPLES, 1));
        let stats = output.item.stats.unwrap();
        let report = learner.monitor().take_reports().pop().unwrap();
        assert_eq!(report.sites.len(), 6);
        assert!(report.sites.iter().all(|site| (0.0..=1.0).contains(&site.explained)), "{:?}", report.sites);
        assert_eq!(report.sites.iter().any(|site| site.alpha < 1.0), biased, "{:?}", report.sites);
        let mean = report.sites.iter().map(|site| site.alpha).sum::<f64>() / 6.0;
        assert_eq!((stats.alpha, stats.alpha < 1.0), (mean, biased));
        assert!(stats.explained > 0.0);
    }
}

/// Without anything that predicts, and with examples too few to compare halves, a shrunk estimate
/// still trains: α is 1 where it cannot be measured.
#[test]
fn nothing_stands_still_for_want_of_a_measurement() {
    for (control_variate, examples) in
        [(ControlVariate::None, EXAMPLES), (ControlVariate::Prediction, 1), (ControlVariate::None, 1)]
    {
        let mut learner = learner(shrunk().with_control_variate(control_variate).unwrap(), 6);
        let (mut optimizer, start) = (AdamConfig::new().init(), weights(&learner.model.valid()));
        for i in 0..12 {
            let output = TrainStep::step(&learner, zoo_batch::<B>(examples, i));
            assert_eq!(learner.monitor().error(), None);
            learner = learner.optimize::<AB, _>(&mut optimizer, 0.01, output.grads);
        }
        assert_ne!(weights(&learner.model.valid()), start, "{control_variate}, {examples} examples");
    }
}

/// Shrunk estimates have the same bits on any number of threads.
#[test]
fn shrunk_steps_do_not_depend_on_threads() {
    let run = |threads: usize| {
        let config = learner(shrunk(), 3).config().clone().with_threads(threads).with_max_rows(32);
        let learner = ForwardLearner::new(zoo(1), Uniform, config).unwrap();
        weights(&train(learner, 10, 0.02).model.valid())
    };
    assert_eq!(run(1), run(3));
}

/// Several steps before an update are one correction of the weights, and noise on all sites at once
/// corrects each by its part: neither diverges.
///
/// What is learned stays right within a fifth: the gain is the regression of what queries show on
/// what was predicted.
#[test]
fn weights_stay_right_under_accumulation_and_joint_noise() {
    let joint = Space::activation().with_placement(Placement::Joint).unwrap();
    for (space, steps) in [(Space::activation(), 4), (joint, 1), (joint, 3)] {
        let mut learner = learner(space, 12);
        let mut optimizer = SgdConfig::new().init();
        for _ in 0..150 {
            let mut grads = None;
            for _ in 0..steps {
                grads = Some(TrainStep::step(&learner, zoo_batch::<B>(EXAMPLES, 1)).grads);
            }
            assert_eq!(learner.monitor().error(), None);
            learner = learner.optimize::<AB, _>(&mut optimizer, 0.0, grads.unwrap());
        }
        learner.step(zoo_batch::<B>(EXAMPLES, 1));
        let report = learner.monitor().take_reports().pop().unwrap();
        let gains: Vec<f64> = report.sites.iter().map(|site| site.gain).collect();
        assert!(gains.iter().all(|gain| *gain > 0.8), "{steps} steps, {space:?}: {gains:?}");
        assert!(learner.state().step == 150, "one update each");
    }
}
