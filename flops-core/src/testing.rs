//! A model with every kind of site, small enough for thousands of gradient estimates.

pub mod gang;
pub mod pair;

use burn::backend::{Autodiff, Flex};
use burn::module::{AutodiffModule, Param, ParamId};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{
    Embedding, EmbeddingConfig, Initializer, LayerNorm, LayerNormConfig, Linear, LinearConfig, PaddingConfig2d,
};
use burn::prelude::*;
use burn::tensor::Distribution;
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::allocator::{Allocator, DatumFeatures, QueryBudget, Shown, variance_objective};
use crate::batch::Batch;
use crate::losses::cross_entropy;
use crate::model::ForwardModel;
use crate::probe::Probe;

pub type B = Flex;
pub type AB = Autodiff<Flex>;

/// A convolution, a class token, an embedding, a layer norm and two linear layers.
#[derive(Module, Debug)]
pub struct Zoo<B: Backend> {
    pub conv: Conv2d<B>,
    pub table: Embedding<B>,
    pub cls: Param<Tensor<B, 3>>,
    pub norm: LayerNorm<B>,
    pub mix: Linear<B>,
    pub head: Linear<B>,
}

impl<B: Backend> ForwardModel<B> for Zoo<B> {
    type Input = (Tensor<B, 4>, Tensor<B, 2, Int>);
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    fn forward(&self, (images, words): Self::Input, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let x = probe.stage((images, words), |(images, words), probe| {
            let patches = probe.conv2d(&self.conv, images).flatten::<3>(2, 3).swap_dims(1, 2);
            let words = probe.embedding(&self.table, words);
            let cls = probe.param(&self.cls);
            probe.cat(vec![cls, patches, words], 1)
        });
        let x = probe.stage(x, |x, probe| {
            let h = probe.layer_norm(&self.norm, x.clone());
            let h = probe.linear(&self.mix, h).tanh();
            probe.add(x, h)
        });
        let x = x.mean_dim(1).squeeze_dim::<2>(1);
        probe.embed(&x);
        probe.linear(&self.head, x)
    }

    fn losses(&self, logits: Tensor<B, 2>, target: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        cross_entropy(logits, target)
    }

    fn classification(&self, o: &Tensor<B, 2>, t: &Tensor<B, 1, Int>) -> Option<(Tensor<B, 2>, Tensor<B, 1, Int>)> {
        Some((o.clone(), t.clone()))
    }
}

/// Standard normals.
fn random<B: Backend, const D: usize>(shape: [usize; D], seed: u64) -> Tensor<B, D> {
    let mut rng = StdRng::seed_from_u64(seed);
    Tensor::from_data(
        TensorData::random::<f32, _, _>(shape, Distribution::Normal(0.0, 1.0), &mut rng),
        &Default::default(),
    )
}

/// A model whose parameters are all drawn from `seed`.
pub fn zoo(seed: u64) -> Zoo<AB> {
    let device = Default::default();
    let init = Initializer::Normal { mean: 0.0, std: 0.5 };
    let mut zoo = Zoo::<AB> {
        conv: Conv2dConfig::new([1, 3], [3, 2])
            .with_stride([2, 2])
            .with_padding(PaddingConfig2d::Explicit(1, 0, 1, 1))
            .with_initializer(init.clone())
            .init(&device),
        table: EmbeddingConfig::new(4, 3).with_initializer(init.clone()).init(&device),
        cls: init.init([1, 1, 3], &device),
        norm: LayerNormConfig::new(3).init(&device),
        mix: LinearConfig::new(3, 3).with_initializer(init.clone()).init(&device),
        head: LinearConfig::new(3, 3).with_initializer(init).init(&device),
    };
    zoo = reseeded(zoo, seed);
    zoo
}

/// Draws each parameter from a seed of its own, also those that start at 0 or 1.
struct Fill(u64);

impl<B: Backend> burn::module::ModuleMapper<B> for Fill {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        self.0 += 1;
        let seed = self.0;
        param.map(|p| {
            random::<B, D>(p.dims(), seed).mul_scalar(0.6).add_scalar(0.1).set_require_grad(p.is_require_grad())
        })
    }
}

/// The module with all parameters drawn from `seed`.
pub fn reseeded<M: Module<AB>>(module: M, seed: u64) -> M {
    module.map(&mut Fill(seed))
}

pub type ZooBatch<B> = Batch<(Tensor<B, 4>, Tensor<B, 2, Int>), Tensor<B, 1, Int>>;

/// `n` examples with very different losses.
pub fn zoo_batch<B: Backend>(n: usize, seed: u64) -> ZooBatch<B> {
    let device = Default::default();
    let scale: Vec<f32> = (0..n).map(|j| 0.2 * (1 + j) as f32).collect();
    let images = random::<B, 4>([n, 1, 4, 4], seed)
        * Tensor::<B, 1>::from_data(TensorData::new(scale, [n]), &device).reshape([n, 1, 1, 1]);
    let words: Vec<i32> = (0..2 * n).map(|i| ((i * 7 + seed as usize) % 4) as i32).collect();
    let labels: Vec<i32> = (0..n).map(|i| ((i * 5 + seed as usize) % 3) as i32).collect();
    Batch {
        ids: (0..n as u64).map(|i| 100 + i).collect(),
        input: (images, Tensor::from_data(TensorData::new(words, [n, 2]), &device)),
        target: Tensor::from_data(TensorData::new(labels, [n]), &device),
    }
}

/// The values that `read` gives for each parameter, as one list, with zeros for `None`.
pub fn flat<M: Module<B>>(model: &M, read: &mut dyn FnMut(ParamId, usize) -> Option<Vec<f64>>) -> Vec<f64> {
    struct Visit<'a>(&'a mut dyn FnMut(ParamId, usize) -> Option<Vec<f64>>, Vec<f64>);
    impl burn::module::ModuleVisitor<B> for Visit<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let n = param.val().shape().num_elements();
            self.1.extend((self.0)(param.id, n).unwrap_or_else(|| vec![0.0; n]));
        }
    }
    let mut visit = Visit(read, vec![]);
    model.visit(&mut visit);
    visit.1
}

/// All parameter values of a model, as one list.
pub fn weights<M: Module<B>>(model: &M) -> Vec<f64> {
    struct Visit(Vec<f64>);
    impl burn::module::ModuleVisitor<B> for Visit {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            self.0.extend(param.val().into_data().iter::<f64>());
        }
    }
    let mut visit = Visit(vec![]);
    model.visit(&mut visit);
    visit.0
}

/// The gradient of the mean loss, by autodiff.
pub fn true_gradient<M: ForwardModel<AB>>(model: &M, batch: Batch<M::Input, M::Target>) -> Vec<f64> {
    let output = model.forward(batch.input, &mut Probe::clean());
    let grads = model.losses(output, batch.target).mean().backward();
    struct Visit<'a>(&'a <AB as burn::tensor::backend::AutodiffBackend>::Gradients, Vec<f64>);
    impl burn::module::ModuleVisitor<AB> for Visit<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<AB, D>>) {
            let value = param.val();
            match value.grad(self.0) {
                Some(g) => self.1.extend(g.into_data().iter::<f64>()),
                None => self.1.extend(vec![0.0; value.shape().num_elements()]),
            }
        }
    }
    let mut visit = Visit(&grads, vec![]);
    model.visit(&mut visit);
    visit.1
}

/// The model on the inner backend, without a graph.
pub fn plain(model: &Zoo<AB>) -> Zoo<B> {
    model.valid()
}

/// Skewed losses, as training leaves them: half the exponential of a standard normal.
pub fn skewed_losses(n: usize, seed: u64) -> Vec<f64> {
    let mut rng = StdRng::seed_from_u64(seed);
    let data = TensorData::random::<f64, _, _>([n], Distribution::Normal(0.0, 1.0), &mut rng);
    data.iter::<f64>().map(|z| 0.5 * z.exp()).collect()
}

/// The mean J of 100 allocations, after the allocator has learned for `steps` steps on one batch,
/// whose queries show the variances of the features without noise.
pub fn train_allocator<A: Allocator<B>>(
    mut allocator: A,
    features: &DatumFeatures<'_>,
    budget: &QueryBudget,
    seed: u64,
    steps: usize,
) -> f64 {
    let mut rng = StdRng::seed_from_u64(seed);
    for _ in 0..steps {
        let update = allocator.allocate(features, budget, &mut rng).unwrap().1;
        allocator = allocator.apply(update, &Shown::new(features.variances));
    }
    let draw = |_| variance_objective(features.variances, &allocator.allocate(features, budget, &mut rng).unwrap().0);
    (0..100).map(draw).sum::<f64>() / 100.0
}

/// Examples of these ids, each with two words of its own, padded with the fourth to `words` words.
///
/// An example is the same in every batch, but for its padding. The model sees the padding.
pub fn padded_batch<B: Backend>(ids: &[u64], words: usize) -> ZooBatch<B> {
    let (n, device) = (ids.len(), Default::default());
    let image = |id: u64| (0..16).map(move |i| (0.7 * i as f32 + 1.3 * id as f32).sin());
    let images: Vec<f32> = ids.iter().flat_map(|&id| image(id)).collect();
    let word = |id: u64, i: usize| if i < 2 { ((id as usize * 5 + i) % 3) as i32 } else { 3 };
    let tokens: Vec<i32> = ids.iter().flat_map(|&id| (0..words).map(move |i| word(id, i))).collect();
    let labels: Vec<i32> = ids.iter().map(|id| (id % 3) as i32).collect();
    Batch {
        ids: ids.to_vec(),
        input: (
            Tensor::from_data(TensorData::new(images, [n, 1, 4, 4]), &device),
            Tensor::from_data(TensorData::new(tokens, [n, words]), &device),
        ),
        target: Tensor::from_data(TensorData::new(labels, [n]), &device),
    }
}
