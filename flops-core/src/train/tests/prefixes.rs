//! Cached prefixes: the right values for every padding and trained set, and what they save.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::module::{AutodiffModule, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamConfig, Optimizer, SgdConfig};
use burn::prelude::*;
use burn::train::{InferenceStep, TrainStep};

use crate::allocator::{QueryBudget, Uniform};
use crate::batch::Batch;
use crate::losses::cross_entropy;
use crate::model::ForwardModel;
use crate::probe::Probe;
use crate::testing::{AB, B, Zoo, padded_batch, weights, zoo};
use crate::train::*;

type Learner = ForwardLearner<AB, Zoo<AB>, Uniform>;

fn learner(model: Zoo<AB>, cache: usize) -> Learner {
    let config = ForwardConfig::new(QueryBudget::new(6, 1).unwrap()).with_seed(3);
    ForwardLearner::new(model, Uniform, config.with_prefix_cache(cache).with_evaluation_cache(cache)).unwrap()
}

fn losses(learner: &Learner, batch: crate::testing::ZooBatch<B>) -> Vec<f32> {
    InferenceStep::step(&learner.valid(), batch).losses.into_data().to_vec().unwrap()
}

/// One step; returns the learner and the clean losses.
fn step(
    learner: Learner,
    optimizer: &mut impl Optimizer<Learner, AB>,
    batch: crate::testing::ZooBatch<B>,
) -> (Learner, Vec<f32>) {
    let output = TrainStep::step(&learner, batch);
    assert_eq!(learner.monitor().error(), None);
    let clean = output.item.losses.into_data().to_vec().unwrap();
    (learner.optimize::<AB, _>(optimizer, 0.05, output.grads), clean)
}

/// A layer joins and leaves again: with caches everything is as without.
///
/// Prefixes of the head alone lie behind the middle layers. They are stale while these are trained,
/// and after that too, for the layers have moved.
#[test]
fn a_prefix_is_stale_after_the_trained_set_changed() {
    let full = zoo(1);
    let run = |cache: usize, all: bool| {
        let mut learner = learner(Zoo { head: full.head.clone(), ..full.clone().no_grad() }, cache);
        let (mut optimizer, mut seen) = (SgdConfig::new().init(), vec![]);
        let mut mix = vec![weights(&learner.model.mix.valid())];
        for phase in 0..3 {
            if phase == 1 && all {
                learner.model = full.clone();
            } else if phase == 1 {
                learner.model.mix = full.mix.clone();
            }
            if phase == 2 {
                mix.push(weights(&learner.model.mix.valid()));
                let head = learner.model.head.clone();
                learner.model = Zoo { head, ..learner.model.clone().no_grad() };
            }
            for _ in 0..2 {
                let (after, clean) = step(learner, &mut optimizer, padded_batch(&[0, 1, 2, 3, 4], 3));
                learner = after;
                seen.extend([clean, losses(&learner, padded_batch(&[3, 4, 5, 6], 3))]);
            }
        }
        assert_ne!(mix[0], mix[1], "the layer has moved");
        (seen, weights(&learner.model.valid()))
    };
    // where all layers train, nothing is cached in between
    for all in [false, true] {
        assert_eq!(run(100, all), run(0, all), "all layers: {all}");
    }
}

/// Batches of other paddings, with examples in common: with caches everything is as without.
///
/// The padding reaches the output, so a prefix of another padding would show.
#[test]
fn a_prefix_is_used_in_its_own_padding_alone() {
    let run = |cache: usize| {
        let mut model = zoo(1);
        model.conv = model.conv.no_grad();
        model.table = model.table.no_grad();
        model.cls = model.cls.no_grad();
        let mut learner = learner(model, cache);
        let (mut optimizer, mut seen) = (AdamConfig::new().init(), vec![]);
        for (words, first) in [(5, 0), (5, 3), (7, 0), (5, 2), (7, 5), (7, 0), (5, 0)] {
            let ids: Vec<u64> = (first..first + 8).collect();
            let (after, clean) = step(learner, &mut optimizer, padded_batch(&ids, words));
            learner = after;
            seen.push(clean);
            for words in [4, 6] {
                seen.push(losses(&learner, padded_batch(&ids, words)));
            }
        }
        let kept = [&learner.prefixes.training, &learner.prefixes.evaluation].map(|cache| cache.len());
        (seen, weights(&learner.model.valid()), kept)
    };
    let (without, with) = (run(0), run(1000));
    close(&with.0, &without.0);
    assert!(with.1.iter().zip(&without.1).all(|(a, b)| (a - b).abs() < 1e-5), "{:?} and {:?}", with.1, without.1);
    // ids 0 to 10 with five words, 0 to 12 with seven; evaluated 0 to 12 with four and with six
    assert_eq!((without.2, with.2), ([0, 0], [11 + 13, 2 * 13]));
    // without room, an example changes to the padding in which it came last
    let narrow = run(8);
    close(&narrow.0, &without.0);
    assert_eq!(narrow.2, [8, 8]);
}

/// A table of one row for all, which a frozen stage adds, and a layer.
#[derive(Module, Debug)]
struct Shared<B: Backend> {
    table: Param<Tensor<B, 2>>,
    fc: Linear<B>,
    /// Whether the sum is a stage, or the table's is the last.
    joined_in_a_stage: bool,
}

impl<B: Backend> ForwardModel<B> for Shared<B> {
    type Input = Tensor<B, 2>;
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let table = probe.stage(x.clone(), |_, _| self.table.val());
        let join = |(x, table): (Tensor<B, 2>, Tensor<B, 2>), _: &mut Probe<B>| x + table;
        let x = if self.joined_in_a_stage { probe.stage((x, table), join) } else { join((x, table), probe) };
        probe.linear(&self.fc, x)
    }

    fn losses(&self, logits: Tensor<B, 2>, target: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        cross_entropy(logits, target)
    }
}

/// The forward learner refuses a stage without a row per example. The baseline trains on it, and
/// keeps no prefix behind it.
#[test]
fn the_baseline_caches_nothing_behind_a_stage_of_one_row() {
    let device = Default::default();
    let fc = LinearConfig::new(3, 2).with_initializer(burn::nn::Initializer::Constant { value: 0.3 }).init(&device);
    let table = Param::from_tensor(Tensor::<AB, 2>::ones([1, 3], &device)).no_grad();
    let run = |cache: usize, joined_in_a_stage: bool| {
        let model = Shared { table: table.clone(), fc: Clone::clone(&fc), joined_in_a_stage };
        let mut learner = BackpropLearner::new(model).with_prefix_cache(cache).with_evaluation_cache(cache);
        let mut optimizer = SgdConfig::new().init();
        let mut seen = vec![];
        for _ in 0..3 {
            let batch = || {
                let input = Tensor::<B, 1, Int>::arange(0..12, &device).float().reshape([4, 3]).sin();
                Batch { ids: vec![0, 1, 2, 3], input, target: Tensor::from_ints([0, 1, 1, 0], &device) }
            };
            let output = TrainStep::step(&learner, batch());
            learner = learner.optimize::<AB, _>(&mut optimizer, 0.5, output.grads);
            seen.extend(InferenceStep::step(&learner, batch().lift::<AB>()).losses.into_data().iter::<f32>());
        }
        seen
    };
    for joined in [false, true] {
        let without = run(0, joined);
        assert_eq!(run(100, joined), without, "{joined}");
        assert_ne!(without[..4], without[8..], "it learns");
    }
}

/// Passes of other sizes may round differently, in the last bits.
fn close(a: &[Vec<f32>], b: &[Vec<f32>]) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert!(a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5), "{a:?} and {b:?}");
    }
}

/// A frozen layer that counts its rows, and a head.
#[derive(Module, Debug)]
struct Counting<B: Backend> {
    frozen: Linear<B>,
    head: Linear<B>,
    #[module(skip)]
    rows: Arc<AtomicUsize>,
}

impl<B: Backend> ForwardModel<B> for Counting<B> {
    type Input = Tensor<B, 2>;
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;
    fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let x = probe.stage(x, |x, probe| {
            self.rows.fetch_add(x.dims()[0], Ordering::Relaxed);
            probe.linear(&self.frozen, x).tanh()
        });
        probe.linear(&self.head, x)
    }
    fn losses(&self, y: Tensor<B, 2>, t: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        cross_entropy(y, t)
    }
    fn classification(&self, o: &Tensor<B, 2>, t: &Tensor<B, 1, Int>) -> Option<(Tensor<B, 2>, Tensor<B, 1, Int>)> {
        Some((o.clone(), t.clone()))
    }
}

/// A layer without bias, of fixed weights.
fn layer(inputs: usize, outputs: usize) -> Linear<AB> {
    let device = Default::default();
    let layer: Linear<AB> = LinearConfig::new(inputs, outputs).with_bias(false).init(&device);
    let values: Vec<f32> = (0..inputs * outputs).map(|i| (2.3 * i as f32 + inputs as f32).sin()).collect();
    let values = Tensor::from_data(TensorData::new(values, [inputs, outputs]), &device);
    Linear { weight: layer.weight.map(|w| values.clone().set_require_grad(w.is_require_grad())), ..layer }
}

fn counting() -> Counting<AB> {
    Counting { frozen: layer(6, 8).no_grad(), head: layer(8, 3), rows: Arc::default() }
}

fn points(ids: &[u64]) -> Batch<Tensor<B, 2>, Tensor<B, 1, Int>> {
    let device = Default::default();
    let x: Vec<f32> = ids.iter().flat_map(|&id| (0..6).map(move |i| (i as f32 + 1.7 * id as f32).sin())).collect();
    let labels: Vec<i32> = ids.iter().map(|id| (id % 3) as i32).collect();
    Batch {
        ids: ids.to_vec(),
        input: Tensor::from_data(TensorData::new(x, [ids.len(), 6]), &device),
        target: Tensor::from_data(TensorData::new(labels, [ids.len()]), &device),
    }
}

/// The batches of an epoch over 40 examples, in an order of its own.
fn epoch(epoch: u64) -> Vec<Vec<u64>> {
    let order: Vec<u64> = (0..40).map(|i| (i * 7 + 11 * epoch) % 40).collect();
    order.chunks(10).map(<[u64]>::to_vec).collect()
}

/// With room for 36 of 40 examples, an epoch runs the frozen layer on 4 rows instead of on 40.
///
/// That holds in training with and without backpropagation, and in evaluation. The values are those
/// of runs without a cache.
#[test]
fn room_for_a_part_of_the_data_saves_that_part() {
    let forward = |cache: usize, evaluated: usize| {
        let config = ForwardConfig::new(QueryBudget::new(6, 1).unwrap()).with_seed(3);
        let config = config.with_prefix_cache(cache).with_evaluation_cache(evaluated);
        let mut learner = ForwardLearner::new(counting(), Uniform, config).unwrap();
        let (mut optimizer, mut rows, mut seen) = (SgdConfig::new().init(), vec![], vec![]);
        for i in 0..4 {
            for ids in epoch(i) {
                let output = TrainStep::step(&learner, points(&ids));
                assert_eq!(learner.monitor().error(), None);
                learner = learner.optimize::<AB, _>(&mut optimizer, 0.05, output.grads);
            }
            rows.push(learner.model.rows.swap(0, Ordering::Relaxed));
            for ids in epoch(10 + i) {
                let output = InferenceStep::step(&learner.valid(), points(&ids));
                seen.push(output.losses.into_data().to_vec().unwrap());
            }
            rows.push(learner.model.rows.swap(0, Ordering::Relaxed));
        }
        (rows, seen)
    };
    // the first step runs some examples once more, to check the model
    let (without, values) = forward(0, 0);
    assert_eq!(without[1..], [40; 7], "evaluation runs all rows, and so do later epochs");
    for (kept, left) in [(36, 4), (40, 0), (20, 20)] {
        let (with, same) = forward(kept, kept);
        assert_eq!(with[1..], [40, left, left, left, left, left, left], "room for {kept}");
        close(&same, &values);
    }

    let backprop = |cache: usize| {
        let mut learner = BackpropLearner::new(counting()).with_prefix_cache(cache);
        let (mut optimizer, mut rows, mut seen) = (SgdConfig::new().init(), vec![], vec![]);
        for i in 0..3 {
            for ids in epoch(i) {
                let output = TrainStep::step(&learner, points(&ids));
                seen.push(output.item.losses.into_data().to_vec().unwrap());
                learner = learner.optimize::<AB, _>(&mut optimizer, 0.05, output.grads);
            }
            rows.push(learner.model.rows.swap(0, Ordering::Relaxed));
        }
        (rows, seen)
    };
    let ((without, values), (with, same)) = (backprop(0), backprop(36));
    assert_eq!((without, with), (vec![40; 3], vec![40, 4, 4]));
    close(&same, &values);
}

/// A frozen layer, a trained one whose padding is masked, and a head on the mean of the real tokens.
#[derive(Module, Debug)]
struct Masked<B: Backend> {
    frozen: Linear<B>,
    mix: Linear<B>,
    head: Linear<B>,
}

impl<B: Backend> ForwardModel<B> for Masked<B> {
    type Input = (Tensor<B, 3>, Tensor<B, 2, Int>);
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;
    fn forward(&self, (x, mask): Self::Input, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let x = probe.stage(x, |x, probe| probe.linear(&self.frozen, x).tanh());
        let x = probe.masked(mask.clone(), |probe| probe.linear(&self.mix, x).tanh());
        let [examples, tokens] = mask.dims();
        let real = mask.float().reshape([examples, tokens, 1]);
        let [x, real] = probe.align([x, real]);
        let x = (x * real.clone()).sum_dim(1) / real.sum_dim(1);
        probe.linear(&self.head, x.squeeze_dim::<2>(1))
    }
    fn losses(&self, y: Tensor<B, 2>, t: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        cross_entropy(y, t)
    }
    fn classification(&self, o: &Tensor<B, 2>, t: &Tensor<B, 1, Int>) -> Option<(Tensor<B, 2>, Tensor<B, 1, Int>)> {
        Some((o.clone(), t.clone()))
    }
}

/// Token masks keep to their examples where only some of a batch are cached: the control variate
/// learns the same with room for a part of the data as without a cache.
#[test]
fn masks_keep_to_their_examples_behind_cached_prefixes() {
    let device = Default::default();
    let run = |cache: usize| {
        let model = Masked { frozen: layer(4, 5).no_grad(), mix: layer(5, 4), head: layer(4, 3) };
        let config = ForwardConfig::new(QueryBudget::new(6, 1).unwrap()).with_seed(3).with_prefix_cache(cache);
        let mut learner = ForwardLearner::new(model, Uniform, config).unwrap();
        let (mut optimizer, mut seen) = (SgdConfig::new().init(), vec![]);
        for i in 0..5 {
            for ids in epoch(i) {
                let x: Vec<f32> =
                    ids.iter().flat_map(|&id| (0..24).map(move |i| (1.1 * i as f32 + id as f32).sin())).collect();
                let mask: Vec<i32> = ids.iter().flat_map(|&id| (0..6).map(move |t| i32::from(t <= id % 5))).collect();
                let x = Tensor::<B, 3>::from_data(TensorData::new(x, [ids.len(), 6, 4]), &device);
                let mask = Tensor::<B, 2, Int>::from_data(TensorData::new(mask, [ids.len(), 6]), &device);
                let target = points(&ids).target;
                let output = TrainStep::step(&learner, Batch { ids, input: (x, mask), target });
                assert_eq!(learner.monitor().error(), None);
                seen.push(output.item.losses.into_data().to_vec().unwrap());
                learner = learner.optimize::<AB, _>(&mut optimizer, 0.2, output.grads);
            }
        }
        seen
    };
    let without = run(0);
    close(&run(23), &without);
}
