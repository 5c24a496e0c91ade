//! Brings a frozen image encoder and a frozen text encoder into one space with forward passes only.
//!
//! ```text
//! cargo run --release --example clip_align
//! cargo run --release --example clip_align -- --method backprop
//! cargo run --release --example clip_align -- --text-encoder path/to/all-MiniLM-L6-v2
//! ```
//!
//! The pairs are made-up scenes with captions, see `flops_multimodal::data::scenes`; the captions of the test are combinations that training never
//! saw. Encoder outputs are computed once: what is trained are two projections and the logit scale, and a step costs those.
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use burn::data::dataloader::DataLoader;
use burn::data::dataloader::batcher::Batcher;
use burn::data::dataset::Dataset;
use burn::module::AutodiffModule;
use burn::prelude::*;
use clap::Parser;
use flops_core::allocator::AnyAllocator;
use flops_core::{BackpropLearner, EpochLoader, ForwardConfig, ForwardLearner, ForwardModel, Plain, Probe};
use flops_examples::artifacts::{Artifacts, Settings, merge};
use flops_examples::backend::{self, AB, B, Device};
use flops_examples::fit::{self, Fitted, Plan, fit};
use flops_examples::groups::LrGroup;
use flops_examples::history::{History, Row, Split};
use flops_examples::method::{Method, Spending};
use flops_examples::pairs::{PairBatch, PairBatcher, PairFeatures, PairItem};
use flops_examples::sheet::{Found, retrieval_sheet};
use flops_examples::{BURN_VERSION, cli, curves};
use flops_multimodal::checkpoint::alignment;
use flops_multimodal::data::{Scenes, Shift, scenes};
use flops_multimodal::{
    Alignment, AlignmentConfig, ImageEncoder, Pairs, Recall, TextEncoder, class_embeddings, zero_shot_accuracy,
};
use flops_vit::checkpoint::Source;
use serde_json::{Value, json};

/// Settings that do not change what is computed: a resumed run may have others.
const FREE_SETTINGS: [&str; 2] = ["threads", "memory_bound"];
/// Captions on the contact sheet, and images beside each.
const SHEET: (usize, usize) = (10, 6);

/// Align two frozen encoders with forward passes only.
#[derive(Parser, Debug)]
#[command(name = "clip_align", version)]
struct Args {
    /// How gradients are obtained: forward (this library's way), backprop, or by the settings of another method: flops (the paper),
    /// mezo, fzoo, es (evolution strategies), eggroll.
    #[arg(long, default_value = "forward")]
    method: Method,
    /// Image encoder: a checkpoint or folder of a ViT, or a folder of a CLIP model [default: the one shipped with flops-vit].
    #[arg(long)]
    image_encoder: Option<Source>,
    /// Text encoder: a folder of a BERT sentence encoder such as all-MiniLM-L6-v2, or of a CLIP model [default: the one shipped with
    /// flops-multimodal].
    #[arg(long)]
    text_encoder: Option<Source>,
    #[command(flatten)]
    spending: Spending,
    /// Pictures of each training combination, drawn and captioned differently.
    #[arg(long, default_value_t = 3)]
    copies: usize,
    /// Width of the common space; above 64 the learned control variate is left out.
    #[arg(long, default_value_t = 64)]
    embed_dim: usize,
    /// Width of a hidden layer in the projections; 0 for linear ones.
    #[arg(long, default_value_t = 0)]
    hidden_dim: usize,
    /// Passes over the training pairs.
    #[arg(long, default_value_t = 40)]
    epochs: usize,
    /// Pairs of a step.
    #[arg(long, default_value_t = 128)]
    batch_size: usize,
    /// AdamW's learning rate; it falls to zero as a cosine over all epochs.
    #[arg(long, default_value_t = 3e-3, allow_negative_numbers = true)]
    lr: f64,
    /// Decoupled weight decay, in units of the learning rate.
    #[arg(long, default_value_t = 0.1, allow_negative_numbers = true)]
    weight_decay: f64,
    /// Seed of pictures, order, projections, noise and allocation.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Go on with the run in the artifact folder after its last finished epoch.
    #[arg(long)]
    resume: bool,
    /// Stop after this epoch, to go on with --resume another time.
    #[arg(long)]
    stop_after: Option<usize>,
    /// Where the run's files go.
    #[arg(long, default_value = "artifacts/clip_align")]
    artifact_dir: PathBuf,
    /// Plain lines instead of the terminal interface.
    #[arg(long)]
    plain: bool,
}

impl Args {
    /// What can be said before anything is loaded.
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
        self.spending.config(self.method.recipe(), self.seed)
    }

    /// Every setting of the run, by its flag's name.
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
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "seed": self.seed,
        });
        if self.method.is_forward() {
            merge(&mut settings, self.spending.settings(self.method.recipe(), config)?);
        }
        settings.as_object().cloned().context("settings are an object")
    }
}

/// What the test pairs say of an alignment.
struct Judged {
    loss: f64,
    recall: Recall,
}

fn judge(model: &Alignment<B>, (images, texts): &(Tensor<B, 2>, Tensor<B, 2>)) -> Judged {
    let said = model.forward((images.clone(), texts.clone()), &mut Probe::clean());
    let recall = Recall::of(said.images.clone(), said.texts.clone());
    let loss = model.losses(said, Pairs::new(images.dims()[0])).mean().into_scalar().elem();
    Judged { loss, recall }
}

/// Zero-shot accuracy on the test images, by what the classes are.
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

fn align(args: Args) -> Result<()> {
    let config = args.validate()?;
    let artifacts = Artifacts::open(&args.artifact_dir)?;
    let settings = args.settings(&config)?;
    if args.resume {
        artifacts.check_resumable(&settings, &FREE_SETTINGS)?;
    }
    let device = backend::device()?;
    let threads = config.estimator.threads;
    let image = match &args.image_encoder {
        Some(source) => ImageEncoder::<B>::open(source, &device)?,
        None => ImageEncoder::shipped(&device)?,
    };
    let text = match &args.text_encoder {
        Some(source) => TextEncoder::<B>::open(source, &device)?,
        None => TextEncoder::shipped(&device)?,
    };
    let (train_scenes, test_scenes) = (Scenes::train(args.copies, args.seed), Scenes::test(1, args.seed));
    println!("encoding {} training and {} test scenes, once", train_scenes.len(), test_scenes.len());
    let features = |scenes: &Scenes, captions: &[String]| {
        PairFeatures::of_scenes(scenes, captions, (&image, &text), threads, &device)
    };
    let train = features(&train_scenes, &train_scenes.captions(args.seed))?;
    let test = features(&test_scenes, &test_scenes.titles())?;
    let raw_test = test.tensors(&device);
    let scaling = train.scaling();
    let (train, test) = (train.scaled(&scaling), test.scaled(&scaling));
    let pairs = train.len();
    let test_tensors = test.tensors(&device);

    let [image_dim, text_dim] = train.dims;
    let sizes =
        AlignmentConfig::new(image_dim, text_dim).with_embed_dim(args.embed_dim).with_hidden_dim(args.hidden_dim);
    <AB as burn::tensor::backend::Backend>::seed(&device, args.seed);
    let model = sizes.init::<AB>(&device)?;
    let before = judge(&model.valid(), &test_tensors);
    let test: EpochLoader<B, PairItem, PairBatch<B>> =
        EpochLoader::new(Arc::new(test.clone()), PairBatcher, test.len(), device.clone())?;
    let test: Arc<dyn DataLoader<B, PairBatch<B>>> = Arc::new(test);
    let (resume, history) = if args.resume {
        let (epoch, history) = fit::resumable(&artifacts)?;
        (Some(epoch), history)
    } else {
        let mut history = History::default();
        history.push(Row::new(Split::Test, 0, before.loss, before.recall.image_to_text[0]));
        artifacts.start(&settings)?;
        (None, history)
    };
    println!("{}: {pairs} training pairs, {} parameters", args.method.name(), model.num_params());

    let data = Arc::new(train);
    let epoch = resume.unwrap_or(0) as u64;
    let plan = |monitor| Plan {
        artifacts: &artifacts,
        device: device.clone(),
        lr: args.lr,
        group: LrGroup { path: vec!["model", "logit_scale"], factor: 1.0 },
        weight_decay: args.weight_decay as f32,
        steps: args.epochs * pairs.div_ceil(args.batch_size),
        last_epoch: args.stop_after.unwrap_or(args.epochs),
        resume,
        monitor,
        plain: args.plain,
    };
    let (model, history, stopped) = if args.method.is_forward() {
        let allocator = AnyAllocator::<AB>::new(args.spending.allocator(args.method.recipe())?, &device)?;
        let learner = ForwardLearner::new(model, allocator, config.clone())?;
        let plan = plan(Some(learner.monitor()));
        let loader = loader(&data, Plain(PairBatcher), &args, epoch, &device)?;
        let Fitted { learner, history, stopped, .. } = fit(learner, loader, test, history, plan)?;
        (learner.model, history, stopped)
    } else {
        let learner = BackpropLearner::new(model).with_threads(threads);
        let loader = loader(&data, PairBatcher, &args, epoch, &device)?;
        let Fitted { learner, history, stopped, .. } = fit(learner, loader, test, history, plan(None))?;
        (learner.model, history, stopped)
    };

    let after = judge(&model, &test_tensors);
    let model = model.of_raw(&scaling[0], &scaling[1]);
    alignment::save(&model, &artifacts.path("alignment.safetensors"), false)?;
    history.write(&artifacts)?;
    let title = format!("alignment, {}, batch {}", describe(&args), args.batch_size);
    artifacts.write("curves.svg", curves::draw(&history, &title)?.as_bytes())?;
    let sheet = sheet(&model, &raw_test, &test_scenes, after.recall.text_to_image[0])?;
    artifacts.write("retrieval.svg", sheet.as_bytes())?;
    let both = |at: usize| json!({"image_to_text": after.recall.image_to_text[at], "text_to_image": after.recall.text_to_image[at]});
    let mut summary = Value::Object(settings);
    merge(
        &mut summary,
        json!({
            "recall_at_1": both(0),
            "recall_at_5": both(1),
            "recall_at_10": both(2),
            "recall_at_1_mean": after.recall.mean_at_1(),
            "recall_at_1_before": before.recall.mean_at_1(),
            "zero_shot": zero_shot(&model, raw_test.0.clone(), &text, &test_scenes)?,
            "loss_before": before.loss,
            "loss_after": after.loss,
            "train_loss": history.mean(|row| Some(row.loss)),
            "logit_scale": model.scale().into_scalar().elem::<f64>(),
            "queries_used": history.queries(),
            "steps": history.steps(),
            "seconds": history.seconds(),
            "variance_vs_uniform": history.mean(|row| row.variance_vs_uniform),
            "ceiling": history.mean(|row| row.ceiling),
            "train_pairs": pairs,
            "test_pairs": test_scenes.len(),
            "stopped": stopped,
            "versions": {"flops": env!("CARGO_PKG_VERSION"), "burn": BURN_VERSION},
        }),
    );
    artifacts.write_json("summary.json", &summary)?;
    println!("\n{}", describe(&args));
    let percent = |value: f64| format!("{:.1} %", 100.0 * value);
    let recall = |at: usize| {
        format!("{} / {}", percent(after.recall.image_to_text[at]), percent(after.recall.text_to_image[at]))
    };
    for (name, value) in [
        ("recall@1, image to text / text to image", recall(0)),
        ("recall@5", recall(1)),
        ("recall@10", recall(2)),
        ("test loss before / after", format!("{:.3} / {:.3}", before.loss, after.loss)),
        ("zero-shot accuracy, colour / shape", {
            let of = |name: &str| percent(summary["zero_shot"][name].as_f64().unwrap_or(f64::NAN));
            format!("{} / {}", of("colour"), of("shape"))
        }),
        ("queries", history.queries().to_string()),
        ("seconds", format!("{:.1}", history.seconds())),
    ] {
        println!("  {name:<42}{value:>18}");
    }
    println!(
        "\n{} holds summary.json, metrics.csv, curves.svg, retrieval.svg and alignment.safetensors",
        artifacts.dir().display()
    );
    Ok(())
}

/// The training pairs, shuffled anew in each epoch.
fn loader<O: Send + 'static>(
    data: &Arc<PairFeatures>,
    batcher: impl Batcher<AB, PairItem, O> + 'static,
    args: &Args,
    epoch: u64,
    device: &Device,
) -> Result<Arc<dyn DataLoader<AB, O>>> {
    let loader = EpochLoader::new(data.clone(), batcher, args.batch_size, device.clone())?;
    Ok(Arc::new(loader.shuffled(args.seed).starting_at_epoch(epoch)))
}

/// The method in a few words.
fn describe(args: &Args) -> String {
    match args.spending.allocator(args.method.recipe()) {
        Ok(allocator) if args.method.is_forward() => {
            format!(
                "{}, {} allocator, {} queries per pair",
                args.method.name(),
                allocator.name(),
                args.spending.queries
            )
        }
        _ => "backpropagation".into(),
    }
}

/// Captions of the test and the images most similar to each, on the raw features.
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
        // spread evenly over the test
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

fn main() -> ExitCode {
    cli::run(align)
}
