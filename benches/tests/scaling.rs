//! The program that measures several workers: it starts itself, so it is tested as a whole.
#![cfg(not(feature = "bf16"))]

use std::process::{Command, Output};

fn scaling(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_scaling")).args(arguments).output().unwrap()
}

#[test]
fn a_small_run_writes_every_figure() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let words = ["--engines", "hub", "--scopes", "head,full", "--batch", "4", "--queries", "2", "--leaves", "2"];
    let more = ["--rounds", "1", "--seconds", "0.01", "--artifact-dir", path];
    let output = scaling(&[&words[..], &more].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read = |name| std::fs::read_to_string(dir.path().join(name)).unwrap();
    let summary: serde_json::Value = serde_json::from_str(&read("summary.json")).unwrap();
    let measured = summary["measured"].as_array().unwrap();
    // four steps, each on one process with two leaves and with one, on one worker, and on two in
    // both modes
    assert_eq!(measured.len(), 4 * 5);
    for figures in measured {
        assert!(figures["speedup"][0].as_f64().is_some_and(|speedup| speedup > 0.0), "{figures}");
        let is_shared = figures["engine"] == "hub";
        assert_eq!(figures["same_bits"] == true, is_shared, "{figures}");
        assert_eq!(figures["bytes"][0].as_f64().unwrap() > 0.0, is_shared, "{figures}");
    }
    assert!(summary["links"]["hub"]["bandwidth"].as_f64().is_some_and(|bandwidth| bandwidth > 0.0));
    assert_eq!(read("scaling.csv").lines().count(), 1 + measured.len());
    assert!(read("model.csv").contains("ViT-B all 86M,activations,log,gradients,false,1024,"));
    let picture = read("scaling.svg");
    for panel in ["weights, scalars, one server", "activations, gradients, one server"] {
        assert!(picture.contains(panel), "no panel '{panel}'");
    }
    assert!(picture.contains("parallel efficiency") && picture.contains("LoRA 300k") && !picture.contains("NaN"));
}

#[test]
fn errors_name_the_flag() {
    for (flag, value, what) in [
        ("--workers", "16", "--workers 16"),
        ("--leaves", "6", "--leaves 6"),
        ("--rounds", "0", "--rounds 0"),
        ("--engines", "pigeons", "pigeons"),
        ("--seconds", "NaN", "--seconds NaN"),
    ] {
        let output = scaling(&[flag, value]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && text.contains(what), "{flag} {value}: {text}");
    }
}
