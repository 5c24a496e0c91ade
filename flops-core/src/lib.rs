//! Training with forward passes only, for [Burn](https://burn.dev) models.
//!
//! A gradient is estimated from the losses of perturbed forward passes, called queries. Each step
//! has a budget of queries. An [allocator](mod@allocator) gives more of them to the examples whose
//! gradient is harder to estimate ([FLOPS: Forward Learning with OPtimal
//! Sampling](https://arxiv.org/abs/2410.05966), ICLR 2025). No autodiff graph is recorded across
//! layers: the loss need not be differentiable, and memory is that of forward passes over a bounded
//! number of rows.
//!
//! Where backpropagation is possible and fits into memory, it makes more progress per second. This
//! crate is for the other cases.
//!
//! # What to implement, what to call
//!
//! 1. [`ForwardModel`] for your module: its forward pass, and a loss for each example.
//! 2. [`ForwardLearner`] around it, given to burn-train's `Learner` in place of the module.
//!    Optimizers, schedulers, metrics and checkpointers are Burn's own. Parameters are trained
//!    unless frozen with `no_grad`. A loop of your own calls its `estimate` and `update`.
//!
//! Layers with a method of [`Probe`]: `linear`, `tied_linear`, `layer_norm`, `batch_norm`, `conv2d`
//! (one group), `embedding`, `param`, `dropout`. Any other Burn module joins by [`Probe::module`] and
//! the macro [`site!`]. A layer with a derivative of its own joins by [`probe::Site`].
//!
//! - **Padding.** Call layers on padded tokens inside [`Probe::masked`]: estimate and variance are
//!   then those of the batch without padding.
//! - **Dropout.** [`Probe::dropout`] draws one mask for each example and step, which all passes of
//!   the step share. A layer's own `forward` would not drop anything: it runs as in inference.
//! - **Batch normalisation.** [`Probe::batch_norm`] goes by the running statistics and leaves them
//!   as they are.
//! - **Quantized weights.** [`quantize::quantize_frozen`] keeps frozen matrices as integers of 8 or 4
//!   bits. [`quantize`] trains weights on such a grid too, or their scales alone.
//!
//! [`prelude`] has the names that this takes. `examples/examples/custom_model.rs` in the repository
//! does both from end to end; `docs/method.md` has the mathematics.
//!
//! # Recipes
//!
//! Any estimator is a perturbation [space](Space) × a [noise law](NoiseLaw), [one-sided or
//! antithetic](Sampling), × an [allocator](mod@allocator):
//!
//! | method, as [`Recipe`] | space | noise | sampling | allocator |
//! |---|---|---|---|---|
//! | [`Default`](Recipe::Default) | `Activation` | `Rademacher` | `OneSided` | [`Neyman`](allocator::Neyman) |
//! | [`Flops`](Recipe::Flops), the paper | `Activation` | `Gaussian` | `Antithetic` | [learned](allocator::GaussianAllocatorConfig::paper) |
//! | [`Mezo`](Recipe::Mezo); SPSA with `Rademacher` | `Weights` | `Gaussian` | `Antithetic` | `Uniform` |
//! | [`Fzoo`](Recipe::Fzoo) | `Weights`, step over the losses' spread | `Rademacher` | `OneSided` | `Uniform` |
//! | [`Es`](Recipe::Es), evolution strategies | `Weights` | `Gaussian` | `OneSided` | `Uniform` |
//! | [`Eggroll`](Recipe::Eggroll) | `LowRank` of rank 1 | `Gaussian` | `Antithetic` | `Uniform` |
//! | [`Lozo`](Recipe::Lozo) | `Weights`, in a random [`Subspace`] | `Gaussian` | `Antithetic` | `Uniform` |
//! | [`ZoMuon`](Recipe::ZoMuon), with Muon | `Weights`, in an orthonormal [`Subspace`] | `Gaussian` | `OneSided` | `Uniform` |
//! | [`PseuZo`](Recipe::PseuZo), a [biased](GradientEstimate::Predicted) estimate | `Activation` | `Gaussian` | `OneSided` | `Uniform` |
//!
//! Activation noise goes with a [learned control variate](mod@control_variate) unless its
//! [space](Space::Activation) says otherwise; the published methods have none. The clean pass comes
//! on top of the queries in every recipe: it is the baseline of one-sided queries, and what
//! allocators look at.
//!
//! ```
//! use flops_core::prelude::*;
//!
//! let mezo = Recipe::Mezo.config(QueryBudget::new(2, 2)?);
//! let spsa = mezo.clone().with_noise(NoiseLaw::Rademacher);
//! let flops = Recipe::Flops.config(QueryBudget::new(20, 1)?);
//! assert_eq!(spsa.estimator.space, Space::weights());
//! assert_eq!(flops.estimator.space.placement(), Some(Placement::Joint));
//! # Ok::<(), flops_core::Error>(())
//! ```
//!
//! # Choosing
//!
//! The error of the estimate grows with the number of perturbed coordinates: train few layers, late
//! ones first. `Activation` noise is independent for every query of every example, which is what
//! makes allocation pay; so is `LowRank` noise, on the weights. `Weights` noise needs no change to
//! the model, and its directions are shared by the examples of a pass.
//!
//! # Features
//!
//! - `train`, on by default: the seam to burn-train with its metrics, loaders, checkpoints and
//!   `BackpropLearner`. Without it the crate compiles for `wasm32-unknown-unknown`: a page trains in a
//!   browser by [`ForwardLearner::estimate`] and [`ForwardLearner::update`], on one thread
//!   (`examples/web` in the repository).
//! - `cuda` and `wgpu` turn on Burn's backends of these names, and make noise there in a kernel of
//!   this crate. Without them any backend works: one that CubeCL drives makes the same values in
//!   Burn's operations, which takes longer.
#![deny(missing_docs)]

pub mod allocator;
pub mod batch;
pub mod control_variate;
mod devices;
pub mod error;
pub mod estimator;
pub mod inference;
pub mod ledger;
mod lift;
mod linalg;
pub mod lora;
pub mod losses;
pub mod model;
mod names;
pub mod noise;
pub mod ops;
mod parallel;
pub mod parameters;
pub mod persist;
pub mod prelude;
pub mod probe;
pub mod quantize;
pub mod random;
pub mod recipe;
pub mod site_tracker;
#[cfg(test)]
mod testing;
pub mod train;
pub mod variance;
mod wire;

pub use allocator::{Allocation, QueryBudget};
pub use batch::{Batch, Rows};
pub use control_variate::{ControlVariate, GradientEstimate};
pub use devices::Devices;
pub use error::Error;
pub use estimator::{Estimator, Normalisation, Space, Subspace};
pub use flops_derive::{Lift, Rows};
pub use flops_executor as executor;
pub use flops_executor::{Executor, ExecutorError};
pub use inference::infer;
pub use lift::Lift;
pub use losses::{cross_entropy, zero_one};
pub use model::ForwardModel;
pub use noise::{NoiseLaw, Placement, Sampling};
pub use probe::Probe;
pub use recipe::Recipe;
#[cfg(feature = "train")]
pub use train::{BackpropLearner, EpochLoader, InnerBatcher};
pub use train::{EstimatedStep, ForwardConfig, ForwardLearner, Monitor, StepOutput, StepReport, TrainBatch, Trainable};
pub use variance::VarianceSource;

// the code of the derives names this crate, inside of it too
extern crate self as flops_core;

/// What the code of the derives names.
#[doc(hidden)]
pub mod __private {
    pub use burn::tensor::TensorData;
    pub use burn::tensor::backend::{AutodiffBackend, DeviceId};
}
