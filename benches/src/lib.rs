//! What the benches share: the backend, the models, and plain inference to compare with.

use burn::backend::Autodiff;
use burn::optim::{AdamConfig, Optimizer};
use burn::prelude::*;
use burn::tensor::Distribution;
use burn::train::TrainStep;
use flops_core::allocator::{AllocatorKind, AnyAllocator};
use flops_core::{
    BackpropLearner, Batch, ForwardConfig, ForwardLearner, ForwardModel, Probe, QueryBudget, Rows, Space,
};
use flops_vit::data::ImageBatch;
use flops_vit::{Scope, ViT, ViTConfig};
use rand::SeedableRng;
use rand::rngs::StdRng;

#[cfg(feature = "cuda")]
mod chosen {
    pub type B = burn::backend::Cuda;
}
#[cfg(all(feature = "wgpu", not(feature = "cuda")))]
mod chosen {
    pub type B = burn::backend::Wgpu;
}
#[cfg(all(feature = "ndarray", not(any(feature = "cuda", feature = "wgpu"))))]
mod chosen {
    pub type B = burn::backend::NdArray;
}
#[cfg(not(any(feature = "cuda", feature = "wgpu", feature = "ndarray")))]
mod chosen {
    pub type B = burn::backend::Flex;
}

/// The backend, by feature: cuda before wgpu before ndarray before flex.
pub type B = chosen::B;
/// The same with a graph.
pub type AB = Autodiff<B>;
/// A forward-only learner of a ViT.
pub type Forward = ForwardLearner<AB, ViT<AB>, AnyAllocator<AB>>;
/// A backpropagation learner of a ViT.
pub type Backprop = BackpropLearner<AB, ViT<AB>>;

/// Data of a step.
pub const BATCH: usize = 16;
/// Queries of a datum.
pub const QUERIES: usize = 20;
/// Rows of a forward pass where time is measured.
pub const MAX_ROWS: usize = 64;
/// Rows of a forward pass where memory is measured: the estimator's default.
pub const MEMORY_ROWS: usize = 256;
/// Callers of forward passes, for queries and for inference alike.
pub const THREADS: usize = 2;

/// The model that is measured.
pub fn model(scope: Scope) -> ViT<AB> {
    model_of(&ViTConfig::vit_micro_patch4_32(), scope)
}

/// A model with random weights.
pub fn model_of(config: &ViTConfig, scope: Scope) -> ViT<AB> {
    let model = config.init::<AB>(&Default::default()).and_then(|model| model.with_scope(scope));
    model.expect("the preset and its scopes are valid")
}

/// Random images for it.
pub fn images<P: Backend>(rows: usize) -> ImageBatch<P> {
    images_of(rows, 32)
}

/// Random images of `side` pixels, of ten classes.
pub fn images_of<P: Backend>(rows: usize, side: usize) -> ImageBatch<P> {
    let device = Default::default();
    let mut rng = StdRng::seed_from_u64(0);
    let pixels = TensorData::random::<f32, _, _>([rows, 3, side, side], Distribution::Normal(0.0, 1.0), &mut rng);
    let labels: Vec<i32> = (0..rows as i32).map(|i| i % 10).collect();
    Batch {
        ids: (0..rows as u64).collect(),
        input: Tensor::from_data(pixels, &device),
        target: Tensor::from_data(TensorData::new(labels, [rows]), &device),
    }
}

/// A forward-only learner with `queries` queries per datum, `max_rows` rows in a pass, no prefix kept.
pub fn forward(scope: Scope, space: Space, queries: usize, max_rows: usize) -> Forward {
    learner(scope, space, queries, max_rows, 0)
}

/// The same, keeping the frozen prefix of `kept` data.
pub fn learner(scope: Scope, space: Space, queries: usize, max_rows: usize, kept: usize) -> Forward {
    learner_of(model(scope), space, queries, max_rows, kept)
}

/// The same of another model.
pub fn learner_of(model: ViT<AB>, space: Space, queries: usize, max_rows: usize, kept: usize) -> Forward {
    let budget = QueryBudget::new(queries, 1).expect("a valid budget");
    let config = ForwardConfig::new(budget).with_space(space).with_max_rows(max_rows).with_threads(THREADS);
    let allocator = AnyAllocator::new(AllocatorKind::Gaussian, &Default::default()).expect("valid defaults");
    ForwardLearner::new(model, allocator, config.with_prefix_cache(kept)).expect("a valid configuration")
}

/// One training step, the update included.
pub fn step<L, O>(learner: L, optimizer: &mut O, batch: L::Input) -> L
where
    L: TrainStep + burn::module::AutodiffModule<AB>,
    O: Optimizer<L, AB>,
{
    let output = learner.step(batch);
    learner.optimize::<AB, _>(optimizer, 1e-4, output.grads)
}

/// Adam, two moments for each trained parameter.
pub fn adam<L: burn::module::AutodiffModule<AB>>() -> burn::optim::adaptor::OptimizerAdaptor<burn::optim::Adam, L, AB> {
    AdamConfig::new().init()
}

/// Peak memory of this process in MiB; NaN where the system does not tell.
pub fn peak_memory() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).and_then(|l| l.split_whitespace().next());
    peak.and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(f64::NAN) / 1024.0
}

/// Losses of `rows` rows by plain inference, `max_rows` at a time on [`THREADS`] threads; returns their sum.
pub fn inference(model: &ViT<B>, batch: &ImageBatch<B>, rows: usize, max_rows: usize) -> f32 {
    let n = batch.ids.len();
    let chunks: Vec<Vec<usize>> =
        (0..rows).collect::<Vec<_>>().chunks(max_rows).map(|c| c.iter().map(|i| i % n).collect()).collect();
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|_| {
                let (model, batch, next, chunks) = (model.clone(), batch.clone(), &next, &chunks);
                scope.spawn(move || {
                    let mut sum = 0.0;
                    loop {
                        let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        let Some(index) = chunks.get(i) else { return sum };
                        let logits = model.forward(batch.input.rows(index), &mut Probe::clean());
                        let losses = model.losses(logits, batch.target.rows(index));
                        sum += losses.sum().into_scalar().elem::<f32>();
                    }
                })
            })
            .collect();
        workers.into_iter().map(|w| w.join().expect("inference does not panic")).sum()
    })
}
