//! Four common failures, recognised from the reports of the steps.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::report::StepReport;
use crate::names::named_enum;

/// Steps of a window.
const WINDOW: usize = 200;
/// Steps from one look at the window to the next.
const EVERY: u64 = 50;
/// Steps of a block; the mean losses of neighbouring blocks are compared.
const BLOCK: usize = 20;
/// Standard errors beyond which a change between blocks counts: once in 370 pairs for a steady
/// loss.
const BEYOND: f64 = 3.0;
/// Alternating rises and falls that make an oscillation.
const TURNS: usize = 4;
/// Queries per example with which the estimate should be more than noise.
const ENOUGH: f64 = 8.0;
/// Share of signal in ‖ĝ‖² below which the estimate is nearly all noise.
///
/// It is coarse for small layers: measured second moments are off by a part of about 2/D in a layer
/// of D perturbed coordinates.
const SIGNAL: f64 = 0.05;
/// Ratio of J to the least possible J up to which an allocation is near its optimum.
///
/// The least J is measured after the step, which is optimistic.
const NEAR: f64 = 1.5;
/// Relative fall of the loss over [`LOOKS`] looks below which it stands still.
const STILL: f64 = 0.03;
/// Looks between the two windows compared: 600 steps, as batch scatter hides a slow fall over
/// fewer.
const LOOKS: usize = 12;
/// Ratio of the loss to the loss of the first window below which training is done.
const DONE: f64 = 0.1;
/// Steps before advice is repeated.
const AGAIN: u64 = 2000;

/// A common failure of forward-only training.
///
/// | signature | what is seen | what it means |
/// |---|---|---|
/// | [`HighVariance`](Self::HighVariance) | the estimate is nearly all noise, though every example has enough queries | a poor allocation, or too many perturbed coordinates |
/// | [`OscillatingLoss`](Self::OscillatingLoss) | the loss goes up and down by more than its scatter from batch to batch | too large a step, of the model or of the allocator |
/// | [`SlowConvergence`](Self::SlowConvergence) | the allocation is near its optimum, and the loss stands still | the allocation does not limit training |
/// | [`OverBound`](Self::OverBound) | more rows in a pass, or more memory, than allowed | an allocation or a model beyond its bounds |
///
/// Rows and memory are checked in every step. The others are decided every 50 steps, over a window
/// of 200. None of them changes what is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Signature {
    /// The variance of the estimate is high despite enough queries.
    HighVariance,
    /// The training loss oscillates.
    OscillatingLoss,
    /// Convergence is slow although the allocation is near its optimum.
    SlowConvergence,
    /// The rows of a pass or the memory exceed their bound.
    OverBound,
}

named_enum! {
    Signature: "failure signature" {
        HighVariance => "high-variance",
        OscillatingLoss => "oscillating-loss",
        SlowConvergence => "slow-convergence",
        OverBound => "over-bound",
    }
}

/// One line that says what is wrong and what to do about it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Advice {
    /// The failure recognised.
    pub signature: Signature,
    /// Number of the step, from 0.
    pub step: u64,
    /// The figures and a remedy.
    pub message: String,
}

/// Bounds that [`Signature::OverBound`] checks; `None` for no bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bounds {
    /// Rows of a forward pass; a learner sets the estimator's `max_rows`.
    pub rows: Option<u64>,
    /// Resident memory of the process in bytes.
    pub memory: Option<u64>,
}

/// The figures of a step that the window keeps.
#[derive(Clone, Copy, Debug)]
struct Figures {
    loss: f64,
    squared_norm: f64,
    variance: f64,
    /// J relative to uniform allocation.
    relative: f64,
    /// Least possible J relative to uniform allocation.
    least: f64,
    /// Queries per example.
    queries: f64,
}

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
    /// Signatures reported, each with the latest step at which it was.
    told: Vec<(Signature, u64)>,
}

impl Diagnostics {
    /// Creates the diagnostics of a run that has not begun.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        Self { bounds, ..Self::default() }
    }

    /// Takes in a step's report and returns the advice that follows, most often none.
    pub fn observe(&mut self, report: &StepReport) -> Vec<Advice> {
        let mut found = vec![];
        if let Some(message) = self.over_bound(report) {
            found.push((Signature::OverBound, message));
        }
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
        // the variance is NaN in the weight space
        if window.iter().all(|f| f.variance.is_finite()) {
            found.extend(high_variance(&window).map(|m| (Signature::HighVariance, m)));
            let still = before.filter(|before| before - now < STILL * before.abs() && now > DONE * first);
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
            Some((_, at)) if step < *at + AGAIN => return None,
            Some((_, at)) => *at = step,
            None => self.told.push((signature, step)),
        }
        Some(Advice { signature, step, message })
    }
}

fn mean(window: &[Figures], of: impl Fn(&Figures) -> f64) -> f64 {
    window.iter().map(of).sum::<f64>() / window.len() as f64
}

/// Share of signal in the squared norm: ‖E ĝ‖² of E‖ĝ‖² = ‖E ĝ‖² + variance.
fn signal(window: &[Figures]) -> f64 {
    let (norm, variance) = (mean(window, |f| f.squared_norm), mean(window, |f| f.variance));
    if norm > 0.0 { (1.0 - variance / norm).max(0.0) } else { 1.0 }
}

fn high_variance(window: &[Figures]) -> Option<String> {
    let (signal, queries) = (signal(window), mean(window, |f| f.queries));
    if signal >= SIGNAL || queries < ENOUGH {
        return None;
    }
    let (relative, least) = (mean(window, |f| f.relative), mean(window, |f| f.least));
    let remedy = if relative > 2.0 * least && least < 0.9 {
        "the allocation is poor: estimate the variances otherwise, or use the neyman allocator"
    } else {
        "the allocation is not at fault: train fewer layers, late ones first, or give more queries"
    };
    Some(format!(
        "{:.0} % of the estimate is noise at {queries:.0} queries per example ({relative:.2} of uniform's variance, {least:.2} \
         possible): {remedy}",
        100.0 * (1.0 - signal)
    ))
}

fn oscillating(window: &[Figures]) -> Option<String> {
    let blocks: Vec<(f64, f64)> = window
        .chunks_exact(BLOCK)
        .map(|block| {
            let centre = mean(block, |f| f.loss);
            (centre, mean(block, |f| (f.loss - centre).powi(2)) / (BLOCK - 1) as f64)
        })
        .collect();
    let (mut turns, mut last, mut largest) = (0, 0.0, 0.0f64);
    for pair in blocks.windows(2) {
        let change = pair[1].0 - pair[0].0;
        let error = (pair[0].1 + pair[1].1).sqrt();
        if change.abs() > BEYOND * error && change.abs() > 1e-9 * pair[0].0.abs() {
            if change.signum() != last {
                turns += 1;
                last = change.signum();
            }
            largest = largest.max(change.abs());
        }
    }
    (turns >= TURNS).then(|| {
        format!(
            "the loss goes up and down by {largest:.3} within {WINDOW} steps, more than its batches differ: lower lr, or the allocator's"
        )
    })
}

/// Advice on a loss that stands still at `now`.
fn slow(window: &[Figures], now: f64) -> Option<String> {
    let (relative, least) = (mean(window, |f| f.relative), mean(window, |f| f.least));
    (relative <= NEAR * least && signal(window) >= SIGNAL).then(|| {
        format!(
            "the loss stands at {now:.3} although the allocation is near its optimum ({relative:.2} of uniform's variance, {least:.2} \
             possible): raise lr, train more layers, or stop here"
        )
    })
}

/// Resident memory of this process in bytes; `None` where the system does not tell (all but Linux).
pub fn resident_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocator::AllocationReport;

    fn healthy(step: u64) -> StepReport {
        let allocation = AllocationReport {
            cv: 1.0,
            floor: 0.5,
            relative_variance: 0.6,
            neyman_relative_variance: 0.55,
            min: 1,
            max: 60,
        };
        StepReport {
            step,
            // falls by half in 100 steps, and scatters from batch to batch
            loss: 2.0 * (-0.007 * step as f64).exp() * (1.0 + 0.1 * scatter(step)),
            batch_size: 64,
            queries: 1280,
            queries_total: 1280 * (step + 1),
            dropped: 0,
            squared_norm: 1.0,
            variance: 0.5,
            rows: 256,
            memory: Some(1 << 30),
            allocation,
            data: vec![],
        }
    }

    /// A value in [−1, 1] without a pattern over the steps.
    fn scatter(step: u64) -> f64 {
        crate::random::derive_seed(&[step]) as f64 / u64::MAX as f64 * 2.0 - 1.0
    }

    /// The advice given in 1,000 steps.
    fn told(change: impl Fn(&mut StepReport)) -> Vec<Advice> {
        let mut diagnostics = Diagnostics::new(Bounds { rows: Some(256), memory: Some(2 << 30) });
        (0..1000)
            .flat_map(|step| {
                let mut report = healthy(step);
                change(&mut report);
                diagnostics.observe(&report)
            })
            .collect()
    }

    #[track_caller]
    fn only(signature: Signature, words: &[&str], change: impl Fn(&mut StepReport)) {
        let told = told(change);
        assert_eq!(told.iter().map(|a| a.signature).collect::<Vec<_>>(), [signature], "{told:?}");
        for word in words {
            assert!(told[0].message.contains(word), "{word} in {:?}", told[0].message);
        }
        assert!(!told[0].message.contains('\n'));
    }

    #[test]
    fn a_healthy_run_gets_no_advice() {
        assert_eq!(told(|_| {}), []);
        // a loss that has fallen and scatters there is done, not slow
        assert_eq!(told(|r| r.loss = r.loss.max(0.02 * (1.0 + 0.1 * scatter(r.step)))), []);
    }

    /// A fall of a tenth in 600 steps is progress, although batches scatter by more.
    #[test]
    fn a_slow_fall_is_not_standing_still() {
        assert_eq!(told(|r| r.loss = 2.0 * (-0.0002 * r.step as f64).exp() * (1.0 + 0.5 * scatter(r.step))), []);
    }

    #[test]
    fn high_variance_despite_enough_queries() {
        only(Signature::HighVariance, &["97 % of the estimate is noise", "20 queries", "fewer layers"], |r| {
            r.variance = 0.97
        });
        only(Signature::HighVariance, &["the allocation is poor", "1.50 of uniform's"], |r| {
            r.variance = 0.97;
            r.allocation.relative_variance = 1.5;
        });
        // in the weight space the variance is not known
        assert_eq!(told(|r| r.variance = f64::NAN), []);
        // with two queries per example noise is expected
        assert_eq!(
            told(|r| {
                r.variance = 0.97;
                r.queries = 128;
            }),
            []
        );
    }

    #[test]
    fn an_oscillating_loss() {
        only(Signature::OscillatingLoss, &["up and down", "lower lr"], |r| {
            r.loss *= 1.0 + 0.5 * (r.step as f64 * std::f64::consts::TAU / 60.0).sin();
        });
        // scatter alone is no oscillation, however large
        assert_eq!(told(|r| r.loss *= 1.0 + 0.5 * scatter(r.step + 9000)), []);
    }

    #[test]
    fn slow_convergence_under_an_optimal_allocation() {
        only(Signature::SlowConvergence, &["stands at 2.0", "raise lr"], |r| r.loss = 2.0 + 0.2 * scatter(r.step));
        // under a poor allocation slow convergence is expected
        assert_eq!(
            told(|r| {
                r.loss = 2.0 + 0.2 * scatter(r.step);
                r.allocation.relative_variance = 1.0;
            }),
            []
        );
    }

    #[test]
    fn rows_and_memory_over_their_bounds() {
        only(Signature::OverBound, &["300 rows, 256 are allowed"], |r| r.rows = if r.step == 7 { 300 } else { 256 });
        only(Signature::OverBound, &["3072 MiB, 2048 are allowed"], |r| r.memory = Some(3 << 30));
        assert_eq!(told(|r| r.memory = None), []);
    }

    #[test]
    fn advice_is_not_repeated_at_every_look() {
        let mut diagnostics = Diagnostics::new(Bounds::default());
        let mut steps = vec![];
        for step in 0..5000 {
            let report = StepReport { loss: 2.0 + 0.2 * scatter(step), ..healthy(step) };
            steps.extend(diagnostics.observe(&report).into_iter().map(|a| a.step));
        }
        assert_eq!(steps.len(), 3, "{steps:?}");
        assert!(steps.windows(2).all(|s| s[1] - s[0] >= AGAIN));
    }

    #[test]
    fn the_system_tells_the_memory() {
        if cfg!(target_os = "linux") {
            assert!(resident_memory().unwrap() > 1 << 20);
        }
    }
}
