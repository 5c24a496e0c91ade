//! Parameter groups: a part of the model with a learning rate of its own.

use std::collections::HashSet;
use std::marker::PhantomData;

use burn::module::{AutodiffModule, Module, ModuleVisitor, Param, ParamId};
use burn::optim::{GradientsParams, MultiGradientsParams, Optimizer};
use burn::prelude::*;
use burn::tensor::backend::AutodiffBackend;

use crate::error::Error;
use crate::parameters::parameters;

/// Parameters that learn at a multiple of the learning rate, such as a new head on a pretrained
/// model.
///
/// They are found by the path of their module: the ids of parameters change where a checkpoint is
/// loaded.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamGroup {
    /// Each is names of fields from the optimised module down: `["model", "head"]` is the head of a
    /// learner's model.
    pub paths: Vec<Vec<String>>,
    /// Their learning rate as a multiple of the optimizer's; 1 changes nothing.
    pub lr_factor: f64,
}

impl ParamGroup {
    /// Makes a group of the parameters below `path`, field names joined by dots.
    ///
    /// A learner holds its model in the field `model`: the path of the model's head is
    /// `"model.head"`. A path that no parameter lies below is an empty group:
    /// [`check`](Self::check) finds that.
    #[must_use]
    pub fn new(path: &str, lr_factor: f64) -> Self {
        Self { paths: vec![], lr_factor }.and(path)
    }

    /// The group with the parameters below another path.
    #[must_use]
    pub fn and(mut self, path: &str) -> Self {
        self.paths.push(path.split('.').map(String::from).collect());
        self
    }

    /// Checks that the group has parameters in `module`, and that its rate is a positive number.
    ///
    /// # Errors
    /// [`Error::EmptyParamGroup`] or [`Error::Setting`].
    pub fn check<B: Backend, M: Module<B>>(&self, module: &M) -> Result<(), Error> {
        if !(self.lr_factor.is_finite() && self.lr_factor > 0.0) {
            let remedy = "use a positive number".to_string();
            return Err(Error::Setting { name: "lr_factor", value: self.lr_factor, remedy });
        }
        if self.members(module).is_empty() {
            let paths: Vec<String> = self.paths.iter().map(|path| path.join(".")).collect();
            return Err(Error::EmptyParamGroup { path: paths.join(", ") });
        }
        Ok(())
    }

    /// The parameters of `module` below the group's path.
    fn members<B: Backend, M: Module<B>>(&self, module: &M) -> HashSet<ParamId> {
        let is_below = |path: &[String]| self.paths.iter().any(|group| path.starts_with(group));
        parameters::<B, M>(module).into_iter().filter(|p| is_below(&p.path)).map(|p| p.id).collect()
    }
}

/// An optimizer that updates each [`ParamGroup`] at its own learning rate.
///
/// Burn's optimizers have one rate for all parameters. This one calls the inner optimizer several
/// times in a step: with the gradients of each group, and with those of the other parameters. A
/// parameter of several groups belongs to the first. The record is the inner optimizer's, so that
/// checkpoints can be exchanged.
///
/// # Example
/// ```
/// use burn::backend::{Autodiff, Flex};
/// use burn::nn::{Linear, LinearConfig};
/// use burn::optim::{AdamWConfig, GradientsParams, Optimizer};
/// use flops_core::train::param_groups::{GroupedOptimizer, ParamGroup};
///
/// type B = Autodiff<Flex>;
/// let model: Linear<B> = LinearConfig::new(2, 3).init(&Default::default());
/// // the bias learns ten times as fast
/// let group = ParamGroup::new("bias", 10.0);
/// let mut optimizer = GroupedOptimizer::new(AdamWConfig::new().init::<B, Linear<B>>(), [group]);
/// let loss = model.weight.val().sum();
/// let grads = GradientsParams::from_grads(loss.backward(), &model);
/// let model = optimizer.step(1e-3, model, grads);
/// # let _ = model;
/// ```
#[derive(Clone, Debug)]
pub struct GroupedOptimizer<O> {
    /// The optimizer of all parameters.
    pub inner: O,
    /// The parameters with a learning rate of their own.
    pub groups: Vec<ParamGroup>,
}

impl<O> GroupedOptimizer<O> {
    /// Wraps `inner`.
    #[must_use]
    pub fn new(inner: O, groups: impl IntoIterator<Item = ParamGroup>) -> Self {
        Self { inner, groups: groups.into_iter().collect() }
    }

    /// Moves a group's gradients out of `grads`.
    fn split<M: AutodiffModule<B>, B: AutodiffBackend>(
        group: &ParamGroup,
        module: &M,
        grads: &mut GradientsParams,
    ) -> GradientsParams {
        struct Split<'a, B> {
            group: HashSet<ParamId>,
            from: &'a mut GradientsParams,
            to: GradientsParams,
            backend: PhantomData<B>,
        }
        impl<B: AutodiffBackend> ModuleVisitor<B> for Split<'_, B> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
                if self.group.contains(&param.id)
                    && let Some(grad) = self.from.remove::<B::InnerBackend, D>(param.id)
                {
                    self.to.register::<B::InnerBackend, D>(param.id, grad);
                }
            }
        }
        let mut split =
            Split::<B> { group: group.members(module), from: grads, to: GradientsParams::new(), backend: PhantomData };
        module.visit(&mut split);
        split.to
    }
}

impl<M: AutodiffModule<B>, B: AutodiffBackend, O: Optimizer<M, B>> Optimizer<M, B> for GroupedOptimizer<O> {
    type Record = O::Record;

    fn step(&mut self, lr: f64, module: M, mut grads: GradientsParams) -> M {
        let Self { inner, groups } = self;
        let of_groups: Vec<_> = groups.iter().map(|group| Self::split(group, &module, &mut grads)).collect();
        let module = inner.step(lr, module, grads);
        let step = |module, (group, grads): (&ParamGroup, _)| inner.step(lr * group.lr_factor, module, grads);
        groups.iter().zip(of_groups).fold(module, step)
    }

    fn step_multi(&mut self, lr: f64, module: M, mut grads: MultiGradientsParams) -> M {
        let Self { inner, groups } = self;
        let mut split = |group: &ParamGroup| {
            let parts = grads.grads.iter_mut().map(|(grads, device)| (Self::split(group, &module, grads), *device));
            MultiGradientsParams { grads: parts.collect() }
        };
        let of_groups: Vec<_> = groups.iter().map(&mut split).collect();
        let module = inner.step_multi(lr, module, grads);
        let step = |module, (group, grads): (&ParamGroup, _)| inner.step_multi(lr * group.lr_factor, module, grads);
        groups.iter().zip(of_groups).fold(module, step)
    }

    fn to_record(&self) -> Self::Record {
        self.inner.to_record()
    }

    fn load_record(self, record: Self::Record) -> Self {
        Self { inner: self.inner.load_record(record), groups: self.groups }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use burn::backend::{Autodiff, Flex};
    use burn::nn::{Linear, LinearConfig};
    use burn::optim::SgdConfig;

    type AB = Autodiff<Flex>;

    #[derive(Module, Debug)]
    struct Net<B: Backend> {
        body: Linear<B>,
        head: Linear<B>,
    }

    #[test]
    fn errors_name_the_path_and_the_rate() {
        let layer = || LinearConfig::new(1, 1).init(&Default::default());
        let net = Net::<AB> { body: layer(), head: layer() };
        let check = |path, factor| ParamGroup::new(path, factor).check(&net).map_err(|e| e.to_string());
        assert_eq!(check("head", 4.0), Ok(()));
        assert_eq!(check("head.bias", 0.5), Ok(()));
        assert!(check("model.head", 4.0).unwrap_err().contains("'model.head'"));
        let both = ParamGroup::new("no.such", 1.0).and("head");
        assert_eq!(both.check(&net), Ok(()), "one path is enough");
        assert!(check("hea", 4.0).unwrap_err().contains("'hea'"));
        for factor in [0.0, -1.0, f64::NAN] {
            assert!(check("head", factor).unwrap_err().contains("lr_factor"));
        }
    }

    #[test]
    fn groups_step_at_their_multiples_of_the_rate() {
        let device = Default::default();
        let layer = || LinearConfig::new(1, 1).init(&device);
        let net = Net::<AB> { body: layer(), head: layer() };
        // what is in several groups belongs to the first
        let groups = [ParamGroup::new("head", 4.0), ParamGroup::new("head", 9.0).and("body.bias")];
        let mut optimizer = GroupedOptimizer::new(SgdConfig::new().init::<AB, Net<AB>>(), groups);
        let bias = |layer: &Linear<AB>| layer.bias.as_ref().unwrap().val().sum();
        let loss = net.body.weight.val().sum() + net.head.weight.val().sum() + bias(&net.body);
        let grads = GradientsParams::from_grads(loss.backward(), &net);
        let before = net.valid();
        let after = optimizer.step(0.1, net, grads).valid();
        let moved =
            |a: &Linear<Flex>, b: &Linear<Flex>| -> f32 { (a.weight.val() - b.weight.val()).into_scalar().elem() };
        assert!((moved(&before.body, &after.body) - 0.1).abs() < 1e-6);
        assert!((moved(&before.head, &after.head) - 0.4).abs() < 1e-6);
        let bias = |net: &Net<Flex>| -> f32 { net.body.bias.as_ref().unwrap().val().into_scalar().elem() };
        assert!((bias(&before) - bias(&after) - 0.9).abs() < 1e-6);
    }
}
