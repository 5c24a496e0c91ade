//! Round trips, and damaged checkpoints.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use burn::backend::Flex;
use burn::prelude::*;
use burn::tensor::quantization::QuantStore;
use burn_store::{BurnToPyTorchAdapter, ModuleSnapshot, SafetensorsStore};
use flops_core::quantize::{QuantizeConfig, WeightScheme};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use tempfile::TempDir;

use super::card::CARD_KEY;
use super::names::Naming;
use super::native::from_bytes;
use super::*;
use crate::config::ViTConfig;
use crate::error::{CheckpointError, VitError};
use crate::model::ViT;
use crate::normalization::Normalization;
use crate::resizing::Resizing;

pub(super) type Tensors = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

pub(super) fn config() -> ViTConfig {
    let config = ViTConfig::new().with_img_size(8).with_patch_size(4).with_embed_dim(8).with_depth(2).with_num_heads(2);
    config.with_mlp_ratio(3.0).with_num_classes(3)
}

pub(super) fn model() -> ViT<Flex> {
    config().init(&Default::default()).unwrap()
}

/// The model with its card.
fn pretrained_of(model: &ViT<Flex>) -> Pretrained<Flex> {
    Pretrained { model: model.clone(), card: card() }
}

pub(super) fn card() -> Card {
    let classes = ["zero", "one", "two"].map(String::from).to_vec();
    Card {
        config: config(),
        normalization: Normalization::CIFAR10,
        resizing: Resizing::default(),
        classes,
        description: "of a test".into(),
    }
}

/// Values of all parameters by name.
pub(super) fn values(model: &ViT<Flex>) -> Vec<(String, Vec<f32>)> {
    let tensors = model.collect(None, None, false);
    tensors.iter().map(|t| (t.full_path(), t.to_data().unwrap().to_vec().unwrap())).collect()
}

/// A new folder with a file `name` of those bytes.
pub(super) fn file(name: &str, bytes: &[u8]) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    (dir, path)
}

/// The bytes of a checkpoint.
fn saved() -> Vec<u8> {
    let (_dir, path) = file("model.safetensors", b"");
    pretrained_of(&model()).save(&path).unwrap();
    std::fs::read(path).unwrap()
}

/// The same checkpoint after `change`.
pub(super) fn changed(bytes: &[u8], change: impl FnOnce(&mut Tensors, &mut HashMap<String, String>)) -> Vec<u8> {
    let (_, header) = SafeTensors::read_metadata(bytes).unwrap();
    let mut metadata = header.metadata().clone().unwrap_or_default();
    let file = SafeTensors::deserialize(bytes).unwrap();
    let mut tensors: Tensors =
        file.tensors().into_iter().map(|(n, t)| (n, t.dtype(), t.shape().to_vec(), t.data().to_vec())).collect();
    change(&mut tensors, &mut metadata);
    let views =
        tensors.iter().map(|(n, dtype, shape, data)| (n, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    safetensors::serialize(views, Some(metadata)).unwrap()
}

fn error(bytes: Vec<u8>) -> CheckpointError {
    from_bytes::<Flex>(bytes, &Default::default()).expect_err("a damaged checkpoint")
}

pub(super) fn position(tensors: &Tensors, name: &str) -> usize {
    tensors.iter().position(|t| t.0 == name).unwrap()
}

#[test]
fn f32_round_trips_bit_by_bit() {
    let (dir, path) = file("model.safetensors", b"what was there before");
    let model = model();
    pretrained_of(&model).save(&path).unwrap();
    let loaded = load::<Flex>(&path, &Default::default()).unwrap();
    assert_eq!(values(&model), values(&loaded.model));
    assert_eq!(loaded.card, card());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no partial file stays");
}

#[test]
fn f16_round_trips_within_rounding() {
    let (_dir, path) = file("model.safetensors", b"");
    let model = model();
    pretrained_of(&model).save_half(&path).unwrap();
    let loaded = load::<Flex>(&path, &Default::default()).unwrap();
    assert_eq!(loaded.card, card());
    for ((name, a), (_, b)) in values(&model).into_iter().zip(values(&loaded.model)) {
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 1e-3), "{name} differs");
    }
    // every parameter is stored in two bytes
    let bytes = std::fs::read(path).unwrap();
    assert!(SafeTensors::deserialize(&bytes).unwrap().tensors().iter().all(|(_, t)| t.dtype() == Dtype::F16));
}

#[test]
fn shipped_checkpoint_loads() {
    let Pretrained { model, card } = pretrained::<Flex>(&Default::default()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(card.config, ViTConfig::vit_micro_patch4_32());
    assert_eq!(Module::num_params(&model), card.config.num_params());
}

#[test]
fn damaged_files_are_errors() {
    let missing = load::<Flex>(Path::new("no/such/file"), &Default::default()).unwrap_err();
    assert!(matches!(missing, VitError::Checkpoint { why: CheckpointError::Read(_), .. }));
    assert!(missing.to_string().contains("no/such/file"), "{missing}");
    assert!(matches!(error(Vec::new()), CheckpointError::Empty));
    let whole = saved();
    for length in [1, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        assert!(matches!(error(whole[..length].to_vec()), CheckpointError::Malformed(_)), "{length} bytes");
    }
    assert!(matches!(error([whole.as_slice(), b"more"].concat()), CheckpointError::Malformed(_)));
    assert!(matches!(error(vec![0xff; 1000]), CheckpointError::Malformed(_)));
    assert!(matches!(error(b"this is no checkpoint".to_vec()), CheckpointError::Malformed(_)));
}

#[test]
fn damaged_cards_are_errors() {
    let whole = saved();
    let none = changed(&whole, |_, metadata| metadata.clear());
    assert!(matches!(error(none), CheckpointError::NoCard { key: CARD_KEY }));
    let described = serde_json::to_string(&card()).unwrap();
    for (from, to) in [
        (r#"{"config"#, r#"{"conf"#),
        (r#""num_heads":2"#, r#""num_heads":3"#),
        (r#""num_heads":2"#, r#""num_heads":-2"#),
        (r#""two""#, r#""two","three""#),
        (r#""depth":2"#, r#""depth":1000000000000"#),
        ("0.247", "0.0"),
    ] {
        assert!(described.contains(from), "{from} in {described}");
        let card = described.replace(from, to);
        let damaged = changed(&whole, |_, metadata| drop(metadata.insert(CARD_KEY.into(), card)));
        let found = error(damaged);
        assert!(matches!(found, CheckpointError::Card(_)), "{to}: {found}");
    }
}

#[test]
fn errors_list_mismatched_parameters() {
    let whole = saved();
    let few = changed(&whole, |tensors, _| {
        tensors.retain(|t| !t.0.starts_with("blocks.1.fc2") && t.0 != "cls_token");
    });
    match error(few) {
        CheckpointError::Missing(names) => assert_eq!(names, ["blocks.1.fc2.bias", "blocks.1.fc2.weight", "cls_token"]),
        other => panic!("{other}"),
    }
    let many = changed(&whole, |tensors, _| {
        tensors.push(("blocks.2.fc1.bias".into(), Dtype::F32, vec![1], vec![0; 4]));
    });
    assert!(error(many).to_string().contains("1 tensor is no parameter of the model: blocks.2.fc1.bias"));
    let narrow = changed(&whole, |tensors, _| {
        let at = position(tensors, "head.weight");
        tensors[at].2 = vec![3, 8];
    });
    let found = error(narrow).to_string();
    assert!(found.contains("head.weight is [3, 8], expected [8, 3]"), "{found}");
    // shapes are compared before the model is made: this one would take 10^12 bytes
    let described = serde_json::to_string(&card()).unwrap().replace(r#""embed_dim":8"#, r#""embed_dim":131072"#);
    let huge = changed(&whole, |_, metadata| drop(metadata.insert(CARD_KEY.into(), described)));
    assert!(matches!(error(huge), CheckpointError::Shapes(_)));
}

#[test]
fn errors_name_invalid_weights() {
    let whole = saved();
    for bad in [f32::NAN, f32::INFINITY] {
        let diverged = changed(&whole, |tensors, _| {
            let at = position(tensors, "blocks.0.norm1.gamma");
            tensors[at].3[4..8].copy_from_slice(&bad.to_le_bytes());
        });
        assert!(error(diverged).to_string().contains("'blocks.0.norm1.gamma'"));
    }
    let counted = changed(&whole, |tensors, _| {
        let at = position(tensors, "head.bias");
        tensors[at].1 = Dtype::I32;
    });
    assert!(matches!(error(counted), CheckpointError::DType { name, .. } if name == "head.bias"));
}

#[test]
fn failed_saves_keep_the_previous_file() {
    let (dir, path) = file("model.safetensors", b"the old one");
    let refused = |model: &ViT<Flex>, path: &Path| {
        let error = pretrained_of(model).save_half(path).unwrap_err();
        assert!(matches!(error, VitError::Save { .. }));
        error.to_string()
    };
    let mut diverged = model();
    diverged.norm.gamma = diverged.norm.gamma.map(|gamma| gamma * 1e6);
    let error = refused(&diverged, &path);
    assert!(error.contains("'norm.gamma'"), "{error}");
    let error = refused(&model().with_new_head(4, 0), &path);
    assert!(error.contains("3 classes") && error.contains("4"), "{error}");
    for unwritable in [dir.path(), &path.join("inside_a_file"), Path::new("..")] {
        let error = pretrained_of(&model()).save_half(unwritable).unwrap_err();
        assert!(matches!(error, VitError::Write(_)));
        let error = error.to_string();
        for once in [unwritable.to_str().unwrap(), "cannot write", "choose"] {
            assert_eq!(error.matches(once).count(), 1, "'{once}' in: {error}");
        }
    }
    assert_eq!(std::fs::read(&path).unwrap(), b"the old one");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no partial file stays");
}

/// A HuggingFace folder with the weights of `model`.
pub(super) fn hf_folder(model: &ViT<Flex>, config: &str) -> (TempDir, Vec<u8>) {
    let mut store = SafetensorsStore::from_bytes(None).with_to_adapter(BurnToPyTorchAdapter);
    model.save_into(&mut store).unwrap();
    let bytes = changed(&store.get_bytes().unwrap(), |tensors, metadata| {
        metadata.clear();
        for tensor in tensors.iter_mut() {
            let norm = tensor.0.contains("norm");
            let ours =
                if norm { tensor.0.replace("weight", "gamma").replace("bias", "beta") } else { tensor.0.clone() };
            tensor.0 = Naming::Hf.theirs(&ours, &self::config()).unwrap();
        }
        tensors.push(("vit.pooler.dense.bias".into(), Dtype::F32, vec![1], vec![0; 4]));
    });
    let (dir, _) = file("config.json", config.as_bytes());
    std::fs::write(dir.path().join("model.safetensors"), &bytes).unwrap();
    (dir, bytes)
}

pub(super) fn opened(dir: &Path) -> Result<Pretrained<Flex>, VitError> {
    open(&Source::Path(dir.into()), &Default::default()).map(|opened| opened.pretrained)
}

pub(super) const HF_CONFIG: &str = r#"{
    "model_type": "vit", "hidden_size": 8, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    "id2label": {"0": "zero", "1": "one", "2": "two"}}"#;

#[test]
fn huggingface_folders_load() {
    let model = model();
    let (dir, _) = hf_folder(&model, HF_CONFIG);
    let Pretrained { model: loaded, card } = opened(dir.path()).unwrap();
    assert_eq!(values(&model), values(&loaded));
    assert_eq!(card.config, config().with_layer_norm_eps(1e-12));
    assert_eq!((card.classes[2].as_str(), card.normalization), ("two", Normalization::HALF));
    let processor = r#"{"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 3.0]}"#;
    std::fs::write(dir.path().join("preprocessor_config.json"), processor).unwrap();
    let card = opened(dir.path()).unwrap().card;
    assert_eq!(card.normalization, Normalization { mean: [0.1, 0.2, 0.3], std: [1.0, 2.0, 3.0] });
}

#[test]
fn mismatched_huggingface_folders_are_errors() {
    let (dir, bytes) = hf_folder(&model(), HF_CONFIG);
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
    let error = || opened(dir.path()).unwrap_err();
    let few = changed(&bytes, |tensors, _| tensors.retain(|t| t.0 != "vit.encoder.layer.1.layernorm_after.weight"));
    write("model.safetensors", &few);
    assert!(error().to_string().contains("1 parameter is missing: vit.encoder.layer.1.layernorm_after.weight"));
    write("model.safetensors", &bytes);
    for (from, to, expected) in [
        (r#""gelu""#, r#""relu""#, "hidden_act = 'relu' is not supported; only gelu or"),
        (r#""vit""#, r#""bert""#, "model_type = 'bert'"),
        (r#""1": "one""#, r#""7": "seven""#, "id2label"),
        (r#""num_hidden_layers": 2"#, r#""num_hidden_layers": 1"#, "vit.encoder.layer.1.output.dense.bias"),
        (r#""num_attention_heads": 2"#, r#""num_attention_heads": 5"#, "num_heads"),
        (r#""patch_size": 4"#, r#""patch_size": 2"#, "patch_embed.weight is [8, 3, 4, 4], expected [8, 3, 2, 2]"),
        ("{", "[", "config.json: it cannot be understood"),
    ] {
        write("config.json", HF_CONFIG.replace(from, to).as_bytes());
        let found = error().to_string();
        assert!(found.contains(expected), "{found}");
    }
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    assert!(matches!(error(), VitError::Checkpoint { why: CheckpointError::Read(_), .. }));
}

#[test]
fn saving_is_reproducible_byte_by_byte() {
    let model = model();
    let (_dir, path) = file("model.safetensors", b"");
    let bytes = || {
        pretrained_of(&model).save(&path).unwrap();
        std::fs::read(&path).unwrap()
    };
    let first = bytes();
    // a random order of the metadata would not be the same 20 times in a row
    assert!((0..20).all(|_| bytes() == first));
    assert!(load::<Flex>(&path, &Default::default()).is_ok());
}

/// These files hold floats: a model with Burn's quantized tensors is refused, and its floats are not.
#[test]
fn quantized_models_are_saved_as_floats() {
    let (_dir, path) = file("model.safetensors", b"");
    let config = QuantizeConfig::new(WeightScheme::Int8Tensor);
    let quantized = config.quantize(model()).unwrap().dequantized();
    pretrained_of(&quantized).save(&path).unwrap();
    assert_eq!(values(&load::<Flex>(&path, &Default::default()).unwrap().model), values(&quantized));
    let scheme = config.scheme.with_store(QuantStore::Native);
    let mut mlp = model();
    mlp.blocks[0].fc1.weight = mlp.blocks[0].fc1.weight.clone().map(|weight| weight.quantize_dynamic(&scheme));
    let error = pretrained_of(&mlp).save(&path).unwrap_err().to_string();
    assert!(error.contains("blocks.0.fc1.weight is quantized") && error.contains("dequantized()"), "{error}");
}
