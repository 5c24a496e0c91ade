//! Common failures, recognised from the reports of the steps.

mod causes;
mod memory;
mod signature;
#[cfg(test)]
mod tests;
mod window;

use std::collections::VecDeque;

use causes::Causes;
pub use memory::resident_memory;
pub use signature::{Advice, Bounds, Signature};
use window::{Figures, high_variance, mean, oscillating, slow};

use super::report::StepReport;

/// Steps of a window.
const WINDOW: usize = 200;
/// Steps from one look at the window to the next.
const EVERY: u64 = 50;
/// Relative fall of the loss over [`LOOKS`] looks below which it stands still.
const STILL: f64 = 0.03;
/// Looks between the two windows compared: 600 steps, as batch scatter hides a slow fall over
/// fewer.
const LOOKS: usize = 12;
/// Ratio of the loss to the loss of the first window below which training is done.
const DONE: f64 = 0.1;
/// Steps before advice is repeated.
const AGAIN: u64 = 2000;

/// Recognises the [failures](Signature) of a run from its reports, as they come.
///
/// ```
/// use flops_core::train::{Bounds, Diagnostics};
///
/// let mut diagnostics = Diagnostics::new(Bounds { memory: Some(4 << 30), ..Default::default() });
/// # let reports: Vec<flops_core::StepReport> = vec![];
/// for report in reports {
///     for advice in diagnostics.observe(&report) {
///         println!("step {}: {}", advice.step, advice.message);
///     }
/// }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Diagnostics {
    bounds: Bounds,
    window: VecDeque<Figures>,
    /// Steps that entered the window so far.
    seen: u64,
    /// Mean loss of the first window.
    first: Option<f64>,
    /// Mean losses at the latest looks.
    means: VecDeque<f64>,
    /// What single steps show.
    causes: Causes,
    /// Signatures reported, each with the latest step at which it was.
    told: Vec<(Signature, u64)>,
}

impl Diagnostics {
    /// Creates the diagnostics of a run that has not begun.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        Self { bounds, ..Self::default() }
    }

    /// Sets whether the allocator has queries to divide (default false).
    ///
    /// [`Signature::SingleExamples`] is told for such allocators alone.
    #[must_use]
    pub fn with_allocation(mut self, allocates: bool) -> Self {
        self.causes.allocates = allocates;
        self
    }

    /// The diagnostics of another run with the same settings.
    #[must_use]
    pub(super) fn renewed(&self) -> Self {
        Self::new(self.bounds).with_allocation(self.causes.allocates)
    }

    /// Takes in a step's report and returns the advice that follows, most often none.
    pub fn observe(&mut self, report: &StepReport) -> Vec<Advice> {
        let mut found = vec![];
        if let Some(message) = self.over_bound(report) {
            found.push((Signature::OverBound, message));
        }
        found.extend(self.causes.observe(report));
        self.push(report);
        if self.window.len() == WINDOW && self.seen.is_multiple_of(EVERY) {
            found.extend(self.look());
        }
        found.into_iter().filter_map(|(signature, message)| self.tell(signature, report.step, message)).collect()
    }

    /// Takes a step into the window, unless its figures are not finite.
    fn push(&mut self, report: &StepReport) {
        let figures = Figures {
            loss: report.loss,
            squared_norm: report.squared_norm,
            variance: report.variance,
            relative: report.allocation.relative_variance,
            least: report.allocation.neyman_relative_variance,
            queries: report.queries as f64 / report.batch_size.max(1) as f64,
        };
        if figures.loss.is_finite() && figures.squared_norm.is_finite() {
            if self.window.len() == WINDOW {
                self.window.pop_front();
            }
            self.window.push_back(figures);
            self.seen += 1;
        }
    }

    /// The signatures that the window shows.
    fn look(&mut self) -> Vec<(Signature, String)> {
        let window: Vec<Figures> = self.window.iter().copied().collect();
        let now = mean(&window, |f| f.loss);
        let first = *self.first.get_or_insert(now);
        if self.means.len() > LOOKS {
            self.means.pop_front();
        }
        self.means.push_back(now);
        let before = (self.means.len() > LOOKS).then(|| self.means[0]);
        let mut found = vec![];
        found.extend(oscillating(&window).map(|m| (Signature::OscillatingLoss, m)));
        // a remedy for variance or speed does not help a loss that is at fault itself
        if self.causes.blame_the_loss() {
            return found;
        }
        // the variance is NaN in the weight space
        if window.iter().all(|f| f.variance.is_finite()) {
            found.extend(high_variance(&window).map(|m| (Signature::HighVariance, m)));
            let done = (0.0..=DONE * first).contains(&now);
            let still = before.filter(|before| before - now < STILL * before.abs() && !done);
            found.extend(still.and_then(|_| slow(&window, now)).map(|m| (Signature::SlowConvergence, m)));
        }
        found
    }

    /// The message if a bound is exceeded.
    fn over_bound(&self, report: &StepReport) -> Option<String> {
        let mib = |bytes: u64| bytes >> 20;
        if let Some(bound) = self.bounds.rows.filter(|&bound| report.rows > bound) {
            return Some(format!(
                "a pass has {} rows, {bound} are allowed: raise max_rows, or lower the batch size or the queries",
                report.rows
            ));
        }
        let (memory, bound) = (report.memory?, self.bounds.memory?);
        (memory > bound).then(|| {
            format!(
                "the process holds {} MiB, {} are allowed: lower max_rows, threads, or the prefix cache",
                mib(memory),
                mib(bound)
            )
        })
    }

    /// The advice, unless it was given a short while ago.
    fn tell(&mut self, signature: Signature, step: u64, message: String) -> Option<Advice> {
        match self.told.iter_mut().find(|(told, _)| *told == signature) {
            Some(_) if signature == Signature::SingleExamples => return None,
            Some((_, at)) if step < *at + AGAIN => return None,
            Some((_, at)) => *at = step,
            None => self.told.push((signature, step)),
        }
        Some(Advice { signature, step, message })
    }
}
