//! The table as a file holds it.

use serde::{Deserialize, Serialize};

use super::{CodebookRule, GradientEstimator, QuantizerConfig, QuantizerKind, not_of};

/// The table as it is stored: the keys of the kind, each of which may be left out.
#[derive(Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Stored {
    kind: QuantizerKind,
    #[serde(skip_serializing_if = "Option::is_none")]
    codebook_size: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dim: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cosine: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<CodebookRule>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gradient_estimator: Option<GradientEstimator>,
    #[serde(skip_serializing_if = "Option::is_none")]
    decay: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    decay_warmup: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    epsilon: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    groups: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stages: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    quantizer_dropout: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    levels: Option<Vec<usize>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bits: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    entropy_weight: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    diversity: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    entropy_temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    entropy_group: Option<usize>,
}

/// Calls `$each!(key)` for every key but `kind`, so that no list can miss one.
macro_rules! for_each_key {
    ($each:ident) => {
        $each!(
            codebook_size,
            dim,
            cosine,
            rule,
            gradient_estimator,
            decay,
            decay_warmup,
            epsilon,
            groups,
            stages,
            quantizer_dropout,
            levels,
            bits,
            entropy_weight,
            diversity,
            entropy_temperature,
            entropy_group
        )
    };
}

impl Stored {
    /// The keys that `keep` says.
    pub(super) fn of(config: &QuantizerConfig, keep: impl Fn(&str) -> bool) -> Self {
        macro_rules! fill {
            ($($key:ident),*) => {
                Self {
                    kind: config.kind,
                    $($key: keep(stringify!($key)).then(|| config.$key.clone()),)*
                }
            };
        }
        for_each_key!(fill)
    }
}

impl TryFrom<Stored> for QuantizerConfig {
    type Error = String;

    fn try_from(stored: Stored) -> std::result::Result<Self, String> {
        let kind = stored.kind;
        let mut config = Self::of(kind);
        macro_rules! take {
            ($($key:ident),*) => {
                $(if let Some(value) = stored.$key {
                    if !kind.has_key(stringify!($key)) {
                        return Err(format!("`{}` {}", stringify!($key), not_of(kind)));
                    }
                    config.$key = value;
                })*
            };
        }
        for_each_key!(take);
        Ok(config.with_derived())
    }
}

impl From<QuantizerConfig> for Stored {
    fn from(config: QuantizerConfig) -> Self {
        Self::of(&config, |key| config.kind.has_key(key))
    }
}
