use std::fs;
use std::path::Path;

use serde_json::Value;

const NAME: &str = "clip_align";
/// Few queries and epochs: the accuracy is not tested.
const SHORT: [&str; 8] = ["--copies", "1", "--epochs", "2", "--queries", "2", "--batch-size", "331"];

fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [SHORT.as_slice(), more].concat()
}

fn summary(run: &Path) -> Value {
    serde_json::from_slice(&fs::read(run.join("summary.json")).unwrap()).unwrap()
}

#[test]
fn a_run_writes_its_files_and_a_resumed_run_gives_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let out = crate::succeed(NAME, dir.path(), &with(&[]));
    for text in ["epoch 2/2", "recall@1", "zero-shot accuracy"] {
        assert!(out.contains(text), "'{text}' is missing:\n{out}");
    }
    let run = dir.path().join("artifacts/clip_align");
    let whole = summary(&run);
    for at in ["recall_at_1", "recall_at_5", "recall_at_10"] {
        for way in ["image_to_text", "text_to_image"] {
            let value = whole[at][way].as_f64().unwrap();
            assert!((0.0..=1.0).contains(&value), "{at} {way}: {value}");
        }
    }
    // 1,324 pairs, twice, at 2 queries
    assert_eq!(whole["queries_used"], 2 * 1324 * 2);
    assert!(whole["loss_after"].as_f64().unwrap() < whole["loss_before"].as_f64().unwrap());
    let sheet = fs::read_to_string(run.join("retrieval.svg")).unwrap();
    assert_eq!(sheet.matches("<image").count(), 60);
    assert!(fs::read_to_string(run.join("curves.svg")).unwrap().contains("queries"));

    let part = |more: &[&str]| crate::succeed(NAME, dir.path(), &with(&[&["--artifact-dir", "b"], more].concat()));
    part(&["--stop-after", "1"]);
    part(&["--resume"]);
    let files = |run: &Path| fs::read(run.join("alignment.safetensors")).unwrap();
    assert!(files(&run) == files(&dir.path().join("b")), "the resumed run ended with another model");
}

#[test]
fn backprop_aligns_better_than_chance() {
    let dir = tempfile::tempdir().unwrap();
    crate::succeed(NAME, dir.path(), &["--method", "backprop", "--copies", "1", "--epochs", "8"]);
    let summary = summary(&dir.path().join("artifacts/clip_align"));
    let found = summary["recall_at_10"]["image_to_text"].as_f64().unwrap();
    assert!(found > 0.3, "recall@10 is {found}, chance is {}", 10.0 / 356.0);
}

#[test]
fn errors_name_the_setting() {
    let dir = tempfile::tempdir().unwrap();
    for (args, says) in [
        (vec!["--batch-size", "1"], "--batch-size 1"),
        (vec!["--queries", "0"], "queries"),
        (vec!["--text-encoder", "nowhere"], "nowhere"),
        (vec!["--image-encoder", "nowhere.safetensors"], "nowhere"),
        (vec!["--embed-dim", "0"], "--embed-dim 0"),
        (vec!["--resume"], "resume"),
    ] {
        let error = crate::fail(NAME, dir.path(), &args);
        assert!(error.contains(says), "{args:?}: {error}");
    }
}
