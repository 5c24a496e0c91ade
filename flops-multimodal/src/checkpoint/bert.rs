//! Import and export of HuggingFace's `BertModel` folders.

use std::path::Path;

use burn::prelude::*;
use flops_core::train::files::write_atomic;
use flops_vit::checkpoint::Source;
use flops_vit::checkpoint::tensors::{
    Table, TensorSnapshot, fill, json, of_folder, of_safetensors, to_pytorch, to_theirs,
};
use flops_vit::error::CheckpointError;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::folder::{
    ACTIVATIONS, CONFIG, TOKENIZER, WEIGHTS, activation, check_depth, check_supported, error_in, renamed, tokenizer,
};
use super::sentence::{SentenceFolder, mean_normalised};
use crate::error::MultimodalError;
use crate::tokenizer::TextTokenizer;
use crate::towers::{Bert, BertConfig, Pooling, SentenceHead};

/// The parameter names of `BertModel`, and ours.
#[rustfmt::skip]
const NAMES: Table = &[
    ("embeddings.word_embeddings.weight", "token_embed.weight"),
    ("embeddings.position_embeddings.weight", "pos_embed.weight"),
    ("embeddings.token_type_embeddings.weight", "type_embed.weight"),
    ("embeddings.LayerNorm.weight", "norm.gamma"),
    ("embeddings.LayerNorm.bias", "norm.beta"),
    ("encoder.layer.N.attention.self.query.weight", "layers.N.query.weight"),
    ("encoder.layer.N.attention.self.query.bias", "layers.N.query.bias"),
    ("encoder.layer.N.attention.self.key.weight", "layers.N.key.weight"),
    ("encoder.layer.N.attention.self.key.bias", "layers.N.key.bias"),
    ("encoder.layer.N.attention.self.value.weight", "layers.N.value.weight"),
    ("encoder.layer.N.attention.self.value.bias", "layers.N.value.bias"),
    ("encoder.layer.N.attention.output.dense.weight", "layers.N.proj.weight"),
    ("encoder.layer.N.attention.output.dense.bias", "layers.N.proj.bias"),
    ("encoder.layer.N.attention.output.LayerNorm.weight", "layers.N.norm1.gamma"),
    ("encoder.layer.N.attention.output.LayerNorm.bias", "layers.N.norm1.beta"),
    ("encoder.layer.N.intermediate.dense.weight", "layers.N.fc1.weight"),
    ("encoder.layer.N.intermediate.dense.bias", "layers.N.fc1.bias"),
    ("encoder.layer.N.output.dense.weight", "layers.N.fc2.weight"),
    ("encoder.layer.N.output.dense.bias", "layers.N.fc2.bias"),
    ("encoder.layer.N.output.LayerNorm.weight", "layers.N.norm2.gamma"),
    ("encoder.layer.N.output.LayerNorm.bias", "layers.N.norm2.beta"),
];

/// `config.json`. An absent key has HuggingFace's default.
#[derive(Deserialize, Serialize)]
#[serde(default)]
struct HfConfig {
    model_type: String,
    hidden_act: String,
    position_embedding_type: Option<String>,
    vocab_size: usize,
    max_position_embeddings: usize,
    type_vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    layer_norm_eps: f64,
    pad_token_id: Option<usize>,
    is_decoder: bool,
}

impl Default for HfConfig {
    fn default() -> Self {
        Self {
            model_type: "bert".into(),
            hidden_act: "gelu".into(),
            position_embedding_type: None,
            vocab_size: 30522,
            max_position_embeddings: 512,
            type_vocab_size: 2,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            layer_norm_eps: 1e-12,
            pad_token_id: Some(0),
            is_decoder: false,
        }
    }
}

impl HfConfig {
    /// Converts to our configuration.
    fn convert(self) -> Result<BertConfig, CheckpointError> {
        check_supported("model_type", &self.model_type, &["bert"])?;
        let positions = self.position_embedding_type.as_deref().unwrap_or("absolute");
        check_supported("position_embedding_type", positions, &["absolute"])?;
        // a decoder's tokens do not see later ones
        check_supported("is_decoder", if self.is_decoder { "true" } else { "false" }, &["false"])?;
        Ok(BertConfig {
            vocab_size: self.vocab_size,
            context_length: self.max_position_embeddings,
            type_vocab_size: self.type_vocab_size,
            embed_dim: self.hidden_size,
            depth: self.num_hidden_layers,
            num_heads: self.num_attention_heads,
            mlp_dim: self.intermediate_size,
            layer_norm_eps: self.layer_norm_eps,
            activation: activation(&self.hidden_act)?,
            pad_token_id: self.pad_token_id.unwrap_or(0),
        })
    }

    /// Converts from our configuration.
    fn from_config(config: &BertConfig) -> Self {
        let hidden_act = ACTIVATIONS.into_iter().find_map(|(name, a)| (a == config.activation).then_some(name));
        Self {
            model_type: "bert".into(),
            hidden_act: hidden_act.unwrap_or("gelu").into(),
            position_embedding_type: Some("absolute".into()),
            vocab_size: config.vocab_size,
            max_position_embeddings: config.context_length,
            type_vocab_size: config.type_vocab_size,
            hidden_size: config.embed_dim,
            num_hidden_layers: config.depth,
            num_attention_heads: config.num_heads,
            intermediate_size: config.mlp_dim,
            layer_norm_eps: config.layer_norm_eps,
            pad_token_id: Some(config.pad_token_id),
            is_decoder: false,
        }
    }
}

/// A sentence encoder with its configuration and tokenizer.
#[derive(Debug)]
#[non_exhaustive]
pub struct Opened<B: Backend> {
    /// The model, its weights in f32.
    pub model: Bert<B>,
    /// Its configuration.
    pub config: BertConfig,
    /// Its tokenizer, if the folder has one.
    pub tokenizer: Option<TextTokenizer>,
    /// From its hidden states to sentence embeddings, see [`Bert::encode_with`].
    pub head: SentenceHead<B>,
    /// The longest text, in tokens; longer ones are to be truncated.
    pub max_length: usize,
    /// Remarks for the user: what the files did not say, a line each.
    pub notes: Vec<String>,
}

/// Loads a BERT encoder from a folder or from the HuggingFace hub, see [`Source`].
///
/// `position_ids`, the pooler and the heads of pretraining are ignored. All names may have the
/// prefix `bert.`.
///
/// A folder of sentence-transformers, one with a `modules.json`, decides how the tokens are pooled
/// and what follows: `Dense`, `LayerNorm`, `Dropout` and `Normalize` are supported. Its
/// `max_seq_length`, else the tokenizer's `model_max_length`, bounds the texts, and so do the
/// positions of the model. In a folder of transformers alone the embedding is the mean of the
/// tokens, not normalised; that is what sentence-transformers makes of such a folder.
///
/// # Errors
/// - If a file is missing or damaged.
/// - If parameters are missing or unknown; all of them are listed.
/// - If the model is not a BERT with absolute positions and GELU or quick GELU.
/// - If a module or a setting would change the embeddings and is not supported, such as a default
///   prompt.
///
/// # Example
/// ```no_run
/// use burn::backend::Flex;
/// use flops_core::Probe;
/// use flops_multimodal::checkpoint::bert;
///
/// let source = "hf:sentence-transformers/all-MiniLM-L6-v2".parse()?;
/// let opened = bert::open::<Flex>(&source, &Default::default())?;
/// if let Some(tokenizer) = opened.tokenizer {
///     let tokens = tokenizer.encode(&["a photo of an airplane"], opened.max_length)?;
///     println!("{}", opened.model.encode_with(&opened.head, &tokens, &mut Probe::clean())?);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn open<B: Backend>(source: &Source, device: &B::Device) -> Result<Opened<B>, MultimodalError> {
    let folder = SentenceFolder::read(&source.resolve()?)?;
    let dir = &folder.transformer;
    let config = json::<HfConfig>(&dir.join(CONFIG)).and_then(HfConfig::convert);
    let config = config.map_err(|why| error_in(dir, CONFIG, why))?;
    config.validate()?;
    let (name, tensors) = of_folder(dir)?;
    let model = fill_model(&config, tensors, device).map_err(|why| error_in(dir, name, why))?;
    let head = folder.head(config.embed_dim, device)?;
    let tokenizer = tokenizer(dir)?.map(|tokenizer| folder.prepared(tokenizer)).transpose()?;
    let tokenizer = tokenizer.map(|t| t.with_pad_id(config.pad_token_id as i64));
    let max_length = folder.max_length(config.context_length);
    Ok(Opened { model, config, tokenizer, head, max_length, notes: folder.notes })
}

/// The small BERT shipped with this crate: width 64, two layers. Its vocabulary is the words of
/// [`scenes`](crate::data::scenes), and its head the mean of the tokens, normalised to length 1.
///
/// It was pretrained on paraphrases of their captions with `examples/text_pretrain.rs`.
///
/// # Errors
/// If the files in the crate are damaged.
pub fn shipped<B: Backend>(device: &B::Device) -> Result<Opened<B>, MultimodalError> {
    let config = include_bytes!("../../weights/scenes_text/config.json");
    let weights = include_bytes!("../../weights/scenes_text/model.safetensors");
    let tokenizer = include_bytes!("../../weights/scenes_text/tokenizer.json");
    let opened = from_bytes(config, weights, Some(tokenizer), device)?;
    Ok(Opened { head: SentenceHead::mean_normalised(), ..opened })
}

/// Loads a BERT encoder from the contents of `config.json`, `model.safetensors` and, if given,
/// `tokenizer.json`. Its head is that of a folder without further files: the mean of the tokens.
///
/// # Errors
/// Those of [`open`].
pub fn from_bytes<B: Backend>(
    config: &[u8],
    weights: &[u8],
    tokenizer: Option<&[u8]>,
    device: &B::Device,
) -> Result<Opened<B>, MultimodalError> {
    let failed = |name: &str, why| MultimodalError::Checkpoint { path: format!("{name} in memory"), why };
    let config = serde_json::from_slice::<HfConfig>(config).map_err(|e| CheckpointError::Json(e.to_string()));
    let config = config.and_then(HfConfig::convert).map_err(|why| failed(CONFIG, why))?;
    config.validate()?;
    let model = of_safetensors(weights.to_vec()).and_then(|tensors| fill_model(&config, tensors, device));
    let model = model.map_err(|why| failed(WEIGHTS, why))?;
    let tokenizer = tokenizer.map(TextTokenizer::from_bytes).transpose()?;
    let tokenizer = tokenizer.map(|t| t.with_pad_id(config.pad_token_id as i64));
    let (head, max_length) = (SentenceHead::new(Pooling::Mean), config.context_length);
    Ok(Opened { model, config, tokenizer, head, max_length, notes: vec![] })
}

/// Fills a model with the tensors of a file.
fn fill_model<B: Backend>(
    config: &BertConfig,
    tensors: Vec<TensorSnapshot>,
    device: &B::Device,
) -> Result<Bert<B>, CheckpointError> {
    check_depth(config.depth, &tensors)?;
    let named = tensors.into_iter().map(|tensor| {
        let name = tensor.full_path();
        (name.strip_prefix("bert.").unwrap_or(&name).replace("LayerNorm.gamma", "LayerNorm.weight"), tensor)
    });
    let named = named.map(|(name, tensor)| (name.replace("LayerNorm.beta", "LayerNorm.bias"), tensor));
    let unused = |name: &str| {
        name == "embeddings.position_ids" || ["pooler.dense.", "cls."].into_iter().any(|part| name.starts_with(part))
    };
    let named = named.filter(|(name, _)| !unused(name)).collect();
    fill(config.init_lazy(device), renamed(NAMES, named)).map_err(|why| why.renamed(|name| to_theirs(NAMES, name)))
}

/// Writes a model as a folder: `config.json`, `tokenizer.json` and `model.safetensors`, in f16 if
/// `half`. With `modules.json` and `1_Pooling` the folder says how texts are embedded: as
/// [`Bert::encode`] does it.
///
/// [`open`] reads it, and so do `SentenceTransformer(dir)` of sentence-transformers and
/// `AutoModel.from_pretrained(dir, add_pooling_layer=False)` of transformers. Each file is written
/// atomically.
///
/// # Errors
/// [`MultimodalError::Save`] if the model has [adapters](Bert::with_lora) that are not
/// [merged](Bert::merged), the configuration does not match the model, a weight is not finite
/// or too large for f16, or the folder cannot be created. [`MultimodalError::Write`] if a file
/// cannot be written.
pub fn save<B: Backend>(
    model: &Bert<B>,
    config: &BertConfig,
    tokenizer_json: &str,
    dir: &Path,
    half: bool,
) -> Result<(), MultimodalError> {
    let failed = |why: String| MultimodalError::Save { path: dir.to_path_buf(), why };
    config.validate()?;
    if model.has_adapters() {
        return Err(failed("the model has adapters, which the format has no place for; merge them first".into()));
    }
    if let Some(why) = mismatch(model, config) {
        return Err(failed(format!("the configuration does not match the model: {why}")));
    }
    let weights = to_pytorch(model, half, |name| to_theirs(NAMES, name)).map_err(failed)?;
    let mut described = json!(HfConfig::from_config(config));
    if let Some(all) = described.as_object_mut() {
        all.insert("architectures".into(), json!(["BertModel"]));
        all.insert("torch_dtype".into(), json!(if half { "float16" } else { "float32" }));
        all.insert("hidden_dropout_prob".into(), json!(0.0));
        all.insert("attention_probs_dropout_prob".into(), json!(0.0));
    }
    let mut files = vec![(TOKENIZER, tokenizer_json.as_bytes().to_vec()), (WEIGHTS, weights)];
    for (name, content) in [(CONFIG, described)].into_iter().chain(mean_normalised(config.embed_dim)) {
        files.push((name, serde_json::to_vec_pretty(&content).map_err(|e| failed(e.to_string()))?));
    }
    for (name, bytes) in files {
        let path = dir.join(name);
        let folder = path.parent().unwrap_or(dir);
        std::fs::create_dir_all(folder).map_err(|e| failed(format!("{e}; choose another folder")))?;
        write_atomic(&path, &bytes).map_err(MultimodalError::Write)?;
    }
    Ok(())
}

/// The first setting of a configuration that differs from the model.
fn mismatch<B: Backend>(model: &Bert<B>, config: &BertConfig) -> Option<String> {
    let [vocab_size, embed_dim] = model.token_embed.weight.dims();
    let mut sizes = vec![
        ("vocab_size", config.vocab_size, vocab_size),
        ("embed_dim", config.embed_dim, embed_dim),
        ("context_length", config.context_length, model.pos_embed.weight.dims()[0]),
        ("type_vocab_size", config.type_vocab_size, model.type_embed.weight.dims()[0]),
        ("depth", config.depth, model.layers.len()),
    ];
    if let Some(layer) = model.layers.first() {
        sizes.push(("mlp_dim", config.mlp_dim, layer.fc1.weight.dims()[1]));
        sizes.push(("num_heads", config.num_heads, layer.num_heads));
    }
    let wrong = sizes.into_iter().find(|(_, expected, found)| expected != found);
    wrong.map(|(name, expected, found)| format!("{name} = {expected}, the model's is {found}"))
}

#[cfg(test)]
mod tests;
