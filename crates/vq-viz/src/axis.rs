//! Ranges of axes and round numbers along them.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};

/// One axis: where it starts and ends, and its ticks. On a logarithmic axis all of this is in powers of ten.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Axis {
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) ticks: Vec<Tick>,
    log: bool,
}

/// A labelled place on an axis.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tick {
    pub(crate) at: f64,
    pub(crate) label: String,
}

/// About as many ticks as an axis gets.
const TICKS: f64 = 6.0;

impl Axis {
    /// An axis for what runs from the left to the right: it ends where the values end, and has no ticks between whole
    /// numbers where all values are whole.
    pub(crate) fn horizontal(values: impl Iterator<Item = f64> + Clone) -> Self {
        let whole = values.clone().filter(|v| usable(*v)).all(|v| v.fract() == 0.0);
        let (min, max) = range(values).unwrap_or((0.0, 1.0));
        let (min, max) =
            if flat(min, max) { around(min, if whole { 1.0 } else { 0.1 }) } else { (min, max) };
        Self::linear(min, max, if whole { 1.0 } else { 0.0 })
    }

    /// An axis with some room above and below the values.
    pub(crate) fn vertical(values: impl Iterator<Item = f64>) -> Self {
        let (min, max) = range(values).unwrap_or((0.0, 1.0));
        let (low, high) = if flat(min, max) {
            around(min, 0.1)
        } else {
            let room = 0.05 * (max - min);
            (min - room, max + room)
        };
        // No room below zero for what is never negative.
        Self::linear(if min >= 0.0 { low.max(0.0) } else { low }, high, 0.0)
    }

    /// The same, logarithmic. What is not positive has no place on it.
    pub(crate) fn logarithmic(values: impl Iterator<Item = f64>) -> Self {
        let (min, max) = range(values.filter(|v| *v > 0.0)).unwrap_or((0.1, 1.0));
        let (low, high) = (min.log10(), max.log10());
        let room = if flat(min, max) { 0.05 } else { 0.05 * (high - low) };
        let (low, high) = (low - room, high + room);
        let span = high - low;
        let ticks = if span < 1.0 {
            let linear = Self::linear(10f64.powf(low), 10f64.powf(high), 0.0);
            let ticks = linear.ticks.into_iter().filter(|tick| tick.at > 0.0);
            ticks.map(|tick| Tick { at: tick.at.log10(), ..tick }).collect()
        } else {
            let mantissas: &[f64] = if span < 3.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
            let stride = (span / TICKS).ceil() as i32;
            let first = (low.floor() as i32).div_euclid(stride) * stride;
            (first..=high.ceil() as i32)
                .step_by(stride as usize)
                .flat_map(|power| mantissas.iter().map(move |mantissa| (power, *mantissa)))
                .map(|(power, mantissa)| Tick {
                    at: f64::from(power) + mantissa.log10(),
                    label: power_label(power, mantissa),
                })
                .filter(|tick| (low..=high).contains(&tick.at))
                .collect()
        };
        Self { min: low, max: high, ticks, log: true }
    }

    /// An axis from `min` to `max`, which differ, with ticks at multiples of a round number not below `min_step`.
    pub(crate) fn linear(min: f64, max: f64, min_step: f64) -> Self {
        let step = round_step((max - min) / TICKS).max(min_step);
        let first = (min / step - 1e-6).ceil() as i64;
        let last = (max / step + 1e-6).floor() as i64;
        let ticks = (first..=last)
            .map(|i| Tick {
                at: i as f64 * step,
                label: label(i as f64 * step, step, min.abs().max(max.abs())),
            })
            .collect();
        Self { min, max, ticks, log: false }
    }

    /// A value's place on the axis; none for what it cannot show.
    pub(crate) fn place(&self, value: f64) -> Option<f64> {
        match (usable(value), self.log) {
            (true, false) => Some(value),
            (true, true) if value > 0.0 => Some(value.log10()),
            _ => None,
        }
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        let part = (value - self.min) / (self.max - self.min);
        from + (part * f64::from(to - from)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.iter().map(|tick| tick.at).collect()
    }

    fn range(&self) -> Range<f64> {
        self.min..self.max
    }
}

impl ValueFormatter<f64> for Axis {
    fn format(at: &f64) -> String {
        at.to_string()
    }

    fn format_ext(&self, at: &f64) -> String {
        let tick = self.ticks.iter().find(|tick| tick.at.total_cmp(at).is_eq());
        tick.map(|tick| tick.label.clone()).unwrap_or_default()
    }
}

/// Finite, and far enough from the largest double that differences stay finite.
fn usable(value: f64) -> bool {
    value.abs() <= 1e100
}

fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.filter(|v| usable(*v)).fold(None, |range, v| {
        let (min, max) = range.unwrap_or((v, v));
        Some((min.min(v), max.max(v)))
    })
}

/// Whether values are so close together that only rounding lies between them.
fn flat(min: f64, max: f64) -> bool {
    max - min <= 1e-9 * min.abs().max(max.abs())
}

fn around(value: f64, room: f64) -> (f64, f64) {
    let room = room * if value == 0.0 || room >= 1.0 { 1.0 } else { value.abs() };
    let room = room.max(1e-6 * value.abs());
    (value - room, value + room)
}

/// The smallest of 1, 2, 5 times a power of ten that is at least `step`.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    let mantissa = step / power;
    power * [1.0, 2.0, 5.0].into_iter().find(|m| mantissa <= m * (1.0 + 1e-9)).unwrap_or(10.0)
}

/// As many digits as the step needs.
fn label(value: f64, step: f64, largest: f64) -> String {
    if value.abs() < step * 0.5 {
        return "0".into();
    }
    let last_digit = (step.log10() + 1e-9).floor() as i32;
    if largest >= 1e6 || last_digit < -5 {
        let first_digit = (value.abs().log10() + 1e-9).floor() as i32;
        format!("{value:.*e}", (first_digit - last_digit).clamp(0, 15) as usize)
    } else {
        format!("{value:.*}", (-last_digit).max(0) as usize)
    }
}

fn power_label(power: i32, mantissa: f64) -> String {
    match power {
        0..=4 => format!("{}", mantissa * 10f64.powi(power)),
        -3..0 => format!("{:.*}", power.unsigned_abs() as usize, mantissa * 10f64.powi(power)),
        _ => format!("{mantissa}e{power}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<&str> {
        axis.ticks.iter().map(|tick| tick.label.as_str()).collect()
    }

    fn values(values: &[f64]) -> impl Iterator<Item = f64> + Clone {
        values.iter().copied()
    }

    #[test]
    fn ticks_are_round_numbers_inside_the_range() {
        assert_eq!(
            labels(&Axis::linear(0.0, 1.0, 0.0)),
            ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"].map(|l| if l == "0.0" { "0" } else { l })
        );
        assert_eq!(labels(&Axis::linear(-1.0, 1.0, 0.0)), ["-1.0", "-0.5", "0", "0.5", "1.0"]);
        assert_eq!(labels(&Axis::linear(0.0, 19_500.0, 1.0)), ["0", "5000", "10000", "15000"]);
        assert_eq!(labels(&Axis::linear(0.0, 2e6, 1.0)), ["0", "5e5", "1.0e6", "1.5e6", "2.0e6"]);
        assert_eq!(
            labels(&Axis::linear(0.0, 3e-7, 0.0)),
            ["0", "5e-8", "1.0e-7", "1.5e-7", "2.0e-7", "2.5e-7", "3.0e-7"]
        );
    }

    #[test]
    fn epochs_have_whole_ticks() {
        assert_eq!(labels(&Axis::horizontal(values(&[1.0, 2.0, 3.0]))), ["1", "2", "3"]);
        assert_eq!(labels(&Axis::horizontal(values(&[1.0]))), ["0", "1", "2"]);
        assert_eq!(labels(&Axis::horizontal(values(&[0.0, 0.5, 1.0]))).len(), 6);
    }

    #[test]
    fn what_cannot_be_shown_does_not_stretch_an_axis() {
        let axis = Axis::vertical(values(&[f64::NAN, 1.0, f64::INFINITY, 3.0, 1e300]));
        assert_eq!((axis.min, axis.max), (0.9, 3.1));
        assert_eq!(
            [1.5, f64::NAN, f64::NEG_INFINITY, 1e300].map(|v| axis.place(v)),
            [Some(1.5), None, None, None]
        );
        let axis = Axis::logarithmic(values(&[0.0, -5.0, 1.0, 100.0]));
        assert!((axis.min + 0.1).abs() < 1e-12 && (axis.max - 2.1).abs() < 1e-12, "{axis:?}");
        assert_eq!([0.0, -1.0, 10.0].map(|v| axis.place(v)), [None, None, Some(1.0)]);
    }

    #[test]
    fn every_range_has_room_and_a_few_ticks() {
        let cases: [&[f64]; 12] = [
            &[],
            &[0.0],
            &[5.0],
            &[-5.0],
            &[1e16, 1e16 + 2.0],
            &[1e-12],
            &[1e100, -1e100],
            &[0.25, 0.25],
            &[1.0, 1.0 + 1e-7],
            &[1e-30, 1e30],
            &[0.062_80, 0.062_82],
            &[0.9, 1.1],
        ];
        for case in cases {
            let axes = [
                Axis::horizontal(values(case)),
                Axis::vertical(values(case)),
                Axis::logarithmic(values(case)),
            ];
            for axis in axes {
                assert!(axis.max > axis.min, "{case:?}: {axis:?}");
                assert!((2..=16).contains(&axis.ticks.len()), "{case:?}: {axis:?}");
                let mut distinct = labels(&axis);
                distinct.dedup();
                assert_eq!(distinct.len(), axis.ticks.len(), "{case:?}: {axis:?}");
                let slack = 1e-5 * (axis.max - axis.min);
                for tick in &axis.ticks {
                    assert!(
                        tick.at >= axis.min - slack && tick.at <= axis.max + slack,
                        "{case:?}: {axis:?}"
                    );
                    assert_eq!(axis.format_ext(&tick.at), tick.label);
                }
            }
        }
    }

    #[test]
    fn logarithmic_ticks_follow_the_span() {
        assert_eq!(
            labels(&Axis::logarithmic(values(&[0.012, 0.6]))),
            ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5"]
        );
        assert_eq!(labels(&Axis::logarithmic(values(&[1e-6, 1.0]))), ["1e-6", "1e-4", "0.01", "1"]);
        assert_eq!(labels(&Axis::logarithmic(values(&[10.0, 25.0]))), ["10", "15", "20", "25"]);
    }
}
