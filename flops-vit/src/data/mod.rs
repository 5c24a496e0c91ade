//! Labelled images: where they come from and how they become batches.
//!
//! ```
//! use flops_vit::data::DatasetSpec;
//!
//! let spec: DatasetSpec = "digits".parse()?;
//! let split = spec.load(None, false, 32)?;
//! assert_eq!(split.train.items.len() + split.test.items.len(), 1797);
//! # Ok::<(), flops_vit::data::DataError>(())
//! ```

mod batcher;
pub mod cifar;
mod dataset;
pub mod digits;
mod error;
pub mod folder;
mod spec;

pub use batcher::{Augment, ImageBatch, ImageBatcher};
pub use dataset::{DataSplit, ImageDataset, ImageItem};
pub use error::DataError;
pub use spec::DatasetSpec;
