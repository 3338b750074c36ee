//! What all charts share: the page, text, the frame with its axes.

use std::io;

use plotters::{
    coord::Shift,
    drawing::DrawingAreaErrorKind,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use crate::{Error, Result, axis::Axis};

/// plotters places things on whole units, which shows as steps in a curve: draw on a finer grid than the page's pixels.
const UNITS_PER_PIXEL: u32 = 8;

pub(crate) const INK: RGBColor = RGBColor(34, 34, 34);
pub(crate) const FAINT_INK: RGBColor = RGBColor(95, 95, 95);
const AXIS: RGBColor = RGBColor(140, 140, 140);
pub(crate) const MESH: RGBColor = RGBColor(228, 228, 228);

/// Colours that stay apart for most colour-blind eyes (Okabe and Ito) and on white.
pub(crate) const PALETTE: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(70, 70, 70),
];

pub(crate) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
pub(crate) type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Axis, Axis>>;

impl From<DrawingAreaErrorKind<io::Error>> for Error {
    fn from(error: DrawingAreaErrorKind<io::Error>) -> Self {
        Self::Draw(error.to_string())
    }
}

/// A white page of that many pixels, as an SVG document.
pub(crate) fn page(
    (width, height): (u32, u32),
    paint: impl FnOnce(&Area<'_>) -> Result<()>,
) -> Result<String> {
    let (units_x, units_y) = (px(width), px(height));
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (units_x, units_y)).into_drawing_area();
        area.fill(&WHITE)?;
        paint(&area)?;
        area.present()?;
    }
    // The view box keeps the fine grid; the size is that of the page.
    let fine = format!("width=\"{units_x}\" height=\"{units_y}\"");
    Ok(svg.replacen(&fine, &format!("width=\"{width}\" height=\"{height}\""), 1))
}

/// Pixels in plotters' units.
pub(crate) const fn px(pixels: u32) -> u32 {
    pixels * UNITS_PER_PIXEL
}

/// A point on the page in plotters' units.
pub(crate) fn at(x: u32, y: u32) -> (i32, i32) {
    (px(x) as i32, px(y) as i32)
}

pub(crate) fn font(size: u32, colour: RGBColor) -> TextStyle<'static> {
    // The SVG backend divides by this number.
    ("sans-serif", f64::from(px(size)) * 1.24).into_font().color(&colour)
}

pub(crate) fn bold(size: u32) -> TextStyle<'static> {
    ("sans-serif", f64::from(px(size)) * 1.24, FontStyle::Bold).into_font().color(&INK)
}

/// Text with its left end, in the middle of its height, at a point in pixels.
pub(crate) fn write(
    area: &Area<'_>,
    text: &str,
    x: u32,
    y: u32,
    style: &TextStyle<'static>,
) -> Result<()> {
    let style = style.clone().pos(Pos::new(HPos::Left, VPos::Center));
    Ok(area.draw(&Text::new(text.to_owned(), at(x, y), style))?)
}

/// About how many pixels a text takes.
pub(crate) fn text_width(text: &str, size: u32) -> u32 {
    (text.chars().count() as f64 * f64::from(size) * 0.58).ceil() as u32
}

/// Text that XML can hold, cut to about so many pixels.
pub(crate) fn fit(text: &str, size: u32, width: u32) -> String {
    let allowed = |c: char| !c.is_control() && !matches!(c, '\u{fffe}' | '\u{ffff}');
    let text: String = text.chars().map(|c| if allowed(c) { c } else { ' ' }).collect();
    if text_width(&text, size) <= width {
        return text;
    }
    let count = (f64::from(width) / (f64::from(size) * 0.58)) as usize;
    text.chars().take(count.saturating_sub(1)).chain(['…']).collect()
}

/// Axes, mesh and labels in an area, `top` pixels below its upper edge.
pub(crate) fn frame<'a, 'b>(
    area: &'a Area<'b>,
    top: u32,
    (x, x_label): (&Axis, &str),
    (y, y_label): (&Axis, &str),
) -> Result<Chart<'a, 'b>> {
    let mut chart = ChartBuilder::on(area)
        .margin_top(px(top))
        .margin_right(px(24))
        .margin_bottom(px(10))
        .margin_left(px(10))
        .x_label_area_size(px(if x_label.is_empty() { 26 } else { 46 }))
        .y_label_area_size(px(if y_label.is_empty() { 56 } else { 74 }))
        .build_cartesian_2d(x.clone(), y.clone())?;
    let line = |colour: RGBColor| colour.stroke_width(px(1));
    chart
        .configure_mesh()
        .bold_line_style(line(MESH))
        .light_line_style(TRANSPARENT)
        .max_light_lines(0)
        .axis_style(line(AXIS))
        .set_all_tick_mark_size(px(4))
        .label_style(font(12, FAINT_INK))
        .axis_desc_style(font(13, INK))
        .x_desc(fit(x_label, 13, 400))
        .y_desc(fit(y_label, 13, 260))
        .draw()?;
    Ok(chart)
}
