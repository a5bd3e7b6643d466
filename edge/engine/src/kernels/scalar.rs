//! The definition of every kernel: plain Rust, one operation after the other.
//!
//! The other kernels of this folder compute the same integers in another order; where they differ from
//! this file, they are wrong. Products of u8 activations and s8 weights are summed in `i32`, which cannot
//! overflow because the loader has checked every output channel.

use shared::quantize::requantize;

use super::{ConvRow, Geometry};

/// How weights are packed for this kernel: 16 channels a block, one byte at a time.
pub(super) const GEOMETRY: Geometry = Geometry {
    lanes: 16,
    max_vectors: 1,
    group: 1,
    step: 1,
    weight: super::WeightFormat::Bytes,
    is_offset: false,
};

/// Channels of a block.
const CHANNELS: usize = 16;

/// One pooled output row of one block of channels.
///
/// `q[column][channel] = requantize(max over the 2 x 2 window of (bias + sum of activation x weight))`,
/// which equals requantizing before pooling because requantization is monotonic.
pub(super) fn conv_row(row: &ConvRow<'_>, out: &mut [u8]) {
    for column in 0..row.n_columns {
        let mut highest = [i32::MIN; CHANNELS];
        for (bottom, right) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let sums = convolve(row, bottom, 2 * column + right);
            for (high, sum) in highest.iter_mut().zip(sums) {
                *high = (*high).max(sum);
            }
        }
        let pixel = &mut out[column * row.out_stride..][..CHANNELS];
        for ((byte, sum), &scale) in pixel.iter_mut().zip(highest).zip(row.scale) {
            *byte = requantize(sum, scale);
        }
    }
}

/// What the integers of an output stand for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Levels {
    /// The zero point.
    pub(crate) zero: u8,
    /// Smallest integer: the zero point where a ReLU follows, else 0.
    pub(crate) lowest: u8,
}

/// 1.5 x 2^23: the f32 beside it are the integers, so that adding it rounds to one, half to even, and subtracting it leaves that one.
const ROUNDS: f32 = 12_582_912.0;

/// `clamp(round_half_even(f32(sum) x scale) + zero, lowest, 255)`.
#[inline]
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the conversion to f32 is the definition; the value is clamped to 0..=255 before it becomes u8"
)]
pub(crate) fn requantize_to(levels: Levels, sum: i32, scale: f32) -> u8 {
    let rounded = ((sum as f32 * scale).clamp(-512.0, 512.0) + ROUNDS) - ROUNDS;
    let shifted = rounded + f32::from(levels.zero);
    shifted.clamp(f32::from(levels.lowest), 255.0) as u8
}

/// The four positions of each window of one block of channels, not pooled.
pub(super) fn conv_rows(row: &ConvRow<'_>, levels: Levels, mut out: [&mut [u8]; 2]) {
    for (line, out) in out.iter_mut().enumerate() {
        for column in 0..2 * row.n_columns {
            let sums = convolve(row, line, column);
            let pixel = &mut out[column * row.out_stride..][..CHANNELS];
            for ((byte, sum), &scale) in pixel.iter_mut().zip(sums).zip(row.scale) {
                *byte = requantize_to(levels, sum, scale);
            }
        }
    }
}

/// Accumulators of the block's channels at one position before pooling.
fn convolve(row: &ConvRow<'_>, top: usize, column: usize) -> [i32; CHANNELS] {
    let mut sums = [0; CHANNELS];
    sums.copy_from_slice(row.bias);
    let kernel_rows = row.weights.chunks_exact(row.kernel_row_bytes * CHANNELS);
    for (input, weights) in row.rows[top..].iter().zip(kernel_rows) {
        let window = &input[column * row.column_bytes..][..row.kernel_row_bytes];
        for (&activation, weights) in window.iter().zip(weights.chunks_exact(CHANNELS)) {
            for (sum, &weight) in sums.iter_mut().zip(weights) {
                *sum += i32::from(activation) * i32::from(weight.cast_signed());
            }
        }
    }
    sums
}

/// Accumulators of consecutive neurons: `weights` is `[neuron, activation]`.
pub(super) fn dense(activations: &[u8], weights: &[u8], sums: &mut [i32]) {
    for (sum, weights) in sums.iter_mut().zip(weights.chunks_exact(activations.len())) {
        *sum = dot(activations, weights);
    }
}

/// Sum of activation x weight over two slices of equal length: one neuron of a dense layer.
pub(super) fn dot(activations: &[u8], weights: &[u8]) -> i32 {
    activations
        .iter()
        .zip(weights)
        .map(|(&a, &w)| i32::from(a) * i32::from(w.cast_signed()))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to u8"
    )]
    fn requantize_to_rounds_half_to_even() {
        let levels = |zero, lowest| Levels { zero, lowest };
        for sum in -1100..1100 {
            let expected = (f64::from(sum) / 2.0).round_ties_even() + 100.0;
            let expected = expected.clamp(3.0, 255.0) as u8;
            assert_eq!(requantize_to(levels(100, 3), sum, 0.5), expected, "{sum}");
        }
        assert_eq!(requantize_to(levels(0, 0), i32::MAX, 1e9), 255);
        assert_eq!(requantize_to(levels(255, 7), i32::MIN, 1e9), 7);
    }
}
