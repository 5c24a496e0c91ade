//! The hub: the log of a run in the program that starts its workers.
//!
//! The hub listens on this machine. Workers show a random token, which the program hands on by an
//! environment variable. The hub sees at once when a
//! worker is gone. The run ends with the program; it can be resumed from its last checkpoint.
//!
//! ```
//! use flops_distributed::{Log, Key, hub::{Hub, HubOptions}};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let hub = Hub::start(HubOptions::default())?;
//! // in this program; another one calls `HubClient::from_env` and gets `hub.environment()`
//! let worker = hub.connect("worker")?;
//! assert!(worker.put(&Key::Checkpoint(10), b"")?);
//! assert!(!worker.put(&Key::Checkpoint(10), b"")?);
//! # Ok(())
//! # }
//! ```

mod client;
mod frame;
mod server;
mod spill;

pub use client::HubClient;
pub use server::{Hub, HubOptions, HubStats};

/// The environment variable with the address of the hub.
pub const ADDRESS: &str = "FLOPS_HUB";
/// The environment variable with the token of the hub.
pub const TOKEN: &str = "FLOPS_HUB_TOKEN";
