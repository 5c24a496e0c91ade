//! What the outside sees of a learner that training has taken away: reports, advice, cost, errors.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use burn::train::Interrupter;

use super::ForwardConfig;
use crate::allocator::AllocationReport;
use crate::budget::Ledger;
use crate::diagnostics::{Advice, Bounds, Diagnostics};
use crate::error::Error;

/// Reports that wait to be taken; of more, the latest are kept.
const KEPT_REPORTS: usize = 1024;

/// What one step reports.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// Number of the step, from 0.
    pub step: u64,
    /// Mean clean loss of the batch.
    pub loss: f64,
    /// Data of the batch, B.
    pub batch_size: usize,
    /// Queries of this step, pilots included.
    pub queries: u64,
    /// Queries so far.
    pub queries_total: u64,
    /// Queries of this step dropped for a non-finite loss.
    pub dropped: u64,
    /// ‖ĝ‖², the squared norm of the gradient estimate.
    pub squared_norm: f64,
    /// E‖ĝ − E ĝ‖² by the second moments measured in this very step, (1/B²) Σ_j m_j / A_j; NaN where data share noise (weights space), whose
    /// variance this is not.
    pub variance: f64,
    /// Rows of the largest forward pass.
    pub rows: u64,
    /// Resident memory of the process in bytes, where the system tells.
    pub memory: Option<u64>,
    /// What the allocation gained, by the variances measured in this very step.
    pub allocation: AllocationReport,
    /// The data of the batch, in order.
    pub data: Vec<DatumReport>,
}

/// What one step reports of a datum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DatumReport {
    /// Its id.
    pub id: u64,
    /// Its clean loss.
    pub loss: f64,
    /// Queries it was given, pilots included.
    pub queries: usize,
    /// Mean of ‖ĝ_jq‖² over the queries allocated to it, an estimate of Tr Σ_j; 0 where none survived.
    pub second_moment: f64,
}

#[derive(Default)]
struct Watched {
    interrupter: Option<Interrupter>,
    error: Option<Error>,
    reports: Vec<StepReport>,
    ledger: Ledger,
    diagnostics: Diagnostics,
    advice: Vec<Advice>,
}

/// A handle on a learner that training has taken away: what went wrong, what was spent.
#[derive(Clone, Default)]
pub struct Monitor(Arc<Mutex<Watched>>);

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Monitor")
    }
}

impl Monitor {
    fn watched(&self) -> MutexGuard<'_, Watched> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Stops training through `interrupter` when a step fails: `training.interrupter()` of burn-train's `SupervisedTraining`.
    ///
    /// Without it training goes on, and the failed steps leave the model as it was.
    pub fn stop_with(&self, interrupter: Interrupter) {
        self.watched().interrupter = Some(interrupter);
    }

    /// The error that stopped training, if one did. Look at it when `launch` returns.
    pub fn error(&self) -> Option<Error> {
        self.watched().error.clone()
    }

    /// Takes the reports of the steps since the last call, the latest 1,024 of them.
    pub fn take_reports(&self) -> Vec<StepReport> {
        std::mem::take(&mut self.watched().reports)
    }

    /// The [advice](crate::diagnostics) on the steps so far, since the run began or was resumed.
    pub fn advice(&self) -> Vec<Advice> {
        self.watched().advice.clone()
    }

    /// What the run has cost so far, what was spent before a resume included.
    pub fn ledger(&self) -> Ledger {
        self.watched().ledger.clone()
    }

    /// Keeps the first error, and stops training where it may.
    pub(super) fn fail(&self, error: Error) {
        let mut watched = self.watched();
        if let Some(interrupter) = &watched.interrupter {
            interrupter.stop(Some(&error.to_string()));
        }
        watched.error.get_or_insert(error);
    }

    /// A monitor of a run that has not begun.
    pub(super) fn of(config: &ForwardConfig) -> Self {
        let monitor = Self::default();
        let rows = Some(config.estimator.max_rows as u64);
        monitor.watched().diagnostics = Diagnostics::new(Bounds { rows, memory: config.memory_bound });
        monitor
    }

    /// Takes a step's report in, and what the diagnostics have to say of it.
    pub(super) fn report(&self, report: StepReport) {
        let mut watched = self.watched();
        let advice = watched.diagnostics.observe(&report);
        watched.advice.extend(advice);
        if watched.reports.len() == KEPT_REPORTS {
            watched.reports.remove(0);
        }
        watched.reports.push(report);
    }

    /// Takes in what the run has cost.
    pub(super) fn spent(&self, ledger: &Ledger) {
        self.watched().ledger = ledger.clone();
    }
}
