//! Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685).
//!
//! y = Wx + b + B(Ax), where A maps `embed_dim` to the rank and B maps back. W and b stay frozen; A
//! and B are trained. The adapters sit on the query and value projections of every block, as in the
//! paper. The paper's factor α/r is 1 here: α is the rank.
//!
//! A is drawn from N(0, 1/embed_dim) and B is zero, so new adapters leave the logits unchanged.
//!
//! # The first step
//! While B is zero, A has no effect on the loss. Its gradient is zero, in backpropagation as in the
//! mean of forward-only estimates. Noise on A's output alone leaves the loss unchanged, up to
//! rounding. So the first step moves B and the head, and A follows from the second step on. Queries
//! that the first step spends on A are wasted.

pub(crate) mod adapter;
#[cfg(test)]
mod tests;
mod vit;

pub use adapter::Lora;
