//! Encoders of texts and images. Every layer is called through the [`Probe`](flops_core::Probe).
//!
//! - [`Clip`]: two towers that share an embedding space (Radford et al. 2021, arXiv 2103.00020).
//! - [`Bert`]: a sentence encoder such as all-MiniLM-L6-v2 (Devlin et al. 2019, arXiv 1810.04805;
//!   Reimers & Gurevych 2019, arXiv 1908.10084). A [`SentenceHead`] pools its tokens.
//!
//! The probe decides what a call does. With [`Probe::clean`](flops_core::Probe::clean) a tower is
//! plain inference, and on an autodiff backend the forward pass of backpropagation. In a forward
//! query its trained layers are perturbed.
//!
//! A tower defines no [stages](flops_core::Probe::stage), because stages follow one another and the
//! two towers of a model run side by side. A model that trains part of a tower makes stages of its
//! parts (`embed_text`, `layers`, `project_text`). A model that trains nothing in a tower calls it
//! as a whole.
//!
//! [`with_sites`](Bert::with_sites) chooses where noise falls: on every layer, or on what each
//! residual branch adds to the stream.
//!
//! [`with_lora`](Bert::with_lora) puts low-rank adapters on the queries and values of a [`Bert`].
//!
//! Texts may also be token embeddings ([`Bert::forward_embedded`],
//! [`TextTower::forward_embedded`]), so that learned prompts can be among them.

mod bert;
mod clip;
mod clip_config;
mod layers;
mod lora;
mod sentence;

pub use bert::{Bert, BertConfig};
pub use clip::{Clip, TextTower, VisionTower};
pub use clip_config::{ClipConfig, TextConfig, VisionConfig};
pub use flops_vit::Sites;
pub use layers::{Activation, EncoderLayer, NormOrder, attention_bias, normalise};
pub use sentence::{Dense, DenseActivation, HeadLayer, Pooling, SentenceHead};

#[cfg(test)]
mod tests;
