use serde::{Deserialize, Serialize};

use crate::Error;

/// How pixels become a model's input, channel by channel: x = (pixel / 255 − mean) / std.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Normalization {
    /// One mean per channel, in units of [0, 1].
    pub mean: Vec<f32>,
    /// One standard deviation per channel, in the same units; above zero.
    pub std: Vec<f32>,
}

impl Normalization {
    /// x = pixel / 255 for that many channels.
    pub fn identity(channels: usize) -> Self {
        Self { mean: vec![0.0; channels], std: vec![1.0; channels] }
    }

    /// Refuses lists of another length than the channels, values that are not finite, and standard
    /// deviations that are not above zero.
    pub fn validate(&self, channels: usize) -> Result<(), Error> {
        for (name, values) in [("mean", &self.mean), ("std", &self.std)] {
            if values.len() != channels {
                return Err(Error::Normalization(format!(
                    "{name} has {} values and the images have {channels} channels: give one value \
                     per channel",
                    values.len()
                )));
            }
            if let Some(value) = values.iter().find(|v| !v.is_finite()) {
                return Err(Error::Normalization(format!(
                    "{name} holds {value}: every value must be finite"
                )));
            }
        }
        match self.std.iter().find(|&&s| s <= 0.0) {
            Some(value) => {
                Err(Error::Normalization(format!("std holds {value}: every value must be above 0")))
            }
            None => Ok(()),
        }
    }

    /// What each of the 256 pixel values becomes, per channel.
    pub fn tables(&self) -> Vec<[f32; 256]> {
        self.mean
            .iter()
            .zip(&self.std)
            .map(|(mean, std)| std::array::from_fn(|p| (p as f32 / 255.0 - mean) / std))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(mean: &[f32], std: &[f32]) -> String {
        let normalization = Normalization { mean: mean.to_vec(), std: std.to_vec() };
        normalization.validate(2).expect_err("must be refused").to_string()
    }

    #[test]
    fn what_cannot_be_divided_by_is_refused() {
        assert!(check(&[0.0; 3], &[1.0; 2]).contains("mean has 3 values"));
        assert!(check(&[0.0; 2], &[1.0; 1]).contains("std has 1 values"));
        assert!(check(&[0.0, f32::NAN], &[1.0; 2]).contains("mean holds NaN"));
        assert!(check(&[0.0; 2], &[1.0, f32::NAN]).contains("std holds NaN"));
        assert!(check(&[0.0; 2], &[1.0, f32::INFINITY]).contains("std holds inf"));
        assert!(check(&[0.0; 2], &[0.0, 1.0]).contains("above 0"));
        assert!(check(&[0.0; 2], &[-0.5, 1.0]).contains("std holds -0.5"));
        Normalization::identity(2).validate(2).expect("the identity is fine");
    }

    #[test]
    fn tables_hold_the_formula() {
        let normalization = Normalization { mean: vec![0.5, 0.25], std: vec![1.0, 0.5] };
        let tables = normalization.tables();
        assert_eq!(tables[0][0].to_bits(), (-0.5_f32).to_bits());
        assert_eq!(tables[0][255].to_bits(), 0.5_f32.to_bits());
        assert_eq!(tables[1][255].to_bits(), 1.5_f32.to_bits());
    }
}
