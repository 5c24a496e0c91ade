//! Noise of low rank on the weights, a draw of its own for every query (EGGROLL, Sarkar et al. 2025, arXiv 2511.16652).
//!
//! A query sees W + σ·A·B/√r instead of W, with A `[d_in, r]` and B `[r, d_out]` of independent unit entries: the layer's output gains the
//! side term σ(xA)B/√r, which costs r·(d_in + d_out) products per token, and the perturbed weight is never formed. For E = AB/√r and every
//! law of independent entries of unit variance, E[⟨G, E⟩ E] = G: c·E estimates the gradient for W, up to O(σ²), and needs no
//! clean input. (Its squared norm is d_in·d_out for signs; for Gaussian entries c² and ‖E‖² go together, and the second moments that allocators
//! see are short by the same factor (1 + 2/d_in)(1 + 2/d_out) for all data at rank 1.) The update of all queries is one product, [A₁ … A_N]·[c₁B₁; …; c_N B_N].
//!
//! Vectors (biases, the scale and shift of a normalisation) get full noise of their own, the same for all tokens of a row; looked-up rows of an
//! embedding and bare parameters are perturbed as in the activation space. A convolution's weight is a matrix from patches to channels.

use burn::prelude::*;
use burn::tensor::module::unfold4d;
use burn::tensor::ops::UnfoldOptions;

use crate::batch::Rows;
use crate::noise::{NoiseSource, RowKey};
use crate::ops;
use crate::probe::{Gradients, QueryRows, Site, SiteInput};

/// What of a row's noise falls on what: A, B, then the vectors.
struct Layout {
    /// (inputs, outputs) of a matrix of which A·B/√r is added.
    matrix: Option<(usize, usize)>,
    /// Length of the scale of a normalisation.
    scale: usize,
    /// Coordinates of the output that are perturbed themselves.
    output: usize,
    bias: usize,
    rank: usize,
}

impl Layout {
    fn new<B: Backend>(input: &SiteInput<B>, shape: &[usize], weight: bool, bias: bool, rank: usize) -> Self {
        let last = *shape.last().unwrap_or(&1);
        let coordinates = shape[1..].iter().product();
        let mut layout = Self { matrix: None, scale: 0, output: 0, bias: 0, rank };
        let channels = match input {
            SiteInput::Conv { .. } => shape[1],
            _ => last,
        };
        if weight {
            match input {
                SiteInput::Linear { x } => layout.matrix = Some((x.dims()[1], last)),
                SiteInput::Conv { weight, .. } => {
                    let [out, inputs, height, width] = weight.dims();
                    layout.matrix = Some((inputs * height * width, out));
                }
                SiteInput::Norm { .. } => layout.scale = last,
                SiteInput::Embedding { .. } | SiteInput::Parameter => layout.output = coordinates,
            }
        }
        if bias {
            layout.bias = channels;
        }
        layout
    }

    /// Numbers of A, which are not scaled by σ and sign.
    fn left(&self) -> usize {
        self.matrix.map_or(0, |(inputs, _)| inputs * self.rank)
    }

    fn right(&self) -> usize {
        self.matrix.map_or(0, |(_, outputs)| outputs * self.rank)
    }

    /// Numbers of a row.
    fn len(&self) -> usize {
        self.left() + self.right() + self.scale + self.output + self.bias
    }

    /// E‖E‖², over all parameters of the site.
    fn energy(&self) -> f64 {
        (self.matrix.map_or(0, |(inputs, outputs)| inputs * outputs) + self.scale + self.output + self.bias) as f64
    }

    /// The parts of rows of noise as tensors `[rows, …]`, columns from `at` on.
    fn part<B: Backend>(&self, noise: &[f32], at: usize, len: usize, device: &B::Device) -> Tensor<B, 2> {
        let rows = noise.len() / self.len().max(1);
        let values: Vec<f32> =
            noise.chunks_exact(self.len()).flat_map(|row| row[at..at + len].iter().copied()).collect();
        ops::from_host(values, [rows, len], device)
    }
}

/// The output `y` of a site, perturbed for every row.
///
/// # Shapes
/// - y: `[data or rows, …]`; a bare parameter has one row for all
/// - returns: `[rows, …]`
pub(crate) fn perturb<B: Backend, const D: usize>(
    y: Tensor<B, D>,
    input: SiteInput<B>,
    trained: (bool, bool),
    rank: usize,
    (index, noise): (usize, &NoiseSource),
    rows: &QueryRows,
) -> Tensor<B, D> {
    let layout = Layout::new(&input, &y.dims(), trained.0, trained.1, rank);
    let (len, left, device, dtype) = (layout.len(), layout.left(), y.device(), y.dtype());
    let (y, input) = (y.cast(ops::working::<B>()), input.working());
    let mut values = vec![0f32; rows.keys.len() * len];
    for (row, here) in rows.keys.iter().zip(values.chunks_exact_mut(len)) {
        if let Some((direction, sign)) = noise.signed(index, row) {
            noise.draw(index, row.position, direction, here);
            let scale = sign * noise.sigma as f32;
            here[left..].iter_mut().for_each(|v| *v *= scale);
        }
    }
    let given = y.dims()[0];
    let per_query =
        |t: Tensor<B, 3>| if given == rows.groups.len() && given != rows.keys.len() { t.rows(&rows.datum) } else { t };
    let n = rows.keys.len();
    let mut shape = y.dims();
    shape[0] = n;
    // [rows, tokens, …] of what the layer saw
    let tokens = |t: Tensor<B, 2>| {
        let [all, d] = t.dims();
        per_query(t.reshape([given, all / given, d]))
    };
    let part = |at: usize, len: usize| layout.part::<B>(&values, at, len, &device);
    let mut sum = match given {
        _ if given == n => y,
        _ if given == rows.groups.len() => y.rows(&rows.datum),
        _ => y,
    };
    if let Some((inputs, outputs)) = layout.matrix {
        let a = part(0, left).reshape([n, inputs, rank]);
        let b = part(left, layout.right()).reshape([n, rank, outputs]) / (rank as f64).sqrt();
        sum = match &input {
            SiteInput::Linear { x } => sum + tokens(x.clone()).matmul(a).matmul(b).reshape(shape),
            SiteInput::Conv { x, weight, stride, dilation } => {
                let [_, _, height, width] = weight.dims();
                let patches = unfold4d(x.clone(), [height, width], UnfoldOptions::new(*stride, [0, 0], *dilation));
                let side = per_query(patches.swap_dims(1, 2)).matmul(a).matmul(b);
                sum + side.swap_dims(1, 2).reshape(shape)
            }
            _ => sum,
        };
    }
    let mut at = left + layout.right();
    if layout.scale > 0
        && let SiteInput::Norm { normalised } = &input
    {
        let scale = part(at, layout.scale).reshape([n, 1, layout.scale]);
        sum = sum + (tokens(normalised.clone()) * scale).reshape(shape);
    }
    at += layout.scale;
    if layout.output > 0 {
        sum = sum + part(at, layout.output).reshape(shape);
    }
    at += layout.output;
    if layout.bias > 0 {
        // the channels of a convolution are its second axis, those of other layers the last
        let mut wide = [1; D];
        wide[0] = n;
        wide[if matches!(input, SiteInput::Conv { .. }) { 1 } else { D - 1 }] = layout.bias;
        sum = sum + part(at, layout.bias).reshape(wide);
    }
    sum.cast(dtype)
}

/// Adds the gradients of a site from the weights of its queries; gives E‖E‖², the same for all data.
pub(crate) fn gradients<B: Backend>(
    site: &Site<B>,
    rank: usize,
    (index, noise): (usize, &NoiseSource),
    groups: &[std::ops::Range<usize>],
    keys: &[RowKey],
    weights: &[f64],
    gradients: &mut Gradients<B>,
) -> f64 {
    let layout = Layout::new(&site.input, &site.shape, site.weight.is_some(), site.bias.is_some(), rank);
    let (len, left, right) = (layout.len(), layout.left(), layout.right());
    let device = site.device();
    let (mut lefts, mut rights) = (vec![], vec![]);
    let mut vectors = vec![0f64; layout.scale + layout.bias];
    let mut outputs = vec![0f32; groups.len() * layout.output];
    let mut row = vec![0f32; len];
    for (j, group) in groups.iter().enumerate() {
        for (position, direction, weight) in noise.directions(index, group.clone(), keys, weights) {
            noise.draw(index, position, direction, &mut row);
            let (a, rest) = row.split_at(left);
            let (b, rest) = rest.split_at(right);
            let (scale, rest) = rest.split_at(layout.scale);
            let (output, bias) = rest.split_at(layout.output);
            lefts.extend_from_slice(a);
            let factor = (weight / (rank as f64).sqrt()) as f32;
            rights.extend(b.iter().map(|b| factor * b));
            vectors.iter_mut().zip(scale.iter().chain(bias)).for_each(|(v, &e)| *v += weight * f64::from(e));
            let here = &mut outputs[j * layout.output..(j + 1) * layout.output];
            here.iter_mut().zip(output).for_each(|(o, e)| *o += weight as f32 * e);
        }
    }
    if let (Some((inputs, width)), Some(id)) = (layout.matrix, site.weight) {
        let n = lefts.len() / left.max(1);
        if n == 0 {
            gradients.add(id, ops::from_host::<B, 1>(vec![0.0; inputs * width], [inputs * width], &device));
        } else {
            let a = ops::from_host::<B, 3>(lefts, [n, inputs, rank], &device);
            let b = ops::from_host(rights, [n * rank, width], &device);
            let product = a.swap_dims(0, 1).reshape([inputs, n * rank]).matmul(b);
            match site.input {
                SiteInput::Conv { .. } => gradients.add(id, product.transpose()),
                _ => gradients.add(id, product),
            }
        }
    }
    let vector = |range: std::ops::Range<usize>| {
        let values: Vec<f32> = vectors[range].iter().map(|&v| v as f32).collect();
        let n = values.len();
        ops::from_host::<B, 1>(values, [n], &device)
    };
    if let Some(id) = site.weight.filter(|_| layout.scale > 0) {
        gradients.add(id, vector(0..layout.scale));
    }
    if let Some(id) = site.bias.filter(|_| layout.bias > 0) {
        gradients.add(id, vector(layout.scale..layout.scale + layout.bias));
    }
    if layout.output > 0 {
        site.backward(ops::from_host(outputs, [groups.len(), layout.output], &device), gradients);
    }
    layout.energy()
}
