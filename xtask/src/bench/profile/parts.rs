//! What a training step does beside its convolutions.

use candle_core::{Device, Tensor, Var};
use vq_data::{Loader, LoaderOptions, Normalization};
use vq_model::{CodebookUpdate, Codes, VqVae};
use vq_ops::{
    AdamWSlot, AdamWStep, adamw_steps, channels_first, channels_last, nearest_codes, replace_value,
    squared_error, sum_of_squares,
};

use super::{Peaks, Row, Work, median};
use crate::bench::worker::{BATCH, Result, noise_images, standard};

/// Code vectors in the codebook, and elements of each.
const CODEBOOK: (usize, usize) = (512, 64);
/// Vectors that a step quantizes.
const VECTORS: usize = BATCH * 64;

/// Everything that can be timed by itself.
pub(super) fn measure(peaks: &mut Peaks) -> Result<Vec<Row>> {
    peaks.sample()?;
    let model = VqVae::new(&standard(), 0, &Device::Cpu)?;
    let parameters: Vec<Var> = model.parameters().values().cloned().collect();
    let elements: usize = parameters.iter().map(|var| var.elem_count()).sum();
    let z = random(&[VECTORS, CODEBOOK.1])?;
    let codebook = random(&[CODEBOOK.0, CODEBOOK.1])?;
    let codes = nearest_codes(&z, &codebook)?;
    let search = median(|| Ok(()), |()| nearest_codes(&z, &codebook).map(drop))?;
    let operations = (2 * VECTORS * CODEBOOK.0 * CODEBOOK.1) as f64;
    let rows = [
        ("search of the nearest of 512 codes, 8,192 × 64", search, Work::F32Products(operations)),
        (
            "lookup, straight-through, codebook and commitment loss",
            quantizer(&z, &codebook, &codes)?,
            Work::Other,
        ),
        ("reconstruction loss", reconstruction_loss()?, Work::Other),
        ("images to channels-last and back", layouts()?, Work::Other),
        (
            "parameters side by side, and their gradients apart",
            concatenation(&parameters)?,
            Work::Other,
        ),
        (
            "norm of the gradients, for clipping",
            clipping(&parameters)?,
            Work::Bytes((4 * elements) as f64),
        ),
        // Three tensors are read and written, the gradient is read.
        ("AdamW", adamw(&parameters)?, Work::Bytes((28 * elements) as f64)),
        ("usage of the codes", usage(&model, &z, &codes)?, Work::Other),
    ];
    Ok(rows
        .into_iter()
        .map(|(operation, milliseconds, work)| Row {
            operation: operation.to_owned(),
            times: 1,
            milliseconds: [milliseconds; 2],
            work,
        })
        .collect())
}

/// A batch of the images that the measured steps train on.
pub(super) fn loader() -> Result<f64> {
    let options = LoaderOptions { batch_size: BATCH, prefetch: 0, ..LoaderOptions::default() };
    let images = noise_images()?;
    let loader = Loader::new(images, Normalization::identity(3), options)?;
    let mut batches = loader.epoch(0, 0);
    let failed = |text: String| candle_core::Error::Msg(text);
    median(
        || Ok(()),
        |()| match batches.next() {
            Some(batch) => batch.map(drop).map_err(|error| failed(error.to_string())),
            None => Err(failed("the epoch is too short".to_owned())),
        },
    )
}

fn quantizer(z: &Tensor, codebook: &Tensor, codes: &Tensor) -> Result<f64> {
    let (z, codebook) = (Var::from_tensor(z)?, Var::from_tensor(codebook)?);
    median(
        || Ok(()),
        |()| {
            let e = codebook.index_select(codes, 0)?;
            let of_codebook = squared_error(&z.detach(), &e)?;
            let e = e.detach();
            replace_value(&z, &e)?;
            let commitment = squared_error(&z, &e)?;
            (of_codebook + (commitment * 0.25)?)?.backward().map(drop)
        },
    )
}

fn reconstruction_loss() -> Result<f64> {
    let shape = [BATCH, 3, 32, 32];
    let (reconstruction, images) = (Var::from_tensor(&random(&shape)?)?, random(&shape)?);
    median(
        || Ok(()),
        |()| {
            let loss = (squared_error(&reconstruction, &images)? * 16.)?;
            loss.backward().map(drop)
        },
    )
}

/// The images on their way in, the reconstruction on its way out, and its gradient.
fn layouts() -> Result<f64> {
    let images = random(&[BATCH, 3, 32, 32])?;
    let reconstruction = random(&[BATCH, 32, 32, 3])?;
    median(
        || Ok(()),
        |()| {
            channels_last(&images)?;
            channels_first(&reconstruction)?;
            channels_last(&images).map(drop)
        },
    )
}

/// What a stack does to its parameters before its operation and to their gradient behind it.
fn concatenation(parameters: &[Var]) -> Result<f64> {
    median(
        || Ok(()),
        |()| {
            let flat: Vec<Tensor> = parameters
                .iter()
                .map(|var| var.flatten_all())
                .collect::<candle_core::Result<_>>()?;
            Tensor::cat(&flat, 0)?.backward().map(drop)
        },
    )
}

fn clipping(parameters: &[Var]) -> Result<f64> {
    median(|| Ok(()), |()| parameters.iter().try_for_each(|var| sum_of_squares(var).map(drop)))
}

fn adamw(parameters: &[Var]) -> Result<f64> {
    let step = AdamWStep {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.,
        step: 1,
        grad_scale: 1.,
        ema_decay: None,
    };
    let mut states = Vec::new();
    for var in parameters {
        let gradient = random(var.dims())?;
        states.push((var, gradient, var.zeros_like()?, var.zeros_like()?));
    }
    let slots: Vec<AdamWSlot<'_>> = states
        .iter()
        .map(|(param, grad, first_moment, second_moment)| AdamWSlot {
            param: param.as_tensor(),
            grad,
            first_moment,
            second_moment,
            ema: None,
            decays: true,
        })
        .collect();
    median(|| Ok(()), |()| adamw_steps(&slots, &step, None))
}

/// What the trainer does to the codebook after the optimizer's step.
fn usage(model: &VqVae, z: &Tensor, codes: &Tensor) -> Result<f64> {
    let z = z.reshape((BATCH, 8, 8, CODEBOOK.1))?;
    let codes = Codes { levels: vec![codes.reshape((BATCH, 8, 8))?] };
    let options = CodebookUpdate { revive_threshold: 0., seed: 0 };
    median(
        || Ok(()),
        |()| {
            let updated = model.update_codebooks(std::slice::from_ref(&z), &codes, &options, 1);
            updated.map(drop).map_err(|error| candle_core::Error::Msg(error.to_string()))
        },
    )
}

fn random(shape: &[usize]) -> candle_core::Result<Tensor> {
    Tensor::rand(-1f32, 1., shape, &Device::Cpu)
}
