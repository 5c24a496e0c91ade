//! The flags of weights and images, for programs that run a vision transformer.

use std::path::PathBuf;

use anyhow::Result;
use burn::prelude::Backend;
use clap::Args;
use flops_vit::checkpoint::{self, Card, Pretrained, Source};
use flops_vit::data::{DataSplit, DatasetSpec, LoadOptions};

/// Where weights and images come from.
#[derive(Args, Clone, Debug)]
pub struct Inputs {
    /// Weights: a checkpoint file, a HuggingFace or timm folder, or hf:ORG/NAME [default: the
    /// checkpoint shipped with flops-vit]. hf:ORG/NAME is looked up in HuggingFace's cache, and
    /// fetched into it with --features download.
    #[arg(long)]
    pub weights: Option<Source>,
    /// Height and width of the images, in pixels; the positional embedding is interpolated
    /// [default: the model's].
    #[arg(long)]
    pub img_size: Option<usize>,
    /// Folder of CIFAR's binary files [default: Burn's data set cache].
    #[arg(long)]
    pub data_dir: Option<PathBuf>,
    /// Fetch CIFAR into Burn's data set cache if it is missing (build with --features download).
    #[arg(long)]
    pub download: bool,
    /// Fail at the first image of a folder that cannot be decoded, instead of skipping it.
    #[arg(long)]
    pub strict: bool,
}

impl Inputs {
    /// The model and its card; what should be known of the weights is printed.
    pub fn model<B: Backend>(&self, device: &B::Device) -> Result<Pretrained<B>> {
        let pretrained = match &self.weights {
            Some(source) => {
                let opened = checkpoint::open(source, device)?;
                opened.notes.iter().for_each(|note| println!("{note}"));
                opened.pretrained
            }
            None => checkpoint::pretrained(device)?,
        };
        Ok(match self.img_size {
            Some(img_size) => pretrained.with_img_size(img_size)?,
            None => pretrained,
        })
    }

    /// The images of `dataset` as that model takes them; what is missing or was skipped is printed.
    pub fn images(&self, dataset: &DatasetSpec, card: &Card, threads: usize) -> Result<DataSplit> {
        let options = LoadOptions::new(card.config.img_size)
            .with_data_dir(self.data_dir.clone())
            .with_download(self.download)
            .with_resizing(card.resizing)
            .with_strict(self.strict)
            .with_threads(threads);
        let split = dataset.load(&options)?;
        split.remarks().iter().for_each(|remark| println!("{remark}"));
        Ok(split)
    }
}
