//! What timm's names of vision transformers mean.
//!
//! `architectures.json` holds the arguments of every name that timm 1.0.31 registers, as
//! `architectures.py` reads them off timm's source.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

/// Arguments of the constructor, by name.
pub(super) type Arguments = Map<String, Value>;

/// Returns the arguments of all names; those with the constructor's defaults are left out.
pub(super) fn all() -> BTreeMap<String, Arguments> {
    serde_json::from_str(include_str!("architectures.json")).expect("the table is JSON, as a test checks")
}

/// Returns the arguments of a name, with the constructor's defaults. The tag that may follow it is
/// no part of the name.
pub(super) fn of(architecture: &str) -> Option<Arguments> {
    let name = architecture.split('.').next().unwrap_or(architecture);
    all().remove(name).map(with_defaults)
}

/// Adds the defaults of timm's `VisionTransformer` for sizes, and for what shows in the tensors.
pub(super) fn with_defaults(arguments: Arguments) -> Arguments {
    let defaults = json!({
        "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4, "qkv_bias": true,
        "class_token": true, "distilled": false,
    });
    let mut all = match defaults {
        Value::Object(defaults) => defaults,
        _ => Arguments::new(),
    };
    all.extend(arguments);
    all
}
