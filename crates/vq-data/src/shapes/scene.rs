//! One image: a background, a shadow, a shape with its fill and its border.

use std::f32::consts::TAU;

use super::outline::distance;
use super::texture::{Color, Texture, contrast, mix, random_color};
use super::{CLASSES, Style};
use crate::random::{Purpose, Stream};

/// The class of image `index`.
pub(super) fn class_of(index: u64) -> u32 {
    (index % CLASSES.len() as u64) as u32
}

/// Draws into `out`, u8 `[3,height,width]`, and returns the class.
pub(super) fn draw(
    style: Style,
    seed: u64,
    index: u64,
    [height, width]: [usize; 2],
    out: &mut [u8],
) -> u32 {
    let scene = match style {
        Style::Textured => Scene::textured(seed, index),
        Style::Plain => Scene::plain(seed, index),
    };
    let pixels = height.min(width).max(1) as f32;
    let plane = height * width;
    for i in 0..plane {
        let (row, column) = (i / width, i % width);
        let x = (column as f32 + 0.5 - width as f32 / 2.0) / pixels;
        let y = (row as f32 + 0.5 - height as f32 / 2.0) / pixels;
        for (c, value) in scene.at(x, y, pixels).into_iter().enumerate() {
            out[c * plane + i] = (value * 255.0 + 0.5) as u8;
        }
    }
    scene.class
}

struct Scene {
    class: u32,
    background: Texture,
    fill: Texture,
    center: [f32; 2],
    radius: f32,
    /// Cosine and sine of the rotation.
    rotation: [f32; 2],
    border: Option<(f32, Color)>,
    /// Offset and strength.
    shadow: Option<([f32; 2], f32)>,
}

impl Scene {
    fn textured(seed: u64, index: u64) -> Self {
        let stream = &mut Stream::new(seed, Purpose::Shape, index);
        let background = Texture::background(stream);
        let color = contrasting(stream, background.colors);
        let fill = Texture::fill(stream, color);
        let radius = stream.range(0.24, 0.42);
        let room = 0.5 - radius + 0.03;
        let center = [stream.range(-room, room), stream.range(-room, room)];
        let angle = stream.range(0.0, TAU);
        let border = stream.chance(0.3).then(|| {
            let shade = if stream.chance(0.7) { [0.05; 3] } else { [0.95; 3] };
            (stream.range(0.025, 0.05), shade)
        });
        let shadow = stream.chance(0.35).then(|| {
            let angle = stream.range(0.0, TAU);
            ([angle.cos() * 0.06, angle.sin() * 0.06], stream.range(0.3, 0.6))
        });
        Self {
            class: class_of(index),
            background,
            fill,
            center,
            radius,
            rotation: [angle.cos(), angle.sin()],
            border,
            shadow,
        }
    }

    /// One colour on another, large, near the centre and nearly upright.
    fn plain(seed: u64, index: u64) -> Self {
        let stream = &mut Stream::new(seed, Purpose::Shape, index);
        let background = Texture::plain(random_color(stream));
        let fill = Texture::plain(contrasting(stream, background.colors));
        let radius = stream.range(0.34, 0.44);
        let room = 0.5 - radius;
        let center = [stream.range(-room, room), stream.range(-room, room)];
        let angle = stream.range(-0.3, 0.3);
        Self {
            class: class_of(index),
            background,
            fill,
            center,
            radius,
            rotation: [angle.cos(), angle.sin()],
            border: None,
            shadow: None,
        }
    }

    /// The colour at (x, y), as in [`Texture::at`].
    fn at(&self, x: f32, y: f32, pixels: f32) -> Color {
        let mut color = self.background.at(x, y, pixels);
        if let Some(([dx, dy], strength)) = self.shadow {
            let softness = 0.05;
            let depth = 0.5 - self.distance(x - dx, y - dy) / softness;
            color = mix(color, [0.0; 3], depth.clamp(0.0, 1.0) * strength);
        }
        let distance = self.distance(x, y);
        let coverage = |distance: f32| (0.5 - distance * pixels).clamp(0.0, 1.0);
        let covered = coverage(distance);
        if covered > 0.0 {
            let mut inside = self.fill.at(x - self.center[0], y - self.center[1], pixels);
            if let Some((thickness, border)) = self.border {
                inside = mix(border, inside, coverage(distance + thickness));
            }
            color = mix(color, inside, covered);
        }
        color
    }

    /// The distance of (x, y) to the outline of the shape where it lies, in the image's units.
    fn distance(&self, x: f32, y: f32) -> f32 {
        let (x, y) = ((x - self.center[0]) / self.radius, (y - self.center[1]) / self.radius);
        let [cos, sin] = self.rotation;
        distance(self.class, x * cos + y * sin, y * cos - x * sin) * self.radius
    }
}

/// A colour that stands out from both of the background's: the first that is far enough from them,
/// or the best of some.
fn contrasting(stream: &mut Stream, background: [Color; 2]) -> Color {
    let nearest = |color: Color| {
        background.into_iter().map(|b| contrast(color, b)).fold(f32::INFINITY, f32::min)
    };
    let mut best = random_color(stream);
    for _ in 0..16 {
        if nearest(best) > 0.5 {
            break;
        }
        let color = random_color(stream);
        if nearest(color) > nearest(best) {
            best = color;
        }
    }
    best
}
