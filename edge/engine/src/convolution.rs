//! A quantized convolution of any shape: padded, strided, dilated, grouped, with zero points. Its products run on our kernels.
//!
//! In: one u8 image `[channel, row, column]`. Out: u8 `[channel, row, column]`. This is for graphs that are not our chain (ResNet,
//! Inception); the fused layers of the chain are several times faster, because here every position gathers its own patch.
//!
//! Arithmetic as in `kernels`: with input zero point `z` and output zero point `y`,
//! `clamp(round_half_even(f32(bias + sum w (a - z)) x scale) + y, lowest, 255)`; `- z sum w` is folded into the bias.

use crate::kernels::{self, Kernel};
use crate::model::MAX_MAP_BYTES;

/// Patches are padded with zeros to a multiple of the widest vector.
const PATCH_STEP: usize = 64;

/// What a convolution computes, in the terms of ONNX Conv-11 between DequantizeLinear and QuantizeLinear.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Definition {
    /// `[output, input of the group, row, column]`.
    pub(crate) shape: [usize; 4],
    pub(crate) groups: usize,
    pub(crate) strides: [usize; 2],
    pub(crate) dilations: [usize; 2],
    /// Top, left, bottom, right.
    pub(crate) pads: [usize; 4],
    pub(crate) input_zero: u8,
    pub(crate) output_zero: u8,
    /// Smallest output: `output_zero` where a ReLU follows, else 0.
    pub(crate) lowest: u8,
    /// s8 as bytes, in the order of `shape`.
    pub(crate) weights: Vec<u8>,
    pub(crate) bias: Vec<i32>,
    /// Accumulator to output, one per output channel.
    pub(crate) scale: Vec<f32>,
}

/// A convolution, checked and arranged for one kernel.
#[derive(Debug)]
pub(crate) struct GeneralConvolution {
    definition: Definition,
    kernel: Kernel,
    /// `[output, row, column, input of the group]`, each output padded to `patch_bytes`.
    arranged: Vec<u8>,
    patch_bytes: usize,
    /// The bias less `input_zero` x the sum of weights.
    bias: Vec<i32>,
}

impl GeneralConvolution {
    /// Checks and arranges; `None` where sizes do not fit, a weight is -128, or an accumulator could leave i32.
    pub(crate) fn new(definition: Definition, kernel: Kernel) -> Option<Self> {
        let Definition {
            shape: [outputs, inputs, rows, columns],
            groups,
            ..
        } = definition;
        let taps = rows.checked_mul(columns)?;
        let filter = inputs.checked_mul(taps).filter(|&n| n > 0)?;
        let fits = definition.weights.len() == outputs.checked_mul(filter)?
            && definition.bias.len() == outputs
            && definition.scale.len() == outputs
            && groups > 0
            && outputs > 0
            && outputs.is_multiple_of(groups)
            && !definition.strides.contains(&0)
            && !definition.dilations.contains(&0);
        if !fits {
            return None;
        }
        let patch_bytes = filter.next_multiple_of(PATCH_STEP);
        let mut arranged = vec![0; outputs.checked_mul(patch_bytes)?];
        for (output, from) in definition.weights.chunks_exact(filter).enumerate() {
            for (index, &weight) in from.iter().enumerate() {
                arranged[output * patch_bytes + index % taps * inputs + index / taps] = weight;
            }
        }
        let bias = folded_bias(&definition.weights, &definition.bias, definition.input_zero)?;
        Some(Self {
            definition,
            kernel,
            arranged,
            patch_bytes,
            bias,
        })
    }

    /// Rows and columns of the output; `None` where the kernel does not fit the padded image, or that or the output is larger than
    /// [`MAX_MAP_BYTES`].
    pub(crate) fn output_size(&self, image: [usize; 2]) -> Option<[usize; 2]> {
        let Definition {
            shape,
            strides,
            dilations,
            pads,
            ..
        } = &self.definition;
        let covered = |axis: usize| {
            (shape[2 + axis] - 1)
                .checked_mul(dilations[axis])?
                .checked_add(1)
        };
        let size = windows(image, [covered(0)?, covered(1)?], *strides, *pads)?;
        let padded = [image[0] + pads[0] + pads[2], image[1] + pads[1] + pads[3]];
        let fits = |n: usize, [rows, columns]: [usize; 2]| {
            let bytes = n.checked_mul(rows).and_then(|n| n.checked_mul(columns));
            bytes.is_some_and(|bytes| bytes as u64 <= MAX_MAP_BYTES)
        };
        (fits(self.n_inputs(), padded) && fits(self.n_outputs(), size)).then_some(size)
    }

    /// Input channels, all groups together.
    pub(crate) fn n_inputs(&self) -> usize {
        self.definition.shape[1] * self.definition.groups
    }

    /// Output channels.
    pub(crate) fn n_outputs(&self) -> usize {
        self.definition.shape[0]
    }

    /// Multiply-accumulates for an image of this size.
    pub(crate) fn macs(&self, image: [usize; 2]) -> u64 {
        let [rows, columns] = self.output_size(image).unwrap_or_default();
        let [outputs, inputs, height, width] = self.definition.shape;
        (rows * columns * outputs * inputs * height * width) as u64
    }

    /// Bytes of weights, biases and scales.
    pub(crate) fn parameter_bytes(&self) -> usize {
        self.arranged.len() + 8 * self.bias.len()
    }

    /// Convolves one image into `out`, `[output, row, column]` of [`Self::output_size`].
    ///
    /// # Panics
    ///
    /// Where the image or `out` have another size, or the kernel does not fit the image.
    pub(crate) fn run(&self, image: &[u8], size: [usize; 2], out: &mut [u8]) {
        let [rows, columns] = self.output_size(size).expect("the kernel fits the image");
        let outputs = self.n_outputs();
        assert_eq!(out.len(), outputs * rows * columns, "the output's size");
        let (padded, row_bytes) = self.pad(image, size);
        let per_group = outputs / self.definition.groups;
        let group_bytes = per_group * self.patch_bytes;
        let mut patch = vec![0; self.patch_bytes];
        let mut sums = vec![0; per_group];
        // One row of outputs, `[column, output]`, as the sums come.
        let mut pixels = vec![0; columns * outputs];
        for row in 0..rows {
            for (column, pixel) in pixels.chunks_exact_mut(outputs).enumerate() {
                for (group, pixel) in pixel.chunks_exact_mut(per_group).enumerate() {
                    self.gather(&padded, row_bytes, [row, column], group, &mut patch);
                    let weights = &self.arranged[group * group_bytes..][..group_bytes];
                    kernels::dense(self.kernel, &patch, weights, &mut sums);
                    self.requantize(group * per_group, &sums, pixel);
                }
            }
            for (output, plane) in out.chunks_exact_mut(rows * columns).enumerate() {
                let line = plane[row * columns..][..columns].iter_mut();
                for (to, pixel) in line.zip(pixels.chunks_exact(outputs)) {
                    *to = pixel[output];
                }
            }
        }
    }

    /// What one position of a group sees of the padded image, `[row, column, input of the group]`.
    fn gather(
        &self,
        padded: &[u8],
        row_bytes: usize,
        [row, column]: [usize; 2],
        group: usize,
        patch: &mut [u8],
    ) {
        let Definition {
            shape: [_, inputs, height, width],
            groups,
            strides,
            dilations,
            ..
        } = self.definition;
        let channels = self.n_inputs();
        // Neighbours that lie side by side are copied at once.
        let at_once = if groups == 1 && dilations[1] == 1 {
            width
        } else {
            1
        };
        let taps = (0..height).flat_map(|y| (0..width).step_by(at_once).map(move |x| (y, x)));
        for (to, (y, x)) in patch.chunks_exact_mut(at_once * inputs).zip(taps) {
            let from = (row * strides[0] + y * dilations[0]) * row_bytes
                + (column * strides[1] + x * dilations[1]) * channels
                + group * inputs;
            to.copy_from_slice(&padded[from..][..at_once * inputs]);
        }
    }

    /// Sums of the outputs from `first` on, to u8.
    fn requantize(&self, first: usize, sums: &[i32], out: &mut [u8]) {
        let Definition {
            ref scale,
            output_zero,
            lowest,
            ..
        } = self.definition;
        let parameters = self.bias[first..].iter().zip(&scale[first..]);
        for ((to, &sum), (&bias, &scale)) in out.iter_mut().zip(sums).zip(parameters) {
            *to = requantize(sum + bias, scale, output_zero, lowest);
        }
    }

    /// The image as `[row, column, channel]` with its border of zero points, and the bytes of a row.
    fn pad(&self, image: &[u8], [rows, columns]: [usize; 2]) -> (Vec<u8>, usize) {
        let [top, left, bottom, right] = self.definition.pads;
        let channels = self.n_inputs();
        assert_eq!(image.len(), channels * rows * columns, "the image's size");
        let row_bytes = (left + columns + right) * channels;
        let mut padded = vec![self.definition.input_zero; (top + rows + bottom) * row_bytes];
        for (channel, plane) in image.chunks_exact(rows * columns).enumerate() {
            for (row, line) in plane.chunks_exact(columns).enumerate() {
                let to = &mut padded[(top + row) * row_bytes + left * channels..];
                for (pixel, &value) in to.chunks_exact_mut(channels).zip(line) {
                    pixel[channel] = value;
                }
            }
        }
        (padded, row_bytes)
    }
}

/// Rows and columns of the positions of a window that covers `covered` on a padded image; `None` where it does not fit.
pub(crate) fn windows(
    image: [usize; 2],
    covered: [usize; 2],
    strides: [usize; 2],
    pads: [usize; 4],
) -> Option<[usize; 2]> {
    let mut size = [0; 2];
    for axis in 0..2 {
        let padded = image[axis]
            .checked_add(pads[axis])?
            .checked_add(pads[axis + 2])?;
        size[axis] = padded.checked_sub(covered[axis])? / strides[axis] + 1;
    }
    Some(size)
}

/// The biases less `input_zero` x the sum of each output's weights; `None` where a weight is -128 or an accumulator could leave i32.
pub(crate) fn folded_bias(weights: &[u8], bias: &[i32], input_zero: u8) -> Option<Vec<i32>> {
    if bias.is_empty() || weights.is_empty() || weights.contains(&i8::MIN.cast_unsigned()) {
        return None;
    }
    let filters = weights.chunks_exact(weights.len() / bias.len());
    let of_output = |(from, &bias): (&[u8], &i32)| {
        let sum =
            |f: fn(i64) -> i64| -> i64 { from.iter().map(|w| f(i64::from(w.cast_signed()))).sum() };
        let folded = i64::from(bias) - i64::from(input_zero) * sum(|w| w);
        let reach = folded.abs() + 255 * sum(i64::abs);
        i32::try_from(reach).ok().and(i32::try_from(folded).ok())
    };
    filters.zip(bias).map(of_output).collect()
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
pub(crate) fn requantize(sum: i32, scale: f32, zero: u8, lowest: u8) -> u8 {
    let rounded = ((sum as f32 * scale).clamp(-512.0, 512.0) + ROUNDS) - ROUNDS;
    let shifted = rounded + f32::from(zero);
    shifted.clamp(f32::from(lowest), 255.0) as u8
}

#[cfg(test)]
#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "the reference arithmetic of the test"
)]
mod tests {
    use proptest::prelude::{ProptestConfig, any, prop_assert_eq, proptest};

    use super::*;

    /// The sums by definition: signed indices, a border of real zeros, i64.
    fn by_definition(
        d: &Definition,
        image: &[u8],
        size: [usize; 2],
        [rows, columns]: [usize; 2],
    ) -> Vec<u8> {
        let [outputs, inputs, height, width] = d.shape;
        let mut out = Vec::new();
        for output in 0..outputs {
            let group = output / (outputs / d.groups);
            for position in 0..rows * columns {
                let mut sum = i64::from(d.bias[output]);
                for tap in 0..inputs * height * width {
                    let (input, y, x) = (tap / (height * width), tap / width % height, tap % width);
                    let row = (position / columns * d.strides[0] + y * d.dilations[0]) as i64
                        - d.pads[0] as i64;
                    let column = (position % columns * d.strides[1] + x * d.dilations[1]) as i64
                        - d.pads[1] as i64;
                    if (0..size[0] as i64).contains(&row) && (0..size[1] as i64).contains(&column) {
                        let at = ((group * inputs + input) * size[0] + row as usize) * size[1]
                            + column as usize;
                        let weight =
                            d.weights[output * inputs * height * width + tap].cast_signed();
                        sum += i64::from(weight) * (i64::from(image[at]) - i64::from(d.input_zero));
                    }
                }
                let value = (sum as f32 * d.scale[output]).round_ties_even() as i64
                    + i64::from(d.output_zero);
                out.push(value.clamp(i64::from(d.lowest), 255) as u8);
            }
        }
        out
    }

    fn bytes(seed: u64, n: usize) -> Vec<u8> {
        let mut state = seed | 1;
        let next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            state.to_be_bytes()[0]
        };
        std::iter::repeat_with(next).take(n).collect()
    }

    #[test]
    fn requantize_rounds_half_to_even() {
        for sum in -1100..1100 {
            let expected = (f64::from(sum) / 2.0).round_ties_even() + 100.0;
            let expected = expected.clamp(3.0, 255.0) as u8;
            assert_eq!(requantize(sum, 0.5, 100, 3), expected, "{sum}");
        }
        assert_eq!(requantize(i32::MAX, 1e9, 0, 0), 255);
        assert_eq!(requantize(i32::MIN, 1e9, 255, 7), 7);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(150))]

        #[test]
        fn every_shape_equals_the_definition(
            seed in any::<u64>(),
            groups in 1_usize..4,
            per_group in (1_usize..9, 1_usize..20),
            kernel in (1_usize..8, 1_usize..6),
            strides in (1_usize..4, 1_usize..4),
            dilations in (1_usize..3, 1_usize..3),
            pads in (0_usize..4, 0_usize..4, 0_usize..4, 0_usize..4),
            extra in (0_usize..6, 0_usize..6),
            zeros in (any::<u8>(), any::<u8>(), any::<bool>()),
        ) {
            let size = [(kernel.0 - 1) * dilations.0 + 1 + extra.0, (kernel.1 - 1) * dilations.1 + 1 + extra.1];
            let shape = [groups * per_group.1, per_group.0, kernel.0, kernel.1];
            let n = shape[1] * kernel.0 * kernel.1;
            let weights = bytes(seed, shape[0] * n).into_iter().map(|w| if w == 0x80 { 1 } else { w }).collect();
            let definition = Definition {
                shape,
                groups,
                strides: [strides.0, strides.1],
                dilations: [dilations.0, dilations.1],
                pads: [pads.0, pads.1, pads.2, pads.3],
                input_zero: zeros.0,
                output_zero: zeros.1,
                lowest: if zeros.2 { zeros.1 } else { 0 },
                weights,
                bias: bytes(seed ^ 5, shape[0]).into_iter().map(|b| (i32::from(b) - 128) * 300).collect(),
                scale: vec![0.7 / (n as f32).sqrt() / 73.0; shape[0]],
            };
            let image = bytes(!seed, groups * per_group.0 * size[0] * size[1]);
            for kernel in Kernel::available() {
                let convolution = GeneralConvolution::new(definition.clone(), kernel).unwrap();
                let out_size = convolution.output_size(size).unwrap();
                let mut out = vec![0; shape[0] * out_size[0] * out_size[1]];
                convolution.run(&image, size, &mut out);
                prop_assert_eq!(&out, &by_definition(&definition, &image, size, out_size), "{}", kernel);
            }
        }
    }
}
