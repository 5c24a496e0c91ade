//! Checkpoints as safetensors, with the configuration in the file's metadata.
//!
//! [`open`] loads weights of any origin: this crate's own files, folders and files of HuggingFace's
//! and timm's, and models of the HuggingFace hub. A file that does not fit is an error, never a
//! model that is loaded in part. [`Pretrained::save_huggingface`] writes a folder that
//! `transformers` loads.
//!
//! # Example
//! ```
//! use burn::backend::Flex;
//! use flops_vit::checkpoint::{self, Card, Pretrained};
//! use flops_vit::{Normalization, Resizing, ViTConfig};
//!
//! let device = Default::default();
//! let config = ViTConfig::vit_micro_patch4_32().with_num_classes(2);
//! let model = config.init::<Flex>(&device)?;
//! let card = Card {
//!     config,
//!     normalization: Normalization::HALF,
//!     resizing: Resizing::default(),
//!     classes: vec!["cat".into(), "dog".into()],
//!     description: "not trained yet".into(),
//! };
//! let folder = tempfile::tempdir().unwrap();
//! let path = folder.path().join("model.safetensors");
//! Pretrained { model, card }.save_half(&path)?;
//! let loaded = checkpoint::load::<Flex>(&path, &device)?;
//! assert_eq!(loaded.card.classes, ["cat", "dog"]);
//! # Ok::<(), flops_vit::VitError>(())
//! ```

mod adapters;
mod any;
mod card;
mod channels;
mod file;
pub mod hf;
mod import;
mod names;
mod native;
mod preprocessor;
mod pretrained;
mod pytorch;
mod source;
mod table;
pub mod tensors;
#[cfg(test)]
mod tests;
mod timm;

pub use adapters::load_adapters;
pub use any::open;
pub use card::Card;
pub use import::Opened;
pub use native::{load, pretrained, pretrained_bytes};
pub use pretrained::Pretrained;
pub use source::Source;
