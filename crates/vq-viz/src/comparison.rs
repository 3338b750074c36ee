//! Several models side by side.

use std::path::Path;

use image::RgbImage;
use plotters::style::RGBColor;

use crate::{
    Error, Result,
    axis::Axis,
    canvas::{FAINT_INK, INK, MESH, PALETTE},
    raster::{Font, Raster, text_width},
    save_png,
};

/// One of the models that are compared.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Compared {
    /// Its name.
    pub label: String,
    /// How good it is, and how far off that may be (a standard deviation); none where nothing is known yet.
    pub value: Option<(f64, Option<f64>)>,
    /// How much of how much it uses.
    pub share: Option<(f64, f64)>,
    /// Whether it is the one that the others are measured against: its value is a line through all rows.
    pub is_baseline: bool,
}

/// Draws a row for each model, in their order, and writes them to `path` as PNG, atomically: its value as a dot with a
/// bar of one deviation to either side, and its share as a bar. `titles` stand above the values and the shares.
///
/// # Errors
/// Nothing to compare; the file system's errors, as [`save_png`].
pub fn save_comparison(
    path: &Path,
    title: &str,
    titles: [&str; 2],
    rows: &[Compared],
) -> Result<()> {
    save_png(&comparison_chart(title, titles, rows)?, path)
}

/// What [`save_comparison`] writes, as an image.
pub fn comparison_chart(title: &str, titles: [&str; 2], rows: &[Compared]) -> Result<RgbImage> {
    if rows.is_empty() {
        return Err(Error::Argument("a comparison needs at least one model".into()));
    }
    let columns = Columns::of(titles, rows);
    let bottom = TOP + ROW * rows.len() as i32;
    let mut page = Raster::new(columns.width, bottom + 44)?;
    page.text(title, (MARGIN, 26), BOLD);
    page.text(titles[0], (columns.values, 64), PLAIN);
    page.text(titles[1], (columns.shares, 64), PLAIN);

    let ends = rows.iter().filter_map(|row| row.value).flat_map(|(mean, deviation)| {
        let deviation = deviation.unwrap_or(0.0);
        [mean - deviation, mean + deviation]
    });
    let axis = Axis::vertical(ends);
    let x = |value: f64| {
        let part = (value - axis.min) / (axis.max - axis.min);
        axis.place(value).map(|_| columns.values + (part * f64::from(VALUES)).round() as i32)
    };
    for tick in &axis.ticks {
        let Some(x) = x(tick.at) else { continue };
        page.rectangle((x, TOP), (1, bottom - TOP), MESH);
        page.text(&tick.label, (x - text_width(&tick.label) / 2, bottom + 20), FAINT);
    }
    page.rectangle((columns.values, bottom), (VALUES, 1), FAINT_INK);
    page.rectangle((columns.shares, TOP), (1, bottom - TOP), FAINT_INK);
    let baseline = rows.iter().find(|row| row.is_baseline).and_then(|row| row.value);
    if let Some(x) = baseline.and_then(|(mean, _)| x(mean)) {
        for y in (TOP..bottom).step_by(8) {
            page.rectangle((x, y), (2, 4), PALETTE[1]);
        }
    }
    for (index, row) in rows.iter().enumerate() {
        draw_row(&mut page, row, TOP + ROW * index as i32 + ROW / 2, &columns, &x);
    }
    Ok(page.into_image())
}

const MARGIN: i32 = 24;
/// Where the rows begin, and their height.
const TOP: i32 = 84;
const ROW: i32 = 40;
/// The widths of the axis and of a full share.
const VALUES: i32 = 460;
const SHARES: i32 = 200;
/// More of a name would leave no room for the figures.
const MOST_LABEL: usize = 28;

const PLAIN: Font = Font { is_bold: false, colour: INK };
const BOLD: Font = Font { is_bold: true, colour: INK };
const FAINT: Font = Font { is_bold: false, colour: FAINT_INK };

/// Where things stand, from the left.
struct Columns {
    values: i32,
    value_texts: i32,
    shares: i32,
    width: i32,
}

impl Columns {
    fn of([first, second]: [&str; 2], rows: &[Compared]) -> Self {
        let widest = |text: &dyn Fn(&Compared) -> String| {
            rows.iter().map(|row| text_width(&text(row))).max().unwrap_or(0)
        };
        let values = MARGIN + widest(&label) + MARGIN;
        let value_texts = values + VALUES.max(text_width(first)) + MARGIN;
        let shares = value_texts + widest(&value_text) + MARGIN;
        let share = (SHARES + 10 + widest(&share_text)).max(text_width(second));
        Self { values, value_texts, shares, width: shares + share + MARGIN }
    }
}

fn draw_row(
    page: &mut Raster,
    row: &Compared,
    y: i32,
    columns: &Columns,
    x: &dyn Fn(f64) -> Option<i32>,
) {
    let name = if row.is_baseline { BOLD } else { PLAIN };
    page.text(&label(row), (MARGIN, y), name);
    let colour = PALETTE[0];
    match row.value {
        Some((mean, deviation)) => {
            page.text(&value_text(row), (columns.value_texts, y), PLAIN);
            let ends = deviation.map(|deviation| (x(mean - deviation), x(mean + deviation)));
            if let Some((Some(from), Some(to))) = ends {
                page.rectangle((from, y - 1), (to - from + 1, 2), colour);
                for end in [from, to] {
                    page.rectangle((end - 1, y - 7), (2, 14), colour);
                }
            }
            if let Some(x) = x(mean) {
                page.disc((x, y), 5, colour);
            }
        }
        None => page.text("no figure", (columns.values + 10, y), FAINT),
    }
    if let Some((part, whole)) = row.share {
        let share = if whole > 0.0 { (part / whole).clamp(0.0, 1.0) } else { 0.0 };
        page.rectangle((columns.shares, y - 9), (SHARES, 18), FULL);
        let width = (share * f64::from(SHARES)).round() as i32;
        page.rectangle((columns.shares, y - 9), (width, 18), PALETTE[2]);
        page.text(&share_text(row), (columns.shares + SHARES + 10, y), PLAIN);
    }
}

/// The part of a share's bar that is not used.
const FULL: RGBColor = MESH;

fn label(row: &Compared) -> String {
    if row.label.chars().count() <= MOST_LABEL {
        return row.label.clone();
    }
    row.label.chars().take(MOST_LABEL - 2).chain("..".chars()).collect()
}

fn value_text(row: &Compared) -> String {
    // Two digits suit decibels; all digits of a huge number would push everything else off the page.
    let number = |value: f64| {
        if value.abs() < 1e6 { format!("{value:.2}") } else { format!("{value:.2e}") }
    };
    match row.value {
        Some((mean, Some(deviation))) => format!("{} ± {}", number(mean), number(deviation)),
        Some((mean, None)) => number(mean),
        None => String::new(),
    }
}

fn share_text(row: &Compared) -> String {
    let number = |value: f64| {
        if value.fract() == 0.0 { format!("{value}") } else { format!("{value:.1}") }
    };
    row.share
        .map_or_else(String::new, |(part, whole)| format!("{} of {}", number(part), number(whole)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(label: &str, value: Option<(f64, Option<f64>)>, share: Option<(f64, f64)>) -> Compared {
        Compared { label: label.into(), value, share, is_baseline: label == "vector" }
    }

    fn count(image: &RgbImage, colour: RGBColor) -> usize {
        image.pixels().filter(|pixel| pixel.0 == [colour.0, colour.1, colour.2]).count()
    }

    fn chart(rows: &[Compared]) -> RgbImage {
        comparison_chart("Title", ["PSNR, dB", "codes in use"], rows).unwrap()
    }

    #[test]
    fn a_share_is_a_part_of_its_bar() {
        let rows = [row("a", Some((20.0, None)), Some((128.0, 512.0)))];
        let image = chart(&rows);
        assert_eq!(count(&image, PALETTE[2]), 18 * SHARES as usize / 4);
        let none = chart(&[row("a", Some((20.0, None)), Some((0.0, 0.0)))]);
        assert_eq!(count(&none, PALETTE[2]), 0);
    }

    #[test]
    fn the_better_lies_further_to_the_right_and_the_deviation_is_drawn() {
        let middle = |image: &RgbImage, row: i32| {
            let y = (TOP + ROW * row + ROW / 2) as u32;
            let blue = [PALETTE[0].0, PALETTE[0].1, PALETTE[0].2];
            let columns: Vec<u32> =
                (0..image.width()).filter(|x| image.get_pixel(*x, y).0 == blue).collect();
            (columns[0], *columns.last().unwrap())
        };
        let image = chart(&[
            row("vector", Some((25.0, Some(0.5))), None),
            row("other", Some((23.0, None)), None),
        ]);
        let (better, worse) = (middle(&image, 0), middle(&image, 1));
        assert!(worse.1 < better.0, "{worse:?} {better:?}");
        // 23 to 25.5 and a twentieth of that to either side take the whole width: 1 dB is 167 pixels.
        assert!((better.1 - better.0).abs_diff(167) <= 3, "{better:?}");
        assert!(worse.1 - worse.0 <= 11, "{worse:?}");
        // The baseline's line goes through the other's row.
        assert!(count(&image, PALETTE[1]) > 60);
    }

    #[test]
    fn anything_can_be_drawn() {
        let image = chart(&[
            row("a very long name of a variant that does not fit", None, None),
            row("vector", Some((f64::NAN, Some(f64::NAN))), Some((1.5, 2.0))),
            row("語", Some((1e300, None)), None),
        ]);
        assert!(image.width() < 2000 && image.height() < 400);
        assert!(comparison_chart("", ["", ""], &[]).is_err());
    }

    #[test]
    fn the_file_is_the_image() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("compare.png");
        let rows = [row("vector", Some((25.0, Some(0.1))), Some((512.0, 512.0)))];
        save_comparison(&path, "Title", ["PSNR, dB", "codes in use"], &rows).unwrap();
        assert_eq!(image::open(&path).unwrap().into_rgb8(), chart(&rows));
    }
}
