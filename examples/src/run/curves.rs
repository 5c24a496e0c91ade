//! The curves of a run as an SVG: accuracy, loss and the variance of the estimate against the queries spent.

use std::path::Path;

use anyhow::{Context, Result};

use super::history::{FILE, History, Row, Split};
use crate::plot::{Panel, Series, panels};

/// Another run whose test figures are drawn beside, such as one by backpropagation.
#[derive(Debug)]
pub struct Beside {
    name: String,
    history: History,
}

impl Beside {
    /// Reads the run of an artifact folder. Its name is its method, where `summary.json` tells, else that
    /// of the folder.
    ///
    /// # Errors
    /// Where the folder has no `metrics.csv`, or a damaged one.
    pub fn read(folder: &Path) -> Result<Self> {
        let history = History::read(&folder.join(FILE)).context("give the folder of a run that has ended")?;
        let summary = std::fs::read_to_string(folder.join("summary.json")).unwrap_or_default();
        let summary = serde_json::from_str::<serde_json::Value>(&summary).unwrap_or_default();
        let name = summary["method"].as_str().map(String::from);
        let name = name.or_else(|| folder.file_name().map(|name| name.to_string_lossy().into_owned()));
        Ok(Self { name: format!("{}, test", name.unwrap_or_else(|| "beside".into())), history })
    }
}

/// What is drawn of a run.
#[derive(Debug)]
pub struct Curves<'a> {
    history: &'a History,
    beside: Option<&'a Beside>,
    variance: bool,
}

impl<'a> Curves<'a> {
    /// The curves of `history`, against queries, or against steps if there were none.
    #[must_use]
    pub fn of(history: &'a History) -> Self {
        Self { history, beside: None, variance: false }
    }

    /// Adds the test figures of another run, each at the queries that this one had spent after as many
    /// epochs. Epochs that this run does not have are left out.
    #[must_use]
    pub fn beside(self, other: Option<&'a Beside>) -> Self {
        Self { beside: other, ..self }
    }

    /// Adds the variance of the estimate relative to equal shares, and its floor, where `known`.
    #[must_use]
    pub fn with_variance(self, known: bool) -> Self {
        Self { variance: known, ..self }
    }

    /// Draws them under `title`.
    ///
    /// # Errors
    /// Where the drawing fails.
    pub fn draw(&self, title: &str) -> Result<String> {
        let axis = if self.by_queries() { "queries" } else { "training steps" };
        let panel = |name: &str, series: Vec<Series>| Panel {
            title: name.into(),
            axes: (axis.into(), name.into()),
            log: (false, false),
            series,
        };
        let results = |name: &str, of: &dyn Fn(&Row) -> f64| {
            let test = self.history.of(Split::Test).map(|row| (self.x(row), of(row)));
            let mut series = vec![Series::new("train", self.smoothed(&|row| Some(of(row)))), Series::new("test", test)];
            if let Some(beside) = self.beside {
                let points = beside.history.of(Split::Test).filter_map(|row| Some((self.after(row.epoch)?, of(row))));
                series.push(Series::new(&beside.name, points));
            }
            panel(name, series)
        };
        let mut all = vec![results("accuracy, %", &|row| 100.0 * row.accuracy), results("loss", &|row| row.loss)];
        if self.variance {
            let variance = [
                Series::new("as allocated", self.smoothed(&|row| row.variance_vs_uniform)),
                Series::new("floor", self.smoothed(&|row| row.floor)),
            ];
            if variance.iter().any(|series| !series.points.is_empty()) {
                all.push(panel("variance relative to equal shares", variance.into()));
            }
        }
        panels(title, &all)
    }

    fn by_queries(&self) -> bool {
        self.history.queries() > 0
    }

    fn x(&self, row: &Row) -> f64 {
        if self.by_queries() { row.queries as f64 } else { row.step as f64 }
    }

    /// Where this run was after `epoch`.
    fn after(&self, epoch: usize) -> Option<f64> {
        self.history.of(Split::Test).find(|row| row.epoch == epoch).map(|row| self.x(row))
    }

    /// Returns the training steps that have a figure in at most 40 groups of at least 4, each as its mean
    /// at its end.
    fn smoothed(&self, of: &dyn Fn(&Row) -> Option<f64>) -> Vec<(f64, f64)> {
        let rows = self.history.of(Split::Train).filter_map(|row| Some((self.x(row), of(row)?)));
        let rows: Vec<(f64, f64)> = rows.collect();
        let groups = (rows.len() / 4).min(40).max(rows.len().min(1));
        (0..groups)
            .map(|i| &rows[i * rows.len() / groups..(i + 1) * rows.len() / groups])
            .map(|rows| (rows[rows.len() - 1].0, rows.iter().map(|row| row.1).sum::<f64>() / rows.len() as f64))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::artifacts::Artifacts;

    fn trained() -> History {
        let mut history = History::default();
        history.push(Row::new(Split::Test, 0, 2.3, 0.1));
        for step in 0..90 {
            let row = Row::new(Split::Train, 1, 2.0 / (1.0 + step as f64), 0.5);
            let (variance_vs_uniform, floor) = (Some(0.5), Some(0.4));
            history.push(Row { step_queries: Some(1280), variance_vs_uniform, floor, ..row });
        }
        history.push(Row::new(Split::Test, 1, 0.2, 0.9));
        history
    }

    #[test]
    fn a_history_gives_a_panel_for_each_figure() {
        let mut untrained = History::default();
        untrained.push(Row::new(Split::Test, 0, 2.3, 0.1));
        let svg = Curves::of(&untrained).with_variance(true).draw("an untrained model").unwrap();
        assert!(svg.contains("training steps") && !svg.contains("equal shares"));
        let trained = trained();
        let svg = Curves::of(&trained).draw("a trained model").unwrap();
        for text in ["accuracy, %", "loss", "queries", "train", "test", "a trained model"] {
            assert!(svg.contains(text), "{text} is not in the picture");
        }
        assert!(!svg.contains("NaN") && !svg.contains("floor"));
        let svg = Curves::of(&trained).with_variance(true).draw("t").unwrap();
        assert!(svg.contains("floor") && svg.contains("variance relative to equal shares"));
    }

    /// Another run has another number of steps, and an epoch more.
    #[test]
    fn another_run_lies_at_the_same_epochs() {
        let dir = tempfile::tempdir().unwrap();
        let mut other = History::default();
        for (epoch, accuracy) in [(0, 0.1), (1, 0.95), (2, 0.97)] {
            other.push(Row::new(Split::Test, epoch, 1.0, accuracy));
        }
        let artifacts = Artifacts::open(dir.path()).unwrap();
        other.write(&artifacts).unwrap();
        artifacts.write_json("summary.json", &serde_json::json!({"method": "backprop"})).unwrap();
        let (beside, trained) = (Beside::read(dir.path()).unwrap(), trained());
        let curves = Curves::of(&trained).beside(Some(&beside));
        assert_eq!([0, 1, 2].map(|epoch| curves.after(epoch)), [Some(0.0), Some(90.0 * 1280.0), None]);
        assert!(curves.draw("t").unwrap().contains("backprop, test"));
        let missing = Beside::read(&dir.path().join("nothing")).unwrap_err();
        assert!(format!("{missing:#}").contains("metrics.csv"), "{missing:#}");
    }
}
