//! Steps of other shapes: what was learned is kept by site and width, and nothing panics.

use burn::module::AutodiffModule;
use burn::optim::{AdamConfig, Optimizer, SgdConfig};
use burn::prelude::*;
use burn::record::{DefaultRecorder, Recorder};
use burn::train::TrainStep;

use crate::allocator::{Allocation, GaussianAllocator, GaussianAllocatorConfig, QueryBudget};
use crate::control_variate::GradientEstimate;
use crate::estimator::trained_parameters;
use crate::model::ForwardModel;
use crate::testing::{AB, B, Zoo, padded_batch, weights, zoo};
use crate::train::*;

type Learner = ForwardLearner<AB, Zoo<AB>, GaussianAllocator<AB>>;

/// The default configuration.
fn learner(model: Zoo<AB>) -> Learner {
    let allocator = GaussianAllocatorConfig::new().init(&Default::default()).unwrap();
    ForwardLearner::new(model, allocator, ForwardConfig::new(QueryBudget::new(6, 1).unwrap()).with_seed(3)).unwrap()
}

/// A step for each number of words that batches of eight examples are padded to.
fn train(mut learner: Learner, optimizer: &mut impl Optimizer<Learner, AB>, words: &[usize]) -> Learner {
    for (i, &words) in words.iter().enumerate() {
        let ids: Vec<u64> = (0..8).map(|j| (5 * i as u64 + j) % 20).collect();
        let output = TrainStep::step(&learner, padded_batch(&ids, words));
        assert_eq!(learner.monitor().error(), None);
        assert!(!output.grads.is_empty());
        learner = learner.optimize::<AB, _>(optimizer, 0.02, output.grads);
    }
    learner
}

/// Coordinates of the sites whose weights are kept.
fn kept(learner: &Learner) -> Vec<usize> {
    let mut kept: Vec<_> = learner.state().gradient_predictor.kept().iter().map(|k| k.1).collect();
    kept.sort();
    kept
}

/// The four patches and the class token come before the words; all have three values.
///
/// Convolution, class token and head have the same width whatever the length. Table, norm and mix
/// have one for each length.
#[test]
fn batches_of_other_lengths_train_in_the_default_configuration() {
    let mut optimizer = AdamConfig::new().init();
    let before = learner(zoo(1));
    let start = weights(&before.model.valid());
    let trained = train(before, &mut optimizer, &[5, 5, 7]);
    assert_eq!(trained.state().gradient_predictor.kept().len(), 3 + 2 * 3);
    assert_ne!(weights(&trained.model.valid()), start);
    assert!(kept(&trained).contains(&30) && kept(&trained).contains(&36), "{:?}", kept(&trained));
    // a length that comes back finds its state
    let trained = train(trained, &mut optimizer, &[5, 9, 7, 5]);
    assert_eq!(trained.state().gradient_predictor.kept().len(), 3 + 3 * 3);
    assert_eq!(trained.state().sites.moments().len(), 6, "second moments have no width");
    assert!(weights(&trained.model.valid()).iter().all(|w| w.is_finite()));
}

/// After steps of five words, a step of seven has predictions at the sites that do not depend on
/// the length. The estimate at the others is bit for bit that without a prediction.
#[test]
fn a_site_of_a_new_width_has_no_prediction_in_this_step() {
    let trained = train(learner(zoo(1)), &mut SgdConfig::new().init(), &[5; 12]);
    let (model, parameters) = (trained.model.valid(), trained_parameters(&trained.model));
    let predictor = &trained.state().gradient_predictor;
    let estimator = &trained.config().estimator;
    let gradients = |words: usize, predicts: bool| {
        let batch = padded_batch::<B>(&[0, 1, 2, 3, 4, 5, 6, 7], words);
        let mut clean = estimator.clean(&model, &batch, &parameters).unwrap();
        let signals = model.error_signals(&clean.output, &clean.target);
        let outputs = model.signal_outputs(&clean.output, &clean.target);
        let prediction = predictor.predict(signals, outputs, clean.sites(), GradientEstimate::Unbiased);
        clean.set_prediction(prediction.filter(|_| predicts));
        let allocation = Allocation::uniform(8, &QueryBudget::new(30, 1).unwrap());
        let estimate = clean.estimate(&allocation, 0).unwrap();
        let values = |g: Option<Tensor<B, 2>>| g.unwrap().into_data().to_vec::<f32>().unwrap();
        [&model.table.weight, &model.mix.weight, &model.head.weight].map(|weight| values(estimate.gradient(weight)))
    };
    let ([table, mix, head], [table_without, mix_without, head_without]) = (gradients(7, true), gradients(7, false));
    assert_eq!((table, mix), (table_without, mix_without));
    assert_ne!(head, head_without);
    // at the length that was seen, all three are predicted
    let (with, without) = (gradients(5, true), gradients(5, false));
    assert!(with.iter().zip(&without).all(|(a, b)| a != b));
}

/// A run over batches of several lengths ends on the same bits after a checkpoint.
#[test]
fn a_run_over_several_lengths_resumes_on_the_same_bits() {
    let device = Default::default();
    let mut optimizer = AdamConfig::new().init();
    let half = train(learner(zoo(1)), &mut optimizer, &[5, 5, 7, 6]);
    let folder = tempfile::tempdir().unwrap();
    let recorder = DefaultRecorder::new();
    Recorder::<AB>::record(&recorder, half.clone().into_record(), folder.path().join("model")).unwrap();
    Recorder::<AB>::record(&recorder, optimizer.to_record(), folder.path().join("optimizer")).unwrap();
    let rest = [7, 5, 8, 6, 5];
    let uninterrupted = train(half, &mut optimizer, &rest);

    let record = Recorder::<AB>::load(&recorder, folder.path().join("model"), &device).unwrap();
    let resumed = learner(zoo(1)).load_record(record);
    let record = Recorder::<AB>::load(&recorder, folder.path().join("optimizer"), &device).unwrap();
    let mut optimizer = AdamConfig::new().init().load_record(record);
    let resumed = train(resumed, &mut optimizer, &rest);
    assert_eq!(weights(&resumed.model.valid()), weights(&uninterrupted.model.valid()));
    assert_eq!(resumed.state().sites, uninterrupted.state().sites);
    let states = [&resumed, &uninterrupted].map(|l| serde_json::to_string(&l.state().gradient_predictor).unwrap());
    assert_eq!(states[0], states[1]);
}

/// A run of the head alone that then trains a layer more, and later the head alone again.
#[test]
fn a_layer_that_joins_leaves_the_state_of_the_head() {
    let full = zoo(1);
    let before = learner(Zoo { head: full.head.clone(), ..full.clone().no_grad() });
    let mut optimizer = SgdConfig::new().init();
    let mut head = train(before, &mut optimizer, &[3; 6]);
    assert_eq!(kept(&head), [3]);
    let moment = head.state().sites.moments()[0];
    head.model.mix = full.mix.clone();
    let start = weights(&head.model.mix.valid());
    // four patches, the class token and three words
    let both = train(head.clone(), &mut optimizer, &[3]);
    assert_eq!(kept(&both), [3, 24]);
    assert_ne!(weights(&both.model.mix.valid()), start);
    let moments = both.state().sites.moments();
    assert_eq!(moments.len(), 2);
    assert!(moments[0] > 0.0 && moments[0] != moment && moments[1].is_finite(), "{moment}, then {moments:?}");
    let mut again = train(both, &mut optimizer, &[3; 2]);
    again.model.mix = again.model.mix.clone().no_grad();
    let again = train(again, &mut optimizer, &[3; 2]);
    assert_eq!(kept(&again), [3, 24]);
}
