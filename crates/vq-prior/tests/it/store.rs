//! Saving and loading.

use std::fs;

use candle_core::Device;
use vq_model::{CONFIG_FILE, MODEL_FILE};
use vq_prior::{Config, Prior};

use crate::common::{Data, all_kinds, pixelcnn, plain, prior, rich, values};

#[test]
fn a_saved_prior_loads_to_the_bit_with_its_class_names() {
    for (_, mut config) in all_kinds() {
        if config.class_count == 3 {
            config.class_names = ["disc", "ring", "square"].map(str::to_owned).to_vec();
        }
        let (folder, prior) = (tempfile::tempdir().unwrap(), prior(&config));
        prior.save(folder.path()).unwrap();
        let loaded = Prior::from_pretrained(folder.path(), &Device::Cpu).unwrap();
        assert_eq!(loaded.config(), prior.config());
        let data = Data::new(&config, 2, 3);
        let logits =
            |prior: &Prior| values(&prior.logits(&data.codes, &data.conditions()).unwrap());
        assert_eq!(logits(&loaded), logits(&prior));
        let again = tempfile::tempdir().unwrap();
        loaded.save(again.path()).unwrap();
        for file in [CONFIG_FILE, MODEL_FILE] {
            let bytes = |folder: &tempfile::TempDir| fs::read(folder.path().join(file)).unwrap();
            assert_eq!(bytes(&folder), bytes(&again));
        }
    }
}

#[test]
fn what_a_parameter_starts_as_depends_on_the_seed_and_its_name_alone() {
    let small = plain(pixelcnn(0), [4, 4]);
    let large = Config { class_count: 5, ..small.clone() };
    let start = |config: &Config, seed| {
        let prior = Prior::new(config, seed, &Device::Cpu).unwrap();
        values(prior.parameters()["layers.1.vertical.weight"].as_tensor())
    };
    assert_eq!(start(&small, 1), start(&large, 1));
    assert_ne!(start(&small, 1), start(&small, 2));
}

#[test]
fn folders_that_hold_something_else_are_refused_with_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let load = || Prior::from_pretrained(folder.path(), &Device::Cpu).unwrap_err().to_string();
    assert!(load().contains("cannot read"));
    let config = rich(pixelcnn(0));
    prior(&config).save(folder.path()).unwrap();
    let other = Config { head_hidden: 11, ..config };
    let json = serde_json::to_string(&other).unwrap();
    fs::write(folder.path().join(CONFIG_FILE), json).unwrap();
    let message = load();
    assert!(message.contains("another architecture"), "{message}");
    // A tokenizer's config has other keys.
    vq_model::Config::default().save(folder.path().join(CONFIG_FILE)).unwrap();
    assert!(load().contains("unknown field"), "{}", load());
}
