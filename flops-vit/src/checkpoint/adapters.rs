//! Files of adapters: what `lora:R` trains, without the base model.

use std::path::Path;

use burn::prelude::*;
use burn_store::{ModuleSnapshot, PathFilter, SafetensorsStore, TensorSnapshot};
use serde::{Deserialize, Serialize};

use super::card::{ADAPTER_KEY, CARD_KEY, Card};
use super::file::{check_intact, metadata, read};
use super::native::{store_bytes, write_bytes};
use super::pretrained::Pretrained;
use super::tensors::{ToFull, check_finite, of_safetensors, refuse};
use crate::config::{Activation, Distillation};
use crate::error::{CheckpointError, VitError};
use crate::layers::linear;
use crate::model::ViT;
use crate::scope::Scope;

/// The card of a file of adapters.
#[derive(Serialize, Deserialize)]
struct AdapterCard {
    rank: usize,
    card: Card,
}

impl<B: Backend> Pretrained<B> {
    /// Saves the adapters and the head in f32, without the rest of the model.
    ///
    /// [`load_adapters`] puts them on the base model. The file is written beside `path` and
    /// renamed.
    ///
    /// # Errors
    /// [`VitError::Save`] where the model has no adapters, the card does not fit the model, or a
    /// value is not finite. [`VitError::Write`] where the file cannot be written.
    pub fn save_adapters(&self, path: &Path) -> Result<(), VitError> {
        write_bytes(to_bytes(self), path)
    }
}

fn to_bytes<B: Backend>(pretrained: &Pretrained<B>) -> Result<Vec<u8>, String> {
    let Pretrained { model, card } = pretrained;
    card.fits(model)?;
    let rank = model.lora_rank().ok_or("the model has no adapters; put them in with ViT::with_lora")?;
    let described = serde_json::to_string(&AdapterCard { rank, card: card.clone() }).map_err(|e| e.to_string())?;
    let saved = of_adapters(model);
    check_finite(&saved).map_err(|e| e.to_string())?;
    let filter = PathFilter::new().with_full_paths(saved.iter().map(|t| t.full_path()));
    let store = SafetensorsStore::from_bytes(None).metadata(ADAPTER_KEY, described).filter(filter);
    store_bytes(model, store)
}

/// Collects the parameters that `lora:R` trains.
fn of_adapters<B: Backend>(model: &ViT<B>) -> Vec<TensorSnapshot> {
    model.collect(None, None, false).into_iter().filter(|t| is_adapter(&t.full_path())).collect()
}

/// Returns whether `lora:R` trains the parameter of that name.
fn is_adapter(name: &str) -> bool {
    let path: Vec<&str> = name.split('.').collect();
    // the depth matters to scopes of some blocks only
    Scope::Lora(1).trains(&path, 0)
}

/// Puts the adapters and the head of a file that [`Pretrained::save_adapters`] wrote on `base`.
///
/// `base` must be the model that they were trained on: its sizes are checked, its weights cannot
/// be. Its own head and adapters are replaced. [`ViT::merged`] removes the adapters again.
///
/// # Errors
/// [`VitError::Checkpoint`] where the file is missing or damaged, holds no adapters, or belongs to
/// a model of other sizes. Parameters that are missing, unknown or of another shape are listed.
pub fn load_adapters<B: Backend>(base: ViT<B>, path: &Path) -> Result<Pretrained<B>, VitError> {
    read(path)
        .and_then(|bytes| from_bytes(base, bytes))
        .map_err(|why| VitError::Checkpoint { path: path.display().to_string(), why })
}

fn from_bytes<B: Backend>(base: ViT<B>, bytes: Vec<u8>) -> Result<Pretrained<B>, CheckpointError> {
    check_intact(&bytes)?;
    let metadata = metadata(&bytes)?;
    let described = match metadata.get(ADAPTER_KEY) {
        Some(described) => described,
        None if metadata.contains_key(CARD_KEY) => return Err(CheckpointError::NoAdapters),
        None => return Err(CheckpointError::NoCard { key: CARD_KEY }),
    };
    let AdapterCard { rank, card } =
        serde_json::from_str(described).map_err(|e| CheckpointError::Card(e.to_string()))?;
    card.check().map_err(CheckpointError::Card)?;
    if !(1..=card.config.embed_dim).contains(&rank) {
        let why = format!("rank = {rank}, embed_dim = {}", card.config.embed_dim);
        return Err(CheckpointError::Card(why));
    }
    let other = differences(&base, &card);
    if !other.is_empty() {
        return Err(CheckpointError::OtherBase(other));
    }
    let tensors = of_safetensors(bytes)?;
    if let Some(tensor) = tensors.iter().find(|t| !t.dtype.is_float()) {
        return Err(CheckpointError::DType { name: tensor.full_path(), dtype: format!("{:?}", tensor.dtype) });
    }
    // lazy parameters: shapes are compared before anything is allocated
    let device = base.head.weight.device();
    let mut model = base.with_lazy_lora(rank).map_err(|e| CheckpointError::Card(e.to_string()))?;
    let head = || linear(card.config.embed_dim, card.config.num_classes, true, &device);
    (model.head, model.head_dist) = (head(), (card.config.distillation == Distillation::Head).then(head));
    let (ours, others): (Vec<_>, Vec<_>) = tensors.into_iter().partition(|t| is_adapter(&t.full_path()));
    let mut result = model.apply(ours, None, Some(Box::new(ToFull)), false);
    // all other parameters come from the base
    result.missing.retain(|(name, _)| is_adapter(name));
    result.unused.extend(others.iter().map(|t| t.full_path()));
    refuse(result)?;
    check_finite(&of_adapters(&model))?;
    Ok(Pretrained { model, card })
}

/// Lists the sizes in which `base` differs from the model of the card.
///
/// Some of them show in no shape of an adapter.
fn differences<B: Backend>(base: &ViT<B>, card: &Card) -> Vec<String> {
    let config = &card.config;
    let [embed_dim, in_chans, patch_size, _] = base.patch_embed.weight.dims();
    let (block, tokens) = (base.blocks.first(), base.pos_embed.dims()[1]);
    let kinds = [
        ("pool", format!("{:?}", base.pool), format!("{:?}", config.pool)),
        ("fc_norm", base.fc_norm.to_string(), config.fc_norm.to_string()),
        (
            "activation",
            format!("{:?}", block.map_or(Activation::default(), |b| b.activation)),
            format!("{:?}", config.activation),
        ),
    ];
    [
        ("embed_dim", embed_dim, config.embed_dim),
        ("depth", base.blocks.len(), config.depth),
        ("num_heads", block.map_or(0, |b| b.attn.num_heads), config.num_heads),
        ("in_chans", in_chans, config.in_chans),
        ("patch_size", patch_size, config.patch_size),
        ("tokens", tokens, config.num_tokens()),
        ("mlp width", block.map_or(0, |b| b.fc1.weight.dims()[1]), config.mlp_dim()),
    ]
    .map(|(name, found, expected)| (name, found.to_string(), expected.to_string()))
    .into_iter()
    .chain(kinds)
    .filter(|(_, found, expected)| found != expected)
    .map(|(name, found, expected)| format!("{name} = {expected}, this one has {found}"))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::super::load;
    use super::super::tests::{card, changed, file, model, position, values};
    use super::*;
    use burn::backend::Flex;
    use burn::tensor::Distribution;
    use safetensors::{Dtype, SafeTensors};

    /// A base model, and the same with trained adapters and a new head.
    fn tuned() -> (ViT<Flex>, ViT<Flex>) {
        let base = model();
        let mut tuned = base.clone().with_new_head(3, 1).with_lora(2, 1).unwrap();
        for block in &mut tuned.blocks {
            for lora in [&mut block.attn.query_lora, &mut block.attn.value_lora].into_iter().flatten() {
                lora.up.weight = lora.up.weight.clone().map(|up| up.random_like(Distribution::Normal(0.0, 0.5)));
            }
        }
        (base, tuned)
    }

    fn with_card(model: &ViT<Flex>) -> Pretrained<Flex> {
        Pretrained { model: model.clone(), card: card() }
    }

    fn saved(tuned: &ViT<Flex>) -> Vec<u8> {
        let (dir, path) = file("adapters.safetensors", b"what was there before");
        with_card(tuned).save_adapters(&path).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no partial file stays");
        std::fs::read(path).unwrap()
    }

    fn error(base: ViT<Flex>, bytes: Vec<u8>) -> CheckpointError {
        from_bytes(base, bytes).expect_err("adapters that do not fit")
    }

    #[test]
    fn adapters_round_trip_bit_by_bit() {
        let (base, tuned) = tuned();
        let bytes = saved(&tuned);
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.len(), 2 * 4 + 2, "{:?}", file.names());
        assert!(file.names().iter().all(|name| name.starts_with("head.") || name.contains("_lora.")));
        // the base's own head and adapters do not matter
        for base in [base.clone(), base.with_new_head(5, 2).with_lora(4, 2).unwrap()] {
            let loaded = from_bytes(base, bytes.clone()).unwrap();
            assert_eq!(values(&tuned), values(&loaded.model));
            assert_eq!(loaded.card, card());
        }
    }

    #[test]
    fn saved_models_have_merged_adapters() {
        let (_, tuned) = tuned();
        let (_dir, path) = file("model.safetensors", b"");
        with_card(&tuned).save(&path).unwrap();
        let loaded = load::<Flex>(&path, &Default::default()).unwrap();
        assert_eq!(values(&tuned.merged()), values(&loaded.model));
    }

    #[test]
    fn errors_name_the_other_kind_of_file() {
        let (base, tuned) = tuned();
        let (_dir, path) = file("file.safetensors", b"");
        with_card(&tuned).save_adapters(&path).unwrap();
        let as_model = load::<Flex>(&path, &Default::default()).unwrap_err().to_string();
        assert!(as_model.contains("file.safetensors") && as_model.contains("load_adapters"), "{as_model}");
        with_card(&tuned).save(&path).unwrap();
        let as_adapters = load_adapters(base.clone(), &path).unwrap_err().to_string();
        assert!(as_adapters.contains("whole model"), "{as_adapters}");
        let unnamed = changed(&saved(&tuned), |_, metadata| metadata.clear());
        assert!(matches!(error(base, unnamed), CheckpointError::NoCard { key: CARD_KEY }));
    }

    #[test]
    fn mismatched_adapters_are_errors() {
        let (base, tuned) = tuned();
        let whole = saved(&tuned);
        // another base
        let wide = card().config.with_embed_dim(16).with_num_heads(4).with_depth(3);
        match error(wide.init(&Default::default()).unwrap(), whole.clone()) {
            CheckpointError::OtherBase(why) => assert_eq!(
                why,
                [
                    "embed_dim = 8, this one has 16",
                    "depth = 2, this one has 3",
                    "num_heads = 2, this one has 4",
                    "mlp width = 24, this one has 48"
                ]
            ),
            other => panic!("{other}"),
        }
        // keys
        let few =
            changed(&whole, |tensors, _| tensors.retain(|t| !t.0.contains("1.attn.value_lora") && t.0 != "head.bias"));
        match error(base.clone(), few) {
            CheckpointError::Missing(names) => assert_eq!(
                names,
                ["blocks.1.attn.value_lora.down.weight", "blocks.1.attn.value_lora.up.weight", "head.bias"]
            ),
            other => panic!("{other}"),
        }
        let many = changed(&whole, |tensors, _| {
            for name in ["blocks.2.attn.query_lora.up.weight", "norm.gamma"] {
                tensors.push((name.into(), Dtype::F32, vec![8], vec![0; 32]));
            }
        });
        match error(base.clone(), many) {
            CheckpointError::Unexpected(names) => {
                assert_eq!(names, ["blocks.2.attn.query_lora.up.weight", "norm.gamma"]);
            }
            other => panic!("{other}"),
        }
        let turned = changed(&whole, |tensors, _| {
            for name in ["blocks.0.attn.query_lora.up.weight", "head.weight"] {
                let at = position(tensors, name);
                tensors[at].2.reverse();
            }
        });
        let turned = error(base.clone(), turned).to_string();
        assert!(turned.contains("query_lora.up.weight is [8, 2], expected [2, 8]"), "{turned}");
        assert!(turned.contains("head.weight is [3, 8], expected [8, 3]"), "{turned}");
        // values
        let diverged = changed(&whole, |tensors, _| {
            let at = position(tensors, "blocks.0.attn.query_lora.up.weight");
            tensors[at].3[4..8].copy_from_slice(&f32::NAN.to_le_bytes());
        });
        assert!(error(base.clone(), diverged).to_string().contains("'blocks.0.attn.query_lora.up.weight'"));
        let counted = changed(&whole, |tensors, _| {
            let at = position(tensors, "head.bias");
            tensors[at].1 = Dtype::I32;
        });
        assert!(matches!(error(base.clone(), counted), CheckpointError::DType { .. }));
        // cards
        for (from, to) in
            [(r#""rank":2"#, r#""rank":0"#), (r#""rank":2"#, r#""rank":9"#), (r#""two""#, r#""two","three""#)]
        {
            let damaged = changed(&whole, |_, metadata| {
                let card = metadata[ADAPTER_KEY].replace(from, to);
                assert_ne!(card, metadata[ADAPTER_KEY]);
                metadata.insert(ADAPTER_KEY.into(), card);
            });
            assert!(matches!(error(base.clone(), damaged), CheckpointError::Card(_)), "{to}");
        }
        for length in [0, 7, 100, whole.len() - 1] {
            let cut = error(base.clone(), whole[..length].to_vec());
            assert!(matches!(cut, CheckpointError::Empty | CheckpointError::Malformed(_)), "{length} bytes: {cut}");
        }
        let nowhere = load_adapters(base, Path::new("no/such/file")).unwrap_err().to_string();
        assert!(nowhere.contains("no/such/file"), "{nowhere}");
    }

    #[test]
    fn save_errors_name_the_cause() {
        let (base, mut tuned) = tuned();
        let (_dir, path) = file("adapters.safetensors", b"the old one");
        let refused = |model: &ViT<Flex>| with_card(model).save_adapters(&path).unwrap_err().to_string();
        assert!(refused(&base).contains("no adapters"));
        assert!(refused(&tuned.clone().with_new_head(4, 0)).contains("3 classes"));
        tuned.head.weight = tuned.head.weight.map(|w| w / 0.0);
        assert!(refused(&tuned).contains("'head.weight'"));
        assert_eq!(std::fs::read(&path).unwrap(), b"the old one");
    }
}
