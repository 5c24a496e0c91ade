//! Dropout and batch normalisation in the learners: the same masks and statistics in both.

use burn::module::{AutodiffModule, Module};
use burn::nn::{BatchNorm, BatchNormConfig, Dropout, DropoutConfig, Linear, LinearConfig};
use burn::optim::{AdamConfig, SgdConfig};
use burn::prelude::*;
use burn::record::{DefaultRecorder, Recorder};
use burn::train::TrainStep;

use crate::allocator::{QueryBudget, Uniform};
use crate::batch::Batch;
use crate::losses::cross_entropy;
use crate::model::ForwardModel;
use crate::probe::Probe;
use crate::testing::{AB, B, reseeded, weights};
use crate::train::*;

const DIM: usize = 4;

/// Three stages of two layers each; the frozen ones end in a dropout.
#[derive(Module, Debug)]
struct Net<B: Backend> {
    stem: Linear<B>,
    middle: Linear<B>,
    norm: BatchNorm<B>,
    head: Linear<B>,
    dropout: Dropout,
}

impl<B: Backend> ForwardModel<B> for Net<B> {
    type Input = Tensor<B, 2>;
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let x = probe.stage(x, |x, probe| probe.linear(&self.stem, x).tanh());
        let x = probe.stage(x, |x, probe| {
            let h = probe.linear(&self.middle, x);
            probe.dropout(&self.dropout, h.tanh())
        });
        let x = probe.stage(x, |x, probe| {
            let h = probe.batch_norm(&self.norm, x);
            probe.dropout(&self.dropout, h)
        });
        probe.linear(&self.head, x)
    }

    fn losses(&self, logits: Tensor<B, 2>, target: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        cross_entropy(logits, target)
    }
}

fn net() -> Net<AB> {
    let device = Default::default();
    let square = || LinearConfig::new(DIM, DIM).init(&device);
    let net = Net {
        stem: square(),
        middle: square(),
        norm: BatchNormConfig::new(DIM).init(&device),
        head: LinearConfig::new(DIM, 3).init(&device),
        dropout: DropoutConfig::new(0.4).init(),
    };
    let norm = net.norm.clone();
    // the running statistics stay 0 and 1: a variance cannot be negative
    let mut net = Net { norm: BatchNormConfig::new(DIM).init(&device), ..reseeded(net, 4) };
    (net.norm.gamma, net.norm.beta) = (norm.gamma, norm.beta);
    net.stem = net.stem.no_grad();
    net.middle = net.middle.no_grad();
    net
}

fn batch() -> Batch<Tensor<B, 2>, Tensor<B, 1, Int>> {
    let device = Default::default();
    let x = (0..5 * DIM).map(|i| (i as f32 * 1.7).sin()).collect();
    Batch {
        ids: vec![3, 1, 4, 15, 9],
        input: Tensor::from_data(TensorData::new(x, [5, DIM]), &device),
        target: Tensor::from_ints([0, 1, 2, 0, 1], &device),
    }
}

fn forward_learner(cache: usize) -> ForwardLearner<AB, Net<AB>, Uniform> {
    let config = ForwardConfig::new(QueryBudget::new(6, 1).unwrap()).with_seed(3).with_prefix_cache(cache);
    ForwardLearner::new(net(), Uniform, config).unwrap()
}

fn values(losses: Tensor<impl Backend, 1>) -> Vec<f64> {
    losses.into_data().iter::<f64>().collect()
}

/// Same seed, step and ids: the clean losses of both learners agree, step by step.
#[test]
fn the_baseline_draws_the_masks_of_the_forward_learner() {
    let mut forward = forward_learner(0);
    let mut backprop = BackpropLearner::new(net()).with_seed(3);
    let (mut a, mut b) = (SgdConfig::new().init(), SgdConfig::new().init());
    let mut earlier = vec![];
    for _ in 0..3 {
        let of_forward = TrainStep::step(&forward, batch());
        let of_backprop = TrainStep::step(&backprop, batch());
        let losses = values(of_forward.item.losses);
        for (f, b) in losses.iter().zip(values(of_backprop.item.losses)) {
            assert!((f - b).abs() < 1e-6, "{f}, by backpropagation {b}");
        }
        assert_ne!(losses, earlier, "another step has another mask");
        earlier = losses;
        // nothing moves at this rate, so that the masks alone differ from step to step
        forward = forward.optimize::<AB, _>(&mut a, 0.0, of_forward.grads);
        backprop = backprop.optimize::<AB, _>(&mut b, 0.0, of_backprop.grads);
    }
    let statistics = |net: &Net<AB>| {
        values(Tensor::cat(vec![net.norm.running_mean.value_sync(), net.norm.running_var.value_sync()], 0))
    };
    assert_eq!(statistics(&backprop.model), [[0.0; DIM], [1.0; DIM]].concat());
    assert_eq!(statistics(&forward.model), [[0.0; DIM], [1.0; DIM]].concat());
}

/// A cached prefix ends in front of the first dropout: the bits are those of a run without cache.
#[test]
fn a_prefix_cache_keeps_no_mask() {
    let run = |cache| {
        let mut learner = forward_learner(cache);
        let mut optimizer = AdamConfig::new().init();
        for _ in 0..4 {
            let output = TrainStep::step(&learner, batch());
            learner = learner.optimize::<AB, _>(&mut optimizer, 0.02, output.grads);
        }
        (learner.prefixes.training.len(), weights(&learner.model.valid()))
    };
    let ((cached, with_cache), (none, without)) = (run(100), run(0));
    assert_eq!((cached, none), (5, 0));
    assert_eq!(with_cache, without);
    let backprop = |cache| {
        let mut learner = BackpropLearner::new(net()).with_seed(3).with_prefix_cache(cache);
        let mut optimizer = AdamConfig::new().init();
        for _ in 0..4 {
            let output = TrainStep::step(&learner, batch());
            learner = learner.optimize::<AB, _>(&mut optimizer, 0.02, output.grads);
        }
        weights(&learner.model.valid())
    };
    assert_eq!(backprop(100), backprop(0));
}

/// The baseline's checkpoint holds its steps: a resumed run draws the masks that were next.
#[test]
fn a_resumed_baseline_draws_the_next_masks() {
    let step = |learner: BackpropLearner<AB, Net<AB>>| {
        let output = TrainStep::step(&learner, batch());
        let mut optimizer = SgdConfig::new().init();
        (values(output.item.losses), learner.optimize::<AB, _>(&mut optimizer, 0.0, output.grads))
    };
    let learner = BackpropLearner::new(net()).with_seed(3);
    let (first, learner) = step(learner);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("learner");
    DefaultRecorder::new().record(learner.clone().into_record(), file.clone()).unwrap();
    let record = DefaultRecorder::new().load(file, &Default::default()).unwrap();
    let resumed = BackpropLearner::new(net()).with_seed(3).load_record(record);
    let (next, _) = step(learner);
    assert_ne!(next, first);
    assert_eq!(step(resumed).0, next);
}
