//! Equal bits: the sizes of a quantizer that spends so many bits at each position.

use toml::{Table, Value};
use vq_model::QuantizerKind;

/// The numbers of codebooks that are tried where several share the bits.
const CODEBOOKS: std::ops::RangeInclusive<usize> = 2..=4;
/// The most values that one number of a `finite-scalar` code takes, as in Mentzer et al. 2023, table 1.
const MOST_LEVELS: usize = 8;

/// Adds to the table of a quantizer of that kind the sizes that it leaves out, so that it spends `bits` at
/// each position, or as near to that as can be. `dim` is the D that it would have otherwise.
///
/// - `vector`, `sim`, `index-backprop`: K = 2^bits, rounded.
/// - `product`, `residual`: K^G = 2^bits with G from 2 to 4; the smallest G for which that is exact, or the
///   one for which it is nearest. D of `product` is rounded up to a multiple of G.
/// - `finite-scalar`: levels of at most 8 values; among the nearest products the fewest, the most even.
/// - `lookup-free`, `binary-spherical`: so many bits, rounded.
pub(super) fn fill(quantizer: &mut Table, kind: QuantizerKind, dim: usize, bits: f64) {
    let given = |key: &str| {
        let value = quantizer.get(key).and_then(Value::as_integer);
        value.and_then(|value| usize::try_from(value).ok()).filter(|value| *value > 0)
    };
    let mut sizes: Vec<(&str, Value)> = Vec::new();
    let number = |value: usize| Value::Integer(value as i64);
    match kind {
        QuantizerKind::Vector | QuantizerKind::Sim | QuantizerKind::IndexBackprop => {
            sizes.push(("codebook_size", number(codes(bits))));
        }
        QuantizerKind::Product | QuantizerKind::Residual => {
            let key = if kind == QuantizerKind::Product { "groups" } else { "stages" };
            let (count, size) = match (given(key), given("codebook_size")) {
                (Some(count), _) => (count, codes(bits / count as f64)),
                (None, Some(size)) if size > 1 => {
                    ((bits / (size as f64).log2()).round().max(1.0) as usize, size)
                }
                _ => split(bits),
            };
            sizes.push((key, number(count)));
            sizes.push(("codebook_size", number(size)));
            if kind == QuantizerKind::Product {
                sizes.push(("dim", number(dim.next_multiple_of(count))));
            }
        }
        QuantizerKind::FiniteScalar => {
            let levels = levels(bits).into_iter().map(number).collect();
            sizes.push(("levels", Value::Array(levels)));
        }
        QuantizerKind::LookupFree | QuantizerKind::BinarySpherical => {
            sizes.push(("bits", number(bits.round().max(1.0) as usize)));
        }
    }
    for (key, value) in sizes {
        quantizer.entry(key).or_insert(value);
    }
}

/// The number of codes nearest to 2^bits, at least 2.
fn codes(bits: f64) -> usize {
    bits.exp2().round().max(2.0) as usize
}

/// G and K of codebooks that share the bits.
fn split(bits: f64) -> (usize, usize) {
    let pairs = CODEBOOKS.map(|count| (count, codes(bits / count as f64)));
    let nearest =
        pairs.min_by_key(|(count, size)| miss(*count as f64 * (*size as f64).log2(), bits));
    nearest.unwrap_or((1, codes(bits)))
}

/// How far off a number of bits is, in billionths of a bit: rounding must not decide between equals.
fn miss(spent: f64, bits: f64) -> u64 {
    ((spent - bits).abs() * 1e9).round() as u64
}

/// The levels of a `finite-scalar` quantizer, the largest first.
fn levels(bits: f64) -> Vec<usize> {
    let mut search = Search { bits, most: (bits + 0.5).exp2().max(2.0), best: None };
    search.extend(&mut Vec::new(), 1);
    search.best.map_or_else(|| vec![2], |(_, levels)| levels)
}

struct Search {
    bits: f64,
    /// No product beyond this is among the nearest.
    most: f64,
    /// Its miss, its length and how uneven it is, which are compared in this order.
    best: Option<((u64, usize, usize), Vec<usize>)>,
}

impl Search {
    /// Tries all lists that begin with `levels` and go on with numbers no larger than their last.
    fn extend(&mut self, levels: &mut Vec<usize>, product: usize) {
        if let (Some(first), Some(last)) = (levels.first(), levels.last()) {
            let merit = (miss((product as f64).log2(), self.bits), levels.len(), first - last);
            if self.best.as_ref().is_none_or(|(best, _)| merit < *best) {
                self.best = Some((merit, levels.clone()));
            }
        }
        for next in (2..=levels.last().copied().unwrap_or(MOST_LEVELS)).rev() {
            if (product * next) as f64 <= self.most {
                levels.push(next);
                self.extend(levels, product * next);
                levels.pop();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(text: &str, kind: QuantizerKind, bits: f64) -> String {
        let mut table: Table = toml::from_str(text).unwrap();
        fill(&mut table, kind, 64, bits);
        let pairs: Vec<String> =
            table.iter().map(|(key, value)| format!("{key} = {value}")).collect();
        pairs.join(", ")
    }

    #[test]
    fn every_kind_gets_nine_bits() {
        use QuantizerKind as Kind;
        for (kind, sizes) in [
            (Kind::Vector, "codebook_size = 512"),
            (Kind::Sim, "codebook_size = 512"),
            (Kind::IndexBackprop, "codebook_size = 512"),
            (Kind::Product, "codebook_size = 8, dim = 66, groups = 3"),
            (Kind::Residual, "codebook_size = 8, stages = 3"),
            (Kind::FiniteScalar, "levels = [8, 8, 8]"),
            (Kind::LookupFree, "bits = 9"),
            (Kind::BinarySpherical, "bits = 9"),
        ] {
            assert_eq!(filled("", kind, 9.0), sizes);
        }
    }

    #[test]
    fn what_is_written_stays() {
        use QuantizerKind as Kind;
        assert_eq!(filled("levels = [7, 5]", Kind::FiniteScalar, 9.0), "levels = [7, 5]");
        assert_eq!(filled("bits = 4", Kind::LookupFree, 9.0), "bits = 4");
        // 9 bits cannot be halved: 23² = 529.
        let two = "codebook_size = 23, dim = 64, groups = 2";
        assert_eq!(filled("groups = 2", Kind::Product, 9.0), two);
        let stages = "codebook_size = 64, stages = 2";
        assert_eq!(filled("codebook_size = 64", Kind::Residual, 12.0), stages);
        // Nonsense is left for the recipe's own check to refuse.
        assert!(filled("stages = -1", Kind::Residual, 9.0).contains("stages = -1"));
    }

    #[test]
    fn a_split_is_exact_where_it_can_be() {
        assert_eq!(split(8.0), (2, 16));
        assert_eq!(split(12.0), (2, 64));
        assert_eq!(split(1000f64.log2()), (3, 10));
        // 7 bits: 11² = 121, 5³ = 125, 3⁴ = 81.
        assert_eq!(split(7.0), (3, 5));
    }

    #[test]
    fn levels_multiply_to_the_number_of_codes() {
        let product = |codes: usize| levels((codes as f64).log2()).iter().product::<usize>();
        for codes in (1..=18).map(|bits| 1usize << bits).chain([500, 625, 1000, 4375]) {
            assert_eq!(product(codes), codes);
        }
        assert_eq!(levels(8.0), [8, 8, 4]);
        assert_eq!(levels(4.0), [4, 4]);
        assert_eq!(levels(1000f64.log2()), [8, 5, 5, 5]);
        assert_eq!(levels(16.0), [8, 8, 8, 8, 4, 4]);
        // A prime number of codes: 509 is nearer to 512 (8³) than to 504 (8·7·3·3).
        assert_eq!(levels(509f64.log2()), [8, 8, 8]);
        assert_eq!(levels(0.0), [2]);
    }
}
