//! What the imports of other libraries share: the result, and a model filled by a table of names.

use burn::prelude::*;
use burn_store::{PyTorchToBurnAdapter, TensorSnapshot};

use super::card::check_depth;
use super::names::Naming;
use super::pretrained::Pretrained;
use super::table::called;
use super::tensors::{apply, of_values};
use crate::config::ViTConfig;
use crate::error::CheckpointError;
use crate::model::ViT;

/// A model that [`open`](super::open) loaded.
#[derive(Debug)]
#[non_exhaustive]
pub struct Opened<B: Backend> {
    /// The model and its card.
    pub pretrained: Pretrained<B>,
    /// Remarks for the user: what the files did not say or hold, a line each.
    pub notes: Vec<String>,
}

/// Makes a model from the tensors of another library in PyTorch's layout, and notes for the user.
///
/// Weights without a head get a new one.
pub(super) fn fill_from<B: Backend>(
    config: &ViTConfig,
    tensors: Vec<TensorSnapshot>,
    naming: Naming,
    device: &B::Device,
) -> Result<(ViT<B>, Vec<String>), CheckpointError> {
    let mut named = naming.renamed(tensors)?;
    let (classes, headless) = (config.num_classes, !named.iter().any(|t| t.full_path().starts_with("head")));
    if headless {
        // a placeholder, replaced below
        for (name, shape) in [("head.weight", vec![classes, config.embed_dim]), ("head.bias", vec![classes])] {
            named.push(called(of_values(vec![0.0; shape.iter().product()], shape), name));
        }
    }
    check_depth(config, named.len())?;
    let model = apply(config.init_lazy::<B>(device), named, PyTorchToBurnAdapter);
    let model = model.map_err(|why| why.renamed(|name| naming.theirs(name, config)))?;
    if !headless {
        return Ok((model, vec![]));
    }
    let note = format!("the weights have no head: a new one of {classes} classes is used");
    Ok((model.with_new_head(classes, 0), vec![note]))
}
