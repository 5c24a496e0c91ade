//! Import of HuggingFace's `CLIPModel` folders.

use burn::prelude::*;
use flops_vit::checkpoint::Source;
use flops_vit::checkpoint::hf::{self, ModelImages, or_default, side};
use flops_vit::checkpoint::tensors::{Table, TensorSnapshot, fill, json, of_folder, reshaped, to_theirs};
use flops_vit::error::CheckpointError;
use flops_vit::resizing::Filter;
use flops_vit::{Normalization, Resizing};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::folder::{CONFIG, activation, check_depth, check_supported, error_in, renamed, tokenizer};
use super::sentence::check_alone;
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
    #[serde(deserialize_with = "or_default")]
    text_config: HfText,
    #[serde(deserialize_with = "or_default")]
    vision_config: HfVision,
    /// Of older files; where it is there, it counts.
    text_config_dict: Option<HfText>,
    vision_config_dict: Option<HfVision>,
}

impl Default for HfConfig {
    fn default() -> Self {
        let (text_config, vision_config) = Default::default();
        Self {
            model_type: "clip".into(),
            projection_dim: 512,
            text_config,
            vision_config,
            text_config_dict: None,
            vision_config_dict: None,
        }
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
    #[serde(deserialize_with = "side")]
    image_size: usize,
    #[serde(deserialize_with = "side")]
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
        let text = self.text_config_dict.unwrap_or(self.text_config);
        let vision = self.vision_config_dict.unwrap_or(self.vision_config);
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
/// - If the model is not CLIP, or other modules of sentence-transformers follow it.
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
    check_alone(&dir)?;
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
    let images = ModelImages { channels: config.vision.in_chans, side: config.vision.img_size };
    let found = hf::preprocessing_with(&dir, images, complete)?;
    let (normalization, resizing) = found.unwrap_or((Normalization::CLIP, openai));
    Ok(Opened { model, config, tokenizer, normalization, resizing })
}

/// Completes the settings of an image processor by the defaults of HuggingFace's
/// `CLIPImageProcessor`. There a size as a number is that of the shortest edge.
fn complete(settings: &mut Map<String, Value>) {
    let Normalization { mean, std } = Normalization::CLIP;
    for (key, default) in [
        ("image_mean", json!(mean)),
        ("image_std", json!(std)),
        // PIL's number of the bicubic filter
        ("resample", json!(3)),
        ("do_center_crop", json!(true)),
        ("size", json!({"shortest_edge": 224})),
        ("crop_size", json!({"height": 224, "width": 224})),
    ] {
        let value = settings.entry(key).or_insert(default);
        if key == "size" && value.is_number() {
            *value = json!({"shortest_edge": value});
        }
    }
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

    /// The forms that `CLIPConfig` of transformers 5.24.0 takes.
    #[test]
    fn other_forms_of_a_setting_are_read() {
        let convert = |json: &str| serde_json::from_str::<HfConfig>(json).unwrap().convert().unwrap();
        let default = convert("{}");
        assert_eq!(convert(r#"{"text_config": null, "vision_config": null, "text_config_dict": null}"#), default);
        let pair = convert(r#"{"vision_config": {"image_size": [16, 16], "patch_size": [8, 8]}}"#);
        assert_eq!((pair.vision.img_size, pair.vision.patch_size), (16, 8));
        // text_config.update(text_config_dict), whose absent keys have the default
        let older = convert(
            r#"{"text_config": {"vocab_size": 5, "hidden_size": 64}, "text_config_dict": {"vocab_size": 7},
                "vision_config_dict": {"hidden_act": "gelu"}}"#,
        );
        assert_eq!((older.text.vocab_size, older.text.embed_dim), (7, 512));
        assert_eq!(older.vision.activation, crate::towers::Activation::Gelu);
    }

    #[test]
    fn absurd_settings_are_refused_by_name() {
        let refused = |json: &str| match serde_json::from_str::<HfConfig>(json) {
            Ok(config) => config.convert().unwrap().validate().unwrap_err().to_string(),
            Err(e) => e.to_string(),
        };
        let large = 32u64 << 32;
        for (json, expected) in [
            (format!(r#"{{"vision_config": {{"image_size": {large}}}}}"#), format!("img_size = {large}; use at most")),
            (r#"{"vision_config": {"image_size": [16, 32]}}"#.into(), "the size [16, 32] is not square".into()),
            (r#"{"vision_config": {"patch_size": null}}"#.into(), "a whole number, or a pair".into()),
            (r#"{"vision_config": {"patch_size": 0}}"#.into(), "patch_size = 0; it must be at least 1".into()),
            (r#"{"vision_config": {"layer_norm_eps": -1e-5}}"#.into(), "layer_norm_eps = -0.00001".into()),
            (r#"{"text_config": {"layer_norm_eps": 0}}"#.into(), "layer_norm_eps = 0; use a number above 0".into()),
            (r#"{"text_config": {"vocab_size": 1099511627776}}"#.into(), "vocab_size = 1099511627776".into()),
            (r#"{"projection_dim": null}"#.into(), "invalid type: null".into()),
        ] {
            let found = refused(&json);
            assert!(found.contains(&expected), "{json}: {found}");
        }
    }

    /// What `preprocessor_config.json` of a CLIP folder says goes through the reader of ViTs.
    #[test]
    fn preprocessing_that_would_divide_by_zero_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (json, expected) in [
            (r#"{"image_mean": [0, 0, 0], "image_std": [1, 0, 1]}"#, "image_std = [1.0, 0.0, 1.0]"),
            (r#"{"image_mean": [0, 0, 0], "image_std": [1, -1, 1]}"#, "positive deviations"),
            (r#"{"rescale_factor": 0}"#, "rescale_factor = 0"),
        ] {
            std::fs::write(dir.path().join("preprocessor_config.json"), json).unwrap();
            let found = hf::preprocessing(dir.path(), ModelImages { channels: 3, side: 224 }).unwrap_err().to_string();
            assert!(found.contains(expected) && found.contains("preprocessor_config.json"), "{found}");
        }
    }

    /// The defaults of `CLIPImageProcessor` in transformers 5.24.0, and its `default_to_square = False`.
    #[test]
    fn preprocessing_has_the_defaults_of_clip() {
        let dir = tempfile::tempdir().unwrap();
        let openai = Resizing { filter: Filter::Bicubic, squash: false, crop: 1.0 };
        // {} and the file of openai/clip-vit-base-patch32
        for json in
            [r"{}", r#"{"size": 224, "crop_size": 224, "do_center_crop": true, "resample": 3, "image_std": null}"#]
        {
            std::fs::write(dir.path().join("preprocessor_config.json"), json).unwrap();
            let (normalization, resizing) =
                hf::preprocessing_with(dir.path(), ModelImages { channels: 3, side: 224 }, complete).unwrap().unwrap();
            assert_eq!(resizing, openai, "{json}");
            let found = normalization.mean.iter().chain(&normalization.std);
            for (found, expected) in found.zip(Normalization::CLIP.mean.iter().chain(&Normalization::CLIP.std)) {
                assert!((found - expected).abs() < 1e-5, "{json}: {found}, expected {expected}");
            }
        }
        let given = r#"{"size": {"height": 32, "width": 32}, "do_center_crop": false, "resample": 2}"#;
        std::fs::write(dir.path().join("preprocessor_config.json"), given).unwrap();
        let (_, resizing) =
            hf::preprocessing_with(dir.path(), ModelImages { channels: 3, side: 32 }, complete).unwrap().unwrap();
        assert_eq!(resizing, Resizing { filter: Filter::Bilinear, squash: true, crop: 1.0 });
    }

    #[test]
    fn modules_behind_clip_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let list = |class: &str| {
            let first = r#"{"name": "0", "path": "", "type": "sentence_transformers.models.CLIPModel"}"#;
            let more = format!(r#", {{"name": "1", "path": "1_x", "type": "sentence_transformers.models.{class}"}}"#);
            format!("[{first}{}]", if class.is_empty() { "" } else { &more })
        };
        std::fs::write(dir.path().join("modules.json"), list("Normalize")).unwrap();
        let found = check_alone(dir.path()).unwrap_err().to_string();
        assert!(found.contains("type = 'sentence_transformers.models.Normalize' is not supported"), "{found}");
        std::fs::write(dir.path().join("modules.json"), list("")).unwrap();
        check_alone(dir.path()).unwrap();
    }
}
