//! A quantized convolution of any shape: padded, strided, dilated, grouped, with zero points. Its products run on our kernels.
//!
//! In: one u8 image `[channel, row, column]`. Out: u8 `[channel, row, column]`. This is for graphs that are not our chain (ResNet,
//! Inception). The patches of some hundred positions are gathered side by side, so that to the kernel every convolution is one of 1 x 1 over a
//! row of long pixels; the tile takes them from the two halves of that row. Then rows of pixels become rows of channels again.
//!
//! Arithmetic as in `kernels`: with input zero point `z` and output zero point `y`,
//! `clamp(round_half_even(f32(bias + sum w (a - z)) x scale) + y, lowest, 255)`; `- z sum w` is folded into the bias.

use crate::kernels::{self, ConvRow, Kernel, Levels, POSITIONS, PackedBlock, Unpacked, pack};
use crate::model::MAX_MAP_BYTES;
use crate::transpose::{Matrix, transpose};

/// Bytes of patches that are gathered at once: half of them and a block of weights stay in the second level of the cache.
const STRIP_BYTES: usize = 128 << 10;

/// Least and most positions of a strip, whole tiles.
const STRIP_POSITIONS: [usize; 2] = [4 * POSITIONS, 64 * POSITIONS];

/// Channels of a pixel in a strip are padded to a multiple, as the blocks of every kernel are.
const CHANNEL_STEP: usize = 16;

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
    pub(crate) levels: Levels,
    /// s8 as bytes, in the order of `shape`.
    pub(crate) weights: Vec<u8>,
    pub(crate) bias: Vec<i32>,
    /// Accumulator to output, one per output channel.
    pub(crate) scale: Vec<f32>,
}

/// A convolution, checked and packed for one kernel.
#[derive(Debug)]
pub(crate) struct GeneralConvolution {
    /// Without weights: those are in the groups.
    definition: Definition,
    kernel: Kernel,
    /// For each group its blocks of outputs; weights over the patch `[row, column, input of the group]`.
    groups: Vec<Vec<PackedBlock>>,
    /// Bytes of a patch, padded for the kernel.
    patch_bytes: usize,
}

impl Definition {
    /// The biases less `input_zero` x the sums of weights; `None` where sizes do not fit, a weight is -128, or an accumulator could leave i32.
    pub(crate) fn folded_bias(&self) -> Option<Vec<i32>> {
        let [outputs, inputs, rows, columns] = self.shape;
        let filter = inputs.checked_mul(rows.checked_mul(columns)?)?;
        let fits = self.weights.len() == outputs.checked_mul(filter)?
            && self.bias.len() == outputs
            && self.scale.len() == outputs
            && self.groups > 0
            && outputs.is_multiple_of(self.groups)
            && !self.strides.contains(&0)
            && !self.dilations.contains(&0);
        fits.then(|| folded_bias(&self.weights, &self.bias, self.input_zero))?
    }
}

impl GeneralConvolution {
    /// Checks and packs; `None` where [`Definition::folded_bias`] finds a fault.
    pub(crate) fn new(mut definition: Definition, kernel: Kernel) -> Option<Self> {
        let bias = definition.folded_bias()?;
        let kernel = kernel.without_pool();
        let [outputs, inputs, rows, columns] = definition.shape;
        let (taps, per_group) = (rows * columns, outputs / definition.groups);
        let patch_bytes = (inputs * taps).next_multiple_of(kernel.geometry().step);
        let weights = std::mem::take(&mut definition.weights);
        let group = |(index, weights): (usize, &[u8])| {
            let mut arranged = vec![0; per_group * patch_bytes];
            let filters = weights.chunks_exact(inputs * taps);
            for (to, from) in arranged.chunks_exact_mut(patch_bytes).zip(filters) {
                for (index, &weight) in from.iter().enumerate() {
                    to[index % taps * inputs + index / taps] = weight;
                }
            }
            let of_group = index * per_group..(index + 1) * per_group;
            let unpacked = Unpacked {
                weights: &arranged,
                kernel_rows: 1,
                kernel_row_bytes: patch_bytes,
                bias: &bias[of_group.clone()],
                scale: &definition.scale[of_group],
            };
            pack(kernel.geometry(), unpacked)
        };
        let weights = weights.chunks_exact(per_group * inputs * taps);
        Some(Self {
            groups: weights.enumerate().map(group).collect(),
            definition,
            kernel,
            patch_bytes,
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
        let blocks = self.groups.iter().flatten();
        blocks.map(|b| b.weights.len() + 8 * b.bias.len()).sum()
    }

    /// Convolves one image into `out`, `[output, row, column]` of [`Self::output_size`].
    ///
    /// # Panics
    ///
    /// Where the image or `out` have another size, or the kernel does not fit the image.
    pub(crate) fn run(&self, image: &[u8], size: [usize; 2], out: &mut [u8]) {
        let [rows, columns] = self.output_size(size).expect("the kernel fits the image");
        let n_positions = rows * columns;
        assert_eq!(
            out.len(),
            self.n_outputs() * n_positions,
            "the output's size"
        );
        let (padded, row_bytes) = self.pad(image, size);
        let per_group = self.n_outputs() / self.definition.groups;
        let stride = per_group.next_multiple_of(CHANNEL_STEP);
        let [least, most] = STRIP_POSITIONS;
        let most = n_positions.next_multiple_of(POSITIONS).min(most);
        let strip = (STRIP_BYTES / self.patch_bytes).next_multiple_of(POSITIONS);
        let strip = strip.clamp(least, most.max(least));
        let mut patches = vec![0; strip * self.patch_bytes];
        let mut pixels = vec![0; strip * stride];
        for (group, out) in out.chunks_exact_mut(per_group * n_positions).enumerate() {
            for first in (0..n_positions).step_by(strip) {
                let n = strip.min(n_positions - first);
                let places = patches.chunks_exact_mut(self.patch_bytes);
                for (patch, position) in places.zip(first..first + n) {
                    let at = [position / columns, position % columns];
                    self.gather(&padded, row_bytes, at, group, patch);
                }
                let pixels = &mut pixels[..n.next_multiple_of(POSITIONS) * stride];
                self.convolve(group, &patches, stride, pixels);
                let of = Matrix {
                    rows: n,
                    columns: per_group,
                    stride,
                };
                transpose(pixels, of, &mut out[first..], n_positions);
            }
        }
    }

    /// All outputs of a group at as many positions as `pixels` has room for, `[position, output]`, `stride` bytes a position.
    fn convolve(&self, group: usize, patches: &[u8], stride: usize, pixels: &mut [u8]) {
        let half = pixels.len() / stride / 2;
        let (top, bottom) = pixels.split_at_mut(half * stride);
        for block in &self.groups[group] {
            let row = ConvRow {
                rows: &[patches, &patches[half * self.patch_bytes..]],
                column_bytes: self.patch_bytes,
                kernel_row_bytes: self.patch_bytes,
                weights: &block.weights,
                bias: &block.bias,
                scale: &block.scale,
                n_columns: half / 2,
                out_stride: stride,
            };
            let out = [&mut *top, &mut *bottom].map(|half| &mut half[block.first_channel..]);
            kernels::conv_rows(self.kernel, &row, self.definition.levels, out);
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

    /// The image as `[row, column, channel]` with its border of zero points, and the bytes of a row.
    fn pad(&self, image: &[u8], [rows, columns]: [usize; 2]) -> (Vec<u8>, usize) {
        let [top, left, bottom, right] = self.definition.pads;
        let channels = self.n_inputs();
        assert_eq!(image.len(), channels * rows * columns, "the image's size");
        let row_bytes = (left + columns + right) * channels;
        let mut padded = vec![self.definition.input_zero; (top + rows + bottom) * row_bytes];
        let of = Matrix {
            rows: channels,
            columns,
            stride: rows * columns,
        };
        for row in 0..rows {
            let to = &mut padded[(top + row) * row_bytes + left * channels..];
            transpose(&image[row * columns..], of, to, channels);
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
                    + i64::from(d.levels.zero);
                out.push(value.clamp(i64::from(d.levels.lowest), 255) as u8);
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
                levels: Levels {
                    zero: zeros.1,
                    lowest: if zeros.2 { zeros.1 } else { 0 },
                },
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
