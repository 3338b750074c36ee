//! The recipes that the program carries with it.

use std::path::Path;

use vq_train::{PriorRecipe, Recipe, Variants};

use crate::error::{Error, Result};

/// A recipe's file.
pub(crate) struct Embedded {
    pub(crate) name: &'static str,
    pub(crate) text: &'static str,
}

/// What `train` does without `--config`.
pub(crate) const DEFAULT: &str = "cifar10";
/// What it does with the built-in data set.
pub(crate) const SHAPES: &str = "shapes";
/// What it does with its plain images.
pub(crate) const PLAIN_SHAPES: &str = "plain-shapes";

pub(crate) const EMBEDDED: [Embedded; 9] = [
    Embedded { name: DEFAULT, text: include_str!("../configs/cifar10.toml") },
    Embedded { name: "cifar10-paper", text: include_str!("../configs/cifar10-paper.toml") },
    Embedded {
        name: "cifar10-hierarchical",
        text: include_str!("../configs/cifar10-hierarchical.toml"),
    },
    Embedded {
        name: "cifar10-likelihood",
        text: include_str!("../configs/cifar10-likelihood.toml"),
    },
    Embedded { name: "imagenet256", text: include_str!("../configs/imagenet256.toml") },
    Embedded { name: "images1024", text: include_str!("../configs/images1024.toml") },
    Embedded { name: SHAPES, text: include_str!("../configs/shapes.toml") },
    Embedded { name: PLAIN_SHAPES, text: include_str!("../configs/plain-shapes.toml") },
    Embedded {
        name: "plain-shapes-hierarchical",
        text: include_str!("../configs/plain-shapes-hierarchical.toml"),
    },
];

/// What `train-prior` does without `--config`, by the kind of the network.
pub(crate) const PIXELCNN: &str = "prior-pixelcnn";
pub(crate) const TRANSFORMER: &str = "prior-transformer";

pub(crate) const EMBEDDED_PRIORS: [Embedded; 2] = [
    Embedded { name: PIXELCNN, text: include_str!("../configs/prior-pixelcnn.toml") },
    Embedded { name: TRANSFORMER, text: include_str!("../configs/prior-transformer.toml") },
];

/// What `compare` compares without `--variants`.
pub(crate) const COMPARE: &str = "compare";

pub(crate) const EMBEDDED_VARIANTS: Embedded =
    Embedded { name: COMPARE, text: include_str!("../configs/compare.toml") };

impl Embedded {
    /// The comment that the file begins with, up to its first empty line, without the `#`.
    pub(crate) fn summary(&self) -> String {
        let comment = self.text.lines().map_while(|line| line.strip_prefix('#'));
        let lines: Vec<&str> = comment.map(str::trim).take_while(|line| !line.is_empty()).collect();
        lines.join(" ")
    }
}

/// An embedded recipe.
pub(crate) fn embedded(name: &str) -> Result<&'static Embedded> {
    all().find(|recipe| recipe.name == name).ok_or_else(|| {
        let known = all().map(|recipe| recipe.name).collect::<Vec<_>>().join(", ");
        Error::other(format!(
            "there is no file and no embedded recipe `{name}`; the embedded ones are {known}"
        ))
    })
}

/// The recipe of that name, or in that file: a file is meant by a path (`./x`) or by `.toml`.
pub(crate) fn load(name: &str) -> Result<Recipe> {
    if let Some(known) = EMBEDDED.iter().find(|recipe| recipe.name == name) {
        return Ok(Recipe::from_toml(known.text, &format!("the embedded recipe {name}"))?);
    }
    if let Some(path) = path(name) {
        return Ok(Recipe::from_file(path)?);
    }
    Err(refused(name))
}

/// The same for a prior's.
pub(crate) fn load_prior(name: &str) -> Result<PriorRecipe> {
    if let Some(known) = EMBEDDED_PRIORS.iter().find(|recipe| recipe.name == name) {
        return Ok(PriorRecipe::from_toml(known.text, &format!("the embedded recipe {name}"))?);
    }
    if let Some(path) = path(name) {
        return Ok(PriorRecipe::from_file(path)?);
    }
    Err(refused(name))
}

/// The same for the variants of a comparison.
pub(crate) fn load_variants(name: &str) -> Result<Variants> {
    if name == COMPARE {
        return Ok(Variants::from_toml(EMBEDDED_VARIANTS.text, "the embedded compare")?);
    }
    if let Some(path) = path(name) {
        return Ok(Variants::from_file(path)?);
    }
    Err(refused(name))
}

/// That there is nothing of that name, or which command it is for.
fn refused(name: &str) -> Error {
    let is_one_of = |list: &[Embedded]| list.iter().any(|recipe| recipe.name == name);
    let (what, usage) = match embedded(name) {
        Err(error) => return error,
        Ok(_) if is_one_of(&EMBEDDED) => ("a recipe for models", "vq train --config"),
        Ok(_) if is_one_of(&EMBEDDED_PRIORS) => ("a recipe for priors", "vq train-prior --config"),
        Ok(_) => ("for comparisons", "vq compare --variants"),
    };
    Error::other(format!("`{name}` is {what}: {usage} {name}"))
}

/// All of them.
pub(crate) fn all() -> impl Iterator<Item = &'static Embedded> {
    EMBEDDED.iter().chain(&EMBEDDED_PRIORS).chain([&EMBEDDED_VARIANTS])
}

/// The file that is meant, if one is.
fn path(name: &str) -> Option<&Path> {
    let path = Path::new(name);
    let is_path = path.components().count() > 1 || path.extension().is_some() || path.exists();
    is_path.then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_embedded_recipe_is_valid_and_says_what_it_is() {
        for recipe in &EMBEDDED {
            load(recipe.name).unwrap().validate().unwrap();
            assert!(recipe.summary().len() > 20, "{}", recipe.name);
        }
        // Grids, bottom first, and bits an image, as their comments say.
        for (name, grids, bits) in [
            ("cifar10", &[8][..], 576.0),
            ("cifar10-paper", &[8], 576.0),
            ("cifar10-hierarchical", &[16, 8], 2_880.0),
            ("cifar10-likelihood", &[8], 5_760.0),
            ("imagenet256", &[64, 32], 46_080.0),
            ("images1024", &[128, 64, 32], 193_536.0),
            ("shapes", &[8], 512.0),
            ("plain-shapes", &[8], 384.0),
            ("plain-shapes-hierarchical", &[16, 8], 1_664.0),
        ] {
            let model = load(name).unwrap().model;
            let [height, width] = model.image_size;
            let expected: Vec<[usize; 2]> = grids.iter().map(|&side| [side, side]).collect();
            assert_eq!(model.grids(height, width).unwrap(), expected, "{name}");
            assert!((model.bits_per_image() - bits).abs() < 1e-6, "{name}");
        }
        for recipe in &EMBEDDED_PRIORS {
            load_prior(recipe.name).unwrap().validate().unwrap();
            assert!(recipe.summary().len() > 20, "{}", recipe.name);
            assert!(load(recipe.name).unwrap_err().to_string().contains("vq train-prior"));
        }
        assert!(load_prior(SHAPES).unwrap_err().to_string().contains("vq train --config"));
        load_variants(COMPARE).unwrap();
        for error in [load(COMPARE).unwrap_err(), load_prior(COMPARE).unwrap_err()] {
            assert!(error.to_string().contains("vq compare --variants"), "{error}");
        }
        assert!(load_variants(SHAPES).unwrap_err().to_string().contains("vq train --config"));
        let error = load("cifar100").unwrap_err().to_string();
        assert!(error.contains("cifar10-paper"), "{error}");
    }

    #[test]
    fn the_embedded_variants_fit_every_recipe_at_its_bits() {
        let variants = load_variants(COMPARE).unwrap();
        for recipe in &EMBEDDED {
            let base = variants.common(&load(recipe.name).unwrap()).unwrap();
            for variant in variants.choose(&["all".to_owned()]).unwrap() {
                if recipe.name == "cifar10-likelihood" {
                    let error = variant.recipe(&base).unwrap_err().to_string();
                    assert!(error.contains("90 bits at a position"), "{error}");
                    continue;
                }
                let bits = variant.recipe(&base).unwrap().model.bits_per_image();
                let difference = (bits - base.model.bits_per_image()).abs();
                if recipe.name == "plain-shapes-hierarchical" {
                    // The five bits of its bottom level cannot be split evenly.
                    assert!(difference < 44.0, "{}: {bits}", variant.name);
                    continue;
                }
                assert!(difference < 1e-6, "{} on {}: {bits}", variant.name, recipe.name);
            }
        }
        // One for each kind, and those that are asked for by name.
        let names: Vec<&str> = variants
            .choose(&[])
            .unwrap()
            .into_iter()
            .map(|variant| variant.name.as_str())
            .collect();
        assert_eq!(names, vq_model::QuantizerKind::ALL.map(vq_model::QuantizerKind::name));
    }
}
