//! The command line.

use std::fmt;
use std::str::FromStr;

use anyhow::{Result, ensure};
use clap::Parser;
use flops_core::prelude::*;
use flops_examples::experiment::ExperimentArgs;
use serde::{Serialize, Serializer};

/// Balance a pole with a policy trained by forward passes only.
#[derive(Parser, Debug)]
#[command(name = "cartpole", version)]
pub struct Args {
    #[command(flatten)]
    pub experiment: ExperimentArgs,
    /// Methods: spaces of the noise (weights, lowrank:R), and openai-es.
    #[arg(long, value_delimiter = ',', default_values = ["weights", "lowrank:1", "openai-es"])]
    pub methods: Vec<Method>,
    /// Episodes of a run at most [default: 20,000, with --full 100,000].
    #[arg(long)]
    pub episodes: Option<u64>,
    /// Episodes of a batch.
    #[arg(long, default_value_t = 2)]
    pub batch_size: usize,
    /// Queries of each.
    #[arg(long, default_value_t = 16)]
    pub queries: usize,
    /// Smoothing scale: returns have steps.
    #[arg(long, default_value_t = flops_core::losses::STEP_SIGMA)]
    pub sigma: f64,
    /// That of openai-es, which does best with less.
    #[arg(long, default_value_t = 0.1)]
    pub es_sigma: f64,
    /// Adam's learning rate, of all methods.
    #[arg(long, default_value_t = 0.1)]
    pub lr: f64,
}

impl Args {
    /// Episodes of a run at most.
    pub fn episodes(&self) -> u64 {
        self.episodes.unwrap_or(if self.experiment.full { 100_000 } else { 20_000 })
    }

    /// The settings of a learner.
    pub fn config(&self, space: Space, seed: u64) -> Result<ForwardConfig> {
        let budget = QueryBudget::new(self.queries, 1)?;
        let config = ForwardConfig::new(budget).with_space(space).for_steps().with_sigma(self.sigma);
        let config = config.with_sampling(Sampling::Antithetic).with_seed(seed);
        Ok(config.with_threads(self.experiment.threads()?))
    }

    /// Checks the flags before anything runs.
    pub fn check(&self) -> Result<()> {
        ensure!(!self.methods.is_empty(), "--methods: give at least one");
        ensure!(self.batch_size > 0, "--batch-size 0: use at least 1 episode");
        ensure!(self.episodes() > 0, "--episodes 0: use at least 1");
        ensure!(self.es_sigma > 0.0 && self.es_sigma.is_finite(), "--es-sigma {}: use a number above 0", self.es_sigma);
        ensure!(self.lr > 0.0 && self.lr <= 1.0, "--lr {}: use a number above 0 and at most 1", self.lr);
        Ok(self.config(Space::weights(), 0)?.validate()?)
    }
}

/// What trains a policy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// This library, with noise in a space.
    Noise(Space),
    /// The hand-written baseline.
    OpenAiEs,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Noise(space) => space.fmt(f),
            Self::OpenAiEs => f.write_str("openai-es"),
        }
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        if name == "openai-es" {
            return Ok(Self::OpenAiEs);
        }
        name.parse().map(Self::Noise).map_err(|error| format!("{error}, or openai-es"))
    }
}

impl Serialize for Method {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
