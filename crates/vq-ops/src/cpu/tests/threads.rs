//! The number of threads, on every instruction set.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Finish, Geometry, Output, bf16, geometry, large_to_small, noise, small_to_large};
use crate::Precision;
use crate::cpu::buffers::Buffers;
use crate::cpu::elements::Elements;
use crate::cpu::nearest::{nearest, statistics};
use crate::cpu::pack::Gather;
use crate::cpu::tile;
use crate::cpu::weight_gradient::{column_sums, weight_gradient};

/// Kernels of one instruction set.
#[derive(Clone, Copy)]
enum Chosen {
    F32(&'static tile::Kernels),
    Bf16(&'static bf16::kernels::Kernels),
}

impl Chosen {
    fn all() -> impl Iterator<Item = Self> {
        let f32 = tile::available().into_iter().map(Self::F32);
        f32.chain(bf16::kernels::available().into_iter().map(Self::Bf16))
    }

    fn name(self) -> String {
        match self {
            Self::F32(kernels) => format!("f32 {}", kernels.name),
            Self::Bf16(kernels) => format!("bf16 {}", kernels.name),
        }
    }

    fn precision(self) -> Precision {
        match self {
            Self::F32(_) => Precision::F32,
            Self::Bf16(_) => Precision::Bf16,
        }
    }

    /// Runs `work` with that many threads. Only the thread that calls the kernels knows the choice.
    fn run<R: Send>(self, threads: usize, work: impl FnOnce() -> R + Send) -> R {
        let set = |chosen: Option<Self>| match (self, chosen.is_some()) {
            (Self::F32(kernels), on) => tile::FORCED.set(on.then_some(kernels)),
            (Self::Bf16(kernels), on) => bf16::kernels::FORCED.set(on.then_some(kernels)),
        };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            set(Some(self));
            let result = work();
            set(None);
            result
        })
    }
}

/// Direct, with few channels (which scatters), by minimal filtering at both strides, and a product of pixels
/// alone: more than one chunk of everything.
fn geometries(precision: Precision) -> Vec<Geometry> {
    [
        ((100, 8, 8), (33, 17), 3, (1, 1, 1)),
        ((70, 16, 16), (3, 24), 4, (2, 1, 1)),
        ((40, 8, 8), (32, 48), 3, (1, 1, 1)),
        ((30, 16, 16), (48, 64), 4, (2, 1, 1)),
        ((100, 8, 8), (32, 64), 1, (1, 0, 1)),
    ]
    .into_iter()
    .filter_map(|(size, channels, kernel, steps)| {
        geometry(size, channels, (kernel, kernel), steps, precision)
    })
    .collect()
}

/// All that a layer computes, forward and backward.
fn convolutions(g: &Geometry) -> Vec<Vec<f32>> {
    let (large, small) = (noise(g.large.len(), 1), noise(g.small.len(), 2));
    let weight = noise(g.weight_len(), 3);
    let buffers = Buffers::default();
    let (x, y) = (Elements::F32(&large), Elements::F32(&small));
    let mut forward = vec![0.; small.len()];
    let to = Output::F32(&mut forward);
    large_to_small(g, x, true, &weight, Finish::default(), &buffers, to);
    let mut backward = vec![0.; large.len()];
    let to = Output::F32(&mut backward);
    small_to_large(g, y, true, &weight, Finish::default(), &buffers, to);
    let mut of_weight = vec![0.; weight.len()];
    weight_gradient(g, (x, false), (y, false), &buffers, &mut of_weight);
    let mut of_bias = vec![0.; g.small.channels];
    column_sums(y, g.small.channels, &mut of_bias);
    vec![forward, backward, of_weight, of_bias]
}

/// Codes and statistics; half of the vectors lie on a grid, where many distances tie.
fn codes() -> Vec<Vec<f32>> {
    let mut z = noise(1500 * 24, 4);
    let half = z.len() / 2;
    z[..half].iter_mut().for_each(|v| *v = (*v * 2.).round());
    let codebook: Vec<f32> = noise(700 * 24, 5).iter().map(|v| (v * 2.).round()).collect();
    let codes = nearest(&z, &codebook, 24).unwrap();
    let (counts, sums) = statistics(&z, &codes, 24, 700);
    vec![codes.iter().map(|code| *code as f32).collect(), counts, sums]
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let bits = |values: Vec<Vec<f32>>| -> Vec<u32> {
        values.into_iter().flatten().map(f32::to_bits).collect()
    };
    for chosen in Chosen::all() {
        for g in geometries(chosen.precision()) {
            let run = |threads| bits(chosen.run(threads, || convolutions(&g)));
            let one = run(1);
            assert!(one == run(2) && one == run(3), "{} {g:?}", chosen.name());
        }
        let run = |threads| bits(chosen.run(threads, codes));
        let one = run(1);
        assert!(one == run(2) && one == run(3), "{}", chosen.name());
    }
}

/// Calls of [`counting`]'s kernels.
static CALLS: AtomicUsize = AtomicUsize::new(0);

/// The least kernels, counted.
#[allow(unsafe_code)]
fn counting() -> &'static bf16::kernels::Kernels {
    fn least() -> &'static bf16::kernels::Kernels {
        bf16::kernels::available().pop().unwrap()
    }
    unsafe fn product(job: &bf16::kernels::Product) {
        CALLS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { (least().product)(job) }
    }
    unsafe fn gather(job: Gather<'_, u16>) {
        CALLS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { (least().gather)(job) }
    }
    unsafe fn add(from: *const f32, to: *mut f32, count: usize) {
        CALLS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { (least().add)(from, to, count) }
    }
    unsafe fn store(job: &bf16::kernels::Store) {
        CALLS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { (least().store)(job) }
    }
    Box::leak(Box::new(bf16::kernels::Kernels { product, store, add, gather, ..*least() }))
}

/// A task on another thread that asked for kernels of its own would get those of the CPU, and not be counted.
#[test]
fn all_threads_use_the_kernels_that_were_chosen() {
    let chosen = Chosen::Bf16(counting());
    for g in geometries(Precision::Bf16) {
        let [one, three] = [1, 3].map(|threads| {
            CALLS.store(0, Ordering::Relaxed);
            chosen.run(threads, || convolutions(&g));
            CALLS.load(Ordering::Relaxed)
        });
        assert!(one > 0 && one == three, "{g:?}: {one} calls on one thread, {three} on three");
    }
}
