//! Vision transformers for forward-only learning, and the images to train them on.
#![deny(missing_docs)]

mod block;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod error;
pub mod model;
pub mod normalization;

pub use config::ViTConfig;
pub use error::VitError;
pub use model::ViT;
pub use normalization::Normalization;
