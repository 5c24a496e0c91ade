//! What the examples share: the backend they run on, the training loop around a learner, the artifacts of a run, and the laboratory
//! of the experiments.
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

pub mod artifacts;
pub mod backend;
pub mod cli;
pub mod curves;
pub mod dry_run;
pub mod experiment;
pub mod fit;
pub mod groups;
pub mod history;
pub mod inputs;
pub mod lab;
pub mod method;
pub mod mlp;
pub mod pairs;
pub mod plot;
pub mod recorder;
pub mod renderer;
pub mod server;
pub mod sheet;
pub mod shots;
pub mod supervised;

/// The version of Burn that the workspace is pinned to.
pub const BURN_VERSION: &str = "0.21.0";

#[cfg(test)]
mod tests {
    #[test]
    fn the_burn_version_is_the_workspace_s() {
        let pinned = format!("burn = {{ version = \"={}\"", super::BURN_VERSION);
        assert!(include_str!("../../Cargo.toml").contains(&pinned), "the workspace pins another version of Burn");
    }
}
