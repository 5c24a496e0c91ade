//! The tables: how each cell ended, its curves, and its sites.

use anyhow::Result;
use flops_examples::experiment::{Spread, markdown_table};
use flops_examples::run::artifacts::Artifacts;
use flops_examples::run::format::thousands;
use serde::Serialize;

use crate::grid::Cell;
use crate::record::{Look, Record, SiteRow};

/// A row of `final.csv`: a cell over its seeds. Empty where no run has the figure.
#[derive(Clone, Debug, Serialize)]
pub struct Final {
    pub subject: String,
    pub method: String,
    /// Queries per image and step; 0 for backpropagation.
    pub queries: usize,
    pub lr: f64,
    pub lr_at_edge: bool,
    pub seeds: usize,
    /// Runs that stopped before their end.
    pub failed: usize,
    /// Test accuracy in percent at the end.
    pub accuracy: Option<f64>,
    pub accuracy_deviation: Option<f64>,
    pub test_loss: Option<f64>,
    /// Mean training loss of the last tenth of the steps.
    pub train_loss: Option<f64>,
    pub train_loss_deviation: Option<f64>,
    pub steps: Option<f64>,
    pub row_forwards: Option<f64>,
    /// Queries of the whole run.
    pub total_queries: Option<f64>,
    pub seconds: Option<f64>,
    /// Runs that reached the target.
    pub reached: usize,
    /// Means over the runs that reached the target.
    pub row_forwards_to_target: Option<f64>,
    pub row_forwards_to_target_deviation: Option<f64>,
    pub seconds_to_target: Option<f64>,
    pub seconds_to_target_deviation: Option<f64>,
    /// Mean over the looks after the start whose estimate is not zero.
    pub cosine: Option<f64>,
    /// Mean over the sites at the end.
    pub explained: Option<f64>,
    pub alpha: Option<f64>,
}

impl Final {
    /// Sums up a cell.
    pub fn of(cell: &Cell, target: f64) -> Self {
        let ends = |figure: &dyn Fn(&Look) -> Option<f64>| spread(cell.trained().filter_map(|r| figure(r.end()?)));
        let reached = |figure: fn(&Look) -> f64| spread(cell.trained().filter_map(|r| r.reaches(target)).map(figure));
        let (accuracy, train_loss) =
            (ends(&|look| Some(100.0 * look.test_accuracy)), spread(cell.trained().filter_map(|r| r.train_loss)));
        let (rows, seconds) = (reached(|look| look.row_forwards as f64), reached(|look| look.seconds));
        let cosines = cell.trained().flat_map(|r| r.looks.iter().skip(1)).filter_map(|look| look.cosine);
        let sites = || cell.trained().flat_map(|r| &r.sites);
        Self {
            subject: cell.subject.to_string(),
            method: cell.method.to_string(),
            queries: cell.queries,
            lr: cell.lr,
            lr_at_edge: cell.lr_at_edge,
            seeds: cell.records.len(),
            failed: cell.records.len() - cell.trained().count(),
            accuracy: mean(accuracy),
            accuracy_deviation: deviation(accuracy),
            test_loss: mean(ends(&|look| look.test_loss)),
            train_loss: mean(train_loss),
            train_loss_deviation: deviation(train_loss),
            steps: mean(ends(&|look| Some(look.step as f64))),
            row_forwards: mean(ends(&|look| Some(look.row_forwards as f64))),
            total_queries: mean(ends(&|look| Some(look.queries as f64))),
            seconds: mean(ends(&|look| Some(look.seconds))),
            reached: cell.trained().filter(|r| r.reaches(target).is_some()).count(),
            row_forwards_to_target: mean(rows),
            row_forwards_to_target_deviation: deviation(rows),
            seconds_to_target: mean(seconds),
            seconds_to_target_deviation: deviation(seconds),
            cosine: mean(spread(cosines)),
            explained: mean(spread(sites().map(|site| site.explained))),
            alpha: mean(spread(sites().map(|site| site.alpha))),
        }
    }

    fn line(&self) -> Vec<String> {
        let number = |value: Option<f64>, decimals: usize| value.map_or("–".into(), |v| format!("{v:.decimals$}"));
        let pair = |mean: Option<f64>, deviation: Option<f64>, decimals: usize| match (mean, deviation) {
            (Some(mean), Some(deviation)) => Spread { mean, deviation }.text(decimals),
            _ => "–".into(),
        };
        let some = if self.reached < self.seeds { format!(" ({} of {})", self.reached, self.seeds) } else { "".into() };
        let price = |value: Option<f64>, text: fn(f64) -> String| {
            value.map_or("–".into(), |value| format!("{}{some}", text(value)))
        };
        vec![
            self.method.clone(),
            self.subject.clone(),
            if self.queries == 0 { "–".into() } else { self.queries.to_string() },
            format!("{}{}", self.lr, if self.lr_at_edge { "*" } else { "" }),
            pair(self.accuracy, self.accuracy_deviation, 1),
            pair(self.train_loss, self.train_loss_deviation, 3),
            number(self.cosine, 3),
            number(self.explained, 2),
            number(self.alpha, 2),
            number(self.seconds, 1),
            price(self.row_forwards_to_target, |rows| thousands(rows.round() as u64)),
            price(self.seconds_to_target, |seconds| format!("{seconds:.1}")),
        ]
    }
}

/// Returns the table of all cells in Markdown.
pub fn table(rows: &[Final], target: f64) -> String {
    let (forwards, seconds) =
        (format!("row-forwards to {:.0} %", 100.0 * target), format!("seconds to {:.0} %", 100.0 * target));
    let header = ["method", "trained", "queries", "lr", "test accuracy, %", "train loss", "cosine", "explained", "α"];
    let header = [header.as_slice(), &["seconds", &forwards, &seconds]].concat();
    markdown_table(&header, &rows.iter().map(Final::line).collect::<Vec<_>>())
}

/// A row of `curves.csv`.
#[derive(Serialize)]
struct Point<'a> {
    subject: String,
    method: String,
    queries: usize,
    lr: f64,
    seed: u64,
    step: usize,
    row_forwards: u64,
    total_queries: u64,
    seconds: f64,
    train_loss: Option<f64>,
    test_loss: Option<f64>,
    test_accuracy: f64,
    cosine: Option<f64>,
    failure: Option<&'a str>,
}

/// A row of `sites.csv`: a site at the end of a run, from the input to the output.
#[derive(Serialize)]
struct SitePoint {
    subject: String,
    method: String,
    queries: usize,
    seed: u64,
    site: usize,
    sites: usize,
    explained: f64,
    alpha: f64,
}

/// Writes the tables.
///
/// # Errors
/// If a file cannot be written.
pub fn write(cells: &[Cell], rows: &[Final], artifacts: &Artifacts) -> Result<()> {
    let runs = || cells.iter().flat_map(|cell| cell.records.iter().map(move |record| (cell, record)));
    let points: Vec<Point<'_>> = runs().flat_map(|(cell, record)| points(cell, record)).collect();
    let sites: Vec<SitePoint> = runs().flat_map(|(cell, record)| sites(cell, record)).collect();
    artifacts.write_csv("final.csv", rows)?;
    artifacts.write_csv("curves.csv", &points)?;
    artifacts.write_csv("sites.csv", &sites)
}

fn points<'a>(cell: &Cell, record: &'a Record) -> impl Iterator<Item = Point<'a>> {
    let (subject, method, queries, lr) = (cell.subject.to_string(), cell.method.to_string(), cell.queries, cell.lr);
    record.looks.iter().map(move |look| Point {
        subject: subject.clone(),
        method: method.clone(),
        queries,
        lr,
        seed: record.seed,
        step: look.step,
        row_forwards: look.row_forwards,
        total_queries: look.queries,
        seconds: look.seconds,
        train_loss: look.train_loss,
        test_loss: look.test_loss,
        test_accuracy: look.test_accuracy,
        cosine: look.cosine,
        failure: record.failure.as_deref(),
    })
}

fn sites(cell: &Cell, record: &Record) -> Vec<SitePoint> {
    let row = |(site, row): (usize, &SiteRow)| SitePoint {
        subject: cell.subject.to_string(),
        method: cell.method.to_string(),
        queries: cell.queries,
        seed: record.seed,
        site,
        sites: record.sites.len(),
        explained: row.explained,
        alpha: row.alpha,
    };
    record.sites.iter().enumerate().map(row).collect()
}

/// Returns the spread of values; `None` without any.
fn spread(values: impl Iterator<Item = f64>) -> Option<Spread> {
    let values: Vec<f64> = values.collect();
    (!values.is_empty()).then(|| Spread::of(&values))
}

fn mean(spread: Option<Spread>) -> Option<f64> {
    spread.map(|spread| spread.mean)
}

fn deviation(spread: Option<Spread>) -> Option<f64> {
    spread.map(|spread| spread.deviation)
}
