//! CUDA's driver and libraries on the CPU: what a program asks of them that was built for CUDA is done by this
//! one, so that its tests run where there is no GPU. Kernels are run from their PTX, thread by thread, every access of
//! theirs is checked, and nothing is done before somebody waits for it.
//!
//! The library takes the place of libcuda, libcublas, libcurand, libcudnn and libnvrtc: `.ci/simulate-cuda` puts it
//! there. What it knows of them is what cudarc asks for, for candle and vq-ops.

// The interface is C's: handles were made by the call that makes them and are given back once, pointers are to what
// the declaration says. The caller vouches for that, and each block could only say so again.
#![allow(unsafe_code, non_snake_case, clippy::undocumented_unsafe_blocks)]

mod blas;
mod compiler;
mod dnn;
mod driver;
mod memory;
mod numbers;
// Floats are compared as PTX says, an access is aligned when it is made, and each instruction is an arm.
#[allow(
    clippy::float_cmp,
    clippy::neg_cmp_op_on_partial_ord,
    clippy::cast_ptr_alignment,
    clippy::too_many_lines
)]
pub mod ptx;
mod queue;
mod random;
