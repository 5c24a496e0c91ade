//! One call for weights of any origin.

use std::path::Path;

use burn::prelude::*;

use super::card::CARD_KEY;
use super::file::{Format, json, read};
use super::import::Opened;
use super::native::{from_bytes, is_native};
use super::source::Source;
use super::{hf, tensors, timm};
use crate::error::{CheckpointError, VitError};

/// Loads a model from any of these sources:
///
/// - a file that [`Pretrained::save`](super::Pretrained::save) wrote;
/// - a folder of HuggingFace's or timm's, as on the hub: weights in safetensors or PyTorch's
///   format, whole or in shards;
/// - a file of timm's weights (`.safetensors`, `.pth`, `.pt`, `.bin`), whose sizes are read off its
///   shapes;
/// - a model on the HuggingFace hub, from the local cache. With the cargo feature `download` a
///   missing model is fetched into the cache.
///
/// Weights without a head, such as those of `ViTModel`, get a new one and a note. It has as many
/// classes as the configuration says.
///
/// # Errors
/// [`VitError::Checkpoint`] where a file is missing or damaged, parameters are missing or unknown
/// (all are listed), or the model has a setting that this ViT has not.
///
/// # Example
/// ```no_run
/// use burn::backend::Flex;
/// use flops_vit::checkpoint;
///
/// let source = "hf:google/vit-base-patch16-224".parse()?;
/// let opened = checkpoint::open::<Flex>(&source, &Default::default())?;
/// println!("{} classes", opened.pretrained.card.classes.len());
/// # Ok::<(), flops_vit::VitError>(())
/// ```
pub fn open<B: Backend>(source: &Source, device: &B::Device) -> Result<Opened<B>, VitError> {
    let path = source.resolve()?;
    if path.is_dir() {
        return open_folder(&path, device);
    }
    open_file(&path, device).map_err(|why| VitError::Checkpoint { path: path.display().to_string(), why })
}

/// Loads a model from a folder, HuggingFace's or timm's.
fn open_folder<B: Backend>(dir: &Path, device: &B::Device) -> Result<Opened<B>, VitError> {
    let in_file = |name: &str, why| VitError::Checkpoint { path: dir.join(name).display().to_string(), why };
    let (weights, tensors) = tensors::of_folder(dir)?;
    match AnyConfig::read(&dir.join("config.json")).map_err(|why| in_file("config.json", why))? {
        AnyConfig::Hf(config) => hf::open(dir, config, (weights, tensors), device),
        AnyConfig::Timm(config) => {
            let described = config.describe().map_err(|why| in_file("config.json", why))?;
            timm::open(tensors, described, &dir.display().to_string(), device).map_err(|why| in_file(weights, why))
        }
    }
}

/// `config.json` of a folder, of either library.
enum AnyConfig {
    Timm(Box<timm::TimmConfig>),
    Hf(hf::HfConfig),
}

impl AnyConfig {
    fn read(path: &Path) -> Result<Self, CheckpointError> {
        let value: serde_json::Value = json(path)?;
        let found = match value.get("architecture") {
            Some(_) => serde_json::from_value(value).map(|config| Self::Timm(Box::new(config))),
            None => serde_json::from_value(value).map(Self::Hf),
        };
        found.map_err(|e| CheckpointError::Setting(format!("a setting is not understood: {e}")))
    }
}

/// Loads a model from a file, this crate's or timm's.
fn open_file<B: Backend>(path: &Path, device: &B::Device) -> Result<Opened<B>, CheckpointError> {
    let index = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
    let found = if !index && Format::of(path)? == Format::Safetensors {
        let bytes = read(path)?;
        if is_native(&bytes) {
            return Ok(Opened { pretrained: from_bytes(bytes, device)?, notes: vec![] });
        }
        tensors::unwrapped(tensors::of_safetensors(bytes)?)
    } else {
        tensors::of_file(path)?
    };
    match timm::is_timm(&found) {
        true => timm::open_bare(found, &path.display().to_string(), device),
        false => Err(CheckpointError::NoCard { key: CARD_KEY }),
    }
}
