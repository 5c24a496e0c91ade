//! Vision transformers for forward-only learning, and images to train them on.
//!
//! - [`ViTConfig`]: sizes in timm's vocabulary, and the presets.
//! - [`ViT`]: the model. Its layers are called through the [`Probe`](flops_core::Probe) in stages:
//!   queries start at the first trained block.
//! - [`Scope`]: which parameters are trained, from the head to all of them.
//! - [`lora`]: low-rank adapters, trained by one of the scopes.
//! - [`checkpoint`]: loads and saves a [`Pretrained`], a model with its card. It reads this crate's
//!   safetensors, HuggingFace's and timm's models, and the shipped `vit_micro_patch4_32`.
//! - [`data`]: CIFAR-10, CIFAR-100, image folders and the embedded handwritten digits.
//! - [`FineTuning`]: recommended hyper-parameters, with the [`Noise`] for a scope.
//!
//! # Example
//! Take the shipped model, give it a new head, train the path of the class token, and compute the
//! loss of each image:
//! ```
//! use burn::backend::Flex;
//! use burn::prelude::*;
//! use flops_core::{ForwardModel, Probe};
//! use flops_vit::{Scope, checkpoint};
//!
//! let device = Default::default();
//! let classes = vec!["cat".to_string(), "dog".to_string()];
//! let model = checkpoint::pretrained::<Flex>(&device)?
//!     .with_new_head(classes, 0)
//!     .with_scope(Scope::ClsTail)?
//!     .model;
//!
//! let images = Tensor::zeros([3, 3, 32, 32], &device);
//! let labels = Tensor::from_ints([0, 1, 1], &device);
//! let logits = model.forward(images, &mut Probe::clean());
//! assert_eq!(logits.dims(), [3, 2]);
//! assert_eq!(model.losses(logits, labels).dims(), [3]);
//! # Ok::<(), flops_vit::VitError>(())
//! ```
//! [`ViTConfig::init`] makes a model with random weights instead.
#![deny(missing_docs)]

mod block;
mod branches;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod error;
mod layers;
mod long_images;
pub mod lora;
pub mod model;
pub mod normalization;
mod positions;
pub mod resizing;
pub mod scope;
mod sites;
pub mod tuning;

pub use checkpoint::Pretrained;
pub use config::{Activation, Distillation, Pool, ViTConfig};
pub use error::{CheckpointError, PytorchError, VitError};
pub use model::ViT;
pub use normalization::Normalization;
pub use resizing::Resizing;
pub use scope::Scope;
pub use sites::Sites;
pub use tuning::{FineTuning, Noise};
