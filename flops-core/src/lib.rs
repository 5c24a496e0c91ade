//! Training with forward passes only: estimators, query allocators and the burn-train seam.
#![deny(missing_docs)]

pub mod allocator;
pub mod batch;
pub mod budget;
pub mod error;
pub mod persist;
pub mod variance;

pub use batch::{Batch, Rows};
pub use error::Error;
