//! What the benches share: the backend, the models, the steps that are measured, and plain inference to compare with.

use std::process::Command;
use std::str::FromStr;

use burn::backend::Autodiff;
use burn::optim::{AdamConfig, Optimizer};
use burn::prelude::*;
use burn::tensor::Distribution;
use burn::train::TrainStep;
use flops_core::allocator::{AllocatorKind, AnyAllocator};
use flops_core::{
    BackpropLearner, Batch, ForwardConfig, ForwardLearner, ForwardModel, NoiseLaw, Placement, QueryBudget, Rows,
    Sampling, Space, infer,
};
use flops_vit::data::ImageBatch;
use flops_vit::{Scope, ViT, ViTConfig};
use rand::SeedableRng;
use rand::rngs::StdRng;

#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod float {
    #[cfg(not(feature = "bf16"))]
    pub type F = f32;
    #[cfg(feature = "bf16")]
    pub type F = burn::tensor::bf16;
}
#[cfg(feature = "cuda")]
mod chosen {
    pub type B = burn::backend::Cuda<super::float::F>;
    pub const NAME: &str = "cuda";
    pub const ON_HOST: bool = false;
}
#[cfg(all(feature = "wgpu", not(feature = "cuda")))]
mod chosen {
    pub type B = burn::backend::Wgpu<super::float::F>;
    pub const NAME: &str = "wgpu";
    pub const ON_HOST: bool = false;
}
#[cfg(all(feature = "ndarray", not(any(feature = "cuda", feature = "wgpu"))))]
mod chosen {
    pub type B = burn::backend::NdArray;
    pub const NAME: &str = "ndarray";
    pub const ON_HOST: bool = true;
}
#[cfg(not(any(feature = "cuda", feature = "wgpu", feature = "ndarray")))]
mod chosen {
    pub type B = burn::backend::Flex;
    pub const NAME: &str = "flex";
    pub const ON_HOST: bool = true;
}

/// The backend, by feature: cuda before wgpu before ndarray before flex.
pub type B = chosen::B;
/// What it is called.
pub const BACKEND: &str = chosen::NAME;
/// Whether its tensors lie in host memory.
pub const ON_HOST: bool = chosen::ON_HOST;
/// The same with a graph.
pub type AB = Autodiff<B>;
/// A forward-only learner of a ViT.
pub type Forward = ForwardLearner<AB, ViT<AB>, AnyAllocator<AB>>;
/// A backpropagation learner of a ViT.
pub type Backprop = BackpropLearner<AB, ViT<AB>>;

/// Callers of forward passes, for queries and for inference alike.
pub const THREADS: usize = 2;
/// Rows of a pass of plain inference where it is fastest: about those of a query pass of `vit_micro_patch4_32` on a CPU, which the cache limits.
pub const INFERENCE_ROWS: usize = 32;
/// Set in the processes whose memory is measured, to what they are to do.
pub const TASK: &str = "FLOPS_BENCH_TASK";

/// A step that is measured; as text its fields with spaces between.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Case {
    /// What is trained.
    pub scope: Scope,
    /// Where the noise falls; none for a step of backpropagation.
    pub space: Option<Space>,
    /// Its law.
    pub law: NoiseLaw,
    /// One-sided or antithetic.
    pub sampling: Sampling,
    /// On all sites of a query or on one.
    pub placement: Placement,
    /// Data of a step.
    pub batch: usize,
    /// Queries of a datum.
    pub queries: usize,
    /// Rows of a pass at most.
    pub max_rows: usize,
    /// Whether the frozen prefix is kept from step to step.
    pub kept: bool,
}

impl Case {
    /// A forward-only step with fresh signs on all that is trained for every query, 20 queries for each of 64 data.
    pub fn new(scope: Scope, space: Space) -> Self {
        Self {
            scope,
            space: Some(space),
            law: NoiseLaw::Rademacher,
            sampling: Sampling::OneSided,
            placement: Placement::Joint,
            batch: 64,
            queries: 20,
            max_rows: 256,
            kept: false,
        }
    }

    /// A step of backpropagation.
    pub fn backprop(scope: Scope, batch: usize) -> Self {
        Self { space: None, batch, queries: 1, ..Self::new(scope, Space::Activation) }
    }

    /// Rows that its queries evaluate; of backpropagation, those of the batch.
    pub fn rows(&self) -> usize {
        self.batch * self.queries
    }

    /// What takes the step, again and again on the same images.
    ///
    /// # Panics
    /// Where the settings are unusable.
    pub fn stepper(&self, config: &ViTConfig) -> Box<dyn FnMut()> {
        let model = model_of(config, self.scope);
        let device = Default::default();
        let kept = if self.kept { self.batch } else { 0 };
        match self.space {
            None => {
                let (batch, mut optimizer) = (images_of::<AB>(self.batch, config.img_size), adam());
                let mut learner: Option<Backprop> = Some(BackpropLearner::new(model).with_prefix_cache(kept));
                Box::new(move || {
                    learner = learner.take().map(|l| step(l, &mut optimizer, batch.clone()));
                    B::sync(&device).expect("the device answers");
                })
            }
            Some(space) => {
                let budget = QueryBudget::new(self.queries, 1).expect("a valid budget");
                let settings = ForwardConfig::new(budget)
                    .with_space(space)
                    .with_noise(self.law)
                    .with_sampling(self.sampling)
                    .with_placement(self.placement)
                    .with_sigma(1e-3)
                    .with_max_rows(self.max_rows)
                    .with_threads(THREADS)
                    .with_prefix_cache(kept);
                let (batch, mut optimizer) = (images_of::<B>(self.batch, config.img_size), adam());
                // as the recipes have it: data share the directions of weight noise, and unequal shares make passes of few rows
                let kind = if space == Space::Weights { AllocatorKind::Uniform } else { AllocatorKind::Gaussian };
                let mut learner = Some(learner_of(model, settings, kind));
                Box::new(move || {
                    learner = learner.take().map(|l| step(l, &mut optimizer, batch.clone()));
                    B::sync(&device).expect("the device answers");
                })
            }
        }
    }
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sampling = if self.sampling == Sampling::OneSided { "one-sided" } else { "antithetic" };
        let placement = match self.placement {
            Placement::Joint => "joint",
            Placement::Single => "single",
            Placement::Staged => "staged",
        };
        let space = self.space.map_or("backprop".to_string(), |space| space.to_string());
        let Self { scope, law, batch, queries, max_rows, kept, .. } = self;
        write!(f, "{scope} {space} {law} {sampling} {placement} {batch} {queries} {max_rows} {kept}")
    }
}

impl FromStr for Case {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        fn read<T: FromStr<Err: std::fmt::Display>>(word: &str) -> Result<T, String> {
            word.parse().map_err(|e| format!("'{word}': {e}"))
        }
        let words: Vec<&str> = text.split_whitespace().collect();
        let [scope, space, law, sampling, placement, batch, queries, max_rows, kept] = words[..] else {
            return Err(format!("'{text}' has not nine words"));
        };
        Ok(Self {
            scope: read(scope)?,
            space: if space == "backprop" { None } else { Some(read(space)?) },
            law: read(law)?,
            sampling: read(sampling)?,
            placement: read(placement)?,
            batch: read(batch)?,
            queries: read(queries)?,
            max_rows: read(max_rows)?,
            kept: read(kept)?,
        })
    }
}

/// The model that is measured, `depth` blocks of it.
pub fn micro(depth: usize) -> ViTConfig {
    ViTConfig::vit_micro_patch4_32().with_depth(depth)
}

/// A model with random weights, and with adapters where the scope trains them.
pub fn model_of(config: &ViTConfig, scope: Scope) -> ViT<AB> {
    let model = config.init::<AB>(&Default::default()).and_then(|model| match scope {
        Scope::Lora(rank) => model.with_lora(rank, 0)?.with_scope(scope),
        _ => model.with_scope(scope),
    });
    model.expect("the preset and its scopes are valid")
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

/// A forward-only learner.
pub fn learner_of(model: ViT<AB>, config: ForwardConfig, kind: AllocatorKind) -> Forward {
    let allocator = AnyAllocator::new(kind, &Default::default()).expect("valid defaults");
    ForwardLearner::new(model, allocator, config).expect("a valid configuration")
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

/// What this program prints, in a process of its own, for `task`; empty where it fails.
///
/// `returning`: what is freed goes back to the system at once (glibc), so that a peak of memory is of what was in use together; otherwise glibc
/// keeps freed blocks in an arena for each thread.
pub fn in_a_process(task: &str, returning: bool) -> String {
    let output = std::env::current_exe().and_then(|exe| {
        let mut command = Command::new(exe);
        if returning {
            command.env("MALLOC_MMAP_THRESHOLD_", "262144");
        }
        command.env(TASK, task).output()
    });
    output.ok().and_then(|o| String::from_utf8(o.stdout).ok()).unwrap_or_default()
}

/// Losses of `rows` rows by plain inference, `max_rows` at a time on [`THREADS`] threads; returns their sum, read once.
pub fn inference(model: &ViT<B>, batch: &ImageBatch<B>, rows: usize, max_rows: usize) -> f32 {
    let n = batch.ids.len().max(1);
    let sums = (0..rows).step_by(n).map(|start| {
        let index: Vec<usize> = (0..n.min(rows - start)).collect();
        let logits = infer(model, &batch.input.rows(&index), index.len(), max_rows, THREADS);
        model.losses(logits, batch.target.rows(&index)).sum()
    });
    sums.reduce(|a, b| a + b).map_or(0.0, |sum| sum.into_scalar().elem())
}

/// Multiply-adds of a row in a plain pass.
pub fn multiply_adds(config: &ViTConfig) -> f64 {
    let (d, hidden, tokens) = (config.embed_dim, config.mlp_dim(), config.num_tokens());
    let patches = tokens * config.in_chans * config.patch_size * config.patch_size * d;
    let block = tokens * (4 * d * d + 2 * d * hidden) + 2 * tokens * tokens * d;
    // the last block computes keys and values for all tokens, the rest for the class token alone
    let last = 2 * tokens * d * d + 2 * d * d + 2 * d * hidden + 2 * tokens * d;
    (patches + (config.depth - 1) * block + last + d * config.num_classes) as f64
}

#[cfg(all(test, not(feature = "bf16")))]
mod tests {
    use super::*;
    use burn::module::{AutodiffModule, ModuleVisitor, Param};
    use burn::optim::GradientsParams;
    use flops_core::Allocation;
    use flops_core::estimator::{Estimator, trained_parameters};

    /// The inner product of two gradients, and the squared norm of the second.
    struct Along<'a>(&'a GradientsParams, &'a GradientsParams, f64, f64);
    impl ModuleVisitor<B> for Along<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if let (Some(a), Some(b)) = (self.0.get::<B, D>(param.id), self.1.get::<B, D>(param.id)) {
                let (a, b) = (a.into_data(), b.into_data());
                self.2 += a.iter::<f64>().zip(b.iter::<f64>()).map(|(a, b)| a * b).sum::<f64>();
                self.3 += b.iter::<f64>().map(|b| b * b).sum::<f64>();
            }
        }
    }

    fn tiny() -> ViTConfig {
        let config = ViTConfig::new().with_img_size(8).with_patch_size(4).with_embed_dim(8).with_depth(1);
        config.with_num_heads(2).with_mlp_ratio(2.0).with_num_classes(4)
    }

    fn batch<P: Backend>() -> ImageBatch<P> {
        Batch { target: Tensor::from_data([0, 0, 0, 1], &Default::default()), ..images_of(4, 8) }
    }

    /// On the backend that the benches are built for, in single precision: the projection of 300 estimates (200 on a device, whose small kernels take
    /// long) of 32 queries for each of 4 data on backpropagation's gradient is in the mean within 5 standard errors of its squared norm, and 1 % for the
    /// smoothing (false-failure rate of 3·10⁻⁶ for the five cases). A wrong scale shows, and so do streams that depend on one another.
    #[test]
    fn estimates_are_backpropagation_s_gradient_in_the_mean() {
        let with_graph = model_of(&tiny(), Scope::Full);
        let exact = TrainStep::step(&BackpropLearner::new(with_graph.clone()), batch::<AB>()).grads;
        let (trained, model) = (trained_parameters(&with_graph), with_graph.valid());
        let allocation = Allocation::project(&[1.0, 3.0, 2.0, 0.5], &QueryBudget::new(32, 1).unwrap()).unwrap();
        let (batch, steps) = (batch::<B>(), if ON_HOST { 300 } else { 200 });
        for (law, space, sampling, placement) in [
            (NoiseLaw::Rademacher, Space::Activation, Sampling::OneSided, Placement::Joint),
            (NoiseLaw::Laplace, Space::Activation, Sampling::Antithetic, Placement::Joint),
            (NoiseLaw::Uniform, Space::Activation, Sampling::OneSided, Placement::Single),
            (NoiseLaw::Gaussian, Space::Weights, Sampling::Antithetic, Placement::Joint),
            (NoiseLaw::Rademacher, Space::LowRank(2), Sampling::OneSided, Placement::Joint),
        ] {
            let estimator =
                Estimator { noise: law, sampling, placement, seed: 5, sigma: 3e-4, ..Estimator::new(space) };
            let clean = estimator.clean(&model, &batch, &trained).unwrap();
            let along: Vec<f64> = (0..steps)
                .map(|step| {
                    let estimate = estimator.estimate(&model, &batch, &trained, &clean, &allocation, step).unwrap();
                    let estimate = estimate.into_params(&model);
                    let mut along = Along(&estimate, &exact, 0.0, 0.0);
                    model.visit(&mut along);
                    along.2 / along.3
                })
                .collect();
            let mean = along.iter().sum::<f64>() / steps as f64;
            let variance = along.iter().map(|a| (a - mean).powi(2)).sum::<f64>() / (steps - 1) as f64;
            let error = (variance / steps as f64).sqrt();
            println!("{law} {space} {placement:?}: {mean:.3} ± {error:.3}");
            assert!((mean - 1.0).abs() < 5.0 * error + 0.01, "{law} {space} {placement:?}: {mean} ± {error}");
            assert!(error < 0.05, "{law} {space} {placement:?}: ± {error} shows nothing");
        }
    }

    /// By CubeCL's own log, in a process of its own, six steps in each space: the first four compile kernels, the last two none. Operations that came in
    /// another order in every step made fusion compile six to eight in each of them, seconds of a GPU's step.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    #[test]
    fn later_steps_compile_nothing() {
        const DONE: &str = "== steps done ==";
        let spaces = [Space::Activation, Space::Weights];
        if std::env::var(TASK).is_ok() {
            for space in spaces {
                let case = Case { batch: 8, max_rows: 64, ..Case::new(Scope::Full, space) };
                let mut step = case.stepper(&tiny().with_num_classes(10));
                for steps in [4, 2] {
                    (0..steps).for_each(|_| step());
                    // the log is written by a thread of its own
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
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "tests::later_steps_compile_nothing", "--nocapture"]);
        let output = command.env(TASK, "steps").current_dir(dir.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let said = String::from_utf8_lossy(&output.stdout);
        let compiled: Vec<usize> = said
            .split(DONE)
            .map(|part| part.lines().filter(|line| line.contains("[Compiling kernel]")).count())
            .collect();
        println!("kernels compiled in the first four steps and the next two, by space: {compiled:?}");
        assert_eq!(compiled.len(), 2 * spaces.len() + 1, "{said}");
        assert_eq!(compiled.last(), Some(&0), "the log came late: {compiled:?}");
        for (of_space, space) in compiled.chunks_exact(2).zip(spaces) {
            assert!(of_space[0] > 0 && of_space[1] == 0, "{space}: {of_space:?} kernels compiled");
        }
    }
}
