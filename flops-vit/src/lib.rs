//! Vision transformers that train with forward passes only.
#![deny(missing_docs)]

mod block;
pub mod error;
pub mod config;
pub mod model;

pub use config::ViTConfig;
pub use model::ViT;
