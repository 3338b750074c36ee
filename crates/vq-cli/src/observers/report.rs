//! The report of a training run: a progress bar, lines, or JSON.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use vq_train::{
    EpochFinished, Event, Metrics, Observer, RunEnded, RunStarted, StepFinished,
    is_codebook_figure, record,
};

use super::pace::Pace;
use crate::cli::LogFormat;
use crate::error::{Error, Result};
use crate::output;

/// A progress bar on a terminal, plain lines anywhere else, or one JSON object per line.
pub(crate) struct Reporter {
    style: Style,
    log_every: u64,
    pace: Pace,
    run: String,
    subject: Subject,
}

/// What is trained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    Tokenizer,
    /// A tokenizer among others.
    Compared,
    Prior {
        /// The tokenizer's folder.
        model: PathBuf,
    },
}

enum Style {
    Bar(ProgressBar),
    Lines,
    Json,
}

impl Reporter {
    /// Lines come every `log_every` steps.
    pub(crate) fn new(format: LogFormat, log_every: u64, subject: Subject) -> Self {
        let style = match format {
            LogFormat::Json => Style::Json,
            LogFormat::Text if io::stdout().is_terminal() && io::stderr().is_terminal() => {
                Style::Bar(bar())
            }
            LogFormat::Text => Style::Lines,
        };
        let (log_every, run) = (log_every.max(1), String::new());
        Self { style, log_every, pace: Pace::new(0), run, subject }
    }

    fn report(&mut self, event: &Event<'_>) -> Result<()> {
        if let Style::Json = self.style {
            return match event {
                Event::StepFinished(step) if !self.is_due(step) => Ok(()),
                _ => output::line(record(event)),
            };
        }
        match event {
            Event::RunStarted(started) => self.start(started),
            Event::StepFinished(step) => self.step(step),
            Event::EpochFinished(epoch) => self.line(&epoch_line(epoch)),
            Event::CheckpointSaved(saved) => {
                tracing::info!("checkpoint {}", saved.path.display());
                Ok(())
            }
            Event::Warning(warning) => {
                self.aside("warning", warning.message);
                Ok(())
            }
            Event::RunFinished(ended) => {
                self.clear();
                self.line(&finished(ended, &self.run, &self.subject))
            }
            Event::RunInterrupted(ended) => {
                self.clear();
                let advice = self.subject.command().map_or_else(String::new, |command| {
                    format!("; go on with: vq {command} --resume --out {}", self.run)
                });
                let stopped = match ended.checkpoint {
                    Some(_) => format!("stopped and saved at step {}", ended.step),
                    None => "stopped before the first step".to_owned(),
                };
                self.line(&format!("{stopped}{advice}"))
            }
            _ => Ok(()),
        }
    }

    fn start(&mut self, started: &RunStarted<'_>) -> Result<()> {
        self.pace = Pace::new(started.step);
        self.run = started.run.display().to_string();
        if let Style::Bar(bar) = &self.style {
            bar.set_length(started.total_steps);
            bar.set_position(started.step);
            bar.enable_steady_tick(Duration::from_millis(500));
        }
        match started.resumed_from {
            Some(path) => self.line(&format!(
                "resume  {} (step {} of {})",
                path.display(),
                started.step,
                started.total_steps
            )),
            None => self.line(&format!("output  {}", self.run)),
        }
    }

    fn step(&self, step: &StepFinished<'_>) -> Result<()> {
        let left = output::duration(self.pace.seconds_left(step));
        let loss = step.losses.get("loss").unwrap_or(f64::NAN);
        let perplexity = joined(step.perplexity.iter().map(|value| format!("{value:.0}")));
        // A prior has no codebook of its own.
        let perplexity = match perplexity.as_str() {
            "" => String::new(),
            figures => format!("  perplexity {figures}"),
        };
        let speed = step.images_per_second;
        match &self.style {
            Style::Bar(bar) => {
                bar.set_position(step.step);
                bar.set_prefix(format!("epoch {}/{}", step.epoch, step.epochs));
                bar.set_message(format!(
                    "loss {loss:.4}{perplexity}  {speed:.0} images/s  {left} left"
                ));
                Ok(())
            }
            _ if !self.is_due(step) => Ok(()),
            _ => output::line(format!(
                "step {}/{}  epoch {}/{}  loss {loss:.4}{perplexity}  {speed:.0} images/s  {left} left",
                step.step, step.total_steps, step.epoch, step.epochs
            )),
        }
    }

    fn is_due(&self, step: &StepFinished<'_>) -> bool {
        step.step.is_multiple_of(self.log_every) || step.batch == step.batches
    }

    /// Above the bar, if there is one.
    fn line(&self, text: &str) -> Result<()> {
        match &self.style {
            Style::Bar(bar) => bar.suspend(|| output::line(text)),
            _ => output::line(text),
        }
    }

    fn aside(&self, kind: &str, message: &str) {
        match &self.style {
            Style::Bar(bar) => bar.suspend(|| output::aside(kind, message)),
            _ => output::aside(kind, message),
        }
    }

    fn clear(&self) {
        if let Style::Bar(bar) = &self.style {
            bar.finish_and_clear();
        }
    }
}

impl Subject {
    /// The command that goes on with a run; none where that depends on more than the run.
    fn command(&self) -> Option<&'static str> {
        match self {
            Self::Tokenizer => Some("train"),
            Self::Prior { .. } => Some("train-prior"),
            Self::Compared => None,
        }
    }
}

impl Observer for Reporter {
    fn observe(
        &mut self,
        event: &Event<'_>,
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.report(event).map_err(|error: Error| error.into())
    }
}

fn bar() -> ProgressBar {
    let template = "{prefix} [{wide_bar}] {pos}/{len}  {msg}";
    // The template is a constant; the plain bar would do if it were wrong.
    let style = ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ");
    ProgressBar::no_length().with_style(style).with_finish(ProgressFinish::AndClear)
}

fn epoch_line(epoch: &EpochFinished<'_>) -> String {
    let record = epoch.record;
    let mut line = format!("epoch {}/{}  {}", record.epoch, epoch.epochs, terms(&record.train));
    if let Some(evaluation) = epoch.evaluation {
        let figure = |name| evaluation.metrics.get(name).unwrap_or(f64::NAN);
        let best = if epoch.is_best { ", best so far" } else { "" };
        if evaluation.metrics.get("bits_per_code").is_some() {
            let _ = write!(
                line,
                "  |  held out {:.4} nats, {:.4} bits per code (unigram {:.4}), {:.1} bits per image{best}",
                figure("nats_per_code"),
                figure("bits_per_code"),
                figure("unigram_bits_per_code"),
                figure("bits_per_image"),
            );
            return line + "  |  " + &seconds(epoch);
        }
        let (psnr, ssim) = (figure("psnr"), figure("ssim"));
        let usage = &evaluation.usage;
        let perplexity = joined(usage.iter().map(|usage| format!("{:.1}", usage.perplexity())));
        let codes = joined(
            usage.iter().map(|usage| format!("{} of {}", usage.codes_in_use(), usage.counts.len())),
        );
        let _ = write!(
            line,
            "  |  test{} PSNR {psnr:.2} dB, SSIM {ssim:.3}, perplexity {perplexity}, {codes} codes in use{best}",
            match evaluation.metrics.get("pixel_bits_per_dim") {
                Some(bits) => format!(" {bits:.4} bits per dimension for the pixels,"),
                None => String::new(),
            }
        );
    }
    line + "  |  " + &seconds(epoch)
}

fn seconds(epoch: &EpochFinished<'_>) -> String {
    output::duration(epoch.train_seconds + epoch.evaluation_seconds)
}

/// The loss and what it is made of; without the figures of the codebook.
fn terms(metrics: &Metrics) -> String {
    let terms = metrics.iter().filter(|(name, value)| !is_codebook_figure(name) && *value != 0.0);
    terms.map(|(name, value)| format!("{name} {value:.4}")).collect::<Vec<_>>().join("  ")
}

fn finished(ended: &RunEnded<'_>, run: &str, subject: &Subject) -> String {
    let epoch = ended.history.last().map_or(0, |record| record.epoch);
    let best = ended.best.map_or_else(String::new, |best| match subject {
        // Judged by a likelihood, where the model has one.
        Subject::Tokenizer | Subject::Compared if best.score < 0.0 => {
            let (bits, epoch) = (-best.score, best.epoch);
            format!(", best test {bits:.4} bits per dimension for the pixels after epoch {epoch}")
        }
        Subject::Tokenizer | Subject::Compared => {
            format!(", best test PSNR {:.2} dB after epoch {}", best.score, best.epoch)
        }
        Subject::Prior { .. } => {
            format!(", best held-out {:.4} bits per code after epoch {}", -best.score, best.epoch)
        }
    });
    let typed = typed(run);
    let next = match subject {
        Subject::Tokenizer => {
            format!(
                "; look at {run}/epoch_{epoch}_recon.png, try: vq reconstruct --model {typed} IMAGE"
            )
        }
        Subject::Compared => String::new(),
        Subject::Prior { model } => {
            let model = model.display().to_string();
            format!(
                "; look at {run}/epoch_{epoch}_samples.png, try: vq sample --prior {typed} --model {}",
                self::typed(&model)
            )
        }
    };
    format!("done    {} steps{best}{next}", ended.step)
}

/// A path as it is typed in a shell.
fn typed(path: &str) -> Cow<'_, str> {
    let is_plain = |c: char| c.is_alphanumeric() || "/.,_-+:@%=~".contains(c);
    if path.chars().all(is_plain) { path.into() } else { format!("'{path}'").into() }
}

/// One figure per level.
fn joined(figures: impl Iterator<Item = String>) -> String {
    figures.collect::<Vec<_>>().join(" + ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_with_a_space_is_quoted_where_it_is_to_be_typed() {
        for (path, expected) in [
            ("results/größe-1", "results/größe-1"),
            ("my runs/a", "'my runs/a'"),
            ("~/$HOME(1)", "'~/$HOME(1)'"),
        ] {
            assert_eq!(typed(path), expected);
        }
    }
}
