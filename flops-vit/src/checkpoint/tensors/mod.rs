//! Files of tensors, and modules filled from them or written to them.
//!
//! The files are safetensors or PyTorch's, whole or in shards. To import a model of another
//! library: read its tensors ([`of_folder`], [`of_safetensors`]), rename them by a table
//! ([`to_ours`], [`called`]), and [`fill`] a module. [`to_pytorch`] writes a module back.

mod files;
mod module;
mod values;

pub use super::file::{json, read};
pub use super::table::{Table, called, to_ours, to_theirs};
pub use burn_store::TensorSnapshot;
pub(super) use files::{WEIGHTS, of_file, shards, unwrapped};
pub use files::{of_folder, of_safetensors};
pub(super) use module::{ToFull, apply, refuse};
pub use module::{fill, to_pytorch};
pub(super) use values::{check_finite, of_values, split_rows};
pub use values::{reshaped, values};
