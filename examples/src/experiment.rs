//! What the experiments share: their flags, means over seeds, progress and tables.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};

use crate::BURN_VERSION;
use crate::artifacts::{Artifacts, merge};
use crate::{backend, cli};

/// Flags of every experiment.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// Where the results go [default: artifacts/NAME].
    #[arg(long)]
    pub artifact_dir: Option<PathBuf>,
    /// The first seed; the others follow it.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Seeds.
    #[arg(long, default_value_t = 5)]
    pub seeds: u64,
    /// Take as long as the figures of the documentation took, instead of minutes.
    #[arg(long)]
    pub full: bool,
    /// Threads that evaluate queries [default: one per core, at most 8]. The results do not depend on it.
    #[arg(long)]
    pub threads: Option<usize>,
}

impl Common {
    /// The seeds, once they are known to be some.
    ///
    /// # Errors
    /// Where there are none, or more than can be counted.
    pub fn seeds(&self) -> Result<Vec<u64>> {
        ensure!((1..=1000).contains(&self.seeds), "--seeds {}: use 1 to 1000", self.seeds);
        let end = self.seed.checked_add(self.seeds);
        let Some(end) = end else { anyhow::bail!("--seed {}: use a smaller number", self.seed) };
        Ok((self.seed..end).collect())
    }

    /// Threads to use.
    ///
    /// # Errors
    /// Where it is 0.
    pub fn threads(&self) -> Result<usize> {
        ensure!(self.threads != Some(0), "--threads 0: use at least 1");
        Ok(cli::threads(self.threads))
    }

    /// The folder of the results.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn artifacts(&self, name: &str) -> Result<Artifacts> {
        let default = || PathBuf::from("artifacts").join(name);
        Artifacts::open(&self.artifact_dir.clone().unwrap_or_else(default))
    }

    /// Writes `summary.json`, `figures` and what every experiment says of its run, and tells what the folder holds beside it.
    ///
    /// # Errors
    /// Where it cannot be written.
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

/// Mean and standard deviation over seeds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The mean; NaN of nothing.
    pub mean: f64,
    /// The standard deviation (n − 1); 0 of fewer than two values.
    pub deviation: f64,
}

impl Spread {
    /// Of these values.
    pub fn of(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        Self { mean, deviation: if values.len() < 2 { 0.0 } else { (squares / (n - 1.0)).sqrt() } }
    }

    /// `mean ± deviation` with so many decimals.
    pub fn text(&self, decimals: usize) -> String {
        format!("{:.decimals$} ± {:.decimals$}", self.mean, self.deviation)
    }
}

/// Lines that say how far a long experiment has come, on a terminal and elsewhere alike, at most one in 10 seconds.
pub struct Progress {
    started: Instant,
    spoke: Instant,
}

impl Default for Progress {
    fn default() -> Self {
        Self { started: Instant::now(), spoke: Instant::now() }
    }
}

impl Progress {
    /// When it began.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Says `what` of `all` is done, if nothing was said lately.
    pub fn at(&mut self, done: usize, all: usize, what: impl FnOnce() -> String) {
        if self.spoke.elapsed() >= Duration::from_secs(10) {
            self.spoke = Instant::now();
            let line = format!("{done} of {all}: {}, {:.0} s", what(), self.started.elapsed().as_secs_f64());
            // results go to standard output: progress does not, where somebody may read it as a file
            if std::io::stdout().is_terminal() { println!("{line}") } else { eprintln!("{line}") }
        }
    }
}

/// Prints rows under a header, columns aligned.
pub fn print_table(header: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([header[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let cell = |(i, cell): (usize, &str)| {
            let pad = " ".repeat(widths[i].saturating_sub(cell.chars().count()));
            if i == 0 { format!("{cell}{pad}") } else { format!("{pad}{cell}") }
        };
        let text: Vec<String> = cells.into_iter().enumerate().map(cell).collect();
        println!("  {}", text.join("   ").trim_end());
    };
    line(header.to_vec());
    rows.iter().for_each(|row| line(row.iter().map(String::as_str).collect()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_mean_and_deviation() {
        let s = Spread::of(&[1.0, 2.0, 3.0]);
        assert_eq!((s.mean, s.deviation), (2.0, 1.0));
        assert_eq!(Spread::of(&[4.0]).deviation, 0.0);
        assert_eq!(s.text(1), "2.0 ± 1.0");
    }
}
