//! What the benches share: the models, the steps that are measured, and plain inference to compare
//! them with.

mod case;
mod folder;
mod models;
mod process;
mod statistics;
#[cfg(all(test, not(feature = "bf16")))]
mod tests;

pub use case::Case;
pub use folder::Folder;
pub use models::{images, inference, micro, model, multiply_adds};
pub use process::{TASK, in_a_process, peak_memory};
pub use statistics::{median, spread};

/// Threads that run forward passes, for queries and for inference alike.
pub const THREADS: usize = 2;
/// Rows of a pass of plain inference where it is fastest on a CPU. It is about the size of a query
/// pass of `vit_micro_patch4_32`, which the CPU's cache limits.
pub const INFERENCE_ROWS: usize = 32;
