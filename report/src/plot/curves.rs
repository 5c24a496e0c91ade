//! Panels of lines, with error bars and a legend.

use std::ops::Range;

use anyhow::Result;
use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::axis::{Axis, on_axis};
use super::style::{FONT, INK, failed};

const GRID: RGBColor = RGBColor(226, 226, 226);
/// Colours that remain distinct to colour-blind readers (Okabe and Ito).
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

/// A point: x, y, and half the length of its error bar.
type Point = (f64, f64, f64);
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Axis, Axis>>;

/// A named line.
#[derive(Clone, Debug)]
pub struct Series {
    /// The name in the legend.
    pub name: String,
    /// The points: x, y, and half the length of the error bar.
    pub points: Vec<Point>,
}

impl Series {
    /// Creates a line without error bars.
    pub fn new(name: impl Into<String>, points: impl IntoIterator<Item = (f64, f64)>) -> Self {
        Self { name: name.into(), points: points.into_iter().map(|(x, y)| (x, y, 0.0)).collect() }
    }
}

/// A diagram of lines.
#[derive(Clone, Debug)]
pub struct Panel {
    /// The caption.
    pub title: String,
    /// The labels of the x and y axes.
    pub axes: (String, String),
    /// Whether the x and y axes are logarithmic.
    pub log: (bool, bool),
    /// The lines.
    pub series: Vec<Series>,
}

impl Panel {
    /// Returns whether the axes can show a point.
    fn can_show(&self, &(x, y, _): &Point) -> bool {
        x.is_finite() && y.is_finite() && (!self.log.0 || x > 0.0) && (!self.log.1 || y > 0.0)
    }

    /// Returns the coordinates of a point on the axes.
    fn place(&self, point: &Point) -> (f64, f64) {
        (on_axis(point.0, self.log.0), on_axis(point.1, self.log.1))
    }

    /// Returns both ends of an error bar on the y axis.
    fn error_bar(&self, &(_, y, half): &Point) -> [f64; 2] {
        let low = if self.log.1 { (y - half).max(0.3 * y) } else { y - half };
        [on_axis(low, self.log.1), on_axis(y + half, self.log.1)]
    }

    /// Returns the ranges of both axes. An axis in percent of a whole ends at 0 and 100 %.
    fn ranges(&self) -> (Range<f64>, Range<f64>) {
        let points = || self.series.iter().flat_map(|s| s.points.iter().filter(|p| self.can_show(p)));
        let xs = padded_range(points().map(|p| self.place(p).0).collect(), 0.04);
        let ys = padded_range(points().flat_map(|p| self.error_bar(p)).collect(), 0.08);
        let share = self.axes.1.ends_with('%') && !self.log.1 && points().all(|p| (0.0..=100.0).contains(&p.1));
        (xs, if share { ys.start.max(0.0)..ys.end.min(100.0) } else { ys })
    }
}

/// Returns the range of `values`, wider at both ends by the share `pad`.
fn padded_range(values: Vec<f64>, pad: f64) -> Range<f64> {
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if low > high {
        return 0.0..1.0;
    }
    let margin = (pad * (high - low)).max(1e-6 * high.abs()).max(1e-9);
    low - margin..high + margin
}

/// Pixels of a panel without its legend, and of a legend beside it.
const WIDTH: u32 = 560;
const LEGEND: u32 = 160;
const HEIGHT: u32 = 480;

/// Draws panels side by side under `title`. Series of the same name have the same colour.
///
/// # Errors
/// If plotters cannot draw.
pub fn panels(title: &str, panels: &[Panel]) -> Result<String> {
    let mut names: Vec<&str> = vec![];
    // a panel needs no legend when an earlier one explains all its lines
    let mut widths = vec![];
    for panel in panels {
        let known = names.len();
        for series in &panel.series {
            if !names.contains(&series.name.as_str()) {
                names.push(&series.name);
            }
        }
        widths.push(WIDTH + if names.len() > known { LEGEND } else { 0 });
    }
    let mut svg = String::new();
    {
        let size = (widths.iter().sum::<u32>().max(WIDTH), HEIGHT);
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE).map_err(failed)?;
        let mut rest = root.titled(title, (FONT, 20).into_font().color(&INK)).map_err(failed)?;
        for (panel, width) in panels.iter().zip(widths) {
            let (area, others) = rest.split_horizontally(width);
            let (chart, legend) = area.split_horizontally(WIDTH);
            draw_panel(panel, &chart, &names)?;
            if width > WIDTH {
                draw_legend(panel, &legend, &names)?;
            }
            rest = others;
        }
        root.present().map_err(failed)?;
    }
    Ok(svg)
}

fn draw_panel(panel: &Panel, area: &Area<'_>, names: &[&str]) -> Result<()> {
    let (xs, ys) = panel.ranges();
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, (FONT, 16).into_font().color(&INK))
        .margin(10)
        .margin_right(24)
        .x_label_area_size(46)
        .y_label_area_size(64)
        .build_cartesian_2d(Axis::new(xs, panel.log.0), Axis::new(ys, panel.log.1))
        .map_err(failed)?;
    draw_axes(&mut chart, panel)?;
    panel.series.iter().try_for_each(|series| draw_series(&mut chart, panel, series, Line::of(&series.name, names)))
}

fn draw_axes(chart: &mut Chart<'_, '_>, panel: &Panel) -> Result<()> {
    chart
        .configure_mesh()
        .x_desc(&panel.axes.0)
        .y_desc(&panel.axes.1)
        .x_labels(6)
        .y_labels(6)
        .axis_style(INK)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .label_style((FONT, 13).into_font().color(&INK))
        .axis_desc_style((FONT, 14).into_font().color(&INK))
        .draw()
        .map_err(failed)
}

/// How a line looks.
#[derive(Clone, Copy)]
struct Line {
    colour: RGBColor,
    /// Where there are more lines than colours, the others are dashed.
    dashed: bool,
}

impl Line {
    /// Returns the look of the line of that name among all names.
    fn of(name: &str, names: &[&str]) -> Self {
        let index = names.iter().position(|other| *other == name).unwrap_or(0);
        Self { colour: COLOURS[index % COLOURS.len()], dashed: index >= COLOURS.len() }
    }

    fn style(self) -> ShapeStyle {
        self.colour.stroke_width(2)
    }
}

/// Draws a line, a dot for each point of a short series, and error bars.
fn draw_series(chart: &mut Chart<'_, '_>, panel: &Panel, series: &Series, line: Line) -> Result<()> {
    let colour = line.colour;
    let shown: Vec<Point> = series.points.iter().filter(|p| panel.can_show(p)).copied().collect();
    let path: Vec<(f64, f64)> = shown.iter().map(|p| panel.place(p)).collect();
    if line.dashed {
        chart.draw_series(DashedLineSeries::new(path, 6, 4, line.style())).map_err(failed)?;
    } else {
        chart.draw_series(LineSeries::new(path, line.style())).map_err(failed)?;
    }
    if shown.len() <= 32 {
        chart.draw_series(shown.iter().map(|p| Circle::new(panel.place(p), 3, colour.filled()))).map_err(failed)?;
    }
    let bars = shown.iter().filter(|p| p.2 > 0.0).map(|p| {
        let ([low, high], x) = (panel.error_bar(p), panel.place(p).0);
        PathElement::new([(x, low), (x, high)], colour.mix(0.6).stroke_width(1))
    });
    chart.draw_series(bars).map_err(failed)?;
    Ok(())
}

/// Draws the names of the lines, one below the other.
fn draw_legend(panel: &Panel, area: &Area<'_>, names: &[&str]) -> Result<()> {
    let font = (FONT, 13).into_font().color(&INK).pos(Pos::new(HPos::Left, VPos::Center));
    for (series, y) in panel.series.iter().zip((48..).step_by(20)) {
        let (line, ends) = (Line::of(&series.name, names), [(0, y), (20, y)]);
        if line.dashed {
            area.draw(&DashedPathElement::new(ends, 6, 4, line.style())).map_err(failed)?;
        } else {
            area.draw(&PathElement::new(ends, line.style())).map_err(failed)?;
        }
        area.draw(&Text::new(series.name.clone(), (28, y), font.clone())).map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_show_their_words_and_no_nan() {
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
    }

    /// Ten lines have eight colours; the last two are in dashes, which plotters draws one by one.
    #[test]
    fn lines_beyond_the_colours_are_dashed() {
        let lines = |count: usize| {
            let series = (0..count).map(|i| Series::new(format!("line {i}"), [(0.0, i as f64), (1.0, 2.0)]));
            let axes = ("x".into(), "y".into());
            panels("lines", &[Panel { title: "t".into(), axes, log: (false, false), series: series.collect() }])
                .unwrap()
        };
        let strokes = |svg: &str| svg.matches("<polyline").count();
        assert!(strokes(&lines(10)) - strokes(&lines(8)) > 10, "{}", lines(10));
    }

    #[test]
    fn an_axis_in_percent_of_a_whole_ends_at_100() {
        let ranges = |label: &str, top: f64| {
            let series = vec![Series { name: "s".into(), points: vec![(0.0, 1.0, 4.0), (1.0, top, 2.0)] }];
            Panel { title: "t".into(), axes: ("x".into(), label.into()), log: (false, false), series }.ranges().1
        };
        assert_eq!(ranges("accuracy, %", 99.0), 0.0..100.0);
        assert!(ranges("accuracy, %", 50.0).end < 60.0);
        // neither a share of a whole, nor in percent
        assert!(ranges("change, %", 120.0).end > 120.0 && ranges("loss", 99.0).start < 0.0);
    }

    /// The legend of the lines lies beside the panel, not on it.
    #[test]
    fn legends_widen_the_picture() {
        let panel = |name: &str| Panel {
            title: "t".into(),
            axes: ("x".into(), "y".into()),
            log: (false, false),
            series: vec![Series::new(name, [(0.0, 1.0), (1.0, 2.0)])],
        };
        let width = |panels: &[Panel]| {
            let svg = super::panels("t", panels).unwrap();
            let text = svg.split("width=\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap();
            text.parse::<u32>().unwrap()
        };
        assert_eq!(width(&[panel("a")]), WIDTH + LEGEND);
        assert_eq!(width(&[panel("a"), panel("a")]), 2 * WIDTH + LEGEND);
        assert_eq!(width(&[panel("a"), panel("b")]), 2 * (WIDTH + LEGEND));
    }
}
