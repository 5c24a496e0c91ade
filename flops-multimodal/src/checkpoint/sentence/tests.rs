//! Folders of a BERT of one layer and width 8. The expected embeddings follow from the states of its
//! tokens by the definitions in sentence-transformers 6.2.0 (`Pooling._forward_padded`,
//! `Dense.forward`, `Normalize.forward`, `SentenceTransformer.encode`).

use super::*;
use burn::backend::Flex;
use flops_core::Probe;
use flops_vit::checkpoint::Source;
use serde_json::Value;
use tempfile::TempDir;

use crate::TextEncoder;
use crate::checkpoint::bert;
use crate::tokenizer::tests::JSON;
use crate::towers::{Bert, BertConfig};

const WIDTH: usize = 8;
/// Of two lengths, so that one is padded.
const TEXTS: [&str; 2] = ["a small dog runs", "dog"];

/// A folder of transformers alone, and its model.
fn plain() -> (TempDir, Bert<Flex>) {
    let (dir, device) = (tempfile::tempdir().unwrap(), Default::default());
    let config = BertConfig::new().with_vocab_size(8).with_context_length(10).with_embed_dim(WIDTH).with_depth(1);
    let config = config.with_num_heads(2).with_mlp_dim(12);
    let mut model = config.init::<Flex>(&device).unwrap();
    // sines instead of random weights; wide enough that the texts differ
    let words = Tensor::<Flex, 1, Int>::arange(0..64, &device).float().sin().mul_scalar(2.0).reshape([8, WIDTH]);
    model.token_embed.weight = model.token_embed.weight.map(|_| words);
    bert::save(&model, &config, JSON, dir.path(), false).unwrap();
    std::fs::remove_file(dir.path().join(MODULES)).unwrap();
    std::fs::remove_dir_all(dir.path().join("1_Pooling")).unwrap();
    (dir, model)
}

fn write(dir: &TempDir, name: &str, content: &Value) {
    let path = dir.path().join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, content.to_string()).unwrap();
}

/// Writes the list of modules, the transformer first.
fn modules(dir: &TempDir, classes: &[&str]) {
    let module = |(i, class): (usize, &&str)| {
        let path = if i == 0 { String::new() } else { format!("{i}_{class}") };
        json!({"idx": i, "name": i.to_string(), "path": path, "type": format!("sentence_transformers.models.{class}")})
    };
    write(dir, MODULES, &json!(classes.iter().enumerate().map(module).collect::<Vec<_>>()));
}

/// A folder with the modules Transformer and Pooling, and its model.
fn pooled(pooling: &Value) -> (TempDir, Bert<Flex>) {
    let (dir, model) = plain();
    modules(&dir, &["Transformer", "Pooling"]);
    let mut settings = json!({"word_embedding_dimension": WIDTH});
    settings.as_object_mut().unwrap().extend(pooling.as_object().unwrap().clone());
    write(&dir, "1_Pooling/config.json", &settings);
    (dir, model)
}

fn open(dir: &TempDir) -> Result<TextEncoder<Flex>, MultimodalError> {
    TextEncoder::open(&Source::Path(dir.path().into()), &Default::default())
}

fn rows(x: Tensor<Flex, 2>) -> Vec<Vec<f32>> {
    let width = x.dims()[1];
    x.into_data().to_vec::<f32>().unwrap().chunks(width).map(<[f32]>::to_vec).collect()
}

fn embeddings(dir: &TempDir) -> Vec<Vec<f32>> {
    rows(open(dir).unwrap_or_else(|e| panic!("{e}")).encode(&TEXTS).unwrap())
}

/// The states of a text's tokens, without padding.
fn states(model: &Bert<Flex>, text: &str, max_length: usize) -> Vec<Vec<f32>> {
    let tokenizer = TextTokenizer::from_bytes(JSON.as_bytes()).unwrap();
    let (tokens, device) = (tokenizer.encode(&[text], max_length).unwrap(), Default::default());
    let hidden = model.forward(tokens.ids_tensor(&device), tokens.mask_tensor(&device), &mut Probe::clean());
    rows(hidden.squeeze_dim(0))
}

/// Σ wᵢ·hᵢ over the tokens.
fn sum(states: &[Vec<f32>], weight: impl Fn(usize) -> f32) -> Vec<f32> {
    (0..WIDTH).map(|c| states.iter().enumerate().map(|(i, h)| weight(i) * h[c]).sum()).collect()
}

fn mean(states: &[Vec<f32>]) -> Vec<f32> {
    sum(states, |_| 1.0 / states.len() as f32)
}

fn cls(states: &[Vec<f32>]) -> Vec<f32> {
    states[0].clone()
}

fn max(states: &[Vec<f32>]) -> Vec<f32> {
    (0..WIDTH).map(|c| states.iter().map(|h| h[c]).fold(f32::MIN, f32::max)).collect()
}

fn unit(x: &[f32]) -> Vec<f32> {
    let length = x.iter().map(|x| x * x).sum::<f32>().sqrt();
    x.iter().map(|x| x / length).collect()
}

fn assert_embeddings(found: &[Vec<f32>], model: &Bert<Flex>, what: &str, of: impl Fn(&[Vec<f32>]) -> Vec<f32>) {
    for (found, text) in found.iter().zip(TEXTS) {
        let expected = of(&states(model, text, 10));
        assert_eq!(found.len(), expected.len(), "{what}");
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() < 1e-5, "{what}, '{text}': {a}, expected {b}");
        }
    }
}

fn assert_refused(dir: &TempDir, expected: &str) {
    let found = open(dir).map(|_| ()).unwrap_err().to_string();
    assert!(found.contains(expected) && found.lines().count() == 1, "{found}, expected {expected}");
}

/// `SentenceTransformer(dir)` without `modules.json`: Transformer and mean Pooling, no Normalize.
#[test]
fn a_folder_of_transformers_alone_is_mean_pooled_and_says_so() {
    let (dir, model) = plain();
    assert_embeddings(&embeddings(&dir), &model, "plain", mean);
    let notes = open(&dir).unwrap().notes().to_vec();
    assert!(notes.len() == 1 && notes[0].contains("no modules.json") && notes[0].contains("mean"), "{notes:?}");
    let length = embeddings(&dir)[0].iter().map(|x| x * x).sum::<f32>().sqrt();
    assert!((length - 1.0).abs() > 0.1, "the test cannot tell normalised embeddings: a length of {length}");
    write(&dir, TRANSFORMER, &json!({"max_seq_length": 4}));
    assert_refused(&dir, "modules.json is missing, but sentence_bert_config.json is there");
}

#[test]
fn pooling_follows_sentence_transformers() {
    type Of = fn(&[Vec<f32>]) -> Vec<f32>;
    let kinds: [(&str, &str, Of); 6] = [
        ("pooling_mode_cls_token", "cls", cls),
        ("pooling_mode_mean_tokens", "mean", mean),
        ("pooling_mode_max_tokens", "max", max),
        ("pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens", |h| sum(h, |_| 1.0 / (h.len() as f32).sqrt())),
        ("pooling_mode_weightedmean_tokens", "weightedmean", |h| {
            let total = (h.len() * (h.len() + 1) / 2) as f32;
            sum(h, |i| (i + 1) as f32 / total)
        }),
        ("pooling_mode_lasttoken", "lasttoken", |h| h[h.len() - 1].clone()),
    ];
    for (flag, name, of) in kinds {
        let (dir, model) = pooled(&json!({flag: true, "include_prompt": false}));
        assert_embeddings(&embeddings(&dir), &model, flag, of);
        assert!(open(&dir).unwrap().notes().is_empty());
        // the newer form, which counts where both are there
        let (dir, model) = pooled(&json!({"pooling_mode": name, "pooling_mode_max_tokens": true}));
        assert_embeddings(&embeddings(&dir), &model, name, of);
    }
    // _convert_legacy_pooling_kwargs: the mean where no mode is on
    let (dir, model) = pooled(&json!({"pooling_mode_cls_token": false}));
    assert_embeddings(&embeddings(&dir), &model, "none", mean);
}

/// Concatenated in the order of `_LEGACY_POOLING_MODE_KWARGS`, or of the list.
#[test]
fn several_modes_are_concatenated() {
    let (dir, model) = pooled(&json!({"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true}));
    assert_embeddings(&embeddings(&dir), &model, "flags", |h| [cls(h), mean(h)].concat());
    let (dir, model) = pooled(&json!({"pooling_mode": ["max", "cls"]}));
    assert_embeddings(&embeddings(&dir), &model, "list", |h| [max(h), cls(h)].concat());
    write(&dir, MODEL, &json!({"truncate_dim": 11}));
    assert_embeddings(&embeddings(&dir), &model, "truncated", |h| [max(h), cls(h)].concat()[..11].to_vec());
}

/// Weights of a module: `shape` values of a sine, as safetensors.
fn weights(dir: &TempDir, module: &str, tensors: &[(&str, &[usize])]) {
    let values = |shape: &[usize]| -> Vec<u8> {
        (0..shape.iter().product::<usize>()).flat_map(|i| wave(i).to_le_bytes()).collect()
    };
    let bytes: Vec<_> = tensors.iter().map(|(name, shape)| (*name, shape.to_vec(), values(shape))).collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        (*name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
    });
    let file = safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap();
    std::fs::write(dir.path().join(module).join("model.safetensors"), file).unwrap();
}

fn wave(i: usize) -> f32 {
    (0.7 * i as f32).sin()
}

/// `F.linear(x, weight, bias)` with the weights of [`weights`] as `[3, 8]` and `[3]`.
fn linear3(x: &[f32]) -> Vec<f32> {
    (0..3).map(|o| wave(o) + x.iter().enumerate().map(|(i, x)| wave(o * WIDTH + i) * x).sum::<f32>()).collect()
}

/// A folder with the mean, a Dense and Normalize; `change` changes the settings of the Dense.
fn dense(change: impl FnOnce(&mut Value)) -> (TempDir, Bert<Flex>) {
    let (dir, model) = pooled(&json!({"pooling_mode_mean_tokens": true}));
    modules(&dir, &["Transformer", "Pooling", "Dense", "Dropout", "Normalize"]);
    let mut settings = json!({"in_features": WIDTH, "out_features": 3, "bias": true});
    change(&mut settings);
    write(&dir, "2_Dense/config.json", &settings);
    weights(&dir, "2_Dense", &[("linear.weight", &[3, WIDTH]), ("linear.bias", &[3])]);
    (dir, model)
}

#[test]
fn dense_and_normalize_follow_in_order() {
    type Function = fn(f32) -> f32;
    let names: [(&str, Function); 3] =
        [("linear.Identity", |x| x), ("activation.Tanh", f32::tanh), ("activation.ReLU", |x| x.max(0.0))];
    for (name, f) in names {
        let name = format!("torch.nn.modules.{name}");
        let (dir, model) = dense(|settings| settings["activation_function"] = json!(name));
        let of = |h: &[Vec<f32>]| unit(&linear3(&mean(h)).into_iter().map(f).collect::<Vec<_>>());
        assert_embeddings(&embeddings(&dir), &model, &name, of);
    }
    // Dense.__init__: tanh by default
    let (dir, model) = dense(|_| ());
    assert_embeddings(&embeddings(&dir), &model, "default", |h| {
        unit(&linear3(&mean(h)).into_iter().map(f32::tanh).collect::<Vec<_>>())
    });
    // without bias, and without Normalize
    let (dir, model) = dense(|settings| {
        settings["bias"] = json!(false);
        settings["activation_function"] = json!("torch.nn.modules.linear.Identity");
    });
    weights(&dir, "2_Dense", &[("linear.weight", &[3, WIDTH])]);
    modules(&dir, &["Transformer", "Pooling", "Dense"]);
    let of = |h: &[Vec<f32>]| linear3(&mean(h)).iter().enumerate().map(|(o, x)| x - wave(o)).collect();
    assert_embeddings(&embeddings(&dir), &model, "no bias", of);
}

/// `nn.LayerNorm(dimension)`, ε = 1e-5, with weight and bias.
#[test]
fn layer_norm_follows() {
    let (dir, model) = pooled(&json!({"pooling_mode": "cls"}));
    modules(&dir, &["Transformer", "Pooling", "LayerNorm"]);
    write(&dir, "2_LayerNorm/config.json", &json!({"dimension": WIDTH}));
    weights(&dir, "2_LayerNorm", &[("norm.weight", &[WIDTH]), ("norm.bias", &[WIDTH])]);
    let of = |h: &[Vec<f32>]| {
        let x = cls(h);
        let mean = x.iter().sum::<f32>() / WIDTH as f32;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / WIDTH as f32;
        x.iter().enumerate().map(|(i, x)| (x - mean) / (variance + 1e-5).sqrt() * wave(i) + wave(i)).collect()
    };
    assert_embeddings(&embeddings(&dir), &model, "layer norm", of);
    write(&dir, "2_LayerNorm/config.json", &json!({"dimension": 5}));
    assert_refused(&dir, "dimension = 5, but what comes before has the width 8");
}

/// `Transformer`: `model_max_length` is `max_seq_length`, else the tokenizer's; never above the
/// positions, where the model would fail.
#[test]
fn texts_are_truncated_to_the_length_of_the_encoder() {
    let lengths = |sentence: Value, tokenizer: Value| {
        let (dir, _) = pooled(&json!({"pooling_mode": "cls"}));
        write(&dir, TRANSFORMER, &sentence);
        write(&dir, TOKENIZER_CONFIG, &tokenizer);
        open(&dir).unwrap().tokenizer().1
    };
    for (sentence, tokenizer, expected) in [
        (json!({"max_seq_length": 4, "do_lower_case": false}), json!({"model_max_length": 6}), 4),
        (json!({"max_seq_length": 8}), json!({"model_max_length": 6}), 8),
        (json!({"max_seq_length": null}), json!({"model_max_length": 6}), 6),
        (json!({}), json!({"model_max_length": 1e30}), 10),
        (json!({}), json!({}), 10),
        (json!({"max_seq_length": 99}), json!({}), 10),
    ] {
        assert_eq!(lengths(sentence.clone(), tokenizer.clone()), expected, "{sentence}, {tokenizer}");
    }
    let (dir, model) = pooled(&json!({"pooling_mode": "mean"}));
    write(&dir, "sentence_roberta_config.json", &json!({"max_seq_length": 4}));
    let found = embeddings(&dir);
    let expected = mean(&states(&model, TEXTS[0], 4));
    assert!(found[0].iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5), "{found:?}");
}

#[test]
fn lower_case_is_honoured_and_contradictions_are_refused() {
    let (dir, _) = pooled(&json!({"pooling_mode": "mean"}));
    let cased = JSON.replace(r#"{"type": "Lowercase"}"#, "null");
    std::fs::write(dir.path().join("tokenizer.json"), &cased).unwrap();
    let same = |dir: &TempDir| {
        let found = rows(open(dir).unwrap().encode(&["dog", "DOG"]).unwrap());
        found[0].iter().zip(&found[1]).all(|(a, b)| (a - b).abs() < 1e-6)
    };
    assert!(!same(&dir));
    write(&dir, TRANSFORMER, &json!({"do_lower_case": true}));
    assert!(same(&dir));

    let bert = r#"{"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
        "strip_accents": null, "lowercase": true}"#;
    std::fs::write(
        dir.path().join("tokenizer.json"),
        cased.replace("\"normalizer\": null", &format!("\"normalizer\": {bert}")),
    )
    .unwrap();
    write(&dir, TOKENIZER_CONFIG, &json!({"do_lower_case": true, "tokenizer_class": "BertTokenizer"}));
    open(&dir).unwrap();
    write(&dir, TOKENIZER_CONFIG, &json!({"do_lower_case": false, "tokenizer_class": "BertTokenizer"}));
    assert_refused(&dir, "do_lower_case = false, but the normalizer of tokenizer.json does otherwise");
    write(&dir, TOKENIZER_CONFIG, &json!({"do_lower_case": false, "tokenizer_class": "PreTrainedTokenizerFast"}));
    open(&dir).unwrap();
    write(&dir, TOKENIZER_CONFIG, &json!({"truncation_side": "left"}));
    assert_refused(&dir, "truncation_side = 'left' is not supported; only right is");
}

#[test]
fn prompts_are_noted_and_a_default_one_is_refused() {
    let (dir, model) = pooled(&json!({"pooling_mode": "cls"}));
    let prompts = json!({"query": "query: ", "document": ""});
    write(&dir, MODEL, &json!({"prompts": prompts, "default_prompt_name": null, "similarity_fn_name": "cosine"}));
    assert_embeddings(&embeddings(&dir), &model, "prompts", cls);
    let notes = open(&dir).unwrap().notes().to_vec();
    assert!(notes.len() == 1 && notes[0].contains(r#"query ("query: ")"#), "{notes:?}");
    write(&dir, MODEL, &json!({"prompts": prompts, "default_prompt_name": "document"}));
    open(&dir).unwrap();
    for (settings, expected) in [
        (json!({"prompts": prompts, "default_prompt_name": "query"}), "default_prompt_name = 'query' (\"query: \")"),
        (json!({"prompts": prompts, "default_prompt_name": "x"}), "default_prompt_name = 'x' is none of the prompts"),
        (json!({"model_type": "SparseEncoder"}), "model_type = 'SparseEncoder' is not supported"),
        (json!({"truncate_dim": 0}), "truncate_dim = 0"),
    ] {
        write(&dir, MODEL, &settings);
        assert_refused(&dir, expected);
    }
}

#[test]
fn other_settings_are_refused_by_name() {
    let (dir, _) = dense(|_| ());
    for (name, settings, expected) in [
        (TRANSFORMER, json!({"max_seq_length": 0}), "max_seq_length = 0"),
        (TRANSFORMER, json!({"transformer_task": "fill-mask"}), "transformer_task = 'fill-mask'"),
        (TRANSFORMER, json!({"model_args": {"attn": "x"}}), r#"model_args = {"attn":"x"} is not supported"#),
        (TRANSFORMER, json!({"new_setting": 1}), "unknown field `new_setting`"),
        (
            TRANSFORMER,
            json!({"modality_config": {"text": {"method": "forward", "method_output_name": "pooler_output"}}}),
            "only the last_hidden_state of forward is supported",
        ),
        ("1_Pooling/config.json", json!({"word_embedding_dimension": 16}), "embedding_dimension = 16, but"),
        (
            "1_Pooling/config.json",
            json!({"embedding_dimension": 8, "pooling_mode": "attention"}),
            "pooling_mode = 'attention'",
        ),
        ("1_Pooling/config.json", json!({"embedding_dimension": 8, "pooling_mode": []}), "pooling_mode has 0 entries"),
        ("1_Pooling/config.json", json!({}), "missing field `embedding_dimension`"),
        ("2_Dense/config.json", json!({"in_features": 9, "out_features": 3}), "in_features = 9, but"),
        ("2_Dense/config.json", json!({"in_features": 8, "out_features": 1u64 << 40}), "out_features = 1099511627776"),
        (
            "2_Dense/config.json",
            json!({"in_features": 8, "out_features": 4}),
            "2_Dense/model.safetensors: wrong shapes",
        ),
        (
            "2_Dense/config.json",
            json!({"in_features": 8, "out_features": 3, "bias": false}),
            "no parameter of the model: linear.bias",
        ),
        (
            "2_Dense/config.json",
            json!({"in_features": 8, "out_features": 3, "activation_function": "my.Own"}),
            "activation_function = 'my.Own' is not supported",
        ),
        (
            "2_Dense/config.json",
            json!({"in_features": 8, "out_features": 3, "use_residual": true}),
            "use_residual = true",
        ),
        (
            "2_Dense/config.json",
            json!({"in_features": 8, "out_features": 3, "module_input_name": "token_embeddings"}),
            "module_input_name = 'token_embeddings'",
        ),
        ("4_Normalize/config.json", json!({"module_input_name": "token_embeddings"}), "module_input_name"),
    ] {
        let path = dir.path().join(name);
        let before = std::fs::read(&path);
        write(&dir, name, &settings);
        assert_refused(&dir, expected);
        match before {
            Ok(before) => std::fs::write(path, before).unwrap(),
            Err(_) => std::fs::remove_file(path).unwrap(),
        }
        open(&dir).unwrap_or_else(|e| panic!("after {name} {settings}: {e}"));
    }
    std::fs::remove_file(dir.path().join("2_Dense/model.safetensors")).unwrap();
    assert_refused(&dir, "there are no weights in the folder");
}

#[test]
fn other_modules_are_refused_by_name() {
    let (dir, _) = pooled(&json!({"pooling_mode": "cls"}));
    for (classes, expected) in [
        (&[][..], "it lists no module"),
        (&["WordEmbeddings", "Pooling"], "type = 'sentence_transformers.models.WordEmbeddings' is not supported"),
        (&["Transformer"], "no Pooling follows the Transformer"),
        (&["Transformer", "LSTM"], "type = 'sentence_transformers.models.LSTM' is not supported; only Pooling"),
        (&["Transformer", "Pooling", "CNN"], "type = 'sentence_transformers.models.CNN'"),
        (&["Transformer", "Pooling", "Pooling"], "type = 'sentence_transformers.models.Pooling'"),
    ] {
        modules(&dir, classes);
        assert_refused(&dir, expected);
    }
    let first = json!({"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"});
    let second = |name: &str, path: &str, kind: &str| json!([first, {"name": name, "path": path, "type": kind}]);
    for (list, expected) in [
        (second("1", "1_Pooling", "custom_st.Pooling"), "type = 'custom_st.Pooling' is not supported"),
        (second("1", "../other", "sentence_transformers.models.Pooling"), "path = '../other' is no folder inside"),
        (second("1", "/etc", "sentence_transformers.models.Pooling"), "path = '/etc' is no folder inside"),
        (second("0", "1_Pooling", "sentence_transformers.models.Pooling"), "two modules have the name '0'"),
        (json!([{"path": "", "name": "0"}]), "missing field `type`"),
        (
            json!([{"name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]),
            "open that folder",
        ),
    ] {
        write(&dir, MODULES, &list);
        assert_refused(&dir, expected);
    }
    // the places of the classes in version 6
    let newer = second("1", "1_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling");
    write(&dir, MODULES, &newer);
    open(&dir).unwrap();
}

/// Models of the first versions have the transformer in a folder, too.
#[test]
fn the_transformer_may_lie_in_a_folder() {
    let (dir, model) = pooled(&json!({"pooling_mode": "cls"}));
    let inner = dir.path().join("0_Transformer");
    std::fs::create_dir(&inner).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::rename(dir.path().join(name), inner.join(name)).unwrap();
    }
    write(&dir, "0_Transformer/sentence_bert_config.json", &json!({"max_seq_length": 9}));
    write(
        &dir,
        MODULES,
        &json!([{"name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"},
            {"name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]),
    );
    assert_embeddings(&embeddings(&dir), &model, "inner", cls);
    assert_eq!(open(&dir).unwrap().tokenizer().1, 9);
}

/// What `torch.save({"linear.weight": x}, _use_new_zipfile_serialization=False)` writes, for `x` of
/// the shape `[3, 8]`.
fn in_pytorchs_format(x: &[f32]) -> Vec<u8> {
    let text = |text: &str| [b"X".as_slice(), &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
    let magic = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
    let values: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
    let parts: [&[u8]; 17] = [
        magic,
        b"\x80\x02M\xe9\x03.",
        b"\x80\x02}",
        &text("little_endian"),
        b"\x88s.\x80\x02}",
        &text("linear.weight"),
        b"ctorch._utils\n_rebuild_tensor_v2\n((",
        &text("storage"),
        b"ctorch\nFloatStorage\n",
        &text("0"),
        &text("cpu"),
        b"K\x18tQK\x00K\x03K\x08\x86K\x08K\x01\x86",
        b"\x89ccollections\nOrderedDict\n)RtRs.\x80\x02]",
        &text("0"),
        b"a.",
        &(x.len() as u64).to_le_bytes(),
        &values,
    ];
    parts.concat()
}

/// The reader of PyTorch's files is that of `flops-vit`.
#[test]
fn a_dense_layer_in_pytorchs_format_is_read() {
    let (dir, model) = dense(|settings| {
        settings["bias"] = json!(false);
        settings["activation_function"] = json!("torch.nn.modules.linear.Identity");
    });
    let eighths: Vec<f32> = (0..3 * WIDTH).map(|i| i as f32 / 8.0).collect();
    std::fs::remove_file(dir.path().join("2_Dense/model.safetensors")).unwrap();
    std::fs::write(dir.path().join("2_Dense/pytorch_model.bin"), in_pytorchs_format(&eighths)).unwrap();
    let of = |h: &[Vec<f32>]| {
        let x = mean(h);
        let row = |weights: &[f32]| weights.iter().zip(&x).map(|(w, x)| w * x).sum::<f32>();
        unit(&eighths.chunks(WIDTH).map(row).collect::<Vec<_>>())
    };
    assert_embeddings(&embeddings(&dir), &model, "pytorch", of);
}
