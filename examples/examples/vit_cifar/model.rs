//! The model: what is trained of it, and how good it is.

use anyhow::Result;
use burn::data::dataloader::DataLoader;
use burn::prelude::*;
use flops_core::{ForwardModel, infer};
use flops_examples::backend::{AB, B};
use flops_vit::checkpoint::Pretrained;
use flops_vit::data::ImageBatch;
use flops_vit::{Scope, ViT};

use crate::args::Args;

/// Images of one forward pass of a thread when the test set is evaluated.
const TEST_ROWS: usize = 32;

/// Gives the model a head for `classes` and adapters where they are needed, and freezes what is not
/// trained.
pub fn prepare(pretrained: Pretrained<AB>, new_head: bool, args: &Args, classes: &[String]) -> Result<Pretrained<AB>> {
    let (theirs, ours) = (pretrained.card.classes.len(), classes.len());
    if new_head && theirs != ours {
        println!("the pretrained head has {theirs} classes and the data {ours}: a new head is trained");
    } else if let Some((theirs, ours)) = pretrained.card.classes.iter().zip(classes).find(|(a, b)| a != b) {
        println!("the pretrained head has other classes ({theirs} where the data has {ours}): a new head is trained");
    }
    let pretrained = if new_head { pretrained.with_new_head(classes.to_vec(), args.seed) } else { pretrained };
    let pretrained = match args.scope {
        Scope::Lora(rank) => pretrained.with_lora(rank, args.seed)?,
        _ => pretrained,
    };
    let Pretrained { model, card } = pretrained.with_scope(args.scope)?;
    Ok(Pretrained { model: model.with_sites(args.sites.unwrap_or_default()), card })
}

/// Returns the mean loss and the accuracy on the test images.
pub fn evaluate(model: &ViT<B>, loader: &dyn DataLoader<B, ImageBatch<B>>, threads: usize) -> (f64, f64) {
    let (mut loss, mut correct, mut total) = (0.0, 0i64, 0usize);
    for batch in loader.iter() {
        let n = batch.ids.len();
        let logits = infer(model, &batch.input, n, TEST_ROWS, threads);
        let predicted = logits.clone().argmax(1).reshape([n]);
        correct += predicted.equal(batch.target.clone()).int().sum().into_scalar().elem::<i64>();
        loss += model.losses(logits, batch.target).sum().into_scalar().elem::<f64>();
        total += n;
    }
    (loss / total as f64, correct as f64 / total as f64)
}
