//! The forest behind tract, the adapter in front of it, and what is refused.

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use burn::module::AutodiffModule;
use flops_core::allocator::Neyman;
use flops_core::{ForwardConfig, ForwardModel, Probe, QueryBudget};
use flops_foreign::adapter::Adapter;
use flops_foreign::classifier::Classifier;
use flops_foreign::digits::{self, CLASSES, PIXELS};
use flops_foreign::train::{AB, Plan, accuracy, forward_only};

const EXPECTED: &str = include_str!("../models/forest.csv");

/// `models/make.py` wrote what `predict_proba` gave for the first 8 test digits.
#[test]
fn probabilities_match_scikit_learn() {
    let (_, test) = digits::load().unwrap().split();
    let expected: Vec<f32> = EXPECTED.split([',', '\n']).filter_map(|value| value.parse().ok()).collect();
    assert_eq!(expected.len(), 8 * CLASSES);
    let found = Classifier::embedded().unwrap().probabilities(&test.values[..8 * PIXELS], 8).unwrap();
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert!((found - expected).abs() < 1e-6, "row {}, class {}: {found}, not {expected}", i / 10, i % 10);
    }
}

/// From 41.7 % to 65 % at least, and from right or wrong alone to 48 %.
#[test]
fn training_raises_accuracy() {
    let (train, test) = digits::other_camera(digits::load().unwrap()).split();
    for (answers_only, least) in [(false, 65.0), (true, 48.0)] {
        let classifier = Arc::new(Classifier::embedded().unwrap());
        let adapter = Adapter::<AB>::new(classifier.clone(), &train, answers_only, &Default::default());
        let config = ForwardConfig::new(QueryBudget::new(5, 1).unwrap()).for_steps().with_sigma(0.5);
        let plan = Plan { lr: 0.02, passes: 50 * 64 * 6, seed: 0, threads: 2 };
        let before = accuracy(&adapter.valid(), &test, 2).unwrap();
        let run = forward_only(adapter, Neyman, config, plan, (&train, &test)).unwrap();
        let after = accuracy(&run.model.valid(), &test, 2).unwrap();
        assert!(before < 45.0 && after > least, "{before} % before, {after} % after");
        // every row that training counts is one that the forest was asked about
        let looks = run.looks.len() as u64 + 2;
        let checked = classifier.rows() - run.looks.last().unwrap().0 - looks * test.len() as u64;
        assert!(checked <= 64, "{checked} rows beside those that were counted");
    }
}

/// What is saved maps rows as the adapter does, whose noise-free outputs the forest is asked about.
#[test]
fn a_saved_adapter_is_the_adapter() {
    let (train, test) = digits::other_camera(digits::load().unwrap()).split();
    let classifier = Arc::new(Classifier::embedded().unwrap());
    let adapter = Adapter::<AB>::new(classifier.clone(), &train, false, &Default::default());
    let config = ForwardConfig::new(QueryBudget::new(2, 1).unwrap()).for_steps().with_sigma(0.5);
    let plan = Plan { lr: 0.02, passes: 10 * 64 * 3, seed: 0, threads: 2 };
    let model = forward_only(adapter, Neyman, config, plan, (&train, &test)).unwrap().model;
    let map: Vec<Vec<f32>> =
        model.csv().lines().map(|line| line.split(',').map(|value| value.parse().unwrap()).collect()).collect();
    let rows = 20;
    let mapped: Vec<f32> = (0..rows)
        .flat_map(|row| {
            let x = &test.values[row * PIXELS..][..PIXELS];
            let product = |j: usize| x.iter().zip(&map).map(|(x, line)| x * line[j]).sum::<f32>() + map[PIXELS][j];
            (0..PIXELS).map(product).collect::<Vec<_>>()
        })
        .collect();
    let by_map = classifier.probabilities(&mapped, rows).unwrap();
    let batch = test.batch(&(0..rows).collect::<Vec<_>>(), &Default::default());
    let by_adapter: Vec<f32> = model.valid().forward(batch.input, &mut Probe::clean()).into_data().iter().collect();
    // a threshold may lie between two roundings: at most a row in twenty may differ
    let differ = (0..rows).filter(|row| {
        let of = |all: &[f32]| all[row * CLASSES..][..CLASSES].to_vec();
        of(&by_map).iter().zip(of(&by_adapter)).any(|(a, b)| (a - b).abs() > 1e-4)
    });
    assert!(differ.count() <= 1);
}

/// The line that reading `bytes` fails with.
fn refusal(bytes: &[u8]) -> String {
    let error = format!("{:#}", Classifier::new(bytes, "x.onnx").unwrap_err());
    assert!(error.starts_with("x.onnx: ") && !error.contains('\n'), "{error:?}");
    error
}

#[test]
fn broken_files_are_refused_in_a_line() {
    let file = |name: &str| std::fs::read(Path::new("tests/files").join(name)).unwrap();
    let remedy = "to_onnx(…, options={id(model): {'zipmap': False}})";
    for (name, operator) in [("zipmap.onnx", "ZipMap"), ("regressor.onnx", "TreeEnsembleRegressor")] {
        let error = refusal(&file(name));
        assert!(error.contains(&format!("tract cannot run the operator {operator};")), "{error}");
        assert!(error.contains(remedy), "{error}");
    }
    let mut labels = file("five_features.onnx");
    let classes = labels.windows(22).position(|part| part == b"classlabels_int64s\x40\x00\x40\x01").unwrap();
    (labels[classes + 19], labels[classes + 21]) = (1, 2);
    assert!(refusal(&labels).contains("its classes are [1, 2]; train and export it with classes that count from 0"));
    let logits = refusal(&std::fs::read("models/network.onnx").unwrap());
    assert!(logits.contains("no output has probabilities"), "{logits}");
    let whole = file("five_features.onnx");
    assert_eq!(Classifier::new(&whole, "x").unwrap().features, 5);
    assert!(refusal(&[]).contains("this is no ONNX file"));
    assert!(refusal(b"label,pixel\n1,2\n").contains("this is no ONNX file"));
    // cut anywhere, it is refused or, behind the graph, whole
    for end in (0..whole.len()).step_by(7) {
        if let Err(error) = Classifier::new(&whole[..end], "x.onnx") {
            assert!(!format!("{error:#}").contains('\n'), "{error:#}");
        } else {
            assert!(end * 10 > whole.len() * 9, "the first {end} of {} bytes are taken", whole.len());
        }
    }
}

fn forest(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_forest")).args(arguments).output().unwrap()
}

#[test]
fn the_program_fails_in_a_line_with_code_1() {
    let fails = |arguments: &[&str], says: &str| {
        let output = forest(arguments);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {error}");
        assert!(error.starts_with("error: ") && error.lines().count() == 1, "{arguments:?}: {error}");
        assert!(error.contains(says), "{arguments:?}: {error}");
    };
    fails(&["--model", "no/such.onnx"], "no/such.onnx: cannot be read; name an ONNX file");
    fails(&["--model", "tests/files/zipmap.onnx"], "operator ZipMap");
    let five = "the rows have 64 features, and the model takes 5; use the data it was made for (--data)";
    fails(&["--model", "tests/files/five_features.onnx"], five);
    fails(&["--steps", "0"], "--steps 0: use 1 to 1000000");
    fails(&["--seeds", "many"], "invalid value 'many'");
    fails(&["--sigma=-1"], "sigma");
    let folder = tempfile::tempdir().unwrap();
    let data = |text: &str| {
        let file = folder.path().join("rows.csv");
        std::fs::write(&file, text).unwrap();
        file.to_str().unwrap().to_string()
    };
    fails(&["--data", &data(&"0,1,2,3,0.5\n".repeat(5))], "the last column has 0.5, which is no label");
    let unknown = ["--model", "tests/files/five_features.onnx", "--data", &data(&"0,0,0,0,0,2\n".repeat(5))];
    fails(&unknown, "the rows have the label 2, and the model has the classes 0 to 1");
    let sorted = data(&("0,0,0,0,0,1\n".to_string() + &"0,0,0,0,0,0\n".repeat(4)));
    let sorted = ["--model", "tests/files/five_features.onnx", "--data", &sorted];
    fails(&sorted, "no row to train on has the label 1; shuffle the rows");
    let blocked = format!("{}/x", data(""));
    fails(&["--artifact-dir", &blocked], "no folder can be made there");
}

#[test]
fn the_program_takes_a_model_and_rows_of_the_user() {
    let folder = tempfile::tempdir().unwrap();
    let (rows, artifacts) = (folder.path().join("rows.csv"), folder.path().join("out"));
    let text: String = (0..40).map(|i| format!("{},{},0.5,{},0,{}\n", i % 3, i % 5, i % 7, i % 2)).collect();
    std::fs::write(&rows, text).unwrap();
    let paths = [&rows, &artifacts].map(|path| path.to_str().unwrap());
    let [rows, out] = paths;
    let output = forest(&[
        "--model",
        "tests/files/five_features.onnx",
        "--data",
        rows,
        "--artifact-dir",
        out,
        "--seeds",
        "2",
        "--steps",
        "3",
        "--queries",
        "2",
    ]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read = |name: &str| std::fs::read_to_string(artifacts.join(name)).unwrap();
    let summary: serde_json::Value = serde_json::from_str(&read("summary.json")).unwrap();
    assert_eq!(summary["accuracy_after"]["by_seed"].as_array().unwrap().len(), 2);
    assert!(summary["accuracy_on_known_data"].is_null());
    assert!(read("accuracy.csv").starts_with("way,seed,rows,test_accuracy\nadapter,0,0,"));
    assert!(read("accuracy.svg").contains("<svg"));
    // five rows of the matrix and the offset, of every seed
    for seed in 0..2 {
        let adapter = read(&format!("adapter-{seed}.csv"));
        assert!(adapter.lines().count() == 6 && adapter.lines().all(|line| line.split(',').count() == 5), "{adapter}");
    }
}
