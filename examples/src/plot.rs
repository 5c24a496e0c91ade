//! Pictures of experiments: curves of several methods, and heat maps, as SVG.

use std::fmt::Display;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

const INK: RGBColor = RGBColor(60, 60, 60);
const GRID: RGBColor = RGBColor(226, 226, 226);
const FONT: &str = "sans-serif";
/// Colours that stay apart for readers who see few of them (Okabe and Ito).
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(120, 120, 120),
    RGBColor(0, 0, 0),
];

fn failed(error: impl Display) -> anyhow::Error {
    anyhow!("the picture cannot be drawn: {error}")
}

/// A named line; each point is (x, y, half the length of its error bar).
#[derive(Clone, Debug)]
pub struct Series {
    /// What the legend says.
    pub name: String,
    /// Its points.
    pub points: Vec<(f64, f64, f64)>,
}

impl Series {
    /// A line without error bars.
    pub fn new(name: impl Into<String>, points: impl IntoIterator<Item = (f64, f64)>) -> Self {
        Self { name: name.into(), points: points.into_iter().map(|(x, y)| (x, y, 0.0)).collect() }
    }
}

/// A diagram of lines.
#[derive(Clone, Debug)]
pub struct Panel {
    /// Its caption.
    pub title: String,
    /// What the axes are.
    pub axes: (String, String),
    /// Whether each is logarithmic.
    pub log: (bool, bool),
    /// Its lines.
    pub series: Vec<Series>,
}

/// Draws panels side by side under `title`; series of the same name have the same colour.
pub fn panels(title: &str, panels: &[Panel]) -> Result<String> {
    let size = (560 * panels.len().max(1) as u32, 480);
    let mut names: Vec<&str> = vec![];
    for series in panels.iter().flat_map(|p| &p.series) {
        if !names.contains(&series.name.as_str()) {
            names.push(&series.name);
        }
    }
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE).map_err(failed)?;
        let root = root.titled(title, (FONT, 20).into_font().color(&INK)).map_err(failed)?;
        let mut told: Vec<&str> = vec![];
        for (panel, area) in panels.iter().zip(root.split_evenly((1, panels.len().max(1)))) {
            // a legend once for the same lines
            let legend = panel.series.iter().any(|s| !told.contains(&s.name.as_str()));
            draw(panel, &area, &names, legend)?;
            told.extend(panel.series.iter().map(|s| s.name.as_str()));
        }
        root.present().map_err(failed)?;
    }
    Ok(svg)
}

fn draw(panel: &Panel, area: &DrawingArea<SVGBackend<'_>, Shift>, names: &[&str], legend: bool) -> Result<()> {
    // a logarithmic axis is a linear one of logarithms
    let place = |value: f64, log: bool| if log { value.max(1e-300).log10() } else { value };
    let usable = |&&(x, y, _): &&(f64, f64, f64)| {
        x.is_finite() && y.is_finite() && (!panel.log.0 || x > 0.0) && (!panel.log.1 || y > 0.0)
    };
    let points = || panel.series.iter().flat_map(|s| s.points.iter().filter(usable));
    let range = |values: Vec<f64>, pad: f64| {
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if low > high {
            return 0.0..1.0;
        }
        let margin = (pad * (high - low)).max(1e-6 * high.abs()).max(1e-9);
        low - margin..high + margin
    };
    let xs = range(points().map(|p| place(p.0, panel.log.0)).collect(), 0.04);
    let bars = |p: &(f64, f64, f64)| {
        let low = if panel.log.1 { (p.1 - p.2).max(0.3 * p.1) } else { p.1 - p.2 };
        [place(low, panel.log.1), place(p.1 + p.2, panel.log.1)]
    };
    let ys = range(points().flat_map(bars).collect(), 0.08);
    // room for the legend above the lines
    let lines = if legend { panel.series.len() as f64 } else { 0.0 };
    let ys = ys.start..ys.end + (ys.end - ys.start) * 0.065 * lines;
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, (FONT, 16).into_font().color(&INK))
        .margin(10)
        .margin_right(24)
        .x_label_area_size(46)
        .y_label_area_size(64)
        .build_cartesian_2d(xs, ys)
        .map_err(failed)?;
    let label = |value: f64, log: bool| short(if log { 10f64.powf(value) } else { value });
    chart
        .configure_mesh()
        .x_desc(&panel.axes.0)
        .y_desc(&panel.axes.1)
        .x_labels(6)
        .y_labels(6)
        .x_label_formatter(&|x| label(*x, panel.log.0))
        .y_label_formatter(&|y| label(*y, panel.log.1))
        .axis_style(INK)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .label_style((FONT, 13).into_font().color(&INK))
        .axis_desc_style((FONT, 14).into_font().color(&INK))
        .draw()
        .map_err(failed)?;
    for series in &panel.series {
        let index = names.iter().position(|name| *name == series.name).unwrap_or(0);
        let colour = COLOURS[index % COLOURS.len()];
        let shown: Vec<_> = series.points.iter().filter(usable).copied().collect();
        let at = |p: &(f64, f64, f64)| (place(p.0, panel.log.0), place(p.1, panel.log.1));
        chart
            .draw_series(LineSeries::new(shown.iter().map(at), colour.stroke_width(2)))
            .map_err(failed)?
            .label(&series.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2)));
        if shown.len() <= 32 {
            chart.draw_series(shown.iter().map(|p| Circle::new(at(p), 3, colour.filled()))).map_err(failed)?;
        }
        let bars = shown.iter().filter(|p| p.2 > 0.0).map(|p| {
            let [low, high] = bars(p);
            let x = place(p.0, panel.log.0);
            PathElement::new([(x, low), (x, high)], colour.mix(0.6).stroke_width(1))
        });
        chart.draw_series(bars).map_err(failed)?;
    }
    if !legend {
        return Ok(());
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .margin(8)
        .legend_area_size(26)
        .label_font((FONT, 13).into_font().color(&INK))
        .background_style(WHITE.mix(0.8))
        .border_style(GRID)
        .draw()
        .map_err(failed)
}

/// A number in few characters.
fn short(value: f64) -> String {
    let magnitude = value.abs();
    let trimmed = |v: f64, decimals: usize| {
        let text = format!("{v:.decimals$}");
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_string() } else { text }
    };
    match magnitude {
        0.0 => "0".into(),
        m if m >= 1e6 => format!("{} M", trimmed(value / 1e6, 1)),
        m if m >= 1e4 => format!("{} k", trimmed(value / 1e3, 1)),
        m if m >= 10.0 => trimmed(value, 0),
        m if m >= 1.0 => trimmed(value, 1),
        m if m >= 0.01 => trimmed(value, 3),
        _ => format!("{value:.0e}"),
    }
}

/// A table of numbers as colours.
#[derive(Clone, Debug)]
pub struct Heat {
    /// Its caption.
    pub title: String,
    /// Names of the columns, the axis first.
    pub columns: (String, Vec<String>),
    /// Names of the rows, the axis first.
    pub rows: (String, Vec<String>),
    /// Values by row; NaN is left white.
    pub values: Vec<Vec<f64>>,
    /// Decimals of the numbers written into the cells.
    pub decimals: usize,
}

/// Draws heat maps in a grid of `wide` columns under `title`, all on one scale.
pub fn heat_maps(title: &str, maps: &[Heat], wide: usize) -> Result<String> {
    let wide = wide.clamp(1, maps.len().max(1));
    let high = maps.len().div_ceil(wide).max(1);
    let size = (380 * wide as u32, 60 + 300 * high as u32);
    let values = || maps.iter().flat_map(|m| m.values.iter().flatten()).copied().filter(|v| v.is_finite());
    let (low, top) = (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE).map_err(failed)?;
        let root = root.titled(title, (FONT, 20).into_font().color(&INK)).map_err(failed)?;
        for (map, area) in maps.iter().zip(root.split_evenly((high, wide))) {
            let (across, down) = area.dim_in_pixel();
            let (left, head, right, foot) = (86, 34, 12, 48);
            let (columns, rows) = (map.columns.1.len().max(1), map.rows.1.len().max(1));
            let width = (across as i32 - left - right) / columns as i32;
            let height = (down as i32 - head - foot) / rows as i32;
            let text = |text: &str, at: (i32, i32), size: i32, colour: &RGBColor| {
                let style = TextStyle::from((FONT, size).into_font()).color(colour).pos(
                    plotters::style::text_anchor::Pos::new(
                        plotters::style::text_anchor::HPos::Center,
                        plotters::style::text_anchor::VPos::Center,
                    ),
                );
                area.draw_text(text, &style, at).map_err(failed)
            };
            text(&map.title, (left + width * columns as i32 / 2, 16), 15, &INK)?;
            text(&map.columns.0, (left + width * columns as i32 / 2, down as i32 - 12), 14, &INK)?;
            text(&map.rows.0, (30, head - 12), 14, &INK)?;
            for (c, name) in map.columns.1.iter().enumerate() {
                text(name, (left + width * c as i32 + width / 2, down as i32 - foot + 14), 13, &INK)?;
            }
            for (r, name) in map.rows.1.iter().enumerate() {
                let y = head + height * r as i32;
                text(name, (left / 2, y + height / 2), 13, &INK)?;
                for (c, &value) in map.values[r].iter().enumerate() {
                    if !value.is_finite() {
                        continue;
                    }
                    let share = if top > low { (value - low) / (top - low) } else { 0.5 };
                    let x = left + width * c as i32;
                    let cell = Rectangle::new([(x, y), (x + width - 2, y + height - 2)], colour(share).filled());
                    area.draw(&cell).map_err(failed)?;
                    let ink = if share > 0.55 { &INK } else { &WHITE };
                    let number = format!("{value:.*}", map.decimals);
                    text(&number, (x + width / 2 - 1, y + height / 2 - 1), 13, ink)?;
                }
            }
        }
        root.present().map_err(failed)?;
    }
    Ok(svg)
}

/// From dark blue to light yellow, through green: of rising lightness, so that it reads in grey too.
fn colour(share: f64) -> RGBColor {
    const STOPS: [(f64, f64, f64); 5] =
        [(68.0, 1.0, 84.0), (59.0, 82.0, 139.0), (33.0, 145.0, 140.0), (94.0, 201.0, 98.0), (253.0, 231.0, 37.0)];
    let at = share.clamp(0.0, 1.0) * (STOPS.len() - 1) as f64;
    let below = (at as usize).min(STOPS.len() - 2);
    let part = at - below as f64;
    let (a, b) = (STOPS[below], STOPS[below + 1]);
    let mix = |a: f64, b: f64| (a + part * (b - a)).round() as u8;
    RGBColor(mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_and_heat_maps_hold_their_words() {
        let series = |name: &str| Series {
            name: name.into(),
            points: vec![(1.0, 2.0, 0.1), (100.0, 0.5, 0.0), (7.0, f64::NAN, 0.0)],
        };
        let panel = Panel {
            title: "variance".into(),
            axes: ("queries".into(), "relative".into()),
            log: (true, true),
            series: vec![series("uniform"), series("neyman")],
        };
        let empty = Panel { series: vec![], ..panel.clone() };
        let svg = panels("a title", &[panel, empty]).unwrap();
        for text in ["a title", "variance", "queries", "relative", "uniform", "neyman"] {
            assert!(svg.contains(text), "{text} is not in the picture");
        }
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        let heat = Heat {
            title: "accuracy".into(),
            columns: ("lr".into(), vec!["0.1".into(), "0.2".into()]),
            rows: ("σ".into(), vec!["1".into()]),
            values: vec![vec![0.25, f64::NAN]],
            decimals: 2,
        };
        let svg = heat_maps("heat", &[heat.clone(), heat], 2).unwrap();
        assert!(svg.contains("0.25") && svg.contains("accuracy") && !svg.contains("NaN"));
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([0.0, 1.5e6, 20000.0, 64.0, 0.25, 0.0001].map(short), ["0", "1.5 M", "20 k", "64", "0.25", "1e-4"]);
    }
}
