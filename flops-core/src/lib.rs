//! Training with forward passes only: estimators, query allocators and the burn-train seam.
#![deny(missing_docs)]

pub mod batch;
pub mod loader;

pub use batch::{Batch, Rows};
pub use loader::EpochLoader;
