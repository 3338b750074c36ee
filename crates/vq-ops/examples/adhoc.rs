#![allow(missing_docs, clippy::all, clippy::pedantic)]
use candle_core::*;
use std::time::Instant;
use vq_ops::*;
fn conv(i: usize, o: usize, k: usize, s: usize, r: bool) -> Layer {
    Layer::Conv2d {
        in_channels: i,
        out_channels: o,
        kernel: k,
        config: Conv2d { stride: s, padding: (k - s + 1) / 2, relu_input: r, ..Default::default() },
    }
}
fn up(i: usize, o: usize, r: bool) -> Layer {
    Layer::ConvTranspose2d {
        in_channels: i,
        out_channels: o,
        kernel: 4,
        config: ConvTranspose2d { stride: 2, padding: 1, relu_input: r, ..Default::default() },
    }
}
fn main() -> Result<()> {
    let res = || Layer::Residual { channels: 128, hidden: 32 };
    let enc = Stack::new(vec![
        conv(3, 64, 4, 2, false),
        conv(64, 128, 4, 2, true),
        conv(128, 128, 3, 1, true),
        res(),
        res(),
        conv(128, 64, 1, 1, true),
    ])?;
    let dec = Stack::new(vec![
        conv(64, 128, 3, 1, false),
        res(),
        res(),
        up(128, 64, true),
        up(64, 3, true),
    ])?;
    println!(
        "{:?}",
        (enc.output_size(32, 32)?, enc.multiply_adds(32, 32)? + dec.multiply_adds(8, 8)?)
    );
    let b: usize = 128;
    let mk = |s: &Stack| -> Result<Vec<Var>> {
        s.layers()
            .iter()
            .flat_map(|l| l.parameters())
            .map(|(_, sh)| Var::rand(-0.04f32, 0.04, sh, &Device::Cpu))
            .collect()
    };
    let (pe, pd) = (mk(&enc)?, mk(&dec)?);
    let x = Tensor::rand(-0.5f32, 0.5, (b, 32, 32, 3), &Device::Cpu)?;
    let code = Tensor::rand(-0.5f32, 0.5, (512, 64), &Device::Cpu)?;
    let moments: Vec<(Tensor, Tensor)> = pe
        .iter()
        .chain(&pd)
        .map(|v| Ok((v.zeros_like()?, v.zeros_like()?)))
        .collect::<Result<_>>()?;
    let te: Vec<Tensor> = pe.iter().map(|v| v.as_tensor().clone()).collect();
    let td: Vec<Tensor> = pd.iter().map(|v| v.as_tensor().clone()).collect();
    let mut best = [f64::MAX; 6];
    for it in 0..40 {
        let mut t = vec![Instant::now()];
        let z = enc.forward(&x, &te)?;
        t.push(Instant::now());
        let flat = z.reshape((b * 64, 64))?;
        let codes = nearest_codes(&flat.detach(), &code)?;
        let q = code.index_select(&codes, 0)?.reshape(z.shape())?;
        let st = (&z + (q - &z)?.detach())?;
        t.push(Instant::now());
        let y = dec.forward(&st, &td)?;
        t.push(Instant::now());
        let loss = ((y - &x)?.sqr()?.mean_all()? + (z.detach() - &z)?.sqr()?.mean_all()?)?;
        let g = loss.backward()?;
        t.push(Instant::now());
        for (v, (m, s)) in pe.iter().chain(&pd).zip(&moments) {
            if let Some(g) = g.get(v) {
                adamw_step(
                    v,
                    g,
                    m,
                    s,
                    None,
                    &AdamWStep {
                        lr: 1e-4,
                        beta1: 0.9,
                        beta2: 0.99,
                        eps: 1e-8,
                        weight_decay: 0.0,
                        step: it + 1,
                        grad_scale: 1.0,
                        ema_decay: None,
                    },
                )?;
            }
        }
        t.push(Instant::now());
        for i in 0..5 {
            best[i] = best[i].min((t[i + 1] - t[i]).as_secs_f64());
        }
        best[5] = best[5].min((t[5] - t[0]).as_secs_f64());
    }
    println!(
        "ms enc {:.1} vq {:.1} dec {:.1} bwd {:.1} opt {:.1} total {:.1} -> {:.0} img/s, {:.0} GFLOP/s",
        best[0] * 1e3,
        best[1] * 1e3,
        best[2] * 1e3,
        best[3] * 1e3,
        best[4] * 1e3,
        best[5] * 1e3,
        b as f64 / best[5],
        265e6 * b as f64 / best[5] / 1e9
    );
    // gemm peak
    let a = Tensor::rand(-1f32, 1., (2048, 2048), &Device::Cpu)?;
    let mut p = f64::MAX;
    for _ in 0..5 {
        let t = Instant::now();
        let _c = a.matmul(&a)?;
        p = p.min(t.elapsed().as_secs_f64());
    }
    println!("candle gemm 2048: {:.0} GFLOP/s", 2.0 * 2048f64.powi(3) / p / 1e9);
    Ok(())
}
