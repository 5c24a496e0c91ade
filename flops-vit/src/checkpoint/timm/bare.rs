//! Files of timm's weights without a configuration.

use super::architectures::{all, with_defaults};
use super::settings::Settings;
use super::shapes::Shapes;
use crate::config::{Activation, Distillation, Pool, ViTConfig};
use crate::error::CheckpointError;

/// Width of a head where no model of timm's has those shapes.
const HEAD_DIM: usize = 64;

/// What tells the settings.
const REMEDY: &str = "open the folder with its config.json";

/// Returns the configuration of weights alone, and a note that says what was assumed.
///
/// Settings that show in no shape are those of timm's models with those shapes. Where there is none,
/// heads are 64 wide, and all else is as in the original ViT.
///
/// # Errors
/// Where timm's models with those shapes differ in their settings, or none is known and the shapes
/// leave the settings open.
pub(super) fn config(shapes: &Shapes, num_classes: usize) -> Result<(ViTConfig, String), CheckpointError> {
    let mut found: Vec<(String, ViTConfig)> = vec![];
    for (name, mut arguments) in all() {
        // the one unsupported setting that shows in no tensor
        let post_norm = arguments.get("block_fn").is_some_and(|block| block == "ResPostBlock");
        if post_norm {
            arguments.remove("block_fn");
            arguments.remove("init_values");
        }
        let Ok(settings) = Settings::read(with_defaults(arguments)) else { continue };
        if settings.fits(shapes) {
            if post_norm {
                let why = format!("the weights may be of timm's {name}, which normalises behind its layers");
                return Err(CheckpointError::Setting(format!("{why}; {REMEDY}")));
            }
            found.push((name, settings.config(shapes, num_classes)));
        }
    }
    let Some((name, config)) = found.first() else { return assumed(shapes, num_classes) };
    if let Some((other, _)) = found.iter().find(|(_, other)| other != config) {
        let why = format!("the weights may be of timm's {name} or {other}, whose settings differ");
        return Err(CheckpointError::Setting(format!("{why}; {REMEDY}")));
    }
    let note = format!("the file has no config.json: it is read as timm's {name}, {}", described(config));
    Ok((config.clone(), note))
}

fn assumed(shapes: &Shapes, num_classes: usize) -> Result<(ViTConfig, String), CheckpointError> {
    let width = shapes.embed_dim;
    if width == 0 || !width.is_multiple_of(HEAD_DIM) {
        let why =
            format!("embed_dim = {width} is no multiple of 64, and the file does not say how many heads there are");
        return Err(CheckpointError::Setting(format!("{why}; {REMEDY}")));
    }
    let pool = match (shapes.class_token, shapes.fc_norm) {
        (true, false) => Pool::Token,
        (_, true) => Pool::Avg,
        (false, false) => {
            let why = "the weights have no class token, and the file does not say how tokens are pooled";
            return Err(CheckpointError::Setting(format!("{why}; {REMEDY}")));
        }
    };
    let config = shapes.config(num_classes).with_num_heads(width / HEAD_DIM).with_pool(pool);
    let note = format!("the file has no config.json, and none of timm's models has its sizes: {}", described(&config));
    Ok((config, note))
}

/// What was assumed, in words.
fn described(config: &ViTConfig) -> String {
    let activation = match config.activation {
        Activation::Gelu => "GELU",
        Activation::GeluTanh => "GELU with tanh",
        Activation::QuickGelu => "quick GELU",
    };
    let pool = match (config.pool, config.distillation) {
        (Pool::Token, Distillation::None) => "the class token",
        (Pool::Token, _) => "the class and distillation tokens",
        (Pool::Avg, _) => "the mean of the patches",
        (Pool::Max | Pool::AvgMax, _) => "pooled patches",
    };
    let (heads, eps) = (config.num_heads, config.layer_norm_eps);
    format!("with {heads} heads, {activation}, norms with an ε of {eps:e}, and a head on {pool}")
}
