//! Parity with HuggingFace's `CLIPModel` and `BertModel`, and with all-MiniLM-L6-v2 as it is
//! published.
//!
//! The references are random models of width 32 with 2 layers, in float32 with eager attention.
//! `fixtures/generate.py` makes their files, in `fixtures`. The weights of MiniLM are not among
//! them: `FLOPS_MINILM` names the folder that has them, and without it that test prints "skipped".

use std::path::{Path, PathBuf};

use burn::backend::{Flex, NdArray};
use burn::prelude::*;
use flops_core::Probe;
use flops_multimodal::checkpoint::{bert, clip};
use flops_multimodal::towers::{Bert, normalise};
use flops_multimodal::{Clip, Tokens};
use flops_vit::checkpoint::Source;
use safetensors::{Dtype, SafeTensors};

const TOLERANCE: f32 = 1e-4;

fn fixture(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures")).join(name)
}

/// Inputs and outputs of the reference, and the largest difference from it so far.
struct Reference(Vec<u8>, f32);

impl Reference {
    fn read(dir: &Path) -> Self {
        Self(std::fs::read(dir.join("io.safetensors")).unwrap(), 0.0)
    }

    fn floats(&self, name: &str) -> TensorData {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = file.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), Dtype::F32);
        let values = tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        TensorData::new(values.collect(), tensor.shape().to_vec())
    }

    fn rows(&self, name: &str) -> Vec<Vec<i64>> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = file.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), Dtype::I64);
        let all: Vec<i64> = tensor.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect();
        all.chunks_exact(tensor.shape()[1]).map(<[i64]>::to_vec).collect()
    }

    fn tokens(&self, mask: &str) -> Tokens {
        Tokens::new(self.rows("in.input_ids"), self.rows(mask)).unwrap()
    }

    fn assert_close<B: Backend, const D: usize>(&mut self, found: Tensor<B, D>, name: &str) {
        let everywhere = vec![1; found.shape().num_elements()];
        self.assert_close_where(found, name, &everywhere);
    }

    /// The same where `mask` is 1; it has an entry for each vector, or for each element.
    fn assert_close_where<B: Backend, const D: usize>(&mut self, found: Tensor<B, D>, name: &str, mask: &[i64]) {
        let expected = self.floats(name);
        assert_eq!(found.dims().to_vec(), expected.shape.to_vec(), "shape of {name}");
        let (found, expected) = (found.into_data(), expected);
        let each = found.num_elements() / mask.len();
        for (i, (a, b)) in found.iter::<f32>().zip(expected.iter::<f32>()).enumerate() {
            if mask[i / each] == 1 {
                self.1 = self.1.max((a - b).abs());
                assert!((a - b).abs() <= TOLERANCE, "{name}[{i}]: found {a}, expected {b}");
            }
        }
    }
}

fn assert_clip_matches<B: Backend>(backend: &str) {
    let dir = fixture("clip");
    let device = B::Device::default();
    let mut reference = Reference::read(&dir);
    let opened = clip::open::<B>(&Source::Path(dir), &device).unwrap();
    let model: Clip<B> = opened.model;
    let mut probe = Probe::clean();

    let images = Tensor::<B, 4>::from_data(reference.floats("in.pixel_values"), &device);
    // HuggingFace's embeddings come before `pre_layrnorm`
    reference.assert_close(model.vision.embed_image(images.clone(), &mut probe), "out.vision_embeddings");
    reference.assert_close(model.vision.forward(images.clone(), &mut probe), "out.vision_last_hidden_state");
    let images = model.encode_image(images, &mut probe);
    reference.assert_close(images.clone(), "out.image_features_unnormalised");
    reference.assert_close(normalise(images.clone()), "out.image_embeds");

    let tokens = reference.tokens("in.attention_mask");
    let (ids, mask) = (tokens.ids_tensor::<B>(&device), tokens.mask_tensor::<B>(&device));
    let looked_up = model.text.token_embeddings(ids.clone(), &mut probe);
    reference.assert_close(model.text.embed_text(looked_up.clone(), &mut probe), "out.text_embeddings");
    let hidden = model.text.forward_embedded(looked_up, mask, &mut probe);
    reference.assert_close_where(hidden, "out.text_last_hidden_state", &tokens.mask().concat());
    let texts = model.encode_text(&tokens, &mut probe).unwrap();
    reference.assert_close(texts.clone(), "out.text_features_unnormalised");
    reference.assert_close(normalise(texts.clone()), "out.text_embeds");
    let logits = model.logits_per_image(images.clone(), texts);
    reference.assert_close(logits.clone(), "out.logits_per_image");
    reference.assert_close(logits.transpose(), "out.logits_per_text");

    let tokens = reference.tokens("in.attention_mask_mid");
    let texts = model.encode_text(&tokens, &mut probe).unwrap();
    reference.assert_close(normalise(texts.clone()), "out.text_embeds_mid");
    reference.assert_close(model.logits_per_image(images, texts), "out.logits_per_image_mid");
    let [rows, width] = tokens.dims();
    let tokens = Tokens::new(tokens.ids().to_vec(), vec![vec![1; width]; rows]).unwrap();
    let texts = model.encode_text(&tokens, &mut probe).unwrap();
    reference.assert_close(normalise(texts), "out.text_embeds_nomask");
    println!("clip on {backend}: differs by at most {:.1e}", reference.1);
}

#[test]
fn clip_matches_huggingface() {
    assert_clip_matches::<Flex>("flex");
    assert_clip_matches::<NdArray>("ndarray");
}

fn assert_bert_matches<B: Backend>(backend: &str) {
    let dir = fixture("bert");
    let device = B::Device::default();
    let mut reference = Reference::read(&dir);
    let model: Bert<B> = bert::open(&Source::Path(dir), &device).unwrap().model;
    let tokens = reference.tokens("in.attention_mask");
    let (ids, mask) = (tokens.ids_tensor::<B>(&device), tokens.mask_tensor::<B>(&device));
    let seen = tokens.mask().concat();
    let mut probe = Probe::clean();

    let looked_up = model.token_embeddings(ids.clone(), &mut probe);
    let mut x = model.embed_text(looked_up, &mut probe);
    reference.assert_close(x.clone(), "out.embeddings");
    let bias = flops_multimodal::towers::attention_bias(mask.clone(), false);
    for (i, layer) in model.layers.iter().enumerate() {
        x = layer.forward(x, Some(&bias), &mut probe);
        reference.assert_close_where(x.clone(), &format!("out.hidden_states.{}", i + 1), &seen);
    }
    let hidden = model.forward(ids, mask.clone(), &mut probe);
    reference.assert_close_where(hidden.clone(), "out.last_hidden_state", &seen);
    reference.assert_close(Bert::mean_pooled(hidden, mask, &probe), "out.mean_pooled");
    reference.assert_close(model.encode(&tokens, &mut probe).unwrap(), "out.mean_pooled_normalised");
    println!("bert on {backend}: differs by at most {:.1e}", reference.1);
}

#[test]
fn bert_matches_huggingface() {
    assert_bert_matches::<Flex>("flex");
    assert_bert_matches::<NdArray>("ndarray");
}

/// Three sentences, with their token ids and embeddings from `transformers`.
#[derive(serde::Deserialize)]
struct MiniLm {
    sentences: Vec<String>,
    input_ids: Vec<Vec<i64>>,
    embeddings: Vec<Vec<f32>>,
}

fn assert_minilm_matches<B: Backend>(dir: &Path, reference: &MiniLm, backend: &str) {
    let opened = bert::open::<B>(&Source::Path(dir.into()), &Default::default()).unwrap_or_else(|e| panic!("{e}"));
    let tokenizer = opened.tokenizer.expect("the folder has a tokenizer.json");
    let tokens = tokenizer.encode(&reference.sentences, 256).unwrap();
    for ((ids, mask), expected) in tokens.ids().iter().zip(tokens.mask()).zip(&reference.input_ids) {
        let seen: Vec<i64> = ids.iter().zip(mask).filter(|(_, m)| **m == 1).map(|(id, _)| *id).collect();
        assert_eq!(&seen, expected);
    }
    let found = opened.model.encode(&tokens, &mut Probe::clean()).unwrap().into_data();
    // its modules.json says the same
    let by_head = opened.model.encode_with(&opened.head, &tokens, &mut Probe::clean()).unwrap().into_data();
    assert_eq!((by_head, opened.max_length), (found.clone(), 256));
    assert_eq!(found.shape.to_vec(), [reference.sentences.len(), 384]);
    let expected = reference.embeddings.concat();
    assert_eq!(found.num_elements(), expected.len());
    let far = |most: f32, (a, b): (f32, f32)| if (a - b).abs() <= most { most } else { (a - b).abs() };
    let off = found.iter::<f32>().zip(expected).fold(0.0, far);
    println!("all-MiniLM-L6-v2 on {backend}: differs by at most {off:.1e}");
    assert!(off <= TOLERANCE, "all-MiniLM-L6-v2 on {backend}: differs by {off}");
}

#[test]
fn minilm_matches_huggingface() {
    let Ok(dir) = std::env::var("FLOPS_MINILM") else {
        println!("skipped: FLOPS_MINILM names no folder with all-MiniLM-L6-v2");
        return;
    };
    let reference = std::fs::read(fixture("minilm_ref.json")).unwrap();
    let reference: MiniLm = serde_json::from_slice(&reference).unwrap();
    assert_minilm_matches::<Flex>(Path::new(&dir), &reference, "flex");
    assert_minilm_matches::<NdArray>(Path::new(&dir), &reference, "ndarray");
}
