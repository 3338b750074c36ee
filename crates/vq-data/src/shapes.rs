//! The built-in data set: one coloured shape per image, anti-aliased, on a textured background, or, much
//! easier, on a plain one.
//!
//! Image `index` of a seed is drawn from a random stream of its own, so the set needs no files, has
//! any length, and is the same everywhere. The scene does not depend on the size in pixels: a
//! larger image is the same picture, sharper.

mod export;
mod outline;
mod scene;
mod texture;

use std::sync::Arc;

pub use export::{FileFormat, MakeOptions, make_images};

use crate::dataset::check_read;
use crate::{Dataset, Error, ImageShape, InMemory, OpenOptions, Splits};

/// The classes, in the order of their labels.
pub const CLASSES: [&str; 10] = [
    "circle", "square", "triangle", "hexagon", "star", "ring", "cross", "heart", "crescent",
    "capsule",
];

/// What the images look like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Style {
    /// Patterns or noise behind a shape of any size, anywhere and turned by any angle, some with a border or a
    /// shadow.
    #[default]
    Textured,
    /// One colour on another: the shape large, near the centre and nearly upright. What a small generative
    /// model can learn within minutes.
    Plain,
}

/// Draws image `index` of the set of `seed`: its pixels, u8 `[3,height,width]`, and its class, an
/// index into [`CLASSES`]. Ten images in a row are of ten classes.
pub fn render(style: Style, seed: u64, index: u64, size: [usize; 2]) -> (Vec<u8>, u32) {
    let mut pixels = vec![0; 3 * size[0] * size[1]];
    let class = scene::draw(style, seed, index, size, &mut pixels);
    (pixels, class)
}

/// Both splits, in memory where they fit under the limit. The test split starts at index 2³², so it
/// shares no image with the train split and does not depend on its length.
pub(crate) fn open(style: Style, options: &OpenOptions) -> Result<Splits, Error> {
    let [height, width] = options.size;
    let shape = ImageShape { channels: 3, height, width };
    let count = options.train_count.saturating_add(options.test_count);
    let in_memory = count.saturating_mul(shape.pixels()) <= options.memory_limit;
    let make = |split: &'static str, first: u64, len: usize| {
        if len == 0 {
            return Err(Error::EmptySplit { split });
        }
        let name = match style {
            Style::Textured => "shapes",
            Style::Plain => "plain shapes",
        };
        let drawn = Drawn {
            name: format!("{name} {split}"),
            style,
            shape,
            seed: options.seed,
            first,
            len,
            class_names: CLASSES.map(str::to_owned).to_vec(),
        };
        let dataset: Arc<dyn Dataset> =
            if in_memory { Arc::new(InMemory::from_dataset(&drawn)?) } else { Arc::new(drawn) };
        Ok(dataset)
    };
    Ok(Splits {
        train: make("train", 0, options.train_count)?,
        test: make("test", TEST_START, options.test_count)?,
        notes: Vec::new(),
        broken: Vec::new(),
    })
}

const TEST_START: u64 = 1 << 32;

/// Images that are drawn each time that they are read.
struct Drawn {
    name: String,
    style: Style,
    shape: ImageShape,
    seed: u64,
    first: u64,
    len: usize,
    class_names: Vec<String>,
}

impl Dataset for Drawn {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> usize {
        self.len
    }

    fn shape(&self) -> ImageShape {
        self.shape
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }

    fn label(&self, index: usize) -> u32 {
        scene::class_of(self.first + index as u64)
    }

    fn read(&self, index: usize, out: &mut [u8]) -> Result<(), Error> {
        check_read(self, index, out)?;
        let ImageShape { height, width, .. } = self.shape;
        scene::draw(self.style, self.seed, self.first + index as u64, [height, width], out);
        Ok(())
    }

    fn is_costly(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests;
