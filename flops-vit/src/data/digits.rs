//! Handwritten digits, embedded in the crate.
//!
//! They are 1,797 images of 8×8 pixels with values 0 to 16 (E. Alpaydin and C. Kaynak, UCI Machine
//! Learning Repository, 1998); `data/README.md` has their source. They are rendered light on dark
//! grey, from 64 to 192 of 255. Black and white has more contrast than photographs, and a model
//! pretrained on photographs classifies it less well.

use super::dataset::{DataSplit, ImageItem};
use super::error::DataError;
use flate2::read::GzDecoder;
use std::path::Path;

const FILE: &str = "data/digits.csv.gz";
const BYTES: &[u8] = include_bytes!("../../data/digits.csv.gz");
const SIDE: usize = 8;
const MAX: u8 = 16;
/// Grey value of a pixel without ink.
const BACKGROUND: u8 = 64;
/// Grey value that each of the 16 steps of ink adds.
const INK: u8 = 8;
const CLASSES: usize = 10;
const TEST_PERCENT: usize = 20;
const SPLIT_SEED: u64 = 0;

/// Loads the digits at `img_size` pixels; a fixed 20 % of each class are test images.
///
/// # Errors
/// [`DataError::ZeroImageSize`] where `img_size` is 0.
pub fn load(img_size: usize) -> Result<DataSplit, DataError> {
    if img_size == 0 {
        return Err(DataError::ZeroImageSize);
    }
    let malformed = |reason: String| DataError::malformed(Path::new(FILE), reason);
    let mut items = vec![];
    let mut reader = csv::ReaderBuilder::new().has_headers(false).from_reader(GzDecoder::new(BYTES));
    for (id, row) in reader.deserialize::<Vec<u8>>().enumerate() {
        let row = row.map_err(|error| malformed(error.to_string()))?;
        let (&label, grey) = row.split_last().ok_or_else(|| malformed(format!("row {id} is empty")))?;
        if grey.len() != SIDE * SIDE || usize::from(label) >= CLASSES {
            return Err(malformed(format!(
                "row {id} has {} pixels and label {label}, expected 64 and 0 to 9",
                grey.len()
            )));
        }
        let grey: Vec<u8> = grey.iter().map(|&value| BACKGROUND + INK * value.min(MAX)).collect();
        let item = ImageItem { id: id as u64, pixels: grey.repeat(3), height: SIDE, width: SIDE, label: label.into() };
        items.push(item.resized(img_size, img_size));
    }
    let classes = (0..CLASSES).map(|digit| digit.to_string()).collect();
    Ok(DataSplit::stratified(items, classes, TEST_PERCENT, SPLIT_SEED))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::normalization::Normalization;

    #[test]
    fn ids_are_unique_and_classes_balanced() {
        let split = load(SIDE).unwrap();
        assert_eq!((split.train.items.len(), split.test.items.len()), (1438, 359));
        let mut ids: Vec<u64> = split.train.items.iter().chain(&split.test.items).map(|item| item.id).collect();
        ids.sort_unstable();
        assert_eq!(ids, (0..1797).collect::<Vec<_>>());
        for label in 0..CLASSES {
            let count = split.test.items.iter().filter(|item| item.label == label).count();
            assert!((34..=37).contains(&count), "{count} test images of {label}");
        }
    }

    #[test]
    fn first_record_matches_scikit_learn() {
        let split = load(SIDE).unwrap();
        let first = split.train.items.iter().chain(&split.test.items).find(|item| item.id == 0).unwrap();
        assert_eq!(first.label, 0);
        // sklearn.datasets.load_digits().images[0][0]: 0 0 5 13 9 1 0 0, of 16
        assert_eq!(first.pixels[..8], [0, 0, 5, 13, 9, 1, 0, 0].map(|ink| 64 + 8 * ink));
        assert_eq!(first.pixels[..64], first.pixels[128..]);
    }

    #[test]
    fn normalization_matches_the_training_images() {
        let split = load(32).unwrap();
        let values: Vec<f64> = split
            .train
            .items
            .iter()
            .flat_map(|item| &item.pixels[..1024])
            .map(|&pixel| f64::from(pixel) / 255.0)
            .collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let std = (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
        let Normalization { mean: [expected_mean, ..], std: [expected_std, ..] } = Normalization::DIGITS;
        assert!((mean - f64::from(expected_mean)).abs() < 6e-4, "mean {mean}, constant {expected_mean}");
        assert!((std - f64::from(expected_std)).abs() < 6e-4, "std {std}, constant {expected_std}");
    }
}
