//! Loops of training: from forward passes alone, and by backpropagation.

use std::time::Instant;

use anyhow::{Result, bail};
use burn::backend::{Autodiff, Flex};
use burn::module::{AutodiffModule, ModuleDisplay};
use burn::optim::{AdamConfig, GradientsParams, Optimizer};
use burn::prelude::*;
use flops_core::allocator::Allocator;
use flops_core::random::keyed_rng;
use flops_core::{ForwardConfig, ForwardLearner, ForwardModel, Probe, infer};
use rand::seq::SliceRandom;

use crate::table::Table;

/// The backend: Burn's Flex, on CPUs.
pub type B = Flex;
/// The same with gradients, for Burn's optimizers.
pub type AB = Autodiff<Flex>;

/// The most steps that a program takes.
pub const MAX_STEPS: usize = 1_000_000;
/// Rows of a batch.
pub const BATCH: usize = 64;
/// Looks at a run, beside the one before it.
const LOOKS: u64 = 20;
/// Most rows of a pass in an evaluation.
const MAX_ROWS: usize = 256;

/// A classifier of rows, on a backend.
pub trait RowClassifier<B: Backend>:
    ForwardModel<B, Input = Tensor<B, 2>, Target = Tensor<B, 1, Int>, Output = Tensor<B, 2>>
{
}

impl<B: Backend, M> RowClassifier<B> for M where
    M: ForwardModel<B, Input = Tensor<B, 2>, Target = Tensor<B, 1, Int>, Output = Tensor<B, 2>>
{
}

/// How long to train, and how fast.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Adam's learning rate at the start; it falls to nothing.
    pub lr: f64,
    /// Rows that may be sent through the model; a backward pass counts as two.
    pub passes: u64,
    /// Seed of noise and of the order of the rows.
    pub seed: u64,
    /// Threads that evaluate queries, and rows of a test.
    pub threads: usize,
}

impl Plan {
    /// The rate after `spent` rows.
    fn lr_at(&self, spent: u64) -> f64 {
        self.lr * (1.0 - spent as f64 / self.passes as f64).max(0.0)
    }
}

/// What a run came to.
pub struct Run<M> {
    /// The trained model.
    pub model: M,
    /// Test accuracy in percent by rows sent through the model.
    pub looks: Vec<(u64, f64)>,
    /// Queries.
    pub queries: u64,
    /// Seconds of training, without the looks.
    pub seconds: f64,
}

/// The share of rows that are classified correctly, in percent.
///
/// # Errors
/// If the model could not answer.
pub fn accuracy<M: RowClassifier<B>>(model: &M, table: &Table, threads: usize) -> Result<f64> {
    let batch = table.all::<B>(&Default::default());
    let answers = infer(model, &batch.input, table.len(), MAX_ROWS, threads).argmax(1);
    let answers: Vec<i64> = answers.into_data().iter().collect();
    let right = answers.iter().zip(&table.labels).filter(|&(&answer, &label)| answer == label as i64);
    if let Some(why) = model.failure() {
        bail!("the model failed: {why}");
    }
    Ok(100.0 * right.count() as f64 / table.len() as f64)
}

/// The rows of each step: shuffled anew for each epoch.
fn batches(rows: usize, seed: u64) -> impl Iterator<Item = Vec<usize>> {
    let epoch = move |epoch: u64| {
        let mut order: Vec<usize> = (0..rows).collect();
        order.shuffle(&mut keyed_rng([u64::from_le_bytes(*b"batches\0"), seed, epoch, 0]));
        order.chunks(BATCH.min(rows)).map(<[usize]>::to_vec).collect::<Vec<_>>()
    };
    (0..).flat_map(epoch)
}

/// The looks at a run.
struct Watch<'a> {
    plan: Plan,
    test: &'a Table,
    looks: Vec<(u64, f64)>,
}

impl Watch<'_> {
    /// Looks where it is time to; returns whether everything is spent.
    fn is_over<M: RowClassifier<B>>(&mut self, spent: u64, model: impl FnOnce() -> M) -> Result<bool> {
        let over = spent >= self.plan.passes;
        if over || spent >= self.looks.len() as u64 * self.plan.passes / LOOKS {
            self.looks.push((spent, accuracy(&model(), self.test, self.plan.threads)?));
        }
        Ok(over)
    }
}

/// Trains from forward passes alone.
pub fn forward_only<M, A>(
    model: M,
    allocator: A,
    config: ForwardConfig,
    plan: Plan,
    (train, test): (&Table, &Table),
) -> Result<Run<M>>
where
    M: AutodiffModule<AB> + ModuleDisplay,
    M::InnerModule: RowClassifier<B> + ModuleDisplay,
    A: AutodiffModule<AB> + Allocator<AB> + ModuleDisplay,
    A::InnerModule: Allocator<B> + ModuleDisplay,
{
    let config = config.with_seed(plan.seed).with_threads(plan.threads);
    let mut learner = ForwardLearner::new(model, allocator, config)?;
    let mut optimizer = AdamConfig::new().init();
    let mut watch = Watch { plan, test, looks: vec![] };
    let mut batches = batches(train.len(), plan.seed);
    loop {
        let spent = learner.state().ledger.total();
        if watch.is_over(spent.row_forwards, || learner.model.valid())? {
            let looks = watch.looks;
            return Ok(Run { model: learner.model, looks, queries: spent.queries, seconds: spent.seconds });
        }
        let rows = batches.next().unwrap_or_default();
        let estimate = learner.estimate(&train.batch(&rows, &Default::default()))?;
        learner = learner.update(&mut optimizer, plan.lr_at(spent.row_forwards), estimate.grads)?;
    }
}

/// Trains by backpropagation.
pub fn backprop<M>(mut model: M, plan: Plan, (train, test): (&Table, &Table)) -> Result<Run<M>>
where
    M: AutodiffModule<AB> + RowClassifier<AB>,
    M::InnerModule: RowClassifier<B>,
{
    let mut optimizer = AdamConfig::new().init();
    let mut watch = Watch { plan, test, looks: vec![] };
    let mut batches = batches(train.len(), plan.seed);
    let (mut spent, mut seconds) = (0, 0.0);
    while !watch.is_over(spent, || model.valid())? {
        let started = Instant::now();
        let rows = batches.next().unwrap_or_default();
        let batch = train.batch::<AB>(&rows, &Default::default());
        let output = model.forward(batch.input, &mut Probe::clean());
        let gradients = model.losses(output, batch.target).mean().backward();
        let gradients = GradientsParams::from_grads(gradients, &model);
        model = optimizer.step(plan.lr_at(spent), model, gradients);
        spent += 3 * rows.len() as u64;
        seconds += started.elapsed().as_secs_f64();
    }
    Ok(Run { model, looks: watch.looks, queries: 0, seconds })
}
