//! A run whose settings and data are known: its start, its training, its forecast.

use std::sync::Arc;

use anyhow::{Context, Result};
use burn::data::dataloader::DataLoader;
use burn::module::AutodiffModule;
use flops_core::allocator::AnyAllocator;
use flops_core::{BackpropLearner, ForwardConfig, ForwardLearner};
use flops_examples::backend::{AB, B, Device};
use flops_examples::run::artifacts::{Artifacts, Settings};
use flops_examples::run::curves::Beside;
use flops_examples::run::dry_run::{RunSize, forecast, measure, parameters};
use flops_examples::run::fit::{TrainedRun, fit, resumable};
use flops_examples::run::history::{History, Row, Split};
use flops_examples::run::optimizer::groups;
use flops_examples::run::plan::RunPlan;
use flops_examples::run::prefixes::prefix_bytes;
use flops_examples::run::workers::identity::{Properties, flags, hash};
use flops_examples::run::workers::worker::Worker;
use flops_vit::ViT;
use flops_vit::checkpoint::Card;
use flops_vit::data::ImageBatch;

use crate::args::{Args, FREE_SETTINGS};
use crate::data::Data;
use crate::model::evaluate;

/// A run whose settings and data are known.
pub struct Run<'a> {
    pub args: Args,
    pub config: ForwardConfig,
    pub lr: f64,
    pub settings: Settings,
    pub artifacts: Artifacts,
    pub device: Device,
    pub data: Data,
    /// This process as one of several that share the run.
    pub worker: Option<&'a Worker>,
    /// A run whose test figures are drawn beside those of this one.
    pub beside: Option<Beside>,
}

/// Where training starts.
pub struct Start {
    /// The epoch that training goes on after.
    pub resume: Option<usize>,
    pub history: History,
    /// The evaluation of the model before training.
    pub before: Row,
}

impl Run<'_> {
    pub fn forward_learner(&self, model: ViT<AB>) -> Result<ForwardLearner<AB, ViT<AB>, AnyAllocator<AB>>> {
        let allocator = AnyAllocator::<AB>::new(self.args.allocator()?, &self.device)?;
        Ok(ForwardLearner::new(model, allocator, self.config.clone())?)
    }

    pub fn backprop_learner(&self, model: ViT<AB>) -> BackpropLearner<AB, ViT<AB>> {
        BackpropLearner::new(model)
            .with_prefix_cache(self.config.prefix_cache)
            .with_evaluation_cache(self.config.evaluation_cache)
            .with_threads(self.config.estimator.threads)
    }

    /// Returns the batches of a learner, without a graph.
    pub fn loader(&self, first_epoch: usize) -> Result<Arc<dyn DataLoader<AB, ImageBatch<B>>>> {
        self.data.train_loader(&self.args, first_epoch, &self.device)
    }

    /// Starts a new run with an evaluation of the untrained model, or finds the epoch to resume
    /// from.
    pub fn start(&self, model: &ViT<AB>, new_head: bool) -> Result<Start> {
        let (resume, history) = if self.args.resume {
            let (epoch, history) = resumable(&self.artifacts)?;
            (Some(epoch), history)
        } else {
            let (loss, accuracy) = evaluate(&model.valid(), &*self.data.test, self.config.estimator.threads);
            let mut history = History::default();
            history.push(Row::new(Split::Test, 0, loss, accuracy));
            self.artifacts.start(&self.settings)?;
            (None, history)
        };
        let before = history.of(Split::Test).next().cloned();
        let before = before.context("metrics.csv has no row of epoch 0; start a new run")?;
        println!(
            "{} on {}: {} training images, scope {}, {}, test accuracy before {:.2} %",
            self.args.method.name(),
            self.args.dataset,
            self.data.train.items.len(),
            self.args.scope,
            if new_head { "new head" } else { "the checkpoint's head" },
            100.0 * before.accuracy,
        );
        if let Some(epoch) = resume {
            println!("going on after epoch {epoch} of {}", self.args.epochs);
        }
        Ok(Start { resume, history, before })
    }

    /// Returns what the workers of a run must have in common.
    fn properties(&self, card: &Card) -> Properties {
        let items = &self.data.train.items;
        let labels: Vec<u8> = items.iter().flat_map(|item| (item.label as u64).to_le_bytes()).collect();
        let images = hash(items.iter().map(|item| item.pixels.as_slice()).chain([labels.as_slice()]));
        let more = [
            ("the training images, by their hash", format!("{images:016x}")),
            ("the model", format!("{:?}", (&card.config, &card.normalization, &card.resizing))),
        ];
        let more = more.map(|(name, value)| (name.to_string(), value));
        // weights are compared by their values
        let free = [&FREE_SETTINGS[..], &["weights"]].concat();
        flags(&self.settings, &free).into_iter().chain(more).collect()
    }

    /// Trains the model with burn-train.
    pub fn fit(&self, model: ViT<AB>, start: &Start, card: &Card) -> Result<TrainedRun<ViT<B>>> {
        let args = &self.args;
        let plan = |monitor| RunPlan {
            artifacts: &self.artifacts,
            device: self.device.clone(),
            lr: self.lr,
            optimizer: args.optimizer(),
            groups: groups(args.head_lr_factor, args.embed_lr_factor),
            beta_2: args.beta_2,
            weight_decay: args.weight_decay as f32,
            steps: args.epochs * self.data.train.items.len().div_ceil(args.batch_size),
            last_epoch: args.stop_after.unwrap_or(args.epochs),
            resume: start.resume,
            monitor,
            plain: args.plain,
        };
        let (test, history, first_epoch) = (self.data.test.clone(), start.history.clone(), start.resume.unwrap_or(0));
        let mut loader = self.loader(first_epoch)?;
        if args.method.is_forward() {
            let mut learner = self.forward_learner(model)?;
            if let Some(worker) = self.worker {
                learner = learner.with_executor(worker.executor(self.properties(card)));
                loader = worker.offering(loader, &self.artifacts, first_epoch);
            }
            let plan = plan(Some(learner.monitor()));
            let trained = fit(learner, loader, test, history, plan)?;
            Ok(trained.map(|learner| learner.model))
        } else {
            let learner = self.backprop_learner(model);
            let trained = fit(learner, loader, test, history, plan(None))?;
            Ok(trained.map(|learner| learner.model))
        }
    }

    /// Prints what the run would take.
    pub fn dry_run(&self, model: ViT<AB>, card: &Card) -> Result<()> {
        let (args, config) = (&self.args, &self.config);
        let size = RunSize {
            images: self.data.train.items.len(),
            batch_size: args.batch_size,
            epochs: args.epochs,
            queries: if args.method.is_forward() { args.forward.queries } else { 0 },
            prefix_bytes: if config.prefix_cache > 0 { prefix_bytes(&card.config) } else { 0 },
            evaluation_bytes: config.evaluation_cache * prefix_bytes(&card.config),
        };
        let parameters = parameters(&model);
        let batch = self.loader(0)?.iter().next().context("there are no training images")?;
        let measured = if args.method.is_forward() {
            let learner = self.forward_learner(model)?;
            let monitor = learner.monitor();
            let measured = measure(learner, batch, || Some(monitor.ledger()));
            if let Some(error) = monitor.error() {
                return Err(error.into());
            }
            measured
        } else {
            measure(self.backprop_learner(model), batch, || None)
        };
        println!("\n{}, scope {}, {}: nothing is trained", args.dataset, args.scope, args.description());
        for (name, value) in forecast(&size, &measured, parameters) {
            println!("  {name:<28}{value:>16}");
        }
        Ok(())
    }
}
