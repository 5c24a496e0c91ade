//! The site of a normalisation: y = γ·x̂ + β for each channel, x̂ the normalised input.

use burn::module::ParamId;
use burn::prelude::*;

use crate::probe::gradients::Gradients;
use crate::probe::layer::{Site, SquaredScoreNorm, WeightNoise};
use crate::probe::rows::QueryRows;

/// The clean pass of a normalisation, and which of its scale γ and shift β are trained.
pub(super) struct AffineSite<B: Backend> {
    /// x̂, `[rows, channels, values]` or `[rows, tokens, channels]`.
    pub normalised: Tensor<B, 3>,
    /// The axis of the channels, 1 or 2.
    pub axis: usize,
    pub gamma: Option<ParamId>,
    pub beta: Option<ParamId>,
}

impl<B: Backend> AffineSite<B> {
    fn channels(&self) -> usize {
        self.normalised.dims()[self.axis]
    }

    fn trained(&self) -> impl Iterator<Item = ParamId> {
        [self.gamma, self.beta].into_iter().flatten()
    }

    /// The sum over all axes but the channels'.
    fn sum(&self, x: Tensor<B, 3>) -> Tensor<B, 1> {
        let [n, a, b] = x.dims();
        match self.axis {
            1 => x.sum_dim(2).sum_dim(0).reshape([a]),
            _ => x.reshape([n * a, b]).sum_dim(0).reshape([b]),
        }
    }
}

impl<B: Backend> Site<B> for AffineSite<B> {
    fn backward(&self, g: Tensor<B, 2>, gradients: &mut Gradients<B>) {
        let g = g.reshape(self.normalised.dims());
        if let Some(id) = self.gamma {
            gradients.add(id, self.sum(self.normalised.clone() * g.clone()));
        }
        if let Some(id) = self.beta {
            gradients.add(id, self.sum(g));
        }
    }

    /// ‖x̂_j‖², plus the number of coordinates of an example for the shift.
    fn squared_score_norm(&self) -> SquaredScoreNorm<B> {
        let norm = match self.gamma {
            Some(_) => SquaredScoreNorm::of_inputs(self.normalised.clone(), 1.0),
            None => SquaredScoreNorm::constant(0.0),
        };
        let [_, a, b] = self.normalised.dims();
        norm.plus(if self.beta.is_some() { (a * b) as f64 } else { 0.0 })
    }

    fn weight_noise(&self) -> Option<&dyn WeightNoise<B>> {
        Some(self)
    }
}

/// Scale and shift get vectors of noise; there is no matrix.
impl<B: Backend> WeightNoise<B> for AffineSite<B> {
    fn matrix_shape(&self) -> Option<[usize; 2]> {
        None
    }

    fn vector_elements(&self) -> usize {
        self.trained().count() * self.channels()
    }

    fn perturb(
        &self,
        y: Tensor<B, 2>,
        _: Option<(Tensor<B, 3>, Tensor<B, 3>)>,
        vectors: Option<Tensor<B, 2>>,
        rows: &QueryRows,
    ) -> Tensor<B, 2> {
        let Some(vectors) = vectors else { return y };
        let ([n, coordinates], [_, a, b], channels) = (y.dims(), self.normalised.dims(), self.channels());
        let mut shape = [n, 1, 1];
        shape[self.axis] = channels;
        let part = |at: usize| vectors.clone().narrow(1, at, channels).reshape(shape);
        let mut y: Tensor<B, 3> = y.reshape([n, a, b]);
        if self.gamma.is_some() {
            y = y + rows.repeat(self.normalised.clone()) * part(0);
        }
        if self.beta.is_some() {
            y = y + part(if self.gamma.is_some() { channels } else { 0 });
        }
        y.reshape([n, coordinates])
    }

    fn add_gradients(&self, _: Option<Tensor<B, 2>>, vectors: Option<Tensor<B, 1>>, gradients: &mut Gradients<B>) {
        let (Some(vectors), channels) = (vectors, self.channels()) else { return };
        for (i, id) in self.trained().enumerate() {
            gradients.add(id, vectors.clone().narrow(0, i * channels, channels));
        }
    }
}
