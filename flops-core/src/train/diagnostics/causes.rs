//! Causes that single steps show: a loss that queries do not move, a loss that is noisy or explodes,
//! and batches of one.

use std::collections::VecDeque;

use super::signature::Signature;
use crate::estimator::LossChanges;
use crate::train::loss_history::LossLevel;
use crate::train::report::StepReport;

/// Steps whose queries are counted together.
const COUNTED: usize = 20;
/// Share of queries without effect from which on the loss is taken not to move.
const UNMOVED: f64 = 0.9;
/// σ that suits most losses with steps: weights and activations are of the order of 1.
const STEP_SIGMAS: (f64, f64) = (0.1, 0.5);
/// Share of queries moved by rounding alone from which on rounding is the cause.
const ROUNDED: f64 = 0.05;
/// Ratio of the loss's last place to σ from which on rounding is the cause.
///
/// A query moves the loss by about σ times its gradient, which is seldom below a hundredth.
const COARSE: f64 = 1e-2;
/// |loss| from which on the constant in it is at fault rather than σ.
const LARGE: f64 = 1e3;
/// Share of the loss's own noise in what the queries measure from which on it is reported.
const NOISY: f64 = 0.1;
/// Steps in a row with one example after which all batches are taken to be such.
const SINGLE: usize = 20;

/// What the queries of a step did to the loss.
#[derive(Clone, Copy, Debug)]
struct Moved {
    changes: LossChanges,
    /// Mean clean loss.
    loss: f64,
}

/// The causes seen so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Causes {
    /// Whether the allocator has queries to divide.
    pub allocates: bool,
    moved: VecDeque<Moved>,
    unmoved: bool,
    noisy: bool,
    exploding: bool,
    level: LossLevel,
    /// Steps in a row with one example.
    singles: usize,
}

impl Causes {
    /// Takes in a step's report and returns what it shows.
    pub fn observe(&mut self, report: &StepReport) -> Vec<(Signature, String)> {
        let found = [
            (Signature::UnmovedLoss, self.unmoved(report)),
            (Signature::NoisyLoss, self.noisy(report)),
            (Signature::ExplodingLoss, self.exploding(report)),
            (Signature::SingleExamples, self.single(report)),
        ];
        found.into_iter().filter_map(|(signature, message)| message.map(|message| (signature, message))).collect()
    }

    /// Whether the loss itself was at fault when it was last looked at.
    pub fn blame_the_loss(&self) -> bool {
        self.unmoved || self.noisy || self.exploding
    }

    fn unmoved(&mut self, report: &StepReport) -> Option<String> {
        if self.moved.len() == COUNTED {
            self.moved.pop_front();
        }
        self.moved.push_back(Moved { changes: report.changes, loss: report.loss });
        let total = |of: fn(&LossChanges) -> u64| self.moved.iter().map(|m| of(&m.changes)).sum::<u64>() as f64;
        let (queries, still, rounded) = (total(|c| c.queries), total(|c| c.unmoved), total(|c| c.unresolved));
        self.unmoved = self.moved.len() == COUNTED && queries > 0.0 && still + rounded >= UNMOVED * queries;
        if !self.unmoved {
            return None;
        }
        let (loss, sigma) = (self.moved.iter().map(|m| m.loss).sum::<f64>() / COUNTED as f64, report.sigma);
        let last_place = loss.abs() * f32::EPSILON as f64;
        let percent = 100.0 * (still + rounded) / queries;
        Some(if rounded < ROUNDED * queries && last_place < COARSE * sigma {
            format!(
                "{percent:.0} % of the queries leave the loss exactly as it is at sigma = {sigma}: the \
                 loss has steps, and the noise does not reach over them; {}or use a smoother loss",
                if sigma < STEP_SIGMAS.0 {
                    format!("raise sigma (try {} to {}), ", STEP_SIGMAS.0, STEP_SIGMAS.1)
                } else {
                    "raise sigma further, train more parameters, ".to_string()
                }
            )
        } else if loss.abs() >= LARGE {
            format!(
                "{percent:.0} % of the queries change the loss by less than single precision can tell at a \
                 loss of {loss:.3e} (sigma = {sigma}): subtract a constant from the loss, compute it so \
                 that it keeps its precision, or raise sigma"
            )
        } else {
            format!(
                "{percent:.0} % of the queries change the loss by less than single precision can tell at a \
                 loss of {loss:.3e}: sigma = {sigma} is too small; raise sigma"
            )
        })
    }

    fn noisy(&mut self, report: &StepReport) -> Option<String> {
        let (noise, sigma) = (report.loss_noise?, report.sigma);
        // a query and the clean loss that is subtracted from it are noisy both
        let share = (2.0 * noise * noise / report.changes.mean_square.max(f64::MIN_POSITIVE)).min(1.0);
        self.noisy = noise > 0.0 && share >= NOISY;
        self.noisy.then(|| {
            format!(
                "the same examples with the same parameters give losses that scatter by {noise:.3e}, which \
                 is {:.0} % of what the queries measure: let the model draw no random numbers of its own, \
                 average its answers, or raise sigma ({sigma}), which divides this noise",
                100.0 * share
            )
        })
    }

    fn exploding(&mut self, report: &StepReport) -> Option<String> {
        if !report.loss.is_finite() {
            return None;
        }
        let mean = self.level.push(report.loss)?;
        let lowest = self.level.risen_from(mean);
        self.exploding = lowest.is_some();
        lowest.map(|lowest| {
            format!(
                "the loss has risen from {lowest:.3e} to {mean:.3e}: training diverges; lower lr, and \
                 resume from a checkpoint before the rise"
            )
        })
    }

    fn single(&mut self, report: &StepReport) -> Option<String> {
        self.singles = if report.batch_size == 1 { self.singles + 1 } else { 0 };
        (self.allocates && self.singles == SINGLE).then(|| {
            "every batch holds one example, so there is nothing to allocate: it gets all queries; use \
             larger batches, or the uniform allocator"
                .to_string()
        })
    }
}
