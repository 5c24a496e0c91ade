//! This crate's own checkpoints: one safetensors file with a card in its metadata.

use std::path::Path;

use burn::prelude::*;
use burn::tensor::DType;
use burn_store::{HalfPrecisionAdapter, IdentityAdapter, ModuleAdapter, ModuleSnapshot, SafetensorsStore};
use flops_core::train::files::write_atomic;

use super::card::{ADAPTER_KEY, CARD_KEY, Card, check_depth};
use super::file::{check_intact, metadata, read, reproducible};
use super::pretrained::Pretrained;
use super::tensors::{apply, check_finite, of_safetensors};
use crate::error::{CheckpointError, VitError};
use crate::model::ViT;

/// The shipped checkpoint: `vit_micro_patch4_32` in f16.
///
/// It was pretrained by backpropagation on 30,000 CIFAR-10 records with `examples/vit_pretrain.rs`.
pub fn pretrained_bytes() -> &'static [u8] {
    include_bytes!("../../weights/vit_micro_patch4_32.safetensors")
}

/// Loads the shipped checkpoint, [`pretrained_bytes`].
///
/// # Errors
/// [`VitError::Checkpoint`] where the file in the crate is damaged.
pub fn pretrained<B: Backend>(device: &B::Device) -> Result<Pretrained<B>, VitError> {
    from_bytes(pretrained_bytes().to_vec(), device)
        .map_err(|why| VitError::Checkpoint { path: "the shipped checkpoint".into(), why })
}

/// Loads a checkpoint that [`Pretrained::save`] wrote; f16 becomes f32.
///
/// # Errors
/// [`VitError::Checkpoint`] where the file is missing or damaged, or its shapes differ from its
/// card.
pub fn load<B: Backend>(path: &Path, device: &B::Device) -> Result<Pretrained<B>, VitError> {
    read(path)
        .and_then(|bytes| from_bytes(bytes, device))
        .map_err(|why| VitError::Checkpoint { path: path.display().to_string(), why })
}

pub(super) fn from_bytes<B: Backend>(bytes: Vec<u8>, device: &B::Device) -> Result<Pretrained<B>, CheckpointError> {
    check_intact(&bytes)?;
    let metadata = metadata(&bytes)?;
    let described = match metadata.get(CARD_KEY) {
        Some(described) => described,
        None if metadata.contains_key(ADAPTER_KEY) => return Err(CheckpointError::OnlyAdapters),
        None => return Err(CheckpointError::NoCard { key: CARD_KEY }),
    };
    let card: Card = serde_json::from_str(described).map_err(|e| CheckpointError::Card(e.to_string()))?;
    card.check().map_err(CheckpointError::Card)?;
    let tensors = of_safetensors(bytes)?;
    check_depth(&card.config, tensors.len())?;
    let model = apply(card.config.init_lazy::<B>(device), tensors, IdentityAdapter)?;
    Ok(Pretrained { model, card })
}

/// Returns whether this crate wrote the file.
pub(super) fn is_native(bytes: &[u8]) -> bool {
    metadata(bytes).is_ok_and(|m| m.contains_key(CARD_KEY) || m.contains_key(ADAPTER_KEY))
}

impl<B: Backend> Pretrained<B> {
    /// Saves model and card in f32.
    ///
    /// Adapters are [merged](ViT::merged) first: the file holds a model without them.
    /// [`save_adapters`](Self::save_adapters) saves them on their own. The file is written beside
    /// `path` and renamed, so that a failure leaves the previous file.
    ///
    /// # Errors
    /// [`VitError::Save`] where the card does not fit the model, or a weight is not finite or quantized,
    /// [`VitError::Write`] where the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), VitError> {
        write_bytes(to_bytes(self, None), path)
    }

    /// Saves model and card as [`save`](Self::save) does, but in f16.
    ///
    /// # Errors
    /// As [`save`](Self::save), and where a weight is too large for f16.
    pub fn save_half(&self, path: &Path) -> Result<(), VitError> {
        let half = HalfPrecisionAdapter::new().with_module("ViT");
        write_bytes(to_bytes(self, Some(half)), path)
    }
}

/// Returns model and card as a file, the weights converted by `half` where it is given.
fn to_bytes<B: Backend>(pretrained: &Pretrained<B>, half: Option<HalfPrecisionAdapter>) -> Result<Vec<u8>, String> {
    let Pretrained { model, card } = pretrained;
    card.fits(model)?;
    check_floats(model)?;
    let merged = model.has_adapters().then(|| model.clone().merged());
    let model = merged.as_ref().unwrap_or(model);
    let described = serde_json::to_string(card).map_err(|e| e.to_string())?;
    let mut store = SafetensorsStore::from_bytes(None).metadata(CARD_KEY, described);
    let mut stored = None;
    if let Some(half) = half {
        stored = Some(half.clone_box());
        store = store.with_to_adapter(half);
    }
    check_finite(&model.collect(None, stored, false)).map_err(|e| e.to_string())?;
    store_bytes(model, store)
}

/// Checks that no parameter is a quantized tensor of Burn: these files hold floats.
fn check_floats<B: Backend>(model: &ViT<B>) -> Result<(), String> {
    let tensors = model.collect(None, None, false);
    let quantized = tensors.iter().find(|tensor| matches!(tensor.dtype, DType::QFloat(_)));
    quantized.map_or(Ok(()), |tensor| {
        Err(format!(
            "{} is quantized, and this file holds floats; save flops_core::quantize::Quantized::dequantized(), or \
             a record of the quantized model with a recorder of Burn",
            tensor.full_path()
        ))
    })
}

/// Returns the parameters of the model that the store selects, as a file.
pub(super) fn store_bytes<B: Backend>(model: &ViT<B>, mut store: SafetensorsStore) -> Result<Vec<u8>, String> {
    model.save_into(&mut store).map_err(|e| e.to_string())?;
    let bytes = store.get_bytes().map_err(|e| e.to_string())?;
    reproducible(&bytes).ok_or_else(|| "its header is malformed".into())
}

/// Writes the bytes, or reports why there are none.
pub(super) fn write_bytes(bytes: Result<Vec<u8>, String>, path: &Path) -> Result<(), VitError> {
    let bytes = bytes.map_err(|why| VitError::Save { path: path.to_path_buf(), why })?;
    write_atomic(path, &bytes).map_err(VitError::Write)
}
