//! Noise laws, their scores, and how values are drawn on the host.

use rand::Rng;
use rand_xoshiro::Xoshiro256PlusPlus;
use serde::{Deserialize, Serialize};

use super::generator::Generator;
use crate::names::named_enum;
use crate::ops;

/// Law of the perturbation ε: zero mean and unit variance in every coordinate.
///
/// The gradient estimate of a query is c·s(ε). Here s is the score −∇ ln p(ε) of the law, where it
/// has a usable one, and s(ε) = ε otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum NoiseLaw {
    /// N(0, 1), s(ε) = ε. Unbiased for the gradient of the Gaussian-smoothed loss.
    Gaussian,
    /// Laplace with b = 1/√2, s(ε) = √2·sign ε. Unbiased for the gradient of the Laplace-smoothed
    /// loss.
    Laplace,
    /// ±1 with probability ½. It has no density: s(ε) = ε is exact for quadratic losses and has a
    /// bias of O(σ²) otherwise.
    Rademacher,
    /// Uniform on [−√3, √3]. Its score vanishes inside: s(ε) = ε is exact for quadratic losses and
    /// has a bias of O(σ²) otherwise.
    Uniform,
}

named_enum! {
    NoiseLaw: "noise law" {
        Gaussian => "gaussian",
        Laplace => "laplace",
        Rademacher => "rademacher",
        Uniform => "uniform",
    }
}

impl NoiseLaw {
    /// Whether s is the score −∇ ln p of the law.
    ///
    /// Then the estimate is unbiased for the gradient of the loss smoothed by the law. It is not
    /// where the law has no density, or a score without a finite second moment: s(ε) = ε stands in
    /// for it.
    pub fn has_score(self) -> bool {
        match self {
            Self::Gaussian | Self::Laplace => true,
            Self::Rademacher | Self::Uniform => false,
        }
    }

    /// Returns E s(ε)², the second moment of one coordinate of the score.
    pub fn score_second_moment(self) -> f64 {
        match self {
            Self::Laplace => 2.0,
            Self::Gaussian | Self::Rademacher | Self::Uniform => 1.0,
        }
    }

    /// Fills `out` with draws of ε from the stream of `seed`.
    ///
    /// The estimators draw a row of noise on the host in the same way.
    pub fn sample(self, seed: u64, out: &mut [f32]) {
        self.fill(&mut Generator::new(seed), 1.0, out);
    }

    /// Fills `out` with `scale`·ε.
    pub(super) fn fill(self, Generator { rng, gaussian }: &mut Generator, scale: f32, out: &mut [f32]) {
        match self {
            Self::Gaussian => ops::vectorised(
                #[inline(always)]
                || gaussian.for_each(out, |v, e| *v = scale * e),
            ),
            Self::Laplace => {
                // |ε| = −b·ln(1 − u), u uniform on [0, 1); the sign is a separate bit
                let b = scale * std::f32::consts::FRAC_1_SQRT_2;
                for v in out {
                    let w = rng.next_u64();
                    let u = (w >> 40) as f32 * (1.0 / (1u64 << 24) as f32);
                    *v = flip(-b * (1.0 - u).ln(), w as u32);
                }
            }
            Self::Rademacher => fill_signs(rng, scale, out),
            Self::Uniform => {
                let width = 2.0 * 3f32.sqrt() * scale;
                for pair in out.chunks_mut(2) {
                    let w = rng.next_u64();
                    for (v, half) in pair.iter_mut().zip([w >> 40, (w >> 8) & 0xff_ffff]) {
                        *v = ((half as f32 + 0.5) * (1.0 / (1u64 << 24) as f32) - 0.5) * width;
                    }
                }
            }
        }
    }

    /// Adds `weight`·s(ε) to `out`, for the ε that [`fill`](Self::fill) draws from the same stream.
    pub(super) fn add_score(self, Generator { rng, gaussian }: &mut Generator, weight: f32, out: &mut [f32]) {
        match self {
            Self::Gaussian => ops::vectorised(
                #[inline(always)]
                || gaussian.for_each(out, |v, e| *v += weight * e),
            ),
            Self::Laplace => {
                let s = weight * std::f32::consts::SQRT_2;
                for v in out {
                    *v += flip(s, rng.next_u64() as u32);
                }
            }
            Self::Rademacher => add_signs(rng, weight, out),
            Self::Uniform => {
                let width = 2.0 * 3f32.sqrt() * weight;
                for pair in out.chunks_mut(2) {
                    let w = rng.next_u64();
                    for (v, half) in pair.iter_mut().zip([w >> 40, (w >> 8) & 0xff_ffff]) {
                        *v += ((half as f32 + 0.5) * (1.0 / (1u64 << 24) as f32) - 0.5) * width;
                    }
                }
            }
        }
    }
}

/// Returns `v` with its sign flipped where the lowest bit of `bit` is set.
fn flip(v: f32, bit: u32) -> f32 {
    f32::from_bits(v.to_bits() ^ ((bit & 1) << 31))
}

/// Calls `f` with each value of `out` and a random sign bit; one draw gives 64 signs.
#[inline(always)]
fn for_signs(rng: &mut Xoshiro256PlusPlus, out: &mut [f32], f: impl Fn(&mut f32, u32)) {
    let (blocks, rest) = out.as_chunks_mut::<32>();
    let mut word = 0;
    for (i, block) in blocks.iter_mut().enumerate() {
        word = if i % 2 == 0 { rng.next_u64() } else { word >> 32 };
        let bits = word as u32;
        for (shift, v) in block.iter_mut().enumerate() {
            f(v, (bits >> shift) << 31);
        }
    }
    if !rest.is_empty() {
        let bits = if blocks.len().is_multiple_of(2) { rng.next_u64() } else { word >> 32 } as u32;
        for (shift, v) in rest.iter_mut().enumerate() {
            f(v, (bits >> shift) << 31);
        }
    }
}

fn fill_signs(rng: &mut Xoshiro256PlusPlus, scale: f32, out: &mut [f32]) {
    let bits = scale.to_bits();
    ops::vectorised(
        #[inline(always)]
        || for_signs(rng, out, |v, sign| *v = f32::from_bits(bits ^ sign)),
    );
}

fn add_signs(rng: &mut Xoshiro256PlusPlus, weight: f32, out: &mut [f32]) {
    let bits = weight.to_bits();
    ops::vectorised(
        #[inline(always)]
        || for_signs(rng, out, |v, sign| *v += f32::from_bits(bits ^ sign)),
    );
}
