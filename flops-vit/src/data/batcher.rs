//! Batches of images, and their augmentation.

use super::dataset::ImageItem;
use super::error::DataError;
use crate::checkpoint::Card;
use crate::normalization::{Normalization, luma};
use burn::data::dataloader::batcher::Batcher;
use burn::prelude::*;
use flops_core::Batch;
use flops_core::random::keyed_rng;
use flops_core::train::Augmentation;
use rand::RngExt;

/// A batch of normalised images and their labels.
///
/// # Shapes
/// - input: `[batch, channels, height, width]`
/// - target: `[batch]`
pub type ImageBatch<B> = Batch<Tensor<B, 4>, Tensor<B, 1, Int>>;

/// Stream of the augmentation's random numbers, apart from other uses of the same seed.
const AUGMENT: u64 = u64::from_le_bytes(*b"augment\0");

/// Makes [`ImageBatch`]es: resizes and normalises images.
#[derive(Clone, Debug)]
pub struct ImageBatcher {
    img_size: usize,
    normalization: Normalization,
    grey: bool,
}

impl ImageBatcher {
    /// Makes a batcher for the model of a card.
    ///
    /// For a model of one channel, images become grey: the luma of ITU-R 601-2, as PIL computes it.
    ///
    /// # Errors
    /// [`DataError::ZeroImageSize`] and [`DataError::Channels`] where no images fit the model.
    pub fn for_card(card: &Card) -> Result<Self, DataError> {
        let batcher = Self::new(card.config.img_size, card.normalization)?;
        match card.config.in_chans {
            1 => Ok(Self { grey: true, ..batcher }),
            3 => Ok(batcher),
            in_chans => Err(DataError::Channels { in_chans }),
        }
    }

    /// Makes a batcher for square inputs of side `img_size`, in pixels, and three channels.
    ///
    /// # Errors
    /// [`DataError::ZeroImageSize`] where `img_size` is 0.
    pub fn new(img_size: usize, normalization: Normalization) -> Result<Self, DataError> {
        if img_size == 0 {
            return Err(DataError::ZeroImageSize);
        }
        Ok(Self { img_size, normalization, grey: false })
    }
}

impl<B: Backend> Batcher<B, ImageItem, ImageBatch<B>> for ImageBatcher {
    fn batch(&self, items: Vec<ImageItem>, device: &B::Device) -> ImageBatch<B> {
        let (size, count) = (self.img_size, items.len());
        let ids = items.iter().map(|item| item.id).collect();
        let labels: Vec<i32> = items.iter().map(|item| item.label as i32).collect();
        let channels = if self.grey { 1 } else { 3 };
        let mut pixels: Vec<f32> = Vec::with_capacity(count * channels * size * size);
        for item in items {
            let mut item = item.resized(size, size);
            if self.grey {
                item.pixels = grey(&item.pixels);
            }
            for (channel, plane) in item.pixels.chunks_exact(size * size).enumerate() {
                pixels.extend(plane.iter().map(|&pixel| self.normalization.apply(pixel, channel)));
            }
        }
        Batch {
            ids,
            input: Tensor::from_data(TensorData::new(pixels, [count, channels, size, size]), device),
            target: Tensor::from_data(TensorData::new(labels, [count]), device),
        }
    }
}

/// Returns the grey of an image's three planes.
fn grey(pixels: &[u8]) -> Vec<u8> {
    let plane = pixels.len() / 3;
    let (red, rest) = pixels.split_at(plane);
    let (green, blue) = rest.split_at(plane);
    red.iter().zip(green).zip(blue).map(|((&red, &green), &blue)| luma(red, green, blue)).collect()
}

/// How pixels that a shift uncovers are filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Padding {
    /// With black, as is usual for CIFAR (a crop of the padded image).
    Black,
    /// With the nearest pixel of the image, for backgrounds that are not black.
    Edge,
}

/// Random flips and shifts, a function of (seed, epoch, id).
///
/// Used by [`EpochLoader::with_augmentation`].
///
/// [`EpochLoader::with_augmentation`]: flops_core::EpochLoader::with_augmentation
#[derive(Clone, Debug)]
pub struct Augment {
    /// Whether to flip left and right, with probability 1/2.
    pub flip: bool,
    /// Largest shift in each direction, in pixels.
    pub shift: usize,
    /// How uncovered pixels are filled.
    pub padding: Padding,
    /// Seed of the random choices.
    pub seed: u64,
}

impl Augmentation<ImageItem> for Augment {
    fn augment(&self, item: ImageItem, epoch: u64) -> ImageItem {
        let mut rng = keyed_rng([self.seed, epoch, item.id, AUGMENT]);
        let flip = rng.random::<bool>() && self.flip;
        let (down, right) = (rng.random_range(0..=2 * self.shift), rng.random_range(0..=2 * self.shift));
        let [down, right] = [down, right].map(|by| by as isize - self.shift as isize);
        shifted(item, flip, down, right, self.padding)
    }
}

/// Flips the image where `flip` is set, then shifts it.
fn shifted(item: ImageItem, flip: bool, down: isize, right: isize, padding: Padding) -> ImageItem {
    let (height, width) = (item.height, item.width);
    // the source of a row or column of the result
    let source = |to: usize, by: isize, size: usize| {
        let from = to as isize - by;
        let inside = from.clamp(0, size as isize - 1);
        (padding == Padding::Edge || from == inside).then_some(inside as usize)
    };
    let mut pixels = vec![0; item.pixels.len()];
    for (from, to) in item.pixels.chunks_exact(height * width).zip(pixels.chunks_exact_mut(height * width)) {
        for y in 0..height {
            let Some(source_y) = source(y, down, height) else { continue };
            for x in 0..width {
                let Some(source_x) = source(x, right, width) else { continue };
                let source_x = if flip { width - 1 - source_x } else { source_x };
                to[y * width + x] = from[source_y * width + source_x];
            }
        }
    }
    ImageItem { pixels, ..item }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Flex;

    fn item(id: u64) -> ImageItem {
        // planes [[1, 2], [3, 4]], [[5, 6], [7, 8]], [[9, 10], [11, 12]]
        ImageItem { id, pixels: (1..=12).collect(), height: 2, width: 2, label: id as usize }
    }

    #[test]
    fn batches_have_ids_pixels_and_labels() {
        let batcher = ImageBatcher::new(2, Normalization { mean: [0.0; 3], std: [1.0 / 255.0; 3] }).unwrap();
        let batch: ImageBatch<Flex> = batcher.batch(vec![item(3), item(5)], &Default::default());
        assert_eq!(batch.ids, [3, 5]);
        assert_eq!(batch.input.dims(), [2, 3, 2, 2]);
        assert_eq!(batch.target.to_data().iter::<i64>().collect::<Vec<_>>(), [3, 5]);
        let values: Vec<f32> = batch.input.narrow(0, 1, 1).to_data().to_vec().unwrap();
        for (value, expected) in values.iter().zip(1..=12) {
            assert!((value - expected as f32).abs() < 1e-4, "{value} instead of {expected}");
        }
    }

    #[test]
    fn batches_have_the_model_size() {
        let batcher = ImageBatcher::new(4, Normalization::HALF).unwrap();
        let batch: ImageBatch<Flex> = batcher.batch(vec![item(0)], &Default::default());
        assert_eq!(batch.input.dims(), [1, 3, 4, 4]);
        assert!(matches!(ImageBatcher::new(0, Normalization::HALF), Err(DataError::ZeroImageSize)));
    }

    /// PIL's convert("L") of the four pixels: Image.new("RGB", (1, 1), (1, 5, 9)).convert("L") is 4.
    #[test]
    fn models_of_one_channel_get_grey_images() {
        let mut card = crate::checkpoint::pretrained::<Flex>(&Default::default()).unwrap().card;
        card.config = card.config.with_img_size(2).with_patch_size(1).with_in_chans(1);
        card.normalization = Normalization::grey(0.0, 1.0 / 255.0);
        let batch: ImageBatch<Flex> =
            ImageBatcher::for_card(&card).unwrap().batch(vec![item(0), item(1)], &Default::default());
        assert_eq!(batch.input.dims(), [2, 1, 2, 2]);
        let values: Vec<f32> = batch.input.to_data().to_vec().unwrap();
        for (value, expected) in values.iter().zip([4.0, 5.0, 6.0, 7.0].repeat(2)) {
            assert!((value - expected).abs() < 1e-4, "{value} instead of {expected}");
        }
        card.config.in_chans = 4;
        let error = ImageBatcher::for_card(&card).unwrap_err().to_string();
        assert!(error.contains("4 channels"), "{error}");
    }

    #[test]
    fn images_are_flipped_then_shifted() {
        assert_eq!(shifted(item(0), true, 0, 0, Padding::Black).pixels, [2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11]);
        assert_eq!(shifted(item(0), false, 1, 0, Padding::Black).pixels[..4], [0, 0, 1, 2]);
        assert_eq!(shifted(item(0), false, 0, -1, Padding::Black).pixels[..4], [2, 0, 4, 0]);
        assert_eq!(shifted(item(0), true, -1, 1, Padding::Black).pixels[..4], [0, 4, 0, 0]);
        assert_eq!(shifted(item(0), false, 5, 0, Padding::Black).pixels, [0; 12]);
        assert_eq!(shifted(item(0), false, 1, 0, Padding::Edge).pixels[..4], [1, 2, 1, 2]);
        assert_eq!(shifted(item(0), true, 0, 1, Padding::Edge).pixels[..4], [2, 2, 4, 4]);
        assert_eq!(shifted(item(0), false, -9, 9, Padding::Edge).pixels[..4], [3; 4]);
    }

    #[test]
    fn augmentation_is_a_function_of_seed_epoch_and_id() {
        let augment = Augment { flip: true, shift: 1, padding: Padding::Black, seed: 0 };
        let show = |augment: &Augment, id, epochs: std::ops::Range<u64>| -> Vec<_> {
            epochs.map(|epoch| augment.augment(item(id), epoch).pixels).collect()
        };
        assert_eq!(show(&augment, 1, 0..9), show(&augment, 1, 0..9));
        assert_ne!(show(&augment, 1, 0..9), show(&augment, 1, 9..18));
        assert_ne!(show(&augment, 1, 0..9), show(&augment, 2, 0..9));
        assert_ne!(show(&augment, 1, 0..9), show(&Augment { seed: 1, ..augment }, 1, 0..9));
        let none = Augment { flip: false, shift: 0, padding: Padding::Black, seed: 0 };
        assert_eq!(none.augment(item(1), 4), item(1));
    }
}
