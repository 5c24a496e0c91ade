//! Adapters on their own: what `lora:R` trains, without the model it was trained on.

use std::path::Path;

use burn::prelude::*;
use burn_store::{ModuleSnapshot, PathFilter, SafetensorsStore, TensorSnapshot};
use serde::{Deserialize, Serialize};

use super::tensors::{ToFull, check_finite, check_intact, of_safetensors, read, refuse};
use super::{Card, metadata, write_store};
use crate::config::Distillation;
use crate::error::{CheckpointError, VitError};
use crate::model::{ViT, linear};
use crate::scope::Scope;

/// The key of an [`AdapterCard`] in the metadata of a file.
pub(super) const ADAPTER_KEY: &str = "flops-lora";

/// What a file of adapters says of itself.
#[derive(Serialize, Deserialize)]
struct AdapterCard {
    rank: usize,
    card: Card,
}

/// Saves the adapters and the head of a model, in full precision, without the rest; written beside its place and renamed.
///
/// `card` is that of the whole model, with the classes of this head. [`load_adapters`] puts them on the base model again.
///
/// # Errors
/// [`VitError::Save`] where the model has no adapters, the card does not fit it, a value is not finite, or the file cannot be
/// written.
pub fn save_adapters<B: Backend>(model: &ViT<B>, card: &Card, path: &Path) -> Result<(), VitError> {
    let failed = |why: String| VitError::Save { path: path.to_path_buf(), why };
    card.fits(model).map_err(failed)?;
    let rank =
        model.lora_rank().ok_or_else(|| failed("the model has no adapters; put them in with ViT::with_lora".into()))?;
    let described = serde_json::to_string(&AdapterCard { rank, card: card.clone() });
    let described = described.map_err(|e| failed(e.to_string()))?;
    let saved = of_adapters(model);
    check_finite(&saved).map_err(|e| failed(e.to_string()))?;
    let filter = PathFilter::new().with_full_paths(saved.iter().map(|t| t.full_path()));
    let store = SafetensorsStore::from_bytes(None).metadata(ADAPTER_KEY, described).filter(filter);
    write_store(model, store, path).map_err(failed)
}

/// The parameters that `lora:R` trains.
fn of_adapters<B: Backend>(model: &ViT<B>) -> Vec<TensorSnapshot> {
    model.collect(None, None, false).into_iter().filter(|t| is_adapter(&t.full_path())).collect()
}

/// Whether the parameter of that name is one that `lora:R` trains.
fn is_adapter(name: &str) -> bool {
    let path: Vec<&str> = name.split('.').collect();
    // only scopes of some blocks ask for the depth
    Scope::Lora(1).trains(&path, 0)
}

/// Puts the adapters and the head that [`save_adapters`] wrote on `base`, and returns the card of the whole.
///
/// `base` has to be the model that they were trained on: sizes are compared, weights cannot be. Its own head and adapters go.
/// [`ViT::merged`] makes a model without adapters of the result.
///
/// # Errors
/// [`VitError::Checkpoint`] where the file is missing or damaged, holds no adapters, or those of a model of other sizes: parameters
/// that are missing, too many or of another shape are listed.
pub fn load_adapters<B: Backend>(base: ViT<B>, path: &Path) -> Result<(ViT<B>, Card), VitError> {
    read(path)
        .and_then(|bytes| from_bytes(base, bytes))
        .map_err(|why| VitError::Checkpoint { path: path.display().to_string(), why })
}

fn from_bytes<B: Backend>(base: ViT<B>, bytes: Vec<u8>) -> Result<(ViT<B>, Card), CheckpointError> {
    check_intact(&bytes)?;
    let metadata = metadata(&bytes)?;
    let described = match metadata.get(ADAPTER_KEY) {
        Some(described) => described,
        None if metadata.contains_key(super::CARD_KEY) => return Err(CheckpointError::NoAdapters),
        None => return Err(CheckpointError::NoCard),
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
    // lazy: shapes are compared before anything is allocated
    let device = base.head.weight.device();
    let mut model = base.with_lazy_lora(rank).map_err(|e| CheckpointError::Card(e.to_string()))?;
    let head = || linear(card.config.embed_dim, card.config.num_classes, true, &device);
    (model.head, model.head_dist) = (head(), (card.config.distillation == Distillation::Head).then(head));
    let (ours, others): (Vec<_>, Vec<_>) = tensors.into_iter().partition(|t| is_adapter(&t.full_path()));
    let mut result = model.apply(ours, None, Some(Box::new(ToFull)), false);
    // the base has the rest
    result.missing.retain(|(name, _)| is_adapter(name));
    result.unused.extend(others.iter().map(|t| t.full_path()));
    refuse(result)?;
    check_finite(&of_adapters(&model))?;
    Ok((model, card))
}

/// In which settings `base` is not the model of the card: those that show in no shape of an adapter too.
fn differences<B: Backend>(base: &ViT<B>, card: &Card) -> Vec<String> {
    let config = &card.config;
    let [embed_dim, in_chans, patch_size, _] = base.patch_embed.weight.dims();
    let (block, tokens) = (base.blocks.first(), base.pos_embed.dims()[1]);
    [
        ("embed_dim", embed_dim, config.embed_dim),
        ("depth", base.blocks.len(), config.depth),
        ("num_heads", block.map_or(0, |b| b.attn.num_heads), config.num_heads),
        ("in_chans", in_chans, config.in_chans),
        ("patch_size", patch_size, config.patch_size),
        ("tokens", tokens, config.num_tokens()),
        ("mlp width", block.map_or(0, |b| b.fc1.weight.dims()[1]), config.mlp_dim()),
    ]
    .into_iter()
    .filter(|(_, found, expected)| found != expected)
    .map(|(name, found, expected)| format!("{name} = {expected}, this one has {found}"))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{card, changed, file, model, position, values};
    use super::super::{load, save};
    use super::*;
    use burn::backend::Flex;
    use burn::tensor::Distribution;
    use safetensors::{Dtype, SafeTensors};

    /// A model with adapters and a head of its own, and the one beneath.
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

    fn saved(tuned: &ViT<Flex>) -> Vec<u8> {
        let (_dir, path) = file("adapters.safetensors", b"what was there before");
        save_adapters(tuned, &card(), &path).unwrap();
        assert!(!path.with_file_name("adapters.safetensors.partial").exists());
        std::fs::read(path).unwrap()
    }

    fn error(base: ViT<Flex>, bytes: Vec<u8>) -> CheckpointError {
        from_bytes(base, bytes).expect_err("adapters that do not fit")
    }

    #[test]
    fn adapters_come_back_bit_by_bit_on_their_base() {
        let (base, tuned) = tuned();
        let bytes = saved(&tuned);
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.len(), 2 * 4 + 2, "{:?}", file.names());
        assert!(file.names().iter().all(|name| name.starts_with("head.") || name.contains("_lora.")));
        // whatever head and adapters the base has
        for base in [base.clone(), base.with_new_head(5, 2).with_lora(4, 2).unwrap()] {
            let (loaded, read) = from_bytes(base, bytes.clone()).unwrap();
            assert_eq!(values(&tuned), values(&loaded));
            assert_eq!(read, card());
        }
    }

    #[test]
    fn a_whole_model_is_saved_without_adapters() {
        let (_, tuned) = tuned();
        let (_dir, path) = file("model.safetensors", b"");
        save(&tuned, &card(), &path, false).unwrap();
        let (loaded, _) = load::<Flex>(&path, &Default::default()).unwrap();
        assert_eq!(values(&tuned.merged()), values(&loaded));
    }

    #[test]
    fn each_kind_of_file_names_the_other() {
        let (base, tuned) = tuned();
        let (_dir, path) = file("file.safetensors", b"");
        save_adapters(&tuned, &card(), &path).unwrap();
        let as_model = load::<Flex>(&path, &Default::default()).unwrap_err().to_string();
        assert!(as_model.contains("file.safetensors") && as_model.contains("load_adapters"), "{as_model}");
        save(&tuned, &card(), &path, false).unwrap();
        let as_adapters = load_adapters(base.clone(), &path).unwrap_err().to_string();
        assert!(as_adapters.contains("whole model"), "{as_adapters}");
        let unnamed = changed(&saved(&tuned), |_, metadata| metadata.clear());
        assert!(matches!(error(base, unnamed), CheckpointError::NoCard));
    }

    #[test]
    fn adapters_that_do_not_fit_are_errors() {
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
    fn what_cannot_be_saved_is_named() {
        let (base, mut tuned) = tuned();
        let (_dir, path) = file("adapters.safetensors", b"the old one");
        let refused = |model: &ViT<Flex>| save_adapters(model, &card(), &path).unwrap_err().to_string();
        assert!(refused(&base).contains("no adapters"));
        assert!(refused(&tuned.clone().with_new_head(4, 0)).contains("3 classes"));
        tuned.head.weight = tuned.head.weight.map(|w| w / 0.0);
        assert!(refused(&tuned).contains("'head.weight'"));
        assert_eq!(std::fs::read(&path).unwrap(), b"the old one");
    }
}
