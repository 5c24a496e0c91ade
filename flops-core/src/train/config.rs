//! Configuration of forward-only training.

use serde::{Deserialize, Serialize};

use crate::allocator::QueryBudget;
use crate::error::Error;
use crate::estimator::{Estimator, Normalisation, Space};
use crate::losses::STEP_SIGMA;
use crate::noise::{NoiseLaw, Sampling};
use crate::variance::VarianceSource;

/// Configuration of a [`ForwardLearner`](crate::ForwardLearner).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ForwardConfig {
    /// Space, noise law, σ, seed and limits of the estimator.
    pub estimator: Estimator,
    /// Queries per example.
    pub budget: QueryBudget,
    /// Source of the variances that the allocator works with.
    pub variance: VarianceSource,
    /// Largest number of training examples whose frozen prefix is cached; 0 for no cache.
    ///
    /// An example is known by its id and the sizes of its input: use it only for examples without
    /// augmentation, and leave the frozen parameters as they are. Each padding of an example counts.
    pub prefix_cache: usize,
    /// Largest number of evaluated examples whose frozen prefix is cached; 0 for no cache.
    ///
    /// All of them must come from one data set. Their ids may be equal to ids of training examples.
    pub evaluation_cache: usize,
    /// Number of steps in a row without a finite loss that stops training, at least 1.
    pub max_failed_steps: usize,
    /// Resident memory in bytes beyond which the monitor
    /// [advises](crate::train::Signature::OverBound); `None` for no bound.
    pub memory_bound: Option<u64>,
}

impl ForwardConfig {
    /// The defaults, with `budget` queries.
    ///
    /// Activation noise with the learned control variate (see [`Estimator::new`]), running
    /// variances, no caches, no memory bound. Training stops after 5 failed steps in a row.
    #[must_use]
    pub fn new(budget: QueryBudget) -> Self {
        Self {
            estimator: Estimator::new(Space::activation()),
            budget,
            variance: VarianceSource::default(),
            prefix_cache: 0,
            evaluation_cache: 0,
            max_failed_steps: 5,
            memory_bound: None,
        }
    }

    /// Checks the settings. [`ForwardLearner::new`](crate::ForwardLearner::new) checks the
    /// allocator against the space.
    ///
    /// # Errors
    /// [`Error::Setting`] or [`Error::Budget`], naming the setting at fault.
    pub fn validate(&self) -> Result<(), Error> {
        self.estimator.validate()?;
        if self.max_failed_steps == 0 {
            let remedy = "use at least 1".to_string();
            return Err(Error::Setting { name: "max_failed_steps", value: 0.0, remedy });
        }
        if let VarianceSource::Pilot(queries) = self.variance {
            self.budget.after_pilots(queries)?;
        }
        if self.estimator.space.normalisation() == Normalisation::LossSpread && self.budget.queries_per_datum() < 2 {
            let remedy = "use at least 2: one loss has no spread to divide by".to_string();
            return Err(Error::Budget { name: "queries_per_datum", value: self.budget.queries_per_datum(), remedy });
        }
        Ok(())
    }

    /// Sets the source of the variances that the allocator works with.
    #[must_use]
    pub fn with_variance(mut self, variance: VarianceSource) -> Self {
        self.variance = variance;
        self
    }

    /// Sets the resident memory, in bytes, beyond which the monitor advises.
    #[must_use]
    pub fn with_memory_bound(mut self, bytes: u64) -> Self {
        self.memory_bound = Some(bytes);
        self
    }

    /// Sets where the noise falls, with the settings of that space.
    #[must_use]
    pub fn with_space(mut self, space: Space) -> Self {
        self.estimator.space = space;
        self
    }

    /// Sets the law of the noise.
    #[must_use]
    pub fn with_noise(mut self, noise: NoiseLaw) -> Self {
        self.estimator.noise = noise;
        self
    }

    /// Sets one-sided or antithetic sampling.
    #[must_use]
    pub fn with_sampling(mut self, sampling: Sampling) -> Self {
        self.estimator.sampling = sampling;
        self
    }

    /// Sets the smoothing scale σ > 0, the standard deviation of the perturbation.
    #[must_use]
    pub fn with_sigma(mut self, sigma: f64) -> Self {
        self.estimator.sigma = sigma;
        self
    }

    /// Sets Gaussian noise and the σ to begin with where the loss has steps,
    /// [`STEP_SIGMA`](crate::losses::STEP_SIGMA).
    ///
    /// The estimate is then that of the gradient of the smoothed loss. Call it behind a recipe: each
    /// of them brings a σ for smooth losses.
    #[must_use]
    pub fn for_steps(self) -> Self {
        self.with_noise(NoiseLaw::Gaussian).with_sigma(STEP_SIGMA)
    }

    /// Sets the seed of noise and allocation.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.estimator.seed = seed;
        self
    }

    /// Sets the largest number of rows in a forward pass, at least 2.
    #[must_use]
    pub fn with_max_rows(mut self, max_rows: usize) -> Self {
        self.estimator.max_rows = max_rows;
        self
    }

    /// Sets the number of threads that evaluate queries, at least 1; the result does not depend on
    /// it.
    #[must_use]
    pub fn with_threads(mut self, threads: usize) -> Self {
        self.estimator.threads = threads;
        self
    }

    /// Sets the [leaves](crate::Estimator::leaves) that a batch is cut into for several workers, a power
    /// of two from 1 to 1,024.
    #[must_use]
    pub fn with_leaves(mut self, leaves: usize) -> Self {
        self.estimator.leaves = leaves;
        self
    }

    /// Sets how many training examples' frozen prefixes are cached; see
    /// [`prefix_cache`](Self::prefix_cache).
    #[must_use]
    pub fn with_prefix_cache(mut self, examples: usize) -> Self {
        self.prefix_cache = examples;
        self
    }

    /// Sets how many evaluated examples' frozen prefixes are cached; see
    /// [`evaluation_cache`](Self::evaluation_cache).
    #[must_use]
    pub fn with_evaluation_cache(mut self, examples: usize) -> Self {
        self.evaluation_cache = examples;
        self
    }

    /// Sets the number of failed steps in a row that stops training, at least 1.
    #[must_use]
    pub fn with_max_failed_steps(mut self, steps: usize) -> Self {
        self.max_failed_steps = steps;
        self
    }
}
