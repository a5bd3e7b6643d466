//! Numbers to integers: activations to u8 or s8, weights to s8, biases to i32.

use std::fmt;
use std::str::FromStr;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::calibrate::Range;
use crate::execute::nearest;
use crate::export::IMAGE_SCALE;

/// Scale and zero point of a u8 activation: value = (integer - zero point) x scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Parameters {
    pub(super) scale: f32,
    pub(super) zero_point: u8,
}

impl Parameters {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to 0..=255"
    )]
    pub(super) fn of(range: Range) -> Self {
        let width = range.high - range.low;
        let scale = if width > 0.0 {
            (width / 255.0).max(f32::MIN_POSITIVE)
        } else {
            IMAGE_SCALE
        };
        Self {
            scale,
            zero_point: (-range.low / scale).round_ties_even().clamp(0.0, 255.0) as u8,
        }
    }

    /// Rounds values to what the integers can say.
    pub(super) fn apply(self, values: &mut [f32]) {
        let zero_point = f32::from(self.zero_point);
        let (low, high) = (-zero_point, 255.0 - zero_point);
        for value in values {
            *value = nearest((*value / self.scale).clamp(low, high)) * self.scale;
        }
    }
}

/// What one integer step of an activation of that range stands for.
pub(crate) fn activation_scale(range: Range) -> f32 {
    Parameters::of(range).scale
}

/// Symmetric s8: value = integer x scale.
pub(super) fn symmetric_scale(range: Range) -> f32 {
    let magnitude = range.high.max(-range.low);
    if magnitude > 0.0 {
        (magnitude / 127.0).max(f32::MIN_POSITIVE)
    } else {
        1.0 / 127.0
    }
}

/// Bits of a weight: 8, or fewer for runtimes that add products in 16 bits, and for those who pack them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct WeightBits(u8);

impl Default for WeightBits {
    fn default() -> Self {
        Self(8)
    }
}

impl From<WeightBits> for u8 {
    fn from(WeightBits(bits): WeightBits) -> Self {
        bits
    }
}

impl TryFrom<u8> for WeightBits {
    type Error = String;

    fn try_from(bits: u8) -> Result<Self, String> {
        match bits {
            2..=8 => Ok(Self(bits)),
            _ => Err(format!("{bits} bits a weight, allowed are 2 to 8")),
        }
    }
}

impl FromStr for WeightBits {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bits = text.parse::<u8>().map_err(|error| error.to_string())?;
        Self::try_from(bits)
    }
}

impl fmt::Display for WeightBits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl WeightBits {
    /// The largest integer; its negative is the smallest, so that 8 bits leave -128 out.
    fn largest(self) -> f32 {
        f32::from((1_u8 << (self.0 - 1)) - 1)
    }

    /// What one integer step of a row of weights stands for.
    pub(super) fn scale(self, row: &[f32]) -> f32 {
        let magnitude = row
            .iter()
            .fold(0.0_f32, |largest, value| largest.max(value.abs()));
        if magnitude > 0.0 {
            (magnitude / self.largest()).max(f32::MIN_POSITIVE)
        } else {
            1.0 / self.largest()
        }
    }

    /// The integer of a weight at `scale`.
    #[expect(clippy::cast_possible_truncation, reason = "clamped to -127..=127")]
    pub(super) fn integer(self, value: f32, scale: f32) -> i8 {
        let integer = (value / scale).round_ties_even();
        integer.clamp(-self.largest(), self.largest()) as i8
    }
}

/// Integers of one layer.
pub(crate) struct QuantizedLayer {
    pub(super) weights: Vec<i8>,
    pub(super) scales: Vec<f32>,
    pub(super) bias: Vec<i32>,
}

impl QuantizedLayer {
    /// Quantizes `weights [output, inputs]`; a scale is doubled until no accumulator can overflow. The error is the channel for which
    /// that does not help.
    pub(crate) fn of(
        weights: &[f32],
        bias: &[f32],
        input_scale: f32,
        is_per_tensor: bool,
        bits: WeightBits,
    ) -> Result<Self, usize> {
        let n_outputs = bias.len().max(1);
        let n_groups = if is_per_tensor { 1 } else { n_outputs };
        let (a_group, biases_a_group) = ((weights.len() / n_groups).max(1), n_outputs / n_groups);
        let groups = weights
            .par_chunks_exact(a_group)
            .zip(bias.par_chunks_exact(biases_a_group))
            .enumerate();
        let of_groups: Vec<(Vec<i8>, f32, Vec<i32>)> = groups
            .map(|(group, (weights, bias))| {
                let mut scale = bits.scale(weights);
                for _ in 0..64 {
                    let integers: Vec<i8> = weights
                        .iter()
                        .map(|&value| bits.integer(value, scale))
                        .collect();
                    let quantized_bias: Option<Vec<i32>> = bias
                        .iter()
                        .map(|&value| to_i32(value, input_scale * scale))
                        .collect();
                    let fits = |bias: &Vec<i32>| {
                        shared::quantize::check_accumulators(&integers, bias).is_ok()
                    };
                    if let Some(bias) = quantized_bias.filter(fits) {
                        return Ok((integers, scale, bias));
                    }
                    scale *= 2.0;
                }
                Err(group)
            })
            .collect::<Result<_, usize>>()?;
        let mut layer = Self {
            weights: Vec::with_capacity(weights.len()),
            scales: Vec::new(),
            bias: Vec::new(),
        };
        for (weights, scale, bias) in of_groups {
            layer.weights.extend(weights);
            layer.scales.push(scale);
            layer.bias.extend(bias);
        }
        Ok(layer)
    }
}

impl QuantizedLayer {
    /// What the integers stand for: weights and biases.
    pub(crate) fn values(&self, input_scale: f32) -> (Vec<f32>, Vec<f32>) {
        let n_groups = self.scales.len().max(1);
        let of_weights = self.weights.chunks((self.weights.len() / n_groups).max(1));
        let weights = of_weights
            .zip(&self.scales)
            .flat_map(|(weights, scale)| weights.iter().map(move |&w| f32::from(w) * scale));
        let of_biases = self.bias.chunks((self.bias.len() / n_groups).max(1));
        #[expect(
            clippy::cast_precision_loss,
            reason = "a bias beyond 2^24 loses bits that f32 sums lose anyway"
        )]
        let biases = of_biases.zip(&self.scales).flat_map(|(biases, scale)| {
            let scale = input_scale * scale;
            biases.iter().map(move |&bias| bias as f32 * scale)
        });
        (weights.collect(), biases.collect())
    }
}

/// The bias as integer at `scale`; `None` where it leaves i32.
fn to_i32(value: f32, scale: f32) -> Option<i32> {
    let integer = (f64::from(value) / f64::from(scale)).round_ties_even();
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the range is checked in the same line"
    )]
    (integer.abs() <= f64::from(i32::MAX)).then_some(integer as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_the_nearest_integer_ties_to_even_then_into_the_range() {
        let parameters = Parameters {
            scale: 0.5,
            zero_point: 3,
        };
        let mut values = [
            -9.0, -1.5, -0.75, -0.25, 0.0, 0.25, 0.3, 0.75, 125.75, 126.0, 1e9,
        ];
        let expected = values.map(|value: f32| {
            (((value / 0.5).round_ties_even() + 3.0).clamp(0.0, 255.0) - 3.0) * 0.5
        });
        parameters.apply(&mut values);
        assert_eq!(values.map(f32::to_bits), expected.map(f32::to_bits));
    }

    #[test]
    fn fewer_bits_make_fewer_integers() {
        let row = [-1.0, 0.3, 0.6];
        for (bits, expected) in [(8, [-127, 38, 76]), (4, [-7, 2, 4]), (2, [-1, 0, 1])] {
            let bits = WeightBits::try_from(bits).unwrap();
            let scale = bits.scale(&row);
            assert_eq!(row.map(|value| bits.integer(value, scale)), expected);
        }
        assert!(WeightBits::try_from(1).is_err() && "9".parse::<WeightBits>().is_err());
    }

    #[test]
    fn accumulators_that_could_overflow_get_a_coarser_scale() {
        let weights = vec![1.0; 100_000];
        let layer =
            QuantizedLayer::of(&weights, &[0.0], 1.0, false, WeightBits::default()).unwrap();
        assert!(shared::quantize::check_accumulators(&layer.weights, &layer.bias).is_ok());
        assert!(layer.weights[0] < 127 && layer.weights[0] > 32);
        assert!((f32::from(layer.weights[0]) * layer.scales[0] - 1.0).abs() < 0.02);
    }
}
