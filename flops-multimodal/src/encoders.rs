//! Frozen encoders: images and texts to features, with any of the towers.

use burn::prelude::*;
use burn::tensor::module::interpolate;
use burn::tensor::ops::{InterpolateMode, InterpolateOptions};
use flops_core::Probe;
use flops_vit::checkpoint::tensors::json;
use flops_vit::checkpoint::{self as vit, Pretrained, Source};
use flops_vit::{Normalization, ViT};
use serde::Deserialize;

use crate::checkpoint::{bert, clip};
use crate::error::MultimodalError;
use crate::tokenizer::TextTokenizer;
use crate::towers::{Bert, Clip, SentenceHead};

/// Largest number of rows in a forward pass.
const MAX_ROWS: usize = 64;

/// The part of `config.json` that tells the kind of model.
#[derive(Deserialize)]
struct Kind {
    #[serde(default)]
    model_type: String,
}

/// Whether the `config.json` of a source describes a CLIP model.
fn is_clip(source: &Source) -> Result<bool, MultimodalError> {
    let path = source.resolve()?;
    let kind = json::<Kind>(&path.join("config.json"));
    // an unreadable file is reported by the loader that opens it next
    Ok(kind.is_ok_and(|kind| kind.model_type == "clip"))
}

/// Checks that an image tower takes colours.
fn check_channels(in_chans: usize) -> Result<(), MultimodalError> {
    match in_chans {
        3 => Ok(()),
        value => {
            Err(MultimodalError::Config { field: "in_chans", value, remedy: "use a model of images with 3 channels" })
        }
    }
}

#[derive(Clone, Debug)]
enum ImageTower<B: Backend> {
    ViT(Box<ViT<B>>),
    Clip(Box<Clip<B>>),
}

/// A frozen image encoder: a ViT or CLIP's image tower.
///
/// The features of a ViT are its class token, if it has one, and the mean of its patch tokens,
/// concatenated. Those of CLIP are the projected class token.
#[derive(Clone, Debug)]
pub struct ImageEncoder<B: Backend> {
    tower: ImageTower<B>,
    normalization: Normalization,
    img_size: usize,
}

impl<B: Backend> ImageEncoder<B> {
    /// The ViT shipped with `flops-vit`, `vit_micro_patch4_32`.
    ///
    /// # Errors
    /// If the file in that crate is damaged.
    pub fn shipped(device: &B::Device) -> Result<Self, MultimodalError> {
        Ok(Self::from_vit(vit::pretrained(device)?))
    }

    /// Loads a ViT in any format that [`flops_vit::checkpoint::open`] reads, or a folder of
    /// `CLIPModel`.
    ///
    /// # Errors
    /// If it cannot be loaded.
    pub fn open(source: &Source, device: &B::Device) -> Result<Self, MultimodalError> {
        if !is_clip(source)? {
            let opened = vit::open(source, device)?.pretrained;
            check_channels(opened.card.config.in_chans)?;
            return Ok(Self::from_vit(opened));
        }
        let opened = clip::open(source, device)?;
        check_channels(opened.config.vision.in_chans)?;
        Ok(Self {
            tower: ImageTower::Clip(Box::new(opened.model)),
            normalization: opened.normalization,
            img_size: opened.config.vision.img_size,
        })
    }

    fn from_vit(Pretrained { model, card }: Pretrained<B>) -> Self {
        let (normalization, img_size) = (card.normalization, card.config.img_size);
        Self { tower: ImageTower::ViT(Box::new(model)), normalization, img_size }
    }

    /// Features of images. Images of another size are resized bilinearly.
    ///
    /// # Shapes
    /// - images: `[rows, 3, height, width]`, in [0, 1], at least one row
    /// - returns: `[rows, features]`
    ///
    /// # Panics
    /// If there is no row.
    pub fn encode(&self, images: Tensor<B, 4>) -> Tensor<B, 2> {
        let [rows, _, height, width] = images.dims();
        let device = images.device();
        let chunks = (0..rows).step_by(MAX_ROWS).map(|start| {
            let mut x = images.clone().narrow(0, start, MAX_ROWS.min(rows - start));
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
    Bert(Box<Bert<B>>, SentenceHead<B>),
    Clip(Box<Clip<B>>),
}

/// A frozen text encoder with its tokenizer: a BERT and what makes sentence embeddings of its
/// states, or CLIP's projected text embedding.
#[derive(Clone, Debug)]
pub struct TextEncoder<B: Backend> {
    tower: TextTower<B>,
    tokenizer: TextTokenizer,
    max_tokens: usize,
    notes: Vec<String>,
}

impl<B: Backend> TextEncoder<B> {
    /// The small BERT shipped with this crate, see [`bert::shipped`]. Its embeddings have length 1.
    ///
    /// # Errors
    /// If the files in the crate are damaged.
    pub fn shipped(device: &B::Device) -> Result<Self, MultimodalError> {
        Self::from_bert(bert::shipped(device)?)
    }

    /// Loads a folder of a BERT sentence encoder such as all-MiniLM-L6-v2, or of `CLIPModel`, with
    /// its `tokenizer.json`.
    ///
    /// The embeddings of a BERT are those of sentence-transformers, see [`bert::open`]. Whether they
    /// have length 1 depends on the folder.
    ///
    /// # Errors
    /// If it cannot be loaded, or has no tokenizer.
    pub fn open(source: &Source, device: &B::Device) -> Result<Self, MultimodalError> {
        if !is_clip(source)? {
            return Self::from_bert(bert::open(source, device)?);
        }
        let opened = clip::open(source, device)?;
        Ok(Self {
            max_tokens: opened.config.text.context_length,
            tower: TextTower::Clip(Box::new(opened.model)),
            tokenizer: opened.tokenizer.ok_or(MultimodalError::NoTokenizer)?,
            notes: vec![],
        })
    }

    fn from_bert(opened: bert::Opened<B>) -> Result<Self, MultimodalError> {
        Ok(Self {
            max_tokens: opened.max_length,
            tower: TextTower::Bert(Box::new(opened.model), opened.head),
            tokenizer: opened.tokenizer.ok_or(MultimodalError::NoTokenizer)?,
            notes: opened.notes,
        })
    }

    /// Remarks for the user: what the files of the encoder did not say, a line each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Features of texts. A text is truncated to the length that the encoder was made for.
    ///
    /// # Shapes
    /// - returns: `[texts, features]`
    ///
    /// # Errors
    /// If there is no text, or one cannot be tokenized.
    pub fn encode(&self, texts: &[impl AsRef<str>]) -> Result<Tensor<B, 2>, MultimodalError> {
        let mut parts = vec![];
        for texts in texts.chunks(MAX_ROWS) {
            let tokens = self.tokenizer.encode(texts, self.max_tokens)?;
            parts.push(match &self.tower {
                TextTower::Bert(model, head) => model.encode_with(head, &tokens, &mut Probe::clean())?,
                TextTower::Clip(model) => model.encode_text(&tokens, &mut Probe::clean())?,
            });
        }
        if parts.is_empty() { Err(MultimodalError::NoTexts) } else { Ok(Tensor::cat(parts, 0)) }
    }

    /// The BERT of the encoder, if it has one, and its head; it takes soft contexts among its token
    /// embeddings.
    pub(crate) fn bert(&self) -> Option<(&Bert<B>, &SentenceHead<B>)> {
        match &self.tower {
            TextTower::Bert(model, head) => Some((model, head)),
            TextTower::Clip(_) => None,
        }
    }

    /// The tokenizer, and the largest number of tokens of a text.
    pub(crate) fn tokenizer(&self) -> (&TextTokenizer, usize) {
        (&self.tokenizer, self.max_tokens)
    }
}
