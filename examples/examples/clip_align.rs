//! Brings a frozen image encoder and a frozen text encoder into one space with forward passes only.
//!
//! ```text
//! cargo run --release --example clip_align
//! cargo run --release --example clip_align -- --method backprop
//! cargo run --release --example clip_align -- --text-encoder path/to/all-MiniLM-L6-v2
//! ```
//!
//! The pairs are made-up scenes with captions, see `flops_multimodal::data::scenes`. The test
//! captions name combinations that are not in the training set. Encoder outputs are computed once.
//! Two projections and the logit scale are trained, so a step costs only those.
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

#[macro_use]
extern crate flops_report;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use burn::data::dataloader::DataLoader;
use burn::data::dataset::Dataset;
use burn::module::AutodiffModule;
use burn::prelude::*;
use clap::Parser;
use flops_core::allocator::AnyAllocator;
use flops_core::{BackpropLearner, EpochLoader, ForwardConfig, ForwardLearner, ForwardModel, InnerBatcher, Probe};
use flops_examples::BURN_VERSION;
use flops_examples::backend::{self, AB, B, Device};
use flops_examples::cli::{self, forward_args::ForwardArgs, method::Method};
use flops_examples::data::pairs::{PairBatch, PairBatcher, PairFeatures, PairItem};
use flops_examples::plot::contact_sheet::{Found, retrieval_sheet};
use flops_examples::run::artifacts::{Artifacts, Settings, merge};
use flops_examples::run::fit::{TrainedRun, fit, resumable};
use flops_examples::run::history::{History, Row, Split};
use flops_examples::run::{curves::Curves, optimizer::OptimizerKind, plan::RunPlan};
use flops_multimodal::alignment::Scaling;
use flops_multimodal::checkpoint::alignment;
use flops_multimodal::data::{Scenes, Shift, scenes};
use flops_multimodal::{
    Alignment, AlignmentConfig, ImageEncoder, Pairs, Recall, TextEncoder, class_embeddings, zero_shot_accuracy,
};
use flops_vit::checkpoint::Source;
use serde_json::{Value, json};

/// Settings that do not change the result: a resumed run may have other values.
const FREE_SETTINGS: [&str; 2] = ["threads", "memory_bound"];
/// Captions on the contact sheet, and images beside each.
const SHEET: (usize, usize) = (10, 6);

// ---- the run ------------------------------------------------------------------------------------

fn main() -> ExitCode {
    cli::run(run)
}

fn run(args: Args) -> Result<()> {
    let config = args.validate()?;
    let artifacts = Artifacts::open(&args.artifact_dir)?;
    let settings = args.settings(&config)?;
    if args.resume {
        artifacts.check_resumable(&settings, &FREE_SETTINGS)?;
    }
    let device = backend::device()?;

    let data = Data::encode(&args, config.estimator.threads, &device)?;
    let [image_dim, text_dim] = data.train.dims;
    let sizes =
        AlignmentConfig::new(image_dim, text_dim).with_embed_dim(args.embed_dim).with_hidden_dim(args.hidden_dim);
    <AB as burn::tensor::backend::Backend>::seed(&device, args.seed);
    let model = sizes.init::<AB>(&device)?;

    let run = Run { args, config, settings, artifacts, device, data };
    let before = evaluate(&model.valid(), &run.data.test);
    let (resume, history) = run.start(&before)?;
    println!("{}: {} training pairs, {} parameters", run.args.method.name(), run.data.train.len(), model.num_params());
    let trained = run.fit(model, resume, history)?;
    run.report(trained, &before)
}

// ---- settings -----------------------------------------------------------------------------------

/// Align two frozen encoders with forward passes only.
#[derive(Parser, Debug)]
#[command(name = "clip_align", version)]
struct Args {
    /// How gradients are obtained: forward (this library's defaults), backprop, or the settings of
    /// another method: flops (the paper), mezo, fzoo, es (evolution strategies), eggroll, lozo,
    /// zo-muon, pseuzo.
    #[arg(long, default_value = "forward")]
    method: Method,
    /// Image encoder: a checkpoint or folder of a ViT, or a folder of a CLIP model [default: the
    /// one shipped with flops-vit].
    #[arg(long)]
    image_encoder: Option<Source>,
    /// Text encoder: a folder of a BERT sentence encoder such as all-MiniLM-L6-v2, or of a CLIP
    /// model [default: the one shipped with flops-multimodal].
    #[arg(long)]
    text_encoder: Option<Source>,
    #[command(flatten)]
    forward: ForwardArgs,
    /// Images of each training combination, each drawn and captioned differently.
    #[arg(long, default_value_t = 3)]
    copies: usize,
    /// Width of the shared space; above 64 the learned control variate is left out.
    #[arg(long, default_value_t = 64)]
    embed_dim: usize,
    /// Width of the hidden layer of the projections; 0 for linear projections.
    #[arg(long, default_value_t = 0)]
    hidden_dim: usize,
    /// Passes over the training pairs.
    #[arg(long, default_value_t = 40)]
    epochs: usize,
    /// Pairs of a step.
    #[arg(long, default_value_t = 128)]
    batch_size: usize,
    /// Optimizer: adamw, or muon (Muon on matrices, AdamW on vectors) [default: the method's, muon
    /// for zo-muon, otherwise adamw].
    #[arg(long, value_enum)]
    optimizer: Option<OptimizerKind>,
    /// The learning rate; it falls to zero as a cosine over all epochs.
    #[arg(long, default_value_t = 3e-3, allow_negative_numbers = true)]
    lr: f64,
    /// Decoupled weight decay, in units of the learning rate.
    #[arg(long, default_value_t = 0.1, allow_negative_numbers = true)]
    weight_decay: f64,
    /// Seed of the images, the order, the projections, the noise and the allocation.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Continue the run in the artifact folder after its last finished epoch.
    #[arg(long)]
    resume: bool,
    /// Stop after this epoch; --resume continues.
    #[arg(long)]
    stop_after: Option<usize>,
    /// Folder of the run's files.
    #[arg(long, default_value = "artifacts/clip_align")]
    artifact_dir: PathBuf,
    /// Print plain lines instead of the terminal interface.
    #[arg(long)]
    plain: bool,
}

impl Args {
    /// Checks the flags before anything is loaded, and returns the settings of the learner.
    fn validate(&self) -> Result<ForwardConfig> {
        ensure!(self.epochs > 0, "--epochs 0: train for at least 1 epoch");
        ensure!(
            self.batch_size > 1,
            "--batch-size {}: use at least 2, there is nothing to tell a single pair from",
            self.batch_size
        );
        ensure!(self.embed_dim > 0, "--embed-dim 0: use at least 1");
        ensure!((1..=100).contains(&self.copies), "--copies {}: use 1 to 100", self.copies);
        ensure!(self.lr > 0.0 && self.lr <= 1.0, "--lr {}: use a number above 0 and at most 1", self.lr);
        let decay = self.weight_decay;
        ensure!((0.0..=1.0).contains(&decay), "--weight-decay {decay}: use a number from 0 to 1");
        if let Some(epoch) = self.stop_after {
            ensure!((1..=self.epochs).contains(&epoch), "--stop-after {epoch}: use 1 to {}, the epochs", self.epochs);
        }
        self.forward.config(self.method.recipe(), self.seed)
    }

    /// Returns every setting of the run, by the name of its flag.
    fn settings(&self, config: &ForwardConfig) -> Result<Settings> {
        let mut settings = json!({
            "method": self.method.name(),
            "backend": backend::NAME,
            "image_encoder": self.image_encoder.as_ref().map(Source::to_string),
            "text_encoder": self.text_encoder.as_ref().map(Source::to_string),
            "copies": self.copies,
            "embed_dim": self.embed_dim,
            "hidden_dim": self.hidden_dim,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "optimizer": self.optimizer().name(),
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "seed": self.seed,
        });
        if self.method.is_forward() {
            merge(&mut settings, self.forward.settings(self.method.recipe(), config)?);
        }
        settings.as_object().cloned().context("settings are an object")
    }

    /// Returns the optimizer that was given, otherwise the method's.
    fn optimizer(&self) -> OptimizerKind {
        self.optimizer.unwrap_or(OptimizerKind::of(self.method.recipe()))
    }

    /// Returns the method in a few words.
    fn description(&self) -> String {
        match self.forward.allocator(self.method.recipe()) {
            Ok(allocator) if self.method.is_forward() => {
                let (method, allocator) = (self.method.name(), allocator.name());
                format!("{method}, {allocator} allocator, {} queries per pair", self.forward.queries)
            }
            _ => "backpropagation".into(),
        }
    }
}

// ---- data ---------------------------------------------------------------------------------------

/// Features of images and of texts, one row per pair.
type Features = (Tensor<B, 2>, Tensor<B, 2>);

/// The pairs as encoder outputs.
struct Data {
    /// Standardised features.
    train: Arc<PairFeatures>,
    test_loader: Arc<dyn DataLoader<B, PairBatch<B>>>,
    /// Standardised features of the test pairs.
    test: Features,
    /// The same as the encoders return them.
    raw_test: Features,
    scaling: [Scaling; 2],
    test_scenes: Scenes,
    text_encoder: TextEncoder<B>,
}

impl Data {
    /// Draws the scenes and runs the encoders on them, once.
    fn encode(args: &Args, threads: usize, device: &Device) -> Result<Self> {
        let image = match &args.image_encoder {
            Some(source) => ImageEncoder::<B>::open(source, device)?,
            None => ImageEncoder::shipped(device)?,
        };
        let text = match &args.text_encoder {
            Some(source) => TextEncoder::<B>::open(source, device)?,
            None => TextEncoder::shipped(device)?,
        };
        text.notes().iter().for_each(|note| println!("{note}"));
        let (train_scenes, test_scenes) = (Scenes::train(args.copies, args.seed), Scenes::test(1, args.seed));
        println!("encoding {} training and {} test scenes, once", train_scenes.len(), test_scenes.len());
        let features = |scenes: &Scenes, captions: &[String]| {
            PairFeatures::of_scenes(scenes, captions, (&image, &text), threads, device)
        };
        let train = features(&train_scenes, &train_scenes.captions(args.seed))?;
        let test = features(&test_scenes, &test_scenes.titles())?;
        let raw_test = test.tensors(device);
        let scaling = train.scaling();
        let (train, test) = (train.scaled(&scaling), test.scaled(&scaling));
        let test_tensors = test.tensors(device);
        let pairs = test.len();
        let test_loader: EpochLoader<B, PairItem, PairBatch<B>> =
            EpochLoader::new(Arc::new(test), PairBatcher, pairs, device.clone())?;
        Ok(Self {
            train: Arc::new(train),
            test_loader: Arc::new(test_loader),
            test: test_tensors,
            raw_test,
            scaling,
            test_scenes,
            text_encoder: text,
        })
    }
}

// ---- learner and fit ----------------------------------------------------------------------------

/// A run whose settings and data are known.
struct Run {
    args: Args,
    config: ForwardConfig,
    settings: Settings,
    artifacts: Artifacts,
    device: Device,
    data: Data,
}

impl Run {
    /// Starts a new run, or finds the epoch to resume from; returns that epoch and the history up
    /// to it.
    fn start(&self, before: &Evaluation) -> Result<(Option<usize>, History)> {
        if self.args.resume {
            let (epoch, history) = resumable(&self.artifacts)?;
            return Ok((Some(epoch), history));
        }
        let mut history = History::default();
        history.push(Row::new(Split::Test, 0, before.loss, before.recall.image_to_text[0]));
        self.artifacts.start(&self.settings)?;
        Ok((None, history))
    }

    /// Returns the training pairs in batches without a graph, shuffled anew in each epoch.
    fn loader(&self, first_epoch: usize) -> Result<Arc<dyn DataLoader<AB, PairBatch<B>>>> {
        let batcher = InnerBatcher(PairBatcher);
        let loader = EpochLoader::new(self.data.train.clone(), batcher, self.args.batch_size, self.device.clone())?;
        Ok(Arc::new(loader.shuffled(self.args.seed).starting_at_epoch(first_epoch as u64)))
    }

    /// Trains the alignment with burn-train.
    fn fit(&self, model: Alignment<AB>, resume: Option<usize>, history: History) -> Result<TrainedRun<Alignment<B>>> {
        let args = &self.args;
        let plan = |monitor| RunPlan {
            artifacts: &self.artifacts,
            device: self.device.clone(),
            lr: args.lr,
            optimizer: args.optimizer(),
            groups: vec![],
            beta_2: 0.999,
            weight_decay: args.weight_decay as f32,
            steps: args.epochs * self.data.train.len().div_ceil(args.batch_size),
            last_epoch: args.stop_after.unwrap_or(args.epochs),
            resume,
            monitor,
            plain: args.plain,
        };
        let (train, test) = (self.loader(resume.unwrap_or(0))?, self.data.test_loader.clone());
        if args.method.is_forward() {
            let allocator = AnyAllocator::<AB>::new(args.forward.allocator(args.method.recipe())?, &self.device)?;
            let learner = ForwardLearner::new(model, allocator, self.config.clone())?;
            let plan = plan(Some(learner.monitor()));
            let trained = fit(learner, train, test, history, plan)?;
            Ok(trained.map(|learner| learner.model))
        } else {
            let learner = BackpropLearner::new(model).with_threads(self.config.estimator.threads);
            let trained = fit(learner, train, test, history, plan(None))?;
            Ok(trained.map(|learner| learner.model))
        }
    }
}

// ---- report -------------------------------------------------------------------------------------

/// The loss and the retrieval recall on the test pairs.
struct Evaluation {
    loss: f64,
    recall: Recall,
}

fn evaluate(model: &Alignment<B>, (images, texts): &Features) -> Evaluation {
    let output = model.forward((images.clone(), texts.clone()), &mut Probe::clean());
    let recall = Recall::of(output.images.clone(), output.texts.clone());
    let loss = model.losses(output, Pairs::new(images.dims()[0])).mean().into_scalar().elem();
    Evaluation { loss, recall }
}

impl Run {
    /// Evaluates the trained alignment, writes the files of the run and prints its table.
    fn report(&self, trained: TrainedRun<Alignment<B>>, before: &Evaluation) -> Result<()> {
        let (args, data, artifacts) = (&self.args, &self.data, &self.artifacts);
        let TrainedRun { learner: model, history, stopped, .. } = trained;
        let after = evaluate(&model, &data.test);
        let model = model.fold_scaling(&data.scaling[0], &data.scaling[1]);
        alignment::save(&model, &artifacts.path("alignment.safetensors"), false)?;
        history.write(artifacts)?;
        let title = format!("alignment, {}, batch {}", args.description(), args.batch_size);
        artifacts.write("curves.svg", Curves::of(&history).draw(&title)?.as_bytes())?;
        let sheet = sheet(&model, &data.raw_test, &data.test_scenes, after.recall.text_to_image[0])?;
        artifacts.write("retrieval.svg", sheet.as_bytes())?;
        let summary = self.summary(&model, &history, stopped, (before, &after))?;
        artifacts.write_json("summary.json", &summary)?;
        print_table(args, &history, &summary, (before, &after));
        println!(
            "\n{} holds summary.json, metrics.csv, curves.svg, retrieval.svg and alignment.safetensors",
            artifacts.dir().display()
        );
        Ok(())
    }

    /// Returns what `summary.json` holds; `model` is the alignment of the raw features.
    fn summary(
        &self,
        model: &Alignment<B>,
        history: &History,
        stopped: Option<String>,
        (before, after): (&Evaluation, &Evaluation),
    ) -> Result<Value> {
        let data = &self.data;
        let recall = &after.recall;
        let both =
            |at: usize| json!({"image_to_text": recall.image_to_text[at], "text_to_image": recall.text_to_image[at]});
        let mut summary = Value::Object(self.settings.clone());
        let more = json!({
            "recall_at_1": both(0),
            "recall_at_5": both(1),
            "recall_at_10": both(2),
            "recall_at_1_mean": recall.mean_at_1(),
            "recall_at_1_before": before.recall.mean_at_1(),
            "zero_shot": zero_shot(model, data.raw_test.0.clone(), &data.text_encoder, &data.test_scenes)?,
            "loss_before": before.loss,
            "loss_after": after.loss,
            "train_loss": history.mean(|row| Some(row.loss)),
            "logit_scale": model.scale().into_scalar().elem::<f64>(),
            "queries_used": history.queries(),
            "steps": history.steps(),
            "seconds": history.seconds(),
            "variance_vs_uniform": history.mean(|row| row.variance_vs_uniform),
            "floor": history.mean(|row| row.floor),
            "train_pairs": data.train.len(),
            "test_pairs": data.test_scenes.len(),
            "stopped": stopped,
            "versions": {"flops": env!("CARGO_PKG_VERSION"), "burn": BURN_VERSION},
        });
        merge(&mut summary, more);
        Ok(summary)
    }
}

fn print_table(args: &Args, history: &History, summary: &Value, (before, after): (&Evaluation, &Evaluation)) {
    println!("\n{}", args.description());
    let percent = |value: f64| format!("{:.1} %", 100.0 * value);
    let recall = |at: usize| {
        format!("{} / {}", percent(after.recall.image_to_text[at]), percent(after.recall.text_to_image[at]))
    };
    let zero_shot = |attribute: &str| percent(summary["zero_shot"][attribute].as_f64().unwrap_or(f64::NAN));
    for (name, value) in [
        ("recall@1, image to text / text to image", recall(0)),
        ("recall@5", recall(1)),
        ("recall@10", recall(2)),
        ("test loss before / after", format!("{:.3} / {:.3}", before.loss, after.loss)),
        ("zero-shot accuracy, colour / shape", format!("{} / {}", zero_shot("colour"), zero_shot("shape"))),
        ("queries", history.queries().to_string()),
        ("seconds", format!("{:.1}", history.seconds())),
    ] {
        println!("  {name:<42}{value:>18}");
    }
}

/// Returns the zero-shot accuracy on the test images, for each attribute of a scene.
fn zero_shot(model: &Alignment<B>, images: Tensor<B, 2>, text: &TextEncoder<B>, test: &Scenes) -> Result<Value> {
    let images = model.embed_images(images);
    let accuracy = |words: &[&str], templates: &[&str], label: &dyn Fn(&scenes::Scene) -> usize| -> Result<f64> {
        let captions: Vec<String> =
            words.iter().flat_map(|word| templates.iter().map(move |t| t.replace("{}", word))).collect();
        let classes = class_embeddings(model.embed_texts(text.encode(&captions)?), words.len());
        let labels: Vec<usize> = test.scenes.iter().map(label).collect();
        Ok(zero_shot_accuracy(images.clone(), classes, &labels))
    };
    let thing = ["a {} thing", "a picture of a {} thing"];
    Ok(json!({
        "colour": accuracy(&scenes::COLOURS, &thing, &|scene| scene.colour)?,
        "shape": accuracy(&scenes::SHAPES, &["a {}", "a picture of a {}"], &|scene| scene.shape)?,
        "size": accuracy(&scenes::SIZES, &thing, &|scene| scene.size)?,
        "texture": accuracy(&scenes::TEXTURES, &thing, &|scene| scene.texture)?,
        "position": accuracy(&scenes::POSITIONS, &["a thing {}", "a picture of a thing {}"], &|scene| scene.position)?,
    }))
}

/// Draws some test captions, and the test images that are most similar to each.
///
/// `model` and features are those of the encoders as they are, not standardised.
fn sheet(
    model: &Alignment<B>,
    (images, texts): &(Tensor<B, 2>, Tensor<B, 2>),
    test: &Scenes,
    recall: f64,
) -> Result<String> {
    let similar: Vec<f32> = model
        .embed_texts(texts.clone())
        .matmul(model.embed_images(images.clone()).transpose())
        .into_data()
        .iter::<f32>()
        .collect();
    let (n, (captions, most)) = (test.len(), SHEET);
    let rows = (0..captions.min(n)).map(|row| {
        // spread evenly over the test set
        let own = row * n / captions.min(n);
        let of = &similar[own * n..(own + 1) * n];
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| of[b].total_cmp(&of[a]));
        let found = order.into_iter().take(most).map(|i| Found {
            pixels: test.scenes[i]
                .render(test.seeds[i], &Shift::NONE)
                .iter()
                .map(|p| (255.0 * p).round() as u8)
                .collect(),
            side: scenes::SIDE,
            similarity: of[i] as f64,
            right: i == own,
        });
        (test.scenes[own].title(), found.collect())
    });
    let title = format!("caption → most similar of {n} test scenes (recall@1 {:.1} %)", 100.0 * recall);
    retrieval_sheet(&title, &rows.collect::<Vec<_>>())
}
