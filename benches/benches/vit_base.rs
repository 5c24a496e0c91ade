//! One step of `vit_base_patch16_224` (86 M parameters, 224 px) with random weights: seconds, and the peak memory of the process.
//!
//! ```text
//! cargo bench --workspace --bench vit_base
//! ```
//!
//! 8 images, 20 queries each, forward-only and by backpropagation, each in a process of its own. What lies before the scope runs once per image, not
//! once per query; *again* is a second step on the same images, whose frozen prefix was kept.

use std::hint::black_box;
use std::process::Command;
use std::time::Instant;

use flops_benches::{AB, B, Backprop, adam, images_of, learner_of, model_of, peak_memory, step};
use flops_core::{BackpropLearner, Space};
use flops_vit::{Scope, ViTConfig};

const BATCH: usize = 8;
const QUERIES: usize = 20;
const ROWS: usize = 32;
const SCOPES: [Scope; 3] = [Scope::Head, Scope::ClsTail, Scope::Last(1)];
/// Set in the processes that are measured, to what they are to do.
const TASK: &str = "FLOPS_BENCH_TASK";

fn timed<T>(run: impl FnOnce() -> T) -> (T, f64) {
    let start = Instant::now();
    let result = black_box(run());
    (result, start.elapsed().as_secs_f64())
}

/// Takes two steps, and prints the seconds of each and the peak memory in MiB.
fn measured(method: &str, scope: Scope) {
    let model = model_of(&ViTConfig::vit_base_patch16_224().with_num_classes(10), scope);
    let (first, again) = if method == "forward" {
        let (batch, mut optimizer) = (images_of::<B>(BATCH, 224), adam());
        let learner = learner_of(model, Space::Activation, QUERIES, ROWS, BATCH);
        let (learner, first) = timed(|| step(learner, &mut optimizer, batch.clone()));
        (first, timed(|| step(learner, &mut optimizer, batch)).1)
    } else {
        let (batch, mut optimizer) = (images_of::<AB>(BATCH, 224), adam());
        let learner: Backprop = BackpropLearner::new(model).with_prefix_cache(BATCH);
        let (learner, first) = timed(|| step(learner, &mut optimizer, batch.clone()));
        (first, timed(|| step(learner, &mut optimizer, batch)).1)
    };
    println!("{first} {again} {}", peak_memory());
}

/// What a process of its own prints for that task.
fn of(task: &str) -> Vec<f64> {
    let output = std::env::current_exe().and_then(|exe| Command::new(exe).env(TASK, task).output());
    let text = output.ok().and_then(|o| String::from_utf8(o.stdout).ok()).unwrap_or_default();
    text.split_whitespace().filter_map(|n| n.parse().ok()).collect()
}

fn main() {
    if let Ok(task) = std::env::var(TASK) {
        let (method, scope) = task.split_once('/').expect("method/scope");
        return measured(method, scope.parse().expect("a scope"));
    }
    if std::env::args().any(|a| a == "--test") {
        // `cargo test --benches` asks whether it runs; the model takes too long for that
        return;
    }
    println!("vit_base_patch16_224, {BATCH} images, {QUERIES} queries each, {ROWS} rows in a pass");
    println!("{:<12}{:<12}{:>10}{:>10}{:>14}", "scope", "method", "step, s", "again, s", "peak, MiB");
    for scope in SCOPES {
        for method in ["forward", "backprop"] {
            let found = of(&format!("{method}/{scope}"));
            let cell = |i: usize| found.get(i).copied().unwrap_or(f64::NAN);
            println!("{:<12}{method:<12}{:>10.2}{:>10.2}{:>14.0}", scope.to_string(), cell(0), cell(1), cell(2));
        }
    }
}
