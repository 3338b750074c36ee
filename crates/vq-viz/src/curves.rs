//! Curves over steps or epochs.

use std::path::Path;

use plotters::prelude::*;

use crate::{
    Error, Result,
    axis::Axis,
    canvas::{
        self, Area, Chart, FAINT_INK, INK, PALETTE, at, bold, fit, font, px, text_width, write,
    },
    file::write_atomically,
};

/// A named curve.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Series {
    /// Its name in the legend.
    pub label: String,
    /// (x, y) in the order in which they are joined. A point that cannot be shown (NaN, infinite, not positive on a
    /// logarithmic axis) leaves a gap.
    pub points: Vec<(f64, f64)>,
}

impl Series {
    /// A curve of that name through those points.
    pub fn new(label: impl Into<String>, points: Vec<(f64, f64)>) -> Self {
        Self { label: label.into(), points }
    }
}

/// One chart: curves that share their axes.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Panel {
    /// What it shows, above it.
    pub title: String,
    /// What runs from the left to the right; may be empty.
    pub x_label: String,
    /// What runs upwards; may be empty.
    pub y_label: String,
    /// Whether y is on a logarithmic scale.
    pub log_y: bool,
    /// The curves; the first lies lowest.
    pub series: Vec<Series>,
}

impl Panel {
    /// A chart with linear axes without labels.
    pub fn new(title: impl Into<String>, series: Vec<Series>) -> Self {
        Self { title: title.into(), series, ..Self::default() }
    }

    /// The same with labels at its axes.
    #[must_use]
    pub fn axes(self, x_label: impl Into<String>, y_label: impl Into<String>) -> Self {
        Self { x_label: x_label.into(), y_label: y_label.into(), ..self }
    }

    /// The same with a logarithmic y axis.
    #[must_use]
    pub fn log_y(self) -> Self {
        Self { log_y: true, ..self }
    }
}

/// Draws the panels, two in a row (one alone takes the whole width), and writes them to `path` as SVG, atomically.
///
/// Panels without data are drawn empty and say so. Curves with more points than the picture has columns are thinned to
/// their first, smallest, largest and last value in each column, which looks the same.
///
/// # Errors
/// No panel at all; the file system's errors, as [`crate::save_png`].
pub fn save_curves(path: &Path, title: &str, panels: &[Panel]) -> Result<()> {
    write_atomically(path, curves_svg(title, panels)?.as_bytes())
}

/// What [`save_curves`] writes, as a string.
pub fn curves_svg(title: &str, panels: &[Panel]) -> Result<String> {
    let (columns, width, height) = match panels.len() {
        0 => return Err(Error::Argument("a picture of curves needs at least one panel".into())),
        1 => (1, 820, 440),
        _ => (2, 560, 350),
    };
    let rows = panels.len().div_ceil(columns) as u32;
    let header = if title.is_empty() { 6 } else { 46 };
    let size = (columns as u32 * width, header + rows * height);
    canvas::page(size, |page| {
        write(page, &fit(title, 18, size.0 - 40), 20, 28, &bold(18))?;
        let (_, body) = page.split_vertically(px(header));
        for (area, panel) in body.split_evenly((rows as usize, columns)).iter().zip(panels) {
            draw_panel(area, panel, width)?;
        }
        Ok(())
    })
}

/// The width in pixels of a legend's line and the gap after it.
const KEY: u32 = 28;

fn draw_panel(area: &Area<'_>, panel: &Panel, width: u32) -> Result<()> {
    let points = || panel.series.iter().flat_map(|series| &series.points);
    let ys = points().filter(|(x, _)| x.is_finite()).map(|(_, y)| *y);
    let y = if panel.log_y { Axis::logarithmic(ys) } else { Axis::vertical(ys) };
    let x =
        Axis::horizontal(points().filter(|(_, value)| y.place(*value).is_some()).map(|(x, _)| *x));
    let curves: Vec<_> =
        panel.series.iter().map(|series| pieces(&series.points, &x, &y, width as usize)).collect();

    write(area, &fit(&panel.title, 15, width - 40), 20, 14, &bold(15))?;
    let labels: Vec<_> = panel
        .series
        .iter()
        .zip(&curves)
        .map(|(series, curve)| {
            let note = if curve.is_empty() { " (no data)" } else { "" };
            fit(&format!("{}{note}", series.label), 13, width - 60 - KEY)
        })
        .collect();
    let top = draw_legend(area, &labels, width)?;

    let mut chart = canvas::frame(area, top, (&x, &panel.x_label), (&y, &panel.y_label))?;
    for (i, curve) in curves.iter().enumerate() {
        draw_curve(&mut chart, curve, PALETTE[i % PALETTE.len()])?;
    }
    if curves.iter().all(Vec::is_empty) {
        let middle = (f64::midpoint(x.min, x.max), f64::midpoint(y.min, y.max));
        chart.draw_series([Text::new("no data", middle, font(14, FAINT_INK))])?;
    }
    Ok(())
}

/// The legend below the title, in as many lines as it needs; returns where the chart may begin.
fn draw_legend(area: &Area<'_>, labels: &[String], width: u32) -> Result<u32> {
    let (mut x, mut y) = (20, 38);
    if labels.iter().all(String::is_empty) {
        return Ok(y - 4);
    }
    for (i, label) in labels.iter().enumerate() {
        let needed = KEY + text_width(label, 13) + 18;
        if x > 20 && x + needed > width - 10 {
            (x, y) = (20, y + 20);
        }
        let style = PALETTE[i % PALETTE.len()].stroke_width(px(3));
        area.draw(&PathElement::new(vec![at(x, y), at(x + KEY - 8, y)], style))?;
        write(area, label, x + KEY, y, &font(13, INK))?;
        x += needed;
    }
    Ok(y + 16)
}

fn draw_curve(
    chart: &mut Chart<'_, '_>,
    curve: &[Vec<(f64, f64)>],
    colour: RGBColor,
) -> Result<()> {
    let count: usize = curve.iter().map(Vec::len).sum();
    // A thick line would make a band of a long, noisy curve.
    let line = colour.stroke_width(px(if count > 300 { 1 } else { 2 }));
    let lines = curve.iter().filter(|piece| piece.len() > 1);
    chart.draw_series(lines.map(|piece| PathElement::new(piece.clone(), line)))?;
    // A point alone has no line to show it; a few points are shown as what they are.
    let few = count <= 60;
    let dots = curve.iter().filter(|piece| few || piece.len() == 1).flatten();
    chart.draw_series(dots.map(|point| Circle::new(*point, px(3), colour.filled())))?;
    Ok(())
}

/// The curve on its axes, cut at its gaps and thinned to what `columns` columns of pixels can show.
fn pieces(points: &[(f64, f64)], x: &Axis, y: &Axis, columns: usize) -> Vec<Vec<(f64, f64)>> {
    let place = |&(a, b): &(f64, f64)| Some((x.place(a)?, y.place(b)?));
    let placed: Vec<_> = points.iter().map(place).collect();
    let runs = placed.split(Option::is_none).filter(|run| !run.is_empty());
    let scale = columns as f64 / (x.max - x.min);
    runs.map(|run| thin(run.iter().copied().flatten(), |at| ((at - x.min) * scale) as usize))
        .collect()
}

/// Of each run of points in one column: the first, the lowest, the highest and the last, in their order.
fn thin(
    points: impl Iterator<Item = (f64, f64)>,
    column: impl Fn(f64) -> usize,
) -> Vec<(f64, f64)> {
    let points: Vec<_> = points.collect();
    let mut kept = Vec::new();
    for run in points.chunk_by(|a, b| column(a.0) == column(b.0)) {
        let by_y = |a: &usize, b: &usize| run[*a].1.total_cmp(&run[*b].1);
        let lowest = (0..run.len()).min_by(by_y).unwrap_or(0);
        let highest = (0..run.len()).max_by(by_y).unwrap_or(0);
        let mut indices = [0, lowest, highest, run.len() - 1];
        indices.sort_unstable();
        let mut previous = None;
        for i in indices {
            if previous.replace(i) != Some(i) {
                kept.push(run[i]);
            }
        }
    }
    kept
}

#[cfg(test)]
#[path = "curves_tests.rs"]
mod tests;
