//! Forward-only gradient estimates of the towers, against backpropagation.

use burn::backend::{Autodiff, Flex};
use burn::module::{AutodiffModule, ModuleMapper, ModuleVisitor, Param};
use burn::prelude::*;
use burn::tensor::Distribution;
use burn::tensor::backend::AutodiffBackend;
use flops_core::estimator::{Estimate, trained_parameters};
use flops_core::{Allocation, Batch, Estimator, ForwardModel, Probe, QueryBudget, Space, cross_entropy};
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;
use crate::text_classifier::TextClassifier;
use flops_vit::Scope;

type Input<B> = (Tensor<B, 2, Int>, Tensor<B, 2, Int>);

#[test]
fn normalised_rows_have_length_one_and_zeros_stay() {
    let x = Tensor::<Flex, 2>::from_floats([[3.0, 4.0], [0.0, 0.0]], &Default::default());
    let values: Vec<f32> = normalise(x).into_data().to_vec().unwrap();
    assert!((values[0] - 0.6).abs() < 1e-6 && (values[1] - 0.8).abs() < 1e-6);
    assert_eq!(values[2..], [0.0, 0.0]);
}

/// A text classifier: CLIP's text tower, in stages.
#[derive(Module, Debug)]
struct ByClip<B: Backend> {
    text: TextTower<B>,
}

impl<B: Backend> ForwardModel<B> for ByClip<B> {
    type Input = Input<B>;
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    fn forward(&self, (ids, mask): Input<B>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let text = &self.text;
        let (end, bias) = (text.text_end(ids.clone()), attention_bias(mask.clone(), true));
        let hidden = probe.masked(mask, |probe| {
            let mut x = probe.stage(ids, |ids, probe| {
                let x = text.token_embeddings(ids, probe);
                text.embed_text(x, probe)
            });
            for layer in &text.layers {
                x = probe.stage(x, |x, probe| layer.forward(x, Some(&bias), probe));
            }
            probe.layer_norm(&text.norm, x)
        });
        text.project_text(hidden, end, probe)
    }

    fn losses(&self, logits: Tensor<B, 2>, target: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        cross_entropy(logits, target)
    }
}

/// The same by [`TextTower::forward`].
#[derive(Module, Debug)]
struct ByClipForward<B: Backend> {
    text: TextTower<B>,
}

impl<B: Backend> ForwardModel<B> for ByClipForward<B> {
    type Input = Input<B>;
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    fn forward(&self, (ids, mask): Input<B>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let hidden = self.text.forward(ids.clone(), mask, probe);
        self.text.project_text(hidden, self.text.text_end(ids), probe)
    }

    fn losses(&self, logits: Tensor<B, 2>, target: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        cross_entropy(logits, target)
    }
}

/// Draws weights and tables from N(0, 0.5²).
///
/// The scale must be large enough for two reasons. CLIP's texts all end in the same token, so the
/// other tokens must reach the loss. And the noise of 10⁻² must be small against the embeddings.
struct Draw(StdRng);

impl<B: AutodiffBackend> ModuleMapper<B> for Draw {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        param.map(|old| {
            if D == 1 {
                return old;
            }
            let data = TensorData::random::<f32, _, _>(old.dims(), Distribution::Normal(0.0, 0.5), &mut self.0);
            Tensor::from_data(data, &old.device()).require_grad()
        })
    }
}

/// Collects the gradients of all parameters in order, estimated or exact; zeros for a parameter
/// without one.
struct Gather<F>(F, Vec<f64>);

impl<B: Backend> ModuleVisitor<B> for Gather<&Estimate<B>> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let found = self.0.gradient(param).unwrap_or_else(|| param.val().zeros_like());
        self.1.extend(found.into_data().iter::<f64>());
    }
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Gather<(&B::Gradients, ())> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let found = param.grad(self.0.0).unwrap_or_else(|| param.val().inner().zeros_like());
        self.1.extend(found.into_data().iter::<f64>());
    }
}

/// Three texts of 5 tokens, with padding at the end and in the middle.
fn batch<B: Backend>() -> Batch<Input<B>, Tensor<B, 1, Int>> {
    let device = Default::default();
    let ids = Tensor::from_ints([[1, 5, 3, 9, 9], [1, 4, 6, 7, 9], [1, 9, 9, 9, 9]], &device);
    let mask = Tensor::from_ints([[1, 1, 1, 1, 0], [1, 1, 0, 1, 1], [1, 1, 0, 0, 0]], &device);
    Batch { ids: vec![0, 1, 2], input: (ids, mask), target: Tensor::from_ints([0, 1, 2], &device) }
}

/// Checks that a model's estimates, under an unequal allocation, are unbiased along the gradient.
///
/// Let g be the gradient of backpropagation and ĝ an estimate. Over 300 steps with 16 queries per
/// example on average, the projection ĝ·g/‖g‖² must average to one. The test allows 4.5 standard
/// errors (false-failure rate about 10⁻⁵). The standard error must be below 0.15, so that a mask on
/// the wrong rows would show.
fn assert_unbiased<A>(what: &str, model: A)
where
    A: AutodiffModule<Autodiff<Flex>> + ForwardModel<Autodiff<Flex>, Input = Input<Autodiff<Flex>>>,
    A: ForwardModel<Autodiff<Flex>, Target = Tensor<Autodiff<Flex>, 1, Int>>,
    A::InnerModule: ForwardModel<Flex, Input = Input<Flex>, Target = Tensor<Flex, 1, Int>> + Sync,
{
    let Batch { input, target, .. } = batch::<Autodiff<Flex>>();
    let output = model.forward(input, &mut Probe::clean());
    let grads = model.losses(output, target).mean().backward();
    let mut exact = Gather((&grads, ()), vec![]);
    model.visit(&mut exact);
    let norm: f64 = exact.1.iter().map(|g| g * g).sum();

    let trained = trained_parameters(&model);
    let (model, batch) = (model.valid(), batch::<Flex>());
    let estimator = Estimator { seed: 4, threads: 1, ..Estimator::new(Space::activation()) };
    let budget = QueryBudget::new(16, 1).unwrap();
    let allocation = Allocation::project(&[1.0, 2.0, 4.0], &budget).unwrap();
    let clean = estimator.clean(&model, &batch, &trained).unwrap();
    clean.check_sites().unwrap();
    let steps = 300;
    let projections: Vec<f64> = (0..steps)
        .map(|step| {
            let estimate = clean.estimate(&allocation, step).unwrap();
            let mut found = Gather(&estimate, vec![]);
            model.visit(&mut found);
            assert_eq!(found.1.len(), exact.1.len());
            found.1.iter().zip(&exact.1).map(|(a, b)| a * b).sum::<f64>() / norm
        })
        .collect();
    let mean = projections.iter().sum::<f64>() / steps as f64;
    let variance = projections.iter().map(|p| (p - mean).powi(2)).sum::<f64>() / (steps - 1) as f64;
    let se = (variance / steps as f64).sqrt();
    println!("{what}: {mean:.3} ± {se:.3}");
    assert!((mean - 1.0).abs() < 4.5 * se, "{what}: {mean} ± {se}");
    assert!(se < 0.15, "{what}: standard error {se} is too large");
}

fn clip() -> Clip<Autodiff<Flex>> {
    let text = TextConfig::new().with_vocab_size(12).with_context_length(6).with_eos_token_id(9);
    let text = text.with_embed_dim(8).with_depth(2).with_num_heads(2).with_mlp_dim(12);
    let vision = VisionConfig::new().with_img_size(8).with_patch_size(4).with_embed_dim(8).with_depth(2);
    let config = ClipConfig::new(vision.with_num_heads(2).with_mlp_dim(12), text).with_projection_dim(3);
    config.init::<Autodiff<Flex>>(&Default::default()).unwrap()
}

fn clip_text() -> TextTower<Autodiff<Flex>> {
    clip().text.map(&mut Draw(StdRng::seed_from_u64(1)))
}

fn bert() -> Bert<Autodiff<Flex>> {
    let config = BertConfig::new().with_vocab_size(12).with_context_length(6).with_embed_dim(8);
    let config = config.with_depth(2).with_num_heads(2).with_mlp_dim(12).with_layer_norm_eps(1e-5);
    let bert = config.init::<Autodiff<Flex>>(&Default::default()).unwrap();
    bert.map(&mut Draw(StdRng::seed_from_u64(2)))
}

/// A text classifier of three classes by BERT, with adapters of rank 2.
fn by_bert() -> TextClassifier<Autodiff<Flex>> {
    let model = TextClassifier::new(bert(), 3, 0).unwrap().with_lora(2, 0).unwrap();
    model.map(&mut Draw(StdRng::seed_from_u64(2)))
}

#[test]
fn estimates_of_clip_match_backpropagation() {
    assert_unbiased("clip", ByClip { text: clip_text() });
}

#[test]
fn estimates_of_bert_match_backpropagation() {
    assert_unbiased("bert", by_bert());
    for scope in [Scope::Lora(2), Scope::Last(1)] {
        assert_unbiased(&format!("bert, {scope}"), by_bert().with_scope(scope).unwrap());
    }
}

#[test]
fn estimates_at_branches_match_backpropagation() {
    assert_unbiased("clip", ByClip { text: clip_text().with_sites(Sites::Branch) });
    let branches = || by_bert().with_sites(Sites::Branch);
    assert_unbiased("bert", branches());
    assert_unbiased("bert, lora:2", branches().with_scope(Scope::Lora(2)).unwrap());
}

/// Branches and layers compute the same embeddings, with padding in the texts.
#[test]
fn sites_do_not_change_the_embeddings() {
    fn same(what: &str, layers: Tensor<Flex, 2>, branches: Tensor<Flex, 2>) {
        let size: f32 = layers.clone().abs().max().into_scalar();
        let distance: f32 = (layers - branches).abs().max().into_scalar();
        assert!(size > 0.01 && distance < 1e-5, "{what}: size {size}, distance {distance}");
    }
    let Batch { input, .. } = batch::<Flex>();
    let embed = |model: &Clip<Flex>| {
        let text = &model.text;
        let hidden = text.forward(input.0.clone(), input.1.clone(), &mut Probe::clean());
        let texts = text.project_text(hidden, text.text_end(input.0.clone()), &mut Probe::clean());
        let images = Tensor::<Flex, 1, Int>::arange(0..384, &Default::default()).float().sin();
        (model.encode_image(images.reshape([2, 3, 8, 8]), &mut Probe::clean()), texts)
    };
    let model = clip().map(&mut Draw(StdRng::seed_from_u64(3))).valid();
    let (layers, branches) = (embed(&model), embed(&model.with_sites(Sites::Branch)));
    same("clip's images", layers.0, branches.0);
    same("clip's texts", layers.1, branches.1);
    let embed = |model: &Bert<Flex>| {
        let hidden = model.forward(input.0.clone(), input.1.clone(), &mut Probe::clean());
        Bert::mean_pooled(hidden, input.1.clone(), &Probe::clean())
    };
    let model = bert().valid();
    let layers = embed(&model);
    same("bert", layers, embed(&model.with_sites(Sites::Branch)));
}

/// An estimate of the towers is the same, to rounding, with padding behind the texts. Without a
/// mask at the sites, the second moments of texts of three tokens double with three more.
#[test]
fn padding_does_not_change_the_estimate() {
    fn figures<A>(model: &A, pads: usize) -> [Vec<f64>; 2]
    where
        A: AutodiffModule<Autodiff<Flex>>,
        A::InnerModule: ForwardModel<Flex, Input = Input<Flex>, Target = Tensor<Flex, 1, Int>>,
    {
        let (trained, model, device) = (trained_parameters(model), model.valid(), Default::default());
        let texts = [[1, 5, 9], [1, 4, 9]];
        let ids: Vec<i32> = texts.iter().flat_map(|t| t.iter().copied().chain(vec![0; pads])).collect();
        let mask: Vec<i32> = texts.iter().flat_map(|_| [1; 3].into_iter().chain(vec![0; pads])).collect();
        let tensor = |values| Tensor::<Flex, 2, Int>::from_data(TensorData::new(values, [2, 3 + pads]), &device);
        let input = (tensor(ids), tensor(mask));
        let batch = Batch { ids: vec![0, 1], input, target: Tensor::from_ints([0, 1], &device) };
        let estimator = Estimator { sigma: 0.2, ..Estimator::new(Space::activation()) };
        let clean = estimator.clean(&model, &batch, &trained).unwrap();
        let estimate = clean.estimate(&Allocation::uniform(2, &QueryBudget::new(8, 1).unwrap()), 0).unwrap();
        let mut found = Gather(&estimate, vec![]);
        model.visit(&mut found);
        [found.1, estimate.second_moments]
    }
    fn same(what: &str, short: [Vec<f64>; 2], long: [Vec<f64>; 2]) {
        for (a, b) in short.iter().zip(&long) {
            let norm = |x: Vec<f64>| x.iter().map(|x| x * x).sum::<f64>().sqrt();
            let off = norm(a.iter().zip(b).map(|(a, b)| a - b).collect()) / norm(a.clone());
            assert!(off < 1e-4, "{what}: {off}");
        }
    }
    for sites in [Sites::Linear, Sites::Branch] {
        let model = by_bert().with_sites(sites);
        same(&format!("bert, {sites}"), figures(&model, 0), figures(&model, 3));
        let model = ByClipForward { text: clip_text().with_sites(sites) };
        same(&format!("clip, {sites}"), figures(&model, 0), figures(&model, 3));
    }
}
