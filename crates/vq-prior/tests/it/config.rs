//! Configs: what is refused, and by which key.

use vq_prior::{Config, GridConfig, Network, PixelCnnConfig, TransformerConfig};

fn problem(change: impl FnOnce(&mut Config)) -> String {
    let mut config = Config::default();
    change(&mut config);
    config.validate().unwrap_err().to_string()
}

fn pixelcnn(network: PixelCnnConfig) -> Network {
    Network::PixelCnn(network)
}

#[test]
fn values_out_of_range_are_named_by_their_key() {
    let default = PixelCnnConfig::default;
    let cases = [
        (problem(|c| c.grid = [8, 0]), "grid.1 must be at least 1"),
        (problem(|c| c.codebook_sizes = vec![]), "codebook_sizes must hold"),
        (problem(|c| c.codebook_sizes = vec![4, 0]), "codebook_sizes.1 must be at least 1"),
        (problem(|c| c.class_names = vec!["cat".into()]), "class_names must be empty or hold"),
        (problem(|c| c.label_dropout = f64::NAN), "label_dropout must be 0 to 1"),
        (problem(|c| c.dropout = 1.0), "dropout must be at least 0 and below 1"),
        (problem(|c| c.head_hidden = 0), "head_hidden must be at least 1"),
        (
            problem(|c| {
                c.conditioning = vec![GridConfig { grid: [4, 4], codebook_sizes: vec![2] }];
                c.conditioner.heads = 3;
            }),
            "conditioner.heads must divide the 64 channels",
        ),
        (
            problem(|c| {
                let network = PixelCnnConfig { attention_every: 3, heads: 3, ..default() };
                c.network = pixelcnn(network);
            }),
            "network.heads must divide the 128 channels, got 3",
        ),
        (problem(|c| c.conditioner.channels = 0), "conditioner.channels must be at least 1"),
        (
            problem(|c| {
                c.conditioning = vec![GridConfig { grid: [4, 3], codebook_sizes: vec![2] }];
            }),
            "conditioning.0.grid.1 must divide the grid's 8, got 3",
        ),
        (
            problem(|c| c.network = pixelcnn(PixelCnnConfig { kernel: 4, ..default() })),
            "network.kernel must be odd",
        ),
        (
            problem(|c| c.network = pixelcnn(PixelCnnConfig { first_kernel: 1, ..default() })),
            "network.first_kernel must be at least 3",
        ),
        (
            problem(|c| {
                c.network = Network::Transformer(TransformerConfig {
                    heads: 3,
                    ..TransformerConfig::default()
                });
            }),
            "network.heads must divide the 256 channels, got 3",
        ),
    ];
    for (message, expected) in cases {
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn heads_matter_only_where_there_is_attention() {
    let mut config = Config::default();
    config.conditioner.heads = 3;
    for attention_every in [0, 10, 11] {
        let network = PixelCnnConfig { attention_every, heads: 3, ..PixelCnnConfig::default() };
        // None follows the last of the 10 layers.
        assert!(!network.has_attention());
        config.network = pixelcnn(network);
        config.validate().unwrap();
    }
    assert!(PixelCnnConfig { attention_every: 9, ..PixelCnnConfig::default() }.has_attention());
}

#[test]
fn json_keeps_every_value_and_refuses_unknown_keys_at_every_depth() {
    for network in [
        Network::PixelCnn(PixelCnnConfig::default()),
        Network::Transformer(TransformerConfig::default()),
    ] {
        let level = GridConfig { grid: [4, 4], codebook_sizes: vec![8, 9] };
        let config = Config { network, conditioning: vec![level], ..Config::default() };
        let json = serde_json::to_value(&config).unwrap();
        assert_eq!(serde_json::from_value::<Config>(json.clone()).unwrap(), config);
        for path in ["", "/network", "/conditioner", "/conditioning/0"] {
            let mut json = json.clone();
            json.pointer_mut(path).unwrap()["speed"] = 1.into();
            let error = serde_json::from_value::<Config>(json).unwrap_err().to_string();
            assert!(error.contains("speed"), "{error}");
        }
    }
    let short: Config =
        serde_json::from_str(r#"{"grid": [4, 4], "network": {"kind": "transformer"}}"#).unwrap();
    assert_eq!(short.network, Network::Transformer(TransformerConfig::default()));
    assert!(serde_json::from_str::<Config>(r#"{"network": {"kind": "lstm"}}"#).is_err());
}
