//! A model of your own, trained with forward passes only.
//!
//! ```text
//! cargo run --release --example custom_model
//! ```
//!
//! Three runs of the same small network on two interleaved spirals: weight noise, for which the
//! module needs no change; activation noise on its layers; and activation noise with a loss that
//! has no gradient.
//!
//! Weight noise goes with uniform allocation: each direction is shared by all examples of the
//! batch, so unequal shares gain nothing. Activation noise goes with Neyman allocation.
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

#[macro_use]
extern crate flops_report;

use std::sync::Arc;

use anyhow::Result;
use burn::data::dataloader::DataLoader;
use burn::data::dataset::InMemDataset;
use burn::module::AutodiffModule;
use burn::optim::AdamConfig;
use burn::prelude::*;
use burn::tensor::activation::relu;
use clap::Parser;
use flops_core::allocator::{AllocatorKind, AnyAllocator};
use flops_core::{
    Batch, EpochLoader, ForwardConfig, ForwardLearner, ForwardModel, InnerBatcher, NoiseLaw, Probe, QueryBudget, Space,
};
use flops_core::{cross_entropy, zero_one};
use flops_examples::backend::{AB, B, Device};

// ---- what you write -----------------------------------------------------------------------------

/// Any Burn module.
#[derive(Module, Debug)]
struct Net<B: Backend> {
    layers: Vec<nn::Linear<B>>,
    head: nn::Linear<B>,
    /// Whether to train on the 0-1 loss instead of the cross-entropy.
    zero_one: bool,
}

impl<B: Backend> ForwardModel<B> for Net<B> {
    type Input = Tensor<B, 2>;
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    fn forward(&self, mut x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        for layer in &self.layers {
            x = relu(probe.linear(layer, x)); // for weight noise, `layer.forward(x)` is enough
        }
        probe.linear(&self.head, x)
    }

    fn losses(&self, logits: Tensor<B, 2>, target: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        if self.zero_one { zero_one(logits, target) } else { cross_entropy(logits, target) }
    }
}

// ---- the rest is Burn ---------------------------------------------------------------------------

/// Train a custom model with forward passes only.
#[derive(Parser)]
struct Args {
    /// Passes over the 512 training points.
    #[arg(long, default_value_t = 60)]
    epochs: usize,
    /// Queries per point and step, on average.
    #[arg(long, default_value_t = 20)]
    queries: usize,
    /// Seed of weights, order, noise and allocation.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// A point on one of two spirals.
#[derive(Clone, Debug)]
struct Point {
    id: u64,
    x: [f32; 2],
    label: i32,
}

fn spirals(from: u64, n: u64) -> InMemDataset<Point> {
    let point = |id: u64| {
        let (label, t) = ((id % 2) as i32, 0.3 + 0.7 * ((id * 7919) % 1009) as f32 / 1009.0);
        let angle = 5.0 * t + std::f32::consts::PI * label as f32;
        Point { id, x: [2.0 * t * angle.cos(), 2.0 * t * angle.sin()], label }
    };
    InMemDataset::new((from..from + n).map(point).collect())
}

/// Collects points into batches.
#[derive(Clone)]
struct Batcher;

type PointBatch<B> = Batch<Tensor<B, 2>, Tensor<B, 1, Int>>;

impl<B: Backend> burn::data::dataloader::batcher::Batcher<B, Point, PointBatch<B>> for Batcher {
    fn batch(&self, points: Vec<Point>, device: &B::Device) -> PointBatch<B> {
        let n = points.len();
        let x: Vec<f32> = points.iter().flat_map(|p| p.x).collect();
        let labels: Vec<i32> = points.iter().map(|p| p.label).collect();
        Batch {
            ids: points.iter().map(|p| p.id).collect(),
            input: Tensor::from_data(TensorData::new(x, [n, 2]), device),
            target: Tensor::from_data(TensorData::new(labels, [n]), device),
        }
    }
}

fn net(zero_one: bool, seed: u64, device: &Device) -> Net<AB> {
    <AB as burn::tensor::backend::Backend>::seed(device, seed);
    let layers = [[2, 32], [32, 32]].map(|[i, o]| nn::LinearConfig::new(i, o).init(device));
    Net { layers: layers.into(), head: nn::LinearConfig::new(32, 2).init(device), zero_one }
}

/// Adam's learning rate.
const LR: f64 = 1e-2;

type Learner = ForwardLearner<AB, Net<AB>, AnyAllocator<AB>>;

/// Returns the share of test points that the model classifies correctly.
fn accuracy(learner: &Learner, test: &dyn DataLoader<B, PointBatch<B>>) -> f64 {
    let mut model = learner.model.valid();
    model.zero_one = true;
    let wrong = test.iter().map(|batch| {
        let output = model.forward(batch.input, &mut Probe::clean());
        model.losses(output, batch.target).sum().into_scalar().elem::<f64>()
    });
    1.0 - wrong.sum::<f64>() / test.num_items() as f64
}

fn main() -> Result<()> {
    let args = Args::parse();
    let device = flops_examples::backend::device()?;
    let budget = QueryBudget::new(args.queries, 1)?;
    let config = || ForwardConfig::new(budget).with_seed(args.seed);
    let smooth = config().with_noise(NoiseLaw::Gaussian).with_sigma(0.5);
    println!("{:<34}{:>9}{:>9}{:>11}", "", "before", "after", "queries");
    for (name, zero_one, config, allocator) in [
        ("weight noise", false, config().with_space(Space::weights()), AllocatorKind::Uniform),
        ("activation noise", false, config(), AllocatorKind::Neyman),
        ("activation noise, 0-1 loss", true, smooth, AllocatorKind::Neyman),
    ] {
        let train: EpochLoader<AB, _, PointBatch<B>> =
            EpochLoader::new(Arc::new(spirals(0, 512)), InnerBatcher(Batcher), 64, device.clone())?.shuffled(args.seed);
        let test: EpochLoader<B, _, PointBatch<B>> =
            EpochLoader::new(Arc::new(spirals(512, 512)), Batcher, 256, device.clone())?;
        let allocator = AnyAllocator::new(allocator, &device)?;
        let mut learner = ForwardLearner::new(net(zero_one, args.seed, &device), allocator, config)?;
        let mut optimizer = AdamConfig::new().init();
        let before = accuracy(&learner, &test);
        for _ in 0..args.epochs {
            for batch in train.iter() {
                // burn-train's `Learner` would take these two lines for you: see `run/fit.rs`
                let step = learner.estimate(&batch)?;
                learner = learner.update(&mut optimizer, LR, step.grads)?;
            }
        }
        let queries = learner.state().ledger.total().queries;
        println!("{name:<34}{:>8.1}%{:>8.1}%{queries:>11}", 100.0 * before, 100.0 * accuracy(&learner, &test));
    }
    Ok(())
}
