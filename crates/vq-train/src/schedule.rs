//! The learning rate over the run.

use crate::TrainConfig;

/// What the learning rate does after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// It stays.
    Constant,
    /// It falls to `min_lr` along half a cosine (Loshchilov & Hutter 2017, without restarts).
    #[default]
    Cosine,
}

/// Learning rate of a step (from 0) of a run of `total` steps.
///
/// It rises linearly over `warmup_steps`, which a short run cuts to a quarter of itself, and then
/// follows the schedule. It depends on the position only, so that resuming needs no other state.
pub fn learning_rate(config: &TrainConfig, step: u64, total: u64) -> f64 {
    let warmup = config.warmup_steps.min(total / 4);
    if step < warmup {
        return config.lr * (step + 1) as f64 / warmup as f64;
    }
    match config.schedule {
        Schedule::Constant => config.lr,
        Schedule::Cosine => {
            let done = (step - warmup) as f64 / (total - warmup).max(1) as f64;
            let height = 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos());
            config.min_lr + (config.lr - config.min_lr) * height
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_then_falls_to_the_minimum() {
        let config = TrainConfig {
            lr: 1.0,
            min_lr: 0.1,
            warmup_steps: 10,
            schedule: Schedule::Cosine,
            ..TrainConfig::default()
        };
        let rates: Vec<f64> = (0..110).map(|step| learning_rate(&config, step, 110)).collect();
        assert!((rates[0] - 0.1).abs() < 1e-12);
        assert!((rates[9] - 1.0).abs() < 1e-12);
        assert!((rates[10] - 1.0).abs() < 1e-12);
        assert!((rates[60] - 0.55).abs() < 1e-12);
        assert!(rates[10..].windows(2).all(|pair| pair[1] < pair[0]));
        assert!((rates[109] - 0.1).abs() < 1e-3);
        // After the end, as when a finished run is looked at: the minimum.
        assert!((learning_rate(&config, 500, 110) - 0.1).abs() < 1e-12);
    }

    #[test]
    fn constant_stays_and_short_runs_get_a_short_warmup() {
        let config = TrainConfig {
            lr: 2.0,
            warmup_steps: 100,
            schedule: Schedule::Constant,
            ..TrainConfig::default()
        };
        assert!((learning_rate(&config, 999, 1000) - 2.0).abs() < 1e-12);
        assert!((learning_rate(&config, 5, 20) - 2.0).abs() < 1e-12);
        assert!((learning_rate(&config, 0, 1) - 2.0).abs() < 1e-12);
    }
}
