//! A training run: a learner with its optimizer and its learning rates.

use std::collections::VecDeque;

use anyhow::{Context, Result};
use burn::module::AutodiffModule;
use burn::optim::adaptor::OptimizerAdaptor;
use burn::optim::{GradientsParams, Sgd, SgdConfig};
use burn::train::TrainStep;
use flops_core::StepReport;
use flops_core::allocator::AnyAllocator;
use flops_core::train::param_groups::GroupedOptimizer;
use flops_vit::data::ImageBatch;
use flops_vit::{FineTuning, ViT};

use super::classifier::Classifier;
use super::gradient::estimate;
use super::images::Batches;
use super::testbed::Learner;
use crate::backend::{AB, B};
use crate::run::optimizer::{self, OptimizerKind, RunAdamW, RunMuon, groups};

/// AdamW with learning rates of their own for the head and the embeddings.
pub type GroupedAdamW<L> = GroupedOptimizer<RunAdamW<L>>;
/// Muon on matrices and AdamW on vectors, with the same rates.
type GroupedMuon<L> = GroupedOptimizer<RunMuon<L>>;

/// Creates AdamW for a learner, weight decay 0.1, the head at `head_lr_factor` times the learning
/// rate and the embeddings at [`FineTuning::EMBED_LR_FACTOR`] times.
pub fn adamw<L: AutodiffModule<AB>>(head_lr_factor: f64) -> GroupedAdamW<L> {
    let adamw = optimizer::adamw(FineTuning::WEIGHT_DECAY as f32, FineTuning::BETA_2);
    GroupedOptimizer::new(adamw, groups(head_lr_factor, FineTuning::EMBED_LR_FACTOR))
}

/// Creates Muon for a learner, with the decay and the rates of [`adamw`].
fn muon<L: AutodiffModule<AB>>(head_lr_factor: f64) -> GroupedMuon<L> {
    let muon = optimizer::muon(FineTuning::WEIGHT_DECAY as f32, FineTuning::BETA_2);
    GroupedOptimizer::new(muon, groups(head_lr_factor, FineTuning::EMBED_LR_FACTOR))
}

/// AdamW or Muon as in `vit_cifar`, or plain SGD, of a forward-only learner.
pub enum Optim<M: Classifier = ViT<AB>> {
    /// AdamW.
    Adam(GroupedAdamW<Learner<AnyAllocator<AB>, M>>),
    /// Muon on matrices and AdamW on vectors, with the same weight decay and head.
    Muon(GroupedMuon<Learner<AnyAllocator<AB>, M>>),
    /// SGD without momentum.
    Sgd(OptimizerAdaptor<Sgd<B>, Learner<AnyAllocator<AB>, M>, AB>),
}

impl<M: Classifier> Optim<M> {
    /// Creates an optimizer of that kind, the head at `head_lr_factor` times the learning rate.
    pub fn of(kind: OptimizerKind, head_lr_factor: f64) -> Self {
        match kind {
            OptimizerKind::AdamW => Self::Adam(adamw(head_lr_factor)),
            OptimizerKind::Muon => Self::Muon(muon(head_lr_factor)),
        }
    }

    /// Creates AdamW, the head at four times the learning rate.
    pub fn adam() -> Self {
        Self::of(OptimizerKind::AdamW, FineTuning::HEAD_LR_FACTOR)
    }

    /// Creates Muon, the head at four times the learning rate.
    pub fn muon() -> Self {
        Self::of(OptimizerKind::Muon, FineTuning::HEAD_LR_FACTOR)
    }

    /// Creates SGD.
    pub fn sgd() -> Self {
        Self::Sgd(SgdConfig::new().init())
    }

    /// Updates a learner by its gradients.
    pub fn update(
        &mut self,
        learner: Learner<AnyAllocator<AB>, M>,
        lr: f64,
        grads: GradientsParams,
    ) -> Learner<AnyAllocator<AB>, M> {
        match self {
            Self::Adam(optim) => learner.optimize::<AB, _>(optim, lr, grads),
            Self::Muon(optim) => learner.optimize::<AB, _>(optim, lr, grads),
            Self::Sgd(optim) => learner.optimize::<AB, _>(optim, lr, grads),
        }
    }
}

/// How the learning rate changes over a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Schedule {
    /// The rate falls to zero as a cosine, which hides the gradient's variance in the final loss.
    #[default]
    Cosine,
    /// The rate stays, and the final loss shows the variance.
    Constant,
}

impl Schedule {
    /// Returns the rate at `step`.
    pub fn rate(self, lr: f64, step: usize, steps: usize) -> f64 {
        self.rate_at(lr, step as f64 / steps.max(1) as f64)
    }

    /// Returns the rate after a share of the run, from 0 to 1.
    pub fn rate_at(self, lr: f64, share: f64) -> f64 {
        match self {
            Self::Cosine => 0.5 * lr * (1.0 + (std::f64::consts::PI * share).cos()),
            Self::Constant => lr,
        }
    }

    /// Returns the name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cosine => "cosine",
            Self::Constant => "constant",
        }
    }
}

/// A training run: a learner with its optimizer and its learning rates.
pub struct Run {
    /// The learner.
    pub learner: Learner,
    optim: Optim,
    lr: f64,
    steps: usize,
    done: usize,
    schedule: Schedule,
}

impl Run {
    /// Creates a run of `steps` steps whose rate falls from `lr` to zero.
    pub fn new(learner: Learner, optim: Optim, lr: f64, steps: usize) -> Self {
        Self { learner, optim, lr, steps, done: 0, schedule: Schedule::default() }
    }

    /// Changes the schedule.
    #[must_use]
    pub fn with_schedule(mut self, schedule: Schedule) -> Self {
        self.schedule = schedule;
        self
    }

    /// Takes one step.
    ///
    /// # Errors
    /// If the step fails.
    pub fn step(mut self, batch: ImageBatch<B>) -> Result<(Self, StepReport)> {
        let (grads, report) = estimate(&self.learner, batch)?;
        let lr = self.schedule.rate(self.lr, self.done, self.steps);
        self.learner = self.optim.update(self.learner, lr, grads);
        self.done += 1;
        Ok((self, report))
    }

    /// Takes all remaining steps and calls `look` after each. Returns the mean loss of the last
    /// tenth.
    ///
    /// # Errors
    /// If a step fails.
    pub fn finish(mut self, batches: &mut Batches, mut look: impl FnMut(usize, &StepReport)) -> Result<(Self, f64)> {
        let tail = (self.steps / 10).max(1);
        let mut last = VecDeque::new();
        while self.done < self.steps {
            let batch = batches.next().context("there are no images")?;
            let report;
            (self, report) = self.step(batch)?;
            look(self.done, &report);
            if last.len() == tail {
                last.pop_front();
            }
            last.push_back(report.loss);
        }
        let loss = last.iter().sum::<f64>() / last.len() as f64;
        Ok((self, loss))
    }
}
