//! Labelled images, and batches of them.
//!
//! ```
//! use burn::backend::Flex;
//! use burn::data::dataloader::DataLoader;
//! use flops_core::EpochLoader;
//! use flops_vit::Normalization;
//! use flops_vit::data::{Augment, DatasetSpec, ImageBatch, ImageBatcher, LoadOptions, Padding};
//! use std::sync::Arc;
//!
//! let spec: DatasetSpec = "digits".parse()?;
//! let split = spec.load(&LoadOptions::new(32))?;
//! let batcher = ImageBatcher::new(32, Normalization::CIFAR10)?;
//! let loader: EpochLoader<Flex, _, ImageBatch<Flex>> =
//!     EpochLoader::new(Arc::new(split.train), batcher, 64, Default::default())?
//!         .shuffled(0)
//!         .with_augmentation(Augment { flip: false, shift: 2, padding: Padding::Edge, seed: 0 });
//! let batch = loader.iter().next().expect("the data set is not empty");
//! assert_eq!(batch.input.dims(), [64, 3, 32, 32]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A loader on an autodiff backend whose batches stay on the inner one needs its batcher wrapped in
//! [`InnerBatcher`](flops_core::train::InnerBatcher).

mod batcher;
pub mod cifar;
pub mod classes;
mod dataset;
mod decode;
pub mod digits;
mod error;
pub mod folder;
mod layout;
mod options;
mod spec;
mod walk;

pub use batcher::{Augment, ImageBatch, ImageBatcher, Padding};
pub use dataset::{DataSplit, ImageDataset, ImageItem, Skipped};
pub use decode::ImageFault;
pub use error::DataError;
pub use options::LoadOptions;
pub use spec::DatasetSpec;
