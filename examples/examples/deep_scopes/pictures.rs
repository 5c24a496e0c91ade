//! The pictures of a subject, with a panel for each number of queries.

use anyhow::Result;
use flops_examples::experiment::Spread;
use flops_examples::plot::{Panel, Series, panels};
use flops_examples::run::artifacts::Artifacts;

use crate::grid::Cell;
use crate::method::Method;
use crate::record::{Look, Record, SiteRow};
use crate::subject::Subject;

/// A point of a curve: x, y, and half the length of its error bar.
type Points = Vec<(f64, f64, f64)>;

/// Draws accuracy and cosine against row-forwards, and explained share and α by depth. What has no
/// points is not drawn.
///
/// # Errors
/// If a picture cannot be drawn or written.
pub fn draw(dataset: &str, subject: Subject, queries: &[usize], cells: &[Cell], artifacts: &Artifacts) -> Result<()> {
    let cells: Vec<&Cell> = cells.iter().filter(|cell| cell.subject == subject).collect();
    let write = |name: &str, title: &str, axes: (&str, &str), log: bool, points: &dyn Fn(&Cell) -> Points| {
        let panel = |&queries: &usize| {
            // backpropagation has no queries, and is compared with each number of them
            let here = cells.iter().filter(|cell| cell.queries == queries || cell.method == Method::Backprop);
            let series = here.map(|cell| Series { name: cell.method.to_string(), points: points(cell) });
            Panel {
                title: format!("{queries} queries per image and step"),
                axes: (axes.0.into(), axes.1.into()),
                log: (log, false),
                series: series.filter(|series| !series.points.is_empty()).collect(),
            }
        };
        let drawn: Vec<Panel> = queries.iter().map(panel).collect();
        if drawn.iter().all(|panel| panel.series.is_empty()) {
            return Ok(());
        }
        let svg = panels(&format!("{title}: {dataset}, {subject}"), &drawn)?;
        artifacts.write(&format!("{name}-{}.svg", subject.to_string().replace(':', "_")), svg.as_bytes())
    };
    let cost = "row-forwards, backward passes included";
    let accuracy = |cell: &Cell| curve(cell, |look| Some(100.0 * look.test_accuracy));
    write("accuracy", "Accuracy against cost", (cost, "test accuracy, %"), true, &accuracy)?;
    let cosine = |cell: &Cell| if cell.method == Method::Backprop { vec![] } else { curve(cell, |look| look.cosine) };
    write("cosine", "Cosine to the exact gradient", (cost, "cosine"), true, &cosine)?;
    let depth = "depth, from the input (0) to the output (1)";
    let explained = |cell: &Cell| by_depth(cell, |site| site.explained);
    write("explained", "Share that the prediction explains", (depth, "explained share"), false, &explained)?;
    // an unbiased estimate has α = 1 everywhere
    let alpha = |cell: &Cell| match cell.method {
        Method::Shrunk(_) => by_depth(cell, |site| site.alpha),
        _ => vec![],
    };
    write("alpha", "Weight of the residual", (depth, "α"), false, &alpha)
}

/// Returns a figure of the k-th looks, over the seeds, against their mean row-forwards.
fn curve(cell: &Cell, figure: impl Fn(&Look) -> Option<f64>) -> Points {
    let most = cell.trained().map(|record| record.looks.len()).max().unwrap_or(0);
    let point = |k: usize| {
        let looks: Vec<&Look> = cell.trained().filter_map(|record| record.looks.get(k)).collect();
        let values: Vec<f64> = looks.iter().filter_map(|look| figure(look)).collect();
        let rows: Vec<f64> = looks.iter().map(|look| look.row_forwards as f64).collect();
        let Spread { mean, deviation } = Spread::of(&values);
        (!values.is_empty()).then(|| (Spread::of(&rows).mean, mean, deviation))
    };
    // the logarithm of the first look, before training, has no place
    (1..most).filter_map(point).collect()
}

/// Returns a figure of the sites at the end, over the seeds.
fn by_depth(cell: &Cell, figure: fn(&SiteRow) -> f64) -> Points {
    let records: Vec<&Record> = cell.trained().filter(|record| !record.sites.is_empty()).collect();
    let sites = records.iter().map(|record| record.sites.len()).min().unwrap_or(0);
    let point = |site: usize| {
        let values: Vec<f64> = records.iter().map(|record| figure(&record.sites[site])).collect();
        let Spread { mean, deviation } = Spread::of(&values);
        ((site as f64 + 0.5) / sites as f64, mean, deviation)
    };
    (0..sites).map(point).collect()
}
