//! Means over seeds, and how far the seeds lie apart.

/// The mean of some figures and their sample standard deviation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Σx / n.
    pub mean: f64,
    /// √(Σ(x − mean)² / (n − 1)); none of a single figure.
    pub deviation: Option<f64>,
    /// n.
    pub count: usize,
}

impl Spread {
    /// Of these figures; none of none.
    pub fn of(figures: &[f64]) -> Option<Self> {
        let count = figures.len();
        if count == 0 {
            return None;
        }
        let mean = figures.iter().sum::<f64>() / count as f64;
        let squares: f64 = figures.iter().map(|figure| (figure - mean).powi(2)).sum();
        let deviation = (count > 1).then(|| (squares / (count as f64 - 1.0)).sqrt());
        Some(Self { mean, deviation, count })
    }
}

/// The middle one of these figures, or the mean of the two in the middle; none of none.
pub(super) fn median(mut figures: Vec<f64>) -> Option<f64> {
    figures.sort_by(f64::total_cmp);
    let count = figures.len();
    let upper = *figures.get(count / 2)?;
    let lower = *figures.get(count.checked_sub(1)? / 2)?;
    Some(f64::midpoint(lower, upper))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deviation_is_the_samples() {
        // Mean 5; squares 9 + 1 + 1 + 1 + 0 + 0 + 4 + 16 = 32; 32 / 7.
        let spread = Spread::of(&[2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]).unwrap();
        assert!((spread.mean - 5.0).abs() < 1e-15);
        assert!((spread.deviation.unwrap() - (32.0f64 / 7.0).sqrt()).abs() < 1e-15);
        assert_eq!(spread.count, 8);
        // 24, 25, 27: mean 76/3, squares 16/9 + 1/9 + 25/9 = 14/3, halved.
        let spread = Spread::of(&[24.0, 25.0, 27.0]).unwrap();
        assert!((spread.mean - 76.0 / 3.0).abs() < 1e-12);
        assert!((spread.deviation.unwrap() - (7.0f64 / 3.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn one_figure_has_no_deviation() {
        let spread = Spread::of(&[3.5]).unwrap();
        assert_eq!((spread.mean, spread.deviation, spread.count), (3.5, None, 1));
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Spread::of(&[1.0, 1.0]).unwrap().deviation, Some(0.0));
    }

    #[test]
    fn the_median_does_not_follow_a_few_slow_steps() {
        assert_eq!(median(vec![3.0, 100.0, 1.0]), Some(3.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 8.0]), Some(3.0));
        assert_eq!(median(vec![7.0]), Some(7.0));
        assert_eq!(median(vec![]), None);
    }
}
