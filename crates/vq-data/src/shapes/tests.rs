use super::*;

fn options(train_count: usize, memory_limit: usize) -> OpenOptions {
    OpenOptions { train_count, test_count: 20, memory_limit, seed: 5, ..OpenOptions::default() }
}

fn images(dataset: &dyn Dataset) -> Vec<Vec<u8>> {
    let mut image = vec![0; dataset.shape().pixels()];
    (0..dataset.len())
        .map(|index| {
            dataset.read(index, &mut image).expect("in range");
            image.clone()
        })
        .collect()
}

#[test]
fn an_image_depends_on_seed_and_index_alone() {
    assert_eq!(render(Style::Textured, 1, 17, [32, 32]), render(Style::Textured, 1, 17, [32, 32]));
    assert_ne!(render(Style::Textured, 1, 17, [32, 32]), render(Style::Textured, 2, 17, [32, 32]));
    assert_ne!(
        render(Style::Textured, 1, 17, [32, 32]).0,
        render(Style::Textured, 1, 27, [32, 32]).0
    );
    let short = open(Style::Textured, &options(30, 1 << 30)).expect("shapes");
    let long = open(Style::Textured, &options(60, 1 << 30)).expect("shapes");
    assert_eq!(images(short.train.as_ref())[..], images(long.train.as_ref())[..30]);
    assert_eq!(images(short.test.as_ref()), images(long.test.as_ref()));
}

#[test]
fn the_same_images_whether_they_are_held_or_drawn() {
    let held = open(Style::Textured, &options(40, 1 << 30)).expect("shapes");
    let drawn = open(Style::Textured, &options(40, 0)).expect("shapes");
    assert!(!held.train.is_costly() && drawn.train.is_costly());
    assert_eq!(images(held.train.as_ref()), images(drawn.train.as_ref()));
    for index in 0..20 {
        assert_eq!(held.test.label(index), drawn.test.label(index));
    }
}

#[test]
fn all_classes_are_there_and_no_two_images_alike() {
    let splits = open(Style::Textured, &options(500, 1 << 30)).expect("shapes");
    let mut counts = [0; 10];
    for index in 0..500 {
        counts[splits.train.label(index) as usize] += 1;
    }
    assert_eq!(counts, [50; 10]);
    let mut all = images(splits.train.as_ref());
    all.extend(images(splits.test.as_ref()));
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 520);
    let variance = crate::pixel_variance(splits.train.as_ref()).expect("not empty");
    assert!((0.03..0.09).contains(&variance), "{variance}");
}

#[test]
fn larger_images_show_the_same_scene() {
    for index in 0..30 {
        let (small, class) = render(Style::Textured, 3, index, [32, 32]);
        let (large, same_class) = render(Style::Textured, 3, index, [128, 128]);
        assert_eq!(class, same_class);
        // Averaged down to 32×32 again.
        let mut error = 0.0;
        for (i, &pixel) in small.iter().enumerate() {
            let (c, y, x) = (i / 1024, i / 32 % 32, i % 32);
            let mean = (0..16)
                .map(|j| large[(c * 128 + y * 4 + j / 4) * 128 + x * 4 + j % 4] as f32 / 16.0)
                .sum::<f32>();
            error += (mean - pixel as f32).abs() / small.len() as f32;
        }
        assert!(error < 3.0, "image {index} differs by {error} of 255 on average");
    }
}

#[test]
fn plain_shapes_have_two_colors_and_are_whole() {
    let splits = open(Style::Plain, &options(200, 1 << 30)).expect("shapes");
    for (index, image) in images(splits.train.as_ref()).iter().enumerate() {
        let color = |i: usize| [image[i], image[1024 + i], image[2048 + i]];
        let mut counts = std::collections::BTreeMap::new();
        (0..1024).for_each(|i| *counts.entry(color(i)).or_insert(0) += 1);
        let mut counts: Vec<_> = counts.into_iter().map(|(color, count)| (count, color)).collect();
        counts.sort_unstable();
        // The rest is where the two are mixed along the outline.
        let [.., (fewer, one), (more, other)] = counts[..] else { panic!("{index}: one color") };
        assert!(fewer + more > 750 && fewer > 60, "{index}: {fewer} + {more}");
        // A shape may reach into some of the corners.
        let corners = [0, 31, 31 * 32, 1023].map(color);
        let background = if corners.contains(&one) { one } else { other };
        let at_corners = corners.iter().filter(|&&corner| corner == background).count();
        assert!(at_corners >= 2, "{index}: {corners:?}");
    }
    let other = open(Style::Textured, &options(200, 1 << 30)).expect("shapes");
    assert_ne!(images(splits.train.as_ref()), images(other.train.as_ref()));
}

#[test]
fn any_size_can_be_drawn() {
    for (height, width) in [(1, 1), (8, 8), (7, 33), (48, 20)] {
        assert_eq!(render(Style::Textured, 0, 3, [height, width]).0.len(), 3 * height * width);
    }
}

#[test]
fn outlines_are_distances() {
    for class in 0..10 {
        let mut inside = 0;
        for i in 0..10_000 {
            let (x, y) = ((i % 100) as f32 / 40.0 - 1.25, (i / 100) as f32 / 40.0 - 1.25);
            let here = outline::distance(class, x, y);
            inside += u32::from(here < 0.0);
            // No steeper than 1, and nothing far beyond the unit circle.
            let there = outline::distance(class, x + 0.01, y);
            assert!((here - there).abs() < 0.0101, "class {class} at ({x}, {y})");
            assert!(here > 0.0 || x.hypot(y) < 1.15, "class {class} at ({x}, {y})");
        }
        assert!((700..5000).contains(&inside), "class {class} covers {inside} of 10000");
    }
}

/// A change here changes every figure that was measured on the set.
#[test]
fn the_set_does_not_change_between_versions() {
    let (pixels, class) = render(Style::Textured, 0, 4, [32, 32]);
    assert_eq!(class, 4);
    let sum: u32 = pixels.iter().map(|&p| u32::from(p)).sum();
    // Rounding may differ by the machine's sine and cosine.
    assert!(sum.abs_diff(GOLDEN_SUM) < 300, "{sum}");
}
const GOLDEN_SUM: u32 = 386_890;
