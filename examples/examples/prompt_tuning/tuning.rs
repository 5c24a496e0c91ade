//! Tuning: steps of forward queries, or of backpropagation, and evaluations.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use burn::data::dataloader::DataLoader;
use burn::data::dataloader::batcher::Batcher;
use burn::data::dataset::InMemDataset;
use burn::module::{AutodiffModule, ModuleDisplay};
use burn::optim::{AdamConfig, GradientsParams, Optimizer};
use burn::prelude::*;
use burn::train::TrainStep;
use flops_core::allocator::AnyAllocator;
use flops_core::{EpochLoader, ForwardConfig, ForwardLearner, ForwardModel, InnerBatcher, Probe, cross_entropy};
use flops_examples::backend::{AB, B, Device};
use flops_examples::data::shots::{Shot, ShotBatch, ShotBatcher};
use flops_examples::experiment::Progress;
use flops_examples::run::artifacts::Artifacts;
use flops_examples::run::history::{History, Row, Split};
use flops_multimodal::blackbox::BlackBoxError;
use flops_multimodal::data::scenes::SIDE;
use flops_multimodal::{Classifier, TextPrompt, VisualPrompt};
use flops_vit::checkpoint::tensors::to_pytorch;

use crate::args::{Args, Plan};
use crate::endpoint::{Endpoint, PROMPT};

/// The message of a run that stopped early.
const STOPPED: &str = "stopped; every answer is kept, and --resume asks only what was never answered";
/// Test images on the contact sheet.
const PICTURES: usize = 8;

/// A run whose settings and data are known.
pub struct Run {
    pub args: Args,
    pub config: ForwardConfig,
    pub plan: Plan,
    pub artifacts: Artifacts,
    pub endpoint: Endpoint,
    pub train: Vec<Shot>,
    pub test: Vec<Shot>,
    pub device: Device,
    pub history: History,
    /// Why training stopped before its last step, or the prompt was not evaluated.
    pub stopped: Option<String>,
}

/// What the black box says of images.
#[derive(Clone, Debug)]
pub struct Scored {
    pub loss: f64,
    pub accuracy: f64,
    /// The class with the highest score, for each image.
    pub answers: Vec<usize>,
}

/// What tuning gives: the evaluation of the prompt, where the cap paid for it, and some images as it
/// repaints them.
pub type Tuned = (Option<Scored>, Option<Vec<Vec<f32>>>);

/// Returns what scores say of images with these labels.
fn scored<B: Backend>(scores: &Tensor<B, 2>, labels: Tensor<B, 1, Int>) -> Scored {
    let classes = |of: Tensor<B, 1, Int>| of.into_data().iter::<i64>().map(|class| class as usize).collect();
    let answers: Vec<usize> = classes(scores.clone().argmax(1).flatten(0, 1));
    let right: Vec<usize> = classes(labels.clone());
    let correct = answers.iter().zip(&right).filter(|(answer, right)| answer == right).count();
    let loss = cross_entropy(scores.clone(), labels).mean().into_scalar().elem();
    Scored { loss, accuracy: correct as f64 / right.len() as f64, answers }
}

/// Returns the learning rate of a step, counted from 0.
fn cosine(lr: f64, step: usize, steps: usize) -> f64 {
    lr * 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / steps as f64).cos())
}

impl Run {
    /// Returns the queries since the last row of the history.
    fn new_queries(&self) -> Option<u64> {
        Some(self.endpoint.metered.spent().saturating_sub(self.history.queries()))
    }

    /// Appends an evaluation to the history; returns its accuracy.
    pub fn push_test(&mut self, epoch: usize, scored: &Scored) -> f64 {
        let step_queries = self.new_queries();
        self.history.push(Row { step_queries, ..Row::new(Split::Test, epoch, scored.loss, scored.accuracy) });
        scored.accuracy
    }

    /// Evaluates the black box on the test images, with a prompt or without one.
    pub fn evaluate<M>(&self, model: Option<&M>) -> Result<Scored>
    where
        M: ForwardModel<B, Input = Tensor<B, 4>, Output = Tensor<B, 2>>,
    {
        let batch: ShotBatch<B> = ShotBatcher.batch(self.test.clone(), &self.device);
        let client = &self.endpoint.client;
        let scores = match model {
            Some(model) => model.forward(batch.input, &mut Probe::clean()),
            None => client.scores(batch.input, None),
        };
        match client.failure() {
            Some(error) => Err(error).context(STOPPED),
            None => Ok(scored(&scores, batch.target)),
        }
    }

    fn save<M: Module<B>>(&self, model: &M) -> Result<()> {
        let bytes = to_pytorch(model, false, |name| Some(name.into()));
        let bytes = bytes.map_err(|why| anyhow!("the prompt cannot be saved: {why}; lower --lr or --sigma"))?;
        self.artifacts.write(PROMPT, &bytes)
    }

    /// Saves a tuned prompt and evaluates it, with the queries that were held back for that.
    fn finish<M>(&mut self, model: &M) -> Result<Option<Scored>>
    where
        M: Module<B> + ForwardModel<B, Input = Tensor<B, 4>, Output = Tensor<B, 2>>,
    {
        self.save(model)?;
        self.endpoint.release();
        match self.evaluate(Some(model)) {
            Err(_) if matches!(self.endpoint.client.failure(), Some(BlackBoxError::CapReached { .. })) => {
                self.stop("the cap does not pay for the last evaluation: the prompt is saved, not evaluated".into());
                Ok(None)
            }
            scored => scored.map(Some),
        }
    }

    /// Keeps why the run ends early, and says so.
    fn stop(&mut self, why: String) {
        println!("{why}; --resume with a higher --cap goes on");
        self.stopped = Some(self.stopped.take().map_or(why.clone(), |before| format!("{before}; {why}")));
    }

    /// Ends training before step number `step`, counted from 0.
    fn stop_training(&mut self, step: usize) {
        let (steps, spent) = (self.plan.steps, self.endpoint.metered.spent());
        let why = format!("training stops after {step} of {steps} steps: {spent} queries are spent");
        self.stop(format!("{why}, and the rest of the cap is kept for the last evaluation"));
    }

    /// Tunes a visual prompt; returns its evaluation, and some images before and after.
    pub fn tune_visual(&mut self) -> Result<Tuned> {
        let model = VisualPrompt::<AB>::new(self.endpoint.client.clone(), self.args.hidden, &self.device)?;
        let model = if self.args.method.is_forward() {
            self.tune(model)?
        } else {
            self.tune_by_backprop(model, |model, classifier, images| {
                classifier.scores(classifier.embed_images(model.repaint(images, &mut Probe::clean())), None)
            })?
        };
        Ok((self.finish(&model)?, Some(repainted(&model, &self.test, &self.device))))
    }

    /// Tunes a text prompt; returns its evaluation.
    pub fn tune_text(&mut self) -> Result<Tuned> {
        let model = TextPrompt::<AB>::new(self.endpoint.client.clone(), &self.device)?;
        let model = if self.args.method.is_forward() {
            self.tune(model)?
        } else {
            self.tune_by_backprop(model, |model, classifier, images| {
                let [_, tokens, dim] = model.context.dims();
                let context = model.context.val().expand([images.dims()[0], tokens, dim]);
                classifier.scores(classifier.embed_images(images), Some(context))
            })?
        };
        Ok((self.finish(&model)?, None))
    }

    /// Returns one batch of training images per step, shuffled anew in each epoch.
    fn batches<O: Send + 'static>(
        &self,
        batcher: impl Batcher<AB, Shot, O> + 'static,
    ) -> Result<Box<dyn Iterator<Item = O>>> {
        let data = Arc::new(InMemDataset::new(self.train.clone()));
        let loader = EpochLoader::new(data, batcher, self.args.batch_size, self.device.clone())?;
        let loader = loader.shuffled(self.args.seed);
        let epochs = (0..).flat_map(move |_: usize| loader.iter().collect::<Vec<_>>());
        Ok(Box::new(epochs.take(self.plan.steps)))
    }

    /// Tunes by forward queries.
    fn tune<M>(&mut self, model: M) -> Result<M::InnerModule>
    where
        M: AutodiffModule<AB> + ModuleDisplay + 'static,
        M::InnerModule:
            ModuleDisplay + ForwardModel<B, Input = Tensor<B, 4>, Target = Tensor<B, 1, Int>, Output = Tensor<B, 2>>,
    {
        let allocator = AnyAllocator::<AB>::new(self.args.allocator_kind()?, &self.device)?;
        let mut learner = ForwardLearner::new(model, allocator, self.config.clone())?;
        let mut optimizer = AdamConfig::new().init();
        let (steps, mut progress) = (self.plan.steps, Progress::default());
        // a step that the journal answers costs nothing; whether it knows the next one is not known
        let mut paid = false;
        for (step, batch) in self.batches(InnerBatcher(ShotBatcher))?.enumerate() {
            let batch: ShotBatch<B> = batch;
            let cost = batch.ids.len() as u64 * (self.args.queries as u64 + 1);
            if paid && cost > self.endpoint.metered.remaining() {
                self.stop_training(step);
                break;
            }
            let spent = self.endpoint.metered.spent();
            let output = learner.step(batch);
            if let Some(error) = learner.monitor().error() {
                if !self.endpoint.is_held_back() {
                    // what is paid for is kept, whether or not the endpoint comes back
                    self.save(&learner.valid().model)?;
                    self.history.write(&self.artifacts)?;
                    return Err(error).context(STOPPED);
                }
                // the update is left out: the prompt is that of the step before
                self.stop_training(step);
                break;
            }
            paid = self.endpoint.metered.spent() > spent;
            let scored = output.item.classification.as_ref().map(|(scores, labels)| scored(scores, labels.clone()));
            let (loss, accuracy) = scored.map_or((f64::NAN, f64::NAN), |scored| (scored.loss, scored.accuracy));
            self.history.push(Row {
                step_queries: self.new_queries(),
                variance_vs_uniform: output.item.stats.as_ref().map(|s| s.relative_variance),
                floor: output.item.stats.as_ref().map(|s| s.floor),
                ..Row::new(Split::Train, 1, loss, accuracy)
            });
            let lr = cosine(self.args.lr, step, steps);
            learner = learner.optimize::<AB, _>(&mut optimizer, lr, output.grads);
            let queries = self.history.queries();
            progress.at(step + 1, steps, || format!("steps, loss {loss:.3}, {queries} queries"));
        }
        Ok(learner.valid().model)
    }

    /// Tunes by backpropagation through the classifier, which a black box does not allow, for as
    /// many steps.
    fn tune_by_backprop<M: AutodiffModule<AB>>(
        &mut self,
        mut model: M,
        forward: impl Fn(&M, &Classifier<AB>, Tensor<AB, 4>) -> Result<Tensor<AB, 2>, BlackBoxError>,
    ) -> Result<M::InnerModule> {
        let classifier = self.args.classifier.classifier::<AB>(&self.device)?;
        let mut optimizer = AdamConfig::new().init();
        let (steps, mut progress) = (self.plan.steps, Progress::default());
        for (step, batch) in self.batches(ShotBatcher)?.enumerate() {
            let batch: ShotBatch<AB> = batch;
            let scores = forward(&model, &classifier, batch.input)?;
            let Scored { loss, accuracy, .. } = scored(&scores, batch.target.clone());
            self.history.push(Row::new(Split::Train, 1, loss, accuracy));
            let gradients = cross_entropy(scores, batch.target).mean().backward();
            let gradients = GradientsParams::from_grads(gradients, &model);
            model = optimizer.step(cosine(self.args.lr, step, steps), model, gradients);
            progress.at(step + 1, steps, || format!("steps, loss {loss:.3}"));
        }
        Ok(model.valid())
    }
}

/// Returns some test images as the prompt repaints them.
fn repainted(model: &VisualPrompt<B>, test: &[Shot], device: &Device) -> Vec<Vec<f32>> {
    let some: Vec<Shot> = test.iter().take(PICTURES).cloned().collect();
    let batch: ShotBatch<B> = ShotBatcher.batch(some, device);
    let painted: Vec<f32> = model.repaint(batch.input, &mut Probe::clean()).into_data().iter::<f32>().collect();
    painted.chunks(3 * SIDE * SIDE).map(<[f32]>::to_vec).collect()
}
