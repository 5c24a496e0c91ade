//! Estimates against backpropagation on the chosen backend, and which steps compile kernels.

use burn::module::{AutodiffModule, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::prelude::*;
use burn::train::TrainStep;
use flops_backend::{B, ON_HOST};
use flops_core::estimator::{Estimator, trained_parameters};
use flops_core::{Allocation, BackpropLearner, Batch, NoiseLaw, Placement, QueryBudget, Sampling, Space};
use flops_vit::data::ImageBatch;
use flops_vit::{Scope, ViTConfig};

use super::{images, model};

/// The inner product of an estimate and the exact gradient, and the latter's squared norm.
struct Projection<'a> {
    estimate: &'a GradientsParams,
    exact: &'a GradientsParams,
    product: f64,
    squared_norm: f64,
}

impl ModuleVisitor<B> for Projection<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let (Some(a), Some(b)) = (self.estimate.get::<B, D>(param.id), self.exact.get::<B, D>(param.id)) {
            let (a, b) = (a.into_data(), b.into_data());
            self.product += a.iter::<f64>().zip(b.iter::<f64>()).map(|(a, b)| a * b).sum::<f64>();
            self.squared_norm += b.iter::<f64>().map(|b| b * b).sum::<f64>();
        }
    }
}

fn tiny() -> ViTConfig {
    let config = ViTConfig::new().with_img_size(8).with_patch_size(4).with_embed_dim(8).with_depth(1);
    config.with_num_heads(2).with_mlp_ratio(2.0).with_num_classes(4)
}

fn batch() -> ImageBatch<B> {
    Batch { target: Tensor::from_data([0, 0, 0, 1], &Default::default()), ..images(4, 8) }
}

/// Projects estimates on backpropagation's gradient, on the chosen backend in single precision.
///
/// There are 300 estimates, with 32 queries for each of 4 images. On a device, whose small kernels
/// take long, there are 200. The mean projection is within 5 standard errors, and 1 % for the
/// smoothing, of the squared norm. The five cases together fail by chance with probability 3·10⁻⁶.
/// The test detects wrong scales, and noise streams that depend on one another.
#[test]
fn estimates_match_backprop_in_the_mean() {
    let with_graph = model(&tiny(), Scope::Full);
    let exact = TrainStep::step(&BackpropLearner::new(with_graph.clone()), batch()).grads;
    let (trained, model) = (trained_parameters(&with_graph), with_graph.valid());
    let allocation = Allocation::project(&[1.0, 3.0, 2.0, 0.5], &QueryBudget::new(32, 1).unwrap()).unwrap();
    let (batch, steps) = (batch(), if ON_HOST { 300 } else { 200 });
    for (law, space, sampling, placement) in [
        (NoiseLaw::Rademacher, Space::activation(), Sampling::OneSided, Placement::Joint),
        (NoiseLaw::Laplace, Space::activation(), Sampling::Antithetic, Placement::Joint),
        (NoiseLaw::Uniform, Space::activation(), Sampling::OneSided, Placement::Single),
        (NoiseLaw::Gaussian, Space::weights(), Sampling::Antithetic, Placement::Joint),
        (NoiseLaw::Rademacher, Space::low_rank(2), Sampling::OneSided, Placement::Joint),
    ] {
        let space = space.with_placement(placement).unwrap_or(space);
        let estimator = Estimator { noise: law, sampling, seed: 5, sigma: 3e-4, ..Estimator::new(space) };
        let clean = estimator.clean(&model, &batch, &trained).unwrap();
        let projections: Vec<f64> = (0..steps)
            .map(|step| {
                let estimate = clean.estimate(&allocation, step).unwrap();
                let estimate = estimate.into_params(&model);
                let mut projection = Projection { estimate: &estimate, exact: &exact, product: 0.0, squared_norm: 0.0 };
                model.visit(&mut projection);
                projection.product / projection.squared_norm
            })
            .collect();
        let mean = projections.iter().sum::<f64>() / steps as f64;
        let variance = projections.iter().map(|p| (p - mean).powi(2)).sum::<f64>() / (steps - 1) as f64;
        let error = (variance / steps as f64).sqrt();
        println!("{law} {space} {placement:?}: {mean:.3} ± {error:.3}");
        assert!((mean - 1.0).abs() < 5.0 * error + 0.01, "{law} {space} {placement:?}: {mean} ± {error}");
        assert!(error < 0.05, "{law} {space} {placement:?}: ± {error} shows nothing");
    }
}

/// Takes six steps in each space, in a process of its own, and reads CubeCL's log: the first four
/// steps compile kernels, the last two compile none.
///
/// Operations in another order in every step once made fusion compile six to eight kernels in each.
/// That took seconds of a GPU's step.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
#[test]
fn later_steps_compile_nothing() {
    use super::{Case, TASK};

    const DONE: &str = "== steps done ==";
    let spaces = [Space::activation(), Space::weights()];
    if std::env::var(TASK).is_ok() {
        for space in spaces {
            let case = Case { batch: 8, max_rows: 64, ..Case::new(Scope::Full, space) };
            let mut step = case.stepper(&tiny().with_num_classes(10));
            for steps in [4, 2] {
                (0..steps).for_each(|_| step());
                // A thread of its own writes the log.
                std::thread::sleep(std::time::Duration::from_secs(1));
                println!("{DONE}");
            }
        }
        std::thread::sleep(std::time::Duration::from_secs(1));
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let log = "[compilation]\nlogger = { level = \"basic\", stdout = true }\n";
    std::fs::write(dir.path().join("cubecl.toml"), log).unwrap();
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "tests::later_steps_compile_nothing", "--nocapture"]);
    let output = command.env(TASK, "steps").current_dir(dir.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8_lossy(&output.stdout);
    let compiled: Vec<usize> =
        said.split(DONE).map(|part| part.lines().filter(|line| line.contains("[Compiling kernel]")).count()).collect();
    println!("kernels compiled in the first four steps and the next two, by space: {compiled:?}");
    assert_eq!(compiled.len(), 2 * spaces.len() + 1, "{said}");
    assert_eq!(compiled.last(), Some(&0), "the log came late: {compiled:?}");
    for (of_space, space) in compiled.chunks_exact(2).zip(spaces) {
        assert!(of_space[0] > 0 && of_space[1] == 0, "{space}: {of_space:?} kernels compiled");
    }
}
