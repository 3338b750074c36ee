//! Batches made on a device of images that lie there, beside the loader's.

use std::sync::Arc;

use vq_data::{Dataset, ImageShape, InMemory, Loader, LoaderOptions, Normalization};
use vq_train::{DeviceImages, Recipe, RunFolder, Tokenizer, Trainer};

use crate::support::{last, recipe, train};

const COUNT: usize = 45;

/// No two pixels of an image are alike, nor two images.
fn images() -> Arc<dyn Dataset> {
    let shape = ImageShape { channels: 3, height: 4, width: 6 };
    let pixels = (0..COUNT)
        .flat_map(|image| (0..shape.pixels()).map(move |at| (image * 5 + at * 3) as u8))
        .collect();
    Arc::new(InMemory::new("numbers", shape, pixels, vec![0; COUNT], Vec::new()).unwrap())
}

fn loader(options: LoaderOptions) -> Loader {
    let normalization = Normalization { mean: vec![0.1, 0.5, 0.4], std: vec![0.3, 1.0, 0.7] };
    Loader::new(images(), normalization, options).unwrap()
}

#[test]
fn batches_are_the_loaders_to_the_bit() {
    let device = vq_ops::test_device();
    let bits = |images: &candle_core::Tensor| -> Vec<u32> {
        let values = images.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    };
    let mut mirrored = 0;
    for (shuffle, flip, drop_last) in
        [(true, true, true), (true, true, false), (false, true, false), (true, false, false)]
    {
        for prefetch in [0, 3] {
            let options =
                LoaderOptions { batch_size: 8, shuffle, flip, drop_last, seed: 7, prefetch };
            let loader = loader(options);
            let whole = DeviceImages::upload(&loader, &device).unwrap();
            let streamed = DeviceImages::stream(&loader, &device).unwrap();
            let ahead = loader.clone().on_device(&device);
            // From the start, in the middle, at the last batch, after it.
            for (epoch, first) in [(0, 0), (3, 2), (1, 4), (2, 5), (0, 6), (0, 9)] {
                let expected: Vec<_> = loader.epoch(epoch, first).map(Result::unwrap).collect();
                assert_eq!(
                    expected.len(),
                    if drop_last { 5usize } else { 6 }.saturating_sub(first)
                );
                let picks: Vec<_> = loader.picks(epoch, first).collect();
                let made: Vec<_> = whole.epoch(epoch, first).map(Result::unwrap).collect();
                let copied: Vec<_> = ahead.epoch(epoch, first).map(Result::unwrap).collect();
                let raw: Vec<_> = streamed.epoch(epoch, first).map(Result::unwrap).collect();
                assert_eq!([picks.len(), made.len(), copied.len()], [expected.len(); 3]);
                assert_eq!(raw.len(), expected.len());
                for (at, expected) in expected.iter().enumerate() {
                    assert_eq!(picks[at].indices, expected.indices);
                    mirrored += picks[at].mirrored.iter().filter(|&&is| is).count();
                    for images in [&made[at], &copied[at].images, &raw[at]] {
                        assert!(images.device().same_device(&device));
                        assert_eq!(images.dims(), expected.images.dims());
                        assert_eq!(bits(images), bits(&expected.images));
                    }
                }
            }
        }
    }
    assert!(mirrored > 0);
}

#[test]
fn only_what_is_in_memory_and_small_goes_to_a_device_unasked() {
    struct Large(bool);
    impl Dataset for Large {
        fn name(&self) -> &'static str {
            "large"
        }
        fn len(&self) -> usize {
            if self.0 { 10 } else { (1 << 30) / 3072 + 1 }
        }
        fn shape(&self) -> ImageShape {
            ImageShape { channels: 3, height: 32, width: 32 }
        }
        fn class_names(&self) -> &[String] {
            &[]
        }
        fn label(&self, _: usize) -> u32 {
            0
        }
        fn read(&self, _: usize, _: &mut [u8]) -> Result<(), vq_data::Error> {
            Ok(())
        }
        fn is_costly(&self) -> bool {
            self.0
        }
    }
    assert!(DeviceImages::fit(images().as_ref()));
    assert!(!DeviceImages::fit(&Large(true)), "files are to be decoded");
    assert!(!DeviceImages::fit(&Large(false)), "more than 1 GiB");
}

/// A run with all images on the device, interrupted within an epoch.
#[test]
fn a_run_learns_the_same_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let recipe =
        recipe(&["train.epochs=2", "train.accumulate=2", "train.checkpoint_every_steps=3"]);
    let (plain, on_device) = (folder.path().join("a"), folder.path().join("b"));
    train(&recipe, &plain);
    let trainer = |recipe: &Recipe| {
        let splits = recipe.data.open(recipe.model.image_size).unwrap();
        let tokenizer = Tokenizer::new(recipe, &splits, &vq_ops::test_device()).unwrap();
        let tokenizer = tokenizer.with_device_images(true).unwrap();
        Trainer::new(tokenizer, &recipe.train, &on_device).unwrap()
    };
    RunFolder::create(&on_device, &recipe, true).unwrap();
    let crash = crate::support::At { step: 5, stop: None };
    trainer(&recipe).with_observer(crash).run().unwrap_err();
    let mut second = trainer(&recipe);
    second.resume().unwrap();
    assert_eq!(second.progress().step, 3);
    second.run().unwrap();
    assert!(last(&plain) == last(&on_device));
}
