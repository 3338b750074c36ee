//! What was measured, as a table.

use std::fmt::Write as _;

use super::{Contender, Group, median};

/// The table of a work, as Markdown.
pub(super) fn of(group: &Group, work: &str, contenders: &[Contender]) -> String {
    let unit = group.unit;
    let heading = match group.works {
        [_] => group.title.to_owned(),
        _ => format!("{}, {work}", group.title),
    };
    let has_working = contenders.iter().any(|contender| contender.working_mib.is_some());
    let (more, line) = if has_working { (" working memory |", "--:|") } else { ("", "") };
    let mut text = format!(
        "\n### {heading}\n\n| | {unit}/s, median (min–max) | ours / it | GFLOP/s | of GEMM peak | peak memory |{more}\n\
         |---|--:|--:|--:|--:|--:|{line}\n"
    );
    let peak = contenders.first().map_or(f64::NAN, |gemm| median(&gemm.rates) / 1e9);
    let ours = contenders.get(1).map(|c| c.rates.clone()).unwrap_or_default();
    for contender in contenders.iter().skip(1) {
        let ratios: Vec<f64> = ours.iter().zip(&contender.rates).map(|(a, b)| a / b).collect();
        let rate = median(&contender.rates);
        let (low, high) = contender
            .rates
            .iter()
            .fold((f64::INFINITY, 0f64), |(low, high), r| (low.min(*r), high.max(*r)));
        let gflops = rate * (group.flops)(work) / 1e9;
        let working = match contender.working_mib {
            Some(working) => format!(" {working:.1} MiB |"),
            None if has_working => " |".to_owned(),
            None => String::new(),
        };
        let _ = writeln!(
            text,
            "| {} | {rate:.0} ({low:.0}–{high:.0}) | {:.2}× | {gflops:.0} | {:.0}% | {:.0} MiB |{working}",
            contender.name,
            median(&ratios),
            100. * gflops / peak,
            contender.peak_mib,
        );
    }
    let _ = writeln!(
        text,
        "\nGEMM peak in the same rounds (2048³, f32): {peak:.0} GFLOP/s. GFLOP/s count the operations of \
         the definition; an algorithm that needs fewer can pass the peak."
    );
    if has_working {
        text.push_str(
            "Working memory: by how much the resident memory grows during a search, at most, beyond vectors and \
             codebook; of PyTorch during a later search than the first, which also compiles.\n",
        );
    }
    text
}
