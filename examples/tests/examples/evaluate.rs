//! Weights of other libraries: measured with `evaluate`, tuned with `vit_cifar`, saved for other
//! libraries.

use std::fs;
use std::path::Path;

use burn::backend::Flex;
use flops_vit::checkpoint::{self, Card, Pretrained};
use serde_json::Value;

use crate::vit_cifar::{card, config, folder};
use crate::{fail, succeed};

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Returns a folder with a random model in `published`, in the format of `transformers`.
fn published() -> tempfile::TempDir {
    let dir = folder();
    let tiny = checkpoint::load::<Flex>(&dir.path().join("tiny.safetensors"), &Default::default()).unwrap();
    tiny.save_huggingface(&dir.path().join("published")).unwrap();
    dir
}

#[test]
fn accuracy_matches_the_run_and_the_classes() {
    let dir = published();
    let run =
        ["--weights", "published", "--limit", "100", "--queries", "4", "--epochs", "2", "--copies", "0", "--plain"];
    let out = succeed("vit_cifar", dir.path(), &run);
    assert!(out.contains("huggingface"), "{out}");
    let artifacts = dir.path().join("artifacts/vit_cifar");
    let after = json(&artifacts.join("summary.json"))["accuracy_after"].as_f64().unwrap();
    // the run's own file, and the folder that transformers reads
    for weights in ["artifacts/vit_cifar/model.safetensors", "artifacts/vit_cifar/huggingface"] {
        let args = ["--weights", weights, "--dataset", "digits", "--limit", "100", "--artifact-dir", "seen"];
        let out = succeed("evaluate", dir.path(), &args);
        assert!(out.contains("top-1 accuracy") && out.contains("top-5 accuracy"), "{out}");
        let summary = json(&dir.path().join("seen/summary.json"));
        let of = |key: &str| summary[key].as_f64().unwrap();
        assert!((of("top1") - after).abs() < 1e-9, "{}: {after}", of("top1"));
        assert!(of("top5") >= of("top1") && of("top5") < 1.0, "{}", of("top5"));
        // the mean over the classes, weighted by their images, is the accuracy on all images
        let classes = summary["classes"].as_array().unwrap();
        let (mut correct, mut images) = (0.0, 0.0);
        for class in classes {
            let n = class["images"].as_f64().unwrap();
            correct += n * class["top1"].as_f64().unwrap_or(0.0);
            images += n;
        }
        assert_eq!((classes.len(), images), (10, 100.0));
        assert!((correct / images - after).abs() < 1e-9);
        assert!(fs::read_to_string(dir.path().join("seen/classes.csv")).unwrap().lines().count() == 11);
        assert!(fs::read_to_string(dir.path().join("seen/confusion.svg")).unwrap().starts_with("<svg"));
    }
}

/// Writes three images in each of the folders `names`, the same for the same position.
fn pictures(dir: &Path, names: &[String]) {
    for (class, name) in names.iter().enumerate() {
        fs::create_dir_all(dir.join(name)).unwrap();
        for i in 0..3u8 {
            let colour = image::Rgb([20 * class as u8, 80 * i, 255 - 20 * class as u8]);
            image::RgbImage::from_pixel(8, 8, colour).save(dir.join(name).join(format!("{i}.png"))).unwrap();
        }
    }
}

#[test]
fn numbered_folders_are_outputs_of_that_number() {
    let dir = folder();
    let labels = (0..12).map(|i| format!("LABEL_{i}")).collect();
    let card = Card { classes: labels, ..card(config().with_num_classes(12)) };
    let model = config().with_num_classes(12).init::<Flex>(&Default::default()).unwrap();
    Pretrained { model, card }.save(&dir.path().join("twelve.safetensors")).unwrap();
    // in the alphabet, 10 and 11 come before 2; padded with zeros they do not
    pictures(&dir.path().join("plain"), &(0..12).map(|i| i.to_string()).collect::<Vec<_>>());
    pictures(&dir.path().join("padded"), &(0..12).map(|i| format!("{i:02}")).collect::<Vec<_>>());
    let loss = |images: &str| {
        let args = ["--weights", "twelve.safetensors", "--dataset", images, "--split", "all", "--artifact-dir", "seen"];
        let out = succeed("evaluate", dir.path(), &args);
        assert!(out.contains("the data's classes are numbers"), "{out}");
        let summary = json(&dir.path().join("seen/summary.json"));
        assert_eq!(summary["images"], 36);
        summary["loss"].as_f64().unwrap()
    };
    let (plain, padded) = (loss("folder:plain"), loss("folder:padded"));
    assert!((plain - padded).abs() < 1e-6, "{plain} {padded}");
}

#[test]
fn some_of_the_models_classes_are_evaluated_among_all() {
    let dir = folder();
    pictures(&dir.path().join("some"), &["3".to_string(), "7".into()]);
    fs::write(dir.path().join("some/labels.csv"), "text").unwrap();
    let args = ["--weights", "tiny.safetensors", "--dataset", "folder:some", "--artifact-dir", "seen"];
    let out = succeed("evaluate", dir.path(), &args);
    assert!(out.contains("the data has 2 of the model's 10 classes"), "{out}");
    assert!(out.contains("there is no folder of test images") && out.contains("some/labels.csv"), "{out}");
    let summary = json(&dir.path().join("seen/summary.json"));
    assert_eq!(
        (&summary["images"], &summary["model_classes"], &summary["left_out_files"]),
        (&2.into(), &10.into(), &1.into())
    );
    assert!(fs::read_to_string(dir.path().join("seen/confusion.svg")).unwrap().contains("other"));
}

#[test]
fn a_new_image_size_and_head_are_reported() {
    let dir = folder();
    let few = Card { classes: vec!["a".into(), "b".into()], ..card(config().with_num_classes(2)) };
    let model = config().with_num_classes(2).init::<Flex>(&Default::default()).unwrap();
    Pretrained { model, card: few }.save(&dir.path().join("two.safetensors")).unwrap();
    let args = ["--weights", "two.safetensors", "--img-size", "12", "--limit", "20", "--queries", "2", "--epochs", "1"];
    let out = succeed("vit_cifar", dir.path(), &[&args[..], &["--copies", "0", "--plain"]].concat());
    assert!(out.contains("the pretrained head has 2 classes and the data 10: a new head is trained"), "{out}");
    let saved = dir.path().join("artifacts/vit_cifar/model.safetensors");
    let card = checkpoint::load::<Flex>(&saved, &Default::default()).unwrap().card;
    assert_eq!((card.config.img_size, card.config.num_classes), (12, 10));
}

#[test]
fn a_dry_run_reports_the_cost_and_trains_nothing() {
    let dir = folder();
    let base = ["--weights", "tiny.safetensors", "--limit", "70", "--queries", "4", "--epochs", "3", "--copies", "0"];
    let out = succeed("vit_cifar", dir.path(), &[&base[..], &["--dry-run"]].concat());
    for (name, value) in
        [("parameters trained", "("), ("steps", "6"), ("queries", "840"), ("row-forwards", ","), ("seconds", "")]
    {
        let line = out.lines().find(|l| l.trim_start().starts_with(name)).unwrap_or_else(|| panic!("{name}:\n{out}"));
        assert!(line.contains(value), "{line}");
    }
    assert!(!dir.path().join("artifacts/vit_cifar/summary.json").exists());
    // the run spends what was reported
    succeed("vit_cifar", dir.path(), &[&base[..], &["--plain"]].concat());
    let summary = json(&dir.path().join("artifacts/vit_cifar/summary.json"));
    assert_eq!((&summary["steps"], &summary["queries_used"]), (&6.into(), &840.into()));
    let out = succeed("vit_cifar", dir.path(), &[&base[..], &["--dry-run", "--method", "backprop"]].concat());
    assert!(out.contains("parameters trained") && !out.contains("row-forwards"), "{out}");
}

#[test]
fn errors_name_the_weights_and_the_classes() {
    let dir = published();
    let named = |args: &[&str], expected: &str| {
        let error = fail("evaluate", dir.path(), args);
        assert!(error.contains(expected), "{args:?}: {error}");
    };
    named(&["--weights", "nowhere"], "nowhere");
    named(&["--weights", "hf:a/b/c"], "hf:ORG/NAME");
    // the cache of this test is empty
    let empty = dir.path().join("cache");
    let output = std::process::Command::new(crate::example("evaluate"))
        .args(["--weights", "hf:org/name"])
        .current_dir(dir.path())
        .env("HF_HOME", &empty)
        .env("HF_ENDPOINT", "http://127.0.0.1:9")
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(
        error.contains("hf:org/name") && error.contains("model.safetensors") && error.lines().count() == 1,
        "{error}"
    );
    // classes of other data
    let cow = dir.path().join("images/cow");
    let owl = dir.path().join("images/owl");
    for class in [&cow, &owl] {
        fs::create_dir_all(class).unwrap();
        for i in 0..5u8 {
            image::RgbImage::from_pixel(9, 8, image::Rgb([i, 0, 0])).save(class.join(format!("{i}.png"))).unwrap();
        }
    }
    named(&["--weights", "published", "--dataset", "folder:images"], "cow, owl");
    named(&["--weights", "published", "--dataset", "digits", "--img-size", "9"], "img_size = 9");
    named(&["--weights", "published", "--dataset", "digits", "--limit", "0"], "--limit 0");
}
