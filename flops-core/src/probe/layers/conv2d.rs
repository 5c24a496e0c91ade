//! Convolutions over two axes.

use std::collections::HashSet;

use burn::module::ParamId;
use burn::nn::PaddingConfig2d;
use burn::nn::conv::Conv2d;
use burn::prelude::*;
use burn::tensor::TensorPrimitive;
use burn::tensor::module::{conv2d, unfold4d};
use burn::tensor::ops::{ConvOptions, UnfoldOptions};

use crate::ops;
use crate::probe::gradients::Gradients;
use crate::probe::layer::{Site, SquaredScoreNorm, WeightNoise};
use crate::probe::rows::QueryRows;
use crate::probe::{Probe, trained_id};

impl<B: Backend> Probe<B> {
    /// A convolution (any stride, padding and dilation; one group) as a site.
    ///
    /// With more than one group the layer runs, but is no site: call it by [`site!`](crate::site).
    /// Its second axis is channels, so no [token mask](Self::masked) applies.
    ///
    /// # Shapes
    /// - x: `[rows, channels_in, height, width]`
    /// - returns: `[rows, channels_out, height_out, width_out]`
    pub fn conv2d(&mut self, layer: &Conv2d<B>, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let y = layer.forward(x.clone());
        let [_, channels, kernel_height, kernel_width] = layer.weight.dims();
        let shape = y.dims();
        let width = shape[1..].iter().product::<usize>();
        self.record_cost(width * channels * kernel_height * kernel_width, width);
        if layer.groups != 1 {
            return y;
        }
        let (weight, bias) = (layer.weight.id, layer.bias.as_ref().map(|b| b.id));
        let parameters: Vec<ParamId> = [Some(weight), bias].into_iter().flatten().collect();
        let site = |trained: &HashSet<ParamId>| {
            let dtype = ops::accum_dtype::<B>();
            Conv2dSite {
                x: padded(layer, x).cast(dtype),
                kernel: layer.weight.val().cast(dtype),
                stride: layer.stride,
                dilation: layer.dilation,
                output: [shape[2], shape[3]],
                weight: trained_id(trained, weight),
                bias: bias.and_then(|id| trained_id(trained, id)),
            }
        };
        self.unmasked(|probe| probe.site(&parameters, y, site))
    }
}

/// `x` with the zeros that the layer puts around it.
fn padded<B: Backend>(layer: &Conv2d<B>, x: Tensor<B, 4>) -> Tensor<B, 4> {
    let [_, _, height, width] = x.dims();
    // Burn resolves `Same` as ONNX does, the odd pixel at the end; its own function for it is
    // private
    let same = |size: usize, kernel: usize, stride: usize| {
        let total = ((size.div_ceil(stride).max(1) - 1) * stride + kernel).saturating_sub(size);
        (total / 2, total - total / 2)
    };
    let ((top, bottom), (left, right)) = match &layer.padding {
        PaddingConfig2d::Valid => ((0, 0), (0, 0)),
        PaddingConfig2d::Same => {
            (same(height, layer.kernel_size[0], layer.stride[0]), same(width, layer.kernel_size[1], layer.stride[1]))
        }
        PaddingConfig2d::Explicit(top, left, bottom, right) => ((*top, *bottom), (*left, *right)),
    };
    if top + bottom + left + right > 0 { x.pad((left, right, top, bottom), 0.0) } else { x }
}

struct Conv2dSite<B: Backend> {
    /// Padded, `[rows, channels_in, height, width]`
    x: Tensor<B, 4>,
    /// `[channels_out, channels_in, kernel_height, kernel_width]`
    kernel: Tensor<B, 4>,
    stride: [usize; 2],
    dilation: [usize; 2],
    /// Height and width of the output.
    output: [usize; 2],
    weight: Option<ParamId>,
    bias: Option<ParamId>,
}

impl<B: Backend> Conv2dSite<B> {
    fn options(&self) -> ConvOptions<2> {
        ConvOptions::new(self.stride, [0, 0], self.dilation, 1)
    }

    fn channels_out(&self) -> usize {
        self.kernel.dims()[0]
    }
}

impl<B: Backend> Site<B> for Conv2dSite<B> {
    fn backward(&self, g: Tensor<B, 2>, gradients: &mut Gradients<B>) {
        let (rows, channels, [height, width]) = (g.dims()[0], self.channels_out(), self.output);
        if let Some(id) = self.bias {
            let sums = g.clone().reshape([rows, channels, height * width]).sum_dim(2).sum_dim(0);
            gradients.add(id, sums.reshape([channels]));
        }
        if let Some(id) = self.weight {
            let kernel = B::conv2d_weight_backward(
                self.x.clone().into_primitive().tensor(),
                self.kernel.clone().into_primitive().tensor(),
                g.reshape([rows, channels, height, width]).into_primitive().tensor(),
                self.options(),
            );
            gradients.add(id, Tensor::<B, 4>::from_primitive(TensorPrimitive::Float(kernel)));
        }
    }

    /// channels_out·(Σ ‖patch‖² + P), over the P patches of a row, the P for the bias.
    fn squared_score_norm(&self) -> SquaredScoreNorm<B> {
        let (channels, [height, width]) = (self.channels_out(), self.output);
        let norm = match self.weight {
            Some(_) => {
                let [_, c_in, kernel_height, kernel_width] = self.kernel.dims();
                let ones =
                    Tensor::<B, 4>::ones([1, c_in, kernel_height, kernel_width], (&self.x.device(), self.x.dtype()));
                let patches = conv2d(self.x.clone().powi_scalar(2), ones, None, self.options());
                let rows = self.x.dims()[0];
                let sums = patches.reshape([rows, height * width]).sum_dim(1);
                SquaredScoreNorm { squares: Some(sums), factor: channels as f64, constant: 0.0 }
            }
            None => SquaredScoreNorm::constant(0.0),
        };
        norm.plus(if self.bias.is_some() { (channels * height * width) as f64 } else { 0.0 })
    }

    fn weight_noise(&self) -> Option<&dyn WeightNoise<B>> {
        Some(self)
    }
}

/// The weight is a matrix from patches to channels.
impl<B: Backend> WeightNoise<B> for Conv2dSite<B> {
    fn matrix_shape(&self) -> Option<[usize; 2]> {
        let [c_out, c_in, height, width] = self.kernel.dims();
        self.weight.map(|_| [c_in * height * width, c_out])
    }

    fn vector_elements(&self) -> usize {
        self.bias.map_or(0, |_| self.channels_out())
    }

    fn perturb(
        &self,
        y: Tensor<B, 2>,
        factors: Option<(Tensor<B, 3>, Tensor<B, 3>)>,
        vectors: Option<Tensor<B, 2>>,
        rows: &QueryRows,
    ) -> Tensor<B, 2> {
        let ([n, coordinates], channels) = (y.dims(), self.channels_out());
        let mut y = y;
        if let Some((a, b)) = factors {
            let [_, _, height, width] = self.kernel.dims();
            let options = UnfoldOptions::new(self.stride, [0, 0], self.dilation);
            let patches = unfold4d(self.x.clone(), [height, width], options).swap_dims(1, 2);
            let side = rows.repeat(patches).matmul(a).matmul(b);
            y = y + side.swap_dims(1, 2).reshape([n, coordinates]);
        }
        if let Some(bias) = vectors {
            let y3: Tensor<B, 3> = y.reshape([n, channels, coordinates / channels.max(1)]);
            y = (y3 + bias.reshape([n, channels, 1])).reshape([n, coordinates]);
        }
        y
    }

    fn add_gradients(&self, matrix: Option<Tensor<B, 2>>, vectors: Option<Tensor<B, 1>>, gradients: &mut Gradients<B>) {
        if let (Some(id), Some(matrix)) = (self.weight, matrix) {
            gradients.add(id, matrix.transpose().reshape(self.kernel.dims()));
        }
        if let (Some(id), Some(bias)) = (self.bias, vectors) {
            gradients.add(id, bias);
        }
    }
}
