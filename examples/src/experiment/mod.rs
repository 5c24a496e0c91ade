//! What the experiments share: their flags, means over seeds, a testbed for training a network by
//! any recipe, small networks on images and on synthetic data.

pub mod evaluation;
pub mod mlp;
pub mod nets;

mod args;
mod classifier;
mod gradient;
mod images;
mod oracle;
mod run;
mod spread;
mod testbed;

pub use args::ExperimentArgs;
pub use classifier::Classifier;
pub use flops_report::{Progress, markdown_table, print_table};
pub use gradient::{cosine, estimate, observe, squared_distance};
pub use images::{Batches, ImageArgs, Images};
pub use oracle::OracleAllocator;
pub use run::{GroupedAdamW, Optim, Run, Schedule, adamw};
pub use spread::Spread;
pub use testbed::{Learner, Testbed, TestbedArgs};
