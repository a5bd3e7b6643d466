//! The integer arithmetic of the int8 network (ONNX QuantizeLinear-13, DequantizeLinear-13, ConvInteger's sums).
//!
//! An accumulator is `sum(x_u8 x w_s8) + bias_i32`, exact in i32. It becomes the next layer's u8 by one f32
//! multiplication and one rounding, both IEEE 754 and so the same on every CPU.

/// Largest weight magnitude: -128 is refused, so that weights are symmetric.
pub const MAX_WEIGHT: i8 = 127;

/// Largest activation.
pub const MAX_ACTIVATION: u8 = 255;

/// Scale from an accumulator to the output's u8: `(input x weight) / output`, each operation rounded to f32.
///
/// This is the order in which onnxruntime computes it for QLinearConv; another order gives other last bits.
#[must_use]
pub fn requantize_scale(input: f32, weight: f32, output: f32) -> f32 {
    (input * weight) / output
}

/// `clamp(round_half_even(f32(accumulator) x scale), 0, 255)`: the scalar definition of requantization with zero point 0.
///
/// The clamp at 0 is the ReLU. `f32(accumulator)` rounds to nearest even where the sum has more than 24 bits.
#[must_use]
#[inline]
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the conversion to f32 is the definition; the value is clamped to 0..=255 before it becomes u8"
)]
pub fn requantize(accumulator: i32, scale: f32) -> u8 {
    let scaled = accumulator as f32 * scale;
    libm::rintf(scaled.clamp(0.0, 255.0)) as u8
}

/// Why a layer's accumulator could leave i32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("output channel {channel}: the accumulator can reach {reach}, outside i32")]
pub struct OverflowError {
    /// Output channel, counted from 0.
    pub channel: usize,
    /// The value furthest from 0 that it can take.
    pub reach: i64,
}

/// Checks that no input of 0..=255 can take the accumulator of any output channel out of i32.
///
/// `weights` is s8 `[output channel, inputs]`, `bias` i32 `[output channel]`. Partial sums in any order stay within
/// the checked range too, because the bounds are the sums of all positive and of all negative terms.
///
/// # Errors
/// The first channel that can overflow.
pub fn check_accumulators(weights: &[i8], bias: &[i32]) -> Result<(), OverflowError> {
    let inputs = weights.len() / bias.len().max(1);
    for (channel, &bias) in bias.iter().enumerate() {
        let row = &weights[channel * inputs..(channel + 1) * inputs];
        let sum = |sign: i64| -> i64 {
            row.iter()
                .map(|&w| i64::from(w) * sign)
                .filter(|w| *w > 0)
                .sum::<i64>()
                * sign
                * i64::from(MAX_ACTIVATION)
        };
        let bias = i64::from(bias);
        for reach in [sum(1) + bias.max(0), sum(-1) + bias.min(0)] {
            if i32::try_from(reach).is_err() {
                return Err(OverflowError { channel, reach });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requantize_rounds_half_to_even_and_saturates() {
        for (accumulator, scale, expected) in [
            (1, 0.5, 0),
            (3, 0.5, 2),
            (5, 0.5, 2),
            (-7, 1.0, 0),
            (255, 1.0, 255),
            (256, 1.0, 255),
            (i32::MAX, 1e9, 255),
        ] {
            assert_eq!(
                requantize(accumulator, scale),
                expected,
                "{accumulator} x {scale}"
            );
        }
    }

    #[test]
    fn an_accumulator_that_could_overflow_is_refused() {
        assert_eq!(check_accumulators(&[127, -127], &[0]), Ok(()));
        let reach = i64::from(i32::MAX - 100) + 127 * 255;
        assert_eq!(
            check_accumulators(&[127, -127], &[i32::MAX - 100]),
            Err(OverflowError { channel: 0, reach })
        );
    }
}
