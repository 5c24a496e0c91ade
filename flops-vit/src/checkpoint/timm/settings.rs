//! The arguments of the constructor of timm's `VisionTransformer`: honoured, compared with the
//! weights, or refused by name.

use serde_json::Value;

use super::architectures::Arguments;
use super::shapes::Shapes;
use crate::config::{Activation, Distillation, Pool, ViTConfig};
use crate::error::CheckpointError;

/// ε of timm's `LayerNorm`.
const LAYER_NORM_EPS: f64 = 1e-6;

/// Settings of training, and of input sizes other than the model's: they change nothing here.
#[rustfmt::skip]
const IGNORED: [&str; 13] = [
    "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
    "weight_init", "fix_init", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "pretrained_strict",
    "out_indices",
];

/// Arguments that have one supported value, or several that mean the same.
#[rustfmt::skip]
const FIXED: [(&str, &[&str]); 17] = [
    ("class", &["VisionTransformer"]),
    ("block_fn", &["Block"]),
    ("pre_norm", &["false"]),
    ("reg_tokens", &["0"]),
    ("qk_norm", &["false"]),
    ("scale_attn_norm", &["false"]),
    ("scale_mlp_norm", &["false"]),
    ("proj_bias", &["true"]),
    ("pos_embed", &["learn"]),
    ("final_norm", &["true"]),
    ("pool_include_prefix", &["false"]),
    ("embed_layer", &["PatchEmbed"]),
    ("embed_norm_layer", &[""]),
    ("mlp_layer", &["Mlp", "mlp"]),
    ("attn_layer", &["attn", "Attention", ""]),
    ("use_naflex", &["false"]),
    ("features_only", &["false"]),
];

/// What the arguments say that shows in no shape, and what is compared with the shapes.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Settings {
    pub num_heads: usize,
    pub pool: Pool,
    pub activation: Activation,
    pub layer_norm_eps: f64,
    /// Height and width of the input, where they are given.
    pub img_size: Option<[usize; 2]>,
    /// Sizes of the weights, where they are given.
    given: Arguments,
}

fn unsupported(field: &'static str, value: &Value, supported: &str) -> CheckpointError {
    CheckpointError::Unsupported { field, value: text(value), supported: supported.into() }
}

/// A value as text, a string without its quotes.
fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), String::from)
}

fn wrong(key: &str, value: &Value, expected: &str) -> CheckpointError {
    CheckpointError::Setting(format!("{key} = {value}; {expected} is expected"))
}

fn whole(key: &str, value: &Value) -> Result<usize, CheckpointError> {
    let number = value.as_u64().and_then(|n| usize::try_from(n).ok());
    number.ok_or_else(|| wrong(key, value, "a whole number"))
}

/// Returns a size as height and width; one number is both.
pub(super) fn pair(key: &str, value: &Value) -> Result<[usize; 2], CheckpointError> {
    match value.as_array().map(Vec::as_slice) {
        None => whole(key, value).map(|side| [side; 2]),
        Some([height, width]) => Ok([whole(key, height)?, whole(key, width)?]),
        Some(_) => Err(wrong(key, value, "a whole number, or a pair of them,")),
    }
}

impl Settings {
    /// Reads the arguments: those of an architecture, overridden by those of the file. `num_heads`
    /// is among them or has the constructor's default.
    pub fn read(arguments: Arguments) -> Result<Self, CheckpointError> {
        let mut settings = Self {
            num_heads: 12,
            pool: Pool::Token,
            activation: Activation::Gelu,
            layer_norm_eps: LAYER_NORM_EPS,
            img_size: None,
            given: Arguments::new(),
        };
        for (key, value) in arguments {
            settings.set(key, value)?;
        }
        Ok(settings)
    }

    fn set(&mut self, key: String, value: Value) -> Result<(), CheckpointError> {
        if let Some(&(field, supported)) = FIXED.iter().find(|(field, _)| *field == key) {
            return match supported.contains(&text(&value).as_str()) {
                true => Ok(()),
                false => Err(unsupported(field, &value, supported[0])),
            };
        }
        match key.as_str() {
            "num_heads" => self.num_heads = whole(&key, &value)?,
            "norm_eps" => self.layer_norm_eps = value.as_f64().ok_or_else(|| wrong(&key, &value, "a number"))?,
            "norm_layer" if is_layer_norm(&text(&value)) => {}
            "norm_layer" => return Err(unsupported("norm_layer", &value, "layernorm")),
            "global_pool" => self.pool = pool(&value)?,
            "act_layer" => self.activation = activation(&value)?,
            "img_size" => self.img_size = Some(pair(&key, &value)?),
            "patch_size" => {
                let [height, width] = pair(&key, &value)?;
                if height != width {
                    return Err(unsupported("patch_size", &value, "a square"));
                }
                self.given.insert(key, height.into());
            }
            "in_chans" | "embed_dim" | "depth" => {
                whole(&key, &value)?;
                self.given.insert(key, value);
            }
            // of -1 and 0 nothing is built; the head is that of the weights
            "num_classes" => {
                if let Some(classes) = value.as_u64().filter(|&classes| classes > 0) {
                    self.given.insert(key, classes.into());
                }
            }
            "mlp_ratio" | "init_values" => {
                value.as_f64().ok_or_else(|| wrong(&key, &value, "a number"))?;
                self.given.insert(key, value);
            }
            "class_token" | "qkv_bias" | "fc_norm" | "distilled" | "no_embed_class" => {
                value.as_bool().ok_or_else(|| wrong(&key, &value, "true or false"))?;
                self.given.insert(key, value);
            }
            key if IGNORED.contains(&key) => {}
            _ => {
                let why = format!("model_args has {key} = {value}, which is not known of timm's VisionTransformer");
                return Err(CheckpointError::Setting(format!("{why}; remove it if it does not change the model")));
            }
        }
        Ok(())
    }

    /// Returns the number of classes, where it is given.
    pub fn num_classes(&self) -> Option<usize> {
        self.given.get("num_classes").and_then(Value::as_u64).map(|classes| classes as usize)
    }

    /// Compares what is given with the shapes of the weights.
    pub fn compare(&self, shapes: &Shapes) -> Result<(), CheckpointError> {
        let differs = |key: &str, given: &Value, found: String| {
            let why = format!("the settings say {key} = {given}, the weights have {found}");
            Err(CheckpointError::Setting(format!("{why}; take both from the same model")))
        };
        for (key, given) in &self.given {
            let found: Value = match key.as_str() {
                "in_chans" => shapes.in_chans.into(),
                "embed_dim" => shapes.embed_dim.into(),
                "depth" => shapes.depth.into(),
                "patch_size" => shapes.patch_size.into(),
                "class_token" => shapes.class_token.into(),
                "qkv_bias" => shapes.qkv_bias.into(),
                "fc_norm" => shapes.fc_norm.into(),
                "distilled" => (shapes.distillation != Distillation::None).into(),
                "num_classes" => match shapes.num_classes {
                    Some(classes) => classes.into(),
                    None => continue,
                },
                "mlp_ratio" => {
                    // as timm computes it
                    let hidden = (shapes.embed_dim as f64 * given.as_f64().unwrap_or_default()) as usize;
                    match hidden == shapes.mlp_dim {
                        true => continue,
                        false => return differs(key, given, format!("an MLP of width {}", shapes.mlp_dim)),
                    }
                }
                // LayerScale and positions without the class token show in the tensors
                _ => continue,
            };
            if *given != found {
                return differs(key, given, found.to_string());
            }
        }
        if let Some(size) = self.img_size {
            compare_sizes("img_size", size, shapes)?;
        }
        Ok(())
    }

    /// Whether weights of those shapes are the settings' own.
    pub fn fits(&self, shapes: &Shapes) -> bool {
        // the constructor's default of fc_norm
        let fc_norm = self.given.get("fc_norm").and_then(Value::as_bool).unwrap_or(self.pool != Pool::Token);
        let layer_scale = self.given.contains_key("init_values");
        self.compare(shapes).is_ok() && (fc_norm, layer_scale) == (shapes.fc_norm, shapes.layer_scale)
    }

    /// Returns the configuration of a model with these settings and shapes.
    pub fn config(&self, shapes: &Shapes, num_classes: usize) -> ViTConfig {
        let sizes = shapes.config(num_classes);
        sizes
            .with_fc_norm(shapes.fc_norm || self.pool == Pool::Token)
            .with_num_heads(self.num_heads)
            .with_pool(self.pool)
            .with_activation(self.activation)
            .with_layer_norm_eps(self.layer_norm_eps)
    }
}

/// Compares an image size with the positions of the weights.
pub(super) fn compare_sizes(
    key: &'static str,
    [height, width]: [usize; 2],
    shapes: &Shapes,
) -> Result<(), CheckpointError> {
    let value = format!("{height} × {width}");
    let patch = shapes.patch_size;
    let unsupported =
        |supported: String| Err(CheckpointError::Unsupported { field: key, value: value.clone(), supported });
    if height != width {
        return unsupported("a square".into());
    }
    if !height.is_multiple_of(patch) {
        // timm leaves out the pixels beyond the last whole patch
        return unsupported(format!("a multiple of the patch size {patch}"));
    }
    match height == shapes.img_size {
        true => Ok(()),
        false => Err(CheckpointError::Setting(format!(
            "{key} = {value}, and the weights have positions for {} pixels; set it to that, and resize the model later",
            shapes.img_size
        ))),
    }
}

/// Whether timm's factory makes a layer normalisation with an ε of 10⁻⁶ for the name.
fn is_layer_norm(name: &str) -> bool {
    ["", "layernorm", "layernormfp32"].contains(&name.replace('_', "").to_lowercase().as_str())
}

fn pool(value: &Value) -> Result<Pool, CheckpointError> {
    match value.as_str() {
        Some("token") => Ok(Pool::Token),
        Some("avg") => Ok(Pool::Avg),
        Some("max") => Ok(Pool::Max),
        Some("avgmax") => Ok(Pool::AvgMax),
        _ => Err(unsupported("global_pool", value, "token, avg, max or avgmax")),
    }
}

fn activation(value: &Value) -> Result<Activation, CheckpointError> {
    match value.as_str().map(str::to_lowercase).as_deref() {
        Some("" | "gelu") => Ok(Activation::Gelu),
        Some("gelu_tanh") => Ok(Activation::GeluTanh),
        Some("quick_gelu") => Ok(Activation::QuickGelu),
        _ => Err(unsupported("act_layer", value, "gelu, gelu_tanh or quick_gelu")),
    }
}
