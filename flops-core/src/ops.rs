//! GELU and attention, vectorised on CPU backends.
//!
//! Besides matrix products, forward passes spend most of their time in these. Burn's CPU backends
//! compute erf and exp one value at a time, and copy views with swapped axes element by element.
//!
//! The functions here use the CPU's vector instructions, detected at run time, on Flex and NdArray
//! in single precision. They work in place where no other tensor shares the values. Everywhere
//! else, including under Autodiff, they call Burn's operations. Multiplications and additions are
//! never fused, so every CPU gives the same bits.

use burn::prelude::*;
use burn::tensor::activation;
use burn::tensor::module;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{DType, TensorData, Transaction};
use pulp::Arch;

/// Whether tensors of this backend lie in host memory.
pub(crate) fn is_host<B: Backend>(device: &B::Device) -> bool {
    let name = B::name(device);
    name.starts_with("flex") || name.starts_with("ndarray")
}

/// Whether tensors of this backend lie on a GPU, or any device that CubeCL drives.
pub(crate) fn is_gpu<B: Backend>(device: &B::Device) -> bool {
    B::name(device).contains("cubecl<")
}

/// Whether `x` has single precision and lies in host memory.
fn on_host<B: Backend, const D: usize>(x: &Tensor<B, D>) -> bool {
    x.dtype() == DType::F32 && is_host::<B>(&x.device())
}

/// Returns `x` with `f` applied to its values, in place where no other tensor shares them.
///
/// # Panics
/// Where `x` is not in single precision.
fn in_place<B: Backend, const D: usize>(x: Tensor<B, D>, f: impl FnOnce(&mut [f32])) -> Tensor<B, D> {
    let device = x.device();
    let mut data = x.into_data();
    f(data.as_mut_slice::<f32>().expect("single precision was checked"));
    Tensor::from_data(data, (&device, DType::F32))
}

/// Precision of noise, of products and of sums over many rows: double on f64 backends, else single.
pub fn accum_dtype<B: Backend>() -> DType {
    match <B::FloatElem as burn::tensor::Element>::dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// The values of several passes on the host, in turn: a device is waited for once.
pub(crate) fn to_host<B: Backend>(parts: Vec<Tensor<B, 1>>) -> Vec<f64> {
    let [values] = all_to_host([joined(parts)]);
    values.unwrap_or_default()
}

/// The values of several passes in turn; `None` without any.
pub(crate) fn joined<B: Backend>(parts: Vec<Tensor<B, 1>>) -> Option<Tensor<B, 1>> {
    (!parts.is_empty()).then(|| Tensor::cat(parts, 0))
}

/// The values of tensors on the host, which are read together: a device is waited for once.
pub(crate) fn all_to_host<B: Backend, const D: usize, const N: usize>(
    tensors: [Option<Tensor<B, D>>; N],
) -> [Option<Vec<f64>>; N] {
    let are_there = tensors.each_ref().map(Option::is_some);
    if !are_there.contains(&true) {
        return [const { None }; N];
    }
    let read = tensors.into_iter().flatten().fold(Transaction::default(), Transaction::register).execute();
    let mut read = read.into_iter().map(|data| data.iter::<f64>().collect());
    are_there.map(|is_there| if is_there { read.next() } else { None })
}

/// The sum of ⟨a, b⟩ over pairs, 0 without any; one value is read back, however many there are.
pub(crate) fn dot_to_host<B: Backend>(pairs: impl Iterator<Item = (Tensor<B, 1>, Tensor<B, 1>)>) -> f64 {
    let product = |(a, b): (Tensor<B, 1>, Tensor<B, 1>)| {
        let [n] = a.dims();
        let product = a.cast(DType::F32) * b.cast(DType::F32);
        // a device fuses a product with the sum over an axis; that of many values takes all its cores
        let is_small = n <= 1 << 16 && !is_host::<B>(&product.device());
        if is_small { product.reshape([1, n]).sum_dim(1).reshape([1]) } else { product.sum() }
    };
    // and sums that follow one another
    let products: Vec<Tensor<B, 1>> = pairs.map(product).collect();
    products.into_iter().reduce(|a, b| a + b).map_or(0.0, |sum| sum.into_scalar().elem())
}

/// Copies values from the host, in [`accum_dtype`] precision.
pub(crate) fn from_host<B: Backend, const D: usize>(
    values: Vec<f32>,
    shape: [usize; D],
    device: &B::Device,
) -> Tensor<B, D> {
    Tensor::from_data(TensorData::new(values, shape), (device, accum_dtype::<B>()))
}

/// Returns `x` plus what `add` adds to the values it is given, in `shape`.
///
/// `x` has this shape or is broadcast to it. On the host, `add` is given the values of `x` where
/// the shapes agree. Otherwise it is given zeros, and the result is added to `x`.
pub(crate) fn add_values<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    shape: [usize; D],
    add: impl FnOnce(&mut [f32]),
) -> Tensor<B, D> {
    if on_host(&x) && x.dims() == shape {
        return in_place(x, add);
    }
    let mut values = vec![0f32; shape.iter().product()];
    add(&mut values);
    let values = from_host(values, shape, &x.device());
    add_rounded(x, values)
}

/// Returns a quantized tensor as floats, and any other one as it is.
///
/// Burn rounds once more where it transposes or slices a tensor whose scales belong to blocks.
pub(crate) fn unpacked<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    if matches!(x.dtype(), DType::QFloat(_)) { x.dequantize() } else { x }
}

/// Returns `x` plus values of equal or higher precision, rounded once to the precision of `x`.
pub(crate) fn add_rounded<B: Backend, const D: usize>(x: Tensor<B, D>, values: Tensor<B, D>) -> Tensor<B, D> {
    let dtype = x.dtype();
    (x.cast(values.dtype()) + values).cast(dtype)
}

/// GELU: x·Φ(x), with the exact normal distribution function Φ.
///
/// On the host, in single precision, the error is at most 10⁻⁶ for every x. There it is computed as
/// x⁺ − ½|x|·erfc(|x|/√2), with erfc(a/√2) ≈ p(a)⁻¹⁶ and p of degree 7. The form is that of
/// Abramowitz and Stegun, 7.1.28; the coefficients are refitted, with |error| ≤ 4·10⁻⁷ in single
/// precision.
pub fn gelu<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    if !on_host(&x) {
        return activation::gelu(x);
    }
    in_place(x, |x| {
        vectorised(
            #[inline(always)]
            || x.iter_mut().for_each(|x| *x = gelu_of(*x)),
        );
    })
}

/// Coefficients of p in [`gelu`], from a⁷ to a⁰.
const ERFC: [f32; 8] = [
    7.157_445_3e-7,
    -9.956_563e-7,
    7.033_544_5e-5,
    3.866_699_4e-6,
    3.303_991_8e-3,
    2.113_205_8e-2,
    4.986_830_8e-2,
    1.0,
];

#[inline(always)]
fn gelu_of(x: f32) -> f32 {
    // beyond 16 the tail is zero; NaN stays NaN
    let a = if x.abs() > 16.0 { 16.0 } else { x.abs() };
    let mut p = ERFC[0];
    for c in &ERFC[1..] {
        p = p * a + c;
    }
    let p2 = p * p;
    let p4 = p2 * p2;
    let p8 = p4 * p4;
    let positive = if x > 0.0 { x } else { 0.0 };
    positive - 0.5 * a / (p8 * p8)
}

/// Multi-head attention: softmax(q·kᵀ/√(d/num_heads) + bias)·v of each head.
///
/// The heads lie side by side in the last axis.
///
/// # Shapes
/// - q: `[rows, tokens, d]`, d a multiple of `num_heads`
/// - k, v: `[rows, context_tokens, d]`
/// - bias: `[rows or 1, num_heads or 1, tokens or 1, context_tokens]`, added to the scaled scores
/// - returns: `[rows, tokens, d]`
///
/// # Panics
/// Where the shapes do not match.
pub fn attention<B: Backend>(
    q: Tensor<B, 3>,
    k: Tensor<B, 3>,
    v: Tensor<B, 3>,
    num_heads: usize,
    bias: Option<Tensor<B, 4>>,
) -> Tensor<B, 3> {
    let [rows, tokens, d] = q.dims();
    if !on_host(&q) {
        let [q, k, v] = [q, k, v].map(|x| swap_middle(split(x, num_heads)));
        let out = module::attention(q, k, v, None, bias, AttentionModuleOptions::default());
        return swap_middle(out).reshape([rows, tokens, d]);
    }
    // views suffice: a matrix product gathers its operands anyway
    let [q, k, v] = [q, k, v].map(|x| split(x, num_heads).swap_dims(1, 2));
    let mut scale = ((d / num_heads) as f32).sqrt().recip();
    let mut scores = q.matmul(k.transpose());
    if let Some(bias) = bias {
        scores = scores.mul_scalar(scale) + bias;
        scale = 1.0;
    }
    let width = scores.dims()[3].max(1);
    let weights = in_place(scores, |x| softmax(x, width, scale));
    merge(weights.matmul(v))
}

/// Reshapes `[rows, tokens, d]` to `[rows, tokens, num_heads, d / num_heads]`.
fn split<B: Backend>(x: Tensor<B, 3>, num_heads: usize) -> Tensor<B, 4> {
    let [rows, tokens, d] = x.dims();
    x.reshape([rows, tokens, num_heads, d / num_heads])
}

/// Copies `[rows, heads, tokens, d]` to `[rows, tokens, heads·d]`, one head of one token at a time.
fn merge<B: Backend>(x: Tensor<B, 4>) -> Tensor<B, 3> {
    let [rows, heads, tokens, d] = x.dims();
    if heads == 1 || tokens == 1 {
        return x.reshape([rows, tokens, heads * d]);
    }
    let device = x.device();
    let data = x.into_data();
    let from = data.as_slice::<f32>().expect("single precision was checked");
    let mut to = Vec::with_capacity(from.len());
    for row in from.chunks_exact((heads * tokens * d).max(1)) {
        for token in 0..tokens {
            for head in 0..heads {
                to.extend_from_slice(&row[(head * tokens + token) * d..][..d]);
            }
        }
    }
    Tensor::from_data(TensorData::new(to, [rows, tokens, heads * d]), (&device, DType::F32))
}

/// Swaps the two middle axes: `[rows, a, b, d]` becomes `[rows, b, a, d]`.
///
/// On Flex, under Autodiff or in 16 bits, this is a gather: Flex copies a view with swapped axes
/// element by element.
fn swap_middle<B: Backend>(x: Tensor<B, 4>) -> Tensor<B, 4> {
    let [rows, a, b, d] = x.dims();
    if a == 1 || b == 1 {
        return x.reshape([rows, b, a, d]);
    }
    if !B::name(&x.device()).contains("flex") {
        return x.swap_dims(1, 2);
    }
    let all = rows * a * b;
    let index = Tensor::<B, 1, Int>::arange(0..all as i64, &x.device());
    let index = index.reshape([rows, a, b]).swap_dims(1, 2).reshape([all]);
    x.reshape([all, d]).select(0, index).reshape([rows, b, a, d])
}

/// Runs a loop compiled for the vector registers of this CPU; its closures must be inlined.
#[inline]
pub(crate) fn vectorised(run: impl FnOnce()) {
    Arch::new().dispatch(run);
}

/// Values that are summed side by side.
const LANES: usize = 16;

/// Σ a_i b_i; runs of 64 are summed in f32, and the runs in f64.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut sum = 0.0;
    vectorised(
        #[inline(always)]
        || {
            for (a, b) in a.chunks(4 * LANES).zip(b.chunks(4 * LANES)) {
                let mut sums = [0f32; LANES];
                let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
                for (a, b) in a.iter().zip(b) {
                    for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
                        *sum += a * b;
                    }
                }
                for ((sum, a), b) in sums.iter_mut().zip(a_rest).zip(b_rest) {
                    *sum += a * b;
                }
                sum += f64::from(sums.into_iter().sum::<f32>());
            }
        },
    );
    sum
}

/// Applies x ← softmax(scale·x) to each row of `width` values.
fn softmax(x: &mut [f32], width: usize, scale: f32) {
    vectorised(
        #[inline(always)]
        || x.chunks_exact_mut(width).for_each(|row| softmax_of(row, scale)),
    );
}

/// Softmax of one row. A score of −∞ gets nearly zero weight; a NaN makes the whole row NaN.
#[inline(always)]
fn softmax_of(row: &mut [f32], scale: f32) {
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    let (parts, rest) = row.as_chunks_mut::<LANES>();
    let mut tops = [f32::NEG_INFINITY; LANES];
    for part in &*parts {
        for (top, &x) in tops.iter_mut().zip(part) {
            *top = larger(x, *top);
        }
    }
    let top = tops.into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, |top, x| larger(x, top));
    let mut sums = [0f32; LANES];
    for part in parts {
        for (sum, x) in sums.iter_mut().zip(part) {
            *x = exp_of((*x - top) * scale);
            *sum += *x;
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest) {
        *x = exp_of((*x - top) * scale);
        *sum += *x;
    }
    let scale = 1.0 / sums.into_iter().sum::<f32>();
    for x in row {
        *x *= scale;
    }
}

/// eˣ for x ≤ 0.
#[inline(always)]
fn exp_of(x: f32) -> f32 {
    let x = if x < -87.0 { -87.0 } else { x };
    // the nearest integer to x/ln 2, in the low bits of the mantissa
    const MAGIC: f32 = 12_582_912.0;
    let shifted = x * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
        p = p * r + c;
    }
    let y = p * r * r + r + 1.0;
    y * f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000))
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::{Autodiff, Flex, NdArray};

    type Device = burn::backend::flex::FlexDevice;

    /// erf in double precision, within 10⁻¹⁵: its power series, or from 3 on the continued fraction
    /// of erfc.
    fn erf(x: f64) -> f64 {
        let a = x.abs();
        let value = if a < 3.0 {
            let (mut sum, mut term) = (a, a);
            for n in 1..200 {
                term *= -a * a / n as f64;
                sum += term / (2 * n + 1) as f64;
            }
            sum * std::f64::consts::FRAC_2_SQRT_PI
        } else {
            let fraction = (1..200).rev().fold(a, |f, n| a + n as f64 / 2.0 / f);
            1.0 - (-a * a).exp() / (fraction * std::f64::consts::PI.sqrt())
        };
        value.copysign(x)
    }

    fn exact_gelu(x: f32) -> f64 {
        let x = f64::from(x);
        0.5 * x * (1.0 + erf(x / 2f64.sqrt()))
    }

    #[test]
    fn the_reference_matches_tabulated_erf() {
        // Abramowitz and Stegun, table 7.1
        for (x, y) in [(0.5, 0.520_499_877_8), (1.0, 0.842_700_792_9), (2.0, 0.995_322_265_0), (-3.5, -0.999_999_256_9)]
        {
            assert!((erf(x) - y).abs() < 1e-10, "erf({x}) = {}", erf(x));
        }
        assert!((erf(2.999_999_9) - erf(3.000_000_1)).abs() < 1e-10);
    }

    fn values<B: Backend, const D: usize>(x: Tensor<B, D>) -> Vec<f32> {
        x.into_data().iter::<f32>().collect()
    }

    #[test]
    fn gelu_is_within_1e_6_of_the_exact_value() {
        let xs: Vec<f32> = (-1_000_000..=1_000_000).map(|i| i as f32 * 1e-5).collect();
        let y = values(gelu(Tensor::<Flex, 1>::from_floats(xs.as_slice(), &Device::default())));
        let worst = xs.iter().zip(&y).map(|(&x, &y)| (f64::from(y) - exact_gelu(x)).abs()).fold(0.0, f64::max);
        assert!(worst < 1e-6, "off by {worst}");
        let edges = [f32::NEG_INFINITY, -1e30, -100.0, 0.0, 100.0, 1e30, f32::INFINITY, f32::NAN];
        let y = values(gelu(Tensor::<NdArray, 1>::from_floats(edges, &Default::default())));
        assert_eq!(y[..7], [0.0, 0.0, 0.0, 0.0, 100.0, 1e30, f32::INFINITY]);
        assert!(y[7].is_nan());
    }

    #[test]
    fn shared_values_are_not_modified() {
        let x = Tensor::<Flex, 1>::from_floats([-1.0, 2.0], &Device::default());
        let y = gelu(x.clone());
        assert_eq!(values(x), [-1.0, 2.0]);
        assert_ne!(values(y), [-1.0, 2.0]);
        let view = Tensor::<Flex, 2>::from_floats([[0.0, 20.0], [-20.0, 30.0]], &Device::default()).transpose();
        assert_eq!(values(gelu(view)), [0.0, 0.0, 20.0, 30.0]);
    }

    fn waves<B: Backend, const D: usize>(shape: [usize; D], salt: f32) -> Tensor<B, D> {
        let n = shape.iter().product::<usize>();
        let values: Vec<f32> = (0..n).map(|i| 3.0 * (i as f32 * 0.37 + salt).sin()).collect();
        Tensor::from_data(TensorData::new(values, shape), &Default::default())
    }

    /// Compares with Burn's attention, which Autodiff uses, with and without a bias, for one and
    /// several heads, tokens and rows.
    fn assert_matches_burn<B: Backend>() {
        for (rows, tokens, context, heads, d) in
            [(1, 1, 1, 1, 4), (3, 5, 7, 2, 6), (2, 1, 65, 4, 32), (2, 40, 33, 3, 12)]
        {
            for shape in
                [None, Some([1, 1, 1, context]), Some([rows, 1, tokens, context]), Some([rows, heads, tokens, context])]
            {
                let run = |salt| waves::<B, 3>([rows, if salt == 0.0 { tokens } else { context }, d], salt);
                let burn =
                    |salt| waves::<Autodiff<Flex>, 3>([rows, if salt == 0.0 { tokens } else { context }, d], salt);
                let ours = attention(run(0.0), run(1.0), run(2.0), heads, shape.map(|s| waves(s, 3.0)));
                let theirs = attention(burn(0.0), burn(1.0), burn(2.0), heads, shape.map(|s| waves(s, 3.0)));
                assert_eq!(ours.dims(), [rows, tokens, d]);
                for (a, b) in values(ours).into_iter().zip(values(theirs)) {
                    assert!(
                        (a - b).abs() < 1e-5,
                        "{a} against {b} with {rows}×{tokens}×{context}, {heads} heads, bias {shape:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn attention_matches_burn() {
        assert_matches_burn::<Flex>();
        assert_matches_burn::<NdArray>();
    }

    #[test]
    fn softmax_handles_scores_of_any_size() {
        let mut row: Vec<f32> = (0..37).map(|i| -(i as f32)).collect();
        row[20] = f32::NEG_INFINITY;
        row[21] = -1e30;
        let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
        let exact: Vec<f64> = row.iter().map(|&x| f64::from(x).exp() / sum).collect();
        softmax(&mut row, 37, 1.0);
        for (&a, b) in row.iter().zip(exact) {
            assert!((f64::from(a) - b).abs() < 1e-7 * b.max(1e-30), "{a} against {b}");
        }
        let mut row = [0.0, f32::NAN, 1.0];
        softmax(&mut row, 3, 1.0);
        assert!(row.iter().all(|x| x.is_nan()));
    }

    #[test]
    fn gradients_pass_through() {
        let x = Tensor::<Autodiff<Flex>, 3>::ones([1, 2, 4], &Default::default()).require_grad();
        let loss = gelu(attention(x.clone(), x.clone(), x.clone(), 2, None)).sum();
        let g = x.grad(&loss.backward()).expect("a gradient").sum().into_scalar();
        // attention of equal tokens is the mean; gelu′(1) = 1.0833155
        assert!((g - 8.0 * 1.083_315_5).abs() < 1e-4, "{g}");
    }
}
