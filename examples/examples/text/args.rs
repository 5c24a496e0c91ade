//! The command line.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Parser;
use flops_core::QueryBudget;
use flops_examples::experiment::ExperimentArgs;
use flops_vit::Scope;
use flops_vit::checkpoint::Source;

use crate::method::Method;

/// Fine-tune a text encoder as a classifier, with forward passes only and by backpropagation.
#[derive(Parser, Debug)]
#[command(name = "text", version)]
pub struct Args {
    #[command(flatten)]
    pub experiment: ExperimentArgs,
    /// The encoder: a folder of a BERT such as all-MiniLM-L6-v2, or hf:ORG/NAME [default: the small
    /// one that is shipped].
    #[arg(long)]
    pub text: Option<Source>,
    /// A CSV file of texts, whose header names text and label [default: captions, with --text
    /// sentences of reviews].
    #[arg(long)]
    pub csv: Option<PathBuf>,
    /// What is trained: head, bias_norm, last:K, lora:R, full; the head always is.
    #[arg(long, value_delimiter = ',', default_values_t = [Scope::Lora(4), Scope::Full])]
    pub scopes: Vec<Scope>,
    /// How it is trained: forward, mezo, backprop.
    #[arg(long, value_delimiter = ',', default_values_t = Method::ALL)]
    pub methods: Vec<Method>,
    /// Row-forwards of each run [default: 60,000, with --full 240,000].
    #[arg(long)]
    row_forwards: Option<u64>,
    /// Texts of a step.
    #[arg(long, default_value_t = 32)]
    pub batch_size: usize,
    /// Queries of each text and step of the method forward.
    #[arg(long, default_value_t = 5)]
    pub queries: usize,
    /// Learning rate of AdamW [default: by method and scope].
    #[arg(long)]
    lr: Option<f64>,
    /// Longest text in tokens; longer ones are truncated [default: what the encoder was made for].
    #[arg(long)]
    pub max_tokens: Option<usize>,
    /// Share of each class that is for the test [default: 0.2]; captions have a test of their own.
    #[arg(long)]
    test_share: Option<f64>,
    /// How often a run is measured on its way.
    #[arg(long, default_value_t = 8)]
    pub looks: u64,
}

impl Args {
    /// Checks the flags before anything is loaded.
    pub fn check(&self) -> Result<()> {
        self.experiment.seeds()?;
        ensure!(!self.scopes.is_empty(), "--scopes: give at least one scope");
        ensure!(!self.methods.is_empty(), "--methods: give at least one of forward, mezo, backprop");
        ensure!(self.row_forwards() > 0, "--row-forwards 0: use at least 1");
        ensure!(self.batch_size > 0, "--batch-size 0: use at least 1 text");
        ensure!((1..=100).contains(&self.looks), "--looks {}: use 1 to 100", self.looks);
        ensure!(self.batch_size <= 1 << 20, "--batch-size {}: use at most 1,048,576", self.batch_size);
        ensure!(self.row_forwards() <= 1 << 50, "--row-forwards {}: use at most 2^50", self.row_forwards());
        if let Some(tokens) = self.max_tokens {
            ensure!(tokens > 1, "--max-tokens {tokens}: use at least 2");
        }
        let share = self.test_share();
        ensure!(share > 0.0 && share < 1.0, "--test-share {share}: use a share above 0 and below 1");
        let splits = self.csv.is_some() || self.text.is_some();
        ensure!(self.test_share.is_none() || splits, "--test-share: captions have a test of their own; leave it out");
        if let Some(lr) = self.lr {
            ensure!(lr > 0.0 && lr <= 1.0, "--lr {lr}: use a number above 0 and at most 1");
        }
        QueryBudget::new(self.queries, 1)?;
        Ok(())
    }

    /// Row-forwards of each run.
    pub fn row_forwards(&self) -> u64 {
        self.row_forwards.unwrap_or(if self.experiment.full { 240_000 } else { 60_000 })
    }

    /// Share of each class that is for the test.
    pub fn test_share(&self) -> f64 {
        self.test_share.unwrap_or(0.2)
    }

    /// Learning rate of a method, for an encoder of that width.
    pub fn lr(&self, method: Method, scope: Scope, width: usize) -> f64 {
        self.lr.unwrap_or_else(|| method.lr(scope, width))
    }
}
