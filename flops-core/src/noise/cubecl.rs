//! Noise on a GPU in one kernel, for Burn's CUDA and wgpu backends, with and without fusion.
//!
//! Each value, or sum of scores, is computed where it is written, without intermediate tensors.
//! Values match those of the operations in `counter.rs`, which every other backend runs.

use std::any::Any;
use std::marker::PhantomData;

use burn::prelude::*;
use burn::tensor::ops::{FloatTensor, IntTensor};
use burn::tensor::{DType, TensorData, TensorPrimitive, bf16, f16};
use burn_cubecl::cubecl::ir::AddressType;
use burn_cubecl::cubecl::{CubeDim, calculate_cube_count_elemwise};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};
use burn_fusion::stream::{Operation, OperationStreams};
use burn_fusion::{Fusion, FusionBackend, FusionRuntime};
use burn_ir::{CustomOpIr, HandleContainer, OperationIr, OperationOutput, TensorIr};

use super::law::NoiseLaw;

/// What a launch computes: `width` values of each row from index `first` of a segment on.
#[derive(Clone, Copy, Debug)]
struct Request {
    law: NoiseLaw,
    score: bool,
    streams: usize,
    first: u32,
    width: usize,
}

/// A backend that runs the kernel.
trait Kernels: Backend {
    /// Returns the values of a table, laid out as in [`Table`], or their sum with `x`.
    ///
    /// Without `x` the result is in single precision. With `x` it has the precision of `x`, rounded
    /// once.
    ///
    /// # Shapes
    /// - x: `[rows or 1, …]`
    /// - returns: `shape`, `[rows, …]`, `width` values per row
    fn noise(x: Option<FloatTensor<Self>>, table: IntTensor<Self>, shape: Shape, request: Request)
    -> FloatTensor<Self>;
}

/// Ids of streams, their factors, and the streams that each row sums.
pub(super) struct Table<B: Backend> {
    /// Low words of the ids, high words, bits of the factors; then the first stream of each row,
    /// and the number of streams.
    words: Tensor<B, 1, Int>,
    streams: usize,
    rows: usize,
    /// Whether rows are sums of scores instead of noise.
    score: bool,
}

impl<B: Backend> Table<B> {
    /// A table of the streams, as (id, factor), that each row sums; `None` where the backend has no
    /// kernel.
    pub fn new(rows: &[Vec<(u64, f32)>], score: bool, device: &B::Device) -> Option<Self> {
        if !runs::<B>() {
            return None;
        }
        let streams: Vec<_> = rows.iter().flatten().collect();
        let mut starts = vec![0u32];
        rows.iter().for_each(|row| starts.push(starts[starts.len() - 1] + row.len() as u32));
        let halves = streams.iter().map(|(id, _)| *id as u32).chain(streams.iter().map(|(id, _)| (id >> 32) as u32));
        let words: Vec<u32> = halves.chain(streams.iter().map(|(_, factor)| factor.to_bits())).chain(starts).collect();
        let shape = [words.len()];
        let words = Tensor::from_data(TensorData::new(words, shape), (device, DType::U32));
        Some(Self { words, streams: streams.len(), rows: rows.len(), score })
    }

    /// Returns `width` values of each row from index `first` on, as `[rows, width]`.
    pub fn take(&self, law: NoiseLaw, first: u32, width: usize) -> Tensor<B, 2> {
        if self.rows * width == 0 {
            return Tensor::zeros([self.rows, width], (&self.words.device(), DType::F32));
        }
        dispatch(None, &self.words, [self.rows, width], self.request(law, first, width))
    }

    /// Adds the values of each row from index `first` on to `x`, and rounds once.
    ///
    /// # Shapes
    /// - x: `[rows or 1, …]`
    /// - returns: `shape`, `[rows, …]`
    ///
    /// # Panics
    /// Where `x` is on another device.
    pub fn add<const D: usize>(&self, law: NoiseLaw, first: u32, x: Tensor<B, D>, shape: [usize; D]) -> Tensor<B, D> {
        assert_eq!(x.device(), self.words.device(), "the noise and the tensor it is added to must be on one device");
        let width = shape.iter().product::<usize>() / self.rows;
        dispatch(Some(x), &self.words, shape, self.request(law, first, width))
    }

    fn request(&self, law: NoiseLaw, first: u32, width: usize) -> Request {
        Request { law, score: self.score, streams: self.streams, first, width }
    }
}

/// Calls `$what::<B, K>($arguments)` with every backend K that has the kernel, until one returns
/// `Some`.
macro_rules! any_backend {
    ($what:ident::<$b:ident $(, $d:ident)?>($($argument:expr),*)) => {{
        let found = None;
        #[cfg(feature = "cuda")]
        let found = found
            .or_else(|| $what::<$b, burn::backend::Cuda<f32> $(, $d)?>($($argument),*))
            .or_else(|| $what::<$b, burn::backend::Cuda<f16> $(, $d)?>($($argument),*))
            .or_else(|| $what::<$b, burn::backend::Cuda<bf16> $(, $d)?>($($argument),*));
        #[cfg(feature = "wgpu")]
        let found = found
            .or_else(|| $what::<$b, burn::backend::Wgpu<f32> $(, $d)?>($($argument),*))
            .or_else(|| $what::<$b, burn::backend::Wgpu<f16> $(, $d)?>($($argument),*))
            .or_else(|| $what::<$b, burn::backend::Wgpu<bf16> $(, $d)?>($($argument),*))
            // Burn's Vulkan and Metal store booleans as u8
            .or_else(|| $what::<$b, burn::backend::Wgpu<f32, i32, u8> $(, $d)?>($($argument),*))
            .or_else(|| $what::<$b, burn::backend::Wgpu<f16, i32, u8> $(, $d)?>($($argument),*))
            .or_else(|| $what::<$b, burn::backend::Wgpu<bf16, i32, u8> $(, $d)?>($($argument),*));
        found
    }};
}

pub(super) use any_backend;

/// Whether the kernel runs on the backend.
fn runs<B: Backend>() -> bool {
    fn same<B: Backend, K: Kernels>() -> Option<()> {
        (std::any::TypeId::of::<B>() == std::any::TypeId::of::<K>()).then_some(())
    }
    any_backend!(same::<B>()).is_some()
}

/// Returns the requested values, added to `x` where it is given, in `shape`.
///
/// # Panics
/// Where the kernel does not run on the backend.
fn dispatch<B: Backend, const D: usize>(
    mut x: Option<Tensor<B, D>>,
    words: &Tensor<B, 1, Int>,
    shape: [usize; D],
    request: Request,
) -> Tensor<B, D> {
    fn on<B: Backend, K: Kernels, const D: usize>(
        x: &mut Option<Tensor<B, D>>,
        words: &Tensor<B, 1, Int>,
        shape: [usize; D],
        request: Request,
    ) -> Option<Tensor<B, D>> {
        let words = (words as &dyn Any).downcast_ref::<Tensor<K, 1, Int>>()?.clone().into_primitive();
        let x = (x as &mut dyn Any).downcast_mut::<Option<Tensor<K, D>>>()?.take();
        let values = K::noise(x.map(|x| x.into_primitive().tensor()), words, Shape::from(shape), request);
        let mut values = Some(Tensor::<K, D>::from_primitive(TensorPrimitive::Float(values)));
        (&mut values as &mut dyn Any).downcast_mut::<Option<Tensor<B, D>>>()?.take()
    }
    any_backend!(on::<B, D>(&mut x, words, shape, request)).expect("a table exists only where the kernel runs")
}

impl<R: CubeRuntime, F: FloatElement, I: IntElement, T: BoolElement> Kernels for CubeBackend<R, F, I, T> {
    fn noise(
        x: Option<FloatTensor<Self>>,
        table: IntTensor<Self>,
        shape: Shape,
        request: Request,
    ) -> FloatTensor<Self> {
        let Request { law, score, streams, first, width } = request;
        let (client, x) = (table.client.clone(), x.map(into_contiguous));
        let dtype = x.as_ref().map_or(DType::F32, |x| x.dtype);
        let out = empty_device_contiguous_dtype(client.clone(), table.device.clone(), shape, dtype);
        let n = out.meta.num_elements();
        let dim = CubeDim::new(&client, n);
        let count = calculate_cube_count_elemwise(&client, n, dim);
        let of_x = x.as_ref().map_or(AddressType::default(), CubeTensor::required_address_type);
        let address = table.required_address_type().max(out.required_address_type()).max(of_x);
        let (from, to) = (table.into_array_arg(), out.clone().into_array_arg());
        match x {
            None => cube::fill::launch::<R>(&client, count, dim, address, from, to, streams, first, width, law, score),
            Some(x) => {
                let (x, dtype) = (x.into_array_arg(), dtype.into());
                cube::perturbed::launch::<R>(
                    &client, count, dim, address, x, from, to, streams, first, width, law, dtype,
                );
            }
        }
        out
    }
}

/// The kernel as a custom operation in fusion's queue.
impl<K: FusionBackend + Kernels> Kernels for Fusion<K> {
    fn noise(
        x: Option<FloatTensor<Self>>,
        table: IntTensor<Self>,
        shape: Shape,
        request: Request,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Deferred<K> {
            ir: CustomOpIr,
            request: Request,
            backend: PhantomData<K>,
        }

        impl<K: FusionBackend + Kernels> Operation<K::FusionRuntime> for Deferred<K> {
            fn execute(&self, handles: &mut HandleContainer<<K::FusionRuntime as FusionRuntime>::FusionHandle>) {
                let ([table, x @ ..], [out]) = (&self.ir.inputs[..], &self.ir.outputs[..]) else {
                    unreachable!("the operation has a table as input and one output")
                };
                let table = handles.get_int_tensor::<K>(table);
                let x = x.first().map(|x| handles.get_float_tensor::<K>(x));
                handles.register_float_tensor::<K>(&out.id, K::noise(x, table, out.shape.clone(), self.request));
            }
        }

        let client = table.client.clone();
        let streams = OperationStreams::with_inputs(std::iter::once(&table).chain(&x));
        let dtype = x.as_ref().map_or(DType::F32, |x| x.dtype);
        let out = TensorIr::uninit(client.create_empty_handle(), shape, dtype);
        let inputs: Vec<_> = std::iter::once(table).chain(x).map(|tensor| tensor.into_ir()).collect();
        let ir = CustomOpIr::new("flops_noise", &inputs, &[out]);
        let operation = Deferred::<K> { ir: ir.clone(), request, backend: PhantomData };
        client.register(streams, OperationIr::Custom(ir), operation).output()
    }
}

/// The kernels: each unit computes one value.
mod cube {
    use burn_cubecl::cubecl::{self, prelude::*};

    use crate::noise::hash::INDEX_FACTOR;
    use crate::noise::law::NoiseLaw;

    #[cube(launch, address_type = "dynamic")]
    pub fn fill(
        table: &Array<u32>,
        out: &mut Array<f32>,
        streams: usize,
        first: u32,
        width: usize,
        #[comptime] law: NoiseLaw,
        #[comptime] score: bool,
    ) {
        if ABSOLUTE_POS >= out.len() {
            terminate!();
        }
        out[ABSOLUTE_POS] = sum(table, ABSOLUTE_POS, streams, first, width, law, score);
    }

    /// Adds noise to values of any precision; a single row of `x` is shared by all rows.
    #[cube(launch, address_type = "dynamic")]
    pub fn perturbed<F: Float>(
        x: &Array<F>,
        table: &Array<u32>,
        out: &mut Array<F>,
        streams: usize,
        first: u32,
        width: usize,
        #[comptime] law: NoiseLaw,
        #[define(F)] _dtype: StorageType,
    ) {
        if ABSOLUTE_POS >= out.len() {
            terminate!();
        }
        let noise = sum(table, ABSOLUTE_POS, streams, first, width, law, false);
        out[ABSOLUTE_POS] = F::cast_from(f32::cast_from(x[ABSOLUTE_POS % x.len()]) + noise);
    }

    /// Returns the value at index `at`: the sum over the streams of its row.
    #[cube]
    fn sum(
        table: &Array<u32>,
        at: usize,
        streams: usize,
        first: u32,
        width: usize,
        #[comptime] law: NoiseLaw,
        #[comptime] score: bool,
    ) -> f32 {
        let row = at / width;
        let index = (first + u32::cast_from(at - row * width)) * INDEX_FACTOR;
        let start = usize::cast_from(table[3 * streams + row]);
        let end = usize::cast_from(table[3 * streams + row + 1]);
        let mut sum = 0.0f32;
        for stream in start..end {
            let factor = f32::reinterpret(table[2 * streams + stream]);
            sum += factor * value(index, table[stream], table[streams + stream], law, score);
        }
        sum
    }

    /// Returns ε, or with `score` s(ε).
    ///
    /// The first hash of a value is `hash(index, low, high)`, the second `hash(index, high, low)`.
    /// They are uncorrelated (`values_and_streams_are_uncorrelated`).
    #[cube]
    fn value(index: u32, low: u32, high: u32, #[comptime] law: NoiseLaw, #[comptime] score: bool) -> f32 {
        match comptime!(law) {
            NoiseLaw::Rademacher => sign(hash(index, low, high)),
            NoiseLaw::Uniform => (unit(hash(index, low, high)) - 0.5) * 3.464_101_6, // 2√3
            NoiseLaw::Gaussian => {
                let radius = (unit(hash(index, low, high)).ln() * -2.0).sqrt();
                radius * (unit(hash(index, high, low)) * std::f32::consts::TAU).cos()
            }
            NoiseLaw::Laplace => {
                let sign = sign(hash(index, high, low));
                if comptime!(score) {
                    sign * std::f32::consts::SQRT_2
                } else {
                    unit(hash(index, low, high)).ln() * -std::f32::consts::FRAC_1_SQRT_2 * sign
                }
            }
        }
    }

    #[cube]
    fn hash(index: u32, low: u32, high: u32) -> u32 {
        round(fold(round(fold(round(index + low)) + high)))
    }

    #[cube]
    fn round(x: u32) -> u32 {
        x * (x * 2u32 + 1u32)
    }

    #[cube]
    fn fold(x: u32) -> u32 {
        x + (x >> 16u32)
    }

    #[cube]
    fn sign(hash: u32) -> f32 {
        select(hash < 2_147_483_648u32, -1.0f32, 1.0f32)
    }

    /// Maps the top 24 bits of a hash to the centres of 2²⁴ cells of (0, 1); the last rounds to 1.
    #[cube]
    fn unit(hash: u32) -> f32 {
        (f32::cast_from(hash >> 8u32) + 0.5f32) * 5.960_464_5e-8f32
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;

    use super::*;
    use crate::noise::source::tests::{rows, source};
    use crate::noise::{NoiseSource, Sampling};
    use crate::probe::QueryRows;

    #[cfg(feature = "cuda")]
    type Device = burn::backend::Cuda;
    #[cfg(not(feature = "cuda"))]
    type Device = burn::backend::Wgpu;

    fn values<B: Backend, const D: usize>(x: Tensor<B, D>) -> Vec<f64> {
        x.into_data().iter::<f64>().collect()
    }

    /// Generates values in every way that the kernel supports.
    ///
    /// Sites of several lengths take noise of rows, and sums over groups of unequal size, one of
    /// them without weight. Noise is then added to one row for all and to one for each, with
    /// swapped axes.
    fn generated<B: Backend>(source: &NoiseSource, device: &B::Device) -> Vec<f64> {
        let keys = rows(3, 4);
        let QueryRows { groups, keys: group_keys, .. } =
            QueryRows::new(&[0, 1, 2, 3], [3, 1, 40, 2].map(|size| 0..size));
        let weights: Vec<f64> =
            (0..group_keys.len()).map(|i| if i == 3 { 0.0 } else { (i as f64 * 0.7).sin() }).collect();
        let mut noise = source.device_noise::<B>(0, &keys, device);
        let mut sums = source.device_scores::<B>(0, &groups, &group_keys, &weights, 8, device);
        let takes = [7, 64, 1, 5000].into_iter();
        let taken: Vec<_> = takes.flat_map(|len| [values(noise.take(len)), values(sums.take(len))].concat()).collect();
        // then across the end of a segment: 33 values twice, and 20 at once
        let mut late = source.device_noise::<B>(0, &keys, device).starting_at((1 << 32) - 40);
        let onto = [&mut noise, &mut late].map(|noise| {
            let sums = [1, keys.len()].map(|given| {
                let x: Vec<f32> = (0..given * 33).map(|i| i as f32 - 50.0).collect();
                let x = Tensor::<B, 3>::from_data(TensorData::new(x, [given, 11, 3]), device).swap_dims(1, 2);
                values(noise.add(x, [keys.len(), 3, 11]))
            });
            [sums.concat(), values(noise.take(20))].concat()
        });
        let mut late = source.device_scores::<B>(0, &groups, &group_keys, &weights, 8, device);
        late = late.starting_at((1 << 32) - 15);
        [taken, onto.concat(), values(late.take(20))].concat()
    }

    #[test]
    fn kernel_values_match_the_operations() {
        for law in NoiseLaw::ALL {
            for sampling in [Sampling::OneSided, Sampling::Antithetic] {
                let (device, host) = Default::default();
                assert!(Table::<Device>::new(&[vec![(1, 1.0)]], false, &device).is_some());
                let source = source(law, sampling);
                let (ours, theirs) = (generated::<Device>(&source, &device), generated::<Flex>(&source, &host));
                assert_eq!(ours.len(), theirs.len());
                let off = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                assert!(off < 1e-3, "{law} {sampling:?}: off by {off}");
            }
        }
    }
}
