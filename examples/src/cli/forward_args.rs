//! The flags of a forward-only method: how it perturbs, and how it spends its queries.

use anyhow::Result;
use clap::Args;
use flops_core::allocator::AllocatorKind;
use flops_core::{
    ControlVariate, Error, ForwardConfig, GradientEstimate, NoiseLaw, Placement, QueryBudget, Recipe, Sampling, Space,
    Subspace, VarianceSource,
};
use flops_vit::FineTuning;
use serde_json::{Value, json};

use super::threads::threads;

/// Settings of a forward-only method; a flag that is not given takes the method's value.
#[derive(Args, Clone, Debug)]
pub struct ForwardArgs {
    /// Allocator of the queries: uniform, neyman, gaussian, bernoulli or gaussian-paper [default:
    /// the method's, neyman].
    #[arg(long)]
    pub allocator: Option<String>,
    /// Source of the allocator's variances: running, loss or pilot:N [default: the library's].
    #[arg(long)]
    pub variance: Option<VarianceSource>,
    /// Where the noise goes: activation, weights or lowrank:R [default: the method's].
    #[arg(long)]
    pub space: Option<Space>,
    /// Noise law: gaussian, laplace, rademacher or uniform [default: the method's].
    #[arg(long)]
    pub noise: Option<NoiseLaw>,
    /// Queries: one-sided or antithetic [default: the method's].
    #[arg(long)]
    pub sampling: Option<Sampling>,
    /// Which layers a query perturbs: joint (all), single (one, drawn at random) or cost-weighted
    /// (one, drawn by its cost). With cost-weighted the budget counts passes, so there are more
    /// queries [default: the method's].
    #[arg(long)]
    pub placement: Option<Placement>,
    /// Control variate besides the clean loss: none or prediction, which is learned [default: the
    /// method's].
    #[arg(long)]
    pub control_variate: Option<ControlVariate>,
    /// Estimate of the gradients: unbiased; shrunk towards the prediction, which is biased and has
    /// less error where many coordinates are perturbed; or predicted, the prediction alone
    /// [default: the method's; in vit_cifar that of the scope, too].
    #[arg(long)]
    pub estimate: Option<GradientEstimate>,
    /// Subspace of weight noise on a matrix: full, random:R:T or orthonormal:R:T (of rank R, kept
    /// for T steps) [default: the method's].
    #[arg(long)]
    pub subspace: Option<Subspace>,
    /// Smoothing scale of the noise [default: the method's].
    #[arg(long, allow_negative_numbers = true)]
    pub sigma: Option<f64>,
    /// Queries per image and step, on average.
    #[arg(long, default_value_t = FineTuning::QUERIES)]
    pub queries: usize,
    /// Queries that every image gets at least.
    #[arg(long, default_value_t = 1)]
    pub min_queries: usize,
    /// The most rows of a forward pass; more take more memory.
    #[arg(long, default_value_t = 256)]
    pub max_rows: usize,
    /// Threads that evaluate queries [default: one per core, at most 8].
    #[arg(long)]
    pub threads: Option<usize>,
    /// Give advice when the process holds more memory than this, in MiB.
    #[arg(long)]
    pub memory_bound: Option<u64>,
}

impl ForwardArgs {
    /// Returns the settings of `recipe`, replaced where a flag was given.
    ///
    /// # Errors
    /// Where a setting, or the name of the allocator, is not valid.
    pub fn config(&self, recipe: Recipe, seed: u64) -> Result<ForwardConfig> {
        let mut config = recipe
            .config(QueryBudget::new(self.queries, self.min_queries)?)
            .with_seed(seed)
            .with_max_rows(self.max_rows)
            .with_threads(threads(self.threads));
        let space = self.space(recipe)?;
        config = config.with_space(space);
        check_shared_noise(space, self.allocator(recipe)?)?;
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
        if let Some(sigma) = self.sigma {
            config = config.with_sigma(sigma);
        }
        config.validate()?;
        Ok(config)
    }

    /// Returns the space that was given, otherwise the recipe's, with the settings that were given.
    ///
    /// # Errors
    /// Where a flag sets what the space does not use.
    fn space(&self, recipe: Recipe) -> Result<Space> {
        let mut space = self.space.map_or(recipe.space(), |space| recipe.settings_in(space));
        if let Some(placement) = self.placement {
            space = space.with_placement(placement)?;
        }
        if let Some(control_variate) = self.control_variate {
            space = space.with_control_variate(control_variate)?;
        }
        if let Some(estimate) = self.estimate {
            space = space.with_estimate(estimate)?;
        }
        if let Some(subspace) = self.subspace {
            space = space.with_subspace(subspace)?;
        }
        Ok(space)
    }

    /// Returns the allocator that was given, otherwise the recipe's.
    ///
    /// With `--space weights` it is the uniform one: images share that noise.
    pub fn allocator(&self, recipe: Recipe) -> Result<AllocatorKind> {
        let shared = self.space.is_some_and(|space| !space.is_independent());
        let default = if shared { AllocatorKind::Uniform } else { recipe.allocator() };
        Ok(self.allocator.as_deref().map_or(Ok(default), str::parse)?)
    }

    /// Returns all settings, by the names of their flags.
    pub fn settings(&self, recipe: Recipe, config: &ForwardConfig) -> Result<Value> {
        let estimator = &config.estimator;
        Ok(json!({
            "allocator": self.allocator(recipe)?.name(),
            "variance": config.variance.to_string(),
            "space": estimator.space.to_string(),
            "noise": estimator.noise,
            "sampling": estimator.sampling,
            "placement": estimator.space.placement(),
            "control_variate": estimator.space.control_variate(),
            "estimate": estimator.space.estimate(),
            "normalisation": estimator.space.normalisation(),
            "subspace": (!estimator.space.is_independent()).then(|| estimator.space.subspace().to_string()),
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

/// Checks that weight noise goes with the uniform allocator, before anything is spent.
///
/// # Errors
/// [`Error::SharedNoise`].
pub fn check_shared_noise(space: Space, allocator: AllocatorKind) -> Result<(), Error> {
    if !space.is_independent() && !allocator.is_uniform() {
        return Err(Error::SharedNoise { allocator: allocator.name() });
    }
    Ok(())
}
