//! The table, the picture and the files of the results.

use std::time::Instant;

use anyhow::Result;
use flops_examples::experiment::{Spread, print_table};
use flops_examples::plot::{Panel, Series, panels};
use flops_examples::run::artifacts::Artifacts;
use flops_vit::Scope;
use serde_json::{Value, json};

use crate::args::Args;
use crate::method::Method;
use crate::trial::{Look, Subject};

/// All runs of a scope by a method.
struct Runs<'a> {
    scope: Scope,
    method: Method,
    /// The looks of each seed, in order.
    seeds: Vec<Vec<&'a Look>>,
}

impl<'a> Runs<'a> {
    fn of(scope: Scope, method: Method, seeds: &[u64], looks: &'a [Look]) -> Self {
        let (scope_name, method_name) = (scope.to_string(), method.to_string());
        let mine = |look: &&Look| look.scope == scope_name && look.method == method_name;
        let of_seed = |&seed: &u64| looks.iter().filter(mine).filter(|look| look.seed == seed).collect();
        Self { scope, method, seeds: seeds.iter().map(of_seed).collect() }
    }

    fn at(&self, index: usize, figure: impl Fn(&Look) -> f64) -> Spread {
        Spread::of(&self.seeds.iter().filter_map(|looks| looks.get(index)).map(|look| figure(look)).collect::<Vec<_>>())
    }

    fn last(&self, figure: impl Fn(&Look) -> f64) -> Spread {
        Spread::of(&self.seeds.iter().filter_map(|looks| looks.last()).map(|look| figure(look)).collect::<Vec<_>>())
    }

    /// The accuracy over the row-forwards, as far as every seed was looked at.
    fn series(&self) -> Series {
        let most = self.seeds.iter().map(Vec::len).min().unwrap_or(0);
        let point = |index| {
            let accuracy = self.at(index, |look| look.test_accuracy);
            (self.at(index, |look| look.row_forwards as f64).mean, accuracy.mean, accuracy.deviation)
        };
        Series { name: self.method.to_string(), points: (0..most).map(point).collect() }
    }

    fn line(&self) -> Vec<String> {
        vec![
            self.scope.to_string(),
            self.method.to_string(),
            self.last(|look| look.test_accuracy).text(1),
            self.last(|look| look.test_loss).text(3),
            format!("{:.0}", self.last(|look| look.trained as f64).mean),
            format!("{:.0}", self.last(|look| look.step as f64).mean),
            self.last(|look| look.seconds).text(1),
        ]
    }

    fn figures(&self) -> Value {
        let by_seed: Vec<f64> = self.seeds.iter().filter_map(|looks| looks.last()).map(|l| l.test_accuracy).collect();
        json!({
            "scope": self.scope.to_string(),
            "method": self.method.to_string(),
            "lr": self.last(|look| look.lr).mean,
            "test_accuracy_percent": self.last(|look| look.test_accuracy),
            "test_accuracy_percent_by_seed": by_seed,
            "test_loss": self.last(|look| look.test_loss),
            "trained": self.last(|look| look.trained as f64).mean,
            "steps": self.last(|look| look.step as f64).mean,
            "seconds": self.last(|look| look.seconds),
        })
    }
}

/// Prints the table and writes the files.
///
/// # Errors
/// If a file cannot be written.
pub fn write(args: &Args, subject: &Subject, looks: &[Look], artifacts: &Artifacts, started: Instant) -> Result<()> {
    let seeds = args.experiment.seeds()?;
    let of = |&scope: &Scope| args.methods.iter().map(move |&method| (scope, method));
    let runs: Vec<Runs<'_>> =
        args.scopes.iter().flat_map(of).map(|(scope, method)| Runs::of(scope, method, &seeds, looks)).collect();
    let panel = |&scope: &Scope| Panel {
        title: format!("scope {scope}"),
        axes: ("row-forwards".into(), "test accuracy, %".into()),
        log: (false, false),
        series: runs.iter().filter(|runs| runs.scope == scope).map(Runs::series).collect(),
    };
    let all: Vec<Panel> = args.scopes.iter().map(panel).collect();
    artifacts.write("text.svg", panels("Texts: accuracy by row-forwards", &all)?.as_bytes())?;
    println!("{} row-forwards a run, {} seeds, mean ± standard deviation", args.row_forwards(), seeds.len());
    let lines: Vec<Vec<String>> = runs.iter().map(Runs::line).collect();
    print_table(&["scope", "method", "test accuracy, %", "test loss", "trained values", "steps", "seconds"], &lines);
    let figures = json!({
        "subject": subject.described(),
        "classes": subject.texts.classes,
        "row_forwards": args.row_forwards(),
        "batch_size": args.batch_size,
        "queries": args.queries,
        "runs": runs.iter().map(Runs::figures).collect::<Vec<_>>(),
    });
    args.experiment.finish(artifacts, started, figures, "text.svg, text.csv")
}
