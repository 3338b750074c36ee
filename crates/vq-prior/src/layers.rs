//! What both networks are made of, and how parameters start.

use std::collections::BTreeMap;

use candle_core::{D, DType, Device, Tensor, Var};
use vq_model::Stream;
use vq_ops::{Conv2d, DropSeed, PackedLinear, conv2d, linear, lookup};

use crate::{Error, Result};

/// How a forward pass runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mode<'a> {
    /// Whether a graph for gradients is recorded.
    pub(crate) tracked: bool,
    /// Whether this is a training step: linear maps are then faster, but an image's rounding may depend on
    /// the size of its batch.
    pub(crate) training: bool,
    /// The probability of dropping an activation.
    pub(crate) dropout: f64,
    /// What the dropped ones depend on.
    pub(crate) seed: DropSeed<'a>,
}

impl Mode<'_> {
    /// Without gradients, without dropout.
    pub(crate) const EVALUATE: Mode<'static> =
        Mode { tracked: false, training: false, dropout: 0.0, seed: DropSeed::Known(0) };

    pub(crate) fn tensor(self, var: &Var) -> Tensor {
        if self.tracked { var.as_tensor().clone() } else { var.as_detached_tensor() }
    }

    /// Dropout at the place `site` of the network.
    pub(crate) fn drop(self, x: &Tensor, site: usize) -> Result<Tensor> {
        Ok(vq_ops::dropout(x, self.dropout, self.seed_at(site))?)
    }

    /// What decides which activations are dropped there, as a number.
    pub(crate) fn drop_seed(self, site: usize) -> Result<u64> {
        Ok(self.seed_at(site).read()?)
    }

    fn seed_at(&self, site: usize) -> DropSeed<'_> {
        self.seed.plus((site as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }
}

/// What a prior is told beside the codes that came before.
#[derive(Clone, Debug, Default)]
pub(crate) struct Context {
    /// `[B]` u32; the number of classes stands for none. Nothing for a prior without classes.
    pub(crate) labels: Option<Tensor>,
    /// What the conditioner makes of the levels above, `[B,h,w,C]`.
    pub(crate) map: Option<Tensor>,
}

/// Makes a prior's parameters. What one starts as depends on the seed and its own name alone.
pub(crate) struct Builder {
    seed: u64,
    device: Device,
    pub(crate) parameters: BTreeMap<String, Var>,
}

impl Builder {
    pub(crate) fn new(seed: u64, device: &Device) -> Self {
        Self { seed, device: device.clone(), parameters: BTreeMap::new() }
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// Uniform in `center` ± `bound`.
    pub(crate) fn parameter(
        &mut self,
        name: &str,
        shape: &[usize],
        (center, bound): (f32, f64),
    ) -> Result<Var> {
        let mut values = Stream::new(self.seed, name, 0).uniform(shape.iter().product(), bound);
        for value in &mut values {
            *value += center;
        }
        let var = Var::from_vec(values, shape, &self.device)?;
        match self.parameters.insert(name.to_owned(), var.clone()) {
            None => Ok(var),
            Some(_) => Err(Error::Input(format!("two tensors are called `{name}`"))),
        }
    }
}

/// A convolution with a bias; 1×1 is a linear map of the channels.
#[derive(Debug)]
pub(crate) struct Conv {
    /// `[Cout, Cin, KH, KW]`.
    weight: Var,
    bias: Var,
}

impl Conv {
    /// Starts as PyTorch's: U(±1/√fan-in), times `gain`.
    pub(crate) fn new(
        builder: &mut Builder,
        name: &str,
        (inputs, outputs): (usize, usize),
        kernel: [usize; 2],
        gain: f64,
    ) -> Result<Self> {
        let bound = gain / ((inputs * kernel[0] * kernel[1]) as f64).sqrt();
        let shape = [outputs, inputs, kernel[0], kernel[1]];
        Ok(Self {
            weight: builder.parameter(&format!("{name}.weight"), &shape, (0.0, bound))?,
            bias: builder.parameter(&format!("{name}.bias"), &[outputs], (0.0, bound))?,
        })
    }

    /// A linear map.
    pub(crate) fn linear(
        builder: &mut Builder,
        name: &str,
        inputs: usize,
        outputs: usize,
    ) -> Result<Self> {
        Self::new(builder, name, (inputs, outputs), [1, 1], 1.0)
    }

    pub(crate) fn device(&self) -> &Device {
        self.weight.device()
    }

    /// Weight `[Cout, Cin, KH, KW]` and bias.
    pub(crate) fn tensors(&self, mode: Mode) -> [Tensor; 2] {
        [mode.tensor(&self.weight), mode.tensor(&self.bias)]
    }

    /// `[B,H,W,Cin]` → `[B,H',W',Cout]`.
    pub(crate) fn forward(&self, x: &Tensor, config: Conv2d, mode: Mode) -> Result<Tensor> {
        let (outputs, inputs, kh, kw) = self.weight.dims4()?;
        if mode.training && (kh, kw) == (1, 1) {
            let weight = mode.tensor(&self.weight).reshape((outputs, inputs))?;
            return Ok(linear(x, &weight, &mode.tensor(&self.bias), config.relu_input)?);
        }
        Ok(conv2d(x, &mode.tensor(&self.weight), Some(&mode.tensor(&self.bias)), config)?)
    }

    /// `[B,h,w,Cin]` → `[B,h,w,Cout]`, for a linear map.
    pub(crate) fn apply(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        self.forward(x, Conv2d::default(), mode)
    }

    /// The present weight for rows of whole patches: `[N, KH·KW·Cin]` → `[N, Cout]`.
    pub(crate) fn packed(&self) -> Result<PackedLinear> {
        Ok(PackedLinear::new(&self.rows()?, &self.bias.as_detached_tensor())?)
    }

    /// Several linear maps of the same input, side by side.
    pub(crate) fn packed_side_by_side(maps: &[&Self]) -> Result<PackedLinear> {
        let weights = maps.iter().map(|map| map.rows()).collect::<Result<Vec<_>>>()?;
        let biases: Vec<Tensor> = maps.iter().map(|map| map.bias.as_detached_tensor()).collect();
        Ok(PackedLinear::new(&Tensor::cat(&weights, 0)?, &Tensor::cat(&biases, 0)?)?)
    }

    /// `[Cout, KH·KW·Cin]`.
    fn rows(&self) -> Result<Tensor> {
        let weight = self.weight.as_detached_tensor();
        let outputs = weight.dim(0)?;
        Ok(weight.permute((0, 2, 3, 1))?.contiguous()?.reshape((outputs, ()))?)
    }
}

/// One vector per code, for each code of a position; a position's vector is their sum.
#[derive(Debug)]
pub(crate) struct CodeTable {
    tables: Vec<Var>,
}

impl CodeTable {
    pub(crate) fn new(
        builder: &mut Builder,
        name: &str,
        sizes: &[usize],
        channels: usize,
    ) -> Result<Self> {
        // The sum has variance 1 per channel.
        let bound = (3.0 / sizes.len().max(1) as f64).sqrt();
        let table = |(index, &size): (usize, &usize)| {
            builder.parameter(&format!("{name}.{index}"), &[size, channels], (0.0, bound))
        };
        let tables = sizes.iter().enumerate().map(table).collect::<Result<_>>()?;
        Ok(Self { tables })
    }

    /// The vectors of the code number `index`: `[…]` u32 → `[…, C]`.
    pub(crate) fn vectors(&self, index: usize, codes: &Tensor, mode: Mode) -> Result<Tensor> {
        let Some(table) = self.tables.get(index) else {
            return Err(Error::Input(format!("a position has no code {index}")));
        };
        Ok(lookup(&mode.tensor(table), codes)?)
    }

    /// `[…, G]` u32 → `[…, C]`, summed over the codes of a position.
    pub(crate) fn sums(&self, codes: &Tensor, mode: Mode) -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        for index in 0..self.tables.len() {
            let codes = codes.narrow(D::Minus1, index, 1)?.squeeze(D::Minus1)?;
            let vectors = self.vectors(index, &codes, mode)?;
            sum = Some(match sum {
                None => vectors,
                Some(sum) => (sum + vectors)?,
            });
        }
        sum.ok_or_else(|| Error::config("codebook_sizes", "must not be empty"))
    }
}

/// One vector per class, and one for no class; all zeros for a prior without classes.
#[derive(Debug)]
pub(crate) struct ClassTable {
    table: Option<Var>,
    zeros: Tensor,
}

impl ClassTable {
    pub(crate) fn new(
        builder: &mut Builder,
        name: &str,
        class_count: usize,
        channels: usize,
    ) -> Result<Self> {
        let table = if class_count > 0 {
            // Small beside what it is added to, but not nothing: its first gradients are then useful.
            Some(builder.parameter(name, &[class_count + 1, channels], (0.0, 0.1))?)
        } else {
            None
        };
        Ok(Self { table, zeros: Tensor::zeros((1, channels), DType::F32, builder.device())? })
    }

    /// `[B]` u32 → `[B, C]`; `[1, C]` zeros without classes.
    pub(crate) fn vectors(&self, labels: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        match (&self.table, labels) {
            (Some(table), Some(labels)) => Ok(lookup(&mode.tensor(table), labels)?),
            _ => Ok(self.zeros.clone()),
        }
    }
}

/// `count` columns from `first` on, contiguous.
pub(crate) fn columns(x: &Tensor, first: usize, count: usize) -> Result<Tensor> {
    Ok(x.narrow(D::Minus1, first, count)?.contiguous()?)
}

/// RMS norm whose gain and shift depend on the class.
#[derive(Debug)]
pub(crate) struct ClassNorm {
    gain: Var,
    classes: ClassTable,
    channels: usize,
}

/// ε of the norms.
pub(crate) const EPSILON: f64 = 1e-6;

impl ClassNorm {
    pub(crate) fn new(
        builder: &mut Builder,
        name: &str,
        class_count: usize,
        channels: usize,
    ) -> Result<Self> {
        let gain = builder.parameter(&format!("{name}.gain"), &[channels], (1.0, 0.0))?;
        let classes =
            ClassTable::new(builder, &format!("{name}.class"), class_count, 2 * channels)?;
        Ok(Self { gain, classes, channels })
    }

    /// (gain, shift) `[B, C]`, or `[1, C]` without classes.
    pub(crate) fn vectors(&self, labels: Option<&Tensor>, mode: Mode) -> Result<(Tensor, Tensor)> {
        let vectors = self.classes.vectors(labels, mode)?;
        let gain = columns(&vectors, 0, self.channels)?.broadcast_add(&mode.tensor(&self.gain))?;
        Ok((gain, columns(&vectors, self.channels, self.channels)?))
    }

    /// `[B,…,C]` to the same shape.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        labels: Option<&Tensor>,
        mode: Mode,
    ) -> Result<Tensor> {
        normalize(x, &self.vectors(labels, mode)?)
    }
}

/// A norm by vectors that [`ClassNorm::vectors`] gave.
pub(crate) fn normalize(x: &Tensor, (gain, shift): &(Tensor, Tensor)) -> Result<Tensor> {
    Ok(vq_ops::rms_norm(x, gain, shift, EPSILON)?)
}

/// One learned vector per row and one per column; a position's is their sum.
#[derive(Debug)]
pub(crate) struct Positions {
    rows: Var,
    columns: Var,
}

impl Positions {
    pub(crate) fn new(
        builder: &mut Builder,
        name: &str,
        grid: [usize; 2],
        channels: usize,
    ) -> Result<Self> {
        let bound = 0.5;
        Ok(Self {
            rows: builder.parameter(
                &format!("{name}.rows"),
                &[1, grid[0], 1, channels],
                (0.0, bound),
            )?,
            columns: builder.parameter(
                &format!("{name}.columns"),
                &[1, 1, grid[1], channels],
                (0.0, bound),
            )?,
        })
    }

    /// `[1,h,w,C]`.
    pub(crate) fn map(&self, mode: Mode) -> Result<Tensor> {
        Ok(mode.tensor(&self.rows).broadcast_add(&mode.tensor(&self.columns))?)
    }
}
