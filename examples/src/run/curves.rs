//! The curves of a run as an SVG: accuracy and loss against the queries spent.

use anyhow::Result;

use super::history::{History, Row, Split};
use crate::plot::{Panel, Series, panels};

/// Draws the curves of `history` under `title`, against queries, or against steps if there were
/// none.
///
/// # Errors
/// Where the drawing fails.
pub fn draw(history: &History, title: &str) -> Result<String> {
    let by_queries = history.queries() > 0;
    let axis = if by_queries { "queries" } else { "training steps" };
    let x = |row: &Row| if by_queries { row.queries as f64 } else { row.step as f64 };
    let panel = |name: &str, of: &dyn Fn(&Row) -> f64| Panel {
        title: name.into(),
        axes: (axis.into(), name.into()),
        log: (false, false),
        series: vec![
            Series::new("train", smoothed(history, &x, of)),
            Series::new("test", history.of(Split::Test).map(|row| (x(row), of(row)))),
        ],
    };
    panels(title, &[panel("accuracy, %", &|row| 100.0 * row.accuracy), panel("loss", &|row| row.loss)])
}

/// Returns the training steps in at most 40 groups of at least 4, each as its mean at its end.
fn smoothed(history: &History, x: &impl Fn(&Row) -> f64, of: &dyn Fn(&Row) -> f64) -> Vec<(f64, f64)> {
    let rows: Vec<&Row> = history.of(Split::Train).collect();
    let groups = (rows.len() / 4).min(40).max(rows.len().min(1));
    (0..groups)
        .map(|i| &rows[i * rows.len() / groups..(i + 1) * rows.len() / groups])
        .map(|rows| (x(rows[rows.len() - 1]), rows.iter().map(|row| of(row)).sum::<f64>() / rows.len() as f64))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_gives_two_panels() {
        let mut history = History::default();
        history.push(Row::new(Split::Test, 0, 2.3, 0.1));
        let untrained = draw(&history, "an untrained model").unwrap();
        assert!(untrained.contains("training steps"));
        for step in 0..90 {
            let row = Row::new(Split::Train, 1, 2.0 / (1.0 + step as f64), 0.5);
            history.push(Row { step_queries: Some(1280), ..row });
        }
        history.push(Row::new(Split::Test, 1, 0.2, 0.9));
        let svg = draw(&history, "a trained model").unwrap();
        for text in ["accuracy, %", "loss", "queries", "train", "test", "a trained model"] {
            assert!(svg.contains(text), "{text} is not in the picture");
        }
        assert!(!svg.contains("NaN"));
    }
}
