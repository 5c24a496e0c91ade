//! Red wines and their grades, embedded: real data with rare classes.
//!
//! They are 1,599 wines with 11 measurements (P. Cortez et al., UCI Machine Learning Repository, 2009);
//! `data/README.md` has their source. Grades from 3 to 8 are taken as three classes: poor (3 and 4; 63
//! wines), ordinary (5 and 6; 1,319) and good (7 and 8; 217).

use anyhow::{Context, Result, ensure};
use flate2::read::GzDecoder;
use flops_core::random::keyed_rng;
use rand::seq::SliceRandom;

const BYTES: &[u8] = include_bytes!("../../data/winequality-red.csv.gz");
/// Measurements of a wine.
pub const FEATURES: usize = 11;
/// Names of the classes.
pub const CLASSES: [&str; 3] = ["poor", "ordinary", "good"];
/// Key of the stream that splits the wines.
const SPLIT: u64 = 0x5717;

/// A wine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wine {
    /// Its line in the file, from 0.
    pub id: u64,
    /// Measurements.
    pub x: [f32; FEATURES],
    /// Class.
    pub label: usize,
}

/// Loads all wines.
///
/// # Errors
/// If the embedded file is broken.
pub fn load() -> Result<Vec<Wine>> {
    let wine = |(id, row): (usize, Result<Vec<f32>, csv::Error>)| {
        let row = row.with_context(|| format!("wine {id}"))?;
        ensure!(row.len() == FEATURES + 1, "wine {id} has {} values, not {}", row.len(), FEATURES + 1);
        let mut x = [0.0; FEATURES];
        x.copy_from_slice(&row[..FEATURES]);
        let label = match row[FEATURES] as u8 {
            0..=4 => 0,
            5 | 6 => 1,
            _ => 2,
        };
        Ok(Wine { id: id as u64, x, label })
    };
    csv::Reader::from_reader(GzDecoder::new(BYTES)).into_deserialize::<Vec<f32>>().enumerate().map(wine).collect()
}

/// Splits wines into training and test: a share of each class, drawn by `seed`. Measurements are scaled
/// to mean 0 and variance 1 over the training wines.
pub fn split(mut wines: Vec<Wine>, test_share: f64, seed: u64) -> (Vec<Wine>, Vec<Wine>) {
    wines.shuffle(&mut keyed_rng([seed, SPLIT, 0, 0]));
    let (mut train, mut test) = (vec![], vec![]);
    for class in 0..CLASSES.len() {
        let mine: Vec<Wine> = wines.iter().filter(|wine| wine.label == class).copied().collect();
        let tested = (mine.len() as f64 * test_share).round() as usize;
        test.extend_from_slice(&mine[..tested]);
        train.extend_from_slice(&mine[tested..]);
    }
    for feature in 0..FEATURES {
        let n = train.len() as f32;
        let mean = train.iter().map(|wine| wine.x[feature]).sum::<f32>() / n;
        let variance = train.iter().map(|wine| (wine.x[feature] - mean).powi(2)).sum::<f32>() / n;
        for wine in train.iter_mut().chain(&mut test) {
            wine.x[feature] = (wine.x[feature] - mean) / variance.sqrt().max(1e-6);
        }
    }
    (train, test)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_as_rare_as_documented_in_both_parts() {
        let wines = load().unwrap();
        let counts = |wines: &[Wine]| [0, 1, 2].map(|class| wines.iter().filter(|wine| wine.label == class).count());
        assert_eq!((wines.len(), counts(&wines)), (1599, [63, 1319, 217]));
        let (train, test) = split(wines.clone(), 0.3, 1);
        assert_eq!((counts(&train), counts(&test)), ([44, 923, 152], [19, 396, 65]));
        let mut ids: Vec<u64> = train.iter().chain(&test).map(|wine| wine.id).collect();
        ids.sort_unstable();
        assert!(ids.into_iter().eq(0..1599));
        let alcohol: Vec<f32> = train.iter().map(|wine| wine.x[10]).collect();
        let mean = alcohol.iter().sum::<f32>() / alcohol.len() as f32;
        assert!(mean.abs() < 1e-3, "{mean}");
        assert!(split(wines.clone(), 0.3, 1).1 == test && split(wines, 0.3, 2).1 != test);
    }
}
