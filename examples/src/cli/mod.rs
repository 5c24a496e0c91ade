//! The flags that programs share.

pub mod forward_args;
pub mod inputs;
pub mod method;
mod threads;
pub mod worker_args;

pub use flops_report::program::run;
pub use threads::threads;
