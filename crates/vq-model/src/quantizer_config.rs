//! The settings of a quantizer: which kind it is, and the keys that this kind has.

mod stored;

use serde::{Deserialize, Serialize};
use vq_ops::AverageRule;

use self::stored::Stored;
use crate::config::within;
use crate::{Error, Result};

/// A quantizer, as it stands in a level's `quantizer` table.
///
/// [`kind`](Self::kind) decides which of the other keys apply; see [`QuantizerKind`]. A file that sets
/// another key is refused, and only the keys that apply are written. In Rust the others must stay as
/// [`QuantizerConfig::of`] gives them, which is best where one starts:
///
/// ```
/// use vq_model::{QuantizerConfig, QuantizerKind};
///
/// let residual = QuantizerConfig { stages: 8, ..QuantizerConfig::of(QuantizerKind::Residual) };
/// assert_eq!(residual.bits_per_position(), 8.0 * 9.0);
/// let scalar = QuantizerConfig::finite_scalar(&[8, 5, 5, 5]);
/// assert_eq!((scalar.codebook_size, scalar.dim), (1000, 4));
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct QuantizerConfig {
    /// Which quantizer it is. `vector` where a file does not say.
    pub kind: QuantizerKind,
    /// K, the number of code vectors of each codebook. Follows from `levels` or `bits` where the kind
    /// has these.
    pub codebook_size: usize,
    /// D, the length of the vectors that are quantized. The 1×1 convolution at the encoder's end maps
    /// [`hidden`](crate::LevelConfig::hidden) to D and the decoder's first convolution maps D back: a
    /// small D is the low-dimensional lookup of Yu et al. 2022 ("Vector-quantized Image Modeling with
    /// Improved VQGAN", section 3.2) without further projections. Follows from `levels` or `bits` where
    /// the kind has these.
    pub dim: usize,
    /// Compare directions only: vectors and codes are scaled to length 1, and the losses are taken
    /// between the scaled ones (Yu et al. 2022, "Vector-quantized Image Modeling with Improved VQGAN").
    pub cosine: bool,
    /// What moves the code vectors.
    pub rule: CodebookRule,
    /// What the encoder receives as the gradient of `z_q`.
    pub gradient_estimator: GradientEstimator,
    /// γ of the moving averages N and m (rule `ema`), and of the usage that revival looks at (both rules).
    pub decay: f64,
    /// γ rises to `decay`: at step t (from 1) it is min(`decay`, t / (t + `decay_warmup`)). Short averages
    /// follow an encoder that still moves fast, and soon tell which codes are dead. In steps; 0 = off.
    pub decay_warmup: f64,
    /// ε of the Laplace smoothing of N (rule `ema`).
    pub epsilon: f64,
    /// G of the kind `product`: D is cut into so many equal parts, each with a codebook of its own.
    pub groups: usize,
    /// G of the kind `residual`: each stage quantizes what the stages before it left.
    pub stages: usize,
    /// Kind `residual`: the share of training images for which only the first n stages are used, n being
    /// uniform in 1..=G (Zeghidour et al. 2021, section III-C). Codes can then be cut short; 0 = off.
    pub quantizer_dropout: f64,
    /// Kind `finite-scalar`: how many values each of the D numbers can take.
    pub levels: Vec<usize>,
    /// Kinds `lookup-free` and `binary-spherical`: D, one bit for each number; K = 2^D.
    pub bits: usize,
    /// Weight of the entropy loss, E\[H(code|z)\] − γ·H(E\[code|z\]); 0 = off.
    pub entropy_weight: f64,
    /// γ of the entropy loss: how much an even use of all codes counts beside the certainty of each.
    pub diversity: f64,
    /// τ of the entropy loss: the codes' probabilities are the softmax of 2·z·e/τ (binary codes) or
    /// z·e/τ (`index-backprop`).
    pub entropy_temperature: f64,
    /// The even use of binary codes is reckoned from the joint distribution of so many bits at a time;
    /// the groups are taken to be independent. Exact where one group holds all bits; 1 = bit by bit.
    pub entropy_group: usize,
}

/// The quantizers, and the keys that each has beside `kind`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum QuantizerKind {
    /// The nearest of K code vectors (van den Oord et al. 2017): `codebook_size`, `dim`, `cosine`, `rule`,
    /// `gradient_estimator`, `decay`, `decay_warmup`, `epsilon`.
    #[default]
    Vector,
    /// A `vector` quantizer for each of G parts of the vector (Jégou et al. 2011, "Product Quantization
    /// for Nearest Neighbor Search"): the keys of `vector` and `groups`.
    Product,
    /// G `vector` quantizers one after the other, each for what is left (Zeghidour et al. 2021,
    /// "`SoundStream`: An End-to-End Neural Audio
    /// Codec"; Lee et al. 2022): the keys of `vector` but `cosine`; `stages`, `quantizer_dropout`.
    Residual,
    /// Each number rounded to one of a few values (Mentzer et al. 2023, "Finite Scalar Quantization"):
    /// `levels`.
    FiniteScalar,
    /// The sign of each number (Yu et al. 2023, "Language Model Beats Diffusion", section 3.1): `bits`,
    /// `entropy_weight`, `diversity`, `entropy_temperature`, `entropy_group`. A commitment weight (β) as
    /// small as 0.25 lets the entropy loss spread the signs first; with 1 they may all become alike.
    LookupFree,
    /// The sign of each number of a vector of length 1 (Zhao et al. 2024, "Image and Video Tokenization
    /// with Binary Spherical Quantization"): the keys of `lookup-free`.
    BinarySpherical,
    /// The nearest of K fixed vectors that a learned matrix turns (Zhu et al. 2024, "Addressing
    /// Representation Collapse in Vector Quantized Models with One Linear Layer"): `codebook_size`, `dim`,
    /// `gradient_estimator`.
    Sim,
    /// The code with the largest inner product, with a gradient to all of them (Shi et al. 2024, "Scalable
    /// Image Tokenization with Index Backpropagation Quantization"): `codebook_size`, `dim`,
    /// `entropy_weight`, `diversity`, `entropy_temperature`.
    IndexBackprop,
}

/// What moves the code vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CodebookRule {
    /// The codebook is a parameter, trained on ‖sg\[`z_e`\] − e‖² (van den Oord et al. 2017, eq. 3, second term).
    Gradient,
    /// Moving averages of the vectors assigned to each code (van den Oord et al. 2017, appendix A.1).
    Ema,
}

/// What the encoder receives as the gradient of `z_q`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GradientEstimator {
    /// ∂L/∂`z_e` = ∂L/∂`z_q` (van den Oord et al. 2017, section 3.2).
    StraightThrough,
    /// ∂L/∂`z_e` = λRᵀ ∂L/∂`z_q`, with the rotation R and the scale λ that take `z_e` to its code
    /// (Fifty et al. 2024, section 4.2).
    Rotation,
}

impl QuantizerKind {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Vector,
        Self::Product,
        Self::Residual,
        Self::FiniteScalar,
        Self::LookupFree,
        Self::BinarySpherical,
        Self::Sim,
        Self::IndexBackprop,
    ];

    /// As a config spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vector => "vector",
            Self::Product => "product",
            Self::Residual => "residual",
            Self::FiniteScalar => "finite-scalar",
            Self::LookupFree => "lookup-free",
            Self::BinarySpherical => "binary-spherical",
            Self::Sim => "sim",
            Self::IndexBackprop => "index-backprop",
        }
    }

    /// The kind that a config spells so.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Whether a config of this kind has that key, beside `kind`.
    pub fn has_key(self, key: &str) -> bool {
        match key {
            "codebook_size" | "dim" => !self.is_implicit(),
            "gradient_estimator" => self.has_learned_vectors() || self == Self::Sim,
            "rule" | "decay" | "decay_warmup" | "epsilon" => self.has_learned_vectors(),
            "cosine" => matches!(self, Self::Vector | Self::Product),
            "groups" => self == Self::Product,
            "stages" | "quantizer_dropout" => self == Self::Residual,
            "levels" => self == Self::FiniteScalar,
            "bits" | "entropy_group" => self.is_binary(),
            "entropy_weight" | "diversity" | "entropy_temperature" => {
                self.is_binary() || self == Self::IndexBackprop
            }
            _ => false,
        }
    }

    /// Whether the codes follow from their numbers, so that there is no codebook.
    pub fn is_implicit(self) -> bool {
        self == Self::FiniteScalar || self.is_binary()
    }

    fn is_binary(self) -> bool {
        matches!(self, Self::LookupFree | Self::BinarySpherical)
    }

    fn has_learned_vectors(self) -> bool {
        matches!(self, Self::Vector | Self::Product | Self::Residual)
    }
}

impl QuantizerConfig {
    /// The default of that kind; 512 codes (in each codebook) of all of them.
    pub fn of(kind: QuantizerKind) -> Self {
        let config = Self {
            kind,
            codebook_size: 512,
            dim: 64,
            cosine: false,
            rule: CodebookRule::Gradient,
            gradient_estimator: GradientEstimator::StraightThrough,
            decay: 0.99,
            decay_warmup: 0.0,
            epsilon: 1e-5,
            groups: 2,
            stages: 4,
            quantizer_dropout: 0.0,
            levels: vec![8, 8, 8],
            bits: 9,
            entropy_weight: 0.1,
            diversity: 1.0,
            // The authors' code has 0.01 for binary codes of size 1 as well. There the probabilities of a fresh
            // encoder's outputs are 0 and 1 already, the entropies have no gradient, and all bits collapse.
            entropy_temperature: if kind.is_binary() { 1.0 } else { 0.01 },
            entropy_group: if kind == QuantizerKind::BinarySpherical { 1 } else { 9 },
        };
        config.with_derived()
    }

    /// The kind `finite-scalar` with these levels.
    pub fn finite_scalar(levels: &[usize]) -> Self {
        let of = Self::of(QuantizerKind::FiniteScalar);
        Self { levels: levels.to_vec(), ..of }.with_derived()
    }

    /// The kind `lookup-free` with 2^`bits` codes.
    pub fn lookup_free(bits: usize) -> Self {
        Self { bits, ..Self::of(QuantizerKind::LookupFree) }.with_derived()
    }

    /// The kind `binary-spherical` with 2^`bits` codes.
    pub fn binary_spherical(bits: usize) -> Self {
        Self { bits, ..Self::of(QuantizerKind::BinarySpherical) }.with_derived()
    }

    /// G, the number of codebooks, and so of codes at each position.
    pub fn codes_per_position(&self) -> usize {
        match self.kind {
            QuantizerKind::Product => self.groups,
            QuantizerKind::Residual => self.stages,
            _ => 1,
        }
    }

    /// G·log₂K.
    pub fn bits_per_position(&self) -> f64 {
        self.codes_per_position() as f64 * (self.codebook_size as f64).log2()
    }

    /// γ of the moving averages at that step, from 1; see [`QuantizerConfig::decay_warmup`].
    pub fn decay_at(&self, step: u64) -> f64 {
        self.average_rule().decay_at(step)
    }

    /// How a codebook follows its moving averages.
    pub(crate) fn average_rule(&self) -> AverageRule {
        AverageRule {
            decay: self.decay,
            warmup: self.decay_warmup,
            epsilon: self.epsilon,
            cosine: self.cosine,
        }
    }

    pub(crate) fn validate(&self, prefix: &str) -> Result<()> {
        let key = |name: &str| format!("{prefix}.{name}");
        self.check_sizes(&key)?;
        if !(0.0..1.0).contains(&self.decay) {
            let problem = format!("must be at least 0 and below 1, got {}", self.decay);
            return Err(Error::config(key("decay"), problem));
        }
        if !(0.0..=1.0).contains(&self.quantizer_dropout) {
            let problem = format!("must be from 0 to 1, got {}", self.quantizer_dropout);
            return Err(Error::config(key("quantizer_dropout"), problem));
        }
        for (name, value) in [
            ("decay_warmup", self.decay_warmup),
            ("entropy_weight", self.entropy_weight),
            ("diversity", self.diversity),
        ] {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(Error::config(key(name), format!("must be at least 0, got {value}")));
            }
        }
        for (name, value) in
            [("epsilon", self.epsilon), ("entropy_temperature", self.entropy_temperature)]
        {
            if !(value > 0.0 && value.is_finite()) {
                return Err(Error::config(key(name), format!("must be above 0, got {value}")));
            }
        }
        self.check_others(&key)
    }

    fn check_sizes(&self, key: &dyn Fn(&str) -> String) -> Result<()> {
        within(key("groups"), self.groups, 1, 1024)?;
        within(key("stages"), self.stages, 1, 1024)?;
        within(key("bits"), self.bits, 1, MOST_BITS)?;
        within(key("entropy_group"), self.entropy_group, 1, 16)?;
        if self.levels.is_empty() {
            return Err(Error::config(key("levels"), "must hold at least one number"));
        }
        for (index, &levels) in self.levels.iter().enumerate() {
            // From 1,001 on the outermost level is out of the reach of Mentzer et al.'s bound.
            within(key(&format!("levels.{index}")), levels, 2, 1000)?;
        }
        let product = self.levels.iter().fold(1usize, |all, &levels| all.saturating_mul(levels));
        within(key("levels (their product)"), product, 1, 1 << MOST_BITS)?;
        within(key("codebook_size"), self.codebook_size, 1, 1 << MOST_BITS)?;
        within(key("dim"), self.dim, 1, 1 << 16)?;
        if self.kind == QuantizerKind::Product && !self.dim.is_multiple_of(self.groups) {
            let problem =
                format!("must be a multiple of groups = {}, got {}", self.groups, self.dim);
            return Err(Error::config(key("dim"), problem));
        }
        Ok(())
    }

    /// Keys that the kind does not have must not have been set: they would be without effect.
    fn check_others(&self, key: &dyn Fn(&str) -> String) -> Result<()> {
        let plain = Stored::of(self, |key| self.kind.has_key(key));
        let expected =
            Self::try_from(plain).map_err(|problem| Error::config(key("kind"), problem))?;
        let all = |config: &Self| serde_json::to_value(Stored::of(config, |_| true));
        let (Ok(own), Ok(expected)) = (all(self), all(&expected)) else {
            return Err(Error::config(key("kind"), "holds values that cannot be stored"));
        };
        let (Some(own), Some(expected)) = (own.as_object(), expected.as_object()) else {
            return Ok(());
        };
        for (name, value) in own {
            let other = expected.get(name).unwrap_or(value);
            if value == other {
                continue;
            }
            let problem =
                if self.kind.is_implicit() && matches!(name.as_str(), "codebook_size" | "dim") {
                    format!("follows from the other keys and must be {other}, got {value}")
                } else {
                    not_of(self.kind)
                };
            return Err(Error::config(key(name), problem));
        }
        Ok(())
    }

    /// With K and D as they follow from the other keys, where they do.
    fn with_derived(mut self) -> Self {
        match self.kind {
            QuantizerKind::FiniteScalar => {
                self.codebook_size = self.levels.iter().fold(1, |all, &l| all.saturating_mul(l));
                self.dim = self.levels.len();
            }
            QuantizerKind::LookupFree | QuantizerKind::BinarySpherical => {
                self.codebook_size = 1usize.checked_shl(self.bits as u32).unwrap_or(usize::MAX);
                self.dim = self.bits;
            }
            _ => {}
        }
        self
    }
}

impl Default for QuantizerConfig {
    fn default() -> Self {
        Self::of(QuantizerKind::default())
    }
}

/// A number below 2^24 is exact in f32, in which implicit codes are reckoned.
const MOST_BITS: usize = 24;

/// What is wrong with a key that the kind does not have.
fn not_of(kind: QuantizerKind) -> String {
    format!("does not apply to a quantizer of the kind `{}`; leave it out", kind.name())
}
