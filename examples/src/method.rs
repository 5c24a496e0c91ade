//! How gradients are obtained: the method, and how a forward-only one spends its queries, as written on a command line.

use std::str::FromStr;

use anyhow::Result;
use clap::Args;
use flops_core::allocator::AllocatorKind;
use flops_core::{
    ControlVariate, ForwardConfig, NoiseLaw, Placement, QueryBudget, Recipe, Sampling, Space, VarianceEstimate,
};
use flops_vit::FineTuning;
use serde_json::{Value, json};

use crate::cli;

/// How gradients are obtained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Forward passes only, by a recipe of which other flags change single settings.
    Forward(Recipe),
    /// Burn's autodiff, with the same model, data and optimizer.
    Backprop,
}

impl Method {
    /// The name it is chosen by.
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward(Recipe::Default) => "forward",
            Self::Forward(recipe) => recipe.name(),
            Self::Backprop => "backprop",
        }
    }

    /// The settings it starts from.
    pub fn recipe(self) -> Recipe {
        if let Self::Forward(recipe) = self { recipe } else { Recipe::Default }
    }

    /// Whether it does without a graph.
    pub fn is_forward(self) -> bool {
        self != Self::Backprop
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "forward" => Ok(Self::Forward(Recipe::Default)),
            "backprop" => Ok(Self::Backprop),
            _ => name.parse().map(Self::Forward).map_err(|_| {
                let names: Vec<&str> = Recipe::ALL.into_iter().map(Recipe::name).collect();
                format!("choose one of forward, backprop, {}", names.join(", "))
            }),
        }
    }
}

/// Settings of a forward-only method; what is not given is the method's.
#[derive(Args, Clone, Debug)]
pub struct Spending {
    /// How queries are dealt out: uniform, neyman, gaussian, bernoulli or gaussian-paper [default: the method's, gaussian].
    #[arg(long)]
    pub allocator: Option<String>,
    /// Where the allocator's estimates of the variances come from: running, loss or pilot:N [default: the library's].
    #[arg(long)]
    pub variance: Option<VarianceEstimate>,
    /// Where the noise falls: activation, weights or lowrank:R [default: the method's].
    #[arg(long)]
    pub space: Option<Space>,
    /// Law of the noise: gaussian, laplace, rademacher or uniform [default: the method's].
    #[arg(long)]
    pub noise: Option<NoiseLaw>,
    /// One-sided or antithetic [default: the method's].
    #[arg(long)]
    pub sampling: Option<Sampling>,
    /// Noise on all layers of a query (joint), on one drawn for it (single), or on one drawn by what it costs (staged: the budget
    /// then counts passes, and there are more queries) [default: the method's].
    #[arg(long)]
    pub placement: Option<Placement>,
    /// What is subtracted from the queries' coefficients besides the clean loss: none or feedback [default: the method's].
    #[arg(long)]
    pub control_variate: Option<ControlVariate>,
    /// Smoothing scale [default: the method's].
    #[arg(long, allow_negative_numbers = true)]
    pub sigma: Option<f64>,
    /// Queries per image and step, on average.
    #[arg(long, default_value_t = FineTuning::QUERIES)]
    pub queries: usize,
    /// Queries that every image gets.
    #[arg(long, default_value_t = 1)]
    pub min_queries: usize,
    /// Rows of a forward pass at most: more take more memory.
    #[arg(long, default_value_t = 256)]
    pub max_rows: usize,
    /// Threads that evaluate queries [default: one per core, at most 8].
    #[arg(long)]
    pub threads: Option<usize>,
    /// Say so when the process holds more memory than this, in MiB.
    #[arg(long)]
    pub memory_bound: Option<u64>,
}

impl Spending {
    /// The settings of `recipe` with those that were given in their place.
    pub fn config(&self, recipe: Recipe, seed: u64) -> Result<ForwardConfig> {
        self.allocator(recipe)?;
        let mut config = recipe
            .config(QueryBudget::new(self.queries, self.min_queries)?)
            .with_seed(seed)
            .with_max_rows(self.max_rows)
            .with_threads(cli::threads(self.threads));
        if let Some(space) = self.space {
            config = config.with_space(space);
        }
        if let Some(variance) = self.variance {
            config = config.with_variance(variance);
        }
        if let Some(bound) = self.memory_bound {
            config = config.with_memory_bound(bound.saturating_mul(1 << 20));
        }
        if let Some(noise) = self.noise {
            config = config.with_noise(noise);
        }
        if let Some(sampling) = self.sampling {
            config = config.with_sampling(sampling);
        }
        if let Some(placement) = self.placement {
            config = config.with_placement(placement);
        }
        if let Some(control_variate) = self.control_variate {
            config = config.with_control_variate(control_variate);
        }
        if let Some(sigma) = self.sigma {
            config = config.with_sigma(sigma);
        }
        config.validate()?;
        Ok(config)
    }

    /// The allocator that was given, or the recipe's.
    pub fn allocator(&self, recipe: Recipe) -> Result<AllocatorKind> {
        Ok(self.allocator.as_deref().map_or(Ok(recipe.allocator()), str::parse)?)
    }

    /// All of them, by the names of their flags.
    pub fn settings(&self, recipe: Recipe, config: &ForwardConfig) -> Result<Value> {
        let estimator = &config.estimator;
        Ok(json!({
            "allocator": self.allocator(recipe)?.name(),
            "variance": config.variance.to_string(),
            "space": estimator.space.to_string(),
            "noise": estimator.noise,
            "sampling": estimator.sampling,
            "placement": estimator.placement,
            "control_variate": config.control_variate,
            "normalisation": config.normalisation,
            "memory_bound": self.memory_bound,
            "sigma": estimator.sigma,
            "queries": self.queries,
            "min_queries": self.min_queries,
            "max_rows": estimator.max_rows,
            "threads": estimator.threads,
            "prefix_cache": config.prefix_cache > 0,
        }))
    }
}
