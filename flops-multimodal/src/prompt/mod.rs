//! Prompts of a black box, learned from its scores alone: prior black box ϕ₁ → target φ(·;θ) →
//! later black box ϕ₂ → loss.
//!
//! A [`BlackBox`](crate::blackbox::BlackBox) takes images, and some take a soft context too; it
//! returns scores and hides everything else. Only its input is trained: the context
//! ([`TextPrompt`], after CoOp, Zhou et al. 2022, arXiv 2109.01134), or a small network that
//! repaints the image ([`VisualPrompt`], after BlackVIP, Oh et al. 2023, arXiv 2303.14773). Each
//! row of a forward pass is at most one query, the clean pass included.
//!
//! # Example
//! ```
//! use std::sync::Arc;
//!
//! use burn::backend::{Autodiff, Flex};
//! use burn::prelude::*;
//! use burn::train::TrainStep;
//! use flops_core::allocator::Neyman;
//! use flops_core::{Batch, ForwardConfig, ForwardLearner, QueryBudget};
//! use flops_multimodal::blackbox::{FromFn, Info, Metered, Query};
//! use flops_multimodal::{BlackBoxClient, TextPrompt};
//!
//! // a closure as the black box: its score of "dog" is the sum of the context
//! let info = Info::new(["cat", "dog"], [3, 2, 2])?.with_context(1, 2)?;
//! let scores = |queries: &[Query]| -> Result<Vec<Vec<f32>>, String> {
//!     let score = |q: &Query| vec![0.0, q.context.iter().flat_map(|c| c.iter()).sum()];
//!     Ok(queries.iter().map(score).collect())
//! };
//! let client = BlackBoxClient::new(Arc::new(Metered::new(FromFn::new(info, scores)?, 100)));
//!
//! let device = Default::default();
//! let prompt = TextPrompt::<Autodiff<Flex>>::new(client, &device)?;
//! let config = ForwardConfig::new(QueryBudget::new(8, 1)?);
//! let learner = ForwardLearner::new(prompt, Neyman, config)?;
//! let images = Tensor::<Flex, 4>::ones([2, 3, 2, 2], &device);
//! let dogs = Tensor::<Flex, 1, Int>::from_ints([1, 1], &device);
//! let output = learner.step(Batch { ids: vec![0, 1], input: images, target: dogs });
//! // both coordinates of the context must rise, so both gradients are negative
//! let gradient = output.grads.get::<Flex, 3>(learner.model.context.id).ok_or("the step failed")?;
//! assert!(gradient.into_data().iter::<f32>().all(|g| g < 0.0));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod text;
mod visual;

pub use text::TextPrompt;
pub use visual::VisualPrompt;

#[cfg(test)]
mod tests;
