use std::fs;
use std::path::Path;

use burn::backend::Flex;
use burn::prelude::*;
use flops_core::{ForwardModel, Probe};
use flops_vit::checkpoint::{self, Card, Pretrained};
use flops_vit::{Noise, Normalization, Resizing, Scope, ViT, ViTConfig};
use serde_json::{Value, json};
use tempfile::TempDir;

const NAME: &str = "vit_cifar";
/// 70 training images and one copy of each: the last batch of an epoch is smaller than the others.
const TINY: [&str; 12] = [
    "--weights",
    "tiny.safetensors",
    "--limit",
    "70",
    "--batch-size",
    "32",
    "--queries",
    "4",
    "--epochs",
    "2",
    "--copies",
    "1",
];

pub fn config() -> ViTConfig {
    let config =
        ViTConfig::new().with_img_size(8).with_patch_size(4).with_embed_dim(16).with_depth(2).with_num_heads(2);
    config.with_num_classes(10)
}

pub fn card(config: ViTConfig) -> Card {
    let classes = (0..config.num_classes).map(|i| i.to_string()).collect();
    let (normalization, resizing) = (Normalization::DIGITS, Resizing::default());
    Card { config, normalization, resizing, classes, description: "random".into() }
}

/// Returns a folder with a small, random model in `tiny.safetensors`.
pub fn folder() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let model = config().init::<Flex>(&Default::default()).unwrap();
    Pretrained { model, card: card(config()) }.save(&dir.path().join("tiny.safetensors")).unwrap();
    dir
}

fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [TINY.as_slice(), more].concat()
}

fn succeed(dir: &Path, more: &[&str]) -> String {
    crate::succeed(NAME, dir, &with(more))
}

fn fail(dir: &Path, more: &[&str]) -> String {
    crate::fail(NAME, dir, &with(more))
}

fn summary(run: &Path) -> Value {
    serde_json::from_slice(&fs::read(run.join("summary.json")).unwrap()).unwrap()
}

fn model(run: &Path) -> Vec<u8> {
    fs::read(run.join("model.safetensors")).unwrap()
}

#[test]
fn a_run_writes_its_files_and_spends_its_budget() {
    let dir = folder();
    let out = succeed(dir.path(), &[]);
    for text in ["epoch 1/2", "epoch 2/2", "test accuracy after", "queries used", "variance relative to uniform"] {
        assert!(out.contains(text), "'{text}' is missing:\n{out}");
    }
    let run = dir.path().join("artifacts/vit_cifar");
    let summary = summary(&run);
    for (key, value) in [("method", "forward"), ("dataset", "digits"), ("scope", "cls_tail"), ("allocator", "neyman")] {
        assert_eq!(summary[key], value, "{key}");
    }
    assert_eq!(summary["steps"], 10);
    assert_eq!(summary["query_budget"], 2 * 140 * 4);
    assert_eq!(summary["queries_used"], summary["query_budget"]);
    let sites = summary["site_reports"].as_array().unwrap();
    assert!(sites.len() > 1 && sites.iter().all(|site| site["alpha"] == 1.0), "unbiased: {sites:?}");
    for key in
        ["accuracy_before", "accuracy_after", "loss_after", "seconds", "variance_vs_uniform", "floor", "sigma", "lr"]
    {
        assert!(summary[key].is_f64(), "{key}: {}", summary[key]);
    }
    for key in ["space", "noise", "sampling", "config", "seed", "versions"] {
        assert!(!summary[key].is_null(), "{key}");
    }
    let metrics = fs::read_to_string(run.join("metrics.csv")).unwrap();
    assert!(metrics.starts_with("split,epoch,step,queries,seconds,loss,accuracy,step_queries,"));
    assert_eq!(metrics.lines().filter(|line| line.starts_with("train,")).count(), 10);
    assert_eq!(metrics.lines().filter(|line| line.starts_with("test,")).count(), 3);
    assert!(fs::read_to_string(run.join("curves.svg")).unwrap().starts_with("<svg"));
    let card = checkpoint::load::<Flex>(&run.join("model.safetensors"), &Default::default()).unwrap().card;
    assert!(card.description.contains("fine-tuned on digits"));
}

#[test]
fn every_method_scope_space_and_allocator_runs() {
    let dir = folder();
    let check = |more: &[&str]| {
        let run = dir.path().join("run");
        succeed(dir.path(), &[&["--artifact-dir", "run"], more].concat());
        let summary = summary(&run);
        assert_eq!(summary["queries_used"], summary["query_budget"], "{more:?}");
        summary
    };
    for scope in ["head", "bias_norm", "last:1", "lora:2", "full"] {
        let settings = check(&["--scope", scope, "--allocator", "uniform"])["config"].clone();
        let noise = Noise::new(scope.parse::<Scope>().unwrap());
        assert_eq!(settings["sites"], noise.sites.to_string(), "{scope}");
        assert_eq!(settings["estimate"], noise.estimate.name(), "{scope}");
        assert_eq!(settings["sigma"], noise.sigma, "{scope}");
    }
    // flags, and the settings of another method, come before what is recommended for the scope
    let unbiased = check(&["--scope", "full", "--estimate", "unbiased"])["config"].clone();
    assert_eq!((&unbiased["sites"], &unbiased["sigma"]), (&json!("branch"), &json!(0.01)));
    let other = check(&["--scope", "full", "--method", "flops"])["config"].clone();
    assert_eq!((&other["sites"], &other["estimate"]), (&json!("linear"), &json!("unbiased")));
    for method in ["flops", "mezo", "fzoo", "es", "eggroll", "lozo", "zo-muon", "pseuzo"] {
        let summary = check(&["--method", method]);
        assert_eq!(summary["method"], method);
        let optimizer = if method == "zo-muon" { "muon" } else { "adamw" };
        assert_eq!(summary["config"]["optimizer"], optimizer);
    }
    check(&["--allocator", "bernoulli", "--variance", "pilot:1", "--memory-bound", "1000000"]);
    let summary = check(&["--variance", "loss", "--memory-bound", "1"]);
    assert!(summary["advice"][0]["message"].as_str().unwrap().contains("1 are allowed"), "{}", summary["advice"]);
    // with cost-weighted placement the budget counts passes: there are more queries
    succeed(dir.path(), &["--placement", "cost-weighted", "--scope", "full", "--artifact-dir", "weighted"]);
    let weighted = self::summary(&dir.path().join("weighted"));
    assert!(weighted["queries_used"].as_u64() > weighted["query_budget"].as_u64(), "{weighted}");
    for sampling in ["one-sided", "antithetic"] {
        check(&["--sampling", sampling, "--noise", "laplace", "--allocator", "neyman", "--min-queries", "2"]);
    }
    let weights = check(&["--space", "weights", "--no-prefix-cache"]);
    assert!(weights["variance_vs_uniform"].is_null() && weights["floor"].is_null());
    assert_eq!((&weights["allocator"], &weights["placement"]), (&Value::from("uniform"), &Value::Null));
    let backprop = check(&["--method", "backprop"]);
    assert_eq!((&backprop["queries_used"], &backprop["allocator"]), (&Value::from(0), &Value::Null));
    assert_eq!(backprop["steps"], 10);
}

#[test]
fn adapters_are_saved_alone_and_merged() {
    let dir = folder();
    let run = dir.path().join("run");
    let out = succeed(dir.path(), &["--scope", "lora:2", "--artifact-dir", "run"]);
    assert!(out.contains("adapters.safetensors"), "{out}");
    assert_eq!(summary(&run)["scope"], "lora:2");
    let device = Default::default();
    let load = |path: &Path| checkpoint::load::<Flex>(path, &device).unwrap();
    let base = load(&dir.path().join("tiny.safetensors")).model;
    let Pretrained { model: merged, card } = load(&run.join("model.safetensors"));
    let adapted = checkpoint::load_adapters(base.clone(), &run.join("adapters.safetensors")).unwrap();
    let Pretrained { model: adapted, card: of_adapters } = adapted;
    assert_eq!(adapted.lora_rank(), Some(2));
    assert_eq!(of_adapters, card);
    // B is no longer zero, and base plus adapters is the merged model
    let query = |model: &ViT<Flex>| model.blocks[1].attn.query.weight.to_data();
    assert_ne!(query(&base), query(&merged));
    assert_eq!(query(&adapted.clone().merged()), query(&merged));
    let logits = |model: &ViT<Flex>| {
        let images = Tensor::<Flex, 1>::from_floats([0.5; 3 * 64], &device).reshape([1, 3, 8, 8]);
        model.forward(images, &mut Probe::clean())
    };
    let distance: f32 = (logits(&adapted) - logits(&merged)).abs().max().into_scalar();
    assert!(distance < 1e-5, "logits differ by {distance}");
    // a run cannot start from adapters alone, and a run with another scope removes the file
    let mut args = with(&["--artifact-dir", "other"]);
    args[1] = "run/adapters.safetensors";
    assert!(crate::fail(NAME, dir.path(), &args).contains("load_adapters"));
    succeed(dir.path(), &["--scope", "head", "--artifact-dir", "run"]);
    assert!(!run.join("adapters.safetensors").exists());
}

#[test]
fn the_same_seed_gives_the_same_model() {
    let dir = folder();
    let trained = |run: &str, more: &[&str]| {
        succeed(dir.path(), &[&["--artifact-dir", run], more].concat());
        model(&dir.path().join(run))
    };
    let first = trained("first", &["--threads", "1"]);
    let second = trained("second", &["--threads", "2", "--beside", "first"]);
    assert!(first == second, "the same seed gave another model");
    let curves = |run: &str| fs::read_to_string(dir.path().join(run).join("curves.svg")).unwrap();
    assert!(curves("second").contains("forward, test") && !curves("first").contains("forward, test"));
    assert!(first != trained("third", &["--seed", "1"]), "another seed gave the same model");
}

#[test]
fn a_resumed_run_gives_the_same_model_as_an_uninterrupted_one() {
    let dir = folder();
    for (method, scope) in [
        ("forward", "cls_tail"),
        ("forward", "head"),
        ("backprop", "cls_tail"),
        ("forward", "lora:2"),
        ("backprop", "lora:2"),
    ] {
        let (whole, halves) = (format!("{method}_{scope}_whole"), format!("{method}_{scope}_halves"));
        let run = |more: &[&str]| succeed(dir.path(), &[&["--method", method, "--scope", scope], more].concat());
        run(&["--artifact-dir", &whole]);
        run(&["--artifact-dir", &halves, "--stop-after", "1"]);
        let out = run(&["--artifact-dir", &halves, "--resume"]);
        assert!(out.contains("going on after epoch 1 of 2") && !out.contains("epoch 1/2"), "{out}");
        let (whole, halves) = (dir.path().join(whole), dir.path().join(halves));
        assert!(model(&whole) == model(&halves), "{method}: the resumed run ended with another model");
        if scope == "lora:2" {
            let adapters = |run: &Path| fs::read(run.join("adapters.safetensors")).unwrap();
            assert!(adapters(&whole) == adapters(&halves), "{method}: the resumed run ended with other adapters");
        }
        let (a, b) = (summary(&whole), summary(&halves));
        for key in ["accuracy_before", "accuracy_after", "loss_after", "steps", "queries_used", "variance_vs_uniform"] {
            assert_eq!(a[key], b[key], "{method}: {key}");
        }
    }
}

#[test]
fn a_run_with_other_settings_or_no_checkpoint_is_not_resumed() {
    let dir = folder();
    assert!(fail(dir.path(), &["--resume"]).contains("no run to resume"));
    succeed(dir.path(), &[]);
    assert!(fail(dir.path(), &["--resume", "--lr", "0.5"]).contains("lr is 0.5"));
    assert!(fail(dir.path(), &["--resume", "--shots", "3"]).contains("shots is 3"));
    assert!(fail(dir.path(), &["--resume", "--flip"]).contains("flip is true"));
    assert!(fail(dir.path(), &["--resume", "--crop", "1"]).contains("crop is 1"));
    assert!(fail(dir.path(), &["--resume", "--allocator", "uniform"]).contains("allocator"));
    assert!(fail(dir.path(), &["--resume", "--max-rows", "100"]).contains("max_rows"));
    let checkpoint = dir.path().join("artifacts/vit_cifar/checkpoint");
    let finished = model(&dir.path().join("artifacts/vit_cifar"));
    // one flipped bit, or a file that was cut short: the epoch before is used, and it is said
    let last = checkpoint.join("model-2.mpk");
    for cut in [false, true] {
        let mut bytes = fs::read(&last).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        bytes.truncate(if cut { middle } else { bytes.len() });
        fs::write(&last, bytes).unwrap();
        let out = succeed(dir.path(), &["--resume"]);
        assert!(out.contains("model-2.mpk") && out.contains("epoch 1 is used instead"), "{out}");
        assert!(out.contains("going on after epoch 1"), "{out}");
        assert!(model(&dir.path().join("artifacts/vit_cifar")) == finished);
    }
    for epoch in [1, 2] {
        fs::write(checkpoint.join(format!("optim-{epoch}.mpk")), "").unwrap();
    }
    let refused = fail(dir.path(), &["--resume"]);
    assert!(refused.contains("optim-2.mpk") && refused.contains("optim-1.mpk"), "{refused}");
    fs::remove_dir_all(&checkpoint).unwrap();
    assert!(fail(dir.path(), &["--resume"]).contains("no finished epoch"));
}

/// Two runs in a folder would mix their checkpoints.
#[test]
fn a_folder_that_a_run_uses_is_refused_to_another() {
    let dir = folder();
    // held by this process; the lock ends with it
    let held = flops_examples::run::artifacts::Artifacts::open(&dir.path().join("artifacts/vit_cifar")).unwrap();
    let error = fail(dir.path(), &[]);
    let process = format!("process {} (", std::process::id());
    assert!(error.contains("artifacts/vit_cifar") && error.contains(&process), "{error}");
    // what only reads goes on
    succeed(dir.path(), &["--dry-run"]);
    drop(held);
    succeed(dir.path(), &["--scope", "head"]);
}

#[test]
fn errors_name_the_setting() {
    let dir = folder();
    for (args, says) in [
        (["--dataset", "mnist"], "unknown data set `mnist`"),
        (["--dataset", "folder:nowhere"], "nowhere"),
        (["--data-dir", "nowhere"], "nowhere"),
        (["--allocator", "best"], "unknown allocator 'best'"),
        (["--scope", "last:9"], "last:9"),
        (["--scope", "tail"], "tail"),
        (["--scope", "lora:0"], "lora:0"),
        (["--scope", "lora:17"], "rank 17 do not fit an embed_dim of 16"),
        (["--space", "outer"], "outer"),
        (["--noise", "pink"], "pink"),
        (["--sampling", "both"], "both"),
        (["--queries", "0"], "queries_per_datum = 0"),
        (["--min-queries", "5"], "min_per_datum = 5"),
        (["--min-queries", "0"], "min_per_datum = 0"),
        (["--sigma", "0"], "sigma = 0"),
        (["--sigma", "-0.1"], "sigma = -0.1"),
        (["--sigma", "nan"], "sigma"),
        (["--epochs", "0"], "--epochs 0"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--lr", "0"], "--lr 0"),
        (["--lr", "-1"], "--lr -1"),
        (["--limit", "0"], "--limit 0"),
        (["--shots", "0"], "--shots 0"),
        (["--shots", "1000"], "images, 1000 of every class"),
        (["--crop", "1001"], "--crop 1001"),
        (["--copies", "1001"], "--copies 1001"),
        (["--shift", "1001"], "--shift 1001"),
        (["--max-rows", "1"], "max_rows = 1"),
        (["--threads", "0"], "threads"),
        (["--stop-after", "3"], "--stop-after 3"),
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--beside", "nowhere"], "nowhere/metrics.csv"),
        (["--artifact-dir", "tiny.safetensors/run"], "cannot be written"),
    ] {
        // clap rejects a flag that is given twice
        let mut all: Vec<&str> = TINY.chunks(2).filter(|pair| pair[0] != args[0]).flatten().copied().collect();
        all.extend(args);
        if args[0] == "--data-dir" {
            all.extend(["--dataset", "cifar10"]);
        }
        let message = crate::fail(NAME, dir.path(), &all);
        assert!(message.contains(says), "{args:?} gives: {message}");
    }
}

/// What a space does not use is refused, before anything is read or written.
#[test]
fn settings_that_a_space_does_not_use_are_refused() {
    let dir = folder();
    for (args, says) in [
        (["--space", "weights", "--placement", "single"], ["placement = single", "activation or lowrank:R"]),
        (["--space", "weights", "--control-variate", "none"], ["control variate = none", "activation"]),
        (["--space", "lowrank:2", "--control-variate", "prediction"], ["control variate = prediction", "lowrank:2"]),
        (["--method", "mezo", "--placement", "joint"], ["placement = joint", "weights"]),
        (["--space", "weights", "--allocator", "neyman"], ["'neyman' allocator", "uniform"]),
        (["--method", "es", "--allocator", "gaussian"], ["'gaussian' allocator", "weight noise"]),
    ] {
        let message = fail(dir.path(), &args);
        assert!(says.iter().all(|says| message.contains(says)), "{args:?} gives: {message}");
    }
    assert!(!dir.path().join("artifacts").exists());
}

#[test]
fn errors_name_the_file() {
    let dir = folder();
    let path = |name: &str| dir.path().join(name);
    fs::create_dir(path("cifar")).unwrap();
    for name in ["data_batch_1.bin", "test_batch.bin"] {
        fs::write(path("cifar").join(name), vec![0; 3073 + 100]).unwrap();
    }
    let message = fail(dir.path(), &["--dataset", "cifar10", "--data-dir", "cifar"]);
    assert!(message.contains(".bin is truncated"), "{message}");

    let whole = fs::read(path("tiny.safetensors")).unwrap();
    let check = |name: &str, bytes: &[u8]| {
        fs::write(path(name), bytes).unwrap();
        let mut args = TINY.to_vec();
        args[1] = name;
        let message = crate::fail(NAME, dir.path(), &args);
        assert!(message.contains(name), "{message}");
    };
    check("empty.safetensors", &[]);
    check("cut.safetensors", &whole[..whole.len() / 2]);
    check("noise.safetensors", &[255; 100]);
    // the card has another width than the tensors
    let model = config().init::<Flex>(&Default::default()).unwrap();
    let wide = card(config().with_embed_dim(32));
    Pretrained { model, card: wide }.save(&path("wide.safetensors")).unwrap();
    check("wide.safetensors", &fs::read(path("wide.safetensors")).unwrap());
    // the failed runs changed and left nothing
    assert!(fs::read(path("tiny.safetensors")).unwrap() == whole);
    assert!(!path("artifacts/vit_cifar/model.safetensors").exists());
}

/// Trains the head alone, for one epoch without copies.
const QUICK: [&str; 12] = [
    "--weights",
    "tiny.safetensors",
    "--scope",
    "head",
    "--queries",
    "2",
    "--epochs",
    "1",
    "--copies",
    "0",
    "--artifact-dir",
    "run",
];

fn quick<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [QUICK.as_slice(), more].concat()
}

#[test]
fn shots_are_drawn_per_class() {
    let dir = folder();
    let trained = |more: &[&str]| {
        crate::succeed(NAME, dir.path(), &quick(&[&["--shots", "2"], more].concat()));
        let summary = summary(&dir.path().join("run"));
        assert_eq!((&summary["train_images"], &summary["shots"]), (&Value::from(20), &Value::from(2)), "{more:?}");
        // the loss of the only step, on all images
        let metrics = fs::read_to_string(dir.path().join("run/metrics.csv")).unwrap();
        let step = metrics.lines().find(|line| line.starts_with("train,")).unwrap();
        step.split(',').nth(5).unwrap().to_string()
    };
    // --limit applies to the test images only
    assert_eq!(trained(&[]), trained(&["--limit", "10"]), "the same seed chose other images");
}

#[test]
fn broken_images_are_skipped_or_an_error() {
    let dir = folder();
    for class in ["cat", "dog"] {
        fs::create_dir_all(dir.path().join("pets").join(class)).unwrap();
        for i in 0..5u8 {
            let path = dir.path().join("pets").join(class).join(format!("{i}.png"));
            image::RgbImage::from_pixel(8, 8, image::Rgb([50 * i; 3])).save(path).unwrap();
        }
    }
    let args = quick(&["--dataset", "folder:pets", "--strict"]);
    crate::succeed(NAME, dir.path(), &args);
    assert_eq!(summary(&dir.path().join("run"))["skipped_images"], 0);
    for i in 5..12 {
        fs::write(dir.path().join(format!("pets/dog/{i}.png")), "no image").unwrap();
    }
    let message = crate::fail(NAME, dir.path(), &args);
    assert!(message.contains("cannot decode the image pets/dog/10.png"), "{message}");
    let out = crate::succeed(NAME, dir.path(), &args[..args.len() - 1]);
    let line = out.lines().find(|line| line.contains("cannot be decoded")).unwrap();
    assert!(line.contains("7 in all: pets/dog/10.png, pets/dog/11.png, pets/dog/5.png"), "{line}");
    assert!(line.contains("and 2 more") && !line.contains("dog/9.png"), "{line}");
    let summary = summary(&dir.path().join("run"));
    assert_eq!(summary["skipped_images"], 7);
}

#[test]
fn augmented_images_change_in_every_epoch() {
    let dir = folder();
    let trained = |run: &str, more: &[&str]| {
        succeed(dir.path(), &[&["--artifact-dir", run], more].concat());
        model(&dir.path().join(run))
    };
    let plain = trained("plain", &[]);
    for (name, flags) in [("flip", ["--flip"].as_slice()), ("crop", &["--crop", "2"])] {
        let whole = trained(name, flags);
        assert!(whole != plain, "{name} changed nothing");
        // a prefix from one epoch would be wrong in the next
        assert_eq!(summary(&dir.path().join(name))["prefix_cache"], false);
        assert_eq!(summary(&dir.path().join("plain"))["prefix_cache"], true);
        let halves = format!("{name}_halves");
        trained(&halves, &[flags, &["--stop-after", "1"]].concat());
        assert!(
            whole == trained(&halves, &[flags, &["--resume"]].concat()),
            "{name}: the resumed run ended with another model"
        );
    }
}

#[cfg(not(feature = "download"))]
#[test]
fn download_without_the_feature_names_the_feature() {
    let dir = folder();
    // without a cache
    let output = std::process::Command::new(crate::example(NAME))
        .args(with(&["--dataset", "cifar10", "--download"]))
        .env("HOME", dir.path())
        .env("XDG_CACHE_HOME", dir.path())
        .current_dir(dir.path())
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(message.contains("--features download"), "{message}");
}
