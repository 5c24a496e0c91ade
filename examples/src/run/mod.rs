//! A training run: its artifact folder, its loop, what it measures and how it shows that.

pub mod artifacts;
pub mod curves;
pub mod dry_run;
pub mod fit;
pub mod format;
pub mod history;
pub mod lock;
pub mod optimizer;
pub mod plan;
pub mod prefixes;
pub mod renderer;
pub mod workers;
