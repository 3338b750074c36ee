//! Named numbers, and what a codebook's histogram says.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser::SerializeMap};

/// Named numbers in a fixed order, e.g. the terms of a loss. Serialises as a map.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics(Vec<(String, f64)>);

impl Metrics {
    /// No numbers.
    pub fn new() -> Self {
        Self::default()
    }

    /// With one more number; a name that is there already takes the new value.
    #[must_use]
    pub fn with(mut self, name: &str, value: f64) -> Self {
        self.set(name, value);
        self
    }

    /// Sets a number.
    pub fn set(&mut self, name: &str, value: f64) {
        match self.0.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((name.to_owned(), value)),
        }
    }

    /// The number of that name.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| *value)
    }

    /// All names and numbers in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().map(|(name, value)| (name.as_str(), *value))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds `weight · other`, name by name.
    pub(crate) fn add_scaled(&mut self, other: &Self, weight: f64) {
        for (name, value) in other.iter() {
            self.set(name, self.get(name).unwrap_or(0.0) + weight * value);
        }
    }

    /// Every number divided by `divisor`.
    #[must_use]
    pub(crate) fn divided(&self, divisor: f64) -> Self {
        Self(self.0.iter().map(|(name, value)| (name.clone(), value / divisor)).collect())
    }
}

impl Serialize for Metrics {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Metrics {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Metrics;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a map from names to numbers")
            }

            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Metrics, A::Error> {
                let mut metrics = Metrics::new();
                while let Some((name, value)) = map.next_entry::<String, f64>()? {
                    metrics.set(&name, value);
                }
                Ok(metrics)
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

/// How one level's codebooks are used: from one histogram each over all codes looked at, never a mean
/// of per-batch values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// How often each of the K codes was chosen; those of a second codebook follow those of the first.
    pub counts: Vec<u64>,
    /// G, the number of the level's codebooks, all of them of K codes.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub codebooks: usize,
}

fn one() -> usize {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn is_one(codebooks: &usize) -> bool {
    *codebooks == 1
}

impl Usage {
    /// Of a codebook of `codebook_size` codes, nothing counted yet.
    pub fn new(codebook_size: usize) -> Self {
        Self::with_codebooks(1, codebook_size)
    }

    /// Of G codebooks of `codebook_size` codes each, nothing counted yet.
    pub fn with_codebooks(codebooks: usize, codebook_size: usize) -> Self {
        Self { counts: vec![0; codebooks * codebook_size], codebooks }
    }

    /// Counts codes: G at each position, one of each codebook.
    pub fn count(&mut self, codes: &[u32]) {
        let codebooks = self.codebooks.max(1);
        let size = self.counts.len() / codebooks;
        for (index, &code) in codes.iter().enumerate() {
            let codes = self.counts.get_mut(index % codebooks * size..).unwrap_or_default();
            if let Some(count) = codes.get_mut(..size).and_then(|c| c.get_mut(code as usize)) {
                *count += 1;
            }
        }
    }

    /// How often each of the K codes of each codebook was chosen.
    pub fn by_codebook(&self) -> impl Iterator<Item = &[u64]> {
        self.counts.chunks((self.counts.len() / self.codebooks.max(1)).max(1))
    }

    /// Adds another histogram of the same codebooks.
    pub fn add(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
    }

    /// Codes that were chosen at least once, over all codebooks.
    pub fn codes_in_use(&self) -> usize {
        self.counts.iter().filter(|&&count| count > 0).count()
    }

    /// exp of the entropy (in nats) of the codes' frequencies: 1 if one code does it all, K if all
    /// are equally frequent; 0 if nothing was counted. Of several codebooks the geometric mean, so that
    /// G·ln of it is the sum of their entropies.
    pub fn perplexity(&self) -> f64 {
        let entropies: Option<Vec<f64>> = self.by_codebook().map(entropy).collect();
        match entropies {
            Some(entropies) if !entropies.is_empty() => {
                (entropies.iter().sum::<f64>() / entropies.len() as f64).exp()
            }
            _ => 0.0,
        }
    }

    /// The perplexity of each codebook.
    pub fn perplexities(&self) -> Vec<f64> {
        self.by_codebook().map(|counts| entropy(counts).map_or(0.0, f64::exp)).collect()
    }

    /// Whether a codebook has collapsed: of the codes that so many draws would have reached if all were
    /// equally frequent, under a tenth are in use, or the perplexity is under a twentieth of them. An empty
    /// histogram has not.
    pub fn has_collapsed(&self) -> bool {
        self.by_codebook().any(|counts| {
            let used = counts.iter().filter(|&&count| count > 0).count() as f64;
            let perplexity = entropy(counts).map_or(0.0, f64::exp);
            let reachable = reachable(counts);
            // One code in use tells nothing until two would be all but certain.
            (used <= 1.0 && reachable > 1.9)
                || used * 10.0 < reachable
                || (reachable > 1.9 && perplexity * 20.0 < reachable)
        })
    }
}

/// How many of the K codes as many draws as were counted reach on average if all are equally frequent:
/// K·(1 − (1 − 1/K)ⁿ).
pub(crate) fn reachable(counts: &[u64]) -> f64 {
    let (size, draws) = (counts.len() as f64, counts.iter().sum::<u64>() as f64);
    match counts.len() {
        0 => 0.0,
        1 => draws.min(1.0),
        _ => -size * (draws * (-1.0 / size).ln_1p()).exp_m1(),
    }
}

/// The name of a figure of a level: those above the bottom have its number behind them.
pub(crate) fn level_name(name: &str, level: usize) -> String {
    if level == 0 { name.to_owned() } else { format!("{name}.{level}") }
}

/// Whether a figure, of whatever level, is about the codebooks and not a term of the loss.
pub fn is_codebook_figure(name: &str) -> bool {
    const FIGURES: [&str; 9] = [
        "perplexity",
        "codes_in_use",
        "dead_codes",
        "code_distance",
        "code_spread",
        "code_spacing",
        "duplicate_codes",
        "drift",
        "revived",
    ];
    FIGURES.contains(&name.split(['.', '/']).next().unwrap_or(name))
}

/// The entropy of the frequencies in nats; none if nothing was counted.
fn entropy(counts: &[u64]) -> Option<f64> {
    let total: u64 = counts.iter().sum();
    let share = |&count: &u64| count as f64 / total as f64;
    let counted = counts.iter().filter(|&&count| count > 0);
    (total > 0).then(|| counted.map(share).map(|p| -p * p.ln()).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn perplexity_comes_from_the_whole_histogram() {
        let mut first = Usage::new(4);
        first.count(&[0, 0, 1, 1]);
        let mut second = Usage::new(4);
        second.count(&[2, 2, 3, 3]);
        assert!((first.perplexity() - 2.0).abs() < 1e-12);
        let mut all = first.clone();
        all.add(&second);
        // The mean of the two would be 2.
        assert!((all.perplexity() - 4.0).abs() < 1e-12);
        assert_eq!((first.codes_in_use(), all.codes_in_use()), (2, 4));
        assert!(Usage::new(4).perplexity().abs() < 1e-12);
    }

    #[test]
    fn collapse_is_a_matter_of_share() {
        let mut usage = Usage::new(512);
        assert!(!usage.has_collapsed());
        usage.count(&[0, 1, 2, 3, 4, 5, 6].repeat(100));
        assert!(usage.has_collapsed());
        usage.count(&(0..300).collect::<Vec<u32>>());
        assert!(!usage.has_collapsed());
        let mut skewed = Usage::new(512);
        skewed.count(&(0..512).collect::<Vec<u32>>());
        skewed.counts[0] = 1_000_000;
        assert!(skewed.has_collapsed());
    }

    /// Few draws from a large codebook cannot have used much of it.
    #[test]
    fn collapse_is_judged_by_what_the_draws_could_reach() {
        let size = 262_144_u32;
        let draws = |distinct: u32| -> Usage {
            let mut usage = Usage::new(size as usize);
            let codes = (0..10_000_u32).map(|i| (i % distinct).wrapping_mul(26_003) % size);
            usage.count(&codes.collect::<Vec<u32>>());
            usage
        };
        assert!(!draws(9_800).has_collapsed());
        assert!(draws(50).has_collapsed());
        let mut few = Usage::new(512);
        few.count(&[3]);
        assert!(!few.has_collapsed(), "one draw uses one code");
        few.count(&[3; 20]);
        assert!(few.has_collapsed());
        let mut two = Usage::new(2);
        two.count(&[1, 1]);
        assert!(!two.has_collapsed());
        let mut one = Usage::new(1);
        one.count(&[0; 9]);
        assert!(!one.has_collapsed());
        // K = n: 1 − 1/e of the codes, as K grows.
        assert!((reachable(&vec![1; 10_000]) / 10_000.0 - 0.632_14).abs() < 1e-4);
    }

    #[test]
    fn several_codebooks_are_counted_apart() {
        let mut usage = Usage::with_codebooks(2, 4);
        // Positions of two codes each: the first codebook uses 0 and 1, the second 3 alone.
        usage.count(&[0, 3, 1, 3, 0, 3, 1, 3]);
        let counts: Vec<&[u64]> = usage.by_codebook().collect();
        assert_eq!(counts, [[2, 2, 0, 0], [0, 0, 0, 4]]);
        let [first, second] = usage.perplexities()[..] else { panic!("two codebooks") };
        assert!((first - 2.0).abs() < 1e-12 && (second - 1.0).abs() < 1e-12);
        assert!((usage.perplexity() - 2f64.sqrt()).abs() < 1e-12);
        assert_eq!(usage.codes_in_use(), 3);
        assert!(usage.has_collapsed(), "the second has");
        // A code that is out of range is not one of the next codebook.
        usage.count(&[4, 0]);
        assert_eq!(usage.counts, [2, 2, 0, 0, 1, 0, 0, 4]);
        let text = serde_json::to_string(&usage).unwrap();
        assert_eq!(serde_json::from_str::<Usage>(&text).unwrap(), usage);
        // As one codebook was stored before there could be several.
        let old: Usage = serde_json::from_str(r#"{"counts":[1,2]}"#).unwrap();
        assert_eq!((old.codebooks, old.counts), (1, vec![1, 2]));
    }

    #[test]
    fn metrics_keep_their_order_through_json() {
        let metrics = Metrics::new().with("z", 0.1).with("a", 1e-300).with("z", 0.3);
        let text = serde_json::to_string(&metrics).unwrap();
        assert_eq!(text, r#"{"z":0.3,"a":1e-300}"#);
        assert_eq!(serde_json::from_str::<Metrics>(&text).unwrap(), metrics);
    }
}
