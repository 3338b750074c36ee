//! The prior: network, loss, likelihood, and its folder.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor, Var};
use vq_model::store::{assign, load_config, read_tensors, save_config, write_tensors};
use vq_model::{CONFIG_FILE, MODEL_FILE};
use vq_ops::cross_entropy;

use crate::conditioner::Conditioner;
use crate::head::Head;
use crate::inputs::{Told, check_codes};
use crate::layers::{Builder, Context, Mode};
use crate::pixelcnn::PixelCnn;
use crate::transformer::Transformer;
use crate::{Conditions, Config, Network, Result, Training, TrainingBatch};

/// p(codes of one level | class, codes of the levels above) as a product over positions in raster order.
///
/// A position's codes are predicted one after the other, each from all positions before and from the
/// codes before it at its own position.
#[derive(Debug)]
pub struct Prior {
    config: Config,
    device: Device,
    conditioner: Conditioner,
    pub(crate) trunk: Trunk,
    pub(crate) head: Head,
    parameters: BTreeMap<String, Var>,
}

#[derive(Debug)]
pub(crate) enum Trunk {
    PixelCnn(PixelCnn),
    Transformer(Transformer),
}

impl Prior {
    /// A prior with fresh parameters. They depend on `seed` and on each parameter's name alone.
    pub fn new(config: &Config, seed: u64, device: &Device) -> Result<Self> {
        config.validate()?;
        let mut builder = Builder::new(seed, device);
        let (trunk, features) = match &config.network {
            Network::PixelCnn(network) => (
                Trunk::PixelCnn(PixelCnn::new(config, network, &mut builder)?),
                network.skip_channels,
            ),
            Network::Transformer(network) => (
                Trunk::Transformer(Transformer::new(config, network, &mut builder)?),
                network.channels,
            ),
        };
        let conditioner = Conditioner::new(config, &mut builder)?;
        let head = Head::new(config, features, &mut builder)?;
        let (config, device) = (config.clone(), device.clone());
        Ok(Self { config, device, conditioner, trunk, head, parameters: builder.parameters })
    }

    /// The architecture.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where the prior computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What the optimizer trains, by name.
    pub fn parameters(&self) -> &BTreeMap<String, Var> {
        &self.parameters
    }

    /// Unnormalised log-probabilities of every code: codes `[B,h,w]` or `[B,h,w,G]` → `[B,h,w,G,K]`, with
    /// −∞ behind the K of a code whose codebook is smaller than the largest. Differentiable; no dropout.
    pub fn logits(&self, codes: &Tensor, conditions: &Conditions) -> Result<Tensor> {
        let mode = Mode { tracked: true, ..Mode::EVALUATE };
        let (codes, context) = self.check(codes, conditions, mode)?;
        let largest = self.config.codebook_sizes.iter().copied().max().unwrap_or(0);
        let mut all = Vec::new();
        for logits in self.forward(&codes, &context, mode)? {
            let (b, h, w, k) = logits.dims4()?;
            let logits = if k < largest {
                let rest =
                    Tensor::full(f32::NEG_INFINITY, (b, h, w, largest - k), logits.device())?;
                Tensor::cat(&[&logits, &rest], 3)?
            } else {
                logits
            };
            all.push(logits.unsqueeze(3)?);
        }
        Ok(Tensor::cat(&all, 3)?)
    }

    /// The loss of a training step, a scalar: −ln p in nats per code, a mean over B·h·w·G, with dropout
    /// and with labels dropped. Differentiable.
    pub fn loss(
        &self,
        codes: &Tensor,
        conditions: &Conditions,
        training: Training,
    ) -> Result<Tensor> {
        self.loss_of(&TrainingBatch::new(&self.config, codes, conditions, training, &self.device)?)
    }

    /// [`loss`](Self::loss) of a batch that was made for this prior's architecture and device.
    pub fn loss_of(&self, batch: &TrainingBatch) -> Result<Tensor> {
        let (mode, codes) = (batch.mode(self.config.dropout), &batch.codes);
        let context = self.context(batch.told.clone(), mode)?;
        let mut sum: Option<Tensor> = None;
        let count = self.config.codes_per_position();
        for (index, logits) in self.forward(codes, &context, mode)?.iter().enumerate() {
            let targets = codes.narrow(3, index, 1)?.flatten_all()?.contiguous()?;
            let logits = logits.reshape(((), logits.dim(3)?))?;
            let nats = cross_entropy(&logits, &targets)?.mean_all()?;
            sum = Some(match sum {
                None => nats,
                Some(sum) => (sum + nats)?,
            });
        }
        let sum = sum.ok_or_else(|| crate::Error::config("codebook_sizes", "must not be empty"))?;
        Ok((sum / count as f64)?)
    }

    /// ln p(codes | conditions) of every image, in nats: the sum over all its codes, in f64 from
    /// log-softmax. Bits are −ln p / ln 2.
    pub fn log_likelihood(&self, codes: &Tensor, conditions: &Conditions) -> Result<Vec<f64>> {
        let mode = Mode::EVALUATE;
        let (codes, context) = self.check(codes, conditions, mode)?;
        let batch = codes.dim(0)?;
        let mut sums = vec![0.0; batch];
        for (index, logits) in self.forward(&codes, &context, mode)?.iter().enumerate() {
            let targets = codes.narrow(3, index, 1)?.flatten_all()?.to_vec1::<u32>()?;
            let size = logits.dim(3)?;
            let logits = logits.flatten_all()?.to_vec1::<f32>()?;
            let positions = targets.len() / batch;
            let images = logits.chunks(positions * size).zip(targets.chunks(positions));
            for (sum, (logits, targets)) in sums.iter_mut().zip(images) {
                for (logits, target) in logits.chunks(size).zip(targets) {
                    *sum += log_softmax(logits, *target as usize);
                }
            }
        }
        Ok(sums)
    }

    /// Reads the folder that [`save`](Self::save) wrote: `config.json` and `model.safetensors`.
    pub fn from_pretrained(folder: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let folder = folder.as_ref();
        let config = load_config(&folder.join(CONFIG_FILE), Config::validate)?;
        let prior = Self::new(&config, 0, device)?;
        let path = folder.join(MODEL_FILE);
        let tensors = read_tensors(&path)?;
        assign(&path.display().to_string(), &prior.parameters.iter().collect(), &tensors)?;
        Ok(prior)
    }

    /// Writes `config.json` and `model.safetensors` into `folder`, which is made if it is missing. Each
    /// file is written beside its place, synced and renamed. The same prior gives the same bytes.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        std::fs::create_dir_all(folder)
            .map_err(|source| crate::Error::Write { path: folder.to_path_buf(), source })?;
        let tensors = self.parameters.iter();
        let tensors = tensors.map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect();
        write_tensors(&folder.join(MODEL_FILE), &tensors)?;
        save_config(&folder.join(CONFIG_FILE), &self.config)
    }

    /// Codes `[B,h,w,G]` to the logits `[B,h,w,K]` of every code of a position.
    pub(crate) fn forward(
        &self,
        codes: &Tensor,
        context: &Context,
        mode: Mode,
    ) -> Result<Vec<Tensor>> {
        let features = match &self.trunk {
            Trunk::PixelCnn(network) => network.forward(codes, context, mode)?,
            Trunk::Transformer(network) => network.forward(codes, context, mode)?,
        };
        self.head.forward(&features, codes, mode)
    }

    /// What the network is told.
    fn context(&self, told: Told, mode: Mode) -> Result<Context> {
        Ok(Context { labels: told.labels, map: self.conditioner.forward(&told.grids, mode)? })
    }

    /// The same, from conditions for `batch` images.
    pub(crate) fn context_of(
        &self,
        conditions: &Conditions,
        batch: usize,
        mode: Mode,
    ) -> Result<Context> {
        self.context(Told::new(&self.config, conditions, batch, |label| label, &self.device)?, mode)
    }

    fn check(
        &self,
        codes: &Tensor,
        conditions: &Conditions,
        mode: Mode,
    ) -> Result<(Tensor, Context)> {
        let Config { grid, codebook_sizes, .. } = &self.config;
        let codes = check_codes("the codes", codes, *grid, codebook_sizes)?;
        let context = self.context_of(conditions, codes.dim(0)?, mode)?;
        Ok((codes.to_device(&self.device)?, context))
    }
}

/// ln softmax(logits)\[target\], in f64.
fn log_softmax(logits: &[f32], target: usize) -> f64 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |max, logit| max.max(*logit));
    let total: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    logits.get(target).map_or(f64::NEG_INFINITY, |logit| f64::from(logit - max) - total.ln())
}
