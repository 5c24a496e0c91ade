//! Text and images without a backward pass: alignment of frozen encoders, and prompts for black
//! boxes.
//!
//! In the terms of the paper: prior black box ϕ₁ → target φ(·;θ) → later black box ϕ₂ → loss. Only
//! θ is trained, and only by forward queries.
//!
//! Encoders:
//! - [`towers`]: image and text towers that share an embedding space ([`Clip`]), and a sentence
//!   encoder ([`Bert`]). Every layer is called through the [`Probe`](flops_core::Probe).
//! - [`tokenizer`]: texts to tokens.
//! - [`checkpoint`]: import of published models.
//! - [`encoders`]: one interface to features, over any of these towers or a ViT.
//!
//! Alignment:
//! - [`alignment`]: projections behind two frozen encoders, trained on the [`contrastive`] loss of
//!   image-text pairs.
//! - [`retrieval`]: recall, and zero-shot classification by captions.
//!
//! Texts:
//! - [`text_classifier`]: a sentence encoder with a head, fine-tuned as a whole or by adapters.
//!
//! Black boxes:
//! - [`blackbox`]: a model that only answers queries, in this process or over HTTP, with a cap on
//!   its queries and a journal of its answers.
//! - [`prompt`]: the input of a black box, learned from its scores.
//! - [`classifier`]: a zero-shot classifier, for use as a black box.
//!
//! [`data`] holds synthetic scenes with captions, so that all of this runs offline.
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
pub mod text_classifier;
pub mod tokenizer;
pub mod towers;

pub use alignment::{Alignment, AlignmentConfig, Projection};
pub use blackbox::{BlackBox, BlackBoxClient, BlackBoxError, HttpBlackBox, HttpConfig, Metered};
pub use classifier::Classifier;
pub use contrastive::{PairEmbeddings, Pairs};
pub use encoders::{ImageEncoder, TextEncoder};
pub use error::MultimodalError;
pub use prompt::{TextPrompt, VisualPrompt};
pub use retrieval::{Recall, class_embeddings, zero_shot_accuracy};
pub use text_classifier::{TextBatch, TextClassifier, TextItem};
pub use tokenizer::{TextTokenizer, Tokens};
pub use towers::{Bert, BertConfig, Clip, ClipConfig};
