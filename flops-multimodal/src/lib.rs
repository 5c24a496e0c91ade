//! Text and images without a backward pass: alignment of frozen encoders, and prompts for black boxes.
#![deny(missing_docs)]

pub mod alignment;
pub mod contrastive;
pub mod data;
pub mod error;
pub mod retrieval;

pub use alignment::{Alignment, AlignmentConfig, Projection};
pub use contrastive::{PairEmbeddings, Pairs};
pub use error::MultimodalError;
pub use retrieval::{Recall, class_embeddings, zero_shot_accuracy};
