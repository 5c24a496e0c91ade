//! What the losses were, so that divergence is told apart from broken data.

use std::collections::HashSet;

use crate::error::Error;

/// Steps of a mean; single batches scatter.
const BLOCK: usize = 5;
/// Rise above which a loss may have exploded, in units of its first level.
const ABOVE_FIRST: f64 = 10.0;
/// Rise above which it has, in units of its lowest level.
const ABOVE_LOWEST: f64 = 100.0;
/// Ids of a generation; two are kept.
const GENERATION: usize = 1 << 15;
/// Ids that an error lists at most.
const LISTED_IDS: usize = 5;

/// How far the loss has risen over a run, in blocks of 5 steps.
#[derive(Clone, Debug, Default)]
pub(super) struct LossLevel {
    block: Vec<f64>,
    /// Size of the first mean that is not 0: zeros set no scale.
    first: Option<f64>,
    lowest: Option<f64>,
}

impl LossLevel {
    /// Takes in the loss of a step; returns the mean of a block that it completes.
    pub fn push(&mut self, loss: f64) -> Option<f64> {
        self.block.push(loss);
        if self.block.len() < BLOCK {
            return None;
        }
        let mean = self.block.drain(..).sum::<f64>() / BLOCK as f64;
        self.lowest = Some(self.lowest.map_or(mean, |lowest| lowest.min(mean)));
        if mean != 0.0 {
            self.first.get_or_insert(mean.abs());
        }
        Some(mean)
    }

    /// The lowest level so far, if `loss` lies orders of magnitude above it.
    ///
    /// A loss that falls below 0, such as that of a reward, has not risen.
    pub fn risen_from(&self, loss: f64) -> Option<f64> {
        let (first, lowest) = (self.first?, self.lowest?);
        let scale = if lowest == 0.0 { first } else { lowest.abs() };
        (loss - lowest > (ABOVE_FIRST * first).max(ABOVE_LOWEST * scale)).then_some(lowest)
    }
}

/// Which examples had a finite loss of late, and the level of the losses.
///
/// It decides which error is reported, and nothing that is computed. So it is no part of a
/// checkpoint.
#[derive(Clone, Debug, Default)]
pub(super) struct LossHistory {
    recent: HashSet<u64>,
    older: HashSet<u64>,
    level: LossLevel,
}

impl LossHistory {
    /// Takes in the clean losses of a step; returns why some are not finite.
    ///
    /// Training has diverged if it has `updated` the model, and one of those examples was finite
    /// before or the other losses have exploded. Otherwise the examples are broken.
    pub fn see(&mut self, ids: &[u64], losses: &[f64], updated: bool, sigma: f64, lr: f64) -> Option<Error> {
        let pairs = || ids.iter().copied().zip(losses.iter().copied());
        let broken: Vec<u64> = pairs().filter(|(_, loss)| !loss.is_finite()).map(|(id, _)| id).collect();
        let finite: Vec<f64> = losses.iter().copied().filter(|loss| loss.is_finite()).collect();
        let mean = finite.iter().sum::<f64>() / finite.len().max(1) as f64;
        if broken.is_empty() {
            self.level.push(mean);
            self.remember(ids);
            return None;
        }
        let known: Vec<u64> = broken.iter().copied().filter(|id| self.knows(*id)).collect();
        let risen = self.level.risen_from(mean);
        self.remember(&pairs().filter(|(_, loss)| loss.is_finite()).map(|(id, _)| id).collect::<Vec<_>>());
        if !updated || (known.is_empty() && risen.is_none()) {
            return Some(Error::NonFiniteData { count: broken.len(), ids: list(&broken) });
        }
        let evidence = match risen {
            Some(lowest) => format!("the loss has risen from {lowest:.3e} to {mean:.3e} and beyond all numbers"),
            None => {
                format!("{} losses are no longer finite that were finite before (ids {})", known.len(), list(&known))
            }
        };
        Some(Error::Diverged { evidence, sigma, lr })
    }

    fn knows(&self, id: u64) -> bool {
        self.recent.contains(&id) || self.older.contains(&id)
    }

    fn remember(&mut self, ids: &[u64]) {
        if self.recent.len() + ids.len() > GENERATION {
            self.older = std::mem::take(&mut self.recent);
        }
        self.recent.extend(ids);
    }
}

/// The first few ids.
fn list(ids: &[u64]) -> String {
    let more = if ids.len() > LISTED_IDS { ", …" } else { "" };
    ids.iter().take(LISTED_IDS).map(u64::to_string).collect::<Vec<_>>().join(", ") + more
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAN: f64 = f64::NAN;

    fn see(history: &mut LossHistory, ids: &[u64], losses: &[f64]) -> Option<Error> {
        history.see(ids, losses, true, 0.01, 0.5)
    }

    #[test]
    fn an_example_that_was_finite_before_shows_divergence() {
        let mut history = LossHistory::default();
        assert_eq!(see(&mut history, &[1, 2], &[1.0, 2.0]), None);
        // at first sight
        let broken = Error::NonFiniteData { count: 1, ids: "3".into() };
        assert_eq!(see(&mut history, &[1, 3], &[1.0, NAN]), Some(broken.clone()));
        assert_eq!(see(&mut history, &[1, 3], &[1.0, NAN]), Some(broken));
        let Some(Error::Diverged { evidence, sigma, lr }) = see(&mut history, &[2, 3], &[f64::INFINITY, 1.0]) else {
            panic!("finite before");
        };
        assert_eq!((sigma, lr), (0.01, 0.5));
        assert!(evidence.contains("1 losses") && evidence.contains("ids 2"), "{evidence}");
        // before the first update nothing can have diverged
        assert!(matches!(history.see(&[1], &[NAN], false, 0.01, 0.0), Some(Error::NonFiniteData { .. })));
    }

    #[test]
    fn an_explosion_of_the_other_losses_shows_divergence() {
        let mut history = LossHistory::default();
        for step in 0..10 {
            assert_eq!(see(&mut history, &[2 * step, 2 * step + 1], &[1.0, 3.0]), None);
        }
        assert!(matches!(see(&mut history, &[50, 51], &[201.0, NAN]), Some(Error::NonFiniteData { .. })));
        let Some(Error::Diverged { evidence, .. }) = see(&mut history, &[52, 53], &[NAN, 203.0]) else {
            panic!("a hundredfold");
        };
        assert!(evidence.contains("from 2.000e0 to 2.030e2"), "{evidence}");
    }

    /// Each case is the loss of 50 steps, the loss then, and whether that is an explosion.
    #[test]
    fn a_loss_explodes_by_rising_far_beyond_its_scale() {
        let case = |before: fn(u64) -> f64, then: f64, exploded: bool| {
            let mut level = LossLevel::default();
            for step in 0..50 {
                level.push(before(step));
            }
            assert_eq!(level.risen_from(then).is_some(), exploded, "{then}");
        };
        // 10 times the first level, and 100 times the lowest
        case(|_| 2.0, 201.0, false);
        case(|_| 2.0, 203.0, true);
        case(|step| 1.0 / (1 + step) as f64, 4.6, true);
        // a reward that grows, and a log-density, fall below 0
        case(|step| -0.1 - step as f64, -100.0, false);
        case(|step| 1.0 - step as f64, -30.0, false);
        case(|step| -0.1 - step as f64, 5000.0, true);
        // zeros, as of a 0-1 loss on an easy batch, set no scale
        case(|_| 0.0, 0.025, false);
        case(|step| if step < 45 { 0.0 } else { 0.01 }, 0.5, false);
        case(|step| if step < 45 { 0.0 } else { 0.01 }, 1.1, true);
    }

    #[test]
    fn the_memory_is_bounded_and_recent() {
        let mut history = LossHistory::default();
        for id in 0..3 * GENERATION as u64 {
            see(&mut history, &[id], &[1.0]);
        }
        assert!(history.recent.len() + history.older.len() <= 2 * GENERATION);
        assert!(!history.knows(5) && history.knows(3 * GENERATION as u64 - 1));
        assert!(history.knows(2 * GENERATION as u64));
    }
}
