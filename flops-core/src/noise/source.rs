//! Keyed streams of noise, and the host's side of drawing them.
//!
//! On the host, every direction has its own stream at every site, keyed by (seed, step, site,
//! position, direction). The two rows of an antithetic pair share it. A row therefore holds the
//! same values however the queries are chunked, and on any number of threads. Noise is drawn again
//! for the update instead of being stored.

use std::ops::Range;
use std::sync::Arc;

use super::law::NoiseLaw;
use super::sampling::Sampling;
#[cfg(test)]
use super::script;
use super::span::Span;
use super::stream::Stream;
use crate::probe::Layout;
use crate::random::derive_seed;

/// Values of a row that are drawn at a time.
///
/// A block fits the innermost cache, and every law fills it with whole draws.
const BLOCK: usize = 4096;

/// Law, scale, sampling, seed and placement of a step's perturbations.
#[derive(Clone, Debug)]
pub(crate) struct NoiseSource {
    pub law: NoiseLaw,
    pub sampling: Sampling,
    pub sigma: f64,
    pub seed: u64,
    pub step: u64,
    /// Probability of each place, where a direction falls on a single one.
    ///
    /// The places are the sites. With spans, they are the sites with noise on all coordinates, and
    /// then the sites again with noise in their span.
    pub sites: Option<Arc<[f64]>>,
    /// The span of each site, where it has one; empty if no site has.
    pub spans: Arc<[Option<Span>]>,
    /// Whether an example's directions are spread evenly over the sites instead of drawn
    /// independently.
    pub spread: bool,
    /// Whether tokens that are alike share their noise.
    pub shared: bool,
    /// Whether noise is [generated on the GPU](super::device), unless the host needs to see it.
    pub on_device: bool,
}

/// Inverse of the golden ratio: any number of its multiples, modulo 1, fill the unit interval
/// evenly.
const GOLDEN: f64 = 0.618_033_988_749_894_9;

/// Key for the choice of a site; takes the place of a site's number.
const CHOICE: u64 = u64::MAX;

/// Identifies a row of noise: the example's position in the batch and the number of its query.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowKey {
    pub position: u64,
    pub query: usize,
}

/// How a direction falls on a site.
#[derive(Clone, Copy)]
pub(crate) struct Fall<'a> {
    /// What the noise is confined to; `None` for noise on all coordinates.
    pub span: Option<&'a Span>,
    /// 1/p of this place, or 1 where it falls on all sites; 0 where other queries measure the site.
    pub weight: f64,
}

/// Batch position of directions that all examples share.
pub(crate) const SHARED: u64 = u64::MAX;

impl NoiseSource {
    /// Whether the noise of a site of this layout is shared by tokens that are alike.
    pub fn shares(&self, layout: &Layout) -> bool {
        self.shared && layout.is_shared()
    }

    /// Returns the place that a direction falls on; `None` where it falls on all sites.
    fn place(&self, position: u64, direction: u64) -> Option<usize> {
        let probabilities = self.sites.as_ref()?;
        let uniform = |key: u64, shift: f64| {
            let seed = derive_seed(&[self.seed, self.step, CHOICE, position, key]);
            #[cfg(test)]
            if let Some(uniform) = script::uniform(seed, shift, probabilities) {
                return (uniform + shift).fract();
            }
            ((seed >> 11) as f64 * (1.0 / (1u64 << 53) as f64) + shift).fract()
        };
        // in both cases each single direction is uniform
        let mut left = if self.spread { uniform(0, direction as f64 * GOLDEN) } else { uniform(direction, 0.0) };
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

    /// Returns the site that a direction falls on, and how; `None` where it falls on all.
    pub fn landing(&self, position: u64, direction: u64) -> Option<(usize, Fall<'_>)> {
        let (place, probabilities) = (self.place(position, direction)?, self.sites.as_ref()?);
        let inverse = 1.0 / probabilities[place];
        if let Some(site) = place.checked_sub(self.spans.len()).filter(|_| !self.spans.is_empty()) {
            return Some((site, Fall { span: self.span(site), weight: inverse }));
        }
        // what such a query shows of a span is more noise than those in the span have
        let weight = if self.span(place).is_some() { 0.0 } else { inverse };
        Some((place, Fall { span: None, weight }))
    }

    /// Returns the site that a direction falls on; `None` where it falls on all.
    pub fn chosen(&self, position: u64, direction: u64) -> Option<usize> {
        self.landing(position, direction).map(|(site, _)| site)
    }

    /// Returns how a direction falls on a site; `None` where it falls on another.
    pub fn fall(&self, site: usize, position: u64, direction: u64) -> Option<Fall<'_>> {
        match self.landing(position, direction) {
            Some((chosen, fall)) => (chosen == site).then_some(fall),
            None => Some(Fall { span: None, weight: 1.0 }),
        }
    }

    /// What the measured part of a site's gradient is confined to.
    pub fn span(&self, site: usize) -> Option<&Span> {
        self.spans.get(site)?.as_ref()
    }

    /// Whether any of the rows is perturbed at `site`.
    pub fn falls_on(&self, site: usize, rows: &[RowKey]) -> bool {
        let hit = |row: &RowKey| self.fall(site, row.position, self.sampling.direction(row.query).0).is_some();
        self.sites.is_none() || rows.iter().any(hit)
    }

    fn stream(&self, site: usize, position: u64, direction: u64) -> Stream {
        Stream::new(derive_seed(&[self.seed, self.step, site as u64, position, direction]))
    }

    /// Draws σ·ε of each of `rows` that is perturbed at `site`, and hands it to `take` in blocks.
    ///
    /// `take` receives the index of the row, the index of the block's first value in the row, and
    /// the block. A row has `len` values. An antithetic pair of neighbouring rows is drawn once.
    pub fn perturb(&self, site: usize, rows: &[RowKey], len: usize, mut take: impl FnMut(usize, usize, &[f32])) {
        let mut block = [0f32; BLOCK];
        let mut r = 0;
        while r < rows.len() {
            let (row, first) = (rows[r], r);
            let (direction, sign) = self.sampling.direction(row.query);
            r += 1;
            let Some(Fall { span, .. }) = self.fall(site, row.position, direction) else { continue };
            let pair = rows.get(r).filter(|next| {
                next.position == row.position && self.sampling.direction(next.query) == (direction, -sign)
            });
            r += usize::from(pair.is_some());
            let mut stream = self.stream(site, row.position, direction);
            let scale = sign * self.sigma as f32;
            let mut whole = span.map(|span| self.in_span(span, &mut stream, scale));
            for start in (0..len).step_by(BLOCK) {
                let end = len.min(start + BLOCK);
                let noise = match &mut whole {
                    Some(whole) => &mut whole[start..end],
                    None => {
                        let noise = &mut block[..end - start];
                        stream.fill(self.law, scale, noise);
                        noise
                    }
                };
                take(first, start, noise);
                if pair.is_some() {
                    noise.iter_mut().for_each(|v| *v = -*v);
                    take(first + 1, start, noise);
                }
            }
        }
    }

    /// Returns σ·ε of `rows` as `[rows, len]`.
    #[cfg(test)]
    pub fn perturbation(&self, site: usize, rows: &[RowKey], len: usize) -> Vec<f32> {
        let mut out = vec![0f32; rows.len() * len];
        self.perturb(site, rows, len, |r, start, noise| out[r * len + start..][..noise.len()].copy_from_slice(noise));
        out
    }

    /// Returns Σ_r weight_r·s(ε_r) over the rows of each group, as `[groups, len]`.
    ///
    /// `groups` holds the range of each group's rows. Antithetic pairs are merged, so each
    /// direction is drawn once.
    pub fn weighted_scores(
        &self,
        site: usize,
        groups: &[Range<usize>],
        rows: &[RowKey],
        weights: &[f64],
        len: usize,
    ) -> Vec<f32> {
        let span = self.span(site);
        let width = span.map_or(len, Span::dim);
        let mut out = vec![0f32; groups.len() * width];
        for (group, here) in groups.iter().zip(out.chunks_mut(width.max(1))) {
            let directions = self.directions(site, group.clone(), rows, weights).into_iter();
            let stream = |(position, direction, weight)| (self.stream(site, position, direction), weight as f32);
            let mut streams: Vec<_> = directions.map(stream).collect();
            for block in here.chunks_mut(BLOCK) {
                for (stream, weight) in &mut streams {
                    stream.add_score(self.law, *weight, block);
                }
            }
        }
        let Some(span) = span else { return out };
        let mut rows = vec![0f32; groups.len() * len];
        out.chunks(width).zip(rows.chunks_mut(len)).for_each(|(z, row)| span.combine(z, row));
        rows
    }

    /// Returns (position, direction, weight) of the rows of a group that perturb `site`.
    ///
    /// Antithetic pairs are merged. The weight includes sign and 1/p; zero weights are left out.
    pub fn directions(
        &self,
        site: usize,
        group: Range<usize>,
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
                && let Some(fall) = self.fall(site, position, direction)
                && fall.weight != 0.0
            {
                out.push((position, direction, weight * fall.weight));
            }
        }
        out
    }

    /// Fills `out` with ε of one direction at a site, without scale and sign.
    ///
    /// - span: what its noise is confined to, by its [`fall`](Self::fall)
    pub fn draw(&self, site: usize, position: u64, direction: u64, span: Option<&Span>, out: &mut [f32]) {
        let mut stream = self.stream(site, position, direction);
        match span {
            Some(span) => out.copy_from_slice(&self.in_span(span, &mut stream, 1.0)),
            None => stream.fill(self.law, 1.0, out),
        }
    }

    /// Noise in a span, `[len]`.
    fn in_span(&self, span: &Span, stream: &mut Stream, scale: f32) -> Vec<f32> {
        let (mut z, mut out) = (vec![0f32; span.dim()], vec![0f32; span.len()]);
        stream.fill(self.law, scale, &mut z);
        span.combine(&z, &mut out);
        out
    }

    /// Returns the direction of a row and its sign, where the row perturbs `site`.
    pub fn signed(&self, site: usize, row: &RowKey) -> Option<(u64, f32)> {
        let (direction, sign) = self.sampling.direction(row.query);
        self.fall(site, row.position, direction).map(|_| (direction, sign))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A source without sites and spans.
    pub(crate) fn source(law: NoiseLaw, sampling: Sampling) -> NoiseSource {
        NoiseSource {
            law,
            sampling,
            sigma: 1.0,
            seed: 3,
            step: 5,
            sites: None,
            spans: Arc::default(),
            spread: false,
            shared: false,
            on_device: false,
        }
    }

    pub(in crate::noise) fn rows(positions: u64, queries: usize) -> Vec<RowKey> {
        (0..positions).flat_map(|position| (0..queries).map(move |query| RowKey { position, query })).collect()
    }

    fn values(noise: Vec<f32>) -> Vec<f64> {
        noise.into_iter().map(f64::from).collect()
    }

    /// Checks n = 200,000 draws ε of a law and their scores s.
    ///
    /// A mean beyond 5/√n, or a variance off by more than 5·√(kurtosis − 1)/√n, has probability <
    /// 10⁻⁶. Stein's identity E[f(ε) s(ε)] = E f′(ε) must hold within 5 standard errors, with a
    /// false-failure rate < 10⁻⁶ per law. It is checked for f(ε) = ε, and for f(ε) = sin ε where
    /// the law has a true score.
    pub(in crate::noise) fn obey(law: NoiseLaw, e: &[f64], s: &[f64]) {
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
        if law.has_score() {
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

    /// σ scales the noise and a weight the scores, by powers of two: to the bit.
    #[test]
    fn noise_is_proportional_to_sigma_and_scores_to_their_weight() {
        let (keys, group, len) = (rows(1, 1), 0..1, 70);
        for law in NoiseLaw::ALL {
            let src = source(law, Sampling::OneSided);
            let small = NoiseSource { sigma: 0.25, ..src.clone() };
            let scaled: Vec<f32> = src.perturbation(1, &keys, len).iter().map(|e| 0.25 * e).collect();
            assert_eq!(small.perturbation(1, &keys, len), scaled, "{law}");
            let scores = |weight| src.weighted_scores(1, std::slice::from_ref(&group), &keys, &[weight], len);
            let scaled: Vec<f32> = scores(1.0).iter().map(|s| 0.25 * s).collect();
            assert_eq!(scores(0.25), scaled, "{law}");
        }
    }

    #[test]
    fn a_law_is_sampled_from_the_stream_of_its_seed() {
        for law in NoiseLaw::ALL {
            let of = |seed| {
                let mut out = [0f32; 70];
                law.sample(seed, &mut out);
                out
            };
            let mut stream = [0f32; 70];
            Stream::new(7).fill(law, 1.0, &mut stream);
            assert_eq!(of(7), stream, "{law}");
            assert_ne!(of(7), of(8), "{law}");
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

    /// Rows are drawn block by block in a pass, and at once by `draw`; scores belong to the same
    /// values.
    #[test]
    fn blocks_do_not_change_a_row() {
        let (len, keys) = (BLOCK + 70, rows(1, 1));
        for law in NoiseLaw::ALL {
            let src = source(law, Sampling::OneSided);
            let mut whole = vec![0f32; len];
            src.draw(0, 0, 0, None, &mut whole);
            let scaled: Vec<f32> = whole.iter().map(|e| e * src.sigma as f32).collect();
            assert!(close(&src.perturbation(0, &keys, len), &scaled), "{law}");
            if !law.has_score() {
                // s(ε) = ε
                let group = 0..1;
                let scores = src.weighted_scores(0, std::slice::from_ref(&group), &keys, &[1.0], len);
                assert!(close(&scores, &whole), "{law}");
            }
        }
    }

    fn close(a: &[f32], b: &[f32]) -> bool {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-6 * b.abs())
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
