//! The figures as tables, CSV files, a picture and a summary.

use anyhow::Result;
use flops_benches::Folder;
use flops_report::plot::{Panel, Series, panels};
use flops_report::print_table;
use serde::Serialize;
use serde_json::{Value, json};

use crate::cases::{self, Machine, Modelled, WORKERS};
use crate::measure::Figures;
use crate::model::{Link, Network, Sums};
use crate::probes::LogFigures;

/// What connects workers, as it was measured.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Links {
    /// The hub.
    pub hub: Option<LogFigures>,
    /// The NATS server.
    pub nats: Option<LogFigures>,
    /// Seconds of an exchange of nothing over MPI, and bytes a second of a large one.
    pub mpi: Option<(f64, f64)>,
}

/// All that was measured and modelled.
pub struct Report {
    /// The measurements in their order.
    pub figures: Vec<Figures>,
    /// Noise on one thread.
    pub machine: Machine,
    /// What connects workers.
    pub links: Links,
    /// The modelled networks.
    pub networks: Vec<(Link, Network)>,
    /// What the model says.
    pub modelled: Vec<Modelled>,
}

/// A row of scaling.csv.
#[derive(Serialize)]
struct Row<'a> {
    scope: &'a str,
    noise: &'a str,
    kept: bool,
    leaves: usize,
    engine: &'a str,
    workers: usize,
    sums: &'a str,
    trained: usize,
    milliseconds: f64,
    milliseconds_min: f64,
    milliseconds_max: f64,
    speedup: f64,
    speedup_min: f64,
    speedup_max: f64,
    milliseconds_busy: Option<f64>,
    bytes_sent: f64,
    bytes_received: f64,
    milliseconds_waited: f64,
    milliseconds_clean: f64,
    milliseconds_query: f64,
    milliseconds_update: f64,
    milliseconds_packing: f64,
    milliseconds_rest: f64,
    same_bits: Option<bool>,
}

/// A row of model.csv.
#[derive(Serialize)]
struct ModelRow<'a> {
    name: &'a str,
    noise: &'a str,
    link: Link,
    sums: Sums,
    measured: bool,
    workers: usize,
    speedup: f64,
    efficiency: f64,
}

/// Prints what was measured of a step.
pub fn print_figures(figures: &[Figures]) {
    let Some(Figures { steps, trained, .. }) = figures.first() else { return };
    println!("\nscope {}, noise on {}, {trained} values", steps.scope, steps.noise);
    let header = [
        "workers",
        "ms a step",
        "speed-up",
        "busy, ms",
        "sent, kB",
        "received, kB",
        "waited, ms",
        "packing",
        "clean",
        "query",
        "update",
        "rest",
        "same bits",
    ];
    print_table(&header, &figures.iter().map(cells).collect::<Vec<_>>());
}

/// What the noise of a modelled step falls on.
fn noise(modelled: &Modelled) -> &'static str {
    if modelled.work.cut.is_own() { "activations" } else { "weights" }
}

/// Milliseconds of the jobs of a phase.
fn jobs(figures: &Figures, phase: &str) -> f64 {
    figures.phases.get(phase).map_or(0.0, |phase| phase.jobs)
}

fn packing(figures: &Figures) -> f64 {
    figures.phases.values().map(|phase| phase.packing).sum()
}

impl Report {
    /// Prints what the model says.
    pub fn print(&self) {
        println!("\nspeed-up of the model, and measured on 2 workers");
        let rows: Vec<Vec<String>> = self.modelled.iter().map(|modelled| self.model_cells(modelled)).collect();
        let header =
            ["step", "noise", "images", "queries", "values", "link", "sums", "measured", "2", "8", "64", "1,024"];
        print_table(&header, &rows);
    }

    fn model_cells(&self, modelled: &Modelled) -> Vec<String> {
        let Modelled { work, link, sums, .. } = modelled;
        // over a log, that on the server that was measured last
        let found = self.figures.iter().rev().find(|figures| cases::same_as(figures, modelled));
        let found = found.map_or("-".into(), |figures| format!("{:.2}", figures.speedup[0]));
        let counts = [work.examples.to_string(), work.queries.to_string(), format!("{:.0}", work.trained)];
        let mut cells = vec![work.name.clone(), noise(modelled).into()];
        cells.extend(counts);
        cells.extend([text(link), text(sums), found]);
        let shown = WORKERS.into_iter().zip(modelled.speedup).filter(|(workers, _)| [2, 8, 64, 1024].contains(workers));
        cells.extend(
            shown.map(|(workers, speedup)| format!("{speedup:.2} ({:.0} %)", 100.0 * speedup / workers as f64)),
        );
        cells
    }

    /// Writes `scaling.csv`, `model.csv`, `scaling.svg` and `summary.json`.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(&self, folder: &Folder) -> Result<()> {
        let mut csv = csv::Writer::from_writer(vec![]);
        self.figures.iter().try_for_each(|figures| csv.serialize(row(figures)))?;
        folder.write("scaling.csv", &csv.into_inner()?)?;
        let mut csv = csv::Writer::from_writer(vec![]);
        for modelled in &self.modelled {
            let Modelled { work, sums, link, measured, speedup } = modelled;
            for (workers, speedup) in WORKERS.into_iter().zip(*speedup) {
                csv.serialize(ModelRow {
                    name: &work.name,
                    noise: noise(modelled),
                    link: *link,
                    sums: *sums,
                    measured: *measured,
                    workers,
                    speedup,
                    efficiency: speedup / workers as f64,
                })?;
            }
        }
        folder.write("model.csv", &csv.into_inner()?)?;
        folder.write("scaling.svg", self.picture()?.as_bytes())?;
        folder.write("summary.json", (serde_json::to_string_pretty(&self.summary())? + "\n").as_bytes())?;
        println!("\n{} holds summary.json, scaling.csv, model.csv, scaling.svg", folder);
        Ok(())
    }

    /// Returns all figures.
    pub fn summary(&self) -> Value {
        let network = |(link, network): &(Link, Network)| (text(link), json!(network));
        json!({
            "backend": flops_backend::NAME,
            "threads_of_a_worker": 1,
            "measured": self.figures,
            "noise_seconds_per_value": self.machine,
            "links": self.links,
            "networks": self.networks.iter().map(network).collect::<serde_json::Map<_, _>>(),
            "model_workers": WORKERS,
            "model": self.modelled,
        })
    }

    /// Draws the parallel efficiency of the model against the workers.
    ///
    /// # Errors
    /// If plotters cannot draw.
    pub fn picture(&self) -> Result<String> {
        let panel = |title: &str, weights: bool, link: Link, sums: Sums| {
            let is_shown = |m: &&Modelled| m.work.cut.is_own() != weights && m.link == link && m.sums == sums;
            let series = self.modelled.iter().filter(is_shown).map(|m| {
                let points = WORKERS.into_iter().zip(m.speedup);
                let share =
                    |(workers, speedup): (usize, f64)| ((workers as f64).log2(), 100.0 * speedup / workers as f64);
                Series::new(&m.work.name, points.map(share))
            });
            let axes = ("doublings of workers: 3 is 8, 6 is 64, 10 is 1,024".into(), "parallel efficiency, %".into());
            Panel { title: title.into(), axes, log: (false, false), series: series.collect() }
        };
        let all = [
            panel("weights, scalars, MPI", true, Link::Mpi, Sums::Scalars),
            panel("weights, gradients, MPI", true, Link::Mpi, Sums::Gradients),
            panel("weights, scalars, one server", true, Link::Log, Sums::Scalars),
            panel("activations, gradients, MPI", false, Link::Mpi, Sums::Gradients),
            panel("activations, gradients, one server", false, Link::Log, Sums::Gradients),
        ];
        let shown: Vec<Panel> = all.into_iter().filter(|panel| !panel.series.is_empty()).collect();
        panels("Workers of a step: the model, fed with what was measured", &shown)
    }
}

fn text(value: &impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(String::from)).unwrap_or_default()
}

fn row(figures: &Figures) -> Row<'_> {
    let [milliseconds, milliseconds_min, milliseconds_max] = figures.milliseconds;
    let [speedup, speedup_min, speedup_max] = figures.speedup;
    Row {
        scope: &figures.steps.scope,
        noise: figures.steps.noise.name(),
        kept: figures.steps.kept,
        leaves: figures.steps.leaves,
        engine: figures.engine.name(),
        workers: figures.workers,
        sums: figures.sums.name(),
        trained: figures.trained,
        milliseconds,
        milliseconds_min,
        milliseconds_max,
        speedup,
        speedup_min,
        speedup_max,
        milliseconds_busy: figures.busy,
        bytes_sent: figures.bytes.0,
        bytes_received: figures.bytes.1,
        milliseconds_waited: figures.waited,
        milliseconds_clean: jobs(figures, "clean"),
        milliseconds_query: jobs(figures, "query"),
        milliseconds_update: jobs(figures, "update"),
        milliseconds_packing: packing(figures),
        milliseconds_rest: figures.rest,
        same_bits: figures.same_bits,
    }
}

fn cells(figures: &Figures) -> Vec<String> {
    let Figures { engine, workers, sums, steps, .. } = figures;
    let name = match engine {
        crate::task::Engine::Single => format!("one process, {} leaves", steps.leaves),
        _ => format!("{workers} over {engine}, {sums}"),
    };
    let range = |[middle, low, high]: [f64; 3], decimals: usize| {
        format!("{middle:.decimals$} ({low:.decimals$} – {high:.decimals$})")
    };
    let one = |value: f64| format!("{value:.1}");
    vec![
        name,
        range(figures.milliseconds, 1),
        range(figures.speedup, 2),
        figures.busy.map_or("-".into(), one),
        one(figures.bytes.0 / 1e3),
        one(figures.bytes.1 / 1e3),
        one(figures.waited),
        one(packing(figures)),
        one(jobs(figures, "clean")),
        one(jobs(figures, "query")),
        one(jobs(figures, "update")),
        one(figures.rest),
        figures.same_bits.map_or("-".into(), |same| if same { "yes".into() } else { "NO".into() }),
    ]
}
