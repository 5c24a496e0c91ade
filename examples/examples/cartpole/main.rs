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

mod args;
mod openai_es;
mod pole;
mod report;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use burn::module::AutodiffModule;
use burn::optim::AdamConfig;
use burn::prelude::*;
use flops_core::prelude::*;
use flops_examples::backend::{self, AB, B, Device};
use flops_examples::cli;
use flops_examples::experiment::Progress;

use args::{Args, Method};
use pole::{STEPS, State, starts, step};
use report::Look;

/// Mean return from which on the task counts as solved.
const SOLVED: f64 = 475.0;

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
        let step = learner.estimate(&Batch { ids, input: tensor(&states, &device), target: () })?;
        learner = learner.update(&mut optimizer, args.lr, step.grads)?;
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
