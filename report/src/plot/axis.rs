//! An axis with round ticks.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::coord::types::RangedCoordf64;

/// An axis, linear or logarithmic. A logarithmic axis is a linear axis of logarithms.
#[derive(Clone)]
pub struct Axis {
    linear: RangedCoordf64,
    log: bool,
}

/// Maps a value onto an axis.
pub fn on_axis(value: f64, log: bool) -> f64 {
    if log { value.max(1e-300).log10() } else { value }
}

impl Axis {
    /// The axis of a range of what [`on_axis`] gives.
    pub fn new(range: Range<f64>, log: bool) -> Self {
        Self { linear: range.into(), log }
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        self.linear.map(value, limit)
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        let most = hint.max_num_points();
        if self.log { log_ticks(&self.linear.range(), most) } else { self.linear.key_points(hint) }
    }

    fn range(&self) -> Range<f64> {
        self.linear.range()
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        short(if self.log { 10f64.powf(*value) } else { *value })
    }
}

/// The logarithms of round values in a range of logarithms: the first of these that fit. They are 1, 2
/// and 5 times the powers of ten, 1 and 3 times them, the powers alone, and every second, third, … one.
/// A range within two such values has those that a linear axis would.
fn log_ticks(range: &Range<f64>, most: usize) -> Vec<f64> {
    let is_power = |end: f64| end.abs() < 400.0;
    if !is_power(range.start) || !is_power(range.end) {
        // beyond the powers of ten that a float has, or none
        return vec![];
    }
    let powers = range.start.floor() as i32..=range.end.ceil() as i32;
    let inside = |ticks: Vec<f64>| ticks.into_iter().filter(|tick| range.contains(tick)).collect::<Vec<f64>>();
    let of = |digits: &[f64], every: usize| {
        let powers = powers.clone().filter(|power| power.rem_euclid(every as i32) == 0);
        inside(powers.flat_map(|power| digits.iter().map(move |digit| f64::from(power) + digit.log10())).collect())
    };
    let fits = |ticks: &Vec<f64>| (2..=most.max(2)).contains(&ticks.len());
    let decades = (1..=powers.clone().count().max(1)).map(|every| of(&[1.0], every));
    let candidates = [of(&[1.0, 2.0, 5.0], 1), of(&[1.0, 3.0], 1)].into_iter().chain(decades);
    candidates.into_iter().find(fits).unwrap_or_else(|| {
        let (low, high) = (10f64.powf(range.start), 10f64.powf(range.end));
        let linear = RangedCoordf64::from(low..high).key_points(most);
        let mut ticks = inside(linear.into_iter().filter(|value| *value > 0.0).map(f64::log10).collect());
        // in a narrow range several have the same few characters
        ticks.dedup_by_key(|tick| short(10f64.powf(*tick)));
        ticks
    })
}

/// Writes a value in few characters.
pub fn short(value: f64) -> String {
    let trimmed = |v: f64, decimals: usize| {
        let text = format!("{v:.decimals$}");
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_string() } else { text }
    };
    match value.abs() {
        0.0 => "0".into(),
        m if m >= 1e6 => format!("{} M", trimmed(value / 1e6, 1)),
        m if m >= 1e4 => format!("{} k", trimmed(value / 1e3, 1)),
        m if m >= 10.0 => trimmed(value, 1),
        m if m >= 1.0 => trimmed(value, 2),
        m if m >= 0.01 => trimmed(value, 3),
        _ => format!("{value:.1e}").replace(".0e", "e"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_of_a_logarithmic_axis_are_round() {
        let ticks = |low: f64, high: f64| {
            let axis = Axis::new(on_axis(low, true)..on_axis(high, true), true);
            axis.key_points(6).iter().map(|tick| axis.format_ext(tick)).collect::<Vec<_>>()
        };
        assert_eq!(ticks(0.9, 60.0), ["1", "2", "5", "10", "20", "50"]);
        assert_eq!(ticks(80.0, 12_000.0), ["100", "300", "1000", "3000", "10 k"]);
        assert_eq!(ticks(0.9, 1.1e5), ["1", "10", "100", "1000", "10 k", "100 k"]);
        assert_eq!(ticks(1e-8, 1.0), ["1e-8", "1e-6", "1e-4", "0.01"]);
        // within a part of a decade
        assert_eq!(ticks(0.41, 0.49), ["0.42", "0.44", "0.46", "0.48"]);
        assert_eq!(ticks(0.0041, 0.0049), ["4.2e-3", "4.4e-3", "4.6e-3", "4.8e-3"]);
        assert_eq!(ticks(1.42, 1.59), ["1.45", "1.5", "1.55"]);
        assert_eq!(ticks(10.2, 10.9), ["10.2", "10.4", "10.6", "10.8"]);
        assert!(ticks(1.0, 1.0).len() < 7);
        for (low, high) in [(f64::NAN, 1.0), (0.0, f64::INFINITY), (f64::NEG_INFINITY, 0.0)] {
            assert_eq!(log_ticks(&(low..high), 6), []);
        }
    }

    #[test]
    fn ticks_of_a_linear_axis_are_those_of_plotters() {
        let axis = Axis::new(0.0..100.0, false);
        assert_eq!(
            axis.key_points(6).iter().map(|tick| axis.format_ext(tick)).collect::<Vec<_>>(),
            ["0", "20", "40", "60", "80", "100"]
        );
    }

    #[test]
    fn axis_labels_are_short() {
        assert_eq!([0.0, 1.5e6, 20000.0, 64.0, 0.25, 0.0001].map(short), ["0", "1.5 M", "20 k", "64", "0.25", "1e-4"]);
    }
}
