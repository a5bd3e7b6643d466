//! From a stored value to HU: the Modality transformation (PS3.3 C.11.1.1).

use serde::{Deserialize, Serialize};

/// Rescale Slope (0028,1053) and Rescale Intercept (0028,1052), per image or per frame.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rescale {
    /// HU per stored value; finite and not 0.
    pub slope: f64,
    /// HU of the stored value 0; finite.
    pub intercept: f64,
}

impl Rescale {
    /// HU of `stored_value`: `slope x stored + intercept`, in f64, two roundings (PS3.3 C.11.1.1.2).
    #[must_use]
    #[expect(
        clippy::cast_precision_loss,
        reason = "a stored value has at most 32 bits; f64 holds it exactly"
    )]
    pub fn hounsfield(&self, stored_value: i64) -> f64 {
        let scaled = self.slope * stored_value as f64;
        scaled + self.intercept
    }

    /// Whether both numbers can be used: finite, and a slope other than 0.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        self.slope.is_finite() && self.intercept.is_finite() && self.slope != 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hounsfield_is_slope_times_stored_plus_intercept() {
        let rescale = Rescale {
            slope: 0.5,
            intercept: -1024.0,
        };
        assert!((rescale.hounsfield(2048) - 0.0).abs() < f64::EPSILON);
    }

    #[test]
    fn slope_zero_or_not_a_number_is_unusable() {
        assert!(
            !Rescale {
                slope: 0.0,
                intercept: 0.0
            }
            .is_usable()
        );
        assert!(
            !Rescale {
                slope: f64::NAN,
                intercept: 0.0
            }
            .is_usable()
        );
        assert!(
            !Rescale {
                slope: 1.0,
                intercept: f64::INFINITY
            }
            .is_usable()
        );
    }
}
