//! Text and images without a backward pass: frozen encoders brought into one space, and prompts for black boxes.
//!
//! In the words of the paper: prior black box ϕ₁ → target φ(·;θ) → later black box ϕ₂ → loss; only θ is trained, only by forward queries.
//!
//! - [`towers`]: image and text towers with one embedding space ([`Clip`]) and a sentence encoder ([`Bert`]), every layer called through the
//!   [`Probe`](flops_core::Probe); [`tokenizer`]: texts to their tokens; [`checkpoint`]: the import of published models; [`encoders`]: any of
//!   them, or a ViT, as something that gives features.
//! - [`alignment`]: projections behind two frozen encoders, trained on the [`contrastive`] loss of image-text pairs; [`retrieval`]: recall, and
//!   zero-shot classification by captions.
//! - [`blackbox`]: a model that can only be asked, in process or over HTTP, with a cap on its queries and a journal of its answers;
//!   [`prompt`]: what it is shown and told, learned from its scores; [`classifier`]: what such a box can have inside.
//! - [`data`]: made-up scenes with captions, so that all of it runs offline.
#![deny(missing_docs)]

pub mod alignment;
pub mod blackbox;
pub mod checkpoint;
pub mod classifier;
pub mod contrastive;
pub mod data;
pub mod encoders;
pub mod error;
pub mod prompt;
pub mod retrieval;
pub mod tokenizer;
pub mod towers;

pub use alignment::{Alignment, AlignmentConfig, Projection};
pub use blackbox::{BlackBox, BlackBoxError, HttpBlackBox, HttpConfig, Metered};
pub use classifier::Classifier;
pub use contrastive::{PairEmbeddings, Pairs};
pub use encoders::{ImageEncoder, TextEncoder};
pub use error::MultimodalError;
pub use prompt::{Asked, TextPrompt, VisualPrompt};
pub use retrieval::{Recall, class_embeddings, zero_shot_accuracy};
pub use tokenizer::{TextTokenizer, Tokens};
pub use towers::{Bert, BertConfig, Clip, ClipConfig};
