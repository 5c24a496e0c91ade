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

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use burn::data::dataloader::DataLoader;
use burn::data::dataset::InMemDataset;
use burn::module::AutodiffModule;
use burn::optim::{AdamConfig, GradientsParams, Optimizer};
use burn::prelude::*;
use burn::train::TrainStep;
use clap::{Parser, ValueEnum};
use flops_core::allocator::AnyAllocator;
use flops_core::{
    Batch, EpochLoader, ForwardConfig, ForwardLearner, ForwardModel, Plain, Probe, QueryBudget, Space, cross_entropy,
};
use flops_examples::artifacts::{Artifacts, Settings, merge};
use flops_examples::backend::{self, AB, B, Device};
use flops_examples::experiment::Progress;
use flops_examples::method::Method;
use flops_examples::plot::{Panel, Series, panels};
use flops_examples::server::{Classes, Serving, serve};
use flops_examples::sheet::{Picture, contact_sheet};
use flops_examples::{BURN_VERSION, cli};
use flops_multimodal::blackbox::{BlackBox, Charge, HttpBlackBox, HttpConfig, InProcess, Metered};
use flops_multimodal::data::scenes::SIDE;
use flops_multimodal::data::{Scene, Scenes, Shift};
use flops_multimodal::{Asked, Classifier, TextPrompt, VisualPrompt};
use serde::Serialize;
use serde_json::{Value, json};

/// The other camera: little more than half of each colour is its own, the rest comes from its neighbours.
const CAMERA: Shift =
    Shift { mix: [[0.56, 0.20, 0.14], [0.10, 0.60, 0.18], [0.17, 0.13, 0.58]], offset: [0.07, 0.03, 0.0] };
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

/// The server of this run: another process, started again where it dies.
struct Supervised {
    child: Arc<Mutex<Child>>,
    done: Arc<AtomicBool>,
    address: String,
}

impl Supervised {
    fn start(args: &Args, book: &Path) -> Result<Self> {
        let spawn = {
            let (serving, book) = (args.serving.clone(), book.to_path_buf());
            move |port: u16| -> Result<(Child, String)> {
                let mut command = Command::new(std::env::current_exe()?);
                command
                    .args(["--serve", &port.to_string(), "--classes", &serving.classes.name()])
                    .arg("--book")
                    .arg(&book);
                if let Some(path) = &serving.alignment {
                    command.arg("--alignment").arg(path);
                }
                let mut child =
                    command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot start the server")?;
                let out = child.stdout.take().context("the server has no output")?;
                let mut line = String::new();
                BufReader::new(out).read_line(&mut line)?;
                let Some(address) = line.trim().strip_prefix("listening on ") else {
                    let _ = child.kill();
                    bail!("the server did not start; see what it says above");
                };
                Ok((child, address.to_string()))
            }
        };
        let (child, address) = spawn(0)?;
        println!("server: process {} at {address}", child.id());
        let port = address.rsplit(':').next().and_then(|port| port.parse().ok()).context("the address has no port")?;
        let (child, done) = (Arc::new(Mutex::new(child)), Arc::new(AtomicBool::new(false)));
        let (watched, over) = (child.clone(), done.clone());
        std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(100));
                let mut child = watched.lock().unwrap_or_else(|e| e.into_inner());
                if matches!(child.try_wait(), Ok(Some(_))) && !over.load(Ordering::Relaxed) {
                    match spawn(port) {
                        Ok((new, _)) => {
                            println!("server: died, started again as process {}", new.id());
                            *child = new;
                        }
                        // the port may not be free yet; requests are retried meanwhile
                        Err(error) => eprintln!("server: {error:#}"),
                    }
                }
            }
        });
        Ok(Self { child, done, address })
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        let mut child = self.child.lock().unwrap_or_else(|e| e.into_inner());
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// A scene, its picture and its class.
#[derive(Clone, Debug)]
struct Item {
    id: u64,
    pixels: Vec<f32>,
    label: usize,
}

/// Pictures under the camera of the task: `count` of them, as evenly over the classes as can be, drawn by the seed.
fn items(scenes: &Scenes, classes: Classes, count: usize, seed: u64) -> Vec<Item> {
    use rand::seq::SliceRandom;
    let names = classes.names().len();
    let mut order: Vec<usize> = (0..scenes.len()).collect();
    order.shuffle(&mut flops_core::loader::keyed_rng([seed, 1, 0, 0]));
    let mut of_class: Vec<Vec<usize>> = vec![vec![]; names];
    order.into_iter().for_each(|i| of_class[classes.of(&scenes.scenes[i])].push(i));
    let mut chosen = vec![];
    for round in 0..scenes.len() {
        chosen.extend(of_class.iter().filter_map(|of| of.get(round)));
    }
    let item = |&i: &usize| {
        let scene: &Scene = &scenes.scenes[i];
        Item { id: i as u64, pixels: scene.render(scenes.seeds[i], &CAMERA), label: classes.of(scene) }
    };
    chosen.iter().take(count).map(item).collect()
}

/// Items to batches.
#[derive(Clone)]
struct Batcher;

type ImageBatch<B> = Batch<Tensor<B, 4>, Tensor<B, 1, Int>>;

impl<B: Backend> burn::data::dataloader::batcher::Batcher<B, Item, ImageBatch<B>> for Batcher {
    fn batch(&self, items: Vec<Item>, device: &B::Device) -> ImageBatch<B> {
        let n = items.len();
        let pixels: Vec<f32> = items.iter().flat_map(|item| item.pixels.iter().copied()).collect();
        let labels: Vec<i32> = items.iter().map(|item| item.label as i32).collect();
        Batch {
            ids: items.iter().map(|item| item.id).collect(),
            input: Tensor::from_data(TensorData::new(pixels, [n, 3, SIDE, SIDE]), device),
            target: Tensor::from_data(TensorData::new(labels, [n]), device),
        }
    }
}

/// Share of the items that the box names correctly under the prompt, or without one.
fn accuracy<M>(model: Option<&M>, asked: &Asked, test: &[Item], device: &Device) -> Result<f64>
where
    M: ForwardModel<B, Input = Tensor<B, 4>, Output = Tensor<B, 2>>,
{
    let batch: ImageBatch<B> = burn::data::dataloader::batcher::Batcher::batch(&Batcher, test.to_vec(), device);
    let scores = match model {
        Some(model) => model.forward(batch.input, &mut Probe::clean()),
        None => asked.scores(batch.input, None),
    };
    if let Some(error) = asked.failure() {
        return Err(error.into());
    }
    let right = scores.argmax(1).reshape([test.len()]).equal(batch.target).int().sum().into_scalar().elem::<i64>();
    Ok(right as f64 / test.len() as f64)
}

/// A step of the run, a row of `metrics.csv`.
#[derive(Clone, Debug, Serialize)]
struct Row {
    step: usize,
    queries: u64,
    loss: f64,
    accuracy: f64,
    variance_vs_uniform: Option<f64>,
}

/// What tuning gave.
struct Tuned<M> {
    model: M,
    rows: Vec<Row>,
}

/// The learning rate of a step.
fn cosine(lr: f64, step: usize, steps: usize) -> f64 {
    lr * 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / steps as f64).cos())
}

/// Tunes by forward queries.
fn tune<M>(
    model: M,
    args: &Args,
    config: &ForwardConfig,
    spent: &dyn Fn() -> u64,
    train: &[Item],
    device: &Device,
) -> Result<Tuned<M::InnerModule>>
where
    M: AutodiffModule<AB> + burn::module::ModuleDisplay + 'static,
    M::InnerModule: ForwardModel<B, Input = Tensor<B, 4>, Target = Tensor<B, 1, Int>, Output = Tensor<B, 2>>
        + burn::module::ModuleDisplay,
{
    let allocator = AnyAllocator::<AB>::new(args.allocator_kind()?, device)?;
    let mut learner = ForwardLearner::new(model, allocator, config.clone())?;
    let mut optimizer = AdamConfig::new().init();
    let loader: EpochLoader<AB, Item, ImageBatch<B>> =
        EpochLoader::new(Arc::new(InMemDataset::new(train.to_vec())), Plain(Batcher), args.batch_size, device.clone())?
            .shuffled(args.seed);
    let (steps, mut rows, mut progress) = (args.steps()?, vec![], Progress::default());
    'run: loop {
        for batch in loader.iter() {
            let step = rows.len();
            if step == steps {
                break 'run;
            }
            let output = learner.step(batch);
            if let Some(error) = learner.monitor().error() {
                return Err(error.into());
            }
            let accuracy = output.item.classification.as_ref().map_or(f64::NAN, |(scores, labels)| {
                let n = labels.dims()[0];
                let right = scores.clone().argmax(1).reshape([n]).equal(labels.clone()).int().sum();
                right.into_scalar().elem::<i64>() as f64 / n as f64
            });
            rows.push(Row {
                step: step + 1,
                queries: spent(),
                loss: output.item.losses.clone().mean().into_scalar().elem(),
                accuracy,
                variance_vs_uniform: output.item.stats.as_ref().map(|s| s.relative_variance),
            });
            learner = learner.optimize::<AB, _>(&mut optimizer, cosine(args.lr, step, steps), output.grads);
            let last = &rows[step];
            progress.at(step + 1, steps, || format!("steps, loss {:.3}, {} queries", last.loss, last.queries));
        }
    }
    Ok(Tuned { model: learner.valid().model, rows })
}

/// Tunes by backpropagation through the classifier, which a black box does not allow; for as many steps.
fn tune_open<M>(
    mut model: M,
    args: &Args,
    forward: impl Fn(&M, &Classifier<AB>, Tensor<AB, 4>) -> Tensor<AB, 2>,
    train: &[Item],
    device: &Device,
) -> Result<Tuned<M::InnerModule>>
where
    M: AutodiffModule<AB>,
{
    let classifier = args.serving.classifier::<AB>(device)?;
    let mut optimizer = AdamConfig::new().init();
    let loader: EpochLoader<AB, Item, ImageBatch<AB>> =
        EpochLoader::new(Arc::new(InMemDataset::new(train.to_vec())), Batcher, args.batch_size, device.clone())?
            .shuffled(args.seed);
    let (steps, mut rows, mut progress) = (args.steps()?, vec![], Progress::default());
    'run: loop {
        for batch in loader.iter() {
            let step = rows.len();
            if step == steps {
                break 'run;
            }
            let n = batch.ids.len();
            let scores = forward(&model, &classifier, batch.input);
            let right = scores.clone().argmax(1).reshape([n]).equal(batch.target.clone()).int().sum();
            let loss = cross_entropy(scores, batch.target).mean();
            rows.push(Row {
                step: step + 1,
                queries: 0,
                loss: loss.clone().into_scalar().elem(),
                accuracy: right.into_scalar().elem::<i64>() as f64 / n as f64,
                variance_vs_uniform: None,
            });
            let grads = GradientsParams::from_grads(loss.backward(), &model);
            model = optimizer.step(cosine(args.lr, step, steps), model, grads);
            progress.at(step + 1, steps, || format!("steps, loss {:.3}", rows[step].loss));
        }
    }
    Ok(Tuned { model: model.valid(), rows })
}

/// A box and its books.
struct Endpoint {
    asked: Asked,
    spent: Box<dyn Fn() -> u64>,
    from_journal: Box<dyn Fn() -> u64>,
    count: Box<dyn Fn() -> Option<u64>>,
    server: Option<Supervised>,
}

/// How queries count against the cap: our own server charges by their content; of another nobody knows what it does with one that is sent again.
fn charge(args: &Args) -> Charge {
    if args.endpoint.is_some() { Charge::PerAttempt } else { Charge::PerAnswer }
}

/// The box that was asked for, under the cap and with the journal.
fn endpoint(args: &Args, artifacts: &Artifacts, device: &Device) -> Result<Endpoint> {
    let journal = artifacts.path("answers.journal");
    fn metered<X: BlackBox + 'static>(inner: X, args: &Args, journal: &Path) -> Result<Arc<Metered<X>>> {
        Ok(Arc::new(Metered::new(inner, args.cap).with_charge(charge(args)).with_journal(journal)?))
    }
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
        let metered = metered(InProcess::<B, _>::new(info, forward, 64, device)?, args, &journal)?;
        let (spent, known) = (metered.clone(), metered.clone());
        return Ok(Endpoint {
            asked: Asked::new(metered),
            spent: Box::new(move || spent.spent()),
            from_journal: Box::new(move || known.answered_from_journal()),
            count: Box::new(|| None),
            server: None,
        });
    }
    let server = match &args.endpoint {
        Some(_) => None,
        None => Some(Supervised::start(args, &artifacts.path("server.book"))?),
    };
    let address =
        args.endpoint.clone().or(server.as_ref().map(|s| s.address.clone())).context("there is no address")?;
    let http = HttpConfig::new(address).with_concurrency(args.concurrency).with_retries(30);
    let http = http.with_backoff(Duration::from_millis(250), Duration::from_secs(2));
    let metered = metered(HttpBlackBox::connect(http)?, args, &journal)?;
    let (spent, known, counted) = (metered.clone(), metered.clone(), metered.clone());
    Ok(Endpoint {
        asked: Asked::new(metered),
        spent: Box::new(move || spent.spent()),
        from_journal: Box::new(move || known.answered_from_journal()),
        count: Box::new(move || counted.inner().count().ok()),
        server,
    })
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
    let train =
        items(&Scenes::train(1, args.seed), classes, args.shots.saturating_mul(classes.names().len()), args.seed);
    let test = items(&Scenes::test(1, args.seed), classes, args.test, args.seed);
    let args = Args { test: test.len(), ..args };
    let endpoint = endpoint(&args, &artifacts, &device)?;
    let asked = &endpoint.asked;
    let stopped = || match args.resume || artifacts.path("answers.journal").exists() {
        true => "stopped; every answer is kept, and --resume asks only what was never answered".to_string(),
        false => "stopped".to_string(),
    };
    ensure!(
        asked.info().classes == classes.names(),
        "the endpoint scores {:?}, the images are labelled by {}; choose the classes it has with --classes",
        asked.info().classes,
        classes.name()
    );
    let zero_shot = accuracy::<VisualPrompt<B>>(None, asked, &test, &device).with_context(stopped)?;
    println!(
        "{} training images, {} test images, zero-shot accuracy {:.1} %",
        train.len(),
        test.len(),
        100.0 * zero_shot
    );
    <AB as burn::tensor::backend::Backend>::seed(&device, args.seed);
    let (tuned, rows, seen) = match args.prompt {
        Prompt::Visual => {
            let model = VisualPrompt::<AB>::new(asked.clone(), args.hidden, &device)?;
            let tuned = if args.method.is_forward() {
                tune(model, &args, &config, &*endpoint.spent, &train, &device)
            } else {
                let forward = |m: &VisualPrompt<AB>, classifier: &Classifier<AB>, images| {
                    let images = m.repaint(images, &mut Probe::clean());
                    classifier.scores(classifier.embed_images(images), None).expect("there is no context to refuse")
                };
                tune_open(model, &args, forward, &train, &device)
            };
            let tuned = tuned.with_context(stopped)?;
            let seen = pictures(&tuned.model, &test, &device);
            (accuracy(Some(&tuned.model), asked, &test, &device).with_context(stopped)?, tuned.rows, Some(seen))
        }
        Prompt::Text => {
            let model = TextPrompt::<AB>::new(asked.clone(), &device)?;
            let tuned = if args.method.is_forward() {
                tune(model, &args, &config, &*endpoint.spent, &train, &device)
            } else {
                let forward = |m: &TextPrompt<AB>, classifier: &Classifier<AB>, images: Tensor<AB, 4>| {
                    let [_, tokens, dim] = m.context.dims();
                    let context = m.context.val().expand([images.dims()[0], tokens, dim]);
                    let images = classifier.embed_images(images);
                    classifier.scores(images, Some(context)).expect("the context has the classifier's shape")
                };
                tune_open(model, &args, forward, &train, &device)
            };
            let tuned = tuned.with_context(stopped)?;
            (accuracy(Some(&tuned.model), asked, &test, &device).with_context(stopped)?, tuned.rows, None)
        }
    };
    let (used, server) = ((endpoint.spent)(), (endpoint.count)());
    artifacts.write_csv("metrics.csv", &rows)?;
    let x = |row: &Row| if args.method.is_forward() { row.queries as f64 } else { row.step as f64 };
    let panel = |name: &str, of: &dyn Fn(&Row) -> f64, level: Option<(f64, f64)>| Panel {
        title: name.into(),
        axes: (if args.method.is_forward() { "queries" } else { "steps" }.into(), name.into()),
        log: (false, false),
        series: [Series::new("train", smoothed(&rows, &x, of))]
            .into_iter()
            .chain(level.map(|(before, after)| {
                let ends = rows.first().zip(rows.last()).map_or((0.0, 1.0), |(a, b)| (x(a), x(b)));
                Series::new("test, before and after", [(ends.0, before), (ends.1, after)])
            }))
            .collect(),
    };
    let svg = panels(
        &format!("{} prompt of a black box, {}", settings["prompt"].as_str().unwrap_or(""), args.method.name()),
        &[
            panel("accuracy, %", &|row| 100.0 * row.accuracy, Some((100.0 * zero_shot, 100.0 * tuned))),
            panel("loss", &|row| row.loss, None),
        ],
    )?;
    artifacts.write("curves.svg", svg.as_bytes())?;
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
            "answered_from_journal": (endpoint.from_journal)(),
            "steps": rows.len(),
            "loss_after": rows.last().map(|row| row.loss),
            "train_images": train.len(),
            "test_images": test.len(),
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
    drop(endpoint.server);
    Ok(())
}

/// Steps in at most 40 stretches, each as its mean at its end.
fn smoothed(rows: &[Row], x: &dyn Fn(&Row) -> f64, of: &dyn Fn(&Row) -> f64) -> Vec<(f64, f64)> {
    let stretches = (rows.len() / 4).clamp(1, 40);
    let parts = (0..stretches).map(|i| &rows[i * rows.len() / stretches..(i + 1) * rows.len() / stretches]);
    let parts = parts.filter(|part| !part.is_empty());
    parts.map(|part| (x(&part[part.len() - 1]), part.iter().map(of).sum::<f64>() / part.len() as f64)).collect()
}

/// Some test images, each before and after.
fn pictures(model: &VisualPrompt<B>, test: &[Item], device: &Device) -> Vec<Picture> {
    let some: Vec<Item> = test.iter().take(8).cloned().collect();
    let batch: ImageBatch<B> = burn::data::dataloader::batcher::Batcher::batch(&Batcher, some.clone(), device);
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
