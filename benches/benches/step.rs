//! A forward-only step against the same row-forwards of plain inference, and backpropagation beside it: time and peak memory.
//!
//! ```text
//! cargo bench --workspace --bench step
//! ```
//!
//! Step and inference run in turn in one process, on as many threads and with as many rows in a pass; the ratio is the median of the
//! pairs. Inference is charged the queries alone (batch × queries rows): the clean pass, the recorded rows, the allocator, the noise
//! and the optimizer are what the ratio shows. Peak memory is that of a process of its own for each.

use std::cell::RefCell;
use std::hint::black_box;
use std::process::Command;
use std::time::{Duration, Instant};

use burn::module::AutodiffModule;
use criterion::{Criterion, SamplingMode};
use flops_benches::{
    AB, B, BATCH, Backprop, MAX_ROWS, MEMORY_ROWS, QUERIES, THREADS, adam, forward, images, inference, model,
    peak_memory, step,
};
use flops_core::{BackpropLearner, Space};
use flops_vit::Scope;

const SCOPES: [Scope; 6] = [Scope::Head, Scope::ClsTail, Scope::BiasNorm, Scope::Last(1), Scope::Last(3), Scope::Full];
/// Set in the processes whose memory is measured, to what they are to do.
const TASK: &str = "FLOPS_BENCH_TASK";

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn timed<T>(run: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let result = black_box(run());
    (result, start.elapsed())
}

/// Median ratio of `subject` to `reference`, run in turn; criterion reports the subject.
fn paired(criterion: &mut Criterion, name: String, mut subject: impl FnMut(), mut reference: impl FnMut()) -> f64 {
    let ratios = RefCell::new(vec![]);
    let mut group = criterion.benchmark_group("step");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    group.warm_up_time(Duration::from_millis(1)).measurement_time(Duration::from_millis(1));
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|n| {
            let mut total = Duration::ZERO;
            for _ in 0..n {
                let ((), base) = timed(&mut reference);
                let ((), took) = timed(&mut subject);
                ratios.borrow_mut().push(took.as_secs_f64() / base.as_secs_f64());
                total += took;
            }
            total
        });
    });
    group.finish();
    median(ratios.into_inner())
}

fn forward_ratio(criterion: &mut Criterion, scope: Scope, space: Space) -> f64 {
    let (batch, plain) = (images::<B>(BATCH), model(scope).valid());
    let mut optimizer = adam();
    let mut learner = Some(forward(scope, space, QUERIES, MAX_ROWS));
    paired(
        criterion,
        format!("forward/{space:?}/{scope}").to_lowercase(),
        || learner = learner.take().map(|l| step(l, &mut optimizer, batch.clone())),
        || {
            black_box(inference(&plain, &batch, BATCH * QUERIES, MAX_ROWS));
        },
    )
}

fn backprop_ratio(criterion: &mut Criterion, scope: Scope) -> f64 {
    let (batch, plain_batch, plain) = (images::<AB>(MAX_ROWS), images::<B>(MAX_ROWS), model(scope).valid());
    let mut optimizer = adam();
    let mut learner: Option<Backprop> = Some(BackpropLearner::new(model(scope)));
    paired(
        criterion,
        format!("backprop/{scope}"),
        || learner = learner.take().map(|l| step(l, &mut optimizer, batch.clone())),
        || {
            black_box(inference(&plain, &plain_batch, MAX_ROWS, MAX_ROWS));
        },
    )
}

/// Does what a measured process is there for, and prints its peak memory in MiB.
fn measured(task: &str) {
    match task.split_once('/') {
        Some(("forward", rest)) => {
            let (space, scope) = rest.split_once('/').expect("space/scope");
            let (scope, space) = (scope.parse().expect("a scope"), space.parse().expect("a space"));
            // batches whose queries fill the passes of every caller
            let (data, queries) = match space {
                Space::Activation | Space::LowRank(_) => (MEMORY_ROWS / 4, QUERIES),
                // a pass has a row per datum; memory does not depend on the queries
                Space::Weights => (MEMORY_ROWS, 2 * THREADS),
            };
            let mut learner = forward(scope, space, queries, MEMORY_ROWS);
            let mut optimizer = adam();
            for _ in 0..2 {
                learner = step(learner, &mut optimizer, images::<B>(data));
            }
        }
        Some(("backprop", scope)) => {
            let mut learner: Backprop = BackpropLearner::new(model(scope.parse().expect("a scope")));
            let mut optimizer = adam();
            for _ in 0..2 {
                learner = step(learner, &mut optimizer, images::<AB>(MEMORY_ROWS));
            }
        }
        _ => {
            let (plain, batch) = (model(Scope::Full).valid(), images::<B>(MEMORY_ROWS));
            // as many passes at a time as the step has callers
            black_box(inference(&plain, &batch, MEMORY_ROWS * 2 * THREADS, MEMORY_ROWS));
        }
    }
    println!("{}", peak_memory());
}

/// Peak memory of a process that does `task`, in MiB; NaN where the system does not tell.
///
/// `returning`: what is freed goes back to the system at once (glibc), so that the peak is of what was in use together; otherwise glibc
/// keeps freed blocks in an arena for each thread.
fn memory(task: &str, returning: bool) -> f64 {
    let output = std::env::current_exe().and_then(|exe| {
        let mut command = Command::new(exe);
        if returning {
            command.env("MALLOC_MMAP_THRESHOLD_", "262144");
        }
        command.env(TASK, task).output()
    });
    let peak = output.ok().and_then(|o| String::from_utf8(o.stdout).ok()).and_then(|s| s.trim().parse::<f64>().ok());
    peak.unwrap_or(f64::NAN)
}

fn main() {
    if let Ok(task) = std::env::var(TASK) {
        return measured(&task);
    }
    if std::env::args().any(|a| a == "--test") {
        // `cargo test --benches` asks whether it runs
        black_box(inference(&model(Scope::Full).valid(), &images::<B>(2), 2, 2));
        return;
    }
    let mut criterion = Criterion::default().configure_from_args();
    let mut rows = vec![];
    for scope in SCOPES {
        let [activation, weights] =
            [Space::Activation, Space::Weights].map(|space| forward_ratio(&mut criterion, scope, space));
        let backprop = backprop_ratio(&mut criterion, scope);
        rows.push((scope, activation, weights, backprop));
    }
    criterion.final_summary();

    println!("\nvit_micro_patch4_32, {QUERIES} queries per datum, {MAX_ROWS} rows in a pass, {THREADS} threads");
    println!("\ntime over plain inference of the same row-forwards (backprop: of its {MAX_ROWS} rows)");
    println!("{:<12}{:>16}{:>16}{:>16}", "scope", "activation", "weights", "backprop");
    for (scope, activation, weights, backprop) in rows {
        println!("{:<12}{activation:>15.2}×{weights:>15.2}×{backprop:>15.2}×", scope.to_string());
    }
    for (returning, what) in [(true, "in use together"), (false, "with what glibc keeps of freed blocks")] {
        let base = memory("inference", returning);
        println!("\npeak memory of the process over inference's {base:.0} MiB, {MEMORY_ROWS} rows in a pass, {what}");
        println!("{:<12}{:>16}{:>16}{:>16}", "scope", "activation", "weights", "backprop");
        for scope in SCOPES {
            let [a, w, b] = ["forward/activation", "forward/weights", "backprop"]
                .map(|t| memory(&format!("{t}/{scope}"), returning) / base);
            println!("{:<12}{a:>15.2}×{w:>15.2}×{b:>15.2}×", scope.to_string());
        }
    }
}
