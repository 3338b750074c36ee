//! The standard model as one writes it with candle alone: NCHW, its own convolutions and autograd.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::{
    Conv2d, Conv2dConfig, ConvTranspose2d, ConvTranspose2dConfig, Module, VarBuilder, VarMap,
};

pub(super) struct Naive {
    variables: VarMap,
    encoder: Vec<Layer>,
    decoder: Vec<Layer>,
    codebook: Tensor,
}

enum Layer {
    Down(Conv2d),
    Up(ConvTranspose2d),
    Relu,
    Residual(Conv2d, Conv2d),
}

impl Naive {
    pub(super) fn new() -> Result<Self> {
        let variables = VarMap::new();
        let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
        let mut count = 0;
        let mut next = || {
            count += 1;
            vb.pp(format!("layer{count}"))
        };
        let mut conv = |i, o, kernel: usize, stride: usize| {
            let padding = (kernel - stride).div_ceil(2);
            let config = Conv2dConfig { padding, stride, ..Conv2dConfig::default() };
            candle_nn::conv2d(i, o, kernel, config, next())
        };
        let mut residual =
            || Ok::<_, candle_core::Error>((conv(128, 32, 3, 1)?, conv(32, 128, 1, 1)?));
        let (r1, r2, r3, r4) = (residual()?, residual()?, residual()?, residual()?);
        let encoder = vec![
            Layer::Down(conv(3, 64, 4, 2)?),
            Layer::Relu,
            Layer::Down(conv(64, 128, 4, 2)?),
            Layer::Relu,
            Layer::Down(conv(128, 128, 3, 1)?),
            Layer::Residual(r1.0, r1.1),
            Layer::Residual(r2.0, r2.1),
            Layer::Relu,
            Layer::Down(conv(128, 64, 1, 1)?),
        ];
        let up_config = ConvTranspose2dConfig { padding: 1, stride: 2, ..Default::default() };
        let first = conv(64, 128, 3, 1)?;
        let decoder = vec![
            Layer::Down(first),
            Layer::Residual(r3.0, r3.1),
            Layer::Residual(r4.0, r4.1),
            Layer::Relu,
            Layer::Up(candle_nn::conv_transpose2d(128, 64, 4, up_config, vb.pp("up1"))?),
            Layer::Relu,
            Layer::Up(candle_nn::conv_transpose2d(64, 3, 4, up_config, vb.pp("up2"))?),
        ];
        let init = candle_nn::Init::Uniform { lo: -1. / 512., up: 1. / 512. };
        let codebook = vb.get_with_hints((512, 64), "codebook", init)?;
        Ok(Self { variables, encoder, decoder, codebook })
    }

    pub(super) fn variables(&self) -> Vec<Var> {
        self.variables.all_vars()
    }

    /// Images `[B,3,32,32]` → reconstruction, codebook loss, commitment loss.
    pub(super) fn forward(&self, images: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let z = run(&self.encoder, images)?.permute((0, 2, 3, 1))?.contiguous()?;
        let flat = z.flatten(0, 2)?;
        let norms = self.codebook.sqr()?.sum(D::Minus1)?;
        let distances = norms.broadcast_sub(&(flat.detach().matmul(&self.codebook.t()?)? * 2.)?)?;
        let codes = distances.detach().argmin(D::Minus1)?;
        let e = self.codebook.index_select(&codes, 0)?;
        let codebook_loss = (flat.detach() - &e)?.sqr()?.mean_all()?;
        let commitment = (&flat - e.detach())?.sqr()?.mean_all()?;
        let z_q = (&flat + (e - &flat)?.detach())?.reshape(z.shape())?;
        let nchw = z_q.permute((0, 3, 1, 2))?.contiguous()?;
        Ok((run(&self.decoder, &nchw)?, codebook_loss, commitment))
    }
}

fn run(layers: &[Layer], x: &Tensor) -> Result<Tensor> {
    let mut x = x.clone();
    for layer in layers {
        x = match layer {
            Layer::Down(conv) => conv.forward(&x)?,
            Layer::Up(conv) => conv.forward(&x)?,
            Layer::Relu => x.relu()?,
            Layer::Residual(a, b) => (&x + b.forward(&a.forward(&x.relu()?)?.relu()?)?)?,
        };
    }
    Ok(x)
}
