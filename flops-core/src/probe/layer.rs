//! What a layer has to say of itself to be a site.

use burn::prelude::*;

use super::gradients::Gradients;
use super::rows::QueryRows;
use crate::ops;

/// A layer at a site: the clean input that its gradients are products of, and how they follow.
///
/// Noise ε falls on the output y of the layer, independent for every row. A query with coefficient
/// c estimates the gradient of the loss with respect to y by c·s(ε). The library sums these over
/// the queries of an example, and [`backward`](Self::backward) multiplies the sum into the
/// gradients of the parameters. That is the vector-Jacobian product of this one layer at its clean
/// input.
///
/// Built-in layers ([`Probe::linear`](super::Probe::linear) and its siblings) implement it, one
/// file each. A layer of your own does the same, and [`check_site`](super::check_site) tests it:
///
/// ```
/// use burn::module::{Param, ParamId};
/// use burn::prelude::*;
/// use flops_core::ops::accum_dtype;
/// use flops_core::probe::{Gradients, Probe, Site, SquaredScoreNorm, trained_id};
///
/// /// y = γ ⊙ x + β, the same γ and β for all tokens.
/// #[derive(Module, Debug)]
/// struct Affine<B: Backend> {
///     gamma: Param<Tensor<B, 1>>,
///     beta: Param<Tensor<B, 1>>,
/// }
///
/// impl<B: Backend> Affine<B> {
///     /// x: `[rows, tokens, d]`
///     fn forward(&self, x: Tensor<B, 3>, probe: &mut Probe<B>) -> Tensor<B, 3> {
///         let y = x.clone() * self.gamma.val().unsqueeze() + self.beta.val().unsqueeze();
///         let [_, tokens, d] = y.dims();
///         probe.record_cost(tokens * d, tokens * d); // before the site, in every pass
///         probe.site(&[self.gamma.id, self.beta.id], y, |trained| AffineSite {
///             x: x.cast(accum_dtype::<B>()),
///             gamma: trained_id(trained, self.gamma.id),
///             beta: trained_id(trained, self.beta.id),
///         })
///     }
/// }
///
/// struct AffineSite<B: Backend> {
///     x: Tensor<B, 3>,
///     // `None` where the parameter is frozen
///     gamma: Option<ParamId>,
///     beta: Option<ParamId>,
/// }
///
/// impl<B: Backend> Site<B> for AffineSite<B> {
///     fn backward(&self, g: Tensor<B, 2>, gradients: &mut Gradients<B>) {
///         let ([_, _, d], g) = (self.x.dims(), g.reshape(self.x.dims()));
///         if let Some(id) = self.gamma {
///             gradients.add(id, (self.x.clone() * g.clone()).sum_dim(1).sum_dim(0).reshape([d]));
///         }
///         if let Some(id) = self.beta {
///             gradients.add(id, g.sum_dim(1).sum_dim(0).reshape([d]));
///         }
///     }
///
///     fn squared_score_norm(&self) -> SquaredScoreNorm<B> {
///         let [_, tokens, d] = self.x.dims();
///         let norm = match self.gamma {
///             Some(_) => SquaredScoreNorm::of_inputs(self.x.clone(), 1.0), // Σ x², token by token
///             None => SquaredScoreNorm::constant(0.0),
///         };
///         norm.plus(if self.beta.is_some() { (tokens * d) as f64 } else { 0.0 })
///     }
/// }
/// ```
///
/// Models of 16 bits are why the kept tensors are cast to [`accum_dtype`](crate::ops::accum_dtype):
/// sums over many rows are formed in it.
pub trait Site<B: Backend>: Send + 'static {
    /// Adds the gradients of Σ ⟨g, y⟩ for the trained parameters of the layer.
    ///
    /// Each has the [shape of its parameter](Gradients::add). Gradients of frozen parameters are
    /// dropped. Under a [token mask](super::Probe::masked) g is 0 at masked tokens.
    ///
    /// # Shapes
    /// - g: `[rows, coordinates]`, the rows of the kept input; coordinates are those of a row of y,
    ///   flattened
    fn backward(&self, g: Tensor<B, 2>, gradients: &mut Gradients<B>);

    /// The expected squared norm of all gradients that [`backward`](Self::backward) forms for a
    /// row.
    ///
    /// The entries of g are independent there, with mean 0 and variance 1. So it is Σ_k
    /// ‖backward(e_k)‖² over the unit vectors e_k, for the trained parameters alone. Of an output
    /// with tokens it tells each token's part (see [`SquaredScoreNorm`]).
    ///
    /// Times c²·E s² it stands for the squared norm of a single-query estimate, which allocation is
    /// decided by. Coefficient and norm are taken for independent: see
    /// [`Estimate::second_moments`](crate::estimator::Estimate::second_moments).
    fn squared_score_norm(&self) -> SquaredScoreNorm<B>;

    /// How noise falls on the layer's own parameters ([`Space::LowRank`](crate::Space::LowRank)).
    ///
    /// `None`, the default: it falls on the output instead, as in the activation space.
    fn weight_noise(&self) -> Option<&dyn WeightNoise<B>> {
        None
    }

    /// Whether the output does not depend on the input, as that of a bare parameter; `false` is
    /// always right.
    ///
    /// Noise of low rank asks it where [`weight_noise`](Self::weight_noise) is `None`: one recorded
    /// row is then enough for all examples.
    fn is_constant(&self) -> bool {
        false
    }

    /// Signs u of the trained parameters, where the [norm](Self::squared_score_norm) is an estimate.
    ///
    /// The squared norm of the derivative J of a row is costly for some layers. ‖J u‖² is cheap, and
    /// over random signs its mean is that norm. A layer that gives it returns u here, and
    /// [`check_site`](super::check_site) compares it with `backward`. `None`, the default: the norm
    /// is exact.
    fn norm_direction(&self) -> Option<Gradients<B>> {
        None
    }

    /// The relative difference between the output of the pass and the one that
    /// [`backward`](Self::backward) differentiates, where it is more than rounding.
    ///
    /// `None`, the default, is right where both are the same computation. The
    /// [check](crate::estimator::CleanPass::check_sites) of a first step asks for it.
    fn mismatch(&self) -> Option<f64> {
        None
    }
}

/// How noise of low rank moves the output of a layer, and what gradient follows.
///
/// A weight W `[left, right]` becomes W + σ·A·B/√r for each row. Any two-dimensional view of the
/// weight will do, as long as all methods use the same one: a convolution's is `[patch, channels]`.
/// A layer has one such matrix; call [`Probe::site`](super::Probe::site) twice for two, each time with
/// the parameters of that one. Calls with the same parameters and the same type of site are calls of one
/// layer, and share their noise.
///
/// Vectors, such as a bias or a scale, get noise of their own, the same for all tokens of a row.
/// Their order is the layer's choice, the same in all methods.
///
/// Matrix and vectors together have to cover every trained parameter: one that is left out gets no
/// gradient.
pub trait WeightNoise<B: Backend> {
    /// `[left, right]` of the weight seen as a matrix; `None` where it is frozen or a vector.
    fn matrix_shape(&self) -> Option<[usize; 2]>;

    /// Elements of the trained vectors, all together.
    fn vector_elements(&self) -> usize;

    /// Adds to the clean output `y` what the noise changes.
    ///
    /// # Shapes
    /// - y: `[rows, coordinates]`, a row for each query
    /// - factors: A `[rows, left, rank]` and B `[rows, rank, right]`, which holds σ and 1/√rank;
    ///   given where [`matrix_shape`](Self::matrix_shape) is
    /// - vectors: `[rows, vector_elements]`, with σ; given where there are any
    /// - rows: [`repeat`](QueryRows::repeat) gives a tensor with a row per example one per query
    /// - returns: `[rows, coordinates]`
    fn perturb(
        &self,
        y: Tensor<B, 2>,
        factors: Option<(Tensor<B, 3>, Tensor<B, 3>)>,
        vectors: Option<Tensor<B, 2>>,
        rows: &QueryRows,
    ) -> Tensor<B, 2>;

    /// Adds finished gradients to those of the layer's parameters.
    ///
    /// # Shapes
    /// - matrix: `[left, right]`
    /// - vectors: `[vector_elements]`
    fn add_gradients(&self, matrix: Option<Tensor<B, 2>>, vectors: Option<Tensor<B, 1>>, gradients: &mut Gradients<B>);
}

/// E‖∂‖² of each row at a site: constant + factor·Σ squares.
///
/// Under a [token mask](super::Probe::masked) only the part of the real tokens counts. So the norm
/// also says how it is spread over the tokens of the output, its second axis of three or more. The
/// squares stay on the device; they are read once for all sites of a step.
#[derive(Clone, Debug)]
pub struct SquaredScoreNorm<B: Backend> {
    /// What differs from row to row; nothing where all rows have the same norm.
    ///
    /// `[rows, tokens]`, each token's part, or `[rows, tokens · parts]`, several parts of each, token
    /// by token. `[rows, 1]` will do where the output has no tokens, or its site is never called
    /// under a mask.
    pub squares: Option<Tensor<B, 2>>,
    /// Factor of the squares.
    pub factor: f64,
    /// What is the same for all rows. All tokens have the same share of it.
    pub constant: f64,
}

impl<B: Backend> SquaredScoreNorm<B> {
    /// The same for all rows, and for all tokens of a row.
    #[must_use]
    pub fn constant(constant: f64) -> Self {
        Self { squares: None, factor: 1.0, constant }
    }

    /// factor·‖x‖² of each row of the input `x`.
    ///
    /// # Shapes
    /// - x: `[rows, tokens, …]`, with the tokens of the output; or `[rows, d]`, without tokens
    #[must_use]
    pub fn of_inputs<const D: usize>(x: Tensor<B, D>, factor: f64) -> Self {
        let shape = x.dims();
        let (rows, tokens) = (shape[0], if D > 2 { shape[1] } else { 1 });
        let all = rows * tokens;
        let parts = shape.iter().product::<usize>() / all.max(1);
        if D > 2 && !ops::is_host::<B>(&x.device()) {
            // one sum less to launch: that over the parts of a token is taken with the one over the tokens
            let squares = x.reshape([rows, tokens * parts]).powi_scalar(2);
            return Self { squares: Some(squares), factor, constant: 0.0 };
        }
        let flat: Tensor<B, 2> = x.reshape([all, parts]);
        let squares = flat.powi_scalar(2).sum_dim(1).reshape([rows, tokens]);
        Self { squares: Some(squares), factor, constant: 0.0 }
    }

    /// The same norm with `constant` more for every row, spread evenly over its tokens.
    #[must_use]
    pub fn plus(mut self, constant: f64) -> Self {
        self.constant += constant;
        self
    }
}
