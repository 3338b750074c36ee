//! In which numbers products are taken.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The format of a convolution's factors. Sums, biases, what lies between the layers, parameters and
/// their gradients are f32 in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Both factors in f32; on CUDA in TF32 (f32 with 10 bits of mantissa, as PyTorch's convolutions), unless
    /// [`set_strict_f32`](crate::set_strict_f32) says otherwise.
    #[default]
    F32,
    /// Both factors rounded to bfloat16 (8 bits of mantissa, ties to even), products exact, sums in
    /// f32, forward and backward. On x86-64 by AMX or AVX512-BF16 where the CPU has them; emulated
    /// elsewhere, with the same results but for rounding, and slower than f32. Numbers below f32's
    /// normal range (10⁻³⁸) may count as zero. On CUDA by its tensor cores, and there what lies between the
    /// layers of a [`Stack`](crate::Stack), and between stacks as a [`FeatureMap`](crate::FeatureMap), is bfloat16
    /// too, with its gradients.
    Bf16,
}

impl Precision {
    /// Whether this CPU multiplies in that format by instructions of its own.
    pub fn is_native(self) -> bool {
        match self {
            Self::F32 => true,
            Self::Bf16 => crate::cpu::bf16::is_native(),
        }
    }

    /// Name of the instruction set that convolutions on this CPU use, as in `VQ_CPU`. The same names
    /// compute the same numbers.
    pub fn kernels(self) -> &'static str {
        match self {
            Self::F32 => crate::cpu::tile::kernels().name,
            Self::Bf16 => crate::cpu::bf16::kernels::kernels().name,
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            _ => Err("use f32 or bf16".to_owned()),
        }
    }
}

/// What is wrong with the environment variable `VQ_CPU`, which names the instruction set that the CPU
/// kernels use (`amx`, `avx512bf16`, `avx512`, `avx2` or `portable`): a name that does not exist, which the
/// kernels ignore, or one that this CPU does not have, for which they take the best below it.
pub fn check_cpu_choice() -> Result<(), String> {
    crate::cpu::choice::check()
}
