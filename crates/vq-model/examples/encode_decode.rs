//! Images to codes and back with a saved model, or with fresh weights where none is given:
//!
//! ```text
//! cargo run --release -p vq-model --example encode_decode -- [MODEL_FOLDER]
//! ```
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use candle_core::{Device, Tensor};
use vq_model::{Config, VqVae};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = Device::Cpu;
    let model = match std::env::args().nth(1) {
        Some(folder) => VqVae::from_pretrained(folder, &device)?,
        None => VqVae::new(&Config::default(), /* seed */ 0, &device)?,
    };
    let config = model.config();
    let [height, width] = config.image_size;

    // Two images [B, C, H, W] with values in [0, 1]: a slope to the right and one downwards.
    let right = Tensor::arange(0f32, width as f32, &device)?.reshape((1, 1, 1, width))?;
    let down = Tensor::arange(0f32, height as f32, &device)?.reshape((1, 1, height, 1))?;
    let shape = (1, config.channels, height, width);
    let right = (right.broadcast_as(shape)? / width as f64)?;
    let down = (down.broadcast_as(shape)? / height as f64)?;
    let pixels = Tensor::cat(&[right, down], 0)?;

    let codes = model.encode(&config.normalization.normalize(&pixels)?)?;
    for (index, level) in codes.levels.iter().enumerate() {
        println!(
            "level {index}: codes {:?} of {}",
            level.dims(),
            config.levels[index].quantizer.codebook_size
        );
    }
    println!("{} bits an image; the first row of codes:", config.bits_per_image());
    println!("{:?}", codes.levels[0].get(0)?.get(0)?.to_vec1::<u32>()?);

    let decoded = config.normalization.denormalize(&model.decode(&codes)?)?;
    let error = (decoded - pixels)?.sqr()?.mean_all()?.to_scalar::<f32>()?;
    println!("decoded; mean squared error {error:.4} (pixels in [0, 1])");
    Ok(())
}
