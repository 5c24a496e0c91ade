//! Retrieval between two sets of embeddings: recall at k, and zero-shot classification by captions.

use burn::prelude::*;
use serde::Serialize;

use crate::towers::normalise;

/// The values of k in [`Recall`].
pub const RECALL_AT: [usize; 3] = [1, 5, 10];

/// Recall at 1, 5 and 10, in both directions: the fraction of rows whose partner is among the k
/// most similar, in [0, 1].
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Recall {
    /// Recall of an image's caption.
    pub image_to_text: [f64; 3],
    /// Recall of a caption's image.
    pub text_to_image: [f64; 3],
}

impl Recall {
    /// The recall of pairs, whose partners are in the same row. A partner that ties with others
    /// ranks after them.
    ///
    /// # Shapes
    /// - images, texts: `[pairs, dim]`, of length 1
    ///
    /// # Panics
    /// If the two shapes differ.
    pub fn of<B: Backend>(images: Tensor<B, 2>, texts: Tensor<B, 2>) -> Self {
        assert_eq!(images.dims(), texts.dims(), "images and texts are not pairs");
        let pairs = images.dims()[0];
        let similarities: Vec<f32> = images.matmul(texts.transpose()).into_data().iter::<f32>().collect();
        let recall = |at: &dyn Fn(usize, usize) -> f32| {
            let mut hits = [0usize; 3];
            for i in 0..pairs {
                let own = at(i, i);
                // a NaN is a miss
                let behind = (0..pairs).filter(|&k| k != i && at(i, k) < own).count();
                let before = pairs - 1 - behind;
                for (count, k) in hits.iter_mut().zip(RECALL_AT) {
                    *count += usize::from(before < k);
                }
            }
            hits.map(|n| n as f64 / pairs.max(1) as f64)
        };
        Self {
            image_to_text: recall(&|i, k| similarities[i * pairs + k]),
            text_to_image: recall(&|i, k| similarities[k * pairs + i]),
        }
    }

    /// Recall at 1, averaged over both directions.
    pub fn mean_at_1(&self) -> f64 {
        (self.image_to_text[0] + self.text_to_image[0]) / 2.0
    }
}

/// One embedding per class: the mean over its captions, normalised to length 1 (prompt ensembling,
/// Radford et al. 2021).
///
/// # Shapes
/// - captions: `[classes · templates, dim]`, all captions of a class one after the other
/// - returns: `[classes, dim]`
///
/// # Panics
/// If `classes` is 0, or does not divide the number of rows.
pub fn class_embeddings<B: Backend>(captions: Tensor<B, 2>, classes: usize) -> Tensor<B, 2> {
    let [rows, dim] = captions.dims();
    assert!(
        classes > 0 && rows.is_multiple_of(classes),
        "{rows} captions cannot be divided equally among {classes} classes"
    );
    normalise(captions.reshape([classes, rows / classes, dim]).mean_dim(1).reshape([classes, dim]))
}

/// The fraction of images whose most similar class is their label, in [0, 1].
///
/// # Shapes
/// - images: `[images, dim]`, classes: `[classes, dim]`
///
/// # Panics
/// If the numbers of labels and images differ.
pub fn zero_shot_accuracy<B: Backend>(images: Tensor<B, 2>, classes: Tensor<B, 2>, labels: &[usize]) -> f64 {
    let rows = images.dims()[0];
    assert_eq!(rows, labels.len(), "{} labels for {rows} images", labels.len());
    let predicted = images.matmul(classes.transpose()).argmax(1).reshape([rows]).into_data();
    let correct = predicted.iter::<i64>().zip(labels).filter(|(class, label)| *class == **label as i64).count();
    correct as f64 / rows.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Flex;

    fn of(rows: &[[f32; 2]]) -> Tensor<Flex, 2> {
        let flat: Vec<f32> = rows.iter().flatten().copied().collect();
        Tensor::from_data(TensorData::new(flat, [rows.len(), 2]), &Default::default())
    }

    #[test]
    fn recall_counts_partners_among_the_k_most_similar() {
        let images = of(&[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]);
        // the third caption is nearer to the second image than the second caption is
        let texts = of(&[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]);
        let recall = Recall::of(images, texts);
        assert_eq!(recall.image_to_text, [1.0 / 3.0, 1.0, 1.0]);
        assert_eq!(recall.text_to_image[0], 1.0 / 3.0);
        let same = of(&[[1.0, 0.0]; 12]);
        assert_eq!(Recall::of(same.clone(), same).image_to_text, [0.0; 3], "a tie is a hit");
        let broken = of(&[[f32::NAN, 0.0]; 2]);
        assert_eq!(Recall::of(broken.clone(), broken).text_to_image[0], 0.0);
    }

    #[test]
    fn class_embeddings_are_means_over_captions() {
        let classes = class_embeddings(of(&[[1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [0.0, -1.0]]), 2);
        let half = 0.5f32.sqrt();
        classes.to_data().assert_approx_eq::<f32>(&TensorData::from([[half, half], [0.0, -1.0]]), Default::default());
        let accuracy = zero_shot_accuracy(of(&[[1.0, 1.0], [0.1, -1.0], [0.0, -2.0]]), classes, &[0, 0, 1]);
        assert_eq!(accuracy, 2.0 / 3.0);
    }
}
