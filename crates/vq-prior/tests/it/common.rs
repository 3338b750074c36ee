//! Small priors of both kinds, and codes for them.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};
use vq_ops::{AdamWStep, adamw_step};
use vq_prior::{
    ConditionerConfig, Conditions, Config, GridConfig, Network, PixelCnnConfig, Prior, Training,
    TransformerConfig,
};

pub(crate) fn pixelcnn(attention_every: usize) -> Network {
    Network::PixelCnn(PixelCnnConfig {
        channels: 8,
        layers: 4,
        first_kernel: 5,
        kernel: 3,
        skip_channels: 6,
        attention_every,
        heads: 2,
    })
}

pub(crate) fn transformer() -> Network {
    Network::Transformer(TransformerConfig { channels: 8, layers: 2, heads: 2, mlp_hidden: 12 })
}

/// One code per position, nothing that it is conditioned on.
pub(crate) fn plain(network: Network, grid: [usize; 2]) -> Config {
    Config {
        grid,
        codebook_sizes: vec![7],
        head_hidden: 10,
        dropout: 0.0,
        label_dropout: 0.0,
        conditioner: ConditionerConfig { channels: 4, residual_blocks: 1, heads: 2 },
        network,
        ..Config::default()
    }
}

/// Three codes per position, classes, and two levels above, on a grid that is not square.
pub(crate) fn rich(network: Network) -> Config {
    Config {
        codebook_sizes: vec![5, 7, 3],
        class_count: 3,
        conditioning: vec![
            GridConfig { grid: [2, 3], codebook_sizes: vec![6] },
            GridConfig { grid: [2, 1], codebook_sizes: vec![4, 2] },
        ],
        ..plain(network, [4, 6])
    }
}

/// Every kind, with and without all that can be added, and grids of several shapes.
pub(crate) fn all_kinds() -> Vec<(&'static str, Config)> {
    vec![
        ("pixelcnn", plain(pixelcnn(0), [4, 6])),
        ("pixelcnn with attention", plain(pixelcnn(2), [5, 3])),
        ("pixelcnn, rich", rich(pixelcnn(0))),
        ("pixelcnn with attention, rich", rich(pixelcnn(2))),
        ("pixelcnn, one row", plain(pixelcnn(0), [1, 5])),
        ("pixelcnn, one column", plain(pixelcnn(0), [5, 1])),
        ("transformer", plain(transformer(), [3, 5])),
        ("transformer, rich", rich(transformer())),
    ]
}

/// Numbers below `below` that look random: multiples of the golden ratio's digits.
pub(crate) fn numbers(count: usize, below: &[usize], seed: u64) -> Vec<u32> {
    let number = |i: usize| {
        let hash = (i as u64 + 1).wrapping_add(seed << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let hash = (hash ^ (hash >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 33;
        (hash % below[i % below.len()] as u64) as u32
    };
    (0..count).map(number).collect()
}

pub(crate) fn grid_of_codes(grid: [usize; 2], sizes: &[usize], batch: usize, seed: u64) -> Tensor {
    let [h, w] = grid;
    let values = numbers(batch * h * w * sizes.len(), sizes, seed);
    Tensor::from_vec(values, (batch, h, w, sizes.len()), &Device::Cpu).unwrap()
}

/// Codes with the conditions that go with them.
pub(crate) struct Data {
    pub(crate) codes: Tensor,
    pub(crate) labels: Option<Tensor>,
    pub(crate) grids: Vec<Tensor>,
}

impl Data {
    pub(crate) fn new(config: &Config, batch: usize, seed: u64) -> Self {
        let labels = (config.class_count > 0).then(|| {
            let labels = numbers(batch, &[config.class_count], seed + 1);
            Tensor::from_vec(labels, batch, &Device::Cpu).unwrap()
        });
        let grids = config.conditioning.iter().enumerate();
        let grids = grids.map(|(index, level)| {
            grid_of_codes(level.grid, &level.codebook_sizes, batch, seed + 2 + index as u64)
        });
        Self {
            codes: grid_of_codes(config.grid, &config.codebook_sizes, batch, seed),
            labels,
            grids: grids.collect(),
        }
    }

    pub(crate) fn conditions(&self) -> Conditions<'_> {
        Conditions { labels: self.labels.as_ref(), conditioning: &self.grids }
    }
}

pub(crate) fn prior(config: &Config) -> Prior {
    Prior::new(config, 1, &Device::Cpu).unwrap()
}

pub(crate) fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// AdamW with its moments.
pub(crate) struct Optimizer {
    moments: BTreeMap<String, (Tensor, Tensor)>,
    step: u64,
}

impl Optimizer {
    pub(crate) fn new(parameters: &BTreeMap<String, Var>) -> Self {
        let zeros = |(name, var): (&String, &Var)| {
            (name.clone(), (var.zeros_like().unwrap(), var.zeros_like().unwrap()))
        };
        Self { moments: parameters.iter().map(zeros).collect(), step: 0 }
    }

    /// One step on a batch; the loss before it.
    pub(crate) fn step(&mut self, prior: &Prior, data: &Data, lr: f64) -> f32 {
        self.step += 1;
        let training = Training { seed: 3, step: self.step };
        let loss = prior.loss(&data.codes, &data.conditions(), training).unwrap();
        let gradients = loss.backward().unwrap();
        let settings = AdamWStep {
            lr,
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-8,
            weight_decay: 0.0,
            step: self.step,
            grad_scale: 1.0,
            ema_decay: None,
        };
        for (name, var) in prior.parameters() {
            if let Some(gradient) = gradients.get(var) {
                let (first, second) = &self.moments[name];
                let gradient = gradient.contiguous().unwrap();
                adamw_step(var.as_tensor(), &gradient, first, second, None, &settings).unwrap();
            }
        }
        loss.to_scalar().unwrap()
    }
}
