//! The model as few sites: what the embedding, each residual branch and the head give.
//!
//! Each is a module of its own that shares the parameters of the model, for
//! [`site!`](flops_core::site). Nothing is copied: parameters are reference-counted.

use burn::module::Param;
use burn::nn::conv::Conv2d;
use burn::nn::{LayerNorm, Linear};
use burn::prelude::*;
use flops_core::{Probe, site};

use crate::block::{Attention, Block};
use crate::config::{Activation, Pool};
use crate::model::ViT;

/// Images to tokens with positions.
#[derive(Module, Debug)]
struct Embedding<B: Backend> {
    patch_embed: Conv2d<B>,
    cls_token: Option<Param<Tensor<B, 3>>>,
    dist_token: Option<Param<Tensor<B, 3>>>,
    pos_embed: Param<Tensor<B, 3>>,
}

impl<B: Backend> Embedding<B> {
    fn forward(&self, images: Tensor<B, 4>) -> Tensor<B, 3> {
        let rows = images.dims()[0];
        let patches = self.patch_embed.forward(images).flatten::<3>(2, 3).swap_dims(1, 2);
        let prefix = [&self.cls_token, &self.dist_token].into_iter().flatten();
        let mut tokens: Vec<_> = prefix.map(|token| token.val().repeat_dim(0, rows)).collect();
        tokens.push(patches);
        Tensor::cat(tokens, 1) + self.pos_embed.val()
    }
}

/// What attention adds to the stream.
#[derive(Module, Debug)]
struct AttentionBranch<B: Backend> {
    norm: LayerNorm<B>,
    attn: Attention<B>,
}

impl<B: Backend> AttentionBranch<B> {
    /// The branch at the first `seen` tokens, from all tokens.
    fn forward(&self, x: Tensor<B, 3>, seen: usize) -> Tensor<B, 3> {
        let probe = &mut Probe::clean();
        let h = probe.layer_norm(&self.norm, x);
        let k = probe.linear(&self.attn.key, h.clone());
        let v = probe.linear_with_lora(&self.attn.value, self.attn.value_lora.as_ref(), h.clone());
        let q = probe.linear_with_lora(&self.attn.query, self.attn.query_lora.as_ref(), h.narrow(1, 0, seen));
        let a = self.attn.attend(q, k, v, probe);
        probe.linear(&self.attn.proj, a)
    }
}

/// What the MLP adds to the stream.
#[derive(Module, Debug)]
struct MlpBranch<B: Backend> {
    norm: LayerNorm<B>,
    fc1: Linear<B>,
    fc2: Linear<B>,
    #[module(skip)]
    activation: Activation,
}

impl<B: Backend> MlpBranch<B> {
    fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let probe = &mut Probe::clean();
        let h = probe.layer_norm(&self.norm, x);
        let h = self.activation.forward(probe.linear(&self.fc1, h));
        probe.linear(&self.fc2, h)
    }
}

/// The final norm and the classifiers.
#[derive(Module, Debug)]
struct Head<B: Backend> {
    norm: LayerNorm<B>,
    head: Linear<B>,
    head_dist: Option<Linear<B>>,
    /// How tokens are pooled after the norm, and the first that is, where they are.
    #[module(skip)]
    pool: Option<(Pool, usize)>,
}

impl<B: Backend> Head<B> {
    /// The normalised tokens that have a head, or what they are pooled to.
    fn features(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let x = Probe::clean().layer_norm(&self.norm, x);
        match self.pool {
            Some((pool, prefix)) => pool.apply(x, prefix),
            None => x,
        }
    }

    /// Logits from the tokens that have a head, before the norm.
    fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 2> {
        let probe = &mut Probe::clean();
        let x = self.features(x);
        let token = |at: usize| x.clone().narrow(1, at, 1).squeeze_dim::<2>(1);
        let logits = probe.linear(&self.head, token(0));
        match &self.head_dist {
            Some(head) => (logits + probe.linear(head, token(1))).mul_scalar(0.5),
            None => logits,
        }
    }
}

impl<B: Backend> Block<B> {
    /// The block at its first `seen` tokens; each branch is a site and a stage.
    ///
    /// # Shapes
    /// - x: `[rows, tokens, embed_dim]`
    /// - returns: `[rows, seen, embed_dim]`
    pub(crate) fn forward_branches(&self, x: Tensor<B, 3>, seen: usize, probe: &mut Probe<B>) -> Tensor<B, 3> {
        let x = probe.stage(x, |x, probe| {
            let branch = AttentionBranch { norm: self.norm1.clone(), attn: self.attn.clone() };
            let h = site!(probe, &branch, x.clone(), move |branch, x| branch.forward(x, seen));
            probe.add(x.narrow(1, 0, seen), h)
        });
        probe.stage(x, |x, probe| {
            let branch = MlpBranch {
                norm: self.norm2.clone(),
                fc1: self.fc1.clone(),
                fc2: self.fc2.clone(),
                activation: self.activation,
            };
            let h = site!(probe, &branch, x.clone(), |branch, x| branch.forward(x));
            probe.add(x, h)
        })
    }
}

impl<B: Backend> ViT<B> {
    /// The logits, with a site for the embedding, each residual branch and the head.
    pub(crate) fn forward_branches(&self, images: Tensor<B, 4>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let mut x = probe.stage(images, |images, probe| {
            let embedding = Embedding {
                patch_embed: self.patch_embed.clone(),
                cls_token: self.cls_token.clone(),
                dist_token: self.dist_token.clone(),
                pos_embed: self.pos_embed.clone(),
            };
            site!(probe, &embedding, images, |embedding, images| embedding.forward(images))
        });
        let tokens = self.pos_embed.dims()[1];
        let heads = self.heads();
        for (i, block) in self.blocks.iter().enumerate() {
            // only tokens with a head reach the loss
            let seen = if i + 1 == self.blocks.len() { heads.unwrap_or(tokens) } else { tokens };
            x = block.forward_branches(x, seen, probe);
        }
        let prefix = self.num_prefix_tokens();
        if heads.is_none() && self.fc_norm {
            x = probe.stage(x, |x, _| self.pool.apply(x, prefix));
        }
        let head = Head {
            norm: self.norm.clone(),
            head: self.head.clone(),
            head_dist: self.head_dist.clone(),
            pool: (heads.is_none() && !self.fc_norm).then_some((self.pool, prefix)),
        };
        probe.embed_with(|| head.features(x.clone()).narrow(1, 0, 1).squeeze_dim(1));
        site!(probe, &head, x, |head, x| head.forward(x))
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::{Autodiff, Flex};
    use burn::module::{AutodiffModule, ModuleMapper, ModuleVisitor, ParamId};
    use flops_core::estimator::trained_parameters;
    use flops_core::{Allocation, Batch, Estimator, ForwardModel, QueryBudget, Space};

    use super::*;
    use crate::config::ViTConfig;
    use crate::scope::Scope;
    use crate::sites::Sites;

    type AB = Autodiff<Flex>;

    fn images<B: Backend>() -> Tensor<B, 4> {
        let values = (0..4 * 192).map(|i| (0.7 * i as f32).sin()).collect();
        Tensor::from_data(TensorData::new(values, [4, 3, 8, 8]), &Default::default())
    }

    fn labels<B: Backend>() -> Tensor<B, 1, Int> {
        Tensor::from_ints([0, 1, 2, 1], &Default::default())
    }

    /// Autodiff's gradients by parameter.
    struct Exact<'a>(&'a <AB as burn::tensor::backend::AutodiffBackend>::Gradients, Vec<(ParamId, Vec<f64>)>);
    impl ModuleVisitor<AB> for Exact<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<AB, D>>) {
            if let Some(g) = param.val().grad(self.0) {
                self.1.push((param.id, g.into_data().iter::<f64>().collect()));
            }
        }
    }

    /// Estimates of a parameter.
    struct Found<'a>(&'a flops_core::estimator::Estimate<Flex>, Vec<(ParamId, Vec<f64>)>);
    impl ModuleVisitor<Flex> for Found<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Flex, D>>) {
            if let Some(g) = self.0.gradient(param) {
                self.1.push((param.id, g.into_data().iter::<f64>().collect()));
            }
        }
    }

    /// Gives weights, positions and tokens the values of a sine, the same in every run.
    struct Sines(usize);
    impl ModuleMapper<AB> for Sines {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<AB, D>>) -> Param<Tensor<AB, D>> {
            param.map(|tensor| {
                let n = tensor.shape().num_elements();
                let values = (self.0..self.0 + n).map(|i| 0.4 * (1.3 * i as f32 + 0.5).sin()).collect();
                self.0 += n;
                // scales and biases stay as they are
                if D == 1 {
                    tensor
                } else {
                    Tensor::from_data(TensorData::new(values, tensor.dims()), &tensor.device())
                }
            })
        }
    }

    /// Over 400 estimates of 64 queries an image, the mean is autodiff's gradient: T = 400·‖mean −
    /// g‖²/Tr S, with S their covariance, has mean 1. T > 6 has a probability below 10⁻² for a
    /// covariance of rank one, the worst case, and below 10⁻⁶ for one of rank 8. Weights and seeds are
    /// fixed.
    #[test]
    fn estimates_at_branches_match_autodiff_in_the_mean() {
        let config = ViTConfig::new().with_img_size(8).with_patch_size(4).with_embed_dim(8).with_depth(2);
        let config = config.with_num_heads(2).with_num_classes(3);
        for scope in [Scope::Full, Scope::Last(1)] {
            let model = config.init::<AB>(&Default::default()).unwrap().map(&mut Sines(0)).with_new_head(3, 1);
            let model = model.with_scope(scope).unwrap().with_sites(Sites::Branch);
            let loss = model.losses(model.forward(images(), &mut Probe::clean()), labels()).mean();
            let gradients = loss.backward();
            let mut exact = Exact(&gradients, vec![]);
            model.visit(&mut exact);
            let trained = trained_parameters(&model);
            assert_eq!(exact.1.len(), trained.len());
            let inner = model.valid();
            let batch = Batch { ids: vec![0, 1, 2, 3], input: images(), target: labels() };
            let estimator = Estimator::new(Space::activation());
            let clean = estimator.clean(&inner, &batch, &trained).unwrap();
            clean.check_sites().unwrap();
            let allocation = Allocation::uniform(4, &QueryBudget::new(64, 1).unwrap());
            let n = 400;
            let samples: Vec<Vec<f64>> = (0..n)
                .map(|step| {
                    let estimate = clean.estimate(&allocation, step).unwrap();
                    let mut found = Found(&estimate, vec![]);
                    inner.visit(&mut found);
                    let of = |id: &ParamId| found.1.iter().find(|(found, _)| found == id).unwrap().1.clone();
                    exact.1.iter().flat_map(|(id, _)| of(id)).collect()
                })
                .collect();
            let truth: Vec<f64> = exact.1.iter().flat_map(|(_, g)| g.clone()).collect();
            let mean: Vec<f64> =
                (0..truth.len()).map(|i| samples.iter().map(|s| s[i]).sum::<f64>() / n as f64).collect();
            let squared = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
            let trace = samples.iter().map(|s| squared(s, &mean)).sum::<f64>() / (n - 1) as f64;
            let t = n as f64 * squared(&mean, &truth) / trace;
            assert!(t < 6.0, "{scope}: T = {t}");
        }
    }
}
