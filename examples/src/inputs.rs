//! What a program on a vision transformer starts from: weights and images, as written on a command line.

use std::path::PathBuf;

use anyhow::Result;
use burn::prelude::Backend;
use clap::Args;
use flops_vit::ViT;
use flops_vit::checkpoint::{self, Card, Source};
use flops_vit::data::{DataSplit, DatasetSpec, LoadOptions};

/// Where weights and images come from.
#[derive(Args, Clone, Debug)]
pub struct Inputs {
    /// Weights: a checkpoint file, a folder of HuggingFace's or timm's, or hf:ORG/NAME, which is looked for in HuggingFace's cache and
    /// fetched into it with --features download; the checkpoint shipped with flops-vit if not given.
    #[arg(long)]
    pub weights: Option<Source>,
    /// Side of the images, in pixels; the positional embedding is interpolated [default: the model's].
    #[arg(long)]
    pub img_size: Option<usize>,
    /// Folder of CIFAR's binary files; Burn's data set cache if not given.
    #[arg(long)]
    pub data_dir: Option<PathBuf>,
    /// Fetch CIFAR into Burn's data set cache where it is missing (build with --features download).
    #[arg(long)]
    pub download: bool,
    /// Fail at the first image of a folder that cannot be decoded, instead of leaving such images out.
    #[arg(long)]
    pub strict: bool,
}

impl Inputs {
    /// The model and its card; what should be known of the weights is printed.
    pub fn model<B: Backend>(&self, device: &B::Device) -> Result<(ViT<B>, Card)> {
        let (mut model, mut card) = match &self.weights {
            Some(source) => {
                let opened = checkpoint::open(source, device)?;
                opened.notes.iter().for_each(|note| println!("{note}"));
                (opened.model, opened.card)
            }
            None => checkpoint::pretrained(device)?,
        };
        if let Some(img_size) = self.img_size {
            model = model.with_img_size(img_size)?;
            card.config.img_size = img_size;
        }
        Ok((model, card))
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
