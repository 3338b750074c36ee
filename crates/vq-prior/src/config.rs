//! The architecture of a prior, as it stands in `config.json` and in a recipe's `[prior]` table.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The architecture of a [`Prior`](crate::Prior): what it predicts, what it is told, and its network.
///
/// Keys that are left out take the default's value; unknown keys are refused.
///
/// ```
/// let config = vq_prior::Config::default();
/// config.validate().unwrap();
/// assert_eq!(config.codes_per_image(), 64);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// A hash of the tokenizer whose codes these are, so that they are not decoded by another; empty where it
    /// is not known.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub tokenizer: String,
    /// Height and width of the grid of codes, in positions.
    pub grid: [usize; 2],
    /// K of every code of a position, in the order in which they are predicted. One entry is the usual
    /// case; product and residual quantizers have several.
    pub codebook_sizes: Vec<usize>,
    /// Number of classes; 0 = no class conditioning. The label `class_count` stands for no class.
    pub class_count: usize,
    /// Names of the classes in the order of their labels; empty, or one per class.
    pub class_names: Vec<String>,
    /// The probability of replacing a label by no class in training, so that samples can be guided (Ho &
    /// Salimans 2022, algorithm 1).
    pub label_dropout: f64,
    /// The grids of the levels above, which the prior sees whole; none for a top prior.
    pub conditioning: Vec<GridConfig>,
    /// The network that reads them.
    pub conditioner: ConditionerConfig,
    /// The probability of dropping an activation, in training.
    pub dropout: f64,
    /// Hidden width of the network that predicts a position's codes from its features.
    pub head_hidden: usize,
    /// The network that makes a position's features out of what came before.
    pub network: Network,
}

/// A grid of codes that the prior is conditioned on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GridConfig {
    /// Height and width in positions; they divide those of the prior's own grid.
    pub grid: [usize; 2],
    /// K of every code of a position.
    pub codebook_sizes: Vec<usize>,
}

/// The network that reads the grids of the levels above.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConditionerConfig {
    /// Channels of its layers and of the map that it gives.
    pub channels: usize,
    /// Residual blocks (3×3 and 1×1 convolutions).
    pub residual_blocks: usize,
    /// Heads of the attention over the whole grid that follows them, so that every position sees all of it.
    pub heads: usize,
}

/// The kind of the network and its sizes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Network {
    /// Gated convolutions (van den Oord et al. 2016b, "Conditional Image Generation with PixelCNN
    /// Decoders").
    PixelCnn(PixelCnnConfig),
    /// A decoder-only Transformer over positions in raster order.
    Transformer(TransformerConfig),
}

/// Sizes of a PixelCNN.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PixelCnnConfig {
    /// Channels of both stacks.
    pub channels: usize,
    /// Gated layers.
    pub layers: usize,
    /// Size of the square that the first layer's kernels are cut from; odd.
    pub first_kernel: usize,
    /// The same for the other layers.
    pub kernel: usize,
    /// Channels of the skip connections.
    pub skip_channels: usize,
    /// A block of causal self-attention follows every so many layers (Chen et al. 2018, `PixelSNAIL`);
    /// 0 = none.
    pub attention_every: usize,
    /// Heads of that attention; they divide `channels` where there is any.
    pub heads: usize,
}

/// Sizes of a Transformer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TransformerConfig {
    /// Channels of the residual stream.
    pub channels: usize,
    /// Layers.
    pub layers: usize,
    /// Heads of the attention.
    pub heads: usize,
    /// Channels inside a layer's `SwiGLU`.
    pub mlp_hidden: usize,
}

impl Config {
    /// G, the codes of a position.
    pub fn codes_per_position(&self) -> usize {
        self.codebook_sizes.len()
    }

    /// Codes of an image: h·w·G.
    pub fn codes_per_image(&self) -> usize {
        self.grid[0] * self.grid[1] * self.codes_per_position()
    }

    /// The labels of images of a data set with those classes, as the prior knows them: no class
    /// (`class_count`) where its classes are others. Empty for a prior without classes.
    pub fn labels_of(&self, class_names: &[String], labels: &[u32]) -> Vec<u32> {
        if self.class_count == 0 {
            return Vec::new();
        }
        let none = self.class_count as u32;
        let is_known = !class_names.is_empty() && class_names == self.class_names;
        labels.iter().map(|&label| if is_known { label.min(none) } else { none }).collect()
    }

    /// Checks every value; the error names the dotted key, e.g.
    /// `network.heads must divide the 128 channels, got 3`.
    pub fn validate(&self) -> Result<()> {
        check_grid("", self.grid, &self.codebook_sizes)?;
        within("class_count", self.class_count, 0, 1 << 20)?;
        if !self.class_names.is_empty() && self.class_names.len() != self.class_count {
            let problem = format!(
                "must be empty or hold one name for each of the {} classes, got {}",
                self.class_count,
                self.class_names.len()
            );
            return Err(Error::config("class_names", problem));
        }
        if !(0.0..=1.0).contains(&self.label_dropout) {
            let problem = format!("must be 0 to 1, got {}", self.label_dropout);
            return Err(Error::config("label_dropout", problem));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            let problem = format!("must be at least 0 and below 1, got {}", self.dropout);
            return Err(Error::config("dropout", problem));
        }
        within("head_hidden", self.head_hidden, 1, 1 << 16)?;
        for (index, level) in self.conditioning.iter().enumerate() {
            let prefix = format!("conditioning.{index}.");
            check_grid(&prefix, level.grid, &level.codebook_sizes)?;
            for (axis, (own, above)) in self.grid.iter().zip(level.grid).enumerate() {
                if !own.is_multiple_of(above) {
                    let problem = format!("must divide the grid's {own}, got {above}");
                    return Err(Error::config(format!("{prefix}grid.{axis}"), problem));
                }
            }
        }
        self.conditioner.validate(!self.conditioning.is_empty())?;
        match &self.network {
            Network::PixelCnn(network) => network.validate(),
            Network::Transformer(network) => network.validate(),
        }
    }
}

impl ConditionerConfig {
    fn validate(&self, is_used: bool) -> Result<()> {
        within("conditioner.residual_blocks", self.residual_blocks, 0, 1024)?;
        check_channels("conditioner", self.channels)?;
        if is_used { check_heads("conditioner", self.channels, self.heads) } else { Ok(()) }
    }
}

impl PixelCnnConfig {
    /// Whether a block of attention follows any layer; without one, `heads` has no meaning.
    pub fn has_attention(&self) -> bool {
        (1..self.layers).contains(&self.attention_every)
    }

    /// Whether one follows layer `index`, from 0. After the last layer it would change nothing: the skips
    /// are taken before it.
    pub(crate) fn attends_after(&self, index: usize) -> bool {
        let last = index + 1 == self.layers;
        self.attention_every > 0 && (index + 1).is_multiple_of(self.attention_every) && !last
    }

    fn validate(&self) -> Result<()> {
        within("network.layers", self.layers, 1, 1024)?;
        within("network.skip_channels", self.skip_channels, 1, 1 << 16)?;
        within("network.attention_every", self.attention_every, 0, 1024)?;
        for (key, size) in
            [("network.first_kernel", self.first_kernel), ("network.kernel", self.kernel)]
        {
            // Of a single pixel the causal part is empty, and the stacks would see nothing.
            within(key, size, 3, 255)?;
            if size.is_multiple_of(2) {
                return Err(Error::config(key, format!("must be odd, got {size}")));
            }
        }
        check_channels("network", self.channels)?;
        if self.has_attention() {
            check_heads("network", self.channels, self.heads)
        } else {
            Ok(())
        }
    }
}

impl TransformerConfig {
    fn validate(&self) -> Result<()> {
        within("network.layers", self.layers, 1, 1024)?;
        within("network.mlp_hidden", self.mlp_hidden, 1, 1 << 20)?;
        check_channels("network", self.channels)?;
        check_heads("network", self.channels, self.heads)
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            tokenizer: String::new(),
            grid: [8, 8],
            codebook_sizes: vec![512],
            class_count: 0,
            class_names: Vec::new(),
            label_dropout: 0.1,
            conditioning: Vec::new(),
            conditioner: ConditionerConfig::default(),
            dropout: 0.1,
            head_hidden: 256,
            network: Network::PixelCnn(PixelCnnConfig::default()),
        }
    }
}

impl Default for ConditionerConfig {
    fn default() -> Self {
        Self { channels: 64, residual_blocks: 2, heads: 4 }
    }
}

impl Default for PixelCnnConfig {
    fn default() -> Self {
        Self {
            channels: 128,
            layers: 10,
            first_kernel: 5,
            kernel: 3,
            skip_channels: 128,
            attention_every: 0,
            heads: 4,
        }
    }
}

impl Default for TransformerConfig {
    fn default() -> Self {
        Self { channels: 256, layers: 6, heads: 4, mlp_hidden: 512 }
    }
}

fn check_grid(prefix: &str, grid: [usize; 2], codebook_sizes: &[usize]) -> Result<()> {
    for (axis, size) in grid.into_iter().enumerate() {
        within(format!("{prefix}grid.{axis}"), size, 1, 1 << 12)?;
    }
    let key = format!("{prefix}codebook_sizes");
    if codebook_sizes.is_empty() {
        return Err(Error::config(key, "must hold the K of at least one code per position"));
    }
    for (index, &size) in codebook_sizes.iter().enumerate() {
        within(format!("{key}.{index}"), size, 1, 1 << 24)?;
    }
    Ok(())
}

fn check_channels(prefix: &str, channels: usize) -> Result<()> {
    within(format!("{prefix}.channels"), channels, 1, 1 << 16)
}

fn check_heads(prefix: &str, channels: usize, heads: usize) -> Result<()> {
    within(format!("{prefix}.heads"), heads, 1, channels)?;
    if !channels.is_multiple_of(heads) {
        let problem = format!("must divide the {channels} channels, got {heads}");
        return Err(Error::config(format!("{prefix}.heads"), problem));
    }
    Ok(())
}

/// `least ..= most`, or an error that names the key.
fn within(key: impl Into<String>, value: usize, least: usize, most: usize) -> Result<()> {
    if value < least {
        Err(Error::config(key, format!("must be at least {least}, got {value}")))
    } else if value > most {
        Err(Error::config(key, format!("must be at most {most}, got {value}")))
    } else {
        Ok(())
    }
}
