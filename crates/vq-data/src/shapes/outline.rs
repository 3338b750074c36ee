//! Signed distances to the outlines of the shapes, after Inigo Quilez's
//! <https://iquilezles.org/articles/distfunctions2d/>: negative inside, in units of the shape's
//! radius, y downwards.

use super::CLASSES;

/// The distance of point (x, y) to the outline of the shape of a class, which about fits into the unit
/// circle.
pub(super) fn distance(class: u32, x: f32, y: f32) -> f32 {
    match CLASSES.get(class as usize).copied() {
        Some("square") => rectangle(x, y, 0.78, 0.78),
        Some("triangle") => triangle(x, -y),
        Some("hexagon") => hexagon(x, y),
        Some("star") => star(x, -y),
        Some("ring") => (x.hypot(y) - 0.72).abs() - 0.26,
        Some("cross") => rectangle(x, y, 0.95, 0.31).min(rectangle(x, y, 0.31, 0.95)),
        Some("heart") => heart(x, -y),
        Some("crescent") => crescent(x, y),
        Some("capsule") => (x - x.clamp(-0.6, 0.6)).hypot(y) - 0.36,
        _ => x.hypot(y) - 0.95,
    }
}

fn rectangle(x: f32, y: f32, half_width: f32, half_height: f32) -> f32 {
    let (x, y) = (x.abs() - half_width, y.abs() - half_height);
    x.max(0.0).hypot(y.max(0.0)) + x.max(y).min(0.0)
}

/// Equilateral, one corner up.
fn triangle(x: f32, y: f32) -> f32 {
    const HALF_SIDE: f32 = 0.86;
    let k = 3_f32.sqrt();
    let (mut x, mut y) = (x.abs() - HALF_SIDE, y + HALF_SIDE / k);
    if x + k * y > 0.0 {
        (x, y) = ((x - k * y) / 2.0, (-k * x - y) / 2.0);
    }
    x -= x.clamp(-2.0 * HALF_SIDE, 0.0);
    -x.hypot(y).copysign(y)
}

fn hexagon(x: f32, y: f32) -> f32 {
    const APOTHEM: f32 = 0.84;
    let (kx, ky, kz) = (-(3_f32.sqrt()) / 2.0, 0.5, 1.0 / 3_f32.sqrt());
    let (mut x, mut y) = (x.abs(), y.abs());
    let reflect = 2.0 * (kx * x + ky * y).min(0.0);
    (x, y) = (x - reflect * kx, y - reflect * ky);
    x -= x.clamp(-kz * APOTHEM, kz * APOTHEM);
    y -= APOTHEM;
    x.hypot(y).copysign(y)
}

/// Five points, one of them up.
fn star(x: f32, y: f32) -> f32 {
    const INNER: f32 = 0.5;
    let (k1x, k1y) = (0.809_017, -0.587_785_25);
    let (mut x, mut y) = (x.abs(), y);
    let reflect = 2.0 * (k1x * x + k1y * y).max(0.0);
    (x, y) = (x - reflect * k1x, y - reflect * k1y);
    let reflect = 2.0 * (-k1x * x + k1y * y).max(0.0);
    (x, y) = (x + reflect * k1x, y - reflect * k1y);
    (x, y) = (x.abs(), y - 1.0);
    let (bx, by) = (-INNER * k1y, INNER * k1x - 1.0);
    let along = ((x * bx + y * by) / (bx * bx + by * by)).clamp(0.0, 1.0);
    (x - bx * along).hypot(y - by * along).copysign(y * bx - x * by)
}

fn heart(x: f32, y: f32) -> f32 {
    const SCALE: f32 = 0.6;
    let (x, y) = (x.abs() * SCALE, y * SCALE + 0.55);
    let distance = if x + y > 1.0 {
        (x - 0.25).hypot(y - 0.75) - 2_f32.sqrt() / 4.0
    } else {
        let m = 0.5 * (x + y).max(0.0);
        x.hypot(y - 1.0).min((x - m).hypot(y - m)).copysign(x - y)
    };
    distance / SCALE
}

fn crescent(x: f32, y: f32) -> f32 {
    const OUTER: f32 = 0.98;
    const INNER: f32 = 0.8;
    const SHIFT: f32 = 0.5;
    let y = y.abs();
    let a = (OUTER * OUTER - INNER * INNER + SHIFT * SHIFT) / (2.0 * SHIFT);
    let b = (OUTER * OUTER - a * a).max(0.0).sqrt();
    if SHIFT * (x * b - y * a) > SHIFT * SHIFT * (b - y).max(0.0) {
        return (x - a).hypot(y - b);
    }
    (x.hypot(y) - OUTER).max(INNER - (x - SHIFT).hypot(y))
}
