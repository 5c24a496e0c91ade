//! Import of timm's vision transformers.
//!
//! Sizes are read off the shapes of the tensors. What shows in no shape, such as the number of heads
//! or the activation, follows from `config.json`: from its `model_args`, and from what the name of
//! its architecture means in timm. A setting that this ViT does not have is refused by name.

mod architectures;
mod bare;
mod input;
mod layer_scale;
mod settings;
mod shapes;
#[cfg(test)]
mod tests;

use burn::prelude::*;
use burn_store::TensorSnapshot;
use serde::Deserialize;

use self::architectures::Arguments;
use self::input::{Labels, PretrainedCfg};
use self::settings::Settings;
use self::shapes::Shapes;
use super::card::Card;
use super::channels::check_channels;
use super::import::{Opened, fill_from};
use super::names::Naming;
use super::pretrained::Pretrained;
use super::table::called;
use super::tensors::{of_values, values};
use crate::config::ViTConfig;
use crate::error::CheckpointError;
use crate::normalization::Normalization;
use crate::resizing::Resizing;

/// Classes of a new head where nothing says how many.
const CLASSES: usize = 1000;

/// `config.json` of a timm model on the hub.
#[derive(Deserialize)]
pub(super) struct TimmConfig {
    architecture: String,
    #[serde(default)]
    global_pool: Option<String>,
    #[serde(default)]
    num_classes: Option<i64>,
    #[serde(default, alias = "labels")]
    label_names: Option<Labels>,
    #[serde(default)]
    model_args: Option<Arguments>,
    #[serde(default)]
    pretrained_cfg: Option<PretrainedCfg>,
    /// Older files have its keys beside `architecture`.
    #[serde(flatten)]
    legacy: PretrainedCfg,
}

/// What a `config.json` says.
pub(super) struct Described {
    architecture: String,
    settings: Settings,
    /// Whether `model_args` has an `in_chans`, which comes before `input_size`.
    in_chans: bool,
    labels: Option<Labels>,
    input: PretrainedCfg,
}

impl TimmConfig {
    /// Reads the settings.
    ///
    /// # Errors
    /// Where a setting is not supported, or the architecture is unknown and has no `num_heads`.
    pub fn describe(self) -> Result<Described, CheckpointError> {
        let input = self.pretrained_cfg.unwrap_or(self.legacy);
        let mut given = self.model_args.unwrap_or_default();
        // timm leaves arguments of None out
        given.retain(|_, value| !value.is_null());
        let mut arguments = match architectures::of(&self.architecture) {
            Some(arguments) => arguments,
            None if given.contains_key("num_heads") => Arguments::new(),
            None => return Err(CheckpointError::UnknownArchitecture { name: self.architecture }),
        };
        // the norm and its ε are one argument of timm's
        if given.contains_key("norm_layer") {
            arguments.remove("norm_eps");
        }
        // what the saved model does; timm writes it for information
        if let Some(pool) = self.global_pool {
            if given.get("global_pool").is_some_and(|other| other.as_str().is_some_and(|other| other != pool)) {
                let why = format!("global_pool = '{pool}', and model_args has another; make them equal");
                return Err(CheckpointError::Setting(why));
            }
            arguments.insert("global_pool".into(), pool.into());
        }
        if let Some(classes) = self.num_classes.or(input.num_classes) {
            arguments.insert("num_classes".into(), classes.into());
        }
        let in_chans = given.contains_key("in_chans");
        arguments.extend(given);
        let settings = Settings::read(arguments)?;
        // refused before the weights are read
        input.resizing()?;
        let labels = self.label_names.or(input.label_names.clone());
        Ok(Described { architecture: self.architecture, settings, in_chans, labels, input })
    }
}

/// Returns whether the tensors have timm's names.
pub(super) fn is_timm(tensors: &[TensorSnapshot]) -> bool {
    tensors.iter().any(|t| t.full_path() == "patch_embed.proj.weight")
}

/// Loads a model from its tensors and its configuration.
pub(super) fn open<B: Backend>(
    tensors: Vec<TensorSnapshot>,
    described: Described,
    origin: &str,
    device: &B::Device,
) -> Result<Opened<B>, CheckpointError> {
    let Described { architecture, settings, in_chans, labels, input } = described;
    let shapes = Shapes::read(&tensors)?;
    settings.compare(&shapes)?;
    input.compare(&shapes, settings.img_size.is_some(), in_chans)?;
    let classes = shapes.num_classes.or(settings.num_classes()).unwrap_or(CLASSES);
    let config = checked(settings.config(&shapes, classes))?;
    let (normalization, note) = input.normalization(config.in_chans)?;
    let mut notes: Vec<String> = note.into_iter().collect();
    let card = Card {
        normalization,
        resizing: input.resizing()?,
        classes: names(labels, classes, &mut notes),
        description: format!("imported from timm's {architecture}, {origin}"),
        config,
    };
    fill(card, tensors, notes, device)
}

/// Loads a model from its tensors alone.
pub(super) fn open_bare<B: Backend>(
    tensors: Vec<TensorSnapshot>,
    origin: &str,
    device: &B::Device,
) -> Result<Opened<B>, CheckpointError> {
    let shapes = Shapes::read(&tensors)?;
    let classes = shapes.num_classes.unwrap_or(CLASSES);
    let (config, assumed) = bare::config(&shapes, classes)?;
    let config = checked(config)?;
    let unsaid = "the file does not say what its images were normalised with: mean and std 0.5 are used";
    let mut notes = vec![unsaid.to_string(), assumed];
    let card = Card {
        config,
        normalization: Normalization::HALF,
        resizing: Resizing::default(),
        classes: names(None, classes, &mut notes),
        description: format!("imported from timm's weights {origin}"),
    };
    fill(card, tensors, notes, device)
}

/// Checks the sizes before anything of them is made.
fn checked(config: ViTConfig) -> Result<ViTConfig, CheckpointError> {
    config.validate().map_err(|e| CheckpointError::Setting(e.to_string()))?;
    check_channels("in_chans", &config)?;
    Ok(config)
}

/// Makes the model of the card from the tensors.
fn fill<B: Backend>(
    card: Card,
    mut tensors: Vec<TensorSnapshot>,
    mut notes: Vec<String>,
    device: &B::Device,
) -> Result<Opened<B>, CheckpointError> {
    pad_positions(&mut tensors, &card.config)?;
    if layer_scale::is_there(&tensors) {
        tensors = layer_scale::multiplied(tensors)?;
        notes.push("the LayerScale of the blocks is multiplied into the layers in front of it".into());
    }
    let (model, more) = fill_from(&card.config, tensors, Naming::Timm, device)?;
    notes.splice(0..0, more);
    Ok(Opened { pretrained: Pretrained { model, card }, notes })
}

/// Returns the names of the classes, `LABEL_0` and so on where there are none.
fn names(labels: Option<Labels>, classes: usize, notes: &mut Vec<String>) -> Vec<String> {
    if let Some(labels) = labels {
        let names = labels.names();
        if names.len() == classes {
            return names;
        }
        let (count, instead) = (names.len(), "they are called LABEL_0 and so on");
        notes.push(format!("label_names does not name the {classes} classes of the head, but {count}: {instead}"));
    }
    (0..classes).map(|i| format!("LABEL_{i}")).collect()
}

/// Puts zeros in front of positions that cover the patches only.
fn pad_positions(tensors: &mut [TensorSnapshot], config: &ViTConfig) -> Result<(), CheckpointError> {
    let (prefix, tokens, d) = (config.num_prefix_tokens(), config.num_tokens(), config.embed_dim);
    for tensor in tensors {
        if tensor.full_path() == "pos_embed" && tensor.shape.to_vec() == [1, tokens - prefix, d] {
            let grid: Vec<f32> = values(tensor)?.to_vec().map_err(|e| CheckpointError::Malformed(format!("{e:?}")))?;
            let all = [vec![0.0; prefix * d], grid].concat();
            *tensor = called(of_values(all, vec![1, tokens, d]), "pos_embed");
        }
    }
    Ok(())
}
