//! The imported network: the same numbers, all of its weights, and training.

#[path = "../build/convert.rs"]
mod convert;
#[path = "../build/operators.rs"]
mod operators;

use std::path::Path;
use std::process::Command;

use burn::module::AutodiffModule;
use burn::prelude::*;
use flops_core::allocator::{Neyman, Uniform};
use flops_core::parameters::{Parameter, parameters};
use flops_core::{ForwardConfig, ForwardModel, NoiseLaw, Probe, QueryBudget, Sampling, Space};
use flops_foreign::digits::{self, CLASSES};
use flops_foreign::imported::{Model, Probed};
use flops_foreign::table::Table;
use flops_foreign::train::{AB, B, Plan, RowClassifier, backprop, forward_only};

const EXPECTED: &str = include_str!("../models/network.csv");

fn network() -> Model<AB> {
    Model::from_embedded(&Default::default())
}

/// `models/make.py` wrote the logits of onnxruntime for the first 8 test digits.
#[test]
fn logits_match_onnxruntime() {
    let (_, test) = digits::load().unwrap().split();
    let expected: Vec<f32> = EXPECTED.split([',', '\n']).filter_map(|value| value.parse().ok()).collect();
    assert_eq!(expected.len(), 8 * CLASSES);
    let input = || test.batch::<B>(&(0..8).collect::<Vec<_>>(), &Default::default()).input;
    let network = network().valid();
    let generated = network.forward(input());
    let probed = Probed { network }.forward(input(), &mut Probe::clean());
    for logits in [generated, probed] {
        let found: Vec<f32> = logits.into_data().iter().collect();
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert!((found - expected).abs() < 1e-4, "row {}, class {}: {found}, not {expected}", i / 10, i % 10);
        }
    }
}

/// 3,738 values are in the file (`models/make.py` prints it). Those of layers are trained, mean and
/// scale of the pixels are not.
#[test]
fn all_weights_of_layers_are_trained_and_constants_are_not() {
    let found = parameters(&network());
    let line = |p: &Parameter| format!("{} {} {}", p.path.join("."), p.values(), p.trained);
    let text: Vec<String> = found.iter().map(line).collect();
    let expected = [
        "constant1 64 false",
        "constant2 64 false",
        "linear1.weight 3072 true",
        "linear1.bias 48 true",
        "linear2.weight 480 true",
        "linear2.bias 10 true",
    ];
    assert_eq!(text, expected);
    assert_eq!(found.iter().map(Parameter::values).sum::<usize>(), 3738);
}

fn loss<M: RowClassifier<B>>(model: &M, table: &Table) -> f64 {
    let batch = table.all::<B>(&Default::default());
    let output = model.forward(batch.input, &mut Probe::clean());
    model.losses(output, batch.target).mean().into_scalar().elem()
}

/// Each way lowers the training loss of 2.46 to 1.7 at most, and leaves the constants as they are.
/// Weight noise was seen to reach 1.38.
#[test]
fn every_way_of_training_lowers_the_loss() {
    let data = digits::other_camera(digits::load().unwrap()).split();
    let (train, test) = (&data.0, &data.1);
    let budget = QueryBudget::new(10, 1).unwrap();
    let plan = |lr| Plan { lr, passes: 100 * 64 * 11, seed: 0, threads: 2 };
    let before = loss(&network().valid(), train);
    let weights = ForwardConfig::new(budget).with_space(Space::weights()).with_noise(NoiseLaw::Gaussian);
    let weights = weights.with_sampling(Sampling::Antithetic);
    let weights = forward_only(network(), Uniform, weights, plan(3e-3), (train, test)).unwrap().model;
    let probed = Probed { network: network() };
    let activations = forward_only(probed, Neyman, ForwardConfig::new(budget), plan(3e-3), (train, test)).unwrap();
    let gradients = backprop(network(), plan(3e-3), (train, test)).unwrap().model;
    let constants = |model: &Model<AB>| -> Vec<f32> {
        model
            .constants()
            .into_iter()
            .flat_map(|constant| constant.into_data().iter::<f32>().collect::<Vec<_>>())
            .collect()
    };
    for (way, model) in [("weights", weights), ("activations", activations.model.network), ("gradients", gradients)] {
        let found = parameters(&model);
        assert!(found.iter().all(|p| p.trained == p.path[0].starts_with("linear")), "{way}: {found:?}");
        let after = loss(&model.valid(), train);
        assert!(before > 2.0 && after < 1.7, "{way}: {before} before, {after} after");
        assert_eq!(constants(&model), constants(&network()), "{way}");
    }
}

/// burn-onnx makes layers of what it recognises. A Gemm without alpha and beta it does not recognise.
#[test]
fn weights_that_became_constants_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let warning = |file: &str| convert::convert(Path::new(file), folder.path()).unwrap();
    assert_eq!(warning("models/network.onnx"), None);
    let told = warning("tests/files/bare_gemm.onnx").unwrap();
    assert!(told.starts_with("tests/files/bare_gemm.onnx: constant3, constant5 became constants"), "{told}");
}

#[test]
fn files_that_cannot_be_imported_are_refused_in_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |file: &Path| {
        let error = convert::convert(file, folder.path()).unwrap_err();
        assert!(error.starts_with(&format!("{}: ", file.display())) && !error.contains('\n'), "{error:?}");
        error
    };
    let forest = refused(Path::new("tests/files/five_features.onnx"));
    assert!(forest.contains("burn-onnx cannot import the operators TreeEnsembleClassifier"), "{forest}");
    assert!(forest.contains("export the network without them"), "{forest}");
    assert!(refused(Path::new("no/such.onnx")).contains("there is no such file; name an ONNX file"));
    let whole = std::fs::read("models/network.onnx").unwrap();
    for end in [0, 40, whole.len() / 2, whole.len() - 9] {
        let cut = folder.path().join("cut.onnx");
        std::fs::write(&cut, &whole[..end]).unwrap();
        let error = refused(&cut);
        assert!(error.contains("burn-onnx cannot import it"), "{end}: {error}");
    }
}

#[test]
fn the_program_leaves_its_files() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    let arguments = ["--artifact-dir", out, "--seeds", "1", "--steps", "2", "--queries", "2"];
    let output = Command::new(env!("CARGO_BIN_EXE_imported")).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let summary = std::fs::read_to_string(folder.path().join("summary.json")).unwrap();
    let summary: serde_json::Value = serde_json::from_str(&summary).unwrap();
    assert_eq!((&summary["values_trained"], &summary["values_constant"]), (&3610.into(), &128.into()));
    let rows = |way: &str| summary["ways"][way]["rows"]["mean"].as_f64().unwrap();
    for way in ["weight noise", "activation noise", "backpropagation"] {
        assert!((384.0..600.0).contains(&rows(way)), "{way}: {} rows", rows(way));
    }
    for name in ["accuracy.csv", "accuracy.svg"] {
        assert!(folder.path().join(name).is_file(), "{name}");
    }
}
