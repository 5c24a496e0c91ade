//! How a batch's queries are allocated to its examples.
//!
//! Example j gets A_j queries, each weighted 1/(B·A_j), so the gradient estimate is unbiased
//! whatever the allocation. Its variance is (1/B²) Σ_j Tr Σ_j / A_j, with Σ_j the covariance of a
//! single-query estimate. An allocator chooses the A_j before the noise is drawn, so that J(A) =
//! Σ_j Tr Σ_j / A_j, the [`variance_objective`], is small.
//!
//! | allocator | A_j |
//! |---|---|
//! | [`Uniform`] | A₀ |
//! | [`Neyman`] | ∝ √(Tr Σ_j), from estimates |
//! | [`GaussianAllocator`] | from a Gaussian with a learned mean, which follows losses and estimates |
//! | [`BernoulliAllocator`] | each query kept or given up with a learned probability, which follows the losses |
//!
//! [`Neyman`] is the default. The learned allocators are for research: after each step they learn
//! from the second moments that its queries [showed](Shown), which the estimates may have missed.
//!
//! Every allocator works with every [source](crate::variance::VarianceSource) of the estimates of
//! Tr Σ_j.

mod allocation;
mod any;
mod bernoulli;
mod budget;
mod covariance;
mod features;
mod gaussian;
mod likelihood_ratio;
mod mean;
mod neyman;
mod objective;
mod params;
mod report;
mod shown;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
mod traits;
mod uniform;

pub use allocation::Allocation;
pub use any::{AllocatorKind, AnyAllocator};
pub use bernoulli::{BernoulliAllocator, BernoulliAllocatorConfig};
pub use budget::QueryBudget;
pub use features::{DatumFeatures, Embeddings, Needs};
pub use gaussian::{GaussianAllocator, GaussianAllocatorConfig};
pub use likelihood_ratio::{LearnedUpdate, LearningState};
pub use mean::MeanModel;
pub use neyman::Neyman;
pub use objective::variance_objective;
pub use report::AllocationReport;
pub use shown::Shown;
pub use traits::Allocator;
pub use uniform::Uniform;
