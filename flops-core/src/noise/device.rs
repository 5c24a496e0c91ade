//! Noise made where the tensors are, on devices that CubeCL drives (CUDA, wgpu).
//!
//! On the host a stream is a generator that is run from its start. A device makes all numbers at once: number i of a stream is a hash of
//! i and of the 64 bits that the stream is named by, in arithmetic modulo 2³². It is written in sums, products, quotients and comparisons,
//! which Burn can fuse; bit operations would each be a kernel of their own. The sites of a pass take their numbers in turn: by the kernel of `kernel.rs`
//! where the backend has it, else from what Burn's operations have made for several of them. Laws, keys and independence of chunks are those of the
//! host, the numbers are others.

use burn::prelude::*;
use burn::tensor::{DType, FloatDType, TensorData};

use super::{NoiseLaw, NoiseSource, RowKey, derive};
use crate::feedback::Prediction;
use crate::ops;

/// Factor of the index, 2³²/golden ratio: the indices of a stream are spread over all 32 bits.
pub(super) const SPREAD: u32 = 0x9e37_79b9;

/// Whether the device makes its noise itself.
pub(crate) fn makes_noise<B: Backend>(device: &B::Device) -> bool {
    #[cfg(test)]
    if forced::get() {
        return true;
    }
    ops::is_device::<B>(device)
}

/// Numbers that one operation is on at most, if one site of all rows does not need more: 64 MiB, what every GPU takes in one piece.
const AT_ONCE: usize = 1 << 24;

/// Indices that are brought to the device as they are; of more, the device makes them of two such lists.
const INDICES: usize = 4096;

/// Words of 32 bits on the device.
fn words<B: Backend>(values: Vec<u32>, shape: [usize; 2], device: &B::Device) -> Tensor<B, 2, Int> {
    Tensor::from_data(TensorData::new(values, shape), (device, DType::U32))
}

/// The indices of `width` numbers from `first` on, spread: `[1, width]`.
fn indices<B: Backend>(first: u32, width: usize, device: &B::Device) -> Tensor<B, 2, Int> {
    let spread = |start: u32, step: u32, n: usize| -> Vec<u32> {
        (0..n as u32).map(|i| start.wrapping_add(i.wrapping_mul(step)).wrapping_mul(SPREAD)).collect()
    };
    if width <= INDICES {
        return words(spread(first, 1, width), [1, width], device);
    }
    // Burn makes a range on the host
    let rows = width.div_ceil(INDICES);
    let down = words::<B>(spread(first, INDICES as u32, rows), [rows, 1], device);
    let across = words::<B>(spread(0, 1, INDICES), [1, INDICES], device);
    (down + across).reshape([1, rows * INDICES]).narrow(1, 0, width)
}

/// Names of streams and the factor of each, `[rows, 1]`.
struct Streams<B: Backend> {
    words: [Tensor<B, 2, Int>; 2],
    factors: Tensor<B, 2>,
}

impl<B: Backend> Streams<B> {
    fn new(names: impl IntoIterator<Item = (u64, f32)>, device: &B::Device) -> Self {
        let (mut low, mut high, mut factors) = (vec![], vec![], vec![]);
        for (name, factor) in names {
            low.push(name as u32);
            high.push((name >> 32) as u32);
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

/// What streams give to one site after another.
pub(crate) struct Numbers<B: Backend> {
    law: NoiseLaw,
    rows: usize,
    /// The index of the next number of every stream.
    next: usize,
    by: By<B>,
}

/// How numbers are made.
enum By<B: Backend> {
    /// By a kernel, where the backend has it.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    Kernel(super::kernel::Table<B>),
    /// By Burn's operations.
    Operations(Pool<B>),
}

impl<B: Backend> Numbers<B> {
    /// Noise of rows, each of one stream with its factor, or where `sums` says of how many streams at a time, sums of the scores of those of each row.
    fn new(law: NoiseLaw, rows: &[Vec<(u64, f32)>], sums: Option<usize>, device: &B::Device) -> Self {
        let n = rows.len();
        #[cfg(any(feature = "cuda", feature = "wgpu"))]
        if let Some(table) = super::kernel::Table::new(rows, sums.is_some(), device) {
            return Self { law, rows: n, next: 0, by: By::Kernel(table) };
        }
        Self { law, rows: n, next: 0, by: By::Operations(Pool::new(rows, sums, device)) }
    }

    /// The same, of which `total` will be taken in all.
    pub fn of(mut self, total: usize) -> Self {
        match &mut self.by {
            #[cfg(any(feature = "cuda", feature = "wgpu"))]
            By::Kernel(_) => {}
            By::Operations(pool) => pool.total = total,
        }
        self
    }

    /// The next `len` numbers of each row: `[rows, len]`.
    pub fn take(&mut self, len: usize) -> Tensor<B, 2> {
        let (law, next) = (self.law, self.next);
        self.next += len;
        let numbers = match &mut self.by {
            #[cfg(any(feature = "cuda", feature = "wgpu"))]
            By::Kernel(table) => table.take(law, next as u32, len),
            By::Operations(pool) => pool.take(law, next, len),
        };
        numbers.cast(ops::working::<B>())
    }

    /// `x`, of as many rows or of one for all, plus the next numbers of each row, rounded once: in `shape`.
    ///
    /// # Panics
    /// Where `x` has any other number of rows.
    pub fn add<const D: usize>(&mut self, x: Tensor<B, D>, shape: [usize; D]) -> Tensor<B, D> {
        let len = shape.iter().product::<usize>() / self.rows.max(1);
        if len == 0 {
            return x.reshape(shape);
        }
        let given = x.shape().num_elements();
        assert!(
            given == len || given == self.rows * len,
            "noise of {} rows of {len} numbers falls on {:?}; a site gives a row for each, a parameter one for all",
            self.rows,
            x.dims()
        );
        match &self.by {
            #[cfg(any(feature = "cuda", feature = "wgpu"))]
            By::Kernel(table) => {
                let next = self.next as u32;
                self.next += len;
                table.add(self.law, next, x, shape)
            }
            By::Operations(_) => ops::add_rounded(x.reshape([given / len, len]), self.take(len)).reshape(shape),
        }
    }
}

/// Numbers made for several sites at once: a backend with fusion takes its time over every operation, however few numbers it is on.
struct Pool<B: Backend> {
    streams: Vec<Streams<B>>,
    /// Of sums of scores, how many there are; noise has none.
    groups: Option<usize>,
    device: B::Device,
    /// Made and not yet taken whole, and of it taken.
    made: Option<Tensor<B, 2>>,
    taken: usize,
    /// How many were made of each stream the last time.
    width: usize,
    /// How many will be taken, where that is known.
    total: usize,
}

impl<B: Backend> Pool<B> {
    /// Of rows of streams; where they are sums, these are made of at most `sums` rows at a time, as many for each, some with the factor 0.
    fn new(rows: &[Vec<(u64, f32)>], sums: Option<usize>, device: &B::Device) -> Self {
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
        Self { streams, groups, device, made: None, taken: 0, width: 0, total: usize::MAX }
    }

    /// The `len` numbers of each stream from the index `next` on, which follows what was taken before.
    fn take(&mut self, law: NoiseLaw, next: usize, len: usize) -> Tensor<B, 2> {
        let made = match self.made.take() {
            Some(made) if self.width - self.taken >= len => made,
            _ => {
                let rows = self.groups.unwrap_or(self.widest()).max(1);
                let left = self.total.saturating_sub(next);
                // twice as many each time: their number may not be known
                self.width = (2 * self.width).min(AT_ONCE / rows).min(left).max(len);
                self.taken = 0;
                self.make(law, next, self.width)
            }
        };
        let numbers = if len == self.width { made.clone() } else { made.clone().narrow(1, self.taken, len) };
        self.taken += len;
        self.made = (self.taken < self.width).then_some(made);
        numbers
    }

    /// Rows of the widest operation.
    fn widest(&self) -> usize {
        self.streams.iter().map(Streams::rows).max().unwrap_or(0)
    }

    fn make(&self, law: NoiseLaw, next: usize, width: usize) -> Tensor<B, 2> {
        if self.streams.is_empty() || width == 0 {
            let rows = self.groups.unwrap_or(self.widest());
            return Tensor::zeros([rows, width], (&self.device, DType::F32));
        }
        // sums are made of more numbers than they are
        let piece = if self.groups.is_some() { (AT_ONCE / self.widest().max(1)).clamp(1, width) } else { width };
        let pieces = (0..width).step_by(piece).map(|start| {
            let here = piece.min(width - start);
            let index = indices((next as u32).wrapping_add(start as u32), here, &self.device);
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
            let (name, then) = if second { (high, low) } else { (low, high) };
            hash(name + index.clone(), |x| x + then.clone())
        };
        let numbers = law.of(hash, self.groups.is_some()) * streams.factors.clone();
        match self.groups {
            None => numbers,
            Some(n) => numbers.reshape([n, streams.rows() / n, width]).sum_dim(1).reshape([n, width]),
        }
    }
}

/// Three rounds x ← x(2x + 1), the permutation that the RC6 cipher (Rivest and others 1998) takes its quadratic mixing from: without exclusive or
/// something must not be linear. Between them the upper half of the bits, which depend on all others, is added to the lower one, and behind the
/// first of them the second half of the name. The top bits are the best ones.
fn hash<B: Backend>(x: Tensor<B, 2, Int>, name: impl Fn(Tensor<B, 2, Int>) -> Tensor<B, 2, Int>) -> Tensor<B, 2, Int> {
    let round = |x: Tensor<B, 2, Int>| x.clone() * x.mul_scalar(2u32).add_scalar(1u32);
    let fold = |x: Tensor<B, 2, Int>| x.clone() + x.div_scalar(1u32 << 16);
    round(fold(round(name(fold(round(x))))))
}

/// What a hash says on its own: ±1.
fn signs<B: Backend>(hash: Tensor<B, 2, Int>) -> Tensor<B, 2> {
    let ones = Tensor::<B, 2>::full(hash.dims(), 1.0, (&hash.device(), DType::F32));
    ones.mask_fill(hash.lower_elem(1u32 << 31), -1.0)
}

/// The top 24 bits of a hash as a number in (0, 1].
fn unit<B: Backend>(hash: Tensor<B, 2, Int>) -> Tensor<B, 2> {
    (hash.div_scalar(1u32 << 8).cast(FloatDType::F32) + 0.5) * (1.0 / (1u32 << 24) as f32)
}

impl NoiseLaw {
    /// `len` draws of ε from the stream of `seed`, made by the device as it makes the noise of the estimators where it is not the host.
    ///
    /// # Shapes
    /// - returns: `[len]`, in single precision, or the backend's own where that is double
    ///
    /// # Example
    /// ```
    /// # use burn::{backend::Flex, tensor::Tensor};
    /// # use flops_core::NoiseLaw;
    /// let signs: Tensor<Flex, 1> = NoiseLaw::Rademacher.sample_on(7, 1000, &Default::default());
    /// assert_eq!(signs.abs().sum().into_scalar(), 1000.0);
    /// ```
    pub fn sample_on<B: Backend>(self, seed: u64, len: usize, device: &B::Device) -> Tensor<B, 1> {
        Numbers::new(self, &[vec![(derive(&[seed]), 1.0)]], None, device).take(len).squeeze_dim(0)
    }

    /// ε, or where `score` says so s(ε), from hashes.
    fn of<B: Backend>(self, hash: impl Fn(bool) -> Tensor<B, 2, Int>, score: bool) -> Tensor<B, 2> {
        match self {
            Self::Rademacher => signs(hash(false)),
            Self::Uniform => (unit(hash(false)) - 0.5) * (2.0 * 3f32.sqrt()),
            // Box and Muller
            Self::Gaussian => {
                let radius = (unit(hash(false)).log() * -2.0).sqrt();
                radius * (unit(hash(true)) * std::f32::consts::TAU).cos()
            }
            Self::Laplace if score => signs(hash(true)) * std::f32::consts::SQRT_2,
            Self::Laplace => unit(hash(false)).log() * -std::f32::consts::FRAC_1_SQRT_2 * signs(hash(true)),
        }
    }
}

impl NoiseSource {
    /// Whether the device makes the noise of a site of `len` numbers a row: where it makes any, and `prediction` has not to see this on the host.
    pub fn made_by_device(&self, len: usize, prediction: Option<&Prediction>) -> bool {
        self.on_device && !prediction.is_some_and(|p| p.looks_at(len))
    }

    /// What a site takes its numbers from: those `kept` for all sites, which take theirs in turn, or where a direction falls on one site alone, its own.
    pub fn numbers<'a, B: Backend>(
        &self,
        kept: &'a mut Option<Numbers<B>>,
        make: impl FnOnce() -> Numbers<B>,
    ) -> &'a mut Numbers<B> {
        if self.sites.is_some() {
            *kept = None;
        }
        kept.get_or_insert_with(make)
    }

    /// The stream of a direction, at every site.
    fn name(&self, position: u64, direction: u64) -> u64 {
        derive(&[self.seed, self.step, position, direction])
    }

    /// σ·ε of rows, or 0 where a row is not perturbed at `site`.
    pub fn of_rows<B: Backend>(&self, site: usize, rows: &[RowKey], device: &B::Device) -> Numbers<B> {
        let name = |row: &RowKey| match self.signed(site, row) {
            Some((direction, sign)) => vec![(self.name(row.position, direction), sign * self.sigma as f32)],
            None => vec![(0, 0.0)],
        };
        Numbers::new(self.law, &rows.iter().map(name).collect::<Vec<_>>(), None, device)
    }

    /// Σ weight·s(ε) over the rows of each group that reach `site`, made of at most `max_rows` rows at a time, as many for each group, some of
    /// weight 0.
    pub fn of_groups<B: Backend>(
        &self,
        site: usize,
        groups: &[std::ops::Range<usize>],
        rows: &[RowKey],
        weights: &[f64],
        max_rows: usize,
        device: &B::Device,
    ) -> Numbers<B> {
        let of_group = |group: &std::ops::Range<usize>| {
            let directions = self.directions(site, group.clone(), rows, weights);
            directions.into_iter().map(|(p, d, w)| (self.name(p, d), w as f32)).collect::<Vec<_>>()
        };
        Numbers::new(self.law, &groups.iter().map(of_group).collect::<Vec<_>>(), Some(max_rows), device)
    }
}

/// Lets tests make noise on backends of the host as devices do.
#[cfg(test)]
pub(crate) mod forced {
    use std::cell::Cell;

    thread_local! {
        static FORCED: Cell<bool> = const { Cell::new(false) };
    }

    pub fn get() -> bool {
        FORCED.get()
    }

    /// Runs `work` with noise of the device.
    pub fn on<T>(work: impl FnOnce() -> T) -> T {
        struct Reset(bool);
        impl Drop for Reset {
            fn drop(&mut self) {
                FORCED.set(self.0);
            }
        }
        let _reset = Reset(FORCED.replace(true));
        work()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::tests::{obey, rows, source};
    use crate::noise::{SHARED, Sampling};
    use crate::probe::QueryRows;
    use burn::backend::Flex;

    fn values<const D: usize>(x: Tensor<Flex, D>) -> Vec<f64> {
        x.into_data().iter::<f64>().collect()
    }

    fn noise(source: &NoiseSource, rows: &[RowKey], len: usize) -> Vec<f64> {
        values(source.of_rows::<Flex>(0, rows, &Default::default()).take(len))
    }

    fn scores(
        source: &NoiseSource,
        groups: &[std::ops::Range<usize>],
        rows: &[RowKey],
        weights: &[f64],
        len: usize,
        max_rows: usize,
    ) -> Vec<f64> {
        values(source.of_groups::<Flex>(0, groups, rows, weights, max_rows, &Default::default()).take(len))
    }

    /// The halves of 64 bits.
    fn halves(name: u64) -> [u32; 2] {
        [name as u32, (name >> 32) as u32]
    }

    /// The hash in the arithmetic of this processor.
    fn hash_of(i: u32, [low, high]: [u32; 2]) -> u32 {
        let round = |x: u32| x.wrapping_mul(x.wrapping_mul(2).wrapping_add(1));
        let fold = |x: u32| x.wrapping_add(x >> 16);
        let x = round(i.wrapping_mul(SPREAD).wrapping_add(low));
        round(fold(round(fold(x).wrapping_add(high))))
    }

    #[test]
    fn a_backend_s_integers_are_those_of_32_bits() {
        let source = source(NoiseLaw::Rademacher, Sampling::OneSided);
        let words = halves(source.name(7, 3));
        let expected: Vec<f64> = (0..5000).map(|i| if hash_of(i, words) >> 31 == 1 { 1.0 } else { -1.0 }).collect();
        assert_eq!(noise(&source, &[RowKey { position: 7, query: 3 }], 5000), expected);
        let none: Tensor<Flex, 1> = NoiseLaw::Rademacher.sample_on(1, 0, &Default::default());
        assert_eq!(none.dims(), [0]);
    }

    /// Of 2²⁰ signs of each of 30 streams the mean, and the mean products with those 1, 2, 64 and 128 later, with the next stream's and with those
    /// of its own second hash. One beyond 5/√n, n = 2²⁰, has a probability of 6·10⁻⁷; there are 210 of them.
    #[test]
    fn numbers_and_streams_are_uncorrelated() {
        let n = 1 << 20;
        let signs = |words| (0..n).map(|i| if hash_of(i, words) >> 31 == 1 { 1i64 } else { -1 }).collect::<Vec<_>>();
        let stream = |s: u64| signs(halves(derive(&[s])));
        let second = |s: u64| {
            let [low, high] = halves(derive(&[s]));
            signs([high, low])
        };
        let small = |sum: i64, what: &str| assert!((sum as f64).abs() < 5.0 * f64::from(n).sqrt(), "{what}: {sum}");
        let mut last = stream(1000);
        for s in 0..30 {
            let here = stream(s);
            small(here.iter().sum(), "mean");
            small(here.iter().zip(&last).map(|(a, b)| a * b).sum(), "the next stream");
            small(here.iter().zip(&second(s)).map(|(a, b)| a * b).sum(), "the second hash");
            for lag in [1, 2, 64, 128] {
                small(here.iter().zip(&here[lag..]).map(|(a, b)| a * b).sum(), &format!("lag {lag}"));
            }
            last = here;
        }
    }

    #[test]
    fn laws_have_their_moments_and_scores_satisfy_steins_identity() {
        for law in NoiseLaw::ALL {
            let src = source(law, Sampling::OneSided);
            let keys = rows(400, 1);
            let groups: Vec<_> = (0..400).map(|i| i..i + 1).collect();
            obey(law, &noise(&src, &keys, 500), &scores(&src, &groups, &keys, &[1.0; 400], 500, 1000));
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_neighbours_and_halves_are_opposite() {
        for law in NoiseLaw::ALL {
            for sampling in [Sampling::OneSided, Sampling::Antithetic] {
                let src = source(law, sampling);
                let all = rows(3, 4);
                let together = noise(&src, &all, 70);
                for (r, row) in all.iter().enumerate() {
                    assert_eq!(noise(&src, &[*row], 70), together[r * 70..(r + 1) * 70]);
                }
                let row = |r: usize| &together[r * 70..(r + 1) * 70];
                let opposite = row(0).iter().zip(row(1)).all(|(a, b)| *a == -*b);
                assert_eq!(opposite, sampling == Sampling::Antithetic);
                assert_ne!(row(0), row(2));
                assert_ne!(row(0), row(4));
                let mut other = src.clone();
                other.step += 1;
                assert_ne!(noise(&other, &all, 70), together);
            }
        }
    }

    /// Sums over groups of unequal size, in slabs of any width, against the noise of the rows themselves.
    #[test]
    fn scores_are_sums_over_the_rows_of_each_group() {
        let (law, len) = (NoiseLaw::Gaussian, 33);
        let sizes = [3usize, 1, 4, 2];
        for sampling in [Sampling::OneSided, Sampling::Antithetic] {
            let src = source(law, sampling);
            let QueryRows { groups, keys, .. } = QueryRows::new(&[0, 1, 2, 3], sizes.map(|size| 0..size));
            let weights: Vec<f64> = (0..keys.len()).map(|i| (i as f64 * 0.7).sin()).collect();
            let each = noise(&src, &keys, len);
            for max_rows in [2, 8, 12, 100] {
                let sums = scores(&src, &groups, &keys, &weights, len, max_rows);
                for (g, group) in groups.iter().enumerate() {
                    for i in 0..len {
                        let expected: f64 = group.clone().map(|r| weights[r] * each[r * len + i]).sum();
                        assert!((sums[g * len + i] - expected).abs() < 1e-5, "{sampling:?}, at most {max_rows} rows");
                    }
                }
            }
            assert!(scores(&src, &groups, &keys, &[0.0; 10], len, 5).iter().all(|&s| s == 0.0));
        }
    }

    /// However they are split over sites, the numbers are those of one; of different lengths they are made several times.
    #[test]
    fn sites_take_their_numbers_in_turn() {
        let src = source(NoiseLaw::Gaussian, Sampling::OneSided);
        let keys = rows(2, 3);
        let all = noise(&src, &keys, 200);
        let mut numbers = src.of_rows::<Flex>(0, &keys, &Default::default());
        let mut start = 0;
        for len in [7, 3, 90, 1, 60, 39] {
            let here = values(numbers.take(len));
            for r in 0..keys.len() {
                assert_eq!(here[r * len..(r + 1) * len], all[r * 200 + start..][..len]);
            }
            start += len;
        }
    }

    /// Sums of more numbers than one operation is on, against the noise of each query.
    #[test]
    fn sums_are_made_in_pieces() {
        let (queries, len) = (1000, AT_ONCE / 1000 + 100);
        let source = source(NoiseLaw::Rademacher, Sampling::OneSided);
        let keys: Vec<RowKey> = (0..queries).map(|query| RowKey { position: SHARED, query }).collect();
        let weights: Vec<f64> = (0..queries).map(|q| if q % 9 == 0 { (q as f64).sin() } else { 1e-9 }).collect();
        let sums = scores(&source, std::slice::from_ref(&(0..queries)), &keys, &weights, len, queries);
        let mut expected = vec![0.0; len];
        for (key, weight) in keys.iter().zip(&weights).filter(|(_, weight)| **weight != 1e-9) {
            expected.iter_mut().zip(noise(&source, &[*key], len)).for_each(|(sum, e)| *sum += weight * e);
        }
        assert_eq!(sums.len(), len);
        let worst = expected.iter().zip(&sums).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst < 1e-3, "off by {worst}");
    }
}
