//! Training on a folder of images, some of which turn out to be broken.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use vq_data::shapes::{MakeOptions, make_images};
use vq_data::{OpenOptions, Source};
use vq_train::{Outcome, Recipe, RunFolder, Tokenizer, Trainer};

use crate::support::{At, Memory, last, recipe};

fn trainer(recipe: &Recipe, images: &Path, cache: &Path, run: &Path) -> Trainer<Tokenizer> {
    let options = OpenOptions {
        size: recipe.model.image_size,
        cache_dir: Some(cache.into()),
        memory_limit: 0,
        ..OpenOptions::default()
    };
    let splits = vq_data::open(&Source::Folder(images.into()), &options).unwrap();
    let tokenizer = Tokenizer::new(recipe, &splits, &vq_ops::test_device()).unwrap();
    Trainer::new(tokenizer, &recipe.train, run).unwrap()
}

/// What stands in for a broken file is the same whether the index knows of it or not, so a run that was
/// stopped goes on to the bit.
#[test]
fn a_broken_image_is_named_and_a_resumed_run_is_the_straight_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let images = path("images");
    make_images(
        &images,
        &MakeOptions { size: [16, 16], count: 60, ..MakeOptions::default() },
        &|_| (),
    )
    .unwrap();
    for name in ["circle/00000010.png", "star/00000034.png"] {
        let mut bytes = fs::read(images.join(name)).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle..middle + 8].fill(0xa5);
        fs::write(images.join(name), bytes).unwrap();
    }
    let recipe = recipe(&["train.epochs=2"]);
    let run = |name: &str| {
        let run = path(name);
        RunFolder::create(&run, &recipe, true).unwrap();
        run
    };

    let straight = run("straight");
    let memory = Memory::default();
    let mut straight_trainer =
        trainer(&recipe, &images, &path("cache"), &straight).with_observer(memory.clone());
    assert_eq!(straight_trainer.run().unwrap(), Outcome::Finished);
    let warnings: Vec<String> =
        memory.all("warning").iter().map(|w| w["message"].as_str().unwrap().to_owned()).collect();
    for name in ["circle/00000010.png", "star/00000034.png"] {
        let count = warnings.iter().filter(|warning| warning.contains(name)).count();
        assert_eq!(count, 1, "{warnings:?}");
    }

    let parts = run("parts");
    let stop = Arc::new(AtomicBool::new(false));
    let mut first = trainer(&recipe, &images, &path("other cache"), &parts)
        .with_observer(At { step: 8, stop: Some(stop.clone()) })
        .with_stop_flag(stop);
    assert_eq!(first.run().unwrap(), Outcome::Interrupted);
    let mut second = trainer(&recipe, &images, &path("other cache"), &parts);
    second.resume().unwrap();
    assert_eq!(second.run().unwrap(), Outcome::Finished);
    assert_eq!(last(&straight), last(&parts));
}
