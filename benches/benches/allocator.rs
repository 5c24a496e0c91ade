//! What an allocation costs: by batch size, and against a training step.
//!
//! ```text
//! cargo bench --workspace --bench allocator
//! ```
//!
//! An allocation here is what a step does in the mean over 16 steps, between which the Gaussian allocator updates λ once: updates and final
//! draw, for losses and embeddings of width 128. The step is that of `vit_micro_patch4_32` with 128
//! data and 20 queries each, in full scope and on the class token's tail with its frozen prefix kept.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, SamplingMode};
use flops_benches::{B, Case, micro};
use flops_core::allocator::{Allocator, AllocatorKind, AnyAllocator, DatumFeatures, Embeddings};
use flops_core::{Placement, QueryBudget, Space};
use flops_vit::Scope;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const QUERIES: usize = 20;
const WIDTH: usize = 128;
/// Steps over which the mean is taken.
const CYCLE: u32 = 16;
const SIZES: [usize; 9] = [32, 64, 128, 256, 512, 1024, 2048, 4096, 8192];
/// The batch whose step is measured.
const BATCH: usize = 128;

struct Given {
    losses: Vec<f64>,
    variances: Vec<f64>,
    embeddings: Vec<f32>,
}

impl Given {
    /// Losses of very different sizes, variances that follow them roughly, embeddings around ten directions.
    fn new(n: usize) -> Self {
        let mut rng = StdRng::seed_from_u64(n as u64);
        let losses: Vec<f64> = (0..n).map(|_| -rng.random::<f64>().max(1e-9).ln()).collect();
        let variances = losses.iter().map(|l| (0.1 + l) * (0.1 + l) * (0.5 + rng.random::<f64>())).collect();
        let embeddings = (0..n * WIDTH)
            .map(|k| rng.random::<f32>() - 0.5 + if k % 10 == k / WIDTH % 10 { 1.0 } else { 0.0 })
            .collect();
        Self { losses, variances, embeddings }
    }

    fn features(&self) -> DatumFeatures<'_> {
        let embeddings = Embeddings::new(&self.embeddings, WIDTH).ok();
        DatumFeatures { losses: &self.losses, variances: &self.variances, embeddings, ..Default::default() }
    }
}

/// What a step does of it.
fn allocate(allocator: AnyAllocator<B>, given: &Given, rng: &mut StdRng) -> AnyAllocator<B> {
    let budget = QueryBudget::new(QUERIES, 1).expect("a valid budget");
    let (allocation, update) = allocator.allocate(&given.features(), &budget, rng).expect("usable features");
    black_box(allocation);
    allocator.apply(update)
}

/// The quickest of a few: what else the machine does only adds.
fn least(times: usize, mut run: impl FnMut()) -> Duration {
    (0..times)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed()
        })
        .min()
        .unwrap_or_default()
}

fn main() {
    let made = |kind| AnyAllocator::<B>::new(kind, &Default::default()).expect("valid defaults");
    if std::env::args().any(|a| a == "--test") {
        // `cargo test --benches` asks whether it runs
        for kind in AllocatorKind::ALL {
            allocate(made(kind), &Given::new(40), &mut StdRng::seed_from_u64(0));
        }
        return;
    }
    let mut criterion = Criterion::default().configure_from_args();
    let mut times = vec![];
    for n in SIZES {
        let given = Given::new(n);
        let mut group = criterion.benchmark_group("allocator");
        group.sample_size(10).sampling_mode(SamplingMode::Flat);
        group.warm_up_time(Duration::from_millis(1)).measurement_time(Duration::from_millis(100));
        let row: Vec<f64> = AllocatorKind::ALL
            .iter()
            .map(|&kind| {
                let (mut allocator, mut rng) = (Some(made(kind)), StdRng::seed_from_u64(0));
                let mut step = || allocator = allocator.take().map(|a| allocate(a, &given, &mut rng));
                group.bench_function(BenchmarkId::new(kind.name(), n), |b| b.iter(&mut step));
                let cycle = least(if n <= 512 { 5 } else { 1 }, || (0..CYCLE).for_each(|_| step()));
                cycle.as_secs_f64() / f64::from(CYCLE)
            })
            .collect();
        group.finish();
        times.push((n, row));
    }
    criterion.final_summary();

    let mut steps = vec![];
    for (scope, repeats) in [(Scope::Full, 1), (Scope::ClsTail, 4)] {
        let case = Case { batch: BATCH, queries: QUERIES, kept: true, ..Case::new(scope, Space::Activation) };
        let mut step = Case { placement: Placement::Single, ..case }.stepper(&micro(6));
        // the first step fills the cache of the prefix
        step();
        let took = least(repeats, step);
        steps.push((scope, took.as_secs_f64()));
    }
    println!("\nmilliseconds of an allocation, the mean of {CYCLE} steps, {QUERIES} queries per datum");
    print!("{:>8}", "batch");
    AllocatorKind::ALL.iter().for_each(|kind| print!("{:>16}", kind.name()));
    println!("{:>26}", "gaussian per B·log₂ B, ns");
    for (n, row) in &times {
        print!("{n:>8}");
        row.iter().for_each(|t| print!("{:>16.3}", 1e3 * t));
        println!("{:>26.0}", 1e9 * row[2] / (*n as f64 * (*n as f64).log2()));
    }
    if let Some((_, row)) = times.iter().find(|t| t.0 == BATCH) {
        for (scope, seconds) in steps {
            println!(
                "a step of {BATCH} data, scope {scope}: {:.1} ms; gaussian {:.2} %, bernoulli {:.2} %, neyman {:.3} %",
                1e3 * seconds,
                100.0 * row[2] / seconds,
                100.0 * row[3] / seconds,
                100.0 * row[1] / seconds
            );
        }
    }
}
