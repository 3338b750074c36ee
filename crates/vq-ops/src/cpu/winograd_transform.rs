//! The transforms of Winograd's minimal filtering (Lavin & Gray 2016, "Fast Algorithms for
//! Convolutional Neural Networks"): `Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A` gives 4×4 outputs of a kernel
//! `g` of R×R taps from an `(R+3)×(R+3)` piece `d` of the input, with `(R+3)²` instead of `16 R²`
//! multiplications. The gradient of `g` is the adjoint, `Gᵀ[(A y Aᵀ) ⊙ (Bᵀ d B)]G`.
//!
//! One call handles one tile of all channels, as many at a time as a register has lanes.

#![allow(clippy::needless_range_loop)] // rows and columns of small matrices

use super::bf16::kernels::round;
use super::bf16::widen;
use super::ending::Ending;
use super::vector::Vector;

/// Outputs of a tile along an axis.
pub(crate) const OUT: usize = 4;
/// The longest side of an input tile.
pub(crate) const MAX: usize = 6;

/// The transforms for one instruction set and kernel.
///
/// Their safety: the pointers of the argument cover what its fields say, channels are a multiple of
/// the lanes, and the CPU has the instruction set.
pub(crate) struct Transforms {
    /// `Bᵀ d B` of an input tile.
    pub input: Readers,
    /// `A y Aᵀ` of a tile of the output's gradient.
    pub gradient: Readers,
    /// `Aᵀ m A`, finished and stored.
    pub output: unsafe fn(&Output<'_>),
    /// `G g Gᵀ` of as many kernels as there are lanes, `taps` being `[R·R][lanes]`.
    pub kernel: unsafe fn(*const f32, *mut f32, usize),
    /// `Gᵀ s G` of as many kernels as there are lanes, to `taps` `[R·R][lanes]`.
    pub kernel_gradient: unsafe fn(*const f32, usize, *mut f32),
}

/// A transform that reads images, for each format of theirs.
pub(crate) struct Readers {
    /// Of f32 elements.
    pub values: unsafe fn(&Input<'_, f32>),
    /// Of bfloat16 elements.
    pub halves: unsafe fn(&Input<'_, u16>),
}

/// An element of images: f32, or bfloat16 as its bits.
pub(crate) trait Element: Copy + Sync {
    /// The transform that reads such elements.
    fn reader(readers: &Readers) -> unsafe fn(&Input<'_, Self>);
    /// A weight that meets such elements: as exact as they are.
    fn weight(value: f32) -> f32;
    /// As many as there are lanes.
    ///
    /// # Safety
    /// As [`Vector`].
    #[allow(unsafe_code)]
    unsafe fn load<V: Vector>(from: *const Self) -> V;
}

impl Element for f32 {
    fn reader(readers: &Readers) -> unsafe fn(&Input<'_, Self>) {
        readers.values
    }

    fn weight(value: f32) -> f32 {
        value
    }

    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load(from) }
    }
}

impl Element for u16 {
    fn reader(readers: &Readers) -> unsafe fn(&Input<'_, Self>) {
        readers.halves
    }

    fn weight(value: f32) -> f32 {
        widen(round(value))
    }

    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load_halves(from, V::LANES) }
    }
}

/// A tile to read.
pub(crate) struct Input<'a, T> {
    /// The images.
    pub from: *const T,
    /// Where each pixel of the tile begins in `from`, row by row; `None` outside the image.
    pub pixels: &'a [Option<usize>],
    /// Channels of a pixel.
    pub channels: usize,
    /// Whether ReLU is applied.
    pub relu: bool,
    /// Where the channels `c..` of the transformed element ξ go: `to + ξ·step + place(c)`.
    pub to: *mut f32,
    /// See `to`.
    pub step: usize,
    /// `place(c) = (c / run)·run_step + c % run`; `run` is a multiple of the lanes.
    pub run: usize,
    /// See `run`.
    pub run_step: usize,
}

/// A tile to write.
pub(crate) struct Output<'a> {
    /// The products: channels of element ξ at `from + ξ·step`.
    pub from: *const f32,
    /// See `from`.
    pub step: usize,
    /// Channels of a pixel.
    pub channels: usize,
    /// Where each of the 4×4 pixels begins in all that is as large as the result; `None` outside.
    pub pixels: &'a [Option<usize>; OUT * OUT],
    /// What is done to the sums, and where they go.
    pub ending: Ending,
}

/// The one-dimensional transforms for a number of taps.
#[allow(unsafe_code)] // safety as for `Vector`'s methods
pub(crate) trait Filter {
    /// Taps along an axis, R.
    const TAPS: usize;
    /// Side of an input tile, R + 3.
    const SIDE: usize;
    /// `Bᵀ d`.
    unsafe fn input<V: Vector>(d: [V; MAX]) -> [V; MAX];
    /// `Aᵀ m`.
    unsafe fn output<V: Vector>(m: [V; MAX]) -> [V; OUT];
    /// `A y`.
    unsafe fn gradient<V: Vector>(y: [V; OUT]) -> [V; MAX];
    /// `G g`.
    unsafe fn kernel<V: Vector>(g: [V; 3]) -> [V; MAX];
    /// `Gᵀ s`.
    unsafe fn kernel_gradient<V: Vector>(s: [V; MAX]) -> [V; 3];
}

/// F(4, 3) on the points 0, ±1, ±2, ∞.
pub(crate) struct ThreeTaps;

/// F(4, 2) on the points 0, ±1, 2, ∞.
pub(crate) struct TwoTaps;

#[allow(unsafe_code, clippy::undocumented_unsafe_blocks)] // the trait's comment covers all
impl Filter for ThreeTaps {
    const TAPS: usize = 3;
    const SIDE: usize = 6;

    #[inline(always)]
    unsafe fn input<V: Vector>(d: [V; MAX]) -> [V; MAX] {
        unsafe {
            let [four, five, two] = [V::splat(4.), V::splat(-5.), V::splat(2.)];
            let (even, odd) =
                (d[2].mul_add(V::splat(-4.), d[4]), d[1].mul_add(V::splat(-4.), d[3]));
            let (near, far) = (d[4].sub(d[2]), d[3].sub(d[1]));
            [
                d[0].mul_add(four, d[2].mul_add(five, d[4])),
                even.add(odd),
                even.sub(odd),
                far.mul_add(two, near),
                far.mul_add(V::splat(-2.), near),
                d[1].mul_add(four, d[3].mul_add(five, d[5])),
            ]
        }
    }

    #[inline(always)]
    unsafe fn output<V: Vector>(m: [V; MAX]) -> [V; OUT] {
        unsafe {
            let (sum1, sum2) = (m[1].add(m[2]), m[3].add(m[4]));
            let (diff1, diff2) = (m[1].sub(m[2]), m[3].sub(m[4]));
            [
                m[0].add(sum1).add(sum2),
                diff2.mul_add(V::splat(2.), diff1),
                sum2.mul_add(V::splat(4.), sum1),
                diff2.mul_add(V::splat(8.), diff1.add(m[5])),
            ]
        }
    }

    #[inline(always)]
    unsafe fn gradient<V: Vector>(y: [V; OUT]) -> [V; MAX] {
        unsafe {
            let (even1, odd1) = (y[0].add(y[2]), y[1].add(y[3]));
            let even2 = y[2].mul_add(V::splat(4.), y[0]);
            let odd2 = y[3].mul_add(V::splat(4.), y[1]);
            let two = V::splat(2.);
            [
                y[0],
                even1.add(odd1),
                even1.sub(odd1),
                odd2.mul_add(two, even2),
                odd2.mul_add(V::splat(-2.), even2),
                y[3],
            ]
        }
    }

    #[inline(always)]
    unsafe fn kernel<V: Vector>(g: [V; 3]) -> [V; MAX] {
        unsafe {
            let zero = V::splat(0.);
            let outer = g[0].add(g[2]).mul_add(V::splat(-1. / 6.), zero);
            let inner = g[1].mul_add(V::splat(-1. / 6.), zero);
            let wide = g[0].mul_add(V::splat(1. / 24.), g[2].mul_add(V::splat(1. / 6.), zero));
            let middle = g[1].mul_add(V::splat(1. / 12.), zero);
            [
                g[0].mul_add(V::splat(0.25), zero),
                outer.add(inner),
                outer.sub(inner),
                wide.add(middle),
                wide.sub(middle),
                g[2],
            ]
        }
    }

    #[inline(always)]
    unsafe fn kernel_gradient<V: Vector>(s: [V; MAX]) -> [V; 3] {
        unsafe {
            let sixth = V::splat(-1. / 6.);
            let (sum1, diff1) = (s[1].add(s[2]), s[1].sub(s[2]));
            let (sum2, diff2) = (s[3].add(s[4]), s[3].sub(s[4]));
            let zero = V::splat(0.);
            let sum1 = sum1.mul_add(sixth, zero);
            [
                s[0].mul_add(V::splat(0.25), sum2.mul_add(V::splat(1. / 24.), sum1)),
                diff1.mul_add(sixth, diff2.mul_add(V::splat(1. / 12.), zero)),
                sum2.mul_add(V::splat(1. / 6.), sum1).add(s[5]),
            ]
        }
    }
}

#[allow(unsafe_code, clippy::undocumented_unsafe_blocks)] // the trait's comment covers all
impl Filter for TwoTaps {
    const TAPS: usize = 2;
    const SIDE: usize = 5;

    #[inline(always)]
    unsafe fn input<V: Vector>(d: [V; MAX]) -> [V; MAX] {
        unsafe {
            let two = V::splat(2.);
            let rest = d[3].sub(d[1]);
            [
                d[0].sub(d[2]).mul_add(two, rest),
                d[3].sub(d[2]).sub(d[1]).sub(d[1]),
                d[2].mul_add(V::splat(-3.), d[1].mul_add(two, d[3])),
                rest,
                rest.mul_add(V::splat(-2.), d[4].sub(d[2])),
                V::splat(0.),
            ]
        }
    }

    #[inline(always)]
    unsafe fn output<V: Vector>(m: [V; MAX]) -> [V; OUT] {
        unsafe {
            let (sum, diff) = (m[1].add(m[2]), m[1].sub(m[2]));
            [
                m[0].add(sum).add(m[3]),
                m[3].mul_add(V::splat(2.), diff),
                m[3].mul_add(V::splat(4.), sum),
                m[3].mul_add(V::splat(8.), diff.add(m[4])),
            ]
        }
    }

    #[inline(always)]
    unsafe fn gradient<V: Vector>(y: [V; OUT]) -> [V; MAX] {
        unsafe {
            let (even, odd) = (y[0].add(y[2]), y[1].add(y[3]));
            let far = y[2].mul_add(V::splat(4.), y[3].mul_add(V::splat(8.), y[0]));
            [
                y[0],
                even.add(odd),
                even.sub(odd),
                y[1].mul_add(V::splat(2.), far),
                y[3],
                V::splat(0.),
            ]
        }
    }

    #[inline(always)]
    unsafe fn kernel<V: Vector>(g: [V; 3]) -> [V; MAX] {
        unsafe {
            let zero = V::splat(0.);
            [
                g[0].mul_add(V::splat(0.5), zero),
                g[0].add(g[1]).mul_add(V::splat(-0.5), zero),
                g[1].sub(g[0]).mul_add(V::splat(1. / 6.), zero),
                g[0].mul_add(V::splat(1. / 6.), g[1].mul_add(V::splat(1. / 3.), zero)),
                g[1],
                zero,
            ]
        }
    }

    #[inline(always)]
    unsafe fn kernel_gradient<V: Vector>(s: [V; MAX]) -> [V; 3] {
        unsafe {
            let half = V::splat(0.5);
            let sixth = V::splat(1. / 6.);
            let zero = V::splat(0.);
            [
                s[0].sub(s[1]).mul_add(half, s[3].sub(s[2]).mul_add(sixth, zero)),
                s[1].mul_add(V::splat(-0.5), s[2].mul_add(sixth, s[4]))
                    .add(s[3].mul_add(V::splat(1. / 3.), zero)),
                zero,
            ]
        }
    }
}

/// See [`Transforms::input`].
///
/// # Safety
/// As [`Transforms`].
#[inline(always)]
#[allow(unsafe_code)]
pub(crate) unsafe fn input<V: Vector, F: Filter, T: Element>(job: &Input<'_, T>) {
    // SAFETY: the caller's promise.
    unsafe {
        for channel in (0..job.channels).step_by(V::LANES) {
            let mut half = [[V::splat(0.); MAX]; MAX];
            for x in 0..F::SIDE {
                let mut column = [V::splat(0.); MAX];
                for (y, value) in column.iter_mut().enumerate().take(F::SIDE) {
                    *value = fetch(job, y * F::SIDE + x, channel);
                }
                let column = F::input(column);
                for (y, value) in column.into_iter().enumerate().take(F::SIDE) {
                    half[y][x] = value;
                }
            }
            let to = job.to.add(channel / job.run * job.run_step + channel % job.run);
            for (y, row) in half.into_iter().enumerate().take(F::SIDE) {
                for (x, value) in F::input(row).into_iter().enumerate().take(F::SIDE) {
                    value.store(to.add((y * F::SIDE + x) * job.step));
                }
            }
        }
    }
}

/// See [`Transforms::gradient`].
///
/// # Safety
/// As [`Transforms`].
#[inline(always)]
#[allow(unsafe_code)]
pub(crate) unsafe fn gradient<V: Vector, F: Filter, T: Element>(job: &Input<'_, T>) {
    // SAFETY: the caller's promise.
    unsafe {
        for channel in (0..job.channels).step_by(V::LANES) {
            let mut half = [[V::splat(0.); OUT]; MAX];
            for x in 0..OUT {
                let mut column = [V::splat(0.); OUT];
                for (y, value) in column.iter_mut().enumerate() {
                    *value = fetch(job, y * OUT + x, channel);
                }
                let column = F::gradient(column);
                for (y, value) in column.into_iter().enumerate().take(F::SIDE) {
                    half[y][x] = value;
                }
            }
            let to = job.to.add(channel / job.run * job.run_step + channel % job.run);
            for (y, row) in half.into_iter().enumerate().take(F::SIDE) {
                for (x, value) in F::gradient(row).into_iter().enumerate().take(F::SIDE) {
                    value.store(to.add((y * F::SIDE + x) * job.step));
                }
            }
        }
    }
}

/// # Safety
/// As [`Transforms`].
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn fetch<V: Vector, T: Element>(job: &Input<'_, T>, pixel: usize, channel: usize) -> V {
    // SAFETY: the caller's promise.
    unsafe {
        match job.pixels.get_unchecked(pixel) {
            Some(at) => {
                let value: V = T::load(job.from.add(at + channel));
                if job.relu { value.where_positive(value) } else { value }
            }
            None => V::splat(0.),
        }
    }
}

/// See [`Transforms::output`].
///
/// # Safety
/// As [`Transforms`].
#[inline(always)]
#[allow(unsafe_code)]
pub(crate) unsafe fn output<V: Vector, F: Filter>(job: &Output<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        for channel in (0..job.channels).step_by(V::LANES) {
            let mut half = [[V::splat(0.); MAX]; OUT];
            for x in 0..F::SIDE {
                let mut column = [V::splat(0.); MAX];
                for (y, value) in column.iter_mut().enumerate().take(F::SIDE) {
                    *value = V::load(job.from.add((y * F::SIDE + x) * job.step + channel));
                }
                for (y, value) in F::output(column).into_iter().enumerate() {
                    half[y][x] = value;
                }
            }
            for (row, places) in half.into_iter().zip(job.pixels.chunks_exact(OUT)) {
                for (value, place) in F::output(row).into_iter().zip(places) {
                    let Some(at) = place else { continue };
                    job.ending.store(value, channel, at + channel, V::LANES);
                }
            }
        }
    }
}

/// See [`Transforms::kernel`].
///
/// # Safety
/// As [`Transforms`].
#[inline(always)]
#[allow(unsafe_code)]
pub(crate) unsafe fn kernel<V: Vector, F: Filter>(taps: *const f32, to: *mut f32, step: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut half = [[V::splat(0.); 3]; MAX];
        for x in 0..F::TAPS {
            let mut column = [V::splat(0.); 3];
            for (y, value) in column.iter_mut().enumerate().take(F::TAPS) {
                *value = V::load(taps.add((y * F::TAPS + x) * V::LANES));
            }
            for (y, value) in F::kernel(column).into_iter().enumerate() {
                half[y][x] = value;
            }
        }
        for (y, row) in half.into_iter().enumerate().take(F::SIDE) {
            for (x, value) in F::kernel(row).into_iter().enumerate().take(F::SIDE) {
                value.store(to.add((y * F::SIDE + x) * step));
            }
        }
    }
}

/// See [`Transforms::kernel_gradient`].
///
/// # Safety
/// As [`Transforms`].
#[inline(always)]
#[allow(unsafe_code)]
pub(crate) unsafe fn kernel_gradient<V: Vector, F: Filter>(
    from: *const f32,
    step: usize,
    taps: *mut f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut half = [[V::splat(0.); MAX]; 3];
        for x in 0..F::SIDE {
            let mut column = [V::splat(0.); MAX];
            for (y, value) in column.iter_mut().enumerate().take(F::SIDE) {
                *value = V::load(from.add((y * F::SIDE + x) * step));
            }
            for (y, value) in F::kernel_gradient(column).into_iter().enumerate() {
                half[y][x] = value;
            }
        }
        for (y, row) in half.into_iter().enumerate().take(F::TAPS) {
            for (x, value) in F::kernel_gradient(row).into_iter().enumerate().take(F::TAPS) {
                value.store(taps.add((y * F::TAPS + x) * V::LANES));
            }
        }
    }
}
