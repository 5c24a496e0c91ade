//! The examples of a pass, which key its dropout masks.

use rand::{Rng, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;

use crate::random::derive_seed;

/// Separates dropout masks from the noise of the same seed and step.
const DROPOUT: u64 = u64::from_le_bytes(*b"dropouts");

/// The examples of a step, which key its dropout masks together with its seed and number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepKey<'a> {
    pub seed: u64,
    pub step: u64,
    /// Ids of the batch.
    pub ids: &'a [u64],
}

impl StepKey<'_> {
    /// The examples at these positions of the batch, for one pass.
    pub fn examples(self, positions: &[usize]) -> PassExamples {
        PassExamples { seed: self.seed, step: self.step, ids: positions.iter().map(|&j| self.ids[j]).collect() }
    }
}

/// The examples of one pass, and the key of their dropout masks.
#[derive(Clone, Debug)]
pub(crate) struct PassExamples {
    seed: u64,
    step: u64,
    /// The id of each example, in the order of the pass's input.
    pub(super) ids: Vec<u64>,
}

impl PassExamples {
    /// The factors of each example: 0 where a value is dropped, 1/(1 − p) where it is kept.
    ///
    /// `call` counts the dropouts in front of this one in the pass.
    ///
    /// # Shapes
    /// - returns: `[examples, len]`
    pub(crate) fn factors(&self, call: u64, p: f64, len: usize) -> Vec<f32> {
        let below = (p * (1u64 << 32) as f64).round() as u64;
        let kept = if p < 1.0 { (1.0 / (1.0 - p)) as f32 } else { 0.0 };
        let factor = |bits: u32| if u64::from(bits) < below { 0.0 } else { kept };
        let mut factors = vec![0f32; self.ids.len() * len];
        for (id, row) in self.ids.iter().zip(factors.chunks_exact_mut(len.max(1))) {
            let key = derive_seed(&[DROPOUT, self.seed, self.step, *id, call]);
            let mut rng = Xoshiro256PlusPlus::seed_from_u64(key);
            for pair in row.chunks_mut(2) {
                let bits = rng.next_u64();
                pair[0] = factor(bits as u32);
                if let Some(second) = pair.get_mut(1) {
                    *second = factor((bits >> 32) as u32);
                }
            }
        }
        factors
    }
}
