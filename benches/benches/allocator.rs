//! The time of an allocation: by batch size, and as a share of a training step.
//!
//! ```text
//! cargo bench --workspace --bench allocator
//! ```
//!
//! The time of an allocation is the mean over 16 steps. It includes what the allocator learns after
//! each, for losses and embeddings of width 128. The time of the variance tracker is that of a
//! prediction, a clone and an observation, after as many examples as ImageNet has. The training step
//! is one of `vit_micro_patch4_32` with 128 images and 20 queries each. It is measured in full scope,
//! and on the class token's tail with a kept frozen prefix.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, SamplingMode};
use flops_backend::B;
use flops_benches::{Case, micro};
use flops_core::allocator::{Allocator, AllocatorKind, AnyAllocator, DatumFeatures, Embeddings, Shown};
use flops_core::variance::VarianceTracker;
use flops_core::{Placement, QueryBudget, Space};
use flops_vit::Scope;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const QUERIES: usize = 20;
/// The width of the embeddings.
const WIDTH: usize = 128;
/// Steps over which the mean is taken.
const CYCLE: u32 = 16;
const SIZES: [usize; 9] = [32, 64, 128, 256, 512, 1024, 2048, 4096, 8192];
/// Examples that the variance tracker has seen.
const SEEN: u64 = 1_280_000;
/// The batch size of the training step.
const BATCH: usize = 128;

/// Synthetic features of a batch.
struct Features {
    losses: Vec<f64>,
    variances: Vec<f64>,
    embeddings: Vec<f32>,
}

impl Features {
    /// Draws losses of very different sizes, variances that roughly follow them, and embeddings
    /// around ten directions.
    fn new(n: usize) -> Self {
        let mut rng = StdRng::seed_from_u64(n as u64);
        let losses: Vec<f64> = (0..n).map(|_| -rng.random::<f64>().max(1e-9).ln()).collect();
        let variances = losses.iter().map(|l| (0.1 + l) * (0.1 + l) * (0.5 + rng.random::<f64>())).collect();
        let embeddings = (0..n * WIDTH)
            .map(|k| rng.random::<f32>() - 0.5 + if k % 10 == k / WIDTH % 10 { 1.0 } else { 0.0 })
            .collect();
        Self { losses, variances, embeddings }
    }

    fn view(&self) -> DatumFeatures<'_> {
        let embeddings = Embeddings::new(&self.embeddings, WIDTH).ok();
        DatumFeatures { losses: &self.losses, variances: &self.variances, embeddings, ..Default::default() }
    }
}

/// Allocates queries and applies the update, as a training step does.
fn allocate(allocator: AnyAllocator<B>, features: &Features, rng: &mut StdRng) -> AnyAllocator<B> {
    let budget = QueryBudget::new(QUERIES, 1).expect("a valid budget");
    let (allocation, update) = allocator.allocate(&features.view(), &budget, rng).expect("usable features");
    black_box(allocation);
    allocator.apply(update, &Shown::new(&features.variances))
}

fn allocator_of(kind: AllocatorKind) -> AnyAllocator<B> {
    AnyAllocator::new(kind, &Default::default()).expect("valid defaults")
}

/// Returns the shortest of a few times: other work of the machine only makes them longer.
fn shortest(times: usize, mut run: impl FnMut()) -> Duration {
    (0..times)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed()
        })
        .min()
        .unwrap_or_default()
}

/// Returns the seconds of an allocation by each allocator, in a batch of `n`.
fn measure_allocators(criterion: &mut Criterion, n: usize) -> Vec<f64> {
    let features = Features::new(n);
    let mut group = criterion.benchmark_group("allocator");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    group.warm_up_time(Duration::from_millis(1)).measurement_time(Duration::from_millis(100));
    let seconds = AllocatorKind::ALL
        .iter()
        .map(|&kind| {
            let (mut allocator, mut rng) = (Some(allocator_of(kind)), StdRng::seed_from_u64(0));
            let mut step = || allocator = allocator.take().map(|a| allocate(a, &features, &mut rng));
            group.bench_function(BenchmarkId::new(kind.name(), n), |b| b.iter(&mut step));
            let cycle = shortest(if n <= 512 { 5 } else { 1 }, || (0..CYCLE).for_each(|_| step()));
            cycle.as_secs_f64() / f64::from(CYCLE)
        })
        .collect();
    group.finish();
    seconds
}

/// Returns a variance tracker that has seen `seen` examples.
fn tracker_after(seen: u64) -> VarianceTracker {
    let features = Features::new(1024);
    let mut tracker = VarianceTracker::new();
    for first in (0..seen).step_by(1024) {
        let ids: Vec<u64> = (first..seen.min(first + 1024)).collect();
        tracker.observe(&ids, &features.losses, &features.variances, &[QUERIES; 1024]);
    }
    tracker
}

/// Predicts and observes variances as a training step does: the clone observes, and the original
/// goes away.
fn track(tracker: VarianceTracker, ids: &[u64], features: &Features, counts: &[usize]) -> VarianceTracker {
    black_box(tracker.predict(ids, &features.losses));
    let mut next = tracker.clone();
    next.observe(ids, &features.losses, &features.variances, counts);
    next
}

/// Returns the seconds of the variance tracker per step, with batches of `n` drawn from all that it
/// has seen.
fn measure_tracker(tracker: &mut VarianceTracker, n: usize) -> f64 {
    let (features, counts) = (Features::new(n), vec![QUERIES; n]);
    let mut rng = StdRng::seed_from_u64(0);
    let mut step = || {
        let ids: Vec<u64> = (0..n).map(|_| rng.random_range(0..SEEN)).collect();
        let start = Instant::now();
        *tracker = track(std::mem::take(tracker), &ids, &features, &counts);
        start.elapsed()
    };
    (0..CYCLE).map(|_| step()).sum::<Duration>().as_secs_f64() / f64::from(CYCLE)
}

/// Returns the seconds of a training step in `scope`.
fn measure_step(scope: Scope, repeats: usize) -> f64 {
    let case = Case { batch: BATCH, queries: QUERIES, kept: true, ..Case::new(scope, Space::activation()) };
    let mut step = case.with_placement(Placement::Single).stepper(&micro(6));
    // The first step fills the cache of the prefix.
    step();
    shortest(repeats, step).as_secs_f64()
}

fn print_times(times: &[(usize, Vec<f64>)]) {
    println!("\nmilliseconds of an allocation, the mean of {CYCLE} steps, {QUERIES} queries per datum");
    print!("{:>8}", "batch");
    AllocatorKind::ALL.iter().for_each(|kind| print!("{:>16}", kind.name()));
    println!("{:>26}", "gaussian per B·log₂ B, ns");
    for (n, row) in times {
        print!("{n:>8}");
        row.iter().for_each(|t| print!("{:>16.3}", 1e3 * t));
        println!("{:>26.0}", 1e9 * row[2] / (*n as f64 * (*n as f64).log2()));
    }
}

fn print_tracker(times: &[(usize, f64)]) {
    println!("\nmilliseconds of the variance tracker per step, the mean of {CYCLE} steps, after {SEEN} examples");
    times.iter().for_each(|(n, seconds)| println!("{n:>8}{:>16.3}", 1e3 * seconds));
}

fn print_share(scope: Scope, seconds: f64, allocators: &[f64]) {
    println!(
        "a step of {BATCH} images, scope {scope}: {:.1} ms; gaussian {:.2} %, bernoulli {:.2} %, neyman {:.3} %",
        1e3 * seconds,
        100.0 * allocators[2] / seconds,
        100.0 * allocators[3] / seconds,
        100.0 * allocators[1] / seconds
    );
}

fn main() {
    if std::env::args().any(|a| a == "--test") {
        // `cargo test --benches` only asks whether the bench runs.
        for kind in AllocatorKind::ALL {
            allocate(allocator_of(kind), &Features::new(40), &mut StdRng::seed_from_u64(0));
        }
        track(tracker_after(40), &[3, 50], &Features::new(2), &[QUERIES; 2]);
        return;
    }
    let mut criterion = Criterion::default().configure_from_args();
    let times: Vec<_> = SIZES.iter().map(|&n| (n, measure_allocators(&mut criterion, n))).collect();
    criterion.final_summary();
    let mut tracker = tracker_after(SEEN);
    let tracked: Vec<_> = SIZES.iter().map(|&n| (n, measure_tracker(&mut tracker, n))).collect();
    drop(tracker);
    let steps = [(Scope::Full, 1), (Scope::ClsTail, 4)].map(|(scope, repeats)| (scope, measure_step(scope, repeats)));
    print_times(&times);
    print_tracker(&tracked);
    if let Some((_, allocators)) = times.iter().find(|(n, _)| *n == BATCH) {
        steps.into_iter().for_each(|(scope, seconds)| print_share(scope, seconds, allocators));
    }
}
