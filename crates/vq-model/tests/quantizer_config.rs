//! The keys of each kind of quantizer: read, written, refused.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{every_quantizer, small_of};
use vq_model::{CodebookRule, Config, QuantizerConfig, QuantizerKind, VqVae};

fn read(json: &str) -> Result<QuantizerConfig, String> {
    serde_json::from_str(json).map_err(|error| error.to_string())
}

/// What `validate` says of it.
fn problem(config: &QuantizerConfig) -> String {
    VqVae::new(&small_of(config), 0, &vq_ops::test_device()).unwrap_err().to_string()
}

#[test]
fn a_table_without_a_kind_is_a_vector_quantizers_as_before_there_were_others() {
    let old = r#"{"codebook_size": 512, "dim": 64, "cosine": false, "rule": "ema",
        "gradient_estimator": "straight-through", "decay": 0.99, "decay_warmup": 9.0,
        "epsilon": 1e-5}"#;
    let config = read(old).unwrap();
    assert_eq!(config.kind, QuantizerKind::Vector);
    let expected = QuantizerConfig {
        rule: CodebookRule::Ema,
        decay_warmup: 9.0,
        ..QuantizerConfig::default()
    };
    assert_eq!(config, expected);
    assert_eq!(read("{}").unwrap(), QuantizerConfig::default());
}

#[test]
fn every_kind_has_a_valid_default_of_512_codes_and_its_own_keys_alone() {
    for kind in QuantizerKind::ALL {
        assert_eq!(QuantizerKind::from_name(kind.name()), Some(kind));
        assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        let config = read(&format!(r#"{{"kind": "{}"}}"#, kind.name())).unwrap();
        assert_eq!(config, QuantizerConfig::of(kind));
        assert_eq!(config.codebook_size, 512, "{kind:?}");
        VqVae::new(&small_of(&config), 0, &vq_ops::test_device()).unwrap();
        let written = serde_json::to_value(&config).unwrap();
        let keys: Vec<&String> = written.as_object().unwrap().keys().collect();
        assert!(keys.iter().all(|key| *key == "kind" || kind.has_key(key)), "{keys:?}");
        assert!(keys.len() > 1);
    }
    assert_eq!(QuantizerKind::from_name("lookup_free"), None);
}

#[test]
fn what_is_written_reads_back_and_says_how_many_bits_a_position_takes() {
    for config in every_quantizer() {
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(read(&text).unwrap(), config, "{text}");
        let whole = small_of(&config);
        let bits = 16.0 * config.bits_per_position();
        assert!((whole.bits_per_image() - bits).abs() < 1e-9);
        let k = config.codebook_size as f64;
        let expected = config.codes_per_position() as f64 * k.log2();
        assert!((config.bits_per_position() - expected).abs() < 1e-12);
    }
    assert_eq!(QuantizerConfig::finite_scalar(&[8, 5, 5, 5]).codebook_size, 1000);
    assert_eq!(QuantizerConfig::lookup_free(18).codebook_size, 262_144);
    assert_eq!(QuantizerConfig::binary_spherical(18).dim, 18);
}

#[test]
fn keys_of_another_kind_are_refused_by_name() {
    for (json, parts) in [
        (r#"{"kind": "finite-scalar", "rule": "ema"}"#, ["`rule`", "`finite-scalar`"]),
        (r#"{"kind": "finite-scalar", "dim": 4}"#, ["`dim`", "leave it out"]),
        (r#"{"kind": "lookup-free", "codebook_size": 512}"#, ["`codebook_size`", "`lookup-free`"]),
        (r#"{"kind": "residual", "cosine": false}"#, ["`cosine`", "`residual`"]),
        (r#"{"kind": "sim", "rule": "gradient"}"#, ["`rule`", "`sim`"]),
        (r#"{"groups": 2}"#, ["`groups`", "`vector`"]),
        (r#"{"kind": "product", "stages": 2}"#, ["`stages`", "`product`"]),
        (r#"{"kind": "vector", "size": 2}"#, ["unknown field `size`", "`codebook_size`"]),
        (r#"{"kind": "fsq"}"#, ["unknown variant `fsq`", "`finite-scalar`"]),
    ] {
        let message = read(json).unwrap_err();
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
    // In Rust as well, where all fields are there.
    let of = QuantizerConfig::of;
    let key = "levels.0.quantizer";
    for (config, expected) in [
        (
            QuantizerConfig { rule: CodebookRule::Ema, ..of(QuantizerKind::FiniteScalar) },
            "rule does not apply to a quantizer of the kind `finite-scalar`; leave it out",
        ),
        (
            QuantizerConfig { stages: 5, ..of(QuantizerKind::Vector) },
            "stages does not apply to a quantizer of the kind `vector`; leave it out",
        ),
        (
            QuantizerConfig { levels: vec![8, 8], ..of(QuantizerKind::FiniteScalar) },
            "codebook_size follows from the other keys and must be 64, got 512",
        ),
        (
            QuantizerConfig { dim: 8, ..of(QuantizerKind::LookupFree) },
            "dim follows from the other keys and must be 9, got 8",
        ),
    ] {
        assert_eq!(problem(&config), format!("{key}.{expected}"));
    }
}

#[test]
fn values_out_of_range_are_named_by_their_key() {
    let of = QuantizerConfig::of;
    for (config, expected) in [
        (
            QuantizerConfig { groups: 0, ..of(QuantizerKind::Product) },
            "groups must be at least 1, got 0",
        ),
        (
            QuantizerConfig { groups: 3, ..of(QuantizerKind::Product) },
            "dim must be a multiple of groups = 3, got 64",
        ),
        (
            QuantizerConfig { stages: 0, ..of(QuantizerKind::Residual) },
            "stages must be at least 1, got 0",
        ),
        (
            QuantizerConfig { quantizer_dropout: 1.5, ..of(QuantizerKind::Residual) },
            "quantizer_dropout must be from 0 to 1, got 1.5",
        ),
        (QuantizerConfig::finite_scalar(&[]), "levels must hold at least one number"),
        (QuantizerConfig::finite_scalar(&[8, 1]), "levels.1 must be at least 2, got 1"),
        (QuantizerConfig::finite_scalar(&[1001]), "levels.0 must be at most 1000, got 1001"),
        (
            QuantizerConfig::finite_scalar(&[1000, 1000, 1000]),
            "levels (their product) must be at most 16777216, got 1000000000",
        ),
        (QuantizerConfig::lookup_free(0), "bits must be at least 1, got 0"),
        (QuantizerConfig::binary_spherical(25), "bits must be at most 24, got 25"),
        (QuantizerConfig::lookup_free(1_000_000), "bits must be at most 24, got 1000000"),
        (
            QuantizerConfig { entropy_group: 17, ..QuantizerConfig::lookup_free(9) },
            "entropy_group must be at most 16, got 17",
        ),
        (
            QuantizerConfig { entropy_weight: -0.1, ..of(QuantizerKind::IndexBackprop) },
            "entropy_weight must be at least 0, got -0.1",
        ),
        (
            QuantizerConfig { diversity: f64::NAN, ..of(QuantizerKind::LookupFree) },
            "diversity must be at least 0, got NaN",
        ),
        (
            QuantizerConfig { entropy_temperature: 0.0, ..of(QuantizerKind::LookupFree) },
            "entropy_temperature must be above 0, got 0",
        ),
    ] {
        assert_eq!(problem(&config), format!("levels.0.quantizer.{expected}"));
    }
}

#[test]
fn a_saved_config_holds_the_keys_of_its_kind() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let config = small_of(&QuantizerConfig::finite_scalar(&[8, 6, 5]));
    config.save(&path).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(r#""kind": "finite-scalar""#) && !text.contains("rule"), "{text}");
    assert_eq!(Config::load(&path).unwrap(), config);
}
