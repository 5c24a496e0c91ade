//! The figures as a table, a CSV file, a picture and a summary.

use anyhow::Result;
use flops_benches::{Case, Folder, THREADS, spread};
use flops_core::Space;
use flops_report::plot::{Panel, Series, panels};
use flops_report::print_table;
use serde::Serialize;
use serde_json::{Value, json};

/// The name of a shrunk step at branches, whose memory is measured.
pub const SHRUNK: &str = "shrunk step";

/// One measurement. Fields that do not apply are empty, 0 or NaN.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    section: String,
    name: String,
    /// The text of the case; empty if this is not a step.
    case: String,
    scope: String,
    space: String,
    batch: usize,
    queries: usize,
    depth: usize,
    seconds: f64,
    seconds_min: f64,
    seconds_max: f64,
    /// Rows, noise values or multiply-adds per second.
    rate: f64,
    /// Seconds over the seconds of plain inference of as many rows.
    over_inference: f64,
    over_inference_min: f64,
    over_inference_max: f64,
    /// Peak memory in MiB of a process that does nothing else.
    pub peak_mib: f64,
}

impl Row {
    fn empty(section: &str, name: &str) -> Self {
        Self {
            section: section.into(),
            name: name.into(),
            case: String::new(),
            scope: String::new(),
            space: String::new(),
            batch: 0,
            queries: 0,
            depth: 0,
            seconds: f64::NAN,
            seconds_min: f64::NAN,
            seconds_max: f64::NAN,
            rate: f64::NAN,
            over_inference: f64::NAN,
            over_inference_min: f64::NAN,
            over_inference_max: f64::NAN,
            peak_mib: f64::NAN,
        }
    }

    fn with_case(mut self, case: &Case, depth: usize) -> Self {
        self.case = case.to_string();
        self.scope = case.scope.to_string();
        self.space = case.space.map_or("backprop".into(), |space| space.to_string());
        (self.batch, self.queries, self.depth) = (case.batch, case.queries, depth);
        self
    }

    /// Creates a row for work other than a step: so many rows or values in these seconds.
    pub fn plain(section: &str, name: &str, rows: usize, seconds: &[f64]) -> Self {
        let [seconds, seconds_min, seconds_max] = spread(seconds);
        Self { seconds, seconds_min, seconds_max, rate: rows as f64 / seconds, ..Self::empty(section, name) }
    }

    /// Creates a row for a step, from pairs of its seconds and those of plain inference.
    pub fn step(section: &str, name: &str, case: &Case, depth: usize, pairs: &[(f64, f64)]) -> Self {
        let seconds: Vec<f64> = pairs.iter().map(|pair| pair.0).collect();
        let [over_inference, over_inference_min, over_inference_max] =
            spread(&pairs.iter().map(|(took, reference)| took / reference).collect::<Vec<_>>());
        Self {
            over_inference,
            over_inference_min,
            over_inference_max,
            ..Self::plain(section, name, case.rows(), &seconds)
        }
        .with_case(case, depth)
    }

    /// Creates a row for the peak memory of a process.
    pub fn memory(section: &str, name: &str, case: Option<&Case>, depth: usize, peak_mib: f64) -> Self {
        let row = Self { depth, peak_mib, ..Self::empty(section, name) };
        match case {
            Some(case) => row.with_case(case, depth),
            None => row,
        }
    }

    fn cells(&self) -> Vec<String> {
        let number =
            |value: f64, decimals: usize| if value.is_nan() { "-".into() } else { format!("{value:.decimals$}") };
        let ratio = |value: f64| if value < 0.1 { number(value, 3) } else { number(value, 2) };
        let over = match self.over_inference.is_nan() {
            true => "-".into(),
            false => format!(
                "{} ({} – {})",
                ratio(self.over_inference),
                ratio(self.over_inference_min),
                ratio(self.over_inference_max)
            ),
        };
        let what = if self.case.is_empty() { self.name.clone() } else { format!("{}: {}", self.name, self.case) };
        let depth = if self.depth == 0 { "-".into() } else { self.depth.to_string() };
        let seconds = number(self.seconds, if self.seconds < 0.1 { 4 } else { 2 });
        vec![what, depth, seconds, number(self.rate, 0), over, number(self.peak_mib, 0)]
    }
}

/// All measurements.
pub struct Table {
    model: String,
    /// Multiply-adds of a forward pass of one image.
    work: f64,
    /// PyTorch's version, if it was measured.
    pub torch: Option<String>,
    /// The measurements in their order.
    pub rows: Vec<Row>,
}

impl Table {
    /// Creates an empty table.
    pub fn new(model: &str, work: f64) -> Self {
        Self { model: model.into(), work, torch: None, rows: vec![] }
    }

    /// Writes `table.csv` and `summary.json`, with `picture` also `cost.svg`.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(&self, folder: &Folder, picture: bool) -> Result<()> {
        let mut csv = csv::Writer::from_writer(vec![]);
        self.rows.iter().try_for_each(|row| csv.serialize(row))?;
        folder.write("table.csv", &csv.into_inner()?)?;
        if picture {
            folder.write("cost.svg", self.picture()?.as_bytes())?;
        }
        folder.write("summary.json", (serde_json::to_string_pretty(&self.summary())? + "\n").as_bytes())?;
        let picture = if picture { ", cost.svg" } else { "" };
        println!("\n{} holds summary.json, table.csv{picture}", folder);
        Ok(())
    }

    fn row(&self, section: &str, name: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.section == section && row.name == name)
    }

    fn rate(&self, name: &str) -> f64 {
        self.row("rates", name).map_or(f64::NAN, |row| row.rate)
    }

    /// Prints the table section by section, then the summary.
    pub fn print(&self) {
        let mut start = 0;
        while start < self.rows.len() {
            let section = &self.rows[start].section;
            let end = start + self.rows[start..].iter().take_while(|row| row.section == *section).count();
            println!("\n{section}");
            let cells: Vec<Vec<String>> = self.rows[start..end].iter().map(Row::cells).collect();
            let case = "scope space law sampling placement batch queries max_rows kept";
            print_table(&[case, "depth", "seconds", "per second", "over inference", "peak, MiB"], &cells);
            start = end;
        }
        println!();
        if let Value::Object(summary) = self.summary() {
            summary
                .iter()
                .filter(|(_, value)| value.is_number())
                .for_each(|(name, value)| println!("  {name:<40}{value:>12.3}"));
        }
    }

    /// Returns the peak memory of a full-scope step of that name in `space`, over that of inference
    /// with `rows` rows in a pass.
    fn memory_over_inference(&self, name: &str, space: Space, rows: usize) -> f64 {
        let of = |f: &dyn Fn(&Row) -> bool| {
            self.rows.iter().find(|row| row.section == "memory" && f(row)).map_or(f64::NAN, |row| row.peak_mib)
        };
        let (space, inference) = (space.to_string(), format!("inference, {rows} rows"));
        of(&|row| row.scope == "full" && row.space == space && row.name == name)
            / of(&|row| row.name.starts_with(&inference))
    }

    /// Returns the figures by which versions of the library are compared.
    pub fn summary(&self) -> Value {
        let over = |name: &str| self.row("rates", name).map_or(f64::NAN, |row| row.over_inference);
        let seconds = |name: &str| self.row("rates", name).map_or(f64::NAN, |row| row.seconds);
        let matmul = self.row("matmul", "multiply-adds").map_or(f64::NAN, |row| row.rate);
        let number = |value: f64| if value.is_finite() { json!((value * 1e4).round() / 1e4) } else { Value::Null };
        let full = self.rate("activation");
        let torch = self.rate("torch weights");
        json!({
            "model": self.model,
            "backend": flops_backend::NAME,
            "threads": THREADS,
            "torch": self.torch,
            "inference_rows_per_second": number(self.rate("inference")),
            "inference_share_of_matmul": number(self.rate("inference") * self.work / matmul),
            "row_queries_per_second_full": number(full),
            "row_queries_per_second_full_weights": number(self.rate("weights")),
            "row_queries_per_second_full_single": number(self.rate("single")),
            "step_over_inference_full": number(over("activation")),
            "step_over_inference_full_weights": number(over("weights")),
            "step_over_inference_full_single": number(over("single")),
            "prediction_over_none": number(seconds("single") / seconds("single_unpredicted")),
            "shrunk_over_no_prediction": number(seconds("branch_shrunk") / seconds("branch_unpredicted")),
            "step_over_inference_full_shrunk": number(over("branch_shrunk")),
            "rate_last3_over_full": number(self.rate("last3") / full),
            "rate_cls_tail_over_full": number(self.rate("cls_tail_kept") / full),
            "rate_cls_tail_over_full_nothing_kept": number(self.rate("cls_tail") / full),
            "memory_over_inference": number(self.memory_over_inference("step", Space::activation(), 32)),
            "memory_over_inference_weights": number(self.memory_over_inference("step", Space::weights(), 32)),
            "memory_over_inference_of_256_rows": number(self.memory_over_inference("step", Space::activation(), 256)),
            "memory_over_inference_of_256_rows_weights": number(self.memory_over_inference("step", Space::weights(), 256)),
            "memory_over_inference_shrunk": number(self.memory_over_inference(SHRUNK, Space::activation(), 32)),
            "memory_over_inference_of_256_rows_shrunk":
                number(self.memory_over_inference(SHRUNK, Space::activation(), 256)),
            "over_torch_inference": number(self.rate("inference") / self.rate("torch inference")),
            "over_torch_weights": number(self.rate("weights") / torch),
            "over_torch_activation": number(full / self.rate("torch activation")),
            "activation_over_torch_weights": number(full / torch),
        })
    }

    /// Draws seconds and peak memory against queries, batch and depth.
    pub fn picture(&self) -> Result<String> {
        let panel = |of: &str, title: &str, value: fn(&Row) -> f64, unit: &str| {
            let series = [Space::activation(), Space::weights()].map(|space| {
                let rows = self.rows.iter().filter(|row| row.section == of && row.space == space.to_string());
                let points = rows.map(|row| {
                    let x = match of {
                        "queries" => row.queries,
                        "batch" => row.batch,
                        _ => row.depth,
                    };
                    (x as f64, value(row))
                });
                let name = format!("{} noise", if !space.is_independent() { "weight" } else { "activation" });
                // Without queries, images or blocks a step takes no time.
                let origin = (unit == "seconds").then_some((0.0, 0.0));
                Series::new(name, origin.into_iter().chain(points))
            });
            Panel { title: title.into(), axes: (of.into(), unit.into()), log: (false, false), series: series.into() }
        };
        let seconds = |of: &str, title: &str| panel(of, title, |row| row.seconds, "seconds");
        let mut memory = panel("queries", "peak memory", |row| row.peak_mib, "MiB");
        let inference = self.rows.iter().filter(|row| row.section == "memory" && row.case.is_empty());
        let across = [0.0, 40.0];
        memory.series.extend(inference.map(|row| Series::new(&row.name, across.map(|x| (x, row.peak_mib)))));
        panels(
            "One full-scope step: cost is linear, memory flat",
            &[
                seconds("queries", "against queries per datum"),
                seconds("batch", "against the batch"),
                seconds("depth", "against depth"),
                memory,
            ],
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_picture_shows_every_line() {
        let mut table = Table::new("tiny", 1.0);
        for space in [Space::activation(), Space::weights()] {
            for (of, case, depth) in [5, 10, 40].into_iter().flat_map(|n| {
                let case = Case::new(flops_vit::Scope::Full, space);
                [
                    ("queries", Case { queries: n, ..case }, 6),
                    ("batch", Case { batch: n, ..case }, 6),
                    ("depth", case, n),
                ]
            }) {
                let mut row = Row::step(of, "step", &case, depth, &[(0.1 * depth as f64, 0.2)]);
                row.peak_mib = 40.0;
                table.rows.push(row);
            }
        }
        table.rows.push(Row::memory("memory", "inference, 32 rows in a pass", None, 6, 27.0));
        let picture = table.picture().unwrap();
        for text in ["activation noise", "weight noise", "inference, 32 rows in a pass", "peak memory", "against depth"]
        {
            assert!(picture.contains(text), "no '{text}' in the picture");
        }
    }
}
