//! Noise of low rank on the weights of a site: how a row's draw is laid out, and what it does.

use burn::prelude::*;

use super::layer::Site;
use super::mask::TokenMask;
use super::rows::QueryRows;
use crate::noise::NoiseSource;
use crate::ops;

/// How a row's draw is split: A, B, the vectors, then the output.
pub(crate) struct Layout {
    /// `[inputs, outputs]` of the weight that A·B/√r is added to.
    matrix: Option<[usize; 2]>,
    /// Elements of the trained vectors.
    pub vectors: usize,
    /// Coordinates of the output that are perturbed themselves: all, where the layer has no weight
    /// noise.
    pub output: usize,
    pub rank: usize,
}

impl Layout {
    /// The layout of a site with `coordinates` coordinates per row.
    pub fn new<B: Backend>(site: &dyn Site<B>, coordinates: usize, rank: usize) -> Self {
        match site.weight_noise() {
            Some(noise) => Self { matrix: noise.matrix_shape(), vectors: noise.vector_elements(), output: 0, rank },
            None => Self { matrix: None, vectors: 0, output: coordinates, rank },
        }
    }

    /// `[inputs, outputs]` of the weight; none where no weight is perturbed.
    pub fn matrix(&self) -> Option<[usize; 2]> {
        self.matrix
    }

    /// Values of A, which are not scaled by σ and sign.
    pub fn left(&self) -> usize {
        self.matrix.map_or(0, |[inputs, _]| inputs * self.rank)
    }

    /// Values of B.
    pub fn right(&self) -> usize {
        self.matrix.map_or(0, |[_, outputs]| outputs * self.rank)
    }

    /// Values of a row.
    pub fn len(&self) -> usize {
        self.left() + self.right() + self.vectors + self.output
    }

    /// E‖E‖², over all parameters of a site with weight noise.
    pub fn squared_norm(&self) -> f64 {
        (self.matrix.map_or(0, |[inputs, outputs]| inputs * outputs) + self.vectors) as f64
    }

    /// Part of the rows of noise as a tensor `[rows, len]`, columns from `at` on.
    fn part<B: Backend>(&self, noise: &[f32], at: usize, len: usize, device: &B::Device) -> Tensor<B, 2> {
        let rows = noise.len() / self.len().max(1);
        let values: Vec<f32> =
            noise.chunks_exact(self.len().max(1)).flat_map(|row| row[at..at + len].iter().copied()).collect();
        ops::from_host(values, [rows, len], device)
    }
}

/// σ times the draws of all rows at site `index`, A alone without σ; zeros for rows that are not
/// perturbed.
fn draw(layout: &Layout, index: usize, noise: &NoiseSource, rows: &QueryRows) -> Vec<f32> {
    let (len, left) = (layout.len(), layout.left());
    let mut values = vec![0f32; rows.keys.len() * len];
    if len == 0 {
        return values;
    }
    for (row, here) in rows.keys.iter().zip(values.chunks_exact_mut(len)) {
        if let Some((direction, sign)) = noise.signed(index, row) {
            noise.draw(index, row.position, direction, None, here);
            let scale = sign * noise.sigma as f32;
            here[left..].iter_mut().for_each(|v| *v *= scale);
        }
    }
    values
}

/// The output `y` of a site, perturbed for every row.
///
/// Noise on weights moves masked tokens too, which no loss sees. Noise on the output stays off
/// them.
///
/// # Shapes
/// - y: `[examples or rows, …]`; a bare parameter has one row for all
/// - returns: `[rows, …]`
pub(crate) fn perturb<B: Backend, const D: usize>(
    y: Tensor<B, D>,
    site: &dyn Site<B>,
    (rank, mask): (usize, Option<&TokenMask<B>>),
    (index, noise): (usize, &NoiseSource),
    rows: &QueryRows,
) -> Tensor<B, D> {
    let (n, mut shape) = (rows.keys.len(), y.dims());
    let coordinates: usize = shape[1..].iter().product();
    let (given, device, dtype) = (shape[0], y.device(), y.dtype());
    shape[0] = n;
    let layout = Layout::new(site, coordinates, rank);
    let values = draw(&layout, index, noise, rows);
    let part = |at: usize, len: usize| layout.part::<B>(&values, at, len, &device);

    let flat: Tensor<B, 2> = y.cast(ops::accum_dtype::<B>()).reshape([given, coordinates]);
    let mut y = rows.repeat(flat);
    if y.dims()[0] != n {
        y = y.expand([n, coordinates]); // one row for all
    }
    let (left, right) = (layout.left(), layout.right());
    if let Some(weight_noise) = site.weight_noise() {
        let factors = layout.matrix.map(|[inputs, outputs]| {
            let a = part(0, left).reshape([n, inputs, rank]);
            let b = part(left, right).reshape([n, rank, outputs]);
            (a, if rank > 1 { b / (rank as f64).sqrt() } else { b })
        });
        let vectors = (layout.vectors > 0).then(|| part(left + right, layout.vectors));
        y = weight_noise.perturb(y, factors, vectors, rows);
    }
    if layout.output > 0 {
        let output = part(left + right + layout.vectors, layout.output);
        y = y + mask.map_or(output.clone(), |mask| mask.apply(output));
    }
    y.reshape(shape).cast(dtype)
}
