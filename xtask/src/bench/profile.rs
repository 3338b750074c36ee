//! Where a training step's time goes: every operation of the standard model by itself, and whole steps.

mod layers;
mod parts;
mod steps;

use std::fmt::Write as _;
use std::time::Instant;

use vq_ops::Precision;

use super::worker::{BATCH, Result, gemm_operations};

/// Everything is measured so often, in turn, so that a machine whose speed drifts slows all of it alike …
const ROUNDS: usize = 5;
/// … and each operation runs so often in a round. The median of the rounds' medians counts.
const RUNS: usize = 5;
const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// A row of the table.
struct Row {
    operation: String,
    /// How often it happens in a step.
    times: usize,
    /// In each of [`PRECISIONS`].
    milliseconds: [f64; 2],
    work: Work,
}

/// What an operation does each time.
enum Work {
    /// Floating-point operations by the definition, in the precision.
    Products(f64),
    /// Floating-point operations in f32, whatever the precision of the model.
    F32Products(f64),
    /// Bytes read and written.
    Bytes(f64),
    /// Nothing that could be counted.
    Other,
}

/// Operations per second that are possible in each of [`PRECISIONS`], sampled between the operations.
#[derive(Default)]
struct Peaks([Vec<f64>; 2]);

impl Peaks {
    fn sample(&mut self) -> Result<()> {
        let start = Instant::now();
        let operations = gemm_operations()?;
        self.0[0].push(operations / start.elapsed().as_secs_f64());
        self.0[1].push(vq_ops::passes::bf16_peak());
        Ok(())
    }

    fn median(&self) -> [f64; 2] {
        self.0.each_ref().map(|samples| super::median(samples))
    }
}

/// A table of milliseconds per training step of 128 images, in f32 and in bf16.
pub(super) fn profile() -> Result<String> {
    let mut peaks = Peaks::default();
    // The first product starts the threads.
    gemm_operations()?;
    let (mut rounds, mut steps, mut loader) = (Vec::new(), [Vec::new(), Vec::new()], Vec::new());
    for _ in 0..ROUNDS {
        let mut rows = layers::measure(&mut peaks)?;
        rows.extend(parts::measure(&mut peaks)?);
        rounds.push(rows);
        for (steps, precision) in steps.iter_mut().zip(PRECISIONS) {
            peaks.sample()?;
            steps.push(steps::milliseconds(precision)?);
        }
        loader.push(parts::loader()?);
    }
    let steps = steps.map(|rounds| super::median(&rounds));
    Ok(table(&merged(rounds), steps, super::median(&loader), peaks.median()))
}

/// The rows with the medians of all rounds.
fn merged(mut rounds: Vec<Vec<Row>>) -> Vec<Row> {
    let mut rows = rounds.pop().unwrap_or_default();
    for (index, row) in rows.iter_mut().enumerate() {
        for (precision, milliseconds) in row.milliseconds.iter_mut().enumerate() {
            let others = rounds.iter().filter_map(|rows| rows.get(index));
            let mut all: Vec<f64> = others.map(|row| row.milliseconds[precision]).collect();
            all.push(*milliseconds);
            *milliseconds = super::median(&all);
        }
    }
    rows
}

fn table(rows: &[Row], steps: [f64; 2], loader: f64, peaks: [f64; 2]) -> String {
    let mut text = String::from(
        "| operation | times | f32 | rate | of peak | bf16 | rate | of peak |\n\
         |---|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    let mut sums = [0.; 2];
    for Row { operation, times, milliseconds, work } in rows {
        let _ = write!(text, "| {operation} | {times} |");
        for (index, one) in milliseconds.iter().enumerate() {
            let total = one * *times as f64;
            sums[index] += total;
            let (rate, share) = work.rate(*one, index, peaks);
            let _ = write!(text, " {total:.2} ms | {rate} | {share} |");
        }
        text.push('\n');
    }
    let mut line = |name: &str, values: [f64; 2]| {
        let [f32, bf16] = values;
        let _ = writeln!(text, "| {name} | | {f32:.2} ms | | | {bf16:.2} ms | | |");
    };
    line("sum of these", sums);
    line("the rest of a step", [steps[0] - sums[0], steps[1] - sums[1]]);
    line("**a whole training step**", steps);
    let [f32, bf16] = peaks.map(|peak| peak / 1e9);
    let [images_f32, images_bf16] = steps.map(|step| BATCH as f64 * 1e3 / step);
    let _ = writeln!(
        text,
        "\nMilliseconds of a training step of {BATCH} images: medians of {ROUNDS} rounds, in each of \
         which every operation runs {RUNS} times by itself and the real loop {} steps. Times are those of all that a \
         step does of the operation; steps ({images_f32:.0} images/s \
         in f32, {images_bf16:.0} in bf16) are the real loop's. Peaks, sampled between the operations: {f32:.0} GFLOP/s of f32 (a GEMM of \
         2048³) and {bf16:.0} GFLOP/s of bf16 (our own kernel on packed factors that stay in the first-level cache; \
         a bound on ours, not on the CPU). GFLOP/s count the operations of the definition: minimal filtering \
         (Winograd) needs fewer and can pass the peak. Kernels: {} and, for bf16, {}. The loader makes a batch in \
         {loader:.2} ms on a thread of its own, beside the steps; what that takes from them is in the rest, as are \
         the sums of gradients, the graph, and caches that are colder than in a run of one operation.",
        steps::STEPS.1,
        PRECISIONS[0].kernels(),
        PRECISIONS[1].kernels(),
    );
    text
}

impl Work {
    /// (rate, share of the peak) of one run.
    fn rate(&self, milliseconds: f64, precision: usize, peaks: [f64; 2]) -> (String, String) {
        let (operations, peak) = match self {
            Self::Products(operations) => (operations, peaks[precision]),
            Self::F32Products(operations) => (operations, peaks[0]),
            Self::Bytes(bytes) => {
                return (format!("{:.1} GB/s", bytes / milliseconds / 1e6), String::new());
            }
            Self::Other => return (String::new(), String::new()),
        };
        let rate = operations / milliseconds * 1e3;
        (format!("{:.0} GFLOP/s", rate / 1e9), format!("{:.0}%", 100. * rate / peak))
    }
}

/// Milliseconds that `work` takes on what `prepare` makes, whose time does not count.
fn median<T>(
    prepare: impl Fn() -> candle_core::Result<T>,
    mut work: impl FnMut(T) -> candle_core::Result<()>,
) -> Result<f64> {
    let mut times = Vec::with_capacity(RUNS);
    for run in 0..=RUNS {
        let prepared = prepare()?;
        let start = Instant::now();
        work(prepared)?;
        // The first one takes memory that the others use again.
        if run > 0 {
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    Ok(super::median(&times))
}
