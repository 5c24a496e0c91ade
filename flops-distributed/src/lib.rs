//! Runs of forward-only learning on many machines: N workers give the bits of one.
//!
//! Every worker runs the same training loop with the same data. Only the *jobs* of a step are shared:
//! an executor of this crate sees to it that each job runs somewhere, and that all workers are told
//! what it gave. Set it in the learner in place of [`Threads`](flops_executor::Threads).
//!
//! # What is guaranteed
//! - All workers end a step with the same weights, bit for bit, and these are the weights that one
//!   process gets with the same number of leaves.
//! - Workers of an [`Elastic`] run may come and go at any time. One that is lost, slow, late or sent
//!   twice changes nothing. A run goes on as long as one worker is left.
//! - A job that fails on one worker fails on all, at the same place of the run.
//! - Nothing hangs: every wait has a limit.
//! - Messages that are damaged or make no sense are refused and [counted](WorkerStats::refused). The
//!   workers of a run trust one another otherwise: whoever has the token of a hub, or the credentials
//!   of a server, can change the weights of the run.
//!
//! # Which executor
//! | | workers | where |
//! |---|---|---|
//! | [`Elastic`] over a [`hub`] | come and go | one machine; nothing to install |
//! | `Elastic` over NATS (feature `nats`) | come and go | many machines and a NATS server |
//! | MPI (feature `mpi`) | a gang of fixed size | clusters with a fast network |
//!
//! # How to start
//! A program starts a [hub](hub::Hub) and its workers, and the workers find the hub by the environment.
//! Each runs the ordinary loop:
//!
//! ```
//! use flops_distributed::{Elastic, ElasticOptions, hub::{Hub, HubOptions}};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let hub = Hub::start(HubOptions::default())?;
//! // in a process of its own: `HubClient::from_env("worker")?`
//! let worker = Elastic::new(hub.connect("worker")?, ElasticOptions::default());
//! // a worker that joins late resumes from the latest checkpoint, and replays the rounds since
//! assert!(worker.checkpoint()?.is_none());
//! # use flops_executor::{Executor, RunIdentity};
//! # worker.begin(&RunIdentity::new(vec![], (0, 0)))?;
//! assert_eq!(worker.stats().joins, 1);
//! # Ok(())
//! # }
//! ```
#![deny(missing_docs)]

mod cost;
mod elastic;
mod error;
pub mod hub;
mod identity;
mod log;
#[cfg(feature = "mpi")]
pub mod mpi;
#[cfg(feature = "nats")]
pub mod nats;
mod random;
mod stats;
mod wire;

pub use cost::SumMode;
pub use elastic::{Elastic, ElasticOptions};
pub use error::DistributedError;
pub use log::{Entry, Key, Log, RoundKey, checked_name};
#[cfg(feature = "mpi")]
pub use mpi::{Mpi, MpiOptions};
#[cfg(feature = "nats")]
pub use nats::{NatsAuth, NatsLog, NatsOptions};
pub use stats::{Traffic, WorkerStats};
