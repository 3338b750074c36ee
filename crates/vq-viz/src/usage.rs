//! How evenly a codebook is used.

use std::path::Path;

use image::{Rgb, RgbImage};
use plotters::prelude::*;

use crate::{
    Error, Result,
    axis::Axis,
    canvas::{self, FAINT_INK, INK, PALETTE, at, bold, fit, font, px, write},
    file::write_atomically,
};

/// What the counts of a codebook's codes come to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    /// How many codes there are, K.
    pub codebook_size: usize,
    /// How many of them occur at all.
    pub in_use: usize,
    /// How many codes were counted.
    pub total: u64,
    /// exp(−Σ pᵢ ln pᵢ): the size of an evenly used codebook with the same entropy; 0 where nothing was counted.
    pub perplexity: f64,
}

impl Usage {
    /// `counts[k]` says how often code k occurs.
    pub fn of(counts: &[u64]) -> Self {
        let total = counts.iter().fold(0u64, |sum, count| sum.saturating_add(*count));
        let entropy: f64 = counts
            .iter()
            .filter(|count| **count > 0)
            .map(|count| *count as f64 / total as f64)
            .map(|p| -p * p.ln())
            .sum();
        Self {
            codebook_size: counts.len(),
            in_use: counts.iter().filter(|count| **count > 0).count(),
            total,
            perplexity: if total == 0 { 0.0 } else { entropy.exp() },
        }
    }
}

/// Draws how often each code occurs, the commonest first, beside an even use, and writes it to `path` as SVG,
/// atomically. The caption says how many codes are in use and the perplexity.
///
/// # Errors
/// A codebook without codes; the file system's errors, as [`crate::save_png`].
pub fn save_codebook_usage(path: &Path, title: &str, counts: &[u64]) -> Result<()> {
    write_atomically(path, codebook_usage_svg(title, counts)?.as_bytes())
}

/// What [`save_codebook_usage`] writes, as a string.
pub fn codebook_usage_svg(title: &str, counts: &[u64]) -> Result<String> {
    require_codes(counts)?;
    let usage = Usage::of(counts);
    let mut sorted = counts.to_vec();
    sorted.sort_unstable_by(|a, b| b.cmp(a));
    let share =
        |count: u64| if usage.total == 0 { 0.0 } else { 100.0 * count as f64 / usage.total as f64 };
    let even = 100.0 / counts.len() as f64;
    let size = counts.len() as f64;
    let x = Axis::linear(0.0, size, 1.0);
    let y = Axis::linear(0.0, 1.08 * share(sorted[0]).max(even), 0.0);

    canvas::page((820, 440), |page| {
        write(page, &fit(title, 18, 780), 20, 28, &bold(18))?;
        write(page, &caption(&usage), 20, 54, &font(14, INK))?;
        let [bars, line] = [PALETTE[0], PALETTE[1]];
        page.draw(&Rectangle::new([at(20, 71), at(36, 83)], bars.filled()))?;
        write(page, "share of each code", 44, 77, &font(13, INK))?;
        page.draw(&PathElement::new(vec![at(200, 77), at(220, 77)], line.stroke_width(px(2))))?;
        write(page, "even use", 228, 77, &font(13, INK))?;

        let labels = ("codes, the commonest first", "share of all codes, %");
        let mut chart = canvas::frame(page, 96, (&x, labels.0), (&y, labels.1))?;
        if usage.total == 0 {
            let style = font(14, FAINT_INK);
            chart.draw_series([Text::new("no codes counted", (size / 2.0, y.max / 2.0), style)])?;
        }
        let outline = outline(&sorted).into_iter().map(|(rank, count)| (rank as f64, share(count)));
        chart.draw_series([Polygon::new(outline.collect::<Vec<_>>(), bars.filled())])?;
        let ends = vec![(0.0, even), (size, even)];
        chart.draw_series([PathElement::new(ends, line.stroke_width(px(2)))])?;
        Ok(())
    })
}

/// A codebook as a map of squares, `cell` pixels wide with a pixel between them, in the order of the codes, row by row:
/// dark to light for rare to common (logarithmic), grey for codes that never occur.
///
/// # Errors
/// A codebook without codes, `cell` = 0, a picture that would be too large.
pub fn codebook_heat_map(counts: &[u64], cell: u32) -> Result<RgbImage> {
    require_codes(counts)?;
    if cell == 0 {
        return Err(Error::Argument("the squares of a heat map need at least one pixel".into()));
    }
    let columns = columns(counts.len());
    let rows = counts.len().div_ceil(columns);
    let largest = counts.iter().copied().max().unwrap_or(0);
    let extent = |count: usize| (count as u64).saturating_mul(u64::from(cell) + 1) - 1;
    let (width, height) = (extent(columns), extent(rows));
    if width.saturating_mul(height) > 1 << 28 {
        return Err(Error::TooLarge { width, height });
    }
    Ok(RgbImage::from_fn(width as u32, height as u32, |x, y| {
        let stride = cell + 1;
        let inside = x % stride < cell && y % stride < cell;
        let code = (y / stride) as usize * columns + (x / stride) as usize;
        match counts.get(code) {
            Some(0) if inside => UNUSED,
            Some(count) if inside => heat((*count as f64).ln_1p() / (largest as f64).ln_1p()),
            _ => Rgb([255; 3]),
        }
    }))
}

const UNUSED: Rgb<u8> = Rgb([215; 3]);

fn require_codes(counts: &[u64]) -> Result<()> {
    if counts.is_empty() {
        return Err(Error::Argument("a codebook without codes has no picture".into()));
    }
    Ok(())
}

fn caption(usage: &Usage) -> String {
    let Usage { codebook_size, in_use, total, perplexity } = usage;
    format!(
        "{in_use} of {codebook_size} codes in use · perplexity {perplexity:.1} ({:.0} % of {codebook_size}) · {total} codes counted",
        100.0 * perplexity / *codebook_size as f64,
    )
}

/// The corners (rank, count) of the bars as one shape; bars of the same height are one.
fn outline(sorted: &[u64]) -> Vec<(usize, u64)> {
    let mut corners = vec![(0, 0)];
    let mut start = 0;
    for bars in sorted.chunk_by(|a, b| a == b) {
        let end = start + bars.len();
        corners.extend([(start, bars[0]), (end, bars[0])]);
        start = end;
    }
    corners.push((sorted.len(), 0));
    corners
}

/// As many columns as make full rows and a shape near a square, where there is such a number.
fn columns(count: usize) -> usize {
    let side = (count as f64).sqrt().ceil() as usize;
    (side..=2 * side).find(|columns| count.is_multiple_of(*columns)).unwrap_or(side)
}

/// The colour map viridis for 0 ≤ t ≤ 1.
fn heat(t: f64) -> Rgb<u8> {
    const STOPS: [[f64; 3]; 5] = [
        [68.0, 1.0, 84.0],
        [59.0, 82.0, 139.0],
        [33.0, 145.0, 140.0],
        [94.0, 201.0, 98.0],
        [253.0, 231.0, 37.0],
    ];
    let place = t.clamp(0.0, 1.0) * 4.0;
    let i = (place as usize).min(3);
    let part = place - i as f64;
    Rgb([0, 1, 2].map(|c| (STOPS[i][c] * (1.0 - part) + STOPS[i + 1][c] * part).round() as u8))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_svg::{attributes, check_xml};

    #[test]
    fn perplexity_is_the_exponential_of_the_entropy() {
        let even = Usage::of(&[7; 512]);
        assert!((even.perplexity - 512.0).abs() < 1e-9);
        assert_eq!((even.in_use, even.total), (512, 7 * 512));
        let one = Usage::of(&[0, 9, 0]);
        assert_eq!((one.perplexity, one.in_use, one.codebook_size), (1.0, 1, 3));
        // −(½ ln ½ + 2 · ¼ ln ¼) = 1.5 ln 2
        assert!((Usage::of(&[2, 1, 1, 0]).perplexity - 2f64.powf(1.5)).abs() < 1e-12);
        assert!(Usage::of(&[0, 0]).perplexity.abs() < 1e-300);
        assert_eq!(Usage::of(&[]).in_use, 0);
    }

    #[test]
    fn the_caption_says_what_is_in_use() {
        let svg = codebook_usage_svg("Codebook <0>", &[2, 0, 1, 1]).unwrap();
        check_xml(&svg);
        assert!(svg.contains("Codebook &lt;0&gt;"));
        assert!(svg.contains("3 of 4 codes in use · perplexity 2.8 (71 % of 4) · 4 codes counted"));
    }

    #[test]
    fn the_bars_fall_from_the_left_to_the_right() {
        let svg = codebook_usage_svg("", &[1, 5, 0, 3]).unwrap();
        let shapes = attributes(&svg, "polygon", "points");
        let points: Vec<Vec<i32>> = shapes[0]
            .split_whitespace()
            .map(|point| point.split(',').map(|n| n.parse().unwrap()).collect())
            .collect();
        // Up, three steps down with two corners each, the empty code, down.
        assert_eq!(points.len(), 10);
        assert!(points.windows(2).all(|pair| pair[0][0] <= pair[1][0]));
        let floor = points[0][1];
        let heights: Vec<_> =
            points[1..9].iter().step_by(2).map(|p| f64::from(floor - p[1])).collect();
        assert!((heights[1] / heights[0] - 0.6).abs() < 0.01, "{heights:?}");
        assert!((heights[2] / heights[0] - 0.2).abs() < 0.01, "{heights:?}");
        assert!(heights[3].abs() < 0.5);
    }

    #[test]
    fn large_single_and_uncounted_codebooks_are_drawn() {
        let large: Vec<u64> = (0..65_536).map(|k| 1_000_000 / (k + 1)).collect();
        let svg = codebook_usage_svg("", &large).unwrap();
        check_xml(&svg);
        assert!(svg.len() < 100_000, "{} bytes", svg.len());
        check_xml(&codebook_usage_svg("", &[3]).unwrap());
        let none = codebook_usage_svg("", &[0; 16]).unwrap();
        check_xml(&none);
        assert!(none.contains("no codes counted"));
        assert!(codebook_usage_svg("", &[]).is_err());
    }

    #[test]
    fn the_file_is_the_string() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("codebook.svg");
        save_codebook_usage(&path, "t", &[1, 2]).unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            codebook_usage_svg("t", &[1, 2]).unwrap()
        );
    }

    #[test]
    fn the_heat_map_has_a_square_for_each_code() {
        let mut counts = vec![0u64; 512];
        counts[0] = 1000;
        counts[33] = 1;
        let map = codebook_heat_map(&counts, 4).unwrap();
        assert_eq!(map.dimensions(), (32 * 5 - 1, 16 * 5 - 1));
        assert_eq!(map.get_pixel(0, 0).0, [253, 231, 37]);
        assert_eq!(map.get_pixel(4, 0).0, [255; 3]);
        assert_eq!(*map.get_pixel(5, 0), UNUSED);
        assert_eq!(*map.get_pixel(5, 5), heat(2f64.ln() / 1001f64.ln()));
        // A prime number of codes leaves places empty.
        let map = codebook_heat_map(&[1; 7], 1).unwrap();
        assert_eq!(map.dimensions(), (7 - 2, 5));
        assert_eq!(map.get_pixel(4, 4).0, [255; 3]);
        assert!(codebook_heat_map(&[], 4).is_err());
        assert!(codebook_heat_map(&[1], 0).is_err());
        assert!(codebook_heat_map(&[0; 4], 2).is_ok());
    }
}
