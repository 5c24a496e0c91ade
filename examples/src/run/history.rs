//! What a run has measured, by step and by epoch, kept as `metrics.csv`.

use std::path::Path;

use anyhow::{Context, Result};
use flops_core::control_variate::SiteReport;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::artifacts::Artifacts;

/// The images that a row is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// One training step, on its batch, before the update.
    Train,
    /// The whole test set, after an epoch.
    Test,
}

/// A row of `metrics.csv`. A cell that does not apply is empty.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// `train`: a step; `test`: the test set after an epoch.
    pub split: Split,
    /// The epoch, counted from 1; epoch 0 is the model before training.
    pub epoch: usize,
    /// Steps of the run so far.
    pub step: u64,
    /// Queries of the run so far.
    pub queries: u64,
    /// Seconds of the run so far; the time between a stop and its resumption does not count.
    pub seconds: f64,
    /// Mean loss.
    pub loss: f64,
    /// Share of correctly classified images, 0 to 1.
    pub accuracy: f64,
    /// Queries of this step.
    pub step_queries: Option<u64>,
    /// Queries of this step whose loss was not finite.
    pub dropped: Option<u64>,
    /// Variance of the gradient estimate, relative to that under uniform allocation.
    pub variance_vs_uniform: Option<f64>,
    /// The floor of the relative variance, 1/(1 + CV²): no allocation gets below it.
    pub floor: Option<f64>,
    /// Coefficient of variation of √(Tr Σ_j) over the batch.
    pub cv: Option<f64>,
    /// Queries of the example with the fewest.
    pub min_queries: Option<usize>,
    /// Queries of the example with the most.
    pub max_queries: Option<usize>,
    /// Mean over the sites of the part α of what the queries add to the prediction; 1 is unbiased.
    #[serde(default)]
    pub alpha: Option<f64>,
    /// Mean over the sites of the share of the gradient that the prediction explains.
    #[serde(default)]
    pub explained: Option<f64>,
}

impl Row {
    /// Returns a row without the columns of forward-only learning.
    pub fn new(split: Split, epoch: usize, loss: f64, accuracy: f64) -> Self {
        Self {
            split,
            epoch,
            step: 0,
            queries: 0,
            seconds: 0.0,
            loss,
            accuracy,
            step_queries: None,
            dropped: None,
            variance_vs_uniform: None,
            floor: None,
            cv: None,
            min_queries: None,
            max_queries: None,
            alpha: None,
            explained: None,
        }
    }
}

/// The rows of a run, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// The rows.
    pub rows: Vec<Row>,
    /// What the last step knew of each site, in order; not in `metrics.csv`.
    pub sites: Vec<SiteReport>,
}

/// Name of the file in the artifact folder.
pub const FILE: &str = "metrics.csv";

impl History {
    /// Reads a file that [`write`](Self::write) wrote.
    ///
    /// # Errors
    /// Where the file is missing or damaged.
    pub fn read(path: &Path) -> Result<Self> {
        let mut reader = csv::Reader::from_path(path).with_context(|| format!("cannot read {}", path.display()))?;
        let rows: Result<Vec<Row>, _> = reader.deserialize().collect();
        let rows = rows.with_context(|| format!("{} is damaged; start a new run", path.display()))?;
        Ok(Self { rows, sites: vec![] })
    }

    /// Writes `metrics.csv`.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn write(&self, artifacts: &Artifacts) -> Result<()> {
        artifacts.write_csv(FILE, &self.rows)
    }

    /// Appends a row, and fills in its counts of steps and queries.
    pub fn push(&mut self, mut row: Row) {
        let (step, queries) = self.rows.last().map_or((0, 0), |last| (last.step, last.queries));
        row.step = step + u64::from(row.split == Split::Train);
        row.queries = queries + row.step_queries.unwrap_or(0);
        self.rows.push(row);
    }

    /// Returns the rows of a split.
    pub fn of(&self, split: Split) -> impl DoubleEndedIterator<Item = &Row> {
        self.rows.iter().filter(move |row| row.split == split)
    }

    /// Returns whether the test set was evaluated after `epoch`.
    pub fn is_complete(&self, epoch: usize) -> bool {
        self.of(Split::Test).any(|row| row.epoch == epoch)
    }

    /// Removes the rows after `epoch`.
    pub fn truncate(&mut self, epoch: usize) {
        self.rows.retain(|row| row.epoch <= epoch);
    }

    /// Returns the steps so far.
    pub fn steps(&self) -> u64 {
        self.rows.last().map_or(0, |row| row.step)
    }

    /// Returns the queries so far.
    pub fn queries(&self) -> u64 {
        self.rows.last().map_or(0, |row| row.queries)
    }

    /// Returns the seconds so far.
    pub fn seconds(&self) -> f64 {
        self.rows.last().map_or(0.0, |row| row.seconds)
    }

    /// Returns what the last step knew of each site, as `summary.json` has it.
    pub fn sites(&self) -> Value {
        let of_site = |site: &SiteReport| {
            json!({
                "coordinates": site.shared_coordinates,
                "explained": site.explained,
                "gain": site.gain,
                "alpha": site.alpha,
                "span": site.span,
            })
        };
        self.sites.iter().map(of_site).collect()
    }

    /// Returns the mean of a column over the training steps that have it.
    pub fn mean(&self, column: impl Fn(&Row) -> Option<f64>) -> Option<f64> {
        mean(self.of(Split::Train).filter_map(column))
    }
}

/// Returns the mean, if there are any values.
pub fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0u32), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_is_read_back_unchanged() {
        let dir = tempfile::tempdir().unwrap();
        let artifacts = Artifacts::open(dir.path()).unwrap();
        let mut history = History::default();
        history.push(Row::new(Split::Test, 0, 2.3, 0.1));
        for epoch in 1..=2 {
            for _ in 0..2 {
                let row = Row::new(Split::Train, epoch, 1.0 / 3.0, 2.0 / 7.0);
                history.push(Row { step_queries: Some(20), floor: Some(0.1 + 0.2), ..row });
            }
            history.push(Row { seconds: 0.7, ..Row::new(Split::Test, epoch, f64::INFINITY, 1.0) });
        }
        assert_eq!((history.steps(), history.queries(), history.seconds()), (4, 80, 0.7));
        assert_eq!(history.mean(|row| row.floor), Some(0.1 + 0.2));
        assert_eq!(history.mean(|row| row.cv), None);
        history.write(&artifacts).unwrap();
        let mut read = History::read(&artifacts.path(FILE)).unwrap();
        assert_eq!(read, history);
        read.truncate(1);
        assert_eq!((read.rows.len(), read.is_complete(1), read.is_complete(2)), (4, true, false));
    }

    #[test]
    fn a_damaged_file_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        std::fs::write(&path, "split,epoch\ntrain,x\n").unwrap();
        assert!(format!("{:#}", History::read(&path).unwrap_err()).contains("damaged"));
    }
}
