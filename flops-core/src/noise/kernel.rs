//! The device's noise in one kernel, on the backends that are known by name: CUDA's and wgpu's, with Burn's fusion and without.
//!
//! A number is made where it is written, and a sum of scores in one go, however many there are: nothing between is kept. The numbers are those of
//! the operations in `device.rs`, which every other device runs.

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

use super::NoiseLaw;

/// What a launch makes: `width` numbers of each row from the index `first` on.
#[derive(Clone, Copy, Debug)]
struct Request {
    law: NoiseLaw,
    score: bool,
    streams: usize,
    first: u32,
    width: usize,
}

/// Backends that run the kernel.
trait Kernels: Backend {
    /// The numbers of a table as [`Table`] holds it, in single precision; where `x`, `[row or 1, …]`, is given, `x` plus the noise, rounded once.
    ///
    /// # Shapes
    /// - returns: `shape`, `[row, …]`, `width` numbers a row
    fn numbers(
        x: Option<FloatTensor<Self>>,
        table: IntTensor<Self>,
        shape: Shape,
        request: Request,
    ) -> FloatTensor<Self>;
}

/// Names of streams and their factors, and which of them each row sums.
pub(super) struct Table<B: Backend> {
    /// The lower halves of the names, their upper halves, the bits of the factors; of each row the first of its streams, and their number.
    words: Tensor<B, 1, Int>,
    streams: usize,
    rows: usize,
    /// Whether they give scores, not noise.
    score: bool,
}

impl<B: Backend> Table<B> {
    /// Of the streams that each row sums, on a backend that runs the kernel.
    pub fn new(rows: &[Vec<(u64, f32)>], score: bool, device: &B::Device) -> Option<Self> {
        if !runs::<B>() {
            return None;
        }
        let streams: Vec<_> = rows.iter().flatten().collect();
        let mut starts = vec![0u32];
        rows.iter().for_each(|row| starts.push(starts[starts.len() - 1] + row.len() as u32));
        let halves =
            streams.iter().map(|(name, _)| *name as u32).chain(streams.iter().map(|(name, _)| (name >> 32) as u32));
        let words: Vec<u32> = halves.chain(streams.iter().map(|(_, factor)| factor.to_bits())).chain(starts).collect();
        let shape = [words.len()];
        let words = Tensor::from_data(TensorData::new(words, shape), (device, DType::U32));
        Some(Self { words, streams: streams.len(), rows: rows.len(), score })
    }

    /// `width` numbers, or scores, of each row from the index `first` on: `[rows, width]`.
    pub fn take(&self, law: NoiseLaw, first: u32, width: usize) -> Tensor<B, 2> {
        if self.rows * width == 0 {
            return Tensor::zeros([self.rows, width], (&self.words.device(), DType::F32));
        }
        dispatch(None, &self.words, [self.rows, width], self.request(law, first, width))
    }

    /// `x`, `[rows or 1, …]`, plus the numbers of each row from the index `first` on, rounded once: `[rows, …]`.
    ///
    /// # Panics
    /// Where `x` is on another device.
    pub fn add<const D: usize>(&self, law: NoiseLaw, first: u32, x: Tensor<B, D>, shape: [usize; D]) -> Tensor<B, D> {
        assert_eq!(x.device(), self.words.device(), "noise is made where what it falls on lies");
        let width = shape.iter().product::<usize>() / self.rows;
        dispatch(Some(x), &self.words, shape, self.request(law, first, width))
    }

    fn request(&self, law: NoiseLaw, first: u32, width: usize) -> Request {
        Request { law, score: self.score, streams: self.streams, first, width }
    }
}

/// Calls `$what::<B, K>($arguments)` with every backend K that has the kernel, until one says something.
macro_rules! any {
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
            // as Burn's Vulkan and Metal keep truth values
            .or_else(|| $what::<$b, burn::backend::Wgpu<f32, i32, u8> $(, $d)?>($($argument),*))
            .or_else(|| $what::<$b, burn::backend::Wgpu<f16, i32, u8> $(, $d)?>($($argument),*))
            .or_else(|| $what::<$b, burn::backend::Wgpu<bf16, i32, u8> $(, $d)?>($($argument),*));
        found
    }};
}

/// Whether the kernel runs on the backend.
fn runs<B: Backend>() -> bool {
    fn same<B: Backend, K: Kernels>() -> Option<()> {
        (std::any::TypeId::of::<B>() == std::any::TypeId::of::<K>()).then_some(())
    }
    any!(same::<B>()).is_some()
}

/// The numbers that are asked for, on `x` where it is given, in `shape`.
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
        let numbers = K::numbers(x.map(|x| x.into_primitive().tensor()), words, Shape::from(shape), request);
        let mut numbers = Some(Tensor::<K, D>::from_primitive(TensorPrimitive::Float(numbers)));
        (&mut numbers as &mut dyn Any).downcast_mut::<Option<Tensor<B, D>>>()?.take()
    }
    any!(on::<B, D>(&mut x, words, shape, request)).expect("a table is made where the kernel runs")
}

impl<R: CubeRuntime, F: FloatElement, I: IntElement, T: BoolElement> Kernels for CubeBackend<R, F, I, T> {
    fn numbers(
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
            None => {
                cube::numbers::launch::<R>(&client, count, dim, address, from, to, streams, first, width, law, score)
            }
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

/// The same when its turn comes among what fusion puts off.
impl<K: FusionBackend + Kernels> Kernels for Fusion<K> {
    fn numbers(
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
                    unreachable!("a table is given, and one tensor made")
                };
                let table = handles.get_int_tensor::<K>(table);
                let x = x.first().map(|x| handles.get_float_tensor::<K>(x));
                handles.register_float_tensor::<K>(&out.id, K::numbers(x, table, out.shape.clone(), self.request));
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

/// What a unit does.
mod cube {
    use burn_cubecl::cubecl::{self, prelude::*};

    use crate::noise::NoiseLaw;
    use crate::noise::device::SPREAD;

    #[cube(launch, address_type = "dynamic")]
    pub fn numbers(
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

    /// Noise on numbers of any precision, those of one row where `x` is not longer.
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

    /// What stands at `at`: the sum over the streams of its row.
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
        let index = (first + u32::cast_from(at - row * width)) * SPREAD;
        let start = usize::cast_from(table[3 * streams + row]);
        let end = usize::cast_from(table[3 * streams + row + 1]);
        let mut sum = 0.0f32;
        for stream in start..end {
            let factor = f32::reinterpret(table[2 * streams + stream]);
            sum += factor * number(index, table[stream], table[streams + stream], law, score);
        }
        sum
    }

    /// ε, or where `score` says so s(ε).
    #[cube]
    fn number(index: u32, low: u32, high: u32, #[comptime] law: NoiseLaw, #[comptime] score: bool) -> f32 {
        match comptime!(law) {
            NoiseLaw::Rademacher => sign(hash(index, low, high)),
            NoiseLaw::Uniform => (unit(hash(index, low, high)) - 0.5) * 3.464_101_6,
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

    /// The top 24 bits of a hash as a number in (0, 1].
    #[cube]
    fn unit(hash: u32) -> f32 {
        (f32::cast_from(hash >> 8u32) + 0.5f32) * 5.960_464_5e-8f32
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;

    use super::*;
    use crate::noise::tests::{rows, source};
    use crate::noise::{NoiseSource, Sampling};
    use crate::probe::QueryRows;

    #[cfg(feature = "cuda")]
    type Device = burn::backend::Cuda;
    #[cfg(not(feature = "cuda"))]
    type Device = burn::backend::Wgpu;

    fn values<B: Backend, const D: usize>(x: Tensor<B, D>) -> Vec<f64> {
        x.into_data().iter::<f64>().collect()
    }

    /// What sites of several lengths take of the rows' noise, and of its sums over groups of unequal size, one of them without weight; noise on one row
    /// for all and on one for each, which do not lie in memory in their order.
    fn taken<B: Backend>(source: &NoiseSource, device: &B::Device) -> Vec<f64> {
        let keys = rows(3, 4);
        let QueryRows { groups, keys: of_groups, .. } =
            QueryRows::new(&[0, 1, 2, 3], [3, 1, 40, 2].map(|size| 0..size));
        let weights: Vec<f64> =
            (0..of_groups.len()).map(|i| if i == 3 { 0.0 } else { (i as f64 * 0.7).sin() }).collect();
        let mut noise = source.of_rows::<B>(0, &keys, device);
        let mut sums = source.of_groups::<B>(0, &groups, &of_groups, &weights, 8, device);
        let takes = [7, 64, 1, 5000].into_iter();
        let taken: Vec<_> = takes.flat_map(|len| [values(noise.take(len)), values(sums.take(len))].concat()).collect();
        let onto = [1, keys.len()].map(|given| {
            let x: Vec<f32> = (0..given * 33).map(|i| i as f32 - 50.0).collect();
            let x = Tensor::<B, 3>::from_data(TensorData::new(x, [given, 11, 3]), device).swap_dims(1, 2);
            values(noise.add(x, [keys.len(), 3, 11]))
        });
        [taken, onto.concat()].concat()
    }

    #[test]
    fn the_kernel_s_numbers_are_those_of_the_operations() {
        for law in NoiseLaw::ALL {
            for sampling in [Sampling::OneSided, Sampling::Antithetic] {
                let (device, host) = Default::default();
                assert!(Table::<Device>::new(&[vec![(1, 1.0)]], false, &device).is_some());
                let source = source(law, sampling);
                let (ours, theirs) = (taken::<Device>(&source, &device), taken::<Flex>(&source, &host));
                assert_eq!(ours.len(), theirs.len());
                let off = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                assert!(off < 1e-3, "{law} {sampling:?}: off by {off}");
            }
        }
    }
}
