//! Training with forward passes only: estimators, query allocators and the burn-train seam.
#![deny(missing_docs)]

pub mod batch;

pub use batch::{Batch, Rows};
