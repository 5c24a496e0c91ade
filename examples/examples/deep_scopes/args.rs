//! The command line.

use anyhow::{Context, Result, ensure};
use clap::Parser;
use flops_core::QueryBudget;
use flops_examples::backend;
use flops_examples::experiment::{ExperimentArgs, ImageArgs};
use flops_examples::run::artifacts::Settings;
use flops_vit::Scope;
use flops_vit::data::DatasetSpec;
use serde_json::json;

use crate::method::Method;
use crate::subject::{Network, Subject};

/// Train deep scopes with forward passes only, by several methods at equal cost.
#[derive(Parser, Debug)]
#[command(name = "deep_scopes", version)]
pub struct Args {
    #[command(flatten)]
    pub experiment: ExperimentArgs,
    #[command(flatten)]
    pub images: ImageArgs,
    /// Scopes of the pretrained ViT.
    #[arg(long, value_delimiter = ',', default_values_t = [Scope::Last(1), Scope::Last(3), Scope::Lora(4), Scope::Full])]
    scopes: Vec<Scope>,
    /// Train networks with random weights instead of scopes of the pretrained ViT.
    #[arg(long)]
    pub from_scratch: bool,
    /// Networks of --from-scratch: mlp, cnn, vit [default: mlp and cnn on digits, otherwise vit].
    #[arg(long, value_delimiter = ',')]
    networks: Vec<Network>,
    /// Queries per image and step; several are compared.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 5, 20])]
    pub queries: Vec<usize>,
    /// Methods to compare [default: all].
    #[arg(long, value_delimiter = ',')]
    methods: Vec<Method>,
    /// Learning rates to choose from [default: three for each family of methods].
    #[arg(long, value_delimiter = ',')]
    lrs: Vec<f64>,
    /// Row-forwards of every run [default: as --epochs].
    #[arg(long)]
    row_forwards: Option<u64>,
    /// Row-forwards of every run, as epochs at the largest number of queries [default: 4, with
    /// --full 24].
    #[arg(long, conflicts_with = "row_forwards")]
    epochs: Option<u64>,
    /// Row-forwards that the backward pass of a row counts as.
    #[arg(long, default_value_t = 2)]
    pub backward: u64,
    /// Smoothing scale of the shrunk estimates.
    #[arg(long, default_value_t = 0.02)]
    pub sigma: f64,
    /// Images in a batch.
    #[arg(long, default_value_t = 64)]
    pub batch_size: usize,
    /// How often a run is measured on its way.
    #[arg(long, default_value_t = 12)]
    pub looks: usize,
    /// Images of the fixed batch on which estimates are compared with the exact gradient.
    #[arg(long, default_value_t = 64)]
    pub fixed_batch: usize,
    /// Test accuracy, from 0 to 1, whose price is reported.
    #[arg(long, default_value_t = 0.9)]
    pub target: f64,
    /// Train nothing, and report on the runs that the folder holds.
    #[arg(long)]
    pub report_only: bool,
}

impl Args {
    /// Checks the flags before anything is loaded.
    pub fn check(&self) -> Result<()> {
        self.experiment.seeds()?;
        ensure!((0.0..=1.0).contains(&self.target), "--target {}: use a share from 0 to 1", self.target);
        ensure!(self.looks > 0, "--looks 0: use at least 1");
        ensure!(self.batch_size > 0, "--batch-size 0: use at least 1 image");
        ensure!(self.fixed_batch > 0, "--fixed-batch 0: use at least 1 image");
        ensure!(self.row_forwards != Some(0), "--row-forwards 0: use at least 1");
        ensure!(self.epochs != Some(0), "--epochs 0: train for at least 1 epoch");
        ensure!(self.backward <= 100, "--backward {}: use at most 100", self.backward);
        ensure!(!self.queries.is_empty(), "--queries: give at least one number");
        ensure!(!self.scopes.is_empty(), "--scopes: give at least one scope");
        ensure!(self.networks.is_empty() || self.from_scratch, "--networks: give --from-scratch as well");
        for &queries in &self.queries {
            QueryBudget::new(queries, 1)?;
        }
        for &lr in &self.lrs {
            ensure!(lr > 0.0 && lr <= 1.0, "--lrs {lr}: use numbers above 0 and at most 1");
        }
        for method in self.methods() {
            // a number of queries that a method does not work with is left out, a bad σ is not
            method.config(20, self.sigma, 0)?;
        }
        Ok(())
    }

    /// Returns what is trained.
    pub fn subjects(&self) -> Vec<Subject> {
        if !self.from_scratch {
            return self.scopes.iter().copied().map(Subject::Pretrained).collect();
        }
        let networks = match (self.networks.as_slice(), &self.images.dataset) {
            ([], DatasetSpec::Digits) => vec![Network::Mlp, Network::Cnn],
            ([], _) => vec![Network::Vit],
            (given, _) => given.to_vec(),
        };
        networks.into_iter().map(Subject::Scratch).collect()
    }

    /// Returns the methods to compare.
    pub fn methods(&self) -> Vec<Method> {
        if self.methods.is_empty() { Method::all() } else { self.methods.clone() }
    }

    /// Returns the learning rates that a method chooses from.
    pub fn rates(&self, method: Method) -> Vec<f64> {
        if self.lrs.is_empty() { method.rates().to_vec() } else { self.lrs.clone() }
    }

    /// Returns the row-forwards of every run on so many training images.
    ///
    /// In the costliest setting an image takes a row for its clean pass, one for each query, and
    /// one with its backward pass in the update.
    pub fn budget(&self, images: usize) -> u64 {
        let epochs = self.epochs.unwrap_or(if self.experiment.full { 24 } else { 4 });
        let most = self.queries.iter().copied().max().unwrap_or(1) as u64;
        self.row_forwards.unwrap_or(epochs * images as u64 * (2 + most + self.backward))
    }

    /// Returns what all runs of a folder have in common, by the names of the flags.
    pub fn settings(&self, budget: u64) -> Result<Settings> {
        let ImageArgs { dataset, weights, limit, .. } = &self.images;
        let settings = json!({
            "dataset": dataset.to_string(),
            "weights": weights.as_ref().map(|path| path.display().to_string()),
            "limit": limit,
            "from_scratch": self.from_scratch,
            "row_forwards": budget,
            "backward": self.backward,
            "sigma": self.sigma,
            "batch_size": self.batch_size,
            "looks": self.looks,
            "fixed_batch": self.fixed_batch,
            "backend": backend::NAME,
        });
        settings.as_object().cloned().context("settings are an object")
    }
}
