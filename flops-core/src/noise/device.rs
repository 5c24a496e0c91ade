//! Noise generated on a GPU, where the tensors are.
//!
//! On the host a stream is a generator that runs from its start. A GPU generates all values of a
//! stream at once: value i is a hash of i and of the stream's 64-bit id. A kernel does this where
//! the backend has one (`cubecl.rs`), and Burn's operations do it elsewhere (`counter.rs`). The
//! sites of a pass consume the values of a stream in order.
//!
//! Hashes count in 32 bits. A stream is therefore a chain of segments of 2³² values, and each
//! segment after the first has an id of its own, derived from the stream's. The parameters of a
//! model of any size take their noise from one stream without repeating it.
//!
//! Laws are those of the host, and values do not depend on the chunks either. The values themselves
//! differ. The key of a stream leaves out the site: sites consume one stream in order.

use std::ops::Range;

use burn::prelude::*;

use super::counter::HashedNoise;
use super::law::NoiseLaw;
use super::source::{NoiseSource, RowKey};
use crate::ops;
use crate::random::derive_seed;

/// Whether noise is generated on this device instead of on the host.
pub(crate) fn makes_noise<B: Backend>(device: &B::Device) -> bool {
    #[cfg(test)]
    if forced::get() {
        return true;
    }
    ops::is_gpu::<B>(device)
}

/// Values of a segment, the part of a stream that one id names.
const SEGMENT: u64 = 1 << 32;

/// Noise of some rows, or sums of scores, that sites consume in order.
pub(crate) struct DeviceNoise<B: Backend> {
    law: NoiseLaw,
    /// The streams of each row, as (id, factor).
    rows: Vec<Vec<(u64, f32)>>,
    /// For sums of scores, the most streams that are generated at a time.
    sums: Option<usize>,
    device: B::Device,
    /// Position of the next value of every stream.
    next: u64,
    /// Position behind the last value that will be consumed, where known.
    end: u64,
    /// The segment that the generator makes.
    segment: u64,
    generator: Generator<B>,
}

/// How the values of a segment are generated.
enum Generator<B: Backend> {
    /// By a kernel, where the backend has one.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    Kernel(super::cubecl::Table<B>),
    /// By Burn's operations.
    Operations(HashedNoise<B>),
}

impl<B: Backend> Generator<B> {
    fn new(rows: &[Vec<(u64, f32)>], sums: Option<usize>, device: &B::Device) -> Self {
        #[cfg(any(feature = "cuda", feature = "wgpu"))]
        if let Some(table) = super::cubecl::Table::new(rows, sums.is_some(), device) {
            return Self::Kernel(table);
        }
        Self::Operations(HashedNoise::new(rows, sums, device))
    }

    /// Announces that `total` values of the segment will be consumed in all.
    fn set_total(&mut self, total: u64) {
        match self {
            #[cfg(any(feature = "cuda", feature = "wgpu"))]
            Self::Kernel(_) => {}
            Self::Operations(noise) => noise.set_total(total),
        }
    }
}

impl<B: Backend> DeviceNoise<B> {
    /// Noise or scores of `rows`; a row lists its streams, each as (id, factor).
    ///
    /// Without `sums`, a row has one stream and is its noise times the factor. With it, a row is
    /// the sum of its streams' scores times their factors. At most `sums` streams are generated at
    /// a time.
    fn new(law: NoiseLaw, rows: Vec<Vec<(u64, f32)>>, sums: Option<usize>, device: &B::Device) -> Self {
        let mut generator = Generator::new(&rows, sums, device);
        generator.set_total(SEGMENT);
        Self { law, rows, sums, device: device.clone(), next: 0, end: u64::MAX, segment: 0, generator }
    }

    /// Announces that `total` values of each row will be consumed in all.
    #[must_use]
    pub fn with_total(mut self, total: usize) -> Self {
        self.end = total as u64;
        self.generator.set_total(self.end.min(SEGMENT));
        self
    }

    /// Returns the next `len` values of each row, as `[rows, len]`.
    pub fn take(&mut self, len: usize) -> Tensor<B, 2> {
        let (law, mut left, mut parts) = (self.law, len, Vec::with_capacity(1));
        while left > 0 || parts.is_empty() {
            let (first, here) = self.within_segment(left);
            parts.push(match &mut self.generator {
                #[cfg(any(feature = "cuda", feature = "wgpu"))]
                Generator::Kernel(table) => table.take(law, first, here),
                Generator::Operations(noise) => noise.take(law, first, here),
            });
            self.next += here as u64;
            left -= here;
        }
        let values = if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(parts, 1) };
        values.cast(ops::accum_dtype::<B>())
    }

    /// Turns to the segment of the next value.
    ///
    /// Returns the place of that value in the segment, and how many of the next `len` values the
    /// segment holds.
    fn within_segment(&mut self, len: usize) -> (u32, usize) {
        let (segment, first) = (self.next / SEGMENT, self.next % SEGMENT);
        if self.segment != segment {
            self.segment = segment;
            let named =
                |&(id, factor): &(u64, f32)| (if segment == 0 { id } else { derive_seed(&[id, segment]) }, factor);
            let rows: Vec<Vec<_>> = self.rows.iter().map(|row| row.iter().map(named).collect()).collect();
            self.generator = Generator::new(&rows, self.sums, &self.device);
            self.generator.set_total(self.end.saturating_sub(segment * SEGMENT).min(SEGMENT));
        }
        (first as u32, (len as u64).min(SEGMENT - first) as usize)
    }

    /// Adds the next values of each row to `x`, rounds once, and returns the sum in `shape`.
    ///
    /// # Shapes
    /// - x: `[rows or 1, …]`, a single row being shared by all
    ///
    /// # Panics
    /// Where `x` has any other number of rows.
    pub fn add<const D: usize>(&mut self, x: Tensor<B, D>, shape: [usize; D]) -> Tensor<B, D> {
        let rows = self.rows.len();
        let len = shape.iter().product::<usize>() / rows.max(1);
        if len == 0 {
            return x.reshape(shape);
        }
        let given = x.shape().num_elements();
        assert!(
            given == len || given == rows * len,
            "noise of {rows} rows of {len} values cannot be added to {:?}: a site has a row for each, a \
             parameter one for all",
            x.dims()
        );
        if self.within_segment(len).1 == len {
            return self.add_within_segment(x, given / len, shape);
        }
        let (x, mut start, mut parts) = (x.reshape([given / len, len]), 0, vec![]);
        while start < len {
            let here = self.within_segment(len - start).1;
            let columns = x.clone().narrow(1, start, here);
            parts.push(self.add_within_segment(columns, given / len, [rows, here]));
            start += here;
        }
        Tensor::cat(parts, 1).reshape(shape)
    }

    /// [`add`](Self::add) to `given` rows, for values that lie in one segment.
    fn add_within_segment<const D: usize>(&mut self, x: Tensor<B, D>, given: usize, shape: [usize; D]) -> Tensor<B, D> {
        let len = x.shape().num_elements() / given;
        match &self.generator {
            #[cfg(any(feature = "cuda", feature = "wgpu"))]
            Generator::Kernel(table) => {
                let first = (self.next % SEGMENT) as u32;
                self.next += len as u64;
                table.add(self.law, first, x, shape)
            }
            Generator::Operations(_) => ops::add_rounded(x.reshape([given, len]), self.take(len)).reshape(shape),
        }
    }

    /// Skips to a position of the streams.
    #[cfg(test)]
    pub fn starting_at(mut self, next: u64) -> Self {
        self.next = next;
        self
    }
}

impl NoiseLaw {
    /// Returns `len` draws of ε from the stream of `seed`, generated on the device.
    ///
    /// The estimators generate noise on a GPU in the same way.
    ///
    /// # Shapes
    /// - returns: `[len]`, in single precision, or double where that is the backend's own
    ///
    /// # Example
    /// ```
    /// # use burn::{backend::Flex, tensor::Tensor};
    /// # use flops_core::NoiseLaw;
    /// let signs: Tensor<Flex, 1> = NoiseLaw::Rademacher.sample_on(7, 1000, &Default::default());
    /// assert_eq!(signs.abs().sum().into_scalar(), 1000.0);
    /// ```
    pub fn sample_on<B: Backend>(self, seed: u64, len: usize, device: &B::Device) -> Tensor<B, 1> {
        DeviceNoise::new(self, vec![vec![(derive_seed(&[seed]), 1.0)]], None, device).take(len).squeeze_dim(0)
    }
}

impl NoiseSource {
    /// Returns the shared buffer that sites consume in order.
    ///
    /// Where a direction falls on a single site, each site gets a new buffer of its own.
    pub fn site_buffer<'a, B: Backend>(
        &self,
        buffer: &'a mut Option<DeviceNoise<B>>,
        make: impl FnOnce() -> DeviceNoise<B>,
    ) -> &'a mut DeviceNoise<B> {
        if self.sites.is_some() {
            *buffer = None;
        }
        buffer.get_or_insert_with(make)
    }

    /// Returns the id of a direction's stream, which all sites share.
    fn stream_id(&self, position: u64, direction: u64) -> u64 {
        derive_seed(&[self.seed, self.step, position, direction])
    }

    /// Noise σ·ε of rows, or 0 where a row is not perturbed at `site`.
    pub fn device_noise<B: Backend>(&self, site: usize, rows: &[RowKey], device: &B::Device) -> DeviceNoise<B> {
        let streams = |row: &RowKey| match self.signed(site, row) {
            Some((direction, sign)) => vec![(self.stream_id(row.position, direction), sign * self.sigma as f32)],
            None => vec![(0, 0.0)],
        };
        DeviceNoise::new(self.law, rows.iter().map(streams).collect(), None, device)
    }

    /// Sums Σ weight·s(ε) over the rows of each group that are perturbed at `site`.
    ///
    /// At most `max_rows` rows are generated at a time, equally many for each group; short groups
    /// are padded with rows of weight 0.
    pub fn device_scores<B: Backend>(
        &self,
        site: usize,
        groups: &[Range<usize>],
        rows: &[RowKey],
        weights: &[f64],
        max_rows: usize,
        device: &B::Device,
    ) -> DeviceNoise<B> {
        let streams = |group: &Range<usize>| {
            let directions = self.directions(site, group.clone(), rows, weights);
            directions.into_iter().map(|(p, d, w)| (self.stream_id(p, d), w as f32)).collect::<Vec<_>>()
        };
        DeviceNoise::new(self.law, groups.iter().map(streams).collect(), Some(max_rows), device)
    }
}

/// Lets tests generate noise on host backends as on a GPU.
#[cfg(test)]
pub(crate) mod forced {
    use std::cell::Cell;

    thread_local! {
        static FORCED: Cell<bool> = const { Cell::new(false) };
    }

    pub fn get() -> bool {
        FORCED.get()
    }

    /// Runs `work` with noise generated on the device.
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
    use crate::noise::counter::AT_ONCE;
    use crate::noise::hash::{halves, hash_of};
    use crate::noise::source::tests::{obey, rows, source};
    use crate::noise::{SHARED, Sampling};
    use crate::probe::QueryRows;
    use burn::backend::Flex;

    fn values<const D: usize>(x: Tensor<Flex, D>) -> Vec<f64> {
        x.into_data().iter::<f64>().collect()
    }

    fn noise(source: &NoiseSource, rows: &[RowKey], len: usize) -> Vec<f64> {
        values(source.device_noise::<Flex>(0, rows, &Default::default()).take(len))
    }

    fn scores(
        source: &NoiseSource,
        groups: &[Range<usize>],
        rows: &[RowKey],
        weights: &[f64],
        len: usize,
        max_rows: usize,
    ) -> Vec<f64> {
        values(source.device_scores::<Flex>(0, groups, rows, weights, max_rows, &Default::default()).take(len))
    }

    /// The tests that compare noise of the device with the host's would else compare the host's alone.
    #[test]
    fn noise_is_made_on_a_host_backend_where_a_test_asks_for_it() {
        let made = || makes_noise::<Flex>(&Default::default());
        assert_eq!((made(), forced::on(made), made()), (false, true, false));
    }

    #[test]
    fn integers_of_a_backend_wrap_at_32_bits() {
        let source = source(NoiseLaw::Rademacher, Sampling::OneSided);
        let words = halves(source.stream_id(7, 3));
        let expected: Vec<f64> = (0..5000).map(|i| if hash_of(i, words) >> 31 == 1 { 1.0 } else { -1.0 }).collect();
        assert_eq!(noise(&source, &[RowKey { position: 7, query: 3 }], 5000), expected);
        let none: Tensor<Flex, 1> = NoiseLaw::Rademacher.sample_on(1, 0, &Default::default());
        assert_eq!(none.dims(), [0]);
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

    /// Sums over groups of unequal size, for several slab widths, against the noise of the rows.
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

    /// Values do not depend on how they are split over sites; these lengths need several refills.
    #[test]
    fn sites_consume_their_values_in_order() {
        let src = source(NoiseLaw::Gaussian, Sampling::OneSided);
        let keys = rows(2, 3);
        let all = noise(&src, &keys, 200);
        let mut buffer = src.device_noise::<Flex>(0, &keys, &Default::default());
        let mut start = 0;
        for len in [7, 3, 90, 1, 60, 39] {
            let here = values(buffer.take(len));
            for r in 0..keys.len() {
                assert_eq!(here[r * len..(r + 1) * len], all[r * 200 + start..][..len]);
            }
            start += len;
        }
    }

    /// The values of a stream at 2³² and beyond are others than those at its start.
    #[test]
    fn streams_do_not_repeat_after_32_bits() {
        let source = source(NoiseLaw::Rademacher, Sampling::OneSided);
        let key = RowKey { position: 7, query: 3 };
        let at = |next| values(source.device_noise::<Flex>(0, &[key], &Default::default()).starting_at(next).take(200));
        let starts = [0, SEGMENT, 2 * SEGMENT, SEGMENT << 20];
        let signs = starts.map(at);
        for (s, here) in signs.iter().enumerate() {
            let id = source.stream_id(7, 3);
            let words = halves(if s == 0 { id } else { derive_seed(&[id, starts[s] / SEGMENT]) });
            let expected = (0..200).map(|i| if hash_of(i, words) >> 31 == 1 { 1.0 } else { -1.0 });
            assert!(expected.eq(here.iter().copied()), "segment {s}");
            for other in &signs[..s] {
                // 200 fair coins agree this often with probability below 10⁻⁷
                let equal = here.iter().zip(other).filter(|(a, b)| a == b).count();
                assert!(equal < 140, "{equal} of 200 signs repeat");
            }
        }
        assert_eq!(at(SEGMENT - 1)[1..], signs[1][..199]);
    }

    /// Noise, sums of scores and noise that is added are the same in one piece and in several.
    #[test]
    fn takes_across_a_segment_are_those_of_separate_ones() {
        let (start, len) = (SEGMENT - 40, 100);
        for law in NoiseLaw::ALL {
            let src = source(law, Sampling::Antithetic);
            let (keys, device) = (rows(2, 3), Default::default());
            let groups = [0..3, 3..6];
            let weights: Vec<f64> = (0..6).map(|i| (i as f64 * 0.7).sin()).collect();
            let noise = || src.device_noise::<Flex>(0, &keys, &device).starting_at(start);
            let scores = || src.device_scores::<Flex>(0, &groups, &keys, &weights, 2, &device).starting_at(start);
            for make in [&noise as &dyn Fn() -> DeviceNoise<Flex>, &scores] {
                let whole = make().take(len);
                for lens in [&[40, 60][..], &[7, 32, 2, 59], &[99, 1]] {
                    let mut pieces = make().with_total(usize::MAX);
                    let pieces = lens.iter().map(|&len| pieces.take(len)).collect();
                    assert_eq!(values(Tensor::cat(pieces, 1)), values(whole.clone()), "{law} {lens:?}");
                }
            }
            for given in [1, keys.len()] {
                let x = Tensor::<Flex, 2>::ones([given, len], &device).reshape([given, 4, 25]);
                let sum = values(noise().add(x, [keys.len(), 4, 25]));
                assert_eq!(sum, values(noise().take(len) + 1.0), "{law}");
            }
        }
    }

    /// Sums of more values than one operation handles, against the noise of each query.
    #[test]
    fn large_sums_are_made_in_pieces() {
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
