//! A classifier of texts: a BERT encoder with a head, fine-tuned as a whole or in part.

use burn::module::Param;
use burn::nn::Linear;
use burn::prelude::*;
use burn::tensor::Distribution;
use flops_core::losses::cross_entropy;
use flops_core::parameters::train_where;
use flops_core::random::keyed_rng;
use flops_core::{Batch, ForwardModel, Probe};
use flops_vit::{Scope, Sites};

use crate::error::MultimodalError;
use crate::tokenizer::TextTokenizer;
use crate::towers::{Bert, Pooling, attention_bias};

/// Standard deviation of the head's first weights.
const HEAD_STD: f64 = 0.02;
/// Key that separates the random numbers of a head from those of adapters of the same seed.
const HEAD: u64 = u64::from_le_bytes(*b"txt head");

/// A text with its class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextItem {
    /// Its number, the same whenever it is seen.
    pub id: u64,
    /// The text.
    pub text: String,
    /// Its class, from 0.
    pub label: usize,
}

/// A batch of texts: token ids and mask `[texts, tokens]`, and classes `[texts]`.
pub type TextBatch<B> = Batch<(Tensor<B, 2, Int>, Tensor<B, 2, Int>), Tensor<B, 1, Int>>;

/// A BERT encoder, the pooled states of its tokens, and a linear head.
///
/// Padding is masked: it changes no output, takes no noise and adds nothing to gradients.
///
/// A record holds what is trained. Load it into a model with the same adapters: Burn leaves out those
/// of a record that the model has no place for, and removes those that the record lacks.
///
/// # Example
/// ```
/// use burn::backend::{Autodiff, Flex};
/// use flops_core::allocator::{Neyman, QueryBudget};
/// use flops_core::{ForwardConfig, ForwardLearner};
/// use flops_multimodal::text_classifier::{TextClassifier, TextItem};
/// use flops_multimodal::checkpoint::bert;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let device = Default::default();
/// let opened = bert::shipped::<Autodiff<Flex>>(&device)?;
/// let tokenizer = opened.tokenizer.ok_or("no tokenizer")?;
/// let model = TextClassifier::new(opened.model, 2, 0)?.with_lora(4, 0)?.with_scope("lora:4".parse()?)?;
/// let texts = ["a small red circle", "a large blue star"].into_iter().enumerate();
/// let items: Vec<TextItem> =
///     texts.map(|(i, text)| TextItem { id: i as u64, text: text.into(), label: i }).collect();
/// let batch = model.batch(&tokenizer, &items, &device)?;
/// let config = ForwardConfig::new(QueryBudget::new(4, 1)?);
/// let learner = ForwardLearner::new(model, Neyman, config)?;
/// let step = learner.estimate(&batch)?; // the loss, and gradients from forward passes alone
/// assert_eq!(step.output.losses.dims(), [2]);
/// # Ok(())
/// # }
/// ```
#[derive(Module, Debug)]
pub struct TextClassifier<B: Backend> {
    /// The encoder.
    pub encoder: Bert<B>,
    /// The classifier, `[embed_dim, classes]`.
    pub head: Linear<B>,
    /// How the states of the tokens become one vector.
    #[module(skip)]
    pub pooling: Pooling,
    /// The longest text in tokens; longer ones are truncated.
    pub max_tokens: usize,
}

impl<B: Backend> TextClassifier<B> {
    /// A classifier of `classes` classes behind the mean of the tokens, everything trained.
    ///
    /// The head's weights are drawn from N(0, 0.02²) by `seed`, its biases are 0. Layers that a sentence
    /// encoder has behind the pooling are not used.
    ///
    /// # Errors
    /// [`MultimodalError::Config`] for fewer than 2 classes.
    pub fn new(encoder: Bert<B>, classes: usize, seed: u64) -> Result<Self, MultimodalError> {
        if classes < 2 {
            let remedy = "use at least 2 classes";
            return Err(MultimodalError::Config { field: "classes", value: classes, remedy });
        }
        let ([_, width], [max_tokens, _]) = (encoder.token_embed.weight.dims(), encoder.pos_embed.weight.dims());
        let device = encoder.token_embed.weight.device();
        let (law, mut rng) = (Distribution::Normal(0.0, HEAD_STD), keyed_rng([seed, HEAD, 0, 0]));
        let weight = Tensor::from_data(TensorData::random::<f32, _, _>([width, classes], law, &mut rng), &device);
        let bias = Some(Param::from_tensor(Tensor::zeros([classes], &device)));
        let head = Linear { weight: Param::from_tensor(weight), bias };
        Ok(Self { encoder, head, pooling: Pooling::Mean, max_tokens })
    }

    /// Pools the tokens in another way.
    #[must_use]
    pub fn with_pooling(self, pooling: Pooling) -> Self {
        Self { pooling, ..self }
    }

    /// Truncates texts to so many tokens, at most to the positions of the encoder.
    #[must_use]
    pub fn with_max_tokens(self, max_tokens: usize) -> Self {
        let [positions, _] = self.encoder.pos_embed.weight.dims();
        Self { max_tokens: max_tokens.min(positions), ..self }
    }

    /// Puts new adapters on the encoder, see [`Bert::with_lora`].
    ///
    /// # Errors
    /// If the rank does not fit.
    pub fn with_lora(self, rank: usize, seed: u64) -> Result<Self, MultimodalError> {
        Ok(Self { encoder: self.encoder.with_lora(rank, seed)?, ..self })
    }

    /// Chooses what the sites are, see [`Bert::with_sites`].
    #[must_use]
    pub fn with_sites(self, sites: Sites) -> Self {
        Self { encoder: self.encoder.with_sites(sites), ..self }
    }

    /// Makes the parameters of `scope` trainable and freezes all others.
    ///
    /// The head is trained in every scope. `cls_tail` is not offered: it is the tail of a ViT.
    ///
    /// # Errors
    /// [`MultimodalError::Setting`] for a scope that the model does not have: `lora:R` without
    /// adapters of that rank, `last:K` with more layers than there are, and `cls_tail`.
    pub fn with_scope(self, scope: Scope) -> Result<Self, MultimodalError> {
        let depth = self.encoder.layers.len();
        let remedy = match scope {
            Scope::Lora(rank) if self.encoder.lora_rank() != Some(rank) => {
                Some("the model has no adapters of that rank; put them in with with_lora")
            }
            Scope::Last(layers) if !(1..=depth).contains(&layers) => Some("the model has fewer layers"),
            Scope::Head | Scope::BiasNorm | Scope::Last(_) | Scope::Lora(_) | Scope::Full => None,
            _ => Some("for texts use head, bias_norm, last:K, lora:R or full"),
        };
        if let Some(remedy) = remedy {
            return Err(MultimodalError::Setting { name: "scope", value: scope.to_string(), remedy });
        }
        Ok(train_where(self, |path| trains(scope, path, depth)))
    }

    /// Texts as a batch, padded to the longest of them and truncated to `max_tokens`.
    ///
    /// The batch may be on another backend, such as the inner one that forward-only steps take.
    ///
    /// # Errors
    /// If there is no text, one has no token, a label is not one of the classes, or the tokenizer is not
    /// the encoder's.
    pub fn batch<C: Backend>(
        &self,
        tokenizer: &TextTokenizer,
        items: &[TextItem],
        device: &C::Device,
    ) -> Result<TextBatch<C>, MultimodalError> {
        let ([positions, _], [vocab_size, _]) =
            (self.encoder.pos_embed.weight.dims(), self.encoder.token_embed.weight.dims());
        let [_, classes] = self.head.weight.dims();
        if let Some(item) = items.iter().find(|item| item.label >= classes) {
            let remedy = "labels count the classes from 0; make a model of more classes";
            return Err(MultimodalError::Config { field: "label", value: item.label, remedy });
        }
        let texts: Vec<&str> = items.iter().map(|item| item.text.as_str()).collect();
        let tokens = tokenizer.encode(&texts, self.max_tokens)?;
        tokens.check(positions, vocab_size)?;
        let labels: Vec<i32> = items.iter().map(|item| item.label as i32).collect();
        Ok(Batch {
            ids: items.iter().map(|item| item.id).collect(),
            input: (tokens.ids_tensor(device), tokens.mask_tensor(device)),
            target: Tensor::from_data(TensorData::new(labels, [items.len()]), device),
        })
    }
}

impl<B: Backend> ForwardModel<B> for TextClassifier<B> {
    type Input = (Tensor<B, 2, Int>, Tensor<B, 2, Int>);
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    /// The logits. The embedding and each layer are stages; the head follows them.
    fn forward(&self, (ids, mask): Self::Input, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let bias = attention_bias(mask.clone(), false);
        let x = Bert::over_tokens(&mask, probe, |probe| {
            let x = probe.stage(ids, |ids, probe| {
                let x = self.encoder.token_embeddings(ids, probe);
                self.encoder.embed_text(x, probe)
            });
            let layers = self.encoder.layers.iter();
            layers.fold(x, |x, layer| probe.stage(x, |x, probe| layer.forward(x, Some(&bias), probe)))
        });
        let x = self.pooling.pool(x, mask, probe);
        probe.linear(&self.head, x)
    }

    fn losses(&self, logits: Tensor<B, 2>, labels: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        cross_entropy(logits, labels)
    }

    fn classification(
        &self,
        logits: &Tensor<B, 2>,
        labels: &Tensor<B, 1, Int>,
    ) -> Option<(Tensor<B, 2>, Tensor<B, 1, Int>)> {
        Some((logits.clone(), labels.clone()))
    }
}

/// Whether `scope` trains the parameter at `path`, in an encoder of `depth` layers.
fn trains(scope: Scope, path: &[String], depth: usize) -> bool {
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    let adapter = path.iter().any(|part| part.ends_with("_lora"));
    match (scope, path.as_slice()) {
        (Scope::Full, _) | (_, ["head", ..]) => true,
        (Scope::Lora(_), _) => adapter,
        (Scope::BiasNorm, [.., parameter]) => matches!(*parameter, "bias" | "gamma" | "beta"),
        (Scope::Last(layers), ["encoder", "layers", index, ..]) => {
            !adapter && index.parse::<usize>().is_ok_and(|index| index + layers >= depth)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests;
