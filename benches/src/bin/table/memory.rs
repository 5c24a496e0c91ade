//! Peak memory, each in a process of its own.

use anyhow::{Result, bail};
use flops_benches::{Case, INFERENCE_ROWS, THREADS, in_a_process, micro, peak_memory};
use flops_core::{ControlVariate, GradientEstimate, Placement, Space};
use flops_report::Progress;
use flops_vit::{Scope, Sites};

use crate::measure::{InferenceRun, SCOPES, first_uses};
use crate::report::{Row, SHRUNK, Table};

/// The most rows in a pass where memory is measured: the estimator's default. On a CPU the model
/// limits its passes to [`INFERENCE_ROWS`].
const MEMORY_ROWS: usize = 256;

/// Returns the peak memory in MiB of a process that does a case or plain inference.
pub fn peak(task: &str, returning: bool) -> f64 {
    in_a_process(task, returning).trim().parse().unwrap_or_else(|_| {
        eprintln!("the memory of '{task}' could not be measured");
        f64::NAN
    })
}

/// Returns the case whose memory is compared with that of inference.
pub fn case(scope: Scope, space: Option<Space>) -> Case {
    let case = space.map_or(Case::backprop(scope, 64), |space| Case::new(scope, space));
    let queries = if space.is_some() { 10 } else { 1 };
    Case { max_rows: MEMORY_ROWS, queries, ..case }
}

/// Does the task of a measured process, then prints its peak memory in MiB.
///
/// # Errors
/// If `task` is not `DEPTH CASE` or `DEPTH inference ROWS`.
pub fn run_task(task: &str) -> Result<()> {
    let Some((depth, case)) = task.split_once(' ') else { bail!("'{task}' is no task") };
    let config = micro(depth.parse()?);
    if let Some(rows) = case.strip_prefix("inference ") {
        let rows = rows.parse::<usize>()?;
        let plain = InferenceRun::new(&config, rows * THREADS, rows);
        plain.run(2 * rows * THREADS);
    } else {
        let case = case.parse::<Case>().map_err(anyhow::Error::msg)?;
        let mut step = case.stepper(&config);
        (0..2.max(first_uses(&case))).for_each(|_| step());
    }
    println!("{}", peak_memory());
    Ok(())
}

/// Measures the peak memory of inference, and of a step in every scope and space.
pub fn measure(table: &mut Table, progress: &mut Progress) {
    for returning in [true, false] {
        let section = if returning { "memory" } else { "memory with free blocks" };
        for rows in [MEMORY_ROWS, INFERENCE_ROWS] {
            let name = format!("inference, {rows} rows in a pass");
            let peak = peak(&format!("6 inference {rows}"), returning);
            table.rows.push(Row::memory(section, &name, None, 6, peak));
        }
        for (i, scope) in SCOPES.into_iter().enumerate() {
            progress.at(i, SCOPES.len(), || section.into());
            let [joint, weights, low_rank] = Space::ALL.map(|space| case(scope, Some(space)));
            let single = joint.with_placement(Placement::Single);
            let shrunk = Case { sites: Sites::Branch, ..joint };
            let shrunk = shrunk.with_estimate(GradientEstimate::Shrunk, ControlVariate::Prediction);
            for case in [joint, single, weights, low_rank, shrunk, case(scope, None)] {
                let name = if case == shrunk { SHRUNK } else { "step" };
                table.rows.push(Row::memory(section, name, Some(&case), 6, peak(&format!("6 {case}"), returning)));
            }
        }
    }
}
