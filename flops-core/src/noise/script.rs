//! Draws that follow a script: a test goes through every outcome instead of sampling some.
//!
//! A run of the code under test is a path through a tree of choices: the sign of each value of each
//! stream, the site of each direction. [`for_all`] takes every path once. A mean over all paths,
//! weighted with their probabilities, is exact.
//!
//! A choice is known by the seed of its stream. Two draws that share a seed, though they should be
//! independent, get one outcome, and the mean shows it.

use std::cell::RefCell;
use std::collections::HashMap;

use super::law::NoiseLaw;

thread_local! {
    static SCRIPT: RefCell<Option<Script>> = const { RefCell::new(None) };
}

/// Paths that a test may take at most: more would take too long.
const MOST_PATHS: usize = 1 << 14;

/// A path through the tree of choices.
#[derive(Default)]
struct Script {
    /// The choices of the path, each as the outcome and the probabilities of all outcomes.
    path: Vec<(usize, Vec<f64>)>,
    /// Choices of the path that this run has made.
    made: usize,
    /// Signs by (seed, place in the stream).
    signs: HashMap<(u64, u64), f32>,
    /// The interval that a uniform draw is known to lie in, by its seed.
    intervals: HashMap<u64, [f64; 2]>,
}

impl Script {
    /// The outcome of the next choice, the first one where the path is new here.
    fn choose(&mut self, probabilities: Vec<f64>) -> usize {
        if self.made == self.path.len() {
            self.path.push((0, probabilities));
        }
        self.made += 1;
        self.path[self.made - 1].0
    }

    /// Turns to the next path; false after the last one.
    fn turn(&mut self) -> bool {
        (self.made, self.signs, self.intervals) = (0, HashMap::new(), HashMap::new());
        while let Some((outcome, probabilities)) = self.path.pop() {
            if outcome + 1 < probabilities.len() {
                self.path.push((outcome + 1, probabilities));
                return true;
            }
        }
        false
    }
}

/// Whether this thread's draws follow a script.
pub(super) fn is_on() -> bool {
    SCRIPT.with_borrow(Option::is_some)
}

/// The next sign of a stream, which has a seed and a place.
pub(super) fn sign(law: NoiseLaw, (seed, at): &mut (u64, u64)) -> f32 {
    assert_eq!(law, NoiseLaw::Rademacher, "no other law has finitely many outcomes");
    let key = (*seed, *at);
    *at += 1;
    SCRIPT.with_borrow_mut(|script| {
        let script = script.as_mut().expect("a script is on");
        if let Some(&sign) = script.signs.get(&key) {
            return sign;
        }
        let sign = [1.0, -1.0][script.choose(vec![0.5; 2])];
        script.signs.insert(key, sign);
        sign
    })
}

/// A uniform draw u, of which only the site that u + `shift` (modulo 1) falls on matters.
///
/// The same u may be asked for with several shifts: each narrows the interval that it lies in.
/// `None` where no script is on.
pub(super) fn uniform(seed: u64, shift: f64, sites: &[f64]) -> Option<f64> {
    SCRIPT.with_borrow_mut(|script| {
        let script = script.as_mut()?;
        let [from, to] = script.intervals.get(&seed).copied().unwrap_or([0.0, 1.0]);
        let ends = sites.iter().scan(0.0, |end, p| {
            *end += p;
            Some(*end)
        });
        // a site begins where the one before it ends, the first at 0
        let mut cuts: Vec<f64> = std::iter::once(0.0).chain(ends).map(|end| (end - shift).rem_euclid(1.0)).collect();
        cuts.retain(|cut| (from + 1e-9..to - 1e-9).contains(cut));
        cuts.extend([from, to]);
        cuts.sort_by(f64::total_cmp);
        cuts.dedup_by(|a, b| *a - *b < 1e-9);
        let parts = cuts.windows(2).map(|cut| (cut[1] - cut[0]) / (to - from)).collect::<Vec<_>>();
        let part = if parts.len() == 1 { 0 } else { script.choose(parts) };
        script.intervals.insert(seed, [cuts[part], cuts[part + 1]]);
        Some(0.5 * (cuts[part] + cuts[part + 1]))
    })
}

/// Runs `work` once for every outcome of its draws, and hands `take` each result with its
/// probability.
///
/// The work must draw on this thread alone. Noise made by a device follows no script.
pub(crate) fn for_all<T>(mut work: impl FnMut() -> T, mut take: impl FnMut(f64, T)) {
    struct Reset;
    impl Drop for Reset {
        fn drop(&mut self) {
            SCRIPT.set(None);
        }
    }
    let _reset = Reset;
    SCRIPT.set(Some(Script::default()));
    let mut total = 0.0;
    for path in 0.. {
        assert!(path < MOST_PATHS, "more than {MOST_PATHS} paths");
        let result = work();
        let probability = SCRIPT.with_borrow(|script| {
            let choices = script.iter().flat_map(|script| &script.path);
            choices.map(|(outcome, probabilities)| probabilities[*outcome]).product::<f64>()
        });
        total += probability;
        take(probability, result);
        if !SCRIPT.with_borrow_mut(|script| script.as_mut().is_some_and(Script::turn)) {
            break;
        }
    }
    assert!((total - 1.0).abs() < 1e-9, "the paths have probability {total} in all");
}

/// The exact mean of what `work` returns, value by value.
pub(crate) fn mean(work: impl FnMut() -> Vec<f64>) -> Vec<f64> {
    let mut mean = vec![];
    for_all(work, |probability, values| {
        mean.resize(values.len(), 0.0);
        mean.iter_mut().zip(values).for_each(|(mean, value)| *mean += probability * value);
    });
    mean
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::source::tests::{rows, source};
    use crate::noise::{NoiseSource, Sampling};

    /// Three signs in two blocks, met twice: eight outcomes, in which every sign is fair and no two
    /// are related.
    #[test]
    fn every_pattern_of_signs_comes_once() {
        let source = source(NoiseLaw::Rademacher, Sampling::OneSided);
        let mut seen = vec![];
        let draw = || {
            let once = source.perturbation(1, &rows(1, 1), 3);
            assert_eq!(source.perturbation(1, &rows(1, 1), 3), once);
            once
        };
        for_all(draw, |probability, signs| {
            assert_eq!(probability, 0.125);
            seen.push(signs);
        });
        seen.sort_by(|a, b| a.partial_cmp(b).unwrap());
        seen.dedup();
        assert_eq!((seen.len(), is_on()), (8, false));
    }

    /// Sites come with their probabilities: independently where directions are drawn one by one,
    /// and by one uniform draw where they are spread.
    #[test]
    fn every_choice_of_sites_has_its_probability() {
        let p = [0.2, 0.5, 0.3];
        for spread in [false, true] {
            let source =
                NoiseSource { sites: Some(p.into()), spread, ..source(NoiseLaw::Rademacher, Sampling::OneSided) };
            // indicators of the site of two directions of one example, and of one of another
            let joint = mean(|| {
                let [a, b, other] = [(0, 0), (0, 1), (1, 0)].map(|(j, d)| source.chosen(j, d).unwrap());
                let pairs = (0..9).map(|i| (i / 3, i % 3));
                let of = |x: usize, y: usize| pairs.clone().map(move |pair| f64::from(u8::from(pair == (x, y))));
                of(a, b).chain(of(a, other)).collect()
            });
            let (same, others) = joint.split_at(9);
            for (i, (s, o)) in same.iter().zip(others).enumerate() {
                let product = p[i / 3] * p[i % 3];
                assert!((o - product).abs() < 1e-9, "{joint:?}");
                // u on [0, 0.2) gives site 0, then u + 0.618 site 1 for u < 0.082 and else site 2
                let expected = match i {
                    _ if !spread => product,
                    1 => 0.7 - 0.618_033_988_749_894_9,
                    2 => 0.2 - (0.7 - 0.618_033_988_749_894_9),
                    _ => *s,
                };
                assert!((s - expected).abs() < 1e-9, "{joint:?}");
            }
            let marginal = |k: usize| (0..3).map(|i| same[3 * i + k]).sum::<f64>();
            assert!((0..3).all(|k| (marginal(k) - p[k]).abs() < 1e-9), "{joint:?}");
        }
    }
}
