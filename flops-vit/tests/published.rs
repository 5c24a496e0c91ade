//! Models as HuggingFace and timm publish them: loaded, run and saved.
//!
//! `fixtures/generate.py` makes the reference models and values in `fixtures`, and names the
//! versions of the libraries. `fixtures/check_saved.py` loads with `transformers` what the last
//! test writes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::backend::{Flex, NdArray};
use burn::prelude::*;
use flops_core::{ForwardModel, Probe};
use flops_vit::checkpoint::{self, Opened, Pretrained, Source};
use flops_vit::{Distillation, Normalization, Pool, ViT, ViTConfig};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::json;

const TOLERANCE: f32 = 1e-4;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn open<B: Backend>(path: &Path) -> Opened<B> {
    checkpoint::open(&Source::Path(path.into()), &Default::default()).unwrap_or_else(|e| panic!("{e}"))
}

/// Reads the tensors of a file in f32.
fn tensors(path: &Path) -> BTreeMap<String, TensorData> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let read = |name: String, t: TensorView<'_>| {
        let dtype = match t.dtype() {
            Dtype::F32 => burn::tensor::DType::F32,
            Dtype::F16 => burn::tensor::DType::F16,
            Dtype::BF16 => burn::tensor::DType::BF16,
            other => panic!("{name} is {other:?}"),
        };
        let data = TensorData::from_bytes_vec(t.data().to_vec(), t.shape().to_vec(), dtype);
        (name, data.convert_dtype(burn::tensor::DType::F32))
    };
    file.tensors().into_iter().map(|(name, t)| read(name, t)).collect()
}

fn assert_near(found: &TensorData, expected: &TensorData, what: &str) {
    assert_eq!(found.shape, expected.shape, "{what}");
    for (found, expected) in found.iter::<f32>().zip(expected.iter::<f32>()) {
        assert!((found - expected).abs() <= TOLERANCE, "{what}: {found} instead of {expected}");
    }
}

#[test]
fn resizing_matches_the_preprocessor_config() {
    use flops_vit::Resizing;
    use flops_vit::resizing::Filter;
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "pytorch_model.bin"] {
        std::fs::copy(fixture("hf_bin_f16").join(name), dir.path().join(name)).unwrap();
    }
    let (bilinear, bicubic) = (Filter::Bilinear, Filter::Bicubic);
    for (json, filter, squash, crop) in [
        (r#"{"size": {"height": 8, "width": 8}, "resample": 2}"#, bilinear, true, 1.0),
        (r#"{"size": 8, "resample": 3, "crop_size": 4}"#, bicubic, true, 1.0),
        (r#"{"size": 10, "resample": 3, "do_center_crop": true, "crop_size": 8}"#, bicubic, true, 0.8),
        (
            r#"{"size": {"shortest_edge": 16}, "do_center_crop": true, "crop_size": {"height": 8, "width": 8}}"#,
            bilinear,
            false,
            0.5,
        ),
    ] {
        std::fs::write(dir.path().join("preprocessor_config.json"), json).unwrap();
        let opened = open::<Flex>(dir.path());
        assert_eq!(opened.pretrained.card.resizing, Resizing { filter, squash, crop }, "{json}");
        // saving keeps it
        let saved = dir.path().join("saved");
        opened.pretrained.save_huggingface(&saved).unwrap();
        // sizes before the crop are whole pixels: at 8 px, 9 for 8/0.875
        let again = open::<Flex>(&saved).pretrained.card.resizing;
        assert_eq!((again.filter, again.squash), (filter, squash), "{json}");
        assert!((again.crop - crop).abs() < 0.02, "{json}: {}", again.crop);
    }
    // what would change an image, and is not known here
    for (json, expected) in [
        (r#"{"size": 224}"#, "size = 224, and image_size of the model is 8"),
        (r#"{"size": 10, "do_center_crop": true, "crop_size": 9}"#, "crop_size = 9, and image_size of the model is 8"),
        (r#"{"image_processor_type": "ConvNextImageProcessor"}"#, "ConvNextImageProcessor"),
        (r#"{"crop_pct": 0.875}"#, "crop_pct = 0.875"),
        (r#"{"do_flip_channel_order": true}"#, "do_flip_channel_order = true"),
        (r#"{"do_pad": true}"#, "do_pad = true"),
    ] {
        std::fs::write(dir.path().join("preprocessor_config.json"), json).unwrap();
        let error = checkpoint::open::<Flex>(&Source::Path(dir.path().into()), &Default::default());
        let error = error.map(drop).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("preprocessor_config.json"), "{json}: {error}");
    }
    // and what changes none
    let harmless = r#"{"do_pad": false, "crop_pct": null, "processor_class": "P", "do_convert_rgb": true, "size": 8,
        "image_processor_type": "ViTImageProcessorFast", "feature_extractor": false}"#;
    std::fs::write(dir.path().join("preprocessor_config.json"), harmless).unwrap();
    open::<Flex>(dir.path());
    let timm = open::<Flex>(&fixture("timm_token")).pretrained.card.resizing;
    assert_eq!(timm, Resizing { filter: Filter::Bicubic, squash: false, crop: 0.9 });
}

/// Compares the logits of the fixture's images with the fixture's.
fn assert_logits_match<B: Backend>(model: &ViT<B>, name: &str) {
    let golden = tensors(&fixture(name).join("golden.safetensors"));
    let images = Tensor::from_data(golden["images"].clone(), &Default::default());
    let logits = model.forward(images, &mut Probe::clean()).into_data();
    assert_near(&logits, &golden["logits"], name);
}

/// The sizes that the fixtures have in common.
fn small() -> ViTConfig {
    let config =
        ViTConfig::new().with_img_size(8).with_patch_size(4).with_embed_dim(12).with_depth(2).with_num_heads(3);
    config.with_mlp_ratio(2.0).with_num_classes(4)
}

/// Folders of both libraries with a head, and the configuration of each.
fn folders() -> Vec<(&'static str, ViTConfig)> {
    let hf = small().with_mlp_ratio(20.0 / 12.0).with_layer_norm_eps(1e-12);
    let timm = small();
    vec![
        ("hf_sharded", hf.clone().with_qkv_bias(false).with_layer_norm_eps(1e-3)),
        ("hf_bin_f16", hf.clone()),
        ("hf_deit_bf16", hf.clone().with_distillation(Distillation::Head)),
        ("hf_deit_token", hf.with_distillation(Distillation::Token)),
        ("timm_token", timm.clone()),
        ("timm_avg", timm.clone().with_pool(Pool::Avg).with_class_token(false).with_qkv_bias(false)),
        ("timm_distilled", timm.clone().with_distillation(Distillation::Head)),
        ("timm_no_embed_class", timm),
    ]
}

#[test]
fn logits_match_transformers_and_timm() {
    for (name, config) in folders() {
        let flex = open::<Flex>(&fixture(name));
        assert_eq!(flex.pretrained.card.config, config, "{name}");
        let lacks = name.starts_with("hf_") && !fixture(name).join("preprocessor_config.json").exists();
        let said = flex.notes.iter().filter(|note| note.contains("no preprocessor_config.json")).count();
        assert_eq!((flex.notes.len(), said), (usize::from(lacks), usize::from(lacks)), "{name}: {:?}", flex.notes);
        assert_eq!(Module::num_params(&flex.pretrained.model), config.num_params(), "{name}");
        assert_logits_match(&flex.pretrained.model, name);
        assert_logits_match(&open::<NdArray>(&fixture(name)).pretrained.model, name);
    }
}

#[test]
fn normalisation_matches_the_preprocessor_config() {
    let of = |name: &str| open::<Flex>(&fixture(name)).pretrained.card.normalization;
    let near = |a: [f32; 3], b: [f32; 3]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
    let imagenet = of("hf_sharded");
    assert!(near(imagenet.mean, Normalization::IMAGENET.mean) && near(imagenet.std, Normalization::IMAGENET.std));
    assert_eq!(of("hf_bin_f16"), Normalization::HALF);
    assert_eq!(of("timm_avg"), Normalization { mean: [0.1, 0.2, 0.3], std: [0.4, 0.5, 0.6] });
    // one processor without normalisation, and two whose scale is folded into it
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "pytorch_model.bin"] {
        std::fs::copy(fixture("hf_bin_f16").join(name), dir.path().join(name)).unwrap();
    }
    for (json, mean, std) in [
        (r#"{"do_normalize": false, "image_mean": [9, 9, 9], "image_std": [9, 9, 9]}"#, 0.0, 1.0),
        (r#"{"rescale_factor": 0.00784313725, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]}"#, 0.5, 0.5),
        (r#"{"do_rescale": false, "image_mean": [127.5, 127.5, 127.5], "image_std": [51, 51, 51]}"#, 0.5, 0.2),
    ] {
        std::fs::write(dir.path().join("preprocessor_config.json"), json).unwrap();
        let found = open::<Flex>(dir.path()).pretrained.card.normalization;
        assert!(near(found.mean, [mean; 3]) && near(found.std, [std; 3]), "{json}: {found:?}");
    }
}

/// Pairs of equal sizes, and classes without names, mean what they mean in transformers. What would
/// change the result otherwise is refused by name.
#[test]
fn settings_are_read_in_every_form_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let source = fixture("hf_bin_f16");
    std::fs::copy(source.join("pytorch_model.bin"), dir.path().join("pytorch_model.bin")).unwrap();
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
    let with = |changes: serde_json::Value| {
        let mut config = config.clone();
        let (all, changes) = (config.as_object_mut().unwrap(), changes.as_object().unwrap().clone());
        all.extend(changes);
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        checkpoint::open::<Flex>(&Source::Path(dir.path().into()), &Default::default())
    };
    let fine = with(json!({"image_size": [8, 8], "patch_size": [4, 4], "id2label": null, "num_labels": 4})).unwrap();
    assert_eq!(fine.pretrained.card.classes, ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]);
    assert_logits_match(&fine.pretrained.model, "hf_bin_f16");
    for (changes, expected) in [
        (json!({"image_size": [8, 16]}), "config.json: a setting is not understood: the size [8, 16] is not square"),
        (json!({"image_size": 4_u64 << 32}), "img_size = 17179869184; use at most"),
        (json!({"image_size": "8"}), "a size is a whole number"),
        (json!({"layer_norm_eps": -1e-12}), "layer_norm_eps = -0.000000000001"),
        (json!({"id2label": {}, "num_labels": 1_u64 << 40}), "num_labels = 1099511627776 is too large"),
        (json!({"id2label": {"0": "a", "2": "b"}}), "the ids of id2label are not 0, 1, 2"),
        (json!({"hidden_act": "gelu_new"}), "hidden_act = 'gelu_new' is not supported"),
    ] {
        let error = with(changes.clone()).unwrap_err().to_string();
        assert!(error.contains(expected), "{changes}: {error}");
    }
    for (processor, expected) in [
        (json!({"image_std": [0.5, 0.0, 0.5]}), "image_std = [0.5, 0.0, 0.5]; positive"),
        (json!({"image_std": [0.5, -0.5, 0.5]}), "positive deviations are expected"),
        (json!({"rescale_factor": 0}), "rescale_factor = 0; a positive number"),
        (json!({"do_resize": false}), "do_resize = 'false' is not supported"),
        (json!({"resample": 4}), "resample = '4' is not supported"),
        (json!({"size": {"height": 8, "width": 16}}), "the size 8 × 16 is not a square"),
        (json!({"size": [8, 16]}), "the size 8 × 16 is not a square"),
        (json!({"size": {"longest_edge": 8}}), "a setting is not understood"),
        (json!({"size": 8, "crop_size": 16, "do_center_crop": true}), "crop_size = '2 × size' is not supported"),
    ] {
        std::fs::write(dir.path().join("preprocessor_config.json"), processor.to_string()).unwrap();
        let error = with(json!({})).unwrap_err().to_string();
        assert!(error.contains("preprocessor_config.json") && error.contains(expected), "{processor}: {error}");
    }
    // as ViTImageProcessorFast of transformers 4.49 writes it
    let nulls = json!({"crop_size": null, "do_center_crop": null, "do_convert_rgb": null, "resample": 2});
    std::fs::write(dir.path().join("preprocessor_config.json"), nulls.to_string()).unwrap();
    let read = with(json!({})).unwrap();
    assert_eq!(read.pretrained.card.resizing, fine.pretrained.card.resizing);
}

#[test]
fn timm_files_load_without_a_configuration() {
    let opened = open::<Flex>(&fixture("timm_pth/model.pth"));
    let sizes = small().with_embed_dim(64).with_depth(1).with_num_heads(1).with_mlp_ratio(0.25);
    assert_eq!(opened.pretrained.card.config, sizes);
    assert_eq!(opened.pretrained.card.classes, ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]);
    assert!(opened.notes[0].contains("normalised"), "{:?}", opened.notes);
    assert_logits_match(&opened.pretrained.model, "timm_pth");
}

#[test]
fn backbones_get_a_new_head_and_a_note() {
    let (a, b) = (open::<Flex>(&fixture("hf_backbone")), open::<Flex>(&fixture("hf_backbone")));
    assert!(a.notes[0].starts_with("there is no preprocessor_config.json"), "{:?}", a.notes);
    assert_eq!(a.notes[1..], ["the weights have no head: a new one of 4 classes is used"]);
    assert_eq!(a.pretrained.model.head.weight.to_data(), b.pretrained.model.head.weight.to_data());
    assert_ne!(a.pretrained.model.head.weight.to_data(), TensorData::zeros::<f32, _>([12, 4]));
}

#[test]
fn interpolated_positions_match_timm() {
    let golden = tensors(&fixture("positions/golden.safetensors"));
    let mut seen = 0;
    for (name, given) in golden.iter().filter(|(name, _)| name.ends_with(".in")) {
        let sizes: Vec<usize> = name.split('.').filter_map(|n| n.parse().ok()).collect();
        let [prefix, old, new] = sizes[..] else { panic!("{name}") };
        let config = ViTConfig::new().with_img_size(old).with_patch_size(1).with_embed_dim(3).with_depth(1);
        let config = match prefix {
            0 => config.with_pool(Pool::Avg).with_class_token(false),
            1 => config,
            _ => config.with_distillation(Distillation::Head),
        };
        let mut model = config.with_num_heads(1).init::<Flex>(&Default::default()).unwrap();
        model.pos_embed = model.pos_embed.map(|_| Tensor::from_data(given.clone(), &Default::default()));
        let found = model.with_img_size(new).unwrap().pos_embed.to_data();
        assert_near(&found, &golden[&name.replace(".in", ".out")], name);
        seen += 1;
    }
    assert_eq!(seen, 4);
}

/// Data parallelism, `torch.compile` and trainers put words in front of every name. The extension of
/// a file says nothing.
#[test]
fn wrapped_names_and_unusual_extensions_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let from = fixture("hf_deit_token");
    std::fs::copy(from.join("config.json"), dir.path().join("config.json")).unwrap();
    let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for wrapper in ["module.", "_orig_mod.module.", "model."] {
        let wrapped = file.tensors().into_iter().map(|(name, tensor)| (format!("{wrapper}{name}"), tensor));
        let bytes = safetensors::serialize(wrapped, None).unwrap();
        std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
        assert_logits_match(&open::<Flex>(dir.path()).pretrained.model, "hf_deit_token");
    }
    for name in ["model_best.pth.tar", "weights", "last.ckpt"] {
        std::fs::copy(fixture("timm_pth/model.pth"), dir.path().join(name)).unwrap();
        assert_logits_match(&open::<Flex>(&dir.path().join(name)).pretrained.model, "timm_pth");
    }
}

#[test]
fn errors_list_mismatched_files_and_tensors() {
    let error = |path: &Path| {
        checkpoint::open::<Flex>(&Source::Path(path.into()), &Default::default()).unwrap_err().to_string()
    };
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    assert!(error(&at("nothing.pth")).contains("cannot be read"));
    assert!(error(dir.path()).contains("looked for model.safetensors, model.safetensors.index.json"));
    for (name, bytes) in [("cut.pth", &b"PK\x03\x04 and no more"[..]), ("text.bin", b"no weights"), ("empty.pt", b"")] {
        std::fs::write(at(name), bytes).unwrap();
        assert!(error(&at(name)).contains(name), "{}", error(&at(name)));
    }
    // a truncated shard, a missing one, and an index that leads out of the folder
    for entry in std::fs::read_dir(fixture("hf_sharded")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), at(&entry.file_name().to_string_lossy())).unwrap();
    }
    let shard = at("model-00002-of-00004.safetensors");
    let whole = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &whole[..whole.len() / 2]).unwrap();
    assert!(error(dir.path()).contains("model-00002-of-00004.safetensors: it is no intact safetensors file"));
    std::fs::remove_file(&shard).unwrap();
    assert!(error(dir.path()).contains("model-00002-of-00004.safetensors: it cannot be read"));
    std::fs::write(at("model.safetensors.index.json"), r#"{"weight_map": {"a": "../up.safetensors"}}"#).unwrap();
    assert!(error(dir.path()).contains("'../up.safetensors' is no file name"));
    // an index that names itself, and a tensor in two shards
    let index = |map: &str| std::fs::write(at("model.safetensors.index.json"), map).unwrap();
    index(r#"{"weight_map": {"a": "model.safetensors.index.json"}}"#);
    assert!(error(dir.path()).contains("model.safetensors.index.json: it cannot be understood (a shard is no index)"));
    let first = at("model-00001-of-00004.safetensors");
    std::fs::copy(&first, at("again.safetensors")).unwrap();
    index(r#"{"weight_map": {"a": "model-00001-of-00004.safetensors", "b": "again.safetensors"}}"#);
    assert!(error(dir.path()).contains("is in two shards, again.safetensors and model-00001"), "{}", error(dir.path()));
    // what a download may leave in the place of a file
    index("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n");
    assert!(error(dir.path()).contains("git lfs pull"), "{}", error(dir.path()));
    for name in ["page.pth", "page.safetensors"] {
        std::fs::write(at(name), "\n<!DOCTYPE html><html></html>").unwrap();
        assert!(error(&at(name)).contains("it is a web page"), "{}", error(&at(name)));
    }
    // errors name tensors as the library does
    let config = std::fs::read_to_string(fixture("hf_bin_f16/config.json")).unwrap();
    let other = tempfile::tempdir().unwrap();
    std::fs::copy(fixture("hf_bin_f16/pytorch_model.bin"), other.path().join("pytorch_model.bin")).unwrap();
    for (from, to, expected) in [
        (r#""num_hidden_layers": 2"#, r#""num_hidden_layers": 3"#, "vit.encoder.layer.2.attention.attention.key.bias"),
        (r#""num_hidden_layers": 2"#, r#""num_hidden_layers": 1"#, "vit.encoder.layer.1.attention.attention.key.bias"),
        (r#""intermediate_size": 20"#, r#""intermediate_size": 24"#, "blocks.0.fc1.bias is [20], expected [24]"),
        (
            r#""model_type": "vit""#,
            r#""model_type": "swin""#,
            "model_type = 'swin' is not supported; only vit or deit is",
        ),
    ] {
        let changed = config.replace(from, to);
        assert_ne!(changed, config);
        std::fs::write(other.path().join("config.json"), changed).unwrap();
        let found = error(other.path());
        assert!(found.contains(expected), "{found}");
    }
}

/// Saving keeps the published names and values of the tensors.
#[test]
fn saved_folders_round_trip() {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("saved");
    let _ = std::fs::remove_dir_all(&root);
    for (name, config) in folders() {
        let pretrained = open::<Flex>(&fixture(name)).pretrained;
        let dir = root.join(name);
        if config.pool == Pool::Avg {
            let error = pretrained.save_huggingface(&dir).unwrap_err().to_string();
            assert!(error.contains("mean of its patch tokens"), "{error}");
            continue;
        }
        pretrained.save_huggingface(&dir).unwrap();
        std::fs::copy(fixture(name).join("golden.safetensors"), dir.join("golden.safetensors")).unwrap();
        let Pretrained { model, card } = open::<Flex>(&dir).pretrained;
        assert_eq!(card.config, pretrained.card.config, "{name}");
        assert_eq!(card.classes, pretrained.card.classes, "{name}");
        assert_eq!(card.normalization, pretrained.card.normalization, "{name}");
        assert_logits_match(&model, name);
        let whole = fixture(name).join("model.safetensors");
        if name.starts_with("hf_") && whole.exists() {
            assert_eq!(tensors(&dir.join("model.safetensors")), tensors(&whole), "{name}");
        }
    }
}
