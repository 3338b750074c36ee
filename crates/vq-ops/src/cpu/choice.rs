//! Which instruction set the kernels use: the environment variable `VQ_CPU`.

use super::{bf16, tile};

const VARIABLE: &str = "VQ_CPU";

/// All names, best first. f32 kernels exist for the last three; for f32, a name above them means the
/// first of those.
const NAMES: [&str; 5] = ["amx", "avx512bf16", "avx512", "avx2", "portable"];

/// The best of the kernels that this CPU can run (best first) and that are not above the instruction set
/// that `VQ_CPU` names. An unknown name asks for nothing; see [`check`].
pub(super) fn wanted<K>(
    available: Vec<&'static K>,
    name: impl Fn(&'static K) -> &'static str,
) -> Option<&'static K> {
    let wanted = std::env::var(VARIABLE).unwrap_or_default();
    not_above(&wanted, available, name)
}

fn not_above<K: Copy>(
    wanted: &str,
    available: Vec<K>,
    name: impl Fn(K) -> &'static str,
) -> Option<K> {
    let rank = |name: &str| NAMES.iter().position(|known| *known == name);
    let limit = rank(wanted).unwrap_or(0);
    available.into_iter().find(|kernels| rank(name(*kernels)).is_none_or(|rank| rank >= limit))
}

/// What is wrong with the value of `VQ_CPU`: a name that does not exist or an instruction set that this CPU
/// does not have. The kernels ignore the former, and take the best below the latter.
pub(crate) fn check() -> Result<(), String> {
    match std::env::var_os(VARIABLE) {
        None => Ok(()),
        Some(name) => problem(&name.to_string_lossy(), &available()).map_or(Ok(()), Err),
    }
}

/// The names that this CPU knows, best first.
fn available() -> Vec<&'static str> {
    let has = |name: &str| {
        bf16::kernels::available().iter().any(|kernels| kernels.name == name)
            || tile::available().iter().any(|kernels| kernels.name == name)
    };
    NAMES.into_iter().filter(|name| has(name)).collect()
}

fn problem(name: &str, available: &[&str]) -> Option<String> {
    if name.is_empty() || available.contains(&name) {
        return None;
    }
    let what = if NAMES.contains(&name) {
        "which this CPU does not have"
    } else {
        "which is no instruction set"
    };
    Some(format!(
        "{VARIABLE} is {name:?}, {what}; use one of {}, or unset it",
        available.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_that_is_not_above_the_name() {
        let choose = |wanted, available: &[&'static str]| {
            not_above(wanted, available.to_vec(), |name| name).unwrap()
        };
        let (f32, bf16) = (&NAMES[2..], &NAMES[1..]);
        for (wanted, of_f32, of_bf16) in [
            ("", "avx512", "avx512bf16"),
            ("amx", "avx512", "avx512bf16"),
            ("avx512bf16", "avx512", "avx512bf16"),
            ("avx512", "avx512", "avx512"),
            ("avx2", "avx2", "avx2"),
            ("portable", "portable", "portable"),
            ("avx152", "avx512", "avx512bf16"),
        ] {
            assert_eq!(choose(wanted, f32), of_f32, "{wanted}");
            assert_eq!(choose(wanted, bf16), of_bf16, "{wanted}");
        }
        // A CPU with less than what is asked for.
        assert_eq!(choose("avx512", &["avx2", "portable"]), "avx2");
        assert_eq!(choose("amx", &["portable"]), "portable");
    }

    #[test]
    fn every_kernel_has_a_rank_and_they_come_best_first() {
        let rank = |name: &str| NAMES.iter().position(|known| *known == name).unwrap();
        let f32: Vec<usize> = tile::available().iter().map(|k| rank(k.name)).collect();
        let bf16: Vec<usize> = bf16::kernels::available().iter().map(|k| rank(k.name)).collect();
        assert!(f32.is_sorted() && bf16.is_sorted());
    }

    #[test]
    fn a_name_that_cannot_be_had_is_reported() {
        let available = ["avx2", "portable"];
        assert_eq!(problem("", &available), None);
        assert_eq!(problem("avx2", &available), None);
        let text = problem("avx512", &available).unwrap();
        assert!(text.contains("does not have") && text.contains("avx2, portable"), "{text}");
        let text = problem("axv2", &available).unwrap();
        assert!(text.contains("\"axv2\"") && text.contains("no instruction set"), "{text}");
    }
}
