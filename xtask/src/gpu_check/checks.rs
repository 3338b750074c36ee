//! One operation on two devices.

use candle_core::{DType, Device, Result, Tensor, Var};

/// Numbers in [-1, 1), the same everywhere.
pub(super) fn noise(dims: &[usize], seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..dims.iter().product())
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.
        })
        .collect()
}

/// Compares an operation and its gradients on the device and on the CPU.
///
/// Each tensor's differences count relative to its largest value; the largest of them must be at most
/// `allowed`. Inputs are noise of these shapes.
pub(super) fn compare(
    device: &Device,
    inputs: &[&[usize]],
    allowed: f64,
    f: impl Fn(&[Tensor], &Device) -> Result<Tensor>,
) -> std::result::Result<String, String> {
    let run = |device: &Device| -> Result<Vec<Vec<f32>>> {
        let vars = inputs
            .iter()
            .zip(1u64..)
            .map(|(dims, seed)| {
                Var::from_tensor(&Tensor::from_vec(noise(dims, seed), *dims, device)?)
            })
            .collect::<Result<Vec<Var>>>()?;
        let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let y = f(&tensors, device)?;
        let weights = Tensor::from_vec(noise(y.dims(), 99), y.dims(), device)?;
        let gradients = (&y * weights)?.sum_all()?.backward()?;
        let values = |t: &Tensor| t.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>();
        let mut all = vec![values(&y)?];
        for var in &vars {
            all.push(gradients.get(var).map_or(Ok(Vec::new()), values)?);
        }
        Ok(all)
    };
    let (ours, theirs) = (run(device).map_err(text)?, run(&Device::Cpu).map_err(text)?);
    let worst = ours.iter().zip(&theirs).map(|(a, b)| difference(a, b)).fold(0., f64::max);
    within(worst, allowed)
}

/// The largest difference, relative to the largest value; infinite where the lengths differ or something
/// is not a number.
pub(super) fn difference(ours: &[f32], theirs: &[f32]) -> f64 {
    if ours.len() != theirs.len() {
        return f64::INFINITY;
    }
    let scale = theirs.iter().fold(0f64, |m, v| m.max(f64::from(v.abs()))).max(1e-30);
    ours.iter()
        .zip(theirs)
        .map(|(a, b)| f64::from(a - b).abs() / scale)
        .fold(0., |worst, error| if error.is_nan() { f64::INFINITY } else { worst.max(error) })
}

pub(super) fn within(worst: f64, allowed: f64) -> std::result::Result<String, String> {
    let found = format!("{worst:.1e} (allowed {allowed:.0e})");
    if worst <= allowed { Ok(found) } else { Err(found) }
}

/// Of something that is either right to the bit or `otherwise`.
pub(super) fn equal(found: Result<bool>, otherwise: &str) -> std::result::Result<String, String> {
    if found.map_err(text)? { Ok("equal".to_owned()) } else { Err(otherwise.to_owned()) }
}

pub(super) fn text(error: impl std::fmt::Display) -> String {
    // What follows are a backtrace's lines.
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
