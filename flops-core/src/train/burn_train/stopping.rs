//! How a run of burn-train ends where an error occurs: its methods return none.

use burn::train::Interrupter;

use crate::error::Error;
use crate::train::monitor::Monitor;

impl Monitor {
    /// Sets what stops training when a step fails.
    ///
    /// Pass `training.interrupter()` of burn-train's `SupervisedTraining`. Without it the update
    /// after the step, or the evaluation, panics with an error that [never
    /// passes](Error::may_pass). After other errors training goes on, and failed steps leave the
    /// model as it was.
    pub fn stop_with(&self, interrupter: Interrupter) {
        let mut watched = self.watched();
        if let Some(error) = watched.stuck.take() {
            interrupter.stop(Some(&error.to_string()));
        }
        watched.stop = Some(Box::new(move |why| interrupter.stop(Some(why))));
    }

    /// Records an error, unless there is an earlier one, and stops training if an interrupter is
    /// set.
    pub(in crate::train) fn note(&self, error: Error) {
        self.record(&error);
        self.end(error);
    }

    /// Stops training for an error that has been recorded, if an interrupter is set.
    pub(in crate::train) fn end(&self, error: Error) {
        let mut watched = self.watched();
        if let Some(stop) = &watched.stop {
            stop(&error.to_string());
        } else if !error.may_pass() {
            watched.stuck.get_or_insert(error);
        }
    }

    /// Ends a run without an interrupter, where an error that never passes was noted.
    ///
    /// Updates and evaluations call it. Steps do not: burn-train's workers take them on threads, and
    /// would wait for one that has panicked.
    ///
    /// # Panics
    /// If there is such an error.
    pub(in crate::train) fn give_up(&self) {
        let stuck = self.watched().stuck.take();
        if let Some(error) = stuck {
            panic!("{error}");
        }
    }
}
