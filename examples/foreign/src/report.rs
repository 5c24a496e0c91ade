//! What the programs share: their flags, and the files that they leave.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use flops_report::plot::{Panel, Series, panels};
use serde_json::{Value, json};
use tempfile::NamedTempFile;

/// Flags of both programs.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// Number of seeds, from 0.
    #[arg(long, default_value_t = 3)]
    pub seeds: u64,
    /// Threads that evaluate queries [default: all cores]; the result does not depend on it.
    #[arg(long)]
    pub threads: Option<usize>,
    /// Folder for summary.json, accuracy.csv and accuracy.svg [default: artifacts/PROGRAM].
    #[arg(long)]
    pub artifact_dir: Option<PathBuf>,
}

impl Common {
    /// Checks the flags; returns the number of threads.
    pub fn threads(&self) -> Result<usize> {
        ensure!(self.seeds > 0, "--seeds 0: use at least 1");
        let threads = self.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        ensure!((1..=1024).contains(&threads), "--threads {threads}: use 1 to 1,024");
        Ok(threads)
    }

    /// The folder, made where it is missing.
    pub fn artifacts(&self, program: &str) -> Result<PathBuf> {
        let folder = self.artifact_dir.clone().unwrap_or_else(|| Path::new("artifacts").join(program));
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("--artifact-dir {}: no folder can be made there", folder.display()))?;
        Ok(folder)
    }
}

/// Test accuracy in percent by rows spent, of a way to train and a seed.
pub struct Curve {
    /// The way.
    pub way: String,
    /// The seed.
    pub seed: u64,
    /// Rows and accuracy.
    pub looks: Vec<(u64, f64)>,
}

impl Curve {
    /// Accuracy at the start.
    pub fn first(&self) -> f64 {
        self.looks.first().map_or(f64::NAN, |look| look.1)
    }

    /// Accuracy at the end.
    pub fn last(&self) -> f64 {
        self.looks.last().map_or(f64::NAN, |look| look.1)
    }

    /// Rows spent.
    pub fn rows(&self) -> u64 {
        self.looks.last().map_or(0, |look| look.0)
    }
}

/// Mean and standard deviation over seeds, the latter 0 for a single one.
pub fn spread(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
    (mean, if values.len() > 1 { (squares / (n - 1.0)).sqrt() } else { 0.0 })
}

/// [`spread`] as text.
pub fn text(values: &[f64]) -> String {
    let (mean, deviation) = spread(values);
    format!("{mean:.1} ± {deviation:.1}")
}

/// [`spread`] for the summary.
pub fn figure(values: &[f64]) -> Value {
    let (mean, deviation) = spread(values);
    json!({"mean": mean, "standard_deviation": deviation, "by_seed": values})
}

/// Writes a file whole or not at all.
pub fn save(file: &Path, content: &str) -> Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    let written = NamedTempFile::new_in(folder).and_then(|mut part| {
        part.write_all(content.as_bytes())?;
        part.persist(file).map_err(|error| error.error)
    });
    written.with_context(|| format!("{}: cannot be written", file.display()))?;
    Ok(())
}

/// Writes the three files.
pub fn write(folder: &Path, title: &str, curves: &[Curve], summary: &Value) -> Result<()> {
    let mut csv = String::from("way,seed,rows,test_accuracy\n");
    let mut ways: Vec<&str> = vec![];
    for curve in curves {
        curve.looks.iter().for_each(|(rows, accuracy)| {
            csv += &format!("{},{},{rows},{accuracy}\n", curve.way, curve.seed);
        });
        if !ways.contains(&curve.way.as_str()) {
            ways.push(&curve.way);
        }
    }
    let of_way = |way: &str| {
        let runs: Vec<&Curve> = curves.iter().filter(|curve| curve.way == way).collect();
        let most = runs.iter().map(|run| run.looks.len()).min().unwrap_or(0);
        let mean =
            move |value: &dyn Fn(&Curve) -> f64| runs.iter().map(|run| value(run)).sum::<f64>() / runs.len() as f64;
        let points = (0..most).map(|i| (mean(&|run| run.looks[i].0 as f64), mean(&|run| run.looks[i].1)));
        Series::new(way, points.collect::<Vec<_>>())
    };
    let panel = Panel {
        title: "mean of the seeds".into(),
        axes: ("rows sent through the model".into(), "test accuracy, %".into()),
        log: (false, false),
        series: ways.into_iter().map(of_way).collect(),
    };
    let files =
        [("summary.json", format!("{summary:#}\n")), ("accuracy.csv", csv), ("accuracy.svg", panels(title, &[panel])?)];
    for (name, content) in files {
        let file = folder.join(name);
        save(&file, &content)?;
    }
    Ok(())
}
