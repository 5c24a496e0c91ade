//! The handle on a learner that burn-train owns: reports, advice, cost and errors.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use burn::train::Interrupter;

use super::diagnostics::{Advice, Bounds, Diagnostics};
use super::report::StepReport;
use crate::error::Error;
use crate::ledger::Ledger;

/// Reports kept until they are taken; beyond it the oldest are dropped.
const MAX_REPORTS: usize = 1024;

#[derive(Default)]
struct Watched {
    interrupter: Option<Interrupter>,
    error: Option<Error>,
    reports: Vec<StepReport>,
    ledger: Ledger,
    diagnostics: Diagnostics,
    advice: Vec<Advice>,
}

/// Handle on a learner that burn-train owns: its errors, reports, advice and cost.
///
/// Clones share one record.
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

    /// Sets what stops training when a step fails.
    ///
    /// Pass `training.interrupter()` of burn-train's `SupervisedTraining`. Without it training goes
    /// on, and failed steps leave the model as it was.
    pub fn stop_with(&self, interrupter: Interrupter) {
        self.watched().interrupter = Some(interrupter);
    }

    /// The first error of the run, if there was one. Look at it when `launch` returns.
    pub fn error(&self) -> Option<Error> {
        self.watched().error.clone()
    }

    /// Takes the reports of the steps since the last call, at most the latest 1,024.
    pub fn take_reports(&self) -> Vec<StepReport> {
        std::mem::take(&mut self.watched().reports)
    }

    /// [Advice](Diagnostics) on the steps so far, since the run began or was resumed.
    pub fn advice(&self) -> Vec<Advice> {
        self.watched().advice.clone()
    }

    /// Cost of the run so far, including the part before a resume.
    pub fn ledger(&self) -> Ledger {
        self.watched().ledger.clone()
    }

    /// The monitor of a run that has not begun.
    pub(super) fn new(bounds: Bounds) -> Self {
        let monitor = Self::default();
        monitor.watched().diagnostics = Diagnostics::new(bounds);
        monitor
    }

    /// Records an error, unless there is an earlier one, and stops training if an interrupter is
    /// set.
    pub(super) fn fail(&self, error: Error) {
        let mut watched = self.watched();
        if let Some(interrupter) = &watched.interrupter {
            interrupter.stop(Some(&error.to_string()));
        }
        watched.error.get_or_insert(error);
    }

    /// Records a step's report and the advice that follows from it.
    pub(super) fn report(&self, report: StepReport) {
        let mut watched = self.watched();
        let advice = watched.diagnostics.observe(&report);
        watched.advice.extend(advice);
        if watched.reports.len() == MAX_REPORTS {
            watched.reports.remove(0);
        }
        watched.reports.push(report);
    }

    /// Records the cost of the run so far.
    pub(super) fn set_ledger(&self, ledger: &Ledger) {
        self.watched().ledger = ledger.clone();
    }
}
