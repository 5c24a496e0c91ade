//! Tunes a prompt of a black box through HTTP, from its scores alone, and compares it with the box as it is.
//!
//! ```text
//! cargo run --release --example prompt_tuning
//! cargo run --release --example prompt_tuning -- --prompt text
//! cargo run --release --example prompt_tuning -- --endpoint http://127.0.0.1:8080
//! ```
//!
//! Without `--endpoint` it starts a server of its own, in another process, and again where that process dies. The images are made-up scenes under a
//! domain shift: another camera, whose red, green and blue run into each other. The box knows the classes, but not that camera.
//!
//! Every answer is kept in `answers.journal`: after an interruption, `--resume` walks the same way again and asks only what was never answered.
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use burn::data::dataloader::DataLoader;
use burn::data::dataloader::batcher::Batcher;
use burn::data::dataset::InMemDataset;
use burn::module::{AutodiffModule, ModuleDisplay};
use burn::optim::{AdamConfig, GradientsParams, Optimizer};
use burn::prelude::*;
use burn::train::TrainStep;
use clap::{Parser, ValueEnum};
use flops_core::allocator::AnyAllocator;
use flops_core::{
    EpochLoader, ForwardConfig, ForwardLearner, ForwardModel, Plain, Probe, QueryBudget, Space, cross_entropy,
};
use flops_examples::artifacts::{Artifacts, Settings, merge};
use flops_examples::backend::{self, AB, B, Device};
use flops_examples::experiment::Progress;
use flops_examples::history::{History, Row, Split};
use flops_examples::method::Method;
use flops_examples::server::{Serving, serve};
use flops_examples::sheet::{Picture, contact_sheet};
use flops_examples::shots::{Shot, ShotBatch, ShotBatcher, shots};
use flops_examples::supervised::Supervised;
use flops_examples::{BURN_VERSION, cli, curves};
use flops_multimodal::blackbox::{BlackBox, BlackBoxError, Charge, HttpBlackBox, HttpConfig, InProcess, Metered};
use flops_multimodal::data::Scenes;
use flops_multimodal::data::scenes::SIDE;
use flops_multimodal::{Asked, Classifier, TextPrompt, VisualPrompt};
use serde_json::{Value, json};

/// What a run that was given up says.
const STOPPED: &str = "stopped; every answer is kept, and --resume asks only what was never answered";
/// Settings that do not change what is computed.
const FREE_SETTINGS: [&str; 1] = ["concurrency"];

/// What is tuned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Prompt {
    /// A small network that repaints the image (BlackVIP-style).
    Visual,
    /// A soft context in front of the class names (CoOp-style).
    Text,
}

/// Tune a prompt of a black box.
#[derive(Parser, Debug)]
#[command(name = "prompt_tuning", version)]
struct Args {
    /// How gradients are obtained: forward (this library's way), the settings of another method (flops, mezo, fzoo, es, eggroll), or backprop, which
    /// needs --local: a black box has no gradient.
    #[arg(long, default_value = "forward")]
    method: Method,
    /// What is tuned.
    #[arg(long, value_enum, default_value_t = Prompt::Visual)]
    prompt: Prompt,
    #[command(flatten)]
    serving: Serving,
    /// Address of a server that runs already [default: one of its own is started].
    #[arg(long)]
    endpoint: Option<String>,
    /// Ask the classifier in this process instead of over HTTP.
    #[arg(long, conflicts_with = "endpoint")]
    local: bool,
    /// The most queries in all, those of both evaluations included; never exceeded.
    #[arg(long, default_value_t = 20_000)]
    cap: u64,
    /// Training images of every class, or all there are of it.
    #[arg(long, default_value_t = 16)]
    shots: usize,
    /// Test images.
    #[arg(long, default_value_t = 320)]
    test: usize,
    /// How queries are dealt out: uniform, neyman, gaussian, bernoulli or gaussian-paper [default: the method's, gaussian].
    #[arg(long)]
    allocator: Option<String>,
    /// Where the noise falls: activation, weights or lowrank:R [default: lowrank:1 for a visual prompt, the method's for a text prompt].
    #[arg(long)]
    space: Option<Space>,
    /// Queries per image and step, on average; the clean pass comes on top.
    #[arg(long, default_value_t = 4)]
    queries: usize,
    /// Images of a step.
    #[arg(long, default_value_t = 32)]
    batch_size: usize,
    /// Smoothing scale [default: 0.05].
    #[arg(long)]
    sigma: Option<f64>,
    /// Adam's learning rate; it falls to zero as a cosine.
    #[arg(long, default_value_t = 5e-2)]
    lr: f64,
    /// Channels of the visual prompt's hidden layer.
    #[arg(long, default_value_t = 8)]
    hidden: usize,
    /// Seed of images, prompt, order, noise and allocation.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Requests in flight at once.
    #[arg(long, default_value_t = 2)]
    concurrency: usize,
    /// Go on with the interrupted run in the artifact folder: what was answered is not asked again.
    #[arg(long)]
    resume: bool,
    /// Where the run's files go.
    #[arg(long, default_value = "artifacts/prompt_tuning")]
    artifact_dir: PathBuf,
    /// Be the server, on that port, with that book.
    #[arg(long, hide = true)]
    serve: Option<u16>,
    #[arg(long, hide = true)]
    book: Option<PathBuf>,
}

impl Args {
    fn validate(&self) -> Result<ForwardConfig> {
        ensure!(self.shots > 0, "--shots 0: use at least 1");
        ensure!(self.test > 0, "--test 0: use at least 1");
        ensure!(self.batch_size > 0, "--batch-size 0: use at least 1");
        ensure!(self.lr > 0.0 && self.lr <= 1.0, "--lr {}: use a number above 0 and at most 1", self.lr);
        ensure!(self.concurrency > 0, "--concurrency 0: use at least 1");
        if !self.method.is_forward() && !self.local {
            bail!("--method backprop: a black box has no gradient; add --local to see what one would give");
        }
        let mut config = self.method.recipe().config(QueryBudget::new(self.queries, 1)?).with_seed(self.seed);
        let recipe = self.method == Method::Forward(flops_core::Recipe::Default);
        if let Some(space) = self.space.or((recipe && self.prompt == Prompt::Visual).then_some(Space::LowRank(1))) {
            config = config.with_space(space);
        }
        // all queries of a step in one pass: the client cuts it into requests
        config = config
            .with_max_rows(self.batch_size.saturating_mul(self.queries).max(2))
            .with_sigma(self.sigma.unwrap_or(0.05));
        config.validate()?;
        self.steps()?;
        Ok(config)
    }

    /// As many steps as the cap pays for, after the test images were asked twice.
    fn steps(&self) -> Result<usize> {
        let evaluations = 2 * (self.test as u64).min(u64::MAX / 4);
        let step = (self.batch_size as u64).saturating_mul(self.queries as u64 + 1);
        let steps = self.cap.saturating_sub(evaluations) / step;
        ensure!(
            steps > 0,
            "--cap {}: two evaluations take {evaluations} queries and a step {step}; raise it, or lower --test, --batch-size or --queries",
            self.cap
        );
        Ok(steps as usize)
    }

    fn settings(&self, config: &ForwardConfig) -> Result<Settings> {
        let settings = json!({
            "method": self.method.name(),
            "backend": backend::NAME,
            "prompt": self.prompt.to_possible_value().map(|v| v.get_name().to_string()),
            "classes": self.serving.classes.name(),
            "alignment": self.serving.alignment,
            "endpoint": self.endpoint,
            "local": self.local,
            "cap": self.cap,
            "shots": self.shots,
            "test": self.test,
            "allocator": self.allocator_kind()?.name(),
            "space": config.estimator.space.to_string(),
            "queries": self.queries,
            "batch_size": self.batch_size,
            "sigma": config.estimator.sigma,
            "lr": self.lr,
            "hidden": self.hidden,
            "seed": self.seed,
            "concurrency": self.concurrency,
        });
        settings.as_object().cloned().context("settings are an object")
    }

    fn allocator_kind(&self) -> Result<flops_core::allocator::AllocatorKind> {
        Ok(self.allocator.as_deref().map_or(Ok(self.method.recipe().allocator()), str::parse)?)
    }
}

/// Mean loss, and the share of the labels that the scores name.
fn judged<B: Backend>(scores: &Tensor<B, 2>, labels: Tensor<B, 1, Int>) -> (f64, f64) {
    let n = labels.dims()[0];
    let right = scores.clone().argmax(1).reshape([n]).equal(labels.clone()).int().sum().into_scalar().elem::<i64>();
    let loss = cross_entropy(scores.clone(), labels).mean().into_scalar().elem();
    (loss, right as f64 / n as f64)
}

/// Loss and accuracy of the box on the test images, under the prompt or without one.
fn evaluate<M>(model: Option<&M>, asked: &Asked, test: &[Shot], device: &Device) -> Result<(f64, f64)>
where
    M: ForwardModel<B, Input = Tensor<B, 4>, Output = Tensor<B, 2>>,
{
    let batch: ShotBatch<B> = ShotBatcher.batch(test.to_vec(), device);
    let scores = match model {
        Some(model) => model.forward(batch.input, &mut Probe::clean()),
        None => asked.scores(batch.input, None),
    };
    match asked.failure() {
        Some(error) => Err(error).context(STOPPED),
        None => Ok(judged(&scores, batch.target)),
    }
}

/// The learning rate of a step.
fn cosine(lr: f64, step: usize, steps: usize) -> f64 {
    lr * 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / steps as f64).cos())
}

/// Batches of the training images, one for each step, shuffled anew in each epoch.
fn batches<O: Send + 'static>(
    args: &Args,
    train: &[Shot],
    batcher: impl Batcher<AB, Shot, O> + 'static,
    device: &Device,
) -> Result<impl Iterator<Item = O>> {
    let data = Arc::new(InMemDataset::new(train.to_vec()));
    let loader = EpochLoader::new(data, batcher, args.batch_size, device.clone())?.shuffled(args.seed);
    Ok((0..).flat_map(move |_: usize| loader.iter().collect::<Vec<_>>()).take(args.steps()?))
}

/// Tunes by forward queries.
fn tune<M>(
    model: M,
    args: &Args,
    config: &ForwardConfig,
    spent: &dyn Fn() -> u64,
    train: &[Shot],
    device: &Device,
    history: &mut History,
) -> Result<M::InnerModule>
where
    M: AutodiffModule<AB> + ModuleDisplay + 'static,
    M::InnerModule:
        ModuleDisplay + ForwardModel<B, Input = Tensor<B, 4>, Target = Tensor<B, 1, Int>, Output = Tensor<B, 2>>,
{
    let allocator = AnyAllocator::<AB>::new(args.allocator_kind()?, device)?;
    let mut learner = ForwardLearner::new(model, allocator, config.clone())?;
    let mut optimizer = AdamConfig::new().init();
    let (steps, mut progress) = (args.steps()?, Progress::default());
    for (step, batch) in batches(args, train, Plain(ShotBatcher), device)?.enumerate() {
        let output = learner.step(batch);
        if let Some(error) = learner.monitor().error() {
            return Err(error).context(STOPPED);
        }
        let scored = output.item.classification.as_ref();
        let (loss, accuracy) = scored.map_or((f64::NAN, f64::NAN), |(scores, labels)| judged(scores, labels.clone()));
        history.push(Row {
            step_queries: Some(spent().saturating_sub(history.queries())),
            variance_vs_uniform: output.item.stats.as_ref().map(|s| s.relative_variance),
            ceiling: output.item.stats.as_ref().map(|s| s.ceiling),
            ..Row::new(Split::Train, 1, loss, accuracy)
        });
        learner = learner.optimize::<AB, _>(&mut optimizer, cosine(args.lr, step, steps), output.grads);
        progress.at(step + 1, steps, || format!("steps, loss {loss:.3}, {} queries", history.queries()));
    }
    Ok(learner.valid().model)
}

/// Tunes by backpropagation through the classifier, which a black box does not allow; for as many steps.
fn tune_open<M: AutodiffModule<AB>>(
    mut model: M,
    args: &Args,
    forward: impl Fn(&M, &Classifier<AB>, Tensor<AB, 4>) -> Result<Tensor<AB, 2>, BlackBoxError>,
    train: &[Shot],
    device: &Device,
    history: &mut History,
) -> Result<M::InnerModule> {
    let classifier = args.serving.classifier::<AB>(device)?;
    let mut optimizer = AdamConfig::new().init();
    let (steps, mut progress) = (args.steps()?, Progress::default());
    for (step, batch) in batches(args, train, ShotBatcher, device)?.enumerate() {
        let batch: ShotBatch<AB> = batch;
        let scores = forward(&model, &classifier, batch.input)?;
        let (loss, accuracy) = judged(&scores, batch.target.clone());
        history.push(Row::new(Split::Train, 1, loss, accuracy));
        let gradients = cross_entropy(scores, batch.target).mean().backward();
        let gradients = GradientsParams::from_grads(gradients, &model);
        model = optimizer.step(cosine(args.lr, step, steps), model, gradients);
        progress.at(step + 1, steps, || format!("steps, loss {loss:.3}"));
    }
    Ok(model.valid())
}

/// A box under the cap and with the journal, and, over HTTP, what can say how it counts itself.
struct Endpoint {
    metered: Arc<Metered<Box<dyn BlackBox>>>,
    http: Option<Arc<HttpBlackBox>>,
    /// Stopped with this value.
    _server: Option<Supervised>,
}

/// The box that was asked for.
fn endpoint(args: &Args, artifacts: &Artifacts, device: &Device) -> Result<Endpoint> {
    // our own server charges by the content of a query; of another nobody knows what it does with one that is sent again
    let charge = if args.endpoint.is_some() { Charge::PerAttempt } else { Charge::PerAnswer };
    let metered = |inner: Box<dyn BlackBox>| -> Result<Arc<Metered<Box<dyn BlackBox>>>> {
        let metered = Metered::new(inner, args.cap).with_charge(charge);
        Ok(Arc::new(metered.with_journal(artifacts.path("answers.journal"))?))
    };
    if args.local {
        let classifier = args.serving.classifier::<B>(device)?;
        let info = classifier.info().clone();
        let (classes, fallback) = (info.classes.len(), device.clone());
        let forward = move |images: Tensor<B, 4>, contexts: Option<Tensor<B, 3>>| {
            let rows = images.dims()[0];
            let scores = classifier.scores(classifier.embed_images(images), contexts);
            // what the box cannot score is no number, which the seam refuses
            scores.unwrap_or_else(|_| Tensor::full([rows, classes], f32::NAN, &fallback))
        };
        let inner = InProcess::<B, _>::new(info, forward, 64, device)?;
        return Ok(Endpoint { metered: metered(Box::new(inner))?, http: None, _server: None });
    }
    let (address, server) = match &args.endpoint {
        Some(address) => (address.clone(), None),
        None => {
            let server = Supervised::start(&args.serving, &artifacts.path("server.book"))?;
            (server.address.clone(), Some(server))
        }
    };
    let http = HttpConfig::new(address).with_concurrency(args.concurrency).with_retries(30);
    let http = http.with_backoff(Duration::from_millis(250), Duration::from_secs(2));
    let http = Arc::new(HttpBlackBox::connect(http)?);
    Ok(Endpoint { metered: metered(Box::new(http.clone()))?, http: Some(http), _server: server })
}

/// Gives what an earlier run in the folder paid for another name: it is never thrown away.
fn set_aside(artifacts: &Artifacts) -> Result<()> {
    let names = ["answers.journal", "server.book"];
    if names.iter().all(|name| !artifacts.path(name).exists()) {
        return Ok(());
    }
    let free = (1..).find(|n| names.iter().all(|name| !artifacts.path(&format!("{name}.{n}")).exists())).unwrap_or(0);
    for name in names.iter().filter(|name| artifacts.path(name).exists()) {
        let (from, to) = (artifacts.path(name), artifacts.path(&format!("{name}.{free}")));
        std::fs::rename(&from, &to).with_context(|| format!("cannot rename {} to {}", from.display(), to.display()))?;
    }
    println!("the answers of the earlier run are kept as answers.journal.{free}");
    Ok(())
}

fn run(args: Args) -> Result<()> {
    if let Some(port) = args.serve {
        // ends with the process that started it, however that ended
        std::thread::spawn(|| {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            std::process::exit(0);
        });
        return serve(&args.serving, port, args.book.as_deref(), |address| println!("listening on {address}"));
    }
    let config = args.validate()?;
    let artifacts = Artifacts::open(&args.artifact_dir)?;
    let settings = args.settings(&config)?;
    if args.resume {
        artifacts.check_resumable(&settings, &FREE_SETTINGS)?;
    } else {
        set_aside(&artifacts)?;
        artifacts.start(&settings)?;
    }
    let started = Instant::now();
    let device = backend::device()?;
    let classes = args.serving.classes;
    let count = args.shots.saturating_mul(classes.names().len());
    let train = shots(&Scenes::train(1, args.seed), classes, count, args.seed);
    let test = shots(&Scenes::test(1, args.seed), classes, args.test, args.seed);
    let args = Args { test: test.len(), ..args };
    let endpoint = endpoint(&args, &artifacts, &device)?;
    let (asked, spent) = (Asked::new(endpoint.metered.clone()), || endpoint.metered.spent());
    ensure!(
        asked.info().classes == classes.names(),
        "the endpoint scores {:?}, the images are labelled by {}; choose the classes it has with --classes",
        asked.info().classes,
        classes.name()
    );
    let mut history = History::default();
    let tested = |history: &mut History, epoch: usize, (loss, accuracy): (f64, f64)| {
        let step_queries = Some(spent().saturating_sub(history.queries()));
        history.push(Row { step_queries, ..Row::new(Split::Test, epoch, loss, accuracy) });
        accuracy
    };
    let zero_shot = tested(&mut history, 0, evaluate::<VisualPrompt<B>>(None, &asked, &test, &device)?);
    let (images, tests) = (train.len(), test.len());
    println!("{images} training images, {tests} test images, zero-shot accuracy {:.1} %", 100.0 * zero_shot);
    <AB as burn::tensor::backend::Backend>::seed(&device, args.seed);
    let (tuned, seen) = match args.prompt {
        Prompt::Visual => {
            let model = VisualPrompt::<AB>::new(asked.clone(), args.hidden, &device)?;
            let model = if args.method.is_forward() {
                tune(model, &args, &config, &spent, &train, &device, &mut history)?
            } else {
                let forward = |m: &VisualPrompt<AB>, classifier: &Classifier<AB>, images| {
                    classifier.scores(classifier.embed_images(m.repaint(images, &mut Probe::clean())), None)
                };
                tune_open(model, &args, forward, &train, &device, &mut history)?
            };
            (evaluate(Some(&model), &asked, &test, &device)?, Some(pictures(&model, &test, &device)))
        }
        Prompt::Text => {
            let model = TextPrompt::<AB>::new(asked.clone(), &device)?;
            let model = if args.method.is_forward() {
                tune(model, &args, &config, &spent, &train, &device, &mut history)?
            } else {
                let forward = |m: &TextPrompt<AB>, classifier: &Classifier<AB>, images: Tensor<AB, 4>| {
                    let [_, tokens, dim] = m.context.dims();
                    let context = m.context.val().expand([images.dims()[0], tokens, dim]);
                    classifier.scores(classifier.embed_images(images), Some(context))
                };
                tune_open(model, &args, forward, &train, &device, &mut history)?
            };
            (evaluate(Some(&model), &asked, &test, &device)?, None)
        }
    };
    let tuned = tested(&mut history, 1, tuned);
    let used = spent();
    let server = endpoint.http.as_ref().and_then(|http| http.count().ok());
    history.write(&artifacts)?;
    let title = format!("{} prompt of a black box, {}", settings["prompt"].as_str().unwrap_or(""), args.method.name());
    artifacts.write("curves.svg", curves::draw(&history, &title)?.as_bytes())?;
    if let Some(seen) = &seen {
        let title = "as the camera gives them (left of each pair) and as the tuned prompt repaints them";
        artifacts.write("prompt.svg", contact_sheet(title, seen)?.as_bytes())?;
    }
    let mut summary = Value::Object(settings);
    merge(
        &mut summary,
        json!({
            "accuracy_zero_shot": zero_shot,
            "accuracy_tuned": tuned,
            "queries_used": used,
            "queries_server": server,
            "answered_from_journal": endpoint.metered.answered_from_journal(),
            "steps": history.steps(),
            "loss_before": history.rows.first().map(|row| row.loss),
            "loss_after": history.rows.last().map(|row| row.loss),
            "train_images": images,
            "test_images": tests,
            "seconds": started.elapsed().as_secs_f64(),
            "versions": {"flops": env!("CARGO_PKG_VERSION"), "burn": BURN_VERSION},
        }),
    );
    artifacts.write_json("summary.json", &summary)?;
    println!();
    for (name, value) in [
        ("accuracy, zero-shot", format!("{:.1} %", 100.0 * zero_shot)),
        ("accuracy, tuned", format!("{:.1} %", 100.0 * tuned)),
        ("queries used", used.to_string()),
        ("queries by the server's count", server.map_or("–".into(), |n| n.to_string())),
        ("seconds", format!("{:.1}", started.elapsed().as_secs_f64())),
    ] {
        println!("  {name:<32}{value:>10}");
    }
    let more = if seen.is_some() { ", prompt.svg" } else { "" };
    println!("\n{} holds summary.json, metrics.csv, curves.svg{more} and answers.journal", artifacts.dir().display());
    Ok(())
}

/// Some test images, each before and after.
fn pictures(model: &VisualPrompt<B>, test: &[Shot], device: &Device) -> Vec<Picture> {
    let some: Vec<Shot> = test.iter().take(8).cloned().collect();
    let batch: ShotBatch<B> = ShotBatcher.batch(some.clone(), device);
    let painted: Vec<f32> = model.repaint(batch.input, &mut Probe::clean()).into_data().iter::<f32>().collect();
    let picture = |pixels: &[f32], line: &str| Picture {
        pixels: pixels.iter().map(|p| (255.0 * p).round() as u8).collect(),
        height: SIDE,
        width: SIDE,
        lines: [line.to_string(), String::new()],
        share: 0.0,
    };
    let pairs = some.iter().zip(painted.chunks(3 * SIDE * SIDE));
    pairs.flat_map(|(item, after)| [picture(&item.pixels, "camera"), picture(after, "repainted")]).collect()
}

fn main() -> ExitCode {
    cli::run(run)
}
