//! Two frozen encoders brought into one space by what is trained behind them.

use burn::module::{Param, ParamId};
use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use flops_core::ops::gelu;
use flops_core::{ForwardModel, Probe};

use crate::contrastive::{self, PairEmbeddings, Pairs};
use crate::error::MultimodalError;
use crate::towers::normalise;

/// The largest e^τ: CLIP's bound.
const MAX_SCALE: f64 = 100.0;

/// A linear map, or an MLP of one hidden layer with GELU, from an encoder's features into the common space.
#[derive(Module, Debug)]
pub struct Projection<B: Backend> {
    /// The layers, first to last; GELU between them.
    pub layers: Vec<Linear<B>>,
}

impl<B: Backend> Projection<B> {
    /// Where the common space has the features, not yet of length 1.
    ///
    /// # Shapes
    /// - features: `[rows, d_in]`
    /// - returns: `[rows, embed_dim]`
    pub fn forward(&self, features: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let mut x = features;
        for (i, layer) in self.layers.iter().enumerate() {
            if i > 0 {
                x = gelu(x);
            }
            x = probe.linear(layer, x);
        }
        x
    }

    /// The projection of raw features that does what this one does of standardised ones, (x − mean)/std: W/std, and b − (mean/std)·W.
    ///
    /// # Panics
    /// Where there are not as many numbers as features.
    fn of_raw(mut self, scaling: &Scaling) -> Self {
        if let Some(first) = self.layers.first_mut() {
            let [features, width] = first.weight.dims();
            let row = |values: &[f32]| {
                Tensor::<B, 1>::from_data(TensorData::new(values.to_vec(), [features]), &first.weight.device())
            };
            let weight = first.weight.val() / row(&scaling.std).reshape([features, 1]);
            let shift = row(&scaling.mean).reshape([1, features]).matmul(weight.clone()).reshape([width]);
            first.bias = Some(match first.bias.take() {
                Some(bias) => bias.map(|b| b - shift),
                None => Param::from_tensor(shift.neg()),
            });
            first.weight = first.weight.clone().map(|_| weight);
        }
        self
    }
}

/// Mean and standard deviation of each feature of an encoder: projections learn faster of features that are alike.
#[derive(Clone, Debug, PartialEq)]
pub struct Scaling {
    /// Mean of each feature.
    pub mean: Vec<f32>,
    /// Standard deviation of each; 1 where a feature is constant.
    pub std: Vec<f32>,
}

impl Scaling {
    /// Of rows of features, one after the other.
    ///
    /// # Panics
    /// Where `features` is 0.
    pub fn of(rows: &[f32], features: usize) -> Self {
        let n = (rows.len() / features).max(1) as f64;
        let sum = |of: &dyn Fn(usize, f64) -> f64| -> Vec<f64> {
            let mut sums = vec![0.0; features];
            for row in rows.chunks_exact(features) {
                sums.iter_mut().zip(row).enumerate().for_each(|(i, (s, &x))| *s += of(i, x as f64));
            }
            sums.into_iter().map(|s| s / n).collect()
        };
        let mean = sum(&|_, x| x);
        let variance = sum(&|i, x| (x - mean[i]).powi(2));
        let std = variance.iter().map(|v| if *v > 1e-12 { v.sqrt() as f32 } else { 1.0 }).collect();
        Self { mean: mean.iter().map(|m| *m as f32).collect(), std }
    }

    /// (x − mean)/std of rows of features.
    pub fn apply(&self, rows: &mut [f32]) {
        for row in rows.chunks_exact_mut(self.mean.len().max(1)) {
            row.iter_mut().zip(self.mean.iter().zip(&self.std)).for_each(|(x, (m, s))| *x = (*x - m) / s);
        }
    }
}

/// Sizes of an [`Alignment`]; `AlignmentConfig::new(128, 384).init(&device)`.
#[derive(Config, Debug, PartialEq)]
pub struct AlignmentConfig {
    /// Features of the image encoder.
    pub image_dim: usize,
    /// Features of the text encoder.
    pub text_dim: usize,
    /// Width of the common space, at least 1.
    #[config(default = 64)]
    pub embed_dim: usize,
    /// Width of a hidden layer in both projections; 0 for linear ones.
    #[config(default = 0)]
    pub hidden_dim: usize,
    /// τ at the start, of which e^τ multiplies the cosines; CLIP's is ln(1/0.07).
    #[config(default = 2.6592)]
    pub logit_scale: f64,
}

impl AlignmentConfig {
    /// Random projections: uniform in ±1/√d_in, as Burn's linear layers are; biases alike.
    ///
    /// # Errors
    /// [`MultimodalError::Config`] where a width is 0 or τ is not finite.
    pub fn init<B: Backend>(&self, device: &B::Device) -> Result<Alignment<B>, MultimodalError> {
        for (field, value) in
            [("image_dim", self.image_dim), ("text_dim", self.text_dim), ("embed_dim", self.embed_dim)]
        {
            if value == 0 {
                return Err(MultimodalError::Config { field, value, remedy: "use at least 1" });
            }
        }
        if !self.logit_scale.is_finite() {
            let value = self.logit_scale.to_string();
            return Err(MultimodalError::Setting { name: "logit_scale", value, remedy: "use a finite number" });
        }
        let projection = |d_in: usize| {
            let widths = match self.hidden_dim {
                0 => vec![d_in, self.embed_dim],
                hidden => vec![d_in, hidden, self.embed_dim],
            };
            let layers = widths.windows(2).map(|w| LinearConfig::new(w[0], w[1]).init(device)).collect();
            Projection { layers }
        };
        let alignment = Alignment {
            image: projection(self.image_dim),
            text: projection(self.text_dim),
            logit_scale: Param::from_tensor(Tensor::from_floats([self.logit_scale as f32], device)),
        };
        // parameters are made on first use; made now, so that clones are the same model
        let _ = alignment.num_params();
        Ok(alignment)
    }
}

/// The projections of two frozen encoders into one space, and the scale of its similarities: the target module between two black boxes.
///
/// It is trained on the encoders' features, which are computed once: a step costs projections, not towers. The loss is the
/// [contrastive] one of the batch; batches of other sizes have other losses. The scale τ acts behind everything that is
/// perturbed, and its gradient is exact: ∂L/∂τ = Σ (P + Q − 2I)∘s/2B. Beyond CLIP's bound e^τ = 100 it has none.
///
/// # Example
/// ```
/// use burn::{backend::Flex, prelude::*};
/// use flops_core::{ForwardModel, Probe};
/// use flops_multimodal::{AlignmentConfig, Pairs};
///
/// let device = Default::default();
/// let model = AlignmentConfig::new(6, 4).init::<Flex>(&device)?;
/// let features = (Tensor::ones([3, 6], &device), Tensor::ones([3, 4], &device));
/// let said = model.forward(features, &mut Probe::clean());
/// // three pairs that nothing tells apart: the loss is ln 3
/// let losses: Vec<f32> = model.losses(said, Pairs::new(3)).into_data().iter().collect();
/// assert!(losses.iter().all(|loss| (loss - 3f32.ln()).abs() < 1e-5));
/// # Ok::<(), flops_multimodal::MultimodalError>(())
/// ```
#[derive(Module, Debug)]
pub struct Alignment<B: Backend> {
    /// Of the image encoder's features.
    pub image: Projection<B>,
    /// Of the text encoder's features.
    pub text: Projection<B>,
    /// τ, `[1]`.
    pub logit_scale: Param<Tensor<B, 1>>,
}

impl<B: Backend> Alignment<B> {
    /// Embeddings of images, of length 1, `[rows, embed_dim]`.
    pub fn embed_images(&self, features: Tensor<B, 2>) -> Tensor<B, 2> {
        normalise(self.image.forward(features, &mut Probe::clean()))
    }

    /// Embeddings of texts, of length 1, `[rows, embed_dim]`.
    pub fn embed_texts(&self, features: Tensor<B, 2>) -> Tensor<B, 2> {
        normalise(self.text.forward(features, &mut Probe::clean()))
    }

    /// e^τ, at most 100, `[1]`.
    pub fn scale(&self) -> Tensor<B, 1> {
        self.logit_scale.val().clamp_max(MAX_SCALE.ln()).exp()
    }

    /// The alignment of raw features that does what this one does of standardised ones.
    ///
    /// # Panics
    /// Where the scalings are of another number of features.
    pub fn of_raw(self, image: &Scaling, text: &Scaling) -> Self {
        Self { image: self.image.of_raw(image), text: self.text.of_raw(text), ..self }
    }
}

impl<B: Backend> ForwardModel<B> for Alignment<B> {
    /// Features of the images, `[pairs, image_dim]`, and of the texts, `[pairs, text_dim]`.
    type Input = (Tensor<B, 2>, Tensor<B, 2>);
    type Target = Pairs<B>;
    type Output = PairEmbeddings<B>;

    fn forward(&self, (images, texts): Self::Input, probe: &mut Probe<B>) -> PairEmbeddings<B> {
        let images = normalise(self.image.forward(images, probe));
        let texts = normalise(self.text.forward(texts, probe));
        let [images, texts] = probe.align([images, texts]);
        probe.embed_with(|| Tensor::cat(vec![images.clone(), texts.clone()], 1));
        PairEmbeddings { images, texts, scale: self.scale() }
    }

    fn losses(&self, output: PairEmbeddings<B>, target: Pairs<B>) -> Tensor<B, 1> {
        contrastive::losses(output, target)
    }

    fn couple(&self, output: &PairEmbeddings<B>, _: &Pairs<B>) -> Option<Pairs<B>> {
        Some(contrastive::couple(output))
    }

    fn exact_gradients(&self, _: &PairEmbeddings<B>, target: &Pairs<B>) -> Vec<(ParamId, Tensor<B, 1>)> {
        let moves = self.logit_scale.val().lower_elem(MAX_SCALE.ln()).float();
        target.derivatives().map(|d| (self.logit_scale.id, d.tau.clone() * moves)).into_iter().collect()
    }

    /// Which of the batch's texts belongs to each image.
    fn classification(&self, output: &PairEmbeddings<B>, _: &Pairs<B>) -> Option<(Tensor<B, 2>, Tensor<B, 1, Int>)> {
        let logits = contrastive::similarities(output);
        let labels = Tensor::arange(0..logits.dims()[0] as i64, &logits.device());
        Some((logits, labels))
    }

    /// ‖(∂ℓ/∂u, ∂ℓ/∂v)‖, less what points along u and v, which their length of 1 hides from the loss: the gradients of the others' terms are in it,
    /// of which a pair's own loss knows nothing.
    fn difficulty(&self, output: &PairEmbeddings<B>, target: &Pairs<B>) -> Option<Tensor<B, 1>> {
        let derivatives = target.derivatives()?;
        let pairs = output.images.dims()[0];
        let across = |g: &Tensor<B, 2>, along: &Tensor<B, 2>| {
            let along = along.clone().cast(burn::tensor::DType::F32);
            let part = (g.clone() * along.clone()).sum_dim(1);
            (g.clone() - along * part).powi_scalar(2).sum_dim(1)
        };
        let squares = across(&derivatives.images, &output.images) + across(&derivatives.texts, &output.texts);
        Some((squares.sqrt() * pairs as f64).reshape([pairs]))
    }

    /// ∂ℓ/∂u and ∂ℓ/∂v, the error at what the model says, as softmax − onehot is a classifier's.
    fn error_signals(&self, output: &PairEmbeddings<B>, target: &Pairs<B>) -> Option<Tensor<B, 2>> {
        let derivatives = target.derivatives()?;
        let pairs = output.images.dims()[0] as f64;
        Some(Tensor::cat(vec![derivatives.images.clone(), derivatives.texts.clone()], 1).mul_scalar(pairs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::{Autodiff, Flex};
    use burn::module::AutodiffModule;
    use flops_core::estimator::trained_parameters;
    use flops_core::{Allocation, Batch, Estimator, QueryBudget, Space};
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    type AB = Autodiff<Flex>;

    fn features<B: Backend>(seed: u64, pairs: usize, dim: usize) -> Tensor<B, 2> {
        let mut rng = StdRng::seed_from_u64(seed);
        let values: Vec<f32> = (0..pairs * dim).map(|_| 2.0 * rng.random::<f32>() - 1.0).collect();
        Tensor::from_data(TensorData::new(values, [pairs, dim]), &Default::default())
    }

    fn flat<B: Backend, const D: usize>(x: Tensor<B, D>) -> Vec<f64> {
        x.into_data().iter::<f64>().collect()
    }

    /// The mean of R estimates is autodiff's gradient: T = R·‖mean − g‖²/Tr S, S their covariance, is 1 in the mean. Were the 78 coordinates
    /// independent and alike, 0.3 % of the seeds would exceed 1.5, of 40 such directions 2 %; the seeds are fixed, so that a failure means a change.
    #[test]
    fn estimates_are_autodiff_s_gradient_in_the_mean() {
        let (pairs, config) = (6, AlignmentConfig::new(5, 7).with_embed_dim(4).with_hidden_dim(6));
        let device = Default::default();
        let mut model = config.with_logit_scale(1.2).init::<AB>(&device).unwrap();
        // weights of its own: the generator behind `init` is shared with the tests beside this one
        for (i, layer) in model.image.layers.iter_mut().chain(&mut model.text.layers).enumerate() {
            let [d_in, d_out] = layer.weight.dims();
            layer.weight = Param::from_tensor(features::<AB>(10 + i as u64, d_in, d_out).mul_scalar(0.6));
            layer.bias = Some(Param::from_tensor(Tensor::zeros([d_out], &device)));
        }
        let input = (features::<AB>(1, pairs, 5), features::<AB>(2, pairs, 7));
        let said = model.forward(input.clone(), &mut Probe::clean());
        let gradients = model.losses(said, Pairs::new(pairs)).mean().backward();
        let weights = |m: &Alignment<AB>| {
            [m.image.layers[0].weight.val(), m.image.layers[1].weight.val(), m.text.layers[1].weight.val()]
        };
        let exact: Vec<f64> = weights(&model).iter().flat_map(|w| flat(w.grad(&gradients).unwrap())).collect();
        let tau = flat(model.logit_scale.val().grad(&gradients).unwrap())[0];

        let (trained, plain) = (trained_parameters(&model), model.valid());
        let batch = Batch {
            ids: (0..pairs as u64).collect(),
            input: (input.0.inner(), input.1.inner()),
            target: Pairs::<Flex>::new(pairs),
        };
        let budget = QueryBudget::new(8, 1).unwrap();
        let allocation = Allocation::uniform(pairs, &budget);
        for space in [Space::Activation, Space::LowRank(1), Space::Weights] {
            let mut estimator = Estimator::new(space);
            (estimator.sigma, estimator.seed) = (1e-2, 5);
            let clean = estimator.clean(&plain, &batch, &trained).unwrap();
            const R: usize = 400;
            let (mut sum, mut squares) = (vec![0.0; exact.len()], 0.0);
            for step in 0..R as u64 {
                let estimate = estimator.estimate(&plain, &batch, &trained, &clean, &allocation, step).unwrap();
                let all = [&plain.image.layers[0], &plain.image.layers[1], &plain.text.layers[1]];
                let g: Vec<f64> = all.iter().flat_map(|l| flat(estimate.gradient(&l.weight).unwrap())).collect();
                squares += g.iter().zip(&exact).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
                sum.iter_mut().zip(&g).for_each(|(s, g)| *s += g);
                let own = flat(estimate.gradient(&plain.logit_scale).unwrap())[0];
                assert!((own - tau).abs() < 1e-5, "{space}: the scale's gradient is {own}, autodiff's {tau}");
            }
            let bias: f64 = sum.iter().zip(&exact).map(|(s, g)| (s / R as f64 - g).powi(2)).sum();
            let t = R as f64 * bias / (squares / R as f64);
            assert!(t < 1.5, "{space}: T = {t}");
        }
    }

    #[test]
    fn standardised_features_can_be_raw_ones() {
        let device = Default::default();
        let model = AlignmentConfig::new(3, 2).with_hidden_dim(4).init::<Flex>(&device).unwrap();
        let raw = (features::<Flex>(7, 5, 3) * 9.0 + 2.0, features::<Flex>(8, 5, 2) - 4.0);
        let scaled = |x: &Tensor<Flex, 2>| {
            let mut values: Vec<f32> = x.to_data().iter::<f32>().collect();
            let scaling = Scaling::of(&values, x.dims()[1]);
            scaling.apply(&mut values);
            (Tensor::from_data(TensorData::new(values, x.dims()), &device), scaling)
        };
        let ((images, of_images), (texts, of_texts)) = (scaled(&raw.0), scaled(&raw.1));
        let same = model.clone().of_raw(&of_images, &of_texts);
        let distance = (model.embed_images(images) - same.embed_images(raw.0)).abs().max().into_scalar();
        let of_texts = (model.embed_texts(texts) - same.embed_texts(raw.1)).abs().max().into_scalar();
        assert!(distance < 1e-5 && of_texts < 1e-5, "{distance}, {of_texts}");
        assert_eq!(Scaling::of(&[1.0, 1.0], 1), Scaling { mean: vec![1.0], std: vec![1.0] });
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        let error = AlignmentConfig::new(0, 3).init::<Flex>(&Default::default()).unwrap_err().to_string();
        assert!(error.contains("image_dim = 0"), "{error}");
        let config = AlignmentConfig::new(3, 3).with_logit_scale(f64::NAN);
        assert!(config.init::<Flex>(&Default::default()).unwrap_err().to_string().contains("logit_scale"));
    }

    #[test]
    fn a_scale_at_its_bound_stays() {
        let model = AlignmentConfig::new(3, 3).with_logit_scale(9.0).init::<Flex>(&Default::default()).unwrap();
        let scale: f32 = model.scale().into_scalar();
        assert!((scale - 100.0).abs() < 1e-3, "{scale}");
        let said = model.forward((features(0, 4, 3), features(1, 4, 3)), &mut Probe::clean());
        let target = model.couple(&said, &Pairs::new(4)).unwrap();
        assert_eq!(flat(model.exact_gradients(&said, &target)[0].1.clone()), [0.0]);
    }
}
