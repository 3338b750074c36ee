//! Training steps of the priors' default networks, by the real loop.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use candle_core::{Device, Tensor, Var};
use vq_prior::{Conditions, Config, Network, PixelCnnConfig, Prior, Training, TransformerConfig};
use vq_train::{Evaluation, Figures, Forward, TrainConfig, Trainable, Trainer, Update};

use super::worker::{Gate, Result};

/// Images a step.
pub(super) const BATCH: usize = 64;
const GRID: [usize; 2] = [8, 8];
const CODES: usize = 512;
const CLASSES: usize = 10;

/// A prior that learns the same random codes in every step.
struct RandomCodes {
    prior: Prior,
    /// `[BATCH, h, w]` u32.
    codes: Tensor,
    /// `[BATCH]` u32.
    labels: Tensor,
}

impl Trainable for RandomCodes {
    type Batch = ();
    type Residue = ();

    fn batches_per_epoch(&self) -> usize {
        1 << 20
    }

    fn batches(
        &self,
        _: u64,
        first: usize,
    ) -> Box<dyn Iterator<Item = vq_train::Result<()>> + Send> {
        Box::new((first..self.batches_per_epoch()).map(|_| Ok(())))
    }

    fn parameters(&self) -> &BTreeMap<String, Var> {
        self.prior.parameters()
    }

    fn decays(&self, _: &str, _: &Var) -> bool {
        true
    }

    fn prepare(&mut self, _: &AtomicBool) -> vq_train::Result<bool> {
        Ok(true)
    }

    fn forward(&self, (): &(), step: u64) -> vq_train::Result<Forward<()>> {
        let conditions = Conditions { labels: Some(&self.labels), conditioning: &[] };
        let loss = self.prior.loss(&self.codes, &conditions, Training { seed: 0, step })?;
        let figures = Figures::new().with("loss", &loss);
        Ok(Forward { loss, figures, examples: BATCH, residue: () })
    }

    fn update(&mut self, (): (), _: u64) -> vq_train::Result<Update> {
        Ok(Update::default())
    }

    fn evaluate(&self, _: &AtomicBool) -> vq_train::Result<Option<Evaluation>> {
        Ok(None)
    }

    fn save(&self, folder: &Path) -> vq_train::Result<()> {
        Ok(self.prior.save(folder)?)
    }

    fn load(&mut self, _: &Path) -> vq_train::Result<()> {
        Ok(())
    }
}

/// Trains the network of that kind, held between the measured pieces.
pub(super) fn train(kind: &str) -> Result<()> {
    let network = match kind {
        "pixelcnn" => Network::PixelCnn(PixelCnnConfig::default()),
        "transformer" => Network::Transformer(TransformerConfig::default()),
        other => return Err(format!("no such prior: {other}").into()),
    };
    let config = Config {
        grid: GRID,
        codebook_sizes: vec![CODES],
        class_count: CLASSES,
        dropout: 0.1,
        network,
        ..Config::default()
    };
    let count = BATCH * GRID[0] * GRID[1];
    let mut state = 1u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as u32 % below as u32
    };
    let codes = (0..count).map(|_| random(CODES)).collect();
    let labels = (0..BATCH).map(|_| random(CLASSES)).collect();
    let task = RandomCodes {
        prior: Prior::new(&config, 0, &Device::Cpu)?,
        codes: Tensor::from_vec(codes, (BATCH, GRID[0], GRID[1]), &Device::Cpu)?,
        labels: Tensor::from_vec(labels, BATCH, &Device::Cpu)?,
    };
    let settings = TrainConfig { grad_clip: 0., weight_ema: 0., ..TrainConfig::default() };
    let folder = std::env::temp_dir().join(format!("vq-bench-{}", std::process::id()));
    Trainer::new(task, &settings, folder)?.with_observer(Gate::new(BATCH)).run()?;
    Ok(())
}
