//! Flags of every experiment, and the folder of its results.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use clap::Args;
use serde_json::{Value, json};

use crate::BURN_VERSION;
use crate::run::artifacts::{Artifacts, merge};
use crate::{backend, cli};

/// Flags of every experiment.
#[derive(Args, Clone, Debug)]
pub struct ExperimentArgs {
    /// The folder of the results [default: artifacts/NAME].
    #[arg(long)]
    pub artifact_dir: Option<PathBuf>,
    /// The first seed; the others follow it.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// The number of seeds.
    #[arg(long, default_value_t = 5)]
    pub seeds: u64,
    /// Run as long as for the figures of the documentation, instead of minutes.
    #[arg(long)]
    pub full: bool,
    /// Threads that evaluate queries [default: one per core, at most 8]. The results do not depend
    /// on it.
    #[arg(long)]
    pub threads: Option<usize>,
}

impl ExperimentArgs {
    /// Returns the seeds.
    ///
    /// # Errors
    /// If there are none, more than 1,000, or their numbers overflow.
    pub fn seeds(&self) -> Result<Vec<u64>> {
        ensure!((1..=1000).contains(&self.seeds), "--seeds {}: use 1 to 1000", self.seeds);
        let end = self.seed.checked_add(self.seeds);
        let Some(end) = end else { bail!("--seed {}: use a smaller number", self.seed) };
        Ok((self.seed..end).collect())
    }

    /// Returns the number of threads.
    ///
    /// # Errors
    /// If it is 0.
    pub fn threads(&self) -> Result<usize> {
        ensure!(self.threads != Some(0), "--threads 0: use at least 1");
        Ok(cli::threads(self.threads))
    }

    /// Opens the folder of the results.
    ///
    /// # Errors
    /// If it cannot be written, or another run uses it.
    pub fn artifacts(&self, name: &str) -> Result<Artifacts> {
        Artifacts::open(&self.folder(name))
    }

    /// Opens the folder of the results, which processes of one program may share.
    ///
    /// # Errors
    /// If it cannot be written, or another run uses it alone.
    pub fn shared_artifacts(&self, name: &str) -> Result<Artifacts> {
        Artifacts::open_shared(&self.folder(name))
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.artifact_dir.clone().unwrap_or_else(|| PathBuf::from("artifacts").join(name))
    }

    /// Writes `summary.json` with `figures` and the settings of every experiment. Then prints that
    /// the folder holds it beside `files`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn finish(&self, artifacts: &Artifacts, started: Instant, figures: Value, files: &str) -> Result<()> {
        let mut summary = json!({
            "seed": self.seed,
            "seeds": self.seeds,
            "full": self.full,
            "backend": backend::NAME,
            "seconds": started.elapsed().as_secs_f64(),
            "versions": {"flops": env!("CARGO_PKG_VERSION"), "burn": BURN_VERSION},
        });
        merge(&mut summary, figures);
        artifacts.write_json("summary.json", &summary)?;
        println!("\n{} holds {files} and summary.json", artifacts.dir().display());
        Ok(())
    }
}
