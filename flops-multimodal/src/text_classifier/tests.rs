//! Scopes, records, padding and errors. Estimates are compared with autodiff in `towers/tests.rs`.

use burn::backend::{Autodiff, Flex};
use burn::module::ModuleMapper;
use flops_core::parameters::parameters;

use super::*;
use crate::checkpoint::bert;
use crate::towers::BertConfig;

type AB = Autodiff<Flex>;

fn model(seed: u64) -> TextClassifier<AB> {
    let device = Default::default();
    <AB as Backend>::seed(&device, seed);
    let config = BertConfig::new().with_vocab_size(12).with_context_length(6).with_embed_dim(8);
    let encoder = config.with_depth(2).with_num_heads(2).with_mlp_dim(12).init(&device).unwrap();
    TextClassifier::new(encoder, 3, seed).unwrap()
}

/// Weights large enough for attention and adapters to matter.
fn grown(model: TextClassifier<AB>) -> TextClassifier<AB> {
    struct Grow(u32);
    impl ModuleMapper<AB> for Grow {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<AB, D>>) -> Param<Tensor<AB, D>> {
            self.0 += 1;
            let phase = f64::from(self.0);
            param.map(|value| {
                let (shape, trained) = (value.dims(), value.is_require_grad());
                let waves = Tensor::<AB, 1, Int>::arange(0..shape.iter().product::<usize>() as i64, &value.device());
                let waves = (waves.float() * 1.7 + phase).sin().reshape(shape) * 0.3;
                (value.detach() + waves.detach()).detach().set_require_grad(trained)
            })
        }
    }
    model.map(&mut Grow(0))
}

/// Four texts of 2 to 5 tokens.
fn batch<B: Backend>() -> TextBatch<B> {
    let device = Default::default();
    let ids = [[1, 5, 2, 0, 0], [1, 7, 3, 9, 2], [1, 2, 0, 0, 0], [1, 4, 4, 2, 0]];
    let mask = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]];
    Batch {
        ids: (0..4).collect(),
        input: (Tensor::from_ints(ids, &device), Tensor::from_ints(mask, &device)),
        target: Tensor::from_ints([0, 1, 2, 1], &device),
    }
}

fn trained(model: &TextClassifier<AB>) -> Vec<String> {
    parameters(model).into_iter().filter(|p| p.trained).map(|p| p.path.join(".")).collect()
}

#[test]
fn scopes_train_what_they_say() {
    let of = |scope: &str| trained(&model(1).with_lora(2, 1).unwrap().with_scope(scope.parse().unwrap()).unwrap());
    assert_eq!(of("head"), ["head.weight", "head.bias"]);
    let lora = of("lora:2");
    assert_eq!(lora.len(), 2 * 2 * 2 + 2);
    assert!(lora.iter().all(|name| name.contains("_lora.") || name.starts_with("head.")), "{lora:?}");
    let last = of("last:1");
    assert_eq!(last.len(), 16 + 2);
    assert!(last.iter().all(|name| name.starts_with("encoder.layers.1.") || name.starts_with("head.")), "{last:?}");
    assert_eq!(of("bias_norm").len(), 2 * 10 + 2 + 2);
    // embeddings and their norm, two layers with two adapters each, the head
    assert_eq!(of("full").len(), 5 + 2 * (16 + 4) + 2);
}

#[test]
fn what_does_not_fit_is_named() {
    let error = |scope: &str| model(1).with_scope(scope.parse().unwrap()).unwrap_err().to_string();
    assert!(error("lora:4").contains("scope = lora:4") && error("lora:4").contains("with_lora"));
    assert!(error("last:3").contains("fewer layers"));
    assert!(error("cls_tail").contains("for texts use head"));
    let one = TextClassifier::new(model(1).encoder, 1, 0).unwrap_err().to_string();
    assert!(one.contains("classes = 1"), "{one}");
    let opened = bert::shipped::<AB>(&Default::default()).unwrap();
    let tokenizer = opened.tokenizer.unwrap();
    let item = |text: &str| TextItem { id: 0, text: text.into(), label: 0 };
    // a tokenizer with more words than the encoder
    let foreign = model(1).batch::<Flex>(&tokenizer, &[item("a large dotted star")], &Default::default());
    assert!(foreign.unwrap_err().to_string().contains("vocabulary of 12"));
    assert!(model(1).batch::<Flex>(&tokenizer, &[], &Default::default()).is_err());
    let fourth = TextItem { label: 3, ..item("a star") };
    let outside = model(1).batch::<Flex>(&tokenizer, &[fourth], &Default::default()).unwrap_err().to_string();
    assert!(outside.contains("label = 3"), "{outside}");
}

/// As the docs say: a record is loaded into a model with the same adapters.
#[test]
fn records_with_adapters_round_trip() {
    let tuned = grown(model(1).with_lora(2, 1).unwrap());
    let logits = |model: &TextClassifier<AB>| model.forward(batch::<AB>().input, &mut Probe::clean()).into_data();
    let record = || tuned.clone().into_record();
    assert_eq!(logits(&model(5).with_lora(2, 9).unwrap().load_record(record())), logits(&tuned));
    let without = model(5).load_record(record());
    assert!(without.encoder.lora_rank().is_none());
    assert_eq!(model(5).with_lora(2, 9).unwrap().load_record(without.into_record()).encoder.lora_rank(), None);
}

/// A text has the same logits alone and beside a longer one, and a limit truncates it.
#[test]
fn padding_changes_nothing_and_long_texts_are_truncated() {
    let device = Default::default();
    let opened = bert::shipped::<Flex>(&device).unwrap();
    let tokenizer = opened.tokenizer.unwrap();
    let model = TextClassifier::new(opened.model, 2, 0).unwrap();
    let items = ["a star", "a picture of a small dotted yellow disc at the top left"];
    let items: Vec<TextItem> =
        items.into_iter().zip(0..).map(|(text, id)| TextItem { id, text: text.into(), label: id as usize }).collect();
    let logits = |model: &TextClassifier<Flex>, items: &[TextItem]| {
        let batch = model.batch::<Flex>(&tokenizer, items, &device).unwrap();
        model.forward(batch.input, &mut Probe::clean())
    };
    let both = logits(&model, &items);
    for (row, item) in items.iter().enumerate() {
        let alone = logits(&model, std::slice::from_ref(item));
        let apart: f32 = (both.clone().narrow(0, row, 1) - alone).abs().max().into_scalar();
        assert!(apart < 1e-5, "row {row}: {apart}");
    }
    let short = model.with_max_tokens(5);
    assert_eq!(short.batch::<Flex>(&tokenizer, &items, &device).unwrap().input.0.dims(), [2, 5]);
    assert_eq!(short.with_max_tokens(1000).max_tokens, 24);
}
