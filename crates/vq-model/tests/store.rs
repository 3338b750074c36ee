//! Saving, loading, and what is said about files that do not fit.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::Tensor;
use common::{all_kinds, bits, images, model, small, two_levels, values};
use vq_model::{CONFIG_FILE, CodebookUpdate, Config, Error, MODEL_FILE, VqVae};

#[test]
fn a_saved_model_loads_to_the_bit_with_averages_and_the_kmeans_flag_and_goes_on_alike() {
    for config in all_kinds() {
        let folder = tempfile::tempdir().unwrap();
        let (model, images) = (model(&config, 0), images(&config, 6, 1));
        let options = CodebookUpdate { revive_threshold: 0.3, seed: 4 };
        let step = |model: &VqVae, step: u64| {
            let output = model.evaluate(&images).unwrap();
            let reports = model.update_codebooks(&output.z_e, &output.codes, &options, step);
            let figures =
                |report: vq_model::CodebookReport| (report.counts().unwrap(), report.revived);
            reports.unwrap().into_iter().map(figures).collect::<Vec<_>>()
        };
        step(&model, 1);
        model.save(folder.path()).unwrap();
        let loaded = VqVae::from_pretrained(folder.path(), &vq_ops::test_device()).unwrap();
        assert_eq!(loaded.config(), model.config());
        assert_eq!(bits(&loaded), bits(&model));
        assert!(loaded.codebooks_initialized().unwrap());
        for number in 2..6 {
            assert_eq!(step(&loaded, number), step(&model, number));
        }
        assert_eq!(bits(&loaded), bits(&model));
        let reconstruction = |model: &VqVae| values(&model.reconstruct(&images).unwrap());
        assert_eq!(reconstruction(&loaded), reconstruction(&model));
    }
}

#[test]
fn the_same_model_gives_the_same_bytes_and_nothing_else_is_left_behind() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("a/b"), folder.path().join("c"));
    let model = model(&two_levels(), 0);
    model.save(&first).unwrap();
    // Over an older one, too.
    VqVae::new(&small(), 7, &vq_ops::test_device()).unwrap().save(&second).unwrap();
    VqVae::from_pretrained(&first, &vq_ops::test_device()).unwrap().save(&second).unwrap();
    for file in [CONFIG_FILE, MODEL_FILE] {
        assert_eq!(fs::read(first.join(file)).unwrap(), fs::read(second.join(file)).unwrap());
    }
    for folder in [first, second] {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, [CONFIG_FILE, MODEL_FILE]);
    }
}

#[test]
fn config_json_states_its_version_and_keeps_every_value() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(CONFIG_FILE);
    let mut config = two_levels();
    config.class_names = vec!["cat".to_owned(), "dog".to_owned()];
    config.normalization.mean = vec![0.4914, 0.4822, 0.4465];
    config.save(&path).unwrap();
    assert_eq!(Config::load(&path).unwrap(), config);
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.starts_with("{\n  \"format_version\": 1,\n  \"channels\": 3,"), "{text}");
    assert!(text.contains("\"rule\": \"gradient\""), "{text}");
    assert!(text.contains("\"gradient_estimator\": \"straight-through\""), "{text}");
    // Keys that are left out take the default's value.
    fs::write(&path, "{}").unwrap();
    assert_eq!(Config::load(&path).unwrap(), Config::default());
}

#[test]
fn a_config_that_is_wrong_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(CONFIG_FILE);
    let refused = |text: &str, parts: &[&str]| {
        fs::write(&path, text).unwrap();
        let message = Config::load(&path).unwrap_err().to_string();
        for part in parts.iter().chain(&[CONFIG_FILE]) {
            assert!(message.contains(part), "{message}");
        }
        assert_eq!(message.lines().count(), 1, "{message}");
    };
    refused(r#"{"chanels": 3}"#, &["unknown field `chanels`", "`channels`"]);
    refused(
        r#"{"levels": [{"quantizer": {"codebok_size": 3}}]}"#,
        &["unknown field `codebok_size`", "`codebook_size`"],
    );
    refused(
        r#"{"levels": [{"quantizer": {"rule": "emma"}}]}"#,
        &["unknown variant `emma`", "`ema`"],
    );
    refused(
        r#"{"levels": [{"quantizer": {"codebook_size": 0}}]}"#,
        &["levels.0.quantizer.codebook_size must be at least 1, got 0"],
    );
    refused(r#"{"format_version": 2}"#, &["format version 2 is newer", "update the program"]);
    refused(r#"{"format_version": "x"}"#, &["format_version must be 1 to 1"]);
    refused(r#"{"channels": 3"#, &["EOF"]);
    refused("[]", &["must be a JSON object"]);
}

#[test]
fn a_folder_without_a_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let message = load_error(folder.path());
    assert!(
        message.contains("config.json") && message.contains("a saved model is a folder"),
        "{message}"
    );
    small().save(folder.path().join(CONFIG_FILE)).unwrap();
    let message = load_error(folder.path());
    assert!(message.contains("cannot read") && message.contains(MODEL_FILE), "{message}");
}

#[test]
fn a_file_cut_short_anywhere_or_altered_is_refused() {
    let folder = saved(&small());
    let path = folder.path().join(MODEL_FILE);
    let whole = fs::read(&path).unwrap();
    for length in [0, 4, 8, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        let message = load_error(folder.path());
        assert!(message.contains("not a whole safetensors file"), "{length}: {message}");
        assert!(message.contains("take an earlier checkpoint"), "{message}");
    }
    let mut text = whole.clone();
    text[..8].copy_from_slice(b"not a te");
    fs::write(&path, &text).unwrap();
    assert!(load_error(folder.path()).contains("not a whole safetensors file"));
}

#[test]
fn a_checkpoint_of_another_architecture_is_refused_with_both_shapes() {
    let folder = saved(&small());
    let refused = |change: fn(&mut Config), part: &str| {
        let mut config = small();
        change(&mut config);
        config.save(folder.path().join(CONFIG_FILE)).unwrap();
        let message = load_error(folder.path());
        assert!(message.contains("checkpoint of another architecture"), "{message}");
        assert!(message.contains(part), "{message}");
    };
    refused(
        |config| config.levels[0].hidden = 12,
        "tensor `levels.0.decoder.0.bias` is [8], the config asks for [12]",
    );
    refused(
        |config| config.levels[0].quantizer.codebook_size = 20,
        "tensor `levels.0.quantizer.codebook` is [16, 6], the config asks for [20, 6]",
    );
    refused(
        |config| config.levels[0].quantizer.rule = vq_model::CodebookRule::Ema,
        "tensor `levels.0.quantizer.sums` [16, 6] is missing",
    );
    refused(
        |config| config.levels.push(config.levels[0].clone()),
        "tensor `levels.0.decoder.0.weight` is [8, 6, 3, 3], the config asks for [8, 12, 3, 3]",
    );
    refused(|config| config.levels[0].residual_blocks = 2, "tensor `levels.0.decoder.2.");
}

#[test]
fn missing_extra_and_not_finite_tensors_are_refused_and_leave_the_model_as_it_was() {
    let model = model(&small(), 0);
    let before = bits(&model);
    let copies = || -> BTreeMap<String, Tensor> {
        let other = VqVae::new(&small(), 9, &vq_ops::test_device()).unwrap().tensors();
        other.into_iter().map(|(name, t)| (name, t.force_contiguous().unwrap())).collect()
    };
    let refused = |tensors: &BTreeMap<String, Tensor>, part: &str| {
        let message = model.set_tensors(tensors).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
        assert_eq!(bits(&model), before);
    };
    let mut tensors = copies();
    tensors.remove("levels.0.projection.bias");
    refused(&tensors, "tensor `levels.0.projection.bias` [6] is missing");
    let mut tensors = copies();
    tensors.insert("levels.7.bias".to_owned(), tensors["levels.0.projection.bias"].clone());
    refused(&tensors, "tensor `levels.7.bias` [6] has no place in the config's model");
    let mut tensors = copies();
    let nan = Tensor::full(f32::NAN, 6, &vq_ops::test_device()).unwrap();
    tensors.insert("levels.0.projection.bias".to_owned(), nan);
    refused(&tensors, "tensor `levels.0.projection.bias` holds values that are not finite");
    model.set_tensors(&copies()).unwrap();
    assert_ne!(bits(&model), before);
}

#[test]
fn nan_and_other_types_in_a_file_are_refused_with_the_tensor() {
    let folder = saved(&small());
    let path = folder.path().join(MODEL_FILE);
    let name = "levels.0.encoder.0.bias";
    let write = |tensor: Tensor| {
        let mut tensors = candle_core::safetensors::load(&path, &vq_ops::test_device()).unwrap();
        tensors.insert(name.to_owned(), tensor);
        candle_core::safetensors::save(&tensors, &path).unwrap();
    };
    write(Tensor::full(f32::INFINITY, 4, &vq_ops::test_device()).unwrap());
    let message = load_error(folder.path());
    assert!(message.contains(name) && message.contains("not finite"), "{message}");
    assert!(message.contains(MODEL_FILE), "{message}");
    write(Tensor::full(1f64, 4, &vq_ops::test_device()).unwrap());
    assert!(load_error(folder.path()).contains("is F64, not F32"));
}

#[cfg(unix)]
#[test]
fn a_folder_that_cannot_be_written_is_said_and_the_old_file_stays() {
    let folder = saved(&small());
    let model = model(&small(), 1);
    // Root may write anywhere, so a file stands where the folder should be.
    let error = model.save(folder.path().join(MODEL_FILE)).unwrap_err();
    assert!(matches!(error, Error::Write { .. }), "{error}");
    assert!(error.to_string().contains("check permissions and free space"));
    assert!(VqVae::from_pretrained(folder.path(), &vq_ops::test_device()).is_ok());
}

fn saved(config: &Config) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    model(config, 0).save(folder.path()).unwrap();
    folder
}

fn load_error(folder: &Path) -> String {
    let message = VqVae::from_pretrained(folder, &vq_ops::test_device()).unwrap_err().to_string();
    assert_eq!(message.lines().count(), 1, "{message}");
    message
}
