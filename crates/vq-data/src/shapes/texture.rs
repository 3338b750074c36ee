//! Colours and the textures of backgrounds and shapes.

use std::f32::consts::{PI, TAU};

use crate::random::Stream;

/// RGB in [0, 1].
pub(super) type Color = [f32; 3];

pub(super) fn mix(a: Color, b: Color, t: f32) -> Color {
    std::array::from_fn(|c| a[c] + (b[c] - a[c]) * t)
}

/// A colour of any hue, from pale to strong and from dark to bright.
pub(super) fn random_color(stream: &mut Stream) -> Color {
    let hue = stream.range(0.0, 6.0);
    let saturation = stream.range(0.15, 1.0);
    let value = stream.range(0.25, 1.0);
    [5.0, 3.0, 1.0].map(|n: f32| {
        let k = (n + hue) % 6.0;
        value * (1.0 - saturation * k.min(4.0 - k).clamp(0.0, 1.0))
    })
}

/// How far apart two colours are, from 0 to √3.
pub(super) fn contrast(a: Color, b: Color) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt()
}

/// Two colours and how they share the plane.
pub(super) struct Texture {
    pub(super) colors: [Color; 2],
    pattern: Pattern,
    /// The direction of the pattern, a unit vector.
    direction: [f32; 2],
}

enum Pattern {
    Linear { center: f32, spread: f32 },
    Radial { center: [f32; 2], radius: f32 },
    Stripes { frequency: f32, phase: f32 },
    Checkers { frequency: f32, phase: f32 },
    Noise { lattice: Box<[f32; NOISE * NOISE]>, frequency: f32 },
}

/// The side of the lattice of random values behind noise.
const NOISE: usize = 16;

impl Texture {
    /// One colour.
    pub(super) fn plain(color: Color) -> Self {
        let pattern = Pattern::Linear { center: 0.0, spread: 1.0 };
        Self { colors: [color; 2], pattern, direction: [1.0, 0.0] }
    }

    /// A background: one of all five patterns.
    pub(super) fn background(stream: &mut Stream) -> Self {
        let first = random_color(stream);
        let second = mix(first, random_color(stream), stream.range(0.3, 0.9));
        let angle = stream.range(0.0, TAU);
        let pattern = match stream.below(5) {
            0 => {
                Pattern::Linear { center: stream.range(-0.2, 0.2), spread: stream.range(0.5, 1.2) }
            }
            1 => Pattern::Radial {
                center: [stream.range(-0.5, 0.5), stream.range(-0.5, 0.5)],
                radius: stream.range(0.5, 1.0),
            },
            2 => Pattern::Stripes {
                frequency: stream.range(2.0, 6.0),
                phase: stream.range(0.0, TAU),
            },
            3 => Pattern::Checkers {
                frequency: stream.range(1.5, 3.5),
                phase: stream.range(0.0, TAU),
            },
            _ => Pattern::Noise {
                lattice: Box::new(std::array::from_fn(|_| stream.range(0.0, 1.0))),
                frequency: stream.range(3.0, 7.0),
            },
        };
        Self { colors: [first, second], pattern, direction: [angle.cos(), angle.sin()] }
    }

    /// The inside of a shape: plain, shaded or striped.
    pub(super) fn fill(stream: &mut Stream, color: Color) -> Self {
        let angle = stream.range(0.0, TAU);
        let (second, pattern) = match stream.below(4) {
            0 | 1 => (color, Pattern::Linear { center: 0.0, spread: 1.0 }),
            2 => {
                let shade = if stream.chance(0.5) { [0.0; 3] } else { [1.0; 3] };
                let strength = stream.range(0.25, 0.55);
                (mix(color, shade, strength), Pattern::Linear { center: 0.0, spread: 0.5 })
            }
            _ => {
                let frequency = stream.range(4.0, 7.0);
                let second = mix(color, random_color(stream), 0.4);
                (second, Pattern::Stripes { frequency, phase: stream.range(0.0, TAU) })
            }
        };
        Self { colors: [color, second], pattern, direction: [angle.cos(), angle.sin()] }
    }

    /// The colour at (x, y), where the image spans −0.5 to 0.5 along its shorter side; edges are
    /// smoothed over `1 / pixels`.
    pub(super) fn at(&self, x: f32, y: f32, pixels: f32) -> Color {
        let [dx, dy] = self.direction;
        let (along, across) = (x * dx + y * dy, y * dx - x * dy);
        let wave = |at: f32, frequency: f32, phase: f32| {
            let slope = TAU * frequency;
            // The sine over its steepest slope is about the distance to the edge.
            ((slope * at + phase).sin() / slope * pixels + 0.5).clamp(0.0, 1.0)
        };
        let t = match &self.pattern {
            Pattern::Linear { center, spread } => (along - center) / spread + 0.5,
            Pattern::Radial { center, radius } => (x - center[0]).hypot(y - center[1]) / radius,
            Pattern::Stripes { frequency, phase } => wave(along, *frequency, *phase),
            Pattern::Checkers { frequency, phase } => {
                let (a, b) =
                    (wave(along, *frequency, *phase), wave(across, *frequency, phase + PI / 3.0));
                a * b + (1.0 - a) * (1.0 - b)
            }
            Pattern::Noise { lattice, frequency } => {
                let coarse = noise(lattice, along * frequency, across * frequency);
                let fine = noise(lattice, across * frequency * 2.0 + 5.3, along * frequency * 2.0);
                (coarse * 0.75 + fine * 0.25 - 0.5) * 1.6 + 0.5
            }
        };
        mix(self.colors[0], self.colors[1], t.clamp(0.0, 1.0))
    }
}

/// Values of the lattice, smoothly interpolated; repeats outside it.
fn noise(lattice: &[f32; NOISE * NOISE], x: f32, y: f32) -> f32 {
    let (x0, y0) = (x.floor(), y.floor());
    let smooth = |t: f32| t * t * (3.0 - 2.0 * t);
    let (tx, ty) = (smooth(x - x0), smooth(y - y0));
    let value = |dx: i64, dy: i64| {
        let wrap = |i: i64| i.rem_euclid(NOISE as i64) as usize;
        lattice[wrap(y0 as i64 + dy) * NOISE + wrap(x0 as i64 + dx)]
    };
    let top = value(0, 0) + (value(1, 0) - value(0, 0)) * tx;
    let bottom = value(0, 1) + (value(1, 1) - value(0, 1)) * tx;
    top + (bottom - top) * ty
}
