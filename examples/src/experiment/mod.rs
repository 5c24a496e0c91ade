//! What the experiments share: their flags, means over seeds, a testbed for training a ViT by any
//! recipe, and a small network on synthetic data.

pub mod mlp;

mod args;
mod gradient;
mod oracle;
mod run;
mod spread;
mod testbed;

pub use args::ExperimentArgs;
pub use flops_report::{Progress, print_table};
pub use gradient::{estimate, observe, squared_distance};
pub use oracle::OracleAllocator;
pub use run::{Optim, Run, Schedule};
pub use spread::Spread;
pub use testbed::{Batches, Learner, Testbed, TestbedArgs};
