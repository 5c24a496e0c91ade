//! Counter-based noise in Burn's operations, for any backend.
//!
//! Value i of a segment is a hash of i and of the segment's 64-bit id, in arithmetic modulo 2³².
//! The hash uses sums, products, quotients and comparisons, which Burn can fuse. Bit operations
//! would each be a kernel of their own.

use burn::prelude::*;
use burn::tensor::{DType, FloatDType, TensorData};

use super::hash::INDEX_FACTOR;
use super::law::NoiseLaw;

/// Values that one operation handles at most, unless a single site of all rows needs more.
///
/// They are 64 MiB, which every GPU can allocate in one piece.
pub(super) const AT_ONCE: usize = 1 << 24;

/// Indices that are copied to the device directly; more are computed there from two lists.
const INDICES: usize = 4096;

/// Copies 32-bit words to the device.
fn words<B: Backend>(values: Vec<u32>, shape: [usize; 2], device: &B::Device) -> Tensor<B, 2, Int> {
    Tensor::from_data(TensorData::new(values, shape), (device, DType::U32))
}

/// Returns the indices of `width` values from `first` on, times [`INDEX_FACTOR`], as `[1, width]`.
fn indices<B: Backend>(first: u32, width: usize, device: &B::Device) -> Tensor<B, 2, Int> {
    let spread = |start: u32, step: u32, n: usize| -> Vec<u32> {
        (0..n as u32).map(|i| start.wrapping_add(i.wrapping_mul(step)).wrapping_mul(INDEX_FACTOR)).collect()
    };
    if width <= INDICES {
        return words(spread(first, 1, width), [1, width], device);
    }
    // Tensor::arange would be computed on the host
    let rows = width.div_ceil(INDICES);
    let down = words::<B>(spread(first, INDICES as u32, rows), [rows, 1], device);
    let across = words::<B>(spread(0, 1, INDICES), [1, INDICES], device);
    (down + across).reshape([1, rows * INDICES]).narrow(1, 0, width)
}

/// Ids of streams, as two 32-bit words, and their factors, each `[rows, 1]`.
struct Streams<B: Backend> {
    words: [Tensor<B, 2, Int>; 2],
    factors: Tensor<B, 2>,
}

impl<B: Backend> Streams<B> {
    fn new(streams: impl IntoIterator<Item = (u64, f32)>, device: &B::Device) -> Self {
        let (mut low, mut high, mut factors) = (vec![], vec![], vec![]);
        for (id, factor) in streams {
            low.push(id as u32);
            high.push((id >> 32) as u32);
            factors.push(factor);
        }
        let rows = factors.len();
        let factors = Tensor::from_data(TensorData::new(factors, [rows, 1]), (device, DType::F32));
        Self { words: [low, high].map(|values| words(values, [rows, 1], device)), factors }
    }

    fn rows(&self) -> usize {
        self.factors.dims()[0]
    }
}

/// A buffer of noise, or of sums of scores, generated for several sites at once.
///
/// With fusion every operation has a large fixed cost, however few values it handles.
pub(super) struct HashedNoise<B: Backend> {
    streams: Vec<Streams<B>>,
    /// Number of sums of scores; `None` for noise.
    groups: Option<usize>,
    device: B::Device,
    /// The latest values, until all of them are consumed.
    buffer: Option<Tensor<B, 2>>,
    /// Values of each row consumed from the buffer.
    consumed: usize,
    /// Values of each row that the buffer holds.
    width: usize,
    /// Values of each row that will be consumed in all, at most 2³².
    total: u64,
}

impl<B: Backend> HashedNoise<B> {
    /// Noise or scores of `rows`; a row lists its streams, each as (id, factor).
    ///
    /// With `sums`, a row is a sum of scores. At most `sums` streams are generated at a time,
    /// equally many for each sum; short rows are padded with streams of factor 0.
    pub fn new(rows: &[Vec<(u64, f32)>], sums: Option<usize>, device: &B::Device) -> Self {
        let (groups, device) = (sums.map(|_| rows.len()), device.clone());
        let most = rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = sums.map_or(1, |sums| sums / rows.len().max(1)).clamp(1, most.max(1));
        let streams = (0..most).step_by(width).map(|start| {
            let slab = |row: &Vec<(u64, f32)>| {
                (start..most.min(start + width)).map(|i| row.get(i).copied().unwrap_or_default()).collect::<Vec<_>>()
            };
            Streams::new(rows.iter().flat_map(slab), &device)
        });
        let streams = streams.collect();
        Self { streams, groups, device, buffer: None, consumed: 0, width: 0, total: 1 << 32 }
    }

    /// Announces that `total` values of each row will be consumed in all, at most 2³².
    pub fn set_total(&mut self, total: u64) {
        self.total = total;
    }

    /// Returns `len` values of each row from index `next` on, which follows the previous call's.
    pub fn take(&mut self, law: NoiseLaw, next: u32, len: usize) -> Tensor<B, 2> {
        let buffer = match self.buffer.take() {
            Some(buffer) if self.width - self.consumed >= len => buffer,
            _ => {
                let rows = self.groups.unwrap_or(self.widest()).max(1);
                let left = usize::try_from(self.total.saturating_sub(next.into())).unwrap_or(usize::MAX);
                // twice as many each time, since the total may be unknown
                self.width = (2 * self.width).min(AT_ONCE / rows).min(left).max(len);
                self.consumed = 0;
                self.generate(law, next, self.width)
            }
        };
        let values = if len == self.width { buffer.clone() } else { buffer.clone().narrow(1, self.consumed, len) };
        self.consumed += len;
        self.buffer = (self.consumed < self.width).then_some(buffer);
        values
    }

    /// Rows of the largest operation.
    fn widest(&self) -> usize {
        self.streams.iter().map(Streams::rows).max().unwrap_or(0)
    }

    fn generate(&self, law: NoiseLaw, next: u32, width: usize) -> Tensor<B, 2> {
        if self.streams.is_empty() || width == 0 {
            let rows = self.groups.unwrap_or(self.widest());
            return Tensor::zeros([rows, width], (&self.device, DType::F32));
        }
        // a sum needs more values than it has
        let piece = if self.groups.is_some() { (AT_ONCE / self.widest().max(1)).clamp(1, width) } else { width };
        let pieces = (0..width).step_by(piece).map(|start| {
            let here = piece.min(width - start);
            let index = indices(next + start as u32, here, &self.device);
            let parts = self.streams.iter().map(|streams| self.part(law, streams, index.clone()));
            parts.reduce(|a, b| a + b).expect("there are streams")
        });
        let mut pieces: Vec<_> = pieces.collect();
        if pieces.len() == 1 { pieces.remove(0) } else { Tensor::cat(pieces, 1) }
    }

    fn part(&self, law: NoiseLaw, streams: &Streams<B>, index: Tensor<B, 2, Int>) -> Tensor<B, 2> {
        let [_, width] = index.dims();
        let hash = |second| {
            let [low, high] = streams.words.clone();
            let (first, then) = if second { (high, low) } else { (low, high) };
            hash(first + index.clone(), |x| x + then.clone())
        };
        let values = law.values_from(hash, self.groups.is_some()) * streams.factors.clone();
        match self.groups {
            None => values,
            Some(n) => values.reshape([n, streams.rows() / n, width]).sum_dim(1).reshape([n, width]),
        }
    }
}

/// Hashes `x` as [`hash_of`](super::hash::hash_of) does. After the first round, `add_id` adds the
/// second word of the stream's id.
fn hash<B: Backend>(
    x: Tensor<B, 2, Int>,
    add_id: impl Fn(Tensor<B, 2, Int>) -> Tensor<B, 2, Int>,
) -> Tensor<B, 2, Int> {
    let round = |x: Tensor<B, 2, Int>| x.clone() * x.mul_scalar(2u32).add_scalar(1u32);
    let fold = |x: Tensor<B, 2, Int>| x.clone() + x.div_scalar(1u32 << 16);
    round(fold(round(add_id(fold(round(x))))))
}

/// Turns hashes into random signs ±1.
fn signs<B: Backend>(hash: Tensor<B, 2, Int>) -> Tensor<B, 2> {
    let ones = Tensor::<B, 2>::full(hash.dims(), 1.0, (&hash.device(), DType::F32));
    ones.mask_fill(hash.lower_elem(1u32 << 31), -1.0)
}

/// Maps the top 24 bits of a hash to the centres of 2²⁴ cells of (0, 1); the last rounds to 1.
fn unit<B: Backend>(hash: Tensor<B, 2, Int>) -> Tensor<B, 2> {
    (hash.div_scalar(1u32 << 8).cast(FloatDType::F32) + 0.5) * (1.0 / (1u32 << 24) as f32)
}

impl NoiseLaw {
    /// Computes ε, or with `score` s(ε), from hashes.
    ///
    /// `hash(false)` gives the first hash of every value, `hash(true)` the second.
    fn values_from<B: Backend>(self, hash: impl Fn(bool) -> Tensor<B, 2, Int>, score: bool) -> Tensor<B, 2> {
        match self {
            Self::Rademacher => signs(hash(false)),
            Self::Uniform => (unit(hash(false)) - 0.5) * (2.0 * 3f32.sqrt()),
            // Box–Muller transform
            Self::Gaussian => {
                let radius = (unit(hash(false)).log() * -2.0).sqrt();
                radius * (unit(hash(true)) * std::f32::consts::TAU).cos()
            }
            Self::Laplace if score => signs(hash(true)) * std::f32::consts::SQRT_2,
            Self::Laplace => unit(hash(false)).log() * -std::f32::consts::FRAC_1_SQRT_2 * signs(hash(true)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::hash::{halves, hash_of};
    use crate::random::derive_seed;

    /// Checks means over n = 2²⁰ signs of each of 30 streams.
    ///
    /// The mean sign is one of them. The others are mean products: with the signs 1, 2, 64 and 128
    /// later, with the previous stream, and with the second hash. Each is beyond 5/√n with
    /// probability 6·10⁻⁷; there are 210 of them.
    #[test]
    fn values_and_streams_are_uncorrelated() {
        let n = 1 << 20;
        let signs = |words| (0..n).map(|i| if hash_of(i, words) >> 31 == 1 { 1i64 } else { -1 }).collect::<Vec<_>>();
        let stream = |s: u64| signs(halves(derive_seed(&[s])));
        let second = |s: u64| {
            let [low, high] = halves(derive_seed(&[s]));
            signs([high, low])
        };
        let small = |sum: i64, what: &str| assert!((sum as f64).abs() < 5.0 * f64::from(n).sqrt(), "{what}: {sum}");
        let mut last = stream(1000);
        for s in 0..30 {
            let here = stream(s);
            small(here.iter().sum(), "mean");
            small(here.iter().zip(&last).map(|(a, b)| a * b).sum(), "the previous stream");
            small(here.iter().zip(&second(s)).map(|(a, b)| a * b).sum(), "the second hash");
            for lag in [1, 2, 64, 128] {
                small(here.iter().zip(&here[lag..]).map(|(a, b)| a * b).sum(), &format!("lag {lag}"));
            }
            last = here;
        }
    }
}
