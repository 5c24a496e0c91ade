//! How a batch's queries are dealt out among its data.
//!
//! With A_j queries for datum j, weighted 1/(B·A_j), the gradient estimate is unbiased whatever the allocation, and
//! its variance is (1/B²) Σ_j Tr Σ_j / A_j, where Σ_j is the covariance of a single-query estimate. An allocator
//! chooses the A_j, before the noise is drawn, so as to make the proxy J(A) = Σ_j Tr Σ_j / A_j small.
//!
//! | allocator | A_j |
//! |---|---|
//! | [`Uniform`] | A₀ |
//! | [`Neyman`] | ∝ √(Tr Σ_j), from estimates |
//! | [`GaussianAllocator`] | drawn from a Gaussian whose mean follows the losses, learned |
//! | [`BernoulliAllocator`] | each query kept or given up with a probability that follows the losses, learned |
//!
//! Any of them goes with any estimate of Tr Σ_j, [`VarianceEstimate`](crate::variance::VarianceEstimate).

mod bernoulli;
mod gaussian;
mod kernel;
mod likelihood_ratio;
mod mean;
mod neyman;
mod uniform;

use std::fmt::Debug;
use std::str::FromStr;

use burn::module::{Module, ModuleDisplay, Param};
use burn::prelude::{Backend, Tensor};
use rand::rngs::StdRng;

use crate::budget::{Allocation, QueryBudget};
use crate::error::Error;
use crate::ops;

pub use bernoulli::{BernoulliAllocator, BernoulliAllocatorConfig};
pub use gaussian::{GaussianAllocator, GaussianAllocatorConfig};
pub use likelihood_ratio::{LearnedUpdate, LearningState};
pub use mean::MeanModel;
pub use neyman::Neyman;
pub use uniform::Uniform;

/// Embeddings of a batch, row-major `[batch_size, dim]`.
#[derive(Clone, Copy, Debug)]
pub struct Embeddings<'a> {
    values: &'a [f32],
    dim: usize,
}

impl<'a> Embeddings<'a> {
    /// `values` is row-major `[batch_size, dim]`.
    ///
    /// # Errors
    /// If `dim` is zero or does not divide the number of values.
    pub fn new(values: &'a [f32], dim: usize) -> Result<Self, Error> {
        if dim == 0 || !values.len().is_multiple_of(dim) {
            let expected = values.len().checked_div(dim).unwrap_or(0) * dim;
            return Err(Error::Length { name: "embeddings", got: values.len(), expected });
        }
        Ok(Self { values, dim })
    }

    /// One embedding per datum.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &'a [f32]> {
        self.values.chunks_exact(self.dim)
    }
}

/// What an allocator may look at: one entry per datum of the batch.
#[derive(Clone, Copy, Debug, Default)]
pub struct DatumFeatures<'a> {
    /// Losses at the unperturbed parameters.
    pub losses: &'a [f64],
    /// Estimates of Tr Σ_j.
    pub variances: &'a [f64],
    /// Embeddings, where the model gives any.
    pub embeddings: Option<Embeddings<'a>>,
    /// Features of the user's choice, for [`MeanModel::Features`].
    pub extra: Option<Embeddings<'a>>,
}

impl DatumFeatures<'_> {
    /// Checks that there is a batch, with one usable entry per datum.
    ///
    /// # Errors
    /// If the batch is empty, lengths differ, a loss or an embedding is not finite, or a variance is not finite or negative.
    pub fn validate(&self) -> Result<(), Error> {
        let n = self.losses.len();
        if n == 0 {
            return Err(Error::EmptyBatch);
        }
        if let Some(index) = self.losses.iter().position(|l| !l.is_finite()) {
            let remedy = "check the datum for NaN, or lower lr";
            return Err(Error::Value { name: "losses", index, value: self.losses[index], remedy });
        }
        validate_variances(self.variances, n)?;
        for (name, given) in [("embeddings", &self.embeddings), ("allocation features", &self.extra)] {
            let Some(given) = given else { continue };
            if given.rows().len() != n {
                return Err(Error::Length { name, got: given.rows().len(), expected: n });
            }
            if let Some(at) = given.values.iter().position(|v| !v.is_finite()) {
                let (index, value) = (at / given.dim, given.values[at] as f64);
                return Err(Error::Value {
                    name,
                    index,
                    value,
                    remedy: "check the datum for NaN, or allocate without them",
                });
            }
        }
        Ok(())
    }
}

fn validate_variances(variances: &[f64], expected: usize) -> Result<(), Error> {
    if variances.len() != expected {
        return Err(Error::Length { name: "variances", got: variances.len(), expected });
    }
    match variances.iter().position(|v| !(v.is_finite() && *v >= 0.0)) {
        Some(index) => Err(Error::Value {
            name: "variances",
            index,
            value: variances[index],
            remedy: "estimates of Tr Σ must be finite and not negative",
        }),
        None => Ok(()),
    }
}

/// Deals out a batch's queries, and may learn to do it better.
///
/// A training step sees `&self`: what [`allocate`](Self::allocate) learned comes back as an update, which
/// [`apply`](Self::apply) puts into the module once the step is over. As a [`Module`], an allocator is saved and
/// restored with the model's checkpoint.
pub trait Allocator<B: Backend>: Module<B> + ModuleDisplay {
    /// What `allocate` learned, put into the module by `apply`.
    type Update: Clone + Send + Debug + 'static;

    /// Allocates a batch's queries: Σ_j A_j = B·A₀, every A_j ≥ A_min.
    ///
    /// # Errors
    /// If the features are unusable, see [`DatumFeatures::validate`].
    fn allocate(
        &self,
        features: &DatumFeatures<'_>,
        budget: &QueryBudget,
        rng: &mut StdRng,
    ) -> Result<(Allocation, Self::Update), Error>;

    /// Takes an update in.
    fn apply(self, update: Self::Update) -> Self;

    /// The name it is chosen by.
    fn name(&self) -> &'static str;
}

/// The numbers in a parameter of an allocator.
fn values<B: Backend>(param: &Param<Tensor<B, 1>>) -> Vec<f64> {
    param.val().into_data().iter::<f64>().collect()
}

/// The same parameter with other numbers.
fn set_values<B: Backend>(param: Param<Tensor<B, 1>>, values: &[f64]) -> Param<Tensor<B, 1>> {
    let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
    param.map(|old| {
        let new = ops::from_host(values, [old.dims()[0]], &old.device());
        new.set_require_grad(old.is_require_grad())
    })
}

/// J(A) = Σ_j Tr Σ_j / A_j: B² times the variance of the gradient estimate.
///
/// # Panics
/// If `variances` and `allocation` differ in length.
pub fn proxy(variances: &[f64], allocation: &Allocation) -> f64 {
    assert_eq!(variances.len(), allocation.counts().len(), "one variance per datum of the allocation");
    variances.iter().zip(allocation.counts()).map(|(v, &a)| v / a as f64).sum()
}

/// What an allocation gains over equal allocation, and what there was to gain.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AllocationReport {
    /// Coefficient of variation of √(Tr Σ_j) over the batch.
    pub cv: f64,
    /// 1/(1 + CV²), the least relative variance any real-valued allocation reaches.
    pub ceiling: f64,
    /// J of this allocation relative to equal allocation's.
    pub relative_variance: f64,
    /// The least J an integer allocation reaches, relative to equal allocation's.
    pub neyman_relative_variance: f64,
    /// The smallest A_j.
    pub min: usize,
    /// The largest A_j.
    pub max: usize,
}

impl AllocationReport {
    /// Measures `allocation` by `variances`, estimates of Tr Σ_j. Where they are all zero there is nothing to gain.
    ///
    /// # Errors
    /// If `variances` has another length than the allocation, or a variance is not finite or negative.
    pub fn new(variances: &[f64], allocation: &Allocation, budget: &QueryBudget) -> Result<Self, Error> {
        validate_variances(variances, allocation.counts().len())?;
        Self::of(variances, proxy(variances, allocation), allocation, budget)
    }

    /// The same for an estimate of which B² times the variance is `spent`.
    pub(crate) fn of(
        variances: &[f64],
        spent: f64,
        allocation: &Allocation,
        budget: &QueryBudget,
    ) -> Result<Self, Error> {
        let n = allocation.counts().len();
        validate_variances(variances, n)?;
        let weights: Vec<f64> = variances.iter().map(|v| v.sqrt()).collect();
        let uniform = proxy(variances, &Allocation::uniform(n, budget));
        let (first, second): (f64, f64) = (weights.iter().sum(), variances.iter().sum());
        let (min, max) = (allocation.min(), allocation.max());
        if uniform == 0.0 {
            let (relative_variance, neyman_relative_variance) = (1.0, 1.0);
            return Ok(Self { cv: 0.0, ceiling: 1.0, relative_variance, neyman_relative_variance, min, max });
        }
        let ceiling = (first * first / (n as f64 * second)).min(1.0);
        Ok(Self {
            cv: (1.0 / ceiling - 1.0).sqrt(),
            ceiling,
            relative_variance: spent / uniform,
            neyman_relative_variance: proxy(variances, &Allocation::neyman(&weights, budget)?) / uniform,
            min,
            max,
        })
    }
}

/// The allocators there are, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllocatorKind {
    /// [`Uniform`].
    Uniform,
    /// [`Neyman`].
    Neyman,
    /// [`GaussianAllocator`] with its default configuration.
    Gaussian,
    /// [`BernoulliAllocator`] with its default configuration.
    Bernoulli,
    /// [`GaussianAllocator`] as the paper has it, [`GaussianAllocatorConfig::paper`].
    GaussianPaper,
}

impl AllocatorKind {
    /// Every allocator.
    pub const ALL: [Self; 5] = [Self::Uniform, Self::Neyman, Self::Gaussian, Self::Bernoulli, Self::GaussianPaper];

    /// The name it is chosen by.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Neyman => "neyman",
            Self::Gaussian => "gaussian",
            Self::Bernoulli => "bernoulli",
            Self::GaussianPaper => "gaussian-paper",
        }
    }
}

impl FromStr for AllocatorKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| Error::Unknown {
            what: "allocator",
            name: name.into(),
            choices: "uniform, neyman, gaussian, bernoulli, gaussian-paper",
        })
    }
}

/// An allocator chosen at run time.
///
/// A checkpoint is read back by the allocator that wrote it: loading the record of another one panics, as for any
/// enum that derives `Module`. That of a Gaussian or Bernoulli allocator with another [`MeanModel`] loads, and is an error when it allocates.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)]
pub enum AnyAllocator<B: Backend> {
    /// [`Uniform`].
    Uniform(Uniform),
    /// [`Neyman`].
    Neyman(Neyman),
    /// [`GaussianAllocator`].
    Gaussian(GaussianAllocator<B>),
    /// [`BernoulliAllocator`].
    Bernoulli(BernoulliAllocator<B>),
}

impl<B: Backend> AnyAllocator<B> {
    /// The allocator `kind` with its default configuration.
    pub fn new(kind: AllocatorKind, device: &B::Device) -> Result<Self, Error> {
        Ok(match kind {
            AllocatorKind::Uniform => Self::Uniform(Uniform),
            AllocatorKind::Neyman => Self::Neyman(Neyman),
            AllocatorKind::Gaussian => Self::Gaussian(GaussianAllocatorConfig::new().init(device)?),
            AllocatorKind::GaussianPaper => Self::Gaussian(GaussianAllocatorConfig::paper().init(device)?),
            AllocatorKind::Bernoulli => Self::Bernoulli(BernoulliAllocatorConfig::new().init(device)?),
        })
    }

    /// The allocator of that name: `uniform`, `neyman`, `gaussian`, `bernoulli` or `gaussian-paper`.
    ///
    /// # Errors
    /// If there is no allocator of that name.
    pub fn from_name(name: &str, device: &B::Device) -> Result<Self, Error> {
        Self::new(name.parse()?, device)
    }
}

impl<B: Backend> Allocator<B> for AnyAllocator<B> {
    /// What a learned allocator learned; nothing for the others.
    type Update = Option<LearnedUpdate>;

    fn allocate(
        &self,
        features: &DatumFeatures<'_>,
        budget: &QueryBudget,
        rng: &mut StdRng,
    ) -> Result<(Allocation, Self::Update), Error> {
        let learned = |(allocation, update)| (allocation, Some(update));
        Ok(match self {
            Self::Uniform(a) => (Allocator::<B>::allocate(a, features, budget, rng)?.0, None),
            Self::Neyman(a) => (Allocator::<B>::allocate(a, features, budget, rng)?.0, None),
            Self::Gaussian(a) => learned(a.allocate(features, budget, rng)?),
            Self::Bernoulli(a) => learned(a.allocate(features, budget, rng)?),
        })
    }

    fn apply(self, update: Self::Update) -> Self {
        match (self, update) {
            (Self::Gaussian(a), Some(update)) => Self::Gaussian(a.apply(update)),
            (Self::Bernoulli(a), Some(update)) => Self::Bernoulli(a.apply(update)),
            (this, _) => this,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Uniform(a) => Allocator::<B>::name(a),
            Self::Neyman(a) => Allocator::<B>::name(a),
            Self::Gaussian(a) => a.name(),
            Self::Bernoulli(a) => a.name(),
        }
    }
}

#[cfg(test)]
mod tests;
