//! What the figures of a window of steps show.

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

/// The figures of a step that the window keeps.
#[derive(Clone, Copy, Debug)]
pub(super) struct Figures {
    pub loss: f64,
    pub squared_norm: f64,
    pub variance: f64,
    /// J relative to uniform allocation.
    pub relative: f64,
    /// Least possible J relative to uniform allocation.
    pub least: f64,
    /// Queries per example.
    pub queries: f64,
}

pub(super) fn mean(window: &[Figures], of: impl Fn(&Figures) -> f64) -> f64 {
    window.iter().map(of).sum::<f64>() / window.len() as f64
}

/// Share of signal in the squared norm: ‖E ĝ‖² of E‖ĝ‖² = ‖E ĝ‖² + variance.
fn signal(window: &[Figures]) -> f64 {
    let (norm, variance) = (mean(window, |f| f.squared_norm), mean(window, |f| f.variance));
    if norm > 0.0 { (1.0 - variance / norm).max(0.0) } else { 1.0 }
}

pub(super) fn high_variance(window: &[Figures]) -> Option<String> {
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
        "{:.0} % of the estimate is noise at {queries:.0} queries per example ({relative:.2} of uniform's \
         variance, {least:.2} possible): {remedy}",
        100.0 * (1.0 - signal)
    ))
}

pub(super) fn oscillating(window: &[Figures]) -> Option<String> {
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
            "the loss goes up and down by {largest:.3} within {} steps, more than its batches differ: \
             lower lr, or the allocator's",
            window.len()
        )
    })
}

/// Advice on a loss that stands still at `now`.
pub(super) fn slow(window: &[Figures], now: f64) -> Option<String> {
    let (relative, least) = (mean(window, |f| f.relative), mean(window, |f| f.least));
    (relative <= NEAR * least && signal(window) >= SIGNAL).then(|| {
        format!(
            "the loss stands at {now:.3} although the allocation is near its optimum ({relative:.2} of \
             uniform's variance, {least:.2} possible): raise lr, train more layers, or stop here"
        )
    })
}
