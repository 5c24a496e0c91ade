//! Checkpoints as safetensors, with the configuration in the file's metadata.
//!
//! A file that does not fit is an error, never a model of which half is loaded. [`open`] loads whatever there is: this crate's own files, folders
//! and files of HuggingFace's and timm's, and models of the HuggingFace hub; [`hf::save`] hands back what `transformers` loads.
//!
//! # Example
//! ```
//! use burn::backend::Flex;
//! use flops_vit::checkpoint::{self, Card};
//! use flops_vit::{Normalization, Resizing, ViTConfig};
//!
//! let device = Default::default();
//! let config = ViTConfig::vit_micro_patch4_32().with_num_classes(2);
//! let model = config.init::<Flex>(&device)?;
//! let card = Card {
//!     config,
//!     normalization: Normalization::HALF,
//!     resizing: Resizing::default(),
//!     classes: vec!["cat".into(), "dog".into()],
//!     description: "not trained yet".into(),
//! };
//! let path = std::env::temp_dir().join(format!("flops-vit-doc-{}.safetensors", std::process::id()));
//! checkpoint::save(&model, &card, &path, true)?;
//! let (_model, card) = checkpoint::load::<Flex>(&path, &device)?;
//! assert_eq!(card.classes, ["cat", "dog"]);
//! # std::fs::remove_file(path).unwrap();
//! # Ok::<(), flops_vit::VitError>(())
//! ```

mod adapters;
pub mod hf;
mod names;
mod source;
pub mod tensors;
#[cfg(test)]
mod tests;
mod timm;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::path::Path;

use burn::prelude::*;
use burn_store::{
    HalfPrecisionAdapter, IdentityAdapter, ModuleAdapter, ModuleSnapshot, PyTorchToBurnAdapter, SafetensorsStore,
    TensorSnapshot,
};
use safetensors::SafeTensors;
use serde::{Deserialize, Deserializer, Serialize};

use crate::config::ViTConfig;
use crate::error::{CheckpointError, VitError};
use crate::model::ViT;
use crate::normalization::Normalization;
use crate::resizing::Resizing;
pub use adapters::{load_adapters, save_adapters};
use names::Naming;
pub use source::Source;
use tensors::{check_finite, check_intact, read};

/// The card's key in the metadata of a file.
pub(crate) const CARD_KEY: &str = "flops";

/// What a checkpoint says of itself: all that is needed to use its weights, as JSON in the file's metadata.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Card {
    /// Sizes of the model.
    #[serde(deserialize_with = "with_defaults")]
    pub config: ViTConfig,
    /// What its inputs were normalised with, and must be normalised with again.
    pub normalization: Normalization,
    /// How images of other sizes are brought to its input's.
    #[serde(default)]
    pub resizing: Resizing,
    /// Names of the classes of its head, in order, one for each of `config.num_classes`.
    pub classes: Vec<String>,
    /// How it came to be, and how good it is; for people.
    pub description: String,
}

/// A configuration of which what an older version did not know has its default.
fn with_defaults<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ViTConfig, D::Error> {
    use serde::de::Error;
    let given = serde_json::Map::deserialize(deserializer)?;
    let mut all = serde_json::to_value(ViTConfig::new()).map_err(D::Error::custom)?;
    if let Some(all) = all.as_object_mut() {
        all.extend(given);
    }
    serde_json::from_value(all).map_err(D::Error::custom)
}

impl Card {
    /// Whether it describes `model`; what is wrong where it does not.
    fn fits<B: Backend>(&self, model: &ViT<B>) -> Result<(), String> {
        self.check().map_err(|why| format!("the card does not fit the model: {why}"))?;
        let compare = |what: &str, says: usize, has: usize| match says == has {
            true => Ok(()),
            false => Err(format!("the card says {says} {what}, the model's has {has}")),
        };
        compare("classes", self.config.num_classes, model.head.weight.dims()[1])?;
        compare("tokens", self.config.num_tokens(), model.pos_embed.dims()[1])
    }

    /// Whether the parts fit together; what is wrong where they do not.
    fn check(&self) -> Result<(), String> {
        self.config.validate().map_err(|e| e.to_string())?;
        if self.classes.len() != self.config.num_classes {
            return Err(format!("it names {} classes, num_classes = {}", self.classes.len(), self.config.num_classes));
        }
        let Normalization { mean, std } = self.normalization;
        if mean.iter().chain(&std).any(|x| !x.is_finite()) || std.iter().any(|&x| x <= 0.0) {
            return Err(format!(
                "its normalization has mean {mean:?} and std {std:?}, expected finite numbers and std > 0"
            ));
        }
        if !self.resizing.is_valid() {
            return Err(format!(
                "its resizing keeps a part of {}, expected one above 0 and at most 1",
                self.resizing.crop
            ));
        }
        Ok(())
    }
}

/// `vit_micro_patch4_32`, pretrained by backpropagation on 30,000 CIFAR-10 records with `examples/vit_pretrain.rs`; f16.
pub fn pretrained_bytes() -> &'static [u8] {
    include_bytes!("../../weights/vit_micro_patch4_32.safetensors")
}

/// The shipped checkpoint, [`pretrained_bytes`], as a model.
///
/// # Errors
/// [`VitError::Checkpoint`] where the file in the crate is damaged.
pub fn pretrained<B: Backend>(device: &B::Device) -> Result<(ViT<B>, Card), VitError> {
    from_bytes(pretrained_bytes().to_vec(), device)
        .map_err(|why| VitError::Checkpoint { path: "the shipped checkpoint".into(), why })
}

/// Saves a model, in f16 where `half` says so; the file is written beside its place and renamed, so that a failure leaves what
/// was there before.
///
/// Adapters are [merged](ViT::merged) first: the file is that of a model without them. [`save_adapters`] saves them on their own.
///
/// # Errors
/// [`VitError::Save`] where the card does not fit the model, a weight is not finite (or is too large for f16), or the file
/// cannot be written.
pub fn save<B: Backend>(model: &ViT<B>, card: &Card, path: &Path, half: bool) -> Result<(), VitError> {
    let failed = |why: String| VitError::Save { path: path.to_path_buf(), why };
    card.fits(model).map_err(failed)?;
    let merged = model.has_adapters().then(|| model.clone().merged());
    let model = merged.as_ref().unwrap_or(model);
    let described = serde_json::to_string(card).map_err(|e| failed(e.to_string()))?;
    let mut store = SafetensorsStore::from_bytes(None).metadata(CARD_KEY, described);
    let mut stored = None;
    if half {
        let to_half = HalfPrecisionAdapter::new().with_module("ViT");
        stored = Some(to_half.clone_box());
        store = store.with_to_adapter(to_half);
    }
    check_finite(&model.collect(None, stored, false)).map_err(|e| failed(e.to_string()))?;
    write_store(model, store, path).map_err(failed)
}

/// What the store takes of the model, as a file.
fn write_store<B: Backend>(model: &ViT<B>, mut store: SafetensorsStore, path: &Path) -> Result<(), String> {
    model.save_into(&mut store).map_err(|e| e.to_string())?;
    let bytes = store.get_bytes().map_err(|e| e.to_string())?;
    let bytes = reproducible(&bytes).ok_or("its header is malformed")?;
    write_whole(path, &bytes).map_err(|e| format!("{e}; choose a file in a folder that can be written"))
}

/// The same file with the entries of its header in alphabetical order; the store writes its metadata in any order. So the same
/// model is the same file.
fn reproducible(bytes: &[u8]) -> Option<Vec<u8>> {
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let (header, tensors) = rest.split_at_checked(u64::from_le_bytes(*length) as usize)?;
    let header: BTreeMap<String, BTreeMap<String, serde_json::Value>> = serde_json::from_slice(header).ok()?;
    let mut header = serde_json::to_vec(&header).ok()?;
    // tensors start at a multiple of 8
    header.resize(header.len().next_multiple_of(8), b' ');
    Some([&(header.len() as u64).to_le_bytes(), header.as_slice(), tensors].concat())
}

/// What [`open`] found.
#[derive(Debug)]
pub struct Opened<B: Backend> {
    /// The model, its weights in f32.
    pub model: ViT<B>,
    /// What it says of itself, or what was found out.
    pub card: Card,
    /// What was not as in the file, and should be known: a line each.
    pub notes: Vec<String>,
}

/// Loads a model from wherever it is:
///
/// - a file that [`save`] wrote;
/// - a folder as HuggingFace's and timm's models have it on the hub, the weights in safetensors or PyTorch's format, whole or in shards;
/// - a file of timm's weights (`.safetensors`, `.pth`, `.pt`, `.bin`), whose sizes are read off its shapes;
/// - a model on the HuggingFace hub, from the local cache; with the cargo feature `download` it is fetched into it where it is missing.
///
/// Weights without a head, as those of `ViTModel`, get a new one of as many classes as the configuration says, and a note.
///
/// # Errors
/// [`VitError::Checkpoint`] where a file is missing or damaged, lacks parameters or has others (all are listed), or is another model than
/// a ViT with GELU.
///
/// # Example
/// ```no_run
/// use burn::backend::Flex;
/// use flops_vit::checkpoint;
///
/// let source = "hf:google/vit-base-patch16-224".parse()?;
/// let opened = checkpoint::open::<Flex>(&source, &Default::default())?;
/// println!("{} classes", opened.card.classes.len());
/// # Ok::<(), flops_vit::VitError>(())
/// ```
pub fn open<B: Backend>(source: &Source, device: &B::Device) -> Result<Opened<B>, VitError> {
    let path = source.resolve()?;
    let named = |path: &Path, why| VitError::Checkpoint { path: path.display().to_string(), why };
    if path.is_dir() {
        return hf::open(&path, tensors::of_folder(&path)?, device);
    }
    let found = if path.extension().is_some_and(|e| e == "safetensors") {
        let bytes = read(&path).map_err(|why| named(&path, why))?;
        if is_ours(&bytes) {
            let (model, card) = from_bytes(bytes, device).map_err(|why| named(&path, why))?;
            return Ok(Opened { model, card, notes: vec![] });
        }
        tensors::of_safetensors(bytes)
    } else {
        tensors::of_file(&path)
    };
    let found = found.map_err(|why| named(&path, why))?;
    match timm::is_timm(&found) {
        true => timm::open(found, None, &path.display().to_string(), device).map_err(|why| named(&path, why)),
        false => Err(named(&path, CheckpointError::NoCard)),
    }
}

/// Whether this crate wrote the file.
fn is_ours(bytes: &[u8]) -> bool {
    metadata(bytes).is_ok_and(|m| m.contains_key(CARD_KEY) || m.contains_key(adapters::ADAPTER_KEY))
}

/// A model of that configuration from the tensors of another library, laid out as PyTorch's, and what should be said of it.
fn fill_from<B: Backend>(
    config: &ViTConfig,
    tensors: Vec<TensorSnapshot>,
    naming: Naming,
    device: &B::Device,
) -> Result<(ViT<B>, Vec<String>), CheckpointError> {
    let mut named = naming.renamed(tensors)?;
    let (classes, headless) = (config.num_classes, !named.iter().any(|t| t.full_path().starts_with("head")));
    if headless {
        // overwritten by drawn weights below
        for (name, shape) in [("weight", vec![classes, config.embed_dim]), ("bias", vec![classes])] {
            let mut tensor = tensors::of_values(vec![0.0; shape.iter().product()], shape);
            tensor.path_stack = Some(vec!["head".into(), name.into()]);
            named.push(tensor);
        }
    }
    let model = fill(config, named, PyTorchToBurnAdapter, device);
    let model = model.map_err(|why| why.renamed(|name| naming.theirs(name, config)))?;
    Ok(match headless {
        true => {
            let note = format!("the weights have no head: a new one of {classes} classes is used");
            (model.with_new_head(classes, 0), vec![note])
        }
        false => (model, vec![]),
    })
}

/// Loads a checkpoint that [`save`] wrote; f16 becomes f32.
///
/// # Errors
/// [`VitError::Checkpoint`] where the file is missing, damaged, or of another shape than its card says.
pub fn load<B: Backend>(path: &Path, device: &B::Device) -> Result<(ViT<B>, Card), VitError> {
    read(path)
        .and_then(|bytes| from_bytes(bytes, device))
        .map_err(|why| VitError::Checkpoint { path: path.display().to_string(), why })
}

/// Writes beside `path` and renames: there is never half a file under that name.
///
/// # Errors
/// Where the file cannot be written; what was there before is still there.
pub fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut name = path.file_name().ok_or(std::io::ErrorKind::InvalidFilename)?.to_owned();
    name.push(".partial");
    let partial = path.with_file_name(name);
    let written = File::create(&partial)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| std::fs::rename(&partial, path));
    if written.is_err() {
        // the first error is the one worth telling
        let _ = std::fs::remove_file(&partial);
    }
    written
}

fn from_bytes<B: Backend>(bytes: Vec<u8>, device: &B::Device) -> Result<(ViT<B>, Card), CheckpointError> {
    check_intact(&bytes)?;
    let metadata = metadata(&bytes)?;
    let described = match metadata.get(CARD_KEY) {
        Some(described) => described,
        None if metadata.contains_key(adapters::ADAPTER_KEY) => return Err(CheckpointError::OnlyAdapters),
        None => return Err(CheckpointError::NoCard),
    };
    let card: Card = serde_json::from_str(described).map_err(|e| CheckpointError::Card(e.to_string()))?;
    card.check().map_err(CheckpointError::Card)?;
    let model = fill(&card.config, tensors::of_safetensors(bytes)?, IdentityAdapter, device)?;
    Ok((model, card))
}

/// What a file says of itself.
fn metadata(bytes: &[u8]) -> Result<HashMap<String, String>, CheckpointError> {
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| CheckpointError::Malformed(e.to_string()))?;
    Ok(header.metadata().clone().unwrap_or_default())
}

/// A model of that configuration with every parameter taken from `tensors`, which are named as in the model.
fn fill<B: Backend>(
    config: &ViTConfig,
    tensors: Vec<TensorSnapshot>,
    layout: impl ModuleAdapter + 'static,
    device: &B::Device,
) -> Result<ViT<B>, CheckpointError> {
    if config.depth > tensors.len() {
        let why = format!("depth = {}, but the file holds {} tensors", config.depth, tensors.len());
        return Err(CheckpointError::Card(why));
    }
    tensors::apply(config.init_lazy::<B>(device), tensors, layout)
}
