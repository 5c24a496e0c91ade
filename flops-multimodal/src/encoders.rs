//! Frozen encoders: images and texts to features, whatever tower stands behind them.

use burn::prelude::*;
use burn::tensor::module::interpolate;
use burn::tensor::ops::{InterpolateMode, InterpolateOptions};
use flops_core::Probe;
use flops_vit::checkpoint::tensors::json;
use flops_vit::checkpoint::{self as vit, Source};
use flops_vit::{Normalization, ViT};
use serde::Deserialize;

use crate::checkpoint::{bert, clip};
use crate::error::MultimodalError;
use crate::tokenizer::TextTokenizer;
use crate::towers::{Bert, Clip};

/// Rows of a pass.
const ROWS: usize = 64;
/// The longest text, in tokens, where the tower allows it.
const MAX_TOKENS: usize = 256;

/// What kind of model a folder holds.
#[derive(Deserialize)]
struct Kind {
    #[serde(default)]
    model_type: String,
}

/// Whether `config.json` of the place says that it is a CLIP model.
fn is_clip(source: &Source) -> Result<bool, MultimodalError> {
    let path = source.resolve()?;
    let kind = json::<Kind>(&path.join("config.json"));
    // other files are looked at by whoever opens them, who can say what is wrong
    Ok(kind.is_ok_and(|kind| kind.model_type == "clip"))
}

#[derive(Clone, Debug)]
enum ImageTower<B: Backend> {
    ViT(Box<ViT<B>>),
    Clip(Box<Clip<B>>),
}

/// A frozen image encoder: a ViT's class token beside the mean of its patch tokens, or CLIP's vision tower with its projection.
#[derive(Clone, Debug)]
pub struct ImageEncoder<B: Backend> {
    tower: ImageTower<B>,
    normalization: Normalization,
    img_size: usize,
}

impl<B: Backend> ImageEncoder<B> {
    /// The checkpoint shipped with `flops-vit`, `vit_micro_patch4_32`.
    ///
    /// # Errors
    /// Where the file in that crate is damaged.
    pub fn shipped(device: &B::Device) -> Result<Self, MultimodalError> {
        let (model, card) = vit::pretrained(device)?;
        Ok(Self::of_vit(model, card.normalization, card.config.img_size))
    }

    /// A ViT of any of the forms that [`flops_vit::checkpoint::open`] reads, or a folder of `CLIPModel`.
    ///
    /// # Errors
    /// Where it cannot be loaded.
    pub fn open(source: &Source, device: &B::Device) -> Result<Self, MultimodalError> {
        if !is_clip(source)? {
            let opened = vit::open(source, device)?;
            return Ok(Self::of_vit(opened.model, opened.card.normalization, opened.card.config.img_size));
        }
        let opened = clip::open(source, device)?;
        Ok(Self {
            tower: ImageTower::Clip(Box::new(opened.model)),
            normalization: opened.normalization,
            img_size: opened.config.vision.img_size,
        })
    }

    fn of_vit(model: ViT<B>, normalization: Normalization, img_size: usize) -> Self {
        Self { tower: ImageTower::ViT(Box::new(model)), normalization, img_size }
    }

    /// Features of images in [0, 1]; those of another size are resized bilinearly.
    ///
    /// # Shapes
    /// - images: `[rows, 3, height, width]`, at least one row
    /// - returns: `[rows, features]`
    ///
    /// # Panics
    /// Where there is no row.
    pub fn encode(&self, images: Tensor<B, 4>) -> Tensor<B, 2> {
        let [rows, _, height, width] = images.dims();
        let device = images.device();
        let chunks = (0..rows).step_by(ROWS).map(|start| {
            let mut x = images.clone().narrow(0, start, ROWS.min(rows - start));
            if (height, width) != (self.img_size, self.img_size) {
                let options = InterpolateOptions::new(InterpolateMode::Bilinear);
                x = interpolate(x, [self.img_size; 2], options);
            }
            let channel = |values: [f32; 3]| Tensor::<B, 1>::from_floats(values, &device).reshape([1, 3, 1, 1]);
            self.features((x - channel(self.normalization.mean)) / channel(self.normalization.std))
        });
        Tensor::cat(chunks.collect(), 0)
    }

    fn features(&self, x: Tensor<B, 4>) -> Tensor<B, 2> {
        let probe = &mut Probe::clean();
        match &self.tower {
            ImageTower::Clip(model) => model.encode_image(x, probe),
            ImageTower::ViT(model) => {
                let tokens = model.forward_features(x, probe);
                let [rows, n, dim] = tokens.dims();
                let prefix = model.num_prefix_tokens();
                let mean = tokens.clone().narrow(1, prefix, n - prefix).mean_dim(1).reshape([rows, dim]);
                match prefix {
                    0 => mean,
                    _ => Tensor::cat(vec![tokens.narrow(1, 0, 1).reshape([rows, dim]), mean], 1),
                }
            }
        }
    }
}

#[derive(Clone, Debug)]
enum TextTower<B: Backend> {
    Bert(Box<Bert<B>>),
    Clip(Box<Clip<B>>),
}

/// A frozen text encoder with its tokenizer: BERT's sentence embedding of length 1, or CLIP's text tower with its projection.
#[derive(Clone, Debug)]
pub struct TextEncoder<B: Backend> {
    tower: TextTower<B>,
    tokenizer: TextTokenizer,
    max_tokens: usize,
}

impl<B: Backend> TextEncoder<B> {
    /// The small BERT shipped with this crate, which knows the words of [`scenes`](crate::data::scenes) and no others; pretrained on paraphrases of
    /// their captions with `examples/text_pretrain.rs`.
    ///
    /// # Errors
    /// Where the files in the crate are damaged.
    pub fn shipped(device: &B::Device) -> Result<Self, MultimodalError> {
        let config = include_bytes!("../weights/scenes_text/config.json");
        let weights = include_bytes!("../weights/scenes_text/model.safetensors");
        let tokenizer = include_bytes!("../weights/scenes_text/tokenizer.json");
        Self::of_bert(bert::from_bytes(config, weights, Some(tokenizer), device)?)
    }

    /// A folder of a BERT sentence encoder, as all-MiniLM-L6-v2, or of `CLIPModel`, with its `tokenizer.json`.
    ///
    /// # Errors
    /// Where it cannot be loaded, or has no tokenizer.
    pub fn open(source: &Source, device: &B::Device) -> Result<Self, MultimodalError> {
        if !is_clip(source)? {
            return Self::of_bert(bert::open(source, device)?);
        }
        let opened = clip::open(source, device)?;
        Ok(Self {
            max_tokens: opened.config.text.context_length.min(MAX_TOKENS),
            tower: TextTower::Clip(Box::new(opened.model)),
            tokenizer: opened.tokenizer.ok_or(MultimodalError::NoTokenizer)?,
        })
    }

    fn of_bert(opened: bert::Opened<B>) -> Result<Self, MultimodalError> {
        Ok(Self {
            max_tokens: opened.config.context_length.min(MAX_TOKENS),
            tower: TextTower::Bert(Box::new(opened.model)),
            tokenizer: opened.tokenizer.ok_or(MultimodalError::NoTokenizer)?,
        })
    }

    /// Features of texts, `[texts, features]`.
    ///
    /// # Errors
    /// Where there is no text, or one cannot be cut into tokens.
    pub fn encode(&self, texts: &[impl AsRef<str>]) -> Result<Tensor<B, 2>, MultimodalError> {
        let mut parts = vec![];
        for texts in texts.chunks(ROWS) {
            let tokens = self.tokenizer.encode(texts, self.max_tokens)?;
            parts.push(match &self.tower {
                TextTower::Bert(model) => model.encode(&tokens, &mut Probe::clean())?,
                TextTower::Clip(model) => model.encode_text(&tokens, &mut Probe::clean())?,
            });
        }
        if parts.is_empty() { Err(MultimodalError::NoTexts) } else { Ok(Tensor::cat(parts, 0)) }
    }

    /// The BERT behind it, if it is one, for soft contexts between its words.
    pub(crate) fn bert(&self) -> Option<&Bert<B>> {
        match &self.tower {
            TextTower::Bert(model) => Some(model),
            TextTower::Clip(_) => None,
        }
    }

    pub(crate) fn tokenizer(&self) -> (&TextTokenizer, usize) {
        (&self.tokenizer, self.max_tokens)
    }
}
