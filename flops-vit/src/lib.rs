//! Vision transformers for forward-only learning, and the images to train them on.
//!
//! - [`ViTConfig`]: sizes in timm's words, and the presets; [`ViT`]: the model, every layer called through the
//!   [`Probe`](flops_core::Probe), in stages, so that queries start from the first block that is trained.
//! - [`Scope`]: which parameters are trained, from the head alone to everything; [`lora`]: low-rank adapters, one of the scopes.
//! - [`checkpoint`]: safetensors that carry their configuration, the shipped `vit_micro_patch4_32`, and the import of HuggingFace's
//!   `ViTForImageClassification`.
//! - [`data`]: CIFAR-10 and CIFAR-100, image folders and the embedded handwritten digits, as loaders of batches.
//!
//! # Example
//! Build a model, say what is trained, ask for the loss of each image:
//! ```
//! use burn::backend::Flex;
//! use burn::prelude::*;
//! use flops_core::{ForwardModel, Probe};
//! use flops_vit::{Scope, ViTConfig};
//!
//! let device = Default::default();
//! let model = ViTConfig::vit_micro_patch4_32().with_depth(2).init::<Flex>(&device)?.with_scope(Scope::ClsTail)?;
//!
//! let images = Tensor::zeros([2, 3, 32, 32], &device);
//! let labels = Tensor::from_ints([3, 7], &device);
//! let logits = model.forward(images, &mut Probe::clean());
//! assert_eq!(logits.dims(), [2, 10]);
//! assert_eq!(model.losses(logits, labels).dims(), [2]);
//! # Ok::<(), flops_vit::VitError>(())
//! ```
//! From a checkpoint with a new head instead: `checkpoint::pretrained(&device)?.0.with_new_head(num_classes, seed)`.
#![deny(missing_docs)]

mod block;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod error;
pub mod lora;
pub mod model;
pub mod normalization;
mod positions;
pub mod resizing;
pub mod scope;
pub mod tuning;

pub use config::{Distillation, Pool, ViTConfig};
pub use error::{CheckpointError, VitError};
pub use model::ViT;
pub use normalization::Normalization;
pub use resizing::Resizing;
pub use scope::Scope;
pub use tuning::FineTuning;
