//! Allocators chosen by name.

use burn::module::Module;
use burn::prelude::Backend;
use rand::rngs::StdRng;

use super::allocation::Allocation;
use super::bernoulli::{BernoulliAllocator, BernoulliAllocatorConfig};
use super::budget::QueryBudget;
use super::features::{DatumFeatures, Needs};
use super::gaussian::{GaussianAllocator, GaussianAllocatorConfig};
use super::likelihood_ratio::LearnedUpdate;
use super::neyman::Neyman;
use super::shown::Shown;
use super::traits::Allocator;
use super::uniform::Uniform;
use crate::error::Error;
use crate::names::named_enum;

/// The allocators of this crate, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AllocatorKind {
    /// [`Uniform`].
    Uniform,
    /// [`Neyman`].
    Neyman,
    /// [`GaussianAllocator`] with its default configuration.
    Gaussian,
    /// [`BernoulliAllocator`] with its default configuration.
    Bernoulli,
    /// [`GaussianAllocator`] in the paper's form, [`GaussianAllocatorConfig::paper`].
    GaussianPaper,
}

named_enum! {
    AllocatorKind: "allocator" {
        Uniform => "uniform",
        Neyman => "neyman",
        Gaussian => "gaussian",
        Bernoulli => "bernoulli",
        GaussianPaper => "gaussian-paper",
    }
}

impl AllocatorKind {
    /// Whether every example gets the same number of queries; see [`Allocator::is_uniform`].
    #[must_use]
    pub fn is_uniform(self) -> bool {
        self == Self::Uniform
    }
}

/// An allocator chosen at run time.
///
/// A checkpoint can be loaded only into the kind of allocator that wrote it. Another kind panics,
/// as any enum that derives `Module` does. If only the [`MeanModel`](super::MeanModel) of a learned
/// allocator differs, the record loads, and allocating is an error.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)]
#[non_exhaustive]
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
    ///
    /// # Errors
    /// Never with today's defaults, which are all in range.
    pub fn new(kind: AllocatorKind, device: &B::Device) -> Result<Self, Error> {
        Ok(match kind {
            AllocatorKind::Uniform => Self::Uniform(Uniform),
            AllocatorKind::Neyman => Self::Neyman(Neyman),
            AllocatorKind::Gaussian => Self::Gaussian(GaussianAllocatorConfig::new().init(device)?),
            AllocatorKind::GaussianPaper => Self::Gaussian(GaussianAllocatorConfig::paper().init(device)?),
            AllocatorKind::Bernoulli => Self::Bernoulli(BernoulliAllocatorConfig::new().init(device)?),
        })
    }

    /// The allocator called `name`: `uniform`, `neyman`, `gaussian`, `bernoulli` or
    /// `gaussian-paper`.
    ///
    /// # Errors
    /// If no allocator is called that.
    pub fn from_name(name: &str, device: &B::Device) -> Result<Self, Error> {
        Self::new(name.parse()?, device)
    }
}

impl<B: Backend> Allocator<B> for AnyAllocator<B> {
    /// The update of a learned allocator; `None` for the others.
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

    fn apply(self, update: Self::Update, shown: &Shown<'_>) -> Self {
        match (self, update) {
            (Self::Gaussian(a), Some(update)) => Self::Gaussian(a.apply(update, shown)),
            (Self::Bernoulli(a), Some(update)) => Self::Bernoulli(a.apply(update, shown)),
            (this, _) => this,
        }
    }

    fn needs(&self) -> Needs {
        match self {
            Self::Uniform(a) => Allocator::<B>::needs(a),
            Self::Neyman(a) => Allocator::<B>::needs(a),
            Self::Gaussian(a) => a.needs(),
            Self::Bernoulli(a) => a.needs(),
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

    fn is_uniform(&self) -> bool {
        match self {
            Self::Uniform(a) => Allocator::<B>::is_uniform(a),
            Self::Neyman(a) => Allocator::<B>::is_uniform(a),
            Self::Gaussian(a) => a.is_uniform(),
            Self::Bernoulli(a) => a.is_uniform(),
        }
    }
}
