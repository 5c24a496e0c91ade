//! A zero-shot classifier of two aligned encoders, whose class prompts take a soft context. It
//! serves as a black box.

use burn::prelude::*;
use flops_core::Probe;

use crate::alignment::Alignment;
use crate::blackbox::{BlackBoxError, Info};
use crate::encoders::{ImageEncoder, TextEncoder};
use crate::error::MultimodalError;

/// A zero-shot classifier: class prompts compared with images in the shared space of an
/// [`Alignment`].
///
/// The score of a class is e^τ·cos(image, prompt). A context `[tokens, dim]` is added to the word
/// embeddings in front of the class name. A context of zeros therefore changes nothing (after CoOp,
/// Zhou et al. 2022, arXiv 2109.01134).
#[derive(Clone, Debug)]
pub struct Classifier<B: Backend> {
    image: ImageEncoder<B>,
    text: TextEncoder<B>,
    alignment: Alignment<B>,
    info: Info,
    /// Token embeddings of the prompts, `[classes, tokens, dim]`, and their mask, if the text
    /// encoder is a BERT.
    prompts: Option<(Tensor<B, 3>, Tensor<B, 2, Int>)>,
    /// Embeddings of the prompts without a context, `[classes, embed_dim]`.
    classes: Tensor<B, 2>,
}

impl<B: Backend> Classifier<B> {
    /// A classifier of images of `shape`, `[channels, height, width]`. `{}` in `template` stands
    /// for the class name.
    ///
    /// # Errors
    /// If there is no class, the template has no `{}`, or a prompt cannot be encoded.
    pub fn new(
        image: ImageEncoder<B>,
        text: TextEncoder<B>,
        alignment: Alignment<B>,
        classes: &[impl AsRef<str>],
        template: &str,
        shape: [usize; 3],
    ) -> Result<Self, MultimodalError> {
        let Some((before, _)) = template.split_once("{}") else {
            let remedy = "put {} where the class name belongs";
            return Err(MultimodalError::Setting { name: "template", value: template.into(), remedy });
        };
        let texts: Vec<String> = classes.iter().map(|class| template.replace("{}", class.as_ref())).collect();
        let mut info = Info::new(classes.iter().map(AsRef::as_ref), shape)?;
        let mut prompts = None;
        if let Some((bert, _)) = text.bert() {
            let (tokenizer, max_tokens) = text.tokenizer();
            let device = alignment.logit_scale.device();
            let tokens = tokenizer.encode(&texts, max_tokens)?;
            let ids = tokens.ids_tensor::<B>(&device);
            let embeddings = bert.token_embeddings(ids, &mut Probe::clean());
            // the words in front of the class name, without [CLS] and [SEP]
            let words = match before.trim() {
                "" => 0,
                before => tokenizer.encode(&[before], max_tokens)?.dims()[1].saturating_sub(2),
            };
            if words > 0 {
                info = info.with_context(words, embeddings.dims()[2])?;
            }
            prompts = Some((embeddings, tokens.mask_tensor(&device)));
        }
        let classes = alignment.embed_texts(text.encode(&texts)?);
        Ok(Self { image, text, alignment, info, prompts, classes })
    }

    /// What the classifier takes and returns, as a black box.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// Embeddings of images, of length 1.
    ///
    /// # Shapes
    /// - images: `[rows, channels, height, width]`, in [0, 1]
    /// - returns: `[rows, embed_dim]`
    pub fn embed_images(&self, images: Tensor<B, 4>) -> Tensor<B, 2> {
        self.alignment.embed_images(self.image.encode(images))
    }

    /// Scores of [embedded](Self::embed_images) images, each with its own context or all without
    /// one.
    ///
    /// # Shapes
    /// - images: `[rows, embed_dim]`
    /// - contexts: `[rows, tokens, dim]`, with at most as many tokens as [`info`](Self::info)
    ///   allows
    /// - returns: `[rows, classes]`
    ///
    /// # Errors
    /// If contexts are given but the classifier takes none, or they have another shape.
    pub fn scores(&self, images: Tensor<B, 2>, contexts: Option<Tensor<B, 3>>) -> Result<Tensor<B, 2>, BlackBoxError> {
        let scale = self.alignment.scale().reshape([1, 1]);
        let Some(contexts) = contexts else { return Ok(images.matmul(self.classes.clone().transpose()) * scale) };
        let ([rows, given, width], [_, embed_dim]) = (contexts.dims(), images.dims());
        let fits = self.info.context.is_some_and(|[max, dim]| (1..=max).contains(&given) && width == dim);
        let (Some((prompts, mask)), Some((bert, head)), true) =
            (&self.prompts, self.text.bert(), fits && rows == images.dims()[0])
        else {
            let (given, taken) = (contexts.dims(), self.info.context);
            return Err(BlackBoxError::Failed(format!(
                "contexts of shape {given:?} do not fit a classifier that takes {taken:?}"
            )));
        };
        let [classes, tokens, dim] = prompts.dims();
        // pad to the length of a prompt: the context comes after [CLS]
        let shift = contexts.pad([(1, tokens - given - 1), (0, 0)], 0.0).reshape([rows, 1, tokens, dim]);
        let x = prompts.clone().reshape([1, classes, tokens, dim]) + shift;
        let mask = mask
            .clone()
            .reshape([1, classes, tokens])
            .expand([rows, classes, tokens])
            .reshape([rows * classes, tokens]);
        let probe = &mut Probe::clean();
        let hidden = bert.forward_embedded(x.reshape([rows * classes, tokens, dim]), mask.clone(), probe);
        let prompts = self.alignment.embed_texts(head.forward(hidden, mask, probe)).reshape([rows, classes, embed_dim]);
        let scores = (prompts * images.reshape([rows, 1, embed_dim])).sum_dim(2).reshape([rows, classes]);
        Ok(scores * scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Flex;

    use crate::checkpoint::alignment;
    use crate::data::scenes::{COLOURS, SIDE};
    use crate::data::{Scene, Shift};

    #[test]
    fn a_context_changes_the_scores_of_its_row_alone() {
        let device = Default::default();
        let classifier = |template: &str| {
            let (image, text) = (ImageEncoder::<Flex>::shipped(&device)?, TextEncoder::shipped(&device)?);
            Classifier::new(image, text, alignment::shipped(&device)?, &COLOURS, template, [3, SIDE, SIDE])
        };
        assert!(classifier("a thing").unwrap_err().to_string().contains("template"));
        let classifier = classifier("a picture of a {} thing").unwrap();
        // four words: a, picture, of, a
        let [tokens, dim] = classifier.info().context.unwrap();
        assert_eq!(tokens, 4);
        let scene = Scene { shape: 1, colour: 2, size: 1, position: 0, texture: 0 };
        let pixels = scene.render(7, &Shift::NONE);
        let images = Tensor::from_data(TensorData::new([pixels.clone(), pixels].concat(), [2, 3, SIDE, SIDE]), &device);
        let images = classifier.embed_images(images);
        let plain = classifier.scores(images.clone(), None).unwrap();
        assert_eq!(
            plain.clone().argmax(1).into_data().iter::<i64>().next(),
            Some(2),
            "a blue square is not classified as blue"
        );
        let zeros = Tensor::zeros([2, tokens, dim], &device);
        let same = classifier.scores(images.clone(), Some(zeros.clone())).unwrap();
        let distance = (same - plain.clone()).abs().max().into_scalar();
        assert!(distance < 1e-3, "a context of zeros changes scores by {distance}");
        // a context for the second row leaves the first unchanged
        let uneven: Vec<f32> = (0..tokens * dim).map(|i| (i as f32).sin()).collect();
        let uneven = Tensor::from_data(TensorData::new(uneven, [1, tokens, dim]), &device);
        let one = Tensor::cat(vec![zeros.narrow(0, 0, 1), uneven], 0);
        let moved = (classifier.scores(images.clone(), Some(one)).unwrap() - plain).abs().max_dim(1);
        let moved: Vec<f32> = moved.into_data().iter::<f32>().collect();
        assert!(moved[0] < 1e-3 && moved[1] > 1e-2, "{moved:?}");
        for wrong in [Tensor::zeros([2, tokens + 1, dim], &device), Tensor::zeros([1, tokens, dim], &device)] {
            assert!(classifier.scores(images.clone(), Some(wrong)).is_err());
        }
    }
}
