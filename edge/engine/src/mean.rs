//! The mean of a window of a quantized tensor, of all of it for `GlobalAveragePool`.
//!
//! In: u8 `[channel, row, column]`. Out: u8 `[channel, row, column]`. The sum of `q - z` over the window is exact; then
//! `round_half_even(f32(sum) x (x / (y x n))) + zy`, clamped to 0..=255, `n` the number of positions: all of the window's where the
//! padding counts, else those inside the image. It is the arithmetic of onnxruntime's `QLinearGlobalAveragePool`.

use crate::convolution::windows;
use crate::kernels::{Levels, requantize_to};

/// Most positions of a window: their sum stays in 32 bits, and their number is exact in f32.
pub(crate) const MAX_POSITIONS: usize = 1 << 23;

/// ONNX `AveragePool-11` or `GlobalAveragePool-1` between DequantizeLinear and QuantizeLinear.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Mean {
    /// Rows and columns; `None` for the whole image.
    pub(crate) kernel: Option<[usize; 2]>,
    pub(crate) strides: [usize; 2],
    /// Top, left, bottom, right.
    pub(crate) pads: [usize; 4],
    /// Whether the padding's zeros belong to the mean.
    pub(crate) counts_padding: bool,
    /// Scale of the input and the output.
    pub(crate) scales: [f32; 2],
    /// Their zero points.
    pub(crate) zeros: [u8; 2],
}

impl Mean {
    /// Rows and columns of the output; `None` where the window does not fit the padded image or is too large.
    pub(crate) fn output_size(&self, image: [usize; 2]) -> Option<[usize; 2]> {
        match self.kernel {
            None => (image[0].checked_mul(image[1])? <= MAX_POSITIONS).then_some([1, 1]),
            Some(kernel) => windows(image, kernel, self.strides, self.pads),
        }
    }

    /// Averages one image into `out`, `[channel, row, column]` of [`Self::output_size`].
    ///
    /// # Panics
    ///
    /// Where the lengths do not fit.
    pub(crate) fn run(&self, image: &[u8], size: [usize; 2], out: &mut [u8]) {
        let [rows, columns] = self.output_size(size).expect("the window fits the image");
        let kernel = self.kernel.unwrap_or(size);
        let levels = Levels {
            zero: self.zeros[1],
            lowest: 0,
        };
        let planes = image.chunks_exact(size[0] * size[1]);
        for (plane, out) in planes.zip(out.chunks_exact_mut(rows * columns)) {
            for (position, out) in out.iter_mut().enumerate() {
                let reach = |axis: usize, index: usize| {
                    let first = index * self.strides[axis];
                    let pad = self.pads[axis];
                    first.saturating_sub(pad)
                        ..(first + kernel[axis]).saturating_sub(pad).min(size[axis])
                };
                let inside = (reach(0, position / columns), reach(1, position % columns));
                let sum: i32 = inside
                    .0
                    .clone()
                    .flat_map(|row| &plane[row * size[1]..][inside.1.clone()])
                    .map(|&q| i32::from(q) - i32::from(self.zeros[0]))
                    .sum();
                let n = if self.counts_padding {
                    kernel[0] * kernel[1]
                } else {
                    inside.0.len() * inside.1.len()
                };
                *out = requantize_to(levels, sum, self.scale(n));
            }
        }
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "a window has at most 2^23 positions"
    )]
    fn scale(&self, n: usize) -> f32 {
        let [input, output] = self.scales;
        input / (output * n as f32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_counts_or_does_not() {
        let mean = |counts_padding| Mean {
            kernel: Some([3, 3]),
            strides: [1, 1],
            pads: [1, 1, 1, 1],
            counts_padding,
            scales: [0.5, 0.5],
            zeros: [10, 20],
        };
        let image = [10, 100, 28, 19];
        let mut out = [0; 4];
        mean(true).run(&image, [2, 2], &mut out);
        // (0 + 90 + 18 + 9) / 9 = 13, / 4 = 29.25.
        assert_eq!(out, [33; 4]);
        mean(false).run(&image, [2, 2], &mut out);
        assert_eq!(out, [49; 4]);
    }

    #[test]
    fn whole_image_is_one_mean_a_channel() {
        let mean = of_all();
        let mut out = [0; 2];
        mean.run(&[1, 2, 3, 4, 200, 200, 200, 200], [2, 2], &mut out);
        // 2.5 / 0.25 and 200 / 0.25, which saturates.
        assert_eq!(out, [10, 255]);
    }

    fn of_all() -> Mean {
        Mean {
            kernel: None,
            strides: [1, 1],
            pads: [0; 4],
            counts_padding: false,
            scales: [1.0, 0.25],
            zeros: [0, 0],
        }
    }

    #[test]
    fn a_sum_that_could_leave_32_bits_is_refused() {
        let sides = [1 << 12, 1 << 11];
        assert_eq!(of_all().output_size(sides), Some([1, 1]));
        assert_eq!(of_all().output_size([sides[0], sides[1] + 1]), None);
        assert!(MAX_POSITIONS * 255 <= i32::MAX as usize);
    }
}
