//! One run: a scope, a method and a seed.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use burn::module::{AutodiffModule, Module};
use burn::prelude::*;
use flops_core::parameters::trained_values;
use flops_core::random::keyed_rng;
use flops_core::{ForwardModel, infer};
use flops_examples::backend::{AB, B, Device};
use flops_examples::data::texts::Texts;
use flops_examples::experiment::Schedule;
use flops_multimodal::checkpoint::bert;
use flops_multimodal::towers::Pooling;
use flops_multimodal::{Bert, TextClassifier, TextItem, TextTokenizer};
use flops_vit::{Scope, Sites};
use rand::seq::SliceRandom;
use serde::Serialize;

use crate::args::Args;
use crate::method::Method;
use crate::trainee::Trainee;

/// Test texts that are padded alike.
const TEST_BATCH: usize = 64;
/// Test texts of a pass.
const TEST_ROWS: usize = 32;
/// Key of the stream that orders the texts.
const ORDER: u64 = u64::from_le_bytes(*b"shuffled");
/// Share of unknown words from which an encoder is refused.
const UNKNOWN: f64 = 0.5;

/// The encoder and the texts.
pub struct Subject {
    encoder: Bert<AB>,
    tokenizer: TextTokenizer,
    pooling: Pooling,
    max_tokens: usize,
    pub texts: Texts,
    device: Device,
    /// What they are called.
    name: String,
}

impl Subject {
    /// Loads both.
    ///
    /// # Errors
    /// If a file is missing or damaged, or most words are unknown to the encoder.
    pub fn open(args: &Args, device: Device) -> Result<Self> {
        let opened = match &args.text {
            Some(source) => bert::open(source, &device)?,
            None => bert::shipped(&device)?,
        };
        opened.notes.iter().for_each(|note| println!("{note}"));
        let tokenizer = opened.tokenizer.context("the encoder has no tokenizer.json; put it into its folder")?;
        let max_tokens = args.max_tokens.unwrap_or(opened.max_length);
        let (texts, what) = match (&args.csv, &args.text) {
            (Some(path), _) => (Texts::open(path)?, path.display().to_string()),
            (None, Some(_)) => (Texts::reviews()?, "sentences of reviews".into()),
            (None, None) => (Texts::captions(), "captions".into()),
        };
        let unknown = unknown_share(&tokenizer, &texts, max_tokens)?;
        ensure!(
            unknown < UNKNOWN,
            "the encoder does not know {:.0} % of the words of {what}; give one that does by --text FOLDER",
            100.0 * unknown
        );
        let name = args.text.as_ref().map_or("the shipped encoder".into(), ToString::to_string);
        let name = format!("{what} in {} classes, {name}", texts.classes.len());
        let pooling = match opened.head.pooling.as_slice() {
            [pooling] => *pooling,
            several => {
                println!("the encoder pools its tokens in {} ways; here it is their mean", several.len());
                Pooling::Mean
            }
        };
        Ok(Self { encoder: opened.model, tokenizer, pooling, max_tokens, texts, device, name })
    }

    /// A line on both.
    pub fn described(&self) -> String {
        let (texts, parameters) = (self.texts.items.len() + self.texts.held_out.len(), self.encoder.num_params());
        format!("{}: {texts} texts, {parameters} parameters", self.name)
    }

    fn width(&self) -> usize {
        self.encoder.token_embed.weight.dims()[1]
    }

    /// The classifier of a scope before training.
    ///
    /// # Errors
    /// If the encoder does not have the scope.
    pub fn classifier(&self, scope: Scope, sites: Sites, seed: u64) -> Result<TextClassifier<AB>> {
        let model = TextClassifier::new(self.encoder.clone(), self.texts.classes.len(), seed)?;
        let model = model.with_pooling(self.pooling).with_sites(sites).with_max_tokens(self.max_tokens);
        let model = match scope {
            Scope::Lora(rank) => model.with_lora(rank, seed)?,
            _ => model,
        };
        Ok(model.with_scope(scope)?)
    }

    /// The mean loss and the accuracy in percent on some texts.
    fn evaluate(&self, model: &TextClassifier<AB>, items: &[TextItem], threads: usize) -> Result<(f64, f64)> {
        let (model, mut loss, mut right) = (model.valid(), 0.0, 0i64);
        for part in items.chunks(TEST_BATCH) {
            let batch = model.batch::<B>(&self.tokenizer, part, &self.device)?;
            let logits = infer(&model, &batch.input, part.len(), TEST_ROWS, threads);
            let found = logits.clone().argmax(1).reshape([part.len()]).equal(batch.target.clone());
            right += found.int().sum().into_scalar().elem::<i64>();
            loss += model.losses(logits, batch.target).sum().into_scalar().elem::<f64>();
        }
        let n = items.len() as f64;
        Ok((loss / n, 100.0 * right as f64 / n))
    }
}

/// The share of tokens that the tokenizer has no word for, without the first and the last of a text.
fn unknown_share(tokenizer: &TextTokenizer, texts: &Texts, max_tokens: usize) -> Result<f64> {
    let Some(unknown) = tokenizer.id("[UNK]") else { return Ok(0.0) };
    let (mut all, mut missed) = (0usize, 0usize);
    for part in texts.items.chunks(256) {
        let lines: Vec<&str> = part.iter().map(|item| item.text.as_str()).collect();
        let tokens = tokenizer.encode(&lines, max_tokens)?;
        for (ids, mask) in tokens.ids().iter().zip(tokens.mask()) {
            let real: Vec<i64> = ids.iter().zip(mask).filter(|(_, real)| **real == 1).map(|(id, _)| *id).collect();
            let words = real.get(1..real.len().saturating_sub(1)).unwrap_or_default();
            all += words.len();
            missed += words.iter().filter(|id| **id == unknown).count();
        }
    }
    Ok(missed as f64 / all.max(1) as f64)
}

/// A row of `text.csv`: a look at a run.
#[derive(Clone, Debug, Serialize)]
pub struct Look {
    pub scope: String,
    pub method: String,
    pub seed: u64,
    pub lr: f64,
    pub step: usize,
    pub row_forwards: u64,
    /// Seconds of the steps alone.
    pub seconds: f64,
    /// Mean loss of the training texts since the last look, before their step; empty at the first.
    pub train_loss: Option<f64>,
    pub test_loss: f64,
    /// Percent.
    pub test_accuracy: f64,
    /// Trained values.
    pub trained: usize,
}

/// A scope, a method and a seed.
pub struct Trial<'a> {
    pub args: &'a Args,
    pub subject: &'a Subject,
    pub scope: Scope,
    pub method: Method,
    pub seed: u64,
}

impl Trial<'_> {
    /// Trains until the row-forwards are spent. `tell` hears the share of them, and the test accuracy.
    ///
    /// # Errors
    /// If a step fails, or a loss is not finite.
    pub fn run(&self, mut tell: impl FnMut(f64, f64)) -> Result<Vec<Look>> {
        let Self { args, subject, scope, method, seed } = self;
        let (mut train, test) = subject.texts.split(args.test_share(), *seed);
        let sites = method.noise(*scope).map_or(Sites::Linear, |noise| noise.sites);
        let threads = args.experiment.threads()?;
        let config = method.config(*scope, args.queries, *seed)?.with_threads(threads);
        let model = subject.classifier(*scope, sites, *seed)?;
        let (trained, lr, budget) =
            (trained_values(&model), args.lr(*method, *scope, subject.width()), args.row_forwards());
        let mut trainee = Trainee::new(model, *method, config, sites, &subject.device)?;
        let (mut looks, mut losses, mut step, mut seconds) = (vec![], vec![], 0, 0.0);
        let mut rng = keyed_rng([*seed, ORDER, 0, 0]);
        let mut order = train.len();
        loop {
            let rows = trainee.row_forwards();
            if rows >= looks.len() as u64 * budget / args.looks {
                let (test_loss, test_accuracy) = subject.evaluate(trainee.model(), &test, threads)?;
                tell(rows as f64 / budget as f64, test_accuracy);
                let mean = losses.iter().sum::<f64>() / losses.len() as f64;
                let train_loss = (!losses.is_empty()).then_some(mean);
                losses.clear();
                let (scope, method, seed) = (scope.to_string(), method.to_string(), *seed);
                let row_forwards = rows;
                #[rustfmt::skip]
                looks.push(Look { scope, method, seed, lr, step, row_forwards, seconds, train_loss, test_loss, test_accuracy, trained });
            }
            if rows >= budget {
                return Ok(looks);
            }
            if order + args.batch_size > train.len() {
                train.shuffle(&mut rng);
                order = 0;
            }
            let texts = &train[order..train.len().min(order + args.batch_size)];
            order += args.batch_size;
            let rate = Schedule::Cosine.rate_at(lr, rows as f64 / budget as f64);
            let started = Instant::now();
            let batch = trainee.model().batch::<B>(&subject.tokenizer, texts, &subject.device)?;
            let loss;
            (trainee, loss) = trainee.step(&batch, rate)?;
            seconds += started.elapsed().as_secs_f64();
            ensure!(loss.is_finite(), "{scope}, {method}, step {step}: the loss is not finite; lower --lr {lr}");
            losses.push(loss);
            step += 1;
        }
    }
}
