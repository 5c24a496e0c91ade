//! Noise laws, their scores, and the keyed streams they are drawn from.
//!
//! Every row of noise has its own stream, derived from (seed, step, site, position, direction). A row therefore
//! holds the same numbers however the queries are chunked and on however many threads they run, and noise is drawn
//! again for the update instead of being kept. Devices that CubeCL drives make theirs themselves (`device.rs`).

pub(crate) mod device;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod kernel;

use std::sync::Arc;

use rand::{Rng, RngExt, SeedableRng};
use rand_distr::StandardNormal;
use rand_xoshiro::Xoshiro256PlusPlus;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::ops;

/// Law of the perturbation ε: zero mean, unit variance in every coordinate.
///
/// The gradient estimate of a query is c·s(ε), s being the score −∇ ln p(ε) of the law where it has one that can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NoiseLaw {
    /// N(0, 1), s(ε) = ε. Unbiased for the gradient of the Gaussian-smoothed loss.
    Gaussian,
    /// Laplace with b = 1/√2, s(ε) = √2·sign ε. Unbiased for the gradient of the Laplace-smoothed loss.
    Laplace,
    /// ±1 with probability ½. No density: s(ε) = ε, exact for quadratic losses, a bias of O(σ²) otherwise.
    Rademacher,
    /// Uniform on [−√3, √3]. The score vanishes inside: s(ε) = ε, exact for quadratic losses, a bias of O(σ²) otherwise.
    Uniform,
}

impl NoiseLaw {
    /// Every law, in the order of the documentation.
    pub const ALL: [Self; 4] = [Self::Gaussian, Self::Laplace, Self::Rademacher, Self::Uniform];

    /// The name used on command lines and in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gaussian => "gaussian",
            Self::Laplace => "laplace",
            Self::Rademacher => "rademacher",
            Self::Uniform => "uniform",
        }
    }

    /// E s(ε)², the second moment of one coordinate of the score.
    pub fn score_second_moment(self) -> f64 {
        match self {
            Self::Laplace => 2.0,
            Self::Gaussian | Self::Rademacher | Self::Uniform => 1.0,
        }
    }

    /// Fills `out` with draws of ε from the stream of `seed`, as the estimators draw a row of noise on the host.
    pub fn sample(self, seed: u64, out: &mut [f32]) {
        self.fill(&mut Xoshiro256PlusPlus::seed_from_u64(seed), 1.0, out);
    }

    /// Fills `out` with `scale`·ε.
    fn fill(self, rng: &mut Xoshiro256PlusPlus, scale: f32, out: &mut [f32]) {
        match self {
            Self::Gaussian => {
                for v in out {
                    let e: f32 = rng.sample(StandardNormal);
                    *v = scale * e;
                }
            }
            Self::Laplace => {
                // |ε| = −b·ln(1 − u) with u uniform on [0, 1), the sign from a bit of its own
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
    fn add_score(self, rng: &mut Xoshiro256PlusPlus, weight: f32, out: &mut [f32]) {
        match self {
            Self::Gaussian => {
                for v in out {
                    let e: f32 = rng.sample(StandardNormal);
                    *v += weight * e;
                }
            }
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

impl std::str::FromStr for NoiseLaw {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|law| law.name() == s).ok_or_else(|| Error::Unknown {
            what: "noise law",
            name: s.into(),
            choices: "gaussian, laplace, rademacher, uniform",
        })
    }
}

impl std::fmt::Display for NoiseLaw {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// `v` with its sign flipped where the lowest bit of `bit` is set.
fn flip(v: f32, bit: u32) -> f32 {
    f32::from_bits(v.to_bits() ^ ((bit & 1) << 31))
}

/// Calls `f` with each number of `out` and ±0 as a sign to flip by, 64 of them from each draw.
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

/// Numbers of a row that are drawn at a time: they stay in the innermost cache, and every law takes whole draws for them.
const BLOCK: usize = 4096;

/// One-sided queries with the clean loss as baseline, or antithetic pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sampling {
    /// Every query has a direction of its own; c = (ℓ(z + σε) − ℓ_clean)/σ.
    OneSided,
    /// Two queries of a datum share a direction, c = (ℓ(z + σε) − ℓ(z − σε))/2σ; an odd last query is one-sided.
    Antithetic,
}

impl Sampling {
    /// The direction of query `query` of a datum, and the sign it is taken with.
    pub(crate) fn direction(self, query: usize) -> (u64, f32) {
        match self {
            Self::OneSided => (query as u64, 1.0),
            Self::Antithetic => ((query / 2) as u64, if query.is_multiple_of(2) { 1.0 } else { -1.0 }),
        }
    }

    /// Queries that share a direction and therefore must be evaluated, weighted and dropped together.
    pub(crate) fn group(self) -> usize {
        match self {
            Self::OneSided => 1,
            Self::Antithetic => 2,
        }
    }
}

impl std::str::FromStr for Sampling {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self, Error> {
        match s {
            "one-sided" => Ok(Self::OneSided),
            "antithetic" => Ok(Self::Antithetic),
            _ => Err(Error::Unknown { what: "sampling", name: s.into(), choices: "one-sided, antithetic" }),
        }
    }
}

/// On how many layers the noise of a query falls (activation space).
///
/// Perturbing all sites at once, the estimate for each carries the noise of all others: its variance is (Σ_s E_s)(Σ_s G_s) per query, where
/// G_s is the squared norm of the gradient at the output of site s and E_s the squared norm of its noise and inputs. Drawing one
/// site per direction with probability p_s costs Σ_s E_s·G_s/p_s, at best (Σ_s √(E_s·G_s))², which Cauchy and Schwarz put below the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// On all sites at once.
    Joint,
    /// On one site, drawn anew for every direction with p_s ∝ √(E_s·G_s) from running estimates; the weight is 1/(B·A_j·p_s).
    Single,
    /// The same over datum × stage with the cost of each stage: p_s ∝ √(E_s·G_s/cost_s), where cost_s is the part of a pass that a query on
    /// site s takes, since it starts behind the stages before it. The directions of a datum are spread evenly over the sites, so that
    /// each gets ⌊A_j·p_s⌋ or a few more once A_j is large, and a fair draw where it is small. The budget counts passes instead of
    /// queries: Σ A_js·cost_s is B·A₀ full ones in the mean, and there are the more queries the cheaper they are.
    Staged,
}

impl Placement {
    /// Every placement.
    pub const ALL: [Self; 3] = [Self::Joint, Self::Single, Self::Staged];

    /// Whether a direction falls on one site alone.
    pub(crate) fn on_one(self) -> bool {
        self != Self::Joint
    }
}

impl std::str::FromStr for Placement {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self, Error> {
        match s {
            "joint" => Ok(Self::Joint),
            "single" => Ok(Self::Single),
            "staged" => Ok(Self::Staged),
            _ => Err(Error::Unknown { what: "placement", name: s.into(), choices: "joint, single, staged" }),
        }
    }
}

/// Law, scale, sampling and seed of a step's perturbations: everything but the place they fall on.
#[derive(Clone, Debug)]
pub(crate) struct NoiseSource {
    pub law: NoiseLaw,
    pub sampling: Sampling,
    pub sigma: f64,
    pub seed: u64,
    pub step: u64,
    /// Probability of each site, where a direction falls on one alone.
    pub sites: Option<Arc<[f64]>>,
    /// Whether the directions of a datum are spread evenly over the sites instead of drawn independently.
    pub spread: bool,
    /// Whether noise is [made by the device](device), where nothing on the host needs to see it.
    pub on_device: bool,
}

/// 1/golden ratio: its multiples fill the unit interval most evenly, however many are taken.
const GOLDEN: f64 = 0.618_033_988_749_894_9;

/// Stands for the choice of a site where the number of a site stands otherwise.
const CHOICE: u64 = u64::MAX;

/// Where a row of noise falls: the position of the datum in the batch and one of its directions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowKey {
    pub position: u64,
    pub query: usize,
}

/// Batch position used for directions that all data share.
pub(crate) const SHARED: u64 = u64::MAX;

impl NoiseSource {
    /// The site that a direction falls on, where it falls on one alone.
    pub fn chosen(&self, position: u64, direction: u64) -> Option<usize> {
        let probabilities = self.sites.as_ref()?;
        let uniform = |key: u64| {
            let bits = derive(&[self.seed, self.step, CHOICE, position, key]);
            (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
        };
        // each direction alone is uniform either way
        let mut left = if self.spread { (uniform(0) + direction as f64 * GOLDEN).fract() } else { uniform(direction) };
        let last = probabilities.len().saturating_sub(1);
        Some(
            probabilities
                .iter()
                .position(|p| {
                    left -= p;
                    left < 0.0
                })
                .unwrap_or(last),
        )
    }

    /// 1/p of a site that a direction falls on, 1 where it falls on all, `None` where it falls on another.
    fn reach(&self, site: usize, position: u64, direction: u64) -> Option<f64> {
        match (self.chosen(position, direction), &self.sites) {
            (Some(chosen), Some(p)) => (chosen == site).then(|| 1.0 / p[site]),
            _ => Some(1.0),
        }
    }

    /// Whether any of the rows is perturbed at `site`.
    pub fn falls_on(&self, site: usize, rows: &[RowKey]) -> bool {
        let hit = |row: &RowKey| self.reach(site, row.position, self.sampling.direction(row.query).0).is_some();
        self.sites.is_none() || rows.iter().any(hit)
    }

    fn stream(&self, site: usize, position: u64, direction: u64) -> Xoshiro256PlusPlus {
        Xoshiro256PlusPlus::seed_from_u64(derive(&[self.seed, self.step, site as u64, position, direction]))
    }

    /// Hands σ·ε of each of `rows` that is perturbed at `site` to `take`, some of its `len` numbers at a time, with the number of the row and that of
    /// the first of them. The halves of a pair that follow one another are drawn once.
    pub fn perturb(&self, site: usize, rows: &[RowKey], len: usize, mut take: impl FnMut(usize, usize, &[f32])) {
        let mut block = [0f32; BLOCK];
        let mut r = 0;
        while r < rows.len() {
            let (row, first) = (rows[r], r);
            let (direction, sign) = self.sampling.direction(row.query);
            r += 1;
            if self.reach(site, row.position, direction).is_none() {
                continue;
            }
            let pair = rows.get(r).filter(|next| {
                next.position == row.position && self.sampling.direction(next.query) == (direction, -sign)
            });
            r += usize::from(pair.is_some());
            let mut rng = self.stream(site, row.position, direction);
            for start in (0..len).step_by(BLOCK) {
                let noise = &mut block[..BLOCK.min(len - start)];
                self.law.fill(&mut rng, sign * self.sigma as f32, noise);
                take(first, start, noise);
                if pair.is_some() {
                    noise.iter_mut().for_each(|v| *v = -*v);
                    take(first + 1, start, noise);
                }
            }
        }
    }

    /// σ·ε for `rows`, each of `len` numbers, `[rows, len]`.
    #[cfg(test)]
    pub fn perturbation(&self, site: usize, rows: &[RowKey], len: usize) -> Vec<f32> {
        let mut out = vec![0f32; rows.len() * len];
        self.perturb(site, rows, len, |r, start, noise| out[r * len + start..][..noise.len()].copy_from_slice(noise));
        out
    }

    /// Σ_r weight_r·s(ε_r) over the rows of each group, `[groups, len]`; `groups` holds the rows of each in turn.
    ///
    /// Halves of an antithetic pair are merged, so that each direction is drawn once.
    pub fn weighted_scores(
        &self,
        site: usize,
        groups: &[std::ops::Range<usize>],
        rows: &[RowKey],
        weights: &[f64],
        len: usize,
    ) -> Vec<f32> {
        let mut out = vec![0f32; groups.len() * len];
        for (group, here) in groups.iter().zip(out.chunks_mut(len.max(1))) {
            let directions = self.directions(site, group.clone(), rows, weights).into_iter();
            let stream = |(position, direction, weight)| (self.stream(site, position, direction), weight as f32);
            let mut streams: Vec<_> = directions.map(stream).collect();
            for block in here.chunks_mut(BLOCK) {
                for (rng, weight) in &mut streams {
                    self.law.add_score(rng, *weight, block);
                }
            }
        }
        out
    }

    /// (position, direction, weight) of the rows that reach `site`: halves of a pair merged, their signs and 1/p in the weight, zeros left out.
    pub fn directions(
        &self,
        site: usize,
        group: std::ops::Range<usize>,
        rows: &[RowKey],
        weights: &[f64],
    ) -> Vec<(u64, u64, f64)> {
        let mut out = Vec::with_capacity(group.len());
        let mut r = group.start;
        while r < group.end {
            let (direction, sign) = self.sampling.direction(rows[r].query);
            let position = rows[r].position;
            let mut weight = f64::from(sign) * weights[r];
            r += 1;
            while r < group.end && rows[r].position == position {
                let (d, s) = self.sampling.direction(rows[r].query);
                if d != direction {
                    break;
                }
                weight += f64::from(s) * weights[r];
                r += 1;
            }
            if weight != 0.0
                && let Some(scale) = self.reach(site, position, direction)
            {
                out.push((position, direction, weight * scale));
            }
        }
        out
    }

    /// ε itself of one direction at a site, `len` numbers: neither scaled nor signed.
    pub fn draw(&self, site: usize, position: u64, direction: u64, out: &mut [f32]) {
        self.law.fill(&mut self.stream(site, position, direction), 1.0, out);
    }

    /// The sign that a row's direction is taken with, and the direction, where it reaches `site`.
    pub fn signed(&self, site: usize, row: &RowKey) -> Option<(u64, f32)> {
        let (direction, sign) = self.sampling.direction(row.query);
        self.reach(site, row.position, direction).map(|_| (direction, sign))
    }
}

/// A seed derived from several numbers, each of which changes all of it (SplitMix64 finaliser, chained).
pub fn derive(parts: &[u64]) -> u64 {
    parts.iter().fold(0x9e37_79b9_7f4a_7c15, |h, &p| {
        let mut z = (h ^ p).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn source(law: NoiseLaw, sampling: Sampling) -> NoiseSource {
        NoiseSource { law, sampling, sigma: 1.0, seed: 3, step: 5, sites: None, spread: false, on_device: false }
    }

    pub(super) fn rows(positions: u64, queries: usize) -> Vec<RowKey> {
        (0..positions).flat_map(|position| (0..queries).map(move |query| RowKey { position, query })).collect()
    }

    fn values(noise: Vec<f32>) -> Vec<f64> {
        noise.into_iter().map(f64::from).collect()
    }

    /// Draws ε of a law and their scores s, n = 200,000 of each: a mean beyond 5/√n or a variance off by more than 5·√(kurtosis − 1)/√n has
    /// probability < 10⁻⁶. Stein's identity E[f(ε) s(ε)] = E f′(ε) for f(ε) = ε (all laws) and, where the score is a real one, f(ε) = sin ε, within 5
    /// standard errors (false-failure rate < 10⁻⁶ a law).
    pub(super) fn obey(law: NoiseLaw, e: &[f64], s: &[f64]) {
        let n = e.len() as f64;
        assert_eq!((e.len(), s.len()), (200_000, 200_000));
        let mean = e.iter().sum::<f64>() / n;
        let var = e.iter().map(|v| v * v).sum::<f64>() / n;
        assert!(mean.abs() < 5.0 / n.sqrt(), "{law}: mean {mean}");
        assert!((var - 1.0).abs() < 5.0 * 5f64.sqrt() / n.sqrt(), "{law}: variance {var}");
        let check = |f: &dyn Fn(f64) -> f64, df: &dyn Fn(f64) -> f64| {
            let d: Vec<f64> = e.iter().zip(s).map(|(&e, &s)| f(e) * s - df(e)).collect();
            let m = d.iter().sum::<f64>() / n;
            let sd = (d.iter().map(|v| (v - m).powi(2)).sum::<f64>() / n).sqrt();
            assert!(m.abs() <= 5.0 * sd / n.sqrt() + 1e-6, "{law}: {m} against 5·{}", sd / n.sqrt());
        };
        check(&|e| e, &|_| 1.0);
        if matches!(law, NoiseLaw::Gaussian | NoiseLaw::Laplace) {
            check(&f64::sin, &f64::cos);
        }
        let second = s.iter().map(|v| v * v).sum::<f64>() / n;
        assert!((second - law.score_second_moment()).abs() < 0.02, "{law}: E s² = {second}");
    }

    #[test]
    fn laws_have_their_moments_and_scores_satisfy_steins_identity() {
        for law in NoiseLaw::ALL {
            let src = source(law, Sampling::OneSided);
            let keys = rows(400, 1);
            let groups: Vec<_> = (0..400).map(|i| i..i + 1).collect();
            let s = src.weighted_scores(1, &groups, &keys, &[1.0; 400], 500);
            obey(law, &values(src.perturbation(1, &keys, 500)), &values(s));
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_neighbours() {
        for law in NoiseLaw::ALL {
            for sampling in [Sampling::OneSided, Sampling::Antithetic] {
                let src = source(law, sampling);
                let all = rows(3, 5);
                let together = values(src.perturbation(2, &all, 70));
                for (r, row) in all.iter().enumerate() {
                    let alone = values(src.perturbation(2, &[*row], 70));
                    assert_eq!(alone, together[r * 70..(r + 1) * 70]);
                }
            }
        }
    }

    #[test]
    fn halves_of_a_pair_are_opposite_and_directions_differ() {
        let src = source(NoiseLaw::Gaussian, Sampling::Antithetic);
        let keys = rows(2, 3);
        let e = values(src.perturbation(0, &keys, 40));
        let row = |r: usize| &e[r * 40..(r + 1) * 40];
        assert!(row(0).iter().zip(row(1)).all(|(a, b)| *a == -*b));
        assert_ne!(row(0), row(2));
        assert_ne!(row(0), row(3));
        let mut other = src.clone();
        other.step += 1;
        assert_ne!(values(other.perturbation(0, &keys, 40)), e);
        assert_ne!(values(src.perturbation(1, &keys, 40)), e);
    }
}
