//! Whole files, as the libraries that are read write them.

use std::fs;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use burn::backend::Flex;
use flops_vit::checkpoint::{Card, Pretrained};
use flops_vit::{Normalization, Resizing, ViTConfig};
use image::{DynamicImage, ImageFormat, Rgb, RgbImage};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::Files;

/// Returns a small model of three classes, whose weights are random.
pub fn model() -> Pretrained<Flex> {
    let config = ViTConfig::new().with_img_size(4).with_patch_size(2).with_embed_dim(8).with_depth(1).with_num_heads(2);
    let config = config.with_num_classes(3);
    let model = config.init::<Flex>(&Default::default()).unwrap();
    let classes = ["cat", "cow", "dog"].map(String::from).to_vec();
    let (normalization, resizing) = (Normalization::HALF, Resizing::default());
    Pretrained { model, card: Card { config, normalization, resizing, classes, description: "random".into() } }
}

/// Returns the files that `write` leaves in an empty folder.
pub fn written(write: impl FnOnce(&Path)) -> Files {
    let dir = TempDir::new().unwrap();
    write(dir.path());
    of_folder(dir.path())
}

/// Returns the files of a folder and of its folders, in the order of their names.
pub fn of_folder(dir: &Path) -> Files {
    let mut files = vec![];
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_string();
                files.push((name, fs::read(&path).unwrap()));
            }
        }
    }
    files.sort();
    files
}

/// Returns the folder of a fixture, if the fixtures are there.
pub fn fixture(name: &str) -> Option<PathBuf> {
    let shared = std::env::var_os("FLOPS_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared"), PathBuf::from);
    Some(shared.join("fixtures").join(name)).filter(|dir| dir.is_dir())
}

/// Replaces a file of safetensors by PyTorch's `pytorch_model.bin` with the same tensors.
pub fn in_pytorch(mut files: Files) -> Files {
    let at = files.iter().position(|(name, _)| name == "model.safetensors").unwrap();
    let (_, bytes) = files.swap_remove(at);
    files.push(("pytorch_model.bin".into(), pytorch(&SafeTensors::deserialize(&bytes).unwrap())));
    files
}

/// Returns what `torch.save` writes for a dictionary of f32.
fn pytorch(tensors: &SafeTensors<'_>) -> Vec<u8> {
    let text = |pickle: &mut Vec<u8>, text: &str| {
        pickle.push(b'X');
        pickle.extend((text.len() as u32).to_le_bytes());
        pickle.extend(text.as_bytes());
    };
    let int = |pickle: &mut Vec<u8>, value: usize| {
        pickle.push(b'J');
        pickle.extend((value as i32).to_le_bytes());
    };
    let mut pickle = b"\x80\x02}".to_vec();
    let mut zip = ZipWriter::new(Cursor::new(vec![]));
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (key, (name, tensor)) in tensors.tensors().iter().enumerate() {
        assert_eq!(tensor.dtype(), Dtype::F32);
        let shape = tensor.shape();
        let strides: Vec<usize> = (0..shape.len()).map(|axis| shape[axis + 1..].iter().product()).collect();
        text(&mut pickle, name);
        pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut pickle, "storage");
        pickle.extend(b"ctorch\nFloatStorage\n");
        text(&mut pickle, &key.to_string());
        text(&mut pickle, "cpu");
        int(&mut pickle, tensor.data().len() / 4);
        pickle.extend(b"tQ");
        int(&mut pickle, 0);
        for values in [shape, &strides] {
            pickle.push(b'(');
            values.iter().for_each(|&value| int(&mut pickle, value));
            pickle.push(b't');
        }
        pickle.extend(b"\x89ccollections\nOrderedDict\n)RtRs");
        zip.start_file(format!("model/data/{key}"), stored).unwrap();
        zip.write_all(tensor.data()).unwrap();
    }
    pickle.push(b'.');
    zip.start_file("model/data.pkl", stored).unwrap();
    zip.write_all(&pickle).unwrap();
    zip.finish().unwrap().into_inner()
}

/// Returns a folder as timm's `save_for_hf` writes it, its weights all alike.
pub fn timm() -> Files {
    let (d, hidden) = (12, 48);
    let block = [
        ("norm1.weight", vec![d]),
        ("norm1.bias", vec![d]),
        ("attn.qkv.weight", vec![3 * d, d]),
        ("attn.qkv.bias", vec![3 * d]),
        ("attn.proj.weight", vec![d, d]),
        ("attn.proj.bias", vec![d]),
        ("norm2.weight", vec![d]),
        ("norm2.bias", vec![d]),
        ("mlp.fc1.weight", vec![hidden, d]),
        ("mlp.fc1.bias", vec![hidden]),
        ("mlp.fc2.weight", vec![d, hidden]),
        ("mlp.fc2.bias", vec![d]),
    ];
    let others = [
        ("cls_token", vec![1, 1, d]),
        ("pos_embed", vec![1, 5, d]),
        ("patch_embed.proj.weight", vec![d, 3, 2, 2]),
        ("patch_embed.proj.bias", vec![d]),
        ("norm.weight", vec![d]),
        ("norm.bias", vec![d]),
        ("head.weight", vec![3, d]),
        ("head.bias", vec![3]),
    ];
    let named = block.into_iter().map(|(name, shape)| (format!("blocks.0.{name}"), shape));
    let tensors: Vec<(String, Vec<usize>)> =
        named.chain(others.into_iter().map(|(name, shape)| (name.to_string(), shape))).collect();
    let config = json!({
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 3,
        "num_features": d,
        "global_pool": "token",
        "model_args": {"img_size": 4, "patch_size": 2, "embed_dim": d, "depth": 1, "num_heads": 3},
        "pretrained_cfg": {
            "input_size": [3, 4, 4],
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "crop_mode": "center",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "num_classes": 3,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    });
    vec![("config.json".into(), text(&config)), ("model.safetensors".into(), of_shapes(&tensors))]
}

/// Splits the weights of a folder into two files with an index.
pub fn in_shards(mut files: Files) -> Files {
    let at = files.iter().position(|(name, _)| name == "model.safetensors").unwrap();
    let (_, bytes) = files.swap_remove(at);
    let whole = SafeTensors::deserialize(&bytes).unwrap();
    let mut names = whole.names();
    names.sort();
    let name = |shard: usize| format!("model-{:05}-of-00002.safetensors", shard + 1);
    let halves: Vec<&[&str]> = names.chunks(names.len().div_ceil(2)).collect();
    for (shard, names) in halves.iter().enumerate() {
        let part = names.iter().map(|&name| (name, whole.tensor(name).unwrap()));
        files.push((name(shard), safetensors::serialize(part, None).unwrap()));
    }
    let shard_of = halves.iter().enumerate().flat_map(|(shard, names)| names.iter().map(move |key| (*key, shard)));
    let map: Value =
        shard_of.map(|(key, shard)| (key.to_string(), json!(name(shard)))).collect::<serde_json::Map<_, _>>().into();
    let index = json!({"metadata": {"total_size": bytes.len()}, "weight_map": map});
    files.push(("model.safetensors.index.json".into(), text(&index)));
    files
}

/// Returns a file of safetensors with tensors of these shapes.
fn of_shapes(tensors: &[(String, Vec<usize>)]) -> Vec<u8> {
    let filled: Vec<Vec<u8>> =
        tensors.iter().map(|(_, shape)| 0.25f32.to_le_bytes().repeat(shape.iter().product())).collect();
    let views = tensors
        .iter()
        .zip(&filled)
        .map(|((name, shape), data)| (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

fn text(value: &Value) -> Vec<u8> {
    serde_json::to_vec_pretty(value).unwrap()
}

/// Returns the official files of CIFAR-10, with a few records each.
pub fn cifar10() -> Files {
    let record = |label: u8| [vec![label], vec![7 * label; 3072]].concat();
    let batch = |i: usize| (format!("data_batch_{i}.bin"), [record(1), record(9)].concat());
    let classes = "airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n";
    let others = [("test_batch.bin".into(), record(3)), ("batches.meta.txt".into(), classes.into())];
    (1..=5).map(batch).chain(others).collect()
}

/// Returns a folder of images, of two classes and several formats.
pub fn images() -> Files {
    let image = DynamicImage::from(RgbImage::from_fn(9, 6, |x, y| Rgb([20 * x as u8, 40 * y as u8, 90])));
    let mut files = vec![];
    for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::Bmp, ImageFormat::WebP] {
        let extension = format.extensions_str()[0];
        let mut bytes = Cursor::new(vec![]);
        // an encoder that is not built in is left out
        if image.write_to(&mut bytes, format).is_ok() {
            let bytes = bytes.into_inner();
            files.push((format!("train/cat/1.{extension}"), bytes.clone()));
            files.push((format!("train/dog/1.{extension}"), bytes.clone()));
            files.push((format!("test/cat/2.{extension}"), bytes));
        }
    }
    assert!(files.len() >= 6, "PNG and JPEG can be written");
    files
}
