//! The JSON files of sentence-transformers and of transformers' tokenizers: what of them decides an
//! embedding, and what of that is supported.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use flops_vit::error::CheckpointError;
use serde::Deserialize;
use serde_json::Value;

use crate::checkpoint::folder::check_supported;
use crate::towers::{DenseActivation, Pooling};

/// The largest width of a layer.
const MAX_WIDTH: usize = 1 << 20;

fn wrong<T>(why: impl Into<String>) -> Result<T, CheckpointError> {
    Err(CheckpointError::Setting(why.into()))
}

/// Checks that a key names the sentence embedding, where it is given.
fn check_key(field: &'static str, value: Option<&String>) -> Result<(), CheckpointError> {
    value.map_or(Ok(()), |value| check_supported(field, value, &["sentence_embedding"]))
}

/// Checks a width against that of what comes before.
fn check_width(field: &str, value: usize, expected: usize) -> Result<(), CheckpointError> {
    match value == expected {
        true => Ok(()),
        false => wrong(format!("{field} = {value}, but what comes before has the width {expected}; fetch it again")),
    }
}

/// An entry of `modules.json`.
#[derive(Deserialize)]
pub(super) struct Entry {
    pub name: String,
    pub path: String,
    #[serde(rename = "type")]
    pub kind: String,
}

impl Entry {
    /// The class of a module of sentence-transformers itself, such as `Pooling`. Its place in the
    /// library has changed from version to version.
    pub fn class(&self) -> Option<&str> {
        self.kind.strip_prefix("sentence_transformers.")?.rsplit('.').next()
    }

    /// The error of a module that is not supported.
    pub fn unsupported(&self, supported: &str) -> CheckpointError {
        let (value, supported) = (self.kind.clone(), format!("{supported} of sentence_transformers"));
        CheckpointError::Unsupported { field: "type", value, supported }
    }
}

/// Checks that names are unique, and that paths stay in the folder.
pub(super) fn check_entries(entries: &[Entry]) -> Result<(), CheckpointError> {
    let mut names = BTreeSet::new();
    for entry in entries {
        if !names.insert(&entry.name) {
            return wrong(format!("two modules have the name '{}'; give each its own", entry.name));
        }
        if !Path::new(&entry.path).components().all(|part| matches!(part, Component::Normal(_))) {
            return wrong(format!("path = '{}' is no folder inside this one", entry.path));
        }
    }
    Ok(())
}

/// `config_sentence_transformers.json`.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct ModelSettings {
    model_type: Option<String>,
    prompts: Option<BTreeMap<String, Option<String>>>,
    default_prompt_name: Option<String>,
    pub truncate_dim: Option<usize>,
}

impl ModelSettings {
    /// Checks the settings, and returns notes for the user.
    pub fn check(&self) -> Result<Vec<String>, CheckpointError> {
        if let Some(kind) = &self.model_type {
            check_supported("model_type", kind, &["SentenceTransformer"])?;
        }
        if self.truncate_dim == Some(0) {
            return wrong("truncate_dim = 0; use at least 1, or null");
        }
        let texts =
            self.prompts.iter().flatten().filter(|(_, text)| text.as_ref().is_some_and(|text| !text.is_empty()));
        let prompts: Vec<(&str, &str)> =
            texts.map(|(name, text)| (name.as_str(), text.as_deref().unwrap_or_default())).collect();
        if let Some(name) = &self.default_prompt_name {
            // two names are always there, without a text
            let known = ["query", "document"].contains(&name.as_str());
            if !known && !self.prompts.iter().flatten().any(|(known, _)| known == name) {
                return wrong(format!("default_prompt_name = '{name}' is none of the prompts; set it to null"));
            }
            if let Some((_, text)) = prompts.iter().find(|(known, _)| known == name) {
                let remedy = "set it to null, and put that in front of the texts yourself";
                return wrong(format!("default_prompt_name = '{name}' ({text:?}) is not supported; {remedy}"));
            }
        }
        Ok(match prompts.is_empty() {
            true => vec![],
            false => {
                let names: Vec<_> = prompts.iter().map(|(name, text)| format!("{name} ({text:?})")).collect();
                vec![format!("texts are encoded without a prompt; the encoder has {}", names.join(", "))]
            }
        })
    }
}

/// `sentence_bert_config.json`: what the module `Transformer` takes beside the model.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct TransformerSettings {
    pub max_seq_length: Option<usize>,
    pub do_lower_case: Option<bool>,
    transformer_task: Option<String>,
    module_output_name: Option<String>,
    modality_config: Option<BTreeMap<String, Value>>,
    tokenizer_name_or_path: Option<Value>,
    processing_kwargs: Value,
    model_args: Value,
    model_kwargs: Value,
    tokenizer_args: Value,
    processor_kwargs: Value,
    config_args: Value,
    config_kwargs: Value,
    query_expansion: Value,
    // of tasks that are not asked for, and of speed alone
    #[serde(rename = "query_length")]
    _query_length: Value,
    #[serde(rename = "document_length")]
    _document_length: Value,
    #[serde(rename = "unpad_inputs")]
    _unpad_inputs: Value,
}

impl TransformerSettings {
    /// Checks that the module gives the last hidden states of texts, as they are.
    pub fn check(&self) -> Result<(), CheckpointError> {
        if self.max_seq_length == Some(0) {
            return wrong("max_seq_length = 0; use at least 1, or null");
        }
        if let Some(task) = &self.transformer_task {
            check_supported("transformer_task", task, &["feature-extraction"])?;
        }
        if let Some(output) = &self.module_output_name {
            check_supported("module_output_name", output, &["token_embeddings"])?;
        }
        if let Some(modalities) = &self.modality_config {
            let text = modalities.get("text").unwrap_or(&Value::Null);
            let is = |key: &str, expected: &str| text.get(key).and_then(Value::as_str) == Some(expected);
            if !is("method", "forward") || !is("method_output_name", "last_hidden_state") {
                return wrong(format!(
                    "modality_config has text = {text}; only the last_hidden_state of forward is supported"
                ));
            }
        }
        let more = [
            ("processing_kwargs", &self.processing_kwargs),
            ("model_args", &self.model_args),
            ("model_kwargs", &self.model_kwargs),
            ("tokenizer_args", &self.tokenizer_args),
            ("processor_kwargs", &self.processor_kwargs),
            ("config_args", &self.config_args),
            ("config_kwargs", &self.config_kwargs),
            ("query_expansion", &self.query_expansion),
            ("tokenizer_name_or_path", self.tokenizer_name_or_path.as_ref().unwrap_or(&Value::Null)),
        ];
        for (name, value) in more {
            if !value.is_null() && value.as_object().is_none_or(|settings| !settings.is_empty()) {
                return wrong(format!("{name} = {value} is not supported; remove it if the embeddings do not need it"));
            }
        }
        Ok(())
    }
}

/// `tokenizer_config.json` of transformers.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct TokenizerSettings {
    /// The longest text, in tokens; a number such as 10³⁰ where there is no bound.
    pub model_max_length: Option<f64>,
    tokenizer_class: Option<String>,
    padding_side: Option<String>,
    truncation_side: Option<String>,
    do_lower_case: Option<bool>,
    strip_accents: Option<bool>,
    tokenize_chinese_chars: Option<bool>,
}

impl TokenizerSettings {
    /// Checks the settings that `tokenizer.json` does not have.
    pub fn check(&self) -> Result<(), CheckpointError> {
        if let Some(length) = self.model_max_length.filter(|length| *length < 1.0) {
            return wrong(format!("model_max_length = {length}; use at least 1"));
        }
        for (field, side) in [("padding_side", &self.padding_side), ("truncation_side", &self.truncation_side)] {
            side.as_ref().map_or(Ok(()), |side| check_supported(field, side, &["right"]))?;
        }
        Ok(())
    }

    /// Checks that `tokenizer.json` agrees, given its BERT normaliser: whether it lowers, strips
    /// accents and splits Chinese characters. transformers' `BertTokenizer` would follow this file.
    pub fn agree(&self, lowers: bool, strips: Option<bool>, splits: bool) -> Result<(), CheckpointError> {
        if self.tokenizer_class.as_ref().is_some_and(|class| !class.starts_with("BertTokenizer")) {
            return Ok(());
        }
        for (field, here, there) in [
            ("do_lower_case", self.do_lower_case, Some(lowers)),
            ("strip_accents", self.strip_accents, strips),
            ("tokenize_chinese_chars", self.tokenize_chinese_chars, Some(splits)),
        ] {
            if let Some(here) = here.filter(|here| Some(*here) != there) {
                let remedy = "make both files agree";
                return wrong(format!(
                    "{field} = {here}, but the normalizer of tokenizer.json does otherwise; {remedy}"
                ));
            }
        }
        Ok(())
    }
}

/// One name, or several.
#[derive(Deserialize)]
#[serde(untagged)]
enum Names {
    One(String),
    Several(Vec<String>),
}

/// `config.json` of the module `Pooling`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PoolingSettings {
    #[serde(alias = "word_embedding_dimension")]
    embedding_dimension: usize,
    pooling_mode: Option<Names>,
    pooling_mode_cls_token: Option<bool>,
    pooling_mode_max_tokens: Option<bool>,
    pooling_mode_mean_tokens: Option<bool>,
    pooling_mode_mean_sqrt_len_tokens: Option<bool>,
    pooling_mode_weightedmean_tokens: Option<bool>,
    pooling_mode_lasttoken: Option<bool>,
    // about prompts, and there are none
    #[serde(rename = "include_prompt")]
    _include_prompt: Option<bool>,
}

impl PoolingSettings {
    /// How tokens of the width `embed_dim` are pooled, in the order of the result.
    pub fn pooling(&self, embed_dim: usize) -> Result<Vec<Pooling>, CheckpointError> {
        check_width("embedding_dimension", self.embedding_dimension, embed_dim)?;
        let names = match &self.pooling_mode {
            Some(Names::One(name)) => vec![name],
            Some(Names::Several(names)) => names.iter().collect(),
            None => return Ok(self.flagged()),
        };
        const MODES: [(&str, Pooling); 6] = [
            ("cls", Pooling::Cls),
            ("max", Pooling::Max),
            ("mean", Pooling::Mean),
            ("mean_sqrt_len_tokens", Pooling::MeanSqrtLen),
            ("weightedmean", Pooling::WeightedMean),
            ("lasttoken", Pooling::LastToken),
        ];
        let mode = |name: &String| {
            check_supported("pooling_mode", name, &MODES.map(|(name, _)| name))?;
            Ok(MODES.into_iter().find_map(|(known, mode)| (known == name).then_some(mode)).unwrap_or(Pooling::Mean))
        };
        match names.len() {
            1..=6 => names.into_iter().map(mode).collect(),
            count => wrong(format!("pooling_mode has {count} entries; give 1 to 6")),
        }
    }

    /// The modes of the older form, a switch for each; without one it is the mean.
    fn flagged(&self) -> Vec<Pooling> {
        let flags = [
            (self.pooling_mode_cls_token, Pooling::Cls),
            (self.pooling_mode_max_tokens, Pooling::Max),
            (self.pooling_mode_mean_tokens, Pooling::Mean),
            (self.pooling_mode_mean_sqrt_len_tokens, Pooling::MeanSqrtLen),
            (self.pooling_mode_weightedmean_tokens, Pooling::WeightedMean),
            (self.pooling_mode_lasttoken, Pooling::LastToken),
        ];
        let on: Vec<Pooling> = flags.into_iter().filter(|(on, _)| *on == Some(true)).map(|(_, mode)| mode).collect();
        if on.is_empty() { vec![Pooling::Mean] } else { on }
    }
}

/// `config.json` of the module `Dense`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DenseSettings {
    in_features: usize,
    pub out_features: usize,
    #[serde(default = "yes")]
    pub bias: bool,
    #[serde(default = "tanh")]
    activation_function: String,
    module_input_name: Option<String>,
    module_output_name: Option<String>,
    #[serde(default)]
    use_residual: bool,
}

fn yes() -> bool {
    true
}

/// The activation function of a file that names none.
fn tanh() -> String {
    "torch.nn.modules.activation.Tanh".into()
}

impl DenseSettings {
    /// Checks the settings for an input of the width `width`, and returns the activation function.
    pub fn activation(&self, width: usize) -> Result<DenseActivation, CheckpointError> {
        check_width("in_features", self.in_features, width)?;
        if !(1..=MAX_WIDTH).contains(&self.out_features) {
            return wrong(format!("out_features = {}; use 1 to {MAX_WIDTH}", self.out_features));
        }
        check_key("module_input_name", self.module_input_name.as_ref())?;
        check_key("module_output_name", self.module_output_name.as_ref())?;
        if self.use_residual {
            return wrong("use_residual = true is not supported; only false is");
        }
        match self.activation_function.as_str() {
            "torch.nn.modules.linear.Identity" | "torch.nn.Identity" => Ok(DenseActivation::Identity),
            "torch.nn.modules.activation.Tanh" | "torch.nn.Tanh" => Ok(DenseActivation::Tanh),
            "torch.nn.modules.activation.ReLU" | "torch.nn.ReLU" => Ok(DenseActivation::Relu),
            "torch.nn.modules.activation.GELU" | "torch.nn.GELU" => Ok(DenseActivation::Gelu),
            other => Err(CheckpointError::Unsupported {
                field: "activation_function",
                value: other.into(),
                supported: "Identity, Tanh, ReLU or GELU of torch.nn".into(),
            }),
        }
    }
}

/// `config.json` of the module `Normalize`; older versions write none.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct NormalizeSettings {
    module_input_name: Option<String>,
    module_output_name: Option<String>,
}

impl NormalizeSettings {
    pub fn check(&self) -> Result<(), CheckpointError> {
        check_key("module_input_name", self.module_input_name.as_ref())?;
        check_key("module_output_name", self.module_output_name.as_ref())
    }
}

/// `config.json` of the module `LayerNorm`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LayerNormSettings {
    dimension: usize,
}

impl LayerNormSettings {
    pub fn check(&self, width: usize) -> Result<(), CheckpointError> {
        check_width("dimension", self.dimension, width)
    }
}
