//! The comparison as a table in Markdown.

use std::fmt::Write as _;

use super::{Row, Spread, Summary};

const COLUMNS: [&str; 9] = [
    "",
    "bits an image",
    "MSE",
    "PSNR, dB",
    "SSIM",
    "perplexity",
    "codes in use",
    "training, images/s",
    "seeds",
];

impl Summary {
    /// The table in Markdown, the best first, with what has to be said beside it: which variants do worse
    /// than the baseline, which failed or are not done, and what each has of its own.
    pub fn to_markdown(&self) -> String {
        let mut text = format!("# Quantizers compared\n\n{}\n\n", self.conditions);
        let _ = writeln!(text, "| {} |", COLUMNS.join(" | "));
        let _ = writeln!(text, "|---|{}", "---:|".repeat(COLUMNS.len() - 1));
        for row in &self.rows {
            let _ = writeln!(text, "| {} |", self.cells(row).join(" | "));
        }
        text.push_str(
            "\nMean ± sample standard deviation over the seeds, judged on the whole test split after the last \
             epoch: output clamped to [0, 1], PSNR and SSIM averaged over the images. Perplexity and codes in \
             use are of one histogram over the split; of several codebooks the perplexity is their geometric \
             mean. Speeds are medians over a run's steps and depend on what else the machine did.\n",
        );
        for paragraph in [self.worse_text(), self.unequal_text(), self.open_text()] {
            if !paragraph.is_empty() {
                let _ = writeln!(text, "\n{paragraph}");
            }
        }
        for row in &self.rows {
            for (seed, error) in &row.failures {
                let _ = writeln!(text, "\nFailed: `{}` with seed {seed}: {error}.", row.name);
            }
        }
        text.push_str("\nWhat each has of its own, all else being the same:\n\n");
        for row in &self.rows {
            let changes = match &row.changes[..] {
                [] => "nothing, it is the recipe as it stands".to_owned(),
                changes => changes.join(", "),
            };
            let _ = writeln!(text, "- `{}`: {changes}", row.name);
        }
        text
    }

    fn cells(&self, row: &Row) -> [String; 9] {
        let mark = if row.is_baseline { "**" } else { "" };
        let one =
            |spread: Option<Spread>, digits| spread.map_or(String::new(), |s| plain(s, digits));
        let per_level = |spreads: &[Spread]| {
            spreads.iter().map(|spread| plain(*spread, 1)).collect::<Vec<_>>().join(" + ")
        };
        let seeds = if row.done == self.seeds {
            row.done.to_string()
        } else {
            format!("{} of {}", row.done, self.seeds)
        };
        [
            format!("{mark}{}{mark}", row.name),
            bits(row.bits_per_image),
            one(row.mse, 5),
            one(row.psnr, 2),
            one(row.ssim, 4),
            per_level(&row.perplexity),
            codes(row),
            one(row.images_per_second, 0),
            seeds,
        ]
    }

    fn worse_text(&self) -> String {
        let baseline = &self.baseline;
        match self.worse().as_deref() {
            None => String::new(),
            Some([]) => format!("None has a lower PSNR than `{baseline}`."),
            Some(worse) => {
                let names = worse.iter().map(|(name, difference, is_clear)| {
                    let note = if *is_clear { "" } else { ", within the deviation" };
                    let size = match format!("{:.2}", difference.abs()) {
                        zero if zero == "0.00" => "by less than 0.01".to_owned(),
                        size => format!("−{size}"),
                    };
                    format!("`{name}` ({size} dB{note})")
                });
                let names: Vec<String> = names.collect();
                format!("A lower PSNR than `{baseline}`: {}.", names.join(", "))
            }
        }
    }

    fn unequal_text(&self) -> String {
        let differs = |row: &&Row| (row.bits_per_image - self.bits_per_image).abs() > 1e-6;
        let names: Vec<String> = self
            .rows
            .iter()
            .filter(differs)
            .map(|row| format!("`{}` ({})", row.name, bits(row.bits_per_image)))
            .collect();
        let equal = bits(self.bits_per_image);
        if names.is_empty() {
            return format!("All spend {equal} bits an image.");
        }
        format!("Not at the recipe's {equal} bits an image: {}.", names.join(", "))
    }

    fn open_text(&self) -> String {
        let open = self.rows.iter().filter(|row| row.done + row.failures.len() < self.seeds);
        let names: Vec<String> = open
            .map(|row| {
                let left = self.seeds - row.done - row.failures.len();
                format!("`{}` ({left} of {})", row.name, self.seeds)
            })
            .collect();
        if names.is_empty() {
            return String::new();
        }
        format!("Not done yet: {}.", names.join(", "))
    }
}

/// `25.21 ± 0.03`, or `25.21` of one figure.
fn plain(spread: Spread, digits: usize) -> String {
    let mean = format!("{:.digits$}", spread.mean);
    match spread.deviation {
        Some(deviation) => format!("{mean} ± {deviation:.digits$}"),
        None => mean,
    }
}

/// A whole number where it is one.
fn bits(bits: f64) -> String {
    if (bits - bits.round()).abs() < 1e-6 { format!("{bits:.0}") } else { format!("{bits:.1}") }
}

/// `511.7 ± 0.6 of 512`, `24 of 3×8`; levels with `+` between them.
fn codes(row: &Row) -> String {
    let level = |(spread, (count, size)): (&Spread, &(usize, usize))| {
        let is_whole = spread.mean.fract() == 0.0 && spread.deviation.unwrap_or(0.0) == 0.0;
        let used = if is_whole { format!("{}", spread.mean) } else { plain(*spread, 1) };
        match count {
            1 => format!("{used} of {size}"),
            _ => format!("{used} of {count}×{size}"),
        }
    };
    row.codes_in_use.iter().zip(&row.codebooks).map(level).collect::<Vec<_>>().join(" + ")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{Comparison, Recipe, RunFigures, RunState, Variants};

    const VARIANTS: &str = "
        baseline = 'vector'
        [[variant]]
        name = 'two'
        quantizer = { kind = 'product', groups = 2 }
        [[variant]]
        name = 'vector'
        [[variant]]
        name = 'fsq'
        quantizer.kind = 'finite-scalar'
        train.beta = 0.25
        [[variant]]
        name = 'sim'
        quantizer.kind = 'sim'";

    fn done(psnr: f64, codes: f64) -> RunState {
        RunState::Done(RunFigures {
            mse: 0.004,
            psnr,
            ssim: 0.8,
            perplexity: vec![300.0],
            codes_in_use: vec![codes],
            images_per_second: Some(600.0),
        })
    }

    /// Two seeds of four variants: two and vector done, fsq failed and done, sim begun.
    fn summary() -> Summary {
        let variants = Variants::from_toml(VARIANTS, "test").unwrap();
        let chosen = variants.choose(&[]).unwrap();
        let comparison =
            Comparison::new(Recipe::default(), "vector", &chosen, 2, Path::new("out")).unwrap();
        let names: Vec<String> = comparison
            .runs()
            .iter()
            .map(|run| format!("{} {}", run.folder.display(), run.seed))
            .collect();
        assert_eq!(
            names[..5],
            ["out/two-0 0", "out/vector-0 0", "out/fsq-0 0", "out/sim-0 0", "out/two-1 1"]
        );
        let states = [
            done(24.0, 46.0),
            done(25.0, 512.0),
            RunState::Failed("step 3: the loss is not finite".to_owned()),
            RunState::Begun,
            done(24.2, 46.0),
            done(25.5, 511.0),
            done(25.2, 500.0),
            RunState::Missing,
        ];
        Summary::new(&comparison, &states, "Conditions.".to_owned())
    }

    #[test]
    fn the_table_says_what_there_is_to_say() {
        let text = summary().to_markdown();
        // Means 25.25, 25.2, 24.1; deviations √(2·0.25²) = 0.354, √(2·0.1²) = 0.141.
        let lines: Vec<&str> = text.lines().filter(|line| line.starts_with('|')).collect();
        assert_eq!(
            lines[2..],
            [
                "| **vector** | 576 | 0.00400 ± 0.00000 | 25.25 ± 0.35 | 0.8000 ± 0.0000 | 300.0 ± 0.0 | 511.5 ± 0.7 of 512 | 600 ± 0 | 2 |",
                "| fsq | 576 | 0.00400 | 25.20 | 0.8000 | 300.0 | 500 of 512 | 600 | 1 of 2 |",
                // 2·log₂ 23·64.
                "| two | 579.0 | 0.00400 ± 0.00000 | 24.10 ± 0.14 | 0.8000 ± 0.0000 | 300.0 ± 0.0 | 46 of 2×23 | 600 ± 0 | 2 |",
                "| sim | 576 |  |  |  |  |  |  | 0 of 2 |",
            ]
        );
        for line in [
            "Conditions.",
            "A lower PSNR than `vector`: `fsq` (−0.05 dB, within the deviation), `two` (−1.15 dB).",
            "Not at the recipe's 576 bits an image: `two` (579.0).",
            "Not done yet: `sim` (2 of 2).",
            "Failed: `fsq` with seed 0: step 3: the loss is not finite.",
            "- `vector`: nothing, it is the recipe as it stands",
            "- `fsq`: quantizer.kind = \"finite-scalar\" (not \"vector\"), quantizer.levels = [8, 8, 8], train.beta = 0.25 (not 2.0)",
        ] {
            assert!(text.lines().any(|other| other == line), "`{line}` is missing:\n{text}");
        }
    }

    #[test]
    fn the_csv_files_hold_the_same() {
        let summary = summary();
        let text = summary.to_csv();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 5);
        assert!(
            lines[0].starts_with("variant,bits_per_image,seeds_done,seeds_failed,seeds,psnr_mean,")
        );
        assert!(lines[1].starts_with("vector,576,2,0,2,25.25,0.35355"), "{}", lines[1]);
        assert!(lines[2].starts_with("fsq,576,1,1,2,25.2,,"), "{}", lines[2]);
        let count = |line: &str| line.split(',').count();
        assert!(lines.iter().all(|line| count(line) == count(lines[0])), "{text}");

        let text = summary.runs_to_csv();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 9);
        assert_eq!(lines[2], "vector,0,done,576,25,0.004,0.8,300,512,600,");
        assert_eq!(lines[3], "fsq,0,failed,576,,,,,,,step 3: the loss is not finite");
        assert_eq!(lines[4], "sim,0,begun,576,,,,,,,");
    }
}
