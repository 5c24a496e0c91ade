//! A pole on a cart, balanced by a policy that is trained on whole episodes.
//!
//! ```text
//! cargo run --release --example cartpole
//! ```
//!
//! An episode is one forward pass: the policy is called up to 500 times, and the loss of the pass is the
//! steps that are missing from 500. There is no gradient: an action is an argmax, and the simulator is
//! plain Rust. Noise falls on the weights, the same for all steps of an episode, in full or of rank 1.
//! Beside it stands a hand-written OpenAI-ES (`openai_es.rs`). A run is over when its policy is solved: a
//! mean return of at least 475 over 100 episodes. The policy is then tried on 1,000 others.
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

#[macro_use]
extern crate flops_report;

mod openai_es;
mod report;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, ensure};
use burn::module::AutodiffModule;
use burn::optim::AdamConfig;
use burn::prelude::*;
use burn::train::TrainStep;
use clap::Parser;
use flops_core::prelude::*;
use flops_core::random::keyed_rng;
use flops_examples::backend::{self, AB, B, Device};
use flops_examples::cli;
use flops_examples::experiment::{ExperimentArgs, Progress};
use rand::RngExt;
use report::{Look, Method};

/// Steps of an episode at most.
const STEPS: usize = 500;
/// Mean return from which on the task counts as solved.
const SOLVED: f64 = 475.0;

/// Position, velocity, angle and angular velocity.
type State = [f32; 4];

/// A step of `CartPole-v1` of Gymnasium (Barto, Sutton and Anderson 1983); `None` where the pole falls or
/// the cart leaves the track.
fn step([x, v, angle, spin]: State, right: bool) -> Option<State> {
    let (gravity, total_mass, pole_mass_length, length, dt) = (9.8, 1.1, 0.05, 0.5, 0.02);
    let (sin, cos) = angle.sin_cos();
    let push = (if right { 10.0 } else { -10.0 } + pole_mass_length * spin * spin * sin) / total_mass;
    let turn = (gravity * sin - cos * push) / (length * (4.0 / 3.0 - 0.1 * cos * cos / total_mass));
    let pull = push - pole_mass_length * turn * cos / total_mass;
    let next = [x + dt * v, v + dt * pull, angle + dt * spin, spin + dt * turn];
    (next[0].abs() <= 2.4 && next[2].abs() <= 12f32.to_radians()).then_some(next)
}

/// Starts of episodes, each number within 0.05 of 0.
fn starts(seed: u64, round: u64, n: usize) -> Vec<State> {
    let mut rng = keyed_rng([seed, round, 0, 0]);
    (0..n).map(|_| [0; 4].map(|_| rng.random_range(-0.05f32..0.05))).collect()
}

fn tensor<B: Backend>(states: &[State], device: &B::Device) -> Tensor<B, 2> {
    Tensor::from_data(TensorData::new(states.concat(), [states.len(), 4]), device)
}

/// A policy of two layers. Its forward pass is an episode of every row.
#[derive(Module, Debug)]
struct Policy<B: Backend> {
    hidden: nn::Linear<B>,
    action: nn::Linear<B>,
}

impl<B: Backend> ForwardModel<B> for Policy<B> {
    type Input = Tensor<B, 2>;
    type Target = ();
    type Output = Tensor<B, 1>;

    /// Returns of the episodes that begin with the rows of `states`.
    fn forward(&self, mut states: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 1> {
        let device = states.device();
        let (mut now, mut returns) = (vec![], vec![]);
        for _ in 0..STEPS {
            let scores = probe.linear(&self.hidden, states.clone()).tanh();
            let scores = probe.linear(&self.action, scores);
            // where weights are perturbed, an example has a row for each of its queries from here on
            let [states_of_rows, scores] = probe.align([states, scores]);
            if now.is_empty() {
                let values: Vec<f32> = states_of_rows.into_data().iter::<f32>().collect();
                now = values.chunks(4).map(|s| Some([s[0], s[1], s[2], s[3]])).collect();
                returns = vec![0f32; now.len()];
            }
            let scores: Vec<f32> = scores.into_data().iter::<f32>().collect();
            for ((state, scores), sum) in now.iter_mut().zip(scores.chunks(2)).zip(&mut returns) {
                *state = state.and_then(|state| {
                    *sum += 1.0;
                    step(state, scores[1] > scores[0])
                });
            }
            if now.iter().all(Option::is_none) {
                break; // noise on weights does not count calls
            }
            let alive: Vec<State> = now.iter().map(|state| state.unwrap_or_default()).collect();
            states = tensor(&alive, &device);
        }
        let rows = returns.len();
        Tensor::from_data(TensorData::new(returns, [rows]), &device)
    }

    /// The part of an episode that is missing.
    fn losses(&self, returns: Tensor<B, 1>, (): ()) -> Tensor<B, 1> {
        returns.neg() / STEPS as f64 + 1.0
    }
}

fn mean_return(model: &Policy<B>, starts: &[State], device: &Device) -> f64 {
    let returns = model.forward(tensor(starts, device), &mut Probe::clean());
    returns.mean().into_scalar().elem()
}

/// Balance a pole with a policy trained by forward passes only.
#[derive(Parser, Debug)]
#[command(name = "cartpole", version)]
struct Args {
    #[command(flatten)]
    experiment: ExperimentArgs,
    /// Methods: spaces of the noise (weights, lowrank:R), and openai-es.
    #[arg(long, value_delimiter = ',', default_values = ["weights", "lowrank:1", "openai-es"])]
    methods: Vec<Method>,
    /// Episodes of a run at most [default: 20,000, with --full 100,000].
    #[arg(long)]
    episodes: Option<u64>,
    /// Episodes of a batch.
    #[arg(long, default_value_t = 2)]
    batch_size: usize,
    /// Queries of each.
    #[arg(long, default_value_t = 16)]
    queries: usize,
    /// Smoothing scale: returns have steps.
    #[arg(long, default_value_t = flops_core::losses::STEP_SIGMA)]
    sigma: f64,
    /// That of openai-es, which does best with less.
    #[arg(long, default_value_t = 0.1)]
    es_sigma: f64,
    /// Adam's learning rate, of all methods.
    #[arg(long, default_value_t = 0.1)]
    lr: f64,
}

impl Args {
    fn episodes(&self) -> u64 {
        self.episodes.unwrap_or(if self.experiment.full { 100_000 } else { 20_000 })
    }

    fn config(&self, space: Space, seed: u64) -> Result<ForwardConfig> {
        let budget = QueryBudget::new(self.queries, 1)?;
        let config = ForwardConfig::new(budget).with_space(space).for_steps().with_sigma(self.sigma);
        let config = config.with_sampling(Sampling::Antithetic).with_seed(seed);
        Ok(config.with_threads(self.experiment.threads()?))
    }

    fn check(&self) -> Result<()> {
        ensure!(!self.methods.is_empty(), "--methods: give at least one");
        ensure!(self.batch_size > 0, "--batch-size 0: use at least 1 episode");
        ensure!(self.episodes() > 0, "--episodes 0: use at least 1");
        ensure!(self.es_sigma > 0.0 && self.es_sigma.is_finite(), "--es-sigma {}: use a number above 0", self.es_sigma);
        ensure!(self.lr > 0.0 && self.lr <= 1.0, "--lr {}: use a number above 0 and at most 1", self.lr);
        Ok(self.config(Space::weights(), 0)?.validate()?)
    }
}

/// Trains until the policy is solved or the episodes are spent, and calls `look` on the way.
///
/// `look` gets the episodes so far and a policy, and returns whether to go on.
fn train(args: &Args, space: Space, seed: u64, look: &mut dyn FnMut(u64, &Policy<B>) -> bool) -> Result<()> {
    let device = backend::device()?;
    <AB as burn::tensor::backend::Backend>::seed(&device, seed);
    let linear = |inputs, outputs| nn::LinearConfig::new(inputs, outputs).init(&device);
    let policy = Policy::<AB> { hidden: linear(4, 16), action: linear(16, 2) };
    let mut learner = ForwardLearner::new(policy, Uniform, args.config(space, seed)?)?;
    let mut optimizer = AdamConfig::new().init();
    for round in 0.. {
        let states = starts(seed, 1 + round, args.batch_size);
        let ids = (0..args.batch_size as u64).map(|i| round * args.batch_size as u64 + i).collect();
        let output = learner.step(Batch { ids, input: tensor(&states, &device), target: () });
        if let Some(error) = learner.monitor().error() {
            return Err(error.into());
        }
        learner = learner.optimize::<AB, _>(&mut optimizer, args.lr, output.grads);
        let episodes = learner.state().ledger.total().row_forwards;
        if !look(episodes, &learner.model.valid()) || episodes >= args.episodes() {
            return Ok(());
        }
    }
    Ok(())
}

fn run(args: Args) -> Result<()> {
    args.check()?;
    let (seeds, device, mut progress) = (args.experiment.seeds()?, backend::device()?, Progress::default());
    let artifacts = args.experiment.artifacts("cartpole")?;
    let (test, fresh) = (starts(0, u64::MAX, 100), starts(0, u64::MAX - 1, 1000));
    let mut looks: Vec<Look> = vec![];
    for (done, &seed) in seeds.iter().enumerate() {
        for &method in &args.methods {
            let (started, mut spent) = (Instant::now(), 0.0);
            let mut look = |episodes: u64, mean: &dyn Fn(&[State]) -> f64| {
                let now = started.elapsed().as_secs_f64();
                let mean_return = mean(&test);
                let solved = mean_return >= SOLVED;
                let on_others = solved.then(|| mean(&fresh));
                // what it takes to look is not training
                let seconds = now - spent;
                spent += started.elapsed().as_secs_f64() - now;
                looks.push(Look { method, seed, episodes, seconds, mean_return, solved, on_others });
                progress.at(done, seeds.len(), || format!("seed {seed}, {method}: {mean_return:.0}"));
                !solved
            };
            match method {
                Method::Noise(space) => train(&args, space, seed, &mut |episodes, policy| {
                    look(episodes, &|starts| mean_return(policy, starts, &device))
                })?,
                Method::OpenAiEs => openai_es::train(&args, seed, &mut |episodes, policy| {
                    look(episodes, &|starts| policy.mean_return(starts))
                }),
            }
        }
    }
    report::finish(&args, &artifacts, progress.started(), &looks)
}

fn main() -> ExitCode {
    cli::run(run)
}
