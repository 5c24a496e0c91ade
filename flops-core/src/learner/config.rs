//! How a learner spends its queries.

use serde::{Deserialize, Serialize};

use crate::budget::QueryBudget;
use crate::error::Error;
use crate::estimator::{Estimator, Space};
use crate::feedback::ControlVariate;
use crate::noise::{NoiseLaw, Placement, Sampling};
use crate::variance::VarianceEstimate;

/// What the gradient is divided by before the optimizer sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Normalisation {
    /// Nothing.
    #[default]
    None,
    /// The standard deviation of the batch's mean change of loss over the directions of the step, over σ: the step of FZOO, whose length is
    /// that of the learning rate. It is meant for directions that the data share (weights space) and needs at least 2 queries per datum. Adam's
    /// step is free of scale already.
    LossSpread,
}

/// How a [`ForwardLearner`](crate::ForwardLearner) spends its queries.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ForwardConfig {
    /// Space, law, σ, seed and limits of the estimator.
    pub estimator: Estimator,
    /// Queries per datum.
    pub budget: QueryBudget,
    /// Where the allocator's estimates of the variances come from.
    pub variance: VarianceEstimate,
    /// What is subtracted from the coefficients of the queries, besides the clean loss.
    pub control_variate: ControlVariate,
    /// What the gradient is divided by.
    pub normalisation: Normalisation,
    /// Data whose frozen prefix is kept from epoch to epoch, 0 for none. Only for data that are not augmented, since a datum is known
    /// by its id alone, and for frozen parameters that nobody changes.
    pub prefix_cache: usize,
    /// The same for data that are evaluated between epochs, all of one data set: their ids may be those of training data.
    pub evaluation_cache: usize,
    /// Steps in a row without any finite loss after which training stops, at least 1.
    pub max_failed_steps: usize,
    /// Resident memory in bytes beyond which [diagnostics](crate::diagnostics) speak up; `None` for no bound.
    pub memory_bound: Option<u64>,
}

impl ForwardConfig {
    /// `budget` queries, and the defaults: activation noise, see [`Estimator::new`]; learned feedback as the control variate; no
    /// prefix cache; 5 failed steps.
    pub fn new(budget: QueryBudget) -> Self {
        Self {
            estimator: Estimator::new(Space::Activation),
            budget,
            variance: VarianceEstimate::default(),
            control_variate: ControlVariate::Feedback,
            normalisation: Normalisation::None,
            prefix_cache: 0,
            evaluation_cache: 0,
            max_failed_steps: 5,
            memory_bound: None,
        }
    }

    /// Whether the settings are usable, alone and together.
    ///
    /// # Errors
    /// [`Error::Setting`] or [`Error::Budget`], naming the setting at fault.
    pub fn validate(&self) -> Result<(), Error> {
        self.estimator.validate()?;
        if self.max_failed_steps == 0 {
            let remedy = "use at least 1".to_string();
            return Err(Error::Setting { name: "max_failed_steps", value: 0.0, remedy });
        }
        if let VarianceEstimate::Pilot(queries) = self.variance {
            self.budget.after_pilots(queries)?;
        }
        if self.normalisation == Normalisation::LossSpread && self.budget.queries_per_datum() < 2 {
            let remedy = "use at least 2: one loss has no spread to divide by".to_string();
            return Err(Error::Budget { name: "queries_per_datum", value: self.budget.queries_per_datum(), remedy });
        }
        Ok(())
    }

    /// Sets where the allocator's estimates of the variances come from.
    pub fn with_variance(mut self, variance: VarianceEstimate) -> Self {
        self.variance = variance;
        self
    }

    /// Sets what the gradient is divided by.
    pub fn with_normalisation(mut self, normalisation: Normalisation) -> Self {
        self.normalisation = normalisation;
        self
    }

    /// Sets the memory beyond which diagnostics speak up.
    pub fn with_memory_bound(mut self, bytes: u64) -> Self {
        self.memory_bound = Some(bytes);
        self
    }

    /// Sets the control variate.
    pub fn with_control_variate(mut self, control_variate: ControlVariate) -> Self {
        self.control_variate = control_variate;
        self
    }

    /// Sets where the noise falls.
    pub fn with_space(mut self, space: Space) -> Self {
        self.estimator.space = space;
        self
    }

    /// Sets the law of the noise.
    pub fn with_noise(mut self, noise: NoiseLaw) -> Self {
        self.estimator.noise = noise;
        self
    }

    /// Sets one-sided or antithetic sampling.
    pub fn with_sampling(mut self, sampling: Sampling) -> Self {
        self.estimator.sampling = sampling;
        self
    }

    /// Sets on how many layers the noise of a query falls.
    pub fn with_placement(mut self, placement: Placement) -> Self {
        self.estimator.placement = placement;
        self
    }

    /// Sets the smoothing scale.
    pub fn with_sigma(mut self, sigma: f64) -> Self {
        self.estimator.sigma = sigma;
        self
    }

    /// Sets the seed of noise and allocation.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.estimator.seed = seed;
        self
    }

    /// Sets the rows of a forward pass at most.
    pub fn with_max_rows(mut self, max_rows: usize) -> Self {
        self.estimator.max_rows = max_rows;
        self
    }

    /// Sets the threads that evaluate queries.
    pub fn with_threads(mut self, threads: usize) -> Self {
        self.estimator.threads = threads;
        self
    }

    /// Sets how many data's frozen prefix is kept over the epochs.
    pub fn with_prefix_cache(mut self, data: usize) -> Self {
        self.prefix_cache = data;
        self
    }

    /// Sets how many evaluated data's frozen prefix is kept from one evaluation to the next.
    pub fn with_evaluation_cache(mut self, data: usize) -> Self {
        self.evaluation_cache = data;
        self
    }

    /// Sets how many steps in a row may fail.
    pub fn with_max_failed_steps(mut self, steps: usize) -> Self {
        self.max_failed_steps = steps;
        self
    }
}
