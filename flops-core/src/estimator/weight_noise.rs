//! The noise on each trained parameter: all of its coordinates, or a [subspace](Subspace).
//!
//! What is drawn for a query is U `[R, outputs]`, and the noise is B·U/√R. A query's score is that of
//! U, lifted the same way. The basis B is a constant of the step, so Σ_q w_q s(U_q) is formed first,
//! and one product lifts the sum.

use std::collections::HashSet;

use burn::module::{ModuleVisitor, Param, ParamId};
use burn::prelude::*;

use super::settings::Estimator;
use super::subspace::Subspace;
use crate::model::ForwardModel;
use crate::noise::{basis_seed, orthonormal_basis, random_basis};
use crate::ops;
use crate::parameters::matrix_sides;

/// From the values that are drawn for a parameter to the values of its noise.
#[derive(Clone, Debug)]
pub(super) enum Lift<B: Backend> {
    /// As many values as the parameter has.
    Full(usize),
    /// U of a basis.
    LowRank {
        /// B/√R, `[inputs, R]`.
        basis: Tensor<B, 2>,
        outputs: usize,
        /// Whether the parameter is `[inputs, outputs]`, or `[outputs, inputs]`.
        inputs_first: bool,
    },
}

impl<B: Backend> Lift<B> {
    /// Values that are drawn.
    pub fn drawn(&self) -> usize {
        match self {
            Self::Full(len) => *len,
            Self::LowRank { basis, outputs, .. } => basis.dims()[1] * outputs,
        }
    }

    /// Values of the parameter.
    pub fn len(&self) -> usize {
        match self {
            Self::Full(len) => *len,
            Self::LowRank { basis, outputs, .. } => basis.dims()[0] * outputs,
        }
    }

    /// The values of the parameter, from those that were drawn.
    pub fn apply(&self, drawn: Tensor<B, 1>) -> Tensor<B, 1> {
        match self {
            Self::Full(_) => drawn,
            Self::LowRank { basis, outputs, inputs_first } => {
                let [inputs, rank] = basis.dims();
                let product = basis.clone().matmul(drawn.reshape([rank, *outputs]));
                let product = if *inputs_first { product } else { product.transpose() };
                product.reshape([inputs * outputs])
            }
        }
    }
}

/// The trained parameters in the order of the model, with their noise.
#[derive(Clone, Debug)]
pub(super) struct WeightNoise<B: Backend> {
    pub parameters: Vec<(ParamId, Lift<B>)>,
    /// The device of the first of them; `None` without any.
    pub device: Option<B::Device>,
}

impl<B: Backend> Default for WeightNoise<B> {
    fn default() -> Self {
        Self { parameters: vec![], device: None }
    }
}

impl<B: Backend> WeightNoise<B> {
    /// The same noise for a model on another device.
    pub fn on(self, device: &B::Device) -> Self {
        let to = |(id, lift): (ParamId, Lift<B>)| match lift {
            Lift::LowRank { basis, outputs, inputs_first } => {
                (id, Lift::LowRank { basis: basis.to_device(device), outputs, inputs_first })
            }
            full => (id, full),
        };
        Self { parameters: self.parameters.into_iter().map(to).collect(), device: Some(device.clone()) }
    }

    /// The noise of `estimator` at a step.
    ///
    /// The bases follow from the estimator's own seed: pilots, accumulated steps and workers have
    /// other seeds, and share them.
    pub fn of<M: ForwardModel<B>>(
        model: &M,
        trained: &HashSet<ParamId>,
        (estimator, subspace): (&Estimator, Subspace),
        step: u64,
        on_device: bool,
    ) -> Self {
        let mut found = Find { trained, estimator, subspace, step, on_device, found: Self::default() };
        model.visit(&mut found);
        found.found
    }

    /// Values that a direction draws.
    pub fn drawn(&self) -> usize {
        self.parameters.iter().map(|(_, lift)| lift.drawn()).sum()
    }

    /// Trained values: E‖noise‖²/σ², whatever the rank.
    pub fn len(&self) -> usize {
        self.parameters.iter().map(|(_, lift)| lift.len()).sum()
    }
}

struct Find<'a, B: Backend> {
    trained: &'a HashSet<ParamId>,
    estimator: &'a Estimator,
    subspace: Subspace,
    step: u64,
    on_device: bool,
    found: WeightNoise<B>,
}

impl<B: Backend> Find<'_, B> {
    /// B/√R of the next parameter, or `None` where it gets full noise.
    fn lift(&self, shape: &[usize], device: &B::Device) -> Option<Lift<B>> {
        let (rank, period) = self.subspace.rank_and_period()?;
        let ([inputs, outputs], inputs_first) = matrix_sides(shape, rank)?;
        let seed = basis_seed(self.estimator.seed, self.step / period.max(1), self.found.parameters.len());
        let (law, shape) = (self.estimator.noise, [inputs, rank]);
        let basis: Tensor<B, 2> = match self.subspace {
            Subspace::Orthonormal { .. } => ops::from_host(orthonormal_basis(seed, shape), shape, device),
            _ if self.on_device => law.sample_on::<B>(seed, inputs * rank, device).reshape(shape),
            _ => ops::from_host(random_basis(law, seed, shape), shape, device),
        };
        Some(Lift::LowRank { basis: basis / (rank as f64).sqrt(), outputs, inputs_first })
    }
}

impl<B: Backend> ModuleVisitor<B> for Find<'_, B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if !self.trained.contains(&param.id) {
            return;
        }
        let value = param.val();
        let (device, shape) = (value.device(), value.dims());
        let lift = self.lift(&shape, &device).unwrap_or(Lift::Full(shape.iter().product()));
        self.found.parameters.push((param.id, lift));
        self.found.device.get_or_insert(device);
    }
}
