//! The flags, and the plan that follows from them.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use flops_core::allocator::AllocatorKind;
use flops_core::{ForwardConfig, QueryBudget, Recipe, Space};
use flops_examples::backend;
use flops_examples::blackbox::budget::Budget;
use flops_examples::blackbox::classes::ClassifierArgs;
use flops_examples::cli::forward_args::check_shared_noise;
use flops_examples::cli::method::Method;
use flops_examples::run::artifacts::{Artifacts, Settings};
use flops_multimodal::blackbox::Charge;
use serde_json::{Value, json};

/// The cap of a new run.
const CAP: u64 = 20_000;

/// The prompt that is tuned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Prompt {
    /// A small network that repaints the image (BlackVIP-style).
    Visual,
    /// A soft context before the class names (CoOp-style).
    Text,
}

/// Tune a prompt of a black box.
#[derive(Parser, Debug)]
#[command(name = "prompt_tuning", version)]
pub struct Args {
    /// How gradients are obtained: forward (this library's defaults), the settings of another
    /// method (flops, mezo, fzoo, es, eggroll, lozo, zo-muon, pseuzo), or backprop. The last needs
    /// --local: a black box has no gradient. Adam drives them all.
    #[arg(long, default_value = "forward")]
    pub method: Method,
    /// The prompt that is tuned.
    #[arg(long, value_enum, default_value_t = Prompt::Visual)]
    pub prompt: Prompt,
    #[command(flatten)]
    pub classifier: ClassifierArgs,
    /// Address of a running server [default: a server is started].
    #[arg(long)]
    pub endpoint: Option<String>,
    /// Run the classifier in this process instead of asking over HTTP.
    #[arg(long, conflicts_with = "endpoint")]
    pub local: bool,
    /// The most queries, including those of both evaluations; never exceeded [default: 20000; with
    /// --resume, that of the run]. With --endpoint a request that is sent again may be charged
    /// again: a tenth is kept for that, half of it for the last evaluation. Where it does not
    /// suffice, training stops early, and the prompt is evaluated and saved; a higher cap with
    /// --resume then takes the steps that are left.
    #[arg(long)]
    pub cap: Option<u64>,
    /// Training images per class; all of a class that has fewer.
    #[arg(long, default_value_t = 16)]
    pub shots: usize,
    /// Test images.
    #[arg(long, default_value_t = 320)]
    pub test: usize,
    /// Allocator of the queries: uniform, neyman, gaussian, bernoulli or gaussian-paper [default:
    /// the method's, neyman].
    #[arg(long)]
    pub allocator: Option<String>,
    /// Where the noise goes: activation, weights or lowrank:R [default: lowrank:1 for a visual
    /// prompt, the method's for a text prompt].
    #[arg(long)]
    pub space: Option<Space>,
    /// Queries per image and step, on average, without the clean pass.
    #[arg(long, default_value_t = 4)]
    pub queries: usize,
    /// Images of a step.
    #[arg(long, default_value_t = 32)]
    pub batch_size: usize,
    /// Smoothing scale of the noise [default: 0.05].
    #[arg(long)]
    pub sigma: Option<f64>,
    /// Adam's learning rate; it falls to zero as a cosine.
    #[arg(long, default_value_t = 5e-2)]
    pub lr: f64,
    /// Channels of the visual prompt's hidden layer.
    #[arg(long, default_value_t = 8)]
    pub hidden: usize,
    /// Seed of the images, the prompt, the order, the noise and the allocation.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// The most requests in flight at once.
    #[arg(long, default_value_t = 2)]
    pub concurrency: usize,
    /// Continue the interrupted run in the artifact folder, without asking what was already
    /// answered.
    #[arg(long)]
    pub resume: bool,
    /// Folder of the run's files.
    #[arg(long, default_value = "artifacts/prompt_tuning")]
    pub artifact_dir: PathBuf,
    /// Be the server, on this port, with this charge log.
    #[arg(long, hide = true)]
    pub serve: Option<u16>,
    #[arg(long, hide = true)]
    pub charge_log: Option<PathBuf>,
}

impl Args {
    /// Checks the flags, and returns the settings of the learner.
    pub fn validate(&self) -> Result<ForwardConfig> {
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
        if !self.resume {
            self.steps()?;
        }
        Ok(config)
    }

    /// Returns how a cap is divided.
    fn budget(&self, cap: u64) -> Budget {
        Budget {
            cap,
            evaluation: self.test as u64,
            step: (self.batch_size as u64).saturating_mul((self.queries as u64).saturating_add(1)),
            charged_again: self.charge() == Charge::PerAttempt,
        }
    }

    /// Returns the number of steps that the cap of a new run pays for, besides two evaluations.
    fn steps(&self) -> Result<usize> {
        let budget = self.budget(self.cap.unwrap_or(CAP));
        let Budget { cap, evaluation, step, .. } = budget;
        ensure!(
            budget.steps() > 0,
            "--cap {cap}: two evaluations take {} queries, a step {step}, and {} are kept for requests that \
             are sent again; raise it, or lower --test, --batch-size or --queries",
            evaluation.saturating_mul(2),
            budget.reserve()
        );
        Ok(usize::try_from(budget.steps())?)
    }

    /// Plans a new run, or returns the plan of the one that is resumed, with the cap of this one.
    pub fn plan(&self, artifacts: &Artifacts) -> Result<Plan> {
        if !self.resume {
            return Ok(Plan { budget: self.budget(self.cap.unwrap_or(CAP)), steps: self.steps()?, cap_before: None });
        }
        let earlier = artifacts.settings()?;
        let number = |name: &str| {
            let damaged = || format!("config.json has no number of {name}; start a new run");
            earlier.get(name).and_then(Value::as_u64).with_context(damaged)
        };
        let (cap, steps) = (number("cap")?, usize::try_from(number("steps")?)?);
        Ok(Plan { budget: self.budget(self.cap.unwrap_or(cap)), steps, cap_before: Some(cap) })
    }

    /// Returns how queries are charged.
    ///
    /// Our own server charges a query once. Of another server nobody knows what it does with one
    /// that is sent again.
    pub fn charge(&self) -> Charge {
        if self.endpoint.is_some() { Charge::PerAttempt } else { Charge::PerAnswer }
    }

    /// Returns every setting of the run, by the name of its flag.
    pub fn settings(&self, config: &ForwardConfig, plan: &Plan) -> Result<Settings> {
        let settings = json!({
            "method": self.method.name(),
            "backend": backend::NAME,
            "prompt": self.prompt.to_possible_value().map(|v| v.get_name().to_string()),
            "classes": self.classifier.classes.name(),
            "alignment": self.classifier.alignment,
            "endpoint": self.endpoint,
            "local": self.local,
            "cap": plan.budget.cap,
            "steps": plan.steps,
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
    pub fn allocator_kind(&self) -> Result<AllocatorKind> {
        let shared = self.space.is_some_and(|space| !space.is_independent());
        let default = if shared { AllocatorKind::Uniform } else { self.method.recipe().allocator() };
        Ok(self.allocator.as_deref().map_or(Ok(default), str::parse)?)
    }
}

/// What a run may spend, and the steps that it takes for that.
///
/// The learning rate follows the number of steps, so it stays as it was when the run started: with
/// another number the steps so far would be others, and their answers of no use.
pub struct Plan {
    pub budget: Budget,
    pub steps: usize,
    /// The cap so far, if the run is resumed.
    pub cap_before: Option<u64>,
}
