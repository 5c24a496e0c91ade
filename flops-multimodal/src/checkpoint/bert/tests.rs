use super::*;
use burn::backend::Flex;
use burn::store::ModuleSnapshot;
use flops_core::Probe;
use std::collections::BTreeMap;

use crate::tokenizer::{Tokens, tests::JSON};

fn config() -> BertConfig {
    let config = BertConfig::new().with_vocab_size(8).with_context_length(6).with_embed_dim(8).with_depth(2);
    config.with_num_heads(2).with_mlp_dim(12)
}

fn model() -> Bert<Flex> {
    config().init(&Default::default()).unwrap()
}

fn values(model: &Bert<Flex>) -> BTreeMap<String, Vec<f32>> {
    let all = model.collect(None, None, false);
    all.iter().map(|t| (t.full_path(), t.to_data().unwrap().to_vec().unwrap())).collect()
}

fn open_dir(dir: &Path) -> Result<Opened<Flex>, MultimodalError> {
    open(&Source::Path(dir.into()), &Default::default())
}

#[test]
fn a_saved_model_opens_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let model = model();
    save(&model, &config(), JSON, dir.path(), false).unwrap();
    let opened = open_dir(dir.path()).unwrap();
    assert_eq!(opened.config, config());
    assert_eq!(values(&opened.model), values(&model));
    let tokens = opened.tokenizer.unwrap().encode(&["a small dog", "dog"], 6).unwrap();
    let expected = model.encode(&tokens, &mut Probe::clean()).unwrap();
    assert_eq!(opened.model.encode(&tokens, &mut Probe::clean()).unwrap().to_data(), expected.to_data());
    let by_head = opened.model.encode_with(&opened.head, &tokens, &mut Probe::clean()).unwrap();
    assert_eq!(by_head.to_data(), expected.to_data());
    assert_eq!((opened.max_length, opened.notes), (6, vec![]));

    save(&model, &config(), JSON, dir.path(), true).unwrap();
    let file = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    let (config, weights, tokenizer) = (file(CONFIG), file("model.safetensors"), file(TOKENIZER));
    let half = from_bytes::<Flex>(&config, &weights, Some(&tokenizer), &Default::default()).unwrap();
    for (name, exact) in values(&model) {
        for (a, b) in values(&half.model)[&name].iter().zip(exact) {
            assert!((a - b).abs() <= b.abs() * 5e-4 + 1e-7, "{name}: {a}, expected {b}");
        }
    }
    let files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
    // three of transformers, and modules.json with 1_Pooling
    assert_eq!(files.len(), 5, "{files:?}");
}

#[test]
fn a_failed_save_keeps_the_old_files() {
    let dir = tempfile::tempdir().unwrap();
    save(&model(), &config(), JSON, dir.path(), false).unwrap();
    let before = std::fs::read(dir.path().join("model.safetensors")).unwrap();
    let mut broken = model();
    broken.layers[0].fc1.weight = broken.layers[0].fc1.weight.clone().map(|w| w * f32::NAN);
    let error = save(&broken, &config(), JSON, dir.path(), false).unwrap_err().to_string();
    assert!(error.contains("layers.0.fc1.weight"), "{error}");
    let mut large = model();
    large.layers[0].fc1.weight = large.layers[0].fc1.weight.clone().map(|w| w * 1e9);
    let error = save(&large, &config(), JSON, dir.path(), true).unwrap_err().to_string();
    assert!(error.contains("too large for f16"), "{error}");
    let error = save(&model(), &config().with_depth(3), JSON, dir.path(), false).unwrap_err().to_string();
    assert!(error.contains("depth = 3, the model's is 2"), "{error}");
    let tuned = model().with_lora(1, 0).unwrap();
    let error = save(&tuned, &config(), JSON, dir.path(), false).unwrap_err().to_string();
    assert!(error.contains("merge them first"), "{error}");
    assert_eq!(std::fs::read(dir.path().join("model.safetensors")).unwrap(), before);
    save(&tuned.merged(), &config(), JSON, dir.path(), false).unwrap();
}

/// A file with the tensors of another, renamed by `change` and dropped where it returns `None`.
fn rewritten(bytes: &[u8], change: impl Fn(&str) -> Option<String>) -> Vec<u8> {
    let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
    let kept = file.tensors().into_iter().filter_map(|(name, t)| change(&name).map(|name| (name, t)));
    safetensors::serialize(kept.collect::<Vec<_>>(), None).unwrap()
}

#[test]
fn other_exporters_names_are_accepted_and_wrong_names_listed() {
    let dir = tempfile::tempdir().unwrap();
    let model = model();
    save(&model, &config(), JSON, dir.path(), false).unwrap();
    let described = std::fs::read(dir.path().join(CONFIG)).unwrap();
    let weights = std::fs::read(dir.path().join("model.safetensors")).unwrap();
    let load = |bytes: &[u8]| from_bytes::<Flex>(&described, bytes, None, &Default::default());

    // BertForPreTraining with TensorFlow's names
    let prefixed = rewritten(&weights, |name| {
        Some(format!("bert.{name}").replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"))
    });
    assert_eq!(values(&load(&prefixed).unwrap().model), values(&model));
    let ids: Vec<u8> = (0..6i64).flat_map(i64::to_le_bytes).collect();
    let file = safetensors::SafeTensors::deserialize(&weights).unwrap();
    let mut more = file.tensors();
    let view = |dtype, shape, bytes| safetensors::tensor::TensorView::new(dtype, shape, bytes).unwrap();
    more.push(("embeddings.position_ids".into(), view(safetensors::Dtype::I64, vec![1, 6], &ids)));
    more.push(("pooler.dense.bias".into(), view(safetensors::Dtype::F32, vec![12], &ids)));
    more.push(("cls.seq_relationship.bias".into(), view(safetensors::Dtype::F32, vec![12], &ids)));
    let more = safetensors::serialize(more, None).unwrap();
    assert_eq!(values(&load(&more).unwrap().model), values(&model));

    let message = |bytes: &[u8]| load(bytes).unwrap_err().to_string();
    let missing = message(&rewritten(&weights, |n| (!n.contains("layer.1.output.dense")).then(|| n.into())));
    for name in ["encoder.layer.1.output.dense.weight", "encoder.layer.1.output.dense.bias"] {
        assert!(missing.contains(name), "{missing}");
    }
    let deeper = BertConfig { depth: 1, ..config() };
    let deeper = serde_json::to_vec(&HfConfig::from_config(&deeper)).unwrap();
    let extra = from_bytes::<Flex>(&deeper, &weights, None, &Default::default()).unwrap_err().to_string();
    assert!(extra.contains("encoder.layer.1.attention.self.key.bias"), "{extra}");
    let wider = serde_json::to_vec(&HfConfig::from_config(&config().with_mlp_dim(16))).unwrap();
    let shape = from_bytes::<Flex>(&wider, &weights, None, &Default::default()).unwrap_err().to_string();
    assert!(shape.contains("layers.0.fc1.bias is [12], expected [16]"), "{shape}");
    assert!(message(&weights[..weights.len() / 2]).contains("no intact safetensors"));
    assert!(message(b"").contains("empty"));
}

#[test]
fn errors_name_the_unsupported_setting() {
    for (json, expected) in [
        (r#"{"model_type": "roberta"}"#, "model_type = 'roberta' is not supported; only bert is"),
        (r#"{"hidden_act": "relu"}"#, "hidden_act = 'relu' is not supported; only gelu or quick_gelu is"),
        (r#"{"position_embedding_type": "relative_key"}"#, "position_embedding_type = 'relative_key'"),
        (r#"{"num_attention_heads": 7}"#, "num_heads = 7"),
        (r#"{"num_hidden_layers": 10000}"#, "num_hidden_layers = 10000"),
        (r#"{"num_hidden_layers": 1000000000000}"#, "depth = 1000000000000; use at most 16,384"),
        (r#"{"vocab_size": 18446744073709551615}"#, "vocab_size = 18446744073709551615; use at most 1,048,576"),
        (r#"{"layer_norm_eps": -1e-5}"#, "layer_norm_eps = -0.00001; use a number above 0"),
        (r#"{"layer_norm_eps": 0}"#, "layer_norm_eps = 0;"),
        (r#"{"is_decoder": true}"#, "is_decoder = 'true' is not supported"),
        (r#"{"hidden_size": null}"#, "invalid type: null, expected usize"),
        ("[", "config.json in memory"),
    ] {
        let weights = safetensors::serialize(Vec::<(&str, safetensors::tensor::TensorView)>::new(), None).unwrap();
        let found = from_bytes::<Flex>(json.as_bytes(), &weights, None, &Default::default());
        let found = found.unwrap_err().to_string();
        assert!(found.contains(expected), "{found}");
    }
    let error = open_dir(Path::new("nowhere")).unwrap_err().to_string();
    assert!(error.contains("nowhere/config.json"), "{error}");
}

#[test]
fn forward_embedded_continues_from_token_embeddings() {
    let model = model();
    let tokens = Tokens::new(vec![vec![2, 4, 3]], vec![vec![1, 1, 1]]).unwrap();
    let (ids, mask) = (tokens.ids_tensor(&Default::default()), tokens.mask_tensor(&Default::default()));
    let mut probe = Probe::clean();
    let looked_up = model.token_embeddings(ids.clone(), &mut probe);
    let a = model.forward_embedded(looked_up, mask.clone(), &mut probe);
    assert_eq!(a.to_data(), model.forward(ids, mask, &mut probe).to_data());
}
