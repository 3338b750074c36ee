//! Random numbers ("libcurand"). Others than those of the library.

use std::ffi::c_uint;

use crate::driver::{call, create, destroy, later};
use crate::memory::MEMORY;
use crate::queue::{Code, Failure};

struct Generator {
    stream: u64,
    seed: u64,
    given: u64,
}

#[unsafe(no_mangle)]
unsafe extern "C" fn curandCreateGenerator(generator: *mut *mut Generator, _kind: c_uint) -> u32 {
    unsafe { create(generator, Generator { stream: 0, seed: 0, given: 0 }) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn curandDestroyGenerator(generator: *mut Generator) -> u32 {
    unsafe { destroy(generator) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn curandSetStream(generator: *mut Generator, stream: u64) -> u32 {
    unsafe { (*generator).stream = stream };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn curandSetPseudoRandomGeneratorSeed(
    generator: *mut Generator,
    seed: u64,
) -> u32 {
    unsafe { (*generator).seed = seed };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn curandSetGeneratorOffset(generator: *mut Generator, offset: u64) -> u32 {
    unsafe { (*generator).given = offset };
    0
}

/// In (0, 1].
fn uniform(seed: u64, at: u64) -> f64 {
    // splitmix64.
    let mut x = seed.wrapping_add(at.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64 + f64::EPSILON / 2.
}

/// Of a standard normal distribution.
fn normal(seed: u64, at: u64) -> f64 {
    let (radius, angle) = (uniform(seed, at & !1), uniform(seed, at | 1));
    let (sine, cosine) = (std::f64::consts::TAU * angle).sin_cos();
    (-2. * radius.ln()).sqrt() * if at & 1 == 0 { cosine } else { sine }
}

/// Has numbers written: `make` of a seed and a place.
///
/// # Safety
///
/// The generator is one.
unsafe fn generate<T: Copy + 'static>(
    generator: *mut Generator,
    to: u64,
    len: usize,
    make: impl Fn(u64, u64) -> T + Send + Sync + 'static,
) -> u32 {
    call("curandGenerate", |world| {
        let Generator { stream, seed, given } = unsafe { &mut *generator };
        let (seed, first) = (*seed, *given);
        *given += len as u64;
        later(world, *stream, move || {
            let to = MEMORY.slice_mut::<T>(to, len, "random numbers")?;
            for (to, at) in to.iter_mut().zip(first..) {
                *to = make(seed, at);
            }
            Ok(())
        })
    })
}

/// The library makes normal numbers in pairs.
fn is_even(len: usize) -> Result<(), u32> {
    if len.is_multiple_of(2) {
        return Ok(());
    }
    let odd = |_: &mut crate::queue::World| {
        Err(Failure::new(Code(105), "an odd number of normal numbers"))
    };
    Err(call("curandGenerateNormal", odd))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn curandGenerateUniform(generator: *mut Generator, to: u64, len: usize) -> u32 {
    unsafe { generate(generator, to, len, |seed, at| uniform(seed, at) as f32) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn curandGenerateUniformDouble(
    generator: *mut Generator,
    to: u64,
    len: usize,
) -> u32 {
    unsafe { generate(generator, to, len, uniform) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn curandGenerateNormal(
    generator: *mut Generator,
    to: u64,
    len: usize,
    mean: f32,
    deviation: f32,
) -> u32 {
    match is_even(len) {
        Ok(()) => unsafe {
            generate(generator, to, len, move |seed, at| mean + deviation * normal(seed, at) as f32)
        },
        Err(code) => code,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn curandGenerateNormalDouble(
    generator: *mut Generator,
    to: u64,
    len: usize,
    mean: f64,
    deviation: f64,
) -> u32 {
    match is_even(len) {
        Ok(()) => unsafe {
            generate(generator, to, len, move |seed, at| mean + deviation * normal(seed, at))
        },
        Err(code) => code,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::tests::{download, upload};

    #[test]
    fn numbers_go_on_from_call_to_call_and_start_anew_from_a_seed() {
        let (to, len) = (upload(&[0f32; 4000]), 4000);
        let draw = |generator| unsafe {
            assert_eq!(curandGenerateUniform(generator, to, len), 0);
            download::<f32>(to, len)
        };
        let make = || unsafe {
            let mut generator = std::ptr::null_mut();
            curandCreateGenerator(&raw mut generator, 100);
            curandSetStream(generator, 2);
            curandSetPseudoRandomGeneratorSeed(generator, 7);
            generator
        };
        let (one, other) = (make(), make());
        let (first, second) = (draw(one), draw(one));
        assert_ne!(first, second);
        assert_eq!((draw(other), draw(other)), (first.clone(), second));
        assert!(first.iter().all(|&x| x > 0. && x <= 1.));
        let mean = first.iter().sum::<f32>() / len as f32;
        assert!((mean - 0.5).abs() < 0.02, "{mean}");
        unsafe {
            assert_eq!(curandGenerateNormal(one, to, len, 3., 2.), 0);
            let normal = download::<f32>(to, len);
            let mean = normal.iter().sum::<f32>() / len as f32;
            let variance = normal.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / len as f32;
            assert!((mean - 3.).abs() < 0.15 && (variance - 4.).abs() < 0.4, "{mean}, {variance}");
            assert_eq!(curandGenerateNormal(one, to, 3, 0., 1.), 105);
            curandDestroyGenerator(one);
            curandDestroyGenerator(other);
        }
    }
}
