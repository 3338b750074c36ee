//! The comparison as tables for programs.

use super::{Row, RunState, Spread, Summary};

impl Summary {
    /// One line for each variant, the best first; a figure that is not there yet is left empty.
    pub fn to_csv(&self) -> String {
        let levels = self.levels();
        let mut head: Vec<String> =
            ["variant", "bits_per_image", "seeds_done", "seeds_failed", "seeds"]
                .map(String::from)
                .into();
        for name in names(levels) {
            head.extend([format!("{name}_mean"), format!("{name}_std")]);
        }
        head.push("codes".to_owned());
        let mut lines = vec![line(&head)];
        for row in &self.rows {
            let mut cells = vec![
                row.name.clone(),
                row.bits_per_image.to_string(),
                row.done.to_string(),
                row.failures.len().to_string(),
                self.seeds.to_string(),
            ];
            for spread in spreads(row, levels) {
                cells.push(cell(spread.map(|spread| spread.mean)));
                cells.push(cell(spread.and_then(|spread| spread.deviation)));
            }
            cells.push(row.codes().to_string());
            lines.push(line(&cells));
        }
        lines.concat()
    }

    /// One line for each run, in the order of the runs.
    pub fn runs_to_csv(&self) -> String {
        let levels = self.levels();
        let mut head: Vec<String> =
            ["variant", "seed", "state", "bits_per_image"].map(String::from).into();
        head.extend(names(levels));
        head.push("error".to_owned());
        let mut lines = vec![line(&head)];
        for (name, seed, bits, state) in &self.runs {
            let (word, figures, error) = match state {
                RunState::Missing => ("missing", None, ""),
                RunState::Begun => ("begun", None, ""),
                RunState::Done(figures) => ("done", Some(figures), ""),
                RunState::Failed(error) => ("failed", None, error.as_str()),
            };
            let mut cells = vec![name.clone(), seed.to_string(), word.to_owned(), bits.to_string()];
            let mut figure = |value: Option<f64>| cells.push(cell(value));
            figure(figures.map(|figures| figures.psnr));
            figure(figures.map(|figures| figures.mse));
            figure(figures.map(|figures| figures.ssim));
            for level in 0..levels {
                figure(figures.and_then(|figures| figures.perplexity.get(level).copied()));
                figure(figures.and_then(|figures| figures.codes_in_use.get(level).copied()));
            }
            figure(figures.and_then(|figures| figures.images_per_second));
            cells.push(error.to_owned());
            lines.push(line(&cells));
        }
        lines.concat()
    }

    fn levels(&self) -> usize {
        self.rows.first().map_or(1, |row| row.codebooks.len())
    }
}

/// What the columns of figures are called, of models of so many levels.
fn names(levels: usize) -> Vec<String> {
    let mut names = ["psnr", "mse", "ssim"].map(String::from).to_vec();
    for level in 0..levels {
        let suffix = if level == 0 { String::new() } else { format!(".{level}") };
        names.extend(["perplexity", "codes_in_use"].map(|name| format!("{name}{suffix}")));
    }
    names.push("images_per_second".to_owned());
    names
}

/// A row's figures in the order of [`names`].
fn spreads(row: &Row, levels: usize) -> Vec<Option<Spread>> {
    let mut spreads = vec![row.psnr, row.mse, row.ssim];
    for level in 0..levels {
        spreads.push(row.perplexity.get(level).copied());
        spreads.push(row.codes_in_use.get(level).copied());
    }
    spreads.push(row.images_per_second);
    spreads
}

/// All digits that the number has; empty where there is none.
fn cell(value: Option<f64>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

/// RFC 4180: cells with commas or quotes are quoted.
fn line(cells: &[String]) -> String {
    let quoted = |cell: &String| {
        if cell.contains([',', '"', '\n', '\r']) {
            format!("\"{}\"", cell.replace('"', "\"\""))
        } else {
            cell.clone()
        }
    };
    cells.iter().map(quoted).collect::<Vec<_>>().join(",") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_and_quotes_are_quoted() {
        let cells = ["a", "b, c", "d \"e\""].map(String::from);
        assert_eq!(line(&cells), "a,\"b, c\",\"d \"\"e\"\"\"\n");
    }
}
