//! The innermost product: a few rows times one or two registers of columns.

use std::sync::OnceLock;

use super::choice::wanted;
use super::pack::{CopyFn, Gather, GatherFn, gather};
use super::vector::{Portable, Vector};
use super::winograd_transform::{self as winograd, Element, Filter, Readers, Transforms};

/// How deep a product runs before its sums go back to memory: one panel of `DEPTH × columns` then
/// stays in the first-level cache.
pub(crate) const DEPTH: usize = 192;
/// Distance between rows that were gathered for [`Tile::a`]: an odd number of cache lines, so that
/// the rows of a tile fall into different cache sets.
pub(crate) const ROW: usize = DEPTH + 16;
/// Registers in a row of a panel.
pub(crate) const PANEL_REGISTERS: usize = 2;

/// One tile: `c[rows[i] + j] (+)= Σ_d a(i, d) · b[d][j]`, then bias, mask and residual.
pub(crate) struct Tile {
    /// Length of the sums.
    pub depth: usize,
    /// First operand; see [`Operand`] for where element (i, d) lies.
    pub a: *const f32,
    /// Elements between neighbouring depths of `a`.
    pub a_step: usize,
    /// Second operand, `[depth][panel]`.
    pub b: *const f32,
    /// Result.
    pub c: *mut f32,
    /// Where each row of the tile begins in `c` (and in `mask` and `residual`).
    pub rows: *const usize,
    /// How many columns are stored: at most the panel's width.
    pub columns: usize,
    /// Whether the sums are added to what is in `c`.
    pub accumulate: bool,
    /// Added to every row, where not null.
    pub bias: *const f32,
    /// Same places as `c`: where it is not above zero the sum becomes zero. May be null.
    pub mask: *const f32,
    /// Same places as `c`: added last. May be null.
    pub residual: *const f32,
}

/// Vectors against one panel of codes: the scores `norms[j] + Σ_d a(i, d) · b[d][j]` are compared as
/// they come out of the registers, and never stored.
pub(crate) struct SearchTile {
    /// Length of the sums.
    pub depth: usize,
    /// The vectors, `a_step` elements apart.
    pub a: *const f32,
    /// See `a`.
    pub a_step: usize,
    /// The codes, `[depth][panel]`.
    pub b: *const f32,
    /// What is added to each code's scores, `[panel]`.
    pub norms: *const f32,
    /// Number of the panel's first register of codes.
    pub register: u32,
    /// For each vector and lane the best score so far, the second-best, and the register that the best
    /// one came from (as bits): `[rows][3][lanes]`.
    pub state: *mut f32,
}

/// Where element (row, depth) of a tile's first operand lies.
#[derive(Clone, Copy)]
pub(crate) enum Operand {
    /// At `row · ROW + depth · a_step`.
    Gathered,
    /// At `row + depth · a_step`.
    Transposed,
}

/// The kernels for one instruction set.
pub(crate) struct Kernels {
    /// The most rows in a tile.
    pub rows: usize,
    /// Columns in a panel of the second operand.
    pub panel: usize,
    /// Lanes of a register: tiles of at most that many columns take the narrow kernel.
    pub lanes: usize,
    gathered: [&'static [TileFn]; 2],
    transposed: [&'static [TileFn]; 2],
    /// `to[i] = from[i]` for `count` elements, after a ReLU in the second one.
    pub copy: [CopyFn; 2],
    /// As they are, and after a ReLU.
    pub gather: [GatherFn<f32>; 2],
    /// One for each number of rows.
    search: &'static [unsafe fn(&SearchTile)],
    /// The transforms of [`super::winograd`], for kernels of 2 and of 3 taps a side.
    pub winograd: [Transforms; 2],
    /// Name of the instruction set.
    pub name: &'static str,
}

type TileFn = unsafe fn(&Tile);

impl Kernels {
    /// Runs one tile of `rows` rows.
    ///
    /// # Safety
    /// The pointers of `tile` must cover what its fields say; `rows` is between 1 and `self.rows`.
    #[inline]
    #[allow(unsafe_code)]
    pub(crate) unsafe fn run(&self, operand: Operand, rows: usize, tile: &Tile) {
        let family = match operand {
            Operand::Gathered => &self.gathered,
            Operand::Transposed => &self.transposed,
        };
        let width = usize::from(tile.columns > self.lanes);
        // SAFETY: the caller's promise, and `kernels()` chose what this CPU has.
        unsafe { family[width][rows - 1](tile) }
    }

    /// Scores one panel of codes for `rows` vectors.
    ///
    /// # Safety
    /// The pointers of `tile` must cover what its fields say; `rows` is between 1 and `self.rows`.
    #[inline]
    #[allow(unsafe_code)]
    pub(crate) unsafe fn search(&self, rows: usize, tile: &SearchTile) {
        // SAFETY: the caller's promise, and `kernels()` chose what this CPU has.
        unsafe { self.search[rows - 1](tile) }
    }

    /// Splits `total` rows into tiles of nearly equal height: (number of tiles, rows of tile i).
    pub(crate) fn tiles(&self, total: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let count = total.div_ceil(self.rows);
        (0..count).map(move |i| {
            let (first, end) = (total * i / count, total * (i + 1) / count);
            (first, end - first)
        })
    }
}

/// The best kernels for this CPU. `VQ_CPU=avx2` or `portable` asks for less, for comparisons; names of
/// instructions for bf16 mean the best kernels below them.
pub(crate) fn kernels() -> &'static Kernels {
    static CHOICE: OnceLock<&'static Kernels> = OnceLock::new();
    #[cfg(test)]
    if let Some(forced) = FORCED.get() {
        return forced;
    }
    CHOICE.get_or_init(|| wanted(available(), |kernels| kernels.name).unwrap_or(&PORTABLE))
}

#[cfg(test)]
thread_local! {
    /// What `kernels()` answers on this thread, so that tests reach every instruction set.
    pub(crate) static FORCED: std::cell::Cell<Option<&'static Kernels>> =
        const { std::cell::Cell::new(None) };
}

/// All kernels that this CPU can run, best first.
pub(crate) fn available() -> Vec<&'static Kernels> {
    let mut all: Vec<&'static Kernels> = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            all.push(&AVX512);
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            all.push(&AVX2);
        }
    }
    all.push(&PORTABLE);
    all
}

/// `Σ_d a(i, d) · b[d][j]` for `MR` rows and `NV` registers of columns, where row i of `a` begins at
/// `row(i)`. Nothing may reach into the sums but loops of constant length: they would lie in memory
/// instead of registers, and the product take twice as long.
///
/// # Safety
/// `a` covers `MR` rows of `depth`, `a_step` elements apart, `b` covers `depth` panels, and the CPU has
/// `V`'s instruction set.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn products<V: Vector, const MR: usize, const NV: usize>(
    depth: usize,
    (mut a, row, a_step): (*const f32, impl Fn(usize) -> usize, usize),
    mut b: *const f32,
) -> [[V; NV]; MR] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[V::splat(0.); NV]; MR];
        for _ in 0..depth {
            let mut columns = [V::splat(0.); NV];
            for (j, column) in columns.iter_mut().enumerate() {
                *column = V::load(b.add(j * V::LANES));
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let factor = V::splat(*a.add(row(i)));
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = factor.mul_add(column, *sum);
                }
            }
            a = a.add(a_step);
            b = b.add(PANEL_REGISTERS * V::LANES);
        }
        sums
    }
}

/// The tile for `MR` rows and `NV` registers of columns. `ROW_STEP` is the distance between rows
/// of the first operand.
///
/// # Safety
/// As [`Kernels::run`], and the CPU must have `V`'s instruction set.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn generic<V: Vector, const MR: usize, const NV: usize, const ROW_STEP: usize>(tile: &Tile) {
    // SAFETY: the caller's promise: `a` covers MR rows of `depth`, `b` covers `depth` panels, and
    // `c`, `mask` and `residual` cover `columns` elements from each of the MR `rows`.
    unsafe {
        let a = (tile.a, |row| row * ROW_STEP, tile.a_step);
        let sums: [[V; NV]; MR] = products(tile.depth, a, tile.b);
        // What follows counts through the rows, so not through those in registers: see `products`.
        let mut stored = [[V::splat(0.); NV]; MR];
        for (to, sums) in stored.iter_mut().zip(sums) {
            for (to, sum) in to.iter_mut().zip(sums) {
                *to = sum;
            }
        }
        for (j, first) in (0..NV).map(|j| (j, j * V::LANES)) {
            let count = tile.columns.saturating_sub(first).min(V::LANES);
            if count == 0 {
                break;
            }
            let bias = if tile.bias.is_null() {
                V::splat(0.)
            } else {
                V::load_partial(tile.bias.add(first), count)
            };
            let whole = count == V::LANES;
            let fetch = |from: *const f32| {
                if whole { V::load(from) } else { V::load_partial(from, count) }
            };
            for (i, row) in stored.iter().enumerate() {
                let at = *tile.rows.add(i) + first;
                let mut value = row[j];
                if tile.accumulate {
                    value = value.add(fetch(tile.c.add(at)));
                }
                value = value.add(bias);
                if !tile.mask.is_null() {
                    value = value.where_positive(fetch(tile.mask.add(at)));
                }
                if !tile.residual.is_null() {
                    value = value.add(fetch(tile.residual.add(at)));
                }
                if whole {
                    value.store(tile.c.add(at));
                } else {
                    value.store_partial(tile.c.add(at), count);
                }
            }
        }
    }
}

/// See [`SearchTile`].
///
/// # Safety
/// As [`Kernels::search`], and the CPU must have `V`'s instruction set.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn generic_search<V: Vector, const MR: usize, const NV: usize>(tile: &SearchTile) {
    // SAFETY: the caller's promise: `a` covers MR rows of `depth`, `b` covers `depth` panels, `norms`
    // one panel, and `state` MR times three registers.
    unsafe {
        let a = (tile.a, |row| row * tile.a_step, 1);
        let sums: [[V; NV]; MR] = products(tile.depth, a, tile.b);
        for (i, row) in sums.into_iter().enumerate() {
            let state = tile.state.add(i * 3 * V::LANES);
            let mut best = V::load(state);
            let mut second = V::load(state.add(V::LANES));
            let mut register = V::load(state.add(2 * V::LANES));
            for (j, sum) in row.into_iter().enumerate() {
                let score = sum.add(V::load(tile.norms.add(j * V::LANES)));
                second = second.min(best.max(score));
                let this = V::splat(f32::from_bits(tile.register + j as u32));
                register = score.choose_below(best, this, register);
                best = score.min(best);
            }
            best.store(state);
            second.store(state.add(V::LANES));
            register.store(state.add(2 * V::LANES));
        }
    }
}

/// # Safety
/// `from` and `to` cover `count` elements, and the CPU has `V`'s instruction set.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn generic_copy<V: Vector, const RELU: bool>(from: *const f32, to: *mut f32, count: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut i = 0;
        while i + V::LANES <= count {
            let value = V::load(from.add(i));
            let value = if RELU { value.where_positive(value) } else { value };
            value.store(to.add(i));
            i += V::LANES;
        }
        if i < count {
            let value = V::load_partial(from.add(i), count - i);
            let value = if RELU { value.where_positive(value) } else { value };
            value.store_partial(to.add(i), count - i);
        }
    }
}

/// # Safety
/// The CPU has `V`'s instruction set.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn generic_gather<V: Vector, const RELU: bool>(job: Gather<'_, f32>) {
    // SAFETY: both functions touch what they are told to.
    unsafe {
        gather(
            job,
            |from, to, count| generic_copy::<V, RELU>(from, to, count),
            |to, count| to.write_bytes(0, count),
        );
    }
}

macro_rules! kernels_for {
    ($table:ident, $module:ident, $name:literal, $vector:ty, $($feature:literal)?, rows: [$($mr:literal)*]) => {
        #[allow(unsafe_code)]
        mod $module {
            use super::*;

            const PANEL: usize = PANEL_REGISTERS * <$vector>::LANES;

            $(#[target_feature(enable = $feature)])?
            unsafe fn run<const MR: usize, const NV: usize, const ROW_STEP: usize>(tile: &Tile) {
                // SAFETY: the caller's promise; the instruction set is enabled above.
                unsafe { generic::<$vector, MR, NV, ROW_STEP>(tile) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn copy<const RELU: bool>(from: *const f32, to: *mut f32, count: usize) {
                // SAFETY: as above.
                unsafe { generic_copy::<$vector, RELU>(from, to, count) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn gather_patches<const RELU: bool>(job: Gather<'_, f32>) {
                // SAFETY: as above.
                unsafe { generic_gather::<$vector, RELU>(job) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn input<F: Filter, T: Element>(job: &winograd::Input<'_, T>) {
                // SAFETY: as above.
                unsafe { winograd::input::<$vector, F, T>(job) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn gradient<F: Filter, T: Element>(job: &winograd::Input<'_, T>) {
                // SAFETY: as above.
                unsafe { winograd::gradient::<$vector, F, T>(job) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn output<F: Filter>(job: &winograd::Output<'_>) {
                // SAFETY: as above.
                unsafe { winograd::output::<$vector, F>(job) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn kernel<F: Filter>(taps: *const f32, to: *mut f32, step: usize) {
                // SAFETY: as above.
                unsafe { winograd::kernel::<$vector, F>(taps, to, step) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn kernel_gradient<F: Filter>(from: *const f32, step: usize, taps: *mut f32) {
                // SAFETY: as above.
                unsafe { winograd::kernel_gradient::<$vector, F>(from, step, taps) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn search<const MR: usize>(tile: &SearchTile) {
                // SAFETY: as above.
                unsafe { generic_search::<$vector, MR, PANEL_REGISTERS>(tile) }
            }

            const fn transforms<F: Filter>() -> Transforms {
                Transforms {
                    input: Readers { values: input::<F, f32>, halves: input::<F, u16> },
                    gradient: Readers { values: gradient::<F, f32>, halves: gradient::<F, u16> },
                    output: output::<F>,
                    kernel: kernel::<F>,
                    kernel_gradient: kernel_gradient::<F>,
                }
            }

            pub(super) static TABLE: Kernels = Kernels {
                rows: [$($mr),*].len(),
                panel: PANEL,
                lanes: <$vector>::LANES,
                gathered: [&[$(run::<$mr, 1, ROW>),*], &[$(run::<$mr, 2, ROW>),*]],
                transposed: [&[$(run::<$mr, 1, 1>),*], &[$(run::<$mr, 2, 1>),*]],
                copy: [copy::<false>, copy::<true>],
                gather: [gather_patches::<false>, gather_patches::<true>],
                search: &[$(search::<$mr>),*],
                winograd: [transforms::<winograd::TwoTaps>(), transforms::<winograd::ThreeTaps>()],
                name: $name,
            };
        }
        use $module::TABLE as $table;
    };
}

#[cfg(target_arch = "x86_64")]
kernels_for!(AVX512, avx512, "avx512", std::arch::x86_64::__m512, "avx512f", rows: [1 2 3 4 5 6 7 8 9 10 11 12 13 14]);
#[cfg(target_arch = "x86_64")]
kernels_for!(AVX2, avx2, "avx2", std::arch::x86_64::__m256, "avx2,fma", rows: [1 2 3 4 5 6]);
kernels_for!(PORTABLE, portable, "portable", Portable, , rows: [1 2 3 4]);
