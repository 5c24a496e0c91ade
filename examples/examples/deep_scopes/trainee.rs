//! A learner with its optimizer: forward-only, or by backpropagation.

use anyhow::{Result, ensure};
use burn::prelude::*;
use burn::train::TrainStep;
use flops_core::allocator::AnyAllocator;
use flops_core::control_variate::SiteReport;
use flops_core::ledger::Phase;
use flops_core::{BackpropLearner, ForwardConfig};
use flops_examples::backend::{AB, B};
use flops_examples::experiment::{Classifier, GroupedAdamW, Learner, Optim, Testbed, adamw, cosine, estimate};
use flops_vit::data::ImageBatch;

use crate::method::Method;

type Forward<M> = Learner<AnyAllocator<AB>, M>;

/// A learner with its optimizer.
pub enum Trainee<M: Classifier> {
    /// Forward passes only.
    Forward(Box<Forward<M>>, Optim<M>),
    /// Burn's autodiff, with the rows that passed so far.
    Backprop(Box<BackpropLearner<AB, M>>, GroupedAdamW<BackpropLearner<AB, M>>, u64),
}

/// What a step tells.
pub struct Step {
    /// The mean loss of the batch.
    pub loss: f64,
    /// What the prediction knows of the sites.
    pub sites: Vec<SiteReport>,
}

impl<M: Classifier> Trainee<M> {
    /// Creates a learner for `model`, with the method's optimizer and `head_lr_factor` for the head.
    ///
    /// # Errors
    /// If the configuration is invalid.
    pub fn new(
        testbed: &Testbed<M>,
        model: M,
        method: Method,
        config: ForwardConfig,
        head_lr_factor: f64,
    ) -> Result<Self> {
        Ok(match method {
            Method::Backprop => Self::Backprop(Box::new(testbed.backprop_learner(model)), adamw(head_lr_factor), 0),
            _ => {
                let learner = testbed.learner(model, config, method.allocator())?;
                Self::Forward(Box::new(learner), Optim::of(method.optimizer(), head_lr_factor))
            }
        })
    }

    /// Takes one step.
    ///
    /// # Errors
    /// If it fails.
    pub fn step(self, batch: ImageBatch<B>, lr: f64) -> Result<(Self, Step)> {
        match self {
            Self::Forward(learner, mut optim) => {
                let (grads, report) = estimate(&learner, batch)?;
                let learner = optim.update(*learner, lr, grads);
                let step = Step { loss: report.loss, sites: report.sites };
                Ok((Self::Forward(Box::new(learner), optim), step))
            }
            Self::Backprop(learner, mut optim, rows) => {
                let rows = rows + batch.ids.len() as u64;
                let output = TrainStep::step(&*learner, batch);
                if let Some(error) = learner.monitor().error() {
                    return Err(error.into());
                }
                let loss = output.item.losses.mean().into_scalar().elem::<f64>();
                ensure!(loss.is_finite(), "the loss is not finite; lower the learning rate");
                let learner = learner.optimize::<AB, _>(&mut optim, lr, output.grads);
                Ok((Self::Backprop(Box::new(learner), optim, rows), Step { loss, sites: vec![] }))
            }
        }
    }

    /// Returns the row-forwards so far. The backward pass of a row counts as `backward` of them: in
    /// backpropagation, and with `local` in the update, where each site has one of its own.
    pub fn row_forwards(&self, backward: u64, local: bool) -> u64 {
        match self {
            Self::Forward(learner, _) => {
                let ledger = &learner.state().ledger;
                let differentiated = if local { ledger.of(Phase::Update).row_forwards } else { 0 };
                ledger.total().row_forwards + backward * differentiated
            }
            Self::Backprop(_, _, rows) => (1 + backward) * rows,
        }
    }

    /// Returns the queries so far.
    pub fn queries(&self) -> u64 {
        match self {
            Self::Forward(learner, _) => learner.state().ledger.total().queries,
            Self::Backprop(..) => 0,
        }
    }

    /// Returns the model.
    pub fn model(&self) -> &M {
        match self {
            Self::Forward(learner, _) => &learner.model,
            Self::Backprop(learner, ..) => &learner.model,
        }
    }

    /// Returns the cosine of the estimate on a batch to the exact gradient; 1 for backpropagation.
    ///
    /// # Errors
    /// If the estimate fails.
    pub fn cosine(&self, testbed: &Testbed<M>, batch: &ImageBatch<B>) -> Result<Option<f64>> {
        let Self::Forward(learner, _) = self else { return Ok(Some(1.0)) };
        let (grads, _) = estimate(&testbed.copy(learner), batch.clone())?;
        let exact = testbed.true_gradient(&learner.model, batch);
        Ok(cosine(&learner.model, &grads, &exact))
    }
}
