use super::*;
use crate::test_svg::{attributes, check_xml};

fn colour(i: usize) -> String {
    let RGBColor(r, g, b) = PALETTE[i];
    format!("#{r:02X}{g:02X}{b:02X}")
}

/// The points of each line of a colour, without the legend's.
fn lines(svg: &str, i: usize) -> Vec<Vec<(i32, i32)>> {
    let strokes = attributes(svg, "polyline", "stroke");
    let points = attributes(svg, "polyline", "points");
    let of_colour = strokes.iter().zip(points).filter(|(stroke, _)| **stroke == colour(i));
    of_colour
        .skip(1)
        .map(|(_, points)| {
            let number = |n: &str| n.parse().unwrap();
            let pairs = points.split_whitespace().map(|p| p.split_once(',').unwrap());
            pairs.map(|(x, y)| (number(x), number(y))).collect()
        })
        .collect()
}

fn dots(svg: &str, i: usize) -> usize {
    attributes(svg, "circle", "fill").iter().filter(|fill| **fill == colour(i)).count()
}

fn one(series: Vec<Series>) -> Panel {
    Panel::new("Panel", series).axes("epoch", "loss")
}

fn draw(panel: Panel) -> String {
    let svg = curves_svg("Title", &[panel]).unwrap();
    check_xml(&svg);
    svg
}

#[test]
fn a_curve_goes_through_its_points() {
    let svg = draw(one(vec![Series::new("a", vec![(0.0, 0.0), (1.0, 10.0), (4.0, 5.0)])]));
    let lines = lines(&svg, 0);
    assert_eq!(lines.len(), 1);
    let [a, b, c] = lines[0][..] else { panic!("{lines:?}") };
    // A quarter of the way to the right, and half of the way down again (y grows downwards).
    assert!(((b.0 - a.0) * 4 - (c.0 - a.0)).abs() <= 4, "{lines:?}");
    assert!(((a.1 - b.1) - 2 * (a.1 - c.1)).abs() <= 4 && b.1 < a.1, "{lines:?}");
    assert_eq!(dots(&svg, 0), 3);
}

#[test]
fn a_logarithmic_axis_spaces_powers_evenly() {
    let series = Series::new("a", vec![(0.0, 0.01), (1.0, 0.1), (2.0, 1.0)]);
    let line = lines(&draw(one(vec![series]).log_y()), 0).remove(0);
    assert!((line[0].1 - line[1].1 - (line[1].1 - line[2].1)).abs() <= 2, "{line:?}");
}

#[test]
fn titles_labels_and_legend_are_there_and_escaped() {
    let series = vec![
        Series::new("recon & <loss>", vec![(1.0, 1.0), (2.0, 0.5)]),
        Series::new("total\u{0}\n", vec![(1.0, 2.0), (2.0, 1.5)]),
    ];
    let svg = draw(one(series));
    for text in ["Title", "Panel", "epoch", "loss", "recon &amp; &lt;loss&gt;", "total  "] {
        assert!(svg.contains(&format!("{text}\n</text>")), "{text}");
    }
    assert_eq!((lines(&svg, 0).len(), lines(&svg, 1).len()), (1, 1));
}

#[test]
fn a_gap_cuts_the_curve() {
    for gap in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let points = vec![
            (0.0, 1.0),
            (1.0, 2.0),
            (2.0, gap),
            (3.0, 3.0),
            (4.0, 4.0),
            (5.0, gap),
            (6.0, 1.5),
        ];
        let svg = draw(one(vec![Series::new("a", points)]));
        let lines = lines(&svg, 0);
        assert_eq!(lines.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2]);
        assert_eq!(dots(&svg, 0), 5);
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }
    let points = vec![(0.0, 1.0), (1.0, 0.5), (2.0, 0.0), (3.0, 0.1), (4.0, 0.2), (5.0, -1.0)];
    let lines = lines(&draw(one(vec![Series::new("a", points)]).log_y()), 0);
    assert_eq!(lines.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2]);
}

#[test]
fn nothing_one_point_and_equal_values_are_drawn() {
    for log_y in [false, true] {
        let panel =
            |points: Vec<(f64, f64)>| Panel { log_y, ..one(vec![Series::new("a", points)]) };
        for points in [vec![], vec![(1.0, f64::NAN)], vec![(f64::NAN, 1.0)]] {
            let svg = draw(panel(points));
            assert!(svg.contains("no data\n") && svg.contains("a (no data)"));
            assert!(lines(&svg, 0).is_empty());
        }
        let svg = draw(panel(vec![(3.0, 0.5)]));
        assert_eq!((lines(&svg, 0).len(), dots(&svg, 0)), (0, 1));
        assert!(!svg.contains("no data"));
        let line = lines(&draw(panel(vec![(1.0, 0.5), (2.0, 0.5), (3.0, 0.5)])), 0).remove(0);
        assert!(line.iter().all(|point| point.1 == line[0].1));
        let line = lines(&draw(panel(vec![(1.0, 0.2), (1.0, 0.5)])), 0).remove(0);
        assert_eq!(line[0].0, line[1].0);
        draw(panel(vec![(1e99, 1e99), (-1e99, 1e-99), (1e300, 1.0)]));
    }
    draw(one(vec![]));
    draw(Panel::default());
    assert!(curves_svg("t", &[]).is_err());
}

#[test]
fn long_curves_are_thinned_but_keep_their_peaks() {
    let wave = |i: i32| (f64::from(i), (f64::from(i) * 0.37).sin());
    let mut points: Vec<_> = (0..100_000).map(wave).collect();
    points[54_321].1 = 9.0;
    points[54_322].1 = -9.0;
    let (first, last) = (points[0], points[99_999]);
    let full = Series::new("a", points.clone());
    let svg = draw(one(vec![full]));
    assert!(svg.len() < 100_000, "{} bytes", svg.len());
    let axis = Axis::linear(0.0, 99_999.0, 1.0);
    let thinned = pieces(&points, &axis, &Axis::vertical([-9.0, 9.0].into_iter()), 820).remove(0);
    assert_eq!((thinned[0], thinned[thinned.len() - 1]), (first, last));
    assert!(thinned.contains(&(54_321.0, 9.0)) && thinned.contains(&(54_322.0, -9.0)));
    assert!(thinned.is_sorted_by(|a, b| a.0 < b.0));
}

#[test]
fn panels_make_rows_of_two() {
    let panel = || one(vec![Series::new("a", vec![(0.0, 0.0), (1.0, 1.0)])]);
    let size = |count: usize| {
        let svg = curves_svg("t", &vec![panel(); count]).unwrap();
        check_xml(&svg);
        assert_eq!(svg.matches("Panel\n").count(), count);
        let number = |name| attributes(&svg, "svg", name)[0].parse::<u32>().unwrap();
        (number("width"), number("height"))
    };
    assert_eq!([size(1), size(2), size(3)], [(820, 486), (1120, 396), (1120, 746)]);
}

#[test]
fn a_long_legend_wraps_and_more_series_than_colours_are_drawn() {
    let series: Vec<_> = (0..12)
        .map(|i| {
            Series::new(
                format!("a series with a long name {i}"),
                vec![(0.0, f64::from(i)), (1.0, 1.0)],
            )
        })
        .collect();
    let svg = draw(one(series));
    let xs = attributes(&svg, "text", "x");
    assert!(xs.iter().all(|x| x.parse::<u32>().unwrap() < px(820)));
    assert_eq!(svg.matches("a series with a long name").count(), 12);
}

#[test]
fn the_file_is_the_string_and_errors_name_the_path() {
    let folder = tempfile::tempdir().unwrap();
    let panels = [one(vec![Series::new("a", vec![(0.0, 1.0), (1.0, 2.0)])])];
    let path = folder.path().join("curves.svg");
    save_curves(&path, "t", &panels).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), curves_svg("t", &panels).unwrap());
    let missing = folder.path().join("missing/curves.svg");
    let message = save_curves(&missing, "t", &panels).unwrap_err().to_string();
    assert!(message.contains(&missing.display().to_string()), "{message}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}
