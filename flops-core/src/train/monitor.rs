//! The handle on a learner that others own: reports, advice, cost and errors.

use std::collections::VecDeque;
use std::fmt;
use std::mem::Discriminant;
use std::sync::{Arc, Mutex, MutexGuard};

use super::diagnostics::{Advice, Diagnostics};
use super::loss_history::LossHistory;
use super::report::StepReport;
use crate::error::Error;
use crate::ledger::Ledger;

/// Reports kept until they are taken; beyond it the oldest are dropped.
const MAX_REPORTS: usize = 1024;
/// Reports of single examples in them, 2 MiB; beyond it the oldest reports lose theirs.
const MAX_DATUM_REPORTS: usize = 1 << 16;

/// Ends a run, for the reason given.
#[cfg(feature = "train")]
pub(super) type Stop = Box<dyn Fn(&str) + Send>;

#[derive(Default)]
pub(super) struct Watched {
    /// What ends the run; burn-train's methods return no error.
    #[cfg(feature = "train")]
    pub stop: Option<Stop>,
    /// An error that never passes, until an update of burn-train gives up.
    #[cfg(feature = "train")]
    pub stuck: Option<Error>,
    /// The first one.
    error: Option<Error>,
    /// Kinds of errors that have been logged.
    logged: Vec<Discriminant<Error>>,
    reports: Reports,
    losses: LossHistory,
    /// Learning rate of the last update.
    lr: f64,
    ledger: Ledger,
    diagnostics: Diagnostics,
    advice: Vec<Advice>,
}

/// What a report has of examples and sites.
fn details(report: &StepReport) -> usize {
    report.data.len() + report.sites.len()
}

/// Reports until they are taken, bounded in memory.
#[derive(Default)]
struct Reports {
    steps: VecDeque<StepReport>,
    /// How many of the latest still have reports of single examples, and how many these are.
    detailed: usize,
    data: usize,
}

impl Reports {
    fn push(&mut self, report: StepReport) {
        if self.steps.len() == MAX_REPORTS {
            self.data -= self.steps.pop_front().map_or(0, |oldest| details(&oldest));
            self.detailed = self.detailed.min(self.steps.len());
        }
        self.data += details(&report);
        self.detailed += 1;
        self.steps.push_back(report);
        // the latest keeps its own, however many they are
        while self.data > MAX_DATUM_REPORTS && self.detailed > 1 {
            let oldest = self.steps.len() - self.detailed;
            let oldest = &mut self.steps[oldest];
            self.data -= details(oldest);
            (oldest.data, oldest.sites) = (vec![], vec![]);
            self.detailed -= 1;
        }
    }
}

/// Handle on a learner, also while burn-train owns it: its errors, reports, advice and cost.
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
    pub(super) fn watched(&self) -> MutexGuard<'_, Watched> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The first error of the run, if there was one. Look at it when `launch` returns.
    ///
    /// The first error of each kind is also logged, as an error of the `log` crate.
    pub fn error(&self) -> Option<Error> {
        self.watched().error.clone()
    }

    /// Takes the reports of the steps since the last call, at most the latest 1,024.
    ///
    /// Together they hold at most 65,536 reports of single examples, or those of the latest step.
    /// Older steps come without.
    pub fn take_reports(&self) -> Vec<StepReport> {
        std::mem::take(&mut self.watched().reports).steps.into()
    }

    /// [Advice](Diagnostics) on the steps so far, since the run began or was resumed.
    ///
    /// It is also logged, as warnings of the `log` crate.
    pub fn advice(&self) -> Vec<Advice> {
        self.watched().advice.clone()
    }

    /// Cost of the run so far, including the part before a resume and steps that wait for an update.
    pub fn ledger(&self) -> Ledger {
        self.watched().ledger.clone()
    }

    /// The monitor of a run that has not begun.
    pub(super) fn new(diagnostics: Diagnostics) -> Self {
        let monitor = Self::default();
        monitor.watched().diagnostics = diagnostics;
        monitor
    }

    /// The monitor of another run with the same bounds.
    pub(super) fn renewed(&self) -> Self {
        Self::new(self.watched().diagnostics.renewed())
    }

    /// Records an error, unless there is an earlier one.
    pub(super) fn record(&self, error: &Error) {
        let mut watched = self.watched();
        let kind = std::mem::discriminant(error);
        if !watched.logged.contains(&kind) {
            watched.logged.push(kind);
            log::error!("{error}");
        }
        watched.error.get_or_insert_with(|| error.clone());
    }

    /// Takes in the clean losses of a step; returns why some are not finite.
    pub(super) fn see_losses(&self, ids: &[u64], losses: &[f64], updated: bool, sigma: f64) -> Option<Error> {
        let mut watched = self.watched();
        let lr = watched.lr;
        watched.losses.see(ids, losses, updated, sigma, lr)
    }

    /// Records a step's report and the advice that follows from it.
    pub(super) fn report(&self, report: StepReport) {
        let mut watched = self.watched();
        let advice = watched.diagnostics.observe(&report);
        advice.iter().for_each(|advice| log::warn!("step {}: {}", advice.step, advice.message));
        watched.advice.extend(advice);
        watched.reports.push(report);
    }

    /// Records the cost of the run so far.
    pub(super) fn set_ledger(&self, ledger: Ledger) {
        self.watched().ledger = ledger;
    }

    /// Records the learning rate of an update.
    pub(super) fn set_lr(&self, lr: f64) {
        self.watched().lr = lr;
    }
}
