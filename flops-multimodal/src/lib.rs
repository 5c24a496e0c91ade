//! Text and image models for forward-only learning. **Empty for now.**
//!
//! What it will hold, in the words of [`flops_core`] and [`flops_vit`]:
//!
//! - image and text towers with one embedding space (CLIP), a tokenizer, and the import of published checkpoints;
//! - prompts learned through a tower that is only ever called, never looked into: a prompt is a bare parameter, for which
//!   [`Probe::param`](flops_core::Probe::param) already makes a site;
//! - alignment of two frozen towers by a small adapter, and zero-shot classification.
//!
//! Until then `flops-core` is the crate to build such a model on: anything that implements
//! [`ForwardModel`](flops_core::ForwardModel) can be trained.
#![deny(missing_docs)]
