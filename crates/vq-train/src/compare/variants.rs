//! What is compared, in one TOML document.

use std::path::Path;

use serde::Deserialize;
use toml::{Table, Value};
use vq_model::{LevelConfig, QuantizerConfig, QuantizerKind};

use super::budget;
use crate::recipe_toml::{KIND, QUANTIZER, from_toml, laid_over};
use crate::{Error, Recipe, Result};

/// The variants of a comparison, as in `configs/compare.toml`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variants {
    /// The variant that the others are measured against.
    pub baseline: String,
    /// Keys that are laid over the recipe's `[train]` in all variants.
    #[serde(default)]
    train: Table,
    /// The variants in their order.
    #[serde(rename = "variant")]
    pub variants: Vec<Variant>,
}

/// One way to quantize.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variant {
    /// What it is called, also in the names of its run folders.
    pub name: String,
    /// Whether it takes part only where it is asked for by name.
    #[serde(default)]
    pub optional: bool,
    /// Keys that are laid over the `quantizer` of every level.
    #[serde(default)]
    quantizer: Table,
    /// Keys that are laid over `[train]`.
    #[serde(default)]
    train: Table,
}

/// The most bits at a position that are compared: a codebook of 2^24 vectors of 64 numbers takes 4 GB.
const MOST_BITS: f64 = 24.0;
/// Keys of `[train]` that make the conditions equal, so that a variant must not have its own.
const COMMON: [&str; 5] = ["epochs", "batch_size", "accumulate", "seed", "precision"];

impl Variants {
    /// Reads variants; `origin` is what an error calls the text. Checks names, not settings: these are
    /// checked on a recipe.
    pub fn from_toml(text: &str, origin: &str) -> Result<Self> {
        let variants: Self = from_toml(text, origin)?;
        let refuse = |problem: String| Error::Recipe { origin: origin.to_owned(), problem };
        for (index, variant) in variants.variants.iter().enumerate() {
            let name = &variant.name;
            if !is_name(name) {
                return Err(refuse(format!(
                    "`{name}` cannot be a variant's name: it names folders, so use letters, digits, `-`, `_` and \
                     `.`, beginning with a letter or digit"
                )));
            }
            if variants.variants.iter().take(index).any(|other| other.name == *name) {
                return Err(refuse(format!("two variants are called `{name}`")));
            }
        }
        variants.named(&variants.baseline).map_err(|_| {
            refuse(format!("the baseline `{}` is not one of the variants", variants.baseline))
        })?;
        Ok(variants)
    }

    /// Reads variants from a file.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::read(path))?;
        Self::from_toml(&text, &path.display().to_string())
    }

    /// A recipe with what all variants have in common laid over it.
    pub fn common(&self, recipe: &Recipe) -> Result<Recipe> {
        let train = Value::Table(self.train.clone());
        let over = Table::from_iter([("train".to_owned(), train)]);
        laid_over(recipe, "the comparison's [train]", over)
    }

    /// The variants of these names in the order of the names; `all` is the name of all of them. Without
    /// names all that are not optional.
    pub fn choose(&self, names: &[String]) -> Result<Vec<&Variant>> {
        if names.is_empty() {
            return Ok(self.variants.iter().filter(|variant| !variant.optional).collect());
        }
        if names == ["all"] {
            return Ok(self.variants.iter().collect());
        }
        let mut chosen: Vec<&Variant> = Vec::new();
        for name in names {
            let variant = self.named(name)?;
            if !chosen.contains(&variant) {
                chosen.push(variant);
            }
        }
        Ok(chosen)
    }

    fn named(&self, name: &str) -> Result<&Variant> {
        self.variants.iter().find(|variant| variant.name == name).ok_or_else(|| {
            let known: Vec<&str> = self.variants.iter().map(|known| known.name.as_str()).collect();
            let problem = format!("is not known; known are {}", known.join(", "));
            Error::config(format!("the variant `{name}`"), problem)
        })
    }
}

impl Variant {
    /// `base` with this variant's keys laid over it, checked. The sizes that the variant leaves out are
    /// chosen so that every level spends the bits of `base`, exactly or as near as its kind allows:
    /// [`Config::bits_per_image`](vq_model::Config::bits_per_image) says which.
    pub fn recipe(&self, base: &Recipe) -> Result<Recipe> {
        let origin = format!("the variant `{}`", self.name);
        let refuse = |problem: String| Error::Recipe { origin: origin.clone(), problem };
        if let Some(key) = COMMON.iter().find(|key| self.train.contains_key(**key)) {
            return Err(refuse(format!(
                "train.{key} must be the same for all: set it by a flag, by --set or in the file's [train]"
            )));
        }
        let bits = |level: &LevelConfig| level.quantizer.bits_per_position();
        if let Some(bits) = base.model.levels.iter().map(bits).find(|bits| *bits > MOST_BITS) {
            return Err(refuse(format!(
                "the recipe spends {bits} bits at a position, and not every quantizer can: compare on a recipe of at \
                 most {MOST_BITS}"
            )));
        }
        let level = |level: &LevelConfig| {
            let quantizer = Value::Table(self.quantizer(&level.quantizer));
            Value::Table(Table::from_iter([(QUANTIZER.to_owned(), quantizer)]))
        };
        let levels = Value::Array(base.model.levels.iter().map(level).collect());
        let model = Table::from_iter([("levels".to_owned(), levels)]);
        let over = Table::from_iter([
            ("model".to_owned(), Value::Table(model)),
            ("train".to_owned(), Value::Table(self.train.clone())),
        ]);
        let recipe = laid_over(base, &origin, over)?;
        recipe.validate().map_err(|error| refuse(error.to_string()))?;
        Ok(recipe)
    }

    /// The keys for a level whose quantizer in the base recipe is `base`.
    fn quantizer(&self, base: &QuantizerConfig) -> Table {
        let mut quantizer = self.quantizer.clone();
        let kind = match quantizer.get(KIND).and_then(Value::as_str) {
            // What is no kind is refused where the recipe is read.
            Some(name) => QuantizerKind::from_name(name),
            None => Some(base.kind),
        };
        if let Some(kind) = kind {
            let dim =
                if base.kind.has_key("dim") { base.dim } else { QuantizerConfig::of(kind).dim };
            budget::fill(&mut quantizer, kind, dim, base.bits_per_position());
        }
        quantizer
    }
}

fn is_name(name: &str) -> bool {
    name.len() <= 64
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}
