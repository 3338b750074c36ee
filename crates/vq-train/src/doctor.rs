//! The codebook doctor: what the figures of an epoch say of a level's codebooks, and what to do about it.

use vq_model::{
    CodebookGeometry, CodebookRule, Config, LevelConfig, QuantizerConfig, QuantizerKind,
    codebook_drift,
};

use crate::metrics::level_name;
use crate::{Advice, EpochRecord, Metrics, Result, TrainConfig, Usage};

/// Something about the codebooks of a level that could be better.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Finding {
    /// So many codes were not chosen in a whole epoch, beyond those that chance alone leaves out.
    Dead {
        /// Codes.
        codes: usize,
        /// Codes of the level, over all of its codebooks.
        of: usize,
    },
    /// So many codes have another one in (nearly) their place.
    Duplicates {
        /// Codes.
        codes: usize,
        /// Codes of the level, over all of its codebooks.
        of: usize,
    },
    /// The codes still move, late in the run: in one epoch farther than they lie apart.
    Drift {
        /// See [`codebook_drift`]; above 1.
        share: f64,
    },
    /// Codes were revived so often in one epoch.
    Revivals {
        /// How often.
        revived: usize,
        /// Codes of all levels.
        of: usize,
    },
    /// The encoder's vectors lie farther from their codes than the codes from their mean.
    Distance {
        /// How many times as far.
        times: f64,
    },
}

/// The figures of a level's codebooks by themselves, added to those of an epoch: `code_spread`,
/// `code_spacing` (the mean distance to the nearest other code; both means over the level's codebooks),
/// `duplicate_codes` (a sum) and, where those of the epoch before are known, `drift` (the greatest).
///
/// What they are is told at [`CodebookGeometry`] and [`codebook_drift`]. A level without a codebook has
/// none of them.
pub fn codebook_metrics(
    metrics: &mut Metrics,
    level: usize,
    now: &[candle_core::Tensor],
    before: Option<&[candle_core::Tensor]>,
) -> Result<()> {
    if now.is_empty() {
        return Ok(());
    }
    let (mut spread, mut spacing, mut duplicates) = (0.0, 0.0, 0.0);
    for codebook in now {
        let geometry = CodebookGeometry::of(codebook)?;
        spread += geometry.spread / now.len() as f64;
        spacing += geometry.nearest.mean / now.len() as f64;
        duplicates += duplicate_codes(&geometry);
    }
    let name = |name: &str| level_name(name, level);
    metrics.set(&name("code_spread"), spread);
    metrics.set(&name("code_spacing"), spacing);
    metrics.set(&name("duplicate_codes"), duplicates);
    let mut drift = None;
    for (before, now) in before.unwrap_or_default().iter().zip(now) {
        drift = Some(codebook_drift(before, now)?.max(drift.unwrap_or(0.0)));
    }
    // JSON has no infinity.
    if let Some(drift) = drift.filter(|drift| drift.is_finite()) {
        metrics.set(&name("drift"), drift);
    }
    Ok(())
}

/// Of all codes, as far as those that were compared tell.
fn duplicate_codes(geometry: &CodebookGeometry) -> f64 {
    (geometry.duplicates as f64 * geometry.codes as f64 / geometry.compared.max(1) as f64).round()
}

/// What the figures of an epoch, as [`EpochRecord::train`](crate::EpochRecord::train) holds them, say of a
/// level. `is_late`: the run is past its middle, when codes should have settled.
pub fn diagnose(
    figures: &Metrics,
    level: usize,
    quantizer: &QuantizerConfig,
    is_late: bool,
) -> Vec<Finding> {
    let figure = |name: &str| figures.get(&level_name(name, level));
    let of = quantizer.codebook_size * quantizer.codes_per_position();
    let mut findings = Vec::new();
    if let Some(dead) = figure("dead_codes").filter(|dead| dead * 10.0 > of as f64) {
        findings.push(Finding::Dead { codes: dead as usize, of });
    }
    if let Some(codes) = figure("duplicate_codes").filter(|codes| codes * 50.0 > of as f64) {
        findings.push(Finding::Duplicates { codes: codes as usize, of });
    }
    if let Some(share) = figure("drift").filter(|share| is_late && *share > 1.0) {
        findings.push(Finding::Drift { share });
    }
    if let (Some(distance), Some(spread)) = (figure("code_distance"), figure("code_spread"))
        // Of several codebooks the distance is that of all together, the spread that of each.
        && quantizer.codes_per_position() == 1
        && distance > 1.5 * spread
        && is_late
        && spread > 0.0
    {
        findings.push(Finding::Distance { times: distance / spread });
    }
    findings
}

/// Whether codes were revived too often for the revived ones to learn anything; `of` is the number of
/// codes of all levels that can be revived. At the start of a run revivals are its work.
pub(crate) fn diagnose_revivals(figures: &Metrics, of: usize, epoch: usize) -> Option<Finding> {
    let revived = figures.get("revived").unwrap_or(0.0);
    (epoch > 1 && of > 0 && revived > of as f64)
        .then_some(Finding::Revivals { revived: revived as usize, of })
}

/// Whether codes should have settled: in the second half of a run, and not in its first two epochs.
pub fn is_late(epoch: usize, epochs: usize) -> bool {
    epoch > 2 && 2 * epoch > epochs
}

/// All that an epoch's figures ask for, level by level.
pub fn advise(
    config: &Config,
    train: &TrainConfig,
    record: &EpochRecord,
    is_late: bool,
) -> Vec<Advice> {
    let mut advice = Vec::new();
    let mut mortal = 0;
    for (level, LevelConfig { quantizer, .. }) in config.levels.iter().enumerate() {
        if quantizer.kind.has_key("rule") {
            mortal += quantizer.codebook_size * quantizer.codes_per_position();
        }
        let findings = diagnose(&record.train, level, quantizer, is_late);
        advice.extend(findings.iter().map(|finding| Advice {
            key: format!("{}.{level}", finding.name()),
            message: finding.advice(level, quantizer, train),
        }));
    }
    if let Some(finding) = diagnose_revivals(&record.train, mortal, record.epoch)
        && let Some(bottom) = config.levels.first()
    {
        let message = finding.advice(0, &bottom.quantizer, train);
        advice.push(Advice { key: finding.name().to_owned(), message });
    }
    advice
}

impl Finding {
    /// A word for its kind: each is said once in a run of each level.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Dead { .. } => "dead",
            Self::Duplicates { .. } => "duplicates",
            Self::Drift { .. } => "drift",
            Self::Revivals { .. } => "revivals",
            Self::Distance { .. } => "distance",
        }
    }

    /// What is the matter, and which keys of the recipe to change.
    pub fn advice(&self, level: usize, quantizer: &QuantizerConfig, train: &TrainConfig) -> String {
        let key = format!("model.levels.{level}.quantizer");
        match *self {
            Self::Dead { codes, of } => format!(
                "level {level}: {codes} of {of} codes were not chosen in a whole epoch; {}",
                mend_usage(level, quantizer, train)
            ),
            Self::Duplicates { codes, of } => {
                let could_revive = train.revival.threshold == 0.0 && quantizer.kind.has_key("rule");
                let revive =
                    if could_revive { "set train.revival.threshold = 0.1, or " } else { "" };
                format!(
                    "level {level}: {codes} of {of} codes lie where another one does, so they tell \
                     nothing apart; {revive}take a smaller {key}.codebook_size"
                )
            }
            Self::Drift { share } => {
                let ema = quantizer.kind.has_key("rule") && quantizer.rule == CodebookRule::Ema;
                let decay =
                    if ema { format!(" or a {key}.decay nearer to 1") } else { String::new() };
                format!(
                    "level {level}: late in the run the codes still moved by {:.0}% of their spread in one \
                     epoch; try a lower train.lr{decay}",
                    100.0 * share
                )
            }
            Self::Revivals { revived, of } => format!(
                "codes were revived {revived} times in one epoch, and there are {of}: they are replaced \
                 before they can learn; try a lower train.revival.threshold (now {}), a larger \
                 train.batch_size or fewer codes ({key}.codebook_size)",
                train.revival.threshold
            ),
            Self::Distance { times } => format!(
                "level {level}: the encoder's vectors lie {times:.1} times as far from their codes as the \
                 codes from their mean; try a higher train.beta (now {})",
                train.beta
            ),
        }
    }
}

/// What to try where few codes of a level are in use.
pub(crate) fn mend_usage(level: usize, quantizer: &QuantizerConfig, train: &TrainConfig) -> String {
    let key = format!("model.levels.{level}.quantizer");
    if !quantizer.kind.has_key("rule") {
        return if quantizer.kind.has_key("entropy_weight") {
            let beta = if train.beta > 0.25 { "a lower train.beta, such as 0.25, " } else { "" };
            format!(
                "try {beta}a higher {key}.entropy_weight or {key}.diversity, or a lower train.lr"
            )
        } else {
            let is_scalar = quantizer.kind == QuantizerKind::FiniteScalar;
            let size = if is_scalar { "levels" } else { "codebook_size" };
            format!(
                "try a lower train.lr, a longer train.warmup_steps, or fewer codes ({key}.{size})"
            )
        };
    }
    let mut advice = Vec::new();
    if quantizer.rule == CodebookRule::Gradient {
        advice.push(format!("{key}.rule = \"ema\""));
    }
    if train.kmeans.rounds == 0 {
        advice.push("train.kmeans.rounds = 10".to_owned());
    }
    if train.revival.threshold == 0.0 {
        advice.push("train.revival.threshold = 0.1".to_owned());
    }
    if advice.is_empty() {
        return format!(
            "revival may still mend it; otherwise try a lower train.lr, a longer \
             train.warmup_steps, a lower {key}.decay or a smaller {key}.codebook_size"
        );
    }
    format!("set {}, as in the recipe cifar10", advice.join(", "))
}

/// Codes that were not chosen, beyond those that as many draws from an even distribution leave out.
pub(crate) fn dead_codes(usage: &Usage) -> f64 {
    let dead = |counts: &[u64]| {
        let used = counts.iter().filter(|&&count| count > 0).count() as f64;
        (crate::metrics::reachable(counts) - used).max(0.0).floor()
    };
    usage.by_codebook().map(dead).sum()
}

#[cfg(test)]
mod tests {
    use candle_core::Tensor;

    use super::*;

    fn names(findings: &[Finding]) -> Vec<&'static str> {
        findings.iter().map(Finding::name).collect()
    }

    #[test]
    fn a_healthy_codebook_needs_nothing() {
        let healthy = Metrics::new()
            .with("dead_codes", 20.0)
            .with("duplicate_codes", 4.0)
            .with("drift", 0.9)
            .with("code_distance", 0.5)
            .with("code_spread", 1.0);
        let quantizer = QuantizerConfig::default();
        assert!(diagnose(&healthy, 0, &quantizer, true).is_empty());
        assert!(diagnose(&Metrics::new(), 0, &quantizer, true).is_empty());
        assert_eq!(diagnose_revivals(&healthy, 512, 9), None);
    }

    #[test]
    fn each_trouble_is_found_at_its_level_and_names_a_key() {
        let mut figures = Metrics::new();
        for (name, value) in [
            ("dead_codes.1", 300.0),
            ("duplicate_codes.1", 100.0),
            ("drift.1", 1.8),
            ("code_distance.1", 2.0),
            ("code_spread.1", 1.0),
            ("revived", 2000.0),
        ] {
            figures.set(name, value);
        }
        let (quantizer, train) = (QuantizerConfig::default(), TrainConfig::default());
        assert!(diagnose(&figures, 0, &quantizer, true).is_empty());
        let findings = diagnose(&figures, 1, &quantizer, true);
        assert_eq!(names(&findings), ["dead", "duplicates", "drift", "distance"]);
        assert_eq!(names(&diagnose(&figures, 1, &quantizer, false)), ["dead", "duplicates"]);
        let revivals = diagnose_revivals(&figures, 1024, 2).unwrap();
        assert_eq!(diagnose_revivals(&figures, 1024, 1), None);
        for finding in findings.iter().chain([&revivals]) {
            let advice = finding.advice(1, &quantizer, &train);
            let names_a_key =
                ["train.", "model.levels.1.quantizer."].iter().any(|k| advice.contains(k));
            assert!(names_a_key && !advice.contains('\n'), "{advice}");
        }
    }

    #[test]
    fn keys_are_those_that_the_kind_has() {
        let train = TrainConfig::default();
        for kind in QuantizerKind::ALL {
            let quantizer = QuantizerConfig::of(kind);
            let finding = Finding::Dead { codes: 9, of: 10 };
            let advice = finding.advice(0, &quantizer, &train);
            for word in advice.split([' ', ',', ';', ')', '(']) {
                if let Some(key) = word.strip_prefix("model.levels.0.quantizer.") {
                    assert!(kind.has_key(key), "{key} of {}", kind.name());
                }
            }
        }
    }

    #[test]
    fn figures_of_codebooks() {
        let tensor =
            |values: &[f32]| Tensor::from_slice(values, (4, 1), &vq_ops::test_device()).unwrap();
        let (before, now) = (tensor(&[1., -1., 1., -1.]), tensor(&[2., -2., 2., -2.]));
        let mut metrics = Metrics::new();
        codebook_metrics(&mut metrics, 1, std::slice::from_ref(&now), None).unwrap();
        assert_eq!(metrics.get("duplicate_codes.1"), Some(4.0));
        assert_eq!((metrics.get("code_spread.1"), metrics.get("drift.1")), (Some(2.0), None));
        codebook_metrics(&mut metrics, 1, &[now], Some(std::slice::from_ref(&before))).unwrap();
        assert_eq!(metrics.get("drift.1"), Some(0.5));
        // All fell together: no figure that a checkpoint could not hold.
        let mut metrics = Metrics::new();
        codebook_metrics(&mut metrics, 0, &[tensor(&[3.0; 4])], Some(&[before])).unwrap();
        assert_eq!(metrics.get("drift"), None);
        codebook_metrics(&mut Metrics::new(), 0, &[], None).unwrap();
    }

    #[test]
    fn what_chance_leaves_out_is_not_dead() {
        let mut usage = Usage::new(1000);
        usage.count(&(0..100).collect::<Vec<u32>>());
        // A hundred draws cannot reach more than these.
        assert!(dead_codes(&usage).abs() < f64::EPSILON);
        usage.counts[0] = 1_000_000;
        assert!((dead_codes(&usage) - 900.0).abs() <= 1.0);
    }
}
