//! Priors over codes through the trainer.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use vq_data::{
    CODES_FORMAT_VERSION, CODES_ORDER, CodesFolder, CodesLevel, CodesManifest, CodesWriter,
    Normalization,
};
use vq_model::{Config, LevelConfig, VqVae};
use vq_train::{
    Outcome, PriorLevel, PriorRecipe, PriorTask, Result, Trainable, Trainer, UnigramSource,
    load_prior, model_hash, read_progress,
};

use crate::support::{At, Memory, last};

const LEVELS: [(usize, usize); 2] = [(4, 8), (2, 5)];

/// An untrained model of two levels, 4×4 codes out of 8 and 2×2 out of 5, and its hash.
fn model(folder: &Path, seed: u64) -> (VqVae, String) {
    let mut config = Config { image_size: [8, 8], ..Config::default() };
    let level = |(_, size): (usize, usize)| {
        let mut level = LevelConfig { downsample: 2, hidden: 4, ..LevelConfig::default() };
        (level.residual_blocks, level.residual_hidden) = (1, 4);
        (level.quantizer.codebook_size, level.quantizer.dim) = (size, 4);
        level
    };
    config.levels = LEVELS.map(level).to_vec();
    config.class_names = ["a", "b"].map(str::to_owned).to_vec();
    let model = VqVae::new(&config, seed, &vq_ops::test_device()).unwrap();
    model.save(folder).unwrap();
    (model, model_hash(folder).unwrap())
}

/// The codes of image `index`: every bottom code follows from the class, the place and the top codes.
fn image(index: usize) -> (u32, [Vec<u32>; 2]) {
    let label = index % 2;
    let top: Vec<u32> =
        (0..4).map(|place| ((index / 2 + place * (label + 1)) % 5) as u32).collect();
    let bottom = (0..16).map(|place| (place as u32 / 4 + top[(place % 4) / 2] + label as u32) % 8);
    (label as u32, [bottom.collect(), top])
}

fn codes(folder: &Path, hash: &str, images: usize) {
    let level = |(side, size): (usize, usize)| CodesLevel {
        grid: [side, side],
        codebook_sizes: vec![size],
    };
    let manifest = CodesManifest {
        format_version: CODES_FORMAT_VERSION,
        model: hash.to_owned(),
        precision: "f32".to_owned(),
        normalization: Normalization::identity(3),
        dataset: "toy".to_owned(),
        split: "train".to_owned(),
        order: CODES_ORDER.to_owned(),
        images,
        images_per_shard: 16,
        class_names: ["a", "b"].map(str::to_owned).to_vec(),
        levels: LEVELS.map(level).to_vec(),
    };
    let mut writer = CodesWriter::open(folder, manifest).unwrap();
    for index in 0..images {
        let (label, levels) = image(index);
        writer.push(label, &[&levels[0], &levels[1]]).unwrap();
    }
    writer.finish().unwrap();
}

/// 4 steps an epoch, 3 epochs; a model and codes in `folder`.
fn recipe(folder: &Path, more: &[&str]) -> PriorRecipe {
    let text = "
        [prior]
        head_hidden = 8
        [prior.network]
        kind = 'pixelcnn'
        channels = 8
        layers = 2
        skip_channels = 8
        [train]
        epochs = 3
        batch_size = 8
        samples = 4
        warmup_steps = 2
        weight_ema = 0.9";
    let mut recipe = PriorRecipe::from_toml(text, "test").unwrap();
    for assignment in more {
        recipe = recipe.with_override(assignment).unwrap();
    }
    recipe.prior.conditioner.channels = 8;
    recipe.data.model = folder.join("model");
    recipe.data.codes = folder.join("codes");
    recipe
}

fn prepare(folder: &Path) -> String {
    let (_, hash) = model(&folder.join("model"), 0);
    codes(&folder.join("codes"), &hash, 44);
    hash
}

fn task(recipe: &mut PriorRecipe, hash: &str) -> Result<PriorTask> {
    let model = vq_train::load_model(&recipe.data.model, &vq_ops::test_device())?;
    PriorTask::new(recipe, model, hash, &vq_ops::test_device())
}

fn trainer(recipe: &PriorRecipe, hash: &str, run: &Path) -> Trainer<PriorTask> {
    let mut recipe = recipe.clone();
    let task = task(&mut recipe, hash).unwrap();
    Trainer::new(task, &recipe.train.resolve(), run).unwrap()
}

#[test]
fn a_resumed_prior_is_the_straight_one_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let hash = prepare(folder.path());
    for (name, more) in [
        ("pixelcnn", &["prior.dropout=0.2", "data.level=0"][..]),
        (
            "transformer",
            &[
                "prior.network.kind=transformer",
                "prior.network.channels=8",
                "prior.network.layers=1",
                "prior.network.mlp_hidden=8",
                "train.weight_ema=0",
            ],
        ),
    ] {
        let recipe = recipe(folder.path(), more);
        let straight = folder.path().join(format!("{name}-straight"));
        assert_eq!(trainer(&recipe, &hash, &straight).run().unwrap(), Outcome::Finished);
        for step in [4, 6] {
            let run = folder.path().join(format!("{name}-{step}"));
            let stop = Arc::new(AtomicBool::new(false));
            let mut first = trainer(&recipe, &hash, &run)
                .with_observer(At { step, stop: Some(stop.clone()) })
                // So that it is told of the step when it is done, on devices too.
                .with_read_interval(1)
                .with_stop_flag(stop);
            assert_eq!(first.run().unwrap(), Outcome::Interrupted);
            assert_eq!(read_progress(&run.join("last")).unwrap().step, step);
            let mut second = trainer(&recipe, &hash, &run);
            second.resume().unwrap();
            assert_eq!(second.run().unwrap(), Outcome::Finished);
            assert_eq!(last(&run), last(&straight), "{name} {step}");
        }
    }
}

#[test]
fn a_prior_learns_more_than_the_frequencies_and_keeps_its_model() {
    let folder = tempfile::tempdir().unwrap();
    let hash = prepare(folder.path());
    let more = [
        "data.level=0",
        "train.epochs=30",
        "train.lr=1e-2",
        "prior.dropout=0",
        "train.eval_every=10",
    ];
    let recipe = recipe(folder.path(), &more);
    let memory = Memory::default();
    let run = folder.path().join("run");
    let mut trainer = trainer(&recipe, &hash, &run).with_observer(memory.clone());
    trainer.run().unwrap();
    let unigram = trainer.task().unigram_bits();
    assert!(unigram > 2.0 && unigram < 3.3, "{unigram}");
    let epochs = memory.all("epoch");
    let figure = |name: &str| epochs.last().unwrap()["test"][name].as_f64().unwrap();
    assert!(figure("bits_per_code") < 0.6 * unigram, "{epochs:?}");
    assert!((figure("unigram_bits_per_code") - unigram).abs() < 1e-12);
    assert!((figure("nats_per_code") - figure("bits_per_code") * 2f64.ln()).abs() < 1e-9);
    assert!((figure("bits_per_image") - 16.0 * figure("bits_per_code")).abs() < 1e-9);

    let prior = load_prior(&run, &hash, &vq_ops::test_device()).unwrap();
    let config = prior.config();
    assert_eq!((config.tokenizer.as_str(), config.class_count), (hash.as_str(), 2));
    assert_eq!((config.grid, config.conditioning[0].grid), ([4, 4], [2, 2]));
    let error = load_prior(&run, "another", &vq_ops::test_device()).unwrap_err().to_string();
    assert!(error.contains("another model") && error.contains("--model"), "{error}");
}

#[test]
fn every_epoch_has_each_image_once_with_the_codes_above_it() {
    let folder = tempfile::tempdir().unwrap();
    let hash = prepare(folder.path());
    let more = ["data.level=0", "prior.label_dropout=0"];
    let task = task(&mut recipe(folder.path(), &more), &hash).unwrap();
    // A tenth is held out, from anywhere.
    assert_eq!((task.images(), task.batches_per_epoch()), ((39, 5), 4));
    let open = CodesFolder::open(folder.path().join("codes")).unwrap();
    let known: Vec<_> = (0..44).map(|index| open.read(index).unwrap()).collect();
    let mut orders = Vec::new();
    for epoch in [0, 1, 0] {
        let mut order = Vec::new();
        for batch in task.batches(epoch, 0) {
            let batch = batch.unwrap();
            let rows = |tensor: &candle_core::Tensor| {
                tensor.flatten_from(1).unwrap().to_vec2::<u32>().unwrap()
            };
            let labels = batch.labels().unwrap().to_vec1::<u32>().unwrap();
            let (own, above) = (rows(batch.codes()), rows(&batch.conditioning()[0]));
            for ((own, above), label) in own.iter().zip(&above).zip(labels) {
                let is_same = |image: &&vq_data::ImageCodes| {
                    image.levels == [own.clone(), above.clone()] && image.label == label
                };
                assert!(known.iter().any(|image| is_same(&image)));
                order.push((own.clone(), label));
            }
        }
        assert_eq!(order.len(), 32);
        orders.push(order);
    }
    assert_eq!(orders[0], orders[2]);
    assert_ne!(orders[0], orders[1]);
    let later: Vec<_> = task.batches(0, 2).map(|batch| batch.unwrap().codes().clone()).collect();
    let first = &orders[0][16].0;
    assert_eq!(later.len(), 2);
    assert_eq!(&later[0].get(0).unwrap().flatten_all().unwrap().to_vec1::<u32>().unwrap(), first);
}

#[test]
fn weights_decay_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let hash = prepare(folder.path());
    let task = task(&mut recipe(folder.path(), &["data.level=0"]), &hash).unwrap();
    let parameters = task.parameters();
    for (name, var) in parameters {
        let is_vector = ["bias", "gain", "class", "codes", "positions"];
        let is_vector = is_vector.iter().any(|part| name.contains(part)) || var.rank() == 1;
        assert_eq!(task.decays(name, var), !is_vector, "{name}");
    }
}

#[test]
fn codes_that_do_not_belong_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let hash = prepare(folder.path());
    let (_, other) = model(&folder.path().join("other"), 1);
    assert_ne!(hash, other);
    let mut plain = recipe(folder.path(), &[]);
    let refused = |recipe: &mut PriorRecipe, hash: &str, part: &str| {
        let error = task(recipe, hash).err().unwrap().to_string();
        assert!(error.contains(part), "{error}");
    };
    refused(&mut plain.clone(), &other, "another model");
    codes(&folder.path().join("others"), &other, 10);
    plain.data.held_out = Some(folder.path().join("others"));
    refused(&mut plain.clone(), &hash, "others");
    codes(&folder.path().join("test"), &hash, 10);
    plain.data.held_out = Some(folder.path().join("test"));
    assert_eq!(task(&mut plain.clone(), &hash).unwrap().images(), (44, 10));
    plain.data.level = PriorLevel::Number(2);
    refused(&mut plain.clone(), &hash, "data.level");
    plain.data.level = PriorLevel::Top;
    plain.train.batch_size = 45;
    refused(&mut plain, &hash, "45");
}

#[test]
fn a_prior_brings_what_it_is_compared_with() {
    let folder = tempfile::tempdir().unwrap();
    let hash = prepare(folder.path());
    let recipe = recipe(folder.path(), &["data.level=0", "train.epochs=1"]);
    let run = folder.path().join("run");
    let mut trainer = trainer(&recipe, &hash, &run);
    trainer.run().unwrap();
    let unigram = trainer.task().unigram_bits();
    let prior = vq_train::resolve_model(&run).unwrap();
    let judge = |codes: Option<&Path>, data: Option<&vq_train::PriorDataConfig>| {
        vq_train::evaluate_prior(&prior, codes, data, 8, &vq_ops::test_device())
    };
    let held_out = judge(None, Some(&recipe.data)).unwrap();
    assert_eq!((held_out.images, held_out.unigram), (5, UnigramSource::Training));
    assert!((held_out.metrics.get("unigram_bits_per_code").unwrap() - unigram).abs() < 1e-12);
    // The training codes are gone.
    codes(&folder.path().join("test"), &hash, 10);
    std::fs::remove_dir_all(folder.path().join("codes")).unwrap();
    let test = folder.path().join("test");
    let figures = judge(Some(&test), None).unwrap();
    assert_eq!((figures.images, figures.unigram), (10, UnigramSource::Training));
    assert_eq!(judge(Some(&test), Some(&recipe.data)).unwrap(), figures);
    let error = judge(None, None).unwrap_err().to_string();
    assert!(error.contains("--codes"), "{error}");

    std::fs::write(prior.join(vq_train::UNIGRAM_FILE), "{\"counts\": [[1, 2]]}").unwrap();
    let error = judge(Some(&test), None).unwrap_err().to_string();
    assert!(error.contains("unigram.json") && error.contains("delete this file"), "{error}");
    std::fs::remove_file(prior.join(vq_train::UNIGRAM_FILE)).unwrap();
    let counted = judge(Some(&test), Some(&recipe.data)).unwrap();
    assert_eq!(counted.unigram, UnigramSource::Judged);

    let other = vq_train::load_prior(folder.path().join("model"), &hash, &vq_ops::test_device());
    assert!(other.unwrap_err().to_string().contains("this is a model"));
    let other = vq_train::load_model(&run, &vq_ops::test_device()).err().unwrap();
    assert!(other.to_string().contains("this is a prior"), "{other}");
}
