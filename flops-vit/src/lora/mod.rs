//! Low-rank [adapters](Lora) on the query and value projections of every block, as in the paper
//! (LoRA; Hu et al. 2021, arXiv 2106.09685).
//!
//! New adapters leave the logits unchanged. What they compute, and why the first step spends queries
//! on A in vain, is said in [`flops_core::lora`].

#[cfg(test)]
mod tests;
mod vit;

pub use flops_core::lora::Lora;
