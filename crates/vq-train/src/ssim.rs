//! Structural similarity (Wang et al. 2004).

/// Standard deviation of the Gaussian window, in pixels.
const SIGMA: f64 = 1.5;
/// Side of the window, in pixels.
const WINDOW: usize = 11;
/// (`K₁L)²` and (`K₂L)²` with K₁ = 0.01, K₂ = 0.03 and the range L = 1.
const C1: f64 = 0.01 * 0.01;
const C2: f64 = 0.03 * 0.03;

/// SSIM of two images of `channels` planes of `height` × `width` pixels in [0, 1]: the mean over the
/// planes of the mean over all windows that lie whole in the plane.
///
/// The window is an 11×11 Gaussian with σ = 1.5 (Wang et al. 2004, section III.C); in an image that
/// is smaller than that, the largest odd square that fits. No rounding to u8, no conversion to grey.
pub fn ssim(a: &[f32], b: &[f32], channels: usize, height: usize, width: usize) -> f64 {
    let plane = height * width;
    if plane == 0 || channels == 0 {
        return 1.0;
    }
    let kernel = window(height.min(width));
    let planes = a.chunks_exact(plane).zip(b.chunks_exact(plane)).take(channels);
    planes.map(|(a, b)| plane_ssim(a, b, width, &kernel)).sum::<f64>() / channels as f64
}

fn window(limit: usize) -> Vec<f64> {
    let side = WINDOW.min(if limit.is_multiple_of(2) { limit - 1 } else { limit });
    let middle = (side / 2) as f64;
    let weights: Vec<f64> =
        (0..side).map(|i| (-(i as f64 - middle).powi(2) / (2.0 * SIGMA * SIGMA)).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

/// The window is a product of two, so each row of windows takes one pass down and one across.
fn plane_ssim(a: &[f32], b: &[f32], width: usize, kernel: &[f64]) -> f64 {
    let rows = a.len() / width + 1 - kernel.len();
    let columns = width + 1 - kernel.len();
    let mut moments = vec![[0.0; 5]; width];
    let mut sum = 0.0;
    for top in 0..rows {
        moments.fill([0.0; 5]);
        let lines = a.chunks_exact(width).zip(b.chunks_exact(width)).skip(top);
        for (weight, (a, b)) in kernel.iter().zip(lines) {
            for ((moment, &x), &y) in moments.iter_mut().zip(a).zip(b) {
                let (x, y) = (f64::from(x), f64::from(y));
                for (sum, value) in moment.iter_mut().zip([x, y, x * x, y * y, x * y]) {
                    *sum += weight * value;
                }
            }
        }
        for window in moments.windows(kernel.len()) {
            let mut m = [0.0; 5];
            for (weight, moment) in kernel.iter().zip(window) {
                for (sum, value) in m.iter_mut().zip(moment) {
                    *sum += weight * value;
                }
            }
            let [x, y, xx, yy, xy] = m;
            let (variance_x, variance_y, covariance) = (xx - x * x, yy - y * y, xy - x * y);
            sum += (2.0 * x * y + C1) * (2.0 * covariance + C2)
                / ((x * x + y * y + C1) * (variance_x + variance_y + C2));
        }
    }
    sum / (rows * columns) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, window by window, with centred moments.
    fn obvious(a: &[f32], b: &[f32], channels: usize, height: usize, width: usize) -> f64 {
        let side =
            [11, height - (height + 1) % 2, width - (width + 1) % 2].into_iter().min().unwrap();
        let half = (side / 2) as f64;
        let gauss = |i: usize, j: usize| {
            (-((i as f64 - half).powi(2) + (j as f64 - half).powi(2)) / 4.5).exp()
        };
        let total: f64 = (0..side * side).map(|n| gauss(n / side, n % side)).sum();
        let mut sum = 0.0;
        let mut count = 0.0;
        for c in 0..channels {
            for top in 0..=height - side {
                for left in 0..=width - side {
                    let at = |image: &[f32], n: usize| {
                        let (y, x) = (top + n / side, left + n % side);
                        f64::from(image[(c * height + y) * width + x])
                    };
                    let mean = |f: &dyn Fn(usize) -> f64| -> f64 {
                        (0..side * side).map(|n| gauss(n / side, n % side) / total * f(n)).sum()
                    };
                    let (x, y) = (mean(&|n| at(a, n)), mean(&|n| at(b, n)));
                    let xx = mean(&|n| (at(a, n) - x).powi(2));
                    let yy = mean(&|n| (at(b, n) - y).powi(2));
                    let xy = mean(&|n| (at(a, n) - x) * (at(b, n) - y));
                    sum += (2.0 * x * y + 1e-4) * (2.0 * xy + 9e-4)
                        / ((x * x + y * y + 1e-4) * (xx + yy + 9e-4));
                    count += 1.0;
                }
            }
        }
        sum / count
    }

    fn noise(seed: u32, count: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(747_796_405).wrapping_add(1);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn agrees_with_the_definition() {
        for (channels, height, width) in
            [(3, 32, 32), (1, 11, 11), (2, 13, 20), (3, 8, 8), (1, 5, 30)]
        {
            let a = noise(1, channels * height * width);
            let other = noise(2, channels * height * width);
            for share in [0.0, 0.1, 1.0] {
                let b: Vec<f32> = a.iter().zip(&other).map(|(x, y)| x + share * (y - x)).collect();
                let (fast, slow) = (
                    ssim(&a, &b, channels, height, width),
                    obvious(&a, &b, channels, height, width),
                );
                assert!((fast - slow).abs() < 1e-9, "{channels}×{height}×{width}: {fast} {slow}");
            }
        }
    }

    #[test]
    fn one_for_equal_images_and_low_for_unrelated_ones() {
        let (a, b) = (noise(3, 32 * 32), noise(4, 32 * 32));
        assert!((ssim(&a, &a, 1, 32, 32) - 1.0).abs() < 1e-12);
        assert!(ssim(&a, &b, 1, 32, 32).abs() < 0.2);
    }
}
