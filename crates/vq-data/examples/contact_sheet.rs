//! The first 100 training images of a source as one picture:
//! `cargo run -p vq-data --example contact_sheet -- shapes sheet.png`

use std::error::Error;
use std::time::Instant;

use vq_data::{OpenOptions, Source, cache_dir, open, pixel_variance};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: contact_sheet SOURCE OUT.png [SIZE]";
    let source: Source = arguments.next().ok_or(usage)?.parse()?;
    let out = arguments.next().ok_or(usage)?;
    let size = arguments.next().map_or(Ok(32), |size| size.parse())?;

    let start = Instant::now();
    let options = OpenOptions { size: [size; 2], cache_dir: cache_dir(), ..OpenOptions::default() };
    let splits = open(&source, &options)?;
    let seconds = start.elapsed().as_secs_f64();
    let (train, test) = (&splits.train, &splits.test);
    let variance = pixel_variance(train.as_ref())?;
    let text = format!(
        "{}\n{}: {} images, {}: {} images, opened in {seconds:.2} s, pixel variance {variance:.6}\n\
         classes: {}\n",
        splits.notes.join("\n"),
        train.name(),
        train.len(),
        test.name(),
        test.len(),
        train.class_names().join(", ")
    );
    std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes())?;

    let plane = size * size;
    let mut sheet = image::RgbImage::new(10 * size as u32, 10 * size as u32);
    let mut pixels = vec![0; 3 * plane];
    for index in 0..train.len().min(100) {
        train.read(index, &mut pixels)?;
        for i in 0..plane {
            let (x, y) = (index % 10 * size + i % size, index / 10 * size + i / size);
            let rgb = [pixels[i], pixels[plane + i], pixels[2 * plane + i]];
            sheet.put_pixel(x as u32, y as u32, image::Rgb(rgb));
        }
    }
    sheet.save(out)?;
    Ok(())
}
