//! The time of a forward-only step over the time of plain inference of as many rows, by scope and
//! space, beside backpropagation.
//!
//! ```text
//! cargo bench --workspace --bench step
//! ```
//!
//! Step and inference run in turn in one process, on the same number of threads. The ratio is the
//! median of the pairs. Inference runs only the rows of the queries (batch × queries). The ratio
//! thus shows the clean pass, recorded rows, allocator, noise and optimizer. The binary `table`
//! measures memory and noise laws, and what the cost depends on.

use std::cell::RefCell;
use std::hint::black_box;
use std::time::{Duration, Instant};

use burn::module::AutodiffModule;
use criterion::{Criterion, SamplingMode};
use flops_benches::{Case, INFERENCE_ROWS, THREADS, images, inference, median, micro, model};
use flops_core::Space;
use flops_vit::Scope;

const SCOPES: [Scope; 7] =
    [Scope::Head, Scope::ClsTail, Scope::BiasNorm, Scope::Lora(4), Scope::Last(1), Scope::Last(3), Scope::Full];

fn timed(mut run: impl FnMut()) -> Duration {
    let start = Instant::now();
    run();
    start.elapsed()
}

/// Returns the median ratio of a step to inference of as many rows, run in turn. Criterion reports
/// the step.
fn ratio(criterion: &mut Criterion, case: &Case) -> f64 {
    let config = micro(6);
    // Passes of inference are full on every thread, however small the step's batch is.
    let rows = case.batch.max(THREADS * INFERENCE_ROWS);
    let (plain, batch) = (model(&config, case.scope).valid(), images(rows, config.img_size));
    let mut step = case.stepper(&config);
    let ratios = RefCell::new(vec![]);
    let mut group = criterion.benchmark_group("step");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    group.warm_up_time(Duration::from_millis(1)).measurement_time(Duration::from_millis(1));
    group.bench_function(case.to_string(), |bencher| {
        bencher.iter_custom(|n| {
            let mut total = Duration::ZERO;
            for _ in 0..n {
                let base = timed(|| {
                    black_box(inference(&plain, &batch, case.rows(), INFERENCE_ROWS));
                });
                let took = timed(&mut step);
                ratios.borrow_mut().push(took.as_secs_f64() / base.as_secs_f64());
                total += took;
            }
            total
        });
    });
    group.finish();
    median(&ratios.into_inner())
}

fn main() {
    if std::env::args().any(|a| a == "--test") {
        // `cargo test --benches` only asks whether the bench runs.
        Case { batch: 2, queries: 2, ..Case::new(Scope::Full, Space::activation()) }.stepper(&micro(2))();
        return;
    }
    let mut criterion = Criterion::default().configure_from_args();
    let mut rows = vec![];
    for scope in SCOPES {
        let [activation, weights] = [Space::activation(), Space::weights()]
            .map(|space| ratio(&mut criterion, &Case { batch: 16, ..Case::new(scope, space) }));
        let backprop = ratio(&mut criterion, &Case::backprop(scope, 64));
        rows.push((scope, activation, weights, backprop));
    }
    criterion.final_summary();
    println!("\nvit_micro_patch4_32, 16 images, 20 queries each, noise on all trained parameters, {THREADS} threads");
    println!("\ntime over plain inference of the same row-forwards (backprop: of its 64 rows)");
    println!("{:<12}{:>16}{:>16}{:>16}", "scope", "activation", "weights", "backprop");
    for (scope, activation, weights, backprop) in rows {
        println!("{:<12}{activation:>15.2}×{weights:>15.2}×{backprop:>15.2}×", scope.to_string());
    }
}
