//! Finished runs, each in a file of its own.

use std::fs;

use anyhow::{Context, Result};
use flops_examples::run::artifacts::{Artifacts, Settings};
use serde::{Deserialize, Serialize};

use crate::method::Method;
use crate::subject::Subject;

/// What tells a run from the others of a folder.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// What is trained.
    pub subject: Subject,
    /// Queries per image and step; 0 for backpropagation.
    pub queries: usize,
    /// How gradients are obtained.
    pub method: Method,
    /// AdamW's learning rate at the start.
    pub lr: f64,
    /// Seed of the head, the order of the images and the noise.
    pub seed: u64,
}

impl Key {
    /// Returns the name of its file.
    fn file(&self) -> String {
        let Self { subject, queries, method, lr, seed } = self;
        format!("{}-q{queries}-{method}-lr{lr}-seed{seed}.json", subject.to_string().replace(':', "_"))
    }
}

/// A measurement on the way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Look {
    /// Steps so far.
    pub step: usize,
    /// Row-forwards so far, backward passes included.
    pub row_forwards: u64,
    /// Queries so far.
    pub queries: u64,
    /// Seconds of training so far, without the measurements.
    pub seconds: f64,
    /// Mean training loss since the last look.
    pub train_loss: Option<f64>,
    /// Test loss, if it is finite.
    pub test_loss: Option<f64>,
    /// Test accuracy, from 0 to 1.
    pub test_accuracy: f64,
    /// Cosine of the estimate on the fixed batch to the exact gradient; none for an estimate of
    /// zero.
    pub cosine: Option<f64>,
}

/// What the prediction knew of a site at the end.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SiteRow {
    /// Share of the gradient's energy that the prediction explains.
    pub explained: f64,
    /// α of the residual.
    pub alpha: f64,
}

/// A finished run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The seed of the run.
    pub seed: u64,
    /// Mean training loss of the last tenth of the steps.
    pub train_loss: Option<f64>,
    /// The measurements, the first one before training.
    pub looks: Vec<Look>,
    /// The sites from the input to the output; none without a prediction.
    pub sites: Vec<SiteRow>,
    /// Why training stopped before its end, if it did.
    pub failure: Option<String>,
}

impl Record {
    /// Returns the last measurement of a run that did not fail.
    pub fn end(&self) -> Option<&Look> {
        self.looks.last().filter(|_| self.failure.is_none())
    }

    /// Returns the first measurement at which the test accuracy is at least `target`.
    pub fn reaches(&self, target: f64) -> Option<&Look> {
        self.looks.iter().find(|look| look.test_accuracy >= target)
    }
}

/// The finished runs of a folder.
pub struct Records {
    folder: Artifacts,
}

impl Records {
    /// Opens the folder, whose runs must have the same settings.
    ///
    /// # Errors
    /// If it cannot be written, or holds runs with other settings.
    pub fn open(artifacts: &Artifacts, settings: &Settings) -> Result<Self> {
        if artifacts.path("config.json").exists() {
            artifacts.check_resumable(settings, &[])?;
        } else {
            artifacts.write_json("config.json", settings)?;
        }
        Ok(Self { folder: artifacts.folder("runs")? })
    }

    /// Returns a finished run.
    ///
    /// # Errors
    /// If its file cannot be read.
    pub fn get(&self, key: &Key) -> Result<Option<Record>> {
        let path = self.folder.path(&key.file());
        if !path.exists() {
            return Ok(None);
        }
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let damaged = || format!("{} is damaged; remove it to repeat the run", path.display());
        serde_json::from_str(&text).map(Some).with_context(damaged)
    }

    /// Keeps a finished run.
    ///
    /// # Errors
    /// If its file cannot be written.
    pub fn put(&self, key: &Key, record: &Record) -> Result<()> {
        self.folder.write_json(&key.file(), record)
    }
}
