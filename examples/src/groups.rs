//! Two learning rates in one optimizer: Burn's optimizers have one.

use std::marker::PhantomData;

use burn::module::{AutodiffModule, ModuleVisitor, Param};
use burn::optim::{GradientsParams, MultiGradientsParams, Optimizer};
use burn::prelude::*;
use burn::tensor::backend::AutodiffBackend;

/// Parameters that learn at a multiple of the learning rate, such as a new head on a pretrained model.
///
/// They are known by the path of their module, since ids change where a checkpoint is loaded.
#[derive(Clone, Debug)]
pub struct LrGroup {
    /// Field names from the learner down, such as `["model", "head"]`.
    pub path: Vec<&'static str>,
    /// Their share of the learning rate.
    pub factor: f64,
}

/// An optimizer that updates an [`LrGroup`] at its own rate; its record is that of the optimizer inside.
#[derive(Clone)]
pub struct Grouped<O> {
    /// The optimizer of all parameters.
    pub inner: O,
    /// Those with a rate of their own.
    pub group: LrGroup,
}

impl<O> Grouped<O> {
    /// Takes the group's gradients out of `grads`.
    fn split<M: AutodiffModule<B>, B: AutodiffBackend>(
        &self,
        module: &M,
        grads: &mut GradientsParams,
    ) -> GradientsParams {
        struct Split<'a, B> {
            group: &'a [&'static str],
            path: Vec<String>,
            from: &'a mut GradientsParams,
            to: GradientsParams,
            backend: PhantomData<B>,
        }
        impl<B: AutodiffBackend> ModuleVisitor<B> for Split<'_, B> {
            fn enter_module(&mut self, name: &str, _: &str) {
                self.path.push(name.into());
            }

            fn exit_module(&mut self, _: &str, _: &str) {
                self.path.pop();
            }

            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
                let inside =
                    self.path.len() >= self.group.len() && self.group.iter().zip(&self.path).all(|(a, b)| a == b);
                if inside && let Some(grad) = self.from.remove::<B::InnerBackend, D>(param.id) {
                    self.to.register::<B::InnerBackend, D>(param.id, grad);
                }
            }
        }
        let mut split = Split::<B> {
            group: &self.group.path,
            path: vec![],
            from: grads,
            to: GradientsParams::new(),
            backend: PhantomData,
        };
        module.visit(&mut split);
        split.to
    }
}

impl<M: AutodiffModule<B>, B: AutodiffBackend, O: Optimizer<M, B>> Optimizer<M, B> for Grouped<O> {
    type Record = O::Record;

    fn step(&mut self, lr: f64, module: M, mut grads: GradientsParams) -> M {
        let group = self.split(&module, &mut grads);
        let module = self.inner.step(lr, module, grads);
        self.inner.step(lr * self.group.factor, module, group)
    }

    fn step_multi(&mut self, lr: f64, module: M, mut grads: MultiGradientsParams) -> M {
        let group = grads.grads.iter_mut().map(|(grads, device)| (self.split(&module, grads), *device)).collect();
        let module = self.inner.step_multi(lr, module, grads);
        self.inner.step_multi(lr * self.group.factor, module, MultiGradientsParams { grads: group })
    }

    fn to_record(&self) -> Self::Record {
        self.inner.to_record()
    }

    fn load_record(self, record: Self::Record) -> Self {
        Self { inner: self.inner.load_record(record), group: self.group }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{AB, B as Inner};
    use burn::nn::{Linear, LinearConfig};
    use burn::optim::SgdConfig;

    #[derive(Module, Debug)]
    struct Net<B: Backend> {
        body: Linear<B>,
        head: Linear<B>,
    }

    #[test]
    fn the_group_takes_longer_steps() {
        let device = Default::default();
        let layer = || LinearConfig::new(1, 1).init(&device);
        let net = Net::<AB> { body: layer(), head: layer() };
        let mut optimizer = Grouped {
            inner: SgdConfig::new().init::<AB, Net<AB>>(),
            group: LrGroup { path: vec!["head"], factor: 4.0 },
        };
        let loss = net.body.weight.val().sum() + net.head.weight.val().sum();
        let grads = GradientsParams::from_grads(loss.backward(), &net);
        let before = net.valid();
        let after = optimizer.step(0.1, net, grads).valid();
        let moved =
            |a: &Linear<Inner>, b: &Linear<Inner>| -> f32 { (a.weight.val() - b.weight.val()).into_scalar().elem() };
        assert!((moved(&before.body, &after.body) - 0.1).abs() < 1e-6);
        assert!((moved(&before.head, &after.head) - 0.4).abs() < 1e-6);
    }
}
