//! Vision Transformers for forward-only learning, and the images to train them on.
#![deny(missing_docs)]

pub mod data;
pub mod normalization;

pub use normalization::Normalization;
