//! The tables, pictures and figures of the experiment.

use std::collections::BTreeMap;

use anyhow::Result;
use flops_core::VarianceSource;
use flops_examples::experiment::{Spread, print_table};
use flops_examples::plot::{Panel, Series, panels};
use flops_examples::run::artifacts::Artifacts;
use serde_json::{Map, Value, json};

use crate::args::{Args, Contender, contenders};
use crate::training::{Point, Trained};
use crate::trajectory::{Look, ORACLE};

/// Everything that was measured.
pub struct Results<'a> {
    args: &'a Args,
    seeds: Vec<u64>,
    /// All contenders: uniform first, the oracle last.
    names: Vec<String>,
    /// Those whose lines are drawn: uniform, and the contenders with the first estimate.
    shown: Vec<String>,
    looks: Vec<Look>,
    /// Uniform's expected error by seed and step. In units of it every look counts alike.
    units: BTreeMap<(u64, usize), f64>,
    trained: Vec<Trained>,
    points: Vec<Point>,
    /// The second moment of a query on each layer, the first layer first.
    by_depth: Vec<f64>,
}

impl<'a> Results<'a> {
    pub fn new(
        args: &'a Args,
        seeds: Vec<u64>,
        looks: Vec<Look>,
        trained: Vec<Trained>,
        points: Vec<Point>,
        by_depth: Vec<f64>,
    ) -> Result<Self> {
        let list = contenders(args)?;
        let first = list.get(1).map(|c| c.estimate);
        let is_shown = |(i, c): &(usize, &Contender)| *i == 0 || Some(c.estimate) == first;
        let shown = list.iter().enumerate().filter(is_shown).map(|(_, c)| c.name.clone()).collect();
        let mut names: Vec<String> = list.into_iter().map(|c| c.name).collect();
        names.push(ORACLE.into());
        let of_uniform = looks.iter().filter(|l| l.contender == names[0]);
        let units = of_uniform.filter_map(|l| Some(((l.seed, l.step), l.expected?))).collect();
        Ok(Self { args, seeds, names, shown, looks, units, trained, points, by_depth })
    }

    fn uniform(&self) -> &str {
        &self.names[0]
    }

    /// Returns a contender's summed error over that of uniform, over all steps or the `late` half.
    fn error_ratio(&self, name: &str, late: bool, error: fn(&Look) -> Option<f64>) -> Option<Spread> {
        let first = if late { self.args.steps() / 2 } else { 0 };
        let sum = |seed: u64, name: &str| -> Option<f64> {
            let mine = self.looks.iter().filter(|l| l.seed == seed && l.contender == name && l.step >= first);
            let values: Option<Vec<f64>> = mine.map(|l| Some(error(l)? / self.units.get(&(seed, l.step))?)).collect();
            values.filter(|v| !v.is_empty()).map(|v| v.iter().sum())
        };
        let ratios: Option<Vec<f64>> =
            self.seeds.iter().map(|&s| Some(sum(s, name)? / sum(s, self.uniform())?)).collect();
        ratios.map(|r| Spread::of(&r))
    }

    /// Returns a figure of a contender's training runs, by seed.
    fn finals(&self, name: &str, figure: fn(&Trained) -> f64) -> Vec<f64> {
        self.trained.iter().filter(|t| t.contender == name).map(figure).collect()
    }

    /// Returns in how many runs a contender's training loss ends below uniform's.
    fn wins(&self, name: &str) -> usize {
        let uniform = self.finals(self.uniform(), |t| t.loss);
        self.finals(name, |t| t.loss).iter().zip(uniform).filter(|(a, b)| *a < b).count()
    }

    /// Returns the second moments over that of the last layer.
    fn relative_moments(&self) -> Vec<f64> {
        let last = self.by_depth.last().copied().unwrap_or(1.0);
        self.by_depth.iter().map(|m| m / last).collect()
    }

    /// Prints the tables.
    pub fn print(&self) {
        let Args { testbed, queries, .. } = self.args;
        println!(
            "{}, scope {}, {queries} queries per datum, {} steps, {} seeds",
            testbed.images.dataset,
            testbed.scope,
            self.args.steps(),
            self.seeds.len()
        );
        if !self.looks.is_empty() {
            self.print_errors();
        }
        if !self.trained.is_empty() {
            self.print_training();
        }
        if !self.by_depth.is_empty() {
            println!("\nsecond moment of a query by depth, over that of the last layer");
            let moments = self.relative_moments().into_iter().enumerate();
            let rows: Vec<_> = moments.map(|(layer, m)| vec![layer.to_string(), format!("{m:.3e}")]).collect();
            print_table(&["layer, from the input", "relative second moment"], &rows);
        }
    }

    fn print_errors(&self) {
        println!("\nsquared error of the gradient along uniform's trajectory, over uniform's");
        let text = |s: Option<Spread>| s.map_or("–".into(), |s| s.text(3));
        let row = |name: &String| {
            vec![
                name.clone(),
                text(self.error_ratio(name, false, measured)),
                text(self.error_ratio(name, true, measured)),
                text(self.error_ratio(name, false, expected)),
                text(self.error_ratio(name, true, expected)),
            ]
        };
        let rows: Vec<_> = self.names.iter().map(row).collect();
        print_table(&["allocator, estimate", "measured", "second half", "expected", "second half"], &rows);
    }

    fn print_training(&self) {
        println!("\ntraining on its own");
        let row = |name: &String| {
            let text =
                |decimals: usize, figure: fn(&Trained) -> f64| Spread::of(&self.finals(name, figure)).text(decimals);
            vec![
                name.clone(),
                text(4, |t| t.loss),
                format!("{} of {}", self.wins(name), self.seeds.len()),
                text(4, |t| t.test_loss),
                text(1, |t| 100.0 * t.test_accuracy),
                text(3, |t| t.relative_variance),
            ]
        };
        let rows: Vec<_> = self.names[..self.names.len() - 1].iter().map(row).collect();
        let header =
            ["allocator, estimate", "train loss", "below uniform", "test loss", "test accuracy, %", "variance"];
        print_table(&header, &rows);
    }

    /// Returns a contender's error over uniform's, each stretch of the trajectory as one point.
    /// Expected errors are used if they are known, because they scatter less.
    fn error_curve(&self, name: &str) -> Vec<(f64, f64)> {
        let steps = self.args.steps();
        let width = (steps / 20).max(1);
        let by_expectation = self.looks.iter().any(|l| l.contender == name && l.expected.is_some());
        let sum = |stretch: usize, name: &str| -> f64 {
            let mine = self.looks.iter().filter(|l| l.step / width == stretch && l.contender == name);
            mine.map(|l| if by_expectation { l.expected.unwrap_or(f64::NAN) } else { l.squared_error }).sum()
        };
        let ratio = |stretch: usize| sum(stretch, name) / sum(stretch, self.uniform());
        let points = (0..steps.div_ceil(width)).map(|i| ((i * width + width / 2) as f64, ratio(i)));
        points.filter(|(_, r)| r.is_finite()).collect()
    }

    /// Returns a contender's training loss against queries, the mean over seeds.
    fn training_curve(&self, name: &str) -> Vec<(f64, f64)> {
        let step = (self.args.batch_size * self.args.queries) as u64;
        let mut sums: Vec<(u64, Vec<f64>)> = vec![];
        for p in self.points.iter().filter(|p| p.contender == name) {
            match sums.iter_mut().find(|s| s.0.abs_diff(p.queries) <= step) {
                Some(sum) => sum.1.push(p.loss),
                None => sums.push((p.queries, vec![p.loss])),
            }
        }
        sums.into_iter().map(|(q, l)| (q as f64, Spread::of(&l).mean)).collect()
    }

    fn draw(&self) -> Result<String> {
        let shown = || self.shown.iter().map(String::as_str);
        let mut pictures = vec![];
        if !self.looks.is_empty() {
            pictures.push(Panel {
                title: "error of the gradient along uniform's trajectory".into(),
                axes: ("step".into(), "squared error over uniform's".into()),
                log: (false, false),
                series: shown().chain([ORACLE]).map(|name| Series::new(name, self.error_curve(name))).collect(),
            });
        }
        if !self.points.is_empty() {
            pictures.push(Panel {
                title: "training on its own".into(),
                axes: ("queries".into(), "training loss".into()),
                log: (false, true),
                series: shown().map(|name| Series::new(name, self.training_curve(name))).collect(),
            });
        }
        if !self.by_depth.is_empty() {
            let moments = self.relative_moments().into_iter().enumerate().map(|(layer, m)| (layer as f64, m));
            pictures.push(Panel {
                title: "second moment of a query by depth".into(),
                axes: ("layer, from the input".into(), "over the last layer's".into()),
                log: (false, true),
                series: vec![Series::new("second moment", moments)],
            });
        }
        let Args { testbed, queries, .. } = self.args;
        panels(&format!("{}, {}, {queries} queries per datum", testbed.images.dataset, testbed.scope), &pictures)
    }

    /// Writes the picture and the CSV files.
    pub fn write(&self, artifacts: &Artifacts) -> Result<()> {
        artifacts.write("ablation.svg", self.draw()?.as_bytes())?;
        artifacts.write_csv("trajectory.csv", &self.looks)?;
        artifacts.write_csv("training.csv", &self.trained)?;
        artifacts.write_csv("curves.csv", &self.points)
    }

    /// Returns the figures of `summary.json`.
    pub fn figures(&self) -> Result<Value> {
        let Args { testbed, queries, batch_size, lr, schedule, .. } = self.args;
        let by_name = |figure: &dyn Fn(&str) -> Value| -> Map<String, Value> {
            self.names.iter().map(|name| (name.clone(), figure(name))).collect()
        };
        Ok(json!({
            "dataset": testbed.images.dataset.to_string(),
            "scope": testbed.scope.to_string(),
            "queries": queries,
            "batch_size": batch_size,
            "steps": self.args.steps(),
            "lr": lr,
            "schedule": schedule.name(),
            "control_variate": self.args.config(0, VarianceSource::Running)?.estimator.space.control_variate(),
            "squared_error_over_uniform": by_name(&|name| json!({
                "measured": self.error_ratio(name, false, measured),
                "measured_second_half": self.error_ratio(name, true, measured),
                "expected": self.error_ratio(name, false, expected),
                "expected_second_half": self.error_ratio(name, true, expected),
            })),
            "training": by_name(&|name| json!({
                "loss": self.finals(name, |t| t.loss),
                "test_loss": self.finals(name, |t| t.test_loss),
                "test_accuracy": self.finals(name, |t| t.test_accuracy),
                "relative_variance": self.finals(name, |t| t.relative_variance),
                "below_uniform": self.wins(name),
            })),
            "second_moment_by_layer": self.by_depth,
        }))
    }
}

fn measured(look: &Look) -> Option<f64> {
    Some(look.squared_error)
}

fn expected(look: &Look) -> Option<f64> {
    look.expected
}
