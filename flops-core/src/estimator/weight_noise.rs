//! The noise on each trained parameter: all of its coordinates, or a [subspace](Subspace).
//!
//! What is drawn for a query is U `[R, outputs]`, and the noise is B·U/√R. A query's score is that of
//! U, lifted the same way. The basis B is a constant of the step, so Σ_q w_q s(U_q) is formed first,
//! and one product lifts the sum.

use std::collections::HashSet;

use burn::module::{ModuleVisitor, Param, ParamId};
use burn::prelude::*;
use burn::tensor::DType;

use super::packing::Packing;
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
    /// Those that lie side by side, on a device that makes noise. Their noise comes before that of the others.
    pub packing: Packing,
    /// The device of the first of them; `None` without any.
    pub device: Option<B::Device>,
}

impl<B: Backend> Default for WeightNoise<B> {
    fn default() -> Self {
        Self { parameters: vec![], packing: Packing::default(), device: None }
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
        let parameters = self.parameters.into_iter().map(to).collect();
        Self { parameters, packing: self.packing, device: Some(device.clone()) }
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
        let found = Self::default();
        let mut find = Find { trained, estimator, subspace, step, on_device, found, dtypes: vec![] };
        model.visit(&mut find);
        let (mut found, dtypes) = (find.found, find.dtypes);
        if on_device {
            let lens = found.parameters.iter().zip(&dtypes).map(|((_, lift), dtype)| match lift {
                Lift::Full(len) if dtypes.first() == Some(dtype) => Some(*len),
                _ => None,
            });
            found.packing = Packing::new(&lens.collect::<Vec<_>>());
        }
        found
    }

    /// Values that a direction draws, with those between packed parameters.
    pub fn drawn(&self) -> usize {
        let alone = self.parameters.iter().enumerate().filter(|(site, _)| self.packing.place(*site).is_none());
        self.packing.len() + alone.map(|(_, (_, lift))| lift.drawn()).sum::<usize>()
    }

    /// The packed parameters of `model`, side by side; `None` where there are none.
    pub fn packed<M: ForwardModel<B>>(&self, model: &M) -> Option<Tensor<B, 1>> {
        let mut pack = Pack { of: self, site: 0, values: None };
        model.visit(&mut pack);
        pack.values
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
    /// The precision of each parameter that was found.
    dtypes: Vec<DType>,
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
        self.dtypes.push(value.dtype());
        self.found.parameters.push((param.id, lift));
        self.found.device.get_or_insert(device);
    }
}

struct Pack<'a, B: Backend> {
    of: &'a WeightNoise<B>,
    /// Number of the next trained parameter.
    site: usize,
    values: Option<Tensor<B, 1>>,
}

impl<B: Backend> ModuleVisitor<B> for Pack<'_, B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let (of, site) = (self.of, self.site);
        let Some((_, lift)) = of.parameters.get(site).filter(|(id, _)| *id == param.id) else { return };
        self.site += 1;
        let (Some(place), value, len) = (of.packing.place(site), param.val(), lift.len()) else { return };
        let (start, _) = of.packing.places()[place];
        let options = (&value.device(), value.dtype());
        let values = self.values.take().unwrap_or_else(|| Tensor::zeros([of.packing.len()], options));
        self.values = Some(values.slice_assign(start..start + len, value.reshape([len])));
    }
}
