//! `vq inspect` of a prior.

use std::path::Path;

use candle_core::Device;
use serde_json::json;
use vq_prior::{Config, Network, Prior};
use vq_train::Progress;

use super::inspect::{count, state, training};
use crate::cli::LogFormat;
use crate::error::Result;
use crate::output;

pub(super) fn run(folder: &Path, progress: Option<&Progress>, format: LogFormat) -> Result<()> {
    let prior = Prior::from_pretrained(folder, &Device::Cpu)?;
    let config = prior.config();
    if format == LogFormat::Json {
        return output::line(json!({
            "event": "inspected",
            "path": output::path(folder),
            "config": config,
            "parameters": count(prior.parameters()),
            "training": progress.map(state),
        }));
    }
    let [h, w] = config.grid;
    output::line(format!("{}\n", folder.display()))?;
    output::line(format!(
        "prior         of {h}×{w} positions of codes out of {:?}, {} codes an image",
        config.codebook_sizes,
        config.codes_per_image()
    ))?;
    for level in &config.conditioning {
        let [h, w] = level.grid;
        output::line(format!(
            "given         {h}×{w} positions of codes out of {:?}",
            level.codebook_sizes
        ))?;
    }
    output::line(match &config.network {
        Network::PixelCnn(network) => format!(
            "network       PixelCNN, {} layers of {} channels, {} for the skip connections",
            network.layers, network.channels, network.skip_channels
        ),
        Network::Transformer(network) => format!(
            "network       Transformer, {} layers of {} channels",
            network.layers, network.channels
        ),
    })?;
    output::line(format!("attention     {}", attention(config)))?;
    output::line(format!("model         {}", config.tokenizer))?;
    output::line(format!("parameters    {}", count(prior.parameters())))?;
    if config.class_count > 0 {
        let names = config.class_names.join(", ");
        output::line(format!("classes       {} ({names})", config.class_count))?;
    }
    match progress {
        Some(progress) => training(progress),
        None => output::line("training      no training state: a prior to use, not to resume"),
    }
}

/// Where the prior attends, and with how many heads.
fn attention(config: &Config) -> String {
    let own = match &config.network {
        Network::Transformer(network) => format!("in every layer, {} heads", network.heads),
        Network::PixelCnn(network) if network.has_attention() => {
            format!("after every {} layers, {} heads", network.attention_every, network.heads)
        }
        Network::PixelCnn(_) => "none".to_owned(),
    };
    if config.conditioning.is_empty() {
        return own;
    }
    format!("{own}; over the levels above, {} heads", config.conditioner.heads)
}

#[cfg(test)]
mod tests {
    use vq_prior::{GridConfig, PixelCnnConfig};

    use super::*;

    #[test]
    fn attention_is_named() {
        let mut config = Config::default();
        assert_eq!(attention(&config), "none");
        let network = PixelCnnConfig { attention_every: 5, ..PixelCnnConfig::default() };
        config.network = Network::PixelCnn(network);
        config.conditioning = vec![GridConfig { grid: [2, 2], codebook_sizes: vec![8] }];
        assert_eq!(
            attention(&config),
            "after every 5 layers, 4 heads; over the levels above, 4 heads"
        );
    }
}
