//! Recipes as TOML: reading, overriding single keys, writing, comparing.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};
use vq_model::QuantizerKind;

use crate::{Error, Recipe, Result, file};

/// The table whose keys depend on its [`KIND`].
pub(crate) const QUANTIZER: &str = "quantizer";
pub(crate) const KIND: &str = "kind";

/// What the data position depends on, beside the model's keys.
const FIXED: [&str; 5] =
    ["train.batch_size", "train.seed", "data.source", "data.train_count", "data.flip"];

impl Recipe {
    /// Reads a recipe; `origin` is what an error calls it. Keys that are left out, also those of a
    /// level, take the value of [`Recipe::default`]. Does not [`validate`](Self::validate).
    pub fn from_toml(text: &str, origin: &str) -> Result<Self> {
        let refuse = |error: &toml::de::Error| Error::Recipe {
            origin: origin.to_owned(),
            problem: place_and_problem(text, error),
        };
        // Once as it stands, for errors that know their line, and once on top of the defaults.
        toml::from_str::<Self>(text).map_err(|error| refuse(&error))?;
        let document: Table = toml::from_str(text).map_err(|error| refuse(&error))?;
        let mut merged = table(&Self::default())?;
        merge(&mut merged, document);
        Self::deserialize(merged).map_err(|error| refuse(&error))
    }

    /// Reads a recipe from a file.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::read(path))?;
        Self::from_toml(&text, &path.display().to_string())
    }

    /// With one key set as by `--set key=value`: a dotted path, with numbers for levels
    /// (`model.levels.0.quantizer.dim=8`), and a TOML value, whose quotes may be left out.
    pub fn with_override(&self, assignment: &str) -> Result<Self> {
        with_override(self, assignment)
    }

    /// The whole recipe; [`Recipe::from_toml`] gives the same one back.
    pub fn to_toml(&self) -> Result<String> {
        to_toml(self)
    }

    /// Writes the whole recipe to a file, atomically.
    pub fn save(&self, path: &Path) -> Result<()> {
        file::write_atomic(path, self.to_toml()?.as_bytes())
    }

    /// Whether a run that was started with the recipe `was` can go on with this one. Refuses, by
    /// key, what the weights or the data position depend on; returns the other keys that differ,
    /// as `key: was → now`.
    pub fn check_resume(&self, was: &Self) -> Result<Vec<String>> {
        check_resume(was, self, |key| key.starts_with("model.") || FIXED.contains(&key))
    }
}

/// A recipe with one key set; see [`Recipe::with_override`].
pub(crate) fn with_override<T: Serialize + DeserializeOwned>(
    recipe: &T,
    assignment: &str,
) -> Result<T> {
    let (key, text) = assignment.split_once('=').ok_or_else(|| Error::Override {
        key: assignment.to_owned(),
        problem: "write it as key=value, e.g. train.lr=3e-4".to_owned(),
    })?;
    let (key, text) = (key.trim(), text.trim());
    let refuse = |problem: String| Error::Override { key: key.to_owned(), problem };
    let table = table(recipe)?;
    let attempt = |value: Value| {
        let mut table = Value::Table(table.clone());
        set(&mut table, key, value)?;
        T::deserialize(table).map_err(|error| error.message().to_owned())
    };
    let string = Value::String(text.to_owned());
    match parse_value(text) {
        // `data.source=12` may well mean the text.
        Some(value) => attempt(value).or_else(|problem| attempt(string).map_err(|_| problem)),
        None => attempt(string),
    }
    .map_err(refuse)
}

/// A recipe with the keys of a table laid over it; `origin` is what an error calls the table.
pub(crate) fn laid_over(recipe: &Recipe, origin: &str, over: Table) -> Result<Recipe> {
    let mut merged = table(recipe)?;
    merge(&mut merged, over);
    Recipe::deserialize(merged).map_err(|error| Error::Recipe {
        origin: origin.to_owned(),
        problem: error.message().lines().collect::<Vec<_>>().join("; "),
    })
}

/// A recipe that is its own default where keys are left out; `origin` is what an error calls it.
pub(crate) fn from_toml<T: DeserializeOwned>(text: &str, origin: &str) -> Result<T> {
    toml::from_str(text).map_err(|error| Error::Recipe {
        origin: origin.to_owned(),
        problem: place_and_problem(text, &error),
    })
}

/// The whole recipe.
pub(crate) fn to_toml<T: Serialize>(recipe: &T) -> Result<String> {
    toml::to_string_pretty(recipe).map_err(|error| unwritable(&error))
}

/// The keys that differ between the recipe `was` of a run and that which it is to go on with, as
/// `key: was → now`. Refuses those that are `fixed`.
pub(crate) fn check_resume<T: Serialize>(
    was: &T,
    now: &T,
    fixed: impl Fn(&str) -> bool,
) -> Result<Vec<String>> {
    let mut changed = Vec::new();
    for (key, was, now) in differing(was, now)?.into_iter().map(spelled) {
        if fixed(&key) {
            return Err(Error::ResumeMismatch { key, was, now });
        }
        changed.push(format!("{key}: {was} → {now}"));
    }
    Ok(changed)
}

fn table<T: Serialize>(recipe: &T) -> Result<Table> {
    Table::try_from(recipe).map_err(|error| unwritable(&error))
}

/// Every leaf by its dotted key.
fn flat<T: Serialize>(recipe: &T) -> Result<BTreeMap<String, String>> {
    let mut leaves = BTreeMap::new();
    flatten("", &Value::Table(table(recipe)?), &mut leaves);
    Ok(leaves)
}

/// Lays `over` on top of `base`: tables key by key, levels one by one (further ones on a copy of the
/// last), everything else as a whole.
fn merge(base: &mut Table, over: Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => {
                if key == QUANTIZER
                    && let Some(Value::String(kind)) = above.get(KIND)
                {
                    change_kind(below, kind);
                }
                merge(below, above);
            }
            (Some(Value::Array(below)), Value::Array(above))
                if below.iter().all(Value::is_table) =>
            {
                *below = merge_levels(below, above);
            }
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

fn merge_levels(below: &[Value], above: Vec<Value>) -> Vec<Value> {
    let level = |(index, value): (usize, Value)| match (below.get(index).or(below.last()), value) {
        (Some(Value::Table(below)), Value::Table(above)) => {
            let mut level = below.clone();
            merge(&mut level, above);
            Value::Table(level)
        }
        (_, value) => value,
    };
    above.into_iter().enumerate().map(level).collect()
}

/// Takes the keys out of a quantizer's table that its new kind does not have: they are the old one's
/// settings, not what somebody asks of the new one.
fn change_kind(quantizer: &mut Table, kind: &str) {
    if let Some(kind) = QuantizerKind::from_name(kind) {
        quantizer.retain(|key, _| key == KIND || kind.has_key(key));
    }
}

/// Puts `value` at the dotted `key`.
fn set(target: &mut Value, key: &str, value: Value) -> std::result::Result<(), String> {
    let (first, rest) = match key.split_once('.') {
        Some((first, rest)) => (first, Some(rest)),
        None => (key, None),
    };
    let slot = match target {
        Value::Table(table) => {
            if !table.contains_key(first) {
                let known: Vec<&str> = table.keys().map(String::as_str).collect();
                return Err(format!("no key `{first}` there; known are {}", known.join(", ")));
            }
            table.get_mut(first)
        }
        Value::Array(items) => {
            let count = items.len();
            let index = first.parse::<usize>().ok().filter(|index| *index < count);
            let index = index.ok_or_else(|| format!("`{first}` is not an index below {count}"))?;
            items.get_mut(index)
        }
        _ => return Err(format!("nothing lies below a single value, so there is no `{first}`")),
    };
    match (slot, rest) {
        (Some(slot), Some(rest)) => {
            if let (QUANTIZER, KIND, Value::Table(table), Value::String(kind)) =
                (first, rest, &mut *slot, &value)
            {
                change_kind(table, kind);
            }
            set(slot, rest, value)
        }
        (Some(slot), None) => {
            *slot = value;
            Ok(())
        }
        (None, _) => Err(format!("no key `{first}` there")),
    }
}

fn parse_value(text: &str) -> Option<Value> {
    toml::from_str::<Table>(&format!("value = {text}")).ok()?.remove("value")
}

fn flatten(prefix: &str, value: &Value, leaves: &mut BTreeMap<String, String>) {
    let join = |name: &str| match prefix {
        "" => name.to_owned(),
        _ => format!("{prefix}.{name}"),
    };
    match value {
        Value::Table(table) => {
            for (name, value) in table {
                flatten(&join(name), value, leaves);
            }
        }
        Value::Array(items) if !items.is_empty() && items.iter().all(Value::is_table) => {
            for (index, value) in items.iter().enumerate() {
                flatten(&join(&index.to_string()), value, leaves);
            }
        }
        leaf => {
            leaves.insert(prefix.to_owned(), leaf.to_string());
        }
    }
}

/// One line: which line of the text, what it says, what is wrong.
fn place_and_problem(text: &str, error: &toml::de::Error) -> String {
    let message = error.message().lines().collect::<Vec<_>>().join("; ");
    let Some(before) = error.span().and_then(|span| text.get(..span.start)) else {
        return message;
    };
    let number = before.matches('\n').count();
    let line = text.lines().nth(number).unwrap_or_default().trim();
    format!("line {} (`{line}`): {message}", number + 1)
}

fn unwritable(error: &toml::ser::Error) -> Error {
    Error::Recipe { origin: "recipe".to_owned(), problem: error.to_string() }
}

/// The first leaf that differs: its dotted key, its value in `was` and in `now`.
pub(crate) fn first_difference<T: Serialize>(
    was: &T,
    now: &T,
) -> Result<Option<(String, String, String)>> {
    Ok(differing(was, now)?.into_iter().next().map(spelled))
}

/// Every leaf that differs: its dotted key, its value in `was` and in `now`, where it is there.
pub(crate) fn differing<T: Serialize>(was: &T, now: &T) -> Result<Vec<Difference>> {
    let (was, now) = (flat(was)?, flat(now)?);
    let keys: BTreeSet<&String> = was.keys().chain(now.keys()).collect();
    let leaf = |key: &String| (key.clone(), was.get(key).cloned(), now.get(key).cloned());
    Ok(keys.into_iter().map(leaf).filter(|(_, was, now)| was != now).collect())
}

/// A dotted key and its two values.
pub(crate) type Difference = (String, Option<String>, Option<String>);

fn spelled((key, was, now): Difference) -> (String, String, String) {
    let text = |value: Option<String>| value.unwrap_or_else(|| "absent".to_owned());
    (key, text(was), text(now))
}
