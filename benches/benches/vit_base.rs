//! One step of `vit_base_patch16_224` (86 M parameters, 224 px) with random weights: its seconds,
//! and the peak memory of its process.
//!
//! ```text
//! cargo bench --workspace --bench vit_base
//! ```
//!
//! The batch has 8 images with 20 queries each. Forward-only training and backpropagation run each
//! in a process of its own. The frozen prefix runs once per image, not once per query. *Again* is a
//! second step on the same images, whose frozen prefix was kept.

use std::time::Instant;

use flops_benches::{Case, TASK, in_a_process, peak_memory};
use flops_core::{Placement, Space};
use flops_vit::{Scope, ViTConfig};

const BATCH: usize = 8;
const QUERIES: usize = 20;
const ROWS: usize = 32;
const SCOPES: [Scope; 3] = [Scope::Head, Scope::ClsTail, Scope::Last(1)];

/// Takes two steps, then prints the seconds of each and the peak memory in MiB.
fn measured(method: &str, scope: Scope) {
    let case = match method {
        "forward" => {
            Case { queries: QUERIES, ..Case::new(scope, Space::activation()).with_placement(Placement::Single) }
        }
        _ => Case::backprop(scope, BATCH),
    };
    let config = ViTConfig::vit_base_patch16_224().with_num_classes(10);
    let mut step = Case { batch: BATCH, max_rows: ROWS, kept: true, ..case }.stepper(&config);
    let mut seconds = || {
        let start = Instant::now();
        step();
        start.elapsed().as_secs_f64()
    };
    let (first, again) = (seconds(), seconds());
    println!("{first} {again} {}", peak_memory());
}

/// Runs a task in a process of its own and returns the values that it prints.
fn run(task: &str) -> Vec<f64> {
    in_a_process(task, false).split_whitespace().filter_map(|n| n.parse().ok()).collect()
}

fn main() {
    if let Ok(task) = std::env::var(TASK) {
        let (method, scope) = task.split_once('/').expect("method/scope");
        return measured(method, scope.parse().expect("a scope"));
    }
    if std::env::args().any(|a| a == "--test") {
        // `cargo test --benches` only asks whether the bench runs; this model takes too long for
        // that.
        return;
    }
    println!("vit_base_patch16_224, {BATCH} images, {QUERIES} queries each, {ROWS} rows in a pass");
    println!("{:<12}{:<12}{:>10}{:>10}{:>14}", "scope", "method", "step, s", "again, s", "peak, MiB");
    for scope in SCOPES {
        for method in ["forward", "backprop"] {
            let found = run(&format!("{method}/{scope}"));
            let cell = |i: usize| found.get(i).copied().unwrap_or(f64::NAN);
            println!("{:<12}{method:<12}{:>10.2}{:>10.2}{:>14.0}", scope.to_string(), cell(0), cell(1), cell(2));
        }
    }
}
