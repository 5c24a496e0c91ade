//! Models of other libraries, trained from forward passes alone.
//!
//! - [`adapter`]: a layer in front of a [`classifier`] that can only be called, such as a forest of
//!   scikit-learn. No gradient exists.
//! - [`imported`]: a network that burn-onnx has made Rust code of.

pub mod adapter;
pub mod classifier;
pub mod digits;
pub mod imported;
pub mod report;
pub mod table;
pub mod train;
