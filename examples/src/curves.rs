//! The two curves of a run, accuracy and loss against what was spent, as an SVG.

use std::fmt::Display;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::history::{History, Row, Split};

const SIZE: (u32, u32) = (1080, 440);
const TRAIN: RGBColor = RGBColor(230, 145, 56);
const TEST: RGBColor = RGBColor(32, 96, 168);
const INK: RGBColor = RGBColor(60, 60, 60);
const GRID: RGBColor = RGBColor(226, 226, 226);
const FONT: &str = "sans-serif";

/// Draws the curves of `history` under `title`: against queries, or against steps where none were spent.
pub fn draw(history: &History, title: &str) -> Result<String> {
    let by_queries = history.queries() > 0;
    let axis = if by_queries { "queries" } else { "training steps" };
    let x = |row: &Row| if by_queries { row.queries as f64 } else { row.step as f64 };
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE).map_err(failed)?;
        let root = root.titled(title, (FONT, 20).into_font().color(&INK)).map_err(failed)?;
        let (left, right) = root.split_horizontally(SIZE.0 / 2);
        let panel = |name, corner, of: &dyn Fn(&Row) -> f64| Panel {
            name,
            axis,
            corner,
            train: smoothed(history, &x, of),
            test: history.of(Split::Test).map(|row| (x(row), of(row))).collect(),
        };
        panel("accuracy, %", SeriesLabelPosition::LowerRight, &|row| 100.0 * row.accuracy).draw(&left)?;
        panel("loss", SeriesLabelPosition::UpperRight, &|row| row.loss).draw(&right)?;
        root.present().map_err(failed)?;
    }
    Ok(svg)
}

fn failed(error: impl Display) -> anyhow::Error {
    anyhow!("the curves cannot be drawn: {error}")
}

/// The training steps in at most 40 stretches of at least 4, each as its mean at its end.
fn smoothed(history: &History, x: &impl Fn(&Row) -> f64, of: &dyn Fn(&Row) -> f64) -> Vec<(f64, f64)> {
    let rows: Vec<&Row> = history.of(Split::Train).collect();
    let stretches = (rows.len() / 4).min(40).max(rows.len().min(1));
    (0..stretches)
        .map(|i| &rows[i * rows.len() / stretches..(i + 1) * rows.len() / stretches])
        .map(|rows| (x(rows[rows.len() - 1]), rows.iter().map(|row| of(row)).sum::<f64>() / rows.len() as f64))
        .collect()
}

struct Panel<'a> {
    name: &'a str,
    axis: &'a str,
    corner: SeriesLabelPosition,
    train: Vec<(f64, f64)>,
    test: Vec<(f64, f64)>,
}

impl Panel<'_> {
    fn draw(&self, area: &DrawingArea<SVGBackend<'_>, Shift>) -> Result<()> {
        let points = || self.train.iter().chain(&self.test).filter(|(_, y)| y.is_finite());
        let right = points().fold(1.0, |m: f64, p| m.max(p.0));
        let top = points().fold(f64::MIN_POSITIVE, |m: f64, p| m.max(p.1));
        let bottom = points().fold(top, |m: f64, p| m.min(p.1));
        let margin = 0.06 * (top - bottom).max(0.05 * top);
        let mut chart = ChartBuilder::on(area)
            .caption(self.name, (FONT, 16).into_font().color(&INK))
            .margin(12)
            .margin_right(28)
            .x_label_area_size(46)
            .y_label_area_size(52)
            .build_cartesian_2d(0.0..right, (bottom - margin).max(0.0)..top + margin)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .x_desc(self.axis)
            .x_labels(6)
            .y_labels(6)
            .x_label_formatter(&|x| short(*x))
            .y_label_formatter(&|y| trimmed(*y, 2))
            .axis_style(INK)
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .label_style((FONT, 14).into_font().color(&INK))
            .axis_desc_style((FONT, 15).into_font().color(&INK))
            .draw()
            .map_err(failed)?;
        let line = |points: &[(f64, f64)], color: RGBColor| {
            let points: Vec<_> = points.iter().copied().filter(|(_, y)| y.is_finite()).collect();
            LineSeries::new(points, color.stroke_width(2))
        };
        let key = |color: RGBColor| move |(x, y)| PathElement::new([(x, y), (x + 22, y)], color.stroke_width(2));
        chart.draw_series(line(&self.train, TRAIN)).map_err(failed)?.label("train").legend(key(TRAIN));
        chart.draw_series(line(&self.test, TEST)).map_err(failed)?.label("test").legend(key(TEST));
        let dots = self.test.iter().filter(|(_, y)| y.is_finite()).map(|&p| Circle::new(p, 3, TEST.filled()));
        chart.draw_series(dots).map_err(failed)?;
        chart
            .configure_series_labels()
            .position(self.corner.clone())
            .margin(14)
            .legend_area_size(28)
            .label_font((FONT, 14).into_font().color(&INK))
            .background_style(WHITE.mix(0.85))
            .border_style(GRID)
            .draw()
            .map_err(failed)
    }
}

/// A count as a reader says it: 250 k, 1.5 M.
fn short(value: f64) -> String {
    match value {
        v if v >= 1e9 => format!("{} G", trimmed(v / 1e9, 2)),
        v if v >= 1e6 => format!("{} M", trimmed(v / 1e6, 2)),
        v if v >= 1e4 => format!("{} k", trimmed(v / 1e3, 1)),
        v => trimmed(v, 0),
    }
}

/// At most `digits` decimals, none that say nothing.
fn trimmed(value: f64, digits: usize) -> String {
    let text = format!("{value:.digits$}");
    if digits == 0 { text } else { text.trim_end_matches('0').trim_end_matches('.').to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!([0.0, 640.0, 9999.0, 50_000.0, 1_500_000.0].map(short), ["0", "640", "9999", "50 k", "1.5 M"]);
        assert_eq!([0.25, 2.0, 40.0].map(|v| trimmed(v, 2)), ["0.25", "2", "40"]);
    }

    #[test]
    fn a_history_becomes_two_panels() {
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
