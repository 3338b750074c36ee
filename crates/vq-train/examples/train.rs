//! Training from a program of one's own, without the `vq` binary.
//!
//! ```text
//! cargo run --release -p vq-train --example train -- RECIPE.toml FOLDER [key=value ...]
//! ```
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::path::Path;

use candle_core::Device;
use vq_train::{Event, MetricsFile, Observer, Recipe, RunFolder, Tokenizer, Trainer};

/// Prints what happens.
struct Printer;

impl Observer for Printer {
    fn observe(&mut self, event: &Event<'_>) -> Result<(), Box<dyn Error + Send + Sync>> {
        match event {
            Event::StepFinished(e) if e.step.is_multiple_of(50) => println!(
                "step {:>6}  loss {:.4}  perplexity {:6.1}  {:.0} images/s",
                e.step,
                e.losses.get("loss").unwrap_or(f64::NAN),
                e.perplexity.first().copied().unwrap_or(f64::NAN),
                e.images_per_second,
            ),
            Event::EpochFinished(e) => println!(
                "epoch {}  train {}  test {}  ({:.1} s + {:.1} s)",
                e.record.epoch,
                serde_json::to_string(&e.record.train)?,
                serde_json::to_string(&e.record.test)?,
                e.train_seconds,
                e.evaluation_seconds,
            ),
            Event::Warning(e) => println!("warning: {}", e.message),
            Event::CheckpointSaved(e) => println!("saved {}", e.path.display()),
            _ => {}
        }
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(recipe), Some(folder)) = (arguments.next(), arguments.next()) else {
        return Err("give a recipe and a folder to write to".into());
    };
    let mut recipe = Recipe::from_file(Path::new(&recipe))?;
    for assignment in arguments {
        recipe = recipe.with_override(&assignment)?;
    }
    let run = RunFolder::create(folder, &recipe, /* overwrite */ false)?;
    let splits = recipe.data.open(recipe.model.image_size)?;
    splits.notes.iter().for_each(|note| println!("note: {note}"));
    let tokenizer = Tokenizer::new(&recipe, &splits, &Device::Cpu)?;
    let mut trainer = Trainer::new(tokenizer, &recipe.train, run.path())?
        .with_observer(MetricsFile::new(run.metrics_file(), recipe.train.log_every))
        .with_observer(Printer);
    println!("{:?}", trainer.run()?);
    Ok(())
}
