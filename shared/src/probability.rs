//! From a logit to the probability that is shown, and back.
//!
//! The decision compares the logit with a stored threshold; the probability is for people. Both are computed here and
//! never by the graph's own sigmoid, so that they have the same bits on every CPU.

/// `1 / (1 + exp(-logit))`, in f64 by a pure-Rust exponential, rounded once to f32. NaN stays NaN.
#[must_use]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the one rounding from f64 to f32"
)]
pub fn sigmoid(logit: f32) -> f32 {
    (1.0 / (1.0 + libm::exp(-f64::from(logit)))) as f32
}

/// `ln(p / (1 - p))`: the inverse of [`sigmoid`], in f64; -inf at 0, +inf at 1, NaN outside 0..=1.
#[must_use]
pub fn logit(probability: f64) -> f64 {
    libm::log(probability / (1.0 - probability))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sigmoid_has_fixed_bits() {
        for (logit, bits) in [
            (0.0_f32, 0x3F00_0000_u32),
            (1.0, 0x3F3B_26A8),
            (-200.0, 0x0000_0000),
            (200.0, 0x3F80_0000),
            // The exact value, computed with 60 decimal digits and rounded to the nearest f32.
            (-12.5, 0x367A_172D),
            (-3.25, 0x3D18_E414),
            (-0.1, 0x3EF3_35EE),
            (0.7, 0x3F2B_0E5B),
            (2.0, 0x3F61_7BEB),
            (15.0, 0x3F7F_FFFB),
        ] {
            assert_eq!(sigmoid(logit).to_bits(), bits, "{logit}");
        }
        assert!(sigmoid(f32::NAN).is_nan());
    }

    #[test]
    fn logit_inverts_sigmoid() {
        for value in [-5.0_f32, -0.3, 0.0, 2.5] {
            assert!((logit(f64::from(sigmoid(value))) - f64::from(value)).abs() < 1e-4);
        }
    }
}
