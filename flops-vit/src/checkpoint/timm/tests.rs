//! Folders as timm's `save_for_hf` writes them, for every architecture of timm's.

use burn::backend::Flex;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::super::{Opened, Source, open};
use super::architectures::{Arguments, all};
use super::bare;
use super::shapes::Shapes;
use crate::config::{Activation, Distillation, Pool, ViTConfig};
use crate::error::VitError;
use crate::normalization::Normalization;
use crate::resizing::{Filter, Resizing};

/// Arguments that this ViT supports in some value; all others are refused where they occur.
const SUPPORTED: [&str; 14] = [
    "num_heads",
    "embed_dim",
    "depth",
    "patch_size",
    "mlp_ratio",
    "img_size",
    "class_token",
    "fc_norm",
    "qkv_bias",
    "global_pool",
    "act_layer",
    "norm_eps",
    "no_embed_class",
    "init_values",
];

fn number(arguments: &Arguments, key: &str, default: usize) -> usize {
    arguments.get(key).map_or(default, |value| value.as_u64().unwrap() as usize)
}

fn flag(arguments: &Arguments, key: &str, default: bool) -> bool {
    arguments.get(key).map_or(default, |value| value.as_bool().unwrap())
}

fn word<'a>(arguments: &'a Arguments, key: &str, default: &'static str) -> &'a str {
    arguments.get(key).map_or(default, |value| value.as_str().unwrap())
}

/// The names and shapes that timm's constructor gives to the tensors of a model with those
/// arguments, of one block of width `d` and four patches of 2 × 2 pixels.
fn tensors(arguments: &Arguments, d: usize) -> Vec<(String, Vec<usize>)> {
    let mut found: Vec<(String, Vec<usize>)> = vec![];
    let mut add = |name: &str, shape: &[usize]| found.push((name.into(), shape.to_vec()));
    let (class, dist) = (flag(arguments, "class_token", true), flag(arguments, "distilled", false));
    let registers = number(arguments, "reg_tokens", 0);
    let prefix = usize::from(class) + usize::from(dist) + registers;
    let covered = if flag(arguments, "no_embed_class", false) { 0 } else { prefix };
    add("pos_embed", &[1, 4 + covered, d]);
    for (there, name, count) in
        [(class, "cls_token", 1), (dist, "dist_token", 1), (registers > 0, "reg_token", registers)]
    {
        if there {
            add(name, &[1, count, d]);
        }
    }
    add("patch_embed.proj.weight", &[d, number(arguments, "in_chans", 3), 2, 2]);
    let pre_norm = flag(arguments, "pre_norm", false);
    if !pre_norm {
        add("patch_embed.proj.bias", &[d]);
    }
    let final_norm = flag(arguments, "final_norm", true);
    let pooled = ["avg", "avgmax", "max"].contains(&word(arguments, "global_pool", "token"));
    let fc_norm = flag(arguments, "fc_norm", pooled);
    let norms = [
        (pre_norm, "norm_pre"),
        (true, "blocks.0.norm1"),
        (true, "blocks.0.norm2"),
        (flag(arguments, "scale_attn_norm", false), "blocks.0.attn.norm"),
        (flag(arguments, "scale_mlp_norm", false), "blocks.0.mlp.norm"),
        (final_norm && !fc_norm, "norm"),
        (final_norm && fc_norm, "fc_norm"),
        (word(arguments, "global_pool", "token") == "map", "attn_pool.norm"),
    ];
    for (_, name) in norms.iter().filter(|norm| norm.0) {
        add(&format!("{name}.weight"), &[d]);
        if !arguments.contains_key("norm_layer") {
            add(&format!("{name}.bias"), &[d]);
        }
    }
    let post_norm = word(arguments, "block_fn", "Block") == "ResPostBlock";
    if arguments.contains_key("init_values") && !post_norm {
        add("blocks.0.ls1.gamma", &[d]);
        add("blocks.0.ls2.gamma", &[d]);
    }
    let (qkv, bias) = (flag(arguments, "qkv_bias", true), flag(arguments, "proj_bias", true));
    for (name, rows, bias) in
        [("attn.qkv", 3 * d, qkv), ("attn.proj", d, bias), ("mlp.fc1", d, bias), ("mlp.fc2", d, bias)]
    {
        add(&format!("blocks.0.{name}.weight"), &[rows, d]);
        if bias {
            add(&format!("blocks.0.{name}.bias"), &[rows]);
        }
    }
    for head in ["head", "head_dist"].into_iter().take(if dist { 2 } else { 1 }) {
        add(&format!("{head}.weight"), &[2, d]);
        add(&format!("{head}.bias"), &[2]);
    }
    found
}

/// A folder with those tensors and that `config.json`.
fn folder(tensors: &[(String, Vec<usize>)], config: &Value) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let data: Vec<Vec<u8>> = tensors.iter().map(|(_, shape)| vec![0; 4 * shape.iter().product::<usize>()]).collect();
    let views = tensors.iter().zip(&data);
    let views = views.map(|((name, shape), data)| (name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
    std::fs::write(dir.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

fn opened(dir: &TempDir) -> Result<Opened<Flex>, VitError> {
    open(&Source::Path(dir.path().into()), &Default::default())
}

/// Tensors that are split or padded before their shapes are compared used to panic.
#[test]
fn shapes_that_do_not_fit_are_refused() {
    let config = json!({"architecture": "vit_tiny_patch16_224", "num_classes": 2, "model_args":
        {"num_heads": 2, "embed_dim": 8, "depth": 1, "mlp_ratio": 1, "patch_size": 2, "img_size": 4}});
    let whole = tensors(&Arguments::new(), 8);
    opened(&folder(&whole, &config)).unwrap();
    for (tensor, shape) in [
        ("pos_embed", vec![1, 4, 16]),
        ("pos_embed", vec![2, 4, 8]),
        ("pos_embed", vec![2, 5, 8]),
        ("blocks.0.attn.qkv.weight", vec![24, 0]),
        ("blocks.0.attn.qkv.weight", vec![0, 8]),
        ("blocks.0.attn.qkv.bias", vec![25]),
    ] {
        let mut tensors = whole.clone();
        tensors.iter_mut().find(|(name, _)| name == tensor).unwrap().1 = shape.clone();
        let error = opened(&folder(&tensors, &config)).unwrap_err().to_string();
        assert!(error.contains("pos_embed") || error.contains("qkv"), "{tensor} of {shape:?}: {error}");
    }
}

/// For each name of timm 1.0.31 the model has timm's settings, or is refused by the name of one that
/// this ViT does not have. `architectures.py` reads the settings off timm's source.
#[test]
fn every_architecture_has_its_settings_or_is_refused() {
    let (mut accepted, mut refused) = (0, 0);
    for (name, arguments) in all() {
        let heads = number(&arguments, "num_heads", 12);
        // a small model of that architecture; all else follows from its name
        let sizes = json!({"embed_dim": 2 * heads, "depth": 1, "mlp_ratio": 1, "patch_size": 2, "img_size": 4});
        let config = json!({"architecture": name, "num_classes": 2, "model_args": sizes});
        let found = opened(&folder(&tensors(&arguments, 2 * heads), &config));
        let (pool, act) = (word(&arguments, "global_pool", "token"), word(&arguments, "act_layer", "gelu"));
        let mut obstacles: Vec<&str> = arguments.keys().map(String::as_str).collect();
        obstacles.retain(|key| !SUPPORTED.contains(key) && *key != "distilled");
        obstacles.extend((pool == "map").then_some("global_pool"));
        obstacles.extend((act == "silu").then_some("act_layer"));
        if !obstacles.is_empty() {
            let error = found.unwrap_err().to_string();
            let named = obstacles.iter().any(|key| error.contains(&format!("config.json: {key} = '")));
            assert!(named, "{name}: {error}");
            refused += 1;
            continue;
        }
        let config = found.unwrap_or_else(|e| panic!("{name}: {e}")).pretrained.card.config;
        let pool = match pool {
            "token" => Pool::Token,
            "avg" => Pool::Avg,
            other => panic!("{name}: {other}"),
        };
        let expected = ViTConfig::new()
            .with_img_size(4)
            .with_patch_size(2)
            .with_embed_dim(2 * heads)
            .with_depth(1)
            .with_num_heads(heads)
            .with_mlp_ratio(1.0)
            .with_num_classes(2)
            .with_qkv_bias(flag(&arguments, "qkv_bias", true))
            .with_class_token(flag(&arguments, "class_token", true))
            .with_pool(pool)
            .with_fc_norm(flag(&arguments, "fc_norm", true))
            .with_activation(if act == "gelu_tanh" { Activation::GeluTanh } else { Activation::Gelu })
            .with_layer_norm_eps(arguments.get("norm_eps").map_or(1e-6, |eps| eps.as_f64().unwrap()))
            .with_distillation(match flag(&arguments, "distilled", false) {
                true => Distillation::Head,
                false => Distillation::None,
            });
        assert_eq!(config, expected, "{name}");
        accepted += 1;
    }
    assert_eq!((accepted, refused), (99, 190));
}

/// Some rows of the table, as they stand in timm's source.
#[test]
fn the_table_has_what_timm_s_source_says() {
    let all = all();
    for (name, expected) in [
        // dict(patch_size=14, embed_dim=1152, depth=27, num_heads=16, mlp_ratio=3.7362, class_token=False,
        // global_pool='avg', fc_norm=False)
        (
            "vit_so400m_patch14_siglip_gap_224",
            json!({"patch_size": 14, "embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362,
                "class_token": false, "global_pool": "avg", "fc_norm": false}),
        ),
        // dict(patch_size=16, embed_dim=768, depth=12, num_heads=12)
        ("vit_base_patch16_224", json!({})),
        // dict(patch_size=32, …, pre_norm=True, norm_layer=partial(LayerNorm, eps=1e-5), act_layer='quick_gelu')
        (
            "vit_base_patch32_clip_quickgelu_224",
            json!({"patch_size": 32, "pre_norm": true, "norm_eps": 1e-5, "act_layer": "quick_gelu"}),
        ),
    ] {
        assert_eq!(Value::Object(all[name].clone()), expected, "{name}");
    }
}

/// A folder of `vit_tiny_patch16_224` of small sizes, with changes.
fn changed(tensors_of: Value, changes: Value) -> Result<Opened<Flex>, VitError> {
    let mut config = json!({
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 2,
        "model_args": {"embed_dim": 6, "depth": 1, "mlp_ratio": 1, "patch_size": 2, "img_size": 4},
        "pretrained_cfg": {"input_size": [3, 4, 4], "fixed_input_size": true},
    });
    for (key, value) in changes.as_object().unwrap() {
        match (config[key].as_object_mut(), value.as_object()) {
            (Some(all), Some(some)) => all.extend(some.clone()),
            _ => config[key] = value.clone(),
        }
    }
    opened(&folder(&tensors(tensors_of.as_object().unwrap(), 6), &config))
}

#[test]
fn settings_of_a_folder_are_honoured() {
    // weights, changes, and the configuration
    let tiny = ViTConfig::new().with_img_size(4).with_patch_size(2).with_embed_dim(6).with_depth(1).with_num_heads(3);
    let tiny = tiny.with_mlp_ratio(1.0).with_num_classes(2);
    let args = |args: Value| json!({"model_args": args});
    for (weights, changes, expected) in [
        (json!({}), json!({}), tiny.clone()),
        (json!({}), args(json!({"num_heads": 2, "act_layer": "quick_gelu"})), {
            tiny.clone().with_num_heads(2).with_activation(Activation::QuickGelu)
        }),
        (json!({"global_pool": "max"}), args(json!({"global_pool": "max"})), tiny.clone().with_pool(Pool::Max)),
        (json!({"global_pool": "avg"}), json!({"global_pool": "avg"}), tiny.clone().with_pool(Pool::Avg)),
        // after reset_classifier(2, 'avg') the norm stays where it was
        (json!({}), json!({"global_pool": "avg"}), tiny.clone().with_pool(Pool::Avg).with_fc_norm(false)),
        (
            json!({"global_pool": "avgmax", "class_token": false}),
            args(json!({"global_pool": "avgmax", "class_token": false})),
            tiny.clone().with_pool(Pool::AvgMax).with_class_token(false),
        ),
        // the class token under fc_norm is normalised either way
        (json!({"fc_norm": true}), args(json!({"fc_norm": true})), tiny.clone()),
        (json!({}), args(json!({"norm_layer": "LayerNorm", "drop_rate": 0.1, "img_size": [4, 4]})), tiny.clone()),
        (json!({}), json!({"architecture": "vit_tiny_patch16_224.augreg_in21k"}), tiny.clone()),
        (json!({}), json!({"architecture": "mine", "model_args": {"num_heads": 3}}), tiny.clone()),
    ] {
        let found = changed(weights, changes.clone()).unwrap_or_else(|e| panic!("{changes}: {e}"));
        assert_eq!(found.pretrained.card.config, expected, "{changes}");
        assert!(found.notes.is_empty(), "{changes}: {:?}", found.notes);
    }
}

#[test]
fn settings_that_the_model_lacks_are_refused_by_name() {
    let args = |args: Value| json!({"model_args": args});
    let input = |cfg: Value| json!({"pretrained_cfg": cfg});
    for (weights, changes, expected) in [
        (json!({}), args(json!({"act_layer": "relu"})), "config.json: act_layer = 'relu' is not supported"),
        (json!({}), args(json!({"norm_layer": "rmsnorm"})), "norm_layer = 'rmsnorm' is not supported"),
        (json!({}), args(json!({"pool_include_prefix": true})), "pool_include_prefix = 'true'"),
        (json!({}), args(json!({"global_pool": "map"})), "global_pool = 'map'"),
        (json!({}), args(json!({"global_pool": ""})), "global_pool = ''"),
        (json!({}), args(json!({"block_fn": "ResPostBlock"})), "block_fn = 'ResPostBlock'"),
        (json!({}), args(json!({"window": 7})), "model_args has window = 7, which is not known"),
        (json!({}), args(json!({"num_heads": "three"})), r#"num_heads = "three"; a whole number"#),
        (json!({}), args(json!({"img_size": [4, 8]})), "img_size = '4 × 8' is not supported; only a square is"),
        (json!({}), args(json!({"img_size": 5})), "only a multiple of the patch size 2 is"),
        (json!({}), args(json!({"img_size": 8})), "the weights have positions for 4 pixels"),
        (json!({}), args(json!({"patch_size": [2, 4]})), "patch_size = '[2,4]'"),
        (json!({}), args(json!({"embed_dim": 8})), "embed_dim = 8, the weights have 6"),
        (json!({}), args(json!({"depth": 2})), "depth = 2, the weights have 1"),
        (json!({}), args(json!({"mlp_ratio": 2})), "mlp_ratio = 2, the weights have an MLP of width 6"),
        (json!({}), args(json!({"class_token": false})), "class_token = false, the weights have true"),
        (json!({"distilled": true}), json!({}), "distilled = false, the weights have true"),
        (json!({}), args(json!({"fc_norm": true})), "fc_norm = true, the weights have false"),
        (json!({}), json!({"num_classes": 5}), "num_classes = 5, the weights have 2"),
        (json!({}), json!({"global_pool": "avg", "model_args": {"global_pool": "max"}}), "model_args has another"),
        (json!({}), json!({"architecture": "beit_tiny"}), "architecture = 'beit_tiny' is none of timm's"),
        (json!({}), json!({"architecture": "vit_tiny_patch16_clip_224"}), "put num_heads into model_args"),
        (json!({"pre_norm": true}), json!({}), "patch_embed.proj.bias"),
        (json!({"reg_tokens": 2}), json!({}), "pos_embed has 7 tokens"),
        (json!({}), input(json!({"crop_mode": "border"})), "crop_mode = 'border' is not supported"),
        (json!({}), input(json!({"interpolation": "random"})), "interpolation = 'random' is not supported"),
        (json!({}), input(json!({"interpolation": "hamming"})), "interpolation = 'hamming' is not supported"),
        (json!({}), input(json!({"crop_pct": 1.2})), "crop_pct = '1.2' is not supported"),
        (json!({}), input(json!({"crop_pct": 0.01})), "crop_pct = '0.01' is not supported"),
        (json!({}), input(json!({"label_offset": 1})), "label_offset = '1' is not supported"),
        (json!({}), input(json!({"mean": [0.1, 0.2]})), "mean = [0.1, 0.2] does not fit in_chans = 3"),
        (json!({}), input(json!({"std": [1, 0, 1]})), "positive deviations are expected"),
        (
            json!({}),
            input(json!({"input_size": [1, 4, 4]})),
            "input_size = [1, 4, 4], and the weights have in_chans = 3",
        ),
        (json!({}), json!({"model_args": {"img_size": null}, "pretrained_cfg": {"input_size": [3, 8, 8]}}), {
            "input_size = 8 × 8, and the weights have positions for 4 pixels"
        }),
        (json!({}), json!({"model_args": {"img_size": null}, "pretrained_cfg": {"input_size": [3, 4, 6]}}), {
            "input_size = '4 × 6' is not supported; only a square is"
        }),
        (
            json!({"in_chans": 4}),
            json!({"pretrained_cfg": {"input_size": [4, 4, 4]}}),
            "in_chans = '4' is not supported",
        ),
    ] {
        let error = changed(weights, changes.clone()).expect_err(&changes.to_string()).to_string();
        assert!(error.contains(expected), "{changes}: {error}");
    }
}

/// Absent keys have the defaults of timm's `PretrainedCfg`, in the older form of the file too.
#[test]
fn inputs_are_prepared_as_in_timm() {
    let card = |changes: Value| changed(json!({}), changes).unwrap().pretrained.card;
    let default = card(json!({}));
    assert_eq!(default.normalization, Normalization::IMAGENET);
    assert_eq!(default.resizing, Resizing { filter: Filter::Bicubic, squash: false, crop: 0.875 });
    let squashed =
        json!({"mean": [0.5], "std": 0.25, "crop_mode": "squash", "crop_pct": 1, "interpolation": "lanczos"});
    let expected = Resizing { filter: Filter::Lanczos, squash: true, crop: 1.0 };
    let found = card(json!({"pretrained_cfg": squashed}));
    assert_eq!((found.resizing, found.normalization), (expected, Normalization::grey(0.5, 0.25)));
    let mut older = squashed;
    older["pretrained_cfg"] = Value::Null;
    older["label_names"] = json!({"0": "cat", "1": "dog"});
    let found = card(older);
    assert_eq!((found.resizing, found.normalization), (expected, Normalization::grey(0.5, 0.25)));
    assert_eq!(found.classes, ["cat", "dog"]);
    // one channel: the average of three values, as timm's save_for_hf and loaders have it
    let one = changed(json!({"in_chans": 1}), json!({"pretrained_cfg": {"input_size": [1, 4, 4]}})).unwrap();
    let Normalization { mean: [mean, ..], std: [std, ..] } = one.pretrained.card.normalization;
    assert!((mean - 0.449).abs() < 1e-6 && (std - 0.226).abs() < 1e-6, "{mean} {std}");
    assert!(one.notes[0].contains("averages"), "{:?}", one.notes);
    let one = changed(
        json!({"in_chans": 1}),
        json!({"model_args": {"in_chans": 1}, "pretrained_cfg": {"mean": [0.1], "std": [0.3]}}),
    );
    assert_eq!(one.unwrap().pretrained.card.normalization, Normalization::grey(0.1, 0.3));
    let few = changed(json!({}), json!({"label_names": ["cat"]})).unwrap();
    assert!(few.notes[0].contains("label_names does not name the 2 classes of the head, but 1"), "{:?}", few.notes);
    assert_eq!(few.pretrained.card.classes, ["LABEL_0", "LABEL_1"]);
}

/// γ·(Wx + b) = (γW)x + γb: the layers have the weights of the file times γ.
#[test]
fn layer_scale_is_multiplied_into_the_layers() {
    let arguments = json!({"init_values": 1e-5});
    let dir = folder(&tensors(arguments.as_object().unwrap(), 6), &json!({}));
    let path = dir.path().join("model.safetensors");
    let counted = super::super::tests::changed(&std::fs::read(&path).unwrap(), |tensors, _| {
        for (_, _, _, data) in tensors {
            *data = (1..=data.len() / 4).flat_map(|i| (i as f32).to_le_bytes()).collect();
        }
    });
    std::fs::write(&path, counted).unwrap();
    let config = json!({"architecture": "mine", "model_args": {"num_heads": 3, "init_values": 1e-5}});
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let found = opened(&dir).unwrap();
    assert!(found.notes[0].contains("LayerScale"), "{:?}", found.notes);
    let block = &found.pretrained.model.blocks[0];
    for layer in [&block.attn.proj, &block.fc2] {
        // row i of 6 × 6 numbers from 1 on, times its factor i + 1; Burn has the transpose
        let weight: Vec<f32> = layer.weight.val().transpose().to_data().to_vec().unwrap();
        let expected: Vec<f32> = (0..36).map(|i| ((i + 1) * (i / 6 + 1)) as f32).collect();
        assert_eq!(weight, expected);
        let bias: Vec<f32> = layer.bias.as_ref().unwrap().val().to_data().to_vec().unwrap();
        assert_eq!(bias, [1.0, 4.0, 9.0, 16.0, 25.0, 36.0]);
    }
    // the layer in front of the activation stays as it is
    assert_eq!(
        block.fc1.bias.as_ref().unwrap().val().to_data().to_vec::<f32>().unwrap(),
        [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    );
}

/// Shapes of a model of timm's.
fn shapes(embed_dim: usize, depth: usize, mlp_dim: usize, patch_size: usize) -> Shapes {
    Shapes {
        img_size: 16 * patch_size,
        patch_size,
        in_chans: 3,
        embed_dim,
        depth,
        mlp_dim,
        qkv_bias: true,
        num_classes: Some(2),
        class_token: true,
        distillation: Distillation::None,
        fc_norm: false,
        layer_scale: false,
    }
}

/// The numbers of heads are those of timm's source; 64 wide heads would be 20, 18 and 22.
#[test]
fn bare_files_have_the_settings_of_their_shapes() {
    let gap = |shapes: Shapes| Shapes { class_token: false, ..shapes };
    for (shapes, heads, pool, fc_norm) in [
        (shapes(192, 12, 768, 16), 3, Pool::Token, true),
        (shapes(1280, 32, 5120, 14), 16, Pool::Token, true),
        (gap(shapes(1152, 27, 4304, 14)), 16, Pool::Avg, false),
        (shapes(1408, 40, 6144, 14), 16, Pool::Token, true),
        (Shapes { fc_norm: true, ..shapes(1024, 24, 4096, 14) }, 16, Pool::Avg, true),
        // of no model of timm's: 64 wide heads
        (shapes(128, 6, 512, 4), 2, Pool::Token, true),
    ] {
        let (config, note) = bare::config(&shapes, 2).unwrap_or_else(|e| panic!("{shapes:?}: {e}"));
        assert_eq!((config.num_heads, config.pool, config.fc_norm), (heads, pool, fc_norm), "{shapes:?}");
        assert!(note.contains(&format!("{heads} heads")), "{note}");
    }
    for (shapes, expected) in [
        // 16 heads, and 12 of SigLIP's
        (
            gap(shapes(768, 12, 3072, 16)),
            "the weights may be of timm's vit_base_patch16_gap_224 or vit_base_patch16_siglip_gap",
        ),
        (
            Shapes { fc_norm: true, qkv_bias: false, ..gap(shapes(768, 12, 3072, 16)) },
            "vit_base_patch16_rpn_224, which normalises behind its layers",
        ),
        (shapes(100, 2, 400, 4), "embed_dim = 100 is no multiple of 64"),
        (gap(shapes(64, 2, 256, 4)), "the file does not say how tokens are pooled"),
    ] {
        let error = bare::config(&shapes, 2).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("config.json"), "{error}");
    }
}
