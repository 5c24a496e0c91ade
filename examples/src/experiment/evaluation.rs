//! How well a model classifies, in all and by class.

use std::collections::BTreeMap;

use anyhow::Result;
use flops_vit::data::classes::ClassOutputs;
use serde::Serialize;

use crate::plot::{Heat, heat_maps};

/// The accuracy on the images of a class; none where there are no images.
#[derive(Clone, Debug, Serialize)]
pub struct ClassAccuracy {
    /// Its name.
    pub class: String,
    /// Its images.
    pub images: usize,
    /// The share of them whose label has the best score, 0 to 1.
    pub top1: Option<f64>,
    /// The share of them whose label is among the five best.
    pub top5: Option<f64>,
    /// The class that is predicted most often when the prediction is wrong.
    pub mistaken_for: Option<String>,
}

/// What the model predicts for one image.
#[derive(Clone, Copy, Debug)]
pub struct Prediction {
    /// The image's class.
    pub label: usize,
    /// The rank of the label among the outputs by score, from 0.
    pub rank: usize,
    /// The output with the best score.
    pub best: usize,
}

/// The predictions for all images, and their mean loss.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// One for each image.
    pub predictions: Vec<Prediction>,
    /// The mean cross-entropy.
    pub loss: f64,
}

impl Prediction {
    /// Returns the prediction from the scores of all outputs, and its cross-entropy.
    pub fn new(scores: &[f32], label: usize, output: usize) -> (Self, f64) {
        let own = scores[output];
        let better = scores.iter().enumerate().filter(|&(c, &s)| s > own || (s == own && c < output));
        let best = (0..scores.len()).fold(0, |best, c| if scores[c] > scores[best] { c } else { best });
        let sum: f64 = scores.iter().map(|s| f64::from(s - scores[best]).exp()).sum();
        let loss = sum.ln() - f64::from(own - scores[best]);
        (Self { label, rank: better.count(), best }, loss)
    }
}

impl Evaluation {
    /// Returns the share of images whose label is among the `k` best classes, of one class or of
    /// all.
    pub fn top_k(&self, k: usize, class: Option<usize>) -> Option<f64> {
        let of_class = self.predictions.iter().filter(|p| class.is_none_or(|class| class == p.label));
        let ranks: Vec<usize> = of_class.map(|p| p.rank).collect();
        (!ranks.is_empty()).then(|| ranks.iter().filter(|&&rank| rank < k).count() as f64 / ranks.len() as f64)
    }

    /// Returns how many images of each class are predicted as each output.
    pub fn counts(&self, classes: usize) -> Vec<BTreeMap<usize, usize>> {
        let mut counts = vec![BTreeMap::new(); classes];
        self.predictions.iter().for_each(|p| *counts[p.label].entry(p.best).or_default() += 1);
        counts
    }

    /// Returns the accuracy of each class.
    pub fn by_class(&self, classes: &ClassOutputs, counts: &[BTreeMap<usize, usize>]) -> Vec<ClassAccuracy> {
        let accuracy = |(label, counts): (usize, &BTreeMap<usize, usize>)| {
            let own = classes.outputs[label];
            let others = counts.iter().filter(|&(&output, _)| output != own);
            let mistaken = others.max_by_key(|&(output, count)| (count, std::cmp::Reverse(output)));
            ClassAccuracy {
                class: classes.names[own].clone(),
                images: counts.values().sum(),
                top1: self.top_k(1, Some(label)),
                top5: self.top_k(5, Some(label)),
                mistaken_for: mistaken.map(|(&output, _)| classes.names[output].clone()),
            }
        };
        counts.iter().enumerate().map(accuracy).collect()
    }
}

/// Draws the confusion matrix, each row in percent of its images. Classes of the model that the
/// data does not have share a column.
///
/// # Errors
/// Where the drawing fails.
pub fn draw_confusion(classes: &ClassOutputs, counts: &[BTreeMap<usize, usize>]) -> Result<String> {
    let name = |&output: &usize| classes.names[output].chars().take(10).collect::<String>();
    let rows: Vec<String> = classes.outputs.iter().map(name).collect();
    let mut columns = rows.clone();
    columns.extend((rows.len() < classes.names.len()).then(|| "other".to_string()));
    // a class without images has an empty row, not one of zeros
    let percent = |counts: &BTreeMap<usize, usize>| {
        let images = counts.values().sum::<usize>() as f64;
        let mut row = vec![if images > 0.0 { 0.0 } else { f64::NAN }; columns.len()];
        for (&output, &n) in counts {
            row[classes.class(output).unwrap_or(rows.len())] += 100.0 * n as f64 / images;
        }
        row
    };
    let map = Heat {
        title: String::new(),
        values: counts.iter().map(percent).collect(),
        rows: ("class".into(), rows.clone()),
        columns: ("taken for".into(), columns.clone()),
        decimals: 0,
    };
    heat_maps("what images are taken for, %", &[map], 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_that_the_data_does_not_have_count_as_wrong() {
        let names = |names: [&str; 3]| names.map(String::from).to_vec();
        let classes = ClassOutputs::find(&names(["dog", "cow", "cat"]), &names(["cat", "dog", ""])[..2]).unwrap();
        // of `cat` one is right, one is taken for `cow`, one for `dog`; both of `dog` are right
        let scores = [[0.0, 1.0, 2.0], [0.0, 2.0, 1.0], [2.0, 1.0, 0.0], [3.0, 0.0, 0.0], [3.0, 2.0, 2.0]];
        let predict = |(scores, label): (&[f32; 3], usize)| Prediction::new(scores, label, classes.outputs[label]).0;
        let predictions = scores.iter().zip([0, 0, 0, 1, 1]).map(predict).collect();
        let evaluation = Evaluation { predictions, loss: 0.0 };
        assert_eq!(evaluation.top_k(1, None), Some(0.6));
        assert_eq!((evaluation.top_k(2, Some(0)), evaluation.top_k(3, None)), (Some(2.0 / 3.0), Some(1.0)));
        let counts = evaluation.counts(2);
        let table = evaluation.by_class(&classes, &counts);
        // as often for `cow`, whose output comes later
        assert_eq!((table[0].images, table[0].mistaken_for.as_deref()), (3, Some("dog")));
        assert_eq!((table[1].top1, table[1].mistaken_for.as_deref()), (Some(1.0), None));
        let drawn = draw_confusion(&classes, &counts).unwrap();
        assert!(drawn.contains("other"));
        // a class without images has no figures, where the three of another stay
        let empty = draw_confusion(&classes, &[counts[0].clone(), Default::default()]).unwrap();
        let cells = |svg: &str| svg.matches("<rect").count();
        assert_eq!(cells(&drawn) - cells(&empty), 3);
    }

    #[test]
    fn the_loss_is_that_of_all_outputs() {
        // torch.nn.functional.cross_entropy(torch.tensor([[1., 2., 4.]]), torch.tensor([1])): 2.1698
        let (prediction, loss) = Prediction::new(&[1.0, 2.0, 4.0], 0, 1);
        assert!((loss - 2.1698).abs() < 1e-4, "{loss}");
        assert_eq!((prediction.label, prediction.rank, prediction.best), (0, 1, 2));
    }
}
