//! What a site keeps from the clean pass, and the gradients that follow from it.

use burn::module::ParamId;
use burn::nn::conv::Conv2d;
use burn::nn::{LayerNorm, PaddingConfig2d};
use burn::prelude::*;
use burn::tensor::TensorPrimitive;
use burn::tensor::ops::ConvOptions;

use crate::ops;

/// The clean input of a site, in the form its gradient is a product of.
pub(crate) enum SiteInput<B: Backend> {
    /// x: `[rows · tokens, d_in]`
    Linear { x: Tensor<B, 2> },
    /// (x − mean)/√(variance + ε): `[rows · tokens, d]`
    Norm { normalised: Tensor<B, 2> },
    /// x, padded: `[rows, channels_in, height, width]`
    Conv { x: Tensor<B, 4>, weight: Tensor<B, 4>, stride: [usize; 2], dilation: [usize; 2] },
    /// ids: `[rows, tokens]`
    Embedding { ids: Tensor<B, 2, Int>, table: Tensor<B, 2> },
    /// A parameter that is its own output.
    Parameter,
}

impl<B: Backend> SiteInput<B> {
    pub fn norm<const D: usize>(layer: &LayerNorm<B>, x: Tensor<B, D>) -> Self {
        let d = x.dims()[D - 1];
        let tokens: usize = x.dims()[..D - 1].iter().product();
        let mut unit = layer.clone();
        unit.gamma = unit.gamma.map(|g| g.ones_like());
        unit.beta = None;
        Self::Norm { normalised: unit.forward(x.reshape([tokens, d])) }
    }

    /// The same in the precision that products and sums of many rows need, whatever the model's is.
    pub fn working(self) -> Self {
        let dtype = ops::working::<B>();
        match self {
            Self::Linear { x } => Self::Linear { x: x.cast(dtype) },
            Self::Norm { normalised } => Self::Norm { normalised: normalised.cast(dtype) },
            Self::Conv { x, weight, stride, dilation } => {
                Self::Conv { x: x.cast(dtype), weight: weight.cast(dtype), stride, dilation }
            }
            Self::Embedding { ids, table } => Self::Embedding { ids, table: table.cast(dtype) },
            Self::Parameter => Self::Parameter,
        }
    }

    pub fn conv(layer: &Conv2d<B>, x: Tensor<B, 4>) -> Self {
        let [_, _, height, width] = x.dims();
        // Burn resolves `Same` as ONNX does, the odd pixel at the end; its own function for it is private
        let same = |size: usize, kernel: usize, stride: usize| {
            let total = ((size.div_ceil(stride).max(1) - 1) * stride + kernel).saturating_sub(size);
            (total / 2, total - total / 2)
        };
        let ((top, bottom), (left, right)) = match &layer.padding {
            PaddingConfig2d::Valid => ((0, 0), (0, 0)),
            PaddingConfig2d::Same => (
                same(height, layer.kernel_size[0], layer.stride[0]),
                same(width, layer.kernel_size[1], layer.stride[1]),
            ),
            PaddingConfig2d::Explicit(top, left, bottom, right) => ((*top, *bottom), (*left, *right)),
        };
        let x = if top + bottom + left + right > 0 { x.pad((left, right, top, bottom), 0.0) } else { x };
        Self::Conv { x, weight: layer.weight.val(), stride: layer.stride, dilation: layer.dilation }
    }
}

/// A site of a recorded pass.
pub(crate) struct Site<B: Backend> {
    /// The trained parameters of the layer; frozen ones are `None`.
    pub weight: Option<ParamId>,
    pub bias: Option<ParamId>,
    /// Shape of the clean output, the rows first.
    pub shape: Vec<usize>,
    pub device: B::Device,
    pub input: SiteInput<B>,
}

impl<B: Backend> Site<B> {
    pub fn device(&self) -> B::Device {
        self.device.clone()
    }

    /// Whether gradients of noise on the parameters themselves depend on what each row saw: an embedding's do, on the rows looked up.
    pub fn needs_every_row(&self) -> bool {
        matches!(self.input, SiteInput::Embedding { .. })
    }

    /// Perturbed coordinates of one row.
    pub fn len(&self) -> usize {
        self.shape[1..].iter().product()
    }

    /// E‖∂‖²/(c²·E s²) of each datum: the squared norm of a query's gradient estimate per squared coefficient.
    ///
    /// For a linear layer it is d_out·(‖x_j‖² + T), the T for the bias; alike for the others.
    pub fn energy(&self, data: usize) -> Energy<B> {
        let len = self.len() as f64;
        let mut out = Energy { squares: None, factor: 1.0, constant: if self.bias.is_some() { len } else { 0.0 } };
        let per_row = |t: Tensor<B, 2>| -> Tensor<B, 1> {
            let n = t.shape().num_elements() / data.max(1);
            t.reshape([data, n]).powi_scalar(2).sum_dim(1).reshape([data])
        };
        if self.weight.is_some() {
            match &self.input {
                SiteInput::Linear { x } => {
                    (out.squares, out.factor) = (Some(per_row(x.clone())), *self.shape.last().unwrap_or(&1) as f64)
                }
                SiteInput::Norm { normalised } => out.squares = Some(per_row(normalised.clone())),
                SiteInput::Conv { x, weight, stride, dilation } => {
                    let [c_out, c_in, kh, kw] = weight.dims();
                    let ones = Tensor::<B, 4>::ones([1, c_in, kh, kw], (&x.device(), x.dtype()));
                    let patches = burn::tensor::module::conv2d(
                        x.clone().powi_scalar(2),
                        ones,
                        None,
                        ConvOptions::new(*stride, [0, 0], *dilation, 1),
                    );
                    let n = patches.shape().num_elements() / data.max(1);
                    let sums = patches.reshape([data, n]).sum_dim(1).reshape([data]);
                    (out.squares, out.factor) = (Some(sums), c_out as f64);
                }
                SiteInput::Embedding { .. } | SiteInput::Parameter => out.constant += len,
            }
        }
        out
    }

    /// Adds the gradients that follow from the gradient `g` of the loss with respect to this site's output.
    ///
    /// # Shapes
    /// - g: `[rows, len]`, the weights of data and queries already in it
    pub fn backward(&self, g: Tensor<B, 2>, grads: &mut Gradients<B>) {
        let rows = g.dims()[0];
        let last = *self.shape.last().unwrap_or(&1);
        match &self.input {
            SiteInput::Linear { x } => {
                let tokens = rows * self.len() / last.max(1);
                let g = g.reshape([tokens, last]);
                if let Some(id) = self.weight {
                    grads.add(id, x.clone().transpose().matmul(g.clone()));
                }
                if let Some(id) = self.bias {
                    grads.add(id, g.sum_dim(0));
                }
            }
            SiteInput::Norm { normalised } => {
                let tokens = rows * self.len() / last.max(1);
                let g = g.reshape([tokens, last]);
                if let Some(id) = self.weight {
                    grads.add(id, (normalised.clone() * g.clone()).sum_dim(0));
                }
                if let Some(id) = self.bias {
                    grads.add(id, g.sum_dim(0));
                }
            }
            SiteInput::Conv { x, weight, stride, dilation } => {
                let [c, h, w] = [self.shape[1], self.shape[2], self.shape[3]];
                if let Some(id) = self.bias {
                    grads.add(id, g.clone().reshape([rows, c, h * w]).sum_dim(2).sum_dim(0).reshape([1, c]));
                }
                if let Some(id) = self.weight {
                    let dw = B::conv2d_weight_backward(
                        x.clone().into_primitive().tensor(),
                        weight.clone().into_primitive().tensor(),
                        g.reshape([rows, c, h, w]).into_primitive().tensor(),
                        ConvOptions::new(*stride, [0, 0], *dilation, 1),
                    );
                    grads.add(id, Tensor::<B, 4>::from_primitive(TensorPrimitive::Float(dw)));
                }
            }
            SiteInput::Embedding { ids, table } => {
                if let Some(id) = self.weight {
                    let d = last;
                    let tokens = ids.dims()[1];
                    let dw = B::embedding_backward(
                        table.clone().into_primitive().tensor(),
                        g.reshape([rows, tokens, d]).into_primitive().tensor(),
                        ids.clone().into_primitive(),
                    );
                    grads.add(id, Tensor::<B, 2>::from_primitive(TensorPrimitive::Float(dw)));
                }
            }
            SiteInput::Parameter => {
                if let Some(id) = self.weight {
                    grads.add(id, g.sum_dim(0));
                }
            }
        }
    }
}

/// [`energy`](Site::energy) of the data of a pass at a site, constant + factor·squares, its squares not yet waited for.
pub(crate) struct Energy<B: Backend> {
    pub squares: Option<Tensor<B, 1>>,
    pub factor: f64,
    pub constant: f64,
}

/// Gradients per parameter, flat, summed as they come.
///
/// They stay in the order in which the parameters were first met, so that every step hands a device the same operations in the same order: one that
/// fuses them compiles a kernel for each order it has not seen.
#[derive(Clone)]
pub(crate) struct Gradients<B: Backend>(Vec<(ParamId, Tensor<B, 1>)>);

impl<B: Backend> Default for Gradients<B> {
    fn default() -> Self {
        Self(vec![])
    }
}

impl<B: Backend> Gradients<B> {
    /// Adds to the gradient of a parameter.
    pub fn add<const D: usize>(&mut self, id: ParamId, g: Tensor<B, D>) {
        let n = g.shape().num_elements();
        let g = g.reshape([n]);
        match self.at(id) {
            Some(at) => {
                // taken out, that it may be added to in place
                let (_, sum) = self.0.remove(at);
                self.0.insert(at, (id, sum + g));
            }
            None => self.0.push((id, g)),
        }
    }

    fn at(&self, id: ParamId) -> Option<usize> {
        self.0.iter().position(|(found, _)| *found == id)
    }

    /// The gradient of a parameter, flat.
    pub fn get(&self, id: ParamId) -> Option<&Tensor<B, 1>> {
        self.at(id).map(|at| &self.0[at].1)
    }

    /// The same, taken out.
    pub fn take(&mut self, id: ParamId) -> Option<Tensor<B, 1>> {
        self.at(id).map(|at| self.0.remove(at).1)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Tensor<B, 1>> {
        self.0.iter().map(|(_, g)| g)
    }

    /// All of them times `factor`.
    pub fn scaled(self, factor: f64) -> Self {
        Self(self.0.into_iter().map(|(id, g)| (id, g * factor)).collect())
    }

    /// Adds all of `other`.
    pub fn merge(&mut self, other: Self) {
        for (id, g) in other.0 {
            self.add(id, g);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Flex;

    #[test]
    fn gradients_are_sums_in_the_order_they_were_met() {
        let device = Default::default();
        let of = |value: f32| Tensor::<Flex, 2>::full([1, 2], value, &device);
        let ids: Vec<ParamId> = (0..50).map(|_| ParamId::new()).collect();
        let (mut sum, mut other) = (Gradients::default(), Gradients::default());
        ids.iter().for_each(|&id| sum.add(id, of(1.0)));
        ids.iter().rev().for_each(|&id| other.add(id, of(2.0)));
        sum.merge(other);
        sum.add(ids[7], of(4.0));
        let sums: Vec<f32> =
            sum.clone().scaled(0.5).iter().flat_map(|g| g.to_data().iter::<f32>().collect::<Vec<_>>()).collect();
        assert_eq!(sums, (0..100).map(|i| if i / 2 == 7 { 3.5 } else { 1.5 }).collect::<Vec<_>>());
        assert_eq!(sum.0.iter().map(|(id, _)| *id).collect::<Vec<_>>(), ids);
        assert!(sum.take(ids[3]).is_some() && sum.get(ids[3]).is_none());
        assert_eq!(sum.get(ids[4]).map(|g| g.dims()), Some([2]));
    }
}
