//! Every picture that this crate makes, from made-up numbers, to look at:
//! `cargo run -p vq-viz --example gallery -- FOLDER`.

use std::{error::Error, path::PathBuf};

use candle_core::{Device, Tensor};
use vq_viz::{
    Compared, Panel, Series, codebook_heat_map, image_grid, save_codebook_usage, save_comparison,
    save_curves, save_png, side_by_side,
};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = PathBuf::from(std::env::args().nth(1).ok_or("which folder?")?);
    std::fs::create_dir_all(&folder)?;

    let grid = image_grid(&gradients(10)?, 4, 2)?;
    save_png(&grid, &folder.join("grid.png"))?;
    save_png(&side_by_side(&grid, &grid, 8)?, &folder.join("side_by_side.png"))?;

    let noise = |i: i32| ((i * 7919 % 1013) as f64 / 1013.0 - 0.5) * 0.4;
    let decay = |scale: f64, slope: f64, wild: f64| {
        (1..19_500)
            .step_by(5)
            .map(|i| {
                let t = f64::from(i);
                (t, scale * (0.08 + (-t * slope).exp()) * (1.0 + wild * noise(i)))
            })
            .collect::<Vec<_>>()
    };
    let epochs = |f: fn(f64) -> f64| (1..=50).map(|e| (f64::from(e), f(f64::from(e)))).collect();
    let panels = [
        Panel::new(
            "Loss",
            vec![
                Series::new("total", decay(0.5, 6e-4, 1.0)),
                Series::new("reconstruction", decay(0.3, 8e-4, 1.0)),
                Series::new("codebook", decay(0.05, 2e-4, 0.5)),
                Series::new("commitment", decay(0.02, 2e-4, 0.5)),
            ],
        )
        .axes("step", "")
        .log_y(),
        Panel::new("PSNR on the test split", vec![Series::new("", epochs(|e| 26.0 - 6.0 / e))])
            .axes("epoch", "dB"),
        Panel::new(
            "Codebook",
            vec![
                Series::new("perplexity", epochs(|e| 480.0 - 400.0 / e)),
                Series::new("codes in use", epochs(|e| (560.0 - 300.0 / e).min(512.0).floor())),
            ],
        )
        .axes("epoch", "codes"),
        Panel::new("Nothing yet", vec![Series::new("train", vec![])]).axes("epoch", ""),
    ];
    save_curves(&folder.join("curves.svg"), "Made-up curves", &panels)?;
    save_curves(&folder.join("one.svg"), "One panel", &panels[..1])?;

    let counts: Vec<u64> = (0..512).map(|k| (k * 199 % 512) * (k * 199 % 512) / 130).collect();
    save_codebook_usage(&folder.join("codebook.svg"), "Codebook of level 0", &counts)?;
    save_png(&codebook_heat_map(&counts, 14)?, &folder.join("codebook.png"))?;

    let compared = |label: &str, value, share| Compared {
        label: label.to_owned(),
        value,
        share,
        is_baseline: label == "vector",
    };
    let rows = [
        compared("vector-rotation", Some((24.91, Some(0.05))), Some((512.0, 512.0))),
        compared("vector", Some((24.86, Some(0.11))), Some((511.7, 512.0))),
        compared("finite-scalar", Some((24.02, Some(0.02))), Some((498.3, 512.0))),
        compared("residual", Some((22.4, None)), Some((24.0, 24.0))),
        compared("index-backprop", Some((19.7, Some(0.6))), Some((47.7, 512.0))),
        compared("lookup-free", None, None),
    ];
    let titles = ["PSNR on the test split, dB", "codes in use"];
    save_comparison(&folder.join("compare.png"), "Quantizers compared", titles, &rows)?;
    Ok(())
}

/// `[count, 3, 32, 32]`: red grows to the right, green downwards, blue from image to image.
fn gradients(count: usize) -> candle_core::Result<Tensor> {
    let shape = (count, 1, 32, 32);
    let ramp = (Tensor::arange(0f32, 32f32, &Device::Cpu)? / 31.0)?;
    let red = ramp.reshape((1, 1, 1, 32))?.broadcast_as(shape)?;
    let green = ramp.reshape((1, 1, 32, 1))?.broadcast_as(shape)?;
    let image = (Tensor::arange(0f32, count as f32, &Device::Cpu)? / count as f64)?;
    let blue = image.reshape((count, 1, 1, 1))?.broadcast_as(shape)?;
    Tensor::cat(&[&red, &green, &blue], 1)
}
