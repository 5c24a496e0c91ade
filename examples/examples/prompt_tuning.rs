//! Tunes a prompt of a black box over HTTP, from its scores alone, and compares it with the
//! zero-shot classifier.
//!
//! ```text
//! cargo run --release --example prompt_tuning
//! cargo run --release --example prompt_tuning -- --prompt text
//! cargo run --release --example prompt_tuning -- --endpoint http://127.0.0.1:8080
//! ```
//!
//! Without `--endpoint` it starts a server in another process, and restarts it if it dies. The
//! images are made-up scenes under a domain shift: another camera, which mixes red, green and blue.
//! The classifier knows the classes, but not that camera.
//!
//! Every answer is kept in `answers.journal`. After an interruption, `--resume` takes the same
//! steps again, and asks only what was never answered.
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
use flops_core::allocator::{AllocatorKind, AnyAllocator};
use flops_core::{
    EpochLoader, ForwardConfig, ForwardLearner, ForwardModel, InnerBatcher, Probe, QueryBudget, Recipe, Space,
    cross_entropy,
};
use flops_examples::BURN_VERSION;
use flops_examples::backend::{self, AB, B, Device};
use flops_examples::blackbox::classes::ClassifierArgs;
use flops_examples::blackbox::server::serve;
use flops_examples::blackbox::server_process::ServerProcess;
use flops_examples::cli::forward_args::check_shared_noise;
use flops_examples::cli::{self, method::Method};
use flops_examples::data::shots::{Shot, ShotBatch, ShotBatcher, shots};
use flops_examples::experiment::Progress;
use flops_examples::plot::contact_sheet::{Picture, contact_sheet};
use flops_examples::run::artifacts::{Artifacts, Settings, merge};
use flops_examples::run::curves;
use flops_examples::run::history::{History, Row, Split};
use flops_multimodal::blackbox::{BlackBox, BlackBoxError, Charge, HttpBlackBox, HttpConfig, InProcess, Metered};
use flops_multimodal::data::Scenes;
use flops_multimodal::data::scenes::SIDE;
use flops_multimodal::{BlackBoxClient, Classifier, TextPrompt, VisualPrompt};
use serde_json::{Value, json};

/// The message of a run that stopped early.
const STOPPED: &str = "stopped; every answer is kept, and --resume asks only what was never answered";
/// Settings that do not change the result: a resumed run may have other values.
const FREE_SETTINGS: [&str; 1] = ["concurrency"];
/// The answers of the black box.
const JOURNAL: &str = "answers.journal";
/// The charge log of the program's own server.
const CHARGES: &str = "server.charges";
/// Test images on the contact sheet.
const PICTURES: usize = 8;

// ---- the run ------------------------------------------------------------------------------------

fn main() -> ExitCode {
    cli::run(|args: Args| match args.serve {
        Some(port) => serve_until_orphaned(&args, port),
        None => run(args),
    })
}

/// Serves until the process that started this one ends, however it ends.
fn serve_until_orphaned(args: &Args, port: u16) -> Result<()> {
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(0);
    });
    serve(&args.classifier, port, args.charge_log.as_deref(), |address| println!("listening on {address}"))
}

fn run(args: Args) -> Result<()> {
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

    let classes = args.classifier.classes;
    let count = args.shots.saturating_mul(classes.names().len());
    let train = shots(&Scenes::train(1, args.seed), classes, count, args.seed);
    let test = shots(&Scenes::test(1, args.seed), classes, args.test, args.seed);
    let args = Args { test: test.len(), ..args };
    let endpoint = Endpoint::open(&args, &artifacts, &device)?;

    let mut run = Run { args, config, endpoint, train, test, device, history: History::default() };
    let zero_shot = run.push_test(0, run.evaluate::<VisualPrompt<B>>(None)?);
    let (images, tests) = (run.train.len(), run.test.len());
    println!("{images} training images, {tests} test images, zero-shot accuracy {:.1} %", 100.0 * zero_shot);
    <AB as burn::tensor::backend::Backend>::seed(&run.device, run.args.seed);
    let (tuned, pictures) = match run.args.prompt {
        Prompt::Visual => run.tune_visual()?,
        Prompt::Text => run.tune_text()?,
    };
    let tuned = run.push_test(1, tuned);
    run.report(&artifacts, settings, (zero_shot, tuned), pictures, started)
}

// ---- settings -----------------------------------------------------------------------------------

/// The prompt that is tuned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Prompt {
    /// A small network that repaints the image (BlackVIP-style).
    Visual,
    /// A soft context before the class names (CoOp-style).
    Text,
}

/// Tune a prompt of a black box.
#[derive(Parser, Debug)]
#[command(name = "prompt_tuning", version)]
struct Args {
    /// How gradients are obtained: forward (this library's defaults), the settings of another
    /// method (flops, mezo, fzoo, es, eggroll, lozo, zo-muon, pseuzo), or backprop. The last needs
    /// --local: a black box has no gradient. Adam drives them all.
    #[arg(long, default_value = "forward")]
    method: Method,
    /// The prompt that is tuned.
    #[arg(long, value_enum, default_value_t = Prompt::Visual)]
    prompt: Prompt,
    #[command(flatten)]
    classifier: ClassifierArgs,
    /// Address of a running server [default: a server is started].
    #[arg(long)]
    endpoint: Option<String>,
    /// Run the classifier in this process instead of asking over HTTP.
    #[arg(long, conflicts_with = "endpoint")]
    local: bool,
    /// The most queries, including those of both evaluations; never exceeded.
    #[arg(long, default_value_t = 20_000)]
    cap: u64,
    /// Training images per class; all of a class that has fewer.
    #[arg(long, default_value_t = 16)]
    shots: usize,
    /// Test images.
    #[arg(long, default_value_t = 320)]
    test: usize,
    /// Allocator of the queries: uniform, neyman, gaussian, bernoulli or gaussian-paper [default:
    /// the method's, neyman].
    #[arg(long)]
    allocator: Option<String>,
    /// Where the noise goes: activation, weights or lowrank:R [default: lowrank:1 for a visual
    /// prompt, the method's for a text prompt].
    #[arg(long)]
    space: Option<Space>,
    /// Queries per image and step, on average, without the clean pass.
    #[arg(long, default_value_t = 4)]
    queries: usize,
    /// Images of a step.
    #[arg(long, default_value_t = 32)]
    batch_size: usize,
    /// Smoothing scale of the noise [default: 0.05].
    #[arg(long)]
    sigma: Option<f64>,
    /// Adam's learning rate; it falls to zero as a cosine.
    #[arg(long, default_value_t = 5e-2)]
    lr: f64,
    /// Channels of the visual prompt's hidden layer.
    #[arg(long, default_value_t = 8)]
    hidden: usize,
    /// Seed of the images, the prompt, the order, the noise and the allocation.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The most requests in flight at once.
    #[arg(long, default_value_t = 2)]
    concurrency: usize,
    /// Continue the interrupted run in the artifact folder, without asking what was already
    /// answered.
    #[arg(long)]
    resume: bool,
    /// Folder of the run's files.
    #[arg(long, default_value = "artifacts/prompt_tuning")]
    artifact_dir: PathBuf,
    /// Be the server, on this port, with this charge log.
    #[arg(long, hide = true)]
    serve: Option<u16>,
    #[arg(long, hide = true)]
    charge_log: Option<PathBuf>,
}

impl Args {
    /// Checks the flags, and returns the settings of the learner.
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
        let visual_default = self.method == Method::Forward(Recipe::Default) && self.prompt == Prompt::Visual;
        if let Some(space) = self.space.or(visual_default.then_some(Space::low_rank(1))) {
            config = config.with_space(self.method.recipe().settings_in(space));
        }
        // all queries of a step in one pass: the client splits it into requests
        config = config
            .with_max_rows(self.batch_size.saturating_mul(self.queries).max(2))
            .with_sigma(self.sigma.unwrap_or(0.05));
        config.validate()?;
        check_shared_noise(config.estimator.space, self.allocator_kind()?)?;
        self.steps()?;
        Ok(config)
    }

    /// Returns the number of steps that the cap pays for, besides two evaluations.
    fn steps(&self) -> Result<usize> {
        let evaluations = 2 * (self.test as u64).min(u64::MAX / 4);
        let step = (self.batch_size as u64).saturating_mul(self.queries as u64 + 1);
        let steps = self.cap.saturating_sub(evaluations) / step;
        ensure!(
            steps > 0,
            "--cap {}: two evaluations take {evaluations} queries and a step {step}; raise it, or lower \
             --test, --batch-size or --queries",
            self.cap
        );
        Ok(steps as usize)
    }

    /// Returns every setting of the run, by the name of its flag.
    fn settings(&self, config: &ForwardConfig) -> Result<Settings> {
        let settings = json!({
            "method": self.method.name(),
            "backend": backend::NAME,
            "prompt": self.prompt.to_possible_value().map(|v| v.get_name().to_string()),
            "classes": self.classifier.classes.name(),
            "alignment": self.classifier.alignment,
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

    /// Returns the allocator that was given, otherwise the method's.
    fn allocator_kind(&self) -> Result<AllocatorKind> {
        let shared = self.space.is_some_and(|space| !space.is_independent());
        let default = if shared { AllocatorKind::Uniform } else { self.method.recipe().allocator() };
        Ok(self.allocator.as_deref().map_or(Ok(default), str::parse)?)
    }
}

// ---- black box ----------------------------------------------------------------------------------

/// The black box, behind the cap on its queries and the journal of its answers.
struct Endpoint {
    metered: Arc<Metered<Box<dyn BlackBox>>>,
    /// What the prompts ask: all clones share the first failure.
    client: BlackBoxClient,
    /// The client, which can ask for the server's own count.
    http: Option<Arc<HttpBlackBox>>,
    /// Stopped when this value is dropped.
    _server: Option<ServerProcess>,
}

impl Endpoint {
    /// Opens the black box that the flags choose.
    ///
    /// # Errors
    /// Where it cannot be reached, or has other classes than the images.
    fn open(args: &Args, artifacts: &Artifacts, device: &Device) -> Result<Self> {
        // our own server charges a query once; of another server nobody knows what it does with one
        // that is sent again
        let charge = if args.endpoint.is_some() { Charge::PerAttempt } else { Charge::PerAnswer };
        let metered = |inner: Box<dyn BlackBox>| -> Result<Arc<Metered<Box<dyn BlackBox>>>> {
            let metered = Metered::new(inner, args.cap).with_charge(charge);
            Ok(Arc::new(metered.with_journal(artifacts.path(JOURNAL))?))
        };
        let (metered, http, server) = if args.local {
            (metered(Box::new(in_process(args, device)?))?, None, None)
        } else {
            let (address, server) = match &args.endpoint {
                Some(address) => (address.clone(), None),
                None => {
                    let server = ServerProcess::start(&args.classifier, &artifacts.path(CHARGES))?;
                    (server.address.clone(), Some(server))
                }
            };
            let http = HttpConfig::new(address).with_concurrency(args.concurrency).with_retries(30);
            let http = http.with_backoff(Duration::from_millis(250), Duration::from_secs(2));
            let http = Arc::new(HttpBlackBox::connect(http)?);
            (metered(Box::new(http.clone()))?, Some(http), server)
        };
        let client = BlackBoxClient::new(metered.clone());
        let (info, classes) = (client.info(), args.classifier.classes);
        ensure!(
            info.classes == classes.names(),
            "the endpoint scores {:?}, the images are labelled by {}; choose the classes it has with --classes",
            info.classes,
            classes.name()
        );
        Ok(Self { metered, client, http, _server: server })
    }
}

/// Returns the classifier as a black box in this process.
fn in_process(args: &Args, device: &Device) -> Result<impl BlackBox + use<>> {
    let classifier = args.classifier.classifier::<B>(device)?;
    let info = classifier.info().clone();
    let (classes, fallback) = (info.classes.len(), device.clone());
    let forward = move |images: Tensor<B, 4>, contexts: Option<Tensor<B, 3>>| {
        let rows = images.dims()[0];
        let scores = classifier.scores(classifier.embed_images(images), contexts);
        // an error becomes NaN, which the black box rejects
        scores.unwrap_or_else(|_| Tensor::full([rows, classes], f32::NAN, &fallback))
    };
    Ok(InProcess::<B, _>::new(info, forward, 64, device)?)
}

/// Renames the answers that an earlier run in the folder paid for. They are never deleted.
fn set_aside(artifacts: &Artifacts) -> Result<()> {
    let names = [JOURNAL, CHARGES];
    if names.iter().all(|name| !artifacts.path(name).exists()) {
        return Ok(());
    }
    let free = (1..).find(|n| names.iter().all(|name| !artifacts.path(&format!("{name}.{n}")).exists())).unwrap_or(0);
    for name in names.iter().filter(|name| artifacts.path(name).exists()) {
        let (from, to) = (artifacts.path(name), artifacts.path(&format!("{name}.{free}")));
        std::fs::rename(&from, &to).with_context(|| format!("cannot rename {} to {}", from.display(), to.display()))?;
    }
    println!("the answers of the earlier run are kept as {JOURNAL}.{free}");
    Ok(())
}

// ---- learner and fit ----------------------------------------------------------------------------

/// A run whose settings and data are known.
struct Run {
    args: Args,
    config: ForwardConfig,
    endpoint: Endpoint,
    train: Vec<Shot>,
    test: Vec<Shot>,
    device: Device,
    history: History,
}

/// Mean loss and accuracy.
type Scored = (f64, f64);

/// Returns the mean loss and the accuracy of scores.
fn loss_and_accuracy<B: Backend>(scores: &Tensor<B, 2>, labels: Tensor<B, 1, Int>) -> Scored {
    let n = labels.dims()[0];
    let correct = scores.clone().argmax(1).reshape([n]).equal(labels.clone()).int().sum().into_scalar().elem::<i64>();
    let loss = cross_entropy(scores.clone(), labels).mean().into_scalar().elem();
    (loss, correct as f64 / n as f64)
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
    fn push_test(&mut self, epoch: usize, (loss, accuracy): Scored) -> f64 {
        let step_queries = self.new_queries();
        self.history.push(Row { step_queries, ..Row::new(Split::Test, epoch, loss, accuracy) });
        accuracy
    }

    /// Evaluates the black box on the test images, with a prompt or without one.
    fn evaluate<M>(&self, model: Option<&M>) -> Result<Scored>
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
            None => Ok(loss_and_accuracy(&scores, batch.target)),
        }
    }

    /// Tunes a visual prompt; returns its evaluation, and some images before and after.
    fn tune_visual(&mut self) -> Result<(Scored, Option<Vec<Picture>>)> {
        let model = VisualPrompt::<AB>::new(self.endpoint.client.clone(), self.args.hidden, &self.device)?;
        let model = if self.args.method.is_forward() {
            self.tune(model)?
        } else {
            self.tune_by_backprop(model, |model, classifier, images| {
                classifier.scores(classifier.embed_images(model.repaint(images, &mut Probe::clean())), None)
            })?
        };
        Ok((self.evaluate(Some(&model))?, Some(pictures(&model, &self.test, &self.device))))
    }

    /// Tunes a text prompt; returns its evaluation.
    fn tune_text(&mut self) -> Result<(Scored, Option<Vec<Picture>>)> {
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
        Ok((self.evaluate(Some(&model))?, None))
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
        Ok(Box::new(epochs.take(self.args.steps()?)))
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
        let (steps, mut progress) = (self.args.steps()?, Progress::default());
        for (step, batch) in self.batches(InnerBatcher(ShotBatcher))?.enumerate() {
            let output = learner.step(batch);
            if let Some(error) = learner.monitor().error() {
                return Err(error).context(STOPPED);
            }
            let scored = output.item.classification.as_ref();
            let (loss, accuracy) =
                scored.map_or((f64::NAN, f64::NAN), |(scores, labels)| loss_and_accuracy(scores, labels.clone()));
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
        let (steps, mut progress) = (self.args.steps()?, Progress::default());
        for (step, batch) in self.batches(ShotBatcher)?.enumerate() {
            let batch: ShotBatch<AB> = batch;
            let scores = forward(&model, &classifier, batch.input)?;
            let (loss, accuracy) = loss_and_accuracy(&scores, batch.target.clone());
            self.history.push(Row::new(Split::Train, 1, loss, accuracy));
            let gradients = cross_entropy(scores, batch.target).mean().backward();
            let gradients = GradientsParams::from_grads(gradients, &model);
            model = optimizer.step(cosine(self.args.lr, step, steps), model, gradients);
            progress.at(step + 1, steps, || format!("steps, loss {loss:.3}"));
        }
        Ok(model.valid())
    }
}

// ---- report -------------------------------------------------------------------------------------

impl Run {
    /// Writes the files of the run and prints its table.
    fn report(
        &self,
        artifacts: &Artifacts,
        settings: Settings,
        accuracies: (f64, f64),
        pictures: Option<Vec<Picture>>,
        started: Instant,
    ) -> Result<()> {
        let server = self.endpoint.http.as_ref().and_then(|http| http.count().ok());
        self.history.write(artifacts)?;
        let prompt = settings["prompt"].as_str().unwrap_or("");
        let title = format!("{prompt} prompt of a black box, {}", self.args.method.name());
        artifacts.write("curves.svg", curves::draw(&self.history, &title)?.as_bytes())?;
        if let Some(pictures) = &pictures {
            let title = "as the camera gives them (left of each pair) and as the tuned prompt repaints them";
            artifacts.write("prompt.svg", contact_sheet(title, pictures)?.as_bytes())?;
        }
        let seconds = started.elapsed().as_secs_f64();
        artifacts.write_json("summary.json", &self.summary(settings, accuracies, server, seconds))?;
        let percent = |accuracy: f64| format!("{:.1} %", 100.0 * accuracy);
        println!();
        for (name, value) in [
            ("accuracy, zero-shot", percent(accuracies.0)),
            ("accuracy, tuned", percent(accuracies.1)),
            ("queries used", self.endpoint.metered.spent().to_string()),
            ("queries by the server's count", server.map_or("–".into(), |n| n.to_string())),
            ("seconds", format!("{seconds:.1}")),
        ] {
            println!("  {name:<32}{value:>10}");
        }
        let more = if pictures.is_some() { ", prompt.svg" } else { "" };
        let dir = artifacts.dir().display();
        println!("\n{dir} holds summary.json, metrics.csv, curves.svg{more} and {JOURNAL}");
        Ok(())
    }

    /// Returns what `summary.json` holds.
    fn summary(&self, settings: Settings, (zero_shot, tuned): (f64, f64), server: Option<u64>, seconds: f64) -> Value {
        let rows = &self.history.rows;
        let mut summary = Value::Object(settings);
        let more = json!({
            "accuracy_zero_shot": zero_shot,
            "accuracy_tuned": tuned,
            "queries_used": self.endpoint.metered.spent(),
            "queries_server": server,
            "answered_from_journal": self.endpoint.metered.answered_from_journal(),
            "steps": self.history.steps(),
            "loss_before": rows.first().map(|row| row.loss),
            "loss_after": rows.last().map(|row| row.loss),
            "train_images": self.train.len(),
            "test_images": self.test.len(),
            "seconds": seconds,
            "versions": {"flops": env!("CARGO_PKG_VERSION"), "burn": BURN_VERSION},
        });
        merge(&mut summary, more);
        summary
    }
}

/// Returns some test images, each before and after the prompt.
fn pictures(model: &VisualPrompt<B>, test: &[Shot], device: &Device) -> Vec<Picture> {
    let some: Vec<Shot> = test.iter().take(PICTURES).cloned().collect();
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
