//! The loss of a tokenizer.

use candle_core::{Device, Tensor};
use vq_model::{Decoded, Normalization, Output};
use vq_ops::{scaled_squared_error, weighted_sum};

use crate::{Figures, Result, TrainConfig};

/// L = reconstruction + codebook + β·commitment (van den Oord et al. 2017, eq. 3), and the quantizers'
/// entropy losses, which bring their own weights, where there are any.
///
/// The first three are means: the reconstruction error over B·C·H·W, the other two over B·h·w·D. The
/// reconstruction error is taken in pixels' units of [0, 1] and divided by the variance of the
/// training pixels in the same units (as in Sonnet), or, without that, taken in the model's range. Of a
/// model with a likelihood the first is −ln p(x|z) instead, in nats per dimension.
#[derive(Clone, Debug)]
pub(crate) struct Loss {
    beta: f64,
    l1: f64,
    scale: Scale,
}

/// Factor on an error in the model's range, before it is squared.
#[derive(Clone, Debug)]
enum Scale {
    Uniform(f64),
    /// `[1,C,1,1]`
    PerChannel(Tensor),
}

impl Loss {
    /// `variance` is that of the training pixels in [0, 1].
    pub(crate) fn new(
        config: &TrainConfig,
        normalization: &Normalization,
        variance: f64,
        device: &Device,
    ) -> Result<Self> {
        // A constant data set has no variance to divide by.
        let deviation = if variance > 0.0 { variance.sqrt() } else { 1.0 };
        let factors: Vec<f64> =
            normalization.std.iter().map(|&std| f64::from(std) / deviation).collect();
        let first = factors.first().copied().unwrap_or(1.0);
        let scale = if !config.normalize_by_variance {
            Scale::Uniform(1.0)
        } else if factors.iter().all(|factor| (factor - first).abs() <= f64::EPSILON * first) {
            Scale::Uniform(first)
        } else {
            let factors: Vec<f32> = factors.iter().map(|&factor| factor as f32).collect();
            Scale::PerChannel(Tensor::from_slice(&factors, (1, factors.len(), 1, 1), device)?)
        };
        Ok(Self { beta: config.beta, l1: config.l1, scale })
    }

    /// The loss (a scalar) and its terms for images `[B,C,H,W]` in the model's range.
    pub(crate) fn of(&self, output: &Output, images: &Tensor) -> Result<(Tensor, Figures)> {
        let reconstruction = match &output.nats {
            Some(nats) => (nats.mean_all()? / images.dim(1)? as f64)?,
            None => self.reconstruction(output, images)?,
        };
        let mut loss = weighted_sum([
            (&reconstruction, 1.0),
            (&output.codebook_loss, 1.0),
            (&output.commitment_loss, self.beta),
        ])?;
        if let Some(entropy) = &output.entropy_loss {
            loss = (loss + entropy)?;
        }
        let mut figures = Figures::new()
            .with("loss", &loss)
            .with("reconstruction", &reconstruction)
            .with("codebook", &output.codebook_loss)
            .with("commitment", &output.commitment_loss);
        if let Some(entropy) = &output.entropy_loss {
            figures = figures.with("entropy", entropy);
        }
        Ok((loss, figures))
    }

    fn reconstruction(&self, output: &Output, images: &Tensor) -> Result<Tensor> {
        if let (Scale::Uniform(factor), Decoded::Map(decoded)) = (&self.scale, &output.decoded)
            && self.l1 == 0.0
        {
            return Ok(decoded.image_error(images, factor * factor)?);
        }
        let reconstruction = output.reconstruction()?;
        // A uniform factor is cheaper on the scalar.
        let (a, b, factor) = match &self.scale {
            Scale::Uniform(factor) => (reconstruction, images.clone(), *factor),
            Scale::PerChannel(factors) => {
                (reconstruction.broadcast_mul(factors)?, images.broadcast_mul(factors)?, 1.0)
            }
        };
        let squared = scaled_squared_error(&a, &b, factor * factor)?;
        if self.l1 == 0.0 {
            return Ok(squared);
        }
        Ok((squared + ((a - b)?.abs()?.mean_all()? * (factor * self.l1))?)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;
    use vq_model::Codes;

    use super::*;
    use crate::Metrics;

    fn output(reconstruction: &Tensor, codebook: f32, commitment: &Tensor) -> Output {
        let device = vq_ops::test_device();
        Output {
            decoded: Decoded::Map(vq_ops::channels_last(reconstruction).unwrap().into()),
            nats: None,
            codes: Codes { levels: Vec::new() },
            codebook_loss: Tensor::new(codebook, &device).unwrap(),
            commitment_loss: commitment.clone(),
            commitment_losses: Vec::new(),
            entropy_loss: None,
            z_e: Vec::new(),
        }
    }

    fn of(loss: &Loss, output: &Output, images: &Tensor) -> Result<(Tensor, Metrics)> {
        let (loss, figures) = loss.of(output, images)?;
        Ok((loss, figures.read()?.0))
    }

    /// Point 24: pixels and variance in the same units, whatever the model's range.
    #[test]
    fn the_normalised_error_does_not_depend_on_the_models_range() {
        let pixels: Vec<f32> = (0..48).map(|i| i as f32 / 47.0).collect();
        let wrong: Vec<f32> = pixels.iter().enumerate().map(|(i, p)| p + 0.01 * i as f32).collect();
        let mean = pixels.iter().sum::<f32>() / 48.0;
        let variance = f64::from(pixels.iter().map(|p| (p - mean).powi(2)).sum::<f32>() / 48.0);
        let expected =
            f64::from(pixels.iter().zip(&wrong).map(|(p, w)| (p - w).powi(2)).sum::<f32>() / 48.0)
                / variance;
        for normalization in [
            Normalization::uniform(3, 0.5, 1.0),
            Normalization::uniform(3, 0.5, 0.5),
            Normalization { mean: vec![0.4, 0.5, 0.6], std: vec![0.2, 0.3, 0.25] },
        ] {
            let tensor = |values: &[f32]| {
                let images =
                    Tensor::from_slice(values, (1, 3, 4, 4), &vq_ops::test_device()).unwrap();
                normalization.normalize(&images).unwrap()
            };
            let config = TrainConfig::default();
            let loss =
                Loss::new(&config, &normalization, variance, &vq_ops::test_device()).unwrap();
            let zero = Tensor::new(0f32, &vq_ops::test_device()).unwrap();
            let (_, terms) =
                of(&loss, &output(&tensor(&wrong), 0.0, &zero), &tensor(&pixels)).unwrap();
            let found = terms.get("reconstruction").unwrap();
            assert!((found / expected - 1.0).abs() < 1e-5, "{found} {expected}");
        }
    }

    /// Points 1 and 4: β multiplies the commitment, and it alone.
    #[test]
    fn beta_multiplies_the_commitment_alone() {
        let z = Var::new(3f32, &vq_ops::test_device()).unwrap();
        let images =
            Tensor::zeros((1, 3, 2, 2), candle_core::DType::F32, &vq_ops::test_device()).unwrap();
        let normalization = Normalization::default();
        for beta in [0.0, 0.25, 1.0] {
            let config =
                TrainConfig { beta, normalize_by_variance: false, ..TrainConfig::default() };
            let loss = Loss::new(&config, &normalization, 0.06, &vq_ops::test_device()).unwrap();
            let output = output(&(&images + 0.5).unwrap(), 2.0, z.as_tensor());
            let (loss, terms) = of(&loss, &output, &images).unwrap();
            let total = f64::from(loss.to_scalar::<f32>().unwrap());
            assert!((total - (0.25 + 2.0 + beta * 3.0)).abs() < 1e-6);
            assert_eq!(terms.get("commitment"), Some(3.0));
            // No gradient at all is candle's way of saying 0.
            let gradients = loss.backward().unwrap();
            let gradient = gradients.get(&z).map_or(0.0, |g| g.to_scalar::<f32>().unwrap());
            assert!((f64::from(gradient) - beta).abs() < 1e-7);
        }
    }

    #[test]
    fn the_entropy_loss_is_added_as_it_is_and_is_a_term_of_its_own() {
        let images =
            Tensor::zeros((1, 3, 2, 2), candle_core::DType::F32, &vq_ops::test_device()).unwrap();
        let config = TrainConfig { normalize_by_variance: false, ..TrainConfig::default() };
        let loss =
            Loss::new(&config, &Normalization::default(), 0.06, &vq_ops::test_device()).unwrap();
        let zero = Tensor::new(0f32, &vq_ops::test_device()).unwrap();
        let entropy = Var::new(-3f32, &vq_ops::test_device()).unwrap();
        let mut output = output(&images, 0.0, &zero);
        let (_, terms) = of(&loss, &output, &images).unwrap();
        assert_eq!(terms.get("entropy"), None);
        output.entropy_loss = Some(entropy.as_tensor().clone());
        let (total, terms) = of(&loss, &output, &images).unwrap();
        assert_eq!((terms.get("loss"), terms.get("entropy")), (Some(-3.0), Some(-3.0)));
        let gradients = total.backward().unwrap();
        let gradient = gradients.get(&entropy).unwrap().to_scalar::<f32>().unwrap();
        assert!((gradient - 1.0).abs() < 1e-7);
    }

    /// Of each image 2 × 2 positions of 3 channels.
    #[test]
    fn a_likelihood_is_in_nats_per_dimension() {
        let images =
            Tensor::zeros((2, 3, 2, 2), candle_core::DType::F32, &vq_ops::test_device()).unwrap();
        let config = TrainConfig { beta: 0.5, ..TrainConfig::default() };
        let loss =
            Loss::new(&config, &Normalization::default(), 0.06, &vq_ops::test_device()).unwrap();
        let four = Tensor::new(4f32, &vq_ops::test_device()).unwrap();
        let nats = Var::from_vec(
            vec![6f32, 12., 3., 3., 6., 6., 0., 12.],
            (2, 2, 2),
            &vq_ops::test_device(),
        );
        let nats = nats.unwrap();
        let output = Output {
            nats: Some(nats.as_tensor().clone()),
            ..output(&(&images + 0.5).unwrap(), 1.0, &four)
        };
        let (total, terms) = loss.of(&output, &images).unwrap();
        let terms = terms.read().unwrap().0;
        assert_eq!((terms.get("reconstruction"), terms.get("loss")), (Some(2.0), Some(5.0)));
        let gradients = total.backward().unwrap();
        let gradient = gradients.get(&nats).unwrap().flatten_all().unwrap();
        assert_eq!(gradient.to_vec1::<f32>().unwrap(), [1.0 / 24.0; 8]);
    }

    #[test]
    fn the_absolute_error_is_added_when_asked_for() {
        let images =
            Tensor::zeros((1, 3, 2, 2), candle_core::DType::F32, &vq_ops::test_device()).unwrap();
        let config = TrainConfig { l1: 2.0, ..TrainConfig::default() };
        let loss =
            Loss::new(&config, &Normalization::default(), 0.04, &vq_ops::test_device()).unwrap();
        let zero = Tensor::new(0f32, &vq_ops::test_device()).unwrap();
        let (_, terms) =
            of(&loss, &output(&(&images - 0.1).unwrap(), 0.0, &zero), &images).unwrap();
        // (0.1 / 0.2)² + 2·(0.1 / 0.2)
        assert!((terms.get("reconstruction").unwrap() - 1.25).abs() < 1e-5);
    }
}
