//! A learner with its optimizer: forward-only, or by backpropagation.

use anyhow::Result;
use burn::prelude::*;
use burn::train::TrainStep;
use flops_core::allocator::AnyAllocator;
use flops_core::ledger::Phase;
use flops_core::train::param_groups::{GroupedOptimizer, ParamGroup};
use flops_core::{BackpropLearner, ForwardConfig, ForwardLearner};
use flops_examples::backend::{AB, B, Device};
use flops_examples::run::optimizer::{RunAdamW, adamw};
use flops_multimodal::{TextBatch, TextClassifier};
use flops_vit::{FineTuning, Sites};

use crate::method::Method;

type Model = TextClassifier<AB>;
type Forward = ForwardLearner<AB, Model, AnyAllocator<AB>>;
type Backprop = BackpropLearner<AB, Model>;
type Grouped<L> = GroupedOptimizer<RunAdamW<L>>;

/// Row-forwards that the backward pass of a text counts as.
const BACKWARD: u64 = 2;

/// A learner with its optimizer.
pub enum Trainee {
    /// Forward passes only; where sites are branches, the update takes a local derivative of each.
    Forward(Box<Forward>, Grouped<Forward>, Sites),
    /// Burn's autodiff, with the rows that passed so far.
    Backprop(Box<Backprop>, Grouped<Backprop>, u64),
}

/// The head learns faster, the embeddings more slowly, as in the fine-tuning of a ViT.
fn groups() -> Vec<ParamGroup> {
    let embeddings = ["token_embed", "pos_embed", "type_embed"].map(|name| format!("model.encoder.{name}"));
    let [first, rest @ ..] = &embeddings;
    let group = ParamGroup::new(first, FineTuning::EMBED_LR_FACTOR);
    let group = rest.iter().fold(group, |group, name| group.and(name));
    vec![ParamGroup::new("model.head", FineTuning::HEAD_LR_FACTOR), group]
}

impl Trainee {
    pub fn new(model: Model, method: Method, config: ForwardConfig, sites: Sites, device: &Device) -> Result<Self> {
        let decay = FineTuning::WEIGHT_DECAY as f32;
        if method == Method::Backprop {
            let optimizer = GroupedOptimizer::new(adamw(decay, FineTuning::BETA_2), groups());
            return Ok(Self::Backprop(Box::new(BackpropLearner::new(model)), optimizer, 0));
        }
        let allocator = AnyAllocator::new(method.allocator(), device)?;
        let learner = ForwardLearner::new(model, allocator, config)?;
        let optimizer = GroupedOptimizer::new(adamw(decay, FineTuning::BETA_2), groups());
        Ok(Self::Forward(Box::new(learner), optimizer, sites))
    }

    /// Takes one step. Returns the mean loss of its texts before it.
    pub fn step(self, batch: &TextBatch<B>, lr: f64) -> Result<(Self, f64)> {
        match self {
            Self::Forward(learner, mut optimizer, sites) => {
                let step = learner.estimate(batch)?;
                let loss = mean(step.output.losses);
                let learner = learner.update(&mut optimizer, lr, step.grads)?;
                Ok((Self::Forward(Box::new(learner), optimizer, sites), loss))
            }
            Self::Backprop(learner, mut optimizer, rows) => {
                let output = learner.step(batch.clone());
                if let Some(error) = learner.monitor().error() {
                    return Err(error.into());
                }
                let loss = mean(output.item.losses.inner());
                let learner = learner.optimize::<AB, _>(&mut optimizer, lr, output.grads);
                Ok((Self::Backprop(Box::new(learner), optimizer, rows + batch.ids.len() as u64), loss))
            }
        }
    }

    /// Row-forwards so far.
    pub fn row_forwards(&self) -> u64 {
        match self {
            Self::Forward(learner, _, sites) => {
                let ledger = &learner.state().ledger;
                let differentiated = match sites {
                    Sites::Branch => ledger.of(Phase::Update).row_forwards,
                    _ => 0,
                };
                ledger.total().row_forwards + BACKWARD * differentiated
            }
            Self::Backprop(_, _, rows) => (1 + BACKWARD) * rows,
        }
    }

    pub fn model(&self) -> &Model {
        match self {
            Self::Forward(learner, ..) => &learner.model,
            Self::Backprop(learner, ..) => &learner.model,
        }
    }
}

fn mean(losses: Tensor<B, 1>) -> f64 {
    losses.mean().into_scalar().elem()
}
