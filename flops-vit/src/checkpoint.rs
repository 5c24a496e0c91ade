//! Checkpoints as safetensors, with the configuration in the file's metadata.

use std::path::Path;

use burn::prelude::*;
use burn_store::{HalfPrecisionAdapter, ModuleSnapshot, SafetensorsStore};
use serde::{Deserialize, Serialize};

use crate::config::ViTConfig;
use crate::error::VitError;
use crate::model::ViT;
use crate::normalization::Normalization;

/// What a checkpoint says of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Card {
    /// Sizes of the model.
    pub config: ViTConfig,
    /// What its inputs were normalised with.
    pub normalization: Normalization,
    /// Names of the classes of its head, in order.
    pub classes: Vec<String>,
    /// How it came to be, and how good it is.
    pub description: String,
}

/// `vit_micro_patch4_32`, pretrained by backpropagation on 30,000 CIFAR-10 records with `examples/vit_pretrain.rs`; f16.
pub fn pretrained_bytes() -> &'static [u8] {
    include_bytes!("../weights/vit_micro_patch4_32.safetensors")
}

/// The shipped checkpoint, [`pretrained_bytes`], as a model.
///
/// # Errors
/// Where the file in the crate is damaged.
pub fn pretrained<B: Backend>(device: &B::Device) -> Result<(ViT<B>, Card), VitError> {
    from_bytes(pretrained_bytes().to_vec(), "the shipped checkpoint", device)
}

/// Saves a model, in f16 where `half` says so; the file is written beside its place and renamed.
///
/// # Errors
/// Where the folder cannot be written.
pub fn save<B: Backend>(model: &ViT<B>, card: &Card, path: &Path, half: bool) -> Result<(), VitError> {
    let failed = |why: String| VitError::Save { path: path.to_path_buf(), why };
    let described = serde_json::to_string(card).map_err(|e| failed(e.to_string()))?;
    let mut store = SafetensorsStore::from_bytes(None).metadata("flops", described);
    if half {
        store = store.with_to_adapter(HalfPrecisionAdapter::new().with_module("ViT"));
    }
    model.save_into(&mut store).map_err(|e| failed(e.to_string()))?;
    let bytes = store.get_bytes().map_err(|e| failed(e.to_string()))?;
    let partial = path.with_extension("partial");
    std::fs::write(&partial, bytes).and_then(|()| std::fs::rename(&partial, path)).map_err(|e| failed(e.to_string()))
}

/// Loads a checkpoint that [`save`] wrote.
///
/// # Errors
/// Where the file is missing, damaged, or of another shape than its card says.
pub fn load<B: Backend>(path: &Path, device: &B::Device) -> Result<(ViT<B>, Card), VitError> {
    let name = path.display().to_string();
    let bytes = std::fs::read(path)
        .map_err(|e| VitError::Checkpoint { path: name.clone(), why: format!("it cannot be read ({e})") })?;
    from_bytes(bytes, &name, device)
}

fn from_bytes<B: Backend>(bytes: Vec<u8>, name: &str, device: &B::Device) -> Result<(ViT<B>, Card), VitError> {
    let failed = |why: String| VitError::Checkpoint { path: name.to_string(), why };
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes)
        .map_err(|e| failed(format!("it is no intact safetensors file ({e})")))?;
    let described = header
        .metadata()
        .as_ref()
        .and_then(|m| m.get("flops"))
        .ok_or_else(|| failed("its metadata has no key 'flops' with the model's configuration".into()))?;
    let card: Card = serde_json::from_str(described).map_err(|e| failed(format!("its configuration is damaged ({e})")))?;
    let mut model = card.config.init::<B>(device)?;
    let mut store = SafetensorsStore::from_bytes(Some(bytes))
        .with_from_adapter(ToFull);
    model.load_from(&mut store).map_err(|e| failed(e.to_string()))?;
    Ok((model, card))
}

/// Half-precision tensors become f32 when they are loaded, whatever layer they belong to.
#[derive(Clone)]
struct ToFull;

impl burn_store::ModuleAdapter for ToFull {
    fn adapt(&self, snapshot: &burn_store::TensorSnapshot) -> burn_store::TensorSnapshot {
        use burn::tensor::DType;
        if !matches!(snapshot.dtype, DType::F16 | DType::BF16) {
            return snapshot.clone();
        }
        let data = snapshot.clone_data_fn();
        burn_store::TensorSnapshot::from_closure(
            std::rc::Rc::new(move || Ok(data()?.convert_dtype(DType::F32))),
            DType::F32,
            snapshot.shape.clone(),
            snapshot.path_stack.clone().unwrap_or_default(),
            snapshot.container_stack.clone().unwrap_or_default(),
            snapshot.tensor_id.unwrap_or_default(),
        )
    }

    fn clone_box(&self) -> Box<dyn burn_store::ModuleAdapter> {
        Box::new(self.clone())
    }
}
