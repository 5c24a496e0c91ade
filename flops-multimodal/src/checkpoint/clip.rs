//! Import of HuggingFace's `CLIPModel` folders.

use burn::prelude::*;
use flops_vit::checkpoint::tensors::{Table, TensorSnapshot, fill, json, of_folder, reshaped, to_theirs};
use flops_vit::checkpoint::{Source, hf};
use flops_vit::error::CheckpointError;
use flops_vit::resizing::Filter;
use flops_vit::{Normalization, Resizing};
use serde::Deserialize;

use super::folder::{CONFIG, activation, check_depth, check_supported, error_in, renamed, tokenizer};
use crate::error::MultimodalError;
use crate::tokenizer::TextTokenizer;
use crate::towers::{Clip, ClipConfig, TextConfig, VisionConfig};

/// The parameter names of `CLIPModel`, and ours.
#[rustfmt::skip]
const NAMES: Table = &[
    ("logit_scale", "logit_scale"),
    ("vision_model.embeddings.class_embedding", "vision.cls_token"),
    ("vision_model.embeddings.patch_embedding.weight", "vision.patch_embed.weight"),
    ("vision_model.embeddings.position_embedding.weight", "vision.pos_embed.weight"),
    ("vision_model.pre_layrnorm.weight", "vision.norm_pre.gamma"),
    ("vision_model.pre_layrnorm.bias", "vision.norm_pre.beta"),
    ("vision_model.post_layernorm.weight", "vision.norm.gamma"),
    ("vision_model.post_layernorm.bias", "vision.norm.beta"),
    ("visual_projection.weight", "vision.proj.weight"),
    ("text_model.embeddings.token_embedding.weight", "text.token_embed.weight"),
    ("text_model.embeddings.position_embedding.weight", "text.pos_embed.weight"),
    ("text_model.final_layer_norm.weight", "text.norm.gamma"),
    ("text_model.final_layer_norm.bias", "text.norm.beta"),
    ("text_projection.weight", "text.proj.weight"),
    ("vision_model.encoder.layers.N.layer_norm1.weight", "vision.layers.N.norm1.gamma"),
    ("vision_model.encoder.layers.N.layer_norm1.bias", "vision.layers.N.norm1.beta"),
    ("vision_model.encoder.layers.N.layer_norm2.weight", "vision.layers.N.norm2.gamma"),
    ("vision_model.encoder.layers.N.layer_norm2.bias", "vision.layers.N.norm2.beta"),
    ("vision_model.encoder.layers.N.self_attn.q_proj.weight", "vision.layers.N.query.weight"),
    ("vision_model.encoder.layers.N.self_attn.q_proj.bias", "vision.layers.N.query.bias"),
    ("vision_model.encoder.layers.N.self_attn.k_proj.weight", "vision.layers.N.key.weight"),
    ("vision_model.encoder.layers.N.self_attn.k_proj.bias", "vision.layers.N.key.bias"),
    ("vision_model.encoder.layers.N.self_attn.v_proj.weight", "vision.layers.N.value.weight"),
    ("vision_model.encoder.layers.N.self_attn.v_proj.bias", "vision.layers.N.value.bias"),
    ("vision_model.encoder.layers.N.self_attn.out_proj.weight", "vision.layers.N.proj.weight"),
    ("vision_model.encoder.layers.N.self_attn.out_proj.bias", "vision.layers.N.proj.bias"),
    ("vision_model.encoder.layers.N.mlp.fc1.weight", "vision.layers.N.fc1.weight"),
    ("vision_model.encoder.layers.N.mlp.fc1.bias", "vision.layers.N.fc1.bias"),
    ("vision_model.encoder.layers.N.mlp.fc2.weight", "vision.layers.N.fc2.weight"),
    ("vision_model.encoder.layers.N.mlp.fc2.bias", "vision.layers.N.fc2.bias"),
    ("text_model.encoder.layers.N.layer_norm1.weight", "text.layers.N.norm1.gamma"),
    ("text_model.encoder.layers.N.layer_norm1.bias", "text.layers.N.norm1.beta"),
    ("text_model.encoder.layers.N.layer_norm2.weight", "text.layers.N.norm2.gamma"),
    ("text_model.encoder.layers.N.layer_norm2.bias", "text.layers.N.norm2.beta"),
    ("text_model.encoder.layers.N.self_attn.q_proj.weight", "text.layers.N.query.weight"),
    ("text_model.encoder.layers.N.self_attn.q_proj.bias", "text.layers.N.query.bias"),
    ("text_model.encoder.layers.N.self_attn.k_proj.weight", "text.layers.N.key.weight"),
    ("text_model.encoder.layers.N.self_attn.k_proj.bias", "text.layers.N.key.bias"),
    ("text_model.encoder.layers.N.self_attn.v_proj.weight", "text.layers.N.value.weight"),
    ("text_model.encoder.layers.N.self_attn.v_proj.bias", "text.layers.N.value.bias"),
    ("text_model.encoder.layers.N.self_attn.out_proj.weight", "text.layers.N.proj.weight"),
    ("text_model.encoder.layers.N.self_attn.out_proj.bias", "text.layers.N.proj.bias"),
    ("text_model.encoder.layers.N.mlp.fc1.weight", "text.layers.N.fc1.weight"),
    ("text_model.encoder.layers.N.mlp.fc1.bias", "text.layers.N.fc1.bias"),
    ("text_model.encoder.layers.N.mlp.fc2.weight", "text.layers.N.fc2.weight"),
    ("text_model.encoder.layers.N.mlp.fc2.bias", "text.layers.N.fc2.bias"),
];

/// `config.json`. An absent key has HuggingFace's default.
#[derive(Deserialize)]
#[serde(default)]
struct HfConfig {
    model_type: String,
    projection_dim: usize,
    text_config: HfText,
    vision_config: HfVision,
}

impl Default for HfConfig {
    fn default() -> Self {
        let (text_config, vision_config) = Default::default();
        Self { model_type: "clip".into(), projection_dim: 512, text_config, vision_config }
    }
}

#[derive(Deserialize)]
#[serde(default)]
struct HfText {
    hidden_act: String,
    vocab_size: usize,
    max_position_embeddings: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    layer_norm_eps: f64,
    eos_token_id: usize,
}

impl Default for HfText {
    fn default() -> Self {
        Self {
            hidden_act: "quick_gelu".into(),
            vocab_size: 49408,
            max_position_embeddings: 77,
            hidden_size: 512,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            intermediate_size: 2048,
            layer_norm_eps: 1e-5,
            eos_token_id: 49407,
        }
    }
}

#[derive(Deserialize)]
#[serde(default)]
struct HfVision {
    hidden_act: String,
    image_size: usize,
    patch_size: usize,
    num_channels: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    layer_norm_eps: f64,
}

impl Default for HfVision {
    fn default() -> Self {
        Self {
            hidden_act: "quick_gelu".into(),
            image_size: 224,
            patch_size: 32,
            num_channels: 3,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            layer_norm_eps: 1e-5,
        }
    }
}

impl HfConfig {
    /// Converts to our configuration.
    fn convert(self) -> Result<ClipConfig, CheckpointError> {
        check_supported("model_type", &self.model_type, &["clip"])?;
        let (text, vision) = (self.text_config, self.vision_config);
        Ok(ClipConfig {
            vision: VisionConfig {
                img_size: vision.image_size,
                patch_size: vision.patch_size,
                in_chans: vision.num_channels,
                embed_dim: vision.hidden_size,
                depth: vision.num_hidden_layers,
                num_heads: vision.num_attention_heads,
                mlp_dim: vision.intermediate_size,
                layer_norm_eps: vision.layer_norm_eps,
                activation: activation(&vision.hidden_act)?,
            },
            text: TextConfig {
                vocab_size: text.vocab_size,
                context_length: text.max_position_embeddings,
                embed_dim: text.hidden_size,
                depth: text.num_hidden_layers,
                num_heads: text.num_attention_heads,
                mlp_dim: text.intermediate_size,
                layer_norm_eps: text.layer_norm_eps,
                activation: activation(&text.hidden_act)?,
                eos_token_id: text.eos_token_id,
            },
            projection_dim: self.projection_dim,
        })
    }
}

/// A CLIP model with its configuration, tokenizer and preprocessing.
#[derive(Debug)]
#[non_exhaustive]
pub struct Opened<B: Backend> {
    /// The model, its weights in f32.
    pub model: Clip<B>,
    /// Its configuration.
    pub config: ClipConfig,
    /// Its tokenizer, if the folder has one. Like OpenAI's, it pads with the end-of-text token.
    pub tokenizer: Option<TextTokenizer>,
    /// Normalisation of the images; [`Normalization::CLIP`] if the folder names none.
    pub normalization: Normalization,
    /// Resizing of the images; OpenAI's if the folder names none.
    pub resizing: Resizing,
}

/// Loads CLIP from a folder or from the HuggingFace hub, see [`Source`].
///
/// # Errors
/// - If a file is missing or damaged.
/// - If parameters are missing or unknown; all of them are listed.
/// - If the model is not CLIP.
///
/// # Example
/// ```no_run
/// use burn::backend::Flex;
/// use flops_multimodal::checkpoint::clip;
///
/// let source = "hf:openai/clip-vit-base-patch32".parse()?;
/// let opened = clip::open::<Flex>(&source, &Default::default())?;
/// println!("{} features", opened.config.projection_dim);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn open<B: Backend>(source: &Source, device: &B::Device) -> Result<Opened<B>, MultimodalError> {
    let dir = source.resolve()?;
    let config = json::<HfConfig>(&dir.join(CONFIG)).and_then(HfConfig::convert);
    let config = config.map_err(|why| error_in(&dir, CONFIG, why))?;
    config.validate()?;
    let (name, tensors) = of_folder(&dir)?;
    let model = fill_model(&config, tensors, device).map_err(|why| error_in(&dir, name, why))?;
    let tokenizer = tokenizer(&dir)?.map(|tokenizer| {
        let end = tokenizer.id("<|endoftext|>").unwrap_or(config.text.eos_token_id as i64);
        tokenizer.with_pad_id(end)
    });
    let openai = Resizing { filter: Filter::Bicubic, squash: false, crop: 1.0 };
    let (normalization, resizing) = hf::preprocessing(&dir)?.unwrap_or((Normalization::CLIP, openai));
    Ok(Opened { model, config, tokenizer, normalization, resizing })
}

/// Fills a model with the tensors of a file.
fn fill_model<B: Backend>(
    config: &ClipConfig,
    tensors: Vec<TensorSnapshot>,
    device: &B::Device,
) -> Result<Clip<B>, CheckpointError> {
    check_depth(config.vision.depth.max(config.text.depth), &tensors)?;
    let mut named = vec![];
    for tensor in tensors {
        let name = tensor.full_path();
        let tensor = match name.as_str() {
            "vision_model.embeddings.position_ids" | "text_model.embeddings.position_ids" => continue,
            "logit_scale" => reshaped(tensor, &[1])?,
            "vision_model.embeddings.class_embedding" => reshaped(tensor, &[1, 1, config.vision.embed_dim])?,
            _ => tensor,
        };
        named.push((name, tensor));
    }
    fill(config.init_lazy(device), renamed(NAMES, named)).map_err(|why| why.renamed(|name| to_theirs(NAMES, name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_unsupported_setting() {
        let convert = |json: &str| serde_json::from_str::<HfConfig>(json).unwrap().convert();
        for (json, expected) in [
            (r#"{"model_type": "siglip"}"#, "model_type = 'siglip' is not supported; only clip is"),
            (r#"{"text_config": {"hidden_act": "relu"}}"#, "hidden_act = 'relu'"),
            (r#"{"vision_config": {"hidden_act": "gelu_new"}}"#, "hidden_act = 'gelu_new'"),
        ] {
            let found = convert(json).unwrap_err().to_string();
            assert!(found.contains(expected), "{found}");
        }
        assert_eq!(convert("{}").unwrap(), ClipConfig::new(VisionConfig::new(), TextConfig::new()));
    }
}
