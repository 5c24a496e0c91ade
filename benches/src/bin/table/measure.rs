//! Time measurement, in turn with plain inference.

use std::hint::black_box;
use std::time::Instant;

use burn::module::AutodiffModule;
use flops_backend::{B, ON_HOST};
use flops_benches::{Case, THREADS, images, inference, model};
use flops_vit::data::ImageBatch;
use flops_vit::{Scope, ViT, ViTConfig};

/// The scopes that are measured.
pub const SCOPES: [Scope; 7] =
    [Scope::Head, Scope::ClsTail, Scope::Last(1), Scope::Last(3), Scope::BiasNorm, Scope::Lora(4), Scope::Full];

/// First steps that are not measured. A device also compiles for an allocation of queries, and the
/// allocation of the first step is unlike any later one.
const FIRST_USES: usize = if ON_HOST { 1 } else { 4 };
/// Steps in which a prediction learns enough to be used.
const LEARNING: usize = 8;

/// Returns the first steps that are not measured where predictions are compared.
pub fn first_uses(case: &Case) -> usize {
    if case.predicts() { LEARNING } else { FIRST_USES }
}

/// Returns the seconds that `run` takes.
pub fn timed(mut run: impl FnMut()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_secs_f64()
}

/// Inference with a model and images of its own.
pub struct InferenceRun {
    model: ViT<B>,
    batch: ImageBatch<B>,
    max_rows: usize,
}

impl InferenceRun {
    /// Creates a model and `batch` images for passes of `max_rows` rows.
    pub fn new(config: &ViTConfig, batch: usize, max_rows: usize) -> Self {
        let model = model(config, Scope::Full).valid();
        Self { model, batch: images(batch, config.img_size), max_rows }
    }

    /// Evaluates so many rows.
    pub fn run(&self, rows: usize) {
        black_box(inference(&self.model, &self.batch, rows, self.max_rows));
    }
}

/// Measures a case and plain inference of as many rows in turn. Returns the seconds of both, by
/// round.
pub fn paired(case: &Case, config: &ViTConfig, rounds: usize, inference_rows: usize) -> Vec<(f64, f64)> {
    // Passes of inference are full on every thread, however small the step's batch is.
    let plain = InferenceRun::new(config, case.batch.max(THREADS * inference_rows), inference_rows);
    let mut step = case.stepper(config);
    (0..FIRST_USES).for_each(|_| step());
    if !ON_HOST {
        plain.run(case.rows());
    }
    (0..rounds)
        .map(|_| {
            let reference = timed(|| plain.run(case.rows()));
            (timed(&mut step), reference)
        })
        .collect()
}
