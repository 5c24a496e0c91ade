//! Training with forward passes only, for [Burn](https://burn.dev) models.
//!
//! A gradient is estimated from the losses of perturbed forward passes, called queries. Each step has a budget of queries; an
//! [allocator](mod@allocator) deals it out among the data of the batch, more to those whose gradient is harder to estimate
//! ([FLOPS: Forward Learning with OPtimal Sampling](https://arxiv.org/abs/2410.05966), ICLR 2025). No autodiff graph is recorded, so
//! the loss need not be differentiable, and memory is that of forward passes over a bounded number of rows.
//!
//! Where backpropagation is possible and fits, it makes more progress per second. This crate is for where it is not, or does not.
//!
//! # What to implement, what to call
//!
//! 1. [`ForwardModel`] for your module: its forward pass, and a loss for each datum.
//! 2. [`ForwardLearner`] around it, given to burn-train's `Learner` in place of the module. Optimizers, schedulers, metrics and
//!    checkpointers are Burn's own. Parameters are trained unless frozen with `no_grad`.
//!
//! `examples/examples/custom_model.rs` in the repository does both from end to end; `docs/method.md` has the mathematics.
//!
//! # Recipes
//!
//! Any estimator is a perturbation [space](Space) × a [noise law](NoiseLaw), [one-sided or antithetic](Sampling), × an
//! [allocator](mod@allocator):
//!
//! | method, as [`Recipe`] | space | noise | sampling | allocator |
//! |---|---|---|---|---|
//! | [`Default`](Recipe::Default) | `Activation` | `Rademacher` | `OneSided` | [`GaussianAllocator`](allocator::GaussianAllocator) |
//! | [`Flops`](Recipe::Flops), the paper | `Activation` | `Gaussian` | `Antithetic` | [its own form](allocator::GaussianAllocatorConfig::paper) |
//! | [`Mezo`](Recipe::Mezo); SPSA with `Rademacher` | `Weights` | `Gaussian` | `Antithetic` | `Uniform` |
//! | [`Fzoo`](Recipe::Fzoo) | `Weights` | `Rademacher` | `OneSided`, step over the losses' spread | `Uniform` |
//! | [`Es`](Recipe::Es), evolution strategies | `Weights` | `Gaussian` | `OneSided` | `Uniform` |
//! | [`Eggroll`](Recipe::Eggroll) | `LowRank(1)` | `Gaussian` | `Antithetic` | `Uniform` |
//!
//! Activation noise goes with a [learned control variate](mod@feedback) unless
//! [`with_control_variate`](ForwardConfig::with_control_variate) says otherwise; the published methods have none.
//! The clean pass comes on top of the queries in every recipe: it is the baseline of one-sided queries, and what allocators look at.
//!
//! ```
//! use flops_core::{NoiseLaw, QueryBudget, Recipe, Space};
//!
//! let mezo = Recipe::Mezo.config(QueryBudget::new(2, 2)?);
//! let spsa = mezo.clone().with_noise(NoiseLaw::Rademacher);
//! let flops = Recipe::Flops.config(QueryBudget::new(20, 1)?);
//! assert_eq!((spsa.estimator.space, flops.estimator.space), (Space::Weights, Space::Activation));
//! # Ok::<(), flops_core::Error>(())
//! ```
//!
//! # Choosing
//!
//! The error of the estimate grows with the number of perturbed coordinates: train few layers, late ones first. `Activation` noise is
//! independent for every query of every datum, which is what makes allocation pay; so is `LowRank` noise, on the weights. `Weights` noise needs no
//! change to the model, and shares each direction among the data of the batch.
//!
//! # Features
//!
//! `cuda` and `wgpu` turn on Burn's backends of these names, and make noise there in a kernel of this crate's. Without them any backend of Burn's
//! works, those that CubeCL drives with the same numbers made in Burn's operations, which takes longer.
#![deny(missing_docs)]

pub mod allocator;
pub mod backprop;
pub mod batch;
pub mod budget;
pub mod diagnostics;
pub mod error;
pub mod estimator;
pub mod feedback;
pub mod learner;
mod linalg;
pub mod loader;
pub mod metric;
pub mod noise;
pub mod objective;
pub mod ops;
pub mod persist;
pub mod probe;
pub mod recipe;
#[cfg(test)]
mod testing;
pub mod variance;

pub use backprop::BackpropLearner;
pub use batch::{Batch, Rows};
pub use budget::{Allocation, QueryBudget};
pub use error::Error;
pub use estimator::{Estimator, Space};
pub use feedback::ControlVariate;
pub use learner::{ForwardConfig, ForwardLearner, Monitor, Normalisation, StepReport};
pub use loader::{EpochLoader, Plain};
pub use metric::StepOutput;
pub use noise::{NoiseLaw, Placement, Sampling};
pub use objective::{ForwardModel, cross_entropy, infer, zero_one};
pub use probe::Probe;
pub use recipe::Recipe;
pub use variance::VarianceEstimate;
