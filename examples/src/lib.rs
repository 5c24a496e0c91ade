//! What the examples share: the backend they run on, the training loop around a learner, and the artifacts of a run.

pub mod artifacts;
pub mod backend;
pub mod cli;
pub mod curves;
pub mod fit;
pub mod history;
pub mod recorder;
pub mod renderer;
