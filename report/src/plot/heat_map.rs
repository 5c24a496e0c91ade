//! Heat maps: tables of values as colours.

use anyhow::Result;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::style::{FONT, INK, failed};

/// Pixels around the cells of a map.
const LEFT: i32 = 86;
const TOP: i32 = 34;
const RIGHT: i32 = 12;
const BOTTOM: i32 = 48;

/// A table of values as colours.
#[derive(Clone, Debug)]
pub struct Heat {
    /// The caption.
    pub title: String,
    /// The label of the x axis, and the names of the columns.
    pub columns: (String, Vec<String>),
    /// The label of the y axis, and the names of the rows.
    pub rows: (String, Vec<String>),
    /// The values by row. NaN stays white.
    pub values: Vec<Vec<f64>>,
    /// The number of decimals in the cells.
    pub decimals: usize,
}

/// The smallest and the largest value of all maps: the ends of the colour scale.
#[derive(Clone, Copy)]
struct Scale {
    low: f64,
    high: f64,
}

impl Scale {
    fn of(maps: &[Heat]) -> Self {
        let values = || maps.iter().flat_map(|m| m.values.iter().flatten()).copied().filter(|v| v.is_finite());
        Self { low: values().fold(f64::INFINITY, f64::min), high: values().fold(f64::NEG_INFINITY, f64::max) }
    }

    /// Returns where a value lies, from 0 to 1.
    fn share(self, value: f64) -> f64 {
        if self.high > self.low { (value - self.low) / (self.high - self.low) } else { 0.5 }
    }
}

/// Draws maps under `title` in a grid of `wide` columns, all on one colour scale.
///
/// # Errors
/// If plotters cannot draw.
pub fn heat_maps(title: &str, maps: &[Heat], wide: usize) -> Result<String> {
    let wide = wide.clamp(1, maps.len().max(1));
    let high = maps.len().div_ceil(wide).max(1);
    let size = (380 * wide as u32, 60 + 300 * high as u32);
    let scale = Scale::of(maps);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE).map_err(failed)?;
        let root = root.titled(title, (FONT, 20).into_font().color(&INK)).map_err(failed)?;
        for (map, area) in maps.iter().zip(root.split_evenly((high, wide))) {
            draw_map(map, &area, scale)?;
        }
        root.present().map_err(failed)?;
    }
    Ok(svg)
}

fn draw_map(map: &Heat, area: &DrawingArea<SVGBackend<'_>, Shift>, scale: Scale) -> Result<()> {
    let (across, down) = area.dim_in_pixel();
    let (across, down) = (across as i32, down as i32);
    let (columns, rows) = (map.columns.1.len().max(1) as i32, map.rows.1.len().max(1) as i32);
    let (width, height) = ((across - LEFT - RIGHT) / columns, (down - TOP - BOTTOM) / rows);
    let text = |text: &str, at: (i32, i32), size: i32, colour: &RGBColor| {
        let style = TextStyle::from((FONT, size).into_font()).color(colour);
        area.draw_text(text, &style.pos(Pos::new(HPos::Center, VPos::Center)), at).map_err(failed)
    };
    text(&map.title, (LEFT + width * columns / 2, 16), 15, &INK)?;
    text(&map.columns.0, (LEFT + width * columns / 2, down - 12), 14, &INK)?;
    text(&map.rows.0, (30, TOP - 12), 14, &INK)?;
    for (c, name) in map.columns.1.iter().enumerate() {
        text(name, (LEFT + width * c as i32 + width / 2, down - BOTTOM + 14), 13, &INK)?;
    }
    for (r, name) in map.rows.1.iter().enumerate() {
        let y = TOP + height * r as i32;
        text(name, (LEFT / 2, y + height / 2), 13, &INK)?;
        for (c, &value) in map.values[r].iter().enumerate().filter(|(_, v)| v.is_finite()) {
            let share = scale.share(value);
            let x = LEFT + width * c as i32;
            let cell = Rectangle::new([(x, y), (x + width - 2, y + height - 2)], colour(share).filled());
            area.draw(&cell).map_err(failed)?;
            let ink = if share > 0.55 { &INK } else { &WHITE };
            text(&format!("{value:.*}", map.decimals), (x + width / 2 - 1, y + height / 2 - 1), 13, ink)?;
        }
    }
    Ok(())
}

/// Returns a colour from dark blue over green to light yellow. Its lightness rises with `share`, so
/// the maps can be read in grey too.
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
    fn heat_maps_show_their_words_and_no_nan() {
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
}
