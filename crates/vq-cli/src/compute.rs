//! Where to compute.

use std::num::NonZeroUsize;
use std::path::Path;
use std::str::FromStr;

use candle_core::Device;
use candle_core::utils::{cuda_is_available, metal_is_available};
use clap::Args;
use vq_model::{Precision, VqVae};
use vq_train::load_model;

use crate::error::{Error, Result};

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Compute")]
pub(crate) struct ComputeArgs {
    /// auto, cpu, cuda, cuda:N or metal; auto takes CUDA, then Metal, then the CPU.
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    device: DeviceChoice,

    /// CPU threads; without it, one per core. Does not change the results.
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,

    /// f32 or bf16: the format of the convolutions' factors; sums and parameters are f32 in any case
    /// [default: f32, or in training the recipe's].
    #[arg(long, value_name = "FORMAT")]
    pub(crate) precision: Option<Precision>,

    /// On CUDA, take f32 convolutions in full; else their factors are rounded to TF32 (10 bits of mantissa).
    #[arg(long)]
    strict_f32: bool,
}

/// The help of `--precision` where priors compute beside the model.
pub(crate) const MODEL_PRECISION: &str = "f32 or bf16: the format of the factors of the model's convolutions, those \
    of the tokenizer that turns pictures into codes and back; priors compute in f32 in any case [default: f32]";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DeviceChoice {
    Auto,
    Cpu,
    Cuda(usize),
    Metal,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "metal" => Ok(Self::Metal),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|number| number.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| "use auto, cpu, cuda, cuda:N or metal".to_owned()),
        }
    }
}

impl ComputeArgs {
    /// Sets up the threads and opens the device.
    pub(crate) fn start(&self) -> Result<Device> {
        vq_ops::check_cpu_choice().map_err(Error::other)?;
        let threads = self.threads.map_or(0, NonZeroUsize::get);
        // This thread is one of the workers: with one thread more than cores, parts of every
        // operation would wait for each other.
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .use_current_thread()
            .build_global()
            .map_err(|error| Error::other(format!("cannot start the threads: {error}")))?;
        vq_ops::set_strict_f32(self.strict_f32);
        let device = match self.device {
            DeviceChoice::Cpu => Device::Cpu,
            DeviceChoice::Cuda(number) => cuda(number)?,
            DeviceChoice::Metal => metal()?,
            DeviceChoice::Auto => automatic(),
        };
        tracing::info!("computing on the {}", name(&device));
        let is_slow = self.precision.is_some_and(|precision| !precision.is_native());
        if device.is_cpu() && is_slow {
            tracing::warn!(
                "this CPU has no instructions for bf16 (AMX or AVX512-BF16): it is emulated, slower than f32"
            );
        }
        Ok(device)
    }
}

impl ComputeArgs {
    /// Loads a model to be used on `device` the way that is asked for.
    pub(crate) fn load(&self, path: &Path, device: &Device) -> Result<VqVae> {
        let mut model = load_model(path, device)?;
        model.set_precision(self.precision.unwrap_or_default());
        Ok(model)
    }
}

/// What computes on a device, as far as it decides on the last bit of a result: the program's version, the
/// device, and what tells its results from those of others of its kind. The parts are separated by `; `.
pub(crate) fn machine(device: &Device, precision: Precision) -> String {
    let program = format!("vq {}", env!("CARGO_PKG_VERSION"));
    match device {
        Device::Cpu => format!("{program}; cpu {}", precision.kernels()),
        Device::Cuda(_) => {
            let name = vq_ops::gpu_name(device).unwrap_or_else(|| "of unknown name".to_owned());
            let factors = if vq_ops::is_strict_f32() { "strict f32" } else { "TF32" };
            format!("{program}; cuda {name}; {factors}")
        }
        Device::Metal(_) => format!("{program}; metal"),
    }
}

/// How to call a device in a report.
pub(crate) fn name(device: &Device) -> String {
    match device {
        Device::Cpu => format!("CPU, {} threads", rayon::current_num_threads()),
        Device::Cuda(_) => "CUDA".to_owned(),
        Device::Metal(_) => "Metal".to_owned(),
    }
}

fn automatic() -> Device {
    let mut problem = None;
    for (is_built, open) in
        [(cuda_is_available(), cuda as fn(usize) -> _), (metal_is_available(), |_| metal())]
    {
        if is_built {
            match open(0) {
                Ok(device) => return device,
                Err(error) => problem = Some(error),
            }
        }
    }
    if let Some(error) = problem {
        tracing::warn!("computing on the CPU: {}", error.one_line());
    }
    Device::Cpu
}

fn cuda(number: usize) -> Result<Device> {
    if !cuda_is_available() {
        return Err(not_built("CUDA", "cuda"));
    }
    vq_ops::open_cuda(number).map_err(|error| unusable(&format!("CUDA device {number}"), &error))
}

fn metal() -> Result<Device> {
    if !metal_is_available() {
        return Err(not_built("Metal", "metal"));
    }
    vq_ops::open_metal().map_err(|error| unusable("the Metal device", &error))
}

fn not_built(name: &str, feature: &str) -> Error {
    Error::other(format!(
        "this build has no {name}: build it with `cargo build --release -p vq-cli --features {feature}`, or \
         use --device cpu"
    ))
}

fn unusable(name: &str, error: &candle_core::Error) -> Error {
    Error::other(format!(
        "cannot use {name}: {error}; are its driver and libraries installed and found (LD_LIBRARY_PATH)? Or \
         use --device cpu"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_its_program_and_its_kernels() {
        let machine = machine(&Device::Cpu, Precision::F32);
        let (program, kernels) = machine.split_once("; ").unwrap();
        assert_eq!(program, format!("vq {}", env!("CARGO_PKG_VERSION")));
        assert_eq!(kernels, format!("cpu {}", Precision::F32.kernels()));
    }

    #[test]
    fn devices_are_told_apart() {
        assert_eq!("cuda:3".parse(), Ok(DeviceChoice::Cuda(3)));
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
        for text in ["", "gpu", "cuda:", "cuda:x", "metal:0"] {
            assert!(text.parse::<DeviceChoice>().is_err(), "{text}");
        }
    }
}
